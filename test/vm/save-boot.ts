// SPDX-License-Identifier: Apache-2.0
// save-boot.js KERNEL FILE: saves a boot, unless it is there; see saved-boot.ts, which has
// nobody else do it meanwhile.

import { existsSync } from 'node:fs';
import { readdir, rename, rm } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import { argv } from 'node:process';
import { kernelNames } from './checkout.ts';
import { Guest } from './guest.ts';

const [, , name, path = ''] = argv;
const kernel = kernelNames.find((each) => each === name);
if (kernel === undefined) throw new Error(`there is no kernel ${name}`);
if (!existsSync(path)) {
  for (const old of await readdir(dirname(path))) {
    if (old.startsWith(`${kernel}-`)) await rm(join(dirname(path), old));
  }
  const fresh = `${path}.new`;
  await Guest.save(kernel, fresh);
  await rename(fresh, path);
}
