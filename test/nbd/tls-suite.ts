// SPDX-License-Identifier: Apache-2.0
/** What must hold within TLS, over sockets, whoever makes it. */
import { readFileSync } from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { ConnectionOptions } from 'node:tls';
import test, { type ExecutionContext } from 'ava';
import { type Access, ANONYMOUS, PLAIN } from '../../nbd/access.ts';
import type { Export } from '../../nbd/export.ts';
import { NbdServer } from '../../nbd/server.ts';
import type { TlsAcceptor, TlsCredentials } from '../../nbd/tls.ts';
import {
  Authority,
  type Certificate,
  clientTemplate,
  credentialsOf,
  EXPIRED,
  newKey,
  SERVER,
} from './certificates.ts';
import {
  be,
  CMD,
  dataOf,
  exportOf,
  folder,
  infoData,
  KeptLog,
  MemorySource,
  metaData,
  OPT,
  option,
  pattern,
  RawClient,
  REP,
  soon,
  type World,
  world,
} from './world.ts';

/** Declares the tests for one implementation. */
export function testTls(make: (credentials: TlsCredentials) => TlsAcceptor): void {
  interface Certificates {
    readonly authority: Authority;
    readonly server: Certificate;
  }

  let shared: Promise<Certificates> | undefined;

  /** An authority and a server's certificate that all tests of this file may use. */
  function certificates(): Promise<Certificates> {
    shared ??= (async () => {
      const authority = await Authority.make(await mkdtemp(join(tmpdir(), 'stillblock-ca-')));
      return { authority, server: await authority.issue(SERVER) };
    })();
    return shared;
  }

  test.after.always(async () => {
    const made = await shared?.catch(() => undefined);
    if (made !== undefined) {
      await rm(made.authority.home, { recursive: true, force: true });
    }
  });

  interface Secured extends World {
    readonly tls: TlsAcceptor;
    /** What a client needs to believe the server. */
    readonly trust: ConnectionOptions;
    readonly authority: Authority;
    /** What a client with a certificate has. */
    client(name: string, ...more: string[]): Promise<ConnectionOptions>;
  }

  function presenting(made: Certificate): ConnectionOptions {
    return { cert: readFileSync(made.certificate), key: readFileSync(made.key) };
  }

  async function secured(
    t: ExecutionContext,
    options: {
      mode?: 'on' | 'require';
      clients?: 'optional' | 'required';
      access?: Access;
      exports?: Export[];
      limits?: Parameters<typeof world>[2];
    } = {},
  ): Promise<Secured> {
    const { authority, server } = await certificates();
    const clients = options.clients && { authority, required: options.clients === 'required' };
    const tls = make(credentialsOf(server, clients));
    const made = await world(t, options.exports ?? [data()], options.limits, {
      security: { tls, mode: options.mode ?? 'require' },
      ...(options.access && { access: options.access }),
    });
    const trust: ConnectionOptions = { ca: readFileSync(authority.certificate) };
    return {
      ...made,
      tls,
      trust,
      authority,
      client: async (name, ...more) => ({
        ...trust,
        ...presenting(await authority.issue(clientTemplate(name, ...more))),
      }),
    };
  }

  const BYTES = pattern(4 << 20);

  function data(name = 'disk'): Export {
    return exportOf(new MemorySource(BYTES), { name });
  }

  async function reads(t: ExecutionContext, client: RawClient): Promise<void> {
    const chunks = await client.ask({ type: CMD.read, length: BYTES.length });
    t.true(dataOf(chunks, 0, BYTES.length).equals(BYTES));
    await client.expectInStep();
  }

  async function eventually(what: string, holds: () => boolean): Promise<void> {
    let over = false;
    const wait = async (): Promise<void> => {
      while (!holds() && !over) {
        await new Promise(setImmediate);
      }
    };
    await soon(what, wait()).finally(() => {
      over = true;
    });
  }

  function reasons({ log }: World): unknown[] {
    return log.lines
      .filter(({ level }) => level === 'warn')
      .map(({ fields }) => ('reason' in fields ? fields.reason : undefined));
  }

  for (const version of ['TLSv1.2', 'TLSv1.3'] as const) {
    test(`${version}: the whole disk, with everything negotiated again within TLS`, async (t) => {
      const where = await secured(t);
      const plain = await where.connect();
      const client = await plain.openTls({
        ...where.trust,
        minVersion: version,
        maxVersion: version,
      });
      await client.haggleTo('disk', { contexts: ['base:allocation'] });
      await reads(t, client);
      client.send(
        Buffer.from(be([32, 0x25609513], [16, 0], [16, CMD.disc], [64, 1], [64, 0], [32, 0])),
      );
      await soon('the end', client.closed);
    });
  }

  for (const version of ['TLSv1', 'TLSv1.1'] as const) {
    test(`${version} is refused, and the log says so`, async (t) => {
      const where = await secured(t);
      const plain = await where.connect();
      const options: ConnectionOptions = {
        ...where.trust,
        minVersion: version,
        maxVersion: version,
        // Without this OpenSSL's client itself would refuse.
        ciphers: 'DEFAULT@SECLEVEL=0',
      };
      const error = await t.throwsAsync(plain.openTls(options));
      t.regex(error?.message ?? '', /protocol version/);
      t.deepEqual(reasons(where), ['TLS: unsupported protocol']);
    });
  }

  test('state from before TLS is gone: structured replies and contexts must be asked for again', async (t) => {
    const where = await secured(t, { mode: 'on' });
    const plain = await where.connect();
    await plain.open();
    await plain.expectAck(OPT.structuredReply);
    await plain.expectAck(OPT.setMetaContext, metaData('disk', 'base:allocation'));
    await plain.expectAck(OPT.startTls);
    const client = await plain.secure(where.trust);
    const refused = await client.haggle(OPT.setMetaContext, metaData('disk', 'base:allocation'));
    t.is(refused[0]?.type, REP.errInvalid);
    await client.expectAck(OPT.go, infoData('disk'));
    await client.expectInStep(false);
  });

  test('plain text behind STARTTLS in one segment is thrown away, never parsed after TLS starts', async (t) => {
    const where = await secured(t);
    const plain = await where.connect();
    await plain.open();
    // What a man in the middle would slip in before the client's own first message.
    plain.send(
      option(OPT.startTls),
      option(OPT.list),
      option(OPT.go, infoData('disk')),
      be([32, 1]),
    );
    t.is((await plain.optionReplies())[0]?.type, REP.ack);
    const client = await plain.secure(where.trust);
    // Only what is asked for within TLS is answered.
    t.is((await client.haggle(OPT.structuredReply))[0]?.option, OPT.structuredReply);
    await client.expectAck(OPT.go, infoData('disk'));
    await reads(t, client);
    const [line] = where.log.lines.filter(({ level }) => level === 'warn');
    t.is(line?.message, 'plain text behind STARTTLS is thrown away');
    t.like(line?.fields, { thrownAwayBytes: 16 + 16 + infoData('disk').length + 4 });
  });

  test('plain text in place of the TLS handshake ends the connection, and is not parsed', async (t) => {
    const where = await secured(t);
    const plain = await where.connect();
    await plain.open();
    await plain.expectAck(OPT.startTls);
    plain.send(option(OPT.go, infoData('disk')));
    const rest = await plain.readToEnd();
    t.false(rest.includes(be([64, 0x3e889045565a9n])));
    t.is(where.server.usage.connections, 0);
    t.regex(String(reasons(where)[0]), /^TLS: /);
  });

  test('before forced TLS: TLS_REQD over the socket, EXPORT_NAME closes', async (t) => {
    const where = await secured(t);
    const plain = await where.connect();
    await plain.open();
    t.is((await plain.haggle(OPT.list))[0]?.type, REP.errTlsReqd);
    t.is((await plain.haggle(OPT.go, infoData('disk')))[0]?.type, REP.errTlsReqd);
    plain.send(option(OPT.exportName, Buffer.from('disk')));
    t.is((await plain.readToEnd()).length, 0);
  });

  test('with TLS on, a client on this machine may do without', async (t) => {
    const where = await secured(t, { mode: 'on' });
    const plain = await where.connect();
    await plain.go();
    await reads(t, plain);
  });

  test('EXPORT_NAME within TLS', async (t) => {
    const where = await secured(t);
    const client = await (await where.connect()).openTls(where.trust);
    client.send(option(OPT.exportName, Buffer.from('disk')));
    t.is(Number((await client.read(10)).readBigUInt64BE(0)), BYTES.length);
    await client.expectInStep(false);
  });

  test('a client with a certificate is served, and the log names it', async (t) => {
    const where = await secured(t, { clients: 'required' });
    const client = await (await where.connect()).openTls(await where.client('proxy'));
    await client.haggleTo();
    await reads(t, client);
    const served = where.log.lines.find(({ message }) => message === 'client is served');
    t.like(served?.fields, { client: 'CN=proxy,O=Example', export: 'disk' });
  });

  /** A client that is dropped once its TLS handshake is over: in TLS 1.3 it may learn so later. */
  async function refused(where: Secured, options: ConnectionOptions): Promise<void> {
    const plain = await where.connect();
    await plain.open();
    await plain.expectAck(OPT.startTls);
    try {
      const client = await plain.secure(options);
      client.send(option(OPT.list));
      if ((await client.readToEnd()).length > 0) {
        throw new Error('it was answered');
      }
    } catch (error) {
      if (!/closed before TLS|ECONNRESET|EPIPE|disconnected|alert/.test(String(error))) {
        throw error;
      }
    }
  }

  test('a client without a certificate, where one is required', async (t) => {
    const where = await secured(t, { clients: 'required' });
    await refused(where, where.trust);
    t.deepEqual(reasons(where), ['TLS: client has no certificate of an authority of ours']);
  });

  test('a certificate that has expired', async (t) => {
    const where = await secured(t, { clients: 'required' });
    await refused(where, await where.client('late', ...EXPIRED));
    t.deepEqual(reasons(where), [
      "TLS: client's certificate is not good: it has expired (CN=late,O=Example)",
    ]);
  });

  test('a certificate of another authority of the same name', async (t) => {
    const where = await secured(t, { clients: 'required' });
    const other = await Authority.make(await folder(t));
    await refused(where, {
      ...where.trust,
      ...presenting(await other.issue(clientTemplate('proxy'))),
    });
    t.regex(String(reasons(where)[0]), /no authority of ours has signed it .*CN=proxy/);
  });

  test('a certificate that was revoked, after a reload', async (t) => {
    const where = await secured(t, { clients: 'required' });
    const stolen = await where.authority.issue(clientTemplate('stolen'));
    const options = { ...where.trust, ...presenting(stolen) };
    const before = await (await where.connect()).openTls(options);
    await before.haggleTo();
    const { server } = await certificates();
    const { certificates: files, ...rest } = credentialsOf(server, {
      authority: where.authority,
      required: true,
    });
    const revoked = readFileSync(await where.authority.revoke(stolen));
    where.tls.replace({ ...rest, ...(files && { certificates: { ...files, revoked } }) });
    await refused(where, options);
    t.regex(String(reasons(where)[0]), /it has been revoked/);
    await reads(t, before);
  });

  test('a wrong certificate is refused where none is needed', async (t) => {
    const where = await secured(t, { clients: 'optional' });
    await refused(where, await where.client('late', ...EXPIRED));
    const client = await (await where.connect()).openTls(where.trust);
    await client.haggleTo();
    await client.expectInStep();
    t.deepEqual(reasons(where), [
      "TLS: client's certificate is not good: it has expired (CN=late,O=Example)",
    ]);
  });

  test('a name that a client may not see is answered like one that does not exist', async (t) => {
    const access: Access = (client, name) =>
      client.kind === 'certificate' && client.commonNames.includes(name);
    const where = await secured(t, {
      clients: 'required',
      access,
      exports: [data('alice'), data('bob')],
    });
    where.server.setDefaultExport('bob');
    const options = await where.client('alice');
    const open = async (): Promise<RawClient> => (await where.connect()).openTls(options);
    const answers = async (name: string): Promise<unknown[]> => {
      const client = await open();
      await client.expectAck(OPT.structuredReply);
      const results: unknown[] = [];
      for (const [number, payload] of [
        [OPT.info, infoData(name, 1, 2, 3)],
        [OPT.listMetaContext, metaData(name)],
        [OPT.setMetaContext, metaData(name, 'base:allocation')],
        [OPT.go, infoData(name)],
      ] as const) {
        results.push(await client.haggle(number, payload));
      }
      client.send(option(OPT.exportName, Buffer.from(name)));
      results.push((await client.readToEnd()).toString('hex'));
      return results;
    };
    const unknown = await answers('eve');
    t.deepEqual(await answers('bob'), unknown);
    // The default export is bob's.
    t.deepEqual(await answers(''), unknown);
    const client = await open();
    const list = await client.expectAck(OPT.list);
    t.deepEqual(
      list.slice(0, -1).map(({ data: server }) => server.subarray(4).toString()),
      ['alice'],
    );
    await client.haggleTo('alice');
    await reads(t, client);
  });

  test('SELECTIVETLS: an export for clients within TLS alone', async (t) => {
    const access: Access = (client, name) => name === 'open' || client.kind !== 'plain';
    const where = await secured(t, {
      mode: 'on',
      access,
      exports: [data('open'), data('closed')],
    });
    const plain = await where.connect();
    await plain.open();
    t.is((await plain.expectAck(OPT.list)).length, 2);
    t.is((await plain.haggle(OPT.go, infoData('closed')))[0]?.type, REP.errTlsReqd);
    t.is((await plain.haggle(OPT.go, infoData('none')))[0]?.type, REP.errUnknown);
    await plain.expectAck(OPT.startTls);
    const client = await plain.secure(where.trust);
    t.is((await client.expectAck(OPT.list)).length, 3);
    await client.haggleTo('closed');
    await reads(t, client);
    t.true(access(ANONYMOUS, 'closed') && !access(PLAIN, 'closed'));
  });

  // ---- pre-shared keys

  async function withKeys(t: ExecutionContext, access?: Access): Promise<World & { key: Buffer }> {
    const key = newKey();
    const tls = make({ clientCertificates: 'none', keys: new Map([['alice', key]]) });
    const made = await world(
      t,
      [data('alice'), data('bob')],
      {},
      {
        security: { tls, mode: 'require' },
        ...(access && { access }),
      },
    );
    return { ...made, key };
  }

  function knowing(identity: string, psk: Buffer): ConnectionOptions {
    return {
      pskCallback: () => ({ identity, psk }),
      ciphers: 'DHE-PSK-AES128-GCM-SHA256:PSK:TLS_AES_128_GCM_SHA256',
      checkServerIdentity: () => undefined,
    };
  }

  for (const version of ['TLSv1.2', 'TLSv1.3'] as const) {
    const only = { minVersion: version, maxVersion: version };

    test(`a pre-shared key in ${version}, and what its user may see`, async (t) => {
      const where = await withKeys(t, (who, name) => who.kind === 'psk' && who.user === name);
      const client = await (await where.connect()).openTls({
        ...knowing('alice', where.key),
        ...only,
      });
      t.is((await client.expectAck(OPT.list)).length, 2);
      t.is((await client.haggle(OPT.info, infoData('bob')))[0]?.type, REP.errUnknown);
      await client.haggleTo('alice');
      await reads(t, client);
    });

    test(`an unknown user and a wrong key in ${version} fail alike`, async (t) => {
      const where = await withKeys(t);
      const errors: string[] = [];
      for (const [user, key] of [
        ['alice', newKey()],
        ['eve', where.key],
      ] as const) {
        const plain = await where.connect();
        const error = await t.throwsAsync(plain.openTls({ ...knowing(user, key), ...only }));
        errors.push(error?.message.replace(/^.*SSL routines:/, '') ?? '');
      }
      t.is(errors[0], errors[1]);
      t.is(reasons(where)[0], reasons(where)[1]);
      t.is(where.server.usage.connections, 0);
    });
  }

  // ---- reload

  test('a reload serves new clients with the new certificate and leaves the old ones alone', async (t) => {
    const where = await secured(t);
    const before = await (await where.connect()).openTls(where.trust);
    await before.haggleTo();
    const other = await Authority.make(await folder(t), 'another');
    where.tls.replace(credentialsOf(await other.issue(SERVER)));
    await reads(t, before);
    const plain = await where.connect();
    await t.throwsAsync(plain.openTls(where.trust));
    const after = await (await where.connect()).openTls({ ca: readFileSync(other.certificate) });
    await after.haggleTo();
    await reads(t, after);
    await reads(t, before);
  });

  test('a broken reload keeps what was there', async (t) => {
    const where = await secured(t);
    const { server, authority } = await certificates();
    const good = credentialsOf(server);
    const foreign = await authority.issue(SERVER);
    const expired = await authority.issue([...SERVER, ...EXPIRED]);
    const certificate = readFileSync(server.certificate);
    for (const [bad, message] of [
      [{ ...good, certificates: { certificate, key: readFileSync(foreign.key) } }, /not that of/],
      [{ ...good, certificates: { certificate, key: Buffer.from('nonsense') } }, /./],
      [{ ...good, certificates: { certificate: Buffer.alloc(0), key: Buffer.alloc(0) } }, /./],
      [credentialsOf(expired), /expired on/],
      [{ clientCertificates: 'none' }, /neither/],
    ] as const) {
      t.throws(() => where.tls.replace(bad), { message });
    }
    const client = await (await where.connect()).openTls(where.trust);
    await client.haggleTo();
    await reads(t, client);
  });

  test('a client that finds our certificate wrong: the log says what it said', async (t) => {
    const where = await secured(t);
    const plain = await where.connect();
    await plain.open();
    await plain.expectAck(OPT.startTls);
    await t.throwsAsync(plain.secure({}));
    await eventually('a word in the log', () => reasons(where).length > 0);
    t.regex(String(reasons(where)[0]), /^TLS: /);
  });

  // ---- hostile peers

  test.serial('the deadline holds within the TLS handshake', async (t) => {
    const where = await secured(t, { limits: { handshakeMs: 200 } });
    const plain = await where.connect();
    await plain.open();
    await plain.expectAck(OPT.startTls);
    // The beginning of a client hello, and silence.
    plain.send(Buffer.from([0x16, 0x03, 0x01, 0x02, 0x00, 0x01]));
    await soon('the drop', plain.closed);
    t.deepEqual(reasons(where), ['handshake took too long']);
    await eventually('the handshake to be forgotten', () => where.server.usage.handshakes === 0);
  });

  test.serial('the deadline holds behind the TLS handshake', async (t) => {
    const where = await secured(t, { limits: { handshakeMs: 2_000 } });
    const client = await (await where.connect()).openTls(where.trust);
    await soon('the drop', client.closed);
    t.deepEqual(reasons(where), ['handshake took too long']);
  });

  test('beyond the cap of handshakes the oldest in TLS makes room', async (t) => {
    const where = await secured(t, { limits: { handshakes: 2, handshakeMs: 1_000_000 } });
    const held: RawClient[] = [];
    for (let index = 0; index < 2; index += 1) {
      const plain = await where.connect();
      await plain.open();
      await plain.expectAck(OPT.startTls);
      held.push(plain);
    }
    const client = await (await where.connect()).openTls(where.trust);
    await client.haggleTo();
    await soon('the oldest to go', held[0]?.closed ?? Promise.resolve());
    await reads(t, client);
    t.is(where.server.usage.handshakes, 1);
  });

  test('a client that leaves in the middle of TLS is not missed', async (t) => {
    const where = await secured(t);
    for (const bytes of [0, 5, 100]) {
      const plain = await where.connect();
      await plain.open();
      await plain.expectAck(OPT.startTls);
      plain.send(Buffer.from([0x16, 0x03, 0x01, 0x02, 0x00, ...new Array<number>(bytes).fill(1)]));
      plain.destroy();
    }
    const client = await (await where.connect()).openTls(where.trust);
    await client.haggleTo();
    await reads(t, client);
    client.destroy();
    await soon('the server to close', where.server.close());
  });

  test('a server that closes while TLS begins waits for nobody', async (t) => {
    const where = await secured(t);
    const plain = await where.connect();
    await plain.open();
    await plain.expectAck(OPT.startTls);
    await soon('the server to close', where.server.close());
    await soon('the client to be dropped', plain.closed);
    t.is(where.server.usage.handshakes, 0);
  });

  test('a record that was tampered with ends the connection', async (t) => {
    const where = await secured(t);
    const plain = await where.connect();
    const client = await plain.openTls(where.trust);
    await client.haggleTo();
    plain.socket.write(
      Buffer.from([0x17, 0x03, 0x03, 0x00, 0x20, ...new Array<number>(32).fill(7)]),
    );
    await eventually('the drop', () => where.server.usage.connections === 0);
    t.true(where.log.lines.some(({ message }) => message === 'connection lost'));
  });

  // ---- where TLS is required

  test('what other machines can reach is served within TLS only', async (t) => {
    const { server: made } = await certificates();
    const log = new KeptLog();
    const bare = new NbdServer({ logger: log });
    t.teardown(() => bare.close());
    for (const host of ['0.0.0.0', '::']) {
      await t.throwsAsync(bare.listen({ host, port: 0 }), { code: 'TLS_REQUIRED' });
    }
    await bare.listen({ host: '127.0.0.1', port: 0 });
    t.true(bare.uris('x').every((uri) => uri.startsWith('nbd://127.0.0.1')));
    await bare.listen({ host: '0.0.0.0', port: 0 }, { insecure: true });
    t.is(log.lines.filter(({ level }) => level === 'warn').length, 1);

    const tls = make(credentialsOf(made));
    const optional = new NbdServer({ logger: log, security: { tls, mode: 'on' } });
    t.teardown(() => optional.close());
    await optional.listen({ host: '127.0.0.1', port: 0 });
    t.deepEqual(
      optional.uris('x').map((uri) => uri.split(':')[0]),
      ['nbds', 'nbd'],
    );
    const listening = await optional.listen({ host: '0.0.0.0', port: 0 });
    const port = 'port' in listening ? listening.port : 0;
    t.true(
      optional
        .uris('x')
        .slice(2)
        .every((uri) => uri.startsWith('nbds://')),
    );
    const plain = await RawClient.connect({ host: '127.0.0.1', port });
    await plain.open();
    t.is((await plain.haggle(OPT.list))[0]?.type, REP.errTlsReqd);
    plain.destroy();
  });
}
