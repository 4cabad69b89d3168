// SPDX-License-Identifier: Apache-2.0
/** Extended headers with clients that ask for them: libnbd from 1.18, QEMU from 8.2. */
import test from 'ava';
import { diskExports } from '../../nbd/export.ts';
import { ExtentMap } from '../../nbd/extents.ts';
import { exportOf, pattern, world } from '../nbd/world.ts';
import { TRIXIE } from './clients.ts';
import { serveDisk } from './serving.ts';

const MIB = 1 << 20;

test('libnbd gets 64-bit block status: one question for a disk of 64 TiB', async (t) => {
  const sizeBytes = 2 ** 46;
  const source = { sizeBytes, read: () => Promise.resolve(), close: () => Promise.resolve() };
  const exports = diskExports({
    name: 'huge',
    description: '',
    source,
    checkpoints: [
      { name: 'monday', dirty: [{ offset: 2 ** 45, length: 65_536 }], blockSizeBytes: 65_536 },
    ],
  });
  const { server } = await world(t, exports);
  const output = await TRIXIE.python(
    `
h = nbd.NBD()
h.add_meta_context("base:allocation")
h.add_meta_context("qemu:dirty-bitmap:monday")
h.connect_uri(sys.argv[1])
assert h.get_extended_headers_negotiated()
answers = {}
def extent(context, offset, entries, error):
    answers[context] = entries
h.block_status_64(h.get_size(), 0, extent)
assert answers["base:allocation"] == [(2**46, 0)], answers
assert answers["qemu:dirty-bitmap:monday"] == [
    (2**45, 0), (65536, 1), (2**45 - 65536, 0)], answers
h.shutdown()
print("ok")
`,
    server.uris('huge')[0] ?? '',
  );
  t.is(output.trim(), 'ok');
});

test('libnbd asks about some of its contexts only: BLOCK_STATUS_PAYLOAD', async (t) => {
  const map = ExtentMap.uniform(MIB, 0);
  const source = { sizeBytes: MIB, read: () => Promise.resolve(), close: () => Promise.resolve() };
  const contexts: [string, ExtentMap][] = [
    ['qemu:dirty-bitmap:monday', map],
    ['qemu:dirty-bitmap:tuesday', map],
  ];
  const { server } = await world(t, [exportOf(source, { contexts })]);
  const output = await TRIXIE.python(
    `
h = nbd.NBD()
for name in ["base:allocation", "qemu:dirty-bitmap:monday", "qemu:dirty-bitmap:tuesday"]:
    h.add_meta_context(name)
h.connect_uri(sys.argv[1])
assert h.can_block_status_payload()
asked = []
def extent(context, offset, entries, error):
    assert entries == [(4096, 0)], entries
    asked.append(context)
h.block_status_filter(4096, 512, ["qemu:dirty-bitmap:tuesday"], extent)
assert asked == ["qemu:dirty-bitmap:tuesday"], asked
h.block_status_filter(4096, 512, ["base:allocation", "qemu:dirty-bitmap:monday"], extent)
assert sorted(asked[1:]) == ["base:allocation", "qemu:dirty-bitmap:monday"], asked
h.shutdown()
print("ok")
`,
    server.uris('disk')[0] ?? '',
  );
  t.is(output.trim(), 'ok');
});

test('libnbd falls back to structured and simple replies when it is told to', async (t) => {
  const disk = await serveDisk(t, {
    sizeBytes: MIB,
    data: [{ offset: 0, length: 4096, bytes: pattern(4096) }],
  });
  const output = await TRIXIE.python(
    `
data = set()
for extended, structured in [(True, True), (True, False), (False, True), (False, False)]:
    h = nbd.NBD()
    h.set_request_extended_headers(extended)
    h.set_request_structured_replies(structured)
    h.connect_uri(sys.argv[1])
    assert h.get_extended_headers_negotiated() == (extended and structured)
    assert h.get_structured_replies_negotiated() == structured
    data.add(bytes(h.pread(65536, 0)))
    try:
        h.pread(512, 1 << 20)
        raise SystemExit("read beyond the end")
    except nbd.Error:
        pass
    h.shutdown()
assert len(data) == 1
print("ok")
`,
    disk.uris().tcp,
  );
  t.is(output.trim(), 'ok');
});

test('qemu-img and nbdcopy copy over extended headers', async (t) => {
  const bytes = pattern(MIB);
  const sizeBytes = 5 * 2 ** 30;
  const disk = await serveDisk(t, {
    sizeBytes,
    data: [
      { offset: 0, length: MIB, bytes },
      { offset: sizeBytes - MIB, length: MIB, bytes },
    ],
  });
  const { unix, tcp } = disk.uris();
  await TRIXIE.run('qemu-img', ['convert', '-O', 'raw', unix, 'copy.img'], disk.home);
  await TRIXIE.run(
    'qemu-img',
    ['compare', '-f', 'raw', '-F', 'raw', 'copy.img', disk.disk],
    disk.home,
  );
  await TRIXIE.run('nbdcopy', [tcp, 'copy2.img'], disk.home);
  await TRIXIE.run(
    'qemu-img',
    ['compare', '-f', 'raw', '-F', 'raw', 'copy2.img', disk.disk],
    disk.home,
  );
  const modes = disk.log.lines.flatMap(({ message, fields }) =>
    message === 'client is served' && 'headers' in fields ? [fields.headers] : [],
  );
  t.true(modes.length >= 2);
  t.true(
    modes.every((mode) => mode === 'extended'),
    JSON.stringify(modes),
  );
});
