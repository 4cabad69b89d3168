// SPDX-License-Identifier: Apache-2.0
/**
 * What a context says about every byte of an export, kept as runs: sorted,
 * contiguous, of nonzero length, no two neighbours with equal flags, together
 * covering the export exactly. The builder enforces that; the rest relies on it.
 */
import { requireBytes } from './units.ts';

/** A range of bytes. */
export interface Extent {
  readonly offset: number;
  readonly length: number;
}

/** A run of an {@link ExtentMap}: bytes `[start, end)` with the same flags. */
export interface Run {
  readonly start: number;
  readonly end: number;
  readonly flags: number;
}

/** Appends runs in order and merges neighbours with equal flags. */
class RunBuilder {
  readonly starts: number[] = [];
  readonly flags: number[] = [];

  append(start: number, end: number, flags: number): void {
    if (start < end && this.flags.at(-1) !== flags) {
      this.starts.push(start);
      this.flags.push(flags);
    }
  }
}

/** Immutable runs over `[0, sizeBytes)`, each with 32 bits of flags. */
export class ExtentMap {
  /** The size of what the map describes, bytes. */
  readonly sizeBytes: number;
  readonly #starts: Float64Array;
  readonly #flags: Uint32Array;

  private constructor(sizeBytes: number, starts: Float64Array, flags: Uint32Array) {
    this.sizeBytes = sizeBytes;
    this.#starts = starts;
    this.#flags = flags;
  }

  static #fromBuilder(sizeBytes: number, builder: RunBuilder): ExtentMap {
    return new ExtentMap(
      sizeBytes,
      Float64Array.from(builder.starts),
      Uint32Array.from(builder.flags),
    );
  }

  /** A map with the same flags everywhere. */
  static uniform(sizeBytes: number, flags: number): ExtentMap {
    return ExtentMap.fromRanges(sizeBytes, [], flags, flags);
  }

  /**
   * A map with one value of flags inside some ranges and another outside.
   *
   * @param sizeBytes size of the export, bytes
   * @param inside ranges in any order; they may touch, overlap, be empty, and reach beyond
   *   the end, where they are cut off
   * @throws RangeError if a number is negative, not whole or not exact
   */
  static fromRanges(
    sizeBytes: number,
    inside: Iterable<Extent>,
    flagsInside: number,
    flagsOutside: number,
  ): ExtentMap {
    requireBytes(sizeBytes, 'size');
    const ranges: Extent[] = [];
    let sorted = true;
    let last = 0;
    for (const { offset, length } of inside) {
      requireBytes(offset, 'offset of a range');
      requireBytes(length, 'length of a range');
      sorted &&= offset >= last;
      last = offset;
      ranges.push({ offset, length });
    }
    if (!sorted) {
      ranges.sort((a, b) => a.offset - b.offset);
    }
    const builder = new RunBuilder();
    let position = 0;
    for (const { offset, length } of ranges) {
      const start = Math.min(offset, sizeBytes);
      // The sum may be inexact above 2^53, but never below the size then.
      const end = Math.min(offset + length, sizeBytes);
      if (end > start && end > position) {
        if (start > position) {
          builder.append(position, start, flagsOutside);
        }
        builder.append(Math.max(start, position), end, flagsInside);
        position = end;
      }
    }
    builder.append(position, sizeBytes, flagsOutside);
    return ExtentMap.#fromBuilder(sizeBytes, builder);
  }

  /**
   * A map whose flags follow from those of two maps of the same size.
   *
   * @throws RangeError if the sizes differ
   */
  static combine(
    a: ExtentMap,
    b: ExtentMap,
    flagsOf: (flagsA: number, flagsB: number) => number,
  ): ExtentMap {
    if (a.sizeBytes !== b.sizeBytes) {
      throw new RangeError(`maps of ${a.sizeBytes} and ${b.sizeBytes} bytes do not combine`);
    }
    const builder = new RunBuilder();
    let indexA = 0;
    let indexB = 0;
    let position = 0;
    while (position < a.sizeBytes) {
      const endA = a.#endOf(indexA);
      const endB = b.#endOf(indexB);
      const end = Math.min(endA, endB);
      builder.append(position, end, flagsOf(a.#flagsOf(indexA), b.#flagsOf(indexB)) >>> 0);
      indexA += endA === end ? 1 : 0;
      indexB += endB === end ? 1 : 0;
      position = end;
    }
    return ExtentMap.#fromBuilder(a.sizeBytes, builder);
  }

  /** Number of runs in the whole map. */
  get runCount(): number {
    return this.#starts.length;
  }

  /** Bytes in runs for which the predicate holds. */
  countBytes(predicate: (flags: number) => boolean): number {
    let total = 0;
    for (const { start, end, flags } of this.runs(0, this.sizeBytes)) {
      total += predicate(flags) ? end - start : 0;
    }
    return total;
  }

  /**
   * The runs within `[offset, end)`, cut to it. The range must lie within the map;
   * an empty one has no runs.
   */
  *runs(offset: number, end: number): Generator<Run> {
    let start = offset;
    for (let index = this.indexAt(offset); start < end; index += 1) {
      const runEnd = Math.min(this.#endOf(index), end);
      yield { start, end: runEnd, flags: this.#flagsOf(index) };
      start = runEnd;
    }
  }

  /** The run that contains a byte of the map. */
  runAt(offset: number): Run {
    const index = this.indexAt(offset);
    return { start: this.startOf(index), end: this.#endOf(index), flags: this.#flagsOf(index) };
  }

  /** The number of the run that contains `offset`: the last that starts at or before it. */
  indexAt(offset: number): number {
    let low = 0;
    let high = this.#starts.length;
    while (high - low > 1) {
      const middle = (low + high) >>> 1;
      if (this.startOf(middle) <= offset) {
        low = middle;
      } else {
        high = middle;
      }
    }
    return low;
  }

  /** Where run `index` starts; the size of the map for the index after the last. */
  startOf(index: number): number {
    return this.#starts[index] ?? this.sizeBytes;
  }

  #endOf(index: number): number {
    return this.startOf(index + 1);
  }

  #flagsOf(index: number): number {
    return this.#flags[index] ?? 0;
  }
}

/**
 * Rounds ranges outward to whole blocks: what a block-wise change map says of a
 * byte it says of its block.
 *
 * @param blockSizeBytes size of a block, bytes, at least 1
 * @throws RangeError if the block size is not a positive whole number
 */
export function* roundOutward(
  extents: Iterable<Extent>,
  blockSizeBytes: number,
): Generator<Extent> {
  if (requireBytes(blockSizeBytes, 'block size') === 0) {
    throw new RangeError('block size is zero');
  }
  for (const { offset, length } of extents) {
    if (length > 0) {
      const start = offset - (offset % blockSizeBytes);
      const end = Math.ceil((offset + length) / blockSizeBytes) * blockSizeBytes;
      yield { offset: start, length: end - start };
    }
  }
}
