// SPDX-License-Identifier: Apache-2.0
// Stock tools and disks' files, on the host.

import { execFile } from 'node:child_process';
import { closeSync, ftruncateSync, openSync } from 'node:fs';

export interface ToolResult {
  readonly stdout: string;
  readonly stderr: string;
  readonly code: number;
}

export interface ToolOptions {
  /** After which the tool is killed and the call rejected. */
  readonly timeoutMs?: number;
  /** false: another exit code than 0 is a result, not an error. */
  readonly check?: boolean;
}

const defaultLimitMs = 300_000;
/** The longest output is a map of a fragmented image. */
const longestOutputBytes = 64 << 20;
/** Checkers of file systems live there, outside an ordinary user's PATH. */
const toolPath = `${process.env['PATH'] ?? ''}:/usr/sbin:/sbin`;

/**
 * Runs a program to its end.
 * @throws Error with its output when it is missing, fails (unless `check` is
 *   false) or takes too long.
 */
export function runTool(
  program: string,
  args: readonly string[],
  options: ToolOptions = {},
): Promise<ToolResult> {
  const settings = {
    timeout: options.timeoutMs ?? defaultLimitMs,
    maxBuffer: longestOutputBytes,
    killSignal: 'SIGKILL',
    env: { ...process.env, PATH: toolPath, LC_ALL: 'C' },
  } as const;
  return new Promise((resolve, reject) => {
    execFile(program, args, settings, (error, stdout, stderr) => {
      const code = error === null ? 0 : error.code;
      const ended = typeof code === 'number' && error?.killed !== true;
      if (ended && (code === 0 || options.check === false)) resolve({ stdout, stderr, code });
      else {
        reject(
          new Error(`${program} ${args.join(' ')}: ${error?.message}\n${stdout}${stderr}`, {
            cause: error,
          }),
        );
      }
    });
  });
}

/**
 * Makes a file of holes, as a disk that nobody has written to.
 * @throws Error when the file is there already.
 */
export function makeSparseFile(path: string, sizeBytes: number): void {
  const file = openSync(path, 'wx', 0o600);
  ftruncateSync(file, sizeBytes);
  closeSync(file);
}
