// SPDX-License-Identifier: Apache-2.0
/** The native engine when what it stands on goes: its process, its thread, its block device. */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync } from 'node:fs';
import { writeFile } from 'node:fs/promises';
import { basename, join } from 'node:path';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import test, { type ExecutionContext } from 'ava';
import { diskExports, openFileSource } from '../../nbd/export.ts';
import { nativeEngine } from '../../src/engine.ts';
import {
  CMD,
  folder,
  infoData,
  OPT,
  pattern,
  RawClient,
  request,
  soon,
  world,
} from '../nbd/world.ts';
import { run } from './clients.ts';
import { GOOD_CODE } from './engine-host.ts';

const HOST = fileURLToPath(new URL('./engine-host.js', import.meta.url));
const MIB = 1 << 20;
const SIZE = 32 * MIB;

/** What is asked all at once: so much that most of it is in flight when the end comes. */
function reads(): Buffer[] {
  return Array.from({ length: 100 }, (_, index) =>
    request({
      type: CMD.read,
      cookie: BigInt(index),
      offset: BigInt((index % 30) * MIB + index),
      length: index % 2 === 0 ? MIB : 4096,
    }),
  );
}

/** Clients with requests in flight: one that fetches its replies, one that does not. */
async function clients(t: ExecutionContext, path: string): Promise<RawClient[]> {
  return Promise.all(
    [true, false].map(async (fetches) => {
      const raw = await RawClient.connect({ path });
      t.teardown(() => raw.destroy());
      await raw.open();
      await raw.expectAck(OPT.go, infoData('disk'));
      if (!fetches) {
        raw.socket.pause();
      }
      raw.send(...reads());
      return raw;
    }),
  );
}

for (const how of ['exit', 'thread-exit', 'thread-terminate'] as const) {
  test(`a process ends while clients are served: ${how}`, async (t) => {
    const home = await folder(t);
    const [file, path] = [join(home, 'file'), join(home, 'sock')];
    await writeFile(file, pattern(SIZE));
    const child = spawn(process.execPath, [HOST, how, file, path], {
      stdio: ['pipe', 'pipe', 'inherit'],
    });
    t.teardown(() => child.kill('SIGKILL'));
    const ended = once(child, 'close');
    const lines = createInterface(child.stdout)[Symbol.asyncIterator]();
    for (const where of how === 'exit' ? [path] : [path, `${path}.again`]) {
      t.is((await soon('the server', lines.next())).value, 'serving');
      const served = await clients(t, where);
      await served[0]?.read(MIB);
      child.stdin.write('end\n');
      for (const raw of served) {
        raw.socket.resume();
        await soon('the end of a connection', raw.closed);
      }
    }
    t.deepEqual(await soon('the end of the process', ended), [GOOD_CODE, null]);
  });
}

test('a block device can go when its export has been removed while clients read', async (t) => {
  const file = join(await folder(t), 'file');
  const data = pattern(SIZE);
  await writeFile(file, data);
  const device = (await run('losetup', ['-f', '--show', '-r', '--direct-io=on', file])).trim();
  const backing = `/sys/block/${basename(device)}/loop/backing_file`;
  t.teardown(async () => {
    if (existsSync(backing)) {
      await run('losetup', ['-d', device]);
    }
  });
  const source = await openFileSource(device);
  const [image] = diskExports({ name: 'disk', description: '', source, checkpoints: [] });
  const { server, path } = await world(t, [image], { drainMs: 1000 }, { engine: nativeEngine() });
  const [reader] = await clients(t, path);
  if (reader === undefined) {
    throw new Error('no client');
  }
  // It is answered before the export goes: requests that nobody has read yet go with it.
  const first = await reader.read(16);
  await soon('the export to go', server.removeExport('disk'));
  await source.close();
  await run('losetup', ['-d', device]);
  // A device that is still open somewhere would stay until that is closed.
  t.false(existsSync(backing), 'nothing holds the device');
  // What was answered until then is right; the last reply may have been cut off by force.
  const said = Buffer.concat([first, await reader.readToEnd()]);
  let replies = 0;
  for (let at = 0; at + 16 <= said.length; replies += 1) {
    const index = Number(said.readBigUInt64BE(at + 8));
    const length = index % 2 === 0 ? MIB : 4096;
    const offset = (index % 30) * MIB + index;
    t.is(said.readUInt32BE(at + 4), 0);
    const got = said.subarray(at + 16, at + 16 + length);
    t.true(got.equals(data.subarray(offset, offset + got.length)), `reply ${index}`);
    at += 16 + length;
  }
  t.true(replies > 0);
});
