/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef STILLBLOCK_SNAPSHOT_H
#define STILLBLOCK_SNAPSHOT_H

#include <linux/kref.h>
#include <linux/spinlock.h>
#include <linux/wait.h>
#include <linux/workqueue.h>

#include <linux/stillblock.h>

#include "image.h"
#include "store.h"

#define STB_MAX_EVENTS	32

/**
 * enum stb_snapshot_phase - life of a snapshot
 * @STB_SNAPSHOT_PREPARING: the instant is still to come
 * @STB_SNAPSHOT_HELD: its images are right
 * @STB_SNAPSHOT_FAILED: its images are wrong
 * @STB_SNAPSHOT_ENDED: it is let go
 *
 * PREPARING --> HELD --> FAILED --> ENDED
 *     |           |                  ^ ^
 *     |           +------------------+ |
 *     +--------------------------------+
 *
 * Changed by snapshot_set_state() alone; a failed snapshot never becomes good.
 */
enum stb_snapshot_phase {
	STB_SNAPSHOT_PREPARING,
	STB_SNAPSHOT_HELD,
	STB_SNAPSHOT_FAILED,
	STB_SNAPSHOT_ENDED,
};

/**
 * struct stb_snapshot - a set of images of one instant
 * @ref: its descriptor, each I/O of copy-on-write and each read of an image
 * @lock: protects changes of @phase, @reason and the events; innermost but for
 *	the wait queue's
 * @phase: see enum stb_snapshot_phase; read without the lock
 * @reason: why it failed
 * @switched: all origins preserve, so that none takes a write into the store for
 *	another's; see stb_snapshot_switched()
 * @nr_images: length of @images
 * @images: in the order of the take
 * @store: difference storage
 * @wait: who reads events
 * @events: ring
 * @first_event: oldest
 * @nr_events: in the ring
 * @nr_lost: events that did not fit
 * @watchdog: looks for chunks that are overdue
 * @free_work: frees the snapshot when the last reference goes in a completion
 * @taken_ns: wall-clock time of the instant
 * @freeze_ns: how long file systems were frozen
 * @gate_ns: how long writes were held for the switch
 * @held_before: writes that the trackers had ever held before the take
 */
struct stb_snapshot {
	struct kref ref;
	spinlock_t lock;	/* phase changes, reason, events */
	enum stb_snapshot_phase phase;
	u32 reason;
	bool switched;
	u32 nr_images;
	struct stb_image *images;
	struct stb_store store;
	wait_queue_head_t wait;
	struct stillblock_event events[STB_MAX_EVENTS];
	unsigned int first_event;
	unsigned int nr_events;
	u64 nr_lost;
	struct delayed_work watchdog;
	struct work_struct free_work;
	u64 taken_ns;
	u64 freeze_ns;
	u64 gate_ns;
	u64 held_before;
};

int stb_snapshot_take(struct stillblock_take *args, struct file **file);
void stb_snapshot_get(struct stb_snapshot *s);
void stb_snapshot_put(struct stb_snapshot *s);
void stb_snapshot_fail(struct stb_snapshot *s, u32 reason);
void stb_snapshot_abandon(struct stb_snapshot *s);
void stb_snapshot_low(struct stb_snapshot *s);

/**
 * stb_snapshot_held() - are its images right?
 * @s: snapshot
 *
 * An image read asks after its data has arrived: the phase changes before any
 * write passes unpreserved.
 *
 * Return: true in STB_SNAPSHOT_HELD.
 */
static inline bool stb_snapshot_held(struct stb_snapshot *s)
{
	/* Pairs with the release in snapshot_set_state(). */
	return smp_load_acquire(&s->phase) == STB_SNAPSHOT_HELD;
}

/**
 * stb_snapshot_switched() - may its workers begin?
 * @s: snapshot
 *
 * The origins are flipped one after the other. What the first one has written to
 * the store may lie on one that is gated still, where every write is held: it
 * would come to that one's worker later, as a stranger's.
 *
 * Return: true when all have been flipped.
 */
static inline bool stb_snapshot_switched(struct stb_snapshot *s)
{
	/* Pairs with the release in snapshot_switch(). */
	return smp_load_acquire(&s->switched);
}

#endif /* STILLBLOCK_SNAPSHOT_H */
