// SPDX-License-Identifier: Apache-2.0
// The main job on the test's kernel; on that of `npm run demo`, by what README.md says to type.

import test, { type ExecutionContext } from 'ava';
import { Page, type } from '../pages.ts';
import { type KernelName, testKernel } from './checkout.ts';
import { runScenario } from './scenario.ts';

const kernel = testKernel();
const PROOFS = 5;

interface Sizes {
  readonly name: string;
  readonly full: number;
  readonly incremental: number;
  readonly changed: number;
}

function assertSizes(t: ExecutionContext, disks: readonly Sizes[]): void {
  t.is(disks.length, 2);
  for (const { name, full, incremental, changed } of disks) {
    t.true(changed > 0, `${name}: nothing changed between the snapshots`);
    t.true(incremental >= changed, `${name}: the incremental lacks changes`);
    t.true(incremental < full, `${name}: the incremental is no smaller`);
  }
}

async function demonstrate(t: ExecutionContext): Promise<void> {
  const page = await Page.open('README.md', import.meta.url);
  const { code, stdout, stderr } = await type(page.take('npm run demo').text);
  t.deepEqual(page.left, []);
  t.log(stdout);
  t.is(code, 0, `${stdout}${stderr}`);
  t.true(stdout.endsWith('\nAll proofs hold.\n'), stdout);
  const proofs = [...stdout.matchAll(/^│ (\d) │ [^│]+ │ (\w+) +│/gm)];
  t.deepEqual(
    proofs.map(([, number, holds]) => `${number} ${holds}`),
    Array.from({ length: PROOFS }, (_, index) => `${index + 1} yes`),
  );
  // disk, size, full image, pulled in, incremental, pulled in, really changed
  const rows = stdout.matchAll(
    /^│ (\S+) +│ \d+ KiB +│ (\d+) KiB +│ [\d.]+ s +│ (\d+) KiB +│ [\d.]+ s +│ (\d+) KiB +│$/gm,
  );
  assertSizes(
    t,
    [...rows].map(([, name = '', full, incremental, changed]) => ({
      name,
      full: Number(full),
      incremental: Number(incremental),
      changed: Number(changed),
    })),
  );
}

async function runHere(t: ExecutionContext, on: KernelName): Promise<void> {
  const report = await runScenario(on, (text) => t.log(text));
  for (const { claim, holds, seen } of report.proofs) t.true(holds, `${claim}\n${seen}`);
  t.is(report.proofs.length, PROOFS);
  assertSizes(
    t,
    report.disks.map(({ name, fullBytes, incrementalBytes, changedBytes }) => ({
      ...{ name, full: fullBytes, incremental: incrementalBytes, changed: changedBytes },
    })),
  );
}

test(`two disks in use are pulled right, in full and incrementally, on ${kernel}`, async (t) => {
  t.timeout(15 * 60_000);
  await (kernel === '6.1' ? demonstrate(t) : runHere(t, kernel));
});
