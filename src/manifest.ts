// SPDX-License-Identifier: Apache-2.0
/**
 * The manifest of a chain: which file holds which disk at which instant, on top of which
 * other. Reading it proves that it is whole and in order; the files are `chain.ts`'s.
 *
 *     point     monday          tuesday          wednesday
 *     sda       full     ◄───── incremental ◄─── incremental
 *     sdb       full     ◄────────────────────── incremental     (was not there on tuesday)
 */
import { isDiskName } from './block-devices.ts';
import { isCheckpointName } from './checkpoints.ts';
import type { DiskIdentity } from './disk-identity.ts';
import { StillblockError } from './errors.ts';
import type { MachineLayout } from './layout.ts';

const FORMAT = 'stillblock-chain';
/** Raised when an older program would misunderstand what is written. */
const VERSION = 1;

/** A disk at one instant. */
export interface ChainEntry {
  readonly disk: string;
  readonly sizeBytes: number;
  readonly kind: 'full' | 'incremental';
  /** In the chain's folder. */
  readonly file: string;
  /** The file that an incremental is on top of: that of the disk's entry before it. */
  readonly backing: string | null;
  /** The checkpoint of that entry. */
  readonly parent: string | null;
  readonly fileBytes: number;
  readonly sha256: string;
  /** The file's size and times when it was hashed: the same again spares hashing it again. */
  readonly stamp: string;
  /** UUID of the server's change history and the number in it, where the server told. */
  readonly generation: string | null;
  readonly number: number | null;
  /** UUID of the checkpoint there, where the server told. */
  readonly checkpointId: string | null;
  readonly identity: DiskIdentity;
  /** Compared with the server's image, byte by byte, while that was held. */
  readonly verified: boolean;
}

/** One instant of a machine. */
export interface ChainPoint {
  readonly checkpoint: string;
  /** ISO 8601; null where the server did not tell. */
  readonly takenAt: string | null;
  readonly pulledAt: string;
  /** Of the machine at that instant, where the server told. */
  readonly layout: MachineLayout | null;
  readonly entries: readonly ChainEntry[];
}

export interface Manifest {
  /** UUID of the chain. */
  readonly chain: string;
  /** `/etc/machine-id` of the machine whose disks these are; null where it is not known. */
  readonly machine: string | null;
  /** Oldest first. */
  readonly points: readonly ChainPoint[];
}

function bad(what: string): StillblockError {
  return new StillblockError(
    'BAD_MANIFEST',
    `the manifest is broken: ${what}`,
    'restore manifest.json from a copy; the images beside it are not touched',
  );
}

/** Reads members of JSON objects and says where one is wrong. */
class Reader {
  readonly #value: object;
  readonly #where: string;

  constructor(value: unknown, where: string) {
    if (typeof value !== 'object' || value === null || Array.isArray(value)) {
      throw bad(`${where} is no object`);
    }
    this.#value = value;
    this.#where = where;
  }

  member(name: string): unknown {
    return (this.#value as Record<string, unknown>)[name];
  }

  text(name: string, isRight: (text: string) => boolean = () => true): string {
    const value = this.member(name);
    if (typeof value !== 'string' || !isRight(value)) {
      throw bad(`${this.#where} has no proper ${name}`);
    }
    return value;
  }

  textOrNull(name: string): string | null {
    return this.member(name) === null ? null : this.text(name);
  }

  count(name: string): number {
    const value = this.member(name);
    if (!Number.isSafeInteger(value) || (value as number) < 0) {
      throw bad(`${this.#where} has no proper ${name}`);
    }
    return value as number;
  }

  /** Only shown, and asked for its partition tables, so what is in it is not checked here. */
  layout(name: string): MachineLayout | null {
    const value = this.member(name);
    if (typeof value !== 'object') {
      throw bad(`${this.#where} has no proper ${name}`);
    }
    return value as MachineLayout | null;
  }

  list(name: string): readonly unknown[] {
    const value = this.member(name);
    if (!Array.isArray(value)) {
      throw bad(`${this.#where} has no list of ${name}`);
    }
    return value;
  }
}

const SHA256 = /^[0-9a-f]{64}$/;
/** Files never lie outside the chain's folder. */
const FILE = /^[A-Za-z0-9_+-][A-Za-z0-9_.+@-]*\.qcow2$/;

function readEntry(value: unknown, where: string): ChainEntry {
  const reader = new Reader(value, where);
  const backing = reader.textOrNull('backing');
  const kind = reader.text('kind');
  if (kind !== 'full' && kind !== 'incremental') {
    throw bad(`${where} is neither full nor incremental`);
  }
  const identity = new Reader(reader.member('identity'), `the identity in ${where}`);
  return {
    disk: reader.text('disk', isDiskName),
    sizeBytes: reader.count('sizeBytes'),
    kind,
    file: reader.text('file', (text) => FILE.test(text)),
    backing,
    parent: reader.textOrNull('parent'),
    fileBytes: reader.count('fileBytes'),
    sha256: reader.text('sha256', (text) => SHA256.test(text)),
    stamp: reader.text('stamp'),
    generation: reader.textOrNull('generation'),
    number: reader.member('number') === null ? null : reader.count('number'),
    // Chains that are older than these have none.
    checkpointId:
      reader.member('checkpointId') === undefined ? null : reader.textOrNull('checkpointId'),
    identity: {
      kind: identity.textOrNull('kind'),
      id: identity.textOrNull('id'),
    },
    verified: reader.member('verified') === true,
  };
}

function readPoint(value: unknown, index: number): ChainPoint {
  const where = `point ${index + 1}`;
  const reader = new Reader(value, where);
  return {
    checkpoint: reader.text('checkpoint', isCheckpointName),
    takenAt: reader.textOrNull('takenAt'),
    pulledAt: reader.text('pulledAt'),
    layout: reader.layout('layout'),
    entries: reader
      .list('entries')
      .map((entry, at) => readEntry(entry, `disk ${at + 1} of ${where}`)),
  };
}

function wrongOrder(entry: ChainEntry, point: ChainPoint, what: string): StillblockError {
  return new StillblockError(
    'CHAIN_ORDER',
    `the chain is out of order: ${entry.disk} at ${point.checkpoint} ${what}`,
    'restore manifest.json from a copy, or pull with --full into an empty folder',
  );
}

/** @throws StillblockError unless each entry is on top of the one before it of its disk */
function requireOrder(points: readonly ChainPoint[]): void {
  const tips = new Map<string, { point: ChainPoint; entry: ChainEntry }>();
  const files = new Set<string>();
  const checkpoints = new Set<string>();
  for (const point of points) {
    if (checkpoints.has(point.checkpoint)) {
      throw bad(`checkpoint ${point.checkpoint} is there twice`);
    }
    checkpoints.add(point.checkpoint);
    const here = new Set<string>();
    for (const entry of point.entries) {
      const tip = tips.get(entry.disk);
      if (files.has(entry.file) || here.has(entry.disk)) {
        throw bad(`${entry.file} or its disk is there twice`);
      }
      if (entry.kind === 'full' && (entry.backing !== null || entry.parent !== null)) {
        throw wrongOrder(entry, point, 'is full, and yet on top of something');
      }
      if (
        entry.kind === 'incremental' &&
        (tip === undefined ||
          entry.backing !== tip.entry.file ||
          entry.parent !== tip.point.checkpoint)
      ) {
        throw wrongOrder(
          entry,
          point,
          tip === undefined
            ? 'is an increment of nothing'
            : `is not on top of ${tip.entry.file} of ${tip.point.checkpoint}`,
        );
      }
      if (entry.kind === 'incremental' && entry.sizeBytes !== tip?.entry.sizeBytes) {
        throw wrongOrder(entry, point, 'has another size than what it is on top of');
      }
      files.add(entry.file);
      here.add(entry.disk);
      tips.set(entry.disk, { point, entry });
    }
  }
}

/**
 * Reads a manifest.
 *
 * @throws StillblockError `BAD_MANIFEST`, `NEWER_MANIFEST` or `CHAIN_ORDER`
 */
export function parseManifest(text: string): Manifest {
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch {
    throw bad('it is no JSON');
  }
  const reader = new Reader(value, 'it');
  reader.text('format', (format) => format === FORMAT);
  const version = reader.count('version');
  if (version > VERSION) {
    throw new StillblockError(
      'NEWER_MANIFEST',
      `the chain was written by a newer stillblock (format ${version})`,
      'use that, or a later one',
    );
  }
  const points = reader.list('points').map(readPoint);
  requireOrder(points);
  return { chain: reader.text('chain'), machine: reader.textOrNull('machine'), points };
}

/** Writes a manifest, for people, too. */
export function formatManifest(manifest: Manifest): string {
  return `${JSON.stringify({ format: FORMAT, version: VERSION, ...manifest }, null, 2)}\n`;
}

/** The newest entry of a disk, and its point. */
export function tipOf(
  manifest: Manifest,
  disk: string,
): { readonly point: ChainPoint; readonly entry: ChainEntry } | undefined {
  for (const point of manifest.points.toReversed()) {
    const entry = point.entries.find((each) => each.disk === disk);
    if (entry !== undefined) {
      return { point, entry };
    }
  }
  return undefined;
}

/** An entry and everything beneath it, itself first. */
export function entriesBeneath(manifest: Manifest, entry: ChainEntry): readonly ChainEntry[] {
  const all = manifest.points.flatMap(({ entries }) => entries);
  const found: ChainEntry[] = [];
  for (let next: ChainEntry | undefined = entry; next !== undefined; ) {
    found.push(next);
    const { backing }: ChainEntry = next;
    next = all.find(({ file }) => file === backing);
  }
  return found;
}
