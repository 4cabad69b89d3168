// SPDX-License-Identifier: Apache-2.0
import test from 'ava';
import { formatRecord, lastRecord } from './records.ts';

const records = (...numbers: number[]): string => numbers.map(formatRecord).join('');

test('records 1..n give n', (t) => {
  t.is(lastRecord(''), 0);
  t.is(lastRecord(records(1)), 1);
  t.is(lastRecord(records(1, 2, 3)), 3);
});

test('a gap, a repetition, a wrong start, a hole and a cut are seen', (t) => {
  t.throws(() => lastRecord(records(1, 3)), { message: /record 2/ });
  t.throws(() => lastRecord(records(1, 1)), { message: /record 2/ });
  t.throws(() => lastRecord(records(2)), { message: /record 1/ });
  t.throws(() => lastRecord(`${records(1)}${'\0'.repeat(20)}\n`), { message: /record 2/ });
  t.throws(() => lastRecord(records(1, 2).slice(0, -3)), { message: /cut off/ });
});
