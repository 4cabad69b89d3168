// SPDX-License-Identifier: Apache-2.0
/**
 * The machine's block devices, and what lies on what: partitions on disks, logical
 * volumes on partitions, loop devices on files. Read from sysfs once, then asked.
 */
import { readdir, readFile, readlink, stat } from 'node:fs/promises';
import { basename, dirname, join, resolve } from 'node:path';

/** A device number as text, `254:1`: how sysfs and mountinfo write it. */
export type DeviceNumber = string;

/** A block device. */
export interface BlockDevice {
  readonly number: DeviceNumber;
  /** The kernel's name, such as `vda1` or `dm-0`. */
  readonly kernelName: string;
  /** Path in /dev, by the name that people use: dm devices by that of /dev/mapper. */
  readonly path: string;
  /** Name of its exports unless another is given. */
  readonly diskName: string;
  readonly sizeBytes: number;
  /** Devices directly beneath it: its disk, its parts, its backing file's device. */
  readonly beneath: readonly DeviceNumber[];
  /** The disk that it is a partition of. */
  readonly disk?: DeviceNumber;
  /** Passes requests on, not bios, as dm-multipath does: nobody sees them beneath it. */
  readonly passesRequests?: boolean;
}

/** Text of a device number. */
export function deviceNumber(major: number, minor: number): DeviceNumber {
  return `${major}:${minor}`;
}

/** The device number in a `st_dev` or `st_rdev` of Linux, as makedev(3) puts it together. */
export function splitDeviceNumber(dev: number): DeviceNumber {
  const value = BigInt(dev);
  const major = ((value >> 8n) & 0xfffn) | ((value >> 32n) & 0xfffff000n);
  const minor = (value & 0xffn) | ((value >> 12n) & 0xffffff00n);
  return `${major}:${minor}`;
}

/** Names that may stand in export names, checkpoints and NBD URIs as they are. */
const DISK_NAME = /^[A-Za-z0-9_+-][A-Za-z0-9_.+-]*$/;

/** Whether a text can name a disk. No `@`, which separates the checkpoint in a delta export. */
export function isDiskName(text: string): boolean {
  return DISK_NAME.test(text) && text.length <= 255;
}

function toDiskName(name: string): string {
  const usable = name.replaceAll(/[^A-Za-z0-9_.+-]/g, '-').replace(/^\./, '-');
  return isDiskName(usable) ? usable : 'disk';
}

async function readText(path: string): Promise<string | undefined> {
  try {
    return (await readFile(path, 'utf8')).trimEnd();
  } catch {
    // Attributes come and go with the kind of the device.
    return undefined;
  }
}

async function deviceOfFile(path: string): Promise<DeviceNumber[]> {
  try {
    const status = await stat(path);
    // A loop device may be over a device, too, rather than over a file on one.
    return [splitDeviceNumber(status.isBlockDevice() ? status.rdev : status.dev)];
  } catch {
    // A backing file that was deleted, or is in another mount namespace.
    return [];
  }
}

/** Reads what sysfs says of one device; undefined if it goes meanwhile. */
async function readDevice(sysfs: string, number: string): Promise<BlockDevice | undefined> {
  let folder: string;
  try {
    const link = join(sysfs, 'dev/block', number);
    folder = resolve(dirname(link), await readlink(link));
  } catch {
    return undefined;
  }
  const [uevent, size, dmName, partition, backingFile] = await Promise.all(
    ['uevent', 'size', 'dm/name', 'partition', 'loop/backing_file'].map((name) =>
      readText(join(folder, name)),
    ),
  );
  const kernelName = basename(folder);
  const devName = /^DEVNAME=(.*)$/m.exec(uevent ?? '')?.[1] ?? kernelName.replaceAll('!', '/');
  const parts = await readdir(join(folder, 'slaves')).catch(() => []);
  const beneath = await Promise.all(
    parts.map((name) => readText(join(folder, 'slaves', name, 'dev'))),
  );
  const disk = partition === undefined ? undefined : await readText(join(dirname(folder), 'dev'));
  if (disk !== undefined) {
    beneath.push(disk);
  }
  // Only a device of requests has hardware queues.
  const queues = dmName === undefined ? [] : await readdir(join(folder, 'mq')).catch(() => []);
  if (backingFile !== undefined) {
    beneath.push(...(await deviceOfFile(backingFile)));
  }
  return {
    number,
    kernelName,
    path: dmName === undefined ? `/dev/${devName}` : `/dev/mapper/${dmName}`,
    diskName: toDiskName(dmName ?? kernelName),
    sizeBytes: Number(size ?? 0) * 512,
    beneath: beneath.filter((entry) => entry !== undefined),
    ...(disk === undefined ? {} : { disk }),
    ...(queues.length === 0 ? {} : { passesRequests: true }),
  };
}

/** The devices of a moment. */
export class BlockDevices {
  readonly #devices: ReadonlyMap<DeviceNumber, BlockDevice>;

  constructor(devices: Iterable<BlockDevice>) {
    this.#devices = new Map([...devices].map((device) => [device.number, device]));
  }

  /** @param sysfs where sysfs is mounted */
  static async read(sysfs = '/sys'): Promise<BlockDevices> {
    const numbers = await readdir(join(sysfs, 'dev/block'));
    const devices = await Promise.all(numbers.map((number) => readDevice(sysfs, number)));
    return new BlockDevices(devices.filter((device) => device !== undefined));
  }

  get(number: DeviceNumber): BlockDevice | undefined {
    return this.#devices.get(number);
  }

  /** A device's path, or its number where it has gone. */
  describe(number: DeviceNumber): string {
    return this.get(number)?.path ?? `device ${number}`;
  }

  /** A device and everything beneath it, at any depth. */
  closure(number: DeviceNumber): Set<DeviceNumber> {
    const found = new Set([number]);
    // A set's iteration reaches what is added meanwhile.
    for (const current of found) {
      for (const next of this.get(current)?.beneath ?? []) {
        found.add(next);
      }
    }
    return found;
  }

  /** Whether one device is the other, or lies above or beneath it. */
  related(a: DeviceNumber, b: DeviceNumber): boolean {
    return this.closure(a).has(b) || this.closure(b).has(a);
  }

  /** Whether what lies on one device lies on another at the same time: it is it, or its disk. */
  isOn(number: DeviceNumber, other: DeviceNumber): boolean {
    return number === other || this.get(number)?.disk === other;
  }

  /** The device above one that writes to it unseen, such as the multipath device over a path. */
  unseenWriter(number: DeviceNumber): BlockDevice | undefined {
    return [...this.#devices.values()].find(
      ({ passesRequests, beneath }) =>
        passesRequests === true &&
        beneath.some((path) => this.isOn(path, number) || this.isOn(number, path)),
    );
  }

  /**
   * Sorts things by the devices that they are on: each before everything beneath it.
   * What is unrelated keeps its order.
   */
  topDown<T>(items: readonly T[], numberOf: (item: T) => DeviceNumber): T[] {
    const height = new Map<DeviceNumber, number>();
    const heightOf = (number: DeviceNumber, above: ReadonlySet<DeviceNumber>): number => {
      const known = height.get(number);
      if (known !== undefined) {
        return known;
      }
      // A circle can't be, but must not make this run for ever if it is.
      const path = new Set([...above, number]);
      const beneath = (this.get(number)?.beneath ?? []).filter((next) => !path.has(next));
      const found = Math.max(0, ...beneath.map((next) => heightOf(next, path) + 1));
      height.set(number, found);
      return found;
    };
    return items.toSorted(
      (a, b) => heightOf(numberOf(b), new Set()) - heightOf(numberOf(a), new Set()),
    );
  }
}
