// SPDX-License-Identifier: Apache-2.0
/**
 * The rules that peers break, each over a raw socket: what is sent, what must come
 * back, and that the stream is in step afterwards.
 */
import test, { type ExecutionContext } from 'ava';
import fc from 'fast-check';
import { type Extent, ExtentMap } from '../../nbd/extents.ts';
import type { Limits } from '../../nbd/limits.ts';
import {
  be,
  CHUNK,
  CMD,
  dataOf,
  ERR,
  exportOf,
  infoData,
  MemorySource,
  metaData,
  OPT,
  option,
  pattern,
  RawClient,
  type RawRequest,
  REP,
  request,
  settled,
  soon,
  statusOf,
  type World,
  world,
} from './world.ts';

const MIB = 1 << 20;
const SIZE = 3 * MIB + 512;
const MAX = 2n ** 64n - 1n;

interface Served extends World {
  readonly source: MemorySource;
}

async function served(
  t: ExecutionContext,
  options: {
    limits?: Partial<Limits>;
    allocation?: ExtentMap;
    contexts?: [string, ExtentMap][];
    size?: number;
  } = {},
): Promise<Served> {
  const source = new MemorySource(pattern(options.size ?? SIZE));
  const exports = [exportOf(source, options), exportOf(source, { name: 'other' })];
  return { ...(await world(t, exports, options.limits)), source };
}

/** A client in transmission, with structured replies unless told otherwise. */
async function client(
  t: ExecutionContext,
  options: { structured?: boolean; contexts?: string[] } = {},
): Promise<RawClient> {
  const { connect } = await served(t);
  const raw = await connect();
  await raw.go('disk', options);
  return raw;
}

/** The error of one request in either mode of replies. */
async function errorOf(raw: RawClient, structured: boolean, asked: RawRequest): Promise<number> {
  if (structured) {
    return raw.askError(asked);
  }
  raw.send(request(asked));
  return (await raw.simpleReply()).error;
}

// ---- handshake, where the socket matters

test('unknown client flag: the connection is dropped', async (t) => {
  const raw = await (await served(t)).connect();
  await raw.greeting();
  raw.send(be([32, 0x8003]));
  t.is((await raw.readToEnd()).length, 0);
});

test('unknown option, any data: ERR_UNSUP, the data is skipped, in step', async (t) => {
  const raw = await (await served(t)).connect();
  await raw.open();
  for (const bytes of [0, 1, 65_536]) {
    t.deepEqual(
      (await raw.haggle(4711, Buffer.alloc(bytes, 'IHAVEOPT'))).map(({ type }) => type),
      [REP.errUnsup],
    );
  }
  await raw.expectAck(OPT.list);
});

test('STARTTLS where there is no TLS: ERR_POLICY, in step', async (t) => {
  const raw = await (await served(t)).connect();
  await raw.open();
  t.is((await raw.haggle(OPT.startTls))[0]?.type, REP.errPolicy);
  await raw.expectAck(OPT.go, infoData('disk'));
  await raw.expectInStep(false);
});

test('malformed INFO, GO and meta options, trailing bytes: ERR_INVALID, in step', async (t) => {
  // Some two hundred options: on a machine that is busy they may take longer than a handshake may.
  const raw = await (await served(t, { limits: { handshakeMs: 60_000 } })).connect();
  await raw.open();
  await raw.expectAck(OPT.structuredReply);
  const cut = (data: Buffer): Buffer[] => [
    ...Array.from({ length: data.length }, (_, bytes) => data.subarray(0, bytes)),
    Buffer.concat([data, Buffer.from([0])]),
  ];
  const info = cut(infoData('disk', 3));
  const meta = cut(metaData('disk', 'base:allocation'));
  for (const [number, malformed] of [
    [OPT.info, info],
    [OPT.go, info],
    [OPT.listMetaContext, meta],
    [OPT.setMetaContext, meta],
  ] as const) {
    for (const data of malformed) {
      t.is((await raw.haggle(number, data))[0]?.type, REP.errInvalid, data.toString('hex'));
    }
  }
  await raw.expectAck(OPT.go, infoData('disk'));
  await raw.expectInStep();
});

test('ABORT with data: acknowledged, then closed', async (t) => {
  const raw = await (await served(t)).connect();
  await raw.open();
  raw.send(option(OPT.abort, Buffer.from('so long')));
  t.is((await raw.optionReply()).type, REP.ack);
  t.is((await raw.readToEnd()).length, 0);
});

test('failed SET_META_CONTEXT clears the earlier selection: BLOCK_STATUS gives EINVAL', async (t) => {
  const raw = await (await served(t)).connect();
  await raw.open();
  await raw.expectAck(OPT.structuredReply);
  await raw.expectAck(OPT.setMetaContext, metaData('disk', 'base:allocation'));
  const failed = await raw.haggle(OPT.setMetaContext, metaData('none', 'base:allocation'));
  t.is(failed[0]?.type, REP.errUnknown);
  await raw.expectAck(OPT.go, infoData('disk'));
  t.is(await raw.askError({ type: CMD.blockStatus, length: 512 }), ERR.inval);
  await raw.expectInStep();
});

test('repeated queries: unique context ids, and no more than the limit of queries', async (t) => {
  const raw = await (await served(t)).connect();
  await raw.open();
  await raw.expectAck(OPT.structuredReply);
  const queries = Array.from({ length: 250 }, () => 'base:allocation');
  const replies = await raw.expectAck(OPT.setMetaContext, metaData('disk', ...queries));
  t.is(replies.length, 2);
  const many = Array.from({ length: 2000 }, () => 'base:');
  t.is((await raw.haggle(OPT.setMetaContext, metaData('disk', ...many)))[0]?.type, REP.errTooBig);
});

test('meta option on an unknown export: ERR_UNKNOWN', async (t) => {
  const raw = await (await served(t)).connect();
  await raw.open();
  await raw.expectAck(OPT.structuredReply);
  for (const number of [OPT.listMetaContext, OPT.setMetaContext]) {
    t.is((await raw.haggle(number, metaData('none', 'base:')))[0]?.type, REP.errUnknown);
  }
});

test('contexts set for A, then GO to B: BLOCK_STATUS gives EINVAL', async (t) => {
  const raw = await (await served(t)).connect();
  await raw.open();
  await raw.expectAck(OPT.structuredReply);
  await raw.expectAck(OPT.setMetaContext, metaData('disk', 'base:allocation'));
  await raw.expectAck(OPT.go, infoData('other'));
  t.is(await raw.askError({ type: CMD.blockStatus, length: 512 }), ERR.inval);
  await raw.expectInStep();
});

test('wildcards and unknown namespaces in SET: ignored and acknowledged', async (t) => {
  const raw = await (await served(t)).connect();
  await raw.open();
  await raw.expectAck(OPT.structuredReply);
  const queries = ['base:', 'x-none:y', 'qemu:', 'qemu:dirty-bitmap:', ''];
  t.is((await raw.expectAck(OPT.setMetaContext, metaData('disk', ...queries))).length, 1);
  await raw.expectAck(OPT.go, infoData('disk'));
  t.is(await raw.askError({ type: CMD.blockStatus, length: 512 }), ERR.inval);
});

test('option length of 4 GiB: closed without buffering', async (t) => {
  const raw = await (await served(t)).connect();
  await raw.open();
  raw.send(Buffer.from('IHAVEOPT'), be([32, OPT.go], [32, 0xffffffff]));
  t.is((await raw.readToEnd()).length, 0);
});

test('bad option magic: closed', async (t) => {
  const raw = await (await served(t)).connect();
  await raw.open();
  raw.send(Buffer.from('GET / HT'));
  t.is((await raw.readToEnd()).length, 0);
});

test('EXPORT_NAME: served with 124 zeroes unless both agreed; unknown closes', async (t) => {
  const { connect } = await served(t);
  for (const [flags, bytes] of [
    [0, 134],
    [1, 134],
    [3, 10],
  ] as const) {
    const raw = await connect();
    await raw.open(flags);
    raw.send(option(OPT.exportName, Buffer.from('disk')));
    const answer = await raw.read(bytes);
    t.is(answer.readBigUInt64BE(0), BigInt(SIZE));
    t.is(answer.readUInt16BE(8), 0x010f);
    t.true(answer.subarray(10).every((byte) => byte === 0));
    await raw.expectInStep(false);
  }
  const raw = await connect();
  await raw.open();
  raw.send(option(OPT.exportName, Buffer.from('none')));
  t.is((await raw.readToEnd()).length, 0);
});

test('requests in the same segment as GO are not lost', async (t) => {
  const raw = await (await served(t)).connect();
  await raw.open();
  raw.send(
    option(OPT.go, infoData('disk')),
    request({ type: CMD.read, offset: 512, length: 512, cookie: 9n }),
  );
  await raw.optionReplies();
  t.deepEqual(await raw.simpleReply(), { error: 0, cookie: 9n });
  t.deepEqual(await raw.read(512), pattern(SIZE).subarray(512, 1024));
});

test('a byte at a time is as good as all at once', async (t) => {
  const raw = await (await served(t)).connect();
  const all = Buffer.concat([
    be([32, 3]),
    option(OPT.structuredReply),
    option(OPT.go, infoData('disk', 3)),
    request({ type: CMD.read, offset: 1, length: 3 }),
  ]);
  await raw.greeting();
  for (const byte of all) {
    raw.send(Buffer.from([byte]));
  }
  t.is((await raw.optionReplies()).length, 1);
  t.is((await raw.optionReplies()).length, 3);
  t.deepEqual(dataOf(await raw.reply(), 1, 3), pattern(SIZE).subarray(1, 4));
});

// ---- transmission

test('bad request magic: closed', async (t) => {
  const raw = await client(t);
  raw.send(request({ type: CMD.flush, magic: 0x25609514 }));
  t.is((await raw.readToEnd()).length, 0);
});

test('extended request magic, not negotiated: closed', async (t) => {
  const raw = await client(t);
  raw.send(be([32, 0x21e41c71]));
  t.is((await raw.readToEnd()).length, 0);
});

for (const structured of [true, false]) {
  const mode = structured ? 'structured' : 'simple';

  test(`${mode}: write, trim and zeroes give EPERM, the payload is consumed first`, async (t) => {
    const raw = await client(t, { structured });
    for (const length of [0, 1, 512, 100_000]) {
      raw.send(request({ type: CMD.write, length, flags: 1 }), Buffer.alloc(length, 0x25));
      t.is(structured ? await errorOfReply(raw) : (await raw.simpleReply()).error, ERR.perm);
    }
    t.is(await errorOf(raw, structured, { type: CMD.trim, length: 512 }), ERR.perm);
    t.is(await errorOf(raw, structured, { type: CMD.writeZeroes, length: 512 }), ERR.perm);
    // Whatever else is wrong with it, the payload is there.
    raw.send(
      request({ type: CMD.write, length: 700, offset: MAX, flags: 0xffff }),
      Buffer.alloc(700),
    );
    t.is(structured ? await errorOfReply(raw) : (await raw.simpleReply()).error, ERR.perm);
    await raw.expectInStep(structured);
  });

  test(`${mode}: past the end and 2^64 wrap give EINVAL`, async (t) => {
    const raw = await client(t, { structured });
    for (const [offset, length] of [
      [SIZE, 1],
      [SIZE - 1, 2],
      [SIZE + 1, 0],
      [0, SIZE + 1],
      [MAX, 1],
      [MAX, 2],
      [MAX - 511n, 512],
      [MAX - 511n, 1024],
      [2n ** 63n, 512],
      [2n ** 53n, 512],
      [MAX, 0],
    ] as const) {
      const asked = { type: CMD.read, offset, length };
      t.is(await errorOf(raw, structured, asked), ERR.inval, `${offset} ${length}`);
    }
    await raw.expectInStep(structured);
  });

  test(`${mode}: zero length is answered, in step`, async (t) => {
    const raw = await client(t, { structured });
    for (const offset of [0, 1, SIZE]) {
      raw.send(request({ type: CMD.read, offset, length: 0 }));
      if (structured) {
        t.deepEqual(
          (await raw.reply()).map(({ type }) => type),
          [CHUNK.none],
        );
      } else {
        t.is((await raw.simpleReply()).error, 0);
      }
      const cache = { type: CMD.cache, offset, length: 0 };
      t.is(await errorOf(raw, structured, cache), ERR.inval);
      const status = { type: CMD.blockStatus, offset, length: 0 };
      t.is(await errorOf(raw, structured, status), ERR.inval);
      t.is(await errorOf(raw, structured, { type: CMD.trim, offset, length: 0 }), ERR.perm);
    }
    await raw.expectInStep(structured);
  });

  test(`${mode}: unknown command, unknown flag and CACHE give EINVAL`, async (t) => {
    const raw = await client(t, { structured });
    for (const type of [CMD.cache, 8, 9, 0x7fff, 0xffff]) {
      t.is(await errorOf(raw, structured, { type, length: 512 }), ERR.inval, `command ${type}`);
    }
    const always = [CMD.read, CMD.flush, CMD.blockStatus];
    for (const type of always) {
      for (const flags of [2, 16, 32, 0x8000]) {
        t.is(await errorOf(raw, structured, { type, flags, length: 512 }), ERR.inval);
      }
    }
    t.is(await errorOf(raw, structured, { type: CMD.read, flags: 8, length: 512 }), ERR.inval);
    t.is(await errorOf(raw, structured, { type: CMD.flush, flags: 4 }), ERR.inval);
    await raw.expectInStep(structured);
  });

  test(`${mode}: FLUSH succeeds, with an offset or length it is EINVAL`, async (t) => {
    const raw = await client(t, { structured });
    await raw.expectInStep(structured);
    t.is(await errorOf(raw, structured, { type: CMD.flush, offset: 1 }), ERR.inval);
    t.is(await errorOf(raw, structured, { type: CMD.flush, length: 1 }), ERR.inval);
    await raw.expectInStep(structured);
  });

  test(`${mode}: reads at odd places and of odd lengths give the data`, async (t) => {
    const raw = await client(t, { structured });
    const expected = pattern(SIZE);
    for (const [offset, length] of [
      [0, 1],
      [1, 4095],
      [511, 8193],
      [SIZE - 1, 1],
      [0, SIZE],
      [7, 2 * MIB],
      [0, MIB],
      [MIB - 1, MIB + 1],
    ] as const) {
      raw.send(request({ type: CMD.read, offset, length }));
      const wanted = expected.subarray(offset, offset + length);
      if (structured) {
        t.true(dataOf(await raw.reply(), offset, length).equals(wanted));
      } else {
        t.is((await raw.simpleReply()).error, 0);
        t.true((await raw.read(length)).equals(wanted));
      }
    }
    await raw.expectInStep(structured);
  });

  test(`${mode}: a read error is told in the mode of replies, and the next read is served`, async (t) => {
    const { source, connect } = await served(t);
    const raw = await connect();
    await raw.go('disk', { structured });
    source.faultAt = 4096;
    t.is(await errorOf(raw, structured, { type: CMD.read, offset: 4000, length: 512 }), ERR.io);
    source.faultCode = 'ENOMEM';
    t.is(await errorOf(raw, structured, { type: CMD.read, offset: 4000, length: 512 }), ERR.nomem);
    await raw.expectInStep(structured);
    raw.send(request({ type: CMD.read, length: 512 }));
    if (structured) {
      t.deepEqual(dataOf(await raw.reply(), 0, 512), source.data.subarray(0, 512));
    } else {
      t.is((await raw.simpleReply()).error, 0);
      t.deepEqual(await raw.read(512), source.data.subarray(0, 512));
    }
  });

  test(`${mode}: DISC with requests in flight: answered, then closed`, async (t) => {
    const { source, connect } = await served(t);
    const raw = await connect();
    await raw.go('disk', { structured });
    source.hold();
    raw.send(
      ...Array.from({ length: 20 }, (_, index) =>
        request({ type: CMD.read, offset: index * 512, length: 512, cookie: BigInt(index) }),
      ),
      request({ type: CMD.disc }),
      // What follows DISC is not part of the conversation.
      request({ type: CMD.read, length: 512, cookie: 99n }),
    );
    await source.waitHeld(20);
    source.release();
    const cookies = new Set<bigint>();
    for (let index = 0; index < 20; index += 1) {
      if (structured) {
        const chunks = await raw.reply();
        cookies.add(chunks[0]?.cookie ?? -1n);
      } else {
        cookies.add((await raw.simpleReply()).cookie);
        await raw.read(512);
      }
    }
    t.is(cookies.size, 20);
    t.false(cookies.has(99n));
    t.is((await raw.readToEnd()).length, 0);
  });

  test(`${mode}: a client that ends its side gets its replies, then the end`, async (t) => {
    const where = await served(t);
    const { source, connect } = where;
    const raw = await connect();
    await raw.go('disk', { structured });
    source.hold();
    raw.send(request({ type: CMD.read, length: 4096 }));
    raw.socket.end();
    await source.waitHeld(1);
    await settled(where);
    source.release();
    const bytes = await raw.readToEnd();
    t.is(bytes.length, 4096 + (structured ? 28 : 16));
  });

  test(`${mode}: replies come in any order, as reads are done`, async (t) => {
    const { source, connect } = await served(t);
    const raw = await connect();
    await raw.go('disk', { structured });
    source.hold();
    raw.send(
      request({ type: CMD.read, length: 512, cookie: 1n }),
      request({ type: CMD.flush, cookie: 2n }),
    );
    const next = async (): Promise<bigint> =>
      structured ? ((await raw.reply())[0]?.cookie ?? -1n) : (await raw.simpleReply()).cookie;
    t.is(await next(), 2n);
    source.release();
    t.is(await next(), 1n);
  });
}

async function errorOfReply(raw: RawClient): Promise<number> {
  const [chunk] = await raw.reply();
  return chunk?.type === CHUNK.error ? chunk.payload.readUInt32BE(0) : -1;
}

test('length over the maximum: EINVAL, in step', async (t) => {
  const size = 33 * MIB;
  const { connect } = await served(t, { size });
  const raw = await connect();
  await raw.go();
  t.is(await raw.askError({ type: CMD.read, length: 32 * MIB + 1 }), ERR.inval);
  const chunks = await raw.ask({ type: CMD.read, length: 32 * MIB });
  t.true(dataOf(chunks, 0, 32 * MIB).equals(pattern(size).subarray(0, 32 * MIB)));
  await raw.expectInStep();
});

test('large reads are done and sent in pieces of at most 1 MiB', async (t) => {
  const { source, connect } = await served(t);
  const raw = await connect();
  await raw.go();
  const chunks = await raw.ask({ type: CMD.read, length: SIZE });
  t.is(chunks.length, 4);
  t.deepEqual(source.sizes, [MIB, MIB, MIB, 512]);
});

test('READ error in structured mode: an error chunk, never a simple reply, with its offset', async (t) => {
  const { source, connect } = await served(t);
  source.faultAt = 512 + MIB + 5;
  const raw = await connect();
  await raw.go();
  const chunks = await raw.ask({ type: CMD.read, offset: 512, length: 2 * MIB });
  t.deepEqual(
    chunks.map(({ type }) => type),
    [CHUNK.data, CHUNK.errorOffset],
  );
  const payload = chunks[1]?.payload ?? Buffer.alloc(0);
  t.is(payload.readUInt32BE(0), ERR.io);
  const offset = Number(payload.readBigUInt64BE(6 + payload.readUInt16BE(4)));
  t.is(offset, 512 + MIB, 'the piece that failed');
  await raw.expectInStep();
});

test('a failed read in a simple reply of several pieces: the first is told, a later one closes', async (t) => {
  const { source, connect, server } = await served(t);
  const raw = await connect();
  await raw.go('disk', { structured: false });
  source.faultAt = 0;
  raw.send(request({ type: CMD.read, length: 2 * MIB }));
  t.is((await raw.simpleReply()).error, ERR.io);
  await raw.expectInStep(false);
  source.faultAt = MIB;
  raw.send(request({ type: CMD.read, length: 2 * MIB }));
  const bytes = await raw.readToEnd();
  t.true(bytes.length <= 16 + MIB, 'not one byte in place of those that could not be read');
  t.true(bytes.subarray(16).equals(source.data.subarray(0, bytes.length - 16)));
  t.is(server.usage.bytesInFlight, 0);
});

test('simple replies in several pieces do not mix with others', async (t) => {
  const { source, connect } = await served(t);
  const raw = await connect();
  await raw.go('disk', { structured: false });
  const asked = Array.from({ length: 24 }, (_, index) => ({
    cookie: BigInt(index),
    offset: index * 1000,
    length: index % 2 === 0 ? 2 * MIB + index : 512 + index,
  }));
  raw.send(...asked.map((each) => request({ type: CMD.read, ...each })));
  for (let count = 0; count < asked.length; count += 1) {
    const { cookie, error } = await raw.simpleReply();
    t.is(error, 0);
    const { offset, length } = asked[Number(cookie)] ?? { offset: 0, length: 0 };
    t.true((await raw.read(length)).equals(source.data.subarray(offset, offset + length)));
  }
  await raw.expectInStep(false);
});

test('a simple reply in several pieces bars what is ready meanwhile', async (t) => {
  const where = await served(t);
  const { source, connect } = where;
  const raw = await connect();
  await raw.go('disk', { structured: false });
  source.hold(MIB);
  const reads = [
    { offset: 0, length: 2 * MIB, cookie: 1n },
    { offset: 512, length: 2 * MIB, cookie: 2n },
    { offset: 0, length: 9, cookie: 4n },
  ] as const;
  raw.send(...reads.slice(0, 2).map((each) => request({ type: CMD.read, ...each })));
  // The first waits for its second piece, the other for its first.
  await source.waitHeld(2);
  raw.send(request({ type: CMD.flush, cookie: 3n }), request({ type: CMD.read, ...reads[2] }));
  await settled(where);
  source.release();
  const order: bigint[] = [];
  for (let index = 0; index < 4; index += 1) {
    const { cookie } = await raw.simpleReply();
    order.push(cookie);
    const asked = reads.find((each) => each.cookie === cookie) ?? { offset: 0, length: 0 };
    const { offset, length } = asked;
    t.true((await raw.read(length)).equals(source.data.subarray(offset, offset + length)));
  }
  t.is(order[0], 1n);
});

test('FUA is offered and accepted on every command', async (t) => {
  const raw = await client(t, { contexts: ['base:allocation'] });
  const flags = 1;
  t.is((await raw.ask({ type: CMD.read, flags, length: 1 }))[0]?.type, CHUNK.data);
  t.is((await raw.ask({ type: CMD.flush, flags }))[0]?.type, CHUNK.none);
  t.is((await raw.ask({ type: CMD.blockStatus, flags, length: 1 }))[0]?.type, CHUNK.status);
  raw.send(request({ type: CMD.disc, flags }));
  t.is((await raw.readToEnd()).length, 0);
});

test('DF: one chunk up to 1 MiB, EOVERFLOW above, EINVAL without negotiation', async (t) => {
  const allocation = ExtentMap.fromRanges(SIZE, [{ offset: 65_536, length: 131_072 }], 3, 0);
  const { connect } = await served(t, { allocation });
  const raw = await connect();
  await raw.go();
  for (const length of [1, 65_536, 262_144, MIB]) {
    const chunks = await raw.ask({ type: CMD.read, flags: 4, length });
    t.deepEqual(
      chunks.map(({ type, flags }) => [type, flags]),
      [[CHUNK.data, 1]],
    );
    t.is(chunks[0]?.payload.length, 8 + length);
  }
  t.is(await raw.askError({ type: CMD.read, flags: 4, length: MIB + 1 }), ERR.overflow);
  await raw.expectInStep();
  const simple = await connect();
  await simple.go('disk', { structured: false });
  simple.send(request({ type: CMD.read, flags: 4, length: 512 }));
  t.is((await simple.simpleReply()).error, ERR.inval);
});

test('a client that dies in the middle of a reply: the others never notice', async (t) => {
  const { source, connect, server } = await served(t);
  const other = await connect();
  await other.go();
  const address = await server.listen({ host: '127.0.0.1', port: 0 });
  const raws: RawClient[] = [];
  for (let index = 0; index < 6; index += 1) {
    // A reset is a thing of TCP; on a unix socket the client just goes.
    const raw = index < 3 ? await connect() : await RawClient.connect(address);
    await raw.go('disk', { structured: index % 2 === 0 });
    raws.push(raw);
  }
  source.hold();
  for (const raw of raws) {
    raw.send(...Array.from({ length: 8 }, () => request({ type: CMD.read, length: 2 * MIB })));
  }
  await source.waitHeld(raws.length);
  for (const [index, raw] of raws.entries()) {
    if (index < 3) {
      raw.destroy();
    } else {
      raw.socket.resetAndDestroy();
    }
  }
  source.release();
  const chunks = await other.ask({ type: CMD.read, length: SIZE });
  t.true(dataOf(chunks, 0, SIZE).equals(source.data));
  await other.expectInStep();
  const gone = async (): Promise<void> => {
    while (server.usage.connections > 1 || server.usage.bytesInFlight > 0) {
      await new Promise((resolve) => setImmediate(resolve));
    }
  };
  await soon('the dead to be forgotten', gone());
  t.is(server.usage.bytesInFlight, 0);
});

// ---- holes

test('OFFSET_HOLE stands only where base:allocation says ZERO, never for data', async (t) => {
  const hole = { offset: 262_144, length: 262_144 };
  const holeOnly = { offset: MIB, length: 262_144 };
  const allocation = ExtentMap.combine(
    ExtentMap.fromRanges(SIZE, [hole], 3, 0),
    ExtentMap.fromRanges(SIZE, [holeOnly], 1, 0),
    (a, b) => a | b,
  );
  const { source, connect } = await served(t, { allocation });
  // The data under the hole is not zero here, so that it shows when it is read.
  const raw = await connect();
  await raw.go();
  const chunks = await raw.ask({ type: CMD.read, length: 2 * MIB });
  t.deepEqual(
    chunks.map(({ type }) => type),
    [CHUNK.data, CHUNK.hole, CHUNK.data, CHUNK.data],
  );
  const expected = Buffer.from(source.data.subarray(0, 2 * MIB));
  expected.fill(0, hole.offset, hole.offset + hole.length);
  t.true(dataOf(chunks, 0, 2 * MIB).equals(expected));
  const within = await raw.ask({ type: CMD.read, offset: hole.offset + 512, length: 512 });
  t.deepEqual(
    within.map(({ type, flags }) => [type, flags]),
    [[CHUNK.hole, 1]],
  );
});

test('property: a structured read is the data, wherever holes lie', async (t) => {
  const size = 1 << 20;
  const ranges: fc.Arbitrary<Extent[]> = fc.array(
    fc.record({ offset: fc.nat(size), length: fc.nat(200_000) }),
    { maxLength: 6 },
  );
  const data = pattern(size);
  const asked = fc
    .tuple(fc.nat(size), fc.nat(size))
    .map(([offset, length]) => ({ offset, length: Math.min(length, size - offset) }));
  await fc.assert(
    fc.asyncProperty(
      ranges,
      fc.array(asked, { minLength: 1, maxLength: 5 }),
      async (holes, reads) => {
        const sparse = Buffer.from(data);
        for (const { offset, length } of holes) {
          sparse.fill(0, offset, Math.min(offset + length, size));
        }
        const allocation = ExtentMap.fromRanges(size, holes, 3, 0);
        const exports = [exportOf(new MemorySource(sparse), { allocation })];
        const { connect, server } = await world(t, exports, { pieceBytes: 70_000 });
        const raw = await connect();
        await raw.go();
        for (const { offset, length } of reads) {
          const chunks = await raw.ask({ type: CMD.read, offset, length });
          t.true(dataOf(chunks, offset, length).equals(sparse.subarray(offset, offset + length)));
        }
        raw.destroy();
        await server.close();
      },
    ),
    { numRuns: 25 },
  );
});

// ---- block status

const dirtyOf = (...ranges: Extent[]): ExtentMap => ExtentMap.fromRanges(SIZE, ranges, 1, 0);

test('several contexts on one connection: one chunk each, of equal total length', async (t) => {
  const allocation = ExtentMap.fromRanges(SIZE, [{ offset: 4096, length: 4096 }], 3, 0);
  const { connect } = await served(t, {
    allocation,
    contexts: [
      ['qemu:dirty-bitmap:monday', dirtyOf({ offset: 0, length: 65_536 })],
      [
        'qemu:dirty-bitmap:tuesday',
        dirtyOf({ offset: 8192, length: 512 }, { offset: SIZE - 1, length: 1 }),
      ],
    ],
  });
  const raw = await connect();
  await raw.go('disk', {
    contexts: ['qemu:dirty-bitmap:tuesday', 'base:allocation', 'qemu:dirty-bitmap:monday'],
  });
  const status = statusOf(await raw.ask({ type: CMD.blockStatus, length: SIZE }));
  t.deepEqual(status.get(0), [
    { length: 4096, flags: 0 },
    { length: 4096, flags: 3 },
    { length: SIZE - 8192, flags: 0 },
  ]);
  t.deepEqual(status.get(1), [
    { length: 65_536, flags: 1 },
    { length: SIZE - 65_536, flags: 0 },
  ]);
  t.deepEqual(status.get(2), [
    { length: 8192, flags: 0 },
    { length: 512, flags: 1 },
    { length: SIZE - 8704 - 1, flags: 0 },
    { length: 1, flags: 1 },
  ]);
});

test('REQ_ONE: exactly one extent per context, all of one length', async (t) => {
  const { connect } = await served(t, {
    contexts: [['qemu:dirty-bitmap:monday', dirtyOf({ offset: 4096, length: 4096 })]],
  });
  const raw = await connect();
  await raw.go('disk', { contexts: ['base:allocation', 'qemu:dirty-bitmap:monday'] });
  const asked = { type: CMD.blockStatus, flags: 8, offset: 512, length: SIZE - 512 };
  const status = statusOf(await raw.ask(asked));
  t.deepEqual(status.get(0), [{ length: 3584, flags: 0 }]);
  t.deepEqual(status.get(1), [{ length: 3584, flags: 0 }]);
});

test('a reply has no more extents than the limit, shared by its contexts; asking on gives the rest', async (t) => {
  const many = Array.from({ length: 1000 }, (_, index) => ({ offset: index * 1024, length: 512 }));
  const few = dirtyOf({ offset: 100, length: 1 });
  const { connect } = await served(t, {
    limits: { statusExtents: 100, contexts: 10 },
    contexts: [
      ['qemu:dirty-bitmap:many', dirtyOf(...many)],
      ['qemu:dirty-bitmap:few', few],
    ],
  });
  const raw = await connect();
  await raw.go('disk', { contexts: ['qemu:dirty-bitmap:many', 'qemu:dirty-bitmap:few'] });
  const flagsOf = new Map<number, number[]>([
    [1, []],
    [2, []],
  ]);
  for (let position = 0; position < SIZE; ) {
    const asked = { type: CMD.blockStatus, offset: position, length: SIZE - position };
    const status = statusOf(await raw.ask(asked));
    const totals = [...status.values()].map((extents) =>
      extents.reduce((sum, { length }) => sum + length, 0),
    );
    t.is(new Set(totals).size, 1);
    t.true([...status.values()].every((extents) => extents.length <= 50));
    for (const [id, extents] of status) {
      for (const { length, flags } of extents) {
        for (let byte = 0; byte < length; byte += 1) {
          flagsOf.get(id)?.push(flags);
        }
      }
    }
    position += totals[0] ?? SIZE;
  }
  t.is(flagsOf.get(1)?.filter((flags) => flags === 1).length, 1000 * 512);
  t.deepEqual(
    flagsOf.get(2)?.flatMap((flags, at) => (flags === 1 ? [at] : [])),
    [100],
  );
});

test('a question of nearly 4 GiB gets one answer that covers it', async (t) => {
  const size = 2 ** 33;
  const source = { sizeBytes: size, read: () => Promise.resolve(), close: () => Promise.resolve() };
  const dirty = ExtentMap.fromRanges(size, [{ offset: 2 ** 32 - 65_536, length: 131_072 }], 1, 0);
  const exports = [exportOf(source, { contexts: [['qemu:dirty-bitmap:monday', dirty]] })];
  const raw = await (await world(t, exports)).connect();
  await raw.go('disk', { contexts: ['base:allocation', 'qemu:dirty-bitmap:monday'] });
  const length = 0xffffffff;
  const status = statusOf(await raw.ask({ type: CMD.blockStatus, length }));
  t.deepEqual(status.get(0), [{ length, flags: 0 }]);
  t.deepEqual(status.get(1), [
    { length: 2 ** 32 - 65_536, flags: 0 },
    { length: 65_535, flags: 1 },
  ]);
});

test('BLOCK_STATUS past the end, or without structured replies: EINVAL', async (t) => {
  const raw = await client(t, { contexts: ['base:allocation'] });
  t.is(await raw.askError({ type: CMD.blockStatus, offset: SIZE - 1, length: 2 }), ERR.inval);
  t.is(await raw.askError({ type: CMD.blockStatus, offset: MAX, length: 2 }), ERR.inval);
  const simple = await client(t, { structured: false });
  simple.send(request({ type: CMD.blockStatus, length: 512 }));
  t.is((await simple.simpleReply()).error, ERR.inval);
});

test('property: any requests whatever leave the stream in step or closed', async (t) => {
  const { connect } = await served(t);
  const requests = fc.array(
    fc.record({
      type: fc.oneof(fc.constantFrom(0, 3, 4, 5, 6, 7), fc.integer({ min: 8, max: 0xffff })),
      flags: fc.oneof(fc.constantFrom(0, 1, 4, 8), fc.nat(0xffff)),
      offset: fc.oneof(fc.nat(SIZE + 10), fc.bigInt({ min: 0n, max: MAX })),
      length: fc.oneof(fc.nat(SIZE), fc.nat(0xffffffff)),
    }),
    { minLength: 1, maxLength: 20 },
  );
  await fc.assert(
    fc.asyncProperty(requests, async (all) => {
      const raw = await connect();
      await raw.go('disk', { contexts: ['base:allocation'] });
      raw.send(...all.map((each, index) => request({ ...each, cookie: BigInt(index) })));
      const open = new Set(all.keys());
      while (open.size > 0) {
        const chunk = await raw.chunk();
        t.true(open.has(Number(chunk.cookie)));
        if ((chunk.flags & 1) !== 0) {
          open.delete(Number(chunk.cookie));
        }
      }
      await raw.expectInStep();
      raw.destroy();
    }),
    { numRuns: 40 },
  );
});
