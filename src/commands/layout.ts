// SPDX-License-Identifier: Apache-2.0
/** `stillblock layout`: how this machine's disks are laid out. */
import type { Command } from 'commander';
import { StillblockError } from '../errors.ts';
import { collectLayout, type MachineLayout } from '../layout.ts';
import { printJson, printLine, printTable } from '../output.ts';
import { formatSize } from '../sizes.ts';
import { type CommonOptions, newCommand } from './common.ts';

function printLayout(layout: MachineLayout): void {
  const { devices, firmware, partitionTables, volumeGroups, arrays, luks, problems } = layout;
  const tables = new Map(partitionTables.map(({ disk, label }) => [disk, label]));
  printTable(
    ['DEVICE', 'TYPE', 'SIZE', 'ON', 'CONTENT', 'MOUNTED'],
    devices.map(({ name, path, type, sizeBytes, beneath, content, mountPoints }) => [
      path,
      type,
      formatSize(sizeBytes),
      beneath.join(', '),
      content ?? tables.get(name) ?? '-',
      mountPoints.join(', '),
    ]),
    'there are no disks',
  );
  printLine(`firmware: ${firmware.kind}, boot entries: ${firmware.bootEntries.length}`);
  for (const { name, physicalVolumes, logicalVolumes } of volumeGroups) {
    const volumes = logicalVolumes.map((volume) => volume.name).join(', ');
    printLine(`volume group ${name} on ${physicalVolumes.join(', ')}: ${volumes}`);
  }
  for (const { name, level, members } of arrays) {
    printLine(`array ${name}, ${level}, of ${members.join(', ')}`);
  }
  for (const { name, version, cipher, keySlots } of luks) {
    printLine(`LUKS${version} on ${name}: ${cipher}, key slots: ${keySlots}`);
  }
  for (const problem of problems) {
    printLine(`not found out: ${problem}`);
  }
}

async function run(devices: readonly string[], options: CommonOptions): Promise<void> {
  const layout = await collectLayout(devices);
  if (devices.length > 0 && layout.devices.length === 0) {
    throw new StillblockError(
      'NO_DISK',
      `there is no disk ${devices.join(', ')} here`,
      'see stillblock layout for those that there are',
    );
  }
  if (options.json === true) {
    printJson(layout);
  } else {
    printLayout(layout);
  }
}

/** `stillblock layout` */
export function layoutCommand(): Command {
  return newCommand('layout', "show how this machine's disks are laid out")
    .argument('[DEV...]', 'disks by path or name, with all above and beneath them (default: all)')
    .addHelpText(
      'after',
      `
Partition tables, LVM, md, LUKS, swap and boot entries, which stillblock restore asks for.
stillblock pull keeps them with each checkpoint; for a pull from NBD URIs it is to be done
by hand.

Example:
  stillblock layout --json /dev/sda >layout.json`,
    )
    .action(run);
}
