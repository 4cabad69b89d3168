// SPDX-License-Identifier: Apache-2.0
/**
 * The addon, typed. The only file that loads it: what the kernel module's header
 * numbers and lays out is known to the addon alone, which is compiled with it.
 */
import { createRequire } from 'node:module';
import type { Extent } from '../nbd/extents.ts';
import { installed } from './installation.ts';

/** What the module's header fixes. */
export interface NativeConstants {
  /** Version of the interface that this addon was compiled with. */
  readonly abi: number;
  /** Path of the control device. */
  readonly device: string;
  readonly maxTrackers: number;
  readonly maxMounts: number;
  readonly maxStores: number;
  readonly maxExtents: number;
  readonly maxNumber: number;
  readonly maxFreezeMs: number;
  /** Names of all reasons, by number, such as `STORE_FULL`. */
  readonly reasons: readonly string[];
  /** Names of why a change history began, or will not be kept, by number, such as `NOT_SAVED`. */
  readonly histories: readonly string[];
}

/** A failed call into the kernel. */
export interface NativeError extends Error {
  /** Name of the errno, such as `EBUSY`. */
  readonly code: string;
  /** Negative errno, as in Node's own errors. */
  readonly errno: number;
  readonly syscall: string;
  /** Name of the module's reason; `NONE` if it gave none. */
  readonly reason: string;
  /** Index of the tracker, mount or store that the reason is about. */
  readonly culprit: number;
  /** Why a file can't be a store, such as `SHARED`. */
  readonly refusal?: string;
}

/** Whether an error is the addon's. */
export function isNativeError(error: unknown): error is NativeError {
  return error instanceof Error && 'reason' in error && 'culprit' in error && 'errno' in error;
}

/** The module that is loaded. */
export interface ModuleInfo {
  readonly abi: number;
  readonly chunkSizeBytes: number;
  readonly version: string;
}

/** A tracked device. */
export interface Tracker {
  readonly id: bigint;
  readonly major: number;
  readonly minor: number;
  readonly sizeBytes: number;
  /** Unit of change tracking, bytes. */
  readonly blockSizeBytes: number;
  readonly inSnapshot: boolean;
  /** The device has another size than its history: the next take begins a new one. */
  readonly resized: boolean;
  /** The device is gone: all that is left is to detach it. */
  readonly gone: boolean;
  /** Its history was kept over a reboot, and taken up. */
  readonly takenUp: boolean;
  /** Why its history began, by name. */
  readonly began: string;
  /** Why its history will not be kept over a reboot, by name; `OK` if it will. */
  readonly kept: string;
  /** UUID of the change history. */
  readonly generation: string;
  /** What changes are marked with now. */
  readonly number: number;
  readonly writes: number;
  readonly heldWrites: number;
}

/** An image of a snapshot. */
export interface ImageInfo {
  /** The origin's tracker. */
  readonly tracker: bigint;
  readonly major: number;
  readonly minor: number;
  readonly sizeBytes: number;
  readonly blockSizeBytes: number;
  /** UUID that the numbers of its change map belong to. */
  readonly generation: string;
  /** The highest number in its change map. */
  readonly number: number;
  /** What a checkpoint of this instant records. */
  readonly checkpointGeneration: string;
  /** What a checkpoint of this instant records. */
  readonly checkpointNumber: number;
  /** The image is `/dev/` and this. */
  readonly diskName: string;
}

/** How a snapshot does. */
export interface SnapshotState {
  readonly state: 'held' | 'failed';
  /** Name of the reason when failed, else `NONE`. */
  readonly reason: string;
  readonly imageCount: number;
  /** Nanoseconds since 1970. */
  readonly takenNs: bigint;
  /** How long file systems were frozen, nanoseconds. */
  readonly freezeNs: number;
  /** How long writes were held for the switch, nanoseconds. */
  readonly gateNs: number;
  readonly storeCapacityBytes: number;
  readonly storeUsedBytes: number;
  /** Writes that had to wait since the take. */
  readonly heldWrites: number;
}

/** What happens to a snapshot by itself. */
export type SnapshotEvent =
  | { readonly kind: 'low-watermark'; readonly value: number; readonly timeNs: bigint }
  | { readonly kind: 'failed'; readonly reason: string; readonly timeNs: bigint }
  | { readonly kind: 'lost'; readonly value: number; readonly timeNs: bigint };

/** A file that is ready to be a store: allocated in full, its place on the device known. */
export interface StoreFile {
  readonly sizeBytes: number;
  /** Of the device that it lies on. */
  readonly major: number;
  readonly minor: number;
  /** Lets go of the file; one that has no name is gone then. */
  close(): Promise<void>;
}

/** A piece of difference storage: a prepared file, or so many bytes of memory. */
export type StorePiece = StoreFile | number;

/** Where change histories are kept over a reboot. */
export interface PlaceState {
  readonly set: boolean;
  /** Nobody can move, change or remove it. */
  readonly held: boolean;
  /** What is wrong with it, by name; `OK` for nothing. */
  readonly history: string;
  /** Room for maps, one byte per block of each device. */
  readonly capacityBytes: number;
  readonly usedBytes: number;
}

/** What one take needs. Stacked devices and file systems come top down. */
export interface TakeRequest {
  /** Ids of trackers. */
  readonly trackers: readonly bigint[];
  /** One open descriptor on each file system to freeze. */
  readonly mounts: readonly number[];
  readonly stores: readonly StorePiece[];
  /** Deadline for all freezes together, milliseconds; 0 lets the module choose. */
  readonly freezeTimeoutMs: number;
  /** Free store under which a `low-watermark` event comes, bytes. */
  readonly lowWatermarkBytes: number;
}

interface NativeStoreFile extends StoreFile {
  extents(): Float64Array;
}

interface NativeSnapshot {
  state(): SnapshotState;
  image(index: number): ImageInfo;
  changedRanges(index: number, number: number): Promise<Float64Array>;
  watch(callback: (event: SnapshotEvent) => void): void;
  addStore(store: StorePiece): Promise<void>;
  close(): Promise<void>;
}

interface NativeControl {
  info(): ModuleInfo;
  list(): Promise<Tracker[]>;
  attach(path: string, blockSizeBytes: number): Promise<bigint>;
  detach(id: bigint): Promise<void>;
  mark(id: bigint, offset: number, length: number): Promise<void>;
  place(
    what: 'query' | 'drop' | 'refuse' | 'set' | 'format',
    file: StoreFile | null,
  ): Promise<PlaceState>;
  identity(path: string): string;
  take(request: TakeRequest): Promise<NativeSnapshot>;
  tryLock(): boolean;
  close(): void;
}

/** An export as the native engine takes it over. */
export interface NativeExport {
  /** Duplicated: the caller may close his. */
  readonly fd: number;
  readonly sizeBytes: number;
  /** What was read is to be forgotten by the page cache. */
  readonly forget: boolean;
  /** By id: of each run where it starts, and its flags. Shared, so not to be changed. */
  readonly contexts: readonly { readonly starts: Float64Array; readonly flags: Uint32Array }[];
  /** Id of `base:allocation`, if it is among them. */
  readonly allocation?: number;
  /** See {@link Bandwidth}; shared. */
  readonly caps: readonly {
    readonly paidUntilNs: BigInt64Array;
    readonly bytesPerSecond: number;
  }[];
}

/** What the native engine tells, on the main thread. */
export type NativeEngineEvent =
  | {
      readonly kind: 'closed';
      readonly id: number;
      readonly reason?: string;
      readonly peersFault: boolean;
    }
  | {
      readonly kind: 'readFailed';
      readonly id: number;
      readonly code: string;
      readonly offset: number;
      readonly length: number;
    }
  | { readonly kind: 'exportGone'; readonly id: number };

/** Threads that serve sockets; ids are of connections, or of exports. */
export interface NativeEngine {
  addExport(served: NativeExport): number;
  /** Once to have it go, and once more after `exportGone`, which lets go of its arrays. */
  removeExport(id: number): void;
  failExport(id: number): void;
  figures(id: number): Float64Array;
  /** Takes over a duplicate of the socket. `headers`: 0 simple, 1 structured, 2 extended. */
  adopt(
    fd: number,
    served: number,
    headers: 0 | 1 | 2,
    contextIds: readonly number[],
    received: Buffer,
    tls?: object,
  ): number;
  drain(id: number): void;
  destroy(id: number): void;
  bytesInFlight(): number;
  /** Whether the process is to go on for its sake; at first it is not. */
  keepAlive(wanted: boolean): void;
  close(): Promise<void>;
}

/** Limits of `nbd/limits.ts`, and whether io_uring may be used. */
export type NativeEngineOptions = Readonly<
  Record<
    | 'requestsInFlight'
    | 'connectionBytesInFlight'
    | 'bytesInFlight'
    | 'pieceBytes'
    | 'statusExtents'
    | 'readBytes'
    | 'idleBufferBytes'
    | 'drainMs',
    number
  >
> & { readonly ring: boolean };

interface Addon {
  readonly Engine: new (
    options: NativeEngineOptions,
    onEvent: (event: NativeEngineEvent) => void,
  ) => NativeEngine;
  /** Absent where Node hides its OpenSSL. */
  readonly TlsContext?: new (
    credentials: NativeTlsCredentials,
  ) => object;
  readonly TlsSession?: new (context: object) => NativeTlsSession;
  readonly constants: NativeConstants;
  openControl(): NativeControl;
  createStore(folder: string, sizeBytes: number): Promise<NativeStoreFile>;
  openStore(path: string, sizeBytes: number): Promise<NativeStoreFile>;
  dataRanges(fd: number, sizeBytes: number): Promise<Float64Array>;
  forgetCached(fd: number, ranges: Float64Array): Promise<void>;
  yieldIo(): void;
  notifyService(socket: string, text: string): void;
}

let loaded: Addon | undefined;

/** Loads the addon when it is first needed, so that what needs none works without it. */
function addon(): Addon {
  // The other one is instrumented; see scripts/sanitize.sh.
  const path = process.env['STILLBLOCK_ADDON'] ?? installed('build/native/stillblock.node');
  loaded ??= createRequire(path)(path) as Addon;
  return loaded;
}

function toExtents(pairs: Float64Array): Extent[] {
  const extents: Extent[] = [];
  for (let index = 0; index + 1 < pairs.length; index += 2) {
    extents.push({ offset: pairs[index] ?? 0, length: pairs[index + 1] ?? 0 });
  }
  return extents;
}

/** @returns the constants of the module's header */
export function nativeConstants(): NativeConstants {
  return addon().constants;
}

/** The module's control device. Whoever opened it closes it. */
export class ControlDevice {
  readonly #native: NativeControl;

  private constructor(native: NativeControl) {
    this.#native = native;
  }

  /** @throws NativeError `ENOENT` if the module is not loaded, `EACCES` if one may not */
  static open(): ControlDevice {
    return new ControlDevice(addon().openControl());
  }

  info(): ModuleInfo {
    return this.#native.info();
  }

  list(): Promise<readonly Tracker[]> {
    return this.#native.list();
  }

  /**
   * Begins to track a device.
   *
   * @param blockSizeBytes unit of change tracking; 0 lets the module choose
   * @returns the tracker's id
   */
  attach(path: string, blockSizeBytes: number): Promise<bigint> {
    return this.#native.attach(path, blockSizeBytes);
  }

  /** @returns where histories are kept, and how full it is */
  place(): Promise<PlaceState> {
    return this.#native.place('query', null);
  }

  /**
   * Keeps histories over reboots in a file or on a device; if it is the place already, it is
   * held fast from now on.
   *
   * @param format begin with an empty one: what lay there is lost
   * @throws NativeError whose `refusal` is what is wrong with what lies there
   */
  setPlace(file: StoreFile, format: boolean): Promise<PlaceState> {
    return this.#native.place(format ? 'format' : 'set', file);
  }

  /** Keeps histories no longer. */
  dropPlace(): Promise<PlaceState> {
    return this.#native.place('drop', null);
  }

  /** Keeps histories no longer: the place lies above a tracked device. */
  refusePlace(): Promise<PlaceState> {
    return this.#native.place('refuse', null);
  }

  /** @returns what tells a device from all others in every boot; empty for none */
  identity(path: string): string {
    return this.#native.identity(path);
  }

  /** Ends the tracking of a device, and with it its change history. */
  detach(id: bigint): Promise<void> {
    return this.#native.detach(id);
  }

  /**
   * Calls a range of a tracked device changed, as of now: for changes that no write
   * told of, such as those of a passthrough command.
   *
   * @param offset bytes
   * @param length bytes, at least 1; rounded outward to tracking blocks
   * @throws NativeError with `ERANGE` beyond the device's end
   */
  mark(id: bigint, offset: number, length: number): Promise<void> {
    return this.#native.mark(id, offset, length);
  }

  /** Takes one snapshot of several devices at one instant. */
  async take(request: TakeRequest): Promise<Snapshot> {
    return new Snapshot(await this.#native.take(request));
  }

  /**
   * Locks the device against others that lock it, until it is closed, however this
   * process ends.
   *
   * @returns false if somebody else has the lock
   */
  tryLock(): boolean {
    return this.#native.tryLock();
  }

  /** Lets go of the device; snapshots stay. */
  close(): void {
    this.#native.close();
  }
}

/** A held snapshot. It ends when it is closed, or when this process ends. */
export class Snapshot {
  readonly #native: NativeSnapshot;

  /** Only {@link ControlDevice.take} makes one. */
  constructor(native: NativeSnapshot) {
    this.#native = native;
  }

  state(): SnapshotState {
    return this.#native.state();
  }

  /** @param index the tracker's place in the take */
  image(index: number): ImageInfo {
    return this.#native.image(index);
  }

  /**
   * What changed in an image's origin from a checkpoint of the same generation up
   * to the snapshot, in whole blocks, cut at the end of the device.
   *
   * @param number the checkpoint's number
   * @returns ranges in order that neither touch nor overlap
   */
  async changedRanges(index: number, number: number): Promise<readonly Extent[]> {
    return toExtents(await this.#native.changedRanges(index, number));
  }

  /** Has each event told to a function, until the snapshot is closed. Once per snapshot. */
  watch(callback: (event: SnapshotEvent) => void): void {
    this.#native.watch(callback);
  }

  /** Gives the snapshot more room. */
  addStore(store: StorePiece): Promise<void> {
    return this.#native.addStore(store);
  }

  /** Ends the snapshot. Settles when it is gone and no operation uses it; safe to repeat. */
  close(): Promise<void> {
    return this.#native.close();
  }
}

/**
 * Makes a store in a folder: a file without a name, which is gone with its last
 * descriptor, so that not even a crash leaves it behind.
 *
 * @throws NativeError with `refusal` if files there can't be stores, `ENOSPC` if there is no room
 */
export function createStore(folder: string, sizeBytes: number): Promise<StoreFile> {
  return addon().createStore(folder, sizeBytes);
}

/**
 * Makes an existing file ready to be a store: fills its holes, writes it out.
 *
 * @param sizeBytes how much of it; 0 for all of it
 * @throws NativeError with `refusal` if the file can't be one
 */
export function openStore(path: string, sizeBytes: number): Promise<StoreFile> {
  return addon().openStore(path, sizeBytes);
}

/** Where a store's data lies on its device, in the file's order. */
export function storeExtents(store: StoreFile): Extent[] {
  return toExtents((store as NativeStoreFile).extents());
}

/**
 * Where a file has data: everything else in it is holes that read as zeroes. All of
 * it, where the file system or device does not know.
 *
 * @param fd open descriptor, whose file position is moved
 */
export async function dataRanges(fd: number, sizeBytes: number): Promise<readonly Extent[]> {
  return toExtents(await addon().dataRanges(fd, sizeBytes));
}

/**
 * Lets the page cache forget parts of a file or device, as far as nobody else uses them.
 *
 * @param fd open descriptor
 */
export function forgetCached(fd: number, ranges: readonly Extent[]): Promise<void> {
  const pairs = ranges.flatMap(({ offset, length }) => [offset, length]);
  return addon().forgetCached(fd, Float64Array.from(pairs));
}

/**
 * Lets the I/O of everybody else go first, as `ionice -c idle` does, for all threads of
 * this process and those that they start.
 */
export function yieldIo(): void {
  addon().yieldIo();
}

/**
 * Sends the service manager a message, as sd_notify(3) does.
 *
 * @param socket value of `NOTIFY_SOCKET`
 */
export function notifyService(socket: string, text: string): void {
  addon().notifyService(socket, text);
}

/** Starts the threads of an engine. Whoever opened it closes it. */
/** What TLS begins with, PEM; see TlsCredentials in nbd/tls.ts. */
export interface NativeTlsCredentials {
  readonly certificate?: string;
  readonly key?: string;
  /** Clients are asked for a certificate of theirs. */
  readonly authorities?: string;
  readonly revoked?: string;
  readonly ciphers: string;
  readonly suites: string;
  readonly keys?: readonly { readonly user: string; readonly key: Buffer }[];
}

/** Who is on the other side, once the handshake is complete. */
export interface NativeTlsPeer {
  readonly protocol: string;
  readonly cipher: string;
  /** Knows its pre-shared key. */
  readonly user?: string;
  /** DER. */
  readonly certificate?: Buffer;
  /** X509_V_OK is 0. */
  readonly verifyError?: number;
}

/** TLS whose bytes JavaScript carries, until an engine takes it over with its socket. */
export interface NativeTlsSession {
  /** Bytes from the peer. */
  feed(bytes: Buffer): void;
  /** Whether the handshake is complete. Throws why there will be none. */
  accept(): boolean;
  /** What can be decrypted; null at the peer's end, undefined if there is nothing yet. */
  read(): Buffer | null | undefined;
  write(bytes: Buffer): void;
  end(): void;
  /** Bytes for the peer. */
  takeOutput(): Buffer;
  peer(): NativeTlsPeer;
}

/**
 * Makes TLS sessions of the addon's; undefined if this Node hides its OpenSSL.
 *
 * @throws Error if the credentials are no good
 */
export function openTls(credentials: NativeTlsCredentials): (() => NativeTlsSession) | undefined {
  const { TlsContext, TlsSession } = addon();
  if (TlsContext === undefined || TlsSession === undefined) {
    return undefined;
  }
  const context = new TlsContext(credentials);
  return () => new TlsSession(context);
}

export function openEngine(
  options: NativeEngineOptions,
  onEvent: (event: NativeEngineEvent) => void,
): NativeEngine {
  const { Engine } = addon();
  return new Engine(options, onEvent);
}
