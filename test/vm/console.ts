// SPDX-License-Identifier: Apache-2.0
// Finds a kernel's complaints in a guest's console. Pure, so that samples prove
// both that it sees each kind and that it leaves ordinary lines alone.

/**
 * What no test may leave in a console. The patterns are the kernel's own words
 * (lib/bug.c, kernel/panic.c, kernel/hung_task.c, kernel/rcu, kernel/locking,
 * mm/kasan, mm/kfence, mm/slub.c, fs) and our module's report of a leak.
 */
const complaints: readonly RegExp[] = [
  /\bWARNING: /,
  /\bBUG: /,
  /\bkernel BUG at /,
  /\bOops: /,
  /\bKernel panic\b/,
  /Unable to handle/i,
  /unable to handle kernel/i,
  /general protection fault/,
  /\bdouble fault\b/,
  /\bstack segment: \d/,
  /invalid opcode: \d/,
  /divide error: \d/,
  /blocked for more than \d+ seconds/,
  /\bsoft lockup\b/i,
  /\bhard LOCKUP\b/i,
  /rcu.*(self-detected stall|detected stalls|detected expedited stalls|kthread starved)/i,
  /refcount_t: /,
  /\bINFO: (possible|inconsistent|trying to register)/,
  /possible (circular|recursive) locking/,
  /suspicious RCU usage/,
  /scheduling while atomic/,
  /sleeping function called from invalid context/,
  /\b(KASAN|KFENCE|KCSAN|UBSAN)\b/,
  /Objects remaining in /,
  /list_(add|del) corruption/,
  /page allocation failure/,
  /Out of memory: Killed/,
  /oom-kill:/,
  /workqueue lockup/,
  /(EXT4-fs|XFS|BTRFS)\b.*\b(error\b|corrupt)/i,
  /Buffer I\/O error/,
  /(blk_update_request: )?(I\/O|critical \w+) error, dev/,
  /unregister_netdevice: waiting/,
  /kmemleak: .*(disabled|pool empty|increasing)/i,
  /module stillblock: .*(still|leak)/i,
  /stillblock: leak/,
];

/** md's advice, for tests whose arrays lie on one disk. */
export const arrayOnOneDisk: RegExp = /\bWARNING: \w+ appears to be on the same physical disk/;

export interface Complaint {
  /** Number of the line, from 1. */
  readonly line: number;
  readonly text: string;
  /** The lines around it, the complaint's own included. */
  readonly context: string;
}

/** Lines of context before and after a complaint: a stack trace is below it. */
const linesBefore = 3;
const linesAfter = 30;

/**
 * @param console a guest's whole console.
 * @param allowed complaints that the test itself provokes.
 * @returns each offending line, in order.
 */
export function findComplaints(console: string, allowed: readonly RegExp[] = []): Complaint[] {
  const lines = console.split(/\r?\n/);
  return lines.flatMap((text, index) =>
    complaints.some((pattern) => pattern.test(text)) && !allowed.some((a) => a.test(text))
      ? [
          {
            line: index + 1,
            text,
            context: lines
              .slice(Math.max(0, index - linesBefore), index + 1 + linesAfter)
              .join('\n'),
          },
        ]
      : [],
  );
}

/** Addresses of modules: a trace of ours has no names in it once the module is unloaded. */
const inUnloadedModule = / 0xffffffff[a-f][0-9a-f]{7}$/m;

/** In /proc/vmallocinfo: who has allocated, behind the range and its size. */
const ofUnloadedModule = /^\S+ +\d+ 0xffffffff[a-f][0-9a-f]{7}\b/;

/**
 * @param info text of /proc/vmallocinfo.
 * @returns the line of each area that a module has left behind which is unloaded by now.
 */
export function findLeftAreas(info: string): string[] {
  return info.split('\n').filter((line) => ofUnloadedModule.test(line));
}

/**
 * @param report text of kmemleak's debugfs file.
 * @returns each object in it that our module has allocated, or one that is unloaded by now.
 */
export function findLeaks(report: string): string[] {
  return report
    .split(/^(?=unreferenced object )/m)
    .filter((object) => object.includes('[stillblock]') || inUnloadedModule.test(object));
}
