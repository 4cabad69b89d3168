// SPDX-License-Identifier: Apache-2.0
/** What is measured: other people's clients against one server at a time. */
import { execFile, spawn } from 'node:child_process';
import { once } from 'node:events';
import { connect, type Socket } from 'node:net';
import { createInterface } from 'node:readline';
import { promisify } from 'node:util';
import { cpuSeconds, memoryBytes } from './processes.ts';
import { EXPORT, type Job, type RunningServer } from './servers.ts';

const execute = promisify(execFile);
const CLIENT_MS = 120_000;
const GIB = 2 ** 30;
const MIB = 1 << 20;

/** A figure by its name; see FIGURES of report.ts for the units. */
export type Figures = Readonly<Record<string, number>>;

/** What all measurements need. */
export interface Setting {
  /** Random data, in the page cache. */
  readonly data: string;
  readonly dataBytes: number;
  /** Mostly holes, with little pieces of data all over. */
  readonly sparse: string;
  /** 16 TiB, of which 1 % has changed, and where. */
  readonly huge: string;
  readonly hugeDirty: string;
  /** A block device with data, and how to make it cold. */
  readonly device: string | undefined;
  readonly certificates: string;
  readonly runSeconds: number;
}

/** One measurement. */
export interface Workload {
  readonly id: string;
  readonly title: string;
  /** What to serve; undefined if the setting has it not. */
  job(setting: Setting): Omit<Job, 'home'> | undefined;
  prepare?(setting: Setting): Promise<void>;
  run(server: RunningServer, setting: Setting): Promise<Figures>;
}

async function run(command: string, args: readonly string[]): Promise<string> {
  const { stdout } = await execute(command, args, { timeout: CLIENT_MS, maxBuffer: 64 << 20 });
  return stdout;
}

/** Time and the server's processor time of something. */
async function measured(
  server: RunningServer,
  act: () => Promise<void>,
): Promise<{ seconds: number; cpu: number }> {
  const cpu = cpuSeconds(server.pid);
  const began = performance.now();
  await act();
  const seconds = (performance.now() - began) / 1000;
  return { seconds, cpu: cpuSeconds(server.pid) - cpu };
}

async function copy(server: RunningServer, bytes: number, connections: number): Promise<Figures> {
  const { seconds, cpu } = await measured(server, async () => {
    await run('nbdcopy', [
      ...['--no-extents', `--connections=${connections}`, '--requests=64'],
      ...['--request-size=262144', server.uri, 'null:'],
    ]);
  });
  const gib = bytes / GIB;
  return { gibPerSecond: gib / seconds, cpuPerGib: cpu / gib };
}

interface FioJob {
  readonly jobs: readonly {
    readonly read: {
      readonly iops: number;
      readonly total_ios: number;
      readonly clat_ns: { readonly percentile?: Readonly<Record<string, number>> };
    };
  }[];
}

async function fio(
  server: RunningServer,
  setting: Setting,
  depth: number,
): Promise<FioJob['jobs'][number]['read']> {
  const text = await run('fio', [
    ...['--name=r', '--ioengine=nbd', `--uri=${server.uri}`, '--rw=randread', '--bs=4k'],
    ...[`--iodepth=${depth}`, `--runtime=${setting.runSeconds}`, '--time_based'],
    ...[`--size=${setting.dataBytes}`, '--output-format=json', '--randrepeat=1'],
  ]);
  // The NBD engine puts a word of its own in front of the report.
  const report = JSON.parse(text.slice(text.indexOf('{'))) as FioJob;
  const [job] = report.jobs;
  if (job === undefined) {
    throw new Error(`fio: ${text}`);
  }
  return job.read;
}

async function random(server: RunningServer, setting: Setting, depth: number): Promise<Figures> {
  let read = { iops: 0, total_ios: 0 };
  const { cpu } = await measured(server, async () => {
    read = await fio(server, setting, depth);
  });
  return { iops: read.iops, cpuMicroseconds: (cpu * 1e6) / Math.max(read.total_ios, 1) };
}

function sequential(transport: 'unix' | 'tcp', connections: number): Workload {
  const many = connections === 1 ? '1 connection' : `${connections} connections`;
  return {
    id: `sequential-${transport}-${connections}`,
    title: `Sequential, ${transport === 'tcp' ? 'TCP' : 'unix'}, ${many}`,
    job: ({ data }) => ({ path: data, transport }),
    run: (server, { dataBytes }) => copy(server, dataBytes, connections),
  };
}

function random4k(transport: 'unix' | 'tcp', depth: number): Workload {
  return {
    id: `random-${transport}-q${depth}`,
    title: `4 KiB random, ${transport === 'tcp' ? 'TCP' : 'unix'}, queue ${depth}`,
    job: ({ data }) => ({ path: data, transport }),
    run: (server, setting) => random(server, setting, depth),
  };
}

function encrypted(connections: number): Workload {
  const many = connections === 1 ? '1 connection' : `${connections} connections`;
  return {
    id: `tls-${connections}`,
    title: `Sequential, TLS over TCP, ${many}`,
    job: ({ data, certificates }) => ({ path: data, transport: 'tcp', tls: certificates }),
    run: (server, { dataBytes }) => copy(server, dataBytes, connections),
  };
}

/** Asks for a context all over, question after question; prints seconds of the first and of all. */
const ASK = `
import nbd, sys, time
context, questions, extents = sys.argv[2], 0, 0
h = nbd.NBD()
h.add_meta_context(context)
h.connect_uri(sys.argv[1])
if not h.can_meta_context(context):
    print("no")
    sys.exit(0)
size, offset, first = h.get_size(), 0, None
began = time.monotonic()
while offset < size:
    answer = []
    h.block_status(min((1 << 32) - 65536, size - offset), offset, lambda c, o, e, err: answer.extend(e))
    first = first or time.monotonic() - began
    offset += sum(answer[0::2])
    extents += len(answer) // 2
    questions += 1
print(first, time.monotonic() - began, questions, extents)
h.shutdown()
`;

async function ask(server: RunningServer, context: string): Promise<Figures> {
  let said = '';
  const { cpu } = await measured(server, async () => {
    said = await run('/usr/bin/python3', ['-c', ASK, server.uri, context]);
  });
  if (said.trim() === 'no') {
    return {};
  }
  const [first = 0, all = 0, , extents = 0] = said.trim().split(' ').map(Number);
  return { firstMs: first * 1000, mapSeconds: all, cpuSeconds: cpu, extents };
}

/** The bytes of a client up to GO; the export's name is what all servers know. */
function hello(): Buffer {
  const name = Buffer.from(EXPORT);
  const data = Buffer.alloc(4 + name.length + 2);
  data.writeUInt32BE(name.length, 0);
  name.copy(data, 4);
  const bytes = Buffer.alloc(4 + 16);
  bytes.writeUInt32BE(3, 0);
  bytes.write('IHAVEOPT', 4, 'latin1');
  bytes.writeUInt32BE(7, 12);
  bytes.writeUInt32BE(data.length, 16);
  return Buffer.concat([bytes, data]);
}

const IDLE = 500;

async function idle(server: RunningServer): Promise<Figures> {
  const before = memoryBytes(server.pid);
  const sockets: Socket[] = [];
  for (let count = 0; count < IDLE; count += 1) {
    const socket = connect(server.socket);
    sockets.push(socket);
    socket.write(hello());
    let received = 0;
    for await (const chunk of socket.iterator({ destroyOnReturn: false })) {
      received += (chunk as Buffer).length;
      // The greeting, INFO_EXPORT and the acknowledgement.
      if (received >= 18 + 32 + 20) {
        break;
      }
    }
  }
  const after = memoryBytes(server.pid);
  for (const socket of sockets) {
    socket.destroy();
  }
  return { kibPerConnection: (after - before) / IDLE / 1024, memoryMib: after / MIB };
}

/** Reads 32 MiB at a time, four at once, until its input ends; prints how many it has read. */
const STREAM = `
import nbd, select, sys
h = nbd.NBD()
h.connect_uri(sys.argv[1])
size, piece, at, done = h.get_size(), 32 << 20, 0, 0
flying = []
while not select.select([sys.stdin], [], [], 0)[0] or flying:
    while len(flying) < 4 and not select.select([sys.stdin], [], [], 0)[0]:
        buffer = nbd.Buffer(piece)
        flying.append((h.aio_pread(buffer, at), buffer))
        at = (at + piece) % size
        if done == 0 and len(flying) == 4:
            print("streaming", flush=True)
    h.poll(100)
    for cookie, buffer in list(flying):
        if h.aio_command_completed(cookie):
            flying.remove((cookie, buffer))
            done += 1
print(done)
h.shutdown()
`;

/** A small reader beside one that asks for 32 MiB at a time, over and over. */
async function fairness(server: RunningServer, setting: Setting): Promise<Figures> {
  const streamer = spawn('/usr/bin/python3', ['-c', STREAM, server.uri], {
    stdio: ['pipe', 'pipe', 'inherit'],
  });
  const ended = once(streamer, 'close');
  try {
    const lines = createInterface({ input: streamer.stdout })[Symbol.asyncIterator]();
    await lines.next();
    const began = performance.now();
    const read = await fio(server, setting, 1);
    const seconds = (performance.now() - began) / 1000;
    streamer.stdin.end();
    const streamed = (Number((await lines.next()).value) * 32 * MIB) / GIB;
    return {
      p99Ms: (read.clat_ns.percentile?.['99.000000'] ?? Number.NaN) / 1e6,
      iops: read.iops,
      streamerGibPerSecond: streamed / seconds,
    };
  } finally {
    streamer.kill('SIGKILL');
    await ended;
  }
}

/** How much of a block device is in the page cache, bytes, from mincore(2). */
const RESIDENT = `
import ctypes, mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
size = os.lseek(fd, 0, os.SEEK_END)
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
pages = (size + 4095) // 4096
vector = ctypes.create_string_buffer(pages)
assert libc.mincore(address, size, vector) == 0
print(sum(byte & 1 for byte in vector.raw[:pages]) * 4096)
`;

async function residentBytes(device: string): Promise<number> {
  return Number(await run('/usr/bin/python3', ['-c', RESIDENT, device]));
}

/** Throws everything out of the page cache that belongs to a device. */
async function makeCold({ device }: Setting): Promise<void> {
  if (device !== undefined) {
    await run('blockdev', ['--flushbufs', device]);
    if ((await residentBytes(device)) > MIB) {
      throw new Error(`${device} stays in the page cache`);
    }
  }
}

function cold(id: string, title: string, act: Workload['run']): Workload {
  return {
    id,
    title,
    job: ({ device }) => (device === undefined ? undefined : { path: device, transport: 'unix' }),
    prepare: makeCold,
    run: act,
  };
}

export const WORKLOADS: readonly Workload[] = [
  sequential('unix', 1),
  sequential('unix', 4),
  sequential('tcp', 1),
  sequential('tcp', 4),
  random4k('unix', 1),
  random4k('unix', 16),
  random4k('unix', 64),
  random4k('tcp', 64),
  {
    id: 'status-scattered',
    title: 'Block status of 64 GiB with data in 1 of 100 places',
    job: ({ sparse }) => ({ path: sparse, transport: 'unix' }),
    run: (server) => ask(server, 'base:allocation'),
  },
  {
    id: 'status-huge',
    title: 'Changes of 16 TiB, 1 % scattered',
    job: ({ huge, hugeDirty }) => ({ path: huge, transport: 'unix', dirty: hugeDirty }),
    run: async (server) => ({
      ...(await ask(server, 'qemu:dirty-bitmap:monday')),
      memoryMib: memoryBytes(server.pid) / MIB,
    }),
  },
  encrypted(1),
  encrypted(4),
  {
    id: 'idle',
    title: `${IDLE} idle connections`,
    job: ({ data }) => ({ path: data, transport: 'unix' }),
    run: idle,
  },
  {
    id: 'fairness',
    title: 'Small reader beside a 32 MiB streamer',
    job: ({ data }) => ({ path: data, transport: 'unix' }),
    run: fairness,
  },
  cold(
    'cold-sequential',
    'Cold block device, sequential, 1 connection',
    async (server, setting) => {
      const figures = await copy(server, setting.dataBytes, 1);
      const left = await residentBytes(setting.device ?? '');
      return { ...figures, cacheLeftMib: left / MIB };
    },
  ),
  cold('cold-random-q64', 'Cold block device, 4 KiB random, queue 64', (server, setting) =>
    random(server, setting, 64),
  ),
];
