// SPDX-License-Identifier: Apache-2.0
/** What lies on what, in a sysfs of our own. */
import { stat } from 'node:fs/promises';
import test, { type ExecutionContext } from 'ava';
import { BlockDevices, isDiskName, splitDeviceNumber } from '../../src/block-devices.ts';
import { fakeSysfs, folder } from './world.ts';

/** Two disks; LVM over a partition of each; a loop device on a file; an odd name. */
async function machine(t: ExecutionContext): Promise<BlockDevices> {
  const backingFile = await folder(t);
  const sysfs = await fakeSysfs(t, [
    { path: 'pci/vda', number: '254:0', sectors: 2048 },
    { path: 'pci/vda/vda1', number: '254:1', sectors: 1024, partition: 1 },
    { path: 'pci/vdb', number: '254:16', sectors: 4096 },
    { path: 'pci/vdb/vdb1', number: '254:17', sectors: 4000, partition: 1 },
    {
      path: 'virtual/dm-0',
      number: '252:0',
      sectors: 5000,
      dmName: 'vg0-data',
      slaves: ['pci/vda/vda1', 'pci/vdb/vdb1'],
    },
    {
      path: 'virtual/dm-1',
      number: '252:1',
      sectors: 4000,
      dmName: 'odd name@home',
      slaves: ['virtual/dm-0'],
    },
    { path: 'virtual/loop0', number: '7:0', sectors: 8, backingFile },
    { path: 'pci/cciss!c0d0', number: '104:0', sectors: 16, devName: 'cciss/c0d0' },
  ]);
  return BlockDevices.read(sysfs);
}

test('devices have the names that people use', async (t) => {
  const devices = await machine(t);
  t.like(devices.get('254:1'), { kernelName: 'vda1', path: '/dev/vda1', diskName: 'vda1' });
  t.like(devices.get('252:0'), { path: '/dev/mapper/vg0-data', diskName: 'vg0-data' });
  t.like(devices.get('252:1'), { path: '/dev/mapper/odd name@home', diskName: 'odd-name-home' });
  t.like(devices.get('104:0'), { path: '/dev/cciss/c0d0', diskName: 'cciss-c0d0' });
  t.is(devices.get('254:16')?.sizeBytes, 4096 * 512);
  t.is(devices.get('1:1'), undefined);
  t.is(devices.describe('1:1'), 'device 1:1');
});

test('a device stands on its disk, its parts, and the device of its file', async (t) => {
  const devices = await machine(t);
  t.deepEqual([...devices.closure('252:1')].sort(), [
    '252:0',
    '252:1',
    '254:0',
    '254:1',
    '254:16',
    '254:17',
  ]);
  const [, beneathLoop] = [...devices.closure('7:0')];
  t.is(beneathLoop, splitDeviceNumber((await stat(await folder(t))).dev));
});

test('devices are related up and down, not across', async (t) => {
  const devices = await machine(t);
  t.true(devices.related('254:0', '252:1'));
  t.true(devices.related('252:1', '254:0'));
  t.true(devices.related('254:1', '254:1'));
  t.false(devices.related('254:1', '254:17'));
  t.false(devices.related('104:0', '254:0'));
});

test('what is on a partition is on its disk, and nowhere else', async (t) => {
  const devices = await machine(t);
  t.true(devices.isOn('254:1', '254:1'));
  t.true(devices.isOn('254:1', '254:0'));
  t.false(devices.isOn('254:0', '254:1'), 'not the other way round');
  t.false(devices.isOn('252:0', '254:1'), 'not through another device');
  t.false(devices.isOn('254:1', '254:16'));
});

test('a path of a multipath device is written to unseen, from its disk to its partitions', async (t) => {
  const path = { number: '8:0', sectors: 2048 };
  const devices = await BlockDevices.read(
    await fakeSysfs(t, [
      { ...path, path: 'pci/sda', number: '8:0', queue: true },
      { ...path, path: 'pci/sda/sda1', number: '8:1', partition: 1 },
      { ...path, path: 'pci/sdb', number: '8:16', queue: true },
      { ...path, path: 'pci/sdb/sdb1', number: '8:17', partition: 1 },
      { ...path, path: 'pci/sdc', number: '8:32', queue: true },
      ...[
        { path: 'virtual/dm-0', number: '252:0', dmName: 'mpatha', slaves: ['pci/sda'] },
        { path: 'virtual/dm-1', number: '252:1', dmName: 'mpathb', slaves: ['pci/sdb/sdb1'] },
      ].map((multipath) => ({ ...path, ...multipath, queue: true })),
      { ...path, path: 'virtual/dm-2', number: '252:2', dmName: 'lv', slaves: ['virtual/dm-0'] },
      { ...path, path: 'virtual/dm-3', number: '252:3', dmName: 'other', slaves: ['pci/sdc'] },
    ]),
  );
  for (const number of ['8:0', '8:1']) {
    t.is(devices.unseenWriter(number)?.path, '/dev/mapper/mpatha', number);
  }
  for (const number of ['8:16', '8:17']) {
    t.is(devices.unseenWriter(number)?.path, '/dev/mapper/mpathb', number);
  }
  for (const number of ['252:0', '252:1', '252:2', '252:3', '8:32']) {
    t.is(devices.unseenWriter(number), undefined, number);
  }
});

test('stacked devices come top down, others as they were', async (t) => {
  const devices = await machine(t);
  const order = ['104:0', '254:16', '254:1', '252:0', '254:0', '252:1'];
  const sorted = devices.topDown(order, (number) => number);
  for (const [index, number] of sorted.entries()) {
    for (const above of sorted.slice(index + 1)) {
      t.false(devices.closure(above).has(number), `${number} comes before ${above} above it`);
    }
  }
  t.deepEqual(sorted.slice(0, 3), ['252:1', '252:0', '254:1']);
  t.deepEqual(sorted.slice(3), ['104:0', '254:16', '254:0']);
});

test('a circle, which cannot be, ends', (t) => {
  const device = { kernelName: 'x', path: '/dev/x', diskName: 'x', sizeBytes: 0 };
  const devices = new BlockDevices([
    { ...device, number: '1:0', beneath: ['1:1'] },
    { ...device, number: '1:1', beneath: ['1:0'] },
  ]);
  t.is(devices.closure('1:0').size, 2);
  t.is(devices.topDown(['1:0', '1:1'], (number) => number).length, 2);
});

test('device numbers are taken apart as the kernel puts them together', (t) => {
  t.is(splitDeviceNumber(0xfe01), '254:1');
  // Minor numbers of 20 bits: 259:1048575, as makedev(3) encodes it.
  t.is(splitDeviceNumber(0xfff1_03ff), '259:1048575');
  t.is(splitDeviceNumber(0x16), '0:22');
});

test('the machine that this runs on has its disks', async (t) => {
  const devices = await BlockDevices.read();
  t.notThrows(() => devices.topDown(['1:0'], (number) => number));
});

test('names of disks have no place for what separates them from checkpoints', (t) => {
  for (const name of ['sda', 'vg0-data', '01', 'a.b', 'x+y', '_']) {
    t.true(isDiskName(name), name);
  }
  for (const name of ['', '.', '.a', 'a@b', 'a/b', 'a b', 'ä', 'a'.repeat(256)]) {
    t.false(isDiskName(name), name);
  }
});
