// SPDX-License-Identifier: Apache-2.0
/** Pages for people: each command is run by a test, or exists at least; each link leads somewhere. */
import { execFile } from 'node:child_process';
import { existsSync, readFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { promisify } from 'node:util';
import test from 'ava';
import type { Command } from 'commander';
import { parseConfiguration } from '../../src/configuration.ts';
import { makeProgram } from '../../src/program.ts';
import {
  bareCommandsOf,
  blocksOf,
  commandsOf,
  contributingCommands,
  Page,
  pageNames,
  readPage,
} from '../pages.ts';
import { checkout } from '../vm/checkout.ts';

/** Runs all tests: what a page says of it is one of its own commands, whatever becomes of its output. */
const ALL_TESTS = '.ci/run';

const read = (path: string): string => readFileSync(join(checkout, path), 'utf8');

test('each block of commands is run by the test that its page names', async (t) => {
  const problems: string[] = [];
  let count = 0;
  for (const page of await pageNames()) {
    for (const block of blocksOf(page, await readPage(page))) {
      const { line, runBy, notRun } = block;
      count += 1;
      if (runBy === undefined && notRun === undefined) {
        problems.push(`${page}:${line} says not which test runs it: see test/pages.ts`);
      } else if (runBy !== undefined && !existsSync(join(checkout, runBy))) {
        problems.push(`${page}:${line} names ${runBy}, which is not there`);
      } else if (runBy === ALL_TESTS) {
        const own = read(runBy).split('\n');
        const without = bareCommandsOf(block).filter(
          (command) => !own.some((each) => each.replace(/ 2>&1 \|.*/, '') === command),
        );
        problems.push(...without.map((command) => `${page}:${line}: ${runBy} lacks ${command}`));
      } else if (runBy !== undefined && !read(runBy).includes(`Page.open('${page}'`)) {
        problems.push(`${page}:${line} names ${runBy}, which does not open that page`);
      }
    }
  }
  t.deepEqual(problems, []);
  t.true(count > 25);
});

/** Code within the text, and the lines of blocks. */
async function wordsOf(page: string): Promise<string[]> {
  const document = await readPage(page);
  const prose = document.replaceAll(/^ *```[\s\S]*?^ *```$/gm, '');
  const spans = [...prose.matchAll(/`([^`]+)`/g)].map(([, code = '']) =>
    code.replaceAll(/\s+/g, ' '),
  );
  return [...spans, ...blocksOf(page, document).flatMap(commandsOf)];
}

function find(command: Command, words: readonly string[]): [Command, readonly string[]] {
  const [first, ...rest] = words;
  const child = command.commands.find((each) => each.name() === first);
  return child === undefined ? [command, words] : find(child, rest);
}

/** Flags of a command line of ours that its command does not have. */
function unknownFlags(program: Command, words: readonly string[]): string[] {
  const [command, rest] = find(program, words);
  if (command === program && !rest[0]?.startsWith('-')) {
    return [...rest.slice(0, 1)];
  }
  const known = command.options.flatMap(({ long, short }) => [long, short]);
  const flags = rest.map((word) => word.split('=')[0] ?? '').filter((word) => /^-+\w/.test(word));
  return flags.filter((flag) => flag !== '--help' && !known.includes(flag));
}

test('each command of ours exists, with its options', async (t) => {
  const program = await makeProgram();
  const problems: string[] = [];
  let count = 0;
  for (const page of await pageNames()) {
    for (const line of (await wordsOf(page)).flatMap((words) => words.split(/&&|[;|>]/))) {
      const [first, ...words] = line.trim().split(/\s+/);
      if (first === 'stillblock' && words.length > 0) {
        count += 1;
        const unknown = unknownFlags(program, words);
        problems.push(...unknown.map((what) => `${page}: ${what} in ${line.trim()}`));
      }
    }
  }
  t.deepEqual(problems, []);
  t.true(count > 40);
});

test('configurations of docs/security.md are taken', async (t) => {
  const page = await Page.open('docs/security.md', import.meta.url);
  const [local, remote] = page
    .takeAll()
    .map(({ text, page: name }) => parseConfiguration(text, name));
  t.deepEqual(local?.nbd.listen, [{ path: '/run/stillblock/nbd.sock' }]);
  t.is(remote?.nbd.tls?.verifyPeer, true);
  t.is(remote?.api.listen.length, 1);
});

/** Commands of CONTRIBUTING.md's table: run here, by what a file says, or not by npm test, since. */
const RUN: Readonly<Record<string, 'here' | readonly [file: string, says: string] | string>> = {
  'npm run setup': ['package.json', 'bash scripts/setup.sh && bash scripts/test.sh'],
  'npm run build': ['scripts/test.sh', 'npm run --silent build'],
  'npm run lint': ['scripts/test.sh', 'npm run --silent lint'],
  'scripts/manual.sh': ['test/src/manual.test.ts', 'manual(await makeProgram())'],
  'npm run lint:module': ['test/kernels/module.test.ts', 'check-module.sh'],
  'scripts/openapi.sh': ['test/src/api.test.ts', 'scripts/openapi.sh'],
  'scripts/sanitize.sh': ['test/native/sanitizers.test.ts', "Page.open('docs/fuzzing.md'"],
  'npx ava dist/test/nbd/extents.test.js': 'here',
  'scripts/build-module.sh 6.1': 'here',
  'npm run package': ['test/src/packages.test.ts', 'scripts/package.sh'],
  "STILLBLOCK_TEST_FILES='devices faults' scripts/test-kernels.sh 7.2 debug": 'it takes hours',
  'STILLBLOCK_TEST_KERNEL=7.2 npx ava --config ava.kernels.config.mjs dist/test/kernels/devices.test.js':
    'npm run test:kernels does',
  'npm run test:pages': 'it takes most of an hour',
  'npm run test:reboots': 'it takes hours',
  'scripts/test-dkms.sh': 'it makes a tree of each Debian',
  "scripts/guest.sh --disk a=256M --disk b=64M,nvme --module -- 'dmesg \\| tail'": [
    'test/long/guests.test.ts',
    "contributing('scripts/guest.sh')",
  ],
};

test("the commands of CONTRIBUTING.md's table are run", async (t) => {
  const commands = await contributingCommands();
  t.deepEqual(commands.toSorted(), Object.keys(RUN).toSorted());
  for (const [command, how] of Object.entries(RUN)) {
    if (how === 'here') {
      await t.notThrowsAsync(
        promisify(execFile)('sh', ['-c', command], { cwd: checkout }),
        command,
      );
    } else if (typeof how !== 'string') {
      const [file, says] = how;
      t.true(read(file).includes(says), `${file} does not say ${says}`);
    }
  }
});

test('each script and file exists that is spoken of', async (t) => {
  const { scripts } = JSON.parse(read('package.json')) as { scripts: Record<string, string> };
  const missing: string[] = [];
  const require = (page: string, path: string): void => {
    if (!existsSync(join(checkout, path))) {
      missing.push(`${page}: ${path}`);
    }
  };
  for (const page of await pageNames()) {
    for (const words of await wordsOf(page)) {
      const named = [...words.matchAll(/npm run ([\w:]+)/g)].map(([, name = '']) => name);
      missing.push(...named.filter((name) => !(name in scripts)).map((name) => `${page}: ${name}`));
      const paths = words.matchAll(
        /(?<![\w/.])(?:scripts|configs|test|src|docs|dist)\/[\w./-]+\.\w+/g,
      );
      for (const [path] of paths) {
        require(page, path.replace(/^dist\/(.*)\.js$/, '$1.ts'));
      }
    }
    for (const [, to = ''] of (await readPage(page)).matchAll(/\]\(([^)#:]+)(?:#[^)]*)?\)/g)) {
      require(page, join(dirname(page), to));
    }
  }
  t.deepEqual(missing, []);
});
