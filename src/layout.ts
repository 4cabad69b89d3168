// SPDX-License-Identifier: Apache-2.0
/**
 * How a machine's disks are laid out: what a restore to empty disks has to know beyond
 * the disks' content. Other people's tools are asked; what they answer is read here.
 */
import { execFile } from 'node:child_process';
import { mkdtemp, readdir, readFile, rm, stat } from 'node:fs/promises';
import { arch, availableParallelism, hostname, release, tmpdir, totalmem } from 'node:os';
import { join } from 'node:path';
import { type BootEntry, parseBootEntry, parseBootOrder } from './boot-entries.ts';

/** A block device, of those chosen, above them or beneath them. */
export interface LayoutDevice {
  readonly name: string;
  readonly path: string;
  /** As lsblk says it: `disk`, `part`, `lvm`, `crypt`, `raid1`, … */
  readonly type: string;
  readonly sizeBytes: number;
  readonly sectorBytes: number;
  /** Names of the devices directly beneath. */
  readonly beneath: readonly string[];
  /** What it contains, such as `ext4`, `LVM2_member`, `crypto_LUKS`, `swap`. */
  readonly content: string | null;
  readonly uuid: string | null;
  readonly label: string | null;
  readonly partitionUuid: string | null;
  readonly serial: string | null;
  readonly mountPoints: readonly string[];
}

export interface Partition {
  readonly name: string;
  readonly startSector: number;
  readonly sectors: number;
  readonly type: string;
  readonly uuid: string | null;
}

export interface PartitionTable {
  /** Name of the disk. */
  readonly disk: string;
  readonly label: 'gpt' | 'dos' | string;
  readonly id: string;
  readonly sectorBytes: number;
  readonly partitions: readonly Partition[];
  /** What `sfdisk --dump` writes and sfdisk reads. */
  readonly dump: string;
}

export interface VolumeGroup {
  readonly name: string;
  readonly uuid: string;
  /** Names of its physical volumes. */
  readonly physicalVolumes: readonly string[];
  readonly logicalVolumes: readonly { readonly name: string; readonly sizeBytes: number }[];
  /** What vgcfgbackup writes and vgcfgrestore reads. */
  readonly backup: string | null;
}

export interface MdArray {
  readonly name: string;
  readonly level: string;
  readonly uuid: string;
  readonly metadata: string;
  readonly members: readonly string[];
}

export interface LuksVolume {
  readonly name: string;
  readonly version: number;
  readonly uuid: string;
  readonly cipher: string;
  readonly keySlots: number;
}

export interface Firmware {
  readonly kind: 'bios' | 'uefi';
  readonly bootOrder: readonly string[];
  readonly bootEntries: readonly BootEntry[];
}

export interface NetworkCard {
  readonly name: string;
  readonly mac: string;
}

/** Plain JSON. */
export interface MachineLayout {
  /** `/etc/machine-id` */
  readonly machine: string | null;
  readonly hostname: string;
  readonly kernel: string;
  /** As Node has it: `x64`, `arm64`. */
  readonly architecture: string;
  readonly memoryBytes: number;
  readonly processors: number;
  readonly networkCards: readonly NetworkCard[];
  readonly firmware: Firmware;
  readonly devices: readonly LayoutDevice[];
  readonly partitionTables: readonly PartitionTable[];
  readonly volumeGroups: readonly VolumeGroup[];
  readonly arrays: readonly MdArray[];
  readonly luks: readonly LuksVolume[];
  /** What is swapped to: devices, and files. */
  readonly swaps: readonly string[];
  readonly fstab: string | null;
  /** What could not be found out, and why. */
  readonly problems: readonly string[];
}

// ---- what the tools say

type Json = Readonly<Record<string, unknown>>;

function text(value: unknown): string | null {
  return typeof value === 'string' && value !== '' ? value : null;
}

function list(value: unknown): readonly Json[] {
  return Array.isArray(value) ? (value as Json[]) : [];
}

/** Columns that {@link parseLsblk} reads. */
export const LSBLK_COLUMNS =
  'NAME,KNAME,PATH,TYPE,SIZE,LOG-SEC,FSTYPE,UUID,LABEL,PARTUUID,SERIAL,MOUNTPOINTS';

function toDevice(entry: Json, beneath: string | undefined): LayoutDevice {
  const mounts = Array.isArray(entry['mountpoints']) ? entry['mountpoints'] : [];
  return {
    name: text(entry['kname']) ?? '',
    path: text(entry['path']) ?? '',
    type: text(entry['type']) ?? '',
    sizeBytes: Number(entry['size']),
    sectorBytes: Number(entry['log-sec']),
    beneath: beneath === undefined ? [] : [beneath],
    content: text(entry['fstype']),
    uuid: text(entry['uuid']),
    label: text(entry['label']),
    partitionUuid: text(entry['partuuid']),
    serial: text(entry['serial']),
    mountPoints: mounts.filter((mount) => typeof mount === 'string'),
  };
}

/** Reads `lsblk --json --bytes`, whose tree names a device once under each that it lies on. */
export function parseLsblk(json: string): LayoutDevice[] {
  const found = new Map<string, LayoutDevice>();
  const walk = (entry: Json, beneath: string | undefined): void => {
    const device = toDevice(entry, beneath);
    const known = found.get(device.name);
    found.set(
      device.name,
      known === undefined
        ? device
        : { ...known, beneath: [...new Set([...known.beneath, ...device.beneath])] },
    );
    for (const child of list(entry['children'])) {
      walk(child, device.name);
    }
  };
  for (const entry of list((JSON.parse(json) as Json)['blockdevices'])) {
    walk(entry, undefined);
  }
  return [...found.values()];
}

/**
 * Reads `blkid --probe --output export`, which is for shells: a backslash stands before
 * whatever is special there.
 */
export function parseBlkid(
  output: string,
): Pick<LayoutDevice, 'content' | 'uuid' | 'label' | 'partitionUuid'> {
  const values = parseKeyValues(output);
  const value = (key: string): string | null => text(values.get(key)?.replaceAll(/\\(.)/g, '$1'));
  return {
    content: value('TYPE'),
    uuid: value('UUID'),
    label: value('LABEL'),
    partitionUuid: value('PART_ENTRY_UUID'),
  };
}

/** Those devices that are chosen, with all above and beneath them; every real disk if none is. */
export function selectDevices(
  devices: readonly LayoutDevice[],
  choice: readonly string[],
): LayoutDevice[] {
  const disks = devices.filter(({ type, sizeBytes }) => type === 'disk' && sizeBytes > 0);
  const chosen = choice.length === 0 ? disks.map(({ name }) => name) : choice;
  const wanted = new Set(
    devices
      .filter(({ name, path }) => chosen.includes(name) || chosen.includes(path))
      .map(({ name }) => name),
  );
  // An array may be listed before its second member: again, until nothing comes to it.
  for (let before = 0; before < wanted.size; ) {
    before = wanted.size;
    for (const { name, beneath } of devices) {
      if (beneath.some((under) => wanted.has(under))) {
        wanted.add(name);
      }
    }
  }
  const beneath = [...wanted];
  for (const name of beneath) {
    for (const next of devices.find((device) => device.name === name)?.beneath ?? []) {
      if (!wanted.has(next)) {
        wanted.add(next);
        beneath.push(next);
      }
    }
  }
  return devices.filter(({ name }) => wanted.has(name));
}

/** Reads `sfdisk --json`; `dump` is what `sfdisk --dump` wrote. */
export function parseSfdisk(disk: string, json: string, dump: string): PartitionTable {
  const table = (JSON.parse(json) as { partitiontable: Json }).partitiontable;
  return {
    disk,
    label: text(table['label']) ?? '',
    id: text(table['id']) ?? '',
    sectorBytes: Number(table['sectorsize'] ?? 512),
    partitions: list(table['partitions']).map((partition) => ({
      name: (text(partition['node']) ?? '').replace(/^\/dev\//, ''),
      startSector: Number(partition['start']),
      sectors: Number(partition['size']),
      type: text(partition['type']) ?? '',
      uuid: text(partition['uuid']),
    })),
    dump,
  };
}

/** The rows of one of LVM's reports. */
function report(json: string, kind: 'pv' | 'lv'): readonly Json[] {
  return list((JSON.parse(json) as Json)['report']).flatMap((part) => list(part[kind]));
}

/** Reads `pvs` and `lvs --reportformat json --units b --nosuffix`. */
export function parseLvm(pvs: string, lvs: string): Omit<VolumeGroup, 'backup'>[] {
  const groups = new Map<string, { uuid: string; physicalVolumes: string[] }>();
  for (const row of report(pvs, 'pv')) {
    const name = text(row['vg_name']);
    if (name !== null) {
      const group = groups.get(name) ?? { uuid: text(row['vg_uuid']) ?? '', physicalVolumes: [] };
      group.physicalVolumes.push(text(row['pv_name']) ?? '');
      groups.set(name, group);
    }
  }
  const volumes = report(lvs, 'lv');
  return [...groups].map(([name, group]) => ({
    name,
    ...group,
    logicalVolumes: volumes
      .filter((row) => row['vg_name'] === name)
      .map((row) => ({ name: text(row['lv_name']) ?? '', sizeBytes: Number(row['lv_size']) })),
  }));
}

/** Reads `KEY=VALUE` lines, such as of `mdadm --detail --export`. */
export function parseKeyValues(output: string): ReadonlyMap<string, string> {
  return new Map(
    output.split('\n').flatMap((line) => {
      const equals = line.indexOf('=');
      return equals < 0 ? [] : [[line.slice(0, equals), line.slice(equals + 1)] as const];
    }),
  );
}

/** Reads `mdadm --detail --export` of one array. */
export function parseMdadm(name: string, output: string): MdArray {
  const values = parseKeyValues(output);
  return {
    name,
    level: values.get('MD_LEVEL') ?? '',
    uuid: values.get('MD_UUID') ?? '',
    metadata: values.get('MD_METADATA') ?? '',
    members: [...values]
      .filter(([key]) => /^MD_DEVICE_.*_DEV$/.test(key))
      .map(([, path]) => path.replace(/^\/dev\//, '')),
  };
}

/** Reads `cryptsetup luksDump`, of either version. */
export function parseLuksDump(name: string, output: string): LuksVolume {
  const field = (pattern: RegExp): string => pattern.exec(output)?.[1]?.trim() ?? '';
  const version = Number(field(/^Version:\s*(\d+)/m));
  const cipher =
    version === 1
      ? `${field(/^Cipher name:\s*(\S+)/m)}-${field(/^Cipher mode:\s*(\S+)/m)}`
      : field(/^Data segments:[\s\S]*?cipher:\s*(\S+)/m);
  const slots =
    version === 1
      ? (output.match(/^Key Slot \d+: ENABLED/gm) ?? [])
      : (field(/^Keyslots:\n((?:[ \t].*\n)*)/m).match(/^\s*\d+: \w+/gm) ?? []);
  return { name, version, uuid: field(/^UUID:\s*(\S+)/m), cipher, keySlots: slots.length };
}

/** Reads /proc/swaps. */
export function parseSwaps(output: string): string[] {
  return output
    .split('\n')
    .slice(1)
    .map((line) => line.split(/\s+/)[0] ?? '')
    .filter((path) => path !== '')
    .map((path) => path.replaceAll('\\040', ' '));
}

// ---- asking them

/** Each answers in well under a second; a disk that hangs must not hang the backup. */
const TOOL_MS = 20_000;
const OUTPUT_BYTES = 16 * 1024 * 1024;
const EFI_GLOBAL = '8be4df61-93ca-11d2-aa0d-00e098032b8c';

/** Runs tools, and keeps what went wrong. */
class Tools {
  readonly problems: string[] = [];

  /** What a tool wrote to stdout; undefined if it failed, which is kept. */
  run(tool: string, ...args: string[]): Promise<string | undefined> {
    return this.ask(0, tool, ...args);
  }

  /** The same for a tool that says by an exit code, too, that it found nothing. */
  async ask(nothing: number, tool: string, ...args: string[]): Promise<string | undefined> {
    try {
      return await new Promise<string>((resolve, reject) => {
        const env = {
          ...process.env,
          LC_ALL: 'C',
          PATH: `${process.env['PATH'] ?? ''}:/usr/sbin:/sbin`,
        };
        const options = { env, timeout: TOOL_MS, maxBuffer: OUTPUT_BYTES } as const;
        execFile(tool, args, options, (error, stdout, stderr) => {
          if (error === null || error.code === nothing) {
            resolve(stdout);
          } else {
            reject(new Error(stderr.trim().split('\n')[0] || error.message));
          }
        });
      });
    } catch (error) {
      this.problem(tool, error);
      return undefined;
    }
  }

  problem(what: string, error: unknown): void {
    this.problems.push(`${what}: ${error instanceof Error ? error.message : String(error)}`);
  }

  /** Reads what a tool answered; what makes no sense is kept as a problem. */
  read<T>(what: string, read: () => T): T | undefined {
    try {
      return read();
    } catch (error) {
      this.problem(what, error);
      return undefined;
    }
  }
}

async function readIfThere(path: string): Promise<string | null> {
  return readFile(path, 'utf8').catch(() => null);
}

/** "Nothing was found", of blkid. */
const BLKID_NOTHING = 2;

/**
 * lsblk knows only from udev what a device contains, and there may be none, or one that has
 * not looked: in an initramfs, a container, after a write that it did not see. What is
 * missing is read from the device itself.
 */
async function addContents(
  tools: Tools,
  devices: readonly LayoutDevice[],
): Promise<LayoutDevice[]> {
  const found: LayoutDevice[] = [];
  for (const device of devices) {
    const isKnown = device.content !== null || device.sizeBytes === 0;
    const output = isKnown
      ? undefined
      : await tools.ask(BLKID_NOTHING, 'blkid', '--probe', '--output', 'export', device.path);
    const { content, uuid, label, partitionUuid } = parseBlkid(output ?? '');
    found.push({
      ...device,
      content: device.content ?? content,
      uuid: device.uuid ?? uuid,
      label: device.label ?? label,
      partitionUuid: device.partitionUuid ?? partitionUuid,
    });
  }
  return found;
}

async function collectTables(
  tools: Tools,
  devices: readonly LayoutDevice[],
): Promise<PartitionTable[]> {
  const tables: PartitionTable[] = [];
  const disks = new Set(
    devices.filter(({ type }) => type === 'part').flatMap((part) => part.beneath),
  );
  for (const { name, path } of devices.filter((device) => disks.has(device.name))) {
    const json = await tools.run('sfdisk', '--json', path);
    const dump = await tools.run('sfdisk', '--dump', path);
    if (json !== undefined && dump !== undefined) {
      const table = tools.read('sfdisk', () => parseSfdisk(name, json, dump));
      tables.push(...(table === undefined ? [] : [table]));
    }
  }
  return tables;
}

async function collectLvm(tools: Tools, devices: readonly LayoutDevice[]): Promise<VolumeGroup[]> {
  if (!devices.some(({ content }) => content === 'LVM2_member')) {
    return [];
  }
  const format = ['--reportformat', 'json', '--units', 'b', '--nosuffix', '-o'];
  const pvs = await tools.run('pvs', ...format, 'pv_name,vg_name,vg_uuid');
  const lvs = await tools.run('lvs', ...format, 'vg_name,lv_name,lv_size');
  if (pvs === undefined || lvs === undefined) {
    return [];
  }
  const paths = new Set(devices.map(({ path }) => path));
  const groups = (tools.read('pvs', () => parseLvm(pvs, lvs)) ?? []).filter(({ physicalVolumes }) =>
    physicalVolumes.some((path) => paths.has(path)),
  );
  const folder = await mkdtemp(join(tmpdir(), 'stillblock-layout-'));
  try {
    const found: VolumeGroup[] = [];
    for (const group of groups) {
      const file = join(folder, 'backup');
      const done = await tools.run('vgcfgbackup', '-f', file, group.name);
      found.push({ ...group, backup: done === undefined ? null : await readIfThere(file) });
    }
    return found;
  } finally {
    await rm(folder, { recursive: true, force: true });
  }
}

async function collectEach<T>(
  tools: Tools,
  devices: readonly LayoutDevice[],
  command: readonly [string, ...string[]],
  read: (name: string, output: string) => T,
): Promise<T[]> {
  const found: T[] = [];
  const [tool, ...args] = command;
  for (const { name, path } of devices) {
    const output = await tools.run(tool, ...args, path);
    const value = output === undefined ? undefined : tools.read(tool, () => read(name, output));
    found.push(...(value === undefined ? [] : [value]));
  }
  return found;
}

async function collectFirmware(tools: Tools): Promise<Firmware> {
  const isUefi = await stat('/sys/firmware/efi').then(
    () => true,
    () => false,
  );
  if (!isUefi) {
    return { kind: 'bios', bootOrder: [], bootEntries: [] };
  }
  const folder = '/sys/firmware/efi/efivars';
  const bootEntries: BootEntry[] = [];
  let bootOrder: string[] = [];
  try {
    for (const name of (await readdir(folder)).toSorted()) {
      const number = /^Boot([0-9A-F]{4})-/.exec(name)?.[1];
      if (number !== undefined) {
        const entry = parseBootEntry(number, await readFile(join(folder, name)));
        bootEntries.push(...(entry === undefined ? [] : [entry]));
      }
    }
    bootOrder = parseBootOrder(await readFile(join(folder, `BootOrder-${EFI_GLOBAL}`)));
  } catch (error) {
    tools.problem('boot entries', error);
  }
  return { kind: 'uefi', bootOrder, bootEntries };
}

/** The cards that have hardware; bridges and the like have none. */
async function collectCards(): Promise<NetworkCard[]> {
  const folder = '/sys/class/net';
  const cards: NetworkCard[] = [];
  for (const name of (await readdir(folder).catch(() => [])).toSorted()) {
    const isReal = await stat(join(folder, name, 'device')).catch(() => undefined);
    const mac = (await readIfThere(join(folder, name, 'address')))?.trim();
    if (isReal !== undefined && mac !== undefined && mac !== '') {
      cards.push({ name, mac });
    }
  }
  return cards;
}

/**
 * Finds out how this machine's disks are laid out. What cannot be found out is in
 * `problems`; nothing is written, and no device is opened for writing.
 *
 * @param devices the disks of a backup by path or kernel name, all if empty; what is above
 *   and beneath them is found
 */
export async function collectLayout(devices: readonly string[]): Promise<MachineLayout> {
  const tools = new Tools();
  const lsblk = await tools.run('lsblk', '--json', '--bytes', '--all', '-o', LSBLK_COLUMNS);
  const all = lsblk === undefined ? [] : (tools.read('lsblk', () => parseLsblk(lsblk)) ?? []);
  const chosen = await addContents(tools, selectDevices(all, devices));
  const partitionTables = await collectTables(tools, chosen);
  const volumeGroups = await collectLvm(tools, chosen);
  const raids = chosen.filter(({ type }) => type.startsWith('raid'));
  const arrays = await collectEach(tools, raids, ['mdadm', '--detail', '--export'], parseMdadm);
  const encrypted = chosen.filter(({ content }) => content === 'crypto_LUKS');
  const luks = await collectEach(tools, encrypted, ['cryptsetup', 'luksDump'], parseLuksDump);
  const firmware = await collectFirmware(tools);
  return {
    machine: (await readIfThere('/etc/machine-id'))?.trim() || null,
    hostname: hostname(),
    kernel: release(),
    architecture: arch(),
    memoryBytes: totalmem(),
    processors: availableParallelism(),
    networkCards: await collectCards(),
    firmware,
    devices: chosen,
    partitionTables,
    volumeGroups,
    arrays,
    luks,
    swaps: parseSwaps((await readIfThere('/proc/swaps')) ?? ''),
    fstab: await readIfThere('/etc/fstab'),
    problems: tools.problems,
  };
}
