// SPDX-License-Identifier: Apache-2.0
/** A bounded part of the fuzzing; `npm run fuzz` does more of it. */
import test from 'ava';
import { ENGINES } from '../../src/engine.ts';
import { fuzz } from './fuzz.ts';

const MESSAGES = 20_000;

for (const engine of ENGINES) {
  for (const tcp of [false, true]) {
    test(`${engine}: ${MESSAGES} messages ${tcp ? 'over TCP' : 'on a unix socket'}`, async (t) => {
      t.timeout(5 * 60_000);
      const outcome = await fuzz({ engine, messages: MESSAGES, seed: tcp ? 2 : 1, tcp });
      t.is(outcome.fault, undefined, JSON.stringify(outcome));
      // It has been about something: most messages are right and answered, beside an innocent client.
      t.true(outcome.replies > MESSAGES / 2);
      t.true(outcome.witnessReads > 20);
    });
  }
}
