// SPDX-License-Identifier: Apache-2.0
// A machine that boots by our hook keeps its histories, and knows when it must not: two of the
// proofs of reboot-proofs.ts. `npm run test:reboots` has all of them.

import test from 'ava';
import { Booted } from './booted.ts';
import { testKernel } from './checkout.ts';
import { begin, cleanReboots, kills } from './reboot-proofs.ts';

test('by the hook: a clean reboot, a power cut', async (t) => {
  t.timeout(20 * 60_000);
  const world = await Booted.prepare(testKernel());
  try {
    await begin(t, world);
    await cleanReboots(t, world, 1);
    t.is(await kills(t, world, [{ what: 'a cut', since: 'tracked', afterMs: 4_000 }]), 1);
  } finally {
    await world.remove();
  }
});
