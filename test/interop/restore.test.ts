// SPDX-License-Identifier: Apache-2.0
/** `stillblock restore` from chains that stock qemu-img wrote, to files. */
import { open, readdir, readFile, stat, truncate, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import type { ExecutionContext } from 'ava';
import { parseSfdisk } from '../../src/layout.ts';
import { folder, pattern } from '../nbd/world.ts';
import { run } from './clients.ts';
import { errorOf, Machine, MIB, manifestOf, pullTest, soon, start, stillblock } from './pulling.ts';

interface Pulled {
  readonly machine: Machine;
  readonly chain: string;
  readonly home: string;
}

/** A chain of some days. */
async function pulled(
  t: ExecutionContext,
  sizes: Readonly<Record<string, number>>,
  days: number,
): Promise<Pulled> {
  const machine = await Machine.make(t, sizes);
  const home = await folder(t);
  const chain = join(home, 'chain');
  for (let day = 1; day <= days; day += 1) {
    machine.change(day);
    const instant = await machine.serve(t, `day-${day}`);
    const ended = await stillblock(t, 'pull', ...instant.args, chain);
    t.is(ended.code, 0, ended.stderr);
    await instant.close();
  }
  return { machine, chain, home };
}

function contentAt(machine: Machine, disk: string, checkpoint: string): Buffer {
  return machine.disk(disk).at.get(checkpoint) ?? Buffer.alloc(0);
}

pullTest('the disks of any point of a chain are written back, and read back', async (t) => {
  const { machine, chain, home } = await pulled(t, { sda: 4 * MIB, sdb: 2 * MIB }, 3);
  const newest = await stillblock(
    t,
    ...(['restore', chain, '--yes'] as const),
    ...['--map', `sda=${join(home, 'a')}`, '--map', `sdb=${join(home, 'b')}`],
  );
  t.is(newest.code, 0, newest.stderr);
  t.true(contentAt(machine, 'sda', 'day-3').equals(await readFile(join(home, 'a'))));
  t.true(contentAt(machine, 'sdb', 'day-3').equals(await readFile(join(home, 'b'))));
  const events = newest.events.map(({ event }) => event).filter((event) => event !== 'progress');
  t.deepEqual(events, ['planned', 'restored', 'restored', 'done']);
  // Over something else, of which what lies behind the disk stays.
  const larger = join(home, 'larger');
  const before = pattern(5 * MIB, 9);
  await writeFile(larger, before);
  const map = ['--map', `sda=${larger}`];
  const first = await stillblock(t, 'restore', chain, '--yes', '--at', 'day-1', ...map);
  t.is(first.code, 0, first.stderr);
  const after = await readFile(larger);
  t.true(contentAt(machine, 'sda', 'day-1').equals(after.subarray(0, 4 * MIB)));
  t.true(before.subarray(4 * MIB).equals(after.subarray(4 * MIB)));
  // A new file is as sparse as the disk.
  t.true((await stat(join(home, 'a'))).blocks * 512 < 3.5 * MIB);
});

pullTest('what must not be written to is refused, and nothing is written', async (t) => {
  const { chain, home } = await pulled(t, { sda: 2 * MIB, sdb: MIB }, 1);
  const small = join(home, 'small');
  await writeFile(small, 'x');
  await truncate(small, 2 * MIB - 512);
  const fine = join(home, 'fine');
  const cases: readonly [string, number, ...string[]][] = [
    ['TARGET_TOO_SMALL', 1, '--map', `sda=${small}`],
    ['TARGET_IS_SOURCE', 1, '--map', `sda=${join(chain, 'sda.0001.qcow2')}`],
    ['TARGET_IS_SOURCE', 1, '--map', `sda=${join(chain, 'new.raw')}`],
    ['TARGET_TWICE', 1, '--map', `sda=${fine}`, '--map', `sdb=${home}/./fine`],
    ['TARGET_KIND', 1, '--map', `sda=${home}`],
    ['ENOENT', 1, '--map', 'sda=/dev/no-such-disk'],
    ['ENOENT', 1, '--map', `sda=${home}/no/such/folder`],
    ['NO_DISK', 1, '--map', `sdc=${fine}`],
    ['NO_POINT', 1, '--map', `sda=${fine}`, '--at', 'day-9'],
    // The second is wrong: the first is not written either.
    ['TARGET_TOO_SMALL', 1, '--map', `sdb=${fine}`, '--map', `sda=${small}`],
  ];
  for (const [code, exitCode, ...args] of cases) {
    const refused = await stillblock(t, 'restore', chain, '--yes', ...args);
    t.is(refused.code, exitCode, args.join(' '));
    t.is(errorOf(refused), code, refused.stderr);
  }
  const unasked = await stillblock(t, 'restore', chain, '--map', `sda=${fine}`);
  t.is(unasked.code, 2);
  t.regex(unasked.stderr, /nobody is there to be asked/);
  const plan = await stillblock(t, 'restore', chain, '--dry-run', '--map', `sda=${fine}`);
  t.is(plan.code, 0);
  t.deepEqual((await readdir(home)).toSorted(), ['chain', 'small']);
  t.is((await readFile(small)).subarray(0, 2).toString(), 'x\0');
});

pullTest('nothing is restored from a chain with an altered byte beneath', async (t) => {
  const { chain, home } = await pulled(t, { sda: 2 * MIB }, 2);
  const [first] = (await manifestOf(chain)).points[0]?.entries ?? [];
  const path = join(chain, first?.file ?? '');
  const handle = await open(path, 'r+');
  await handle.write(Buffer.from([1, 2, 3]), 0, 3, (await handle.stat()).size - 3);
  await handle.close();
  const target = join(home, 'target');
  const refused = await stillblock(t, 'restore', chain, '--yes', '--map', `sda=${target}`);
  t.is(refused.code, 1);
  t.is(errorOf(refused), 'CHAIN_FILE_ALTERED', refused.stderr);
  await t.throwsAsync(stat(target), { code: 'ENOENT' });
});

pullTest('a restore that was killed is said to be partial, and can be done again', async (t) => {
  const { machine, chain, home } = await pulled(t, { sda: 6 * MIB }, 1);
  const target = join(home, 'target');
  const map = ['--map', `sda=${target}`];
  const running = start(t, 'restore', chain, '--yes', ...map);
  const begun = async (): Promise<void> => {
    while ((await stat(target).catch(() => undefined)) === undefined) {
      await new Promise(setImmediate);
    }
  };
  await soon('its target', begun());
  running.process.kill('SIGTERM');
  const ended = await running.ended;
  if (ended.code !== 0) {
    t.regex(ended.stderr, /is partly written/);
  }
  t.is((await stillblock(t, 'restore', chain, '--yes', ...map)).code, 0);
  t.true(contentAt(machine, 'sda', 'day-1').equals(await readFile(target)));
});

for (const label of ['gpt', 'dos'] as const) {
  pullTest(
    `of a disk whose partitions were pulled, the ${label} table is written, too`,
    async (t) => {
      const home = await folder(t);
      // A disk with two partitions and a third that nobody pulled.
      const disk = join(home, 'disk.img');
      await writeFile(disk, '');
      await truncate(disk, 16 * MIB);
      const script = join(home, 'script');
      await writeFile(script, `label: ${label}\n,2M\n,4M\n,1M\n`);
      await run('sh', ['-c', `/usr/sbin/sfdisk -q '${disk}' <'${script}'`]);
      const [json, dump] = await Promise.all(
        ['--json', '--dump'].map((how) => run('/usr/sbin/sfdisk', [how, disk])),
      );
      const named = (text = ''): string => text.replaceAll(disk, '/dev/sdx');
      const table = parseSfdisk('sdx', named(json), named(dump));
      const layout = join(home, 'layout.json');
      const known = { devices: [], partitionTables: [table], machine: null };
      await writeFile(layout, JSON.stringify(known));
      const machine = await Machine.make(t, { sdx1: 2 * MIB, sdx2: 4 * MIB });
      const instant = await machine.serve(t, 'day-1');
      const chain = join(home, 'chain');
      const ended = await stillblock(t, 'pull', '--layout', layout, ...instant.args, chain);
      t.is(ended.code, 0, ended.stderr);

      const target = join(home, 'target');
      const restored = await stillblock(t, 'restore', chain, '--yes', '--map', `sdx=${target}`);
      t.is(restored.code, 0, restored.stderr);
      const planned = restored.events.find(({ event }) => event === 'planned');
      t.regex(JSON.stringify(planned), /no image of sdx3/);
      const content = await readFile(target);
      for (const { name, startSector } of table.partitions.slice(0, 2)) {
        const expected = contentAt(machine, name, 'day-1');
        t.true(
          expected.equals(content.subarray(startSector * 512, startSector * 512 + expected.length)),
        );
      }
      const again = await run('/usr/sbin/sfdisk', ['--dump', target]);
      const lines = (text: string): string[] =>
        text.split('\n').filter((line) => !/^(device|last-lba):/.test(line));
      t.deepEqual(lines(again.replaceAll(target, '/dev/sdx')), lines(named(dump)));

      const small = join(home, 'small');
      await writeFile(small, '');
      await truncate(small, 7 * MIB);
      const refused = await stillblock(t, 'restore', chain, '--yes', '--map', `sdx=${small}`);
      t.is(errorOf(refused), 'TARGET_TOO_SMALL', refused.stderr);
      // One partition alone, as any other disk.
      const alone = join(home, 'alone');
      t.is((await stillblock(t, 'restore', chain, '--yes', '--map', `sdx2=${alone}`)).code, 0);
      t.true(contentAt(machine, 'sdx2', 'day-1').equals(await readFile(alone)));
    },
  );
}
