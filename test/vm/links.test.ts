// SPDX-License-Identifier: Apache-2.0
// Links to images by a real udev, which makes none that belong to the origin.

import { join } from 'node:path';
import test from 'ava';
import { checkout, testKernel } from './checkout.ts';
import { cli } from './command-line.ts';
import { bootGuest } from './guest.ts';
import { shellQuote } from './initrd.ts';

const MiB = 1 << 20;
const limitMs = 120_000;
const links = 'cd /dev/disk; find by-* -type l -printf "%p %l\\n" | sort';

test('images have names, and nobody takes them for their origin', async (t) => {
  t.timeout(8 * 60_000);
  const guest = await bootGuest({
    kernel: testKernel(),
    memoryMiB: 1024,
    disks: [{ name: 'one', sizeBytes: 32 * MiB }],
  });
  try {
    await guest.loadModule();
    const disk = await guest.disk('one');
    const name = disk.replace('/dev/', '');
    await guest.run(
      `set -e
      mkdir -p /run/udev/rules.d
      cp ${shellQuote(join(checkout, 'configs/udev/59-stillblock.rules'))} /run/udev/rules.d/
      /lib/systemd/systemd-udevd --daemon
      mkfs.ext4 -q -U 0d15ea5e-0000-4000-8000-000000000001 -L mine ${disk}
      udevadm trigger --settle ${disk}
      ${cli} device attach ${disk}`,
      { timeoutMs: limitMs },
    );
    const { stdout: before } = await guest.run(links);
    t.regex(before, new RegExp(`by-label/mine \\.\\./\\.\\./${name}\\n`), 'udev is at work');
    const daemon = guest.start(`exec ${cli} serve -v 2>&1`);
    await daemon.waitForOutput(/"msg":"ready"/, limitMs);
    await guest.run(
      `set -e
      ${cli} backup begin --checkpoint monday --store memory --store-size 16M
      udevadm settle`,
      { timeoutMs: limitMs },
    );
    const { stdout: held } = await guest.run(links);
    const added = held.split('\n').filter((line) => !before.split('\n').includes(line));
    t.deepEqual(added, [`by-snapshot/monday/${name} ../../../stillblock0`]);
    for (const line of before.split('\n')) {
      t.true(held.includes(line), `${line} still leads to the origin`);
    }
    await guest.run(`cmp ${disk} /dev/disk/by-snapshot/monday/${name}`, { timeoutMs: limitMs });
    await guest.run(`set -e; ${cli} backup end; udevadm settle`, { timeoutMs: limitMs });
    t.is((await guest.run(links)).stdout, before);
    daemon.kill(15);
    await daemon.wait(limitMs);
    await guest.run(`udevadm control --exit; ${cli} device detach ${disk}; rmmod stillblock`, {
      timeoutMs: limitMs,
    });
    await guest.shutdown();
  } finally {
    await guest.kill();
  }
});
