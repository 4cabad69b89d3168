// SPDX-License-Identifier: Apache-2.0
// `npm run bench:module`: what tracking and copy-on-write cost, on a stock
// kernel in a guest. Instructions per write are counted by QEMU, so they hardly
// depend on this machine; latencies are taken side by side with dm-snapshot, on
// the same disks in the same guest, and only their ratios mean anything.
//
//   node dist/test/bench/module/run.js [--kernel 6.1]... [--part instructions|latencies]
//       [--json FILE] [--docs]
//
// --docs writes the tables into docs/benchmarks.md.

import { execFileSync } from 'node:child_process';
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import process from 'node:process';
import { parseArgs } from 'node:util';
import { checkout, type KernelName, kernelNames, stockKernel } from '../../vm/checkout.ts';
import type { GuestCommand } from '../../vm/command.ts';
import { bootGuest, type Guest } from '../../vm/guest.ts';
import { shellQuote } from '../../vm/initrd.ts';

const MiB = 2 ** 20;
/** Scattered writes of 4 KiB, each the first in its 64 KiB. */
const strideBytes = 64 * 1024;
const diskBytes = 256 * MiB;
const limitMs = 600_000;
const cli = `node ${shellQuote(join(checkout, 'dist/src/cli.js'))}`;
const writesProgram = join(checkout, 'build/bench/writes');
/** dm-snapshot's chunk where LVM leaves it alone, and that of Stillblock's copying. */
const dmChunksBytes = [4096, 16384] as const;
const rounds = 3;

/** What test/bench/module/writes.c prints; nanoseconds. */
interface Writes {
  readonly count: number;
  readonly mean: number;
  readonly p50: number;
  readonly p99: number;
}

interface Held {
  readonly first: Writes;
  readonly again: Writes;
  /** Bytes of old data copied per byte first overwritten. */
  readonly copied: number;
  /** Reading the image's untouched half directly, against the origin's: ratio of throughputs. */
  readonly cleanRead: number;
}

interface Latencies {
  readonly plain: Writes;
  readonly stillblock: Held;
  readonly dmSnapshot: readonly (Held & { readonly chunkBytes: number })[];
}

interface Instructions {
  readonly noHook: number;
  readonly untracked: number;
  readonly tracked: number;
  readonly heldAgain: number;
  readonly heldFirst: number;
}

const parts = ['instructions', 'latencies'] as const;
type Part = (typeof parts)[number];

interface Counted {
  readonly release: string;
  readonly instructions: Instructions;
}

interface Timed {
  readonly release: string;
  readonly latencies: Latencies;
}

const say = (text: string): void => {
  process.stderr.write(`${text}\n`);
};

function median(values: readonly number[]): number {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted[Math.floor(sorted.length / 2)];
  if (middle === undefined) throw new Error('nothing was measured');
  return middle;
}

function medians(all: readonly Writes[]): Writes {
  return {
    count: all.reduce((sum, { count }) => sum + count, 0),
    mean: median(all.map(({ mean }) => mean)),
    p50: median(all.map(({ p50 }) => p50)),
    p99: median(all.map(({ p99 }) => p99)),
  };
}

async function writes(
  guest: Guest,
  device: string,
  count: number,
  seed: number,
  stride = strideBytes,
): Promise<Writes> {
  const { stdout } = await guest.run(`${writesProgram} ${device} ${stride} ${count} ${seed}`, {
    timeoutMs: limitMs,
  });
  return JSON.parse(stdout) as Writes;
}

/** Seconds to read a part of a device directly, in pieces of 1 MiB. */
async function readSeconds(guest: Guest, device: string, skipMiB: number): Promise<number> {
  const { stdout } = await guest.run(
    `dd if=${device} of=/dev/null bs=1M skip=${skipMiB} count=64 iflag=direct 2>&1`,
    { timeoutMs: limitMs },
  );
  const seconds = /, ([0-9.e-]+) s,/.exec(stdout)?.[1];
  if (seconds === undefined) throw new Error(`dd did not say how long it took: ${stdout}`);
  return Number(seconds);
}

interface Backup {
  readonly command: GuestCommand;
  readonly image: string;
}

async function beginBackup(guest: Guest, checkpoint: string, store: string): Promise<Backup> {
  const command = guest.start(
    `exec ${cli} backup begin --json --checkpoint ${checkpoint} ${store} -U /run/bench.sock`,
  );
  const [line] = await command.waitForOutput(/^\{.*"event":"serving".*\}$/m, limitMs);
  const { disks } = JSON.parse(line) as { disks: readonly { image: string }[] };
  const image = disks[0]?.image;
  if (image === undefined) throw new Error(`no image in ${line}`);
  return { command, image };
}

async function endBackup({ command }: Backup): Promise<void> {
  command.kill(2);
  const { code, stderr } = await command.wait(limitMs);
  if (code !== 0) throw new Error(`backup begin ended with ${code}: ${stderr}`);
}

async function storeUsedBytes(guest: Guest): Promise<number> {
  const { stdout } = await guest.run(`${cli} status --json`, { timeoutMs: limitMs });
  const used = /"usedBytes":(\d+)/.exec(stdout)?.[1];
  if (used === undefined) throw new Error(`status does not tell the store's use: ${stdout}`);
  return Number(used);
}

/** The same writes twice onto a held snapshot, and a read of what they left alone. */
async function measureHeld(
  guest: Guest,
  origin: string,
  image: string,
  seed: number,
  count: number,
  copiedBytes: () => Promise<number>,
): Promise<Held> {
  const first = await writes(guest, origin, count, seed);
  const copied = (await copiedBytes()) / (count * 4096);
  const again = await writes(guest, origin, count, seed);
  const clean = Math.floor((diskBytes / MiB) * 0.7);
  // In turn, twice each; the first pass warms the host's cache for both.
  await readSeconds(guest, origin, clean);
  const ofImage = await readSeconds(guest, image, clean);
  const ofOrigin = await readSeconds(guest, origin, clean);
  return { first, again, copied, cleanRead: ofOrigin / ofImage };
}

async function stillblockRound(
  guest: Guest,
  origin: string,
  round: number,
  count: number,
): Promise<Held> {
  const backup = await beginBackup(guest, `round-${round}`, '--store /mnt/store --store-size 128M');
  const held = await measureHeld(guest, origin, backup.image, round, count, () =>
    storeUsedBytes(guest),
  );
  await endBackup(backup);
  return held;
}

async function dmSnapshotRound(
  guest: Guest,
  origin: string,
  cow: string,
  chunkBytes: number,
  round: number,
  count: number,
): Promise<Held> {
  const sectors = diskBytes / 512;
  await guest.run(
    `set -e
    modprobe dm-snapshot
    dd if=/dev/zero of=${cow} bs=64K count=1 conv=notrunc oflag=direct 2>&1
    dmsetup create --noudevsync base --table "0 ${sectors} linear ${origin} 0"
    dmsetup mknodes
    dmsetup create --noudevsync snap --table "0 ${sectors} snapshot /dev/mapper/base ${cow} P ${chunkBytes / 512}"
    dmsetup create --noudevsync origin --table "0 ${sectors} snapshot-origin /dev/mapper/base"
    dmsetup mknodes`,
    { timeoutMs: limitMs },
  );
  const held = await measureHeld(
    guest,
    '/dev/mapper/origin',
    '/dev/mapper/snap',
    round,
    count,
    async () => {
      const { stdout } = await guest.run('dmsetup status snap');
      // "0 SIZE snapshot USED/ALL METADATA", in sectors.
      const used = /snapshot (\d+)\/\d+ (\d+)/.exec(stdout);
      if (used === null) throw new Error(`unexpected status of dm-snapshot: ${stdout}`);
      return Number(used[1]) * 512;
    },
  );
  await guest.run(
    'for name in origin snap base; do dmsetup remove --noudevsync --retry $name || exit; done',
    { timeoutMs: limitMs },
  );
  return held;
}

function combine(rounds: readonly Held[]): Held {
  return {
    first: medians(rounds.map(({ first }) => first)),
    again: medians(rounds.map(({ again }) => again)),
    copied: median(rounds.map(({ copied }) => copied)),
    cleanRead: median(rounds.map(({ cleanRead }) => cleanRead)),
  };
}

async function measureLatencies(kernel: KernelName): Promise<Latencies> {
  const count = 2000;
  const guest = await bootGuest({
    kernel,
    disks: [
      { name: 'origin', sizeBytes: diskBytes },
      { name: 'store', sizeBytes: diskBytes },
      { name: 'cow', sizeBytes: diskBytes },
    ],
  });
  try {
    const [origin, store, cow] = await Promise.all([
      guest.disk('origin'),
      guest.disk('store'),
      guest.disk('cow'),
    ]);
    await guest.run(
      `set -e
      mkfs.ext4 -q ${store}; mkdir /mnt/store; mount ${store} /mnt/store
      # No sparse file behind any disk: the host's allocation is not to be measured.
      dd if=/dev/urandom of=${origin} bs=1M oflag=direct 2>/dev/null || true
      dd if=/dev/urandom of=${cow} bs=1M oflag=direct 2>/dev/null || true
      dd if=/dev/urandom of=/mnt/store/fill bs=1M count=200 oflag=direct 2>/dev/null; rm /mnt/store/fill; sync`,
      { timeoutMs: limitMs },
    );
    const plain: Writes[] = [];
    const stillblock: Held[] = [];
    const dm = dmChunksBytes.map((chunkBytes) => ({ chunkBytes, rounds: [] as Held[] }));
    for (let round = 1; round <= rounds; round += 1) {
      plain.push(await writes(guest, origin, count, round));
      for (const { chunkBytes, rounds: done } of dm) {
        done.push(await dmSnapshotRound(guest, origin, cow, chunkBytes, round, count));
      }
      await guest.loadModule();
      await guest.run(`${cli} device attach ${origin}`, { timeoutMs: limitMs });
      stillblock.push(await stillblockRound(guest, origin, round, count));
      await guest.run(`${cli} device detach ${origin} && rmmod stillblock`, {
        timeoutMs: limitMs,
      });
    }
    await guest.shutdown();
    return {
      plain: medians(plain),
      stillblock: combine(stillblock),
      dmSnapshot: dm.map(({ chunkBytes, rounds: done }) => ({ chunkBytes, ...combine(done) })),
    };
  } finally {
    await guest.kill();
  }
}

/** Instructions per write, of one processor that does nothing else. */
async function measureInstructions(kernel: KernelName): Promise<Instructions> {
  const count = 3000;
  const guest = await bootGuest({ kernel, cpus: 1, icount: 0 });
  try {
    await guest.run('modprobe null_blk nr_devices=2 queue_mode=2 irqmode=0 memory_backed=1 gb=1', {
      timeoutMs: limitMs,
    });
    const [subject, other] = ['/dev/nullb0', '/dev/nullb1'];
    // The first pass allocates null_blk's pages.
    const per = async (): Promise<number> => {
      const passes: number[] = [];
      for (let round = 1; round <= rounds; round += 1) {
        passes.push((await writes(guest, subject, count, round)).mean);
      }
      return median(passes);
    };
    await per();
    const noHook = await per();
    await guest.loadModule();
    await guest.run(`${cli} device attach ${other}`, { timeoutMs: limitMs });
    const untracked = await per();
    await guest.run(`${cli} device attach ${subject}`, { timeoutMs: limitMs });
    const tracked = await per();
    const backup = await beginBackup(
      guest,
      'held',
      '--store memory --store-size 256M --disk /dev/nullb0',
    );
    const heldFirst = (await writes(guest, subject, count, 1)).mean;
    const heldAgain = await per();
    await endBackup(backup);
    await guest.shutdown();
    return { noHook, untracked, tracked, heldFirst, heldAgain };
  } finally {
    await guest.kill();
  }
}

/** A Markdown table. */
const table = (rows: readonly (readonly string[])[]): string => {
  const [head = [], ...body] = rows;
  return [head, head.map(() => '---'), ...body].map((row) => `| ${row.join(' | ')} |`).join('\n');
};

const plus = (value: number, base: number): string =>
  `${value} (${value >= base ? '+' : ''}${value - base}, ${(((value - base) / base) * 100).toFixed(1)} %)`;

function instructionTable(results: readonly Counted[]): string {
  const row = (name: string, key: keyof Instructions): string[] => [
    name,
    ...results.map(({ instructions }) =>
      key === 'noHook' ? String(instructions.noHook) : plus(instructions[key], instructions.noHook),
    ),
  ];
  return table([
    ['instructions per 4 KiB write', ...results.map(({ release }) => release)],
    row('no hook', 'noHook'),
    row('another device tracked (aim: 2 %)', 'untracked'),
    row('tracked (aim: 4 %)', 'tracked'),
    row('snapshot held, old data preserved before', 'heldAgain'),
    row('snapshot held, first write, all of the work', 'heldFirst'),
  ]);
}

function latencyTable({ release, latencies }: Timed): string {
  const { plain, stillblock, dmSnapshot } = latencies;
  const us = (ns: number): string => (ns / 1000).toFixed(0);
  const row = (name: string, held: Held): string[] => [
    name,
    us(held.first.p50),
    us(held.first.p99),
    us(held.again.p50),
    us(held.again.p99),
    held.copied.toFixed(1),
    held.cleanRead.toFixed(2),
  ];
  const ratio = ({ chunkBytes, ...dm }: Held & { readonly chunkBytes: number }): string[] => {
    const of = (of: 'first' | 'again', figure: 'p50' | 'p99'): string =>
      (stillblock[of][figure] / dm[of][figure]).toFixed(2);
    return [
      `ratio to dm-snapshot, ${chunkBytes / 1024} KiB`,
      ...[of('first', 'p50'), of('first', 'p99'), of('again', 'p50'), of('again', 'p99')],
      (stillblock.copied / dm.copied).toFixed(1),
      (stillblock.cleanRead / dm.cleanRead).toFixed(1),
    ];
  };
  return table([
    [
      `4 KiB direct writes, ${release}`,
      'first p50 µs',
      'p99 µs',
      'again p50 µs',
      'p99 µs',
      'copied per byte',
      'image read, of origin',
    ],
    ['plain disk', '', '', us(plain.p50), us(plain.p99), '', ''],
    row('Stillblock', stillblock),
    ...dmSnapshot.map((held) => row(`dm-snapshot, ${held.chunkBytes / 1024} KiB chunks`, held)),
    ...dmSnapshot.map(ratio),
  ]);
}

/** Puts a table into docs/benchmarks.md, in the place that is kept for it. */
function intoDocs(part: Part, text: string): void {
  const path = join(checkout, 'docs/benchmarks.md');
  const [begin, end] = [
    `<!-- bench:module ${part} begins -->`,
    `<!-- bench:module ${part} ends -->`,
  ];
  const docs = readFileSync(path, 'utf8');
  const [before, after] = [docs.indexOf(begin), docs.indexOf(end)];
  if (before < 0 || after < before) throw new Error(`${path} has no place for ${part}`);
  writeFileSync(path, `${docs.slice(0, before)}${begin}\n${text}\n${docs.slice(after)}`);
}

const { values } = parseArgs({
  options: {
    kernel: { type: 'string', multiple: true, default: ['6.1'] },
    part: { type: 'string', multiple: true, default: [...parts] },
    json: { type: 'string' },
    docs: { type: 'boolean', default: false },
  },
});
const kernels = kernelNames.filter((name) => values.kernel.includes(name));
if (kernels.length !== values.kernel.length) {
  throw new Error(`--kernel is one of ${kernelNames.join(', ')}`);
}
const chosen = parts.filter((name) => values.part.includes(name));
if (chosen.length !== values.part.length) throw new Error(`--part is one of ${parts.join(', ')}`);
mkdirSync(join(checkout, 'build/bench'), { recursive: true });
execFileSync('gcc-12', [
  '-O2',
  '-Wall',
  '-Wextra',
  '-Werror',
  '-o',
  writesProgram,
  join(checkout, 'test/bench/module/writes.c'),
]);
const counted: Counted[] = [];
const timed: Timed[] = [];
for (const kernel of kernels) {
  const { release } = stockKernel(kernel);
  if (chosen.includes('instructions')) {
    say(`${kernel}: counting instructions`);
    counted.push({ release, instructions: await measureInstructions(kernel) });
  }
  if (chosen.includes('latencies')) {
    say(`${kernel}: writing beside dm-snapshot`);
    timed.push({ release, latencies: await measureLatencies(kernel) });
  }
}
const tables: Record<Part, string> = {
  instructions: instructionTable(counted),
  latencies: timed.map(latencyTable).join('\n\n'),
};
for (const part of chosen) {
  process.stdout.write(`${tables[part]}\n\n`);
  if (values.docs) intoDocs(part, tables[part]);
}
if (values.json !== undefined) {
  writeFileSync(values.json, `${JSON.stringify({ counted, timed }, null, 2)}\n`);
}
