// SPDX-License-Identifier: Apache-2.0
// A machine's own root: the tree of scripts/boot-tree.sh with a kernel's modules, our module and
// our hooks in it, installed as docs/reboot.md says; as a disk of ext4 and as an initramfs that
// initramfs-tools makes in it.

import {
  chmodSync,
  copyFileSync,
  cpSync,
  mkdirSync,
  readdirSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs';
import { dirname, join } from 'node:path';
import { buildTool } from '../kernels/world.ts';
import { Page } from '../pages.ts';
import { CLI } from '../program.ts';
import { cacheFolder, checkout, type KernelName, modulePath, stockKernel } from './checkout.ts';
import { agentPort } from './guest.ts';
import { runTool, type ToolResult } from './host.ts';
import { moduleClosure, shellQuote } from './initrd.ts';

/** What an initramfs loads; the root has these, too, and nothing else. */
const early = [
  ...['virtio_pci', 'virtio_blk', 'virtio_net', 'ext4'],
  // ext4 asks for it by name.
  'crc32c_generic',
];
const late = ['xfs', '9pnet_virtio', '9p', 'dm_mod', 'dm_delay', 'virtio_scsi', 'sd_mod', 'loop'];

/** Where the host's root is in the guest, once it is mounted; with systemd it always is. */
export const hostRoot = '/host';
export const mountHostRoot: string = `mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=loose,ro hostroot ${hostRoot}`;
const testsFolder = '/usr/lib/stillblock-tests';
const initPath = `${testsFolder}/init`;
/** Requests to the module, as test/kernels/ioctls.c has them. */
export const ioctlsPath: string = `${testsFolder}/ioctls`;

/** Text for the kernel's command line: the root, and which process 1 (see boot-init.sh). */
const rootCmdline = 'root=/dev/vda ro rootfstype=ext4 fsck.mode=auto';
export const cmdlines: Readonly<Record<'bare' | 'udev' | 'systemd', string>> = {
  bare: `${rootCmdline} init=${initPath}`,
  udev: `${rootCmdline} init=${initPath} with_udev`,
  systemd: rootCmdline,
};

/** Longest time for what is done in the tree, milliseconds. */
const limitMs = 300_000;

const units: Readonly<Record<string, string>> = {
  'host.mount': `[Mount]
What=hostroot
Where=${hostRoot}
Type=9p
Options=trans=virtio,version=9p2000.L,msize=512000,cache=loose,ro
[Install]
WantedBy=local-fs.target
`,
  'agent.service': `[Unit]
After=stillblock.service
[Service]
ExecStart=/bin/sh ${initPath} service
TasksMax=infinity
[Install]
WantedBy=multi-user.target
`,
  'stillblock.service.d/tests.conf': `[Unit]
RequiresMountsFor=${hostRoot}
[Service]
TimeoutStartSec=10min
`,
};

/** Runs a program as root, or as what is root to itself: then all files seem to be root's. */
function asRoot(command: readonly string[]): Promise<ToolResult> {
  const all = process.getuid?.() === 0 ? command : ['unshare', '--map-root-user', ...command];
  const [program = '', ...args] = all;
  return runTool(program, args, { timeoutMs: limitMs });
}

export class BootTree {
  readonly #folder: string;
  readonly #release: string;

  private constructor(folder: string, release: string) {
    this.#folder = folder;
    this.#release = release;
  }

  /**
   * Copies the tree, and puts what is of this checkout into it.
   *
   * @param folder that is not there yet
   * @param foreign file for an initramfs that has nothing of ours
   */
  static async make(folder: string, kernel: KernelName, foreign: string): Promise<BootTree> {
    const ioctls = await buildTool('ioctls');
    const { release, modulesFolder } = stockKernel(kernel);
    await runTool('cp', ['-a', join(cacheFolder, 'toolchains/boot-bookworm'), folder]);
    const tree = new BootTree(folder, release);
    tree.#putModules(join(modulesFolder, release), kernel);
    tree.#putFiles(kernel);
    tree.#copy(ioctls, ioctlsPath, 0o755);
    await runTool('depmod', ['-b', folder, release]);
    await tree.#run('update-initramfs', '-c', '-k', release);
    // As a kernel's package makes it: `update-initramfs -u` is for that one.
    symlinkSync(`boot/initrd.img-${release}`, tree.path('initrd.img'));
    tree.#takeInitrd(foreign);
    await tree.#installHook();
    await tree.#run('systemctl', '-q', 'enable', ...['host.mount', 'agent', 'stillblock']);
    await tree.#run('systemctl', '-q', 'mask', 'apt-daily.timer', 'apt-daily-upgrade.timer');
    return tree;
  }

  path(path: string): string {
    return join(this.#folder, path);
  }

  /** Runs a program in the tree, and returns what it says. */
  async #run(program: string, ...args: string[]): Promise<string> {
    return (await asRoot(['chroot', this.#folder, program, ...args])).stdout;
  }

  #putModules(from: string, kernel: KernelName): void {
    const to = this.path(`usr/lib/modules/${this.#release}`);
    mkdirSync(to, { recursive: true });
    for (const name of readdirSync(from).filter((each) => /^modules\.(builtin|order)/.test(each))) {
      copyFileSync(join(from, name), join(to, name));
    }
    for (const file of moduleClosure(from, [...early, ...late])) {
      this.#copy(join(from, file), `usr/lib/modules/${this.#release}/${file}`);
    }
    this.#copy(modulePath(kernel), `usr/lib/modules/${this.#release}/updates/stillblock.ko`);
  }

  #copy(from: string, to: string, mode?: number): void {
    mkdirSync(dirname(this.path(to)), { recursive: true });
    copyFileSync(from, this.path(to));
    if (mode !== undefined) chmodSync(this.path(to), mode);
  }

  write(to: string, text: string): void {
    mkdirSync(dirname(this.path(to)), { recursive: true });
    writeFileSync(this.path(to), text);
  }

  #putFiles(kernel: KernelName): void {
    const own = (name: string): string => join(checkout, name);
    const { release } = stockKernel(kernel);
    const config = `kernels/${kernel}/boot/config-${release}`;
    this.#copy(join(cacheFolder, config), `boot/config-${release}`);
    cpSync(own('configs/dracut'), this.path('usr/lib/dracut/modules.d'), { recursive: true });
    this.#copy(own('configs/udev/59-stillblock.rules'), 'etc/udev/rules.d/59-stillblock.rules');
    for (const name of ['stillblock.service', 'stillblock.socket']) {
      this.#copy(own(`configs/systemd/${name}`), `etc/systemd/system/${name}`);
    }
    for (const [name, text] of Object.entries(units)) {
      this.write(`etc/systemd/system/${name}`, text);
    }
    const node = shellQuote(join(hostRoot, process.execPath));
    const cli = shellQuote(join(hostRoot, CLI));
    this.write('usr/bin/stillblock', `#!/bin/sh\nexec ${node} ${cli} "$@"\n`);
    chmodSync(this.path('usr/bin/stillblock'), 0o755);
    this.#copy(own('test/vm/boot-init.sh'), initPath, 0o755);
    this.#copy(own('test/vm/agent.py'), `${testsFolder}/agent.py`);
    this.write(
      'etc/stillblock-tests',
      `agent=${testsFolder}/agent.py
agent_port=${agentPort}
path=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
`,
    );
    mkdirSync(this.path(hostRoot), { recursive: true });
    this.write('etc/fstab', '/dev/vda / ext4 errors=remount-ro 0 1\n');
    this.write('etc/hostname', 'booted\n');
    this.write('etc/machine-id', '0123456789abcdef0123456789abcdef\n');
    this.write('etc/initramfs-tools/conf.d/tests', 'MODULES=list\nCOMPRESS=gzip\nFSTYPE=ext4\n');
    this.write('etc/initramfs-tools/modules', `${early.join('\n')}\n`);
  }

  /** By the page's own commands, as if this checkout were in the tree. */
  async #installHook(): Promise<void> {
    const sources = 'usr/src/stillblock';
    const early = 'build/native/stillblock-early';
    this.#copy(join(checkout, early), `${sources}/${early}`, 0o755);
    cpSync(join(checkout, 'configs'), this.path(`${sources}/configs`), { recursive: true });
    const page = await Page.open('docs/reboot.md', import.meta.url);
    const { text } = page.take('update-initramfs -u');
    await this.#run('sh', '-ec', `cd /${sources}\n${text}`);
  }

  #takeInitrd(file: string): void {
    copyFileSync(this.path(`boot/initrd.img-${this.#release}`), file);
  }

  /** The tree as it is now, as a disk's file. */
  async makeDisk(file: string, sizeBytes: number): Promise<void> {
    const size = `${sizeBytes / 1024}k`;
    await asRoot(['mke2fs', '-q', '-t', 'ext4', '-L', 'root', '-d', this.#folder, file, size]);
  }

  /**
   * An initramfs by dracut, with our module of it as it is installed.
   *
   * @param plan as for `makeInitrd`
   * @returns what lsinitrd says is in it
   */
  async makeDracut(plan: string): Promise<string> {
    this.write('var/lib/stillblock/boot-plan', plan);
    const image = '/boot/dracut.img';
    const drivers = early.join(' ');
    await this.#run(
      ...(['dracut', '--force', '--no-hostonly', '--gzip', '--kver', this.#release] as const),
      ...(['--force-drivers', drivers, '--omit', 'plymouth', image] as const),
    );
    return this.#run('lsinitrd', image);
  }

  /**
   * An initramfs by update-initramfs, with our hook as it is installed.
   *
   * @param plan what the daemon has written as boot plan
   */
  async makeInitrd(file: string, plan: string): Promise<void> {
    this.write('var/lib/stillblock/boot-plan', plan);
    await this.#run('update-initramfs', '-u');
    this.#takeInitrd(file);
  }
}
