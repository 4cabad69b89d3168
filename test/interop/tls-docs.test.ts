// SPDX-License-Identifier: Apache-2.0
/** Runs the commands of docs/tls.md, in its order, in a folder of the test's own. */
import { execFile } from 'node:child_process';
import { readFile, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { promisify } from 'node:util';
import test from 'ava';
import { folder, pattern } from '../nbd/world.ts';
import { Page } from '../pages.ts';
import { commandOnPath, Serving } from './command.ts';

const execute = promisify(execFile);
const SIZE = 4 << 20;

test('what docs/tls.md says works, command by command', async (t) => {
  const home = await folder(t);
  const env = await commandOnPath(home);
  for (const disk of ['sda', 'sdb', 'sdc']) {
    await writeFile(join(home, disk), pattern(SIZE));
  }
  const page = await Page.open('docs/tls.md', import.meta.url);
  const blocks = page.takeAll().map(({ text }) => text);
  t.true(blocks.length >= 9);
  let serving: Serving | undefined;
  let copies = 0;
  /** What is of this machine and this run in place of what is of yours. */
  const here = (command: string): string => {
    const port = new URL(serving?.uris(serving.names[0] ?? '')[0] ?? 'nbd://x:10809').port;
    return command
      .replaceAll('/etc/stillblock', join(home, 'etc'))
      .replaceAll('/dev/', `${home}/`)
      .replaceAll('port=10809', `port=${port}`)
      .replaceAll('192.0.2.7/', `127.0.0.1:${port}/`)
      .replaceAll('192.0.2.7', '127.0.0.1')
      .replaceAll('$(pidof -x stillblock)', String(serving?.process.pid));
  };
  for (const block of blocks) {
    // A server is the last command of its block, and stays.
    const [before = '', server] = block.split(/^stillblock nbd /m);
    if (before.trim() !== '') {
      await execute('bash', ['-ec', here(before)], { cwd: home, env });
    }
    if (server !== undefined) {
      t.is((await serving?.end()) ?? 0, 0);
      const words = here(server).replaceAll('\\\n', ' ').trim().split(/\s+/);
      serving = await Serving.start(t, '-p', '0', ...words);
      t.true(serving.uris(serving.names[0] ?? '')[0]?.startsWith('nbds://'));
    }
    if (block.includes('nbdcopy')) {
      copies += 1;
      t.true((await readFile(join(home, 'sda.raw'))).equals(pattern(SIZE)));
      await execute('qemu-img', ['compare', join(home, 'sda.raw'), join(home, 'sda.qcow2')]);
      await execute('rm', [join(home, 'sda.raw'), join(home, 'sda.qcow2')]);
    }
    if (block.includes('kill -HUP')) {
      await serving?.says('tls-reloaded');
    }
  }
  t.is(copies, 2);

  // The rules of the document, and the list of those that are good no more.
  const dir = join(home, 'etc/pki/proxy1');
  const uri = here('nbds://192.0.2.7/');
  const ask = (): Promise<{ stdout: string }> =>
    execute('nbdinfo', ['--list', '--json', `${uri}?tls-certificates=${dir}`]);
  const listed = JSON.parse((await ask()).stdout) as { exports: { 'export-name': string }[] };
  t.deepEqual(
    listed.exports.map((each) => each['export-name']),
    ['sda', 'public'],
  );
  serving?.process.kill('SIGHUP');
  await serving?.says('tls-reloaded');
  await t.throwsAsync(ask());
  await serving?.complains(/it has been revoked/);
});
