// SPDX-License-Identifier: Apache-2.0
/**
 * What went wrong, in words: what happened, and what to do about it. Failures are
 * translated here, once, where they leave the program.
 */
import { isNativeError, type NativeError } from './native.ts';

/** Exit codes of every command. */
export const EXIT = {
  done: 0,
  failed: 1,
  usage: 2,
  fullRequired: 3,
  overflow: 4,
} as const;

export type ExitCode = (typeof EXIT)[keyof typeof EXIT];

/** An error for the user. Its message says what happened, its advice what to do. */
export class StillblockError extends Error {
  override readonly name = 'StillblockError';
  /** Stable name for programs, such as `MODULE_NOT_LOADED`. */
  readonly code: string;
  readonly advice: string;
  readonly exitCode: ExitCode;

  constructor(
    code: string,
    message: string,
    advice: string,
    options: { readonly exitCode?: ExitCode; readonly cause?: unknown } = {},
  ) {
    super(message, { cause: options.cause });
    this.code = code;
    this.advice = advice;
    this.exitCode = options.exitCode ?? EXIT.failed;
  }
}

/** An error in how the command was called. */
export function usageError(message: string, advice: string): StillblockError {
  return new StillblockError('USAGE', message, advice, { exitCode: EXIT.usage });
}

interface Words {
  readonly message: string;
  readonly advice: string;
}

/**
 * Words for each of the module's reasons, by its name; `what` in them is the device,
 * file system or store that it is about.
 */
export const REASON_WORDS: Readonly<Record<string, Words>> = {
  NONE: {
    message: '{what}: the kernel module refused the request',
    advice: 'look at the end of dmesg',
  },
  NOT_BLOCK_DEVICE: {
    message: '{what} is not a block device',
    advice: 'name a disk, partition or logical volume, such as /dev/sda',
  },
  ZONED: {
    message: '{what} is a zoned device, which cannot be tracked',
    advice: 'back it up from its file system instead',
  },
  DAX: {
    message: '{what} is persistent memory with direct access (DAX), whose writes cannot be seen',
    advice: 'put its namespace into sector mode, or back it up from its file system instead',
  },
  BYPASSES_BIO: {
    message: '{what} is written to past the block layer, or is itself an image',
    advice: 'attach the disk or logical volume that holds the data',
  },
  TOO_SMALL: {
    message: '{what} is smaller than one tracking block',
    advice: 'choose a smaller --block-size, or leave it out',
  },
  ALREADY_ATTACHED: {
    message: '{what} is tracked already',
    advice: 'nothing need be done: see stillblock device list',
  },
  NOT_ATTACHED: {
    message: '{what} is not tracked',
    advice: 'run stillblock device attach for it first',
  },
  IN_SNAPSHOT: {
    message: '{what} is in a snapshot that is held',
    advice: 'end that with stillblock backup end first',
  },
  HOOK_BUSY: {
    message: "another product's filter sits where writes are seen, or function tracing is off",
    advice: "unload the other backup product's kernel module, or sysctl kernel.ftrace_enabled=1",
  },
  HOOK_UNAVAILABLE: {
    message: 'this kernel offers no place where writes can be seen',
    advice: 'use a kernel with function tracing (CONFIG_FTRACE), as distributions build it',
  },
  NO_MEMORY: {
    message: '{what}: the kernel has not enough memory for it',
    advice: 'free some memory, or name fewer devices or a smaller store',
  },
  RESIZED: {
    message: '{what} has another size than its change history',
    advice: 'begin again without --incremental; its next backup is a full one',
  },
  GONE: {
    message: '{what} is gone',
    advice: 'detach it, and attach it again when it is back',
  },
  FREEZE_FAILED: {
    message: 'the file system on {what} could not be frozen',
    advice: 'look at the end of dmesg for its errors',
  },
  FREEZE_TIMEOUT: {
    message: 'the file system on {what} could not be frozen in time',
    advice: 'try again when less is being written, or with a longer --freeze-timeout',
  },
  ALREADY_FROZEN: {
    message: 'somebody else keeps the file system on {what} frozen',
    advice: 'thaw it with fsfreeze --unfreeze, then try again',
  },
  DRAIN_TIMEOUT: {
    message: 'writes to {what} did not end in time',
    advice: 'look for a disk that hangs, in dmesg, then try again',
  },
  STORE_NOT_FILE: {
    message: 'store {what} is not a plain file',
    advice: 'name a folder, or a plain file, on ext4 or XFS',
  },
  STORE_UNSUITABLE: {
    message: 'store {what} cannot be used by the kernel module',
    advice: 'name a folder on another ext4 or XFS file system, or use --store memory',
  },
  STORE_TOO_SMALL: {
    message: 'store {what} is too small',
    advice: 'choose a larger --store-size',
  },
  STORE_ON_ORIGIN: {
    message: 'store {what} lies on a device of which the snapshot is to be',
    advice: 'name a folder on another device, or use --store memory',
  },
  STORE_FULL: {
    message: 'the store is full: the snapshot is lost, its disks and applications are not touched',
    advice: 'begin again with a larger --store-size, or a --store with more room',
  },
  STORE_ERROR: {
    message: 'the store could not be written: the snapshot is lost, its disks are not touched',
    advice: 'look at dmesg for the error of its disk, and begin again with another --store',
  },
  STORE_TIMEOUT: {
    message: 'the store did not answer in time: the snapshot is lost, its disks are not touched',
    advice: 'begin again with --store on a faster disk, or memory',
  },
  ORIGIN_ERROR: {
    message: 'old data could not be read from a disk: the snapshot is lost',
    advice: 'look at dmesg: that disk needs attention',
  },
  FAILED: {
    message: 'the snapshot has failed before',
    advice: 'end it with stillblock backup end, and begin again',
  },
  INTERRUPTED: {
    message: 'the snapshot was interrupted by a signal',
    advice: 'begin again',
  },
  BAD_BLOCK_SIZE: {
    message: '{what}: the block size is no power of two from 4K on that suits the device',
    advice: 'leave --block-size out, or choose 64K',
  },
  STORE_BUSY: {
    message: 'store {what} is in use by something else',
    advice: 'unmount it or take it out of its volume group, or name another --store',
  },
  FOREIGN_WRITE: {
    message: 'somebody wrote into the store, which lies on a disk of the snapshot, which is lost',
    advice: 'look for what writes to that disk past its file system, or use another --store',
  },
  OVERLOADED: {
    message: 'too many writes waited for the snapshot: it is lost, its disks are not touched',
    advice: 'begin again with --store on a faster disk, or when less is written',
  },
  SHUTDOWN: {
    message: 'the machine is going down',
    advice: 'begin again when it is up',
  },
  PLACE_BUSY: {
    message: 'histories are kept in another place than {what} already',
    advice: 'restart the machine to change <history>',
  },
  PLACE_UNSUITABLE: {
    message: 'histories cannot be kept in {what}',
    advice: 'name a file on ext4 or XFS, or a device that nothing else uses, in <history>',
  },
};

/** Words for why a change history began, so that a full copy is needed, or will not be kept. */
export const HISTORY_WORDS: Readonly<Record<string, Words>> = {
  OK: { message: 'it will be kept', advice: 'nothing need be done' },
  FIRST: {
    message: 'the device was not tracked before',
    advice: 'nothing need be done: its first backup is a full one',
  },
  NO_PLACE: {
    message: 'there was no place where histories are kept over a reboot',
    advice: 'restart stillblock.service, and look at its log: see docs/reboot.md',
  },
  PLACE_EMPTY: {
    message: 'the place of the histories held none',
    advice: 'run update-initramfs -u, so that the next boot knows where they are',
  },
  PLACE_DAMAGED: {
    message: 'the place of the histories was damaged',
    advice: 'look for errors of its disk; it has been made anew',
  },
  PLACE_VERSION: {
    message: 'the place of the histories had the format of another version',
    advice: 'nothing need be done: it has been made anew',
  },
  PLACE_ERROR: {
    message: 'the place of the histories could not be read or written',
    advice: 'look at dmesg for the error of its disk, or choose another in <history>',
  },
  PLACE_FULL: {
    message: 'the place of the histories has no room for it',
    advice: 'give <history> a larger size, 16M for each TiB that is tracked and some more',
  },
  PLACE_ABOVE: {
    message: 'the place of the histories lies above a tracked device, not on it',
    advice: 'name a file on a disk or a logical volume in <history>',
  },
  PLACE_LOOSE: {
    message: 'the file of the histories is not held fast',
    advice: 'start stillblock.service',
  },
  NOT_SAVED: {
    message: 'the machine was not shut down cleanly, or did not keep this history then',
    advice: 'nothing need be done: the next backup is a full one',
  },
  DAMAGED: {
    message: 'the history that was kept is damaged',
    advice: 'look for errors of the disk that it is kept on',
  },
  RESIZED: {
    message: 'the device had another size before',
    advice: 'nothing need be done: the next backup is a full one',
  },
  BLOCK_SIZE: {
    message: 'it was tracked in blocks of another size before',
    advice: 'nothing need be done: the next backup is a full one',
  },
  WRITTEN: {
    message: 'its disk was written to before it was tracked',
    advice: 'attach it in the initramfs: run update-initramfs -u',
  },
  CHANGED: {
    message: 'it was changed while it was not tracked',
    advice: 'nothing need be done: the next backup is a full one',
  },
  NO_IDENTITY: {
    message: 'nothing tells the device from others',
    advice: 'give the virtual disk a serial number',
  },
  SAME_IDENTITY: {
    message: 'another tracked device has the same identity',
    advice: 'track the multipath device, or give the virtual disk another serial number',
  },
  NO_WITNESS: {
    message: 'it has no ext4, XFS, btrfs or FAT32, which would show what wrote to it unseen',
    advice: 'nothing can be done: after each reboot its next backup is a full one',
  },
  CONTAINER: {
    message: 'it contains LVM, LUKS or RAID, which hides what wrote to it unseen',
    advice: 'track the logical volumes or mapped devices in its stead',
  },
  ORIGIN_ERROR: {
    message: 'it could not be read',
    advice: 'look at dmesg: that disk needs attention',
  },
  EXHAUSTED: {
    message: 'all 255 numbers of its history were used',
    advice: 'nothing need be done: the next backup is a full one',
  },
  NO_MEMORY: {
    message: 'the kernel had not enough memory for it',
    advice: 'free some memory',
  },
};

/** @returns words for a history, by its name */
export function historyWords(history: string): Words {
  return (
    HISTORY_WORDS[history] ?? {
      message: 'a reason that this stillblock does not know',
      advice: 'use the stillblock that belongs to the module',
    }
  );
}

const UNKNOWN_WORDS: Words = {
  message: '{what}: the kernel module refused it for a reason that this stillblock does not know',
  advice: 'use the stillblock that belongs to the module',
};

/** Words for each refusal of a store file, by the addon's name. */
export const REFUSAL_WORDS: Readonly<Record<string, Words>> = {
  NOT_FILE: {
    message: 'store {what} is not a plain file',
    advice: 'name a folder or a plain file on ext4 or XFS, or use --store memory',
  },
  FILE_SYSTEM: {
    message: 'store {what} is on a file system that cannot hold a store',
    advice: 'name a folder on a local ext4 or XFS file system, or use --store memory',
  },
  BTRFS: {
    message: 'store {what} is on btrfs, which moves the blocks of files',
    advice: 'name a folder on a local ext4 or XFS file system, or use --store memory',
  },
  TOO_SMALL: {
    message: 'store {what} is smaller than it has to be',
    advice: 'enlarge it with fallocate -l SIZE FILE, or name its folder instead',
  },
  SHARED: {
    message: 'store {what} shares blocks with another file (reflink or snapshot)',
    advice: 'make a new file with fallocate -l SIZE FILE, or name its folder instead',
  },
  ENCODED: {
    message: 'store {what} is compressed or encrypted by its file system',
    advice: 'name a folder without encryption and compression',
  },
  INLINE: {
    message: 'store {what} is so small that it has no blocks of its own',
    advice: 'make it larger with fallocate -l SIZE FILE, or name its folder instead',
  },
  DELALLOC: {
    message: 'store {what} could not be allocated in full',
    advice: 'name its folder instead of the file',
  },
  UNKNOWN_PLACE: {
    message: 'the place of store {what} on its disk is not known',
    advice: 'name a folder on a local ext4 or XFS file system, or use --store memory',
  },
  NOT_ALIGNED: {
    message: 'store {what} does not consist of whole blocks',
    advice: 'make a new file with fallocate -l SIZE FILE, or name its folder instead',
  },
  HOLES: {
    message: 'store {what} has holes, or changed meanwhile',
    advice: 'make a new file with fallocate -l SIZE FILE, or name its folder instead',
  },
  FRAGMENTED: {
    message: 'store {what} is in too many pieces',
    advice: 'name a folder on a file system with more free room',
  },
  REALTIME: {
    message: 'store {what} is on the realtime section of XFS',
    advice: 'name a folder whose files are not realtime files',
  },
};

function fill(words: Words, what: string): Words {
  return { message: words.message.replaceAll('{what}', what), advice: words.advice };
}

/** What a reason of the module means for one device, file system or store. */
export function reasonWords(reason: string, what: string): Words {
  return fill(REASON_WORDS[reason] ?? UNKNOWN_WORDS, what);
}

/** What a refusal of the addon means for one store. */
export function refusalWords(refusal: string, what: string): Words {
  return fill(REFUSAL_WORDS[refusal] ?? UNKNOWN_WORDS, what);
}

/** Words for common errors of system calls. */
const ERRNO_WORDS: Readonly<Record<string, Words>> = {
  ENOENT: { message: '{what} does not exist', advice: 'look for a typing error' },
  ENOTDIR: { message: '{what} does not exist', advice: 'look for a typing error' },
  ENXIO: { message: '{what} has no device behind it', advice: 'look whether the disk is there' },
  ENOMEDIUM: { message: '{what} has no medium in it', advice: 'insert one' },
  EACCES: { message: '{what}: permission denied', advice: 'run it as root, such as with sudo' },
  EPERM: { message: '{what}: not permitted', advice: 'run it as root, such as with sudo' },
  EROFS: {
    message: '{what} is on a file system that is mounted read-only',
    advice: 'choose another place',
  },
  EISDIR: { message: '{what} is a folder', advice: 'name a file' },
  ENOSPC: { message: '{what}: no room left', advice: 'free some room, or choose another place' },
  EDQUOT: { message: '{what}: over quota', advice: 'free some room, or choose another place' },
  ETXTBSY: {
    message: '{what} is in use as a store or as swap space',
    advice: 'choose another file',
  },
};

function errnoOf(error: unknown): string | undefined {
  return error instanceof Error && 'code' in error && typeof error.code === 'string'
    ? error.code
    : undefined;
}

function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}

/**
 * Translates a failed call about one thing.
 *
 * @param what the device, file or address that it was about, as the user knows it
 */
export function explain(error: unknown, what: string): StillblockError {
  if (error instanceof StillblockError) {
    return error;
  }
  const code = errnoOf(error);
  if (isNativeError(error)) {
    if (error.refusal !== undefined) {
      const words = refusalWords(error.refusal, what);
      return new StillblockError(`STORE_${error.refusal}`, words.message, words.advice, {
        cause: error,
      });
    }
    if (error.reason !== 'NONE') {
      const words = reasonWords(error.reason, what);
      const exitCode = exitCodeOf(error.reason);
      return new StillblockError(error.reason, words.message, words.advice, {
        cause: error,
        exitCode,
      });
    }
  }
  const words = code === undefined ? undefined : ERRNO_WORDS[code];
  const { message, advice } = words
    ? fill(words, what)
    : {
        message: `${what}: ${messageOf(error)}`,
        advice: isNativeError(error) ? 'look at the end of dmesg' : 'look at the cause, with -v',
      };
  return new StillblockError(code ?? 'FAILED', message, advice, { cause: error });
}

/** The exit code that a reason of the module leads to. */
export function exitCodeOf(reason: string): ExitCode {
  return reason === 'STORE_FULL' ? EXIT.overflow : EXIT.failed;
}

/** Translates a failure to open the control device. */
export function explainControl(error: NativeError, device: string): StillblockError {
  switch (error.code) {
    case 'ENOENT':
    case 'ENXIO':
    case 'ENODEV':
      return new StillblockError(
        'MODULE_NOT_LOADED',
        'the kernel module is not loaded',
        'run modprobe stillblock',
        { cause: error },
      );
    case 'EACCES':
    case 'EPERM':
      return new StillblockError(
        'NOT_ROOT',
        `${device}: permission denied`,
        'run it as root, such as with sudo',
        { cause: error },
      );
    default:
      return explain(error, device);
  }
}
