// SPDX-License-Identifier: Apache-2.0
/**
 * Offsets and lengths are counted in bytes as JavaScript numbers that are safe
 * integers: exact to 8 PiB, beyond any block device that Linux can address with
 * its page cache, and several times cheaper than a bigint per request. What may
 * not be a safe integer is decided here, once, and the rest of the library
 * calculates without asking again.
 */

/**
 * Stands for every 64-bit offset that is no safe integer. It compares as beyond
 * the end of any export, so validation refuses it without a case of its own.
 */
export const BEYOND_ALL_BYTES: number = Number.POSITIVE_INFINITY;

const HIGH_OF_FIRST_UNSAFE = 0x20_0000;
const TWO_TO_32 = 0x1_0000_0000;

/** Whether a value is a number of bytes or a byte offset: a safe integer, not negative. */
export function isBytes(value: number): boolean {
  return Number.isSafeInteger(value) && value >= 0;
}

/**
 * Requires a number of bytes from our own callers.
 *
 * @param value bytes
 * @param what names the value in the error
 * @throws RangeError if it is negative, not whole, or above 2^53 - 1
 */
export function requireBytes(value: number, what: string): number {
  if (!isBytes(value)) {
    throw new RangeError(`${what} is not a whole number of bytes: ${value}`);
  }
  return value;
}

/** Reads an unsigned 64-bit offset from the wire; {@link BEYOND_ALL_BYTES} if it is not safe. */
export function bytesFromWire(input: Buffer, at: number): number {
  const high = input.readUInt32BE(at);
  if (high >= HIGH_OF_FIRST_UNSAFE) {
    return BEYOND_ALL_BYTES;
  }
  return high * TWO_TO_32 + input.readUInt32BE(at + 4);
}

/** Writes a number of bytes as an unsigned 64-bit value. */
export function bytesToWire(output: Buffer, bytes: number, at: number): void {
  output.writeUInt32BE(Math.floor(bytes / TWO_TO_32), at);
  output.writeUInt32BE(bytes % TWO_TO_32, at + 4);
}
