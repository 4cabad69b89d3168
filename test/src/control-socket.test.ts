// SPDX-License-Identifier: Apache-2.0
/** The control socket of a running backup, as other commands and as strangers use it. */
import { mkdir, stat, writeFile } from 'node:fs/promises';
import { createServer, request } from 'node:http';
import { connect } from 'node:net';
import { join } from 'node:path';
import test, { type ExecutionContext } from 'ava';
import {
  type Controlled,
  ControlSocket,
  describeBackup,
  endBackup,
} from '../../src/control-socket.ts';
import type { Folders } from '../../src/folders.ts';
import { installation, stillblock } from './world.ts';

/** A backup that ends when the test says so. */
class FakeBackup implements Controlled {
  ends = 0;
  release!: () => void;
  readonly released: Promise<void> = new Promise((resolve) => {
    this.release = resolve;
  });

  describe(): object {
    return { state: 'serving', checkpoint: 'monday', pid: 1, disks: [], exports: [] };
  }

  async end(): Promise<object> {
    this.ends += 1;
    await this.released;
    return { checkpoint: 'monday', failed: false };
  }
}

async function start(t: ExecutionContext): Promise<{ folders: Folders; backup: FakeBackup }> {
  const folders = await installation(t);
  const backup = new FakeBackup();
  const socket = await ControlSocket.open(folders, backup);
  t.teardown(() => socket.close());
  return { folders, backup };
}

interface Answer {
  readonly status: number | undefined;
  readonly body: unknown;
}

function ask(folders: Folders, method: string, path: string): Promise<Answer> {
  return new Promise((resolve, reject) => {
    const outgoing = request(
      { socketPath: join(folders.run, 'control.sock'), method, path },
      (incoming) => {
        let text = '';
        incoming.on('data', (piece: Buffer) => {
          text += piece.toString();
        });
        incoming.on('end', () => resolve({ status: incoming.statusCode, body: JSON.parse(text) }));
      },
    );
    outgoing.on('error', reject);
    outgoing.end();
  });
}

test('it is there for root alone', async (t) => {
  const { folders } = await start(t);
  const { mode } = await stat(join(folders.run, 'control.sock'));
  t.is(mode & 0o777, 0o600);
  t.is((await stat(folders.run)).mode & 0o777, 0o700);
});

test('a backup is described, and nothing else is there', async (t) => {
  const { folders } = await start(t);
  t.like(await describeBackup(folders), { state: 'serving', checkpoint: 'monday' });
  t.is((await ask(folders, 'GET', '/v1/snapshot')).status, 200);
  t.is((await ask(folders, 'GET', '/')).status, 404);
  t.is((await ask(folders, 'GET', '/v1/snapshot/x')).status, 404);
  t.is((await ask(folders, 'POST', '/v1/snapshot')).status, 405);
});

test('the end is answered when it has come, to all who wait', async (t) => {
  const { folders, backup } = await start(t);
  let answers = 0;
  const count = <T>(value: T): T => {
    answers += 1;
    return value;
  };
  const first = endBackup(folders).then(count);
  const second = endBackup(folders).then(count);
  // Both have been asked for before a third question, on a connection of its own, is answered.
  while (backup.ends < 2) {
    await describeBackup(folders);
  }
  t.is(answers, 0);
  backup.release();
  t.deepEqual(await first, { checkpoint: 'monday', failed: false });
  t.deepEqual(await second, { checkpoint: 'monday', failed: false });
});

test('without a backup there is nobody to ask', async (t) => {
  const folders = await installation(t);
  t.is(await describeBackup(folders), undefined);
  t.is(await endBackup(folders), undefined);
  const { code, stderr } = await stillblock(folders, 'backup', 'end');
  t.is(code, 1);
  t.is(stderr, 'stillblock: no backup is running: nothing need be done: see stillblock status\n');
});

test('the socket of a dead process is replaced', async (t) => {
  const folders = await installation(t);
  await mkdir(folders.run, { recursive: true });
  // What a killed process leaves behind: a socket that nobody listens on. Node removes the
  // socket that it made, so a file stands in for it, which must go just as well.
  await writeFile(join(folders.run, 'control.sock'), '');
  t.is(await endBackup(folders), undefined);
  const socket = await ControlSocket.open(folders, new FakeBackup());
  t.like(await describeBackup(folders), { checkpoint: 'monday' });
  await socket.close();
  t.true((await stat(folders.run)).isDirectory(), 'the folder was there before');
  t.is(await describeBackup(folders), undefined);
});

test('nothing is left behind, though somebody is still connected', async (t) => {
  const folders = await installation(t);
  const socket = await ControlSocket.open(folders, new FakeBackup());
  const idle = connect(join(folders.run, 'control.sock'));
  await new Promise<void>((resolve) => idle.once('connect', resolve));
  idle.end();
  await socket.close();
  await t.throwsAsync(stat(folders.run), { code: 'ENOENT' });
});

test('an answer that is no JSON is an error, not a crash', async (t) => {
  const folders = await installation(t);
  await mkdir(folders.run, { recursive: true });
  const server = createServer((_incoming, response) => response.end('no JSON'));
  await new Promise<void>((resolve) => server.listen(join(folders.run, 'control.sock'), resolve));
  await t.throwsAsync(describeBackup(folders), { name: 'StillblockError' });
  await new Promise((resolve) => server.close(resolve));
});
