// SPDX-License-Identifier: Apache-2.0
// The commands of README.md, as they stand there, by a server and a backup host that are
// one guest: its disk is /dev/sda, and 192.0.2.7 is its own address. It has no udev, which
// looks at each new disk and has its partitions found: nbd-client is followed by such a look.

import { execFile } from 'node:child_process';
import { cp, rm } from 'node:fs/promises';
import { join } from 'node:path';
import { promisify } from 'node:util';
import test from 'ava';
import { commandsOf, Page } from '../pages.ts';
import { checkout, stockKernel } from './checkout.ts';
import { installCli } from './command-line.ts';
import { bootGuest } from './guest.ts';
import { shellQuote } from './initrd.ts';

const MiB = 1 << 20;
const limitMs = 240_000;
const shell = promisify(execFile);
/** Where the module is built as README.md has it, so that no other build is disturbed. */
const built = join(checkout, 'build/readme');

/** Builds the module by a command for the running machine, for the guest's kernel instead. */
async function buildModule(command: string): Promise<void> {
  const { release, modulesFolder } = stockKernel('6.1');
  const headers = join(modulesFolder, '../../usr/src', `linux-headers-${release}`);
  await rm(built, { recursive: true, force: true });
  await cp(join(checkout, 'module'), join(built, 'module'), { recursive: true });
  const here = command.replace('/lib/modules/$(uname -r)/build', shellQuote(headers));
  await shell('sh', ['-ec', here], { cwd: built });
}

test('what README.md says works, command by command', async (t) => {
  t.timeout(15 * 60_000);
  const page = await Page.open('README.md', import.meta.url);
  const session = commandsOf(page.take('backup begin'));
  const clients = commandsOf(page.take('nbdinfo --list'))
    // What to write for another file system is no command.
    .filter((line) => !line.includes('…'));
  const control = commandsOf(page.take('curl '));
  const [install = '', build = '', load = ''] = commandsOf(page.take('insmod '));
  t.regex(install, /^apt-get install /);
  const numbers = (await Page.open('docs/numbers.md', import.meta.url)).take('status');
  const [begin = ''] = commandsOf(
    (await Page.open('docs/security.md', import.meta.url)).take('backup begin'),
  );
  t.deepEqual(page.left, []);
  const building = buildModule(build);
  const guest = await bootGuest({
    kernel: '6.1',
    disks: [
      { name: 'server', sizeBytes: 64 * MiB, bus: 'virtio-scsi' },
      { name: 'spare', sizeBytes: 128 * MiB },
    ],
  });
  try {
    t.is(await guest.disk('server'), '/dev/sda');
    await guest.run(
      `set -e
      ${installCli}
      printf '#!/bin/sh\\n/usr/sbin/nbd-client "$@" || exit\\n: </dev/nbd0\\n' >/usr/local/bin/nbd-client
      chmod +x /usr/local/bin/nbd-client
      ip address add 192.0.2.7/32 dev lo; modprobe nbd max_part=8
      echo ',,L' | sfdisk -q /dev/sda; mkfs.ext4 -q /dev/sda1; mkdir -p /srv/a /mnt/spare /run/proxy
      mount /dev/sda1 /srv/a; echo monday >/srv/a/file; sync
      mkfs.ext4 -q $(ls /dev/vda); mount /dev/vda /mnt/spare`,
      { timeoutMs: limitMs },
    );
    await building;
    await guest.run(`cd ${shellQuote(built)}; ${load}`);
    guest.start('exec stillblock serve 2>/run/serve.log');
    await guest.run('until [ -S /run/stillblock/control.sock ]; do sleep 0.2; done', {
      timeoutMs: limitMs,
    });
    const run = async (commands: readonly string[]): Promise<string> => {
      let output = '';
      for (const command of commands.filter((line) => line.trim() !== '')) {
        if (command.includes('--checkpoint tuesday')) {
          await guest.run('echo tuesday >/srv/a/file; sync');
        }
        const { stdout } = await guest.run(`cd /run/proxy; ${command}`, { timeoutMs: limitMs });
        output += stdout;
      }
      return output;
    };
    await run(session);
    const status = await run(commandsOf(numbers));
    t.regex(status, /^store .* used/m);
    t.regex(status, /^sda: .* changed between monday and tuesday$/m);
    t.regex(await run(clients), /sda@monday/);
    t.is((await guest.run('cat /mnt/file')).stdout, 'tuesday\n');
    t.regex(await run(control), /"checkpoint":"tuesday"/);
    // What the increments stand on is Monday; together they are what is served.
    const { stdout } = await guest.run(
      `set -e; umount /mnt; nbd-client -d /dev/nbd0 >&2; cd /run/proxy
      qemu-img compare -f qcow2 -F raw tuesday.qcow2 sda.raw; stillblock backup end >&2
      qemu-img convert -O raw monday.qcow2 monday.raw; ! grep -q -a tuesday monday.raw; grep -c -a monday monday.raw`,
      { timeoutMs: limitMs },
    );
    t.regex(stdout, /^Images are identical\.\n[1-9]/);
    const [socket = ''] = begin.match(/\/run\/\S+\.sock/) ?? [];
    const listed = await guest.run(
      `set -e; ${begin} >&2; stat -c %a $(dirname ${socket}); nbdinfo --size "nbd+unix:///sda?socket=${socket}"`,
      { timeoutMs: limitMs },
    );
    t.is(listed.stdout, `700\n${64 * MiB}\n`);
    await guest.shutdown();
  } finally {
    await guest.kill();
  }
});
