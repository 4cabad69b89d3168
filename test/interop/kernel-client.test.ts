// SPDX-License-Identifier: Apache-2.0
/**
 * Linux' own client, in a guest: it knows simple replies alone, believes every size it is
 * told, and puts a file system on top.
 */
import { join } from 'node:path';
import test from 'ava';
import { checkout } from '../vm/checkout.ts';
import { bootGuest, type Guest } from '../vm/guest.ts';
import { shellQuote } from '../vm/initrd.ts';

const MIB = 1 << 20;
const cli = `node ${shellQuote(join(checkout, 'dist/src/cli.js'))}`;
const startLimitMs = 120_000;
const readLimitMs = 180_000;

interface Attachment {
  readonly what: string;
  /** Arguments for nbd-client, but for the device. */
  readonly args: string;
  readonly blockSizeBytes: number;
  readonly connections: number;
}

const ATTACHMENTS: readonly Attachment[] = [
  {
    what: 'over TCP, as it is',
    args: '127.0.0.1 10809 -N disk',
    blockSizeBytes: 512,
    connections: 1,
  },
  {
    what: 'over TCP, two connections',
    args: '127.0.0.1 10809 -N disk -C 2',
    blockSizeBytes: 512,
    connections: 2,
  },
  {
    what: 'over TCP, blocks of 512 bytes',
    args: '127.0.0.1 10809 -N disk -b 512',
    blockSizeBytes: 512,
    connections: 1,
  },
  {
    what: 'on a unix socket, blocks of 4 KiB',
    args: '-unix /run/nbd.sock -N disk -b 4096',
    blockSizeBytes: 4096,
    connections: 1,
  },
];

/** Attaches, compares every byte, mounts, detaches. Returns what the kernel says of the device. */
async function check(guest: Guest, disk: string, attachment: Attachment): Promise<string> {
  const { args, blockSizeBytes } = attachment;
  const { stdout } = await guest.run(
    `set -e
    nbd-client ${args} -R /dev/nbd0 >&2
    blockdev --getro --getsize64 --getbsz /dev/nbd0
    ss -Htn state established '( dport = :10809 )' | wc -l
    cmp /dev/nbd0 ${disk}
    # At places and in sizes that are nobody's favourites, some 16 at a time.
    fio --name=r --filename=/dev/nbd0 --readonly --rw=randread --bsrange=${blockSizeBytes}-96k \
      --direct=1 --ioengine=libaio --iodepth=16 --io_size=4M --randseed=3 --minimal >/dev/null
    mount -o ro,noload /dev/nbd0 /mnt
    (cd /mnt && sha256sum -c --quiet sums)
    umount /mnt
    # Writing is refused by the kernel, which was told.
    ! dd if=/dev/zero of=/dev/nbd0 bs=4096 count=1 conv=fsync 2>/dev/null
    nbd-client -d /dev/nbd0 >&2
    `,
    { timeoutMs: readLimitMs },
  );
  return stdout;
}

test('nbd-client: plain, two connections, small blocks, a unix socket', async (t) => {
  t.timeout(10 * 60_000);
  const sizeBytes = 48 * MIB + 512;
  const guest = await bootGuest({ kernel: '6.1', disks: [{ name: 'disk', sizeBytes }] });
  t.teardown(() => guest.kill());
  const disk = await guest.disk('disk');
  await guest.run(`set -e
    modprobe nbd
    mkfs.ext4 -q -b 4096 ${disk}
    mount ${disk} /mnt
    cp /usr/bin/python3 /usr/bin/qemu-img /usr/bin/nbdcopy /mnt
    (cd /mnt && sha256sum python3 qemu-img nbdcopy >sums)
    umount /mnt`);
  const server = guest.start(
    `exec ${cli} nbd --json -U /run/nbd.sock -p 10809 --export disk=${disk}`,
  );
  await server.waitForOutput(/"event":"serving"/, startLimitMs);
  for (const attachment of ATTACHMENTS) {
    const said = await check(guest, disk, attachment);
    const tcp = attachment.args.includes('127.0.0.1') ? attachment.connections : 0;
    t.deepEqual(
      said.trim().split('\n'),
      ['1', String(sizeBytes), String(attachment.blockSizeBytes), String(tcp)],
      attachment.what,
    );
  }
  await guest.shutdown();
});
