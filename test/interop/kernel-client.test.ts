// SPDX-License-Identifier: Apache-2.0
/**
 * Linux' own client, in a guest: it knows simple replies alone, believes every size it is
 * told, and puts a file system on top.
 */
import test, { type ExecutionContext } from 'ava';
import { commandsOf, Page } from '../pages.ts';
import { certify } from '../vm/certify.ts';
import { cli } from '../vm/command-line.ts';
import { bootGuest, type Guest } from '../vm/guest.ts';
import { smallXfs } from '../vm/xfs.ts';

const MIB = 1 << 20;
const startLimitMs = 120_000;
const readLimitMs = 180_000;

interface Attachment {
  readonly what: string;
  /** Arguments for nbd-client, but for the device. */
  readonly args: string;
  readonly blockSizeBytes: number;
  /** Over TCP. */
  readonly connections: number;
}

const PORT = 10_809;
const TLS_PORT = 10_810;
/** In the guest: certificates of the server, and of a client that it knows. */
const SERVER_FOLDER = '/run/server';
const CLIENT_FOLDER = '/run/client';
const CLIENT_FILES = `-cacertfile ${CLIENT_FOLDER}/ca-cert.pem -certfile ${CLIENT_FOLDER}/client-cert.pem -keyfile ${CLIENT_FOLDER}/client-key.pem`;

const ATTACHMENTS: readonly Attachment[] = [
  {
    what: 'over TCP, as it is',
    args: `127.0.0.1 ${PORT} -N disk`,
    blockSizeBytes: 512,
    connections: 1,
  },
  {
    what: 'over TCP, two connections',
    args: `127.0.0.1 ${PORT} -N disk -C 2`,
    blockSizeBytes: 512,
    connections: 2,
  },
  {
    what: 'over TCP, blocks of 512 bytes',
    args: `127.0.0.1 ${PORT} -N disk -b 512`,
    blockSizeBytes: 512,
    connections: 1,
  },
  {
    what: 'on a unix socket, blocks of 4 KiB',
    args: '-unix /run/nbd.sock -N disk -b 4096',
    blockSizeBytes: 4096,
    connections: 0,
  },
  {
    // A process of its own stands between the kernel, which knows no TLS, and the server.
    what: 'over TLS, certificates of both',
    args: `localhost ${TLS_PORT} -N disk -enable-tls -tlshostname localhost ${CLIENT_FILES}`,
    blockSizeBytes: 512,
    connections: 1,
  },
];

/** Attaches, compares every byte, mounts, detaches. Returns what the kernel says of the device. */
async function check(guest: Guest, disk: string, attachment: Attachment): Promise<string> {
  const { args, blockSizeBytes } = attachment;
  const { stdout } = await guest.run(
    `set -e
    nbd-client ${args} -R /dev/nbd0 </dev/null >/run/client.log 2>&1 || { cat /run/client.log >&2; exit 1; }
    blockdev --getro --getsize64 --getbsz /dev/nbd0
    ss -Htn state established '( dport = :${PORT} or dport = :${TLS_PORT} )' | wc -l
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

/** What docs/journeys.md says about mounting, of a disk with a partition of each file system. */
async function runJourney(t: ExecutionContext, guest: Guest): Promise<void> {
  const page = await Page.open('docs/journeys.md', import.meta.url);
  await guest.run(
    `set -e; ip address add 192.0.2.7/32 dev lo
    truncate -s 64M /run/sda; printf 'label: gpt\\n,16M\\n,40M\\n' | sfdisk -q /run/sda
    losetup -P /dev/loop0 /run/sda; mkfs.ext4 -q /dev/loop0p1; ${smallXfs} /dev/loop0p2
    for part in 1 2; do mount /dev/loop0p$part /mnt; echo $part >/mnt/file; umount /mnt; done
    losetup -d /dev/loop0`,
    { timeoutMs: readLimitMs },
  );
  const server = guest.start(
    `exec ${cli} nbd --json -i 192.0.2.7 --insecure --export sda=/run/sda`,
  );
  await server.waitForOutput(/"event":"serving"/, startLimitMs);
  const [attach, detach] = page.takeAll().map(commandsOf);
  // Without udev somebody has to look at the new disk, so that its partitions are found.
  const script = attach?.map((line) =>
    /^nbd-client/.test(line) ? `${line} >&2; : </dev/nbd0` : line,
  );
  const { stdout } = await guest.run(
    ['set -e', ...(script ?? []), 'cat /mnt/file /media/file', ...(detach ?? [])].join('\n'),
    { timeoutMs: readLimitMs },
  );
  t.regex(stdout, /^1\n2\n/);
}

test('nbd-client: plain, two connections, small blocks, a unix socket, TLS', async (t) => {
  t.timeout(15 * 60_000);
  const sizeBytes = 48 * MIB + 512;
  const guest = await bootGuest({ kernel: '6.1', disks: [{ name: 'disk', sizeBytes }] });
  t.teardown(() => guest.kill());
  const disk = await guest.disk('disk');
  await guest.run(`set -e
    modprobe nbd max_part=8; modprobe loop
    mkfs.ext4 -q -b 4096 ${disk}
    mount ${disk} /mnt
    cp /usr/bin/python3 /usr/bin/qemu-img /usr/bin/nbdcopy /mnt
    (cd /mnt && sha256sum python3 qemu-img nbdcopy >sums)
    umount /mnt`);
  await certify(guest, SERVER_FOLDER, { kernel: CLIENT_FOLDER });
  const options = `--json --export disk=${disk}`;
  const servers = [
    `-U /run/nbd.sock -p ${PORT}`,
    `-p ${TLS_PORT} --tls-certificates ${SERVER_FOLDER} --tls-verify-peer --tls require`,
  ].map((addresses) => guest.start(`exec ${cli} nbd ${options} ${addresses}`));
  await Promise.all(
    servers.map((server) => server.waitForOutput(/"event":"serving"/, startLimitMs)),
  );
  for (const attachment of ATTACHMENTS) {
    const said = await check(guest, disk, attachment);
    const { what, blockSizeBytes, connections } = attachment;
    t.deepEqual(
      said.trim().split('\n'),
      [1, sizeBytes, blockSizeBytes, connections].map(String),
      what,
    );
  }
  await runJourney(t, guest);
  await guest.shutdown();
});
