// SPDX-License-Identifier: Apache-2.0
/**
 * The bytes of the transmission phase and of the greeting (section "Transmission"
 * and "Newstyle negotiation"). All numbers are big-endian. Decoding is total: bytes
 * that cannot be right are a violation, too few bytes a need, and nothing throws.
 */
import {
  IHAVEOPT,
  NBD_EXTENDED_REPLY_MAGIC,
  NBD_EXTENDED_REQUEST_MAGIC,
  NBD_FLAG_FIXED_NEWSTYLE,
  NBD_FLAG_NO_ZEROES,
  NBD_REPLY_TYPE_BLOCK_STATUS,
  NBD_REPLY_TYPE_BLOCK_STATUS_EXT,
  NBD_REPLY_TYPE_ERROR,
  NBD_REPLY_TYPE_ERROR_OFFSET,
  NBD_REPLY_TYPE_NONE,
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

/**
 * Which messages a connection exchanges: compact requests with simple or structured
 * replies, or extended requests and replies.
 */
export type HeaderStyle = 'simple' | 'structured' | 'extended';

/** Eight bytes that we send back and never interpret. */
export interface Opaque64 {
  readonly high: number;
  readonly low: number;
}

/** What a reply repeats of its request. */
export interface ReplyTarget {
  /** The handle with which the client recognises the reply. */
  readonly cookie: Opaque64;
  /** The request's offset, which extended replies repeat; undefined with compact headers. */
  readonly echoedOffset: Opaque64 | undefined;
}

/** A transmission request as it was sent, not yet validated. */
export interface Request extends ReplyTarget {
  readonly flags: number;
  readonly type: number;
  /** Bytes; beyond any export if the 64-bit value is no safe integer. */
  readonly offset: number;
  /** Bytes, 32 bits or, in an extended request, 64, treated like the offset. */
  readonly length: number;
}

export const REQUEST_BYTES = 28;
export const EXTENDED_REQUEST_BYTES = 32;
export const SIMPLE_REPLY_BYTES = 16;
const STRUCTURED_HEADER_BYTES = 20;
const EXTENDED_HEADER_BYTES = 32;
/** What precedes the ids in the payload of a BLOCK_STATUS: the effect length. */
const STATUS_PAYLOAD_HEADER_BYTES = 8;

/** Bytes of the header of each chunk. */
export function chunkHeaderBytes(extended: boolean): number {
  return extended ? EXTENDED_HEADER_BYTES : STRUCTURED_HEADER_BYTES;
}

/** Bytes of the header of an OFFSET_DATA chunk with the offset that starts its payload. */
export function offsetDataHeaderBytes(extended: boolean): number {
  return chunkHeaderBytes(extended) + 8;
}

/** Bytes of one extent of a BLOCK_STATUS or BLOCK_STATUS_EXT chunk. */
export function extentBytes(extended: boolean): number {
  return extended ? 16 : 8;
}

function headerBytesFor(to: ReplyTarget): number {
  return chunkHeaderBytes(to.echoedOffset !== undefined);
}

function opaqueFromWire(input: Buffer, at: number): Opaque64 {
  return { high: input.readUInt32BE(at), low: input.readUInt32BE(at + 4) };
}

function opaqueToWire(output: Buffer, value: Opaque64, at: number): void {
  output.writeUInt32BE(value.high, at);
  output.writeUInt32BE(value.low, at + 4);
}

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
 * Decodes the request that starts at `at`: compact, or extended if that was negotiated.
 * ```
 *  0  u32  NBD_REQUEST_MAGIC     u32  NBD_EXTENDED_REQUEST_MAGIC
 *  4  u16  command flags         u16  command flags
 *  6  u16  type                  u16  type
 *  8  u64  cookie                u64  cookie
 * 16  u64  offset                u64  offset
 * 24  u32  length                u64  length, of the payload with PAYLOAD_LEN
 * ```
 */
export function decodeRequest(input: Buffer, at: number, extended: boolean): Decoded<Request> {
  const magic = extended ? NBD_EXTENDED_REQUEST_MAGIC : NBD_REQUEST_MAGIC;
  const bytes = extended ? EXTENDED_REQUEST_BYTES : REQUEST_BYTES;
  const available = input.length - at;
  // A wrong magic is known from its four bytes: waiting for the rest would wait for ever.
  if (available >= 4 && input.readUInt32BE(at) !== magic) {
    return { kind: 'violation', reason: 'request magic is wrong' };
  }
  if (available < bytes) {
    return { kind: 'need', bytes: available < 4 ? 4 : bytes };
  }
  const value: Request = {
    flags: input.readUInt16BE(at + 4),
    type: input.readUInt16BE(at + 6),
    cookie: opaqueFromWire(input, at + 8),
    echoedOffset: extended ? opaqueFromWire(input, at + 16) : undefined,
    offset: bytesFromWire(input, at + 16),
    length: extended ? bytesFromWire(input, at + 24) : input.readUInt32BE(at + 24),
  };
  return { kind: 'value', value, bytes };
}

/** What the payload of a BLOCK_STATUS asks for. */
export interface StatusPayload {
  /** The effect length, bytes; beyond any export if it is no safe integer. */
  readonly length: number;
  readonly contextIds: readonly number[];
}

/** Bytes of the payload of a BLOCK_STATUS with so many ids. */
export function statusPayloadBytes(ids: number): number {
  return STATUS_PAYLOAD_HEADER_BYTES + 4 * ids;
}

/**
 * Decodes the payload of a BLOCK_STATUS with PAYLOAD_LEN: u64 effect length, then a u32
 * context id each. Its length must be one that {@link statusPayloadBytes} gives.
 */
export function decodeStatusPayload(payload: Buffer): StatusPayload {
  const contextIds: number[] = [];
  for (let at = STATUS_PAYLOAD_HEADER_BYTES; at < payload.length; at += 4) {
    contextIds.push(payload.readUInt32BE(at));
  }
  return { length: bytesFromWire(payload, 0), contextIds };
}

/**
 * Writes a simple reply's header at the start of `output`.
 * ```
 *  0  u32  NBD_SIMPLE_REPLY_MAGIC
 *  4  u32  error
 *  8  u64  cookie
 * ```
 */
export function writeSimpleReply(output: Buffer, to: ReplyTarget, error: NbdError | 0): void {
  output.writeUInt32BE(NBD_SIMPLE_REPLY_MAGIC, 0);
  output.writeUInt32BE(error, 4);
  opaqueToWire(output, to.cookie, 8);
}

/** A simple reply without data. */
export function encodeSimpleReply(to: ReplyTarget, error: NbdError | 0): Buffer {
  const output = Buffer.allocUnsafe(SIMPLE_REPLY_BYTES);
  writeSimpleReply(output, to, error);
  return output;
}

/**
 * Writes the header of a structured or extended reply's chunk at `at`.
 * ```
 *  0  u32  NBD_STRUCTURED_REPLY_MAGIC   u32  NBD_EXTENDED_REPLY_MAGIC
 *  4  u16  chunk flags                  u16  chunk flags
 *  6  u16  type                         u16  type
 *  8  u64  cookie                       u64  cookie
 * 16  u32  length of the payload        u64  offset of the request
 * 24                                    u64  length of the payload
 * ```
 *
 * @returns the position of the payload
 */
function writeChunkHeader(
  output: Buffer,
  at: number,
  to: ReplyTarget,
  chunk: { flags: number; type: number; payloadBytes: number },
): number {
  const { cookie, echoedOffset } = to;
  const extended = echoedOffset !== undefined;
  output.writeUInt32BE(extended ? NBD_EXTENDED_REPLY_MAGIC : NBD_STRUCTURED_REPLY_MAGIC, at);
  output.writeUInt16BE(chunk.flags, at + 4);
  output.writeUInt16BE(chunk.type, at + 6);
  opaqueToWire(output, cookie, at + 8);
  if (extended) {
    opaqueToWire(output, echoedOffset, at + 16);
    bytesToWire(output, chunk.payloadBytes, at + 24);
  } else {
    output.writeUInt32BE(chunk.payloadBytes, at + 16);
  }
  return at + chunkHeaderBytes(extended);
}

/** A chunk without payload: NBD_REPLY_TYPE_NONE, which may only end a reply. */
export function encodeNone(to: ReplyTarget, flags: number): Buffer {
  const output = Buffer.allocUnsafe(headerBytesFor(to));
  writeChunkHeader(output, 0, to, { flags, type: NBD_REPLY_TYPE_NONE, payloadBytes: 0 });
  return output;
}

/** Writes the first {@link offsetDataHeaderBytes} bytes of a chunk with data. */
export function writeOffsetData(
  output: Buffer,
  to: ReplyTarget,
  flags: number,
  offset: number,
  dataBytes: number,
): void {
  const chunk = { flags, type: NBD_REPLY_TYPE_OFFSET_DATA, payloadBytes: 8 + dataBytes };
  bytesToWire(output, offset, writeChunkHeader(output, 0, to, chunk));
}

/** A chunk that stands for zeroes: u64 offset, u32 length. */
export function encodeOffsetHole(
  to: ReplyTarget,
  flags: number,
  offset: number,
  lengthBytes: number,
): Buffer {
  const payloadBytes = 12;
  const output = Buffer.allocUnsafe(headerBytesFor(to) + payloadBytes);
  const chunk = { flags, type: NBD_REPLY_TYPE_OFFSET_HOLE, payloadBytes };
  const at = writeChunkHeader(output, 0, to, chunk);
  bytesToWire(output, offset, at);
  output.writeUInt32BE(lengthBytes, at + 8);
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
  to: ReplyTarget,
  flags: number,
  error: NbdError,
  message: string,
  offset?: number,
): Buffer {
  const text = Buffer.from(message, 'utf8');
  const payloadBytes = 6 + text.length + (offset === undefined ? 0 : 8);
  const output = Buffer.allocUnsafe(headerBytesFor(to) + payloadBytes);
  const type = offset === undefined ? NBD_REPLY_TYPE_ERROR : NBD_REPLY_TYPE_ERROR_OFFSET;
  const at = writeChunkHeader(output, 0, to, { flags, type, payloadBytes });
  output.writeUInt32BE(error, at);
  output.writeUInt16BE(text.length, at + 4);
  text.copy(output, at + 6);
  if (offset !== undefined) {
    bytesToWire(output, offset, at + 6 + text.length);
  }
  return output;
}

/** Bytes of a BLOCK_STATUS or BLOCK_STATUS_EXT chunk with so many extents. */
export function statusChunkBytes(extents: number, extended: boolean): number {
  return chunkHeaderBytes(extended) + (extended ? 8 : 4) + extents * extentBytes(extended);
}

/**
 * Writes a chunk of block status. With structured replies a BLOCK_STATUS: u32 context id,
 * then for each extent u32 length and u32 flags. With extended ones a BLOCK_STATUS_EXT:
 * u32 context id, u32 number of extents, then for each u64 length and u64 flags.
 *
 * @param range `[offset, end)` within the map, with structured replies at most 2^32 - 1 bytes
 * @returns the position behind the chunk
 */
export function writeBlockStatus(
  output: Buffer,
  at: number,
  to: ReplyTarget,
  chunk: { flags: number; contextId: number },
  map: ExtentMap,
  range: { offset: number; end: number },
): number {
  const extended = to.echoedOffset !== undefined;
  const payloadAt = at + chunkHeaderBytes(extended);
  const extentsAt = payloadAt + (extended ? 8 : 4);
  let position = extentsAt;
  for (const { start, end, flags } of map.runs(range.offset, range.end)) {
    if (extended) {
      bytesToWire(output, end - start, position);
      bytesToWire(output, flags, position + 8);
    } else {
      output.writeUInt32BE(end - start, position);
      output.writeUInt32BE(flags, position + 4);
    }
    position += extentBytes(extended);
  }
  const type = extended ? NBD_REPLY_TYPE_BLOCK_STATUS_EXT : NBD_REPLY_TYPE_BLOCK_STATUS;
  writeChunkHeader(output, at, to, {
    flags: chunk.flags,
    type,
    payloadBytes: position - payloadAt,
  });
  output.writeUInt32BE(chunk.contextId, payloadAt);
  if (extended) {
    output.writeUInt32BE((position - extentsAt) / extentBytes(true), payloadAt + 4);
  }
  return position;
}
