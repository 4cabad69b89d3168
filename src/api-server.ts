// SPDX-License-Identifier: Apache-2.0
/** The control API as HTTP, on a unix socket that is root's alone. */
import { rm } from 'node:fs/promises';
import { createServer, type Server, type ServerResponse } from 'node:http';
import { createServer as createSecureServer, type Server as SecureServer } from 'node:https';
import { dirname } from 'node:path';
import { umask } from 'node:process';
import { type FastifyError, type FastifyInstance, type FastifyReply, fastify } from 'fastify';
import type { Logger } from 'pino';
import { answerOf, statusOf } from './api-errors.ts';
import { schemaController } from './api-validator.ts';
import type { ApiListen } from './configuration.ts';
import type { Daemon } from './daemon.ts';
import { explain, StillblockError, usageError } from './errors.ts';
import type { DaemonEvent } from './events.ts';
import { makeFolder } from './folders.ts';
import { explainListen } from './listen.ts';
import { openApiDocument } from './openapi.ts';
import { EVENTS_PATH, type Input, OPENAPI_PATH, OPERATIONS, type Operation } from './operations.ts';
import { readCertificates } from './tls.ts';

/** A request names at most 256 things by paths of at most 4096 characters. */
const BODY_BYTES = 1024 * 1024;
/** A request is a line and a few headers. */
const HEADER_BYTES = 16 * 1024;
const HTTP_OPTIONS = {
  maxHeaderSize: HEADER_BYTES,
  headersTimeout: 10_000,
  requestTimeout: 30_000,
} as const;
/** Commands that wait for a backup to begin or end, and the streams. */
const MAX_CONNECTIONS = 128;
/** A person or two with a terminal, a monitor, and a backup product. */
const MAX_STREAMS = 32;
/** What a listener may be behind, bytes: some thousands of events. */
const MAX_BEHIND_BYTES = 1024 * 1024;
/** A silent connection would be taken for dead by what lies between. */
const HEARTBEAT_MS = 20_000;

/** Translates what fastify itself refuses. */
function toStillblockError(error: unknown): StillblockError | undefined {
  if (error instanceof StillblockError) {
    return error;
  }
  const { validation, statusCode, message } = error as Partial<FastifyError>;
  if (validation !== undefined || (statusCode !== undefined && statusCode < 500)) {
    return usageError(message ?? 'the request is wrong', `see ${OPENAPI_PATH} for what it takes`);
  }
  return undefined;
}

function refuse(reply: FastifyReply, error: unknown, log: Logger): FastifyReply {
  const known = toStillblockError(error);
  if (known === undefined) {
    log.error({ err: error }, 'request');
  }
  const told =
    known ??
    new StillblockError(
      'BUG',
      error instanceof Error ? error.message : String(error),
      'this is a mistake of ours: please report it, with the log',
    );
  return reply.code(statusOf(told)).send(answerOf(told));
}

function addOperation(
  app: FastifyInstance,
  operation: Operation<never, unknown>,
  daemon: Daemon,
): void {
  const { method, path, status, body, query, xml } = operation;
  const properties = Object.fromEntries(
    Object.keys(query ?? {}).map((name) => [name, { type: 'string', minLength: 1 }]),
  );
  app.route({
    method,
    url: path.replaceAll(/\{(\w+)\}/g, ':$1'),
    schema: {
      querystring: { type: 'object', properties, additionalProperties: false },
      ...(body === undefined ? {} : { body }),
    },
    // Before the body is looked at: a document becomes what JSON would have said.
    preValidation: async (request) => {
      if (xml !== undefined && typeof request.body === 'string') {
        request.body = xml({ query: request.query as Record<string, string> }, request.body);
      }
    },
    handler: async (request, reply) => {
      const gone = new AbortController();
      reply.raw.once('close', () => gone.abort());
      const input: Input = {
        params: request.params as Record<string, string>,
        query: request.query as Record<string, string>,
        body: request.body,
      };
      const answer = await operation.run(daemon, input as never, gone.signal);
      return reply.code(status).send(answer);
    },
  });
}

/** One listener's stream of events (HTML standard, 9.2 Server-sent events). */
function stream(daemon: Daemon, response: ServerResponse, after: number | undefined): void {
  response.writeHead(200, { 'content-type': 'text/event-stream', 'cache-control': 'no-store' });
  response.write(': stillblock\n\n');
  const send = (text: string): void => {
    if (response.writableLength > MAX_BEHIND_BYTES) {
      response.destroy();
    } else {
      response.write(text);
    }
  };
  const unsubscribe = daemon.events.subscribe((event: DaemonEvent) => {
    send(`id: ${event.id}\nevent: ${event.event}\ndata: ${JSON.stringify(event)}\n\n`);
  }, after);
  const heartbeat = setInterval(() => send(': \n\n'), HEARTBEAT_MS);
  response.once('close', () => {
    clearInterval(heartbeat);
    unsubscribe();
  });
}

/** Something of the API that is no operation: it lives as long as its server. */
function addEvents(app: FastifyInstance, daemon: Daemon, streams: Set<ServerResponse>): void {
  app.get(EVENTS_PATH, (request, reply) => {
    if (streams.size >= MAX_STREAMS) {
      throw new StillblockError(
        'TOO_MANY',
        `${MAX_STREAMS} clients listen to events already`,
        'end one of them',
      );
    }
    const last = request.headers['last-event-id'];
    const after = typeof last === 'string' && /^\d{1,15}$/.test(last) ? Number(last) : undefined;
    reply.hijack();
    streams.add(reply.raw);
    reply.raw.once('close', () => streams.delete(reply.raw));
    stream(daemon, reply.raw, after);
  });
}

/** The routes of the API, on a server that does not listen yet. */
export function buildApi(
  daemon: Daemon,
  log: Logger,
  makeServer: () => Server | SecureServer = () => createServer(HTTP_OPTIONS),
): { readonly app: FastifyInstance; readonly streams: ReadonlySet<ServerResponse> } {
  const app = fastify({
    bodyLimit: BODY_BYTES,
    logger: false,
    forceCloseConnections: 'idle',
    schemaController,
    serverFactory: (handler) => {
      const server = makeServer() as Server;
      server.on('request', handler);
      return server;
    },
  });
  app.addContentTypeParser(
    ['application/xml', 'text/xml'],
    { parseAs: 'string' },
    (_request, document, done) => done(null, document),
  );
  app.server.maxConnections = MAX_CONNECTIONS;
  const streams = new Set<ServerResponse>();
  app.setErrorHandler((error, _request, reply) => refuse(reply, error, log));
  app.setNotFoundHandler((request, reply) => {
    const error = new StillblockError(
      'NOT_FOUND',
      `there is no ${request.method} ${request.url}`,
      `see ${OPENAPI_PATH} for what there is`,
    );
    return refuse(reply, error, log);
  });
  for (const operation of OPERATIONS) {
    addOperation(app, operation, daemon);
  }
  app.get(OPENAPI_PATH, (_request, reply) => reply.send(openApiDocument()));
  addEvents(app, daemon, streams);
  return { app, streams };
}

/** A server of the API that listens. */
export interface ApiServer {
  /**
   * Reads its certificates anew.
   *
   * @throws StillblockError that names the file; those of before stay then
   */
  reload(): Promise<void>;
  /** Sends the answers that are due, ends the streams, and stops to listen. */
  close(): Promise<void>;
}

/** What both kinds of server do at their end. */
async function closeApi(
  app: FastifyInstance,
  server: Server | SecureServer,
  streams: ReadonlySet<ServerResponse>,
): Promise<void> {
  for (const response of streams) {
    response.end();
  }
  const closed = new Promise<void>((resolve) => server.close(() => resolve()));
  server.closeIdleConnections();
  await closed;
  await app.close();
}

interface TlsOptions {
  readonly cert: Buffer;
  readonly key: Buffer;
  readonly ca: Buffer | undefined;
  readonly crl: Buffer | undefined;
}

async function tlsOptions(folder: string): Promise<TlsOptions> {
  const { certificate, key, authorities, revoked } = await readCertificates(folder, true);
  return { cert: certificate, key, ca: authorities, crl: revoked };
}

/**
 * Serves the API by TCP and TLS, to clients with a certificate of the folder's authority.
 *
 * @throws StillblockError if a certificate is wrong, or it cannot listen
 */
export async function serveOnTls(
  daemon: Daemon,
  { host, port, certificates }: ApiListen,
  log: Logger,
): Promise<ApiServer & { readonly port: number }> {
  const options = {
    ...HTTP_OPTIONS,
    ...(await tlsOptions(certificates)),
    requestCert: true,
    rejectUnauthorized: true,
    minVersion: 'TLSv1.2' as const,
  };
  let server: SecureServer;
  try {
    server = createSecureServer(options);
  } catch (error) {
    throw explain(error, certificates);
  }
  const { app, streams } = buildApi(daemon, log, () => server);
  server.on('tlsClientError', (err) => log.warn({ err }, 'a client of the API is not let in'));
  await app.ready();
  try {
    await new Promise<void>((resolve, reject) => {
      server.once('error', reject);
      server.listen({ host, port, exclusive: true }, resolve);
    });
  } catch (error) {
    await app.close();
    throw explainListen({ host, port }, error);
  }
  const bound = server.address();
  return {
    port: typeof bound === 'object' && bound !== null ? bound.port : port,
    reload: async () => {
      const fresh = await tlsOptions(certificates);
      try {
        server.setSecureContext({ ...options, ...fresh });
      } catch (error) {
        throw explain(error, certificates);
      }
    },
    close: () => closeApi(app, server, streams),
  };
}

function listen(server: Server, where: { path: string } | { fd: number }): Promise<void> {
  return new Promise((resolve, reject) => {
    server.once('error', reject);
    // The socket is made, with its mode, before listen() returns.
    const before = umask(0o177);
    server.listen(where, resolve);
    umask(before);
  });
}

/**
 * Serves the API on a unix socket.
 *
 * The caller is the only daemon: a socket that is there is a dead process's, and is replaced.
 *
 * @param fd a socket that listens already, as systemd hands it over
 */
export async function serveOnSocket(
  daemon: Daemon,
  path: string,
  log: Logger,
  fd?: number,
): Promise<ApiServer> {
  const removeFolder = await makeFolder(dirname(path));
  const { app, streams } = buildApi(daemon, log);
  try {
    await app.ready();
    if (fd === undefined) {
      await rm(path, { force: true });
    }
    await listen(app.server, fd === undefined ? { path } : { fd });
  } catch (error) {
    await removeFolder();
    throw explain(error, path);
  }
  return {
    reload: async () => {},
    close: async () => {
      await closeApi(app, app.server, streams);
      await removeFolder();
    },
  };
}
