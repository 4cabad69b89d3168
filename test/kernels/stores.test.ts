// SPDX-License-Identifier: Apache-2.0
// Every kind of store, through the command line: block devices, folders and
// files on a disk of the snapshot itself, several together, growth. And what
// changes without a write: a range that is marked by hand, a device's size.

import test from 'ava';
import { bootGuest, type Guest } from '../vm/guest.ts';
import { shellQuote } from '../vm/initrd.ts';
import {
  askLimitMs,
  Backup,
  buildTool,
  Conversation,
  cli,
  cliLimitMs,
  MiB,
  refusalIn,
  testKernel,
} from './world.ts';

const kernel = testKernel();
const failed = 1;
const fullRequired = 3;
const disks = { raw: 40, parted: 192, spare: 64, other: 160 } as const;
const writtenBytes = 24 * MiB;
const paceUs = 2000;

let guest: Guest;
let oracle: Conversation;
let module: Conversation;
const nodes = new Map<string, string>();
const node = (name: keyof typeof disks): string => nodes.get(name) ?? '';
/** Its table is made longer later. */
const raw = '/dev/mapper/raw';
/** The partition of the tracked disk `parted` that holds a file system. */
const partition = (): string => `${node('parted')}1`;
const diskName = (path: string): string => path.replace(/^.*\//, '');

test.before(async () => {
  const [ioctls, oracleProgram] = await Promise.all([buildTool('ioctls'), buildTool('oracle')]);
  guest = await bootGuest({
    kernel,
    disks: Object.entries(disks).map(([name, size]) => ({ name, sizeBytes: size * MiB })),
    memoryMiB: 1024,
  });
  for (const name of Object.keys(disks)) nodes.set(name, await guest.disk(name));
  await guest.run(
    `set -e
    modprobe -a dm-mod loop
    dmsetup create --noudevsync raw --table '0 ${32 * 2048} linear ${node('raw')} 0'; dmsetup mknodes
    echo 'start=1MiB' | sfdisk --quiet --label dos ${node('parted')}
    mkdir -p /srv/origin /srv/other
    mkfs.ext4 -q -F ${partition()}; mount ${partition()} /srv/origin
    mkfs.ext4 -q -F ${node('other')}; mount ${node('other')} /srv/other
    dd if=/dev/urandom of=/srv/origin/old bs=1M count=24 status=none; sync`,
  );
  await guest.loadModule();
  await guest.run(`${cli} device attach ${raw} ${node('parted')}`, { timeoutMs: cliLimitMs });
  module = new Conversation(guest, ioctls);
  oracle = new Conversation(guest, oracleProgram);
  await oracle.require(`open raw ${raw} ${writtenBytes} ${paceUs}`);
  await oracle.require('start raw');
});

test.afterEach.always(() => Backup.endAll());

test.after.always(async () => {
  await guest?.kill();
});

/** Begins a backup of the raw device, and proves its image after so many more writes. */
async function proveRaw(checkpoint: string, args: string, writes: number): Promise<Backup> {
  const [completed] = await oracle.require('now raw');
  const backup = await Backup.begin(guest, checkpoint, `--disk ${raw} ${args}`);
  const [, submitted] = await oracle.require('now raw');
  await oracle.require(`reach raw ${writes}`);
  await oracle.require(`check raw ${backup.image('raw')} ${completed} ${submitted}`);
  return backup;
}

/** The hash of a file in an image of the partition's file system. */
async function hashIn(image: string, file: string): Promise<string> {
  const { stdout } = await guest.run(
    `set -e; mkdir -p /run/image
    losetup --read-only --offset ${MiB} /dev/loop7 ${image} && mount -o ro,noload /dev/loop7 /run/image
    sha256sum </run/image/${file}; umount /run/image; losetup -d /dev/loop7`,
    { timeoutMs: askLimitMs },
  );
  return stdout;
}

test.serial('a block device is a store, as a whole, and again', async (t) => {
  for (const checkpoint of ['device1', 'device2']) {
    const backup = await proveRaw(checkpoint, `--store ${node('spare')}`, 300);
    const { code, stderr } = await backup.end();
    t.is(code, 0, stderr);
  }
});

test.serial('the device of a store does not look like an origin afterwards', async (t) => {
  const backup = await Backup.begin(
    guest,
    'looks',
    `--disk ${node('parted')} --store ${node('spare')}`,
  );
  // The first that is preserved is what tells people and programs what is on a disk.
  await guest.run(
    `set -e; dd if=${node('parted')} of=/run/first bs=64k count=1 status=none
    dd if=/run/first of=${node('parted')} bs=64k oflag=direct conv=notrunc status=none`,
  );
  t.is((await backup.end()).code, 0);
  const { code, stdout } = await guest.run(`blkid -p ${node('spare')}`, { check: false });
  t.is(code, 2, stdout);
});

test.serial('a block device in use by a snapshot is no store for another', async (t) => {
  const backup = await proveRaw('busy', `--store ${node('spare')}`, 10);
  const [, id = '0'] = (await module.require('list')).map((word) => word.split(':')[0]);
  const refused = refusalIn(
    await module.ask(`take other trackers=${id} stores=device:${node('spare')}`),
  );
  t.is(refused?.reason, 'STORE_BUSY');
  const image = refusalIn(await module.ask(`attach ${backup.image('raw')}`));
  t.is(image?.reason, 'BYPASSES_BIO', 'an image is tracked');
  t.is((await backup.end()).code, 0);
});

test.serial('several stores are one', async (t) => {
  const backup = await proveRaw(
    'several',
    `--store ${node('spare')} --store memory --store /srv/other --store-size 16M`,
    300,
  );
  const { stdout } = await guest.run(`${cli} status --json`, { timeoutMs: cliLimitMs });
  const { backup: described } = JSON.parse(stdout) as {
    backup: { store: { place: string; capacityBytes: number } };
  };
  t.is(described.store.place, `${node('spare')}, memory, /srv/other`);
  // Whole chunks of each: a little less than all of the device.
  t.true(described.store.capacityBytes > (32 + disks.spare - 3) * MiB);
  t.true(described.store.capacityBytes <= (32 + disks.spare) * MiB);
  t.is((await backup.end()).code, 0);
});

test.serial('a store in a folder grows while it is held', async (t) => {
  const backup = await proveRaw('growing', '--store /srv/other --store-size 4M', 10);
  await backup.told('store-grown');
  await oracle.require('reach raw 300');
  const { code, events } = await backup.end();
  t.is(code, 0);
  t.false(events.some(({ event }) => event === 'failed'));
});

test.serial(
  'a folder on a disk of the snapshot is a store that the image does not show',
  async (t) => {
    const before = await guest.run('sha256sum </srv/origin/old');
    const backup = await Backup.begin(
      guest,
      'folder',
      `--disk ${diskName(node('parted'))} --store /srv/origin --store-size 64M`,
    );
    const image = backup.image(diskName(node('parted')));
    await guest.run(
      `dd if=/dev/urandom of=/srv/origin/old bs=1M count=24 conv=notrunc,fsync status=none
    dd if=/dev/urandom of=/srv/origin/new bs=1M count=16 conv=fsync status=none; sync`,
      { timeoutMs: askLimitMs },
    );
    t.is(await hashIn(image, 'old'), before.stdout);
    const { code, stderr } = await backup.end();
    t.is(code, 0, stderr);
  },
);

test.serial('of a store on a disk of the snapshot, only what was written is marked', async (t) => {
  const backup = await Backup.begin(
    guest,
    'marked',
    `--disk ${node('parted')} --store memory --store-size 64M`,
  );
  const name = diskName(node('parted'));
  const { stdout } = await guest.run(
    `nbdinfo --json --map=qemu:dirty-bitmap:folder ${shellQuote(`nbd+unix:///${name}?socket=${backup.socket}`)}`,
  );
  const dirty = (JSON.parse(stdout) as { length: number; type: number }[])
    .filter(({ type }) => (type & 1) === 1)
    .reduce((sum, { length }) => sum + length, 0);
  // 40 MiB of files, and as much of the 64 MiB of store, where what was there before went.
  t.true(dirty >= 80 * MiB && dirty < 92 * MiB, `${dirty} bytes are marked`);
  t.is((await backup.end()).code, 0);
});

test.serial('a store on a disk of the snapshot does not grow', async (t) => {
  await guest.run('fallocate -l 8M /srv/origin/first; fallocate -l 8M /srv/origin/later; sync');
  const [, second = ''] = await module.require('list');
  const id = second.split(':')[0];
  await module.require(
    `take fixed trackers=${id} mounts=/srv/origin stores=file:/srv/origin/first`,
  );
  const refused = refusalIn(await module.ask('add fixed file:/srv/origin/later'));
  t.is(refused?.reason, 'STORE_ON_ORIGIN');
  await module.require('close fixed');
  await guest.run('rm /srv/origin/first /srv/origin/later');
});

test.serial("somebody else's write into a store on an origin ends the snapshot", async (t) => {
  await guest.run('fallocate -l 16M /srv/origin/store; sync');
  const { stdout } = await guest.run(
    `filefrag -b4096 -v /srv/origin/store | sed -nE 's/^ *0: +0\\.\\. *[0-9]+: +([0-9]+)\\.\\..*/\\1/p'`,
  );
  t.regex(stdout, /^\d+\n$/);
  const backup = await Backup.begin(
    guest,
    'foreign',
    `--disk ${node('parted')} --store /srv/origin/store`,
  );
  // Into the middle of it, past its file system.
  await guest.run(
    `dd if=/dev/zero of=${partition()} bs=4096 seek=$((${stdout.trim()} + 1024)) count=1 oflag=direct conv=notrunc status=none`,
  );
  t.is((await backup.failed()).reason, 'FOREIGN_WRITE');
  const { code, stderr } = await backup.ended();
  t.is(code, failed);
  t.regex(stderr, /wrote into the store/);
});

test.serial('a range that is marked by hand has changed', async (t) => {
  const first = await proveRaw('unmarked', '--store memory --store-size 32M', 10);
  t.is((await first.end()).code, 0);
  await oracle.require('stop raw');
  // Beyond what the writer writes to.
  const offset = writtenBytes + 4 * 65_536;
  await guest.run(`${cli} device mark ${raw} --offset ${offset} --length 100`, {
    timeoutMs: cliLimitMs,
  });
  const second = await Backup.begin(
    guest,
    'marks',
    `--disk ${raw} --incremental unmarked --store memory --store-size 32M`,
  );
  const { stdout } = await guest.run(
    `nbdinfo --json --map=qemu:dirty-bitmap:unmarked ${shellQuote(`nbd+unix:///raw?socket=${second.socket}`)}`,
  );
  const marked = (JSON.parse(stdout) as { offset: number; length: number; type: number }[])
    .filter(({ type, offset: at }) => (type & 1) === 1 && at >= writtenBytes)
    .map(({ offset: at, length }) => ({ offset: at, length }));
  t.deepEqual(marked, [{ offset, length: 65_536 }]);
  t.is((await second.end()).code, 0);
});

test.serial(
  'a device that is resized needs a full backup, and then has its new size',
  async (t) => {
    await guest.run(
      `set -e; dmsetup load raw --table '0 ${36 * 2048} linear ${node('raw')} 0'
    dmsetup suspend --nolockfs raw; dmsetup resume --noudevsync raw`,
    );
    const args = `--disk ${raw} --store memory --store-size 32M`;
    const refused = await guest.run(Backup.commandLine('larger', `${args} --incremental marks`), {
      check: false,
      timeoutMs: cliLimitMs,
    });
    t.is(refused.code, fullRequired, refused.stdout);
    t.regex(refused.stderr, /began anew/);
    const backup = await Backup.begin(guest, 'larger', args);
    const { stdout } = await guest.run(`blockdev --getsize64 ${backup.image('raw')}`);
    t.is(Number(stdout), 36 * MiB);
    t.is((await backup.end()).code, 0);
    const again = await Backup.begin(guest, 'later', `${args} --incremental larger`);
    t.is((await again.end()).code, 0);
  },
);

test.serial('after all that the origins are whole, and nothing is left', async (t) => {
  const [completed, , errno] = await oracle.require('stop raw');
  t.is(errno, '0');
  await oracle.require(`check raw ${raw} ${completed} ${completed}`);
  await oracle.end();
  await module.require('detach all');
  await module.end();
  await guest.run(
    `set -e; rmmod stillblock; umount /srv/origin; umount /srv/other
    e2fsck -fn ${partition()} >/dev/null; e2fsck -fn ${node('other')} >/dev/null`,
  );
  await t.notThrowsAsync(guest.shutdown());
});
