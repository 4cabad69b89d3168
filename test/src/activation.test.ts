// SPDX-License-Identifier: Apache-2.0
/** Which inherited sockets are ours, by sd_listen_fds(3)'s variables. */
import test from 'ava';
import { takeInheritedSockets } from '../../src/activation.ts';

test('sockets meant for this process are taken, and the variables removed', (t) => {
  const environment = { LISTEN_PID: '42', LISTEN_FDS: '2', LISTEN_FDNAMES: 'nbd:other', HOME: '/' };
  t.deepEqual(takeInheritedSockets(environment, 42), [
    { descriptor: 3, name: 'nbd' },
    { descriptor: 4, name: 'other' },
  ]);
  t.deepEqual(environment as object, { HOME: '/' });
  t.deepEqual(takeInheritedSockets({ LISTEN_PID: '42', LISTEN_FDS: '1' }, 42), [
    { descriptor: 3, name: 'unknown' },
  ]);
});

test('those of another process are left alone', (t) => {
  const environment = { LISTEN_PID: '41', LISTEN_FDS: '1' };
  t.deepEqual(takeInheritedSockets(environment, 42), []);
  t.is(environment.LISTEN_PID, '41');
  t.deepEqual(takeInheritedSockets({ LISTEN_FDS: '1' }, 42), []);
  t.deepEqual(takeInheritedSockets({}, 42), []);
});

test('contradictions are refused', (t) => {
  for (const [LISTEN_FDS, LISTEN_FDNAMES] of [
    ['0', undefined],
    ['-1', undefined],
    ['x', undefined],
    ['65', undefined],
    ['2', 'one'],
  ] as const) {
    t.throws(() => takeInheritedSockets({ LISTEN_PID: '42', LISTEN_FDS, LISTEN_FDNAMES }, 42), {
      code: 'USAGE',
    });
  }
});
