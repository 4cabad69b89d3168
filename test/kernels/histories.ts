// SPDX-License-Identifier: Apache-2.0
// What the module says of change histories, for tests of reboots.

import type { Conversation } from './world.ts';

/** STILLBLOCK_HISTORY_*. */
export const history = {
  ok: 0,
  first: 1,
  noPlace: 2,
  placeEmpty: 3,
  placeDamaged: 4,
  placeVersion: 5,
  placeError: 6,
  placeFull: 7,
  placeLoose: 8,
  notSaved: 9,
  damaged: 10,
  written: 13,
  changed: 14,
} as const;
/** STILLBLOCK_TRACKER_TAKEN_UP. */
const takenUpFlag = 8;

/** What the module says of a device. */
export interface Seen {
  readonly id: string;
  /** Minor number of the device. */
  readonly minor: number;
  readonly number: number;
  readonly takenUp: boolean;
  readonly generation: string;
  readonly began: number;
  readonly kept: number;
}

/** @returns all that are tracked, in the order in which they were attached */
export async function seenHistories(module: Conversation): Promise<Seen[]> {
  return (await module.require('list')).map((word) => {
    const [id = '', , minor, number, flags, generation = '', began, kept] = word.split(':');
    return {
      id,
      minor: Number(minor),
      number: Number(number),
      takenUp: (Number.parseInt(flags ?? '0', 16) & takenUpFlag) !== 0,
      generation,
      began: Number(began),
      kept: Number(kept),
    };
  });
}
