// SPDX-License-Identifier: Apache-2.0
/**
 * Whose disk it is, from the disk's own first bytes: what tools put there once, and what
 * stays while its content changes. An increment of another disk is recognised by it.
 */

/** What was found, such as `gpt` and its GUID; null where nothing is. */
export interface DiskIdentity {
  readonly kind: string | null;
  readonly id: string | null;
}

/** How much of a disk {@link identifyDisk} looks at, bytes: btrfs' superblock ends there. */
export const IDENTITY_BYTES = 131_072;

const NONE: DiskIdentity = { kind: null, id: null };

function hex(bytes: Buffer, start: number, end: number): string {
  return bytes.toString('hex', start, end);
}

function isAt(bytes: Buffer, offset: number, magic: string): boolean {
  return bytes.toString('latin1', offset, offset + magic.length) === magic;
}

/** A partition table by its magic: GPT in the second sector of 512 or 4,096 bytes, or MBR. */
function tableIdentity(head: Buffer): DiskIdentity | undefined {
  for (const sectorBytes of [512, 4096]) {
    if (isAt(head, sectorBytes, 'EFI PART')) {
      return { kind: 'gpt', id: hex(head, sectorBytes + 56, sectorBytes + 72) };
    }
  }
  // Boot sectors of FAT and NTFS end alike; those name themselves.
  const isTable =
    head.readUInt16LE(510) === 0xaa55 && !isAt(head, 3, 'NTFS') && !isAt(head, 3, 'mkfs.fat');
  return isTable && head.readUInt32LE(440) !== 0
    ? { kind: 'dos', id: hex(head, 440, 444) }
    : undefined;
}

/** Magic numbers and places of UUIDs as libblkid knows them. */
const SIGNATURES = [
  { kind: 'crypto_LUKS', at: 0, magic: 'LUKS\xba\xbe', id: 168, bytes: 36 },
  { kind: 'xfs', at: 0, magic: 'XFSB', id: 32, bytes: 16 },
  { kind: 'LVM2_member', at: 512, magic: 'LABELONE', id: 544, bytes: 32 },
  { kind: 'ext', at: 1080, magic: '\x53\xef', id: 1128, bytes: 16 },
  { kind: 'linux_raid_member', at: 4096, magic: '\xfc\x4e\x2b\xa9', id: 4112, bytes: 16 },
  { kind: 'swap', at: 4086, magic: 'SWAPSPACE2', id: 1036, bytes: 16 },
  { kind: 'btrfs', at: 65_600, magic: '_BHRfS_M', id: 65_568, bytes: 16 },
] as const;

/**
 * Tells whose disk it is.
 *
 * @param bytes the disk's first {@link IDENTITY_BYTES}, or all of a smaller one
 */
export function identifyDisk(bytes: Buffer): DiskIdentity {
  const head = Buffer.alloc(IDENTITY_BYTES);
  bytes.copy(head);
  const table = tableIdentity(head);
  if (table !== undefined) {
    return table;
  }
  const found = SIGNATURES.find(({ at, magic }) => isAt(head, at, magic));
  return found === undefined
    ? NONE
    : { kind: found.kind, id: hex(head, found.id, found.id + found.bytes) };
}

/** Whether two identities can be one disk's; what is not known contradicts nothing. */
export function sameDisk(a: DiskIdentity, b: DiskIdentity): boolean {
  return a.id === null || b.id === null || (a.kind === b.kind && a.id === b.id);
}
