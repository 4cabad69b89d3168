// SPDX-License-Identifier: Apache-2.0
// What QEMU wrote to a disk, as its filter blklogwrites has written it down (the format of
// Linux' dm-log-writes): a superblock of one sector, then per write a header of one sector and
// the data. Nothing in the guest has a part in it.

import { closeSync, fstatSync, openSync, readSync, statSync } from 'node:fs';

const magic = 0x6a736677736872n;
const sectorBytes = 512;
/** Flags of a write: its data is not in the log. */
const discarded = 4n;

export interface LoggedWrite {
  readonly offset: number;
  readonly length: number;
}

/** @returns how long a log is now, bytes: what was written before lies below it */
export function logLength(path: string): number {
  return statSync(path).size;
}

/**
 * Writes of a log, in their order, without those that end beyond `to`.
 *
 * @param from a length that the log had: writes before are left out
 */
export function readWriteLog(
  path: string,
  from = 0,
  to: number = Number.MAX_SAFE_INTEGER,
): LoggedWrite[] {
  const file = openSync(path, 'r');
  try {
    const end = Math.min(fstatSync(file).size, to);
    const header = Buffer.alloc(sectorBytes);
    readSync(file, header, 0, sectorBytes, 0);
    if (header.readBigUInt64LE(0) !== magic || header.readUInt32LE(24) !== sectorBytes) {
      throw new Error(`${path} is no log of writes`);
    }
    const writes: LoggedWrite[] = [];
    let at = sectorBytes;
    while (at + sectorBytes <= end) {
      readSync(file, header, 0, sectorBytes, at);
      const sectors = Number(header.readBigUInt64LE(8));
      const flags = header.readBigUInt64LE(16);
      const next = at + sectorBytes + (flags & discarded ? 0 : sectors * sectorBytes);
      if (sectors > 0 && at >= from && next <= end) {
        writes.push({
          offset: Number(header.readBigUInt64LE(0)) * sectorBytes,
          length: sectors * sectorBytes,
        });
      }
      at = next;
    }
    return writes;
  } finally {
    closeSync(file);
  }
}

/** @returns numbers of the blocks that writes or ranges touch */
export function blocksOf(ranges: readonly LoggedWrite[], blockBytes: number): Set<number> {
  const blocks = new Set<number>();
  for (const { offset, length } of ranges) {
    const end = Math.ceil((offset + length) / blockBytes);
    for (let block = Math.floor(offset / blockBytes); block < end; block += 1) blocks.add(block);
  }
  return blocks;
}
