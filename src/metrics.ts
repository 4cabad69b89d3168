// SPDX-License-Identifier: Apache-2.0
/**
 * Metrics for Prometheus, by HTTP at `/metrics` on an address of their own. What they say
 * is looked up when they are asked for, so no fact is kept in two places.
 */
import { lstat, rm } from 'node:fs/promises';
import { createServer, type IncomingMessage, type Server, type ServerResponse } from 'node:http';
import { type AddressInfo, connect, isIPv6 } from 'node:net';
import { resolve as resolvePath } from 'node:path';
import { umask } from 'node:process';
import { addFigures, type ExportFigures, emptyFigures } from '../nbd/figures.ts';
import type { ListenAddress } from '../nbd/server.ts';
import type { BackupDescription } from './backup-report.ts';
import type { DeviceReport } from './devices.ts';
import { StillblockError, usageError } from './errors.ts';
import { DEFAULT_HOST, explainListen } from './listen.ts';
import type { Metrics } from './prometheus.ts';

/** What the option says in a command's help. */
export const METRICS_HELP = 'Prometheus metrics on [HOST:]PORT or socket';

/** What the metrics are made of. */
export interface Measured {
  readonly nbd: NbdFigures;
  /** Those that run. */
  readonly backups?: readonly BackupDescription[];
  /** Those that are tracked. */
  readonly devices?: readonly DeviceReport[];
}

/** The figures of an NBD server. */
export interface NbdFigures {
  /** Connections in handshake, now. */
  readonly handshakes: number;
  /** Connections in transmission, now. */
  readonly connections: number;
  /** Connections since the server began. */
  readonly accepted: number;
  /** Data that is being read or sent. */
  readonly bytesInFlight: number;
  /** By the name of the export. */
  readonly exports: ReadonlyMap<string, ExportFigures>;
}

/** What a server has counted that does not exist. */
export const NO_FIGURES: NbdFigures = {
  handshakes: 0,
  connections: 0,
  accepted: 0,
  bytesInFlight: 0,
  exports: new Map(),
};

/** What several servers have counted together: exports of one name are one. */
export function sumFigures(all: readonly NbdFigures[]): NbdFigures {
  const exports = new Map<string, ExportFigures>();
  for (const { exports: served } of all) {
    for (const [name, figures] of served) {
      const total = exports.get(name) ?? emptyFigures();
      addFigures(total, figures);
      exports.set(name, total);
    }
  }
  const sum = (value: (figures: NbdFigures) => number): number =>
    all.reduce((total, figures) => total + value(figures), 0);
  return {
    handshakes: sum(({ handshakes }) => handshakes),
    connections: sum(({ connections }) => connections),
    accepted: sum(({ accepted }) => accepted),
    bytesInFlight: sum(({ bytesInFlight }) => bytesInFlight),
    exports,
  };
}

/** A scrape sends no body, and a few hundred bytes of headers. */
const HEADER_BYTES = 16 * 1024;
/** Prometheus gives up after ten seconds by default. */
const REQUEST_MS = 10_000;
/** One scraper or two, and a person who looks. */
const CONNECTIONS = 16;

/**
 * Reads the value of `--metrics`: a path with a slash, or `[HOST:]PORT`, with an IPv6
 * address in brackets.
 *
 * @throws StillblockError with one line that says what to change
 */
export function planMetrics(text: string): ListenAddress {
  if (text.includes('/')) {
    return { path: text };
  }
  const match = /^(?:(?:\[([^\]]+)\]|([^:[\]]+)):)?([0-9]{1,5})$/.exec(text);
  const port = Number(match?.[3]);
  if (match === null || port > 65_535) {
    throw usageError(
      `--metrics ${JSON.stringify(text)} is no address`,
      'give PORT, HOST:PORT, or the path of a unix socket with a slash in it',
    );
  }
  return { host: match[1] ?? match[2] ?? DEFAULT_HOST, port };
}

/** Where the metrics are. */
export interface MetricsServer {
  /** What to scrape: a URL, or the path of the socket. */
  readonly where: string;
  close(): Promise<void>;
}

async function answer(
  metrics: Metrics,
  request: IncomingMessage,
  response: ServerResponse,
): Promise<void> {
  request.resume();
  if (request.url !== '/metrics') {
    response.writeHead(404, { 'content-type': 'text/plain' }).end('only /metrics is here\n');
  } else if (request.method !== 'GET' && request.method !== 'HEAD') {
    response.writeHead(405, { allow: 'GET, HEAD' }).end();
  } else {
    const text = await metrics.text();
    response.writeHead(200, { 'content-type': metrics.contentType }).end(text);
  }
}

function listen(server: Server, address: ListenAddress): Promise<void> {
  return new Promise((resolve, reject) => {
    server.once('error', reject);
    if ('path' in address) {
      // The socket is made, with its mode, before listen() returns.
      const before = umask(0o177);
      server.listen(address.path, resolve);
      umask(before);
    } else {
      server.listen({ host: address.host, port: address.port, exclusive: true }, resolve);
    }
  });
}

/** Removes the socket of a process that was killed. One that answers stays in the way. */
async function removeStale(path: string): Promise<void> {
  const found = await lstat(path).catch(() => undefined);
  if (found?.isSocket() !== true) {
    return;
  }
  const alive = await new Promise<boolean>((resolve) => {
    const probe = connect({ path });
    probe.once('connect', () => {
      probe.destroy();
      resolve(true);
    });
    probe.once('error', () => resolve(false));
  });
  if (!alive) {
    await rm(path, { force: true });
  }
}

/**
 * Serves metrics until it is closed.
 *
 * @param measure looks all figures up, once per scrape
 * @throws StillblockError if it cannot listen there
 */
export async function startMetrics(
  wanted: ListenAddress,
  measure: () => Measured,
): Promise<MetricsServer> {
  const address = 'path' in wanted ? { path: resolvePath(wanted.path) } : wanted;
  const { Metrics } = await import('./prometheus.ts');
  const metrics = new Metrics(measure);
  const server = createServer(
    { maxHeaderSize: HEADER_BYTES, requestTimeout: REQUEST_MS, headersTimeout: REQUEST_MS },
    (request, response) => {
      answer(metrics, request, response).catch(() => response.destroy());
    },
  );
  server.maxConnections = CONNECTIONS;
  try {
    if ('path' in address) {
      await removeStale(address.path);
    }
    await listen(server, address);
  } catch (error) {
    const { code, message } = explainListen(address, error);
    throw new StillblockError(code, message, 'choose another address with --metrics', {
      cause: error,
    });
  }
  const { port } = 'path' in address ? { port: 0 } : (server.address() as AddressInfo);
  const close = async (): Promise<void> => {
    await new Promise<void>((resolve) => {
      server.close(() => resolve());
      server.closeAllConnections();
    });
  };
  if ('path' in address) {
    return { where: address.path, close };
  }
  const host = isIPv6(address.host) ? `[${address.host}]` : address.host;
  return { where: `http://${host}:${port}/metrics`, close };
}
