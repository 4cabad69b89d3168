// SPDX-License-Identifier: Apache-2.0
// The daemon on a server: what it owns, who may ask it, and what is left when it
// is killed. One guest serves all the checks, in order. Requests go to its socket
// by curl, as anybody's would; the command line is what it is for.

import { join } from 'node:path';
import test from 'ava';
import { buildTool } from '../kernels/world.ts';
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

test.serial("libvirt's XML begins a backup, and is told what came of it", async (t) => {
  const document = `<domainbackup mode='pull'><incremental>monday</incremental>
    <server transport='unix' socket='/run/xml.sock'/>
    <disks><disk name='system' exportname='vda' type='file'><driver type='qcow2'/></disk></disks></domainbackup>`;
  const { stdout } = await guest.run(
    `curl -s -H 'content-type: application/xml' --data-binary ${shellQuote(document)} -w '\n%{http_code}\n' --unix-socket ${socket} 'http://localhost/v1/backups?checkpoint=xml'`,
    { timeoutMs: limitMs },
  );
  const { status, body } = readAnswer(stdout);
  t.is(status, 201, stdout);
  t.regex(body.xml.backup, /<disk name="system".*backupmode="incremental".*exportname="vda"/s);
  t.regex(body.xml.warnings.join(), /driver/);
  t.regex(body.store.why, /./);
  const { stdout: map } = await guest.run(
    `nbdinfo --map=qemu:dirty-bitmap:backup-system 'nbd+unix:///vda?socket=/run/xml.sock'`,
  );
  t.regex(map, /dirty|clean/);
  const changes = await ask('GET', '/v1/backups/xml/changes/system?since=monday');
  t.like(changes.body, { disk: 'system', since: 'monday', checkpoint: 'xml' });
  t.is((await ask('DELETE', '/v1/backups/xml')).status, 200);
});

test.serial('a configuration that is wrong changes nothing, a right one does', async (t) => {
  const write = (devices: string): Promise<unknown> =>
    guest.run(`echo '<stillblock>${devices}</stillblock>' >/etc/stillblock/stillblock.xml`);
  await write('<devices><device path="/dev/null" nam="x"/></devices>');
  const wrong = await ask('POST', '/v1/reload');
  t.is(wrong.body.error.code, 'BAD_CONFIGURATION');
  t.regex(wrong.body.error.message, /stillblock.xml:1:\d+/);
  await guest.run(
    `set -e; printf '#!/bin/sh\\necho $1 >>/run/hooked\\n' >/run/hook; chmod 755 /run/hook`,
  );
  await write(
    `<hooks><hook name="log" script="/run/hook"/></hooks><devices><device path="${one}" name="system"/><device path="${two}" name="data"/><device path="/dev/absent"/></devices>`,
  );
  const events = guest.start(
    `exec curl -sN -H 'last-event-id: 0' --unix-socket ${socket} http://localhost/v1/events`,
  );
  daemon.kill(1);
  await events.waitForOutput(/event: reloaded/, limitMs);
  t.regex(events.stdout, /event: reload-failed/);
  t.regex(events.stdout, /event: device-missing/);
  events.kill(15);
  const { body } = await ask('GET', '/v1/devices');
  t.deepEqual(
    body.devices.map(({ name }: { name: string }) => name),
    ['system', 'data'],
  );
  t.deepEqual((await ask('GET', '/v1/status')).body.missingDevices, ['/dev/absent']);
});

test.serial('killed at any step, it comes up right again', async (t) => {
  t.timeout(10 * 60_000);
  const killer = await buildTool('killer');
  const histories = async (): Promise<string[]> =>
    (await ask('GET', '/v1/devices')).body.devices.map(
      ({
        name,
        generation,
        inSnapshot,
      }: {
        name: string;
        generation: string;
        inSnapshot: boolean;
      }) => `${name} ${generation} ${inSnapshot}`,
    );
  const before = await histories();
  const armed = `LD_PRELOAD=${shellQuote(killer)} KILL_FILE=/run/kill`;
  daemon.kill(9);
  await daemon.wait(limitMs);
  // What is asked, where it is killed, and whether the checkpoint is there afterwards.
  const points = [
    ['begin before the take', 'ioctl 1', curl('POST', '/v1/backups', begin('killed', one)), false],
    ['begin after the take', 'ioctl 2', curl('POST', '/v1/backups', begin('killed', one)), false],
    [
      'the checkpoint is written',
      'fsync 0',
      curl('POST', '/v1/backups', begin('killed', one)),
      false,
    ],
    [
      'the checkpoint is staged',
      'rename 0',
      curl('POST', '/v1/backups', begin('killed', one)),
      false,
    ],
    ['the checkpoint is kept', 'fsync 1', curl('POST', '/v1/backups', begin('killed', one)), true],
    ['a checkpoint is deleted', 'unlink 0', curl('DELETE', '/v1/checkpoints/killed'), true],
    ['a checkpoint has been deleted', 'fsync 0', curl('DELETE', '/v1/checkpoints/killed'), false],
    ['the configuration is read again', 'ioctl 0', curl('POST', '/v1/reload'), false],
  ] as const;
  daemon = await startDaemon(armed);
  for (const [what, point, request, kept] of points) {
    await guest.run(`echo ${point} >/run/kill; ${request}; rm /run/kill`, {
      timeoutMs: limitMs,
      check: false,
    });
    t.is((await daemon.wait(limitMs)).code, 137, what);
    daemon = await startDaemon(armed);
    const { body } = await ask('GET', '/v1/checkpoints');
    const names = body.checkpoints.map(({ name }: { name: string }) => name);
    t.is(names.includes('killed'), kept, `${what}: ${names}`);
    t.true(names.includes('monday'), what);
    t.deepEqual(body.broken, [], what);
    t.deepEqual(await histories(), before, what);
    await guest.run(
      `! ls /dev/stillblock[0-9]* 2>/dev/null; [ -z "$(ls -A /var/lib/stillblock/checkpoints | grep '^\\.')" ]`,
    );
  }
  const again = await ask('POST', '/v1/backups', begin('killed', one));
  t.is(again.status, 201);
  const { incremental } = again.body.disks[0];
  t.true(incremental.includes('monday'), JSON.stringify(again.body.disks));
  daemon.kill(9);
  await daemon.wait(limitMs);
  await guest.run('until ! ls /dev/stillblock[0-9]* >/dev/null 2>&1; do sleep 0.1; done');
});

test.serial('no checkpoint is lost when there is no room for one more', async (t) => {
  await guest.run(
    `set -e; mkdir -p /run/tiny; mount -t tmpfs -o size=20k tmpfs /run/tiny
    sed -i 's|<stillblock>|<stillblock><folders state="/run/tiny"/>|' /etc/stillblock/stillblock.xml`,
  );
  daemon = await startDaemon();
  const made: string[] = [];
  let refused: Answer | undefined;
  for (let index = 1; refused === undefined && index < 20; index += 1) {
    const answer = await ask('POST', '/v1/checkpoints', { name: `c${index}` });
    if (answer.status === 201) {
      made.push(`c${index}`);
    } else {
      refused = answer;
    }
  }
  t.is(refused?.status, 507, JSON.stringify(refused?.body));
  t.true(made.length > 1);
  const list = async (): Promise<string[]> => {
    const { body } = await ask('GET', '/v1/checkpoints');
    t.deepEqual(body.broken, []);
    return body.checkpoints.map(({ name }: { name: string }) => name);
  };
  t.deepEqual(await list(), made);
  t.is((await ask('DELETE', '/v1/checkpoints/c1')).status, 200);
  t.is((await ask('POST', '/v1/checkpoints', { name: 'more' })).status, 201);
  t.deepEqual(await list(), [...made.slice(1), 'more']);
  await guest.run(
    `sed -i 's|<stillblock>|<stillblock><checkpoints keep="2"/>|' /etc/stillblock/stillblock.xml`,
  );
  t.is((await ask('POST', '/v1/reload')).status, 200);
  await ask('DELETE', '/v1/checkpoints/c2');
  t.is((await ask('POST', '/v1/checkpoints', { name: 'newest' })).status, 201);
  t.deepEqual(await list(), ['more', 'newest'], 'only so many are kept');
});

test.serial('it ends cleanly, and its devices stay tracked', async (t) => {
  t.is((await ask('POST', '/v1/backups', begin('last', one))).status, 201);
  daemon.kill(15);
  const { code, stdout } = await daemon.wait(limitMs);
  t.is(code, 0, stdout);
  await guest.run(`! ls /dev/stillblock[0-9]* && ! [ -e ${socket} ]`);
});

test.serial('without it a backup is held by its command, which another ends', async (t) => {
  const alone = guest.start(
    `exec ${cli} backup begin --json --checkpoint alone --store memory --store-size 16M`,
  );
  const [line] = await alone.waitForOutput(/^\{.*"event":"serving".*\}$/m, limitMs);
  t.is(JSON.parse(line).disks.length, 2);
  const second = await ask('POST', '/v1/backups', begin('second', one));
  t.like(second, { status: 409, body: { error: { code: 'BACKUP_RUNNING' } } });
  const { code, stderr } = await guest.run(`${cli} serve`, { check: false, timeoutMs: limitMs });
  t.is(code, 1);
  t.regex(stderr, /another backup is running already \(checkpoint alone\)/);
  const { stdout: hooked } = await guest.run('tail -n2 /run/hooked');
  t.is(hooked, 'before\nafter\n');
  t.is((await ask('DELETE', '/v1/backups/alone')).status, 200);
  const { code: ended, stdout } = await alone.wait(limitMs);
  t.is(ended, 0);
  t.regex(stdout, /"event":"ended"/);
  await guest.shutdown();
});
