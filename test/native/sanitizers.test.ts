// SPDX-License-Identifier: Apache-2.0
/**
 * The native engine's core under sanitizers and a coverage-guided fuzzer, by the commands of
 * docs/fuzzing.md: a bounded part of what they do there.
 */
import test from 'ava';
import { commandsOf, Page, type } from '../pages.ts';

const page = await Page.open('docs/fuzzing.md', import.meta.url);
const commands = page.takeAll().flatMap(commandsOf);

/** The page's command that contains a text, with less to do. */
function command(containing: string, from: string, to: string): string {
  const found = commands.find((each) => each.includes(containing)) ?? 'not in the page: false';
  return found.replace(from, to);
}

async function run(line: string): Promise<{ code: unknown; said: string }> {
  const { code, stdout, stderr } = await type(line);
  return { code, said: stdout + stderr };
}

for (const sanitizer of ['asan', 'tsan']) {
  test(`clients that say and leave what and when they please, ${sanitizer}`, async (t) => {
    t.timeout(15 * 60_000);
    const { code, said } = await run(command(`stress ${sanitizer}`, '1000000', '40000'));
    t.is(code, 0, said);
    const messages = Number(/^(\d+) messages, \d+ replies$/m.exec(said)?.[1]);
    t.true(messages >= 40_000 && messages < 50_000, said);
  });
}

test('a minute of the fuzzer', async (t) => {
  t.timeout(15 * 60_000);
  const { code, said } = await run(command('fuzzer', '600', '60'));
  t.is(code, 0, said);
  const runs = Number(/stat::number_of_executed_units:\s+(\d+)/.exec(said)?.[1]);
  t.true(runs > 1000, said);
});
