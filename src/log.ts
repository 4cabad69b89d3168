// SPDX-License-Identifier: Apache-2.0
/** The log: on stderr, for people on a terminal, else one JSON object per line. */
import { createRequire } from 'node:module';
import { stderr } from 'node:process';
import { destination, type Logger, pino } from 'pino';
import type { PinoPretty } from 'pino-pretty';

const require = createRequire(import.meta.url);

/** Levels in the order of `-v`: warnings, lifecycle, requests. */
const LEVELS = ['warn', 'info', 'debug'] as const;

/**
 * Makes the log of a command. It is written synchronously: what it says last is what
 * happened last.
 *
 * @param verbosity how often `-v` was given
 */
export function makeLog(verbosity: number): Logger {
  const level = LEVELS[Math.min(verbosity, LEVELS.length - 1)] ?? 'warn';
  const options = { level, base: null };
  if (!stderr.isTTY) {
    return pino(options, destination({ dest: 2, sync: true }));
  }
  const pretty = require('pino-pretty') as typeof PinoPretty;
  return pino(options, pretty({ destination: 2, sync: true, translateTime: 'HH:MM:ss.l' }));
}
