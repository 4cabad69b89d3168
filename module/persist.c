// SPDX-License-Identifier: GPL-2.0-only
/*
 * Change histories outlive a reboot: in the place, a preallocated file or a
 * device, which is written by bios alone, after the last write of every file
 * system.
 *
 * The place is a line of pages of 4 KiB:
 *
 *   page 0          header: whose place it is, where it lies, format, its session
 *   page 1 .. 64    records, one per device
 *   page 65 ..      maps, each in the run of pages that its record names
 *
 * A record is made IN_USE, on stable storage, before the first write of its
 * device is tracked, and CLEAN by the clean path alone, which first holds every
 * write of every tracked device for ever; a detach that keeps the history makes
 * it DETACHED, which is good for this boot.
 *
 * A place may fail in the middle of that, and leave a device tracked whose record
 * is CLEAN from the time before. So each setting of the place is a session, which
 * the header tells of on stable storage before the first record is believed or
 * made IN_USE, and which the clean path closes once it has made all records. Only
 * records of the last session that was closed are believed, and none when another
 * one was begun by an earlier boot and not closed.
 *
 * A record is believed only if moreover its own hash and that of the map are right,
 * nobody has written to the disk in this boot before the attach, and the device's
 * fingerprint is that of the last moment. Everything else begins a new generation,
 * with the reason.
 *
 * The hash is SipHash, and not a CRC: a CRC of a superblock that ends with its
 * own CRC, as those of ext4 and XFS do, is the same for every content.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/bio.h>
#include <linux/bitmap.h>
#include <linux/completion.h>
#include <linux/delay.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/kref.h>
#include <linux/magic.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/moduleparam.h>
#include <linux/reboot.h>
#include <linux/siphash.h>
#include <linux/slab.h>
#include <linux/suspend.h>
#include <linux/uaccess.h>
#include <linux/uuid.h>

#include "change_map.h"
#include "compat.h"
#include "hook.h"
#include "main.h"
#include "persist.h"
#include "snapshot.h"
#include "store.h"
#include "tracker.h"

#define STB_PLACE_MAGIC		0x4563616c50625453ull	/* "STbPlacE" */
/* Raised by every change of the format. */
#define STB_PLACE_VERSION	4
#define STB_PLACE_PAGE		4096u
#define STB_PLACE_PAGE_SECT	(STB_PLACE_PAGE >> SECTOR_SHIFT)
#define STB_PLACE_RECORDS	STILLBLOCK_MAX_TRACKERS
#define STB_PLACE_FIRST_MAP	(1u + STB_PLACE_RECORDS)
/* Sectors at both ends of a device that are left alone. */
#define STB_PLACE_MARGIN	2048
/* One I/O carries this many pages at most. */
#define STB_IO_PAGES		64
/*
 * A device that does not answer a read or a write of ours in this time hangs. One
 * that many machines share may take seconds when all of them start at once.
 */
#define STB_IO_TIMEOUT		(5 * HZ)
/* What is not kept is looked at again when somebody asks, this often at most. */
#define STB_KEPT_RETRY		(60 * HZ)
/* How long writes in flight are waited for once later ones are held. */
#define STB_LAST_WRITES		HZ

/* Heads of devices and partitions whose content tells of writes, sectors. */
#define STB_HEAD_SECT		8
#define STB_BTRFS_HEAD		128
/* First word of a record in XFS's log; its cycle is the second one. */
#define STB_XFS_LOG_MAGIC	0xfeedbabeu

static unsigned int save_timeout_ms = 5000;
module_param(save_timeout_ms, uint, 0644);
MODULE_PARM_DESC(save_timeout_ms,
		 "how long a shutdown waits for the histories to be written");

/**
 * struct persist_header - page 0 of the place
 * @magic: STB_PLACE_MAGIC
 * @version: STB_PLACE_VERSION
 * @pad: zero
 * @uuid: made when it was formatted
 * @nr_pages: length of the place
 * @location: hash of where it lies: a copy of it elsewhere is none
 * @turn: its session, counted from 1: that which goes on, or was the last
 * @closed: session whose CLEAN records are believed; @turn itself once the clean
 *	path has closed it, and 0 when there is none
 * @boot_id: of the boot that @turn belongs to
 * @hash: of the page, with this as zero
 */
struct persist_header {
	__le64 magic;
	__le32 version;
	__le32 pad;
	u8 uuid[STILLBLOCK_UUID_SIZE];
	__le64 nr_pages;
	__le64 location;
	__le64 turn;
	__le64 closed;
	u8 boot_id[STILLBLOCK_UUID_SIZE];
	__le64 hash;
};

/**
 * struct persist_piece - a run of pages in one spot
 * @first: first page
 * @nr: how many
 * @sector: first sector on the device
 */
struct persist_piece {
	u64 first;
	u64 nr;
	sector_t sector;
};

/**
 * struct persist_io - one I/O at a time, and its memory
 * @ref: its owner, and the I/O: who gives up waiting leaves it behind
 * @done: of the I/O
 * @bio: the I/O
 * @table: of @bio
 * @pages: memory
 */
struct persist_io {
	struct kref ref;
	struct completion done;
	struct bio bio;
	struct bio_vec table[STB_IO_PAGES];
	struct page *pages[STB_IO_PAGES];
};

/* How a write of ours goes: through all trackers, or past them. */
enum persist_way {
	PERSIST_HOOKED,
	PERSIST_PAST,
};

/**
 * struct persist_place - the place that is set; all under the control mutex
 * @set: there is one
 * @exclusive: @dev is ours alone
 * @sealed: the machine goes down, every write is held
 * @error: enum stillblock_history: it cannot be used any more
 * @refusal: enum stillblock_history: why none is set
 * @dev: the device
 * @file: the pinned file, opened for reading, or NULL. An open for writing would
 *	keep its file system from becoming read-only, which is what a shutdown
 *	does before it comes here
 * @pieces: where it lies, by rising page
 * @nr_pieces: length of @pieces
 * @nr_pages: length of the place
 * @location: hash of @pieces
 * @uuid: of the place
 * @boot_id: of this boot
 * @own_sect: sectors that we have written to its disk
 * @maps_written: maps, too, and not records alone
 * @records: all records, as they are on the device; what is worthless there may
 *	be empty here
 * @nr_damaged: records that could not be believed when it was set
 * @damaged: which these are, as long as nobody holds the place fast
 * @turn: this session
 * @closed: session whose CLEAN records are believed; 0 when there is none
 * @io: for the place
 * @origin_io: for reads of tracked devices
 */
struct persist_place {
	bool set;
	bool exclusive;
	bool sealed;
	u32 error;
	u32 refusal;
	struct stb_bdev dev;
	struct file *file;
	struct persist_piece *pieces;
	u32 nr_pieces;
	u64 nr_pages;
	u64 location;
	u8 uuid[STILLBLOCK_UUID_SIZE];
	u8 boot_id[STILLBLOCK_UUID_SIZE];
	u64 own_sect;
	bool maps_written;
	struct stb_record *records;
	u32 nr_damaged;
	DECLARE_BITMAP(damaged, STB_PLACE_RECORDS);
	u64 turn;
	u64 closed;
	struct persist_io *io;
	struct persist_io *origin_io;
};

static struct persist_place place = {
	.refusal = STILLBLOCK_HISTORY_NO_PLACE,
};

/* The machine will come back as it is now; under the control mutex. */
static bool hibernates;

static u64 persist_hash(const void *data, size_t len, u64 before)
{
	const siphash_key_t key = { { before, STB_PLACE_MAGIC } };

	return siphash(data, len, &key);
}

/* The hash of a page that has its own hash at @hash. */
static __le64 persist_page_hash(const void *page, size_t len, __le64 *hash)
{
	__le64 kept = *hash;
	u64 result;

	*hash = 0;
	result = persist_hash(page, len, STB_PLACE_VERSION);
	*hash = kept;
	return cpu_to_le64(result);
}

/*
 * I/O.
 */

static void io_free(struct kref *ref)
{
	struct persist_io *io = container_of(ref, struct persist_io, ref);
	u32 i;

	bio_uninit(&io->bio);
	for (i = 0; i < STB_IO_PAGES; i++)
		if (io->pages[i])
			__free_page(io->pages[i]);
	kfree(io);
}

static void io_put(struct persist_io **pio)
{
	if (*pio)
		kref_put(&(*pio)->ref, io_free);
	*pio = NULL;
}

static struct persist_io *io_create(void)
{
	struct persist_io *io = kzalloc(sizeof(*io), GFP_KERNEL);
	u32 i;

	if (!io)
		return NULL;
	kref_init(&io->ref);
	init_completion(&io->done);
	for (i = 0; i < STB_IO_PAGES; i++) {
		io->pages[i] = alloc_page(GFP_KERNEL);
		if (!io->pages[i]) {
			io_put(&io);
			return NULL;
		}
	}
	return io;
}

static void *io_page(struct persist_io *io, u32 i)
{
	return page_address(io->pages[i]);
}

static void io_end(struct bio *bio)
{
	struct persist_io *io = bio->bi_private;

	complete(&io->done);
	kref_put(&io->ref, io_free);
}

/*
 * Read into or write from the pages @first .. @first + @nr - 1 of @pio. When
 * the device hangs the I/O is left behind with its memory, and *@pio is NULL.
 */
static int io_run(struct persist_io **pio, struct block_device *bdev,
		  sector_t sector, u32 first, u32 nr, blk_opf_t opf,
		  enum persist_way way)
{
	struct persist_io *io = *pio;
	u32 i;

	if (!io)
		return -EIO;
	bio_uninit(&io->bio);
	stb_bio_init(&io->bio, bdev, io->table, STB_IO_PAGES, opf);
	io->bio.bi_iter.bi_sector = sector;
	io->bio.bi_end_io = io_end;
	io->bio.bi_private = io;
	for (i = 0; i < nr; i++)
		if (bio_add_page(&io->bio, io->pages[first + i], STB_PLACE_PAGE,
				 0) != STB_PLACE_PAGE)
			return -EIO;
	reinit_completion(&io->done);
	kref_get(&io->ref);
	if (way == PERSIST_HOOKED)
		stb_hook_submit_write(&io->bio);
	else
		stb_hook_submit(&io->bio);
	if (!wait_for_completion_timeout(&io->done, STB_IO_TIMEOUT)) {
		/* Its completion will run code of this module, whenever that is. */
		__module_get(THIS_MODULE);
		io_put(pio);
		return -ETIMEDOUT;
	}
	return blk_status_to_errno(io->bio.bi_status);
}

/* The piece that a page lies in. */
static struct persist_piece *place_piece(u64 page)
{
	u32 i = 0;

	while (page >= place.pieces[i].first + place.pieces[i].nr)
		i++;
	return &place.pieces[i];
}

/* Read or write pages of the place; page @page is @first of the I/O's. */
static int place_rw(u64 page, u32 first, u32 nr, blk_opf_t opf,
		    enum persist_way way)
{
	stb_assert_control();
	while (nr) {
		struct persist_piece *p = place_piece(page);
		u64 into = page - p->first;
		u32 run = min_t(u64, nr, p->nr - into);
		int ret;

		if (op_is_write(opf & REQ_OP_MASK))
			place.own_sect += run * STB_PLACE_PAGE_SECT;
		ret = io_run(&place.io, place.dev.bdev,
			     p->sector + into * STB_PLACE_PAGE_SECT, first, run,
			     opf, way);
		if (ret)
			return ret;
		page += run;
		first += run;
		nr -= run;
	}
	return 0;
}

static void place_fail(int error)
{
	if (!place.error)
		pr_err("the place of the histories cannot be used (%d): they will not be kept\n",
		       error);
	place.error = STILLBLOCK_HISTORY_PLACE_ERROR;
}

/* What we write to the place changes the devices that it lies on. */
static void place_mark_on(struct stb_tracker *t, u64 page, u64 nr)
{
	struct stb_change_map *map = stb_tracker_map(t);

	if (t->disk != place.dev.bdev->bd_disk)
		return;
	while (nr) {
		struct persist_piece *p = place_piece(page);
		u64 into = page - p->first;
		u64 run = min_t(u64, nr, p->nr - into);
		sector_t first = stb_bdev_start(place.dev.bdev) + p->sector +
				 into * STB_PLACE_PAGE_SECT;
		sector_t end = first + run * STB_PLACE_PAGE_SECT;
		struct stb_range r;

		page += run;
		nr -= run;
		if (end <= t->start || first >= t->start + map->nr_sect)
			continue;
		r.first = max(first, t->start) - t->start;
		r.end = min(end, t->start + map->nr_sect) - t->start;
		stb_change_map_mark(map, r);
	}
}

/*
 * Records.
 */

static u64 record_page(u32 index)
{
	return 1 + index;
}

static u64 map_pages(u64 nr_blocks)
{
	return DIV_ROUND_UP_ULL(nr_blocks, STB_PLACE_PAGE);
}

static bool record_right(struct stb_record *r, u32 index)
{
	u64 first = le64_to_cpu(r->first_page);
	u64 nr = le64_to_cpu(r->nr_pages);

	if (r->hash != persist_page_hash(r, sizeof(*r), &r->hash) ||
	    le32_to_cpu(r->index) != index ||
	    memcmp(r->place, place.uuid, sizeof(r->place)))
		return false;
	if (le32_to_cpu(r->state) == STB_RECORD_EMPTY)
		return true;
	return le32_to_cpu(r->state) <= STB_RECORD_DETACHED &&
	       first >= STB_PLACE_FIRST_MAP && nr && first < place.nr_pages &&
	       nr <= place.nr_pages - first &&
	       le32_to_cpu(r->nr_parts) <= STB_RECORD_PARTS;
}

static bool record_lives(u32 index)
{
	struct stb_tracker *t;
	u64 id;

	for (id = 0; (t = stb_tracker_next(id)); id = t->id)
		if (t->record == (int)index)
			return true;
	return false;
}

/*
 * Is the record's page still ours? Nobody keeps the blocks of a place that is not
 * held fast from being another file's.
 */
static int record_verify(u32 index)
{
	int ret;

	if (place.exclusive || place.file)
		return 0;
	ret = place_rw(record_page(index), 0, 1, REQ_OP_READ, PERSIST_PAST);
	if (ret)
		return ret;
	return record_right(io_page(place.io, 0), index) ? 0 : -ESTALE;
}

static int record_write(u32 index, enum stb_record_state state, blk_opf_t flags,
			enum persist_way way)
{
	struct stb_record *r = &place.records[index];
	void *page;
	int ret;

	if (place.error || !place.io)
		return -EIO;
	ret = record_verify(index);
	if (ret) {
		place_fail(ret);
		return ret;
	}
	r->state = cpu_to_le32(state);
	r->index = cpu_to_le32(index);
	memcpy(r->place, place.uuid, sizeof(r->place));
	memcpy(r->boot_id, place.boot_id, sizeof(r->boot_id));
	r->hash = persist_page_hash(r, sizeof(*r), &r->hash);
	page = io_page(place.io, 0);
	memset(page, 0, STB_PLACE_PAGE);
	memcpy(page, r, sizeof(*r));
	ret = place_rw(record_page(index), 0, 1,
		       REQ_OP_WRITE | REQ_SYNC | REQ_META | flags, way);
	if (ret)
		place_fail(ret);
	return ret;
}

/* Make the header that of this session, on stable storage after all before it. */
static int header_write(enum persist_way way)
{
	struct persist_header *h;
	int ret;

	if (place.error || !place.io)
		return -EIO;
	h = io_page(place.io, 0);
	memset(h, 0, STB_PLACE_PAGE);
	h->magic = cpu_to_le64(STB_PLACE_MAGIC);
	h->version = cpu_to_le32(STB_PLACE_VERSION);
	memcpy(h->uuid, place.uuid, sizeof(h->uuid));
	h->nr_pages = cpu_to_le64(place.nr_pages);
	h->location = cpu_to_le64(place.location);
	h->turn = cpu_to_le64(place.turn);
	h->closed = cpu_to_le64(place.closed);
	memcpy(h->boot_id, place.boot_id, sizeof(h->boot_id));
	h->hash = persist_page_hash(h, STB_PLACE_PAGE, &h->hash);
	ret = place_rw(0, 0, 1,
		       REQ_OP_WRITE | REQ_SYNC | REQ_META | REQ_PREFLUSH | REQ_FUA,
		       way);
	if (ret)
		place_fail(ret);
	return ret;
}

static int record_of(const u8 *identity)
{
	u32 i;

	for (i = 0; i < STB_PLACE_RECORDS; i++) {
		struct stb_record *r = &place.records[i];

		if (le32_to_cpu(r->state) != STB_RECORD_EMPTY &&
		    !memcmp(r->identity, identity, sizeof(r->identity)))
			return i;
	}
	return -ENOENT;
}

/* Room for a map that no record but @index has; 0 when there is none. */
static u64 place_find_room(u32 index, u64 nr)
{
	u64 first = STB_PLACE_FIRST_MAP;
	u32 i = 0;

	while (i < STB_PLACE_RECORDS) {
		struct stb_record *r = &place.records[i];
		u64 begin = le64_to_cpu(r->first_page);
		u64 end = begin + le64_to_cpu(r->nr_pages);

		if (i != index && le32_to_cpu(r->state) != STB_RECORD_EMPTY &&
		    first < end && begin < first + nr) {
			first = end;
			i = 0;
			continue;
		}
		i++;
	}
	return first + nr <= place.nr_pages ? first : 0;
}

/* Is there nothing in it that could be taken up? */
static bool record_is_void(const struct stb_record *r)
{
	switch (le32_to_cpu(r->state)) {
	case STB_RECORD_CLEAN:
		return le64_to_cpu(r->turn) != place.closed;
	case STB_RECORD_DETACHED:
		return memcmp(r->boot_id, place.boot_id, sizeof(r->boot_id));
	}
	return true;
}

/*
 * A record but @index whose room may be given away: nothing in it could be taken
 * up, and no device has it. Less than zero when there is none.
 */
static int record_spare(int index)
{
	u32 i;

	for (i = 0; i < STB_PLACE_RECORDS; i++) {
		const struct stb_record *r = &place.records[i];

		if ((int)i != index && !record_lives(i) &&
		    !test_bit(i, place.damaged) && record_is_void(r) &&
		    le32_to_cpu(r->state) != STB_RECORD_EMPTY)
			return i;
	}
	return -ENOENT;
}

static int record_find_empty(void)
{
	u32 i;

	for (i = 0; i < STB_PLACE_RECORDS; i++)
		if (le32_to_cpu(place.records[i].state) == STB_RECORD_EMPTY &&
		    !record_lives(i) && !test_bit(i, place.damaged))
			return i;
	return -ENOENT;
}

/* A record for a new history, and room for its map. */
static int record_alloc(int index, u64 nr)
{
	struct stb_record *r;
	u64 first = 0;
	int spare;

	for (;;) {
		if (index < 0)
			index = record_find_empty();
		if (index >= 0)
			first = place_find_room(index, nr);
		if (first)
			break;
		spare = record_spare(index);
		if (spare < 0)
			return -ENOSPC;
		/* On the device, too: its room is somebody else's from now on. */
		if (record_write(spare, STB_RECORD_EMPTY, 0, PERSIST_HOOKED))
			return -EIO;
	}
	r = &place.records[index];
	memset(r, 0, sizeof(*r));
	r->first_page = cpu_to_le64(first);
	r->nr_pages = cpu_to_le64(nr);
	return index;
}

/*
 * Fingerprints.
 */

static bool head_is(const u8 *head, u32 at, const char *magic, u32 len)
{
	return !memcmp(head + at, magic, len);
}

/* Does the content of a file system's head change with every mount and write? */
static bool head_is_witness(const u8 *head)
{
	return head_is(head, 1080, "\x53\xef", 2) ||
	       head_is(head, 0, "XFSB", 4) ||
	       head_is(head, 82, "FAT32", 5);
}

/* Does something lie there whose content does not show at this place? */
static bool head_is_container(const u8 *head)
{
	u32 sect;

	for (sect = 0; sect < 4; sect++)
		if (head_is(head, sect * SECTOR_SIZE, "LABELONE", 8))
			return true;
	return head_is(head, 0, "LUKS\xba\xbe", 6) ||
	       head_is(head, 0, "\xfc\x4e\x2b\xa9", 4);
}

/* Our own pages differ between the moment of the fingerprint and the next boot. */
static bool place_touches(struct stb_tracker *t, sector_t sector, u32 nr_sect)
{
	sector_t first = t->start + sector, end = first + nr_sect;
	u32 i;

	if (t->disk != place.dev.bdev->bd_disk)
		return false;
	for (i = 0; i < place.nr_pieces; i++) {
		struct persist_piece *p = &place.pieces[i];
		sector_t from = stb_bdev_start(place.dev.bdev) + p->sector;

		if (first < from + p->nr * STB_PLACE_PAGE_SECT && from < end)
			return true;
	}
	return false;
}

/* Read a page of the device into page @to of the I/O; zeroes where it ends. */
static int origin_read(struct stb_tracker *t, sector_t nr_sect, sector_t sector,
		       u32 to)
{
	memset(io_page(place.origin_io, to), 0, STB_PLACE_PAGE);
	if (sector + STB_HEAD_SECT > nr_sect ||
	    place_touches(t, sector, STB_HEAD_SECT))
		return 0;
	return io_run(&place.origin_io, t->dev.bdev, sector, to, 1, REQ_OP_READ,
		      PERSIST_PAST);
}

/* Where the log of an XFS lies, as its superblock has it. */
struct xfs_log {
	sector_t sector;
	u64 nr_pages;
};

/* Return: false without a log in the device itself. */
static bool xfs_find_log(const u8 *head, sector_t nr_sect, sector_t sector,
			 struct xfs_log *log)
{
	u64 start = be64_to_cpup((const __be64 *)(head + 48));
	u64 ag_blocks = be32_to_cpup((const __be32 *)(head + 84));
	u64 blocks = be32_to_cpup((const __be32 *)(head + 96));
	u8 block_log = head[120], ag_log = head[124];
	u64 first;

	if (!start || block_log < SECTOR_SHIFT || block_log > 16 ||
	    ag_log > 31 || start >> ag_log > U32_MAX)
		return false;
	first = (start >> ag_log) * ag_blocks + (start & ((1ull << ag_log) - 1));
	if (first > nr_sect || blocks > nr_sect)
		return false;
	log->sector = sector + (first << (block_log - SECTOR_SHIFT));
	log->nr_pages = (blocks << block_log) / STB_PLACE_PAGE;
	return log->nr_pages > 1 && log->sector <= nr_sect &&
	       log->nr_pages * STB_PLACE_PAGE_SECT <= nr_sect - log->sector;
}

static int xfs_log_read(struct stb_tracker *t, sector_t nr_sect,
			const struct xfs_log *log, u64 page, u32 to)
{
	if (!place.origin_io)
		return -EIO;
	return origin_read(t, nr_sect, log->sector + page * STB_PLACE_PAGE_SECT,
			   to);
}

static u32 xfs_log_cycle(const void *page)
{
	const __be32 *words = page;
	u32 first = be32_to_cpu(words[0]);

	return first == STB_XFS_LOG_MAGIC ? be32_to_cpu(words[1]) : first;
}

/*
 * Add the pages of XFS's log that the next write to it changes: those around its
 * head, where the cycle of what lies there becomes another one. The superblock
 * alone does not show a mount that had no clean end.
 */
static int fingerprint_xfs(struct stb_tracker *t, sector_t nr_sect,
			   const struct xfs_log *log, u64 *hash)
{
	u64 low = 0, high = log->nr_pages;
	u32 cycle, i;
	int ret;

	ret = xfs_log_read(t, nr_sect, log, 0, 2);
	if (ret)
		return ret;
	cycle = xfs_log_cycle(io_page(place.origin_io, 2));
	/* The first page of another cycle is behind @low, and @high at most. */
	while (low + 1 < high) {
		u64 middle = low + (high - low) / 2;

		ret = xfs_log_read(t, nr_sect, log, middle, 3);
		if (ret)
			return ret;
		if (xfs_log_cycle(io_page(place.origin_io, 3)) == cycle)
			low = middle;
		else
			high = middle;
	}
	ret = xfs_log_read(t, nr_sect, log, low, 3);
	if (!ret)
		ret = xfs_log_read(t, nr_sect, log,
				   high == log->nr_pages ? 0 : high, 4);
	if (ret)
		return ret;
	for (i = 2; i <= 4; i++)
		*hash = persist_hash(io_page(place.origin_io, i),
				     STB_PLACE_PAGE, *hash);
	return 0;
}

/* Add the heads of what begins at a sector. */
static int fingerprint_head(struct stb_tracker *t, sector_t nr_sect,
			    sector_t sector, u64 *hash, u32 *witnesses,
			    u32 *refusal)
{
	struct xfs_log log;
	u8 *head;
	int ret = place.origin_io ? 0 : -EIO;

	if (!ret)
		ret = origin_read(t, nr_sect, sector, 0);
	if (!ret)
		ret = origin_read(t, nr_sect, sector + STB_BTRFS_HEAD, 1);
	if (ret)
		return ret;
	*hash = persist_hash(io_page(place.origin_io, 0), STB_PLACE_PAGE, *hash);
	*hash = persist_hash(io_page(place.origin_io, 1), STB_PLACE_PAGE, *hash);
	head = io_page(place.origin_io, 0);
	if (head_is_container(head) ||
	    head_is(io_page(place.origin_io, 1), 0, "\xfc\x4e\x2b\xa9", 4))
		*refusal = STILLBLOCK_HISTORY_CONTAINER;
	if (head_is(io_page(place.origin_io, 1), 64, "_BHRfS_M", 8) ||
	    head_is_witness(head))
		(*witnesses)++;
	if (!head_is(head, 0, "XFSB", 4))
		return 0;
	if (xfs_find_log(head, nr_sect, sector, &log))
		return fingerprint_xfs(t, nr_sect, &log, hash);
	*refusal = STILLBLOCK_HISTORY_NO_WITNESS;
	return 0;
}

/*
 * The fingerprint of a device: its first and last pages, which have partition
 * tables, and the heads of its partitions, which have superblocks. Whoever
 * mounts and writes changes a superblock; where there is none that could change,
 * or where file systems lie within something whose layout we do not know, there
 * is no fingerprint.
 *
 * Return: enum stillblock_history, 0 with the fingerprint.
 */
static u32 fingerprint_take(struct stb_tracker *t, struct stb_record *r)
{
	sector_t nr_sect = le64_to_cpu(r->nr_sect);
	u32 i, witnesses = 0, refusal = 0;
	u64 hash = nr_sect;
	int ret;

	/* The one before may have been left behind in a device that hung. */
	if (!place.origin_io)
		place.origin_io = io_create();
	ret = fingerprint_head(t, nr_sect, 0, &hash, &witnesses, &refusal);
	for (i = 0; i < le32_to_cpu(r->nr_parts) && !ret; i++)
		ret = fingerprint_head(t, nr_sect, le64_to_cpu(r->parts[i]),
				       &hash, &witnesses, &refusal);
	/* The table of a GPT, and its copy at the end. */
	for (i = 1; i <= 4 && !ret && le32_to_cpu(r->nr_parts); i++) {
		ret = origin_read(t, nr_sect, i * STB_HEAD_SECT, 0);
		if (!ret)
			ret = origin_read(t, nr_sect,
					  nr_sect - (i + 1) * STB_HEAD_SECT, 1);
		if (ret)
			break;
		hash = persist_hash(io_page(place.origin_io, 0), STB_PLACE_PAGE,
				    hash);
		hash = persist_hash(io_page(place.origin_io, 1), STB_PLACE_PAGE,
				    hash);
	}
	if (ret)
		return STILLBLOCK_HISTORY_ORIGIN_ERROR;
	if (refusal)
		return refusal;
	if (!witnesses)
		return STILLBLOCK_HISTORY_NO_WITNESS;
	r->fingerprint = cpu_to_le64(hash);
	return 0;
}

/* Where partitions begin, as the kernel knows them now. */
static bool fingerprint_parts(struct stb_tracker *t, struct stb_record *r)
{
	u64 starts[STB_RECORD_PARTS];
	int i, nr = 0;

	if (!t->start && t->dev.bdev == stb_whole(t->dev.bdev))
		nr = stb_disk_parts(t->disk, starts, STB_RECORD_PARTS);
	if (nr < 0)
		return false;
	for (i = 0; i < nr; i++)
		r->parts[i] = cpu_to_le64(starts[i]);
	r->nr_parts = cpu_to_le32(nr);
	return true;
}

/* Is there what shows who has written? Return: enum stillblock_history. */
static u32 fingerprint_try(struct stb_tracker *t)
{
	struct stb_record *r = kzalloc(sizeof(*r), GFP_KERNEL);
	u32 refusal = STILLBLOCK_HISTORY_NO_WITNESS;

	if (!r)
		return STILLBLOCK_HISTORY_NO_MEMORY;
	r->nr_sect = cpu_to_le64(stb_tracker_map(t)->nr_sect);
	if (fingerprint_parts(t, r))
		refusal = fingerprint_take(t, r);
	kfree(r);
	return refusal;
}

/* Somebody may have made a file system since the last time. */
static void kept_try(struct stb_tracker *t)
{
	t->kept = fingerprint_try(t);
	t->kept_tried = jiffies;
}

/* Sectors written to a tracker's disk in this boot by others than us. */
static u64 disk_foreign(struct stb_tracker *t)
{
	u64 nr = stb_disk_written_sect(t->disk);

	if (t->disk == place.dev.bdev->bd_disk)
		nr -= place.own_sect;
	return nr;
}

/*
 * Attach.
 */

static bool place_usable(struct stb_tracker *t)
{
	if (!place.set)
		t->kept = place.refusal;
	else if (place.error)
		t->kept = place.error;
	else if (!memchr_inv(t->identity, 0, sizeof(t->identity)))
		t->kept = STILLBLOCK_HISTORY_NO_IDENTITY;
	else
		return true;
	return false;
}

/*
 * Give a tracker without a record one that is in use.
 * @saved: what lay there before; its state says what it is worth
 * Return: enum stillblock_history
 */
static u32 record_claim(struct stb_tracker *t, struct stb_record *saved)
{
	struct stb_change_map *map = stb_tracker_map(t);
	u64 nr = map_pages(map->nr_blocks);
	int index = record_of(t->identity);
	struct stb_record *r;

	memset(saved, 0, sizeof(*saved));
	if (index >= 0) {
		if (record_lives(index))
			return STILLBLOCK_HISTORY_SAME_IDENTITY;
		*saved = place.records[index];
	}
	/* The same room for a map of the same size: it is there still. */
	if (index < 0 || le64_to_cpu(saved->nr_pages) != nr) {
		index = record_alloc(index, nr);
		if (index < 0)
			return index == -ENOSPC ? STILLBLOCK_HISTORY_PLACE_FULL :
						  STILLBLOCK_HISTORY_PLACE_ERROR;
	}
	r = &place.records[index];
	memcpy(r->identity, t->identity, sizeof(r->identity));
	r->nr_sect = cpu_to_le64(map->nr_sect);
	r->block_shift = cpu_to_le32(map->block_shift);
	if (record_write(index, STB_RECORD_IN_USE, REQ_PREFLUSH | REQ_FUA,
			 PERSIST_HOOKED))
		return STILLBLOCK_HISTORY_PLACE_ERROR;
	t->record = index;
	return 0;
}

/* Why the history that was kept is not this device's, as far as it tells itself. */
static u32 record_refusal(struct stb_tracker *t, const struct stb_record *saved)
{
	struct stb_change_map *map = stb_tracker_map(t);

	if (le32_to_cpu(saved->state) == STB_RECORD_EMPTY)
		return place.nr_damaged ? STILLBLOCK_HISTORY_DAMAGED :
					  STILLBLOCK_HISTORY_FIRST;
	if (record_is_void(saved))
		return STILLBLOCK_HISTORY_NOT_SAVED;
	if (le64_to_cpu(saved->nr_sect) != map->nr_sect)
		return STILLBLOCK_HISTORY_RESIZED;
	if (le32_to_cpu(saved->block_shift) != map->block_shift)
		return STILLBLOCK_HISTORY_BLOCK_SIZE;
	/* What is not ours may have the right hash, and reach beyond the place. */
	if (le64_to_cpu(saved->nr_pages) != map_pages(map->nr_blocks))
		return STILLBLOCK_HISTORY_DAMAGED;
	return 0;
}

/**
 * stb_persist_claim() - say that a device is in use, before it is
 * @t: tracker that the hook does not know yet
 *
 * Context: control mutex held.
 * Return: the history that was kept of it, which the caller gives to
 * stb_persist_attached() while all writes of the device are held; or NULL.
 */
struct stb_record *stb_persist_claim(struct stb_tracker *t)
{
	struct stb_change_map *map = stb_tracker_map(t);
	struct stb_record *saved;
	u32 refusal;

	stb_assert_control();
	if (!place_usable(t)) {
		map->began = t->kept;
		return NULL;
	}
	saved = kmalloc(sizeof(*saved), GFP_KERNEL);
	if (!saved) {
		t->kept = STILLBLOCK_HISTORY_NO_MEMORY;
		map->began = t->kept;
		return NULL;
	}
	t->kept = record_claim(t, saved);
	refusal = t->kept ?: record_refusal(t, saved);
	if (!t->kept)
		kept_try(t);
	if (refusal) {
		/* It was not saved because it never is. */
		map->began = refusal == STILLBLOCK_HISTORY_NOT_SAVED && t->kept ?
			     t->kept : refusal;
		kfree(saved);
		return NULL;
	}
	return saved;
}

/* Read the kept map into @map; what is wrong leaves it empty. */
static u32 map_load(struct stb_change_map *map, const struct stb_record *saved)
{
	u64 page = le64_to_cpu(saved->first_page);
	u64 left = map->nr_blocks, done = 0, hash = 0;
	u32 number = le32_to_cpu(saved->number);
	u32 refusal = 0;
	u64 i;

	while (left && !refusal) {
		u32 nr = min_t(u64, map_pages(left), STB_IO_PAGES);
		int ret = place_rw(page, 0, nr, REQ_OP_READ, PERSIST_PAST);
		u32 n;

		if (ret) {
			place_fail(ret);
			refusal = STILLBLOCK_HISTORY_PLACE_ERROR;
			break;
		}
		for (n = 0; n < nr; n++) {
			u64 len = min_t(u64, left, STB_PLACE_PAGE);

			memcpy(map->numbers + done, io_page(place.io, n), len);
			hash = persist_hash(io_page(place.io, n),
					    STB_PLACE_PAGE, hash);
			done += len;
			left -= len;
		}
		page += nr;
		cond_resched();
	}
	if (!refusal && (hash != le64_to_cpu(saved->map_hash) || !number ||
			 number > STILLBLOCK_MAX_NUMBER))
		refusal = STILLBLOCK_HISTORY_DAMAGED;
	for (i = 0; i < map->nr_blocks && !refusal; i++)
		if (map->numbers[i] > number)
			refusal = STILLBLOCK_HISTORY_DAMAGED;
	if (refusal)
		memset(map->numbers, 0, map->nr_blocks);
	return refusal;
}

/* Could anybody have written since? Then take the history up. */
static u32 map_take_up(struct stb_tracker *t, struct stb_record *saved)
{
	bool detached = le32_to_cpu(saved->state) == STB_RECORD_DETACHED;
	struct stb_change_map *map = stb_tracker_map(t);
	__le64 fingerprint = saved->fingerprint;
	u32 refusal;

	if (!blk_queue_io_stat(t->disk->queue) ||
	    disk_foreign(t) != (detached ? le64_to_cpu(saved->foreign) : 0))
		return STILLBLOCK_HISTORY_WRITTEN;
	refusal = fingerprint_take(t, saved);
	if (refusal)
		return refusal;
	if (fingerprint != saved->fingerprint)
		return STILLBLOCK_HISTORY_CHANGED;
	refusal = map_load(map, saved);
	if (refusal)
		return refusal;
	memcpy(&map->generation, saved->generation, sizeof(saved->generation));
	map->number = le32_to_cpu(saved->number);
	map->began = le32_to_cpu(saved->began);
	/*
	 * What we have written to the device before it was tracked again: its own
	 * record, and those of others that were attached earlier.
	 */
	place_mark_on(t, 0, place.maps_written ? place.nr_pages :
						 STB_PLACE_FIRST_MAP);
	t->taken_up = true;
	return 0;
}

/**
 * stb_persist_attached() - take a kept history up
 * @t: tracker that the hook knows; in STB_GATE if there is @saved
 * @saved: from stb_persist_claim(), freed here
 *
 * Context: control mutex held.
 */
void stb_persist_attached(struct stb_tracker *t, struct stb_record *saved)
{
	u32 refusal;

	stb_assert_control();
	if (!saved)
		return;
	/* Who was on the way when the hook learned of it is in the figures now. */
	if (stb_tracker_gate(t, jiffies + STB_LAST_WRITES))
		refusal = STILLBLOCK_HISTORY_WRITTEN;
	else
		refusal = map_take_up(t, saved);
	if (refusal)
		stb_tracker_map(t)->began = refusal;
	stb_tracker_ungate(t);
	kfree(saved);
}

/* Give a tracker a record that is in use: it has none yet. */
static void place_adopt(struct stb_tracker *t)
{
	struct stb_record *saved;

	if (!place_usable(t))
		return;
	saved = kmalloc(sizeof(*saved), GFP_KERNEL);
	t->kept = saved ? record_claim(t, saved) : STILLBLOCK_HISTORY_NO_MEMORY;
	if (!t->kept)
		kept_try(t);
	kfree(saved);
}

/**
 * stb_persist_resized() - the device has another size, its map another length
 * @t: tracker
 *
 * Context: control mutex held.
 */
void stb_persist_resized(struct stb_tracker *t)
{
	stb_assert_control();
	if (t->record < 0)
		return;
	t->record = -1;
	t->taken_up = false;
	place_adopt(t);
}

/**
 * stb_persist_forget() - a tracker goes, and its history with it
 * @t: tracker that the hook does not know
 *
 * Context: control mutex held.
 */
void stb_persist_forget(struct stb_tracker *t)
{
	stb_assert_control();
	if (t->record >= 0)
		record_write(t->record, STB_RECORD_EMPTY, 0, PERSIST_HOOKED);
	t->record = -1;
}

/* As stb_persist_kept(), with @anew whatever was found out a moment ago. */
static u32 kept_now(struct stb_tracker *t, bool anew)
{
	if (t->record < 0)
		return t->kept ?: place.refusal;
	if (place.error)
		return place.error;
	if (!place.exclusive && !place.file)
		return STILLBLOCK_HISTORY_PLACE_LOOSE;
	if (t->kept && !place.sealed &&
	    (anew || time_after(jiffies, t->kept_tried + STB_KEPT_RETRY)))
		kept_try(t);
	return t->kept;
}

/**
 * stb_persist_kept() - why will a history not be kept over a reboot?
 * @t: tracker
 *
 * Context: control mutex held.
 * Return: enum stillblock_history.
 */
u32 stb_persist_kept(struct stb_tracker *t)
{
	stb_assert_control();
	return kept_now(t, false);
}

/**
 * stb_persist_sealed() - is the machine going down?
 *
 * Context: control mutex held.
 * Return: true once every write is held for ever.
 */
bool stb_persist_sealed(void)
{
	stb_assert_control();
	return place.sealed;
}

/*
 * The clean path.
 */

/*
 * Write the map, and make the record @state. All writes of the device are held, or
 * were when record_prepare() was called.
 */
static u32 record_keep(struct stb_tracker *t, enum stb_record_state state,
		       enum persist_way way)
{
	struct stb_change_map *map = stb_tracker_map(t);
	struct stb_record *r = &place.records[t->record];
	u64 page = le64_to_cpu(r->first_page);
	u64 left = map->nr_blocks, done = 0, hash = 0;
	u32 refusal;

	if (map_pages(left) > le64_to_cpu(r->nr_pages))
		return STILLBLOCK_HISTORY_PLACE_FULL;
	r->nr_sect = cpu_to_le64(map->nr_sect);
	if (stb_bdev_nr_sect(t->dev.bdev) != map->nr_sect)
		return STILLBLOCK_HISTORY_RESIZED;
	if (!fingerprint_parts(t, r))
		return STILLBLOCK_HISTORY_NO_WITNESS;
	refusal = fingerprint_take(t, r);
	if (refusal)
		return refusal;
	while (left) {
		u32 nr = min_t(u64, map_pages(left), STB_IO_PAGES);
		u32 n;
		int ret;

		if (!place.io)
			return STILLBLOCK_HISTORY_PLACE_ERROR;
		for (n = 0; n < nr; n++) {
			u64 len = min_t(u64, left, STB_PLACE_PAGE);
			u8 *to = io_page(place.io, n);

			memcpy(to, map->numbers + done, len);
			memset(to + len, 0, STB_PLACE_PAGE - len);
			hash = persist_hash(to, STB_PLACE_PAGE, hash);
			done += len;
			left -= len;
		}
		place.maps_written = true;
		ret = place_rw(page, 0, nr, REQ_OP_WRITE | REQ_SYNC, way);
		if (ret) {
			place_fail(ret);
			return STILLBLOCK_HISTORY_PLACE_ERROR;
		}
		page += nr;
	}
	memcpy(r->generation, &map->generation, sizeof(r->generation));
	r->map_hash = cpu_to_le64(hash);
	r->block_shift = cpu_to_le32(map->block_shift);
	r->number = cpu_to_le32(map->number);
	r->began = cpu_to_le32(map->began);
	r->turn = cpu_to_le64(place.turn);
	return record_write(t->record, state, REQ_PREFLUSH | REQ_FUA, way) ?
	       STILLBLOCK_HISTORY_PLACE_ERROR : 0;
}

/* All writes of the device are held from here on, or will be found out by this. */
static void record_prepare(struct stb_tracker *t)
{
	place.records[t->record].foreign = cpu_to_le64(disk_foreign(t));
}

/* What record_keep() of @t will write is a change of @on, which is held. */
static void record_mark_on(struct stb_tracker *on, struct stb_tracker *t)
{
	struct stb_change_map *map = stb_tracker_map(t);

	place_mark_on(on, record_page(t->record), 1);
	place_mark_on(on, le64_to_cpu(place.records[t->record].first_page),
		      map_pages(map->nr_blocks));
}

static bool place_is_held(void)
{
	return place.set && !place.error && (place.exclusive || place.file);
}

/**
 * stb_persist_prepare() - prepare to keep the history of a tracker that goes
 * @t: tracker, of which all writes are held
 *
 * Context: control mutex held.
 */
void stb_persist_prepare(struct stb_tracker *t)
{
	stb_assert_control();
	if (t->record < 0)
		return;
	record_mark_on(t, t);
	record_prepare(t);
}

/**
 * stb_persist_keep() - keep the history of a tracker that goes
 * @t: tracker that the hook does not know any more
 *
 * Context: control mutex held.
 */
void stb_persist_keep(struct stb_tracker *t)
{
	stb_assert_control();
	if (t->record >= 0 && place_is_held())
		record_keep(t, STB_RECORD_DETACHED, PERSIST_HOOKED);
	t->record = -1;
}

static void persist_seal(void)
{
	unsigned long limit = jiffies + STB_LAST_WRITES;
	struct stb_tracker *t;
	u64 id;

	for (id = 0; (t = stb_tracker_next(id)); id = t->id) {
		if (t->snapshot)
			stb_snapshot_abandon(t->snapshot);
		t->kept = kept_now(t, true);
	}
	/*
	 * All at once, stacked or not. A write that has been passed is marked;
	 * one that a lower device holds from now on never reaches it. What is not
	 * kept is not held: the place may lie above it.
	 */
	place.sealed = true;
	for (id = 0; (t = stb_tracker_next(id)); id = t->id)
		if (!t->kept)
			stb_tracker_set_mode(t, STB_GATE, NULL);
	synchronize_rcu_expedited();
	for (id = 0; (t = stb_tracker_next(id)); id = t->id) {
		if (t->kept)
			continue;
		flush_work(&t->work);
		/* For the fingerprint alone, which would differ otherwise. */
		while (stb_tracker_inflight(t) && time_before(jiffies, limit))
			usleep_range(100, 200);
	}
}

static void persist_save(struct work_struct *work);
static DECLARE_WORK(save_work, persist_save);
static DECLARE_COMPLETION(save_done);

static void persist_save(struct work_struct *work)
{
	struct stb_tracker *t, *on;
	u64 id, other;
	u32 refusal;

	stb_control_lock();
	if (!place_is_held() || place.sealed || hibernates)
		goto unlock;
	persist_seal();
	for (id = 0; (t = stb_tracker_next(id)); id = t->id) {
		if (t->kept)
			continue;
		record_prepare(t);
		place_mark_on(t, 0, 1);
		for (other = 0; (on = stb_tracker_next(other)); other = on->id)
			record_mark_on(on, t);
	}
	for (id = 0; (t = stb_tracker_next(id)); id = t->id) {
		refusal = t->kept ?: record_keep(t, STB_RECORD_CLEAN,
						 PERSIST_PAST);
		if (refusal)
			pr_warn("%pg: history not kept (reason %u)\n",
				t->dev.bdev, refusal);
		else
			pr_info("%pg: history kept, generation %pU\n",
				t->dev.bdev, &stb_tracker_map(t)->generation);
	}
	place.closed = place.turn;
	header_write(PERSIST_PAST);
unlock:
	stb_control_unlock();
	complete_all(&save_done);
}

/*
 * Last of all notifiers: md writes its superblocks in one. Whoever hangs, the
 * reboot goes on.
 */
static int persist_reboot(struct notifier_block *nb, unsigned long action,
			  void *data)
{
	queue_work(stb_wq, &save_work);
	if (!wait_for_completion_timeout(&save_done,
					 msecs_to_jiffies(save_timeout_ms)))
		pr_err("histories not kept within %u ms\n", save_timeout_ms);
	return NOTIFY_DONE;
}

static struct notifier_block persist_notifier = {
	.notifier_call = persist_reboot,
	.priority = INT_MIN,
};

/*
 * A hibernation powers the machine off, too, but its end is no end: file systems
 * stay mounted, and go on from where memory says. What was kept on disk then
 * would be believed after a crash that comes later.
 */
static int persist_pm(struct notifier_block *nb, unsigned long action,
		      void *data)
{
	if (action == PM_HIBERNATION_PREPARE || action == PM_POST_HIBERNATION) {
		stb_control_lock();
		hibernates = action == PM_HIBERNATION_PREPARE;
		stb_control_unlock();
	}
	return NOTIFY_DONE;
}

static struct notifier_block persist_pm_notifier = {
	.notifier_call = persist_pm,
};

/*
 * The place.
 */

static void place_release(void)
{
	stb_assert_control();
	if (place.file) {
		stb_file_unpin(place.file);
		fput(place.file);
	}
	if (place.dev.bdev)
		stb_bdev_close(&place.dev);
	kvfree(place.pieces);
	kvfree(place.records);
	io_put(&place.io);
	io_put(&place.origin_io);
	place = (struct persist_place){
		.refusal = STILLBLOCK_HISTORY_NO_PLACE,
	};
}

/* Pin a file and keep it open for reading. */
static int place_pin(int fd)
{
	struct file *file = fget(fd), *held;
	struct inode *inode;
	int ret;

	if (!file)
		return -EBADF;
	inode = file_inode(file);
	if (!S_ISREG(inode->i_mode) || !(file->f_mode & FMODE_WRITE) ||
	    inode->i_sb->s_bdev != place.dev.bdev ||
	    inode->i_sb->s_magic == BTRFS_SUPER_MAGIC) {
		fput(file);
		return -EINVAL;
	}
	held = dentry_open(&file->f_path, O_RDONLY, current_cred());
	fput(file);
	if (IS_ERR(held))
		return PTR_ERR(held);
	ret = stb_file_pin(held);
	if (ret) {
		fput(held);
		return ret;
	}
	place.file = held;
	bitmap_zero(place.damaged, STB_PLACE_RECORDS);
	return 0;
}

/* Add what whole pages there are to pieces; what goes on from the last is one. */
static void pieces_add(struct persist_piece *pieces, u32 *nr_pieces,
		       struct block_device *bdev, struct stb_range r)
{
	u32 align = max_t(u32, bdev_logical_block_size(bdev), STB_PLACE_PAGE) >>
		    SECTOR_SHIFT;
	struct persist_piece *last = *nr_pieces ? &pieces[*nr_pieces - 1] : NULL;
	struct persist_piece *p = &pieces[*nr_pieces];
	u64 nr;

	r.first = round_up(r.first, align);
	if (r.first + STB_PLACE_PAGE_SECT > r.end)
		return;
	nr = (r.end - r.first) / STB_PLACE_PAGE_SECT;
	if (last && last->sector + last->nr * STB_PLACE_PAGE_SECT == r.first) {
		last->nr += nr;
		return;
	}
	p->first = last ? last->first + last->nr : 0;
	p->nr = nr;
	p->sector = r.first;
	(*nr_pieces)++;
}

static int pieces_read_extents(const struct stillblock_place *args,
			       struct block_device *bdev,
			       struct persist_piece *pieces, u32 *nr_pieces)
{
	const struct stillblock_extent __user *from =
		u64_to_user_ptr(args->extents);
	u64 size = (u64)stb_bdev_nr_sect(bdev) << SECTOR_SHIFT;
	struct stb_range r;
	u32 i;

	if (!args->nr_extents) {
		r.first = STB_PLACE_MARGIN;
		r.end = size >> SECTOR_SHIFT;
		r.end -= min_t(sector_t, r.end, STB_PLACE_MARGIN);
		pieces_add(pieces, nr_pieces, bdev, r);
	}
	for (i = 0; i < args->nr_extents; i++) {
		struct stillblock_extent e;

		if (copy_from_user(&e, from + i, sizeof(e)))
			return -EFAULT;
		if (e.offset > size || e.length > size - e.offset)
			return -ERANGE;
		r.first = DIV_ROUND_UP_ULL(e.offset, SECTOR_SIZE);
		r.end = (e.offset + e.length) >> SECTOR_SHIFT;
		pieces_add(pieces, nr_pieces, bdev, r);
	}
	return 0;
}

/* Where the place lies that the caller describes: @ppieces is for kvfree(). */
static int pieces_read(const struct stillblock_place *args,
		       struct block_device *bdev,
		       struct persist_piece **ppieces, u32 *nr_pieces)
{
	struct persist_piece *pieces;
	int ret;

	*nr_pieces = 0;
	if (args->nr_extents > STILLBLOCK_MAX_EXTENTS)
		return -EINVAL;
	pieces = kvcalloc(max(args->nr_extents, 1u), sizeof(*pieces),
			  GFP_KERNEL);
	if (!pieces)
		return -ENOMEM;
	ret = pieces_read_extents(args, bdev, pieces, nr_pieces);
	if (ret)
		kvfree(pieces);
	else
		*ppieces = pieces;
	return ret;
}

static u64 pieces_hash(const struct persist_piece *pieces, u32 nr_pieces)
{
	u64 hash = 0;
	u32 i;

	for (i = 0; i < nr_pieces; i++) {
		hash = persist_hash(&pieces[i].sector, sizeof(pieces[i].sector),
				    hash);
		hash = persist_hash(&pieces[i].nr, sizeof(pieces[i].nr), hash);
	}
	return hash;
}

static int place_read_extents(const struct stillblock_place *args)
{
	const struct persist_piece *last;
	int ret;

	ret = pieces_read(args, place.dev.bdev, &place.pieces,
			  &place.nr_pieces);
	if (ret)
		return ret;
	if (place.nr_pieces) {
		last = &place.pieces[place.nr_pieces - 1];
		place.nr_pages = last->first + last->nr;
	}
	place.location = pieces_hash(place.pieces, place.nr_pieces);
	return place.nr_pages > STB_PLACE_FIRST_MAP ? 0 : -ENOSPC;
}

static u32 place_read_header(void)
{
	struct persist_header *h = io_page(place.io, 0);

	if (place_rw(0, 0, 1, REQ_OP_READ, PERSIST_PAST))
		return STILLBLOCK_HISTORY_PLACE_ERROR;
	if (le64_to_cpu(h->magic) != STB_PLACE_MAGIC)
		return STILLBLOCK_HISTORY_PLACE_EMPTY;
	if (le32_to_cpu(h->version) != STB_PLACE_VERSION)
		return STILLBLOCK_HISTORY_PLACE_VERSION;
	if (h->hash != persist_page_hash(h, STB_PLACE_PAGE, &h->hash) ||
	    le64_to_cpu(h->nr_pages) != place.nr_pages ||
	    le64_to_cpu(h->location) != place.location)
		return STILLBLOCK_HISTORY_PLACE_DAMAGED;
	memcpy(place.uuid, h->uuid, sizeof(place.uuid));
	place.turn = le64_to_cpu(h->turn) + 1;
	if (h->closed == h->turn ||
	    !memcmp(h->boot_id, place.boot_id, sizeof(h->boot_id)))
		place.closed = le64_to_cpu(h->closed);
	return 0;
}

static u32 place_read_records(void)
{
	u32 i;

	if (place_rw(record_page(0), 0, STB_PLACE_RECORDS, REQ_OP_READ,
		     PERSIST_PAST))
		return STILLBLOCK_HISTORY_PLACE_ERROR;
	for (i = 0; i < STB_PLACE_RECORDS; i++) {
		struct stb_record *r = &place.records[i];

		memcpy(r, io_page(place.io, i), sizeof(*r));
		if (record_right(r, i))
			continue;
		memset(r, 0, sizeof(*r));
		place.nr_damaged++;
		if (!place.exclusive && !place.file)
			set_bit(i, place.damaged);
	}
	return header_write(PERSIST_HOOKED) ? STILLBLOCK_HISTORY_PLACE_ERROR : 0;
}

static u32 place_format(void)
{
	u32 i;

	generate_random_uuid(place.uuid);
	place.turn = 1;
	for (i = 0; i < STB_PLACE_RECORDS; i++)
		if (record_write(i, STB_RECORD_EMPTY, 0, PERSIST_HOOKED))
			return STILLBLOCK_HISTORY_PLACE_ERROR;
	return header_write(PERSIST_HOOKED) ? STILLBLOCK_HISTORY_PLACE_ERROR : 0;
}

/* Set the place that the caller describes; what is left behind is released. */
static int place_open(const struct stillblock_place *args, u32 *reason)
{
	dev_t dev;
	int ret;

	*reason = STILLBLOCK_REASON_PLACE_UNSUITABLE;
	if (!memchr_inv(args->boot_id, 0, sizeof(args->boot_id))) {
		pr_err("a place of histories needs the id of this boot: zeroes would be that of every boot\n");
		return -EINVAL;
	}
	*reason = STILLBLOCK_REASON_NOT_BLOCK_DEVICE;
	ret = stb_dev_of_fd(args->bdev_fd, &dev);
	if (ret)
		return ret;
	place.exclusive = !args->nr_extents && args->file_fd < 0;
	*reason = STILLBLOCK_REASON_STORE_BUSY;
	/*
	 * Bios need no open for writing, and one could keep the file system of
	 * the file from being mounted.
	 */
	ret = place.exclusive ?
	      stb_bdev_open(dev, STB_OPEN_READ | STB_OPEN_WRITE, &place,
			    &place.dev) :
	      stb_bdev_open(dev, STB_OPEN_READ, NULL, &place.dev);
	if (ret) {
		place.dev.bdev = NULL;
		return ret;
	}
	*reason = STILLBLOCK_REASON_PLACE_UNSUITABLE;
	if (bdev_is_zoned(place.dev.bdev) ||
	    bdev_logical_block_size(place.dev.bdev) > STB_PLACE_PAGE)
		return -EOPNOTSUPP;
	ret = place_read_extents(args);
	if (ret)
		return ret;
	*reason = STILLBLOCK_REASON_NO_MEMORY;
	place.records = kvcalloc(STB_PLACE_RECORDS, sizeof(*place.records),
				 GFP_KERNEL);
	place.io = io_create();
	place.origin_io = io_create();
	if (!place.records || !place.io || !place.origin_io)
		return -ENOMEM;
	memcpy(place.boot_id, args->boot_id, sizeof(place.boot_id));
	*reason = STILLBLOCK_REASON_PLACE_UNSUITABLE;
	return args->file_fd < 0 ? 0 : place_pin(args->file_fd);
}

/* Everything that is tracked is kept from now on. */
static void place_adopt_all(void)
{
	struct stb_tracker *t;
	u64 id;

	for (id = 0; (t = stb_tracker_next(id)); id = t->id) {
		t->record = -1;
		place_adopt(t);
	}
}

static int place_set(struct stillblock_place *args)
{
	bool format = args->flags & STILLBLOCK_PLACE_FORMAT;
	int ret;

	ret = place_open(args, &args->reason);
	if (ret)
		goto release;
	args->reason = STILLBLOCK_REASON_PLACE_UNSUITABLE;
	ret = -EINVAL;
	if (format && !place.exclusive && !place.file)
		goto release;
	args->history = format ? place_format() : place_read_header();
	if (!args->history && !format)
		args->history = place_read_records();
	ret = -EIO;
	if (args->history)
		goto release;
	place.set = true;
	place_adopt_all();
	args->reason = STILLBLOCK_REASON_NONE;
	return 0;

release:
	place_release();
	if (args->history)
		place.refusal = args->history;
	return ret;
}

/*
 * The place that is set: hold it fast. The file may be another one than that whose
 * extents an initramfs knew; to write those then would be to write into whatever
 * has them now.
 */
static int place_hold(struct stillblock_place *args)
{
	struct persist_piece *pieces;
	u32 nr_pieces;
	u64 location;
	dev_t dev;
	int ret;

	args->reason = STILLBLOCK_REASON_PLACE_BUSY;
	ret = stb_dev_of_fd(args->bdev_fd, &dev);
	if (ret)
		return ret;
	if (dev != place.dev.bdev->bd_dev || place.exclusive ||
	    args->flags || args->file_fd < 0 || place.file)
		return -EBUSY;
	ret = pieces_read(args, place.dev.bdev, &pieces, &nr_pieces);
	if (ret)
		return ret;
	location = pieces_hash(pieces, nr_pieces);
	kvfree(pieces);
	if (location != place.location)
		return -EBUSY;
	args->reason = STILLBLOCK_REASON_PLACE_UNSUITABLE;
	return place_pin(args->file_fd);
}

static void place_describe(struct stillblock_place *args)
{
	u32 i;

	args->flags = 0;
	args->capacity = 0;
	args->used = 0;
	memcpy(args->uuid, place.uuid, sizeof(args->uuid));
	if (!place.set) {
		args->history = place.refusal;
		return;
	}
	args->flags = STILLBLOCK_PLACE_SET;
	args->history = place.error;
	if (place.exclusive || place.file)
		args->flags |= STILLBLOCK_PLACE_HELD;
	args->capacity = (place.nr_pages - STB_PLACE_FIRST_MAP) * STB_PLACE_PAGE;
	for (i = 0; i < STB_PLACE_RECORDS; i++)
		if (le32_to_cpu(place.records[i].state) != STB_RECORD_EMPTY)
			args->used += le64_to_cpu(place.records[i].nr_pages) *
				      STB_PLACE_PAGE;
}

/**
 * stb_persist_place() - set the place, tell of it, drop it
 * @args: STILLBLOCK_IOC_PLACE
 *
 * Context: control mutex held.
 * Return: 0 or a negative errno, with @args->reason and @args->history.
 */
int stb_persist_place(struct stillblock_place *args)
{
	struct stb_tracker *t;
	int ret = 0;
	u64 id;

	stb_assert_control();
	switch (args->flags) {
	case STILLBLOCK_PLACE_QUERY:
		break;
	case STILLBLOCK_PLACE_DROP:
		if (place.sealed)
			return -ESHUTDOWN;
		if (args->history > STILLBLOCK_HISTORY_PLACE_ABOVE)
			return -EINVAL;
		for (id = 0; (t = stb_tracker_next(id)); id = t->id) {
			t->record = -1;
			t->kept = STILLBLOCK_HISTORY_OK;
		}
		place_release();
		place.refusal = args->history ?: STILLBLOCK_HISTORY_NO_PLACE;
		break;
	case 0:
	case STILLBLOCK_PLACE_FORMAT:
		if (place.sealed)
			return -ESHUTDOWN;
		ret = place.set ? place_hold(args) : place_set(args);
		break;
	case STILLBLOCK_PLACE_UNLESS:
		args->reason = STILLBLOCK_REASON_PLACE_BUSY;
		ret = -EBUSY;
		if (!place.set && place.refusal == STILLBLOCK_HISTORY_NO_PLACE)
			ret = place_set(args);
		break;
	default:
		return -EINVAL;
	}
	if (!ret) {
		args->reason = STILLBLOCK_REASON_NONE;
		place_describe(args);
	}
	return ret;
}

/**
 * stb_persist_init() - prepare for the place
 *
 * Return: 0 or a negative errno.
 */
int stb_persist_init(void)
{
	int ret;

	BUILD_BUG_ON(sizeof(struct stb_record) > STB_PLACE_PAGE);
	BUILD_BUG_ON(STB_PLACE_RECORDS > STB_IO_PAGES);
	ret = register_reboot_notifier(&persist_notifier);
	if (ret)
		return ret;
	ret = register_pm_notifier(&persist_pm_notifier);
	if (ret)
		unregister_reboot_notifier(&persist_notifier);
	return ret;
}

/**
 * stb_persist_exit() - let go of the place; there is no tracker left
 */
void stb_persist_exit(void)
{
	unregister_pm_notifier(&persist_pm_notifier);
	unregister_reboot_notifier(&persist_notifier);
	stb_control_lock();
	place_release();
	stb_control_unlock();
}
