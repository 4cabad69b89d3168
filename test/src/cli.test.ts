// SPDX-License-Identifier: Apache-2.0
/** The program as a stranger meets it: help, mistakes, exit codes. No module is loaded here. */
import { readdir } from 'node:fs/promises';
import { dirname } from 'node:path';
import test from 'ava';
import { CheckpointStore } from '../../src/checkpoints.ts';
import { installation, stillblock } from './world.ts';

const SCREEN_LINES = 45;
const SCREEN_COLUMNS = 100;

const COMMANDS = [
  [],
  ['device'],
  ['device', 'attach'],
  ['device', 'detach'],
  ['device', 'list'],
  ['backup'],
  ['backup', 'begin'],
  ['backup', 'end'],
  ['status'],
  ['checkpoint'],
  ['checkpoint', 'list'],
  ['checkpoint', 'show'],
  ['checkpoint', 'delete'],
  ['nbd'],
  ['pull'],
  ['chain'],
  ['restore'],
  ['layout'],
  ['p2v'],
] as const;

for (const command of COMMANDS) {
  test(`help for "${['stillblock', ...command].join(' ')}" fits on a screen`, async (t) => {
    const folders = await installation(t);
    const { code, stdout, stderr } = await stillblock(folders, ...command, '--help');
    t.is(code, 0);
    t.is(stderr, '');
    const lines = stdout.trimEnd().split('\n');
    t.true(lines.length <= SCREEN_LINES, `${lines.length} lines`);
    t.true(lines.every((line) => line.length <= SCREEN_COLUMNS));
    t.regex(stdout, /^Usage: stillblock/);
  });
}

const NOT_LOADED = /^stillblock: the kernel module is not loaded: run modprobe stillblock\n$/;
const BEGIN = ['backup', 'begin', '--checkpoint', 'monday', '--store', 'memory'];

interface Mistake {
  readonly args: readonly string[];
  readonly code: number;
  readonly says: RegExp;
}

const MISTAKES: readonly Mistake[] = [
  { args: ['frobnicate'], code: 2, says: /unknown command 'frobnicate'/ },
  { args: ['--frobnicate'], code: 2, says: /unknown option '--frobnicate'/ },
  {
    args: ['device', 'attach'],
    code: 2,
    says: /missing required argument 'DEV': see stillblock device attach --help\n$/,
  },
  {
    args: ['pull', '--parallel', '0'],
    code: 2,
    says: /argument '0' is invalid: it is a number from 1 to 64: see stillblock pull --help\n$/,
  },
  { args: ['layout', 'no-such-disk'], code: 1, says: /there is no disk no-such-disk here/ },
  { args: ['device', 'list', 'x'], code: 2, says: /too many arguments/ },
  { args: ['device', 'attach', '--block-size', 'x', '/dev/sda'], code: 2, says: /a size is/ },
  { args: ['backup', 'begin'], code: 2, says: /--checkpoint/ },
  { args: ['backup', 'begin', '--checkpoint', 'a'], code: 1, says: NOT_LOADED },
  {
    args: ['backup', 'begin', '--checkpoint', 'a', '--store-size', '1G'],
    code: 2,
    says: /--store/,
  },
  { args: ['backup', 'begin', '/absent.xml'], code: 1, says: /absent.xml does not exist/ },
  { args: [...BEGIN, '--store-size', '5Q'], code: 2, says: /a size is/ },
  { args: [...BEGIN, '--store-size', '0'], code: 2, says: /a size is/ },
  { args: [...BEGIN, '--port', '65536'], code: 2, says: /port/ },
  { args: [...BEGIN, '--freeze-timeout', '0'], code: 2, says: /seconds/ },
  { args: [...BEGIN, '--disk', 'a@b=/dev/sda'], code: 2, says: /cannot name a disk/ },
  { args: [...BEGIN, '--incremental', 'a/b'], code: 2, says: /cannot name a checkpoint/ },
  { args: ['checkpoint', 'show', '../x'], code: 2, says: /cannot name a checkpoint/ },
  { args: ['checkpoint', 'show', 'x'], code: 1, says: /there is no checkpoint x/ },
  { args: ['checkpoint', 'delete', 'x'], code: 1, says: /there is no checkpoint x/ },
  { args: ['map', 'sda'], code: 1, says: /disk sda is in no backup/ },
  { args: ['map', '--format', 'x'], code: 2, says: /--format/ },
  { args: ['backup', 'end'], code: 1, says: /no backup is running/ },
  { args: ['pull', 'dir'], code: 2, says: /HOST DIR, or --nbd URI/ },
  {
    args: ['pull', '--nbd', 'http://x/sda', '--checkpoint', 'a', 'd'],
    code: 2,
    says: /no NBD URI/,
  },
  { args: ['pull', '--nbd', 'nbd://x/sda', 'd'], code: 2, says: /--checkpoint NAME/ },
  { args: ['restore', 'd'], code: 2, says: /--map DISK=TARGET/ },
  { args: ['restore', 'd', '--map', 'sda'], code: 2, says: /is not OLD=NEW/ },
  { args: ['chain', '/dev/null'], code: 1, says: /there is no chain in/ },
  { args: ['device', 'list'], code: 1, says: NOT_LOADED },
  { args: ['device', 'attach', '/dev/null'], code: 1, says: NOT_LOADED },
  { args: ['device', 'detach', '/dev/null'], code: 1, says: NOT_LOADED },
  { args: ['status'], code: 1, says: NOT_LOADED },
  { args: BEGIN, code: 1, says: NOT_LOADED },
];

for (const { args, code, says } of MISTAKES) {
  test(`refused: stillblock ${args.join(' ')}`, async (t) => {
    const folders = await installation(t);
    const result = await stillblock(folders, ...args);
    t.is(result.code, code);
    t.regex(result.stderr, says);
    t.is(result.stderr.split('\n').length, 2, 'one line');
    t.is(result.stdout, '');
    t.deepEqual(await readdir(dirname(folders.run)), [], 'nothing is left behind');
  });
}

for (const name of ['', '.', '../x', 'a/b', 'a b', '<x>', 'ü', 'x'.repeat(300)]) {
  test(`no checkpoint is called ${JSON.stringify(name).slice(0, 40)}`, async (t) => {
    const folders = await installation(t);
    const args = ['backup', 'begin', '--checkpoint', name, '--store', 'memory'];
    const { code, stderr } = await stillblock(folders, ...args);
    t.is(code, 2);
    t.regex(stderr, /cannot name a checkpoint/);
    t.deepEqual(await readdir(dirname(folders.run)), []);
  });
}

test('a program is told in JSON, too', async (t) => {
  const folders = await installation(t);
  const shown = await stillblock(folders, 'checkpoint', 'show', 'x', '--json');
  t.is(shown.code, 1);
  t.like(JSON.parse(shown.stdout), { error: { code: 'NO_CHECKPOINT' } });
  const begun = await stillblock(folders, ...BEGIN, '--json');
  t.is(begun.code, 1);
  t.like(JSON.parse(begun.stdout), { event: 'failed', reason: 'MODULE_NOT_LOADED' });
});

test('without a command there is help, and an error', async (t) => {
  const { code, stderr } = await stillblock(await installation(t));
  t.is(code, 2);
  t.regex(stderr, /Usage: stillblock/);
});

test('the version is that of the package', async (t) => {
  const { code, stdout } = await stillblock(await installation(t), '--version');
  t.is(code, 0);
  t.regex(stdout, /^\d+\.\d+\.\d+\n$/);
});

test('checkpoints are listed, shown and deleted', async (t) => {
  const folders = await installation(t);
  const store = new CheckpointStore(folders);
  await store.prepare();
  await store.write({
    name: 'monday',
    id: undefined,
    description: 'before the upgrade',
    parent: undefined,
    creationTime: 1_767_225_600,
    disks: [
      {
        name: 'sda',
        sizeBytes: 2 ** 30,
        generation: '8f14e45f-ceea-467f-a83b-b4c6ab3f1d2e',
        number: 3,
      },
    ],
  });
  const listed = await stillblock(folders, 'checkpoint', 'list');
  t.is(
    listed.stdout,
    'NAME    CREATED                   DISKS  DESCRIPTION\n' +
      'monday  2026-01-01T00:00:00.000Z  sda    before the upgrade\n',
  );
  const json = await stillblock(folders, 'checkpoint', 'list', '--json');
  t.like(JSON.parse(json.stdout), { checkpoints: [{ name: 'monday', parent: null }], broken: [] });
  const shown = await stillblock(folders, 'checkpoint', 'show', 'monday', '--json');
  t.like(JSON.parse(shown.stdout), { disks: [{ name: 'sda', next: 'full' }] });
  const text = await stillblock(folders, 'checkpoint', 'show', 'monday');
  t.regex(text.stdout, /sda +1 GiB +full: the kernel module cannot be asked/);
  t.is((await stillblock(folders, 'checkpoint', 'delete', 'monday')).code, 0);
  t.is(
    (await stillblock(folders, 'checkpoint', 'list')).stdout,
    'there is no checkpoint: stillblock backup begin makes one\n',
  );
});
