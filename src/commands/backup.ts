// SPDX-License-Identifier: Apache-2.0
/** `stillblock backup`: take a snapshot, serve it, end it. */
import process, { env, pid, stderr } from 'node:process';
import { Command, InvalidArgumentError, Option } from 'commander';
import { NBD_DEFAULT_PORT } from '../../nbd/constants.ts';
import { takeInheritedSockets } from '../activation.ts';
import type { BackupDescription } from '../backup-report.ts';
import { requireCheckpointName } from '../checkpoints.ts';
import { endBackup } from '../control-socket.ts';
import { parseDiskRequest } from '../disks.ts';
import { StillblockError } from '../errors.ts';
import { folders } from '../folders.ts';
import { DEFAULT_HOST, type ListenOptions, planAddresses } from '../listen.ts';
import { makeLog } from '../log.ts';
import { METRICS_HELP, planMetrics } from '../metrics.ts';
import { nativeConstants } from '../native.ts';
import { errorLine, printJson, printLine, printTable } from '../output.ts';
import { MAX_RATE_HELP } from '../rates.ts';
import { formatSize } from '../sizes.ts';
import { type BackupObserver, type BackupRequest, BackupSession } from '../snapshot-session.ts';
import {
  addTlsOptions,
  planTls,
  reportReload,
  Security,
  TLS_HELP,
  type TlsOptions,
} from '../tls.ts';
import { type CommonOptions, collect, example, newCommand, sizeOption } from './common.ts';

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
}

async function toRequest(options: BeginOptions): Promise<BackupRequest> {
  const listen = planAddresses(options, takeInheritedSockets(env, pid));
  const tls = planTls(options);
  return {
    checkpoint: requireCheckpointName(options.checkpoint),
    description: options.description ?? '',
    store: {
      places: options.store,
      sizeBytes: options.storeSize,
      maxBytes: options.storeMax,
    },
    disks: (options.disk ?? []).map(parseDiskRequest),
    listen,
    security: await Security.open(tls),
    insecure: tls.insecure,
    maxRates: options.maxRate ?? [],
    metrics: options.metrics === undefined ? undefined : planMetrics(options.metrics),
    incremental:
      options.incremental === undefined ? undefined : requireCheckpointName(options.incremental),
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

function observe(json: boolean): BackupObserver {
  return {
    serving: (description) => {
      if (json) {
        printJson({ event: 'serving', ...description });
        return;
      }
      printBackup(description);
      printLine('Ctrl-C, or stillblock backup end, ends it.');
    },
    failed: (error) => {
      if (json) {
        const { code, message, advice } = error;
        printJson({ event: 'failed', reason: code, message, advice });
      }
      stderr.write(errorLine(error));
    },
    storeGrown: (sizeBytes) => {
      if (json) {
        printJson({ event: 'store-grown', sizeBytes });
      } else {
        printLine(`the store ran low and has grown to ${formatSize(sizeBytes)}`);
      }
    },
    storeLow: (leftBytes) => {
      if (json) {
        printJson({ event: 'store-low', leftBytes });
      }
      stderr.write(
        `stillblock: the store has ${formatSize(leftBytes)} left and cannot grow: finish soon, or begin again with a larger one\n`,
      );
    },
  };
}

/** Ends a session on the first signal; a second one ends the process, and with it the snapshot. */
function endOnSignals(session: BackupSession, signals: readonly NodeJS.Signals[]): void {
  for (const signal of signals) {
    process.once(signal, () => session.requestEnd());
  }
}

async function begin(options: BeginOptions): Promise<void> {
  const json = options.json === true;
  const request = await toRequest(options);
  const log = makeLog(options.verbose ?? 0);
  const session = new BackupSession(request, folders(), observe(json), log);
  const { security } = request;
  endOnSignals(session, security ? ['SIGINT', 'SIGTERM'] : ['SIGINT', 'SIGTERM', 'SIGHUP']);
  security?.reloadOnHangUp((error) => reportReload(error, json));
  process.exitCode = await session.run();
  if (json) {
    printJson({ event: 'ended' });
  }
}

async function end(options: CommonOptions): Promise<void> {
  const ended = await endBackup(folders());
  if (ended === undefined) {
    throw new StillblockError(
      'NO_BACKUP',
      'no backup is running',
      'nothing need be done: see stillblock status',
    );
  }
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
    .option('--incremental <NAME>', 'fail unless all changes since NAME are known')
    .option('--description <TEXT>', 'kept with the checkpoint')
    .option('-p, --port <PORT>', `TCP port, 0 for any free one (default: ${NBD_DEFAULT_PORT})`)
    .option('-i, --ip-addr <ADDR>', `address to listen on, repeatable (${DEFAULT_HOST})`, collect)
    .option('-U, --unix <SOCKET>', 'unix socket to listen on')
    .option('--max-rate <[DISK=]RATE>', MAX_RATE_HELP, collect)
    .option('--metrics <ADDRESS>', METRICS_HELP)
    .addOption(
      new Option('--freeze-timeout <SECONDS>', 'longest time to freeze file systems')
        .argParser(secondsOption)
        .default(10),
    );
  return addTlsOptions(command)
    .addHelpText(
      'after',
      `
A store on one of the disks themselves is allocated before the snapshot and does
not grow. A block device is overwritten.

${TLS_HELP}

Exit code: 0 ended, 1 failed, 2 usage, 3 a full backup is required, 4 store full.

Examples:
  stillblock backup begin --checkpoint monday --store /mnt/spare
  stillblock backup begin --checkpoint tuesday --store memory --store-size 2G \\
    --disk sda=/dev/sda --incremental monday
  qemu-img convert -O qcow2 nbd://127.0.0.1/sda monday.qcow2
  qemu-img convert -O qcow2 -B monday.qcow2 -F qcow2 nbd://127.0.0.1/sda@monday tuesday.qcow2`,
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
        .addHelpText(
          'after',
          `
Returns when everything is released. The checkpoint stays.
${example('stillblock backup end')}`,
        )
        .action(end),
    );
}
