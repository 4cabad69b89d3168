// SPDX-License-Identifier: Apache-2.0
/**
 * The transmission phase of one connection (section "Transmission"): requests are
 * parsed as they come, carried out side by side, and answered in whatever order
 * they are done.
 *
 * ```
 *  open ──DISC, end of the stream, drain()──▶ draining ──all answered──▶ over
 *    └────violation, failure, destroy()──────────┴─────────────────────────┘
 * ```
 */
import type { BufferPool, ConnectionBudget } from './budget.ts';
import {
  BASE_ALLOCATION,
  NBD_CMD_BLOCK_STATUS,
  NBD_CMD_READ,
  NBD_REPLY_FLAG_DONE,
  NBD_STATE_ZERO,
} from './constants.ts';
import { NBD_EIO, type NbdError, readErrorFor } from './errors.ts';
import type { ExtentMap } from './extents.ts';
import { countRequest, type ExportFigures, type RequestKind } from './figures.ts';
import type { Agreement } from './handshake.ts';
import type { Limits } from './limits.ts';
import type { Logger } from './logger.ts';
import { statusRange } from './meta-context.ts';
import {
  type RequestRules,
  type ValidRequest,
  validateRequest,
  validateStatusPayload,
} from './validate.ts';
import {
  decodeRequest,
  encodeErrorChunk,
  encodeNone,
  encodeOffsetHole,
  encodeSimpleReply,
  offsetDataHeaderBytes,
  type ReplyTarget,
  type Request,
  SIMPLE_REPLY_BYTES,
  writeBlockStatus,
  writeOffsetData,
  writeSimpleReply,
} from './wire.ts';

/** What the engine needs of the connection that it serves. */
export interface TransmissionOutlet {
  /** Sends bytes in the order of the calls. `done` is called once, sent or not, never at once. */
  write(bytes: Buffer, done: () => void): void;
  /** Whether more bytes may be received. */
  receiving(wanted: boolean): void;
  /** All that was asked is answered, and nothing more will be. */
  finished(): void;
  /** The stream can't go on: hard disconnect. */
  broken(reason: string, peersFault: boolean): void;
}

/** What the engine works with. */
export interface TransmissionOptions {
  readonly agreement: Agreement;
  readonly limits: Limits;
  readonly budget: ConnectionBudget;
  readonly pool: BufferPool;
  readonly outlet: TransmissionOutlet;
  readonly logger: Logger;
  /** What is counted for the export, over all its connections. */
  readonly figures: ExportFigures;
  /** Whether the export has failed since: nothing it says is to be believed any more. */
  readonly hasFailed: () => boolean;
}

/** Shorter holes are read like data: a chunk of their own would cost more. */
const SHORTEST_HOLE_BYTES = 65_536;
const EMPTY: Buffer = Buffer.alloc(0);

/** A part of a read: data to be read, or zeroes to be told. */
interface Segment {
  readonly start: number;
  readonly end: number;
  readonly zero: boolean;
}

/** A request in flight: where its reply goes, and what is counted of it. */
interface Asked extends ReplyTarget {
  readonly kind: RequestKind;
  /** When it was parsed, on the clock of `performance.now()`. */
  readonly sinceMs: number;
}

function kindOf(type: number): RequestKind {
  switch (type) {
    case NBD_CMD_READ:
      return 'read';
    case NBD_CMD_BLOCK_STATUS:
      return 'block_status';
    default:
      return 'other';
  }
}

type ReadRequest = Extract<ValidRequest, { kind: 'read' }>;
type StatusRequest = Extract<ValidRequest, { kind: 'status' }>;

/** Splits a read at the holes that are worth a chunk. */
function* segments(map: ExtentMap, offset: number, length: number): Generator<Segment> {
  const end = offset + length;
  const shortest = Math.min(SHORTEST_HOLE_BYTES, length);
  let start = offset;
  for (const run of map.runs(offset, end)) {
    if ((run.flags & NBD_STATE_ZERO) !== 0 && run.end - run.start >= shortest) {
      if (run.start > start) {
        yield { start, end: run.start, zero: false };
      }
      yield { start: run.start, end: run.end, zero: true };
      start = run.end;
    }
  }
  if (start < end) {
    yield { start, end, zero: false };
  }
}

export class Transmission {
  readonly #options: TransmissionOptions;
  readonly #rules: RequestRules;
  readonly #allocation: ExtentMap | undefined;
  readonly #logRequests: boolean;
  readonly #paced: boolean;
  #state: 'open' | 'draining' | 'over' = 'open';
  /** Received and not parsed. */
  #input: Buffer = EMPTY;
  #parsing = false;
  #stalled = false;
  /** Payload that is still to come and to be thrown away. */
  #skipBytes = 0;
  /** Payload that is waited for as a whole: a few context ids. */
  #wantedBytes = 0;
  /** The request that the payload belongs to, and what to do with it then. */
  #awaiting: { readonly asked: Asked; readonly go: (payload: Buffer) => void } | undefined;
  /** The peer has sent its last byte, which may not be parsed yet. */
  #ended = false;
  #inFlight = 0;
  /** A simple reply in several pieces bars all others from the stream until it is complete. */
  #exclusive = false;
  #barred: (() => void)[] = [];
  #whenIdle: (() => void)[] = [];

  constructor(options: TransmissionOptions) {
    const { agreement, limits, logger } = options;
    this.#options = options;
    this.#rules = {
      sizeBytes: agreement.export.source.sizeBytes,
      headers: agreement.headers,
      contextIds: agreement.contexts.map(({ id }) => id),
      limits,
    };
    this.#allocation = agreement.export.contexts.get(BASE_ALLOCATION);
    this.#paced = (agreement.export.bandwidth?.length ?? 0) > 0;
    this.#logRequests = logger.isLevelEnabled?.('debug') ?? true;
  }

  /** Takes bytes from the peer. */
  receive(chunk: Buffer): void {
    if (this.#state === 'open') {
      this.#input = this.#input.length === 0 ? chunk : Buffer.concat([this.#input, chunk]);
      this.#parse();
    }
  }

  /** Takes that there are no more bytes: what was received is still answered. */
  end(): void {
    this.#ended = true;
    if (!this.#stalled) {
      this.drain();
    }
  }

  /** Takes no more requests; `finished` is called once those in flight are answered. */
  drain(): void {
    if (this.#state === 'open') {
      this.#state = 'draining';
      this.#input = EMPTY;
      this.#options.outlet.receiving(true);
      this.#dropAwaiting();
      this.#checkFinished();
    }
  }

  /** The stream is gone: nothing more is read or sent. */
  destroy(): void {
    if (this.#state !== 'over') {
      this.#state = 'over';
      this.#input = EMPTY;
      this.#releaseBarred();
      this.#dropAwaiting();
      for (const cap of this.#options.agreement.export.bandwidth ?? []) {
        cap.leave(this);
      }
    }
  }

  /** Forgets a request whose payload will not come any more. */
  #dropAwaiting(): void {
    if (this.#awaiting !== undefined) {
      const { asked } = this.#awaiting;
      this.#awaiting = undefined;
      this.#answered(asked, true);
    }
  }

  /** Resolves when nothing of this connection uses the source or a buffer any more. */
  idle(): Promise<void> {
    return new Promise((resolve) => {
      if (this.#inFlight === 0) {
        resolve();
      } else {
        this.#whenIdle.push(resolve);
      }
    });
  }

  #parse(): void {
    if (this.#parsing) {
      return;
    }
    this.#parsing = true;
    let at = 0;
    while (this.#state === 'open') {
      if (this.#skipBytes > 0) {
        const skipped = Math.min(this.#skipBytes, this.#input.length - at);
        this.#skipBytes -= skipped;
        at += skipped;
        if (this.#skipBytes > 0) {
          break;
        }
      }
      if (this.#input.length - at < this.#wantedBytes) {
        break;
      }
      const awaiting = this.#awaiting;
      if (awaiting !== undefined) {
        const payload = this.#input.subarray(at, at + this.#wantedBytes);
        at += this.#wantedBytes;
        this.#wantedBytes = 0;
        this.#awaiting = undefined;
        awaiting.go(payload);
      }
      if (this.#inFlight >= this.#options.limits.requestsInFlight) {
        this.#stalled = true;
        break;
      }
      const decoded = decodeRequest(this.#input, at, this.#rules.headers === 'extended');
      if (decoded.kind === 'need') {
        break;
      }
      if (decoded.kind === 'violation') {
        this.#break(decoded.reason, true);
        break;
      }
      at += decoded.bytes;
      this.#accept(decoded.value);
    }
    // A view of a received buffer keeps it alive: at most one per connection, of 64 KiB.
    this.#input = this.#state === 'open' ? this.#input.subarray(at) : EMPTY;
    this.#parsing = false;
    if (this.#stalled) {
      this.#options.outlet.receiving(false);
    }
  }

  #accept(request: Request): void {
    const valid = validateRequest(request, this.#rules);
    if (this.#logRequests) {
      const { type, flags, offset, length } = request;
      const fields = { type, flags, offset, length, outcome: valid.kind };
      this.#options.logger.debug(
        valid.kind === 'refuse' ? { ...fields, reason: valid.message } : fields,
        'request',
      );
    }
    if (valid.kind === 'disconnect') {
      this.drain();
      return;
    }
    if (valid.kind === 'violation') {
      this.#break(valid.reason, true);
      return;
    }
    const asked: Asked = {
      cookie: request.cookie,
      echoedOffset: request.echoedOffset,
      kind: kindOf(request.type),
      sinceMs: performance.now(),
    };
    this.#inFlight += 1;
    if (valid.kind === 'refuse' && valid.payloadBytes > 0) {
      this.#skipBytes = valid.payloadBytes;
      this.#awaiting = { asked, go: () => this.#refuse(asked, valid.error, valid.message) };
    } else if (valid.kind === 'statusPayload') {
      this.#wantedBytes = valid.payloadBytes;
      this.#awaiting = {
        asked,
        go: (payload) => {
          this.#carryOut(asked, validateStatusPayload(request, payload, this.#rules));
        },
      };
    } else {
      this.#carryOut(asked, valid);
    }
  }

  #carryOut(asked: Asked, valid: ValidRequest): void {
    switch (valid.kind) {
      case 'disconnect':
      case 'violation':
      case 'statusPayload':
        throw new Error(`${valid.kind} is no request to be carried out`);
      case 'refuse':
        this.#refuse(asked, valid.error, valid.message);
        return;
      case 'flush':
        this.#acknowledge(asked);
        return;
      case 'read':
        this.#guard(asked, this.#read(asked, valid));
        return;
      case 'status':
        this.#guard(asked, this.#status(asked, valid));
        return;
      default:
        valid satisfies never;
    }
  }

  /** A handler that throws is our own mistake: the connection ends, the server goes on. */
  #guard(asked: Asked, work: Promise<void>): void {
    work.catch((err: unknown) => {
      this.#options.logger.error({ err }, 'request handler failed');
      this.#break('internal error', false);
      this.#answered(asked, true);
    });
  }

  #break(reason: string, peersFault: boolean): void {
    if (this.#state !== 'over') {
      this.#options.outlet.broken(reason, peersFault);
      this.destroy();
    }
  }

  /** One request is done with, answered or dropped. */
  #answered(asked: Asked, failed: boolean): void {
    const seconds = (performance.now() - asked.sinceMs) / 1000;
    countRequest(this.#options.figures.requests[asked.kind], seconds, failed);
    this.#inFlight -= 1;
    if (this.#inFlight === 0) {
      for (const resolve of this.#whenIdle.splice(0)) {
        resolve();
      }
    }
    if (this.#stalled && this.#inFlight < this.#options.limits.requestsInFlight) {
      this.#stalled = false;
      this.#parse();
      if (!this.#stalled && this.#state === 'open') {
        if (this.#ended) {
          this.drain();
        } else {
          this.#options.outlet.receiving(true);
        }
      }
    }
    this.#checkFinished();
  }

  #checkFinished(): void {
    if (this.#state === 'draining' && this.#inFlight === 0) {
      this.#state = 'over';
      this.#options.outlet.finished();
    }
  }

  /** Sends a whole simple reply or a whole chunk once no other reply bars the stream. */
  #send(bytes: Buffer, done: () => void): void {
    if (this.#exclusive && this.#state !== 'over') {
      this.#barred.push(() => this.#options.outlet.write(bytes, done));
    } else {
      this.#options.outlet.write(bytes, done);
    }
  }

  #releaseBarred(): void {
    this.#exclusive = false;
    // The next to take the stream for itself bars those behind it again.
    const barred = this.#barred.splice(0);
    for (const [index, act] of barred.entries()) {
      if (this.#exclusive) {
        this.#barred.unshift(...barred.slice(index));
        return;
      }
      act();
    }
  }

  /** Waits until no other reply bars the stream, then bars it. */
  async #takeStream(): Promise<void> {
    if (this.#exclusive && this.#state !== 'over') {
      await new Promise<void>((resolve) => {
        this.#barred.push(() => {
          this.#exclusive = true;
          resolve();
        });
      });
    }
    this.#exclusive = true;
  }

  #writeAndWait(bytes: Buffer): Promise<void> {
    return new Promise((resolve) => this.#options.outlet.write(bytes, resolve));
  }

  #acknowledge(asked: Asked): void {
    const reply =
      this.#rules.headers !== 'simple'
        ? encodeNone(asked, NBD_REPLY_FLAG_DONE)
        : encodeSimpleReply(asked, 0);
    this.#send(reply, () => this.#answered(asked, false));
  }

  #refuse(asked: Asked, error: NbdError, message: string, offset?: number): void {
    const reply =
      this.#rules.headers !== 'simple'
        ? encodeErrorChunk(asked, NBD_REPLY_FLAG_DONE, error, message, offset)
        : encodeSimpleReply(asked, error);
    this.#send(reply, () => this.#answered(asked, true));
  }

  async #read(asked: Asked, request: ReadRequest): Promise<void> {
    const { offset, length, dontFragment } = request;
    const { headers, limits } = this.#rules;
    if (length === 0) {
      this.#acknowledge(asked);
    } else if (headers === 'simple' && length > limits.pieceBytes) {
      await this.#readLongSimple(asked, offset, length);
    } else if (headers === 'simple' || dontFragment || this.#allocation === undefined) {
      await this.#readSegments(asked, [{ start: offset, end: offset + length, zero: false }]);
    } else {
      await this.#readSegments(asked, segments(this.#allocation, offset, length));
    }
  }

  /** Answers a read piece by piece, each read before its header leaves. */
  async #readSegments(asked: Asked, parts: Iterable<Segment>): Promise<void> {
    const iterator = parts[Symbol.iterator]();
    let next = iterator.next();
    while (!next.done) {
      const { start, end, zero } = next.value;
      next = iterator.next();
      const isLast = next.done === true;
      if (
        !(zero
          ? await this.#sendHole(asked, start, end, isLast)
          : await this.#sendData(asked, start, end, isLast))
      ) {
        return;
      }
    }
  }

  /** Sends one chunk for zeroes. Returns whether the reply goes on. */
  async #sendHole(asked: Asked, start: number, end: number, isLast: boolean): Promise<boolean> {
    const { budget, hasFailed } = this.#options;
    const flags = isLast ? NBD_REPLY_FLAG_DONE : 0;
    const chunk = encodeOffsetHole(asked, flags, start, end - start);
    if (!budget.tryTake(chunk.length)) {
      await budget.take(chunk.length);
    }
    if (hasFailed()) {
      budget.give(chunk.length);
      this.#refuse(asked, NBD_EIO, 'export has failed', start);
      return false;
    }
    this.#send(chunk, () => {
      budget.give(chunk.length);
      if (isLast) {
        this.#answered(asked, false);
      }
    });
    return true;
  }

  /** Waits until so much data may pass the export's caps. */
  async #pace(bytes: number): Promise<void> {
    for (const cap of this.#options.agreement.export.bandwidth ?? []) {
      if (this.#state !== 'over' && !cap.tryTake(bytes)) {
        await cap.take(bytes, this);
      }
    }
  }

  /** Reads and sends `[start, end)` in pieces. Returns whether the reply goes on. */
  async #sendData(asked: Asked, start: number, end: number, isLast: boolean): Promise<boolean> {
    const { budget, pool, limits } = this.#options;
    const { headers } = this.#rules;
    const headerBytes =
      headers === 'simple' ? SIMPLE_REPLY_BYTES : offsetDataHeaderBytes(headers === 'extended');
    for (let position = start; position < end; ) {
      const length = Math.min(limits.pieceBytes, end - position);
      if (this.#paced) {
        // Before the budget, of which others have a use meanwhile.
        await this.#pace(length);
      }
      if (!budget.tryTake(length)) {
        await budget.take(length);
      }
      const buffer = pool.take(length);
      const release = (): void => {
        pool.give(buffer);
        budget.give(length);
      };
      const chunk = buffer.subarray(0, headerBytes + length);
      const error = await this.#fill(chunk.subarray(headerBytes), position);
      if (error !== undefined) {
        release();
        this.#refuse(asked, error, 'read failed', position);
        return false;
      }
      const ends = isLast && position + length === end;
      if (headers === 'simple') {
        writeSimpleReply(chunk, asked, 0);
      } else {
        writeOffsetData(chunk, asked, ends ? NBD_REPLY_FLAG_DONE : 0, position, length);
      }
      this.#send(chunk, () => {
        release();
        if (ends) {
          this.#answered(asked, false);
        }
      });
      position += length;
    }
    return true;
  }

  /**
   * Answers a read with a simple reply that is longer than a piece. Its pieces must
   * follow each other on the stream, so it keeps one buffer and bars all other
   * replies meanwhile. Only its first piece is read before the header has left: an
   * error after that can only end the connection.
   */
  async #readLongSimple(asked: Asked, offset: number, length: number): Promise<void> {
    const { budget, pool, limits } = this.#options;
    const pieceBytes = limits.pieceBytes;
    await this.#pace(pieceBytes);
    if (!budget.tryTake(pieceBytes)) {
      await budget.take(pieceBytes);
    }
    const buffer = pool.take(pieceBytes);
    const end = offset + length;
    const error = await this.#fill(
      buffer.subarray(SIMPLE_REPLY_BYTES, SIMPLE_REPLY_BYTES + pieceBytes),
      offset,
    );
    if (error === undefined) {
      await this.#takeStream();
      writeSimpleReply(buffer, asked, 0);
      await this.#writeAndWait(buffer.subarray(0, SIMPLE_REPLY_BYTES + pieceBytes));
      let position = offset + pieceBytes;
      while (position < end && this.#state !== 'over') {
        const piece = buffer.subarray(0, Math.min(pieceBytes, end - position));
        await this.#pace(piece.length);
        if ((await this.#fill(piece, position)) !== undefined) {
          this.#break('read failed in the middle of a simple reply', false);
          break;
        }
        await this.#writeAndWait(piece);
        position += piece.length;
      }
      this.#releaseBarred();
    }
    pool.give(buffer);
    budget.give(pieceBytes);
    if (error === undefined) {
      this.#answered(asked, false);
    } else {
      this.#refuse(asked, error, 'read failed', offset);
    }
  }

  /** Reads from the export. Returns the error that the client gets, if any. */
  async #fill(buffer: Buffer, offset: number): Promise<NbdError | undefined> {
    const { agreement, logger, hasFailed } = this.#options;
    if (this.#state === 'over') {
      return NBD_EIO;
    }
    try {
      if (!hasFailed()) {
        await agreement.export.source.read(buffer, offset);
      }
    } catch (err) {
      logger.error({ err, offset, length: buffer.length }, 'read failed');
      return readErrorFor(err);
    }
    this.#options.figures.readBytes += buffer.length;
    // It may have failed while we read: then the data may be wrong, whatever the read says.
    return hasFailed() ? NBD_EIO : undefined;
  }

  async #status(asked: Asked, request: StatusRequest): Promise<void> {
    const { agreement, budget, limits, hasFailed } = this.#options;
    const { offset, length, requestOne, contextIds } = request;
    const contexts = agreement.contexts.filter(({ id }) => contextIds.includes(id));
    const extended = this.#rules.headers === 'extended';
    const most = limits.statusExtents;
    const range = statusRange(contexts, offset, length, most, requestOne, extended);
    if (!budget.tryTake(range.replyBytes)) {
      await budget.take(range.replyBytes);
    }
    if (hasFailed()) {
      budget.give(range.replyBytes);
      this.#refuse(asked, NBD_EIO, 'export has failed');
      return;
    }
    const reply = Buffer.allocUnsafe(range.replyBytes);
    let at = 0;
    for (const [index, { id, map }] of contexts.entries()) {
      const flags = index === contexts.length - 1 ? NBD_REPLY_FLAG_DONE : 0;
      at = writeBlockStatus(reply, at, asked, { flags, contextId: id }, map, range);
    }
    this.#send(reply, () => {
      budget.give(range.replyBytes);
      this.#answered(asked, false);
    });
  }
}
