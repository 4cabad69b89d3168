// SPDX-License-Identifier: Apache-2.0
/** What other people's tools say of a machine's disks, as they say it. */
import test from 'ava';
import { parseBootEntry, parseBootOrder } from '../../src/boot-entries.ts';
import {
  collectLayout,
  parseBlkid,
  parseLsblk,
  parseLuksDump,
  parseLvm,
  parseMdadm,
  parseSfdisk,
  parseSwaps,
  selectDevices,
} from '../../src/layout.ts';

const device = (name: string, type: string, more: object = {}): object => ({
  ...{ name, kname: name, path: `/dev/${name}`, type, size: 1_048_576, 'log-sec': 512 },
  ...{ fstype: null, uuid: null, label: null, partuuid: null, serial: null, mountpoints: [null] },
  ...more,
});

// Two disks, a mirror over a partition of each, a volume on it; a third disk beside them.
const mirror = device('md0', 'raid1', {
  fstype: 'LVM2_member',
  children: [
    { ...device('dm-0', 'lvm'), name: 'vg-root', path: '/dev/mapper/vg-root', mountpoints: ['/'] },
  ],
});
const LSBLK = JSON.stringify({
  blockdevices: [
    device('sda', 'disk', { children: [device('sda1', 'part', { children: [mirror] })] }),
    device('sdb', 'disk', {
      serial: 'B',
      children: [device('sdb1', 'part', { children: [mirror] })],
    }),
    device('sdc', 'disk', { fstype: 'ext4', label: 'data', mountpoints: ['/data', null] }),
    device('loop0', 'loop', { size: 0 }),
  ],
});

test('lsblk: a device on two others is one device', (t) => {
  const devices = parseLsblk(LSBLK);
  t.deepEqual(
    devices.map(({ name }) => name),
    ['sda', 'sda1', 'md0', 'dm-0', 'sdb', 'sdb1', 'sdc', 'loop0'],
  );
  t.deepEqual(devices.find(({ name }) => name === 'md0')?.beneath, ['sda1', 'sdb1']);
  t.like(devices.at(3), { path: '/dev/mapper/vg-root', mountPoints: ['/'], sizeBytes: 1_048_576 });
  t.like(devices.at(6), {
    content: 'ext4',
    label: 'data',
    mountPoints: ['/data'],
    sectorBytes: 512,
  });
});

test('blkid: what is special to a shell', (t) => {
  const output = String.raw`DEVNAME=/dev/sda1
LABEL=a\ b\\c\"
UUID=8e7a99d9-442a
VERSION=1.0
TYPE=ext4
PART_ENTRY_UUID=6f2c
PART_ENTRY_SIZE=2048
`;
  t.deepEqual(parseBlkid(output), {
    ...{ content: 'ext4', uuid: '8e7a99d9-442a', label: 'a b\\c"', partitionUuid: '6f2c' },
  });
  // A disk with partitions has no content, nor has what nobody has written to.
  const nothing = { content: null, uuid: null, label: null, partitionUuid: null };
  t.deepEqual(parseBlkid('DEVNAME=/dev/sda\nPTUUID=8e7a\nPTTYPE=gpt\n'), nothing);
  t.deepEqual(parseBlkid(''), nothing);
});

test('chosen disks come with all above and beneath them', (t) => {
  const devices = parseLsblk(LSBLK);
  const names = (...chosen: string[]): string[] =>
    selectDevices(devices, chosen).map(({ name }) => name);
  const all = ['sda', 'sda1', 'md0', 'dm-0', 'sdb', 'sdb1'];
  t.deepEqual(names('/dev/sda'), all);
  t.deepEqual(names('sdb'), all);
  t.deepEqual(names('/dev/mapper/vg-root'), all);
  t.deepEqual(names('sdc'), ['sdc']);
  t.deepEqual(names(), [...all, 'sdc']);
  t.deepEqual(names('sdx'), []);
});

test('sfdisk: places in sectors, and the dump as it is', (t) => {
  const json = JSON.stringify({
    partitiontable: {
      ...{ label: 'gpt', id: 'A-B', device: '/dev/nvme0n1', unit: 'sectors', sectorsize: 4096 },
      partitions: [
        { node: '/dev/nvme0n1p1', start: 256, size: 100, type: 'C', uuid: 'D', name: 'EFI' },
      ],
    },
  });
  t.deepEqual(parseSfdisk('nvme0n1', json, 'dump'), {
    ...{ disk: 'nvme0n1', label: 'gpt', id: 'A-B', sectorBytes: 4096, dump: 'dump' },
    partitions: [{ name: 'nvme0n1p1', startSector: 256, sectors: 100, type: 'C', uuid: 'D' }],
  });
});

test('LVM: groups with what they are on and what is in them', (t) => {
  const pvs = {
    report: [
      {
        pv: [
          { pv_name: '/dev/md0', vg_name: 'vg', vg_uuid: 'u1' },
          { pv_name: '/dev/sdd', vg_name: 'vg', vg_uuid: 'u1' },
          { pv_name: '/dev/sde', vg_name: '', vg_uuid: '' },
        ],
      },
    ],
  };
  const lvs = {
    report: [
      {
        lv: [
          { vg_name: 'vg', lv_name: 'root', lv_size: '8388608' },
          { vg_name: 'other', lv_name: 'x', lv_size: '1' },
        ],
      },
    ],
  };
  t.deepEqual(parseLvm(JSON.stringify(pvs), JSON.stringify(lvs)), [
    {
      ...{ name: 'vg', uuid: 'u1', physicalVolumes: ['/dev/md0', '/dev/sdd'] },
      logicalVolumes: [{ name: 'root', sizeBytes: 8_388_608 }],
    },
  ]);
});

test('mdadm: members by name', (t) => {
  const output = [
    ...['MD_LEVEL=raid1', 'MD_DEVICES=2', 'MD_METADATA=1.2', 'MD_UUID=a:b:c:d'],
    ...['MD_DEVICE_dev_sda1_ROLE=0', 'MD_DEVICE_dev_sda1_DEV=/dev/sda1'],
    ...['MD_DEVICE_dev_sdb1_ROLE=1', 'MD_DEVICE_dev_sdb1_DEV=/dev/sdb1', ''],
  ].join('\n');
  t.deepEqual(parseMdadm('md0', output), {
    ...{ name: 'md0', level: 'raid1', uuid: 'a:b:c:d', metadata: '1.2' },
    members: ['sda1', 'sdb1'],
  });
});

test('cryptsetup: both versions', (t) => {
  const one = `LUKS header information for l1\n\nVersion:       \t1\nCipher name:   \taes
Cipher mode:   \txts-plain64\nUUID:          \t9451e6e3\n\nKey Slot 0: ENABLED
\tIterations:         \t22525\nKey Slot 1: DISABLED\nKey Slot 2: ENABLED\n`;
  t.deepEqual(parseLuksDump('sda1', one), {
    ...{ name: 'sda1', version: 1, uuid: '9451e6e3', cipher: 'aes-xts-plain64', keySlots: 2 },
  });
  const two = `LUKS header information\nVersion:       \t2\nUUID:          \td458d1d3
Data segments:\n  0: crypt\n\toffset: 16777216 [bytes]\n\tcipher: aes-xts-plain64\n
Keyslots:\n  0: luks2\n\tKey:        512 bits\n\tCipher:     aes-xts-plain64
  3: luks2\n\tKey:        512 bits\nTokens:\nDigests:\n  0: pbkdf2\n\tHash: sha256\n`;
  t.deepEqual(parseLuksDump('sda2', two), {
    ...{ name: 'sda2', version: 2, uuid: 'd458d1d3', cipher: 'aes-xts-plain64', keySlots: 2 },
  });
});

test('swaps: devices and files', (t) => {
  const text = `Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority
/dev/dm-1                               partition\t999420\t\t0\t\t-2
/var/swap\\040file                       file\t\t1024\t\t0\t\t-3\n`;
  t.deepEqual(parseSwaps(text), ['/dev/dm-1', '/var/swap file']);
  t.deepEqual(parseSwaps(''), []);
});

test('a UEFI boot entry: what it is called, where it boots from', (t) => {
  const path = Buffer.from('\\EFI\\debian\\shimx64.efi\0', 'utf16le');
  const file = Buffer.concat([Buffer.from([4, 4, 0, 0]), path]);
  file.writeUInt16LE(file.length, 2);
  const drive = Buffer.alloc(42);
  drive.set([4, 1, 42, 0]);
  Buffer.from('28732ac11ff8d211ba4b00a0c93ec93b', 'hex').copy(drive, 24);
  drive.set([2, 2], 40);
  const devicePath = Buffer.concat([drive, file, Buffer.from([0x7f, 0xff, 4, 0])]);
  const head = Buffer.alloc(6);
  head.writeUInt32LE(1, 0);
  head.writeUInt16LE(devicePath.length, 4);
  const content = Buffer.concat([
    ...[Buffer.from([7, 0, 0, 0]), head, Buffer.from('debian\0', 'utf16le'), devicePath],
  ]);
  t.deepEqual(parseBootEntry('0001', content), {
    ...{ number: '0001', description: 'debian', active: true },
    partition: 'c12a7328-f81f-11d2-ba4b-00a0c93ec93b',
    path: '\\EFI\\debian\\shimx64.efi',
  });
  for (let length = 0; length < content.length; length += 1) {
    t.notThrows(() => parseBootEntry('0001', content.subarray(0, length)));
  }
  t.deepEqual(parseBootOrder(Buffer.from([7, 0, 0, 0, 1, 0, 0xab, 0])), ['0001', '00AB']);
});

test('this machine has a layout, whatever it has not', async (t) => {
  const layout = await collectLayout([]);
  t.true(['bios', 'uefi'].includes(layout.firmware.kind));
  t.deepEqual(JSON.parse(JSON.stringify(layout)), layout);
});
