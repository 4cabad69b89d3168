// SPDX-License-Identifier: Apache-2.0
/** The addon, as far as it goes without the kernel module. */
import { access, open } from 'node:fs/promises';
import { join } from 'node:path';
import test from 'ava';
import fc from 'fast-check';
import { ControlDevice, dataRanges, nativeConstants } from '../../src/native.ts';
import { folder } from './world.ts';

const BLOCK = 64 * 1024;

test('constants are those of the header', (t) => {
  const constants = nativeConstants();
  t.is(constants.device, '/dev/stillblock');
  t.true(constants.abi >= 1);
  t.is(constants.maxNumber, 255);
  t.is(constants.reasons[0], 'NONE');
  t.is(new Set(constants.reasons).size, constants.reasons.length);
});

test('without the module there is no control device', async (t) => {
  await t.throwsAsync(access(nativeConstants().device), { code: 'ENOENT' }, 'not for this machine');
  t.throws(() => ControlDevice.open(), { code: 'ENOENT', message: /open/ });
});

test('data is found where it was written, and holes where it was not', async (t) => {
  const place = await folder(t);
  let files = 0;
  await fc.assert(
    fc.asyncProperty(fc.array(fc.boolean(), { maxLength: 12 }), async (blocks) => {
      files += 1;
      const file = await open(join(place, String(files)), 'w+');
      try {
        await file.truncate(blocks.length * BLOCK);
        for (const [index, written] of blocks.entries()) {
          if (written) {
            await file.write(Buffer.alloc(BLOCK, 1), 0, BLOCK, index * BLOCK);
          }
        }
        const ranges = await dataRanges(file.fd, blocks.length * BLOCK);
        const seen = blocks.map((_, index) =>
          ranges.some(
            ({ offset, length }) =>
              offset <= index * BLOCK && (index + 1) * BLOCK <= offset + length,
          ),
        );
        t.deepEqual(seen, blocks);
        const bytes = ranges.reduce((sum, { length }) => sum + length, 0);
        t.is(bytes, blocks.filter((written) => written).length * BLOCK);
      } finally {
        await file.close();
      }
    }),
    { numRuns: 40 },
  );
});

test('ranges are cut at the size that is asked for', async (t) => {
  const file = await open(join(await folder(t), 'file'), 'w+');
  await file.write(Buffer.alloc(4 * BLOCK, 1));
  t.deepEqual(await dataRanges(file.fd, BLOCK + 1), [{ offset: 0, length: BLOCK + 1 }]);
  t.deepEqual(await dataRanges(file.fd, 0), []);
  await file.close();
});

test('a file that is closed meanwhile is read to the end all the same', async (t) => {
  const file = await open(join(await folder(t), 'file'), 'w+');
  await file.write(Buffer.alloc(BLOCK, 1));
  const ranges = dataRanges(file.fd, BLOCK);
  await file.close();
  t.deepEqual(await ranges, [{ offset: 0, length: BLOCK }]);
});

test('what has no holes is all data', async (t) => {
  const zero = await open('/dev/zero', 'r');
  t.deepEqual(await dataRanges(zero.fd, 2 ** 40), [{ offset: 0, length: 2 ** 40 }]);
  await zero.close();
});

test('arguments that make no sense throw, and do not crash', async (t) => {
  for (const fd of [-1, 1.5, Number.NaN, 2 ** 31]) {
    await t.throwsAsync(async () => dataRanges(fd, 1), { instanceOf: TypeError });
  }
  await t.throwsAsync(async () => dataRanges(2 ** 31 - 1, 1), { code: 'EBADF' });
  await t.throwsAsync(async () => dataRanges(0, -1), { instanceOf: TypeError });
});
