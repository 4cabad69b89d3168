// SPDX-License-Identifier: Apache-2.0
// How devices are used: by file systems, whose images have to be consistent; for
// swap, on another partition of a tracked disk, while the machine swaps; and
// raw, by every way to submit a write that the kernel has.

import test from 'ava';
import { testKernel } from '../vm/checkout.ts';
import type { GuestCommand } from '../vm/command.ts';
import { bootGuest, type Guest } from '../vm/guest.ts';
import { shellQuote } from '../vm/initrd.ts';
import { smallXfs } from '../vm/xfs.ts';
import { askLimitMs, buildKernelModule, buildTool, Conversation, checksum, MiB } from './world.ts';

const kernel = testKernel();
const disks = { ext4: 48, xfs: 64, btrfs: 128, parted: 96, raw: 16, store: 240 } as const;
type Name = keyof typeof disks;
const storeBytes = 128 * MiB;
const checkLimitMs = 180_000;
/** Larger than what its control group lets stay in memory. */
const hogMiB = 64;
const hogLimitMiB = 32;

let guest: Guest;
let module: Conversation;
const nodes = new Map<Name, string>();
const ids = new Map<string, string>();
const node = (name: Name): string => nodes.get(name) ?? '';

async function attach(device: string): Promise<string> {
  const [id = ''] = await module.require(`attach ${device}`);
  ids.set(device, id);
  return id;
}

test.before(async () => {
  const ioctls = await buildTool('ioctls');
  guest = await bootGuest({
    kernel,
    saved: true,
    disks: [
      ...Object.entries(disks).map(([name, size]) => ({ name, sizeBytes: size * MiB })),
      // It has a queue that is polled, for writes that are.
      { name: 'nvme', sizeBytes: 16 * MiB, bus: 'nvme' },
    ],
  });
  for (const name of Object.keys(disks) as Name[]) nodes.set(name, await guest.disk(name));
  await guest.run(
    `set -e
    modprobe -a nvme xfs btrfs loop
    mkdir -p /srv/store /srv/ext4 /srv/xfs /srv/btrfs
    mkfs.ext4 -q -F -E nodiscard ${node('store')}; mount ${node('store')} /srv/store
    fallocate -l ${storeBytes} /srv/store/file
    mkfs.ext4 -q -F ${node('ext4')}; mount ${node('ext4')} /srv/ext4
    ${smallXfs} -K ${node('xfs')}; mount ${node('xfs')} /srv/xfs
    mkfs.btrfs -q ${node('btrfs')}; mount ${node('btrfs')} /srv/btrfs
    for fs in ext4 xfs btrfs; do dd if=/dev/urandom of=/srv/$fs/old bs=1M count=8 status=none; done
    printf 'start=1MiB, size=32MiB\\nstart=34MiB\\n' | sfdisk --quiet --label dos ${node('parted')}
    sync`,
    { timeoutMs: checkLimitMs },
  );
  await guest.loadModule();
  module = new Conversation(guest, ioctls);
});

test.after.always(() => guest?.kill());

/** Checks an image, and prints the hash of `old` in it. */
const checkers = {
  ext4: (image: string) =>
    `e2fsck -fn ${image} >/dev/null; mount -o ro,noload ${image} /run/image; ${checksum} </run/image/old; umount /run/image`,
  // A frozen XFS keeps a record in its log: the checker wants it replayed, on a copy.
  xfs: (image: string) =>
    `mount -o ro,norecovery,nouuid ${image} /run/image; ${checksum} </run/image/old; umount /run/image
    dd if=${image} of=/srv/store/copy bs=1M conv=sparse status=none
    losetup /dev/loop6 /srv/store/copy
    mount -o nouuid /dev/loop6 /run/image; umount /run/image; xfs_repair -n /dev/loop6 >/dev/null 2>&1
    losetup -d /dev/loop6; rm /srv/store/copy`,
  // Not mounted: a second device of the same file system would be taken for a part of it.
  btrfs: (image: string) =>
    `btrfs check --readonly --force ${image} >/dev/null 2>&1
    mkdir -p /srv/store/restored; btrfs restore ${image} /srv/store/restored >/dev/null 2>&1
    ${checksum} </srv/store/restored/old; rm -r /srv/store/restored`,
} as const;

test.serial('mounted file systems of three kinds are consistent, at one instant', async (t) => {
  t.timeout(10 * 60_000);
  const kinds = Object.keys(checkers) as (keyof typeof checkers)[];
  const writers: GuestCommand[] = kinds.map((kind) =>
    guest.start(
      `i=0; while :; do i=$((i + 1)); dd if=/dev/urandom of=/srv/${kind}/new.$((i % 16)) bs=64k count=8 conv=fsync status=none; mv /srv/${kind}/new.$((i % 16)) /srv/${kind}/kept.$((i % 32)); echo $i; done`,
    ),
  );
  for (const writer of writers) await writer.waitForOutput(/^3$/m, checkLimitMs);
  for (const kind of kinds) await attach(node(kind));
  const before = await Promise.all(kinds.map((kind) => guest.run(`${checksum} </srv/${kind}/old`)));
  const images = await module.require(
    `take mounted trackers=${[...ids.values()].join(',')} mounts=${kinds.map((kind) => `/srv/${kind}`).join(',')} stores=file:/srv/store/file`,
  );
  // What was there before is overwritten, and then read from the images.
  await guest.run(
    kinds
      .map(
        (kind) =>
          `dd if=/dev/zero of=/srv/${kind}/old bs=1M count=8 conv=notrunc,fsync status=none`,
      )
      .join('\n'),
    { timeoutMs: checkLimitMs },
  );
  for (const writer of writers) {
    const done = writer.stdout.split('\n').length;
    await writer.waitForOutput(new RegExp(`^${done + 8}$`, 'm'), checkLimitMs);
  }
  // They would slow the checks down.
  for (const writer of writers) {
    t.is(writer.code, undefined, 'a writer has ended');
    writer.kill(9);
    await writer.wait(askLimitMs);
  }
  for (const [index, kind] of kinds.entries()) {
    const { code, stdout, stderr } = await guest.run(
      `set -e; mkdir -p /run/image; ${checkers[kind](`/dev/${images[index]}`)}`,
      { check: false, timeoutMs: checkLimitMs },
    );
    t.is(code, 0, `${kind}: ${stdout}${stderr}`);
    t.is(
      stdout,
      before[index]?.stdout ?? '',
      `${kind}: what the image holds is not what was there`,
    );
  }
  t.is((await module.require('state mounted'))[0], 'held');
  await module.require('close mounted');
  await module.require('detach all');
  ids.clear();
  await guest.run(
    `set -e; for fs in ext4 xfs btrfs; do umount /srv/$fs; done
    e2fsck -fn ${node('ext4')} >/dev/null; xfs_repair -n ${node('xfs')} >/dev/null 2>&1
    btrfs check --readonly ${node('btrfs')} >/dev/null 2>&1`,
    { timeoutMs: checkLimitMs },
  );
});

/** Writes all of its memory again and again, and looks whether it is still what it was. */
const hog = `
import sys
size = ${hogMiB} << 20
memory = bytearray(size)
for turn in range(1, 1 << 30):
    for at in range(0, size, 4096):
        if turn > 1 and memory[at] != (turn - 1 + at // 4096) % 251: sys.exit(f"page {at // 4096} is lost")
        memory[at] = (turn + at // 4096) % 251
    print(turn, flush=True)
`;

test.serial(
  'a disk is tracked and held while the machine swaps to another partition of it',
  async (t) => {
    t.timeout(10 * 60_000);
    const [part, swap] = [`${node('parted')}1`, `${node('parted')}2`];
    await guest.run(
      `set -e; mkfs.ext4 -q -F ${part}; mkswap ${swap} >/dev/null; swapon ${swap}
    mkdir -p /run/groups; mount -t cgroup2 none /run/groups
    echo +memory >/run/groups/cgroup.subtree_control; mkdir /run/groups/hog
    echo ${hogLimitMiB}M >/run/groups/hog/memory.max`,
    );
    for (const device of [part, node('parted')]) await attach(device);
    const hungry = guest.start(
      `echo $$ >/run/groups/hog/cgroup.procs; exec python3 -c ${shellQuote(hog)}`,
    );
    await hungry.waitForOutput(/^2$/m, checkLimitMs);
    const swapped = () =>
      guest.run(`awk '/^pswpout/ { print $2 }' /proc/vmstat`).then(({ stdout }) => Number(stdout));
    const early = await swapped();
    t.true(early > 0, 'nothing is swapped');
    const turn = (): number => Number(hungry.stdout.trimEnd().split('\n').at(-1));
    for (const name of ['first', 'second']) {
      const images = await module.require(
        `take ${name} trackers=${[...ids.values()].join(',')} stores=file:/srv/store/file`,
      );
      const hash = () =>
        guest
          .run(images.map((image) => `${checksum} </dev/${image}`).join('; '), {
            timeoutMs: checkLimitMs,
          })
          .then(({ stdout }) => stdout);
      const before = await hash();
      const at = turn();
      await hungry.waitForOutput(new RegExp(`^${at + 2}$`, 'm'), checkLimitMs);
      await guest.run('echo 3 >/proc/sys/vm/drop_caches');
      t.is(await hash(), before, 'an image changed while it was held');
      await module.require(`close ${name}`);
    }
    t.true((await swapped()) > early, 'nothing was swapped out while the snapshots were held');
    t.is(hungry.code, undefined, `the machine lost memory: ${hungry.stderr}`);
    hungry.kill(9);
    await hungry.wait(askLimitMs);
    await module.require('detach all');
    ids.clear();
    await guest.run(`swapoff ${swap}`, { timeoutMs: checkLimitMs });
  },
);

/** Ways to submit writes, as fio calls them; polling is for the device that can. */
const engines = [
  { what: 'pwrite', args: '--ioengine=psync' },
  { what: 'pwritev2 with NOWAIT', args: '--ioengine=pvsync2 --nowait=1' },
  { what: 'libaio', args: '--ioengine=libaio --iodepth=16' },
  { what: 'libaio with NOWAIT', args: '--ioengine=libaio --iodepth=4 --nowait=1' },
  { what: 'io_uring', args: '--ioengine=io_uring --iodepth=16' },
  {
    what: 'io_uring with NOWAIT, fixed buffers and a polling kernel thread',
    args: '--ioengine=io_uring --iodepth=4 --nowait=1 --fixedbufs=1 --sqthread_poll=1',
  },
  { what: 'io_uring, polled', args: '--ioengine=io_uring --iodepth=8 --hipri=1', polled: true },
  { what: 'pwritev2, polled', args: '--ioengine=pvsync2 --hipri=1', polled: true },
] as const;

test.serial('raw writes of every kind are preserved, and arrive', async (t) => {
  t.timeout(10 * 60_000);
  const devices = [node('raw'), '/dev/nvme0n1'];
  for (const device of devices) {
    await guest.run(`dd if=/dev/urandom of=${device} bs=1M count=16 oflag=direct status=none`);
    await attach(device);
  }
  for (const [index, engine] of engines.entries()) {
    // By turns, but for what one of them alone can do.
    for (const device of 'polled' in engine ? ['/dev/nvme0n1'] : [devices[index % 2] ?? '']) {
      const name = `${index}-${device.slice(5)}`;
      const before = await guest.run(`${checksum} <${device}`);
      const [image] = await module.require(
        `take ${name} trackers=${ids.get(device)} stores=memory:${64 * MiB}`,
      );
      const { code, stdout, stderr } = await guest.run(
        `exec fio --name=raw --filename=${device} --direct=1 ${engine.args} --rw=randwrite \
          --bsrange=4k-128k --size=4M --offset=${index}M --randrepeat=0 --verify=crc32c --do_verify=1 --verify_fatal=1 --minimal`,
        { check: false, timeoutMs: checkLimitMs },
      );
      t.is(code, 0, `${engine.what} on ${device}: ${stdout}${stderr}`);
      t.is(stdout.split(';')[4], '0', `${engine.what} on ${device}: ${stdout}`);
      const after = await guest.run(`${checksum} </dev/${image}`);
      t.is(after.stdout, before.stdout, `${engine.what} on ${device}: the image has changed`);
      t.not((await guest.run(`${checksum} <${device}`)).stdout, before.stdout);
      await module.require(`close ${name}`);
    }
  }
  await module.require('detach all');
});

test.serial(
  'a discard is swallowed while a snapshot is held, zeroes and erases are preserved',
  async (t) => {
    const device = node('raw');
    const id = await attach(device);
    const hash = (path: string) =>
      guest
        .run(`echo 1 >/proc/sys/vm/drop_caches; ${checksum} <${path}`)
        .then(({ stdout }) => stdout);
    const before = await hash(device);
    const [image] = await module.require(`take zeroes trackers=${id} stores=memory:${64 * MiB}`);
    await guest.run(`blkdiscard ${device}`);
    t.is(await hash(device), before, 'data is gone that nothing can preserve any more');
    t.is(await hash(`/dev/${image}`), before);
    await guest.run(
      `blkdiscard --zeroout --offset ${MiB + 4096} --length ${8 * MiB + 512} ${device}`,
    );
    await guest.run(
      `set -e; cmp -n ${8 * MiB + 512} ${device} /dev/zero -i ${MiB + 4096}:0
    ! cmp -n 512 ${device} /dev/zero -i ${MiB + 4096 - 512}:0 >/dev/null
    ! cmp -n 512 ${device} /dev/zero -i ${9 * MiB + 4096 + 512}:0 >/dev/null`,
    );
    t.is(await hash(`/dev/${image}`), before, 'zeroes were not preserved');
    const used = async () => Number((await module.require('state zeroes'))[2]);
    const earlier = await used();
    const erase = await buildKernelModule('secure-erase', kernel);
    const erased = await guest.run(
      `insmod ${shellQuote(erase)} major=$((0x$(stat -c %t ${device}))) minor=$((0x$(stat -c %T ${device}))) \
      first=${((12 * MiB) >> 9) + 1} sectors=${(2 * MiB) >> 9}`,
      { check: false },
    );
    t.regex(erased.stderr, /cancell?ed/, 'no disk of a guest can do it, and it came to that disk');
    t.is(
      (await used()) - earlier,
      2 * MiB + 16_384,
      'what a secure erase touches, in whole chunks',
    );
    t.is(await hash(`/dev/${image}`), before);
    await module.require('close zeroes');
    await guest.run(`blkdiscard ${device}`);
    t.not(await hash(device), before, 'a discard is swallowed when nobody holds a snapshot');
    await module.require('detach all');
  },
);

test.serial('after all that nothing is left, and the kernel has not complained', async (t) => {
  await module.end();
  await guest.run('set -e; rmmod stillblock; umount /srv/store');
  await t.notThrowsAsync(guest.shutdown());
});
