// SPDX-License-Identifier: Apache-2.0
// All proofs of reboot-proofs.ts on one machine, one after the other, on the kernel of
// STILLBLOCK_TEST_KERNEL.

import test, { type ExecutionContext } from 'ava';
import { Booted } from '../vm/booted.ts';
import { testKernel } from '../vm/checkout.ts';
import { begin, cleanReboots, foreignWrite, kills } from '../vm/reboot-proofs.ts';

const limitMs = 120 * 60_000;
const firstSeed = Number(process.env['STILLBLOCK_TEST_SEED'] ?? 1);
const seeds = (from: number, count: number): number[] =>
  Array.from({ length: count }, (_, index) => firstSeed + from + index);

let world: Booted;

test.before('the machine', async (t) => {
  t.timeout(limitMs);
  world = await Booted.prepare(testKernel());
});

test.after.always(() => world.remove());

const proofs: Readonly<Record<string, (t: ExecutionContext, world: Booted) => Promise<void>>> = {
  'a first boot': begin,
  'another system writes a block': foreignWrite,
  'power cuts, the first five': (t, at) => kills(t, at, seeds(0, 5)),
  'ten clean reboots': (t, at) => cleanReboots(t, at, 10),
  'power cuts, fifteen more': (t, at) => kills(t, at, seeds(5, 15)),
};

for (const [what, proof] of Object.entries(proofs)) {
  test.serial(what, async (t) => {
    t.timeout(limitMs);
    await proof(t, world);
  });
}
