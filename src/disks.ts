// SPDX-License-Identifier: Apache-2.0
/** Which tracked devices a command means, and how they are called. */
import { stat } from 'node:fs/promises';
import {
  type BlockDevices,
  type DeviceNumber,
  deviceNumber,
  isDiskName,
  splitDeviceNumber,
} from './block-devices.ts';
import { explain, explainControl, reasonWords, StillblockError, usageError } from './errors.ts';
import { ControlDevice, isNativeError, nativeConstants, type Tracker } from './native.ts';

/** A tracked device under the name that its exports and checkpoints have. */
export interface Disk {
  readonly name: string;
  readonly number: DeviceNumber;
  /** For people. */
  readonly path: string;
  readonly tracker: Tracker;
}

/** A device as the user names it. */
export interface DiskRequest {
  /** Name of the export; undefined for the default. */
  readonly name: string | undefined;
  /** A path, or the name of a tracked device. */
  readonly path: string;
  /** Undefined for the disk's name. */
  readonly exportName?: string;
  /** Also calls the changes `qemu:dirty-bitmap:` and this. */
  readonly exportBitmap?: string | undefined;
  /** A checkpoint since which its changes must be known; null for none, undefined for that of all. */
  readonly incremental?: string | null;
}

/** Reads `[NAME=]DEV`. A path may contain `=` itself. */
export function parseDiskRequest(text: string): DiskRequest {
  const equals = text.indexOf('=');
  if (equals < 0 || text.startsWith('/') || text.startsWith('.')) {
    return { name: undefined, path: text };
  }
  const name = text.slice(0, equals);
  if (!isDiskName(name)) {
    throw usageError(
      `${JSON.stringify(name)} cannot name a disk`,
      "use letters, digits, '_', '-', '+' and '.', not first",
    );
  }
  return { name, path: text.slice(equals + 1) };
}

/**
 * The device that a path leads to.
 *
 * @throws StillblockError if there is none, or it is no block device
 */
export async function blockDeviceAt(path: string): Promise<DeviceNumber> {
  const status = await stat(path).catch((error: unknown) => {
    throw explain(error, path);
  });
  if (!status.isBlockDevice()) {
    const { message, advice } = reasonWords('NOT_BLOCK_DEVICE', path);
    throw new StillblockError('NOT_BLOCK_DEVICE', message, advice);
  }
  return splitDeviceNumber(status.rdev);
}

/**
 * Refuses a device that is written to from above, past the place where writes are seen:
 * a path of a multipath device. The kernel module cannot know.
 *
 * @throws StillblockError that names the device to track in its stead
 */
export function requireSeen(path: string, number: DeviceNumber, devices: BlockDevices): void {
  const above = devices.unseenWriter(number);
  if (above !== undefined) {
    throw new StillblockError(
      'MULTIPATH_PATH',
      `${path} is a path of the multipath device ${above.path}, whose writes cannot be seen there`,
      `attach ${above.path} instead`,
    );
  }
}

/** Names that the configuration gives to devices. */
export type DiskNames = ReadonlyMap<DeviceNumber, string>;

/** @returns a tracked device under its configured or default name */
export function diskOf(tracker: Tracker, devices: BlockDevices, names?: DiskNames): Disk {
  const number = deviceNumber(tracker.major, tracker.minor);
  const device = devices.get(number);
  return {
    name: names?.get(number) ?? device?.diskName ?? number.replace(':', '-'),
    number,
    path: devices.describe(number),
    tracker,
  };
}

/**
 * The number of the device that a path leads to or, where that has gone or is none, of the
 * tracked device of that name or path in the list.
 *
 * @throws StillblockError as {@link blockDeviceAt} if there is neither
 */
export async function deviceNumberOf(
  wanted: string,
  tracked: readonly Disk[],
): Promise<DeviceNumber> {
  const named = tracked.find(({ name, path }) => name === wanted || path === wanted);
  return blockDeviceAt(wanted).catch((error: unknown) => {
    if (named === undefined) {
      throw error;
    }
    return named.number;
  });
}

/**
 * Chooses tracked devices, top down, as a snapshot takes them.
 *
 * @param wanted devices and names; all tracked ones if there are none
 * @throws StillblockError if one is not tracked or named twice, two names are the same, or one
 *   has become a path of a multipath device
 */
export function chooseDisks(
  trackers: readonly Tracker[],
  devices: BlockDevices,
  wanted: readonly (DiskRequest & { readonly number: DeviceNumber })[],
  names?: DiskNames,
): Disk[] {
  const tracked = trackers.map((tracker) => diskOf(tracker, devices, names));
  if (tracked.length === 0) {
    throw new StillblockError(
      'NOTHING_TRACKED',
      'no device is tracked',
      'run stillblock device attach DEV first',
    );
  }
  const chosen = wanted.map(({ name, number, path }) => {
    const disk = tracked.find((candidate) => candidate.number === number);
    if (disk === undefined) {
      const words = reasonWords('NOT_ATTACHED', path);
      throw new StillblockError('NOT_ATTACHED', words.message, words.advice);
    }
    return { ...disk, name: name ?? disk.name };
  });
  const disks = devices.topDown(wanted.length === 0 ? tracked : chosen, ({ number }) => number);
  for (const [index, disk] of disks.entries()) {
    requireSeen(disk.path, disk.number, devices);
    const other = disks.slice(0, index).find(({ name }) => name === disk.name);
    const same = disks.slice(0, index).find(({ number }) => number === disk.number);
    if (same !== undefined) {
      throw usageError(`${disk.path} is named twice`, 'name each device once');
    }
    if (other !== undefined) {
      throw usageError(
        `${other.path} and ${disk.path} would both be called ${disk.name}`,
        'name them with --disk NAME=DEV',
      );
    }
  }
  return disks;
}

/**
 * Opens the control device of a module that this program can talk to.
 *
 * @throws StillblockError if it is not loaded, of another version, or one may not
 */
export function openControl(): ControlDevice {
  let control: ControlDevice;
  try {
    control = ControlDevice.open();
  } catch (error) {
    throw isNativeError(error) ? explainControl(error, nativeConstants().device) : error;
  }
  try {
    const { abi, version } = control.info();
    if (abi !== nativeConstants().abi) {
      throw new StillblockError(
        'MODULE_VERSION',
        `the kernel module that is loaded (${version}, interface ${abi}) is of another version`,
        'install the module that belongs to this stillblock, then run rmmod stillblock and modprobe stillblock',
      );
    }
    return control;
  } catch (error) {
    control.close();
    throw isNativeError(error) ? explainControl(error, nativeConstants().device) : error;
  }
}
