// SPDX-License-Identifier: Apache-2.0
/** `stillblock backup`: take a snapshot, serve it, end it. */
import { readFile } from 'node:fs/promises';
import process, { env, pid, stderr } from 'node:process';
import { Command, InvalidArgumentError, Option } from 'commander';
import { NBD_DEFAULT_PORT } from '../../nbd/constants.ts';
import { takeInheritedSockets } from '../activation.ts';
import { type Api, withApi } from '../api-client.ts';
import type { BackupDescription } from '../backup-report.ts';
import type { BeginBody } from '../backup-request.ts';
import { requireCheckpointName } from '../checkpoints.ts';
import { parseDiskRequest } from '../disks.ts';
import { EXIT, explain, StillblockError, usageError } from '../errors.ts';
import type { DaemonEvent } from '../events.ts';
import { DEFAULT_HOST, type ListenOptions, planAddresses } from '../listen.ts';
import { METRICS_HELP, planMetrics } from '../metrics.ts';
import { nativeConstants } from '../native.ts';
import { beginBackup, endBackup, listBackups, reload } from '../operations.ts';
import { printJson, printLine, printTable } from '../output.ts';
import { MAX_RATE_HELP } from '../rates.ts';
import { formatSize } from '../sizes.ts';
import { addTlsOptions, planTls, reportReload, TLS_HELP, type TlsOptions } from '../tls.ts';
import {
  absolutePath,
  type CommonOptions,
  collect,
  example,
  newCommand,
  pathOrName,
  sizeOption,
} from './common.ts';

interface BeginOptions extends CommonOptions, ListenOptions, TlsOptions {
  readonly checkpoint?: string;
  readonly description?: string;
  readonly store?: readonly string[];
  readonly storeSize?: number;
  readonly storeMax?: number;
  readonly disk?: readonly string[];
  readonly incremental?: string;
  readonly freezeTimeout?: number;
  readonly maxRate?: readonly string[];
  readonly metrics?: string;
  readonly wait?: boolean;
}

function absoluteAddress<T extends object>(
  address: T | { readonly path: string },
): T | { path: string } {
  return 'path' in address ? { path: absolutePath(address.path) } : address;
}

/** The server that the options ask for; none of its own if they do not speak of any. */
function serverOf(options: BeginOptions, solo: boolean): BeginBody['server'] {
  const inherited = takeInheritedSockets(env, pid);
  const listen = planAddresses(options, inherited).map(absoluteAddress);
  const plan = planTls(options);
  const { port, ipAddr, unix, insecure } = options;
  const said = [port, ipAddr, unix, insecure].some((option) => option !== undefined);
  if (!solo && inherited.length > 0) {
    throw usageError(
      'sockets have been inherited, and the daemon cannot have them',
      'leave them out',
    );
  }
  if (!solo && !said && plan.mode === 'off') {
    return undefined;
  }
  const { mode, verifyPeer, certificates, keys, access } = plan;
  if (options.tls === undefined && insecure === undefined && mode === 'off') {
    return { listen };
  }
  return {
    listen,
    tls: {
      mode,
      verifyPeer,
      insecure: plan.insecure,
      ...(certificates === undefined ? {} : { certificates: absolutePath(certificates) }),
      ...(keys === undefined ? {} : { keys: absolutePath(keys) }),
      ...(access === undefined ? {} : { access: absolutePath(access) }),
    },
  };
}

/** The store that the options ask for; undefined to have it chosen. */
function storeOf({ store, storeSize, storeMax }: BeginOptions): BeginBody['store'] {
  if (store === undefined) {
    if (storeSize !== undefined || storeMax !== undefined) {
      throw usageError('--store-size and --store-max are for a --store', 'name that as well');
    }
    return undefined;
  }
  return {
    places: store.map((place) => (place === 'memory' ? place : absolutePath(place))),
    ...(storeSize === undefined ? {} : { sizeBytes: storeSize }),
    ...(storeMax === undefined ? {} : { maxBytes: storeMax }),
  };
}

async function readDocument(path: string): Promise<string> {
  try {
    return await readFile(path, 'utf8');
  } catch (error) {
    throw explain(error, path);
  }
}

/** The parts of a body that are there; JSON has no word for what is not. */
function defined<T extends object>(parts: { [Key in keyof T]: T[Key] | undefined }): T {
  return Object.fromEntries(Object.entries(parts).filter(([, value]) => value !== undefined)) as T;
}

/** Disks that the options name; undefined if they name none. */
function disksOf(options: BeginOptions): BeginBody['disks'] {
  return options.disk
    ?.map(parseDiskRequest)
    .map(({ name, path }) => defined({ name, path: pathOrName(path) }));
}

async function toBody(
  options: BeginOptions,
  documents: readonly (string | undefined)[],
  solo: boolean,
): Promise<BeginBody> {
  const [backupFile, checkpointFile] = documents;
  const { checkpoint, description, incremental, maxRate, metrics, freezeTimeout } = options;
  if (backupFile === undefined && checkpoint === undefined) {
    throw usageError('--checkpoint is missing', 'name this instant, for later increments');
  }
  return defined<BeginBody>({
    checkpoint: checkpoint === undefined ? undefined : requireCheckpointName(checkpoint),
    description,
    store: storeOf(options),
    disks: disksOf(options),
    server: serverOf(options, solo && backupFile === undefined),
    maxRates: maxRate,
    metrics: metrics === undefined ? undefined : absoluteAddress(planMetrics(metrics)),
    incremental: incremental === undefined ? undefined : requireCheckpointName(incremental),
    freezeTimeoutMs: freezeTimeout === undefined ? undefined : freezeTimeout * 1000,
    backupXml: backupFile === undefined ? undefined : await readDocument(backupFile),
    checkpointXml: checkpointFile === undefined ? undefined : await readDocument(checkpointFile),
  });
}

function formatDuration(seconds: number): string {
  const minutes = Math.round(seconds / 60);
  return minutes < 120 ? `${minutes} minutes` : `${Math.round(minutes / 60)} hours`;
}

/** Prints an exports' table, and what stands beside it. */
export function printBackup(backup: BackupDescription): void {
  const { disks, exports, store } = backup;
  const frozen = `file systems frozen for ${Math.round(backup.freezeMs ?? 0)} ms`;
  printLine(
    `checkpoint ${backup.checkpoint}: ${disks.length} disk${disks.length === 1 ? '' : 's'} as of ${backup.takenAt}, ${frozen}`,
  );
  if (store !== undefined) {
    const used = `${formatSize(store.usedBytes)} of ${formatSize(store.capacityBytes)} used`;
    const { overflowSeconds } = store;
    const full =
      overflowSeconds === null ? '' : `, full in ${formatDuration(overflowSeconds)} at this rate`;
    printLine(`store ${store.place} (${store.why}): ${used}${full}`);
  }
  if (backup.metrics !== undefined) {
    printLine(`metrics: ${backup.metrics}`);
  }
  printTable(
    ['EXPORT', 'SIZE', 'CHANGED', 'URI'],
    exports.flatMap(({ name, sizeBytes, dirtyBytes, uris }) =>
      uris.map((uri, index) =>
        index === 0
          ? [
              name,
              formatSize(sizeBytes),
              dirtyBytes === undefined ? '-' : formatSize(dirtyBytes),
              uri,
            ]
          : ['', '', '', uri],
      ),
    ),
    'nothing is served yet',
  );
  for (const { name, full } of disks) {
    for (const { checkpoint, why } of full) {
      printLine(`no increment of ${name} since ${checkpoint}: ${why}`);
    }
  }
  for (const { problem } of backup.brokenCheckpoints) {
    printLine(`no increments since ${problem}`);
  }
}

function printServing(description: BackupDescription, json: boolean, stays: boolean): void {
  if (json) {
    printJson({ event: 'serving', ...description });
    return;
  }
  if (description.xml?.backup !== undefined) {
    printLine(description.xml.backup.trimEnd());
  }
  for (const warning of description.xml?.warnings ?? []) {
    stderr.write(`stillblock: ${warning}\n`);
  }
  printBackup(description);
  const how = `stillblock backup end ${description.checkpoint}`;
  printLine(stays ? `Ctrl-C, or ${how}, ends it.` : `${how} ends it.`);
}

/** Tells what happens to a backup that is served. */
function printEvent(event: DaemonEvent, json: boolean): void {
  const { id: _id, time: _time, ...told } = event;
  switch (told.event) {
    case 'failed':
      if (json) {
        const { reason, message, advice } = told;
        printJson({ event: 'failed', reason, message, advice });
      }
      stderr.write(`stillblock: ${told.message}: ${told.advice}\n`);
      break;
    case 'store-grown':
      if (json) {
        printJson(told);
      } else {
        printLine(`the store ran low and has grown to ${formatSize(told.sizeBytes)}`);
      }
      break;
    case 'store-low':
      if (json) {
        printJson(told);
      }
      stderr.write(
        `stillblock: the store has ${formatSize(told.leftBytes)} left and cannot grow: finish soon, or begin again with a larger one\n`,
      );
      break;
    default:
  }
}

/** Aborted by the first of these signals; a second one ends the process. */
function stopOnSignals(signals: readonly NodeJS.Signals[]): AbortSignal {
  const stop = new AbortController();
  for (const signal of signals) {
    process.once(signal, () => stop.abort());
  }
  return stop.signal;
}

/** What is seen of a backup in the foreground, from before it begins. */
class Foreground {
  readonly #json: boolean;
  readonly ended: Promise<void>;
  /** Known once it is served. */
  #checkpoint: string | undefined;
  #early: DaemonEvent[] = [];
  #exitCode: number = EXIT.done;
  #settle!: { resolve: () => void; reject: (error: Error) => void };

  constructor(json: boolean) {
    this.#json = json;
    this.ended = new Promise((resolve, reject) => {
      this.#settle = { resolve, reject };
    });
    // Who does not come to wait for it has another error to tell.
    this.ended.catch(() => {});
  }

  watch(api: Api): Promise<void> {
    return api.watch(
      (event) => this.#onEvent(event),
      () =>
        this.#settle.reject(
          new StillblockError(
            'DAEMON_LOST',
            'the daemon has gone, and with it the snapshot',
            "look at the daemon's log, and begin again",
          ),
        ),
    );
  }

  /** From now on its events are told, and those that came before it was known. */
  serves(description: BackupDescription): void {
    this.#checkpoint = description.checkpoint;
    printServing(description, this.#json, true);
    for (const event of this.#early.splice(0)) {
      this.#onEvent(event);
    }
  }

  #onEvent(event: DaemonEvent): void {
    if (this.#checkpoint === undefined) {
      this.#early.push(event);
      return;
    }
    if (!('checkpoint' in event) || event.checkpoint !== this.#checkpoint) {
      return;
    }
    printEvent(event, this.#json);
    if (event.event === 'failed') {
      this.#exitCode = event.exitCode;
    } else if (event.event === 'ended') {
      this.#settle.resolve();
    }
  }

  get exitCode(): number {
    return this.#exitCode;
  }
}

/** Begins a backup and stays until it has ended. */
async function beginAndStay(api: Api, body: BeginBody, json: boolean): Promise<void> {
  // With TLS, SIGHUP asks for certificates to be read again.
  const hangUp = (body.server?.tls?.mode ?? 'off') !== 'off';
  const stop = stopOnSignals(hangUp ? ['SIGINT', 'SIGTERM'] : ['SIGINT', 'SIGTERM', 'SIGHUP']);
  if (hangUp) {
    process.on('SIGHUP', () => {
      api.call(reload, {}).then(
        () => reportReload(undefined, json),
        (error: unknown) => reportReload(explain(error, 'TLS'), json),
      );
    });
  }
  const foreground = new Foreground(json);
  await foreground.watch(api);
  let name: string;
  try {
    const description = await api.call(beginBackup, { body }, stop);
    foreground.serves(description);
    name = description.checkpoint;
  } catch (error) {
    if (!stop.aborted) {
      throw error;
    }
    return;
  }
  const end = (): void => {
    // Its end is seen among the events; that it has ended by itself is no error.
    api.call(endBackup, { params: { name } }).catch(() => {});
  };
  if (stop.aborted) {
    end();
  }
  stop.addEventListener('abort', end);
  await foreground.ended;
  process.exitCode = foreground.exitCode;
}

async function begin(
  backupFile: string | undefined,
  checkpointFile: string | undefined,
  options: BeginOptions,
): Promise<void> {
  const json = options.json === true;
  const stayed = await withApi(options, async (api) => {
    const body = await toBody(options, [backupFile, checkpointFile], api.solo);
    const stays = api.solo || options.wait === true;
    if (stays) {
      await api.open();
      await beginAndStay(api, body, json);
    } else {
      printServing(await api.call(beginBackup, { body }), json, false);
    }
    return stays;
  });
  if (json && stayed) {
    printJson({ event: 'ended' });
  }
}

/** The backup that is meant: the one of that checkpoint, or the only one. */
async function chooseBackup(api: Api, checkpoint: string | undefined): Promise<string> {
  if (checkpoint !== undefined) {
    return requireCheckpointName(checkpoint);
  }
  const { backups } = await api.call(listBackups, {});
  const [only, ...others] = backups;
  if (only === undefined) {
    throw new StillblockError(
      'NO_BACKUP',
      'no backup is running',
      'nothing need be done: see stillblock status',
    );
  }
  if (others.length > 0) {
    const names = backups.map((backup) => backup.checkpoint).join(', ');
    throw usageError(`several backups are running: ${names}`, 'name one of them');
  }
  return only.checkpoint;
}

async function end(checkpoint: string | undefined, options: CommonOptions): Promise<void> {
  const ended = await withApi(options, async (api) =>
    api.call(endBackup, { params: { name: await chooseBackup(api, checkpoint) } }),
  );
  if (options.json === true) {
    printJson({ ended });
  } else {
    const how = ended.failed ? `, after it had failed (${ended.reason})` : '';
    printLine(`the backup of checkpoint ${ended.checkpoint} has ended${how}`);
  }
}

function secondsOption(text: string): number {
  const seconds = Number(text);
  const most = nativeConstants().maxFreezeMs / 1000;
  if (!/^\d+$/.test(text) || seconds < 1 || seconds > most) {
    throw new InvalidArgumentError(`it is a number of seconds from 1 to ${most}.`);
  }
  return seconds;
}

function beginCommand(): Command {
  const command = newCommand('begin', 'take a snapshot and serve it until it is ended')
    .argument('[BACKUP.XML]', "libvirt's <domainbackup>, for disks, server and store")
    .argument('[CHECKPOINT.XML]', "libvirt's <domaincheckpoint>")
    .option('--checkpoint <NAME>', 'name of this instant, for later increments')
    .option('--store <PLACE>', 'for old data: folder, file, block device, "memory"', collect)
    .option('--store-size <SIZE>', 'of each, to begin with (default: a share)', sizeOption)
    .option('--store-max <SIZE>', "of each, to grow to (default: a folder's room)", sizeOption)
    .option('--disk <[NAME=]DEV>', 'tracked device, by path or name, repeatable (all)', collect)
    .option('--incremental <NAME>', 'fail unless changes since are known')
    .option('--description <TEXT>', 'kept with the checkpoint')
    .option('-p, --port <PORT>', `TCP port, 0 for any free one (default: ${NBD_DEFAULT_PORT})`)
    .option('-i, --ip-addr <ADDR>', `address to listen on, repeatable (${DEFAULT_HOST})`, collect)
    .option('-U, --unix <SOCKET>', 'unix socket to listen on')
    .option('--max-rate <[DISK=]RATE>', MAX_RATE_HELP, collect)
    .option('--metrics <ADDRESS>', METRICS_HELP)
    .option('--wait', 'stay until it has ended')
    .addOption(
      new Option('--freeze-timeout <SECONDS>', 'longest time to freeze file systems').argParser(
        secondsOption,
      ),
    );
  return addTlsOptions(command)
    .addHelpText(
      'after',
      `
Without a daemon (stillblock serve) this command serves it, until it is ended. Without
--store one is chosen. On a disk of the snapshot it does not grow; a device is overwritten.

${TLS_HELP}

Exit code: 0 ended, 1 failed, 2 usage, 3 a full backup is required, 4 store full.

Examples:
  stillblock backup begin --checkpoint monday --store /mnt/spare
  stillblock backup begin --checkpoint tuesday --disk sda=/dev/sda --incremental monday`,
    )
    .action(begin);
}

/** `stillblock backup …` */
export function backupCommand(): Command {
  return new Command('backup')
    .summary('take a snapshot and serve it over NBD')
    .description('Take a snapshot of tracked devices and serve it over NBD.')
    .addCommand(beginCommand())
    .addCommand(
      newCommand('end', 'end the running backup and release its snapshot')
        .argument('[CHECKPOINT]', 'which one, if several run')
        .addHelpText(
          'after',
          `
Returns when everything is released. The checkpoint stays.
${example('stillblock backup end')}`,
        )
        .action(end),
    );
}
