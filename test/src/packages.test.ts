// SPDX-License-Identifier: Apache-2.0
/** The Debian packages, without a machine to install them on. */
import { execFile } from 'node:child_process';
import { createHash } from 'node:crypto';
import { mkdir, readdir, readFile, stat, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { execPath } from 'node:process';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import test from 'ava';
import { folder, pattern } from '../nbd/world.ts';

const execute = promisify(execFile);
const CHECKOUT = fileURLToPath(new URL('../../..', import.meta.url));
const LIMIT_MS = 600_000;

/** Makes the packages in a folder, in a work folder and a time of its own. */
async function build(home: string, name: string, environment: object): Promise<string> {
  const output = join(home, name);
  const work = join(home, `${name}-work`);
  await mkdir(work);
  const script = join(CHECKOUT, 'scripts/package.sh');
  await execute('bash', [script, '-o', output, 'stillblock', 'stillblock-dkms'], {
    env: { ...process.env, TMPDIR: work, ...environment },
  });
  return output;
}

async function digests(path: string): Promise<Record<string, string>> {
  const found: Record<string, string> = {};
  for (const name of (await readdir(path)).toSorted()) {
    found[name] = createHash('sha256')
      .update(await readFile(join(path, name)))
      .digest('hex');
  }
  return found;
}

interface Bill {
  readonly components: readonly { readonly name: string; readonly version: string }[];
}

test('packages: the same each time, without blemish, and complete', async (t) => {
  t.timeout(LIMIT_MS);
  const home = await folder(t);
  const output = await build(home, 'one', {});
  const again = await build(home, 'two', { TZ: 'Asia/Tokyo', LANG: 'C.UTF-8', HOME: home });
  t.deepEqual(await digests(again), await digests(output));

  const [dkms = '', program = ''] = (await readdir(output)).toSorted();
  const files = [dkms, program].map((name) => join(output, name));
  const judged = await execute('lintian', ['--allow-root', '--fail-on', 'error,warning', ...files]);
  t.notRegex(judged.stdout, /^[EW]:/m);

  const root = join(home, 'root');
  for (const file of files) {
    await execute('dpkg-deb', ['-x', file, root]);
  }
  const paper = join(root, 'usr/share/doc/stillblock');
  const bill = JSON.parse(await readFile(join(paper, 'sbom.cdx.json'), 'utf8')) as Bill;
  t.true(bill.components.length > 10);
  for (const { name, version } of bill.components) {
    t.true((await readdir(join(paper, 'licenses', name))).length > 0, `${name} ${version}`);
  }
  const source = join(root, 'usr/src');
  const [sources = ''] = await readdir(source);
  const conf = await readFile(join(source, sources, 'dkms.conf'), 'utf8');
  t.is(`stillblock-${/^PACKAGE_VERSION="(.*)"$/m.exec(conf)?.[1]}`, sources);
  const { stdout: kept } = await execute('git', ['ls-files', 'module'], { cwd: CHECKOUT });
  for (const file of kept.trim().split('\n')) {
    await t.notThrowsAsync(readFile(join(source, sources, file.replace('module/', ''))));
  }

  // What tracks devices before they are mounted, each part where the others look for it.
  const early = '/usr/lib/stillblock/stillblock-early';
  const boots = [
    early,
    '/usr/share/initramfs-tools/hooks/stillblock',
    '/usr/share/initramfs-tools/scripts/local-premount/stillblock',
    '/usr/lib/dracut/modules.d/90stillblock/module-setup.sh',
    '/usr/lib/dracut/modules.d/90stillblock/stillblock-early.sh',
  ];
  for (const file of boots) {
    t.is((await stat(join(root, file))).mode & 0o777, 0o755, file);
  }
  for (const file of [boots[1], boots[3], '/lib/udev/rules.d/60-stillblock-track.rules']) {
    t.true((await readFile(join(root, file ?? ''), 'utf8')).includes(early), file);
  }
  const refused = await t.throwsAsync(execute(join(root, early), [join(home, 'plan')]));
  t.regex(refused?.message ?? '', /plan is no plan/);

  // The program with nothing but what is in its package: npm's packages are in the bundle.
  const parts = (await readdir(join(root, 'usr/lib/stillblock'))).toSorted();
  t.deepEqual(parts, ['bin', 'build', 'dist', 'package.json', 'stillblock-early']);
  const cli = join(root, 'usr/lib/stillblock/bin/stillblock');
  const { stdout: version } = await execute(execPath, [cli, '--version'], { cwd: '/' });
  t.regex(sources, new RegExp(`-${version.trim()}$`));
  await writeFile(join(home, 'disk'), pattern(1 << 20));
  const served = ['[', execPath, cli, 'nbd', '--export', `disk=${home}/disk`, ']'];
  await execute('nbdcopy', ['--', ...served, join(home, 'copy')], { cwd: '/' });
  t.true((await readFile(join(home, 'copy'))).equals(pattern(1 << 20)));
});
