// SPDX-License-Identifier: Apache-2.0
/** What each test builds for itself: a server on its own socket, sources, a raw client. */
import { once } from 'node:events';
import { mkdtemp, rm } from 'node:fs/promises';
import { type AddressInfo, connect, createServer, type Socket } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { type ConnectionOptions, connect as connectTls } from 'node:tls';
import type { ExecutionContext } from 'ava';
import type { Access } from '../../nbd/access.ts';
import type { SocketEngineFactory } from '../../nbd/engine.ts';
import type { BlockSource, Export } from '../../nbd/export.ts';
import { ExtentMap } from '../../nbd/extents.ts';
import type { Limits } from '../../nbd/limits.ts';
import type { Logger } from '../../nbd/logger.ts';
import { NbdServer, type SecurityOptions } from '../../nbd/server.ts';

/** How long a test waits for what must come at once, milliseconds. Only a failure lasts so long. */
const PATIENCE_MS = 20_000;

/** Rejects when something that must come does not. */
export function soon<T>(
  what: string,
  promise: Promise<T>,
  patienceMs: number = PATIENCE_MS,
): Promise<T> {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(() => reject(new Error(`waited in vain for ${what}`)), patienceMs);
    promise.then(resolve, reject).finally(() => clearTimeout(timer));
  });
}

/** A folder of the test's own, gone after it. */
export async function folder(t: ExecutionContext): Promise<string> {
  const path = await mkdtemp(join(tmpdir(), 'stillblock-'));
  t.teardown(() => rm(path, { recursive: true, force: true }));
  return path;
}

/** Ports of 127.0.0.1 that nobody listens on, each another. */
export async function freePorts(count: number): Promise<number[]> {
  const servers = Array.from({ length: count }, () => createServer().listen(0, '127.0.0.1'));
  await Promise.all(servers.map((server) => once(server, 'listening')));
  const ports = servers.map((server) => (server.address() as AddressInfo).port);
  await Promise.all(servers.map((server) => once(server.close(), 'close')));
  return ports;
}

/** Bytes that differ from place to place, the same in every run. */
export function pattern(bytes: number, seed = 1): Buffer {
  const data = Buffer.alloc(bytes);
  let state = seed * 2_654_435_761;
  for (let at = 0; at + 4 <= bytes; at += 4) {
    state = (Math.imul(state, 1_664_525) + 1_013_904_223) >>> 0;
    data.writeUInt32LE(state, at);
  }
  return data;
}

/** A source in memory that can fail, and that can be made to wait. */
export class MemorySource implements BlockSource {
  readonly data: Buffer;
  /** Reads that touch this byte reject with `faultCode`. */
  faultAt: number | undefined;
  faultCode = 'EIO';
  /** Reads started. */
  reads = 0;
  readonly sizes: number[] = [];
  #held: (() => void)[] | undefined;
  #heldWaiters: { count: number; resolve: () => void }[] = [];

  constructor(data: Buffer) {
    this.data = data;
  }

  get sizeBytes(): number {
    return this.data.length;
  }

  #heldFrom = 0;

  /** From now on reads that end behind `offset` wait for {@link release}. */
  hold(offset = 0): void {
    this.#held ??= [];
    this.#heldFrom = offset;
  }

  /** Resolves once so many reads wait. */
  async waitHeld(count: number, patienceMs: number = PATIENCE_MS): Promise<void> {
    if ((this.#held?.length ?? 0) < count) {
      const reached = new Promise<void>((resolve) => this.#heldWaiters.push({ count, resolve }));
      await soon(`${count} reads`, reached, patienceMs);
    }
  }

  get heldCount(): number {
    return this.#held?.length ?? 0;
  }

  /** Lets all waiting reads go on, and later ones pass. */
  release(): void {
    const held = this.#held ?? [];
    this.#held = undefined;
    for (const resolve of held) {
      resolve();
    }
  }

  async read(buffer: Uint8Array, offset: number): Promise<void> {
    this.reads += 1;
    this.sizes.push(buffer.length);
    if (this.#held !== undefined && offset + buffer.length > this.#heldFrom) {
      const held = this.#held;
      const gate = new Promise<void>((resolve) => held.push(resolve));
      for (const waiter of this.#heldWaiters) {
        if (held.length >= waiter.count) {
          waiter.resolve();
        }
      }
      await gate;
    }
    const end = offset + buffer.length;
    if (this.faultAt !== undefined && offset <= this.faultAt && this.faultAt < end) {
      throw Object.assign(new Error('injected'), { code: this.faultCode });
    }
    this.data.copy(buffer, 0, offset, end);
  }

  close(): Promise<void> {
    return Promise.resolve();
  }
}

/** A log that is kept. */
export class KeptLog implements Logger {
  readonly lines: { level: string; message: string; fields: object }[];
  readonly #bindings: object;

  constructor(lines: KeptLog['lines'] = [], bindings: object = {}) {
    this.lines = lines;
    this.#bindings = bindings;
  }

  #keep(level: string, fields: object, message: string): void {
    this.lines.push({ level, message, fields: { ...this.#bindings, ...fields } });
  }

  debug(fields: object, message: string): void {
    this.#keep('debug', fields, message);
  }
  info(fields: object, message: string): void {
    this.#keep('info', fields, message);
  }
  warn(fields: object, message: string): void {
    this.#keep('warn', fields, message);
  }
  error(fields: object, message: string): void {
    this.#keep('error', fields, message);
  }
  child(bindings: object): KeptLog {
    return new KeptLog(this.lines, { ...this.#bindings, ...bindings });
  }
}

/** An export with `base:allocation` and any further contexts. */
export function exportOf(
  source: BlockSource,
  options: {
    name?: string;
    description?: string;
    allocation?: ExtentMap;
    contexts?: [string, ExtentMap][];
  } = {},
): Export {
  const allocation = options.allocation ?? ExtentMap.uniform(source.sizeBytes, 0);
  return {
    name: options.name ?? 'disk',
    description: options.description ?? '',
    source,
    contexts: new Map([['base:allocation', allocation], ...(options.contexts ?? [])]),
  };
}

export interface World {
  readonly server: NbdServer;
  readonly log: KeptLog;
  readonly path: string;
  connect(): Promise<RawClient>;
}

/** A server on a unix socket of the test's own, closed after it. */
export async function world(
  t: ExecutionContext,
  exports: Export[],
  limits: Partial<Limits> = {},
  more: {
    security?: SecurityOptions;
    access?: Access;
    engine?: SocketEngineFactory | undefined;
  } = {},
): Promise<World> {
  const path = join(await folder(t), 'nbd.sock');
  const log = new KeptLog();
  const server = new NbdServer({ logger: log, limits, ...more });
  for (const offered of exports) {
    server.addExport(offered);
  }
  await server.listen({ path });
  t.teardown(() => server.close());
  const connectClient = async (): Promise<RawClient> => {
    const client = await RawClient.connect({ path });
    t.teardown(() => client.destroy());
    return client;
  };
  return { server, log, path, connect: connectClient };
}

/**
 * Lets the server take what was sent before. Another connection's conversation runs in
 * the same event loop, so whatever was to happen on the first has happened by its end.
 */
export async function settled(where: World, name = 'disk'): Promise<void> {
  const witness = await where.connect();
  await witness.go(name);
  for (let turn = 0; turn < 5; turn += 1) {
    await witness.expectInStep();
  }
  witness.destroy();
}

// ---- a client that says whatever it is told, built apart from the code under test

/** Big-endian numbers side by side. */
export function be(...parts: (readonly [8 | 16 | 32 | 64, number | bigint])[]): Buffer {
  return Buffer.concat(
    parts.map(([bits, value]) => {
      const hex = BigInt.asUintN(bits, BigInt(value)).toString(16);
      return Buffer.from(hex.padStart(bits / 4, '0'), 'hex');
    }),
  );
}

export function option(number: number, data: Buffer = Buffer.alloc(0)): Buffer {
  return Buffer.concat([Buffer.from('IHAVEOPT'), be([32, number], [32, data.length]), data]);
}

export function infoData(name: string, ...information: number[]): Buffer {
  const text = Buffer.from(name);
  const types = information.map((type) => [16, type] as const);
  return Buffer.concat([be([32, text.length]), text, be([16, types.length], ...types)]);
}

export function metaData(name: string, ...queries: string[]): Buffer {
  const text = Buffer.from(name);
  const encoded = queries.map((query) => {
    const bytes = Buffer.from(query);
    return Buffer.concat([be([32, bytes.length]), bytes]);
  });
  return Buffer.concat([be([32, text.length]), text, be([32, queries.length]), ...encoded]);
}

export interface RawRequest {
  type: number;
  flags?: number;
  cookie?: bigint;
  offset?: number | bigint;
  length?: number;
  magic?: number;
}

export function request(options: RawRequest): Buffer {
  return be(
    [32, options.magic ?? 0x25609513],
    [16, options.flags ?? 0],
    [16, options.type],
    [64, options.cookie ?? 1n],
    [64, options.offset ?? 0],
    [32, options.length ?? 0],
  );
}

/** An extended request. */
export function extendedRequest(
  options: Omit<RawRequest, 'length'> & { length?: number | bigint },
): Buffer {
  return be(
    [32, options.magic ?? 0x21e41c71],
    [16, options.flags ?? 0],
    [16, options.type],
    [64, options.cookie ?? 1n],
    [64, options.offset ?? 0],
    [64, options.length ?? 0],
  );
}

export interface OptionReply {
  option: number;
  type: number;
  data: Buffer;
}

export interface Chunk {
  flags: number;
  type: number;
  cookie: bigint;
  payload: Buffer;
}

export const OPT = {
  exportName: 1,
  abort: 2,
  list: 3,
  peekExport: 4,
  startTls: 5,
  info: 6,
  go: 7,
  structuredReply: 8,
  listMetaContext: 9,
  setMetaContext: 10,
  extendedHeaders: 11,
} as const;

export const REP = {
  ack: 1,
  server: 2,
  info: 3,
  metaContext: 4,
  errUnsup: 0x80000001,
  errPolicy: 0x80000002,
  errInvalid: 0x80000003,
  errTlsReqd: 0x80000005,
  errUnknown: 0x80000006,
  errTooBig: 0x80000009,
  errExtHeaderReqd: 0x8000000a,
} as const;

export const CMD = {
  read: 0,
  write: 1,
  disc: 2,
  flush: 3,
  trim: 4,
  cache: 5,
  writeZeroes: 6,
  blockStatus: 7,
} as const;

export const CHUNK = {
  none: 0,
  data: 1,
  hole: 2,
  status: 5,
  statusExt: 6,
  error: 0x8001,
  errorOffset: 0x8002,
} as const;

export const ERR = { perm: 1, io: 5, nomem: 12, inval: 22, overflow: 75 } as const;

export class RawClient {
  readonly socket: Socket;
  readonly closed: Promise<void>;
  #buffers: Buffer[] = [];
  #bytes = 0;
  #isClosed = false;
  #waiter: (() => void) | undefined;

  private constructor(socket: Socket) {
    this.socket = socket;
    socket.on('data', (chunk) => {
      this.#buffers.push(chunk);
      this.#bytes += chunk.length;
      this.#waiter?.();
    });
    // A reset is a way of closing; what matters is that it closes.
    socket.on('error', () => {});
    this.closed = new Promise((resolve) => {
      socket.on('close', () => {
        this.#isClosed = true;
        this.#waiter?.();
        resolve();
      });
    });
  }

  static async connect(
    address: { path: string } | { host: string; port: number },
  ): Promise<RawClient> {
    const socket = connect(address);
    const client = new RawClient(socket);
    await soon(
      'a connection',
      new Promise<void>((resolve, reject) => {
        socket.once('connect', resolve);
        socket.once('error', reject);
      }),
    );
    return client;
  }

  destroy(): void {
    this.socket.destroy();
  }

  /** Begins TLS on the socket, without a word of STARTTLS. This client is then of no use any more. */
  async secure(options: ConnectionOptions): Promise<RawClient> {
    for (const event of ['data', 'close']) {
      this.socket.removeAllListeners(event);
    }
    const client = new RawClient(
      connectTls({ socket: this.socket, servername: 'localhost', ...options }),
    );
    await soon(
      'TLS',
      new Promise<void>((resolve, reject) => {
        client.socket.once('secureConnect', resolve);
        client.socket.once('error', reject);
        client.socket.once('close', () => reject(new Error('closed before TLS')));
      }),
    );
    return client;
  }

  /** Greeting, STARTTLS and TLS. */
  async openTls(options: ConnectionOptions): Promise<RawClient> {
    await this.open();
    await this.expectAck(OPT.startTls);
    return this.secure(options);
  }

  send(...parts: Buffer[]): void {
    this.socket.write(Buffer.concat(parts));
  }

  /** Exactly so many bytes; rejects if the connection closes before. */
  async read(bytes: number): Promise<Buffer> {
    while (this.#bytes < bytes) {
      if (this.#isClosed) {
        throw new Error(`closed after ${this.#bytes} of ${bytes} bytes`);
      }
      await soon(
        `${bytes} bytes`,
        new Promise<void>((resolve) => {
          this.#waiter = resolve;
        }),
      );
    }
    const first = this.#buffers[0];
    // Put together only when needed: with megabytes waiting, each copy would be of all of them.
    const all =
      first !== undefined && first.length >= bytes ? first : Buffer.concat(this.#buffers.splice(0));
    this.#buffers.splice(0, 1, all.subarray(bytes));
    this.#bytes -= bytes;
    return all.subarray(0, bytes);
  }

  /** All that comes until the connection closes. */
  async readToEnd(): Promise<Buffer> {
    await soon('the end', this.closed);
    return this.read(this.#bytes);
  }

  async greeting(): Promise<{ flags: number }> {
    const bytes = await this.read(18);
    if (bytes.subarray(0, 16).toString() !== 'NBDMAGICIHAVEOPT') {
      throw new Error(`greeting: ${bytes.toString('hex')}`);
    }
    return { flags: bytes.readUInt16BE(16) };
  }

  /** Greeting and client flags; fixed newstyle and no zeroes unless told otherwise. */
  async open(flags = 3): Promise<void> {
    await this.greeting();
    this.send(be([32, flags]));
  }

  async optionReply(): Promise<OptionReply> {
    const header = await this.read(20);
    if (header.readBigUInt64BE(0) !== 0x3e889045565a9n) {
      throw new Error(`option reply: ${header.toString('hex')}`);
    }
    const data = await this.read(header.readUInt32BE(16));
    return { option: header.readUInt32BE(8), type: header.readUInt32BE(12), data };
  }

  /** Sends an option and reads its replies up to the final one. */
  async haggle(number: number, data?: Buffer): Promise<OptionReply[]> {
    this.send(option(number, data));
    return this.optionReplies();
  }

  async optionReplies(): Promise<OptionReply[]> {
    const replies: OptionReply[] = [];
    let last: OptionReply;
    do {
      last = await this.optionReply();
      replies.push(last);
    } while (last.type !== REP.ack && last.type < 0x80000000);
    return replies;
  }

  /** The whole handshake, to the transmission of one export. */
  async go(
    name = 'disk',
    options: { structured?: boolean; contexts?: string[] } = {},
  ): Promise<void> {
    await this.open();
    await this.haggleTo(name, options);
  }

  /** The options up to the transmission of one export. */
  async haggleTo(
    name = 'disk',
    options: { structured?: boolean; contexts?: string[] } = {},
  ): Promise<void> {
    if (options.structured ?? true) {
      await this.expectAck(OPT.structuredReply);
    }
    if (options.contexts !== undefined) {
      await this.expectAck(OPT.setMetaContext, metaData(name, ...options.contexts));
    }
    await this.expectAck(OPT.go, infoData(name));
  }

  async expectAck(number: number, data?: Buffer): Promise<OptionReply[]> {
    const replies = await this.haggle(number, data);
    const last = replies.at(-1);
    if (last?.type !== REP.ack) {
      throw new Error(`option ${number}: ${last?.type.toString(16)} ${last?.data.toString()}`);
    }
    return replies;
  }

  async simpleReply(): Promise<{ error: number; cookie: bigint }> {
    const bytes = await this.read(16);
    if (bytes.readUInt32BE(0) !== 0x67446698) {
      throw new Error(`simple reply: ${bytes.toString('hex')}`);
    }
    return { error: bytes.readUInt32BE(4), cookie: bytes.readBigUInt64BE(8) };
  }

  async chunk(): Promise<Chunk> {
    const header = await this.read(20);
    if (header.readUInt32BE(0) !== 0x668e33ef) {
      throw new Error(`chunk: ${header.toString('hex')}`);
    }
    const payload = await this.read(header.readUInt32BE(16));
    return {
      flags: header.readUInt16BE(4),
      type: header.readUInt16BE(6),
      cookie: header.readBigUInt64BE(8),
      payload,
    };
  }

  /** A chunk of an extended reply; `offset` is what it repeats of its request. */
  async extendedChunk(): Promise<Chunk & { offset: bigint }> {
    const header = await this.read(32);
    if (header.readUInt32BE(0) !== 0x6e8a278c) {
      throw new Error(`extended chunk: ${header.toString('hex')}`);
    }
    const payload = await this.read(Number(header.readBigUInt64BE(24)));
    return {
      flags: header.readUInt16BE(4),
      type: header.readUInt16BE(6),
      cookie: header.readBigUInt64BE(8),
      offset: header.readBigUInt64BE(16),
      payload,
    };
  }

  /** The chunks of one extended reply, all of which must repeat the request's offset. */
  async extendedReply(offset: number | bigint = 0): Promise<Chunk[]> {
    const chunks: Chunk[] = [];
    for (let done = false; !done; ) {
      const chunk = await this.extendedChunk();
      if (chunk.offset !== BigInt(offset)) {
        throw new Error(`reply to offset ${chunk.offset}, not ${offset}`);
      }
      chunks.push(chunk);
      done = (chunk.flags & 1) !== 0;
    }
    return chunks;
  }

  /** The chunks of one reply, up to the one that is flagged as last. */
  async reply(): Promise<Chunk[]> {
    const chunks: Chunk[] = [];
    let last: Chunk;
    do {
      last = await this.chunk();
      chunks.push(last);
    } while ((last.flags & 1) === 0);
    return chunks;
  }

  async ask(options: RawRequest): Promise<Chunk[]> {
    this.send(request(options));
    return this.reply();
  }

  /** The error number of a structured reply that must be nothing but an error. */
  async askError(options: RawRequest): Promise<number> {
    const [chunk, ...others] = await this.ask(options);
    if (chunk === undefined || others.length > 0 || chunk.type < 0x8000) {
      throw new Error('no error');
    }
    return chunk.payload.readUInt32BE(0);
  }

  /** Proves that the stream is in step: a flush is answered, and nothing else. */
  async expectInStep(structured = true): Promise<void> {
    const cookie = 0xfeedfacecafebeefn;
    this.send(request({ type: CMD.flush, cookie }));
    if (structured) {
      const [chunk] = await this.reply();
      if (chunk?.cookie !== cookie || chunk.type !== CHUNK.none) {
        throw new Error('out of step');
      }
    } else {
      const reply = await this.simpleReply();
      if (reply.cookie !== cookie || reply.error !== 0) {
        throw new Error('out of step');
      }
    }
  }
}

export interface StatusExtent {
  length: number;
  flags: number;
}

/** The contexts of a BLOCK_STATUS reply, by id. */
export function statusOf(chunks: Chunk[]): Map<number, StatusExtent[]> {
  const result = new Map<number, StatusExtent[]>();
  for (const { type, payload } of chunks) {
    if (type !== CHUNK.status || result.has(payload.readUInt32BE(0))) {
      throw new Error('no status chunk of its own context');
    }
    const extents: StatusExtent[] = [];
    for (let at = 4; at < payload.length; at += 8) {
      extents.push({ length: payload.readUInt32BE(at), flags: payload.readUInt32BE(at + 4) });
    }
    result.set(payload.readUInt32BE(0), extents);
  }
  return result;
}

/** Puts a read together again from its chunks; fails on overlaps and gaps. */
export function dataOf(chunks: Chunk[], offset: number, length: number): Buffer {
  const data = Buffer.alloc(length, 0xee);
  let covered = 0;
  for (const { type, payload } of chunks) {
    if (type === CHUNK.none) {
      continue;
    }
    const at = Number(payload.readBigUInt64BE(0)) - offset;
    if (type === CHUNK.data) {
      payload.copy(data, at, 8);
      covered += payload.length - 8;
    } else if (type === CHUNK.hole) {
      data.fill(0, at, at + payload.readUInt32BE(8));
      covered += payload.readUInt32BE(8);
    } else {
      throw new Error(`chunk of type ${type}: ${payload.subarray(6).toString()}`);
    }
  }
  if (covered !== length) {
    throw new Error(`chunks cover ${covered} of ${length} bytes`);
  }
  return data;
}
