// SPDX-License-Identifier: Apache-2.0
/** Which devices a command means. */
import test from 'ava';
import { type BlockDevice, BlockDevices } from '../../src/block-devices.ts';
import {
  blockDeviceAt,
  chooseDisks,
  deviceNumberOf,
  diskOf,
  parseDiskRequest,
  requireSeen,
} from '../../src/disks.ts';
import type { Tracker } from '../../src/native.ts';

function device(number: string, diskName: string, beneath: readonly string[] = []): BlockDevice {
  return {
    number,
    kernelName: diskName,
    path: `/dev/${diskName}`,
    diskName,
    sizeBytes: 1,
    beneath,
  };
}

function tracker(id: bigint, number: string): Tracker {
  const [major = 0, minor = 0] = number.split(':').map(Number);
  return {
    id,
    major,
    minor,
    sizeBytes: 1,
    blockSizeBytes: 65_536,
    inSnapshot: false,
    resized: false,
    gone: false,
    takenUp: false,
    began: 'FIRST',
    kept: 'OK',
    generation: '',
    number: 1,
    writes: 0,
    heldWrites: 0,
  };
}

const devices = new BlockDevices([
  device('8:0', 'sda'),
  device('252:0', 'vg0-data', ['8:0']),
  device('252:1', 'vg0-data', ['8:16']),
  device('8:16', 'sdb'),
]);
const sda = tracker(1n, '8:0');
const data = tracker(2n, '252:0');
const twin = tracker(3n, '252:1');

test('all tracked devices are meant where none is named, top down', (t) => {
  const disks = chooseDisks([sda, data], devices, []);
  t.deepEqual(
    disks.map(({ name, path, tracker: { id } }) => ({ name, path, id })),
    [
      { name: 'vg0-data', path: '/dev/vg0-data', id: 2n },
      { name: 'sda', path: '/dev/sda', id: 1n },
    ],
  );
});

test('a device is taken under the name that it is given', (t) => {
  const wanted = [{ name: 'x', path: '/dev/sda', number: '8:0' }];
  t.deepEqual(
    chooseDisks([sda, data], devices, wanted).map(({ name }) => name),
    ['x'],
  );
});

test('what is not tracked, or named twice, is refused', (t) => {
  const named = (name: string | undefined, number: string) => ({ name, path: '/dev/x', number });
  t.throws(() => chooseDisks([], devices, []), { code: 'NOTHING_TRACKED' });
  t.throws(() => chooseDisks([sda], devices, [named(undefined, '252:0')]), {
    code: 'NOT_ATTACHED',
    message: /^\/dev\/x /,
  });
  t.throws(() => chooseDisks([sda], devices, [named('a', '8:0'), named('b', '8:0')]), {
    code: 'USAGE',
    message: /twice/,
  });
  t.throws(() => chooseDisks([data, twin], devices, []), {
    code: 'USAGE',
    message: /both be called vg0-data/,
  });
  t.is(chooseDisks([data, twin], devices, [named('a', '252:0'), named('b', '252:1')]).length, 2);
});

test('a path of a multipath device is no disk to track, nor to back up', (t) => {
  const above: BlockDevice = { ...device('252:2', 'mpatha', ['8:0']), passesRequests: true };
  const paths = new BlockDevices([device('8:0', 'sda'), device('8:16', 'sdb'), above]);
  const refusal = { code: 'MULTIPATH_PATH', message: /^\/dev\/sda .*mpatha/ };
  t.throws(() => requireSeen('/dev/sda', '8:0', paths), refusal);
  t.throws(() => chooseDisks([sda], paths, []), refusal);
  t.notThrows(() => requireSeen('/dev/sdb', '8:16', paths));
  t.notThrows(() => requireSeen('/dev/mapper/mpatha', '252:2', paths));
});

test('a device that has gone still has a name', (t) => {
  const [disk] = chooseDisks([tracker(9n, '66:6')], devices, []);
  t.like(disk, { name: '66-6', path: 'device 66:6' });
});

test('NAME=DEV is told from DEV', (t) => {
  t.deepEqual(parseDiskRequest('/dev/sda'), { name: undefined, path: '/dev/sda' });
  t.deepEqual(parseDiskRequest('root=/dev/sda'), { name: 'root', path: '/dev/sda' });
  t.deepEqual(parseDiskRequest('/dev/disk/by-id/a=b'), {
    name: undefined,
    path: '/dev/disk/by-id/a=b',
  });
  t.deepEqual(parseDiskRequest('a=/dev/disk/by-id/a=b'), {
    name: 'a',
    path: '/dev/disk/by-id/a=b',
  });
  for (const wrong of ['=/dev/sda', 'a@b=/dev/sda', 'a/b=/dev/sda', 'a b=/dev/sda']) {
    t.throws(() => parseDiskRequest(wrong), { code: 'USAGE' }, wrong);
  }
});

test('a tracked device is meant by its name, and by its path when that has gone', async (t) => {
  const tracked = [sda, data].map((each) => diskOf(each, devices));
  t.is(await deviceNumberOf('vg0-data', tracked), '252:0');
  t.is(await deviceNumberOf('/dev/vg0-data', tracked), '252:0');
  await t.throwsAsync(deviceNumberOf('vg0-other', tracked), { code: 'ENOENT' });
  await t.throwsAsync(deviceNumberOf('/dev/null', tracked), { code: 'NOT_BLOCK_DEVICE' });
});

test('only a block device is one', async (t) => {
  await t.throwsAsync(blockDeviceAt('/dev/null'), { code: 'NOT_BLOCK_DEVICE' });
  await t.throwsAsync(blockDeviceAt('/etc/passwd'), { code: 'NOT_BLOCK_DEVICE' });
  await t.throwsAsync(blockDeviceAt('/dev/absent'), { code: 'ENOENT' });
});
