// SPDX-License-Identifier: Apache-2.0
/** Sockets that systemd, or libnbd, has opened for us (sd_listen_fds(3)). */
import type { InheritedSocket } from '../nbd/server.ts';
import { usageError } from './errors.ts';

/** SD_LISTEN_FDS_START. */
const FIRST_DESCRIPTOR = 3;
/** More sockets than a unit file of any use names. */
const MOST_SOCKETS = 64;

/** A socket by the name of its unit file, `unknown` if it has none there. */
export interface NamedSocket extends InheritedSocket {
  readonly name: string;
}

/**
 * The sockets that this process has been given; none unless they are meant for it and not for
 * a parent. The variables are removed, so that nobody takes them for his.
 *
 * @throws StillblockError if they contradict each other
 */
export function takeInheritedSockets(environment: NodeJS.ProcessEnv, pid: number): NamedSocket[] {
  const { LISTEN_PID: forPid, LISTEN_FDS: countText = '', LISTEN_FDNAMES: nameText } = environment;
  if (forPid === undefined || Number(forPid) !== pid) {
    return [];
  }
  for (const name of ['LISTEN_PID', 'LISTEN_FDS', 'LISTEN_FDNAMES']) {
    delete environment[name];
  }
  const count = /^\d+$/.test(countText) ? Number(countText) : Number.NaN;
  if (!(count >= 1 && count <= MOST_SOCKETS)) {
    throw usageError(
      `LISTEN_FDS=${countText} is no number of sockets`,
      `give 1 to ${MOST_SOCKETS}, as systemd does`,
    );
  }
  const names = nameText === undefined ? [] : nameText.split(':');
  if (nameText !== undefined && names.length !== count) {
    throw usageError(
      `LISTEN_FDNAMES has ${names.length} names for ${count} sockets`,
      'give one for each, as systemd does',
    );
  }
  return Array.from({ length: count }, (_, index) => ({
    descriptor: FIRST_DESCRIPTOR + index,
    name: names[index] ?? 'unknown',
  }));
}
