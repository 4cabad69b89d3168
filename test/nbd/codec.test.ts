// SPDX-License-Identifier: Apache-2.0
/** Golden bytes of every message, and every point at which one can be cut off. */
import test from 'ava';
import fc from 'fast-check';
import { ExtentMap } from '../../nbd/extents.ts';
import {
  decodeClientFlags,
  decodeInfoRequest,
  decodeMetaContextRequest,
  decodeOption,
  decodeString,
  encodeExportNameAnswer,
  encodeInfoBlockSize,
  encodeInfoExport,
  encodeInfoText,
  encodeMetaContext,
  encodeReply,
  encodeServer,
} from '../../nbd/options.ts';
import { BEYOND_ALL_BYTES, bytesFromWire, bytesToWire } from '../../nbd/units.ts';
import {
  decodeRequest,
  decodeStatusPayload,
  encodeErrorChunk,
  encodeGreeting,
  encodeNone,
  encodeOffsetHole,
  encodeSimpleReply,
  offsetDataHeaderBytes,
  statusChunkBytes,
  statusPayloadBytes,
  writeBlockStatus,
  writeOffsetData,
} from '../../nbd/wire.ts';

const cookie = { high: 0x01020304, low: 0x05060708 };
const to = { cookie, echoedOffset: undefined };
const extended = { cookie, echoedOffset: { high: 0x00000011, low: 0x22334400 } };
const hex = (text: string): Buffer => Buffer.from(text.replaceAll(/\s/g, ''), 'hex');

test('golden: greeting', (t) => {
  t.deepEqual(encodeGreeting(), hex('4e42444d41474943 49484156454f5054 0003'));
});

test('golden: simple reply', (t) => {
  t.deepEqual(encodeSimpleReply(to, 22), hex('67446698 00000016 0102030405060708'));
});

test('golden: NONE chunk', (t) => {
  t.deepEqual(encodeNone(to, 1), hex('668e33ef 0001 0000 0102030405060708 00000000'));
});

test('golden: OFFSET_DATA header', (t) => {
  const output = Buffer.alloc(28);
  writeOffsetData(output, to, 0, 0x1122334455, 4096);
  t.deepEqual(output, hex('668e33ef 0000 0001 0102030405060708 00001008 0000001122334455'));
});

test('golden: OFFSET_HOLE chunk', (t) => {
  t.deepEqual(
    encodeOffsetHole(to, 1, 0x1_0000_0000, 0xffffffff),
    hex('668e33ef 0001 0002 0102030405060708 0000000c 0000000100000000 ffffffff'),
  );
});

test('golden: ERROR chunk', (t) => {
  t.deepEqual(
    encodeErrorChunk(to, 1, 22, 'no'),
    hex('668e33ef 0001 8001 0102030405060708 00000008 00000016 0002 6e6f'),
  );
});

test('golden: ERROR_OFFSET chunk', (t) => {
  t.deepEqual(
    encodeErrorChunk(to, 1, 5, 'no', 512),
    hex('668e33ef 0001 8002 0102030405060708 00000010 00000005 0002 6e6f 0000000000000200'),
  );
});

test('golden: BLOCK_STATUS chunk', (t) => {
  const map = ExtentMap.fromRanges(100, [{ offset: 20, length: 30 }], 3, 0);
  const output = Buffer.alloc(statusChunkBytes(3, false));
  const chunk = { flags: 1, contextId: 7 };
  t.is(writeBlockStatus(output, 0, to, chunk, map, { offset: 10, end: 60 }), output.length);
  t.deepEqual(
    output,
    hex(`668e33ef 0001 0005 0102030405060708 0000001c 00000007
         0000000a 00000000  0000001e 00000003  0000000a 00000000`),
  );
});

test('golden: extended NONE chunk', (t) => {
  t.deepEqual(
    encodeNone(extended, 1),
    hex('6e8a278c 0001 0000 0102030405060708 0000001122334400 0000000000000000'),
  );
});

test('golden: extended OFFSET_DATA header, which repeats the offset of the request', (t) => {
  const output = Buffer.alloc(40);
  t.is(offsetDataHeaderBytes(true), output.length);
  writeOffsetData(output, extended, 0, 0x1122334455, 4096);
  t.deepEqual(
    output,
    hex(`6e8a278c 0000 0001 0102030405060708 0000001122334400 0000000000001008
         0000001122334455`),
  );
});

test('golden: extended OFFSET_HOLE chunk', (t) => {
  t.deepEqual(
    encodeOffsetHole(extended, 1, 0x1_0000_0000, 0xffffffff),
    hex(`6e8a278c 0001 0002 0102030405060708 0000001122334400 000000000000000c
         0000000100000000 ffffffff`),
  );
});

test('golden: extended ERROR and ERROR_OFFSET chunks, whatever the offset of the request', (t) => {
  const echoedOffset = { high: 0xffffffff, low: 0xfffffffe };
  t.deepEqual(
    encodeErrorChunk({ cookie, echoedOffset }, 1, 22, 'no'),
    hex(`6e8a278c 0001 8001 0102030405060708 fffffffffffffffe 0000000000000008
         00000016 0002 6e6f`),
  );
  t.deepEqual(
    encodeErrorChunk(extended, 1, 5, 'no', 512),
    hex(`6e8a278c 0001 8002 0102030405060708 0000001122334400 0000000000000010
         00000005 0002 6e6f 0000000000000200`),
  );
});

test('golden: BLOCK_STATUS_EXT chunk, with extents above 4 GiB', (t) => {
  const size = 2 ** 41;
  const map = ExtentMap.fromRanges(size, [{ offset: 2 ** 40, length: 512 }], 3, 0);
  const output = Buffer.alloc(statusChunkBytes(3, true));
  const chunk = { flags: 1, contextId: 7 };
  const range = { offset: 0, end: size };
  t.is(writeBlockStatus(output, 0, extended, chunk, map, range), output.length);
  t.deepEqual(
    output,
    hex(`6e8a278c 0001 0006 0102030405060708 0000001122334400 0000000000000038
         00000007 00000003
         0000010000000000 0000000000000000  0000000000000200 0000000000000003
         000000fffffffe00 0000000000000000`),
  );
});

test('golden: option reply', (t) => {
  t.deepEqual(
    encodeReply(7, 0x80000006, Buffer.from('no')),
    hex('0003e889045565a9 00000007 80000006 00000002 6e6f'),
  );
});

test('golden: REP_SERVER', (t) => {
  t.deepEqual(
    encodeServer(3, 'é', 'd'),
    hex('0003e889045565a9 00000003 00000002 00000007 00000002 c3a9 64'),
  );
});

test('golden: INFO_EXPORT is 12 bytes', (t) => {
  t.deepEqual(
    encodeInfoExport(7, 0x1122334455, 0x018f),
    hex('0003e889045565a9 00000007 00000003 0000000c 0000 0000001122334455 018f'),
  );
});

test('golden: INFO_NAME', (t) => {
  t.deepEqual(
    encodeInfoText(6, 1, 'sda'),
    hex('0003e889045565a9 00000006 00000003 00000005 0001 736461'),
  );
});

test('golden: INFO_BLOCK_SIZE', (t) => {
  t.deepEqual(
    encodeInfoBlockSize(7, { minimum: 1, preferred: 4096, maximum: 33_554_432 }),
    hex('0003e889045565a9 00000007 00000003 0000000e 0003 00000001 00001000 02000000'),
  );
});

test('golden: REP_META_CONTEXT', (t) => {
  t.deepEqual(
    encodeMetaContext(10, 3, 'a:b'),
    hex('0003e889045565a9 0000000a 00000004 00000007 00000003 613a62'),
  );
});

test('golden: answer to EXPORT_NAME, with and without zeroes', (t) => {
  const short = hex('0000001122334455 018f');
  t.deepEqual(encodeExportNameAnswer(0x1122334455, 0x018f, false), short);
  const long = Buffer.concat([short, Buffer.alloc(124)]);
  t.deepEqual(encodeExportNameAnswer(0x1122334455, 0x018f, true), long);
});

// ---- decoding

const REQUEST = hex('25609513 0004 0000 0102030405060708 0000001122334455 00001000');

test('golden: request', (t) => {
  t.deepEqual(decodeRequest(REQUEST, 0, false), {
    kind: 'value',
    bytes: 28,
    value: { ...to, flags: 4, type: 0, offset: 0x1122334455, length: 4096 },
  });
  const shifted = Buffer.concat([hex('ffff'), REQUEST]);
  t.deepEqual(decodeRequest(shifted, 2, false), decodeRequest(REQUEST, 0, false));
});

test('a request cut off anywhere needs more', (t) => {
  for (let bytes = 0; bytes < REQUEST.length; bytes += 1) {
    const decoded = decodeRequest(REQUEST.subarray(0, bytes), 0, false);
    t.is(decoded.kind, 'need');
    t.true(decoded.kind === 'need' && decoded.bytes > bytes && decoded.bytes <= 28);
  }
});

test('a wrong request magic is known from its four bytes', (t) => {
  const wrong = Buffer.from(REQUEST);
  wrong[3] = 0;
  for (let bytes = 4; bytes <= wrong.length; bytes += 1) {
    t.is(decodeRequest(wrong.subarray(0, bytes), 0, false).kind, 'violation');
  }
});

const EXTENDED_REQUEST = hex(
  '21e41c71 0020 0007 0102030405060708 0000001122334400 0000000500000000',
);

test('golden: extended request', (t) => {
  t.deepEqual(decodeRequest(EXTENDED_REQUEST, 0, true), {
    kind: 'value',
    bytes: 32,
    value: { ...extended, flags: 0x20, type: 7, offset: 0x1122334400, length: 0x500000000 },
  });
  for (let bytes = 0; bytes < EXTENDED_REQUEST.length; bytes += 1) {
    const decoded = decodeRequest(EXTENDED_REQUEST.subarray(0, bytes), 0, true);
    t.is(decoded.kind, 'need');
    t.true(decoded.kind === 'need' && decoded.bytes > bytes && decoded.bytes <= 32);
  }
});

test('compact and extended requests are never taken for each other', (t) => {
  t.is(decodeRequest(REQUEST, 0, true).kind, 'violation');
  t.is(decodeRequest(EXTENDED_REQUEST, 0, false).kind, 'violation');
});

test('a 64-bit length that is no safe integer is beyond every export', (t) => {
  for (const length of ['0020000000000000', 'ffffffffffffffff']) {
    const input = Buffer.concat([EXTENDED_REQUEST.subarray(0, 24), hex(length)]);
    const decoded = decodeRequest(input, 0, true);
    t.is(decoded.kind === 'value' ? decoded.value.length : 0, BEYOND_ALL_BYTES);
  }
});

test('golden: payload of BLOCK_STATUS', (t) => {
  const payload = hex('0000000500000000 00000007 00000001');
  t.is(statusPayloadBytes(2), payload.length);
  t.deepEqual(decodeStatusPayload(payload), { length: 0x500000000, contextIds: [7, 1] });
});

test('an offset that is no safe integer is beyond every export', (t) => {
  for (const [high, low] of [
    [0x200000, 0],
    [0xffffffff, 0xffffffff],
    [0x80000000, 0],
  ] as const) {
    const input = Buffer.alloc(8);
    input.writeUInt32BE(high, 0);
    input.writeUInt32BE(low, 4);
    t.is(bytesFromWire(input, 0), BEYOND_ALL_BYTES);
  }
});

test('every safe offset survives the wire', (t) => {
  fc.assert(
    fc.property(fc.maxSafeNat(), (bytes) => {
      const output = Buffer.alloc(9);
      bytesToWire(output, bytes, 1);
      t.is(output.readBigUInt64BE(1), BigInt(bytes));
      t.is(bytesFromWire(output, 1), bytes);
    }),
    { examples: [[Number.MAX_SAFE_INTEGER], [0], [0xffffffff], [0x100000000]] },
  );
});

test('client flags', (t) => {
  const input = hex('00000003');
  for (let bytes = 0; bytes < 4; bytes += 1) {
    t.deepEqual(decodeClientFlags(input.subarray(0, bytes)), { kind: 'need', bytes: 4 });
  }
  t.deepEqual(decodeClientFlags(input), { kind: 'value', value: 3, bytes: 4 });
});

const OPTION = hex('49484156454f5054 00000007 00000003 aabbcc');

test('golden: option', (t) => {
  t.deepEqual(decodeOption(OPTION, 3), {
    kind: 'value',
    bytes: 19,
    value: { option: 7, data: hex('aabbcc') },
  });
});

test('an option cut off anywhere needs more', (t) => {
  for (let bytes = 0; bytes < OPTION.length; bytes += 1) {
    const decoded = decodeOption(OPTION.subarray(0, bytes), 100);
    t.is(decoded.kind, 'need');
    t.true(decoded.kind === 'need' && decoded.bytes > bytes && decoded.bytes <= OPTION.length);
  }
});

test('a wrong option magic is known from its eight bytes', (t) => {
  const wrong = Buffer.from(OPTION);
  wrong[7] = 0;
  t.is(decodeOption(wrong.subarray(0, 8), 100).kind, 'violation');
});

test('an option above the limit is known from its header, whatever follows', (t) => {
  t.is(decodeOption(OPTION.subarray(0, 16), 2).kind, 'violation');
  const huge = hex('49484156454f5054 00000007 ffffffff');
  t.is(decodeOption(huge, 65_536).kind, 'violation');
});

const INFO = hex('00000003 736461 0002 0003 0001');

test('golden: INFO and GO', (t) => {
  const decoded = decodeInfoRequest(INFO);
  t.deepEqual(decoded, {
    ok: true,
    value: { exportName: 'sda', information: new Set([3, 1]) },
  });
});

test('INFO and GO cut off anywhere or with trailing bytes are malformed', (t) => {
  for (let bytes = 0; bytes < INFO.length; bytes += 1) {
    t.false(decodeInfoRequest(INFO.subarray(0, bytes)).ok, `${bytes} bytes`);
  }
  t.false(decodeInfoRequest(Buffer.concat([INFO, hex('00')])).ok);
  t.false(decodeInfoRequest(hex('ffffffff 736461 0000')).ok);
});

const META = hex('00000003 736461 00000002 00000005 626173653a 00000000');

test('golden: meta context request', (t) => {
  t.deepEqual(decodeMetaContextRequest(META, 10), {
    ok: true,
    value: { exportName: 'sda', queryCount: 2, queries: ['base:', ''] },
  });
});

test('meta context requests cut off anywhere or with trailing bytes are malformed', (t) => {
  for (let bytes = 0; bytes < META.length; bytes += 1) {
    t.false(decodeMetaContextRequest(META.subarray(0, bytes), 10).ok, `${bytes} bytes`);
  }
  t.false(decodeMetaContextRequest(Buffer.concat([META, hex('00')]), 10).ok);
});

test('no more queries are decoded than the limit', (t) => {
  const many = hex('00000000 ffffffff');
  t.deepEqual(decodeMetaContextRequest(many, 10), {
    ok: true,
    value: { exportName: '', queryCount: 0xffffffff, queries: [] },
  });
});

test('strings are UTF-8 of at most 4,096 bytes', (t) => {
  t.deepEqual(decodeString(Buffer.from('größe')), { ok: true, value: 'größe' });
  t.true(decodeString(Buffer.alloc(4096, 'a')).ok);
  t.false(decodeString(Buffer.alloc(4097, 'a')).ok);
  t.false(decodeString(hex('ff')).ok);
  t.false(decodeString(hex('c3')).ok);
  t.false(decodeString(hex('eda080')).ok, 'a lone surrogate');
  // A byte order mark belongs to the name.
  t.deepEqual(decodeString(hex('efbbbf61')), { ok: true, value: '\uFEFFa' });
});

test('decoding is total: arbitrary bytes throw nothing', (t) => {
  fc.assert(
    fc.property(fc.uint8Array({ maxLength: 80 }), (bytes) => {
      const input = Buffer.from(bytes);
      decodeClientFlags(input);
      decodeOption(input, 64);
      decodeRequest(input, 0, false);
      decodeRequest(input, 0, true);
      decodeInfoRequest(input);
      decodeMetaContextRequest(input, 8);
      decodeString(input);
    }),
    { numRuns: 2000 },
  );
  t.pass();
});
