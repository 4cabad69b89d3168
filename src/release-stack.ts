// SPDX-License-Identifier: Apache-2.0
/** What has been acquired, released in the opposite order. */
export class ReleaseStack {
  readonly #releases: (() => unknown)[] = [];

  /** Adds what releases the thing acquired last. */
  push(release: () => unknown): void {
    this.#releases.push(release);
  }

  /** Adds what releases a thing that all others may need, and so comes last. */
  unshift(release: () => unknown): void {
    this.#releases.unshift(release);
  }

  /**
   * Releases everything. One that fails does not keep the others from it.
   *
   * @param onError told of each failure
   */
  async release(onError: (error: unknown) => void): Promise<void> {
    for (let next = this.#releases.pop(); next !== undefined; next = this.#releases.pop()) {
      try {
        await next();
      } catch (error) {
        onError(error);
      }
    }
  }
}
