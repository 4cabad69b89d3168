// SPDX-License-Identifier: Apache-2.0
/**
 * Names for images: /dev/disk/by-snapshot/CHECKPOINT/DISK. udev makes these links
 * (configs/udev), of what we leave for it in the run folder.
 */
import { mkdir, rm, rmdir, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import type { Logger } from 'pino';

/** An image, by the kernel's name for it. */
export interface NamedImage {
  readonly device: string;
  readonly disk: string;
}

/**
 * Tells udev whose images they are. That there is none is no failure: images are served
 * without these links as well.
 *
 * @param run the run folder
 * @returns what takes it back
 */
export async function linkImages(
  run: string,
  checkpoint: string,
  images: readonly NamedImage[],
  log: Logger,
  sysfs = '/sys',
): Promise<() => Promise<void>> {
  const folder = join(run, 'images');
  const files = images.map(({ device }) => join(folder, device));
  try {
    await mkdir(folder, { recursive: true, mode: 0o700 });
    for (const [index, { device, disk }] of images.entries()) {
      const text = `STILLBLOCK_CHECKPOINT=${checkpoint}\nSTILLBLOCK_DISK=${disk}\n`;
      await writeFile(files[index] ?? '', text);
      await writeFile(join(sysfs, 'block', device, 'uevent'), 'change', { flag: 'r+' });
    }
  } catch (err) {
    log.warn({ err }, 'images have no links');
  }
  return async () => {
    await Promise.all(files.map((file) => rm(file, { force: true })));
    // Another backup's may be in it.
    await rmdir(folder).catch(() => {});
  };
}
