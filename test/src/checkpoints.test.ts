// SPDX-License-Identifier: Apache-2.0
/** Checkpoints as files: what we write we read, and nothing else. */
import { spawnSync } from 'node:child_process';
import { mkdir, readdir, readFile, stat, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { env, execPath } from 'node:process';
import test from 'ava';
import fc from 'fast-check';
import {
  type Checkpoint,
  CheckpointStore,
  formatCheckpoint,
  isCheckpointName,
  judge,
  parseCheckpoint,
} from '../../src/checkpoints.ts';
import { checkpointFolder } from '../../src/folders.ts';
import { buildTool } from '../kernels/world.ts';
import { installation } from './world.ts';

const GENERATION = '8f14e45f-ceea-467f-a83b-b4c6ab3f1d2e';
const OTHER = '00000000-0000-4000-8000-000000000000';

const MONDAY: Checkpoint = {
  name: 'monday',
  id: '5d2c7b1e-0000-4000-8000-000000000001',
  description: '',
  parent: undefined,
  creationTime: 1_767_225_600,
  disks: [{ name: 'sda', sizeBytes: 2 ** 40, generation: GENERATION, number: 3 }],
};

const fromAlphabet = (alphabet: string, maxLength: number): fc.Arbitrary<string> =>
  fc
    .array(fc.constantFrom(...alphabet), { minLength: 1, maxLength })
    .map((letters) => letters.join(''));
const name = fromAlphabet('abcXYZ019_-', 12);
const description = fc
  .string({ unit: 'grapheme', maxLength: 40 })
  // What XML can hold, without white space around.
  .map((text) => text.replaceAll(/[^\u0020-\ud7ff\ue000-\ufffd]/g, '').trim());
const disk = fc.record({
  name,
  sizeBytes: fc.nat({ max: Number.MAX_SAFE_INTEGER }),
  generation: fc.uuid(),
  number: fc.nat({ max: 255 }),
});
const checkpoint: fc.Arbitrary<Checkpoint> = fc.record({
  name,
  id: fc.option(fc.uuid(), { nil: undefined }),
  description,
  parent: fc.option(name, { nil: undefined }),
  creationTime: fc.nat({ max: 2 ** 40 }),
  disks: fc.uniqueArray(disk, { minLength: 1, maxLength: 5, selector: (entry) => entry.name }),
});

test('what is written is read back', (t) => {
  fc.assert(
    fc.property(checkpoint, (written) => {
      t.deepEqual(parseCheckpoint(formatCheckpoint(written)), written);
    }),
  );
});

test("it is libvirt's vocabulary", (t) => {
  t.is(
    formatCheckpoint({ ...MONDAY, parent: '01', description: 'a <b> & "c"' }),
    `<domaincheckpoint xmlns:stillblock="urn:stillblock:checkpoint:1" stillblock:id="${MONDAY.id}">
  <name>monday</name>
  <description>a &lt;b&gt; &amp; &quot;c&quot;</description>
  <parent>
    <name>01</name>
  </parent>
  <creationTime>1767225600</creationTime>
  <disks>
    <disk name="sda" checkpoint="bitmap" bitmap="monday" size="1099511627776" stillblock:generation="${GENERATION}" stillblock:number="3"/>
  </disks>
</domaincheckpoint>
`,
  );
});

const GOOD = formatCheckpoint(MONDAY);
const replaced = (from: string | RegExp, to: string): string => {
  const changed = GOOD.replace(from, to);
  if (changed === GOOD) {
    throw new Error(`${from} is not there`);
  }
  return changed;
};

const HOSTILE: Readonly<Record<string, string>> = {
  'nothing at all': '',
  'no XML': 'monday',
  'an empty element': '<domaincheckpoint/>',
  'another document': '<domain/>',
  'half a file': GOOD.slice(0, GOOD.length / 2),
  'two documents': `${GOOD}${GOOD}`,
  'a document type': `<!DOCTYPE x [<!ENTITY a "b">]>${GOOD}`,
  'a document type in small letters': `<!doctype x>${GOOD}`,
  'a billion laughs': `<!DOCTYPE lolz [<!ENTITY a "lol"><!ENTITY b "&a;&a;&a;&a;">]>${replaced('monday', '&b;')}`,
  'an unknown element': replaced('<disks>', '<more/><disks>'),
  'an unknown attribute': replaced('<disk ', '<disk encryption="yes" '),
  'text between elements': replaced('<disks>', 'x<disks>'),
  'an attribute on a name': replaced('<name>', '<name x="1">'),
  'no name': replaced('<name>monday</name>', ''),
  'two names': replaced('<disks>', '<name>b</name><disks>'),
  'a name that is a path': replaced('<name>monday</name>', '<name>../../etc/passwd</name>'),
  'a parent without a name': replaced('<disks>', '<parent/><disks>'),
  'no disks': replaced(/<disks>[\s\S]*<\/disks>/, '<disks/>'),
  'a disk twice': replaced(/(<disk .*\/>)/, '$1$1'),
  'a disk of another checkpoint': replaced('bitmap="monday"', 'bitmap="sunday"'),
  'a disk that was left out': replaced('checkpoint="bitmap"', 'checkpoint="no"'),
  'a disk with an odd name': replaced('name="sda"', 'name="a@b"'),
  'a negative size': replaced('size="1099511627776"', 'size="-1"'),
  'an inexact size': replaced('size="1099511627776"', 'size="9007199254740993"'),
  'a size in hexadecimal': replaced('size="1099511627776"', 'size="0x10"'),
  'a number with a sign': replaced('number="3"', 'number="+3"'),
  'a generation that is none': replaced(GENERATION, 'yes'),
  'another namespace': replaced('urn:stillblock:checkpoint:1', 'urn:stillblock:checkpoint:2'),
  'an id that is none': replaced(MONDAY.id ?? '', 'yes'),
  'no namespace': replaced(' xmlns:stillblock="urn:stillblock:checkpoint:1"', ''),
  'a prototype': replaced('<disks>', '<__proto__><x/></__proto__><disks>'),
  'a constructor': replaced('<disks>', '<constructor>x</constructor><disks>'),
  'depth without end': `${'<a>'.repeat(100_000)}${'</a>'.repeat(100_000)}`,
  'a large file': replaced('<disks>', `<description>${'x'.repeat(2 ** 20)}</description><disks>`),
};

for (const [what, xml] of Object.entries(HOSTILE)) {
  test(`refused: ${what}`, (t) => {
    const error = t.throws(() => parseCheckpoint(xml), { code: 'BAD_CHECKPOINT' });
    t.false(error?.message.includes('\n'));
  });
}

test('no single changed letter is taken for another valid point in time', (t) => {
  fc.assert(
    fc.property(fc.nat({ max: GOOD.length - 1 }), fc.constantFrom(...'<>/"=a0 '), (at, letter) => {
      const changed = GOOD.slice(0, at) + letter + GOOD.slice(at + 1);
      let read: Checkpoint;
      try {
        read = parseCheckpoint(changed);
      } catch (error) {
        t.like(error, { code: 'BAD_CHECKPOINT' });
        return;
      }
      // White space aside, a change that is still readable shows in what was read.
      const blank = (text: string): string => text.replaceAll(/\s/g, '');
      t.is(blank(formatCheckpoint(read)), blank(changed));
    }),
  );
});

test('names are those that libvirt takes, and that a file can have', (t) => {
  for (const good of ['monday', '01', '_', '-x', 'a.b', 'a'.repeat(200)]) {
    t.true(isCheckpointName(good), good);
  }
  for (const wrong of ['', '.', '..', '.x', 'a/b', 'a b', 'ü', 'a@b', 'a\n', 'a'.repeat(201)]) {
    t.false(isCheckpointName(wrong), wrong);
  }
});

test('increments are offered only where nothing is in doubt', (t) => {
  const disk = { name: 'sda', sizeBytes: 2 ** 40, generation: GENERATION, number: 5 };
  t.deepEqual(judge(MONDAY, disk), { kind: 'incremental', number: 3 });
  t.like(judge(MONDAY, { ...disk, name: 'renamed' }), { kind: 'incremental' });
  for (const other of [
    { ...disk, generation: OTHER },
    { ...disk, sizeBytes: 2 ** 41 },
    { ...disk, number: 2 },
    { ...disk, number: 3 },
    { ...disk, name: 'sdb', generation: OTHER },
  ]) {
    t.is(judge(MONDAY, other).kind, 'full');
  }
});

test('a disk that was set back never takes a reused number for the old checkpoint', async (t) => {
  const store = new CheckpointStore(await installation(t));
  await store.prepare();
  const sdb = { name: 'sdb', sizeBytes: 2 ** 30, generation: OTHER, number: 7 };
  const before = { ...MONDAY, disks: [...MONDAY.disks, sdb] };
  await store.write(before);
  const sda = { name: 'sda', sizeBytes: 2 ** 40, generation: GENERATION };
  const next = { ...sdb, number: 8 };
  t.deepEqual(await store.settle([before], [{ ...sda, number: 4 }, next]), []);
  t.like(judge(before, { ...sda, number: 4 }), { kind: 'incremental' });
  // Its next snapshot would have the number of monday.
  t.deepEqual(await store.settle([before], [{ ...sda, number: 3 }, next]), ['monday']);
  const after = await store.read('monday');
  t.is(after.id, MONDAY.id);
  for (const number of [3, 4, 100]) {
    const verdict = judge(after, { ...sda, number });
    t.true(verdict.kind === 'full' && /set back/.test(verdict.why), `${number}`);
  }
  t.like(judge(after, next), { kind: 'incremental' });
  t.deepEqual(await store.settle([after], [{ ...sda, number: 3 }, next]), []);
});

test('a checkpoint is kept, listed oldest first, and deleted', async (t) => {
  const folders = await installation(t);
  const store = new CheckpointStore(folders);
  t.deepEqual(await store.list(), { checkpoints: [], broken: [] });
  t.false(await store.has('monday'));
  await store.prepare();
  const tuesday = { ...MONDAY, name: 'tuesday', creationTime: MONDAY.creationTime - 1 };
  await store.write(MONDAY);
  await store.write(tuesday);
  t.deepEqual(await store.read('monday'), MONDAY);
  t.deepEqual(await store.list(), { checkpoints: [tuesday, MONDAY], broken: [] });
  const file = join(checkpointFolder(folders), 'monday.xml');
  t.is((await stat(file)).mode & 0o777, 0o600);
  t.deepEqual(await readdir(checkpointFolder(folders)), ['monday.xml', 'tuesday.xml']);
  await store.delete('monday');
  t.false(await store.has('monday'));
  await t.throwsAsync(store.delete('monday'), { code: 'NO_CHECKPOINT' });
  await t.throwsAsync(store.read('monday'), { code: 'NO_CHECKPOINT' });
  await t.throwsAsync(store.read('../monday'), { code: 'USAGE' });
});

test('broken files are said to be broken, and hide nothing', async (t) => {
  const folders = await installation(t);
  const store = new CheckpointStore(folders);
  await store.prepare();
  await store.write(MONDAY);
  const folder = checkpointFolder(folders);
  await writeFile(join(folder, 'half.xml'), GOOD.slice(0, 100));
  await writeFile(join(folder, 'renamed.xml'), GOOD);
  await writeFile(join(folder, '.crashed.xml.new'), GOOD.slice(0, 100));
  await writeFile(join(folder, 'notes.txt'), 'mine');
  await mkdir(join(folder, 'folder.xml'));
  const { checkpoints, broken } = await store.list();
  t.deepEqual(checkpoints, [MONDAY]);
  t.deepEqual(
    broken.map((entry) => entry.name),
    ['folder', 'half', 'renamed'],
  );
  t.true(await store.has('half'), 'a broken one still takes its name');
});

test('a checkpoint that cannot be written leaves the old one, and nothing beside it', async (t) => {
  const folders = await installation(t);
  const store = new CheckpointStore(folders);
  await store.prepare();
  await store.write(MONDAY);
  const folder = checkpointFolder(folders);
  // What the new file is to be is a folder already: the rename fails, for root, too.
  await mkdir(join(folder, 'tuesday.xml'));
  await writeFile(join(folder, 'tuesday.xml', 'x'), '');
  await t.throwsAsync(store.write({ ...MONDAY, name: 'tuesday' }));
  t.deepEqual(await readdir(folder), ['monday.xml', 'tuesday.xml']);
  t.is(await readFile(join(folder, 'monday.xml'), 'utf8'), GOOD);
});

/** What is done, before which of its calls it is killed, and what is left. */
const KILLS = [
  ['write', 'fsync 0', ['monday']],
  ['write', 'rename 0', ['monday']],
  ['write', 'fsync 1', ['monday', 'tuesday']],
  ['delete', 'unlink 0', ['monday']],
  ['delete', 'fsync 0', []],
] as const;

for (const [what, point, left] of KILLS) {
  test(`killed before ${point} of a ${what}, it has done all of it or nothing`, async (t) => {
    const folders = await installation(t);
    const store = new CheckpointStore(folders);
    await store.prepare();
    await store.write(MONDAY);
    const program = `const { CheckpointStore } = await import(${JSON.stringify(new URL('../../src/checkpoints.js', import.meta.url))});
      const store = new CheckpointStore(${JSON.stringify(folders)});
      await store.${what}(${JSON.stringify(what === 'write' ? { ...MONDAY, name: 'tuesday' } : 'monday')})`;
    const file = join(folders.run, 'kill');
    await mkdir(folders.run, { recursive: true });
    await writeFile(file, point);
    const killer = { LD_PRELOAD: await buildTool('killer'), KILL_FILE: file };
    const { signal, stderr } = spawnSync(execPath, ['--input-type=module', '-e', program], {
      env: { ...env, ...killer },
      encoding: 'utf8',
    });
    t.is(signal, 'SIGKILL', stderr);
    // As the next one does that comes up.
    await store.removeStaged();
    const { checkpoints, broken } = await store.list();
    t.deepEqual([checkpoints.map((each) => each.name).toSorted(), broken], [[...left], []]);
    t.deepEqual(
      await readdir(checkpointFolder(folders)),
      left.map((each) => `${each}.xml`),
    );
  });
}

test('a folder that was made for nothing goes again, one that is used stays', async (t) => {
  const folders = await installation(t);
  const store = new CheckpointStore(folders);
  const remove = await store.prepare();
  await remove();
  await t.throwsAsync(stat(folders.state), { code: 'ENOENT' });
  const removeUsed = await store.prepare();
  await store.write(MONDAY);
  await removeUsed();
  t.true(await store.has('monday'));
  const removeOthers = await store.prepare();
  await store.delete('monday');
  await removeOthers();
  t.true((await stat(checkpointFolder(folders))).isDirectory(), 'it was there before');
});
