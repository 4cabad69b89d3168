// SPDX-License-Identifier: Apache-2.0
import test from 'ava';
import { StillblockError } from '../../src/errors.ts';
import { planRates, RateCaps } from '../../src/rates.ts';

const MIB = 1 << 20;

test('a rate for all, and others for single disks', (t) => {
  const rates = planRates(['100M', 'sda=20MiB/s', 'a=b=1M'], ['sda', 'sdb', 'a=b']);
  t.is(rates.total, 100 * MIB);
  t.deepEqual(
    [...rates.byName],
    [
      ['sda', 20 * MIB],
      ['a=b', MIB],
    ],
  );
});

for (const [what, texts, expected] of [
  ['no rate', ['fast'], /"fast" is no rate/],
  ['an empty rate', ['sda='], /is no rate/],
  ['a rate too low to be meant', ['1000'], /at least 64 KiB/],
  ['an unknown name', ['sdx=1M'], /no "sdx".*name one of "sda", "sdb"/],
  ['a rate for all given twice', ['1M', '2M'], /twice/],
  ['a rate of a disk given twice', ['sda=1M', 'sda=2M'], /twice/],
] as const) {
  test(`${what} is refused with one line`, (t) => {
    const error = t.throws(() => planRates(texts, ['sda', 'sdb']), {
      instanceOf: StillblockError,
    });
    t.regex(`${error.message}: ${error.advice}`, expected);
  });
}

test('an export passes its own cap and that of all, the same ones each time', (t) => {
  const caps = new RateCaps(planRates(['100M', 'sda=20M'], ['sda', 'sdb']));
  const [own, total] = caps.of('sda');
  t.is(own?.bytesPerSecond, 20 * MIB);
  t.is(total?.bytesPerSecond, 100 * MIB);
  t.deepEqual(caps.of('sdb'), total === undefined ? [] : [total]);
  t.is(caps.of('sda')[0], own);
  t.deepEqual(new RateCaps(planRates([], ['sda'])).of('sda'), []);
});
