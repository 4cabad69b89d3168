// SPDX-License-Identifier: Apache-2.0
/**
 * What owns the machine's backups: devices, snapshots, checkpoints and the server that
 * clients pull from. `stillblock serve` runs one for as long as the machine is up; without
 * it each command has one of its own, and a backup ends with the command that began it.
 *
 * Snapshots end with the process. Trackers live in the kernel module, and stay.
 */
import { stat } from 'node:fs/promises';
import { pid } from 'node:process';
import { isDeepStrictEqual } from 'node:util';
import type { Logger } from 'pino';
import type { BackupDescription, BackupEnded, DiskChanges } from './backup-report.ts';
import { type BackupServer, type ServerRequest, SharedServer } from './backup-server.ts';
import { type BlockDevices, type DeviceNumber, splitDeviceNumber } from './block-devices.ts';
import { type CheckpointDetails, describeCheckpoint } from './checkpoint-report.ts';
import { type CheckpointList, CheckpointStore, requireCheckpointName } from './checkpoints.ts';
import { type Configuration, defaultConfiguration, type TlsSettings } from './configuration.ts';
import {
  attachAll,
  type DeviceReport,
  detachAll,
  findDisk,
  listDisks,
  type MarkedRange,
  markRange,
  toDeviceReport,
} from './devices.ts';
import { type Disk, openControl } from './disks.ts';
import { explain, reasonWords, StillblockError } from './errors.ts';
import { EventBus } from './events.ts';
import type { Folders } from './folders.ts';
import { keepHistories, refuseMisplaced } from './history.ts';
import { linkImages, type NamedImage } from './image-links.ts';
import {
  type Measured,
  type MetricsServer,
  type NbdFigures,
  NO_FIGURES,
  startMetrics,
  sumFigures,
} from './metrics.ts';
import type { ControlDevice, ModuleInfo } from './native.ts';
import { ReleaseStack } from './release-stack.ts';
import { type BackupHost, type BackupRequest, BackupSession } from './snapshot-session.ts';
import type { Origin, StoreRequest } from './store.ts';
import { chooseStore, type StoreChoice, WriteHistory } from './store-policy.ts';
import type { TlsPlan } from './tls.ts';

/** Each takes at least one of the module's 64 trackers; this many are more than anybody's. */
const MAX_BACKUPS = 16;

/** How the daemon does. */
export interface DaemonStatus {
  readonly module: ModuleInfo;
  readonly trackedDevices: number;
  /** The process that holds backups; nobody's if none is there that outlives a command. */
  readonly daemon: { readonly pid: number; readonly since: string } | null;
  /** The first of those that run. */
  readonly backup: BackupDescription | null;
  readonly backups: readonly BackupDescription[];
  /** Configured, and not there. */
  readonly missingDevices: readonly string[];
  /**
   * Tracked, and not to be after a reboot as they were before, though they are meant to be;
   * why, by name.
   */
  readonly lostAtReboot: readonly DeviceReason[];
  /** Histories that began anew, and have no checkpoint yet: a full copy is due; why, by name. */
  readonly begunAnew: readonly DeviceReason[];
}

/** A device, and why something is so of its change history, by name. */
export interface DeviceReason {
  readonly device: string;
  readonly reason: string;
}

/** The part of the configuration that a daemon lives by. */
export type DaemonSettings = Pick<
  Configuration,
  | 'devices'
  | 'history'
  | 'nbd'
  | 'store'
  | 'hooks'
  | 'keepCheckpoints'
  | 'freezeTimeoutMs'
  | 'metrics'
  | keyof typeof STARTING
>;

/** Settings that only a start takes up, by their elements. */
const STARTING = { folders: '<folders>', logLevel: '<log>', api: '<api>' } as const;

/** For an image that nobody reads: what overflows it loses nothing. */
const MOMENTARY_STORE: StoreRequest = {
  places: ['memory'],
  sizeBytes: 1024 * 1024,
  maxBytes: undefined,
};
/** A server that nobody reaches. */
const NO_SERVER: ServerRequest = { listen: [], tls: false };

/** How often writes and stores are looked at, and devices that are missing looked for. */
const TICK_MS = 10_000;

/** What the configuration says of TLS, as servers take it. */
function toTlsPlan({ mode, certificates, psk, verifyPeer, insecure, rules }: TlsSettings): TlsPlan {
  const lines = rules.map(({ kind, pattern, export: name }) => {
    const who = { subject: 'subject:', san: '', user: 'psk:' }[kind] + pattern;
    return `${JSON.stringify(who)} ${JSON.stringify(name)}`;
  });
  return {
    mode,
    certificates,
    keys: psk,
    verifyPeer,
    access: undefined,
    rules: lines.length === 0 ? undefined : lines.join('\n'),
    insecure,
  };
}

/** What another process holds, as far as it can be asked. */
export type AskOther = () => Promise<string | undefined>;

export class Daemon implements BackupHost {
  readonly events: EventBus = new EventBus();
  readonly checkpoints: CheckpointStore;
  readonly #log: Logger;
  readonly #run: string;
  readonly #stack = new ReleaseStack();
  readonly #sessions = new Map<string, BackupSession>();
  readonly #claimed = new Map<DeviceNumber, { readonly disk: Disk; readonly by: BackupSession }>();
  readonly #since = new Date();
  #names: ReadonlyMap<DeviceNumber, string> = new Map();
  #missing: readonly string[] = [];
  /** As of the last look, for metrics. */
  #devices: readonly DeviceReport[] = [];
  #settings: DaemonSettings = defaultConfiguration();
  /** Those of the start. */
  #started: DaemonSettings | undefined;
  readonly #writes = new WriteHistory();
  #metrics: { readonly server: MetricsServer; readonly where: string } | undefined;
  #control: ControlDevice | undefined;
  /** The server for backups that ask for none of their own. */
  #shared: { readonly server: SharedServer; readonly settings: string } | undefined;
  readonly #reloads: (() => Promise<void>)[] = [];
  /** All NBD servers. */
  readonly #servers = new Set<SharedServer>();
  /** What servers have counted that are closed: totals never fall. */
  #past: NbdFigures = NO_FIGURES;
  /** Of a daemon that serves one command. */
  readonly #solo: boolean;
  readonly #readSettings: (() => Promise<DaemonSettings>) | undefined;
  #locked = false;

  /**
   * @param solo it lives for one command, and so for one backup
   * @param readSettings reads what is to be in force after a reload
   */
  constructor(
    folders: Folders,
    log: Logger,
    solo: boolean,
    readSettings?: () => Promise<DaemonSettings>,
  ) {
    this.#readSettings = readSettings;
    this.checkpoints = new CheckpointStore(folders);
    this.#run = folders.run;
    this.#log = log;
    this.#solo = solo;
  }

  /** The module, opened when it is first needed: some questions need none. */
  get control(): ControlDevice {
    if (this.#control === undefined) {
      const control = openControl();
      this.#control = control;
      // Last of all, since it ends the lock.
      this.#stack.unshift(() => control.close());
    }
    return this.#control;
  }

  get freezeTimeoutMs(): number {
    return this.#settings.freezeTimeoutMs;
  }

  get hooks(): DaemonSettings['hooks'] {
    return this.#settings.hooks;
  }

  chooseStore(origins: readonly Origin[], devices: BlockDevices): Promise<StoreChoice> {
    const rate = this.#writes.bytesPerSecond(origins.map(({ number }) => number));
    return chooseStore(this.#settings.store, origins, devices, rate);
  }

  get diskNames(): ReadonlyMap<DeviceNumber, string> {
    return this.#names;
  }

  /**
   * Becomes the only one that begins backups, until it is closed.
   *
   * @param other says what the one has that is there already
   */
  async lock(other: AskOther): Promise<void> {
    if (this.#locked) {
      return;
    }
    if (!this.control.tryLock()) {
      const name = await other();
      throw new StillblockError(
        'BACKUP_RUNNING',
        `another backup is running already${name === undefined ? '' : ` (checkpoint ${name})`}`,
        'end it with stillblock backup end first',
      );
    }
    this.#locked = true;
    this.#startTicking();
    await this.checkpoints.removeStaged();
  }

  #startTicking(): void {
    let last = Promise.resolve();
    const tick = (): void => {
      last = last
        .then(() => this.#tick())
        .catch((err: unknown) => this.#log.warn({ err }, 'looking around'));
    };
    const timer = setInterval(tick, TICK_MS).unref();
    tick();
    this.#stack.push(async () => {
      clearInterval(timer);
      await last;
    });
  }

  async #tick(): Promise<void> {
    const now = performance.now();
    await this.#writes.sample(now);
    this.#devices = await this.devices();
    for (const session of this.#sessions.values()) {
      await session.sample(now);
    }
    const missing = this.#missing.length;
    if (missing > 0) {
      await this.#track(this.#settings.devices);
    }
    if (this.#missing.length < missing) {
      // The plan for the next boot names those that were there.
      await this.#keepHistories();
    }
  }

  /** What is configured is in force from now on, as far as it needs no device and no socket. */
  async adopt(settings: DaemonSettings): Promise<void> {
    const names = new Map<DeviceNumber, string>();
    for (const { path, name } of settings.devices) {
      const status = await stat(path).catch(() => undefined);
      if (name !== undefined && status?.isBlockDevice() === true) {
        names.set(splitDeviceNumber(status.rdev), name);
      }
    }
    this.#names = names;
    this.#settings = settings;
    this.#started ??= settings;
  }

  /**
   * Takes up a configuration: tracks its devices, listens where it says.
   *
   * @throws StillblockError if it cannot listen; nothing has changed then
   */
  async configure(settings: DaemonSettings): Promise<void> {
    await this.#listen(settings);
    await this.#serveMetrics(settings);
    await this.adopt(settings);
    await this.#keepHistories();
    await this.#track(settings.devices);
  }

  /** Devices are tracked whether or not their histories can be kept; status and doctor say so. */
  async #keepHistories(): Promise<void> {
    try {
      await keepHistories(this.control, this.#settings, this.#log);
    } catch (err) {
      this.#log.warn({ err }, 'change histories are not kept over a reboot');
    }
  }

  /** A server that other settings made goes when the backups that it serves have ended. */
  async #listen({ nbd }: DaemonSettings): Promise<void> {
    const { listen, tls, rates } = nbd;
    const wanted = JSON.stringify([listen, tls, rates.total, [...rates.byName]]);
    const before = this.#shared;
    if (before?.settings === wanted) {
      return;
    }
    if (before !== undefined && this.#sessions.size > 0) {
      throw new StillblockError(
        'BACKUP_RUNNING',
        'the settings of <nbd> cannot change while a backup is served',
        'end it with stillblock backup end, and reload again',
      );
    }
    const request = { listen, tls: toTlsPlan(tls) };
    if (before !== undefined) {
      await this.#close(before.server);
    }
    this.#shared = undefined;
    try {
      this.#share(await SharedServer.open(request, this.#log, rates), wanted);
    } catch (error) {
      if (before !== undefined) {
        const { listen: back, tls: old, rates: caps } = this.#settings.nbd;
        const again = { listen: back, tls: toTlsPlan(old) };
        this.#share(await SharedServer.open(again, this.#log, caps), before.settings);
      }
      throw error;
    }
  }

  #share(server: SharedServer, settings: string): void {
    this.#servers.add(server);
    this.#shared = { server, settings };
    this.#stack.push(() => server.close());
  }

  async #serveMetrics({ metrics }: DaemonSettings): Promise<void> {
    const wanted = JSON.stringify(metrics);
    if (this.#metrics?.where === wanted) {
      return;
    }
    await this.#metrics?.server.close();
    this.#metrics = undefined;
    if (metrics !== undefined) {
      const server = await startMetrics(metrics, () => this.#measure());
      this.#metrics = { server, where: wanted };
      this.#stack.push(() => server.close());
    }
  }

  #measure(): Measured {
    const all = [...this.#servers].map((server) => server.figures());
    return {
      nbd: sumFigures([this.#past, ...all]),
      backups: this.backups(),
      devices: this.#devices,
    };
  }

  /** Tracks what is configured and there; tells of what is not. */
  async #track(devices: DaemonSettings['devices']): Promise<void> {
    const disks = await listDisks(this.control, this.#names);
    const tracked = new Set(disks.map(({ number }) => number));
    const missing: string[] = [];
    for (const { path, name, blockSizeBytes } of devices) {
      try {
        const number = splitDeviceNumber((await stat(path)).rdev);
        if (!tracked.has(number)) {
          await attachAll(this.control, [path], blockSizeBytes ?? 0);
          this.events.emit({ event: 'device-attached', device: path, name: name ?? path });
        }
      } catch (err) {
        const message = err instanceof Error ? err.message : String(err);
        this.#log.warn({ err, device: path }, 'a configured device is not tracked');
        if (!this.#missing.includes(path)) {
          this.events.emit({ event: 'device-missing', device: path, message });
        }
        missing.push(path);
      }
    }
    this.#missing = missing;
    // Those that have come back have their names again.
    await this.adopt(this.#settings);
    await this.#checkPlace(await listDisks(this.control, this.#names));
  }

  async #checkPlace(disks: readonly Disk[]): Promise<void> {
    await refuseMisplaced(this.control, this.#settings, disks, this.#log).catch((err: unknown) => {
      this.#log.warn({ err }, 'it is not known what the place of the histories lies on');
    });
  }

  async status(): Promise<DaemonStatus> {
    const module = this.control.info();
    const disks = await listDisks(this.control, this.#names);
    const backups = this.backups();
    const kept = this.#settings.history.keep ? disks : [];
    return {
      module,
      trackedDevices: disks.length,
      daemon: this.#solo ? null : { pid, since: this.#since.toISOString() },
      backup: backups[0] ?? null,
      backups,
      missingDevices: this.#missing,
      lostAtReboot: kept
        .filter(({ tracker }) => tracker.kept !== 'OK')
        .map(({ path, tracker }) => ({ device: path, reason: tracker.kept })),
      begunAnew: kept
        .filter(({ tracker }) => tracker.began !== 'FIRST' && tracker.number === 1)
        .map(({ path, tracker }) => ({ device: path, reason: tracker.began })),
    };
  }

  // Devices

  async devices(): Promise<readonly DeviceReport[]> {
    return (await listDisks(this.control, this.#names)).map(toDeviceReport);
  }

  async device(wanted: string): Promise<DeviceReport> {
    return toDeviceReport(await findDisk(await listDisks(this.control, this.#names), wanted));
  }

  async attach(paths: readonly string[], blockSizeBytes: number): Promise<readonly DeviceReport[]> {
    const ids = await attachAll(this.control, paths, blockSizeBytes);
    await this.#checkPlace(await listDisks(this.control, this.#names));
    const disks = await listDisks(this.control, this.#names);
    const attached = disks.filter(({ tracker }) => ids.includes(tracker.id));
    for (const { path, name } of attached) {
      this.events.emit({ event: 'device-attached', device: path, name });
    }
    return attached.map(toDeviceReport);
  }

  async detach(wanted: readonly string[]): Promise<readonly DeviceReport[]> {
    const all = await listDisks(this.control, this.#names);
    const disks: Disk[] = [];
    for (const each of wanted) {
      disks.push(await findDisk(all, each));
    }
    await detachAll(this.control, disks);
    for (const { path, name } of disks) {
      this.events.emit({ event: 'device-detached', device: path, name });
    }
    return disks.map(toDeviceReport);
  }

  async mark(wanted: string, offset: number, length: number | undefined): Promise<MarkedRange> {
    const disk = await findDisk(await listDisks(this.control, this.#names), wanted);
    return markRange(this.control, disk, offset, length);
  }

  // Backups

  backups(): readonly BackupDescription[] {
    return [...this.#sessions.values()].map((session) => session.describe());
  }

  backup(checkpoint: string): BackupDescription {
    return this.#session(checkpoint).describe();
  }

  #session(checkpoint: string): BackupSession {
    const session = this.#sessions.get(checkpoint);
    if (session === undefined) {
      throw new StillblockError(
        'NO_BACKUP',
        `no backup of checkpoint ${checkpoint} is running`,
        'nothing need be done: see stillblock status',
      );
    }
    return session;
  }

  /**
   * Begins a backup, which goes on after this has returned.
   *
   * @param signal ends the begin, if it comes before that has returned
   */
  async beginBackup(request: BackupRequest, signal?: AbortSignal): Promise<BackupDescription> {
    const { checkpoint } = request;
    requireCheckpointName(checkpoint);
    this.#requireRoom(request);
    const session = new BackupSession(
      request,
      this,
      {
        serving: () => this.events.emit({ event: 'serving', checkpoint }),
        failed: ({ code, message, advice, exitCode }) =>
          this.events.emit({
            event: 'failed',
            checkpoint,
            reason: code,
            message,
            advice,
            exitCode,
          }),
        storeGrown: (sizeBytes) =>
          this.events.emit({ event: 'store-grown', checkpoint, sizeBytes }),
        storeLow: (leftBytes) => this.events.emit({ event: 'store-low', checkpoint, leftBytes }),
        ended: (ended) => {
          this.#sessions.delete(checkpoint);
          this.events.emit({ event: 'ended', ...ended });
        },
      },
      this.#log.child({ checkpoint }),
    );
    this.#sessions.set(checkpoint, session);
    const onAbort = (): void => session.requestEnd();
    signal?.addEventListener('abort', onAbort);
    try {
      if (signal?.aborted === true) {
        onAbort();
      }
      const description = await session.begin();
      await this.#forgetOld();
      return description;
    } catch (error) {
      this.#sessions.delete(checkpoint);
      throw error;
    } finally {
      signal?.removeEventListener('abort', onAbort);
    }
  }

  /** Deletes the oldest checkpoints of more than are to be kept. */
  async #forgetOld(): Promise<void> {
    const { keepCheckpoints } = this.#settings;
    if (keepCheckpoints === undefined) {
      return;
    }
    const { checkpoints } = await this.checkpoints.list();
    const old = checkpoints
      .slice(0, -keepCheckpoints)
      .filter(({ name }) => !this.#sessions.has(name));
    for (const { name } of old) {
      // One that stays costs little; the backup is what matters.
      await this.deleteCheckpoint(name).catch((err: unknown) =>
        this.#log.warn({ err, checkpoint: name }, 'an old checkpoint stays'),
      );
    }
  }

  #requireRoom({ checkpoint, id }: BackupRequest): void {
    const [running] = this.#sessions.keys();
    if (this.#sessions.has(checkpoint) || (this.#solo && running !== undefined)) {
      throw new StillblockError(
        'BACKUP_RUNNING',
        `another backup is running already (checkpoint ${running ?? checkpoint})`,
        'end it with stillblock backup end first',
      );
    }
    const same = [...this.#sessions.values()].find((session) => session.id === id);
    if (same !== undefined) {
      throw new StillblockError(
        'BACKUP_RUNNING',
        `the backup of checkpoint ${same.checkpoint} has the id ${id} already`,
        'ask with a new random UUID, or leave the id out',
      );
    }
    if (this.#sessions.size >= MAX_BACKUPS) {
      throw new StillblockError(
        'TOO_MANY',
        `${MAX_BACKUPS} backups are running already`,
        'end one of them with stillblock backup end first',
      );
    }
  }

  /**
   * Ends a backup. Settles when everything is released.
   *
   * @param id of the one that is meant; undefined for whichever has that name
   */
  endBackup(checkpoint: string, id?: string): Promise<BackupEnded> {
    const session = this.#session(checkpoint);
    if (id !== undefined && session.id !== id) {
      throw new StillblockError(
        'NO_BACKUP',
        `the backup of checkpoint ${checkpoint} that is running is another one`,
        'nothing need be done: see stillblock status',
      );
    }
    return session.end();
  }

  /** What changed on a disk of a backup that is held. */
  changes(checkpoint: string, disk: string, since: string | undefined): Promise<DiskChanges> {
    return this.#session(checkpoint).changes(disk, since);
  }

  claim(disks: readonly Disk[], by: BackupSession): () => void {
    for (const { number, path, name } of disks) {
      const holder = this.#claimed.get(number);
      if (holder !== undefined) {
        const { message } = reasonWords('IN_SNAPSHOT', path);
        throw new StillblockError(
          'IN_SNAPSHOT',
          `${message}: that of checkpoint ${holder.by.checkpoint}`,
          `end it with stillblock backup end ${holder.by.checkpoint} first, or leave the disk out`,
        );
      }
      const named = [...this.#claimed.values()].find(({ disk }) => disk.name === name);
      if (named !== undefined) {
        throw new StillblockError(
          'NAME_TAKEN',
          `${named.disk.path} is served as ${name} already`,
          `give ${path} another name with --disk NAME=DEV`,
        );
      }
    }
    for (const disk of disks) {
      this.#claimed.set(disk.number, { disk, by });
    }
    return () => {
      for (const { number } of disks) {
        this.#claimed.delete(number);
      }
    };
  }

  linkImages(checkpoint: string, images: readonly NamedImage[]): Promise<() => Promise<void>> {
    return linkImages(this.#run, checkpoint, images, this.#log);
  }

  async serverFor(request: ServerRequest | undefined): Promise<BackupServer> {
    const shared = this.#shared;
    if (request !== undefined) {
      return this.#ownServer(request);
    }
    if (shared === undefined) {
      throw new StillblockError(
        'NO_SERVER',
        'no NBD server is configured',
        'say where to listen, with --ip-addr, --port or --unix',
      );
    }
    return shared.server.lease();
  }

  /** A server for one backup alone. */
  async #ownServer(request: ServerRequest): Promise<BackupServer> {
    const { listen, tls } = request;
    const configured = toTlsPlan(this.#settings.nbd.tls);
    const plan =
      typeof tls === 'object'
        ? tls
        : {
            ...configured,
            ...(tls === undefined ? {} : ({ mode: tls ? 'require' : 'off' } as const)),
          };
    const server = await SharedServer.open({ listen, tls: plan }, this.#log);
    this.#servers.add(server);
    return { ...server.lease(), close: () => this.#close(server) };
  }

  /** Closes a server and keeps what it has counted. Safe to repeat. */
  async #close(server: SharedServer): Promise<void> {
    await server.close();
    if (this.#servers.delete(server)) {
      this.#past = sumFigures([this.#past, server.figures()]);
    }
  }

  /** Has something else reloaded, too; what it throws fails the reload. */
  onReload(follow: () => Promise<void>): void {
    this.#reloads.push(follow);
  }

  /**
   * Reads the configuration, and the certificates, keys and rules of all servers anew.
   *
   * @returns what of it is not in force before the daemon is restarted
   * @throws StillblockError if something is wrong with them; what was in force stays then
   */
  async reload(): Promise<readonly string[]> {
    try {
      const settings = await this.#readSettings?.();
      for (const server of this.#servers) {
        await server.reload();
      }
      for (const follow of this.#reloads) {
        await follow();
      }
      if (settings !== undefined) {
        await this.configure(settings);
      }
    } catch (error) {
      const { message, advice } = explain(error, 'the configuration');
      this.events.emit({ event: 'reload-failed', message, advice });
      throw error;
    }
    const warnings = this.#waiting();
    for (const warning of warnings) {
      this.#log.warn(warning);
    }
    this.events.emit({ event: 'reloaded', warnings });
    return warnings;
  }

  #waiting(): string[] {
    const names = Object.keys(STARTING) as (keyof typeof STARTING)[];
    return names
      .filter((name) => !isDeepStrictEqual(this.#settings[name], this.#started?.[name]))
      .map((name) => `${STARTING[name]} has changed: restart the daemon for that`);
  }

  // Checkpoints

  listCheckpoints(): Promise<CheckpointList> {
    return this.checkpoints.list();
  }

  async checkpoint(name: string): Promise<CheckpointDetails> {
    requireCheckpointName(name);
    const { checkpoints } = await this.checkpoints.list();
    // One that is broken, or not there, has an error of its own.
    const checkpoint =
      checkpoints.find((each) => each.name === name) ?? (await this.checkpoints.read(name));
    // Without the module, or without root, they can't be told.
    const tracked = await listDisksIfKnown(() => this.control, this.#names);
    return describeCheckpoint(checkpoint, tracked);
  }

  /** Makes a checkpoint of an instant whose snapshot is let go at once. */
  async makeCheckpoint(request: BackupRequest, signal?: AbortSignal): Promise<CheckpointDetails> {
    const alone = { ...request, store: MOMENTARY_STORE, server: NO_SERVER };
    await this.beginBackup(alone, signal);
    await this.endBackup(request.checkpoint);
    return this.checkpoint(request.checkpoint);
  }

  async deleteCheckpoint(name: string): Promise<void> {
    if (this.#sessions.has(name)) {
      throw new StillblockError(
        'BACKUP_RUNNING',
        `the backup of checkpoint ${name} is running`,
        `end it with stillblock backup end ${name} first`,
      );
    }
    await this.checkpoints.delete(name);
    this.events.emit({ event: 'checkpoint-deleted', checkpoint: name });
  }

  /** Ends all backups. */
  async endBackups(): Promise<void> {
    await Promise.all([...this.#sessions.values()].map((session) => session.end()));
  }

  /** Ends all backups and lets go of everything but the trackers. */
  async close(): Promise<void> {
    await this.endBackups();
    await this.#stack.release((err) => this.#log.error({ err }, 'release'));
    this.#control = undefined;
  }
}

async function listDisksIfKnown(
  control: () => ControlDevice,
  names: ReadonlyMap<DeviceNumber, string>,
): Promise<readonly Disk[] | undefined> {
  try {
    return await listDisks(control(), names);
  } catch {
    return undefined;
  }
}
