// SPDX-License-Identifier: Apache-2.0
/** Decides what a pull copies: changes only where they are proven to fit, all where they do not. */
import { sameDisk } from './disk-identity.ts';
import { EXIT, StillblockError } from './errors.ts';
import { type ChainEntry, type Manifest, tipOf } from './manifest.ts';
import type { NbdUri } from './nbd-uri.ts';
import type { Offer, OfferedDisk } from './offer.ts';

/**
 * `increments`: changes of each disk of which the chain has an image, else nothing at all;
 * `full-if-needed`: all of a disk where changes do not do; `full`: all of every disk.
 */
export type PullMode = 'increments' | 'full-if-needed' | 'full';

/** How one disk is pulled. */
export interface PlannedDisk {
  readonly disk: OfferedDisk;
  /** What is copied. */
  readonly from: NbdUri;
  readonly file: string;
  readonly base: { readonly entry: ChainEntry; readonly checkpoint: string } | undefined;
  /** The server has proven that its changes are since just that instant. */
  readonly proven: boolean;
  /** Why all of it is copied. */
  readonly why: string | undefined;
}

export interface PullPlan {
  readonly disks: readonly PlannedDisk[];
  /** Disks of the chain that are not among them. */
  readonly absent: readonly string[];
}

type Verdict =
  | { readonly kind: 'incremental'; readonly from: NbdUri; readonly proven: boolean }
  | { readonly kind: 'full'; readonly why: string };

function judge(disk: OfferedDisk, checkpoint: string, entry: ChainEntry): Verdict {
  if (entry.sizeBytes !== disk.sizeBytes) {
    return { kind: 'full', why: `it has another size than at ${checkpoint}` };
  }
  const delta = disk.deltas.find((each) => each.checkpoint === checkpoint);
  if (delta === undefined) {
    const known = disk.full.find((each) => each.checkpoint === checkpoint)?.why;
    return { kind: 'full', why: known ?? `its changes since ${checkpoint} are not served` };
  }
  if (delta.history === undefined || entry.generation === null) {
    return sameDisk(entry.identity, disk.identity)
      ? { kind: 'incremental', from: delta.uri, proven: false }
      : {
          kind: 'full',
          why: `it is another disk than at ${checkpoint}, or was partitioned or formatted since`,
        };
  }
  const { generation, number, checkpointId } = delta.history;
  const sameId = entry.checkpointId === null || checkpointId === entry.checkpointId;
  return sameId && generation === entry.generation && number === entry.number
    ? { kind: 'incremental', from: delta.uri, proven: true }
    : { kind: 'full', why: `the server's checkpoint ${checkpoint} is another than the chain's` };
}

/** Name of a disk's file at the chain's next point. */
function fileName(disk: string, index: number): string {
  return `${disk}.${String(index).padStart(4, '0')}.qcow2`;
}

function planDisk(manifest: Manifest, disk: OfferedDisk, mode: PullMode): PlannedDisk {
  const file = fileName(disk.name, manifest.points.length + 1);
  const all = { disk, from: disk.uri, file, base: undefined, proven: true };
  const tip = tipOf(manifest, disk.name);
  if (tip === undefined || mode === 'full') {
    return { ...all, why: tip === undefined ? 'the chain has no image of it' : 'as was asked for' };
  }
  const { checkpoint } = tip.point;
  const verdict = judge(disk, checkpoint, tip.entry);
  return verdict.kind === 'full'
    ? { ...all, why: verdict.why }
    : {
        disk,
        from: verdict.from,
        file,
        base: { entry: tip.entry, checkpoint },
        proven: verdict.proven,
        why: undefined,
      };
}

/**
 * Makes a plan.
 *
 * @throws StillblockError `OTHER_MACHINE`, `CHECKPOINT_IN_CHAIN`, or `FULL_REQUIRED` with
 *   exit code 3
 */
export function planPull(manifest: Manifest, offer: Offer, mode: PullMode): PullPlan {
  if (manifest.machine !== null && offer.machine !== null && manifest.machine !== offer.machine) {
    throw new StillblockError(
      'OTHER_MACHINE',
      'the chain is of another machine',
      'name an empty folder for this one',
    );
  }
  if (manifest.points.some(({ checkpoint }) => checkpoint === offer.checkpoint)) {
    throw new StillblockError(
      'CHECKPOINT_IN_CHAIN',
      `the chain has a checkpoint ${offer.checkpoint} already`,
      'choose another name for this one',
    );
  }
  if (offer.disks.length === 0) {
    throw new StillblockError('NO_DISKS', 'the server offers no disk', 'attach devices there');
  }
  const disks = offer.disks.map((disk) => planDisk(manifest, disk, mode));
  if (mode === 'increments') {
    const needed = disks.filter(
      ({ disk, base }) => base === undefined && tipOf(manifest, disk.name) !== undefined,
    );
    if (needed.length > 0) {
      const reasons = needed.map(({ disk, why }) => `${disk.name}: ${why}`).join('; ');
      throw new StillblockError(
        'FULL_REQUIRED',
        `a full copy is required of ${reasons}`,
        'use --full-if-needed for one of just these disks',
        { exitCode: EXIT.fullRequired },
      );
    }
  }
  const offered = new Set(offer.disks.map(({ name }) => name));
  const known = new Set(manifest.points.flatMap(({ entries }) => entries.map(({ disk }) => disk)));
  return { disks, absent: [...known].filter((name) => !offered.has(name)) };
}
