// SPDX-License-Identifier: Apache-2.0
// Raw writers on stacked devices, with no file system to freeze: a partition and
// its disk tracked at once, and a device-mapper volume with the disk beneath it.
// What lies on the same sectors must be the same in both images of one instant,
// whoever of the trackers held a write first; only gate and drain see to that.

import test from 'ava';
import { testKernel } from './checkout.ts';
import type { GuestCommand } from './command.ts';
import { cli } from './command-line.ts';
import { bootGuest, type Guest } from './guest.ts';
import { shellQuote } from './initrd.ts';

const MiB = 1 << 20;
const kernel = testKernel();
const cliLimitMs = 300_000;
const compareLimitMs = 180_000;
const socket = '/run/stacked.sock';
const partition = { startMiB: 1, sizeMiB: 40 };
const upperMiB = 48;

/** The images of a backup, by the disk's name. */
interface Serving {
  readonly disks: readonly { readonly name: string; readonly image: string }[];
}

/** Says which 64 KiB blocks of two files differ and are not dirty in nbdinfo's map (stdin). */
const uncovered = `
import json, sys
dirty = [(e["offset"], e["offset"] + e["length"]) for e in json.load(sys.stdin) if e["type"] & 1]
block, missed, differing, at = 65536, [], 0, 0
with open(sys.argv[1], "rb") as old, open(sys.argv[2], "rb") as new:
    while True:
        a, b = old.read(block), new.read(block)
        if not a and not b: break
        if a != b:
            differing += 1
            if not any(start <= at and at + len(a) <= end for start, end in dirty): missed.append(at)
        at += block
covered = sum(end - start for start, end in dirty)
print(json.dumps({"missed": missed, "differing": differing * block, "dirty": covered, "size": at}))
`;

async function beginBackup(
  guest: Guest,
  checkpoint: string,
): Promise<{ command: GuestCommand; image: (disk: string) => string }> {
  const command = guest.start(
    `exec ${cli} backup begin --json --checkpoint ${checkpoint} --store memory --store-size 240M -U ${socket}`,
  );
  const [line] = await command.waitForOutput(/^\{.*"event":"serving".*\}$/m, cliLimitMs);
  const { disks } = JSON.parse(line) as Serving;
  return {
    command,
    image: (name) => {
      const disk = disks.find((candidate) => candidate.name === name);
      if (disk === undefined) throw new Error(`no image of ${name}`);
      return disk.image;
    },
  };
}

test('stacked devices under raw writes have images of one instant', async (t) => {
  t.timeout(15 * 60_000);
  const guest = await bootGuest({
    kernel,
    memoryMiB: 2048,
    disks: [
      { name: 'parted', sizeBytes: 64 * MiB },
      { name: 'under', sizeBytes: upperMiB * MiB },
    ],
  });
  try {
    await guest.loadModule();
    const [parted, under] = await Promise.all([guest.disk('parted'), guest.disk('under')]);
    const part = `${parted}1`;
    const [partedName, underName] = [parted.slice(5), under.slice(5)];
    await guest.run(
      `set -e
      echo 'start=${partition.startMiB}MiB, size=${partition.sizeMiB}MiB' | sfdisk --quiet --label dos ${parted}
      dmsetup create upper --noudevsync --table "0 $((${upperMiB} * 2048)) linear ${under} 0"
      dmsetup mknodes
      ${cli} device attach ${parted} ${part} /dev/mapper/upper ${under}`,
      { timeoutMs: cliLimitMs },
    );
    const writers = [part, '/dev/mapper/upper'].map((device) =>
      guest.start(
        `exec fio --name=raw --filename=${device} --rw=randwrite --bsrange=4k-64k --direct=1 --ioengine=libaio \
          --iodepth=8 --randrepeat=0 --norandommap --time_based --runtime=3600 --rate_iops=150 --minimal`,
      ),
    );

    const first = await beginBackup(guest, 'first');
    const hashes = `cat ${first.image(partedName)} ${first.image(underName)} | sha256sum`;
    const early = await guest.run(hashes, { timeoutMs: compareLimitMs });
    await guest.run(
      `set -e
      dd if=${first.image(partedName)} bs=1M skip=${partition.startMiB} count=${partition.sizeMiB} status=none | cmp - ${first.image(`${partedName}1`)}
      cmp ${first.image('upper')} ${first.image(underName)}
      cp ${first.image('upper')} /run/first`,
      { timeoutMs: compareLimitMs },
    );
    const late = await guest.run(hashes, { timeoutMs: compareLimitMs });
    t.is(late.stdout, early.stdout, 'an image changed while it was held');
    first.command.kill(2);
    t.is((await first.command.wait(cliLimitMs)).code, 0);

    const second = await beginBackup(guest, 'second');
    const { stdout } = await guest.run(
      `set -eo pipefail
      cmp ${second.image('upper')} ${second.image(underName)}
      nbdinfo --json --map=qemu:dirty-bitmap:first 'nbd+unix:///upper?socket=${socket}' |
        /usr/bin/python3 -c ${shellQuote(uncovered)} /run/first ${second.image('upper')}`,
      { timeoutMs: compareLimitMs },
    );
    const changes = JSON.parse(stdout) as {
      missed: number[];
      differing: number;
      dirty: number;
      size: number;
    };
    t.log(changes);
    t.deepEqual(changes.missed, [], 'blocks differ that the change map calls clean');
    t.is(changes.size, upperMiB * MiB);
    t.true(changes.differing > 0 && changes.dirty >= changes.differing);

    // The owner dies under load: the kernel ends the snapshot, and the writers go on.
    for (const writer of writers) t.is(writer.code, undefined, 'a writer has ended');
    second.command.kill(9);
    await second.command.wait(cliLimitMs);
    await guest.run('until ! ls /dev/stillblock[0-9]* >/dev/null 2>&1; do sleep 0.1; done');
    for (const writer of writers) writer.kill(2);
    for (const writer of writers) {
      const { code, stdout: result } = await writer.wait(cliLimitMs);
      // The fifth field of fio's terse output counts errors.
      t.is(result.split(';')[4], '0', `${code} ${result}`);
    }
    await guest.run(
      `set -e
      ${cli} device detach ${parted} ${part} /dev/mapper/upper ${under}
      rmmod stillblock
      dmsetup remove --noudevsync upper`,
      { timeoutMs: cliLimitMs },
    );
    await guest.shutdown();
  } finally {
    await guest.kill();
  }
});
