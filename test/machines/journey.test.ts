// SPDX-License-Identifier: Apache-2.0
// From packages to a machine that is whole again: installed into a fresh Debian, its disks
// pulled while it writes, restored to empty disks and booted from these; then removed from
// the first without a trace.

import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdir, mkdtemp, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { execPath } from 'node:process';
import test, { type ExecutionContext } from 'ava';
import { freePorts } from '../nbd/world.ts';
import { commandsOf, Page } from '../pages.ts';
import { CLI } from '../program.ts';
import { checkout } from '../vm/checkout.ts';
import { makeSparseFile, runTool, type ToolResult } from '../vm/host.ts';
import { guestfsEnvironment, inspect } from '../vm/inspection.ts';
import { Machine } from '../vm/machine.ts';
import { lastRecord } from '../vm/records.ts';
import {
  buildByHand,
  install,
  limitMs,
  packagesDisk,
  type Recipe,
  remove,
  sign,
} from './installation.ts';

const MiB = 1 << 20;
const rootBytes = 2048 * MiB;
/** Of the root's partition: see scripts/machine.sh. */
const rootStartBytes = 50 * MiB;
const dataBytes = 256 * MiB;
const records = ['/var/records', '/srv/records'];

interface Conversion {
  readonly firmware: 'bios' | 'uefi';
  /** How to get to the machine, for `stillblock p2v`. */
  readonly from: readonly string[];
  readonly whole: boolean;
}

interface Manifest {
  readonly points: readonly {
    readonly entries: readonly { readonly kind: string }[];
    readonly layout: {
      readonly firmware: { readonly kind: string; readonly bootEntries: readonly unknown[] };
    };
  }[];
}

/** An authority, a server's certificate and a client's, all in one folder. */
async function makeCertificates(folder: string): Promise<void> {
  const key = ['-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:P-256', '-nodes', '-days', '2'];
  const make = (name: string, more: readonly string[]): Promise<ToolResult> =>
    runTool('openssl', [
      ...['req', '-x509', ...key, '-subj', `/CN=${name}`, ...more],
      ...['-keyout', join(folder, `${name}-key.pem`), '-out', join(folder, `${name}-cert.pem`)],
    ]);
  await mkdir(folder);
  await make('ca', []);
  const signed = ['-CA', join(folder, 'ca-cert.pem'), '-CAkey', join(folder, 'ca-key.pem')];
  // QEMU takes none for a server's or a client's that is an authority's, too.
  signed.push('-addext', 'basicConstraints=critical,CA:FALSE');
  await make('server', [...signed, '-addext', 'subjectAltName=IP:127.0.0.1']);
  await make('client', signed);
}

const stillblock = (...words: readonly string[]): Promise<ToolResult> =>
  runTool(execPath, [CLI, ...words], { timeoutMs: limitMs });

async function configure(machine: Machine, certificates: string, ports: number[]): Promise<void> {
  const [nbd, api] = ports;
  await machine.run('mkdir -p -m 700 /etc/stillblock/pki');
  for (const name of ['ca-cert', 'server-cert', 'server-key']) {
    await machine.copyIn(join(certificates, `${name}.pem`), `/etc/stillblock/pki/${name}.pem`);
  }
  await machine.run(`cat >/etc/stillblock/stillblock.xml <<'XML'
<stillblock>
  <devices>
    <device path="/dev/disk/by-id/virtio-root" name="root"/>
    <device path="/dev/disk/by-id/virtio-data" name="data"/>
  </devices>
  <nbd>
    <listen address="0.0.0.0" port="${nbd}"/>
    <tls certificates="/etc/stillblock/pki" verify-peer="yes"/>
  </nbd>
  <api><listen address="0.0.0.0" port="${api}" certificates="/etc/stillblock/pki"/></api>
</stillblock>
XML
systemctl restart stillblock`);
}

/** Starts the writer of numbered records, which goes on until the machine ends. */
async function startWriter(machine: Machine): Promise<void> {
  await machine.run(`mkfs.ext4 -q -L data /dev/disk/by-id/virtio-data
    echo 'LABEL=data /srv ext4 defaults 0 2' >>/etc/fstab; mount /srv; mkdir /root/app
    echo '{"type":"module"}' >/root/app/package.json`);
  for (const name of ['appender.js', 'records.js']) {
    await machine.copyIn(join(checkout, 'dist/test/vm', name), `/root/app/${name}`);
  }
  machine.start(
    `node=/usr/lib/stillblock-node/node; [ -x $node ] || node=node
    exec $node /root/app/appender.js ${records.join(' ')}`,
  );
}

async function written(machine: Machine): Promise<number> {
  return Number((await machine.run(`wc -l <${records[0]}`)).stdout);
}

/** That all disks hold what was written until some moment between two others. */
function assertInstant(
  t: ExecutionContext,
  lasts: readonly number[],
  { before, after }: { readonly before: number; readonly after: number },
): void {
  const [one = 0, two = 0] = lasts;
  t.true(one >= before && one <= after, `${before} <= ${one} <= ${after}`);
  t.true(one === two || one === two + 1, `${one} and ${two} are of one instant`);
  t.log(`records ${before} <= ${one}, ${two} <= ${after}`);
}

/**
 * The commands of docs/p2v.md, with what differs here in its place.
 * @param folder where they read and write.
 * @param from how to get to the machine.
 */
async function conversionCommands(
  folder: string,
  from: readonly string[],
): Promise<readonly string[]> {
  const page = await Page.open('docs/p2v.md', import.meta.url);
  return commandsOf(page.take('virt-v2v')).map((line) =>
    line
      .replace(/^stillblock/, `exec ${execPath} ${CLI}`)
      .replace(/ web1$/, ` ${from.join(' ')}`)
      .replace('web1.xml', join(folder, 'web1.xml'))
      .replace('/var/tmp', folder),
  );
}

/**
 * Looks at the machine that virt-v2v has written, which has its host name.
 * @returns for each disk its last record.
 */
async function checkConverted(t: ExecutionContext, folder: string): Promise<number[]> {
  const root = join(folder, 'machine-sda');
  const data = join(folder, 'machine-sdb');
  const xml = join(folder, 'machine.xml');
  await runTool('xmllint', ['--noout', xml]);
  const domain = await readFile(xml, 'utf8');
  t.regex(domain, /<name>machine<\/name>/);
  t.notRegex(domain, /firmware=|<loader/);
  const disks = [...domain.matchAll(/<source file=['"]([^'"]+)['"]/g)].map(([, file]) => file);
  t.deepEqual(disks, [root, data]);
  t.deepEqual(domain.match(/<target dev=['"]vd[ab]['"] bus=['"]virtio['"]/g)?.length, 2);
  const lasts: number[] = [];
  const systems = [
    { file: root, sizeBytes: rootBytes, start: rootStartBytes, name: records[0] },
    { file: data, sizeBytes: dataBytes, start: 0, name: '/records' },
  ];
  for (const { file, sizeBytes, start, name } of systems) {
    const info = await runTool('qemu-img', ['info', '--output=json', file]);
    const { format, 'virtual-size': size } = JSON.parse(info.stdout) as Record<string, unknown>;
    t.deepEqual([format, size], ['raw', sizeBytes]);
    const system = `${file}?offset=${start}`;
    await runTool('e2fsck', ['-fn', system]);
    lasts.push(lastRecord((await runTool('debugfs', ['-R', `cat ${name}`, system])).stdout));
  }
  return lasts;
}

/**
 * Offers the running machine by p2v. virt-v2v reads the source, and converts all of it; or, which
 * is sooner done, libguestfs looks into the root disk.
 * @returns for each disk that was written its last record.
 */
async function convert(
  t: ExecutionContext,
  machine: Machine,
  folder: string,
  { firmware, from, whole }: Conversion,
): Promise<number[]> {
  const output = join(folder, 'converted');
  await mkdir(output);
  const [offer = '', conversion = ''] = await conversionCommands(output, from);
  const program = spawn('bash', ['-c', offer], { stdio: ['ignore', 'pipe', 'inherit'] });
  const ended = once(program, 'close') as Promise<[code: number | null]>;
  let said = '';
  const offered = new Promise<void>((resolve) => {
    program.stdout.setEncoding('utf8').on('data', (text: string) => {
      said += text;
      if (said.includes('Ctrl-C ends it.\n')) resolve();
    });
  });
  try {
    await Promise.race([offered, ended]);
    t.regex(
      (await machine.run('ls -d /dev/disk/by-snapshot/*/*')).stdout,
      /^(\/dev\/disk\/by-snapshot\/p2v-[^/]+)\/data\n\1\/root\n$/,
    );
    const xml = join(output, 'web1.xml');
    const source = await runTool('virt-v2v', ['-i', 'libvirtxml', xml, '--print-source']);
    t.regex(source.stdout, /source name: machine$/m);
    t.is(/firmware: uefi$/m.test(source.stdout), firmware === 'uefi');
    if (whole) {
      const words = [...guestfsEnvironment(output), 'bash', '-c', conversion];
      await runTool('env', words, { timeoutMs: limitMs });
      return await checkConverted(t, output);
    }
    const [, port] = /host name="localhost" port="(\d+)"/.exec(said) ?? [];
    const found = await inspect(Number(port), '/dev/sda3');
    t.regex(found, /^\/dev\/sda3\nlinux\ndebian\n.*\nmachine\ndeb\n/);
    t.regex(found, /^\/boot\/efi: \/dev\/sda2$/m);
    t.regex(found, /app2_name: stillblock-dkms$/m);
    return [];
  } finally {
    program.kill('SIGTERM');
    t.deepEqual(await ended, [0, null]);
  }
}

async function journey(t: ExecutionContext, recipe: Recipe): Promise<void> {
  t.timeout(2 * limitMs);
  const { firmware, name } = recipe;
  const folder = await mkdtemp(join(tmpdir(), 'stillblock-journey-'));
  let begun = performance.now();
  /** Says how long what has been done since the last call took. */
  const done = (what: string): void => {
    const now = performance.now();
    t.log(`${what}: ${Math.round((now - begun) / 1000)} s`);
    begun = now;
  };
  let machine: Machine | undefined;
  let restored: Machine | undefined;
  try {
    const packages = await packagesDisk(folder, recipe);
    done('module built by DKMS in the tree of the machine');
    const ports = await freePorts(2);
    const disks = [
      { name: 'data', sizeBytes: dataBytes },
      { name: 'packages', sizeBytes: 64 * MiB, file: packages },
    ];
    machine = await Machine.make({ name, firmware, disks, ports });
    await machine.powerOn();
    done('boot');
    if (name === 'bookworm') {
      await buildByHand(t, machine);
      done('module built by DKMS in the machine, loaded, removed');
    }
    await install(machine, recipe);
    done('packages installed');
    const state = await machine.run(
      'dkms status; systemctl is-active stillblock.service stillblock.socket; stillblock status; stillblock doctor',
      { check: false },
    );
    t.regex(state.stdout, /^stillblock\/.*: installed$/m);
    t.regex(state.stdout, /^active\nactive\n/m);
    t.regex(state.stdout, /^module +ok /m);
    t.notRegex(state.stdout, / fail /);
    await sign(machine);

    const certificates = join(folder, 'pki');
    await makeCertificates(certificates);
    await startWriter(machine);
    await configure(machine, certificates, ports);
    done('service with TLS, writer');

    const chain = join(folder, 'chain');
    const pull = [
      'pull',
      '--json',
      '--nbd-host',
      '127.0.0.1',
      '--tls-certificates',
      certificates,
      `127.0.0.1:${ports[1]}`,
    ];
    await stillblock(...pull, '--checkpoint', 'monday', chain);
    done('full pull');
    const before = await written(machine);
    await stillblock(...pull, '--checkpoint', 'tuesday', chain);
    const after = await written(machine);
    done('incremental pull');
    const manifest = JSON.parse(await readFile(join(chain, 'manifest.json'), 'utf8')) as Manifest;
    t.deepEqual(
      manifest.points[1]?.entries.map(({ kind }) => kind),
      ['incremental', 'incremental'],
    );
    const seen = manifest.points[1]?.layout.firmware;
    t.is(seen?.kind, firmware);
    t.is((seen?.bootEntries.length ?? 0) > 0, firmware === 'uefi');

    const targets = { root: join(folder, 'root'), data: join(folder, 'data') };
    makeSparseFile(targets.root, rootBytes);
    makeSparseFile(targets.data, dataBytes);
    const maps = Object.entries(targets).flatMap(([disk, file]) => ['--map', `${disk}=${file}`]);
    await stillblock('restore', '--json', '--yes', ...maps, chain);
    done('restore');

    restored = await Machine.make({
      ...{ disk: targets.root, firmware },
      disks: [{ name: 'data', sizeBytes: dataBytes, file: targets.data }],
    });
    await restored.powerOn();
    await restored.waitForConsole(/^machine login: /m, limitMs);
    done('boot of the restored disks');
    const lasts: number[] = [];
    for (const file of records) {
      lasts.push(lastRecord((await restored.run(`cat ${file}`)).stdout));
    }
    assertInstant(t, lasts, { before, after });
    await restored.powerOff();
    restored.assertCleanConsole();
    done('records read, power off');

    const whole = name === 'bookworm';
    const offeredAfter = await written(machine);
    const converted = await convert(t, machine, folder, { firmware, from: pull.slice(2), whole });
    done(`offered by p2v: ${whole ? 'converted by virt-v2v' : 'inspected by libguestfs'}`);
    if (whole) {
      assertInstant(t, converted, { before: offeredAfter, after: await written(machine) });
    }

    await remove(t, machine, recipe);
    done('packages removed');
    await machine.powerOff();
    machine.assertCleanConsole();
  } finally {
    await restored?.remove();
    await machine?.remove();
    await rm(folder, { recursive: true, force: true });
  }
}

test.serial('Debian 12, BIOS: installed, pulled, restored, booted, removed', (t) =>
  journey(t, {
    name: 'bookworm',
    firmware: 'bios',
    packages: ['stillblock', 'stillblock-dkms', 'stillblock-node'],
  }),
);

test.serial('Debian 13, UEFI: installed, pulled, restored, booted, removed', (t) =>
  journey(t, { name: 'trixie', firmware: 'uefi', packages: ['stillblock', 'stillblock-dkms'] }),
);
