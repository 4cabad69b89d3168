// SPDX-License-Identifier: Apache-2.0
/**
 * What a hostile or clumsy client might say: sessions that are right for the most part,
 * with fields, lengths and bytes wrong here and there. Each message comes with what its
 * reply must be; from the first on that breaks the framing, nothing is foretold.
 */
import {
  CMD,
  ERR,
  FLAG,
  infoData,
  metaData,
  OPT,
  optionBytes,
  requestBytes,
  type WireRequest,
} from './protocol.ts';
import type { Random } from './random.ts';
import { BASE, DIRTY, type Truth } from './truth.ts';

/** What the server under test offers. */
export interface Target {
  readonly exports: readonly [Truth, ...Truth[]];
  readonly extendedHeaders: boolean;
  /** Longest DF read that is served. */
  readonly maxDontFragmentBytes: number;
  readonly maxReadBytes: number;
}

/** How an option must end. */
export type OptionOutcome =
  | { readonly kind: 'ack' }
  | { readonly kind: 'error' }
  | { readonly kind: 'either' }
  /** EXPORT_NAME that succeeds: no reply header. */
  | { readonly kind: 'named'; readonly zeroes: boolean };

/** A request and what its reply must be. */
export interface ExpectedReply {
  readonly request: WireRequest;
  /** Errors that are right; 0 stands for success. */
  readonly errors: readonly number[];
}

export type Expectation =
  | { readonly kind: 'option'; readonly option: number; readonly outcome: OptionOutcome }
  | { readonly kind: 'request'; readonly reply: ExpectedReply }
  /** No reply to it: client flags, DISC. */
  | { readonly kind: 'silence' }
  /** The stream may be out of step from here: nothing is foretold. */
  | { readonly kind: 'broken' };

export interface Message {
  readonly bytes: Buffer;
  readonly expectation: Expectation;
}

/** How the replies of the transmission phase look. */
export interface Agreed {
  readonly truth: Truth;
  readonly mode: 'simple' | 'structured' | 'extended';
  readonly noZeroes: boolean;
  /** Contexts selected for this export; undefined if that is not foretold. */
  readonly contexts: readonly string[] | undefined;
}

export interface Session {
  readonly messages: readonly Message[];
  /** What the handshake ends in; undefined if it ends in none. */
  readonly agreed: Agreed | undefined;
}

const MAX_OPTION_BYTES = 65_536;
const QUERIES = [BASE, DIRTY, 'qemu:dirty-bitmap:none', 'base:', 'qemu:', 'x:y', ''] as const;
const OUTSIDE = [
  0n,
  1n << 31n,
  (1n << 32n) - 1n,
  1n << 32n,
  (1n << 53n) - 1n,
  1n << 53n,
  (1n << 63n) - 1n,
  1n << 63n,
  (1n << 64n) - 1n,
] as const;
const UNKNOWN_OPTIONS = [0, 4, 12, 13, 255, 0x7fff_ffff, 0xffff_ffff] as const;

/** Generates one session. */
export class SessionGenerator {
  readonly #random: Random;
  readonly #target: Target;
  readonly #messages: Message[] = [];
  #broken = false;
  #structured = false;
  #extended = false;
  #noZeroes = false;
  /** The contexts of the last SET_META_CONTEXT, and for which export. */
  #selection: { name: string; contexts: string[] } | undefined;
  #selectionForetold = true;
  #agreed: Agreed | undefined;
  #over = false;

  constructor(random: Random, target: Target) {
    this.#random = random;
    this.#target = target;
  }

  /** @param mostRequests requests of the transmission phase, if it comes to that */
  generate(mostRequests: number): Session {
    this.#clientFlags();
    for (let left = this.#random.below(12); left > 0 && !this.#over; left -= 1) {
      this.#option();
    }
    if (!this.#over && !this.#random.once(20)) {
      this.#leaveHandshake();
    }
    if (this.#agreed !== undefined) {
      const count = this.#random.below(mostRequests);
      for (let left = count; left > 0 && !this.#over; left -= 1) {
        this.#requestOrWorse();
      }
      if (!this.#over && this.#random.once(2)) {
        this.#disconnect();
      }
    }
    return { messages: this.#messages, agreed: this.#agreed };
  }

  #say(bytes: Buffer, expectation: Expectation): void {
    this.#messages.push({
      bytes,
      expectation: this.#broken ? { kind: 'broken' } : expectation,
    });
  }

  /** Says something after which the server may close, or be out of step. */
  #break(bytes: Buffer): void {
    this.#broken = true;
    this.#say(bytes, { kind: 'broken' });
    // What follows may be taken for anything; now and then a little more of it.
    this.#over = !this.#random.once(3);
  }

  #clientFlags(): void {
    const bytes = Buffer.alloc(4);
    const flags = this.#random.once(50) ? this.#random.u32() : this.#random.pick([1, 3, 3, 3]);
    bytes.writeUInt32BE(flags);
    this.#noZeroes = (flags & 2) !== 0;
    if (flags !== 1 && flags !== 3) {
      this.#break(bytes);
    } else {
      this.#say(bytes, { kind: 'silence' });
    }
  }

  #name(): string {
    const random = this.#random;
    if (random.once(6)) {
      return random.pick(['', 'none', 'A', 'a ', '\0', 'x'.repeat(4096), 'ü'.repeat(7)]);
    }
    return random.pick(this.#target.exports.map(({ name }) => name) as [string, ...string[]]);
  }

  #truth(name: string): Truth | undefined {
    return this.#target.exports.find((each) => each.name === name);
  }

  #queries(): string[] {
    return Array.from({ length: this.#random.below(4) }, () => this.#random.pick(QUERIES));
  }

  #option(): void {
    const random = this.#random;
    if (random.once(30)) {
      this.#wrongOption();
      return;
    }
    const option = random.pick([
      ...[OPT.structuredReply, OPT.structuredReply, OPT.setMetaContext, OPT.setMetaContext],
      ...[OPT.list, OPT.info, OPT.info, OPT.listMetaContext, OPT.startTls],
      ...[OPT.extendedHeaders, random.pick(UNKNOWN_OPTIONS)],
    ] as [number, ...number[]]);
    switch (option) {
      case OPT.structuredReply:
      case OPT.extendedHeaders:
        this.#modeOption(option);
        return;
      case OPT.info:
        this.#infoOption();
        return;
      case OPT.listMetaContext:
      case OPT.setMetaContext:
        this.#metaOption(option);
        return;
      case OPT.list: {
        const data = random.once(5) ? random.bytes(1 + random.below(20)) : Buffer.alloc(0);
        const outcome: OptionOutcome = { kind: data.length === 0 ? 'ack' : 'error' };
        this.#say(optionBytes(option, data), { kind: 'option', option, outcome });
        return;
      }
      default: {
        const data = random.bytes(random.once(3) ? random.below(500) : 0);
        this.#say(optionBytes(option, data), {
          kind: 'option',
          option,
          outcome: { kind: 'error' },
        });
      }
    }
  }

  #modeOption(option: number): void {
    const data = this.#random.bytes(this.#random.once(8) ? 1 + this.#random.below(9) : 0);
    let outcome: OptionOutcome = { kind: data.length === 0 ? 'ack' : 'error' };
    if (option === OPT.extendedHeaders && !this.#target.extendedHeaders) {
      outcome = { kind: 'error' };
    } else if (this.#extended || (option === OPT.extendedHeaders && data.length === 0)) {
      // Whether the mode may be agreed on twice, or what was selected before lasts, is open.
      this.#selectionForetold &&= this.#selection === undefined;
      outcome = this.#extended && data.length === 0 ? { kind: 'either' } : outcome;
    }
    if (data.length === 0 && outcome.kind !== 'error') {
      this.#structured ||= option === OPT.structuredReply;
      this.#extended ||= option === OPT.extendedHeaders;
    }
    this.#say(optionBytes(option, data), { kind: 'option', option, outcome });
  }

  /** Damages the data of an option. Returns whether it did. */
  #damage(data: Buffer): [Buffer, boolean] {
    const random = this.#random;
    switch (random.below(40)) {
      case 0:
        return [Buffer.concat([data, random.bytes(1 + random.below(8))]), true];
      case 1:
        return [data.subarray(0, random.below(data.length)), true];
      case 2: {
        // The length of the name points beyond the end.
        const damaged = Buffer.from(data);
        damaged.writeUInt32BE(data.length + random.below(2 ** 31), 0);
        return [damaged, true];
      }
      default:
        return [data, false];
    }
  }

  #infoOption(): void {
    const name = this.#name();
    const information = Array.from({ length: this.#random.below(6) }, () =>
      this.#random.below(this.#random.once(5) ? 65_536 : 5),
    );
    const [data, damaged] = this.#damage(infoData(name, information));
    const found = !damaged && this.#truth(name) !== undefined;
    const outcome: OptionOutcome = { kind: found ? 'ack' : 'error' };
    this.#say(optionBytes(OPT.info, data), { kind: 'option', option: OPT.info, outcome });
  }

  #metaOption(option: number): void {
    const name = this.#name();
    const queries = this.#random.once(40)
      ? Array.from({ length: 300 }, (_, index) => `base:${index}`)
      : this.#queries();
    const [data, damaged] = this.#damage(metaData(name, queries));
    const truth = this.#truth(name);
    const mode = option === OPT.listMetaContext || this.#structured || this.#extended;
    const fine = !damaged && truth !== undefined && mode && queries.length <= 256;
    if (option === OPT.setMetaContext) {
      const contexts = fine ? [BASE, ...truth.dirty.keys()].filter((c) => queries.includes(c)) : [];
      this.#selection = fine ? { name, contexts } : undefined;
      this.#selectionForetold = true;
    }
    const outcome: OptionOutcome = { kind: fine ? 'ack' : 'error' };
    this.#say(optionBytes(option, data), { kind: 'option', option, outcome });
  }

  #wrongOption(): void {
    const random = this.#random;
    const whole = optionBytes(random.below(12), random.bytes(random.below(40)));
    switch (random.below(5)) {
      case 0:
        this.#break(random.bytes(1 + random.below(64)));
        return;
      case 1:
        this.#break(
          optionBytes(
            random.below(12),
            random.bytes(20),
            MAX_OPTION_BYTES + 1 + random.below(2 ** 31),
          ),
        );
        return;
      case 2:
        whole[random.below(8)] = random.below(256);
        this.#break(whole);
        return;
      case 3:
        // Never completed.
        this.#break(whole.subarray(0, random.below(whole.length)));
        return;
      default:
        this.#over = true;
        this.#say(optionBytes(OPT.abort, random.bytes(random.below(9))), {
          kind: 'option',
          option: OPT.abort,
          outcome: { kind: 'ack' },
        });
    }
  }

  #agree(name: string, truth: Truth): void {
    if (this.#broken) {
      return;
    }
    const foretold = this.#selectionForetold;
    this.#agreed = {
      truth,
      mode: this.#extended ? 'extended' : this.#structured ? 'structured' : 'simple',
      noZeroes: this.#noZeroes,
      contexts: foretold
        ? this.#selection?.name === name
          ? this.#selection.contexts
          : []
        : undefined,
    };
  }

  #leaveHandshake(): void {
    const name = this.#name();
    const truth = this.#truth(name);
    if (this.#random.once(3)) {
      const data = Buffer.from(name);
      if (truth === undefined || this.#extended) {
        // There is no reply to a wrong EXPORT_NAME.
        this.#break(optionBytes(OPT.exportName, data));
        this.#over = true;
        return;
      }
      this.#agree(name, truth);
      this.#say(optionBytes(OPT.exportName, data), {
        kind: 'option',
        option: OPT.exportName,
        outcome: { kind: 'named', zeroes: !this.#noZeroes },
      });
      return;
    }
    const [data, damaged] = this.#damage(infoData(name, [3, 1]));
    const goes = !damaged && truth !== undefined;
    if (goes) {
      this.#agree(name, truth);
    }
    this.#say(optionBytes(OPT.go, data), {
      kind: 'option',
      option: OPT.go,
      outcome: { kind: goes ? 'ack' : 'error' },
    });
  }

  #disconnect(): void {
    const extended = this.#agreed?.mode === 'extended';
    const [offset, length] = this.#random.once(4) ? [this.#random.u64(), 77n] : [0n, 0n];
    const cookie = this.#random.u64();
    const request = { extended, flags: 0, type: CMD.disc, cookie, offset, length };
    this.#over = true;
    this.#say(requestBytes(request), { kind: 'silence' });
    if (this.#random.once(4)) {
      // Whatever comes behind is nobody's business.
      this.#broken = true;
      this.#say(this.#random.bytes(this.#random.below(200)), { kind: 'broken' });
    }
  }

  #requestOrWorse(): void {
    if (!this.#random.once(400)) {
      this.#request();
      return;
    }
    const whole = requestBytes(this.#draw());
    switch (this.#random.below(4)) {
      case 0:
        this.#break(this.#random.bytes(1 + this.#random.below(100)));
        return;
      case 1:
        whole[this.#random.below(4)] = this.#random.below(256);
        this.#break(whole);
        return;
      case 2:
        this.#break(whole.subarray(0, 1 + this.#random.below(whole.length - 1)));
        return;
      default:
        // The magic of another mode.
        this.#break(requestBytes({ ...this.#draw(), extended: this.#agreed?.mode !== 'extended' }));
    }
  }

  #offset(size: number): bigint {
    const random = this.#random;
    switch (random.below(12)) {
      case 0:
        return random.pick(OUTSIDE);
      case 1:
        return BigInt(Math.max(0, size + random.below(5) - 2));
      case 2:
        return random.u64();
      default:
        return BigInt(random.below(size + 1));
    }
  }

  #length(size: number, left: bigint, extended: boolean): bigint {
    const random = this.#random;
    const most = extended ? (1n << 64n) - 1n : (1n << 32n) - 1n;
    const scale = random.below(100);
    const within = (limit: number): bigint => BigInt(random.below(Math.min(limit, size) + 1));
    if (scale < 50) {
      return within(513);
    }
    if (scale < 80) {
      return within(8193);
    }
    if (scale < 92) {
      return within(131_073);
    }
    if (scale < 94) {
      return within(4 << 20);
    }
    if (scale < 97) {
      // To the end exactly, or a byte more.
      const toEnd = left < 0n ? 0n : left + BigInt(random.below(2));
      return toEnd > most ? most : toEnd;
    }
    const outside = random.pick(OUTSIDE);
    return outside > most ? most : outside;
  }

  /** A request with any field, but for those that would need a payload. */
  #draw(): WireRequest {
    const random = this.#random;
    const { truth, mode } = this.#agreed as Agreed;
    const extended = mode === 'extended';
    const size = truth.data.length;
    const offset = this.#offset(size);
    const type = random.once(40)
      ? random.pick([8, 9, 255, 65_535])
      : random.pick([
          ...[CMD.read, CMD.read, CMD.read, CMD.read, CMD.read, CMD.read],
          ...[CMD.blockStatus, CMD.blockStatus, CMD.flush, CMD.trim, CMD.cache, CMD.writeZeroes],
        ] as [number, ...number[]]);
    const flags = random.once(8)
      ? random.pick([FLAG.fua, FLAG.df, FLAG.reqOne, FLAG.noHole, FLAG.fastZero, 64, 0x8000])
      : random.pick([0, 0, 0, FLAG.fua, type === CMD.read ? FLAG.df : FLAG.reqOne]);
    const plain = type === CMD.flush && !random.once(5);
    return {
      extended,
      flags,
      type,
      cookie: random.u64(),
      offset: plain ? 0n : offset,
      length: plain ? 0n : this.#length(size, BigInt(size) - offset, extended),
    };
  }

  #request(): void {
    if (this.#random.once(30)) {
      this.#write();
      return;
    }
    const request = this.#draw();
    this.#say(requestBytes(request), {
      kind: 'request',
      reply: { request, errors: this.#errorsOf(request) },
    });
  }

  /** A write with its payload, which is refused and must be skipped. */
  #write(): void {
    const extended = this.#agreed?.mode === 'extended';
    const length = this.#random.below(this.#random.once(20) ? 200_000 : 2000);
    const request: WireRequest = {
      extended,
      flags: extended ? FLAG.payloadLen : this.#random.pick([0, FLAG.fua]),
      type: CMD.write,
      cookie: this.#random.u64(),
      offset: this.#offset(this.#agreed?.truth.data.length ?? 0),
      length: BigInt(length),
    };
    const payload = Buffer.alloc(length, requestBytes(request).subarray(0, 28));
    this.#say(Buffer.concat([requestBytes(request), payload]), {
      kind: 'request',
      reply: { request, errors: [ERR.perm] },
    });
  }

  /** The errors that are right for a request without payload. */
  #errorsOf({ type, flags, offset, length }: WireRequest): number[] {
    const { truth, mode, contexts } = this.#agreed as Agreed;
    const size = BigInt(truth.data.length);
    const beyond = offset > size || length > size - offset;
    switch (type) {
      case CMD.read: {
        const known = FLAG.fua | (mode === 'simple' ? 0 : FLAG.df);
        if ((flags & ~known) !== 0 || beyond || length > BigInt(this.#target.maxReadBytes)) {
          return [ERR.inval];
        }
        const unfragmented = (flags & FLAG.df) !== 0;
        return unfragmented && length > BigInt(this.#target.maxDontFragmentBytes)
          ? [ERR.overflow]
          : [ERR.ok];
      }
      case CMD.blockStatus:
        if (
          (flags & ~(FLAG.fua | FLAG.reqOne)) !== 0 ||
          mode === 'simple' ||
          beyond ||
          length === 0n
        ) {
          return [ERR.inval];
        }
        if (contexts === undefined) {
          return [ERR.ok, ERR.inval];
        }
        return [contexts.length === 0 ? ERR.inval : ERR.ok];
      case CMD.flush:
        return (flags & ~FLAG.fua) !== 0 || offset !== 0n || length !== 0n ? [ERR.inval] : [ERR.ok];
      case CMD.trim:
      case CMD.writeZeroes:
        return [ERR.perm, ERR.inval];
      default:
        return [ERR.inval];
    }
  }
}
