// SPDX-License-Identifier: Apache-2.0
// That a machine is what the other tests here take it for: it boots from its own disk,
// and keeps over a power cut what it has synced.

import test from 'ava';
import { Machine } from '../vm/machine.ts';

const MiB = 1 << 20;
const limitMs = 60 * 60_000;

test.serial('bookworm boots by BIOS, and keeps what is on its disks', async (t) => {
  t.timeout(limitMs);
  const disks = [{ name: 'data', sizeBytes: 64 * MiB }];
  const machine = await Machine.make({ name: 'bookworm', disks, cmdline: 'one=1,two' });
  try {
    await machine.powerOn();
    const { stdout } = await machine.run(
      'cat /proc/cmdline; ls /sys/firmware; until systemctl is-system-running | grep -v starting; do sleep 1; done; findmnt -no FSTYPE /',
      { check: false },
    );
    t.regex(stdout, / one=1,two$/m);
    t.is(/^efi$/m.test(stdout), false);
    t.regex(stdout, /^running$\n^ext4$/m);
    await machine.waitForConsole(/^machine login: /m, limitMs);
    await machine.run(
      'mkfs.xfs -q /dev/disk/by-id/virtio-data; mount /dev/disk/by-id/virtio-data /srv; echo kept >/srv/file; echo kept >/root/file; sync',
    );
    await machine.cutPower();
    await machine.powerOn('three=3');
    const kept = await machine.run(
      'cat /proc/cmdline /root/file; mount /dev/disk/by-id/virtio-data /srv; cat /srv/file',
    );
    t.regex(kept.stdout, / three=3\nkept\nkept\n$/);
    await machine.powerOff();
    machine.assertCleanConsole();
  } finally {
    await machine.remove();
  }
});
