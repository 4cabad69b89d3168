// SPDX-License-Identifier: Apache-2.0
// From a running server into a chain, and from that onto disks: the daemon takes
// the snapshots, stock qemu-img copies, and what is written back is mounted. One
// guest is server and proxy at once, and serves all the checks, in order: first the
// commands of docs/quick-start.md.

import test from 'ava';
import type { MachineLayout } from '../../src/layout.ts';
import { commandsOf, Page } from '../pages.ts';
import { CommandLine, cli, installCli } from './command-line.ts';
import { bootGuest, type Guest } from './guest.ts';
import { shellQuote } from './initrd.ts';

const MiB = 1 << 20;
const socket = '/run/stillblock/control.sock';
const chain = '/repo/chain';
const limitMs = 180_000;

let guest: Guest;
/** Device nodes by the disks' names. */
const node: Record<string, string> = {};
let origin = '';
let page: Page;

type Event = Readonly<Record<string, unknown>>;

interface Ended {
  readonly code: number;
  readonly events: readonly Event[];
  readonly stderr: string;
}

/** Its lines of JSON. */
const eventsOf = (stdout: string): Event[] =>
  stdout
    .split('\n')
    .filter((line) => line.startsWith('{'))
    .map((line) => JSON.parse(line) as Event);

/** Runs a script of the shell to its end. */
async function sh(script: string): Promise<Ended> {
  const { code, stdout, stderr } = await guest.run(script, { timeoutMs: limitMs, check: false });
  return { code, events: eventsOf(stdout), stderr };
}

const pull = (more = ''): string => `${cli} pull --json ${more} ${socket} ${chain}`;
const codeOf = ({ events }: Ended): string | undefined =>
  (events.at(-1) as { error?: { code?: string } } | undefined)?.error?.code;

interface Entry {
  readonly disk: string;
  readonly kind: string;
  readonly file: string;
  readonly generation: string | null;
  readonly verified: boolean;
}

async function points(): Promise<{ checkpoint: string; takenAt: string; entries: Entry[] }[]> {
  const { stdout } = await guest.run(`cat ${chain}/manifest.json`);
  return JSON.parse(stdout).points;
}

async function checkpoints(): Promise<string[]> {
  const { events } = await sh(`${cli} checkpoint list --json`);
  const [{ checkpoints: found } = {}] = events as { checkpoints?: { name: string }[] }[];
  return (found ?? []).map(({ name }) => name);
}

/** What is of this guest in place of what is of yours. */
const here = (text: string): string =>
  text
    .replaceAll('/dev/sda', origin)
    .replaceAll('/dev/sdb', node['target'] ?? '')
    .replaceAll('/backup/web1', chain);

/** Types a block of the page. */
async function type(containing: string): Promise<string> {
  const commands = commandsOf(page.take(containing)).map((line) => here(line));
  const script = commands.map((line) =>
    // The test has started the daemon, and udev would look at a new disk.
    line.startsWith('systemctl ')
      ? ':'
      : line.includes('--connect')
        ? `${line}; : </dev/nbd0`
        : line,
  );
  const { stdout } = await guest.run(['set -e', ...script].join('\n'), { timeoutMs: limitMs });
  return stdout;
}

/** Starts the daemon, whose process id is in /run/serve.pid. */
async function serve(): Promise<void> {
  // One that was killed has left it.
  await guest.run(`rm -f ${socket}`);
  guest.start(`echo $$ >/run/serve.pid; exec ${cli} serve 2>/run/serve.log`);
  await guest.run(`until [ -S ${socket} ]; do sleep 0.2; done`, { timeoutMs: limitMs });
}

test.before(async () => {
  page = await Page.open('docs/quick-start.md', import.meta.url);
  guest = await bootGuest({
    kernel: '6.1',
    disks: [
      { name: 'origin', sizeBytes: 48 * MiB },
      { name: 'target', sizeBytes: 64 * MiB },
      { name: 'small', sizeBytes: 32 * MiB },
      { name: 'repo', sizeBytes: 256 * MiB },
    ],
    memoryMiB: 1024,
  });
  for (const name of ['origin', 'target', 'small', 'repo']) {
    node[name] = await guest.disk(name);
  }
  origin = node['origin'] ?? '';
  await guest.run(
    `set -e
    modprobe -a dm-mod dm-crypt raid1 loop
    ${installCli}
    printf 'label: gpt\\n,32M\\n,8M,S\\n' | sfdisk -q ${origin}
    mkfs.ext4 -q ${origin}1; mkswap -q ${origin}2
    mkdir -p /srv/data /repo; mount ${origin}1 /srv/data
    cp /usr/bin/qemu-img /srv/data/a; sha256sum /srv/data/a >/srv/data/sums
    mkdir /srv/data/etc; cp /etc/fstab /srv/data/etc
    mkfs.ext4 -q ${node['repo']}; mount ${node['repo']} /repo
    mkdir -p /etc/stillblock
    echo ${shellQuote(here(page.take('<stillblock>').text))} >/etc/stillblock/stillblock.xml`,
    { timeoutMs: limitMs },
  );
  await guest.loadModule();
  await serve();
});

test.after.always(async () => {
  await guest?.kill();
});

test.serial('all of it, then what changed, proven by the server', async (t) => {
  t.regex(await type('stillblock doctor'), /^system +\/dev\//m);
  await type('--checkpoint monday');
  await guest.run('echo two >/srv/data/b; sha256sum /srv/data/b >>/srv/data/sums; sync');
  t.regex(await type('--checkpoint tuesday'), /all files have the SHA-256/);
  const [one, two] = await points();
  t.like(one?.entries[0], { disk: 'system', kind: 'full', verified: true });
  // The server's history says that the changes fit: nothing had to be compared.
  t.like(two?.entries[0], { disk: 'system', kind: 'incremental', verified: false });
  t.is(one?.entries[0]?.generation, two?.entries[0]?.generation);
  t.regex(two?.takenAt ?? '', /^\d{4}-/);
  t.deepEqual(await checkpoints(), ['monday', 'tuesday']);
  const { events } = await sh(`${cli} status --json`);
  t.deepEqual((events[0] as { backups: unknown[] }).backups, [], 'no snapshot is left');
  // A single file of it.
  await type('qemu-nbd');
  await guest.run('cmp /etc/fstab /tmp/fstab');
});

test.serial('a pull that was killed: the chain is as before, its snapshot is held', async (t) => {
  // qemu-img makes its target once it has opened its source, an export of the snapshot.
  const killed = await sh(`${pull('--checkpoint cut --full')} >/run/cut & pid=$!
    until [ -e ${chain}/system.0003.qcow2 ] || ! kill -0 $pid; do sleep 0.01; done
    kill -9 $pid; wait $pid; ls ${chain}`);
  t.regex(killed.stderr, /Killed|^$/);
  t.false((await points()).some(({ checkpoint }) => checkpoint === 'cut'));
  const { events } = await sh(`${cli} status --json`);
  t.is((events[0] as { backups: unknown[] }).backups.length, 1, 'its snapshot is still held');
});

test.serial('the daemon is killed in a pull: the chain is as before', async (t) => {
  const before = await guest.run(`cd ${chain}; sha256sum manifest.json *.000[12].qcow2`);
  const torn = await sh(`${pull('--checkpoint torn --full')} & pid=$!
    until copier=$(pgrep -f '^([^ ]*/)?qemu-img convert') || ! kill -0 $pid; do sleep 0.01; done
    until [ -e ${chain}/system.0003.qcow2 ] || ! kill -0 $pid; do :; done
    kill -STOP $copier; kill -9 $(cat /run/serve.pid); kill -CONT $copier; wait $pid`);
  // The pull that was killed before had left a snapshot.
  t.like(torn.events[0], { event: 'recovered', checkpoint: 'cut', complete: false });
  t.is(torn.code, 1, torn.stderr);
  t.is(codeOf(torn), 'SERVER_GONE', torn.stderr);
  t.regex(torn.stderr, /the server went away \(the chain is as before\)/);
  const after = await guest.run(`cd ${chain}; sha256sum manifest.json *.qcow2`);
  t.is(after.stdout, before.stdout);

  await serve();
  const next = await sh(pull('--checkpoint fourth'));
  t.is(next.code, 0, next.stderr);
  t.like(next.events[0], { event: 'recovered', checkpoint: 'torn', complete: false });
  t.deepEqual(await checkpoints(), ['monday', 'tuesday', 'fourth'], 'that of the torn one is gone');
});

test.serial('tracking began anew: a full copy is required, exit code 3', async (t) => {
  await guest.run(`${cli} device detach ${origin} && ${cli} device attach ${origin}`, {
    timeoutMs: limitMs,
  });
  const refused = await sh(pull('--checkpoint fifth'));
  t.is(refused.code, 3, refused.stderr);
  t.is(codeOf(refused), 'FULL_REQUIRED');
  t.regex(refused.stderr, /system: the tracking of changes began anew/);
  t.deepEqual(await checkpoints(), ['monday', 'tuesday', 'fourth']);
  const full = await sh(pull('--checkpoint fifth --full-if-needed'));
  t.is(full.code, 0, full.stderr);
  t.like((await points()).at(-1)?.entries[0], { kind: 'full' });
});

interface BadTarget {
  readonly code: string;
  readonly target: string;
  /** Makes it that, and undoes it. */
  readonly before?: string;
  readonly after?: string;
}

test.serial('targets in use are refused, each for its reason', async (t) => {
  const { target = '', small = '', repo = '' } = node;
  const targets: readonly BadTarget[] = [
    { code: 'TARGET_TOO_SMALL', target: small },
    { code: 'TARGET_IS_SOURCE', target: repo },
    { code: 'TARGET_MOUNTED', target: origin },
    {
      ...{ code: 'TARGET_MOUNTED', target, after: 'umount /mnt' },
      before: `mkfs.ext4 -qF ${target}; mount -o ro ${target} /mnt`,
    },
    {
      ...{ code: 'TARGET_SWAP', target, after: `swapoff ${target}` },
      before: `mkswap -q ${target}; swapon ${target}`,
    },
    {
      ...{ code: 'TARGET_IN_USE', target, after: 'vgremove -q -f -y vg' },
      before: `wipefs -aq ${target}; vgcreate -q vg ${target}; lvcreate -q -y -Wn -L 8M -n lv vg`,
    },
    {
      ...{ code: 'TARGET_IN_USE', target },
      before: `wipefs -aq ${target}; mdadm --create -q --run /dev/md9 --level=1 --raid-devices=2 --force ${target} missing`,
      after: `mdadm --stop -q /dev/md9; mdadm --zero-superblock ${target}`,
    },
    {
      ...{ code: 'TARGET_MOUNTED', target, after: 'umount /mnt' },
      before: `mkfs.ext4 -qF ${target}; mount -o loop,ro ${target} /mnt`,
    },
    {
      ...{ code: 'TARGET_IN_USE', target: '/run/raw', after: 'umount /mnt; rm /run/raw' },
      before: 'truncate -s 64M /run/raw; mkfs.ext4 -q /run/raw; mount -o loop,ro /run/raw /mnt',
    },
    {
      ...{ code: 'TARGET_HELD', target, after: 'kill $(cat /run/holder)' },
      before: `setsid python3 -c 'import os,time; os.open("${target}", os.O_RDWR|os.O_EXCL); open("/run/holder","w").write(str(os.getpid())); time.sleep(600)' >/dev/null 2>&1 &
        until [ -s /run/holder ]; do sleep 0.05; done`,
    },
    {
      ...{ code: 'TARGET_READ_ONLY', target, after: `blockdev --setrw ${target}` },
      before: `blockdev --setro ${target}`,
    },
  ];
  const commands = new CommandLine(guest);
  for (const { code, target: path, before = ':', after = ':' } of targets) {
    await guest.run(`set -e; ${before}`, { timeoutMs: limitMs });
    const written = path.startsWith('/dev/')
      ? `sync; awk '{ print $7 }' /sys/class/block/${path.slice(5)}/stat`
      : `sha256sum ${path}`;
    const early = await guest.run(written);
    const refused = await commands.run(
      ['restore', '--json', '--yes', '--map', `system=${path}`, chain],
      limitMs,
    );
    const late = await guest.run(written);
    // Mounted file systems write when they like to.
    if (path !== origin && path !== repo)
      t.is(late.stdout, early.stdout, `${code}: it was written to`);
    t.is(refused.code, 1, `${code}: ${refused.stderr}`);
    t.is(codeOf({ ...refused, events: eventsOf(refused.stdout) }), code, refused.stderr);
    await guest.run(`set -e; ${after}`, { timeoutMs: limitMs });
  }
  await commands.end(limitMs);
});

test.serial('what udev would know is found without it: volume groups, LUKS, labels', async (t) => {
  const { target = '' } = node;
  await guest.run(
    `set -e
    wipefs -aq ${target}; udevadm control --ping 2>/dev/null && exit 1
    printf 'label: gpt\\n,16M\\n,32M\\n' | sfdisk -q ${target}
    vgcreate -q vg ${target}1; lvcreate -q -y -Wn -L 8M -n lv vg; mkfs.ext4 -q -L 'a b' /dev/vg/lv
    echo key | cryptsetup luksFormat -q --pbkdf pbkdf2 --pbkdf-force-iterations 1000 ${target}2 -`,
    { timeoutMs: limitMs },
  );
  const { events } = await sh(`${cli} layout --json ${target}`);
  const layout = events[0] as unknown as MachineLayout;
  t.deepEqual(layout.problems, []);
  t.like(layout.volumeGroups[0], { name: 'vg', physicalVolumes: [`${target}1`] });
  t.regex(layout.volumeGroups[0]?.backup ?? '', /^vg \{$/m);
  t.like(layout.luks[0], { name: `${target.slice(5)}2`, version: 2, keySlots: 1 });
  t.like(
    layout.devices.find(({ type }) => type === 'lvm'),
    { content: 'ext4', label: 'a b' },
  );
  t.true(layout.partitionTables[0]?.partitions.every(({ uuid }) => uuid !== null));
  await guest.run('vgremove -q -f -y vg');
});

test.serial('a disk is written back with its partitions, and mounts', async (t) => {
  const { target = '' } = node;
  await guest.run(`wipefs -aq ${target}`);
  t.regex(await type('restore --dry-run'), /system/);
  const [one] = await points();
  const file = `${chain}/${one?.entries[0]?.file}`;
  await guest.run(
    `set -e
    qemu-img convert -O raw ${file} /repo/raw; cmp -n ${48 * MiB} /repo/raw ${target}; rm /repo/raw
    mount -o ro ${target}1 /mnt
    (cd /mnt && sed 's#/srv/data/##' sums | sha256sum -c --quiet)
    umount /mnt; blkid -t TYPE=swap ${target}2`,
    { timeoutMs: limitMs },
  );
  t.deepEqual(page.left, []);
});
