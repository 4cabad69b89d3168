// SPDX-License-Identifier: Apache-2.0
/** A bounded part of the fuzzing; `npm run fuzz` does more of it. */
import { execFile } from 'node:child_process';
import { promisify } from 'node:util';
import test from 'ava';
import { ENGINES } from '../../src/engine.ts';
import { commandsOf, Page } from '../pages.ts';
import { checkout } from '../vm/checkout.ts';
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

test('the commands of docs/fuzzing.md, with fewer messages', async (t) => {
  const page = await Page.open('docs/fuzzing.md', import.meta.url);
  const commands = page.takeAll().flatMap(commandsOf);
  t.is(commands.length, 3);
  for (const command of commands) {
    const [line = ''] = command.split('#');
    const few = line.includes('npm run')
      ? `${line} -- --messages 500`
      : line.replace('--messages 100000', '--messages 500');
    const { stdout } = await promisify(execFile)('sh', ['-c', few], { cwd: checkout });
    const [, messages] = /"messages": (\d+)/.exec(stdout) ?? [];
    t.true(Number(messages) > 0, stdout);
    t.notRegex(stdout, /"fault"/);
  }
});
