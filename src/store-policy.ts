// SPDX-License-Identifier: Apache-2.0
/**
 * Where a snapshot's store comes from if the user does not say, how large it begins,
 * and when it will be full.
 *
 * The first of these that can hold what is expected: a file system that is not in the
 * snapshot, which can grow; a file system of the snapshot, whose store is there before
 * the instant and can't grow, so that it begins twice as large; memory, up to a share
 * of what is free. If none can, that which holds most.
 */
import { constants } from 'node:fs';
import { access, readdir, readFile, stat } from 'node:fs/promises';
import { join } from 'node:path';
import { type BlockDevices, type DeviceNumber, splitDeviceNumber } from './block-devices.ts';
import type { StoreSettings } from './configuration.ts';
import { StillblockError } from './errors.ts';
import { type FileSystem, fileSystemsOn, readFileSystems } from './mounts.ts';
import { formatSize } from './sizes.ts';
import {
  defaultStoreBytes,
  FREE_SHARE,
  freeBytesIn,
  freeMemoryBytes,
  type StoreRequest,
  WORTHWHILE_BYTES,
} from './store.ts';

const SECTOR_BYTES = 512;
/** What a backup reads per second on an ordinary network, bytes: so long is the snapshot held. */
const PULL_BYTES_PER_SECOND = 100 * 1024 * 1024;
const MIN_HELD_SECONDS = 600;
const MAX_HELD_SECONDS = 8 * 3600;
/** Times what is expected: chunks are larger than most writes, and tomorrow is another day. */
const SAFETY = 2;
/** Of the disks, however little was written lately. */
const LEAST_SHARE = 0.01;
/** Times what is expected, where a store can't grow. */
const FIXED_FACTOR = 2;
/** File systems whose files the module can use as a store. */
const STORE_TYPES: ReadonlySet<string> = new Set(['ext4', 'xfs']);

/**
 * Decides how much a store should hold.
 *
 * @param originBytes the disks' sizes together
 * @param bytesPerSecond what is written to them; undefined if that is not known
 * @returns bytes, more than which can't be needed
 */
export function expectedBytes(originBytes: number, bytesPerSecond: number | undefined): number {
  if (bytesPerSecond === undefined) {
    return defaultStoreBytes('folder', originBytes, Number.POSITIVE_INFINITY);
  }
  const held = originBytes / PULL_BYTES_PER_SECOND;
  const seconds = Math.min(Math.max(held, MIN_HELD_SECONDS), MAX_HELD_SECONDS);
  const wanted = Math.max(bytesPerSecond * seconds * SAFETY, originBytes * LEAST_SHARE);
  // Each chunk is copied once at most.
  return Math.ceil(Math.max(Math.min(wanted, originBytes), WORTHWHILE_BYTES));
}

/** A folder that could hold a store. */
export interface Candidate {
  readonly path: string;
  readonly freeBytes: number;
  /** It lies on a disk of the snapshot. */
  readonly onOrigin: boolean;
}

/** A decision, and why it is so. */
export interface StoreChoice {
  readonly request: StoreRequest;
  readonly why: string;
}

interface Option extends StoreChoice {
  /** How much of what it needs it can hold. */
  readonly share: number;
}

function folderOption(
  { path, freeBytes, onOrigin }: Candidate,
  expected: number,
  settings: StoreSettings,
): Option {
  const wanted = expected * (onOrigin ? FIXED_FACTOR : 1);
  const room = freeBytes * FREE_SHARE;
  const size = settings.sizeBytes ?? Math.floor(Math.min(wanted, room));
  const where = onOrigin ? 'on a disk of the snapshot' : 'not in the snapshot';
  return {
    request: {
      places: [path],
      sizeBytes: size,
      maxBytes: onOrigin ? undefined : settings.maxBytes,
    },
    why: `${path} is ${where} and has ${formatSize(freeBytes)} free`,
    share: size < WORTHWHILE_BYTES || size > freeBytes ? 0 : Math.min(1, room / wanted),
  };
}

function memoryOption(memoryBytes: number, expected: number, settings: StoreSettings): Option {
  const size = Math.min(settings.sizeBytes ?? expected, memoryBytes);
  const max = Math.max(size, Math.min(settings.maxBytes ?? memoryBytes, memoryBytes));
  return {
    request: { places: ['memory'], sizeBytes: size, maxBytes: max },
    why: `no file system has the room; ${formatSize(memoryBytes)} of memory may be used`,
    share: size < WORTHWHILE_BYTES ? 0 : Math.min(1, memoryBytes / expected),
  };
}

/**
 * Decides where the store comes from.
 *
 * @param expected bytes that it should hold
 * @param candidates folders, one for each file system
 * @param memoryBytes memory that may be used
 * @throws StillblockError if there is no room for any store
 */
export function decideStore(
  settings: StoreSettings,
  expected: number,
  candidates: readonly Candidate[],
  memoryBytes: number,
): StoreChoice {
  const byRoom = candidates.toSorted((a, b) => b.freeBytes - a.freeBytes);
  const options = [
    ...byRoom.filter(({ onOrigin }) => !onOrigin),
    ...byRoom.filter(({ onOrigin }) => onOrigin),
  ].map((candidate) => folderOption(candidate, expected, settings));
  options.push(memoryOption(Math.floor(memoryBytes), expected, settings));
  const best =
    options.find(({ share }) => share === 1) ??
    options.reduce((a, b) => (b.share > a.share ? b : a));
  if (best.share === 0) {
    throw new StillblockError(
      'STORE_NO_ROOM',
      `no file system has room for a store of ${formatSize(expected)}, nor has memory`,
      'free some room, or name a folder or device with <store> or --store',
    );
  }
  return { request: best.request, why: best.why };
}

/** A folder of a file system in which files can be made; undefined if there is none. */
async function writableFolder({ number, mounts }: FileSystem): Promise<string | undefined> {
  for (const { mountPoint } of mounts) {
    try {
      const status = await stat(mountPoint);
      await access(mountPoint, constants.W_OK);
      // Another file system may be mounted over it, and a single file may be a mount, too.
      if (status.isDirectory() && splitDeviceNumber(status.dev) === number) {
        return mountPoint;
      }
    } catch {
      // Read-only, or out of reach.
    }
  }
  return undefined;
}

/** Whether the module can know which chunks of the origins a store there would take. */
function isPlain(
  { devices: own }: FileSystem,
  origins: readonly DeviceNumber[],
  devices: BlockDevices,
): boolean {
  return origins.every((origin) =>
    own.every((number) => devices.isOn(number, origin) || !devices.related(number, origin)),
  );
}

/** The file systems that could hold a store. */
async function findCandidates(
  origins: readonly DeviceNumber[],
  devices: BlockDevices,
): Promise<Candidate[]> {
  const fileSystems = await readFileSystems(devices);
  const touched = new Set(fileSystemsOn(origins, fileSystems, devices));
  const candidates: Candidate[] = [];
  for (const fileSystem of fileSystems) {
    const { type, devices: own } = fileSystem;
    if (STORE_TYPES.has(type) && own.length > 0 && isPlain(fileSystem, origins, devices)) {
      const path = await writableFolder(fileSystem);
      if (path !== undefined) {
        const freeBytes = await freeBytesIn(path);
        candidates.push({ path, freeBytes, onOrigin: touched.has(fileSystem) });
      }
    }
  }
  return candidates;
}

/** Of places that the user has named, only the size is decided. */
async function sizePlaces(settings: StoreSettings, expected: number): Promise<StoreRequest> {
  const { places, sizeBytes, maxBytes } = settings;
  const statuses = await Promise.all(places.map((place) => stat(place).catch(() => undefined)));
  const folders = places.filter((_, index) => statuses[index]?.isDirectory());
  if (folders.length === 0) {
    return { places, sizeBytes: undefined, maxBytes: undefined };
  }
  const free = await Promise.all(folders.map(freeBytesIn));
  const room = Math.min(...free) * FREE_SHARE;
  const each = Math.max(expected / folders.length, WORTHWHILE_BYTES);
  return { places, sizeBytes: sizeBytes ?? Math.floor(Math.min(each, room)), maxBytes };
}

/**
 * Decides where the store of a snapshot comes from, on this machine and now.
 *
 * @param bytesPerSecond what is written to the origins; undefined if that is not known
 * @returns what `planStores` takes, and why
 * @throws StillblockError if there is no room for any store
 */
export async function chooseStore(
  settings: StoreSettings,
  origins: readonly { readonly number: DeviceNumber; readonly sizeBytes: number }[],
  devices: BlockDevices,
  bytesPerSecond: number | undefined,
): Promise<StoreChoice> {
  const originBytes = origins.reduce((sum, { sizeBytes }) => sum + sizeBytes, 0);
  const expected = expectedBytes(originBytes, bytesPerSecond);
  if (settings.places.length > 0) {
    const request = await sizePlaces(settings, expected);
    return { request, why: 'the configuration names it' };
  }
  const numbers = origins.map(({ number }) => number);
  const candidates = await findCandidates(numbers, devices);
  const memoryBytes = (await freeMemoryBytes()) * settings.memoryShare;
  return decideStore(settings, expected, candidates, memoryBytes);
}

/** How long samples are kept, milliseconds: an hour, in which backups differ little. */
const HISTORY_MS = 3_600_000;
/** The busiest span of this length counts, milliseconds. */
const SPAN_MS = 300_000;
/** Less than this says nothing, milliseconds. */
const LEAST_SPAN_MS = 10_000;

/** A value of something that changes over time. */
export interface Sample {
  readonly atMs: number;
  readonly bytes: number;
}

/**
 * The highest average rate over any span of the samples.
 *
 * @param samples of a counter, in the order of time; where it falls it began anew
 * @returns bytes per second; undefined if the samples are too few to say
 */
export function highestRate(samples: readonly Sample[], spanMs: number): number | undefined {
  let highest: number | undefined;
  let first = 0;
  for (const [index, sample] of samples.entries()) {
    const previous = samples[index - 1];
    if (previous !== undefined && sample.bytes < previous.bytes) {
      first = index;
    }
    // The latest sample that is a whole span before; if there is none, the first.
    while (sample.atMs - (samples[first + 1]?.atMs ?? Number.POSITIVE_INFINITY) >= spanMs) {
      first += 1;
    }
    const since = samples[first];
    if (since !== undefined && sample.atMs - since.atMs >= LEAST_SPAN_MS) {
      const rate = ((sample.bytes - since.bytes) * 1000) / (sample.atMs - since.atMs);
      highest = Math.max(highest ?? 0, rate);
    }
  }
  return highest;
}

/** What was written lately, by device. Call {@link sample} every ten seconds or so. */
export class WriteHistory {
  readonly #sysfs: string;
  readonly #samples = new Map<DeviceNumber, Sample[]>();

  /** @param sysfs where sysfs is mounted */
  constructor(sysfs = '/sys') {
    this.#sysfs = sysfs;
  }

  /** @param atMs now, by a clock that never goes back */
  async sample(atMs: number): Promise<void> {
    const folder = join(this.#sysfs, 'dev/block');
    const numbers: readonly string[] = await readdir(folder).catch(() => []);
    for (const number of this.#samples.keys()) {
      if (!numbers.includes(number)) {
        this.#samples.delete(number);
      }
    }
    await Promise.all(
      numbers.map(async (number) => {
        const text = await readFile(join(folder, number, 'stat'), 'utf8').catch(() => '');
        // Sectors written are the seventh field (Documentation/block/stat.rst).
        const sectors = Number(text.trim().split(/\s+/)[6]);
        if (Number.isSafeInteger(sectors)) {
          const earlier = this.#samples.get(number) ?? [];
          const recent = earlier.filter((sample) => atMs - sample.atMs < HISTORY_MS);
          this.#samples.set(number, [...recent, { atMs, bytes: sectors * SECTOR_BYTES }]);
        }
      }),
    );
  }

  /**
   * What is written to devices in their busiest minutes of the last hour. Each counts, also
   * where one lies on the other: each has an image of its own.
   *
   * @returns bytes per second; undefined if one has not been watched for long enough
   */
  bytesPerSecond(numbers: readonly DeviceNumber[]): number | undefined {
    let sum: number | undefined = 0;
    for (const number of numbers) {
      const rate = highestRate(this.#samples.get(number) ?? [], SPAN_MS);
      sum = sum === undefined || rate === undefined ? undefined : sum + rate;
    }
    return sum;
  }
}

/** How far back the use of a store tells how it goes on, milliseconds. */
const FORECAST_SPAN_MS = 120_000;

/**
 * Forecasts when a store will be full, if it fills as it did lately.
 *
 * @param uses bytes used, in the order of time
 * @param limitBytes bytes that it can become
 * @returns seconds from the last of them; undefined if it does not fill, or that is not known
 */
export function forecastOverflow(uses: readonly Sample[], limitBytes: number): number | undefined {
  const last = uses.at(-1);
  if (last === undefined) {
    return undefined;
  }
  if (last.bytes >= limitBytes) {
    return 0;
  }
  // The latest that is a whole span before the last; if there is none, the first.
  const index = uses.findLastIndex(({ atMs }) => last.atMs - atMs >= FORECAST_SPAN_MS);
  const since = uses[Math.max(index, 0)];
  if (since === undefined || last.atMs <= since.atMs || last.bytes <= since.bytes) {
    return undefined;
  }
  const bytesPerMs = (last.bytes - since.bytes) / (last.atMs - since.atMs);
  return (limitBytes - last.bytes) / bytesPerMs / 1000;
}
