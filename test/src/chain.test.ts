// SPDX-License-Identifier: Apache-2.0
/** The rules of a chain: what a manifest may say, what is pulled, what is restored where. */
import test from 'ava';
import { identifyDisk, sameDisk } from '../../src/disk-identity.ts';
import { StillblockError } from '../../src/errors.ts';
import type { MachineLayout } from '../../src/layout.ts';
import {
  type ChainEntry,
  type ChainPoint,
  entriesBeneath,
  formatManifest,
  type Manifest,
  parseManifest,
  tipOf,
} from '../../src/manifest.ts';
import { formatNbdUri, parseNbdUri, qemuImageOptions, qemuTlsObject } from '../../src/nbd-uri.ts';
import type { Offer, OfferedDelta, OfferedDisk } from '../../src/offer.ts';
import { planPull } from '../../src/pull-plan.ts';
import { parseQcow2Header } from '../../src/qcow2-header.ts';
import {
  choosePoint,
  findSource,
  parseMapping,
  planRestore,
  type TargetFacts,
} from '../../src/restore-plan.ts';

const GENERATION = '8f14e45f-ceea-467f-a0e6-000000000001';

function entry(disk: string, index: number, more: Partial<ChainEntry> = {}): ChainEntry {
  return {
    ...{ disk, sizeBytes: 4096, kind: 'full', file: `${disk}.000${index}.qcow2` },
    ...{ backing: null, parent: null, fileBytes: 10, sha256: 'a'.repeat(64), stamp: '1' },
    ...{ generation: GENERATION, number: index, checkpointId: null, verified: false },
    identity: { kind: 'gpt', id: 'aa' },
    ...more,
  };
}

function point(checkpoint: string, ...entries: ChainEntry[]): ChainPoint {
  return { checkpoint, takenAt: null, pulledAt: '2026-01-01T00:00:00Z', layout: null, entries };
}

const on = (disk: string, index: number, parent: string): ChainEntry =>
  entry(disk, index, {
    ...{ kind: 'incremental', parent },
    backing: `${disk}.000${index - 1}.qcow2`,
  });

const CHAIN: Manifest = {
  ...{ chain: 'c', machine: 'm' },
  points: [
    point('mon', entry('sda', 1), entry('sdb', 1)),
    point('tue', on('sda', 2, 'mon')),
    point(
      'wed',
      on('sda', 3, 'tue'),
      entry('sdb', 3, { kind: 'incremental', parent: 'mon', backing: 'sdb.0001.qcow2' }),
    ),
  ],
};

function codeOf(body: () => unknown): string {
  try {
    body();
  } catch (error) {
    return error instanceof StillblockError ? error.code : String(error);
  }
  return 'nothing';
}

test('a manifest is read as it was written', (t) => {
  t.deepEqual(parseManifest(formatManifest(CHAIN)), CHAIN);
  t.is(tipOf(CHAIN, 'sdb')?.point.checkpoint, 'wed');
  t.is(tipOf(CHAIN, 'sdc'), undefined);
  const [, , last] = CHAIN.points;
  t.deepEqual(
    entriesBeneath(CHAIN, last?.entries[0] ?? entry('x', 1)).map(({ file }) => file),
    ['sda.0003.qcow2', 'sda.0002.qcow2', 'sda.0001.qcow2'],
  );
});

const BROKEN: readonly [string, string, (manifest: Manifest) => unknown][] = [
  ['no JSON', 'BAD_MANIFEST', () => '{'],
  ['another format', 'BAD_MANIFEST', (m) => ({ ...m, format: 'x' })],
  ['a later version', 'NEWER_MANIFEST', (m) => ({ ...m, version: 2 })],
  [
    'a file outside',
    'BAD_MANIFEST',
    (m) => ({ ...m, points: [point('a', entry('sda', 1, { file: '../x.qcow2' }))] }),
  ],
  [
    'a hash that is none',
    'BAD_MANIFEST',
    (m) => ({ ...m, points: [point('a', entry('sda', 1, { sha256: 'x' }))] }),
  ],
  [
    'a disk twice',
    'BAD_MANIFEST',
    (m) => ({ ...m, points: [point('a', entry('sda', 1), entry('sda', 2))] }),
  ],
  [
    'a file twice',
    'BAD_MANIFEST',
    (m) => ({ ...m, points: [point('a', entry('sda', 1)), point('b', entry('sda', 1))] }),
  ],
  [
    'a checkpoint twice',
    'BAD_MANIFEST',
    (m) => ({ ...m, points: [point('a', entry('sda', 1)), point('a', entry('sdb', 2))] }),
  ],
  [
    'an increment of nothing',
    'CHAIN_ORDER',
    (m) => ({ ...m, points: [point('b', on('sda', 2, 'a'))] }),
  ],
  ['points turned round', 'CHAIN_ORDER', (m) => ({ ...m, points: m.points.toReversed() })],
  [
    'a point left out',
    'CHAIN_ORDER',
    (m) => ({ ...m, points: m.points.filter((p) => p.checkpoint !== 'tue') }),
  ],
  [
    'an increment of another size',
    'CHAIN_ORDER',
    (m) => ({
      ...m,
      points: [point('a', entry('sda', 1)), point('b', { ...on('sda', 2, 'a'), sizeBytes: 8192 })],
    }),
  ],
  [
    'a full copy on top of something',
    'CHAIN_ORDER',
    (m) => ({ ...m, points: [point('a', entry('sda', 1, { backing: 'x' }))] }),
  ],
];

for (const [what, code, change] of BROKEN) {
  test(`a manifest is refused: ${what}`, (t) => {
    const changed = change({ ...CHAIN, ...(JSON.parse(formatManifest(CHAIN)) as object) });
    const text = typeof changed === 'string' ? changed : JSON.stringify(changed);
    t.is(
      codeOf(() => parseManifest(text)),
      code,
    );
  });
}

const URI = parseNbdUri('nbd://h/sda');

const since = (generation: string, number: number, checkpointId?: string): OfferedDelta => ({
  checkpoint: 'wed',
  uri: URI,
  history: { generation, number, checkpointId },
});

function offered(name: string, more: Partial<OfferedDisk> = {}): OfferedDisk {
  const history = { generation: GENERATION, number: 3, checkpointId: undefined };
  return {
    ...{ name, sizeBytes: 4096, uri: URI, identity: { kind: 'gpt', id: 'aa' }, full: [] },
    ...{ history: { generation: GENERATION, number: 9, checkpointId: undefined } },
    deltas: [{ checkpoint: 'wed', uri: parseNbdUri(`nbd://h/${name}@wed`), history }],
    ...more,
  };
}

function offer(...disks: OfferedDisk[]): Offer {
  const known = { takenAt: null, machine: 'm', layout: null };
  return { checkpoint: 'thu', ...known, disks };
}

test('changes are pulled where the server proves that they fit', (t) => {
  const { disks, absent } = planPull(CHAIN, offer(offered('sda')), 'increments');
  t.like(disks[0], { proven: true, file: 'sda.0004.qcow2', base: { checkpoint: 'wed' } });
  t.deepEqual(absent, ['sdb']);
  const full = planPull(CHAIN, offer(offered('sda')), 'full');
  t.is(full.disks[0]?.base, undefined);
});

const OTHERS: readonly [string, RegExp, Partial<OfferedDisk>][] = [
  ['not served', /since wed are not served/, { deltas: [] }],
  [
    'a reason of the server',
    /a reason/,
    { deltas: [], full: [{ checkpoint: 'wed', why: 'a reason' }] },
  ],
  ['another size', /another size/, { sizeBytes: 8192 }],
  ['another generation', /another than the chain's/, { deltas: [since('other', 3)] }],
  [
    'a checkpoint made anew under the same name',
    /another than the chain's/,
    { deltas: [since(GENERATION, 5)] },
  ],
  [
    'another disk, of which the server tells nothing',
    /another disk/,
    {
      deltas: [{ checkpoint: 'wed', uri: URI, history: undefined }],
      identity: { kind: 'gpt', id: 'bb' },
    },
  ],
];

for (const [what, says, more] of OTHERS) {
  test(`a full copy is required: ${what}`, (t) => {
    const disks = offer(offered('sda', more), offered('sdb'));
    const error = t.throws(() => planPull(CHAIN, disks, 'increments'), {
      instanceOf: StillblockError,
      message: says,
    });
    t.is(error?.exitCode, 3);
    t.notRegex(error?.message ?? '', /sdb/);
    const plan = planPull(CHAIN, disks, 'full-if-needed');
    t.is(plan.disks[0]?.base, undefined);
    t.is(plan.disks[1]?.base?.checkpoint, 'wed');
  });
}

test('a number that was used again after a disk was set back is another checkpoint', (t) => {
  const chain = {
    ...CHAIN,
    points: [point('wed', entry('sda', 3, { checkpointId: 'first' }))],
  };
  const plan = (id?: string) =>
    planPull(chain, offer(offered('sda', { deltas: [since(GENERATION, 3, id)] })), 'increments');
  t.like(plan('first').disks[0], { proven: true, base: { checkpoint: 'wed' } });
  for (const other of ['second', undefined]) {
    t.throws(() => plan(other), { message: /another than the chain's/ });
  }
});

test('what the server does not prove is pulled, and compared', (t) => {
  const deltas = [{ checkpoint: 'wed', uri: URI, history: undefined }];
  const plan = planPull(CHAIN, offer(offered('sda', { deltas })), 'increments');
  t.like(plan.disks[0], { proven: false, base: { checkpoint: 'wed' } });
});

test('another machine, a checkpoint that is there, no disks', (t) => {
  const machine = { ...offer(offered('sda')), machine: 'other' };
  t.is(
    codeOf(() => planPull(CHAIN, machine, 'full')),
    'OTHER_MACHINE',
  );
  const again = { ...offer(offered('sda')), checkpoint: 'tue' };
  t.is(
    codeOf(() => planPull(CHAIN, again, 'full')),
    'CHECKPOINT_IN_CHAIN',
  );
  t.is(
    codeOf(() => planPull(CHAIN, offer(), 'full')),
    'NO_DISKS',
  );
});

test('NBD URIs, and what QEMU wants instead', (t) => {
  for (const text of [
    'nbd://192.0.2.7:10809/sda',
    'nbds://backup.example:1234/sda@monday',
    'nbd://[::1]:10809/a%20b',
    'nbd+unix:///sda?socket=/run/nbd.sock',
    'nbds+unix:///?socket=/run/nbd.sock',
  ]) {
    t.is(formatNbdUri(parseNbdUri(text)), text);
  }
  t.deepEqual(parseNbdUri('nbd://h').place, { kind: 'tcp', host: 'h', port: 10_809 });
  for (const text of ['', 'sda', 'http://h/x', 'nbd:///x', 'nbd+unix:///x', 'nbd://h/%zz']) {
    t.is(
      codeOf(() => parseNbdUri(text)),
      'USAGE',
      text,
    );
  }
  t.is(
    qemuImageOptions(parseNbdUri('nbd+unix:///a,b?socket=/x,y')),
    'driver=nbd,server.type=unix,server.path=/x,,y,export=a,,b',
  );
  const secure = parseNbdUri('nbds://h/sda');
  t.regex(qemuImageOptions(secure), /tls-creds=tls0$/);
  t.is(
    codeOf(() => qemuTlsObject(secure, undefined)),
    'USAGE',
  );
  t.deepEqual(qemuTlsObject(secure, '/pki'), [
    '--object',
    'tls-creds-x509,id=tls0,dir=/pki,endpoint=client',
  ]);
});

test('whose disk it is', (t) => {
  const gpt = Buffer.alloc(4096);
  gpt.write('EFI PART', 512);
  gpt.write('0123456789abcdef', 568);
  t.is(identifyDisk(gpt).kind, 'gpt');
  const dos = Buffer.alloc(512);
  dos.writeUInt16LE(0xaa55, 510);
  t.deepEqual(identifyDisk(dos), { kind: null, id: null });
  dos.writeUInt32LE(0x12345678, 440);
  t.deepEqual(identifyDisk(dos), { kind: 'dos', id: '78563412' });
  t.deepEqual(identifyDisk(Buffer.alloc(0)), { kind: null, id: null });
  t.true(sameDisk({ kind: null, id: null }, identifyDisk(dos)));
  t.false(sameDisk(identifyDisk(gpt), identifyDisk(dos)));
});

test('a header that is no part of a chain is refused for what it is', (t) => {
  const header = Buffer.alloc(200);
  header.write('QFI\xfb', 'latin1');
  header.writeUInt32BE(3, 4);
  header.writeBigUInt64BE(4096n, 24);
  header.writeUInt32BE(104, 100);
  t.deepEqual(parseQcow2Header(header), {
    ...{ sizeBytes: 4096, backing: undefined, backingFormat: undefined },
  });
  const changed = (at: number, value: number): Buffer => {
    const copy = Buffer.from(header);
    copy.writeUInt32BE(value, at);
    return copy;
  };
  t.regex(String(parseQcow2Header(Buffer.alloc(4096))), /no qcow2/);
  t.regex(String(parseQcow2Header(changed(4, 1))), /version 1/);
  t.regex(String(parseQcow2Header(changed(32, 1))), /encrypted/);
  t.regex(String(parseQcow2Header(changed(76, 1))), /closed/);
  t.regex(String(parseQcow2Header(changed(76, 4))), /another file/);
  const name = changed(12, 190);
  name.writeUInt32BE(11, 16);
  t.regex(String(parseQcow2Header(name)), /out of place/);
  name.writeUInt32BE(10, 16);
  t.is((parseQcow2Header(name) as { backing?: string }).backing?.length, 10);
  for (let length = 0; length < header.length; length += 1) {
    t.notThrows(() => parseQcow2Header(header.subarray(0, length)));
  }
});

function target(more: Partial<TargetFacts> = {}): TargetFacts {
  return {
    ...{ path: '/dev/vdb', kind: 'device', id: '1', sizeBytes: 8192, sectorBytes: 512 },
    ...{ mountPoints: [], holders: [], swap: false, held: false, readOnly: false },
    ...{ isSource: false, contents: '' },
    ...more,
  };
}

const REFUSED: readonly [string, Partial<TargetFacts>][] = [
  ['TARGET_TOO_SMALL', { sizeBytes: 4095 }],
  ['TARGET_MOUNTED', { mountPoints: ['/mnt'] }],
  ['TARGET_IN_USE', { holders: ['dm-0'] }],
  ['TARGET_SWAP', { swap: true }],
  ['TARGET_HELD', { held: true }],
  ['TARGET_READ_ONLY', { readOnly: true }],
  ['TARGET_IS_SOURCE', { isSource: true }],
];

test('targets are refused for what they are', (t) => {
  const at = choosePoint(CHAIN, undefined);
  const source = findSource(CHAIN, at, 'sda');
  t.is(planRestore(at, [{ source, target: target() }]).items.length, 1);
  for (const [code, facts] of REFUSED) {
    t.is(
      codeOf(() => planRestore(at, [{ source, target: target(facts) }])),
      code,
    );
  }
  const other = findSource(CHAIN, at, 'sdb');
  const both = [source, other].map((each) => ({ source: each, target: target() }));
  t.is(
    codeOf(() => planRestore(at, both)),
    'TARGET_TWICE',
  );
});

test('a point has the disks of its instant alone', (t) => {
  const tuesday = choosePoint(CHAIN, 'tue');
  const error = t.throws(() => findSource(CHAIN, tuesday, 'sdb'), { instanceOf: StillblockError });
  t.is(error?.code, 'NO_DISK');
  t.regex(error?.advice ?? '', /--at wed/);
  t.is(
    codeOf(() => choosePoint(CHAIN, 'fri')),
    'NO_POINT',
  );
  t.is(
    codeOf(() => choosePoint({ ...CHAIN, points: [] }, undefined)),
    'NO_POINT',
  );
  t.is(
    codeOf(() => parseMapping('sda')),
    'USAGE',
  );
  t.deepEqual(parseMapping('sda=/dev/disk/by-id/a=b'), {
    old: 'sda',
    target: '/dev/disk/by-id/a=b',
  });
});

test('a table is written to a whole disk with the same sectors', (t) => {
  const partitions = [
    { name: 'sdx1', startSector: 8, sectors: 8, type: '', uuid: null },
    { name: 'sdx2', startSector: 16, sectors: 8, type: '', uuid: null },
  ];
  const table = { disk: 'sdx', label: 'gpt', id: '', sectorBytes: 512, partitions, dump: '' };
  const layout = { devices: [], partitionTables: [table] } as unknown as MachineLayout;
  const at = { ...point('a', entry('sdx2', 1)), layout };
  const source = findSource({ ...CHAIN, points: [at] }, at, 'sdx');
  t.deepEqual(
    source.pieces.map(({ offset }) => offset),
    [16 * 512],
  );
  // With the copy of the GPT behind the last partition.
  t.is(source.needBytes, (24 + 33) * 512);
  t.regex(source.notes.join(), /no image of sdx1/);
  const plan = (facts: Partial<TargetFacts>): string =>
    codeOf(() =>
      planRestore(at, [{ source, target: target({ sizeBytes: source.needBytes, ...facts }) }]),
    );
  t.is(plan({}), 'nothing');
  t.is(plan({ sectorBytes: 4096 }), 'TARGET_SECTORS');
  t.is(plan({ kind: 'partition' }), 'TARGET_IS_PARTITION');
});
