// SPDX-License-Identifier: Apache-2.0
// An application for the guest: appends numbered records to one file on each of
// several file systems in turn, each record synced before the next is written.
// So whatever one instant holds, the files' last numbers differ by at most one.
// Ends on SIGTERM and prints the last number.
//
//   node appender.js FILE FILE...

import { open } from 'node:fs/promises';
import { setTimeout as delay } from 'node:timers/promises';
import { formatRecord } from './records.ts';

/** Leaves an emulated processor some time for the other applications. */
const pauseMs = 250;

let stopping = false;
process.once('SIGTERM', () => {
  stopping = true;
});

const files = await Promise.all(process.argv.slice(2).map((path) => open(path, 'ax')));
let last = 0;
while (!stopping) {
  last += 1;
  for (const file of files) {
    await file.write(formatRecord(last));
    await file.sync();
  }
  await delay(pauseMs);
}
await Promise.all(files.map((file) => file.close()));
process.stdout.write(`${last}\n`);
