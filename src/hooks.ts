// SPDX-License-Identifier: Apache-2.0
/** Scripts that make applications ready for the instant of a snapshot. */

/** A script, called with `before` ahead of the freeze, and with `after` after the thaw. */
export interface Hook {
  /** For the log. */
  readonly name: string;
  /** Absolute path of an executable file. */
  readonly script: string;
  /** Of each call. */
  readonly timeoutMs: number;
}
