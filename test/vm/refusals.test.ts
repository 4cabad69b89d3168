// SPDX-License-Identifier: Apache-2.0
// Bad input on a running server: each is refused in one line that says what is
// wrong, with the right exit code, and leaves nothing behind. One guest serves
// all the checks, in order.

import { spawn } from 'node:child_process';
import { cp, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import test, { type ExecutionContext } from 'ava';
import { checkout } from './checkout.ts';
import { CommandLine, cli } from './command-line.ts';
import { bootGuest, type Guest } from './guest.ts';
import { runTool } from './host.ts';
import { shellQuote } from './initrd.ts';
import { smallXfs } from './xfs.ts';

const MiB = 1 << 20;
const kernel = '6.1';
const nbdPort = 10809;
const cliLimitMs = 300_000;

const failed = 1;
const usage = 2;
const overflow = 4;

let guest: Guest;
/** Most of the commands; those that differ in more than their words are processes of their own. */
let commands: CommandLine;
/** Device nodes: an ext4 to snap, the store's disk, an XFS and a btrfs. */
let origin = '';
/** A disk whose volume holds a file system, one of 32 KiB, and one under a multipath device. */
let tracked = '';
let tiny = '';
let multipathPath = '';
let xfsDevice = '';
let foreignModule = '';
let folder = '';

/** Builds the same module with another ABI number: one that is not this CLI's. */
async function buildForeignModule(): Promise<string> {
  const sources = join(folder, 'module');
  await cp(join(checkout, 'module'), sources, { recursive: true });
  const header = join(sources, 'uapi/linux/stillblock.h');
  const text = await readFile(header, 'utf8');
  const changed = text.replace(/^(#define STILLBLOCK_ABI\s+)\d+$/m, '$19999');
  if (changed === text) throw new Error('STILLBLOCK_ABI is not where it was');
  await writeFile(header, changed);
  const output = join(folder, 'built');
  const script = join(checkout, 'scripts/build-module.sh');
  await runTool('env', [
    `STILLBLOCK_MODULE_SOURCES=${sources}`,
    `STILLBLOCK_MODULE_OUTPUT=${output}`,
    ...[script, kernel],
  ]);
  return join(output, 'stillblock.ko');
}

test.before(async () => {
  folder = await mkdtemp(join(tmpdir(), 'stillblock-refusals-'));
  foreignModule = await buildForeignModule();
  guest = await bootGuest({
    kernel,
    disks: [
      { name: 'origin', sizeBytes: 64 * MiB },
      { name: 'store', sizeBytes: 128 * MiB },
      { name: 'xfs', sizeBytes: 64 * MiB },
      { name: 'btrfs', sizeBytes: 128 * MiB },
      { name: 'path', sizeBytes: 24 * MiB },
      { name: 'volume', sizeBytes: 64 * MiB },
      { name: 'tiny', sizeBytes: 32 * 1024 },
    ],
    forwardPorts: [nbdPort],
    memoryMiB: 1024,
    // 64 MiB of memory play persistent memory, which file systems map directly.
    appendCmdline: 'memmap=64M!512M',
  });
  const [store, xfs, btrfs, path, volume, small] = await Promise.all(
    ['store', 'xfs', 'btrfs', 'path', 'volume', 'tiny'].map((name) => guest.disk(name)),
  );
  origin = await guest.disk('origin');
  tracked = volume ?? '';
  tiny = small ?? '';
  multipathPath = path ?? '';
  xfsDevice = xfs ?? '';
  await guest.run(
    `set -e
    mkdir -p /srv/origin /srv/store /srv/xfs /srv/btrfs /srv/volume
    modprobe -a dm-multipath dm-round-robin loop
    mapped() { dmsetup create --noudevsync $1 --table "0 $(blockdev --getsz $2) $3"; dmsetup mknodes; }
    mapped volume ${volume} 'linear ${volume} 0'
    mkfs.ext4 -q -F /dev/mapper/volume; mount /dev/mapper/volume /srv/volume
    mapped mpatha ${path} 'multipath 0 0 1 1 round-robin 0 1 1 ${path} 1000'
    mkfs.ext4 -q -F ${origin}; mount ${origin} /srv/origin
    mkfs.ext4 -q -F ${store}; mount ${store} /srv/store
    ${smallXfs} ${xfs}; mount ${xfs} /srv/xfs
    mkfs.btrfs -q ${btrfs}; mount ${btrfs} /srv/btrfs
    fallocate -l 1M /srv/store/small
    dd if=/dev/urandom of=/srv/xfs/shared bs=1M count=16 status=none
    cp --reflink=always /srv/xfs/shared /srv/xfs/copy
    dd if=/dev/urandom of=/srv/btrfs/file bs=1M count=32 status=none
    dd if=/dev/urandom of=/srv/origin/file bs=1M count=16 status=none
    modprobe -a nd_e820 nd_pmem; until [ -b /dev/pmem0 ]; do sleep 0.05; done
    modprobe brd rd_nr=1 rd_size=1024; modprobe null_blk nr_devices=1 zoned=1 gb=1 zone_size=64
    sync`,
    { timeoutMs: 240_000 },
  );
});

test.after.always(async () => {
  await guest?.kill();
  await rm(folder, { recursive: true, force: true });
});

interface Refusal {
  /** For a shell of the guest, or words for `commands`. */
  readonly command: string | readonly string[];
  readonly code: number;
  readonly says: RegExp;
}

/** Runs the CLI, which must refuse with one line; what it says is the message. */
async function assertRefused(t: ExecutionContext, { command, code, says }: Refusal): Promise<void> {
  const result =
    typeof command === 'string'
      ? await guest.run(command, { check: false, timeoutMs: cliLimitMs })
      : await commands.run(command, cliLimitMs);
  const all = `${command}\n${result.stdout}${result.stderr}`;
  t.is(result.code, code, all);
  t.regex(result.stderr, says, all);
  t.is(result.stderr.trimEnd().split('\n').length, 1, `more than one line:\n${all}`);
}

const beginWords = (...rest: readonly string[]): string[] => [
  ...['backup', 'begin', '--json', '-i', '127.0.0.1', '-p', String(nbdPort)],
  ...rest,
];
const begin = (...rest: readonly string[]): string =>
  `${cli} ${beginWords(...rest)
    .map(shellQuote)
    .join(' ')}`;

/** What must be the same before and after a refusal. */
const leftovers = (): Promise<string> =>
  guest
    .run(
      `ls -A /run/stillblock /var/lib/stillblock/checkpoints /srv/store 2>&1 | sort; ss -ltnH; ls /dev | grep -i stillblock; mount | grep -c . `,
    )
    .then(({ stdout }) => stdout);

test.serial('without the module, or with another version of it, it says so', async (t) => {
  const command = `${cli} device attach ${origin}`;
  await assertRefused(t, { command, code: failed, says: /module/i });
  await guest.run(`insmod ${shellQuote(foreignModule)}`);
  await assertRefused(t, { command, code: failed, says: /version|ABI/i });
  await guest.run('rmmod stillblock');
});

test.serial('without root it says so', async (t) => {
  await guest.loadModule();
  const command = `setpriv --reuid 65534 --regid 65534 --clear-groups ${cli} device attach ${origin}`;
  await assertRefused(t, { command, code: failed, says: /root|permi/i });
  commands = new CommandLine(guest);
});

const devices = [
  { what: 'a plain file', device: '/etc/passwd', says: /not a block device/i },
  { what: 'a character device', device: '/dev/null', says: /not a block device/i },
  { what: 'a device that does not exist', device: '/dev/absent', says: /no such|not exist/i },
  { what: 'a zoned device', device: '/dev/nullb0', says: /zoned/i },
  {
    what: 'a device that takes pages past bios',
    device: '/dev/ram0',
    says: /past the block layer/,
  },
  { what: 'a DAX device', device: '/dev/pmem0', says: /dax|direct/i },
] as const;

for (const { what, device, says } of devices) {
  test.serial(`${what} is not attached`, async (t) => {
    await assertRefused(t, { command: ['device', 'attach', device], code: failed, says });
  });
}

test.serial('an attached device is not attached again', async (t) => {
  await guest.run(`${cli} device attach ${origin}`, { timeoutMs: cliLimitMs });
  const command = ['device', 'attach', origin];
  await assertRefused(t, { command, code: failed, says: /already/i });
});

test.serial('what only user space can know is refused, too', async (t) => {
  await assertRefused(t, {
    command: ['device', 'attach', multipathPath],
    code: failed,
    says: /path of the multipath device \/dev\/mapper\/mpatha.*attach \/dev\/mapper\/mpatha/,
  });
  await assertRefused(t, {
    command: ['device', 'attach', tiny],
    code: failed,
    says: /smaller than one tracking block/,
  });
  for (const command of [
    ['device', 'attach', '/dev/mapper/mpatha', tracked],
    ['device', 'detach', '/dev/mapper/mpatha'],
  ]) {
    const { code, stderr } = await commands.run(command, cliLimitMs);
    t.is(code, 0, stderr);
  }
});

const stores = [
  { what: 'a file that is too small', store: '/srv/store/small', says: /small/i },
  { what: 'a reflinked file', store: '/srv/xfs/shared', says: /shared|reflink/i },
  { what: 'a file on btrfs', store: '/srv/btrfs/file', says: /btrfs/i },
  { what: 'a folder on btrfs', store: '/srv/btrfs', says: /btrfs/i },
  {
    what: 'a folder on a volume over a disk of the snapshot',
    store: '/srv/volume',
    says: /above or beneath a device of the snapshot \(\/dev\/mapper\/volume and \/dev\/vd/,
  },
  {
    what: 'a volume over a disk of the snapshot',
    store: '/dev/mapper/volume',
    says: /above or beneath/,
  },
  { what: 'a device that is an origin', store: 'ORIGIN', says: /of which the snapshot is to be/ },
  { what: 'a device with a file system', store: 'XFS', says: /not empty: it holds xfs/ },
  { what: 'a device in use', store: 'PATH', says: /in use by something else/ },
  { what: 'a path that does not exist', store: '/srv/absent/store', says: /no such|not exist/i },
] as const;

for (const { what, store, says } of stores) {
  test.serial(`${what} is no store`, async (t) => {
    const before = await leftovers();
    const place = { ORIGIN: origin, XFS: xfsDevice, PATH: multipathPath }[store as string] ?? store;
    const command = beginWords('--checkpoint', 'refused', '--store', place);
    await assertRefused(t, { command, code: failed, says });
    t.is(await leftovers(), before);
  });
}

const memory = ['--store', 'memory', '--store-size', '16M'] as const;

for (const name of ['a/b', '../x', 'a b', '<x>', '', '.']) {
  test.serial(`a checkpoint is not named ${JSON.stringify(name)}`, async (t) => {
    const before = await leftovers();
    const command = beginWords('--checkpoint', name, ...memory);
    await assertRefused(t, { command, code: usage, says: /checkpoint|name/i });
    t.is(await leftovers(), before);
  });
}

test.serial('a port in use is refused, and so is a checkpoint name that is taken', async (t) => {
  const before = await leftovers();
  const holder = guest.start(`exec socat TCP-LISTEN:${nbdPort},bind=127.0.0.1,fork EXEC:cat`);
  await guest.run(`until ss -ltnH | grep -q :${nbdPort}; do sleep 0.05; done`);
  await commands.end(cliLimitMs);
  const command = begin('--checkpoint', 'taken', ...memory);
  await assertRefused(t, { command, code: failed, says: /in use/i });
  holder.kill(15);
  await holder.wait(cliLimitMs);
  t.is(await leftovers(), before);

  const first = guest.start(`exec ${command}`);
  await first.waitForOutput(/"event":"serving"/, cliLimitMs);
  first.kill(2);
  t.is((await first.wait(cliLimitMs)).code, 0);
  await assertRefused(t, { command, code: failed, says: /taken|already|exists/i });
});

/** A pull in two halves, with a line on stdin between them. */
const slowPull = `
import errno, nbd, sys
h = nbd.NBD()
h.connect_uri(sys.argv[1])
h.pread(65536, 0)
print("pulling", flush=True)
sys.stdin.readline()
try:
    h.pread(65536, 65536)
    print("data", flush=True)
except nbd.Error as error:
    print(errno.errorcode[error.errnum], flush=True)
`;

test.serial('a store that overflows fails the pull; the origin never notices', async (t) => {
  const backup = guest.start(
    `exec ${cli} backup begin --json --checkpoint full --disk ${origin} --store memory --store-size 4M -i 0.0.0.0 -p ${nbdPort} --insecure`,
  );
  const [line] = await backup.waitForOutput(/^\{.*"event":"serving".*\}$/m, cliLimitMs);
  const { exports } = JSON.parse(line) as { exports: { name: string }[] };
  const name = exports[0]?.name ?? '';
  const uri = `nbd://127.0.0.1:${guest.hostPort(nbdPort)}/${encodeURIComponent(name)}`;
  const pull = spawn('/usr/bin/python3', ['-c', slowPull, uri], {
    stdio: ['pipe', 'pipe', 'inherit'],
  });
  t.teardown(() => pull.kill('SIGKILL'));
  const pulled = createInterface({ input: pull.stdout })[Symbol.asyncIterator]();
  t.is((await pulled.next()).value, 'pulling');
  await guest.run(
    `set -e
    dd if=/dev/urandom of=/run/new bs=1M count=16 status=none
    dd if=/run/new of=/srv/origin/file conv=notrunc oflag=direct bs=1M status=none
    cmp /run/new /srv/origin/file`,
  );
  await backup.waitForOutput(/"event":"failed"/, cliLimitMs);
  pull.stdin.end('go on\n');
  t.is((await pulled.next()).value, 'EIO', 'the image goes on after its store has overflowed');
  const image = join(folder, 'overflowed.qcow2');
  const late = await runTool('qemu-img', ['convert', '-f', 'raw', '-O', 'qcow2', uri, image], {
    check: false,
  });
  t.not(late.code, 0, 'an image whose store overflowed was pulled');
  backup.kill(2);
  const ended = await backup.wait(cliLimitMs);
  t.is(ended.code, overflow, `${ended.stdout}${ended.stderr}`);
  t.regex(`${ended.stdout}${ended.stderr}`, /overflow|full/i);
  await guest.run('echo 3 >/proc/sys/vm/drop_caches; cmp /run/new /srv/origin/file');
});

test.serial('after all that the module unloads and the kernel has not complained', async (t) => {
  await guest.run(
    `set -e; ${cli} device detach ${origin} ${tracked}; umount /srv/origin; rmmod stillblock`,
    {
      timeoutMs: cliLimitMs,
    },
  );
  const { code, stdout } = await guest.run(`e2fsck -fn ${origin}`, { check: false });
  t.is(code, 0, stdout);
  // Reads of the overflowed image fail, as they must.
  await t.notThrowsAsync(guest.shutdown([/I\/O error.*stillblock|stillblock.*I\/O error/]));
});
