// SPDX-License-Identifier: Apache-2.0
// What breaks under a held snapshot, or while one is taken: the store, the
// origin, a freeze, the owner's process. Each time the origin's writes go on
// where its device still works, every read of the image is EIO from then on,
// the event says why, and the module can be unloaded afterwards. One guest
// serves all of it, with two writers that never stop (oracle.c).
//
// Two snapshots break at once: that of `one` is the command line's, for its words
// and its exit code, on the kernel where it takes part (withProduct); that of `two`
// is held by its descriptor alone, and its image is still there to be read when it
// has failed.

import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import test, { type ExecutionContext } from 'ava';
import { testKernel } from '../vm/checkout.ts';
import { bootGuest, type Guest } from '../vm/guest.ts';
import { runTool } from '../vm/host.ts';
import {
  askLimitMs,
  Backup,
  buildTool,
  Conversation,
  checksum,
  cliLimitMs,
  MiB,
  pace,
  reasonName,
  refusalIn,
  withProduct,
} from './world.ts';

const kernel = testKernel();
const failed = 1;
const overflow = 4;

/** Origins and the store's disk; each is below a device-mapper device of its name. */
const disks = { one: 40, two: 40, mounted: 64, spare: 16, store: 288 } as const;
type Name = keyof typeof disks;
/** What the writers write to, from the start of their devices. */
const writtenBytes = 24 * MiB;
/** The writers leave the processors to the others: microseconds between two writes. */
const paceUs = pace(12_000);
const storeBytes = 64 * MiB;
/** The module gives a chunk up after 30 s; a failed one then has to be noticed. */
const hangLimitMs = 150_000;

let guest: Guest;
let folder = '';
let oracleProgram = '';
let oracle: Conversation;
let module: Conversation;
const nodes = new Map<Name, string>();
/** Trackers' ids, anew whenever the module is loaded. */
const trackers = new Map<string, string>();

const path = (name: Name): string => `/dev/mapper/${name}`;
const sectors = (name: Name): number => disks[name] * 2048;
const node = (name: Name): string => nodes.get(name) ?? '';

/** Tables of the device-mapper, by what they do to I/O. */
const linear = (name: Name): string => `0 ${sectors(name)} linear ${node(name)} 0`;
const broken = (name: Name): string => `0 ${sectors(name)} error`;
const writesFail = (name: Name): string =>
  `0 ${sectors(name)} flakey ${node(name)} 0 0 3600 1 error_writes`;
const delayed = (name: Name, ms: number): string =>
  `0 ${sectors(name)} delay ${node(name)} 0 ${ms} ${node(name)} 0 ${ms}`;
/** Reads come from a device of errors, or one of the two late. */
const readsFail = (name: Name): string =>
  `0 ${sectors(name)} delay /dev/mapper/errors 0 0 ${node(name)} 0 0`;
const writesHang = (name: Name): string =>
  `0 ${sectors(name)} delay ${node(name)} 0 0 ${node(name)} 0 100000`;
const readsHang = (name: Name): string =>
  `0 ${sectors(name)} delay ${node(name)} 0 100000 ${node(name)} 0 0`;

/** Devices that are not as they should be. */
const changed = new Set<Name>();

/** Puts another table under a device that is in use. */
async function swap(name: Name, table: string): Promise<void> {
  changed.add(name);
  await guest.run(
    `set -e; dmsetup load ${name} --table '${table}'
    dmsetup suspend --noflush --nolockfs ${name}; dmsetup resume --noudevsync ${name}`,
  );
}

/** Lets all I/O of a device wait. */
async function suspend(name: Name): Promise<void> {
  changed.add(name);
  await guest.run(`dmsetup suspend --noflush --nolockfs ${name}`);
}

/** Makes a device work again. */
async function mend(...names: readonly Name[]): Promise<void> {
  for (const name of names) {
    await guest.run(`dmsetup resume --noudevsync ${name}`);
    await swap(name, linear(name));
    changed.delete(name);
  }
}

const tracker = (name: string): string => trackers.get(name) ?? '0';

async function attach(...names: readonly Name[]): Promise<void> {
  for (const name of names) {
    const [id = '0'] = await module.require(`attach ${path(name)}`);
    trackers.set(name, id);
  }
}

async function loadModule(): Promise<void> {
  await guest.loadModule();
  await attach('one', 'two');
}

/** Every read of an image fails, direct or not, from its first byte to its last. */
async function assertDead(t: ExecutionContext, image: string): Promise<void> {
  const [good, , other] = await module.require(`sweep /dev/${image}`);
  t.deepEqual([good, other], ['0', '0'], 'reads of the image do not all give EIO');
}

/** Waits until a snapshot that is held by its descriptor has failed, and ends it. */
async function assertFailed(
  t: ExecutionContext,
  name: string,
  image: string,
  reason: string,
  limitMs: number = askLimitMs,
): Promise<void> {
  // Other events may come first: a store runs low before it is full.
  for (;;) {
    const [type, value] = await module.require(`event ${name} ${limitMs}`, limitMs + askLimitMs);
    if (type !== '2') continue;
    t.is(reasonName(Number(value)), reason);
    break;
  }
  const [state, why] = await module.require(`state ${name}`);
  t.deepEqual([state, reasonName(Number(why))], ['failed', reason]);
  await assertDead(t, image);
  await module.require(`close ${name}`);
}

/** The writers go on: so many more of their writes complete, and none has failed. */
async function assertWriting(t: ExecutionContext, count = 20): Promise<void> {
  for (const name of ['one', 'two'] as const) {
    const [, , errno] = await oracle.require(`reach ${name} ${count}`);
    t.is(errno, '0', `a write to ${name} failed`);
  }
}

interface Expected {
  readonly reason: string;
  readonly code: number;
  readonly says: RegExp;
}

/** A snapshot of `one`: the command line's, or one that is held by its descriptor. */
interface Held {
  readonly backup?: Backup;
  readonly name: string;
  readonly image: string;
}

/**
 * @param store for `ioctls`, such as `memory:4096`
 * @param args of the command line, which takes no part without them: for the same store
 */
async function holdOne(name: string, store: string, args?: string): Promise<Held> {
  if (withProduct && args !== undefined) {
    const backup = await Backup.begin(guest, name, `--disk ${path('one')} ${args}`);
    return { backup, name, image: backup.image('one') };
  }
  const [image = ''] = await module.require(
    `take ${name}.one trackers=${tracker('one')} stores=${store}`,
  );
  return { name: `${name}.one`, image };
}

/** It says why, the command line in words, in an event and by its exit code. */
async function assertEnded(t: ExecutionContext, held: Held, expected: Expected): Promise<void> {
  if (held.backup === undefined) {
    await assertFailed(t, held.name, held.image, expected.reason, hangLimitMs);
    return;
  }
  const event = await held.backup.failed(hangLimitMs);
  const { code, stderr } = await held.backup.ended();
  t.is(event.reason, expected.reason);
  t.is(code, expected.code, stderr);
  t.regex(stderr, expected.says);
}

/** A begin of the command line that takes no snapshot says why. */
async function assertNotBegun(
  t: ExecutionContext,
  checkpoint: string,
  args: string,
  says: RegExp,
): Promise<void> {
  if (!withProduct) return;
  const result = await guest.run(Backup.commandLine(checkpoint, args), {
    check: false,
    timeoutMs: cliLimitMs,
  });
  t.is(result.code, failed, result.stdout);
  t.regex(result.stderr, says);
}

test.before(async () => {
  folder = await mkdtemp(join(tmpdir(), 'stillblock-faults-'));
  const ioctls = await buildTool('ioctls');
  oracleProgram = await buildTool('oracle');
  guest = await bootGuest({
    kernel,
    disks: Object.entries(disks).map(([name, size]) => ({ name, sizeBytes: size * MiB })),
    saved: true,
  });
  for (const name of Object.keys(disks) as Name[]) nodes.set(name, await guest.disk(name));
  await guest.run(
    `set -e
    modprobe -a dm-mod dm-delay dm-flakey loop
    dmsetup create --noudevsync errors --table '0 ${disks.store * 2048} error'
    ${(Object.keys(disks) as Name[])
      .map((name) => `dmsetup create --noudevsync ${name} --table '${linear(name)}'`)
      .join('\n')}
    dmsetup mknodes
    mkdir -p /srv/store /srv/mounted
    # The kernel shall not be filling in inode tables still when writes begin to fail.
    mkfs.ext4 -q -F -E lazy_itable_init=0,lazy_journal_init=0 ${path('store')}; mount ${path('store')} /srv/store
    mkfs.ext4 -q -F ${path('mounted')}; mount ${path('mounted')} /srv/mounted
    for name in one two; do fallocate -l ${storeBytes} /srv/store/$name; done; sync`,
  );
  module = new Conversation(guest, ioctls);
  oracle = new Conversation(guest, oracleProgram);
  await loadModule();
  for (const name of ['one', 'two'] as const) {
    await oracle.require(`open ${name} ${path(name)} ${writtenBytes} ${paceUs}`);
    await oracle.require(`start ${name}`);
  }
});

/** After each test nothing is left: the module unloads, and is loaded again for the next. */
test.afterEach.always('the module unloads', async () => {
  const names = [...changed];
  await mend(...names);
  await Backup.endAll();
  await module.require('close all');
  await module.require('detach all');
  // What came back late is freed by a worker.
  await guest.run('until rmmod stillblock 2>/dev/null; do :; done');
  if (names.includes('store')) {
    // What the mount writes shall not wait for its commit until writes fail in the next test.
    await guest.run(
      `umount /srv/store; e2fsck -fp ${path('store')} >&2; [ $? -le 1 ] || exit
      mount ${path('store')} /srv/store && sync -f /srv/store`,
    );
  }
  await loadModule();
  // A test may have stopped them.
  for (const name of ['one', 'two']) await oracle.require(`start ${name}`);
});

test.after.always(async () => {
  await guest?.kill();
  await rm(folder, { recursive: true, force: true });
});

const tracing = '/sys/kernel/tracing';
/** The first line of each kind of what our tracepoints have said. */
const traced = `awk 'match($0, /stillblock_[a-z]+: .*/) {
    line = substr($0, RSTART); split(line, words, ":"); if (!seen[words[1]]++) print line
  }' ${tracing}/trace`;

test.serial('a store that is full', async (t) => {
  await guest.run(`echo >${tracing}/trace; echo 1 >${tracing}/events/stillblock/enable`);
  // Two MiB are full at once: nobody writes until the images are served.
  await oracle.require('stop one');
  const held = await holdOne('full', `memory:${2 * MiB}`, '--store memory --store-size 2M');
  const [image = ''] = await module.require(
    `take full trackers=${tracker('two')} stores=memory:${2 * MiB}`,
  );
  await oracle.require('start one');
  await assertEnded(t, held, { reason: 'STORE_FULL', code: overflow, says: /store is full/ });
  await assertFailed(t, 'full', image, 'STORE_FULL');
  await assertWriting(t);
  const { stdout } = await guest.run(`echo 0 >${tracing}/events/stillblock/enable; ${traced}`);
  t.regex(stdout, /^stillblock_hold: tracker \d+ sector \d+ \+ \d+ mode [12]$/m);
  t.regex(stdout, /^stillblock_preserve: tracker \d+ sector \d+ \+ \d+$/m);
  t.regex(stdout, /^stillblock_release: tracker \d+ sector \d+ \+ \d+$/m);
  const [, reason] = /^stillblock_fail: reason (\d+)$/m.exec(stdout) ?? [];
  t.is(reasonName(Number(reason)), 'STORE_FULL', stdout);
});

for (const [name, what, table] of [
  ['broken', 'fails altogether', broken],
  ['unwritable', 'cannot be written', writesFail],
] as const) {
  test.serial(`a store whose device ${what}`, async (t) => {
    const held = await holdOne(
      name,
      'file:/srv/store/one',
      // Once is enough: it is told by the same event.
      name === 'broken' ? undefined : `--store /srv/store --store-size ${storeBytes}`,
    );
    const [image = ''] = await module.require(
      `take ${name} trackers=${tracker('two')} stores=file:/srv/store/two`,
    );
    await swap('store', table('store'));
    await assertEnded(t, held, {
      reason: 'STORE_ERROR',
      code: failed,
      says: /store could not be written/,
    });
    await assertFailed(t, name, image, 'STORE_ERROR');
    await assertWriting(t);
  });
}

test.serial('stores that hang, suspended and delayed', async (t) => {
  const held = await holdOne(
    'hanging',
    'file:/srv/store/one',
    `--store /srv/store --store-size ${storeBytes}`,
  );
  await guest.run('fallocate -l 48M /srv/mounted/two; sync');
  const [image = ''] = await module.require(
    `take hanging trackers=${tracker('two')} stores=file:/srv/mounted/two`,
  );
  await swap('mounted', delayed('mounted', 100_000));
  await suspend('store');
  // Neither its failure nor its end waits for the store to answer.
  await assertEnded(t, held, {
    reason: 'STORE_TIMEOUT',
    code: failed,
    says: /store did not answer in time/,
  });
  await assertFailed(t, 'hanging', image, 'STORE_TIMEOUT', hangLimitMs);
  await assertWriting(t);
});

/*
 * A device takes so many requests at once; who submits another one waits. That must not
 * be who releases held writes.
 */
test.serial('a store that hangs with its queue full', async (t) => {
  const loop = '/dev/loop1';
  await guest.run(
    `set -e; losetup --direct-io=on ${loop} ${path('spare')}
    echo none >/sys/block/loop1/queue/scheduler; echo 4 >/sys/block/loop1/queue/nr_requests`,
  );
  const [image = ''] = await module.require(
    `take crowded trackers=${tracker('two')} stores=device:${loop}`,
  );
  await suspend('spare');
  await assertFailed(t, 'crowded', image, 'STORE_TIMEOUT', hangLimitMs);
  await assertWriting(t);
  await mend('spare');
  await guest.run(`losetup -d ${loop}`);
});

test.serial('an origin whose old data cannot be read', async (t) => {
  const held = await holdOne('unreadable', `memory:${storeBytes}`);
  const [image = ''] = await module.require(
    `take unreadable trackers=${tracker('two')} stores=memory:${storeBytes}`,
  );
  await Promise.all([swap('one', readsFail('one')), swap('two', readsFail('two'))]);
  await assertFailed(t, held.name, held.image, 'ORIGIN_ERROR', hangLimitMs);
  await assertFailed(t, 'unreadable', image, 'ORIGIN_ERROR');
  await assertWriting(t);
  await mend('one', 'two');
  await assertWriting(t);
});

test.serial('origins that hang: reads delayed, everything suspended', async (t) => {
  const held = await holdOne('stuck', `memory:${storeBytes}`);
  const [image = ''] = await module.require(
    `take stuck trackers=${tracker('two')} stores=memory:${storeBytes}`,
  );
  await swap('one', readsHang('one'));
  // Somewhere where nothing has been preserved yet.
  await oracle.require('stop two');
  await suspend('two');
  const write = guest.start(
    `exec dd if=/dev/zero of=${path('two')} bs=4k count=1 seek=7680 conv=notrunc oflag=direct`,
  );
  await assertFailed(t, held.name, held.image, 'ORIGIN_ERROR', hangLimitMs);
  // Only the reads of this one hang: what it held has been written.
  const [, , errno] = await oracle.require('reach one 50');
  t.is(errno, '0');
  await assertFailed(t, 'stuck', image, 'ORIGIN_ERROR', hangLimitMs);
  await mend('one', 'two');
  t.is((await write.wait(askLimitMs)).code, 0, 'the write that was held');
  await oracle.require('start two');
  await assertWriting(t);
});

/** Most writes that may wait before their submitters are slowed down; the module's. */
const heldWrites = 4096;
/** Beyond that, how many times as many fail the snapshot. */
const heldTooMany = 16;
const slowedMs = 500;

// It counts on submitting them faster than the checkers let anybody.
if (kernel !== 'debug') {
  test.serial('more writes wait than the server can bear', async (t) => {
    t.timeout(10 * 60_000);
    await attach('spare');
    await guest.run(`echo ${1 << 20} >/proc/sys/fs/aio-max-nr`);
    // It is opened while its device says that it can do without waiting.
    await module.require(`flood ${path('spare')} 0`);
    const [image = ''] = await module.require(
      `take flood trackers=${tracker('spare')} stores=memory:${storeBytes}`,
    );
    // No chunk is late, but only a few can be read at once.
    await swap(
      'spare',
      `0 ${sectors('spare')} delay ${node('spare')} 0 20000 ${node('spare')} 0 0`,
    );
    const flood = (count: number, how = ''): Promise<number> =>
      module.require(`flood ${path('spare')} ${count} ${how}`).then(([ms]) => Number(ms));
    const room = 96;
    const beyond = 8;
    const easyMs = await flood(heldWrites - room);
    const hardMs = await flood(room + beyond);
    t.log(`${heldWrites - room} writes in ${easyMs} ms, ${room + beyond} in ${hardMs} ms`);
    t.true(hardMs >= (beyond * slowedMs * 3) / 4, 'nobody was slowed down');
    t.is((await module.require('state flood'))[0], 'held');
    // Who may not wait is not slowed down: the snapshot goes before the server.
    await flood(heldWrites * (heldTooMany + 2), 'nowait');
    await assertFailed(t, 'flood', image, 'OVERLOADED');
    await mend('spare');
    const [good] = await module.require('ebb');
    t.true(Number(good) >= heldWrites * heldTooMany, `${good} writes that waited have succeeded`);
    await assertWriting(t);
  });
}

test.serial('an origin that fails altogether', async (t) => {
  for (const name of ['one', 'two']) await oracle.require(`stop ${name}`);
  const [image = ''] = await module.require(
    `take dead trackers=${tracker('two')} stores=memory:${storeBytes}`,
  );
  const before = await guest.run(`${checksum} </dev/${image}`);
  await swap('two', broken('two'));
  // What was not preserved cannot be read; that alone is no reason to give all of it up.
  await assertDead(t, image);
  t.is((await module.require('state dead'))[0], 'held');
  const write = `dd if=/dev/zero of=${path('two')} bs=64k count=1 oflag=direct conv=notrunc`;
  t.not((await guest.run(write, { check: false })).code, 0);
  await assertFailed(t, 'dead', image, 'ORIGIN_ERROR');
  await mend('two');
  t.is((await guest.run(`${checksum} <${path('two')}`)).stdout, before.stdout);
});

test.serial('an origin that is unplugged while it is held', async (t) => {
  const file = join(folder, 'unplugged');
  await runTool('truncate', ['-s', '32M', file]);
  const device = await guest.plug('unplugged', file, 'raw', false);
  const [id] = await module.require(`attach ${device}`);
  const [image = ''] = await module
    .require(`take unplugged trackers=${tracker('two')},${id} stores=memory:${storeBytes}`)
    .then(([, last = '']) => [last]);
  await guest.run(
    `dd if=/dev/urandom of=${device} bs=1M count=4 oflag=direct; cat /dev/${image} >/dev/null`,
  );
  await guest.unplug('unplugged');
  await assertFailed(t, 'unplugged', image, 'GONE');
  await assertWriting(t);
  const again = refusalIn(
    await module.ask(`take again trackers=${id} stores=memory:${storeBytes}`),
  );
  t.is(again?.reason, 'GONE');
  await assertNotBegun(t, 'gone', '--store memory --store-size 16M', /is gone/);
});

test.serial('a file system that does not freeze in time', async (t) => {
  await attach('mounted');
  await suspend('mounted');
  await assertNotBegun(
    t,
    'frozen',
    `--disk ${path('mounted')} --disk ${path('one')} --store memory --store-size 16M --freeze-timeout 2`,
    /file system on \/srv\/mounted could not be frozen in time/,
  );
  await assertWriting(t);
  await mend('mounted');
  await guest.run('echo thawed >/srv/mounted/file; sync -f /srv/mounted');
  const [image = ''] = await module.require(
    `take thawed trackers=${tracker('mounted')} mounts=/srv/mounted stores=memory:${storeBytes}`,
  );
  await guest.run(`e2fsck -fn /dev/${image} >/dev/null`);
});

test.serial('a file system that is frozen already', async (t) => {
  await attach('mounted');
  await guest.run('fsfreeze -f /srv/mounted');
  const answer = await module.ask(
    `take twice trackers=${tracker('mounted')} mounts=/srv/mounted stores=memory:${storeBytes}`,
  );
  // Where freezes nest, that of the kernel ends before the other one.
  const nests = kernel === '6.12' || kernel === '7.2';
  t.is(refusalIn(answer)?.reason, nests ? undefined : 'ALREADY_FROZEN', answer);
  await guest.run(
    'fsfreeze -u /srv/mounted && echo thawed >/srv/mounted/file && sync -f /srv/mounted',
  );
});

test.serial('writes in flight that do not end', async (t) => {
  // A loop device has its requests in flight while what is beneath it waits.
  await guest.run(`losetup --direct-io=on /dev/loop0 ${path('spare')}`);
  const [id] = await module.require('attach /dev/loop0');
  await suspend('spare');
  const write = guest.start(`exec dd if=/dev/zero of=/dev/loop0 bs=4k count=1 oflag=direct`);
  await guest.run(`until [ "$(awk '{ print $2 }' /sys/block/loop0/inflight)" -gt 0 ]; do :; done`);
  const answer = await module.ask(
    `take undrained trackers=${id},${tracker('one')} stores=memory:${storeBytes}`,
  );
  t.is(refusalIn(answer)?.reason, 'DRAIN_TIMEOUT', answer);
  await assertNotBegun(
    t,
    'undrained',
    `--disk /dev/loop0 --disk ${path('one')} --store memory --store-size ${storeBytes}`,
    /writes to .*loop0 did not end in time/,
  );
  await assertWriting(t);
  await mend('spare');
  t.is((await write.wait(askLimitMs)).code, 0);
  await module.require(`take drained trackers=${id} stores=memory:${storeBytes}`);
  await module.require('close drained');
  await module.require(`detach ${id}`);
  await guest.run('losetup -d /dev/loop0');
});

/*
 * btrfs reads its super block when it is thawed, and takes a read that a deadly signal
 * ends for a device that was tampered with.
 */
test.serial('a file system is thawed for an owner that was killed, and goes on', async (t) => {
  await guest.run(
    `set -e; modprobe btrfs; truncate -s 128M /run/btrfs; mkfs.btrfs -q /run/btrfs
    mkdir -p /srv/btrfs; mount -o loop /run/btrfs /srv/btrfs
    losetup --direct-io=on /dev/loop6 ${path('spare')}`,
    { timeoutMs: askLimitMs },
  );
  const [id] = await module.require('attach /dev/loop6');
  await suspend('spare');
  const write = guest.start(`exec dd if=/dev/zero of=/dev/loop6 bs=4k count=1 oflag=direct`);
  await guest.run(`until [ "$(awk '{ print $2 }' /sys/block/loop6/inflight)" -gt 0 ]; do :; done`);
  const owner = new Conversation(guest, await buildTool('ioctls'));
  const answer = owner.ask(`take killed trackers=${id} mounts=/srv/btrfs stores=memory:${MiB}`);
  answer.catch(() => {});
  // Once it is frozen, while the take waits for that write, who touches it waits, too.
  await guest.run(
    `while :; do
      touch /srv/btrfs/late >/dev/null 2>&1 & sleep 0.2
      ! grep -q '^State:.D' /proc/$!/status 2>/dev/null || exit 0
    done`,
  );
  await owner.kill();
  const { code, stderr } = await guest.run('touch /srv/btrfs/later; sync -f /srv/btrfs/later', {
    check: false,
    timeoutMs: askLimitMs,
  });
  t.is(code, 0, stderr);
  await mend('spare');
  t.is((await write.wait(askLimitMs)).code, 0);
  await module.require(`detach ${id}`);
  await guest.run('umount /srv/btrfs; losetup -d /dev/loop6; rm /run/btrfs');
});

for (const [what, wait] of [
  ['delayed', () => swap('two', writesHang('two'))],
  ['suspended', () => suspend('two')],
] as const) {
  /*
   * It would reach the disk while the image is held, and be in no image before: a take
   * waits for it, and gives up.
   */
  test.serial(`a write that waits inside the device, which is ${what}`, async (t) => {
    await wait();
    await oracle.require('stuck two');
    const refused = await module.ask(
      `take waiting trackers=${tracker('two')} stores=memory:${storeBytes}`,
    );
    t.is(refusalIn(refused)?.reason, 'DRAIN_TIMEOUT', refused);
    await mend('two');
    await assertWriting(t);
    const [completed] = await oracle.require('now two');
    const [image] = await module.require(
      `take moving trackers=${tracker('two')} stores=memory:${storeBytes}`,
    );
    const [, submitted] = await oracle.require('now two');
    await assertWriting(t);
    await oracle.require(`check two /dev/${image} ${completed} ${submitted}`);
  });
}

test.serial('after all that the origins hold what was written', async (t) => {
  for (const name of ['one', 'two'] as const) {
    const [completed, , errno] = await oracle.require(`stop ${name}`);
    t.is(errno, '0');
    await oracle.require(`check ${name} ${path(name)} ${completed} ${completed}`);
  }
  await guest.run(`umount /srv/mounted; e2fsck -fn ${path('mounted')} >/dev/null`);
});

test.after('the kernel has not complained', async () => {
  await module.require('detach all');
  await guest.run('rmmod stillblock; ! ls /dev/stillblock* 2>/dev/null');
  await guest.shutdown([
    // The devices that were made to fail, and what lay on them.
    /I\/O error.* (dev )?(dm-\d+|stillblock\d+|vd[e-z])\b/,
    /EXT4-fs.*dm-\d+/,
  ]);
});
