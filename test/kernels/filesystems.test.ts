// SPDX-License-Identifier: Apache-2.0
// ext4 and XFS under everything that programs do to files, while snapshots of
// both come and go: each file of our exerciser always holds what it wrote,
// stress-ng's stressors verify what they do, and the checkers of both file
// systems find nothing, in any image and in the end on the origins.

import process from 'node:process';
import test from 'ava';
import { testKernel } from '../vm/checkout.ts';
import { bootGuest, type Guest } from '../vm/guest.ts';
import { smallXfs } from '../vm/xfs.ts';
import { askLimitMs, buildTool, Conversation, MiB } from './world.ts';

const kernel = testKernel();
const kinds = ['ext4', 'xfs'] as const;
const disks = { ext4: 96, xfs: 128, store: 240 } as const;
/** More than both origins together, so that it cannot become full. */
const memoryStoreMiB = 240;
/** On each file system; they and the stressors leave the processor to the checkers. */
const exercisers = kernel === 'debug' ? 1 : 2;
const checkLimitMs = 180_000;

/**
 * What stress-ng does in a round, one process each. Sizes are such that the disk does
 * not become full: what is refused for that would say nothing.
 */
const rounds = [
  '--dentry 1 --dentries 64 --rename 1 --hdd 1 --hdd-bytes 4M',
  '--fallocate 1 --fallocate-bytes 4M --symlink 1 --xattr 1',
  '--fpunch 1 --link 1 --iomix 1 --iomix-bytes 4M --fiemap 1 --fiemap-bytes 4M',
  '--dir 1 --dir-dirs 64 --seek 1 --seek-size 4M --sync-file 1 --sync-file-bytes 2M',
] as const;

/** `STILLBLOCK_FILESYSTEMS_SEED` repeats what the exercisers did in a run. */
const seed = Number(process.env['STILLBLOCK_FILESYSTEMS_SEED'] ?? Date.now() % 1_000_000_000);
/** With the checkers one of the rounds, another one in another run. */
const chosenRounds = [...rounds.entries()].filter(
  ([round]) => kernel !== 'debug' || round === seed % rounds.length,
);

let guest: Guest;
let module: Conversation;
const nodes = new Map<keyof typeof disks, string>();
const node = (name: keyof typeof disks): string => nodes.get(name) ?? '';

test.before(async () => {
  const ioctls = await buildTool('ioctls');
  guest = await bootGuest({
    kernel,
    disks: Object.entries(disks).map(([name, size]) => ({ name, sizeBytes: size * MiB })),
    saved: true,
  });
  for (const name of Object.keys(disks) as (keyof typeof disks)[]) {
    nodes.set(name, await guest.disk(name));
  }
  await guest.run(
    `set -e
    modprobe -a xfs dm-snapshot loop
    mkdir -p /srv/ext4 /srv/xfs /run/image
    mkfs.ext4 -q -F ${node('ext4')}; mount ${node('ext4')} /srv/ext4
    ${smallXfs} -K ${node('xfs')}; mount ${node('xfs')} /srv/xfs
    mkdir /srv/ext4/stress /srv/xfs/stress
    truncate -s 64M /run/overlay; losetup /dev/loop5 /run/overlay`,
    { timeoutMs: checkLimitMs },
  );
  await guest.loadModule();
  module = new Conversation(guest, ioctls);
});

test.after.always(() => guest?.kill());

/**
 * Text for a shell: mounts an image, reads all of its files, and checks it. That needs the
 * log replayed and orphans removed, so it happens on a writable layer above the image.
 */
const checkImage = (kind: (typeof kinds)[number], image: string): string => `set -e
  dd if=/dev/zero of=/dev/loop5 bs=64k count=1 conv=notrunc status=none
  dmsetup create --noudevsync layer --table "0 $(blockdev --getsz ${image}) snapshot ${image} /dev/loop5 N 8"
  dmsetup mknodes
  mount ${kind === 'xfs' ? '-o nouuid' : ''} /dev/mapper/layer /run/image
  find /run/image -type f -exec cat {} + | wc -c
  umount /run/image
  ${kind === 'xfs' ? 'xfs_repair -n' : 'e2fsck -fn'} /dev/mapper/layer 2>&1
  dmsetup remove --noudevsync --retry layer`;

test('files stay what they are, and images stay file systems, while snapshots come and go', async (t) => {
  t.timeout(15 * 60_000);
  t.log(`seed ${seed}`);
  const exerciser = await buildTool('exerciser');
  const ids: string[] = [];
  for (const kind of kinds) ids.push(...(await module.require(`attach ${node(kind)}`)));
  const running = kinds.flatMap((kind, k) =>
    Array.from({ length: exercisers }, (_, i) => ({
      name: `${kind}/${i}`,
      command: guest.start(
        `exec nice -n 5 ${exerciser} /srv/${kind}/file.${i} ${seed + 10 * k + i}`,
      ),
    })),
  );
  for (const [round, stressors] of chosenRounds) {
    const stressing = kinds.map((kind) =>
      guest.start(
        `exec nice -n 15 stress-ng -v --verify --temp-path /srv/${kind}/stress ${stressors} 2>&1`,
      ),
    );
    const [...each] = stressors.matchAll(/ 1(?= |$)/g);
    const started = new RegExp(`(?:: started \\[[^]*){${each.length}}`);
    for (const command of stressing) await command.waitForOutput(started, askLimitMs);
    const store = round % 2 ? `device:${node('store')}` : `memory:${memoryStoreMiB * MiB}`;
    const images = await module.require(
      `take held trackers=${ids.join(',')} mounts=/srv/ext4,/srv/xfs stores=${store} freeze=60000`,
    );
    for (const [k, kind] of kinds.entries()) {
      const { code, stdout, stderr } = await guest
        .run(checkImage(kind, `/dev/${images[k]}`), { check: false, timeoutMs: checkLimitMs })
        .catch(async (error: unknown) => {
          await guest.run('echo w >/proc/sysrq-trigger', { check: false });
          t.log(`round ${round}`, guest.console());
          throw error;
        });
      t.is(code, 0, `image of ${kind}, round ${round}: ${stdout}${stderr}`);
    }
    t.is((await module.require('state held'))[0], 'held', `round ${round}`);
    await module.require('close held');
    for (const [k, command] of stressing.entries()) {
      const early = command.code !== undefined;
      command.kill(2);
      const { code, stdout } = await command.wait(askLimitMs);
      t.false(early, `stress-ng on ${kinds[k]} did not go on, round ${round}: ${stdout}`);
      t.is(code, 0, `stress-ng on ${kinds[k]}, round ${round}: ${stdout}`);
    }
  }
  for (const { name, command } of running) {
    command.kill(15);
    const { code, stdout, stderr } = await command.wait(askLimitMs);
    t.is(code, 0, `${name}, seed ${seed}: ${stderr}`);
    const steps = Object.values(JSON.parse(stdout || '{}') as Record<string, number>);
    t.true(
      steps.length > 0 && steps.every((count) => count > 0),
      `${name} has not done everything: ${stdout}`,
    );
    t.log(`${name}: ${steps.reduce((sum, count) => sum + count, 0)} steps`);
  }
  await module.require('detach all');
  await guest.run(
    `set -e; umount /srv/ext4 /srv/xfs
    e2fsck -fn ${node('ext4')} 2>&1; xfs_repair -n ${node('xfs')} 2>&1; losetup -d /dev/loop5`,
    { timeoutMs: checkLimitMs },
  );
  await module.end();
  await guest.run('rmmod stillblock');
  await guest.shutdown();
});
