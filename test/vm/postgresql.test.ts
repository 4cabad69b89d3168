// SPDX-License-Identifier: Apache-2.0
// A real PostgreSQL, its data and its WAL on two disks, under pgbench: the snapshot is
// taken with the example hook, pulled over NBD, and what was pulled starts, is whole,
// and lacks nothing that was committed before.

import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import process from 'node:process';
import test from 'ava';
import { checkout, testKernel } from './checkout.ts';
import type { GuestCommand } from './command.ts';
import { cli } from './command-line.ts';
import { bootGuest, type Guest } from './guest.ts';
import { runTool } from './host.ts';
import { shellQuote } from './initrd.ts';

const MiB = 1 << 20;
const bin = '/usr/lib/postgresql/15/bin';
const limitMs = 180_000;
/** Leaves an emulated processor time for the rest. */
const transactionsPerSecond = 20;
/** With a checkpoint just before, this is what a busy moment leaves to replay, bytes. */
const maxReplayBytes = 16 * MiB;

const configuration = `<stillblock>
  <hooks><hook name="postgresql" script="/etc/stillblock/hooks.d/postgresql" timeout="60"/></hooks>
</stillblock>`;

/** For a shell that runs as the database's owner. */
const asOwner = (command: string): string => `runuser -u postgres -- ${command}`;
const sql = (socket: string, statement: string): string =>
  asOwner(`${bin}/psql -X -A -t -h ${socket} -d postgres -c ${shellQuote(statement)}`);

/** What pgbench keeps equal in every transaction. */
const sums = `SELECT (SELECT sum(abalance) FROM pgbench_accounts), (SELECT sum(tbalance) FROM pgbench_tellers),
  (SELECT sum(bbalance) FROM pgbench_branches), (SELECT coalesce(sum(delta), 0) FROM pgbench_history)`;

const settings = `
listen_addresses = ''
unix_socket_directories = '/run/db'
shared_buffers = 64MB
# Without the hook there would be half an hour of WAL to replay.
max_wal_size = 4GB
min_wal_size = 32MB
checkpoint_timeout = 30min
`;

/**
 * Makes the database on the host, where that takes seconds rather than minutes.
 *
 * @param folder is of the database's owner, or of ours when we are not root
 * @returns an archive of `data` and `wal`
 */
async function makeDatabase(folder: string): Promise<string> {
  const archive = join(folder, 'db.tar');
  const script = `cd ${shellQuote(folder)}
    ${bin}/initdb -D $PWD/data -X $PWD/wal -A trust -k -E UTF8 --locale=C --no-sync
    printf '%s' "$1" >>data/postgresql.conf
    ${bin}/pg_ctl -D data -w -t 120 -l log -o "-c unix_socket_directories=$PWD" start
    ${bin}/pgbench -q -h "$PWD" -i -s 1 postgres
    ${bin}/psql -X -q -h "$PWD" -d postgres -c 'CREATE EXTENSION amcheck'
    ${bin}/pg_ctl -D data -w -m fast stop
    tar -cf db.tar data wal`;
  const shell = ['bash', '-ec', script, 'bash', settings] as const;
  const root = process.getuid?.() === 0;
  const owner = ['runuser', '-u', 'postgres', '--'] as const;
  if (root) await runTool('chown', ['postgres:', folder]);
  const [program = '', ...args] = root ? [...owner, ...shell] : shell;
  await runTool(program, args);
  return archive;
}

async function setUp(guest: Guest, data: string, wal: string, archive: string): Promise<void> {
  await guest.run(
    `set -e
    install -D -m 755 ${shellQuote(join(checkout, 'configs/hooks.d/postgresql'))} /etc/stillblock/hooks.d/postgresql
    echo 'PGHOST=/run/db' >/etc/default/stillblock-postgresql
    cat >/etc/stillblock/stillblock.xml <<'END'
${configuration}
END
    mkfs.ext4 -q ${data}
    mkfs.ext4 -q ${wal}
    mkdir -p /db/data /db/wal /run/db /run/pulled
    mount ${data} /db/data
    mount ${wal} /db/wal
    mkdir /db/data/pg /db/wal/pg
    tar -x --strip-components=1 -C /db/data/pg -f ${shellQuote(archive)} data
    tar -x --strip-components=1 -C /db/wal/pg -f ${shellQuote(archive)} wal
    ln -sfn /db/wal/pg /db/data/pg/pg_wal
    chmod 700 /db/data/pg /db/wal/pg
    chown -R postgres: /db/data /db/wal /run/db /run/pulled
    cd /
    ${asOwner(`${bin}/pg_ctl -D /db/data/pg -w -t 120 -l /db/data/log start >/run/db.init`)}`,
    { timeoutMs: limitMs },
  );
}

/** Starts what was pulled beside the server that it is a copy of. */
const startPulled = `set -e
  cd /
  mkdir -p /copy/data /copy/wal /run/copy
  chown postgres: /run/copy
  modprobe loop
  mount -o loop /run/pulled/data /copy/data
  mount -o loop /run/pulled/wal /copy/wal
  # As on another machine: no process of it runs there, and the WAL is where it is mounted.
  rm /copy/data/pg/postmaster.pid
  ln -sfn /copy/wal/pg /copy/data/pg/pg_wal
  ${asOwner(`${bin}/pg_ctl -D /copy/data/pg -w -t 120 -l /copy/data/log.copy -o "-c unix_socket_directories=/run/copy" start >/run/db.init`)}
  cat /copy/data/log.copy`;

test('a database under load is pulled, and what was pulled is whole', async (t) => {
  t.timeout(12 * 60_000);
  const folder = await mkdtemp(join(tmpdir(), 'stillblock-postgresql-'));
  t.teardown(() => rm(folder, { recursive: true, force: true }));
  const archive = await makeDatabase(folder);
  const guest = await bootGuest({
    kernel: testKernel(),
    memoryMiB: 2048,
    disks: [
      { name: 'data', sizeBytes: 128 * MiB },
      { name: 'wal', sizeBytes: 96 * MiB },
    ],
  });
  try {
    await guest.loadModule();
    const [data, wal] = await Promise.all([guest.disk('data'), guest.disk('wal')]);
    await setUp(guest, data, wal, archive);
    const daemon: GuestCommand = guest.start(`exec ${cli} serve -v 2>&1`);
    await daemon.waitForOutput(/"msg":"ready"/, limitMs);
    const load = guest.start(
      `cd /; exec ${asOwner(`${bin}/pgbench -n -h /run/db -c 4 -j 2 -R ${transactionsPerSecond} -T 3600 -P 1 postgres 2>&1`)}`,
    );
    await load.waitForOutput(/progress: 3\./, limitMs);
    const count = async (socket: string): Promise<number> =>
      Number((await guest.run(sql(socket, 'SELECT count(*) FROM pgbench_history'))).stdout);

    const begin = (checkpoint: string): Promise<{ code: number; stdout: string; stderr: string }> =>
      guest.run(
        `${cli} backup begin --checkpoint ${checkpoint} --store memory --store-size 192M \
          --disk data=${data} --disk wal=${wal}`,
        { timeoutMs: limitMs, check: false },
      );
    await guest.run(`${cli} device attach ${data} ${wal}`, { timeoutMs: limitMs });
    const before = await count('/run/db');
    t.true(before > 0);
    const begun = await begin('monday');
    t.is(begun.code, 0, begun.stdout + begun.stderr);
    const after = await count('/run/db');
    t.regex(daemon.stdout, /"hook":"postgresql","phase":"before"/);
    t.regex(daemon.stdout, /"hook":"postgresql","phase":"after"/);

    await guest.run(
      `set -e
      for disk in data wal; do qemu-img convert -O raw nbd://127.0.0.1/$disk /run/pulled/$disk; done
      ${cli} backup end monday`,
      { timeoutMs: limitMs },
    );
    t.is(load.code, undefined, 'the load went on');

    const { stdout: log } = await guest.run(startPulled, { timeoutMs: limitMs });
    t.regex(log, /automatic recovery in progress/, 'it is what a power failure leaves');
    const [, ...positions] = /redo starts at (\S+)[\s\S]*redo done at (\S+)/.exec(log) ?? [];
    const [from = 0, to = 0] = positions.map((position) => {
      const [high = 0, low = 0] = position.split('/').map((part) => Number.parseInt(part, 16));
      return high * 2 ** 32 + low;
    });
    t.log(`${to - from} bytes of WAL were replayed`);
    t.true(to >= from && to - from < maxReplayBytes, 'the hook has made a checkpoint');
    const { stdout: amcheck } = await guest.run(
      `cd /; ${asOwner(`${bin}/pg_amcheck -h /run/copy -d postgres --heapallindexed --rootdescend --parent-check`)} 2>&1`,
      { timeoutMs: limitMs },
    );
    t.is(amcheck, '', 'pg_amcheck has nothing to say');
    const { stdout: balance } = await guest.run(sql('/run/copy', sums));
    const [first, ...others] = balance.trim().split('|');
    t.deepEqual(others, [first, first, first], 'no transaction is there in part');
    const copied = await count('/run/copy');
    t.log(`history: ${before} before, ${copied} in the copy, ${after} after`);
    t.true(copied >= before, 'a transaction that was committed before is lost');
    t.true(copied <= after, 'a transaction from after is in it');

    // The hook fails with the server: nothing is taken.
    load.kill(2);
    await load.wait(limitMs);
    await guest.run(
      `cd /; ${asOwner(`${bin}/pg_ctl -D /copy/data/pg -m immediate stop`)}; ${asOwner(`${bin}/pg_ctl -D /db/data/pg -m fast stop`)}`,
      { timeoutMs: limitMs },
    );
    const refused = await begin('tuesday');
    t.is(refused.code, 1, refused.stdout);
    t.regex(refused.stderr, /hook postgresql failed with before/);
    const { stdout: checkpoints } = await guest.run(`${cli} checkpoint list --json`);
    t.false(checkpoints.includes('tuesday'));
    daemon.kill(15);
    t.is((await daemon.wait(limitMs)).code, 0);
    await guest.run(
      `umount /copy/data /copy/wal /db/data /db/wal; ${cli} device detach ${data} ${wal}; rmmod stillblock`,
    );
    await guest.shutdown();
  } finally {
    await guest.kill();
  }
});
