// SPDX-License-Identifier: Apache-2.0
/** Metrics of a real server, scraped as Prometheus scrapes them, after real clients. */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { access, readFile, stat, writeFile } from 'node:fs/promises';
import { request } from 'node:http';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import test, { type ExecutionContext } from 'ava';
import { folder, pattern, soon } from '../nbd/world.ts';
import { commandsOf, Page } from '../pages.ts';
import { CLI } from '../program.ts';
import { checkout } from '../vm/checkout.ts';
import { run, tryRun } from './clients.ts';

const MIB = 1 << 20;

interface Serving {
  readonly uri: string;
  readonly where: string;
  end(): Promise<void>;
}

async function serve(t: ExecutionContext, home: string, metrics: string): Promise<Serving> {
  await writeFile(join(home, 'disk'), pattern(4 * MIB));
  const child = spawn(
    process.execPath,
    [
      ...[CLI, 'nbd', '--json', '-U', join(home, 'sock'), '--metrics', metrics],
      ...['--export', `sda "x"\n=${join(home, 'disk')}`],
    ],
    { stdio: ['ignore', 'pipe', 'inherit'] },
  );
  t.teardown(() => child.kill('SIGKILL'));
  const ended = once(child, 'close');
  const [line] = (await soon('the server', once(createInterface(child.stdout), 'line'))) as [
    string,
  ];
  const said = JSON.parse(line) as { metrics: string; exports: { uris: string[] }[] };
  return {
    uri: said.exports[0]?.uris[0] ?? '',
    where: said.metrics,
    end: async () => {
      child.kill('SIGTERM');
      t.deepEqual(await soon('its end', ended), [0, null]);
    },
  };
}

interface Answer {
  readonly status: number;
  readonly type: string;
  readonly text: string;
}

function ask(where: string, path = '/metrics', method = 'GET'): Promise<Answer> {
  const target = where.startsWith('http')
    ? { host: new URL(where).hostname.replaceAll(/[[\]]/g, ''), port: new URL(where).port }
    : { socketPath: where };
  return new Promise((resolve, reject) => {
    const outgoing = request({ ...target, path, method, agent: false }, (incoming) => {
      let text = '';
      incoming.on('data', (piece: Buffer) => {
        text += piece.toString();
      });
      incoming.on('end', () => {
        const type = incoming.headers['content-type'] ?? '';
        resolve({ status: incoming.statusCode ?? 0, type, text });
      });
    });
    outgoing.on('error', reject);
    outgoing.end();
  });
}

/** The samples of a scrape, by name with labels. Fails on what Prometheus could not parse. */
async function scrape(t: ExecutionContext, where: string): Promise<Map<string, number>> {
  const { status, type, text } = await ask(where);
  t.is(status, 200);
  t.regex(type, /^text\/plain; version=0\.0\.4/);
  const samples = new Map<string, number>();
  const typed = new Set<string>();
  for (const line of text.split('\n').filter((each) => each !== '')) {
    const kind = /^# TYPE (\w+) (counter|gauge|histogram)$/.exec(line);
    if (kind?.[1] !== undefined) {
      typed.add(kind[1]);
    } else if (!line.startsWith('# HELP ')) {
      const sample = /^([a-z_]+)(\{(?:[a-z]+="(?:[^"\\\n]|\\["\\n])*",?)*\})? (\S+)$/.exec(line);
      t.truthy(sample, line);
      const [, name = '', labels = '', value = ''] = sample ?? [];
      t.true(typed.has(name.replace(/_(bucket|sum|count)$/, '')) || typed.has(name), line);
      samples.set(`${name}${labels}`, Number(value));
    }
  }
  return samples;
}

const EXPORT = String.raw`export="sda \"x\"\n"`;

for (const [transport, metrics] of [
  ['TCP', '0'],
  ['IPv6', '[::1]:0'],
  ['a unix socket', undefined],
] as const) {
  test(`a scrape over ${transport} counts what clients did`, async (t) => {
    const home = await folder(t);
    const { uri, where, end } = await serve(t, home, metrics ?? join(home, 'metrics.sock'));
    const before = await scrape(t, where);
    t.is(before.get(`stillblock_nbd_read_bytes_total{${EXPORT}}`), 0);
    t.is(before.get('stillblock_nbd_connections_total'), 0);

    await run('nbdcopy', ['--no-extents', '--connections=2', '--request-size=65536', uri, 'null:']);
    await tryRun('/usr/bin/python3', [
      '-c',
      `import nbd, sys
h = nbd.NBD()
h.set_strict_mode(0)
h.add_meta_context("base:allocation")
h.connect_uri(sys.argv[1])
h.block_status(4096, 0, lambda *a: 0)
for call in (lambda: h.pread(512, 4 << 20), lambda: h.trim(512, 0), lambda: h.cache(1, 0)):
    try:
        call()
    except nbd.Error:
        pass
h.shutdown()`,
      uri,
    ]);
    // The server may hear of the client's end a moment after us.
    let after = await scrape(t, where);
    for (let turn = 0; after.get('stillblock_nbd_connections') !== 0 && turn < 100; turn += 1) {
      after = await scrape(t, where);
    }
    const of = (name: string, labels = ''): number | undefined =>
      after.get(`stillblock_nbd_${name}{${EXPORT}${labels}}`);
    t.is(of('read_bytes_total'), 4 * MIB);
    t.is(of('request_duration_seconds_count', ',command="read"'), 65);
    t.is(of('request_errors_total', ',command="read"'), 1);
    t.is(of('request_duration_seconds_count', ',command="block_status"'), 1);
    t.is(of('request_errors_total', ',command="block_status"'), 0);
    t.is(of('request_errors_total', ',command="other"'), 2);
    const total = after.get('stillblock_nbd_connections_total');
    t.true(total !== undefined && total >= 3, `${total} connections`);
    t.is(after.get('stillblock_nbd_connections'), 0);
    t.is(after.get('stillblock_nbd_in_flight_bytes'), 0);

    // A histogram: rising bounds, rising counts, the last of which are all.
    const buckets = [...after].filter(([name]) =>
      name.startsWith(`stillblock_nbd_request_duration_seconds_bucket`),
    );
    const reads = buckets.filter(([name]) => name.includes('command="read"'));
    const counts = reads.map(([, count]) => count);
    t.deepEqual(
      counts,
      counts.toSorted((a, b) => a - b),
    );
    t.true(reads.at(-1)?.[0].includes('le="+Inf"'));
    t.is(counts.at(-1), 65);
    const sum = of('request_duration_seconds_sum', ',command="read"') ?? 0;
    t.true(sum > 0 && sum < 60, `${sum} s`);
    await end();
  });
}

test('the scrape of docs/numbers.md, and each metric that it speaks of', async (t) => {
  const page = await Page.open('docs/numbers.md', import.meta.url);
  const [command = ''] = page.takeAll().flatMap(commandsOf);
  const { where, end } = await serve(t, await folder(t), '0');
  const here = command.replace('http://127.0.0.1:9809/metrics', where);
  t.not(here, command);
  t.regex(await run('sh', ['-c', here]), /^stillblock_nbd_connections 0$/m);
  await end();
  const [document, source] = await Promise.all(
    ['docs/numbers.md', 'src/prometheus.ts'].map((path) => readFile(join(checkout, path), 'utf8')),
  );
  const named = [...(document ?? '').matchAll(/stillblock_\w+/g)].map(([name]) => name);
  t.true(named.length > 10);
  t.deepEqual(
    named.filter((name) => !source?.includes(`'${name}'`)),
    [],
  );
});

test('nothing but GET /metrics is answered, and the socket is private and goes', async (t) => {
  const home = await folder(t);
  const path = join(home, 'metrics.sock');
  const { where, end } = await serve(t, home, path);
  t.is((await ask(where, '/')).status, 404);
  t.is((await ask(where, '/metrics', 'POST')).status, 405);
  t.is((await ask(where, '/metrics', 'HEAD')).text, '');
  t.is((await stat(path)).mode & 0o777, 0o600);
  await end();
  await t.throwsAsync(access(path), { code: 'ENOENT' });
});

for (const [what, address, expected] of [
  ['no port', 'x:y', /--metrics "x:y" is no address/],
  ['a port out of range', '65536', /is no address/],
  ['a folder that is not there', '/none/there.sock', /choose another address with --metrics/],
  ['an address of somebody else', '192.0.2.1:0', /192\.0\.2\.1.*--metrics/],
] as const) {
  test(`${what} is refused with one line`, async (t) => {
    const home = await folder(t);
    await writeFile(join(home, 'disk'), pattern(4096));
    const args = ['nbd', '-U', join(home, 'sock'), '--export', `a=${join(home, 'disk')}`];
    const all = [CLI, ...args, '--metrics', address];
    const { code, stderr } = await tryRun(process.execPath, all);
    t.not(code, 0);
    t.regex(stderr, expected);
    t.is(stderr.trimEnd().split('\n').length, 1, stderr);
    await t.throwsAsync(access(join(home, 'sock')), { code: 'ENOENT' });
  });
}
