// SPDX-License-Identifier: Apache-2.0
// The commands of README.md, as they stand there, by a server and a backup host that are
// one guest: its disk is /dev/sda, and 192.0.2.7 is its own address. It has no udev, which
// looks at each new disk and has its partitions found: nbd-client is followed by such a look.

import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { execPath } from 'node:process';
import test from 'ava';
import { checkout } from './checkout.ts';
import { bootGuest } from './guest.ts';
import { shellQuote } from './initrd.ts';

const MiB = 1 << 20;
const limitMs = 240_000;

/** The block of the document that contains a text. */
function blockWith(document: string, text: string): string {
  const blocks = [...document.matchAll(/^```\n(.*?)^```$/gms)].map(([, block = '']) => block);
  const found = blocks.find((block) => block.includes(text));
  if (found === undefined) throw new Error(`README.md has no block with ${text}`);
  return found;
}

test('what README.md says works, command by command', async (t) => {
  t.timeout(15 * 60_000);
  const document = await readFile(join(checkout, 'README.md'), 'utf8');
  const session = blockWith(document, 'backup begin')
    .split('\n')
    .map((line) => line.replace(/^[#$] /, ''));
  const clients = blockWith(document, 'nbdinfo --list')
    .split('\n')
    // What to write for another file system is no command.
    .filter((line) => !line.includes('…'));
  const control = blockWith(document, 'curl ').split('\n');
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
      printf '#!/bin/sh\\nexec %s %s "$@"\\n' ${shellQuote(execPath)} ${shellQuote(join(checkout, 'dist/src/cli.js'))} >/usr/local/bin/stillblock
      printf '#!/bin/sh\\n/usr/sbin/nbd-client "$@" || exit\\n: </dev/nbd0\\n' >/usr/local/bin/nbd-client
      chmod +x /usr/local/bin/stillblock /usr/local/bin/nbd-client
      ip address add 192.0.2.7/32 dev lo; modprobe nbd max_part=8
      echo ',,L' | sfdisk -q /dev/sda; mkfs.ext4 -q /dev/sda1; mkdir -p /srv/a /mnt/spare /run/proxy
      mount /dev/sda1 /srv/a; echo monday >/srv/a/file; sync
      mkfs.ext4 -q $(ls /dev/vda); mount /dev/vda /mnt/spare`,
      { timeoutMs: limitMs },
    );
    await guest.loadModule();
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
    await guest.shutdown();
  } finally {
    await guest.kill();
  }
});
