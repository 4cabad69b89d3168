// SPDX-License-Identifier: Apache-2.0
/** Which parts of a plain file hold data, as its file system knows. */
import { open } from 'node:fs/promises';
import { NBD_STATE_HOLE, NBD_STATE_ZERO, SECTOR_BYTES } from '../nbd/constants.ts';
import { ExtentMap } from '../nbd/extents.ts';

/**
 * The flags of `base:allocation` for a plain file: holes read as zeroes. A sector
 * with any data in it is data.
 *
 * @param sizeBytes size of the file, bytes
 * @returns undefined for anything else than a plain file, whose holes nobody knows
 * @throws Error with an errno name in `code` if the file can't be examined, or with
 *   `ERR_MODULE_NOT_FOUND`, `ERR_DLOPEN_FAILED` and the like if the addon is missing
 */
export async function fileAllocation(
  path: string,
  sizeBytes: number,
): Promise<ExtentMap | undefined> {
  const file = await open(path, 'r');
  try {
    if (!(await file.stat()).isFile()) {
      return undefined;
    }
    // Loaded only here, so that devices can be served where the addon is not built.
    const { dataRanges } = await import('./native.ts');
    const data = await dataRanges(file.fd, sizeBytes);
    return ExtentMap.fromRanges(sizeBytes, data, 0, NBD_STATE_HOLE | NBD_STATE_ZERO, SECTOR_BYTES);
  } finally {
    await file.close();
  }
}
