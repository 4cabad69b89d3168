// SPDX-License-Identifier: Apache-2.0
/** Stock qemu-img: run under watch, its progress read, its failures translated. */
import { spawn } from 'node:child_process';
import { readFile, stat } from 'node:fs/promises';
import { env } from 'node:process';
import { StillblockError } from './errors.ts';

/** How a run is watched. */
export interface QemuImgOptions {
  /** Where it runs: names of images are relative to it. */
  readonly cwd: string;
  /** Kills it. */
  readonly signal: AbortSignal;
  /** Without a sign of life for so long it is killed: the network is cut, milliseconds. */
  readonly stallMs: number;
  /** What it writes to, whose growth is a sign of life, too. */
  readonly target?: string;
  /** @param fraction 0 to 1, of what it has to do */
  onProgress?(fraction: number): void;
}

/** A run that failed. */
export class QemuImgError extends Error {
  override readonly name = 'QemuImgError';
  readonly command: string;
  readonly exitCode: number | null;
  readonly stalled: boolean;
  /** Last of what it said. */
  readonly output: string;

  constructor(command: string, exitCode: number | null, output: string, stalled: boolean) {
    super(output.trim().split('\n').at(-1) || `qemu-img ${command} failed`);
    this.command = command;
    this.exitCode = exitCode;
    this.output = output;
    this.stalled = stalled;
  }
}

/** Whether `qemu-img compare` found a difference, rather than that it could not compare. */
export function isDifference(error: unknown): boolean {
  return (
    error instanceof QemuImgError &&
    error.command === 'compare' &&
    error.exitCode === 1 &&
    !error.stalled
  );
}

const WATCH_MS = 500;
/** Enough for its complaint. */
const OUTPUT_CHARACTERS = 16_384;

/** Anything that moves while a process works: its processor time, and what it has written. */
async function signOfLife(pid: number, target: string | undefined): Promise<string> {
  const status = await readFile(`/proc/${pid}/stat`, 'utf8').catch(() => '');
  // After the name, which may contain anything: utime and stime are fields 14 and 15.
  const fields = status.slice(status.lastIndexOf(')') + 2).split(' ');
  const written = target === undefined ? undefined : await stat(target).catch(() => undefined);
  return `${fields[11]} ${fields[12]} ${written?.blocks}`;
}

/**
 * Runs qemu-img to its end. It dies with this process, however that ends.
 *
 * @returns what it wrote to stdout, without its progress
 * @throws QemuImgError if it failed, StillblockError `NO_QEMU_IMG` if it is not there, the
 *   signal's reason if that ended it
 */
export async function qemuImg(args: readonly string[], options: QemuImgOptions): Promise<string> {
  options.signal.throwIfAborted();
  // Without setpriv a killed pull would leave it reading, and the snapshot in use.
  const child = spawn('setpriv', ['--pdeathsig', 'KILL', 'qemu-img', ...args], {
    cwd: options.cwd,
    env: { ...env, LC_ALL: 'C' },
    stdio: ['ignore', 'pipe', 'pipe'],
  });
  let stalled = false;
  const kill = (): void => {
    child.kill('SIGKILL');
  };
  options.signal.addEventListener('abort', kill);
  let life = '';
  let lastMs = performance.now();
  const watch = setInterval(async () => {
    const now = await signOfLife(child.pid ?? 0, options.target);
    if (now !== life) {
      life = now;
      lastMs = performance.now();
    } else if (performance.now() - lastMs > options.stallMs) {
      stalled = true;
      kill();
    }
  }, WATCH_MS);
  try {
    return await new Promise<string>((resolve, reject) => {
      let stdout = '';
      let stderr = '';
      child.stdout.setEncoding('utf8').on('data', (piece: string) => {
        const progress = [...piece.matchAll(/\((\d+\.\d+)\/100%\)/g)].at(-1)?.[1];
        if (progress !== undefined) {
          options.onProgress?.(Number(progress) / 100);
        }
        stdout += piece.replaceAll(/\s*\(\d+\.\d+\/100%\)\r?/g, '');
      });
      child.stderr.setEncoding('utf8').on('data', (piece: string) => {
        stderr = (stderr + piece).slice(-OUTPUT_CHARACTERS);
      });
      child.once('error', (cause) =>
        reject(
          new StillblockError('NO_QEMU_IMG', 'setpriv cannot be run', 'install util-linux', {
            cause,
          }),
        ),
      );
      child.once('close', (code) => {
        if (code === 0) {
          resolve(stdout);
        } else if (options.signal.aborted) {
          reject(options.signal.reason);
        } else if (code === 127) {
          reject(
            new StillblockError(
              'NO_QEMU_IMG',
              'there is no qemu-img',
              'install qemu-utils, on some systems qemu-img',
            ),
          );
        } else {
          reject(new QemuImgError(args[0] ?? '', code, stderr, stalled));
        }
      });
    });
  } finally {
    clearInterval(watch);
    options.signal.removeEventListener('abort', kill);
  }
}

interface Meaning {
  readonly says: RegExp;
  readonly code: string;
  readonly message: string;
  readonly advice: string;
}

/** What qemu-img's complaints mean, the more telling ones first. `{what}` is what it was about. */
const MEANINGS: readonly Meaning[] = [
  {
    says: /No space left on device|Disk quota exceeded/,
    code: 'ENOSPC',
    message: '{what}: no room left',
    advice: 'free some room, or choose another place',
  },
  {
    says: /requested export not available|Export '.*' not present|export .* not (found|present)/i,
    code: 'NO_EXPORT',
    message: '{what} is not served',
    advice: 'look at what is, with nbdinfo --list, and whether its snapshot was ended',
  },
  {
    says: /certificate|TLS|gnutls|handshake failed/i,
    code: 'TLS_FAILED',
    message: '{what}: the server and we do not agree on TLS',
    advice:
      'look whether the certificates are of the same CA, not expired, and name the server as it is called here',
  },
  {
    says: /Failed to connect|Connection refused|No route to host|timed out|address resolution failed|Network is unreachable|Name or service not known|No such file or directory/,
    code: 'NO_SERVER',
    message: '{what} does not answer',
    advice: 'look whether the server runs there, and whether a firewall is between',
  },
];

/** Translates a failure of qemu-img, from or to one thing. */
export function explainQemuImg(error: unknown, what: string): unknown {
  if (!(error instanceof QemuImgError)) {
    return error;
  }
  if (error.stalled) {
    return new StillblockError(
      'STALLED',
      `${what}: nothing has moved for too long`,
      'look whether the network or the server hangs; --timeout sets how long to wait',
      { cause: error },
    );
  }
  const meaning = MEANINGS.find(({ says }) => says.test(error.output));
  if (meaning === undefined) {
    return new StillblockError(
      'QEMU_IMG',
      `${what}: ${error.message.replace(/^qemu-img: /, '')}`,
      'look at what qemu-img says',
      { cause: error },
    );
  }
  const { code, message, advice } = meaning;
  return new StillblockError(code, message.replaceAll('{what}', what), advice, { cause: error });
}
