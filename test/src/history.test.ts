// SPDX-License-Identifier: Apache-2.0
/** How much room histories take, and what a checkpoint says of one that began anew. */
import test from 'ava';
import { type BlockDevice, BlockDevices } from '../../src/block-devices.ts';
import { judge } from '../../src/checkpoints.ts';
import { liesAbove, mapBytes, placeBytes } from '../../src/history.ts';

const TiB = 2 ** 40;
const MiB = 2 ** 20;
const size = (sizeBytes: number, blockSizeBytes?: number) => ({ sizeBytes, blockSizeBytes });

test('a map takes 16 MiB for each TiB, and 64 MiB at most', (t) => {
  t.is(mapBytes(size(TiB)), 16 * MiB);
  t.is(mapBytes(size(4 * TiB)), 64 * MiB);
  t.is(mapBytes(size(5 * TiB)), 40 * MiB);
  t.is(mapBytes(size(100 * TiB)), 50 * MiB);
  t.is(mapBytes(size(TiB, 131_072)), 8 * MiB);
  t.is(mapBytes(size(1)), 4096);
});

test('a place has room for each map twice, and for more', (t) => {
  const empty = placeBytes([]);
  t.is(placeBytes([size(TiB), size(TiB)]), empty + 64 * MiB);
});

test('why a full copy is needed is said', (t) => {
  const disk = { name: 'sda', sizeBytes: 1, generation: 'a', number: 1 };
  const checkpoint = {
    name: 'monday',
    id: undefined,
    description: '',
    parent: undefined,
    creationTime: 0,
    disks: [disk],
  };
  const after = (began?: string) =>
    judge(checkpoint, { ...disk, generation: 'b', ...(began === undefined ? {} : { began }) });
  t.like(after('NOT_SAVED'), { kind: 'full' });
  t.regex((after('NOT_SAVED') as { why: string }).why, /began anew.*not shut down cleanly/);
  t.regex((after('FIRST') as { why: string }).why, /began anew after the checkpoint$/);
  t.regex((after() as { why: string }).why, /began anew after the checkpoint$/);
});

test('a place on a tracked device is one, a place above it is none', (t) => {
  const device = (kernelName: string, number: string, more: object): BlockDevice => ({
    number,
    kernelName,
    path: `/dev/${kernelName}`,
    diskName: kernelName,
    sizeBytes: 1,
    beneath: [],
    ...more,
  });
  const [disk, first, second, loop, volume] = ['8:0', '8:1', '8:2', '7:0', '254:0'] as const;
  const devices = new BlockDevices([
    device('sda', disk, {}),
    device('sda1', first, { beneath: [disk], disk }),
    device('sda2', second, { beneath: [disk], disk }),
    device('loop0', loop, { beneath: [first] }),
    device('dm-0', volume, { beneath: [second] }),
  ]);
  t.false(liesAbove(devices, first, [first, disk]));
  t.false(liesAbove(devices, first, [second]));
  t.false(liesAbove(devices, volume, [volume, first]));
  t.true(liesAbove(devices, loop, [disk]));
  t.true(liesAbove(devices, loop, [second, first]));
  t.true(liesAbove(devices, volume, [volume, disk]));
});
