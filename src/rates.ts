// SPDX-License-Identifier: Apache-2.0
/** Rates as people write them: `--max-rate 100M` for all exports together, `--max-rate sda=20M`. */
import { Bandwidth, LEAST_BYTES_PER_SECOND } from '../nbd/bandwidth.ts';
import { usageError } from './errors.ts';
import { formatSize, parseSize } from './sizes.ts';

/** What the option says in a command's help. */
export const MAX_RATE_HELP = 'bytes per second of all or one, repeatable';

/** Caps, in bytes per second. */
export interface Rates {
  readonly total: number | undefined;
  readonly byName: ReadonlyMap<string, number>;
}

function parseRate(option: string, text: string): number {
  // 10M, 10MiB, 10M/s: all the same, and never bits.
  const rate = parseSize(text.replace(/\/s$/i, ''));
  if (rate === undefined || rate < LEAST_BYTES_PER_SECOND) {
    throw usageError(
      `--max-rate ${JSON.stringify(option)} is no rate`,
      `give bytes per second, such as 100M, at least ${formatSize(LEAST_BYTES_PER_SECOND)}`,
    );
  }
  return rate;
}

/**
 * Reads the values of `--max-rate`: RATE or NAME=RATE, each at most once.
 *
 * @param names what may stand before the equals sign: disks or exports
 * @throws StillblockError with one line that says what to change
 */
export function planRates(texts: readonly string[], names: Iterable<string>): Rates {
  const known = new Set(names);
  const byName = new Map<string, number>();
  let total: number | undefined;
  for (const text of texts) {
    // A rate has no equals sign, a name may have.
    const equals = text.lastIndexOf('=');
    const rate = parseRate(text, text.slice(equals + 1));
    const name = text.slice(0, Math.max(equals, 0));
    if (equals >= 0 && !known.has(name)) {
      const list = [...known].map((each) => JSON.stringify(each)).join(', ');
      throw usageError(
        `--max-rate ${JSON.stringify(text)}: there is no ${JSON.stringify(name)}`,
        `name one of ${list}`,
      );
    }
    if (equals < 0 ? total !== undefined : byName.has(name)) {
      throw usageError(`--max-rate ${JSON.stringify(text)} is given twice`, 'give each once');
    }
    if (equals < 0) {
      total = rate;
    } else {
      byName.set(name, rate);
    }
  }
  return { total, byName };
}

/**
 * The caps of one process: those of a disk and its delta exports are the same object.
 */
export class RateCaps {
  readonly #rates: Rates;
  readonly #total: Bandwidth | undefined;
  readonly #byName = new Map<string, Bandwidth>();

  constructor(rates: Rates) {
    this.#rates = rates;
    this.#total = rates.total === undefined ? undefined : new Bandwidth(rates.total);
  }

  /** The caps that data of this disk passes: its own first, then that of all. */
  of(name: string): Bandwidth[] {
    const rate = this.#rates.byName.get(name);
    let own = this.#byName.get(name);
    if (rate !== undefined && own === undefined) {
      own = new Bandwidth(rate);
      this.#byName.set(name, own);
    }
    return [own, this.#total].filter((cap) => cap !== undefined);
  }
}
