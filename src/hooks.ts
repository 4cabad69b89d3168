// SPDX-License-Identifier: Apache-2.0
/**
 * Scripts that make applications ready for the instant of a snapshot, and release them
 * after it.
 *
 *     before a ─► before b ─► freeze, instant, thaw ─► after b ─► after a
 *         │           │               │                   ▲          ▲
 *         │           └── fails, late ┴── fails ──────────┘          │
 *         └── fails, late ────────────────────────────────────────────┘
 *
 * Whoever was asked to get ready is released, be it that it failed at that. A script
 * may leave a process behind that keeps a session open: its descriptor 3 is at its end
 * when the snapshot is taken, and also when we have died in whatever way. Nothing is
 * logged from the first script's end to the thaw: the log may be on a file system that
 * is frozen.
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { constants } from 'node:fs';
import { access, stat } from 'node:fs/promises';
import { env, getuid, kill } from 'node:process';
import type { Readable, Writable } from 'node:stream';
import type { Logger } from 'pino';
import { explain, StillblockError } from './errors.ts';

/** A script, called with `before` ahead of the freeze, and with `after` after the thaw. */
export interface Hook {
  /** For the log. */
  readonly name: string;
  /** Absolute path of an executable file. */
  readonly script: string;
  /** Of each call. */
  readonly timeoutMs: number;
}

/** What scripts are told, in `STILLBLOCK_…`. */
export interface HookContext {
  readonly checkpoint: string;
  readonly disks: readonly string[];
}

type Phase = 'before' | 'after';
/** What the after-scripts are told of the snapshot. */
type Outcome = 'taken' | 'failed';

/** Of what one call writes, the beginning is kept for the log, bytes. */
const MAX_OUTPUT_BYTES = 16 * 1024;
/** From SIGTERM to SIGKILL, milliseconds. */
const KILL_GRACE_MS = 2_000;
const DEFAULT_PATH = '/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin';
/** The descriptor that scripts can hold on to. */
const HOLD = 3;

/** The beginning of what a call writes; reading goes on so that it never blocks. */
class Output {
  readonly #kept: Buffer[] = [];
  #keptBytes = 0;
  #lostBytes = 0;

  add(data: Buffer): void {
    const part = data.subarray(0, MAX_OUTPUT_BYTES - this.#keptBytes);
    this.#kept.push(part);
    this.#keptBytes += part.length;
    this.#lostBytes += data.length - part.length;
  }

  get text(): string {
    const text = Buffer.concat(this.#kept).toString().trimEnd();
    return this.#lostBytes === 0 ? text : `${text}\n[${this.#lostBytes} more bytes]`;
  }
}

const LATE = Symbol('late');

/** Waits for something, no longer than a deadline or until a signal. */
async function within<T>(
  timeoutMs: number,
  promise: Promise<T>,
  signal?: AbortSignal,
): Promise<T | typeof LATE> {
  let stop = (): void => {};
  const late = new Promise<typeof LATE>((resolve) => {
    stop = () => resolve(LATE);
  });
  const timer = setTimeout(stop, timeoutMs);
  signal?.addEventListener('abort', stop);
  try {
    return await Promise.race([promise, late]);
  } finally {
    clearTimeout(timer);
    signal?.removeEventListener('abort', stop);
  }
}

/** @throws StillblockError unless the script is there, executable, and only root's to change */
async function requireScript({ name, script }: Hook): Promise<void> {
  const fail = (problem: string, advice: string): never => {
    throw new StillblockError('HOOK_UNUSABLE', `hook ${name}: ${script} ${problem}`, advice);
  };
  const status = await stat(script).catch((error: unknown) => {
    throw explain(error, `hook ${name}: ${script}`);
  });
  if (!status.isFile()) {
    fail('is not a file', 'name a script');
  }
  await access(script, constants.X_OK).catch(() =>
    fail('is not executable', 'run chmod +x for it'),
  );
  // We run it with all our rights.
  if ((status.mode & 0o022) !== 0 || (status.uid !== 0 && status.uid !== getuid?.())) {
    fail('can be changed by others', 'run chown root and chmod go-w for it');
  }
}

/** One call of a script. */
class Call {
  readonly #hook: Hook;
  readonly #phase: Phase;
  readonly #child: ChildProcess;
  readonly #output = new Output();
  readonly #begun = performance.now();

  constructor(hook: Hook, phase: Phase, environment: NodeJS.ProcessEnv) {
    this.#hook = hook;
    this.#phase = phase;
    this.#child = spawn(hook.script, [phase], {
      cwd: '/',
      env: environment,
      // A group of its own, so that it can be killed with all that it has started.
      detached: true,
      stdio: ['ignore', 'pipe', 'pipe', phase === 'before' ? 'pipe' : 'ignore'],
    });
    for (const stream of [this.#child.stdout, this.#child.stderr] as readonly Readable[]) {
      stream.on('data', (data: Buffer) => this.#output.add(data));
      stream.on('error', () => {});
    }
    // Whoever should read it may have gone.
    (this.#child.stdio[HOLD] as Writable | null)?.on('error', () => {});
  }

  #signal(signal: NodeJS.Signals): void {
    const { pid } = this.#child;
    try {
      if (pid !== undefined) {
        kill(-pid, signal);
      }
    } catch {
      // The group has gone.
    }
  }

  /** Kills all of its group: politely, then surely. */
  async #kill(gone: Promise<unknown>): Promise<void> {
    this.#signal('SIGTERM');
    await within(KILL_GRACE_MS, gone);
    this.#signal('SIGKILL');
  }

  /**
   * Waits for the script, not for what it left in the background.
   *
   * @throws StillblockError if it failed or was late; the reason of the signal if it is aborted
   */
  async done(signal: AbortSignal | undefined): Promise<void> {
    const { name, script, timeoutMs } = this.#hook;
    const ended = new Promise<string | undefined>((resolve, reject) => {
      this.#child.once('error', reject);
      this.#child.once('exit', (code, by) => {
        resolve(code === 0 ? undefined : (by ?? `exit code ${code}`));
      });
    });
    let failure: string | undefined | typeof LATE;
    try {
      failure = await within(timeoutMs, ended, signal);
    } catch (error) {
      throw explain(error, `hook ${name}: ${script}`);
    }
    if (failure === LATE) {
      await this.#kill(ended);
      signal?.throwIfAborted();
      throw new StillblockError(
        'HOOK_TIMEOUT',
        `hook ${name} took longer than ${timeoutMs / 1000} s with ${this.#phase}, and was killed`,
        `run ${script} ${this.#phase} by hand, or set a longer timeout`,
      );
    }
    if (failure !== undefined) {
      throw new StillblockError(
        'HOOK_FAILED',
        `hook ${name} failed with ${this.#phase}: ${failure}`,
        `look at its output in the log, or run ${script} ${this.#phase} by hand`,
      );
    }
  }

  /** Lets go of what waits for the end of descriptor 3. */
  release(): void {
    (this.#child.stdio[HOLD] as Writable | null)?.destroy();
  }

  /** Gives what it left in the background a last deadline, and ends it. */
  async finish(): Promise<void> {
    const open = [this.#child.stdout, this.#child.stderr].filter(
      (stream) => stream?.closed === false,
    );
    const closed = Promise.all(open.map((stream) => stream && once(stream, 'close')));
    if (open.length > 0 && (await within(this.#hook.timeoutMs, closed)) === LATE) {
      // Who holds its output is of its group, so that no stranger can have got its number.
      await this.#kill(closed);
      for (const stream of open) {
        stream?.destroy();
      }
    }
  }

  log(log: Logger, error: unknown): void {
    const facts = {
      hook: this.#hook.name,
      phase: this.#phase,
      ms: Math.round(performance.now() - this.#begun),
      output: this.#output.text,
    };
    if (error === undefined) {
      log.info(facts, 'hook');
    } else {
      log.warn({ ...facts, err: error }, 'hook failed');
    }
  }
}

function environmentOf(context: HookContext, outcome: Outcome | undefined): NodeJS.ProcessEnv {
  return {
    PATH: env['PATH'] ?? DEFAULT_PATH,
    HOME: env['HOME'] ?? '/root',
    LANG: env['LANG'] ?? 'C.UTF-8',
    STILLBLOCK_CHECKPOINT: context.checkpoint,
    STILLBLOCK_DISKS: context.disks.join(' '),
    ...(outcome === undefined ? {} : { STILLBLOCK_OUTCOME: outcome }),
  };
}

/** A hook whose before-script has been started, and what that came to. */
interface Begun {
  readonly hook: Hook;
  readonly call: Call;
  error: unknown;
}

/** Never throws: the snapshot is as good as it is, and the others have to be released. */
async function callAfter(
  { hook, call: before, error: beforeError }: Begun,
  environment: NodeJS.ProcessEnv,
  log: Logger,
): Promise<void> {
  before.release();
  const call = new Call(hook, 'after', environment);
  let error: unknown;
  try {
    await call.done(undefined);
  } catch (thrown) {
    error = thrown;
  }
  await Promise.all([before.finish(), call.finish()]);
  before.log(log, beforeError);
  call.log(log, error);
}

/**
 * Takes a snapshot with applications made ready.
 *
 * @param take takes it, and returns when file systems are thawed
 * @param signal ends before-scripts, and lets nothing be taken; after-scripts run all the same
 * @returns what `take` returns
 * @throws StillblockError if a before-script failed or was late; what `take` throws; the
 *   signal's reason
 */
export async function withHooks<T>(
  hooks: readonly Hook[],
  context: HookContext,
  log: Logger,
  take: () => Promise<T>,
  signal?: AbortSignal,
): Promise<T> {
  for (const hook of hooks) {
    await requireScript(hook);
  }
  const begun: Begun[] = [];
  let outcome: Outcome = 'failed';
  try {
    for (const hook of hooks) {
      signal?.throwIfAborted();
      const call = new Call(hook, 'before', environmentOf(context, undefined));
      const entry: Begun = { hook, call, error: undefined };
      begun.push(entry);
      try {
        await call.done(signal);
      } catch (error) {
        entry.error = error;
        throw error;
      }
    }
    signal?.throwIfAborted();
    const taken = await take();
    outcome = 'taken';
    return taken;
  } finally {
    for (const entry of begun.toReversed()) {
      await callAfter(entry, environmentOf(context, outcome), log);
    }
  }
}
