// SPDX-License-Identifier: Apache-2.0
// Every kind of store: block devices, files on a disk of the snapshot itself,
// several together, growth. And what changes without a write: a range that is
// marked by hand, a device's size. Through the command line on the kernel where it
// takes part (withProduct), by the module's requests on the others.

import test, { type ExecutionContext } from 'ava';
import { testKernel } from '../vm/checkout.ts';
import { cli } from '../vm/command-line.ts';
import { bootGuest, type Guest } from '../vm/guest.ts';
import { shellQuote } from '../vm/initrd.ts';
import {
  askLimitMs,
  Backup,
  buildKernelModule,
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
const fullRequired = 3;
const disks = { raw: 40, parted: 192, spare: 64, other: 160 } as const;
const writtenBytes = 24 * MiB;
const paceUs = pace(12_000);

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
    saved: true,
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
  module = new Conversation(guest, ioctls);
  await module.require(`attach ${raw}`);
  await module.require(`attach ${node('parted')}`);
  oracle = new Conversation(guest, oracleProgram);
  await oracle.require(`open raw ${raw} ${writtenBytes} ${paceUs}`);
  await oracle.require('start raw');
});

/** After a test that failed, for the next one; the last one ends it all. */
test.afterEach.always(async () => {
  await Backup.endAll();
  await module.ask('close all').catch(() => {});
});

test.after.always(async () => {
  await guest?.kill();
});

/** What the module says of a tracked device. */
async function tracked(
  name: Origin,
): Promise<{ readonly id: string; readonly number: number; readonly generation: string }> {
  const words = await module.require('list');
  const [id = '', , , number = '', , generation = ''] =
    words[name === 'raw' ? 0 : 1]?.split(':') ?? [];
  return { id, number: Number(number), generation };
}

type Origin = 'raw' | 'parted';

/** A snapshot of one device: the command line's, or one that is held by its descriptor. */
interface Held {
  readonly backup?: Backup;
  readonly name: string;
  readonly image: string;
}

/**
 * @param args of the command line, which takes no part without them: for the same store as
 *   `stores`, which is for `ioctls`
 * @param more of `ioctls`, such as a file system to freeze
 */
async function hold(
  name: string,
  origin: Origin,
  args: string,
  stores: string,
  more = '',
): Promise<Held> {
  if (withProduct && args !== '') {
    const disk = origin === 'raw' ? raw : node(origin);
    const backup = await Backup.begin(guest, name, `--disk ${disk} ${args}`);
    return { backup, name, image: backup.image(diskName(disk)) };
  }
  const { id } = await tracked(origin);
  const [image] = await module.require(`take ${name} trackers=${id} stores=${stores} ${more}`);
  return { name, image: `/dev/${image}` };
}

/** Ends a snapshot that has not failed. */
async function release(t: ExecutionContext, held: Held): Promise<void> {
  if (held.backup === undefined) {
    t.is((await module.require(`state ${held.name}`))[0], 'held');
    await module.require(`close ${held.name}`);
    return;
  }
  const { code, stderr, events } = await held.backup.end();
  t.is(code, 0, stderr);
  t.false(events.some(({ event }) => event === 'failed'));
}

interface Range {
  readonly offset: number;
  readonly length: number;
}

/** What has changed up to a snapshot since a checkpoint, which had this number. */
async function changes(
  held: Held,
  origin: Origin,
  checkpoint: string,
  number: number,
): Promise<Range[]> {
  if (held.backup === undefined) {
    const ranges = await module.require(`map ${held.name} 0 ${number}`);
    return ranges.map((words) => {
      const [offset = 0, length = 0] = words.split(':').map(Number);
      return { offset, length };
    });
  }
  const name = diskName(origin === 'raw' ? raw : node(origin));
  const { stdout } = await guest.run(
    `nbdinfo --json --map=qemu:dirty-bitmap:${checkpoint} ${shellQuote(`nbd+unix:///${name}?socket=${held.backup.socket}`)}`,
  );
  return (JSON.parse(stdout) as (Range & { type: number })[])
    .filter(({ type }) => (type & 1) === 1)
    .map(({ offset, length }) => ({ offset, length }));
}

/** Holds the raw device, and proves its image after so many more writes. */
async function proveRaw(name: string, args: string, stores: string, writes: number): Promise<Held> {
  const [completed] = await oracle.require('now raw');
  const held = await hold(name, 'raw', args, stores);
  const [, submitted] = await oracle.require('now raw');
  await oracle.require(`reach raw ${writes}`);
  await oracle.require(`check raw ${held.image} ${completed} ${submitted}`);
  return held;
}

/** The hash of a file in an image of the partition's file system. */
async function hashIn(image: string, file: string): Promise<string> {
  const { stdout } = await guest.run(
    `set -e; mkdir -p /run/image
    losetup --read-only --offset ${MiB} /dev/loop7 ${image} && mount -o ro,noload /dev/loop7 /run/image
    ${checksum} </run/image/${file}; umount /run/image; losetup -d /dev/loop7`,
    { timeoutMs: askLimitMs },
  );
  return stdout;
}

test.serial('a block device is a store, as a whole, and again', async (t) => {
  const spare = node('spare');
  for (const [name, args] of [
    ['device1', `--store ${spare}`],
    ['device2', ''],
  ] as const) {
    await release(t, await proveRaw(name, args, `device:${spare}`, 150));
  }
});

test.serial('the device of a store does not look like an origin afterwards', async (t) => {
  const spare = node('spare');
  const held = await hold('looks', 'parted', '', `device:${spare}`);
  // The first that is preserved is what tells people and programs what is on a disk.
  await guest.run(
    `set -e; dd if=${node('parted')} of=/run/first bs=64k count=1 status=none
    dd if=/run/first of=${node('parted')} bs=64k oflag=direct conv=notrunc status=none`,
  );
  await release(t, held);
  const { code, stdout } = await guest.run(`blkid -p ${node('spare')}`, { check: false });
  t.is(code, 2, stdout);
});

test.serial('a block device in use by a snapshot is no store for another', async (t) => {
  const spare = node('spare');
  const held = await proveRaw('busy', '', `device:${spare}`, 10);
  const { id } = await tracked('parted');
  const refused = refusalIn(await module.ask(`take other trackers=${id} stores=device:${spare}`));
  t.is(refused?.reason, 'STORE_BUSY');
  const image = refusalIn(await module.ask(`attach ${held.image}`));
  t.is(image?.reason, 'BYPASSES_BIO', 'an image is tracked');
  await release(t, held);
  // Nor twice for the same one, whose old data would lie upon each other.
  const twice = refusalIn(
    await module.ask(`take twice trackers=${id} stores=device:${spare},device:${spare}`),
  );
  t.like(twice, { reason: 'STORE_BUSY', culprit: 1 });
});

test.serial('several stores are one', async (t) => {
  const spare = node('spare');
  await guest.run('fallocate -l 16M /srv/other/several; sync');
  const held = await proveRaw(
    'several',
    `--store ${spare} --store memory --store /srv/other --store-size 16M`,
    `device:${spare},memory:${16 * MiB},file:/srv/other/several`,
    150,
  );
  let capacity: number;
  if (held.backup === undefined) {
    capacity = Number((await module.require('state several'))[3]);
  } else {
    const { stdout } = await guest.run(`${cli} status --json`, { timeoutMs: cliLimitMs });
    const { backup: described } = JSON.parse(stdout) as {
      backup: { store: { place: string; capacityBytes: number } };
    };
    t.is(described.store.place, `${spare}, memory, /srv/other`);
    capacity = described.store.capacityBytes;
  }
  // Whole chunks of each: a little less than all of the device.
  t.true(capacity > (32 + disks.spare - 3) * MiB, String(capacity));
  t.true(capacity <= (32 + disks.spare) * MiB, String(capacity));
  await release(t, held);
});

test.serial('a store grows while it is held', async (t) => {
  // The command line makes its own, for which there would be no room then.
  if (!withProduct) await guest.run('fallocate -l 48M /srv/other/more; sync');
  // What it writes would not wait for the answer to the watermark.
  const [completed] = await oracle.require('stop raw');
  const held = await hold(
    'growing',
    'raw',
    '--store /srv/other --store-size 4M',
    `memory:${4 * MiB}`,
    `low=${2 * MiB}`,
  );
  // Past the watermark, then past the end, where the writer does not write.
  const overwrite = (block: number) =>
    guest.run(
      `dd if=/dev/zero of=${raw} bs=64k seek=${(writtenBytes >> 16) + block} count=52 oflag=direct conv=notrunc status=none`,
    );
  await overwrite(0);
  if (held.backup === undefined) {
    const [type] = await module.require(`event growing ${askLimitMs}`, 2 * askLimitMs);
    t.is(type, '1', 'it has failed before it called for more');
    await module.require('add growing file:/srv/other/more');
  } else {
    await held.backup.told('store-grown');
  }
  await overwrite(52);
  await oracle.require(`check raw ${held.image} ${completed} ${completed}`);
  await release(t, held);
  await oracle.require('start raw');
});

test.serial(
  'a folder or file on a disk of the snapshot is a store that the image does not show',
  async (t) => {
    const before = await guest.run(`${checksum} </srv/origin/old`);
    const { number } = await tracked('parted');
    if (!withProduct) await guest.run('fallocate -l 64M /srv/origin/first; sync');
    const held = await hold(
      'folder',
      'parted',
      '--store /srv/origin --store-size 64M',
      'file:/srv/origin/first',
      'mounts=/srv/origin',
    );
    await guest.run(
      `dd if=/dev/urandom of=/srv/origin/old bs=1M count=24 conv=notrunc,fsync status=none
    dd if=/dev/urandom of=/srv/origin/new bs=1M count=16 conv=fsync status=none; sync`,
      { timeoutMs: askLimitMs },
    );
    t.is(await hashIn(held.image, 'old'), before.stdout);
    await release(t, held);
    // Only what was written of it is marked.
    const next = await hold(
      'marked',
      'parted',
      '--store memory --store-size 64M',
      `memory:${64 * MiB}`,
    );
    const dirty = (await changes(next, 'parted', 'folder', number)).reduce(
      (sum, { length }) => sum + length,
      0,
    );
    // 40 MiB of files, and as much of the 64 MiB of store, where what was there before went.
    t.true(dirty >= 80 * MiB && dirty < 92 * MiB, `${dirty} bytes are marked`);
    await release(t, next);
    await guest.run('rm -f /srv/origin/first');
  },
);

test.serial('a store on a disk of the snapshot does not grow', async (t) => {
  await guest.run('fallocate -l 8M /srv/origin/first; fallocate -l 8M /srv/origin/later; sync');
  const { id } = await tracked('parted');
  await module.require(
    `take fixed trackers=${id} mounts=/srv/origin stores=file:/srv/origin/first`,
  );
  const refused = refusalIn(await module.ask('add fixed file:/srv/origin/later'));
  t.is(refused?.reason, 'STORE_ON_ORIGIN');
  await module.require('close fixed');
  await guest.run('rm /srv/origin/first /srv/origin/later');
});

test.serial('what the first origin stores is no stranger to the last one', async (t) => {
  const slow = await buildKernelModule('slow-flip', kernel);
  const ids = [(await tracked('raw')).id, (await tracked('parted')).id];
  await guest.run(`set -e; insmod ${shellQuote(slow)}; fallocate -l 32M /srv/origin/flip; sync`);
  for (const name of ['flip1', 'flip2', 'flip3']) {
    await module.require(
      `take ${name} trackers=${ids.join(',')} mounts=/srv/origin stores=file:/srv/origin/flip`,
    );
    // Some of it has been preserved by then.
    await oracle.require('reach raw 20');
    t.is((await module.require(`state ${name}`))[0], 'held');
    await module.require(`close ${name}`);
  }
  await guest.run('set -e; rmmod slow_flip; rm /srv/origin/flip');
});

test.serial(
  "what a disk's snapshot held of a store is no stranger to its partition's",
  async (t) => {
    await guest.run('fallocate -l 64M /srv/origin/beneath; sync');
    // The disk sees it first: it is tracked for longer.
    const [part] = await module.require(`attach ${partition()}`);
    const disk = await tracked('parted');
    t.true(Number(disk.id) < Number(part), `disk ${disk.id}, partition ${part}`);
    await module.require(
      `take partition trackers=${part} mounts=/srv/origin stores=file:/srv/origin/beneath`,
    );
    await module.require(`take disk trackers=${disk.id} stores=memory:${128 * MiB}`);
    await guest.run(
      `dd if=/dev/urandom of=/srv/origin/old bs=1M count=24 conv=notrunc,fsync status=none`,
      { timeoutMs: askLimitMs },
    );
    for (const name of ['partition', 'disk']) {
      const [state, , used] = await module.require(`state ${name}`);
      t.is(state, 'held', name);
      t.true(Number(used) >= 24 * MiB, `${name}: ${used} bytes are stored`);
      await module.require(`close ${name}`);
    }
    await module.require(`detach ${part}`);
    await guest.run('rm /srv/origin/beneath');
  },
);

test.serial("somebody else's write into a store on an origin ends the snapshot", async (t) => {
  await guest.run('fallocate -l 16M /srv/origin/store; sync');
  const { stdout } = await guest.run(
    `filefrag -b4096 -v /srv/origin/store | sed -nE 's/^ *0: +0\\.\\. *[0-9]+: +([0-9]+)\\.\\..*/\\1/p'`,
  );
  t.regex(stdout, /^\d+\n$/);
  const held = await hold('foreign', 'parted', '', 'file:/srv/origin/store', 'mounts=/srv/origin');
  // Into the middle of it, past its file system.
  await guest.run(
    `dd if=/dev/zero of=${partition()} bs=4096 seek=$((${stdout.trim()} + 1024)) count=1 oflag=direct conv=notrunc status=none`,
  );
  const [type, reason] = await module.require(`event ${held.name} ${askLimitMs}`, 2 * askLimitMs);
  t.deepEqual([type, reasonName(Number(reason))], ['2', 'FOREIGN_WRITE']);
});

test.serial('a range that is marked by hand has changed', async (t) => {
  const args = '--store memory --store-size 32M';
  const { id, number } = await tracked('raw');
  await release(t, await proveRaw('unmarked', args, `memory:${32 * MiB}`, 10));
  await oracle.require('stop raw');
  // Beyond what the writer writes to.
  const offset = writtenBytes + 4 * 65_536;
  if (withProduct) {
    await guest.run(`${cli} device mark ${raw} --offset ${offset} --length 100`, {
      timeoutMs: cliLimitMs,
    });
  } else {
    await module.require(`mark ${id} ${offset} 100`);
  }
  const held = await hold('marks', 'raw', `${args} --incremental unmarked`, `memory:${32 * MiB}`);
  const marked = (await changes(held, 'raw', 'unmarked', number)).filter(
    ({ offset: at }) => at >= writtenBytes,
  );
  t.deepEqual(marked, [{ offset, length: 65_536 }]);
  await release(t, held);
});

/** STILLBLOCK_HISTORY_EXHAUSTED. */
const exhausted = 20;
const lastNumber = 255;

// Nothing of it knows the kernel, and it takes its time.
if (withProduct) {
  test.serial('behind the last number of a generation another one begins', async (t) => {
    const disk = node('parted');
    const block = 65_536;
    /** Writes a block between the partition table and the partition. */
    const write = (at: number) =>
      guest.run(
        `dd if=/dev/urandom of=${disk} bs=${block} seek=${at} count=1 oflag=direct conv=notrunc status=none`,
      );
    const covers = (ranges: readonly Range[], at: number): boolean =>
      ranges.some(
        ({ offset, length }) => offset <= at * block && (at + 1) * block <= offset + length,
      );
    const before = await tracked('parted');
    await module.require(`repeat ${lastNumber - before.number} ${before.id}`, cliLimitMs);
    const { number, generation } = await tracked('parted');
    t.deepEqual([number, generation], [lastNumber, before.generation]);
    await write(2);
    const last = await hold('last', 'parted', '', `memory:${16 * MiB}`);
    t.true(covers(await changes(last, 'parted', '', lastNumber - 1), 2), 'a write before it');
    await release(t, last);
    const after = await tracked('parted');
    t.is(after.number, 1);
    t.not(after.generation, before.generation);
    t.is(Number((await module.require('list'))[1]?.split(':')[6]), exhausted);
    await write(4);
    const first = await hold('first', 'parted', '', `memory:${16 * MiB}`);
    const changed = await changes(first, 'parted', '', 0);
    t.true(covers(changed, 4), 'a write of the new generation');
    t.false(covers(changed, 2), 'a write of the one before');
    await release(t, first);
  });
}

test.serial('a very large device has larger blocks, and is preserved to its end', async (t) => {
  const huge = '/dev/mapper/huge';
  const spare = node('spare');
  // Its end is where numbers of chunks have 33 bits.
  const startMiB = 2 ** 46 / MiB;
  await guest.run(
    `set -e; dd if=/dev/urandom of=${spare} bs=1M count=8 oflag=direct status=none
    printf '0 %d error\\n%d %d linear ${spare} 0\\n' ${startMiB * 2048} ${startMiB * 2048} ${disks.spare * 2048} |
      dmsetup create --noudevsync huge
    dmsetup mknodes`,
  );
  const [id] = await module.require(`attach ${huge}`);
  // With blocks of 1 MiB its map would have more than 64 MiB.
  t.is((await module.require('list')).at(-1)?.split(':')[8], String(2 * MiB));
  const [image] = await module.require(`take huge trackers=${id} stores=memory:${32 * MiB}`);
  const end = (device: string) =>
    guest
      .run(`dd if=${device} bs=1M skip=${startMiB} count=8 iflag=direct status=none | ${checksum}`)
      .then(({ stdout }) => stdout);
  const before = await end(huge);
  t.is(await end(`/dev/${image}`), before);
  await guest.run(
    `dd if=/dev/zero of=${huge} bs=1M seek=${startMiB} count=4 oflag=direct conv=notrunc status=none`,
  );
  t.not(await end(huge), before);
  t.is(await end(`/dev/${image}`), before);
  t.is((await module.require('state huge'))[0], 'held');
  await module.require('close huge');
  await module.require(`detach ${id}`);
  const refused = refusalIn(await module.ask(`attach ${huge} 65536`));
  t.is(refused?.reason, 'BAD_BLOCK_SIZE');
  await guest.run('dmsetup remove --noudevsync huge');
});

test.serial('a device that is resized has a new history, of its new size', async (t) => {
  const args = '--store memory --store-size 32M';
  const before = await tracked('raw');
  await guest.run(
    `set -e; dmsetup load raw --table '0 ${36 * 2048} linear ${node('raw')} 0'
    dmsetup suspend --nolockfs raw; dmsetup resume --noudevsync raw`,
  );
  if (withProduct) {
    const refused = await guest.run(
      Backup.commandLine('larger', `--disk ${raw} ${args} --incremental marks`),
      { check: false, timeoutMs: cliLimitMs },
    );
    t.is(refused.code, fullRequired, refused.stdout);
    t.regex(refused.stderr, /began anew/);
  }
  const held = await hold('larger', 'raw', args, `memory:${32 * MiB}`);
  const { stdout } = await guest.run(`blockdev --getsize64 ${held.image}`);
  t.is(Number(stdout), 36 * MiB);
  await release(t, held);
  const after = await tracked('raw');
  t.not(after.generation, before.generation);
  const next = await hold('later', 'raw', `${args} --incremental larger`, `memory:${32 * MiB}`);
  t.is((await tracked('raw')).generation, after.generation);
  await release(t, next);
});

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
