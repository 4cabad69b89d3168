// SPDX-License-Identifier: Apache-2.0
/** `stillblock completion`: what a shell needs to complete our commands. */
import { stdout } from 'node:process';
import { Argument, Command } from 'commander';
import { bashCompletion, zshCompletion } from '../completion.ts';

const SHELLS = { bash: bashCompletion, zsh: zshCompletion } as const;

/** `stillblock completion SHELL` */
export function completionCommand(): Command {
  const command: Command = new Command('completion')
    .summary('print a completion script for a shell')
    .description('Print a completion script for a shell.')
    .addArgument(new Argument('<SHELL>', 'which one').choices(Object.keys(SHELLS)))
    .addHelpText(
      'after',
      `
Examples:
  stillblock completion bash >/usr/share/bash-completion/completions/stillblock
  stillblock completion zsh >/usr/share/zsh/vendor-completions/_stillblock`,
    )
    .action((shell: keyof typeof SHELLS) => {
      let program = command;
      while (program.parent !== null) {
        program = program.parent;
      }
      stdout.write(SHELLS[shell](program));
    });
  return command;
}
