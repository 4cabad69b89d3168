// SPDX-License-Identifier: Apache-2.0
/** `stillblock status`: what is going on. */
import type { Command } from 'commander';
import type { BackupDescription } from '../backup-report.ts';
import { describeBackup } from '../control-socket.ts';
import { openControl } from '../disks.ts';
import { folders } from '../folders.ts';
import { printJson, printLine } from '../output.ts';
import { printBackup } from './backup.ts';
import { type CommonOptions, example, newCommand } from './common.ts';

function printState(backup: BackupDescription | undefined): void {
  if (backup === undefined) {
    printLine('no backup is running');
    return;
  }
  const reason = backup.reason === undefined ? '' : ` (${backup.reason})`;
  printLine(`backup ${backup.state}${reason}, process ${backup.pid}`);
  if (backup.takenAt !== undefined) {
    printBackup(backup);
  }
}

async function status(options: CommonOptions): Promise<void> {
  const control = openControl();
  try {
    const module = control.info();
    const trackers = await control.list();
    const backup = await describeBackup(folders());
    if (options.json === true) {
      printJson({ module, trackedDevices: trackers.length, backup: backup ?? null });
      return;
    }
    printLine(`module ${module.version}, tracked devices: ${trackers.length}`);
    printState(backup);
  } finally {
    control.close();
  }
}

/** `stillblock status` */
export function statusCommand(): Command {
  return newCommand('status', 'show the module, and the backup that is running')
    .addHelpText('after', example('stillblock status --json | jq .backup.store'))
    .action(status);
}
