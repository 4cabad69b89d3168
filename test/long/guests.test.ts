// SPDX-License-Identifier: Apache-2.0
// The pages' commands that boot guests for minutes, and CONTRIBUTING.md's.

import { cp, readFile } from 'node:fs/promises';
import { join } from 'node:path';
import test from 'ava';
import { folder } from '../nbd/world.ts';
import { bareCommandsOf, contributingCommands, Page, type } from '../pages.ts';
import { checkout, stockKernel } from '../vm/checkout.ts';

/** The command of CONTRIBUTING.md's table that begins so. */
async function contributing(beginning: string): Promise<string> {
  const found = (await contributingCommands()).find((each) => each.startsWith(beginning));
  if (found === undefined) {
    throw new Error(`CONTRIBUTING.md has no command ${beginning}`);
  }
  return found.replaceAll('\\|', '|');
}

test.serial('CONTRIBUTING.md: something is tried in a guest', async (t) => {
  t.timeout(15 * 60_000);
  const { code, stdout, stderr } = await type(await contributing('scripts/guest.sh'));
  t.is(code, 0, stderr);
  t.regex(stderr, /^\[[\d.]+ s\] booted 6\.1 with \w+$/m);
  // The tail of the kernel's log, with the module as the last thing that happened.
  t.is(stdout.trimEnd().split('\n').length, 10, stdout);
  t.regex(stdout, /stillblock/);
});

test.serial('docs/support.md: a test on the kernel that is named', async (t) => {
  t.timeout(30 * 60_000);
  const page = await Page.open('docs/support.md', import.meta.url);
  const { code, stdout, stderr } = await type(page.take('STILLBLOCK_TEST_KERNEL').text);
  t.deepEqual(page.left, []);
  t.is(code, 0, `${stdout}${stderr}`);
  t.true(Number(/^ *(\d+) tests passed$/m.exec(stdout)?.[1]) >= 10, stdout);
  t.regex(stdout, /^ *✔ a whole disk/m);
});

test.serial('docs/stress.md: a run, and one of its choices again', async (t) => {
  t.timeout(60 * 60_000);
  const page = await Page.open('docs/stress.md', import.meta.url);
  const [run = '', again = ''] = bareCommandsOf(page.take('npm run stress')).map((command) =>
    command.replace('--minutes 30', '--minutes 1'),
  );
  t.deepEqual(page.left, []);
  const home = await folder(t);
  const [checkedIn, copy] = [join(checkout, 'docs/stress.md'), join(home, 'stress.md')];
  await cp(checkedIn, copy);
  const before = await readFile(checkedIn, 'utf8');
  const { release } = stockKernel('6.1');
  let rows = before;
  for (const command of [run, again]) {
    const { code, stdout, stderr } = await type(`${command} --page ${copy}`);
    t.is(code, 0, `${stdout}${stderr}`);
    const [, seed = ''] = /^kernel 6\.1, 1 minutes, seed (\d+)$/m.exec(stdout) ?? [];
    t.true(!command.includes('--seed') || command.endsWith(`--seed ${seed}`), stdout);
    const page = await readFile(copy, 'utf8');
    t.true(page.startsWith(rows), 'more was changed than a row added');
    const added = page.slice(rows.length);
    rows = page;
    // date, kernel, module, seed, minutes, takes … violations
    const cells = added
      .trim()
      .split('|')
      .slice(1, -1)
      .map((cell) => cell.trim());
    t.is(cells.length, 14, added);
    t.deepEqual([cells[1], cells[3]], [release, seed]);
    t.true(Number(cells[5]) > 0, added);
    t.is(cells[13], '0', added);
  }
  t.is(await readFile(checkedIn, 'utf8'), before);
});
