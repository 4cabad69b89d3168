/* SPDX-License-Identifier: GPL-2.0-only WITH Linux-syscall-note */
/*
 * The interface between the Stillblock kernel module and user space: the only
 * place that knows ioctl numbers, structure layouts and the reasons for which
 * a request is refused. The module and the Node-API addon both include it.
 *
 * Conventions (Documentation/driver-api/ioctl.rst, botching-up-ioctls.rst):
 *   - every field has a fixed width and a natural alignment, padding is
 *     explicit and must be zero, pointers travel as __u64;
 *   - an unknown bit in a flags field is refused with EINVAL;
 *   - a request that fails changes nothing, and where the structure has a
 *     @reason field that field says why more exactly than errno can;
 *   - offsets and lengths are in bytes unless the name says otherwise.
 */
#ifndef _UAPI_LINUX_STILLBLOCK_H
#define _UAPI_LINUX_STILLBLOCK_H

#include <linux/ioctl.h>
#include <linux/types.h>

/* Raised by every change that an older user space would misread. */
#define STILLBLOCK_ABI			3

#define STILLBLOCK_DEVICE		"/dev/stillblock"

#define STILLBLOCK_UUID_SIZE		16
#define STILLBLOCK_NAME_SIZE		32
#define STILLBLOCK_IDENTITY_SIZE	192

/* Most trackers, frozen mounts and store pieces that one request may name. */
#define STILLBLOCK_MAX_TRACKERS		64
#define STILLBLOCK_MAX_MOUNTS		64
#define STILLBLOCK_MAX_STORES		16
/* Most extents of one store file; a file in more pieces is refused. */
#define STILLBLOCK_MAX_EXTENTS		65536

/* Numbers of one generation: 1..255; 0 marks a block as never written. */
#define STILLBLOCK_MAX_NUMBER		255

/* Longest time that file systems may stay frozen, milliseconds. */
#define STILLBLOCK_MAX_FREEZE_MS	60000

/*
 * Why a request failed or a snapshot became failed. Values are stable; new ones
 * are added at the end.
 */
enum stillblock_reason {
	STILLBLOCK_REASON_NONE			= 0,
	STILLBLOCK_REASON_NOT_BLOCK_DEVICE	= 1,
	STILLBLOCK_REASON_ZONED			= 2,
	STILLBLOCK_REASON_DAX			= 3,
	STILLBLOCK_REASON_BYPASSES_BIO		= 4,	/* rw_page driver, own image */
	STILLBLOCK_REASON_TOO_SMALL		= 5,	/* device under one tracking block */
	STILLBLOCK_REASON_ALREADY_ATTACHED	= 6,
	STILLBLOCK_REASON_NOT_ATTACHED		= 7,
	STILLBLOCK_REASON_IN_SNAPSHOT		= 8,	/* of a held snapshot */
	STILLBLOCK_REASON_HOOK_BUSY		= 9,	/* another filter, or ftrace is off */
	STILLBLOCK_REASON_HOOK_UNAVAILABLE	= 10,
	STILLBLOCK_REASON_NO_MEMORY		= 11,
	STILLBLOCK_REASON_RESIZED		= 12,
	STILLBLOCK_REASON_GONE			= 13,	/* the device was removed */
	STILLBLOCK_REASON_FREEZE_FAILED		= 14,
	STILLBLOCK_REASON_FREEZE_TIMEOUT	= 15,
	STILLBLOCK_REASON_ALREADY_FROZEN	= 16,
	STILLBLOCK_REASON_DRAIN_TIMEOUT		= 17,
	STILLBLOCK_REASON_STORE_NOT_FILE	= 18,
	STILLBLOCK_REASON_STORE_UNSUITABLE	= 19,
	STILLBLOCK_REASON_STORE_TOO_SMALL	= 20,
	STILLBLOCK_REASON_STORE_ON_ORIGIN	= 21,
	STILLBLOCK_REASON_STORE_FULL		= 22,	/* overflow */
	STILLBLOCK_REASON_STORE_ERROR		= 23,
	STILLBLOCK_REASON_STORE_TIMEOUT		= 24,
	STILLBLOCK_REASON_ORIGIN_ERROR		= 25,	/* old data could not be read */
	STILLBLOCK_REASON_FAILED		= 26,	/* the snapshot has failed before */
	STILLBLOCK_REASON_INTERRUPTED		= 27,	/* a signal ended the take */
	STILLBLOCK_REASON_BAD_BLOCK_SIZE	= 28,
	STILLBLOCK_REASON_STORE_BUSY		= 29,	/* device or file is in use */
	STILLBLOCK_REASON_FOREIGN_WRITE		= 30,	/* into the store, on an origin */
	STILLBLOCK_REASON_OVERLOADED		= 31,	/* too many writes had to wait */
	STILLBLOCK_REASON_SHUTDOWN		= 32,	/* the machine goes down */
	STILLBLOCK_REASON_PLACE_BUSY		= 33,	/* another place is in use */
	STILLBLOCK_REASON_PLACE_UNSUITABLE	= 34,	/* device, file, extents, boot id */
};

/*
 * About the history of a tracker: why its generation began, so that everything
 * older needs a full copy, or why it will not be kept over the next reboot.
 * Values are stable; new ones are added at the end, and they are kept on disk.
 */
enum stillblock_history {
	STILLBLOCK_HISTORY_OK			= 0,	/* will be kept */
	STILLBLOCK_HISTORY_FIRST		= 1,	/* never tracked before */
	STILLBLOCK_HISTORY_NO_PLACE		= 2,	/* no place to keep it was set */
	STILLBLOCK_HISTORY_PLACE_EMPTY		= 3,	/* nothing of ours is there */
	STILLBLOCK_HISTORY_PLACE_DAMAGED	= 4,	/* its header is wrong */
	STILLBLOCK_HISTORY_PLACE_VERSION	= 5,	/* format of another version */
	STILLBLOCK_HISTORY_PLACE_ERROR		= 6,	/* its device fails or hangs */
	STILLBLOCK_HISTORY_PLACE_FULL		= 7,
	STILLBLOCK_HISTORY_PLACE_LOOSE		= 8,	/* its file is not pinned yet */
	STILLBLOCK_HISTORY_NOT_SAVED		= 9,	/* not at the last shutdown */
	STILLBLOCK_HISTORY_DAMAGED		= 10,	/* record or map is wrong */
	STILLBLOCK_HISTORY_RESIZED		= 11,
	STILLBLOCK_HISTORY_BLOCK_SIZE		= 12,	/* another one was asked for */
	STILLBLOCK_HISTORY_WRITTEN		= 13,	/* before tracking began */
	STILLBLOCK_HISTORY_CHANGED		= 14,	/* the fingerprint differs */
	STILLBLOCK_HISTORY_NO_IDENTITY		= 15,	/* the device has no identity */
	STILLBLOCK_HISTORY_SAME_IDENTITY	= 16,	/* as another tracked device */
	STILLBLOCK_HISTORY_NO_WITNESS		= 17,	/* nothing in it tells of writes */
	STILLBLOCK_HISTORY_CONTAINER		= 18,	/* LVM, LUKS, RAID within it */
	STILLBLOCK_HISTORY_ORIGIN_ERROR		= 19,	/* the device cannot be read */
	STILLBLOCK_HISTORY_EXHAUSTED		= 20,	/* all numbers were used */
	STILLBLOCK_HISTORY_NO_MEMORY		= 21,
	STILLBLOCK_HISTORY_PLACE_ABOVE		= 22,	/* a tracked device, not on it */
};

/**
 * struct stillblock_info - what is loaded
 * @abi: out: STILLBLOCK_ABI of the module
 * @chunk_size: out: unit of copy-on-write, bytes
 * @version: out: the module's version, NUL-terminated
 */
struct stillblock_info {
	__u32 abi;
	__u32 chunk_size;
	char version[STILLBLOCK_NAME_SIZE];
};

/**
 * struct stillblock_attach - start to track a block device
 * @bdev_fd: an open descriptor of the device
 * @block_size: unit of change tracking, a power of two of at least 4096
 *	bytes; 0 lets the module choose
 * @flags: zero
 * @reason: out: enum stillblock_reason
 * @tracker: out: the tracker's id, never used again while the module is loaded
 * @identity: what tells this device from all others in each boot: any bytes, by
 *	which its kept history is found. All zero: it has none
 *
 * If a place is set (struct stillblock_place) that holds this device's history,
 * and nothing can have written since it was kept, it is taken up.
 */
struct stillblock_attach {
	__s32 bdev_fd;
	__u32 block_size;
	__u32 flags;
	__u32 reason;
	__u64 tracker;
	__u8 identity[STILLBLOCK_IDENTITY_SIZE];
};

/*
 * Keep the history in the place: it is taken up by an attach in the same boot,
 * before anything else has written to the disk.
 */
#define STILLBLOCK_DETACH_KEEP		0x1u

/**
 * struct stillblock_detach - stop to track a device; its change history ends
 * @tracker: id
 * @flags: STILLBLOCK_DETACH_KEEP
 * @reason: out: enum stillblock_reason
 */
struct stillblock_detach {
	__u64 tracker;
	__u32 flags;
	__u32 reason;
};

/* The tracker belongs to a snapshot that is held. */
#define STILLBLOCK_TRACKER_IN_SNAPSHOT	0x1u
/* The device has another size than its history: the next take begins a new one. */
#define STILLBLOCK_TRACKER_RESIZED	0x2u
/* The device is gone; all that is left is to detach it. */
#define STILLBLOCK_TRACKER_GONE		0x4u
/* Its history was taken up from the place at attach. */
#define STILLBLOCK_TRACKER_TAKEN_UP	0x8u

/**
 * struct stillblock_tracker - one tracked device
 * @tracker: id
 * @major: device number
 * @minor: device number
 * @nr_sect: size, 512-byte sectors
 * @block_size: unit of change tracking, bytes
 * @flags: STILLBLOCK_TRACKER_*
 * @generation: UUID of the change history
 * @number: number that writes are marked with now; a block whose number is
 *	above that of a checkpoint of the same generation has changed since
 * @began: enum stillblock_history: why @generation began
 * @kept: enum stillblock_history: why it will not be kept over a reboot
 * @pad: zero
 * @nr_writes: writes seen since attach
 * @nr_held_writes: writes that had to wait for copy-on-write since attach
 */
struct stillblock_tracker {
	__u64 tracker;
	__u32 major;
	__u32 minor;
	__u64 nr_sect;
	__u32 block_size;
	__u32 flags;
	__u8 generation[STILLBLOCK_UUID_SIZE];
	__u32 number;
	__u32 began;
	__u32 kept;
	__u32 pad;
	__u64 nr_writes;
	__u64 nr_held_writes;
};

/**
 * struct stillblock_list - all trackers
 * @trackers: in: array of struct stillblock_tracker
 * @capacity: in: its length
 * @count: out: trackers there are; more than @capacity means that the array
 *	was too short and holds the first @capacity
 */
struct stillblock_list {
	__u64 trackers;
	__u32 capacity;
	__u32 count;
};

/**
 * struct stillblock_mark - call a range changed
 * @tracker: id
 * @offset: bytes
 * @length: bytes, at least 1; the range is rounded outward to blocks
 * @flags: zero
 * @reason: out: enum stillblock_reason
 *
 * For changes that the hook could not see, such as those of a passthrough
 * command. They count as made now.
 */
struct stillblock_mark {
	__u64 tracker;
	__u64 offset;
	__u64 length;
	__u32 flags;
	__u32 reason;
};

/**
 * struct stillblock_extent - a range of the store's device
 * @offset: bytes from the start of the device that holds the file system
 * @length: bytes
 */
struct stillblock_extent {
	__u64 offset;
	__u64 length;
};

/* Write a new, empty place; what it held is lost. It has to be held fast. */
#define STILLBLOCK_PLACE_FORMAT		0x1u
/* Tell about the place that is set, and change nothing. */
#define STILLBLOCK_PLACE_QUERY		0x2u
/* Use it no longer: what it holds is worthless until it is set again. */
#define STILLBLOCK_PLACE_DROP		0x4u
/* Set it if none is set, and none was dropped for a reason or found unsuitable. */
#define STILLBLOCK_PLACE_UNLESS		0x8u
/* Out: one is set. */
#define STILLBLOCK_PLACE_SET		0x100u
/* Out: it is held fast, by its file being pinned or its device being ours. */
#define STILLBLOCK_PLACE_HELD		0x200u

/**
 * struct stillblock_place - where change histories are kept over a reboot
 * @bdev_fd: an open descriptor of the device on which it lies
 * @file_fd: the file that has the extents; the module pins it as long as the
 *	place is set. -1: they are not held fast (yet), as in an initramfs
 *	before their file system is mounted
 * @extents: array of struct stillblock_extent, fully allocated
 * @nr_extents: its length; 0 with @file_fd -1 takes the whole device, which
 *	the module opens exclusively
 * @flags: in: STILLBLOCK_PLACE_FORMAT, _QUERY, _DROP or _UNLESS; out:
 *	_SET, _HELD
 * @boot_id: tells this boot from all others: /proc/sys/kernel/random/boot_id. All
 *	zero is refused with PLACE_UNSUITABLE: it would be that of every boot, and
 *	what is good for one boot alone would be believed in another
 * @uuid: out: of the place
 * @capacity: out: bytes for maps, one byte per block of each device
 * @used: out: bytes of these that belong to a device
 * @reason: out: enum stillblock_reason
 * @history: out: enum stillblock_history: what is wrong with what lies there; in,
 *	with _DROP: why no place is set then, 0 for NO_PLACE
 *
 * Setting the place that is set already holds it fast, if it was not. Nothing
 * is ever written where the place's header is not found right, but by FORMAT.
 */
struct stillblock_place {
	__s32 bdev_fd;
	__s32 file_fd;
	__u64 extents;
	__u32 nr_extents;
	__u32 flags;
	__u8 boot_id[STILLBLOCK_UUID_SIZE];
	__u8 uuid[STILLBLOCK_UUID_SIZE];
	__u64 capacity;
	__u64 used;
	__u32 reason;
	__u32 history;
};

enum stillblock_store_kind {
	/*
	 * Fully allocated extents of a file. On a device that is an origin they
	 * have to be there before the take: afterwards such a piece is refused
	 * with STORE_ON_ORIGIN, since blocks that a file system hands out then
	 * may hold what the image still needs. The image reads as zeroes there,
	 * and anybody else's write there fails the snapshot.
	 */
	STILLBLOCK_STORE_FILE	= 1,
	/* Kernel memory, taken page by page as it is needed. */
	STILLBLOCK_STORE_MEMORY	= 2,
	/* A block device that nobody else uses. Its content is lost. */
	STILLBLOCK_STORE_DEVICE	= 3,
};

/**
 * struct stillblock_store - a piece of difference storage
 * @kind: enum stillblock_store_kind
 * @file_fd: STORE_FILE: the file, open for writing; the module pins it
 *	against truncation for as long as the snapshot lives. STORE_DEVICE: the
 *	device, which the module opens exclusively. Else -1
 * @limit: STORE_MEMORY: most bytes to use. Else zero
 * @extents: STORE_FILE: array of struct stillblock_extent, from FIEMAP after
 *	fallocate and fsync
 * @nr_extents: its length
 * @pad: zero
 */
struct stillblock_store {
	__u32 kind;
	__s32 file_fd;
	__u64 limit;
	__u64 extents;
	__u32 nr_extents;
	__u32 pad;
};

/**
 * struct stillblock_take - take one snapshot of several trackers at one instant
 * @trackers: array of __u64 ids. Stacked devices come top down: a dm device
 *	before everything on the disks beneath it
 * @mounts: array of __s32 descriptors, one open file or folder on each file
 *	system to freeze. Stacked ones come top down, too
 * @stores: array of struct stillblock_store, shared by all images
 * @nr_trackers: length of @trackers, at least 1
 * @nr_mounts: length of @mounts, may be 0
 * @nr_stores: length of @stores, at least 1
 * @freeze_timeout_ms: deadline for all freezes together; 0 means 10000
 * @low_watermark: bytes of free store under which an event is queued
 * @flags: zero
 * @reason: out: enum stillblock_reason
 * @culprit: out: index of the tracker, mount or store that @reason is about
 * @snapshot_fd: out: descriptor that owns the snapshot, close-on-exec
 */
struct stillblock_take {
	__u64 trackers;
	__u64 mounts;
	__u64 stores;
	__u32 nr_trackers;
	__u32 nr_mounts;
	__u32 nr_stores;
	__u32 freeze_timeout_ms;
	__u64 low_watermark;
	__u32 flags;
	__u32 reason;
	__u32 culprit;
	__s32 snapshot_fd;
};

#define STILLBLOCK_IOC_MAGIC	0xB5

/* On /dev/stillblock */
#define STILLBLOCK_IOC_INFO	_IOR(STILLBLOCK_IOC_MAGIC, 0x00, struct stillblock_info)
#define STILLBLOCK_IOC_ATTACH	_IOWR(STILLBLOCK_IOC_MAGIC, 0x01, struct stillblock_attach)
#define STILLBLOCK_IOC_DETACH	_IOWR(STILLBLOCK_IOC_MAGIC, 0x02, struct stillblock_detach)
#define STILLBLOCK_IOC_LIST	_IOWR(STILLBLOCK_IOC_MAGIC, 0x03, struct stillblock_list)
#define STILLBLOCK_IOC_TAKE	_IOWR(STILLBLOCK_IOC_MAGIC, 0x04, struct stillblock_take)
#define STILLBLOCK_IOC_MARK	_IOWR(STILLBLOCK_IOC_MAGIC, 0x05, struct stillblock_mark)
#define STILLBLOCK_IOC_PLACE	_IOWR(STILLBLOCK_IOC_MAGIC, 0x06, struct stillblock_place)

enum stillblock_snapshot_state {
	STILLBLOCK_STATE_HELD	= 1,	/* images are right */
	STILLBLOCK_STATE_FAILED	= 2,	/* every image read gives EIO, for good */
};

/**
 * struct stillblock_state - how a snapshot does
 * @state: enum stillblock_snapshot_state
 * @reason: enum stillblock_reason, when failed
 * @nr_images: images, in the order of the take's trackers
 * @pad: zero
 * @taken_ns: wall-clock time of the instant, nanoseconds since 1970
 * @freeze_ns: how long file systems were frozen
 * @gate_ns: how long writes were held for the switch
 * @store_capacity: bytes
 * @store_used: bytes
 * @nr_held_writes: writes that had to wait since the take
 */
struct stillblock_state {
	__u32 state;
	__u32 reason;
	__u32 nr_images;
	__u32 pad;
	__u64 taken_ns;
	__u64 freeze_ns;
	__u64 gate_ns;
	__u64 store_capacity;
	__u64 store_used;
	__u64 nr_held_writes;
};

/**
 * struct stillblock_image - one image of a snapshot
 * @index: in: 0 .. nr_images - 1
 * @block_size: out: unit of its change map, bytes
 * @tracker: out: the origin's tracker
 * @major: out: device number of the image
 * @minor: out: device number of the image
 * @nr_sect: out: size, 512-byte sectors
 * @nr_blocks: out: length of its change map
 * @generation: out: UUID that the map's numbers belong to
 * @checkpoint_generation: out: what a checkpoint of this instant records
 * @number: out: number of this snapshot: the highest in its map
 * @checkpoint_number: out: what a checkpoint of this instant records. It
 *	differs from @number only when the numbers of a generation are used up
 * @disk_name: out: the image is /dev/@disk_name
 */
struct stillblock_image {
	__u32 index;
	__u32 block_size;
	__u64 tracker;
	__u32 major;
	__u32 minor;
	__u64 nr_sect;
	__u64 nr_blocks;
	__u8 generation[STILLBLOCK_UUID_SIZE];
	__u8 checkpoint_generation[STILLBLOCK_UUID_SIZE];
	__u32 number;
	__u32 checkpoint_number;
	char disk_name[STILLBLOCK_NAME_SIZE];
};

/**
 * struct stillblock_map - read an image's change map as it was at the instant
 * @index: image
 * @pad: zero
 * @first_block: first block wanted
 * @nr_blocks: blocks wanted
 * @buffer: @nr_blocks bytes, one number per block
 */
struct stillblock_map {
	__u32 index;
	__u32 pad;
	__u64 first_block;
	__u64 nr_blocks;
	__u64 buffer;
};

/**
 * struct stillblock_add_store - give a held snapshot more room
 * @store: the piece
 * @flags: zero
 * @reason: out: enum stillblock_reason
 *
 * As all of /dev/stillblock this needs CAP_SYS_ADMIN; the other requests need just
 * the snapshot's descriptor.
 */
struct stillblock_add_store {
	struct stillblock_store store;
	__u32 flags;
	__u32 reason;
};

/* On the snapshot's descriptor */
#define STILLBLOCK_SNAP_IOC_STATE	_IOR(STILLBLOCK_IOC_MAGIC, 0x40, struct stillblock_state)
#define STILLBLOCK_SNAP_IOC_IMAGE	_IOWR(STILLBLOCK_IOC_MAGIC, 0x41, struct stillblock_image)
#define STILLBLOCK_SNAP_IOC_MAP		_IOW(STILLBLOCK_IOC_MAGIC, 0x42, struct stillblock_map)
#define STILLBLOCK_SNAP_IOC_ADD_STORE	\
	_IOWR(STILLBLOCK_IOC_MAGIC, 0x43, struct stillblock_add_store)

enum stillblock_event_type {
	STILLBLOCK_EVENT_LOW_WATERMARK	= 1,	/* value: bytes of store left */
	STILLBLOCK_EVENT_FAILED		= 2,	/* value: enum stillblock_reason */
	STILLBLOCK_EVENT_LOST		= 3,	/* value: events that did not fit */
};

/**
 * struct stillblock_event - what read() on the snapshot's descriptor returns
 * @type: enum stillblock_event_type
 * @pad: zero
 * @value: see the type
 * @time_ns: wall-clock time, nanoseconds since 1970
 *
 * A read returns whole events only, blocks unless O_NONBLOCK is set, and is
 * refused with EINVAL when the buffer is shorter than one event. poll() says
 * POLLIN when there is one.
 */
struct stillblock_event {
	__u32 type;
	__u32 pad;
	__u64 value;
	__u64 time_ns;
};

#endif /* _UAPI_LINUX_STILLBLOCK_H */
