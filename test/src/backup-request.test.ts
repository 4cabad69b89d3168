// SPDX-License-Identifier: Apache-2.0
import { writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import test from 'ava';
import { toBackupRequest } from '../../src/backup-request.ts';
import { folder } from './world.ts';

const disks = (inside: string): string =>
  `<domainbackup mode='pull'><incremental>monday</incremental><disks>${inside}</disks></domainbackup>`;

test('what JSON does not say is decided later', async (t) => {
  const request = await toBackupRequest({ checkpoint: 'monday' });
  t.like(request, { checkpoint: 'monday', kept: true, description: '' });
  for (const name of ['store', 'server', 'incremental', 'freezeTimeoutMs', 'metrics'] as const) {
    t.is(request[name], undefined, name);
  }
  t.deepEqual(request.disks, []);
});

test('XML says which disks, since when, and under which names', async (t) => {
  const backupXml = disks(
    `<disk name='sda' exportname='vda' exportbitmap='changes'/>
     <disk name='sdb' backupmode='full'/>
     <disk name='sdc' incremental='sunday'/>
     <disk name='sdd' backup='no'/>`,
  );
  const request = await toBackupRequest({ backupXml, checkpoint: 'tuesday' });
  t.deepEqual(
    request.disks.map(({ path, exportName, exportBitmap, incremental }) => ({
      path,
      exportName,
      exportBitmap,
      incremental,
    })),
    [
      { path: 'sda', exportName: 'vda', exportBitmap: 'changes', incremental: 'monday' },
      { path: 'sdb', exportName: 'sdb', exportBitmap: undefined, incremental: null },
      { path: 'sdc', exportName: 'sdc', exportBitmap: 'backup-sdc', incremental: 'sunday' },
    ],
  );
  t.is(request.incremental, undefined, 'each disk says it for itself');
});

test('without disks the base is that of all', async (t) => {
  const backupXml = `<domainbackup mode='pull'><incremental>monday</incremental></domainbackup>`;
  t.like(await toBackupRequest({ backupXml }), { incremental: 'monday', disks: [] });
});

test('a backup without a checkpoint leaves none, as in libvirt', async (t) => {
  const backupXml = `<domainbackup mode='pull'/>`;
  const alone = await toBackupRequest({ backupXml });
  t.false(alone.kept);
  t.regex(alone.checkpoint, /^\d+$/);
  const checkpointXml = `<domaincheckpoint><description>first</description><disks>
    <disk name='sda'/><disk name='sdb' checkpoint='no'/></disks></domaincheckpoint>`;
  const both = await toBackupRequest({ backupXml, checkpointXml });
  t.like(both, { kept: true, description: 'first' });
  t.deepEqual(both.checkpointDisks, ['sda']);
});

test('scratch is the store; a file that is not there yet goes into its folder', async (t) => {
  const home = await folder(t);
  await writeFile(join(home, 'there'), '');
  const request = await toBackupRequest({
    backupXml: disks(
      `<disk name='sda' type='file'><scratch file='${home}/there'/></disk>
       <disk name='sdb' type='file'><scratch file='${home}/absent'/></disk>
       <disk name='sdc' type='file'><scratch file='${home}/absent-too'/></disk>
       <disk name='sdd' type='block'><scratch dev='/dev/absent'/></disk>`,
    ),
  });
  t.deepEqual(request.store?.places, [join(home, 'there'), home, '/dev/absent']);
});

test('a server of its own may have the TLS of the configuration', async (t) => {
  const of = async (server: string): Promise<unknown> =>
    (await toBackupRequest({ backupXml: `<domainbackup mode='pull'>${server}</domainbackup>` }))
      .server;
  t.is(await of(''), undefined);
  t.deepEqual(await of(`<server transport='tcp' name='192.0.2.7' port='10810' tls='yes'/>`), {
    listen: [{ host: '192.0.2.7', port: 10_810 }],
    tls: true,
  });
  t.deepEqual(await of(`<server transport='unix' socket='/run/x'/>`), {
    listen: [{ path: '/run/x' }],
    tls: undefined,
  });
});

for (const [what, body] of [
  ['no name', {}],
  ['two names', { checkpoint: 'a', checkpointXml: '<domaincheckpoint/>' }],
  ['disks twice', { backupXml: "<domainbackup mode='pull'/>", disks: [{ path: 'sda' }] }],
  ['a base twice', { backupXml: "<domainbackup mode='pull'/>", incremental: 'a' }],
  ['a relative store', { checkpoint: 'a', store: { places: ['x'] } }],
  ['a relative socket', { checkpoint: 'a', server: { listen: [{ path: 'x' }] } }],
] as const) {
  test(`refused: ${what}`, async (t) => {
    await t.throwsAsync(toBackupRequest(body), { name: 'StillblockError', code: 'USAGE' });
  });
}
