// SPDX-License-Identifier: Apache-2.0
// In a guest: runs commands of stillblock one after another in this process, each as cli.ts
// would, since an emulated processor takes seconds to start the next one. A line of input is a
// JSON array of words; one of output has the exit code and what was written.
//
//   node one-process.js

import { createRequire } from 'node:module';
import process from 'node:process';
import { createInterface } from 'node:readline';

// What the command itself runs; test/program.ts would look at all sources, slowly here.
const { main } = createRequire(import.meta.url)(
  '../../bundle/main.cjs',
) as typeof import('../../src/main.ts');
const answer = process.stdout.write.bind(process.stdout);
const written = { stdout: '', stderr: '' };
for (const name of ['stdout', 'stderr'] as const) {
  process[name].write = (chunk: string | Uint8Array, ...rest: unknown[]): boolean => {
    written[name] += typeof chunk === 'string' ? chunk : Buffer.from(chunk).toString();
    for (const done of rest) if (typeof done === 'function') done();
    return true;
  };
}

for await (const line of createInterface({ input: process.stdin })) {
  Object.assign(written, { stdout: '', stderr: '' });
  process.argv.splice(2, process.argv.length, ...(JSON.parse(line) as string[]));
  process.exitCode = 0;
  await main();
  answer(`${JSON.stringify({ ...written, code: process.exitCode })}\n`);
}
process.exitCode = 0;
