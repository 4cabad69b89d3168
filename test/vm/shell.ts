// SPDX-License-Identifier: Apache-2.0
// Tries something in a guest by hand; see scripts/guest.sh.

import { readFile } from 'node:fs/promises';
import { Command, InvalidArgumentError, Option } from 'commander';
import { type KernelName, kernelNames } from './checkout.ts';
import { bootGuest, busNames, type GuestDisk } from './guest.ts';

const sizeUnits: Readonly<Record<string, number>> = { K: 2 ** 10, M: 2 ** 20, G: 2 ** 30 };

function addDisk(text: string, disks: readonly GuestDisk[]): GuestDisk[] {
  const [, name, count, unit, on] = /^([\w-]{1,20})=(\d+)([KMG])(?:,(.*))?$/.exec(text) ?? [];
  const bus = busNames.find((candidate) => candidate === (on ?? 'virtio-blk'));
  if (name === undefined || unit === undefined || bus === undefined) {
    throw new InvalidArgumentError(
      `NAME=SIZE[,BUS], such as a=256M or b=1G,nvme; BUS is one of ${busNames.join(', ')}`,
    );
  }
  return [...disks, { name, sizeBytes: Number(count) * (sizeUnits[unit] ?? 1), bus }];
}

const addText = (text: string, texts: readonly string[]): string[] => [...texts, text];

interface Options {
  readonly kernel: KernelName;
  readonly disk: readonly GuestDisk[];
  readonly module: boolean;
  readonly moduleParameters: string;
  readonly memory: string;
  readonly cpus: string;
  readonly append: string;
  readonly qemu: readonly string[];
  readonly file?: string;
  readonly timeout: string;
}

const program = new Command('guest.sh')
  .description('boots a stock kernel, runs a script for bash as root in it, and powers it off')
  .argument('[script]', 'text for bash; every disk NAME is in $NAME as its device node')
  .addOption(new Option('--kernel <name>').choices([...kernelNames]).default('6.1'))
  .option('--disk <name=size[,bus]>', `adds a data disk (${busNames.join(', ')})`, addDisk, [])
  .option('--module', 'loads the kernel module first', false)
  .option('--module-parameters <text>', 'its parameters', '')
  .option('--memory <MiB>', 'memory', '2048')
  .option('--cpus <count>', 'processors', '2')
  .option('--append <text>', 'added to the kernel command line', '')
  .option('--qemu <argument>', 'added to the arguments of QEMU', addText, [])
  .option('--file <path>', 'takes the script from a file')
  .option('--timeout <seconds>', 'ends the script', '300')
  .parse();

const options = program.opts<Options>();
const script = options.file === undefined ? program.args[0] : await readFile(options.file, 'utf8');
if (script === undefined) program.error('no script: give its text, or --file');

const started = Date.now();
const say = (text: string): void => {
  process.stderr.write(`[${((Date.now() - started) / 1000).toFixed(1)} s] ${text}\n`);
};

const guest = await bootGuest({
  kernel: options.kernel,
  disks: options.disk,
  memoryMiB: Number(options.memory),
  cpus: Number(options.cpus),
  appendCmdline: options.append,
  extraArgs: options.qemu,
});
say(`booted ${options.kernel} with ${guest.accelerator}`);
try {
  if (options.module) await guest.loadModule(options.moduleParameters);
  const variables = await Promise.all(
    options.disk.map(async ({ name }) => `${name.replaceAll('-', '_')}=${await guest.disk(name)}`),
  );
  const result = await guest.run(`${variables.join('\n')}\n${script}`, {
    check: false,
    timeoutMs: Number(options.timeout) * 1000,
  });
  process.stdout.write(result.stdout);
  process.stderr.write(result.stderr);
  say(`exit code ${result.code}`);
  process.exitCode = result.code === 0 ? 0 : 1;
  await guest.shutdown();
} catch (error) {
  process.stderr.write(`${error instanceof Error ? error.message : String(error)}\n`);
  process.exitCode = 1;
} finally {
  await guest.kill();
  process.stderr.write(`--- console\n${guest.console()}\n`);
}
