// SPDX-License-Identifier: Apache-2.0
// Runs the stress test in a guest: compiles it, boots a kernel with a disk for
// every kind of device, lets devices.sh make them, and judges the outcome.

import { mkdir, readdir, rename, stat } from 'node:fs/promises';
import { join } from 'node:path';
import { checkout, type KernelName } from '../vm/checkout.ts';
import { arrayOnOneDisk } from '../vm/console.ts';
import { type BusName, bootGuest, type Guest } from '../vm/guest.ts';
import { runTool } from '../vm/host.ts';
import { shellQuote } from '../vm/initrd.ts';

const MiB = 1 << 20;
const sources: string = join(checkout, 'test/stress');

/** Data disks, MiB; XFS and btrfs refuse to be smaller. */
const disks: Readonly<Record<string, number>> = {
  whole: 16,
  parted: 32,
  both: 16,
  under: 16,
  lvm1: 48,
  lvm2: 48,
  crypt: 16,
  md: 96,
  files: 32,
  ext4: 64,
  xfs: 96,
  btrfs: 160,
  store: 48,
  storedisk: 64,
  nvme: 16,
  scsi: 16,
};
const buses: Readonly<Record<string, BusName>> = { nvme: 'nvme', scsi: 'virtio-scsi' };
/**
 * What the checkers' kernel does without: it takes minutes to make these there, and to serve
 * all of them at once. kernels/devices and kernels/uses have them, one after the other.
 */
const withoutCheckers = ['lvm1', 'lvm2', 'crypt', 'md', 'xfs', 'btrfs', 'scsi'];
/** Every writer rests so long on the checkers' kernel, or a take does not come to its end. */
const checkedPaceUs = 1_600_000;

const setupLimitMs = 900_000;
/** What the last steps and the final checks may take, after the time is over. */
const endLimitMs = 420_000;
const showEveryMs = 2_000;

/** The counts of a run, as the program prints them. */
export interface StressCounts {
  readonly seed: number;
  readonly seconds: number;
  readonly takes: number;
  readonly images: number;
  readonly imageBytesRead: number;
  readonly unitsChecked: number;
  readonly filesChecked: number;
  readonly fileSystemsChecked: number;
  readonly mapBlocksChecked: number;
  readonly checkpointPairs: number;
  readonly pairBlocksCompared: number;
  readonly stackedBlocksCompared: number;
  readonly bytesWritten: number;
  readonly kills: number;
  readonly overflows: number;
  readonly growths: number;
  readonly refused: number;
  readonly violations: number;
}

/** What was seen of a run. */
export interface StressResult {
  /** undefined when the program ended before it could count. */
  readonly counts: StressCounts | undefined;
  readonly code: number;
  /** What it said while it ran, violations included. */
  readonly log: string;
}

export interface StressOptions {
  /** Repeats the choices of another run. */
  readonly seed: number;
  readonly seconds: number;
  readonly onLine?: (line: string) => void;
}

async function newest(paths: readonly string[]): Promise<number> {
  const times = await Promise.all(paths.map(async (path) => (await stat(path)).mtimeMs));
  return Math.max(...times);
}

/**
 * Compiles the program, with warnings as errors.
 * @returns its path, the same in the guest as here.
 */
async function buildStress(): Promise<string> {
  const folder = join(checkout, 'build/stress');
  const program = join(folder, 'stress');
  const uapi = join(checkout, 'module/uapi');
  const files = (await readdir(sources)).map((name) => join(sources, name));
  const inputs = files.filter((path) => path.endsWith('.c') || path.endsWith('.h'));
  await mkdir(folder, { recursive: true });
  const built = await newest([program]).catch(() => 0);
  if (built > (await newest([...inputs, join(uapi, 'linux/stillblock.h')]))) return program;
  // Another process may do the same at this moment.
  const fresh = `${program}.${process.pid}`;
  await runTool('gcc-12', [
    ...['-std=gnu11', '-O2', '-Wall', '-Wextra', '-Werror', '-pthread', '-I', uapi],
    ...['-o', fresh, ...inputs.filter((path) => path.endsWith('.c'))],
  ]);
  await rename(fresh, program);
  return program;
}

/** A guest with all kinds of devices, in which the test can be run. */
export class StressGuest {
  readonly guest: Guest;
  readonly #program: string;
  readonly #arguments: string;

  private constructor(guest: Guest, program: string, args: string) {
    this.guest = guest;
    this.#program = program;
    this.#arguments = args;
  }

  /**
   * Boots the kernel, loads the module and makes the devices.
   * @param parallel see GuestOptions.
   */
  static async boot(kernel: KernelName, parallel: boolean): Promise<StressGuest> {
    const checked = kernel === 'debug';
    const program = await buildStress();
    const wanted = Object.entries(disks).filter(
      ([name]) => !checked || !withoutCheckers.includes(name),
    );
    const guest = await bootGuest({
      kernel,
      parallel,
      saved: true,
      disks: wanted.map(([name, size]) => ({
        name,
        sizeBytes: size * MiB,
        bus: buses[name] ?? 'virtio-blk',
      })),
    });
    try {
      const nodes = await Promise.all(
        wanted.map(async ([name]) => `${name}=${await guest.disk(name)}`),
      );
      const { stdout } = await guest.run(
        `${nodes.join(' ')} ${shellQuote(join(sources, 'devices.sh'))}`,
        { timeoutMs: setupLimitMs },
      );
      await guest.loadModule();
      const pace = checked ? [`--pace ${checkedPaceUs}`] : [];
      return new StressGuest(guest, program, [...pace, ...stdout.split('\n')].join(' '));
    } catch (error) {
      await guest.kill();
      throw error;
    }
  }

  /**
   * Runs the test once; a violation is a result, not an error.
   * @param onLine gets what it says while it runs.
   */
  async run({ seed, seconds, onLine }: StressOptions): Promise<StressResult> {
    const command = this.guest.start(
      `exec ${shellQuote(this.#program)} --seed ${seed} --seconds ${seconds} ${this.#arguments} 2>&1`,
    );
    const ended = command.wait(seconds * 1000 + endLimitMs);
    let shown = 0;
    const show = (): void => {
      const lines = command.stdout.split('\n').slice(0, -1);
      for (const line of lines.slice(shown)) onLine?.(line);
      shown = lines.length;
    };
    const showing = setInterval(show, showEveryMs);
    try {
      const { stdout, code } = await ended;
      const line = stdout.split('\n').find((text) => text.startsWith('{'));
      const counts = line === undefined ? undefined : (JSON.parse(line) as StressCounts);
      return { counts, code, log: stdout };
    } finally {
      clearInterval(showing);
      show();
    }
  }

  /**
   * Checks the origins' file systems, unloads the module and powers off.
   * @throws Error when anything is left of the module, or the kernel complained.
   */
  async end(): Promise<void> {
    await this.guest.run(
      `set -e
      check() { ! source=$(findmnt -no SOURCE /srv/$1) || { umount /srv/$1; shift; "$@" $source; }; }
      check ext4 e2fsck -fn
      check xfs xfs_repair -n
      check btrfs btrfs check --readonly
      rmmod stillblock`,
      { timeoutMs: setupLimitMs },
    );
    await this.guest.shutdown([arrayOnOneDisk]);
  }

  /** For cleaning up; may be called at any time. */
  async close(): Promise<void> {
    await this.guest.kill();
  }
}
