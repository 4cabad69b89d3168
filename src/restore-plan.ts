// SPDX-License-Identifier: Apache-2.0
/** Decides what a restore writes where, and refuses what would destroy something. */
import { StillblockError, usageError } from './errors.ts';
import type { PartitionTable } from './layout.ts';
import type { ChainEntry, ChainPoint, Manifest } from './manifest.ts';
import { formatSize } from './sizes.ts';

/** `OLD=NEW`: a disk of the chain, and what it is to be written to. */
export interface Mapping {
  readonly old: string;
  readonly target: string;
}

/** What is known of a target before anything is written to it. */
export interface TargetFacts {
  readonly path: string;
  readonly kind: 'device' | 'partition' | 'file' | 'new-file';
  /** What it is, whatever its name: two names of one thing have the same. */
  readonly id: string;
  /** Undefined for a file that is not there yet: it gets the size that it needs. */
  readonly sizeBytes: number | undefined;
  readonly sectorBytes: number;
  /** Where it or a part of it is mounted. */
  readonly mountPoints: readonly string[];
  /** Devices on top of it: volumes, arrays, mappings. */
  readonly holders: readonly string[];
  readonly swap: boolean;
  /** Somebody has it open for himself alone. */
  readonly held: boolean;
  readonly readOnly: boolean;
  /** It is the chain, or what the chain lies on. */
  readonly isSource: boolean;
  /** What is on it, in words; empty for nothing. */
  readonly contents: string;
}

/** A piece of a target that gets an image. */
export interface RestorePiece {
  readonly entry: ChainEntry;
  /** Within the target, bytes. */
  readonly offset: number;
}

/** One target. */
export interface RestoreItem {
  readonly old: string;
  readonly target: TargetFacts;
  /** The table that is written first; undefined where it is part of the image. */
  readonly table: PartitionTable | undefined;
  readonly pieces: readonly RestorePiece[];
  readonly needBytes: number;
  /** What to know, and to do after it. */
  readonly notes: readonly string[];
}

export interface RestorePlan {
  readonly point: ChainPoint;
  readonly items: readonly RestoreItem[];
}

/**
 * Reads `OLD=NEW`.
 *
 * @throws StillblockError about usage
 */
export function parseMapping(text: string): Mapping {
  const equals = text.indexOf('=');
  if (equals < 1 || equals === text.length - 1) {
    throw usageError(
      `--map ${JSON.stringify(text)} is not OLD=NEW`,
      'write it as --map sda=/dev/vdb: a disk of the chain, and where it goes',
    );
  }
  return { old: text.slice(0, equals), target: text.slice(equals + 1) };
}

function namesOf(point: ChainPoint): string {
  return point.entries.map(({ disk }) => disk).join(', ');
}

/**
 * The point that is restored: the newest unless another is named.
 *
 * @throws StillblockError if there is none
 */
export function choosePoint(manifest: Manifest, at: string | undefined): ChainPoint {
  const point =
    at === undefined
      ? manifest.points.at(-1)
      : manifest.points.find(({ checkpoint }) => checkpoint === at);
  if (point === undefined) {
    const names = manifest.points.map(({ checkpoint }) => checkpoint).join(', ');
    throw new StillblockError(
      'NO_POINT',
      at === undefined ? 'nothing was pulled yet' : `the chain has no checkpoint ${at}`,
      names === '' ? 'run stillblock pull first' : `choose one of: ${names}`,
    );
  }
  return point;
}

/** What a disk of the chain consists of: its image, or a table and images of partitions. */
export interface RestoreSource {
  readonly old: string;
  readonly table: PartitionTable | undefined;
  readonly pieces: readonly RestorePiece[];
  readonly needBytes: number;
  readonly notes: readonly string[];
  /** Unit of the disk's own numbers, where it is known. */
  readonly sectorBytes: number | undefined;
}

/** The end of a table's last partition with the copy of the GPT behind it, bytes. */
function tableEnd(table: PartitionTable): number {
  const end = Math.max(0, ...table.partitions.map((part) => part.startSector + part.sectors));
  return (end + (table.label === 'gpt' ? 33 : 0)) * table.sectorBytes;
}

/** @throws StillblockError if the point has neither the disk nor partitions of it */
export function findSource(manifest: Manifest, point: ChainPoint, old: string): RestoreSource {
  const entry = point.entries.find(({ disk }) => disk === old);
  if (entry !== undefined) {
    const device = point.layout?.devices.find(({ name }) => name === old);
    return {
      old,
      table: undefined,
      pieces: [{ entry, offset: 0 }],
      needBytes: entry.sizeBytes,
      notes: [],
      sectorBytes: device?.sectorBytes,
    };
  }
  const table = point.layout?.partitionTables.find(({ disk }) => disk === old);
  const pieces = (table?.partitions ?? []).flatMap((partition) => {
    const image = point.entries.find(({ disk }) => disk === partition.name);
    const offset = partition.startSector * (table?.sectorBytes ?? 512);
    return image === undefined ? [] : [{ entry: image, offset }];
  });
  if (table === undefined || pieces.length === 0) {
    const elsewhere = manifest.points.findLast(({ entries }) =>
      entries.some(({ disk }) => disk === old),
    );
    throw new StillblockError(
      'NO_DISK',
      `checkpoint ${point.checkpoint} has no disk ${old}`,
      elsewhere === undefined
        ? `it has: ${namesOf(point)}`
        : `its newest image is of ${elsewhere.checkpoint}: --at ${elsewhere.checkpoint}`,
    );
  }
  const images = new Set(pieces.map((piece) => piece.entry.disk));
  const missing = table.partitions.filter(({ name }) => !images.has(name)).map(({ name }) => name);
  return {
    old,
    table,
    pieces,
    needBytes: tableEnd(table),
    notes: [
      ...(missing.length === 0
        ? []
        : [`no image of ${missing.join(', ')}: what is in their place stays`]),
      'partitions were pulled, not the disk: a boot loader outside of them has to be installed again',
    ],
    sectorBytes: table.sectorBytes,
  };
}

function refuse(code: string, what: string, advice: string): StillblockError {
  return new StillblockError(code, what, advice);
}

/** @throws StillblockError if a target must not be written to */
function requireTarget(source: RestoreSource, target: TargetFacts): void {
  const { path } = target;
  if (target.isSource) {
    throw refuse('TARGET_IS_SOURCE', `${path} holds the chain itself`, 'name another target');
  }
  if (target.mountPoints.length > 0) {
    const places = target.mountPoints.join(', ');
    throw refuse('TARGET_MOUNTED', `${path} is mounted at ${places}`, 'unmount it first');
  }
  if (target.swap) {
    throw refuse('TARGET_SWAP', `${path} is swapped to`, 'run swapoff for it first');
  }
  if (target.holders.length > 0) {
    throw refuse(
      'TARGET_IN_USE',
      `${path} is part of ${target.holders.join(', ')}`,
      'deactivate that volume group, array, mapping or loop device first',
    );
  }
  if (target.held) {
    throw refuse(
      'TARGET_HELD',
      `another program has ${path} for itself`,
      'end it: see fuser or lsof',
    );
  }
  if (target.readOnly) {
    throw refuse('TARGET_READ_ONLY', `${path} cannot be written to`, 'name another target');
  }
  if (target.sizeBytes !== undefined && target.sizeBytes < source.needBytes) {
    const [has, needs] = [formatSize(target.sizeBytes), formatSize(source.needBytes)];
    throw refuse(
      'TARGET_TOO_SMALL',
      `${path} has ${has} (${target.sizeBytes} bytes), and ${source.old} needs ${needs} (${source.needBytes})`,
      'name a larger target',
    );
  }
  if (source.table !== undefined) {
    if (target.kind === 'partition') {
      throw refuse(
        'TARGET_IS_PARTITION',
        `${path} is a partition, and gets a partition table`,
        'name a whole disk',
      );
    }
    if (source.table.sectorBytes !== target.sectorBytes) {
      throw refuse(
        'TARGET_SECTORS',
        `${path} has sectors of ${target.sectorBytes} bytes, and the partition table counts in ${source.table.sectorBytes}`,
        'name a disk with the same sectors',
      );
    }
  }
}

function targetNotes(source: RestoreSource, target: TargetFacts): string[] {
  const notes: string[] = [];
  const { sectorBytes } = source;
  if (sectorBytes !== undefined && sectorBytes !== target.sectorBytes) {
    notes.push(
      `its sectors have ${target.sectorBytes} bytes, and those of ${source.old} had ${sectorBytes}: its partition table may not be understood`,
    );
  }
  const isLarger = target.sizeBytes !== undefined && target.sizeBytes > source.needBytes;
  if (isLarger && source.pieces[0]?.entry.identity.kind === 'gpt') {
    notes.push(`it is larger: sfdisk --relocate gpt-bak-std ${target.path} moves the spare GPT`);
  }
  return notes;
}

/**
 * Makes a plan of sources and targets, in the order of the mappings.
 *
 * @throws StillblockError that says what is wrong with a target
 */
export function planRestore(
  point: ChainPoint,
  pairs: readonly { readonly source: RestoreSource; readonly target: TargetFacts }[],
): RestorePlan {
  const items = pairs.map(({ source, target }, index) => {
    const other = pairs.slice(0, index).find((pair) => pair.target.id === target.id);
    if (other !== undefined) {
      throw refuse(
        'TARGET_TWICE',
        `${target.path} is to get both ${other.source.old} and ${source.old}`,
        'name a target for each',
      );
    }
    requireTarget(source, target);
    const { old, table, pieces, needBytes } = source;
    const notes = [...source.notes, ...targetNotes(source, target)];
    return { old, target, table, pieces, needBytes, notes };
  });
  return { point, items };
}
