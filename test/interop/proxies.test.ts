// SPDX-License-Identifier: Apache-2.0
/** Backup products' own ways of asking: Xen Orchestra, virtnbdbackup, oVirt imageio. */
import { open, readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { NbdTcpClient } from '@vates/nbd-client';
import MultiNbdClient from '@vates/nbd-client/multi.mjs';
import test from 'ava';
import { pattern } from '../nbd/world.ts';
import { testReleases } from './clients.ts';
import { type DiskContent, serveDisk } from './serving.ts';

const MIB = 1 << 20;
const GIB = 2 ** 30;
/** The size of its requests unless it is told otherwise. */
const XEN_BLOCK_BYTES = 65_536;

const SMALL: DiskContent = {
  sizeBytes: 5 * MIB + 1000,
  data: [
    { offset: 0, length: MIB, bytes: pattern(MIB, 1) },
    { offset: 4 * MIB, length: MIB + 1000, bytes: pattern(MIB + 1000, 2) },
  ],
};

test('Xen Orchestra reads every block by EXPORT_NAME, 124 zeroes and simple replies', async (t) => {
  const { disk, port, log } = await serveDisk(t, SMALL);
  const client = new NbdTcpClient({ address: '127.0.0.1', port, exportname: 'sda' });
  await client.connect();
  t.is(client.exportSize, BigInt(SMALL.sizeBytes));
  // All at once, in an order that is not the disk's.
  const count = Math.ceil(SMALL.sizeBytes / XEN_BLOCK_BYTES);
  const indexes = Array.from({ length: count }, (_, index) => (index * 37) % count);
  const blocks = await Promise.all(indexes.map((index) => client.readBlock(index)));
  const expected = await readFile(disk);
  for (const [place, index] of indexes.entries()) {
    const start = index * XEN_BLOCK_BYTES;
    t.true(blocks[place]?.equals(expected.subarray(start, start + XEN_BLOCK_BYTES)));
  }
  t.deepEqual(await client.getMap(), [
    { offset: 0, length: MIB, type: 0, description: 'data' },
    { offset: MIB, length: 3 * MIB, type: 3, description: 'hole,zero' },
    { offset: 4 * MIB, length: MIB + 1000, type: 0, description: 'data' },
  ]);
  await client.disconnect();
  t.deepEqual(
    log.lines.filter(({ level }) => level === 'warn' || level === 'error'),
    [],
  );
});

test('Xen Orchestra reads ahead over eight connections, 2 MiB at a time', async (t) => {
  const { disk, port } = await serveDisk(t, SMALL);
  const settings = [{ address: '127.0.0.1', port, exportname: 'sda' }];
  const client = new MultiNbdClient(settings, { nbdConcurrency: 8, readAhead: 16 });
  await client.connect();
  const size = 2 * MIB;
  const blocks: Buffer[] = [];
  for await (const block of client.readBlocks(function* () {
    for (let index = 0; index * size < SMALL.sizeBytes; index += 1) {
      yield { index, size };
    }
  })) {
    blocks.push(block);
  }
  t.true(Buffer.concat(blocks).equals(await readFile(disk)));
  await client.disconnect();
});

test('Xen Orchestra is told of an export that does not exist by a closed connection', async (t) => {
  const { port } = await serveDisk(t, SMALL);
  const client = new NbdTcpClient({ address: '127.0.0.1', port, exportname: 'none' });
  await t.throwsAsync(client.connect());
});

/** 20 GiB of which little is there, and less has changed. */
function large(): DiskContent {
  const sizeBytes = 20 * GIB + 512;
  const data = Array.from({ length: 40 }, (_, index) => {
    // The last reaches the very end; one lies across the 4 GiB at which questions are cut.
    const offset = index === 39 ? sizeBytes - 70_144 : index * (511 * MIB) + 65_536;
    return { offset, length: 70_144, bytes: pattern(70_144, index) };
  });
  data.push({ offset: 4 * GIB - 100 * 512, length: 200 * 512, bytes: pattern(200 * 512, 99) });
  data.sort((a, b) => a.offset - b.offset);
  const dirty = data.filter((_, index) => index % 3 === 0).concat(data.slice(-1));
  const first = data.filter(({ offset }) => offset === 4 * GIB - 100 * 512);
  const checkpoints = [{ name: 'monday', dirty: [...dirty, ...first], blockSizeBytes: 65_536 }];
  return { sizeBytes, data, checkpoints };
}

// What virtnbdbackup does: questions of 4 GiB - 1 on both contexts, the answers checked to have
// no other flags than it knows, on by the bitmap's length, and data in pieces of 32 MiB at most.
const VIRTNBDBACKUP = `
import hashlib, os
BASE, DIRTY, MOST = "base:allocation", "qemu:dirty-bitmap:monday", (1 << 32) - 1
uri, path = sys.argv[1:3]
h = nbd.NBD()
h.add_meta_context(BASE)
h.add_meta_context(DIRTY)
h.set_export_name("sda")
h.connect_uri(uri)
assert h.can_meta_context(BASE) and h.can_meta_context(DIRTY)
size = h.get_size()
maps = {BASE: [], DIRTY: []}
offset, questions = 0, 0
while offset < size:
    answered = {}
    def extent(context, at, entries, error):
        assert error.value == 0 and at == offset and context not in answered
        pairs = list(zip(entries[0::2], entries[1::2]))
        assert all(flags in ((0, 1) if context == DIRTY else (0, 1, 2, 3)) for _, flags in pairs)
        assert all(length > 0 for length, _ in pairs)
        answered[context] = sum(length for length, _ in pairs)
        position = at
        for length, flags in pairs:
            last = maps[context][-1] if maps[context] else None
            if last and last[2] == flags:
                last[1] += length
            else:
                maps[context].append([position, length, flags])
            position += length
    h.block_status(min(MOST, size - offset), offset, extent)
    assert len(answered) == 2 and answered[BASE] == answered[DIRTY], answered
    offset += answered[DIRTY]
    questions += 1
assert offset == size
copy = os.open(path, os.O_RDWR | os.O_CREAT)
os.ftruncate(copy, size)
for position, length, flags in maps[DIRTY if sys.argv[3] == "inc" else BASE]:
    if flags == (1 if sys.argv[3] == "inc" else 0):
        while length:
            piece = min(length, 32 << 20)
            os.pwrite(copy, h.pread(piece, position), position)
            position, length = position + piece, length - piece
h.shutdown()
print(questions, len(maps[BASE]), len(maps[DIRTY]))
`;

for (const transport of ['unix', 'tcp'] as const) {
  testReleases(`virtnbdbackup: full and incremental, over ${transport}`, async (t, client) => {
    const content = large();
    const { disk, home, uris } = await serveDisk(t, content);
    const uri = uris()[transport];
    const full = join(home, 'full');
    const counts = await client.python(VIRTNBDBACKUP, uri, full, 'full');
    t.regex(counts, /^6 /);
    await client.run('qemu-img', ['compare', '-f', 'raw', '-F', 'raw', full, disk]);
    const increment = join(home, 'inc');
    t.is(await client.python(VIRTNBDBACKUP, uri, increment, 'inc'), counts);
    // All that is said to be dirty is there, as it is on the disk.
    const map = await client.run('nbdinfo', ['--map=qemu:dirty-bitmap:monday', '--json', uri]);
    const dirty = (JSON.parse(map) as { offset: number; length: number; type: number }[]).filter(
      ({ type }) => type === 1,
    );
    t.true(dirty.length >= 14);
    for (const { offset, length } of dirty) {
      const expected = await part(disk, offset, length);
      t.true((await part(increment, offset, length)).equals(expected), `at ${offset}`);
    }
  });
}

async function part(path: string, offset: number, length: number): Promise<Buffer> {
  const file = await open(path);
  try {
    const { buffer, bytesRead } = await file.read(Buffer.alloc(length), 0, length, offset);
    return buffer.subarray(0, bytesRead);
  } finally {
    await file.close();
  }
}

// oVirt's imageio: questions of 2 GiB, merged extents, sixteen reads in flight on four handles.
const IMAGEIO = `
BASE, DIRTY = "base:allocation", "qemu:dirty-bitmap:monday"
def connect():
    h = nbd.NBD()
    h.add_meta_context(BASE)
    h.add_meta_context(DIRTY)
    h.set_export_name("sda")
    h.connect_uri(sys.argv[1])
    return h
handles = [connect() for _ in range(4)]
size, disk = handles[0].get_size(), open(sys.argv[2], "rb")
offset, zero, dirty = 0, 0, []
while offset < size:
    seen = {}
    def extent(context, at, entries, error):
        seen[context] = list(zip(entries[0::2], entries[1::2]))
    handles[0].block_status(min(1 << 31, size - offset), offset, extent)
    zero += sum(length for length, flags in seen[BASE] if flags & 2)
    position = offset
    for length, flags in seen[DIRTY]:
        if flags & 1:
            dirty.append((position, length))
        position += length
    offset = position
pending = []
for n, (position, length) in enumerate(dirty):
    h, buffer = handles[n % 4], nbd.Buffer(length)
    pending.append((h, h.aio_pread(buffer, position), buffer, position, length))
for h, cookie, buffer, position, length in pending:
    while not h.aio_command_completed(cookie):
        h.poll(1000)
    disk.seek(position)
    assert buffer.to_bytearray() == disk.read(length), position
for h in handles:
    h.shutdown()
print(zero)
`;

testReleases('oVirt imageio: questions of 2 GiB, reads on four connections', async (t, client) => {
  const content = large();
  const { disk, uris } = await serveDisk(t, content);
  const zero = Number(await client.python(IMAGEIO, uris().tcp, disk));
  const data = content.data.reduce((sum, { length }) => sum + length, 0);
  // Data in whole blocks of 4 KiB; a piece more at each end at most.
  t.true(zero <= content.sizeBytes - data);
  t.true(zero >= content.sizeBytes - data - content.data.length * 8192);
});
