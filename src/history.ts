// SPDX-License-Identifier: Apache-2.0
/**
 * Where change histories are kept over a reboot: a file or device that the kernel module
 * writes when the machine goes down, and the plan by which an initramfs and udev find
 * both it and the devices to track before anything is mounted.
 */
import { mkdir, open, readFile, rm, stat } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import type { Logger } from 'pino';
import {
  BlockDevices,
  type DeviceNumber,
  deviceNumber,
  splitDeviceNumber,
} from './block-devices.ts';
import type { Configuration } from './configuration.ts';
import type { Disk } from './disks.ts';
import { replaceFile, syncPath } from './durable.ts';
import {
  type ControlDevice,
  isNativeError,
  openStore,
  type PlaceState,
  type StoreFile,
  storeExtents,
} from './native.ts';

/** A header and 64 records, of a page each. */
const PAGE_BYTES = 4096;
const OVERHEAD_BYTES = 65 * PAGE_BYTES;
/** The module's choice of a block: 64 KiB, doubled while the map is above 64 MiB. */
const DEFAULT_BLOCK_BYTES = 65_536;
const MAX_MAP_BYTES = 64 * 1024 * 1024;
/** For devices that are attached by hand: half a TiB of them. */
const SPARE_BYTES = 8 * 1024 * 1024;

/** What of the configuration decides where histories are kept. */
export type HistorySetting = Pick<Configuration, 'folders' | 'history' | 'devices'>;

/** A device as far as its map's size depends on it. */
export interface Mapped {
  readonly sizeBytes: number;
  /** Unit of change tracking; undefined for the module's choice. */
  readonly blockSizeBytes: number | undefined;
}

/** @returns bytes that the map of a device takes: one per block, in whole pages */
export function mapBytes({ sizeBytes, blockSizeBytes }: Mapped): number {
  let block = blockSizeBytes ?? DEFAULT_BLOCK_BYTES;
  while (blockSizeBytes === undefined && Math.ceil(sizeBytes / block) > MAX_MAP_BYTES) {
    block *= 2;
  }
  return Math.ceil(Math.ceil(sizeBytes / block) / PAGE_BYTES) * PAGE_BYTES;
}

const allMapsBytes = (devices: readonly Mapped[]): number =>
  devices.reduce((sum, device) => sum + mapBytes(device), 0);

/** @returns bytes of a place for these devices, each twice as large as it is, and for more */
export function placeBytes(devices: readonly Mapped[]): number {
  return OVERHEAD_BYTES + 2 * allMapsBytes(devices) + SPARE_BYTES;
}

/** The file or device in which histories are kept. */
export function placeOf({ folders, history }: HistorySetting): string {
  return history.place ?? join(folders.state, 'histories');
}

/** The plan; a hook of the initramfs copies it. */
export function planOf({ folders }: HistorySetting): string {
  return join(folders.state, 'boot-plan');
}

/** Makes the file, as far as it is not there or too short. */
async function makeFile(path: string, sizeBytes: number): Promise<void> {
  await mkdir(dirname(path), { recursive: true, mode: 0o700 });
  const file = await open(path, 'a', 0o600);
  try {
    if ((await file.stat()).size < sizeBytes) {
      await file.truncate(sizeBytes);
    }
    await file.sync();
  } finally {
    await file.close();
  }
  await syncPath(dirname(path));
}

/** How long the file has to be at least, and how long it is made. */
interface WantedBytes {
  readonly least: number;
  readonly made: number;
}

async function wantedBytes({ history, devices }: HistorySetting): Promise<WantedBytes> {
  if (history.sizeBytes !== undefined) {
    return { least: history.sizeBytes, made: history.sizeBytes };
  }
  const all = await BlockDevices.read();
  const sizes = await Promise.all(
    devices.map(async ({ path, blockSizeBytes }) => {
      const status = await stat(path).catch(() => undefined);
      const device = status && all.get(splitDeviceNumber(status.rdev));
      return { sizeBytes: device?.sizeBytes ?? 0, blockSizeBytes };
    }),
  );
  return { least: OVERHEAD_BYTES + allMapsBytes(sizes), made: placeBytes(sizes) };
}

/**
 * Makes the file, or makes it longer: then histories go on in memory, and are kept in it as if
 * it were another one.
 *
 * @param now how the place does
 * @returns how it does after that
 */
async function ensureFile(
  control: ControlDevice,
  setting: HistorySetting,
  now: PlaceState,
  log: Logger,
): Promise<PlaceState> {
  const path = placeOf(setting);
  const status = await stat(path).catch(() => undefined);
  if (status?.isBlockDevice() === true) {
    return now;
  }
  const { least, made } = await wantedBytes(setting);
  if (status !== undefined && status.size >= least) {
    return now;
  }
  const after = status !== undefined && now.set ? await letGo(control, setting) : now;
  await makeFile(path, made);
  log.info({ path, bytes: made }, 'the file of the histories is made');
  return after;
}

/** By the plan the rule of udev would set the old place again. */
async function letGo(control: ControlDevice, setting: HistorySetting): Promise<PlaceState> {
  await rm(planOf(setting), { force: true });
  return control.dropPlace();
}

/** What lies there is tried first; an empty place takes its stead where it is no good. */
async function setPlace(control: ControlDevice, file: StoreFile, log: Logger): Promise<PlaceState> {
  try {
    return await control.setPlace(file, false);
  } catch (error) {
    if (!isNativeError(error) || error.refusal === undefined || error.refusal === 'PLACE_ERROR') {
      throw error;
    }
    log.info({ why: error.refusal }, 'the place of the histories is made anew');
    return control.setPlace(file, true);
  }
}

/**
 * Sets the place, or holds it fast. Where another one is set histories go on in memory, and are
 * kept in this one from now on.
 *
 * @param now how it does
 * @param same whether a place that is held is this one
 */
async function hold(
  control: ControlDevice,
  setting: HistorySetting,
  file: StoreFile,
  now: PlaceState,
  same: boolean,
  log: Logger,
): Promise<PlaceState> {
  if (now.set && now.held && same) {
    return now;
  }
  if (now.set && !now.held) {
    try {
      return await control.setPlace(file, false);
    } catch (error) {
      if (!isNativeError(error) || error.reason !== 'PLACE_BUSY') {
        throw error;
      }
      log.warn('the initramfs knows another place of the histories: run update-initramfs -u');
    }
  }
  if (now.set) {
    await letGo(control, setting);
  }
  return setPlace(control, file, log);
}

/** Where the place is, as a line of the plan. */
async function placeLine(control: ControlDevice, file: StoreFile): Promise<string> {
  const where = (await BlockDevices.read()).describe(deviceNumber(file.major, file.minor));
  const extents = storeExtents(file).map(({ offset, length }) => `${offset}:${length}`);
  return `place ${[control.identity(where), ...extents].join(' ')}\n`;
}

/**
 * The plan, in lines of words: where the place is, then each device with the unit of its
 * change tracking. Devices are named by identity, so that it is right in each boot.
 */
async function planText(
  control: ControlDevice,
  { devices }: HistorySetting,
  place: string,
): Promise<string> {
  const lines: string[] = [];
  for (const { path, blockSizeBytes } of devices) {
    const found = await stat(path).then(
      () => true,
      () => false,
    );
    if (found) {
      lines.push(`device ${control.identity(path)} ${blockSizeBytes ?? 0}\n`);
    }
  }
  return place + lines.join('');
}

/**
 * Keeps histories from now on where the configuration says, and writes the plan.
 *
 * @returns how the place does
 * @throws what is in the way
 */
export async function keepHistories(
  control: ControlDevice,
  setting: HistorySetting,
  log: Logger,
): Promise<PlaceState> {
  const now = await control.place();
  if (!setting.history.keep) {
    await rm(planOf(setting), { force: true });
    return now.set ? control.dropPlace() : now;
  }
  const planNow = (): Promise<string> => readFile(planOf(setting), 'utf8').catch(() => '');
  const before = await planNow();
  const made = await ensureFile(control, setting, now, log);
  const file = await openStore(placeOf(setting), 0);
  try {
    const place = await placeLine(control, file);
    const state = await hold(control, setting, file, made, before.startsWith(place), log);
    const plan = await planText(control, setting, place);
    if ((await planNow()) !== plan) {
      await replaceFile(planOf(setting), plan);
      log.info('the devices to track have changed: update-initramfs -u takes them up at boot');
    }
    return state;
  } finally {
    await file.close();
  }
}

/**
 * At a shutdown all writes of devices whose histories are kept are held. A place on one of
 * them is written past that; one above them, as in a file of it that is a loop device, would
 * be held for ever.
 *
 * @param number the device that the place lies on
 * @param kept devices whose histories are kept
 * @returns whether the place lies above one of them, and not on it
 */
export function liesAbove(
  devices: BlockDevices,
  number: DeviceNumber,
  kept: readonly DeviceNumber[],
): boolean {
  const beneath = [...devices.closure(number)].filter((each) => !devices.isOn(number, each));
  return kept.some((each) => beneath.includes(each));
}

/**
 * Keeps histories no longer where the place turns out to lie above a tracked device.
 *
 * @param disks all that are tracked
 */
export async function refuseMisplaced(
  control: ControlDevice,
  setting: HistorySetting,
  disks: readonly Disk[],
  log: Logger,
): Promise<void> {
  const kept = disks.filter(({ tracker }) => tracker.kept === 'OK').map(({ number }) => number);
  const place = placeOf(setting);
  const status = await stat(place).catch(() => undefined);
  if (kept.length === 0 || status === undefined) {
    return;
  }
  const number = splitDeviceNumber(status.isBlockDevice() ? status.rdev : status.dev);
  if (liesAbove(await BlockDevices.read(), number, kept)) {
    await control.refusePlace();
    log.warn({ place }, 'the place of the histories lies above a tracked device: none is kept');
  }
}
