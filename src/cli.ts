#!/usr/bin/env node
// SPDX-License-Identifier: Apache-2.0
/** The command line: which command was meant, and what its failure means to the caller. */
import { readFileSync } from 'node:fs';
import process, { argv, stderr, stdout } from 'node:process';
import { Command, CommanderError } from 'commander';
import { backupCommand } from './commands/backup.ts';
import { checkpointCommand } from './commands/checkpoint.ts';
import type { CommonOptions } from './commands/common.ts';
import { deviceCommand } from './commands/device.ts';
import { nbdCommand } from './commands/nbd.ts';
import { statusCommand } from './commands/status.ts';
import { EXIT, StillblockError, usageError } from './errors.ts';
import { errorLine, printJson } from './output.ts';

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

function makeProgram(onCommand: (command: Command) => void): Command {
  const program = new Command('stillblock')
    .description(
      "Consistent read-only images of a running server's disks, and what changed since,\nover NBD.",
    )
    .version(version(), '-V, --version')
    .addCommand(deviceCommand())
    .addCommand(backupCommand())
    .addCommand(statusCommand())
    .addCommand(checkpointCommand())
    .addCommand(nbdCommand())
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

/** Help that was asked for is no error; help in place of a missing command is. */
function fromCommander(error: CommanderError): StillblockError | undefined {
  switch (error.code) {
    case 'commander.helpDisplayed':
    case 'commander.version':
      return undefined;
    case 'commander.help':
      return usageError('a command is missing', 'choose one of the above');
    default: {
      const message = error.message.replace(/^error: /, '').replaceAll('\n', ' ');
      return usageError(message, 'see --help');
    }
  }
}

function toError(error: unknown): StillblockError | undefined {
  if (error instanceof CommanderError) {
    return fromCommander(error);
  }
  if (error instanceof StillblockError) {
    return error;
  }
  const missing = error instanceof Error && 'code' in error && error.code === 'MODULE_NOT_FOUND';
  return missing
    ? new StillblockError('NO_ADDON', 'the addon is not built', 'run npm run setup', {
        cause: error,
      })
    : new StillblockError(
        'BUG',
        error instanceof Error ? (error.stack ?? error.message) : String(error),
        'this is a mistake of ours: please report it',
        { cause: error },
      );
}

function report(error: StillblockError, command: Command | undefined): void {
  stderr.write(errorLine(error));
  const { json } = command?.opts<CommonOptions>() ?? {};
  if (json === true && command !== undefined && command.name() !== 'nbd') {
    const { code, message, advice } = error;
    printJson(
      command.name() === 'begin'
        ? { event: 'failed', reason: code, message, advice }
        : { error: { code, message, advice } },
    );
  }
}

// Whoever read our output may have gone; what is served does not depend on that.
stdout.on('error', () => {});
stderr.on('error', () => {});

let current: Command | undefined;
try {
  await makeProgram((command) => {
    current = command;
  }).parseAsync(argv);
} catch (thrown) {
  const error = toError(thrown);
  if (error !== undefined) {
    report(error, current);
    process.exitCode = error.exitCode;
  } else {
    process.exitCode = EXIT.done;
  }
}
