// SPDX-License-Identifier: Apache-2.0
/**
 * What an engine outside this library does: it takes over a plain socket once the
 * handshake has ended, and answers the same bytes as {@link Transmission}.
 */
import type { Export } from './export.ts';
import type { ExportFigures } from './figures.ts';
import type { Agreement } from './handshake.ts';
import type { Limits } from './limits.ts';

/** A connection that is to be taken over. */
export interface Takeover {
  /** The socket's descriptor. It stays the caller's, who closes it afterwards. */
  readonly descriptor: number;
  readonly agreement: Agreement;
  /** What the client has sent behind the handshake. */
  readonly received: Buffer;
  /** TLS on the socket, from here on the engine's. */
  readonly tls?: object;
  /**
   * The connection has ended, and nothing uses its export's source for it any more.
   *
   * @param reason why, unless it ended as it should
   */
  readonly onClosed: (reason: string | undefined, peersFault: boolean) => void;
  /** A read failed. The client has been told. */
  readonly onReadFailed: (code: string, offset: number, length: number) => void;
}

/** A connection that an engine serves. */
export interface ServedSocket {
  /** Answers what is in flight, takes no more, and closes; after {@link Limits.drainMs} by force. */
  drain(): void;
}

/** Serves sockets in threads of its own. */
export interface SocketEngine {
  /** Takes over a connection; undefined if it cannot, and then it has done nothing. */
  serve(takeover: Takeover): ServedSocket | undefined;
  /** Answers EIO to all that is asked of an export from now on. */
  fail(served: Export): void;
  /** What it has counted for an export; undefined if it does not know it. */
  figures(served: Export): ExportFigures | undefined;
  /**
   * Forgets an export that no connection uses any more.
   *
   * @returns when nothing uses its source
   */
  release(served: Export): Promise<void>;
  /** Data that is being read or sent, bytes. */
  readonly bytesInFlight: number;
  /** Ends its threads, when all exports are released. */
  close(): Promise<void>;
}

/** Makes the engine of a server with these limits. */
export type SocketEngineFactory = (limits: Limits) => SocketEngine;
