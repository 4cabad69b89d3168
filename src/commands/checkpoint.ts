// SPDX-License-Identifier: Apache-2.0
/** `stillblock checkpoint`: the named instants that increments can start from. */
import { Command } from 'commander';
import { BlockDevices } from '../block-devices.ts';
import { type Checkpoint, CheckpointStore, judge, type Verdict } from '../checkpoints.ts';
import { type Disk, diskOf, openControl } from '../disks.ts';
import { folders } from '../folders.ts';
import { printJson, printLine, printTable } from '../output.ts';
import { formatSize } from '../sizes.ts';
import { type CommonOptions, example, newCommand } from './common.ts';

function toIso(seconds: number): string {
  return new Date(seconds * 1000).toISOString();
}

/** A checkpoint as JSON prints it. */
function toReport({ name, description, parent, creationTime, disks }: Checkpoint): object {
  return { name, description, parent: parent ?? null, createdAt: toIso(creationTime), disks };
}

async function list(options: CommonOptions): Promise<void> {
  const { checkpoints, broken } = await new CheckpointStore(folders()).list();
  if (options.json === true) {
    printJson({ checkpoints: checkpoints.map(toReport), broken });
    return;
  }
  printTable(
    ['NAME', 'CREATED', 'DISKS', 'DESCRIPTION'],
    checkpoints.map(({ name, creationTime, disks, description }) => [
      name,
      toIso(creationTime),
      disks.map((disk) => disk.name).join(' '),
      description,
    ]),
    'there is no checkpoint: stillblock backup begin makes one',
  );
  for (const { problem } of broken) {
    printLine(problem);
  }
}

/** The tracked disks, or none where that can't be told: no module, or no root. */
async function trackedDisks(): Promise<readonly Disk[] | undefined> {
  try {
    const control = openControl();
    try {
      const devices = await BlockDevices.read();
      return (await control.list()).map((tracker) => diskOf(tracker, devices));
    } finally {
      control.close();
    }
  } catch {
    return undefined;
  }
}

/** What the next backup of a disk of a checkpoint can be, as far as is known now. */
function verdictOf(
  checkpoint: Checkpoint,
  { name, generation }: Checkpoint['disks'][number],
  tracked: readonly Disk[] | undefined,
): Verdict {
  const disk =
    tracked?.find(({ tracker }) => tracker.generation === generation) ??
    tracked?.find((candidate) => candidate.name === name);
  if (disk === undefined) {
    const why = tracked === undefined ? 'the kernel module cannot be asked' : 'it is not tracked';
    return { kind: 'full', why };
  }
  return judge(checkpoint, { ...disk.tracker, name: disk.name });
}

async function show(name: string, options: CommonOptions): Promise<void> {
  const checkpoint = await new CheckpointStore(folders()).read(name);
  const tracked = await trackedDisks();
  const disks = checkpoint.disks.map((disk) => {
    const verdict = verdictOf(checkpoint, disk, tracked);
    return {
      ...disk,
      next: verdict.kind,
      ...(verdict.kind === 'full' ? { why: verdict.why } : {}),
    };
  });
  if (options.json === true) {
    printJson({ ...toReport(checkpoint), disks });
    return;
  }
  printLine(`name         ${checkpoint.name}`);
  printLine(`created      ${toIso(checkpoint.creationTime)}`);
  printLine(`parent       ${checkpoint.parent ?? '-'}`);
  printLine(`description  ${checkpoint.description || '-'}`);
  printLine('');
  printTable(
    ['DISK', 'SIZE', 'NEXT BACKUP', 'GENERATION', 'NUMBER'],
    disks.map((disk) => [
      disk.name,
      formatSize(disk.sizeBytes),
      disk.why === undefined ? disk.next : `${disk.next}: ${disk.why}`,
      disk.generation,
      String(disk.number),
    ]),
    'it has no disks',
  );
}

async function remove(name: string, options: CommonOptions): Promise<void> {
  await new CheckpointStore(folders()).delete(name);
  if (options.json === true) {
    printJson({ deleted: name });
  } else {
    printLine(`checkpoint ${name} is deleted`);
  }
}

/** `stillblock checkpoint …` */
export function checkpointCommand(): Command {
  return new Command('checkpoint')
    .summary('list and delete the instants that increments start from')
    .description('Checkpoints: the named instants that increments start from.')
    .addCommand(
      newCommand('list', 'list the checkpoints, oldest first')
        .addHelpText(
          'after',
          example("stillblock checkpoint list --json | jq -r '.checkpoints[].name'"),
        )
        .action(list),
    )
    .addCommand(
      newCommand('show', 'show a checkpoint, and whether increments can start from it')
        .argument('<NAME>', 'name of the checkpoint')
        .addHelpText('after', example('stillblock checkpoint show monday'))
        .action(show),
    )
    .addCommand(
      newCommand('delete', 'delete a checkpoint: no increment can start from it any more')
        .argument('<NAME>', 'name of the checkpoint')
        .addHelpText('after', example('stillblock checkpoint delete monday'))
        .action(remove),
    );
}
