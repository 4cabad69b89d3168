// SPDX-License-Identifier: Apache-2.0
/**
 * Checkpoints: named points in the change histories of disks. Each is kept as one
 * file of libvirt's `<domaincheckpoint>` XML. What libvirt has no word for, the
 * generation and the number of each disk's change history, stands in attributes of
 * our own namespace:
 *
 *     <domaincheckpoint xmlns:stillblock="urn:stillblock:checkpoint:1" stillblock:id="5d2c…">
 *       <name>tuesday</name>
 *       <parent><name>monday</name></parent>
 *       <creationTime>1767225600</creationTime>
 *       <disks>
 *         <disk name="sda" checkpoint="bitmap" bitmap="tuesday" size="1073741824"
 *           stillblock:generation="8f14e45f-…" stillblock:number="3"/>
 *       </disks>
 *     </domaincheckpoint>
 */
import { open, readdir, readFile, rename, rm, stat } from 'node:fs/promises';
import { join } from 'node:path';
import { type X2jOptions, XMLParser, XMLValidator } from 'fast-xml-parser';
import { isDiskName } from './block-devices.ts';
import { explain, historyWords, StillblockError, usageError } from './errors.ts';
import { checkpointFolder, type Folders, makeFolder } from './folders.ts';
import { writeXml } from './xml-writer.ts';

/** A disk at the instant of a checkpoint. */
export interface CheckpointDisk {
  readonly name: string;
  readonly sizeBytes: number;
  /** UUID of the change history that the number belongs to. */
  readonly generation: string;
  /** Blocks that are marked with a higher number have changed since. */
  readonly number: number;
}

export interface Checkpoint {
  readonly name: string;
  /** UUID: names and numbers come again where a machine is set back to an earlier state. */
  readonly id: string | undefined;
  readonly description: string;
  /** The checkpoint before this one, if there was any. */
  readonly parent: string | undefined;
  /** Seconds since 1970. */
  readonly creationTime: number;
  readonly disks: readonly CheckpointDisk[];
}

/** A disk as it is now, or as a snapshot has it. */
export interface DiskHistory {
  readonly name: string;
  readonly sizeBytes: number;
  readonly generation: string;
  readonly number: number;
  /** Why the generation began, by name, if that is known. */
  readonly began?: string;
}

/** Whether what changed on a disk since a checkpoint is known. */
export type Verdict =
  | { readonly kind: 'incremental'; readonly number: number }
  | { readonly kind: 'full'; readonly why: string };

const NAMESPACE = 'urn:stillblock:checkpoint:1';
/** A checkpoint of 64 disks takes 20 KiB; more is not ours. */
const MAX_FILE_BYTES = 1024 * 1024;
const NAME = /^[a-zA-Z0-9_-][a-zA-Z0-9_.-]*$/;
/** A file name holds 255 bytes, suffix and all. */
const MAX_NAME_LENGTH = 200;
/** Of a file that is written, and not shown yet. */
const STAGED_SUFFIX = '.xml.new';
/** Generation of a disk that was set back to before the checkpoint: it has no history there. */
const SET_BACK = '00000000-0000-0000-0000-000000000000';
/** As {@link randomUUID} of Node writes one. */
export const UUID: RegExp = /^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/;

/** Whether a text is the name of a checkpoint, as libvirt allows them. */
export function isCheckpointName(text: string): boolean {
  return NAME.test(text) && text.length <= MAX_NAME_LENGTH;
}

/** @throws StillblockError about usage if a text is no name of a checkpoint */
export function requireCheckpointName(text: string): string {
  if (!isCheckpointName(text)) {
    throw usageError(
      `${JSON.stringify(text)} cannot name a checkpoint`,
      `use letters, digits, '_', '-' and '.', not first, at most ${MAX_NAME_LENGTH}`,
    );
  }
  return text;
}

/**
 * Decides whether changes since a checkpoint can be told for a disk. In doubt a full
 * copy is required.
 *
 * @param disk the disk now, or in a snapshot taken after the checkpoint
 */
export function judge(checkpoint: Checkpoint, disk: DiskHistory): Verdict {
  // A disk is its history: under another name it is still the same.
  const known =
    checkpoint.disks.find(({ generation }) => generation === disk.generation) ??
    checkpoint.disks.find(({ name }) => name === disk.name);
  if (known === undefined) {
    return { kind: 'full', why: 'the checkpoint does not contain this disk' };
  }
  if (known.generation === SET_BACK) {
    return { kind: 'full', why: 'the disk was set back to a state from before the checkpoint' };
  }
  if (known.generation !== disk.generation) {
    const why = 'the tracking of changes began anew after the checkpoint';
    const { began = 'FIRST' } = disk;
    return {
      kind: 'full',
      why: began === 'FIRST' ? why : `${why}: ${historyWords(began).message}`,
    };
  }
  if (known.sizeBytes !== disk.sizeBytes) {
    return { kind: 'full', why: 'the disk had another size at the checkpoint' };
  }
  if (isAhead(known, disk)) {
    return { kind: 'full', why: 'the disk was set back to a state from before the checkpoint' };
  }
  return { kind: 'incremental', number: known.number };
}

/** Whether a disk's history has not come to a checkpoint's instant: the next has its number. */
function isAhead(known: CheckpointDisk, disk: DiskHistory): boolean {
  return known.generation === disk.generation && known.number >= disk.number;
}

/**
 * Disks that were set back, together with their history, to a state from before a checkpoint.
 * Their next numbers are those of such checkpoints, which must not be taken for one another.
 *
 * @param disks all that are tracked
 * @returns the checkpoint as it is from now on, for ever; undefined if there is no such disk
 */
export function afterSetBack(
  checkpoint: Checkpoint,
  disks: readonly DiskHistory[],
): Checkpoint | undefined {
  const isLost = (known: CheckpointDisk): boolean => disks.some((disk) => isAhead(known, disk));
  return checkpoint.disks.some(isLost)
    ? {
        ...checkpoint,
        disks: checkpoint.disks.map((known) =>
          isLost(known) ? { ...known, generation: SET_BACK } : known,
        ),
      }
    : undefined;
}

/** Writes a checkpoint as XML. */
export function formatCheckpoint(checkpoint: Checkpoint): string {
  const { name, id, description, parent, creationTime, disks } = checkpoint;
  return writeXml({
    domaincheckpoint: {
      '@xmlns:stillblock': NAMESPACE,
      ...(id === undefined ? {} : { '@stillblock:id': id }),
      name,
      ...(description === '' ? {} : { description }),
      ...(parent === undefined ? {} : { parent: { name: parent } }),
      creationTime: String(creationTime),
      disks: {
        disk: disks.map((disk) => ({
          '@name': disk.name,
          '@checkpoint': 'bitmap',
          '@bitmap': name,
          '@size': String(disk.sizeBytes),
          '@stillblock:generation': disk.generation,
          '@stillblock:number': String(disk.number),
        })),
      },
    },
  });
}

const PARSING = {
  ignoreAttributes: false,
  attributeNamePrefix: '@',
  parseTagValue: false,
  parseAttributeValue: false,
  ignoreDeclaration: true,
  isArray: (_name, path) => path === 'domaincheckpoint.disks.disk',
} satisfies X2jOptions;

function bad(problem: string): StillblockError {
  return new StillblockError(
    'BAD_CHECKPOINT',
    `not a checkpoint: ${problem}`,
    'restore the file from a copy, or delete the checkpoint',
  );
}

/** An element's children and attributes, none of them unknown. */
function members<Key extends string>(
  value: unknown,
  element: string,
  known: readonly Key[],
): Readonly<Partial<Record<Key, unknown>>> {
  if (typeof value !== 'object' || value === null || Array.isArray(value)) {
    throw bad(`<${element}> is missing, empty, or there twice`);
  }
  const names: readonly string[] = known;
  const unknown = Object.keys(value).find((key) => !names.includes(key));
  if (unknown !== undefined) {
    throw bad(`<${element}> has an unknown ${unknown.replace('@', 'attribute ')}`);
  }
  return value as Readonly<Partial<Record<Key, unknown>>>;
}

function text(value: unknown, what: string): string {
  if (typeof value !== 'string') {
    throw bad(`${what} is missing, or there twice`);
  }
  return value;
}

function count(value: unknown, what: string): number {
  const digits = text(value, what);
  const number = Number(digits);
  // One way to write each: leading zeros are not ours.
  if (!/^(0|[1-9]\d*)$/.test(digits) || !Number.isSafeInteger(number)) {
    throw bad(`${what} is not a number`);
  }
  return number;
}

function parseDisk(value: unknown, checkpoint: string): CheckpointDisk {
  const disk = members(value, 'disk', [
    '@name',
    '@checkpoint',
    '@bitmap',
    '@size',
    '@stillblock:generation',
    '@stillblock:number',
  ]);
  const name = text(disk['@name'], "a disk's name");
  if (!isDiskName(name)) {
    throw bad(`${JSON.stringify(name)} cannot name a disk`);
  }
  if (disk['@checkpoint'] !== 'bitmap' || disk['@bitmap'] !== checkpoint) {
    throw bad(`disk ${name} does not belong to it`);
  }
  const generation = text(disk['@stillblock:generation'], `the generation of disk ${name}`);
  if (!UUID.test(generation)) {
    throw bad(`the generation of disk ${name} is not a UUID`);
  }
  return {
    name,
    sizeBytes: count(disk['@size'], `the size of disk ${name}`),
    generation,
    number: count(disk['@stillblock:number'], `the number of disk ${name}`),
  };
}

/**
 * Reads a checkpoint. Input that is not exactly what {@link formatCheckpoint} could
 * have written, apart from order and white space, is refused.
 *
 * @throws StillblockError that says what is wrong with it
 */
export function parseCheckpoint(xml: string): Checkpoint {
  if (Buffer.byteLength(xml) > MAX_FILE_BYTES) {
    throw bad('the file is too large');
  }
  // Entities of a document's own are how XML blows up.
  if (/<!(DOCTYPE|ENTITY)/i.test(xml)) {
    throw bad('it declares a document type');
  }
  const valid = XMLValidator.validate(xml);
  if (valid !== true) {
    throw bad(valid.err.msg);
  }
  let document: unknown;
  try {
    document = new XMLParser(PARSING).parse(xml);
  } catch (error) {
    throw bad(error instanceof Error ? error.message : String(error));
  }
  const { domaincheckpoint } = members(document, 'domaincheckpoint', ['domaincheckpoint']);
  const root = members(domaincheckpoint, 'domaincheckpoint', [
    '@xmlns:stillblock',
    '@stillblock:id',
    'name',
    'description',
    'parent',
    'creationTime',
    'disks',
  ]);
  if (root['@xmlns:stillblock'] !== NAMESPACE) {
    throw bad('it was not made by this version of stillblock');
  }
  const name = text(root.name, 'the name');
  if (!isCheckpointName(name)) {
    throw bad(`${JSON.stringify(name)} cannot name a checkpoint`);
  }
  const id = root['@stillblock:id'];
  if (id !== undefined && !UUID.test(text(id, 'the id'))) {
    throw bad('its id is not a UUID');
  }
  const parent = root.parent === undefined ? {} : members(root.parent, 'parent', ['name']);
  const { disk } = members(root.disks, 'disks', ['disk']);
  if (!Array.isArray(disk)) {
    throw bad('it has no disks');
  }
  const disks = disk.map((entry) => parseDisk(entry, name));
  if (new Set(disks.map((entry) => entry.name)).size !== disks.length) {
    throw bad('a disk is there twice');
  }
  return {
    name,
    id: id === undefined ? undefined : text(id, 'the id'),
    description: root.description === undefined ? '' : text(root.description, 'description'),
    parent: parent.name === undefined ? undefined : text(parent.name, "the parent's name"),
    creationTime: count(root.creationTime, 'the creation time'),
    disks,
  };
}

/** Oldest first; of two in one second the one that is the other's parent. */
function byAge(a: Checkpoint, b: Checkpoint): number {
  return (
    a.creationTime - b.creationTime || Number(a.parent === b.name) - Number(b.parent === a.name)
  );
}

/**
 * Puts the next older one in the place of a parent that was deleted. Files stay as they were
 * written: a deletion that had to change others as well could be cut short between them.
 */
function chain(checkpoints: readonly Checkpoint[]): Checkpoint[] {
  const names = new Set(checkpoints.map(({ name }) => name));
  return checkpoints.map((checkpoint, index) => {
    const { parent } = checkpoint;
    return parent === undefined || names.has(parent)
      ? checkpoint
      : { ...checkpoint, parent: checkpoints[index - 1]?.name };
  });
}

/** A file among the checkpoints that is none. */
export interface BrokenCheckpoint {
  readonly name: string;
  readonly problem: string;
}

/** All checkpoints, oldest first, and what is broken. */
export interface CheckpointList {
  readonly checkpoints: readonly Checkpoint[];
  readonly broken: readonly BrokenCheckpoint[];
}

function codeOf(error: unknown): string | undefined {
  return error instanceof Error && 'code' in error ? String(error.code) : undefined;
}

/** A checkpoint that is on the disk, and not one of those that are kept. */
export interface StagedCheckpoint {
  /** Keeps it: after this it survives a crash. */
  commit(): Promise<void>;
  /** Removes it, unless it was committed. */
  discard(): Promise<void>;
}

/** The checkpoints that are kept. */
export class CheckpointStore {
  readonly #folder: string;

  constructor(folders: Folders) {
    this.#folder = checkpointFolder(folders);
  }

  #file(name: string): string {
    return join(this.#folder, `${requireCheckpointName(name)}.xml`);
  }

  /** Whether there is one of this name, be it broken. */
  async has(name: string): Promise<boolean> {
    try {
      await stat(this.#file(name));
      return true;
    } catch (error) {
      if (codeOf(error) === 'ENOENT' || codeOf(error) === 'ENOTDIR') {
        return false;
      }
      throw explain(error, this.#file(name));
    }
  }

  /** @throws StillblockError if there is none of this name, or it is broken */
  async read(name: string): Promise<Checkpoint> {
    const file = this.#file(name);
    let xml: string;
    try {
      xml = await readFile(file, 'utf8');
    } catch (error) {
      if (codeOf(error) === 'ENOENT') {
        throw new StillblockError(
          'NO_CHECKPOINT',
          `there is no checkpoint ${name}`,
          'see stillblock checkpoint list',
          { cause: error },
        );
      }
      throw explain(error, file);
    }
    try {
      const checkpoint = parseCheckpoint(xml);
      if (checkpoint.name !== name) {
        throw bad(`it is named ${checkpoint.name}`);
      }
      return checkpoint;
    } catch (error) {
      if (error instanceof StillblockError) {
        throw new StillblockError(error.code, `${file}: ${error.message}`, error.advice);
      }
      throw error;
    }
  }

  async list(): Promise<CheckpointList> {
    let files: string[];
    try {
      files = await readdir(this.#folder);
    } catch (error) {
      if (codeOf(error) === 'ENOENT') {
        return { checkpoints: [], broken: [] };
      }
      throw explain(error, this.#folder);
    }
    const checkpoints: Checkpoint[] = [];
    const broken: BrokenCheckpoint[] = [];
    const names = files.filter((file) => file.endsWith('.xml')).map((file) => file.slice(0, -4));
    // Others are not ours: no checkpoint has such a name.
    for (const name of names.filter(isCheckpointName).sort()) {
      try {
        checkpoints.push(await this.read(name));
      } catch (error) {
        broken.push({ name, problem: error instanceof Error ? error.message : String(error) });
      }
    }
    checkpoints.sort(byAge);
    return { checkpoints: chain(checkpoints), broken };
  }

  /**
   * Makes the folder, so that nothing but the file is missing later.
   *
   * @returns what removes it again, if it was made and is empty
   */
  prepare(): Promise<() => Promise<void>> {
    return makeFolder(this.#folder);
  }

  /**
   * Writes a checkpoint out without showing it: what is left then is one rename.
   *
   * @returns the checkpoint, to be committed or discarded
   */
  async stage(checkpoint: Checkpoint): Promise<StagedCheckpoint> {
    const file = this.#file(checkpoint.name);
    const temporary = join(this.#folder, `.${checkpoint.name}${STAGED_SUFFIX}`);
    const discard = (): Promise<void> => rm(temporary, { force: true });
    try {
      await this.#writeOut(temporary, formatCheckpoint(checkpoint));
    } catch (error) {
      await discard();
      throw explain(error, file);
    }
    return {
      commit: async () => {
        try {
          await rename(temporary, file);
          await this.#syncFolder();
        } catch (error) {
          throw explain(error, file);
        }
      },
      discard,
    };
  }

  /**
   * Keeps a checkpoint: after this it survives a crash, and before it nothing of it
   * is visible.
   */
  async write(checkpoint: Checkpoint): Promise<void> {
    const staged = await this.stage(checkpoint);
    try {
      await staged.commit();
    } catch (error) {
      await staged.discard();
      throw error;
    }
  }

  /**
   * Has checkpoints say for ever that a disk was set back to a state from before them. To be
   * called before each snapshot, whose numbers would be theirs.
   *
   * @param checkpoints as they were before the disks were looked at: one that another snapshot
   *   makes meanwhile would look as if it was ahead
   * @param disks all that are tracked
   * @returns names of those that say so now
   */
  async settle(
    checkpoints: readonly Checkpoint[],
    disks: readonly DiskHistory[],
  ): Promise<readonly string[]> {
    const lost: string[] = [];
    for (const checkpoint of checkpoints) {
      const after = afterSetBack(checkpoint, disks);
      if (after !== undefined) {
        await this.write(after);
        lost.push(after.name);
      }
    }
    return lost;
  }

  /** Removes what a process that was killed has staged. Nobody else may be staging. */
  async removeStaged(): Promise<void> {
    const files = await readdir(this.#folder).catch(() => []);
    for (const file of files.filter((name) => /^\..*\.xml\.new$/.test(name))) {
      await rm(join(this.#folder, file), { force: true });
    }
  }

  async #writeOut(path: string, xml: string): Promise<void> {
    const handle = await open(path, 'w', 0o600);
    try {
      await handle.writeFile(xml);
      await handle.sync();
    } finally {
      await handle.close();
    }
  }

  async #syncFolder(): Promise<void> {
    const handle = await open(this.#folder, 'r');
    try {
      await handle.sync();
    } finally {
      await handle.close();
    }
  }

  /** @throws StillblockError if there is none */
  async delete(name: string): Promise<void> {
    try {
      await rm(this.#file(name));
      await this.#syncFolder();
    } catch (error) {
      if (codeOf(error) === 'ENOENT') {
        throw new StillblockError(
          'NO_CHECKPOINT',
          `there is no checkpoint ${name}`,
          'see stillblock checkpoint list',
          { cause: error },
        );
      }
      throw explain(error, name);
    }
  }
}
