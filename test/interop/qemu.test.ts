// SPDX-License-Identifier: Apache-2.0
/** QEMU's tools against served exports: full copies, maps, incrementals. */
import { readFile, stat, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import type { ExecutionContext } from 'ava';
import { type BlockSource, diskExports } from '../../nbd/export.ts';
import { type Extent, ExtentMap } from '../../nbd/extents.ts';
import type { NbdServer } from '../../nbd/server.ts';
import { folder, MemorySource, pattern, type World, world } from '../nbd/world.ts';
import { type Release, testReleases } from './clients.ts';

const MIB = 1 << 20;
const SIZE = 24 * MIB;
const HOLES: Extent[] = [
  { offset: 2 * MIB, length: 6 * MIB },
  { offset: 20 * MIB, length: 4 * MIB },
];

/** A disk's content: data everywhere but in the holes. */
function contentWith(holes: readonly Extent[], seed: number): Buffer {
  const data = pattern(SIZE, seed);
  for (const { offset, length } of holes) {
    data.fill(0, offset, offset + length);
  }
  return data;
}

interface Served extends World {
  readonly home: string;
  uri(name?: string): string;
}

async function served(
  t: ExecutionContext,
  source: BlockSource,
  options: {
    holes?: readonly Extent[];
    checkpoints?: Parameters<typeof diskExports>[0]['checkpoints'];
  } = {},
): Promise<Served> {
  const exports = diskExports({
    name: 'sda',
    description: '',
    source,
    allocation: ExtentMap.fromRanges(source.sizeBytes, options.holes ?? HOLES, 3, 0),
    checkpoints: options.checkpoints ?? [],
  });
  const made = await world(t, exports);
  const uri = (name = 'sda'): string => firstUri(made.server, name);
  return { ...made, home: await folder(t), uri };
}

function firstUri(server: NbdServer, name: string): string {
  const [uri] = server.uris(name);
  if (uri === undefined) {
    throw new Error('server does not listen');
  }
  return uri;
}

testReleases('qemu-img convert and compare: every byte, holes stay holes', async (t, client) => {
  const data = contentWith(HOLES, 1);
  const { home, uri } = await served(t, new MemorySource(data));
  const raw = join(home, 'full.raw');
  await client.run('qemu-img', ['convert', '-O', 'raw', uri(), raw]);
  t.true((await readFile(raw)).equals(data));
  t.true((await stat(raw)).blocks * 512 <= SIZE - 10 * MIB, 'it is as sparse as its source');
  const qcow2 = join(home, 'full.qcow2');
  await client.run('qemu-img', ['convert', '-c', '-W', '-m', '8', '-O', 'qcow2', uri(), qcow2]);
  await client.run('qemu-img', ['compare', '-f', 'raw', '-F', 'qcow2', uri(), qcow2]);
  await writeFile(raw, Buffer.concat([data.subarray(0, -1), Buffer.from([1])]));
  const differs = await client.tryRun('qemu-img', [
    'compare',
    '-f',
    'raw',
    '-F',
    'raw',
    uri(),
    raw,
  ]);
  t.is(differs.code, 1);
});

testReleases(
  'qemu-img convert over TCP, with one and with several coroutines',
  async (t, client) => {
    const data = contentWith(HOLES, 1);
    const { home, server } = await served(t, new MemorySource(data));
    await server.listen({ host: '::1', port: 0 });
    const uri = server.uris('sda').at(-1) ?? '';
    t.regex(uri, /^nbd:\/\/\[::1\]/);
    for (const coroutines of ['1', '16']) {
      const target = join(home, `full-${coroutines}.raw`);
      await client.run('qemu-img', ['convert', '-m', coroutines, '-W', '-O', 'raw', uri, target]);
      t.true((await readFile(target)).equals(data));
    }
  },
);

interface Mapped {
  start: number;
  length: number;
  present: boolean;
  zero: boolean;
  data: boolean;
}

async function qemuMap(
  client: Release,
  ...args: string[]
): Promise<[number, number, boolean, boolean][]> {
  const map = JSON.parse(
    await client.run('qemu-img', ['map', '--output=json', ...args]),
  ) as Mapped[];
  return map.map(({ start, length, zero, data }) => [start, length, zero, data]);
}

testReleases('qemu-img map shows the holes', async (t, client) => {
  const { uri } = await served(t, new MemorySource(contentWith(HOLES, 1)));
  t.deepEqual(await qemuMap(client, uri()), [
    [0, 2 * MIB, false, true],
    [2 * MIB, 6 * MIB, true, false],
    [8 * MIB, 12 * MIB, false, true],
    [20 * MIB, 4 * MIB, true, false],
  ]);
});

testReleases(
  'qemu-img map with x-dirty-bitmap shows what is dirty as data: false',
  async (t, client) => {
    const { path } = await served(t, new MemorySource(contentWith(HOLES, 1)), {
      checkpoints: [{ name: 'monday', dirty: [{ offset: MIB, length: 65_536 }] }],
    });
    const image =
      `driver=nbd,server.type=unix,server.path=${path},export=sda,` +
      'x-dirty-bitmap=qemu:dirty-bitmap:monday';
    t.deepEqual(await qemuMap(client, '--image-opts', image), [
      [0, MIB, false, true],
      [MIB, 65_536, false, false],
      [MIB + 65_536, SIZE - MIB - 65_536, false, true],
    ]);
  },
);

/** Two states of a disk, the second with changes of every kind. */
function twoStates(): { before: Buffer; after: Buffer; dirty: Extent[]; holesAfter: Extent[] } {
  const before = contentWith(HOLES, 1);
  const after = Buffer.from(before);
  const dirty: Extent[] = [
    // Data over data, data into a hole, and data that became a hole.
    { offset: 512 * 1024, length: 200_000 },
    { offset: 3 * MIB, length: 65_536 },
    { offset: 12 * MIB, length: MIB },
    // Bytes in the middle of a sector, and the very last byte.
    { offset: 9 * MIB + 100, length: 7 },
    { offset: SIZE - 1, length: 1 },
  ];
  for (const { offset, length } of dirty) {
    pattern(length + 4, offset % 1000).copy(after, offset, 0, length);
  }
  after[SIZE - 1] = 0xa5;
  after[9 * MIB + 100] = (before[9 * MIB + 100] ?? 0) ^ 0xff;
  after.fill(0, 12 * MIB, 13 * MIB);
  const holesAfter: Extent[] = [
    { offset: 2 * MIB, length: MIB },
    { offset: 3 * MIB + 65_536, length: 5 * MIB - 65_536 },
    { offset: 12 * MIB, length: MIB },
    { offset: 20 * MIB, length: 4 * MIB - 4096 },
  ];
  return { before, after, dirty, holesAfter };
}

for (const blockSizeBytes of [undefined, 65_536]) {
  const blocks = blockSizeBytes === undefined ? 'sectors' : '64 KiB blocks';

  testReleases(
    `qemu-img convert -B of a delta export copies the changes only, in ${blocks}`,
    async (t, client) => {
      const { before, after, dirty, holesAfter } = twoStates();
      const first = await served(t, new MemorySource(before));
      const full = join(first.home, 'full.qcow2');
      await client.run('qemu-img', ['convert', '-O', 'qcow2', first.uri(), full]);

      const source = new MemorySource(after);
      const checkpoint = { name: 'monday', dirty, ...(blockSizeBytes && { blockSizeBytes }) };
      const second = await served(t, source, { holes: holesAfter, checkpoints: [checkpoint] });
      const increment = join(first.home, 'inc.qcow2');
      const delta = second.uri('sda@monday');
      await client.run('qemu-img', [
        ...['convert', '-O', 'qcow2', '-B', full, '-F', 'qcow2'],
        delta,
        increment,
      ]);
      const bytesRead = source.sizes.reduce((sum, size) => sum + size, 0);
      t.true(bytesRead < MIB, `${bytesRead} bytes were read`);
      t.true((await stat(increment)).size < 2 * MIB);

      await client.run('qemu-img', [
        'compare',
        '-f',
        'qcow2',
        '-F',
        'raw',
        increment,
        second.uri(),
      ]);
      const chain = join(first.home, 'chain.raw');
      await client.run('qemu-img', ['convert', '-O', 'raw', increment, chain]);
      t.true((await readFile(chain)).equals(after));
    },
  );
}

testReleases(
  'qemu-img convert of a delta export without -B safely makes a full copy',
  async (t, client) => {
    const { after, dirty, holesAfter } = twoStates();
    const { home, uri } = await served(t, new MemorySource(after), {
      holes: holesAfter,
      checkpoints: [{ name: 'monday', dirty, blockSizeBytes: 65_536 }],
    });
    const target = join(home, 'full.raw');
    await client.run('qemu-img', ['convert', '-O', 'raw', uri('sda@monday'), target]);
    t.true((await readFile(target)).equals(after));
  },
);

testReleases('qemu-img info names no format but raw, and the size', async (t, client) => {
  const { uri } = await served(t, new MemorySource(contentWith(HOLES, 1)));
  const info = JSON.parse(await client.run('qemu-img', ['info', '--output=json', uri()])) as {
    format: string;
    'virtual-size': number;
  };
  t.is(info.format, 'raw');
  t.is(info['virtual-size'], SIZE);
});

testReleases(
  'an image whose size is no multiple of a sector is copied to its last byte',
  async (t, client) => {
    const data = pattern(3 * MIB + 1000);
    data[data.length - 1] = 0x5a;
    const source = new MemorySource(data);
    const { home, uri } = await served(t, source, { holes: [] });
    await client.run('nbdcopy', [uri(), join(home, 'copy')]);
    t.true((await readFile(join(home, 'copy'))).equals(data));
    // QEMU counts in sectors and fills the last one with zeroes.
    await client.run('qemu-img', ['convert', '-O', 'raw', uri(), join(home, 'qemu')]);
    const copy = await readFile(join(home, 'qemu'));
    t.true(copy.subarray(0, data.length).equals(data));
    t.true(copy.subarray(data.length).every((byte) => byte === 0));
  },
);

async function qemuIo(client: Release, uri: string, ...commands: string[]): Promise<string> {
  const { stdout, stderr } = await client.tryRun('qemu-io', [
    ...['-r', '-f', 'raw'],
    ...commands.flatMap((command) => ['-c', command]),
    uri,
  ]);
  return stdout + stderr;
}

testReleases('qemu-io reads what is there, at odd places, many at a time', async (t, client) => {
  const data = Buffer.alloc(SIZE, 0xab);
  const { uri } = await served(t, new MemorySource(data), { holes: [] });
  const output = await qemuIo(
    client,
    uri(),
    'read -P 0xab 0 24M',
    'read -P 0xab 511 4097',
    ...Array.from({ length: 16 }, (_, index) => `aio_read -P 0xab ${index * 70_000} 65536`),
    'aio_flush',
    'flush',
  );
  t.is(output.match(/read \d+\/\d+ bytes/g)?.length, 18, output);
  t.notRegex(output, /failed|error/i);
});

testReleases('qemu-io reports a read error, and the connection goes on', async (t, client) => {
  const source = new MemorySource(Buffer.alloc(SIZE, 0xab));
  source.faultAt = 10 * MIB;
  const { uri, log } = await served(t, source, { holes: [] });
  const output = await qemuIo(client, uri(), 'read 10M 64k', 'read -P 0xab 11M 64k');
  t.regex(output, /Input\/output error/);
  t.regex(output, /read 65536\/65536 bytes at offset 11534336/);
  t.true(log.lines.some(({ level, message }) => level === 'error' && message === 'read failed'));
});

testReleases(
  'qemu-img fails with EIO when the export has failed, never with wrong data',
  async (t, client) => {
    const source = new MemorySource(contentWith(HOLES, 1));
    const { home, uri, server } = await served(t, source);
    server.failExports();
    const target = join(home, 'full.raw');
    const { code, stderr } = await client.tryRun('qemu-img', [
      'convert',
      '-O',
      'raw',
      uri(),
      target,
    ]);
    t.is(code, 1);
    t.regex(stderr, /Input\/output error/);
  },
);

testReleases('qemu-nbd --list shows every export', async (t, client) => {
  const { path } = await served(t, new MemorySource(contentWith(HOLES, 1)), {
    checkpoints: [{ name: 'monday', dirty: [] }],
  });
  const list = await client.run('qemu-nbd', ['--list', '-k', path]);
  t.regex(list, /exports available: 2/);
  t.regex(list, /export: 'sda'/);
  t.regex(list, /export: 'sda@monday'/);
  t.regex(list, /qemu:dirty-bitmap:monday/);
  t.regex(list, /readonly.*multi/);
});
