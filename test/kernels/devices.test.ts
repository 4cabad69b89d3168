// SPDX-License-Identifier: Apache-2.0
// Every kind of device that is supported, in one guest. All of them are
// attached, each is written to by its own writer (oracle.c), and two snapshots
// are taken of all at one instant each: every image has to be what was on its
// device at that instant, and every change map what has changed between the
// two.

import test from 'ava';
import { testKernel } from '../vm/checkout.ts';
import { arrayOnOneDisk } from '../vm/console.ts';
import { bootGuest, type Guest } from '../vm/guest.ts';
import { buildTool, Conversation, MiB, pace } from './world.ts';

const kernel = testKernel();
/** What a writer writes to, from the start of its device. */
const writtenBytes = 6 * MiB;
/** What is zeroed of each device, behind that. */
const zeroed = { start: 8 * MiB, length: 4 * MiB } as const;
/** The writers leave the processors to the others: microseconds between two writes. */
const paceUs = pace(80_000);
/** More than a first write to everything, in whole chunks, in each of the images. */
const storeBytes = 200 * MiB;
/** The unit of change tracking of devices of these sizes. */
const blockBytes = 65_536;
const setupLimitMs = 240_000;
const checkLimitMs = 180_000;

const disks = {
  whole: 24,
  parted: 96,
  both: 40,
  under: 24,
  lvm1: 64,
  lvm2: 64,
  crypt: 24,
  md: 200,
  files: 48,
  store: 232,
} as const;

/** A kind of device, top down where they are stacked; its writer has its name. */
interface Kind {
  readonly what: string;
  /** Device node, where it is no data disk. */
  readonly path?: string;
  readonly disk?: keyof typeof disks;
  readonly partition?: number;
  /** It is written to through another one above it. */
  readonly beneath?: true;
}

const kinds: Readonly<Record<string, Kind>> = {
  whole: { what: 'a whole disk', disk: 'whole' },
  part: { what: 'a partition', disk: 'parted', partition: 1 },
  bothPart: { what: 'a partition whose disk is tracked, too', disk: 'both', partition: 1 },
  both: { what: 'a disk whose partition is tracked, too', disk: 'both', beneath: true },
  upper: { what: 'a dm device over a tracked disk', path: '/dev/mapper/upper' },
  under: { what: 'a disk under a tracked dm device', disk: 'under', beneath: true },
  linear: { what: 'LVM, linear', path: '/dev/mapper/vg0-linear' },
  striped: { what: 'LVM, striped', path: '/dev/mapper/vg0-striped' },
  thin: { what: 'LVM, thin', path: '/dev/mapper/vg0-thin' },
  crypt: { what: 'dm-crypt', path: '/dev/mapper/secret' },
  raid0: { what: 'md RAID 0', path: '/dev/md0' },
  raid1: { what: 'md RAID 1', path: '/dev/md1' },
  raid5: { what: 'md RAID 5', path: '/dev/md5' },
  loop: { what: 'a loop device', path: '/dev/loop0' },
  nvme: { what: 'NVMe', path: '/dev/nvme0n1' },
  scsi: { what: 'virtio-scsi', path: '/dev/sda' },
};
const names = Object.keys(kinds);
const writers = names.filter((name) => kinds[name]?.beneath !== true);

let guest: Guest;
let oracle: Conversation;
let module: Conversation;
const nodes = new Map<string, string>();

function path(name: string): string {
  const { path: fixed, disk = '', partition = '' } = kinds[name] ?? {};
  return fixed ?? `${nodes.get(disk)}${partition}`;
}

test.before(async () => {
  const [oracleProgram, ioctls] = await Promise.all([buildTool('oracle'), buildTool('ioctls')]);
  guest = await bootGuest({
    kernel,
    saved: true,
    disks: [
      ...Object.entries(disks).map(([name, size]) => ({ name, sizeBytes: size * MiB })),
      { name: 'nvme', sizeBytes: 24 * MiB, bus: 'nvme' },
      { name: 'scsi', sizeBytes: 24 * MiB, bus: 'virtio-scsi' },
    ],
  });
  for (const name of Object.keys(disks)) nodes.set(name, await guest.disk(name));
  const [parted, both, under, md, files, store] = (
    ['parted', 'both', 'under', 'md', 'files', 'store'] as const
  ).map((name) => nodes.get(name) ?? '');
  const [lvm1, lvm2, crypt] = (['lvm1', 'lvm2', 'crypt'] as const).map(
    (name) => nodes.get(name) ?? '',
  );
  await guest.run(
    `set -e
    modprobe -a nvme virtio_scsi sd_mod dm-mod dm-thin-pool dm-crypt raid0 raid1 raid456 loop
    printf 'start=1MiB, size=32MiB\\nstart=34MiB\\n' | sfdisk --quiet --label dos ${parted}
    echo 'start=1MiB, size=32MiB' | sfdisk --quiet --label dos ${both}
    printf 'start=%sMiB, size=24MiB\\n' 1 26 51 76 101 126 151 | sfdisk --quiet --label gpt ${md}
    dmsetup create --noudevsync upper --table "0 $(blockdev --getsz ${under}) linear ${under} 0"
    pvcreate -q ${lvm1} ${lvm2}; vgcreate -q vg0 ${lvm1} ${lvm2}
    lvcreate -q -y -Wn -L 20M -n linear vg0 ${lvm1}
    lvcreate -q -y -Wn -L 24M -i 2 -I 16k -n striped vg0
    lvcreate -q -y -L 32M --poolmetadatasize 4M -Zy --thinpool pool vg0
    lvcreate -q -y -Wn -V 24M --thin -n thin vg0/pool
    echo secret | cryptsetup open --disable-keyring --type plain --cipher aes-xts-plain64 --key-size 256 ${crypt} secret
    new() { mdadm --create --quiet --run --assume-clean --metadata=1.2 --homehost=any "$@"; }
    new /dev/md0 --level=0 --raid-devices=2 ${md}1 ${md}2
    new /dev/md1 --level=1 --raid-devices=2 ${md}3 ${md}4
    new /dev/md5 --level=5 --raid-devices=3 ${md}5 ${md}6 ${md}7
    mkdir -p /srv/files /srv/store
    mkfs.ext4 -q -F ${files}; mount ${files} /srv/files; fallocate -l 24M /srv/files/loop
    losetup /dev/loop0 /srv/files/loop
    dmsetup mknodes
    mkfs.ext4 -q -F -E nodiscard ${store}; mount ${store} /srv/store
    fallocate -l ${storeBytes} /srv/store/file; sync`,
    { timeoutMs: setupLimitMs },
  );
  oracle = new Conversation(guest, oracleProgram);
  await guest.loadModule();
  module = new Conversation(guest, ioctls);
  for (const name of names) await module.require(`attach ${path(name)}`);
  for (const name of writers) {
    await oracle.require(`open ${name} ${path(name)} ${writtenBytes} ${paceUs}`);
  }
});

test.after.always(() => guest?.kill());

/** How many writes of each writer had been completed, or at least submitted. */
async function progress(): Promise<Map<string, { completed: number; submitted: number }>> {
  const found = new Map<string, { completed: number; submitted: number }>();
  for (const name of writers) {
    const [completed = 0, submitted = 0, errno] = (await oracle.require(`now ${name}`)).map(Number);
    if (errno !== 0) throw new Error(`a write to ${name} failed: errno ${errno}`);
    found.set(name, { completed, submitted });
  }
  return found;
}

/** What is on the same sectors of two devices: the sizes and the second's offset in MiB. */
const sameSectors = [
  { upper: 'bothPart', lower: 'both', skipMiB: 1, sizeMiB: 32 },
  { upper: 'upper', lower: 'under', skipMiB: 0, sizeMiB: disks.under },
] as const;

/** The instants of a snapshot, as numbers of writes, by writer. */
type Instants = Map<string, number>;

/** The image of each device, by its name. */
type Images = Map<string, string>;

/** What was found wrong with a kind of device; one test for each says it. */
const problems = new Map<string, string[]>(names.map((name) => [name, []]));
const note = (name: string, problem: string): void => {
  problems.get(name)?.push(problem);
};

/** Takes a snapshot of all devices, top down. */
async function take(checkpoint: string): Promise<Images> {
  const trackers = (await module.require('list')).map((words) => words.split(':')[0]);
  const images = await module.require(
    `take ${checkpoint} trackers=${trackers.join(',')} stores=file:/srv/store/file`,
    checkLimitMs,
  );
  return new Map(names.map((name, index) => [name, `/dev/${images[index]}`]));
}

async function checkImages(
  images: Images,
  before: Awaited<ReturnType<typeof progress>>,
  after: Awaited<ReturnType<typeof progress>>,
): Promise<Instants> {
  const instants: Instants = new Map();
  for (const name of writers) {
    const low = before.get(name)?.completed;
    const high = after.get(name)?.submitted;
    const answer = await oracle.ask(
      `check ${name} ${images.get(name)} ${low} ${high}`,
      checkLimitMs,
    );
    const [, instant] = /^ok (\d+)$/.exec(answer) ?? [];
    if (instant === undefined) note(name, answer);
    else instants.set(name, Number(instant));
  }
  for (const { upper, lower, skipMiB, sizeMiB } of sameSectors) {
    const { code, stdout } = await guest.run(
      `dd if=${images.get(lower)} bs=1M skip=${skipMiB} count=${sizeMiB} status=none | cmp - ${images.get(upper)}`,
      { check: false, timeoutMs: checkLimitMs },
    );
    if (code !== 0) note(lower, `its image differs from that of ${upper}: ${stdout}`);
  }
  return instants;
}

/** Ranges that a snapshot calls changed since a number, cut to a window of the device. */
async function changedRanges(
  checkpoint: string,
  name: string,
  number: number,
  window: { readonly start: number; readonly length: number },
): Promise<string> {
  const ranges = await module.require(`map ${checkpoint} ${names.indexOf(name)} ${number}`);
  return ranges
    .map((words) => words.split(':').map(Number))
    .map(([offset = 0, length = 0]) => ({
      start: Math.max(offset, window.start),
      end: Math.min(offset + length, window.start + window.length),
    }))
    .filter(({ start, end }) => start < end)
    .map(({ start, end }) => `${start - window.start}:${end - start}`)
    .join(' ');
}

/** @param number that the first of the two snapshots had. */
async function checkChanges(
  checkpoint: string,
  number: number,
  from: Instants,
  to: Instants,
): Promise<void> {
  for (const name of names) {
    const stacked = sameSectors.find(({ lower }) => lower === name);
    const writer = stacked?.upper ?? name;
    const [old, young] = [from.get(writer), to.get(writer)];
    if (old === undefined || young === undefined) continue;
    const window = { start: (stacked?.skipMiB ?? 0) * MiB, length: writtenBytes };
    const ranges = await changedRanges(checkpoint, name, number, window);
    const answer = await oracle.ask(`covers ${writer} ${old} ${young} ${blockBytes} ${ranges}`);
    if (!answer.startsWith('ok')) note(name, answer);
    if (young <= old) note(name, 'nothing was written between the two snapshots');
  }
}

/** The number that writes are marked with now: the same for all, which began together. */
async function currentNumber(): Promise<number> {
  const numbers = new Set((await module.require('list')).map((words) => words.split(':')[3]));
  if (numbers.size !== 1) throw new Error(`numbers differ: ${[...numbers]}`);
  return Number([...numbers][0]);
}

test.serial('two snapshots of all devices at once, under writes', async (t) => {
  t.timeout(15 * 60_000);
  for (const name of writers) await oracle.require(`start ${name}`);
  for (const name of writers) await oracle.require(`reach ${name} 20`);
  const first = await currentNumber();
  const instants: Instants[] = [];
  for (const checkpoint of ['first', 'second']) {
    const before = await progress();
    const images = await take(checkpoint);
    const after = await progress();
    /*
     * Zeroes, where no writer writes. Where a device cannot do it by itself they are a
     * chain of bios, and the completion of those is a matter of its own.
     */
    await guest.run(
      `set -e\n${writers
        .map(
          (name) =>
            `blkdiscard --zeroout --offset ${zeroed.start} --length ${zeroed.length} ${path(name)}`,
        )
        .join('\n')}`,
      { timeoutMs: checkLimitMs },
    );
    // Copy-on-write is at work while the images are read.
    instants.push(await checkImages(images, before, after));
    if (checkpoint === 'second') {
      await checkChanges('second', first, instants[0] ?? new Map(), instants[1] ?? new Map());
    }
    t.is((await module.require(`state ${checkpoint}`))[0], 'held');
    await module.require(`close ${checkpoint}`);
    for (const name of writers) await oracle.require(`reach ${name} 5`);
  }
  for (const name of writers) {
    const [completed, , errno] = await oracle.require(`stop ${name}`);
    if (errno !== '0') note(name, `a write failed: errno ${errno}`);
    const answer = await oracle.ask(`check ${name} ${path(name)} ${completed} ${completed}`);
    if (!answer.startsWith('ok')) note(name, `the device itself: ${answer}`);
    await oracle.require(`close ${name}`);
  }
  t.log(Object.fromEntries(writers.map((name) => [name, instants.map((i) => i.get(name))])));
});

for (const [name, { what }] of Object.entries(kinds)) {
  test.serial(what, (t) => {
    t.deepEqual(problems.get(name), []);
  });
}

test.serial('after all that nothing is left, and the kernel has not complained', async (t) => {
  await oracle.end();
  await module.require('detach all');
  await module.end();
  await guest.run('rmmod stillblock');
  await t.notThrowsAsync(guest.shutdown([arrayOnOneDisk]));
});
