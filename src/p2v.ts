// SPDX-License-Identifier: Apache-2.0
/**
 * A machine's disks for virt-v2v, which takes NBD only from localhost, one port per disk with
 * the default export, and without TLS: one qemu-nbd per disk stands between. And the domain
 * XML that virt-v2v's `-i libvirtxml` reads.
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { type AddressInfo, connect, createServer } from 'node:net';
import { env } from 'node:process';
import { setTimeout as delay } from 'node:timers/promises';
import { StillblockError } from './errors.ts';
import { type CertificateFolder, type NbdUri, qemuImageOptions, qemuTlsObject } from './nbd-uri.ts';
import { writeXml } from './xml-writer.ts';

/** A machine for virt-v2v. */
export interface PhysicalDomain {
  readonly name: string;
  readonly memoryBytes: number;
  readonly processors: number;
  /** As libvirt has it: `x86_64`, `aarch64`. */
  readonly architecture: string;
  readonly firmware: 'bios' | 'uefi';
  /** Ports on localhost, in the order of the machine's disks. */
  readonly ports: readonly number[];
  /** Addresses of its network cards. */
  readonly macs: readonly string[];
}

/** Name of the n-th disk: `sda` to `sdz`, then `sdaa`. */
export function diskLetters(index: number): string {
  const letter = String.fromCharCode(97 + (index % 26));
  return index < 26 ? letter : `${diskLetters(Math.floor(index / 26) - 1)}${letter}`;
}

/** Libvirt's name of an architecture, of Node's. */
export function libvirtArchitecture(architecture: string): string {
  const names: Readonly<Record<string, string>> = { x64: 'x86_64', ia32: 'i686', arm64: 'aarch64' };
  return names[architecture] ?? architecture;
}

/** Writes the domain as libvirt's XML. */
export function formatDomain(domain: PhysicalDomain): string {
  const { name, memoryBytes, processors, architecture, firmware, ports, macs } = domain;
  return writeXml({
    domain: {
      '@type': 'physical',
      name,
      // virt-v2v does not look at the unit, and takes KiB.
      memory: { '@unit': 'KiB', '#text': String(Math.ceil(memoryBytes / 1024)) },
      vcpu: String(processors),
      os: {
        ...(firmware === 'uefi' ? { '@firmware': 'efi' } : {}),
        type: { '@arch': architecture, '#text': 'hvm' },
      },
      features: { acpi: '', apic: '' },
      devices: {
        disk: ports.map((port, index) => ({
          '@type': 'network',
          '@device': 'disk',
          driver: { '@name': 'qemu', '@type': 'raw' },
          source: { '@protocol': 'nbd', host: { '@name': 'localhost', '@port': String(port) } },
          target: { '@dev': `sd${diskLetters(index)}` },
        })),
        interface: macs.map((mac) => ({
          '@type': 'network',
          mac: { '@address': mac },
          source: { '@network': 'default' },
        })),
      },
    },
  });
}

/** A port of localhost that nobody listens on now. */
async function freePort(): Promise<number> {
  const server = createServer();
  server.listen(0, '127.0.0.1');
  await once(server, 'listening');
  const { port } = server.address() as AddressInfo;
  server.close();
  await once(server, 'close');
  return port;
}

async function answers(port: number): Promise<boolean> {
  const socket = connect(port, '127.0.0.1');
  try {
    await once(socket, 'connect');
    return true;
  } catch {
    return false;
  } finally {
    socket.destroy();
  }
}

/** It listens once it has reached the server; beyond that it never will. */
const READY_MS = 30_000;
const POLL_MS = 50;

/** A disk on a port of localhost, as its default export. */
export class Forwarder {
  readonly port: number;
  readonly #child: ChildProcess;
  #output = '';
  /** Settles when it has ended, which it does only when told to. */
  readonly ended: Promise<void>;

  private constructor(port: number, child: ChildProcess) {
    this.port = port;
    this.#child = child;
    child.stderr?.setEncoding('utf8').on('data', (piece: string) => {
      this.#output = (this.#output + piece).slice(-4096);
    });
    this.ended = new Promise((resolve) => {
      child.once('close', () => resolve());
      child.once('error', () => resolve());
    });
  }

  /**
   * Starts one; it dies with this process.
   *
   * @throws StillblockError if it cannot reach the server
   */
  static async start(uri: NbdUri, certificates: CertificateFolder): Promise<Forwarder> {
    const port = await freePort();
    const child = spawn(
      'setpriv',
      [
        ...['--pdeathsig', 'KILL', 'qemu-nbd', '--read-only', '--persistent', '--shared=16'],
        ...['--bind=127.0.0.1', `--port=${port}`, ...qemuTlsObject(uri, certificates)],
        ...['--image-opts', qemuImageOptions(uri)],
      ],
      { env: { ...env, LC_ALL: 'C' }, stdio: ['ignore', 'ignore', 'pipe'] },
    );
    const forwarder = new Forwarder(port, child);
    let ended = false;
    void forwarder.ended.then(() => {
      ended = true;
    });
    const deadline = performance.now() + READY_MS;
    while (!(await answers(port))) {
      if (ended || performance.now() > deadline) {
        forwarder.#child.kill('SIGKILL');
        const why = forwarder.#output.trim().split('\n').at(-1) || 'it does not start';
        throw new StillblockError(
          'NO_FORWARDER',
          `a disk cannot be forwarded: ${why.replace(/^qemu-nbd: /, '')}`,
          'look whether the server still serves it, and whether qemu-utils is installed',
        );
      }
      await delay(POLL_MS);
    }
    return forwarder;
  }

  async close(): Promise<void> {
    this.#child.kill('SIGTERM');
    await this.ended;
  }
}
