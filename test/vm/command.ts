// SPDX-License-Identifier: Apache-2.0
// The host's side of agent.py: one command in the guest, over one connection.

import { connect, type Socket } from 'node:net';
import { setTimeout as delay } from 'node:timers/promises';

/** A command's result; its texts are decoded as UTF-8. */
export interface CommandResult {
  readonly stdout: string;
  readonly stderr: string;
  /** Exit code; 128 + N when signal N ended the command. */
  readonly code: number;
}

const frameHeaderBytes = 5;

/** A command that was started in a guest. */
export class GuestCommand {
  readonly text: string;
  readonly #socket: Socket;
  readonly #chunks: { stdout: Buffer[]; stderr: Buffer[] } = { stdout: [], stderr: [] };
  readonly #listeners = new Set<() => void>();
  readonly #finished: Promise<number>;
  readonly #slowness: number;
  #code: number | undefined;
  #lost: Error | undefined;

  /**
   * @param port host port that leads to the agent.
   * @param text for `bash -c`.
   * @param explainLoss says why a connection was lost, e.g. the guest's end.
   * @param slowness by which all limits of time are multiplied.
   */
  constructor(port: number, text: string, explainLoss: () => Error, slowness = 1) {
    this.text = text;
    this.#slowness = slowness;
    this.#socket = connect({ host: '127.0.0.1', port, noDelay: true });
    const command = Buffer.from(text);
    const header = Buffer.alloc(4);
    header.writeUInt32BE(command.length);
    this.#socket.write(Buffer.concat([header, command]));
    this.#finished = new Promise((resolve, reject) => {
      let pending: Buffer = Buffer.alloc(0);
      this.#socket.on('data', (data: Buffer) => {
        pending = this.#receive(pending.length === 0 ? data : Buffer.concat([pending, data]));
        for (const listener of this.#listeners) listener();
        if (this.#code !== undefined) resolve(this.#code);
      });
      // 'close' follows every error, so one place decides what a loss means.
      this.#socket.on('error', () => {});
      this.#socket.on('close', () => {
        if (this.#code !== undefined) return;
        this.#lost = explainLoss();
        for (const listener of this.#listeners) listener();
        reject(this.#lost);
      });
    });
    // A loss is reported by whoever waits, not as an unhandled rejection.
    this.#finished.catch(() => {});
  }

  /** Takes the whole frames of `data`; returns what is left over. */
  #receive(data: Buffer): Buffer {
    let rest = data;
    while (rest.length >= frameHeaderBytes) {
      const end = frameHeaderBytes + rest.readUInt32BE(1);
      if (rest.length < end) break;
      const payload = rest.subarray(frameHeaderBytes, end);
      switch (String.fromCharCode(rest[0] ?? 0)) {
        case 'o':
          this.#chunks.stdout.push(Buffer.from(payload));
          break;
        case 'e':
          this.#chunks.stderr.push(Buffer.from(payload));
          break;
        case 'x':
          this.#code = payload.readInt32BE(0);
          this.#socket.end();
          break;
        default:
          this.#socket.destroy(new Error('unknown frame from the guest agent'));
          return Buffer.alloc(0);
      }
      rest = rest.subarray(end);
    }
    return rest;
  }

  #send(kind: string, payload: Uint8Array): void {
    const header = Buffer.alloc(frameHeaderBytes);
    header.write(kind, 'latin1');
    header.writeUInt32BE(payload.length, 1);
    this.#socket.write(Buffer.concat([header, payload]));
  }

  /** What the command has written so far. */
  get stdout(): string {
    return Buffer.concat(this.#chunks.stdout).toString();
  }

  get stderr(): string {
    return Buffer.concat(this.#chunks.stderr).toString();
  }

  /** undefined while the command runs. */
  get code(): number | undefined {
    return this.#code;
  }

  /** Sends a signal to the command's process group. */
  kill(signal: number): void {
    if (this.#code === undefined) this.#send('s', Uint8Array.of(signal));
  }

  /** Writes to the command's standard input. */
  write(text: string): void {
    this.#send('i', Buffer.from(text));
  }

  /** Closes the command's standard input. */
  endInput(): void {
    this.#send('i', new Uint8Array());
  }

  /** Drops the connection, upon which the agent kills the process group. */
  abandon(): void {
    this.#socket.destroy();
  }

  /**
   * Waits for the command's end.
   * @param timeoutMs after which the command is killed.
   * @throws Error when the time is over or the guest is lost.
   */
  async wait(timeoutMs: number): Promise<CommandResult> {
    const code = await this.#within(this.#finished, timeoutMs);
    return { stdout: this.stdout, stderr: this.stderr, code };
  }

  /**
   * Waits until the standard output matches.
   * @returns the match.
   * @throws Error when the command ends first, the time is over or the guest is lost.
   */
  async waitForOutput(pattern: RegExp, timeoutMs: number): Promise<RegExpExecArray> {
    let check: () => void = () => {};
    const found = new Promise<RegExpExecArray>((resolve, reject) => {
      check = () => {
        const match = pattern.exec(this.stdout);
        if (match !== null) resolve(match);
        else if (this.#lost !== undefined) reject(this.#lost);
        else if (this.#code !== undefined) {
          reject(
            new Error(
              `ended with ${this.#code} before ${pattern} was seen: ${this.text}\n${this.stdout}${this.stderr}`,
            ),
          );
        }
      };
      this.#listeners.add(check);
      check();
    });
    try {
      return await this.#within(found, timeoutMs);
    } finally {
      this.#listeners.delete(check);
    }
  }

  async #within<T>(promise: Promise<T>, stockTimeoutMs: number): Promise<T> {
    const timeoutMs = stockTimeoutMs * this.#slowness;
    const timer = new AbortController();
    const late = delay(timeoutMs, undefined, { signal: timer.signal }).then(() => {
      this.abandon();
      throw new Error(
        `not done within ${timeoutMs} ms in the guest: ${this.text}\n${this.stdout}${this.stderr}`,
      );
    });
    late.catch(() => {});
    try {
      return await Promise.race([promise, late]);
    } finally {
      timer.abort();
    }
  }
}
