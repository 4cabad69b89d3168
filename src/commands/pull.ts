// SPDX-License-Identifier: Apache-2.0
/** `stillblock pull`: a chain of images on this machine of another machine's disks. */
import { randomUUID } from 'node:crypto';
import process, { stderr } from 'node:process';
import type { Command } from 'commander';
import { StillblockError, usageError } from '../errors.ts';
import type { ChainPoint } from '../manifest.ts';
import type { PullSource } from '../offer.ts';
import { printJson, printLine, printTable } from '../output.ts';
import { makeProgress, type Progress } from '../progress-bars.ts';
import { type PullObserver, pull } from '../pull.ts';
import type { PullMode } from '../pull-plan.ts';
import { formatSize } from '../sizes.ts';
import { type CommonOptions, countOption } from './common.ts';
import {
  certificatesOf,
  hostSource,
  nbdSource,
  newCheckpointName,
  newSourceCommand,
  type SourceOptions,
} from './source.ts';

interface PullOptions extends CommonOptions, SourceOptions {
  readonly checkpoint?: string;
  readonly full?: boolean;
  readonly fullIfNeeded?: boolean;
  readonly verify?: boolean;
  readonly compress?: boolean;
  readonly parallel: number;
  readonly timeout: number;
}

function modeOf(options: PullOptions): PullMode {
  if (options.full === true && options.fullIfNeeded === true) {
    throw usageError('--full and --full-if-needed exclude each other', 'give one of them');
  }
  return options.full === true
    ? 'full'
    : options.fullIfNeeded === true
      ? 'full-if-needed'
      : 'increments';
}

async function makeSource(host: string | undefined, options: PullOptions): Promise<PullSource> {
  const stallMs = options.timeout * 1000;
  const { checkpoint } = options;
  if (host !== undefined) {
    return hostSource(host, checkpoint ?? newCheckpointName('pull', new Date()), options, stallMs);
  }
  if (checkpoint === undefined) {
    throw usageError(
      '--nbd needs a name for this instant',
      'give the one that the server has for it: --checkpoint NAME',
    );
  }
  return nbdSource(checkpoint, options, stallMs);
}

function observe(json: boolean, progress: Progress): PullObserver {
  return {
    recovered: (recovery) => {
      const { checkpoint, complete } = recovery;
      if (json) {
        printJson({ event: 'recovered', checkpoint, complete });
      } else {
        printLine(
          complete
            ? `the pull of ${checkpoint} was cut off after it was complete: it is in the chain`
            : `the pull of ${checkpoint} was cut off: what it had copied is removed, the chain is as before it`,
        );
      }
    },
    planned: ({ checkpoint }, { disks, absent }) => {
      if (json) {
        const planned = disks.map(({ disk, base, file, why }) => ({
          disk: disk.name,
          kind: base === undefined ? 'full' : 'incremental',
          ...(base === undefined ? { why } : { since: base.checkpoint }),
          sizeBytes: disk.sizeBytes,
          file,
        }));
        printJson({ event: 'planned', checkpoint, disks: planned, absent });
        return;
      }
      for (const { disk, base, why } of disks) {
        const how = base === undefined ? `all of it, ${why}` : `changes since ${base.checkpoint}`;
        printLine(`${disk.name}: ${how}`);
      }
      for (const name of absent) {
        printLine(`${name} is in the chain, but not in this snapshot`);
      }
    },
    progress: (disk, step, fraction, bytes) => progress.update(disk, step, fraction, bytes),
    problem: (error) => {
      const text = error instanceof Error ? error.message : String(error);
      if (json) {
        printJson({ event: 'problem', text });
      }
      stderr.write(`stillblock: ${text}\n`);
    },
    pulled: ({ disk, kind, fileBytes, verified }) => {
      if (json) {
        printJson({ event: 'pulled', disk, kind, fileBytes, verified });
      }
    },
  };
}

function printPoint(point: ChainPoint): void {
  printTable(
    ['DISK', 'KIND', 'SIZE', 'FILE', 'WRITTEN', 'COMPARED'],
    point.entries.map(({ disk, kind, sizeBytes, file, fileBytes, verified }) => [
      disk,
      kind,
      formatSize(sizeBytes),
      file,
      formatSize(fileBytes),
      verified ? 'yes' : 'no',
    ]),
    'no disks',
  );
  printLine(`checkpoint ${point.checkpoint} is in the chain`);
}

/** Ends the work on the first signal; a second one ends the process as usual. */
export function endingSignal(): AbortSignal {
  const stop = new AbortController();
  for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) {
    process.once(signal, () =>
      stop.abort(new StillblockError('INTERRUPTED', `ended by ${signal}`, 'run it again')),
    );
  }
  return stop.signal;
}

async function run(
  host: string | undefined,
  folder: string | undefined,
  options: PullOptions,
): Promise<void> {
  const place = folder ?? host;
  const isHost = folder !== undefined;
  if (place === undefined || isHost === (options.nbd !== undefined)) {
    throw usageError(
      'it is not said from where, or where to',
      'write HOST DIR, or --nbd URI --checkpoint NAME DIR',
    );
  }
  // Images hold everything that the server's disks do, passwords included.
  process.umask(0o077);
  const json = options.json === true;
  const mode = modeOf(options);
  const source = await makeSource(isHost ? host : undefined, options);
  const progress = makeProgress(json);
  const request = {
    folder: place,
    source,
    mode,
    verify: options.verify,
    compress: options.compress === true,
    parallel: options.parallel,
    certificates: certificatesOf(options),
    stallMs: options.timeout * 1000,
  };
  let point: ChainPoint;
  try {
    point = await pull(request, observe(json, progress), randomUUID(), endingSignal());
  } finally {
    progress.stop();
  }
  if (json) {
    printJson({ event: 'done', checkpoint: point.checkpoint, entries: point.entries });
  } else {
    printPoint(point);
  }
}

const AFTER_HELP = `
The first pull copies all of each disk, later ones what changed since. DIR gets one chain
of qcow2 files per disk and a manifest. A pull that ends early, in whatever way, leaves the
chain as it was. With HOST the snapshot is taken and ended, and its layout kept; with --nbd
somebody else does that. Changes that are not proven to fit the chain, as with --nbd, are
compared while they are held, unless --no-verify.

Exit codes: 0 done, 1 failed, 2 usage, 3 a full copy is required of some disk, 4 the store
of the server's snapshot was full.

Examples:
  stillblock pull --tls-certificates /etc/pki/backup web1 /backup/web1
  stillblock pull /run/stillblock/control.sock /backup/this
  stillblock pull --nbd nbd://192.0.2.7/sda --checkpoint monday /backup/web1`;

/** `stillblock pull` */
export function pullCommand(): Command {
  return newSourceCommand('pull', "copy a server's disks into a chain of images")
    .argument('[DIR]', "the chain's folder, made if it is not there")
    .option('--checkpoint <NAME>', 'name of this instant (default with HOST: by the time)')
    .option('--full', 'copy all of every disk')
    .option('--full-if-needed', 'copy all of those disks whose changes are not known')
    .option('--verify', "compare each copy with the server's image while that is held")
    .option('--no-verify', 'compare nothing')
    .option('--compress', 'smaller files, by zstd')
    .option('--parallel <N>', 'disks at a time', countOption(1, 64), 4)
    .option('--timeout <SECONDS>', 'how long nothing may move', countOption(1, 86_400), 120)
    .addHelpText('after', AFTER_HELP)
    .action(run);
}
