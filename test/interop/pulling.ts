// SPDX-License-Identifier: Apache-2.0
/** A machine whose disks change, served as it is at an instant; and `stillblock pull` on them. */
import { type ChildProcess, spawn } from 'node:child_process';
import { readFile, rm } from 'node:fs/promises';
import { join } from 'node:path';
import test, { type ExecutionContext } from 'ava';
import { diskExports } from '../../nbd/export.ts';
import { type Extent, ExtentMap } from '../../nbd/extents.ts';
import { NbdServer } from '../../nbd/server.ts';
import type { Manifest } from '../../src/manifest.ts';
import { folder, KeptLog, MemorySource, soon as patiently, pattern } from '../nbd/world.ts';
import { CLI } from '../program.ts';
import { run } from './clients.ts';

export const MIB: number = 1 << 20;

/** How long a test waits for processes that start others, on a machine that has more to do. */
const PATIENCE_MS = 180_000;

/** Rejects when something that must come does not. */
export function soon<T>(what: string, promise: Promise<T>): Promise<T> {
  return patiently(what, promise, PATIENCE_MS);
}

/** Tests that run at a time: each starts several processes. */
const AT_A_TIME = 3;
let running = 0;
const waiting: (() => void)[] = [];

/** Declares a test that runs beside few others. */
export function pullTest(title: string, body: (t: ExecutionContext) => Promise<void>): void {
  test(title, async (t) => {
    if (running >= AT_A_TIME) {
      await new Promise<void>((resolve) => waiting.push(resolve));
    } else {
      running += 1;
    }
    t.teardown(() => {
      const next = waiting.shift();
      if (next === undefined) {
        running -= 1;
      } else {
        next();
      }
    });
    await body(t);
  });
}

/** A disk of the machine: its content, and all that was written since each checkpoint. */
class Disk {
  readonly name: string;
  data: Buffer;
  readonly since: Map<string, Extent[]> = new Map();
  /** Its content at each checkpoint. */
  readonly at: Map<string, Buffer> = new Map();

  constructor(name: string, sizeBytes: number, seed: number) {
    this.name = name;
    this.data = Buffer.alloc(sizeBytes);
    pattern(sizeBytes / 4, seed).copy(this.data, 0);
    pattern(sizeBytes / 4, seed + 1).copy(this.data, sizeBytes / 2);
    // A disk signature: whose disk it is.
    this.data.writeUInt32LE(seed, 440);
    this.data.writeUInt16LE(0xaa55, 510);
  }

  write(offset: number, bytes: Buffer): void {
    bytes.copy(this.data, offset);
    for (const extents of this.since.values()) {
      extents.push({ offset, length: bytes.length });
    }
  }
}

/** What is served at one instant. */
export interface Instant {
  readonly server: NbdServer;
  /** Holds reads of a disk behind what its identity is read from; settles once one waits. */
  holdReads(disk: string): { readonly held: Promise<void>; release(): void };
  /** Where an export is, as its server tells. */
  uris(exportName: string): string[];
  /** Options of `stillblock pull` that name all its disks, and the checkpoint. */
  readonly args: readonly string[];
  close(): Promise<void>;
}

export class Machine {
  readonly disks: ReadonlyMap<string, Disk>;
  readonly socket: string;
  /** A port of 127.0.0.1 to serve on in place of the socket, and the one that clients are told. */
  ports: { readonly own: number; readonly told: number } | undefined;

  private constructor(socket: string, disks: readonly Disk[]) {
    this.socket = socket;
    this.disks = new Map(disks.map((disk) => [disk.name, disk]));
  }

  /** @param sizes of its disks by name, bytes */
  static async make(
    t: ExecutionContext,
    sizes: Readonly<Record<string, number>>,
    seed = 1,
  ): Promise<Machine> {
    const socket = join(await folder(t), 'nbd.sock');
    const disks = Object.entries(sizes).map(
      ([name, size], index) => new Disk(name, size, seed + index * 10),
    );
    return new Machine(socket, disks);
  }

  disk(name: string): Disk {
    const disk = this.disks.get(name);
    if (disk === undefined) {
      throw new Error(`no disk ${name}`);
    }
    return disk;
  }

  /** Takes a checkpoint and serves the disks as they are now, changes since all earlier ones too. */
  async serve(t: ExecutionContext, checkpoint: string): Promise<Instant> {
    await rm(this.socket, { force: true });
    const server = new NbdServer({ logger: new KeptLog() });
    const sources = new Map<string, MemorySource>();
    for (const { name, data, since, at } of this.disks.values()) {
      const source = new MemorySource(Buffer.from(data));
      sources.set(name, source);
      at.set(checkpoint, source.data);
      const checkpoints = [...since].map(([since_, dirty]) => ({
        name: since_,
        dirty: [...dirty],
        blockSizeBytes: 65_536,
      }));
      // Holes are where it is zero, in pieces of 64 KiB.
      const holes: Extent[] = [];
      for (let offset = 0; offset < data.length; offset += 65_536) {
        const length = Math.min(65_536, data.length - offset);
        if (data.subarray(offset, offset + length).every((byte) => byte === 0)) {
          holes.push({ offset, length });
        }
      }
      const allocation = ExtentMap.fromRanges(data.length, holes, 3, 0);
      for (const each of diskExports({ name, description: '', source, allocation, checkpoints })) {
        server.addExport(each);
      }
      since.set(checkpoint, []);
    }
    const { ports } = this;
    await server.listen(
      ports === undefined ? { path: this.socket } : { host: '127.0.0.1', port: ports.own },
    );
    t.teardown(() => server.close());
    return {
      server,
      uris: (name) =>
        server.uris(name).map((uri) => uri.replace(`:${ports?.own}/`, `:${ports?.told}/`)),
      args: [
        ...['--checkpoint', checkpoint],
        ...[...this.disks.keys()].flatMap((name) => ['--nbd', this.uri(name)]),
      ],
      holdReads: (disk) => {
        const source = sources.get(disk);
        source?.hold(200_000);
        const held = source?.waitHeld(1, PATIENCE_MS) ?? Promise.reject(new Error('no such disk'));
        return { held, release: () => source?.release() };
      },
      close: () => server.close(),
    };
  }

  uri(name: string): string {
    return `nbd+unix:///${name}?socket=${this.socket}`;
  }

  /** Changes of every kind on every disk: small, large, zeroes, at its end. */
  change(seed: number): void {
    for (const disk of this.disks.values()) {
      const size = disk.data.length;
      disk.write(((seed * 7919) % (size / 4096 - 32)) * 4096, pattern(4096 * 3, seed));
      disk.write(((seed * 104_729) % (size / 512 - 600)) * 512, pattern(200_000, seed + 1));
      disk.write(size / 2, Buffer.alloc(65_536));
      disk.write(size - 1, Buffer.from([seed & 0xff]));
      // It stays the disk that it is.
      disk.data.writeUInt32LE(disk.at.values().next().value?.readUInt32LE(440) ?? 1, 440);
      disk.data.writeUInt16LE(0xaa55, 510);
      disk.write(0, Buffer.from(disk.data.subarray(0, 512)));
    }
  }
}

/** What a run of the program came to. */
export interface Ended {
  readonly code: number | null;
  readonly signal: NodeJS.Signals | null;
  readonly events: readonly Readonly<Record<string, unknown>>[];
  readonly stderr: string;
}

export interface Running {
  readonly process: ChildProcess;
  readonly ended: Promise<Ended>;
}

/** Starts the program with `--json`. */
export function start(t: ExecutionContext, command: string, ...args: readonly string[]): Running {
  const child = spawn(process.execPath, [CLI, command, '--json', ...args], {
    stdio: ['ignore', 'pipe', 'pipe'],
  });
  t.teardown(() => child.kill('SIGKILL'));
  let stdout = '';
  let stderr = '';
  child.stdout.setEncoding('utf8').on('data', (piece: string) => {
    stdout += piece;
  });
  child.stderr.setEncoding('utf8').on('data', (piece: string) => {
    stderr += piece;
  });
  const ended = new Promise<Ended>((resolve, reject) => {
    child.once('error', reject);
    child.once('close', (code, signal) => {
      const lines = stdout.split('\n').filter((line) => line.endsWith('}'));
      const events = lines.map((line) => JSON.parse(line) as Ended['events'][number]);
      resolve({ code, signal, events, stderr });
    });
  });
  return { process: child, ended };
}

/** Runs the program to its end. */
export function stillblock(
  t: ExecutionContext,
  ...args: readonly [string, ...string[]]
): Promise<Ended> {
  return soon(args.join(' '), start(t, ...args).ended);
}

/** The code of the error that a run ended with. */
export function errorOf({ events }: Ended): string | undefined {
  const last = events.at(-1) as { error?: { code?: string } } | undefined;
  return last?.error?.code;
}

export async function manifestOf(chain: string): Promise<Manifest> {
  return JSON.parse(await readFile(join(chain, 'manifest.json'), 'utf8')) as Manifest;
}

/** Each disk of each point of a chain reads as the machine's did then. */
export async function assertChain(
  t: ExecutionContext,
  machine: Machine,
  chain: string,
  checkpoints: readonly string[],
): Promise<void> {
  const { points } = await manifestOf(chain);
  t.deepEqual(
    points.map(({ checkpoint }) => checkpoint),
    checkpoints,
  );
  for (const { checkpoint, entries } of points) {
    for (const { disk, file } of entries) {
      const raw = join(await folder(t), 'raw');
      await run('qemu-img', ['convert', '-O', 'raw', join(chain, file), raw]);
      const expected = machine.disk(disk).at.get(checkpoint);
      t.true(expected?.equals(await readFile(raw)), `${disk} at ${checkpoint}`);
    }
  }
}
