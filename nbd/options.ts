// SPDX-License-Identifier: Apache-2.0
/**
 * The bytes of the option haggling phase (section "Option types" and "Option
 * reply types"): requests decoded, replies encoded. No rule of the handshake is
 * decided here.
 */
import {
  EXPORT_NAME_ZEROES_BYTES,
  IHAVEOPT,
  NBD_INFO_BLOCK_SIZE,
  NBD_INFO_EXPORT,
  NBD_MAX_STRING_BYTES,
  NBD_OPTION_REPLY_MAGIC,
  NBD_REP_INFO,
  NBD_REP_META_CONTEXT,
  NBD_REP_SERVER,
} from './constants.ts';
import { bytesToWire } from './units.ts';
import type { Decoded } from './wire.ts';

/** An option as it was sent. */
export interface Option {
  readonly option: number;
  readonly data: Buffer;
}

const OPTION_HEADER_BYTES = 16;
const REPLY_HEADER_BYTES = 20;

/** What an option's data says, or why it is malformed; stays in step either way. */
export type Parsed<T> =
  | { readonly ok: true; readonly value: T }
  | { readonly ok: false; readonly reason: string };

function malformed(reason: string): { readonly ok: false; readonly reason: string } {
  return { ok: false, reason };
}

/** Decodes the client's 32 bits of flags. */
export function decodeClientFlags(input: Buffer): Decoded<number> {
  if (input.length < 4) {
    return { kind: 'need', bytes: 4 };
  }
  return { kind: 'value', value: input.readUInt32BE(0), bytes: 4 };
}

/**
 * Decodes one option. The data is a view of the input, not a copy.
 * ```
 *  0  u64  IHAVEOPT
 *  8  u32  option
 * 12  u32  length of the data
 * 16       data
 * ```
 *
 * @param limitBytes longest data that is accepted
 */
export function decodeOption(input: Buffer, limitBytes: number): Decoded<Option> {
  if (input.length < 8) {
    return { kind: 'need', bytes: 8 };
  }
  // Known from the magic alone: a peer that speaks something else is not waited for.
  if (input.readBigUInt64BE(0) !== IHAVEOPT) {
    return { kind: 'violation', reason: 'option magic is wrong' };
  }
  if (input.length < OPTION_HEADER_BYTES) {
    return { kind: 'need', bytes: OPTION_HEADER_BYTES };
  }
  const length = input.readUInt32BE(12);
  if (length > limitBytes) {
    return { kind: 'violation', reason: 'option is longer than this server accepts' };
  }
  const bytes = OPTION_HEADER_BYTES + length;
  if (input.length < bytes) {
    return { kind: 'need', bytes };
  }
  const data = input.subarray(OPTION_HEADER_BYTES, bytes);
  return { kind: 'value', value: { option: input.readUInt32BE(8), data }, bytes };
}

const utf8 = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true });

/** Decodes a string of the protocol: valid UTF-8 of at most 4,096 bytes. */
export function decodeString(bytes: Buffer): Parsed<string> {
  if (bytes.length > NBD_MAX_STRING_BYTES) {
    return malformed(`string is longer than ${NBD_MAX_STRING_BYTES} bytes`);
  }
  try {
    return { ok: true, value: utf8.decode(bytes) };
  } catch {
    return malformed('string is not valid UTF-8');
  }
}

/** Reads through an option's data; any read beyond its end fails for good. */
class DataReader {
  readonly #data: Buffer;
  #position = 0;
  #fault: string | undefined;

  constructor(data: Buffer) {
    this.#data = data;
  }

  #take(bytes: number): Buffer | undefined {
    if (this.#fault !== undefined || this.#data.length - this.#position < bytes) {
      this.#fault ??= 'option data is too short';
      return undefined;
    }
    this.#position += bytes;
    return this.#data.subarray(this.#position - bytes, this.#position);
  }

  u16(): number {
    return this.#take(2)?.readUInt16BE(0) ?? 0;
  }

  u32(): number {
    return this.#take(4)?.readUInt32BE(0) ?? 0;
  }

  /** A string behind its 32-bit length. */
  string(): string {
    const bytes = this.#take(this.u32());
    if (bytes === undefined) {
      return '';
    }
    const decoded = decodeString(bytes);
    if (!decoded.ok) {
      this.#fault ??= decoded.reason;
      return '';
    }
    return decoded.value;
  }

  /** Why the data is malformed, if it is; trailing bytes are malformed, too. */
  finish(): string | undefined {
    if (this.#fault === undefined && this.#position < this.#data.length) {
      this.#fault = 'option data has trailing bytes';
    }
    return this.#fault;
  }

  get failed(): boolean {
    return this.#fault !== undefined;
  }
}

/** The data of INFO and GO. */
export interface InfoRequest {
  readonly exportName: string;
  readonly information: ReadonlySet<number>;
}

/** Decodes INFO or GO: u32 length, name, u16 count, u16 information type each. */
export function decodeInfoRequest(data: Buffer): Parsed<InfoRequest> {
  const reader = new DataReader(data);
  const exportName = reader.string();
  const count = reader.u16();
  const information = new Set<number>();
  for (let index = 0; index < count && !reader.failed; index += 1) {
    information.add(reader.u16());
  }
  const fault = reader.finish();
  return fault === undefined ? { ok: true, value: { exportName, information } } : malformed(fault);
}

/** The data of LIST_META_CONTEXT and SET_META_CONTEXT. */
export interface MetaContextRequest {
  readonly exportName: string;
  /** The announced number of queries, which may be above what was decoded. */
  readonly queryCount: number;
  readonly queries: readonly string[];
}

/**
 * Decodes a meta context option: u32 length, name, u32 count, then each query
 * behind its u32 length.
 *
 * @param limit most queries that are decoded; with more announced, none is
 */
export function decodeMetaContextRequest(data: Buffer, limit: number): Parsed<MetaContextRequest> {
  const reader = new DataReader(data);
  const exportName = reader.string();
  const queryCount = reader.u32();
  const queries: string[] = [];
  if (queryCount > limit && !reader.failed) {
    return { ok: true, value: { exportName, queryCount, queries } };
  }
  for (let index = 0; index < queryCount && !reader.failed; index += 1) {
    queries.push(reader.string());
  }
  const fault = reader.finish();
  return fault === undefined
    ? { ok: true, value: { exportName, queryCount, queries } }
    : malformed(fault);
}

/**
 * Encodes an option reply.
 * ```
 *  0  u64  NBD_OPTION_REPLY_MAGIC
 *  8  u32  option
 * 12  u32  reply type
 * 16  u32  length of the data
 * 20       data
 * ```
 */
export function encodeReply(option: number, type: number, data: Buffer = Buffer.alloc(0)): Buffer {
  const output = Buffer.allocUnsafe(REPLY_HEADER_BYTES + data.length);
  output.writeBigUInt64BE(NBD_OPTION_REPLY_MAGIC, 0);
  output.writeUInt32BE(option, 8);
  output.writeUInt32BE(type, 12);
  output.writeUInt32BE(data.length, 16);
  data.copy(output, REPLY_HEADER_BYTES);
  return output;
}

/** REP_SERVER: u32 length, name, and a description up to the end. */
export function encodeServer(option: number, name: string, description: string): Buffer {
  const data = Buffer.from(`\0\0\0\0${name}${description}`, 'utf8');
  data.writeUInt32BE(Buffer.byteLength(name), 0);
  return encodeReply(option, NBD_REP_SERVER, data);
}

/** REP_INFO with INFO_EXPORT: u16 type, u64 size, u16 transmission flags. */
export function encodeInfoExport(option: number, sizeBytes: number, flags: number): Buffer {
  const data = Buffer.allocUnsafe(12);
  data.writeUInt16BE(NBD_INFO_EXPORT, 0);
  bytesToWire(data, sizeBytes, 2);
  data.writeUInt16BE(flags, 10);
  return encodeReply(option, NBD_REP_INFO, data);
}

/** REP_INFO with INFO_NAME or INFO_DESCRIPTION: u16 type, text. */
export function encodeInfoText(option: number, type: number, text: string): Buffer {
  const data = Buffer.from(`\0\0${text}`, 'utf8');
  data.writeUInt16BE(type, 0);
  return encodeReply(option, NBD_REP_INFO, data);
}

/** REP_INFO with INFO_BLOCK_SIZE: u16 type, u32 minimum, preferred and maximum size. */
export function encodeInfoBlockSize(
  option: number,
  sizes: { minimum: number; preferred: number; maximum: number },
): Buffer {
  const data = Buffer.allocUnsafe(14);
  data.writeUInt16BE(NBD_INFO_BLOCK_SIZE, 0);
  data.writeUInt32BE(sizes.minimum, 2);
  data.writeUInt32BE(sizes.preferred, 6);
  data.writeUInt32BE(sizes.maximum, 10);
  return encodeReply(option, NBD_REP_INFO, data);
}

/** REP_META_CONTEXT: u32 id, name. */
export function encodeMetaContext(option: number, id: number, name: string): Buffer {
  const data = Buffer.from(`\0\0\0\0${name}`, 'utf8');
  data.writeUInt32BE(id, 0);
  return encodeReply(option, NBD_REP_META_CONTEXT, data);
}

/** The answer to EXPORT_NAME, which has no header: u64 size, u16 flags, perhaps zeroes. */
export function encodeExportNameAnswer(
  sizeBytes: number,
  flags: number,
  withZeroes: boolean,
): Buffer {
  const output = Buffer.alloc(10 + (withZeroes ? EXPORT_NAME_ZEROES_BYTES : 0));
  bytesToWire(output, sizeBytes, 0);
  output.writeUInt16BE(flags, 8);
  return output;
}
