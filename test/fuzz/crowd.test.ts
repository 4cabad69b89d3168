// SPDX-License-Identifier: Apache-2.0
/** Many hostile clients at once: they delay nobody, and they hold no more than limits.ts says. */
import { writeFile } from 'node:fs/promises';
import { connect, type Socket } from 'node:net';
import { join } from 'node:path';
import test, { type ExecutionContext } from 'ava';
import { DEFAULT_LIMITS, mostClientBytes } from '../../nbd/limits.ts';
import { CMD, infoData, OPT, optionBytes, requestBytes } from './protocol.ts';
import { Random } from './random.ts';
import { type Address, ServerProcess } from './serving.ts';

const MIB = 1 << 20;
const SIZE = 40 * MIB;
const CLIENT_FLAGS = Buffer.from([0, 0, 0, 3]);
const GO = optionBytes(OPT.go, infoData('disk', []));
const HANDSHAKE = Buffer.concat([
  CLIENT_FLAGS,
  optionBytes(OPT.structuredReply, Buffer.alloc(0)),
  GO,
]);

async function serve(t: ExecutionContext): Promise<{ server: ServerProcess; data: Buffer }> {
  const data = Buffer.alloc(SIZE);
  const random = new Random(3);
  for (let at = 0; at < SIZE; at += 512) {
    data.writeUInt32LE(random.u32(), at);
  }
  const server = await ServerProcess.start(async (home) => {
    await writeFile(join(home, 'disk'), data);
    return ['--export', `disk=${join(home, 'disk')}`];
  });
  t.teardown(() => server.end());
  return { server, data };
}

function open(t: ExecutionContext, address: Address): Socket {
  const socket = connect(address);
  // A reset is one way of being dropped.
  socket.on('error', () => {});
  t.teardown(() => socket.destroy());
  return socket;
}

function closed(socket: Socket): Promise<void> {
  return new Promise((resolve) => {
    socket.once('close', () => resolve());
  });
}

/** A client that does everything right: connects, reads a little, checks it, says goodbye. */
async function goodClient(address: Address, data: Buffer, offset: number): Promise<number> {
  const began = performance.now();
  const socket = connect(address);
  const length = 16_384;
  const read = requestBytes({
    extended: false,
    flags: 0,
    type: CMD.read,
    cookie: 7n,
    offset: BigInt(offset),
    length: BigInt(length),
  });
  socket.write(Buffer.concat([CLIENT_FLAGS, GO, read]));
  let received = Buffer.alloc(0);
  const wanted = 18 + 20 + 12 + 20 + 16 + length;
  for await (const chunk of socket) {
    received = Buffer.concat([received, chunk as Buffer]);
    if (received.length >= wanted) {
      break;
    }
  }
  socket.destroy();
  if (!received.subarray(wanted - length).equals(data.subarray(offset, offset + length))) {
    throw new Error(`wrong data, ${received.length} bytes`);
  }
  return performance.now() - began;
}

/** The longest that any of 20 good clients takes, each of them ten times, milliseconds. */
async function slowestGoodClient(address: Address, data: Buffer): Promise<number> {
  const times = await Promise.all(
    Array.from({ length: 20 }, async (_, index) => {
      let slowest = 0;
      for (let turn = 0; turn < 10; turn += 1) {
        const offset = (index * 10 + turn) * 65_536;
        slowest = Math.max(slowest, await goodClient(address, data, offset));
      }
      return slowest;
    }),
  );
  return Math.max(...times);
}

/** The quickest of three rounds: what else the machine does is no fault of the server. */
async function quickestRound(address: Address, data: Buffer): Promise<number> {
  const rounds: number[] = [];
  for (let round = 0; round < 3; round += 1) {
    rounds.push(await slowestGoodClient(address, data));
  }
  return Math.min(...rounds);
}

for (const transport of ['unix', 'tcp'] as const) {
  // These measure time, so they run one after the other.
  test.serial(
    `250 held connections and dribblers delay no good client, over ${transport}`,
    async (t) => {
      t.timeout(3 * 60_000);
      const { server, data } = await serve(t);
      const address = server[transport];
      const alone = await quickestRound(address, data);

      const started = performance.now();
      // At all places where a handshake can stop.
      const lifetimes = Array.from({ length: 220 }, async (_, index) => {
        const socket = open(t, address);
        socket.resume();
        socket.write(HANDSHAKE.subarray(0, index % (HANDSHAKE.length - 1)));
        await closed(socket);
        return performance.now() - started;
      });
      const dribblers = Array.from({ length: 30 }, (_, index) => {
        const socket = open(t, address);
        socket.resume();
        // Half of them never end the handshake, half dribble requests once they are through.
        const never = index % 2 === 0;
        const requests = Buffer.concat(
          Array.from({ length: 400 }, (_none, at) =>
            requestBytes({
              extended: false,
              flags: 0,
              type: CMD.read,
              cookie: BigInt(at),
              offset: BigInt(at * 512),
              length: 512n,
            }),
          ),
        );
        const stream = never ? HANDSHAKE : Buffer.concat([HANDSHAKE, requests]);
        let at = never ? 0 : HANDSHAKE.length;
        if (!never) {
          socket.write(HANDSHAKE);
        }
        const timer = setInterval(() => {
          socket.write(stream.subarray(at, at + 1));
          at = never ? Math.min(at + 1, HANDSHAKE.length - 1) : at + 1;
        }, 10);
        socket.once('close', () => clearInterval(timer));
        t.teardown(() => clearInterval(timer));
        return { socket, never, ended: closed(socket) };
      });
      const crowded = await quickestRound(address, data);
      t.true(performance.now() - started < DEFAULT_LIMITS.handshakeMs, 'they were held meanwhile');
      t.true(crowded <= alone + 50, `${crowded} ms among them, ${alone} ms alone`);
      t.log(
        `${transport}: slowest of 20 clients ${alone.toFixed(1)} ms alone, ${crowded.toFixed(1)} ms among 250`,
      );

      // A deadline is not to be put off by dribbling, and is none for those who are served.
      const ages = await Promise.all(lifetimes);
      await Promise.all(dribblers.filter(({ never }) => never).map(({ ended }) => ended));
      // With 20 good clients beside them they are more than may be in handshake: the oldest go.
      const early = ages.filter((age) => age < DEFAULT_LIMITS.handshakeMs - 1000);
      t.true(early.length <= 250 + 20 - DEFAULT_LIMITS.handshakes, `${early.length} went early`);
      t.true(Math.max(...ages) < DEFAULT_LIMITS.handshakeMs + 5000, `${Math.max(...ages)}`);
      t.true(dribblers.filter(({ never }) => !never).every(({ socket }) => !socket.destroyed));
      for (const { socket } of dribblers) {
        socket.destroy();
      }
      await goodClient(address, data, 512);
    },
  );

  test.serial(
    `500 clients that ask for all they may and fetch nothing, over ${transport}`,
    async (t) => {
      t.timeout(3 * 60_000);
      const { server, data } = await serve(t);
      const address = server[transport];
      const before = await server.residentBytes();
      const random = new Random(5);
      const sockets: Socket[] = [];
      // In groups, since no more than that may be in handshake.
      for (let group = 0; group < 5; group += 1) {
        const opened = Array.from({ length: 100 }, (_, index) => {
          const socket = open(t, address);
          // The longest reads, those that fill the largest buffers worst, and whole pieces.
          const length = [32 * MIB, MIB / 2 + 1, MIB][index % 3] ?? MIB;
          const requests = Array.from({ length: DEFAULT_LIMITS.requestsInFlight }, () =>
            requestBytes({
              extended: false,
              flags: 0,
              type: CMD.read,
              cookie: random.u64(),
              offset: BigInt(random.below(SIZE - length)),
              length: BigInt(length),
            }),
          );
          // Every other one in simple replies, which one long read has to itself.
          const greeting = index % 2 === 0 ? HANDSHAKE : Buffer.concat([CLIENT_FLAGS, GO]);
          socket.write(Buffer.concat([greeting, ...requests]));
          return new Promise<Socket>((resolve, reject) => {
            socket.once('readable', () => resolve(socket));
            socket.once('close', () => reject(new Error('it is not served')));
          });
        });
        sockets.push(...(await Promise.all(opened)));
      }
      // Until it grows no more: it holds then what it may.
      let most = before;
      let steady = 0;
      while (steady < 10) {
        await new Promise((resolve) => setTimeout(resolve, 200));
        const now = await server.residentBytes();
        steady = now > most + MIB ? 0 : steady + 1;
        most = Math.max(most, now);
      }
      const grown = most - before;
      const bound = mostClientBytes(DEFAULT_LIMITS);
      t.log(
        `${transport}: ${Math.round(grown / MIB)} MiB held, ${Math.round(bound / MIB)} MiB allowed`,
      );
      t.true(grown <= bound, `${grown} bytes held, ${bound} allowed`);
      // They have been given something to hold, and a good client is served beside them.
      t.true(grown > 100 * MIB);
      const waited = await goodClient(address, data, 4096);
      t.true(waited < 5000, `it waited ${waited} ms`);
      for (const socket of sockets) {
        socket.destroy();
      }
      await goodClient(address, data, 8192);
    },
  );
}
