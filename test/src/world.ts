// SPDX-License-Identifier: Apache-2.0
/** What each test builds for itself: folders, fake sysfs, the program run as users run it. */
import { execFile } from 'node:child_process';
import { mkdir, mkdtemp, rm, symlink, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import type { ExecutionContext } from 'ava';
import type { Folders } from '../../src/folders.ts';
import { CLI } from '../program.ts';

/** How long a command may take, milliseconds. Some sixty start at once, and not alone on the machine. */
const COMMAND_MS = 120_000;

/** A folder of the test's own, gone after it. */
export async function folder(t: ExecutionContext): Promise<string> {
  const path = await mkdtemp(join(tmpdir(), 'stillblock-'));
  t.teardown(() => rm(path, { recursive: true, force: true }));
  return path;
}

/** Folders of an installation of the test's own; not made yet. */
export async function installation(t: ExecutionContext): Promise<Folders> {
  const path = await folder(t);
  return { run: join(path, 'run'), state: join(path, 'state') };
}

/** A block device of a fake sysfs. */
export interface FakeDevice {
  /** Its folder below `devices`, such as `virtual/block/dm-0` or `pci/vda/vda1`. */
  readonly path: string;
  readonly number: string;
  readonly sectors: number;
  readonly devName?: string;
  readonly dmName?: string;
  /** Paths of the devices that it consists of. */
  readonly slaves?: readonly string[];
  readonly partition?: number;
  readonly backingFile?: string;
  /** It passes requests on, and so has a hardware queue. */
  readonly queue?: boolean;
}

/** Makes a sysfs of real folders and links, laid out as the kernel's is. */
export async function fakeSysfs(
  t: ExecutionContext,
  devices: readonly FakeDevice[],
): Promise<string> {
  const root = await folder(t);
  await mkdir(join(root, 'dev/block'), { recursive: true });
  for (const device of devices) {
    const path = join(root, 'devices', device.path);
    const name = device.devName ?? device.path.replace(/^.*\//, '');
    const files: Record<string, string | undefined> = {
      dev: device.number,
      size: String(device.sectors),
      uevent: `MAJOR=1\nDEVNAME=${name}\nDEVTYPE=disk`,
      partition: device.partition?.toString(),
      'dm/name': device.dmName,
      'loop/backing_file': device.backingFile,
    };
    for (const [file, text] of Object.entries(files)) {
      if (text === undefined) {
        continue;
      }
      await mkdir(dirname(join(path, file)), { recursive: true });
      await writeFile(join(path, file), `${text}\n`);
    }
    await mkdir(join(path, 'slaves'), { recursive: true });
    if (device.queue === true) {
      await mkdir(join(path, 'mq/0'), { recursive: true });
    }
    for (const slave of device.slaves ?? []) {
      await symlink(join(root, 'devices', slave), join(path, 'slaves', slave.replace(/^.*\//, '')));
    }
    await symlink(`../../devices/${device.path}`, join(root, 'dev/block', device.number));
  }
  return root;
}

/** What a run of the program came to. */
export interface Result {
  readonly code: number;
  readonly stdout: string;
  readonly stderr: string;
}

/** Programs of one test file that run side by side: all at once would starve each other. */
const MAX_RUNNING = 4;
let running = 0;
const waiting: (() => void)[] = [];

async function whenMyTurn(): Promise<() => void> {
  if (running >= MAX_RUNNING) {
    await new Promise<void>((resolve) => waiting.push(resolve));
  } else {
    running += 1;
  }
  // Who is next takes over this one's place.
  return () => {
    const next = waiting.shift();
    if (next === undefined) {
      running -= 1;
    } else {
      next();
    }
  };
}

/** Runs the program with state of the test's own. */
export async function stillblock(folders: Folders, ...args: readonly string[]): Promise<Result> {
  const done = await whenMyTurn();
  try {
    return await run(folders, args);
  } finally {
    done();
  }
}

function run(folders: Folders, args: readonly string[]): Promise<Result> {
  return new Promise((resolve) => {
    const env = {
      ...process.env,
      STILLBLOCK_RUN_DIR: folders.run,
      STILLBLOCK_STATE_DIR: folders.state,
    };
    execFile(
      process.execPath,
      [CLI, ...args],
      { env, timeout: COMMAND_MS },
      (error, stdout, stderr) => {
        // A number unless a signal ended it.
        const code = error === null ? 0 : typeof error.code === 'number' ? error.code : -1;
        resolve({ code, stdout, stderr });
      },
    );
  });
}
