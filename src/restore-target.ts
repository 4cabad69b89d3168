// SPDX-License-Identifier: Apache-2.0
/** Finds out what a restore must know of a target. Nothing is written. */
import { execFile } from 'node:child_process';
import { constants, type Stats } from 'node:fs';
import { type FileHandle, open, readdir, readFile, realpath, stat } from 'node:fs/promises';
import { basename, dirname, join, resolve } from 'node:path';
import { BlockDevices, type DeviceNumber, splitDeviceNumber } from './block-devices.ts';
import { explain, StillblockError } from './errors.ts';
import { parseSwaps } from './layout.ts';
import { fileSystemsOn, readFileSystems } from './mounts.ts';
import type { TargetFacts } from './restore-plan.ts';

const FILE_SECTOR_BYTES = 512;

function codeOf(error: unknown): string | undefined {
  return error instanceof Error && 'code' in error ? String(error.code) : undefined;
}

/** What a tool says; nothing where it fails. */
function ask(tool: string, ...args: string[]): Promise<string> {
  return new Promise((done) => {
    const env = {
      ...process.env,
      LC_ALL: 'C',
      PATH: `${process.env['PATH'] ?? ''}:/usr/sbin:/sbin`,
    };
    execFile(tool, args, { env, timeout: 20_000 }, (_error, stdout) => done(stdout));
  });
}

/** What is on a device and its partitions, in words. */
async function contentsOf(path: string): Promise<string> {
  const words: string[] = [];
  const own = await ask('wipefs', '--noheadings', '--output', 'TYPE,LABEL', path);
  const signatures = own.split('\n').map((line) => line.trim().replaceAll(/\s+/g, ' '));
  words.push(...new Set(signatures.filter((line) => line !== '')));
  const table = await ask('sfdisk', '--json', path);
  if (table !== '') {
    const { partitiontable } = JSON.parse(table) as { partitiontable: { partitions?: object[] } };
    words.push(`${partitiontable.partitions?.length ?? 0} partitions`);
  }
  return words.join(', ');
}

async function namesIn(folder: string): Promise<string[]> {
  return readdir(folder).catch(() => []);
}

/** Names of what is on top of a device or one of its partitions, apart from those. */
async function holdersOf(sysfs: string): Promise<string[]> {
  const found = await namesIn(join(sysfs, 'holders'));
  for (const name of await namesIn(sysfs)) {
    if ((await namesIn(join(sysfs, name))).includes('partition')) {
      found.push(...(await namesIn(join(sysfs, name, 'holders'))));
    }
  }
  return [...new Set(found)];
}

/** Loop devices over a file, or over a device or a part of it. */
async function loopsOver(isTarget: (backing: Stats) => boolean): Promise<string[]> {
  const names = (await namesIn('/sys/block')).filter((name) => name.startsWith('loop'));
  const found = await Promise.all(
    names.map(async (name) => {
      const attribute = `/sys/block/${name}/loop/backing_file`;
      const path = (await readFile(attribute, 'utf8').catch(() => '')).trimEnd();
      const backing = path === '' ? undefined : await stat(path).catch(() => undefined);
      return backing !== undefined && isTarget(backing) ? [name] : [];
    }),
  );
  return found.flat();
}

async function isSwappedTo(number: DeviceNumber, devices: BlockDevices): Promise<boolean> {
  for (const path of parseSwaps(await readFile('/proc/swaps', 'utf8').catch(() => ''))) {
    const status = await stat(path).catch(() => undefined);
    const own = status?.isBlockDevice() ? splitDeviceNumber(status.rdev) : undefined;
    if (own !== undefined && devices.closure(own).has(number)) {
      return true;
    }
  }
  return false;
}

/** Whether a loop device shows a file of the chain. */
async function isLoopOf(sysfs: string, folder: string): Promise<boolean> {
  const backing = await readFile(join(sysfs, 'loop/backing_file'), 'utf8').catch(() => undefined);
  return backing !== undefined && dirname(backing.trim()) === folder;
}

type Opening = 'free' | 'held' | 'read-only';

async function tryOpen(path: string): Promise<Opening> {
  let handle: FileHandle;
  try {
    handle = await open(path, constants.O_RDWR | constants.O_EXCL | constants.O_NONBLOCK);
  } catch (error) {
    switch (codeOf(error)) {
      case 'EBUSY':
        return 'held';
      case 'EROFS':
        return 'read-only';
      default:
        throw explain(error, path);
    }
  }
  await handle.close();
  return 'free';
}

async function deviceFacts(path: string, rdev: number, folder: string): Promise<TargetFacts> {
  const number = splitDeviceNumber(rdev);
  const devices = await BlockDevices.read();
  const sysfs = join('/sys/dev/block', number);
  const fileSystems = fileSystemsOn([number], await readFileSystems(devices), devices);
  const mounts = fileSystems.flatMap((fileSystem) => fileSystem.mounts);
  const chainFileSystem = splitDeviceNumber((await stat(folder)).dev);
  const device = devices.get(number);
  const isPartition = device?.disk !== undefined;
  const disk = isPartition ? await realpath(sysfs).then(dirname) : sysfs;
  const sector = await readFile(join(disk, 'queue/logical_block_size'), 'utf8').catch(() => '512');
  const readOnly = (await readFile(join(sysfs, 'ro'), 'utf8').catch(() => '0')).trim() === '1';
  const opening = await tryOpen(path);
  const loops = await loopsOver((backing) => {
    const other = backing.isBlockDevice() ? splitDeviceNumber(backing.rdev) : undefined;
    return other !== undefined && (devices.isOn(other, number) || devices.isOn(number, other));
  });
  return {
    path,
    kind: isPartition ? 'partition' : 'device',
    id: number,
    sizeBytes: device?.sizeBytes ?? 0,
    sectorBytes: Number(sector.trim()),
    mountPoints: mounts.map(({ mountPoint }) => mountPoint),
    holders: [...(await holdersOf(sysfs)), ...loops],
    swap: await isSwappedTo(number, devices),
    held: opening === 'held',
    readOnly: readOnly || opening === 'read-only',
    isSource:
      fileSystems.some((fileSystem) => fileSystem.number === chainFileSystem) ||
      (await isLoopOf(sysfs, folder)),
    contents: await contentsOf(path),
  };
}

/**
 * Finds out about a target.
 *
 * @param folder of the chain
 * @throws StillblockError if it is neither a block device nor a file, or its folder is not there
 */
export async function targetFacts(target: string, folder: string): Promise<TargetFacts> {
  const chain = await realpath(folder);
  const status = await stat(target).catch((error: unknown) => {
    if (codeOf(error) === 'ENOENT' && !resolve(target).startsWith('/dev/')) {
      return undefined;
    }
    throw explain(error, target);
  });
  if (status?.isBlockDevice() === true) {
    return deviceFacts(target, status.rdev, chain);
  }
  const parent = await realpath(dirname(resolve(target))).catch((error: unknown) => {
    throw explain(error, dirname(resolve(target)));
  });
  const file = {
    path: target,
    sectorBytes: FILE_SECTOR_BYTES,
    mountPoints: [],
    holders: [] as readonly string[],
    held: false,
    readOnly: false,
    isSource: parent === chain,
  };
  if (status === undefined) {
    const id = join(parent, basename(target));
    return { ...file, kind: 'new-file', id, sizeBytes: undefined, swap: false, contents: '' };
  }
  if (!status.isFile()) {
    throw new StillblockError(
      'TARGET_KIND',
      `${target} is neither a disk nor a file`,
      'name a block device, or a file for a raw image',
    );
  }
  const swaps = parseSwaps(await readFile('/proc/swaps', 'utf8').catch(() => ''));
  const opening = await tryOpen(target);
  return {
    ...file,
    kind: 'file',
    id: `${status.dev}/${status.ino}`,
    holders: await loopsOver(({ dev, ino }) => dev === status.dev && ino === status.ino),
    sizeBytes: status.size,
    readOnly: opening === 'read-only',
    swap: swaps.includes(await realpath(target)),
    contents: await contentsOf(target),
  };
}
