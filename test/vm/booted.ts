// SPDX-License-Identifier: Apache-2.0
// A machine that boots from its own root (ext4) by an initramfs with our hook, and has a data
// disk (XFS); boot after boot. Its copies of both disks are made from full copies and increments
// alone, and compared with the disks' images, outside, since an emulated processor takes long for
// it; what has changed is compared with what QEMU wrote.

import { closeSync, mkdtempSync, openSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { type Seen, seenHistories } from '../kernels/histories.ts';
import { Conversation, MiB } from '../kernels/world.ts';
import { BootTree, cmdlines, hostRoot, ioctlsPath, mountHostRoot } from './boot-tree.ts';
import type { KernelName } from './checkout.ts';
import { bootGuest, type Guest, type GuestDisk, type GuestOptions } from './guest.ts';
import { makeSparseFile, runTool } from './host.ts';
import { blocksOf, type LoggedWrite, logLength, readWriteLog } from './write-log.ts';

export const tracked = ['root', 'data'] as const;
export type TrackedName = (typeof tracked)[number];
export type Each<T> = Readonly<Record<TrackedName, T>>;

export const sizes = {
  root: 512,
  data: 320,
  copyroot: 512,
  copydata: 320,
  image: 512,
  spare: 16,
} as const;
type DiskName = keyof typeof sizes;
export const nodes: Readonly<Record<DiskName, string>> = {
  root: '/dev/vda',
  data: '/dev/vdb',
  copyroot: '/dev/vdc',
  copydata: '/dev/vdd',
  image: '/dev/vde',
  spare: '/dev/vdf',
};
const mounts: Each<string> = { root: '/', data: '/srv/data' };
const blockBytes = 65_536;
/** Longest time for our commands, which an emulated processor has to compile first, milliseconds. */
export const cliLimitMs = 600_000;
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
  /** What is process 1: the tests' own, alone or with udev, or systemd. */
  readonly init?: 'bare' | 'udev' | 'systemd';
  /** Without the module: an initramfs that has nothing of ours. */
  readonly foreign?: boolean;
  readonly kill?: GuestOptions['kill'];
  /** By an initramfs with another plan; see `makeInitrd`. */
  readonly initrd?: string;
}

export const metrics = '/run/metrics.sock';
const settings = `<stillblock>
  <devices><device path="/dev/vda" name="root"/><device path="/dev/vdb" name="data"/></devices>
  <metrics socket="${metrics}"/>
</stillblock>
`;

/** One boot. */
export class Boot {
  readonly guest: Guest;
  readonly #world: Booted;
  #module: Conversation | undefined;

  constructor(guest: Guest, world: Booted) {
    this.guest = guest;
    this.#world = world;
  }

  get module(): Conversation {
    this.#module ??= new Conversation(this.guest, ioctlsPath);
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

  /** With systemd: the daemon is there, and the data disk is mounted. */
  async up(): Promise<void> {
    await this.guest.run(
      'until systemctl is-active -q stillblock srv-data.mount; do sleep 0.5; done',
      { timeoutMs: cliLimitMs },
    );
  }

  /** What a command of ours says. */
  async told(command: string): Promise<unknown> {
    const { stdout } = await this.guest.run(`stillblock ${command} --json`, {
      timeoutMs: cliLimitMs,
    });
    return JSON.parse(stdout);
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
      const whole = `dd if=${image} of=${nodes.image} bs=1M iflag=direct oflag=direct status=none`;
      await this.guest.run(['set -e', ...copies, whole].join('\n'));
      await this.#world.compareCopy(name);
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
        ! mountpoint -q ${hostRoot} || umount -l ${hostRoot}; until mount -o remount,ro /; do sleep 0.1; done
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
  readonly #initrd: string;
  #foreignInitrd = '';
  #plan = '';
  #tree: BootTree | undefined;
  readonly #points = new Map<TrackedName, Point>();
  /** Writes of boots that have ended, since the last point. */
  #ended: LogPart[] = [];
  /** How long the logs of this boot were around the take of the last point, if it was in it. */
  #marks: Marks | undefined;
  /** Of the snapshot that becomes the next point. */
  #next: Marks | undefined;
  #bootMs = 0;
  #boot: Boot | undefined;

  private constructor(kernel: KernelName, folder: string) {
    this.kernel = kernel;
    this.#folder = folder;
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
    const world = new Booted(kernel, folder);
    try {
      await world.#prepare();
      return world;
    } catch (error) {
      await world.remove();
      throw error;
    }
  }

  async #prepare(): Promise<void> {
    this.#foreignInitrd = this.file('initrd-foreign');
    const tree = await BootTree.make(this.file('tree'), this.kernel, this.#foreignInitrd);
    this.#tree = tree;
    tree.write('etc/stillblock/stillblock.xml', settings);
    await tree.makeDisk(this.file('root'), sizes.root * MiB);
    for (const name of ['data', 'copyroot', 'copydata', 'image', 'spare'] as const) {
      makeSparseFile(this.file(name), sizes[name] * MiB);
    }
    const first = await this.boot({ foreign: true });
    const { stdout: plan } = await first.guest.run(
      `set -e
      mkfs.xfs -q -K ${nodes.data}; echo '${nodes.data} /srv/data xfs defaults 0 0' >>/etc/fstab
      mount /srv/data; ${mountHostRoot}; modprobe stillblock
      mkdir -p /run/stillblock; stillblock serve >/run/log 2>&1 & daemon=$!
      until [ -s /var/lib/stillblock/boot-plan ] && [ -S /run/stillblock/control.sock ]; do
        kill -0 $daemon || { cat /run/log; exit 1; }; sleep 0.2
      done
      kill $daemon; wait $daemon || true
      cat /var/lib/stillblock/boot-plan`,
    );
    await this.keepPlan(plan);
    await first.reboot();
  }

  /** Boots from now on are by a plan that the daemon has written. */
  async keepPlan(plan: string): Promise<void> {
    this.#plan = plan;
    await this.#tree?.makeInitrd(this.#initrd, plan);
  }

  /** What the daemon has written as plan. */
  get plan(): string {
    return this.#plan;
  }

  /** @returns what is in an initramfs by dracut */
  async makeDracut(): Promise<string> {
    return (await this.#tree?.makeDracut(this.#plan)) ?? '';
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

  /** Where a page of the place is in the file of the root disk, by the plan. */
  placeOffset(page: number): number {
    let left = page * 4096;
    const [, ...extents] = (this.#plan.split('\n')[0] ?? '').split(' ').slice(1);
    for (const extent of extents) {
      const [offset = 0, length = 0] = extent.split(':').map(Number);
      if (left < length) return offset + left;
      left -= length;
    }
    throw new Error(`the place has no page ${page}: ${this.#plan}`);
  }

  /** @returns the file of an initramfs with this plan */
  async makeInitrd(name: string, plan: string): Promise<string> {
    await this.#tree?.makeInitrd(this.file(name), plan);
    return this.file(name);
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
      hotplug: true,
      kernel: this.kernel,
      initrd: options.foreign === true ? this.#foreignInitrd : (options.initrd ?? this.#initrd),
      // The console tells what the module does.
      appendCmdline: `loglevel=7 ${cmdlines[options.init ?? 'bare']}`,
      disks,
      memoryMiB: 1024,
      ...(options.kill === undefined ? {} : { kill: options.kill }),
    });
    this.#bootMs = performance.now() - started;
    this.#boot = new Boot(guest, this);
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

  /** The copy of a disk has to be what the disk `image` has been filled with. */
  async compareCopy(name: TrackedName): Promise<void> {
    const bytes = String(sizes[name] * MiB);
    await runTool('cmp', ['-n', bytes, this.file('image'), this.file(`copy${name}`)]);
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
