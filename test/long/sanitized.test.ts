// SPDX-License-Identifier: Apache-2.0
// The addon under AddressSanitizer inside Node, by the commands of docs/fuzzing.md.

import test from 'ava';
import { bareCommandsOf, Page, type } from '../pages.ts';

test.serial('docs/fuzzing.md: the addon under sanitizers', async (t) => {
  t.timeout(20 * 60_000);
  const page = await Page.open('docs/fuzzing.md', import.meta.url);
  const commands = bareCommandsOf(page.take('sanitize.sh node'));
  t.deepEqual(page.left, []);
  t.is(commands.length, 2);
  for (const command of commands) {
    const { code, stdout, stderr } = await type(command);
    t.is(code, 0, `${command}\n${stdout}${stderr}`);
    const passed = Number(/^ *(\d+) tests passed$/m.exec(stdout)?.[1]);
    t.true(passed >= 5, `${command}\n${stdout}`);
  }
});
