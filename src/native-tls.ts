// SPDX-License-Identifier: Apache-2.0
/**
 * TLS by the addon, in Node's own OpenSSL. It behaves as `NodeTls` does; but when a client has
 * chosen its export, the native engine goes on with socket and session, and no byte passes
 * JavaScript any more.
 */
import { X509Certificate } from 'node:crypto';
import type { Socket } from 'node:net';
import { Duplex } from 'node:stream';
import {
  CLIENT_LEFT,
  ciphersFor,
  type DetachedTls,
  judgeClient,
  requireCredentials,
  SUITES,
  type TlsAcceptor,
  type TlsCredentials,
  TlsRefusal,
  type TlsSession,
} from '../nbd/tls.ts';
import type { NativeTlsCredentials, NativeTlsPeer, NativeTlsSession } from './native.ts';

/** OpenSSL's numbers for what is wrong with a certificate, by the names that Node has for them. */
const VERIFY_ERRORS: ReadonlyMap<number, string> = new Map([
  [2, 'UNABLE_TO_GET_ISSUER_CERT'],
  [7, 'CERT_SIGNATURE_FAILURE'],
  [9, 'CERT_NOT_YET_VALID'],
  [10, 'CERT_HAS_EXPIRED'],
  [18, 'DEPTH_ZERO_SELF_SIGNED_CERT'],
  [19, 'SELF_SIGNED_CERT_IN_CHAIN'],
  [20, 'UNABLE_TO_GET_ISSUER_CERT_LOCALLY'],
  [21, 'UNABLE_TO_VERIFY_LEAF_SIGNATURE'],
  [23, 'CERT_REVOKED'],
  [26, 'INVALID_PURPOSE'],
]);

function toNative(credentials: TlsCredentials): NativeTlsCredentials {
  const { certificates, clientCertificates, keys } = credentials;
  const asks = clientCertificates !== 'none';
  return {
    ...(certificates !== undefined && {
      certificate: certificates.certificate.toString('latin1'),
      key: certificates.key.toString('latin1'),
      ...(asks &&
        certificates.authorities !== undefined && {
          authorities: certificates.authorities.toString('latin1'),
        }),
      ...(asks &&
        certificates.revoked !== undefined && {
          revoked: certificates.revoked.toString('latin1'),
        }),
    }),
    ciphers: ciphersFor(credentials).join(':'),
    suites: SUITES.join(':'),
    ...(keys !== undefined && { keys: [...keys].map(([user, key]) => ({ user, key })) }),
  };
}

/** Decrypted bytes of a socket, until an engine takes both over. */
class NativeTlsStream extends Duplex {
  readonly #socket: Socket;
  readonly #session: NativeTlsSession;
  #detached = false;
  #ended = false;

  constructor(socket: Socket, session: NativeTlsSession) {
    super({ allowHalfOpen: true });
    this.#socket = socket;
    this.#session = session;
    socket.on('data', (bytes: Buffer) => {
      session.feed(bytes);
      this.#pump();
    });
    socket.on('end', () => this.#end());
    socket.on('error', (error) => this.destroy(error));
    socket.on('close', () => this.destroy());
    // What came along with the end of the handshake.
    this.#pump();
  }

  #pump(): void {
    try {
      for (let bytes = this.#session.read(); bytes !== undefined; bytes = this.#session.read()) {
        if (bytes === null) {
          this.#end();
          break;
        }
        if (!this.push(bytes)) {
          this.#socket.pause();
        }
      }
    } catch (error) {
      this.destroy(error as Error);
    }
    this.#send();
  }

  /** The peer sends no more: it has said so, or its socket has. */
  #end(): void {
    if (!this.#ended) {
      this.#ended = true;
      this.push(null);
    }
  }

  /** Sends what there is: encrypted data, alerts, new keys. */
  #send(done?: (error?: Error | null) => void): void {
    const output = this.#session.takeOutput();
    if (this.#socket.writable && (output.length > 0 || done !== undefined)) {
      this.#socket.write(output, done);
    } else {
      done?.();
    }
  }

  override _read(): void {
    if (!this.#detached) {
      this.#socket.resume();
    }
  }

  override _write(bytes: Buffer, _encoding: string, done: (error?: Error | null) => void): void {
    try {
      this.#session.write(bytes);
    } catch (error) {
      done(error as Error);
      return;
    }
    this.#send(done);
  }

  override _final(done: (error?: Error | null) => void): void {
    this.#session.end();
    this.#socket.end(this.#session.takeOutput(), () => done());
  }

  override _destroy(error: Error | null, done: (error?: Error | null) => void): void {
    this.#socket.destroy();
    done(error);
  }

  detach(): DetachedTls {
    this.#detached = true;
    const socket = this.#socket;
    socket.removeAllListeners('data');
    socket.removeAllListeners('end');
    socket.pause();
    while (socket.readableLength > 0) {
      this.#session.feed(socket.read() as Buffer);
    }
    return { socket, session: this.#session };
  }
}

/** TLS as the addon has it. */
class NativeTls implements TlsAcceptor {
  #credentials: TlsCredentials;
  #open: () => NativeTlsSession;
  readonly #make: (credentials: NativeTlsCredentials) => (() => NativeTlsSession) | undefined;

  constructor(
    credentials: TlsCredentials,
    open: () => NativeTlsSession,
    make: (credentials: NativeTlsCredentials) => (() => NativeTlsSession) | undefined,
  ) {
    this.#credentials = credentials;
    this.#open = open;
    this.#make = make;
  }

  replace(credentials: TlsCredentials): void {
    requireCredentials(credentials);
    this.#open = this.#make(toNative(credentials)) ?? this.#open;
    this.#credentials = credentials;
  }

  accept(socket: Socket): Promise<TlsSession> {
    const session = this.#open();
    // Those that its context was made of, whatever is reloaded meanwhile.
    const credentials = this.#credentials;
    return new Promise((resolve, reject) => {
      const release = (): void => {
        for (const event of ['data', 'end']) {
          socket.removeAllListeners(event);
        }
        socket.off('error', onLost);
        socket.off('close', onLost);
      };
      const refuse = (error: Error): void => {
        release();
        reject(error instanceof TlsRefusal ? error : new TlsRefusal(`TLS: ${error.message}`));
      };
      const onLost = (): void => refuse(new TlsRefusal(CLIENT_LEFT));
      const send = (): void => {
        const output = session.takeOutput();
        if (output.length > 0) {
          socket.write(output);
        }
      };
      socket.on('data', (bytes: Buffer) => {
        try {
          session.feed(bytes);
          const complete = session.accept();
          send();
          if (complete) {
            release();
            socket.pause();
            resolve(sessionOf(socket, session, credentials));
          }
        } catch (error) {
          // The alert that tells the client why.
          send();
          refuse(error as Error);
        }
      });
      socket.once('error', onLost);
      socket.once('close', onLost);
      socket.on('end', () => socket.destroy());
      socket.resume();
    });
  }
}

function shown(peer: NativeTlsPeer): Parameters<typeof judgeClient>[1] {
  const { user, certificate, verifyError = 0 } = peer;
  return {
    user,
    certificate: certificate === undefined ? undefined : new X509Certificate(certificate),
    problem:
      verifyError === 0
        ? undefined
        : (VERIFY_ERRORS.get(verifyError) ?? `OpenSSL's number ${verifyError}`),
  };
}

function sessionOf(
  socket: Socket,
  session: NativeTlsSession,
  credentials: TlsCredentials,
): TlsSession {
  const peer = session.peer();
  const client = judgeClient(credentials, shown(peer));
  const stream = new NativeTlsStream(socket, session);
  const { protocol, cipher } = peer;
  return { stream, client, protocol, cipher, detach: () => stream.detach() };
}

/** What makes TLS of credentials; undefined where there is no addon, or no OpenSSL for it. */
export async function nativeTls(): Promise<
  ((credentials: TlsCredentials) => TlsAcceptor | undefined) | undefined
> {
  let native: typeof import('./native.ts');
  try {
    native = await import('./native.ts');
    native.nativeConstants();
  } catch {
    return undefined;
  }
  return (credentials) => {
    requireCredentials(credentials);
    const open = native.openTls(toNative(credentials));
    return open && new NativeTls(credentials, open, native.openTls);
  };
}
