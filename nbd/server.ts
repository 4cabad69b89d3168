// SPDX-License-Identifier: Apache-2.0
/** The NBD server: what is exported, where it listens, who is connected. */
import { lstat, readFile, readlink, stat, unlink } from 'node:fs/promises';
import { connect, createServer, isIPv4, isIPv6, type Server, type Socket } from 'node:net';
import { networkInterfaces } from 'node:os';
import { dirname, resolve as resolvePath } from 'node:path';
import { type Access, ANONYMOUS, type Identity, PLAIN } from './access.ts';
import { BufferPool, SharedBudget } from './budget.ts';
import { Connection } from './connection.ts';
import { NBD_DEFAULT_PORT } from './constants.ts';
import type { SocketEngine, SocketEngineFactory } from './engine.ts';
import { errorCode } from './errors.ts';
import { type Export, requireExport } from './export.ts';
import { addFigures, type ExportFigures, emptyFigures } from './figures.ts';
import type { Offer } from './handshake.ts';
import { type Limits, resolveLimits } from './limits.ts';
import type { Logger } from './logger.ts';
import { isLocalAddress, type TlsAcceptor, type TlsMode } from './tls.ts';

/** Where to listen: on TCP, port 0 for any free one, or on a unix socket. */
export type ListenAddress =
  | { readonly host: string; readonly port: number }
  | { readonly path: string };

/** A socket that listens already, and that this process has been given. */
export interface InheritedSocket {
  readonly descriptor: number;
}

/** Where it listens: the port that was found, the path made absolute. */
export type ListeningAddress = ListenAddress;

/** TLS and who may see what. */
export interface SecurityOptions {
  readonly tls: TlsAcceptor;
  /**
   * `require`: nobody is served without; `on`: clients of this machine may do without, where
   * nobody else can listen in.
   */
  readonly mode: Exclude<TlsMode, 'off'>;
}

/** What `sun_path` of a unix socket's address holds without its final zero (unix(7)). */
const UNIX_PATH_BYTES = 107;
/** Idle time before TCP asks whether a silent peer is still there, milliseconds. */
const KEEP_ALIVE_MS = 60_000;

function failure(code: string, message: string, cause?: unknown): Error {
  return Object.assign(new Error(message, { cause }), { code });
}

/** Percent-encodes all but RFC 3986's unreserved characters and those in `keep`. */
function encodeForUri(text: string, keep: string): string {
  let encoded = '';
  for (const byte of Buffer.from(text, 'utf8')) {
    const char = String.fromCharCode(byte);
    encoded +=
      /[A-Za-z0-9._~-]/.test(char) || keep.includes(char)
        ? char
        : `%${byte.toString(16).toUpperCase().padStart(2, '0')}`;
  }
  return encoded;
}

/** Addresses that a client can use for a host: those of the machine in place of a wildcard. */
function reachableHosts(host: string): string[] {
  const family = { '0.0.0.0': 'IPv4', '::': 'IPv6' }[host];
  if (family === undefined) {
    return [host];
  }
  const own = Object.values(networkInterfaces())
    .flatMap((addresses) => addresses ?? [])
    .filter((entry) => entry.family === family && !entry.internal)
    .map(({ address }) => address)
    // A link-local address means nothing without the client's own interface.
    .filter((address) => !address.startsWith('fe80:'));
  return own.length > 0 ? own : [family === 'IPv4' ? '127.0.0.1' : '::1'];
}

/** The URIs of an export at one address, as the NBD URI specification writes them. */
function urisAt({ address, tls }: Listener, exportName: string): string[] {
  const name = encodeForUri(exportName, '@:');
  const schemes = { off: ['nbd'], on: ['nbds', 'nbd'], require: ['nbds'] }[tls];
  if ('path' in address) {
    const socket = encodeForUri(address.path, '/');
    return schemes.map((scheme) => `${scheme}+unix:///${name}?socket=${socket}`);
  }
  const port = address.port === NBD_DEFAULT_PORT ? '' : `:${address.port}`;
  return reachableHosts(address.host).flatMap((host) => {
    const authority = isIPv6(host) ? `[${host.replace('%', '%25')}]` : host;
    return schemes.map((scheme) => `${scheme}://${authority}${port}/${name}`);
  });
}

/**
 * The path of an inherited unix socket, from the kernel's list of them; an abstract address
 * begins with `@`. Undefined for any other socket.
 */
async function pathOfSocket(descriptor: number): Promise<string | undefined> {
  const inode = /^socket:\[(\d+)\]$/.exec(await readlink(`/proc/self/fd/${descriptor}`))?.[1];
  for (const line of (await readFile('/proc/net/unix', 'utf8')).split('\n')) {
    // Num RefCount Protocol Flags Type St Inode Path (proc(5))
    const [, , , , , , found, ...path] = line
      .trim()
      .split(' ')
      .filter((word) => word !== '');
    if (inode !== undefined && found === inode) {
      return path.join(' ');
    }
  }
  return undefined;
}

/** Whether somebody listens on a unix socket. */
function isListening(path: string): Promise<boolean> {
  return new Promise((resolve, reject) => {
    const probe = connect({ path });
    probe.once('connect', () => {
      probe.destroy();
      resolve(true);
    });
    probe.once('error', (error) => {
      const code = errorCode(error);
      if (code === 'ECONNREFUSED' || code === 'ENOENT') {
        resolve(false);
      } else if (code === 'EAGAIN') {
        // Its queue of connections is full: somebody listens, and is busy.
        resolve(true);
      } else {
        reject(error);
      }
    });
  });
}

function listenOn(server: Server, address: ListenAddress | InheritedSocket): Promise<void> {
  return new Promise((resolve, reject) => {
    server.once('error', reject);
    const options =
      'descriptor' in address
        ? { fd: address.descriptor }
        : 'path' in address
          ? { path: address.path }
          : // `::` leaves IPv4 alone, so that both wildcards may be given side by side.
            { host: address.host, port: address.port, ipv6Only: isIPv6(address.host) };
    server.listen({ ...options, exclusive: true }, () => {
      server.off('error', reject);
      resolve();
    });
  });
}

interface Listener {
  readonly server: Server;
  readonly address: ListeningAddress;
  readonly tls: TlsMode;
}

/** Serves exports, read only, to any number of clients. */
export class NbdServer {
  readonly #logger: Logger;
  readonly #limits: Limits;
  readonly #shared: SharedBudget;
  readonly #pool: BufferPool;
  readonly #engine: SocketEngine | undefined;
  readonly #security: SecurityOptions | undefined;
  readonly #access: Access;
  readonly #exports = new Map<string, Export>();
  /** Offered no longer, while connections still end. */
  readonly #removed = new Set<Export>();
  readonly #failed = new WeakSet<Export>();
  /** By name, also of exports that are gone: totals only grow. */
  readonly #figures = new Map<string, ExportFigures>();
  #defaultName = '';
  #listeners: Listener[] = [];
  /** In the order of their arrival. */
  readonly #handshakes = new Set<Connection>();
  readonly #transmissions = new Set<Connection>();
  /** Sockets that are gone with reads still in flight. */
  readonly #leaving = new Map<Connection, Promise<void>>();
  #connectionCount = 0;
  #closing: Promise<void> | undefined;
  #whenEmpty: (() => void)[] = [];

  /**
   * Without `security` there is no TLS; without `access` everybody may see everything.
   *
   * @throws RangeError if a limit makes no sense
   */
  constructor(options: {
    readonly logger: Logger;
    readonly limits?: Partial<Limits>;
    readonly security?: SecurityOptions | undefined;
    readonly access?: Access | undefined;
    /** For plain sockets and exports that are a descriptor; all others are served here. */
    readonly engine?: SocketEngineFactory | undefined;
  }) {
    this.#logger = options.logger;
    this.#security = options.security;
    this.#access = options.access ?? (() => true);
    this.#limits = resolveLimits(options.limits);
    this.#shared = new SharedBudget(this.#limits.bytesInFlight);
    this.#pool = new BufferPool(this.#limits.idleBufferBytes);
    this.#engine = options.engine?.(this.#limits);
  }

  /**
   * Offers an export from now on. Its source remains the caller's, who closes it
   * after {@link removeExport} or {@link close}.
   *
   * @throws RangeError if it can't be served, or its name is taken
   */
  addExport(added: Export): void {
    requireExport(added);
    if (this.#exports.has(added.name)) {
      throw new RangeError(`export ${JSON.stringify(added.name)} exists already`);
    }
    this.#exports.set(added.name, added);
    this.#figuresOf(added);
  }

  #figuresOf(counted: Export): ExportFigures {
    const figures = this.#figures.get(counted.name) ?? emptyFigures();
    this.#figures.set(counted.name, figures);
    return figures;
  }

  /**
   * Lets clients that name no export have this one. An export that is itself named
   * with the empty string goes before. INFO_NAME then tells the true name.
   */
  setDefaultExport(name: string): void {
    this.#defaultName = name;
  }

  /**
   * Offers an export no longer: requests in flight are answered, then its clients'
   * connections are closed. Does nothing if there is none.
   *
   * @returns when nothing uses the export's source for it any more
   */
  async removeExport(name: string): Promise<void> {
    const removed = this.#exports.get(name);
    if (removed !== undefined) {
      this.#exports.delete(name);
      this.#removed.add(removed);
      await this.#drain((connection) => connection.export === removed);
      await this.#release(removed);
    }
  }

  /**
   * Answers EIO to every read and question from now on, also on connections that
   * are there, because the data of these exports can't be trusted any more.
   *
   * @param names exports; all if absent
   */
  failExports(names: Iterable<string> = this.#exports.keys()): void {
    for (const name of names) {
      const failed = this.#exports.get(name);
      if (failed !== undefined) {
        this.#failed.add(failed);
        this.#engine?.fail(failed);
        this.#logger.error({ export: name }, 'export has failed');
      }
    }
  }

  /**
   * Listens on one more address. A unix socket that nobody listens on is replaced. Where other
   * machines can reach it, TLS is required.
   *
   * @param options `insecure` leaves what other machines can reach as it is elsewhere
   * @throws Error with `code` `TLS_REQUIRED` if there is no TLS where there must be, or
   *   `EADDRINUSE`, `EADDRNOTAVAIL`, `EACCES`, `ENAMETOOLONG` and so on, and its cause
   */
  async listen(
    wanted: ListenAddress | InheritedSocket,
    options: { readonly insecure?: boolean } = {},
  ): Promise<ListeningAddress> {
    const address = 'path' in wanted ? { path: resolvePath(wanted.path) } : wanted;
    const where = describeAddress(address);
    const inheritedPath =
      'descriptor' in address ? await pathOfSocket(address.descriptor) : undefined;
    if ('path' in address && Buffer.byteLength(address.path) > UNIX_PATH_BYTES) {
      throw failure('ENAMETOOLONG', `${where}: longer than ${UNIX_PATH_BYTES} bytes`);
    }
    const server = createServer({
      allowHalfOpen: true,
      noDelay: true,
      keepAlive: true,
      keepAliveInitialDelay: KEEP_ALIVE_MS,
    });
    try {
      await this.#listenOrReplace(server, address);
    } catch (cause) {
      // libuv says EACCES of a socket in a folder that does not exist.
      const folder = 'path' in address ? await stat(dirname(address.path)).catch(errorCode) : '';
      const code =
        typeof folder === 'string' && folder !== '' ? folder : (errorCode(cause) ?? 'EIO');
      const reason = cause instanceof Error ? cause.message : String(cause);
      throw failure(code, `cannot listen on ${where}: ${reason}`, cause);
    }
    const bound = server.address();
    const listening = listeningAt(address, bound, inheritedPath);
    let tls: TlsMode;
    try {
      if (this.#closing !== undefined) {
        throw failure('ECANCELED', 'server is closed');
      }
      tls = this.#tlsAt(listening, bound, options.insecure === true);
    } catch (error) {
      server.close();
      throw error;
    }
    server.on('connection', (socket) => this.#accept(socket, tls));
    server.on('error', (err) => this.#logger.error({ err }, 'cannot accept a connection'));
    this.#listeners.push({ server, address: listening, tls });
    this.#logger.info({ ...listening, tls }, 'listening');
    return listening;
  }

  /** What is asked of clients that come by an address. */
  #tlsAt(listening: ListeningAddress, bound: BoundAddress, insecure: boolean): TlsMode {
    const local =
      'path' in listening ||
      (typeof bound === 'object' && bound !== null && isLocalAddress(bound.address));
    const { mode = 'off' } = this.#security ?? {};
    if (local || mode === 'require') {
      return mode;
    }
    if (insecure) {
      this.#logger.warn(listening, 'other machines are served in plain text: all can listen in');
      return mode;
    }
    if (mode === 'off') {
      throw failure(
        'TLS_REQUIRED',
        `${describeAddress(listening)} can be reached from other machines, and there is no TLS`,
      );
    }
    return 'require';
  }

  async #listenOrReplace(server: Server, address: ListenAddress | InheritedSocket): Promise<void> {
    try {
      await listenOn(server, address);
      return;
    } catch (error) {
      if (!('path' in address) || errorCode(error) !== 'EADDRINUSE') {
        throw error;
      }
      if (!(await lstat(address.path)).isSocket()) {
        throw failure('EEXIST', 'a file that is no socket is in the way', error);
      }
      if (await isListening(address.path)) {
        throw error;
      }
    }
    await unlink(address.path);
    await listenOn(server, address);
  }

  /** The URIs of an export, one or more for each listener. */
  uris(exportName: string): string[] {
    return this.#listeners.flatMap((listener) => urisAt(listener, exportName));
  }

  /** Figures for tests and metrics. */
  get usage(): { handshakes: number; connections: number; bytesInFlight: number } {
    return {
      handshakes: this.#handshakes.size,
      connections: this.#transmissions.size,
      bytesInFlight: this.#shared.usedBytes + (this.#engine?.bytesInFlight ?? 0),
    };
  }

  /** Connections since the server began. */
  get accepted(): number {
    return this.#connectionCount;
  }

  /** What was counted for each export since the server began, by name. */
  get figures(): ReadonlyMap<string, ExportFigures> {
    const all = new Map<string, ExportFigures>();
    for (const [name, figures] of this.#figures) {
      const total = emptyFigures();
      addFigures(total, figures);
      all.set(name, total);
    }
    for (const served of [...this.#exports.values(), ...this.#removed]) {
      const others = this.#engine?.figures(served);
      const total = all.get(served.name);
      if (others !== undefined && total !== undefined) {
        addFigures(total, others);
      }
    }
    return all;
  }

  /** Has the engine forget an export without connections, and keeps what it has counted. */
  async #release(removed: Export): Promise<void> {
    const counted = this.#engine?.figures(removed);
    this.#removed.delete(removed);
    if (counted !== undefined) {
      addFigures(this.#figuresOf(removed), counted);
    }
    await this.#engine?.release(removed);
  }

  /**
   * Stops listening, answers what is in flight, closes all connections, and removes
   * its unix sockets. The exports' sources are no longer in use afterwards.
   */
  close(): Promise<void> {
    this.#closing ??= this.#close();
    return this.#closing;
  }

  async #close(): Promise<void> {
    const closed = this.#listeners.map(
      ({ server }) => new Promise<void>((resolve) => server.close(() => resolve())),
    );
    await this.#drain(() => true);
    await Promise.all(closed);
    this.#listeners = [];
    await Promise.all([...this.#exports.values()].map((served) => this.#release(served)));
    this.#exports.clear();
    await this.#engine?.close();
  }

  /** Drains the connections that a predicate chooses and waits until they are gone. */
  async #drain(chosen: (connection: Connection) => boolean): Promise<void> {
    const all = (): Connection[] => [...this.#handshakes, ...this.#transmissions].filter(chosen);
    for (const connection of all()) {
      connection.drain();
    }
    while (all().length > 0) {
      await new Promise<void>((resolve) => this.#whenEmpty.push(resolve));
    }
    const leaving = [...this.#leaving].filter(([connection]) => chosen(connection));
    await Promise.all(leaving.map(([, idle]) => idle));
  }

  #find(name: string): Export | undefined {
    return (
      this.#exports.get(name) ?? (name === '' ? this.#exports.get(this.#defaultName) : undefined)
    );
  }

  /** What one client is offered: exports that it may not see are not there. */
  #offerTo(client: Identity, tls: TlsMode): Offer {
    const mayFind = (who: Identity, name: string): Export | undefined => {
      const found = this.#find(name);
      return found !== undefined && this.#access(who, found.name) ? found : undefined;
    };
    const exports = this.#exports;
    const access = this.#access;
    return {
      limits: this.#limits,
      tls,
      // Looked through by LIST alone.
      exports: {
        *[Symbol.iterator]() {
          for (const each of exports.values()) {
            if (access(client, each.name)) {
              yield each;
            }
          }
        },
      },
      find: (name) => mayFind(client, name),
      needsTls: (name) => client === PLAIN && mayFind(ANONYMOUS, name) !== undefined,
      admits: this.#transmissions.size < this.#limits.connections,
    };
  }

  #accept(socket: Socket, tls: TlsMode): void {
    const [oldest] = this.#handshakes;
    if (oldest !== undefined && this.#handshakes.size >= this.#limits.handshakes) {
      this.#handshakes.delete(oldest);
      oldest.evict();
    }
    this.#connectionCount += 1;
    const peer = socket.remoteAddress === undefined ? 'unix' : peerOf(socket);
    const logger = this.#logger.child({ conn: this.#connectionCount, peer });
    const connection = new Connection(
      socket,
      {
        limits: this.#limits,
        shared: this.#shared,
        pool: this.#pool,
        engine: this.#engine,
        tls: this.#security?.tls,
        offer: (client) => this.#offerTo(client, tls),
        hasFailed: (served) => this.#failed.has(served),
        figures: (served) => this.#figuresOf(served),
        onTransmission: (which) => {
          this.#handshakes.delete(which);
          this.#transmissions.add(which);
        },
        onClosed: (which) => this.#onClosed(which),
      },
      logger,
    );
    this.#handshakes.add(connection);
    connection.start();
  }

  #onClosed(connection: Connection): void {
    this.#handshakes.delete(connection);
    this.#transmissions.delete(connection);
    const idle = connection.idle().then(() => {
      this.#leaving.delete(connection);
    });
    this.#leaving.set(connection, idle);
    for (const resolve of this.#whenEmpty.splice(0)) {
      resolve();
    }
  }
}

type BoundAddress = ReturnType<Server['address']>;

function describeAddress(address: ListenAddress | InheritedSocket): string {
  if ('descriptor' in address) {
    return `the inherited socket ${address.descriptor}`;
  }
  return 'path' in address ? address.path : `${address.host} port ${address.port}`;
}

/** Where a server has come to listen. */
function listeningAt(
  address: ListenAddress | InheritedSocket,
  bound: BoundAddress,
  inheritedPath: string | undefined,
): ListeningAddress {
  if (typeof bound === 'object' && bound !== null) {
    return { host: 'host' in address ? address.host : bound.address, port: bound.port };
  }
  return { path: 'path' in address ? address.path : (inheritedPath ?? '') };
}

function peerOf(socket: Socket): string {
  const address = socket.remoteAddress ?? '';
  return isIPv4(address) ? `${address}:${socket.remotePort}` : `[${address}]:${socket.remotePort}`;
}
