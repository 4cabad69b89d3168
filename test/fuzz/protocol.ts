// SPDX-License-Identifier: Apache-2.0
/**
 * The protocol's numbers and encodings once more, written from the specification
 * (`doc/proto.md` of NetworkBlockDevice/nbd and its extension-ext-header) and apart from
 * the server's own, so that a mistake there is not repeated here.
 */

export const OPT = {
  exportName: 1,
  abort: 2,
  list: 3,
  startTls: 5,
  info: 6,
  go: 7,
  structuredReply: 8,
  listMetaContext: 9,
  setMetaContext: 10,
  extendedHeaders: 11,
} as const;

export const REP = { ack: 1, server: 2, info: 3, metaContext: 4, firstError: 0x8000_0000 } as const;
/** Option errors that the specification knows: UNSUP to EXT_HEADER_REQD. */
export const LAST_OPTION_ERROR = 0x8000_000a;

export const CMD = {
  read: 0,
  write: 1,
  disc: 2,
  flush: 3,
  trim: 4,
  cache: 5,
  writeZeroes: 6,
  blockStatus: 7,
} as const;

export const FLAG = { fua: 1, noHole: 2, df: 4, reqOne: 8, fastZero: 16, payloadLen: 32 } as const;

export const CHUNK = {
  none: 0,
  data: 1,
  hole: 2,
  status: 5,
  statusExt: 6,
  error: 0x8001,
  errorOffset: 0x8002,
} as const;

export const ERR = { ok: 0, perm: 1, io: 5, inval: 22, nospc: 28, overflow: 75 } as const;
/** All that the specification lets a server send ("Error values"). */
export const KNOWN_ERRORS: ReadonlySet<number> = new Set([1, 5, 12, 22, 28, 75, 95, 108]);

export const MAGIC = {
  option: 0x4948_4156_454f_5054n,
  optionReply: 0x0003_e889_0455_65a9n,
  request: 0x2560_9513,
  extendedRequest: 0x21e4_1c71,
  simpleReply: 0x6744_6698,
  chunk: 0x668e_33ef,
  extendedChunk: 0x6e8a_278c,
} as const;

export function optionBytes(option: number, data: Buffer, length: number = data.length): Buffer {
  const header = Buffer.alloc(16);
  header.writeBigUInt64BE(MAGIC.option, 0);
  header.writeUInt32BE(option, 8);
  header.writeUInt32BE(length, 12);
  return Buffer.concat([header, data]);
}

function lengthAndText(text: Buffer): Buffer {
  const length = Buffer.alloc(4);
  length.writeUInt32BE(text.length);
  return Buffer.concat([length, text]);
}

export function infoData(name: string, information: readonly number[]): Buffer {
  const types = Buffer.alloc(2 + 2 * information.length);
  types.writeUInt16BE(information.length);
  for (const [index, type] of information.entries()) {
    types.writeUInt16BE(type, 2 + 2 * index);
  }
  return Buffer.concat([lengthAndText(Buffer.from(name)), types]);
}

export function metaData(name: string, queries: readonly string[]): Buffer {
  const count = Buffer.alloc(4);
  count.writeUInt32BE(queries.length);
  const texts = queries.map((query) => lengthAndText(Buffer.from(query)));
  return Buffer.concat([lengthAndText(Buffer.from(name)), count, ...texts]);
}

/** A request as it goes out, right or wrong. */
export interface WireRequest {
  readonly extended: boolean;
  readonly flags: number;
  readonly type: number;
  readonly cookie: bigint;
  readonly offset: bigint;
  /** 64 bits in extended headers, else 32. */
  readonly length: bigint;
}

export function requestBytes(request: WireRequest): Buffer {
  const bytes = Buffer.alloc(request.extended ? 32 : 28);
  bytes.writeUInt32BE(request.extended ? MAGIC.extendedRequest : MAGIC.request, 0);
  bytes.writeUInt16BE(request.flags, 4);
  bytes.writeUInt16BE(request.type, 6);
  bytes.writeBigUInt64BE(request.cookie, 8);
  bytes.writeBigUInt64BE(request.offset, 16);
  if (request.extended) {
    bytes.writeBigUInt64BE(request.length, 24);
  } else {
    bytes.writeUInt32BE(Number(BigInt.asUintN(32, request.length)), 24);
  }
  return bytes;
}
