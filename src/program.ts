// SPDX-License-Identifier: Apache-2.0
/** The command line: all commands, their options and their help. */
import { readFileSync } from 'node:fs';
import { Command } from 'commander';
import { installed } from './installation.ts';

/**
 * By their names, in the order of the help. Each brings what it needs, which is most of
 * the time that a command takes to start.
 */
const COMMANDS: Readonly<Record<string, () => Promise<Command>>> = {
  device: async () => (await import('./commands/device.ts')).deviceCommand(),
  backup: async () => (await import('./commands/backup.ts')).backupCommand(),
  status: async () => (await import('./commands/status.ts')).statusCommand(),
  checkpoint: async () => (await import('./commands/checkpoint.ts')).checkpointCommand(),
  map: async () => (await import('./commands/map.ts')).mapCommand(),
  nbd: async () => (await import('./commands/nbd.ts')).nbdCommand(),
  pull: async () => (await import('./commands/pull.ts')).pullCommand(),
  chain: async () => (await import('./commands/chain.ts')).chainCommand(),
  restore: async () => (await import('./commands/restore.ts')).restoreCommand(),
  layout: async () => (await import('./commands/layout.ts')).layoutCommand(),
  doctor: async () => (await import('./commands/doctor.ts')).doctorCommand(),
  serve: async () => (await import('./commands/serve.ts')).serveCommand(),
  p2v: async () => (await import('./commands/p2v.ts')).p2vCommand(),
  completion: async () => (await import('./commands/completion.ts')).completionCommand(),
};

/** Print what they know of all the others. */
const OF_ALL: readonly string[] = ['completion'];

function version(): string {
  const text = readFileSync(installed('package.json'), 'utf8');
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

/**
 * @param first what stands first on the command line: a command, which is the only one that
 *   is needed then; where it is none, all are
 * @param onCommand told which command was meant, before it runs
 */
export async function makeProgram(
  first = '',
  onCommand: (command: Command) => void = () => {},
): Promise<Command> {
  const program = new Command('stillblock')
    .description(
      "Consistent read-only images of a running server's disks, and what changed since,\nover NBD.",
    )
    .version(version(), '-V, --version')
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
  const alone = Object.hasOwn(COMMANDS, first) && !OF_ALL.includes(first);
  for (const [name, load] of Object.entries(COMMANDS)) {
    if (!alone || name === first) {
      program.addCommand(await load());
    }
  }
  catchMistakes(program);
  return program;
}
