// SPDX-License-Identifier: Apache-2.0
/** Where state is kept. */
import { mkdir } from 'node:fs/promises';
import { join } from 'node:path';
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

/** Makes a folder for root alone, with those above it. */
export async function makeFolder(path: string): Promise<void> {
  try {
    await mkdir(path, { recursive: true, mode: 0o700 });
  } catch (error) {
    throw explain(error, path);
  }
}
