// SPDX-License-Identifier: Apache-2.0
/** The tunnel of docs/security.md, as it stands there, by a real sshd on loopback. */
import { type ChildProcess, spawn } from 'node:child_process';
import { existsSync } from 'node:fs';
import { mkdir, readFile, writeFile } from 'node:fs/promises';
import { connect } from 'node:net';
import { userInfo } from 'node:os';
import { join } from 'node:path';
import type { ExecutionContext } from 'ava';
import { folder, freePorts } from '../nbd/world.ts';
import { commandsOf, Page } from '../pages.ts';
import { run, tryRun } from './clients.ts';
import { commandOnPath } from './command.ts';
import { Server } from './pull-server.ts';
import { assertChain, errorOf, pullTest, soon, stillblock } from './pulling.ts';

/** Starts sshd for the user who runs this, and waits until it listens. */
async function startSshd(t: ExecutionContext, home: string, port: number): Promise<void> {
  const { username, uid } = userInfo();
  const at = (name: string): string => join(home, name);
  for (const key of ['host', 'user']) {
    await run('ssh-keygen', ['-q', '-t', 'ed25519', '-N', '', '-f', at(key)]);
  }
  await writeFile(at('known_hosts'), `web1 ${await readFile(at('host.pub'), 'utf8')}`);
  await writeFile(
    at('sshd_config'),
    `ListenAddress 127.0.0.1:${port}
HostKey ${at('host')}
PidFile none
AuthorizedKeysFile ${at('user.pub')}
AllowUsers ${username}
PermitRootLogin prohibit-password
PasswordAuthentication no
# Folders of tests are in one that all may write to.
StrictModes no
# Its sessions want a login id for the audit, which a container may not give.
UsePAM no
`,
  );
  await writeFile(
    at('ssh_config'),
    `Host web1
  HostName 127.0.0.1
  HostKeyAlias web1
  Port ${port}
  IdentityFile ${at('user')}
  IdentitiesOnly yes
  IdentityAgent none
  UserKnownHostsFile ${at('known_hosts')}
  StrictHostKeyChecking yes
  BatchMode yes
  # What stays in the background can be ended by it.
  ControlMaster auto
  ControlPath ${at('master')}
`,
  );
  await writeFile(at('bin/ssh'), `#!/bin/sh\nexec /usr/bin/ssh -F '${at('ssh_config')}' "$@"\n`, {
    mode: 0o755,
  });
  // Its service would make it; it goes there to give up its rights.
  if (uid === 0) {
    await mkdir('/run/sshd', { recursive: true, mode: 0o755 });
  }
  const sshd = spawn('/usr/sbin/sshd', ['-D', '-e', '-f', at('sshd_config'), '-p', String(port)], {
    stdio: ['ignore', 'ignore', 'pipe'],
  });
  t.teardown(() => sshd.kill('SIGKILL'));
  await soon('sshd', listening(sshd));
}

/** Settles once it says that it listens. */
function listening(sshd: ChildProcess): Promise<void> {
  return new Promise((resolve, reject) => {
    let said = '';
    sshd.once('error', reject);
    sshd.once('exit', () => reject(new Error(`sshd has ended: ${said}`)));
    sshd.stderr?.setEncoding('utf8').on('data', (piece: string) => {
      said += piece;
      if (said.includes('Server listening on ')) {
        resolve();
      }
    });
  });
}

function isServed(port: number): Promise<boolean> {
  return new Promise((resolve) => {
    const socket = connect(port, '127.0.0.1', () => resolve(true)).once('error', () =>
      resolve(false),
    );
    socket.once('connect', () => socket.destroy());
  });
}

pullTest('what docs/security.md says of ssh works', async (t) => {
  const page = await Page.open('docs/security.md', import.meta.url);
  const [tunnel = '', pull = ''] = commandsOf(page.take('ssh -fN'));
  t.deepEqual(page.left, []);
  const server = await Server.start(t);
  const { machine } = server;
  const home = await folder(t);
  const env = await commandOnPath(home);
  await mkdir(join(home, 'run'));
  await mkdir(join(home, 'backup'));
  const [sshPort = 0, own = 0, told = 0] = await freePorts(3);
  await startSshd(t, home, sshPort);
  // Both ends of the tunnel are on this machine and cannot be one port. The server tells clients
  // the one where the backup host has it, as a server does whose NBD port is forwarded to itself.
  machine.ports = { own, told };
  /** What is of this machine in place of what is of yours. */
  const here = (command: string): string =>
    command
      .replace('/run/stillblock/control.sock', server.socket)
      .replaceAll(/\/(run|backup)\/web1/g, (path) => home + path)
      .replace('10809:127.0.0.1:10809', `${told}:127.0.0.1:${own}`)
      .replace('root@', `${userInfo().username}@`);
  const type = (command: string): ReturnType<typeof tryRun> =>
    tryRun('env', [`PATH=${env['PATH']}`, 'sh', '-c', here(command)], home);

  t.false(await isServed(told));
  t.teardown(async () => {
    if (existsSync(join(home, 'master'))) {
      await type('ssh -O exit web1');
    }
  });
  // What goes on in the background keeps what it writes to, which would be waited for.
  const opened = await type(`${tunnel} >ssh.log 2>&1`);
  t.is(opened.code, 0, await readFile(join(home, 'ssh.log'), 'utf8'));
  t.true(await isServed(told));
  const pulled = await type(`${pull} --checkpoint monday`);
  t.is(pulled.code, 0, pulled.stderr);
  machine.change(1);
  const next = await type(`${pull} --checkpoint tuesday`);
  t.is(next.code, 0, next.stderr);
  const chain = join(home, 'backup/web1');
  await assertChain(t, machine, chain, ['monday', 'tuesday']);
  t.deepEqual(server.held, []);

  // Nothing else has led to the server: without the tunnel there is no way.
  const closed = await type('ssh -O exit web1');
  t.is(closed.code, 0, closed.stderr);
  const ended = await stillblock(t, 'pull', join(home, 'run/web1.sock'), chain);
  t.is(errorOf(ended), 'NO_DAEMON', ended.stderr);
  t.false(await isServed(told));
});
