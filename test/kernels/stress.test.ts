// SPDX-License-Identifier: Apache-2.0
// A short run of the stress test with its oracle on every kind of device, with
// a new seed each time. `npm run stress` repeats one, and makes long ones.

import process from 'node:process';
import test from 'ava';
import { StressGuest } from '../stress/stress.ts';
import { testKernel } from '../vm/checkout.ts';

const seconds = 30;
/** What an emulated machine does in that time; one that has other work, too, goes on for longer. */
const leastTakes = 4;
const mostRuns = 8;
const leastUnits = 100_000;

/** `STILLBLOCK_STRESS_SEED` repeats the choices of a run that has failed. */
const seed = Number(process.env['STILLBLOCK_STRESS_SEED'] ?? Date.now() % 1_000_000_000);

test('images and change maps of all kinds of devices under stress', async (t) => {
  t.timeout(20 * 60_000);
  const kernel = testKernel();
  t.log(`seed ${seed}`);
  const guest = await StressGuest.boot(kernel, false);
  try {
    let takes = 0;
    let units = 0;
    let mapBlocks = 0;
    for (let run = 0; run < mostRuns && (takes < leastTakes || mapBlocks === 0); run += 1) {
      const { counts, code, log } = await guest.run({ seed: seed + run, seconds });
      t.log(counts);
      t.is(code, 0, `seed ${seed + run}\n${log}${code === 0 ? '' : guest.guest.console()}`);
      t.is(counts?.violations, 0);
      takes += counts?.takes ?? 0;
      units += counts?.unitsChecked ?? 0;
      mapBlocks += counts?.mapBlocksChecked ?? 0;
    }
    t.true(takes >= leastTakes, 'hardly any snapshot was taken');
    t.true(units >= leastUnits, 'hardly anything of an image was checked');
    t.true(mapBlocks > 0, 'no change map was checked');
    await guest.end();
  } finally {
    await guest.close();
  }
});
