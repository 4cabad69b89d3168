// SPDX-License-Identifier: Apache-2.0
/** `stillblock device`: which devices are tracked. */
import { Command } from 'commander';
import { BlockDevices } from '../block-devices.ts';
import {
  blockDeviceAt,
  type Disk,
  deviceNumberOf,
  diskOf,
  openControl,
  requireSeen,
} from '../disks.ts';
import { explain, reasonWords, StillblockError, usageError } from '../errors.ts';
import type { ControlDevice } from '../native.ts';
import { printJson, printLine, printTable } from '../output.ts';
import { formatSize } from '../sizes.ts';
import { type CommonOptions, example, newCommand, sizeOption } from './common.ts';

/** A tracked device as it is printed. */
function toReport({ name, path, tracker }: Disk): object {
  const { id, sizeBytes, blockSizeBytes, generation, number } = tracker;
  const { writes, heldWrites, inSnapshot, resized, gone } = tracker;
  return {
    name,
    device: path,
    tracker: id,
    sizeBytes,
    blockSizeBytes,
    generation,
    number,
    writes,
    heldWrites,
    inSnapshot,
    resized,
    gone,
  };
}

function stateOf({ tracker }: Disk): string {
  if (tracker.gone) {
    return 'gone';
  }
  if (tracker.resized) {
    return 'resized: the next backup is a full one';
  }
  return tracker.inSnapshot ? 'in a snapshot' : 'tracked';
}

async function withControl<T>(use: (control: ControlDevice) => Promise<T>): Promise<T> {
  const control = openControl();
  try {
    return await use(control);
  } finally {
    control.close();
  }
}

async function listDisks(control: ControlDevice): Promise<Disk[]> {
  const trackers = await control.list();
  const devices = await BlockDevices.read();
  return trackers.map((tracker) => diskOf(tracker, devices));
}

/** Attaches all or, if one can't be, none. */
async function attachAll(
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

async function attach(
  paths: readonly string[],
  options: CommonOptions & { readonly blockSize?: number },
): Promise<void> {
  await withControl(async (control) => {
    const ids = await attachAll(control, paths, options.blockSize ?? 0);
    const disks = (await listDisks(control)).filter(({ tracker }) => ids.includes(tracker.id));
    if (options.json === true) {
      printJson({ devices: disks.map(toReport) });
      return;
    }
    for (const { name, path, tracker } of disks) {
      const size = formatSize(tracker.sizeBytes);
      printLine(
        `${path} is tracked as ${name}: ${size} in blocks of ${formatSize(tracker.blockSizeBytes)}`,
      );
    }
  });
}

/** A tracked device by its path, or, where that has gone, by its name or path in the list. */
async function findDisk(disks: readonly Disk[], wanted: string): Promise<Disk> {
  const number = await deviceNumberOf(wanted, disks);
  const disk = disks.find((candidate) => candidate.number === number);
  if (disk === undefined) {
    const { message } = reasonWords('NOT_ATTACHED', wanted);
    throw new StillblockError('NOT_ATTACHED', message, 'see stillblock device list');
  }
  return disk;
}

async function detach(paths: readonly string[], options: CommonOptions): Promise<void> {
  await withControl(async (control) => {
    const all = await listDisks(control);
    const disks: Disk[] = [];
    for (const path of paths) {
      disks.push(await findDisk(all, path));
    }
    for (const { path, tracker } of disks) {
      try {
        await control.detach(tracker.id);
      } catch (error) {
        throw explain(error, path);
      }
    }
    if (options.json === true) {
      printJson({ devices: disks.map(toReport) });
      return;
    }
    for (const { path } of disks) {
      printLine(`${path} is tracked no longer; its next backup is a full one`);
    }
  });
}

async function mark(
  path: string,
  options: CommonOptions & { readonly offset?: number; readonly length?: number },
): Promise<void> {
  await withControl(async (control) => {
    const { path: found, tracker } = await findDisk(await listDisks(control), path);
    const { sizeBytes } = tracker;
    const offset = options.offset ?? 0;
    const length = options.length ?? sizeBytes - offset;
    if (length <= 0 || offset + length > sizeBytes) {
      throw usageError(
        `${found} has ${sizeBytes} bytes, and the range ends at ${offset + length}`,
        'give --offset and --length within the device',
      );
    }
    try {
      await control.mark(tracker.id, offset, length);
    } catch (error) {
      throw explain(error, found);
    }
    if (options.json === true) {
      printJson({ device: found, offset, length });
      return;
    }
    printLine(`${found}: ${formatSize(length)} count as changed now`);
  });
}

async function list(options: CommonOptions): Promise<void> {
  const disks = await withControl(listDisks);
  if (options.json === true) {
    printJson({ devices: disks.map(toReport) });
    return;
  }
  printTable(
    ['NAME', 'DEVICE', 'SIZE', 'BLOCK', 'WRITES', 'STATE'],
    disks.map((disk) => [
      disk.name,
      disk.path,
      formatSize(disk.tracker.sizeBytes),
      formatSize(disk.tracker.blockSizeBytes),
      String(disk.tracker.writes),
      stateOf(disk),
    ]),
    'no device is tracked: run stillblock device attach DEV',
  );
}

/** `stillblock device …` */
export function deviceCommand(): Command {
  return new Command('device')
    .summary('track the changes of block devices')
    .description('Track the changes of block devices, so that they can be backed up.')
    .addCommand(
      newCommand('attach', 'start to track devices')
        .argument('<DEV...>', 'disks, partitions or logical volumes, mounted or not')
        .option('--block-size <SIZE>', 'unit of change tracking (default: 64K)', sizeOption)
        .addHelpText(
          'after',
          `
Tracking goes on until "device detach", a reboot, or the module is unloaded;
after each of these the next backup of the device is a full one.

Examples:
  stillblock device attach /dev/sda
  stillblock device attach /dev/vg0/data /dev/vg0/home`,
        )
        .action(attach),
    )
    .addCommand(
      newCommand('detach', 'stop to track devices')
        .argument('<DEV...>', 'tracked devices, by path or by name')
        .addHelpText('after', example('stillblock device detach /dev/sda'))
        .action(detach),
    )
    .addCommand(
      newCommand('mark', 'call a range of a device changed')
        .argument('<DEV>', 'tracked device, by path or by name')
        .option('--offset <SIZE>', 'first byte (default: 0)', sizeOption)
        .option('--length <SIZE>', 'bytes (default: to the end)', sizeOption)
        .addHelpText(
          'after',
          `
For changes that no write told of, such as those of a passthrough command.

Example:
  stillblock device mark /dev/sda --offset 1G --length 64K`,
        )
        .action(mark),
    )
    .addCommand(
      newCommand('list', 'list the tracked devices')
        .addHelpText('after', example("stillblock device list --json | jq -r '.devices[].name'"))
        .action(list),
    );
}
