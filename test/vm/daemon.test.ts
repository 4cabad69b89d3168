// SPDX-License-Identifier: Apache-2.0
// The daemon on a server: what it owns, who may ask it, and what is left when it
// is killed. One guest serves all the checks, in order. Requests go to its socket
// by curl, as anybody's would; the command line is what it is for.

import { randomUUID } from 'node:crypto';
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import test from 'ava';
import { buildTool } from '../kernels/world.ts';
import { certify } from './certify.ts';
import { checkout } from './checkout.ts';
import type { GuestCommand } from './command.ts';
import { cli } from './command-line.ts';
import { bootGuest, type Guest } from './guest.ts';
import { shellQuote } from './initrd.ts';

const MiB = 1 << 20;
const limitMs = 120_000;
const socket = '/run/stillblock/control.sock';
const metrics = '/run/metrics.sock';
/** A file of pre-shared keys, and a port whose clients need one. */
const keys = '/etc/stillblock/keys';
const keyPort = 10_810;
/** Certificates of the server, and of two clients that its authority knows. */
const pki = { server: '/etc/stillblock/pki', proxy: '/run/proxy', guest: '/run/guest' } as const;
const twoBytes = 16 * MiB;

let guest: Guest;
let daemon: GuestCommand;
/** Device nodes of the two disks. */
let one = '';
let two = '';
const nameOf = (device: string): string => device.replace('/dev/', '');
/** What all restarts are to leave as it is. */
let trackedAs: readonly string[] = [];

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
const begin = (checkpoint: string, device: string, id: string = randomUUID()): object => ({
  id,
  checkpoint,
  store: { places: ['memory'], sizeBytes: 16 * MiB },
  disks: [{ path: device }],
});

/**
 * Starts a daemon as a service manager would, and waits until it says that it is ready.
 *
 * @param wrapper that it is run by
 * @param knock a request that it is started for
 */
async function startDaemon(wrapper = '', knock?: string): Promise<GuestCommand> {
  const told = guest.start('exec socat -u UNIX-RECV:/run/notify.sock STDOUT');
  await guest.run('until [ -S /run/notify.sock ]; do sleep 0.05; done');
  const command = guest.start(
    `export NOTIFY_SOCKET=/run/notify.sock; exec ${wrapper} ${cli} serve -v 2>&1`,
  );
  if (knock !== undefined) {
    await guest.run(`until [ -S ${socket} ]; do sleep 0.1; done; ${knock}`, { timeoutMs: limitMs });
  }
  await told.waitForOutput(/READY=1/, limitMs);
  told.kill(15);
  await told.wait(limitMs);
  return command;
}

/** The capabilities that the unit leaves to the service, without `CAP_`. */
async function unitCapabilities(): Promise<string[]> {
  const unit = await readFile(join(checkout, 'configs/systemd/stillblock.service'), 'utf8');
  const [, names = ''] = /^CapabilityBoundingSet=(.*)$/m.exec(unit) ?? [];
  return names.split(' ').map((name) => name.replace('CAP_', '').toLowerCase());
}

/** The devices, their histories, and whether they are in a snapshot. */
async function histories(): Promise<string[]> {
  const { body } = await ask('GET', '/v1/devices');
  return body.devices.map(
    ({ name, generation, inSnapshot }: { name: string; generation: string; inSnapshot: boolean }) =>
      `${name} ${generation} ${inSnapshot}`,
  );
}

const scrape = async (path: string): Promise<string> =>
  (await guest.run(`curl -s --unix-socket ${path} http://localhost/metrics`)).stdout;

test.before(async () => {
  guest = await bootGuest({
    kernel: '6.1',
    disks: [
      { name: 'one', sizeBytes: 64 * MiB },
      { name: 'two', sizeBytes: twoBytes },
    ],
    memoryMiB: 1024,
  });
  [one, two] = (await Promise.all([guest.disk('one'), guest.disk('two')])) as [string, string];
  await guest.run(
    `set -e; mkfs.ext4 -q -F ${one}; mkdir -p /srv/one; mount ${one} /srv/one
    head -c 8M /dev/urandom | dd of=${two} bs=1M iflag=fullblock oflag=direct status=none
    mkdir -p -m 700 /etc/stillblock /run/stillblock
    echo '<stillblock><devices><device path="${one}" name="system"/></devices><metrics socket="${metrics}"/></stillblock>' >/etc/stillblock/stillblock.xml`,
  );
  await guest.loadModule();
  // With the privileges of the service, started by the first who asks.
  const capabilities = (await unitCapabilities()).map((name) => `,+${name}`).join('');
  daemon = await startDaemon(
    `setpriv --no-new-privs --bounding-set=-all${capabilities} systemd-socket-activate -E NOTIFY_SOCKET --fdname=control -l ${socket}`,
    curl('GET', '/v1/devices'),
  );
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
  // The root's overlay is no place for histories: the daemon goes on without them, and says so.
  const lost = [{ device: one, reason: 'NO_PLACE' }];
  t.like((await ask('GET', '/v1/status')).body, { lostAtReboot: lost, begunAnew: lost });
  const attached = await ask('POST', '/v1/devices', { devices: [two] });
  t.is(attached.status, 201);
  t.like(attached.body.devices[0], { name: nameOf(two), device: two, inSnapshot: false });
});

test.serial('it has no more privileges than the service', async (t) => {
  const { pid } = (await ask('GET', '/v1/status')).body.daemon;
  const { stdout } = await guest.run(`cat /proc/${pid}/status`);
  const [, effective = ''] = /^CapEff:\t(\w+)$/m.exec(stdout) ?? [];
  const bits = BigInt(`0x${effective}`).toString(2).replaceAll('0', '');
  t.is(bits.length, (await unitCapabilities()).length, stdout);
  t.regex(stdout, /^NoNewPrivs:\t1$/m);
});

test.serial('a backup begun by the command line is held by the daemon', async (t) => {
  const rate = 2 * MiB;
  const { stdout } = await guest.run(
    `${cli} backup begin --json --checkpoint monday --disk ${one} --disk ${two} --store memory --store-size 16M \
      --max-rate ${rate} --metrics /run/begin.sock`,
    { timeoutMs: limitMs },
  );
  const serving = JSON.parse(stdout);
  t.like(serving, { event: 'serving', state: 'serving', checkpoint: 'monday' });
  t.true(serving.freezeMs > 0, 'a file system was frozen');
  const of = (device: string, list: 'disks' | 'exports'): { image: string; uris: string[] } => {
    const { name } = serving.disks.find((disk: { device: string }) => disk.device === device);
    return serving[list].find((each: { name: string }) => each.name === name);
  };
  const { stdout: took } = await guest.run(
    `set -e; e2fsck -fn ${of(one, 'disks').image} >&2
    begin=$(date +%s%N); qemu-img dd -O raw bs=1M count=6 if=${of(two, 'exports').uris[0]} of=/run/read; echo $(($(date +%s%N) - begin))
    cmp -n ${6 * MiB} ${two} /run/read`,
    { timeoutMs: limitMs },
  );
  const measured = await scrape('/run/begin.sock');
  const read = new RegExp(`^stillblock_nbd_read_bytes_total{export="${nameOf(two)}"} (\\d+)$`, 'm');
  const readBytes = Number(read.exec(measured)?.[1]);
  t.true(readBytes >= 6 * MiB, measured);
  t.true(Number(took) / 1e9 > (6 * MiB) / rate - 0.1, `${took} ns`);
  const { stdout: ended } = await guest.run(`${cli} backup end --json`, { timeoutMs: limitMs });
  t.deepEqual(JSON.parse(ended), { ended: { checkpoint: 'monday', failed: false } });
});

/** UUIDs of a backup that has ended and of one that runs. */
const ids = { ended: '', running: randomUUID() };

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
  const held = answers.find(({ status }) => status === 201)?.body;
  ids.ended = held?.id;
  const byId = `/v1/backups/${held?.checkpoint}?id=${held?.id}`;
  t.is((await ask('DELETE', byId)).status, 200);
});

test.serial('of different disks they get two snapshots', async (t) => {
  await guest.run(
    `${curl('POST', '/v1/backups', begin('first', one, ids.running))} >/run/left & ${curl('POST', '/v1/backups', begin('second', two))} >/run/right; wait`,
    { timeoutMs: limitMs },
  );
  const { body } = await ask('GET', '/v1/exports');
  const names = body.exports.map(({ name }: { name: string }) => name);
  t.true(names.includes('system') && names.includes(nameOf(two)), names.join(' '));
  t.true(names.includes('system@monday'));
  const measured = await scrape(metrics);
  for (const checkpoint of ['first', 'second']) {
    t.regex(
      measured,
      new RegExp(`^stillblock_snapshot_state{backup="${checkpoint}",state="serving"} 1$`, 'm'),
    );
    t.regex(
      measured,
      new RegExp(`^stillblock_store_limit_bytes{backup="${checkpoint}"} [1-9]`, 'm'),
    );
  }
  const before = await histories();
  const refusals: readonly (readonly [string, string, unknown, number, string])[] = [
    ['POST', '/v1/devices', { devices: ['/dev/null'] }, 422, 'NOT_BLOCK_DEVICE'],
    ['POST', '/v1/devices', { devices: ['/dev/absent'] }, 404, 'ENOENT'],
    ['POST', '/v1/devices', { devices: [one] }, 409, 'ALREADY_ATTACHED'],
    ['POST', '/v1/devices/detach', { devices: ['system'] }, 409, 'IN_SNAPSHOT'],
    ['POST', '/v1/devices/detach', { devices: ['system', 'absent'] }, 404, 'ENOENT'],
    ['GET', '/v1/devices/absent', undefined, 404, 'ENOENT'],
    ['POST', '/v1/devices/system/mark', { offset: 2 ** 40, length: 1 }, 400, 'USAGE'],
    ['POST', '/v1/backups', begin('first', two), 409, 'BACKUP_RUNNING'],
    ['POST', '/v1/backups', begin('monday', two), 409, 'CHECKPOINT_EXISTS'],
    ['POST', '/v1/backups', begin('third', two, ids.running), 409, 'BACKUP_RUNNING'],
    ['POST', '/v1/backups', begin('third', two, ids.ended), 409, 'CHECKPOINT_EXISTS'],
    ['POST', '/v1/backups', begin('third', two, 'wednesday'), 400, 'USAGE'],
    ['POST', '/v1/backups', begin('third', 'absent'), 404, 'ENOENT'],
    ['DELETE', '/v1/backups/first?id=another', undefined, 404, 'NO_BACKUP'],
    ['DELETE', '/v1/checkpoints/first', undefined, 409, 'BACKUP_RUNNING'],
    ['GET', '/v1/backups/first/changes/absent', undefined, 404, 'NO_BACKUP'],
    ['GET', '/v1/backups/first/changes/system?since=never', undefined, 404, 'NO_CHECKPOINT'],
  ];
  const { stdout } = await guest.run(
    refusals.map(([method, path, body]) => curl(method, path, body)).join('\n'),
    { timeoutMs: limitMs },
  );
  const lines = stdout.trimEnd().split('\n');
  const told = refusals.map(([method, path, body], index) => {
    const [text = '', status] = lines.slice(index * 2);
    return [method, path, body, Number(status), JSON.parse(text).error.code];
  });
  t.deepEqual(told, refusals as unknown);
  t.deepEqual(await histories(), before);
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
  t.regex(body.store.why, /^no file system has the room; .* of memory may be used$/);
  const { stdout: map } = await guest.run(
    `nbdinfo --map=qemu:dirty-bitmap:backup-system 'nbd+unix:///vda?socket=/run/xml.sock'`,
  );
  t.regex(map, /dirty|clean/);
  const changes = await ask('GET', '/v1/backups/xml/changes/system?since=monday');
  t.like(changes.body, { disk: 'system', since: 'monday', checkpoint: 'xml' });
  t.is((await ask('DELETE', '/v1/backups/xml')).status, 200);
});

test.serial('what changed is told, drawn, and fills a store until it is full', async (t) => {
  const [offset, length] = [2 * MiB, MiB];
  await guest.run(`dd if=/dev/urandom of=${two} bs=64K seek=32 count=16 oflag=direct status=none`);
  const { status, body } = await ask('POST', '/v1/backups', {
    checkpoint: 'filling',
    disks: [{ path: two }],
  });
  t.is(status, 201, JSON.stringify(body));
  t.like(body.store, { place: '/srv/one', overflowSeconds: null });
  t.regex(body.store.why, /^\/srv\/one is not in the snapshot and has .* free$/);
  const writer = guest.start(
    `for seek in $(seq 0 4 156); do dd if=/dev/urandom of=${two} bs=64K seek=$seek count=4 oflag=direct status=none; sleep 0.3; done`,
  );
  const map = `${cli} map ${two}`;
  const shown = await guest.run(`${map} --json; ${map}; ${map} --since second --format picture`, {
    timeoutMs: limitMs,
  });
  const [json = '', ...lines] = shown.stdout.split('\n');
  t.like(JSON.parse(json), {
    disk: nameOf(two),
    since: 'second',
    checkpoint: 'filling',
    sizeBytes: twoBytes,
    changedBytes: length,
    extents: [{ offset, length }],
  });
  const people = lines.join('\n');
  t.regex(people, /: 1 MiB of 16 MiB \(6\.3 %\) changed between second and filling\n/);
  t.regex(people, new RegExp(`^ *${offset} +${length} +1 MiB *$`, 'm'));
  t.regex(people, /^·{32}█{16}·{32}\n·{80}\n·{80}\n·{16}$/m);
  await writer.wait(limitMs);
  await guest.run(
    `until curl -s --unix-socket ${metrics} http://localhost/metrics | grep -q '^stillblock_store_overflow_seconds{backup="filling"} [0-9]'; do sleep 1; done`,
    { timeoutMs: limitMs },
  );
  const { stdout: told } = await guest.run(`${cli} status --json`, { timeoutMs: limitMs });
  const { backup, trackedDevices } = JSON.parse(told);
  t.like(backup, { checkpoint: 'filling' });
  t.is(trackedDevices, 2);
  const { overflowSeconds, usedBytes, capacityBytes } = backup.store;
  t.true(usedBytes >= 10 * MiB && usedBytes < capacityBytes, told);
  t.true(overflowSeconds > 1 && overflowSeconds < 600, told);
  t.is((await ask('DELETE', '/v1/backups/filling')).status, 200);
});

test.serial('a configuration that is wrong changes nothing, a right one does', async (t) => {
  const write = (devices: string): Promise<unknown> =>
    guest.run(`echo '<stillblock>${devices}</stillblock>' >/etc/stillblock/stillblock.xml`);
  await write('<devices><device path="/dev/null" nam="x"/></devices>');
  const wrong = await ask('POST', '/v1/reload');
  t.is(wrong.body.error.code, 'BAD_CONFIGURATION');
  t.regex(wrong.body.error.message, /stillblock.xml:1:\d+/);
  await guest.run(
    `set -e; printf '#!/bin/sh\\necho $1 >>/run/hooked\\n' >/run/hook; chmod 755 /run/hook
    umask 077; printf 'anna:%064d\\nbob:%064d\\n' 1 2 >${keys}`,
  );
  const { server, ...clients } = pki;
  await certify(guest, server, clients);
  await write(
    `<hooks><hook name="log" script="/run/hook"/></hooks><devices><device path="${one}" name="system"/><device path="${two}" name="data"/><device path="/dev/absent"/></devices>
    <nbd><listen address="127.0.0.1" port="${keyPort}"/><tls psk="${keys}" certificates="${pki.server}" verify-peer="yes"><allow user="anna" export="system*"/><allow subject="CN=proxy,*" export="data"/></tls></nbd>
    <api socket="/run/other.sock"/>`,
  );
  const events = guest.start(
    `exec curl -sN -H 'last-event-id: 0' --unix-socket ${socket} http://localhost/v1/events`,
  );
  daemon.kill(1);
  const [, warnings = ''] = await events.waitForOutput(/event: reloaded\ndata: (.*)\n/, limitMs);
  t.deepEqual(JSON.parse(warnings).warnings, ['<api> has changed: restart the daemon for that']);
  await guest.run("sed -i 's|<api[^>]*>||' /etc/stillblock/stillblock.xml");
  t.deepEqual((await ask('POST', '/v1/reload')).body, { reloaded: true, warnings: [] });
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

test.serial('the configuration says who may read what', async (t) => {
  trackedAs = await histories();
  const { status, body } = await ask('POST', '/v1/backups', {
    checkpoint: 'secret',
    store: { places: ['memory'], sizeBytes: 16 * MiB },
  });
  t.is(status, 201, JSON.stringify(body));
  const uri = (user: string, name: string): string =>
    `'nbds://${user}@127.0.0.1:${keyPort}/${name}?tls-psk-file=${keys}'`;
  const reads = async (where: string): Promise<boolean> =>
    (await guest.run(`nbdinfo --size ${where}`, { check: false })).code === 0;
  t.true(await reads(uri('anna', 'system')));
  t.true(await reads(uri('anna', 'system@monday')));
  t.false(await reads(uri('anna', 'data')), 'another export');
  t.false(await reads(uri('bob', 'system')), 'another user');
  t.false(await reads(`nbd://127.0.0.1:${keyPort}/system`), 'without TLS');
  const shown = (folder: string, name: string): string =>
    `'nbds://127.0.0.1:${keyPort}/${name}?tls-certificates=${folder}'`;
  t.true(await reads(shown(pki.proxy, 'data')));
  t.false(await reads(shown(pki.proxy, 'system')), 'another export');
  t.false(await reads(shown(pki.guest, 'data')), 'another certificate of the same authority');
});

test.serial('killed at any step, it comes up right again', async (t) => {
  t.timeout(10 * 60_000);
  const killer = await buildTool('killer');
  const armed = `env LD_PRELOAD=${shellQuote(killer)} KILL_FILE=/run/kill`;
  // While it serves.
  daemon.kill(9);
  await daemon.wait(limitMs);
  // What is asked, where it is killed, and whether the checkpoint is there afterwards. What
  // is left of its file alone at other calls is in src/checkpoints.
  const points = [
    ['begin before the take', 'ioctl 1', curl('POST', '/v1/backups', begin('killed', one)), false],
    ['begin after the take', 'ioctl 2', curl('POST', '/v1/backups', begin('killed', one)), false],
    [
      'the checkpoint is staged',
      'rename 0',
      curl('POST', '/v1/backups', begin('killed', one)),
      false,
    ],
    ['the checkpoint is kept', 'fsync 1', curl('POST', '/v1/backups', begin('killed', one)), true],
    ['the configuration is read again', 'ioctl 0', curl('POST', '/v1/reload'), true],
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
    t.deepEqual(await histories(), trackedAs, what);
    await guest.run(
      `! ls /dev/stillblock[0-9]* 2>/dev/null; [ -z "$(ls -A /var/lib/stillblock/checkpoints | grep '^\\.')" ]`,
    );
  }
  t.is((await ask('DELETE', '/v1/checkpoints/killed')).status, 200);
  const again = await ask('POST', '/v1/backups', begin('killed', one));
  t.is(again.status, 201);
  const { incremental } = again.body.disks[0];
  t.true(incremental.includes('monday'), JSON.stringify(again.body.disks));
  await guest.run(
    `echo unlink 0 >/run/kill; ${curl('DELETE', '/v1/backups/killed')}; rm /run/kill`,
    { timeoutMs: limitMs, check: false },
  );
  t.is((await daemon.wait(limitMs)).code, 137, 'the backup ends');
  const { stdout: files } = await guest.run(
    'until ! ls /dev/stillblock[0-9]* >/dev/null 2>&1; do sleep 0.1; done; ls -A /var/lib/stillblock/checkpoints',
  );
  t.regex(files, /^killed\.xml$/m);
  t.regex(files, /^monday\.xml$/m);
});

test.serial('no checkpoint is lost when there is no room for one more', async (t) => {
  await guest.run(
    `set -e; mkdir -p /run/tiny; mount -t tmpfs -o size=20k tmpfs /run/tiny
    sed -i 's|<stillblock>|<stillblock><folders state="/run/tiny"/>|' /etc/stillblock/stillblock.xml`,
  );
  daemon = await startDaemon();
  t.deepEqual(await histories(), trackedAs, 'what its last end had begun is over');
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
});

test.serial('systemd starts it in its sandbox, for the first who asks', async (t) => {
  const units = '/etc/systemd/system';
  await guest.run(
    `set -e
    rm -f ${socket}
    cp ${shellQuote(join(checkout, 'configs/systemd'))}/* ${units}/
    # Only what is tested starts, and a checkout may be where the sandbox hides all.
    for unit in service socket; do
      mkdir -p ${units}/stillblock.$unit.d
      printf '[Unit]\nDefaultDependencies=no\n' >${units}/stillblock.$unit.d/guest.conf
    done
    printf '[Service]\nBindReadOnlyPaths=%s\nStandardOutput=append:/run/serve.log\nStandardError=inherit\n' ${shellQuote(checkout)} >>${units}/stillblock.service.d/guest.conf
    for unit in modprobe@stillblock.service network-online.target; do ln -sf /dev/null ${units}/$unit; done
    cat >/usr/bin/stillblock <<'END'
#!/bin/sh
exec ${cli} "$@"
END
    chmod 755 /usr/bin/stillblock
    echo '<stillblock><devices><device path="${one}" name="system"/></devices></stillblock>' >/etc/stillblock/stillblock.xml
    mountpoint -q /sys/fs/cgroup || mount -t cgroup2 cgroup2 /sys/fs/cgroup
    [ -s /etc/machine-id ] || echo 0123456789abcdef0123456789abcdef >/etc/machine-id
    mkdir -p /sys/fs/cgroup/box`,
  );
  const systemd = guest.start(
    `echo $$ >/sys/fs/cgroup/box/cgroup.procs
    exec unshare --cgroup --pid --fork --kill-child --mount --mount-proc \
      sh -c 'umount /sys/fs/cgroup; mount -t cgroup2 cgroup2 /sys/fs/cgroup
        exec env container=other /lib/systemd/systemd --system --unit=stillblock.socket --log-target=kmsg' 2>&1`,
  );
  await guest.run(`until [ -S ${socket} ]; do sleep 0.2; done`, { timeoutMs: limitMs });
  const { status, body } = await ask('POST', '/v1/backups', {
    checkpoint: 'sandbox',
    disks: [{ path: 'system' }],
  });
  const log = await guest.run('cat /run/serve.log; dmesg | tail -n 40', { check: false });
  t.is(status, 201, `${JSON.stringify(body)}\n${log.stdout}`);
  t.true(body.freezeMs > 0);
  await guest.run(`e2fsck -fn ${body.disks[0].image}`, { timeoutMs: limitMs });
  const { stdout } = await guest.run('cat /proc/$(pgrep -f "^node .*serve")/status');
  t.regex(stdout, /^Seccomp:\t2$/m);
  systemd.kill(9);
  await systemd.wait(limitMs);
  await guest.shutdown();
});
