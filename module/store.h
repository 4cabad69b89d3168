/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef STILLBLOCK_STORE_H
#define STILLBLOCK_STORE_H

#include <linux/blkdev.h>
#include <linux/list.h>
#include <linux/spinlock.h>
#include <linux/stillblock.h>

#include "geometry.h"

/*
 * The store is a line of slots of one chunk each, made of pieces. Slots are
 * handed out in order and never given back before the snapshot ends.
 */

/**
 * struct stb_store_piece - a run of slots in one place
 * @first_slot: first slot
 * @nr_slots: how many
 * @bdev: where, or NULL for memory
 * @sector: first sector on @bdev
 * @pages: memory: one pointer per page, filled as slots are written
 */
struct stb_store_piece {
	u64 first_slot;
	u64 nr_slots;
	struct block_device *bdev;
	sector_t sector;
	struct page **pages;
};

/**
 * struct stb_store - difference storage of a snapshot, shared by its images
 * @lock: protects all below but @holds. Inside cow locks; nothing inside it
 * @pieces: array, sorted by first_slot
 * @nr_pieces: length
 * @capacity: slots there are
 * @used: slots handed out: the next one to hand out
 * @low_watermark: free slots under which @low is told once per growth
 * @low_told: it was told
 * @holds: files and devices that are kept; changed under the control mutex
 */
struct stb_store {
	spinlock_t lock;	/* all below but holds */
	struct stb_store_piece *pieces;
	u32 nr_pieces;
	u64 capacity;
	u64 used;
	u64 low_watermark;
	bool low_told;
	struct list_head holds;
};

/**
 * struct stb_slots - where a run of slots is
 * @slot: first slot
 * @nr: how many lie there contiguously
 * @bdev: device, or NULL for memory
 * @sector: sector on @bdev
 * @pages: memory: pointers to the pages of the first slot
 */
struct stb_slots {
	u64 slot;
	u64 nr;
	struct block_device *bdev;
	sector_t sector;
	struct page **pages;
};

/**
 * struct stb_store_rules - what a store has to know about the origins
 * @check: why a device cannot hold a piece of this kind: enum
 *	stillblock_reason, 0 if it can
 * @claim: a range of a device becomes store; shortens it to what may be used.
 *	Returns 0 or a negative errno
 */
struct stb_store_rules {
	u32 (*check)(void *data, struct block_device *bdev, u32 kind);
	int (*claim)(void *data, struct block_device *bdev,
		     struct stb_range *r);
};

int stb_file_pin(struct file *file);
void stb_file_unpin(struct file *file);
void stb_store_init(struct stb_store *store, u64 low_watermark_bytes);
int stb_store_add(struct stb_store *store, const struct stillblock_store *spec,
		  const struct stb_store_rules *rules, void *data, u32 *reason);
void stb_store_destroy(struct stb_store *store);
bool stb_store_alloc(struct stb_store *store, u64 want, struct stb_slots *out,
		     bool *low);
bool stb_store_find(struct stb_store *store, u64 slot, struct stb_slots *out);
void stb_store_usage(struct stb_store *store, u64 *capacity, u64 *used,
		     u64 *free_bytes);

#endif /* STILLBLOCK_STORE_H */
