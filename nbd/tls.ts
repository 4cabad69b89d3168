// SPDX-License-Identifier: Apache-2.0
/**
 * TLS 1.2 and 1.3 on a socket whose client has been told that STARTTLS is fine, by
 * certificates (X.509) or pre-shared keys (PSK), with Node's own implementation.
 */
import {
  createPrivateKey,
  constants as cryptoConstants,
  randomBytes,
  X509Certificate,
} from 'node:crypto';
import { isIPv4, type Socket } from 'node:net';
import type { Duplex } from 'node:stream';
import { createServer, type SecureContextOptions, type Server, type TLSSocket } from 'node:tls';
import { type AlternativeName, ANONYMOUS, type Identity, nameOf } from './access.ts';

/** Whether TLS can't be had, may be had, or must be had. */
export type TlsMode = 'off' | 'on' | 'require';

/** What a server proves itself with, and what it asks of its clients. */
export interface TlsCredentials {
  readonly certificates?: {
    /** The server's certificate, and those between it and its authority, PEM. */
    readonly certificate: Buffer;
    readonly key: Buffer;
    /** Authorities whose signature makes a client's certificate good, PEM. */
    readonly authorities?: Buffer;
    /** Certificates of theirs that are good no more, PEM. */
    readonly revoked?: Buffer;
  };
  /** Whether clients are asked for a certificate. A wrong one is never good enough. */
  readonly clientCertificates: 'none' | 'optional' | 'required';
  /** Keys by user. */
  readonly keys?: ReadonlyMap<string, Buffer>;
}

/** A connection within TLS. */
export interface TlsSession {
  readonly stream: Duplex;
  readonly client: Identity;
  readonly protocol: string;
  readonly cipher: string;
  /**
   * Ends the stream's hold on its socket, for an engine that goes on with both. What the stream
   * has decrypted is still to be read from it.
   */
  readonly detach?: () => DetachedTls;
}

/** A socket, and TLS on it as an engine knows it. */
export interface DetachedTls {
  readonly socket: Socket;
  readonly session: object;
}

/** Begins TLS on sockets. */
export interface TlsAcceptor {
  /**
   * Takes a socket over, from which nobody reads any more, for the client's first message.
   *
   * @throws TlsRefusal if the client does not agree with us, or is not who it must be
   */
  accept(socket: Socket): Promise<TlsSession>;
  /**
   * Has other credentials from now on. Connections that are there stay as they are.
   *
   * @throws Error if they are no good: then the ones before stay
   */
  replace(credentials: TlsCredentials): void;
}

/** Why there is no TLS with a client: its fault or ours, the log says whose word it is. */
export class TlsRefusal extends Error {}

/** Said of a client that is gone before TLS is there, without a word why. */
export const CLIENT_LEFT = 'TLS: client left; it may not trust our certificate';

/**
 * Ours first. All have forward secrecy and authenticated encryption. Those of TLS 1.3 with
 * SHA-256 stand first because only they go with pre-shared keys.
 */
export const SUITES: readonly string[] = [
  'TLS_AES_128_GCM_SHA256',
  'TLS_CHACHA20_POLY1305_SHA256',
  'TLS_AES_256_GCM_SHA384',
];
const CIPHERS = [
  'ECDHE-ECDSA-AES128-GCM-SHA256',
  'ECDHE-RSA-AES128-GCM-SHA256',
  'ECDHE-ECDSA-AES256-GCM-SHA384',
  'ECDHE-RSA-AES256-GCM-SHA384',
  'ECDHE-ECDSA-CHACHA20-POLY1305',
  'ECDHE-RSA-CHACHA20-POLY1305',
];
const PSK_CIPHERS = [
  'DHE-PSK-AES128-GCM-SHA256',
  'DHE-PSK-AES256-GCM-SHA384',
  'ECDHE-PSK-CHACHA20-POLY1305',
  'DHE-PSK-CHACHA20-POLY1305',
];
/** The ciphers of TLS 1.2. */
export function ciphersFor({ keys }: TlsCredentials): string[] {
  return [...CIPHERS, ...(keys === undefined ? [] : PSK_CIPHERS)];
}

/** Of a key made up for a user whom we don't know, bytes. */
const UNKNOWN_KEY_BYTES = 32;

function contextOptions(credentials: TlsCredentials): SecureContextOptions {
  const { certificates } = credentials;
  const { SSL_OP_NO_RENEGOTIATION, SSL_OP_NO_TICKET } = cryptoConstants;
  return {
    ...(certificates !== undefined && {
      cert: certificates.certificate,
      key: certificates.key,
      ...(certificates.authorities !== undefined && { ca: certificates.authorities }),
      ...(certificates.revoked !== undefined && { crl: certificates.revoked }),
    }),
    ciphers: [...SUITES, ...ciphersFor(credentials)].join(':'),
    dhparam: 'auto',
    honorCipherOrder: true,
    minVersion: 'TLSv1.2',
    maxVersion: 'TLSv1.3',
    // A resumed session would bring back a client whose certificate has been revoked since.
    secureOptions: SSL_OP_NO_RENEGOTIATION | SSL_OP_NO_TICKET,
  };
}

/**
 * Requires credentials that TLS can begin with.
 *
 * @throws Error that says what is wrong with them
 */
export function requireCredentials({
  certificates,
  keys,
  clientCertificates,
}: TlsCredentials): void {
  if (certificates === undefined && keys === undefined) {
    throw new Error('there is neither a certificate nor a pre-shared key');
  }
  if (certificates === undefined) {
    return;
  }
  if (clientCertificates !== 'none' && certificates.authorities === undefined) {
    throw new Error('there is no authority to tell clients by');
  }
  const certificate = new X509Certificate(certificates.certificate);
  if (!certificate.checkPrivateKey(createPrivateKey(certificates.key))) {
    throw new Error('the key is not that of the certificate');
  }
  if (Date.parse(certificate.validTo) < Date.now()) {
    throw new Error(`the certificate has expired on ${certificate.validTo}`);
  }
}

const ALTERNATIVE_TYPES: ReadonlyMap<string, AlternativeName['type']> = new Map([
  ['DNS', 'dns'],
  ['IP Address', 'ip'],
  ['URI', 'uri'],
  ['email', 'email'],
]);

/**
 * Reads Node's line of alternative names, `DNS:a.example, IP Address:192.0.2.1`, in which a
 * value with anything unusual in it is a JSON string.
 *
 * @returns undefined if it is not understood: then none of it is believed
 */
export function parseAlternativeNames(text: string): AlternativeName[] | undefined {
  const names: AlternativeName[] = [];
  const entry = /([^:,"]+):("(?:[^"\\]|\\.)*"|[^,"]*)(?:, (?=.)|$)/y;
  while (entry.lastIndex < text.length) {
    const [, type = '', value = ''] = entry.exec(text) ?? [];
    if (type === '') {
      return undefined;
    }
    const known = ALTERNATIVE_TYPES.get(type);
    if (known !== undefined) {
      const plain = value.startsWith('"') ? (JSON.parse(value) as string) : value;
      names.push({ type: known, value: plain });
    }
  }
  return names;
}

/** Undoes RFC 4514's escapes. */
function unescapeName(value: string): string {
  return value.replace(/\\([0-9A-Fa-f]{2}|.)/gs, (_all, escaped: string) =>
    escaped.length === 2 ? String.fromCharCode(Number.parseInt(escaped, 16)) : escaped,
  );
}

/** Who a certificate says that its owner is. Its signature has been checked before. */
export function identityOf(certificate: X509Certificate): Identity {
  // Node has one attribute per line, in the order of the certificate; RFC 4514 begins at its end.
  const attributes = certificate.subject.split('\n').filter((line) => line !== '');
  return {
    kind: 'certificate',
    subject: attributes.toReversed().join(','),
    commonNames: attributes
      .filter((line) => line.startsWith('CN='))
      .map((line) => unescapeName(line.slice(3))),
    alternativeNames: parseAlternativeNames(certificate.subjectAltName ?? '') ?? [],
  };
}

/** What a failed handshake tells, in words for the log. */
function refusalOf(error: Error): TlsRefusal {
  const { reason, code } = error as { reason?: string; code?: string };
  // OpenSSL's words, such as "unsupported protocol" and "tlsv1 alert unknown ca".
  const words = code === 'ECONNRESET' ? CLIENT_LEFT : `TLS: ${reason ?? error.message}`;
  return new TlsRefusal(words, { cause: error });
}

interface Handshake {
  readonly resolve: (session: TlsSession) => void;
  readonly reject: (error: Error) => void;
  /** The user whose key was asked for last. */
  user?: string;
}

/** The socket that Node's TLS stands on. Its own words for it are `_parent`, for ages. */
function socketUnder(stream: TLSSocket): unknown {
  return '_parent' in stream ? stream._parent : undefined;
}

/** TLS as Node has it. */
export class NodeTls implements TlsAcceptor {
  /** Never listens: sockets are given to it. */
  readonly #server: Server;
  #credentials: TlsCredentials;
  readonly #handshakes = new WeakMap<object, Handshake>();

  /** @throws Error if they are no good */
  constructor(credentials: TlsCredentials) {
    requireCredentials(credentials);
    this.#credentials = credentials;
    this.#server = createServer({
      ...contextOptions(credentials),
      // Judged by us, so that there is something to be said about it.
      requestCert: credentials.clientCertificates !== 'none',
      rejectUnauthorized: false,
      pskCallback: (stream, user) => this.#keyOf(stream, user),
    });
    this.#server.on('secureConnection', (stream) => this.#onSecure(stream));
    this.#server.on('tlsClientError', (error, stream) => {
      this.#take(stream)?.reject(refusalOf(error));
    });
  }

  replace(credentials: TlsCredentials): void {
    requireCredentials(credentials);
    if (
      (credentials.clientCertificates === 'none') !==
      (this.#credentials.clientCertificates === 'none')
    ) {
      throw new Error('whether clients are asked for a certificate cannot change');
    }
    this.#server.setSecureContext(contextOptions(credentials));
    this.#credentials = credentials;
  }

  accept(socket: Socket): Promise<TlsSession> {
    return new Promise((resolve, reject) => {
      this.#handshakes.set(socket, { resolve, reject });
      socket.once('close', () => reject(new TlsRefusal(CLIENT_LEFT)));
      // A client that says no more has left; once TLS is there it may be waiting for replies.
      socket.allowHalfOpen = false;
      // As Node documents it for sockets that come from elsewhere.
      this.#server.emit('connection', socket);
    });
  }

  #take(stream: TLSSocket): Handshake | undefined {
    const socket = socketUnder(stream);
    return typeof socket === 'object' && socket !== null ? this.#handshakes.get(socket) : undefined;
  }

  #keyOf(stream: TLSSocket, user: string): Buffer | null {
    const { keys } = this.#credentials;
    const handshake = this.#take(stream);
    if (keys === undefined || handshake === undefined) {
      return null;
    }
    handshake.user = user;
    // An unknown user fails as one with a wrong key does: nobody learns which users there are.
    return keys.get(user) ?? randomBytes(UNKNOWN_KEY_BYTES);
  }

  #onSecure(stream: TLSSocket): void {
    const handshake = this.#take(stream);
    if (handshake === undefined) {
      stream.destroy();
      return;
    }
    const { name } = stream.getCipher();
    const protocol = stream.getProtocol() ?? 'unknown';
    try {
      const client = this.#clientOf(stream, handshake);
      stream.allowHalfOpen = true;
      handshake.resolve({ stream, client, protocol, cipher: name });
    } catch (error) {
      handshake.reject(error as Error);
    }
  }

  #clientOf(stream: TLSSocket, { user }: Handshake): Identity {
    // No session is ever resumed, so in TLS 1.3 a "reused" one stands for a pre-shared key.
    const { name, standardName } = stream.getCipher();
    const byKey = stream.isSessionReused() || name.includes('PSK') || standardName.includes('PSK');
    const { authorizationError: problem } = stream as { authorizationError: unknown };
    return judgeClient(this.#credentials, {
      user: byKey ? user : undefined,
      certificate: stream.getPeerX509Certificate(),
      problem: stream.authorized ? undefined : String(problem),
    });
  }
}

/** What a client has shown of itself. */
export interface Shown {
  /** The user whose key it knows. */
  readonly user: string | undefined;
  readonly certificate: X509Certificate | undefined;
  /** OpenSSL's name for what is wrong with the certificate. */
  readonly problem: string | undefined;
}

/**
 * Decides who a client is.
 *
 * @throws TlsRefusal if it is nobody whom these credentials let in
 */
export function judgeClient(
  { clientCertificates }: TlsCredentials,
  { user, certificate, problem }: Shown,
): Identity {
  if (user !== undefined) {
    return { kind: 'psk', user };
  }
  if (clientCertificates === 'none') {
    return ANONYMOUS;
  }
  if (certificate === undefined) {
    if (clientCertificates === 'required') {
      throw new TlsRefusal('TLS: client has no certificate of an authority of ours');
    }
    return ANONYMOUS;
  }
  const client = identityOf(certificate);
  if (problem !== undefined) {
    throw new TlsRefusal(
      `TLS: client's certificate is not good: ${certificateWords(problem)} (${nameOf(client)})`,
    );
  }
  return client;
}

/** Words for OpenSSL's reasons not to believe a certificate. */
function certificateWords(code: string): string {
  switch (code) {
    case 'CERT_HAS_EXPIRED':
      return 'it has expired';
    case 'CERT_NOT_YET_VALID':
      return 'it is not valid yet';
    case 'CERT_REVOKED':
      return 'it has been revoked';
    case 'DEPTH_ZERO_SELF_SIGNED_CERT':
    case 'SELF_SIGNED_CERT_IN_CHAIN':
    case 'UNABLE_TO_GET_ISSUER_CERT':
    case 'UNABLE_TO_GET_ISSUER_CERT_LOCALLY':
    case 'UNABLE_TO_VERIFY_LEAF_SIGNATURE':
    case 'CERT_SIGNATURE_FAILURE':
      return `no authority of ours has signed it (${code})`;
    case 'INVALID_PURPOSE':
      return 'it is not for clients';
    default:
      return code;
  }
}

/** Whether an address can be reached from this machine alone. */
export function isLocalAddress(address: string): boolean {
  const plain = address.replace(/^::ffff:/i, '');
  return isIPv4(plain) ? plain.startsWith('127.') : plain === '::1';
}
