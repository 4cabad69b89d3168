// SPDX-License-Identifier: Apache-2.0
/** Random numbers that a seed repeats (sfc32, by Chris Doty-Humphrey). */

export class Random {
  #a: number;
  #b: number;
  #c: number;
  #counter = 1;

  /** @param seed any whole number; neighbours are unrelated */
  constructor(seed: number) {
    this.#a = seed >>> 0;
    this.#b = Math.floor(seed / 2 ** 32) >>> 0;
    this.#c = 0x9e37_79b9;
    for (let turn = 0; turn < 12; turn += 1) {
      this.u32();
    }
  }

  /** 32 random bits. */
  u32(): number {
    const result = (this.#a + this.#b + this.#counter) | 0;
    this.#counter = (this.#counter + 1) | 0;
    this.#a = this.#b ^ (this.#b >>> 9);
    this.#b = (this.#c + (this.#c << 3)) | 0;
    this.#c = (((this.#c << 21) | (this.#c >>> 11)) + result) | 0;
    return result >>> 0;
  }

  /** A whole number from 0 to below `limit`, at most 2^53. */
  below(limit: number): number {
    return limit <= 2 ** 32
      ? this.u32() % limit
      : (this.u32() * 2 ** 21 + (this.u32() >>> 11)) % limit;
  }

  u64(): bigint {
    return (BigInt(this.u32()) << 32n) | BigInt(this.u32());
  }

  /** True once in `times`. */
  once(times: number): boolean {
    return this.below(times) === 0;
  }

  pick<T>(choices: readonly [T, ...T[]]): T {
    return choices[this.below(choices.length)] ?? choices[0];
  }

  bytes(count: number): Buffer {
    const bytes = Buffer.allocUnsafe(count);
    for (let at = 0; at < count; at += 1) {
      bytes[at] = this.u32() & 0xff;
    }
    return bytes;
  }
}
