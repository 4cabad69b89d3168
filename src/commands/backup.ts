// SPDX-License-Identifier: Apache-2.0
/** `stillblock backup`: take a snapshot, serve it, end it. */
import process, { env, pid, stderr } from 'node:process';
import { Command, InvalidArgumentError, Option } from 'commander';
import { NBD_DEFAULT_PORT } from '../../nbd/constants.ts';
import { takeInheritedSockets } from '../activation.ts';
import { type Api, withApi } from '../api-client.ts';
import type { BackupDescription } from '../backup-report.ts';
import { requireCheckpointName } from '../checkpoints.ts';
import { parseDiskRequest } from '../disks.ts';
import { EXIT, explain, StillblockError, usageError } from '../errors.ts';
import type { DaemonEvent } from '../events.ts';
import { folders } from '../folders.ts';
import { DEFAULT_HOST, type ListenOptions, planAddresses } from '../listen.ts';
import { makeLog } from '../log.ts';
import { METRICS_HELP, planMetrics } from '../metrics.ts';
import { nativeConstants } from '../native.ts';
import { type BeginBody, beginBackup, endBackup, listBackups, reload } from '../operations.ts';
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
  readonly checkpoint: string;
  readonly description?: string;
  readonly store: readonly string[];
  readonly storeSize?: number;
  readonly storeMax?: number;
  readonly disk?: readonly string[];
  readonly incremental?: string;
  readonly freezeTimeout: number;
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
  const { mode, verifyPeer } = plan;
  const { certificates, keys, access } = plan;
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

function toBody(options: BeginOptions, solo: boolean): BeginBody {
  const server = serverOf(options, solo);
  const { description, incremental, storeSize: sizeBytes, storeMax: maxBytes } = options;
  return {
    checkpoint: requireCheckpointName(options.checkpoint),
    ...(description === undefined ? {} : { description }),
    store: {
      places: options.store.map((place) => (place === 'memory' ? place : absolutePath(place))),
      ...(sizeBytes === undefined ? {} : { sizeBytes }),
      ...(maxBytes === undefined ? {} : { maxBytes }),
    },
    disks: (options.disk ?? []).map(parseDiskRequest).map(({ name, path }) => ({
      ...(name === undefined ? {} : { name }),
      path: pathOrName(path),
    })),
    ...(server === undefined ? {} : { server }),
    ...(options.maxRate === undefined ? {} : { maxRates: options.maxRate }),
    ...(options.metrics === undefined
      ? {}
      : { metrics: absoluteAddress(planMetrics(options.metrics)) }),
    ...(incremental === undefined ? {} : { incremental: requireCheckpointName(incremental) }),
    freezeTimeoutMs: options.freezeTimeout * 1000,
  };
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
    printLine(`store ${store.place}: ${used}`);
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
  readonly #checkpoint: string;
  readonly ended: Promise<void>;
  #exitCode: number = EXIT.done;
  #settle!: { resolve: () => void; reject: (error: Error) => void };

  constructor(checkpoint: string, json: boolean) {
    this.#checkpoint = checkpoint;
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

  #onEvent(event: DaemonEvent): void {
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
  const foreground = new Foreground(body.checkpoint, json);
  await foreground.watch(api);
  try {
    printServing(await api.call(beginBackup, { body }, stop), json, true);
  } catch (error) {
    if (!stop.aborted) {
      throw error;
    }
    return;
  }
  const end = (): void => {
    // Its end is seen among the events; that it has ended by itself is no error.
    api.call(endBackup, { params: { name: body.checkpoint } }).catch(() => {});
  };
  if (stop.aborted) {
    end();
  }
  stop.addEventListener('abort', end);
  await foreground.ended;
  process.exitCode = foreground.exitCode;
}

async function begin(options: BeginOptions): Promise<void> {
  const json = options.json === true;
  requireCheckpointName(options.checkpoint);
  await withApi(folders(), makeLog(options.verbose ?? 0), async (api) => {
    const body = toBody(options, api.solo);
    const stays = api.solo || options.wait === true;
    if (stays) {
      await api.open();
      await beginAndStay(api, body, json);
    } else {
      printServing(await api.call(beginBackup, { body }), json, false);
    }
    return stays;
  }).then((stayed) => {
    if (json && stayed) {
      printJson({ event: 'ended' });
    }
  });
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
  const ended = await withApi(folders(), makeLog(options.verbose ?? 0), async (api) =>
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
    .requiredOption('--checkpoint <NAME>', 'name of this instant, for later increments')
    .requiredOption(
      '--store <PLACE>',
      'where old data goes: a folder, a file, a block device or "memory", repeatable',
      collect,
    )
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
      new Option('--freeze-timeout <SECONDS>', 'longest time to freeze file systems')
        .argParser(secondsOption)
        .default(10),
    );
  return addTlsOptions(command)
    .addHelpText(
      'after',
      `
Without a daemon (stillblock serve) this command serves it, until it is ended. A store
on one of the disks is allocated before the snapshot and does not grow. A block device
is overwritten.

${TLS_HELP}

Exit code: 0 ended, 1 failed, 2 usage, 3 a full backup is required, 4 store full.

Examples:
  stillblock backup begin --checkpoint monday --store /mnt/spare
  stillblock backup begin --checkpoint tuesday --store memory --store-size 2G \\
    --disk sda=/dev/sda --incremental monday
  qemu-img convert -O qcow2 nbd://127.0.0.1/sda monday.qcow2`,
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
