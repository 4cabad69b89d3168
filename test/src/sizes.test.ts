// SPDX-License-Identifier: Apache-2.0
import test from 'ava';
import fc from 'fast-check';
import { formatSize, parseSize } from '../../src/sizes.ts';

test('sizes are read in powers of 1024', (t) => {
  t.is(parseSize('0'), 0);
  t.is(parseSize('65536'), 65_536);
  t.is(parseSize('512M'), 512 * 2 ** 20);
  t.is(parseSize('2g'), 2 * 2 ** 30);
  t.is(parseSize('1.5T'), 1.5 * 2 ** 40);
  t.is(parseSize('4KiB'), 4096);
  t.is(parseSize('4kB'), 4096);
  t.is(parseSize(' 7 B '), 7);
});

test('what is no size, or no whole number of bytes, is none', (t) => {
  for (const text of [
    '',
    'M',
    '-1',
    '1e3',
    '0x10',
    '1.5',
    '5Q',
    '1 2',
    '1MM',
    '9007199254740993',
  ]) {
    t.is(parseSize(text), undefined, text);
  }
});

test('what is written for people can be read back, and is close', (t) => {
  fc.assert(
    fc.property(fc.nat({ max: Number.MAX_SAFE_INTEGER }), (bytes) => {
      const text = formatSize(bytes);
      const [digits = '', unit = ''] = text.split(' ');
      const value = Number(digits) * 1024 ** 'BKMGTP'.indexOf(unit.charAt(0));
      t.true(Math.abs(value - bytes) <= bytes * 0.05, `${bytes} is not ${text}`);
    }),
  );
});
