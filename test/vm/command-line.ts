// SPDX-License-Identifier: Apache-2.0
// The command `stillblock` of this checkout in guests: as shell words, installed as users have
// it, and many in one process (one-process.ts).

import { join } from 'node:path';
import { execPath } from 'node:process';
import { CLI } from '../program.ts';
import { checkout } from './checkout.ts';
import type { CommandResult, GuestCommand } from './command.ts';
import type { Guest } from './guest.ts';
import { shellQuote } from './initrd.ts';

const program = join(checkout, 'dist/test/vm/one-process.js');
const script = shellQuote(CLI);

/** `stillblock`, for a command line of a guest's shell. */
export const cli: string = `node ${script}`;

/** Shell lines after which a guest has the command `stillblock`. */
export const installCli: string = `
  printf '#!/bin/sh\\nexec %s %s "$@"\\n' ${shellQuote(execPath)} ${script} >/usr/local/bin/stillblock
  chmod +x /usr/local/bin/stillblock
`;

export class CommandLine {
  readonly #process: GuestCommand;
  #asked = 0;

  constructor(guest: Guest) {
    this.#process = guest.start(`exec node ${shellQuote(program)}`);
  }

  /**
   * Runs `stillblock WORDS...`, once the one before has ended.
   *
   * @throws Error when it does not end within the limit, or ends the process
   */
  async run(words: readonly string[], limitMs: number): Promise<CommandResult> {
    this.#process.write(`${JSON.stringify(words)}\n`);
    this.#asked += 1;
    const lines = new RegExp(`^(?:.*\\n){${this.#asked}}`);
    const [all] = await this.#process.waitForOutput(lines, limitMs);
    return JSON.parse(all.split('\n')[this.#asked - 1] ?? '') as CommandResult;
  }

  /** @throws Error when it does not end by itself */
  async end(limitMs: number): Promise<void> {
    this.#process.endInput();
    const { code, stderr } = await this.#process.wait(limitMs);
    if (code !== 0) throw new Error(`one-process.js ended with ${code}: ${stderr}`);
  }
}
