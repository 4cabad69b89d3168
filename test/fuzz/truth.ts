// SPDX-License-Identifier: Apache-2.0
/** What the fuzzed server serves, and what is true about it. */

/** One export, as its bytes really are. */
export interface Truth {
  readonly name: string;
  readonly data: Buffer;
  /** For each context of a checkpoint: one byte per sector, 1 if it is dirty. */
  readonly dirty: ReadonlyMap<string, Uint8Array>;
}

export const BASE = 'base:allocation';
export const DIRTY = 'qemu:dirty-bitmap:monday';
export const SECTOR = 512;

/** Whether bytes are all zero. */
export function isZero(bytes: Buffer): boolean {
  return (
    bytes.length === 0 ||
    (bytes[0] === 0 && bytes.compare(bytes, 1, undefined, 0, bytes.length - 1) === 0)
  );
}

/**
 * Why an extent can't be right, if it can't: data called zero, a flag that the context has
 * not, a dirty sector called clean, or the reverse.
 */
export function extentFault(
  truth: Truth,
  context: string,
  offset: number,
  length: number,
  flags: number,
): string | undefined {
  if (context === BASE) {
    if (flags > 3) {
      return `base flags ${flags}`;
    }
    const zero = (flags & 2) !== 0;
    return zero && !isZero(truth.data.subarray(offset, offset + length))
      ? `data at ${offset} called zero`
      : undefined;
  }
  if (flags > 1) {
    return `dirty flags ${flags}`;
  }
  // Flags change at sectors only: its first byte speaks for each.
  for (let at = offset; at < offset + length; at += SECTOR - (at % SECTOR)) {
    if (truth.dirty.get(context)?.[Math.floor(at / SECTOR)] !== flags) {
      return `sector at ${at} is ${flags === 1 ? 'clean' : 'dirty'}`;
    }
  }
  return undefined;
}
