// SPDX-License-Identifier: Apache-2.0
/** Manual pages: their checkers find no fault, and each command, option and setting is there. */
import { execFile } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import test from 'ava';
import type { Command } from 'commander';
import { parseConfiguration } from '../../src/configuration.ts';
import { manual } from '../../src/manual.ts';
import { makeProgram } from '../../src/program.ts';

const run = promisify(execFile);
const file = (path: string): string => fileURLToPath(new URL(`../../../${path}`, import.meta.url));
const PAGES = ['docs/man/stillblock.8', 'docs/man/stillblock.xml.5'].map(file);

/** A page as a terminal of any width shows it. */
async function shown(page: string): Promise<string> {
  const { stdout } = await run('mandoc', ['-T', 'ascii', '-O', 'width=200', page]);
  // Bold and underlined letters are written over each other.
  const pieces = stdout.split('\b');
  return pieces.map((piece, at) => (at < pieces.length - 1 ? piece.slice(0, -1) : piece)).join('');
}

for (const page of PAGES) {
  test(`mandoc and man find no fault with ${page.replace(/^.*\//, '')}`, async (t) => {
    const { stdout } = await run('mandoc', ['-T', 'lint', '-W', 'warning', page]).catch(
      (error: { stdout: string }) => error,
    );
    t.is(stdout, '');
    const env = { ...process.env, MANWIDTH: '80', LC_ALL: 'C.UTF-8' };
    const { stderr } = await run('man', ['--warnings=w', '-l', page], { env });
    t.is(stderr, '');
  });
}

function commandsOf(command: Command, above: readonly string[] = []): [string, Command][] {
  return command.commands.flatMap((child): [string, Command][] => {
    const words = [...above, child.name()];
    return child.commands.length === 0 ? [[words.join(' '), child]] : commandsOf(child, words);
  });
}

test('it is what scripts/manual.sh makes of the help', async (t) => {
  t.is(readFileSync(PAGES[0] ?? '', 'utf8'), manual(await makeProgram()));
});

test('each command and option is in it; if not, run scripts/manual.sh', async (t) => {
  const text = await shown(PAGES[0] ?? '');
  const sections = text.split(/^ {3}(?=\S)/m);
  const commands = commandsOf(await makeProgram());
  t.true(commands.length > 15);
  for (const [name, command] of commands) {
    const section = sections.find((each) => each.startsWith(`${name}\n`));
    t.truthy(section, name);
    for (const { long, short } of command.options) {
      for (const flag of [long, short].filter((each) => each !== undefined)) {
        t.regex(section ?? '', new RegExp(`^ +(-., )?${flag}( |,|$)`, 'm'), `${name} ${flag}`);
      }
    }
  }
  for (const code of ['0 +done', '1 +failed', '2 +it was', '3 +a full', '4 +the store']) {
    t.regex(text, new RegExp(`^ +${code}`, 'm'));
  }
});

test('each setting of the schema is in it, and its example is valid', async (t) => {
  const text = await shown(PAGES[1] ?? '');
  const schema = readFileSync(file('configs/stillblock.rng'), 'utf8');
  for (const [, kind, name] of schema.matchAll(/<(element|attribute) name="([^"]+)"/g)) {
    const said =
      kind === 'element' ? new RegExp(`<${name}[ >]`) : new RegExp(`[^a-z]${name}[^a-z]`);
    t.regex(text, said, `${kind} ${name}`);
  }
  const example = /^ *<stillblock>\n[\s\S]*<\/stillblock>$/m.exec(text)?.[0] ?? '';
  t.is(parseConfiguration(example, 'the example').hooks.length, 1);
});
