// SPDX-License-Identifier: Apache-2.0
import test from 'ava';
import { testKernel } from './checkout.ts';
import { runScenario } from './scenario.ts';

const kernel = testKernel();

test(`two disks in use are pulled right, in full and incrementally, on ${kernel}`, async (t) => {
  t.timeout(15 * 60_000);
  const report = await runScenario(kernel, (text) => t.log(text));
  for (const { claim, holds, seen } of report.proofs) t.true(holds, `${claim}\n${seen}`);
  t.is(report.proofs.length, 5);
  for (const disk of report.disks) {
    t.true(disk.changedBytes > 0, `${disk.name}: nothing changed between the snapshots`);
    t.true(
      disk.incrementalBytes >= disk.changedBytes,
      `${disk.name}: the incremental lacks changes`,
    );
    t.true(disk.incrementalBytes < disk.fullBytes, `${disk.name}: the incremental is no smaller`);
  }
});
