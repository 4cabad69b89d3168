// SPDX-License-Identifier: Apache-2.0
/** `stillblock p2v`: what it prints is what virt-v2v finds on its ports. */
import { readFile, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { folder } from '../nbd/world.ts';
import { run, tryRun } from './clients.ts';
import { errorOf, Machine, MIB, pullTest, soon, start, stillblock } from './pulling.ts';

interface Serving {
  readonly event: string;
  readonly file: string;
  readonly disks: readonly { readonly disk: string; readonly port: number }[];
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
  const served = new Promise<Serving>((resolve) => {
    running.process.stdout?.on('data', (piece: string) => {
      if (piece.includes('"serving"')) {
        resolve(JSON.parse(piece) as Serving);
      }
    });
  });
  const { disks, file } = await soon('its ports', served);
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
