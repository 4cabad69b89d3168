// SPDX-License-Identifier: Apache-2.0
/**
 * A process whose native engine serves when it ends: node engine-host.js HOW FILE SOCKET. It says
 * `serving`, and ends in that way when its input says anything.
 */
import { once } from 'node:events';
import { fileURLToPath } from 'node:url';
import { isMainThread, parentPort, Worker, workerData } from 'node:worker_threads';
import { diskExports, openFileSource } from '../../nbd/export.ts';
import { NbdServer } from '../../nbd/server.ts';
import { nativeEngine } from '../../src/engine.ts';
import { KeptLog } from '../nbd/world.ts';

/** What the process says with its exit code if all went well. */
export const GOOD_CODE = 7;

async function serve(file: string, path: string): Promise<void> {
  const server = new NbdServer({ logger: new KeptLog(), engine: nativeEngine() });
  const source = await openFileSource(file);
  const [image] = diskExports({ name: 'disk', description: '', source, checkpoints: [] });
  server.addExport(image);
  await server.listen({ path });
}

/** Serves in a thread, ends that, and then serves here. */
async function serveInThread(how: string, file: string, path: string): Promise<void> {
  const thread = new Worker(fileURLToPath(import.meta.url), { workerData: { file, path } });
  await once(thread, 'message');
  process.stdout.write('serving\n');
  await once(process.stdin, 'data');
  const ended = once(thread, 'exit');
  if (how === 'thread-terminate') {
    await thread.terminate();
  } else {
    thread.postMessage('exit');
  }
  await ended;
  await serve(file, `${path}.again`);
  process.stdout.write('serving\n');
}

async function main(how: string, file: string, path: string): Promise<void> {
  if (how === 'exit') {
    await serve(file, path);
    process.stdout.write('serving\n');
  } else {
    await serveInThread(how, file, path);
  }
  await once(process.stdin, 'data');
  process.exit(GOOD_CODE);
}

const [how, file, path] = process.argv.slice(2);
if (!isMainThread) {
  const given = workerData as { file: string; path: string };
  parentPort?.once('message', () => process.exit());
  await serve(given.file, given.path);
  parentPort?.postMessage('serving');
} else if (how !== undefined && file !== undefined && path !== undefined) {
  await main(how, file, path);
}
