// SPDX-License-Identifier: Apache-2.0
// Who owns a snapshot dies, at each step of its begin and while it serves; asks for
// more than there is; and the module comes and goes under writes. Nothing may be left
// of any of it.

import { basename } from 'node:path';
import test, { type ExecutionContext } from 'ava';
import { testKernel } from '../vm/checkout.ts';
import type { GuestCommand } from '../vm/command.ts';
import { bootGuest, type Guest } from '../vm/guest.ts';
import { shellQuote } from '../vm/initrd.ts';
import {
  askLimitMs,
  Backup,
  buildKernelModule,
  buildTool,
  Conversation,
  cliLimitMs,
  MiB,
  pace,
  refusalIn,
  withProduct,
} from './world.ts';

const kernel = testKernel();
const killed = 128 + 9;
const ENOMEM = 12;
const disks = { raw: 40, mounted: 64, store: 96 } as const;
const writtenBytes = 24 * MiB;
const paceUs = pace(12_000);
const mapped = '/dev/mapper/mounted';
/** With the checkers a round takes ten times as long, and more is seen in each. */
const checked = kernel === 'debug';
/** How often the module comes and goes. */
const reloads = checked ? 2 : 6;
/** How often a snapshot ends while work of it takes its time to be queued. */
const slowEnds = checked ? 10 : 40;
/** How often one ends while it is read. */
const readEnds = 4;
/** How long a take waits for a freeze that does not come; it has to be seen waiting. */
const freezeMs = checked ? 20_000 : 5_000;
/** How long fio rests after each write while the module comes and goes, microseconds. */
const thinkUs = checked ? 20_000 : 0;
const fioLimitMs = 120_000;
/** More than a begin makes. */
const manyCalls = 40;
/** It is killed at every so many-th call: with the checkers at others in each run. */
const callStep = checked ? 4 : 1;

let guest: Guest;
let killer = '';
let ioctls = '';
let oracleProgram = '';
let oracle: Conversation;
let module: Conversation;
const nodes = new Map<string, string>();
const node = (name: keyof typeof disks): string => nodes.get(name) ?? '';

test.before(async () => {
  [ioctls = '', oracleProgram = '', killer = ''] = await Promise.all(
    (['ioctls', 'oracle', 'killer'] as const).map(buildTool),
  );
  guest = await bootGuest({
    kernel,
    disks: Object.entries(disks).map(([name, size]) => ({ name, sizeBytes: size * MiB })),
    saved: true,
  });
  for (const name of Object.keys(disks)) nodes.set(name, await guest.disk(name));
  await guest.run(
    `set -e
    mkdir -p /srv/mounted /srv/store
    dmsetup create --noudevsync mounted --table '0 ${disks.mounted * 2048} linear ${node('mounted')} 0'
    dmsetup mknodes
    mkfs.ext4 -q -F ${mapped}; mount ${mapped} /srv/mounted
    mkfs.ext4 -q -F ${node('store')}; mount ${node('store')} /srv/store`,
  );
  await guest.loadModule();
  module = new Conversation(guest, ioctls);
  oracle = new Conversation(guest, oracleProgram);
  await module.require(`attach ${node('raw')}`);
  await module.require(`attach ${mapped}`);
  await oracle.require(`open raw ${node('raw')} ${writtenBytes} ${paceUs}`);
  await oracle.require('start raw');
});

test.after.always(async () => {
  await guest?.kill();
});

/** Free blocks of the store's file system; what was deleted is given back a little later. */
const freeBlocks = (): Promise<string> =>
  guest.run('sync -f /srv/store; stat -f -c %f /srv/store').then(({ stdout }) => stdout.trim());

/** Where the writer waits: for us, or for a timer of the emulated machine that is lost. */
const stuckWriter = `echo w >/proc/sysrq-trigger; cat /proc/uptime
  for task in /proc/$(pgrep -o oracle)/task/*; do cat $task/wchan $task/stat $task/stack; done
  grep . /sys/block/*/inflight; grep LOC /proc/interrupts; sleep 3; grep LOC /proc/interrupts`;

/**
 * No image, no tracker in a snapshot, no file in the store, nobody frozen or held.
 *
 * @param asked of the guest besides, last; in one command, since each costs an emulated
 *   processor with checkers a second
 * @returns what that has printed
 */
async function assertNothingLeft(
  t: ExecutionContext,
  free: string,
  asked = 'true',
): Promise<string> {
  const { stdout: told } = await guest.run(
    `while compgen -G '/dev/stillblock[0-9]*' >/dev/null; do :; done
    until ! [ -e /srv/store/file ] || rm /srv/store/file 2>/dev/null; do :; done
    until sync -f /srv/store; [ "$(stat -f -c %f /srv/store)" -ge ${free} ]; do :; done
    echo alive >/srv/mounted/alive; sync -f /srv/mounted
    ${asked}`,
  );
  for (const tracker of await module.require('list')) {
    t.is(Number.parseInt(tracker.split(':')[4] ?? '', 16) & 1, 0, 'it is in a snapshot still');
  }
  const [, , errno] = await oracle.require('reach raw 20').catch(async (error: unknown) => {
    const { stdout } = await guest.run(stuckWriter, { check: false });
    t.log(stdout, guest.console());
    throw error;
  });
  t.is(errno, '0');
  return told;
}

/**
 * What is killed at its n-th call: the command line's begin where it takes part, else one
 * that consists of its requests.
 */
async function beginKilledAt(at: number): Promise<GuestCommand> {
  const preload = `: >/run/calls; export KILL_AT=${at} KILL_LOG=/run/calls LD_PRELOAD=${shellQuote(killer)}`;
  if (withProduct) {
    const command = Backup.commandLine(`step${at}`, '--store /srv/store --store-size 32M');
    // Without the checkpoints of the turns before, each of which asks for its changes.
    return guest.start(
      `rm -f /var/lib/stillblock/checkpoints/*; ${preload} UV_THREADPOOL_SIZE=1; exec ${command}`,
    );
  }
  const ids = (await module.require('list')).map((words) => words.split(':')[0]);
  const begin = guest.start(
    `fallocate -l 32M /srv/store/file; ${preload}; exec ${shellQuote(ioctls)}`,
  );
  begin.write(
    `list
take step trackers=${ids.join(',')} mounts=/srv/mounted stores=file:/srv/store/file,memory:${MiB}
state step
map step 0 0
add step memory:${MiB}
`,
  );
  return begin;
}

/** What says that it has come to its end: the event, or an answer to each request. */
const serving: RegExp = withProduct ? /"event":"serving"/ : /^(?:ok.*\n){5}/;

test.serial('a backup that is killed at any step of its begin leaves nothing', async (t) => {
  t.timeout(15 * 60_000);
  const free = await freeBlocks();
  const killedAt: string[] = [];
  const first = 1 + Math.floor(Math.random() * callStep);
  for (let at = first; at < manyCalls; at += callStep) {
    const begin = await beginKilledAt(at);
    const served = await begin.waitForOutput(serving, cliLimitMs).then(
      () => true,
      () => false,
    );
    if (served) {
      // Past the last step: killed while it serves.
      begin.kill(9);
    }
    t.is((await begin.wait(cliLimitMs)).code, killed, begin.stderr);
    const calls = await assertNothingLeft(t, free, 'echo "$(</run/calls)"');
    if (served) break;
    killedAt.push(calls.trim().split('\n').at(-1) ?? '');
  }
  t.log(killedAt);
  t.true(first + callStep * killedAt.length < manyCalls, 'it never came to serve');
  if (callStep > 1) {
    t.true(killedAt.length > 1, killedAt.join('\n'));
    return;
  }
  if (!withProduct) {
    // Its requests: list, extents, take, two images, state, image, map, add.
    t.is(killedAt.filter((line) => line.includes('ioctl')).length, 9, killedAt.join('\n'));
    return;
  }
  // Its ioctls (info, list, extents, take, image, state), the store's file, the checkpoint's.
  t.true(killedAt.length >= 10, killedAt.join('\n'));
  for (const call of ['fallocate', 'fsync', 'rename', 'ioctl']) {
    t.true(
      killedAt.some((line) => line.includes(call)),
      `it was never killed before ${call}`,
    );
  }
});

test.serial(
  'an owner that is killed while its take waits for a freeze leaves nothing',
  async (t) => {
    const free = await freeBlocks();
    const ids = (await module.require('list')).map((word) => word.split(':')[0]);
    await guest.run('dmsetup suspend --noflush --nolockfs mounted');
    const other = new Conversation(guest, ioctls);
    await other.require('list');
    // With the checkers it takes longer than the take waits.
    const { stdout: pid } = await guest.run('pgrep -nx ioctls');
    const take = other.ask(
      `take stuck trackers=${ids.join(',')} mounts=/srv/mounted stores=memory:${16 * MiB} freeze=${freezeMs}`,
    );
    take.catch(() => {});
    await guest.run(`until [[ $(</proc/${pid.trim()}/stack) = *stb_* ]]; do sleep 0.1; done`, {
      timeoutMs: freezeMs,
    });
    await other.kill();
    await guest.run('dmsetup resume --noudevsync mounted');
    await assertNothingLeft(t, free);
  },
);

test.serial('a snapshot ends while another processor is about to queue its work', async (t) => {
  t.timeout(10 * 60_000);
  const slow = await buildKernelModule('slow-queue', kernel);
  const { stdout } = await guest.run(
    `awk '$1 == "stillblock" { print "start=" $6, "size=" $2 }' /proc/modules`,
  );
  await guest.run(`insmod ${shellQuote(slow)} ${stdout.trim()}`);
  const [id] = (await module.require('list'))[0]?.split(':') ?? [];
  const fio = guest.start(
    `exec fio --name=ending --filename=${node('raw')} --offset=24M --size=16M --rw=randwrite --bs=4k --direct=1 \
      --ioengine=psync --numjobs=3 --thread --norandommap --time_based --runtime=600 --minimal`,
  );
  const completed = `awk '{ print $5 }' /sys/block/${basename(node('raw'))}/stat`;
  await guest.run(
    `before=$(${completed}); until [ $(${completed}) -gt $((before + 1000)) ]; do :; done`,
  );
  for (let round = 0; round < slowEnds; round += 1) {
    await module.require(`take ending trackers=${id} stores=memory:${32 * MiB}`);
    await module.require('close ending');
  }
  // A write that was forgotten would keep it from ending.
  fio.kill(2);
  const { stdout: figures } = await fio.wait(fioLimitMs);
  t.is(figures.split(';')[4], '0', figures);
  const [, , errno] = await oracle.require('reach raw 20');
  t.is(errno, '0');
  await guest.run('rmmod slow_queue');
  guest.assertCleanConsole();
});

/**
 * Reads an image for as long as it is there, and goes on for a while: later kernels say that a
 * disk that has gone has no bytes, rather than EIO.
 */
const reader = `
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT)
buffer = mmap.mmap(-1, 65536)
print("reads", flush=True)
at = failed = 0
while failed < 2000:
    at = (at + 65536) % ${writtenBytes}
    try: failed += os.preadv(fd, [buffer], at) == 0
    except OSError: failed += 1
`;

test.serial(
  'who reads an image while its snapshot ends gets errors, and none too late',
  async (t) => {
    const [id] = (await module.require('list'))[0]?.split(':') ?? [];
    for (let round = 0; round < readEnds; round += 1) {
      const [image] = await module.require(`take read trackers=${id} stores=memory:${32 * MiB}`);
      const reads = guest.start(`exec python3 -c ${shellQuote(reader)} /dev/${image}`);
      await reads.waitForOutput(/^reads$/m, askLimitMs);
      // Some of it has been preserved by then.
      await oracle.require('reach raw 20');
      await module.require('close read');
      t.is((await reads.wait(askLimitMs)).code, 0, reads.stderr);
    }
  },
);

test.serial('a store larger than the memory is refused', async (t) => {
  const [id] = (await module.require('list'))[0]?.split(':') ?? [];
  const answer = await module.ask(`take large trackers=${id} stores=memory:${2 ** 40}`);
  t.like(refusalIn(answer), { errno: ENOMEM, reason: 'NO_MEMORY' });
  await module.require(`take small trackers=${id} stores=memory:${16 * MiB}`);
  const more = await module.ask(`add small memory:${2 ** 40}`);
  t.like(refusalIn(more), { errno: ENOMEM, reason: 'NO_MEMORY' });
  const [state, , , capacity] = await module.require('state small');
  t.deepEqual([state, capacity], ['held', String(16 * MiB)]);
  await module.require('close small');
});

test.serial('the module stays as long as it is needed', async (t) => {
  const refused = await guest.run('rmmod stillblock', { check: false });
  t.not(refused.code, 0, 'it unloads under its trackers');
  t.regex(refused.stderr, /in use/);
  const [id = ''] = (await module.require('list'))[0]?.split(':') ?? [];
  await module.require(`take held trackers=${id} stores=memory:${16 * MiB}`);
  t.not((await guest.run('rmmod stillblock', { check: false })).code, 0);
  t.is(refusalIn(await module.ask(`detach ${id}`))?.reason, 'IN_SNAPSHOT');
  await module.require('close held');
  await module.require('detach all');
  await guest.run('rmmod stillblock');
  await guest.loadModule();
});

test.serial(
  'the module is refused where its hook cannot be had, and keeps it from others',
  async (t) => {
    const other = `insmod ${shellQuote(await buildKernelModule('other-filter', kernel))}`;
    const tracing = (on: number) => `echo ${on} >/proc/sys/kernel/ftrace_enabled`;
    await guest.run('rmmod stillblock');
    for (const [prepare, undo] of [
      [other, 'rmmod other_filter'],
      [tracing(0), tracing(1)],
    ] as const) {
      await guest.run(prepare);
      await t.throwsAsync(guest.loadModule(), { message: /resource busy/ });
      const { stdout } = await guest.run(
        `dmesg | grep 'stillblock: cannot hook' | tail -n1; ${undo}`,
      );
      t.regex(stdout, /another filter or a live patch holds it, or kernel.ftrace_enabled is 0/);
    }
    await guest.loadModule();
    const [id] = await module.require(`attach ${node('raw')}`);
    for (const command of [other, tracing(0)]) {
      t.not((await guest.run(command, { check: false })).code, 0, command);
    }
    await module.require(`detach ${id}`);
    await guest.run(other);
    t.is(refusalIn(await module.ask(`attach ${node('raw')}`))?.reason, 'HOOK_BUSY');
    await guest.run('rmmod other_filter');
  },
);

test.serial('the module comes and goes under writes', async (t) => {
  t.timeout(10 * 60_000);
  const fio = guest.start(
    `exec fio --name=raw --filename=/srv/mounted/fio --size=24M --rw=randwrite --bsrange=4k-64k --direct=1 \
      --ioengine=libaio --iodepth=8 --verify=crc32c --verify_fatal=1 --do_verify=1 --loops=1000 --thinktime=${thinkUs} --minimal`,
  );
  await guest.run('until [ -s /srv/mounted/fio ]; do :; done');
  for (let round = 0; round < reloads; round += 1) {
    for (const device of [node('raw'), mapped]) await module.require(`attach ${device}`);
    const ids = (await module.require('list')).map((word) => word.split(':')[0]);
    const [completed] = await oracle.require('now raw');
    const images = await module.require(
      `take round trackers=${ids.join(',')} mounts=/srv/mounted stores=memory:${96 * MiB}`,
    );
    const [, submitted] = await oracle.require('now raw');
    await oracle.require('reach raw 100');
    await oracle.require(`check raw /dev/${images[0]} ${completed} ${submitted}`);
    await guest.run(`e2fsck -fn /dev/${images[1]} >/dev/null`, { timeoutMs: askLimitMs });
    await module.require('close round');
    await module.require('detach all');
    await guest.run('rmmod stillblock');
    const [, , errno] = await oracle.require('reach raw 20');
    t.is(errno, '0');
    await guest.loadModule();
  }
  t.is(fio.code, undefined, 'fio has ended');
  fio.kill(2);
  const { stdout } = await fio.wait(fioLimitMs);
  t.is(stdout.split(';')[4], '0', stdout);
});

test.serial(
  'after all that the origins are whole, and the kernel has not complained',
  async (t) => {
    const [completed, , errno] = await oracle.require('stop raw');
    t.is(errno, '0');
    await oracle.require(`check raw ${node('raw')} ${completed} ${completed}`);
    await oracle.end();
    await module.end();
    await guest.run(
      `set -e; rmmod stillblock; umount /srv/mounted; umount /srv/store
    e2fsck -fn ${mapped} >/dev/null; e2fsck -fn ${node('store')} >/dev/null`,
    );
    await t.notThrowsAsync(guest.shutdown());
  },
);
