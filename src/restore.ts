// SPDX-License-Identifier: Apache-2.0
/**
 * Writes disks back from a chain:
 *
 *     manifest, files by SHA-256, targets, plan ─► (asked) ─► per target: held for us alone
 *       ─► partition table ─► images ─► written out ─► read back and compared ─► let go
 */
import { spawn } from 'node:child_process';
import { constants } from 'node:fs';
import { type FileHandle, open, stat, truncate } from 'node:fs/promises';
import { join, resolve } from 'node:path';
import { readManifest, requireFiles } from './chain.ts';
import { explain, StillblockError } from './errors.ts';
import { type PartitionTable, parseSfdisk } from './layout.ts';
import { type ChainEntry, entriesBeneath, type Manifest } from './manifest.ts';
import { qemuValue } from './nbd-uri.ts';
import { explainQemuImg, isDifference, qemuImg } from './qemu-img.ts';
import {
  choosePoint,
  findSource,
  type Mapping,
  planRestore,
  type RestoreItem,
  type RestorePiece,
  type RestorePlan,
  type TargetFacts,
} from './restore-plan.ts';
import { targetFacts } from './restore-target.ts';

const SECTOR_BYTES = 512;

export type RestoreStep = 'check' | 'table' | 'write' | 'compare';

/** Told what happens. */
export interface RestoreObserver {
  /** @param fraction of the step, 0 to 1 */
  progress(disk: string, step: RestoreStep, fraction: number, bytes: number): void;
  /** A target is done. */
  restored(item: RestoreItem): void;
  /** Something that does not make the restore wrong, and should be known. */
  note(text: string): void;
}

export interface RestoreOptions {
  readonly verify: boolean;
  readonly signal: AbortSignal;
  readonly stallMs: number;
}

/** A restore that could be carried out. */
export interface PreparedRestore {
  readonly folder: string;
  readonly manifest: Manifest;
  readonly plan: RestorePlan;
}

/**
 * Finds out what is to be done, without writing anything: reads the files that are needed,
 * whose SHA-256 must be right, and looks at the targets.
 *
 * @throws StillblockError if the chain is broken or a target must not be written to
 */
export async function prepareRestore(
  folder: string,
  mappings: readonly Mapping[],
  at: string | undefined,
  observer: RestoreObserver,
): Promise<PreparedRestore> {
  const path = resolve(folder);
  const manifest = await readManifest(path);
  const point = choosePoint(manifest, at);
  const pairs: { source: ReturnType<typeof findSource>; target: TargetFacts }[] = [];
  for (const { old, target } of mappings) {
    const source = findSource(manifest, point, old);
    pairs.push({ source, target: await targetFacts(target, path) });
  }
  const plan = planRestore(point, pairs);
  for (const item of plan.items) {
    const needed = item.pieces.flatMap(({ entry }) => entriesBeneath(manifest, entry));
    const total = needed.reduce((sum, { fileBytes }) => sum + fileBytes, 0);
    let done = 0;
    await requireFiles(path, manifest, needed, true, ({ fileBytes }) => {
      done += fileBytes;
      observer.progress(item.old, 'check', total === 0 ? 1 : done / total, done);
    });
  }
  return { folder: path, manifest, plan };
}

interface Ran {
  readonly code: number | null;
  readonly output: string;
}

function runTool(tool: string, args: readonly string[], input = ''): Promise<Ran> {
  return new Promise((done, reject) => {
    const env = {
      ...process.env,
      LC_ALL: 'C',
      PATH: `${process.env['PATH'] ?? ''}:/usr/sbin:/sbin`,
    };
    const child = spawn(tool, args, { env, stdio: ['pipe', 'pipe', 'pipe'] });
    let output = '';
    for (const stream of [child.stdout, child.stderr]) {
      stream.setEncoding('utf8').on('data', (piece: string) => {
        output += piece;
      });
    }
    child.once('error', (cause) =>
      reject(
        new StillblockError('NO_TOOL', `${tool} cannot be run`, 'install util-linux and fdisk', {
          cause,
        }),
      ),
    );
    child.once('close', (code) => done({ code, output }));
    // One that ends without reading says why.
    child.stdin.on('error', () => {});
    child.stdin.end(input);
  });
}

/** The table as sfdisk takes it for a disk of any size. */
function tableScript({ dump }: PartitionTable): string {
  return dump
    .split('\n')
    .filter((line) => !/^(last-lba|device):/.test(line))
    .join('\n');
}

function samePartitions(a: PartitionTable, b: PartitionTable): boolean {
  const places = (table: PartitionTable): string =>
    table.partitions
      .map(({ startSector, sectors, type, uuid }) => [startSector, sectors, type, uuid].join())
      .join(';');
  return a.label === b.label && a.id === b.id && places(a) === places(b);
}

async function writeTable(path: string, table: PartitionTable): Promise<void> {
  const quiet = ['--quiet', '--no-reread', '--no-tell-kernel', '--lock=no', '--wipe', 'always'];
  const written = await runTool('sfdisk', [...quiet, path], tableScript(table));
  const failed = (why: string): StillblockError =>
    new StillblockError(
      'TABLE_FAILED',
      `the partition table could not be written to ${path}: ${why.trim()}`,
      'look at the end of dmesg; the target is not usable as it is',
    );
  if (written.code !== 0) {
    throw failed(written.output);
  }
  const read = await runTool('sfdisk', ['--json', path]);
  if (read.code !== 0 || !samePartitions(parseSfdisk(table.disk, read.output, ''), table)) {
    throw failed('it reads back otherwise');
  }
}

/** Sizes of images are whole sectors. */
function inSectors(bytes: number): number {
  return Math.ceil(bytes / SECTOR_BYTES) * SECTOR_BYTES;
}

/** A piece of a target as QEMU's options; nothing outside of it can be written through them. */
function targetOptions({ kind, path }: TargetFacts, { entry, offset }: RestorePiece): string {
  const driver = kind === 'device' || kind === 'partition' ? 'host_device' : 'file';
  const size = inSectors(entry.sizeBytes);
  return `driver=raw,offset=${offset},size=${size},file.driver=${driver},file.filename=${qemuValue(resolve(path))}`;
}

function imageOptions(folder: string, { file }: ChainEntry): string {
  return `driver=qcow2,file.driver=file,file.filename=${qemuValue(join(folder, file))}`;
}

/** Has a device's cache emptied, so that reading it back reads the device. */
async function flushDevice({ kind, path }: TargetFacts): Promise<void> {
  if (kind === 'device' || kind === 'partition') {
    await runTool('blockdev', ['--flushbufs', path]);
  }
}

/** Opens a target for us alone; the kernel keeps everybody else from mounting it. */
async function holdTarget(item: RestoreItem): Promise<FileHandle> {
  const { path, kind } = item.target;
  try {
    if (kind !== 'new-file') {
      return await open(path, constants.O_RDWR | constants.O_EXCL | constants.O_NONBLOCK);
    }
    const handle = await open(path, 'wx+', 0o600);
    await handle.truncate(inSectors(item.needBytes));
    return handle;
  } catch (error) {
    if (error instanceof Error && 'code' in error && error.code === 'EBUSY') {
      throw new StillblockError(
        'TARGET_HELD',
        `another program has taken ${path} for itself meanwhile`,
        'end it: see fuser or lsof',
        { cause: error },
      );
    }
    throw explain(error, path);
  }
}

async function writePiece(
  prepared: PreparedRestore,
  item: RestoreItem,
  piece: RestorePiece,
  options: RestoreOptions,
  observer: RestoreObserver,
): Promise<void> {
  const { target } = item;
  const source = imageOptions(prepared.folder, piece.entry);
  const destination = targetOptions(target, piece);
  const { disk, sizeBytes } = piece.entry;
  const run = async (step: RestoreStep, args: readonly string[]): Promise<void> => {
    await qemuImg(args, {
      cwd: prepared.folder,
      signal: options.signal,
      stallMs: options.stallMs,
      target: target.path,
      onProgress: (fraction) =>
        observer.progress(disk, step, fraction, Math.round(fraction * sizeBytes)),
    });
  };
  try {
    await run('write', [
      ...['convert', '-p', '-n', '-m', '8', '-t', 'writeback'],
      ...(target.kind === 'new-file' && item.table === undefined ? ['--target-is-zero'] : []),
      ...['--image-opts', '--target-image-opts', source, destination],
    ]);
    if (options.verify) {
      await flushDevice(target);
      await run('compare', ['compare', '-p', '--image-opts', source, destination]);
    }
  } catch (error) {
    if (isDifference(error)) {
      throw new StillblockError(
        'RESTORE_DIFFERS',
        `${target.path} reads back otherwise than what was written`,
        'look at dmesg: that disk needs attention, and what is on it is not usable',
        { cause: error },
      );
    }
    throw explainQemuImg(error, target.path);
  }
}

async function rereadTable(item: RestoreItem, observer: RestoreObserver): Promise<void> {
  const { path, kind } = item.target;
  if (kind !== 'device') {
    return;
  }
  const { code } = await runTool('blockdev', ['--rereadpt', path]);
  const hasTable =
    item.table !== undefined || ['gpt', 'dos'].includes(item.pieces[0]?.entry.identity.kind ?? '');
  if (code !== 0 && hasTable) {
    observer.note(
      `the kernel has not read the partition table of ${path} again: run partprobe ${path}`,
    );
  }
}

function partlyWritten(error: unknown, path: string): unknown {
  return error instanceof StillblockError
    ? new StillblockError(
        error.code,
        `${error.message} (${path} is partly written)`,
        error.advice,
        { cause: error.cause, exitCode: error.exitCode },
      )
    : error;
}

async function restoreItem(
  prepared: PreparedRestore,
  item: RestoreItem,
  options: RestoreOptions,
  observer: RestoreObserver,
): Promise<void> {
  const { target, table } = item;
  const handle = await holdTarget(item);
  try {
    if (target.kind === 'file' && (await stat(target.path)).size < item.needBytes) {
      throw new StillblockError('TARGET_TOO_SMALL', `${target.path} has shrunk`, 'try again');
    }
    if (table !== undefined) {
      await writeTable(target.path, table);
      observer.progress(item.old, 'table', 1, 0);
    }
    for (const piece of item.pieces) {
      await writePiece(prepared, item, piece, options, observer);
    }
    await handle.sync();
    if (target.kind === 'new-file') {
      await truncate(target.path, item.needBytes);
    }
  } catch (error) {
    throw partlyWritten(error, target.path);
  } finally {
    // The kernel reads no partition table while somebody holds the disk.
    await handle.close();
  }
  await rereadTable(item, observer);
  observer.restored(item);
}

/**
 * Writes what was planned.
 *
 * @throws StillblockError which says what is partly written
 */
export async function restore(
  prepared: PreparedRestore,
  options: RestoreOptions,
  observer: RestoreObserver,
): Promise<void> {
  for (const item of prepared.plan.items) {
    await restoreItem(prepared, item, options, observer);
  }
}
