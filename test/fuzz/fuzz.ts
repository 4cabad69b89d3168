// SPDX-License-Identifier: Apache-2.0
/** A server under fuzzing: what it serves, who talks to it, and what it may never do. */
import { open, writeFile } from 'node:fs/promises';
import { connect } from 'node:net';
import { join } from 'node:path';
import { DEFAULT_LIMITS } from '../../nbd/limits.ts';
import { play } from './client.ts';
import { type Session, SessionGenerator, type Target } from './generator.ts';
import { CMD, infoData, OPT, optionBytes, requestBytes } from './protocol.ts';
import { Random } from './random.ts';
import { type Address, ServerProcess } from './serving.ts';
import { DIRTY, SECTOR } from './truth.ts';

const MIB = 1 << 20;
/** Fuzzing clients at a time. */
const CLIENTS = 8;
const MOST_REQUESTS = 250;
/** How long the server may take to answer the innocent client, milliseconds. */
const PATIENCE_MS = 30_000;
const SAMPLE_MS = 100;
/**
 * What the server may need beyond its start: what limits.ts grants to data in flight and to
 * idle buffers, a piece and the unread input for each client, and room for the collector
 * of garbage.
 */
export const MEMORY_BYTES: number =
  DEFAULT_LIMITS.bytesInFlight +
  DEFAULT_LIMITS.idleBufferBytes +
  (CLIENTS + 1) * 2 * DEFAULT_LIMITS.pieceBytes +
  96 * MIB;

export interface FuzzOptions {
  /** The engine that `stillblock nbd` is told to use; its own choice if absent. */
  readonly engine?: string;
  readonly messages: number;
  readonly seed: number;
  /** Plays this one session alone. */
  readonly session?: number;
  readonly tcp?: boolean;
}

export interface FuzzOutcome {
  readonly engine: string;
  readonly seed: number;
  readonly seconds: number;
  readonly sessions: number;
  /** Options and requests sent. */
  readonly messages: number;
  /** Replies that were complete and right. */
  readonly replies: number;
  /** Reads of the innocent client. */
  readonly witnessReads: number;
  /** Its longest wait for one, milliseconds. */
  readonly witnessMaxMs: number;
  /** Resident memory, at the start and at most since, MiB. */
  readonly memoryMiB: { readonly start: number; readonly most: number };
  /** What went wrong, and the session that shows it. */
  readonly fault?: string;
  readonly session?: number;
}

/** Content with data, holes and zeroes, the same every time. */
function content(random: Random, bytes: number): Buffer {
  const data = Buffer.alloc(bytes);
  for (let at = 0; at < bytes; at += 65_536) {
    if (!random.once(3)) {
      random.bytes(512).copy(data, at);
      // Fills the block with copies that differ by their place.
      for (let sector = at + 512; sector + 512 <= Math.min(at + 65_536, bytes); sector += 512) {
        data.copy(data, sector, at, at + 512);
        data.writeUInt32LE(sector, sector);
      }
    }
  }
  return data;
}

async function writeSparse(path: string, data: Buffer): Promise<void> {
  const file = await open(path, 'w');
  try {
    await file.truncate(data.length);
    for (let at = 0; at < data.length; at += 65_536) {
      const block = data.subarray(at, at + 65_536);
      if (block.some((byte) => byte !== 0)) {
        await file.write(block, 0, block.length, at);
      }
    }
  } finally {
    await file.close();
  }
}

const RANGES = [
  { offset: 0, length: 1 },
  { offset: 65_536, length: 65_536 },
  { offset: 700_001, length: 3 },
  { offset: MIB, length: 400_000 },
  { offset: 3 * MIB + 700, length: 77 },
] as const;

function dirtySectors(bytes: number): Uint8Array {
  const sectors = new Uint8Array(Math.ceil(bytes / SECTOR));
  for (const { offset, length } of RANGES) {
    sectors.fill(1, Math.floor(offset / SECTOR), Math.ceil((offset + length) / SECTOR));
  }
  return sectors;
}

/** Makes the files of a target, and the server's arguments for them. */
async function prepare(home: string, truths: Target['exports']): Promise<string[]> {
  for (const { name, data } of truths) {
    await writeSparse(join(home, name), data);
  }
  await writeFile(join(home, 'monday.json'), JSON.stringify(RANGES));
  return [
    ...truths.flatMap(({ name }) => ['--export', `${name}=${join(home, name)}`]),
    ...['--dirty', `large:monday=${join(home, 'monday.json')}`],
  ];
}

function makeTruths(): Target['exports'] {
  const random = new Random(0);
  const large = content(random, 3 * MIB + 777);
  return [
    { name: 'large', data: large, dirty: new Map([[DIRTY, dirtySectors(large.length)]]) },
    { name: 'small', data: content(random, 70_001), dirty: new Map() },
  ];
}

/** Asks once, since not every version of the server has them. */
async function offersExtendedHeaders(address: Address): Promise<boolean> {
  const socket = connect(address);
  const flags = Buffer.from([0, 0, 0, 3]);
  socket.write(Buffer.concat([flags, optionBytes(OPT.extendedHeaders, Buffer.alloc(0))]));
  let received = Buffer.alloc(0);
  for await (const chunk of socket) {
    received = Buffer.concat([received, chunk as Buffer]);
    if (received.length >= 38) {
      break;
    }
  }
  return received.readUInt32BE(18 + 12) === 1;
}

/** An innocent client: one read at a time, checked, on a connection that must stay. */
class Witness {
  reads = 0;
  maxMs = 0;
  fault: string | undefined;
  readonly #target: Target;
  readonly #address: Address;
  #stop = false;
  #running: Promise<void>;

  constructor(target: Target, address: Address) {
    this.#target = target;
    this.#address = address;
    this.#running = this.#run().catch((error: unknown) => {
      this.fault = `innocent client: ${String(error)}`;
    });
  }

  async stop(): Promise<void> {
    this.#stop = true;
    await this.#running;
  }

  async #run(): Promise<void> {
    const socket = connect(this.#address);
    socket.setTimeout(PATIENCE_MS, () => socket.destroy(new Error('it is not answered')));
    const chunks = socket[Symbol.asyncIterator]();
    let rest: Buffer = Buffer.alloc(0);
    const read = async (bytes: number): Promise<Buffer> => {
      while (rest.length < bytes) {
        const next = (await chunks.next()) as IteratorResult<Buffer>;
        if (next.done === true) {
          throw new Error('its connection was closed');
        }
        rest = Buffer.concat([rest, next.value]);
      }
      const taken = rest.subarray(0, bytes);
      rest = rest.subarray(bytes);
      return taken;
    };
    const random = new Random(1);
    const [truth] = this.#target.exports;
    socket.write(Buffer.from([0, 0, 0, 3]));
    socket.write(optionBytes(OPT.go, infoData(truth.name, [])));
    await read(18 + 20 + 12 + 20);
    while (!this.#stop) {
      const length = 1 + random.below(20_000);
      const offset = random.below(truth.data.length - length);
      const began = performance.now();
      socket.write(
        requestBytes({
          extended: false,
          flags: 0,
          type: CMD.read,
          cookie: random.u64(),
          offset: BigInt(offset),
          length: BigInt(length),
        }),
      );
      const header = await read(16);
      if (header.readUInt32BE(0) !== 0x6744_6698 || header.readUInt32BE(4) !== 0) {
        throw new Error(`reply ${header.toString('hex')}`);
      }
      if (!(await read(length)).equals(truth.data.subarray(offset, offset + length))) {
        throw new Error(`wrong data at ${offset}`);
      }
      this.maxMs = Math.max(this.maxMs, performance.now() - began);
      this.reads += 1;
      await new Promise((resolve) => setTimeout(resolve, 2));
    }
    socket.destroy();
  }
}

function sessionOf(seed: number, target: Target): { session: Session; random: Random } {
  const random = new Random(seed);
  return { session: new SessionGenerator(random, target).generate(MOST_REQUESTS), random };
}

/** Fuzzes a server of its own until so many messages are sent, or something is wrong. */
export async function fuzz(options: FuzzOptions): Promise<FuzzOutcome> {
  const began = performance.now();
  const exports = makeTruths();
  const engine = options.engine === undefined ? [] : [`--engine=${options.engine}`];
  const server = await ServerProcess.start(async (home) => [
    ...engine,
    ...(await prepare(home, exports)),
  ]);
  const address = options.tcp === true ? server.tcp : server.unix;
  const target: Target = {
    exports,
    extendedHeaders: await offersExtendedHeaders(address),
    maxDontFragmentBytes: DEFAULT_LIMITS.pieceBytes,
    maxReadBytes: DEFAULT_LIMITS.readBytes,
  };
  const start = await server.residentBytes();
  const seeds = new Random(options.seed);
  const total = { sessions: 0, messages: 0, replies: 0 };
  let most = start;
  let fault: string | undefined;
  let failing: number | undefined;
  const sampler = setInterval(() => {
    server.residentBytes().then(
      (bytes) => {
        most = Math.max(most, bytes);
      },
      () => {
        fault ??= 'the server is gone';
      },
    );
  }, SAMPLE_MS);
  const witness = new Witness(target, address);
  const client = async (): Promise<void> => {
    while (fault === undefined && total.messages < options.messages) {
      const seed = options.session ?? seeds.below(2 ** 48);
      try {
        // A mistake of the generator is a fault like any other: the server must not outlive it.
        const { session, random } = sessionOf(seed, target);
        total.messages +=
          options.session === undefined ? session.messages.length : options.messages;
        const played = await play(address, session, random);
        total.sessions += 1;
        total.replies += played.replies;
      } catch (error) {
        if (fault === undefined) {
          fault = error instanceof Error ? error.message : String(error);
          failing = seed;
        }
      }
    }
  };
  await Promise.all(Array.from({ length: options.session === undefined ? CLIENTS : 1 }, client));
  await witness.stop();
  clearInterval(sampler);
  const wrong = await server.end();
  fault ??= witness.fault ?? wrong;
  if (most - start > MEMORY_BYTES) {
    fault ??= `the server grew by ${most - start} bytes`;
  }
  return {
    engine: options.engine ?? 'auto',
    seed: options.seed,
    seconds: Math.round((performance.now() - began) / 100) / 10,
    ...total,
    witnessReads: witness.reads,
    witnessMaxMs: Math.round(witness.maxMs),
    memoryMiB: { start: Math.round(start / MIB), most: Math.round(most / MIB) },
    ...(fault !== undefined && { fault }),
    ...(failing !== undefined && { session: failing }),
  };
}
