// SPDX-License-Identifier: Apache-2.0
/** Exports that come, go and fail; addresses; the end of the server. */
import { once } from 'node:events';
import { access, lstat, mkdir, symlink, writeFile } from 'node:fs/promises';
import { createServer } from 'node:net';
import { join } from 'node:path';
import test from 'ava';
import { diskExports, openFileSource } from '../../nbd/export.ts';
import { ExtentMap } from '../../nbd/extents.ts';
import { NbdServer } from '../../nbd/server.ts';
import {
  CHUNK,
  CMD,
  dataOf,
  ERR,
  exportOf,
  folder,
  infoData,
  KeptLog,
  MemorySource,
  metaData,
  OPT,
  pattern,
  RawClient,
  REP,
  request,
  settled,
  soon,
  statusOf,
  world,
} from './world.ts';

const SIZE = 65_536;

function newServer(): NbdServer {
  return new NbdServer({ logger: new KeptLog() });
}

// ---- exports

test('exports that can not be served are refused', (t) => {
  const server = newServer();
  const source = new MemorySource(pattern(SIZE));
  server.addExport(exportOf(source));
  for (const bad of [
    exportOf(source),
    exportOf(source, { name: 'n'.repeat(4097) }),
    exportOf(source, { name: 'lone \ud800 surrogate' }),
    exportOf(source, { name: 'x', description: 'd'.repeat(4097) }),
    exportOf(source, { name: 'x', allocation: ExtentMap.uniform(SIZE - 1, 0) }),
    exportOf(source, { name: 'x', contexts: [['c'.repeat(4097), ExtentMap.uniform(SIZE, 0)]] }),
  ]) {
    t.throws(() => server.addExport(bad), { instanceOf: RangeError });
  }
});

test('the empty name means the default export, unless one is named so', async (t) => {
  const source = new MemorySource(pattern(SIZE));
  const { server, connect } = await world(t, [exportOf(source)]);
  const nameOf = async (): Promise<string | undefined> => {
    const raw = await connect();
    await raw.open();
    const replies = await raw.haggle(OPT.info, infoData('', 1));
    return replies[1]?.data.subarray(2).toString();
  };
  t.is(await nameOf(), undefined);
  server.setDefaultExport('disk');
  t.is(await nameOf(), 'disk');
  const raw = await connect();
  await raw.go('', { contexts: ['base:allocation'] });
  t.is((await raw.ask({ type: CMD.blockStatus, length: 1 }))[0]?.type, CHUNK.status);
  server.addExport(exportOf(source, { name: '' }));
  t.is(await nameOf(), '');
});

test('an export that is removed answers what is in flight, then its clients end, others stay', async (t) => {
  const source = new MemorySource(pattern(SIZE));
  const exports = [exportOf(source), exportOf(source, { name: 'other' })];
  const { server, connect } = await world(t, exports);
  const leaving = await connect();
  await leaving.go();
  const staying = await connect();
  await staying.go('other');
  source.hold();
  leaving.send(request({ type: CMD.read, length: 4096 }));
  await source.waitHeld(1);
  let removed = false;
  const removal = server.removeExport('disk').then(() => {
    removed = true;
  });
  await staying.expectInStep();
  t.false(removed, 'its source is still being read');
  source.release();
  t.deepEqual(dataOf(await leaving.reply(), 0, 4096), source.data.subarray(0, 4096));
  t.is((await leaving.readToEnd()).length, 0);
  await soon('the removal', removal);
  await staying.expectInStep();
  const late = await connect();
  await late.open();
  t.is((await late.haggle(OPT.go, infoData('disk')))[0]?.type, REP.errUnknown);
  await soon('removing nothing', server.removeExport('disk'));
});

test('a client that fetches no replies can not hold up a removal', async (t) => {
  const source = new MemorySource(pattern(16 << 20));
  const { server, connect } = await world(t, [exportOf(source)], { drainMs: 50 });
  const raw = await connect();
  await raw.go();
  raw.socket.pause();
  raw.send(...Array.from({ length: 8 }, () => request({ type: CMD.read, length: 16 << 20 })));
  const other = await connect();
  await other.go();
  await other.expectInStep();
  await soon('the removal', server.removeExport('disk'));
  t.deepEqual(server.usage, { handshakes: 0, connections: 0, bytesInFlight: 0 });
});

test('a failed export answers EIO to all, also to what it is reading, and to holes', async (t) => {
  const allocation = ExtentMap.fromRanges(SIZE, [{ offset: 0, length: 4096 }], 3, 0);
  const source = new MemorySource(pattern(SIZE));
  const exports = [exportOf(source, { allocation }), exportOf(source, { name: 'other' })];
  const { server, connect, log } = await world(t, exports);
  const raw = await connect();
  await raw.go('disk', { contexts: ['base:allocation'] });
  const simple = await connect();
  await simple.go('disk', { structured: false });
  source.hold();
  raw.send(request({ type: CMD.read, offset: 8192, length: 512 }));
  await source.waitHeld(1);
  server.failExports(['disk', 'none']);
  source.release();
  t.is((await raw.reply())[0]?.payload.readUInt32BE(0), ERR.io);
  t.is(await raw.askError({ type: CMD.read, length: 4096 }), ERR.io, 'a hole');
  t.is(await raw.askError({ type: CMD.read, offset: 8192, length: 1 }), ERR.io);
  t.is(await raw.askError({ type: CMD.blockStatus, length: 1 }), ERR.io);
  simple.send(request({ type: CMD.read, length: 1 }));
  t.is((await simple.simpleReply()).error, ERR.io);
  const other = await connect();
  await other.go('other');
  t.is((await other.ask({ type: CMD.read, length: 1 }))[0]?.type, CHUNK.data);
  server.failExports();
  t.is(await other.askError({ type: CMD.read, length: 1 }), ERR.io);
  t.is(log.lines.filter(({ message }) => message === 'export has failed').length, 3);
});

test('a checkpoint makes a context and a delta export, dirty rounded outward', async (t) => {
  const source = new MemorySource(pattern(SIZE));
  const exports = diskExports({
    name: 'sda',
    description: 'a disk',
    source,
    allocation: ExtentMap.fromRanges(SIZE, [{ offset: 4096, length: 8192 }], 3, 0),
    checkpoints: [
      { name: 'monday', dirty: [{ offset: 8000, length: 300 }], blockSizeBytes: 4096 },
      { name: 'tuesday', dirty: [] },
    ],
  });
  t.deepEqual(
    exports.map(({ name }) => name),
    ['sda', 'sda@monday', 'sda@tuesday'],
  );
  const { connect } = await world(t, exports);
  const image = await connect();
  await image.go('sda', { contexts: ['base:allocation', 'qemu:dirty-bitmap:monday'] });
  const whole = { type: CMD.blockStatus, length: SIZE };
  const status = statusOf(await image.ask(whole));
  t.deepEqual(status.get(1), [
    { length: 4096, flags: 0 },
    { length: 8192, flags: 1 },
    { length: SIZE - 12_288, flags: 0 },
  ]);
  const contextsOf = async (name: string): Promise<string[]> => {
    const raw = await connect();
    await raw.open();
    const replies = await raw.expectAck(OPT.listMetaContext, metaData(name));
    return replies.slice(0, -1).map(({ data }) => data.subarray(4).toString());
  };
  t.deepEqual(await contextsOf('sda'), [
    'base:allocation',
    'qemu:dirty-bitmap:monday',
    'qemu:dirty-bitmap:tuesday',
  ]);
  t.deepEqual(await contextsOf('sda@monday'), ['base:allocation']);

  const monday = await connect();
  await monday.go('sda@monday', { contexts: ['base:allocation'] });
  t.deepEqual(statusOf(await monday.ask(whole)).get(0), [
    { length: 4096, flags: 1 },
    { length: 8192, flags: 3 },
    { length: SIZE - 12_288, flags: 1 },
  ]);
  // Unchanged is no zero: the whole image's data is there.
  const chunks = await monday.ask({ type: CMD.read, offset: 12_288, length: SIZE - 12_288 });
  t.true(dataOf(chunks, 12_288, SIZE - 12_288).equals(source.data.subarray(12_288)));
  const tuesday = await connect();
  await tuesday.go('sda@tuesday', { contexts: ['base:allocation'] });
  t.deepEqual(statusOf(await tuesday.ask(whole)).get(0), [{ length: SIZE, flags: 1 }]);
});

// ---- files

test('a plain file is a source; it fails where it is cut short, and after close', async (t) => {
  const path = join(await folder(t), 'file');
  const data = pattern(10_000);
  await writeFile(path, data);
  const source = await openFileSource(path);
  t.is(source.sizeBytes, 10_000);
  const buffer = Buffer.alloc(5000);
  await source.read(buffer, 4000);
  t.deepEqual(buffer, data.subarray(4000, 9000));
  await writeFile(path, data.subarray(0, 6000));
  await t.throwsAsync(source.read(buffer, 4000), { code: 'EIO' });
  const reads = Promise.all(Array.from({ length: 50 }, () => source.read(Buffer.alloc(100), 0)));
  const closing = source.close();
  await soon('the reads', reads);
  await soon('the close', closing);
  await soon('a second close', source.close());
  await t.throwsAsync(source.read(buffer, 0), { code: 'EBADF' });
});

test('what is no file and no block device is refused, and a FIFO is not waited for', async (t) => {
  const home = await folder(t);
  await t.throwsAsync(soon('a folder', openFileSource(home)), { code: 'EINVAL' });
  await t.throwsAsync(soon('a device', openFileSource('/dev/null')), { code: 'EINVAL' });
  await t.throwsAsync(openFileSource(join(home, 'none')), { code: 'ENOENT' });
  const { execFileSync } = await import('node:child_process');
  execFileSync('mkfifo', [join(home, 'fifo')]);
  await t.throwsAsync(soon('a FIFO', openFileSource(join(home, 'fifo'))), { code: 'EINVAL' });
});

test('an empty export is served', async (t) => {
  const { connect } = await world(t, [exportOf(new MemorySource(Buffer.alloc(0)))]);
  const raw = await connect();
  await raw.go('disk', { contexts: ['base:allocation'] });
  t.is((await raw.ask({ type: CMD.read, length: 0 }))[0]?.type, CHUNK.none);
  t.is(await raw.askError({ type: CMD.read, length: 1 }), ERR.inval);
  t.is(await raw.askError({ type: CMD.blockStatus, length: 0 }), ERR.inval);
});

// ---- addresses

test('TCP on IPv4 and IPv6, both at one port, and a unix socket, at a time', async (t) => {
  const server = newServer();
  t.teardown(() => server.close());
  server.addExport(exportOf(new MemorySource(pattern(SIZE))));
  const four = await server.listen({ host: '127.0.0.1', port: 0 });
  t.true('port' in four && four.port > 0);
  const port = 'port' in four ? four.port : 0;
  const six = await server.listen({ host: '::1', port });
  const path = join(await folder(t), 's');
  const unix = await server.listen({ path });
  t.deepEqual(unix, { path });
  for (const address of [four, six, unix]) {
    const raw = await RawClient.connect(address);
    t.teardown(() => raw.destroy());
    await raw.go();
    await raw.expectInStep();
  }
  t.deepEqual(server.uris('disk'), [
    `nbd://127.0.0.1:${port}/disk`,
    `nbd://[::1]:${port}/disk`,
    `nbd+unix:///disk?socket=${path}`,
  ]);
});

test('both wildcards stand side by side, and their URIs name addresses of the machine', async (t) => {
  const server = newServer();
  t.teardown(() => server.close());
  const four = await server.listen({ host: '0.0.0.0', port: 0 }, { insecure: true });
  const port = 'port' in four ? four.port : 0;
  await server.listen({ host: '::', port }, { insecure: true });
  const uris = server.uris('x');
  t.true(uris.length >= 2);
  t.true(uris.every((uri) => uri.endsWith(`:${port}/x`) && !uri.includes('0.0.0.0')));
  t.true(uris.every((uri) => !uri.includes('[::]')));
});

test('names in URIs are percent-encoded, @ and : stay as they are', async (t) => {
  const server = newServer();
  t.teardown(() => server.close());
  const path = join(await folder(t), 'so cket?&ü');
  await server.listen({ path });
  t.deepEqual(server.uris("sda@mon:day/a b?#%'ü"), [
    `nbd+unix:///sda@mon:day%2Fa%20b%3F%23%25%27%C3%BC?socket=${path
      .replace(' ', '%20')
      .replace('?', '%3F')
      .replace('&', '%26')
      .replace('ü', '%C3%BC')}`,
  ]);
});

test('a port in use is an error with its cause', async (t) => {
  const first = newServer();
  t.teardown(() => first.close());
  const address = await first.listen({ host: '127.0.0.1', port: 0 });
  const second = newServer();
  const error = await t.throwsAsync(second.listen(address), { code: 'EADDRINUSE' });
  t.truthy(error?.cause);
  await soon('the close of what never listened', second.close());
});

test('an address that is not ours is an error', async (t) => {
  const server = newServer();
  await t.throwsAsync(server.listen({ host: '192.0.2.1', port: 0 }), { code: 'EADDRNOTAVAIL' });
});

test('a unix socket that somebody listens on is refused and goes on working', async (t) => {
  const { path, connect } = await world(t, [exportOf(new MemorySource(pattern(SIZE)))]);
  await t.throwsAsync(newServer().listen({ path }), { code: 'EADDRINUSE' });
  const raw = await connect();
  await raw.go();
  await raw.expectInStep();
});

test('a unix socket that nobody listens on is replaced', async (t) => {
  const path = join(await folder(t), 's');
  // Left behind as by a process that was killed: bound, and listened on no more.
  const { execFileSync } = await import('node:child_process');
  const script = 'import socket,sys; socket.socket(socket.AF_UNIX).bind(sys.argv[1])';
  execFileSync('/usr/bin/python3', ['-c', script, path]);
  t.true((await lstat(path)).isSocket());
  const server = newServer();
  server.addExport(exportOf(new MemorySource(pattern(SIZE))));
  await server.listen({ path });
  t.teardown(() => server.close());
  const raw = await RawClient.connect({ path });
  t.teardown(() => raw.destroy());
  await raw.go();
  await raw.expectInStep();
});

test('a file that is no socket is never replaced', async (t) => {
  const home = await folder(t);
  const path = join(home, 'file');
  await writeFile(path, 'precious');
  await t.throwsAsync(newServer().listen({ path }), { code: 'EEXIST' });
  await symlink(path, join(home, 'link'));
  await t.throwsAsync(newServer().listen({ path: join(home, 'link') }), { code: 'EEXIST' });
  await mkdir(join(home, 'folder'));
  await t.throwsAsync(newServer().listen({ path: join(home, 'folder') }), { code: 'EEXIST' });
  await access(path);
});

test('a socket path that is too long, or in a folder that does not exist, is an error', async (t) => {
  const home = await folder(t);
  await t.throwsAsync(newServer().listen({ path: join(home, 's'.repeat(108)) }), {
    code: 'ENAMETOOLONG',
  });
  await t.throwsAsync(newServer().listen({ path: join(home, 'none', 's') }), { code: 'ENOENT' });
});

test('close removes the unix socket, ends clients and handshakes, and can be repeated', async (t) => {
  const source = new MemorySource(pattern(SIZE));
  const { server, path, connect } = await world(t, [exportOf(source)]);
  const served = await connect();
  await served.go();
  source.hold();
  served.send(request({ type: CMD.read, length: 512 }));
  await source.waitHeld(1);
  const shaking = await connect();
  await shaking.open();
  const closing = server.close();
  t.is((await shaking.readToEnd()).length, 0);
  source.release();
  t.deepEqual(dataOf(await served.reply(), 0, 512), source.data.subarray(0, 512));
  t.is((await served.readToEnd()).length, 0);
  await soon('the close', closing);
  await soon('another close', server.close());
  await t.throwsAsync(access(path), { code: 'ENOENT' });
  await t.throwsAsync(server.listen({ path }), { code: 'ECANCELED' });
  await t.throwsAsync(access(path), { code: 'ENOENT' });
});

test('close waits for reads of clients that are gone', async (t) => {
  const source = new MemorySource(pattern(SIZE));
  const where = await world(t, [exportOf(source)]);
  const { server, connect, log } = where;
  const raw = await connect();
  await raw.go();
  source.hold();
  raw.send(request({ type: CMD.read, length: 512 }));
  await source.waitHeld(1);
  raw.destroy();
  await settled(where);
  let closed = false;
  const closing = server.close().then(() => {
    closed = true;
  });
  const gone = async (): Promise<void> => {
    while (server.usage.connections + server.usage.handshakes > 0) {
      await new Promise((resolve) => setImmediate(resolve));
    }
  };
  await soon('all connections to be gone', gone());
  // All that is left to wait for is the read; whatever else close does takes a few turns.
  for (let turn = 0; turn < 50; turn += 1) {
    await new Promise((resolve) => setImmediate(resolve));
  }
  t.false(closed);
  source.release();
  await soon('the close', closing);
  t.is(server.usage.bytesInFlight, 0);
  t.false(log.lines.some(({ level }) => level === 'error'));
});

test('each option is answered in one segment', async (t) => {
  const source = new MemorySource(pattern(SIZE));
  const exports = Array.from({ length: 20 }, (_, index) => exportOf(source, { name: `d${index}` }));
  const { connect } = await world(t, exports);
  const raw = await connect();
  await raw.open();
  const segments: number[] = [];
  raw.socket.on('data', (chunk) => segments.push(chunk.length));
  const replies = await raw.expectAck(OPT.list);
  t.is(replies.length, 21);
  t.is(segments.length, 1);
});

test('a server of something else at the path is left alone', async (t) => {
  const path = join(await folder(t), 's');
  const stranger = createServer((socket) => socket.destroy());
  stranger.listen(path);
  await once(stranger, 'listening');
  t.teardown(() => stranger.close());
  await t.throwsAsync(newServer().listen({ path }), { code: 'EADDRINUSE' });
  t.true((await lstat(path)).isSocket());
});
