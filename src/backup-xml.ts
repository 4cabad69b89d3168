// SPDX-License-Identifier: Apache-2.0
/**
 * Requests in libvirt's words: `<domainbackup mode='pull'>` asks for a snapshot with
 * exports, `<domaincheckpoint>` for a checkpoint of that instant (formatbackup and
 * formatcheckpoint of libvirt's documentation). Order is free. What would change
 * the meaning of a request and cannot be done is refused; what would not is accepted
 * with a warning.
 */

import { NBD_DEFAULT_PORT } from '../nbd/constants.ts';
import { isDiskName } from './block-devices.ts';
import { isCheckpointName } from './checkpoints.ts';
import { type Checked, check, XmlDocument, type XmlElement } from './xml.ts';
import { writeXml } from './xml-writer.ts';

/** Where the backup's NBD server is to listen. */
export type BackupServer =
  | {
      readonly transport: 'tcp';
      /** Address or host name; undefined for the configuration's. */
      readonly host: string | undefined;
      readonly port: number;
      /** Undefined for the configuration's word. */
      readonly tls: boolean | undefined;
    }
  | { readonly transport: 'unix'; readonly socket: string; readonly tls: boolean | undefined };

export interface BackupDisk {
  readonly name: string;
  /** Whether it is in the backup at all. */
  readonly backup: boolean;
  readonly mode: 'full' | 'incremental';
  /** The checkpoint since which changes are asked for, of an incremental one. */
  readonly incremental: string | undefined;
  readonly exportName: string;
  /** Of the changes' metadata context, `qemu:dirty-bitmap:NAME`, of an incremental one. */
  readonly exportBitmap: string | undefined;
  /** The place of its store; undefined for that of the configuration. */
  readonly scratch: { readonly kind: 'file' | 'block'; readonly path: string } | undefined;
}

export interface BackupXml {
  /** The checkpoint since which changes are asked for, unless a disk says otherwise. */
  readonly incremental: string | undefined;
  /** Undefined for that of the configuration. */
  readonly server: BackupServer | undefined;
  /** Undefined for all that are tracked. */
  readonly disks: readonly BackupDisk[] | undefined;
  /** What was accepted and will be ignored. */
  readonly warnings: readonly string[];
}

export interface CheckpointXml {
  /** Undefined for one made up from the time. */
  readonly name: string | undefined;
  readonly description: string;
  /** Undefined for all of the backup. */
  readonly disks: readonly { readonly name: string; readonly checkpoint: boolean }[] | undefined;
  /** What was accepted and will be ignored. */
  readonly warnings: readonly string[];
}

/** An export's name goes into every client's command line. */
const MAX_EXPORT_NAME_LENGTH = 255;
const MAX_PORT = 65_535;
const YES_NO = ['yes', 'no'] as const;
const A_CHECKPOINT = "a checkpoint's name: letters, digits, '_', '-' and '.', not first";
const A_DISK = "a disk's name, such as sda";
const A_TEXT = `a text of 1 to ${MAX_EXPORT_NAME_LENGTH} characters`;

const readCheckpoint = (text: string): string | undefined =>
  isCheckpointName(text) ? text : undefined;
const readDisk = (text: string): string | undefined => (isDiskName(text) ? text : undefined);
const readPath = (text: string): string | undefined =>
  /^\/\P{Cc}*$/u.test(text) ? text : undefined;
const readPort = (text: string): number | undefined =>
  /^[0-9]{1,5}$/.test(text) && Number(text) <= MAX_PORT ? Number(text) : undefined;
const readText = (text: string): string | undefined =>
  /^[^\p{Cc}]+$/u.test(text) && text.length <= MAX_EXPORT_NAME_LENGTH ? text : undefined;

/** The name of a checkpoint that an element holds. */
function checkpointIn(document: XmlDocument, element: XmlElement | undefined): string | undefined {
  if (element === undefined) {
    return undefined;
  }
  const { text } = check(document, element, { text: true });
  return (
    readCheckpoint(text) ??
    document.fail(element.at, `${JSON.stringify(text.slice(0, 60))} is not ${A_CHECKPOINT}`)
  );
}

function parseServer(document: XmlDocument, element: XmlElement): BackupServer {
  const server = check(document, element, {
    attributes: ['transport', 'name', 'port', 'socket', 'tls', 'fdgroup'],
  });
  const transport = server.attribute('transport') ?? 'tcp';
  if (transport !== 'tcp' && transport !== 'unix') {
    return server.fail(`transport ${JSON.stringify(transport)} is not supported`, 'transport');
  }
  const unfit =
    transport === 'tcp' ? (['socket', 'fdgroup'] as const) : (['name', 'port', 'fdgroup'] as const);
  for (const name of unfit) {
    if (server.attribute(name) !== undefined) {
      server.fail(`${name} is not for transport ${transport}`, name);
    }
  }
  const word = server.word('tls', YES_NO);
  const tls = word === undefined ? undefined : word === 'yes';
  if (transport === 'unix') {
    server.required('socket');
    const socket = server.read('socket', readPath, 'an absolute path') ?? '';
    return { transport, socket, tls };
  }
  const host = server.read('name', readText, 'a host name or address');
  const port = server.read('port', readPort, 'a port') ?? NBD_DEFAULT_PORT;
  return { transport, host, port, tls };
}

/** The store of a disk: `<scratch file=…>`, or `dev` of one whose type is block. */
function parseScratch(
  document: XmlDocument,
  element: XmlElement,
  kind: 'file' | 'block',
  warn: (warning: string) => void,
): BackupDisk['scratch'] {
  const scratch = check(document, element, {
    attributes: ['file', 'dev'],
    once: ['encryption'],
    many: ['seclabel'],
  });
  const encryption = scratch.once('encryption');
  if (encryption !== undefined) {
    document.fail(encryption.at, 'encryption of the store is not supported');
  }
  if (scratch.many('seclabel').length > 0) {
    warn('<seclabel> is ignored: a store has no label');
  }
  const [attribute, other] =
    kind === 'file' ? (['file', 'dev'] as const) : (['dev', 'file'] as const);
  if (scratch.attribute(other) !== undefined) {
    scratch.fail(`${other} is not for a disk of type ${kind}`, other);
  }
  scratch.required(attribute);
  return { kind, path: scratch.read(attribute, readPath, 'an absolute path') ?? '' };
}

type DiskAttribute =
  | 'name'
  | 'backup'
  | 'type'
  | 'backupmode'
  | 'incremental'
  | 'exportname'
  | 'exportbitmap';

/** Since when a disk's changes are asked for (virDomainBackupAlignDisks). */
function parseMode(
  disk: Checked<DiskAttribute, string, string>,
  ofAll: string | undefined,
): Pick<BackupDisk, 'mode' | 'incremental'> {
  const own = disk.read('incremental', readCheckpoint, A_CHECKPOINT);
  const incremental = own ?? ofAll;
  const mode =
    disk.word('backupmode', ['full', 'incremental']) ??
    (incremental === undefined ? 'full' : 'incremental');
  if (mode === 'full') {
    return own === undefined
      ? { mode, incremental: undefined }
      : disk.fail('a full backup has no incremental', 'incremental');
  }
  return incremental === undefined
    ? disk.fail('an incremental backup needs incremental, here or for all', 'backupmode')
    : { mode, incremental };
}

/** Of a disk with `backup='no'` the rest is checked, and means nothing. */
const LEFT_OUT = {
  backup: false,
  mode: 'full',
  incremental: undefined,
  exportBitmap: undefined,
  scratch: undefined,
} as const;

function parseDisk(
  document: XmlDocument,
  element: XmlElement,
  ofAll: string | undefined,
  warn: (warning: string) => void,
): BackupDisk {
  const disk = check(document, element, {
    attributes: [
      'name',
      'backup',
      'type',
      'backupmode',
      'incremental',
      'exportname',
      'exportbitmap',
    ],
    once: ['scratch', 'driver', 'target'],
  });
  const name = disk.required('name');
  disk.read('name', readDisk, A_DISK);
  const target = disk.once('target');
  if (target !== undefined) {
    document.fail(target.at, '<target> is for push backups; the place of the store is <scratch>');
  }
  const driver = disk.once('driver');
  if (driver !== undefined) {
    check(document, driver, { attributes: ['type'] });
    warn(`<driver> of disk ${name} is ignored: a store has no format`);
  }
  const kind = disk.word('type', ['file', 'block']) ?? 'file';
  const scratch = disk.once('scratch');
  const place = scratch && parseScratch(document, scratch, kind, warn);
  const { mode, incremental } = parseMode(disk, ofAll);
  const exportName = disk.read('exportname', readText, A_TEXT) ?? name;
  const exportBitmap = disk.read('exportbitmap', readText, A_TEXT);
  if (disk.word('backup', YES_NO) === 'no') {
    return { ...LEFT_OUT, name, exportName: name };
  }
  if (mode === 'full' && exportBitmap !== undefined) {
    warn(`exportbitmap of disk ${name} is ignored: a full backup has none`);
  }
  return {
    name,
    backup: true,
    mode,
    incremental,
    exportName,
    exportBitmap: mode === 'full' ? undefined : (exportBitmap ?? `backup-${name}`),
    scratch: place,
  };
}

/** Refuses disks and exports that are there twice, and a list that leaves nothing. */
function requireApart(document: XmlDocument, list: XmlElement, disks: readonly BackupDisk[]): void {
  const names = new Set<string>();
  const exportNames = new Set<string>();
  for (const [index, { name, backup, exportName }] of disks.entries()) {
    const { at } = list.children[index] ?? list;
    if (names.has(name)) {
      document.fail(at, `disk ${name} is there twice`);
    }
    names.add(name);
    if (backup && exportNames.has(exportName)) {
      document.fail(at, `two disks have the export name ${JSON.stringify(exportName)}`);
    }
    if (backup) {
      exportNames.add(exportName);
    }
  }
  if (exportNames.size === 0) {
    document.fail(list.at, '<disks> leaves no disk to back up');
  }
}

/**
 * Reads a `<domainbackup>`.
 *
 * @param source where it came from, for messages
 * @throws XmlError at what is wrong, or cannot be done
 */
export function parseBackupXml(xml: string, source: string = 'backup.xml'): BackupXml {
  const advice = 'correct it; stillblock(8) lists what is understood';
  const document = new XmlDocument(xml, { code: 'BAD_BACKUP_XML', source, advice });
  const { root } = document;
  if (root.name !== 'domainbackup') {
    document.fail(root.at, `<${root.name}> is not <domainbackup>`);
  }
  const backup = check(document, root, {
    attributes: ['mode'],
    once: ['incremental', 'server', 'disks'],
  });
  switch (backup.attribute('mode')) {
    case 'pull':
      break;
    case undefined:
      return backup.fail('mode is missing, which to libvirt means push; only mode="pull" is done');
    default:
      return backup.fail('only mode="pull" is done', 'mode');
  }
  const warnings = new Set<string>();
  const incremental = checkpointIn(document, backup.once('incremental'));
  const server = backup.once('server');
  const list = backup.once('disks');
  let disks: readonly BackupDisk[] | undefined;
  if (list !== undefined) {
    disks = check(document, list, { many: ['disk'] })
      .many('disk')
      .map((disk) => parseDisk(document, disk, incremental, (warning) => warnings.add(warning)));
    requireApart(document, list, disks);
  }
  return {
    incremental,
    server: server && parseServer(document, server),
    disks,
    warnings: [...warnings],
  };
}

/** Leaves out what is undefined. */
function defined(values: Readonly<Record<string, unknown>>): Record<string, unknown> {
  return Object.fromEntries(Object.entries(values).filter(([, value]) => value !== undefined));
}

const yesNo = (value: boolean | undefined): string | undefined =>
  value === undefined ? undefined : value ? 'yes' : 'no';

function formatServer(server: BackupServer): Record<string, unknown> {
  const { transport, tls } = server;
  return defined({
    '@transport': transport,
    '@tls': yesNo(tls),
    ...(transport === 'unix'
      ? { '@socket': server.socket }
      : { '@name': server.host, '@port': String(server.port) }),
  });
}

function formatDisk(disk: BackupDisk): Record<string, unknown> {
  const { name, backup, mode, incremental, exportName, exportBitmap, scratch } = disk;
  if (!backup) {
    return { '@name': name, '@backup': 'no' };
  }
  return defined({
    '@name': name,
    '@backup': 'yes',
    '@type': scratch?.kind ?? 'file',
    '@backupmode': mode,
    '@incremental': incremental,
    '@exportname': exportName,
    '@exportbitmap': exportBitmap,
    scratch: scratch && { [scratch.kind === 'file' ? '@file' : '@dev']: scratch.path },
  });
}

/** Writes a backup as it will be made, with all that is not said filled in. */
export function formatBackupXml(backup: Omit<BackupXml, 'warnings'>): string {
  const { incremental, server, disks } = backup;
  return writeXml({
    domainbackup: defined({
      '@mode': 'pull',
      incremental,
      server: server && formatServer(server),
      disks: disks && { disk: disks.map(formatDisk) },
    }),
  });
}

/**
 * Reads a `<domaincheckpoint>` that is to be made.
 *
 * @param source where it came from, for messages
 * @throws XmlError at what is wrong, or cannot be done
 */
export function parseCheckpointXml(xml: string, source: string = 'checkpoint.xml'): CheckpointXml {
  const advice = 'correct it; stillblock(8) lists what is understood';
  const document = new XmlDocument(xml, { code: 'BAD_CHECKPOINT_XML', source, advice });
  const { root } = document;
  if (root.name !== 'domaincheckpoint') {
    document.fail(root.at, `<${root.name}> is not <domaincheckpoint>`);
  }
  const checkpoint = check(document, root, {
    once: ['name', 'description', 'parent', 'creationTime', 'disks', 'domain'],
  });
  const domain = checkpoint.once('domain');
  if (domain !== undefined) {
    document.fail(domain.at, '<domain> belongs to checkpoints of virtual machines');
  }
  const warnings: string[] = [];
  const parent = checkpoint.once('parent');
  if (parent !== undefined) {
    const named = check(document, parent, { once: ['name'] });
    checkpointIn(document, named.once('name') ?? named.fail('<parent> needs a <name>'));
    warnings.push('<parent> is ignored: it is the newest checkpoint');
  }
  const creationTime = checkpoint.once('creationTime');
  if (creationTime !== undefined) {
    check(document, creationTime, { text: true });
    warnings.push('<creationTime> is ignored: it is the instant of the snapshot');
  }
  const description = checkpoint.once('description');
  const name = checkpointIn(document, checkpoint.once('name'));
  const list = checkpoint.once('disks');
  return {
    name,
    description: description === undefined ? '' : check(document, description, { text: true }).text,
    disks: list && parseCheckpointDisks(document, list, name, warnings),
    warnings,
  };
}

function parseCheckpointDisks(
  document: XmlDocument,
  list: XmlElement,
  checkpoint: string | undefined,
  warnings: string[],
): { name: string; checkpoint: boolean }[] {
  const seen = new Set<string>();
  const disks = check(document, list, { many: ['disk'] })
    .many('disk')
    .map((element) => {
      const attributes = ['name', 'checkpoint', 'bitmap', 'size'] as const;
      const disk = check(document, element, { attributes });
      const name = disk.required('name');
      disk.read('name', readDisk, A_DISK);
      if (seen.has(name)) {
        disk.fail(`disk ${name} is there twice`, 'name');
      }
      seen.add(name);
      const bitmap = disk.attribute('bitmap');
      if (bitmap !== undefined && bitmap !== checkpoint) {
        disk.fail('a bitmap has the name of its checkpoint', 'bitmap');
      }
      if (disk.attribute('size') !== undefined) {
        warnings.push(`size of disk ${name} is ignored: it is the disk's`);
      }
      return { name, checkpoint: disk.word('checkpoint', ['bitmap', 'no']) !== 'no' };
    });
  return disks.length === 0 ? document.fail(list.at, '<disks> is empty') : disks;
}

/** Writes a request for a checkpoint. */
export function formatCheckpointXml(checkpoint: Omit<CheckpointXml, 'warnings'>): string {
  const { name, description, disks } = checkpoint;
  return writeXml({
    domaincheckpoint: defined({
      name,
      description: description === '' ? undefined : description,
      disks: disks && {
        disk: disks.map((disk) => ({
          '@name': disk.name,
          '@checkpoint': disk.checkpoint ? 'bitmap' : 'no',
        })),
      },
    }),
  });
}
