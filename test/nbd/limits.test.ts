// SPDX-License-Identifier: Apache-2.0
/** What a peer can make the server hold, wait for or repeat: bounded, each of it. */
import test from 'ava';
import { BufferPool, ConnectionBudget, SharedBudget } from '../../nbd/budget.ts';
import { DEFAULT_LIMITS, resolveLimits } from '../../nbd/limits.ts';
import {
  be,
  CMD,
  dataOf,
  exportOf,
  infoData,
  MemorySource,
  OPT,
  option,
  pattern,
  type RawClient,
  REP,
  request,
  settled,
  soon,
  world,
} from './world.ts';

const MIB = 1 << 20;

test('limits that contradict themselves are refused', (t) => {
  for (const bad of [
    { handshakes: 0 },
    { drainMs: 1.5 },
    { connectionBytesInFlight: 10, pieceBytes: 11 },
    { statusExtents: 4, contexts: 5 },
  ]) {
    t.throws(() => resolveLimits(bad), { instanceOf: RangeError });
  }
  t.deepEqual(resolveLimits(), DEFAULT_LIMITS);
});

// These two measure time, so they run before the others load the machine.
test.serial('a handshake that takes too long is dropped, wherever it stands', async (t) => {
  const { connect, log } = await world(t, [exportOf(new MemorySource(pattern(512)))], {
    handshakeMs: 50,
  });
  const silent = await connect();
  const slow = await connect();
  await slow.open();
  slow.send(option(OPT.go, infoData('disk')).subarray(0, 20));
  await soon('both to be dropped', Promise.all([silent.closed, slow.closed]));
  t.is(log.lines.filter(({ level }) => level === 'warn').length, 2);
});

test.serial('the deadline is for the handshake only', async (t) => {
  const { connect } = await world(t, [exportOf(new MemorySource(pattern(512)))], {
    handshakeMs: 2_000,
  });
  const served = await connect();
  await served.go();
  const witness = await connect();
  await soon('the witness to be dropped', witness.closed);
  await served.expectInStep();
  t.pass();
});

test('250 held connections do not delay a good client', async (t) => {
  const { connect, server } = await world(t, [exportOf(new MemorySource(pattern(512)))]);
  const held: RawClient[] = [];
  for (let index = 0; index < 250; index += 1) {
    const raw = await connect();
    await raw.greeting();
    held.push(raw);
  }
  t.is(server.usage.handshakes, 250);
  const good = await connect();
  await good.go();
  await good.expectInStep();
  t.is(server.usage.handshakes, 250);
});

test('beyond the cap of handshakes the oldest makes room', async (t) => {
  const { connect, server } = await world(t, [exportOf(new MemorySource(pattern(512)))], {
    handshakes: 3,
    // What is dropped here is not dropped for being slow.
    handshakeMs: 1_000_000,
  });
  const held: RawClient[] = [];
  for (let index = 0; index < 3; index += 1) {
    const raw = await connect();
    await raw.open();
    held.push(raw);
  }
  const good = await connect();
  await good.go();
  await soon('the oldest to be dropped', held[0]?.closed ?? Promise.resolve());
  await held[1]?.expectAck(OPT.list);
  await held[2]?.expectAck(OPT.list);
  t.deepEqual(server.usage, { handshakes: 2, connections: 1, bytesInFlight: 0 });
});

test('beyond the cap of connections GO is refused, and possible again when one leaves', async (t) => {
  const { connect } = await world(t, [exportOf(new MemorySource(pattern(512)))], {
    connections: 1,
  });
  const first = await connect();
  await first.go();
  const second = await connect();
  await second.open();
  t.is((await second.haggle(OPT.go, infoData('disk')))[0]?.type, REP.errPolicy);
  first.send(request({ type: CMD.disc }));
  await soon('the first to leave', first.closed);
  const goes = async (): Promise<boolean> =>
    (await second.haggle(OPT.go, infoData('disk'))).at(-1)?.type === REP.ack;
  const admitted = async (): Promise<void> => {
    while (!(await goes())) {}
  };
  await soon('GO to be possible', admitted());
  await second.expectInStep(false);
  const third = await connect();
  await third.open();
  third.send(option(OPT.exportName, Buffer.from('disk')));
  t.is((await third.readToEnd()).length, 0);
});

test('too many options close the connection', async (t) => {
  const { connect } = await world(t, [exportOf(new MemorySource(pattern(512)))], { options: 20 });
  const raw = await connect();
  await raw.open();
  raw.send(...Array.from({ length: 21 }, () => option(OPT.list)));
  for (let index = 0; index < 20; index += 1) {
    t.is((await raw.optionReplies()).at(-1)?.type, REP.ack);
  }
  t.is((await raw.readToEnd()).length, 0);
});

test('a client that fetches no option replies is not answered on', async (t) => {
  const source = new MemorySource(pattern(512));
  const names = Array.from({ length: 200 }, (_, index) => `${'n'.repeat(2000)}${index}`);
  const exports = names.map((name) => exportOf(source, { name }));
  const { connect, server } = await world(t, exports, { options: 10_000 });
  const raw = await connect();
  await raw.open();
  raw.socket.pause();
  // 4,000 lists of 400 KB each would be 1.6 GB.
  raw.send(...Array.from({ length: 4000 }, () => option(OPT.list)));
  const other = await connect();
  await other.go(names[7]);
  await other.expectInStep();
  t.true(process.memoryUsage.rss() < 700 * MIB, `${process.memoryUsage.rss()} bytes`);
  t.is(server.usage.handshakes, 1);
});

test('requests beyond the limit wait until others are answered', async (t) => {
  const source = new MemorySource(pattern(MIB));
  const where = await world(t, [exportOf(source)], { requestsInFlight: 4 });
  const raw = await where.connect();
  await raw.go();
  source.hold();
  raw.send(
    ...Array.from({ length: 50 }, (_, index) =>
      request({ type: CMD.read, offset: index, length: 1000, cookie: BigInt(index) }),
    ),
  );
  await source.waitHeld(4);
  await settled(where);
  t.is(source.heldCount, 4);
  source.release();
  const seen = new Set<bigint>();
  for (let index = 0; index < 50; index += 1) {
    const chunks = await raw.reply();
    const cookie = chunks[0]?.cookie ?? -1n;
    const at = Number(cookie);
    t.deepEqual(dataOf(chunks, at, 1000), source.data.subarray(at, at + 1000));
    seen.add(cookie);
  }
  t.is(seen.size, 50);
});

test('a client that fetches no replies holds its bytes, and no more', async (t) => {
  const source = new MemorySource(pattern(8 * MIB));
  const { connect, server } = await world(t, [exportOf(source)], {
    connectionBytesInFlight: 4 * MIB,
  });
  const raw = await connect();
  await raw.go();
  raw.socket.pause();
  raw.send(...Array.from({ length: 100 }, () => request({ type: CMD.read, length: 8 * MIB })));
  const other = await connect();
  await other.go();
  const chunks = await other.ask({ type: CMD.read, length: 8 * MIB });
  t.true(dataOf(chunks, 0, 8 * MIB).equals(source.data));
  t.true(server.usage.bytesInFlight <= 4 * MIB);
  raw.socket.resume();
  let bytes = 0;
  for (let open = 100; open > 0; ) {
    const { flags, payload } = await raw.chunk();
    bytes += payload.length - 8;
    open -= flags & 1;
  }
  t.is(bytes, 800 * MIB);
  await raw.expectInStep();
});

test('clients that fetch nothing leave each other one the piece that it needs', async (t) => {
  const source = new MemorySource(pattern(4 * MIB));
  const { connect, server } = await world(t, [exportOf(source)], {
    bytesInFlight: 2 * MIB,
  });
  const stuck: RawClient[] = [];
  for (let index = 0; index < 8; index += 1) {
    const raw = await connect();
    await raw.go('disk', { structured: index % 2 === 0 });
    raw.socket.pause();
    raw.send(...Array.from({ length: 20 }, () => request({ type: CMD.read, length: 4 * MIB })));
    stuck.push(raw);
  }
  for (const structured of [true, false]) {
    const raw = await connect();
    await raw.go('disk', { structured });
    raw.send(request({ type: CMD.read, length: 4 * MIB }));
    if (structured) {
      t.true(dataOf(await raw.reply(), 0, 4 * MIB).equals(source.data));
    } else {
      await raw.simpleReply();
      t.true((await raw.read(4 * MIB)).equals(source.data));
    }
  }
  t.true(server.usage.bytesInFlight <= 10 * MIB, `${server.usage.bytesInFlight} bytes`);
  for (const raw of stuck) {
    raw.destroy();
  }
  await soon('the server to close', server.close());
  t.is(server.usage.bytesInFlight, 0);
});

test('a payload of 4 GiB is announced: nothing is allocated for it', async (t) => {
  const { connect, server } = await world(t, [exportOf(new MemorySource(pattern(512)))]);
  const raw = await connect();
  await raw.go();
  raw.send(request({ type: CMD.write, length: 0xffffffff }), Buffer.alloc(MIB));
  const other = await connect();
  await other.go();
  await other.expectInStep();
  t.is(server.usage.bytesInFlight, 0);
  raw.socket.end();
  // Its payload will not come any more, and the refusal is not waited for.
  t.is((await raw.readToEnd()).length, 0);
});

test('half a message in the handshake waits without being put together again and again', async (t) => {
  const { connect } = await world(t, [exportOf(new MemorySource(pattern(512)))]);
  const raw = await connect();
  await raw.open();
  const whole = option(4711, Buffer.alloc(65_536));
  for (let at = 0; at < whole.length; at += 64) {
    raw.send(whole.subarray(at, at + 64));
  }
  t.is((await raw.optionReplies())[0]?.type, REP.errUnsup);
  raw.send(be([64, 0]));
  t.is((await raw.readToEnd()).length, 0);
});

// ---- the budget by itself

test('a connection may always hold one piece, whatever the others hold', async (t) => {
  const shared = new SharedBudget(100);
  const greedy = new ConnectionBudget(shared, 1000);
  const modest = new ConnectionBudget(shared, 1000);
  t.true(greedy.tryTake(100));
  t.false(greedy.tryTake(1));
  t.true(modest.tryTake(60));
  t.false(modest.tryTake(1));
  t.is(shared.usedBytes, 160);
  const waiting = modest.take(30);
  greedy.give(100);
  await soon('the grant', waiting);
  t.is(shared.usedBytes, 90);
});

test('grants come in the order of asking', async (t) => {
  const shared = new SharedBudget(100);
  const budget = new ConnectionBudget(shared, 50);
  t.true(budget.tryTake(30));
  const granted: string[] = [];
  const large = budget.take(40).then(() => granted.push('large'));
  const small = budget.take(10).then(() => granted.push('small'));
  t.false(budget.tryTake(10), 'nobody passes those who wait');
  t.is(shared.usedBytes, 30);
  budget.give(30);
  await soon('both', Promise.all([large, small]));
  t.deepEqual(granted, ['large', 'small']);
  t.is(shared.usedBytes, 50);
  budget.give(50);
  t.is(shared.usedBytes, 0);
});

test('what is given back goes round among the connections that wait', async (t) => {
  const shared = new SharedBudget(10);
  const holder = new ConnectionBudget(shared, 100);
  t.true(holder.tryTake(10));
  const order: string[] = [];
  const waits: Promise<unknown>[] = [];
  const budgets = ['a', 'b'].map((name) => {
    const budget = new ConnectionBudget(shared, 100);
    t.true(budget.tryTake(1));
    for (let turn = 0; turn < 2; turn += 1) {
      waits.push(budget.take(4).then(() => order.push(name)));
    }
    return budget;
  });
  holder.give(10);
  for (const budget of budgets) {
    budget.give(1);
  }
  for (let index = 0; index < 4; index += 1) {
    await soon('a grant', Promise.race(waits.slice(index)));
    budgets[order.at(-1) === 'a' ? 0 : 1]?.give(4);
  }
  await soon('all grants', Promise.all(waits));
  t.is(order.filter((name) => name === 'a').length, 2);
  t.is(order.length, 4);
});

test('the pool keeps no more than its limit and gives buffers out again', (t) => {
  const pool = new BufferPool(3 * MIB);
  const buffers = Array.from({ length: 4 }, () => pool.take(MIB));
  t.true(buffers.every(({ length }) => length >= MIB + 28));
  for (const buffer of buffers) {
    pool.give(buffer);
  }
  t.true(pool.idleBytes <= 3 * MIB && pool.idleBytes >= 2 * MIB);
  t.true(buffers.includes(pool.take(MIB)));
  pool.give(pool.take(100));
  t.true(pool.take(8193).length >= 8193 + 28);
});
