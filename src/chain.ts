// SPDX-License-Identifier: Apache-2.0
/**
 * A folder with one chain of qcow2 files per disk, and its manifest:
 *
 *     manifest.json      which file is what; written last, it makes a pull complete
 *     sda.0001.qcow2     never changed again once the manifest names it
 *     sda.0002.qcow2     on top of it
 *     pull.json          only while a pull runs, or after one was killed: what it makes
 *
 * The life of a pull in the folder; whatever ends it early leads back to where it began,
 * at the latest when the next one opens the folder:
 *
 *     idle ──► begun (pull.json) ──► files written ──► committed (manifest.json) ─┐
 *      ▲             │                     │                                      │
 *      │             └─────────────────────┴► discarded: files removed ───────────┤
 *      └───────────── forgotten: pull.json removed, once the snapshot is let go ◄─┘
 */
import { createHash } from 'node:crypto';
import { constants } from 'node:fs';
import { type FileHandle, lstat, mkdir, open, readdir, readFile, rm, stat } from 'node:fs/promises';
import { createServer, type Server } from 'node:net';
import { join, resolve } from 'node:path';
import { replaceFile, syncPath } from './durable.ts';
import { explain, StillblockError } from './errors.ts';
import {
  type ChainEntry,
  type ChainPoint,
  formatManifest,
  type Manifest,
  parseManifest,
} from './manifest.ts';
import { parseQcow2Header, QCOW2_HEADER_BYTES } from './qcow2-header.ts';

const MANIFEST = 'manifest.json';
const JOURNAL = 'pull.json';
/** A point of 64 disks takes 40 KiB without its layout. */
const MAX_MANIFEST_BYTES = 256 * 1024 * 1024;
/** Reads while hashing, bytes. */
const HASH_BYTES = 1024 * 1024;

/** What a pull is about to make. */
export interface Journal {
  readonly checkpoint: string;
  /** Files of the folder that are its own until it is committed. */
  readonly files: readonly string[];
  /** The server's snapshot that it holds or has asked for, for who finds it dead. */
  readonly snapshot: string | null;
}

/** What became of a pull that did not end by itself. */
export interface Recovery {
  readonly checkpoint: string;
  /** Whether its point is in the chain; else the chain is as it was before. */
  readonly complete: boolean;
  /** See {@link Journal}. */
  readonly snapshot: string | null;
}

function codeOf(error: unknown): string | undefined {
  return error instanceof Error && 'code' in error ? String(error.code) : undefined;
}

/**
 * Reads a folder's manifest.
 *
 * @throws StillblockError `NO_CHAIN`, `BAD_MANIFEST`, `NEWER_MANIFEST`, `CHAIN_ORDER`
 */
export async function readManifest(folder: string): Promise<Manifest> {
  const path = join(folder, MANIFEST);
  try {
    const { size } = await stat(path);
    if (size > MAX_MANIFEST_BYTES) {
      throw new StillblockError('BAD_MANIFEST', `${path} is too large`, 'restore it from a copy');
    }
    return parseManifest(await readFile(path, 'utf8'));
  } catch (error) {
    if (codeOf(error) === 'ENOENT' || codeOf(error) === 'ENOTDIR') {
      throw new StillblockError(
        'NO_CHAIN',
        `there is no chain in ${folder}`,
        'name the folder that stillblock pull wrote to',
        { cause: error },
      );
    }
    throw explain(error, path);
  }
}

function stampOf(status: { size: bigint; mtimeNs: bigint; ctimeNs: bigint; ino: bigint }): string {
  return [status.size, status.mtimeNs, status.ctimeNs, status.ino].join(':');
}

async function hashFile(handle: FileHandle): Promise<string> {
  const hash = createHash('sha256');
  const buffer = Buffer.allocUnsafe(HASH_BYTES);
  for (let at = 0; ; ) {
    const { bytesRead } = await handle.read(buffer, 0, buffer.length, at);
    if (bytesRead === 0) {
      return hash.digest('hex');
    }
    hash.update(buffer.subarray(0, bytesRead));
    at += bytesRead;
  }
}

/** Size of a disk as qcow2 has it: whole sectors. */
function inSectors(sizeBytes: number): number {
  return Math.ceil(sizeBytes / 512) * 512;
}

const RESTORE_FILE = 'restore that file from a copy, or begin a new chain in an empty folder';

/** What a file that is not as the manifest has it is instead. */
async function alteredFile(
  manifest: Manifest,
  entry: ChainEntry,
  handle: FileHandle,
  otherwise: StillblockError,
): Promise<StillblockError> {
  const sha256 = await hashFile(handle);
  const other = manifest.points
    .flatMap(({ entries }) => entries)
    .find((each) => each.sha256 === sha256 && each.file !== entry.file);
  return other === undefined
    ? otherwise
    : new StillblockError(
        'CHAIN_ORDER',
        `the chain is out of order: ${entry.file} holds what belongs into ${other.file}`,
        'give each file its own name back',
      );
}

async function headerProblem(
  entry: ChainEntry,
  handle: FileHandle,
): Promise<StillblockError | undefined> {
  const altered = (what: string): StillblockError =>
    new StillblockError('CHAIN_FILE_ALTERED', `${entry.file} was altered: ${what}`, RESTORE_FILE);
  const bytes = Buffer.alloc(QCOW2_HEADER_BYTES);
  const { bytesRead } = await handle.read(bytes, 0, bytes.length, 0);
  const header = parseQcow2Header(bytes.subarray(0, bytesRead));
  if (typeof header === 'string') {
    return altered(header);
  }
  const backing = header.backing ?? null;
  if (backing !== entry.backing || (backing !== null && header.backingFormat !== 'qcow2')) {
    const [is, expected] = [backing ?? 'nothing', entry.backing ?? 'nothing'];
    return new StillblockError(
      'CHAIN_BACKING',
      `${entry.file} is on top of ${is}, not of ${expected}`,
      RESTORE_FILE,
    );
  }
  return header.sizeBytes === inSectors(entry.sizeBytes)
    ? undefined
    : altered(`its disk has ${header.sizeBytes} bytes, not ${entry.sizeBytes}`);
}

/**
 * Requires that a file of a chain is as the manifest has it.
 *
 * @param hash hash it even if its size and times say that nobody touched it
 * @throws StillblockError `CHAIN_FILE_MISSING`, `CHAIN_FILE_ALTERED`, `CHAIN_BACKING` or
 *   `CHAIN_ORDER`
 */
async function requireFile(
  folder: string,
  manifest: Manifest,
  entry: ChainEntry,
  hash: boolean,
): Promise<void> {
  const path = join(folder, entry.file);
  let handle: FileHandle;
  try {
    handle = await open(path, constants.O_RDONLY | constants.O_NOFOLLOW | constants.O_NONBLOCK);
  } catch (error) {
    if (codeOf(error) === 'ENOENT') {
      throw new StillblockError(
        'CHAIN_FILE_MISSING',
        `${entry.file} of the chain is missing`,
        RESTORE_FILE,
        { cause: error },
      );
    }
    throw explain(error, path);
  }
  try {
    const status = await handle.stat({ bigint: true });
    if (!status.isFile()) {
      throw new StillblockError(
        'CHAIN_FILE_ALTERED',
        `${entry.file} is no plain file`,
        RESTORE_FILE,
      );
    }
    const problem = await headerProblem(entry, handle);
    if (problem !== undefined) {
      throw await alteredFile(manifest, entry, handle, problem);
    }
    const untouched = stampOf(status) === entry.stamp;
    if ((hash || !untouched) && (await hashFile(handle)) !== entry.sha256) {
      const altered = new StillblockError(
        'CHAIN_FILE_ALTERED',
        `${entry.file} was altered: its SHA-256 is another`,
        RESTORE_FILE,
      );
      throw await alteredFile(manifest, entry, handle, altered);
    }
  } finally {
    await handle.close();
  }
}

/**
 * Requires that files of a chain are as the manifest has them; see {@link requireFile}.
 *
 * @param hash hash all of them, rather than those that were touched
 * @param onFile told of each file that is as it should be
 */
export async function requireFiles(
  folder: string,
  manifest: Manifest,
  entries: readonly ChainEntry[],
  hash: boolean,
  onFile: (entry: ChainEntry) => void = () => {},
): Promise<void> {
  for (const entry of entries) {
    await requireFile(folder, manifest, entry, hash);
    onFile(entry);
  }
}

/**
 * Holds a folder for one pull at a time. The lock is the kernel's and goes with its
 * process, however that ends: a name in the abstract namespace of unix sockets.
 */
async function lockFolder(folder: string): Promise<Server> {
  const { dev, ino } = await stat(folder);
  const server = createServer((socket) => socket.destroy());
  await new Promise<void>((done, reject) => {
    server.once('error', (cause: NodeJS.ErrnoException) =>
      reject(
        cause.code === 'EADDRINUSE'
          ? new StillblockError(
              'CHAIN_BUSY',
              `another pull into ${folder} is running`,
              'wait for its end',
              { cause },
            )
          : explain(cause, folder),
      ),
    );
    server.listen(`\0stillblock/chain/${dev}/${ino}`, done);
  });
  server.unref();
  return server;
}

function parseJournal(text: string): Journal {
  const value = JSON.parse(text) as Partial<Journal>;
  if (
    typeof value.checkpoint !== 'string' ||
    !Array.isArray(value.files) ||
    value.files.some((file) => typeof file !== 'string' || file.includes('/'))
  ) {
    throw new SyntaxError('it says not what it made');
  }
  const { checkpoint, files, snapshot = null } = value;
  return { checkpoint, files, snapshot };
}

/** A chain that is being written to. Whoever opened it closes it. */
export class ChainWriter {
  readonly folder: string;
  readonly #lock: Server;
  #manifest: Manifest;
  #journal: Journal | undefined;
  /** What became of the pull before this one, if that was killed. */
  readonly recovery: Recovery | undefined;

  private constructor(
    folder: string,
    lock: Server,
    manifest: Manifest,
    recovery: Recovery | undefined,
  ) {
    this.folder = folder;
    this.#lock = lock;
    this.#manifest = manifest;
    this.recovery = recovery;
  }

  get manifest(): Manifest {
    return this.#manifest;
  }

  /**
   * Opens a folder for a pull, makes it if it is not there, and cleans up after a pull
   * that was killed. Its files are required to be as the manifest has them.
   *
   * @param empty the manifest of a chain that is not there yet
   */
  static async open(folder: string, empty: Manifest): Promise<ChainWriter> {
    const path = resolve(folder);
    try {
      await mkdir(path, { recursive: true, mode: 0o700 });
    } catch (error) {
      throw explain(error, folder);
    }
    const lock = await lockFolder(path);
    try {
      const found = await readManifest(path).catch((error: unknown) => {
        if (error instanceof StillblockError && error.code === 'NO_CHAIN') {
          return undefined;
        }
        throw error;
      });
      const manifest = found ?? empty;
      const recovery = await recover(path, manifest);
      if (found === undefined) {
        await requireEmpty(path);
      }
      const entries = manifest.points.flatMap((point) => point.entries);
      await requireFiles(path, manifest, entries, false);
      return new ChainWriter(path, lock, manifest, recovery);
    } catch (error) {
      lock.close();
      throw error;
    }
  }

  /**
   * Says what will be made. From here until {@link commit} or {@link discard} the files
   * are this pull's.
   *
   * @throws StillblockError if one of them is there already
   */
  async begin(journal: Journal): Promise<void> {
    for (const file of journal.files) {
      const inTheWay = await lstat(join(this.folder, file)).catch(() => undefined);
      if (inTheWay !== undefined) {
        throw new StillblockError(
          'FILE_IN_THE_WAY',
          `${join(this.folder, file)} is there already, and not part of the chain`,
          'move it away',
        );
      }
    }
    try {
      await replaceFile(join(this.folder, JOURNAL), `${JSON.stringify(journal)}\n`);
    } catch (error) {
      throw explain(error, this.folder);
    }
    this.#journal = journal;
  }

  /** Writes a finished file out and tells what the manifest says of it. */
  async seal(file: string): Promise<Pick<ChainEntry, 'fileBytes' | 'sha256' | 'stamp'>> {
    const path = join(this.folder, file);
    try {
      const handle = await open(path, 'r');
      try {
        await handle.sync();
        const sha256 = await hashFile(handle);
        const status = await handle.stat({ bigint: true });
        return { fileBytes: Number(status.size), sha256, stamp: stampOf(status) };
      } finally {
        await handle.close();
      }
    } catch (error) {
      throw explain(error, path);
    }
  }

  /**
   * Makes a point part of the chain: after this it is, whatever happens, and before it is not.
   * Its snapshot is for the next pull to end, until {@link forget}.
   */
  async commit(point: ChainPoint, machine: string | null): Promise<void> {
    const manifest: Manifest = {
      ...this.#manifest,
      machine: this.#manifest.machine ?? machine,
      points: [...this.#manifest.points, point],
    };
    const text = formatManifest(manifest);
    // What could not be read again shall not be written.
    parseManifest(text);
    try {
      // The files' names, before anything refers to them.
      await syncPath(this.folder);
      await replaceFile(join(this.folder, MANIFEST), text);
    } catch (error) {
      throw explain(error, join(this.folder, MANIFEST));
    }
    this.#manifest = manifest;
    if (this.#journal !== undefined) {
      // Its files are the chain's. The next pull, if it finds this one's journal, sees that.
      this.#journal = { ...this.#journal, files: [] };
    }
  }

  /**
   * Removes what this pull has made: the chain is as it was before. Its snapshot is still
   * for the next pull to end, until {@link forget}.
   */
  async discard(): Promise<void> {
    if (this.#journal !== undefined) {
      await removeFiles(this.folder, this.#journal.files);
    }
  }

  /** Forgets this pull, of which nothing is left but what is part of the chain. */
  async forget(): Promise<void> {
    if (this.#journal !== undefined) {
      await removeUncommitted(this.folder, this.#journal);
      this.#journal = undefined;
    }
  }

  close(): Promise<void> {
    return new Promise((done) => {
      this.#lock.close(() => done());
    });
  }
}

async function removeFiles(folder: string, files: readonly string[]): Promise<void> {
  try {
    for (const file of files) {
      await rm(join(folder, file), { force: true });
    }
    await syncPath(folder);
  } catch (error) {
    throw explain(error, folder);
  }
}

async function removeUncommitted(folder: string, journal: Journal): Promise<void> {
  // The journal last: until it is gone, the next pull removes what is left.
  await removeFiles(folder, journal.files);
  try {
    await rm(join(folder, JOURNAL), { force: true });
  } catch (error) {
    throw explain(error, folder);
  }
}

/** Cleans up after a pull that was killed. */
async function recover(folder: string, manifest: Manifest): Promise<Recovery | undefined> {
  const path = join(folder, JOURNAL);
  let journal: Journal;
  try {
    journal = parseJournal(await readFile(path, 'utf8'));
  } catch (error) {
    if (codeOf(error) === 'ENOENT') {
      return undefined;
    }
    if (error instanceof SyntaxError) {
      throw new StillblockError(
        'BAD_JOURNAL',
        `${path} is broken: ${error.message}`,
        'remove it, and images that manifest.json does not name',
        { cause: error },
      );
    }
    throw explain(error, path);
  }
  const { checkpoint, snapshot } = journal;
  const complete = manifest.points.some((point) => point.checkpoint === checkpoint);
  const kept = new Set(manifest.points.flatMap(({ entries }) => entries.map(({ file }) => file)));
  const files = journal.files.filter((file) => !kept.has(file));
  await removeUncommitted(folder, { ...journal, files });
  return { checkpoint, complete, snapshot };
}

/** A new chain begins in an empty folder: anything else may be a chain that lost its manifest. */
async function requireEmpty(folder: string): Promise<void> {
  const ours = [`${MANIFEST}.new`, `${JOURNAL}.new`, 'lost+found'];
  const other = (await readdir(folder)).find((name) => !ours.includes(name));
  if (other !== undefined) {
    throw new StillblockError(
      'NOT_A_CHAIN',
      `${folder} is not empty (${other}), and has no ${MANIFEST}`,
      'name an empty folder, or restore its manifest.json from a copy',
    );
  }
}
