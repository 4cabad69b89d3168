// SPDX-License-Identifier: Apache-2.0
/** TLS as nbdkit's flags say it: which files, read when, and what is wrong with them. */
import { X509Certificate } from 'node:crypto';
import { readFile } from 'node:fs/promises';
import { isIP } from 'node:net';
import { join } from 'node:path';
import process, { stderr } from 'node:process';
import type { Command } from 'commander';
import type { Access } from '../nbd/access.ts';
import { errorCode } from '../nbd/errors.ts';
import type { Logger } from '../nbd/logger.ts';
import type { SecurityOptions } from '../nbd/server.ts';
import { NodeTls, type TlsAcceptor, type TlsCredentials, type TlsMode } from '../nbd/tls.ts';
import { AccessRulesError, parseAccessRules } from './access-rules.ts';
import type { EngineChoice } from './engine.ts';
import { StillblockError, usageError } from './errors.ts';
import { nativeTls } from './native-tls.ts';
import { errorLine, printJson } from './output.ts';

/** Names of nbdkit, libvirt and QEMU in a client's folder of certificates. */
const CLIENT_CERTIFICATE_FILE = 'client-cert.pem';
const CLIENT_KEY_FILE = 'client-key.pem';
/** The names of nbdkit, libvirt and QEMU in a folder of certificates. */
const CA_FILE = 'ca-cert.pem';
const CRL_FILE = 'ca-crl.pem';
const CERTIFICATE_FILE = 'server-cert.pem';
const KEY_FILE = 'server-key.pem';
/** Below 128 bits a key can be guessed; OpenSSL takes no more than the upper bound, bytes. */
const LEAST_KEY_BYTES = 16;
const MOST_KEY_BYTES = 256;

/** The options as commander hands them over. */
export interface TlsOptions {
  readonly tls?: string;
  readonly tlsCertificates?: string;
  readonly tlsPsk?: string;
  readonly tlsVerifyPeer?: boolean;
  readonly tlsAccess?: string;
  readonly insecure?: boolean;
}

/** What the options ask for. */
export interface TlsPlan {
  readonly mode: TlsMode;
  /** A folder. */
  readonly certificates: string | undefined;
  /** A file of users and keys. */
  readonly keys: string | undefined;
  readonly verifyPeer: boolean;
  /** A file of rules. */
  readonly access: string | undefined;
  /** Rules themselves, in place of a file. */
  readonly rules?: string | undefined;
  /** Other machines may be served in plain text, too. */
  readonly insecure: boolean;
}

/** Adds the options to a command. */
export function addTlsOptions(command: Command): Command {
  return command
    .option('--tls <off|on|require>', 'on: clients on this machine may do without')
    .option('--tls-certificates <dir>', `${CA_FILE}, ${CERTIFICATE_FILE} and ${KEY_FILE}`)
    .option('--tls-psk <file>', 'pre-shared keys, USER:HEXKEY in each line')
    .option('--tls-verify-peer', 'serve only clients with a certificate of that CA')
    .option('--tls-access <file>', 'which client may see which exports')
    .option('--insecure', 'serve other machines in plain text, too');
}

/** What the options of {@link addTlsOptions} mean, for a help text. */
export const TLS_HELP = `Other machines are served within TLS only, unless --insecure is given. With certificates
or keys --tls is require, else off. SIGHUP has all these files read anew. See docs/tls.md.`;

/**
 * Makes a plan of the options.
 *
 * @throws StillblockError with one line that says what to change
 */
export function planTls(options: TlsOptions): TlsPlan {
  const { tls, tlsCertificates, tlsPsk, tlsAccess, insecure = false } = options;
  const verifyPeer = options.tlsVerifyPeer === true;
  const hasCredentials = tlsCertificates !== undefined || tlsPsk !== undefined;
  if (tls !== undefined && tls !== 'off' && tls !== 'on' && tls !== 'require') {
    throw usageError(`--tls ${JSON.stringify(tls)} is no mode`, 'give off, on or require');
  }
  const mode = tls ?? (hasCredentials ? 'require' : 'off');
  if (mode !== 'off' && !hasCredentials) {
    throw usageError(
      `--tls ${mode} needs a certificate or keys`,
      'add --tls-certificates or --tls-psk',
    );
  }
  if (mode === 'require' && insecure) {
    throw usageError(
      '--insecure contradicts TLS that is required',
      'leave it out, or add --tls on',
    );
  }
  if (verifyPeer && tlsCertificates === undefined) {
    throw usageError('--tls-verify-peer needs authorities', 'add --tls-certificates');
  }
  if (mode === 'off' && (tlsAccess !== undefined || verifyPeer)) {
    throw usageError('without TLS nobody knows who a client is', 'leave --tls off out');
  }
  return {
    mode,
    certificates: tlsCertificates,
    keys: tlsPsk,
    verifyPeer,
    access: tlsAccess,
    insecure,
  };
}

function badFile(path: string, why: string, advice: string, cause?: unknown): StillblockError {
  return new StillblockError('BAD_TLS_FILE', `${path}: ${why}`, advice, { cause });
}

async function readBytes(path: string, optional = false): Promise<Buffer | undefined> {
  try {
    return await readFile(path);
  } catch (cause) {
    const code = errorCode(cause);
    if (optional && code === 'ENOENT') {
      return undefined;
    }
    const why = code === 'ENOENT' ? 'there is no such file' : `it cannot be read (${code})`;
    throw badFile(path, why, 'see docs/tls.md for how to make it', cause);
  }
}

async function requireBytes(path: string): Promise<Buffer> {
  return (await readBytes(path)) ?? Buffer.alloc(0);
}

/** Reads lines of `user:hexkey`, as psktool writes them; `#hex:key` for a name in hexadecimal. */
export function parseKeys(text: string, path: string): Map<string, Buffer> {
  const keys = new Map<string, Buffer>();
  const form = 'write USER:HEXKEY, or let psktool do so';
  for (const [index, line] of text.split('\n').entries()) {
    if (line.trim() === '') {
      continue;
    }
    const where = `line ${index + 1}`;
    const [, name = '', hex = ''] = /^([^:]+):([0-9a-fA-F]+)\s*$/.exec(line) ?? [];
    const user = name.startsWith('#') ? Buffer.from(name.slice(1), 'hex').toString() : name;
    const key = Buffer.from(hex, 'hex');
    if (user === '' || key.length * 2 !== hex.length) {
      // The line itself is a secret.
      throw badFile(path, `${where} is not a user and a key`, form);
    }
    if (key.length < LEAST_KEY_BYTES || key.length > MOST_KEY_BYTES) {
      throw badFile(
        path,
        `${where}: the key is not of ${LEAST_KEY_BYTES} to ${MOST_KEY_BYTES} bytes`,
        form,
      );
    }
    if (keys.has(user)) {
      throw badFile(path, `${where}: the user is there twice`, 'remove one');
    }
    keys.set(user, key);
  }
  if (keys.size === 0) {
    throw badFile(path, 'there is no key in it', form);
  }
  return keys;
}

/**
 * Reads a folder of certificates.
 *
 * @param asksClients whether the authority, of whom clients have theirs, must be there
 */
export async function readCertificates(
  folder: string,
  asksClients: boolean,
): Promise<NonNullable<TlsCredentials['certificates']>> {
  const authorities = await readBytes(join(folder, CA_FILE), !asksClients);
  const revoked = await readBytes(join(folder, CRL_FILE), true);
  return {
    certificate: await requireBytes(join(folder, CERTIFICATE_FILE)),
    key: await requireBytes(join(folder, KEY_FILE)),
    ...(asksClients && authorities !== undefined && { authorities }),
    ...(asksClients && revoked !== undefined && { revoked }),
  };
}

/** Reads a client's folder of certificates: who it is, and by whom servers are known. */
export async function readClientCertificates(
  folder: string,
): Promise<{ readonly ca: Buffer; readonly cert: Buffer; readonly key: Buffer }> {
  return {
    ca: await requireBytes(join(folder, CA_FILE)),
    cert: await requireBytes(join(folder, CLIENT_CERTIFICATE_FILE)),
    key: await requireBytes(join(folder, CLIENT_KEY_FILE)),
  };
}

interface Loaded {
  readonly credentials: TlsCredentials;
  readonly access: Access;
}

async function load(plan: TlsPlan): Promise<Loaded> {
  const { certificates, keys, verifyPeer, access, rules } = plan;
  // Rules have no use for a client's name that nobody has checked.
  const asksClients =
    certificates !== undefined && (verifyPeer || access !== undefined || rules !== undefined);
  const credentials: TlsCredentials = {
    clientCertificates: asksClients ? (verifyPeer ? 'required' : 'optional') : 'none',
    ...(certificates !== undefined && {
      certificates: await readCertificates(certificates, asksClients),
    }),
    ...(keys !== undefined && {
      keys: parseKeys((await requireBytes(keys)).toString('utf8'), keys),
    }),
  };
  if (rules !== undefined) {
    return { credentials, access: parseAccessRules(rules) };
  }
  if (access === undefined) {
    return { credentials, access: () => true };
  }
  try {
    return { credentials, access: parseAccessRules((await requireBytes(access)).toString('utf8')) };
  } catch (cause) {
    if (cause instanceof AccessRulesError) {
      throw badFile(access, cause.message, 'see docs/tls.md for how to write rules', cause);
    }
    throw cause;
  }
}

/** Makes something of credentials, and of what is wrong with them an error for the user. */
function using<T>(plan: TlsPlan, act: () => T): T {
  try {
    return act();
  } catch (cause) {
    const message = cause instanceof Error ? cause.message : String(cause);
    throw badFile(
      plan.certificates ?? plan.keys ?? '',
      message,
      'see docs/tls.md for how to make these files',
      cause,
    );
  }
}

/** Tells what became of reading certificates and keys anew. */
export function reportReload(error: StillblockError | undefined, json: boolean): void {
  if (error === undefined) {
    if (json) {
      printJson({ event: 'tls-reloaded' });
    } else {
      stderr.write('stillblock: certificates, keys and rules have been read anew\n');
    }
    return;
  }
  stderr.write(errorLine(error));
  stderr.write('stillblock: those read before stay in use\n');
  if (json) {
    const { code, message, advice } = error;
    printJson({ event: 'tls-reload-failed', reason: code, message, advice });
  }
}

/** TLS and rules of one server, from files that may change. */
export class Security {
  readonly #plan: TlsPlan;
  readonly #tls: TlsAcceptor;
  #certificates: TlsCredentials['certificates'];
  #access: Access;

  private constructor(plan: TlsPlan, tls: TlsAcceptor, { credentials, access }: Loaded) {
    this.#plan = plan;
    this.#tls = tls;
    this.#certificates = credentials.certificates;
    this.#access = access;
  }

  /**
   * Reads the files. Without TLS there is nothing to be read, and no security.
   *
   * @param engine `typescript` has Node's own TLS; else it is the addon's, if there is one
   * @throws StillblockError that names the file
   */
  static async open(plan: TlsPlan, engine?: EngineChoice): Promise<Security | undefined> {
    if (plan.mode === 'off') {
      return undefined;
    }
    const loaded = await load(plan);
    const make = engine === 'typescript' ? undefined : await nativeTls();
    const tls = using(plan, () => make?.(loaded.credentials) ?? new NodeTls(loaded.credentials));
    return new Security(plan, tls, loaded);
  }

  /** What a server needs of it. */
  get options(): { readonly security: SecurityOptions; readonly access: Access } {
    const mode = this.#plan.mode === 'on' ? 'on' : 'require';
    return {
      security: { tls: this.#tls, mode },
      access: (client, name) => this.#access(client, name),
    };
  }

  /**
   * Reads the files anew. Connections that are there stay as they are.
   *
   * @throws StillblockError that names the file; all of them then stay as they were
   */
  async reload(): Promise<void> {
    const { credentials, access } = await load(this.#plan);
    using(this.#plan, () => this.#tls.replace(credentials));
    this.#certificates = credentials.certificates;
    this.#access = access;
  }

  /** Warns if clients that come by these URIs will find that the certificate is not for them. */
  checkNames(uris: readonly string[], logger: Logger): void {
    const { certificate } = this.#certificates ?? {};
    const hosts = uris.filter((uri) => uri.startsWith('nbds://')).map(hostOf);
    if (certificate === undefined || hosts.length === 0) {
      return;
    }
    const found = new X509Certificate(certificate);
    const named = hosts.some(
      (host) => (isIP(host) === 0 ? found.checkHost(host) : found.checkIP(host)) !== undefined,
    );
    if (!named) {
      logger.warn(
        { hosts: [...new Set(hosts)], names: found.subjectAltName },
        'the certificate names no address of these: clients that come by them refuse it',
      );
    }
  }

  /**
   * Reloads at each SIGHUP, one after the other.
   *
   * @returns ends it
   */
  reloadOnHangUp(done: (error: StillblockError | undefined) => void): () => void {
    let last = Promise.resolve();
    const onHangUp = (): void => {
      last = last
        .then(() => this.reload())
        .then(
          () => done(undefined),
          (error: unknown) => done(asError(error)),
        );
    };
    process.on('SIGHUP', onHangUp);
    return () => {
      process.off('SIGHUP', onHangUp);
    };
  }
}

/** The host of an `nbds://` URI, without the brackets of IPv6. */
function hostOf(uri: string): string {
  return new URL(uri).hostname.replace(/^\[|\]$/g, '');
}

function asError(error: unknown): StillblockError {
  return error instanceof StillblockError
    ? error
    : new StillblockError('FAILED', String(error), 'this is a mistake of ours: please report it');
}
