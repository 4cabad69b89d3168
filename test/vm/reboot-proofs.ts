// SPDX-License-Identifier: Apache-2.0
// What a history has to stand on a machine that boots by our hook (booted.ts): each proof begins
// with a machine that was shut down cleanly with a point that its copies are of, and leaves such
// a one behind.

import { closeSync, openSync, readSync, writeSync } from 'node:fs';
import { setTimeout as delay } from 'node:timers/promises';
import type { ExecutionContext } from 'ava';
import { Random } from '../fuzz/random.ts';
import { history, type Seen, seenHistories } from '../kernels/histories.ts';
import { buildTool, Conversation, MiB } from '../kernels/world.ts';
import {
  type Boot,
  type Booted,
  cliLimitMs,
  type Each,
  metrics,
  nodes,
  place,
  type TrackedName,
  tracked,
} from './booted.ts';
import { bootGuest, type Guest, GuestFailure } from './guest.ts';
import { runTool } from './host.ts';

/** Beside what was written: the pages of the place that count as written at each boot. */
const slackBytes = 1024 * 1024;
const workloadMs = 4_000;
const planPath = '/var/lib/stillblock/boot-plan';
/** The kernel's own word, before anything is tracked. */
const loading = 'stillblock: loading';
/** What the module says of a disk that it tracks: the hook attaches the root first. */
const firstTracked = 'stillblock: vda: tracked';

/** Each history was taken up, and is the one that the copies are of. */
function assertTakenUp(t: ExecutionContext, world: Booted, seen: Each<Seen>, what: string): void {
  for (const name of tracked) {
    const { takenUp, generation } = seen[name];
    t.deepEqual(
      { takenUp, generation },
      { takenUp: true, generation: world.point(name)?.generation },
      `${what}: ${name}, began ${seen[name].began}`,
    );
  }
}

async function assertIncrements(t: ExecutionContext, boot: Boot, what: string): Promise<void> {
  const increments = await boot.checkpoint();
  for (const name of tracked) {
    const { changedBytes = -1, writtenBytes = 0 } = increments[name] ?? {};
    t.true(
      changedBytes >= writtenBytes && changedBytes <= writtenBytes + slackBytes,
      `${what}: ${name}: ${changedBytes} for ${writtenBytes}`,
    );
    t.log(`${what}: ${name}: ${changedBytes >> 10} KiB changed, ${writtenBytes >> 10} KiB written`);
  }
}

/** A first point: a full copy, and a clean end. */
export async function begin(t: ExecutionContext, world: Booted): Promise<void> {
  const boot = await world.boot();
  const seen = await boot.seen();
  for (const name of tracked) t.like(seen[name], { kept: history.placeLoose });
  await boot.settle();
  for (const name of tracked) t.is((await boot.seen())[name].kept, history.ok);
  await boot.write('before', 256);
  await boot.checkpoint();
  await boot.reboot();
}

/** Reboots under a workload: the increment is right, and as large as what was written. */
export async function cleanReboots(
  t: ExecutionContext,
  world: Booted,
  rounds: number,
): Promise<void> {
  for (let round = 1; round <= rounds; round += 1) {
    const boot = await world.boot();
    assertTakenUp(t, world, await boot.seen(), `reboot ${round}`);
    await boot.settle();
    await boot.write(`booted-${round}`, 256);
    await assertIncrements(t, boot, `reboot ${round}`);
    boot.startWorkload();
    await delay(workloadMs);
    await boot.reboot();
  }
}

/** The increment after the last proof, and a clean end. */
async function settleAfter(
  t: ExecutionContext,
  world: Booted,
  expected: Each<number>,
  what: string,
): Promise<void> {
  const boot = await world.boot();
  const seen = await boot.seen();
  for (const name of tracked) {
    const { takenUp, generation, began } = seen[name];
    const same = generation === world.point(name)?.generation;
    if (expected[name] === history.ok) {
      t.deepEqual({ takenUp, same }, { takenUp: true, same: true }, `${what}: ${name}: ${began}`);
    } else {
      t.deepEqual(
        { takenUp, same, began },
        { takenUp: false, same: false, began: expected[name] },
        `${what}: ${name}`,
      );
    }
  }
  await boot.settle();
  await boot.checkpoint();
  await boot.reboot();
}

/** Another system has some of the disks, and writes a block of the data disk. */
async function writeElsewhere(
  t: ExecutionContext,
  world: Booted,
  disks: readonly TrackedName[],
  prepare: (other: Guest, data: string) => Promise<void> = async () => {},
): Promise<void> {
  const other = await bootGuest({
    ...{ kernel: world.kernel, memoryMiB: 512 },
    disks: [...world.disksFor(...disks), { name: 'place', sizeBytes: 4 * MiB }],
  });
  const data = await other.disk('data');
  await prepare(other, data);
  await other.run(`mkdir -p /srv/data; mount ${data} /srv/data
    dd if=/dev/urandom of=/srv/data/before conv=notrunc,fsync bs=4k count=1 status=none
    umount /srv/data`);
  await other.shutdown();
  const what = `written by another system, which had ${disks.join(' and ')}`;
  await settleAfter(t, world, { root: history.ok, data: history.changed }, what);
}

/** Another system, without the module, has both disks. */
export const foreignWrite = (t: ExecutionContext, world: Booted): Promise<void> =>
  writeElsewhere(t, world, tracked);

/** The data disk is in another machine for a while, which tracks it, and keeps its histories. */
export async function movedDisk(t: ExecutionContext, world: Booted): Promise<void> {
  await writeElsewhere(t, world, ['data'], async (other, data) => {
    await other.loadModule();
    const module = new Conversation(other, await buildTool('ioctls'));
    await module.require(`place device:${await other.disk('place')} format`);
    await module.require(`attach ${data} 0 serial:data`);
    const [there] = await seenHistories(module);
    t.like(there, { takenUp: false, began: history.first, kept: history.ok });
  });
}

/**
 * When QEMU is killed: so long after the first device was tracked, and before the end is asked
 * for; or so long after that.
 */
export interface Cut {
  readonly what: string;
  readonly since: 'tracked' | 'end';
  readonly afterMs: number;
}

/** How long the parts are that cuts are in, milliseconds. */
export type Spans = Readonly<Record<Cut['since'], number>>;

/** When the kernel has said what matches, in seconds since its start. */
function stamps(console: string, what: RegExp): number[] {
  // What user space has begun to say may stand before it in the line.
  return console.split('\n').flatMap((line) => {
    const [, stamp, text = ''] = /\[ *(\d+\.\d+)\] (.*)/.exec(line) ?? [];
    return stamp !== undefined && what.test(text) ? [Number(stamp)] : [];
  });
}

/** Boots, works and ends; QEMU is killed at some moment of that. */
async function workUntil(world: Booted, cut?: Cut): Promise<Spans> {
  const whileAtWork =
    cut?.since === 'tracked' ? { kill: { word: firstTracked, afterMs: cut.afterMs } } : {};
  const spans = { tracked: 0, end: 0 };
  let guest: Guest | undefined;
  const work = async (): Promise<void> => {
    const boot = await world.boot(whileAtWork);
    guest = boot.guest;
    await boot.settle();
    await boot.write('killed', 64);
    boot.startWorkload();
    await delay(workloadMs);
    const { stdout } = await guest.run('cut -d" " -f1 /proc/uptime');
    // What was to come before the end comes now at the latest.
    if (cut?.since === 'tracked') await guest.kill();
    if (cut?.since === 'end') setTimeout(() => void boot.guest.kill(), cut.afterMs);
    await boot.reboot();
    const [first = Number.NaN] = stamps(guest.console(), new RegExp(firstTracked));
    spans.tracked = 1000 * (Number(stdout) - first);
    spans.end = 1000 * ((stamps(guest.console(), /./).at(-1) ?? Number.NaN) - Number(stdout));
  };
  try {
    await work();
  } catch (error) {
    // QEMU ends in the middle of it, or has ended by itself.
    if (cut === undefined || (guest === undefined && !(error instanceof GuestFailure))) throw error;
  }
  await guest?.ended;
  return spans;
}

/** @returns how long a boot is at work, and how long it takes to end */
export async function measureSpans(t: ExecutionContext, world: Booted): Promise<Spans> {
  const restore = await world.saveDisks();
  const spans = await workUntil(world);
  await restore();
  const { tracked: work, end } = spans;
  t.log(
    `tracked for ${work.toFixed(0)} ms until the end was asked for, ${end.toFixed(0)} from there`,
  );
  t.true(work > 0 && end > 0);
  return spans;
}

/** @returns random moments of a part, one per seed */
export function randomCuts(spans: Spans, since: Cut['since'], seeds: readonly number[]): Cut[] {
  return seeds.map((seed) => ({
    what: `seed ${seed}`,
    since,
    afterMs: new Random(seed).below(Math.round(spans[since])),
  }));
}

/**
 * Power cuts, each from the same clean state: a full copy of both disks is required, or all had
 * been saved, and what is taken up is right.
 *
 * @returns how often a full copy was required
 */
export async function kills(
  t: ExecutionContext,
  world: Booted,
  cuts: readonly Cut[],
): Promise<number> {
  let full = 0;
  const restore = await world.saveDisks();
  for (const cut of cuts) {
    await workUntil(world, cut);
    const boot = await world.boot();
    const seen = await boot.seen();
    const { takenUp } = seen.root;
    const when = cut.since === 'tracked' ? 'at work' : 'at the end';
    const what = `${cut.what}, killed ${when} after ${cut.afterMs} ms`;
    t.log(`${what}: ${takenUp ? 'taken up' : `full, reason ${seen.root.began}`}`);
    if (cut.since === 'tracked') t.false(takenUp, what);
    for (const name of tracked) {
      // They are kept in one place, and saved together.
      t.is(seen[name].takenUp, takenUp, what);
      t.is(seen[name].generation === world.point(name)?.generation, takenUp, what);
      if (!takenUp) t.is(seen[name].began, history.notSaved, what);
    }
    if (takenUp) {
      await boot.settle();
      await boot.checkpoint();
    } else {
      full += 1;
    }
    await boot.guest.kill();
    await restore();
  }
  return full;
}

/** Changes bytes of a page of the place, while the machine is off. */
function tamper(world: Booted, page: number, change: (bytes: Buffer) => void): void {
  const file = openSync(world.file('root'), 'r+');
  const bytes = Buffer.alloc(4096);
  const offset = world.placeOffset(page);
  readSync(file, bytes, 0, bytes.length, offset);
  change(bytes);
  writeSync(file, bytes, 0, bytes.length, offset);
  closeSync(file);
}

const flipBit = (at: number) => (bytes: Buffer) => bytes.writeUInt8(bytes.readUInt8(at) ^ 1, at);

/** Seconds from the module's load to the last device that the initramfs attached, by the kernel. */
function attachSeconds(console: string): number {
  const [loaded = Number.NaN] = stamps(console, new RegExp(loading));
  return (stamps(console, /stillblock: vd[ab]: tracked/).at(-1) ?? Number.NaN) - loaded;
}

const firstMapPage = 65;

/** A place that is damaged, of another version, empty, missing: reasons, and no time is lost. */
export async function badPlaces(t: ExecutionContext, world: Booted): Promise<void> {
  const both = (reason: number): Each<number> => ({ root: reason, data: reason });
  const rootAlone = { root: history.damaged, data: history.ok };
  const gone = await world.makeInitrd(
    'initrd-gone',
    world.plan.replace(/^place \S+/, 'place gone'),
  );
  const cases: readonly [string, Each<number>, () => void, string?][] = [
    ['as it was', both(history.ok), () => {}],
    ['a bit of a map', rootAlone, () => tamper(world, firstMapPage, flipBit(100))],
    ['a bit of a record', rootAlone, () => tamper(world, 1, flipBit(300))],
    ['a bit of the header', both(history.placeDamaged), () => tamper(world, 0, flipBit(20))],
    [
      'another version',
      both(history.placeVersion),
      () => tamper(world, 0, (bytes) => bytes.writeUInt32LE(bytes.readUInt32LE(8) + 1, 8)),
    ],
    ['nothing', both(history.placeEmpty), () => tamper(world, 0, (bytes) => bytes.fill(0))],
    ['missing', both(history.noPlace), () => {}, gone],
  ];
  const restore = await world.saveDisks();
  let usual = 0;
  for (const [what, expected, change, initrd] of cases) {
    change();
    const boot = await world.boot(initrd === undefined ? {} : { initrd });
    const seen = await boot.seen();
    for (const name of tracked) {
      const { takenUp, began } = seen[name];
      const isRight =
        expected[name] === history.ok ? takenUp : began === expected[name] && !takenUp;
      t.true(isRight, `${what}: ${name}: ${takenUp ? 'taken up' : began}`);
    }
    const seconds = attachSeconds(boot.guest.console());
    usual ||= seconds;
    t.log(`the place: ${what}: tracked after ${seconds.toFixed(2)} s`);
    t.true(seconds < usual + 1, what);
    await boot.guest.kill();
    await restore();
  }
}

/** A place that has room for one map: the other history is not kept, and that is said. */
export async function fullPlace(t: ExecutionContext, world: Booted): Promise<void> {
  let boot = await world.boot();
  await boot.settle();
  await boot.module.require('place drop');
  // Header and records take 65 pages, and each map 2.
  await boot.guest.run('fallocate -l 272K /root/small; sync');
  const [extents = ''] = await boot.module.require('extents /root/small');
  await boot.module.require('place file:/root/small:/dev/vda format');
  let seen = await boot.seen();
  t.is(seen.root.kept, history.ok);
  t.is(seen.data.kept, history.placeFull);
  await boot.checkpoint();
  const place = `place serial:root ${extents.replaceAll(',', ' ').replaceAll('+', ':')}`;
  const initrd = await world.makeInitrd('initrd-full', world.plan.replace(/^place .*/, place));
  await boot.reboot();
  boot = await world.boot({ initrd });
  seen = await boot.seen();
  t.like(seen.root, { takenUp: true, generation: world.point('root')?.generation });
  t.like(seen.data, { takenUp: false, began: history.placeFull });
  await boot.guest.run('mount /dev/vdb /srv/data');
  await boot.module.require('place drop');
  await boot.hold();
  await boot.checkpoint();
  await boot.reboot();
}

/** A place whose device hangs, or fails, when the machine goes down. */
export async function hangingPlace(t: ExecutionContext, world: Booted): Promise<void> {
  const ends: Readonly<Record<string, string>> = {
    'does not hang': 'true',
    hangs: 'dmsetup suspend --nolockfs slow',
    fails:
      'dmsetup suspend --nolockfs slow; dmsetup reload slow --table "0 32768 error"; dmsetup resume slow',
  };
  let usualMs = 0;
  let expected = history.ok as number;
  for (const [what, last] of Object.entries(ends)) {
    const boot = await world.boot({ init: 'udev' });
    for (const [name, { takenUp, began }] of Object.entries(await boot.seen())) {
      const isRight = expected === history.ok ? takenUp : !takenUp && began === expected;
      t.true(isRight, `before a place that ${what}: ${name}: ${takenUp ? 'taken up' : began}`);
    }
    await boot.settle();
    await boot.module.require('place refuse');
    await boot.guest.run(
      `modprobe dm_mod; dmsetup create slow --table "0 32768 linear ${nodes.spare} 0"; udevadm settle`,
    );
    // The rule for a new device sets no place again that was refused.
    t.is((await boot.module.require('place query'))[0], '0');
    await boot.module.require('place device:/dev/mapper/slow format');
    const seen = await boot.seen();
    for (const name of tracked) t.is(seen[name].kept, history.ok, name);
    await boot.guest.run(last);
    const started = performance.now();
    await boot.reboot([/I\/O error, dev dm-/, /Buffer I\/O error on dev dm-/]);
    const ms = performance.now() - started;
    usualMs ||= ms;
    t.log(`a place that ${what}: down after ${(ms / 1000).toFixed(1)} s`);
    // save_timeout_ms, and what the host may take.
    t.true(ms < usualMs + 5_000 + 2_000, what);
    const kept = /stillblock: vd[ab]: history kept/.test(boot.guest.console());
    t.is(kept, what === 'does not hang', what);
    // The place of the plan was dropped.
    expected = history.notSaved;
  }
  await settleAfter(t, world, { root: expected, data: expected }, 'a place that failed');
}

/** A disk of the plan that is plugged in later is tracked before anybody can mount it. */
export async function lateDisk(t: ExecutionContext, world: Booted): Promise<void> {
  const file = world.file('late');
  await runTool('mke2fs', ['-q', '-t', 'ext4', file, '64M']);
  let generation = '';
  for (const round of [1, 2]) {
    const boot = await world.boot({ init: 'udev' });
    await boot.settle();
    if (round === 1) {
      await boot.guest.run('echo "device serial:late 0" >>/var/lib/stillblock/boot-plan; sync');
    }
    const node = await boot.guest.plug('late', file, 'raw', false);
    await boot.guest.run('udevadm settle');
    const late = (await boot.module.require('list')).at(-1)?.split(':') ?? [];
    t.is((await boot.module.require('list')).length, 3);
    const takenUp = (Number.parseInt(late[4] ?? '0', 16) & 8) !== 0;
    t.deepEqual([takenUp, late[7]], [round === 2, String(history.ok)], late.join(' '));
    if (round === 1) generation = late[5] ?? '';
    else t.is(late[5], generation);
    await boot.guest.run(
      `mkdir -p /srv/late; mount ${node} /srv/late; dd if=/dev/urandom of=/srv/late/file bs=64k count=4 status=none; umount /srv/late`,
    );
    await boot.reboot();
  }
}

/** systemd, the daemon and its commands in the place of the tests' own: two boots, one increment. */
export async function systemdReboot(t: ExecutionContext, world: Booted): Promise<void> {
  let boot = await world.boot({ init: 'systemd' });
  await boot.up();
  await takeCheckpoint(boot, 'monday');
  await boot.checkpoint();
  boot.startWorkload();
  await delay(workloadMs);
  await boot.reboot([], 'systemctl reboot');

  boot = await world.boot({ init: 'systemd' });
  await boot.up();
  assertTakenUp(t, world, await boot.seen(), 'systemd');
  t.like(await boot.told('checkpoint show monday'), {
    disks: [
      { name: 'root', next: 'incremental' },
      { name: 'data', next: 'incremental' },
    ],
  });
  t.like(await boot.told('status'), { lostAtReboot: [], begunAnew: [] });
  await assertIncrements(t, boot, 'systemd');
  await boot.reboot([], 'systemctl reboot');
}

async function takeCheckpoint(boot: Boot, name: string): Promise<void> {
  await boot.guest.run(
    `stillblock backup begin --checkpoint ${name} --store memory --store-size 64M -U /run/${name}.sock && stillblock backup end`,
    { timeoutMs: cliLimitMs },
  );
}

/**
 * Has the daemon keep histories as `<history>` with these attributes says, or as it does by
 * itself.
 *
 * @returns the plan of the place that it then keeps them in
 */
async function configureHistory(boot: Boot, attributes: string | undefined): Promise<string> {
  const setting = attributes === undefined ? '' : `<history ${attributes}/>`;
  const { stdout } = await boot.guest.run(
    `old=$(cat ${planPath})
    sed -i 's|<history[^>]*>||; s|</stillblock>|${setting}</stillblock>|' /etc/stillblock/stillblock.xml
    systemctl reload stillblock
    until new=$(cat ${planPath} 2>/dev/null) && [ -n "$new" ] && [ "$new" != "$old" ]; do sleep 0.5; done
    cat ${planPath}`,
    { timeoutMs: cliLimitMs },
  );
  return stdout;
}

/**
 * The place is made longer by the configuration, and taken up in its new length. Then a power
 * cut: all who may ask are told why a full copy is due.
 */
export async function growAndCut(t: ExecutionContext, world: Booted): Promise<void> {
  let boot = await world.boot({ init: 'systemd' });
  await boot.up();
  await takeCheckpoint(boot, 'tuesday');
  const plan = await configureHistory(boot, 'size="12M"');
  const { stdout: size } = await boot.guest.run(`stat -c %s ${place}`);
  t.is(Number(size), 12 * MiB);
  await boot.checkpoint();
  await world.keepPlan(plan);
  await boot.reboot([], 'systemctl reboot');

  boot = await world.boot();
  assertTakenUp(t, world, await boot.seen(), 'a longer place');
  await boot.settle();
  await boot.write('killed', 64);
  await boot.guest.kill();

  boot = await world.boot({ init: 'systemd' });
  await boot.up();
  const why = (device: string): unknown => ({ device, reason: 'NOT_SAVED' });
  t.like(await boot.told('status'), {
    lostAtReboot: [],
    begunAnew: [why(nodes.root), why(nodes.data)],
  });
  t.like(await boot.told('checkpoint show tuesday'), {
    disks: [
      { name: 'root', next: 'full' },
      { name: 'data', next: 'full' },
    ],
  });
  const { stdout } = await boot.guest.run(
    `python3 -c "import socket; s = socket.socket(socket.AF_UNIX); s.connect('${metrics}'); s.sendall(b'GET /metrics HTTP/1.0\\r\\n\\r\\n'); print(s.makefile().read())"
    stillblock device attach ${nodes.spare}
    stillblock doctor | grep -i histor
    stillblock backup begin --checkpoint wednesday --incremental tuesday --disk root --disk data --store memory --store-size 64M -U /run/no.sock 2>&1
    echo "exit $?"`,
    { timeoutMs: cliLimitMs },
  );
  for (const name of tracked) {
    t.true(
      stdout.includes(`stillblock_history_began{disk="${name}",reason="NOT_SAVED"} 1`),
      stdout,
    );
    t.true(stdout.includes(`stillblock_history_kept{disk="${name}",reason="OK"} 1`), stdout);
  }
  t.regex(stdout, /history of vdf +warn +a reboot would end it: it has no ext4/);
  t.regex(stdout, /histories +ok +2 will be written at a clean reboot/);
  t.regex(stdout, /not shut down cleanly/);
  t.regex(stdout, /^exit 3$/m);
  await boot.checkpoint();
  await boot.reboot([], 'systemctl reboot');
}

/**
 * The place is another file than the initramfs knows: what that sets is let go of, nothing is
 * written by its extents, and histories are kept in the file that is configured.
 */
export async function oldInitramfs(t: ExecutionContext, world: Booted): Promise<void> {
  let boot = await world.boot({ init: 'systemd' });
  await boot.up();
  await configureHistory(boot, 'place="/var/lib/stillblock/other"');
  await boot.reboot([], 'systemctl reboot');

  boot = await world.boot({ init: 'systemd' });
  await boot.up();
  const { stdout } = await boot.guest.run('journalctl -o cat --no-pager -u stillblock', {
    timeoutMs: cliLimitMs,
  });
  t.regex(stdout, /the initramfs knows another place of the histories/);
  const seen = await boot.seen();
  for (const name of tracked) t.like(seen[name], { takenUp: false, kept: history.ok }, name);
  t.like(await boot.told('status'), { lostAtReboot: [] });
  const { stdout: plan } = await boot.guest.run(`cat ${planPath}`);
  await boot.checkpoint();
  await world.keepPlan(plan);
  await boot.reboot([], 'systemctl reboot');

  // Now it knows. The file of the other proofs comes back the same way.
  boot = await world.boot({ init: 'systemd' });
  await boot.up();
  assertTakenUp(t, world, await boot.seen(), 'another place');
  await world.keepPlan(await configureHistory(boot, undefined));
  await boot.reboot([], 'systemctl reboot');
  boot = await world.boot();
  assertTakenUp(t, world, await boot.seen(), 'the first place again');
  await boot.settle();
  await boot.reboot();
}

/** dracut's initramfs has what it takes; it is not booted. */
export async function dracutImage(t: ExecutionContext, world: Booted): Promise<void> {
  const content = await world.makeDracut();
  for (const part of [
    'stillblock.ko',
    'sbin/stillblock-early',
    'etc/stillblock/boot-plan',
    'pre-mount/05-stillblock-early.sh',
  ]) {
    t.true(content.includes(part), `${part} is not in ${content}`);
  }
}
