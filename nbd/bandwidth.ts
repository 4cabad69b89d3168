// SPDX-License-Identifier: Apache-2.0
/**
 * How fast exports may be read. A cap is one number in memory: until when all that
 * was let through so far is paid for, at its rate. Engines in other threads share the
 * number, and so the cap, by compare and exchange; nobody needs a lock or a timer of
 * the bucket's own (ATM Forum TM 4.1, "virtual scheduling algorithm").
 *
 * Data passes when it is paid for, not before, so that any two moments with readers in
 * between see the rate to within {@link BURST_MS} of it.
 */

/** What an idle cap saves up, milliseconds of its rate. */
export const BURST_MS = 20;
const NS_PER_MS = 1_000_000n;
const NS_PER_S = 1_000_000_000n;
const BURST_NS = BigInt(BURST_MS) * NS_PER_MS;
/** What a timer may be late and still lose nothing: a machine that busy has other worries. */
const MOST_LATE_NS = NS_PER_S;

/** The least rate that a cap may have, bytes per second: slower ones look like a hang. */
export const LEAST_BYTES_PER_SECOND: number = 64 * 1024;

interface Waiter {
  readonly owner: object;
  readonly bytes: number;
  readonly resolve: () => void;
}

/** A cap on the data that may pass, for whoever shares it. */
export class Bandwidth {
  readonly bytesPerSecond: number;
  /**
   * One number: the time on CLOCK_MONOTONIC, nanoseconds, at which all that was taken is
   * paid for. An engine in other threads exchanges it by the rules of {@link reserve}.
   */
  readonly paidUntilNs: BigInt64Array;
  /** In the order of their calls; only the first has its bytes reserved. */
  readonly #waiters = new Set<Waiter>();
  #timer: NodeJS.Timeout | undefined;
  /** When the last timer was due, and when it came, nanoseconds. */
  #dueNs = 0n;
  #cameNs = 0n;

  /** @throws RangeError if the rate is not whole, or below {@link LEAST_BYTES_PER_SECOND} */
  constructor(bytesPerSecond: number) {
    if (!Number.isSafeInteger(bytesPerSecond) || bytesPerSecond < LEAST_BYTES_PER_SECOND) {
      throw new RangeError(
        `rate is not a whole number of at least ${LEAST_BYTES_PER_SECOND} bytes per second: ` +
          `${bytesPerSecond}`,
      );
    }
    this.bytesPerSecond = bytesPerSecond;
    this.paidUntilNs = new BigInt64Array(new SharedArrayBuffer(8));
  }

  /** Until when all is paid for that was taken, if so many bytes are taken now, nanoseconds. */
  #paidWith(bytes: number, before: bigint, now: bigint): bigint {
    // Who comes right behind a late timer would have come earlier, had it not been late.
    const isNext = now - this.#cameNs <= BURST_NS && this.#cameNs - this.#dueNs <= MOST_LATE_NS;
    const saved = (isNext ? now - this.#cameNs + this.#dueNs : now) - BURST_NS;
    const cost = (BigInt(bytes) * NS_PER_S) / BigInt(this.bytesPerSecond);
    return (before > saved ? before : saved) + cost;
  }

  /**
   * Reserves bytes behind all that was reserved before:
   *
   * ```
   *   paidUntil = max(paidUntil, now - burst - late) + bytes / rate
   * ```
   *
   * with the time that the last waiting of the same engine was too long, if this comes right
   * behind it.
   *
   * Who has reserved waits until then before he reserves again, so that engines which share
   * a cap have their turns, and those who leave waste no more than one turn.
   *
   * @returns nanoseconds until they may pass; zero or less: at once
   */
  reserve(bytes: number): bigint {
    for (;;) {
      const now = process.hrtime.bigint();
      const before = Atomics.load(this.paidUntilNs, 0);
      const paidUntil = this.#paidWith(bytes, before, now);
      if (Atomics.compareExchange(this.paidUntilNs, 0, before, paidUntil) === before) {
        return paidUntil - now;
      }
    }
  }

  /** Takes bytes that may pass at once. Returns false, and takes nothing, if they may not. */
  tryTake(bytes: number): boolean {
    if (this.#waiters.size > 0) {
      return false;
    }
    const now = process.hrtime.bigint();
    const before = Atomics.load(this.paidUntilNs, 0);
    const paidUntil = this.#paidWith(bytes, before, now);
    return (
      paidUntil <= now && Atomics.compareExchange(this.paidUntilNs, 0, before, paidUntil) === before
    );
  }

  /**
   * Takes bytes as soon as they may pass, in the order of the calls.
   *
   * @param owner for whom, see {@link leave}
   * @returns when they may pass, or the owner has left
   */
  take(bytes: number, owner: object): Promise<void> {
    return new Promise((resolve) => {
      this.#waiters.add({ owner, bytes, resolve });
      if (this.#timer === undefined) {
        this.#serve();
      }
    });
  }

  /** Ends the waiting of an owner. What had not its turn yet costs nothing. */
  leave(owner: object): void {
    for (const waiter of this.#waiters) {
      if (waiter.owner === owner) {
        this.#waiters.delete(waiter);
        waiter.resolve();
      }
    }
  }

  /** Lets those pass who may, and sets the timer for the first who may not. */
  #serve(): void {
    this.#timer = undefined;
    for (const waiter of this.#waiters) {
      const waitNs = this.reserve(waiter.bytes);
      if (waitNs > 0n) {
        const dueNs = process.hrtime.bigint() + waitNs;
        const pass = (): void => {
          this.#dueNs = dueNs;
          this.#cameNs = process.hrtime.bigint();
          if (this.#waiters.delete(waiter)) {
            waiter.resolve();
          }
          this.#serve();
        };
        this.#timer = setTimeout(pass, Number((waitNs + NS_PER_MS - 1n) / NS_PER_MS));
        return;
      }
      this.#waiters.delete(waiter);
      waiter.resolve();
    }
  }
}
