// SPDX-License-Identifier: Apache-2.0
/** Files that survive a crash: as before, or as they were to become, never in between. */
import { open, rename, rm } from 'node:fs/promises';
import { dirname } from 'node:path';

/** Has the kernel write out a file's data, or a folder's names. */
export async function syncPath(path: string): Promise<void> {
  const handle = await open(path, 'r');
  try {
    await handle.sync();
  } finally {
    await handle.close();
  }
}

/**
 * Puts a text in the place of a file. When it rejects, the file is as it was.
 *
 * @param path of the file; `path.new` beside it is ours, too
 */
export async function replaceFile(path: string, text: string): Promise<void> {
  const temporary = `${path}.new`;
  try {
    const handle = await open(temporary, 'w', 0o600);
    try {
      await handle.writeFile(text);
      await handle.sync();
    } finally {
      await handle.close();
    }
    await rename(temporary, path);
  } catch (error) {
    await rm(temporary, { force: true }).catch(() => {});
    throw error;
  }
  await syncPath(dirname(path));
}
