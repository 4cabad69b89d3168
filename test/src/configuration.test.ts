// SPDX-License-Identifier: Apache-2.0
/** The configuration: the example, its schema, and every mistake at its place. */
import { execFile } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { mkdir, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import test, { type ExecutionContext } from 'ava';
import fc from 'fast-check';
import {
  type Configuration,
  defaultConfiguration,
  isLoopback,
  parseConfiguration,
  readConfiguration,
} from '../../src/configuration.ts';
import { XmlError } from '../../src/xml.ts';
import { folder } from './world.ts';

const configs = fileURLToPath(new URL('../../../configs/', import.meta.url));
const EXAMPLE = readFileSync(join(configs, 'stillblock.xml'), 'utf8');
const STANDARD = { run: '/run/stillblock', state: '/var/lib/stillblock' };

const parse = (xml: string): Configuration => parseConfiguration(xml, 'x.xml', STANDARD);
/** A configuration with one thing in it. */
const one = (content: string): string => `<stillblock>\n${content}\n</stillblock>`;

/** What xmllint says against each document by our schema; empty for those that are valid. */
async function violations(t: ExecutionContext, texts: readonly string[]): Promise<string[]> {
  const dir = join(await folder(t), 'xml');
  await mkdir(dir);
  const files = texts.map((_, index) => join(dir, `${index}.xml`));
  await Promise.all(texts.map((text, index) => writeFile(files[index] ?? '', text)));
  const args = ['--noout', '--nonet', '--relaxng', join(configs, 'stillblock.rng'), ...files];
  const stderr = await new Promise<string>((resolve, reject) => {
    execFile('xmllint', args, (error, _stdout, text) => {
      if (error !== null && typeof error.code !== 'number') {
        reject(error);
      }
      resolve(text);
    });
  });
  t.false(stderr.includes('schemas parser error'), stderr);
  return files.map((file) => {
    const said = stderr.split('\n').filter((line) => line.includes(`${file}`));
    t.true(said.length > 0, `xmllint did not look at ${file}: ${stderr}`);
    return said.some((line) => line === `${file} validates`) ? '' : said.join('\n');
  });
}

test('the example is valid, and shows the defaults', async (t) => {
  t.deepEqual(await violations(t, [EXAMPLE, '<stillblock/>']), ['', '']);
  t.deepEqual(parse(EXAMPLE), defaultConfiguration(STANDARD));
});

const FULL = EXAMPLE.replaceAll(/<!-- (<[a-z].*\/>) -->/g, '$1').replace(
  '<tls mode="off">',
  '<tls certificates="/etc/pki/stillblock" verify-peer="yes">',
);

test('the example with all that is commented out', async (t) => {
  t.deepEqual(await violations(t, [FULL]), ['']);
  t.deepEqual(parse(FULL), {
    folders: STANDARD,
    logLevel: 'info',
    devices: [{ path: '/dev/disk/by-id/ata-EXAMPLE', name: 'sda', blockSizeBytes: 65_536 }],
    history: { keep: true, place: undefined, sizeBytes: undefined },
    store: {
      places: ['/mnt/spare', '/dev/vg/scratch'],
      sizeBytes: undefined,
      maxBytes: undefined,
      memoryShare: 0.25,
    },
    nbd: {
      listen: [{ host: '127.0.0.1', port: 10_809 }, { path: '/run/stillblock/nbd.sock' }],
      tls: {
        mode: 'require',
        certificates: '/etc/pki/stillblock',
        psk: undefined,
        verifyPeer: true,
        insecure: false,
        rules: [{ kind: 'san', pattern: 'dns:backup1.example', export: 'sd*' }],
      },
      rates: { total: undefined, byName: new Map([['sda', 52_428_800]]) },
    },
    metrics: { host: '127.0.0.1', port: 9809 },
    api: {
      socket: '/run/stillblock/control.sock',
      listen: [{ host: '192.0.2.7', port: 10_810, certificates: '/etc/pki/stillblock' }],
    },
    hooks: [
      { name: 'postgresql', script: '/etc/stillblock/hooks.d/postgresql', timeoutMs: 30_000 },
    ],
    keepCheckpoints: 31,
    freezeTimeoutMs: 10_000,
  });
});

test('each setting of the schema is explained in the example', (t) => {
  const schema = readFileSync(join(configs, 'stillblock.rng'), 'utf8');
  const names = [...schema.matchAll(/<(element|attribute) name="([^"]+)"/g)];
  t.true(names.length > 40);
  for (const [, kind, name] of names) {
    const said =
      kind === 'element'
        ? new RegExp(`<${name}[ />]|^ +${name} `, 'm')
        : new RegExp(`\\b${name}\\b`);
    t.regex(EXAMPLE, said, `${kind} ${name}`);
  }
});

const devices = (count: number): string =>
  `<devices>${Array.from({ length: count }, (_, index) => `<device path="/${index}"/>`).join('')}</devices>`;

/** Good documents, and what is in them. */
const GOOD: readonly (readonly [xml: string, expected: (found: Configuration) => unknown])[] = [
  [one('<folders run="/r"/>'), (c) => c.folders.run === '/r' && c.api.socket === '/r/control.sock'],
  [one('<freeze timeout="60"/>\n<log level="debug"/>'), (c) => c.freezeTimeoutMs === 60_000],
  [
    one('<freeze/><checkpoints/><hooks/><api/><nbd/><store/><devices/>'),
    (c) => c.hooks.length === 0,
  ],
  [one("<store size='1.5G' max='2g'/>"), (c) => c.store.sizeBytes === 1.5 * 2 ** 30],
  [one('<history keep="no"/>'), (c) => !c.history.keep],
  [one('<history/>'), (c) => c.history.keep],
  [one(''), (c) => !c.history.keep],
  [one('<devices/>'), (c) => !c.history.keep],
  [one('<devices><device path="/a"/></devices>'), (c) => c.history.keep],
  [one('<devices><device path="/a"/></devices><history keep="no"/>'), (c) => !c.history.keep],
  [one('<history place="/h" size="1M"/>'), (c) => c.history.place === '/h'],
  [one(devices(64)), (c) => c.history.keep],
  [one(`${devices(65)}<history keep="no"/>`), (c) => c.devices.length === 65],
  [one('<store><memory share="0"/></store>'), (c) => c.store.memoryShare === 0],
  [
    one('<store><device path="/b"/><folder path="/a"/><device path="/c"/></store>'),
    (c) => c.store.places.join() === '/b,/a,/c',
  ],
  [one('<nbd><listen address="::1"/></nbd>'), (c) => c.nbd.listen.length === 1],
  [
    one('<nbd><tls insecure="yes"/><listen address="0.0.0.0" port="0"/></nbd>'),
    (c) => c.nbd.tls.insecure && c.nbd.tls.mode === 'off',
  ],
  [
    one('<nbd><tls psk="/k"><allow user="b&#x2a;"/></tls><listen address="::"/></nbd>'),
    (c) => c.nbd.tls.mode === 'require' && c.nbd.tls.rules[0]?.pattern === 'b*',
  ],
  [one('<metrics socket="/m"/>'), (c) => c.metrics !== undefined && 'path' in c.metrics],
  [one('<metrics port="1"/>'), (c) => c.metrics !== undefined && 'host' in c.metrics],
];

test('what may be said is understood, by the schema as well', async (t) => {
  for (const [xml, expected] of GOOD) {
    t.true(expected(parse(xml)), xml);
  }
  t.deepEqual(
    await violations(
      t,
      GOOD.map(([xml]) => xml),
    ),
    GOOD.map(() => ''),
  );
});

/** Mistakes that a schema sees as well. */
const BAD: readonly (readonly [content: string, line: number, column: number])[] = [
  ['<unknown/>', 2, 1],
  ['  text', 1, 1],
  ['<log level="info"/>\n <log/>', 3, 2],
  ['<log\n level="verbose"/>', 3, 2],
  ['<log level=" info"/>', 2, 6],
  ['<log levels="info"/>', 2, 6],
  ['<log>info</log>', 2, 1],
  ['<folders state="relative"/>', 2, 10],
  ['<folders run=""/>', 2, 10],
  ['<devices><device/></devices>', 2, 10],
  ['<devices><device path="sda"/></devices>', 2, 18],
  ['<devices><device path="/a" name="a@b"/></devices>', 2, 28],
  ['<devices><device path="/a" name=".a"/></devices>', 2, 28],
  ['<devices><device path="/a" blocksize="-4K"/></devices>', 2, 28],
  ['<devices>\n  <disk path="/a"/></devices>', 3, 3],
  ['<history keep="perhaps"/>', 2, 10],
  ['<history place="h"/>', 2, 10],
  ['<store size="many"/>', 2, 8],
  ['<store size=" 1G"/>', 2, 8],
  ['<store size="1 G"/>', 2, 8],
  ['<store><folder/></store>', 2, 8],
  ['<store><folder path="a"/></store>', 2, 16],
  ['<store><memory share="-1"/></store>', 2, 16],
  ['<store><memory share="25%"/></store>', 2, 16],
  ['<store><memory/><memory/></store>', 2, 17],
  ['<nbd><listen/></nbd>', 2, 6],
  ['<nbd><listen port="1"/></nbd>', 2, 6],
  ['<nbd><listen address=""/></nbd>', 2, 14],
  ['<nbd><listen address="::1" port="65536"/></nbd>', 2, 28],
  ['<nbd><listen address="::1" port="0x10"/></nbd>', 2, 28],
  ['<nbd><listen socket="s"/></nbd>', 2, 14],
  ['<nbd><listen socket="/s" port="1"/></nbd>', 2, 14],
  ['<nbd><tls mode="maybe"/></nbd>', 2, 11],
  ['<nbd><tls verify-peer="true"/></nbd>', 2, 11],
  ['<nbd><tls psk="/k"><allow/></tls></nbd>', 2, 20],
  ['<nbd><tls psk="/k"><allow user="a" subject="b"/></tls></nbd>', 2, 20],
  ['<nbd><tls psk="/k"><allow user=""/></tls></nbd>', 2, 27],
  ['<nbd><rates total="fast"/></nbd>', 2, 13],
  ['<nbd><rates><export name="a"/></rates></nbd>', 2, 13],
  ['<nbd><rates><export rate="1G"/></rates></nbd>', 2, 13],
  ['<metrics/>', 2, 1],
  ['<metrics address="::1"/>', 2, 1],
  ['<api><listen address="a" port="1"/></api>', 2, 6],
  ['<api socket="s"/>', 2, 6],
  ['<hooks><hook name="a"/></hooks>', 2, 8],
  ['<hooks><hook script="/a"/></hooks>', 2, 8],
  ['<hooks><hook name="../a" script="/a"/></hooks>', 2, 14],
  ['<hooks><hook name="a" script="a b"/></hooks>', 2, 23],
  ['<hooks><hook name="a" script="/a" timeout="soon"/></hooks>', 2, 35],
  ['<checkpoints keep="all"/>', 2, 14],
  ['<freeze timeout="1.5"/>', 2, 9],
];

/** Mistakes that only we see. */
const BEYOND: readonly (readonly [content: string, line: number, column: number])[] = [
  ['<devices><device path="/a"/><device path="/a"/></devices>', 2, 37],
  ['<devices><device path="/a" name="c"/><device path="/b" name="c"/></devices>', 2, 56],
  ['<devices><device path="/a" blocksize="3K"/></devices>', 2, 28],
  ['<devices><device path="/a" blocksize="2K"/></devices>', 2, 28],
  ['<history size="512K"/>', 2, 10],
  [devices(65), 2, 1],
  [`<history place="/h"/>${devices(65)}`, 2, 22],
  ['<store size="0"/>', 2, 8],
  ['<store size="9999999999G"/>', 2, 8],
  ['<store size="2G" max="1G"/>', 2, 18],
  ['<store><folder path="/a"/><device path="/a"/></store>', 2, 35],
  ['<store><memory share="101"/></store>', 2, 16],
  ['<nbd><listen address="::1"/><listen address="::1" port="10809"/></nbd>', 2, 29],
  ['<nbd><listen address="0.0.0.0"/></nbd>', 2, 14],
  ['<nbd><listen address="0.0.0.0"/><tls mode="on" psk="/k"/></nbd>', 2, 14],
  ['<nbd><listen address="127.example"/></nbd>', 2, 14],
  ['<nbd><tls mode="on"/></nbd>', 2, 6],
  ['<nbd><tls psk="/k" verify-peer="yes"/></nbd>', 2, 20],
  ['<nbd><tls mode="on" psk="/k"><allow user="a"/></tls></nbd>', 2, 11],
  ['<nbd><tls psk="/k"><allow san="a.example"/></tls></nbd>', 2, 27],
  ['<nbd><rates total="1"/></nbd>', 2, 13],
  ['<nbd><rates><export name="a" rate="1G"/><export name="a" rate="2G"/></rates></nbd>', 2, 49],
  ['<hooks><hook name="a" script="/a"/><hook name="a" script="/b"/></hooks>', 2, 42],
  ['<hooks><hook name="a" script="/a" timeout="0"/></hooks>', 2, 35],
  ['<checkpoints keep="0"/>', 2, 14],
  ['<freeze timeout="61"/>', 2, 9],
];

for (const [content, line, column] of [...BAD, ...BEYOND]) {
  test(`refused: ${content.replaceAll('\n', ' ').slice(0, 100)}`, (t) => {
    const error = t.throws(() => parse(one(content)), {
      instanceOf: XmlError,
      code: 'BAD_CONFIGURATION',
    });
    t.deepEqual(error?.position, { line, column }, error?.message);
    t.regex(error?.message ?? '', /^x\.xml:\d+:\d+: [^\n]+$/);
    t.is(error?.exitCode, 2);
  });
}

test('the schema refuses them, too', async (t) => {
  const found = await violations(
    t,
    BAD.map(([content]) => one(content)),
  );
  for (const [index, [content]] of BAD.entries()) {
    t.not(found[index], '', content);
  }
});

test('an element or attribute that does not belong there is found anywhere', (t) => {
  // Each tag of the full example in turn gets an attribute and a child too many.
  const tags = [
    ...FULL.replaceAll(/<!--[\s\S]*?-->/g, (text) => text.replaceAll(/</g, ' ')).matchAll(
      /<([a-z]+)/g,
    ),
  ];
  t.true(tags.length > 20);
  for (const { 0: tag, index } of tags) {
    const at = index + tag.length;
    const error = t.throws(() => parse(`${FULL.slice(0, at)} wrong="1"${FULL.slice(at)}`), {
      instanceOf: XmlError,
    });
    const before = FULL.slice(0, at).split('\n');
    t.deepEqual(error?.position, {
      line: before.length,
      column: (before.at(-1)?.length ?? 0) + 2,
    });
    t.regex(error?.message ?? '', /unknown attribute wrong/);
  }
});

test('whatever is typed into it, what we accept the schema accepts', async (t) => {
  const edit = fc.tuple(
    fc.nat({ max: FULL.length - 1 }),
    fc.constantFrom(...'<>/"\'=& -0a\n', 'yes', '<log/>', 'name="a"', ''),
    fc.nat({ max: 3 }),
  );
  const accepted: string[] = [];
  fc.assert(
    fc.property(fc.array(edit, { minLength: 1, maxLength: 2 }), (edits) => {
      let xml = FULL;
      for (const [at, text, removed] of edits) {
        xml = xml.slice(0, at) + text + xml.slice(at + removed);
      }
      try {
        parse(xml);
        accepted.push(xml);
      } catch (error) {
        t.true(error instanceof XmlError, String(error));
      }
    }),
    { numRuns: 1500 },
  );
  t.true(accepted.length > 100, 'many edits are in comments');
  const found = await violations(t, accepted);
  for (const [index, violation] of found.entries()) {
    t.is(violation, '', accepted[index]);
  }
});

test('another document, and files that are none', async (t) => {
  t.throws(() => parse('<domainbackup mode="pull"/>'), { message: /^x\.xml:1:1: <domainbackup>/ });
  const dir = await folder(t);
  await t.throwsAsync(readConfiguration(join(dir, 'none.xml')), { code: 'NO_CONFIGURATION' });
  await t.throwsAsync(readConfiguration(dir), { code: 'EISDIR' });
  const latin = join(dir, 'latin.xml');
  await writeFile(latin, Buffer.from('<stillblock><!-- \xe9 --></stillblock>', 'latin1'));
  await t.throwsAsync(readConfiguration(latin), { code: 'BAD_CONFIGURATION', message: /UTF-8/ });
  const good = join(dir, 'good.xml');
  await writeFile(good, one('<log level="warn"/>'));
  t.is((await readConfiguration(good)).logLevel, 'warn');
});

test('what stays on this machine', (t) => {
  for (const host of ['127.0.0.1', '127.255.0.3', '::1', 'localhost']) {
    t.true(isLoopback(host), host);
  }
  for (const host of ['0.0.0.0', '::', '192.0.2.1', '127.example', '127.1', '1270.0.0.1', '']) {
    t.false(isLoopback(host), host);
  }
});
