// SPDX-License-Identifier: Apache-2.0
/** TLS with other people's clients, from files as `stillblock nbd` reads them. */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { copyFile, mkdir, readFile, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import test, { type ExecutionContext } from 'ava';
import {
  Authority,
  clientTemplate,
  conventionalFolder,
  EXPIRED,
  SERVER,
} from '../nbd/certificates.ts';
import { folder, pattern, soon } from '../nbd/world.ts';
import { CLI } from '../program.ts';
import { type Finished, type Release, run, testReleases, tryRun } from './clients.ts';
import { Serving } from './command.ts';

const MIB = 1 << 20;
const SIZE = 8 * MIB;

interface Files {
  readonly home: string;
  readonly disk: string;
  readonly authority: Authority;
  /** The server's folder. */
  readonly server: string;
  /** A client's folder, and what its name is. */
  client(name: string, ...more: string[]): Promise<string>;
}

async function files(t: ExecutionContext): Promise<Files> {
  const home = await folder(t);
  const disk = join(home, 'disk');
  await writeFile(disk, pattern(SIZE));
  const authority = await Authority.make(join(home, 'ca'));
  const server = join(home, 'server');
  await conventionalFolder(server, authority, { server: await authority.issue(SERVER) });
  return {
    home,
    disk,
    authority,
    server,
    client: async (name, ...more) =>
      conventionalFolder(join(home, name), authority, {
        client: await authority.issue(clientTemplate(name, ...more)),
      }),
  };
}

/** One pull of a whole disk by each client that can do so. */
const PULLS: readonly {
  readonly title: string;
  pull(client: Release, uri: string, into: string, security: ClientSecurity): Promise<unknown>;
}[] = [
  {
    title: 'nbdcopy',
    pull: (client, uri, into, { query }) => client.run('nbdcopy', [`${uri}${query}`, into]),
  },
  {
    title: 'nbdcopy, 4 connections',
    pull: (client, uri, into, { query }) =>
      client.run('nbdcopy', ['--connections=4', `${uri}${query}`, into]),
  },
  {
    title: 'libnbd from Python',
    pull: (client, uri, into, { query }) =>
      client.python(
        `
h = nbd.NBD()
h.set_uri_allow_local_file(True)
h.connect_uri(sys.argv[1])
assert h.get_tls_negotiated()
with open(sys.argv[2], "wb") as out:
    for at in range(0, h.get_size(), 1 << 20):
        out.write(h.pread(1 << 20, at))
h.shutdown()
`,
        `${uri}${query}`,
        into,
      ),
  },
  {
    title: 'qemu-img',
    pull: (client, uri, into, { object }) =>
      client.run('qemu-img', [
        ...['convert', '--object', object, '-O', 'raw', '--image-opts', imageOptions(uri), into],
      ]),
  },
  {
    title: 'qemu-io',
    pull: async (client, uri, into, { object }) => {
      const output = await client.run('qemu-io', [
        ...['--object', object, '-r', '--image-opts', imageOptions(uri)],
        ...['-c', `read 0 ${SIZE}`],
      ]);
      if (!output.includes(`read ${SIZE}/${SIZE} bytes at offset 0`)) {
        throw new Error(output);
      }
      // It shows no data: what it read is compared by its neighbour.
      await client.run('qemu-img', [
        ...['convert', '--object', object, '-O', 'raw', '--image-opts', imageOptions(uri), into],
      ]);
    },
  },
];

/** How a client proves itself and believes the server. */
interface ClientSecurity {
  /** libnbd's end of a URI. */
  readonly query: string;
  /** QEMU's --object. */
  readonly object: string;
}

function imageOptions(uri: string): string {
  const { port, pathname } = new URL(uri);
  return `driver=nbd,host=localhost,port=${port},export=${pathname.slice(1)},tls-creds=tls`;
}

function byCertificate(dir: string): ClientSecurity {
  return {
    query: `?tls-certificates=${dir}`,
    object: `tls-creds-x509,id=tls,endpoint=client,dir=${dir}`,
  };
}

/** Writes a file of keys by psktool, in a folder as QEMU wants it. */
async function keysOf(home: string, ...users: string[]): Promise<string> {
  await mkdir(home, { recursive: true });
  const path = join(home, 'keys.psk');
  for (const user of users) {
    await run('psktool', ['-u', user, '-p', path]);
  }
  return path;
}

for (const { title, pull } of PULLS) {
  testReleases(`${title} pulls a disk, proving itself by a certificate`, async (t, client) => {
    const { home, disk, server, client: make } = await files(t);
    const serving = await Serving.start(
      t,
      ...['-p', '0', '--tls-certificates', server, '--tls-verify-peer'],
      ...['--export', `sda=${disk}`],
    );
    const [uri = ''] = serving.uris('sda');
    t.regex(uri, /^nbds:\/\/127\.0\.0\.1:\d+\/sda$/);
    const into = join(home, 'pulled');
    await pull(
      client,
      uri.replace('127.0.0.1', 'localhost'),
      into,
      byCertificate(await make('proxy')),
    );
    t.true((await readFile(into)).equals(pattern(SIZE)));
    t.is(await serving.end(), 0);
  });

  testReleases(`${title} pulls a disk, proving itself by a pre-shared key`, async (t, client) => {
    const { home, disk } = await files(t);
    const keys = await keysOf(join(home, 'psk'), 'bob', 'alice');
    const serving = await Serving.start(
      t,
      ...['-p', '0', '--tls-psk', keys, '--export', `sda=${disk}`],
    );
    const [uri = ''] = serving.uris('sda');
    const into = join(home, 'pulled');
    await pull(client, uri.replace('//127.0.0.1', '//alice@localhost'), into, {
      query: `?tls-psk-file=${keys}`,
      object: `tls-creds-psk,id=tls,endpoint=client,username=alice,dir=${join(home, 'psk')}`,
    });
    t.true((await readFile(into)).equals(pattern(SIZE)));
    t.is(await serving.end(), 0);
  });
}

testReleases('nbdinfo says that TLS is on, over a unix socket, too', async (t, client) => {
  const { home, disk, server, client: make } = await files(t);
  const dir = await make('proxy');
  const serving = await Serving.start(
    t,
    ...['-p', '0', '-U', join(home, 'sock'), '--tls-certificates', server],
    ...['--export', `sda=${disk}`],
  );
  const [unix = '', tcp = ''] = serving.uris('sda');
  t.is(unix, `nbds+unix:///sda?socket=${join(home, 'sock')}`);
  for (const uri of [
    `${unix}&tls-certificates=${dir}`,
    `${tcp.replace('127.0.0.1', 'localhost')}?tls-certificates=${dir}`,
    `${tcp}?tls-certificates=${dir}`,
  ]) {
    const info = JSON.parse(await client.run('nbdinfo', ['--json', uri])) as { TLS: boolean };
    t.true(info.TLS, uri);
    const list = JSON.parse(await client.run('nbdinfo', ['--list', '--json', uri])) as {
      exports: { 'export-name': string }[];
    };
    t.deepEqual(
      list.exports.map((each) => each['export-name']),
      ['sda'],
    );
  }
  const plain = await client.tryRun('nbdinfo', [tcp.replace('nbds:', 'nbd:')]);
  t.true(plain.code !== 0 || !plain.stdout.includes('export-size'), plain.stdout);
});

testReleases('qemu-storage-daemon reads on top of TLS', async (t, client) => {
  const { disk, server, client: make } = await files(t);
  const dir = await make('proxy');
  const serving = await Serving.start(
    t,
    ...['-p', '0', '--tls-certificates', server, '--tls-verify-peer'],
    ...['--export', `sda=${disk}`],
  );
  const port = new URL(serving.uris('sda')[0] ?? '').port;
  const child = spawn(
    client.tool('qemu-storage-daemon'),
    [
      ...['--chardev', 'stdio,id=qmp', '--monitor', 'chardev=qmp'],
      ...['--object', `tls-creds-x509,id=tls,endpoint=client,dir=${dir}`],
      '--blockdev',
      `driver=nbd,node-name=source,read-only=on,export=sda,tls-creds=tls,` +
        `server.type=inet,server.host=localhost,server.port=${port}`,
    ],
    { stdio: ['pipe', 'pipe', 'inherit'] },
  );
  const exit = once(child, 'close');
  t.teardown(async () => {
    child.kill('SIGKILL');
    await exit;
  });
  const lines = createInterface({ input: child.stdout })[Symbol.asyncIterator]();
  await soon('its greeting', lines.next());
  const answers: string[] = [];
  for (const execute of ['qmp_capabilities', 'query-named-block-nodes']) {
    child.stdin.write(`${JSON.stringify({ execute })}\n`);
    answers.push(String((await soon(execute, lines.next())).value));
  }
  t.true(answers[1]?.includes(`"virtual-size": ${SIZE}`), answers[1]);
});

test('nbd-client within TLS lists what there is', async (t) => {
  const { disk, server, client: make } = await files(t);
  const dir = await make('proxy');
  const serving = await Serving.start(
    t,
    ...['-p', '0', '--tls-certificates', server, '--tls-verify-peer'],
    ...['--export', `sda=${disk}`],
  );
  const port = new URL(serving.uris('sda')[0] ?? '').port;
  const output = await run('nbd-client', [
    ...['-l', 'localhost', port, '-enable-tls', '-tlshostname', 'localhost'],
    ...['-cacertfile', join(dir, 'ca-cert.pem')],
    ...['-certfile', join(dir, 'client-cert.pem'), '-keyfile', join(dir, 'client-key.pem')],
  ]);
  t.regex(output, /sda/);
});

// ---- what goes wrong, and what the log says of it

test('certificates that are wrong: clear words in the log', async (t) => {
  const { home, disk, server, client: make } = await files(t);
  const serving = await Serving.start(
    t,
    ...['-p', '0', '--tls-certificates', server, '--tls-verify-peer'],
    ...['--export', `sda=${disk}`],
  );
  const uri = (serving.uris('sda')[0] ?? '').replace('127.0.0.1', 'localhost');
  const ask = async (dir: string): Promise<Finished> =>
    tryRun('nbdinfo', [`${uri}?tls-certificates=${dir}`]);

  t.not((await ask(await make('late', ...EXPIRED))).code, 0);
  t.regex(await serving.complains(/late/), /not good: it has expired \(CN=late,O=Example\)/);

  const strangers = await Authority.make(join(home, 'strangers'), 'strangers');
  const stranger = await strangers.issue(clientTemplate('stranger'));
  const foreign = join(home, 'foreign');
  await conventionalFolder(foreign, strangers, { client: stranger });
  await copyFile(join(server, 'ca-cert.pem'), join(foreign, 'ca-cert.pem'));
  t.not((await ask(foreign)).code, 0);
  // GnuTLS shows none that is not of an authority that we name; test/nbd/tls shows one.
  await serving.complains(/client has no certificate of an authority of ours/);

  const bare = join(home, 'bare');
  await mkdir(bare);
  await copyFile(join(server, 'ca-cert.pem'), join(bare, 'ca-cert.pem'));
  t.not((await ask(bare)).code, 0);
  await serving.complains(/client has no certificate of an authority of ours/);

  // It trusts another authority than the server's.
  const distrusting = await make('distrusting');
  await copyFile(join(home, 'strangers', 'ca-cert.pem'), join(distrusting, 'ca-cert.pem'));
  t.not((await ask(distrusting)).code, 0);
  await serving.complains(/TLS: .*(trust|unknown ca|bad certificate|certificate unknown)/);

  t.is((await ask(await make('good'))).code, 0);
});

test('a certificate for another name: a warning at the start, and the client refuses', async (t) => {
  const { home, disk, authority, client: make } = await files(t);
  const server = join(home, 'elsewhere');
  await conventionalFolder(server, authority, {
    server: await authority.issue(['cn = "elsewhere"', 'dns_name = "elsewhere"', 'tls_www_server']),
  });
  const serving = await Serving.start(
    t,
    ...['-p', '0', '--tls-certificates', server, '--export', `sda=${disk}`],
  );
  t.regex(await serving.complains(/names no address/), /"DNS:elsewhere"/);
  const uri = (serving.uris('sda')[0] ?? '').replace('127.0.0.1', 'localhost');
  const asked = await tryRun('nbdinfo', [`${uri}?tls-certificates=${await make('proxy')}`]);
  t.not(asked.code, 0);
  await serving.complains(/TLS: /);
});

test('what is no TLS 1.2 or 1.3 is refused, with words in the log', async (t) => {
  const { disk, server, client: make } = await files(t);
  const dir = await make('proxy');
  const serving = await Serving.start(
    t,
    ...['-p', '0', '--tls-certificates', server, '--export', `sda=${disk}`],
  );
  const port = new URL(serving.uris('sda')[0] ?? '').port;
  const ask = (priority: string): Promise<Finished> =>
    tryRun('qemu-img', [
      ...['info', '--image-opts', '--object'],
      `tls-creds-x509,id=tls,endpoint=client,dir=${dir},priority=${priority}`,
      `driver=nbd,host=localhost,port=${port},export=sda,tls-creds=tls`,
    ]);
  t.not((await ask('LEGACY:-VERS-ALL:+VERS-TLS1.1:+VERS-TLS1.0')).code, 0);
  await serving.complains(/TLS: unsupported protocol/);
  t.is((await ask('NORMAL:-VERS-ALL:+VERS-TLS1.2')).code, 0);
  t.is((await ask('NORMAL:-VERS-ALL:+VERS-TLS1.3')).code, 0);
});

// ---- who may see what

test('rules by subject, alternative name, user and for everybody', async (t) => {
  const { home, disk, server, client: make } = await files(t);
  const keys = await keysOf(join(home, 'psk'), 'alice');
  const rules = join(home, 'rules');
  await writeFile(
    rules,
    [
      '# who          what',
      'cn:admin       *',
      'dns:*.backup.example  sda "with space"',
      'subject:CN=*,O=Example  by-subject',
      'ip:192.0.2.0/24 by-address',
      'psk:alice      sdb',
      'tls            behind-tls',
      'anyone         public',
    ].join('\n'),
  );
  const names = ['sda', 'sdb', 'with space', 'by-subject', 'by-address', 'behind-tls', 'public'];
  const serving = await Serving.start(
    t,
    ...['-p', '0', '--tls', 'on', '--tls-certificates', server, '--tls-psk', keys],
    ...['--tls-access', rules, ...names.flatMap((name) => ['--export', `${name}=${disk}`])],
  );
  const [secure = '', plain = ''] = serving.uris('public');
  t.regex(plain, /^nbd:/);
  const base = secure.replace('127.0.0.1', 'localhost').replace(/public$/, '');
  const list = async (uri: string): Promise<string[]> => {
    const said = JSON.parse(await run('nbdinfo', ['--list', '--json', uri])) as {
      exports: { 'export-name': string }[];
    };
    return said.exports.map((each) => each['export-name']);
  };
  const seenBy = async (dir: string): Promise<string[]> => list(`${base}?tls-certificates=${dir}`);
  t.deepEqual(await seenBy(await make('admin')), names);
  t.deepEqual(await seenBy(await make('p', 'dns_name = "p1.backup.example"')), [
    ...['sda', 'with space', 'by-subject', 'behind-tls', 'public'],
  ]);
  t.deepEqual(await seenBy(await make('q', 'dns_name = "x.p1.backup.example"')), [
    ...['by-subject', 'behind-tls', 'public'],
  ]);
  t.deepEqual(await seenBy(await make('r', 'ip_address = "192.0.2.77"')), [
    ...['by-subject', 'by-address', 'behind-tls', 'public'],
  ]);
  const psk = base.replace('//', '//alice@');
  t.deepEqual(await list(`${psk}?tls-psk-file=${keys}`), ['sdb', 'behind-tls', 'public']);
  t.deepEqual(await list(plain.replace(/public$/, '')), ['public']);
  const hidden = await tryRun('nbdinfo', [`${base}sdb?tls-certificates=${join(home, 'p')}`]);
  const absent = await tryRun('nbdinfo', [`${base}nosuch?tls-certificates=${join(home, 'p')}`]);
  t.not(hidden.code, 0);
  t.is(hidden.stderr.replaceAll('sdb', 'nosuch'), absent.stderr);
});

// ---- reload

test('SIGHUP reads everything anew; what is broken leaves all as it was, and says so', async (t) => {
  const { home, disk, authority, server, client: make } = await files(t);
  const rules = join(home, 'rules');
  await writeFile(rules, 'cn:proxy sda\n');
  const serving = await Serving.start(
    t,
    ...['-p', '0', '--tls-certificates', server, '--tls-access', rules],
    ...['--export', `sda=${disk}`, '--export', `sdb=${disk}`],
  );
  const dir = await make('proxy');
  const base = (serving.uris('sda')[0] ?? '').replace('127.0.0.1', 'localhost').replace(/sda$/, '');
  const works = async (name: string, folder = dir): Promise<boolean> =>
    (await tryRun('nbdinfo', [`${base}${name}?tls-certificates=${folder}`])).code === 0;
  // A client that is there before, and stays there through all of it.
  const held = spawn(
    '/usr/bin/python3',
    [
      '-c',
      `
import nbd, sys
h = nbd.NBD()
h.set_uri_allow_local_file(True)
h.connect_uri(sys.argv[1])
for line in sys.stdin:
    print(len(h.pread(1 << 20, 0)), flush=True)
`,
      `${base}sda?tls-certificates=${dir}`,
    ],
    { stdio: ['pipe', 'pipe', 'inherit'] },
  );
  t.teardown(() => held.kill('SIGKILL'));
  const answers = createInterface({ input: held.stdout })[Symbol.asyncIterator]();
  const stillServed = async (): Promise<void> => {
    held.stdin.write('\n');
    t.is((await soon('the held client', answers.next())).value, String(MIB));
  };
  await stillServed();
  t.true(await works('sda'));
  t.false(await works('sdb'));

  await writeFile(rules, 'cn:proxy sdb\n');
  serving.process.kill('SIGHUP');
  await serving.says('tls-reloaded');
  t.true(await works('sdb'));
  t.false(await works('sda'));
  await stillServed();

  await writeFile(rules, 'cn:proxy\n');
  serving.process.kill('SIGHUP');
  t.regex((await serving.says('tls-reload-failed')).message ?? '', /rules: line 1: it names no/);
  await serving.complains(/those read before stay in use/);
  t.true(await works('sdb'));
  await writeFile(rules, 'cn:* *\n');

  const key = join(server, 'server-key.pem');
  const before = await readFile(key);
  await writeFile(key, before.subarray(0, 100));
  serving.process.kill('SIGHUP');
  await serving.says('tls-reload-failed');
  t.true(await works('sdb'));
  t.false(await works('sda'));

  // A new authority, and a server's certificate of it.
  const next = await Authority.make(join(home, 'next'), 'next');
  await conventionalFolder(server, next, { server: await next.issue(SERVER) });
  serving.process.kill('SIGHUP');
  await serving.says('tls-reloaded');
  t.false(await works('sda'));
  const after = join(home, 'after');
  await conventionalFolder(after, next, { client: await next.issue(clientTemplate('proxy')) });
  t.true(await works('sda', after));
  await stillServed();
  t.is(authority.home, join(home, 'ca'));
  t.is(await serving.end(), 0);
});

// ---- usage

const MISTAKES: readonly (readonly [string, readonly string[], RegExp])[] = [
  [
    'other machines without TLS',
    ['-i', '0.0.0.0', '-p', '0'],
    /can be reached .* no TLS.*--insecure/,
  ],
  ['other machines with TLS off', ['-i', '::', '-p', '0', '--tls', 'off'], /no TLS.*--insecure/],
  ['an unknown mode', ['--tls', 'maybe'], /--tls "maybe" is no mode/],
  ['TLS without anything', ['--tls', 'require'], /needs a certificate or keys/],
  ['no authority', ['--tls-verify-peer'], /add --tls-certificates/],
  ['rules without TLS', ['--tls-access', 'x'], /without TLS nobody knows/],
  [
    'no such folder',
    ['--tls-certificates', '/nonexistent'],
    /server-cert.pem: there is no such file/,
  ],
  ['no such keys', ['--tls-psk', '/nonexistent'], /nonexistent: there is no such file/],
  [
    'both required and insecure',
    ['--tls-psk', '/x', '--insecure'],
    /--insecure contradicts TLS that is required/,
  ],
];

for (const [title, args, says] of MISTAKES) {
  test(`refused: ${title}`, async (t) => {
    const { code, stderr } = await tryRun(process.execPath, [
      ...[CLI, 'nbd', '--export', 'a=/etc/hostname', ...args],
    ]);
    t.true(code === 2 || code === 1, String(code));
    t.regex(stderr, says);
    t.is(stderr.trim().split('\n').length, 1, stderr);
  });
}

test('--insecure serves other machines in plain text, and warns', async (t) => {
  const { disk } = await files(t);
  const serving = await Serving.start(
    t,
    ...['-i', '0.0.0.0', '-p', '0', '--insecure', '--export', `sda=${disk}`],
  );
  await serving.complains(/other machines are served in plain text/);
  t.regex(serving.uris('sda')[0] ?? '', /^nbd:/);
  const port = new URL(serving.uris('sda')[0] ?? '').port;
  t.is((await run('nbdinfo', ['--size', `nbd://127.0.0.1:${port}/sda`])).trim(), String(SIZE));
});

test('keys that are too short, twice there, or none: refused without a word of the secret', async (t) => {
  const { home, disk } = await files(t);
  const path = join(home, 'keys');
  const good = 'a'.repeat(64);
  for (const [text, says] of [
    ['alice:abcdef\n', /line 1: the key is not of 16 to 256 bytes/],
    [`alice:${good}\nalice:${good}\n`, /line 2: the user is there twice/],
    [`alice:${good}\nbob ${good}\n`, /line 2 is not a user and a key/],
    ['\n', /there is no key in it/],
  ] as const) {
    await writeFile(path, text);
    const { code, stderr } = await tryRun(process.execPath, [
      ...[CLI, 'nbd', '-p', '0', '--export', `a=${disk}`, '--tls-psk', path],
    ]);
    t.is(code, 1);
    t.regex(stderr, says);
    t.false(stderr.includes('aaaa') || stderr.includes('abcdef'));
  }
});

test('a certificate that has expired is refused at the start', async (t) => {
  const { home, disk, authority } = await files(t);
  const server = join(home, 'old');
  await conventionalFolder(server, authority, {
    server: await authority.issue([...SERVER, ...EXPIRED]),
  });
  const { code, stderr } = await tryRun(process.execPath, [
    ...[CLI, 'nbd', '-p', '0', '--export', `a=${disk}`, '--tls-certificates', server],
  ]);
  t.is(code, 1);
  t.regex(stderr, /the certificate has expired on Dec 31/);
});
