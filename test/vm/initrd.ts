// SPDX-License-Identifier: Apache-2.0
// The guest's initrd: static busybox, the kernel modules that reach the host's
// root, and init.sh. Written as a cpio archive in the "newc" format
// (Documentation/driver-api/early-userspace/buffer-format.rst).

import { execFileSync } from 'node:child_process';
import { existsSync, readFileSync } from 'node:fs';
import { basename, join } from 'node:path';
import { checkout, type StockKernel } from './checkout.ts';

/** What the root file system and the network need; the rest is modprobed later. */
const bootModules = ['virtio_pci', 'virtio_blk', 'virtio_net', '9pnet_virtio', '9p', 'overlay'];

const busyboxPaths = ['/bin/busybox', '/usr/bin/busybox'];

interface Entry {
  readonly path: string;
  readonly mode: number;
  readonly data: Uint8Array;
}

const folder = (path: string): Entry => ({ path, mode: 0o040755, data: new Uint8Array() });

function cpio(entries: readonly Entry[]): Buffer {
  const pieces: Uint8Array[] = [];
  const pad = (length: number): Uint8Array => new Uint8Array((4 - (length % 4)) % 4);
  const add = ({ path, mode, data }: Entry, inode: number): void => {
    const name = Buffer.from(`${path}\0`);
    const fields = [inode, mode, 0, 0, 1, 0, data.length, 0, 0, 0, 0, name.length, 0];
    const header = Buffer.from(
      `070701${fields.map((field) => field.toString(16).padStart(8, '0')).join('')}`,
    );
    pieces.push(header, name, pad(header.length + name.length), data, pad(data.length));
  };
  entries.forEach(add);
  add({ path: 'TRAILER!!!', mode: 0, data: new Uint8Array() }, 0);
  return Buffer.concat(pieces);
}

/** A module's name as the kernel compares it: `-` and `_` are the same. */
const moduleName = (path: string): string =>
  basename(path)
    .replace(/\.ko(\.\w+)?$/, '')
    .replaceAll('-', '_');

/** The files of the modules and of all they depend on, in the order to load them. */
export function moduleClosure(folder: string, names: readonly string[]): string[] {
  const lines = readFileSync(join(folder, 'modules.dep'), 'utf8').trim().split('\n');
  const dependencies = new Map(
    lines.map((line) => {
      const [path = '', needs = ''] = line.split(':');
      return [path, needs.trim().split(' ').filter(Boolean)] as const;
    }),
  );
  const builtin = new Set(
    readFileSync(join(folder, 'modules.builtin'), 'utf8').trim().split('\n').map(moduleName),
  );
  const ordered = new Set<string>();
  const visit = (path: string): void => {
    for (const need of dependencies.get(path) ?? []) visit(need);
    ordered.add(path);
  };
  for (const name of names.filter((candidate) => !builtin.has(candidate))) {
    const path = [...dependencies.keys()].find((candidate) => moduleName(candidate) === name);
    if (path === undefined) throw new Error(`kernel module ${name} is not in ${folder}`);
    visit(path);
  }
  return [...ordered];
}

function readModule(path: string): Uint8Array {
  const decompress = { '.xz': ['xz', '-dc'], '.zst': ['zstd', '-qdc'], '.gz': ['gzip', '-dc'] };
  const suffix = path.slice(path.lastIndexOf('.'));
  const command = Object.entries(decompress).find(([known]) => known === suffix)?.[1];
  if (command === undefined) return readFileSync(path);
  const [program = '', ...options] = command;
  return execFileSync(program, [...options, path], { maxBuffer: 64 << 20 });
}

/** Quotes a word for a POSIX shell. */
export const shellQuote = (word: string): string => `'${word.replaceAll("'", "'\\''")}'`;

/**
 * @param agentPort TCP port on which the guest's agent listens.
 * @param path PATH of the commands that the agent runs.
 */
export function buildInitrd(kernel: StockKernel, agentPort: number, path: string): Buffer {
  const busybox = busyboxPaths.find((candidate) => existsSync(candidate));
  if (busybox === undefined) {
    throw new Error('busybox is missing: apt-get install busybox-static');
  }
  const moduleFolder = join(kernel.modulesFolder, kernel.release);
  const modules = moduleClosure(moduleFolder, bootModules);
  const settings = {
    modules: modules.map(moduleName).join(' '),
    kernel_modules: kernel.modulesFolder,
    agent: join(checkout, 'test/vm/agent.py'),
    agent_port: String(agentPort),
    path,
  };
  const settingsText = Object.entries(settings)
    .map(([name, value]) => `${name}=${shellQuote(value)}\n`)
    .join('');
  // Debian's static busybox runs its own applets for commands it is asked for.
  const applets = [
    'sh',
    'cat',
    'date',
    'mount',
    'insmod',
    'mkdir',
    'ip',
    'hostname',
    'echo',
    'poweroff',
    'switch_root',
  ];
  return cpio([
    ...['bin', 'modules', 'proc', 'sys', 'dev', 'host', 'rw', 'newroot'].map(folder),
    { path: 'bin/busybox', mode: 0o100755, data: readFileSync(busybox) },
    ...applets.map((name) => ({
      path: `bin/${name}`,
      mode: 0o120777,
      data: Buffer.from('busybox'),
    })),
    ...modules.map((file) => ({
      path: `modules/${moduleName(file)}`,
      mode: 0o100644,
      data: readModule(join(moduleFolder, file)),
    })),
    { path: 'settings', mode: 0o100644, data: Buffer.from(settingsText) },
    { path: 'init', mode: 0o100755, data: readFileSync(join(checkout, 'test/vm/init.sh')) },
  ]);
}
