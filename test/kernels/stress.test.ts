// SPDX-License-Identifier: Apache-2.0
// A short run of the stress test with its oracle on every kind of device, with
// a new seed each time. `npm run stress` repeats one, and makes long ones.

import process from 'node:process';
import test from 'ava';
import { StressGuest } from '../stress/stress.ts';
import { testKernel } from './world.ts';

const seconds = 40;
/** What an emulated machine that has other work, too, does at the least. */
const leastTakes = 4;
const leastUnits = 100_000;

/** `STILLBLOCK_STRESS_SEED` repeats the choices of a run that has failed. */
const seed = Number(process.env['STILLBLOCK_STRESS_SEED'] ?? Date.now() % 1_000_000_000);

test('images and change maps of all kinds of devices under stress', async (t) => {
  t.timeout(20 * 60_000);
  const kernel = testKernel();
  t.log(`seed ${seed}`);
  const guest = await StressGuest.boot(kernel, false);
  try {
    const { counts, code, log } = await guest.run({ seed, seconds });
    t.log(counts);
    t.is(code, 0, `seed ${seed}\n${log}${code === 0 ? '' : guest.guest.console()}`);
    t.is(counts?.violations, 0);
    t.true((counts?.takes ?? 0) >= leastTakes, 'hardly any snapshot was taken');
    t.true((counts?.unitsChecked ?? 0) >= leastUnits, 'hardly anything of an image was checked');
    t.true((counts?.mapBlocksChecked ?? 0) > 0, 'no change map was checked');
    await guest.end();
  } finally {
    await guest.close();
  }
});
