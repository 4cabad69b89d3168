// SPDX-License-Identifier: Apache-2.0
/** What udev is told of images. */
import { mkdir, readdir, readFile, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import test from 'ava';
import { pino } from 'pino';
import { linkImages } from '../../src/image-links.ts';
import { folder } from './world.ts';

test('udev is told whose image it is, by a change, and nothing is left', async (t) => {
  const root = await folder(t);
  const uevent = join(root, 'sys/block/stillblock3/uevent');
  await mkdir(join(uevent, '..'), { recursive: true });
  await writeFile(uevent, '');
  const log = pino({ level: 'silent' });
  const images = [{ device: 'stillblock3', disk: 'vg-root' }];
  const undo = await linkImages(join(root, 'run'), 'a.1', images, log, join(root, 'sys'));
  t.is(
    await readFile(join(root, 'run/images/stillblock3'), 'utf8'),
    'STILLBLOCK_CHECKPOINT=a.1\nSTILLBLOCK_DISK=vg-root\n',
  );
  t.is(await readFile(uevent, 'utf8'), 'change');
  const other = [{ device: 'stillblock4', disk: 'a' }];
  const undoOther = await linkImages(join(root, 'run'), 'b', other, log, join(root, 'sys'));
  await undo();
  t.deepEqual(await readdir(join(root, 'run/images')), ['stillblock4']);
  await undoOther();
  t.deepEqual(await readdir(join(root, 'run')), []);
});

test('where it cannot be told, that is said, and no more', async (t) => {
  const root = await folder(t);
  const said: unknown[] = [];
  const log = pino({}, { write: (line) => said.push(JSON.parse(line)) });
  const images = [{ device: 'stillblock0', disk: 'sda' }];
  const undo = await linkImages(join(root, 'run'), 'a', images, log, join(root, 'sys'));
  t.like(said[0], { level: 40, msg: 'images have no links' });
  await undo();
  t.deepEqual(await readdir(join(root, 'run')), []);
});
