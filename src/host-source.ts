// SPDX-License-Identifier: Apache-2.0
/** A pull from a server that is asked for a snapshot through its control API. */
import { randomUUID } from 'node:crypto';
import type { Api } from './api-client.ts';
import type { BackupDescription, DiskReport, ExportReport } from './backup-report.ts';
import type { Recovery } from './chain.ts';
import { exitCodeOf, reasonWords, StillblockError } from './errors.ts';
import { exportIdentity } from './nbd-source.ts';
import { type CertificateFolder, type NbdUri, parseNbdUri } from './nbd-uri.ts';
import type { HistoryPlace, Offer, OfferedDisk, PullSource } from './offer.ts';
import {
  beginBackup,
  deleteCheckpoint,
  endBackup,
  getLayout,
  type Input,
  listBackups,
  listCheckpoints,
  type Operation,
} from './operations.ts';

/** What is asked of the server. */
export interface HostRequest {
  /** As the user calls the server; undefined where its API is on this machine. */
  readonly host: string | undefined;
  /** By which name its NBD server is reached, where what it says itself does not lead there. */
  readonly nbdHost: string | undefined;
  readonly checkpoint: string;
  /** Disks by name; all if there are none. */
  readonly disks: readonly string[];
  /** Places for old data, there; the server chooses if there are none. */
  readonly store: readonly string[];
  readonly certificates: CertificateFolder;
  readonly stallMs: number;
}

const ANY_ADDRESS = new Set(['0.0.0.0', '::']);
const LOOPBACK = /^(127\.|::1$|localhost$)/;

/**
 * The URI by which an export is reached from here.
 *
 * @param host as the user calls the server; undefined if that is this machine
 * @param nbdHost takes the place of the host in its URIs
 * @throws StillblockError if it is served to that machine alone
 */
export function chooseUri(
  uris: readonly string[],
  host: string | undefined,
  nbdHost?: string,
): NbdUri {
  const parsed = uris.map(parseNbdUri);
  if (nbdHost !== undefined) {
    for (const uri of parsed) {
      if (uri.place.kind === 'tcp') {
        return { ...uri, place: { ...uri.place, host: nbdHost } };
      }
    }
  } else if (host === undefined) {
    const [first] = parsed;
    if (first !== undefined) {
      return first;
    }
  } else {
    for (const uri of parsed) {
      if (uri.place.kind === 'tcp' && ANY_ADDRESS.has(uri.place.host)) {
        return { ...uri, place: { ...uri.place, host } };
      }
      if (uri.place.kind === 'tcp' && (!LOOPBACK.test(uri.place.host) || LOOPBACK.test(host))) {
        return uri;
      }
    }
  }
  throw new StillblockError(
    'NOT_SERVED_HERE',
    `${nbdHost ?? host ?? 'the server'} serves its disks to itself alone`,
    'let its NBD server listen on an address that is reached from here',
  );
}

function historyOf(
  { generation, number }: ExportReport | DiskReport,
  checkpointId: string | undefined,
): HistoryPlace | undefined {
  return generation === undefined || number === undefined
    ? undefined
    : { generation, number, checkpointId };
}

/** A disk of a backup, but for whose it is: the server's word for that is its history. */
function toOffered(
  disk: DiskReport,
  { id, exports }: BackupDescription,
  { host, nbdHost }: HostRequest,
): Omit<OfferedDisk, 'identity'> {
  const own = exports.filter((each) => each.disk === disk.name);
  const image = own.find(({ checkpoint }) => checkpoint === undefined);
  return {
    name: disk.name,
    sizeBytes: disk.sizeBytes,
    uri: chooseUri(image?.uris ?? [], host, nbdHost),
    history: historyOf(disk, id),
    full: disk.full,
    deltas: own.flatMap((each) =>
      each.checkpoint === undefined
        ? []
        : [
            {
              checkpoint: each.checkpoint,
              uri: chooseUri(each.uris, host, nbdHost),
              history: historyOf(each, each.checkpointId),
            },
          ],
    ),
  };
}

const SAME_AUTHORITY =
  'look whether both certificates are of the same CA, not expired, and name it as it is called here';

/**
 * Why a daemon was not reached, as far as TLS and the network say.
 *
 * @param stranger where we are told apart by a certificate, and it has not answered us before
 */
function explainCall(error: unknown, stranger: string | undefined): unknown {
  const cause = error instanceof StillblockError ? error.cause : undefined;
  const code = cause instanceof Error && 'code' in cause ? String(cause.code) : '';
  if (/CERT|TLS|SSL|VERIFY|SELF_SIGNED/.test(code)) {
    return new StillblockError(
      'TLS_FAILED',
      `the daemon and we do not agree on TLS: ${cause instanceof Error ? cause.message : code}`,
      SAME_AUTHORITY,
      { cause },
    );
  }
  // That is how a server in TLS 1.3 turns down whom it does not know.
  if (code === 'ECONNRESET' && stranger !== undefined) {
    return new StillblockError(
      'TLS_FAILED',
      `${stranger} has closed the connection: it may not know our certificate`,
      SAME_AUTHORITY,
      { cause },
    );
  }
  if (/^(ENOTFOUND|EAI_AGAIN|EHOSTUNREACH|ENETUNREACH|ETIMEDOUT)$/.test(code)) {
    return new StillblockError(
      'NO_SERVER',
      `the server is not reached: ${cause instanceof Error ? cause.message : code}`,
      'look for a typing error in its name, and whether a firewall is between',
      { cause },
    );
  }
  return error;
}

/** What an error says of a call that the server may have heard, and answers no more. */
const UNANSWERED: ReadonlySet<string> = new Set(['NO_ANSWER', 'DAEMON_LOST', 'CANCELLED']);

export class HostSource implements PullSource {
  /** Made here, so that it can be ended even where the answer to its begin is lost. */
  readonly snapshot: string = randomUUID();
  readonly #api: Api;
  readonly #request: HostRequest;
  /** The server may hold our snapshot. */
  #mayHold = false;
  /** The server has answered before. */
  #isKnown = false;

  constructor(api: Api, request: HostRequest) {
    this.#api = api;
    this.#request = request;
  }

  get checkpoint(): string {
    return this.#request.checkpoint;
  }

  /** @throws StillblockError `NO_ANSWER` after the time that nothing may move for */
  async #call<In extends Input, Out>(
    operation: Operation<In, Out>,
    input: In,
    signal?: AbortSignal,
  ): Promise<Out> {
    const { stallMs, host } = this.#request;
    const late = AbortSignal.timeout(stallMs);
    try {
      const ends = signal === undefined ? late : AbortSignal.any([signal, late]);
      const answer = await this.#api.call(operation, input, ends);
      this.#isKnown = true;
      return answer;
    } catch (error) {
      if (late.aborted && signal?.aborted !== true) {
        throw new StillblockError(
          'NO_ANSWER',
          `${host ?? 'the daemon'} has not answered for ${stallMs / 1000} s`,
          'look whether the server runs, and whether the network or a firewall is between; --timeout sets how long to wait',
          { cause: error },
        );
      }
      throw explainCall(error, this.#isKnown ? undefined : host);
    }
  }

  async begin(_since: ReadonlyMap<string, string>, signal: AbortSignal): Promise<Offer> {
    const { checkpoint, disks, store, certificates, stallMs } = this.#request;
    const layout = await this.#call(getLayout, {}, signal);
    const body = {
      id: this.snapshot,
      checkpoint,
      ...(store.length === 0 ? {} : { store: { places: store } }),
      ...(disks.length === 0 ? {} : { disks: disks.map((path) => ({ path })) }),
    };
    let backup: BackupDescription;
    try {
      this.#mayHold = true;
      backup = await this.#call(beginBackup, { body }, signal);
    } catch (error) {
      this.#mayHold = error instanceof StillblockError && UNANSWERED.has(error.code);
      throw error;
    }
    const offered: OfferedDisk[] = [];
    for (const disk of backup.disks) {
      const known = toOffered(disk, backup, this.#request);
      const identity = await exportIdentity(known.uri, { certificates, stallMs, signal });
      offered.push({ ...known, identity });
    }
    return {
      checkpoint,
      takenAt: backup.takenAt ?? null,
      machine: layout.machine,
      layout,
      disks: offered,
    };
  }

  async end(kept: boolean): Promise<StillblockError | undefined> {
    return this.#mayHold ? this.#release(this.snapshot, kept) : undefined;
  }

  async endLeftover({ snapshot, complete }: Recovery): Promise<void> {
    if (snapshot !== null) {
      await this.#release(snapshot, complete);
    }
  }

  /** @returns why the snapshot has failed, if it has */
  async #release(id: string, kept: boolean): Promise<StillblockError | undefined> {
    const { backups } = await this.#call(listBackups, {});
    const held = backups.find((backup) => backup.id === id);
    const ended =
      held === undefined
        ? undefined
        : await this.#call(endBackup, { params: { name: held.checkpoint }, query: { id } });
    if (!kept) {
      // It outlives a server that was killed.
      const { checkpoints } = await this.#call(listCheckpoints, {});
      for (const { name } of checkpoints.filter((checkpoint) => checkpoint.id === id)) {
        await this.#call(deleteCheckpoint, { params: { name } });
      }
    }
    const reason = ended?.failed === true ? ended.reason : undefined;
    if (reason === undefined) {
      return undefined;
    }
    const { message, advice } = reasonWords(reason, 'the snapshot');
    return new StillblockError(reason, message, advice, { exitCode: exitCodeOf(reason) });
  }
}
