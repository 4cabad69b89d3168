// SPDX-License-Identifier: Apache-2.0
/**
 * How commands reach the daemon: over its socket or, where none answers, one of their own
 * in this process.
 */
import { type ClientRequest, type IncomingMessage, request } from 'node:http';
import { request as secureRequest } from 'node:https';
import type { Logger } from 'pino';
import { errorIn } from './api-errors.ts';
import type { CommonOptions } from './commands/common.ts';
import { type Configuration, configurationInForce } from './configuration.ts';
import type { Daemon } from './daemon.ts';
import { explain, StillblockError } from './errors.ts';
import type { DaemonEvent } from './events.ts';
import { makeLog } from './log.ts';
import { EVENTS_PATH, type Input, listBackups, type Operation } from './operations.ts';

/** An answer is a few kilobytes for each of 64 disks, or a map of what changed. */
const MAX_ANSWER_BYTES = 256 * 1024 * 1024;

/** Where a daemon is. */
export type DaemonAddress =
  | { readonly socketPath: string }
  | {
      readonly host: string;
      readonly port: number;
      /** Who we are, and by whom daemons are known; see `readClientCertificates`. */
      readonly tls: { readonly ca: Buffer; readonly cert: Buffer; readonly key: Buffer };
    };

/** Nobody answers there. */
class NoDaemon extends StillblockError {
  constructor(where: string, cause: Error) {
    super('NO_DAEMON', `no daemon answers at ${where}`, 'start it: systemctl start stillblock', {
      cause,
    });
  }
}

/** The control API, wherever the daemon is. */
export interface Api {
  /** The daemon is in this process, and ends with it. */
  readonly solo: boolean;
  /**
   * @param signal gives it up
   * @throws StillblockError as the operation does
   */
  call<In extends Input, Out>(
    operation: Operation<In, Out>,
    input: In,
    signal?: AbortSignal,
  ): Promise<Out>;
  /**
   * Tells what happens from now on.
   *
   * @param onLost told when the daemon has gone
   */
  watch(onEvent: (event: DaemonEvent) => void, onLost: () => void): Promise<void>;
  /** Makes a daemon in this process the only one, which others reach by the socket, too. */
  open(): Promise<void>;
  close(): Promise<void>;
}

function isNobodyThere(error: unknown): boolean {
  const code = error instanceof Error && 'code' in error ? error.code : undefined;
  return code === 'ENOENT' || code === 'ECONNREFUSED' || code === 'ENOTDIR';
}

function pathOf(operation: Operation<never, unknown>, { params, query }: Input): string {
  const path = operation.path.replaceAll(/\{(\w+)\}/g, (_whole, name: string) =>
    encodeURIComponent(params?.[name] ?? ''),
  );
  const wanted = Object.entries(query ?? {}).filter(([, value]) => value !== undefined);
  return wanted.length === 0 ? path : `${path}?${new URLSearchParams(Object.fromEntries(wanted))}`;
}

function readAll(incoming: IncomingMessage): Promise<string> {
  return new Promise((resolve, reject) => {
    const pieces: string[] = [];
    let length = 0;
    incoming.setEncoding('utf8');
    incoming.on('data', (piece: string) => {
      pieces.push(piece);
      length += piece.length;
      if (length > MAX_ANSWER_BYTES) {
        incoming.destroy(new Error('the answer is too long'));
      }
    });
    incoming.on('error', reject);
    incoming.on('end', () => resolve(pieces.join('')));
  });
}

/** The API of a daemon that runs for itself. */
class RemoteApi implements Api {
  readonly solo = false;
  readonly #address: DaemonAddress;
  readonly #streams: ClientRequest[] = [];

  constructor(address: DaemonAddress) {
    this.#address = address;
  }

  get #where(): string {
    const address = this.#address;
    return 'socketPath' in address ? address.socketPath : `${address.host} port ${address.port}`;
  }

  #send(
    method: string,
    path: string,
    body: unknown,
    signal?: AbortSignal,
  ): Promise<{ incoming: IncomingMessage; outgoing: ClientRequest }> {
    return new Promise((resolve, reject) => {
      const address = this.#address;
      const [start, where] =
        'socketPath' in address
          ? [request, address]
          : [secureRequest, { host: address.host, port: address.port, ...address.tls }];
      const outgoing = start(
        {
          ...where,
          method,
          path,
          agent: false,
          ...(body === undefined ? {} : { headers: { 'content-type': 'application/json' } }),
          ...(signal === undefined ? {} : { signal }),
        },
        (incoming) => resolve({ incoming, outgoing }),
      );
      outgoing.on('error', (error) => {
        reject(isNobodyThere(error) ? new NoDaemon(this.#where, error) : error);
      });
      outgoing.end(body === undefined ? undefined : JSON.stringify(body));
    });
  }

  async call<In extends Input, Out>(
    operation: Operation<In, Out>,
    input: In,
    signal?: AbortSignal,
  ): Promise<Out> {
    let answer: unknown;
    try {
      const path = pathOf(operation, input);
      const { incoming } = await this.#send(operation.method, path, input.body, signal);
      answer = JSON.parse(await readAll(incoming));
      if (incoming.statusCode === operation.status) {
        return answer as Out;
      }
    } catch (error) {
      throw error instanceof NoDaemon ? error : this.#lost(error);
    }
    throw errorIn(answer) ?? this.#lost(new Error('the answer is not of this API'));
  }

  #lost(error: unknown): StillblockError {
    const code = error instanceof Error && 'code' in error ? error.code : undefined;
    if (code === 'EACCES' || code === 'EPERM') {
      return explain(error, this.#where);
    }
    if (code === 'ABORT_ERR') {
      return new StillblockError('CANCELLED', 'the request was given up', 'try again');
    }
    return new StillblockError(
      'DAEMON_LOST',
      `the daemon has gone before it answered (${error instanceof Error ? error.message : String(error)})`,
      'look at its log, and at stillblock status',
      { cause: error },
    );
  }

  async watch(onEvent: (event: DaemonEvent) => void, onLost: () => void): Promise<void> {
    const { incoming, outgoing } = await this.#send('GET', EVENTS_PATH, undefined);
    this.#streams.push(outgoing);
    let text = '';
    incoming.setEncoding('utf8');
    incoming.on('data', (piece: string) => {
      text += piece;
      for (let end = text.indexOf('\n\n'); end >= 0; end = text.indexOf('\n\n')) {
        const data = /^data: (.*)$/m.exec(text.slice(0, end))?.[1];
        text = text.slice(end + 2);
        if (data !== undefined) {
          onEvent(JSON.parse(data) as DaemonEvent);
        }
      }
    });
    incoming.on('error', () => {});
    incoming.on('close', onLost);
  }

  async open(): Promise<void> {}

  async close(): Promise<void> {
    for (const outgoing of this.#streams) {
      outgoing.destroy();
    }
  }
}

/** The API of a daemon that lives in this process. */
class SoloApi implements Api {
  readonly solo = true;
  readonly #daemon: Daemon;
  readonly #configuration: Configuration;
  readonly #log: Logger;
  #closeServer: (() => Promise<void>) | undefined;

  private constructor(daemon: Daemon, configuration: Configuration, log: Logger) {
    this.#daemon = daemon;
    this.#configuration = configuration;
    this.#log = log;
  }

  static async make(configuration: Configuration, log: Logger): Promise<SoloApi> {
    const { Daemon } = await import('./daemon.ts');
    const daemon = new Daemon(configuration.folders, log, true);
    await daemon.adopt(configuration);
    return new SoloApi(daemon, configuration, log);
  }

  async call<In extends Input, Out>(
    operation: Operation<In, Out>,
    input: In,
    signal: AbortSignal = new AbortController().signal,
  ): Promise<Out> {
    return operation.run(this.#daemon, input, signal);
  }

  async watch(onEvent: (event: DaemonEvent) => void): Promise<void> {
    this.#daemon.events.subscribe(onEvent);
  }

  async open(): Promise<void> {
    await this.#daemon.lock(() => runningBackup(this.#configuration));
    const { serveOnSocket } = await import('./api-server.ts');
    const server = await serveOnSocket(this.#daemon, this.#configuration.api.socket, this.#log);
    this.#closeServer = () => server.close();
  }

  async close(): Promise<void> {
    // Whoever waits for the end on the socket is answered before that goes.
    await this.#daemon.endBackups();
    await this.#closeServer?.();
    await this.#daemon.close();
  }
}

/** The checkpoint of a backup that another process holds, if it can be asked. */
export async function runningBackup({ api }: Configuration): Promise<string | undefined> {
  try {
    const { backups } = await new RemoteApi({ socketPath: api.socket }).call(listBackups, {});
    return backups[0]?.checkpoint;
  } catch {
    return undefined;
  }
}

/** The API of a daemon that is somewhere else. Whoever got it closes it. */
export function remoteApi(address: DaemonAddress): Api {
  return new RemoteApi(address);
}

/** Finds the daemon, or makes one for this command. Whoever got the API closes it. */
export async function openApi(log: Logger): Promise<Api> {
  const configuration = await configurationInForce();
  const remote = new RemoteApi({ socketPath: configuration.api.socket });
  try {
    await remote.call(listBackups, {});
    return remote;
  } catch (error) {
    if (error instanceof NoDaemon) {
      return SoloApi.make(configuration, log);
    }
    throw error;
  }
}

/** Uses the API for a command, and lets go of it again. */
export async function withApi<T>(
  { verbose }: CommonOptions,
  use: (api: Api, log: Logger) => Promise<T>,
): Promise<T> {
  const log = makeLog(verbose ?? 0);
  const api = await openApi(log);
  try {
    return await use(api, log);
  } finally {
    await api.close();
  }
}
