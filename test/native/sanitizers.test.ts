// SPDX-License-Identifier: Apache-2.0
/** The native engine's core under sanitizers and a coverage-guided fuzzer, a bounded part. */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { fileURLToPath } from 'node:url';
import test from 'ava';

const SCRIPT = fileURLToPath(new URL('../../../scripts/sanitize.sh', import.meta.url));

async function sanitize(...args: string[]): Promise<{ code: unknown; said: string }> {
  const child = spawn('bash', [SCRIPT, ...args], { stdio: ['ignore', 'pipe', 'pipe'] });
  let said = '';
  for (const stream of [child.stdout, child.stderr]) {
    stream.on('data', (chunk: Buffer) => {
      said = (said + chunk.toString()).slice(-20_000);
    });
  }
  const [code] = await once(child, 'close');
  return { code, said };
}

for (const sanitizer of ['asan', 'tsan']) {
  test(`clients that say and leave what and when they please, ${sanitizer}`, async (t) => {
    t.timeout(15 * 60_000);
    const { code, said } = await sanitize('stress', sanitizer, '40000', '1');
    t.is(code, 0, said);
    t.regex(said, /^\d+ messages, \d+ replies$/m);
  });
}

test('a minute of the fuzzer', async (t) => {
  t.timeout(15 * 60_000);
  const { code, said } = await sanitize('fuzzer', '60');
  t.is(code, 0, said);
  const runs = Number(/stat::number_of_executed_units:\s+(\d+)/.exec(said)?.[1]);
  t.true(runs > 1000, said);
});
