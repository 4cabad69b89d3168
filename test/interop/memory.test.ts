// SPDX-License-Identifier: Apache-2.0
/** What 500 clients that ask for as much as they may, and fetch nothing, make the server hold. */
import { readFileSync } from 'node:fs';
import { readFile, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import test, { type ExecutionContext } from 'ava';
import { DEFAULT_LIMITS, mostClientBytes } from '../../nbd/limits.ts';
import { Authority, conventionalFolder, SERVER } from '../nbd/certificates.ts';
import { CMD, folder, OPT, pattern, RawClient, request } from '../nbd/world.ts';
import { Serving } from './command.ts';

const MIB = 1 << 20;
const CLIENTS = 500;
const SIZE = 48 * MIB;
const DATA = pattern(SIZE);

/** Memory of a process, bytes: now, or the most so far. */
async function memoryOf(pid: number, what: 'VmRSS' | 'VmHWM'): Promise<number> {
  const status = await readFile(`/proc/${pid}/status`, 'utf8');
  return Number(new RegExp(`^${what}:\\s+(\\d+) kB$`, 'm').exec(status)?.[1]) * 1024;
}

async function crowd(
  t: ExecutionContext,
  args: readonly string[],
  begin: (client: RawClient) => Promise<RawClient>,
  tls: boolean,
): Promise<void> {
  const home = await folder(t);
  const path = join(home, 'sock');
  await writeFile(join(home, 'disk'), DATA);
  const serving = await Serving.start(
    t,
    ...['-U', path, '--export', `disk=${join(home, 'disk')}`, ...args],
  );
  const { pid = 0 } = serving.process;
  const clients: RawClient[] = [];
  t.teardown(() => {
    for (const client of clients) {
      client.destroy();
    }
  });
  const before = await memoryOf(pid, 'VmRSS');
  for (let index = 0; index < CLIENTS; index += 1) {
    const client = await begin(await RawClient.connect({ path }));
    clients.push(client);
    await client.haggleTo('disk', { structured: index % 2 === 0 });
    client.socket.pause();
    client.send(
      ...Array.from({ length: DEFAULT_LIMITS.requestsInFlight + 1 }, () =>
        request({ type: CMD.read, length: DEFAULT_LIMITS.readBytes, offset: index * 512 }),
      ),
    );
  }
  // Whoever comes now is served, piece by piece, while all others fill what they may.
  const good = await begin(await RawClient.connect({ path }));
  clients.push(good);
  await good.haggleTo('disk', { structured: false });
  for (let turn = 0; turn < 40; turn += 1) {
    good.send(request({ type: CMD.read, length: MIB, offset: turn * MIB }));
    t.is((await good.simpleReply()).error, 0);
    t.true((await good.read(MIB)).equals(DATA.subarray(turn * MIB, (turn + 1) * MIB)));
  }
  const most = (await memoryOf(pid, 'VmHWM')) - before;
  const bound = mostClientBytes(DEFAULT_LIMITS, tls);
  t.log(`${Math.round(most / MIB)} MiB of at most ${Math.round(bound / MIB)} MiB`);
  t.true(most <= bound, `${most} bytes`);
  // It is not for lack of asking: they do hold what they may.
  t.true(most >= DEFAULT_LIMITS.bytesInFlight, `${most} bytes`);
  for (const client of clients) {
    client.destroy();
  }
  t.is(await serving.end(), 0);
}

test('500 connections that ask for as much as they may stay within the bound', async (t) => {
  await crowd(
    t,
    [],
    async (client) => {
      await client.open();
      return client;
    },
    false,
  );
});

test('500 connections within TLS stay within its bound', async (t) => {
  const home = await folder(t);
  const authority = await Authority.make(join(home, 'ca'));
  const server = await authority.issue(SERVER);
  const dir = await conventionalFolder(join(home, 'server'), authority, { server });
  const ca = readFileSync(authority.certificate);
  await crowd(
    t,
    ['--tls-certificates', dir],
    async (client) => {
      await client.open();
      await client.expectAck(OPT.startTls);
      return client.secure({ ca });
    },
    true,
  );
});
