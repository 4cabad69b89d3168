// SPDX-License-Identifier: Apache-2.0
/** libnbd's tools and its Python binding against served exports. */
import { readFile, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { diskExports, openFileSource } from '../../nbd/export.ts';
import { ExtentMap } from '../../nbd/extents.ts';
import type { NbdServer } from '../../nbd/server.ts';
import { exportOf, folder, MemorySource, pattern, world } from '../nbd/world.ts';
import { type Release, TRIXIE, testReleases } from './clients.ts';

const MIB = 1 << 20;
const SIZE = 8 * MIB;
const HOLE = { offset: 2 * MIB, length: 3 * MIB };
const DIRTY = [
  { offset: MIB, length: 65_536 },
  { offset: 4 * MIB, length: 2 * MIB },
];

function content(): Buffer {
  const data = pattern(SIZE);
  data.fill(0, HOLE.offset, HOLE.offset + HOLE.length);
  return data;
}

function exportsOfDisk(source = new MemorySource(content())): ReturnType<typeof diskExports> {
  return diskExports({
    name: 'sda',
    description: 'first disk',
    source,
    allocation: ExtentMap.fromRanges(SIZE, [HOLE], 3, 0),
    checkpoints: [
      { name: 'monday', dirty: DIRTY, blockSizeBytes: 65_536 },
      { name: 'tuesday', dirty: [{ offset: SIZE - 1, length: 1 }], blockSizeBytes: 65_536 },
    ],
  });
}

function uriOf(server: NbdServer, name = 'sda'): string {
  const [uri] = server.uris(name);
  if (uri === undefined) {
    throw new Error('server does not listen');
  }
  return uri;
}

const FIELDS = {
  is_rotational: false,
  is_read_only: true,
  can_cache: false,
  can_df: true,
  can_fast_zero: false,
  can_flush: true,
  can_fua: true,
  can_multi_conn: true,
  can_trim: false,
  can_zero: false,
  block_size_minimum: 1,
  block_size_preferred: 4096,
  block_size_maximum: 33_554_432,
  'export-size': SIZE,
  'export-size-str': '8M',
} as const;
/** What libnbd 1.18 and newer also show, because they ask for it. */
const EXTENDED = { extended: true } as const;
const EXTENDED_FIELDS = { can_block_status_payload: true } as const;
const IMAGE_CONTEXTS = ['base:allocation', 'qemu:dirty-bitmap:monday', 'qemu:dirty-bitmap:tuesday'];

testReleases('nbdinfo shows every field as it is', async (t, client) => {
  const { server } = await world(t, exportsOfDisk());
  const uri = uriOf(server);
  const info: unknown = JSON.parse(await client.run('nbdinfo', ['--json', uri]));
  t.deepEqual(info, {
    protocol: 'newstyle-fixed',
    TLS: false,
    structured: true,
    ...(client === TRIXIE && EXTENDED),
    exports: [
      {
        'export-name': 'sda',
        description: 'first disk',
        content: 'data',
        uri,
        contexts: IMAGE_CONTEXTS,
        ...FIELDS,
        ...(client === TRIXIE && EXTENDED_FIELDS),
      },
    ],
  });
});

testReleases('nbdinfo --list shows the image and its delta exports', async (t, client) => {
  const { server } = await world(t, exportsOfDisk());
  const list: unknown = JSON.parse(
    await client.run('nbdinfo', ['--list', '--json', uriOf(server, '')]),
  );
  const description = 'first disk: changes since checkpoint';
  const entry = (name: string, text: string, contexts: string[]): object => ({
    'export-name': name,
    description: text,
    uri: uriOf(server, name),
    contexts,
    ...FIELDS,
    ...(client === TRIXIE && EXTENDED_FIELDS),
  });
  t.deepEqual(list, {
    protocol: 'newstyle-fixed',
    TLS: false,
    structured: true,
    ...(client === TRIXIE && EXTENDED),
    exports: [
      entry('sda', 'first disk', IMAGE_CONTEXTS),
      entry('sda@monday', `${description} monday`, ['base:allocation']),
      entry('sda@tuesday', `${description} tuesday`, ['base:allocation']),
    ],
  });
});

async function mapOf(
  client: Release,
  uri: string,
  context: string,
): Promise<[number, number, string][]> {
  const text = await client.run('nbdinfo', [`--map=${context}`, '--json', uri]);
  const map = JSON.parse(text) as { offset: number; length: number; description: string }[];
  return map.map(({ offset, length, description }) => [offset, length, description]);
}

testReleases('nbdinfo --map shows holes of the image', async (t, client) => {
  const { server } = await world(t, exportsOfDisk());
  t.deepEqual(await mapOf(client, uriOf(server), 'base:allocation'), [
    [0, 2 * MIB, 'data'],
    [2 * MIB, 3 * MIB, 'hole,zero'],
    [5 * MIB, 3 * MIB, 'data'],
  ]);
});

testReleases(
  'nbdinfo --map shows what changed since each checkpoint, in whole blocks',
  async (t, client) => {
    const { server } = await world(t, exportsOfDisk());
    t.deepEqual(await mapOf(client, uriOf(server), 'qemu:dirty-bitmap:monday'), [
      [0, MIB, 'clean'],
      [MIB, 65_536, 'dirty'],
      [MIB + 65_536, 3 * MIB - 65_536, 'clean'],
      [4 * MIB, 2 * MIB, 'dirty'],
      [6 * MIB, 2 * MIB, 'clean'],
    ]);
    t.deepEqual(await mapOf(client, uriOf(server), 'qemu:dirty-bitmap:tuesday'), [
      [0, SIZE - 65_536, 'clean'],
      [SIZE - 65_536, 65_536, 'dirty'],
    ]);
  },
);

testReleases(
  'nbdinfo --map shows a delta export: unchanged a hole that is not zero',
  async (t, client) => {
    const { server } = await world(t, exportsOfDisk());
    t.deepEqual(await mapOf(client, uriOf(server, 'sda@monday'), 'base:allocation'), [
      [0, MIB, 'hole'],
      [MIB, 65_536, 'data'],
      [MIB + 65_536, 3 * MIB - 65_536, 'hole'],
      [4 * MIB, MIB, 'hole,zero'],
      [5 * MIB, MIB, 'data'],
      [6 * MIB, 2 * MIB, 'hole'],
    ]);
  },
);

testReleases('nbdinfo of an export that does not exist fails', async (t, client) => {
  const { server } = await world(t, exportsOfDisk());
  const { code, stderr } = await client.tryRun('nbdinfo', [uriOf(server, 'none')]);
  t.not(code, 0);
  t.regex(stderr, /No such file or directory for export: none/);
});

for (const [what, address] of [
  ['IPv4', { host: '127.0.0.1', port: 0 }],
  ['IPv6', { host: '::1', port: 0 }],
  ['a unix socket', undefined],
] as const) {
  testReleases(
    `nbdcopy over ${what} with several connections copies every byte`,
    async (t, client) => {
      const { server } = await world(t, exportsOfDisk());
      if (address !== undefined) {
        await server.listen(address);
      }
      const uri = server.uris('sda').at(-1) ?? '';
      const target = join(await folder(t), 'copy');
      await client.run('nbdcopy', ['--connections=4', '--requests=64', uri, target]);
      t.true((await readFile(target)).equals(content()));
      await client.run('nbdcopy', ['--no-extents', '--request-size=2097152', uri, target]);
      t.true((await readFile(target)).equals(content()));
    },
  );
}

testReleases('nbdcopy of a delta export safely makes a full copy', async (t, client) => {
  const { server } = await world(t, exportsOfDisk());
  const target = join(await folder(t), 'copy');
  await client.run('nbdcopy', [uriOf(server, 'sda@monday'), target]);
  t.true((await readFile(target)).equals(content()));
});

testReleases('nbdcopy of a file that is served from disk', async (t, client) => {
  const home = await folder(t);
  const data = pattern(20 * MIB + 12_345);
  await writeFile(join(home, 'disk'), data);
  const source = await openFileSource(join(home, 'disk'));
  const exports = diskExports({ name: 'd', description: '', source, checkpoints: [] });
  const { server } = await world(t, exports);
  await client.run('nbdcopy', ['--connections=4', uriOf(server, 'd'), join(home, 'copy')]);
  t.true((await readFile(join(home, 'copy'))).equals(data));
  await server.close();
  await source.close();
});

testReleases('nbdcopy fails where a read fails', async (t, client) => {
  const source = new MemorySource(content());
  source.faultAt = 7 * MIB;
  const { server } = await world(t, exportsOfDisk(source));
  const { code, stderr } = await client.tryRun('nbdcopy', [uriOf(server), 'null:']);
  t.not(code, 0);
  t.regex(stderr, /Input\/output error/);
});

// ---- scripts, as the author of a backup proxy writes them

testReleases('libnbd reads with structured replies, chunk by chunk', async (t, client) => {
  const { server } = await world(t, exportsOfDisk());
  const output = await client.python(
    `
h = nbd.NBD()
h.set_export_name("sda")
h.connect_uri(sys.argv[1])
assert h.get_structured_replies_negotiated()
parts = []
def chunk(data, offset, status, error):
    parts.append((offset, len(data), status))
data = h.pread_structured(8 << 20, 0, chunk)
kinds = {nbd.READ_DATA: "data", nbd.READ_HOLE: "hole"}
print(sorted((offset, length, kinds[status]) for offset, length, status in parts))
h.shutdown()
`,
    uriOf(server),
  );
  t.is(
    output.trim(),
    "[(0, 1048576, 'data'), (1048576, 1048576, 'data'), (2097152, 3145728, 'hole'), " +
      "(5242880, 1048576, 'data'), (6291456, 1048576, 'data'), (7340032, 1048576, 'data')]",
  );
});

testReleases('libnbd reads with simple replies, and with DF', async (t, client) => {
  const { server } = await world(t, exportsOfDisk());
  const path = join(await folder(t), 'expected');
  await writeFile(path, content());
  await client.python(
    `
expected = open(sys.argv[2], "rb").read()
h = nbd.NBD()
h.set_request_structured_replies(False)
h.connect_uri(sys.argv[1])
assert not h.get_structured_replies_negotiated()
assert not h.can_df()
assert h.pread(8 << 20, 0) == expected
assert h.pread(4095, 511) == expected[511:511 + 4095]
h.shutdown()

h = nbd.NBD()
h.connect_uri(sys.argv[1])
assert h.can_df()
for length in (1, 65536, 1 << 20):
    chunks = []
    data = h.pread_structured(length, (2 << 20) - 100, lambda *a: chunks.append(a[2]), nbd.CMD_FLAG_DF)
    assert data == expected[(2 << 20) - 100:][:length], length
    assert chunks == [nbd.READ_DATA], chunks
try:
    h.pread_structured((1 << 20) + 1, 0, lambda *a: None, nbd.CMD_FLAG_DF)
    raise SystemExit("not refused")
except nbd.Error as e:
    assert e.errno == "EOVERFLOW", e.errno
h.flush()
h.shutdown()
`,
    uriOf(server),
    path,
  );
  t.pass();
});

testReleases('libnbd asks for several contexts at once', async (t, client) => {
  const { server } = await world(t, exportsOfDisk());
  const output = await client.python(
    `
import json
h = nbd.NBD()
for name in ("base:allocation", "qemu:dirty-bitmap:monday", "qemu:dirty-bitmap:tuesday"):
    h.add_meta_context(name)
h.connect_uri(sys.argv[1])
answers = {}
def extent(context, offset, entries, error):
    assert context not in answers
    answers[context] = list(zip(entries[0::2], entries[1::2]))
h.block_status(8 << 20, 0, extent)
print(json.dumps(answers))
one = {}
h.block_status((8 << 20) - 512, 512, lambda c, o, e, err: one.update({c: e}), nbd.CMD_FLAG_REQ_ONE)
print(json.dumps(one))
h.shutdown()
`,
    uriOf(server),
  );
  const [all, one] = output
    .trim()
    .split('\n')
    .map((line) => JSON.parse(line) as unknown);
  t.deepEqual(all, {
    'base:allocation': [
      [2 * MIB, 0],
      [3 * MIB, 3],
      [3 * MIB, 0],
    ],
    'qemu:dirty-bitmap:monday': [
      [MIB, 0],
      [65_536, 1],
      [3 * MIB - 65_536, 0],
      [2 * MIB, 1],
      [2 * MIB, 0],
    ],
    'qemu:dirty-bitmap:tuesday': [
      [SIZE - 65_536, 0],
      [65_536, 1],
    ],
  });
  t.deepEqual(one, {
    'base:allocation': [MIB - 512, 0],
    'qemu:dirty-bitmap:monday': [MIB - 512, 0],
    'qemu:dirty-bitmap:tuesday': [MIB - 512, 0],
  });
});

testReleases('libnbd walks a disk of 16 TiB with questions of nearly 4 GiB', async (t, client) => {
  const size = 2 ** 44;
  const block = 65_536;
  const dirty = Array.from({ length: 3000 }, (_, index) => ({
    offset: index * 5_000_000_000 + 7,
    length: 100_000,
  }));
  const source = { sizeBytes: size, read: () => Promise.resolve(), close: () => Promise.resolve() };
  const exports = diskExports({
    name: 'huge',
    description: '',
    source,
    checkpoints: [{ name: 'monday', dirty, blockSizeBytes: block }],
  });
  const { server } = await world(t, exports);
  const output = await client.python(
    `
size = 1 << 44
h = nbd.NBD()
h.add_meta_context("base:allocation")
h.add_meta_context("qemu:dirty-bitmap:monday")
h.connect_uri(sys.argv[1])
assert h.get_size() == size
offset, dirty, questions = 0, 0, 0
while offset < size:
    totals = {}
    def extent(context, at, entries, error):
        global dirty
        totals[context] = sum(entries[0::2])
        if context.startswith("qemu:"):
            dirty += sum(l for l, f in zip(entries[0::2], entries[1::2]) if f)
    h.block_status(min(size - offset, (1 << 32) - 65536), offset, extent)
    assert len(set(totals.values())) == 1, totals
    offset += totals["base:allocation"]
    questions += 1
print(dirty, questions)
h.shutdown()
`,
    uriOf(server, 'huge'),
  );
  const expected = exports[0].contexts
    .get('qemu:dirty-bitmap:monday')
    ?.countBytes((flags) => flags === 1);
  t.is(output.trim(), `${expected} 4097`);
});

testReleases(
  'libnbd is refused what a read-only export can not do, and goes on',
  async (t, client) => {
    const { server } = await world(t, exportsOfDisk());
    await client.python(
      `
h = nbd.NBD()
h.set_strict_mode(0)
h.connect_uri(sys.argv[1])
def refused(errno, call):
    try:
        call()
    except nbd.Error as e:
        assert e.errno == errno, e.errno
    else:
        raise SystemExit("not refused")
refused("EPERM", lambda: h.pwrite(b"x" * 100000, 0))
refused("EPERM", lambda: h.zero(512, 0))
refused("EPERM", lambda: h.trim(512, 0))
refused("EINVAL", lambda: h.cache(512, 0))
refused("EINVAL", lambda: h.pread(2, (8 << 20) - 1))
h.flush()
assert len(h.pread(512, 0)) == 512
h.shutdown()
`,
      uriOf(server),
    );
    t.pass();
  },
);

testReleases('libnbd in its option mode lists, asks and goes', async (t, client) => {
  const { server } = await world(t, exportsOfDisk());
  const output = await client.python(
    `
h = nbd.NBD()
h.set_opt_mode(True)
h.connect_uri(sys.argv[1])
names = []
h.opt_list(lambda name, description: names.append(name))
contexts = []
h.set_export_name("sda")
h.add_meta_context("qemu:")
h.opt_list_meta_context(lambda name: contexts.append(name))
h.opt_info()
h.set_export_name("none")
try:
    h.opt_info()
    raise SystemExit("not refused")
except nbd.Error:
    pass
h.set_export_name("sda@monday")
h.clear_meta_contexts()
h.opt_go()
print(names, contexts, h.get_size())
h.shutdown()

h = nbd.NBD()
h.set_opt_mode(True)
h.connect_uri(sys.argv[1])
h.opt_abort()
`,
    uriOf(server, ''),
  );
  t.is(
    output.trim(),
    "['sda', 'sda@monday', 'sda@tuesday'] " +
      "['qemu:dirty-bitmap:monday', 'qemu:dirty-bitmap:tuesday'] 8388608",
  );
});

testReleases('libnbd keeps 64 requests in flight on each of 4 connections', async (t, client) => {
  const { server } = await world(t, exportsOfDisk());
  const path = join(await folder(t), 'expected');
  await writeFile(path, content());
  await client.python(
    `
expected = open(sys.argv[2], "rb").read()
handles = []
for i in range(4):
    h = nbd.NBD()
    h.connect_uri(sys.argv[1])
    assert h.can_multi_conn()
    handles.append(h)
size = 8 << 20
for turn in range(4):
    pending = []
    for n, h in enumerate(handles):
        for i in range(64):
            offset = (i * 131101 + n * 517 + turn * 7) % (size - 40000)
            length = 1 + (i * 613) % 40000
            buffer = nbd.Buffer(length)
            pending.append((h, h.aio_pread(buffer, offset), buffer, offset, length))
    while any(h.aio_in_flight() for h in handles):
        for h in handles:
            if h.aio_in_flight():
                h.poll(1000)
    for h, cookie, buffer, offset, length in pending:
        assert h.aio_command_completed(cookie)
        assert buffer.to_bytearray() == expected[offset:offset + length]
for h in handles:
    h.shutdown()
`,
    uriOf(server),
    path,
  );
  t.pass();
});

testReleases('the default export is what libnbd gets that names none', async (t, client) => {
  const { server } = await world(t, [exportOf(new MemorySource(pattern(4096)), { name: 'only' })]);
  const refused = await client.tryRun('nbdinfo', ['--size', uriOf(server, '')]);
  t.not(refused.code, 0);
  server.setDefaultExport('only');
  t.is((await client.run('nbdinfo', ['--size', uriOf(server, '')])).trim(), '4096');
});
