// SPDX-License-Identifier: Apache-2.0
/** Plays one session against a live server, cut into pieces of any size. */
import { connect, type Socket } from 'node:net';
import { Decoder } from './decoder.ts';
import type { Session } from './generator.ts';
import type { Random } from './random.ts';
import type { Address } from './serving.ts';

/** Longer than any drain or handshake may take, milliseconds: only a fault lasts so long. */
const PATIENCE_MS = 30_000;

/** How a session ends. */
export type Leaving = 'fin' | 'reset';

/** What a session was worth. */
export interface Played {
  readonly messages: number;
  readonly replies: number;
}

/** Cuts bytes at random places: in few large pieces, in many, or byte by byte at first. */
function* pieces(bytes: Buffer, random: Random): Generator<Buffer> {
  const style = random.below(4);
  let at = 0;
  while (at < bytes.length) {
    const most = style === 0 ? bytes.length : style === 1 ? 70_000 : style === 2 ? 600 : 3;
    // Byte by byte for a while only: it would take for ever.
    const size = style === 3 && at > 300 ? bytes.length : 1 + random.below(most);
    yield bytes.subarray(at, at + size);
    at += size;
  }
}

async function send(socket: Socket, bytes: Buffer, random: Random): Promise<void> {
  for (const piece of pieces(bytes, random)) {
    if (socket.destroyed) {
      return;
    }
    if (!socket.write(piece)) {
      await new Promise<void>((resolve) => {
        socket.once('drain', resolve);
        socket.once('close', resolve);
      });
    } else if (random.once(2)) {
      await new Promise((resolve) => setImmediate(resolve));
    }
  }
}

/**
 * Plays a session to its end.
 *
 * @throws Error if the server says anything wrong, or does not close
 */
export async function play(address: Address, session: Session, random: Random): Promise<Played> {
  const decoder = new Decoder(session);
  const socket = connect({ ...address, noDelay: true });
  const leaving: Leaving = random.once(10) ? 'reset' : 'fin';
  let fault: unknown;
  let reset = false;
  const closed = new Promise<void>((resolve, reject) => {
    const timer = setTimeout(() => {
      fault ??= new Error('the server does not close');
      socket.destroy();
    }, PATIENCE_MS);
    socket.on('data', (chunk) => {
      try {
        decoder.feed(chunk);
      } catch (error) {
        fault ??= error;
        socket.destroy();
      }
    });
    socket.on('error', (error: NodeJS.ErrnoException) => {
      // A server that hangs up while more is sent to it resets the connection.
      reset ||= error.code === 'ECONNRESET' || error.code === 'EPIPE';
      fault ??= reset ? undefined : error;
    });
    socket.on('close', () => {
      clearTimeout(timer);
      if (fault === undefined) {
        resolve();
      } else {
        reject(fault instanceof Error ? fault : new Error(String(fault)));
      }
    });
  });
  closed.catch(() => {});
  const bytes = Buffer.concat(session.messages.map((message) => message.bytes));
  if (leaving === 'reset') {
    await send(socket, bytes.subarray(0, random.below(bytes.length + 1)), random);
    socket.destroy();
    await closed;
    return { messages: session.messages.length, replies: decoder.replies };
  }
  if (random.once(8)) {
    // A client that does not fetch its replies for a while.
    socket.pause();
    setTimeout(() => socket.resume(), random.below(50));
  }
  await send(socket, bytes, random);
  socket.end();
  await closed;
  decoder.finish();
  return { messages: session.messages.length, replies: decoder.replies };
}
