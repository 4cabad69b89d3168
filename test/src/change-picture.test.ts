// SPDX-License-Identifier: Apache-2.0
import test from 'ava';
import { drawMap } from '../../src/change-picture.ts';

const MiB = 2 ** 20;
const picture = (
  sizeBytes: number,
  extents: readonly { offset: number; length: number }[],
  columns: number,
): ReturnType<typeof drawMap> =>
  drawMap(
    {
      disk: 'sda',
      since: 'monday',
      checkpoint: 'tuesday',
      sizeBytes,
      blockSizeBytes: 65_536,
      changedBytes: 0,
      extents,
    },
    columns,
  );

test('each cell shows how much of it changed', (t) => {
  const extents = [
    { offset: MiB, length: MiB },
    { offset: 2 * MiB, length: MiB / 2 },
    { offset: 5 * MiB, length: 65_536 },
  ];
  t.deepEqual(picture(64 * MiB, extents, 4), {
    rows: ['·█▒·', '·░··', ...new Array<string>(14).fill('····')],
    cellBytes: MiB,
  });
});

test('one block of a huge disk is seen', (t) => {
  const { rows } = picture(2 ** 44, [{ offset: 2 ** 43, length: 65_536 }], 80);
  t.is([...rows.join('')].filter((cell) => cell === '░').length, 1);
  t.true(rows.length <= 16 && rows.every((row) => row.length <= 80));
});

test('the end of a disk is no whole cell', (t) => {
  const { rows } = picture(3 * 65_536 + 512, [{ offset: 3 * 65_536, length: 512 }], 80);
  t.deepEqual(rows, ['···█']);
});

test('an empty disk has no picture', (t) => {
  t.deepEqual(picture(0, [], 80).rows, []);
});
