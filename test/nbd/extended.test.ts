// SPDX-License-Identifier: Apache-2.0
/**
 * Extended headers (doc/proto.md of NetworkBlockDevice/nbd, extension EXTENDED_HEADERS), over a
 * raw socket: what is sent, what must come back, and that the stream is in step afterwards.
 */
import test, { type ExecutionContext } from 'ava';
import fc from 'fast-check';
import type { BlockSource } from '../../nbd/export.ts';
import { ExtentMap } from '../../nbd/extents.ts';
import type { Limits } from '../../nbd/limits.ts';
import {
  be,
  CHUNK,
  type Chunk,
  CMD,
  dataOf,
  ERR,
  exportOf,
  extendedRequest,
  infoData,
  MemorySource,
  metaData,
  OPT,
  option,
  pattern,
  type RawClient,
  REP,
  request,
  type World,
  world,
} from './world.ts';

const SIZE = (3 << 20) + 512;
const MAX = 2n ** 64n - 1n;
const PAYLOAD_LEN = 0x20;
const MONDAY = 'qemu:dirty-bitmap:monday';
const dirty = ExtentMap.fromRanges(SIZE, [{ offset: 4096, length: 512 }], 1, 0);

interface Extended {
  readonly raw: RawClient;
  readonly where: World;
  readonly source: MemorySource;
}

/** Negotiates extended headers and, without structured replies, everything else. */
async function negotiate(raw: RawClient, contexts: readonly string[]): Promise<void> {
  await raw.open();
  await raw.expectAck(OPT.extendedHeaders);
  if (contexts.length > 0) {
    await raw.expectAck(OPT.setMetaContext, metaData('disk', ...contexts));
  }
  await raw.expectAck(OPT.go, infoData('disk'));
}

async function extended(
  t: ExecutionContext,
  options: { contexts?: string[]; limits?: Partial<Limits>; allocation?: ExtentMap } = {},
): Promise<Extended> {
  const source = new MemorySource(pattern(SIZE));
  const offered = exportOf(source, { ...options, contexts: [[MONDAY, dirty]] });
  const where = await world(t, [offered], options.limits);
  const raw = await where.connect();
  await negotiate(raw, options.contexts ?? ['base:allocation', MONDAY]);
  return { raw, where, source };
}

type Asked = Parameters<typeof extendedRequest>[0];

async function ask(
  raw: RawClient,
  asked: Asked,
  payload: Buffer = Buffer.alloc(0),
): Promise<Chunk[]> {
  raw.send(extendedRequest(asked), payload);
  return raw.extendedReply(BigInt.asUintN(64, BigInt(asked.offset ?? 0)));
}

async function errorOf(raw: RawClient, asked: Asked, payload?: Buffer): Promise<number> {
  const [chunk, ...others] = await ask(raw, asked, payload);
  if (chunk === undefined || others.length > 0 || chunk.type < 0x8000) {
    throw new Error('no error');
  }
  return chunk.payload.readUInt32BE(0);
}

async function expectInStep(t: ExecutionContext, raw: RawClient): Promise<void> {
  const cookie = 0xfeedfacecafebeefn;
  t.like(await ask(raw, { type: CMD.flush, cookie }), [{ type: CHUNK.none, cookie }]);
}

interface Extent {
  length: number;
  flags: number;
}

/** The contexts of a BLOCK_STATUS_EXT reply, by id. */
function statusExtOf(chunks: Chunk[]): Map<number, Extent[]> {
  const result = new Map<number, Extent[]>();
  for (const { type, payload } of chunks) {
    const count = payload.readUInt32BE(4);
    if (type !== CHUNK.statusExt || payload.length !== 8 + 16 * count || count === 0) {
      throw new Error(`type ${type}, ${count} extents in ${payload.length} bytes`);
    }
    result.set(
      payload.readUInt32BE(0),
      Array.from({ length: count }, (_, index) => ({
        length: Number(payload.readBigUInt64BE(8 + 16 * index)),
        flags: Number(payload.readBigUInt64BE(16 + 16 * index)),
      })),
    );
  }
  return result;
}

function statusPayload(length: number | bigint, ...ids: number[]): Buffer {
  return be([64, length], ...ids.map((id) => [32, id] as const));
}

/** A block status that names the contexts that it is about. */
function filtered(payload: Buffer, offset: number | bigint = 0): Asked {
  return { type: CMD.blockStatus, flags: PAYLOAD_LEN, length: payload.length, offset };
}

test('EXTENDED_HEADERS: every reply is an extended chunk that repeats cookie and offset', async (t) => {
  const { raw } = await extended(t);
  const cookie = 0x0102030405060708n;
  const read = await ask(raw, { type: CMD.read, offset: 4096, length: 512, cookie });
  t.like(read, [{ type: CHUNK.data, cookie, flags: 1 }]);
  t.deepEqual(dataOf(read, 4096, 512), pattern(SIZE).subarray(4096, 4608));
  t.like(await ask(raw, { type: CMD.flush }), [{ type: CHUNK.none }]);
  t.like(await ask(raw, { type: CMD.read, length: 0, offset: 7 }), [{ type: CHUNK.none }]);
  t.is(await errorOf(raw, { type: 99, offset: MAX }), ERR.inval);
});

test('EXTENDED_HEADERS: every chunk of a long read repeats the offset of the request', async (t) => {
  const allocation = ExtentMap.fromRanges(SIZE, [{ offset: 1 << 20, length: 1 << 20 }], 3, 0);
  const { raw, source } = await extended(t, { allocation });
  source.data.fill(0, 1 << 20, 2 << 20);
  const chunks = await ask(raw, { type: CMD.read, offset: 512, length: SIZE - 512 });
  t.true(chunks.length > 2);
  t.true(chunks.some(({ type }) => type === CHUNK.hole));
  t.true(dataOf(chunks, 512, SIZE - 512).equals(source.data.subarray(512)));
});

test('EXTENDED_HEADERS: EXPORT_NAME is forbidden and closes', async (t) => {
  const { where } = await extended(t);
  const raw = await where.connect();
  await raw.open();
  await raw.expectAck(OPT.extendedHeaders);
  raw.send(option(OPT.exportName, Buffer.from('disk')));
  t.is((await raw.readToEnd()).length, 0);
});

test('EXTENDED_HEADERS: STRUCTURED_REPLY after it is ERR_EXT_HEADER_REQD, in step', async (t) => {
  const { where } = await extended(t);
  const raw = await where.connect();
  await raw.open();
  await raw.expectAck(OPT.extendedHeaders);
  t.is((await raw.haggle(OPT.structuredReply))[0]?.type, REP.errExtHeaderReqd);
  await raw.expectAck(OPT.go, infoData('disk'));
  await expectInStep(t, raw);
});

test('EXTENDED_HEADERS: a compact request afterwards closes', async (t) => {
  const { raw } = await extended(t);
  raw.send(request({ type: CMD.flush }));
  t.is((await raw.readToEnd()).length, 0);
});

test('EXTENDED_HEADERS: past the end, 2^64 wrap and lengths above 2^32 give EINVAL', async (t) => {
  const { raw } = await extended(t);
  for (const [offset, length] of [
    [SIZE, 1],
    [SIZE - 1, 2],
    [0, SIZE + 1],
    [0, 2 ** 32],
    [0, 2 ** 32 + 512],
    [512, 2n ** 53n],
    [512, MAX],
    [MAX, 1],
    [MAX, MAX],
    [MAX - 511n, 512],
  ] as const) {
    for (const type of [CMD.read, CMD.blockStatus]) {
      t.is(await errorOf(raw, { type, offset, length }), ERR.inval, `${type} ${offset} ${length}`);
    }
  }
  await expectInStep(t, raw);
});

test('EXTENDED_HEADERS: write, trim and zeroes give EPERM, the payload is consumed first', async (t) => {
  const { raw } = await extended(t);
  for (const length of [0, 1, 512, 100_000]) {
    // Clients that forget the flag, which is theirs to set, send their data all the same.
    for (const flags of [PAYLOAD_LEN, 0]) {
      const payload = Buffer.alloc(length, 0x21);
      t.is(await errorOf(raw, { type: CMD.write, length, flags }, payload), ERR.perm);
    }
  }
  t.is(await errorOf(raw, { type: CMD.trim, length: 2n ** 40n }), ERR.perm);
  t.is(await errorOf(raw, { type: CMD.writeZeroes, length: 512 }), ERR.perm);
  await expectInStep(t, raw);
});

test('PAYLOAD_LEN on a command that takes none: EINVAL, the payload is consumed first', async (t) => {
  const { raw } = await extended(t);
  for (const type of [CMD.read, CMD.flush, CMD.trim, CMD.cache, CMD.writeZeroes, 99]) {
    const payload = Buffer.alloc(700, 0x21);
    t.is(await errorOf(raw, { type, flags: PAYLOAD_LEN, length: 700 }, payload), ERR.inval);
  }
  await expectInStep(t, raw);
});

test('PAYLOAD_LEN above the maximum payload: closed', async (t) => {
  const { where } = await extended(t, { limits: { readBytes: 1 << 20 } });
  for (const length of [(1 << 20) + 1, 2 ** 32, MAX]) {
    const raw = await where.connect();
    await negotiate(raw, []);
    raw.send(extendedRequest({ type: CMD.write, flags: PAYLOAD_LEN, length }));
    t.is((await raw.readToEnd()).length, 0);
  }
});

test('PAYLOAD_LEN in a compact request: EINVAL, in step', async (t) => {
  const { where } = await extended(t);
  const raw = await where.connect();
  await raw.go('disk', { contexts: ['base:allocation'] });
  t.is(await raw.askError({ type: CMD.read, flags: PAYLOAD_LEN, length: 512 }), ERR.inval);
  t.is(await raw.askError({ type: CMD.blockStatus, flags: PAYLOAD_LEN, length: 512 }), ERR.inval);
  await raw.expectInStep();
});

test('BLOCK_STATUS_EXT: one question and one extent for more than 4 GiB', async (t) => {
  const sizeBytes = 2 ** 43;
  const source: BlockSource = {
    sizeBytes,
    read: () => Promise.resolve(),
    close: () => Promise.resolve(),
  };
  const changed = ExtentMap.fromRanges(sizeBytes, [{ offset: 2 ** 42, length: 65_536 }], 1, 0);
  const where = await world(t, [exportOf(source, { contexts: [[MONDAY, changed]] })]);
  const raw = await where.connect();
  await negotiate(raw, ['base:allocation', MONDAY]);
  const status = statusExtOf(await ask(raw, { type: CMD.blockStatus, length: sizeBytes }));
  t.deepEqual(status.get(0), [{ length: sizeBytes, flags: 0 }]);
  t.deepEqual(status.get(1), [
    { length: 2 ** 42, flags: 0 },
    { length: 65_536, flags: 1 },
    { length: 2 ** 42 - 65_536, flags: 0 },
  ]);
  const one = { type: CMD.blockStatus, length: sizeBytes, flags: 8 };
  t.deepEqual(statusExtOf(await ask(raw, one)).get(1), [{ length: 2 ** 42, flags: 0 }]);
});

test('BLOCK_STATUS_EXT: half as many extents as in a compact reply, and never none', async (t) => {
  const ranges = Array.from({ length: 500 }, (_, index) => ({ offset: index * 1024, length: 512 }));
  const many = ExtentMap.fromRanges(SIZE, ranges, 1, 0);
  const source = new MemorySource(pattern(SIZE));
  const offered = exportOf(source, { contexts: [[MONDAY, many]] });
  for (const [statusExtents, most] of [
    [200, 50],
    [2, 1],
  ] as const) {
    const where = await world(t, [offered], { statusExtents, contexts: 2 });
    const raw = await where.connect();
    await negotiate(raw, ['base:allocation', MONDAY]);
    const status = statusExtOf(await ask(raw, { type: CMD.blockStatus, length: SIZE }));
    t.is(status.get(1)?.length, most);
    t.deepEqual(status.get(0), [{ length: most * 512, flags: 0 }]);
  }
});

test('BLOCK_STATUS_PAYLOAD: the answer is about the contexts that it names, with its length', async (t) => {
  const { raw } = await extended(t);
  const one = statusPayload(8192, 1);
  t.deepEqual(
    statusExtOf(await ask(raw, filtered(one), one)),
    new Map([
      [
        1,
        [
          { length: 4096, flags: 0 },
          { length: 512, flags: 1 },
          { length: 3584, flags: 0 },
        ],
      ],
    ]),
  );
  const both = statusPayload(512, 1, 0);
  t.deepEqual(
    [...statusExtOf(await ask(raw, filtered(both, 4096), both)).keys()].toSorted(),
    [0, 1],
  );
  await expectInStep(t, raw);
});

test('BLOCK_STATUS_PAYLOAD: a payload that is not right gives EINVAL and is consumed', async (t) => {
  const { raw } = await extended(t);
  for (const payload of [
    statusPayload(512, 7),
    statusPayload(512, 0, 0),
    statusPayload(512, 0, 1, 0),
    statusPayload(512),
    statusPayload(0, 0),
    statusPayload(SIZE + 1, 0),
    statusPayload(MAX, 0),
    statusPayload(512, 0).subarray(0, 11),
    Buffer.alloc(1),
    Buffer.alloc(100_000),
  ]) {
    t.is(await errorOf(raw, filtered(payload), payload), ERR.inval, payload.toString('hex', 0, 30));
  }
  const good = statusPayload(512, 0);
  t.is(await errorOf(raw, filtered(good, SIZE), good), ERR.inval);
  t.is(await errorOf(raw, filtered(good, MAX), good), ERR.inval);
  await expectInStep(t, raw);
});

test('BLOCK_STATUS_PAYLOAD without selected contexts: EINVAL, the payload is consumed', async (t) => {
  const { raw } = await extended(t, { contexts: [] });
  const payload = statusPayload(512, 0);
  t.is(await errorOf(raw, filtered(payload), payload), ERR.inval);
  await expectInStep(t, raw);
});

test('BLOCK_STATUS_PAYLOAD may come in any pieces', async (t) => {
  const { raw } = await extended(t);
  const payload = statusPayload(512, 1);
  for (const byte of Buffer.concat([extendedRequest(filtered(payload)), payload])) {
    raw.send(Buffer.from([byte]));
  }
  t.deepEqual(statusExtOf(await raw.extendedReply()).get(1), [{ length: 512, flags: 0 }]);
  await expectInStep(t, raw);
});

test('a client that leaves in the middle of a payload is forgotten', async (t) => {
  const { raw, where } = await extended(t);
  raw.send(extendedRequest(filtered(statusPayload(512, 1))), Buffer.alloc(3));
  raw.socket.end();
  t.is((await raw.readToEnd()).length, 0);
  await where.server.close();
  t.is(where.server.usage.bytesInFlight, 0);
});

test('READ error with extended headers: an extended error chunk with its offset', async (t) => {
  const { raw, source } = await extended(t);
  source.faultAt = (1 << 20) + 5;
  const chunks = await ask(raw, { type: CMD.read, offset: 512, length: 3 << 20 });
  const last = chunks.at(-1);
  t.is(last?.type, CHUNK.errorOffset);
  t.is(last?.payload.readUInt32BE(0), ERR.io);
  const { length } = last?.payload ?? [];
  const failedAt = Number(last?.payload.readBigUInt64BE((length ?? 8) - 8));
  t.true(failedAt <= (1 << 20) + 5 && failedAt > 5);
  await expectInStep(t, raw);
});

test('DF with extended headers: one chunk', async (t) => {
  const { raw } = await extended(t);
  t.is((await ask(raw, { type: CMD.read, flags: 4, length: 65_536 })).length, 1);
  t.is(await errorOf(raw, { type: CMD.read, flags: 4, length: SIZE }), ERR.overflow);
});

test('DISC with requests in flight and extended headers: answered, then closed', async (t) => {
  const { raw, source } = await extended(t);
  source.hold();
  raw.send(
    extendedRequest({ type: CMD.read, length: 512, cookie: 5n }),
    extendedRequest({ type: CMD.disc }),
  );
  await source.waitHeld(1);
  source.release();
  t.like(await raw.extendedReply(), [{ cookie: 5n, type: CHUNK.data }]);
  t.is((await raw.readToEnd()).length, 0);
});

test('property: any extended requests whatever leave the stream in step or closed', async (t) => {
  const { where } = await extended(t);
  const big = fc.oneof(fc.nat(SIZE + 10), fc.bigInt({ min: 0n, max: MAX }));
  const requests = fc.array(
    fc.record({
      type: fc.oneof(fc.constantFrom(0, 1, 3, 4, 5, 6, 7), fc.integer({ min: 8, max: 0xffff })),
      flags: fc.oneof(fc.constantFrom(0, 1, 4, 8, 0x20, 0x28), fc.nat(0xffff)),
      offset: big,
      length: big,
      payload: fc.uint8Array({ maxLength: 40 }),
    }),
    { minLength: 1, maxLength: 20 },
  );
  await fc.assert(
    fc.asyncProperty(requests, async (all) => {
      const raw = await where.connect();
      await negotiate(raw, ['base:allocation', MONDAY]);
      const messages = all.map(({ payload, ...asked }, index) => {
        const cookie = BigInt(index);
        const carries = (asked.flags & PAYLOAD_LEN) !== 0 || asked.type === CMD.write;
        const length = carries ? payload.length : asked.length;
        const head = extendedRequest({ ...asked, length, cookie });
        return carries ? Buffer.concat([head, payload]) : head;
      });
      raw.send(...messages);
      const open = new Map(all.map(({ offset }, index) => [BigInt(index), BigInt(offset)]));
      while (open.size > 0) {
        const chunk = await raw.extendedChunk();
        t.true(open.get(chunk.cookie) === chunk.offset);
        if ((chunk.flags & 1) !== 0) {
          open.delete(chunk.cookie);
        }
      }
      await expectInStep(t, raw);
      raw.destroy();
    }),
    { numRuns: 40 },
  );
});
