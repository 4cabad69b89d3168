// SPDX-License-Identifier: Apache-2.0
// Boots that are saved, in build/boots: a kernel takes most of an emulated guest's start, and
// the checkers' one a minute, to come where it comes each time.

import { createHash } from 'node:crypto';
import { existsSync, readFileSync, statSync } from 'node:fs';
import { mkdir } from 'node:fs/promises';
import { join } from 'node:path';
import { execPath } from 'node:process';
import { fileURLToPath } from 'node:url';
import { checkout, type KernelName, stockKernel } from './checkout.ts';
import { runTool } from './host.ts';

const folder = join(checkout, 'build/boots');
/** The checkers' kernel, beside another guest. */
const saveLimitMs = 600_000;

/** All that a saved boot depends on, in short. */
async function fingerprint(kernel: KernelName): Promise<string> {
  const { image, modulesFolder } = stockKernel(kernel);
  const { size, mtimeMs } = statSync(image);
  const hash = createHash('sha256');
  hash.update((await runTool('qemu-system-x86_64', ['--version'])).stdout);
  hash.update(JSON.stringify([checkout, image, size, mtimeMs, modulesFolder, execPath]));
  for (const name of ['guest.js', 'initrd.js']) {
    hash.update(readFileSync(fileURLToPath(new URL(name, import.meta.url))));
  }
  hash.update(readFileSync(join(checkout, 'test/vm/init.sh')));
  return hash.digest('hex').slice(0, 16);
}

/** @returns the file of a saved boot of this kernel, which is made if need be */
export async function savedBoot(kernel: KernelName): Promise<string> {
  const path = join(folder, `${kernel}-${await fingerprint(kernel)}`);
  if (!existsSync(path)) {
    await mkdir(folder, { recursive: true });
    // Another test file may be at it.
    const script = fileURLToPath(new URL('save-boot.js', import.meta.url));
    const program = [execPath, script, kernel, path];
    await runTool('flock', [join(folder, `${kernel}.lock`), ...program], {
      timeoutMs: saveLimitMs,
    });
  }
  return path;
}
