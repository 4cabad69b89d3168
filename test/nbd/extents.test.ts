// SPDX-License-Identifier: Apache-2.0
/** Extents against the simplest model there is: an array with the flags of each byte. */
import test from 'ava';
import fc from 'fast-check';
import { type Extent, ExtentMap } from '../../nbd/extents.ts';
import { selectContexts, statusRange } from '../../nbd/meta-context.ts';

const SIZE = 200;

const extents: fc.Arbitrary<Extent[]> = fc.array(
  fc.record({ offset: fc.nat(SIZE + 20), length: fc.nat(60) }),
  { maxLength: 12 },
);
const flags: fc.Arbitrary<number> = fc.constantFrom(0, 1, 2, 3, 0xffffffff);
const size: fc.Arbitrary<number> = fc.nat(SIZE);

function naive(sizeBytes: number, inside: Extent[], on: number, off: number): number[] {
  return Array.from({ length: sizeBytes }, (_, at) =>
    inside.some(({ offset, length }) => offset <= at && at < offset + length) ? on : off,
  );
}

function spread(map: ExtentMap, offset = 0, end: number = map.sizeBytes): number[] {
  return [...map.runs(offset, end)].flatMap((run) =>
    Array.from({ length: run.end - run.start }, () => run.flags),
  );
}

test('a map says of each byte what the ranges say, in whatever order they come', (t) => {
  fc.assert(
    fc.property(size, extents, flags, flags, (sizeBytes, inside, on, off) => {
      const map = ExtentMap.fromRanges(sizeBytes, inside, on, off);
      t.deepEqual(spread(map), naive(sizeBytes, inside, on, off));
    }),
  );
});

test('runs are contiguous, not empty, and no neighbours are equal', (t) => {
  fc.assert(
    fc.property(size, extents, flags, flags, (sizeBytes, inside, on, off) => {
      const map = ExtentMap.fromRanges(sizeBytes, inside, on, off);
      let position = 0;
      let before: number | undefined;
      for (const run of map.runs(0, sizeBytes)) {
        t.is(run.start, position);
        t.true(run.end > run.start);
        t.not(run.flags, before);
        position = run.end;
        before = run.flags;
      }
      t.is(position, sizeBytes);
    }),
  );
});

test('a run is found from each of its bytes', (t) => {
  fc.assert(
    fc.property(fc.integer({ min: 1, max: SIZE }), extents, (sizeBytes, inside) => {
      const map = ExtentMap.fromRanges(sizeBytes, inside, 1, 0);
      for (const run of map.runs(0, sizeBytes)) {
        for (let at = run.start; at < run.end; at += 1) {
          t.deepEqual(map.runAt(at), run);
        }
      }
    }),
  );
});

test('combining is combining byte by byte', (t) => {
  fc.assert(
    fc.property(size, extents, extents, (sizeBytes, a, b) => {
      const combined = ExtentMap.combine(
        ExtentMap.fromRanges(sizeBytes, a, 1, 0),
        ExtentMap.fromRanges(sizeBytes, b, 2, 0),
        (x, y) => x | y,
      );
      const modelA = naive(sizeBytes, a, 1, 0);
      const modelB = naive(sizeBytes, b, 2, 0);
      t.deepEqual(
        spread(combined),
        modelA.map((x, at) => x | (modelB[at] ?? 0)),
      );
    }),
  );
});

test('maps of different sizes do not combine', (t) => {
  t.throws(() => ExtentMap.combine(ExtentMap.uniform(1, 0), ExtentMap.uniform(2, 0), (a) => a), {
    instanceOf: RangeError,
  });
});

test('counted bytes are those of the model', (t) => {
  fc.assert(
    fc.property(size, extents, (sizeBytes, inside) => {
      const map = ExtentMap.fromRanges(sizeBytes, inside, 1, 0);
      t.is(
        map.countBytes((value) => value === 1),
        naive(sizeBytes, inside, 1, 0).filter((value) => value === 1).length,
      );
    }),
  );
});

test('ranges that are no whole numbers of bytes are refused', (t) => {
  for (const bad of [-1, 0.5, Number.NaN, 2 ** 53, Number.POSITIVE_INFINITY]) {
    t.throws(() => ExtentMap.fromRanges(100, [{ offset: bad, length: 1 }], 1, 0), {
      instanceOf: RangeError,
    });
    t.throws(() => ExtentMap.fromRanges(100, [{ offset: 0, length: bad }], 1, 0), {
      instanceOf: RangeError,
    });
    t.throws(() => ExtentMap.uniform(bad, 0), { instanceOf: RangeError });
  }
});

test('a range that ends above 2^53 reaches to the end of the map', (t) => {
  const range = { offset: 10, length: Number.MAX_SAFE_INTEGER };
  const map = ExtentMap.fromRanges(20, [range], 1, 0);
  t.deepEqual(
    [...map.runs(0, 20)],
    [
      { start: 0, end: 10, flags: 0 },
      { start: 10, end: 20, flags: 1 },
    ],
  );
});

test('rounding outward marks whole blocks, those touched and no others', (t) => {
  const blockSizes = fc.constantFrom(1, 2, 3, 8, 64, 1000);
  fc.assert(
    fc.property(extents, blockSizes, (inside, blockSizeBytes) => {
      const rounded = ExtentMap.fromRanges(SIZE, inside, 1, 0, blockSizeBytes);
      const model = naive(SIZE, inside, 1, 0);
      // A range beyond the end marks the last block, too, if it begins in it.
      const beyond = naive(SIZE + 100, inside, 1, 0);
      const expected = model.map((_, at) => {
        const block = Math.floor(at / blockSizeBytes);
        const bytes = beyond.slice(block * blockSizeBytes, (block + 1) * blockSizeBytes);
        return bytes.includes(1) ? 1 : 0;
      });
      t.deepEqual(spread(rounded), expected);
    }),
  );
});

test('a block size of zero is refused', (t) => {
  t.throws(() => ExtentMap.fromRanges(1, [], 1, 0, 0), { instanceOf: RangeError });
});

// ---- what a BLOCK_STATUS reply covers

const twoMaps: fc.Arbitrary<[ExtentMap, ExtentMap]> = fc
  .tuple(extents, extents)
  .map(([a, b]) => [ExtentMap.fromRanges(SIZE, a, 3, 0), ExtentMap.fromRanges(SIZE, b, 1, 0)]);
const question: fc.Arbitrary<{ offset: number; length: number }> = fc
  .tuple(fc.nat(SIZE - 1), fc.integer({ min: 1, max: SIZE }))
  .map(([offset, length]) => ({ offset, length: Math.min(length, SIZE - offset) }));

function contextsOf(maps: ExtentMap[]): ReturnType<typeof selectContexts> {
  const named = new Map(maps.map((map, index) => [`c${index}`, map]));
  return selectContexts(named, [...named.keys()]);
}

test('an answer is within the question, makes progress, and keeps to the limit', (t) => {
  fc.assert(
    fc.property(twoMaps, question, fc.integer({ min: 2, max: 9 }), (maps, asked, limit) => {
      const { offset, length } = asked;
      const range = statusRange(contextsOf(maps), offset, length, limit, false, false);
      t.is(range.offset, offset);
      t.true(range.end > offset && range.end <= offset + length);
      const counts = maps.map((map) => [...map.runs(offset, range.end)].length);
      t.true(counts.reduce((sum, count) => sum + count) <= limit);
      t.is(
        range.replyBytes,
        counts.reduce((sum, count) => sum + 24 + 8 * count, 0),
      );
    }),
  );
});

test('answers put together are the map, however the question was cut and limited', (t) => {
  const cuts = fc.array(fc.integer({ min: 1, max: 70 }), { minLength: 1, maxLength: 6 });
  fc.assert(
    fc.property(twoMaps, cuts, fc.integer({ min: 2, max: 9 }), (maps, lengths, limit) => {
      const answers: number[][] = maps.map(() => []);
      let position = 0;
      for (let turn = 0; position < SIZE; turn += 1) {
        const length = Math.min(lengths[turn % lengths.length] ?? 1, SIZE - position);
        const { end } = statusRange(contextsOf(maps), position, length, limit, false, false);
        for (const [index, map] of maps.entries()) {
          answers[index]?.push(...spread(map, position, end));
        }
        position = end;
      }
      t.deepEqual(
        answers,
        maps.map((map) => spread(map)),
      );
    }),
  );
});

test('REQ_ONE gives exactly one extent per context, all of one length', (t) => {
  fc.assert(
    fc.property(twoMaps, question, (maps, { offset, length }) => {
      const range = statusRange(contextsOf(maps), offset, length, 1000, true, false);
      for (const map of maps) {
        t.is([...map.runs(offset, range.end)].length, 1);
      }
      // It is the longest that has one extent everywhere.
      const longest = Math.min(offset + length, ...maps.map((map) => map.runAt(offset).end));
      t.is(range.end, longest);
    }),
  );
});
