// SPDX-License-Identifier: Apache-2.0
// A machine that boots from its own root (ext4) by an initramfs with our hook, and has a data
// disk (XFS); boot after boot. Its copies of both disks are made from full copies and increments
// alone, and compared with the disks' images; what has changed is compared with what QEMU wrote.

import { closeSync, mkdtempSync, openSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { type Seen, seenHistories } from '../kernels/histories.ts';
import { buildTool, Conversation, MiB } from '../kernels/world.ts';
import { BootTree, hostRoot, initCmdline, rootCmdline } from './boot-tree.ts';
import type { KernelName } from './checkout.ts';
import { bootGuest, type Guest, type GuestDisk } from './guest.ts';
import { makeSparseFile, runTool } from './host.ts';
import { blocksOf, type LoggedWrite, logLength, readWriteLog } from './write-log.ts';

export const tracked = ['root', 'data'] as const;
export type TrackedName = (typeof tracked)[number];
export type Each<T> = Readonly<Record<TrackedName, T>>;

export const sizes = { root: 512, data: 320, copyroot: 512, copydata: 320 } as const;
type DiskName = keyof typeof sizes;
export const nodes: Readonly<Record<DiskName, string>> = {
  root: '/dev/vda',
  data: '/dev/vdb',
  copyroot: '/dev/vdc',
  copydata: '/dev/vdd',
};
const mounts: Each<string> = { root: '/', data: '/srv/data' };
const blockBytes = 65_536;
export const place = '/var/lib/stillblock/histories';

/** A point that the copies are of. */
export interface Point {
  readonly generation: string;
  readonly number: number;
}

/** What an increment was. */
export interface Increment {
  /** In whole blocks. */
  readonly changedBytes: number;
  /** The blocks that QEMU wrote meanwhile. */
  readonly writtenBytes: number;
}

export interface BootOptions {
  /** systemd in place of the tests' own process 1. */
  readonly systemd?: boolean;
  /** Without the module: an initramfs that has nothing of ours. */
  readonly foreign?: boolean;
  readonly killAfterMs?: number;
}

const settings = `<stillblock>
  <devices><device path="/dev/vda" name="root"/><device path="/dev/vdb" name="data"/></devices>
  <history keep="yes"/>
</stillblock>
`;

/** One boot. */
export class Boot {
  readonly guest: Guest;
  readonly #world: Booted;
  readonly #ioctls: string;
  #module: Conversation | undefined;

  constructor(guest: Guest, world: Booted, ioctls: string) {
    this.guest = guest;
    this.#world = world;
    this.#ioctls = ioctls;
  }

  get module(): Conversation {
    this.#module ??= new Conversation(this.guest, hostRoot + this.#ioctls);
    return this.#module;
  }

  async seen(): Promise<Each<Seen>> {
    const all = await seenHistories(this.module);
    const of = (name: TrackedName, minor: number): Seen => {
      const found = all.find((each) => each.minor === minor);
      if (found === undefined) throw new Error(`${name} is not tracked`);
      return found;
    };
    return { root: of('root', 0), data: of('data', 16) };
  }

  /** The data disk is mounted, and the file of the histories held fast, as the daemon does it. */
  async settle(): Promise<void> {
    await this.guest.run(`mount ${nodes.data} /srv/data`);
    await this.hold();
  }

  async hold(): Promise<void> {
    await this.module.require(`place file:${place}:${nodes.root}`);
  }

  async write(name: string, kib: number): Promise<void> {
    await this.guest.run(
      `for at in /root /srv/data; do dd if=/dev/urandom of=$at/${name} bs=1k count=${kib} status=none; done; sync`,
    );
  }

  /** Writes to both disks until the machine ends. */
  startWorkload(): void {
    this.guest.start(
      `n=0; while :; do
        for at in /root /srv/data; do
          dd if=/dev/urandom of=$at/busy-$((n % 7)) bs=4k count=$((n % 13 + 1)) seek=$((n * 5 % 64)) conv=notrunc,fdatasync status=none
        done
        n=$((n + 1))
      done`,
    );
  }

  /**
   * Takes a snapshot, brings the copies up to it, by what changed since the last point if that
   * is known, and compares all of them with the images.
   *
   * @returns what the increments were; undefined for a full copy
   */
  async checkpoint(): Promise<Each<Increment | undefined>> {
    const before = await this.seen();
    const images = await this.#world.logged(() =>
      this.module.require(
        `take now trackers=${tracked.map((name) => before[name].id).join(',')} mounts=${tracked.map((name) => mounts[name]).join(',')} stores=memory:${64 * MiB}`,
      ),
    );
    const found: Partial<Record<TrackedName, Increment>> = {};
    for (const [index, name] of tracked.entries()) {
      const image = `/dev/${images[index]}`;
      const copy = nodes[`copy${name}`];
      const since = this.#world.since(name, before[name]);
      const ranges: LoggedWrite[] =
        since === undefined
          ? [{ offset: 0, length: sizes[name] * MiB }]
          : (await this.module.require(`map now ${index} ${since}`)).map((range) => {
              const [offset = 0, length = 0] = range.split(':').map(Number);
              return { offset, length };
            });
      const copies = ranges.map(({ offset, length }) => {
        const unit = length % MiB === 0 && offset % MiB === 0 ? MiB : blockBytes;
        return `dd if=${image} of=${copy} bs=${unit} iflag=direct oflag=direct conv=notrunc status=none skip=${offset / unit} seek=${offset / unit} count=${length / unit}`;
      });
      await this.guest.run(`set -e\n${copies.join('\n')}\ncmp ${image} ${copy}`);
      if (since !== undefined) found[name] = this.#world.compareWithLog(name, ranges);
    }
    await this.module.require('close now');
    this.#world.keepPoint(before);
    return { root: found.root, data: found.data };
  }

  /**
   * Ends as a machine does: everything is killed, unmounted, or read-only; then the kernel.
   *
   * @param last what ends it in the place of that
   */
  async reboot(allowed: readonly RegExp[] = [], last?: string): Promise<void> {
    await this.guest.shutdown(
      allowed,
      last ??
        `exec >/dev/console 2>&1
        kill -KILL -1
        while mountpoint -q /srv/data; do umount /srv/data || sleep 0.1; done
        umount -l ${hostRoot}; until mount -o remount,ro /; do sleep 0.1; done
        exec systemctl --force --force reboot`,
    );
    this.#world.keepLogs();
  }
}

type Marks = Each<{ readonly before: number; readonly after: number }>;

interface LogPart {
  readonly writes: Each<readonly LoggedWrite[]>;
}

export class Booted {
  readonly kernel: KernelName;
  readonly #folder: string;
  readonly #ioctls: string;
  readonly #initrd: string;
  #foreignInitrd = '';
  readonly #points = new Map<TrackedName, Point>();
  /** Writes of boots that have ended, since the last point. */
  #ended: LogPart[] = [];
  /** How long the logs of this boot were around the take of the last point, if it was in it. */
  #marks: Marks | undefined;
  /** Of the snapshot that becomes the next point. */
  #next: Marks | undefined;
  #bootMs = 0;
  #boot: Boot | undefined;

  private constructor(kernel: KernelName, folder: string, ioctls: string) {
    this.kernel = kernel;
    this.#folder = folder;
    this.#ioctls = ioctls;
    this.#initrd = join(folder, 'initrd');
  }

  file(name: string): string {
    return join(this.#folder, name);
  }

  /**
   * Makes the disks, has the daemon make place and plan in a first boot, and the initramfs by
   * these.
   */
  static async prepare(kernel: KernelName): Promise<Booted> {
    const folder = mkdtempSync(join(tmpdir(), 'stillblock-booted-'));
    const world = new Booted(kernel, folder, await buildTool('ioctls'));
    try {
      await world.#prepare();
      return world;
    } catch (error) {
      await world.remove();
      throw error;
    }
  }

  async #prepare(): Promise<void> {
    const tree = await BootTree.make(this.file('tree'), this.kernel);
    tree.write('etc/stillblock/stillblock.xml', settings);
    this.#foreignInitrd = this.file('initrd-foreign');
    await tree.makeInitrd(this.#foreignInitrd, undefined);
    await tree.makeDisk(this.file('root'), sizes.root * MiB);
    for (const name of ['data', 'copyroot', 'copydata'] as const) {
      makeSparseFile(this.file(name), sizes[name] * MiB);
    }
    const first = await this.boot({ foreign: true });
    const { stdout: plan } = await first.guest.run(
      `set -e
      mkfs.xfs -q -K ${nodes.data}; echo '${nodes.data} /srv/data xfs defaults 0 0' >>/etc/fstab
      mount /srv/data; modprobe stillblock
      mkdir -p /run/stillblock; stillblock serve >/run/log 2>&1 & daemon=$!
      until [ -s /var/lib/stillblock/boot-plan ] && [ -S /run/stillblock/control.sock ]; do
        kill -0 $daemon || { cat /run/log; exit 1; }; sleep 0.2
      done
      kill $daemon; wait $daemon || true
      cat /var/lib/stillblock/boot-plan`,
    );
    await tree.makeInitrd(this.#initrd, plan);
    await runTool('rm', ['-rf', this.file('tree')]);
    await first.reboot();
  }

  /** How long the last boot took to its agent's first word, milliseconds. */
  get bootMs(): number {
    return this.#bootMs;
  }

  /** Puts disks and copies aside, until what returns brings them back as they were. */
  async saveDisks(): Promise<() => Promise<void>> {
    const copies = tracked.map((name) => `copy${name}` as const);
    const copy = async (names: readonly string[], from: string, to: string): Promise<void> => {
      for (const name of names) {
        await runTool('cp', ['--sparse=always', this.file(name + from), this.file(name + to)]);
      }
    };
    await copy([...tracked, ...copies], '', '.saved');
    const points = new Map(this.#points);
    const ended = [...this.#ended];
    return async () => {
      const moved = tracked.some((name) => this.#points.get(name) !== points.get(name));
      await copy([...tracked, ...(moved ? copies : [])], '.saved', '');
      for (const [name, point] of points) this.#points.set(name, point);
      this.#ended = [...ended];
      this.#marks = undefined;
    };
  }

  async boot(options: BootOptions = {}): Promise<Boot> {
    // Of a proof that failed.
    await this.#boot?.guest.kill();
    const disks = (Object.keys(sizes) as DiskName[]).map(
      (name): GuestDisk => ({
        ...{ name, sizeBytes: sizes[name] * MiB, file: this.file(name) },
        ...(name === 'root' || name === 'data' ? { writeLog: this.#logFile(name) } : {}),
      }),
    );
    for (const name of tracked) closeSync(openSync(this.#logFile(name), 'w'));
    const started = performance.now();
    const guest = await bootGuest({
      kernel: this.kernel,
      initrd: options.foreign === true ? this.#foreignInitrd : this.#initrd,
      // The console tells what the module does.
      appendCmdline: `loglevel=7 ${options.systemd === true ? rootCmdline : initCmdline}`,
      disks,
      memoryMiB: 1024,
      ...(options.killAfterMs === undefined ? {} : { killAfterMs: options.killAfterMs }),
    });
    this.#bootMs = performance.now() - started;
    this.#boot = new Boot(guest, this, this.#ioctls);
    return this.#boot;
  }

  #logFile(name: TrackedName): string {
    return this.file(`${name}.log`);
  }

  /** Remembers where the logs were when a snapshot was taken. */
  async logged<T>(take: () => Promise<T>): Promise<T> {
    const length = (): Each<number> => ({
      root: logLength(this.#logFile('root')),
      data: logLength(this.#logFile('data')),
    });
    const before = length();
    const result = await take();
    const after = length();
    this.#next = {
      root: { before: before.root, after: after.root },
      data: { before: before.data, after: after.data },
    };
    return result;
  }

  /** @returns the number of the last point, if its history goes on */
  since(name: TrackedName, { generation }: Seen): number | undefined {
    const point = this.#points.get(name);
    return point?.generation === generation ? point.number : undefined;
  }

  /** @returns disks for a guest that is another machine */
  disksFor(...names: readonly TrackedName[]): GuestDisk[] {
    return names.map((name) => ({ name, sizeBytes: sizes[name] * MiB, file: this.file(name) }));
  }

  keepPoint(seen: Each<Seen>): void {
    for (const name of tracked) this.#points.set(name, seen[name]);
    this.#marks = this.#next;
    this.#ended = [];
  }

  /** @returns the point that the copy of a disk is of */
  point(name: TrackedName): Point | undefined {
    return this.#points.get(name);
  }

  /** A boot has ended: what it wrote after the last point is remembered. */
  keepLogs(): void {
    const marks = this.#marks;
    const of = (name: TrackedName): LoggedWrite[] =>
      readWriteLog(this.#logFile(name), marks?.[name].after);
    this.#ended.push({ writes: { root: of('root'), data: of('data') } });
    this.#marks = undefined;
  }

  /**
   * All that QEMU has written since the last point has to be among what the module calls
   * changed.
   */
  compareWithLog(name: TrackedName, ranges: readonly LoggedWrite[]): Increment {
    const earlier = this.#ended.flatMap(({ writes }) => writes[name]);
    const now = readWriteLog(
      this.#logFile(name),
      this.#marks?.[name].after,
      this.#next?.[name].before,
    );
    const written = blocksOf([...earlier, ...now], blockBytes);
    const changed = blocksOf(ranges, blockBytes);
    const missed = [...written].filter((block) => !changed.has(block));
    if (missed.length > 0) {
      throw new Error(`${name}: blocks ${missed.join(' ')} were written, and are not changed`);
    }
    return { changedBytes: changed.size * blockBytes, writtenBytes: written.size * blockBytes };
  }

  async remove(): Promise<void> {
    await this.#boot?.guest.kill();
    rmSync(this.#folder, { recursive: true, force: true });
  }
}
