// SPDX-License-Identifier: Apache-2.0
/** `stillblock device`: which devices are tracked. */
import { Command } from 'commander';
import { withApi } from '../api-client.ts';
import type { DeviceReport } from '../devices.ts';
import { historyWords } from '../errors.ts';
import { attachDevices, detachDevices, listDevices, markDevice } from '../operations.ts';
import { printJson, printLine, printTable } from '../output.ts';
import { formatSize } from '../sizes.ts';
import {
  absolutePath,
  type CommonOptions,
  example,
  newCommand,
  pathOrName,
  sizeOption,
} from './common.ts';

function stateOf({ gone, resized, inSnapshot }: DeviceReport): string {
  if (gone) {
    return 'gone';
  }
  if (resized) {
    return 'resized: the next backup is a full one';
  }
  return inSnapshot ? 'in a snapshot' : 'tracked';
}

function rebootOf({ kept }: DeviceReport): string {
  return kept === 'OK' ? 'kept' : `lost: ${historyWords(kept).message}`;
}

async function attach(
  paths: readonly string[],
  options: CommonOptions & { readonly blockSize?: number },
): Promise<void> {
  const { devices } = await withApi(options, (api) =>
    api.call(attachDevices, {
      body: { devices: paths.map(absolutePath), blockSizeBytes: options.blockSize ?? 0 },
    }),
  );
  if (options.json === true) {
    printJson({ devices });
    return;
  }
  for (const { name, device, sizeBytes, blockSizeBytes } of devices) {
    printLine(
      `${device} is tracked as ${name}: ${formatSize(sizeBytes)} in blocks of ${formatSize(blockSizeBytes)}`,
    );
  }
}

async function detach(wanted: readonly string[], options: CommonOptions): Promise<void> {
  const { devices } = await withApi(options, (api) =>
    api.call(detachDevices, { body: { devices: wanted.map(pathOrName) } }),
  );
  if (options.json === true) {
    printJson({ devices });
    return;
  }
  for (const { device } of devices) {
    printLine(`${device} is tracked no longer; its next backup is a full one`);
  }
}

async function mark(
  wanted: string,
  options: CommonOptions & { readonly offset?: number; readonly length?: number },
): Promise<void> {
  const { offset, length } = options;
  const marked = await withApi(options, (api) =>
    api.call(markDevice, {
      params: { name: pathOrName(wanted) },
      body: {
        ...(offset === undefined ? {} : { offset }),
        ...(length === undefined ? {} : { length }),
      },
    }),
  );
  if (options.json === true) {
    printJson(marked);
    return;
  }
  printLine(`${marked.device}: ${formatSize(marked.length)} count as changed now`);
}

async function list(options: CommonOptions): Promise<void> {
  const { devices } = await withApi(options, (api) => api.call(listDevices, {}));
  if (options.json === true) {
    printJson({ devices });
    return;
  }
  printTable(
    ['NAME', 'DEVICE', 'SIZE', 'BLOCK', 'WRITES', 'STATE', 'AT A REBOOT'],
    devices.map((device) => [
      device.name,
      device.device,
      formatSize(device.sizeBytes),
      formatSize(device.blockSizeBytes),
      String(device.writes),
      stateOf(device),
      rebootOf(device),
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
Tracking goes on until "device detach" or the module is unloaded; after these the
next backup of the device is a full one. A reboot ends it, too, unless the device is
in <devices> of stillblock.xml: "device list" tells what it would end, and why.

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
