// SPDX-License-Identifier: Apache-2.0
/** What the service manager is told, received by a program that knows nothing of us. */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { stat } from 'node:fs/promises';
import { join } from 'node:path';
import test from 'ava';
import { pino } from 'pino';
import { ServiceManager } from '../../src/service.ts';
import { folder } from './world.ts';

test('each state is one datagram on the socket of the manager', async (t) => {
  const path = join(await folder(t), 'notify');
  const receiver = spawn('socat', ['-u', `UNIX-RECV:${path}`, 'STDOUT']);
  t.teardown(() => receiver.kill());
  while ((await stat(path).catch(() => undefined)) === undefined) {
    await new Promise((resolve) => setImmediate(resolve));
  }
  const manager = new ServiceManager(pino({ level: 'silent' }), { NOTIFY_SOCKET: path });
  let text = '';
  receiver.stdout.setEncoding('utf8').on('data', (piece: string) => {
    text += piece;
  });
  const states: readonly (readonly [() => void, RegExp])[] = [
    [() => manager.ready('serving'), /^READY=1\nSTATUS=serving$/],
    [() => manager.reloading(), /^RELOADING=1\nMONOTONIC_USEC=\d+$/],
    [() => manager.stopping(), /^STOPPING=1$/],
  ];
  for (const [tell, says] of states) {
    text = '';
    tell();
    await once(receiver.stdout, 'data');
    t.regex(text, says);
  }
});

test('a manager that is gone, or none, is no reason to fail', async (t) => {
  const told: object[] = [];
  const log = pino({ level: 'warn' }, { write: (line: string) => told.push(JSON.parse(line)) });
  const gone = join(await folder(t), 'notify');
  for (const environment of [{}, { NOTIFY_SOCKET: '' }, { NOTIFY_SOCKET: gone }]) {
    new ServiceManager(log, environment).ready('serving');
  }
  new ServiceManager(log, { NOTIFY_SOCKET: `/${'x'.repeat(200)}` }).ready('serving');
  t.is(told.length, 2, 'the two that cannot be told');
});
