// SPDX-License-Identifier: Apache-2.0
/** Where to listen, as nbdkit's flags say it, and what to do when that fails. */
import { NBD_DEFAULT_PORT } from '../nbd/constants.ts';
import { errorCode } from '../nbd/errors.ts';
import type { InheritedSocket, ListenAddress } from '../nbd/server.ts';
import type { NamedSocket } from './activation.ts';
import { EXIT, StillblockError, usageError } from './errors.ts';

export const DEFAULT_HOST = '127.0.0.1';

/** The flags as commander hands them over. */
export interface ListenOptions {
  readonly port?: string;
  readonly ipAddr?: readonly string[];
  readonly unix?: string;
}

function planPort(port: string | undefined): number {
  if (port === undefined) {
    return NBD_DEFAULT_PORT;
  }
  const value = Number(port);
  if (!/^[0-9]{1,5}$/.test(port) || value > 65_535) {
    throw usageError(
      `--port ${JSON.stringify(port)} is no port`,
      'give a number up to 65535, or 0 for any free one',
    );
  }
  return value;
}

/**
 * The addresses that the flags ask for: TCP unless there is only a unix socket. With inherited
 * sockets it is these, and no flags.
 *
 * @throws StillblockError with one line that says what to change
 */
export function planAddresses(
  options: ListenOptions,
  inherited: readonly NamedSocket[] = [],
): (ListenAddress | InheritedSocket)[] {
  if (inherited.length > 0) {
    if (options.unix !== undefined || options.port !== undefined || options.ipAddr !== undefined) {
      throw usageError(
        'sockets have been inherited (LISTEN_FDS)',
        'leave --port, --ip-addr and --unix out',
      );
    }
    return [...inherited];
  }
  const addresses: ListenAddress[] = [];
  if (options.unix !== undefined) {
    if (options.unix === '') {
      throw usageError('--unix is empty', 'give the path of the socket to make');
    }
    addresses.push({ path: options.unix });
  }
  if (options.unix === undefined || options.port !== undefined || options.ipAddr !== undefined) {
    const port = planPort(options.port);
    const hosts = new Set(options.ipAddr ?? [DEFAULT_HOST]);
    if (hosts.has('')) {
      throw usageError('--ip-addr is empty', 'give an address, such as 0.0.0.0 for all of IPv4');
    }
    if (port === 0 && hosts.size > 1) {
      throw usageError('--port 0 finds a port for one --ip-addr only', 'name a port');
    }
    addresses.push(...[...hosts].map((host) => ({ host, port })));
  }
  return addresses;
}

function wordsForSocket(code: string | undefined, path: string): [string, string] | undefined {
  switch (code) {
    case 'EADDRINUSE':
      return [`another server listens on ${path}`, 'stop it, or choose another path with --unix'];
    case 'EEXIST':
      return [
        `${path} exists and is not a socket`,
        'remove it, or choose another path with --unix',
      ];
    case 'ENOENT':
    case 'ENOTDIR':
      return [`the folder of ${path} does not exist`, 'make it, or choose another with --unix'];
    case 'EACCES':
    case 'EPERM':
      return [`no permission to make the socket ${path}`, 'choose another path with --unix'];
    case 'ENAMETOOLONG':
      return [`the path of the socket ${path} is too long`, 'choose one of at most 107 bytes'];
    default:
      return undefined;
  }
}

function wordsForTcp(
  code: string | undefined,
  host: string,
  port: number,
): [string, string] | undefined {
  switch (code) {
    case 'EADDRINUSE':
      return [
        `port ${port} on ${host} is in use`,
        'stop its server, or choose another with --port',
      ];
    case 'EACCES':
      return [`no permission for port ${port}`, 'choose one above 1023 with --port'];
    case 'EADDRNOTAVAIL':
    case 'EAFNOSUPPORT':
      return [`${host} is not an address of this machine`, 'choose one of its own with --ip-addr'];
    case 'ENOTFOUND':
    case 'EAI_AGAIN':
      return [`no address is known for the name ${host}`, 'give a number with --ip-addr'];
    default:
      return undefined;
  }
}

/** Translates why `NbdServer.listen` failed. */
export function explainListen(
  address: ListenAddress | InheritedSocket,
  error: unknown,
): StillblockError {
  const code = errorCode(error);
  const reason = error instanceof Error ? error.message : String(error);
  if (code === 'TLS_REQUIRED') {
    return new StillblockError(
      code,
      reason,
      'add --tls-certificates or --tls-psk (docs/tls.md), or --insecure to do without',
      { exitCode: EXIT.usage, cause: error },
    );
  }
  if ('descriptor' in address) {
    return new StillblockError(code ?? 'FAILED', reason, 'have the socket unit checked', {
      cause: error,
    });
  }
  const words =
    'path' in address
      ? wordsForSocket(code, address.path)
      : wordsForTcp(code, address.host, address.port);
  const [message, advice] = words ?? [
    reason,
    'choose another address with --ip-addr, --port or --unix',
  ];
  return new StillblockError(code ?? 'FAILED', message, advice, { cause: error });
}
