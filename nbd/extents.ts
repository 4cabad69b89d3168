// SPDX-License-Identifier: Apache-2.0
/**
 * What a context says about every byte of an export, kept as runs: sorted,
 * contiguous, of nonzero length, no two neighbours with equal flags, together
 * covering the export exactly. The builder enforces that; the rest relies on it.
 */
import { isBytes, requireBytes } from './units.ts';

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
  #starts: Float64Array = new Float64Array(16);
  #flags: Uint32Array = new Uint32Array(16);
  #count = 0;

  append(start: number, end: number, flags: number): void {
    const count = this.#count;
    if (start >= end || (count > 0 && this.#flags[count - 1] === flags)) {
      return;
    }
    if (count === this.#starts.length) {
      // Typed arrays, for a large disk has millions of runs, and each would be an object.
      const starts = new Float64Array(2 * count);
      starts.set(this.#starts);
      this.#starts = starts;
      const grown = new Uint32Array(2 * count);
      grown.set(this.#flags);
      this.#flags = grown;
    }
    this.#starts[count] = start;
    this.#flags[count] = flags;
    this.#count = count + 1;
  }

  finish(): { starts: Float64Array; flags: Uint32Array } {
    return {
      starts: this.#starts.slice(0, this.#count),
      flags: this.#flags.slice(0, this.#count),
    };
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
    const { starts, flags } = builder.finish();
    return new ExtentMap(sizeBytes, starts, flags);
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
   * @param blockSizeBytes block to which each range is rounded outward: what a block-wise
   *   change map says of a byte it says of its block
   * @throws RangeError if a number is negative, not whole or not exact, or the block size zero
   */
  static fromRanges(
    sizeBytes: number,
    inside: Iterable<Extent>,
    flagsInside: number,
    flagsOutside: number,
    blockSizeBytes = 1,
  ): ExtentMap {
    requireBytes(sizeBytes, 'size');
    if (requireBytes(blockSizeBytes, 'block size') === 0) {
      throw new RangeError('block size is zero');
    }
    const ranges = Array.isArray(inside) ? (inside as readonly Extent[]) : [...inside];
    let sorted = true;
    let last = 0;
    for (const { offset, length } of ranges) {
      if (!isBytes(offset) || !isBytes(length)) {
        throw new RangeError(`range of ${length} bytes at ${offset} is not in whole bytes`);
      }
      sorted &&= offset >= last;
      last = offset;
    }
    const inOrder = sorted ? ranges : ranges.toSorted((a, b) => a.offset - b.offset);
    const builder = new RunBuilder();
    let position = 0;
    for (const { offset, length } of inOrder) {
      // The sums may be inexact above 2^53, but are never below the size then.
      const blockEnd = Math.ceil((offset + length) / blockSizeBytes) * blockSizeBytes;
      const start = Math.min(offset - (offset % blockSizeBytes), sizeBytes);
      const end = length === 0 ? start : Math.min(blockEnd, sizeBytes);
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

  /** Of each run where it starts, bytes, and its flags: for engines. Not to be changed. */
  get arrays(): { readonly starts: Float64Array; readonly flags: Uint32Array } {
    return { starts: this.#starts, flags: this.#flags };
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
