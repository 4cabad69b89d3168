// SPDX-License-Identifier: Apache-2.0
/** What a service tells its manager: sd_notify(3). */
import { env, hrtime } from 'node:process';
import type { Logger } from 'pino';
import { notifyService } from './native.ts';

/** The manager's side of this process, if it has a manager. */
export class ServiceManager {
  readonly #socket: string | undefined;
  readonly #log: Logger;

  constructor(log: Logger, environment: NodeJS.ProcessEnv = env) {
    this.#socket = environment['NOTIFY_SOCKET'] || undefined;
    this.#log = log;
  }

  #send(text: string): void {
    if (this.#socket === undefined) {
      return;
    }
    try {
      notifyService(this.#socket, text);
    } catch (err) {
      this.#log.warn({ err }, 'the service manager cannot be told');
    }
  }

  /** Requests are answered from now on. */
  ready(status: string): void {
    this.#send(`READY=1\nSTATUS=${status}`);
  }

  /** The configuration is read again; {@link ready} ends it. */
  reloading(): void {
    this.#send(`RELOADING=1\nMONOTONIC_USEC=${hrtime.bigint() / 1000n}`);
  }

  stopping(): void {
    this.#send('STOPPING=1');
  }
}
