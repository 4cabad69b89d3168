// SPDX-License-Identifier: Apache-2.0
// `npm run bench:module`: what tracking and copy-on-write cost, on a stock
// kernel in a guest. Instructions per write are counted by QEMU, so they hardly
// depend on this machine; latencies are taken side by side with dm-snapshot, on
// the same disks in the same guest, and only their ratios mean anything.
//
// `npm run bench:module -- --help` shows how to measure less.

import { execFileSync } from 'node:child_process';
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import process from 'node:process';
import { Command, InvalidArgumentError, Option } from 'commander';
import { buildTool, Conversation } from '../../kernels/world.ts';
import { checkout, type KernelName, kernelNames, stockKernel } from '../../vm/checkout.ts';
import type { GuestCommand } from '../../vm/command.ts';
import { cli } from '../../vm/command-line.ts';
import { bootGuest, type Guest } from '../../vm/guest.ts';

const MiB = 2 ** 20;
/** Scattered writes of 4 KiB, each the first in its 64 KiB. */
const firstStrideBytes = 64 * 1024;
const firstCount = 1024;
const diskBytes = 128 * MiB;
const limitMs = 600_000;
const accessesProgram = join(checkout, 'build/bench/accesses');

/** dm-snapshot with the chunk of LVM's default, and with that of Stillblock's copying. */
const roles = ['plain', 'stillblock', 'dm4', 'dm16'] as const;
type Role = (typeof roles)[number];

/** What test/bench/module/accesses.c prints of a device; nanoseconds. */
interface Accesses {
  readonly count: number;
  readonly mean: number;
  readonly p50: number;
  readonly p99: number;
}

/** What was measured of one way to hold an image. */
interface Held {
  readonly first: Accesses;
  readonly again: Accesses;
  /** Direct reads of 1 MiB of what has not been written since the instant. */
  readonly cleanRead: Accesses;
  /** Bytes that the store has taken per byte first overwritten. */
  readonly copied: number;
}

/** By role; `plain` holds no image, and is what images are compared with in reading. */
type Latencies = Readonly<Record<Role, Held>>;

interface Instructions {
  readonly noHook: number;
  readonly untracked: number;
  readonly tracked: number;
  readonly heldAgain: number;
  readonly heldFirst: number;
}

const kinds = ['instructions', 'latencies'] as const;
type Kind = (typeof kinds)[number];

interface Counted {
  readonly release: string;
  readonly instructions: Instructions;
}

interface Timed {
  readonly release: string;
  /** One for each round. */
  readonly latencies: readonly Latencies[];
}

function number(text: string): number {
  const value = Number(text);
  if (!Number.isSafeInteger(value) || value < 1) throw new InvalidArgumentError('a whole number');
  return value;
}

function addTo<T extends string>(names: readonly T[]): (text: string, earlier?: T[]) => T[] {
  return (text, earlier = []) => {
    const name = names.find((each) => each === text);
    if (name === undefined) throw new InvalidArgumentError(`one of ${names.join(', ')}`);
    return [...earlier, name];
  };
}

interface Options {
  readonly kernel?: readonly KernelName[];
  readonly part?: readonly Kind[];
  /** Without it each measurement has as many as suits it. */
  readonly rounds?: number;
  readonly json?: string;
  readonly docs: boolean;
}

const values = new Command('bench:module')
  .description('measures what tracking and copy-on-write cost in guests, and prints tables')
  .addOption(
    new Option(
      '--kernel <name>',
      `${kernelNames.join(', ')}; may be repeated (default: 6.1)`,
    ).argParser(addTo(kernelNames)),
  )
  .addOption(
    new Option('--part <name>', `${kinds.join(', ')}; may be repeated (default: both)`).argParser(
      addTo(kinds),
    ),
  )
  .option(
    '--rounds <count>',
    'of each measurement (default: 3 of instructions, whose median leaves out what the first does besides; 4 of latencies, for each disk in each role)',
    number,
  )
  .option('--json <file>', 'writes what was measured there')
  .option('--docs', 'writes the tables into docs/benchmarks.md', false)
  .parse()
  .opts<Options>();
/** Passes whose median is taken. */
const instructionRounds = values.rounds ?? 3;
/** In as many as there are roles each of them is on each disk once. */
const latencyRounds = values.rounds ?? roles.length;

const say = (text: string): void => {
  process.stderr.write(`${text}\n`);
};

function median(values: readonly number[]): number {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted[Math.floor(sorted.length / 2)];
  if (middle === undefined) throw new Error('nothing was measured');
  return middle;
}

interface Pieces {
  readonly bytes: number;
  /** Where the first lies, in bytes. */
  readonly start?: number;
  readonly strideBytes: number;
  readonly count: number;
  /** Decides the order. */
  readonly seed: number;
}

/** Accesses the same pieces of each device in turn. */
async function access(
  guest: Guest,
  kind: 'read' | 'write',
  { bytes, start = 0, strideBytes, count, seed }: Pieces,
  devices: readonly string[],
): Promise<Accesses[]> {
  const { stdout } = await guest.run(
    [accessesProgram, kind, bytes, start, strideBytes, count, seed, ...devices].join(' '),
    { timeoutMs: limitMs },
  );
  return JSON.parse(stdout) as Accesses[];
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

/** A role's devices in a round: what is written, what is read, and what its store has taken. */
interface Part {
  readonly origin: string;
  readonly image: string;
  usedBytes(): Promise<number>;
}

const sectors = diskBytes / 512;

async function dmSnapshot(
  guest: Guest,
  { origin, cow, chunkBytes }: { origin: string; cow: string; chunkBytes: number },
): Promise<Part> {
  const name = `dm${chunkBytes}`;
  await guest.run(
    `set -e
    dd if=/dev/zero of=${cow} bs=64K count=1 conv=notrunc oflag=direct 2>&1
    new() { dmsetup create --noudevsync "$1" --table "0 ${sectors} $2"; dmsetup mknodes; }
    new ${name}-base 'linear ${origin} 0'
    new ${name}-image 'snapshot /dev/mapper/${name}-base ${cow} P ${chunkBytes / 512}'
    new ${name}-origin 'snapshot-origin /dev/mapper/${name}-base'`,
    { timeoutMs: limitMs },
  );
  return {
    origin: `/dev/mapper/${name}-origin`,
    image: `/dev/mapper/${name}-image`,
    async usedBytes() {
      const { stdout } = await guest.run(`dmsetup status ${name}-image`);
      // "0 SIZE snapshot USED/ALL METADATA", in sectors.
      const used = /snapshot (\d+)\/\d+ (\d+)/.exec(stdout)?.[1];
      if (used === undefined) throw new Error(`unexpected status of dm-snapshot: ${stdout}`);
      return Number(used) * 512;
    },
  };
}

async function removeDmSnapshot(guest: Guest, chunkBytes: number): Promise<void> {
  await guest.run(
    `for name in origin image base; do dmsetup remove --noudevsync --retry dm${chunkBytes}-$name || exit; done`,
    { timeoutMs: limitMs },
  );
}

async function stillblock(module: Conversation, origin: string): Promise<Part> {
  const [id] = await module.require(`attach ${origin}`);
  const [image] = await module.require(`take held trackers=${id} stores=file:/mnt/store/file`);
  return {
    origin,
    image: `/dev/${image}`,
    usedBytes: async () => Number((await module.require('state held'))[2]),
  };
}

/** A round: images of all kinds held at once, on different disks, and the same done to each. */
async function holdRound(
  guest: Guest,
  module: Conversation,
  disks: readonly string[],
  cows: readonly string[],
  round: number,
): Promise<Latencies> {
  // Each role is on each disk once.
  const origin = (role: Role): string => disks[(roles.indexOf(role) + round) % roles.length] ?? '';
  const parts: Record<Role, Part> = {
    plain: { origin: origin('plain'), image: origin('plain'), usedBytes: async () => 0 },
    stillblock: await stillblock(module, origin('stillblock')),
    dm4: await dmSnapshot(guest, { origin: origin('dm4'), cow: cows[0] ?? '', chunkBytes: 4096 }),
    dm16: await dmSnapshot(guest, {
      ...{ origin: origin('dm16'), cow: cows[1] ?? '', chunkBytes: 16_384 },
    }),
  };
  const written = {
    ...{ bytes: 4096, strideBytes: firstStrideBytes, count: firstCount },
    seed: round + 1,
  };
  const origins = roles.map((role) => parts[role].origin);
  const first = await access(guest, 'write', written, origins);
  const used = await Promise.all(roles.map((role) => parts[role].usedBytes()));
  const again = await access(guest, 'write', { ...written, seed: round + 101 }, origins);
  const clean = {
    ...{ bytes: MiB, start: firstCount * firstStrideBytes, strideBytes: MiB, seed: round + 1 },
    count: (diskBytes - firstCount * firstStrideBytes) / MiB,
  };
  const images = roles.map((role) => parts[role].image);
  // The first pass warms the host's cache for all.
  await access(guest, 'read', clean, images);
  const cleanRead = await access(guest, 'read', clean, images);
  await module.require('close held');
  await module.require('detach all');
  await removeDmSnapshot(guest, 4096);
  await removeDmSnapshot(guest, 16_384);
  const held = (index: number): Held => {
    const of = (all: readonly Accesses[]): Accesses => {
      const one = all[index];
      if (one === undefined) throw new Error('a device was left out');
      return one;
    };
    return {
      ...{ first: of(first), again: of(again), cleanRead: of(cleanRead) },
      copied: (used[index] ?? 0) / (firstCount * 4096),
    };
  };
  return { plain: held(0), stillblock: held(1), dm4: held(2), dm16: held(3) };
}

async function measureLatencies(kernel: KernelName): Promise<Latencies[]> {
  const ioctls = await buildTool('ioctls');
  const origins = ['origin0', 'origin1', 'origin2', 'origin3'];
  const places = ['cow0', 'cow1', 'store'];
  const guest = await bootGuest({
    kernel,
    memoryMiB: 1024,
    disks: [...origins, ...places].map((name) => ({ name, sizeBytes: diskBytes })),
  });
  try {
    const nodes = await Promise.all([...origins, ...places].map((name) => guest.disk(name)));
    const store = nodes[6];
    await guest.run(
      `set -e
      modprobe dm-snapshot
      # No sparse file behind any disk: the host's allocation is not to be measured.
      for disk in ${nodes.slice(0, 6).join(' ')}; do
        dd if=/dev/urandom of=$disk bs=1M count=${diskBytes / MiB} oflag=direct 2>/dev/null
      done
      mkfs.ext4 -q ${store}; mkdir /mnt/store; mount ${store} /mnt/store
      dd if=/dev/urandom of=/mnt/store/file bs=1M count=${(diskBytes / MiB) * 0.75} oflag=direct 2>/dev/null; sync`,
      { timeoutMs: limitMs },
    );
    await guest.loadModule();
    const module = new Conversation(guest, ioctls);
    const all: Latencies[] = [];
    for (let round = 0; round < latencyRounds; round += 1) {
      say(`${kernel}: round ${round + 1} of ${latencyRounds}`);
      all.push(await holdRound(guest, module, nodes.slice(0, 4), nodes.slice(4, 6), round));
    }
    await module.end();
    await guest.shutdown();
    return all;
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
    const write = async (seed: number): Promise<number> => {
      const pieces = { bytes: 4096, strideBytes: firstStrideBytes, count, seed };
      const [one] = await access(guest, 'write', pieces, [subject]);
      return one?.mean ?? Number.NaN;
    };
    // The first pass allocates null_blk's pages.
    const per = async (): Promise<number> => {
      const passes: number[] = [];
      for (let round = 1; round <= instructionRounds; round += 1) {
        passes.push(await write(round));
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
    const heldFirst = await write(1);
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
  /** The median over the rounds of a figure, or of the ratio of one to another's in the same round. */
  const of = (role: Role, figure: (held: Held) => number, to?: Role): number =>
    median(
      latencies.map((round) => figure(round[role]) / (to === undefined ? 1 : figure(round[to]))),
    );
  const us = (ns: number): string => (ns / 1000).toFixed(0);
  const timings: readonly ((held: Held) => number)[] = [
    ({ first }) => first.p50,
    ({ first }) => first.p99,
    ({ again }) => again.p50,
    ({ again }) => again.p99,
  ];
  const throughput = ({ cleanRead }: Held): number => 1 / cleanRead.p50;
  const row = (name: string, role: Role): string[] => [
    name,
    ...timings.map((figure) => us(of(role, figure))),
    role === 'plain' ? '' : of(role, ({ copied }) => copied).toFixed(1),
    role === 'plain' ? '' : of(role, throughput, 'plain').toFixed(2),
  ];
  const ratio = (name: string, role: Role): string[] => [
    name,
    ...timings.map((figure) => of('stillblock', figure, role).toFixed(2)),
    role === 'plain' ? '' : of('stillblock', ({ copied }) => copied, role).toFixed(1),
    of('stillblock', throughput, role).toFixed(2),
  ];
  return table([
    [
      `4 KiB direct writes, ${release}`,
      'first p50 µs',
      'p99 µs',
      'again p50 µs',
      'p99 µs',
      'copied per byte',
      'image read, of a disk',
    ],
    row('plain disk', 'plain'),
    row('Stillblock', 'stillblock'),
    row('dm-snapshot, 4 KiB chunks', 'dm4'),
    row('dm-snapshot, 16 KiB chunks', 'dm16'),
    ratio('ratio to dm-snapshot, 4 KiB (aim: 0.7, rewrites 1.0)', 'dm4'),
    ratio('ratio to dm-snapshot, 16 KiB', 'dm16'),
    ratio('ratio to a plain disk (aim of image reads: 0.9)', 'plain'),
  ]);
}

/** Puts a table into docs/benchmarks.md, in the place that is kept for it. */
function intoDocs(part: Kind, text: string): void {
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

mkdirSync(join(checkout, 'build/bench'), { recursive: true });
execFileSync('gcc-12', [
  '-O2',
  '-Wall',
  '-Wextra',
  '-Werror',
  '-o',
  accessesProgram,
  join(checkout, 'test/bench/module/accesses.c'),
]);
const kernels = kernelNames.filter((name) => (values.kernel ?? ['6.1']).includes(name));
const chosen = kinds.filter((name) => (values.part ?? kinds).includes(name));
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
const tables: Record<Kind, string> = {
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
