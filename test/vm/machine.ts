// SPDX-License-Identifier: Apache-2.0
// A whole Debian in QEMU, as scripts/machine.sh makes it: it boots from its own disk,
// with firmware, boot loader, initrd, systemd and udev, and keeps what is written to its
// disks over reboots and power cuts. Slower to boot than a Guest by far; for what a
// machine does around its boots.

import { type ChildProcess, execFile, spawn } from 'node:child_process';
import { readFileSync, writeFileSync } from 'node:fs';
import { mkdtemp, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { Duplex } from 'node:stream';
import { setTimeout as delay } from 'node:timers/promises';
import { promisify } from 'node:util';
import { cacheFolder } from './checkout.ts';
import { type CommandResult, GuestCommand } from './command.ts';
import { findComplaints } from './console.ts';
import { agentPort, agentReady, type RunOptions } from './guest.ts';
import { makeSparseFile } from './host.ts';
import { Qmp } from './qmp.ts';

/** The machines that scripts/machine.sh makes: Debian 12 with 6.1, Debian 13 with 6.12. */
export const machineNames = ['bookworm', 'trixie'] as const;
export type MachineName = (typeof machineNames)[number];

export type Firmware = 'bios' | 'uefi' | 'secure-boot';

export interface MachineDisk {
  /** Its serial number, too: the disk is /dev/disk/by-id/virtio-NAME in the machine. */
  readonly name: string;
  readonly sizeBytes: number;
  /** A raw file of the caller's; without it an empty one, which `remove` removes. */
  readonly file?: string;
}

export interface MachineOptions {
  /** Which machine to make a copy of; or `disk`. */
  readonly name?: MachineName;
  /** The disk to boot from, a raw file of the caller's, which is written to. */
  readonly disk?: string;
  readonly firmware?: Firmware;
  /** Further disks, which come after the one to boot from. */
  readonly disks?: readonly MachineDisk[];
  /** Added to the kernel's command line. */
  readonly cmdline?: string;
  readonly memoryMiB?: number;
  readonly cpus?: number;
  /**
   * TCP ports of the machine, each reached by the port of the same number on the host's
   * loopback, which has to be free.
   */
  readonly ports?: readonly number[];
}

const execute = promisify(execFile);
/** A boot takes a minute alone on its core; other guests may share it. */
const bootLimitMs = 600_000;
const endLimitMs = 300_000;
const runLimitMs = 240_000;
const chips = ['-machine', 'pc'];
/** By kind: its code and variables, as Debian's ovmf has them, and the machine for it. */
const firmwares = {
  bios: { machine: chips },
  uefi: { code: 'OVMF_CODE.fd', variables: 'OVMF_VARS.fd', machine: chips },
  // With Microsoft's keys, which Debian's shim is signed by. Only code in system management
  // mode writes the variables, which needs the other chips.
  'secure-boot': {
    ...{ code: 'OVMF_CODE_4M.ms.fd', variables: 'OVMF_VARS_4M.ms.fd' },
    machine: [
      ...['-machine', 'q35,smm=on'],
      ...['-global', 'driver=cfi.pflash01,property=secure,value=on'],
    ],
  },
} as const;
const firmwareFolder = '/usr/share/OVMF';

/** The disk that copies are made of. */
export function machineDisk(name: MachineName): string {
  return join(cacheFolder, 'machines', name, 'disk.qcow2');
}

/** One boot: from QEMU's start to its end. */
interface Power {
  readonly qemu: ChildProcess;
  readonly qmp: Qmp;
  readonly ended: Promise<void>;
  /** Where this boot's console begins. */
  readonly from: number;
  port: number;
}

export class Machine {
  readonly #options: MachineOptions;
  readonly #folder: string;
  #console = '';
  #errors = '';
  #changed: () => void = () => {};
  #power: Power | undefined;

  private constructor(options: MachineOptions, folder: string) {
    this.#options = options;
    this.#folder = folder;
  }

  /** Makes a machine, whose power is off. Call `remove` at the end. */
  static async make(options: MachineOptions): Promise<Machine> {
    const folder = await mkdtemp(join(tmpdir(), 'stillblock-machine-'));
    const machine = new Machine(options, folder);
    try {
      if (options.name !== undefined) {
        const base = machineDisk(options.name);
        const backing = ['-b', base, '-F', 'qcow2'];
        await execute('qemu-img', ['create', '-q', '-f', 'qcow2', ...backing, machine.rootDisk]);
      }
      for (const { name, sizeBytes, file } of options.disks ?? []) {
        if (file === undefined) {
          makeSparseFile(join(folder, name), sizeBytes);
        }
      }
      const firmware = firmwares[options.firmware ?? 'bios'];
      if ('variables' in firmware) {
        const variables = await readFile(join(firmwareFolder, firmware.variables));
        writeFileSync(join(folder, 'variables'), variables);
      }
    } catch (error) {
      await machine.remove();
      throw error;
    }
    return machine;
  }

  /** The file of the disk that it boots from: qcow2 for a copy, raw for a caller's. */
  get rootDisk(): string {
    return this.#options.disk ?? join(this.#folder, 'root.qcow2');
  }

  /** The file of a further disk, raw. */
  diskFile(name: string): string {
    const disk = this.#options.disks?.find((candidate) => candidate.name === name);
    if (disk === undefined) throw new Error(`there is no disk ${name}`);
    return disk.file ?? join(this.#folder, name);
  }

  #arguments(cmdline: string): string[] {
    const { memoryMiB = 1024, cpus = 1, ports = [], disk, disks = [] } = this.#options;
    const firmware = firmwares[this.#options.firmware ?? 'bios'];
    const forwards = [
      `hostfwd=tcp:127.0.0.1:0-:${agentPort}`,
      ...ports.map((port) => `hostfwd=tcp:127.0.0.1:${port}-:${port}`),
    ];
    const drives = [
      { name: 'root', driver: disk === undefined ? 'qcow2' : 'raw', filename: this.rootDisk },
      ...disks.map(({ name }) => ({ name, driver: 'raw', filename: this.diskFile(name) })),
    ];
    return [
      ...['-accel', 'tcg,thread=single', '-cpu', 'max', ...firmware.machine, '-nodefaults'],
      ...['-no-user-config', '-display', 'none', '-smp', String(cpus), '-m', String(memoryMiB)],
      ...['-chardev', 'stdio,id=console,signal=off', '-serial', 'chardev:console'],
      ...['-chardev', 'socket,id=qmp,fd=3', '-mon', 'chardev=qmp,mode=control'],
      ...['-netdev', `user,id=net,restrict=on,${forwards.join(',')}`],
      ...['-device', 'virtio-net-pci,netdev=net,romfile=', '-device', 'virtio-rng-pci'],
      // What the boot loader adds to the command line: see scripts/machine.sh.
      ...['-smbios', `type=1,family=${cmdline.replaceAll(',', ',,')}`],
      ...('code' in firmware
        ? [
            '-drive',
            `if=pflash,format=raw,unit=0,readonly=on,file=${join(firmwareFolder, firmware.code)}`,
            ...['-drive', `if=pflash,format=raw,unit=1,file=${join(this.#folder, 'variables')}`],
          ]
        : []),
      ...drives.flatMap(({ name, driver, filename }, index) => [
        '-blockdev',
        JSON.stringify({
          ...{ 'node-name': name, driver, discard: 'unmap', cache: { 'no-flush': true } },
          file: { driver: 'file', filename },
        }),
        '-device',
        JSON.stringify({
          ...{ driver: 'virtio-blk-pci', id: name, drive: name, serial: name },
          bootindex: index + 1,
        }),
      ]),
    ];
  }

  /**
   * Switches it on, and waits for its agent.
   * @param cmdline for this boot and the reboots after it, in place of `MachineOptions.cmdline`.
   * @throws Error with the end of the console if it does not boot.
   */
  async powerOn(cmdline: string = this.#options.cmdline ?? ''): Promise<void> {
    const power = this.switchOn(cmdline);
    await this.#agent(power.from);
  }

  /** Switches it on without waiting for anything: for boots that do not end in a system. */
  switchOn(cmdline: string = this.#options.cmdline ?? ''): { readonly from: number } {
    if (this.#power !== undefined) throw new Error('the machine is switched on already');
    const program = ['--pdeathsig', 'KILL', 'qemu-system-x86_64', ...this.#arguments(cmdline)];
    const qemu = spawn('setpriv', program, { stdio: ['pipe', 'pipe', 'pipe', 'pipe'] });
    // What is typed when it has just ended is lost.
    qemu.stdin?.on('error', () => {});
    qemu.stdout?.setEncoding('latin1').on('data', (text: string) => {
      this.#console += text;
      this.#changed();
    });
    qemu.stderr?.setEncoding('utf8').on('data', (text: string) => {
      this.#errors += text;
    });
    const ended = new Promise<void>((resolve) => {
      const end = (): void => {
        this.#power = undefined;
        this.#changed();
        resolve();
      };
      qemu.once('close', end);
      qemu.once('error', (error) => {
        this.#errors += `${error.message} (apt-get install qemu-system-x86 util-linux)`;
        end();
      });
    });
    const qmp = new Qmp(qemu.stdio[3] as Duplex);
    this.#power = { qemu, qmp, ended, from: this.#console.length, port: 0 };
    return this.#power;
  }

  /** Waits for the agent's line in the console, from a place on. */
  async #agent(from: number): Promise<void> {
    await this.waitForConsole(new RegExp(agentReady), bootLimitMs, from);
    const power = this.#on();
    if (power.port === 0) {
      await power.qmp.execute('qmp_capabilities');
      const command = { 'command-line': 'info usernet' };
      const table = String(await power.qmp.execute('human-monitor-command', command));
      const forward = new RegExp(
        `HOST_FORWARD\\]\\s+\\d+\\s+\\S+\\s+(\\d+)\\s+\\S+\\s+${agentPort}\\b`,
      );
      power.port = Number(forward.exec(table)?.[1]);
    }
  }

  #on(): Power {
    if (this.#power === undefined) throw this.#failure('is switched off');
    return this.#power;
  }

  #failure(what: string): Error {
    const tail = this.#console.split('\n').slice(-60).join('\n');
    return new Error(`the machine ${what}\n${this.#errors}${tail}`);
  }

  /** What it has written to its serial line, over all boots. */
  console(): string {
    return this.#console;
  }

  /**
   * Waits until the console shows something.
   * @param from where in the console to look from, such as its length before.
   * @returns the match.
   * @throws Error with the end of the console when it is late, or the machine goes off.
   */
  async waitForConsole(
    pattern: RegExp,
    timeoutMs: number,
    from: number = this.#power?.from ?? 0,
  ): Promise<RegExpExecArray> {
    const limit = performance.now() + timeoutMs;
    for (;;) {
      const match = pattern.exec(this.#console.slice(from));
      if (match !== null) return match;
      const leftMs = limit - performance.now();
      if (this.#power === undefined) throw this.#failure(`went off before it wrote ${pattern}`);
      if (leftMs <= 0) throw this.#failure(`did not write ${pattern} within ${timeoutMs} ms`);
      const timer = new AbortController();
      const grown = new Promise<void>((resolve) => {
        this.#changed = resolve;
      });
      await Promise.race([
        grown,
        delay(leftMs, undefined, { signal: timer.signal }).catch(() => {}),
      ]);
      timer.abort();
      this.#changed = () => {};
    }
  }

  /** Starts a command for bash as root; any number may run at once. */
  start(command: string): GuestCommand {
    return new GuestCommand(this.#on().port, command, () =>
      this.#failure(`was lost during: ${command}`),
    );
  }

  /**
   * Runs a command for bash to its end.
   * @throws Error with its output when it fails (unless `check` is false), takes too long,
   *   or the machine goes off.
   */
  async run(command: string, options: RunOptions = {}): Promise<CommandResult> {
    const result = await this.start(command).wait(options.timeoutMs ?? runLimitMs);
    if (result.code !== 0 && options.check !== false) {
      const output = `${result.stdout}${result.stderr}`;
      throw new Error(`exit code ${result.code} in the machine: ${command}\n${output}`);
    }
    return result;
  }

  /** Copies a file of the host's into the machine. */
  async copyIn(file: string, to: string): Promise<void> {
    const command = this.start(`base64 -d >'${to}'`);
    command.write(readFileSync(file).toString('base64'));
    command.endInput();
    const { code, stderr } = await command.wait(runLimitMs);
    if (code !== 0) throw new Error(`${to} cannot be written in the machine: ${stderr}`);
  }

  /** Types at its serial line, as at a terminal. */
  type(keys: string): void {
    this.#on().qemu.stdin?.write(keys, 'latin1');
  }

  /**
   * Reboots it in the proper way, and waits for its agent.
   * @param command that does it.
   * @param meanwhile what is done at its console before it boots.
   */
  async reboot(
    command = 'systemctl reboot',
    meanwhile: () => Promise<void> = async () => {},
  ): Promise<void> {
    const from = this.#console.length;
    this.start(command);
    await meanwhile();
    await this.#agent(from);
  }

  /** Resets it as its button does, and waits for its agent. */
  async reset(): Promise<void> {
    const from = this.#console.length;
    await this.#on().qmp.execute('system_reset');
    await this.#agent(from);
  }

  /** Powers it off in the proper way, so that its disks are as it leaves them. */
  async powerOff(): Promise<void> {
    const { ended } = this.#on();
    this.start('systemctl poweroff');
    const timer = new AbortController();
    const late = delay(endLimitMs, 'late' as const, { signal: timer.signal }).catch(
      () => undefined,
    );
    const outcome = await Promise.race([ended, late]);
    timer.abort();
    if (outcome === 'late') {
      const failure = this.#failure(`did not power off within ${endLimitMs} ms`);
      await this.cutPower();
      throw failure;
    }
  }

  /** Switches it off at once. What its disks have taken is kept. */
  async cutPower(): Promise<void> {
    this.#power?.qemu.kill('SIGKILL');
    await this.#power?.ended;
  }

  /**
   * @param allowed complaints that the test itself provokes.
   * @throws Error with the kernel's first complaint, of any boot.
   */
  assertCleanConsole(allowed: readonly RegExp[] = []): void {
    const [first, ...others] = findComplaints(this.#console, allowed);
    if (first === undefined) return;
    throw new Error(
      `its kernel complained (${others.length + 1} lines); the first:\n${first.context}`,
    );
  }

  /** Switches it off at once, and removes its disks. May be called at any time. */
  async remove(): Promise<void> {
    await this.cutPower();
    await rm(this.#folder, { recursive: true, force: true });
  }
}
