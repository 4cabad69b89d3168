// SPDX-License-Identifier: Apache-2.0
/** What is told of a checkpoint: itself, and what the next backup of each disk can be. */
import { type Checkpoint, type CheckpointDisk, judge, type Verdict } from './checkpoints.ts';
import type { Disk } from './disks.ts';

export interface CheckpointReport {
  readonly name: string;
  /** UUID of the backup that it is of; null where it was made by a version that gave none. */
  readonly id: string | null;
  readonly description: string;
  readonly parent: string | null;
  /** ISO 8601. */
  readonly createdAt: string;
  readonly disks: readonly CheckpointDisk[];
}

/** A disk of a checkpoint, and what its next backup can be. */
export interface NextDisk extends CheckpointDisk {
  readonly next: Verdict['kind'];
  /** Why it is a full one. */
  readonly why?: string;
}

export interface CheckpointDetails extends CheckpointReport {
  readonly disks: readonly NextDisk[];
}

/** @returns what is told of a checkpoint in a list */
export function toCheckpointReport(checkpoint: Checkpoint): CheckpointReport {
  const { name, id, description, parent, creationTime, disks } = checkpoint;
  const createdAt = new Date(creationTime * 1000).toISOString();
  return { name, id: id ?? null, description, parent: parent ?? null, createdAt, disks };
}

/** What the next backup of a disk of a checkpoint can be, as far as is known now. */
function verdictOf(
  checkpoint: Checkpoint,
  { name, generation }: CheckpointDisk,
  tracked: readonly Disk[] | undefined,
): Verdict {
  const disk =
    tracked?.find(({ tracker }) => tracker.generation === generation) ??
    tracked?.find((candidate) => candidate.name === name);
  if (disk === undefined) {
    const why = tracked === undefined ? 'the kernel module cannot be asked' : 'it is not tracked';
    return { kind: 'full', why };
  }
  return judge(checkpoint, { ...disk.tracker, name: disk.name });
}

/** @param tracked undefined if that can't be told */
export function describeCheckpoint(
  checkpoint: Checkpoint,
  tracked: readonly Disk[] | undefined,
): CheckpointDetails {
  const disks = checkpoint.disks.map((disk): NextDisk => {
    const verdict = verdictOf(checkpoint, disk, tracked);
    return {
      ...disk,
      next: verdict.kind,
      ...(verdict.kind === 'full' ? { why: verdict.why } : {}),
    };
  });
  return { ...toCheckpointReport(checkpoint), disks };
}
