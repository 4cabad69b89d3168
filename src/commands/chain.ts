// SPDX-License-Identifier: Apache-2.0
/** `stillblock chain`: what is in a folder that was pulled into, and whether it is whole. */
import type { Command } from 'commander';
import { readManifest, requireFiles } from '../chain.ts';
import { type Manifest, tipOf } from '../manifest.ts';
import { printJson, printLine, printTable } from '../output.ts';
import { formatSize } from '../sizes.ts';
import { type CommonOptions, example, newCommand } from './common.ts';

interface ChainOptions extends CommonOptions {
  readonly check?: boolean;
}

function printChain(manifest: Manifest): void {
  printTable(
    ['CHECKPOINT', 'TAKEN', 'DISK', 'SIZE', 'KIND', 'FILE', 'WRITTEN'],
    manifest.points.flatMap(({ checkpoint, takenAt, pulledAt, entries }) =>
      entries.map(({ disk, sizeBytes, kind, file, fileBytes }, index) => [
        index === 0 ? checkpoint : '',
        index === 0 ? (takenAt ?? `before ${pulledAt}`) : '',
        disk,
        formatSize(sizeBytes),
        kind,
        file,
        formatSize(fileBytes),
      ]),
    ),
    'nothing was pulled yet',
  );
}

async function show(folder: string, options: ChainOptions): Promise<void> {
  const manifest = await readManifest(folder);
  const entries = manifest.points.flatMap((point) => point.entries);
  await requireFiles(folder, manifest, entries, options.check === true);
  if (options.json === true) {
    const disks = [...new Set(entries.map(({ disk }) => disk))];
    const tips = disks.map((disk) => ({
      disk,
      checkpoint: tipOf(manifest, disk)?.point.checkpoint,
    }));
    printJson({ folder, ...manifest, tips });
    return;
  }
  printChain(manifest);
  printLine(
    options.check === true
      ? 'all files have the SHA-256 of the manifest'
      : 'all files are there and in order',
  );
}

/** `stillblock chain` */
export function chainCommand(): Command {
  return newCommand('chain', 'show a chain of images, and whether it is whole')
    .argument('<DIR>', "the chain's folder")
    .option('--check', 'read all files, rather than those that were touched')
    .addHelpText('after', example('stillblock chain --check /backup/web1'))
    .action(show);
}
