// SPDX-License-Identifier: Apache-2.0
/** `stillblock pull` from a control API. */
import { randomUUID } from 'node:crypto';
import { readdir, readFile } from 'node:fs/promises';
import { createServer as createSecureServer } from 'node:https';
import type { AddressInfo } from 'node:net';
import { join } from 'node:path';
import test, { type ExecutionContext } from 'ava';
import { StillblockError } from '../../src/errors.ts';
import { chooseUri } from '../../src/host-source.ts';
import { formatNbdUri } from '../../src/nbd-uri.ts';
import {
  Authority,
  type Certificate,
  clientTemplate,
  conventionalFolder,
  EXPIRED,
  SERVER,
} from '../nbd/certificates.ts';
import { folder } from '../nbd/world.ts';
import { Page } from '../pages.ts';
import { run } from './clients.ts';
import { commandOnPath } from './command.ts';
import { Server } from './pull-server.ts';
import {
  assertChain,
  type Ended,
  errorOf,
  manifestOf,
  pullTest,
  soon,
  start,
  stillblock,
} from './pulling.ts';

pullTest('the server is asked for a snapshot, and let go of it', async (t) => {
  const server = await Server.start(t);
  const { machine, socket } = server;
  const chain = join(await folder(t), 'chain');
  const days = ['one', 'two', 'three'];
  for (const [index, day] of days.entries()) {
    machine.change(index + 1);
    const ended = await stillblock(t, 'pull', '--checkpoint', day, socket, chain);
    t.is(ended.code, 0, ended.stderr);
    t.deepEqual(server.held, []);
  }
  const manifest = await manifestOf(chain);
  t.is(manifest.machine, 'aaaa');
  t.like(manifest.points[2]?.entries[0], {
    ...{ kind: 'incremental', generation: server.generation, number: 3 },
    // Its history says that the changes fit.
    verified: false,
  });
  t.is(manifest.points[0]?.layout?.machine, 'aaaa');
  await assertChain(t, machine, chain, days);
  const unnamed = await stillblock(t, 'pull', socket, chain);
  t.is(unnamed.code, 0, unnamed.stderr);
  t.regex(server.checkpoints.at(-1) ?? '', /^pull-\d{8}-\d{6}$/);
});

pullTest('what was of no use is not left on the server: checkpoints, snapshots', async (t) => {
  const server = await Server.start(t);
  const { machine, socket } = server;
  const chain = join(await folder(t), 'chain');
  t.is((await stillblock(t, 'pull', '--checkpoint', 'one', socket, chain)).code, 0);
  // Another history: all checkpoints are of another.
  server.generation = randomUUID();
  const refused = await stillblock(t, 'pull', '--checkpoint', 'two', socket, chain);
  t.is(refused.code, 3);
  t.regex(refused.stderr, /checkpoint one is another than the chain's/);
  t.deepEqual([server.checkpoints, server.held], [['one'], []]);
  const full = ['--full-if-needed', '--checkpoint', 'two'];
  t.is((await stillblock(t, 'pull', ...full, socket, chain)).code, 0);
  await assertChain(t, machine, chain, ['one', 'two']);

  server.machineId = 'bbbb';
  const other = await stillblock(t, 'pull', '--full', '--checkpoint', 'three', socket, chain);
  t.is(other.code, 1);
  t.is(errorOf(other), 'OTHER_MACHINE', other.stderr);
  t.deepEqual([server.checkpoints, server.held], [['one', 'two'], []]);
});

pullTest('killed: the next pull ends the snapshot that it left held', async (t) => {
  const server = await Server.start(t);
  const { machine, socket } = server;
  const chain = join(await folder(t), 'chain');
  const running = start(t, 'pull', '--checkpoint', 'cut', socket, chain);
  const begun = async (): Promise<void> => {
    while (server.held.length === 0) {
      await new Promise(setImmediate);
    }
  };
  await soon('its snapshot', begun());
  t.deepEqual(await readdir(chain), ['pull.json']);
  running.process.kill('SIGKILL');
  await running.ended;
  t.is(server.held.length, 1);
  // Nobody else's is touched.
  const next = await stillblock(t, 'pull', '--checkpoint', 'next', socket, chain);
  t.is(next.code, 0, next.stderr);
  t.like(next.events[0], { event: 'recovered', checkpoint: 'cut', complete: false });
  t.deepEqual([server.checkpoints, server.held], [['next'], []]);
  await assertChain(t, machine, chain, ['next']);
});

pullTest('the store overflows meanwhile: exit code 4, and why', async (t) => {
  const server = await Server.start(t);
  const chain = join(await folder(t), 'chain');
  const running = start(t, 'pull', '--checkpoint', 'one', server.socket, chain);
  const begun = async (): Promise<void> => {
    while (server.held.length === 0) {
      await new Promise(setImmediate);
    }
  };
  await soon('its snapshot', begun());
  server.failure = 'STORE_FULL';
  server.held[0]?.instant.server.failExports();
  const ended = await soon('its end', running.ended);
  t.is(ended.code, 4, ended.stderr);
  t.is(errorOf(ended), 'STORE_FULL');
  t.regex(ended.stderr, /the store is full.*the chain is as before/);
  t.deepEqual([server.checkpoints, server.held], [[], []]);
});

/** The next pull ends the snapshot that a pull has left held on a server that was cut off. */
async function assertMended(t: ExecutionContext, server: Server, chain: string): Promise<void> {
  server.mend();
  const next = await stillblock(t, 'pull', '--checkpoint', 'next', server.socket, chain);
  t.is(next.code, 0, next.stderr);
  t.deepEqual(server.held, []);
  t.like(next.events[0], { event: 'recovered', checkpoint: 'cut' });
}

for (const [when, cutAt] of [
  ['while it takes the snapshot', 'POST backups'],
  ['before that', 'GET layout'],
] as const) {
  pullTest(`the server is cut off ${when}: given up after --timeout`, async (t) => {
    const server = await Server.start(t);
    const chain = join(await folder(t), 'chain');
    server.cutAt = cutAt;
    const cut = ['--timeout', '2', '--checkpoint', 'cut', server.socket, chain];
    const ended = await stillblock(t, 'pull', ...cut);
    t.is(ended.code, 1);
    t.is(errorOf(ended), 'NO_ANSWER', ended.stderr);
    t.regex(ended.stderr, /has not answered for 2 s \(the chain is as before\)/);
    if (cutAt === 'GET layout') {
      t.deepEqual([server.held, await readdir(chain)], [[], []]);
    } else {
      t.is(server.held.length, 1);
      t.regex(ended.stderr, /the next pull into this folder ends/);
      await assertMended(t, server, chain);
      await assertChain(t, server.machine, chain, ['next']);
    }
  });
}

pullTest('a backup of the same name that is not ours is left alone', async (t) => {
  const server = await Server.start(t);
  const chain = join(await folder(t), 'chain');
  server.cutAt = 'POST backups';
  const cut = ['--timeout', '2', '--checkpoint', 'cut', server.socket, chain];
  t.is(errorOf(await stillblock(t, 'pull', ...cut)), 'NO_ANSWER');
  server.mend();
  await server.end('cut');
  const other = randomUUID();
  await server.begin(other, 'cut');
  const next = await stillblock(t, 'pull', '--checkpoint', 'next', server.socket, chain);
  t.is(next.code, 0, next.stderr);
  t.deepEqual(
    server.held.map(({ id }) => id),
    [other],
  );
});

pullTest('the server is cut off when all is copied: said so, and let go of later', async (t) => {
  const server = await Server.start(t);
  const chain = join(await folder(t), 'chain');
  server.cutAt = 'DELETE backups';
  // That the fake ends it is of no matter: its answer does not arrive.
  const cut = ['--timeout', '2', '--checkpoint', 'cut', server.socket, chain];
  const ended = await stillblock(t, 'pull', ...cut);
  t.is(ended.code, 0, ended.stderr);
  t.regex(ended.stderr, /the next pull into this folder ends/);
  await assertMended(t, server, chain);
  await assertChain(t, server.machine, chain, ['cut', 'next']);
});

pullTest('nobody answers on the control socket', async (t) => {
  const home = await folder(t);
  const ended = await stillblock(t, 'pull', join(home, 'no.sock'), join(home, 'chain'));
  t.is(ended.code, 1);
  t.is(errorOf(ended), 'NO_DAEMON');
  const unnamed = await stillblock(t, 'pull', 'web1', join(home, 'chain'));
  t.is(unnamed.code, 2);
  t.regex(unnamed.stderr, /--tls-certificates/);
});

pullTest('the API by TLS: certificates that do not fit, and a name that nobody has', async (t) => {
  const home = await folder(t);
  const [ours, others] = [
    await Authority.make(join(home, 'ours')),
    await Authority.make(join(home, 'others')),
  ];
  const [client, stranger] = [
    await ours.issue(clientTemplate('proxy')),
    await others.issue(clientTemplate('stranger')),
  ];
  const folders = {
    other: await conventionalFolder(join(home, 'other'), others, { client: stranger }),
    unknown: await conventionalFolder(join(home, 'unknown'), ours, { client: stranger }),
    good: await conventionalFolder(join(home, 'good'), ours, { client }),
  };
  const serve = async (certificate: Certificate): Promise<number> => {
    const [ca = '', cert = '', key = ''] = await Promise.all(
      [ours.certificate, certificate.certificate, certificate.key].map((path) => readFile(path)),
    );
    const api = createSecureServer({ ca, cert, key, requestCert: true });
    await new Promise<void>((resolve) => api.listen(0, resolve));
    t.teardown(() => api.close());
    return (api.address() as AddressInfo).port;
  };
  const [port, expired] = [
    await serve(await ours.issue(SERVER)),
    await serve(await ours.issue([...SERVER, ...EXPIRED])),
  ];
  const pull = (certificates: string, host: string): Promise<Ended> =>
    stillblock(t, 'pull', '--tls-certificates', certificates, host, join(home, 'chain'));
  for (const [certificates, host] of [
    [folders.other, `localhost:${port}`],
    [folders.unknown, `localhost:${port}`],
    [folders.good, `localhost:${expired}`],
    [folders.good, `127.0.0.2:${port}`],
  ] as const) {
    const refused = await pull(certificates, host);
    t.is(refused.code, 1);
    t.is(errorOf(refused), 'TLS_FAILED', `${certificates} ${host} ${refused.stderr}`);
    t.regex(refused.stderr, /look whether both certificates are of the same CA, not expired/);
  }
  const nobody = await pull(folders.good, 'no-such-host.invalid');
  t.is(nobody.code, 1);
  t.is(errorOf(nobody), 'NO_SERVER', nobody.stderr);
  t.regex(nobody.stderr, /look for a typing error in its name/);
});

pullTest('what docs/pull.md says works, command by command', async (t) => {
  const server = await Server.start(t);
  const home = await folder(t);
  const { PATH } = await commandOnPath(home);
  const page = await Page.open('docs/pull.md', import.meta.url);
  const blocks = page.takeAll().map(({ text }) => text);
  t.true(blocks.length >= 5);
  /** What is of this machine in place of what is of yours. */
  const here = (command: string): string =>
    command
      .replaceAll('/run/stillblock/control.sock', server.socket)
      .replaceAll(/nbd:\/\/192\.0\.2\.7\/(\w+)/g, (_, disk: string) => server.machine.uri(disk))
      .replaceAll(/(\/backup|\/dev)\//g, `${home}/`);
  for (const [index, block] of blocks.entries()) {
    server.machine.change(index + 1);
    const isServed = block.includes('--nbd ');
    const instant = isServed ? await server.machine.serve(t, 'wednesday') : undefined;
    await run('env', [`PATH=${PATH}`, 'bash', '-ec', here(block)]);
    await instant?.close();
  }
  t.is((await manifestOf(join(home, 'web1'))).points.length, 2);
  for (const [disk, target] of [
    ['sda', 'vdb'],
    ['sdb', 'vdc'],
  ] as const) {
    const expected = server.machine.disk(disk).at.get('tuesday');
    t.true(expected?.equals(await readFile(join(home, target))));
  }
});

test('an export is reached by the address that leads there', (t) => {
  const uris = ['nbd+unix:///sda?socket=/s', 'nbd://127.0.0.1:10809/sda', 'nbds://0.0.0.0:1/sda'];
  const choose = (all: readonly string[], host?: string, nbdHost?: string): string =>
    formatNbdUri(chooseUri(all, host, nbdHost));
  t.is(choose(uris), 'nbd+unix:///sda?socket=/s');
  t.is(choose(uris, 'web1'), 'nbds://web1:1/sda');
  t.is(choose(uris, 'localhost'), 'nbd://127.0.0.1:10809/sda');
  t.is(choose([...uris, 'nbd://192.0.2.7:2/sda'].slice(3), 'web1'), 'nbd://192.0.2.7:2/sda');
  // A server that listens on all addresses names those that it has, whatever is between.
  t.is(choose(['nbds://10.0.2.15:3/sda'], '127.0.0.1', 'web1'), 'nbds://web1:3/sda');
  t.is(choose(uris, undefined, 'web1'), 'nbd://web1:10809/sda');
  const alone = t.throws(() => chooseUri(uris.slice(0, 2), 'web1'), {
    instanceOf: StillblockError,
  });
  t.is(alone?.code, 'NOT_SERVED_HERE');
});
