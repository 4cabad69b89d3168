// SPDX-License-Identifier: Apache-2.0
/**
 * Fuzzes `stillblock nbd` for a number of messages, from a seed:
 *
 *     node dist/test/fuzz/run.js --engine typescript --messages 1000000 --seed 1
 *     node dist/test/fuzz/run.js --session 123456789
 *
 * Beside the fuzzing clients an innocent one reads all the time and checks what it gets.
 * Prints the outcome as JSON. The second form repeats one session that has failed.
 */
import { parseArgs } from 'node:util';
import { fuzz } from './fuzz.ts';

const { values } = parseArgs({
  options: {
    engine: { type: 'string' },
    messages: { type: 'string', default: '100000' },
    seed: { type: 'string', default: String(Date.now()) },
    session: { type: 'string' },
    tcp: { type: 'boolean', default: false },
  },
});
const outcome = await fuzz({
  ...(values.engine !== undefined && { engine: values.engine }),
  ...(values.session !== undefined && { session: Number(values.session) }),
  messages: Number(values.messages),
  seed: Number(values.seed),
  tcp: values.tcp,
});
process.stdout.write(`${JSON.stringify(outcome, null, 2)}\n`);
process.exitCode = outcome.fault === undefined ? 0 : 1;
