// SPDX-License-Identifier: Apache-2.0
// A small client for QEMU's machine protocol over a connected stream.

import type { Duplex } from 'node:stream';

interface Reply {
  readonly QMP?: unknown;
  readonly event?: string;
  readonly return?: unknown;
  readonly error?: { readonly class: string; readonly desc: string };
}

interface Waiting {
  readonly resolve: (value: unknown) => void;
  readonly reject: (error: Error) => void;
}

export class Qmp {
  readonly #stream: Duplex;
  readonly #waiting: Waiting[] = [];
  #closed = false;

  constructor(stream: Duplex) {
    this.#stream = stream;
    let pending = '';
    stream.setEncoding('utf8');
    stream.on('data', (text: string) => {
      const lines = (pending + text).split('\n');
      pending = lines.pop() ?? '';
      for (const line of lines.filter((candidate) => candidate.trim() !== '')) this.#receive(line);
    });
    const close = (): void => {
      this.#closed = true;
      for (const { reject } of this.#waiting.splice(0)) reject(new Error('QEMU ended'));
    };
    stream.on('close', close);
    stream.on('error', close);
  }

  #receive(line: string): void {
    const reply = JSON.parse(line) as Reply;
    if (reply.QMP !== undefined || reply.event !== undefined) return;
    // Replies come in the order of the commands.
    const waiting = this.#waiting.shift();
    if (reply.error === undefined) waiting?.resolve(reply.return);
    else waiting?.reject(new Error(`QEMU: ${reply.error.desc}`));
  }

  /** @throws Error with QEMU's description, or when QEMU has ended. */
  execute(command: string, args: Record<string, unknown> = {}): Promise<unknown> {
    if (this.#closed) return Promise.reject(new Error('QEMU ended'));
    return new Promise((resolve, reject) => {
      this.#waiting.push({ resolve, reject });
      this.#stream.write(`${JSON.stringify({ execute: command, arguments: args })}\n`);
    });
  }
}
