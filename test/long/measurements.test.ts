// SPDX-License-Identifier: Apache-2.0
// The pages' commands that measure, with little to measure. What is measured beside other work
// means nothing and is not looked at; that all of it was measured is.

import { cp, readFile } from 'node:fs/promises';
import { join } from 'node:path';
import test from 'ava';
import type { Report } from '../bench/nbd/report.ts';
import { allServers } from '../bench/nbd/servers.ts';
import { folder } from '../nbd/world.ts';
import { bareCommandsOf, Page, type } from '../pages.ts';
import { checkout, type KernelName, stockKernel } from '../vm/checkout.ts';

const little = '--repetitions 1 --seconds 0.2 --mebibytes 64';
const written = ['benchmarks.md', 'benchmarks-nbd.json', 'benchmarks-nbd.svg'];

/** The cells of each row of Markdown's tables whose first cell begins with a text. */
function rowsOf(text: string, beginning: string): string[][] {
  return text
    .split('\n')
    .filter((line) => line.startsWith(`| ${beginning}`))
    .map((line) => line.split('|').slice(1, -1))
    .map((cells) => cells.map((cell) => cell.trim()));
}

function readAll(home: string): Promise<string[]> {
  return Promise.all(written.map((name) => readFile(join(home, name), 'utf8')));
}

test.serial('docs/benchmarks.md: NBD servers', async (t) => {
  t.timeout(30 * 60_000);
  const page = await Page.open('docs/benchmarks.md', import.meta.url);
  const [print = '', write = ''] = bareCommandsOf(page.take('bench:nbd'));
  const printed = await type(`${print} -- ${little}`);
  t.is(printed.code, 0, printed.stderr);
  const servers = await allServers();
  for (const { label, ours } of servers) {
    const rows = rowsOf(printed.stdout, `${label} |`);
    t.is(rows.length, 6, `${label}: ${printed.stdout}`);
    // Peers cannot do all of it.
    for (const cell of rows.flat().filter((each) => ours || each !== '–')) {
      t.notRegex(cell, /^–|NaN|Infinity/, `${label}: ${printed.stdout}`);
    }
  }
  t.is(rowsOf(printed.stdout, 'first answer about 16 TiB, ms |').length, 1);

  const docs = join(checkout, 'docs');
  const home = await folder(t);
  for (const name of written) {
    await cp(join(docs, name), join(home, name));
  }
  const before = await readAll(docs);
  const into = await type(`${write} --docs-folder ${home} ${little} --only idle`);
  t.is(into.code, 0, into.stderr);
  const [text = '', json = '', picture = ''] = await readAll(home);
  const { values } = JSON.parse(json) as Report;
  const counts = Object.entries(values['idle'] ?? {}).map(([id, all]) => [id, all.length]);
  t.deepEqual(
    counts,
    servers.map(({ id }) => [id, 1]),
  );
  // Those that were not measured are as they were.
  const old = (JSON.parse(before[1] ?? '') as Report).values;
  t.deepEqual({ ...values, idle: {} }, { ...old, idle: {} });
  t.true(text.includes('\nMedians of 1. '));
  t.true(picture.startsWith('<svg ') && picture.endsWith('</svg>\n'));
  t.deepEqual(await readAll(docs), before);
});

test.serial('docs/fuzzing.md: a crowd', async (t) => {
  t.timeout(5 * 60_000);
  const page = await Page.open('docs/fuzzing.md', import.meta.url);
  const [command = ''] = bareCommandsOf(page.take('crowd-run'));
  t.deepEqual(page.left, []);
  const { code, stdout, stderr } = await type(`${command} --rounds 1`);
  t.is(code, 0, stderr);
  const said =
    /^(unix|tcp): the slowest of 20 clients takes [\d.]+ ms alone, [\d.]+ ms among 250 others$/;
  t.deepEqual(
    stdout
      .trimEnd()
      .split('\n')
      .map((line) => said.exec(line)?.[1]),
    ['unix', 'tcp'],
    stdout,
  );
});

test.serial('docs/benchmarks.md: the kernel module', async (t) => {
  t.timeout(60 * 60_000);
  const page = await Page.open('docs/benchmarks.md', import.meta.url);
  const [command = ''] = bareCommandsOf(page.take('bench:module'));
  const { code, stdout, stderr } = await type(`${command} --rounds 1`);
  t.is(code, 0, stderr);
  const kernels = [...command.matchAll(/--kernel (\S+)/g)].map(([, name]) => name as KernelName);
  t.is(kernels.length, 4);
  const releases = kernels.map((kernel) => stockKernel(kernel).release);
  t.deepEqual(rowsOf(stdout, 'instructions per 4 KiB write'), [
    ['instructions per 4 KiB write', ...releases],
  ]);
  const [none = []] = rowsOf(stdout, 'no hook');
  t.is(none.length, 1 + kernels.length);
  for (const cell of none.slice(1)) {
    t.regex(cell, /^\d{4,}$/, stdout);
  }
  for (const name of [
    'another device tracked',
    'tracked',
    'snapshot held, old',
    'snapshot held, first',
  ]) {
    const [cells = []] = rowsOf(stdout, name);
    t.is(cells.length, 1 + kernels.length, `${name}: ${stdout}`);
    for (const cell of cells.slice(1)) {
      t.regex(cell, /^\d{4,} \([+-]\d+, -?[\d.]+ %\)$/, stdout);
    }
  }
  for (const release of releases) {
    t.is(rowsOf(stdout, `4 KiB direct writes, ${release} |`).length, 1, stdout);
  }
  for (const name of ['Stillblock', 'dm-snapshot, 4 KiB chunks', 'dm-snapshot, 16 KiB chunks']) {
    const rows = rowsOf(stdout, `${name} |`);
    t.is(rows.length, kernels.length, stdout);
    for (const cells of rows) {
      t.is(cells.length, 7, stdout);
      for (const cell of cells.slice(1)) {
        t.regex(cell, /^[\d.]+$/, stdout);
      }
    }
  }
});
