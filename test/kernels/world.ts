// SPDX-License-Identifier: Apache-2.0
// What the tests of this folder share: the kernel they run on, the two tools
// that are compiled for the guest, and a backup that runs in it.

import { mkdir, rename, stat } from 'node:fs/promises';
import { join } from 'node:path';
import { nativeConstants } from '../../src/native.ts';
import { checkout, type KernelName, testKernel } from '../vm/checkout.ts';
import type { GuestCommand } from '../vm/command.ts';
import { cli } from '../vm/command-line.ts';
import type { Guest } from '../vm/guest.ts';
import { runTool } from '../vm/host.ts';
import { shellQuote } from '../vm/initrd.ts';

export const MiB: number = 1 << 20;

/** Node takes five seconds to start in an emulated guest that is alone. */
export const cliLimitMs = 300_000;

/** A hash of what it reads: an emulated processor makes some 12 MiB of SHA-256 a second. */
export const checksum: string = 'xxhsum -H64';

/** Longest time for anything else that a guest is asked. */
export const askLimitMs = 300_000;

/**
 * How long a writer rests after each write: the checkers' kernel takes several times as long
 * for one, and shall have time for something else, too.
 *
 * @param us microseconds on a stock kernel
 * @returns microseconds on the kernel of this run
 */
export function pace(us: number): number {
  return testKernel() === 'debug' ? 4 * us : us;
}

/**
 * Does the command line take part? It is the same on every kernel, and to start it costs
 * an emulated processor ten seconds. So it does on one kernel; elsewhere requests are made
 * by the program `ioctls`, in milliseconds. (vm/scenario runs it on each.)
 */
export const withProduct: boolean = testKernel() === '6.1';

type ToolName = 'oracle' | 'ioctls' | 'killer' | 'exerciser';

const building = new Map<ToolName, Promise<string>>();

/**
 * Compiles one of this folder's C programs, with warnings as errors.
 *
 * @returns its path, the same in the guest as here
 */
export function buildTool(name: ToolName): Promise<string> {
  const built = building.get(name) ?? compile(name);
  building.set(name, built);
  return built;
}

/** @returns the file of a kernel module of test/kernels/FOLDER, built for a kernel */
export async function buildKernelModule(folder: string, kernel: KernelName): Promise<string> {
  const output = join(checkout, `build/${folder}-${kernel}`);
  const script = join(checkout, 'scripts/build-module.sh');
  const sources = join(checkout, 'test/kernels', folder);
  await runTool('env', [
    ...[`STILLBLOCK_MODULE_SOURCES=${sources}`, `STILLBLOCK_MODULE_OUTPUT=${output}`],
    ...[script, kernel],
  ]);
  return join(output, `${folder.replaceAll('-', '_')}.ko`);
}

async function compile(name: ToolName): Promise<string> {
  const folder = join(checkout, 'build/kernels');
  const source = join(checkout, 'test/kernels', `${name}.c`);
  const uapi = join(checkout, 'module/uapi');
  const program = join(folder, name);
  await mkdir(folder, { recursive: true });
  const times = await Promise.all(
    [program, source, join(uapi, 'linux/stillblock.h')].map((path) =>
      stat(path).then(
        ({ mtimeMs }) => mtimeMs,
        () => 0,
      ),
    ),
  );
  const [built = 0, ...inputs] = times;
  if (built > Math.max(...inputs)) return program;
  // Another test file, a process of its own, may do the same at this moment.
  const fresh = `${program}.${process.pid}`;
  const flags = ['-O2', '-Wall', '-Wextra', '-Werror', '-pthread', '-I', uapi];
  // That one is a library, which is loaded before a program's own.
  if (name === 'killer') flags.push('-fPIC', '-shared');
  await runTool('gcc-12', [...flags, '-o', fresh, source]);
  await rename(fresh, program);
  return program;
}

/** A program in the guest that answers each line with a line. */
export class Conversation {
  readonly #command: GuestCommand;
  #asked = 0;
  #last: Promise<unknown> = Promise.resolve();

  /** @param program its path. */
  constructor(guest: Guest, program: string) {
    this.#command = guest.start(`exec ${shellQuote(program)}`);
  }

  /** @returns the answer, whatever it says */
  ask(line: string, limitMs: number = askLimitMs): Promise<string> {
    const answer = this.#last.then(async () => {
      this.#command.write(`${line}\n`);
      this.#asked += 1;
      const [all] = await this.#command.waitForOutput(
        new RegExp(`^(?:.*\\n){${this.#asked}}`),
        limitMs,
      );
      return all.split('\n')[this.#asked - 1] ?? '';
    });
    this.#last = answer.catch(() => {});
    return answer;
  }

  /**
   * @returns the words after "ok"
   * @throws Error with the answer if it is another one
   */
  async require(line: string, limitMs: number = askLimitMs): Promise<string[]> {
    const answer = await this.ask(line, limitMs);
    const [verdict, ...words] = answer.split(' ');
    if (verdict !== 'ok') throw new Error(`${line}: ${answer}`);
    return words;
  }

  /** Lets it end, and everything that it holds with it. */
  async end(): Promise<void> {
    this.#command.endInput();
    await this.#command.wait(askLimitMs);
  }

  /** Ends it as a crash would. */
  async kill(): Promise<void> {
    this.#command.kill(9);
    await this.#command.wait(askLimitMs);
  }
}

/** A request's failure, from "bad ERRNO REASON CULPRIT". */
export interface Refused {
  readonly errno: number;
  /** Name of the module's reason, such as `STORE_FULL`. */
  readonly reason: string;
  readonly culprit: number;
}

/** @returns the failure in an answer of the program `ioctls`, or undefined if it is none */
export function refusalIn(answer: string): Refused | undefined {
  const [, errno, reason, culprit] = /\bbad (\d+) (\d+) (\d+)$/.exec(answer) ?? [];
  if (errno === undefined) return undefined;
  return {
    errno: Number(errno),
    reason: reasonName(Number(reason)),
    culprit: Number(culprit),
  };
}

/** @returns the name of a reason of the module */
export function reasonName(reason: number): string {
  return nativeConstants().reasons[reason] ?? `reason ${reason}`;
}

/** One line of `backup begin --json`. */
export interface BackupEvent {
  readonly event: string;
  readonly reason?: string;
  readonly message?: string;
  readonly disks?: readonly { readonly name: string; readonly image: string }[];
}

/** What a backup said in its life, and how it ended. */
export interface BackupEnd {
  readonly code: number;
  readonly events: readonly BackupEvent[];
  readonly stderr: string;
}

/** `stillblock backup begin`, serving in the guest. */
export class Backup {
  /** Those that have not ended. */
  static readonly #live = new Set<Backup>();
  readonly socket: string;
  readonly #command: GuestCommand;
  readonly #disks: readonly { readonly name: string; readonly image: string }[];

  private constructor(socket: string, command: GuestCommand, serving: BackupEvent) {
    this.socket = socket;
    this.#command = command;
    this.#disks = serving.disks ?? [];
  }

  /** The command line that begins one, for a guest's shell. */
  static commandLine(checkpoint: string, args: string): string {
    return `${cli} backup begin --json --checkpoint ${checkpoint} -U /run/${checkpoint}.sock ${args}`;
  }

  /** @throws Error with its output if it does not come to serve */
  static async begin(guest: Guest, checkpoint: string, args: string): Promise<Backup> {
    const command = guest.start(`exec ${Backup.commandLine(checkpoint, args)}`);
    const [line] = await command.waitForOutput(/^\{.*"event":"serving".*\}$/m, cliLimitMs);
    const backup = new Backup(`/run/${checkpoint}.sock`, command, JSON.parse(line) as BackupEvent);
    Backup.#live.add(backup);
    return backup;
  }

  /** After a test that failed: the next one shall not find a backup running. */
  static async endAll(): Promise<void> {
    for (const backup of Backup.#live) await backup.end();
  }

  /** @returns the device node of a disk's image */
  image(name: string): string {
    const disk = this.#disks.find((candidate) => candidate.name === name);
    if (disk === undefined) throw new Error(`no image of ${name}`);
    return disk.image;
  }

  /** Waits until it says that its snapshot has failed. */
  async failed(limitMs: number = cliLimitMs): Promise<BackupEvent> {
    const [line] = await this.#command.waitForOutput(/^\{.*"event":"failed".*\}$/m, limitMs);
    return JSON.parse(line) as BackupEvent;
  }

  /** Waits for an event of a kind. */
  async told(event: string, limitMs: number = cliLimitMs): Promise<void> {
    await this.#command.waitForOutput(new RegExp(`"event":"${event}"`), limitMs);
  }

  /** Waits for its end, which something else has caused. */
  async ended(): Promise<BackupEnd> {
    Backup.#live.delete(this);
    const { code, stdout, stderr } = await this.#command.wait(cliLimitMs);
    const events = stdout
      .split('\n')
      .filter((line) => line.startsWith('{'))
      .map((line) => JSON.parse(line) as BackupEvent);
    return { code, events, stderr };
  }

  /** Ends it as Ctrl-C would. */
  async end(): Promise<BackupEnd> {
    this.#command.kill(2);
    return this.ended();
  }
}
