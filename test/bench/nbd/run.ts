// SPDX-License-Identifier: Apache-2.0
/**
 * Compares NBD servers: each workload with each server in turn, in each repetition, each
 * server started anew.
 *
 *     npm run bench:nbd                  prints the tables
 *     npm run bench:nbd -- --docs        writes them into docs/, with JSON and a picture
 *     npm run bench:nbd -- --help        fewer workloads and servers, less of each
 *
 * It needs nbdkit, qemu-nbd, nbd-server, nbdcopy, fio and openssl; root for the block device.
 * Nothing else should run meanwhile.
 */
import { execFileSync } from 'node:child_process';
import { closeSync, createReadStream, openSync, writeSync } from 'node:fs';
import { mkdtemp, open, readFile, rm, writeFile } from 'node:fs/promises';
import { cpus, totalmem } from 'node:os';
import { join } from 'node:path';
import { Command, InvalidArgumentError } from 'commander';
import { checkout } from '../../vm/checkout.ts';
import { markdown, type Report, svg } from './report.ts';
import { allServers, RunningServer, type ServerKind, servesTls } from './servers.ts';
import { type Figures, type Setting, WORKLOADS, type Workload } from './workloads.ts';

const MIB = 1 << 20;
const GIB = 2 ** 30;
const TIB = 2 ** 40;
/** The largest file that ext4 holds. */
const HUGE_BYTES = 16 * TIB - 4096;

function command(name: string, ...args: string[]): string {
  return execFileSync(name, args, { encoding: 'utf8', stdio: ['ignore', 'pipe', 'pipe'] }).trim();
}

function say(text: string): void {
  process.stderr.write(`${text}\n`);
}

async function randomFile(path: string, bytes: number): Promise<void> {
  const file = openSync(path, 'w');
  for await (const chunk of createReadStream('/dev/urandom', {
    end: bytes - 1,
    highWaterMark: MIB,
  })) {
    writeSync(file, chunk as Buffer);
  }
  closeSync(file);
}

/** 4 KiB of data in every 400 KiB. */
async function sparseFile(path: string): Promise<void> {
  const file = await open(path, 'w');
  await file.truncate(64 * GIB);
  const piece = Buffer.alloc(4096, 0xa5);
  for (let at = 0; at + 4096 <= 64 * GIB; at += 100 * 4096) {
    await file.write(piece, 0, piece.length, at);
  }
  await file.close();
}

/** One block of 64 KiB in 100, here and there. */
async function hugeDisk(path: string, dirty: string): Promise<void> {
  const file = await open(path, 'w');
  await file.truncate(HUGE_BYTES);
  await file.close();
  const list = await open(dirty, 'w');
  let text = '[';
  for (let at = 0, turn = 0; at < HUGE_BYTES - 65_536; turn += 1) {
    text += `${turn === 0 ? '' : ','}{"offset":${at},"length":65536}`;
    at += 65_536 * (50 + ((turn * 2_654_435_761) % 101));
    if (text.length > MIB) {
      await list.write(text);
      text = '';
    }
  }
  await list.write(`${text}]`);
  await list.close();
}

function makeCertificates(folder: string): void {
  const run = (...args: string[]): void => {
    execFileSync('openssl', args, { cwd: folder, stdio: 'ignore' });
  };
  const key = ['-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:P-256', '-nodes', '-days', '2'];
  run('req', '-x509', ...key, '-subj', '/CN=ca', '-keyout', 'ca-key.pem', '-out', 'ca-cert.pem');
  run(
    ...['req', '-x509', ...key, '-subj', '/CN=localhost', '-CA', 'ca-cert.pem'],
    ...['-CAkey', 'ca-key.pem', '-addext', 'subjectAltName=DNS:localhost,IP:127.0.0.1'],
    ...['-addext', 'basicConstraints=critical,CA:FALSE'],
    ...['-keyout', 'server-key.pem', '-out', 'server-cert.pem'],
  );
}

async function makeSetting(home: string, dataBytes: number, runSeconds: number): Promise<Setting> {
  const at = (name: string): string => join(home, name);
  await randomFile(at('data'), dataBytes);
  await sparseFile(at('sparse'));
  await hugeDisk(at('huge'), at('huge.json'));
  makeCertificates(home);
  command('sync');
  // Both are to be in the page cache, as far as there is room.
  command('sh', '-c', `cat '${at('data')}' >/dev/null`);
  let device: string | undefined;
  if (process.getuid?.() === 0) {
    device = command('losetup', '-f', '--show', '-r', '--direct-io=on', at('data'));
  } else {
    say('not root: no block device to measure');
  }
  return {
    data: at('data'),
    dataBytes,
    sparse: at('sparse'),
    huge: at('huge'),
    hugeDirty: at('huge.json'),
    device,
    certificates: home,
    runSeconds,
  };
}

async function measure(
  workload: Workload,
  kind: ServerKind,
  setting: Setting,
  home: string,
): Promise<Figures | undefined> {
  const job = workload.job(setting);
  if (job === undefined) {
    return undefined;
  }
  const server = await RunningServer.start(kind, { ...job, home });
  if (server === undefined) {
    return undefined;
  }
  try {
    await workload.prepare?.(setting);
    return await workload.run(server, setting);
  } finally {
    await server.stop();
  }
}

function median(values: readonly number[]): number {
  const sorted = values.toSorted((a, b) => a - b);
  const middle = Math.floor(sorted.length / 2);
  const [low = Number.NaN, high = Number.NaN] = [sorted[middle - 1], sorted[middle]];
  return sorted.length % 2 === 1 ? high : (low + high) / 2;
}

function medianFigures(all: readonly Figures[]): Figures {
  const names = Object.keys(all[0] ?? {});
  return Object.fromEntries(
    names.map((name) => [name, median(all.map((figures) => figures[name] ?? Number.NaN))]),
  );
}

function machine(): Record<string, string> {
  const first = (text: string): string => text.split('\n')[0] ?? '';
  return {
    date: new Date().toISOString().slice(0, 10),
    processors: `${cpus().length} × ${cpus()[0]?.model.trim() ?? 'unknown'}`,
    memory: `${Math.round(totalmem() / GIB)} GiB`,
    kernel: command('uname', '-r').replace(/-.*/, ''),
    node: process.version,
    nbdkit: first(command('nbdkit', '--version')).replace('nbdkit ', ''),
    qemu: first(command('qemu-nbd', '--version')).replace(/qemu-nbd (\S+).*/, '$1'),
    'nbd-server': command('nbd-server', '-V').replace(/.* /, ''),
  };
}

/** Rows that were not measured this time stay as they are in the documentation. */
async function withOlderRows(report: Report, docs: string): Promise<Report> {
  const old: Report = JSON.parse(await readFile(join(docs, 'benchmarks-nbd.json'), 'utf8'));
  return {
    ...report,
    medians: { ...old.medians, ...report.medians },
    values: { ...old.values, ...report.values },
  };
}

async function intoDocs(report: Report, docs: string): Promise<void> {
  await writeFile(join(docs, 'benchmarks-nbd.json'), `${JSON.stringify(report, null, 1)}\n`);
  await writeFile(join(docs, 'benchmarks-nbd.svg'), svg(report));
  const path = join(docs, 'benchmarks.md');
  const [begin, end] = ['<!-- bench:nbd begins -->', '<!-- bench:nbd ends -->'];
  const text = await readFile(path, 'utf8');
  const [before, after] = [text.indexOf(begin), text.indexOf(end)];
  if (before < 0 || after < before) {
    throw new Error(`${path} has no place for the tables`);
  }
  const tables = `${begin}\n${markdown(report)}\n`;
  await writeFile(path, text.slice(0, before) + tables + text.slice(after));
}

function positive(text: string): number {
  const value = Number(text);
  if (!(value > 0)) {
    throw new InvalidArgumentError('a number above 0');
  }
  return value;
}

interface Options {
  readonly docs: boolean;
  readonly docsFolder: string;
  readonly only: string;
  readonly servers: string;
  readonly repetitions: number;
  readonly seconds: number;
  readonly mebibytes: number;
  readonly output?: string;
}

const values = new Command('bench:nbd')
  .description('compares NBD servers, and prints tables')
  .option('--docs', 'writes the tables into docs/, with JSON and a picture', false)
  .option('--docs-folder <folder>', 'has --docs write there instead', join(checkout, 'docs'))
  .option('--only <words>', 'workloads that contain one of these words, such as random,tls', '')
  .option('--servers <words>', 'servers that contain one of these words', '')
  .option('--repetitions <count>', 'of each workload with each server', positive, 3)
  .option('--seconds <count>', 'how long random reads go on', positive, 2)
  .option('--mebibytes <count>', 'data that is copied', positive, 2048)
  .option('--output <path>', 'writes PATH.json and PATH.svg as well')
  .parse()
  .opts<Options>();
const chosen = (name: string, words: string): boolean =>
  words === '' || words.split(',').some((word) => name.includes(word));
const servers = (await allServers()).filter(({ id }) => chosen(id, values.servers));
const workloads = WORKLOADS.filter(({ id }) => chosen(id, values.only));
const tls = await servesTls();
const home = await mkdtemp('/var/tmp/stillblock-bench-');
const samples: Record<string, Record<string, Figures[]>> = {};
let setting: Setting | undefined;
try {
  say('making data');
  setting = await makeSetting(home, values.mebibytes * MIB, values.seconds);
  for (let repetition = 1; repetition <= values.repetitions; repetition += 1) {
    for (const workload of workloads) {
      for (const kind of servers) {
        if (kind.ours && !tls && workload.id.startsWith('tls')) {
          continue;
        }
        const figures = await measure(workload, kind, setting, home);
        if (figures !== undefined) {
          const text = Object.entries(figures).map(
            ([name, value]) => `${name} ${value.toFixed(3)}`,
          );
          say(`${repetition} ${workload.id} ${kind.id}: ${text.join(', ')}`);
          samples[workload.id] ??= {};
          const ofWorkload = samples[workload.id] ?? {};
          ofWorkload[kind.id] = [...(ofWorkload[kind.id] ?? []), figures];
        }
      }
    }
  }
} finally {
  if (setting?.device !== undefined) {
    command('losetup', '-d', setting.device);
  }
  await rm(home, { recursive: true, force: true });
}
const report: Report = {
  machine: machine(),
  repetitions: values.repetitions,
  servers: servers.map(({ id, label, ours }) => ({ id, label, ours })),
  medians: Object.fromEntries(
    Object.entries(samples).map(([workload, byServer]) => [
      workload,
      Object.fromEntries(
        Object.entries(byServer).map(([server, all]) => [server, medianFigures(all)]),
      ),
    ]),
  ),
  values: samples,
};
process.stdout.write(`${markdown(report)}\n`);
if (values.output !== undefined) {
  await writeFile(`${values.output}.json`, `${JSON.stringify(report, null, 1)}\n`);
  await writeFile(`${values.output}.svg`, svg(report));
}
if (values.docs) {
  const { docsFolder, only } = values;
  await intoDocs(only === '' ? report : await withOlderRows(report, docsFolder), docsFolder);
}
