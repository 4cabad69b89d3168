// SPDX-License-Identifier: Apache-2.0
/** Caps on bandwidth, alone: how exact they are, and who has his turn. */
import { setTimeout as delay } from 'node:timers/promises';
import test, { type ExecutionContext } from 'ava';
import { Bandwidth, BURST_MS, LEAST_BYTES_PER_SECOND } from '../../nbd/bandwidth.ts';

const MIB = 1 << 20;
const somebody = {};

/** Takes bytes again and again until a time is over. Returns how many passed. */
async function takeUntil(cap: Bandwidth, bytes: number, endMs: number): Promise<number> {
  let passed = 0;
  while (performance.now() < endMs) {
    if (!cap.tryTake(bytes)) {
      await cap.take(bytes, somebody);
    }
    passed += bytes;
    // Others have the event loop to themselves now and then, too.
    await new Promise((resolve) => setImmediate(resolve));
  }
  return passed;
}

test('a rate must make sense', (t) => {
  for (const rate of [0, -1, 1.5, LEAST_BYTES_PER_SECOND - 1, Number.NaN, 2 ** 60]) {
    t.throws(() => new Bandwidth(rate), { instanceOf: RangeError }, String(rate));
  }
});

test('reserved bytes are paid at the rate exactly, whatever their sizes', (t) => {
  for (const rate of [LEAST_BYTES_PER_SECOND, 8 * MIB, 3 * 2 ** 30 + 1]) {
    const cap = new Bandwidth(rate);
    const sizes = [1, 4096, 100_000, 256 * 1024, MIB];
    const began = process.hrtime.bigint();
    let bytes = 0;
    let waitNs = 0n;
    for (let turn = 0; turn < 500; turn += 1) {
      const size = sizes[turn % sizes.length] ?? 1;
      bytes += size;
      waitNs = cap.reserve(size);
    }
    const elapsed = Number(process.hrtime.bigint() - began) / 1e9;
    const passesAfter = Number(waitNs) / 1e9;
    // From the first reservation on, less what was saved up before it; the loop itself takes time.
    const exact = bytes / rate - BURST_MS / 1000;
    t.true(passesAfter <= exact && passesAfter >= exact - elapsed - 0.000_01, `${passesAfter} s`);
  }
});

/**
 * On a machine with other work takers come late, and so pass less; more than the rate they
 * never pass.
 */
function assertShare(t: ExecutionContext, share: number): void {
  t.true(share > 0.5 && share < 1.05, `${share} of the rate`);
  t.log(`${(share * 100).toFixed(1)} % of the rate`);
}

test.serial('three takers of different sizes together pass the rate', async (t) => {
  for (const rate of [8 * MIB, 100 * MIB]) {
    const cap = new Bandwidth(rate);
    const began = performance.now();
    const end = began + 2000;
    const passed = await Promise.all(
      [16_384, 100_000, 256 * 1024].map((bytes) => takeUntil(cap, bytes, end)),
    );
    const seconds = (performance.now() - began) / 1000;
    assertShare(t, passed.reduce((sum, bytes) => sum + bytes, 0) / seconds / rate);
  }
});

test.serial(
  'one who reserves by himself, as another thread does, shares the same rate',
  async (t) => {
    const rate = 16 * MIB;
    const cap = new Bandwidth(rate);
    const began = performance.now();
    const end = began + 2000;
    const other = async (): Promise<number> => {
      let passed = 0;
      while (performance.now() < end) {
        const waitNs = cap.reserve(65_536);
        if (waitNs > 0n) {
          await delay(Number(waitNs) / 1e6);
        }
        passed += 65_536;
      }
      return passed;
    };
    const [a, b] = await Promise.all([takeUntil(cap, 65_536, end), other()]);
    assertShare(t, (a + b) / ((performance.now() - began) / 1000) / rate);
    // Neither of them starves the other.
    t.true(Math.min(a, b) > 0.1 * Math.max(a, b), `${a} and ${b}`);
  },
);

test('an idle cap saves up no more than its burst', async (t) => {
  const cap = new Bandwidth(10 * MIB);
  await delay(300);
  const burst = Math.floor((10 * MIB * BURST_MS) / 1000);
  t.true(cap.tryTake(burst));
  t.false(cap.tryTake(burst));
});

test('bytes pass in the order of the calls', async (t) => {
  const cap = new Bandwidth(4 * MIB);
  const order: number[] = [];
  await Promise.all(
    [200_000, 1, 100_000, 4096].map(async (bytes, index) => {
      await cap.take(bytes, somebody);
      order.push(index);
    }),
  );
  t.deepEqual(order, [0, 1, 2, 3]);
});

test('who leaves before his turn costs nothing', async (t) => {
  const cap = new Bandwidth(MIB);
  const first = cap.take(100_000, somebody);
  const leaver = {};
  const left = Promise.all(Array.from({ length: 50 }, () => cap.take(MIB, leaver)));
  const last = cap.take(1, somebody);
  cap.leave(leaver);
  await left;
  const began = performance.now();
  await Promise.all([first, last]);
  // Fifty MiB would take fifty seconds.
  t.true(performance.now() - began < 5000);
});
