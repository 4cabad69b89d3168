// SPDX-License-Identifier: Apache-2.0
/** Commands that stand in the text of a page, not in a block of their own. */
import { X509Certificate } from 'node:crypto';
import { cp, readdir, readFile } from 'node:fs/promises';
import { join } from 'node:path';
import test from 'ava';
import { identityOf } from '../../nbd/tls.ts';
import { run } from '../interop/clients.ts';
import { folder } from '../nbd/world.ts';
import { readPage } from '../pages.ts';
import { cacheFolder, checkout, stockKernel } from '../vm/checkout.ts';

/** The command that begins so, as the page has it. */
async function inText(page: string, beginning: string): Promise<string> {
  const prose = (await readPage(page)).replaceAll(/^ *```[\s\S]*?^ *```$/gm, '');
  const spans = [...prose.matchAll(/`([^`]+)`/g)];
  const found = spans
    .map(([, code = '']) => code.replaceAll(/\s+/g, ' '))
    .find((code) => code.startsWith(beginning));
  if (found === undefined) {
    throw new Error(`${page} has no ${beginning}`);
  }
  return found;
}

test('README.md: the command is there after npm link', async (t) => {
  const prefix = await folder(t);
  const link = await inText('README.md', 'npm link');
  await run('env', [`npm_config_prefix=${prefix}`, 'sh', '-c', `cd '${checkout}' && ${link}`]);
  const stdout = await run(join(prefix, 'bin/stillblock'), ['--version']);
  const { version } = JSON.parse(await readFile(join(checkout, 'package.json'), 'utf8')) as {
    version: string;
  };
  t.is(stdout.trim(), version);
});

test('docs/module.md: the module is built without DKMS', async (t) => {
  t.timeout(10 * 60_000);
  const home = await folder(t);
  await cp(join(checkout, 'module'), join(home, 'module'), { recursive: true });
  const { release } = stockKernel('6.1');
  const headers = join(cacheFolder, 'kernels/6.1/usr/src', `linux-headers-${release}`);
  const command = (await inText('docs/module.md', 'make -C')).replace(
    '/lib/modules/$(uname -r)/build',
    `'${headers}'`,
  );
  t.true(command.includes(headers));
  await run('sh', ['-c', `cd '${home}' && ${command}`]);
  t.true((await readdir(join(home, 'module'))).includes('stillblock.ko'));
  const stdout = await run('/sbin/modinfo', [
    ...['-F', 'vermagic', join(home, 'module/stillblock.ko')],
  ]);
  t.is(stdout.split(' ')[0], release);
});

test("docs/tls.md: the subject that openssl shows is a rule's", async (t) => {
  const home = await folder(t);
  const file = join(home, 'proxy.pem');
  await run('openssl', [
    ...['req', '-x509', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:P-256', '-nodes'],
    ...['-subj', '/C=DE/O=Example, Inc./CN=proxy', '-days', '2'],
    ...['-keyout', join(home, 'key.pem'), '-out', file],
  ]);
  const stdout = await run('sh', [
    ...['-c', `${await inText('docs/tls.md', 'openssl x509')} -in '${file}'`],
  ]);
  const { kind, ...identity } = identityOf(new X509Certificate(await readFile(file)));
  t.is(kind, 'certificate');
  t.is(stdout.trim(), `subject=${(identity as { subject: string }).subject}`);
});
