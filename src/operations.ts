// SPDX-License-Identifier: Apache-2.0
/**
 * The control API: each operation with its route, what it takes and what it answers. The
 * server's routes, the OpenAPI description and the client are all made of this table.
 */
import type { BackupDescription, BackupEnded, DiskChanges } from './backup-report.ts';
import { type BeginBody, toBackupRequest } from './backup-request.ts';
import {
  type CheckpointDetails,
  type CheckpointReport,
  toCheckpointReport,
} from './checkpoint-report.ts';
import { type BrokenCheckpoint, UUID } from './checkpoints.ts';
import type { Daemon, DaemonStatus } from './daemon.ts';
import type { DeviceReport, MarkedRange } from './devices.ts';
import { collectLayout, type MachineLayout } from './layout.ts';

/** A JSON Schema, as OpenAPI 3.1 takes it. */
export type Schema = Readonly<Record<string, unknown>>;

/** What a request brings. */
export interface Input {
  readonly params?: Readonly<Record<string, string>>;
  readonly query?: Readonly<Record<string, string>>;
  readonly body?: unknown;
}

export interface Operation<In extends Input, Out> {
  /** As in OpenAPI's `operationId`. */
  readonly id: string;
  readonly method: 'GET' | 'POST' | 'DELETE';
  /** With parameters as `{name}`. */
  readonly path: string;
  readonly tag: string;
  readonly summary: string;
  readonly query?: Readonly<Record<string, string>>;
  readonly body?: Schema;
  /** Makes the body of a document, where XML will do as well. */
  xml?(input: Input, document: string): unknown;
  readonly status: number;
  readonly answer: Schema;
  /** @param signal aborted when nobody waits for the answer any more */
  run(daemon: Daemon, input: In, signal: AbortSignal): Promise<Out> | Out;
}

const text = { type: 'string', minLength: 1, maxLength: 4096 } as const;
const xml = { type: 'string', minLength: 1, maxLength: 256 * 1024 } as const;
const bytes = { type: 'integer', minimum: 0, maximum: Number.MAX_SAFE_INTEGER } as const;
const list = (items: Schema, maxItems = 256): Schema => ({ type: 'array', items, maxItems });
const object = (properties: Schema, required: readonly string[] = []): Schema => ({
  type: 'object',
  properties,
  required,
  additionalProperties: false,
});
/** What is answered may grow; clients ignore what they do not know. */
const answer = (properties: Schema): Schema => ({
  type: 'object',
  properties,
  required: Object.keys(properties),
});
const named = (name: string): Schema => ({ $ref: `#/components/schemas/${name}` });

const LISTEN: Schema = {
  oneOf: [
    object({ host: text, port: { type: 'integer', minimum: 0, maximum: 65_535 } }, [
      'host',
      'port',
    ]),
    object({ path: text }, ['path']),
  ],
};

const TLS: Schema = object(
  {
    mode: { enum: ['off', 'on', 'require'] },
    certificates: { ...text, description: 'folder' },
    keys: { ...text, description: 'file of pre-shared keys' },
    verifyPeer: { type: 'boolean' },
    access: { ...text, description: 'file of rules' },
    insecure: { type: 'boolean' },
  },
  ['mode'],
);

/** Of a name or of `checkpointXml` there must be one, and one may be made up with `backupXml`. */
const BEGIN: Schema = object({
  id: {
    type: 'string',
    pattern: UUID.source,
    description: 'UUID to know this backup and its checkpoint by, before its begin is answered',
  },
  checkpoint: { ...text, description: 'name of this instant' },
  description: { type: 'string', maxLength: 4096 },
  store: object(
    {
      places: { ...list(text), description: 'folders, files, block devices, or memory' },
      sizeBytes: { ...bytes, description: 'of each, to begin with' },
      maxBytes: { ...bytes, description: 'of each, to grow to' },
    },
    ['places'],
  ),
  disks: {
    ...list(object({ name: text, path: text }, ['path'])),
    description: 'tracked devices by path or name; all if absent',
  },
  server: {
    ...object({ listen: list(LISTEN, 64), tls: TLS }, ['listen']),
    description: "a server for this backup; absent: the daemon's own",
  },
  maxRates: { ...list(text), description: 'RATE and DISK=RATE, bytes per second' },
  metrics: { ...LISTEN, description: 'serve Prometheus metrics of this backup there' },
  incremental: { ...text, description: 'fail unless all changes since are known' },
  freezeTimeoutMs: { type: 'integer', minimum: 1, maximum: 60_000 },
  backupXml: { ...xml, description: "libvirt's <domainbackup>, for disks, server and store" },
  checkpointXml: { ...xml, description: "libvirt's <domaincheckpoint>" },
});

type Named = { readonly params: { readonly name: string } };

export const getStatus: Operation<Input, DaemonStatus> = {
  id: 'getStatus',
  method: 'GET',
  path: '/v1/status',
  tag: 'daemon',
  summary: 'The module, the daemon, and the backups that run',
  status: 200,
  answer: named('Status'),
  run: (daemon) => daemon.status(),
};

export const getLayout: Operation<Input, MachineLayout> = {
  id: 'getLayout',
  method: 'GET',
  path: '/v1/layout',
  tag: 'devices',
  summary: 'How the tracked devices are laid out, for who restores them to empty disks',
  status: 200,
  answer: named('Layout'),
  run: async (daemon) => collectLayout((await daemon.devices()).map(({ device }) => device)),
};

export const listDevices: Operation<Input, { devices: readonly DeviceReport[] }> = {
  id: 'listDevices',
  method: 'GET',
  path: '/v1/devices',
  tag: 'devices',
  summary: 'All tracked devices',
  status: 200,
  answer: answer({ devices: list(named('Device')) }),
  run: async (daemon) => ({ devices: await daemon.devices() }),
};

export const attachDevices: Operation<
  { readonly body: { readonly devices: readonly string[]; readonly blockSizeBytes?: number } },
  { devices: readonly DeviceReport[] }
> = {
  id: 'attachDevices',
  method: 'POST',
  path: '/v1/devices',
  tag: 'devices',
  summary: 'Tracks devices from now on: all of them or, if one cannot be, none',
  body: object({ devices: { ...list(text), minItems: 1 }, blockSizeBytes: bytes }, ['devices']),
  status: 201,
  answer: answer({ devices: list(named('Device')) }),
  run: async (daemon, { body }) => ({
    devices: await daemon.attach(body.devices, body.blockSizeBytes ?? 0),
  }),
};

export const detachDevices: Operation<
  { readonly body: { readonly devices: readonly string[] } },
  { devices: readonly DeviceReport[] }
> = {
  id: 'detachDevices',
  method: 'POST',
  path: '/v1/devices/detach',
  tag: 'devices',
  summary: 'Ends the tracking of devices, by path or name, and with it their change history',
  body: object({ devices: { ...list(text), minItems: 1 } }, ['devices']),
  status: 200,
  answer: answer({ devices: list(named('Device')) }),
  run: async (daemon, { body }) => ({ devices: await daemon.detach(body.devices) }),
};

export const getDevice: Operation<Named, DeviceReport> = {
  id: 'getDevice',
  method: 'GET',
  path: '/v1/devices/{name}',
  tag: 'devices',
  summary: 'A tracked device, by name or path',
  status: 200,
  answer: named('Device'),
  run: (daemon, { params }) => daemon.device(params.name),
};

export const markDevice: Operation<
  Named & { readonly body: { readonly offset?: number; readonly length?: number } },
  MarkedRange
> = {
  id: 'markDevice',
  method: 'POST',
  path: '/v1/devices/{name}/mark',
  tag: 'devices',
  summary: 'Calls a range of a device changed, by default all of it',
  body: object({ offset: bytes, length: { ...bytes, minimum: 1 } }),
  status: 200,
  answer: answer({ device: text, offset: bytes, length: bytes }),
  run: (daemon, { params, body }) => daemon.mark(params.name, body.offset ?? 0, body.length),
};

export const listBackups: Operation<Input, { backups: readonly BackupDescription[] }> = {
  id: 'listBackups',
  method: 'GET',
  path: '/v1/backups',
  tag: 'backups',
  summary: 'The backups that run: their snapshots, disks and exports',
  status: 200,
  answer: answer({ backups: list(named('Backup')) }),
  run: (daemon) => ({ backups: daemon.backups() }),
};

export const beginBackup: Operation<{ readonly body: BeginBody }, BackupDescription> = {
  id: 'beginBackup',
  method: 'POST',
  path: '/v1/backups',
  tag: 'backups',
  summary: 'Takes a snapshot and serves it until it is ended; answered when it is served',
  query: { checkpoint: 'with a body of XML: name of this instant; without, none is kept' },
  body: BEGIN,
  status: 201,
  answer: named('Backup'),
  xml: ({ query }, document) => ({
    backupXml: document,
    ...(query?.['checkpoint'] === undefined ? {} : { checkpoint: query['checkpoint'] }),
  }),
  run: async (daemon, { body }, signal) => daemon.beginBackup(await toBackupRequest(body), signal),
};

export const makeCheckpoint: Operation<
  {
    readonly body:
      | { readonly xml: string }
      | { readonly name: string; readonly description?: string };
  },
  CheckpointDetails
> = {
  id: 'makeCheckpoint',
  method: 'POST',
  path: '/v1/checkpoints',
  tag: 'checkpoints',
  summary: 'Makes a checkpoint alone: an instant of the disks, with no image of it',
  body: {
    oneOf: [
      object({ xml: { ...xml, description: "libvirt's <domaincheckpoint>" } }, ['xml']),
      object({ name: text, description: { type: 'string', maxLength: 4096 } }, ['name']),
    ],
  },
  xml: (_input, document) => ({ xml: document }),
  status: 201,
  answer: named('CheckpointDetails'),
  run: async (daemon, { body }, signal) => {
    const request = await toBackupRequest(
      'xml' in body
        ? { checkpointXml: body.xml }
        : {
            checkpoint: body.name,
            ...(body.description === undefined ? {} : { description: body.description }),
          },
    );
    return daemon.makeCheckpoint(request, signal);
  },
};

export const getBackup: Operation<Named, BackupDescription> = {
  id: 'getBackup',
  method: 'GET',
  path: '/v1/backups/{name}',
  tag: 'backups',
  summary: 'A backup that runs, by the name of its checkpoint',
  status: 200,
  answer: named('Backup'),
  run: (daemon, { params }) => daemon.backup(params.name),
};

export const endBackup: Operation<
  Named & { readonly query?: { readonly id?: string } },
  BackupEnded
> = {
  id: 'endBackup',
  method: 'DELETE',
  path: '/v1/backups/{name}',
  tag: 'backups',
  summary: 'Ends a backup; answered when all of it is released. The checkpoint stays',
  query: { id: 'ends it only if it is this one: names come again' },
  status: 200,
  answer: { ...answer({ checkpoint: text, failed: { type: 'boolean' } }) },
  run: (daemon, { params, query }) => daemon.endBackup(params.name, query?.id),
};

export const getChanges: Operation<
  {
    readonly params: { readonly name: string; readonly disk: string };
    readonly query?: { readonly since?: string };
  },
  DiskChanges
> = {
  id: 'getChanges',
  method: 'GET',
  path: '/v1/backups/{name}/changes/{disk}',
  tag: 'backups',
  summary: 'What changed on a disk between a checkpoint and the snapshot',
  query: { since: 'name of the checkpoint; the latest that will do if absent' },
  status: 200,
  answer: named('Changes'),
  run: (daemon, { params, query }) => daemon.changes(params.name, params.disk, query?.since),
};

export const listExports: Operation<Input, { exports: BackupDescription['exports'] }> = {
  id: 'listExports',
  method: 'GET',
  path: '/v1/exports',
  tag: 'backups',
  summary: 'All exports that are served',
  status: 200,
  answer: answer({ exports: list(named('Export')) }),
  run: (daemon) => ({ exports: daemon.backups().flatMap(({ exports }) => exports) }),
};

export const listCheckpoints: Operation<
  Input,
  { checkpoints: readonly CheckpointReport[]; broken: readonly BrokenCheckpoint[] }
> = {
  id: 'listCheckpoints',
  method: 'GET',
  path: '/v1/checkpoints',
  tag: 'checkpoints',
  summary: 'The checkpoints, oldest first, and the files among them that are none',
  status: 200,
  answer: answer({
    checkpoints: list(named('Checkpoint')),
    broken: list(answer({ name: text, problem: text })),
  }),
  run: async (daemon) => {
    const { checkpoints, broken } = await daemon.listCheckpoints();
    return { checkpoints: checkpoints.map(toCheckpointReport), broken };
  },
};

export const getCheckpoint: Operation<Named, CheckpointDetails> = {
  id: 'getCheckpoint',
  method: 'GET',
  path: '/v1/checkpoints/{name}',
  tag: 'checkpoints',
  summary: 'A checkpoint, and what the next backup of each of its disks can be',
  status: 200,
  answer: named('CheckpointDetails'),
  run: (daemon, { params }) => daemon.checkpoint(params.name),
};

export const deleteCheckpoint: Operation<Named, { deleted: string }> = {
  id: 'deleteCheckpoint',
  method: 'DELETE',
  path: '/v1/checkpoints/{name}',
  tag: 'checkpoints',
  summary: 'Deletes a checkpoint; the others stay as they are',
  status: 200,
  answer: answer({ deleted: text }),
  run: async (daemon, { params }) => {
    await daemon.deleteCheckpoint(params.name);
    return { deleted: params.name };
  },
};

export const reload: Operation<Input, { reloaded: true; warnings: readonly string[] }> = {
  id: 'reload',
  method: 'POST',
  path: '/v1/reload',
  tag: 'daemon',
  summary:
    'Reads the configuration, certificates and keys again; if that fails, those of before stay',
  status: 200,
  answer: answer({
    reloaded: { const: true },
    warnings: { ...list(text), description: 'what needs a restart of the daemon' },
  }),
  run: async (daemon) => ({ reloaded: true, warnings: await daemon.reload() }),
};

/** All of them, but the stream of events, which is no request with one answer. */
export const OPERATIONS: readonly Operation<never, unknown>[] = [
  getStatus,
  reload,
  getLayout,
  listDevices,
  attachDevices,
  detachDevices,
  getDevice,
  markDevice,
  listBackups,
  beginBackup,
  getBackup,
  endBackup,
  getChanges,
  listExports,
  listCheckpoints,
  makeCheckpoint,
  getCheckpoint,
  deleteCheckpoint,
];

export const EVENTS_PATH = '/v1/events';
export const OPENAPI_PATH = '/v1/openapi.json';
