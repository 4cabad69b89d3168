/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef STILLBLOCK_TRACKER_H
#define STILLBLOCK_TRACKER_H

#include <linux/atomic.h>
#include <linux/bio.h>
#include <linux/kref.h>
#include <linux/rculist.h>
#include <linux/spinlock.h>
#include <linux/workqueue.h>

#include <linux/stillblock.h>

#include "change_map.h"
#include "compat.h"
#include "geometry.h"

struct stb_cow;
struct stb_snapshot;

/**
 * enum stb_mode - what happens to a write of a tracked device
 * @STB_PASS: counted, marked and passed
 * @STB_GATE: held until the flip
 * @STB_COW: held only while old data beneath it is being preserved
 *
 *           gate               flip
 *   PASS ----------> GATE ----------> COW
 *    ^                 |                |
 *    +-----------------+----------------+
 *       take given up     snapshot failed or ended
 *
 * Changed by stb_tracker_set_mode() alone.
 */
enum stb_mode {
	STB_PASS,
	STB_GATE,
	STB_COW,
};

/**
 * enum stb_uncounted - are all writes in flight known?
 * @STB_UNCOUNTED_NONE: yes
 * @STB_UNCOUNTED_QUEUED: some that are not are in the device's queue
 * @STB_UNCOUNTED_ANYWHERE: a preempted task may be on its way there with one
 *
 * Those from before the attach are not, nor those for which there was no memory
 * to count them.
 */
enum stb_uncounted {
	STB_UNCOUNTED_NONE,
	STB_UNCOUNTED_QUEUED,
	STB_UNCOUNTED_ANYWHERE,
};

/**
 * struct stb_tracker_figures - what a processor counts of a tracker
 * @writes: writes seen
 * @inflight: writes passed on less writes completed; the sum over all
 *	processors is what is in flight
 */
struct stb_tracker_figures {
	u64 writes;
	long inflight;
};

/**
 * struct stb_tracker - one tracked device
 * @node: in the hook's table, by @disk; RCU
 * @ref: references: the table and each snapshot
 * @id: never used twice; trackers of one disk are chained by rising id
 * @dev: the device, held open
 * @disk: its disk: the lookup key
 * @start: absolute first sector on @disk
 * @block_size: unit of change tracking that was asked for, or 0
 * @map: change map; RCU, replaced under the control mutex when the device has
 *	another size
 * @lock: protects @held, changes of @mode and of @cow. Taken inside the ftrace
 *	callback with interrupts off; innermost of all locks
 * @mode: see enum stb_mode; read without the lock, then checked again under it
 * @held: writes that wait
 * @cow: where @held goes in STB_COW; RCU
 * @work: releases @held when the mode is STB_PASS again
 * @uncounted: see enum stb_uncounted
 * @snapshot: the snapshot that it belongs to; under the control mutex
 * @figures: per CPU
 * @nr_held_writes: all writes that were ever held
 * @identity: by which its history is found after a reboot; all zero: none
 * @record: index of its record in the place, or negative
 * @kept: enum stillblock_history: why its history will not be kept
 * @kept_tried: when @kept was found out by its content, jiffies
 * @taken_up: its history was there before it was attached
 * @free_work: frees a detached tracker when its last write has completed
 */
struct stb_tracker {
	struct hlist_node node;
	struct kref ref;
	u64 id;
	struct stb_bdev dev;
	struct gendisk *disk;
	sector_t start;
	u32 block_size;
	struct stb_change_map __rcu *map;
	raw_spinlock_t lock;
	enum stb_mode mode;
	struct bio_list held;
	struct stb_cow __rcu *cow;
	struct work_struct work;
	enum stb_uncounted uncounted;
	struct stb_snapshot *snapshot;
	struct stb_tracker_figures __percpu *figures;
	atomic64_t nr_held_writes;
	u8 identity[STILLBLOCK_IDENTITY_SIZE];
	int record;
	u32 kept;
	unsigned long kept_tried;
	bool taken_up;
	struct delayed_work free_work;
};

int stb_tracker_attach(struct stillblock_attach *args);
int stb_tracker_detach(struct stillblock_detach *args);
int stb_tracker_list(struct stillblock_list *args);
int stb_tracker_mark(struct stillblock_mark *args);
struct stb_tracker *stb_tracker_find(u64 id);
struct stb_tracker *stb_tracker_next(u64 after);
struct stb_change_map *stb_tracker_map(struct stb_tracker *t);
int stb_tracker_refresh(struct stb_tracker *t, u32 *reason);
void stb_tracker_put(struct stb_tracker *t);

void stb_tracker_set_mode(struct stb_tracker *t, enum stb_mode mode,
			  struct stb_cow *cow);
bool stb_tracker_has_counted(struct stb_tracker *t, struct bio *bio);
bio_end_io_t *stb_tracker_end_io(struct bio *bio, void **private);
void stb_tracker_count(struct stb_tracker *t, struct bio *bio);
bool stb_tracker_settle(struct stb_tracker *t);
long stb_tracker_inflight(struct stb_tracker *t);
int stb_tracker_gate(struct stb_tracker *t, unsigned long deadline);
void stb_tracker_ungate(struct stb_tracker *t);
void stb_tracker_release(struct stb_tracker *t, struct bio *bio);

int stb_tracker_init(void);
void stb_tracker_exit(void);

/**
 * stb_tracker_range() - the part of a bio that touches a tracker
 * @t: tracker
 * @nr_sect: size of the device as the caller knows it, sectors
 * @bio: bio for the tracker's disk, not yet submitted
 * @r: out: sectors relative to the tracked device
 *
 * Absolute sectors are compared, which sees a write to sda1 through sda and the
 * other way round.
 *
 * Context: RCU read-side section.
 * Return: false when they do not touch.
 */
static __always_inline bool stb_tracker_range(struct stb_tracker *t,
					      sector_t nr_sect,
					      struct bio *bio,
					      struct stb_range *r)
{
	sector_t first = stb_bio_sector(bio);
	sector_t end = first + bio_sectors(bio);

	if (end <= t->start || first >= t->start + nr_sect)
		return false;
	r->first = max(first, t->start) - t->start;
	r->end = min(end, t->start + nr_sect) - t->start;
	return true;
}

#endif /* STILLBLOCK_TRACKER_H */
