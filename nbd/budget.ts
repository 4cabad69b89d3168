// SPDX-License-Identifier: Apache-2.0
/**
 * How much data may be read or sent at a time, and the buffers for it. Each
 * connection may always hold one piece, so that peers who do not fetch their
 * replies slow nobody to a halt; whatever it holds beyond that comes from a
 * share that all connections have in common.
 */

/** The share that the connections of a server have in common. */
export class SharedBudget {
  readonly #limitBytes: number;
  #usedBytes = 0;
  readonly #waiting = new Set<ConnectionBudget>();

  /** @param limitBytes data in flight over all connections, beyond one piece for each */
  constructor(limitBytes: number) {
    this.#limitBytes = limitBytes;
  }

  /** Data in flight over all connections, bytes. */
  get usedBytes(): number {
    return this.#usedBytes;
  }

  hasRoomFor(bytes: number): boolean {
    return this.#usedBytes + bytes <= this.#limitBytes;
  }

  /** Takes bytes, whether or not there is room: the asker has decided. */
  take(bytes: number): void {
    this.#usedBytes += bytes;
  }

  /** Gives bytes back and lets those who wait try again, the longest waiting first. */
  give(bytes: number): void {
    this.#usedBytes -= bytes;
    for (const budget of [...this.#waiting]) {
      this.#waiting.delete(budget);
      budget.grantWaiting();
    }
  }

  waitFor(budget: ConnectionBudget): void {
    this.#waiting.add(budget);
  }

  forget(budget: ConnectionBudget): void {
    this.#waiting.delete(budget);
  }
}

interface Waiter {
  readonly bytes: number;
  readonly grant: () => void;
}

/** What one connection has in flight. */
export class ConnectionBudget {
  readonly #shared: SharedBudget;
  readonly #limitBytes: number;
  #usedBytes = 0;
  #waiters: Waiter[] = [];

  /** @param limitBytes data in flight on this connection; no single request for more is made */
  constructor(shared: SharedBudget, limitBytes: number) {
    this.#shared = shared;
    this.#limitBytes = limitBytes;
  }

  #mayTake(bytes: number): boolean {
    return (
      this.#usedBytes === 0 ||
      (this.#usedBytes + bytes <= this.#limitBytes && this.#shared.hasRoomFor(bytes))
    );
  }

  /** Takes bytes at once, if nobody waits and there is room. */
  tryTake(bytes: number): boolean {
    if (this.#waiters.length > 0 || !this.#mayTake(bytes)) {
      return false;
    }
    this.#usedBytes += bytes;
    this.#shared.take(bytes);
    return true;
  }

  /** Takes bytes as soon as there is room, in the order of the calls. */
  take(bytes: number): Promise<void> {
    return new Promise((resolve) => {
      this.#waiters.push({ bytes, grant: resolve });
      this.grantWaiting();
    });
  }

  /** Gives bytes back. */
  give(bytes: number): void {
    this.#usedBytes -= bytes;
    this.#shared.give(bytes);
    this.grantWaiting();
  }

  /** Grants what there is room for. */
  grantWaiting(): void {
    let next = this.#waiters[0];
    while (next !== undefined && this.#mayTake(next.bytes)) {
      this.#waiters.shift();
      this.#usedBytes += next.bytes;
      this.#shared.take(next.bytes);
      next.grant();
      next = this.#waiters[0];
    }
    if (next === undefined) {
      this.#shared.forget(this);
    } else if (this.#usedBytes + next.bytes <= this.#limitBytes) {
      this.#shared.waitFor(this);
    }
  }
}

const SMALLEST_CLASS_BYTES = 8 * 1024;
/** Room for the headers in front of the data, so that both leave in one piece. */
const HEADER_ROOM_BYTES = 64;

/** Keeps freed buffers for the next reads: a fresh one costs a page fault per page. */
export class BufferPool {
  readonly #limitBytes: number;
  readonly #idle = new Map<number, Buffer[]>();
  #idleBytes = 0;

  /** @param limitBytes idle buffers that are kept, bytes */
  constructor(limitBytes: number) {
    this.#limitBytes = limitBytes;
  }

  /** Bytes in buffers that nobody uses. */
  get idleBytes(): number {
    return this.#idleBytes;
  }

  /** A buffer for headers and `dataBytes` of data, at least so long; its content is arbitrary. */
  take(dataBytes: number): Buffer {
    if (dataBytes <= SMALLEST_CLASS_BYTES) {
      return Buffer.allocUnsafe(dataBytes + HEADER_ROOM_BYTES);
    }
    const size = 2 ** Math.ceil(Math.log2(dataBytes)) + HEADER_ROOM_BYTES;
    const buffer = this.#idle.get(size)?.pop();
    if (buffer === undefined) {
      return Buffer.allocUnsafeSlow(size);
    }
    this.#idleBytes -= size;
    return buffer;
  }

  /** Takes back a buffer that neither a read nor a socket uses any more. */
  give(buffer: Buffer): void {
    const size = buffer.length;
    const pooled = size > SMALLEST_CLASS_BYTES + HEADER_ROOM_BYTES;
    if (!pooled || this.#idleBytes + size > this.#limitBytes) {
      return;
    }
    const same = this.#idle.get(size);
    if (same === undefined) {
      this.#idle.set(size, [buffer]);
    } else {
      same.push(buffer);
    }
    this.#idleBytes += size;
  }
}
