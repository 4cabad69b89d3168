// SPDX-License-Identifier: Apache-2.0
/** Progress of long work: bars on a terminal, events for programs, else nothing. */
import { stderr } from 'node:process';
import { MultiBar, type SingleBar } from 'cli-progress';
import { printJson } from './output.ts';
import { formatSize } from './sizes.ts';

/** Where progress goes. */
export interface Progress {
  /**
   * @param fraction of the step, 0 to 1
   * @param bytes moved by it so far, as far as that is known
   */
  update(disk: string, step: string, fraction: number, bytes: number): void;
  /** Leaves the terminal as it found it. */
  stop(): void;
}

/** How often an event of one disk is worth a line, milliseconds. */
const EVENT_MS = 1000;
const WIDTH = 24;
/** Over so long a time the rate is smoothed, milliseconds. */
const RATE_MS = 5000;

/** A step of a disk that is under way. */
interface Running {
  readonly bar: SingleBar;
  readonly step: string;
  /** Points of the recent past, oldest first. */
  readonly seen: { readonly atMs: number; readonly fraction: number; readonly bytes: number }[];
}

/** Writes a duration: `4s`, `3m 20s`, `2h 05m`. */
export function formatDuration(seconds: number): string {
  const whole = Math.round(seconds);
  if (whole < 60) {
    return `${whole}s`;
  }
  const [hours, minutes, rest] = [
    Math.floor(whole / 3600),
    Math.floor(whole / 60) % 60,
    whole % 60,
  ];
  const two = (value: number): string => String(value).padStart(2, '0');
  return hours > 0 ? `${hours}h ${two(minutes)}m` : `${minutes}m ${two(rest)}s`;
}

class Bars implements Progress {
  readonly #bars = new MultiBar(
    {
      format: '{disk} {step} {bar} {percent}  {moved}  {rate}  {left}',
      barCompleteChar: '#',
      barIncompleteChar: '.',
      barsize: WIDTH,
      hideCursor: true,
      clearOnComplete: false,
      stream: stderr,
    },
    undefined,
  );
  readonly #running = new Map<string, Running>();

  update(disk: string, step: string, fraction: number, bytes: number): void {
    let running = this.#running.get(disk);
    if (running === undefined || running.step !== step) {
      const bar = running?.bar ?? this.#bars.create(1, 0, { disk });
      running = { bar, step, seen: [] };
      this.#running.set(disk, running);
    }
    const { seen } = running;
    const now = performance.now();
    seen.push({ atMs: now, fraction, bytes });
    while ((seen[0]?.atMs ?? now) < now - RATE_MS) {
      seen.shift();
    }
    const first = seen[0];
    const seconds = (now - (first?.atMs ?? now)) / 1000;
    const speed = seconds > 0.5 ? (fraction - (first?.fraction ?? 0)) / seconds : 0;
    const rate = seconds > 0.5 ? Math.max(0, bytes - (first?.bytes ?? 0)) / seconds : 0;
    running.bar.update(fraction, {
      disk,
      step: step.padEnd(7),
      percent: `${Math.floor(fraction * 100)}%`.padStart(4),
      moved: formatSize(bytes),
      rate: rate > 0 ? `${formatSize(Math.round(rate))}/s` : '',
      left: fraction < 1 && speed > 0 ? `${formatDuration((1 - fraction) / speed)} left` : '',
    });
  }

  stop(): void {
    this.#bars.stop();
  }
}

class Events implements Progress {
  readonly #last = new Map<string, { readonly step: string; readonly atMs: number }>();

  update(disk: string, step: string, fraction: number, bytes: number): void {
    const last = this.#last.get(disk);
    const now = performance.now();
    if (last?.step === step && now - last.atMs < EVENT_MS && fraction < 1) {
      return;
    }
    this.#last.set(disk, { step, atMs: now });
    printJson({ event: 'progress', disk, step, fraction, bytes });
  }

  stop(): void {}
}

const NOWHERE: Progress = { update: () => {}, stop: () => {} };

/** @param json print events rather than bars */
export function makeProgress(json: boolean): Progress {
  if (json) {
    return new Events();
  }
  return stderr.isTTY ? new Bars() : NOWHERE;
}
