// SPDX-License-Identifier: Apache-2.0
/** What happens in the daemon, told to all who listen, in order. */

/** Something that happened. */
export type EventBody =
  | { readonly event: 'serving'; readonly checkpoint: string }
  | {
      readonly event: 'failed';
      readonly checkpoint: string;
      readonly reason: string;
      readonly message: string;
      readonly advice: string;
      readonly exitCode: number;
    }
  | { readonly event: 'store-grown'; readonly checkpoint: string; readonly sizeBytes: number }
  | { readonly event: 'store-low'; readonly checkpoint: string; readonly leftBytes: number }
  | {
      readonly event: 'ended';
      readonly checkpoint: string;
      readonly failed: boolean;
      readonly reason?: string;
    }
  | { readonly event: 'device-attached'; readonly device: string; readonly name: string }
  | { readonly event: 'device-detached'; readonly device: string; readonly name: string }
  | { readonly event: 'device-missing'; readonly device: string; readonly message: string }
  | { readonly event: 'checkpoint-deleted'; readonly checkpoint: string }
  | { readonly event: 'reloaded'; readonly warnings: readonly string[] }
  | { readonly event: 'reload-failed'; readonly message: string; readonly advice: string };

export type DaemonEvent = EventBody & {
  /** Counts from 1 with the daemon. */
  readonly id: number;
  /** ISO 8601. */
  readonly time: string;
};

/** What is kept for those who come back after a lost connection. */
const KEPT_EVENTS = 256;

export class EventBus {
  readonly #listeners = new Set<(event: DaemonEvent) => void>();
  readonly #kept: DaemonEvent[] = [];
  #last = 0;

  emit(body: EventBody): void {
    this.#last += 1;
    const event = { ...body, id: this.#last, time: new Date().toISOString() };
    this.#kept.push(event);
    if (this.#kept.length > KEPT_EVENTS) {
      this.#kept.shift();
    }
    for (const listener of this.#listeners) {
      listener(event);
    }
  }

  /**
   * Tells a listener what happens from now on.
   *
   * @param after id of the last event that it knows: what is kept of those since comes first
   * @returns what ends it
   */
  subscribe(listener: (event: DaemonEvent) => void, after?: number): () => void {
    for (const event of this.#kept) {
      if (after !== undefined && event.id > after) {
        listener(event);
      }
    }
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  }
}
