// SPDX-License-Identifier: Apache-2.0
// `npm run demo`: the main job on a stock kernel, shown.

import process from 'node:process';
import Table from 'cli-table3';
import { runScenario, type ScenarioReport } from './scenario.ts';

const started = performance.now();
const write = (text: string): void => {
  process.stdout.write(`${text}\n`);
};
const say = (text: string): void => {
  write(`[${((performance.now() - started) / 1000).toFixed(1).padStart(6)} s] ${text}`);
};

/** All sizes here are whole ones of it, so that who compares two of them sees what they are. */
const kibibytes = (bytes: number): string => `${bytes / 1024} KiB`;
const seconds = (ms: number): string => `${(ms / 1000).toFixed(1)} s`;

function diskTable({ disks }: ScenarioReport): string {
  const table = new Table({
    head: ['disk', 'size', 'full image', 'pulled in', 'incremental', 'pulled in', 'really changed'],
    style: { head: [], border: [] },
  });
  for (const disk of disks) {
    table.push([
      disk.name,
      kibibytes(disk.sizeBytes),
      kibibytes(disk.fullBytes),
      seconds(disk.fullMs),
      kibibytes(disk.incrementalBytes),
      seconds(disk.incrementalMs),
      kibibytes(disk.changedBytes),
    ]);
  }
  return table.toString();
}

function proofTable({ proofs }: ScenarioReport): string {
  const table = new Table({
    head: ['', 'proof', 'holds', 'seen'],
    colWidths: [3, 40, 7, 64],
    wordWrap: true,
    style: { head: [], border: [] },
  });
  proofs.forEach(({ claim, holds, seen }, index) => {
    table.push([String(index + 1), claim, holds ? 'yes' : 'NO', seen]);
  });
  return table.toString();
}

const stop = (): void => process.exit(130);
process.once('SIGINT', stop);
process.once('SIGTERM', stop);

try {
  const report = await runScenario('6.1', say);
  const failed = report.proofs.filter(({ holds }) => !holds).length;
  write(`\nKernel ${report.release}, ${seconds(report.totalMs)} altogether\n`);
  write(diskTable(report));
  write(proofTable(report));
  write(failed === 0 ? 'All proofs hold.' : `${failed} of ${report.proofs.length} proofs FAILED.`);
  process.exitCode = failed === 0 ? 0 : 1;
} catch (error) {
  say(`failed: ${error instanceof Error ? error.message : String(error)}`);
  process.exitCode = 1;
}
