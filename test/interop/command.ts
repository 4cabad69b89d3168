// SPDX-License-Identifier: Apache-2.0
/** `stillblock nbd` in a process of its own, whose words can be waited for. */
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdir, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import type { ExecutionContext } from 'ava';
import { soon } from '../nbd/world.ts';
import { CLI } from '../program.ts';

/**
 * Makes the command `stillblock` in a folder, for scripts that call it by its name.
 *
 * @returns an environment whose PATH begins there
 */
export async function commandOnPath(home: string): Promise<NodeJS.ProcessEnv> {
  const bin = join(home, 'bin');
  await mkdir(bin);
  const script = `#!/bin/sh\nexec '${process.execPath}' '${CLI}' "$@"\n`;
  await writeFile(join(bin, 'stillblock'), script, { mode: 0o755 });
  return { ...process.env, PATH: `${bin}:${process.env['PATH']}:/usr/sbin:/sbin` };
}

/** An object of JSON that the command has printed. */
export interface Said {
  readonly event: string;
  readonly exports?: readonly { readonly name: string; readonly uris: readonly string[] }[];
  readonly message?: string;
}

/** Servers at a time, of one file's tests: more would only wait for the processor. */
const MOST_SERVERS = 4;
let running = 0;
const waiting: (() => void)[] = [];

async function takeTurn(): Promise<void> {
  if (running >= MOST_SERVERS) {
    await new Promise<void>((resolve) => waiting.push(resolve));
  }
  running += 1;
}

function giveTurn(): void {
  running -= 1;
  waiting.shift()?.();
}

/** Lines as they come, waited for by what is in them. */
class Lines {
  readonly all: string[] = [];
  #from = 0;
  #woken = (): void => {};

  add(line: string): void {
    this.all.push(line);
    this.#woken();
  }

  /** The next line that a predicate chooses, behind the one chosen before. */
  async next(what: string, chosen: (line: string) => boolean): Promise<string> {
    for (;;) {
      const index = this.all.findIndex((line, at) => at >= this.#from && chosen(line));
      const found = this.all[index];
      if (found !== undefined) {
        this.#from = index + 1;
        return found;
      }
      await soon(
        `${what} in ${JSON.stringify(this.all)}`,
        new Promise<void>((resolve) => {
          this.#woken = resolve;
        }),
      );
    }
  }
}

export class Serving {
  readonly process: ChildProcess;
  readonly #stdout = new Lines();
  readonly #stderr = new Lines();
  readonly #exit: Promise<unknown[]>;
  #said: Said | undefined;

  private constructor(process: ChildProcess) {
    this.process = process;
    this.#exit = once(process, 'close');
    for (const [stream, lines] of [
      [process.stdout, this.#stdout],
      [process.stderr, this.#stderr],
    ] as const) {
      if (stream !== null) {
        createInterface({ input: stream }).on('line', (line) => lines.add(line));
      }
    }
  }

  /** Starts it, and waits until it serves. */
  static async start(t: ExecutionContext, ...args: string[]): Promise<Serving> {
    await takeTurn();
    const child = spawn(process.execPath, [CLI, 'nbd', '--json', ...args], {
      stdio: ['ignore', 'pipe', 'pipe'],
    });
    child.once('close', giveTurn);
    t.teardown(() => child.kill('SIGKILL'));
    const serving = new Serving(child);
    serving.#said = await serving.says('serving');
    return serving;
  }

  /** The names of all exports. */
  get names(): string[] {
    return this.#said?.exports?.map(({ name }) => name) ?? [];
  }

  /** The URIs of an export. */
  uris(name: string): readonly string[] {
    return this.#said?.exports?.find((each) => each.name === name)?.uris ?? [];
  }

  /** Waits until it prints an event. */
  async says(event: string): Promise<Said> {
    const line = await this.#stdout.next(event, (text) => text.includes(`"event":"${event}"`));
    return JSON.parse(line) as Said;
  }

  /** Waits for a line of its log, or of its complaints. */
  complains(pattern: RegExp): Promise<string> {
    return this.#stderr.next(String(pattern), (line) => pattern.test(line));
  }

  /** Ends it, and returns its exit code. */
  async end(): Promise<unknown> {
    this.process.kill('SIGTERM');
    return (await soon('its end', this.#exit))[0];
  }
}
