// SPDX-License-Identifier: Apache-2.0
/** Sizes as people write and read them. Units are powers of 1024, as in qemu-img and nbdkit. */

const UNITS: readonly string[] = ['', 'K', 'M', 'G', 'T', 'P'];

/**
 * Reads a size such as `512M`, `2G`, `65536`, `1.5T`, `4KiB`.
 *
 * @returns bytes, or undefined if it is no size, or no whole number of bytes
 */
export function parseSize(text: string): number | undefined {
  const match = /^(\d+(?:\.\d+)?)\s*([KMGTP]?)(?:i?B)?$/i.exec(text.trim());
  if (match === null) {
    return undefined;
  }
  const [, digits = '', unit = ''] = match;
  const exponent = UNITS.indexOf(unit.toUpperCase());
  const bytes = Number(digits) * 1024 ** exponent;
  return Number.isSafeInteger(bytes) ? bytes : undefined;
}

/** Writes a size with three digits or so: `512 MiB`, `1.5 GiB`, `7 B`. */
export function formatSize(bytes: number): string {
  let value = bytes;
  let index = 0;
  while (value >= 1024 && index < UNITS.length - 1) {
    value /= 1024;
    index += 1;
  }
  const digits = Number.isInteger(value) || value >= 100 ? value.toFixed(0) : value.toFixed(1);
  return index === 0 ? `${digits} B` : `${digits} ${UNITS[index]}iB`;
}
