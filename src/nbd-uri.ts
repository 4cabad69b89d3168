// SPDX-License-Identifier: Apache-2.0
/**
 * NBD URIs, as the specification's doc/uri.md has them, and what QEMU's block driver wants
 * instead: it knows no `nbds://`.
 */
import { join } from 'node:path';
import { NBD_DEFAULT_PORT } from '../nbd/constants.ts';
import { usageError } from './errors.ts';

/** An export on a server. */
export interface NbdUri {
  readonly place:
    | { readonly kind: 'tcp'; readonly host: string; readonly port: number }
    | { readonly kind: 'unix'; readonly socket: string };
  readonly tls: boolean;
  readonly exportName: string;
}

function bad(text: string, what: string): Error {
  return usageError(
    `${JSON.stringify(text)} is no NBD URI: ${what}`,
    'write nbd://HOST[:PORT]/EXPORT, nbds://… or nbd+unix:///EXPORT?socket=PATH',
  );
}

/**
 * Reads a URI.
 *
 * @throws StillblockError about usage
 */
export function parseNbdUri(text: string): NbdUri {
  const scheme = /^(nbds?)(\+unix)?:\/\//.exec(text);
  if (scheme === null || !URL.canParse(text)) {
    throw bad(text, 'its scheme is none of nbd, nbds, nbd+unix, nbds+unix');
  }
  const url = new URL(text);
  let exportName: string;
  try {
    exportName = decodeURIComponent(url.pathname.replace(/^\//, ''));
  } catch {
    throw bad(text, 'a % in it stands for nothing');
  }
  const tls = scheme[1] === 'nbds';
  const socket = url.searchParams.get('socket');
  if (scheme[2] !== undefined) {
    if (socket === null || socket === '') {
      throw bad(text, 'it names no socket');
    }
    return { place: { kind: 'unix', socket }, tls, exportName };
  }
  const host = decodeURIComponent(url.hostname).replace(/^\[(.*)\]$/, '$1');
  if (host === '') {
    throw bad(text, 'it names no host');
  }
  const port = url.port === '' ? NBD_DEFAULT_PORT : Number(url.port);
  return { place: { kind: 'tcp', host, port }, tls, exportName };
}

/** Writes a URI, such as for people and for libnbd. */
export function formatNbdUri({ place, tls, exportName }: NbdUri): string {
  const scheme = tls ? 'nbds' : 'nbd';
  const name = encodeURIComponent(exportName).replaceAll('%40', '@');
  if (place.kind === 'unix') {
    return `${scheme}+unix:///${name}?socket=${encodeURIComponent(place.socket).replaceAll('%2F', '/')}`;
  }
  const host = place.host.includes(':') ? `[${place.host}]` : place.host;
  return `${scheme}://${host}:${place.port}/${name}`;
}

/** The folder of certificates in nbdkit's and QEMU's names: `ca-cert.pem`, `client-cert.pem`, `client-key.pem`. */
export type CertificateFolder = string | undefined;

/** A value in QEMU's comma-separated options. */
export function qemuValue(text: string): string {
  return text.replaceAll(',', ',,');
}

const TLS_ID = 'tls0';

/** What makes QEMU's tools offer certificates, before the options that need them. */
export function qemuTlsObject(uri: NbdUri, certificates: CertificateFolder): string[] {
  if (!uri.tls) {
    return [];
  }
  if (certificates === undefined) {
    throw usageError(
      `${formatNbdUri(uri)} is encrypted, and there are no certificates for it`,
      'name their folder with --tls-certificates',
    );
  }
  const folder = qemuValue(join(certificates));
  return ['--object', `tls-creds-x509,id=${TLS_ID},dir=${folder},endpoint=client`];
}

/** An export as QEMU's --image-opts. */
export function qemuImageOptions({ place, tls, exportName }: NbdUri): string {
  const server =
    place.kind === 'unix'
      ? `server.type=unix,server.path=${qemuValue(place.socket)}`
      : `server.type=inet,server.host=${qemuValue(place.host)},server.port=${place.port},server.keep-alive=on`;
  const security = tls ? `,tls-creds=${TLS_ID}` : '';
  return `driver=nbd,${server},export=${qemuValue(exportName)}${security}`;
}
