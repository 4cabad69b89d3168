// SPDX-License-Identifier: Apache-2.0
/** One backup: a snapshot taken, its images served, and all of it released again. */
import { type FileHandle, stat } from 'node:fs/promises';
import { pid } from 'node:process';
import type { Logger } from 'pino';
import { DIRTY_BITMAP_PREFIX } from '../nbd/constants.ts';
import { diskExports, type Export, type ForgetCached, openFileSource } from '../nbd/export.ts';
import type { Extent } from '../nbd/extents.ts';
import type { ListenAddress } from '../nbd/server.ts';
import {
  type BackupDescription,
  type BackupEnded,
  type BackupPhase,
  type DiskChanges,
  type DiskReport,
  type ExportReport,
  NEXT_PHASES,
} from './backup-report.ts';
import type { BackupServer, ServerRequest } from './backup-server.ts';
import type { BackupXml, CheckpointXml } from './backup-xml.ts';
import {
  BlockDevices,
  type DeviceNumber,
  deviceNumber,
  splitDeviceNumber,
} from './block-devices.ts';
import {
  type Checkpoint,
  type CheckpointList,
  type CheckpointStore,
  type DiskHistory,
  judge,
  type StagedCheckpoint,
} from './checkpoints.ts';
import {
  chooseDisks,
  type Disk,
  type DiskNames,
  type DiskRequest,
  deviceNumberOf,
  diskOf,
} from './disks.ts';
import { EXIT, exitCodeOf, explain, reasonWords, StillblockError, usageError } from './errors.ts';
import { beGentle } from './gentle.ts';
import { type Hook, withHooks } from './hooks.ts';
import type { NamedImage } from './image-links.ts';
import { startMetrics } from './metrics.ts';
import { type FileSystem, fileSystemsOn, openFileSystem, readFileSystems } from './mounts.ts';
import {
  type ControlDevice,
  type ImageInfo,
  isNativeError,
  nativeConstants,
  type Snapshot,
  type SnapshotEvent,
  type StorePiece,
} from './native.ts';
import { planRates, RateCaps } from './rates.ts';
import { ReleaseStack } from './release-stack.ts';
import { type Origin, planStores, Store, type StoreRequest } from './store.ts';
import { forecastOverflow, type Sample, type StoreChoice } from './store-policy.ts';

/** How long clients of a failed snapshot are still told EIO before the server goes away. */
const FAILED_GRACE_MS = 5_000;
const NS_PER_MS = 1_000_000;
/** Samples that a forecast looks back on: some five minutes of them. */
const MAX_USES = 32;

/** What writes libvirt's XML of what has come of a request that was made in it. */
export interface XmlEcho {
  readonly backup?: (resolved: Omit<BackupXml, 'warnings' | 'server'>) => string;
  readonly checkpoint?: (resolved: Omit<CheckpointXml, 'warnings'>) => string;
  /** What was accepted and ignored. */
  readonly warnings: readonly string[];
}

/** What the user asked for. */
export interface BackupRequest {
  /** UUID of the backup and of its checkpoint. */
  readonly id: string;
  readonly checkpoint: string;
  /** Whether the checkpoint stays when the snapshot has gone. */
  readonly kept: boolean;
  readonly description: string;
  /** Undefined to have it chosen. */
  readonly store: StoreRequest | undefined;
  /** All tracked devices if there are none. */
  readonly disks: readonly DiskRequest[];
  /** Of which disks the checkpoint is; undefined for all. */
  readonly checkpointDisks: readonly string[] | undefined;
  /** A server of its own; undefined for the one that is there. */
  readonly server: ServerRequest | undefined;
  /** `RATE` and `DISK=RATE`, not read yet. */
  readonly maxRates: readonly string[];
  readonly metrics: ListenAddress | undefined;
  /** A checkpoint since which the changes of every disk must be known. */
  readonly incremental: string | undefined;
  /** Undefined for the configuration's. */
  readonly freezeTimeoutMs: number | undefined;
  readonly echo: XmlEcho;
}

/** Who has backups taken: what they share. */
export interface BackupHost {
  readonly control: ControlDevice;
  readonly checkpoints: CheckpointStore;
  readonly diskNames: DiskNames;
  readonly freezeTimeoutMs: number;
  readonly hooks: readonly Hook[];
  /** Decides where a store comes from that nobody asked for. */
  chooseStore(origins: readonly Origin[], devices: BlockDevices): Promise<StoreChoice>;
  /**
   * Reserves disks, at once, and returns what gives them back.
   *
   * @throws StillblockError if one is in another backup
   */
  claim(disks: readonly Disk[], by: BackupSession): () => void;
  /** Gives images names in /dev, and returns what takes them back. */
  linkImages(checkpoint: string, images: readonly NamedImage[]): Promise<() => Promise<void>>;
  /** The server that is asked for. Whoever got it closes it. */
  serverFor(request: ServerRequest | undefined): Promise<BackupServer>;
}

/** Told what happens. */
export interface BackupObserver {
  serving(description: BackupDescription): void;
  /** The snapshot has failed while it was served. */
  failed(error: StillblockError): void;
  storeGrown(sizeBytes: number): void;
  /** The store can't grow, and has so many bytes left. */
  storeLow(leftBytes: number): void;
  /** It was served, and is released. */
  ended(ended: BackupEnded): void;
}

/** The user wants it to end before it was served. */
class Cancelled extends Error {}

interface TakenDisk {
  readonly disk: Disk;
  readonly image: ImageInfo;
}

/** The parts of a snapshot that has been taken. */
interface Taken {
  readonly snapshot: Snapshot;
  readonly disks: readonly TakenDisk[];
}

/** A disk's history as an image has it. */
function historyOf({ name, tracker }: Disk, image: ImageInfo): DiskHistory {
  const { sizeBytes, generation, number } = image;
  const same = tracker.generation === generation;
  return { name, sizeBytes, generation, number, ...(same ? { began: tracker.began } : {}) };
}

function fullRequired(disk: string, checkpoint: string, why: string): StillblockError {
  return new StillblockError(
    'FULL_REQUIRED',
    `disk ${disk} has no increment since checkpoint ${checkpoint}: ${why}`,
    'begin without --incremental and make a full backup',
    { exitCode: EXIT.fullRequired },
  );
}

/** Whom the reason of a failed take is about. */
function explainTake(
  error: unknown,
  disks: readonly Disk[],
  fileSystems: readonly FileSystem[],
  stores: readonly string[],
): StillblockError {
  if (!isNativeError(error)) {
    return explain(error, 'the snapshot');
  }
  if (error.reason.startsWith('STORE_')) {
    return explain(error, stores[error.culprit] ?? 'the store');
  }
  if (error.reason.startsWith('FREEZE_') || error.reason === 'ALREADY_FROZEN') {
    return explain(error, fileSystems[error.culprit]?.mounts[0]?.mountPoint ?? 'a disk');
  }
  return explain(error, disks[error.culprit]?.path ?? 'the snapshot');
}

/** A backup from its begin to its end. Runs once. */
export class BackupSession {
  readonly #request: BackupRequest;
  readonly #host: BackupHost;
  readonly #observer: BackupObserver;
  readonly #log: Logger;
  #server: BackupServer | undefined;
  readonly #stack = new ReleaseStack();
  #phase: BackupPhase = 'preparing';
  #snapshot: Snapshot | undefined;
  #store: Store | undefined;
  #storeChoice: StoreChoice | undefined;
  /** Of the store, lately. */
  #uses: readonly Sample[] = [];
  /** What the store can become, bytes. */
  #storeLimitBytes = 0;
  readonly #cancel = new AbortController();
  #growing: Promise<void> | undefined;
  /** Name of the module's reason, once the snapshot has failed. */
  #failure: string | undefined;
  #served = false;
  #endRequested = false;
  #wake: (() => void) | undefined;
  #released!: () => void;
  readonly #whenReleased = new Promise<void>((resolve) => {
    this.#released = resolve;
  });
  #taken: readonly TakenDisk[] = [];
  #earlier: readonly Checkpoint[] = [];
  #disks: readonly DiskReport[] = [];
  #exports: readonly ExportReport[] = [];
  #broken: CheckpointList['broken'] = [];
  #caps = new RateCaps({ total: undefined, byName: new Map() });
  #forget: ForgetCached | undefined;
  /** What was asked for of each disk that was named. */
  #wanted: ReadonlyMap<DeviceNumber, DiskRequest> = new Map();
  #metrics: string | undefined;

  constructor(request: BackupRequest, host: BackupHost, observer: BackupObserver, log: Logger) {
    this.#request = request;
    this.#host = host;
    this.#observer = observer;
    this.#log = log;
  }

  get checkpoint(): string {
    return this.#request.checkpoint;
  }

  get id(): string {
    return this.#request.id;
  }

  /** The only place where the phase changes; see {@link BackupPhase}. */
  #enter(phase: BackupPhase): void {
    if (!NEXT_PHASES[this.#phase].includes(phase)) {
      throw new Error(`a backup does not go from ${this.#phase} to ${phase}`);
    }
    this.#log.info({ from: this.#phase, to: phase }, 'phase');
    this.#phase = phase;
  }

  /**
   * Takes the snapshot; from then on it is served until {@link requestEnd}, or until it fails.
   *
   * @throws StillblockError if it could not be begun; nothing is left behind
   */
  async begin(): Promise<BackupDescription> {
    try {
      await this.#begin();
    } catch (error) {
      await this.#release();
      const given = error instanceof Cancelled || error === this.#cancel.signal.reason;
      throw given ? cancelled(this.checkpoint) : error;
    }
    this.#untilEnd()
      .then(() => this.#release())
      .catch((err: unknown) => this.#log.error({ err }, 'backup'));
    return this.describe();
  }

  async #release(): Promise<void> {
    this.#enter('ending');
    await this.#stack.release((err) => this.#log.error({ err }, 'release'));
    this.#enter('ended');
    if (this.#served) {
      this.#observer.ended(this.#outcome());
    }
    this.#released();
  }

  /** Lets it end, at the next point where it can. */
  requestEnd(): void {
    this.#endRequested = true;
    this.#cancel.abort();
    this.#wake?.();
  }

  async end(): Promise<BackupEnded> {
    this.requestEnd();
    await this.#whenReleased;
    return this.#outcome();
  }

  #outcome(): BackupEnded {
    const { checkpoint } = this;
    return this.#failure === undefined
      ? { checkpoint, failed: false }
      : { checkpoint, failed: true, reason: this.#failure };
  }

  /**
   * What changed on a disk since a checkpoint, up to this snapshot.
   *
   * @param since undefined for the latest that will do
   * @throws StillblockError if the disk is not in it, or the changes since are not known
   */
  async changes(diskName: string, since: string | undefined): Promise<DiskChanges> {
    const index = this.#taken.findIndex(({ disk }) => disk.name === diskName);
    const found = this.#taken[index];
    const snapshot = this.#snapshot;
    if (found === undefined || snapshot === undefined || this.#phase !== 'serving') {
      throw new StillblockError(
        'NO_BACKUP',
        `disk ${diskName} is in no backup that is served`,
        'begin one: what changed is told as of its instant',
      );
    }
    const { disk, image } = found;
    const checkpoint = this.#earlier.findLast(({ name, ...rest }) =>
      since === undefined
        ? judge({ name, ...rest }, historyOf(disk, image)).kind === 'incremental'
        : name === since,
    );
    if (checkpoint === undefined) {
      throw since === undefined
        ? fullRequired(disk.name, 'any', 'there is no checkpoint of it from before')
        : new StillblockError(
            'NO_CHECKPOINT',
            `there was no checkpoint ${since} before ${this.checkpoint}`,
            'see stillblock checkpoint list',
          );
    }
    const verdict = judge(checkpoint, historyOf(disk, image));
    if (verdict.kind === 'full') {
      throw fullRequired(disk.name, checkpoint.name, verdict.why);
    }
    const extents = await snapshot.changedRanges(index, verdict.number);
    const { sizeBytes, blockSizeBytes } = image;
    return {
      disk: disk.name,
      since: checkpoint.name,
      checkpoint: this.checkpoint,
      sizeBytes,
      blockSizeBytes,
      changedBytes: extents.reduce((sum, { length }) => sum + length, 0),
      extents,
    };
  }

  get #places(): readonly string[] {
    return this.#storeChoice?.request.places ?? [];
  }

  /**
   * Looks how the store fills, for the forecast.
   *
   * @param atMs now, by a clock that never goes back
   */
  async sample(atMs: number): Promise<void> {
    const room = (await this.#store?.roomBytes()) ?? 0;
    if (this.#phase === 'serving' && this.#snapshot !== undefined) {
      const { storeUsedBytes, storeCapacityBytes } = this.#snapshot.state();
      this.#storeLimitBytes = storeCapacityBytes + room;
      const use = { atMs, bytes: storeUsedBytes };
      this.#uses = [...this.#uses.slice(1 - MAX_USES), use];
    }
  }

  describe(): BackupDescription {
    const held = this.#phase === 'serving' || this.#phase === 'failed';
    const state = held ? this.#snapshot?.state() : undefined;
    return {
      id: this.#request.id,
      state: this.#phase,
      checkpoint: this.#request.checkpoint,
      pid,
      ...(this.#failure === undefined ? {} : { reason: this.#failure }),
      ...(state === undefined
        ? {}
        : {
            takenAt: new Date(Number(state.takenNs / BigInt(NS_PER_MS))).toISOString(),
            freezeMs: state.freezeNs / NS_PER_MS,
            gateMs: state.gateNs / NS_PER_MS,
            heldWrites: state.heldWrites,
            store: {
              place: this.#places.join(', '),
              why: this.#storeChoice?.why ?? '',
              capacityBytes: state.storeCapacityBytes,
              usedBytes: state.storeUsedBytes,
              overflowSeconds: forecastOverflow(this.#uses, this.#storeLimitBytes) ?? null,
            },
          }),
      disks: this.#disks,
      exports: this.#exports,
      ...(this.#metrics === undefined ? {} : { metrics: this.#metrics }),
      brokenCheckpoints: this.#broken,
      ...this.#xml(),
    };
  }

  #checkEnd(): void {
    if (this.#endRequested) {
      throw new Cancelled();
    }
  }

  /** Everything up to serving: first all that can go wrong without a snapshot. */
  async #begin(): Promise<void> {
    const { control, diskNames } = this.#host;
    const before = await this.#host.checkpoints.list();
    const devices = await BlockDevices.read();
    const trackers = await control.list();
    const tracked = trackers.map((tracker) => diskOf(tracker, devices, diskNames));
    await this.#settle(before.checkpoints, tracked);
    const earlier = await this.#requireFreeName();
    const wanted = await Promise.all(
      this.#request.disks.map(async (disk) => ({
        ...disk,
        number: await deviceNumberOf(disk.path, tracked),
      })),
    );
    const disks = chooseDisks(trackers, devices, wanted, diskNames);
    this.#wanted = new Map(wanted.map((disk) => [disk.number, disk]));
    this.#requireCheckpointDisks(disks);
    this.#stack.push(this.#host.claim(disks, this));
    this.#requireIncrements(
      earlier,
      disks.map(({ name, number, tracker }) => ({ ...tracker, name, device: number })),
    );
    this.#caps = new RateCaps(
      planRates(
        this.#request.maxRates,
        disks.map(({ name }) => name),
      ),
    );
    const server = await this.#listen();
    await this.#startMetrics(server);
    this.#forget = await beGentle(this.#log);
    const fileSystems = fileSystemsOn(
      disks.map(({ number }) => number),
      await readFileSystems(devices),
      devices,
    );
    this.#requireCounts(disks, fileSystems);
    const pieces = await this.#prepareStore(disks, devices);
    this.#checkEnd();
    const context = {
      checkpoint: this.checkpoint,
      disks: disks.map(({ name }) => name),
    };
    const taken = await withHooks(
      this.#host.hooks,
      context,
      this.#log,
      () => this.#take(control, disks, fileSystems, pieces),
      this.#cancel.signal,
    );
    this.#checkEnd();
    this.#requireIncrements(
      earlier,
      taken.disks.map(({ disk, image }) => ({
        ...historyOf(disk, image),
        device: disk.number,
      })),
    );
    const images = taken.disks.map(({ disk, image }) => ({
      device: image.diskName,
      disk: disk.name,
    }));
    this.#stack.push(await this.#host.linkImages(this.checkpoint, images));
    await this.#serve(taken, earlier, server);
  }

  /** Checkpoints that this snapshot's numbers would be taken for are none from now on. */
  async #settle(checkpoints: readonly Checkpoint[], tracked: readonly Disk[]): Promise<void> {
    const histories = tracked.map(({ name, tracker }) => ({ ...tracker, name }));
    for (const lost of await this.#host.checkpoints.settle(checkpoints, histories)) {
      this.#log.warn({ checkpoint: lost }, 'disks were set back to a state from before it');
    }
  }

  async #requireFreeName(): Promise<readonly Checkpoint[]> {
    const { checkpoint, id } = this.#request;
    this.#stack.push(await this.#host.checkpoints.prepare());
    if (await this.#host.checkpoints.has(checkpoint)) {
      throw new StillblockError(
        'CHECKPOINT_EXISTS',
        `there is a checkpoint ${checkpoint} already`,
        `choose another name, or run stillblock checkpoint delete ${checkpoint}`,
      );
    }
    const { checkpoints, broken } = await this.#host.checkpoints.list();
    this.#broken = broken;
    const same = checkpoints.find((each) => each.id === id);
    if (same !== undefined) {
      throw new StillblockError(
        'CHECKPOINT_EXISTS',
        `checkpoint ${same.name} has the id ${id} already`,
        'ask with a new random UUID, or leave the id out',
      );
    }
    return checkpoints;
  }

  /** The checkpoint since which the changes of a disk must be known. */
  #baseOf(number: DeviceNumber): string | undefined {
    const own = this.#wanted.get(number)?.incremental;
    return own === undefined ? this.#request.incremental : (own ?? undefined);
  }

  #requireIncrements(
    earlier: readonly Checkpoint[],
    disks: readonly (Parameters<typeof judge>[1] & { readonly device: DeviceNumber })[],
  ): void {
    for (const disk of disks) {
      const base = this.#baseOf(disk.device);
      if (base === undefined) {
        continue;
      }
      const checkpoint = earlier.find(({ name }) => name === base);
      const verdict =
        checkpoint === undefined
          ? ({ kind: 'full', why: 'there is no such checkpoint' } as const)
          : judge(checkpoint, disk);
      if (verdict.kind === 'full') {
        throw fullRequired(disk.name, base, verdict.why);
      }
    }
  }

  #requireCheckpointDisks(disks: readonly Disk[]): void {
    const { checkpointDisks } = this.#request;
    const strange = checkpointDisks?.find((name) => !disks.some((disk) => disk.name === name));
    if (strange !== undefined) {
      throw usageError(
        `disk ${strange} of the checkpoint is not in the backup`,
        'leave it out, or have it backed up',
      );
    }
  }

  #requireCounts(disks: readonly Disk[], fileSystems: readonly FileSystem[]): void {
    const { maxTrackers, maxMounts } = nativeConstants();
    if (disks.length > maxTrackers || fileSystems.length > maxMounts) {
      throw new StillblockError(
        'TOO_MANY',
        `${disks.length} devices with ${fileSystems.length} file systems are too many at once`,
        `name at most ${maxTrackers} with ${maxMounts} file systems by --disk`,
      );
    }
  }

  /** Listens before anything is taken: a port in use costs nothing then. */
  async #listen(): Promise<BackupServer> {
    const server = await this.#host.serverFor(this.#request.server);
    this.#server = server;
    this.#stack.push(() => server.close());
    return server;
  }

  async #startMetrics(server: BackupServer): Promise<void> {
    const { metrics: address } = this.#request;
    if (address !== undefined) {
      const metrics = await startMetrics(address, () => ({
        nbd: server.figures(),
        backups: [this.describe()],
      }));
      this.#stack.push(() => metrics.close());
      this.#metrics = metrics.where;
    }
  }

  async #prepareStore(disks: readonly Disk[], devices: BlockDevices): Promise<StorePiece[]> {
    const origins = disks.map(({ number, tracker }) => ({ number, sizeBytes: tracker.sizeBytes }));
    const { store: asked } = this.#request;
    const choice =
      asked === undefined
        ? await this.#host.chooseStore(origins, devices)
        : { request: asked, why: 'it was asked for' };
    const wanted = choice.request;
    this.#storeChoice = choice;
    const plans = await planStores(wanted, origins, devices);
    const { store, pieces } = await Store.prepare(plans, wanted.maxBytes);
    this.#store = store;
    this.#stack.push(() => store.close());
    return pieces;
  }

  async #take(
    control: ControlDevice,
    disks: readonly Disk[],
    fileSystems: readonly FileSystem[],
    pieces: readonly StorePiece[],
  ): Promise<Taken> {
    this.#enter('taking');
    const mounts: FileHandle[] = [];
    let snapshot: Snapshot;
    try {
      for (const fileSystem of fileSystems) {
        mounts.push(await openFileSystem(fileSystem));
      }
      // From here to its answer this process touches no file: file systems are frozen.
      snapshot = await control.take({
        trackers: disks.map(({ tracker }) => tracker.id),
        mounts: mounts.map(({ fd }) => fd),
        stores: pieces,
        freezeTimeoutMs: this.#request.freezeTimeoutMs ?? this.#host.freezeTimeoutMs,
        lowWatermarkBytes: this.#store?.lowWatermarkBytes ?? 0,
      });
    } catch (error) {
      throw explainTake(error, disks, fileSystems, this.#places);
    } finally {
      // Held any longer, they would keep people from unmounting.
      await Promise.all(mounts.map((mount) => mount.close()));
    }
    this.#snapshot = snapshot;
    this.#stack.push(() => snapshot.close());
    // A store that grows right now needs the snapshot until it has.
    this.#stack.push(() => this.#growing);
    snapshot.watch((event) => this.#onEvent(event));
    const images = disks.map((disk, index) => ({ disk, image: snapshot.image(index) }));
    return { snapshot, disks: images };
  }

  /** Writes the checkpoint out. It is kept when serving begins: without that there was no backup. */
  async #stageCheckpoint(
    taken: Taken,
    earlier: readonly Checkpoint[],
  ): Promise<StagedCheckpoint | undefined> {
    const { kept, checkpointDisks } = this.#request;
    if (!kept) {
      return undefined;
    }
    const recorded = taken.disks.filter(
      ({ disk }) => checkpointDisks === undefined || checkpointDisks.includes(disk.name),
    );
    const staged = await this.#host.checkpoints.stage({
      name: this.#request.checkpoint,
      id: this.#request.id,
      description: this.#request.description,
      parent: earlier.at(-1)?.name,
      creationTime: Number(taken.snapshot.state().takenNs / 1_000_000_000n),
      disks: recorded.map(({ disk, image }) => ({
        name: disk.name,
        sizeBytes: image.sizeBytes,
        generation: image.checkpointGeneration,
        number: image.checkpointNumber,
      })),
    });
    this.#stack.push(() => staged.discard());
    return staged;
  }

  async #keepCheckpoint(staged: StagedCheckpoint | undefined): Promise<void> {
    if (staged === undefined) {
      return;
    }
    await staged.commit();
    this.#stack.push(async () => {
      if (!this.#served) {
        await this.#host.checkpoints.delete(this.#request.checkpoint);
      }
    });
  }

  /** From here on a begin fails whose end was asked for, or whose snapshot has failed. */
  #checkHeld(): void {
    this.#checkEnd();
    if (this.#failure !== undefined) {
      throw explainFailure(this.#failure);
    }
  }

  async #serve(taken: Taken, earlier: readonly Checkpoint[], server: BackupServer): Promise<void> {
    const staged = await this.#stageCheckpoint(taken, earlier);
    const reports: DiskReport[] = [];
    const exports: ExportReport[] = [];
    for (const index of taken.disks.keys()) {
      const { report, served } = await this.#serveDisk(taken, index, earlier, server);
      reports.push(report);
      exports.push(...served);
    }
    // Clients are gone before what they read is closed.
    this.#stack.push(() => server.close());
    this.#checkHeld();
    await this.#keepCheckpoint(staged);
    this.#checkHeld();
    this.#taken = taken.disks;
    this.#earlier = earlier;
    this.#disks = reports;
    this.#exports = exports;
    server.checkNames(exports.flatMap(({ uris }) => uris));
    this.#enter('serving');
    this.#served = true;
    this.#observer.serving(this.describe());
  }

  async #serveDisk(
    { snapshot, disks }: Taken,
    index: number,
    earlier: readonly Checkpoint[],
    server: BackupServer,
  ): Promise<{ report: DiskReport; served: ExportReport[] }> {
    const { disk, image } = disks[index] as TakenDisk;
    const path = await imagePath(image);
    const source = await openFileSource(path, this.#forget).catch((error: unknown) => {
      throw explain(error, path);
    });
    this.#stack.push(() => source.close());
    const checkpoints: {
      readonly name: string;
      readonly id: string | undefined;
      readonly dirty: readonly Extent[];
      readonly number: number;
    }[] = [];
    const full: { checkpoint: string; why: string }[] = [];
    for (const checkpoint of earlier) {
      const verdict = judge(checkpoint, historyOf(disk, image));
      if (verdict.kind === 'full') {
        full.push({ checkpoint: checkpoint.name, why: verdict.why });
      } else {
        const dirty = await snapshot.changedRanges(index, verdict.number);
        const { name, id } = checkpoint;
        checkpoints.push({ name, id, dirty, number: verdict.number });
      }
    }
    const { name } = disk;
    const { exportName = name, exportBitmap } = this.#wanted.get(disk.number) ?? {};
    const description = `${disk.path} at checkpoint ${this.#request.checkpoint}`;
    const bandwidth = [...this.#caps.of(name), ...server.bandwidthOf(name)];
    const [whole, ...deltas] = diskExports({
      name: exportName,
      description,
      source,
      checkpoints,
      bandwidth,
    });
    for (const each of [this.#withBitmap(whole, disk, exportBitmap), ...deltas]) {
      server.add(each);
    }
    const { sizeBytes } = image;
    const uris = (exported: string): string[] => server.uris(exported);
    return {
      report: {
        name,
        device: disk.path,
        sizeBytes,
        image: path,
        generation: image.checkpointGeneration,
        number: image.checkpointNumber,
        incremental: checkpoints.map((checkpoint) => checkpoint.name),
        full,
      },
      served: [
        { name: exportName, disk: name, uris: uris(exportName), sizeBytes },
        ...checkpoints.map((checkpoint) => ({
          name: `${exportName}@${checkpoint.name}`,
          disk: name,
          checkpoint: checkpoint.name,
          uris: uris(`${exportName}@${checkpoint.name}`),
          sizeBytes,
          dirtyBytes: checkpoint.dirty.reduce((sum, { length }) => sum + length, 0),
          generation: image.generation,
          number: checkpoint.number,
          ...(checkpoint.id === undefined ? {} : { checkpointId: checkpoint.id }),
        })),
      ],
    };
  }

  /** An export whose changes have the name, too, that libvirt's clients ask for. */
  #withBitmap(whole: Export, { number }: Disk, bitmap: string | undefined): Export {
    const base = this.#baseOf(number);
    const changes = whole.contexts.get(`${DIRTY_BITMAP_PREFIX}${base}`);
    return bitmap === undefined || changes === undefined
      ? whole
      : {
          ...whole,
          contexts: new Map([...whole.contexts, [`${DIRTY_BITMAP_PREFIX}${bitmap}`, changes]]),
        };
  }

  /** libvirt's XML of what is served, if the request was made in it. */
  #xml(): Pick<BackupDescription, 'xml'> {
    const { echo, description } = this.#request;
    const names = this.#taken.map(({ disk }) => disk);
    const incremental = this.#request.incremental;
    if (names.length === 0 || (echo.backup === undefined && echo.checkpoint === undefined)) {
      return {};
    }
    const disks = names.map(({ name, number }) => {
      const base = this.#baseOf(number);
      const { exportName = name, exportBitmap } = this.#wanted.get(number) ?? {};
      const bitmap = base === undefined ? undefined : (exportBitmap ?? `backup-${name}`);
      return {
        name,
        backup: true,
        mode: base === undefined ? ('full' as const) : ('incremental' as const),
        incremental: base,
        exportName,
        exportBitmap: bitmap,
        scratch: undefined,
      };
    });
    const backup = echo.backup?.({ incremental, disks });
    const checkpoint = echo.checkpoint?.({
      name: this.checkpoint,
      description,
      disks: names.map(({ name }) => ({
        name,
        checkpoint: this.#request.checkpointDisks?.includes(name) !== false,
      })),
    });
    return {
      xml: {
        ...(backup === undefined ? {} : { backup }),
        ...(checkpoint === undefined ? {} : { checkpoint }),
        warnings: echo.warnings,
      },
    };
  }

  #onEvent(event: SnapshotEvent): void {
    this.#log.info({ event: event.kind }, 'event');
    switch (event.kind) {
      case 'low-watermark':
        this.#growing ??= this.#grow(event.value).finally(() => {
          this.#growing = undefined;
        });
        break;
      case 'failed':
        this.#onFailed(event.reason);
        break;
      case 'lost':
        // Whatever was lost, a failure still shows in the state.
        this.#checkState();
        break;
      default:
        event satisfies never;
    }
  }

  #checkState(): void {
    const state = this.#phase === 'serving' ? this.#snapshot?.state() : undefined;
    if (state?.state === 'failed') {
      this.#onFailed(state.reason);
    }
  }

  async #grow(leftBytes: number): Promise<void> {
    try {
      const piece = await this.#store?.grow();
      if (piece !== undefined && this.#store !== undefined) {
        await this.#snapshot?.addStore(piece);
        this.#observer.storeGrown(this.#store.sizeBytes);
        return;
      }
    } catch (err) {
      this.#log.warn({ err }, 'the store cannot grow');
    }
    // Of a snapshot that has failed meanwhile nobody needs to hear it.
    if (this.#failure === undefined) {
      this.#observer.storeLow(leftBytes);
    }
  }

  #onFailed(reason: string): void {
    if (this.#failure !== undefined || this.#phase === 'ending' || this.#phase === 'ended') {
      return;
    }
    this.#failure = reason;
    if (this.#phase !== 'serving') {
      // Nobody has been told of it yet: the begin fails.
      return;
    }
    this.#enter('failed');
    this.#server?.fail();
    this.#observer.failed(explainFailure(reason));
    this.#wake?.();
  }

  /** Waits until it is to end: at once when asked to, a little later after a failure. */
  async #untilEnd(): Promise<void> {
    const woken = (): Promise<void> =>
      new Promise((resolve) => {
        this.#wake = resolve;
      });
    if (!this.#endRequested && this.#failure === undefined) {
      await woken();
    }
    if (!this.#endRequested && (this.#server?.connections() ?? 0) > 0) {
      // Pulls shall end with an error of the disk, not of the network.
      const timer = setTimeout(() => this.#wake?.(), FAILED_GRACE_MS);
      await woken();
      clearTimeout(timer);
    }
  }
}

function cancelled(checkpoint: string): StillblockError {
  return new StillblockError(
    'CANCELLED',
    `the backup of checkpoint ${checkpoint} was ended before it was served`,
    'begin again',
  );
}

function explainFailure(reason: string): StillblockError {
  const { message, advice } = reasonWords(reason, 'the snapshot');
  return new StillblockError(reason, message, advice, { exitCode: exitCodeOf(reason) });
}

/** The image's device node, made by devtmpfs before the take returned. */
async function imagePath(image: ImageInfo): Promise<string> {
  const path = `/dev/${image.diskName}`;
  const status = await stat(path).catch(() => undefined);
  const number = deviceNumber(image.major, image.minor);
  if (status?.isBlockDevice() !== true || splitDeviceNumber(status.rdev) !== number) {
    throw new StillblockError(
      'NO_IMAGE_NODE',
      `${path} is not the image's device`,
      'mount devtmpfs on /dev',
    );
  }
  return path;
}
