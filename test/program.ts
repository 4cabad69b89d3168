// SPDX-License-Identifier: Apache-2.0
/** The command `stillblock` that tests run: what is shipped, made of the sources as they are. */
import { readdirSync, statSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';

const checkout = fileURLToPath(new URL('../..', import.meta.url));

/** Its file, for Node. */
export const CLI: string = join(checkout, 'dist/bundle/cli.cjs');

/** @throws Error when a source has changed since the command was made */
function assertNew(): void {
  const madeMs = statSync(CLI, { throwIfNoEntry: false })?.mtimeMs ?? 0;
  for (const folder of ['src', 'nbd']) {
    for (const name of readdirSync(join(checkout, folder), { encoding: 'utf8', recursive: true })) {
      if (name.endsWith('.ts') && statSync(join(checkout, folder, name)).mtimeMs > madeMs) {
        throw new Error(`${CLI} is older than ${folder}/${name}: run npm run build`);
      }
    }
  }
}

// A test of what no longer is says nothing.
assertNew();
