// SPDX-License-Identifier: Apache-2.0
/** UEFI boot entries, as efivarfs has them: EFI_LOAD_OPTION of the UEFI specification, 3.1.3. */

export interface BootEntry {
  /** Four hexadecimal digits, such as `0001`. */
  readonly number: string;
  readonly description: string;
  readonly active: boolean;
  /** GUID of the GPT partition that it boots from, where it names one. */
  readonly partition: string | null;
  /** The file on it, with backslashes, where it names one. */
  readonly path: string | null;
}

const LOAD_OPTION_ACTIVE = 1;
/** Types of device path nodes, UEFI specification 10.3: type, subtype. */
const MEDIA = 4;
const MEDIA_HARD_DRIVE = 1;
const MEDIA_FILE_PATH = 4;
const END = 0x7f;
/** Attributes of the variable, which efivarfs puts before its data. */
const ATTRIBUTES_BYTES = 4;

function utf16(bytes: Buffer): string {
  const text = bytes.subarray(0, bytes.length & ~1).toString('utf16le');
  const end = text.indexOf('\0');
  return end < 0 ? text : text.slice(0, end);
}

/** A GUID as UEFI stores it: the first three parts little-endian. */
function guid(bytes: Buffer): string {
  const reversed = (start: number, end: number): string =>
    Buffer.from(bytes.subarray(start, end)).reverse().toString('hex');
  const rest = bytes.toString('hex', 8, 16);
  return `${reversed(0, 4)}-${reversed(4, 6)}-${reversed(6, 8)}-${rest.slice(0, 4)}-${rest.slice(4)}`;
}

function readDevicePath(path: Buffer): Pick<BootEntry, 'partition' | 'path'> {
  let partition: string | null = null;
  let file: string | null = null;
  for (let at = 0; at + 4 <= path.length; ) {
    const [type, subtype] = [path[at], path[at + 1]];
    const length = path.readUInt16LE(at + 2);
    if (type === END || length < 4 || at + length > path.length) {
      break;
    }
    const node = path.subarray(at, at + length);
    if (type === MEDIA && subtype === MEDIA_HARD_DRIVE && length >= 42 && node[41] === 2) {
      partition = guid(node.subarray(24, 40));
    } else if (type === MEDIA && subtype === MEDIA_FILE_PATH) {
      file = utf16(node.subarray(4));
    }
    at += length;
  }
  return { partition, path: file };
}

/**
 * Reads a variable `Boot####`.
 *
 * @param content of its file in efivarfs
 * @returns undefined if it is no load option
 */
export function parseBootEntry(number: string, content: Buffer): BootEntry | undefined {
  const option = content.subarray(ATTRIBUTES_BYTES);
  if (option.length < 8) {
    return undefined;
  }
  const attributes = option.readUInt32LE(0);
  const pathLength = option.readUInt16LE(4);
  const description = utf16(option.subarray(6));
  const start = 6 + (description.length + 1) * 2;
  if (start + pathLength > option.length) {
    return undefined;
  }
  return {
    number,
    description,
    active: (attributes & LOAD_OPTION_ACTIVE) !== 0,
    ...readDevicePath(option.subarray(start, start + pathLength)),
  };
}

/** Reads the variable `BootOrder`: numbers of entries in the order in which they are tried. */
export function parseBootOrder(content: Buffer): string[] {
  const order: string[] = [];
  for (let at = ATTRIBUTES_BYTES; at + 2 <= content.length; at += 2) {
    order.push(content.readUInt16LE(at).toString(16).toUpperCase().padStart(4, '0'));
  }
  return order;
}
