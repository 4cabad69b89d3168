// SPDX-License-Identifier: Apache-2.0
/** Which file systems are mounted, on which devices, and a descriptor on each to freeze it. */
import { constants } from 'node:fs';
import { type FileHandle, open, readdir, readFile, stat } from 'node:fs/promises';
import { type BlockDevices, type DeviceNumber, splitDeviceNumber } from './block-devices.ts';
import { StillblockError } from './errors.ts';

/** One line of mountinfo (proc_pid_mountinfo(5)). */
export interface Mount {
  readonly id: number;
  /** `st_dev` of the superblock: an anonymous number on btrfs. */
  readonly number: DeviceNumber;
  readonly mountPoint: string;
  readonly type: string;
  /** What was mounted: usually the device's path. */
  readonly source: string;
}

/** Space, tab, newline and backslash are written as octal numbers. */
function unescapeField(field: string): string {
  return field.replaceAll(/\\([0-7]{3})/g, (_, octal: string) =>
    String.fromCharCode(Number.parseInt(octal, 8)),
  );
}

/** Reads the text of a mountinfo file; lines that make no sense are left out. */
export function parseMountinfo(text: string): Mount[] {
  const mounts: Mount[] = [];
  for (const line of text.split('\n')) {
    // Optional fields of unknown number end with a lone hyphen.
    const [before, after] = line.split(' - ', 2);
    const [id, , number, , mountPoint] = before?.split(' ') ?? [];
    const [type, source] = after?.split(' ') ?? [];
    if (number !== undefined && mountPoint !== undefined && type !== undefined) {
      mounts.push({
        id: Number(id),
        number,
        mountPoint: unescapeField(mountPoint),
        type,
        source: unescapeField(source ?? ''),
      });
    }
  }
  return mounts;
}

/** A mounted file system: its superblock, and everywhere that it is mounted. */
export interface FileSystem {
  readonly number: DeviceNumber;
  readonly type: string;
  readonly mounts: readonly Mount[];
  /** The devices that it lies on directly; none for those in memory or on the network. */
  readonly devices: readonly DeviceNumber[];
}

/**
 * Groups mounts by file system: bind mounts and subvolumes of one are frozen once.
 *
 * @param devicesOf the devices of a file system whose number is no device's
 */
export async function groupMounts(
  mounts: readonly Mount[],
  devices: BlockDevices,
  devicesOf: (mount: Mount) => Promise<readonly DeviceNumber[]>,
): Promise<FileSystem[]> {
  const groups = new Map<DeviceNumber, Mount[]>();
  for (const mount of mounts) {
    groups.set(mount.number, [...(groups.get(mount.number) ?? []), mount]);
  }
  const fileSystems: FileSystem[] = [];
  for (const [number, group] of groups) {
    const [first] = group;
    if (first !== undefined) {
      const own = devices.get(number) === undefined ? await devicesOf(first) : [number];
      fileSystems.push({ number, type: first.type, mounts: group, devices: own });
    }
  }
  return fileSystems;
}

/** The block devices that a mount's source names, as bcachefs does with colons between them. */
async function sourceDevices(source: string): Promise<DeviceNumber[]> {
  const paths = source.split(':').filter((path) => path.startsWith('/'));
  const found = await Promise.all(paths.map((path) => stat(path).catch(() => undefined)));
  return found
    .filter((status) => status?.isBlockDevice() === true)
    .map((status) => splitDeviceNumber(status?.rdev ?? 0));
}

/** The devices of a file system whose superblock has a number of its own. */
async function anonymousDevices({ source, type }: Mount): Promise<readonly DeviceNumber[]> {
  const named = await sourceDevices(source);
  if (type !== 'btrfs') {
    return named;
  }
  // Only one device of a btrfs is named, but all of them hold it.
  const root = '/sys/fs/btrfs';
  for (const uuid of await readdir(root).catch(() => [])) {
    const names = await readdir(`${root}/${uuid}/devices`).catch(() => []);
    const numbers = await Promise.all(
      names.map((name) => readFile(`${root}/${uuid}/devices/${name}/dev`, 'utf8').catch(() => '')),
    );
    const members = numbers.map((number) => number.trim());
    if (named.some((number) => members.includes(number))) {
      return members;
    }
  }
  return named;
}

/** The file systems that this process sees. */
export async function readFileSystems(devices: BlockDevices): Promise<FileSystem[]> {
  const text = await readFile('/proc/self/mountinfo', 'utf8');
  return groupMounts(parseMountinfo(text), devices, anonymousDevices);
}

/**
 * The file systems on some devices or on anything above them, such as on a
 * partition of a disk or on a volume over that; top down.
 */
export function fileSystemsOn(
  origins: Iterable<DeviceNumber>,
  fileSystems: readonly FileSystem[],
  devices: BlockDevices,
): FileSystem[] {
  const wanted = new Set(origins);
  const lies = (number: DeviceNumber): boolean =>
    [...devices.closure(number)].some((beneath) => wanted.has(beneath));
  const touched = fileSystems.filter((fileSystem) => fileSystem.devices.some(lies));
  return devices.topDown(touched, (fileSystem) => fileSystem.devices[0] ?? fileSystem.number);
}

/** The id of the mount that an open file is on: other mounts may hide the one that was meant. */
async function mountIdOf(handle: FileHandle): Promise<number> {
  const text = await readFile(`/proc/self/fdinfo/${handle.fd}`, 'utf8');
  return Number(/^mnt_id:\s*(\d+)$/m.exec(text)?.[1]);
}

/**
 * Opens a file system by the first of its mount points that is not hidden. Mounted
 * read-only it is opened and frozen all the same: that costs nothing, and it cannot
 * become writable in the meantime.
 *
 * @throws StillblockError if all are hidden
 */
export async function openFileSystem(fileSystem: FileSystem): Promise<FileHandle> {
  for (const { id, mountPoint } of fileSystem.mounts) {
    let handle: FileHandle;
    try {
      handle = await open(mountPoint, constants.O_RDONLY | constants.O_NONBLOCK);
    } catch {
      continue;
    }
    if ((await mountIdOf(handle)) === id) {
      return handle;
    }
    await handle.close();
  }
  const place = fileSystem.mounts.map(({ mountPoint }) => mountPoint).join(', ');
  throw new StillblockError(
    'FILE_SYSTEM_HIDDEN',
    `the file system mounted at ${place} cannot be reached to freeze it`,
    'unmount what is mounted over it, then try again',
  );
}
