// SPDX-License-Identifier: Apache-2.0
// All proofs of reboot-proofs.ts on one machine, one after the other, on the kernel of
// STILLBLOCK_TEST_KERNEL.

import test, { type ExecutionContext } from 'ava';
import { Booted } from '../vm/booted.ts';
import { testKernel } from '../vm/checkout.ts';
import {
  badPlaces,
  begin,
  cleanReboots,
  dracutImage,
  foreignWrite,
  fullPlace,
  hangingPlace,
  kills,
  lateDisk,
  movedDisk,
  randomCuts,
  systemdReboot,
} from '../vm/reboot-proofs.ts';

const limitMs = 120 * 60_000;
const firstSeed = Number(process.env['STILLBLOCK_TEST_SEED'] ?? 1);
/** Power cuts at random moments. */
const cutsOf =
  (from: number, count: number) =>
  async (t: ExecutionContext, at: Booted): Promise<void> => {
    const seeds = Array.from({ length: count }, (_, index) => firstSeed + from + index);
    await kills(t, at, await randomCuts(t, at, seeds));
  };

let world: Booted;
let clean = false;

test.before('the machine', async (t) => {
  t.timeout(limitMs);
  world = await Booted.prepare(testKernel());
});

test.after.always(() => world.remove());

const proofs: Readonly<Record<string, (t: ExecutionContext, at: Booted) => Promise<void>>> = {
  'a first boot': begin,
  'another system writes a block': foreignWrite,
  'a place that is not right': badPlaces,
  systemd: systemdReboot,
  'the place hangs or fails at the end': hangingPlace,
  'a disk that comes late': lateDisk,
  'a place that is full': fullPlace,
  'a disk that was in another machine': movedDisk,
  'ten clean reboots': (t, at) => cleanReboots(t, at, 10),
  'power cuts, the first five': cutsOf(0, 5),
  'power cuts, fifteen more': cutsOf(5, 15),
  dracut: dracutImage,
};

for (const [what, proof] of Object.entries(proofs)) {
  test.serial(what, async (t) => {
    t.timeout(limitMs);
    // One that fails leaves a machine behind that was not shut down cleanly.
    if (!clean && proof !== begin) await begin(t, world);
    clean = false;
    await proof(t, world);
    clean = true;
  });
}
