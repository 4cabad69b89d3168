// SPDX-License-Identifier: Apache-2.0
/** The units: systemd understands them, and the service is kept from what it does not need. */
import { execFile } from 'node:child_process';
import { cp, mkdir, readFile, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import test, { type ExecutionContext } from 'ava';
import { folder } from './world.ts';

const run = promisify(execFile);
const configs = fileURLToPath(new URL('../../../configs/', import.meta.url));
/** systemd's word is 0 for the tightest to 10; what needs CAP_SYS_ADMIN cannot be far below. */
const MOST_EXPOSURE = 5;

/** A root folder in which the units are installed, and what they call is there. */
async function installed(t: ExecutionContext): Promise<string> {
  const root = await folder(t);
  await cp(join(configs, 'systemd'), join(root, 'etc/systemd/system'), { recursive: true });
  for (const program of ['usr/bin/stillblock', 'bin/kill']) {
    await mkdir(join(root, program, '..'), { recursive: true });
    await writeFile(join(root, program), '#!/bin/sh\n', { mode: 0o755 });
  }
  // The units that ours name are systemd's own.
  await cp('/usr/lib/systemd/system', join(root, 'usr/lib/systemd/system'), {
    recursive: true,
    verbatimSymlinks: true,
  });
  return root;
}

test('systemd finds no fault with the units', async (t) => {
  const root = await installed(t);
  const units = ['stillblock.service', 'stillblock.socket'];
  const { stdout, stderr } = await run('systemd-analyze', [
    ...['verify', '--man=no', `--root=${root}`],
    ...units.map((unit) => join(root, 'etc/systemd/system', unit)),
  ]);
  const said = `${stdout}${stderr}`.split('\n').filter((line) => line.includes('stillblock'));
  t.deepEqual(said, []);
});

test('the service is confined', async (t) => {
  const root = await installed(t);
  const { stdout } = await run('systemd-analyze', [
    ...['security', '--offline=yes', '--no-pager', `--root=${root}`],
    'stillblock.service',
  ]);
  const exposure = Number(/exposure level for stillblock\.service: ([\d.]+)/.exec(stdout)?.[1]);
  t.log(`exposure ${exposure}`);
  t.true(exposure > 0 && exposure <= MOST_EXPOSURE, stdout);
  // A threshold in percent makes the tool itself say no.
  await run('systemd-analyze', [
    ...['security', '--offline=yes', `--threshold=${MOST_EXPOSURE * 10}`, `--root=${root}`],
    'stillblock.service',
  ]);
});

test('no list of devices keeps it from disks', async (t) => {
  const unit = await readFile(join(configs, 'systemd/stillblock.service'), 'utf8');
  // Each of these makes one, or is one.
  t.notRegex(unit, /^(ProtectClock|PrivateDevices)=(?!no$)|^Device(Allow|Policy)=/m);
});

test('systemd-tmpfiles makes the folders, for root alone', async (t) => {
  const root = await folder(t);
  await mkdir(join(root, 'etc'));
  await writeFile(join(root, 'etc/passwd'), 'root:x:0:0::/root:/bin/sh\n');
  await writeFile(join(root, 'etc/group'), 'root:x:0:\n');
  await run('systemd-tmpfiles', [
    ...['--create', `--root=${root}`],
    join(configs, 'tmpfiles.d/stillblock.conf'),
  ]);
  for (const path of ['run/stillblock', 'var/lib/stillblock/checkpoints']) {
    const { stdout } = await run('stat', ['-c', '%a', join(root, path)]);
    t.is(stdout, '700\n', path);
  }
});

test('the socket is where the daemon and its clients look for it', async (t) => {
  const unit = await readFile(join(configs, 'systemd/stillblock.socket'), 'utf8');
  const example = await readFile(join(configs, 'stillblock.xml'), 'utf8');
  const run = /run="([^"]+)"/.exec(example)?.[1];
  t.regex(unit, new RegExp(`^ListenStream=${run}/control\\.sock$`, 'm'));
});
