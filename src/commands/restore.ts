// SPDX-License-Identifier: Apache-2.0
/** `stillblock restore`: disks written back from a chain of images. */
import { stderr, stdin } from 'node:process';
import { createInterface } from 'node:readline/promises';
import type { Command } from 'commander';
import { StillblockError, usageError } from '../errors.ts';
import { printJson, printLine, printTable } from '../output.ts';
import { makeProgress, type Progress } from '../progress-bars.ts';
import { type PreparedRestore, prepareRestore, type RestoreObserver, restore } from '../restore.ts';
import { parseMapping, type RestorePlan } from '../restore-plan.ts';
import { formatSize } from '../sizes.ts';
import { type CommonOptions, collect, countOption, newCommand } from './common.ts';
import { endingSignal } from './pull.ts';

interface RestoreCommandOptions extends CommonOptions {
  readonly map?: readonly string[];
  readonly at?: string;
  readonly yes?: boolean;
  readonly dryRun?: boolean;
  readonly verify: boolean;
  readonly timeout: number;
}

function printPlan({ point, items }: RestorePlan): void {
  printLine(`checkpoint ${point.checkpoint}, ${point.takenAt ?? `pulled at ${point.pulledAt}`}`);
  printTable(
    ['DISK', 'SIZE', 'TARGET', 'SIZE', 'IS OVERWRITTEN'],
    items.map(({ old, needBytes, target, table, pieces }) => [
      table === undefined
        ? old
        : `${old} (table, ${pieces.map(({ entry }) => entry.disk).join(', ')})`,
      formatSize(needBytes),
      target.path,
      target.sizeBytes === undefined ? 'new file' : formatSize(target.sizeBytes),
      target.contents === '' ? 'nothing known' : target.contents,
    ]),
    'nothing to restore',
  );
  for (const { old, notes } of items) {
    for (const note of notes) {
      printLine(`${old}: ${note}`);
    }
  }
}

function planEvent({ point, items }: RestorePlan): object {
  return {
    event: 'planned',
    checkpoint: point.checkpoint,
    targets: items.map(({ old, needBytes, target, table, pieces, notes }) => ({
      disk: old,
      target: target.path,
      needBytes,
      sizeBytes: target.sizeBytes ?? null,
      overwritten: target.contents,
      table: table?.label ?? null,
      images: pieces.map(({ entry, offset }) => ({ file: entry.file, offset })),
      notes,
    })),
  };
}

async function isAgreed(plan: RestorePlan): Promise<boolean> {
  if (!stdin.isTTY) {
    throw usageError('nobody is there to be asked', 'use --yes, or --dry-run to see the plan');
  }
  const reader = createInterface({ input: stdin, output: stderr });
  try {
    const targets = plan.items.map(({ target }) => target.path).join(', ');
    const answer = await reader.question(`Overwrite ${targets}? Type yes: `);
    return answer.trim() === 'yes';
  } finally {
    reader.close();
  }
}

function observe(json: boolean, progress: Progress): RestoreObserver {
  return {
    progress: (disk, step, fraction, bytes) => progress.update(disk, step, fraction, bytes),
    restored: ({ old, target }) => {
      if (json) {
        printJson({ event: 'restored', disk: old, target: target.path });
      }
    },
    note: (text) => {
      if (json) {
        printJson({ event: 'note', text });
      } else {
        stderr.write(`stillblock: ${text}\n`);
      }
    },
  };
}

/** @returns undefined if the user did not agree */
async function agree(
  prepared: PreparedRestore,
  options: RestoreCommandOptions,
): Promise<PreparedRestore | undefined> {
  if (options.json === true) {
    printJson(planEvent(prepared.plan));
  } else {
    printPlan(prepared.plan);
  }
  if (options.dryRun === true) {
    return undefined;
  }
  if (options.yes !== true && !(await isAgreed(prepared.plan))) {
    throw new StillblockError('NOT_AGREED', 'nothing was written', 'answer yes, or use --yes');
  }
  return prepared;
}

async function run(folder: string, options: RestoreCommandOptions): Promise<void> {
  const mappings = (options.map ?? []).map(parseMapping);
  if (mappings.length === 0) {
    throw usageError(
      'it is not said what goes where',
      `write --map DISK=TARGET; stillblock chain ${folder} shows the disks`,
    );
  }
  const json = options.json === true;
  const progress = makeProgress(json);
  const observer = observe(json, progress);
  try {
    const found = await prepareRestore(folder, mappings, options.at, observer);
    progress.stop();
    const agreed = await agree(found, options);
    if (agreed === undefined) {
      return;
    }
    const writing = makeProgress(json);
    try {
      await restore(
        agreed,
        { verify: options.verify, signal: endingSignal(), stallMs: options.timeout * 1000 },
        observe(json, writing),
      );
    } finally {
      writing.stop();
    }
    if (json) {
      printJson({ event: 'done' });
    } else {
      const how = options.verify ? 'written, read back and compared' : 'written, not read back';
      printLine(
        `${agreed.plan.items.map(({ old, target }) => `${old} to ${target.path}`).join(', ')}: ${how}`,
      );
    }
  } finally {
    progress.stop();
  }
}

const AFTER_HELP = `
Shows what will be written where and what is lost by it, and asks. TARGET is a block device,
or a file for a raw image. One that is too small, mounted, in use by LVM, md, device-mapper
or swap, or that holds the chain is refused. All images that are needed are read first:
their SHA-256 must be right. Of a disk whose partitions were pulled one by one, the
partition table is written, too.

Exit codes: 0 done, 1 failed, 2 usage.

Example:
  stillblock restore /backup/web1 --map sda=/dev/vdb --map sdb=/dev/vdc --at tuesday`;

/** `stillblock restore` */
export function restoreCommand(): Command {
  return newCommand('restore', 'write disks back from a chain of images')
    .argument('<DIR>', "the chain's folder")
    .option('--map <DISK=TARGET>', 'what goes where, repeatable', collect)
    .option('--at <CHECKPOINT>', 'as of then (default: the newest)')
    .option('--yes', 'do not ask')
    .option('--dry-run', 'show the plan, write nothing')
    .option('--no-verify', 'do not read back and compare')
    .option('--timeout <SECONDS>', 'how long nothing may move', countOption(1, 86_400), 600)
    .addHelpText('after', AFTER_HELP)
    .action(run);
}
