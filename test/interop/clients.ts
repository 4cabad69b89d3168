// SPDX-License-Identifier: Apache-2.0
/** Other people's clients. One that is missing fails the test that needs it. */
import { execFile } from 'node:child_process';
import { open } from 'node:fs/promises';
import { join } from 'node:path';
import test, { type ExecutionContext } from 'ava';
import type { Extent } from '../../nbd/extents.ts';
import { cacheFolder } from '../vm/checkout.ts';

/** How long a client may take, milliseconds. None needs a tenth of it. */
const CLIENT_MS = 60_000;
const OUTPUT_BYTES = 64 << 20;

export interface Finished {
  readonly code: number;
  readonly stdout: string;
  readonly stderr: string;
}

/** Runs a client to its end, whatever its exit code. */
export function tryRun(
  command: string,
  args: readonly string[],
  cwd?: string,
  timeoutMs: number = CLIENT_MS,
): Promise<Finished> {
  return new Promise((resolve, reject) => {
    const options = { cwd, timeout: timeoutMs, maxBuffer: OUTPUT_BYTES, encoding: 'utf8' } as const;
    execFile(command, args, options, (error, stdout, stderr) => {
      if (error === null) {
        resolve({ code: 0, stdout, stderr });
      } else if (typeof error.code === 'number') {
        resolve({ code: error.code, stdout, stderr });
      } else {
        // Not there, killed, or too talkative.
        reject(error);
      }
    });
  });
}

/** Runs a client that must succeed. Returns what it wrote to stdout. */
export async function run(command: string, args: readonly string[], cwd?: string): Promise<string> {
  const { code, stdout, stderr } = await tryRun(command, args, cwd);
  if (code !== 0) {
    throw new Error(`${command} ${args.join(' ')}: exit code ${code}\n${stderr}${stdout}`);
  }
  return stdout;
}

/** The clients of one Debian release. */
export class Release {
  readonly name: string;
  /** What precedes a tool's name. */
  readonly #folder: string;

  constructor(name: string, folder: string) {
    this.name = name;
    this.#folder = folder;
  }

  /** Path of a tool. */
  tool(name: string): string {
    return join(this.#folder, name);
  }

  run(name: string, args: readonly string[], cwd?: string): Promise<string> {
    return run(this.tool(name), args, cwd);
  }

  tryRun(name: string, args: readonly string[], cwd?: string): Promise<Finished> {
    return tryRun(this.tool(name), args, cwd);
  }

  /** Runs a Python script with libnbd. The URIs and paths that it needs are its arguments. */
  python(script: string, ...args: string[]): Promise<string> {
    return this.run('python3', ['-c', `import sys, nbd\n${script}`, ...args]);
  }
}

/** This machine's own clients, which know no extended headers. */
export const BOOKWORM: Release = new Release('bookworm', '/usr/bin');
/** Those that scripts/clients.sh has unpacked: they ask for extended headers. */
export const TRIXIE: Release = new Release('trixie', join(cacheFolder, 'clients/trixie/bin'));
export const RELEASES: readonly Release[] = [BOOKWORM, TRIXIE];

/** Declares a test for the clients of each release. */
export function testReleases(
  title: string,
  body: (t: ExecutionContext, client: Release) => Promise<void>,
): void {
  for (const release of RELEASES) {
    test(`${title} (${release.name})`, (t) => body(t, release));
  }
}

/** Writes a sparse file: data at some places, holes elsewhere. */
export async function writeSparse(
  path: string,
  sizeBytes: number,
  data: readonly (Extent & { readonly bytes: Buffer })[],
): Promise<void> {
  const file = await open(path, 'w+');
  try {
    await file.truncate(sizeBytes);
    for (const { offset, length, bytes } of data) {
      await file.write(bytes, 0, length, offset);
    }
  } finally {
    await file.close();
  }
}
