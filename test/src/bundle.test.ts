// SPDX-License-Identifier: Apache-2.0
/** The command as it is shipped: a few files alone in a folder, without npm's packages. */
import { type ChildProcess, execFile, spawn } from 'node:child_process';
import { once } from 'node:events';
import { cp, mkdir, readdir, readFile, writeFile } from 'node:fs/promises';
import { request } from 'node:http';
import { basename, dirname, join } from 'node:path';
import { execPath } from 'node:process';
import { text } from 'node:stream/consumers';
import { promisify } from 'node:util';
import test, { type ExecutionContext } from 'ava';
import type { Command } from 'commander';
import { makeProgram } from '../../src/program.ts';
import { folder, soon } from '../nbd/world.ts';
import { CLI } from '../program.ts';
import { checkout } from '../vm/checkout.ts';

const execute = promisify(execFile);
const ADDON = 'build/native/stillblock.node';

/** Copies what a package has. Returns the command there. */
async function installed(t: ExecutionContext): Promise<{ home: string; cli: string }> {
  const home = await folder(t);
  const root = join(home, 'root');
  await cp(dirname(CLI), join(root, 'dist/bundle'), { recursive: true });
  await cp(join(checkout, 'package.json'), join(root, 'package.json'));
  await mkdir(dirname(join(root, ADDON)), { recursive: true });
  await cp(join(checkout, ADDON), join(root, ADDON));
  return { home, cli: join(root, 'dist/bundle', basename(CLI)) };
}

/** An environment with folders of the test's own. */
const environment = (home: string): NodeJS.ProcessEnv => ({
  ...process.env,
  STILLBLOCK_RUN_DIR: join(home, 'run'),
  STILLBLOCK_STATE_DIR: join(home, 'state'),
});

/** Files that a process opens and finds, by their paths. */
async function opened(home: string, ...args: readonly string[]): Promise<string[]> {
  const log = join(home, 'opened');
  const trace = ['-f', '-qq', '-e', 'trace=open,openat', '-e', 'signal=none', '-o', log];
  await execute('strace', [...trace, execPath, ...args], { env: environment(home) }).catch(
    (error: { code: unknown }) => {
      // There is no module here.
      if (error.code !== 1) throw error;
    },
  );
  const lines = (await readFile(log, 'utf8')).split('\n');
  return lines.flatMap((line) => /"([^"]+)".*\) = \d+$/.exec(line)?.[1] ?? []);
}

for (const [command, most] of [
  ['backup begin --help', 4],
  ['device list', 7],
  ['status', 7],
] as const) {
  test(`${command} opens at most ${most} files`, async (t) => {
    const { home, cli } = await installed(t);
    const paths = await opened(home, cli, ...command.split(' '));
    const ours = paths.filter((path) => path.startsWith(home) || path.startsWith(checkout));
    t.true(ours.includes(cli));
    t.true(ours.length <= most, ours.join('\n'));
  });
}

function commandsOf(command: Command, above: readonly string[] = []): string[][] {
  return command.commands.flatMap((child) => {
    const words = [...above, child.name()];
    return [words, ...commandsOf(child, words)];
  });
}

test('each command is there, with its help, as are the shells completions', async (t) => {
  const { home, cli } = await installed(t);
  const env = environment(home);
  for (const words of commandsOf(await makeProgram())) {
    const { stdout } = await execute(execPath, [cli, ...words, '--help'], { env });
    t.true(stdout.startsWith(`Usage: stillblock ${words.join(' ')} `), words.join(' '));
  }
  const { stdout } = await execute(execPath, [cli, 'completion', 'bash'], { env });
  t.regex(stdout, /checkpoint/);
});

test('each package that is bundled is one that the program depends on', async (t) => {
  const { stdout } = await execute('npm', ['ls', '--omit=dev', '--all', '--parseable'], {
    cwd: checkout,
  });
  const known = new Set(stdout.split('\n').map((path) => path.replace(/^.*?\/node_modules\//, '')));
  const bundle = dirname(CLI);
  const found = new Set<string>();
  for (const name of await readdir(bundle)) {
    const source = await readFile(join(bundle, name), 'utf8');
    for (const [, path = ''] of source.matchAll(/^ *\/\/ node_modules\/(.*)$/gm)) {
      found.add(/^(?:.*node_modules\/)?(?:@[^/]+\/)?[^/]+/.exec(path)?.[0] ?? '');
    }
  }
  t.true(found.has('commander') && found.has('fastify') && found.size > 20);
  for (const name of found) {
    t.true(known.has(name), name);
  }
});

/** The addon as it is, but for the module: one is loaded, and tracks nothing. */
const ADDON_WITH_MODULE = `
const real = require(process.env.REAL_ADDON);
const control = {
  info: () => ({ abi: real.constants.abi, chunkSizeBytes: 65536, version: '0' }),
  list: async () => [],
  place: async () => [],
  tryLock: () => true,
  close() {},
};
module.exports = { ...real, openControl: () => control };
`;

/** Asks a server on a unix socket. */
async function ask(
  socketPath: string,
  path: string,
  body?: string,
): Promise<{ status: number | undefined; body: string }> {
  const outgoing = request({ socketPath, path, method: body === undefined ? 'GET' : 'POST' });
  outgoing.setHeader('content-type', 'application/json');
  outgoing.end(body);
  const [incoming] = await once(outgoing, 'response');
  return { status: incoming.statusCode, body: await text(incoming) };
}

/** Waits for what a process says on a stream. */
async function says(child: ChildProcess, stream: 'stdout' | 'stderr', what: RegExp): Promise<void> {
  let all = '';
  const said = new Promise<void>((resolve, reject) => {
    child[stream]?.on('data', (chunk: Buffer) => {
      all += chunk.toString();
      if (what.test(all)) resolve();
    });
    child.once('close', () => reject(new Error(`it has ended, and said ${all}`)));
  });
  await soon(String(what), said);
}

test('the daemon: configuration, API that validates, metrics, log', async (t) => {
  const { home, cli } = await installed(t);
  const [run, metrics] = [join(home, 'run'), join(home, 'metrics')];
  await writeFile(join(home, 'addon.cjs'), ADDON_WITH_MODULE);
  await writeFile(
    join(home, 'stillblock.xml'),
    `<stillblock><folders state="${home}/state" run="${run}"/>
      <nbd><listen socket="${home}/nbd"/></nbd><metrics socket="${metrics}"/></stillblock>`,
  );
  const child = spawn(execPath, [cli, 'serve', '--config', join(home, 'stillblock.xml')], {
    env: {
      ...process.env,
      STILLBLOCK_ADDON: join(home, 'addon.cjs'),
      REAL_ADDON: join(cli, '../../..', ADDON),
    },
    stdio: ['ignore', 'ignore', 'pipe'],
  });
  t.teardown(() => child.kill('SIGKILL'));
  await says(child, 'stderr', /^\{.*"msg":"ready"\}$/m);
  const socket = join(run, 'control.sock');
  const status = await ask(socket, '/v1/status');
  t.is(status.status, 200);
  t.like(JSON.parse(status.body), { trackedDevices: 0, daemon: { pid: child.pid } });
  const refused = await ask(socket, '/v1/devices', '{"a":1}');
  t.is(refused.status, 400);
  t.regex(refused.body, /must have required property 'devices'/);
  t.regex((await ask(metrics, '/metrics')).body, /^stillblock_nbd_connections 0$/m);
  child.kill('SIGTERM');
  t.deepEqual(await soon('its end', once(child, 'exit')), [0, null]);
});

test('the log on a terminal', async (t) => {
  const { home, cli } = await installed(t);
  const disk = join(home, 'disk');
  await writeFile(disk, Buffer.alloc(4096));
  const command = `exec '${execPath}' '${cli}' nbd -v -U '${home}/socket' --export 'a=${disk}'`;
  const child = spawn('script', ['-qefc', command, '/dev/null'], {
    stdio: ['pipe', 'pipe', 'inherit'],
  });
  t.teardown(() => child.kill('SIGKILL'));
  // biome-ignore lint/suspicious/noControlCharactersInRegex: colours are what only a terminal gets
  await says(child, 'stdout', /INFO\x1b\[39m: \x1b\[36mlistening/);
  const ended = once(child, 'exit');
  // Ctrl-C
  child.stdin.write('\x03');
  t.deepEqual(await soon('its end', ended), [0, null]);
});

test('a command that comes to no end says so, and fails', async (t) => {
  const { home, cli } = await installed(t);
  const deaf = `import { Server } from 'node:net'; Server.prototype.listen = function () { return this; };`;
  const args = ['--import', `data:text/javascript,${encodeURIComponent(deaf)}`, cli];
  const disk = join(home, 'disk');
  await writeFile(disk, Buffer.alloc(4096));
  const failed = execute(execPath, [
    ...args,
    'nbd',
    '-U',
    join(home, 's'),
    '--export',
    `a=${disk}`,
  ]);
  const error = await t.throwsAsync(failed);
  t.like(error, {
    code: 1,
    stderr: 'stillblock: the command came to no end: this is a mistake of ours: please report it\n',
  });
});
