// SPDX-License-Identifier: Apache-2.0
/** The log: on stderr, for people on a terminal, else one JSON object per line. */
import { stderr } from 'node:process';
import { destination, type Logger, pino } from 'pino';
import { build as pretty } from 'pino-pretty';

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
  return pino(options, pretty({ destination: 2, sync: true, translateTime: 'HH:MM:ss.l' }));
}
