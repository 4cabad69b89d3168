// SPDX-License-Identifier: Apache-2.0
/** Socket activation by libnbd and by systemd. */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { readFile, stat, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { execPath } from 'node:process';
import test, { type ExecutionContext } from 'ava';
import { folder, freePorts, pattern } from '../nbd/world.ts';
import { CLI } from '../program.ts';
import { type Finished, run, testReleases, tryRun } from './clients.ts';

const SIZE = 4 << 20;

async function diskOf(t: ExecutionContext): Promise<{ home: string; disk: string }> {
  const home = await folder(t);
  const disk = join(home, 'disk');
  await writeFile(disk, pattern(SIZE));
  return { home, disk };
}

testReleases('libnbd starts the server: nbdinfo [ ... ] and nbdcopy', async (t, client) => {
  const { home, disk } = await diskOf(t);
  const server = ['[', execPath, CLI, 'nbd', '--export', `sda=${disk}`, ']'];
  // What is printed is nbdinfo's alone.
  const info = JSON.parse(await client.run('nbdinfo', ['--json', '--', ...server])) as {
    exports: { 'export-size': number }[];
  };
  t.is(info.exports[0]?.['export-size'], SIZE);
  const into = join(home, 'copy');
  await client.run('nbdcopy', ['--', ...server, into]);
  t.true((await readFile(into)).equals(pattern(SIZE)));
});

test('libnbd starts the server: its name for the socket does not matter', async (t) => {
  const { disk } = await diskOf(t);
  const output = await run('/usr/bin/python3', [
    '-c',
    `
import nbd, sys
h = nbd.NBD()
h.connect_systemd_socket_activation(sys.argv[1:])
assert h.pread(512, 0) == open(sys.argv[-1].split("=")[1], "rb").read(512)
h.shutdown()
print("ok")
`,
    ...[execPath, CLI, 'nbd', '--export', `sda=${disk}`],
  ]);
  t.is(output.trim(), 'ok');
});

/** Has systemd's own tool listen, and start the server at the first connection. */
function activate(
  t: ExecutionContext,
  listen: readonly string[],
  ...args: string[]
): ReturnType<typeof spawn> {
  const child = spawn(
    'systemd-socket-activate',
    [...listen.flatMap((address) => ['-l', address]), execPath, CLI, 'nbd', '--json', ...args],
    { stdio: ['ignore', 'pipe', 'pipe'] },
  );
  const ended = once(child, 'close');
  t.teardown(async () => {
    child.kill('SIGTERM');
    await ended;
  });
  return child;
}

async function answers(uri: string): Promise<Finished> {
  // The tool says on stderr that it listens, in words of its own: asking is surer.
  for (;;) {
    const asked = await tryRun('nbdinfo', ['--size', uri]);
    if (asked.code === 0 || !/Connection refused|No such file/.test(asked.stderr)) {
      return asked;
    }
  }
}

test('systemd starts the server on a unix socket and a port, named', async (t) => {
  const { home, disk } = await diskOf(t);
  const [port = 0] = await freePorts(1);
  const socket = join(home, 'sock');
  const child = activate(t, [socket, `127.0.0.1:${port}`], ...['--export', `sda=${disk}`]);
  let printed = '';
  child.stdout?.on('data', (chunk: Buffer) => {
    printed += chunk.toString();
  });
  for (const uri of [`nbd+unix:///sda?socket=${socket}`, `nbd://127.0.0.1:${port}/sda`]) {
    t.is((await answers(uri)).stdout.trim(), String(SIZE));
  }
  const { exports } = JSON.parse(printed) as { exports: { uris: string[] }[] };
  t.deepEqual(exports[0]?.uris, [
    `nbd+unix:///sda?socket=${socket}`,
    `nbd://127.0.0.1:${port}/sda`,
  ]);
  child.kill('SIGTERM');
  await once(child, 'close');
  // The socket is its owner's to remove.
  t.true((await stat(socket)).isSocket());
});

test('a socket that other machines can reach needs TLS, whoever opened it', async (t) => {
  const { disk } = await diskOf(t);
  const [port = 0] = await freePorts(1);
  const child = activate(t, [`0.0.0.0:${port}`], '--export', `sda=${disk}`);
  let complaints = '';
  child.stderr?.on('data', (chunk: Buffer) => {
    complaints += chunk.toString();
  });
  const asked = await answers(`nbd://127.0.0.1:${port}/sda`);
  t.not(asked.code, 0);
  await once(child, 'close');
  t.regex(complaints, /can be reached from other machines, and there is no TLS/);
});

test('inherited sockets and --port contradict each other', async (t) => {
  const { disk } = await diskOf(t);
  const { code, stderr } = await tryRun('nbdinfo', [
    ...['--', '[', execPath, CLI, 'nbd', '-p', '0', '--export', `sda=${disk}`, ']'],
  ]);
  t.not(code, 0);
  t.regex(stderr, /sockets have been inherited .* leave --port/);
});

test('a descriptor that is no socket is refused', async (t) => {
  const { disk } = await diskOf(t);
  const { code, stderr } = await tryRun('/bin/sh', [
    ...['-c', 'LISTEN_PID=$$ LISTEN_FDS=1 exec "$@" 3<"$0"', disk],
    ...[execPath, CLI, 'nbd', '--export', `sda=${disk}`],
  ]);
  t.is(code, 1);
  t.regex(stderr, /cannot listen on the inherited socket 3/);
});
