// SPDX-License-Identifier: Apache-2.0
// All proofs of reboot-proofs.ts on one machine, one after the other, on the kernel of
// STILLBLOCK_TEST_KERNEL.

import test, { type ExecutionContext } from 'ava';
import { Booted } from '../vm/booted.ts';
import { testKernel } from '../vm/checkout.ts';
import {
  badPlaces,
  begin,
  type Cut,
  cleanReboots,
  dracutImage,
  foreignWrite,
  fullPlace,
  growAndCut,
  hangingPlace,
  kills,
  lateDisk,
  measureSpans,
  movedDisk,
  oldInitramfs,
  randomCuts,
  type Spans,
  systemdReboot,
} from '../vm/reboot-proofs.ts';

const limitMs = 120 * 60_000;
const firstSeed = Number(process.env['STILLBLOCK_TEST_SEED'] ?? 1);
let spans: Spans | undefined;
/** Five power cuts at random moments. */
const cutsFrom =
  (from: number, since: Cut['since'] = 'tracked') =>
  async (t: ExecutionContext, at: Booted): Promise<void> => {
    spans ??= await measureSpans(t, at);
    const seeds = Array.from({ length: 5 }, (_, index) => firstSeed + from + index);
    const full = await kills(t, at, randomCuts(spans, since, seeds));
    if (since === 'tracked') t.is(full, seeds.length);
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
  'a longer place, and a power cut that is told of': growAndCut,
  'another place than the initramfs knows': oldInitramfs,
  'the place hangs or fails at the end': hangingPlace,
  'a disk that comes late': lateDisk,
  'a place that is full': fullPlace,
  'a disk that was in another machine': movedDisk,
  'ten clean reboots': (t, at) => cleanReboots(t, at, 10),
  dracut: dracutImage,
  'power cuts, the first five': cutsFrom(0),
  'power cuts, the second five': cutsFrom(5),
  'power cuts, the third five': cutsFrom(10),
  'power cuts, the last five': cutsFrom(15),
  'power cuts while it ends': cutsFrom(20, 'end'),
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
