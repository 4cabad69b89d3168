// SPDX-License-Identifier: Apache-2.0
/** Processor time and memory of a server with all its children, from /proc. */
import { readdirSync, readFileSync } from 'node:fs';

/** Of the fields in /proc/PID/stat behind the name (proc(5)): ppid, then four times in ticks. */
const PPID = 1;
const TIMES = [11, 12, 13, 14] as const;
/** Linux' USER_HZ, the same on every machine that runs Debian. */
const TICKS_PER_SECOND = 100;

interface Stat {
  readonly parent: number;
  /** Own and of children that have ended, seconds. */
  readonly seconds: number;
}

function statOf(pid: number): Stat | undefined {
  try {
    const text = readFileSync(`/proc/${pid}/stat`, 'latin1');
    const fields = text.slice(text.lastIndexOf(')') + 2).split(' ');
    const ticks = TIMES.reduce((sum, index) => sum + Number(fields[index]), 0);
    return { parent: Number(fields[PPID]), seconds: ticks / TICKS_PER_SECOND };
  } catch {
    // It has ended meanwhile.
    return undefined;
  }
}

/** A process and all that descends from it. */
function tree(root: number): number[] {
  const parents = new Map<number, number>();
  for (const name of readdirSync('/proc')) {
    const stat = /^\d+$/.test(name) ? statOf(Number(name)) : undefined;
    if (stat !== undefined) {
      parents.set(Number(name), stat.parent);
    }
  }
  const isBelow = (pid: number | undefined): boolean =>
    pid !== undefined && (pid === root || (pid > 1 && isBelow(parents.get(pid))));
  return [...parents.keys()].filter(isBelow);
}

/** Processor time of a process tree so far, user and system, seconds. */
export function cpuSeconds(root: number): number {
  return tree(root).reduce((sum, pid) => sum + (statOf(pid)?.seconds ?? 0), 0);
}

/** Memory of a process tree, what is shared counted in shares, bytes. */
export function memoryBytes(root: number): number {
  return tree(root).reduce((sum, pid) => {
    try {
      const rollup = readFileSync(`/proc/${pid}/smaps_rollup`, 'latin1');
      return sum + Number(/^Pss:\s+(\d+) kB$/m.exec(rollup)?.[1]) * 1024;
    } catch {
      return sum;
    }
  }, 0);
}
