// SPDX-License-Identifier: Apache-2.0
/** The example hook for MariaDB, with a real server of the test's own. */
import { type ChildProcess, execFile, spawn } from 'node:child_process';
import { once } from 'node:events';
import { writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import process from 'node:process';
import { setTimeout as delay } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import test, { type ExecutionContext } from 'ava';
import { pino } from 'pino';
import { withHooks } from '../../src/hooks.ts';
import { folder } from './world.ts';

const run = promisify(execFile);
const script = fileURLToPath(new URL('../../../configs/hooks.d/mariadb', import.meta.url));
const START_MS = 60_000;

const CONTEXT = { checkpoint: 'monday', disks: ['sda'] } as const;
const log = pino({ level: 'silent' });

/** A server, and how it is asked. */
interface Database {
  readonly process: ChildProcess;
  /** Runs a statement; undefined if it failed, or was not done within a time. */
  sql(statement: string, timeoutMs?: number): Promise<string | undefined>;
}

async function startServer(t: ExecutionContext): Promise<Database> {
  const home = await folder(t);
  const data = join(home, 'data');
  const socket = join(home, 's');
  const env = { ...process.env, HOME: home, PATH: `${process.env['PATH'] ?? ''}:/usr/sbin` };
  const common = ['--no-defaults', `--datadir=${data}`, '--innodb-log-file-size=8M'];
  await run(
    'mariadb-install-db',
    [...common, '--auth-root-authentication-method=normal', '--skip-test-db'],
    { env },
  );
  const server = spawn(
    'mariadbd',
    [...common, `--socket=${socket}`, '--skip-networking', '--skip-grant-tables', '--user=root'],
    { env, stdio: 'ignore' },
  );
  t.teardown(async () => {
    if (server.exitCode === null && server.signalCode === null) {
      server.kill('SIGKILL');
      await once(server, 'exit');
    }
  });
  await writeFile(join(home, '.my.cnf'), `[client]\nsocket=${socket}\nuser=root\n`);
  // Where the hook's client looks for it.
  process.env['HOME'] = home;
  const sql: Database['sql'] = (statement, timeout = START_MS) =>
    run('mariadb', ['-N', '-B', '-e', statement], { env, timeout }).then(
      ({ stdout }) => stdout.trim(),
      () => undefined,
    );
  for (const until = Date.now() + START_MS; (await sql('CREATE DATABASE test')) === undefined; ) {
    if (Date.now() > until || server.exitCode !== null) {
      throw new Error('the server does not start');
    }
    await delay(100);
  }
  return { process: server, sql };
}

const hook = { name: 'mariadb', script, timeoutMs: 30_000 };
const SLEEPER = "FROM information_schema.processlist WHERE state = 'User sleep'";

test('the example holds what has no log, for as long as it takes', async (t) => {
  const { process: server, sql } = await startServer(t);
  await sql('CREATE TABLE test.a (i INT) ENGINE=MyISAM; CREATE TABLE test.b (i INT) ENGINE=InnoDB');
  let late: Promise<string | undefined> | undefined;
  const counted = await withHooks([hook], CONTEXT, log, async () => {
    for (const table of ['a', 'b']) {
      t.is(await sql(`INSERT INTO test.${table} VALUES (1)`, 1500), undefined, table);
    }
    late = sql('INSERT INTO test.a VALUES (2)');
    return sql('SELECT COUNT(*) FROM test.a');
  });
  t.is(counted, '0');
  t.is(await late, '', 'it waits, and is done after');
  t.is(await sql('INSERT INTO test.b VALUES (3); SELECT COUNT(*) FROM test.b WHERE i = 3'), '1');

  // A table that somebody has locked keeps the stages from being reached.
  const lock = sql('LOCK TABLES test.a WRITE; SELECT SLEEP(60)');
  while ((await sql(`SELECT COUNT(*) ${SLEEPER}`)) !== '1') {
    await delay(50);
  }
  const taken = await t.throwsAsync(
    withHooks([{ ...hook, timeoutMs: 2_000 }], CONTEXT, log, () => Promise.resolve()),
  );
  t.like(taken, { code: 'HOOK_TIMEOUT' });
  await sql(`SELECT CONCAT('KILL ', id) INTO @kill ${SLEEPER}; EXECUTE IMMEDIATE @kill`);
  t.is(await lock, undefined);
  t.is(await sql('INSERT INTO test.a VALUES (5)'), '', 'nothing is held any more');

  server.kill('SIGKILL');
  await once(server, 'exit');
  const gone = await t.throwsAsync(withHooks([hook], CONTEXT, log, () => Promise.resolve()));
  t.like(gone, { code: 'HOOK_FAILED' });
});
