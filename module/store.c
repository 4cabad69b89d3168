// SPDX-License-Identifier: GPL-2.0-only
/*
 * Difference storage: extents of pinned files, and memory.
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
#include "store.h"

struct stb_store_file {
	struct list_head node;
	struct file *file;
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
	INIT_LIST_HEAD(&store->files);
	store->low_watermark = low_watermark_bytes >> STB_CHUNK_SHIFT;
}

static int store_pin(struct stb_store *store, struct file *file)
{
	struct inode *inode = file_inode(file);
	struct stb_store_file *f = kmalloc(sizeof(*f), GFP_KERNEL);
	int ret = 0;

	if (!f)
		return -ENOMEM;
	inode_lock(inode);
	if (IS_SWAPFILE(inode))
		ret = -EBUSY;
	else
		inode->i_flags |= S_SWAPFILE;
	inode_unlock(inode);
	if (ret) {
		kfree(f);
		return ret;
	}
	f->file = get_file(file);
	list_add(&f->node, &store->files);
	return 0;
}

static void store_unpin(struct stb_store_file *f)
{
	struct inode *inode = file_inode(f->file);

	inode_lock(inode);
	inode->i_flags &= ~S_SWAPFILE;
	inode_unlock(inode);
	list_del(&f->node);
	fput(f->file);
	kfree(f);
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
	if (store->capacity - store->used >= store->low_watermark)
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
	piece.pages = kvcalloc(piece.nr_slots * STB_CHUNK_PAGES,
			       sizeof(*piece.pages), GFP_KERNEL);
	if (!piece.pages)
		return -ENOMEM;
	ret = store_append(store, &piece, 1);
	if (ret)
		kvfree(piece.pages);
	return ret;
}

/* Turn extents of user space into pieces of whole slots within the device. */
static int store_read_extents(const struct stillblock_store *spec,
			      struct block_device *bdev,
			      struct stb_store_piece *pieces, u32 *nr_pieces)
{
	const struct stillblock_extent __user *from =
		u64_to_user_ptr(spec->extents);
	u64 size = (u64)bdev_nr_sectors(bdev) << SECTOR_SHIFT;
	u32 align = max_t(u32, bdev_logical_block_size(bdev), PAGE_SIZE);
	struct stillblock_extent e;
	u32 i, nr = 0;

	for (i = 0; i < spec->nr_extents; i++) {
		u64 skip;

		if (copy_from_user(&e, from + i, sizeof(e)))
			return -EFAULT;
		if (e.offset > size || e.length > size - e.offset)
			return -ERANGE;
		skip = round_up(e.offset, align) - e.offset;
		if (e.length < skip + STB_CHUNK_SIZE)
			continue;
		pieces[nr].nr_slots = (e.length - skip) >> STB_CHUNK_SHIFT;
		pieces[nr].bdev = bdev;
		pieces[nr].sector = (e.offset + skip) >> SECTOR_SHIFT;
		pieces[nr].pages = NULL;
		nr++;
	}
	*nr_pieces = nr;
	return 0;
}

static int store_add_file(struct stb_store *store,
			  const struct stillblock_store *spec,
			  stb_store_check_t check, void *data, u32 *reason)
{
	struct stb_store_piece *pieces;
	struct block_device *bdev;
	struct file *file;
	u32 nr = 0;
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
	*reason = check(data, bdev);
	if (*reason)
		goto put;
	*reason = STILLBLOCK_REASON_STORE_UNSUITABLE;
	if (!spec->nr_extents || spec->nr_extents > STILLBLOCK_MAX_EXTENTS)
		goto put;

	*reason = STILLBLOCK_REASON_NO_MEMORY;
	ret = -ENOMEM;
	pieces = kvmalloc_array(spec->nr_extents, sizeof(*pieces), GFP_KERNEL);
	if (!pieces)
		goto put;
	*reason = STILLBLOCK_REASON_STORE_UNSUITABLE;
	ret = store_read_extents(spec, bdev, pieces, &nr);
	if (ret)
		goto free;
	*reason = STILLBLOCK_REASON_STORE_TOO_SMALL;
	ret = -ENOSPC;
	if (!nr)
		goto free;
	*reason = STILLBLOCK_REASON_STORE_UNSUITABLE;
	ret = store_pin(store, file);
	if (ret)
		goto free;
	*reason = STILLBLOCK_REASON_NO_MEMORY;
	ret = store_append(store, pieces, nr);
	if (ret)
		store_unpin(list_first_entry(&store->files,
					     struct stb_store_file, node));
free:
	kvfree(pieces);
put:
	fput(file);
	if (!ret)
		*reason = STILLBLOCK_REASON_NONE;
	return ret;
}

/**
 * stb_store_add() - add a piece of storage
 * @store: store
 * @spec: what user space offers
 * @check: says for the device of a file why it will not do, if so
 * @data: for @check
 * @reason: out: enum stillblock_reason
 *
 * Context: control mutex held, may sleep.
 * Return: 0, or a negative errno and nothing is added.
 */
int stb_store_add(struct stb_store *store, const struct stillblock_store *spec,
		  stb_store_check_t check, void *data, u32 *reason)
{
	int ret = -EINVAL;

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
			ret = store_add_file(store, spec, check, data, reason);
		break;
	}
	if (!ret)
		*reason = STILLBLOCK_REASON_NONE;
	return ret;
}

/**
 * stb_store_destroy() - free memory and unpin files
 * @store: store; no I/O to it is in flight
 */
void stb_store_destroy(struct stb_store *store)
{
	struct stb_store_file *f, *next;
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
		kvfree(p->pages);
	}
	kvfree(store->pieces);
	store->pieces = NULL;
	store->nr_pieces = 0;
	list_for_each_entry_safe(f, next, &store->files, node)
		store_unpin(f);
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
