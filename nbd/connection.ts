// SPDX-License-Identifier: Apache-2.0
/**
 * One client's socket: performs what the handshake and the transmission decide.
 *
 * ```
 *  handshake ──transmit──▶ transmission ──answered all──▶ ending ──▶ closed
 *      │  └───close──────────────────────────────────────────┘         ▲
 *      └──transmit, answer sent──▶ handedOver ──the engine is done──────┤
 *  any ──violation, failure, deadline, socket gone──────────────────────┘
 * ```
 */
import type { Socket } from 'node:net';
import type { Duplex } from 'node:stream';
import { type Identity, nameOf, PLAIN } from './access.ts';
import { type BufferPool, ConnectionBudget, type SharedBudget } from './budget.ts';
import type { ServedSocket, SocketEngine } from './engine.ts';
import type { Export } from './export.ts';
import type { ExportFigures } from './figures.ts';
import {
  type Agreement,
  afterTls,
  HANDSHAKE_START,
  type HandshakeEffect,
  type HandshakeState,
  type Offer,
  stepHandshake,
} from './handshake.ts';
import type { Limits } from './limits.ts';
import type { Logger } from './logger.ts';
import { CLIENT_LEFT, type DetachedTls, type TlsAcceptor, type TlsSession } from './tls.ts';
import { Transmission } from './transmission.ts';
import { encodeGreeting } from './wire.ts';

/** What a connection needs of its server. */
export interface ConnectionHost {
  readonly limits: Limits;
  readonly shared: SharedBudget;
  readonly pool: BufferPool;
  /** Takes over plain sockets of exports that it can serve, if there is one. */
  readonly engine: SocketEngine | undefined;
  /** What is offered to a client now. */
  offer(client: Identity): Offer;
  /** Absent where TLS is never offered. */
  readonly tls: TlsAcceptor | undefined;
  hasFailed(served: Export): boolean;
  /** What is counted for an export. */
  figures(served: Export): ExportFigures;
  /** The connection has left the handshake for transmission. */
  onTransmission(connection: Connection): void;
  /** The socket is closed; see {@link Connection.idle} for reads still in flight. */
  onClosed(connection: Connection): void;
}

export class Connection {
  /** What is spoken on: the client's socket, or TLS on top of it. */
  #socket: Duplex;
  readonly #host: ConnectionHost;
  #logger: Logger;
  #phase: 'handshake' | 'transmission' | 'handedOver' | 'ending' | 'closed' = 'handshake';
  #timer: NodeJS.Timeout | undefined;

  #handshake: HandshakeState = HANDSHAKE_START;
  #client: Identity = PLAIN;
  /** Parts the socket from TLS, for the engine. */
  #detach: (() => DetachedTls) | undefined;
  /** Received in the handshake and not consumed. */
  #received: Buffer[] = [];
  #receivedBytes = 0;
  /** There is nothing to be done before so many bytes are there. */
  #neededBytes = 1;
  /** An answer waits to be sent; the next option is not looked at before. */
  #blocked = false;

  #transmission: Transmission | undefined;
  #served: ServedSocket | undefined;
  #agreement: Agreement | undefined;
  /** Asked for between the two engines. */
  #draining = false;
  #corked = false;

  constructor(socket: Socket, host: ConnectionHost, logger: Logger) {
    this.#socket = socket;
    this.#host = host;
    this.#logger = logger;
  }

  /** Greets the client and serves it until the end. */
  start(): void {
    const socket = this.#socket;
    this.#listen();
    socket.on('close', () => {
      // A socket that was handed over is closed here, and goes on there.
      if (this.#phase !== 'handedOver') {
        this.#onClose();
      }
    });
    this.#timer = setTimeout(
      () => this.#abort('handshake took too long', true),
      this.#host.limits.handshakeMs,
    );
    this.#logger.debug({}, 'client connected');
    socket.write(encodeGreeting());
  }

  #listen(): void {
    const socket = this.#socket;
    socket.on('data', (chunk: Buffer) => this.#onData(chunk));
    socket.on('drain', () => this.#onDrain());
    socket.on('end', () => this.#onEnd());
    socket.on('error', (err) => {
      this.#logger.debug({ err }, 'connection lost');
      // Node's TLS leaves that to us.
      socket.destroy();
    });
  }

  /** The export that is being served, after the handshake. */
  get export(): Export | undefined {
    return this.#agreement?.export;
  }

  /** Answers what is in flight, takes no more, and closes; after a while by force. */
  drain(): void {
    if (this.#phase === 'handedOver') {
      this.#served?.drain();
    } else if (this.#phase === 'transmission' && this.#transmission !== undefined) {
      this.#startTimer();
      this.#transmission.drain();
    } else if (this.#phase === 'transmission') {
      this.#draining = true;
    } else if (this.#phase === 'handshake') {
      this.#abort('server is closing', false);
    }
  }

  /** Closes at once to make room for another. */
  evict(): void {
    this.#abort('too many connections in handshake', true);
  }

  /** Resolves when nothing of this connection uses the export's source any more. */
  async idle(): Promise<void> {
    await this.#transmission?.idle();
  }

  #startTimer(): void {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => {
      this.#logger.warn({}, 'client does not fetch its replies');
      this.#socket.destroy();
    }, this.#host.limits.drainMs);
  }

  #abort(reason: string, peersFault: boolean): void {
    if (this.#phase !== 'closed') {
      if (peersFault) {
        this.#logger.warn({ reason }, 'connection dropped');
      } else {
        this.#logger.info({ reason }, 'connection dropped');
      }
      this.#phase = 'closed';
      this.#socket.destroy();
    }
  }

  /** Sends what is left, then closes; what the client still says is ignored. */
  #end(): void {
    if (this.#phase !== 'closed') {
      this.#phase = 'ending';
      this.#startTimer();
      this.#socket.resume();
      this.#socket.end();
    }
  }

  #onData(chunk: Buffer): void {
    if (this.#phase === 'handshake') {
      this.#received.push(chunk);
      this.#receivedBytes += chunk.length;
      this.#negotiate();
    } else if (this.#transmission !== undefined) {
      this.#transmission.receive(chunk);
    } else if (this.#phase === 'transmission') {
      this.#received.push(chunk);
    }
  }

  #onDrain(): void {
    if (this.#blocked) {
      this.#blocked = false;
      this.#socket.resume();
      this.#negotiate();
    }
  }

  #onEnd(): void {
    if (this.#phase === 'transmission') {
      // The client sends no more, but may still wait for replies, for as long as its link takes.
      this.#transmission?.end();
    } else {
      this.#logger.debug({}, 'client left');
      this.#end();
    }
  }

  #onClose(): void {
    clearTimeout(this.#timer);
    if (this.#phase === 'handshake' && this.#handshake.phase === 'startingTls') {
      this.#logger.warn({ reason: CLIENT_LEFT }, 'connection dropped');
    }
    this.#phase = 'closed';
    this.#received = [];
    this.#transmission?.destroy();
    this.#logger.debug({}, 'connection closed');
    this.#host.onClosed(this);
  }

  #negotiate(): void {
    while (
      this.#phase === 'handshake' &&
      !this.#blocked &&
      this.#receivedBytes >= this.#neededBytes
    ) {
      // Only put together when a whole message may be there: a byte at a time costs no more.
      const input = this.#received.length === 1 ? this.#received[0] : undefined;
      const whole = input ?? Buffer.concat(this.#received);
      const step = stepHandshake(this.#handshake, whole, this.#host.offer(this.#client));
      this.#handshake = step.state;
      const rest = whole.subarray(step.consumedBytes);
      this.#received = rest.length > 0 ? [rest] : [];
      this.#receivedBytes = rest.length;
      this.#neededBytes = Math.max(step.neededBytes, 1);
      for (const effect of step.effects) {
        this.#perform(effect);
      }
    }
  }

  #perform(effect: HandshakeEffect): void {
    switch (effect.kind) {
      case 'send':
        if (!this.#socket.write(effect.bytes)) {
          this.#blocked = true;
          this.#socket.pause();
        }
        return;
      case 'startTls':
        this.#startTls(effect.acknowledgement);
        return;
      case 'transmit':
        this.#onAgreement(effect.agreement);
        return;
      case 'close':
        if (effect.violation) {
          this.#abort(effect.reason, true);
        } else {
          this.#logger.debug({ reason: effect.reason }, 'handshake ended');
          this.#end();
        }
        return;
      default:
        effect satisfies never;
    }
  }

  /**
   * Hands the socket over to TLS as soon as the acknowledgement has left in plain text. What
   * has arrived by then was sent in plain text, by whomever: it is thrown away.
   */
  #startTls(acknowledgement: Buffer): void {
    // Until now there is nothing else.
    const socket = this.#socket as Socket;
    const { tls } = this.#host;
    if (tls === undefined) {
      throw new Error('TLS was agreed on where there is none');
    }
    for (const event of ['data', 'drain', 'end']) {
      socket.removeAllListeners(event);
    }
    socket.pause();
    let thrownAwayBytes = this.#receivedBytes;
    this.#received = [];
    this.#receivedBytes = 0;
    socket.write(acknowledgement, () => {
      if (socket.readableLength > 0) {
        thrownAwayBytes += (socket.read() as Buffer).length;
      }
      if (thrownAwayBytes > 0) {
        this.#logger.warn({ thrownAwayBytes }, 'plain text behind STARTTLS is thrown away');
      }
      if (this.#phase === 'handshake') {
        tls.accept(socket).then(
          (session) => this.#onTls(session),
          (err: unknown) => {
            this.#logger.debug({ err }, 'no TLS');
            this.#abort(err instanceof Error ? err.message : String(err), true);
          },
        );
      }
    });
  }

  #onTls({ stream, client, protocol, cipher, detach }: TlsSession): void {
    if (this.#phase !== 'handshake') {
      stream.destroy();
      return;
    }
    this.#socket = stream;
    this.#client = client;
    this.#detach = detach;
    this.#handshake = afterTls(this.#handshake);
    this.#blocked = false;
    const name = nameOf(client);
    if (name !== undefined) {
      this.#logger = this.#logger.child({ client: name });
    }
    this.#logger.debug({ protocol, cipher }, 'TLS is on');
    this.#neededBytes = 1;
    this.#listen();
  }

  #onAgreement(agreement: Agreement): void {
    clearTimeout(this.#timer);
    this.#phase = 'transmission';
    this.#agreement = agreement;
    this.#logger = this.#logger.child({ export: agreement.export.name });
    const contexts = agreement.contexts.map(({ name }) => name);
    const { headers } = agreement;
    this.#logger.info({ headers, contexts }, 'client is served');
    this.#host.onTransmission(this);
    const plain = !this.#handshake.secure || this.#detach !== undefined;
    if (
      this.#host.engine === undefined ||
      !plain ||
      agreement.export.source.descriptor === undefined
    ) {
      this.#startTransmission(agreement);
      return;
    }
    // What the handshake still has to say must have left, and nothing more may be received here.
    this.#socket.pause();
    this.#socket.write('', () => {
      if (this.#phase === 'transmission' && !this.#handOver(agreement)) {
        this.#startTransmission(agreement);
      }
    });
  }

  /** Gives the socket to the engine. Returns whether it has taken it. */
  #handOver(agreement: Agreement): boolean {
    const socket = this.#socket;
    const { engine } = this.#host;
    const detached = this.#detach?.();
    // Node has no word for it, but every plain socket of every version has it.
    const handle = ((detached?.socket ?? socket) as { _handle?: { fd?: number } })._handle;
    if (handle?.fd === undefined || handle.fd < 0) {
      return false;
    }
    // A paused socket has received at most what its buffer holds.
    for (let chunk = socket.read(); chunk !== null; chunk = socket.read()) {
      this.#received.push(chunk as Buffer);
    }
    this.#received = this.#received.length > 1 ? [Buffer.concat(this.#received)] : this.#received;
    this.#served = engine?.serve({
      descriptor: handle.fd,
      agreement,
      received: this.#received[0] ?? Buffer.alloc(0),
      ...(detached !== undefined && { tls: detached.session }),
      onClosed: (reason, peersFault) => {
        if (reason === undefined) {
          this.#logger.info({}, 'client is done');
        } else if (peersFault) {
          this.#logger.warn({ reason }, 'connection dropped');
        } else {
          this.#logger.info({ reason }, 'connection dropped');
        }
        this.#onClose();
      },
      onReadFailed: (code, offset, length) => {
        this.#logger.error({ code, offset, length }, 'read failed');
      },
    });
    if (this.#served === undefined) {
      return false;
    }
    this.#received = [];
    this.#phase = 'handedOver';
    socket.destroy();
    if (this.#draining) {
      this.#served.drain();
    }
    return true;
  }

  #startTransmission(agreement: Agreement): void {
    const { limits, shared, pool } = this.#host;
    this.#transmission = new Transmission({
      agreement,
      limits,
      budget: new ConnectionBudget(shared, limits.connectionBytesInFlight),
      pool,
      logger: this.#logger,
      figures: this.#host.figures(agreement.export),
      hasFailed: () => this.#host.hasFailed(agreement.export),
      outlet: {
        write: (bytes, done) => this.#write(bytes, done),
        receiving: (wanted) => {
          if (wanted) {
            this.#socket.resume();
          } else {
            this.#socket.pause();
          }
        },
        finished: () => {
          this.#logger.info({}, 'client is done');
          this.#end();
        },
        broken: (reason, peersFault) => this.#abort(reason, peersFault),
      },
    });
    this.#blocked = false;
    this.#socket.resume();
    const [rest] = this.#received;
    this.#received = [];
    this.#receivedBytes = 0;
    if (rest !== undefined) {
      this.#transmission.receive(rest);
    }
    if (this.#draining) {
      this.#transmission.drain();
    }
  }

  /** Gathers what is written while the event loop delivers completed reads into one send. */
  #write(bytes: Buffer, done: () => void): void {
    if (!this.#corked) {
      this.#corked = true;
      this.#socket.cork();
      setImmediate(() => {
        this.#corked = false;
        this.#socket.uncork();
      });
    }
    this.#socket.write(bytes, () => done());
  }
}
