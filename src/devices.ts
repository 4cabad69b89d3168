// SPDX-License-Identifier: Apache-2.0
/** Tracked devices: attached, listed, marked and detached. */
import { BlockDevices } from './block-devices.ts';
import {
  blockDeviceAt,
  type Disk,
  type DiskNames,
  deviceNumberOf,
  diskOf,
  requireSeen,
} from './disks.ts';
import { explain, reasonWords, StillblockError, usageError } from './errors.ts';
import type { ControlDevice } from './native.ts';

/** A tracked device as it is told. */
export interface DeviceReport {
  readonly name: string;
  readonly device: string;
  /** Number of the tracker: 64 bits, so as text. */
  readonly tracker: string;
  readonly sizeBytes: number;
  readonly blockSizeBytes: number;
  /** UUID of the change history. */
  readonly generation: string;
  readonly number: number;
  /** Its history was kept over a reboot, and taken up. */
  readonly takenUp: boolean;
  /** Why its history began, by name: a checkpoint from before needs a full copy. */
  readonly began: string;
  /** Why its history will not be kept over the next reboot, by name; `OK` if it will. */
  readonly kept: string;
  readonly writes: number;
  readonly heldWrites: number;
  readonly inSnapshot: boolean;
  readonly resized: boolean;
  readonly gone: boolean;
}

/** @returns what is told of a tracked device */
export function toDeviceReport({ name, path, tracker }: Disk): DeviceReport {
  const { id, sizeBytes, blockSizeBytes, generation, number, takenUp, began, kept } = tracker;
  const { writes, heldWrites, inSnapshot, resized, gone } = tracker;
  return {
    name,
    device: path,
    tracker: String(id),
    sizeBytes,
    blockSizeBytes,
    generation,
    number,
    takenUp,
    began,
    kept,
    writes,
    heldWrites,
    inSnapshot,
    resized,
    gone,
  };
}

/** @returns all tracked devices */
export async function listDisks(control: ControlDevice, names: DiskNames): Promise<Disk[]> {
  const trackers = await control.list();
  const devices = await BlockDevices.read();
  return trackers.map((tracker) => diskOf(tracker, devices, names));
}

/**
 * Attaches all or, if one can't be, none.
 *
 * @param blockSizeBytes unit of change tracking; 0 lets the module choose
 * @returns the trackers' ids
 */
export async function attachAll(
  control: ControlDevice,
  paths: readonly string[],
  blockSizeBytes: number,
): Promise<bigint[]> {
  const attached: bigint[] = [];
  const devices = await BlockDevices.read();
  try {
    for (const path of paths) {
      requireSeen(path, await blockDeviceAt(path), devices);
      try {
        attached.push(await control.attach(path, blockSizeBytes));
      } catch (error) {
        throw explain(error, path);
      }
    }
  } catch (error) {
    for (const id of attached) {
      await control.detach(id);
    }
    throw error;
  }
  return attached;
}

/** A tracked device by its path, or, where that has gone, by its name or path in the list. */
export async function findDisk(disks: readonly Disk[], wanted: string): Promise<Disk> {
  const number = await deviceNumberOf(wanted, disks);
  const disk = disks.find((candidate) => candidate.number === number);
  if (disk === undefined) {
    const { message } = reasonWords('NOT_ATTACHED', wanted);
    throw new StillblockError('NOT_ATTACHED', message, 'see stillblock device list');
  }
  return disk;
}

/** Ends the tracking of all or, if one is in a snapshot, of none. */
export async function detachAll(control: ControlDevice, disks: readonly Disk[]): Promise<void> {
  const held = disks.find(({ tracker }) => tracker.inSnapshot);
  if (held !== undefined) {
    const { message, advice } = reasonWords('IN_SNAPSHOT', held.path);
    throw new StillblockError('IN_SNAPSHOT', message, advice);
  }
  for (const { path, tracker } of disks) {
    try {
      await control.detach(tracker.id);
    } catch (error) {
      throw explain(error, path);
    }
  }
}

/** A range that counts as changed now. */
export interface MarkedRange {
  readonly device: string;
  readonly offset: number;
  readonly length: number;
}

/**
 * Calls a range of a tracked device changed.
 *
 * @param length undefined for all up to the end
 */
export async function markRange(
  control: ControlDevice,
  { path, tracker }: Disk,
  offset: number,
  length: number = tracker.sizeBytes - offset,
): Promise<MarkedRange> {
  if (length <= 0 || offset + length > tracker.sizeBytes) {
    throw usageError(
      `${path} has ${tracker.sizeBytes} bytes, and the range ends at ${offset + length}`,
      'give --offset and --length within the device',
    );
  }
  try {
    await control.mark(tracker.id, offset, length);
  } catch (error) {
    throw explain(error, path);
  }
  return { device: path, offset, length };
}
