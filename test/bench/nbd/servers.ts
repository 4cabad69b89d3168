// SPDX-License-Identifier: Apache-2.0
/** The servers that are compared: each started anew for each measurement. */
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync } from 'node:fs';
import { readFile, rm, writeFile } from 'node:fs/promises';
import { connect, createServer } from 'node:net';
import { join } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { CLI } from '../../program.ts';

const START_MS = 60_000;
/** What every server calls what it serves. */
export const EXPORT = 'disk';

/** What a server is to serve, and where. */
export interface Job {
  /** A folder for sockets and configuration. */
  readonly home: string;
  /** A file or a block device. */
  readonly path: string;
  readonly transport: 'unix' | 'tcp';
  /** Folder with certificates in libnbd's names: serve in TLS alone. */
  readonly tls?: string;
  /** Changes to be offered as context of a checkpoint, a file in JSON. */
  readonly dirty?: string;
}

interface Listening {
  readonly socket: string;
  readonly port: number;
}

/** How to run one kind of server. */
export interface ServerKind {
  readonly id: string;
  readonly label: string;
  readonly ours: boolean;
  /** The command; undefined if it can't do the job. */
  command(job: Job, listening: Listening): Promise<readonly string[] | undefined>;
  /** File in which a server that forks away writes the id of the process that stays. */
  readonly pidFile?: string;
}

const PID_FILE = 'server.pid';

const nbdkit: ServerKind = {
  id: 'nbdkit',
  label: 'nbdkit file',
  ours: false,
  command: async ({ path, transport, tls, dirty }, { socket, port }) =>
    dirty !== undefined
      ? undefined
      : [
          ...['nbdkit', '-f', '-r'],
          ...(transport === 'unix' ? ['-U', socket] : ['-i', '127.0.0.1', '-p', String(port)]),
          ...(tls === undefined ? [] : ['--tls=require', `--tls-certificates=${tls}`]),
          ...['file', path],
        ],
};

const qemuNbd: ServerKind = {
  id: 'qemu-nbd',
  label: 'qemu-nbd io_uring',
  ours: false,
  command: async ({ path, transport, tls, dirty }, { socket, port }) =>
    dirty !== undefined
      ? undefined
      : [
          ...['qemu-nbd', '-r', '-t', '-e', '1024', '-x', EXPORT, '-f', 'raw', '--aio=io_uring'],
          ...(transport === 'unix' ? ['-k', socket] : ['-b', '127.0.0.1', '-p', String(port)]),
          ...(tls === undefined
            ? []
            : [
                ...['--object', `tls-creds-x509,id=tls,endpoint=server,verify-peer=off,dir=${tls}`],
                ...['--tls-creds', 'tls'],
              ]),
          path,
        ],
};

const nbdServer: ServerKind = {
  id: 'nbd-server',
  label: 'nbd-server',
  ours: false,
  pidFile: PID_FILE,
  command: async ({ home, path, transport, tls, dirty }, { socket, port }) => {
    // It serves TLS only to clients with a certificate, and a block device as empty.
    if (dirty !== undefined || tls !== undefined || path.startsWith('/dev/')) {
      return undefined;
    }
    const where =
      transport === 'unix' ? `unixsock = ${socket}` : `listenaddr = 127.0.0.1\nport = ${port}`;
    const configuration = join(home, 'nbd-server.conf');
    await writeFile(
      configuration,
      `[generic]\n${where}\n[${EXPORT}]\nexportname = ${path}\nreadonly = true\n`,
    );
    return ['nbd-server', '-C', configuration, '-p', join(home, PID_FILE), '-M', '1024'];
  },
};

/** One of our own engines, or the one that the command chooses. */
function stillblock(engine: string | undefined): ServerKind {
  return {
    id: `stillblock${engine === undefined ? '' : `-${engine}`}`,
    label: `stillblock${engine === undefined ? '' : `, ${engine}`}`,
    ours: true,
    command: async ({ path, transport, tls, dirty }, { socket, port }) => [
      ...[process.execPath, CLI, 'nbd', '--json', '--export', `${EXPORT}=${path}`],
      ...(engine === undefined ? [] : [`--engine=${engine}`]),
      ...(transport === 'unix' ? ['-U', socket] : ['-p', String(port)]),
      ...(tls === undefined ? [] : ['--tls=require', `--tls-certificates=${tls}`]),
      ...(dirty === undefined ? [] : ['--dirty', `${EXPORT}:monday=${dirty}`]),
    ],
  };
}

async function helpOf(command: readonly string[]): Promise<string> {
  const child = spawn(command[0] ?? '', command.slice(1), { stdio: ['ignore', 'pipe', 'ignore'] });
  let text = '';
  child.stdout.on('data', (chunk: Buffer) => {
    text += chunk.toString();
  });
  await once(child, 'close');
  return text;
}

/** All servers, our own as far as this checkout has them. */
export async function allServers(): Promise<readonly ServerKind[]> {
  const help = await helpOf([process.execPath, CLI, 'nbd', '--help']);
  const own = help.includes('--engine') ? ['native', 'typescript'] : [undefined];
  return [nbdkit, qemuNbd, nbdServer, ...own.map(stillblock)];
}

/** Whether our own command serves TLS. */
export async function servesTls(): Promise<boolean> {
  return (await helpOf([process.execPath, CLI, 'nbd', '--help'])).includes('--tls-certificates');
}

async function freePort(): Promise<number> {
  const server = createServer().listen(0, '127.0.0.1');
  await once(server, 'listening');
  const address = server.address();
  server.close();
  await once(server, 'close');
  return typeof address === 'object' && address !== null ? address.port : 0;
}

function answers(address: { path: string } | { host: string; port: number }): Promise<boolean> {
  return new Promise((resolve) => {
    const socket = connect(address);
    socket.once('data', () => {
      socket.destroy();
      resolve(true);
    });
    socket.once('error', () => resolve(false));
    socket.once('close', () => resolve(false));
  });
}

/** A server that runs. */
export class RunningServer {
  readonly pid: number;
  readonly socket: string;
  readonly port: number;
  /** What a client of libnbd is told. */
  readonly uri: string;
  readonly #child: ChildProcess;
  readonly #forked: boolean;

  private constructor(child: ChildProcess, pid: number, { socket, port }: Listening, job: Job) {
    this.#child = child;
    this.#forked = pid !== child.pid;
    this.pid = pid;
    this.socket = socket;
    this.port = port;
    const scheme = job.tls === undefined ? 'nbd' : 'nbds';
    const certificates = job.tls === undefined ? '' : `tls-certificates=${job.tls}`;
    this.uri =
      job.transport === 'unix'
        ? `${scheme}+unix:///${EXPORT}?socket=${socket}${certificates && `&${certificates}`}`
        : `${scheme}://localhost:${port}/${EXPORT}${certificates && `?${certificates}`}`;
  }

  /** Starts a server. Returns undefined if this kind can't do the job. */
  static async start(kind: ServerKind, job: Job): Promise<RunningServer | undefined> {
    const listening = { socket: join(job.home, 'server.sock'), port: await freePort() };
    await rm(listening.socket, { force: true });
    const pidFile = kind.pidFile === undefined ? undefined : join(job.home, kind.pidFile);
    if (pidFile !== undefined) {
      await rm(pidFile, { force: true });
    }
    const command = await kind.command(job, listening);
    if (command === undefined) {
      return undefined;
    }
    const child = spawn(command[0] ?? '', command.slice(1), {
      stdio: ['ignore', 'ignore', 'pipe'],
    });
    let errors = '';
    child.stderr.on('data', (chunk: Buffer) => {
      errors = (errors + chunk.toString()).slice(-2000);
    });
    const address =
      job.transport === 'unix'
        ? { path: listening.socket }
        : { host: '127.0.0.1', port: listening.port };
    const limit = performance.now() + START_MS;
    while (!(await answers(address))) {
      const ended = child.exitCode !== null && pidFile === undefined;
      if (ended || performance.now() > limit) {
        child.kill('SIGKILL');
        throw new Error(`${kind.label} does not begin: ${command.join(' ')}\n${errors}`);
      }
      await delay(10);
    }
    let pid = child.pid ?? 0;
    if (pidFile !== undefined) {
      while (!existsSync(pidFile) || (await readFile(pidFile, 'utf8')).trim() === '') {
        await delay(10);
      }
      pid = Number(await readFile(pidFile, 'utf8'));
    }
    return new RunningServer(child, pid, listening, job);
  }

  async stop(): Promise<void> {
    if (this.#forked) {
      process.kill(this.pid, 'SIGTERM');
      while (existsSync(`/proc/${this.pid}/exe`)) {
        await delay(10);
      }
      return;
    }
    if (this.#child.exitCode === null && this.#child.signalCode === null) {
      const ended = once(this.#child, 'close');
      this.#child.kill('SIGTERM');
      const late = setTimeout(() => this.#child.kill('SIGKILL'), 10_000);
      await ended;
      clearTimeout(late);
    }
  }
}
