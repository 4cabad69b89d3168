// SPDX-License-Identifier: Apache-2.0
/** `stillblock nbd` as a user runs it: its own process, other people's clients. */
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { access, readFile, stat, writeFile } from 'node:fs/promises';
import { createServer } from 'node:net';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import test, { type ExecutionContext } from 'ava';
import { folder, pattern, soon } from '../nbd/world.ts';
import { CLI } from '../program.ts';
import { type Finished, run, tryRun, writeSparse } from './clients.ts';

const MIB = 1 << 20;

interface ServedExport {
  name: string;
  disk: string;
  checkpoint?: string;
  uris: string[];
  sizeBytes: number;
  dirtyBytes?: number;
}

interface Serving {
  readonly process: ChildProcess;
  readonly exports: ServedExport[];
  uri(name: string): string;
  /** Ends it by a signal. Returns its exit code and the rest of what it printed. */
  end(signal: NodeJS.Signals): Promise<{ code: number | null; lines: unknown[] }>;
}

/** Starts the command and waits until it serves. */
async function serve(t: ExecutionContext, ...args: string[]): Promise<Serving> {
  const child = spawn(process.execPath, [CLI, 'nbd', '--json', ...args], {
    stdio: ['ignore', 'pipe', 'inherit'],
  });
  t.teardown(() => child.kill('SIGKILL'));
  const exit = once(child, 'close');
  const lines: unknown[] = [];
  const reader = createInterface({ input: child.stdout });
  const first = new Promise<void>((resolve, reject) => {
    reader.on('line', (line) => {
      lines.push(JSON.parse(line));
      resolve();
    });
    reader.on('close', () => reject(new Error('it ended before it served')));
  });
  await soon('the server', first);
  const { event, exports } = lines.shift() as { event: string; exports: ServedExport[] };
  t.is(event, 'serving');
  return {
    process: child,
    exports,
    uri: (name) => exports.find((each) => each.name === name)?.uris[0] ?? 'none',
    end: async (signal) => {
      child.kill(signal);
      const [code] = (await soon('its end', exit)) as [number | null];
      return { code, lines };
    },
  };
}

/** Runs the command to its end, for what must fail at once. */
function command(...args: string[]): Promise<Finished> {
  return tryRun(process.execPath, [CLI, 'nbd', ...args]);
}

test('a sparse file, its changes, and an incremental with stock tools', async (t) => {
  const home = await folder(t);
  const disk = join(home, 'disk.img');
  const extents = join(home, 'monday.json');
  const socket = join(home, 'nbd.sock');
  const old = pattern(4 * MIB, 1);
  await writeSparse(disk, 64 * MIB, [{ offset: 8 * MIB, length: 4 * MIB, bytes: old }]);
  const before = await serve(t, '-U', socket, '--export', `sda=${disk}`);
  const full = join(home, 'full.qcow2');
  await run('qemu-img', ['convert', '-O', 'qcow2', before.uri('sda'), full]);
  t.deepEqual(await before.end('SIGTERM'), { code: 0, lines: [{ event: 'ended' }] });
  await t.throwsAsync(access(socket), { code: 'ENOENT' });

  const file = pattern(65_536, 2);
  await writeSparse(disk, 64 * MIB, [
    { offset: 8 * MIB, length: 4 * MIB, bytes: old },
    { offset: 9 * MIB, length: 65_536, bytes: file },
  ]);
  await writeFile(extents, JSON.stringify([{ offset: 9 * MIB, length: 65_536 }]));
  const after = await serve(
    t,
    ...['-U', socket, '-p', '0'],
    ...['--export', `sda=${disk}`, '--dirty', `sda:monday=${extents}`],
  );
  const [image, delta] = after.exports;
  t.like(image, { name: 'sda', disk: 'sda', sizeBytes: 64 * MIB });
  t.like(delta, {
    name: 'sda@monday',
    disk: 'sda',
    checkpoint: 'monday',
    sizeBytes: 64 * MIB,
    dirtyBytes: 65_536,
  });
  t.is(delta?.uris.length, 2);
  t.is(delta?.uris[0], `nbd+unix:///sda@monday?socket=${socket}`);
  t.regex(delta?.uris[1] ?? '', /^nbd:\/\/127\.0\.0\.1:\d+\/sda@monday$/);

  const map = JSON.parse(await run('nbdinfo', ['--map', '--json', after.uri('sda')])) as unknown;
  t.deepEqual(map, [
    { offset: 0, length: 8 * MIB, type: 3, description: 'hole,zero' },
    { offset: 8 * MIB, length: 4 * MIB, type: 0, description: 'data' },
    { offset: 12 * MIB, length: 52 * MIB, type: 3, description: 'hole,zero' },
  ]);
  const increment = join(home, 'inc.qcow2');
  const onTop = ['-O', 'qcow2', '-B', full, '-F', 'qcow2'];
  await run('qemu-img', ['convert', ...onTop, delta?.uris[1] ?? '', increment]);
  t.true((await stat(increment)).size < MIB);
  await run('qemu-img', ['compare', '-f', 'qcow2', '-F', 'raw', increment, disk]);
  t.deepEqual(await after.end('SIGINT'), { code: 0, lines: [{ event: 'ended' }] });
});

test('with one export, a client that names none gets it; with two, it gets none', async (t) => {
  const home = await folder(t);
  await writeFile(join(home, 'a'), pattern(4096));
  await writeFile(join(home, 'b'), pattern(8192));
  const one = await serve(t, '-U', join(home, 's1'), '--export', `a=${join(home, 'a')}`);
  t.is(
    (await run('nbdinfo', ['--size', `nbd+unix:///?socket=${join(home, 's1')}`])).trim(),
    '4096',
  );
  t.is((await one.end('SIGHUP')).code, 0);
  const two = await serve(
    t,
    ...['-U', join(home, 's2'), '--export', `a=${join(home, 'a')}`],
    ...['--export', `b=${join(home, 'b')}`],
  );
  t.is((await run('nbdinfo', ['--size', two.uri('b')])).trim(), '8192');
  const none = await tryRun('nbdinfo', ['--size', `nbd+unix:///?socket=${join(home, 's2')}`]);
  t.not(none.code, 0);
  t.is((await two.end('SIGTERM')).code, 0);
});

test('an export may have the empty name', async (t) => {
  const home = await folder(t);
  await writeFile(join(home, 'a'), pattern(4096));
  const served = await serve(t, '-U', join(home, 's'), '--export', `=${join(home, 'a')}`);
  t.is((await run('nbdinfo', ['--size', served.uri('')])).trim(), '4096');
  t.is((await served.end('SIGTERM')).code, 0);
});

test('the socket of a server that was killed is replaced', async (t) => {
  const home = await folder(t);
  const socket = join(home, 's');
  await writeFile(join(home, 'a'), pattern(4096));
  const args = ['-U', socket, '--export', `a=${join(home, 'a')}`] as const;
  const killed = await serve(t, ...args);
  const second = await command(...args);
  t.is(second.code, 1);
  t.regex(second.stderr, /another server listens on .*\n$/);
  await killed.end('SIGKILL');
  await access(socket);
  const next = await serve(t, ...args);
  t.is((await run('nbdinfo', ['--size', next.uri('a')])).trim(), '4096');
  t.is((await next.end('SIGTERM')).code, 0);
});

test('a client in the middle of a copy when the server ends gets an error, not wrong data', async (t) => {
  const home = await folder(t);
  await writeFile(join(home, 'a'), pattern(32 * MIB));
  const served = await serve(t, '-U', join(home, 's'), '--export', `a=${join(home, 'a')}`);
  const script = `
import sys, nbd
h = nbd.NBD()
h.connect_uri(sys.argv[1])
print(len(h.pread(65536, 0)), flush=True)
sys.stdin.readline()
try:
    while True:
        h.pread(1 << 20, 0)
except nbd.Error:
    print("ended")
`;
  const client = spawn('/usr/bin/python3', ['-c', script, served.uri('a')]);
  t.teardown(() => client.kill('SIGKILL'));
  const lines = createInterface({ input: client.stdout })[Symbol.asyncIterator]();
  t.is((await soon('the first read', lines.next())).value, '65536');
  client.stdin.write('go on\n');
  t.is((await served.end('SIGTERM')).code, 0);
  t.is((await soon('the error', lines.next())).value, 'ended');
});

test('without --json people see each URI, and logs go to stderr alone', async (t) => {
  const home = await folder(t);
  await writeFile(join(home, 'a'), Buffer.alloc(3 * MIB));
  await writeFile(join(home, 'm.json'), '[{"offset": 1000000, "length": 1}]');
  const child = spawn(
    process.execPath,
    [
      ...[CLI, 'nbd', '-vv', '-U', join(home, 's'), '--export', `a=${join(home, 'a')}`],
      ...['--dirty', `a:m=${join(home, 'm.json')}`],
    ],
    { stdio: ['ignore', 'pipe', 'pipe'] },
  );
  t.teardown(() => child.kill('SIGKILL'));
  const exit = once(child, 'close');
  const text = { stdout: '', stderr: '' };
  const prompt = new Promise<void>((resolve) => {
    child.stdout.on('data', (chunk: Buffer) => {
      text.stdout += chunk.toString();
      if (text.stdout.includes('Ctrl-C')) {
        resolve();
      }
    });
  });
  child.stderr.on('data', (chunk: Buffer) => {
    text.stderr += chunk.toString();
  });
  await soon('the URIs', prompt);
  await run('nbdinfo', [`nbd+unix:///a?socket=${join(home, 's')}`]);
  child.kill('SIGINT');
  t.deepEqual(await soon('its end', exit), [0, null]);
  t.regex(text.stdout, /nbd\+unix:\/\/\/a\?socket=\S+ +3 MiB/);
  t.regex(text.stdout, /nbd\+unix:\/\/\/a@m\?socket=\S+ +3 MiB +512 B since m/);
  const logged = text.stderr
    .trim()
    .split('\n')
    .map((line) => JSON.parse(line) as { level: number; msg: string; export?: string });
  t.true(logged.some(({ msg }) => msg === 'listening'));
  t.true(logged.some(({ msg, export: name }) => msg === 'request' && name === 'a'));
});

// ---- what can be wrong, each a line that says what to do

const FILE = fileURLToPath(import.meta.url);

for (const [what, args, expected] of [
  ['nothing to serve', [], /nothing to serve.*--export NAME=PATH/],
  ['an export without a path', ['--export', 'sda'], /NAME=PATH/],
  ['an export with an empty path', ['--export', 'sda='], /NAME=PATH/],
  ['a name given twice', ['--export', `a=${FILE}`, '--export', `a=${FILE}`], /twice/],
  ['a name that is too long', ['--export', `${'ü'.repeat(2049)}=${FILE}`], /4096 bytes/],
  ['no port', ['-p', 'http', '--export', `a=${FILE}`], /--port "http"/],
  ['a port out of range', ['-p', '65536', '--export', `a=${FILE}`], /65535/],
  ['a negative port', ['-p=-1', '--export', `a=${FILE}`], /--port/],
  ['an empty socket path', ['-U', '', '--export', `a=${FILE}`], /--unix/],
  ['an empty address', ['-i', '', '--export', `a=${FILE}`], /--ip-addr/],
  [
    'any port on two addresses',
    ['-p0', '-i', '::1', '-i', '127.0.0.1', '--export', `a=${FILE}`],
    /name a port/,
  ],
  ['changes without a file', ['--export', `a=${FILE}`, '--dirty', 'a:m'], /NAME:CHECKPOINT=/],
  [
    'changes without a checkpoint',
    ['--export', `a=${FILE}`, '--dirty', `a=${FILE}`],
    /NAME:CHECKPOINT=/,
  ],
  [
    'changes of another export',
    ['--export', `a=${FILE}`, '--dirty', `b:m=${FILE}`],
    /no export "b"/,
  ],
  ['a bad checkpoint name', ['--export', `a=${FILE}`, '--dirty', `a:.m=${FILE}`], /"\.m"/],
  [
    'a checkpoint given twice',
    ['--export', `a=${FILE}`, '--dirty', `a:m=${FILE}`, '--dirty', `a:m=${FILE}`],
    /twice/,
  ],
  [
    'a delta export that is taken',
    ['--export', `a=${FILE}`, '--export', `a@m=${FILE}`, '--dirty', `a:m=${FILE}`],
    /"a@m"/,
  ],
  ['an unknown option', ['--exprt', 'a=b'], /--exprt/],
  ['an argument too many', ['--export', `a=${FILE}`, 'b'], /argument/],
] as const) {
  test(`usage: ${what}: exit code 2 and one line`, async (t) => {
    const { code, stdout, stderr } = await command(...args);
    t.is(code, 2);
    t.is(stdout, '');
    t.regex(stderr, expected);
    t.is(stderr.trimEnd().split('\n').length, 1, stderr);
  });
}

test('usage: a name that is not UTF-8', async (t) => {
  const script = `exec "$0" "$1" nbd --export "$(printf 'a\\377')=$2"`;
  const { code, stderr } = await tryRun('/bin/sh', ['-c', script, process.execPath, CLI, FILE]);
  t.is(code, 2);
  t.regex(stderr, /not valid UTF-8/);
});

/** Runs what must fail with exit code 1 and one line, also as JSON. */
async function fails(t: ExecutionContext, expected: RegExp, ...args: string[]): Promise<void> {
  const plain = await command(...args);
  t.is(plain.code, 1);
  t.is(plain.stdout, '');
  t.regex(plain.stderr, expected);
  t.is(plain.stderr.trimEnd().split('\n').length, 1, plain.stderr);
  const json = await command('--json', ...args);
  t.is(json.code, 1);
  const event = JSON.parse(json.stdout) as { event: string; message: string };
  t.is(event.event, 'failed');
  t.true(plain.stderr.includes(event.message));
}

test('failure: a path that is not there, and one that is no file', async (t) => {
  const home = await folder(t);
  const socket = join(home, 's');
  await fails(t, /none does not exist/, '-U', socket, '--export', `a=${join(home, 'none')}`);
  await fails(t, /neither a plain file nor a block device/, '-U', socket, '--export', `a=${home}`);
  await t.throwsAsync(access(socket), { code: 'ENOENT' });
});

test('failure: a port in use, an address of somebody else', async (t) => {
  const stranger = createServer().listen(0, '127.0.0.1');
  await once(stranger, 'listening');
  t.teardown(() => stranger.close());
  const address = stranger.address();
  const port = typeof address === 'object' && address !== null ? String(address.port) : '';
  await fails(t, /port \d+ on 127\.0\.0\.1 is in use/, '-p', port, '--export', `a=${FILE}`);
  await fails(t, /--ip-addr/, '-i', '192.0.2.1', '-p', '0', '--export', `a=${FILE}`);
});

test('failure: a socket path that can not be', async (t) => {
  const home = await folder(t);
  await writeFile(join(home, 'file'), 'precious');
  const more = ['--export', `a=${FILE}`];
  await fails(t, /is not a socket/, '-U', join(home, 'file'), ...more);
  t.is(await readFile(join(home, 'file'), 'utf8'), 'precious');
  await fails(t, /folder/, '-U', join(home, 'none', 's'), ...more);
  await fails(t, /107 bytes/, '-U', join(home, 's'.repeat(120)), ...more);
});

test('failure: changes that can not be read, are malformed, or beyond the end', async (t) => {
  const home = await folder(t);
  const disk = join(home, 'disk');
  await writeFile(disk, Buffer.alloc(MIB));
  const extents = join(home, 'm.json');
  const args = ['-U', join(home, 's'), '--export', `a=${disk}`, '--dirty', `a:m=${extents}`];
  await fails(t, /m\.json does not exist/, ...args);
  await writeFile(extents, '[{"offset": 0, "length": 512},\n {"offset": 512 "length": 512}]');
  await fails(t, /m\.json, line 2, column 17: /, ...args);
  await writeFile(extents, `[{"offset": 512, "length": ${MIB}}]`);
  await fails(t, /m\.json, line 1, column 2: .*beyond the end \(1048576\)/, ...args);
  await t.throwsAsync(access(join(home, 's')), { code: 'ENOENT' });
});

test('--help tells the defaults, the default export and the exit codes', async (t) => {
  const { code, stdout } = await command('--help');
  t.is(code, 0);
  for (const part of [/127\.0\.0\.1/, /10809/, /single --export/, /@CHECKPOINT/, /Exit codes/]) {
    t.regex(stdout, part);
  }
});
