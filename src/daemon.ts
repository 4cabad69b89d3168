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
import type { Logger } from 'pino';
import type { BackupDescription, BackupEnded, DiskChanges } from './backup-report.ts';
import { type BackupServer, type ServerRequest, SharedServer } from './backup-server.ts';
import { type DeviceNumber, splitDeviceNumber } from './block-devices.ts';
import { type CheckpointDetails, describeCheckpoint } from './checkpoint-report.ts';
import { type CheckpointList, CheckpointStore, requireCheckpointName } from './checkpoints.ts';
import type { Configuration, TlsSettings } from './configuration.ts';
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
import type { ControlDevice, ModuleInfo } from './native.ts';
import { ReleaseStack } from './release-stack.ts';
import { type BackupHost, type BackupRequest, BackupSession } from './snapshot-session.ts';
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
}

/** The part of the configuration that a daemon lives by. */
export type DaemonSettings = Pick<Configuration, 'devices' | 'nbd'>;

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
  readonly #stack = new ReleaseStack();
  readonly #sessions = new Map<string, BackupSession>();
  readonly #claimed = new Map<DeviceNumber, { readonly disk: Disk; readonly by: BackupSession }>();
  readonly #since = new Date();
  #names: ReadonlyMap<DeviceNumber, string> = new Map();
  #missing: readonly string[] = [];
  #control: ControlDevice | undefined;
  /** The server for backups that ask for none of their own. */
  #shared: { readonly server: SharedServer; readonly settings: string } | undefined;
  /** All NBD servers. */
  readonly #servers = new Set<SharedServer>();
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
    await this.checkpoints.removeStaged();
  }

  /**
   * Takes up a configuration: tracks its devices, listens where it says.
   *
   * @throws StillblockError if it cannot listen; nothing has changed then
   */
  async configure(settings: DaemonSettings): Promise<void> {
    const { listen, tls, rates } = settings.nbd;
    if (this.#shared === undefined && listen.length > 0) {
      const server = await SharedServer.open({ listen, tls: toTlsPlan(tls) }, this.#log, rates);
      this.#servers.add(server);
      this.#stack.push(() => server.close());
      this.#shared = { server, settings: JSON.stringify(settings.nbd) };
    }
    await this.#track(settings.devices);
  }

  /** Tracks what is configured and there; tells of what is not. */
  async #track(devices: DaemonSettings['devices']): Promise<void> {
    const disks = await listDisks(this.control, this.#names);
    const tracked = new Set(disks.map(({ number }) => number));
    const names = new Map<DeviceNumber, string>();
    const missing: string[] = [];
    for (const { path, name, blockSizeBytes } of devices) {
      try {
        const number = splitDeviceNumber((await stat(path)).rdev);
        if (!tracked.has(number)) {
          await attachAll(this.control, [path], blockSizeBytes ?? 0);
          this.events.emit({ event: 'device-attached', device: path, name: name ?? path });
        }
        if (name !== undefined) {
          names.set(number, name);
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
    this.#names = names;
    this.#missing = missing;
  }

  async status(): Promise<DaemonStatus> {
    const module = this.control.info();
    const trackers = await this.control.list();
    const backups = this.backups();
    return {
      module,
      trackedDevices: trackers.length,
      daemon: this.#solo ? null : { pid, since: this.#since.toISOString() },
      backup: backups[0] ?? null,
      backups,
      missingDevices: this.#missing,
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
    this.#requireRoom(checkpoint);
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
      return await session.begin();
    } catch (error) {
      this.#sessions.delete(checkpoint);
      throw error;
    } finally {
      signal?.removeEventListener('abort', onAbort);
    }
  }

  #requireRoom(checkpoint: string): void {
    const [running] = this.#sessions.keys();
    if (this.#sessions.has(checkpoint) || (this.#solo && running !== undefined)) {
      throw new StillblockError(
        'BACKUP_RUNNING',
        `another backup is running already (checkpoint ${running ?? checkpoint})`,
        'end it with stillblock backup end first',
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

  /** Ends a backup. Settles when everything is released. */
  endBackup(checkpoint: string): Promise<BackupEnded> {
    return this.#session(checkpoint).end();
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
    const server = await SharedServer.open(request, this.#log);
    this.#servers.add(server);
    return {
      ...server.lease(),
      close: async () => {
        this.#servers.delete(server);
        await server.close();
      },
    };
  }

  /**
   * Reads the configuration, and the certificates, keys and rules of all servers anew.
   *
   * @throws StillblockError if something is wrong with them; what was in force stays then
   */
  async reload(): Promise<void> {
    try {
      const settings = await this.#readSettings?.();
      for (const server of this.#servers) {
        await server.reload();
      }
      if (settings !== undefined) {
        await this.configure(settings);
      }
    } catch (error) {
      const { message, advice } = explain(error, 'the configuration');
      this.events.emit({ event: 'reload-failed', message, advice });
      throw error;
    }
    this.events.emit({ event: 'reloaded' });
  }

  // Checkpoints

  listCheckpoints(): Promise<CheckpointList> {
    return this.checkpoints.list();
  }

  async checkpoint(name: string): Promise<CheckpointDetails> {
    const checkpoint = await this.checkpoints.read(name);
    // Without the module, or without root, they can't be told.
    const tracked = await listDisksIfKnown(() => this.control, this.#names);
    return describeCheckpoint(checkpoint, tracked);
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
