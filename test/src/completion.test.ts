// SPDX-License-Identifier: Apache-2.0
/** Completion, in the shells themselves: each command and option is offered where it belongs. */
import { execFile } from 'node:child_process';
import { promisify } from 'node:util';
import test from 'ava';
import type { Command } from 'commander';
import { bashCompletion, zshCompletion } from '../../src/completion.ts';
import { makeProgram } from '../../src/program.ts';

const run = promisify(execFile);

interface Place {
  readonly words: readonly string[];
  readonly commands: readonly string[];
  readonly flags: readonly string[];
  /** Flags that take a value, and which ones, if these are few. */
  readonly values: ReadonlyMap<string, readonly string[]>;
}

/** Each command, and what commander itself takes there. */
function placesOf(command: Command, above: readonly string[] = []): Place[] {
  const words = [...above, command.name()];
  const flags = command.options.flatMap(({ short, long }) => [short, long]);
  return [
    {
      words,
      commands: command.commands.map((child) => child.name()),
      flags: [...flags, '--help', '-h'].filter((flag) => flag !== undefined),
      values: new Map(
        command.options
          .filter(({ required }) => required)
          .flatMap(({ short, long, argChoices = [] }) =>
            [short, long].map((flag) => [flag ?? '', argChoices] as const),
          )
          .filter(([flag]) => flag !== ''),
      ),
    },
    ...command.commands.flatMap((child) => placesOf(child, words)),
  ];
}

const program = await makeProgram();
const places = placesOf(program);

/** What bash offers for each line, of which the last word is to be completed. */
async function bash(lines: readonly (readonly string[])[]): Promise<string[][]> {
  const calls = lines.map(
    (words) =>
      `COMP_WORDS=(${words.map((word) => `'${word}'`).join(' ')}); COMP_CWORD=${words.length - 1}; _stillblock; echo "\${COMPREPLY[*]}"`,
  );
  const script = `set -u\n${bashCompletion(program)}\n${calls.join('\n')}`;
  const { stdout } = await run('bash', ['--norc', '-c', script]);
  return stdout
    .slice(0, -1)
    .split('\n')
    .map((line) => line.split(' ').filter((word) => word !== ''));
}

test('bash: each command and option is offered', async (t) => {
  t.true(places.length > 15);
  const offered = await bash(places.map(({ words }) => [...words, '']));
  for (const [index, { words, commands, flags }] of places.entries()) {
    const found = offered[index] ?? [];
    t.deepEqual(
      found.filter((word) => word.startsWith('-')).toSorted(),
      [...new Set(flags)].toSorted(),
      words.join(' '),
    );
    t.true(commands.every((command) => found.includes(command)));
  }
});

test('bash: what has been typed is gone on with, after options as well', async (t) => {
  t.deepEqual(
    await bash([
      ['stillblock', 'dev'],
      ['stillblock', 'device', 'at'],
      ['stillblock', 'device', 'attach', '--bl'],
      ['stillblock', 'device', 'attach', '--json', '--verb'],
      ['stillblock', 'device', 'attach', '--block-size', ''],
      ['stillblock', 'completion', ''],
      ['stillblock', 'no', 'such', '--vers'],
    ]),
    [
      ['device'],
      ['attach'],
      ['--block-size'],
      ['--verbose'],
      [],
      ['bash', 'zsh', '-h', '--help'],
      ['--version'],
    ],
  );
  const values = places.flatMap(({ words, values: flags }) =>
    [...flags].map(([flag, choices]) => ({ line: [...words, flag, ''], choices })),
  );
  t.true(values.length > 30);
  t.deepEqual(
    await bash(values.map(({ line }) => line)),
    values.map(({ choices }) => choices),
  );
});

/**
 * What each of the script's functions hands to zsh's own: `_arguments` takes specifications
 * of options (zshcompsys(1)), `_describe` an array of commands.
 */
async function zsh(functions: readonly string[]): Promise<string[][]> {
  const calls = functions.map((name) => `${name}; print -r -- ----`);
  const script = `
    _arguments() { print -rl -- "$@"; state=command }
    _describe() { print -rl -- "\${(@P)4}" }
    _files() { }
    ${zshCompletion(program).replace(/_stillblock "\$@"\n$/, '')}
    ${calls.join('\n')}`;
  const { stdout } = await run('zsh', ['-f', '-e', '-c', script]);
  return stdout
    .split('----\n')
    .slice(0, -1)
    .map((text) => text.split('\n'));
}

test('zsh: each command and option is offered', async (t) => {
  const names = places.map(({ words }) => `_${words.join('_').replaceAll('-', '_')}`);
  const offered = await zsh(names);
  t.is(offered.length, places.length);
  for (const [index, { words, commands, flags, values }] of places.entries()) {
    const specs = offered[index] ?? [];
    const path = words.join(' ');
    for (const flag of flags) {
      const spec = specs.find((each) => each.replace(/^(\([^)]*\)|\*)/, '').startsWith(`${flag}[`));
      t.truthy(spec, `${path} ${flag}`);
      t.is(/\]:/.test(spec ?? ''), values.has(flag), `${path} ${spec}`);
    }
    for (const command of commands) {
      t.true(
        specs.some((spec) => spec.startsWith(`${command}:`)),
        `${path} ${command}`,
      );
    }
  }
});
