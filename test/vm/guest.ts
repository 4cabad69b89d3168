// SPDX-License-Identifier: Apache-2.0
// A guest with one of our kernels in QEMU. Its root is the host's own root, read
// only, under an overlay in memory, so that the same Node, tools and checkout
// are inside; its disks are scratch files; its ports are forwarded to the
// host's loopback. QEMU dies with this process, however that ends.

import { type ChildProcess, spawn } from 'node:child_process';
import { randomUUID } from 'node:crypto';
import {
  closeSync,
  mkdtempSync,
  openSync,
  readFileSync,
  rmSync,
  statSync,
  writeFileSync,
} from 'node:fs';
import { mkdir, readFile, rename, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import type { Duplex } from 'node:stream';
import { setTimeout as delay } from 'node:timers/promises';
import { cacheFolder, type KernelName, modulePath, stockKernel } from './checkout.ts';
import { type CommandResult, GuestCommand } from './command.ts';
import { findComplaints, findLeaks, findLeftAreas } from './console.ts';
import { makeSparseFile } from './host.ts';
import { buildInitrd, shellQuote } from './initrd.ts';
import { plainKernel } from './plain-kernel.ts';
import { Qmp } from './qmp.ts';
import { savedBoot } from './saved-boot.ts';

/** How a disk is attached to its guest. */
export const busNames = ['virtio-blk', 'nvme', 'virtio-scsi'] as const;
export type BusName = (typeof busNames)[number];

/** A data disk, whose serial number is its name. */
export interface GuestDisk {
  /** At most 20 letters, digits and the like: the length of a virtio-blk serial number. */
  readonly name: string;
  readonly sizeBytes: number;
  /** virtio-blk without it. */
  readonly bus?: BusName;
  /** A raw file of the caller's; without it a sparse file that ends with the guest. */
  readonly file?: string;
  /** Where QEMU writes down each write of this boot, data included; see write-log.ts. */
  readonly writeLog?: string;
}

export interface GuestOptions {
  readonly kernel: KernelName;
  readonly disks?: readonly GuestDisk[];
  readonly memoryMiB?: number;
  readonly cpus?: number;
  /**
   * The guest's clock counts instructions, each as 2 to this power nanoseconds (QEMU's
   * -icount); always emulated, and with one processor.
   */
  readonly icount?: number;
  /**
   * true: each of an emulated guest's processors has a thread of its own, and they really
   * run at once. Otherwise they take turns in one, which is a third cheaper, and what is
   * right where other guests run beside. QEMU 7.2 with several threads runs a breakpoint
   * that the kernel's text patching has removed since: a boot in some dozens dies of an
   * int3, and a hook that comes or goes under full write load hangs in one of fifty cases.
   */
  readonly parallel?: boolean;
  /**
   * true: `plug` will be used. Its methods for thirty slots are what ACPI has to read most
   * of at boot, which takes half a minute with the checkers.
   */
  readonly hotplug?: boolean;
  /**
   * true: an emulated guest begins where a boot of this kernel was saved, just before it looks
   * at its disks. So it has memory, processors, a command line and idle disks that are the same
   * for all such guests, and disks of other buses are plugged in. See saved-boot.ts.
   */
  readonly saved?: boolean;
  /** TCP ports of the guest, each forwarded from a free port of the host's loopback. */
  readonly forwardPorts?: readonly number[];
  readonly extraArgs?: readonly string[];
  readonly appendCmdline?: string;
  /**
   * An initramfs of the caller's: the guest's root is not the host's then, but what the command
   * line says. Its agent is to say that it is ready, as agent.py does.
   */
  readonly initrd?: string;
  /** QEMU is killed so long after its console has said this, wherever its guest is then. */
  readonly kill?: { readonly word: string; readonly afterMs: number };
}

export interface RunOptions {
  /** After which the command is killed and the run rejected. */
  readonly timeoutMs?: number;
  /** false: another exit code than 0 is a result, not an error. */
  readonly check?: boolean;
}

type Accelerator = 'kvm' | 'tcg';

export const agentPort = 1009;
export const agentReady = 'stillblock-agent: ready';
/** Real virtualisation reaches the agent in three seconds; nested kinds may hang for ever. */
const kvmBootLimitMs = 8_000;
/** An emulated boot takes 10 s alone on its core; other guests may share it. */
const bootLimitMs = 180_000;
/** See GuestOptions.parallel; nothing of ours runs yet. */
const parallelBoots = 3;
const defaultRunLimitMs = 240_000;
const shutdownLimitMs = 180_000;
/** Two scans by kmemleak. */
const scanLimitMs = 600_000;

/** The longest time that a checked kernel takes, as a multiple of a stock one's. */
const debugSlowness = 3;
/** KASAN's shadow and quarantine, and the records of kmemleak. */
const debugMemoryMiB = 1024;

/** See GuestOptions.hotplug. */
const noHotplug = [
  ...['-global', 'PIIX4_PM.acpi-root-pci-hotplug=off'],
  ...['-global', 'PIIX4_PM.acpi-pci-hotplug-with-bridge-support=off'],
];

/** init.sh says so where a boot is saved. */
const initWaits = 'stillblock-init: waits';

/** What all guests that begin with a saved boot have, whatever they ask for. */
const savedShape = { memoryMiB: 3072, diskCount: 14 } as const;
/** The checkers' own guests have less: kmemleak looks at every page. */
const debugSavedMemoryMiB = 1024;

/** @returns what QEMU is started with; disks of other buses are plugged in later */
function inSavedShape(options: GuestOptions): GuestOptions {
  const disks = (options.disks ?? []).filter(({ bus = 'virtio-blk' }) => bus === 'virtio-blk');
  if (disks.length > savedShape.diskCount) throw new Error('more disks than a saved boot has');
  const idle = Array.from({ length: savedShape.diskCount - disks.length }, (_, index) => ({
    name: `idle${index}`,
    sizeBytes: 1 << 20,
  }));
  return {
    ...options,
    disks: [...disks, ...idle],
    memoryMiB: options.kernel === 'debug' ? debugSavedMemoryMiB : savedShape.memoryMiB,
    hotplug: true,
    extraArgs: ['-device', `virtio-scsi-pci,id=${scsiController}`],
    // With a queue that is polled, for the writes that are.
    appendCmdline: 'stillblock.saved nvme.poll_queues=1',
  };
}

/** Drivers of the buses that are not needed to boot. */
const busModules: Readonly<Record<BusName, string>> = {
  'virtio-blk': 'virtio_blk',
  nvme: 'nvme',
  'virtio-scsi': 'virtio_scsi sd_mod',
};

/** The controller of all disks on virtio-scsi. */
const scsiController = 'scsi-controller';

/** QEMU's device for a disk, whose block node has the disk's name. */
function diskDevice(name: string, bus: BusName): Record<string, string> {
  const common = { id: name, drive: name, serial: name };
  switch (bus) {
    case 'virtio-blk':
      return { driver: 'virtio-blk-pci', ...common };
    case 'nvme':
      return { driver: 'nvme', ...common };
    case 'virtio-scsi':
      return { driver: 'scsi-hd', bus: `${scsiController}.0`, ...common };
    default:
      return bus satisfies never;
  }
}

/**
 * Text for a shell that prints the device node of the disk with this serial number, and
 * fails if there is none. virtio-blk and NVMe tell it as text, SCSI as page 0x80 of its
 * vital product data, whose first four bytes are a header.
 */
const findDisk = (name: string): string => `(
  tell() { [ "$1" = ${shellQuote(name)} ] && [ -b /dev/\${block##*/} ] && echo /dev/\${block##*/} && exit; }
  for block in /sys/block/*; do
    for file in serial device/serial; do
      serial=
      read -r serial <$block/$file
      tell "$serial"
    done
    [ -e $block/device/vpd_pg80 ] && tell "$(tail -c +5 $block/device/vpd_pg80)"
  done 2>/dev/null
  exit 1)`;

/**
 * Lets kmemleak look for leaks, and prints them. What is younger than five seconds is not
 * called a leak, nor what has changed between two scans.
 */
const scanForLeaks = `set -e
  leaks=/sys/kernel/debug/kmemleak
  echo scan >$leaks
  while [ $SECONDS -lt 6 ]; do sleep 0.2; done
  echo scan >$leaks
  cat $leaks`;

/** Where this machine's answer is kept until its next boot. */
const accelerationFile = join(cacheFolder, 'acceleration.json');

const bootId = (): string => readFileSync('/proc/sys/kernel/random/boot_id', 'utf8').trim();

async function rememberedAccelerator(): Promise<Accelerator | undefined> {
  try {
    const remembered = JSON.parse(await readFile(accelerationFile, 'utf8')) as {
      bootId?: string;
      accelerator?: Accelerator;
    };
    return remembered.bootId === bootId() ? remembered.accelerator : undefined;
  } catch {
    return undefined;
  }
}

async function rememberAccelerator(accelerator: Accelerator): Promise<void> {
  const fresh = `${accelerationFile}.${process.pid}`;
  await mkdir(dirname(accelerationFile), { recursive: true });
  await writeFile(fresh, JSON.stringify({ bootId: bootId(), accelerator }));
  await rename(fresh, accelerationFile);
}

function kvmIsUsable(): boolean {
  try {
    closeSync(openSync('/dev/kvm', 'r+'));
    return true;
  } catch {
    return false;
  }
}

/**
 * Boots a guest: with KVM where that works, tried once per boot of this machine
 * with a short limit, else emulated.
 * @throws Error with the console when the guest does not reach its agent.
 */
export async function bootGuest(options: GuestOptions): Promise<Guest> {
  const slowness = options.kernel === 'debug' ? debugSlowness : 1;
  if (options.icount !== undefined) {
    return Guest.boot({ ...options, cpus: 1 }, 'tcg', slowness * bootLimitMs);
  }
  const remembered = await rememberedAccelerator();
  if (remembered === undefined && kvmIsUsable()) {
    try {
      const guest = await Guest.boot(options, 'kvm', slowness * kvmBootLimitMs);
      await rememberAccelerator('kvm');
      return guest;
    } catch {
      await rememberAccelerator('tcg');
    }
  }
  const attempts = options.parallel && remembered !== 'kvm' ? parallelBoots : 1;
  for (let attempt = 1; ; attempt += 1) {
    try {
      return await Guest.boot(options, remembered ?? 'tcg', slowness * bootLimitMs);
    } catch (error) {
      if (attempt === attempts) throw error;
    }
  }
}

/** A guest that did not do what it should. */
export class GuestFailure extends Error {
  readonly #console: string;

  constructor(message: string, console: string) {
    super(message);
    this.#console = console;
  }

  /** All of the console's text, of which the message has the end. */
  get console(): string {
    return this.#console;
  }
}

export class Guest {
  readonly kernel: KernelName;
  readonly accelerator: Accelerator;
  readonly #qemu: ChildProcess;
  readonly #qmp: Qmp;
  readonly #ended: Promise<void>;
  readonly #folder: string;
  readonly #ports = new Map<number, number>();
  #console = '';
  #qemuErrors = '';
  #alive = true;
  #killTimed = false;
  #consoleGrew: () => void = () => {};

  private constructor(options: GuestOptions, accelerator: Accelerator, state?: string) {
    this.kernel = options.kernel;
    this.accelerator = accelerator;
    this.#folder = mkdtempSync(join(tmpdir(), 'stillblock-guest-'));
    try {
      // The fourth descriptor is a socket pair's end: QEMU's machine protocol.
      this.#qemu = spawn(
        'setpriv',
        [
          ...['--pdeathsig', 'KILL', 'qemu-system-x86_64', ...this.#arguments(options)],
          ...(state === undefined ? [] : ['-incoming', `exec:cat ${shellQuote(state)}`]),
        ],
        {
          stdio: ['pipe', 'pipe', 'pipe', 'pipe'],
        },
      );
    } catch (error) {
      this.#removeFolder();
      throw error;
    }
    this.#qemu.stdout?.setEncoding('latin1').on('data', (text: string) => {
      this.#console += text;
      this.#killAfterWord(options.kill);
      this.#consoleGrew();
    });
    this.#qemu.stderr?.setEncoding('utf8').on('data', (text: string) => {
      this.#qemuErrors += text;
    });
    this.#qmp = new Qmp(this.#qemu.stdio[3] as Duplex);
    this.#ended = new Promise((resolve) => {
      const end = (): void => {
        this.#alive = false;
        this.#removeFolder();
        this.#consoleGrew();
        resolve();
      };
      this.#qemu.once('close', end);
      this.#qemu.once('error', (error) => {
        this.#qemuErrors += `${error.message} (apt-get install qemu-system-x86 util-linux)`;
        end();
      });
    });
  }

  /** @see bootGuest */
  static async boot(
    options: GuestOptions,
    accelerator: Accelerator,
    limitMs: number,
  ): Promise<Guest> {
    const isSaved = options.saved === true;
    // What runs for real boots faster than it is read.
    const state = isSaved && accelerator === 'tcg' ? await savedBoot(options.kernel) : undefined;
    const guest = new Guest(isSaved ? inSavedShape(options) : options, accelerator, state);
    try {
      await guest.#qmp.execute('qmp_capabilities');
      if (isSaved) await guest.#goOn(state, limitMs);
      await guest.#waitForConsole(agentReady, limitMs);
      await guest.#findPorts();
      // There is no udev, which would load the drivers of other buses.
      for (const disk of options.disks ?? []) {
        const { name, bus = 'virtio-blk' } = disk;
        if (bus === 'virtio-blk') continue;
        if (isSaved) await guest.#plugIn(guest.#diskNode(disk), name, bus);
        await guest.#awaitDisk(name, bus);
      }
      // QEMU holds its files open; without names they end with it.
      guest.#removeFolder();
      return guest;
    } catch (error) {
      await guest.kill();
      throw error;
    }
  }

  /**
   * Boots a kernel up to where its init waits for a line, and saves that machine.
   * @param path of the file to be made
   * @see savedBoot
   */
  static async save(kernel: KernelName, path: string): Promise<void> {
    const guest = new Guest(inSavedShape({ kernel }), 'tcg');
    try {
      await guest.#qmp.execute('qmp_capabilities');
      await guest.#waitForConsole(
        initWaits,
        (kernel === 'debug' ? debugSlowness : 1) * bootLimitMs,
      );
      await guest.#qmp.execute('stop');
      await guest.#qmp.execute('migrate-set-parameters', { 'max-bandwidth': 2 ** 40 });
      await guest.#qmp.execute('migrate', { uri: `exec:cat >${shellQuote(path)}` });
      await guest.#waitForState('query-migrate', 'completed', bootLimitMs);
    } finally {
      await guest.kill();
    }
  }

  /** Waits for a status of QEMU's. */
  async #waitForState(query: string, wanted: string, limitMs: number): Promise<void> {
    const limit = performance.now() + limitMs;
    for (;;) {
      const { status } = (await this.#qmp.execute(query)) as { status?: string };
      if (status === wanted) return;
      if (status === 'failed' || performance.now() > limit) {
        throw this.#failure(`is ${status}, not ${wanted}, by ${query}`);
      }
      await delay(20);
    }
  }

  /**
   * Lets a guest go on from where boots are saved: the clock of one has stood still since, and
   * what its kernel has made at random is the same in each that begins there.
   */
  async #goOn(state: string | undefined, limitMs: number): Promise<void> {
    if (state === undefined) {
      await this.#waitForConsole(initWaits, limitMs);
    } else {
      await this.#waitForState('query-status', 'paused', limitMs);
      await this.#qmp.execute('cont');
    }
    this.#qemu.stdin?.write(`${Math.floor(Date.now() / 1000)} ${randomUUID()}\n`);
  }

  #arguments(options: GuestOptions): string[] {
    const kernel = stockKernel(options.kernel);
    const initrd = options.initrd ?? join(this.#folder, 'initrd');
    if (options.initrd === undefined) {
      const path = `${dirname(process.execPath)}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin`;
      writeFileSync(initrd, buildInitrd(kernel, agentPort, path));
    }
    const forwards = [agentPort, ...(options.forwardPorts ?? [])]
      .map((port) => `,hostfwd=tcp:127.0.0.1:0-:${port}`)
      .join('');
    const memoryMiB =
      (options.memoryMiB ?? 2048) + (options.kernel === 'debug' ? debugMemoryMiB : 0);
    const onScsi = (options.disks ?? []).some(({ bus }) => bus === 'virtio-scsi');
    const cmdline = [
      // Warnings are complaints, and `quiet` would leave them out.
      'console=ttyS0 loglevel=5',
      // A crash ends QEMU, with its report on the console.
      'panic=-1 oops=panic',
      'nokaslr mitigations=off no5lvl net.ifnames=0 rcupdate.rcu_cpu_stall_timeout=60',
      // REP_GOOD and ERMS: an emulated `rep movs` takes twice as long as a loop of moves.
      'clearcpuid=112,297',
      // ACPI's way of telling which interrupt a disk has takes a second of each boot, and
      // with the checkers half a minute for each disk; the ciphers' self-tests take another.
      'acpi=noirq cryptomgr.notests',
      // Whose allocations can be made to fail apart from others': an xarray's nodes.
      options.kernel === 'debug' ? 'slub_debug=A,radix_tree_node' : '',
      options.appendCmdline ?? '',
    ].join(' ');
    return [
      ...(this.accelerator === 'kvm'
        ? ['-accel', 'kvm', '-cpu', 'host']
        : options.icount === undefined
          ? [
              ...['-accel', `tcg,thread=${options.parallel ? 'multi' : 'single'}`],
              ...['-cpu', 'max'],
            ]
          : ['-accel', 'tcg', '-icount', `shift=${options.icount},sleep=off`, '-cpu', 'max']),
      ...['-machine', 'pc', '-nodefaults', '-no-user-config', '-display', 'none', '-no-reboot'],
      ...(options.hotplug === true ? [] : noHotplug),
      ...['-smp', String(options.cpus ?? 2), '-m', String(memoryMiB)],
      ...['-chardev', 'stdio,id=console,signal=off', '-serial', 'chardev:console'],
      ...['-chardev', 'socket,id=qmp,fd=3', '-mon', 'chardev=qmp,mode=control'],
      ...[
        '-kernel',
        plainKernel(kernel.image, kernel.plain),
        '-initrd',
        initrd,
        '-append',
        cmdline,
      ],
      ...['-fsdev', 'local,id=root,path=/,security_model=none,readonly=on,multidevs=remap'],
      ...['-device', 'virtio-9p-pci,fsdev=root,mount_tag=hostroot', '-device', 'virtio-rng-pci'],
      ...[
        '-netdev',
        `user,id=net,restrict=on${forwards}`,
        '-device',
        'virtio-net-pci,netdev=net,romfile=',
      ],
      ...(onScsi ? ['-device', `virtio-scsi-pci,id=${scsiController}`] : []),
      ...(options.disks ?? []).flatMap((disk) => this.#diskArguments(disk)),
      ...(options.extraArgs ?? []),
    ];
  }

  /** QEMU's block node of a disk, whose file is made if need be. */
  #diskNode({ name, sizeBytes, file, writeLog }: GuestDisk): Record<string, unknown> {
    const path = file ?? join(this.#folder, name);
    if (file === undefined) {
      makeSparseFile(path, sizeBytes);
    } else if (statSync(file).size !== sizeBytes) {
      throw new Error(`${file} has not the ${sizeBytes} bytes of disk ${name}`);
    }
    const raw = {
      ...{ driver: 'raw', discard: 'unmap', cache: { 'no-flush': true } },
      file: { driver: 'file', filename: path },
    };
    const node =
      writeLog === undefined
        ? { 'node-name': name, ...raw }
        : {
            ...{ 'node-name': name, driver: 'blklogwrites', discard: 'unmap', file: raw },
            log: { driver: 'file', filename: writeLog },
          };
    return node;
  }

  #diskArguments(disk: GuestDisk): string[] {
    const { name, bus = 'virtio-blk' } = disk;
    return [
      ...['-blockdev', JSON.stringify(this.#diskNode(disk))],
      ...['-device', JSON.stringify(diskDevice(name, bus))],
    ];
  }

  #killAfterWord(kill: GuestOptions['kill']): void {
    if (kill === undefined || this.#killTimed || !this.#console.includes(kill.word)) return;
    this.#killTimed = true;
    const timer = setTimeout(() => this.#qemu.kill('SIGKILL'), kill.afterMs);
    this.#qemu.once('close', () => clearTimeout(timer));
  }

  async #waitForConsole(word: string, limitMs: number): Promise<void> {
    const timer = new AbortController();
    const late = delay(limitMs, undefined, { signal: timer.signal }).then(() => {
      throw this.#failure(`did not boot within ${limitMs} ms with ${this.accelerator}`);
    });
    late.catch(() => {});
    const ready = new Promise<void>((resolve, reject) => {
      this.#consoleGrew = () => {
        if (this.#console.includes(word)) resolve();
        else if (!this.#alive) reject(this.#failure(`ended before it said ${word}`));
      };
      this.#consoleGrew();
    });
    try {
      await Promise.race([ready, late]);
    } finally {
      timer.abort();
      this.#consoleGrew = () => {};
    }
  }

  /** QEMU chose the host's ports, so that no other process can have them. */
  async #findPorts(): Promise<void> {
    const table = String(
      await this.#qmp.execute('human-monitor-command', { 'command-line': 'info usernet' }),
    );
    for (const [, hostPort, guestPort] of table.matchAll(
      /TCP\[HOST_FORWARD\]\s+\d+\s+127\.0\.0\.1\s+(\d+)\s+\S+\s+(\d+)/g,
    )) {
      this.#ports.set(Number(guestPort), Number(hostPort));
    }
  }

  #removeFolder(): void {
    rmSync(this.#folder, { recursive: true, force: true });
  }

  #failure(what: string): Error {
    const tail = this.#console.split('\n').slice(-60).join('\n');
    const message = `guest ${this.kernel} ${what}\n${this.#qemuErrors}${tail}`;
    return new GuestFailure(message, this.#console);
  }

  /** Settles when QEMU has ended, by itself or not. */
  get ended(): Promise<void> {
    return this.#ended;
  }

  /** The console's text so far. */
  console(): string {
    return this.#console;
  }

  /** @returns the host's loopback port that leads to a port of `forwardPorts`. */
  hostPort(guestPort: number): number {
    const port = this.#ports.get(guestPort);
    if (port === undefined) throw new Error(`port ${guestPort} of the guest is not forwarded`);
    return port;
  }

  /** Starts a command for bash; any number may run at once. */
  start(command: string): GuestCommand {
    return new GuestCommand(
      this.hostPort(agentPort),
      command,
      () => this.#failure(`ended during: ${command}`),
      this.kernel === 'debug' ? debugSlowness : 1,
    );
  }

  /**
   * Runs a command for bash to its end.
   * @throws Error with its output when it fails (unless `check` is false), takes
   *   too long, or the guest ends.
   */
  async run(command: string, options: RunOptions = {}): Promise<CommandResult> {
    const result = await this.start(command).wait(options.timeoutMs ?? defaultRunLimitMs);
    if (result.code !== 0 && options.check !== false) {
      throw new Error(
        `exit code ${result.code} in guest ${this.kernel}: ${command}\n${result.stdout}${result.stderr}`,
      );
    }
    return result;
  }

  /** @returns the device node, such as /dev/vda, of the disk of that name. */
  async disk(name: string): Promise<string> {
    const { stdout, code } = await this.run(findDisk(name), { check: false });
    if (code !== 0) throw new Error(`the guest has no disk ${name}`);
    return stdout.trim();
  }

  /** Loads the driver of a disk's bus, and waits for the disk. */
  async #awaitDisk(name: string, bus: BusName): Promise<string> {
    const { stdout } = await this.run(
      `modprobe -a ${busModules[bus]}; until ${findDisk(name)}; do sleep 0.05; done`,
    );
    return stdout.trim();
  }

  /**
   * Plugs an image of the host's into the running guest, which takes `GuestOptions.hotplug`
   * but on virtio-scsi.
   * @param name not used by another disk; it is the serial number, too.
   * @param format of the image file; its backing chain is followed.
   * @param bus on virtio-scsi only beside a disk of `GuestOptions.disks` that is there, too.
   * @returns its device node.
   */
  async plug(
    name: string,
    file: string,
    format: 'raw' | 'qcow2',
    readOnly: boolean,
    bus: BusName = 'virtio-blk',
  ): Promise<string> {
    const raw = { driver: 'file', filename: file };
    await this.#plugIn(
      { 'node-name': name, driver: format, 'read-only': readOnly, file: raw },
      name,
      bus,
    );
    return this.#awaitDisk(name, bus);
  }

  async #plugIn(node: Record<string, unknown>, name: string, bus: BusName): Promise<void> {
    await this.#qmp.execute('blockdev-add', node);
    await this.#qmp.execute('device_add', diskDevice(name, bus));
  }

  /**
   * Takes a disk out of the running guest, whether or not it is in use there. Then its
   * file, if it is the caller's own, holds all that was written.
   */
  async unplug(name: string): Promise<void> {
    await this.#qmp.execute('device_del', { id: name });
    await this.run(`while ${findDisk(name)} >/dev/null; do sleep 0.05; done`);
    // The guest has let go of it; QEMU drops the device a moment later.
    const limit = performance.now() + defaultRunLimitMs;
    for (;;) {
      try {
        await this.#qmp.execute('blockdev-del', { 'node-name': name });
        return;
      } catch (error) {
        if (performance.now() > limit) throw error;
        await delay(50);
      }
    }
  }

  /**
   * Gives a disk another size, and waits until the guest knows.
   * @param name a disk on virtio-blk or virtio-scsi: QEMU's NVMe has one size for life.
   */
  async resize(name: string, sizeBytes: number): Promise<void> {
    await this.#qmp.execute('block_resize', { 'node-name': name, size: sizeBytes });
    await this.run(
      `node=$( ${findDisk(name)} ); until [ "$(cat /sys/block/\${node#/dev/}/size)" = ${sizeBytes / 512} ]; do sleep 0.05; done`,
    );
  }

  /** Loads this checkout's kernel module, as scripts/build-module.sh built it. */
  async loadModule(parameters = ''): Promise<void> {
    await this.run(`insmod ${shellQuote(modulePath(this.kernel))} ${parameters}`);
  }

  /**
   * @param allowed complaints that the test itself provokes.
   * @throws Error with each complaint of the kernel and the lines around it.
   */
  assertCleanConsole(allowed: readonly RegExp[] = []): void {
    const complaints = findComplaints(this.#console, allowed);
    if (complaints.length === 0) return;
    throw new Error(
      `the kernel of guest ${this.kernel} complained (${complaints.length} lines); the first:\n${complaints[0]?.context}`,
    );
  }

  /**
   * Under the debug kernel: what modules out of the tree have allocated, and lost.
   * @returns kmemleak's words on each object.
   */
  async findLeaks(): Promise<string[]> {
    const { stdout } = await this.run(scanForLeaks, { timeoutMs: scanLimitMs });
    return findLeaks(stdout);
  }

  /**
   * Under the debug kernel: that nothing which our module has allocated is lost.
   * @throws Error with kmemleak's report.
   */
  async assertNoLeaks(): Promise<void> {
    if (this.kernel !== 'debug') return;
    const leaks = await this.findLeaks();
    if (leaks.length === 0) return;
    throw new Error(`the module leaks (${leaks.length} objects); the first:\n${leaks[0]}`);
  }

  /**
   * Under the debug kernel: that its checkers have been at work to the end, and that no module
   * has left memory behind, as far as that is known at once. lockdep gives up after a report
   * of its own, and without a word on the console when its tables are full.
   */
  async #assertChecked(allowed: readonly RegExp[]): Promise<void> {
    if (this.kernel !== 'debug') return;
    const { stdout } = await this.run('cat /proc/lockdep_stats /proc/vmallocinfo');
    const left = findLeftAreas(stdout);
    if (left.length > 0) throw new Error(`a module has left memory behind:\n${left.join('\n')}`);
    if (/debug_locks: +1$/m.test(stdout)) return;
    this.assertCleanConsole(allowed);
    throw new Error(`lockdep has given up:\n${stdout}`);
  }

  /**
   * Powers the guest off and checks its console, and under the debug kernel what its checkers
   * tell elsewhere. kmemleak is asked where that is a matter of seconds: an emulated processor
   * takes two minutes, so kernels/memory asks for all.
   * @param allowed as for assertCleanConsole.
   * @param command that ends it. Whatever still runs would write to devices that power off
   *   under it.
   */
  async shutdown(
    allowed: readonly RegExp[] = [],
    command = 'kill -KILL -1; sync; echo o >/proc/sysrq-trigger',
  ): Promise<void> {
    if (!this.#alive) throw this.#failure('had ended before its shutdown');
    if (this.accelerator === 'kvm') await this.assertNoLeaks();
    await this.#assertChecked(allowed);
    this.start(command);
    const timer = new AbortController();
    const late = delay(shutdownLimitMs, 'late' as const, { signal: timer.signal }).catch(
      () => 'late' as const,
    );
    const outcome = await Promise.race([this.#ended, late]);
    timer.abort();
    if (outcome === 'late') {
      await this.kill();
      throw this.#failure(`did not power off within ${shutdownLimitMs} ms`);
    }
    this.assertCleanConsole(allowed);
  }

  /** Ends QEMU at once; for cleaning up. May be called at any time. */
  async kill(): Promise<void> {
    this.#qemu.kill('SIGKILL');
    await this.#ended;
  }
}
