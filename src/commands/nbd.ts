// SPDX-License-Identifier: Apache-2.0
/** `stillblock nbd`: serves plain files and block devices, without root and without the module. */
import { readFile, stat } from 'node:fs/promises';
import { env, pid } from 'node:process';
import { type Command, Option } from 'commander';
import type { Logger } from 'pino';
import type { Bandwidth } from '../../nbd/bandwidth.ts';
import {
  DIRTY_BITMAP_PREFIX,
  NBD_DEFAULT_PORT,
  NBD_MAX_STRING_BYTES,
  NBD_STATE_DIRTY,
} from '../../nbd/constants.ts';
import { errorCode } from '../../nbd/errors.ts';
import {
  type BlockSource,
  diskExports,
  type Export,
  type ForgetCached,
  openFileSource,
} from '../../nbd/export.ts';
import { type Extent, ExtentMap } from '../../nbd/extents.ts';
import { type InheritedSocket, type ListenAddress, NbdServer } from '../../nbd/server.ts';
import { type NamedSocket, takeInheritedSockets } from '../activation.ts';
import { requireCheckpointName } from '../checkpoints.ts';
import { chooseEngine, ENGINES, type EngineChoice } from '../engine.ts';
import { explain, StillblockError, usageError } from '../errors.ts';
import { ExtentsJsonError, parseExtents } from '../extents-json.ts';
import { beGentle } from '../gentle.ts';
import { fileAllocation } from '../holes.ts';
import { DEFAULT_HOST, explainListen, type ListenOptions, planAddresses } from '../listen.ts';
import { makeLog } from '../log.ts';
import { METRICS_HELP, type MetricsServer, planMetrics, startMetrics } from '../metrics.ts';
import { formatTable, printJson, printLine } from '../output.ts';
import { MAX_RATE_HELP, planRates, RateCaps, type Rates } from '../rates.ts';
import { formatSize } from '../sizes.ts';
import {
  addTlsOptions,
  planTls,
  reportReload,
  Security,
  TLS_HELP,
  type TlsOptions,
  type TlsPlan,
} from '../tls.ts';
import { type CommonOptions, collect, newCommand } from './common.ts';

/** Some seven million ranges: more changes than a backup of changes is good for. */
const EXTENTS_FILE_BYTES = 256 * 1024 * 1024;

/** The options as commander hands them over. */
export interface NbdOptions extends CommonOptions, ListenOptions, TlsOptions {
  readonly export?: readonly string[];
  readonly dirty?: readonly string[];
  readonly maxRate?: readonly string[];
  readonly metrics?: string;
  readonly engine?: EngineChoice;
}

interface PlannedCheckpoint {
  readonly name: string;
  readonly path: string;
}

interface PlannedDisk {
  readonly name: string;
  readonly path: string;
  readonly checkpoints: readonly PlannedCheckpoint[];
}

/** What the options ask for, with nothing wrong in it that can be known from them. */
export interface NbdPlan {
  readonly addresses: readonly (ListenAddress | InheritedSocket)[];
  readonly tls: TlsPlan;
  readonly disks: readonly PlannedDisk[];
  readonly rates: Rates;
  readonly metrics: ListenAddress | undefined;
}

/** Quotes a word of the command line, so that an empty or odd one is seen. */
function quote(text: string): string {
  return text.length > 80 ? `${JSON.stringify(text.slice(0, 80))}...` : JSON.stringify(text);
}

/** Splits `WHAT=PATH` at its first equals sign. */
function splitAssignment(option: string, text: string, form: string): [string, string] {
  const equals = text.indexOf('=');
  if (equals < 0 || equals === text.length - 1) {
    throw usageError(`${option} ${quote(text)} is not ${form}`, `write it as ${option} ${form}`);
  }
  return [text.slice(0, equals), text.slice(equals + 1)];
}

function requireExportName(what: string, name: string): void {
  // Node puts U+FFFD where an argument is not UTF-8, and so hides which bytes were meant.
  if (name.includes('\uFFFD')) {
    throw usageError(`${what}: the export's name is not valid UTF-8`, 'choose another');
  }
  if (Buffer.byteLength(name) > NBD_MAX_STRING_BYTES) {
    throw usageError(
      `${what}: the export's name is longer than ${NBD_MAX_STRING_BYTES} bytes`,
      'choose a shorter one',
    );
  }
}

type DisksByName = Map<string, { path: string; checkpoints: PlannedCheckpoint[] }>;

function planDirty(disks: DisksByName, text: string): void {
  const what = `--dirty ${quote(text)}`;
  const form = 'NAME:CHECKPOINT=EXTENTS.json';
  const [target, path] = splitAssignment('--dirty', text, form);
  // A checkpoint's name has no colon, an export's may have.
  const colon = target.lastIndexOf(':');
  if (colon < 0) {
    throw usageError(`${what} is not ${form}`, `write it as --dirty ${form}`);
  }
  const name = target.slice(0, colon);
  const checkpoint = target.slice(colon + 1);
  const disk = disks.get(name);
  if (disk === undefined) {
    throw usageError(`${what}: there is no export ${quote(name)}`, 'add it with --export');
  }
  requireCheckpointName(checkpoint);
  if (disk.checkpoints.some((other) => other.name === checkpoint)) {
    throw usageError(`${what}: the checkpoint is given twice`, 'give each once');
  }
  const delta = `${name}@${checkpoint}`;
  requireExportName(what, delta);
  if (disks.has(delta)) {
    throw usageError(
      `${what}: its delta export ${quote(delta)} is also the name of another`,
      'choose another name for that --export',
    );
  }
  disk.checkpoints.push({ name: checkpoint, path });
}

/**
 * Makes a plan of the options.
 *
 * @throws StillblockError with one line that says what to change
 */
export function planNbd(options: NbdOptions, inherited: readonly NamedSocket[] = []): NbdPlan {
  const disks: DisksByName = new Map();
  for (const text of options.export ?? []) {
    const [name, path] = splitAssignment('--export', text, 'NAME=PATH');
    requireExportName(`--export ${quote(text)}`, name);
    if (disks.has(name)) {
      throw usageError(`--export ${quote(text)}: the name is given twice`, 'choose another');
    }
    disks.set(name, { path, checkpoints: [] });
  }
  if (disks.size === 0) {
    throw usageError('there is nothing to serve', 'name a file or device with --export NAME=PATH');
  }
  for (const text of options.dirty ?? []) {
    planDirty(disks, text);
  }
  return {
    addresses: planAddresses(options, inherited),
    tls: planTls(options),
    disks: [...disks].map(([name, disk]) => ({ name, ...disk })),
    rates: planRates(options.maxRate ?? [], disks.keys()),
    metrics: options.metrics === undefined ? undefined : planMetrics(options.metrics),
  };
}

async function openDisk(disk: PlannedDisk, forget: ForgetCached | undefined): Promise<BlockSource> {
  try {
    return await openFileSource(disk.path, forget);
  } catch (cause) {
    if (errorCode(cause) === 'EINVAL') {
      throw new StillblockError(
        'EINVAL',
        `${disk.path} is neither a plain file nor a block device`,
        'name one of these',
        { cause },
      );
    }
    throw explain(cause, disk.path);
  }
}

/** Holes of a plain file. Without the addon they are not known, and all counts as data. */
async function allocationOf(
  disk: PlannedDisk,
  source: BlockSource,
  logger: Logger,
): Promise<ExtentMap> {
  try {
    const allocation = await fileAllocation(disk.path, source.sizeBytes);
    return allocation ?? ExtentMap.uniform(source.sizeBytes, 0);
  } catch (err) {
    logger.warn({ err, export: disk.name }, 'holes are not known, all is served as data');
    return ExtentMap.uniform(source.sizeBytes, 0);
  }
}

async function readExtents(checkpoint: PlannedCheckpoint, sizeBytes: number): Promise<Extent[]> {
  const { path } = checkpoint;
  try {
    const { size } = await stat(path);
    if (size > EXTENTS_FILE_BYTES) {
      throw new StillblockError(
        'EFBIG',
        `${path} is larger than ${formatSize(EXTENTS_FILE_BYTES)}`,
        'merge neighbouring ranges',
      );
    }
    return parseExtents(await readFile(path, 'utf8'), sizeBytes);
  } catch (cause) {
    if (cause instanceof ExtentsJsonError) {
      throw new StillblockError(
        'BAD_EXTENTS',
        `${path}, ${cause.message}`,
        'write it as [{"offset": 0, "length": 65536}], in bytes, within the disk',
        { cause },
      );
    }
    throw explain(cause, path);
  }
}

/** What is told about one export. */
interface ServedExport {
  readonly name: string;
  readonly disk: string;
  readonly checkpoint?: string;
  readonly uris: readonly string[];
  readonly sizeBytes: number;
  readonly dirtyBytes?: number;
}

/** An export with what the plan knows about it. */
interface PreparedExport {
  readonly export: Export;
  readonly disk: string;
  readonly checkpoint?: string;
  readonly dirtyBytes?: number;
}

async function prepareDisk(
  disk: PlannedDisk,
  source: BlockSource,
  bandwidth: readonly Bandwidth[],
  logger: Logger,
): Promise<PreparedExport[]> {
  const checkpoints: { readonly name: string; readonly dirty: readonly Extent[] }[] = [];
  for (const checkpoint of disk.checkpoints) {
    const dirty = await readExtents(checkpoint, source.sizeBytes);
    checkpoints.push({ name: checkpoint.name, dirty });
  }
  const [image, ...deltas] = diskExports({
    name: disk.name,
    description: disk.path,
    source,
    allocation: await allocationOf(disk, source, logger),
    checkpoints,
    bandwidth,
  });
  return [image, ...deltas].map((offered, index) => {
    const checkpoint = checkpoints[index - 1]?.name;
    if (checkpoint === undefined) {
      return { export: offered, disk: disk.name };
    }
    const changed = image.contexts.get(`${DIRTY_BITMAP_PREFIX}${checkpoint}`);
    const dirtyBytes = changed?.countBytes((flags) => flags === NBD_STATE_DIRTY) ?? 0;
    return { export: offered, disk: disk.name, checkpoint, dirtyBytes };
  });
}

function printServing(
  served: readonly ServedExport[],
  metrics: string | undefined,
  json: boolean,
): void {
  if (json) {
    printJson({ event: 'serving', exports: served, ...(metrics !== undefined && { metrics }) });
    return;
  }
  const rows = served.flatMap(({ uris, sizeBytes, checkpoint, dirtyBytes }) =>
    uris.map((uri) => [
      uri,
      formatSize(sizeBytes),
      checkpoint === undefined ? '' : `${formatSize(dirtyBytes ?? 0)} since ${checkpoint}`,
    ]),
  );
  printLine(formatTable(['URI', 'SIZE', 'CHANGED'], rows));
  if (metrics !== undefined) {
    printLine(`Metrics: ${metrics}`);
  }
  printLine('Press Ctrl-C to end.');
}

/** Resolves with the first signal that asks to end. A second one kills as usual. */
function endingSignal(signals: readonly NodeJS.Signals[]): {
  wait: Promise<string>;
  release: () => void;
} {
  let release = (): void => {};
  const wait = new Promise<string>((resolve) => {
    const onSignal = (signal: string): void => {
      release();
      resolve(signal);
    };
    release = () => {
      for (const signal of signals) {
        process.off(signal, onSignal);
      }
    };
    for (const signal of signals) {
      process.on(signal, onSignal);
    }
  });
  return { wait, release: () => release() };
}

async function serve(plan: NbdPlan, options: NbdOptions, logger: Logger): Promise<void> {
  const security = await Security.open(plan.tls, options.engine);
  const engine = chooseEngine(options.engine, logger);
  const server = new NbdServer({ logger, engine, ...security?.options });
  const sources: BlockSource[] = [];
  const caps = new RateCaps(plan.rates);
  let metrics: MetricsServer | undefined;
  const signal = endingSignal(security ? ['SIGINT', 'SIGTERM'] : ['SIGINT', 'SIGTERM', 'SIGHUP']);
  const json = options.json === true;
  const stopReloading = security?.reloadOnHangUp((error) => reportReload(error, json));
  const forget = await beGentle(logger);
  try {
    const prepared: PreparedExport[] = [];
    for (const disk of plan.disks) {
      const source = await openDisk(disk, forget);
      sources.push(source);
      prepared.push(...(await prepareDisk(disk, source, caps.of(disk.name), logger)));
    }
    for (const { export: offered } of prepared) {
      server.addExport(offered);
    }
    const [only, ...others] = plan.disks;
    if (only !== undefined && others.length === 0) {
      server.setDefaultExport(only.name);
    }
    for (const address of plan.addresses) {
      try {
        await server.listen(address, plan.tls);
      } catch (cause) {
        throw explainListen(address, cause);
      }
    }
    if (plan.metrics !== undefined) {
      metrics = await startMetrics(plan.metrics, () => ({
        nbd: { ...server.usage, accepted: server.accepted, exports: server.figures },
      }));
      logger.info({ metrics: metrics.where }, 'metrics are served');
    }
    const served = prepared.map(({ export: { name, source }, ...known }) => ({
      name,
      ...known,
      uris: server.uris(name),
      sizeBytes: source.sizeBytes,
    }));
    security?.checkNames(
      served.flatMap(({ uris }) => uris),
      logger,
    );
    // Whoever started us with a socket may read its own output there, as nbdinfo's users do.
    if (json || !plan.addresses.some((address) => 'descriptor' in address)) {
      printServing(served, metrics?.where, json);
    }
    logger.info({ signal: await signal.wait }, 'ending');
  } finally {
    signal.release();
    stopReloading?.();
    await metrics?.close();
    await server.close();
    await Promise.all(sources.map((source) => source.close()));
  }
  if (json) {
    printJson({ event: 'ended' });
  }
}

/** Carries out the command; a program that reads the JSON learns of a failure there, too. */
async function run(options: NbdOptions): Promise<void> {
  try {
    const plan = planNbd(options, takeInheritedSockets(env, pid));
    await serve(plan, options, makeLog(options.verbose ?? 0));
  } catch (error) {
    if (options.json === true && error instanceof StillblockError) {
      const { code, message, advice } = error;
      printJson({ event: 'failed', reason: code, message, advice });
    }
    throw error;
  }
}

const AFTER_HELP = `
Without -U it listens on TCP, by default on ${DEFAULT_HOST} port ${NBD_DEFAULT_PORT}. With -U alone it
listens on the socket alone; with -U and -p or -i on both. systemd's or libnbd's socket
activation goes before all of these.

${TLS_HELP}

NAME may be empty: that is the default export, which clients get that name none.
With a single --export, such clients get that one whatever its name.

Each --dirty adds the context qemu:dirty-bitmap:CHECKPOINT to the export NAME, and an
export NAME@CHECKPOINT for incrementals:
  qemu-img convert -O qcow2 -B full.qcow2 -F qcow2 nbd://localhost/sda@monday inc.qcow2
EXTENTS.json lists what changed, in bytes: [{"offset": 0, "length": 65536}]. A sector of
512 bytes of which any byte changed counts as changed.

What is served must not change meanwhile: holes are looked up once, at the start.
Exit codes: 0 ended by a signal, 1 failed, 2 usage.`;

/** The subcommand, to be added to the program. */
export function nbdCommand(): Command {
  const command = newCommand(
    'nbd',
    'serve plain files and block devices, read-only, in the foreground',
  )
    .option('-p, --port <port>', `TCP port, 0 for any free one (default: ${NBD_DEFAULT_PORT})`)
    .option(
      '-i, --ip-addr <addr>',
      `address to listen on, repeatable (default: ${DEFAULT_HOST})`,
      collect,
    )
    .option('-U, --unix <socket>', 'unix socket to listen on')
    .option('--export <name=path>', 'file or device to serve, repeatable', collect)
    .option('--max-rate <[name=]rate>', MAX_RATE_HELP, collect)
    .option('--metrics <address>', METRICS_HELP)
    .addOption(new Option('--engine <engine>', 'serves plain connections').choices(ENGINES))
    .option('--dirty <name:checkpoint=extents.json>', 'what changed since, repeatable', collect);
  return addTlsOptions(command)
    .addHelpText('after', AFTER_HELP)
    .action((options: NbdOptions) => run(options));
}
