// SPDX-License-Identifier: Apache-2.0
/** fio's NBD engine: many requests of all sizes at once, and what they return verified. */
import { open } from 'node:fs/promises';
import test from 'ava';
import { BOOKWORM } from './clients.ts';
import { serveDisk } from './serving.ts';

const MIB = 1 << 20;
const SIZE = 32 * MIB;

interface Report {
  jobs: { error: number; read: { io_bytes: number } }[];
}

/** Runs one job in a folder. Returns its exit code, its error, and how much it has read. */
async function fio(home: string, ...args: string[]): Promise<{ error: number; bytes: number }> {
  const common = ['--name=job', `--size=${SIZE}`, '--output-format=json'];
  const { stdout } = await BOOKWORM.tryRun('fio', [...common, ...args], home);
  // The NBD engine puts a word of its own in front of the report.
  const [job] = (JSON.parse(stdout.slice(stdout.indexOf('{'))) as Report).jobs;
  return { error: job?.error ?? -1, bytes: job?.read.io_bytes ?? 0 };
}

const VERIFY = ['--bs=64k', '--verify=crc32c', '--verify_fatal=1', '--verify_interval=4096'];

for (const transport of ['unix', 'tcp'] as const) {
  test(`fio knows its own data again, 64 reads at a time, over ${transport}`, async (t) => {
    const data = [{ offset: 0, length: SIZE, bytes: Buffer.alloc(SIZE) }];
    const { home, disk, uris } = await serveDisk(t, { sizeBytes: SIZE, data });
    const write = ['--ioengine=psync', `--filename=${disk}`, '--rw=write', '--do_verify=0'];
    t.is((await fio(home, ...write, ...VERIFY)).error, 0);

    const nbd = ['--ioengine=nbd', `--uri=${uris()[transport]}`, '--iodepth=64'];
    t.deepEqual(await fio(home, ...nbd, '--rw=read', ...VERIFY), { error: 0, bytes: SIZE });
    const random = ['--rw=randread', '--bsrange=4k-256k', '--randseed=7'];
    t.deepEqual(await fio(home, ...nbd, ...random), { error: 0, bytes: SIZE });

    // It would notice a single wrong byte.
    const file = await open(disk, 'r+');
    await file.write(Buffer.from([0xa5, 0x5a]), 0, 2, 20 * MIB + 5000);
    await file.close();
    t.not((await fio(home, ...nbd, '--rw=read', ...VERIFY)).error, 0);
  });
}
