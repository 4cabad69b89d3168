// SPDX-License-Identifier: Apache-2.0
/** The doctor, on machines that the tests make up. */
import { execFile } from 'node:child_process';
import { chmod, mkdir, readdir, readFile, symlink, utimes, writeFile } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import { promisify } from 'node:util';
import test, { type ExecutionContext } from 'ava';
import { type Configuration, parseConfiguration } from '../../src/configuration.ts';
import type { DeviceReport } from '../../src/devices.ts';
import { examine, type Finding } from '../../src/doctor.ts';
import { StillblockError } from '../../src/errors.ts';
import { folder, installation, stillblock } from './world.ts';

const run = promisify(execFile);
const RELEASE = '6.1.0-30-amd64';

/** The files of a machine on which all is well; undefined for one that is not there. */
type Files = Readonly<Record<string, string | Buffer | undefined>>;
const WELL: Files = {
  'proc/sys/kernel/osrelease': `${RELEASE}\n`,
  'proc/sys/kernel/ftrace_enabled': '1\n',
  'proc/modules': 'stillblock 90112 0 - Live 0x0\next4 1 0 - Live 0x0\n',
  'proc/net/tcp': '  sl  local_address rem_address   st\n',
  'sys/module/stillblock/version': '0.1.0\n',
  'sys/kernel/tracing/available_filter_functions': 'submit_bio\nsubmit_bio_noacct\nschedule [x]\n',
  'sys/kernel/tracing/enabled_functions': 'submit_bio_noacct (1) R I M \ttramp: stb_hook\n',
  [`lib/modules/${RELEASE}/build/Makefile`]: '',
  [`lib/modules/${RELEASE}/modules.dep`]: 'updates/dkms/stillblock.ko:\n',
  'usr/bin/qemu-img': '',
};

async function machine(t: ExecutionContext, changes: Files = {}): Promise<string> {
  const root = await folder(t);
  for (const [path, text] of Object.entries({ ...WELL, ...changes })) {
    if (text !== undefined) {
      await mkdir(dirname(join(root, path)), { recursive: true });
      await writeFile(join(root, path), text);
    }
  }
  return root;
}

const parse = (content: string): Configuration =>
  parseConfiguration(`<stillblock>${content}</stillblock>`, 'x.xml');
const choose = () =>
  Promise.resolve({
    request: { places: ['/mnt/spare'], sizeBytes: 2 ** 30, maxBytes: undefined },
    why: 'it has room',
  });

/** The verdicts on a made-up machine, by check. */
async function verdicts(
  root: string,
  content = '',
  nowMs = Date.parse('2030-01-01'),
): Promise<ReadonlyMap<string, Finding>> {
  const findings = await examine(parse(content), { root, nowMs, choose });
  for (const { verdict, advice } of findings) {
    if ((verdict === 'ok') !== (advice === undefined)) {
      throw new Error('what is not ok, and only that, has advice');
    }
  }
  return new Map(findings.map((finding) => [finding.check, finding]));
}

test('a machine on which all is well', async (t) => {
  const found = await verdicts(await machine(t));
  t.deepEqual(
    [...found.values()].map(({ check, verdict, found: what }) => [check, verdict, what]),
    [
      ['kernel', 'ok', RELEASE],
      ['function tracing', 'ok', 'submit_bio_noacct can be traced'],
      ['other filters', 'ok', 'none'],
      ['Secure Boot', 'ok', 'not there; any module may be loaded'],
      ['kernel headers', 'ok', 'installed'],
      ['module', 'ok', 'loaded, version 0.1.0'],
      ['devices', 'warn', 'the configuration names none'],
      ['port 10809 (NBD)', 'ok', 'free'],
      ['TLS', 'ok', 'NBD is not reached from outside'],
      ['clients', 'ok', 'qemu-img'],
    ],
  );
});

const UNLOADED = { 'proc/modules': 'ext4 1 0 - Live 0x0\n' };
const LOCKED = { 'sys/kernel/security/lockdown': 'none [integrity] confidentiality\n' };
const SECURE_BOOT = 'sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c';

/** What is wrong with a machine, and what is found. */
const WRONG: readonly (readonly [files: Files, check: string, verdict: string, found: RegExp])[] = [
  [{ 'proc/sys/kernel/osrelease': '5.4.0-1\n' }, 'kernel', 'fail', /^5\.4/],
  [{ 'proc/sys/kernel/osrelease': '7.3.0-rc1\n' }, 'kernel', 'warn', /^7\.3/],
  [{ 'proc/sys/kernel/osrelease': '5.10.0-34\n' }, 'kernel', 'ok', /^5\.10/],
  [{ 'proc/sys/kernel/osrelease': undefined }, 'kernel', 'fail', /unknown/],
  [{ 'proc/sys/kernel/ftrace_enabled': '0\n' }, 'function tracing', 'fail', /switched off/],
  [
    { 'sys/kernel/tracing/available_filter_functions': 'submit_bio_noacct_nocheck\n' },
    'function tracing',
    'fail',
    /cannot be traced/,
  ],
  [
    { 'sys/kernel/tracing/available_filter_functions': undefined },
    'function tracing',
    'warn',
    /could not be seen/,
  ],
  [
    {
      'sys/kernel/tracing/available_filter_functions': undefined,
      [`boot/config-${RELEASE}`]: '# CONFIG_DYNAMIC_FTRACE is not set\n',
    },
    'function tracing',
    'fail',
    /built without/,
  ],
  [
    {
      'sys/kernel/tracing/available_filter_functions': undefined,
      'sys/kernel/debug/tracing/available_filter_functions': 'submit_bio_noacct\n',
    },
    'function tracing',
    'ok',
    /can be traced/,
  ],
  [
    { 'proc/modules': 'veeamblksnap 1 0 - Live 0x0\ndattobd 1 0 - Live 0x0\n' },
    'other filters',
    'warn',
    /veeamblksnap \(Veeam\), dattobd \(Datto\) is loaded/,
  ],
  [UNLOADED, 'other filters', 'fail', /something else replaces submit_bio_noacct/],
  [UNLOADED, 'module', 'warn', /stillblock\.ko is not loaded/],
  [
    { ...UNLOADED, [`lib/modules/${RELEASE}/modules.dep`]: 'kernel/ext4.ko:\n' },
    'module',
    'fail',
    /not installed for 6\.1\.0-30-amd64/,
  ],
  [
    {
      ...UNLOADED,
      [`lib/modules/${RELEASE}/modules.dep`]: '',
      [`lib/modules/${RELEASE}/build/Makefile`]: undefined,
    },
    'kernel headers',
    'fail',
    /not installed/,
  ],
  [{ [`lib/modules/${RELEASE}/build/Makefile`]: undefined }, 'kernel headers', 'ok', /not needed/],
  [{ [SECURE_BOOT]: Buffer.from([6, 0, 0, 0, 1]), ...LOCKED }, 'Secure Boot', 'ok', /^on; ours is/],
  [{ [SECURE_BOOT]: Buffer.from([6, 0, 0, 0, 0]) }, 'Secure Boot', 'ok', /^off; any/],
  [
    {
      ...UNLOADED,
      ...LOCKED,
      [SECURE_BOOT]: Buffer.from([6, 0, 0, 0, 1]),
      [`lib/modules/${RELEASE}/updates/dkms/stillblock.ko`]: 'no module',
    },
    'Secure Boot',
    'fail',
    /^on; the kernel is locked down \(integrity\), and .*stillblock\.ko is not signed/,
  ],
  [
    {
      ...UNLOADED,
      'sys/module/module/parameters/sig_enforce': 'Y\n',
      [`lib/modules/${RELEASE}/modules.dep`]: undefined,
    },
    'Secure Boot',
    'warn',
    /not there; module\.sig_enforce is set: modules have to be signed/,
  ],
  [{ 'usr/bin/qemu-img': undefined }, 'clients', 'warn', /none/],
];

for (const [files, check, verdict, found] of WRONG) {
  test(`${check} ${verdict}: ${found.source} (${JSON.stringify(Object.values(files)[0])})`, async (t) => {
    const finding = (await verdicts(await machine(t, files))).get(check);
    t.is(finding?.verdict, verdict as Finding['verdict']);
    t.regex(finding?.found ?? '', found);
  });
}

test('a signed module, and whether the kernel trusts its key', async (t) => {
  const path = `lib/modules/${RELEASE}/updates/dkms/stillblock.ko`;
  const root = await machine(t, { ...UNLOADED, ...LOCKED, 'proc/keys': '' });
  const dir = await folder(t);
  const file = (name: string): string => join(dir, name);
  await run('openssl', [
    ...['req', '-x509', '-newkey', 'rsa:2048', '-nodes', '-days', '9', '-subj', '/CN=Example MOK'],
    ...['-keyout', file('key.pem'), '-out', file('cert.pem')],
  ]);
  // A module is an ELF file, and its signature (PKCS#7) is appended to it.
  const section = '__attribute__((section(".modinfo"), used))';
  await writeFile(file('module.c'), `static const char license[] ${section} = "license=GPL";\n`);
  await run('gcc', ['-c', file('module.c'), '-o', file('module.o')]);
  await run('openssl', [
    ...['smime', '-sign', '-binary', '-noattr', '-md', 'sha256', '-outform', 'DER', '-nocerts'],
    ...['-in', file('module.o'), '-signer', file('cert.pem'), '-inkey', file('key.pem')],
    ...['-out', file('signature')],
  ]);

  const signature = await readFile(file('signature'));
  const trailer = Buffer.alloc(12);
  trailer[2] = 2;
  trailer.writeUInt32BE(signature.length, 8);
  const magic = Buffer.from('~Module signature appended~\n');
  const signed = Buffer.concat([await readFile(file('module.o')), signature, trailer, magic]);
  await mkdir(dirname(join(root, path)), { recursive: true });
  await writeFile(join(root, path), signed);
  t.like((await verdicts(root)).get('Secure Boot'), { verdict: 'fail' });
  t.regex(
    (await verdicts(root)).get('Secure Boot')?.found ?? '',
    /signed by Example MOK, whom the kernel does not trust/,
  );
  const key = '1b2c I------ 1 perm 1f030000 0 0 asymmetri Example MOK: 1a2b: X509.rsa 5c []\n';
  await writeFile(join(root, 'proc/keys'), key);
  t.like((await verdicts(root)).get('Secure Boot'), { verdict: 'ok' });
});

test('the store of the configured devices', async (t) => {
  const root = await machine(t, { 'dev/sda': '' });
  const content = '<devices><device path="/dev/sda"/></devices>';
  t.like((await verdicts(root, content)).get('store'), {
    verdict: 'ok',
    found: '1 GiB in /mnt/spare: it has room',
  });
  const none = () => Promise.reject(new StillblockError('STORE_NO_ROOM', 'no room', 'free some'));
  const findings = await examine(parse(content), { root, choose: none });
  t.deepEqual(
    findings.find(({ check }) => check === 'store'),
    {
      check: 'store',
      verdict: 'fail',
      found: 'no room',
      advice: 'free some',
    },
  );
  t.false((await verdicts(root)).has('store'), 'without devices there is nothing to size');
});

test('devices and hooks of the configuration', async (t) => {
  const root = await machine(t, { 'dev/sdb': '', 'h/plain': '', 'h/open': '', 'h/good': '' });
  await chmod(join(root, 'h/open'), 0o777);
  await chmod(join(root, 'h/good'), 0o755);
  const [disk] = await readdir('/sys/block');
  await symlink(`/dev/${disk}`, join(root, 'dev/sdc'));
  const found = await verdicts(
    root,
    `<devices><device path="/dev/sda"/><device path="/dev/sdb"/><device path="/dev/sdc"/></devices>
     <hooks>${['none', 'plain', 'open', 'good'].map((h) => `<hook name="${h}" script="/h/${h}"/>`).join('')}</hooks>`,
  );
  const told = [...found.values()].filter(({ check }) => /^(device |hook )/.test(check));
  t.deepEqual(
    told.map(({ check, verdict, found: what }) => [check, verdict, what]),
    [
      ['device /dev/sda', 'fail', 'it is not there'],
      ['device /dev/sdb', 'fail', 'it is not a block device'],
      ['device /dev/sdc', 'ok', 'there'],
      ['hook none', 'fail', '/h/none is not there'],
      ['hook plain', 'fail', '/h/plain is not executable'],
      ['hook open', 'fail', '/h/open can be changed by others'],
      ['hook good', 'ok', '/h/good'],
    ],
  );
});

test('ports in use, and by whom', async (t) => {
  const line = (address: string, state: string, inode: number): string =>
    `   0: ${address} 00000000:0000 ${state} 00000000:00000000 00:00000000 00000000     0        0 ${inode} 1`;
  const head =
    '  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid\n';
  const tcp = [
    line('0100007F:2A39', '0A', 11), // 127.0.0.1:10809
    line('00000000:2651', '0A', 12), // 0.0.0.0:9809
    line('0100007F:2A3A', '01', 13), // established
    line('050200C0:2A3B', '0A', 14), // 192.0.2.5:10811
  ];
  const root = await machine(t, {
    'proc/net/tcp': `${head}${tcp.join('\n')}\n`,
    'proc/net/tcp6': `${head}${line('00000000000000000000000001000000:2A3C', '0A', 15)}\n`,
    'proc/7/cmdline': 'nbdkit\0--port\0',
    'proc/8/cmdline': 'node\0/usr/lib/stillblock/cli.js\0serve\0',
  });
  for (const [pid, inode] of [
    [7, 11],
    [8, 12],
  ]) {
    await mkdir(join(root, `proc/${pid}/fd`), { recursive: true });
    await symlink(`socket:[${inode}]`, join(root, `proc/${pid}/fd/4`));
  }
  const found = await verdicts(
    root,
    `<nbd><tls insecure="yes"/><listen address="127.0.0.1"/><listen address="127.0.0.1" port="10810"/>
     <listen address="192.0.2.6" port="10811"/><listen address="192.0.2.5" port="10811"/>
     <listen address="0.0.0.0" port="10812"/><listen address="::1" port="10812"/>
     <listen address="::1" port="10811"/><listen socket="/s"/></nbd><metrics port="9809"/>`,
  );
  t.like(found.get('port 10809 (NBD)'), { verdict: 'warn', found: 'nbdkit --port listens on it' });
  t.like(found.get('port 9809 (metrics)'), { verdict: 'ok', found: 'ours' });
  t.like(found.get('port 10810 (NBD)'), { verdict: 'ok', found: 'free' });
  t.like(found.get('TLS'), {
    verdict: 'warn',
    found: 'NBD is not encrypted on 192.0.2.6, 192.0.2.5, 0.0.0.0',
  });
  const each = async (host: string, port: number): Promise<string | undefined> => {
    const content = `<nbd><tls insecure="yes"/><listen address="${host}" port="${port}"/></nbd>`;
    return (await verdicts(root, content)).get(`port ${port} (NBD)`)?.verdict;
  };
  t.is(await each('192.0.2.6', 10_811), 'ok');
  t.is(await each('192.0.2.5', 10_811), 'warn');
  t.is(await each('::1', 10_811), 'ok');
  t.is(await each('0.0.0.0', 10_812), 'warn');
  t.is(await each('::1', 10_812), 'warn');
});

/** Certificates of an authority, one between, and a server; valid for a number of days. */
async function pki(t: ExecutionContext, days: number): Promise<string> {
  const dir = await folder(t);
  const openssl = (...args: readonly string[]): Promise<unknown> =>
    run('openssl', args, { cwd: dir });
  const request = ['req', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:P-256', '-nodes'];
  const authority = ['-addext', 'basicConstraints=critical,CA:TRUE'];
  await openssl(
    ...[...request, '-x509', '-days', '3650', '-subj', '/CN=Root', ...authority],
    ...['-keyout', 'ca-key.pem', '-out', 'ca-cert.pem'],
  );
  for (const [name, issuer] of [
    ['mid', 'ca'],
    ['server', 'mid'],
  ]) {
    await openssl(...request, '-subj', `/CN=${name}`, '-keyout', `${name}-key.pem`, '-out', 'csr');
    await writeFile(
      join(dir, 'ext'),
      `basicConstraints=critical,CA:${name === 'mid' ? 'TRUE' : 'FALSE'}\n`,
    );
    await openssl(
      ...['x509', '-req', '-in', 'csr', '-days', String(name === 'mid' ? 3650 : days)],
      ...['-CA', `${issuer}-cert.pem`, '-CAkey', `${issuer}-key.pem`, '-CAcreateserial'],
      ...['-extfile', 'ext', '-out', `${name}-cert.pem`],
    );
  }
  await run('sh', ['-c', 'cat server-cert.pem mid-cert.pem >chain.pem'], { cwd: dir });
  return dir;
}

test('certificates', async (t) => {
  const dir = await pki(t, 100);
  const content = `<nbd><tls certificates="/pki"/></nbd>`;
  const day = 86_400_000;
  const look = async (
    files: Readonly<Record<string, string | undefined>>,
    after = 0,
    mode = 0o600,
  ): Promise<readonly (string | undefined)[]> => {
    const root = await machine(t);
    await mkdir(join(root, 'pki'));

    for (const [name, source] of Object.entries({
      'ca-cert.pem': 'ca-cert.pem',
      'server-cert.pem': 'chain.pem',
      'server-key.pem': 'server-key.pem',
      ...files,
    })) {
      if (source !== undefined) {
        await writeFile(join(root, 'pki', name), await readFile(join(dir, source)), { mode });
        await chmod(join(root, 'pki', name), mode);
      }
    }
    const found = await verdicts(root, content, Date.now() + after * day);
    const { verdict, found: what } = found.get('certificates in /pki') ?? {};
    return [verdict, what?.replace(/ on .*| before .*/, ''), found.get('secrets')?.verdict];
  };
  t.deepEqual(await look({}), ['ok', 'CN=server is valid for 99 more days', undefined]);
  t.deepEqual(await look({}, 71), ['warn', 'CN=server is valid for 28 more days', undefined]);
  t.deepEqual(await look({}, 101), ['fail', 'CN=server has expired', undefined]);
  t.deepEqual(await look({}, -1), ['fail', 'CN=server is not valid', undefined]);
  t.is((await look({}, 0, 0o644))[2], 'warn', 'the key can be read by others');
  t.deepEqual(await look({ 'server-cert.pem': 'server-cert.pem' }), [
    'fail',
    'nothing in ca-cert.pem has signed CN=server',
    undefined,
  ]);
  t.deepEqual((await look({ 'server-key.pem': 'mid-key.pem' })).slice(0, 2), [
    'fail',
    'server-key.pem is not the key of server-cert.pem',
  ]);
  t.deepEqual((await look({ 'ca-cert.pem': undefined })).slice(0, 2), [
    'fail',
    'ca-cert.pem cannot be read',
  ]);
  t.regex((await look({ 'server-key.pem': 'csr' }))[1] ?? '', /^they cannot be understood: /);
  t.deepEqual((await look({ 'server-cert.pem': 'server-key.pem' })).slice(0, 2), [
    'fail',
    'it holds no certificate',
  ]);
});

test('the command, on the machine that it is on', async (t) => {
  const folders = await installation(t);
  const dir = await folder(t);
  const file = join(dir, 'c.xml');
  await writeFile(file, '<stillblock><devices><device path="/dev/none"/></devices></stillblock>');
  const table = await stillblock(folders, 'doctor', '--config', file);
  t.is(table.code, 1, 'a device is missing');
  t.regex(table.stdout, /^CHECK +VERDICT +FOUND\nkernel +/);
  t.regex(table.stdout, /\ndevice \/dev\/none: correct its path/);
  const json = await stillblock(folders, 'doctor', '--json', '--config', file);
  const { findings } = JSON.parse(json.stdout) as { findings: Finding[] };
  t.like(
    findings.find(({ check }) => check === 'device /dev/none'),
    { verdict: 'fail' },
  );
  const missing = await stillblock(folders, 'doctor', '--config', join(dir, 'no.xml'));
  t.is(missing.code, 2);
  t.regex(missing.stderr, /there is no configuration/);
  await writeFile(file, '<stillblock>\n<wrong/></stillblock>');
  const wrong = await stillblock(folders, 'doctor', '--config', file);
  t.is(wrong.code, 2);
  t.regex(wrong.stderr, /c\.xml:2:1: <wrong> is unknown in <stillblock>/);
});

test('histories that a reboot would end, and an initramfs that comes too late', async (t) => {
  const device = (name: string, kept: string): DeviceReport => ({
    name,
    device: `/dev/${name}`,
    tracker: '1',
    sizeBytes: 2 ** 30,
    blockSizeBytes: 65_536,
    generation: '',
    number: 1,
    takenUp: true,
    began: 'FIRST',
    kept,
    writes: 0,
    heldWrites: 0,
    inSnapshot: false,
    resized: false,
    gone: false,
  });
  const about = async (
    root: string,
    devices: readonly DeviceReport[],
    settings = '<devices><device path="/dev/sda"/><device path="/dev/sdb"/></devices>',
  ): Promise<readonly string[]> => {
    const tracked = () => Promise.resolve(devices);
    const findings = await examine(parse(settings), { root, choose, tracked });
    return findings
      .filter(({ check }) => /^histor|^initramfs/.test(check))
      .map(({ check, verdict }) => `${check}: ${verdict}`);
  };
  const hook = { 'usr/share/initramfs-tools/hooks/stillblock': '' };
  const plan = { 'var/lib/stillblock/boot-plan': 'place x\n' };
  const bare = await machine(t);
  t.deepEqual(await about(bare, []), []);
  t.deepEqual(await about(bare, [device('sda', 'OK')]), ['histories: ok', 'initramfs: warn']);
  t.deepEqual(await about(bare, [device('sda', 'CONTAINER')]), ['history of sda: warn']);
  const two = [device('sda', 'CONTAINER'), device('sdb', 'CONTAINER')];
  t.deepEqual(await about(bare, two), ['history of sda, sdb: warn']);
  t.deepEqual(await about(bare, two, '<history keep="no"/>'), ['histories: ok']);
  t.deepEqual(await about(bare, two, ''), ['histories: ok']);
  t.deepEqual(await about(bare, [device('sda', 'OK'), device('sdc', 'OK')]), [
    'history of sdc: warn',
    'histories: ok',
    'initramfs: warn',
  ]);
  const hooked = await machine(t, { ...hook });
  t.deepEqual(await about(hooked, [device('sda', 'OK')]), ['histories: ok', 'initramfs: warn']);
  const image = `boot/initrd.img-${RELEASE}`;
  const planned = await machine(t, { ...hook, ...plan, [image]: '' });
  const noImage = await machine(t, { ...hook, ...plan });
  t.deepEqual(await about(noImage, [device('sda', 'OK')]), ['histories: ok', 'initramfs: warn']);
  const late = new Date(Date.now() + 60_000);
  await utimes(join(planned, image), late, late);
  t.deepEqual(await about(planned, [device('sda', 'OK')]), ['histories: ok', 'initramfs: ok']);
  // Between the plan and the hook, whose time cannot be set.
  await utimes(join(planned, 'var/lib/stillblock/boot-plan'), new Date(0), new Date(0));
  await utimes(join(planned, image), new Date(1000), new Date(1000));
  t.deepEqual(await about(planned, [device('sda', 'OK')]), ['histories: ok', 'initramfs: warn']);
  await utimes(join(planned, 'var/lib/stillblock/boot-plan'), late, late);
  t.deepEqual(await about(planned, [device('sda', 'OK')]), ['histories: ok', 'initramfs: warn']);
});
