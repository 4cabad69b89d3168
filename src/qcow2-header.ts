// SPDX-License-Identifier: Apache-2.0
/**
 * What a chain must know of a qcow2 file without opening it as an image: its size and
 * what it is on top of. Layout as in QEMU's docs/interop/qcow2.txt.
 *
 *     0  magic "QFI\xfb"            8  offset of the backing file's name
 *     4  version, 2 or 3           16  length of that name, at most 1,023
 *    24  virtual size, bytes       32  encryption, 0 is none
 *    72  incompatible features (version 3): 0 dirty, 1 corrupt, 2 external data file
 *   100  length of the header (version 3), then extensions: type, length, data to 8 bytes
 */

const MAGIC = 0x5146_49fb;
const EXTENSION_BACKING_FORMAT = 0xe279_2aca;
const MAX_NAME_BYTES = 1023;
/** The header with its extensions and the name lies within the first cluster, 64 KiB by default. */
export const QCOW2_HEADER_BYTES = 65_536;

/** A qcow2 file as its header has it. */
export interface Qcow2Header {
  readonly sizeBytes: number;
  /** As it is written there; undefined for none. */
  readonly backing: string | undefined;
  readonly backingFormat: string | undefined;
}

function backingFormatOf(header: Buffer, start: number): string | undefined {
  for (let at = start; at + 8 <= header.length; ) {
    const type = header.readUInt32BE(at);
    const length = header.readUInt32BE(at + 4);
    if (type === 0 || at + 8 + length > header.length) {
      return undefined;
    }
    if (type === EXTENSION_BACKING_FORMAT) {
      return header.toString('utf8', at + 8, at + 8 + length);
    }
    at += 8 + Math.ceil(length / 8) * 8;
  }
  return undefined;
}

/**
 * Reads a header.
 *
 * @param header the file's first {@link QCOW2_HEADER_BYTES}, or all of a smaller one
 * @returns the header, or in one line why the file cannot be part of a chain
 */
export function parseQcow2Header(header: Buffer): Qcow2Header | string {
  if (header.length < 104 || header.readUInt32BE(0) !== MAGIC) {
    return 'it is no qcow2 file';
  }
  const version = header.readUInt32BE(4);
  if (version !== 2 && version !== 3) {
    return `it is qcow2 of version ${version}`;
  }
  if (header.readUInt32BE(32) !== 0) {
    return 'it is encrypted';
  }
  const features = version === 3 ? header.readUInt32BE(76) : 0;
  if ((features & 0b011) !== 0) {
    return 'it was not closed properly, or is corrupt';
  }
  if ((features & 0b100) !== 0) {
    return 'its data is in another file';
  }
  const offset = Number(header.readBigUInt64BE(8));
  const length = header.readUInt32BE(16);
  if (length > MAX_NAME_BYTES || (offset !== 0 && offset + length > header.length)) {
    return 'the name of its backing file is out of place';
  }
  return {
    sizeBytes: Number(header.readBigUInt64BE(24)),
    backing: offset === 0 ? undefined : header.toString('utf8', offset, offset + length),
    backingFormat: backingFormatOf(header, version === 3 ? header.readUInt32BE(100) : 72),
  };
}
