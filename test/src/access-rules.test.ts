// SPDX-License-Identifier: Apache-2.0
/** Rules for who may see what. */
import test from 'ava';
import fc from 'fast-check';
import { ANONYMOUS, type Identity, PLAIN } from '../../nbd/access.ts';
import { AccessRulesError, glob, parseAccessRules } from '../../src/access-rules.ts';

const PROXY: Identity = {
  kind: 'certificate',
  subject: 'CN=proxy 1,OU=Backup,O=Example',
  commonNames: ['proxy 1'],
  alternativeNames: [
    { type: 'dns', value: 'P1.backup.example' },
    { type: 'ip', value: '2001:DB8:0:0:0:0:0:7' },
    { type: 'email', value: 'ops@example' },
    { type: 'uri', value: 'spiffe://example/proxy' },
  ],
};
const ALICE: Identity = { kind: 'psk', user: 'alice' };

const WHO: readonly (readonly [string, Identity, boolean])[] = [
  ['anyone', PLAIN, true],
  ['tls', PLAIN, false],
  ['tls', ANONYMOUS, true],
  ['tls', ALICE, true],
  ['tls', PROXY, true],
  ['psk:alice', ALICE, true],
  ['psk:al*', ALICE, true],
  ['psk:bob', ALICE, false],
  ['psk:*', PROXY, false],
  ['cn:*', ALICE, false],
  ['"cn:proxy 1"', PROXY, true],
  ['cn:proxy', PROXY, false],
  ['"subject:CN=proxy*,O=Example"', PROXY, true],
  ['subject:*OU=Backup,*', PROXY, true],
  ['subject:CN=proxy', PROXY, false],
  ['dns:p1.backup.example', PROXY, true],
  ['dns:*.backup.example', PROXY, true],
  ['dns:p*.BACKUP.example', PROXY, true],
  // A star stays within its label.
  ['dns:*.example', PROXY, false],
  ['dns:*', PROXY, false],
  ['ip:2001:db8::7', PROXY, true],
  ['ip:2001:db8::/32', PROXY, true],
  ['ip:2001:db9::/32', PROXY, false],
  ['ip:192.0.2.0/24', PROXY, false],
  ['email:*@example', PROXY, true],
  ['uri:spiffe://example/*', PROXY, true],
  ['uri:spiffe://example', PROXY, false],
  ['dns:ops@example', PROXY, false],
];

for (const [who, client, expected] of WHO) {
  test(`${who} ${expected ? 'is' : 'is not'} ${JSON.stringify(client).slice(0, 40)}`, (t) => {
    t.is(parseAccessRules(`${who} sda`)(client, 'sda'), expected);
  });
}

test('what no rule gives is not given; several rules add up; comments and empty lines are none', (t) => {
  const access = parseAccessRules(`
# who   what
psk:alice  sda sda@*   # and its changes

psk:alice "with space" "\\u00fc*"
\ttls\tpublic\t
`);
  for (const name of ['sda', 'sda@monday', 'with space', 'üb', 'public']) {
    t.true(access(ALICE, name), name);
  }
  for (const name of ['', 'sdb', 'sda2', 'with', '#', 'and']) {
    t.false(access(ALICE, name), name);
  }
  t.false(access(ANONYMOUS, 'sda'));
  t.false(parseAccessRules('')(PROXY, 'sda'));
  t.true(parseAccessRules('anyone ""')(PLAIN, ''));
});

for (const [text, says] of [
  ['tls', /line 1: it names no export/],
  ['# fine\nnobody sda', /line 2: "nobody" is neither/],
  ['host:x sda', /line 1: "host" is no kind/],
  ['psk: sda', /line 1/],
  ['ip:300.0.0.1 sda', /line 1: 300.0.0.1 is no IP address/],
  ['ip:192.0.2.1/33 sda', /line 1/],
  ['tls "sda', /line 1: "sda is no word/],
  ['tls "\\x"', /line 1: .* JSON/],
  ['tls "a"b', /line 1/],
] as const) {
  test(`refused: ${JSON.stringify(text)}`, (t) => {
    t.throws(() => parseAccessRules(text), { instanceOf: AccessRulesError, message: says });
  });
}

test('glob is what the regular expression would be', (t) => {
  const letters = fc.string({ unit: fc.constantFrom('a', 'b', '*'), maxLength: 8 });
  const text = fc.string({ unit: fc.constantFrom('a', 'b'), maxLength: 10 });
  fc.assert(
    fc.property(letters, text, (pattern, value) => {
      const expression = new RegExp(`^${pattern.replaceAll('*', '.*')}$`);
      return glob(pattern)(value) === expression.test(value);
    }),
  );
  t.pass();
});
