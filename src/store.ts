// SPDX-License-Identifier: Apache-2.0
/**
 * Difference storage: where the old data of a snapshot goes. Folders, in which we
 * make files without names; files that are there already; block devices; memory; or
 * several of these together.
 */
import { execFile } from 'node:child_process';
import { readFile, stat, statfs } from 'node:fs/promises';
import type { BlockDevices, DeviceNumber } from './block-devices.ts';
import { splitDeviceNumber } from './block-devices.ts';
import { explain, reasonWords, refusalWords, StillblockError, usageError } from './errors.ts';
import {
  createStore,
  isNativeError,
  nativeConstants,
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
export const FREE_SHARE = 0.5;
const FREE_MEMORY_SHARE = 0.25;
/** The smallest store that is worth to begin with, or to grow by, bytes. */
export const WORTHWHILE_BYTES: number = 16 * MIB;
/** What growth leaves free on a file system for others, bytes. */
const RESERVE_BYTES = 64 * MIB;
/** Files are made of whole blocks of any file system that can hold them, bytes. */
const ALIGNMENT = 64 * 1024;
/** The event comes when this part of the first size is left: time to add as much again. */
const WATERMARK_SHARE = 0.25;
const MAX_WATERMARK_BYTES = 1024 * MIB;

/** What the user asked for. */
export interface StoreRequest {
  /** Folders, files, block devices, `memory`. */
  readonly places: readonly string[];
  /** Bytes of each folder, file and memory to begin with; undefined for a sensible share. */
  readonly sizeBytes: number | undefined;
  /** Bytes that each may grow to; undefined for all room of a folder, and no growth else. */
  readonly maxBytes: number | undefined;
}

/** A place that will do, and how much of it is taken at first. */
export type StorePlan =
  | {
      readonly kind: 'folder';
      readonly path: string;
      readonly sizeBytes: number;
      /** It lies on a disk of the snapshot: what it takes after the instant the image may need. */
      readonly onOrigin: boolean;
    }
  | { readonly kind: 'file'; readonly path: string; readonly sizeBytes: number }
  | { readonly kind: 'device'; readonly path: string; readonly sizeBytes: number }
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

/** Memory that could be had without swapping. */
export async function freeMemoryBytes(): Promise<number> {
  const text = await readFile('/proc/meminfo', 'utf8');
  return Number(/^MemAvailable:\s*(\d+) kB$/m.exec(text)?.[1] ?? 0) * 1024;
}

/** Room on a folder's file system, for root's use left aside. */
export async function freeBytesIn(folder: string): Promise<number> {
  const { bavail, bsize } = await statfs(folder);
  return bavail * bsize;
}

/** A device that the snapshot is to be of. */
export interface Origin {
  readonly number: DeviceNumber;
  readonly sizeBytes: number;
}

/**
 * How a store's device and the origins lie. On an origin itself, the module leaves the
 * store's own place out of the image. Through another device it cannot know that place.
 *
 * @throws StillblockError if one lies above or beneath the other through another device
 */
function isOnOrigin(
  place: string,
  store: DeviceNumber,
  origins: readonly Origin[],
  devices: BlockDevices,
): boolean {
  let found = false;
  for (const { number } of origins) {
    if (devices.isOn(store, number)) {
      found = true;
    } else if (devices.related(store, number)) {
      const names = `${devices.describe(store)} and ${devices.describe(number)}`;
      throw new StillblockError(
        'STORE_ON_ORIGIN',
        `store ${place} lies above or beneath a device of the snapshot (${names})`,
        reasonWords('STORE_ON_ORIGIN', place).advice,
      );
    }
  }
  return found;
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

/** What the device carries, as blkid(8) finds it; undefined if that is nothing. */
function signatureOf(path: string): Promise<string | undefined> {
  const args = ['-p', '-o', 'value', '-s', 'TYPE', '-s', 'PTTYPE', path];
  const env = { ...process.env, PATH: `${process.env['PATH'] ?? ''}:/usr/sbin:/sbin` };
  return new Promise((resolve, reject) => {
    execFile('blkid', args, { env }, (error, stdout) => {
      const code = error === null ? 0 : error.code;
      if (code === 2) {
        resolve(undefined);
      } else if (code === 0 || code === 8) {
        // 8: it looks like several things at once.
        resolve(stdout.trim().replaceAll('\n', ', ') || 'data of several kinds');
      } else {
        reject(error);
      }
    });
  });
}

/** A device is overwritten from its start to its end: nobody shall lose data by a typing error. */
async function planDevice(
  place: string,
  number: DeviceNumber,
  origins: readonly Origin[],
  devices: BlockDevices,
): Promise<StorePlan> {
  if (
    isOnOrigin(place, number, origins, devices) ||
    origins.some((o) => devices.isOn(o.number, number))
  ) {
    const { message, advice } = reasonWords('STORE_ON_ORIGIN', place);
    throw new StillblockError('STORE_ON_ORIGIN', message, advice);
  }
  const signature = await signatureOf(place);
  if (signature !== undefined) {
    throw new StillblockError(
      'STORE_NOT_EMPTY',
      `store ${place} is not empty: it holds ${signature}`,
      `name another device, or run wipefs --all ${place} if nobody needs what is on it`,
    );
  }
  const sizeBytes = devices.get(number)?.sizeBytes ?? 0;
  return { kind: 'device', path: place, sizeBytes: requireWorthwhile(place, sizeBytes) };
}

async function planPlace(
  place: string,
  request: StoreRequest,
  origins: readonly Origin[],
  devices: BlockDevices,
): Promise<StorePlan> {
  const { sizeBytes } = request;
  const originBytes = origins.reduce((sum, origin) => sum + origin.sizeBytes, 0);
  if (place === 'memory') {
    const bytes =
      sizeBytes ??
      requireWorthwhile(place, defaultStoreBytes('memory', originBytes, await freeMemoryBytes()));
    return { kind: 'memory', sizeBytes: bytes };
  }
  const status = await stat(place);
  if (status.isBlockDevice()) {
    return planDevice(place, splitDeviceNumber(status.rdev), origins, devices);
  }
  const onOrigin = isOnOrigin(place, splitDeviceNumber(status.dev), origins, devices);
  if (status.isDirectory()) {
    const bytes =
      sizeBytes ??
      requireWorthwhile(place, defaultStoreBytes('folder', originBytes, await freeBytesIn(place)));
    return { kind: 'folder', path: place, sizeBytes: roundUp(bytes), onOrigin };
  }
  if (!status.isFile()) {
    const { message, advice } = refusalWords('NOT_FILE', place);
    throw new StillblockError('STORE_NOT_FILE', message, advice);
  }
  if (sizeBytes === undefined && status.size < Math.min(WORTHWHILE_BYTES, originBytes)) {
    const { message, advice } = refusalWords('TOO_SMALL', place);
    throw new StillblockError('STORE_TOO_SMALL', message, advice);
  }
  return { kind: 'file', path: place, sizeBytes: sizeBytes ?? status.size };
}

/** Whether a store can become larger than it is at first. */
function canGrow(plan: StorePlan): boolean {
  return plan.kind === 'memory' || (plan.kind === 'folder' && !plan.onOrigin);
}

/**
 * Turns what the user asked for into places that will do. Nothing is allocated.
 *
 * @throws StillblockError if one lies above or beneath an origin, does not exist, has no room, or
 *   is named twice
 */
export async function planStores(
  request: StoreRequest,
  origins: readonly Origin[],
  devices: BlockDevices,
): Promise<StorePlan[]> {
  const { places, sizeBytes, maxBytes } = request;
  const twice = places.find((place, index) => places.indexOf(place) !== index);
  if (twice !== undefined) {
    throw usageError(`store ${twice} is named twice`, 'name each store once');
  }
  const { maxStores } = nativeConstants();
  if (places.length > maxStores) {
    throw usageError(`${places.length} stores are too many`, `name at most ${maxStores}`);
  }
  const plans: StorePlan[] = [];
  for (const place of places) {
    try {
      plans.push(await planPlace(place, request, origins, devices));
    } catch (error) {
      throw explainStore(error, place);
    }
  }
  if (maxBytes !== undefined && !plans.some(canGrow)) {
    throw usageError(
      '--store-max is for stores that grow: memory, and folders on other disks',
      'name such a folder, or leave --store-max out',
    );
  }
  if (sizeBytes !== undefined && plans.every(({ kind }) => kind === 'device')) {
    throw usageError('a device is a store as a whole', 'leave --store-size out');
  }
  return plans;
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

const placeOf = (plan: StorePlan): string => (plan.kind === 'memory' ? 'memory' : plan.path);

/** A store in use. Whoever prepared it closes it, after the snapshot. */
export class Store {
  readonly #plans: readonly StorePlan[];
  readonly #maxBytes: number | undefined;
  readonly #files: StoreFile[] = [];
  /** Bytes of each plan. */
  readonly #sizes = new Map<StorePlan, number>();

  private constructor(plans: readonly StorePlan[], maxBytes: number | undefined) {
    this.#plans = plans;
    this.#maxBytes = maxBytes;
  }

  /**
   * Allocates a store to begin with.
   *
   * @param maxBytes that each part of it may grow to
   * @returns the store, and the pieces for the take, in the order of the plans
   */
  static async prepare(
    plans: readonly StorePlan[],
    maxBytes: number | undefined,
  ): Promise<{ store: Store; pieces: StorePiece[] }> {
    const store = new Store(plans, maxBytes);
    const pieces: StorePiece[] = [];
    try {
      for (const plan of plans) {
        pieces.push(await store.#allocate(plan, plan.sizeBytes));
      }
    } catch (error) {
      await store.close();
      throw error;
    }
    return { store, pieces };
  }

  async #allocate(plan: StorePlan, sizeBytes: number): Promise<StorePiece> {
    const piece = plan.kind === 'memory' ? sizeBytes : await this.#open(plan, sizeBytes);
    this.#sizes.set(plan, (this.#sizes.get(plan) ?? 0) + sizeBytes);
    return piece;
  }

  async #open(plan: Exclude<StorePlan, { kind: 'memory' }>, sizeBytes: number): Promise<StoreFile> {
    try {
      const make = plan.kind === 'folder' ? createStore : openStore;
      const file = await make(plan.path, sizeBytes);
      this.#files.push(file);
      return file;
    } catch (error) {
      throw explainStore(error, plan.path);
    }
  }

  get sizeBytes(): number {
    return [...this.#sizes.values()].reduce((sum, size) => sum + size, 0);
  }

  /** Where it is, for people. */
  get description(): string {
    return this.#plans
      .map((plan) => `${formatSize(this.#sizes.get(plan) ?? 0)} in ${placeOf(plan)}`)
      .join(' and ');
  }

  /** Free bytes under which the store should be told to grow. */
  get lowWatermarkBytes(): number {
    const first = this.#plans.reduce((sum, { sizeBytes }) => sum + sizeBytes, 0);
    return Math.min(Math.floor(first * WATERMARK_SHARE), MAX_WATERMARK_BYTES);
  }

  /**
   * Allocates more of the same, in the first of its places that can grow.
   *
   * @returns the piece to add, or undefined if none may grow, or has room
   */
  async grow(): Promise<StorePiece | undefined> {
    for (const plan of this.#plans.filter(canGrow)) {
      const { now, max, free } = await this.#roomOf(plan);
      const step = growthBytes(plan.sizeBytes, now, max, free);
      if (step > 0) {
        return this.#allocate(plan, step);
      }
    }
    return undefined;
  }

  async #roomOf(plan: StorePlan): Promise<{ now: number; max: number; free: number }> {
    return {
      now: this.#sizes.get(plan) ?? 0,
      max: this.#maxBytes ?? (plan.kind === 'folder' ? Number.MAX_SAFE_INTEGER : 0),
      free: plan.kind === 'folder' ? await freeBytesIn(plan.path) : await freeMemoryBytes(),
    };
  }

  /** Bytes that it can become, if nobody else takes the room. */
  async limitBytes(): Promise<number> {
    let limit = this.sizeBytes;
    for (const plan of this.#plans.filter(canGrow)) {
      const { now, max, free } = await this.#roomOf(plan);
      limit += Math.max(0, Math.min(max - now, free - RESERVE_BYTES));
    }
    return limit;
  }

  /** How much more it can become, as far as that is known now, bytes. */
  async roomBytes(): Promise<number> {
    let room = 0;
    for (const plan of this.#plans.filter(canGrow)) {
      const free = plan.kind === 'folder' ? await freeBytesIn(plan.path) : await freeMemoryBytes();
      const max = this.#maxBytes ?? (plan.kind === 'folder' ? Number.MAX_SAFE_INTEGER : 0);
      room += Math.max(Math.min(max - (this.#sizes.get(plan) ?? 0), free - RESERVE_BYTES), 0);
    }
    return room;
  }

  /** Gives everything back. The snapshot that used it must be gone. */
  async close(): Promise<void> {
    await Promise.all(this.#files.splice(0).map((file) => file.close()));
  }
}
