// SPDX-License-Identifier: Apache-2.0
/** What is served: sources of data, and the exports that a disk and its checkpoints make. */
import { close, constants, fstat, open, read, type Stats } from 'node:fs';
import { readFile } from 'node:fs/promises';
import { promisify } from 'node:util';
import type { Bandwidth } from './bandwidth.ts';
import {
  BASE_ALLOCATION,
  DIRTY_BITMAP_PREFIX,
  NBD_MAX_STRING_BYTES,
  NBD_STATE_DIRTY,
  NBD_STATE_HOLE,
  SECTOR_BYTES,
} from './constants.ts';
import { type Extent, ExtentMap } from './extents.ts';

/** Immutable bytes at offsets. Several exports may share one; who opened it closes it. */
export interface BlockSource {
  /** Bytes; does not change. */
  readonly sizeBytes: number;
  /**
   * The open file whose bytes these are, if they are one's, for engines that read it themselves;
   * `forgets` says that the page cache is to forget what was read.
   */
  readonly descriptor?: { readonly fd: number; readonly forgets: boolean };
  /**
   * Fills the whole buffer from `offset`, within the size. Reads may run in parallel.
   *
   * @throws Error with an errno name in `code`, such as `EIO`; never a partial result
   */
  read(buffer: Uint8Array, offset: number): Promise<void>;
  /** Releases the source once the reads in flight have ended. Later reads reject with EBADF. */
  close(): Promise<void>;
}

/** What one export name stands for. */
export interface Export {
  /** At most 4,096 bytes of UTF-8; may be empty, which is the default export. */
  readonly name: string;
  /** For people, at most 4,096 bytes of UTF-8; may be empty. */
  readonly description: string;
  readonly source: BlockSource;
  /** Contexts by full name, such as `base:allocation`; maps of the source's size. */
  readonly contexts: ReadonlyMap<string, ExtentMap>;
  /** Caps that its data passes, in this order. */
  readonly bandwidth?: readonly Bandwidth[];
}

function failure(code: string, message: string): Error {
  return Object.assign(new Error(message), { code });
}

/**
 * Lets the page cache forget ranges of a descriptor's device. What fails is not told: it is
 * a courtesy to others.
 */
export type ForgetCached = (descriptor: number, ranges: readonly Extent[]) => Promise<void>;

/** How much is read before the page cache is asked to forget it, bytes: calls cost, too. */
const FORGET_BYTES = 4 * 1024 * 1024;
/** The page cache forgets only whole folios, which are no larger than this on x86. */
const FOLIO_BYTES = 2 * 1024 * 1024;
/** With more ranges than this one for all of them costs less. */
const FORGET_RANGES = 16;

/** Remembers what was read and has it forgotten, in ranges that are worth a call. */
class Forgetting {
  readonly #descriptor: number;
  readonly #forget: ForgetCached;
  #ranges: Extent[] = [];
  #bytes = 0;
  #running: Promise<void> = Promise.resolve();

  constructor(descriptor: number, forget: ForgetCached) {
    this.#descriptor = descriptor;
    this.#forget = forget;
  }

  /** Takes a range that has been read. */
  onRead(offset: number, length: number): void {
    const last = this.#ranges.at(-1);
    if (last !== undefined && last.offset + last.length === offset) {
      this.#ranges.splice(-1, 1, { offset: last.offset, length: last.length + length });
    } else {
      this.#ranges.push({ offset, length });
    }
    this.#bytes += length;
    if (this.#bytes >= FORGET_BYTES) {
      this.#flush();
    }
  }

  #flush(): void {
    const ranges = this.#ranges;
    const start = Math.min(...ranges.map(({ offset }) => offset));
    const end = Math.max(...ranges.map(({ offset, length }) => offset + length));
    const fewer = ranges.length > FORGET_RANGES ? [{ offset: start, length: end - start }] : ranges;
    const whole = fewer.map(({ offset, length }) => {
      const extra = offset % FOLIO_BYTES;
      return { offset: offset - extra, length: length + extra };
    });
    this.#ranges = [];
    this.#bytes = 0;
    // One after the other: they are no hurry, and the pool has other work.
    this.#running = this.#running.then(() => this.#forget(this.#descriptor, whole)).catch(() => {});
  }

  /** Has the rest forgotten, and waits for all of it. */
  finish(): Promise<void> {
    if (this.#bytes > 0) {
      this.#flush();
    }
    return this.#running;
  }
}

class FileSource implements BlockSource {
  readonly sizeBytes: number;
  readonly descriptor: { readonly fd: number; readonly forgets: boolean };
  readonly #descriptor: number;
  readonly #forgetting: Forgetting | undefined;
  #reads = 0;
  #closed: Promise<void> | undefined;
  #whenIdle: (() => void) | undefined;

  constructor(descriptor: number, sizeBytes: number, forgetting: Forgetting | undefined) {
    this.#descriptor = descriptor;
    this.descriptor = { fd: descriptor, forgets: forgetting !== undefined };
    this.sizeBytes = sizeBytes;
    this.#forgetting = forgetting;
  }

  read(buffer: Uint8Array, offset: number): Promise<void> {
    if (this.#closed !== undefined) {
      return Promise.reject(failure('EBADF', 'source is closed'));
    }
    this.#reads += 1;
    return new Promise((resolve, reject) => {
      const finish = (error: Error | undefined): void => {
        this.#forgetting?.onRead(offset, buffer.length);
        this.#reads -= 1;
        if (this.#reads === 0) {
          this.#whenIdle?.();
        }
        if (error === undefined) {
          resolve();
        } else {
          reject(error);
        }
      };
      const readFrom = (done: number): void => {
        const rest = buffer.length - done;
        read(this.#descriptor, buffer, done, rest, offset + done, (error, bytesRead) => {
          if (error !== null) {
            finish(error);
          } else if (bytesRead === rest) {
            finish(undefined);
          } else if (bytesRead === 0) {
            finish(failure('EIO', 'source ends before its size'));
          } else {
            readFrom(done + bytesRead);
          }
        });
      };
      readFrom(0);
    });
  }

  close(): Promise<void> {
    this.#closed ??= this.#close();
    return this.#closed;
  }

  async #close(): Promise<void> {
    if (this.#reads > 0) {
      // A descriptor closed under a read could be another file's by the time it is used.
      await new Promise<void>((resolve) => {
        this.#whenIdle = resolve;
      });
    }
    await this.#forgetting?.finish();
    await promisify(close)(this.#descriptor);
  }
}

/** Size of a block device, bytes, as the kernel's own table has it, in sectors of 512 bytes. */
async function blockDeviceBytes(device: number): Promise<number> {
  const major = (device >>> 8) & 0xfff;
  const minor = (device & 0xff) | ((device >>> 12) & 0xfff00);
  const sectors = await readFile(`/sys/dev/block/${major}:${minor}/size`, 'utf8');
  return Number(sectors.trim()) * 512;
}

function sizeOf(stats: Stats): Promise<number> {
  if (stats.isFile()) {
    return Promise.resolve(stats.size);
  }
  if (stats.isBlockDevice()) {
    return blockDeviceBytes(stats.rdev);
  }
  return Promise.reject(failure('EINVAL', 'neither a plain file nor a block device'));
}

/**
 * Opens a plain file or a block device, read only.
 *
 * @param forget has what was read of a block device forgotten again, so that reading it all
 *   does not push out of the page cache what others use
 * @throws Error with an errno name in `code`; `EINVAL` for anything else than a file or device
 */
export async function openFileSource(path: string, forget?: ForgetCached): Promise<BlockSource> {
  // Without O_NONBLOCK, opening a FIFO would wait for its writer. Files and devices ignore it.
  const flags = constants.O_RDONLY | constants.O_NONBLOCK;
  const descriptor = await new Promise<number>((resolve, reject) => {
    open(path, flags, (error, fd) => (error === null ? resolve(fd) : reject(error)));
  });
  try {
    const stats = await promisify(fstat)(descriptor);
    const forgetting =
      forget !== undefined && stats.isBlockDevice()
        ? new Forgetting(descriptor, forget)
        : undefined;
    return new FileSource(descriptor, await sizeOf(stats), forgetting);
  } catch (error) {
    await promisify(close)(descriptor);
    throw error;
  }
}

/** A disk to be exported. */
export interface DiskOptions {
  readonly name: string;
  readonly description: string;
  readonly source: BlockSource;
  /**
   * Flags of `base:allocation`, which change at whole sectors of 512 bytes only;
   * without it all is said to be data.
   */
  readonly allocation?: ExtentMap;
  /** Caps that the data of all its exports passes together. */
  readonly bandwidth?: readonly Bandwidth[];
  /** Checkpoints with what changed since. */
  readonly checkpoints: readonly {
    readonly name: string;
    readonly dirty: readonly Extent[];
    /** Tracking block to which the dirty ranges are rounded outward, bytes; else a sector. */
    readonly blockSizeBytes?: number;
  }[];
}

/** A client that believes the start of a sector must not be misled about its end. */
function requireSectors(map: ExtentMap): void {
  for (let index = 0; index < map.runCount; index += 1) {
    const start = map.startOf(index);
    if (start % SECTOR_BYTES !== 0) {
      throw new RangeError(`flags change at byte ${start}, within a sector`);
    }
  }
}

/**
 * The exports of one disk: its image with `base:allocation` and one
 * `qemu:dirty-bitmap:CHECKPOINT` each, then one delta export `NAME@CHECKPOINT`
 * per checkpoint. A delta export has the image's data, but its `base:allocation`
 * marks what did not change a hole that need not read as zeroes: a copy on top of
 * an older image takes only the changes, any other copy takes everything.
 *
 * @throws RangeError if a range or a map does not fit the source, or not to sectors
 */
export function diskExports(options: DiskOptions): [Export, ...Export[]] {
  const { name, description, source, bandwidth = [] } = options;
  const allocation = options.allocation ?? ExtentMap.uniform(source.sizeBytes, 0);
  requireSectors(allocation);
  const contexts = new Map([[BASE_ALLOCATION, allocation]]);
  const deltas: Export[] = [];
  for (const { name: checkpoint, dirty, blockSizeBytes = SECTOR_BYTES } of options.checkpoints) {
    const changed = ExtentMap.fromRanges(
      source.sizeBytes,
      dirty,
      NBD_STATE_DIRTY,
      0,
      blockSizeBytes,
    );
    requireSectors(changed);
    contexts.set(`${DIRTY_BITMAP_PREFIX}${checkpoint}`, changed);
    const delta = ExtentMap.combine(allocation, changed, (allocated, dirtyFlags) =>
      dirtyFlags === NBD_STATE_DIRTY ? allocated : NBD_STATE_HOLE,
    );
    deltas.push({
      name: `${name}@${checkpoint}`,
      description: `${description || name}: changes since checkpoint ${checkpoint}`,
      source,
      contexts: new Map([[BASE_ALLOCATION, delta]]),
      bandwidth,
    });
  }
  return [{ name, description, source, contexts, bandwidth }, ...deltas];
}

function isProtocolString(text: string): boolean {
  const bytes = Buffer.from(text, 'utf8');
  return bytes.length <= NBD_MAX_STRING_BYTES && bytes.toString('utf8') === text;
}

/**
 * Requires an export that can be served as the protocol has it.
 *
 * @throws RangeError that says what is wrong with it
 */
export function requireExport(candidate: Export): void {
  const quoted = JSON.stringify(candidate.name);
  for (const text of [candidate.name, candidate.description, ...candidate.contexts.keys()]) {
    if (!isProtocolString(text)) {
      throw new RangeError(
        `export ${quoted}: name, description and contexts are at most ` +
          `${NBD_MAX_STRING_BYTES} bytes of valid Unicode`,
      );
    }
  }
  for (const [name, map] of candidate.contexts) {
    if (map.sizeBytes !== candidate.source.sizeBytes) {
      throw new RangeError(
        `export ${quoted}: context ${name} describes ${map.sizeBytes} bytes ` +
          `of ${candidate.source.sizeBytes}`,
      );
    }
  }
}
