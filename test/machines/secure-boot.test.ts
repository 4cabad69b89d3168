// SPDX-License-Identifier: Apache-2.0
// Under Secure Boot, with Debian's signed boot loader and Microsoft's keys in the firmware: the
// module is refused until its key is enrolled at the console, by the commands of docs/module.md.

import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import test from 'ava';
import { commandsOf, Page } from '../pages.ts';
import { Machine } from '../vm/machine.ts';
import { buildByHand, limitMs, makeKey, packagesDisk, silently, tarball } from './installation.ts';

const MiB = 1 << 20;
const password = 'only once';
const down = '\x1b[B';

/**
 * What shim's MokManager shows, the last of each screen, and what is typed then. It draws a menu
 * again for each key, so what is waited for is not on the screen before.
 */
const dialogue: readonly (readonly [shown: RegExp, typed: string])[] = [
  [/Press any key to perform MOK management/, ' '],
  [/Enroll hash from disk/, `${down}\r`],
  [/View key 0[\s\S]*Continue/, `${down}\r`],
  [/Enroll the key\(s\)\?[\s\S]*Yes/, `${down}\r`],
  [/Password:/, `${password}\r`],
  [/Reboot/, '\r'],
];
/** The first comes after the firmware, in a minute. */
const screenLimitMs = 10 * 60_000;

async function enroll(machine: Machine): Promise<void> {
  let from = machine.console().length;
  for (const [shown, typed] of dialogue) {
    await machine.waitForConsole(shown, screenLimitMs, from);
    from = machine.console().length;
    machine.type(typed);
  }
}

test.serial('Debian 13, Secure Boot: a module is loaded once its key is enrolled', async (t) => {
  t.timeout(2 * limitMs);
  const folder = await mkdtemp(join(tmpdir(), 'stillblock-secure-boot-'));
  let machine: Machine | undefined;
  try {
    const file = await packagesDisk(folder, { name: 'trixie', packages: ['stillblock-dkms'] });
    machine = await Machine.make({
      ...{ name: 'trixie', firmware: 'secure-boot' },
      disks: [{ name: 'packages', sizeBytes: 64 * MiB, file }],
    });
    await machine.powerOn();
    const { stdout } = await machine.run('mokutil --sb-state; cat /sys/kernel/security/lockdown');
    t.is(stdout, 'SecureBoot enabled\nnone [integrity] confidentiality\n');

    // DKMS has signed it elsewhere, with a key of its own there.
    const refused = await machine.run(
      `set -e; mount -o ro /dev/disk/by-id/virtio-packages /mnt; mkdir /tmp/foreign; cd /tmp/foreign
      tar -xzf /mnt/${tarball}; umount /mnt; insmod $(find . -name 'stillblock.ko*')`,
      { check: false },
    );
    t.regex(refused.stderr, /Key was rejected by service/);

    await makeKey(machine);
    const page = await Page.open('docs/module.md', import.meta.url);
    const [get = '', request = '', reboot = '', look = ''] = commandsOf(page.take('mokutil'));
    await machine.run(`${silently}\n${get}`);
    const requesting = machine.start(request);
    requesting.write(`${password}\n${password}\n`);
    requesting.endInput();
    const asked = await requesting.wait(limitMs);
    t.is(asked.code, 0, asked.stderr);
    const booting = machine;
    await machine.reboot(reboot, () => enroll(booting));
    t.regex((await machine.run(look, { check: false })).stdout, /is already enrolled/);

    await buildByHand(t, machine, { signer: 'machine modules', taint: 'O' });
    await machine.powerOff();
    machine.assertCleanConsole();
  } finally {
    await machine?.remove();
    await rm(folder, { recursive: true, force: true });
  }
});
