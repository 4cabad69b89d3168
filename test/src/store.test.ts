// SPDX-License-Identifier: Apache-2.0
/** Stores on real files. The folder for temporary files must be on ext4 or XFS, as it is here. */
import { open, readdir, stat, truncate, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import test from 'ava';
import fc from 'fast-check';
import { type BlockDevice, BlockDevices, splitDeviceNumber } from '../../src/block-devices.ts';
import { createStore, openStore, storeExtents } from '../../src/native.ts';
import { defaultStoreBytes, growthBytes, planStores, Store } from '../../src/store.ts';
import { folder } from './world.ts';

const MIB = 2 ** 20;
const GIB = 2 ** 30;
const NO_DEVICES = new BlockDevices([]);

function origin(number: string, sizeBytes: number = GIB) {
  return { number, sizeBytes };
}

test('a store in a folder is allocated, lies somewhere, and leaves no name', async (t) => {
  const place = await folder(t);
  const store = await createStore(place, 8 * MIB);
  t.is(store.sizeBytes, 8 * MIB);
  t.is(`${store.major}:${store.minor}`, splitDeviceNumber((await stat(place)).dev));
  const extents = storeExtents(store);
  t.is(
    extents.reduce((sum, { length }) => sum + length, 0),
    8 * MIB,
  );
  for (const { offset, length } of extents) {
    t.true(offset > 0 && offset % 4096 === 0 && length % 4096 === 0);
  }
  t.deepEqual(await readdir(place), []);
  await store.close();
  t.is(store.sizeBytes, 0);
  await store.close();
});

test('a store may be closed twice at once', async (t) => {
  const store = await createStore(await folder(t), MIB);
  await Promise.all([store.close(), store.close()]);
  t.deepEqual(storeExtents(store), []);
});

test('holes of an existing file are filled, its data is kept', async (t) => {
  const path = join(await folder(t), 'store');
  const file = await open(path, 'w+');
  await file.write(Buffer.from('data'), 0, 4, MIB);
  await file.truncate(4 * MIB);
  const { blocks } = await file.stat();
  t.true(blocks * 512 < MIB, 'the test needs a sparse file');
  const store = await openStore(path, 0);
  t.is(store.sizeBytes, 4 * MIB);
  t.true((await file.stat()).blocks * 512 >= 4 * MIB);
  const { buffer } = await file.read(Buffer.alloc(4), 0, 4, MIB);
  t.is(buffer.toString(), 'data');
  await store.close();
  await file.close();
});

test('a part of a file may be the store', async (t) => {
  const path = join(await folder(t), 'store');
  await writeFile(path, Buffer.alloc(2 * MIB));
  const store = await openStore(path, MIB);
  t.is(
    storeExtents(store).reduce((sum, { length }) => sum + length, 0),
    MIB,
  );
  await store.close();
});

test('what cannot be a store is refused, each for its reason', async (t) => {
  const place = await folder(t);
  const small = join(place, 'small');
  await writeFile(small, 'x');
  await t.throwsAsync(openStore(small, MIB), { code: 'EINVAL', message: /prepareStore/ });
  const error = await t.throwsAsync<Error & { refusal?: string }>(openStore(small, MIB));
  t.is(error?.refusal, 'TOO_SMALL');
  const empty = join(place, 'empty');
  await writeFile(empty, '');
  t.is(
    (await t.throwsAsync<Error & { refusal?: string }>(openStore(empty, 0)))?.refusal,
    'TOO_SMALL',
  );
  t.is(
    (await t.throwsAsync<Error & { refusal?: string }>(openStore('/dev/null', 0)))?.refusal,
    'NOT_FILE',
  );
  t.is(
    (await t.throwsAsync<Error & { refusal?: string }>(createStore('/dev/shm', MIB)))?.refusal,
    'FILE_SYSTEM',
    'a file system in memory',
  );
  await t.throwsAsync(openStore(place, 0), { code: 'EISDIR' });
  await t.throwsAsync(openStore(join(place, 'absent'), 0), { code: 'ENOENT' });
  await t.throwsAsync(createStore(join(place, 'absent'), MIB), { code: 'ENOENT' });
  await t.throwsAsync(createStore(place, 2 ** 52), { message: /^(ENOSPC|EFBIG): .*fallocate$/ });
  t.deepEqual((await readdir(place)).sort(), ['empty', 'small']);
});

test('arguments that make no sense throw, and do not crash', async (t) => {
  for (const size of [-1, 1.5, Number.NaN, Number.POSITIVE_INFINITY, 2 ** 60]) {
    // Thrown at once, before there is a promise.
    await t.throwsAsync(async () => createStore('/tmp', size), { instanceOf: TypeError });
  }
});

test('several stores are prepared side by side', async (t) => {
  const place = await folder(t);
  const stores = await Promise.all(Array.from({ length: 8 }, async () => createStore(place, MIB)));
  await Promise.all(stores.map((store) => store.close()));
  t.deepEqual(await readdir(place), []);
});

test('the default is a share of the disks, of which half the room is the most', (t) => {
  t.is(defaultStoreBytes('folder', 100 * GIB, 1000 * GIB), 15 * GIB);
  t.is(defaultStoreBytes('folder', 100 * GIB, 10 * GIB), 5 * GIB);
  t.is(defaultStoreBytes('memory', 100 * GIB, 8 * GIB), 2 * GIB);
  t.is(defaultStoreBytes('folder', MIB, GIB), 16 * MIB);
});

test('growth stays within its bounds, and is worth it', (t) => {
  t.is(growthBytes(GIB, GIB, Number.MAX_SAFE_INTEGER, 100 * GIB), GIB);
  t.is(growthBytes(GIB, GIB, 1.5 * GIB, 100 * GIB), GIB / 2);
  t.is(growthBytes(GIB, GIB, GIB, 100 * GIB), 0);
  t.is(growthBytes(GIB, GIB, 10 * GIB, 64 * MIB), 0);
  t.is(growthBytes(4 * MIB, 4 * MIB, 8 * MIB, GIB), 4 * MIB, 'a small store grows in small steps');
  const size = fc.nat({ max: 2 ** 45 });
  fc.assert(
    fc.property(size, size, size, size, (first, now, max, free) => {
      const step = growthBytes(first, now, max, free);
      t.true(step === 0 || (step > 0 && now + step <= max && step < free && step <= first));
    }),
  );
});

function device(number: string, beneath: readonly string[], disk?: string): BlockDevice {
  return {
    number,
    kernelName: number,
    path: `/dev/${number}`,
    diskName: number,
    sizeBytes: GIB,
    beneath,
    ...(disk === undefined ? {} : { disk }),
  };
}

test('a place on an origin itself is known, one above or beneath it is refused', async (t) => {
  const place = await folder(t);
  const store = splitDeviceNumber((await stat(place)).dev);
  const file = join(place, 'file');
  await writeFile(file, Buffer.alloc(MIB));
  const plan = async (devices: BlockDevice[], numbers: string[], where = place) => {
    const request = { places: [where], sizeBytes: MIB, maxBytes: undefined };
    const origins = numbers.map((number) => origin(number));
    return (await planStores(request, origins, new BlockDevices(devices)))[0];
  };
  const refusal = { code: 'STORE_ON_ORIGIN' };
  const folderOn = (onOrigin: boolean) => ({ kind: 'folder', sizeBytes: MIB, onOrigin }) as const;
  t.like(await plan([device(store, [])], [store]), folderOn(true), 'on it');
  t.like(await plan([device(store, [])], [store], file), { kind: 'file' }, 'a file on it');
  const partition = [device(store, ['9:0'], '9:0'), device('9:0', [])];
  t.like(await plan(partition, ['9:0']), folderOn(true), 'on a partition of it');
  t.like(await plan(partition, ['9:0', store]), folderOn(true), 'both');
  const above = [device(store, ['9:9']), device('9:9', [])];
  await t.throwsAsync(plan(above, ['9:9']), refusal, 'above it');
  await t.throwsAsync(plan(above, [store, '9:9']), refusal, 'on one and above another');
  await t.throwsAsync(plan(above, ['9:9'], file), refusal, 'a file above it');
  await t.throwsAsync(
    plan([device('9:9', [store]), device(store, [])], ['9:9']),
    refusal,
    'beneath it',
  );
  const beside = [device('9:9', ['9:0'], '9:0'), device(store, ['9:0'], '9:0'), device('9:0', [])];
  t.like(await plan(beside, ['9:9']), folderOn(false), 'beside it');
});

test('places are told apart', async (t) => {
  const place = await folder(t);
  const file = join(place, 'file');
  await writeFile(file, '');
  await truncate(file, 32 * MIB);
  const request = { sizeBytes: undefined, maxBytes: undefined };
  const plans = (places: readonly string[], more: object = {}) =>
    planStores({ ...request, places, ...more }, [origin('9:9')], NO_DEVICES);
  const plan = async (where: string, more: object = {}) => (await plans([where], more))[0];
  t.like(await plan(file), { kind: 'file', path: file, sizeBytes: 32 * MIB });
  t.like(await plan(file, { sizeBytes: MIB }), { kind: 'file', sizeBytes: MIB });
  t.like(await plan(place), { kind: 'folder', path: place });
  t.like(await plan('memory', { sizeBytes: 4 * MIB }), { kind: 'memory', sizeBytes: 4 * MIB });
  await t.throwsAsync(plan(file, { maxBytes: GIB }), { code: 'USAGE' });
  await t.throwsAsync(plan(join(place, 'absent')), { code: 'NO_STORE' });
  await t.throwsAsync(plan('/dev/null'), { code: 'STORE_NOT_FILE' });
  const all = await plans([place, file, 'memory'], { sizeBytes: 16 * MIB, maxBytes: GIB });
  t.deepEqual(
    all.map(({ kind }) => kind),
    ['folder', 'file', 'memory'],
  );
  await t.throwsAsync(plans([place, 'memory', place]), { code: 'USAGE', message: /twice/ });
  const many = Array.from({ length: 17 }, (_, index) => join(place, String(index)));
  await t.throwsAsync(plans(many), { code: 'USAGE', message: /too many/ });
  await truncate(file, MIB);
  await t.throwsAsync(plan(file), { code: 'STORE_TOO_SMALL' }, 'nobody means so small a store');
});

test('a store in a folder grows by its first size, up to its bound', async (t) => {
  const place = await folder(t);
  const plan = { kind: 'folder', path: place, sizeBytes: 16 * MIB, onOrigin: false } as const;
  const { store } = await Store.prepare([plan], 40 * MIB);
  t.is(store.lowWatermarkBytes, 4 * MIB);
  t.is(store.description, `16 MiB in ${place}`);
  t.truthy(await store.grow());
  t.is(store.sizeBytes, 32 * MIB);
  t.is(await store.grow(), undefined, 'what is left is not worth it');
  t.is(store.sizeBytes, 32 * MIB);
  await store.close();
});

test('a store on an origin does not grow: the image may need what it would take', async (t) => {
  const path = await folder(t);
  const plan = { kind: 'folder', path, sizeBytes: 16 * MIB, onOrigin: true } as const;
  const { store } = await Store.prepare([plan], undefined);
  t.is(await store.grow(), undefined);
  await store.close();
});

test('a file does not grow, memory only as far as it is told to', async (t) => {
  const path = join(await folder(t), 'store');
  await writeFile(path, Buffer.alloc(MIB));
  const { store: file } = await Store.prepare([{ kind: 'file', path, sizeBytes: MIB }], undefined);
  t.is(await file.grow(), undefined);
  await file.close();
  t.is((await stat(path)).size, MIB, "the file is the user's and stays");
  const plan = { kind: 'memory', sizeBytes: MIB } as const;
  const { store: fixed, pieces } = await Store.prepare([plan], undefined);
  t.deepEqual(pieces, [MIB]);
  t.is(await fixed.grow(), undefined);
  const { store: growing } = await Store.prepare([plan], 2 * MIB);
  t.is(await growing.grow(), MIB);
  t.is(await growing.grow(), undefined);
});

test('several stores are one, and the first that can grow does', async (t) => {
  const path = join(await folder(t), 'store');
  await writeFile(path, Buffer.alloc(MIB));
  const { store, pieces } = await Store.prepare(
    [
      { kind: 'file', path, sizeBytes: MIB },
      { kind: 'memory', sizeBytes: 2 * MIB },
    ],
    4 * MIB,
  );
  t.is(pieces.length, 2);
  t.is(store.sizeBytes, 3 * MIB);
  t.is(store.description, `1 MiB in ${path} and 2 MiB in memory`);
  t.is(await store.grow(), 2 * MIB);
  t.is(store.sizeBytes, 5 * MIB);
  await store.close();
});

test('nothing is left of several stores when one cannot be had', async (t) => {
  const place = await folder(t);
  const path = join(place, 'store');
  await writeFile(path, Buffer.alloc(MIB));
  const plans = [
    { kind: 'folder', path: place, sizeBytes: MIB, onOrigin: false },
    { kind: 'file', path: join(place, 'absent'), sizeBytes: MIB },
  ] as const;
  await t.throwsAsync(Store.prepare(plans, undefined), { code: 'NO_STORE' });
  t.deepEqual(await readdir(place), ['store']);
});

test('errors about stores say what to do', async (t) => {
  const place = await folder(t);
  const plan = { kind: 'folder', path: '/dev/shm', sizeBytes: MIB, onOrigin: false } as const;
  await t.throwsAsync(Store.prepare([plan], undefined), {
    code: 'STORE_FILE_SYSTEM',
    message: /\/dev\/shm/,
  });
  await t.throwsAsync(
    Store.prepare([{ kind: 'file', path: join(place, 'absent'), sizeBytes: MIB }], undefined),
    { code: 'NO_STORE' },
  );
});
