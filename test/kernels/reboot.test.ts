// SPDX-License-Identifier: Apache-2.0
// What changed survives a reboot: two disks with file systems, and a place for their
// histories, boot after boot. What the module says after each of them is compared with
// the disks' content, and with why it says so.

import {
  closeSync,
  copyFileSync,
  mkdtempSync,
  openSync,
  readSync,
  rmSync,
  writeSync,
} from 'node:fs';
import { constants, tmpdir } from 'node:os';
import { join } from 'node:path';
import test from 'ava';
import { type KernelName, testKernel } from '../vm/checkout.ts';
import { bootGuest, type Guest } from '../vm/guest.ts';
import { makeSparseFile } from '../vm/host.ts';
import { smallXfs } from '../vm/xfs.ts';
import { history, type Seen, seenHistories } from './histories.ts';
import { buildTool, Conversation, MiB } from './world.ts';

const kernel = testKernel();
/** STILLBLOCK_REASON_PLACE_BUSY, _UNSUITABLE. */
const placeBusy = 33;
const placeUnsuitable = 34;
/** Into which the machine is rebooted, and back: an update of the kernel. */
const otherKernel: KernelName = kernel === '6.1' ? '6.12' : '6.1';
const disks = { root: 64, data: 96, place: 4, copy: 64, copied: 128, tree: 128 } as const;
type DiskName = keyof typeof disks;
const tracked = ['root', 'data'] as const;
type TrackedName = (typeof tracked)[number];
/** Units of change tracking, bytes; 0: as large as the module likes. So a map has two pages. */
const blockBytes: Partial<Record<DiskName, number>> = { data: 16_384 };

let folder = '';
let ioctls = '';
const file = (name: DiskName): string => join(folder, name);

test.before(async () => {
  ioctls = await buildTool('ioctls');
  folder = mkdtempSync(join(tmpdir(), 'stillblock-reboot-'));
  for (const [name, size] of Object.entries(disks)) {
    makeSparseFile(join(folder, name), size * MiB);
  }
});

test.after.always(async () => {
  await machine?.guest.kill();
  rmSync(folder, { recursive: true, force: true });
});

/** A guest with our module, from its boot to its end. */
class Machine {
  readonly guest: Guest;
  readonly module: Conversation;
  readonly nodes: ReadonlyMap<string, string>;

  constructor(guest: Guest, module: Conversation, nodes: ReadonlyMap<string, string>) {
    this.guest = guest;
    this.module = module;
    this.nodes = nodes;
  }

  static async boot(withModule = true, on: KernelName = kernel): Promise<Machine> {
    const guest = await bootGuest({
      kernel: on,
      saved: true,
      disks: Object.entries(disks).map(([name, size]) => ({
        name,
        sizeBytes: size * MiB,
        file: join(folder, name),
      })),
    });
    const nodes = new Map<string, string>();
    for (const name of Object.keys(disks)) nodes.set(name, await guest.disk(name));
    if (withModule) await guest.loadModule();
    machine = new Machine(guest, new Conversation(guest, ioctls), nodes);
    return machine;
  }

  node(name: DiskName): string {
    return this.nodes.get(name) ?? '';
  }

  /** The place, and both disks, as an initramfs attaches them. */
  async attach(place = `device:${this.node('place')}`): Promise<Record<TrackedName, Seen>> {
    await this.module.ask(`place ${place}`);
    for (const name of tracked) await this.track(name);
    return this.seen();
  }

  async track(name: DiskName): Promise<void> {
    await this.module.require(`attach ${this.node(name)} ${blockBytes[name] ?? 0} ${name}`);
  }

  /** @returns what the module says of it then: the last that was attached is the last that it lists */
  async attachDisk(name: DiskName): Promise<Seen | undefined> {
    await this.track(name);
    return (await seenHistories(this.module)).at(-1);
  }

  async seen(): Promise<Record<TrackedName, Seen>> {
    const [root, data] = await seenHistories(this.module);
    if (root === undefined || data === undefined) throw new Error('two devices are not tracked');
    return { root, data };
  }

  async mount(): Promise<void> {
    await this.guest.run(
      `mkdir -p /srv/root /srv/data; mount ${this.node('root')} /srv/root && mount ${this.node('data')} /srv/data`,
    );
  }

  async write(name: string, kib: number): Promise<void> {
    await this.guest.run(
      `for at in root data; do dd if=/dev/urandom of=/srv/$at/${name} bs=1k count=${kib} status=none; done; sync`,
    );
  }

  async unmount(): Promise<void> {
    await this.guest.run('umount /srv/root && umount /srv/data');
  }

  /** A snapshot; what changed above a number goes onto the copies, which must be whole then. */
  async copy(above: Record<TrackedName, number>): Promise<Record<TrackedName, number>> {
    const { root, data } = await this.seen();
    const images = await this.module.require(
      `take now trackers=${root.id},${data.id} mounts=/srv/root,/srv/data stores=memory:${32 * MiB}`,
    );
    const bytes: Record<TrackedName, number> = { root: 0, data: 0 };
    for (const [index, name] of tracked.entries()) {
      const to = name === 'root' ? 'copy' : 'copied';
      bytes[name] = await this.bring(name, to, index, `/dev/${images[index]}`, above[name]);
    }
    await this.module.require('close now');
    return bytes;
  }

  /**
   * Brings a copy up to an image of the snapshot that is open, and compares them.
   *
   * @param above the number that the copy is of; less than zero for a full one
   * @returns how much was copied
   */
  async bring(
    name: DiskName,
    to: DiskName,
    index: number,
    image: string,
    above: number,
  ): Promise<number> {
    const whole = disks[name] * MiB;
    const ranges =
      above < 0 ? [`0:${whole}`] : await this.module.require(`map now ${index} ${above}`);
    let bytes = 0;
    const unit = above < 0 ? MiB : (blockBytes[name] ?? 65_536);
    const copies = ranges.map((range) => {
      const [offset, length] = range.split(':').map(Number) as [number, number];
      bytes += length;
      return `dd if=${image} of=${this.node(to)} bs=${unit} iflag=direct oflag=direct conv=notrunc status=none skip=${offset / unit} seek=${offset / unit} count=${Math.ceil(length / unit)}`;
    });
    await this.guest.run([...copies, `cmp -n ${whole} ${image} ${this.node(to)}`].join(' && '));
    return bytes;
  }

  async shutdown(allowed: readonly RegExp[] = []): Promise<void> {
    await this.module.end();
    await this.guest.shutdown(allowed);
  }
}

let machine: Machine | undefined;
/** The number and the generation of the last checkpoint. */
const numbers: Record<TrackedName, number> = { root: -1, data: -1 };
const generations: Record<TrackedName, string> = { root: '', data: '' };

async function checkpoint(at: Machine): Promise<Record<TrackedName, number>> {
  const before = await at.seen();
  const bytes = await at.copy(numbers);
  for (const name of tracked) {
    numbers[name] = before[name].number;
    generations[name] = before[name].generation;
  }
  return bytes;
}

/** What the disks begin again with: a full copy. */
function forgetCheckpoint(): void {
  for (const name of tracked) numbers[name] = -1;
}

/** Changes bytes of a disk's file, while no guest runs. */
function tamper(
  name: DiskName,
  offset: number,
  change: (bytes: Buffer) => void,
  length = 4096,
): void {
  const descriptor = openSync(file(name), 'r+');
  const bytes = Buffer.alloc(length);
  readSync(descriptor, bytes, 0, length, offset);
  change(bytes);
  writeSync(descriptor, bytes, 0, length, offset);
  closeSync(descriptor);
}

/** Of the maps of these disks: a byte for each block, in whole pages. */
const pages = { root: 1, data: 2 } as const;

/** First byte of the place on its device, and of the first map in it. */
const placeStart = 1 * MiB;
const mapStart = placeStart + 65 * 4096;

test.serial('a history survives a clean reboot, and its numbers are right', async (t) => {
  t.timeout(10 * 60_000);
  let at = await Machine.boot();
  await at.guest.run(`mkfs.ext4 -q -F ${at.node('root')}; ${smallXfs} -f ${at.node('data')}`);
  await at.module.require(`place device:${at.node('place')} format`);
  let seen = await at.attach();
  for (const name of tracked) t.like(seen[name], { began: history.first, kept: history.ok });
  await at.mount();
  await at.write('before', 256);
  await checkpoint(at);
  await at.write('after', 256);
  await at.unmount();
  await at.shutdown();

  at = await Machine.boot();
  // Zeroes would be the id of every boot; nothing is changed by the refusal.
  const bootless = await at.module.ask(`place device:${at.node('place')} bootless`);
  t.is(bootless, `bad ${constants.errno.EINVAL} ${placeUnsuitable} 0`);
  seen = await at.attach();
  for (const name of tracked) {
    t.like(
      seen[name],
      { takenUp: true, generation: generations[name], began: history.first },
      name,
    );
  }
  await at.mount();
  await at.write('booted', 256);
  const bytes = await checkpoint(at);
  t.log(bytes);
  for (const name of tracked) {
    t.true(bytes[name] >= 2 * 256 * 1024 && bytes[name] < 8 * MiB, `${name}: ${bytes[name]}`);
  }
  // This time the file systems stay mounted: the last writes are theirs.
  await at.shutdown();
});

test.serial('another kernel takes histories up, and hands them back', async (t) => {
  t.timeout(10 * 60_000);
  for (const on of [otherKernel, kernel]) {
    const at = await Machine.boot(true, on);
    const seen = await at.attach();
    for (const name of tracked) {
      t.like(seen[name], { takenUp: true, generation: generations[name] }, `${on}: ${name}`);
    }
    await at.mount();
    await at.write(`on-${on}`, 64);
    const bytes = await checkpoint(at);
    t.log(on, bytes);
    await at.shutdown();
  }
});

test.serial('a machine that is killed begins new histories', async (t) => {
  t.timeout(10 * 60_000);
  let at = await Machine.boot();
  let seen = await at.attach();
  for (const name of tracked) t.like(seen[name], { takenUp: true, generation: generations[name] });
  await at.mount();
  await at.write('killed', 64);
  await at.guest.kill();

  at = await Machine.boot();
  seen = await at.attach();
  for (const name of tracked) {
    t.like(seen[name], { takenUp: false, began: history.notSaved, kept: history.ok });
    t.not(seen[name].generation, generations[name]);
  }
  forgetCheckpoint();
  await at.mount();
  await checkpoint(at);
  await at.unmount();
  await at.shutdown();
});

test.serial('who writes to one disk without the module ends its history alone', async (t) => {
  t.timeout(10 * 60_000);
  let at = await Machine.boot(false);
  await at.guest.run(
    `mkdir -p /srv/data; mount ${at.node('data')} /srv/data; dd if=/dev/urandom of=/srv/data/before conv=notrunc bs=4k count=1 status=none; umount /srv/data`,
  );
  await at.shutdown();
  at = await Machine.boot();
  let seen = await at.attach();
  t.like(seen.root, { takenUp: true, generation: generations.root });
  t.like(seen.data, { takenUp: false, began: history.changed });
  await at.shutdown();
  // What was begun for a reason keeps the reason.
  at = await Machine.boot();
  seen = await at.attach();
  t.like(seen.data, { takenUp: true, began: history.changed });
  // Too late: somebody was faster than the attach.
  await at.module.require(`keep ${seen.root.id}`);
  await at.track('root');
  seen = await at.seen();
  const [data, root] = [seen.root, seen.data];
  t.like(root, { takenUp: true, generation: generations.root });
  t.truthy(data);
  await at.module.require(`keep ${root.id}`);
  await at.guest.run(
    `dd if=/dev/zero of=${at.node('root')} bs=4k seek=8192 count=1 oflag=direct status=none`,
  );
  await at.track('root');
  t.like((await at.seen()).data, { takenUp: false, began: history.written });
  // Kept at its detach, and not tracked until the reboot: who wrote then is not known.
  await at.module.require(`keep ${(await at.seen()).data.id}`);
  await at.guest.run(
    `dd if=/dev/urandom of=${at.node('root')} bs=4k seek=8192 count=1 oflag=direct status=none`,
  );
  await at.shutdown();
  at = await Machine.boot();
  seen = await at.attach();
  t.like(seen.root, { takenUp: false, began: history.notSaved });
  t.like(seen.data, { takenUp: true });
  await at.shutdown();
});

test.serial('a foreign system that crashes is seen', async (t) => {
  t.timeout(10 * 60_000);
  // Nothing but the head of the log shows this: the superblock is as it was.
  let at = await Machine.boot(false);
  await at.guest.run(
    `mkdir -p /srv/data; mount ${at.node('data')} /srv/data; dd if=/dev/urandom of=/srv/data/before conv=notrunc oflag=direct bs=64k count=1 status=none`,
  );
  await at.guest.kill();
  at = await Machine.boot();
  const seen = await at.attach();
  t.true(seen.root.takenUp);
  t.like(seen.data, { takenUp: false, began: history.changed });
  await at.shutdown();
});

test.serial('a place that is not right begins new histories, at once', async (t) => {
  t.timeout(20 * 60_000);
  const good = `${file('place')}.good`;
  copyFileSync(file('place'), good);
  const cases: readonly {
    what: string;
    change: () => void;
    expected: Record<TrackedName, number>;
  }[] = [
    {
      what: 'a bit of a map',
      change: () => tamper('place', mapStart, (b) => b.writeUInt8(b.readUInt8(100) ^ 1, 100)),
      expected: { root: history.damaged, data: -1 },
    },
    {
      what: 'a bit of a record',
      change: () =>
        tamper('place', placeStart + 4096, (b) => b.writeUInt8(b.readUInt8(300) ^ 1, 300)),
      expected: { root: history.damaged, data: -1 },
    },
    {
      what: 'a bit of the header',
      change: () => tamper('place', placeStart, (b) => b.writeUInt8(b.readUInt8(20) ^ 1, 20)),
      expected: { root: history.placeDamaged, data: history.placeDamaged },
    },
    {
      what: 'another version',
      change: () => tamper('place', placeStart, (b) => b.writeUInt32LE(b.readUInt32LE(8) + 1, 8)),
      expected: { root: history.placeVersion, data: history.placeVersion },
    },
    {
      what: 'nothing',
      change: () => tamper('place', placeStart, (b) => b.fill(0)),
      expected: { root: history.placeEmpty, data: history.placeEmpty },
    },
  ];
  for (const { what, change, expected } of cases) {
    copyFileSync(good, file('place'));
    change();
    const at = await Machine.boot();
    const { stdout } = await at.guest.run('cut -d" " -f1 /proc/uptime');
    const seen = await at.attach();
    const after = await at.guest.run('cut -d" " -f1 /proc/uptime');
    t.log(what, Number(after.stdout) - Number(stdout), 's');
    for (const name of tracked) {
      if (expected[name] < 0) t.true(seen[name].takenUp, `${what}: ${name}`);
      else t.like(seen[name], { takenUp: false, began: expected[name] }, `${what}: ${name}`);
    }
    await at.guest.kill();
  }
});

test.serial('the place may be a file of a tracked disk, which stays mounted', async (t) => {
  t.timeout(15 * 60_000);
  let at = await Machine.boot();
  await at.mount();
  await at.guest.run('fallocate -l 2M /srv/root/histories; sync');
  const [extents = ''] = await at.module.require('extents /srv/root/histories');
  const file = `file:/srv/root/histories:${at.node('root')}`;
  await at.module.require(`place ${file} format`);
  let seen = await at.attach('query');
  for (const name of tracked) t.like(seen[name], { began: history.first, kept: history.ok });
  forgetCheckpoint();
  await checkpoint(at);
  await at.write('inside', 256);
  await at.shutdown();

  for (const round of [1, 2]) {
    at = await Machine.boot();
    seen = await at.attach(`at:${at.node('root')}:${extents}`);
    for (const name of tracked) {
      t.like(
        seen[name],
        { takenUp: true, generation: generations[name], kept: history.placeLoose },
        `${round}: ${name}`,
      );
    }
    await at.mount();
    // Its extents are another's: what is written by them now could be anybody's.
    await at.guest.run('fallocate -l 2M /srv/root/other; sync');
    const other = await at.module.ask(`place file:/srv/root/other:${at.node('root')}`);
    t.is(other, `bad ${constants.errno.EBUSY} ${placeBusy} 0`);
    await at.module.require(`place ${file}`);
    seen = await at.seen();
    for (const name of tracked) t.is(seen[name].kept, history.ok);
    await at.write(`round${round}`, 64);
    const bytes = await checkpoint(at);
    t.log(round, bytes);
    for (const name of tracked) t.true(bytes[name] < 8 * MiB, `${name}: ${bytes[name]}`);
    if (round === 2) {
      // What is written to the place while its disk is not tracked changes that disk, too.
      await at.guest.run('sync; mount -o remount,ro /srv/root && mount -o remount,ro /srv/data');
      const before = await at.seen();
      for (const name of tracked) await at.module.require(`keep ${before[name].id}`);
      for (const name of tracked) await at.track(name);
      seen = await at.seen();
      for (const name of tracked) {
        t.like(seen[name], { takenUp: true, generation: generations[name] }, name);
      }
      await at.guest.run('mount -o remount,rw /srv/root && mount -o remount,rw /srv/data');
      // Which of its pages were written then is not known: all of it counts.
      const { root } = await checkpoint(at);
      t.true(root >= 2 * MiB, `${root}`);
    }
    await at.shutdown();
  }

  // Nobody holds the file fast: then nothing is kept, and that is said.
  at = await Machine.boot();
  await at.attach(`at:${at.node('root')}:${extents}`);
  await at.shutdown();
  at = await Machine.boot();
  seen = await at.attach(`at:${at.node('root')}:${extents}`);
  for (const name of tracked) t.like(seen[name], { takenUp: false, began: history.notSaved });
  await at.guest.kill();
});

test.serial('a device that did not come back leaves its room to another', async (t) => {
  t.timeout(10 * 60_000);
  // The ends of a device are left alone; a header, 64 records, and room for maps.
  const sectors = 2 * 2048 + (65 + pages.root + pages.data) * 8;
  const boot = async (format = ''): Promise<Machine> => {
    const at = await Machine.boot();
    await at.guest.run(
      `modprobe -a dm-mod btrfs; dmsetup create --noudevsync small --table '0 ${sectors} linear ${at.node('place')} 0'; dmsetup mknodes`,
    );
    await at.module.ask(`place device:/dev/mapper/small ${format}`);
    return at;
  };
  let at = await boot('format');
  await at.guest.run(`mkfs.btrfs -q -f ${at.node('tree')}`);
  const root = await at.attachDisk('root');
  t.like(root, { kept: history.ok });
  t.like(await at.attachDisk('data'), { kept: history.ok });
  t.like(await at.attachDisk('tree'), { kept: history.placeFull });
  await at.shutdown();

  // What was kept at the last shutdown may still come; after another one it is worthless.
  at = await boot();
  t.like(await at.attachDisk('tree'), { kept: history.placeFull });
  t.like(await at.attachDisk('root'), { takenUp: true, kept: history.ok });
  await at.shutdown();

  at = await boot();
  const tree = await at.attachDisk('tree');
  t.like(tree, { takenUp: false, kept: history.ok });
  t.like(await at.attachDisk('root'), { takenUp: true, generation: root?.generation ?? '' });
  t.like(await at.attachDisk('data'), { takenUp: false, kept: history.placeFull });
  await at.shutdown();

  at = await boot();
  t.like(await at.attachDisk('tree'), { takenUp: true, generation: tree?.generation ?? '' });
  t.like(await at.attachDisk('root'), { takenUp: true, generation: root?.generation ?? '' });
  await at.shutdown();
});

test.serial('what a failing place could not mark is not believed', async (t) => {
  t.timeout(15 * 60_000);
  const sectors = disks.place * 2048;
  const boot = async (format = ''): Promise<Machine> => {
    const at = await Machine.boot();
    await at.guest.run(
      `modprobe dm-mod; dmsetup create --noudevsync shaky --table '0 ${sectors} linear ${at.node('place')} 0'; dmsetup mknodes`,
    );
    await at.module.require(`place device:/dev/mapper/shaky ${format}`);
    return at;
  };
  let at = await boot('format');
  for (const name of tracked) t.like(await at.attachDisk(name), { kept: history.ok });
  await at.shutdown();

  // The place fails between two devices, and somebody writes where no file system is asked.
  at = await boot();
  t.like(await at.attachDisk('root'), { takenUp: true, kept: history.ok });
  await at.guest.run(
    `dmsetup suspend shaky; dmsetup load shaky --table '0 ${sectors} error'; dmsetup resume shaky`,
  );
  t.like(await at.attachDisk('data'), { takenUp: false, kept: history.placeError });
  await at.guest.run(
    `dd if=/dev/urandom of=${at.node('data')} bs=4k seek=8192 count=1 oflag=direct status=none`,
  );
  await at.shutdown([/I\/O error, dev dm-/]);

  at = await boot();
  for (const name of tracked) {
    t.like(await at.attachDisk(name), {
      takenUp: false,
      began: history.notSaved,
      kept: history.ok,
    });
  }
  await at.shutdown();

  // Where it was tracked at the last shutdown, if at all, nobody here knows.
  at = await boot();
  t.like(await at.attachDisk('root'), { takenUp: true });
  await at.shutdown();
  at = await boot();
  t.like(await at.attachDisk('root'), { takenUp: true });
  t.like(await at.attachDisk('data'), { takenUp: false, began: history.notSaved });
  await at.shutdown();
});

test.serial('btrfs: a clean reboot keeps the history, a write elsewhere ends it', async (t) => {
  t.timeout(15 * 60_000);
  const boot = async (withModule: boolean): Promise<Machine> => {
    const at = await Machine.boot(withModule);
    await at.guest.run('modprobe btrfs; mkdir -p /srv/tree');
    return at;
  };
  const attach = async (at: Machine, format = ''): Promise<Seen | undefined> => {
    await at.module.require(`place device:${at.node('place')} ${format}`);
    await at.track('tree');
    return (await seenHistories(at.module)).at(-1);
  };
  const write = (at: Machine, name: string): Promise<unknown> =>
    at.guest.run(
      `mountpoint -q /srv/tree || mount ${at.node('tree')} /srv/tree && dd if=/dev/urandom of=/srv/tree/${name} bs=64k count=4 conv=fsync status=none`,
    );
  const copy = async (at: Machine, above: number): Promise<number> => {
    const seen = (await seenHistories(at.module)).at(-1);
    const [image = ''] = await at.module.require(
      `take now trackers=${seen?.id} mounts=/srv/tree stores=memory:${32 * MiB}`,
    );
    const bytes = await at.bring('tree', 'copied', 0, `/dev/${image}`, above);
    await at.module.require('close now');
    return bytes;
  };

  let at = await boot(true);
  await at.guest.run(`mkfs.btrfs -q -f ${at.node('tree')}`);
  const first = await attach(at, 'format');
  t.like(first, { began: history.first, kept: history.ok });
  await write(at, 'before');
  await copy(at, -1);
  await write(at, 'after');
  await at.shutdown();

  at = await boot(true);
  const second = await attach(at);
  t.like(second, { takenUp: true, generation: first?.generation ?? '', kept: history.ok });
  await write(at, 'booted');
  const bytes = await copy(at, first?.number ?? 0);
  t.log(bytes);
  t.true(bytes >= 2 * 256 * 1024 && bytes < 16 * MiB, `${bytes}`);
  await at.shutdown();

  // Without the module: with a clean end, and killed once a write was said to be safe.
  for (const isClean of [true, false]) {
    at = await boot(false);
    await write(at, 'foreign');
    await (isClean ? at.shutdown() : at.guest.kill());
    at = await boot(true);
    t.like(await attach(at), { takenUp: false, began: history.changed }, `clean: ${isClean}`);
    await at.shutdown();
  }
});
