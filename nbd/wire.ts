// SPDX-License-Identifier: Apache-2.0
/**
 * The bytes of the transmission phase and of the greeting (section "Transmission"
 * and "Newstyle negotiation"). All numbers are big-endian. Decoding is total: bytes
 * that cannot be right are a violation, too few bytes a need, and nothing throws.
 */
import {
  IHAVEOPT,
  NBD_FLAG_FIXED_NEWSTYLE,
  NBD_FLAG_NO_ZEROES,
  NBD_REPLY_TYPE_BLOCK_STATUS,
  NBD_REPLY_TYPE_ERROR,
  NBD_REPLY_TYPE_ERROR_OFFSET,
  NBD_REPLY_TYPE_OFFSET_DATA,
  NBD_REPLY_TYPE_OFFSET_HOLE,
  NBD_REQUEST_MAGIC,
  NBD_SIMPLE_REPLY_MAGIC,
  NBD_STRUCTURED_REPLY_MAGIC,
  NBDMAGIC,
} from './constants.ts';
import type { NbdError } from './errors.ts';
import type { ExtentMap } from './extents.ts';
import { bytesFromWire, bytesToWire } from './units.ts';

/** What a decoder makes of the bytes it has. */
export type Decoded<T> =
  /** Nothing yet: call again with at least `bytes` bytes. */
  | { readonly kind: 'need'; readonly bytes: number }
  /** A value, from the first `bytes` bytes. */
  | { readonly kind: 'value'; readonly value: T; readonly bytes: number }
  /** The peer breaks the protocol in a way that no reply can mend. */
  | { readonly kind: 'violation'; readonly reason: string };

/** The handle with which a client recognises a reply: eight bytes that we never interpret. */
export interface Cookie {
  readonly high: number;
  readonly low: number;
}

/** A transmission request as it was sent, not yet validated. */
export interface Request {
  readonly flags: number;
  readonly type: number;
  readonly cookie: Cookie;
  /** Bytes; beyond any export if the 64-bit value is no safe integer. */
  readonly offset: number;
  /** Bytes, 32 bits. */
  readonly length: number;
}

export const REQUEST_BYTES = 28;
export const SIMPLE_REPLY_BYTES = 16;
export const CHUNK_HEADER_BYTES = 20;
/** The header of an OFFSET_DATA chunk with the offset that starts its payload. */
export const OFFSET_DATA_HEADER_BYTES: number = CHUNK_HEADER_BYTES + 8;
const OFFSET_HOLE_BYTES = CHUNK_HEADER_BYTES + 12;
/** One extent of a BLOCK_STATUS chunk. */
export const EXTENT_BYTES = 8;
const STATUS_HEADER_BYTES = CHUNK_HEADER_BYTES + 4;

/**
 * ```
 *  0  u64  NBDMAGIC
 *  8  u64  IHAVEOPT
 * 16  u16  handshake flags
 * ```
 */
export function encodeGreeting(): Buffer {
  const output = Buffer.allocUnsafe(18);
  output.writeBigUInt64BE(NBDMAGIC, 0);
  output.writeBigUInt64BE(IHAVEOPT, 8);
  output.writeUInt16BE(NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES, 16);
  return output;
}

/**
 * Decodes the request that starts at `at`.
 * ```
 *  0  u32  NBD_REQUEST_MAGIC
 *  4  u16  command flags
 *  6  u16  type
 *  8  u64  cookie
 * 16  u64  offset
 * 24  u32  length
 * ```
 */
export function decodeRequest(input: Buffer, at: number): Decoded<Request> {
  const available = input.length - at;
  // A wrong magic is known from its four bytes: waiting for the rest would wait for ever.
  if (available >= 4 && input.readUInt32BE(at) !== NBD_REQUEST_MAGIC) {
    return { kind: 'violation', reason: 'request magic is wrong' };
  }
  if (available < REQUEST_BYTES) {
    return { kind: 'need', bytes: available < 4 ? 4 : REQUEST_BYTES };
  }
  const value: Request = {
    flags: input.readUInt16BE(at + 4),
    type: input.readUInt16BE(at + 6),
    cookie: { high: input.readUInt32BE(at + 8), low: input.readUInt32BE(at + 12) },
    offset: bytesFromWire(input, at + 16),
    length: input.readUInt32BE(at + 24),
  };
  return { kind: 'value', value, bytes: REQUEST_BYTES };
}

/**
 * Writes a simple reply's header at the start of `output`.
 * ```
 *  0  u32  NBD_SIMPLE_REPLY_MAGIC
 *  4  u32  error
 *  8  u64  cookie
 * ```
 */
export function writeSimpleReply(output: Buffer, cookie: Cookie, error: NbdError | 0): void {
  output.writeUInt32BE(NBD_SIMPLE_REPLY_MAGIC, 0);
  output.writeUInt32BE(error, 4);
  output.writeUInt32BE(cookie.high, 8);
  output.writeUInt32BE(cookie.low, 12);
}

/** A simple reply without data. */
export function encodeSimpleReply(cookie: Cookie, error: NbdError | 0): Buffer {
  const output = Buffer.allocUnsafe(SIMPLE_REPLY_BYTES);
  writeSimpleReply(output, cookie, error);
  return output;
}

/**
 * Writes the header of a structured reply's chunk at `at`.
 * ```
 *  0  u32  NBD_STRUCTURED_REPLY_MAGIC
 *  4  u16  chunk flags
 *  6  u16  type
 *  8  u64  cookie
 * 16  u32  length of the payload
 * ```
 */
function writeChunkHeader(
  output: Buffer,
  at: number,
  chunk: { flags: number; type: number; cookie: Cookie; payloadBytes: number },
): void {
  output.writeUInt32BE(NBD_STRUCTURED_REPLY_MAGIC, at);
  output.writeUInt16BE(chunk.flags, at + 4);
  output.writeUInt16BE(chunk.type, at + 6);
  output.writeUInt32BE(chunk.cookie.high, at + 8);
  output.writeUInt32BE(chunk.cookie.low, at + 12);
  output.writeUInt32BE(chunk.payloadBytes, at + 16);
}

/** A chunk without payload: NBD_REPLY_TYPE_NONE, which may only end a reply. */
export function encodeNone(cookie: Cookie, flags: number): Buffer {
  const output = Buffer.allocUnsafe(CHUNK_HEADER_BYTES);
  writeChunkHeader(output, 0, { flags, type: 0, cookie, payloadBytes: 0 });
  return output;
}

/** Writes the first {@link OFFSET_DATA_HEADER_BYTES} bytes of a chunk with data. */
export function writeOffsetData(
  output: Buffer,
  cookie: Cookie,
  flags: number,
  offset: number,
  dataBytes: number,
): void {
  const payloadBytes = 8 + dataBytes;
  writeChunkHeader(output, 0, { flags, type: NBD_REPLY_TYPE_OFFSET_DATA, cookie, payloadBytes });
  bytesToWire(output, offset, CHUNK_HEADER_BYTES);
}

/** A chunk that stands for zeroes: u64 offset, u32 length. */
export function encodeOffsetHole(
  cookie: Cookie,
  flags: number,
  offset: number,
  lengthBytes: number,
): Buffer {
  const output = Buffer.allocUnsafe(OFFSET_HOLE_BYTES);
  writeChunkHeader(output, 0, {
    flags,
    type: NBD_REPLY_TYPE_OFFSET_HOLE,
    cookie,
    payloadBytes: 12,
  });
  bytesToWire(output, offset, CHUNK_HEADER_BYTES);
  output.writeUInt32BE(lengthBytes, CHUNK_HEADER_BYTES + 8);
  return output;
}

/**
 * An error chunk: u32 error, u16 length of the message, the message, and for
 * ERROR_OFFSET a u64 offset.
 *
 * @param message at most 4,096 bytes of UTF-8, for people
 * @param offset where the error happened, bytes; absent when the whole request is refused
 */
export function encodeErrorChunk(
  cookie: Cookie,
  flags: number,
  error: NbdError,
  message: string,
  offset?: number,
): Buffer {
  const text = Buffer.from(message, 'utf8');
  const payloadBytes = 6 + text.length + (offset === undefined ? 0 : 8);
  const output = Buffer.allocUnsafe(CHUNK_HEADER_BYTES + payloadBytes);
  const type = offset === undefined ? NBD_REPLY_TYPE_ERROR : NBD_REPLY_TYPE_ERROR_OFFSET;
  writeChunkHeader(output, 0, { flags, type, cookie, payloadBytes });
  output.writeUInt32BE(error, CHUNK_HEADER_BYTES);
  output.writeUInt16BE(text.length, CHUNK_HEADER_BYTES + 4);
  text.copy(output, CHUNK_HEADER_BYTES + 6);
  if (offset !== undefined) {
    bytesToWire(output, offset, CHUNK_HEADER_BYTES + 6 + text.length);
  }
  return output;
}

/** Bytes of a BLOCK_STATUS chunk with so many extents. */
export function statusChunkBytes(extents: number): number {
  return STATUS_HEADER_BYTES + extents * EXTENT_BYTES;
}

/**
 * Writes a BLOCK_STATUS chunk: u32 context id, then for each extent u32 length
 * and u32 flags.
 *
 * @param range `[offset, end)` within the map, at most 2^32 - 1 bytes long
 * @returns the position behind the chunk
 */
export function writeBlockStatus(
  output: Buffer,
  at: number,
  chunk: { cookie: Cookie; flags: number; contextId: number },
  map: ExtentMap,
  range: { offset: number; end: number },
): number {
  let position = at + STATUS_HEADER_BYTES;
  for (const { start, end, flags } of map.runs(range.offset, range.end)) {
    output.writeUInt32BE(end - start, position);
    output.writeUInt32BE(flags, position + 4);
    position += EXTENT_BYTES;
  }
  const payloadBytes = position - at - CHUNK_HEADER_BYTES;
  writeChunkHeader(output, at, {
    flags: chunk.flags,
    type: NBD_REPLY_TYPE_BLOCK_STATUS,
    cookie: chunk.cookie,
    payloadBytes,
  });
  output.writeUInt32BE(chunk.contextId, at + CHUNK_HEADER_BYTES);
  return position;
}
