// SPDX-License-Identifier: Apache-2.0
/** What keeps a backup out of the way of the server's own work. Without the addon, nothing. */
import type { ForgetCached } from '../nbd/export.ts';
import type { Logger } from '../nbd/logger.ts';

/**
 * Puts this process's I/O behind everybody else's.
 *
 * @returns what has read data forgotten by the page cache, for `openFileSource`
 */
export async function beGentle(logger: Logger): Promise<ForgetCached | undefined> {
  try {
    const { forgetCached, yieldIo } = await import('./native.ts');
    yieldIo();
    return forgetCached;
  } catch (err) {
    logger.warn({ err }, 'neither I/O priority nor page cache can be seen to');
    return undefined;
  }
}
