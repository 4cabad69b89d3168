// SPDX-License-Identifier: Apache-2.0
/** Where a store comes from, how large it is, and when it will be full. */
import { mkdir, readdir, rm, stat, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import test from 'ava';
import fc from 'fast-check';
import { BlockDevices, splitDeviceNumber } from '../../src/block-devices.ts';
import { defaultConfiguration } from '../../src/configuration.ts';
import { planStores, Store } from '../../src/store.ts';
import {
  type Candidate,
  chooseStore,
  decideStore,
  expectedBytes,
  forecastOverflow,
  highestRate,
  WriteHistory,
} from '../../src/store-policy.ts';
import { folder } from './world.ts';

const MIB = 2 ** 20;
const GIB = 2 ** 30;
const TIB = 2 ** 40;
const SETTINGS = defaultConfiguration().store;

const spare: Candidate = { path: '/mnt/spare', freeBytes: 100 * GIB, onOrigin: false };
const small: Candidate = { path: '/boot', freeBytes: 300 * MIB, onOrigin: false };
const root: Candidate = { path: '/', freeBytes: 60 * GIB, onOrigin: true };

test('a file system outside of the snapshot comes first, then a disk of it, then memory', (t) => {
  const decide = (
    candidates: readonly Candidate[],
    memory: number,
    expected = 10 * GIB,
  ): unknown => {
    const { request } = decideStore(SETTINGS, expected, candidates, memory);
    return [request.places[0], request.sizeBytes, request.maxBytes];
  };
  t.deepEqual(decide([root, small, spare], 4 * GIB), ['/mnt/spare', 10 * GIB, undefined]);
  t.deepEqual(decide([small, root], 16 * GIB), ['/', 20 * GIB, undefined], 'it cannot grow');
  t.deepEqual(decide([small], 16 * GIB), ['memory', 10 * GIB, 16 * GIB]);
  // Where nothing can hold all, what holds most.
  t.deepEqual(decide([small, { ...root, freeBytes: 8 * GIB }], GIB), ['/', 4 * GIB, undefined]);
  t.deepEqual(decide([small, { ...root, freeBytes: GIB }], 2 * GIB), ['memory', 2 * GIB, 2 * GIB]);
  t.deepEqual(decide([small], 0, TIB), ['/boot', 150 * MIB, undefined]);
});

test('what the user says counts, and memory has its share', (t) => {
  const settings = { ...SETTINGS, sizeBytes: 2 * GIB, maxBytes: 3 * GIB };
  t.deepEqual(decideStore(settings, GIB, [spare], 0).request, {
    places: ['/mnt/spare'],
    sizeBytes: 2 * GIB,
    maxBytes: 3 * GIB,
  });
  t.deepEqual(decideStore(settings, GIB, [root], 0).request.maxBytes, undefined, 'it cannot grow');
  t.deepEqual(decideStore(settings, GIB, [], 8 * GIB).request.maxBytes, 3 * GIB);
  t.deepEqual(decideStore(settings, GIB, [], GIB).request, {
    places: ['memory'],
    sizeBytes: GIB,
    maxBytes: GIB,
  });
});

test('no room at all is said', (t) => {
  for (const [candidates, memory] of [
    [[], 0],
    [[{ ...spare, freeBytes: 20 * MIB }], 15 * MIB],
  ] as const) {
    t.throws(() => decideStore(SETTINGS, GIB, candidates, memory), { code: 'STORE_NO_ROOM' });
  }
});

test('a decision never takes more than there is', (t) => {
  const bytes = fc.nat({ max: 50 * TIB });
  const candidate = fc.record({
    path: fc.constantFrom('/a', '/b'),
    freeBytes: bytes,
    onOrigin: fc.boolean(),
  });
  fc.assert(
    fc.property(
      fc.array(candidate, { maxLength: 4 }),
      bytes,
      bytes,
      (candidates, memory, expected) => {
        let choice: ReturnType<typeof decideStore>;
        try {
          choice = decideStore(SETTINGS, Math.max(expected, 16 * MIB), candidates, memory);
        } catch (error) {
          t.like(error, { code: 'STORE_NO_ROOM' });
          t.true(memory < 16 * MIB && candidates.every(({ freeBytes }) => freeBytes < 32 * MIB));
          return;
        }
        const [place] = choice.request.places;
        const room =
          place === 'memory'
            ? memory
            : Math.max(...candidates.filter(({ path }) => path === place).map((c) => c.freeBytes)) /
              2;
        t.true((choice.request.sizeBytes ?? 0) <= room, JSON.stringify(choice));
        t.true((choice.request.sizeBytes ?? 0) >= 16 * MIB);
      },
    ),
  );
});

test('a store is as large as what was written lately asks for, within bounds', (t) => {
  // 1 TiB is pulled in 2.9 hours at 100 MiB/s; 1 MiB/s twice over that is 20.5 GiB.
  t.is(Math.round(expectedBytes(TIB, MIB) / MIB), 20_972);
  t.is(expectedBytes(TIB, 0), Math.ceil(TIB / 100), 'a share, however idle the disk');
  t.is(expectedBytes(TIB, 100_000 * MIB), TIB, 'more than all cannot change');
  t.is(expectedBytes(64 * MIB, 0), 16 * MIB);
  t.is(Math.round(expectedBytes(TIB, undefined) / GIB), 154, 'a share if nothing is known');
  fc.assert(
    fc.property(fc.nat({ max: 100 * TIB }), fc.nat({ max: 10 * GIB }), (origin, rate) => {
      t.true(expectedBytes(origin, rate) <= Math.max(origin, 16 * MIB));
      t.true(expectedBytes(origin, rate + 1) >= expectedBytes(origin, rate));
    }),
  );
});

const samples = (...pairs: readonly (readonly [seconds: number, bytes: number])[]) =>
  pairs.map(([seconds, bytes]) => ({ atMs: seconds * 1000, bytes }));

test('the busiest span counts', (t) => {
  t.is(highestRate([], 300_000), undefined);
  t.is(highestRate(samples([0, 0]), 300_000), undefined);
  t.is(highestRate(samples([0, 0], [5, 1000]), 300_000), undefined, 'too short to say');
  t.is(highestRate(samples([0, 0], [10, 1000]), 300_000), 100);
  const busy = Array.from(
    { length: 360 },
    (_, i) => [i * 10, Math.min(Math.max(i - 100, 0), 30)] as const,
  );
  t.is(highestRate(samples(...busy), 300_000), 0.1, 'five busy minutes of an hour');
  t.is(highestRate(samples([0, 9000], [10, 9500], [20, 0], [30, 100]), 300_000), 50, 'began anew');
});

test('what is written is read from sysfs', async (t) => {
  const sysfs = await folder(t);
  const put = async (number: string, sectors: number): Promise<void> => {
    await mkdir(join(sysfs, 'dev/block', number), { recursive: true });
    const text = `  11  0  88  4  5  0  ${sectors}  8  0  9  10  0  0  0  0  1  2\n`;
    await writeFile(join(sysfs, 'dev/block', number, 'stat'), text);
  };
  const history = new WriteHistory(sysfs);
  await put('8:0', 1000);
  await put('8:16', 0);
  await history.sample(0);
  t.is(history.bytesPerSecond(['8:0']), undefined);
  await put('8:0', 3000);
  await put('8:32', 10);
  await history.sample(10_000);
  t.is(history.bytesPerSecond(['8:0']), (2000 * 512) / 10);
  t.is(history.bytesPerSecond(['8:0', '8:16']), (2000 * 512) / 10);
  t.is(history.bytesPerSecond(['8:0', '8:32']), undefined, 'one is new');
  t.is(history.bytesPerSecond(['8:48']), undefined, 'none such');
  t.is(history.bytesPerSecond([]), 0);
  // A device that went and came back is another.
  await rm(join(sysfs, 'dev/block/8:0'), { recursive: true });
  await writeFile(join(sysfs, 'dev/block/8:16/stat'), 'no numbers');
  await history.sample(20_000);
  t.is(history.bytesPerSecond(['8:0']), undefined);
  t.is(history.bytesPerSecond(['8:16']), 0);
  await put('8:0', 5);
  await history.sample(30_000);
  t.is(history.bytesPerSecond(['8:0']), undefined);
});

test('a long history is forgotten', async (t) => {
  const sysfs = await folder(t);
  await mkdir(join(sysfs, 'dev/block/8:0'), { recursive: true });
  const history = new WriteHistory(sysfs);
  const at = async (seconds: number, sectors: number): Promise<void> => {
    await writeFile(join(sysfs, 'dev/block/8:0/stat'), `0 0 0 0 0 0 ${sectors} 0 0 0 0`);
    await history.sample(seconds * 1000);
  };
  await at(0, 0);
  await at(300, 300_000);
  await at(3000, 300_000);
  t.is(history.bytesPerSecond(['8:0']), 1000 * 512);
  await at(3800, 300_000);
  await at(4200, 300_000);
  t.is(history.bytesPerSecond(['8:0']), 0);
});

test("this machine's own devices can be read", async (t) => {
  const history = new WriteHistory();
  await history.sample(0);
  await history.sample(10_000);
  for (const number of await readdir('/sys/dev/block')) {
    t.true((history.bytesPerSecond([number]) ?? -1) >= 0, number);
  }
  t.pass();
});

test('the forecast', (t) => {
  t.is(forecastOverflow([], GIB), undefined);
  t.is(forecastOverflow(samples([0, 5]), GIB), undefined, 'one sample says nothing');
  t.is(forecastOverflow(samples([0, 5], [0, 9]), GIB), undefined, 'nor do two of one moment');
  t.is(forecastOverflow(samples([0, 5], [10, 5]), GIB), undefined, 'it does not fill');
  t.is(forecastOverflow(samples([0, 0], [10, 100]), 1000), 90);
  t.is(forecastOverflow(samples([0, 0], [10, 1000]), 1000), 0, 'it is full');
  // Slow now, whatever was before.
  t.is(forecastOverflow(samples([0, 0], [100, 5000], [160, 5060], [220, 5120]), 6120), 1000);
  fc.assert(
    fc.property(fc.nat(), fc.nat(), fc.nat(), (a, b, limit) => {
      const seconds = forecastOverflow(samples([0, a], [10, a + b]), limit);
      t.true(seconds === undefined || seconds >= 0);
    }),
  );
});

test('on this machine', async (t) => {
  const place = await folder(t);
  const number = splitDeviceNumber((await stat(place)).dev);
  const device = {
    number,
    kernelName: 'vda',
    path: '/dev/vda',
    diskName: 'vda',
    sizeBytes: 4 * GIB,
    beneath: [],
  };
  const devices = new BlockDevices([device]);
  const origins = [{ number: '240:0', sizeBytes: GIB }];
  // Named by the user: sized, not chosen.
  const named = await chooseStore({ ...SETTINGS, places: [place] }, origins, devices, MIB);
  t.deepEqual(named.request.places, [place]);
  t.is(named.request.sizeBytes, GIB, 'no more than the disk');
  const [plan] = await planStores(named.request, origins, devices);
  t.is(plan?.kind, 'folder');
  // Chosen: what comes out can be planned and allocated.
  for (const each of [origins, [{ number, sizeBytes: 64 * MIB }]]) {
    const { request, why } = await chooseStore(SETTINGS, each, devices, 0);
    t.true(why.length > 0);
    const plans = await planStores(request, each, devices);
    const { store } = await Store.prepare(plans, request.maxBytes);
    t.true(store.sizeBytes >= 16 * MIB);
    t.true((await store.limitBytes()) >= store.sizeBytes);
    await store.close();
  }
});
