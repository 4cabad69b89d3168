// SPDX-License-Identifier: Apache-2.0
/** The commands of docs/journeys.md, as they stand there; nbd-client's are in kernel-client.test.ts. */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync } from 'node:fs';
import { readFile, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { folder } from '../nbd/world.ts';
import { commandsOf, Page } from '../pages.ts';
import { run } from './clients.ts';
import { commandOnPath } from './command.ts';
import { Server } from './pull-server.ts';
import { pullTest, soon, stillblock } from './pulling.ts';

pullTest('what docs/journeys.md says works, command by command', async (t) => {
  const page = await Page.open('docs/journeys.md', import.meta.url);
  const server = await Server.start(t);
  const { machine, socket } = server;
  const home = await folder(t);
  const env = await commandOnPath(home);
  /** What is of this machine in place of what is of yours. */
  const here = (command: string): string =>
    command
      .replaceAll(/nbd:\/\/192\.0\.2\.7\/(\S+)/g, (_, name: string) => `'${machine.uri(name)}'`)
      .replaceAll('/run/stillblock/control.sock', socket)
      .replaceAll(/(\/backup|\/dev|\/var\/tmp)\b/g, `${home}$1`);
  const at = (name: string): string => join(home, name);
  const type = (command: string): Promise<string> =>
    run('env', [`PATH=${env['PATH']}`, 'bash', '-ec', here(command)], home);
  await run('mkdir', ['-p', at('dev'), at('backup'), at('var/tmp')]);

  // 1: a full copy, and what has changed on top of it.
  const monday = await machine.serve(t, 'monday');
  await type(page.take('full.qcow2').text);
  await type('qemu-img convert -O raw nbd://192.0.2.7/sda sda.raw');
  await monday.close();
  machine.change(1);
  const tuesday = await machine.serve(t, 'tuesday');
  await type(page.take('inc.qcow2').text);
  await run('qemu-img', ['convert', '-O', 'raw', at('inc.qcow2'), at('both.raw')]);
  t.true(machine.disk('sda').data.equals(await readFile(at('both.raw'))));

  // 4: the program.
  await writeFile(at('changed.py'), page.take('import sys, nbd').text);
  const told = await type(page.take('python3').text.replace('python3', '/usr/bin/python3'));
  t.regex(told, /^[1-9]\d* of 4194304 bytes have changed\n$/);
  t.true(machine.disk('sda').data.equals(await readFile(at('sda.raw'))));
  await tuesday.close();

  // 3: served for virt-v2v.
  const [serve = '', convert = ''] = commandsOf(page.take('virt-v2v'));
  const served = spawn('sh', ['-c', `exec ${here(serve)}`], { cwd: home, env });
  t.teardown(() => served.kill('SIGKILL'));
  const ended = once(served, 'close');
  const isThere = async (): Promise<void> => {
    while (!existsSync(at('web1.xml'))) {
      await new Promise((resolve) => setTimeout(resolve, 50));
    }
  };
  await soon('the XML', isThere());
  t.regex(await type(`${convert} --print-source`), /^disks:\n\t0\n\t1\n/m);
  served.kill('SIGTERM');
  t.deepEqual(await soon('its end', ended), [0, null]);
  t.deepEqual(server.held, []);

  // 5: all that was pulled is written back.
  const pulled = await stillblock(t, 'pull', '--checkpoint', 'now', socket, at('backup/web1'));
  t.is(pulled.code, 0, pulled.stderr);
  await type(page.take('restore').text);
  t.true(machine.disk('sda').data.equals(await readFile(at('dev/vdb'))));
  t.true(machine.disk('sdb').data.equals(await readFile(at('dev/vdc'))));
  t.deepEqual(page.left, []);
});
