// SPDX-License-Identifier: Apache-2.0
/** What a pull leaves behind on the server, and whose I/O goes first. */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import test, { type ExecutionContext } from 'ava';
import { folder, pattern, soon } from '../nbd/world.ts';
import { CLI } from '../program.ts';
import { run } from './clients.ts';

const MIB = 1 << 20;
const SIZE = 160 * MIB;
const MOST_LEFT_BYTES = 16 * MIB;

/** How much of a device or file is in the page cache, bytes, from mincore(2). */
const RESIDENT = `
import ctypes, os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
size = os.lseek(fd, 0, os.SEEK_END)
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
address = libc.mmap(None, size, 1, 1, fd, 0)
pages = (size + 4095) // 4096
vector = ctypes.create_string_buffer(pages)
assert libc.mincore(address, size, vector) == 0
print(sum(byte & 1 for byte in vector.raw[:pages]) * 4096)
`;

async function residentBytes(path: string): Promise<number> {
  return Number(await run('/usr/bin/python3', ['-c', RESIDENT, path]));
}

async function serve(t: ExecutionContext, path: string): Promise<{ uri: string; pid: number }> {
  const home = await folder(t);
  const child = spawn(
    process.execPath,
    [CLI, 'nbd', '--json', '-U', join(home, 'sock'), '--export', `disk=${path}`],
    { stdio: ['ignore', 'pipe', 'inherit'] },
  );
  const ended = once(child, 'close');
  t.teardown(async () => {
    child.kill('SIGTERM');
    await ended;
  });
  const [line] = (await soon('the server', once(createInterface(child.stdout), 'line'))) as [
    string,
  ];
  const { exports } = JSON.parse(line) as { exports: { uris: string[] }[] };
  return { uri: exports[0]?.uris[0] ?? '', pid: child.pid ?? 0 };
}

/** A loop device, which is a block device, over a file with data. */
async function device(t: ExecutionContext): Promise<{ path: string; data: Buffer }> {
  const file = join(await folder(t), 'file');
  const data = pattern(SIZE);
  await writeFile(file, data);
  const path = (await run('losetup', ['-f', '--show', '-r', file])).trim();
  t.teardown(() => run('losetup', ['-d', path]));
  return { path, data };
}

for (const [what, args] of [
  ['one connection, large reads', ['--connections=1', '--request-size=1048576']],
  ['four connections, small reads', ['--connections=4', '--request-size=65536']],
] as const) {
  test(`after a full pull by ${what} at most 16 MiB stay in the page cache`, async (t) => {
    const { path, data } = await device(t);
    const { uri } = await serve(t, path);
    const copy = join(await folder(t), 'copy');
    await run('nbdcopy', ['--no-extents', ...args, uri, copy]);
    const left = await residentBytes(path);
    t.true(left <= MOST_LEFT_BYTES, `${left} bytes are left`);
    t.log(`${what}: ${(left / MIB).toFixed(1)} MiB left`);
    await run('cmp', [copy, path]);
    t.is(data.length, SIZE);
  });
}

test('what others have cached of a plain file stays', async (t) => {
  const file = join(await folder(t), 'file');
  await writeFile(file, pattern(32 * MIB));
  const { uri } = await serve(t, file);
  await run('nbdcopy', ['--no-extents', uri, 'null:']);
  t.is(await residentBytes(file), 32 * MIB);
});

test('all its threads yield to others in I/O', async (t) => {
  const file = join(await folder(t), 'file');
  await writeFile(file, pattern(4 * MIB));
  const { uri, pid } = await serve(t, file);
  // The threads that read are there only once something was read.
  await run('nbdcopy', ['--connections=4', uri, 'null:']);
  const threads = (await run('ls', [`/proc/${pid}/task`])).trim().split('\n');
  t.true(threads.length > 4);
  const priorities = (await run('ionice', ['-p', ...threads])).trim().split('\n');
  t.deepEqual([...new Set(priorities)], ['idle']);
});
