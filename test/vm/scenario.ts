// SPDX-License-Identifier: Apache-2.0
// The main job, from end to end: two disks in use, two consistent snapshots, a
// full and an incremental pulled over the network by stock tools, and the
// proofs that they are right. `npm run demo` shows it, scenario.test.ts asserts it.

import { rmSync } from 'node:fs';
import { mkdtemp, open, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { checkout, type KernelName } from './checkout.ts';
import type { CommandResult, GuestCommand } from './command.ts';
import { cli } from './command-line.ts';
import { bootGuest, type Guest } from './guest.ts';
import { runTool } from './host.ts';
import { shellQuote } from './initrd.ts';
import { lastRecord } from './records.ts';
import { smallXfs } from './xfs.ts';

const MiB = 1 << 20;
const nbdPort = 10809;
const storeBytes = 256 * MiB;
const disks = [
  { name: 'ext4', sizeBytes: 72 * MiB },
  { name: 'lvm', sizeBytes: 84 * MiB },
  { name: 'store', sizeBytes: 320 * MiB },
] as const;
/** What lies in each file system before anything is snapped. */
const initialMiB = 24;
/** Changes are counted in the smallest unit that both file systems write. */
const changeBytes = 4096;

/** fio passes that each application completes before and between the snapshots. */
const passesBetween = 1;
const passLimitMs = 180_000;
/** Starting fio takes an emulated processor three seconds, which the others need, too. */
const fioPauseSeconds = 5;
const cliLimitMs = 300_000;

const appender = `node ${shellQuote(join(checkout, 'dist/test/vm/appender.js'))}`;

/** One of the five claims, with what was seen. */
export interface Proof {
  readonly claim: string;
  readonly holds: boolean;
  readonly seen: string;
}

export interface DiskReport {
  readonly name: string;
  readonly sizeBytes: number;
  /** Data in the full image of the first checkpoint. */
  readonly fullBytes: number;
  readonly fullMs: number;
  /** Data in the incremental, without its backing file. */
  readonly incrementalBytes: number;
  readonly incrementalMs: number;
  /** What differs between the two full images, in units of 4 KiB. */
  readonly changedBytes: number;
}

export interface ScenarioReport {
  readonly kernel: KernelName;
  readonly release: string;
  readonly accelerator: string;
  readonly disks: readonly DiskReport[];
  readonly proofs: readonly Proof[];
  readonly totalMs: number;
}

/** Tells the user what is going on. */
export type Progress = (text: string) => void;

type FileSystem = 'ext4' | 'xfs';

/** An origin as the scenario knows it. */
interface Origin {
  /** Name of its export. */
  readonly name: string;
  readonly device: string;
  readonly fileSystem: FileSystem;
  readonly mountPoint: string;
}

interface Stopwatch<T> {
  readonly value: T;
  readonly ms: number;
}

async function timed<T>(work: Promise<T>): Promise<Stopwatch<T>> {
  const started = performance.now();
  const value = await work;
  return { value, ms: performance.now() - started };
}

const seconds = (ms: number): string => `${(ms / 1000).toFixed(1)} s`;

/** Makes the file systems; returns the origins. */
async function prepareDisks(guest: Guest): Promise<readonly [Origin, Origin]> {
  const [ext4, lvm, store] = await Promise.all(disks.map(({ name }) => guest.disk(name)));
  const partition = `${ext4}1`;
  await guest.run(
    `set -e
    mkdir -p /srv/ext4 /srv/xfs /srv/store
    echo 'start=2048, type=83' | sfdisk --quiet --label dos ${ext4}
    mkfs.ext4 -q -F -E nodiscard ${partition}
    mount ${partition} /srv/ext4
    pvcreate -q ${lvm}; vgcreate -q vg0 ${lvm}; lvcreate -q -y -Wn -l 100%FREE -n data vg0
    ${smallXfs} -K /dev/vg0/data
    mount /dev/vg0/data /srv/xfs
    mkfs.ext4 -q -F -E nodiscard -O ^has_journal ${store}
    mount ${store} /srv/store
    for folder in /srv/ext4 /srv/xfs; do
      dd if=/dev/urandom of=$folder/initial bs=1M count=${initialMiB} status=none
    done
    sync`,
    { timeoutMs: 240_000 },
  );
  return [
    {
      name: partition.replace('/dev/', ''),
      device: partition,
      fileSystem: 'ext4',
      mountPoint: '/srv/ext4',
    },
    { name: 'vg0-data', device: '/dev/vg0/data', fileSystem: 'xfs', mountPoint: '/srv/xfs' },
  ];
}

/**
 * fio passes of random writes, one after another: each pass reads back all that
 * it wrote and checks it, and the first that fails ends the loop with its code.
 */
const fioLoop = (origin: Origin, options: string): string =>
  `while [ ! -e /run/stop ]; do
    fio --name=${origin.fileSystem} --filename=${origin.mountPoint}/fio --size=24M --io_size=1M \
      --rw=randwrite --bs=4k --rate_iops=40 --randrepeat=0 --verify=crc32c --verify_fatal=1 \
      --verify_state_save=0 --thread --disk_util=0 --minimal ${options} >/run/fio-${origin.fileSystem}.log 2>&1 ||
      { cat /run/fio-${origin.fileSystem}.log >&2; exit 1; }
    echo pass
    sleep ${fioPauseSeconds}
  done`;

/** What writes all the time. */
class Applications {
  readonly #guest: Guest;
  readonly #fio: readonly GuestCommand[];
  readonly #appender: GuestCommand;
  #passes = 0;

  constructor(guest: Guest, [ext4, xfs]: readonly [Origin, Origin]) {
    this.#guest = guest;
    this.#fio = [
      guest.start(fioLoop(ext4, '--ioengine=libaio --iodepth=8 --direct=1')),
      guest.start(fioLoop(xfs, '--ioengine=psync --fdatasync=16')),
    ];
    this.#appender = guest.start(
      `exec ${appender} ${ext4.mountPoint}/records ${xfs.mountPoint}/records`,
    );
  }

  /** Waits until each fio has ended some more verified passes. */
  async progress(): Promise<void> {
    this.#passes += passesBetween;
    const done = new RegExp(`(pass\\n){${this.#passes}}`);
    await Promise.all(this.#fio.map((fio) => fio.waitForOutput(done, passLimitMs)));
    if (this.#appender.code !== undefined) {
      throw new Error(`the appender ended: ${this.#appender.stderr}`);
    }
    // What was passed meanwhile counts, too: progress is from now on.
    this.#passes = Math.max(...this.#fio.map((fio) => fio.stdout.split('\n').length - 1));
  }

  /** @returns the applications' results and the number of verified passes. */
  async stop(): Promise<{ fio: CommandResult[]; appender: CommandResult; passes: number }> {
    await this.#guest.run('touch /run/stop');
    this.#appender.kill(15);
    const fio = await Promise.all(this.#fio.map((command) => command.wait(passLimitMs)));
    const passes = fio.reduce((sum, { stdout }) => sum + stdout.split('\n').length - 1, 0);
    return { fio, appender: await this.#appender.wait(passLimitMs), passes };
  }
}

interface ServedExport {
  readonly name: string;
  readonly uris: readonly string[];
}

/** A backup that `stillblock backup begin` serves in the guest's foreground. */
class Backup {
  readonly #guest: Guest;
  readonly #command: GuestCommand;
  readonly #exports: readonly ServedExport[];

  private constructor(guest: Guest, command: GuestCommand, exports: readonly ServedExport[]) {
    this.#guest = guest;
    this.#command = command;
    this.#exports = exports;
  }

  static async begin(guest: Guest, checkpoint: string): Promise<Backup> {
    const command = guest.start(
      `exec ${cli} backup begin --json --checkpoint ${checkpoint} --store /srv/store --store-size ${storeBytes} -i 0.0.0.0 -p ${nbdPort} --insecure`,
    );
    const [line] = await command.waitForOutput(/^\{.*"event":"serving".*\}$/m, cliLimitMs);
    const serving = JSON.parse(line) as { exports: ServedExport[] };
    return new Backup(guest, command, serving.exports);
  }

  /** @returns the export's URI as the host reaches it. */
  uri(name: string): string {
    const served = this.#exports.find((candidate) => candidate.name === name);
    const uri = served?.uris.find((candidate) => candidate.startsWith('nbd://'));
    if (uri === undefined) {
      const names = this.#exports.map((candidate) => candidate.name).join(', ');
      throw new Error(`no export ${name} is served over TCP, only: ${names}`);
    }
    const url = new URL(uri);
    return `nbd://127.0.0.1:${this.#guest.hostPort(nbdPort)}${url.pathname}`;
  }

  /** @throws Error when the backup does not end as it should. */
  async end(): Promise<void> {
    await this.#guest.run(`${cli} backup end`, { timeoutMs: cliLimitMs });
    const { code, stdout, stderr } = await this.#command.wait(cliLimitMs);
    if (code !== 0 || !stdout.includes('"event":"ended"')) {
      throw new Error(`the backup ended with ${code}\n${stdout}${stderr}`);
    }
  }
}

const hashFile = async (path: string): Promise<string> =>
  (await runTool('sha256sum', [path])).stdout.slice(0, 64);

/** Reads a whole export and hashes it. */
async function hashExport(uri: string, folder: string): Promise<string> {
  const scratch = await mkdtemp(join(folder, 'hash-'));
  const raw = join(scratch, 'raw');
  await runTool('qemu-img', ['convert', '-f', 'raw', '-O', 'raw', uri, raw]);
  const hash = await hashFile(raw);
  await rm(scratch, { recursive: true });
  return hash;
}

const pullFull = (uri: string, file: string): Promise<unknown> =>
  runTool('qemu-img', ['convert', '-f', 'raw', '-O', 'qcow2', uri, file]);

const pullIncremental = (uri: string, file: string, backing: string): Promise<unknown> =>
  runTool('qemu-img', [
    ...['convert', '-f', 'raw', '-O', 'qcow2', '-B', backing, '-F', 'qcow2'],
    ...[uri, file],
  ]);

const toRaw = (image: string, raw: string): Promise<unknown> =>
  runTool('qemu-img', ['convert', '-O', 'raw', image, raw]);

/** @returns the bytes of data that the image itself holds, not its backing file. */
async function ownDataBytes(image: string): Promise<number> {
  const { stdout } = await runTool('qemu-img', ['map', '--output=json', image]);
  const map = JSON.parse(stdout) as { length: number; depth: number; data: boolean }[];
  return map
    .filter(({ depth, data }) => depth === 0 && data)
    .reduce((sum, { length }) => sum + length, 0);
}

/** @returns how many bytes, in whole units of 4 KiB, differ between two files. */
async function differingBytes(one: string, other: string): Promise<number> {
  const files = await Promise.all([open(one), open(other)]);
  const [a, b] = [Buffer.alloc(MiB), Buffer.alloc(MiB)];
  let differing = 0;
  try {
    for (let offset = 0; ; offset += MiB) {
      const [readA, readB] = await Promise.all([
        files[0].read(a, 0, MiB, offset),
        files[1].read(b, 0, MiB, offset),
      ]);
      if (readA.bytesRead !== readB.bytesRead) throw new Error('the images differ in size');
      const length = readA.bytesRead;
      if (length === 0) return differing;
      if (a.compare(b, 0, length, 0, length) === 0) continue;
      for (let at = 0; at < length; at += changeBytes) {
        const end = Math.min(at + changeBytes, length);
        if (a.compare(b, at, end, at, end) !== 0) differing += end - at;
      }
    }
  } finally {
    await Promise.all(files.map((file) => file.close()));
  }
}

interface Checked {
  readonly clean: boolean;
  /** How it was checked, and what the checker said if it complained. */
  readonly seen: string;
  /** Text of the image's numbered records. */
  readonly records: string;
}

/** e2fsck and the records of a pulled ext4 image; a dirty journal is replayed on a copy. */
async function checkExt4(raw: string): Promise<Checked> {
  const header = await runTool('dumpe2fs', ['-h', raw]);
  const dirty = header.stdout.includes('needs_recovery');
  const checked = dirty ? `${raw}.replayed` : raw;
  if (dirty) {
    await runTool('cp', ['--sparse=always', raw, checked]);
    await runTool('e2fsck', ['-E', 'journal_only', '-y', checked]);
  }
  const fsck = await runTool('e2fsck', ['-fn', checked], { check: false });
  const { stdout: records } = await runTool('debugfs', ['-R', 'cat records', checked]);
  return {
    clean: fsck.code === 0,
    seen: `${dirty ? 'journal replayed on a copy' : 'no replay needed'}${fsck.code === 0 ? '' : `: ${fsck.stdout}`}`,
    records,
  };
}

/**
 * xfs_repair and the records of a pulled XFS image. A frozen XFS keeps one record
 * in its log, so the guest's kernel replays it by mounting a copy.
 */
async function checkXfs(guest: Guest, name: string, raw: string): Promise<Checked> {
  const { stdout: log } = await runTool('xfs_logprint', ['-t', raw]);
  const dirty = !log.includes('<CLEAN>');
  const copy = `${raw}.replayed`;
  await runTool('cp', ['--sparse=always', raw, copy]);
  const device = await guest.plug(name, copy, 'raw', false);
  const { stdout: records } = await guest.run(
    `set -e; mkdir -p /run/${name}; mount -o nouuid ${device} /run/${name}
    cat /run/${name}/records; umount /run/${name}`,
  );
  await guest.unplug(name);
  const repair = await runTool('xfs_repair', ['-n', dirty ? copy : raw], { check: false });
  return {
    clean: repair.code === 0,
    seen: `${dirty ? 'log replayed on a copy' : 'no replay needed'}${repair.code === 0 ? '' : `: ${repair.stdout}${repair.stderr}`}`,
    records,
  };
}

/** Tries something that a bad image makes fail; the failure is what was seen. */
function attempt<T>(work: () => T): { value?: T; problem?: string } {
  try {
    return { value: work() };
  } catch (error) {
    return { problem: error instanceof Error ? error.message : String(error) };
  }
}

/** The images and measures of one origin. */
interface Pulled {
  readonly origin: Origin;
  readonly monday: string;
  readonly incremental: string;
  readonly tuesday: string;
  fullMs: number;
  incrementalMs: number;
  hashes: readonly string[];
}

const newPulled = (folder: string, origin: Origin): Pulled => ({
  origin,
  monday: join(folder, `${origin.name}-monday.qcow2`),
  incremental: join(folder, `${origin.name}-tuesday-incremental.qcow2`),
  tuesday: join(folder, `${origin.name}-tuesday.qcow2`),
  fullMs: 0,
  incrementalMs: 0,
  hashes: [],
});

/** The first snapshot: full images of both, and two readings of each under load. */
async function pullMonday(guest: Guest, pulled: readonly Pulled[], say: Progress): Promise<void> {
  const backup = await Backup.begin(guest, 'monday');
  say('snapshot monday is served; reading both images a first time');
  const hashAll = (): Promise<string[]> =>
    Promise.all(
      pulled.map(({ origin, monday }) => hashExport(backup.uri(origin.name), dirname(monday))),
    );
  const first = await hashAll();
  say('pulling both disks in full with qemu-img');
  await Promise.all(
    pulled.map(async (disk) => {
      disk.fullMs = (await timed(pullFull(backup.uri(disk.origin.name), disk.monday))).ms;
      say(`${disk.origin.name}: full image in ${seconds(disk.fullMs)}`);
    }),
  );
  say('reading both images a second time');
  const second = await hashAll();
  pulled.forEach((disk, index) => {
    disk.hashes = [first[index] ?? '', second[index] ?? ''];
  });
  await backup.end();
}

/** The second snapshot: incrementals on top of the first, and full images to compare. */
async function pullTuesday(guest: Guest, pulled: readonly Pulled[], say: Progress): Promise<void> {
  const backup = await Backup.begin(guest, 'tuesday');
  say('snapshot tuesday is served; pulling what changed since monday');
  await Promise.all(
    pulled.map(async (disk) => {
      const uri = backup.uri(`${disk.origin.name}@monday`);
      disk.incrementalMs = (await timed(pullIncremental(uri, disk.incremental, disk.monday))).ms;
      say(`${disk.origin.name}: incremental in ${seconds(disk.incrementalMs)}`);
    }),
  );
  say('pulling tuesday in full as well, to compare');
  await Promise.all(
    pulled.map(({ origin, tuesday }) => pullFull(backup.uri(origin.name), tuesday)),
  );
  await backup.end();
}

async function proveChains(pulled: readonly Pulled[]): Promise<Proof> {
  const results = await Promise.all(
    pulled.map(async ({ origin, incremental, tuesday }) => {
      const args = ['compare', '-f', 'qcow2', '-F', 'qcow2', incremental, tuesday];
      const { code, stdout, stderr } = await runTool('qemu-img', args, { check: false });
      return { same: code === 0, text: `${origin.name}: ${(stdout || stderr).trim()}` };
    }),
  );
  return {
    claim: "the incremental on monday's full image equals tuesday's full image (qemu-img compare)",
    holds: results.every(({ same }) => same),
    seen: results.map(({ text }) => text).join('\n'),
  };
}

/** Proofs 2 and 3, which both look into each image. */
async function proveContents(guest: Guest, pulled: readonly Pulled[]): Promise<Proof[]> {
  const fsckSeen: string[] = [];
  const recordsSeen: string[] = [];
  let clean = true;
  let oneInstant = true;
  for (const day of ['monday', 'tuesday'] as const) {
    const numbers: number[] = [];
    for (const disk of pulled) {
      // Tuesday is the chain: the incremental and the full image that it stands on.
      const image = `${day === 'monday' ? disk.monday : disk.incremental}.raw`;
      const checked =
        disk.origin.fileSystem === 'ext4'
          ? await checkExt4(image)
          : await checkXfs(guest, `xfs-${day}`, image);
      clean &&= checked.clean;
      fsckSeen.push(
        `${disk.origin.name} ${day}: ${checked.clean ? 'clean' : 'NOT CLEAN'}, ${checked.seen}`,
      );
      const { value, problem } = attempt(() => lastRecord(checked.records));
      if (value === undefined) oneInstant = false;
      numbers.push(value ?? Number.NaN);
      if (problem !== undefined) recordsSeen.push(`${disk.origin.name} ${day}: ${problem}`);
    }
    const [one = Number.NaN, other = Number.NaN] = numbers;
    // NaN, for records that are not right, is within nothing.
    oneInstant &&= Math.abs(one - other) <= 1 && Math.min(one, other) > 0;
    recordsSeen.push(`${day}: 1..${one} and 1..${other}`);
  }
  return [
    {
      claim: 'e2fsck -fn and xfs_repair -n find the pulled images clean',
      holds: clean,
      seen: fsckSeen.join('\n'),
    },
    {
      claim: 'the numbered records have no gap, and both disks are of one instant',
      holds: oneInstant,
      seen: recordsSeen.join('\n'),
    },
  ];
}

async function proveHashes(pulled: readonly Pulled[]): Promise<Proof> {
  const results = await Promise.all(
    pulled.map(async ({ origin, monday, hashes }) => {
      const all = [...hashes, await hashFile(`${monday}.raw`)];
      return {
        same: all.length === 3 && new Set(all).size === 1,
        text: `${origin.name}: ${[...new Set(all)].map((hash) => hash.slice(0, 16)).join(' is not ')}`,
      };
    }),
  );
  return {
    claim: 'an image read before, during and after the pull under load has one SHA-256',
    holds: results.every(({ same }) => same),
    seen: results.map(({ text }) => text).join('\n'),
  };
}

/** Stops everything in the guest and checks the origins themselves. */
async function proveOrigins(
  guest: Guest,
  applications: Applications,
  [ext4, xfs]: readonly [Origin, Origin],
): Promise<Proof> {
  const { fio, appender: appended, passes } = await applications.stop();
  const verified = fio.every(({ code }) => code === 0) && passes > 0;
  const records = await guest.run(`cat ${ext4.mountPoint}/records`);
  const { value: last, problem } = attempt(() => lastRecord(records.stdout));
  const whole = appended.code === 0 && last === Number(appended.stdout);
  await guest.run(
    `set -e; umount /srv/ext4; umount /srv/xfs; umount /srv/store
    ${cli} device detach ${ext4.device} ${xfs.device}
    rmmod stillblock`,
    { timeoutMs: 2 * cliLimitMs },
  );
  const [e2fsck, repair] = await Promise.all([
    guest.run(`e2fsck -fn ${ext4.device}`, { check: false }),
    guest.run(`xfs_repair -n ${xfs.device}`, { check: false }),
  ]);
  const clean = e2fsck.code === 0 && repair.code === 0;
  return {
    claim: "the origins' file systems are clean after it all, and every verification passed",
    holds: verified && whole && clean,
    seen: [
      `fio: ${passes} verified passes${verified ? '' : `, FAILED: ${fio.map(({ stderr }) => stderr).join('')}`}`,
      `records: 1..${last}${whole ? '' : ` FAILED: ${problem ?? appended.stderr}`}`,
      `file systems: ${clean ? 'clean' : `NOT CLEAN: ${e2fsck.stdout}${repair.stdout}${repair.stderr}`}`,
    ].join('\n'),
  };
}

async function measure(disk: Pulled): Promise<DiskReport> {
  const [info, fullBytes, incrementalBytes, changedBytes] = await Promise.all([
    runTool('qemu-img', ['info', '--output=json', disk.monday]),
    ownDataBytes(disk.monday),
    ownDataBytes(disk.incremental),
    differingBytes(`${disk.monday}.raw`, `${disk.incremental}.raw`),
  ]);
  const { 'virtual-size': sizeBytes } = JSON.parse(info.stdout) as { 'virtual-size': number };
  return {
    name: disk.origin.name,
    sizeBytes,
    fullBytes,
    fullMs: disk.fullMs,
    incrementalBytes,
    incrementalMs: disk.incrementalMs,
    changedBytes,
  };
}

/**
 * Runs the main job in a guest.
 * @throws Error when a step fails; a proof that does not hold is in the report.
 */
export async function runScenario(kernel: KernelName, say: Progress): Promise<ScenarioReport> {
  const started = performance.now();
  const folder = await mkdtemp(join(tmpdir(), 'stillblock-pulled-'));
  // Ctrl-C must not leave gigabytes of images behind; QEMU ends by itself.
  const removeNow = (): void => rmSync(folder, { recursive: true, force: true });
  process.once('exit', removeNow);
  let guest: Guest | undefined;
  try {
    guest = await bootGuest({ kernel, disks, hotplug: true, forwardPorts: [nbdPort] });
    const release = (await guest.run('uname -r')).stdout.trim();
    say(`booted ${release} (${guest.accelerator === 'kvm' ? 'KVM' : 'emulated: no KVM here'})`);
    await guest.loadModule();
    const origins = await prepareDisks(guest);
    const applications = new Applications(guest, origins);
    say('two file systems are mounted, three applications write to them');
    await guest.run(`${cli} device attach ${origins.map(({ device }) => device).join(' ')}`);
    say(`attached ${origins.map(({ device }) => device).join(' and ')}`);
    const pulled = origins.map((origin) => newPulled(folder, origin));
    await applications.progress();
    await pullMonday(guest, pulled, say);
    say('monday ended; the applications write on');
    await applications.progress();
    await pullTuesday(guest, pulled, say);
    say('tuesday ended; checking the images');
    for (const { monday, incremental } of pulled) {
      for (const image of [monday, incremental]) await toRaw(image, `${image}.raw`);
    }
    const origin = await proveOrigins(guest, applications, origins);
    const proofs = [
      await proveChains(pulled),
      ...(await proveContents(guest, pulled)),
      await proveHashes(pulled),
      origin,
    ];
    const reports: DiskReport[] = [];
    for (const disk of pulled) reports.push(await measure(disk));
    await guest.shutdown();
    return {
      kernel,
      release,
      accelerator: guest.accelerator,
      disks: reports,
      proofs,
      totalMs: performance.now() - started,
    };
  } finally {
    await guest?.kill();
    await rm(folder, { recursive: true, force: true });
    process.off('exit', removeNow);
  }
}
