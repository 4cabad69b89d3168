// SPDX-License-Identifier: Apache-2.0
/**
 * The native engine against the TypeScript one: what both are asked they must answer with the
 * same bytes, whatever it is, however it is cut, in plain text or within TLS. Replies may come in
 * another order.
 */
import { readFileSync } from 'node:fs';
import { truncate, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import test, { type ExecutionContext } from 'ava';
import fc from 'fast-check';
import type { SocketEngineFactory } from '../../nbd/engine.ts';
import { diskExports, type Export, openFileSource } from '../../nbd/export.ts';
import { ExtentMap } from '../../nbd/extents.ts';
import { NodeTls, type TlsAcceptor, type TlsCredentials } from '../../nbd/tls.ts';
import type { HeaderStyle } from '../../nbd/wire.ts';
import { nativeEngine } from '../../src/engine.ts';
import { nativeTls } from '../../src/native-tls.ts';
import { Authority, credentialsOf, SERVER } from '../nbd/certificates.ts';
import {
  be,
  CMD,
  ERR,
  extendedRequest,
  folder,
  infoData,
  metaData,
  OPT,
  pattern,
  RawClient,
  request,
  soon,
  type World,
  world,
} from '../nbd/world.ts';

const MIB = 1 << 20;
const SIZE = 5 * MIB + 777;
/** From here on the file has been cut off: reads fail. */
const CUT = 4 * MIB + 100_000;
const HOLES = [
  { offset: MIB, length: 512 * 1024 },
  { offset: 2 * MIB + 512, length: 65_536 },
  { offset: 3 * MIB, length: 4096 },
];
const DIRTY = Array.from({ length: 40 }, (_, index) => ({ offset: index * 100_000, length: 700 }));
const CONTEXTS = ['base:allocation', 'qemu:dirty-bitmap:monday'];

interface Kind {
  readonly engine: SocketEngineFactory | undefined;
  readonly tls: (credentials: TlsCredentials) => TlsAcceptor;
}

const nodeTls = (credentials: TlsCredentials): TlsAcceptor => new NodeTls(credentials);
const made = await nativeTls();
const addonTls = (credentials: TlsCredentials): TlsAcceptor => {
  const acceptor = made?.(credentials);
  if (acceptor === undefined) {
    throw new Error('the addon has no TLS');
  }
  return acceptor;
};

const ENGINES: Record<string, Kind> = {
  typescript: { engine: undefined, tls: nodeTls },
  native: { engine: nativeEngine(), tls: addonTls },
  'native without io_uring': { engine: nativeEngine({ ring: false }), tls: addonTls },
};

const ENGINES_NATIVE = { engine: nativeEngine() };

interface Rival {
  readonly name: string;
  readonly where: World;
  readonly port: number;
  /** The authority that a client of TLS must believe. */
  readonly ca: Buffer;
}

async function makeFile(t: ExecutionContext): Promise<string> {
  const path = join(await folder(t), 'disk');
  const data = pattern(SIZE);
  for (const { offset, length } of HOLES) {
    data.fill(0, offset, offset + length);
  }
  await writeFile(path, data);
  return path;
}

async function exportsOf(t: ExecutionContext, path: string): Promise<[Export, ...Export[]]> {
  const source = await openFileSource(path);
  t.teardown(() => source.close());
  return diskExports({
    name: 'disk',
    description: '',
    source,
    allocation: ExtentMap.fromRanges(source.sizeBytes, HOLES, 3, 0, 512),
    checkpoints: [{ name: 'monday', dirty: DIRTY }],
  });
}

async function rivals(t: ExecutionContext, cut = false): Promise<Rival[]> {
  const path = await makeFile(t);
  const authority = await Authority.make(join(await folder(t), 'ca'));
  const credentials = credentialsOf(await authority.issue(SERVER));
  const ca = readFileSync(authority.certificate);
  const made: Rival[] = [];
  for (const [name, { engine, tls }] of Object.entries(ENGINES)) {
    const security = { tls: tls(credentials), mode: 'on' } as const;
    const where = await world(t, await exportsOf(t, path), {}, { engine, security });
    const listening = await where.server.listen({ host: '127.0.0.1', port: 0 });
    made.push({ name, where, port: 'port' in listening ? listening.port : 0, ca });
  }
  if (cut) {
    await truncate(path, CUT);
  }
  return made;
}

async function negotiate(raw: RawClient, headers: HeaderStyle, contexts: string[]): Promise<void> {
  await raw.open();
  await agree(raw, headers, contexts);
}

/** What comes behind the greeting, or behind TLS. */
async function agree(raw: RawClient, headers: HeaderStyle, contexts: string[]): Promise<void> {
  if (headers !== 'simple') {
    await raw.expectAck(headers === 'extended' ? OPT.extendedHeaders : OPT.structuredReply);
    await raw.expectAck(OPT.setMetaContext, metaData('disk', ...contexts));
  }
  await raw.expectAck(OPT.go, infoData('disk'));
}

interface Asked {
  readonly type: number;
  readonly flags: number;
  readonly offset: bigint;
  readonly length: bigint;
  readonly payload: Buffer;
  /** Breaks the framing, or may. */
  readonly wild: boolean;
}

function bytesOf(asked: Asked, cookie: number, headers: HeaderStyle): Buffer {
  const { type, flags, offset, length, payload } = asked;
  const message = { type, flags, cookie: BigInt(cookie), offset };
  return Buffer.concat([
    headers === 'extended'
      ? extendedRequest({ ...message, length })
      : request({ ...message, length: Number(length & 0xffff_ffffn) }),
    payload,
  ]);
}

/** What came back, by cookie: all replies to it, whole, in their order. */
function repliesOf(
  bytes: Buffer,
  asked: readonly Asked[],
  headers: HeaderStyle,
): Map<string, Buffer[]> {
  const replies = new Map<string, Buffer[]>();
  for (let at = 0; at < bytes.length; ) {
    const cookie = bytes.readBigUInt64BE(at + 8);
    let size = 16;
    if (headers === 'simple') {
      const { type, length } = asked[Number(cookie)] ?? { type: -1, length: 0n };
      const hasData = type === CMD.read && bytes.readUInt32BE(at + 4) === 0;
      size += hasData ? Number(length & 0xffff_ffffn) : 0;
    } else {
      size =
        headers === 'extended'
          ? 32 + Number(bytes.readBigUInt64BE(at + 24))
          : 20 + bytes.readUInt32BE(at + 16);
    }
    const key = String(cookie);
    replies.set(key, [...(replies.get(key) ?? []), bytes.subarray(at, at + size)]);
    at += size;
  }
  return replies;
}

const offsets = fc.oneof(
  { weight: 8, arbitrary: fc.bigInt(0n, BigInt(SIZE)) },
  {
    weight: 4,
    arbitrary: fc.constantFrom(
      ...[0, MIB, 2 * MIB, 3 * MIB, CUT - 512, SIZE - 1, SIZE].map(BigInt),
    ),
  },
  { weight: 1, arbitrary: fc.bigInt(0n, 2n ** 64n - 1n) },
);
const lengths = fc.oneof(
  { weight: 8, arbitrary: fc.bigInt(0n, 20_000n) },
  { weight: 4, arbitrary: fc.bigInt(0n, 300_000n) },
  { weight: 2, arbitrary: fc.bigInt(0n, BigInt(SIZE)) },
  {
    weight: 1,
    arbitrary: fc.constantFrom(0n, 2n ** 25n, 2n ** 25n + 1n, 2n ** 32n - 1n, 2n ** 63n),
  },
);
const types = fc.oneof(
  { weight: 12, arbitrary: fc.constant(CMD.read) },
  { weight: 6, arbitrary: fc.constant(CMD.blockStatus) },
  { weight: 4, arbitrary: fc.constantFrom(CMD.flush, CMD.trim, CMD.cache, CMD.writeZeroes) },
  { weight: 2, arbitrary: fc.constant(CMD.write) },
  { weight: 1, arbitrary: fc.integer({ min: 0, max: 65_535 }) },
);
const flags = fc.oneof(
  { weight: 8, arbitrary: fc.constant(0) },
  { weight: 4, arbitrary: fc.constantFrom(1, 4, 8, 0x20, 9) },
  { weight: 1, arbitrary: fc.integer({ min: 0, max: 65_535 }) },
);
/** Ids of contexts with an effect length in front, right or wrong. */
const statusPayloads = fc
  .tuple(lengths, fc.array(fc.integer({ min: 0, max: 2 }), { maxLength: 3 }), fc.nat({ max: 3 }))
  .map(([length, ids, cut]) => {
    const whole = be([64, length], ...ids.map((id) => [32, id] as const));
    return whole.subarray(0, whole.length - cut);
  });

function calm(headers: HeaderStyle): fc.Arbitrary<Asked> {
  return fc
    .record({ type: types, flags, offset: offsets, length: lengths, status: statusPayloads })
    .map(({ status, ...asked }) => {
      const isWrite = asked.type === CMD.write;
      const announced = headers === 'extended' && ((asked.flags & 0x20) !== 0 || isWrite);
      if (announced || isWrite) {
        // Its payload really follows.
        const payload = isWrite ? Buffer.alloc(Number(asked.length % 9000n), 0x25) : status;
        return { ...asked, length: BigInt(payload.length), payload, wild: false };
      }
      return {
        ...asked,
        type: asked.type === CMD.disc ? CMD.flush : asked.type,
        payload: Buffer.alloc(0),
        wild: false,
      };
    });
}

const wild: fc.Arbitrary<Asked> = fc
  .record({
    type: types,
    flags,
    offset: offsets,
    length: lengths,
    payload: fc.uint8Array({ maxLength: 40 }).map((bytes) => Buffer.from(bytes)),
  })
  .map((asked) => ({ ...asked, wild: true }));

const streams = fc.constantFrom<HeaderStyle>('simple', 'structured', 'extended').chain((headers) =>
  fc.record({
    headers: fc.constant(headers),
    contexts: fc.subarray(CONTEXTS, { minLength: 1 }),
    asked: fc.oneof(
      { weight: 5, arbitrary: fc.array(calm(headers), { minLength: 1, maxLength: 200 }) },
      {
        weight: 2,
        arbitrary: fc.array(
          fc.oneof({ weight: 9, arbitrary: calm(headers) }, { weight: 1, arbitrary: wild }),
          { minLength: 1, maxLength: 30 },
        ),
      },
    ),
    cuts: fc.array(fc.nat({ max: 4000 }), { maxLength: 12 }),
    leaving: fc.constantFrom('disconnect', 'end'),
    transport: fc.constantFrom('unix', 'tcp', 'tls'),
  }),
);

type Stream = typeof streams extends fc.Arbitrary<infer T> ? T : never;

/** Plays a stream to a server and returns all that it says until it closes. */
async function play({ where, port, ca }: Rival, stream: Stream): Promise<Buffer> {
  const plain =
    stream.transport === 'unix'
      ? await where.connect()
      : await RawClient.connect({ host: '127.0.0.1', port });
  plain.socket.setNoDelay(true);
  const raw = stream.transport === 'tls' ? await plain.openTls({ ca }) : plain;
  if (raw === plain) {
    await raw.open();
  }
  await agree(raw, stream.headers, stream.contexts);
  const parts = stream.asked.map((asked, index) => bytesOf(asked, index, stream.headers));
  if (stream.leaving === 'disconnect') {
    const length = 0n;
    const disc = {
      type: CMD.disc,
      flags: 0,
      offset: 0n,
      length,
      payload: Buffer.alloc(0),
      wild: false,
    };
    parts.push(bytesOf(disc, parts.length, stream.headers));
  }
  const bytes = Buffer.concat(parts);
  let at = 0;
  for (const cut of stream.cuts) {
    raw.send(bytes.subarray(at, at + cut));
    at = Math.min(at + cut, bytes.length);
    await new Promise((resolve) => setImmediate(resolve));
  }
  raw.send(bytes.subarray(at));
  // A wild request may have swallowed the disconnect.
  if (stream.leaving === 'end' || stream.asked.some((asked) => asked.wild)) {
    raw.socket.end();
  }
  const said = await raw.readToEnd();
  raw.destroy();
  return said;
}

function isPrefix(short: readonly Buffer[], long: readonly Buffer[]): boolean {
  return short.every((chunk, index) => {
    const other = long[index];
    const length = Math.min(chunk.length, other?.length ?? 0);
    return length > 0 && other?.subarray(0, length).equals(chunk.subarray(0, length)) === true;
  });
}

/** Whether two sets of replies agree as far as both go. */
function isSame(a: Map<string, Buffer[]>, b: Map<string, Buffer[]>): boolean {
  return [...a].every(([cookie, chunks]) => {
    const others = b.get(cookie) ?? [];
    return chunks.length < others.length ? isPrefix(chunks, others) : isPrefix(others, chunks);
  });
}

for (const cut of [false, true]) {
  test(`both engines say the same${cut ? ' of a file that was cut off' : ''}`, async (t) => {
    t.timeout(10 * 60_000);
    const [first, ...others] = await rivals(t, cut);
    if (first === undefined) {
      throw new Error('nobody to compare');
    }
    let whole = 0;
    await fc.assert(
      fc.asyncProperty(streams, async (stream) => {
        // A simple reply that fails behind its first piece can only end the connection.
        const isCalm = stream.asked.every(
          ({ wild, type, offset, length }) =>
            !wild &&
            (!cut ||
              stream.headers !== 'simple' ||
              type !== CMD.read ||
              length <= BigInt(MIB) ||
              offset + length <= BigInt(CUT)),
        );
        const said = await play(first, stream);
        for (const other of others) {
          const rival = await play(other, stream);
          if (!isCalm) {
            // The connection may have ended by force, with replies on their way.
            t.true(
              said.length === 0 ||
                rival.length === 0 ||
                isSame(
                  repliesOf(said, stream.asked, stream.headers),
                  repliesOf(rival, stream.asked, stream.headers),
                ),
              other.name,
            );
            continue;
          }
          const expected = repliesOf(said, stream.asked, stream.headers);
          const actual = repliesOf(rival, stream.asked, stream.headers);
          const keys = (replies: Map<string, Buffer[]>): string[] => [...replies.keys()].toSorted();
          if (JSON.stringify(keys(actual)) !== JSON.stringify(keys(expected))) {
            throw new Error(`${other.name} answers ${keys(actual)}, not ${keys(expected)}`);
          }
          for (const [cookie, chunks] of expected) {
            const theirs = actual.get(cookie) ?? [];
            if (!Buffer.concat(chunks).equals(Buffer.concat(theirs))) {
              const show = (all: Buffer[]): string =>
                all.map((chunk) => `${chunk.length}:${chunk.toString('hex', 0, 60)}`).join(' ');
              throw new Error(`${other.name}, ${cookie}: ${show(theirs)}, not ${show(chunks)}`);
            }
          }
          whole += expected.size;
        }
      }),
      // Each failure may be a wait of many seconds: they are not repeated for a smaller one.
      { numRuns: 120, endOnFailure: true },
    );
    // It has been about something.
    t.true(whole > 500, `${whole} replies compared`);
  });
}

test('a client that fetches nothing does not keep an export from going', async (t) => {
  const path = await makeFile(t);
  const [image] = await exportsOf(t, path);
  const { server, connect, log } = await world(t, [image], { drainMs: 100 }, ENGINES_NATIVE);
  const lazy = await connect();
  await negotiate(lazy, 'structured', CONTEXTS);
  lazy.socket.pause();
  const asks = Array.from({ length: 100 }, (_, index) =>
    request({ type: CMD.read, cookie: BigInt(index), length: 4 * MIB }),
  );
  lazy.send(...asks);
  const witness = await connect();
  await witness.go();
  await witness.expectInStep();
  await soon('the export to go', server.removeExport('disk'));
  t.true(log.lines.some(({ level }) => level === 'warn'));
  t.is(server.usage.bytesInFlight, 0);
  t.is(server.usage.connections, 0);
});

test('a failed export says EIO on connections that are there and on new ones', async (t) => {
  const path = await makeFile(t);
  const { server, connect } = await world(t, [(await exportsOf(t, path))[0]], {}, ENGINES_NATIVE);
  const early = await connect();
  await negotiate(early, 'structured', CONTEXTS);
  t.is((await early.ask({ type: CMD.read, length: 512 })).length, 1);
  server.failExports();
  const late = await connect();
  await negotiate(late, 'structured', CONTEXTS);
  for (const raw of [early, late]) {
    t.is(await raw.askError({ type: CMD.read, length: 512 }), ERR.io);
    t.is(await raw.askError({ type: CMD.read, offset: MIB, length: 65_536 }), ERR.io);
    t.is(await raw.askError({ type: CMD.blockStatus, length: 512 }), ERR.io);
    await raw.expectInStep();
  }
});

test('what was counted is told, and stays when the export has gone', async (t) => {
  const path = await makeFile(t);
  const { server, connect } = await world(t, [(await exportsOf(t, path))[0]], {}, ENGINES_NATIVE);
  const raw = await connect();
  await negotiate(raw, 'structured', CONTEXTS);
  await raw.ask({ type: CMD.read, length: 70_000 });
  await raw.ask({ type: CMD.blockStatus, length: 70_000 });
  await raw.askError({ type: CMD.trim, length: 1 });
  raw.send(request({ type: CMD.disc }));
  await soon('the end', raw.closed);
  await soon('the export to go', server.removeExport('disk'));
  const figures = server.figures.get('disk');
  t.is(figures?.readBytes, 70_000);
  for (const kind of ['read', 'block_status', 'other'] as const) {
    t.is(
      figures?.requests[kind].durations.reduce((sum, count) => sum + count, 0),
      1,
      kind,
    );
    t.is(figures?.requests[kind].errors, kind === 'other' ? 1 : 0);
  }
});
