// SPDX-License-Identifier: Apache-2.0
/** The machine that is examined: its files beneath a root that tests make up. */
import { execFile } from 'node:child_process';
import { readdir, readFile, readlink, stat } from 'node:fs/promises';
import { join } from 'node:path';

/** One thing that was looked at, what it is like, and what to do about it. */
export interface Finding {
  readonly check: string;
  readonly verdict: 'ok' | 'warn' | 'fail';
  readonly found: string;
  /** Of what is not ok. */
  readonly advice?: string;
}

export const ok = (check: string, found: string): Finding => ({ check, verdict: 'ok', found });
export const warn = (check: string, found: string, advice: string): Finding => ({
  check,
  verdict: 'warn',
  found,
  advice,
});
export const fail = (check: string, found: string, advice: string): Finding => ({
  check,
  verdict: 'fail',
  found,
  advice,
});

/** How long a tool may take, milliseconds. */
const TOOL_MS = 10_000;

export class Machine {
  readonly #root: string;
  readonly nowMs: number;

  /**
   * @param root where its root folder is
   * @param nowMs the time, since 1970
   */
  constructor(root: string, nowMs: number) {
    this.#root = root;
    this.nowMs = nowMs;
  }

  path(path: string): string {
    return join(this.#root, path);
  }

  /** A file's text; undefined where it is not, or is not for us. */
  async text(path: string): Promise<string | undefined> {
    const bytes = await this.bytes(path);
    return bytes?.toString();
  }

  async bytes(path: string): Promise<Buffer | undefined> {
    return readFile(this.path(path)).catch(() => undefined);
  }

  async list(path: string): Promise<readonly string[]> {
    return readdir(this.path(path)).catch(() => []);
  }

  async link(path: string): Promise<string | undefined> {
    return readlink(this.path(path)).catch(() => undefined);
  }

  async mode(path: string): Promise<number | undefined> {
    return stat(this.path(path)).then(
      ({ mode }) => mode,
      () => undefined,
    );
  }

  async exists(path: string): Promise<boolean> {
    return (await this.mode(path)) !== undefined;
  }

  /** What a tool of this machine says of a file; undefined if it cannot. */
  ask(tool: string, ...args: readonly string[]): Promise<string | undefined> {
    const env = { ...process.env, PATH: `${process.env['PATH'] ?? ''}:/usr/sbin:/sbin` };
    return new Promise((resolve) => {
      execFile(tool, args, { env, timeout: TOOL_MS }, (error, stdout) => {
        resolve(error === null ? stdout.trim() : undefined);
      });
    });
  }
}
