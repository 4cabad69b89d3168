// SPDX-License-Identifier: Apache-2.0
/**
 * What the server says, taken apart and compared with what it must say. Shares nothing
 * with the server's own codec. Any fault throws.
 */
import type { Agreed, ExpectedReply, Message, OptionOutcome, Session } from './generator.ts';
import { CHUNK, CMD, FLAG, KNOWN_ERRORS, LAST_OPTION_ERROR, MAGIC, OPT, REP } from './protocol.ts';
import { extentFault, isZero } from './truth.ts';

/** No reply payload of ours is longer: a piece of data with its offset, or a status reply. */
const MAX_PAYLOAD_BYTES = 40 << 20;
const MAX_OPTION_REPLY_BYTES = 1 << 20;

class Fault extends Error {}

function require(condition: boolean, what: () => string): asserts condition {
  if (!condition) {
    throw new Fault(what());
  }
}

/** A reply of which more may come. */
interface Open {
  readonly expected: ExpectedReply;
  readonly covered: (readonly [number, number])[];
  dataChunks: number;
  /** Bytes that each context has described. */
  readonly contexts: Map<string, number>;
  error: number;
}

interface Chunk {
  readonly flags: number;
  readonly type: number;
  readonly cookie: bigint;
  /** In extended headers. */
  readonly offset?: bigint;
}

/** Takes the server's bytes of one session. */
export class Decoder {
  readonly #agreed: Agreed | undefined;
  readonly #options: { option: number; outcome: OptionOutcome }[] = [];
  readonly #open = new Map<bigint, Open>();
  /** The session has a message that breaks the framing. */
  readonly #mayBreak: boolean;
  #stage: 'greeting' | 'options' | 'transmission' | 'unforetold' = 'greeting';
  #contextIds = new Map<number, string>();
  #pending: Buffer[] = [];
  #pendingBytes = 0;
  #steps: Generator<number, void, Buffer>;
  #neededBytes: number;
  /** Replies that were complete and right. */
  replies = 0;

  constructor(session: Session) {
    this.#agreed = session.agreed;
    this.#mayBreak = session.messages.some(({ expectation }) => expectation.kind === 'broken');
    for (const message of session.messages) {
      this.#expect(message);
    }
    this.#steps = this.#run();
    this.#neededBytes = this.#steps.next().value ?? 0;
  }

  #expect({ expectation }: Message): void {
    if (expectation.kind === 'option') {
      this.#options.push(expectation);
    } else if (expectation.kind === 'request') {
      const expected = expectation.reply;
      const open = { expected, covered: [], dataChunks: 0, contexts: new Map(), error: 0 };
      this.#open.set(expected.request.cookie, open);
    }
  }

  /** Takes bytes. Throws if they can't be right. */
  feed(chunk: Buffer): void {
    this.#pending.push(chunk);
    this.#pendingBytes += chunk.length;
    while (this.#pendingBytes >= this.#neededBytes) {
      if (this.#stage === 'unforetold') {
        this.#pending = [];
        this.#pendingBytes = 0;
        return;
      }
      const all = this.#pending.length === 1 ? this.#pending[0] : Buffer.concat(this.#pending);
      const whole = all ?? Buffer.alloc(0);
      const taken = whole.subarray(0, this.#neededBytes);
      this.#pending = [whole.subarray(this.#neededBytes)];
      this.#pendingBytes -= this.#neededBytes;
      this.#neededBytes = this.#steps.next(taken).value ?? 1;
    }
  }

  /** The server has closed. Throws if it owed something. */
  finish(): void {
    if (this.#mayBreak || this.#stage === 'unforetold') {
      return;
    }
    require(this.#pendingBytes === 0, () => `closed within a reply, ${this.#pendingBytes} bytes`);
    require(this.#stage !== 'greeting', () => 'closed without a greeting');
    require(this.#options.length === 0, () => `option ${this.#options[0]?.option} not answered`);
    const [owed] = this.#open.values();
    require(owed === undefined, () => `not answered: ${describe(owed?.expected)}`);
  }

  /** Asks for bytes by their number. */
  *#run(): Generator<number, void, Buffer> {
    const greeting = yield 18;
    require(greeting.toString('latin1', 0, 16) === 'NBDMAGICIHAVEOPT', () => 'greeting');
    require(greeting.readUInt16BE(16) === 3, () => `greeting flags ${greeting.readUInt16BE(16)}`);
    this.#stage = 'options';
    for (let next = this.#options[0]; next !== undefined; next = this.#options[0]) {
      yield* this.#option(next);
      this.#options.shift();
      this.replies += 1;
    }
    if (this.#agreed === undefined) {
      // There is nothing more to say in step.
      yield 1;
      require(this.#mayBreak, () => 'bytes behind the last reply');
      this.#stage = 'unforetold';
      return;
    }
    this.#stage = 'transmission';
    while (this.#stage === 'transmission') {
      yield* this.#agreed.mode === 'simple'
        ? this.#simple(this.#agreed)
        : this.#chunk(this.#agreed);
    }
  }

  *#option({
    option,
    outcome,
  }: {
    option: number;
    outcome: OptionOutcome;
  }): Generator<number, void, Buffer> {
    if (outcome.kind === 'named') {
      const answer = yield outcome.zeroes ? 134 : 10;
      this.#checkExport(answer.readBigUInt64BE(0), answer.readUInt16BE(8));
      require(isZero(answer.subarray(10)), () => 'zeroes of EXPORT_NAME');
      return;
    }
    if (option === OPT.setMetaContext) {
      this.#contextIds = new Map();
    }
    for (;;) {
      const header = yield 20;
      require(header.readBigUInt64BE(0) === MAGIC.optionReply, () => 'option reply magic');
      const said = header.readUInt32BE(8);
      const type = header.readUInt32BE(12);
      const length = header.readUInt32BE(16);
      require(said === option, () => `reply to option ${said} instead of ${option}`);
      require(length <= MAX_OPTION_REPLY_BYTES, () => `option reply of ${length} bytes`);
      const data = length === 0 ? Buffer.alloc(0) : yield length;
      if (type === REP.ack || type > REP.firstError) {
        const isAck = type === REP.ack;
        require(isAck ? length === 0 : type <= LAST_OPTION_ERROR, () => `option reply ${type}`);
        const right = outcome.kind === 'either' || isAck === (outcome.kind === 'ack');
        require(right, () => `option ${option}: ${type.toString(16)} ${data.toString()}`);
        return;
      }
      this.#optionData(option, type, data);
    }
  }

  #optionData(option: number, type: number, data: Buffer): void {
    const text = (from: number): string => data.toString('utf8', from);
    if (type === REP.server && option === OPT.list) {
      require(data.readUInt32BE(0) <= data.length - 4, () => 'name of a listed export');
    } else if (type === REP.info && (option === OPT.info || option === OPT.go)) {
      if (data.readUInt16BE(0) === 0) {
        require(data.length === 12, () => `INFO_EXPORT of ${data.length} bytes`);
        if (option === OPT.go) {
          this.#checkExport(data.readBigUInt64BE(2), data.readUInt16BE(10));
        }
      }
    } else if (type === REP.metaContext && option === OPT.setMetaContext) {
      const id = data.readUInt32BE(0);
      require(!this.#contextIds.has(id), () => `context id ${id} twice`);
      this.#contextIds.set(id, text(4));
    } else {
      const listed = type === REP.metaContext && option === OPT.listMetaContext;
      require(listed, () => `reply of type ${type} to option ${option}`);
    }
  }

  #checkExport(size: bigint, flags: number): void {
    const agreed = this.#agreed;
    require(agreed !== undefined, () => 'served what is not there');
    require(size === BigInt(agreed.truth.data.length), () => `size ${size}`);
    // HAS_FLAGS and READ_ONLY, and nothing that would let it write.
    require((flags & 0x0003) === 0x0003, () => `flags ${flags}`);
    require((flags & 0x0060) === 0, () => `flags ${flags} offer to write`);
  }

  *#simple(agreed: Agreed): Generator<number, void, Buffer> {
    const header = yield 16;
    require(header.readUInt32BE(0) === MAGIC.simpleReply, () =>
      `simple reply ${header.toString('hex')}`);
    const error = header.readUInt32BE(4);
    const open = this.#find(header.readBigUInt64BE(8));
    if (open === undefined) {
      // What it was asked, and so how long this reply is, nobody knows.
      this.#stage = 'unforetold';
      return;
    }
    const { request, errors } = open.expected;
    require(errors.includes(error), () => `error ${error} for ${describe(open.expected)}`);
    if (error === 0 && request.type === CMD.read && request.length > 0n) {
      const data = yield Number(request.length);
      this.#checkData(agreed, Number(request.offset), data);
    }
    this.#open.delete(request.cookie);
    this.replies += 1;
  }

  #find(cookie: bigint): Open | undefined {
    const open = this.#open.get(cookie);
    require(open !== undefined || this.#mayBreak, () => `nobody asked ${cookie.toString(16)}`);
    return open;
  }

  #checkData(agreed: Agreed, offset: number, data: Buffer): void {
    const { truth } = agreed;
    const right = truth.data.compare(data, 0, data.length, offset, offset + data.length) === 0;
    require(right, () => `wrong data at ${offset}, ${data.length} bytes`);
  }

  *#chunk(agreed: Agreed): Generator<number, void, Buffer> {
    const extended = agreed.mode === 'extended';
    const header = yield extended ? 32 : 20;
    const magic = extended ? MAGIC.extendedChunk : MAGIC.chunk;
    require(header.readUInt32BE(0) === magic, () => `chunk ${header.toString('hex')}`);
    const length = extended ? header.readBigUInt64BE(24) : BigInt(header.readUInt32BE(16));
    require(length <= MAX_PAYLOAD_BYTES, () => `chunk of ${length} bytes`);
    const chunk: Chunk = {
      flags: header.readUInt16BE(4),
      type: header.readUInt16BE(6),
      cookie: header.readBigUInt64BE(8),
      ...(extended && { offset: header.readBigUInt64BE(16) }),
    };
    require((chunk.flags & ~1) === 0, () => `chunk flags ${chunk.flags}`);
    const payload = length === 0n ? Buffer.alloc(0) : yield Number(length);
    const open = this.#find(chunk.cookie);
    if (open !== undefined) {
      this.#take(agreed, open, chunk, payload);
    }
  }

  #take(agreed: Agreed, open: Open, chunk: Chunk, payload: Buffer): void {
    const { expected } = open;
    const { request } = expected;
    const fault = (what: string) => (): string => `${what} in the reply to ${describe(expected)}`;
    const { offset = request.offset } = chunk;
    require(offset === request.offset, fault(`offset ${offset} of the header`));
    const done = (chunk.flags & 1) !== 0;
    switch (chunk.type) {
      case CHUNK.none:
        require(payload.length === 0 && done, fault('NONE with a payload or in the middle'));
        break;
      case CHUNK.data:
        require(request.type === CMD.read && payload.length > 8, fault('data'));
        open.dataChunks += 1;
        this.#cover(open, payload.readBigUInt64BE(0), payload.length - 8);
        this.#checkData(agreed, Number(payload.readBigUInt64BE(0)), payload.subarray(8));
        break;
      case CHUNK.hole: {
        require(request.type === CMD.read && payload.length === 12, fault('hole'));
        const from = payload.readBigUInt64BE(0);
        this.#cover(open, from, payload.readUInt32BE(8));
        const at = Number(from);
        const hole = agreed.truth.data.subarray(at, at + payload.readUInt32BE(8));
        require(isZero(hole), fault(`hole at ${at} where data is`));
        break;
      }
      case CHUNK.status:
      case CHUNK.statusExt:
        require(request.type === CMD.blockStatus, fault('block status'));
        require((chunk.type === CHUNK.statusExt) === (agreed.mode === 'extended'), fault('kind'));
        this.#status(agreed, open, payload, chunk.type === CHUNK.statusExt);
        break;
      case CHUNK.error:
      case CHUNK.errorOffset:
        this.#error(open, chunk.type, payload);
        break;
      default:
        throw new Fault(fault(`chunk of type ${chunk.type}`)());
    }
    if (done) {
      this.#done(agreed, open);
    }
  }

  #cover(open: Open, from: bigint, length: number): void {
    const { request } = open.expected;
    const start = Number(from);
    const end = start + length;
    const within = from >= request.offset && BigInt(end) <= request.offset + request.length;
    const overlaps = open.covered.some(([s, e]) => start < e && s < end);
    const fine = length > 0 && within && !overlaps;
    require(fine, () => `chunk ${start}+${length} in the reply to ${describe(open.expected)}`);
    open.covered.push([start, end]);
  }

  #status(agreed: Agreed, open: Open, payload: Buffer, ext: boolean): void {
    const { expected } = open;
    const { request } = expected;
    const fault = (what: string) => (): string => `${what} in the reply to ${describe(expected)}`;
    const start = ext ? 8 : 4;
    const step = ext ? 16 : 8;
    const count = (payload.length - start) / step;
    require(Number.isInteger(count) && count >= 1, fault(`status of ${payload.length} bytes`));
    require(!ext || payload.readUInt32BE(4) === count, fault('count of extents'));
    require((request.flags & FLAG.reqOne) === 0 || count === 1, fault(`${count} extents`));
    const name = this.#contextIds.get(payload.readUInt32BE(0));
    require(name !== undefined && !open.contexts.has(name), fault(`context ${name}`));
    let at = Number(request.offset);
    let total = 0;
    for (let index = 0; index < count; index += 1) {
      const place = start + index * step;
      const length = ext ? Number(payload.readBigUInt64BE(place)) : payload.readUInt32BE(place);
      const flags = ext
        ? Number(payload.readBigUInt64BE(place + 8))
        : payload.readUInt32BE(place + 4);
      require(length > 0, fault('an empty extent'));
      const wrong = extentFault(agreed.truth, name, at, length, flags);
      require(wrong === undefined, fault(`${name}: ${wrong}`));
      at += length;
      total += length;
    }
    require(BigInt(total) <= request.length, fault(`${total} bytes described`));
    open.contexts.set(name, total);
  }

  #error(open: Open, type: number, payload: Buffer): void {
    const { expected } = open;
    const fault = (what: string) => (): string => `${what} in the reply to ${describe(expected)}`;
    const tail = type === CHUNK.errorOffset ? 8 : 0;
    require(payload.length >= 6 + tail, fault(`error of ${payload.length} bytes`));
    const error = payload.readUInt32BE(0);
    require(KNOWN_ERRORS.has(error), fault(`error ${error}`));
    const message = payload.length - 6 - tail;
    require(payload.readUInt16BE(4) === message, fault('length of a message'));
    require(open.error === 0, fault('a second error'));
    open.error = error;
  }

  /** The reply is complete. */
  #done(agreed: Agreed, open: Open): void {
    const { expected, covered, contexts, dataChunks, error } = open;
    const { request, errors } = expected;
    const fault = (what: string) => (): string => `${what} in the reply to ${describe(expected)}`;
    require(errors.includes(error), fault(`error ${error}`));
    if (error === 0 && request.type === CMD.read) {
      const total = covered.reduce((sum, [start, end]) => sum + end - start, 0);
      require(BigInt(total) === request.length, fault(`${total} bytes`));
      require((request.flags & FLAG.df) === 0 || dataChunks <= 1, fault('fragments'));
    }
    if (error === 0 && request.type === CMD.blockStatus) {
      const names = agreed.contexts ?? [...this.#contextIds.values()];
      const complete = names.every((name) => contexts.has(name)) && contexts.size === names.length;
      require(complete, fault(`contexts ${[...contexts.keys()].join()}`));
      require(new Set(contexts.values()).size === 1, fault('contexts of different lengths'));
    }
    this.#open.delete(request.cookie);
    this.replies += 1;
  }
}

function describe(expected: ExpectedReply | undefined): string {
  if (expected === undefined) {
    return 'nothing';
  }
  const { type, flags, offset, length } = expected.request;
  return `command ${type}, flags ${flags}, ${length} bytes at ${offset} (errors ${expected.errors})`;
}
