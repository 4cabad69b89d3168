// SPDX-License-Identifier: Apache-2.0
/** What engines count for each export: totals that only grow, for metrics. */

/** Upper bounds of the classes in which durations are counted, seconds; a last one has none. */
export const DURATION_BOUNDS_SECONDS: readonly number[] = [
  // From a page cache's answer to a device that hangs, by a factor of about three.
  0.000_03, 0.000_1, 0.000_3, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30,
];

/** Requests of one kind. */
export interface RequestFigures {
  /** Answered by an error. */
  errors: number;
  /** From the parsed request to the reply handed to the socket, seconds, in total. */
  seconds: number;
  /** Requests by duration: one class per bound, and one above. Their sum is all requests. */
  readonly durations: number[];
}

/** The kinds of requests that are counted apart. Refused ones of other commands are `other`. */
export const REQUEST_KINDS = ['read', 'block_status', 'other'] as const;
export type RequestKind = (typeof REQUEST_KINDS)[number];

/** One export's totals. */
export interface ExportFigures {
  /** Data in replies, bytes; holes are none. */
  readBytes: number;
  readonly requests: Readonly<Record<RequestKind, RequestFigures>>;
}

function emptyRequests(): RequestFigures {
  return {
    errors: 0,
    seconds: 0,
    durations: new Array<number>(DURATION_BOUNDS_SECONDS.length + 1).fill(0),
  };
}

export function emptyFigures(): ExportFigures {
  return {
    readBytes: 0,
    requests: { read: emptyRequests(), block_status: emptyRequests(), other: emptyRequests() },
  };
}

/** Counts one request. */
export function countRequest(figures: RequestFigures, seconds: number, failed: boolean): void {
  const found = DURATION_BOUNDS_SECONDS.findIndex((bound) => seconds <= bound);
  const index = found < 0 ? DURATION_BOUNDS_SECONDS.length : found;
  figures.durations[index] = (figures.durations[index] ?? 0) + 1;
  figures.seconds += seconds;
  figures.errors += failed ? 1 : 0;
}

/** Adds another engine's totals of the same export. */
export function addFigures(total: ExportFigures, other: ExportFigures): void {
  total.readBytes += other.readBytes;
  for (const kind of REQUEST_KINDS) {
    const into = total.requests[kind];
    const from = other.requests[kind];
    into.errors += from.errors;
    into.seconds += from.seconds;
    for (const [index, count] of from.durations.entries()) {
      into.durations[index] = (into.durations[index] ?? 0) + count;
    }
  }
}
