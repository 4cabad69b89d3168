// SPDX-License-Identifier: Apache-2.0
/** Hooks: who is asked to get ready is released, in the reverse order, whatever happens. */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { chmod, chown, readFile, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import test, { type ExecutionContext } from 'ava';
import { pino } from 'pino';
import { type Hook, withHooks } from '../../src/hooks.ts';
import { folder } from './world.ts';

const CONTEXT = { checkpoint: 'monday', disks: ['sda', 'vg-root'] } as const;

interface World {
  readonly dir: string;
  /** Makes a hook of a shell script, which can write to `$trace`. */
  hook(name: string, script: string, timeoutMs?: number): Promise<Hook>;
  /** The lines that were written to the trace. */
  trace(): Promise<string[]>;
  /** Writes to it from here. */
  note(line: string): Promise<void>;
  readonly log: Record<string, unknown>[];
  run<T>(hooks: readonly Hook[], take: () => Promise<T>, signal?: AbortSignal): Promise<T>;
}

async function world(t: ExecutionContext): Promise<World> {
  const dir = await folder(t);
  const trace = join(dir, 'trace');
  await writeFile(trace, '');
  const log: Record<string, unknown>[] = [];
  const logger = pino({ level: 'debug' }, { write: (line) => log.push(JSON.parse(line)) });
  return {
    dir,
    hook: async (name, script, timeoutMs = 20_000) => {
      const path = join(dir, name);
      await writeFile(path, `#!/bin/bash\ntrace=${trace}\n${script}\n`);
      await chmod(path, 0o700);
      return { name, script: path, timeoutMs };
    },
    trace: async () => (await readFile(trace, 'utf8')).split('\n').filter((line) => line !== ''),
    note: (line) => writeFile(trace, `${line}\n`, { flag: 'a' }),
    log,
    run: (hooks, take, signal) => withHooks(hooks, CONTEXT, logger, take, signal),
  };
}

const TRACE = 'echo "$1 $(basename $0)" >>$trace';

/** Whether a process is there, other than as a zombie. */
async function alive(pid: number): Promise<boolean> {
  const text = await readFile(`/proc/${pid}/stat`, 'utf8').catch(() => '');
  return text !== '' && !/\) Z /.test(text);
}

/** Waits until a process has gone. */
async function gone(t: ExecutionContext, pid: number): Promise<void> {
  for (const until = Date.now() + 20_000; await alive(pid); await delay(20)) {
    t.true(Date.now() < until, `process ${pid} is still there`);
  }
}

test('scripts run in order before, and in the reverse order after', async (t) => {
  const { hook, run, note, trace } = await world(t);
  const hooks = [await hook('a', TRACE), await hook('b', TRACE)];
  const taken = await run(hooks, async () => {
    await note('take');
    return 7;
  });
  t.is(taken, 7);
  t.deepEqual(await trace(), ['before a', 'before b', 'take', 'after b', 'after a']);
});

test('without hooks there is just the take', async (t) => {
  const { run } = await world(t);
  t.is(await run([], () => Promise.resolve(1)), 1);
});

test('scripts are told what it is about, and nothing of us', async (t) => {
  const { hook, run, trace, dir } = await world(t);
  const env = `env | grep -E '^(STILLBLOCK_|NOTIFY|LISTEN)' | sort >>$trace; pwd >>$trace; ps -o pgid= $$ | grep -qw $$`;
  process.env['NOTIFY_SOCKET'] = join(dir, 'notify');
  t.teardown(() => {
    delete process.env['NOTIFY_SOCKET'];
  });
  await run([await hook('a', env)], () => Promise.resolve());
  t.deepEqual(await trace(), [
    ...['STILLBLOCK_CHECKPOINT=monday', 'STILLBLOCK_DISKS=sda vg-root', '/'],
    ...['STILLBLOCK_CHECKPOINT=monday', 'STILLBLOCK_DISKS=sda vg-root', 'STILLBLOCK_OUTCOME=taken'],
    '/',
  ]);
});

test('a script that fails before lets nothing be taken, and is released', async (t) => {
  const { hook, run, note, trace, log } = await world(t);
  const hooks = [
    await hook('a', TRACE),
    await hook('b', `${TRACE}; echo "no such table" >&2; [ $1 = after ] || exit 3`),
    await hook('c', TRACE),
  ];
  await t.throwsAsync(
    run(hooks, () => note('take')),
    { code: 'HOOK_FAILED', message: 'hook b failed with before: exit code 3' },
  );
  t.deepEqual(await trace(), ['before a', 'before b', 'after b', 'after a']);
  t.like(
    log.find(({ hook: name, phase }) => name === 'b' && phase === 'before'),
    { level: 40, output: 'no such table' },
  );
});

test('a take that fails releases all, and says so', async (t) => {
  const { hook, run, trace } = await world(t);
  const hooks = [await hook('a', 'echo "$1 $STILLBLOCK_OUTCOME" >>$trace')];
  const error = new Error('freeze');
  t.is(await t.throwsAsync(run(hooks, () => Promise.reject(error))), error);
  t.deepEqual(await trace(), ['before ', 'after failed']);
});

test('a script that fails after does not cost the snapshot, nor the release of others', async (t) => {
  const { hook, run, trace, log } = await world(t);
  const hooks = [await hook('a', TRACE), await hook('b', `${TRACE}; [ $1 = before ] || exit 1`)];
  t.is(await run(hooks, () => Promise.resolve('it')), 'it');
  t.deepEqual(await trace(), ['before a', 'before b', 'after b', 'after a']);
  t.deepEqual(
    log.map(({ hook: name, phase, level }) => `${name} ${phase} ${level}`),
    ['b before 30', 'b after 40', 'a before 30', 'a after 30'],
  );
});

test('a late script is killed with all that it has started, be they deaf', async (t) => {
  const { hook, run, note, trace } = await world(t);
  const script = `echo $$ >>$trace; [ $1 = after ] && exit
trap '' TERM; (trap '' TERM; echo $BASHPID >>$trace; while :; do sleep 1; done) & while :; do sleep 1; done`;
  const begun = performance.now();
  await t.throwsAsync(
    run([await hook('a', script, 3_000)], () => note('take')),
    {
      code: 'HOOK_TIMEOUT',
      message: /longer than 3 s with before/,
    },
  );
  t.true(performance.now() - begun < 20_000);
  const pids = (await trace()).map(Number);
  t.is(pids.length, 3, 'the script, its child, the release');
  for (const pid of pids) {
    await gone(t, pid);
  }
});

test('a late script that listens to SIGTERM can clean up', async (t) => {
  const { hook, run, trace } = await world(t);
  const script = `[ $1 = before ] || exit 0; trap 'echo cleaned >>$trace; exit' TERM; sleep 30 & wait`;
  await t.throwsAsync(
    run([await hook('a', script, 3_000)], () => Promise.resolve()),
    {
      code: 'HOOK_TIMEOUT',
    },
  );
  t.deepEqual(await trace(), ['cleaned']);
});

test('what a script leaves behind is held over the take, and then let go', async (t) => {
  const { hook, run, note, trace } = await world(t);
  const script = `case $1 in
before) { cat <&3 >/dev/null; echo "let go" >>$trace; } & echo "held" >>$trace;;
after) until grep -q "let go" $trace; do sleep 0.05; done; echo after >>$trace;;
esac`;
  await run([await hook('a', script)], async () => {
    await delay(300);
    await note('take');
  });
  t.deepEqual(await trace(), ['held', 'take', 'let go', 'after']);
});

test('what does not let go is ended after a last deadline', async (t) => {
  const { hook, run, trace } = await world(t);
  const script = `[ $1 = before ] || exit 0
(trap '' TERM; echo $BASHPID >>$trace; while :; do sleep 1; done) & exit 0`;
  await run([await hook('a', script, 3_000)], () => Promise.resolve());
  // The script has ended before its child may have written anything.
  for (const until = Date.now() + 10_000; (await trace()).length === 0 && Date.now() < until; ) {
    await delay(20);
  }
  const [pid] = await trace();
  t.regex(pid ?? '', /^\d+$/);
  await gone(t, Number(pid));
});

test('a process that dies lets go of what was held', async (t) => {
  const { hook, dir, trace } = await world(t);
  const { script } = await hook(
    'a',
    'setsid bash -c "cat <&3 >/dev/null; echo let go >>$trace" >/dev/null 2>&1 & echo held >>$trace',
  );
  const main = join(dir, 'main.mjs');
  const hooks = fileURLToPath(new URL('../../src/hooks.js', import.meta.url));
  const log = '{ info() {}, warn() {} }';
  await writeFile(
    main,
    `import { withHooks } from ${JSON.stringify(hooks)};
setInterval(() => {}, 1000);
await withHooks([{ name: 'a', script: ${JSON.stringify(script)}, timeoutMs: 9000 }],
  { checkpoint: 'x', disks: [] }, ${log}, () => { console.log('taking'); return new Promise(() => {}); });`,
  );
  const child = spawn(process.execPath, [main], { stdio: ['ignore', 'pipe', 'inherit'] });
  await once(child.stdout, 'data');
  t.deepEqual(await trace(), ['held']);
  child.kill('SIGKILL');
  await once(child, 'exit');
  for (const until = Date.now() + 20_000; !(await trace()).includes('let go'); await delay(20)) {
    t.true(Date.now() < until, 'the session is held for ever');
  }
});

test('a signal ends a script that gets ready, and all are released', async (t) => {
  const { hook, run, note, trace } = await world(t);
  const abort = new AbortController();
  const hooks = [await hook('a', TRACE), await hook('b', `${TRACE}; [ $1 = after ] || sleep 30`)];
  const reason = new Error('SIGTERM');
  const begun = performance.now();
  const running = run(hooks, () => note('take'), abort.signal);
  while (!(await trace()).includes('before b')) {
    await delay(20);
  }
  abort.abort(reason);
  t.is(await t.throwsAsync(running), reason);
  t.true(performance.now() - begun < 15_000);
  t.deepEqual(await trace(), ['before a', 'before b', 'after b', 'after a']);
});

test('a signal while it is taken comes too late, and one from before lets nothing begin', async (t) => {
  const { hook, run, trace } = await world(t);
  const abort = new AbortController();
  const hooks = [await hook('a', TRACE)];
  t.is(
    await run(
      hooks,
      () => {
        abort.abort(new Error('SIGTERM'));
        return Promise.resolve(1);
      },
      abort.signal,
    ),
    1,
  );
  t.deepEqual(await trace(), ['before a', 'after a']);
  await t.throwsAsync(
    run(hooks, () => Promise.resolve(), abort.signal),
    { message: 'SIGTERM' },
  );
  t.deepEqual(await trace(), ['before a', 'after a']);
});

test('a flood of output is read, and its beginning logged after the take', async (t) => {
  const { hook, run, log } = await world(t);
  const script =
    'echo begin; head -c 50000000 /dev/zero | tr "\\0" x; head -c 1000000 /dev/urandom >&2';
  await run([await hook('a', script)], async () => {
    t.deepEqual(log, [], 'nothing is logged while file systems may be frozen');
  });
  t.is(log.length, 2);
  for (const { output } of log) {
    t.true(String(output).length < 20_000 * 3);
    t.regex(String(output), /\[\d+ more bytes\]$/);
  }
});

test('scripts that cannot be run are found before any is called', async (t) => {
  const { hook, run, trace, dir } = await world(t);
  const good = await hook('good', TRACE);
  const plain = await hook('plain', TRACE);
  await chmod(plain.script, 0o600);
  const open = await hook('open', TRACE);
  await chmod(open.script, 0o777);
  const foreign = await hook('foreign', TRACE);
  if (process.getuid?.() === 0) {
    await chown(foreign.script, 65_534, 65_534);
  } else {
    // Only root can give a file away.
    await chmod(foreign.script, 0o000);
  }
  const missing = { ...good, name: 'missing', script: join(dir, 'none') };
  const directory = { ...good, name: 'directory', script: dir };
  for (const [bad, code] of [
    [plain, 'HOOK_UNUSABLE'],
    [open, 'HOOK_UNUSABLE'],
    [foreign, 'HOOK_UNUSABLE'],
    [directory, 'HOOK_UNUSABLE'],
    [missing, 'ENOENT'],
  ] as const) {
    const taken = run([good, bad], () => Promise.resolve());
    await t.throwsAsync(taken, { code, message: new RegExp(bad.name) });
  }
  t.deepEqual(await trace(), []);
});

test('a file that is no program', async (t) => {
  const { hook, run, note, trace } = await world(t);
  const bad = await hook('bad', '');
  await writeFile(bad.script, '\u0001\u0002');
  await t.throwsAsync(
    run([await hook('a', TRACE), bad], () => note('take')),
    { message: /bad/ },
  );
  t.deepEqual(await trace(), ['before a', 'after a']);
});
