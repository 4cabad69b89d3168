// SPDX-License-Identifier: Apache-2.0
// A guest of libvirt's whose disk is a port of `stillblock p2v`; without any daemon of libvirt's.

import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises';
import { createServer, type Server } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { runTool } from './host.ts';

/** An ordinary user's: libvirt as root wants users that its daemon's package makes. */
const nobody = 65_534;

export class LibvirtGuest {
  readonly #folder: string;
  readonly #serial: Server;
  readonly #libvirt: ChildProcess;
  readonly #ended: Promise<unknown>;
  #text = '';
  #log = '';
  #changed: () => void = () => {};

  private constructor(folder: string, serial: Server) {
    this.#folder = folder;
    this.#serial = serial;
    serial.on('connection', (socket) => {
      socket.setEncoding('latin1').on('data', (piece: string) => {
        this.#text += piece;
        this.#changed();
      });
    });
    const program = ['virt-qemu-run', `--root=${folder}/libvirt`, join(folder, 'domain.xml')];
    if (process.getuid?.() === 0) {
      program.unshift('setpriv', `--reuid=${nobody}`, `--regid=${nobody}`, '--clear-groups');
    }
    const environment = [`HOME=${folder}`, `XDG_RUNTIME_DIR=${folder}`];
    this.#libvirt = spawn('env', [...environment, ...program], {
      stdio: ['ignore', 'ignore', 'pipe'],
    });
    this.#libvirt.stderr?.setEncoding('utf8').on('data', (piece: string) => {
      this.#log += piece;
    });
    this.#ended = once(this.#libvirt, 'close').then(() => this.#changed());
  }

  /**
   * Starts a guest. Call `end` at the end.
   * @param disk libvirt's XML of it.
   */
  static async start(disk: string, memoryMiB: number): Promise<LibvirtGuest> {
    const folder = await mkdtemp(join(tmpdir(), 'stillblock-libvirt-'));
    const line = join(folder, 'serial');
    const serial = createServer();
    await once(serial.listen(line), 'listening');
    await writeFile(
      join(folder, 'domain.xml'),
      `<domain type="qemu"><name>web1</name><memory unit="MiB">${memoryMiB}</memory>
      <os><type arch="x86_64" machine="pc">hvm</type></os><features><acpi/></features>
      <devices>${disk}
      <serial type="unix"><source mode="connect" path="${line}"/></serial></devices></domain>`,
    );
    await mkdir(join(folder, 'libvirt/etc'), { recursive: true });
    // No daemon for logs either.
    await writeFile(join(folder, 'libvirt/etc/qemu.conf'), 'stdio_handler = "file"\n');
    if (process.getuid?.() === 0) await runTool('chown', ['-R', `${nobody}:${nobody}`, folder]);
    return new LibvirtGuest(folder, serial);
  }

  /** @throws Error with what it has written when it does not write this in time, or ends. */
  async waitForSerial(pattern: RegExp, timeoutMs: number): Promise<void> {
    const timer = new AbortController();
    let late = false;
    const limit = delay(timeoutMs, undefined, { signal: timer.signal }).then(
      () => {
        late = true;
        this.#changed();
      },
      () => {},
    );
    while (!pattern.test(this.#text)) {
      if (late || this.#libvirt.exitCode !== null || this.#libvirt.signalCode !== null) {
        throw new Error(`libvirt's guest did not write ${pattern}\n${this.#log}${this.#text}`);
      }
      await new Promise<void>((resolve) => {
        this.#changed = resolve;
      });
    }
    timer.abort();
    await limit;
  }

  /** Has libvirt end the guest. */
  async end(): Promise<void> {
    this.#libvirt.kill('SIGTERM');
    await this.#ended;
    this.#serial.close();
    await rm(this.#folder, { recursive: true, force: true });
  }
}
