// SPDX-License-Identifier: Apache-2.0
/** What is served already, by anybody: a pull from NBD URIs alone. */
import { mkdtemp, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join, resolve } from 'node:path';
import { isDiskName } from './block-devices.ts';
import { type DiskIdentity, IDENTITY_BYTES, identifyDisk } from './disk-identity.ts';
import { StillblockError, usageError } from './errors.ts';
import type { MachineLayout } from './layout.ts';
import {
  type CertificateFolder,
  formatNbdUri,
  type NbdUri,
  parseNbdUri,
  qemuImageOptions,
  qemuTlsObject,
} from './nbd-uri.ts';
import type { Offer, OfferedDelta, OfferedDisk, PullSource } from './offer.ts';
import { explainQemuImg, QemuImgError, qemuImg } from './qemu-img.ts';

/** A disk under the name that it has in the chain. */
export interface NamedUri {
  readonly name: string;
  readonly uri: NbdUri;
}

/**
 * Reads `[NAME=]URI`. Without a name the export's is the disk's.
 *
 * @throws StillblockError about usage
 */
export function parseNamedUri(text: string): NamedUri {
  const [, given, rest = text] = /^([^=:/]+)=(.*)$/.exec(text) ?? [];
  const parsed = parseNbdUri(rest);
  const { place } = parsed;
  const uri =
    place.kind === 'unix'
      ? { ...parsed, place: { ...place, socket: resolve(place.socket) } }
      : parsed;
  const name = given ?? uri.exportName;
  if (!isDiskName(name)) {
    throw usageError(
      `${JSON.stringify(name)} cannot name a disk`,
      'name the disk: --nbd sda=nbd://HOST/EXPORT',
    );
  }
  return { name, uri };
}

/** How a server is asked. */
export interface AskOptions {
  readonly certificates: CertificateFolder;
  readonly signal: AbortSignal;
  readonly stallMs: number;
}

/** Size of an export, bytes. */
export async function exportSize(uri: NbdUri, ask: AskOptions): Promise<number> {
  const tls = qemuTlsObject(uri, ask.certificates);
  try {
    const json = await qemuImg(
      ['info', ...tls, '--output=json', '--image-opts', qemuImageOptions(uri)],
      { cwd: '/', ...ask },
    );
    return (JSON.parse(json) as { 'virtual-size': number })['virtual-size'];
  } catch (error) {
    if (error instanceof QemuImgError && error.stalled) {
      throw new StillblockError(
        'NO_SERVER',
        `${formatNbdUri(uri)} has not answered for ${ask.stallMs / 1000} s`,
        'look whether the server runs there, and whether a firewall is between; --timeout sets how long to wait',
        { cause: error },
      );
    }
    throw explainQemuImg(error, formatNbdUri(uri));
  }
}

/** Whose disk an export is, by its first bytes. */
export async function exportIdentity(uri: NbdUri, ask: AskOptions): Promise<DiskIdentity> {
  const folder = await mkdtemp(join(tmpdir(), 'stillblock-pull-'));
  try {
    const head = join(folder, 'head');
    const tls = qemuTlsObject(uri, ask.certificates);
    const place = [`bs=${IDENTITY_BYTES}`, 'count=1', `if=${qemuImageOptions(uri)}`, `of=${head}`];
    await qemuImg(['dd', ...tls, '--image-opts', '-O', 'raw', ...place], { cwd: folder, ...ask });
    return identifyDisk(await readFile(head));
  } catch (error) {
    throw explainQemuImg(error, formatNbdUri(uri));
  } finally {
    await rm(folder, { recursive: true, force: true });
  }
}

/** Servers that somebody else has started, and will end. */
export class NbdSource implements PullSource {
  readonly checkpoint: string;
  readonly snapshot = null;
  readonly #disks: readonly NamedUri[];
  readonly #layout: MachineLayout | null;
  readonly #ask: Omit<AskOptions, 'signal'>;

  constructor(
    checkpoint: string,
    disks: readonly NamedUri[],
    layout: MachineLayout | null,
    ask: Omit<AskOptions, 'signal'>,
  ) {
    this.checkpoint = checkpoint;
    this.#disks = disks;
    this.#layout = layout;
    this.#ask = ask;
  }

  async begin(since: ReadonlyMap<string, string>, signal: AbortSignal): Promise<Offer> {
    const disks: OfferedDisk[] = [];
    for (const { name, uri } of this.#disks) {
      const ask = { ...this.#ask, signal };
      const sizeBytes = await exportSize(uri, ask);
      const deltas = await this.#deltas(uri, since.get(name), sizeBytes, ask);
      const identity = await exportIdentity(uri, ask);
      disks.push({ name, sizeBytes, uri, history: undefined, identity, deltas, full: [] });
    }
    return {
      checkpoint: this.checkpoint,
      takenAt: null,
      machine: this.#layout?.machine ?? null,
      layout: this.#layout,
      disks,
    };
  }

  /** The delta export since a checkpoint, if there is one. */
  async #deltas(
    uri: NbdUri,
    checkpoint: string | undefined,
    sizeBytes: number,
    ask: AskOptions,
  ): Promise<OfferedDelta[]> {
    if (checkpoint === undefined) {
      return [];
    }
    const delta = { ...uri, exportName: `${uri.exportName}@${checkpoint}` };
    try {
      const deltaBytes = await exportSize(delta, ask);
      return deltaBytes === sizeBytes ? [{ checkpoint, uri: delta, history: undefined }] : [];
    } catch (error) {
      if (error instanceof StillblockError && error.code === 'NO_EXPORT') {
        return [];
      }
      throw error;
    }
  }

  async end(): Promise<undefined> {
    return undefined;
  }

  async endLeftover(): Promise<void> {}
}
