// SPDX-License-Identifier: GPL-2.0-only
/*
 * Difference storage: extents of pinned files, whole devices, and memory.
 *
 * The module never writes through a file system: with that file system frozen,
 * or flushing into an origin that waits for its store, that would deadlock.
 * User space allocates a file fully and tells where it lies; bios go straight
 * there. The file is pinned as a swap file is: the file system will neither
 * move nor free its blocks, nor let anybody write or delete it.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/file.h>
#include <linux/fs.h>
#include <linux/magic.h>
#include <linux/mm.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#include <linux/vmalloc.h>

#include "compat.h"
#include "main.h"
#include "store.h"

/* Sectors at both ends of a device that are left alone. */
#define STB_DEVICE_MARGIN	2048

/**
 * struct stb_store_hold - what keeps a piece in its place
 * @node: in store->holds
 * @file: pinned file, or NULL
 * @dev: else a device that is ours alone
 */
struct stb_store_hold {
	struct list_head node;
	struct file *file;
	struct stb_bdev dev;
};

/**
 * stb_store_init() - begin with an empty store
 * @store: store
 * @low_watermark_bytes: free bytes under which the store calls for more
 */
void stb_store_init(struct stb_store *store, u64 low_watermark_bytes)
{
	memset(store, 0, sizeof(*store));
	spin_lock_init(&store->lock);
	INIT_LIST_HEAD(&store->holds);
	store->low_watermark = low_watermark_bytes >> STB_CHUNK_SHIFT;
}

/**
 * stb_file_pin() - pin a file as a swap file is
 * @file: its blocks stay, and nobody writes to them, until stb_file_unpin()
 *
 * Return: 0, or -EBUSY for one that is pinned.
 */
int stb_file_pin(struct file *file)
{
	struct inode *inode = file_inode(file);
	int ret = 0;

	inode_lock(inode);
	if (IS_SWAPFILE(inode))
		ret = -EBUSY;
	else
		inode->i_flags |= S_SWAPFILE;
	inode_unlock(inode);
	return ret;
}

/**
 * stb_file_unpin() - take back stb_file_pin()
 * @file: file
 */
void stb_file_unpin(struct file *file)
{
	struct inode *inode = file_inode(file);

	inode_lock(inode);
	inode->i_flags &= ~S_SWAPFILE;
	inode_unlock(inode);
}

static void store_let_go(struct stb_store_hold *hold)
{
	if (hold->file) {
		stb_file_unpin(hold->file);
		fput(hold->file);
	} else {
		stb_bdev_close(&hold->dev);
	}
	kfree(hold);
}

/*
 * Make the array of pieces longer and publish the new pieces with their slots.
 * @fresh lacks first_slot only.
 */
static int store_append(struct stb_store *store, struct stb_store_piece *fresh,
			u32 nr)
{
	struct stb_store_piece *longer, *old;
	u32 i;

	stb_assert_control();
	longer = kvmalloc_array(store->nr_pieces + nr, sizeof(*longer),
				GFP_KERNEL);
	if (!longer)
		return -ENOMEM;
	spin_lock_irq(&store->lock);
	old = store->pieces;
	if (store->nr_pieces)
		memcpy(longer, old, store->nr_pieces * sizeof(*longer));
	for (i = 0; i < nr; i++) {
		fresh[i].first_slot = store->capacity;
		store->capacity += fresh[i].nr_slots;
		longer[store->nr_pieces + i] = fresh[i];
	}
	store->pieces = longer;
	store->nr_pieces += nr;
	/* Told again at the next slot where this was not enough. */
	store->low_told = false;
	spin_unlock_irq(&store->lock);
	kvfree(old);
	return 0;
}

static int store_add_memory(struct stb_store *store, u64 limit, u32 *reason)
{
	struct stb_store_piece piece = {
		.nr_slots = limit >> STB_CHUNK_SHIFT,
	};
	int ret;

	*reason = STILLBLOCK_REASON_STORE_TOO_SMALL;
	if (!piece.nr_slots)
		return -ENOSPC;
	*reason = STILLBLOCK_REASON_NO_MEMORY;
	if (limit >> PAGE_SHIFT > totalram_pages())
		return -ENOMEM;
	/* For 1 TiB that is more than kvmalloc() gives, which warns. */
	piece.pages = vzalloc(array_size(piece.nr_slots * STB_CHUNK_PAGES,
					 sizeof(*piece.pages)));
	if (!piece.pages)
		return -ENOMEM;
	ret = store_append(store, &piece, 1);
	if (ret)
		vfree(piece.pages);
	return ret;
}

/*
 * Make a piece of a range of a device, as far as whole slots of it may be used.
 * Return: 1 or 0 pieces, or a negative errno.
 */
static int store_make_piece(struct block_device *bdev, struct stb_range r,
			    const struct stb_store_rules *rules, void *data,
			    struct stb_store_piece *piece)
{
	u32 align = max_t(u32, bdev_logical_block_size(bdev), PAGE_SIZE) >>
		    SECTOR_SHIFT;
	int ret = rules->claim(data, bdev, &r);

	if (ret)
		return ret;
	r.first = round_up(r.first, align);
	if (r.first + STB_CHUNK_SECT > r.end)
		return 0;
	*piece = (struct stb_store_piece){
		.nr_slots = (r.end - r.first) / STB_CHUNK_SECT,
		.bdev = bdev,
		.sector = r.first,
	};
	return 1;
}

/* Turn extents of user space into pieces of whole slots within the device. */
static int store_read_extents(const struct stillblock_store *spec,
			      struct block_device *bdev,
			      const struct stb_store_rules *rules, void *data,
			      struct stb_store_piece *pieces, u32 *nr_pieces)
{
	const struct stillblock_extent __user *from =
		u64_to_user_ptr(spec->extents);
	u64 size = (u64)stb_bdev_nr_sect(bdev) << SECTOR_SHIFT;
	struct stillblock_extent e;
	u32 i;

	*nr_pieces = 0;
	for (i = 0; i < spec->nr_extents; i++) {
		struct stb_range r;
		int ret;

		if (copy_from_user(&e, from + i, sizeof(e)))
			return -EFAULT;
		if (e.offset > size || e.length > size - e.offset)
			return -ERANGE;
		r.first = DIV_ROUND_UP_ULL(e.offset, SECTOR_SIZE);
		r.end = (e.offset + e.length) >> SECTOR_SHIFT;
		if (r.first >= r.end)
			continue;
		ret = store_make_piece(bdev, r, rules, data,
				       &pieces[*nr_pieces]);
		if (ret < 0)
			return ret;
		*nr_pieces += ret;
	}
	return 0;
}

static int store_add_file(struct stb_store *store,
			  const struct stillblock_store *spec,
			  struct stb_store_hold *hold,
			  const struct stb_store_rules *rules, void *data,
			  u32 *reason)
{
	struct stb_store_piece *pieces;
	struct block_device *bdev;
	struct file *file;
	u32 nr;
	int ret;

	*reason = STILLBLOCK_REASON_STORE_NOT_FILE;
	file = fget(spec->file_fd);
	if (!file)
		return -EBADF;
	ret = -EINVAL;
	bdev = file_inode(file)->i_sb->s_bdev;
	if (!S_ISREG(file_inode(file)->i_mode) || !(file->f_mode & FMODE_WRITE))
		goto put;
	*reason = STILLBLOCK_REASON_STORE_UNSUITABLE;
	ret = -EOPNOTSUPP;
	if (!bdev || file_inode(file)->i_sb->s_magic == BTRFS_SUPER_MAGIC ||
	    bdev_is_zoned(bdev))
		goto put;
	ret = -EINVAL;
	*reason = rules->check(data, bdev, spec->kind);
	if (*reason)
		goto put;
	*reason = STILLBLOCK_REASON_STORE_UNSUITABLE;
	if (!spec->nr_extents || spec->nr_extents > STILLBLOCK_MAX_EXTENTS)
		goto put;

	*reason = STILLBLOCK_REASON_STORE_BUSY;
	ret = stb_file_pin(file);
	if (ret)
		goto put;
	hold->file = get_file(file);
	*reason = STILLBLOCK_REASON_NO_MEMORY;
	ret = -ENOMEM;
	pieces = kvmalloc_array(spec->nr_extents, sizeof(*pieces), GFP_KERNEL);
	if (!pieces)
		goto put;
	ret = store_read_extents(spec, bdev, rules, data, pieces, &nr);
	if (ret) {
		if (ret != -ENOMEM)
			*reason = ret == -EFAULT ?
				  STILLBLOCK_REASON_NONE :
				  STILLBLOCK_REASON_STORE_UNSUITABLE;
	} else if (!nr) {
		*reason = STILLBLOCK_REASON_STORE_TOO_SMALL;
		ret = -ENOSPC;
	} else {
		ret = store_append(store, pieces, nr);
	}
	kvfree(pieces);
put:
	fput(file);
	return ret;
}

static int store_add_device(struct stb_store *store,
			    const struct stillblock_store *spec,
			    struct stb_store_hold *hold,
			    const struct stb_store_rules *rules, void *data,
			    u32 *reason)
{
	struct stb_store_piece piece;
	struct block_device *bdev;
	struct stb_range r = {};
	dev_t dev;
	int ret;

	*reason = STILLBLOCK_REASON_NOT_BLOCK_DEVICE;
	ret = stb_dev_of_fd(spec->file_fd, &dev);
	if (ret)
		return ret;
	*reason = STILLBLOCK_REASON_STORE_BUSY;
	/* The same holder may claim a device twice, so that this piece is it. */
	ret = stb_bdev_open(dev, STB_OPEN_READ | STB_OPEN_WRITE, hold,
			    &hold->dev);
	if (ret) {
		hold->dev.bdev = NULL;
		if (ret != -EBUSY)
			*reason = ret == -ENOMEM ?
				  STILLBLOCK_REASON_NO_MEMORY :
				  STILLBLOCK_REASON_STORE_UNSUITABLE;
		return ret;
	}
	bdev = hold->dev.bdev;
	*reason = STILLBLOCK_REASON_STORE_UNSUITABLE;
	if (bdev_is_zoned(bdev))
		return -EOPNOTSUPP;
	*reason = rules->check(data, bdev, spec->kind);
	if (*reason)
		return -EINVAL;
	/*
	 * Old data may look like a file system or a partition table, and must
	 * not lie where somebody looks for one.
	 */
	r.first = STB_DEVICE_MARGIN;
	r.end = stb_bdev_nr_sect(bdev);
	r.end -= min_t(sector_t, r.end, STB_DEVICE_MARGIN);
	if (r.first >= r.end) {
		*reason = STILLBLOCK_REASON_STORE_TOO_SMALL;
		return -ENOSPC;
	}
	ret = store_make_piece(bdev, r, rules, data, &piece);
	if (ret == 0) {
		*reason = STILLBLOCK_REASON_STORE_TOO_SMALL;
		return -ENOSPC;
	}
	*reason = STILLBLOCK_REASON_NO_MEMORY;
	return ret < 0 ? ret : store_append(store, &piece, 1);
}

/* A piece that lies somewhere where it has to be held. */
static int store_add_held(struct stb_store *store,
			  const struct stillblock_store *spec,
			  const struct stb_store_rules *rules, void *data,
			  u32 *reason)
{
	struct stb_store_hold *hold = kzalloc(sizeof(*hold), GFP_KERNEL);
	int ret;

	if (!hold) {
		*reason = STILLBLOCK_REASON_NO_MEMORY;
		return -ENOMEM;
	}
	if (spec->kind == STILLBLOCK_STORE_FILE)
		ret = store_add_file(store, spec, hold, rules, data, reason);
	else
		ret = store_add_device(store, spec, hold, rules, data, reason);
	if (!ret)
		list_add(&hold->node, &store->holds);
	else if (hold->file || hold->dev.bdev)
		store_let_go(hold);
	else
		kfree(hold);
	return ret;
}

/**
 * stb_store_add() - add a piece of storage
 * @store: store
 * @spec: what user space offers
 * @rules: about the origins
 * @data: for @rules
 * @reason: out: enum stillblock_reason
 *
 * Context: control mutex held, may sleep.
 * Return: 0, or a negative errno and nothing is added.
 */
int stb_store_add(struct stb_store *store, const struct stillblock_store *spec,
		  const struct stb_store_rules *rules, void *data, u32 *reason)
{
	int ret = -EINVAL;

	stb_assert_control();
	*reason = STILLBLOCK_REASON_NONE;
	if (spec->pad)
		return -EINVAL;
	switch (spec->kind) {
	case STILLBLOCK_STORE_MEMORY:
		if (spec->file_fd == -1 && !spec->extents && !spec->nr_extents)
			ret = store_add_memory(store, spec->limit, reason);
		break;
	case STILLBLOCK_STORE_FILE:
		if (!spec->limit)
			ret = store_add_held(store, spec, rules, data, reason);
		break;
	case STILLBLOCK_STORE_DEVICE:
		if (!spec->limit && !spec->extents && !spec->nr_extents)
			ret = store_add_held(store, spec, rules, data, reason);
		break;
	}
	if (!ret)
		*reason = STILLBLOCK_REASON_NONE;
	return ret;
}

/**
 * stb_store_destroy() - free memory, let files and devices go
 * @store: store; no I/O to it is in flight
 */
void stb_store_destroy(struct stb_store *store)
{
	struct stb_store_hold *hold, *next;
	u32 i;

	for (i = 0; i < store->nr_pieces; i++) {
		struct stb_store_piece *p = &store->pieces[i];
		u64 page;

		if (!p->pages)
			continue;
		for (page = 0; page < p->nr_slots * STB_CHUNK_PAGES; page++) {
			if (p->pages[page])
				__free_page(p->pages[page]);
			if (!(page & 0xffff))
				cond_resched();
		}
		vfree(p->pages);
	}
	kvfree(store->pieces);
	store->pieces = NULL;
	store->nr_pieces = 0;
	list_for_each_entry_safe(hold, next, &store->holds, node)
		store_let_go(hold);
	INIT_LIST_HEAD(&store->holds);
}

/* The piece that holds a slot below the capacity. */
static struct stb_store_piece *store_piece(struct stb_store *store, u64 slot)
{
	u32 low = 0, high = store->nr_pieces;

	lockdep_assert_held(&store->lock);
	while (high - low > 1) {
		u32 middle = low + (high - low) / 2;

		if (store->pieces[middle].first_slot <= slot)
			low = middle;
		else
			high = middle;
	}
	return &store->pieces[low];
}

static void store_locate(struct stb_store *store, u64 slot,
			 struct stb_slots *out)
{
	struct stb_store_piece *p = store_piece(store, slot);
	u64 into = slot - p->first_slot;

	out->slot = slot;
	out->nr = p->nr_slots - into;
	out->bdev = p->bdev;
	out->sector = p->bdev ? p->sector + into * STB_CHUNK_SECT : 0;
	out->pages = p->pages ? p->pages + into * STB_CHUNK_PAGES : NULL;
}

/**
 * stb_store_alloc() - hand out slots
 * @store: store
 * @want: slots wanted
 * @out: where they are; @out->nr is at most @want, and less where a piece ends
 * @low: out: the low watermark has just been passed
 *
 * Return: false when the store is full.
 */
bool stb_store_alloc(struct stb_store *store, u64 want, struct stb_slots *out,
		     bool *low)
{
	unsigned long flags;
	bool got = false;

	*low = false;
	spin_lock_irqsave(&store->lock, flags);
	if (store->used < store->capacity) {
		store_locate(store, store->used, out);
		out->nr = min(out->nr, want);
		store->used += out->nr;
		got = true;
	}
	if (!store->low_told &&
	    store->capacity - store->used < store->low_watermark) {
		store->low_told = true;
		*low = true;
	}
	spin_unlock_irqrestore(&store->lock, flags);
	return got;
}

/**
 * stb_store_find() - where a slot is
 * @store: store
 * @slot: slot that was handed out
 * @out: its place, and how far the piece goes on
 *
 * Return: false for a slot that does not exist: a bug of ours.
 */
bool stb_store_find(struct stb_store *store, u64 slot, struct stb_slots *out)
{
	unsigned long flags;
	bool found;

	spin_lock_irqsave(&store->lock, flags);
	found = slot < store->used;
	if (found)
		store_locate(store, slot, out);
	spin_unlock_irqrestore(&store->lock, flags);
	return found;
}

/**
 * stb_store_usage() - how full it is
 * @store: store
 * @capacity: out: bytes
 * @used: out: bytes
 * @free_bytes: out: bytes
 */
void stb_store_usage(struct stb_store *store, u64 *capacity, u64 *used,
		     u64 *free_bytes)
{
	unsigned long flags;

	spin_lock_irqsave(&store->lock, flags);
	*capacity = store->capacity << STB_CHUNK_SHIFT;
	*used = store->used << STB_CHUNK_SHIFT;
	*free_bytes = *capacity - *used;
	spin_unlock_irqrestore(&store->lock, flags);
}
