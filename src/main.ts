// SPDX-License-Identifier: Apache-2.0
/** Runs the command that was meant, and says what its failure means to the caller. */
import process, { argv, stderr, stdout } from 'node:process';
import { type Command, CommanderError } from 'commander';
import type { CommonOptions } from './commands/common.ts';
import { EXIT, StillblockError, usageError } from './errors.ts';
import { errorLine, printJson } from './output.ts';
import { makeProgram } from './program.ts';

/** The words before the first option or argument that name a command. */
function commandWords(command: Command, words: readonly string[]): readonly string[] {
  const [first, ...rest] = words;
  const child = command.commands.find((each) => each.name() === first);
  return child === undefined ? [] : [child.name(), ...commandWords(child, rest)];
}

/** Help that was asked for is no error; help in place of a missing command is. */
function fromCommander(
  error: CommanderError,
  program: Command | undefined,
): StillblockError | undefined {
  switch (error.code) {
    case 'commander.helpDisplayed':
    case 'commander.version':
      return undefined;
    case 'commander.help':
      return usageError('a command is missing', 'choose one of the above');
    default: {
      const message = error.message
        .replace(/^error: /, '')
        .replaceAll('\n', ' ')
        .replace(/ is invalid\. (.)/, (_, letter: string) => ` is invalid: ${letter.toLowerCase()}`)
        .replace(/\.$/, '');
      const words = program === undefined ? [] : commandWords(program, argv.slice(2));
      return usageError(message, `see ${['stillblock', ...words, '--help'].join(' ')}`);
    }
  }
}

function toError(error: unknown, program: Command | undefined): StillblockError | undefined {
  if (error instanceof CommanderError) {
    return fromCommander(error, program);
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

/** Runs the command that the command line names, and sets the exit code. */
export async function main(): Promise<void> {
  let current: Command | undefined;
  let program: Command | undefined;
  try {
    program = await makeProgram(argv[2], (command) => {
      current = command;
    });
    await program.parseAsync(argv);
  } catch (thrown) {
    const error = toError(thrown, program);
    if (error !== undefined) {
      report(error, current);
      process.exitCode = error.exitCode;
    } else {
      process.exitCode = EXIT.done;
    }
  }
}

/** Node ends a process that waits for nothing any more, which alone would look like success. */
function unfinished(code: number): void {
  if (code === EXIT.done) {
    const advice = 'this is a mistake of ours: please report it';
    stderr.write(errorLine(new StillblockError('BUG', 'the command came to no end', advice)));
    process.exitCode = EXIT.failed;
  }
}

/** The program: {@link main} in a process of its own. */
export function run(): void {
  // Whoever read our output may have gone; what is served does not depend on that.
  stdout.on('error', () => {});
  stderr.on('error', () => {});
  process.once('exit', unfinished);
  void main().finally(() => process.off('exit', unfinished));
}
