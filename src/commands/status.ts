// SPDX-License-Identifier: Apache-2.0
/** `stillblock status`: what is going on. */
import type { Command } from 'commander';
import { withApi } from '../api-client.ts';
import type { BackupDescription } from '../backup-report.ts';
import type { DeviceReason } from '../daemon.ts';
import { historyWords } from '../errors.ts';
import { getStatus } from '../operations.ts';
import { printJson, printLine } from '../output.ts';
import { printBackup } from './backup.ts';
import { type CommonOptions, example, newCommand } from './common.ts';

function printState(backup: BackupDescription): void {
  const reason = backup.reason === undefined ? '' : ` (${backup.reason})`;
  printLine(`backup ${backup.state}${reason}, process ${backup.pid}`);
  if (backup.takenAt !== undefined) {
    printBackup(backup);
  }
}

/** One line for each reason. */
function printReasons(all: readonly DeviceReason[], what: string): void {
  for (const reason of new Set(all.map((each) => each.reason))) {
    const devices = all.filter((each) => each.reason === reason);
    const names = devices.map(({ device }) => device).join(', ');
    printLine(`${names}: ${what}: ${historyWords(reason).message}`);
  }
}

async function status(options: CommonOptions): Promise<void> {
  const found = await withApi(options, (api) => api.call(getStatus, {}));
  if (options.json === true) {
    printJson(found);
    return;
  }
  const { module, trackedDevices, daemon, backups, missingDevices } = found;
  const { begunAnew, lostAtReboot } = found;
  printLine(`module ${module.version}, tracked devices: ${trackedDevices}`);
  printLine(daemon === null ? 'no daemon' : `daemon ${daemon.pid}, since ${daemon.since}`);
  for (const device of missingDevices) {
    printLine(`${device} is configured, and not tracked: see the daemon's log`);
  }
  printReasons(begunAnew, 'a full copy is due');
  printReasons(lostAtReboot, 'a reboot would end the change history');
  if (backups.length === 0) {
    printLine('no backup is running');
  }
  for (const backup of backups) {
    printState(backup);
  }
}

/** `stillblock status` */
export function statusCommand(): Command {
  return newCommand('status', 'show the module, the daemon, and the backups that run')
    .addHelpText('after', example('stillblock status --json | jq .backup.store'))
    .action(status);
}
