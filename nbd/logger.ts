// SPDX-License-Identifier: Apache-2.0
/**
 * The part of pino's interface that the library uses. Debug is per request, info
 * is lifecycle, warn is the peer's fault, error is ours.
 */
export interface Logger {
  debug(fields: object, message: string): void;
  info(fields: object, message: string): void;
  warn(fields: object, message: string): void;
  error(fields: object, message: string): void;
  child(bindings: Record<string, unknown>): Logger;
  isLevelEnabled?(level: string): boolean;
}
