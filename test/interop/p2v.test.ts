// SPDX-License-Identifier: Apache-2.0
/** `stillblock p2v`: what it prints is what virt-v2v, libguestfs and libvirt find on its ports. */
import { mkdir, readFile, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import test, { type ExecutionContext } from 'ava';
import { folder } from '../nbd/world.ts';
import { commandsOf, Page } from '../pages.ts';
import { makeSparseFile, runTool } from '../vm/host.ts';
import { guestfish, inspect, inspectionLimitMs } from '../vm/inspection.ts';
import { LibvirtGuest } from '../vm/libvirt.ts';
import { run, tryRun } from './clients.ts';
import {
  errorOf,
  Machine,
  MIB,
  pullTest,
  type Running,
  soon,
  start,
  stillblock,
} from './pulling.ts';

interface Serving {
  readonly event: string;
  readonly file: string;
  readonly disks: readonly { readonly disk: string; readonly port: number }[];
}

const page = await Page.open('docs/p2v.md', import.meta.url);

test.after('each block of the page has been run', (t) => t.deepEqual(page.left, []));

/** A guest with nothing but a boot sector, milliseconds. */
const PATIENCE_MS = 180_000;

/** Settles once p2v has opened its ports. */
function serving(running: Running): Promise<Serving> {
  const served = new Promise<Serving>((resolve) => {
    running.process.stdout?.on('data', (piece: string) => {
      if (piece.includes('"serving"')) {
        resolve(JSON.parse(piece) as Serving);
      }
    });
  });
  return soon('its ports', served);
}

/** Offers a disk as p2v does. Returns the port of localhost. */
async function offer(t: ExecutionContext, data: Buffer): Promise<number> {
  const machine = await Machine.make(t, { sda: data.length });
  machine.disk('sda').data = data;
  await machine.serve(t, 'now');
  const xml = join(await folder(t), 'web1.xml');
  const running = start(t, 'p2v', '--name', 'web1', '--xml', xml, '--nbd', machine.uri('sda'));
  const { disks } = await serving(running);
  return disks[0]?.port ?? 0;
}

pullTest('each disk is the default export of a port of localhost, until it is ended', async (t) => {
  const machine = await Machine.make(t, { sda: 4 * MIB, sdb: 2 * MIB });
  await machine.serve(t, 'now');
  const home = await folder(t);
  const xml = join(home, 'web1.xml');
  const layout = join(home, 'layout.json');
  const card = { name: 'eth0', mac: '52:54:00:00:00:01' };
  const known = { hostname: 'web1', memoryBytes: 4096 * MIB, processors: 2, architecture: 'x64' };
  const firmware = { kind: 'uefi', bootOrder: [], bootEntries: [] };
  await writeFile(layout, JSON.stringify({ ...known, firmware, networkCards: [card] }));
  const uris = ['sda', 'sdb'].flatMap((disk) => ['--nbd', machine.uri(disk)]);
  const running = start(t, 'p2v', '--xml', xml, '--layout', layout, ...uris);
  const { disks, file } = await serving(running);
  t.is(file, xml);
  const domain = await readFile(xml, 'utf8');
  await run('xmllint', ['--noout', xml]);
  t.regex(domain, /<name>web1<\/name>/);
  t.regex(domain, /<os firmware="efi">/);
  t.regex(domain, /<mac address="52:54:00:00:00:01"\/>/);
  const source = await run('virt-v2v', ['-i', 'libvirtxml', xml, '--print-source']);
  t.regex(source, /source name: web1\n *hypervisor type: physical\n/);
  t.regex(source, /nr vCPUs: 2\n/);
  t.regex(source, /firmware: uefi\n/);
  t.regex(source, /^disks:\n\t0\n\t1\n/m);
  t.regex(source, /mac: 52:54:00:00:00:01/);
  const ports = [...domain.matchAll(/host name="localhost" port="(\d+)"/g)].map(([, port]) => port);
  t.deepEqual(
    ports,
    disks.map(({ port }) => String(port)),
  );
  for (const { disk, port } of disks) {
    const raw = join(home, disk);
    await run('qemu-img', ['convert', '-f', 'raw', '-O', 'raw', `nbd://localhost:${port}`, raw]);
    t.true((await readFile(raw)).equals(machine.disk(disk).data), disk);
    // Holes stay holes, which virt-v2v copies in no time.
    const map = await run('nbdinfo', ['--map', `nbd://localhost:${port}`]);
    t.regex(map, /hole,zero/);
  }
  running.process.kill('SIGTERM');
  const ended = await soon('its end', running.ended);
  t.is(ended.code, 0, ended.stderr);
  for (const { port } of disks) {
    t.not(
      (await tryRun('nbdinfo', [`nbd://localhost:${port}`])).code,
      0,
      'nobody is there any more',
    );
  }
});

pullTest('p2v of what is not served, and of a machine without a name', async (t) => {
  const machine = await Machine.make(t, { sda: MIB });
  await machine.serve(t, 'now');
  const xml = ['--xml', join(await folder(t), 'x.xml')];
  const absent = await stillblock(t, 'p2v', '--name', 'x', ...xml, '--nbd', machine.uri('sdz'));
  t.is(absent.code, 1);
  t.is(errorOf(absent), 'NO_EXPORT');
  const unnamed = await stillblock(t, 'p2v', ...xml, '--nbd', machine.uri('sda'));
  t.is(unnamed.code, 2);
  t.regex(unnamed.stderr, /--name/);
  const nothing = await stillblock(t, 'p2v', '--name', 'x');
  t.is(nothing.code, 2);
});

/** A disk with a Debian that has no more than what tells that it is one. */
async function smallDebian(t: ExecutionContext): Promise<Buffer> {
  const home = await folder(t);
  const content: Readonly<Record<string, string>> = {
    'etc/os-release': 'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\nVERSION_ID="12"\nID=debian\n',
    'etc/debian_version': '12.15\n',
    'etc/hostname': 'web1\n',
    'etc/fstab': 'LABEL=root / ext4 defaults 0 1\nLABEL=data /srv xfs defaults 0 2\n',
    'var/lib/dpkg/status':
      'Package: nginx\nStatus: install ok installed\nArchitecture: amd64\nVersion: 1.22.1-9\nDescription: server\n\n',
  };
  const root = join(home, 'root');
  for (const name of ['bin', 'boot', 'home', 'srv', 'usr']) {
    await mkdir(join(root, name), { recursive: true });
  }
  await run('cp', ['/bin/true', join(root, 'bin')]);
  for (const [name, text] of Object.entries(content)) {
    await mkdir(join(root, name, '..'), { recursive: true });
    await writeFile(join(root, name), text);
  }
  const disk = join(home, 'disk');
  makeSparseFile(disk, 64 * MIB);
  const table =
    'label: gpt\nstart=1MiB, size=40MiB, type=linux\nstart=41MiB, size=20MiB, type=linux';
  await runTool('bash', ['-c', 'echo "$1" | sfdisk -q "$2"', '-', table, disk]);
  const offset = ['-E', `offset=${MIB}`];
  await runTool('mke2fs', ['-q', '-t', 'ext4', '-L', 'root', '-d', root, ...offset, disk, '40M']);
  await runTool('mke2fs', ['-q', '-L', 'data', '-E', `offset=${41 * MIB}`, disk, '20M']);
  return readFile(disk);
}

pullTest('libguestfs finds the system that is on a port', async (t) => {
  t.timeout(inspectionLimitMs);
  t.deepEqual(commandsOf(page.take('guestfish')), [guestfish(10_809).join(' ')]);
  const stdout = await inspect(await offer(t, await smallDebian(t)), '/dev/sda1');
  t.regex(stdout, /^\/dev\/sda1\nlinux\ndebian\n12\.15\nweb1\ndeb\n/);
  t.regex(stdout, /^\/: \/dev\/sda1$/m);
  t.regex(stdout, /^\/srv: \/dev\/sda2$/m);
  t.regex(stdout, /app2_name: nginx\n/);
});

/** A disk whose boot sector writes to the serial line what stands in the disk's sector 2,048. */
function bootable(said: string): Buffer {
  const disk = Buffer.alloc(4 * MIB);
  const machineCode = [
    '31c0 8ed8 8ec0', // ax, ds, es: 0
    'b442 be407c cd13', // the BIOS reads as the packet at 0x7c40 says
    'be007e', // si: what was read
    'ac 84c0 7406 baf803 ee ebf5', // each byte of it to 0x3f8, until a zero
    'f4 ebfd', // halt
  ];
  disk.write(machineCode.join('').replaceAll(' ', ''), 0, 'hex');
  const packet = Buffer.from('10000100007e0000', 'hex');
  packet.copy(disk, 0x40);
  disk.writeBigUInt64LE(2048n, 0x48);
  disk.writeUInt16LE(0xaa55, 510);
  disk.write(`${said}\0`, 2048 * 512);
  return disk;
}

pullTest('libvirt starts a guest from a port', async (t) => {
  const said = 'read from the export';
  const port = await offer(t, bootable(`${said}\r\n`));
  const { text: disk } = page.take('<disk type="network"');
  t.true(disk.includes('"10809"'));
  const guest = await LibvirtGuest.start(disk.replace('10809', String(port)), 64);
  t.teardown(() => guest.end());
  await t.notThrowsAsync(guest.waitForSerial(new RegExp(`^${said}\r$`, 'm'), PATIENCE_MS));
});
