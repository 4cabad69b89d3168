// SPDX-License-Identifier: Apache-2.0
/** Where commands on the proxy's side get a server's disks: from its daemon, or as they are served. */
import { readFile } from 'node:fs/promises';
import { resolve } from 'node:path';
import type { Command } from 'commander';
import { type DaemonAddress, remoteApi } from '../api-client.ts';
import { requireCheckpointName } from '../checkpoints.ts';
import { explain, StillblockError, usageError } from '../errors.ts';
import { HostSource } from '../host-source.ts';
import type { MachineLayout } from '../layout.ts';
import { NbdSource, parseNamedUri } from '../nbd-source.ts';
import type { CertificateFolder } from '../nbd-uri.ts';
import type { PullSource } from '../offer.ts';
import { readClientCertificates } from '../tls.ts';
import { collect, newCommand } from './common.ts';

/** A command that gets a server's disks, with HOST and the options of {@link SourceOptions}. */
export function newSourceCommand(name: string, summary: string): Command {
  return newCommand(name, summary)
    .argument('[HOST]', 'its daemon: HOST[:PORT], or the path of its socket')
    .option('--disk <NAME>', 'with HOST: a disk of it, repeatable (default: all)', collect)
    .option(
      '--store <PLACE>',
      'with HOST: where old data goes there (default: it chooses)',
      collect,
    )
    .option('--nbd-host <NAME>', 'with HOST: by which name its NBD server is reached')
    .option('--nbd <[DISK=]URI>', 'a disk that is served already, repeatable', collect)
    .option('--layout <FILE>', 'with --nbd: what stillblock layout --json says there')
    .option('--tls-certificates <DIR>', 'ca-cert.pem, client-cert.pem and client-key.pem');
}

/** The options that say where disks come from. */
export interface SourceOptions {
  readonly nbd?: readonly string[];
  readonly layout?: string;
  readonly disk?: readonly string[];
  readonly store?: readonly string[];
  readonly nbdHost?: string;
  readonly tlsCertificates?: string;
}

async function readLayout(path: string): Promise<MachineLayout> {
  try {
    return JSON.parse(await readFile(path, 'utf8')) as MachineLayout;
  } catch (error) {
    if (error instanceof SyntaxError) {
      throw new StillblockError(
        'BAD_LAYOUT',
        `${path} is no JSON`,
        'write it with stillblock layout --json on the server',
        { cause: error },
      );
    }
    throw explain(error, path);
  }
}

export function certificatesOf({ tlsCertificates }: SourceOptions): CertificateFolder {
  return tlsCertificates === undefined ? undefined : resolve(tlsCertificates);
}

/** Names that sort by time. */
export function newCheckpointName(kind: 'pull' | 'p2v', now: Date): string {
  return `${kind}-${now.toISOString().slice(0, 19).replaceAll(/[-:]/g, '').replace('T', '-')}`;
}

/** Disks that somebody serves already. */
export async function nbdSource(
  checkpoint: string,
  options: SourceOptions,
  stallMs: number,
): Promise<PullSource> {
  const disks = (options.nbd ?? []).map(parseNamedUri);
  const twice = disks.find(({ name }, index) => disks.findIndex((d) => d.name === name) !== index);
  if (twice !== undefined) {
    throw usageError(`disk ${twice.name} is given twice`, 'name them apart: --nbd NAME=URI');
  }
  const layout = options.layout === undefined ? null : await readLayout(options.layout);
  const certificates = certificatesOf(options);
  return new NbdSource(requireCheckpointName(checkpoint), disks, layout, { certificates, stallMs });
}

/** Where daemons are that are asked over the network, as the example configuration has it. */
const API_PORT = 10_810;

/** Reads `HOST[:PORT]` or the path of a socket. */
async function daemonAddress(host: string, options: SourceOptions): Promise<DaemonAddress> {
  if (host.includes('/')) {
    return { socketPath: resolve(host) };
  }
  const [, bracketed, plain, port] =
    /^(?:\[([0-9A-Fa-f:.]+)\]|([^:[\]]+))(?::(\d{1,5}))?$/.exec(host) ?? [];
  const name = bracketed ?? plain;
  if (name === undefined) {
    throw usageError(
      `${JSON.stringify(host)} is neither HOST[:PORT] nor the path of a socket`,
      'write web1, web1:10810, [2001:db8::1]:10810 or /run/stillblock/control.sock',
    );
  }
  const certificates = certificatesOf(options);
  if (certificates === undefined) {
    throw usageError(
      `${host} asks who we are`,
      'name the folder of our certificate with --tls-certificates, or forward its socket by ssh -L',
    );
  }
  const tls = await readClientCertificates(certificates);
  return { host: name, port: port === undefined ? API_PORT : Number(port), tls };
}

/** Disks of a server whose daemon takes a snapshot for it. */
export async function hostSource(
  host: string,
  checkpoint: string,
  options: SourceOptions,
  stallMs: number,
): Promise<PullSource> {
  const request = {
    checkpoint: requireCheckpointName(checkpoint),
    disks: options.disk ?? [],
    store: options.store ?? [],
    certificates: certificatesOf(options),
    stallMs,
  };
  const address = await daemonAddress(host, options);
  const name = 'host' in address ? address.host : undefined;
  const names = { host: name, nbdHost: options.nbdHost };
  return new HostSource(remoteApi(address), { ...request, ...names });
}
