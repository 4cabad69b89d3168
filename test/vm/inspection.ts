// SPDX-License-Identifier: Apache-2.0
// libguestfs's look at a disk that is served: by the appliance of scripts/appliance.sh.

import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { cacheFolder } from './checkout.ts';
import { runTool } from './host.ts';

/** The appliance boots for half a minute, if it has a core for itself. */
export const inspectionLimitMs: number = 20 * 60_000;
/** What guestfish is asked about the root that it finds. */
const properties = ['type', 'distro', 'product-name', 'hostname', 'package-format', 'mountpoints'];

/** guestfish with the system that it finds on a port of localhost: docs/p2v.md has it, too. */
export function guestfish(port: number): string[] {
  return ['guestfish', '--ro', '--format=raw', '-a', `nbd://localhost:${port}`, '-i'];
}

/**
 * The environment of libguestfs's tools for the appliance.
 * @param folder where they keep what is large.
 */
export function guestfsEnvironment(folder: string): string[] {
  return [
    `LIBGUESTFS_PATH=${join(cacheFolder, 'appliance')}`,
    ...['LIBGUESTFS_BACKEND=direct', 'LIBGUESTFS_BACKEND_SETTINGS=force_tcg'],
    ...['LIBGUESTFS_MEMSIZE=384', `LIBGUESTFS_CACHEDIR=${folder}`],
    // What is dear for an emulated processor: see test/vm/guest.ts.
    'LIBGUESTFS_APPEND=nokaslr mitigations=off no5lvl clearcpuid=112,297',
  ];
}

/**
 * Has libguestfs inspect the disk that is the default export of a port of localhost.
 * @param root its root file system, as libguestfs names it: /dev/sda1.
 * @returns the roots that it finds, a line each, and then a line for each property of the one,
 *   more for its mount points and packages.
 */
export async function inspect(port: number, root: string): Promise<string> {
  const folder = await mkdtemp(join(tmpdir(), 'stillblock-guestfs-'));
  const commands = [
    ...['inspect-get-roots', ...properties.map((what) => `inspect-get-${what} ${root}`)],
    `inspect-list-applications2 ${root}`,
  ];
  const words = commands.flatMap((command) => [':', ...command.split(' ')]).slice(1);
  try {
    const options = { timeoutMs: inspectionLimitMs };
    return (
      await runTool('env', [...guestfsEnvironment(folder), ...guestfish(port), ...words], options)
    ).stdout;
  } finally {
    await rm(folder, { recursive: true, force: true });
  }
}
