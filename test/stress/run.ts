// SPDX-License-Identifier: Apache-2.0
// `npm run stress -- --kernel 6.1 --minutes 30`: a long run of the stress test.
// Its outcome is added to the table in docs/stress.md. `--help` has the rest.

import { createHash } from 'node:crypto';
import { readdir, readFile, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import process from 'node:process';
import { Command, InvalidArgumentError, Option } from 'commander';
import { checkout, type KernelName, kernelNames, stockKernel } from '../vm/checkout.ts';
import { type StressCounts, StressGuest } from './stress.ts';

/** The table's rows come behind this line of the page. */
const marker = '<!-- rows are added below by test/stress/run.ts -->';

interface Options {
  readonly kernel: KernelName;
  readonly minutes: number;
  readonly seed: number;
  readonly record: boolean;
  readonly page: string;
}

function number(text: string): number {
  const value = Number(text);
  if (!Number.isSafeInteger(value) || value < 1) throw new InvalidArgumentError('a whole number');
  return value;
}

/** Names the module's sources by their content, committed or not. */
async function moduleVersion(): Promise<string> {
  const folder = join(checkout, 'module');
  const hash = createHash('sha256');
  const names = (await readdir(folder)).filter((name) => /^Kbuild$|\.[ch]$/.test(name)).sort();
  for (const name of [...names, 'uapi/linux/stillblock.h']) {
    hash.update(name).update(await readFile(join(folder, name)));
  }
  return hash.digest('hex').slice(0, 12);
}

const gibibytes = (bytes: number): string => (bytes / 2 ** 30).toFixed(1);

function row(release: string, module: string, counts: StressCounts): string {
  const cells = [
    new Date().toISOString().slice(0, 10),
    release,
    `\`${module}\``,
    counts.seed,
    (counts.seconds / 60).toFixed(0),
    counts.takes,
    counts.images,
    gibibytes(counts.bytesWritten),
    gibibytes(counts.imageBytesRead),
    counts.pairBlocksCompared,
    counts.kills,
    counts.overflows,
    counts.growths,
    counts.violations,
  ];
  return `| ${cells.join(' | ')} |`;
}

async function addRow(page: string, text: string): Promise<void> {
  const before = await readFile(page, 'utf8');
  if (!before.includes(marker)) throw new Error(`${page} has no line ${marker}`);
  await writeFile(page, `${before.trimEnd()}\n${text}\n`);
}

async function main(options: Options): Promise<number> {
  const say = (text: string): void => {
    process.stdout.write(`${text}\n`);
  };
  say(`kernel ${options.kernel}, ${options.minutes} minutes, seed ${options.seed}`);
  const guest = await StressGuest.boot(options.kernel, true);
  try {
    const version = await moduleVersion();
    const { counts, code } = await guest.run({
      seed: options.seed,
      seconds: options.minutes * 60,
      onLine: say,
    });
    if (counts !== undefined) {
      say(JSON.stringify(counts));
      const text = row(stockKernel(options.kernel).release, version, counts);
      if (options.record) await addRow(options.page, text);
      else say(text);
    }
    if (code === 0) await guest.end();
    else say(guest.guest.console());
    return code;
  } finally {
    await guest.close();
  }
}

const program = new Command('stress')
  .description('runs the stress test in a guest and adds its outcome to docs/stress.md')
  .addOption(new Option('--kernel <name>').choices([...kernelNames]).default('6.1'))
  .option('--minutes <count>', 'how long', number, 30)
  .option('--seed <number>', 'repeats the choices of another run', number, Date.now() % 1_000_000)
  .option('--page <file>', 'the page that gets the row', join(checkout, 'docs/stress.md'))
  .option('--no-record', 'prints the row of the table instead of adding it')
  .parse();

try {
  process.exitCode = await main(program.opts<Options>());
} catch (error) {
  process.stderr.write(`${error instanceof Error ? error.message : String(error)}\n`);
  process.exitCode = 2;
}
