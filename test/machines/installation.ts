// SPDX-License-Identifier: Apache-2.0
// Stillblock in a machine: the module by hand, by the commands of docs/module.md; the packages
// installed and removed by those of docs/packages.md.
//
// An emulated processor builds the module for five minutes, which one machine has to do. So for
// the packages DKMS builds it outside, above the tree of just this machine, and the package is
// given it as docs/module.md says. That DKMS builds it in each Debian is shown by
// scripts/test-dkms.sh. Nor is the initramfs made anew, which takes minutes, too: what our
// hooks do in one is shown by test/reboots.

import { cp, mkdir, readdir } from 'node:fs/promises';
import { join } from 'node:path';
import type { ExecutionContext } from 'ava';
import { commandsOf, Page, readPage } from '../pages.ts';
import { checkout } from '../vm/checkout.ts';
import { runTool } from '../vm/host.ts';
import type { Machine, MachineName } from '../vm/machine.ts';

/** Of a step in an emulated machine. */
export const limitMs: number = 60 * 60_000;
/** The module as DKMS carries it, on the disk of packages. */
export const tarball = 'stillblock.dkms.tar.gz';
/** Nobody is there to answer apt-get. */
export const silently = `export DEBIAN_FRONTEND=noninteractive APT_CONFIG=/run/apt.conf
  echo 'APT::Get::Assume-Yes "1";' >/run/apt.conf`;

export interface Recipe {
  readonly name: MachineName;
  readonly firmware: 'bios' | 'uefi';
  readonly packages: readonly string[];
}

/** The packages, the module that DKMS made of them, and its source, as a disk of their own. */
export async function packagesDisk(
  folder: string,
  { name, packages }: Pick<Recipe, 'name' | 'packages'>,
): Promise<string> {
  const source = join(checkout, 'build/packages');
  const made = await readdir(source).catch((): string[] => []);
  const content = join(folder, 'content');
  await mkdir(content);
  await cp(join(checkout, 'module'), join(content, 'module'), { recursive: true });
  for (const wanted of packages) {
    const file = made.find((candidate) => candidate.startsWith(`${wanted}_`));
    if (file === undefined) throw new Error(`there is no ${wanted}: run npm run package`);
    await cp(join(source, file), join(content, file));
    if (wanted === 'stillblock-dkms') {
      const script = join(checkout, 'scripts/machine-module.sh');
      const page = await Page.open('docs/module.md', import.meta.url);
      const commands = commandsOf(page.take('dkms mktarball')).join('\n');
      const words = [script, name, join(source, file), commands, join(content, tarball)];
      await runTool('bash', words, { timeoutMs: limitMs });
    }
  }
  const file = join(folder, 'packages');
  await runTool('mke2fs', ['-q', '-t', 'ext4', '-d', content, file, '64M']);
  return file;
}

/** By whom DKMS signs, and what the kernel then thinks of the module. */
export interface Signature {
  readonly signer: string;
  readonly taint: string;
}

/** With the key that DKMS makes at its first build, which no kernel trusts. */
const ownSignature: Signature = { signer: 'DKMS module signing key', taint: 'OE' };

/** The module as docs/module.md has it built by hand, loaded, and taken away again. */
export async function buildByHand(
  t: ExecutionContext,
  machine: Machine,
  { signer, taint }: Signature = ownSignature,
): Promise<void> {
  const page = await Page.open('docs/module.md', import.meta.url);
  const build = commandsOf(page.take('dkms install')).join('\n');
  const away = commandsOf(page.take('dkms remove')).join('\n');
  const { stdout } = await machine.run(
    `set -e; ${silently}
    mount -o ro /dev/disk/by-id/virtio-packages /mnt; cp -r /mnt/module /root; umount /mnt
    cd /root
    ${build}
    rm -r module; dkms status; modinfo -F filename stillblock; modinfo -F signer stillblock
    cd /sys/module/stillblock; cat /etc/modules-load.d/stillblock.conf initstate taint`,
    { timeoutMs: limitMs },
  );
  const [status, file, ...others] = stdout.trimEnd().split('\n').slice(-6);
  t.regex(status ?? '', /^stillblock\/0\.1\.0, [^,]+, x86_64: installed$/);
  t.regex(file ?? '', /^\/lib\/modules\/[^/]+\/updates\/dkms\/stillblock\.ko(\.xz)?$/);
  t.deepEqual(others, [signer, 'stillblock', 'live', taint]);
  await machine.run(away);
  t.is(await traces(machine), '');
}

/** Installs as the documents say; apt-get is told not to ask. */
export async function install(machine: Machine, { packages }: Recipe): Promise<string> {
  const page = await Page.open('docs/packages.md', import.meta.url);
  const [installation = ''] = commandsOf(page.take('apt-get install')).filter(
    (line) => line.split(' ./').length === packages.length + 1,
  );
  if (page.left.length > 0) throw new Error(`${page.left[0]?.text} is not run`);
  const module = await Page.open('docs/module.md', import.meta.url);
  const bring = commandsOf(module.take('/usr/share/stillblock-dkms'));
  const { stdout } = await machine.run(
    `set -e; ${silently}
    echo update_initramfs=no >/etc/initramfs-tools/update-initramfs.conf
    mount -o ro /dev/disk/by-id/virtio-packages /mnt; cp /mnt/${tarball} /tmp; cd /mnt
    ${[...bring, installation].join('\n')}
    cd /; umount /mnt; rm -r /tmp/${tarball} /usr/share/stillblock-dkms`,
    { timeoutMs: limitMs },
  );
  return stdout;
}

/** Makes a key for this machine, as docs/module.md says. */
export async function makeKey(machine: Machine): Promise<void> {
  const page = await Page.open('docs/module.md', import.meta.url);
  await machine.run(`set -e; ${commandsOf(page.take('mok.key')).join('\n')}`);
}

/** Signs the module with a key of this machine, as docs/module.md says. */
export async function sign(machine: Machine): Promise<void> {
  await makeKey(machine);
  const text = await readPage('docs/module.md');
  const signFile = /`(\/lib\/modules\/[^`]*\/sign-file sha256) KEY CERTIFICATE stillblock\.ko`/;
  const { stdout } = await machine.run(
    `set -e; cd /tmp; cp $(modinfo -n stillblock) .; case $(ls stillblock.ko*) in *.xz) unxz stillblock.ko.xz ;; esac
    ${signFile.exec(text)?.[1]} /var/lib/dkms/mok.key /var/lib/dkms/mok.pub stillblock.ko
    modinfo -F signer /tmp/stillblock.ko; rm /tmp/stillblock.ko /var/lib/dkms/mok.*`,
  );
  if (stdout !== 'machine modules\n') throw new Error(`the module is signed by ${stdout}`);
}

/** Files in a machine's tree that bear our name, but for what tests have put there. */
async function traces(machine: Machine): Promise<string> {
  const { stdout } = await machine.run(
    `find / -xdev -name '*stillblock*' -not -path '/var/log/*' -not -path '/var/lib/dpkg/*-old'`,
  );
  return stdout;
}

/** Removes what was installed, as docs/packages.md says, and looks for what is left. */
export async function remove(
  t: ExecutionContext,
  machine: Machine,
  { packages }: Recipe,
): Promise<void> {
  await machine.run('apt-get -y -q remove stillblock', { timeoutMs: limitMs });
  const left = await machine.run(
    'pgrep -af "[s]tillblock (serve|nbd)"; systemctl is-active stillblock.service stillblock.socket; ls -d /sys/module/stillblock /dev/stillblock*',
    { check: false },
  );
  t.is(left.stdout, 'inactive\ninactive\n');
  await machine.run(`rm -r /etc/stillblock/pki; apt-get -y -q purge ${packages.join(' ')}`, {
    timeoutMs: limitMs,
  });
  t.is((await machine.run('dkms status')).stdout, '');
  t.is(await traces(machine), '');
}
