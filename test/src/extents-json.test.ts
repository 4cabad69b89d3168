// SPDX-License-Identifier: Apache-2.0
/** The one shape of JSON in which ranges are given, and where a mistake in it is. */
import test from 'ava';
import fc from 'fast-check';
import { ExtentsJsonError, parseExtents } from '../../src/extents-json.ts';

const SIZE = Number.MAX_SAFE_INTEGER;

test('what JSON.stringify writes is read as it was, with any white space', (t) => {
  const bytes = fc.nat(2 ** 31);
  const extents = fc.array(fc.record({ offset: bytes, length: bytes }));
  fc.assert(
    fc.property(extents, fc.nat(4), (wanted, space) => {
      t.deepEqual(parseExtents(JSON.stringify(wanted, null, space), SIZE), wanted);
    }),
  );
});

test('members come in any order, numbers are exact', (t) => {
  const text = '\r\n\t[ { "length" : 1 , "offset" : 9007199254740990 } ] ';
  t.deepEqual(parseExtents(text, SIZE), [{ offset: 9_007_199_254_740_990, length: 1 }]);
});

for (const [text, line, column, message] of [
  ['', 1, 1, /text ends where an array/],
  ['{}', 1, 1, /array/],
  ['[', 1, 2, /text ends where an object/],
  ['[1]', 1, 2, /object/],
  ['[{}]', 1, 2, /"offset" is missing/],
  ['[{"offset": 1}]', 1, 2, /"length" is missing/],
  ['[{"offset": 1, "offset": 1}]', 1, 16, /twice/],
  ['[{"start": 1}]', 1, 3, /"start" is neither/],
  ['[{offset: 1}]', 1, 3, /double quotes/],
  ['[{"offset" 1}]', 1, 12, /colon/],
  ['[{"offset": -1, "length": 1}]', 1, 13, /whole number/],
  ['[{"offset": 1.5, "length": 1}]', 1, 13, /whole number/],
  ['[{"offset": 1e3, "length": 1}]', 1, 13, /whole number/],
  ['[{"offset": 01, "length": 1}]', 1, 13, /whole number/],
  ['[{"offset": "1", "length": 1}]', 1, 13, /whole number/],
  ['[{"offset": null, "length": 1}]', 1, 13, /whole number/],
  ['[{"offset": 9007199254740993, "length": 1}]', 1, 13, /whole number/],
  ['[{"offset": 1, "length": 1},]', 1, 29, /object/],
  ['[{"offset": 1, "length": 1,}]', 1, 28, /double quotes/],
  ['[{"offset": 1, "length": 1}', 1, 28, /text ends/],
  ['[\n{"offset": 1, "length": 1}\n{', 3, 1, /comma/],
  ['[] []', 1, 4, /nothing may follow/],
  ['[{"offset": 0, "length": 1},\n  {"offset": 100, "length": 1}]', 2, 3, /beyond the end \(100\)/],
  ['[{"offset": 1, "length": 100}]', 1, 2, /beyond the end/],
] as const) {
  test(`a mistake is found at its place: ${JSON.stringify(text)}`, (t) => {
    const error = t.throws(() => parseExtents(text, 100), {
      instanceOf: ExtentsJsonError,
      message,
    });
    t.is(error?.line, line);
    t.is(error?.column, column);
  });
}

test('reading is total: arbitrary text gives ranges or an error with a place', (t) => {
  const piece = fc.constantFrom(
    '[',
    ']',
    '{',
    '}',
    ',',
    ':',
    '"offset"',
    '"length"',
    '1',
    ' ',
    '\n',
  );
  fc.assert(
    fc.property(fc.array(fc.oneof(piece, fc.string({ maxLength: 3 }))), (pieces) => {
      try {
        parseExtents(pieces.join(''), 100);
      } catch (error) {
        t.true(error instanceof ExtentsJsonError);
      }
    }),
    { numRuns: 2000 },
  );
  t.pass();
});
