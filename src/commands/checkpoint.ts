// SPDX-License-Identifier: Apache-2.0
/** `stillblock checkpoint`: the named instants that increments can start from. */
import { Command } from 'commander';
import { withApi } from '../api-client.ts';
import { requireCheckpointName } from '../checkpoints.ts';
import { deleteCheckpoint, getCheckpoint, listCheckpoints } from '../operations.ts';
import { printJson, printLine, printTable } from '../output.ts';
import { formatSize } from '../sizes.ts';
import { type CommonOptions, example, newCommand } from './common.ts';

async function list(options: CommonOptions): Promise<void> {
  const { checkpoints, broken } = await withApi(options, (api) => api.call(listCheckpoints, {}));
  if (options.json === true) {
    printJson({ checkpoints, broken });
    return;
  }
  printTable(
    ['NAME', 'CREATED', 'DISKS', 'DESCRIPTION'],
    checkpoints.map(({ name, createdAt, disks, description }) => [
      name,
      createdAt,
      disks.map((disk) => disk.name).join(' '),
      description,
    ]),
    'there is no checkpoint: stillblock backup begin makes one',
  );
  for (const { problem } of broken) {
    printLine(problem);
  }
}

async function show(name: string, options: CommonOptions): Promise<void> {
  const params = { name: requireCheckpointName(name) };
  const checkpoint = await withApi(options, (api) => api.call(getCheckpoint, { params }));
  if (options.json === true) {
    printJson(checkpoint);
    return;
  }
  printLine(`name         ${checkpoint.name}`);
  printLine(`created      ${checkpoint.createdAt}`);
  printLine(`parent       ${checkpoint.parent ?? '-'}`);
  printLine(`description  ${checkpoint.description || '-'}`);
  printLine('');
  printTable(
    ['DISK', 'SIZE', 'NEXT BACKUP', 'GENERATION', 'NUMBER'],
    checkpoint.disks.map((disk) => [
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
  const params = { name: requireCheckpointName(name) };
  const deleted = await withApi(options, (api) => api.call(deleteCheckpoint, { params }));
  if (options.json === true) {
    printJson(deleted);
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
