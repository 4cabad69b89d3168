// SPDX-License-Identifier: Apache-2.0
/** 250 clients that stop in the handshake or dribble, and 20 good ones beside them. */
import { writeFile } from 'node:fs/promises';
import { connect, type Socket } from 'node:net';
import { join } from 'node:path';
import { CMD, infoData, OPT, optionBytes, requestBytes } from './protocol.ts';
import { Random } from './random.ts';
import { type Address, ServerProcess } from './serving.ts';

const MIB = 1 << 20;
/** Size of the export `disk`, bytes. */
export const CROWD_DISK_BYTES: number = 40 * MIB;
/** Clients that do not get on. */
export const CROWD = 250;
/** Good clients at a time. */
export const GOOD_CLIENTS = 20;
const DRIBBLERS = 30;
const DRIBBLE_MS = 10;
export const CLIENT_FLAGS: Buffer = Buffer.from([0, 0, 0, 3]);
export const GO: Buffer = optionBytes(OPT.go, infoData('disk', []));
export const HANDSHAKE: Buffer = Buffer.concat([
  CLIENT_FLAGS,
  optionBytes(OPT.structuredReply, Buffer.alloc(0)),
  GO,
]);

/**
 * A server of random data, to be ended by the caller.
 *
 * @param args more arguments of `stillblock nbd`
 */
export async function serveCrowd(
  args: readonly string[] = [],
): Promise<{ server: ServerProcess; data: Buffer }> {
  const data = Buffer.alloc(CROWD_DISK_BYTES);
  const random = new Random(3);
  for (let at = 0; at < data.length; at += 512) {
    data.writeUInt32LE(random.u32(), at);
  }
  const server = await ServerProcess.start(async (home) => {
    await writeFile(join(home, 'disk'), data);
    return ['--export', `disk=${join(home, 'disk')}`, ...args];
  });
  return { server, data };
}

export function readRequest(cookie: bigint, offset: number, length: number): Buffer {
  return requestBytes({
    extended: false,
    flags: 0,
    type: CMD.read,
    cookie,
    offset: BigInt(offset),
    length: BigInt(length),
  });
}

/**
 * A client that does everything right: connects, reads a little, checks it.
 *
 * @returns how long all of that took, milliseconds
 */
export async function goodClient(address: Address, data: Buffer, offset: number): Promise<number> {
  const began = performance.now();
  const socket = connect(address);
  const length = 16_384;
  socket.write(Buffer.concat([CLIENT_FLAGS, GO, readRequest(7n, offset, length)]));
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

/** The longest that any of the good clients takes, each of them ten times, milliseconds. */
async function slowestGoodClient(address: Address, data: Buffer): Promise<number> {
  const times = await Promise.all(
    Array.from({ length: GOOD_CLIENTS }, async (_, index) => {
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

/** One client of the crowd. */
interface Member {
  readonly socket: Socket;
  /** It has got through the handshake, and dribbles requests. */
  readonly served: boolean;
  /** When it was closed, milliseconds after it came. */
  readonly ended: Promise<number>;
}

/** Connects one, which sends the rest of its bytes one by one. */
function enter(address: Address, atOnce: Buffer, dribbled: Buffer, served: boolean): Member {
  const socket = connect(address);
  const began = performance.now();
  // A reset is one way of being dropped.
  socket.on('error', () => {});
  socket.resume();
  socket.write(atOnce);
  let at = 0;
  const timer =
    dribbled.length === 0
      ? undefined
      : setInterval(() => {
          socket.write(dribbled.subarray(at, at + 1));
          at += 1;
        }, DRIBBLE_MS);
  const ended = new Promise<number>((resolve) => {
    socket.once('close', () => {
      clearInterval(timer);
      resolve(performance.now() - began);
    });
  });
  return { socket, served, ended };
}

/** Gathers the crowd: at all places where a handshake can stop, and dribblers of both kinds. */
export function gather(address: Address): Member[] {
  const held = Array.from({ length: CROWD - DRIBBLERS }, (_, index) => {
    const said = HANDSHAKE.subarray(0, index % (HANDSHAKE.length - 1));
    return enter(address, said, Buffer.alloc(0), false);
  });
  const requests = Array.from({ length: 400 }, (_, at) => readRequest(BigInt(at), at * 512, 512));
  const dribblers = Array.from({ length: DRIBBLERS }, (_, index) =>
    index % 2 === 0
      ? enter(address, Buffer.alloc(0), HANDSHAKE.subarray(0, -1), false)
      : enter(address, HANDSHAKE, Buffer.concat(requests), true),
  );
  return [...held, ...dribblers];
}

/** What the slowest good client took, round by round, milliseconds. */
export interface Comparison {
  readonly aloneMs: readonly number[];
  readonly crowdedMs: readonly number[];
}

/** Alternates rounds without and with the crowd, so that other load meets both alike. */
export async function compare(address: Address, data: Buffer, rounds: number): Promise<Comparison> {
  const aloneMs: number[] = [];
  const crowdedMs: number[] = [];
  for (let round = 0; round < rounds; round += 1) {
    aloneMs.push(await slowestGoodClient(address, data));
    const crowd = gather(address);
    crowdedMs.push(await slowestGoodClient(address, data));
    for (const { socket } of crowd) {
      socket.destroy();
    }
    await Promise.all(crowd.map(({ ended }) => ended));
  }
  return { aloneMs, crowdedMs };
}

export function median(values: readonly number[]): number {
  return values.toSorted((a, b) => a - b)[Math.floor(values.length / 2)] ?? Number.NaN;
}
