// SPDX-License-Identifier: Apache-2.0
/** `stillblock map`: what changed on a disk. */
import { stdout } from 'node:process';
import { type Command, Option } from 'commander';
import { type Api, withApi } from '../api-client.ts';
import type { DiskChanges } from '../backup-report.ts';
import { drawMap } from '../change-picture.ts';
import { requireCheckpointName } from '../checkpoints.ts';
import { StillblockError, usageError } from '../errors.ts';
import { getChanges, listBackups } from '../operations.ts';
import { formatTable, printJson, printLine, printTable } from '../output.ts';
import { formatSize } from '../sizes.ts';
import { type CommonOptions, newCommand } from './common.ts';

interface MapOptions extends CommonOptions {
  readonly since?: string;
  readonly format: 'table' | 'picture';
}

/** A terminal that does not say how wide it is. */
const USUAL_COLUMNS = 80;

/** The backup that holds a disk, and the disk if only one is held at all. */
async function findHeld(api: Api, wanted: string | undefined): Promise<[string, string]> {
  const { backups } = await api.call(listBackups, {});
  const held = backups.flatMap(({ checkpoint, disks }) =>
    disks.map(({ name, device }) => ({ checkpoint, name, device })),
  );
  const [found, ...others] = held.filter(
    ({ name, device }) => wanted === undefined || name === wanted || device === wanted,
  );
  if (found === undefined) {
    throw new StillblockError(
      'NO_BACKUP',
      wanted === undefined ? 'no backup is running' : `disk ${wanted} is in no backup that runs`,
      'begin one: what changed is told as of its instant',
    );
  }
  if (others.length > 0) {
    const names = held.map(({ name }) => name).join(', ');
    throw usageError(`several disks are held: ${names}`, 'name one of them');
  }
  return [found.checkpoint, found.name];
}

function printChanges(changes: DiskChanges, format: MapOptions['format']): void {
  const { disk, since, checkpoint, sizeBytes, changedBytes, extents } = changes;
  const share = sizeBytes === 0 ? 0 : (changedBytes / sizeBytes) * 100;
  printLine(
    `${disk}: ${formatSize(changedBytes)} of ${formatSize(sizeBytes)} (${share.toFixed(1)} %) changed between ${since} and ${checkpoint}`,
  );
  if (format === 'picture') {
    const { rows, cellBytes } = drawMap(changes, stdout.columns ?? USUAL_COLUMNS);
    printLine(rows.join('\n'));
    printLine(
      formatTable(
        ['·', '░', '▒', '▓', '█'],
        [['nothing', 'some', 'a half', 'most', `all of ${formatSize(cellBytes)}`]],
      ),
    );
    return;
  }
  printTable(
    ['OFFSET', 'LENGTH', 'SIZE'],
    extents.map(({ offset, length }) => [String(offset), String(length), formatSize(length)]),
    'nothing has changed',
  );
}

async function map(wanted: string | undefined, options: MapOptions): Promise<void> {
  const query = options.since === undefined ? {} : { since: requireCheckpointName(options.since) };
  const changes = await withApi(options, async (api) => {
    const [name, disk] = await findHeld(api, wanted);
    return api.call(getChanges, { params: { name, disk }, query });
  });
  if (options.json === true) {
    printJson(changes);
  } else {
    printChanges(changes, options.format);
  }
}

/** `stillblock map` */
export function mapCommand(): Command {
  return newCommand('map', 'show what changed on a disk since a checkpoint')
    .argument('[DISK]', 'name or device of a disk of a backup that runs, if there are several')
    .option('--since <CHECKPOINT>', 'since when (default: the latest that will do)')
    .addOption(
      new Option('--format <FORMAT>', 'how to show it')
        .choices(['table', 'picture'])
        .default('table'),
    )
    .addHelpText(
      'after',
      `
Changes are told up to the instant of the backup that runs. The extents of --json are
what stillblock nbd --dirty reads.

Examples:
  stillblock map sda --since monday --format picture
  stillblock map sda --json | jq .extents >sda-since-monday.json`,
    )
    .action(map);
}
