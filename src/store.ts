// SPDX-License-Identifier: Apache-2.0
/**
 * Difference storage: where the old data of a snapshot goes. A folder, in which we
 * make files without names; a file that is there already; or memory.
 */
import { readFile, stat, statfs } from 'node:fs/promises';
import type { BlockDevices, DeviceNumber } from './block-devices.ts';
import { splitDeviceNumber } from './block-devices.ts';
import { explain, reasonWords, refusalWords, StillblockError, usageError } from './errors.ts';
import {
  createStore,
  isNativeError,
  openStore,
  type StoreFile,
  type StorePiece,
} from './native.ts';
import { formatSize } from './sizes.ts';

const MIB = 1024 * 1024;

/** Of the disks' size, by default: about what changes while a busy server is backed up. */
const FOLDER_SHARE = 0.15;
/** Memory is dearer, and its snapshots are usually short. */
const MEMORY_SHARE = 0.1;
/** Of the room there is, by default; the rest is for growth and others. */
const FREE_SHARE = 0.5;
const FREE_MEMORY_SHARE = 0.25;
/** The smallest store that is worth to begin with, or to grow by, bytes. */
const WORTHWHILE_BYTES = 16 * MIB;
/** What growth leaves free on a file system for others, bytes. */
const RESERVE_BYTES = 64 * MIB;
/** Files are made of whole blocks of any file system that can hold them, bytes. */
const ALIGNMENT = 64 * 1024;
/** The event comes when this part of the first size is left: time to add as much again. */
const WATERMARK_SHARE = 0.25;
const MAX_WATERMARK_BYTES = 1024 * MIB;

/** What the user asked for. */
export interface StoreRequest {
  /** A folder, a file, or `memory`. */
  readonly place: string;
  /** Bytes to begin with; undefined for a sensible share. */
  readonly sizeBytes: number | undefined;
  /** Bytes that it may grow to; undefined for all room of a folder, and no growth else. */
  readonly maxBytes: number | undefined;
}

/** A place that will do, and how much of it is taken at first. */
export type StorePlan =
  | { readonly kind: 'folder'; readonly path: string; readonly sizeBytes: number }
  | { readonly kind: 'file'; readonly path: string; readonly sizeBytes: number }
  | { readonly kind: 'memory'; readonly sizeBytes: number };

function roundUp(bytes: number): number {
  return Math.ceil(bytes / ALIGNMENT) * ALIGNMENT;
}

/**
 * Decides how much store to begin with, if the user does not say.
 *
 * @param originBytes the disks' sizes together
 * @param freeBytes the room there is
 */
export function defaultStoreBytes(
  kind: 'folder' | 'memory',
  originBytes: number,
  freeBytes: number,
): number {
  const [share, freeShare] =
    kind === 'memory' ? [MEMORY_SHARE, FREE_MEMORY_SHARE] : [FOLDER_SHARE, FREE_SHARE];
  const wanted = Math.max(originBytes * share, WORTHWHILE_BYTES);
  return roundUp(Math.min(wanted, freeBytes * freeShare));
}

/**
 * Decides by how much a store grows.
 *
 * @param firstBytes its first size, which it grows by each time
 * @param freeBytes the room there is for it
 * @returns bytes; 0 if what is left is not worth it
 */
export function growthBytes(
  firstBytes: number,
  nowBytes: number,
  maxBytes: number,
  freeBytes: number,
): number {
  const step = Math.min(firstBytes, maxBytes - nowBytes, freeBytes - RESERVE_BYTES);
  return step < Math.min(WORTHWHILE_BYTES, firstBytes) ? 0 : step - (step % ALIGNMENT);
}

async function freeMemoryBytes(): Promise<number> {
  const text = await readFile('/proc/meminfo', 'utf8');
  return Number(/^MemAvailable:\s*(\d+) kB$/m.exec(text)?.[1] ?? 0) * 1024;
}

async function freeBytesIn(folder: string): Promise<number> {
  const { bavail, bsize } = await statfs(folder);
  return bavail * bsize;
}

function refuseOrigin(
  place: string,
  store: DeviceNumber,
  origins: readonly DeviceNumber[],
  devices: BlockDevices,
): void {
  const origin = origins.find((number) => devices.related(store, number));
  if (origin !== undefined) {
    const words = reasonWords('STORE_ON_ORIGIN', place);
    const how =
      origin === store ? '' : ` (${devices.describe(store)} and ${devices.describe(origin)})`;
    throw new StillblockError('STORE_ON_ORIGIN', words.message + how, words.advice);
  }
}

function requireWorthwhile(place: string, sizeBytes: number): number {
  if (sizeBytes < WORTHWHILE_BYTES) {
    throw new StillblockError(
      'STORE_NO_ROOM',
      `store ${place} has too little room left`,
      'free some room, choose another place, or set --store-size',
    );
  }
  return sizeBytes;
}

/**
 * Turns what the user asked for into a place that will do. Nothing is allocated.
 *
 * @throws StillblockError if it lies on, above or beneath an origin, does not exist, or there
 *   is no room
 */
export async function planStore(
  request: StoreRequest,
  origins: readonly { readonly number: DeviceNumber; readonly sizeBytes: number }[],
  devices: BlockDevices,
): Promise<StorePlan> {
  const { place, sizeBytes } = request;
  const originBytes = origins.reduce((sum, origin) => sum + origin.sizeBytes, 0);
  if (place === 'memory') {
    const bytes =
      sizeBytes ??
      requireWorthwhile(place, defaultStoreBytes('memory', originBytes, await freeMemoryBytes()));
    return { kind: 'memory', sizeBytes: bytes };
  }
  try {
    const status = await stat(place);
    const numbers = origins.map(({ number }) => number);
    refuseOrigin(place, splitDeviceNumber(status.dev), numbers, devices);
    if (status.isDirectory()) {
      const bytes =
        sizeBytes ??
        requireWorthwhile(
          place,
          defaultStoreBytes('folder', originBytes, await freeBytesIn(place)),
        );
      return { kind: 'folder', path: place, sizeBytes: roundUp(bytes) };
    }
    if (!status.isFile()) {
      const { message, advice } = refusalWords('NOT_FILE', place);
      throw new StillblockError('STORE_NOT_FILE', message, advice);
    }
    if (request.maxBytes !== undefined) {
      throw usageError(
        '--store-max is for stores that grow, not for a file',
        'name its folder instead, or leave --store-max out',
      );
    }
    if (sizeBytes === undefined && status.size < Math.min(WORTHWHILE_BYTES, originBytes)) {
      const { message, advice } = refusalWords('TOO_SMALL', place);
      throw new StillblockError('STORE_TOO_SMALL', message, advice);
    }
    return { kind: 'file', path: place, sizeBytes: sizeBytes ?? status.size };
  } catch (error) {
    throw explainStore(error, place);
  }
}

function explainStore(error: unknown, place: string): StillblockError {
  const code = error instanceof Error && 'code' in error ? error.code : undefined;
  if (code === 'ENOENT') {
    return new StillblockError(
      'NO_STORE',
      `store ${place} does not exist`,
      'name a folder, make the file with fallocate -l SIZE FILE, or use memory',
      { cause: error },
    );
  }
  if (code === 'EOPNOTSUPP' || code === 'ENOTTY') {
    // No files without names, no preallocation, or no extents to be told.
    const { message, advice } = refusalWords('FILE_SYSTEM', place);
    return new StillblockError('STORE_FILE_SYSTEM', message, advice, { cause: error });
  }
  const refused = isNativeError(error) && error.refusal !== undefined;
  return explain(error, refused ? place : `store ${place}`);
}

/** A store in use. Whoever prepared it closes it, after the snapshot. */
export class Store {
  readonly plan: StorePlan;
  readonly #maxBytes: number;
  readonly #files: StoreFile[] = [];
  #sizeBytes = 0;

  private constructor(plan: StorePlan, maxBytes: number | undefined) {
    this.plan = plan;
    this.#maxBytes = maxBytes ?? (plan.kind === 'folder' ? Number.MAX_SAFE_INTEGER : 0);
  }

  /**
   * Allocates a store to begin with.
   *
   * @returns the store, and the piece for the take
   */
  static async prepare(
    plan: StorePlan,
    maxBytes: number | undefined,
  ): Promise<{ store: Store; piece: StorePiece }> {
    const store = new Store(plan, maxBytes);
    return { store, piece: await store.#allocate(plan.sizeBytes) };
  }

  async #allocate(sizeBytes: number): Promise<StorePiece> {
    const { plan } = this;
    if (plan.kind === 'memory') {
      this.#sizeBytes += sizeBytes;
      return sizeBytes;
    }
    try {
      const make = plan.kind === 'folder' ? createStore : openStore;
      const file = await make(plan.path, sizeBytes);
      this.#files.push(file);
      this.#sizeBytes += sizeBytes;
      return file;
    } catch (error) {
      throw explainStore(error, plan.path);
    }
  }

  get sizeBytes(): number {
    return this.#sizeBytes;
  }

  /** Where it is, for people. */
  get description(): string {
    const place = this.plan.kind === 'memory' ? 'memory' : this.plan.path;
    return `${formatSize(this.#sizeBytes)} in ${place}`;
  }

  /** Free bytes under which the store should be told to grow. */
  get lowWatermarkBytes(): number {
    return Math.min(Math.floor(this.plan.sizeBytes * WATERMARK_SHARE), MAX_WATERMARK_BYTES);
  }

  /**
   * Allocates more of the same.
   *
   * @returns the piece to add, or undefined if the store may not grow, or has no room
   */
  async grow(): Promise<StorePiece | undefined> {
    const { plan } = this;
    if (plan.kind === 'file') {
      return undefined;
    }
    const free = plan.kind === 'memory' ? await freeMemoryBytes() : await freeBytesIn(plan.path);
    const step = growthBytes(plan.sizeBytes, this.#sizeBytes, this.#maxBytes, free);
    return step === 0 ? undefined : await this.#allocate(step);
  }

  /** Gives everything back. The snapshot that used it must be gone. */
  async close(): Promise<void> {
    await Promise.all(this.#files.splice(0).map((file) => file.close()));
  }
}
