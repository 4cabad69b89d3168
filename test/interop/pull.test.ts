// SPDX-License-Identifier: Apache-2.0
/** `stillblock pull` with stock qemu-img, from real servers: what holds however it ends. */
import {
  copyFile,
  cp,
  mkdtemp,
  readdir,
  readFile,
  rename,
  rm,
  stat,
  utimes,
  writeFile,
} from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import test, { type ExecutionContext } from 'ava';
import { Authority, clientTemplate, conventionalFolder, SERVER } from '../nbd/certificates.ts';
import { folder, pattern } from '../nbd/world.ts';
import { CLI } from '../program.ts';
import { run, tryRun } from './clients.ts';
import { Serving } from './command.ts';
import {
  assertChain,
  errorOf,
  type Instant,
  Machine,
  MIB,
  manifestOf,
  pullTest,
  soon,
  start,
  stillblock,
} from './pulling.ts';

interface World {
  readonly machine: Machine;
  readonly chain: string;
}

/** A machine of which one full copy was pulled, at `day-1`. */
async function pulledOnce(
  t: ExecutionContext,
  sizes: Readonly<Record<string, number>> = { sda: 6 * MIB, sdb: 3 * MIB },
): Promise<World> {
  const machine = await Machine.make(t, sizes);
  const chain = join(await folder(t), 'chain');
  const instant = await machine.serve(t, 'day-1');
  const ended = await stillblock(t, 'pull', ...instant.args, chain);
  t.is(ended.code, 0, ended.stderr);
  await instant.close();
  return { machine, chain };
}

/** The machine has changed, and is served at `day-2`. */
async function nextDay(t: ExecutionContext, { machine }: World, day = 2): Promise<Instant> {
  machine.change(day);
  return machine.serve(t, `day-${day}`);
}

pullTest(
  'a full copy and increments: each point of the chain is the machine as it was',
  async (t) => {
    const world = await pulledOnce(t);
    const { machine, chain } = world;
    for (const day of [2, 3, 4]) {
      const instant = await nextDay(t, world, day);
      const { code, events, stderr } = await stillblock(t, 'pull', ...instant.args, chain);
      t.is(code, 0, stderr);
      const planned = events.find(({ event }) => event === 'planned') as { disks: object[] };
      t.like(planned.disks[0], { disk: 'sda', kind: 'incremental', since: `day-${day - 1}` });
      // The server cannot prove that its changes fit: they were compared.
      t.true((await manifestOf(chain)).points.at(-1)?.entries.every(({ verified }) => verified));
      await instant.close();
    }
    await assertChain(t, machine, chain, ['day-1', 'day-2', 'day-3', 'day-4']);
    t.is((await stillblock(t, 'chain', '--check', chain)).code, 0);
    t.deepEqual((await readdir(chain)).toSorted(), [
      'manifest.json',
      ...[1, 2, 3, 4].map((index) => `sda.000${index}.qcow2`),
      ...[1, 2, 3, 4].map((index) => `sdb.000${index}.qcow2`),
    ]);
    for (const { file, backing } of (await manifestOf(chain)).points.flatMap((p) => p.entries)) {
      const info = JSON.parse(
        await run('qemu-img', ['info', '--output=json', join(chain, file)]),
      ) as Record<string, unknown>;
      // Relative names: the folder can be moved.
      t.is(info['backing-filename'] ?? null, backing);
      await run('qemu-img', ['check', '-q', join(chain, file)]);
    }
  },
);

pullTest('--compress, --verify and one disk at a time make the same chain', async (t) => {
  const world = await pulledOnce(t);
  const instant = await nextDay(t, world);
  const options = ['--compress', '--verify', '--parallel', '1'];
  const ended = await stillblock(t, 'pull', ...options, ...instant.args, world.chain);
  t.is(ended.code, 0, ended.stderr);
  await assertChain(t, world.machine, world.chain, ['day-1', 'day-2']);
});

pullTest(
  'without changes since the chain: exit code 3, nothing written; --full-if-needed per disk',
  async (t) => {
    const world = await pulledOnce(t);
    const { machine, chain } = world;
    // Tracking of sdb began anew.
    machine.disk('sdb').since.clear();
    const instant = await nextDay(t, world);
    const before = await readdir(chain);
    const refused = await stillblock(t, 'pull', ...instant.args, chain);
    t.is(refused.code, 3);
    t.is(errorOf(refused), 'FULL_REQUIRED');
    t.regex(refused.stderr, /sdb: its changes since day-1 are not served/);
    t.notRegex(refused.stderr, /sda:/);
    t.deepEqual(await readdir(chain), before);
    const { code } = await stillblock(t, 'pull', '--full-if-needed', ...instant.args, chain);
    t.is(code, 0);
    const kinds = (await manifestOf(chain)).points.at(-1)?.entries.map(({ kind }) => kind);
    t.deepEqual(kinds, ['incremental', 'full']);
    await assertChain(t, machine, chain, ['day-1', 'day-2']);
  },
);

pullTest(
  'a new disk is copied in full beside increments; one that is gone is said to be',
  async (t) => {
    const world = await pulledOnce(t, { sda: 2 * MIB });
    const { machine, chain } = world;
    const more = await Machine.make(t, { sdc: 2 * MIB }, 50);
    const [a, c] = [await nextDay(t, world), await more.serve(t, 'day-2')];
    const both = await stillblock(t, 'pull', ...a.args, '--nbd', more.uri('sdc'), chain);
    t.is(both.code, 0, both.stderr);
    await a.close();
    await c.close();
    const alone = await nextDay(t, world, 3);
    const { code, events } = await stillblock(t, 'pull', ...alone.args, chain);
    t.is(code, 0);
    t.deepEqual((events.find(({ event }) => event === 'planned') as { absent: string[] }).absent, [
      'sdc',
    ]);
    t.is((await manifestOf(chain)).points.length, 3);
    t.true(machine.disk('sda').at.has('day-3'));
  },
);

pullTest('another disk under the same name is noticed', async (t) => {
  const { chain } = await pulledOnce(t);
  const other = await Machine.make(t, { sda: 6 * MIB, sdb: 3 * MIB }, 77);
  await (await other.serve(t, 'day-1')).close();
  const instant = await other.serve(t, 'day-2');
  const refused = await stillblock(t, 'pull', ...instant.args, chain);
  t.is(refused.code, 3);
  t.regex(refused.stderr, /sda: it is another disk than at day-1/);
});

pullTest(
  'changes since another checkpoint of the same name are noticed by the comparison',
  async (t) => {
    const world = await pulledOnce(t);
    const { machine, chain } = world;
    machine.change(2);
    // It was deleted and made anew: what changed in between is in no increment.
    for (const disk of machine.disks.values()) {
      disk.since.set('day-1', []);
    }
    const instant = await nextDay(t, world, 3);
    const refused = await stillblock(t, 'pull', ...instant.args, chain);
    t.is(refused.code, 1);
    t.is(errorOf(refused), 'VERIFY_FAILED');
    await assertChain(t, machine, chain, ['day-1']);
  },
);

pullTest(
  'killed at an awkward moment: nothing of it runs on, the next pull cleans up and says so',
  async (t) => {
    const world = await pulledOnce(t);
    const { machine, chain } = world;
    const instant = await nextDay(t, world);
    const holds = ['sda', 'sdb'].map((disk) => instant.holdReads(disk));
    const running = start(t, 'pull', '--full', ...instant.args, chain);
    await Promise.all(holds.map(({ held }) => held));
    t.true((await readdir(chain)).includes('pull.json'));
    running.process.kill('SIGKILL');
    await running.ended;
    for (const { release } of holds) {
      release();
    }
    const idle = async (): Promise<void> => {
      while (instant.server.usage.connections > 0) {
        await new Promise(setImmediate);
      }
    };
    await soon('the end of its qemu-img', idle());
    const next = await stillblock(t, 'pull', ...instant.args, chain);
    t.is(next.code, 0, next.stderr);
    t.like(next.events[0], { event: 'recovered', checkpoint: 'day-2', complete: false });
    await assertChain(t, machine, chain, ['day-1', 'day-2']);
  },
);

pullTest(
  'killed at random moments the chain is as before or complete, and the next pull says which',
  async (t) => {
    const world = await pulledOnce(t);
    const { machine, chain } = world;
    const checkpoints = ['day-1'];
    for (let day = 2; day < 10; day += 1) {
      const instant = await nextDay(t, world, day);
      const running = start(t, 'pull', ...instant.args, chain);
      // A whole run takes about a second here.
      const timer = setTimeout(() => running.process.kill('SIGKILL'), 150 * day);
      await running.ended;
      clearTimeout(timer);
      const complete = (await manifestOf(chain)).points.at(-1)?.checkpoint === `day-${day}`;
      if (complete) {
        checkpoints.push(`day-${day}`);
      }
      const journal = (await readdir(chain)).includes('pull.json');
      await instant.close();
      const later = await machine.serve(t, `later-${day}`);
      const next = await stillblock(t, 'pull', ...later.args, chain);
      t.is(next.code, 0, next.stderr);
      const recovered = next.events.find(({ event }) => event === 'recovered');
      t.is(recovered?.['complete'], journal ? complete : undefined);
      checkpoints.push(`later-${day}`);
      await later.close();
    }
    await assertChain(t, machine, chain, checkpoints);
  },
);

pullTest(
  'killed between manifest and journal: the next pull says that it was complete',
  async (t) => {
    const world = await pulledOnce(t);
    const { machine, chain } = world;
    const journal = {
      checkpoint: 'day-1',
      files: ['sda.0001.qcow2', 'sdb.0001.qcow2'],
      snapshot: null,
    };
    await writeFile(join(chain, 'pull.json'), JSON.stringify(journal));
    const instant = await nextDay(t, world);
    const next = await stillblock(t, 'pull', ...instant.args, chain);
    t.like(next.events[0], { event: 'recovered', checkpoint: 'day-1', complete: true });
    await assertChain(t, machine, chain, ['day-1', 'day-2']);
  },
);

pullTest('ended by SIGTERM: the chain is as before, and nothing is left', async (t) => {
  const world = await pulledOnce(t);
  const instant = await nextDay(t, world);
  const before = await readdir(world.chain);
  const reads = instant.holdReads('sda');
  const running = start(t, 'pull', ...instant.args, world.chain);
  await reads.held;
  running.process.kill('SIGTERM');
  const ended = await soon('its end', running.ended);
  reads.release();
  t.is(ended.code, 1);
  t.is(errorOf(ended), 'INTERRUPTED');
  t.regex(ended.stderr, /the chain is as before/);
  t.deepEqual(await readdir(world.chain), before);
});

pullTest('the server goes away: said so, the chain is as before', async (t) => {
  const world = await pulledOnce(t);
  const instant = await nextDay(t, world);
  const reads = instant.holdReads('sda');
  const running = start(t, 'pull', ...instant.args, world.chain);
  await reads.held;
  const closing = instant.close();
  reads.release();
  await closing;
  const ended = await soon('its end', running.ended);
  t.is(ended.code, 1);
  t.is(errorOf(ended), 'SERVER_GONE', ended.stderr);
  await assertChain(t, world.machine, world.chain, ['day-1']);
});

pullTest('the snapshot fails meanwhile: a read error, and no image that looks whole', async (t) => {
  const world = await pulledOnce(t);
  const instant = await nextDay(t, world);
  const reads = instant.holdReads('sda');
  const running = start(t, 'pull', ...instant.args, world.chain);
  await reads.held;
  instant.server.failExports();
  reads.release();
  const ended = await soon('its end', running.ended);
  t.is(ended.code, 1);
  t.is(errorOf(ended), 'READ_FAILED', ended.stderr);
  await assertChain(t, world.machine, world.chain, ['day-1']);
});

pullTest('all packets are dropped from some moment on: given up after --timeout', async (t) => {
  const home = await folder(t);
  const [disk, chain] = [join(home, 'disk'), join(home, 'chain')];
  await writeFile(disk, pattern(3 * MIB));
  // In a network of the script's own: the server is reached over loopback until the route to
  // it leads into a tunnel with nobody at its end.
  const script = `
    ip link set lo up; ip tuntap add cut mode tun; ip link set cut up
    ip address add 198.51.100.1/24 dev cut
    ip route add local 192.0.2.7 dev lo src 198.51.100.1 table local
    node ${CLI} nbd -i 192.0.2.7 --insecure --max-rate 2M --export sda='${disk}' >'${home}/said' &
    until grep -q nbd: '${home}/said'; do sleep 0.1; done
    pull() { node ${CLI} pull --json --full --timeout 2 --nbd nbd://192.0.2.7/sda '${chain}' "$@"; }
    pull --checkpoint day-1 >&2 || exit 1
    pull --checkpoint day-2 & pid=$!
    until [ -s '${chain}/sda.0002.qcow2' ]; do sleep 0.05; done
    ip route del local 192.0.2.7 dev lo table local; ip route add 192.0.2.7 dev cut
    wait $pid; echo "code $?"; ls '${chain}'
    pull --checkpoint day-3; echo "code $?"
    node ${CLI} chain --check '${chain}'
    kill %1; wait`;
  const user = process.getuid?.() === 0 ? [] : ['--user', '--map-root-user'];
  const args = [...user, '--net', 'bash', '-c', script];
  const { stdout, stderr } = await tryRun('unshare', args, undefined, 180_000);
  const said = stdout + stderr;
  t.regex(stdout, /"code":"STALLED".*\n(.*\n)*code 1\nmanifest.json\nsda.0001.qcow2\n/, said);
  t.regex(stdout, /"code":"NO_SERVER".*\ncode 1\n/, said);
  t.regex(stderr, /nothing has moved for too long \(the chain is as before\)/);
  t.regex(stderr, /sda has not answered for 2 s/);
  t.regex(stdout, /all files have the SHA-256/, said);
});

pullTest('a server that falls silent is given up after --timeout', async (t) => {
  const world = await pulledOnce(t);
  const instant = await nextDay(t, world);
  const reads = instant.holdReads('sda');
  const ended = await stillblock(t, 'pull', '--timeout', '2', ...instant.args, world.chain);
  reads.release();
  t.is(ended.code, 1);
  t.is(errorOf(ended), 'STALLED', ended.stderr);
  await assertChain(t, world.machine, world.chain, ['day-1']);
});

pullTest('nobody answers, and an export that is not there', async (t) => {
  const home = await folder(t);
  const nobody = ['--checkpoint', 'x', '--nbd', 'sda=nbd://127.0.0.1:1/sda', join(home, 'chain')];
  const refused = await stillblock(t, 'pull', ...nobody);
  t.is(refused.code, 1);
  t.is(errorOf(refused), 'NO_SERVER', refused.stderr);
  const machine = await Machine.make(t, { sda: MIB });
  await machine.serve(t, 'x');
  const other = ['--checkpoint', 'x', '--nbd', machine.uri('other'), join(home, 'chain')];
  t.is(errorOf(await stillblock(t, 'pull', ...other)), 'NO_EXPORT');
});

pullTest('a disk that is full leaves the chain as before', async (t) => {
  const machine = await Machine.make(t, { sda: 6 * MIB });
  const home = await folder(t);
  const first = await machine.serve(t, 'day-1');
  const args = (instant: Instant): string => instant.args.map((arg) => `'${arg}'`).join(' ');
  // Room for the first image alone. The folder is a mount of this shell's own.
  const script = [
    `mount -t tmpfs -o size=5m none '${home}'`,
    `node ${CLI} pull ${args(first)} '${home}/chain' >&2 || exit 1`,
    `node ${CLI} pull --json --full --checkpoint day-2 --nbd '${machine.uri('sda')}' '${home}/chain'`,
    `echo "code $?"; ls '${home}/chain'; node ${CLI} chain --check '${home}/chain'`,
  ].join('\n');
  const user = process.getuid?.() === 0 ? [] : ['--user', '--map-root-user'];
  const ended = await tryRun('unshare', [...user, '--mount', 'sh', '-c', script]);
  t.regex(ended.stdout, /"code":"ENOSPC"/, ended.stdout + ended.stderr);
  t.regex(ended.stdout, /code 1\nmanifest.json\nsda.0001.qcow2\n/);
  t.regex(ended.stdout, /all files have the SHA-256/);
});

pullTest('two pulls into one folder: the second is refused', async (t) => {
  const world = await pulledOnce(t);
  const instant = await nextDay(t, world);
  const reads = instant.holdReads('sda');
  const running = start(t, 'pull', ...instant.args, world.chain);
  await reads.held;
  t.is(errorOf(await stillblock(t, 'pull', ...instant.args, world.chain)), 'CHAIN_BUSY');
  reads.release();
  t.is((await soon('the first', running.ended)).code, 0);
});

pullTest('over TLS, with certificates that fit, and with those that do not', async (t) => {
  const home = await folder(t);
  const disk = join(home, 'disk');
  await writeFile(disk, pattern(2 * MIB));
  const issue = async (name: string): Promise<{ server: string; client: string }> => {
    const authority = await Authority.make(join(home, name));
    const client = { client: await authority.issue(clientTemplate('proxy')) };
    const server = { server: await authority.issue(SERVER) };
    return {
      server: await conventionalFolder(join(home, `${name}-server`), authority, server),
      client: await conventionalFolder(join(home, `${name}-client`), authority, client),
    };
  };
  const [ours, others] = [await issue('ours'), await issue('others')];
  const security = ['--tls-certificates', ours.server, '--tls-verify-peer'];
  const serving = await Serving.start(t, '-p', '0', ...security, '--export', `sda=${disk}`);
  const [uri = ''] = serving.uris('sda');
  t.regex(uri, /^nbds:/);
  const chain = join(home, 'chain');
  const args = ['--checkpoint', 'now', '--verify', '--nbd', uri, chain];
  const without = await stillblock(t, 'pull', ...args);
  t.is(without.code, 2);
  t.regex(without.stderr, /--tls-certificates/);
  const wrong = await stillblock(t, 'pull', '--tls-certificates', others.client, ...args);
  t.is(wrong.code, 1);
  t.is(errorOf(wrong), 'TLS_FAILED', wrong.stderr);
  const right = await stillblock(t, 'pull', '--tls-certificates', ours.client, ...args);
  t.is(right.code, 0, right.stderr);
  await run('qemu-img', ['compare', '-F', 'raw', join(chain, 'sda.0001.qcow2'), disk]);
});

interface Damage {
  readonly name: string;
  readonly code: string;
  damage(chain: string): Promise<void>;
}

const DAMAGES: readonly Damage[] = [
  {
    name: 'a missing file',
    code: 'CHAIN_FILE_MISSING',
    damage: (chain) => rm(join(chain, 'sda.0001.qcow2')),
  },
  {
    name: 'an altered byte, its time as before',
    code: 'CHAIN_FILE_ALTERED',
    damage: async (chain) => {
      const path = join(chain, 'sda.0001.qcow2');
      const bytes = await readFile(path);
      bytes[bytes.length - 1] = (bytes.at(-1) ?? 0) ^ 1;
      await writeFile(path, bytes);
      await utimes(path, 0, 0);
    },
  },
  {
    name: 'another backing file',
    code: 'CHAIN_BACKING',
    damage: async (chain) => {
      const path = join(chain, 'sda.0002.qcow2');
      await run('qemu-img', ['rebase', '-u', '-b', 'sdb.0001.qcow2', '-F', 'qcow2', path]);
    },
  },
  {
    name: 'files in each other’s place',
    code: 'CHAIN_ORDER',
    damage: async (chain) => {
      const [one, two] = [join(chain, 'sda.0001.qcow2'), join(chain, 'sda.0002.qcow2')];
      await rename(one, `${one}.x`);
      await rename(two, one);
      await rename(`${one}.x`, two);
    },
  },
  {
    name: "another machine's image",
    code: 'CHAIN_FILE_ALTERED',
    damage: async (chain) => {
      const other = join(chain, '..', 'other.qcow2');
      await run('qemu-img', ['create', '-q', '-f', 'qcow2', other, '6M']);
      await copyFile(other, join(chain, 'sda.0001.qcow2'));
    },
  },
  {
    name: 'points in another order',
    code: 'CHAIN_ORDER',
    damage: async (chain) => {
      const manifest = await manifestOf(chain);
      const turned = { ...manifest, points: manifest.points.toReversed() };
      await writeFile(join(chain, 'manifest.json'), JSON.stringify(turned));
    },
  },
  {
    name: 'a manifest cut short',
    code: 'BAD_MANIFEST',
    damage: async (chain) => {
      const path = join(chain, 'manifest.json');
      await writeFile(path, (await readFile(path)).subarray(0, 500));
    },
  },
  {
    name: 'no manifest',
    code: 'NOT_A_CHAIN',
    damage: (chain) => rm(join(chain, 'manifest.json')),
  },
  {
    name: 'a manifest of a later version',
    code: 'NEWER_MANIFEST',
    damage: async (chain) => {
      const manifest = { ...(await manifestOf(chain)), version: 2 };
      await writeFile(join(chain, 'manifest.json'), JSON.stringify(manifest));
    },
  },
];

let pulledTwice: Promise<World> | undefined;

/** A chain of two points to break: a copy, since making it takes a while. */
async function chainToBreak(t: ExecutionContext): Promise<World> {
  pulledTwice ??= (async () => {
    const world = await pulledOnce(t, { sda: 2 * MIB, sdb: MIB });
    const instant = await nextDay(t, world);
    t.is((await stillblock(t, 'pull', ...instant.args, world.chain)).code, 0);
    await instant.close();
    const kept = join(await mkdtemp(join(tmpdir(), 'stillblock-')), 'chain');
    await cp(world.chain, kept, { recursive: true });
    return { ...world, chain: kept };
  })();
  const { machine, chain } = await pulledTwice;
  const copy = join(await folder(t), 'chain');
  await cp(chain, copy, { recursive: true });
  return { machine, chain: copy };
}

test.after.always(async () => {
  const made = await pulledTwice?.catch(() => undefined);
  if (made !== undefined) {
    await rm(join(made.chain, '..'), { recursive: true, force: true });
  }
});

for (const { name, code, damage } of DAMAGES) {
  pullTest(`a broken chain is found before anything is pulled or restored: ${name}`, async (t) => {
    const { chain } = await chainToBreak(t);
    await damage(chain);
    const before = await readdir(chain);
    // Nobody is asked: this server does not even answer.
    const server = ['--checkpoint', 'day-3', '--nbd', 'sda=nbd://127.0.0.1:1/sda'];
    const refused = await stillblock(t, 'pull', ...server, chain);
    t.is(refused.code, 1);
    t.is(errorOf(refused), code, refused.stderr);
    t.deepEqual(await readdir(chain), before);
    const target = join(chain, '../target');
    const restore = await stillblock(t, 'restore', '--yes', '--map', `sda=${target}`, chain);
    t.is(restore.code, 1);
    t.is(errorOf(restore), code === 'NOT_A_CHAIN' ? 'NO_CHAIN' : code, restore.stderr);
    await t.throwsAsync(stat(target), { code: 'ENOENT' });
  });
}
