// SPDX-License-Identifier: Apache-2.0
/** Where state is kept. */
import { mkdir, rmdir } from 'node:fs/promises';
import { dirname, join, resolve } from 'node:path';
import { env } from 'node:process';
import { explain } from './errors.ts';

/** Folders of one installation. */
export interface Folders {
  /** Of what runs now; empty after a reboot. */
  readonly run: string;
  /** Of what is kept. */
  readonly state: string;
}

/** The folders, which `STILLBLOCK_RUN_DIR` and `STILLBLOCK_STATE_DIR` override. */
export function folders(environment: NodeJS.ProcessEnv = env): Folders {
  const { STILLBLOCK_RUN_DIR: run, STILLBLOCK_STATE_DIR: state } = environment;
  return { run: run || '/run/stillblock', state: state || '/var/lib/stillblock' };
}

/** The folder of checkpoints. */
export function checkpointFolder({ state }: Folders): string {
  return join(state, 'checkpoints');
}

/**
 * Makes a folder for root alone, with those above it.
 *
 * @returns what removes again the folders that were made, as far as they are empty
 */
export async function makeFolder(path: string): Promise<() => Promise<void>> {
  let first: string | undefined;
  try {
    first = await mkdir(path, { recursive: true, mode: 0o700 });
  } catch (error) {
    throw explain(error, path);
  }
  return async () => {
    if (first === undefined) {
      return;
    }
    for (let folder = resolve(path); folder.startsWith(first); folder = dirname(folder)) {
      try {
        await rmdir(folder);
      } catch {
        // Somebody else uses it by now.
        return;
      }
    }
  };
}
