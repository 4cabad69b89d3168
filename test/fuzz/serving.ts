// SPDX-License-Identifier: Apache-2.0
/** `stillblock nbd` in a process of its own, as hostile clients meet it. */
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtemp, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { CLI } from '../program.ts';

/** How long it may take to begin and to end, milliseconds. */
const PATIENCE_MS = 30_000;

export type Address = { readonly path: string } | { readonly host: string; readonly port: number };

export class ServerProcess {
  /** A folder of its own, gone with it. */
  readonly home: string;
  readonly unix: Address;
  readonly tcp: Address;
  readonly #child: ChildProcess;
  readonly #exit: Promise<unknown[]>;
  readonly #errors: string[];

  private constructor(home: string, child: ChildProcess, port: number, errors: string[]) {
    this.home = home;
    this.#child = child;
    this.unix = { path: join(home, 'sock') };
    this.tcp = { host: '127.0.0.1', port };
    this.#errors = errors;
    this.#exit = once(child, 'close');
  }

  /**
   * Starts it.
   *
   * @param prepare makes the files in the folder, and returns the arguments that name them
   */
  static async start(prepare: (home: string) => Promise<string[]>): Promise<ServerProcess> {
    const home = await mkdtemp(join(tmpdir(), 'stillblock-hostile-'));
    const args = await prepare(home);
    const child = spawn(
      process.execPath,
      [CLI, 'nbd', '--json', '-U', join(home, 'sock'), '-p', '0', ...args],
      { stdio: ['ignore', 'pipe', 'pipe'] },
    );
    const errors: string[] = [];
    createInterface({ input: child.stderr }).on('line', (line) => {
      // Warnings are the peer's fault, of which there is plenty; errors would be ours.
      if (!line.startsWith('{"level":40') && errors.length < 20) {
        errors.push(line);
      }
    });
    const timer = setTimeout(() => child.kill('SIGKILL'), PATIENCE_MS);
    const lines = createInterface({ input: child.stdout });
    const begun = await Promise.race([once(lines, 'line'), once(lines, 'close')]);
    clearTimeout(timer);
    if (begun.length === 0) {
      await rm(home, { recursive: true, force: true });
      throw new Error(`the server does not begin: ${errors.join('\n')}`);
    }
    const { exports } = JSON.parse(String(begun[0])) as { exports: { uris: string[] }[] };
    const port = Number(/:(\d+)\//.exec(exports[0]?.uris[1] ?? '')?.[1]);
    return new ServerProcess(home, child, port, errors);
  }

  async residentBytes(): Promise<number> {
    const status = await readFile(`/proc/${this.#child.pid}/status`, 'utf8');
    return Number(/VmRSS:\s+(\d+) kB/.exec(status)?.[1]) * 1024;
  }

  /** Ends it. Returns what was wrong with its life or its end. */
  async end(): Promise<string | undefined> {
    const died = this.#child.exitCode !== null || this.#child.signalCode !== null;
    this.#child.kill('SIGTERM');
    const timer = setTimeout(() => this.#child.kill('SIGKILL'), PATIENCE_MS);
    const [code, signal] = (await this.#exit) as [number | null, string | null];
    clearTimeout(timer);
    await rm(this.home, { recursive: true, force: true });
    if (died || code !== 0) {
      return `the server ${died ? 'died' : 'ended'}: ${code ?? signal}\n${this.#errors.join('\n')}`;
    }
    return this.#errors.length > 0 ? `its own errors:\n${this.#errors.join('\n')}` : undefined;
  }
}
