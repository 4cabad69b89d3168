// SPDX-License-Identifier: Apache-2.0
/** The control API's description, OpenAPI 3.1, made of the table of its operations. */
import { EXIT } from './errors.ts';
import { EVENTS_PATH, OPENAPI_PATH, OPERATIONS, type Schema } from './operations.ts';

const text = { type: 'string' } as const;
const bytes = { type: 'integer', minimum: 0 } as const;
const count = { type: 'integer', minimum: 0 } as const;
const flag = { type: 'boolean' } as const;
const time = { type: 'string', format: 'date-time' } as const;
const uuid = { type: 'string', format: 'uuid' } as const;
const listOf = (items: Schema): Schema => ({ type: 'array', items });
const named = (name: string): Schema => ({ $ref: `#/components/schemas/${name}` });

/** @param optional properties that may be absent */
function record(
  properties: Readonly<Record<string, Schema>>,
  optional: readonly string[] = [],
): Schema {
  const required = Object.keys(properties).filter((name) => !optional.includes(name));
  return { type: 'object', properties, required };
}

const checkpointDisk = { name: text, sizeBytes: bytes, generation: uuid, number: count };
const checkpoint = {
  name: text,
  id: { oneOf: [uuid, { type: 'null' }], description: 'of the backup that it is of' },
  description: text,
  parent: { type: ['string', 'null'] },
  createdAt: time,
};

const SCHEMAS: Readonly<Record<string, Schema>> = {
  Status: record({
    module: record({ abi: count, chunkSizeBytes: bytes, version: text }),
    trackedDevices: count,
    daemon: { oneOf: [record({ pid: count, since: time }), { type: 'null' }] },
    backup: { oneOf: [named('Backup'), { type: 'null' }] },
    backups: listOf(named('Backup')),
    missingDevices: listOf(text),
    lostAtReboot: listOf(record({ device: text, reason: text })),
    begunAnew: listOf(record({ device: text, reason: text })),
  }),
  Layout: {
    ...record({ machine: { type: ['string', 'null'] }, hostname: text, problems: listOf(text) }),
    description: 'partition tables, LVM, md, LUKS, swap, firmware: as stillblock layout --json',
  },
  Device: record({
    name: text,
    device: text,
    tracker: { ...text, description: 'a 64-bit number' },
    sizeBytes: bytes,
    blockSizeBytes: bytes,
    generation: uuid,
    number: count,
    takenUp: { ...flag, description: 'its history was kept over a reboot' },
    began: { ...text, description: 'why its history began, such as NOT_SAVED' },
    kept: { ...text, description: 'OK, or why its history will not be kept over a reboot' },
    writes: count,
    heldWrites: count,
    inSnapshot: flag,
    resized: flag,
    gone: flag,
  }),
  Backup: record(
    {
      id: uuid,
      state: {
        type: 'string',
        enum: ['preparing', 'taking', 'serving', 'failed', 'ending', 'ended'],
      },
      checkpoint: text,
      pid: count,
      reason: text,
      takenAt: time,
      freezeMs: { type: 'number' },
      gateMs: { type: 'number' },
      heldWrites: count,
      store: record({
        place: text,
        capacityBytes: bytes,
        usedBytes: bytes,
        why: text,
        overflowSeconds: { type: ['number', 'null'] },
      }),
      disks: listOf(named('Disk')),
      exports: listOf(named('Export')),
      metrics: text,
      xml: record({ backup: text, checkpoint: text, warnings: listOf(text) }, [
        'backup',
        'checkpoint',
      ]),
      brokenCheckpoints: listOf(record({ name: text, problem: text })),
    },
    ['reason', 'takenAt', 'freezeMs', 'gateMs', 'heldWrites', 'store', 'metrics', 'xml'],
  ),
  Disk: record({
    name: text,
    device: text,
    sizeBytes: bytes,
    image: text,
    generation: uuid,
    number: count,
    incremental: { ...listOf(text), description: 'checkpoints since which changes are served' },
    full: {
      ...listOf(record({ checkpoint: text, why: text })),
      description: 'checkpoints since which they are not',
    },
  }),
  Export: record(
    {
      name: text,
      disk: text,
      checkpoint: text,
      uris: listOf(text),
      sizeBytes: bytes,
      dirtyBytes: bytes,
      generation: uuid,
      number: count,
      checkpointId: uuid,
    },
    ['checkpoint', 'dirtyBytes', 'generation', 'number', 'checkpointId'],
  ),
  Changes: record({
    disk: text,
    since: text,
    checkpoint: text,
    sizeBytes: bytes,
    blockSizeBytes: bytes,
    changedBytes: bytes,
    extents: listOf(record({ offset: bytes, length: bytes })),
  }),
  Checkpoint: record({ ...checkpoint, disks: listOf(record(checkpointDisk)) }),
  CheckpointDetails: record({
    ...checkpoint,
    disks: listOf(
      record({ ...checkpointDisk, next: { enum: ['incremental', 'full'] }, why: text }, ['why']),
    ),
  }),
  Event: {
    ...record({ id: count, time, event: text }),
    description: 'data of one event of the stream; what else it has depends on its kind',
  },
  Error: record({
    error: record({
      code: { ...text, description: 'stable, for programs' },
      message: { ...text, description: 'what happened' },
      advice: { ...text, description: 'what to do' },
      exitCode: { enum: Object.values(EXIT), description: 'of a command that meets it' },
    }),
  }),
};

const json = (schema: Schema): Schema => ({ 'application/json': { schema } });
const XML: Schema = { 'application/xml': { schema: { type: 'string' } } };
const refusal: Schema = {
  description: 'Refused; nothing has changed',
  content: json(named('Error')),
};

function parametersOf(path: string, query: Readonly<Record<string, string>> = {}): Schema[] {
  const inPath = [...path.matchAll(/\{(\w+)\}/g)].map(([, name]) => ({
    name,
    in: 'path',
    required: true,
    schema: text,
  }));
  const inQuery = Object.entries(query).map(([name, description]) => ({
    name,
    in: 'query',
    description,
    schema: text,
  }));
  return [...inPath, ...inQuery];
}

function pathsOf(): Record<string, Record<string, Schema>> {
  const paths: Record<string, Record<string, Schema>> = {};
  for (const operation of OPERATIONS) {
    const { id, method, path, tag, summary, query, body, status, answer } = operation;
    const parameters = parametersOf(path, query);
    paths[path] = {
      ...paths[path],
      [method.toLowerCase()]: {
        operationId: id,
        tags: [tag],
        summary,
        ...(parameters.length === 0 ? {} : { parameters }),
        ...(body === undefined
          ? {}
          : {
              requestBody: {
                required: true,
                content: { ...json(body), ...(operation.xml === undefined ? {} : XML) },
              },
            }),
        responses: {
          [status]: { description: summary, content: json(answer) },
          default: refusal,
        },
      },
    };
  }
  return paths;
}

/** @returns the description, as it is served and kept in the repository */
export function openApiDocument(): Schema {
  return {
    openapi: '3.1.0',
    info: {
      title: 'Stillblock control API',
      version: '1',
      description: "HTTP with JSON on /run/stillblock/control.sock, which is root's alone.",
      license: { name: 'Apache-2.0', identifier: 'Apache-2.0' },
    },
    paths: {
      ...pathsOf(),
      [EVENTS_PATH]: {
        get: {
          operationId: 'streamEvents',
          tags: ['daemon'],
          summary: 'What happens, as it happens; Last-Event-ID takes up where one was',
          responses: {
            200: {
              description: 'a stream that ends with the daemon',
              content: { 'text/event-stream': { schema: named('Event') } },
            },
            default: refusal,
          },
        },
      },
      [OPENAPI_PATH]: {
        get: {
          operationId: 'getOpenApi',
          tags: ['daemon'],
          summary: 'This description',
          responses: { 200: { description: 'OpenAPI 3.1', content: json({ type: 'object' }) } },
        },
      },
    },
    components: { schemas: SCHEMAS },
  };
}
