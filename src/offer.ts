// SPDX-License-Identifier: Apache-2.0
/** What a server has for a pull: the disks of one instant, and what changed on them since when. */
import type { Recovery } from './chain.ts';
import type { DiskIdentity } from './disk-identity.ts';
import type { StillblockError } from './errors.ts';
import type { MachineLayout } from './layout.ts';
import type { NbdUri } from './nbd-uri.ts';

/** A place in a disk's change history. */
export interface HistoryPlace {
  /** UUID. */
  readonly generation: string;
  readonly number: number;
  /** UUID of the checkpoint; undefined where the server does not tell. */
  readonly checkpointId: string | undefined;
}

/** A delta export. */
export interface OfferedDelta {
  readonly checkpoint: string;
  readonly uri: NbdUri;
  /** Of the checkpoint; undefined where the server does not tell. */
  readonly history: HistoryPlace | undefined;
}

export interface OfferedDisk {
  readonly name: string;
  readonly sizeBytes: number;
  readonly uri: NbdUri;
  /** Of the new checkpoint; undefined where the server does not tell. */
  readonly history: HistoryPlace | undefined;
  readonly identity: DiskIdentity;
  readonly deltas: readonly OfferedDelta[];
  /** Checkpoints since which there are none, and why. */
  readonly full: readonly { readonly checkpoint: string; readonly why: string }[];
}

export interface Offer {
  readonly checkpoint: string;
  readonly takenAt: string | null;
  /** `/etc/machine-id`; null where the server does not tell. */
  readonly machine: string | null;
  readonly layout: MachineLayout | null;
  readonly disks: readonly OfferedDisk[];
}

/** Where offers come from. */
export interface PullSource {
  /** Name of the instant. */
  readonly checkpoint: string;
  /** UUID of the snapshot that is to be taken for us and is ours to end; null if none is. */
  readonly snapshot: string | null;
  /**
   * Has the snapshot taken, or looks at what is served.
   *
   * @param since the checkpoints since which changes are wanted, by disk; none for an empty chain
   */
  begin(since: ReadonlyMap<string, string>, signal: AbortSignal): Promise<Offer>;
  /**
   * Lets go of the snapshot, if there is one.
   *
   * @param kept whether its point is in the chain; else its checkpoint is of no use
   * @returns why the snapshot has failed meanwhile, if it has
   * @throws StillblockError if the server was not reached: its snapshot may still be held
   */
  end(kept: boolean): Promise<StillblockError | undefined>;
  /** Lets go of the snapshot of a pull that was killed, if it is still there. */
  endLeftover(recovery: Recovery): Promise<void>;
}
