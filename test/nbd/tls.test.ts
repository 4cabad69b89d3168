// SPDX-License-Identifier: Apache-2.0
/** STARTTLS and what follows: its rules as pure steps, and over sockets with Node's own TLS. */
import test from 'ava';
import type { Export } from '../../nbd/export.ts';
import {
  afterTls,
  HANDSHAKE_START,
  type HandshakeState,
  type HandshakeStep,
  type Offer,
  stepHandshake,
} from '../../nbd/handshake.ts';
import { resolveLimits } from '../../nbd/limits.ts';
import { isLocalAddress, NodeTls, parseAlternativeNames, type TlsMode } from '../../nbd/tls.ts';
import { testTls } from './tls-suite.ts';
import { be, exportOf, infoData, MemorySource, metaData, OPT, option, REP } from './world.ts';

// ---- pure steps

const disk = exportOf(new MemorySource(Buffer.alloc(4096)));

function offerOf(tls: TlsMode, exports: Export[] = [disk], behindTls: string[] = []): Offer {
  return {
    limits: resolveLimits(),
    tls,
    exports,
    find: (name) => exports.find((candidate) => candidate.name === name),
    needsTls: (name) => behindTls.includes(name),
    admits: true,
  };
}

const OPTIONS: HandshakeState = { ...HANDSHAKE_START, phase: 'options', fixedNewstyle: true };
const SECURE = afterTls(OPTIONS);

/** The type of the reply that ends a step. */
function typeOf({ effects: [first] }: HandshakeStep): number {
  const bytes = first?.kind === 'send' ? first.bytes : Buffer.alloc(20);
  return bytes.readUInt32BE(bytes.lastIndexOf(be([64, 0x3e889045565a9n])) + 12);
}

test('STARTTLS is acknowledged, and nothing is parsed before TLS is there', (t) => {
  for (const mode of ['on', 'require'] as const) {
    const input = Buffer.concat([option(OPT.startTls), option(OPT.list)]);
    const step = stepHandshake(OPTIONS, input, offerOf(mode));
    t.is(step.state.phase, 'startingTls');
    t.is(step.consumedBytes, 16);
    const [effect, ...others] = step.effects;
    t.is(others.length, 0);
    t.true(effect?.kind === 'startTls');
    if (effect?.kind === 'startTls') {
      t.deepEqual(
        effect.acknowledgement,
        be([64, 0x3e889045565a9n], [32, OPT.startTls], [32, REP.ack], [32, 0]),
      );
    }
    const next = stepHandshake(step.state, option(OPT.list), offerOf(mode));
    t.deepEqual(next, { state: step.state, effects: [], consumedBytes: 0, neededBytes: 0 });
  }
});

test('STARTTLS with data: ERR_INVALID', (t) => {
  const step = stepHandshake(OPTIONS, option(OPT.startTls, Buffer.alloc(1)), offerOf('require'));
  t.is(typeOf(step), REP.errInvalid);
  t.is(step.state.phase, 'options');
  t.is(step.consumedBytes, 17);
});

test('STARTTLS inside TLS: ERR_INVALID', (t) => {
  const step = stepHandshake(SECURE, option(OPT.startTls), offerOf('require'));
  t.is(typeOf(step), REP.errInvalid);
  t.is(step.state.phase, 'options');
});

test('STARTTLS where there is no TLS: ERR_POLICY, and never TLS_REQD', (t) => {
  t.is(typeOf(stepHandshake(OPTIONS, option(OPT.startTls), offerOf('off'))), REP.errPolicy);
  const hidden = stepHandshake(
    OPTIONS,
    option(OPT.go, infoData('x')),
    offerOf('off', [disk], ['x']),
  );
  t.is(typeOf(hidden), REP.errUnknown);
});

test('STARTTLS without fixed newstyle closes', (t) => {
  const state = { ...OPTIONS, fixedNewstyle: false };
  const step = stepHandshake(state, option(OPT.startTls), offerOf('require'));
  t.like(step.effects[0], { kind: 'close', violation: true });
});

test('before forced TLS every option but ABORT and STARTTLS: TLS_REQD, in step', (t) => {
  const offer = offerOf('require');
  const list = [OPT.list, OPT.peekExport, OPT.info, OPT.go, OPT.structuredReply];
  const rest = [OPT.listMetaContext, OPT.setMetaContext, OPT.extendedHeaders, 0, 12, 0xffffffff];
  for (const number of [...list, ...rest]) {
    for (const data of [Buffer.alloc(0), infoData('disk'), Buffer.alloc(999, 0xff)]) {
      const step = stepHandshake(OPTIONS, option(number, data), offer);
      t.is(typeOf(step), REP.errTlsReqd);
      t.is(step.consumedBytes, 16 + data.length);
      t.deepEqual({ ...step.state, options: 0 }, OPTIONS);
    }
  }
  t.is(typeOf(stepHandshake(OPTIONS, option(OPT.abort), offer)), REP.ack);
});

test('EXPORT_NAME before forced TLS closes', (t) => {
  const input = option(OPT.exportName, Buffer.from('disk'));
  const step = stepHandshake(OPTIONS, input, offerOf('require'));
  t.like(step.effects[0], { kind: 'close', violation: true });
  t.is(step.effects.length, 1);
  t.is(step.state.phase, 'over');
});

test('within TLS nothing is answered TLS_REQD', (t) => {
  const offer = offerOf('require', [disk], ['disk', 'other']);
  for (const number of [OPT.list, OPT.structuredReply, OPT.extendedHeaders]) {
    t.is(typeOf(stepHandshake(SECURE, option(number), offer)), REP.ack);
  }
  for (const number of [OPT.info, OPT.go]) {
    t.is(typeOf(stepHandshake(SECURE, option(number, infoData('other')), offer)), REP.errUnknown);
  }
});

test('TLS leaves of what was agreed on before only the client flags and the count of options', (t) => {
  let state: HandshakeState = { ...OPTIONS, noZeroes: true };
  for (const [number, data] of [
    [OPT.structuredReply, undefined],
    [OPT.setMetaContext, metaData('disk', 'base:allocation')],
    [OPT.startTls, undefined],
  ] as const) {
    state = stepHandshake(state, option(number, data), offerOf('on')).state;
  }
  t.is(state.phase, 'startingTls');
  t.truthy(state.selection);
  t.deepEqual(afterTls(state), {
    phase: 'options',
    secure: true,
    fixedNewstyle: true,
    noZeroes: true,
    headers: 'simple',
    selection: undefined,
    options: 3,
  });
});

test('SELECTIVETLS: an export that needs TLS is answered TLS_REQD before it, an unknown one is not', (t) => {
  const offer = offerOf('on', [disk], ['secret']);
  for (const number of [OPT.info, OPT.go]) {
    t.is(typeOf(stepHandshake(OPTIONS, option(number, infoData('secret')), offer)), REP.errTlsReqd);
    t.is(typeOf(stepHandshake(OPTIONS, option(number, infoData('none')), offer)), REP.errUnknown);
  }
  const structured: HandshakeState = { ...OPTIONS, headers: 'structured' };
  for (const number of [OPT.listMetaContext, OPT.setMetaContext]) {
    const step = stepHandshake(structured, option(number, metaData('secret')), offer);
    t.is(typeOf(step), REP.errTlsReqd);
  }
  const old = stepHandshake(OPTIONS, option(OPT.exportName, Buffer.from('secret')), offer);
  t.like(old.effects[0], { kind: 'close' });
});

test('loopback is what only this machine reaches', (t) => {
  for (const local of ['127.0.0.1', '127.9.9.9', '::1', '::ffff:127.0.0.1']) {
    t.true(isLocalAddress(local), local);
  }
  for (const other of ['0.0.0.0', '::', '192.0.2.7', '128.0.0.1', '::ffff:10.0.0.1', 'fe80::1']) {
    t.false(isLocalAddress(other), other);
  }
});

test('alternative names: none hides in the value of another', (t) => {
  t.deepEqual(parseAlternativeNames('DNS:a.example, IP Address:192.0.2.1, URI:x:y, email:a@b'), [
    { type: 'dns', value: 'a.example' },
    { type: 'ip', value: '192.0.2.1' },
    { type: 'uri', value: 'x:y' },
    { type: 'email', value: 'a@b' },
  ]);
  t.deepEqual(parseAlternativeNames('DNS:"a, DNS:root.example", DirName:CN = x'), [
    { type: 'dns', value: 'a, DNS:root.example' },
  ]);
  t.deepEqual(parseAlternativeNames(''), []);
  for (const odd of ['DNS:a,DNS:b', 'nothing', 'DNS:"a', 'DNS:a, ']) {
    t.is(parseAlternativeNames(odd), undefined, odd);
  }
});

// ---- over sockets

testTls((credentials) => new NodeTls(credentials));
