// SPDX-License-Identifier: Apache-2.0
// The daemon on a server: what it owns, who may ask it, and what is left when it
// is killed. One guest serves all the checks, in order. Requests go to its socket
// by curl, as anybody's would; the command line is what it is for.

import { join } from 'node:path';
import test from 'ava';
import { checkout } from './checkout.ts';
import type { GuestCommand } from './command.ts';
import { bootGuest, type Guest } from './guest.ts';
import { shellQuote } from './initrd.ts';

const MiB = 1 << 20;
const cli = `node ${shellQuote(join(checkout, 'dist/src/cli.js'))}`;
const limitMs = 120_000;
const socket = '/run/stillblock/control.sock';

let guest: Guest;
let daemon: GuestCommand;
/** Device nodes of the two disks. */
let one = '';
let two = '';
const nameOf = (device: string): string => device.replace('/dev/', '');

/** An answer of the API. */
interface Answer {
  readonly status: number;
  // biome-ignore lint/suspicious/noExplicitAny: what is in it is asserted
  readonly body: any;
}

const curl = (method: string, path: string, body?: unknown): string => {
  const data =
    body === undefined
      ? ''
      : `-H 'content-type: application/json' --data-binary ${shellQuote(typeof body === 'string' ? body : JSON.stringify(body))}`;
  return `curl -s -X ${method} ${data} -w '\\n%{http_code}\\n' --unix-socket ${socket} 'http://localhost${path}'`;
};

function readAnswer(stdout: string): Answer {
  const [, text = '', status] = /^(.*)\n(\d+)\n$/s.exec(stdout) ?? [];
  return { status: Number(status), body: text === '' ? undefined : JSON.parse(text) };
}

async function ask(method: string, path: string, body?: unknown): Promise<Answer> {
  const { stdout } = await guest.run(curl(method, path, body), {
    timeoutMs: limitMs,
    check: false,
  });
  return readAnswer(stdout);
}

/** A begin of one disk, into memory. */
const begin = (checkpoint: string, device: string): object => ({
  checkpoint,
  store: { places: ['memory'], sizeBytes: 16 * MiB },
  disks: [{ path: device }],
});

/** Starts a daemon as a service manager would, and waits until it says that it is ready. */
async function startDaemon(prefix = ''): Promise<GuestCommand> {
  const told = guest.start('exec socat -u UNIX-RECV:/run/notify.sock STDOUT');
  await guest.run('until [ -S /run/notify.sock ]; do sleep 0.05; done');
  const command = guest.start(
    `export NOTIFY_SOCKET=/run/notify.sock; ${prefix} exec ${cli} serve -v 2>&1`,
  );
  await told.waitForOutput(/READY=1/, limitMs);
  told.kill(15);
  await told.wait(limitMs);
  return command;
}

test.before(async () => {
  guest = await bootGuest({
    kernel: '6.1',
    disks: [
      { name: 'one', sizeBytes: 32 * MiB },
      { name: 'two', sizeBytes: 32 * MiB },
    ],
    memoryMiB: 1024,
  });
  [one, two] = (await Promise.all([guest.disk('one'), guest.disk('two')])) as [string, string];
  await guest.run(
    `set -e; mkfs.ext4 -q -F ${one}; mkdir -p /srv/one; mount ${one} /srv/one
    mkdir -p /etc/stillblock
    echo '<stillblock><devices><device path="${one}" name="system"/></devices></stillblock>' >/etc/stillblock/stillblock.xml`,
  );
  await guest.loadModule();
  daemon = await startDaemon();
});

test.after.always(async () => {
  await guest?.kill();
});

test.serial('it tracks what is configured, under the name that is configured', async (t) => {
  const { status, body } = await ask('GET', '/v1/devices');
  t.is(status, 200);
  t.deepEqual(
    body.devices.map(({ name, device }: { name: string; device: string }) => [name, device]),
    [['system', one]],
  );
  const attached = await ask('POST', '/v1/devices', { devices: [two] });
  t.is(attached.status, 201);
  t.like(attached.body.devices[0], { name: nameOf(two), device: two, inSnapshot: false });
});

test.serial('a backup begun by the command line is held by the daemon', async (t) => {
  const { stdout } = await guest.run(
    `${cli} backup begin --json --checkpoint monday --disk ${one} --store memory --store-size 16M`,
    { timeoutMs: limitMs },
  );
  const serving = JSON.parse(stdout);
  t.like(serving, { event: 'serving', state: 'serving', checkpoint: 'monday' });
  const { stdout: told } = await guest.run(`${cli} status --json`, { timeoutMs: limitMs });
  t.like(JSON.parse(told), { backup: { checkpoint: 'monday' }, trackedDevices: 2 });
  await guest.run(`cmp ${one} ${serving.disks[0].image}; nbdinfo ${serving.exports[0].uris[0]}`);
  const { stdout: ended } = await guest.run(`${cli} backup end --json`, { timeoutMs: limitMs });
  t.deepEqual(JSON.parse(ended), { ended: { checkpoint: 'monday', failed: false } });
});

test.serial('two that ask at once get one snapshot and one refusal', async (t) => {
  const { stdout } = await guest.run(
    `${curl('POST', '/v1/backups', begin('left', one))} >/run/left & ${curl('POST', '/v1/backups', begin('right', one))} >/run/right; wait`,
    { timeoutMs: limitMs },
  );
  t.is(stdout, '');
  const answers = await Promise.all(
    ['left', 'right'].map(async (side) => readAnswer((await guest.run(`cat /run/${side}`)).stdout)),
  );
  const statuses = answers.map(({ status }) => status).sort();
  t.deepEqual(statuses, [201, 409]);
  const refused = answers.find(({ status }) => status === 409);
  t.like(refused?.body, { error: { code: 'IN_SNAPSHOT' } });
  const held = answers.find(({ status }) => status === 201)?.body.checkpoint;
  t.is((await ask('DELETE', `/v1/backups/${held}`)).status, 200);
});

test.serial('of different disks they get two snapshots', async (t) => {
  await guest.run(
    `${curl('POST', '/v1/backups', begin('first', one))} >/run/left & ${curl('POST', '/v1/backups', begin('second', two))} >/run/right; wait`,
    { timeoutMs: limitMs },
  );
  const { body } = await ask('GET', '/v1/exports');
  const names = body.exports.map(({ name }: { name: string }) => name);
  t.true(names.includes('system') && names.includes(nameOf(two)), names.join(' '));
  t.true(names.includes('system@monday'));
  const busy = await ask('POST', '/v1/devices/detach', { devices: ['system'] });
  t.is(busy.status, 409);
  for (const checkpoint of ['first', 'second']) {
    t.is((await ask('DELETE', `/v1/backups/${checkpoint}`)).status, 200);
  }
  t.deepEqual((await ask('GET', '/v1/exports')).body, { exports: [] });
});

test.serial('it ends cleanly, and its devices stay tracked', async (t) => {
  t.is((await ask('POST', '/v1/backups', begin('last', one))).status, 201);
  daemon.kill(15);
  const { code, stdout } = await daemon.wait(limitMs);
  t.is(code, 0, stdout);
  await guest.run(`! ls /dev/stillblock[0-9]* && ! [ -e ${socket} ]`);
  const { stdout: listed } = await guest.run(`${cli} device list --json`, { timeoutMs: limitMs });
  t.is(JSON.parse(listed).devices.length, 2);
});
