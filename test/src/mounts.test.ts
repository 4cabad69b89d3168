// SPDX-License-Identifier: Apache-2.0
/** Which file systems a snapshot of some devices has to freeze. */
import { stat } from 'node:fs/promises';
import test from 'ava';
import { type BlockDevice, BlockDevices } from '../../src/block-devices.ts';
import {
  fileSystemsOn,
  groupMounts,
  openFileSystem,
  parseMountinfo,
  readFileSystems,
} from '../../src/mounts.ts';
import { folder } from './world.ts';

const MOUNTINFO = `22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw,errors=remount-ro
40 27 252:0 / /srv/da\\040ta rw,noatime shared:2 master:3 - xfs /dev/mapper/vg0-data rw
41 27 252:0 /sub /srv/bind ro,relatime - xfs /dev/mapper/vg0-data rw
42 27 254:32 / /cd ro - iso9660 /dev/vdc ro
43 27 0:50 / /pool rw - btrfs /dev/vdd rw,subvol=/
44 27 0:50 /home /home rw - btrfs /dev/vdd rw,subvol=/home
45 27 7:0 / /mnt/loop rw - ext4 /dev/loop0 rw
nonsense

46 27 0:60 / /nfs rw - nfs4 server:/a rw
`;

function device(number: string, beneath: readonly string[] = []): BlockDevice {
  const name = number.replace(':', '-');
  return { number, kernelName: name, path: `/dev/${name}`, diskName: name, sizeBytes: 1, beneath };
}

const devices = new BlockDevices([
  device('254:0'),
  device('254:1', ['254:0']),
  device('254:16'),
  device('252:0', ['254:16']),
  device('254:32'),
  device('254:48'),
  device('7:0', ['252:0']),
]);

test('mountinfo is read with its escapes, optional fields and nonsense', (t) => {
  const mounts = parseMountinfo(MOUNTINFO);
  t.is(mounts.length, 9);
  t.deepEqual(mounts[2], {
    id: 40,
    number: '252:0',
    mountPoint: '/srv/da ta',
    type: 'xfs',
    source: '/dev/mapper/vg0-data',
  });
});

const group = () =>
  groupMounts(parseMountinfo(MOUNTINFO), devices, async ({ type }) =>
    type === 'btrfs' ? ['254:48'] : [],
  );

test('bind mounts and subvolumes are one file system', async (t) => {
  const fileSystems = await group();
  const xfs = fileSystems.find(({ type }) => type === 'xfs');
  t.deepEqual(
    xfs?.mounts.map(({ id }) => id),
    [40, 41],
  );
  const btrfs = fileSystems.find(({ type }) => type === 'btrfs');
  t.deepEqual(
    btrfs?.mounts.map(({ id }) => id),
    [43, 44],
  );
  t.deepEqual(btrfs?.devices, ['254:48']);
  t.deepEqual(fileSystems.find(({ type }) => type === 'nfs4')?.devices, []);
});

test('what is on a device or above it is frozen, top down; nothing else is', async (t) => {
  const fileSystems = await group();
  const frozen = (...origins: string[]): string[] =>
    fileSystemsOn(origins, fileSystems, devices).map(({ number }) => number);
  t.deepEqual(frozen('254:0'), ['254:1'], 'a file system on a partition of a tracked disk');
  t.deepEqual(frozen('254:16'), ['7:0', '252:0'], 'LVM, and a loop device on a file on that');
  t.deepEqual(frozen('252:0'), ['7:0', '252:0']);
  t.deepEqual(frozen('7:0'), ['7:0'], 'not what lies beneath');
  t.deepEqual(frozen('254:48'), ['0:50'], 'btrfs by its own devices');
  t.deepEqual(frozen('254:32'), ['254:32'], 'one that is mounted read-only');
  t.deepEqual(frozen('99:9'), []);
});

test('a file system is opened where it is mounted, not what hides it', async (t) => {
  const all = await readFileSystems(await BlockDevices.read());
  const proc = all.find(({ type }) => type === 'proc');
  t.truthy(proc, '/proc is mounted on every machine');
  if (proc === undefined) {
    return;
  }
  const handle = await openFileSystem(proc);
  t.true((await handle.stat()).isDirectory());
  await handle.close();

  // The same file system, said to be mounted where another one is.
  const place = await folder(t);
  const hidden = { ...proc, mounts: proc.mounts.map((mount) => ({ ...mount, mountPoint: place })) };
  await t.throwsAsync(openFileSystem(hidden), { code: 'FILE_SYSTEM_HIDDEN' });
  const both = { ...proc, mounts: [...hidden.mounts, ...proc.mounts] };
  const reached = await openFileSystem(both);
  t.is((await reached.stat()).dev, (await stat('/proc')).dev);
  await reached.close();
});
