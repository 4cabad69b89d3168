// SPDX-License-Identifier: Apache-2.0
/**
 * Ranges of bytes as JSON: `[{"offset": 0, "length": 65536}]`. JSON.parse would
 * lose numbers above 2^53 without a word and says of most mistakes neither line nor
 * column, so this reads the one shape there is.
 */
import type { Extent } from '../nbd/extents.ts';

/** What is wrong with the text, and where. */
export class ExtentsJsonError extends Error {
  /** 1-based. */
  readonly line: number;
  /** 1-based, in UTF-16 units. */
  readonly column: number;

  constructor(text: string, position: number, message: string) {
    const before = text.slice(0, position).split('\n');
    const line = before.length;
    const column = (before.at(-1) ?? '').length + 1;
    super(`line ${line}, column ${column}: ${message}`);
    this.name = 'ExtentsJsonError';
    this.line = line;
    this.column = column;
  }
}

const SPACE = /[ \t\n\r]*/y;
const STRING = /"([^"\n]*)"/y;
const NUMBER = /-?[0-9][0-9.eE+-]*/y;
const WHOLE = /^(?:0|[1-9][0-9]*)$/;

class Reader {
  readonly #text: string;
  #position = 0;

  constructor(text: string) {
    this.#text = text;
  }

  fail(message: string, position: number = this.#position): ExtentsJsonError {
    return new ExtentsJsonError(this.#text, position, message);
  }

  #match(pattern: RegExp): RegExpExecArray | null {
    pattern.lastIndex = this.#position;
    const match = pattern.exec(this.#text);
    this.#position += match?.[0].length ?? 0;
    return match;
  }

  /** Skips white space; where the next token starts. */
  next(): number {
    this.#match(SPACE);
    return this.#position;
  }

  atEnd(): boolean {
    return this.next() === this.#text.length;
  }

  /** Takes a punctuation mark if it is the next token. */
  takes(mark: string): boolean {
    if (this.#text[this.next()] !== mark) {
      return false;
    }
    this.#position += 1;
    return true;
  }

  expect(mark: string, what: string): void {
    if (!this.takes(mark)) {
      throw this.fail(this.atEnd() ? `the text ends where ${what} is due` : `${what} is due`);
    }
  }

  /** A member's name. The two that there are need no escapes, and no other is accepted. */
  key(): string {
    this.next();
    const match = this.#match(STRING);
    if (match?.[1] === undefined) {
      throw this.fail('a member name in double quotes is due');
    }
    return match[1];
  }

  bytes(name: string): number {
    const start = this.next();
    const text = this.#match(NUMBER)?.[0] ?? '';
    const value = Number(text);
    if (!WHOLE.test(text) || !Number.isSafeInteger(value)) {
      throw this.fail(`"${name}" is not a whole number of bytes`, start);
    }
    return value;
  }
}

function readExtent(reader: Reader): Extent {
  const start = reader.next();
  reader.expect('{', 'an object with "offset" and "length"');
  const members = new Map<string, number>();
  if (!reader.takes('}')) {
    do {
      const at = reader.next();
      const key = reader.key();
      if (key !== 'offset' && key !== 'length') {
        throw reader.fail(`"${key}" is neither "offset" nor "length"`, at);
      }
      if (members.has(key)) {
        throw reader.fail(`"${key}" is given twice`, at);
      }
      reader.expect(':', 'a colon');
      members.set(key, reader.bytes(key));
    } while (reader.takes(','));
    reader.expect('}', 'a comma or "}"');
  }
  const offset = members.get('offset');
  const length = members.get('length');
  if (offset === undefined || length === undefined) {
    throw reader.fail(`"${offset === undefined ? 'offset' : 'length'}" is missing`, start);
  }
  return { offset, length };
}

/**
 * Reads ranges within a disk. They may touch and overlap, in any order.
 *
 * @param sizeBytes size of the disk, bytes: a range beyond it is a mistake
 * @throws ExtentsJsonError with the place of the first mistake
 */
export function parseExtents(text: string, sizeBytes: number): Extent[] {
  const reader = new Reader(text);
  const extents: Extent[] = [];
  reader.expect('[', 'an array "["');
  if (!reader.takes(']')) {
    do {
      const start = reader.next();
      const extent = readExtent(reader);
      if (extent.offset > sizeBytes || extent.length > sizeBytes - extent.offset) {
        throw reader.fail(
          `range of ${extent.length} bytes at ${extent.offset} reaches beyond the end (${sizeBytes})`,
          start,
        );
      }
      extents.push(extent);
    } while (reader.takes(','));
    reader.expect(']', 'a comma or "]"');
  }
  if (!reader.atEnd()) {
    throw reader.fail('nothing may follow the array');
  }
  return extents;
}
