// SPDX-License-Identifier: Apache-2.0
/**
 * Requests in libvirt's words. The shapes are those of libvirt's own tests
 * (domainbackupxml2xml, qemudomaincheckpointxml2xml) and of what virtnbdbackup
 * sends, with names of ours.
 */
import test from 'ava';
import fc from 'fast-check';
import {
  type BackupDisk,
  type BackupXml,
  formatBackupXml,
  formatCheckpointXml,
  parseBackupXml,
  parseCheckpointXml,
} from '../../src/backup-xml.ts';
import { XmlError } from '../../src/xml.ts';

const DISK: BackupDisk = {
  name: 'sda',
  backup: true,
  mode: 'full',
  incremental: undefined,
  exportName: 'sda',
  exportBitmap: undefined,
  scratch: undefined,
};
const BACKUP: BackupXml = {
  incremental: undefined,
  server: undefined,
  disks: undefined,
  warnings: [],
};

/** What is accepted, and as what. */
const GOOD: Readonly<Record<string, readonly [xml: string, expected: BackupXml]>> = {
  'the least': ["<domainbackup mode='pull'/>", BACKUP],
  'a pull by TCP (backup-pull)': [
    `<domainbackup mode='pull'>
       <incremental>1525889631</incremental>
       <server transport='tcp' name='localhost' port='10810'/>
       <disks>
         <disk name='sda' type='file'><scratch file='/mnt/spare/a'/></disk>
         <disk name='sr0' backup='no'/>
       </disks>
     </domainbackup>`,
    {
      ...BACKUP,
      incremental: '1525889631',
      server: { transport: 'tcp', host: 'localhost', port: 10_810, tls: undefined },
      disks: [
        {
          ...DISK,
          mode: 'incremental',
          incremental: '1525889631',
          exportBitmap: 'backup-sda',
          scratch: { kind: 'file', path: '/mnt/spare/a' },
        },
        { ...DISK, name: 'sr0', exportName: 'sr0', backup: false },
      ],
    },
  ],
  'a pull by a unix socket, and every mode of a disk (backup-pull-unix)': [
    `<domainbackup mode='pull'>
       <incremental>monday</incremental>
       <server transport='unix' socket='/run/b.sock'/>
       <disks>
         <disk name='sda' backupmode='full'/>
         <disk name='sdb' type='file' backupmode='incremental'/>
         <disk name='sdc' backupmode='incremental' incremental='sunday'/>
         <disk name='sdd' incremental='01'/>
       </disks>
     </domainbackup>`,
    {
      ...BACKUP,
      incremental: 'monday',
      server: { transport: 'unix', socket: '/run/b.sock', tls: undefined },
      disks: [
        DISK,
        ...(
          [
            ['sdb', 'monday'],
            ['sdc', 'sunday'],
            ['sdd', '01'],
          ] as const
        ).map(
          ([name, incremental]): BackupDisk => ({
            ...DISK,
            name,
            mode: 'incremental',
            incremental,
            exportName: name,
            exportBitmap: `backup-${name}`,
          }),
        ),
      ],
    },
  ],
  'labels and formats are ignored (backup-pull-seclabel)': [
    `<domainbackup mode="pull">
       <disks>
         <disk name='sda' type='block' incremental='a' exportname='A &amp; B' exportbitmap='blah'>
           <driver type='qcow2'/>
           <scratch dev='/dev/vg/scratch'><seclabel model='dac' relabel='no'/></scratch>
         </disk>
       </disks>
       <server tls='yes' name='::1'/>
     </domainbackup>`,
    {
      ...BACKUP,
      server: { transport: 'tcp', host: '::1', port: 10_809, tls: true },
      disks: [
        {
          ...DISK,
          mode: 'incremental',
          incremental: 'a',
          exportName: 'A & B',
          exportBitmap: 'blah',
          scratch: { kind: 'block', path: '/dev/vg/scratch' },
        },
      ],
      warnings: [
        '<driver> of disk sda is ignored: a store has no format',
        '<seclabel> is ignored: a store has no label',
      ],
    },
  ],
  'what virtnbdbackup sends to a local libvirt': [
    `<domainbackup mode="pull">
  <server transport="unix" socket="/var/tmp/virtnbdbackup.1234"/>
  <disks>
    <disk name="sda">
      <scratch file="/var/tmp/backup.ABC12.sda"/>
    </disk>
  </disks>
  <incremental>virtnbdbackup.0</incremental>
</domainbackup>`,
    {
      ...BACKUP,
      incremental: 'virtnbdbackup.0',
      server: { transport: 'unix', socket: '/var/tmp/virtnbdbackup.1234', tls: undefined },
      disks: [
        {
          ...DISK,
          mode: 'incremental',
          incremental: 'virtnbdbackup.0',
          exportBitmap: 'backup-sda',
          scratch: { kind: 'file', path: '/var/tmp/backup.ABC12.sda' },
        },
      ],
    },
  ],
  'what virtnbdbackup sends to a remote libvirt': [
    '<domainbackup mode="pull"><server tls="no" name="host1" port="10809"/><disks><disk name="sda"/></disks></domainbackup>',
    {
      ...BACKUP,
      server: { transport: 'tcp', host: 'host1', port: 10_809, tls: false },
      disks: [DISK],
    },
  ],
  'a bitmap of a full backup is ignored': [
    "<domainbackup mode='pull'><disks><disk name='sda' exportbitmap='b'/></disks></domainbackup>",
    {
      ...BACKUP,
      disks: [DISK],
      warnings: ['exportbitmap of disk sda is ignored: a full backup has none'],
    },
  ],
  'of a disk that is left out nothing counts': [
    "<domainbackup mode='pull'><disks><disk name='sda'/><disk name='sdb' backup='no' exportname='sda' incremental='x'/></disks></domainbackup>",
    {
      ...BACKUP,
      disks: [DISK, { ...DISK, name: 'sdb', exportName: 'sdb', backup: false }],
    },
  ],
};

for (const [what, [xml, expected]] of Object.entries(GOOD)) {
  test(`accepted: ${what}`, (t) => {
    t.deepEqual(parseBackupXml(xml), expected);
    // The echo means the same, and has nothing more to warn of.
    const echo = formatBackupXml(expected);
    t.deepEqual(parseBackupXml(echo), { ...expected, warnings: [] }, echo);
  });
}

const pull = (content: string): string => `<domainbackup mode='pull'>\n${content}\n</domainbackup>`;
const disks = (content: string): string => pull(`<disks>${content}</disks>`);

/** What is refused, why, and where. */
const BAD: Readonly<
  Record<string, readonly [xml: string, line: number, column: number, why: RegExp]>
> = {
  'no mode (empty)': ['<domainbackup/>', 1, 1, /mode is missing, which to libvirt means push/],
  'a push (backup-push)': [
    "<domainbackup mode='push'><disks><disk name='sda'><target file='/a'/></disk></disks></domainbackup>",
    1,
    15,
    /only mode="pull"/,
  ],
  'a mode that is none': ["<domainbackup mode='PULL'/>", 1, 15, /only mode="pull"/],
  'another document': ['<domain/>', 1, 1, /<domain> is not <domainbackup>/],
  'a target in a pull': [disks("<disk name='sda'><target file='/a'/></disk>"), 2, 25, /<scratch>/],
  'encryption (backup-pull-encrypted)': [
    disks("<disk name='sda'><scratch file='/a'><encryption format='luks'/></scratch></disk>"),
    2,
    44,
    /encryption of the store is not supported/,
  ],
  'a passed descriptor (backup-pull-fd)': [
    pull("<server transport='fd' fdgroup='nbdfd'/>"),
    2,
    9,
    /transport "fd" is not supported/,
  ],
  RDMA: [pull("<server transport='rdma' name='a'/>"), 2, 9, /transport "rdma" is not supported/],
  'private data (backup-pull-internal-invalid)': [
    pull('<disks><disk name="sda"/></disks><privateData/>'),
    2,
    34,
    /<privateData> is unknown/,
  ],
  "a job's state (backup-pull-internal-invalid)": [
    disks("<disk name='sda' state='running'/>"),
    2,
    25,
    /unknown attribute state/,
  ],
  'an unknown element': [pull('<freeze/>'), 2, 1, /<freeze> is unknown/],
  'an element twice': [pull('<server/><server/>'), 2, 10, /twice/],
  text: [pull('sda'), 1, 1, /contains text/],
  'a base that cannot be': [
    pull('<incremental>../a</incremental>'),
    2,
    1,
    /not a checkpoint's name/,
  ],
  'an empty base': [pull('<incremental/>'), 2, 1, /not a checkpoint's name/],
  'a socket without a path': [
    pull("<server transport='unix'/>"),
    2,
    1,
    /needs the attribute socket/,
  ],
  'a socket with a relative path': [
    pull("<server transport='unix' socket='b.sock'/>"),
    2,
    26,
    /not an absolute path/,
  ],
  'a socket and a port': [
    pull("<server transport='unix' socket='/b' port='1'/>"),
    2,
    38,
    /port is not for transport unix/,
  ],
  'a socket by TCP': [pull("<server socket='/b'/>"), 2, 9, /socket is not for transport tcp/],
  'a port that is none': [pull("<server name='a' port='65536'/>"), 2, 18, /not a port/],
  'a port with a sign': [pull("<server name='a' port='+1'/>"), 2, 18, /not a port/],
  'TLS perhaps': [pull("<server name='a' tls='true'/>"), 2, 18, /one of "yes", "no"/],
  'no disks': [pull('<disks/>'), 2, 1, /leaves no disk/],
  'no disk that is backed up': [disks("<disk name='sda' backup='no'/>"), 2, 1, /leaves no disk/],
  'a disk without a name': [disks('<disk/>'), 2, 8, /needs the attribute name/],
  'a disk by its path': [disks("<disk name='/dev/sda'/>"), 2, 14, /not a disk's name/],
  'a disk twice': [disks("<disk name='sda'/><disk name='sda'/>"), 2, 26, /sda is there twice/],
  'an export twice (backup-pull-encrypted)': [
    disks("<disk name='sda'/><disk name='sdb' exportname='sda'/>"),
    2,
    26,
    /two disks have the export name "sda"/,
  ],
  'an empty export name': [disks("<disk name='sda' exportname=''/>"), 2, 25, /not a text/],
  'a control character in a name': [
    disks("<disk name='sda' exportbitmap='a&#9;b'/>"),
    2,
    25,
    /not a text/,
  ],
  'a long export name': [
    disks(`<disk name='sda' exportname='${'x'.repeat(256)}'/>`),
    2,
    25,
    /text/,
  ],
  'an incremental disk without a base': [
    disks("<disk name='sda' backupmode='incremental'/>"),
    2,
    25,
    /needs incremental/,
  ],
  'a full disk with a base': [
    disks("<disk name='sda' backupmode='full' incremental='a'/>"),
    2,
    43,
    /a full backup has no incremental/,
  ],
  'a disk type that is none': [disks("<disk name='sda' type='network'/>"), 2, 25, /one of "file"/],
  'a scratch device of a file': [
    disks("<disk name='sda' type='file'><scratch dev='/dev/b'/></disk>"),
    2,
    46,
    /dev is not for a disk of type file/,
  ],
  'a scratch file of a device': [
    disks("<disk name='sda' type='block'><scratch file='/b'/></disk>"),
    2,
    47,
    /file is not for a disk of type block/,
  ],
  'a scratch of nothing': [
    disks("<disk name='sda'><scratch/></disk>"),
    2,
    25,
    /needs the attribute file/,
  ],
  'a relative scratch': [
    disks("<disk name='sda'><scratch file='b'/></disk>"),
    2,
    34,
    /not an absolute path/,
  ],
  'a document type': [
    "<!DOCTYPE domainbackup [<!ENTITY a 'b'>]><domainbackup mode='pull'/>",
    1,
    1,
    /document types/,
  ],
};

for (const [what, [xml, line, column, why]] of Object.entries(BAD)) {
  test(`refused: ${what}`, (t) => {
    const error = t.throws(() => parseBackupXml(xml, 'b.xml'), {
      instanceOf: XmlError,
      code: 'BAD_BACKUP_XML',
      message: why,
    });
    t.deepEqual(error?.position, { line, column }, error?.message);
  });
}

const name = fc.stringMatching(/^[a-zA-Z0-9_-][a-zA-Z0-9_.-]{0,12}$/);
const text = fc
  .string({ unit: 'grapheme', minLength: 1, maxLength: 20 })
  .map((each) => each.replaceAll(/[\p{Cc}\ud800-\udfff\ufffe\uffff]/gu, '_'));
const tls = fc.option(fc.boolean(), { nil: undefined });
const server = fc.oneof(
  fc.record({
    transport: fc.constant('tcp' as const),
    host: fc.option(text, { nil: undefined }),
    port: fc.nat({ max: 65_535 }),
    tls,
  }),
  fc.record({ transport: fc.constant('unix' as const), socket: text.map((t) => `/${t}`), tls }),
);
const disk = fc
  .tuple(name, fc.boolean(), fc.option(name, { nil: undefined }), text, text, text)
  .map(([disk, block, incremental, exportName, bitmap, path]): BackupDisk => {
    const kind = block ? 'block' : 'file';
    return {
      name: disk,
      backup: true,
      mode: incremental === undefined ? 'full' : 'incremental',
      incremental,
      exportName: `${disk} ${exportName}`,
      exportBitmap: incremental === undefined ? undefined : bitmap,
      scratch: path.length % 2 === 0 ? { kind, path: `/${path}` } : undefined,
    };
  });
const backup = fc.record({
  incremental: fc.constant(undefined),
  server: fc.option(server, { nil: undefined }),
  disks: fc.option(fc.uniqueArray(disk, { minLength: 1, maxLength: 4, selector: (d) => d.name }), {
    nil: undefined,
  }),
  warnings: fc.constant([]),
});

test('what is written is read back', (t) => {
  fc.assert(
    fc.property(backup, (written) => {
      t.deepEqual(parseBackupXml(formatBackupXml(written)), written);
    }),
  );
});

test('whatever is typed into a request, its echo means the same, or it is refused', (t) => {
  const requests = Object.values(GOOD).map(([xml]) => xml);
  fc.assert(
    fc.property(
      fc.constantFrom(...requests),
      fc.nat(),
      fc.constantFrom(...'<>/"\'=& -0a\n', '<disk/>', "backup='no'", '&#9;', ''),
      fc.nat({ max: 3 }),
      (xml, at, text, removed) => {
        const place = at % xml.length;
        const edited = xml.slice(0, place) + text + xml.slice(place + removed);
        let found: BackupXml;
        try {
          found = parseBackupXml(edited);
        } catch (error) {
          t.true(error instanceof XmlError, String(error));
          return;
        }
        t.deepEqual(parseBackupXml(formatBackupXml(found)), { ...found, warnings: [] }, edited);
      },
    ),
    { numRuns: 2000 },
  );
});

test('the echo fills in what was not said', (t) => {
  t.is(
    formatBackupXml(
      parseBackupXml(
        "<domainbackup mode='pull'><incremental>m</incremental><disks><disk name='sda'/><disk name='sdb' backupmode='full'/></disks></domainbackup>",
      ),
    ),
    `<domainbackup mode="pull">
  <incremental>m</incremental>
  <disks>
    <disk name="sda" backup="yes" type="file" backupmode="incremental" incremental="m" exportname="sda" exportbitmap="backup-sda"/>
    <disk name="sdb" backup="yes" type="file" backupmode="full" exportname="sdb"/>
  </disks>
</domainbackup>
`,
  );
});

test('checkpoints: accepted', (t) => {
  t.deepEqual(parseCheckpointXml('<domaincheckpoint/>'), {
    name: undefined,
    description: '',
    disks: undefined,
    warnings: [],
  });
  // sample, disk-default
  t.deepEqual(
    parseCheckpointXml(`<domaincheckpoint>
      <description>Completion of &lt;updates&gt;</description>
      <disks>
        <!-- bitmap is the default -->
        <disk name='sda' checkpoint='bitmap'/><disk name='sdb' checkpoint='no'/><disk name='sdc'/>
      </disks>
    </domaincheckpoint>`),
    {
      name: undefined,
      description: 'Completion of <updates>',
      disks: [
        { name: 'sda', checkpoint: true },
        { name: 'sdb', checkpoint: false },
        { name: 'sdc', checkpoint: true },
      ],
      warnings: [],
    },
  );
  // What virtnbdbackup sends, and what libvirt writes out (size).
  t.deepEqual(
    parseCheckpointXml(`<domaincheckpoint>
      <description>Backup checkpoint</description><name>virtnbdbackup.1</name>
      <parent><name>virtnbdbackup.0</name></parent>
      <creationTime>1553648510</creationTime>
      <disks><disk name="sda" checkpoint='bitmap' bitmap='virtnbdbackup.1' size='1048576'/></disks>
    </domaincheckpoint>`),
    {
      name: 'virtnbdbackup.1',
      description: 'Backup checkpoint',
      disks: [{ name: 'sda', checkpoint: true }],
      warnings: [
        '<parent> is ignored: it is the newest checkpoint',
        '<creationTime> is ignored: it is the instant of the snapshot',
        "size of disk sda is ignored: it is the disk's",
      ],
    },
  );
});

const checkpoint = (content: string): string =>
  `<domaincheckpoint>\n${content}\n</domaincheckpoint>`;

const BAD_CHECKPOINTS: Readonly<
  Record<string, readonly [xml: string, line: number, column: number, why: RegExp]>
> = {
  'a path for a name (name-invalid)': [checkpoint('<name>../escape</name>'), 2, 1, /not a check/],
  'an empty name': [checkpoint('<name/>'), 2, 1, /not a checkpoint's name/],
  'a disk without a name (disk-invalid)': [checkpoint('<disks><disk/></disks>'), 2, 8, /name/],
  'a domain (redefine)': [checkpoint("<name>c1</name><domain type='kvm'/>"), 2, 16, /<domain>/],
  'no disks': [checkpoint('<disks/>'), 2, 1, /is empty/],
  'a disk twice': [
    checkpoint('<disks><disk name="a"/><disk name="a"/></disks>'),
    2,
    30,
    /a is there twice/,
  ],
  'a bitmap with a name of its own': [
    checkpoint('<name>c</name><disks><disk name="a" bitmap="b"/></disks>'),
    2,
    37,
    /a bitmap has the name of its checkpoint/,
  ],
  'a checkpoint of a kind that is none': [
    checkpoint('<disks><disk name="a" checkpoint="yes"/></disks>'),
    2,
    23,
    /one of "bitmap", "no"/,
  ],
  'a parent without a name': [checkpoint('<parent/>'), 2, 1, /needs a <name>/],
  'an unknown element': [checkpoint('<state>running</state>'), 2, 1, /<state> is unknown/],
  'another document': ['<domainsnapshot/>', 1, 1, /is not <domaincheckpoint>/],
};

for (const [what, [xml, line, column, why]] of Object.entries(BAD_CHECKPOINTS)) {
  test(`checkpoint refused: ${what}`, (t) => {
    const error = t.throws(() => parseCheckpointXml(xml), {
      instanceOf: XmlError,
      code: 'BAD_CHECKPOINT_XML',
      message: why,
    });
    t.deepEqual(error?.position, { line, column }, error?.message);
  });
}

test('a request for a checkpoint is written and read back', (t) => {
  const request = {
    name: 'c.1',
    description: 'a <b> & "c"',
    disks: [
      { name: 'sda', checkpoint: true },
      { name: 'sdb', checkpoint: false },
    ],
    warnings: [],
  };
  t.deepEqual(parseCheckpointXml(formatCheckpointXml(request)), request);
});
