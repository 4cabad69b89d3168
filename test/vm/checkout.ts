// SPDX-License-Identifier: Apache-2.0
// Where things are: the checkout this code was compiled in, and the cache that
// the scripts fill.

import { readFileSync } from 'node:fs';
import { homedir } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

/** The checkout's root folder; compiled tests lie in its dist/test/vm. */
export const checkout: string = join(dirname(fileURLToPath(import.meta.url)), '../../..');

/** Kernels and other fetched things: see scripts/common.sh. */
export const cacheFolder: string =
  process.env['STILLBLOCK_CACHE'] ??
  join(process.env['XDG_CACHE_HOME'] ?? join(homedir(), '.cache'), 'stillblock');

/** The kernels that guests boot, as scripts/kernels.sh names them: stock ones, and one with checkers. */
export const kernelNames = ['5.10', '6.1', '6.12', '7.2', 'debug'] as const;
export type KernelName = (typeof kernelNames)[number];

/**
 * The kernel of this test run, which `npm run test:kernels` repeats for each of
 * them: `STILLBLOCK_TEST_KERNEL`, or 6.1 without it.
 * @throws Error when it names none of them.
 */
export function testKernel(): KernelName {
  const wanted = process.env['STILLBLOCK_TEST_KERNEL'] ?? '6.1';
  const kernel = kernelNames.find((name) => name === wanted);
  if (kernel === undefined) {
    throw new Error(`STILLBLOCK_TEST_KERNEL=${wanted} is none of ${kernelNames.join(', ')}`);
  }
  return kernel;
}

/** A kernel in the cache; the one with checkers is laid out as the stock ones are. */
export interface StockKernel {
  readonly image: string;
  /** See plain-kernel.ts, which makes it. */
  readonly plain: string;
  readonly release: string;
  /** Holds RELEASE/, as /lib/modules does. */
  readonly modulesFolder: string;
}

/** @throws Error that says how to fetch the kernel when it is not in the cache. */
export function stockKernel(name: KernelName): StockKernel {
  const tree = join(cacheFolder, 'kernels', name);
  try {
    const release = readFileSync(join(tree, 'release'), 'utf8').trim();
    return {
      image: join(tree, 'vmlinuz'),
      plain: join(tree, 'vmlinux'),
      release,
      modulesFolder: join(tree, 'lib/modules'),
    };
  } catch (cause) {
    throw new Error(`kernel ${name} is not in ${tree}: run scripts/kernels.sh ${name}`, { cause });
  }
}

/** The kernel module as scripts/build-module.sh built it for a kernel. */
export function modulePath(name: KernelName): string {
  return join(checkout, 'build', `module-${name}`, 'stillblock.ko');
}
