// SPDX-License-Identifier: Apache-2.0
/** The control API as its clients meet it. No module is loaded here: what needs it says so. */
import { mkdir, readFile, stat, writeFile } from 'node:fs/promises';
import { request } from 'node:http';
import { connect } from 'node:net';
import { join } from 'node:path';
import test, { type ExecutionContext } from 'ava';
import { pino } from 'pino';
import { remoteApi } from '../../src/api-client.ts';
import { serveOnSocket, serveOnTls } from '../../src/api-server.ts';
import { CheckpointStore } from '../../src/checkpoints.ts';
import { Daemon } from '../../src/daemon.ts';
import type { DaemonEvent } from '../../src/events.ts';
import { checkpointFolder } from '../../src/folders.ts';
import { openApiDocument } from '../../src/openapi.ts';
import * as operations from '../../src/operations.ts';
import { readClientCertificates } from '../../src/tls.ts';
import { Authority, clientTemplate, conventionalFolder, SERVER } from '../nbd/certificates.ts';
import { folder, installation } from './world.ts';

const { EVENTS_PATH, getStatus, listCheckpoints, OPERATIONS } = operations;
const log = pino({ level: 'silent' });

interface World {
  readonly daemon: Daemon;
  readonly socket: string;
  readonly store: CheckpointStore;
  readonly checkpoints: string;
}

async function start(t: ExecutionContext): Promise<World> {
  const folders = await installation(t);
  const daemon = new Daemon(folders, log, false);
  const socket = join(folders.run, 'control.sock');
  const server = await serveOnSocket(daemon, socket, log);
  t.teardown(async () => {
    await server.close();
    await daemon.close();
  });
  const store = new CheckpointStore(folders);
  return { daemon, socket, store, checkpoints: checkpointFolder(folders) };
}

interface Answer {
  readonly status: number | undefined;
  readonly type: string | undefined;
  // biome-ignore lint/suspicious/noExplicitAny: what is in it is asserted
  readonly body: any;
}

function ask(
  { socket }: World,
  method: string,
  path: string,
  body?: string,
  type = 'application/json',
): Promise<Answer> {
  return new Promise((resolve, reject) => {
    const headers = body === undefined ? {} : { 'content-type': type };
    const outgoing = request(
      { socketPath: socket, method, path, headers, agent: false },
      (incoming) => {
        let text = '';
        incoming.on('data', (piece: Buffer) => {
          text += piece.toString();
        });
        incoming.on('end', () =>
          resolve({
            status: incoming.statusCode,
            type: incoming.headers['content-type'],
            body: JSON.parse(text),
          }),
        );
      },
    );
    outgoing.on('error', reject);
    outgoing.end(body);
  });
}

async function keep(
  { store }: World,
  name: string,
  parent?: string,
  seconds = 1_767_225_600,
): Promise<void> {
  await store.prepare();
  await store.write({
    name,
    id: undefined,
    description: '',
    parent,
    creationTime: seconds,
    disks: [
      {
        name: 'sda',
        sizeBytes: 2 ** 30,
        generation: '8f14e45f-ceea-467f-a83b-b4c6ab3f1d2e',
        number: 3,
      },
    ],
  });
}

test("the socket is root's alone", async (t) => {
  const { socket } = await start(t);
  t.is((await stat(socket)).mode & 0o777, 0o600);
  t.is((await stat(join(socket, '..'))).mode & 0o777, 0o700);
});

test('the socket of a dead process is replaced, and nothing is left at the end', async (t) => {
  const folders = await installation(t);
  await mkdir(folders.run, { recursive: true });
  const socket = join(folders.run, 'control.sock');
  await writeFile(socket, '');
  const daemon = new Daemon(folders, log, false);
  const server = await serveOnSocket(daemon, socket, log);
  const idle = connect(socket);
  await new Promise<void>((resolve) => idle.once('connect', resolve));
  idle.end();
  await server.close();
  await daemon.close();
  await t.throwsAsync(stat(socket), { code: 'ENOENT' });
});

const BEGIN = { checkpoint: 'monday', store: { places: ['memory'] } };
const XML = "<domainbackup mode='pull'><disks><disk name='sda'/></disks></domainbackup>";

/** What is wrong with a request, and how it is refused. */
const REFUSALS: readonly (readonly [string, string, string | undefined, number, string])[] = [
  ['GET', '/', undefined, 404, 'NOT_FOUND'],
  ['GET', '/v1', undefined, 404, 'NOT_FOUND'],
  ['PUT', '/v1/devices', '{}', 404, 'NOT_FOUND'],
  ['GET', '/v1/devices?x=1', undefined, 400, 'USAGE'],
  ['GET', '/v1/devices', undefined, 503, 'MODULE_NOT_LOADED'],
  ['GET', '/v1/status', undefined, 503, 'MODULE_NOT_LOADED'],
  ['POST', '/v1/devices', undefined, 400, 'USAGE'],
  ['POST', '/v1/devices', '', 400, 'USAGE'],
  ['POST', '/v1/devices', '{', 400, 'USAGE'],
  ['POST', '/v1/devices', '[]', 400, 'USAGE'],
  ['POST', '/v1/devices', '{"devices":[]}', 400, 'USAGE'],
  ['POST', '/v1/devices', '{"devices":["/dev/sda"],"x":1}', 400, 'USAGE'],
  ['POST', '/v1/devices', '{"devices":[1]}', 400, 'USAGE'],
  ['POST', '/v1/devices', '{"devices":["/dev/sda"],"blockSizeBytes":"4096"}', 400, 'USAGE'],
  ['POST', '/v1/devices', '{"devices":["/dev/sda"],"blockSizeBytes":-1}', 400, 'USAGE'],
  ['POST', '/v1/devices', '{"devices":["/dev/sda"],"blockSizeBytes":1e300}', 400, 'USAGE'],
  ['POST', '/v1/devices', '{"devices":["/dev/sda"],"__proto__":{"x":1}}', 400, 'USAGE'],
  ['POST', '/v1/devices', '{"devices":["/dev/sda"]}', 503, 'MODULE_NOT_LOADED'],
  ['POST', '/v1/devices/sda/mark', '{"length":0}', 400, 'USAGE'],
  ['POST', '/v1/devices/sda/mark', '{"offset":0.5}', 400, 'USAGE'],
  ['GET', '/v1/backups/monday', undefined, 404, 'NO_BACKUP'],
  ['DELETE', '/v1/backups/monday', undefined, 404, 'NO_BACKUP'],
  ['GET', '/v1/backups/monday/changes/sda', undefined, 404, 'NO_BACKUP'],
  ['POST', '/v1/backups', '{}', 400, 'USAGE'],
  ['POST', '/v1/backups', JSON.stringify({ ...BEGIN, checkpoint: '../x' }), 400, 'USAGE'],
  ['POST', '/v1/backups', JSON.stringify({ ...BEGIN, checkpoint: 'x'.repeat(300) }), 400, 'USAGE'],
  ['POST', '/v1/backups', JSON.stringify({ ...BEGIN, store: { places: [] } }), 400, 'USAGE'],
  ['POST', '/v1/backups', JSON.stringify({ ...BEGIN, store: { places: ['x'] } }), 400, 'USAGE'],
  ['POST', '/v1/backups', JSON.stringify({ ...BEGIN, freezeTimeoutMs: 0 }), 400, 'USAGE'],
  ['POST', '/v1/backups', JSON.stringify({ ...BEGIN, server: { listen: [] } }), 400, 'USAGE'],
  [
    'POST',
    '/v1/backups',
    JSON.stringify({ ...BEGIN, server: { listen: [{ host: 'a', port: 65_536 }] } }),
    400,
    'USAGE',
  ],
  [
    'POST',
    '/v1/backups',
    JSON.stringify({ ...BEGIN, server: { listen: [{ descriptor: 3 }] } }),
    400,
    'USAGE',
  ],
  ['POST', '/v1/backups', JSON.stringify({ backupXml: '<domainbackup/>' }), 400, 'BAD_BACKUP_XML'],
  ['POST', '/v1/backups', JSON.stringify({ backupXml: XML, disks: [] }), 400, 'USAGE'],
  ['POST', '/v1/backups', JSON.stringify({ checkpointXml: '<x/>' }), 400, 'BAD_CHECKPOINT_XML'],
  ['POST', '/v1/backups', JSON.stringify(BEGIN), 503, 'MODULE_NOT_LOADED'],
  ['POST', '/v1/checkpoints', '{}', 400, 'USAGE'],
  ['POST', '/v1/checkpoints', '{"name":"a","xml":"<x/>"}', 400, 'USAGE'],
  ['GET', '/v1/checkpoints/..%2Fx', undefined, 400, 'USAGE'],
  ['GET', '/v1/checkpoints/%00', undefined, 400, 'USAGE'],
  ['GET', '/v1/checkpoints/tuesday', undefined, 404, 'NO_CHECKPOINT'],
  ['DELETE', '/v1/checkpoints/tuesday', undefined, 404, 'NO_CHECKPOINT'],
];

test('every wrong request gets a typed error, and changes nothing', async (t) => {
  const world = await start(t);
  await keep(world, 'kept');
  for (const [method, path, body, status, code] of REFUSALS) {
    const answer = await ask(world, method, path, body);
    const what = `${method} ${path} ${body}: ${JSON.stringify(answer.body)}`;
    t.is(answer.status, status, what);
    t.is(answer.body.error.code, code, what);
    t.true(answer.body.error.message.length > 0 && answer.body.error.advice.length > 0, what);
  }
  const { body } = await ask(world, 'GET', '/v1/checkpoints');
  t.deepEqual(
    body.checkpoints.map(({ name }: { name: string }) => name),
    ['kept'],
  );
  t.deepEqual((await ask(world, 'GET', '/v1/backups')).body, { backups: [] });
});

test('bodies of another kind, or too large, are refused', async (t) => {
  const world = await start(t);
  const other = await ask(world, 'POST', '/v1/backups', 'x', 'text/plain');
  t.is(other.status, 400);
  const large = await ask(world, 'POST', '/v1/devices', `{"devices":["${'x'.repeat(2 ** 20)}"]}`);
  t.is(large.status, 400);
  const document = await ask(world, 'POST', '/v1/devices', XML, 'application/xml');
  t.is(document.body.error.code, 'USAGE', 'XML where there is no XML');
});

test('libvirt XML is a body as it is', async (t) => {
  const world = await start(t);
  for (const type of ['application/xml', 'text/xml; charset=utf-8']) {
    const begun = await ask(world, 'POST', '/v1/backups?checkpoint=monday', XML, type);
    t.is(begun.body.error.code, 'MODULE_NOT_LOADED', JSON.stringify(begun.body));
    const wrong = await ask(world, 'POST', '/v1/backups', '<domainbackup mode="push"/>', type);
    t.is(wrong.body.error.code, 'BAD_BACKUP_XML');
    t.regex(wrong.body.error.message, /:1:\d+: /, 'it tells line and column');
    const made = '<domaincheckpoint><name>tuesday</name></domaincheckpoint>';
    const checkpoint = await ask(world, 'POST', '/v1/checkpoints', made, type);
    t.is(checkpoint.body.error.code, 'MODULE_NOT_LOADED', JSON.stringify(checkpoint.body));
  }
});

test('checkpoints are listed, shown and deleted', async (t) => {
  const world = await start(t);
  await keep(world, 'monday');
  await keep(world, 'tuesday', 'monday');
  await writeFile(join(world.checkpoints, 'torn.xml'), '<domaincheck');
  const { body } = await ask(world, 'GET', '/v1/checkpoints');
  t.deepEqual(
    body.checkpoints.map(({ name, parent }: { name: string; parent: string | null }) => [
      name,
      parent,
    ]),
    [
      ['monday', null],
      ['tuesday', 'monday'],
    ],
  );
  t.like(body.broken[0], { name: 'torn' });
  const shown = await ask(world, 'GET', '/v1/checkpoints/monday');
  t.like(shown.body.disks[0], {
    name: 'sda',
    next: 'full',
    why: 'the kernel module cannot be asked',
  });
  t.deepEqual((await ask(world, 'DELETE', '/v1/checkpoints/monday')).body, { deleted: 'monday' });
  const { body: rest } = await ask(world, 'GET', '/v1/checkpoints');
  // The chain goes on without it.
  t.like(rest.checkpoints[0], { name: 'tuesday', parent: null });
});

test('events are told as they happen, and again from where one was', async (t) => {
  const world = await start(t);
  await keep(world, 'monday');
  await keep(world, 'tuesday');
  const api = remoteApi({ socketPath: world.socket });
  t.teardown(() => api.close());
  const seen: DaemonEvent[] = [];
  let next: () => void = () => {};
  await api.watch(
    (event) => {
      seen.push(event);
      next();
    },
    () => next(),
  );
  const come = (count: number): Promise<void> =>
    new Promise((resolve) => {
      next = () => {
        if (seen.length >= count) resolve();
      };
      next();
    });
  for (const name of ['monday', 'tuesday']) {
    t.is((await ask(world, 'DELETE', `/v1/checkpoints/${name}`)).status, 200);
  }
  await come(2);
  t.deepEqual(
    seen.map((event) => [event.id, event.event]),
    [
      [1, 'checkpoint-deleted'],
      [2, 'checkpoint-deleted'],
    ],
  );
  const again = await new Promise<string>((resolve, reject) => {
    const headers = { 'last-event-id': '1' };
    const outgoing = request(
      { socketPath: world.socket, path: EVENTS_PATH, headers },
      (incoming) => {
        t.is(incoming.headers['content-type'], 'text/event-stream');
        let text = '';
        incoming.setEncoding('utf8').on('data', (piece: string) => {
          text += piece;
          if (text.includes('data: ')) {
            outgoing.destroy();
            resolve(text);
          }
        });
      },
    );
    outgoing.on('error', reject);
    outgoing.end();
  });
  t.regex(again, /^id: 2$/m);
  t.notRegex(again, /^id: 1$/m);
});

test('streams of events are bounded, and end with the daemon', async (t) => {
  const folders = await installation(t);
  const daemon = new Daemon(folders, log, false);
  const socket = join(folders.run, 'control.sock');
  const server = await serveOnSocket(daemon, socket, log);
  const api = remoteApi({ socketPath: socket });
  const ends: Promise<void>[] = [];
  for (let count = 0; count < 32; count += 1) {
    let onLost: () => void = () => {};
    ends.push(
      new Promise((resolve) => {
        onLost = resolve;
      }),
    );
    await api.watch(() => {}, onLost);
  }
  const world = { daemon, socket, store: daemon.checkpoints, checkpoints: '' };
  t.like(await ask(world, 'GET', EVENTS_PATH), {
    status: 503,
    body: { error: { code: 'TOO_MANY' } },
  });
  await server.close();
  await Promise.all(ends);
  await daemon.close();
  await api.close();
});

test('the description is that of the routes, and the one in the repository', async (t) => {
  const world = await start(t);
  const served = (await ask(world, 'GET', '/v1/openapi.json')).body;
  const kept = await readFile(new URL('../../../docs/openapi.json', import.meta.url), 'utf8');
  t.deepEqual(served, JSON.parse(kept), 'run scripts/openapi.sh');
  t.deepEqual(served, JSON.parse(JSON.stringify(openApiDocument())));
  for (const { method, path } of OPERATIONS) {
    t.truthy(served.paths[path][method.toLowerCase()], `${method} ${path}`);
    // Whatever it says, it is there.
    const answer = await ask(
      world,
      method,
      path.replaceAll(/\{\w+\}/g, 'x'),
      method === 'POST' ? '{}' : undefined,
    );
    t.not(answer.body.error?.code, 'NOT_FOUND', `${method} ${path}`);
  }
  const references = kept.match(/#\/components\/schemas\/\w+/g) ?? [];
  for (const reference of references) {
    t.truthy(served.components.schemas[reference.split('/').at(-1) ?? ''], reference);
  }
  const ids = OPERATIONS.map(({ id }) => id);
  const all = Object.values(operations).filter((each) => typeof each === 'object' && 'id' in each);
  t.is(all.length, ids.length, 'each operation is served');
  t.is(new Set(ids).size, ids.length);
});

test('by TLS it is for clients with a certificate of the authority alone', async (t) => {
  const home = await folder(t);
  const authority = await Authority.make(join(home, 'ours'));
  const strange = await Authority.make(join(home, 'strange'));
  const certificates = await conventionalFolder(join(home, 'server'), authority, {
    server: await authority.issue(SERVER),
  });
  const world = await start(t);
  await keep(world, 'monday');
  const server = await serveOnTls(world.daemon, { host: '127.0.0.1', port: 0, certificates }, log);
  t.teardown(() => server.close());
  const apiOf = async (
    by: Authority,
    folderName: string,
  ): Promise<ReturnType<typeof remoteApi>> => {
    const client = await by.issue(clientTemplate('backup'));
    const mine = await conventionalFolder(join(home, folderName), by, { client });
    const tls = await readClientCertificates(mine);
    return remoteApi({
      host: 'localhost',
      port: server.port,
      // By whom the server is known is not what is tested.
      tls: { ...tls, ca: await readFile(authority.certificate) },
    });
  };
  const known = await apiOf(authority, 'known');
  const { checkpoints } = await known.call(listCheckpoints, {});
  t.is(checkpoints[0]?.name, 'monday');
  await t.throwsAsync(known.call(getStatus, {}), { message: /module is not loaded/ });
  const unknown = await apiOf(strange, 'unknown');
  await t.throwsAsync(unknown.call(listCheckpoints, {}), { name: 'StillblockError' });
  // A certificate that is wrong changes nothing.
  await writeFile(join(certificates, 'server-cert.pem'), 'x');
  await t.throwsAsync(server.reload(), { name: 'StillblockError' });
  t.is((await known.call(listCheckpoints, {})).checkpoints.length, 1);
});
