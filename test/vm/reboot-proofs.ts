// SPDX-License-Identifier: Apache-2.0
// What a history has to stand on a machine that boots by our hook (booted.ts): each proof begins
// with a machine that was shut down cleanly with a point that its copies are of, and leaves such
// a one behind.

import { setTimeout as delay } from 'node:timers/promises';
import type { ExecutionContext } from 'ava';
import { history, type Seen } from '../kernels/histories.ts';
import { type Boot, type Booted, type Each, tracked } from './booted.ts';
import { bootGuest, GuestFailure } from './guest.ts';

/** Beside what was written: the pages of the place that count as written at each boot. */
const slackBytes = 1024 * 1024;
const workloadMs = 4_000;
/** What a boot takes from its agent's first word to its end, beside the workload. */
const afterBootMs = 12_000;

/** Numbers from 0 to 1, by xorshift32, so that a seed is a run. */
export function randomOf(seed: number): () => number {
  let state = Math.imul(seed, 0x9e3779b1) | 1;
  return () => {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    return (state >>> 0) / 2 ** 32;
  };
}

/** Each history was taken up, and is the one that the copies are of. */
function assertTakenUp(t: ExecutionContext, world: Booted, seen: Each<Seen>, what: string): void {
  for (const name of tracked) {
    const { takenUp, generation } = seen[name];
    t.deepEqual(
      { takenUp, generation },
      { takenUp: true, generation: world.point(name)?.generation },
      `${what}: ${name}, began ${seen[name].began}`,
    );
  }
}

async function assertIncrements(t: ExecutionContext, boot: Boot, what: string): Promise<void> {
  const increments = await boot.checkpoint();
  for (const name of tracked) {
    const { changedBytes = -1, writtenBytes = 0 } = increments[name] ?? {};
    t.true(
      changedBytes >= writtenBytes && changedBytes <= writtenBytes + slackBytes,
      `${what}: ${name}: ${changedBytes} for ${writtenBytes}`,
    );
    t.log(`${what}: ${name}: ${changedBytes >> 10} KiB changed, ${writtenBytes >> 10} KiB written`);
  }
}

/** A first point: a full copy, and a clean end. */
export async function begin(t: ExecutionContext, world: Booted): Promise<void> {
  const boot = await world.boot();
  const seen = await boot.seen();
  for (const name of tracked) t.like(seen[name], { kept: history.placeLoose });
  await boot.settle();
  for (const name of tracked) t.is((await boot.seen())[name].kept, history.ok);
  await boot.write('before', 256);
  await boot.checkpoint();
  await boot.reboot();
}

/** Reboots under a workload: the increment is right, and as large as what was written. */
export async function cleanReboots(
  t: ExecutionContext,
  world: Booted,
  rounds: number,
): Promise<void> {
  for (let round = 1; round <= rounds; round += 1) {
    const boot = await world.boot();
    assertTakenUp(t, world, await boot.seen(), `reboot ${round}`);
    await boot.settle();
    await boot.write(`booted-${round}`, 256);
    await assertIncrements(t, boot, `reboot ${round}`);
    boot.startWorkload();
    await delay(workloadMs);
    await boot.reboot();
  }
}

/** The increment after the last proof, and a clean end. */
async function settleAfter(
  t: ExecutionContext,
  world: Booted,
  expected: Each<number>,
  what: string,
): Promise<void> {
  const boot = await world.boot();
  const seen = await boot.seen();
  for (const name of tracked) {
    const { takenUp, generation, began } = seen[name];
    const same = generation === world.point(name)?.generation;
    if (expected[name] === history.ok) {
      t.deepEqual({ takenUp, same }, { takenUp: true, same: true }, `${what}: ${name}: ${began}`);
    } else {
      t.deepEqual(
        { takenUp, same, began },
        { takenUp: false, same: false, began: expected[name] },
        `${what}: ${name}`,
      );
    }
  }
  await boot.settle();
  await boot.checkpoint();
  await boot.reboot();
}

/** Another system, without the module, writes a block of one disk. */
export async function foreignWrite(t: ExecutionContext, world: Booted): Promise<void> {
  const other = await bootGuest({
    ...{ kernel: world.kernel, memoryMiB: 512 },
    disks: world.disksFor('root', 'data'),
  });
  const data = await other.disk('data');
  await other.run(`mkdir -p /srv/data; mount ${data} /srv/data
    dd if=/dev/urandom of=/srv/data/before conv=notrunc,fsync bs=4k count=1 status=none
    umount /srv/data`);
  await other.shutdown();
  await settleAfter(t, world, { root: history.ok, data: history.changed }, 'a foreign write');
}

interface Killed {
  readonly console: string;
  /** The end had been asked for. */
  readonly ending: boolean;
}

/** Boots, works, and is about to end; QEMU is killed at some moment of that. */
async function killSomewhere(world: Booted, killAfterMs: number): Promise<Killed> {
  let boot: Boot;
  try {
    boot = await world.boot({ killAfterMs });
  } catch (error) {
    if (!(error instanceof GuestFailure)) throw error;
    return { console: error.console, ending: false };
  }
  let ending = false;
  const work = async (): Promise<void> => {
    await boot.settle();
    await boot.write('killed', 64);
    boot.startWorkload();
    await delay(workloadMs);
    ending = true;
    await boot.reboot();
  };
  // QEMU ends in the middle of it, or has ended by itself.
  await work().catch(() => {});
  await boot.guest.ended;
  return { console: boot.guest.console(), ending };
}

/**
 * Power cuts at random moments, each from the same clean state: a full copy is required, unless
 * nothing was tracked yet or all was saved.
 */
export async function kills(
  t: ExecutionContext,
  world: Booted,
  seeds: readonly number[],
): Promise<void> {
  const restore = await world.saveDisks();
  // From QEMU's start to its end, if it is let alone.
  const spanMs = world.bootMs + workloadMs + afterBootMs;
  for (const seed of seeds) {
    const killAfterMs = Math.round((0.3 + 0.7 * randomOf(seed)()) * spanMs);
    const { console, ending } = await killSomewhere(world, killAfterMs);
    const boot = await world.boot();
    const seen = await boot.seen();
    for (const [index, name] of tracked.entries()) {
      const { takenUp, generation, began } = seen[name];
      const inUse = console.includes(`stillblock: ${['vda', 'vdb'][index]}: tracked`);
      const what = `seed ${seed}, killed after ${killAfterMs} ms: ${name}`;
      const was = inUse ? (ending ? 'ending' : 'tracked') : 'not tracked yet';
      t.log(`${what}: ${was}: ${takenUp ? 'taken up' : `full, reason ${began}`}`);
      if (inUse && !ending) t.false(takenUp, what);
      t.is(generation === world.point(name)?.generation, takenUp, what);
      if (!takenUp) t.is(began, history.notSaved, what);
    }
    if (tracked.some((name) => seen[name].takenUp)) {
      await boot.settle();
      await boot.checkpoint();
    }
    await boot.guest.kill();
    await restore();
  }
}
