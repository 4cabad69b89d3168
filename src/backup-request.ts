// SPDX-License-Identifier: Apache-2.0
/** What clients ask for in a begin, JSON or libvirt's XML, made a request that is whole. */
import { randomUUID } from 'node:crypto';
import { stat } from 'node:fs/promises';
import { dirname, isAbsolute } from 'node:path';
import type { InheritedSocket, ListenAddress } from '../nbd/server.ts';
import type { ServerRequest } from './backup-server.ts';
import {
  type BackupDisk,
  type BackupXml,
  type CheckpointXml,
  formatBackupXml,
  formatCheckpointXml,
  parseBackupXml,
  parseCheckpointXml,
} from './backup-xml.ts';
import type { DiskRequest } from './disks.ts';
import { usageError } from './errors.ts';
import { DEFAULT_HOST } from './listen.ts';
import type { BackupRequest, XmlEcho } from './snapshot-session.ts';
import type { StoreRequest } from './store.ts';
import type { TlsPlan } from './tls.ts';

/** The body of a begin. */
export interface BeginBody {
  /** UUID of this backup and its checkpoint; made up if absent. */
  readonly id?: string;
  /** Name of this instant; with XML that of `checkpointXml`, or made up. */
  readonly checkpoint?: string;
  readonly description?: string | undefined;
  readonly store?: {
    readonly places: readonly string[];
    readonly sizeBytes?: number | undefined;
    readonly maxBytes?: number | undefined;
  };
  readonly disks?: readonly { readonly name?: string | undefined; readonly path: string }[];
  readonly server?: {
    /** A descriptor only within one process. */
    readonly listen: readonly (ListenAddress | InheritedSocket)[];
    readonly tls?: Partial<TlsPlan>;
  };
  readonly maxRates?: readonly string[];
  readonly metrics?: ListenAddress;
  readonly incremental?: string | undefined;
  readonly freezeTimeoutMs?: number;
  /** A `<domainbackup>`. */
  readonly backupXml?: string;
  /** A `<domaincheckpoint>`. */
  readonly checkpointXml?: string;
}

function requireAbsolute(path: string): string {
  if (!isAbsolute(path)) {
    throw usageError(
      `${JSON.stringify(path)} is no absolute path`,
      'the daemon works in another folder: name it from / on',
    );
  }
  return path;
}

function toServerRequest({ listen, tls }: NonNullable<BeginBody['server']>): ServerRequest {
  for (const address of listen) {
    if ('path' in address) {
      requireAbsolute(address.path);
    }
  }
  if (listen.length === 0) {
    throw usageError('the server listens nowhere', 'name an address, or leave the server out');
  }
  if (tls === undefined) {
    return { listen, tls: undefined };
  }
  const { mode = 'off', certificates, keys, verifyPeer = false, access, insecure = false } = tls;
  return { listen, tls: { mode, certificates, keys, verifyPeer, access, insecure } };
}

function toStoreRequest({ places, ...sizes }: NonNullable<BeginBody['store']>): StoreRequest {
  for (const place of places) {
    if (place !== 'memory') {
      requireAbsolute(place);
    }
  }
  if (places.length === 0) {
    throw usageError('the store has no place', 'name one, or leave the store out');
  }
  return { places, sizeBytes: sizes.sizeBytes, maxBytes: sizes.maxBytes };
}

/** What XML says goes before what the rest of the body says, and must not contradict it. */
const SAID_BY_XML = ['disks', 'incremental', 'server'] as const;

function serverOf(server: BackupXml['server']): ServerRequest | undefined {
  if (server === undefined) {
    return undefined;
  }
  const address =
    server.transport === 'unix'
      ? { path: server.socket }
      : { host: server.host ?? DEFAULT_HOST, port: server.port };
  return { listen: [address], tls: server.tls };
}

/** libvirt makes the scratch file itself: one that is not there yet goes into its folder. */
async function placeOf(scratch: NonNullable<BackupDisk['scratch']>): Promise<string> {
  const found = await stat(scratch.path).catch(() => undefined);
  return found === undefined && scratch.kind === 'file' ? dirname(scratch.path) : scratch.path;
}

async function storeOf(disks: BackupXml['disks']): Promise<StoreRequest | undefined> {
  const places = new Set<string>();
  for (const { scratch } of disks ?? []) {
    if (scratch !== undefined) {
      places.add(await placeOf(scratch));
    }
  }
  return places.size === 0
    ? undefined
    : { places: [...places], sizeBytes: undefined, maxBytes: undefined };
}

function disksOf(xml: BackupXml): DiskRequest[] {
  return (xml.disks ?? [])
    .filter(({ backup }) => backup)
    .map(({ name, exportName, exportBitmap, incremental }) => ({
      name: undefined,
      path: name,
      exportName,
      exportBitmap,
      incremental: incremental ?? null,
    }));
}

/** libvirt's XML of what has come of a request. */
function echoOf(xml: BackupXml | undefined, checkpoint: CheckpointXml | undefined): XmlEcho {
  return {
    ...(xml === undefined
      ? {}
      : { backup: (resolved) => formatBackupXml({ ...resolved, server: xml.server }) }),
    ...(checkpoint === undefined
      ? {}
      : { checkpoint: (resolved) => formatCheckpointXml(resolved) }),
    warnings: [...(xml?.warnings ?? []), ...(checkpoint?.warnings ?? [])],
  };
}

/** As libvirt names what has no name: by the time. */
function madeUpName(): string {
  return String(Math.floor(Date.now() / 1000));
}

function checkpointDisks(checkpoint: CheckpointXml | undefined): readonly string[] | undefined {
  return checkpoint?.disks?.filter((disk) => disk.checkpoint).map(({ name }) => name);
}

/**
 * Makes a request of the body of a begin.
 *
 * @throws StillblockError that says what is wrong with it
 */
export async function toBackupRequest(body: BeginBody): Promise<BackupRequest> {
  const xml = body.backupXml === undefined ? undefined : parseBackupXml(body.backupXml);
  const checkpoint =
    body.checkpointXml === undefined ? undefined : parseCheckpointXml(body.checkpointXml);
  const twice = SAID_BY_XML.find((name) => body[name] !== undefined);
  if (xml !== undefined && twice !== undefined) {
    throw usageError(`backupXml and ${twice} both say which`, `leave ${twice} out`);
  }
  if (checkpoint !== undefined && body.checkpoint !== undefined) {
    throw usageError('checkpointXml and checkpoint both give a name', 'leave one of them out');
  }
  const name = body.checkpoint ?? checkpoint?.name;
  if (name === undefined && xml === undefined && checkpoint === undefined) {
    throw usageError('the checkpoint has no name', 'give it one');
  }
  const { server, store, disks = [], metrics } = body;
  return {
    id: body.id ?? randomUUID(),
    checkpoint: name ?? madeUpName(),
    // libvirt's backup without a checkpoint leaves none.
    kept: name !== undefined || checkpoint !== undefined,
    description: body.description ?? checkpoint?.description ?? '',
    store: store === undefined ? await storeOf(xml?.disks) : toStoreRequest(store),
    disks:
      xml === undefined
        ? disks.map(({ name: called, path }) => ({ name: called, path }))
        : disksOf(xml),
    checkpointDisks: checkpointDisks(checkpoint),
    server: server === undefined ? serverOf(xml?.server) : toServerRequest(server),
    maxRates: body.maxRates ?? [],
    metrics,
    incremental: body.incremental ?? (xml?.disks === undefined ? xml?.incremental : undefined),
    freezeTimeoutMs: body.freezeTimeoutMs,
    echo: echoOf(xml, checkpoint),
  };
}
