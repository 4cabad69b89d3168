// SPDX-License-Identifier: Apache-2.0
/** The handshake's steps, without a socket: state and bytes in, state and effects out. */
import test from 'ava';
import fc from 'fast-check';
import type { Export } from '../../nbd/export.ts';
import { ExtentMap } from '../../nbd/extents.ts';
import {
  HANDSHAKE_START,
  type HandshakeState,
  type HandshakeStep,
  type Offer,
  stepHandshake,
} from '../../nbd/handshake.ts';
import { resolveLimits } from '../../nbd/limits.ts';
import {
  be,
  exportOf,
  infoData,
  MemorySource,
  metaData,
  OPT,
  type OptionReply,
  option,
  REP,
} from './world.ts';

const SIZE = 1 << 20;
const source = new MemorySource(Buffer.alloc(SIZE));
const dirty = ExtentMap.fromRanges(SIZE, [{ offset: 0, length: 512 }], 1, 0);
const disk = exportOf(source, {
  description: 'a disk',
  contexts: [
    ['qemu:dirty-bitmap:monday', dirty],
    ['qemu:dirty-bitmap:tuesday', dirty],
  ],
});
const other = exportOf(source, { name: 'other' });

function offerOf(exports: Export[], changes: Partial<Offer> = {}): Offer {
  return {
    limits: resolveLimits(),
    tls: 'off',
    needsTls: () => false,
    exports,
    find: (name) => exports.find((candidate) => candidate.name === name),
    admits: true,
    ...changes,
  };
}

const offer = offerOf([disk, other]);
const OPTIONS: HandshakeState = {
  ...HANDSHAKE_START,
  phase: 'options',
  fixedNewstyle: true,
  noZeroes: true,
};
const STRUCTURED: HandshakeState = { ...OPTIONS, headers: 'structured' };

/** The replies of a step that sends once. */
function replies(step: HandshakeStep): OptionReply[] {
  const sends = step.effects.filter((effect) => effect.kind === 'send');
  if (sends.length !== 1) {
    throw new Error(`${sends.length} writes`);
  }
  const result: OptionReply[] = [];
  for (let bytes = sends[0]?.bytes ?? Buffer.alloc(0); bytes.length > 0; ) {
    const end = 20 + bytes.readUInt32BE(16);
    result.push({
      option: bytes.readUInt32BE(8),
      type: bytes.readUInt32BE(12),
      data: bytes.subarray(20, end),
    });
    bytes = bytes.subarray(end);
  }
  return result;
}

const types = (step: HandshakeStep): number[] => replies(step).map(({ type }) => type);
const contextNames = (step: HandshakeStep): string[] =>
  replies(step)
    .filter(({ type }) => type === REP.metaContext)
    .map(({ data }) => data.subarray(4).toString());

test('client flags are taken and lead to the options', (t) => {
  for (const flags of [0, 1, 2, 3]) {
    const step = stepHandshake(HANDSHAKE_START, be([32, flags]), offer);
    t.is(step.state.phase, 'options');
    t.is(step.state.fixedNewstyle, (flags & 1) !== 0);
    t.is(step.state.noZeroes, (flags & 2) !== 0);
    t.is(step.consumedBytes, 4);
    t.deepEqual(step.effects, []);
  }
});

test('every unknown client flag closes', (t) => {
  for (let bit = 2; bit < 32; bit += 1) {
    const step = stepHandshake(HANDSHAKE_START, be([32, 2 ** bit + 3]), offer);
    t.is(step.state.phase, 'over');
    t.like(step.effects[0], { kind: 'close', violation: true });
  }
});

test('one message is taken at a time, and none before it is complete', (t) => {
  const input = Buffer.concat([option(OPT.list), option(OPT.abort)]);
  for (let bytes = 0; bytes < 16; bytes += 1) {
    const step = stepHandshake(OPTIONS, input.subarray(0, bytes), offer);
    t.is(step.consumedBytes, 0);
    t.true(step.neededBytes > bytes);
    t.deepEqual(step.effects, []);
    t.is(step.state, OPTIONS);
  }
  t.is(stepHandshake(OPTIONS, input, offer).consumedBytes, 16);
});

test('EXPORT_NAME leads to transmission, with zeroes unless both agreed', (t) => {
  const input = option(OPT.exportName, Buffer.from('disk'));
  for (const [noZeroes, bytes] of [
    [true, 10],
    [false, 134],
  ] as const) {
    const step = stepHandshake({ ...OPTIONS, noZeroes }, input, offer);
    t.like(step.effects[0], { kind: 'send' });
    t.is(step.effects[0]?.kind === 'send' ? step.effects[0].bytes.length : 0, bytes);
    t.like(step.effects[1], { kind: 'transmit', agreement: { headers: 'simple' } });
    t.is(step.state.phase, 'over');
  }
});

test('EXPORT_NAME works without fixed newstyle, as Xen Orchestra needs it', (t) => {
  const input = option(OPT.exportName, Buffer.from('disk'));
  const step = stepHandshake({ ...OPTIONS, fixedNewstyle: false }, input, offer);
  t.is(step.effects[1]?.kind, 'transmit');
});

test('any other option without fixed newstyle closes', (t) => {
  const step = stepHandshake({ ...OPTIONS, fixedNewstyle: false }, option(OPT.list), offer);
  t.like(step.effects, [{ kind: 'close', violation: true }]);
});

test('EXPORT_NAME of an unknown, overlong or ill-encoded name closes', (t) => {
  for (const name of [Buffer.from('none'), Buffer.alloc(4097, 'a'), Buffer.from([0xff])]) {
    const step = stepHandshake(OPTIONS, option(OPT.exportName, name), offer);
    t.like(step.effects, [{ kind: 'close' }]);
    t.is(step.effects.length, 1);
  }
});

test('ABORT is acknowledged and closes, with data, too', (t) => {
  for (const data of [Buffer.alloc(0), Buffer.from('bye')]) {
    const step = stepHandshake(OPTIONS, option(OPT.abort, data), offer);
    t.deepEqual(types(step), [REP.ack]);
    t.like(step.effects[1], { kind: 'close', violation: false });
    t.is(step.state.phase, 'over');
  }
});

test('LIST names every export with its description in one write', (t) => {
  const list = replies(stepHandshake(OPTIONS, option(OPT.list), offer));
  t.deepEqual(
    list.map(({ type }) => type),
    [REP.server, REP.server, REP.ack],
  );
  t.deepEqual(list[0]?.data, Buffer.concat([be([32, 4]), Buffer.from('diska disk')]));
  t.deepEqual(list[1]?.data, Buffer.concat([be([32, 5]), Buffer.from('other')]));
});

test('LIST with data is invalid', (t) => {
  t.deepEqual(types(stepHandshake(OPTIONS, option(OPT.list, Buffer.from('x')), offer)), [
    REP.errInvalid,
  ]);
});

for (const [name, number] of [
  ['INFO', OPT.info],
  ['GO', OPT.go],
] as const) {
  test(`${name} sends what was asked for and always INFO_EXPORT`, (t) => {
    const bare = replies(stepHandshake(OPTIONS, option(number, infoData('disk')), offer));
    t.deepEqual(
      bare.map(({ type, data }) => [type, data.toString('hex')]),
      [
        [REP.info, '00000000000000100000010f'],
        [REP.ack, ''],
      ],
    );
    const input = option(number, infoData('disk', 1, 2, 3, 0, 0x7777, 1));
    const full = replies(stepHandshake(OPTIONS, input, offer));
    t.deepEqual(
      full.slice(0, -1).map(({ type, data }) => [type, data.readUInt16BE(0)]),
      [
        [REP.info, 0],
        [REP.info, 1],
        [REP.info, 2],
        [REP.info, 3],
      ],
    );
    t.is(full[1]?.data.subarray(2).toString(), 'disk');
    t.is(full[2]?.data.subarray(2).toString(), 'a disk');
    t.is(full[3]?.data.toString('hex'), '0003000000010000100002000000');
    t.is(full.at(-1)?.type, REP.ack);
  });

  test(`${name} offers DF only after structured replies`, (t) => {
    const [info] = replies(stepHandshake(STRUCTURED, option(number, infoData('disk')), offer));
    t.is(info?.data.readUInt16BE(10), 0x018f);
  });

  test(`${name} of an unknown export is an error`, (t) => {
    const step = stepHandshake(OPTIONS, option(number, infoData('none')), offer);
    t.deepEqual(types(step), [REP.errUnknown]);
    t.is(step.state.phase, 'options');
  });

  test(`${name} that is malformed or has trailing bytes is invalid`, (t) => {
    const good = infoData('disk', 3);
    for (const data of [
      good.subarray(0, -1),
      Buffer.concat([good, Buffer.from([0])]),
      Buffer.alloc(0),
      infoData('a'.repeat(4097)),
    ]) {
      const step = stepHandshake(OPTIONS, option(number, data), offer);
      t.deepEqual(types(step), [REP.errInvalid]);
      t.is(step.state.phase, 'options');
    }
  });
}

test('INFO changes nothing, GO leads to transmission', (t) => {
  const info = stepHandshake(OPTIONS, option(OPT.info, infoData('disk')), offer);
  t.is(info.state.phase, 'options');
  const go = stepHandshake(STRUCTURED, option(OPT.go, infoData('disk')), offer);
  t.is(go.state.phase, 'over');
  t.like(go.effects[1], { kind: 'transmit', agreement: { headers: 'structured' } });
});

test('GO beyond the cap of connections is refused, INFO is not', (t) => {
  const full = offerOf([disk], { admits: false });
  t.deepEqual(types(stepHandshake(OPTIONS, option(OPT.go, infoData('disk')), full)), [
    REP.errPolicy,
  ]);
  t.deepEqual(types(stepHandshake(OPTIONS, option(OPT.info, infoData('disk')), full)), [
    REP.info,
    REP.ack,
  ]);
});

test('STRUCTURED_REPLY is acknowledged, again when repeated, and takes no data', (t) => {
  const step = stepHandshake(OPTIONS, option(OPT.structuredReply), offer);
  t.deepEqual(types(step), [REP.ack]);
  t.is(step.state.headers, 'structured');
  t.deepEqual(types(stepHandshake(step.state, option(OPT.structuredReply), offer)), [REP.ack]);
  const bad = stepHandshake(OPTIONS, option(OPT.structuredReply, Buffer.from('x')), offer);
  t.deepEqual(types(bad), [REP.errInvalid]);
  t.is(bad.state.headers, 'simple');
});

test('all unknown options are unsupported, whatever their data', (t) => {
  for (const number of [0, OPT.peekExport, 12, 0xffffffff]) {
    for (const data of [Buffer.alloc(0), Buffer.alloc(65_536, 0xff)]) {
      const step = stepHandshake(OPTIONS, option(number, data), offer);
      t.deepEqual(types(step), [REP.errUnsup]);
      t.is(step.consumedBytes, 16 + data.length);
      t.is(step.state.phase, 'options');
    }
  }
});

const EXTENDED: HandshakeState = { ...OPTIONS, headers: 'extended' };

test('EXTENDED_HEADERS: acknowledged without or after structured replies, and takes no data', (t) => {
  for (const before of [OPTIONS, STRUCTURED, EXTENDED]) {
    const step = stepHandshake(before, option(OPT.extendedHeaders), offer);
    t.deepEqual(types(step), [REP.ack]);
    t.is(step.state.headers, 'extended');
    const bad = stepHandshake(before, option(OPT.extendedHeaders, Buffer.from('x')), offer);
    t.deepEqual(types(bad), [REP.errInvalid]);
    t.is(bad.state.headers, before.headers);
  }
});

test('STRUCTURED_REPLY after EXTENDED_HEADERS: ERR_EXT_HEADER_REQD, extended headers stay', (t) => {
  const step = stepHandshake(EXTENDED, option(OPT.structuredReply), offer);
  t.deepEqual(types(step), [REP.errExtHeaderReqd]);
  t.is(step.state.headers, 'extended');
});

test('EXPORT_NAME after EXTENDED_HEADERS: closed', (t) => {
  const step = stepHandshake(EXTENDED, option(OPT.exportName, Buffer.from('disk')), offer);
  t.like(step.effects, [{ kind: 'close', violation: true }]);
  t.is(step.effects.length, 1);
});

test('meta contexts may be set after extended headers alone, and stay when they come later', (t) => {
  const selected = set(EXTENDED, 'disk', 'base:allocation');
  t.deepEqual(types(selected), [REP.metaContext, REP.ack]);
  const before = set(STRUCTURED, 'disk', 'base:allocation').state;
  const { state } = stepHandshake(before, option(OPT.extendedHeaders), offer);
  t.is(state.selection?.contexts.length, 1);
});

test('BLOCK_STATUS_PAYLOAD: in INFO after extended headers, in GO if contexts were set, else never', (t) => {
  const flagsOf = (state: HandshakeState, number: number, name = 'disk'): number | undefined => {
    const [info] = replies(stepHandshake(state, option(number, infoData(name)), offer));
    return info?.data.readUInt16BE(10);
  };
  const chosen = set(EXTENDED, 'disk', 'base:allocation').state;
  t.is(flagsOf(EXTENDED, OPT.info), 0x118f);
  t.is(flagsOf(EXTENDED, OPT.go), 0x018f);
  t.is(flagsOf(chosen, OPT.go), 0x118f);
  t.is(flagsOf(chosen, OPT.go, 'other'), 0x018f);
  t.is(flagsOf(set(STRUCTURED, 'disk', 'base:allocation').state, OPT.go), 0x018f);
});

// ---- contexts

const listed = (...queries: string[]): string[] =>
  contextNames(
    stepHandshake(STRUCTURED, option(OPT.listMetaContext, metaData('disk', ...queries)), offer),
  );
const set = (state: HandshakeState, name: string, ...queries: string[]): HandshakeStep =>
  stepHandshake(state, option(OPT.setMetaContext, metaData(name, ...queries)), offer);

test('LIST_META_CONTEXT without queries lists all, in one write', (t) => {
  t.deepEqual(listed(), [
    'base:allocation',
    'qemu:dirty-bitmap:monday',
    'qemu:dirty-bitmap:tuesday',
  ]);
});

test('LIST_META_CONTEXT answers names and wildcards, each context once', (t) => {
  t.deepEqual(listed('base:'), ['base:allocation']);
  t.deepEqual(listed('base:allocation', 'base:allocation'), ['base:allocation']);
  const bitmaps = ['qemu:dirty-bitmap:monday', 'qemu:dirty-bitmap:tuesday'];
  t.deepEqual(listed('qemu:'), bitmaps);
  t.deepEqual(listed('qemu:dirty-bitmap:'), bitmaps);
  t.deepEqual(listed('qemu:dirty-bitmap:tuesday', 'qemu:'), bitmaps);
  t.deepEqual(listed('x-none:', 'base:x', '', 'qemu:dirty-bitmap:m'), []);
});

test('LIST_META_CONTEXT leaves the selection alone', (t) => {
  const before = set(STRUCTURED, 'disk', 'base:allocation').state;
  const input = option(OPT.listMetaContext, metaData('none'));
  t.deepEqual(stepHandshake(before, input, offer).state.selection, before.selection);
});

test('SET_META_CONTEXT selects exact names only; wildcards and strangers are ignored', (t) => {
  const step = set(
    STRUCTURED,
    'disk',
    'qemu:dirty-bitmap:tuesday',
    'base:',
    'qemu:dirty-bitmap:',
    'qemu:',
    'x-none:y',
    'base:allocation',
  );
  t.deepEqual(contextNames(step), ['base:allocation', 'qemu:dirty-bitmap:tuesday']);
  t.is(types(step).at(-1), REP.ack);
  t.deepEqual(contextNames(set(STRUCTURED, 'disk', 'base:')), []);
});

test('SET_META_CONTEXT: a repeated query gives one context with one id', (t) => {
  const step = set(STRUCTURED, 'disk', ...Array.from({ length: 200 }, () => 'base:allocation'));
  t.deepEqual(types(step), [REP.metaContext, REP.ack]);
  const all = set(STRUCTURED, 'disk', ...disk.contexts.keys(), ...disk.contexts.keys());
  const ids = replies(all)
    .slice(0, -1)
    .map(({ data }) => data.readUInt32BE(0));
  t.is(ids.length, 3);
  t.is(new Set(ids).size, 3);
});

test('SET_META_CONTEXT before structured replies is invalid', (t) => {
  t.deepEqual(types(set(OPTIONS, 'disk', 'base:allocation')), [REP.errInvalid]);
});

test('meta context options on an unknown export are an error', (t) => {
  t.deepEqual(types(set(STRUCTURED, 'none', 'base:allocation')), [REP.errUnknown]);
  const list = option(OPT.listMetaContext, metaData('none'));
  t.deepEqual(types(stepHandshake(STRUCTURED, list, offer)), [REP.errUnknown]);
});

test('a failed SET_META_CONTEXT clears the earlier selection, however it fails', (t) => {
  const selected = set(STRUCTURED, 'disk', 'base:allocation').state;
  t.is(selected.selection?.contexts.length, 1);
  const good = metaData('disk', 'base:allocation');
  const tooMany = metaData('disk', ...Array.from({ length: 257 }, () => 'x:'));
  for (const [data, type] of [
    [metaData('none', 'base:allocation'), REP.errUnknown],
    [good.subarray(0, -1), REP.errInvalid],
    [Buffer.concat([good, Buffer.from([0])]), REP.errInvalid],
    [tooMany, REP.errTooBig],
  ] as const) {
    const step = stepHandshake(selected, option(OPT.setMetaContext, data), offer);
    t.deepEqual(types(step), [type]);
    t.is(step.state.selection, undefined);
  }
});

test('SET_META_CONTEXT replaces the earlier selection, also by nothing', (t) => {
  const first = set(STRUCTURED, 'disk', 'base:allocation').state;
  const second = set(first, 'disk', 'qemu:dirty-bitmap:monday').state;
  t.deepEqual(
    second.selection?.contexts.map(({ name }) => name),
    ['qemu:dirty-bitmap:monday'],
  );
  t.deepEqual(set(second, 'disk').state.selection?.contexts, []);
});

test('contexts above the limit are too big', (t) => {
  const small = offerOf([disk], { limits: resolveLimits({ contexts: 2 }) });
  const input = option(OPT.setMetaContext, metaData('disk', ...disk.contexts.keys()));
  const step = stepHandshake(STRUCTURED, input, small);
  t.deepEqual(types(step), [REP.errTooBig]);
  t.is(step.state.selection, undefined);
});

test('contexts go with the export and name that they were set for', (t) => {
  const selected = set(STRUCTURED, 'disk', 'base:allocation').state;
  const contextsAfter = (name: string, where: Offer): number | undefined => {
    const step = stepHandshake(selected, option(OPT.go, infoData(name)), where);
    const last = step.effects.at(-1);
    return last?.kind === 'transmit' ? last.agreement.contexts.length : undefined;
  };
  t.is(contextsAfter('disk', offer), 1);
  t.is(contextsAfter('other', offer), 0);
  // The same name may stand for another export by now.
  t.is(contextsAfter('disk', offerOf([exportOf(source)])), 0);
});

test('an option above the limit, a wrong magic and too many options close', (t) => {
  const limits = resolveLimits({ optionBytes: 100, options: 2 });
  const small = offerOf([disk], { limits });
  const close = { kind: 'close', violation: true } as const;
  t.like(stepHandshake(OPTIONS, option(OPT.list, Buffer.alloc(101)), small).effects, [close]);
  t.like(stepHandshake(OPTIONS, Buffer.from('IHAVEOPX'), small).effects, [close]);
  let state = OPTIONS;
  for (let index = 0; index < 2; index += 1) {
    const step = stepHandshake(state, option(99), small);
    t.deepEqual(types(step), [REP.errUnsup]);
    state = step.state;
  }
  t.like(stepHandshake(state, option(99), small).effects, [close]);
});

test('nothing follows the end', (t) => {
  const over: HandshakeState = { ...OPTIONS, phase: 'over' };
  const step = stepHandshake(over, option(OPT.list), offer);
  t.deepEqual(step.effects, []);
  t.is(step.consumedBytes, 0);
});

test('a step answers each option with exactly one write and stays in step, whatever the bytes', (t) => {
  const numbers = fc.oneof(fc.nat(14), fc.nat());
  fc.assert(
    fc.property(numbers, fc.uint8Array({ maxLength: 60 }), (number, bytes) => {
      const input = option(number, Buffer.from(bytes));
      const step = stepHandshake(STRUCTURED, input, offer);
      if (step.state.phase === 'options') {
        t.is(step.consumedBytes, input.length);
        t.is(step.effects.length, 1);
        const last = replies(step).at(-1);
        t.true(last !== undefined && (last.type === REP.ack || last.type >= 0x80000000));
        t.is(last?.option, number);
      }
    }),
    { numRuns: 1000 },
  );
});
