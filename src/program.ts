// SPDX-License-Identifier: Apache-2.0
/** The command line: all commands, their options and their help. */
import { readFileSync } from 'node:fs';
import { Command } from 'commander';
import { backupCommand } from './commands/backup.ts';
import { chainCommand } from './commands/chain.ts';
import { checkpointCommand } from './commands/checkpoint.ts';
import { completionCommand } from './commands/completion.ts';
import { deviceCommand } from './commands/device.ts';
import { doctorCommand } from './commands/doctor.ts';
import { layoutCommand } from './commands/layout.ts';
import { mapCommand } from './commands/map.ts';
import { nbdCommand } from './commands/nbd.ts';
import { p2vCommand } from './commands/p2v.ts';
import { pullCommand } from './commands/pull.ts';
import { restoreCommand } from './commands/restore.ts';
import { serveCommand } from './commands/serve.ts';
import { statusCommand } from './commands/status.ts';

function version(): string {
  const text = readFileSync(new URL('../../package.json', import.meta.url), 'utf8');
  const { version: found } = JSON.parse(text) as { version: string };
  return found;
}

/** Lets every command's mistakes in usage reach us, instead of ending the process. */
function catchMistakes(command: Command): void {
  command.exitOverride().configureOutput({ outputError: () => {} });
  command.showHelpAfterError(false);
  for (const child of command.commands) {
    catchMistakes(child);
  }
}

/** @param onCommand told which command was meant, before it runs */
export function makeProgram(onCommand: (command: Command) => void = () => {}): Command {
  const program = new Command('stillblock')
    .description(
      "Consistent read-only images of a running server's disks, and what changed since,\nover NBD.",
    )
    .version(version(), '-V, --version')
    .addCommand(deviceCommand())
    .addCommand(backupCommand())
    .addCommand(statusCommand())
    .addCommand(checkpointCommand())
    .addCommand(mapCommand())
    .addCommand(nbdCommand())
    .addCommand(pullCommand())
    .addCommand(chainCommand())
    .addCommand(restoreCommand())
    .addCommand(layoutCommand())
    .addCommand(doctorCommand())
    .addCommand(serveCommand())
    .addCommand(p2vCommand())
    .addCommand(completionCommand())
    .addHelpText(
      'after',
      `
Examples:
  stillblock device attach /dev/sda
  stillblock backup begin --checkpoint monday --store /mnt/spare
  qemu-img convert -O qcow2 nbd://127.0.0.1/sda monday.qcow2
  stillblock backup end

Exit codes: 0 done, 1 failed, 2 usage, 3 a full backup is required, 4 store full.`,
    )
    .hook('preAction', (_program, command) => onCommand(command));
  catchMistakes(program);
  return program;
}
