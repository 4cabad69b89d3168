// SPDX-License-Identifier: Apache-2.0
// A kernel's image without its compression, since an emulated processor takes half of a boot's
// time to undo it. Linux' Documentation/arch/x86/boot.rst describes the header, and QEMU starts
// what is within by the note of the PVH boot protocol.

import { execFileSync } from 'node:child_process';
import { existsSync, readFileSync, renameSync, writeFileSync } from 'node:fs';

/** Offsets in the image. */
const setupSectors = 0x1f1;
const payloadOffset = 0x248;
const payloadLength = 0x24c;
const sectorBytes = 512;
/** The length of what is within follows it. */
const trailerBytes = 4;
/** Longest image; those of today have 70 MB. */
const maxBytes = 512 << 20;

const tools: readonly { readonly magic: Buffer; readonly command: readonly string[] }[] = [
  { magic: Buffer.from('fd377a585a00', 'hex'), command: ['xz', '-dc'] },
  { magic: Buffer.from('28b52ffd', 'hex'), command: ['zstd', '-qdc'] },
];

/** XEN_ELFNOTE_PHYS32_ENTRY: its type, then its name. */
const pvhNote = Buffer.from('1200000058656e00', 'hex');

/** @returns the kernel within an image; undefined where QEMU could not start it */
function decompress(image: Buffer): Buffer | undefined {
  const from =
    (image.readUInt8(setupSectors) + 1) * sectorBytes + image.readUInt32LE(payloadOffset);
  const payload = image.subarray(from, from + image.readUInt32LE(payloadLength) - trailerBytes);
  const tool = tools.find(({ magic }) => payload.subarray(0, magic.length).equals(magic));
  if (tool === undefined) return undefined;
  const [program = '', ...args] = tool.command;
  const kernel = execFileSync(program, args, { input: payload, maxBuffer: maxBytes });
  return kernel.includes(pvhNote) ? kernel : undefined;
}

/**
 * @param image a bzImage
 * @param plain where the kernel within it is kept, once it was made
 * @returns what QEMU is to start
 */
export function plainKernel(image: string, plain: string): string {
  if (existsSync(plain)) return plain;
  const kernel = decompress(readFileSync(image));
  if (kernel === undefined) return image;
  // Another test may do the same at this moment.
  const fresh = `${plain}.${process.pid}`;
  writeFileSync(fresh, kernel);
  renameSync(fresh, plain);
  return plain;
}
