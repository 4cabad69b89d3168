// SPDX-License-Identifier: Apache-2.0
/** What a backup says of itself: on its control socket, and on its own stdout. */

/**
 * The life of a backup, changed by BackupSession alone.
 *
 *     preparing ──► taking ──► serving ──► ending ──► ended
 *         │            │          │           ▲
 *         │            │          └► failed ──┤
 *         └────────────┴──────────────────────┘
 *
 * Nothing leaves `failed` but to end: a failed image never becomes good again.
 */
export type BackupPhase = 'preparing' | 'taking' | 'serving' | 'failed' | 'ending' | 'ended';

/** Where each phase may lead. */
export const NEXT_PHASES: Readonly<Record<BackupPhase, readonly BackupPhase[]>> = {
  preparing: ['taking', 'ending'],
  taking: ['serving', 'ending'],
  serving: ['failed', 'ending'],
  failed: ['ending'],
  ending: ['ended'],
  ended: [],
};

/** An export that is served. */
export interface ExportReport {
  readonly name: string;
  readonly disk: string;
  /** Of a delta export: the checkpoint since which its changes are. */
  readonly checkpoint?: string;
  readonly uris: readonly string[];
  readonly sizeBytes: number;
  /** Of a delta export: what changed since the checkpoint, in whole blocks. */
  readonly dirtyBytes?: number;
  /** Of a delta export: what the checkpoint recorded of the disk. */
  readonly generation?: string;
  readonly number?: number;
  /** Of a delta export: UUID of the checkpoint. */
  readonly checkpointId?: string;
}

/** A disk of the snapshot. */
export interface DiskReport {
  readonly name: string;
  readonly device: string;
  readonly sizeBytes: number;
  /** The image's device. */
  readonly image: string;
  /** What the checkpoint of this instant records of it. */
  readonly generation: string;
  readonly number: number;
  /** Checkpoints since which its changes are served. */
  readonly incremental: readonly string[];
  /** Checkpoints since which they are not, and why. */
  readonly full: readonly { readonly checkpoint: string; readonly why: string }[];
}

export interface StoreReport {
  readonly place: string;
  readonly capacityBytes: number;
  readonly usedBytes: number;
  /** Why it is there. */
  readonly why: string;
  /** Forecast from its use in the last minutes; null if it does not fill, or that is not known. */
  readonly overflowSeconds: number | null;
}

/** A backup that runs. */
export interface BackupDescription {
  /** UUID of this one and of its checkpoint: names come again. */
  readonly id: string;
  readonly state: BackupPhase;
  readonly checkpoint: string;
  readonly pid: number;
  /** Reason of the failure, when failed. */
  readonly reason?: string;
  /** ISO 8601, once it is taken. */
  readonly takenAt?: string;
  /** How long file systems were frozen, milliseconds. */
  readonly freezeMs?: number;
  /** How long writes were held for the switch, milliseconds. */
  readonly gateMs?: number;
  /** Writes that had to wait for copy-on-write since. */
  readonly heldWrites?: number;
  readonly store?: StoreReport;
  readonly disks: readonly DiskReport[];
  readonly exports: readonly ExportReport[];
  /** Where its metrics are. */
  readonly metrics?: string;
  /** Of a request in libvirt's XML: what came of it, and what of it was ignored. */
  readonly xml?: {
    readonly backup?: string;
    readonly checkpoint?: string;
    readonly warnings: readonly string[];
  };
  /** Files among the checkpoints that are none, and why. */
  readonly brokenCheckpoints: readonly { readonly name: string; readonly problem: string }[];
}

/** A backup that has ended, and whether its images were right to the end. */
export interface BackupEnded {
  readonly checkpoint: string;
  readonly failed: boolean;
  readonly reason?: string;
}

/** What changed on a disk between a checkpoint and the snapshot that is held. */
export interface DiskChanges {
  readonly disk: string;
  /** Name of the checkpoint. */
  readonly since: string;
  /** Of the backup that is held. */
  readonly checkpoint: string;
  readonly sizeBytes: number;
  /** What changes are told in. */
  readonly blockSizeBytes: number;
  readonly changedBytes: number;
  /** In order; they neither touch nor overlap. */
  readonly extents: readonly { readonly offset: number; readonly length: number }[];
}
