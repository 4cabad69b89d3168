// SPDX-License-Identifier: Apache-2.0
/** qemu-storage-daemon on top of a served export: as a guest's disk would be, restored at once. */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { stat } from 'node:fs/promises';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import type { ExecutionContext } from 'ava';
import { pattern, soon } from '../nbd/world.ts';
import { type Release, testReleases } from './clients.ts';
import { type DiskContent, type ServedDisk, serveDisk } from './serving.ts';

const MIB = 1 << 20;
const DISK: DiskContent = {
  sizeBytes: 64 * MIB,
  data: [
    { offset: MIB, length: 8 * MIB, bytes: pattern(8 * MIB, 1) },
    { offset: 63 * MIB, length: MIB, bytes: pattern(MIB, 2) },
  ],
  checkpoints: [{ name: 'monday', dirty: [{ offset: 2 * MIB, length: 65_536 }] }],
};

type Answer = { return?: unknown; error?: { desc: string }; event?: string; data?: object };

/** Starts a daemon that has the export as its node `source`, with QMP on its standard streams. */
async function daemon(
  t: ExecutionContext,
  client: Release,
  served: ServedDisk,
  options: string,
): Promise<{ ask: (execute: string, args?: object) => Promise<unknown>; event: EventWaiter }> {
  const child = spawn(
    client.tool('qemu-storage-daemon'),
    [
      ...['--chardev', 'stdio,id=qmp', '--monitor', 'chardev=qmp'],
      '--blockdev',
      `driver=nbd,node-name=source,read-only=on,export=sda,${options}`,
      ...['--nbd-server', `addr.type=unix,addr.path=${join(served.home, 'again.sock')}`],
    ],
    { stdio: ['pipe', 'pipe', 'inherit'] },
  );
  const exit = once(child, 'close');
  t.teardown(async () => {
    child.kill('SIGKILL');
    await exit;
  });
  const events: Answer[] = [];
  let answered: ((answer: Answer) => void) | undefined;
  let happened = (): void => {};
  createInterface({ input: child.stdout }).on('line', (line) => {
    const message = JSON.parse(line) as Answer;
    if (message.event !== undefined) {
      events.push(message);
      happened();
    } else if ('return' in message || 'error' in message) {
      answered?.(message);
    }
  });
  const ask = async (execute: string, args: object = {}): Promise<unknown> => {
    const answer = new Promise<Answer>((resolve) => {
      answered = resolve;
    });
    child.stdin.write(`${JSON.stringify({ execute, arguments: args })}\n`);
    const { return: value, error } = await soon(`the answer to ${execute}`, answer);
    if (error !== undefined) {
      throw new Error(`${execute}: ${error.desc}`);
    }
    return value;
  };
  const event: EventWaiter = async (name) => {
    let found = events.find((each) => each.event === name);
    while (found === undefined) {
      await soon(
        `the event ${name}`,
        new Promise<void>((resolve) => {
          happened = resolve;
        }),
      );
      found = events.find((each) => each.event === name);
    }
    return found.data;
  };
  await ask('qmp_capabilities');
  return { ask, event };
}

type EventWaiter = (name: string) => Promise<object | undefined>;

for (const transport of ['unix', 'tcp'] as const) {
  testReleases(
    `an export served again by it reads the same, over ${transport}`,
    async (t, client) => {
      const served = await serveDisk(t, DISK);
      const server =
        transport === 'unix'
          ? `server.type=unix,server.path=${served.path}`
          : `server.type=inet,server.host=127.0.0.1,server.port=${served.port}`;
      const { ask } = await daemon(t, client, served, server);
      await ask('block-export-add', {
        type: 'nbd',
        id: 'again',
        'node-name': 'source',
        name: 'again',
      });
      const uri = `nbd+unix:///again?socket=${join(served.home, 'again.sock')}`;
      await client.run('qemu-img', ['compare', '-f', 'raw', '-F', 'raw', uri, served.disk]);
      const map = JSON.parse(await client.run('nbdinfo', ['--map', '--json', uri])) as {
        offset: number;
        type: number;
      }[];
      t.deepEqual(
        map.map(({ offset, type }) => [offset, type]),
        [
          [0, 3],
          [MIB, 0],
          [9 * MIB, 3],
          [63 * MIB, 0],
        ],
      );
    },
  );
}

testReleases('a mirror job copies what there is and leaves the holes', async (t, client) => {
  const served = await serveDisk(t, DISK);
  const target = join(served.home, 'mirror.qcow2');
  await client.run('qemu-img', ['create', '-q', '-f', 'qcow2', target, String(DISK.sizeBytes)]);
  const { ask, event } = await daemon(
    t,
    client,
    served,
    `server.type=unix,server.path=${served.path}`,
  );
  await ask('blockdev-add', {
    driver: 'qcow2',
    'node-name': 'target',
    file: { driver: 'file', filename: target },
  });
  await ask('blockdev-backup', {
    'job-id': 'job',
    device: 'source',
    target: 'target',
    sync: 'full',
  });
  t.like(await event('BLOCK_JOB_COMPLETED'), { device: 'job', offset: DISK.sizeBytes });
  await ask('blockdev-del', { 'node-name': 'target' });
  await client.run('qemu-img', ['compare', '-f', 'qcow2', '-F', 'raw', target, served.disk]);
  t.true((await stat(target)).size < 12 * MIB);
});
