// SPDX-License-Identifier: GPL-2.0-only
/*
 * Trackers: attach and detach, how writes in flight are counted, and the gate
 * that stops all writes of a device for the switch.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/blk-mq.h>
#include <linux/delay.h>
#include <linux/module.h>
#include <linux/sched/mm.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#include <linux/xarray.h>

#include "cow.h"
#include "hook.h"
#include "image.h"
#include "main.h"
#include "persist.h"
#include "trace.h"
#include "tracker.h"

/* Blocks marked for user space before others may run. */
#define STB_MARK_BLOCKS		65536

/* All trackers by id, under the control mutex. */
static DEFINE_XARRAY(trackers);
static u64 last_id;

/* How long a detach waits for writes in flight before it leaves that to a worker. */
#define STB_DETACH_TIMEOUT	HZ

/* A write that is counted until it completes. */
struct stb_counted {
	struct stb_tracker *t;
	bio_end_io_t *end_io;
	void *private;
};

static struct kmem_cache *counted_cache;

/*
 * A few of these per processor, free, so that the write path hardly ever asks
 * the allocator, which costs ten times as much. Used with interrupts off.
 */
#define STB_COUNTED_SPARE	64

struct stb_counted_spares {
	unsigned int nr;
	struct stb_counted *spare[STB_COUNTED_SPARE];
};

static DEFINE_PER_CPU(struct stb_counted_spares, counted_spares);

static __always_inline struct stb_counted *counted_alloc(void)
{
	struct stb_counted_spares *spares;
	struct stb_counted *c = NULL;
	unsigned long flags;

	local_irq_save(flags);
	spares = this_cpu_ptr(&counted_spares);
	if (likely(spares->nr))
		c = spares->spare[--spares->nr];
	local_irq_restore(flags);
	return likely(c) ? c : kmem_cache_alloc(counted_cache, __GFP_NOWARN);
}

static __always_inline void counted_free(struct stb_counted *c)
{
	struct stb_counted_spares *spares;
	unsigned long flags;

	local_irq_save(flags);
	spares = this_cpu_ptr(&counted_spares);
	if (likely(spares->nr < STB_COUNTED_SPARE)) {
		spares->spare[spares->nr++] = c;
		c = NULL;
	}
	local_irq_restore(flags);
	if (unlikely(c))
		kmem_cache_free(counted_cache, c);
}

static void counted_end_io(struct bio *bio)
{
	struct stb_counted *c = bio->bi_private;
	struct stb_tracker *t = c->t;

	bio->bi_private = c->private;
	bio->bi_end_io = c->end_io;
	counted_free(c);
	/* Its number and mark are long in force: nothing to order. */
	this_cpu_dec(t->figures->inflight);
	/*
	 * Not by calling bi_end_io: that of a chained bio is a mark that only
	 * bio_endio() knows how to follow, and BUG() on newer kernels. What
	 * bio_endio() does once it has undone, so that a second time is none.
	 */
	bio_endio(bio);
}

/**
 * stb_tracker_has_counted() - has a write passed this tracker before?
 * @t: tracker
 * @bio: write
 *
 * The block layer splits what is too long for a queue and sends the rest, which
 * is the same bio, through submit_bio_noacct() again (before 7.2); a throttled
 * bio comes twice on 5.10. The gate waits for its completion, so it must not
 * be held; what copy-on-write had to preserve beneath it has been preserved.
 *
 * Context: any.
 * Return: true if so.
 */
bool stb_tracker_has_counted(struct stb_tracker *t, struct bio *bio)
{
	bio_end_io_t *end_io = bio->bi_end_io;
	void *private = bio->bi_private;

	/* The trackers of a chain have wrapped it one after the other. */
	while (end_io == counted_end_io) {
		struct stb_counted *c = private;

		if (c->t == t)
			return true;
		end_io = c->end_io;
		private = c->private;
	}
	return false;
}

/**
 * stb_tracker_end_io() - how a write ends when all trackers have seen its end
 * @bio: write
 * @private: out: what it has as bi_private then
 *
 * Context: any.
 * Return: what it has as bi_end_io then.
 */
bio_end_io_t *stb_tracker_end_io(struct bio *bio, void **private)
{
	bio_end_io_t *end_io = bio->bi_end_io;

	*private = bio->bi_private;
	while (end_io == counted_end_io) {
		struct stb_counted *c = *private;

		end_io = c->end_io;
		*private = c->private;
	}
	return end_io;
}

/**
 * stb_tracker_count() - know when a write that is passed on has completed
 * @t: tracker
 * @bio: write that it passes on
 *
 * Nothing else tells. A request-based queue could be frozen, but a write may be
 * parked before it (cgroup throttling), and bio-based drivers account what they
 * have in flight when they please (dm-crypt: after it has encrypted).
 *
 * Without memory the write goes on uncounted, and the next take has to make do
 * with what queues tell.
 *
 * Context: any; never sleeps. In an RCU read-side section with the decision to
 * pass, or by a worker that is flushed behind the gate.
 */
void stb_tracker_count(struct stb_tracker *t, struct bio *bio)
{
	struct stb_counted *c = counted_alloc();

	if (unlikely(!c)) {
		WRITE_ONCE(t->uncounted, STB_UNCOUNTED_ANYWHERE);
		return;
	}
	c->t = t;
	c->end_io = bio->bi_end_io;
	c->private = bio->bi_private;
	bio->bi_end_io = counted_end_io;
	bio->bi_private = c;
	this_cpu_inc(t->figures->inflight);
}

/**
 * stb_tracker_inflight() - counted writes in flight
 * @t: tracker
 *
 * Return: how many. While none is added it is never too small, since what other
 * processors take away meanwhile is seen or not.
 */
long stb_tracker_inflight(struct stb_tracker *t)
{
	long nr = 0;
	int cpu;

	for_each_possible_cpu(cpu)
		nr += READ_ONCE(per_cpu_ptr(t->figures, cpu)->inflight);
	return nr;
}

/**
 * stb_tracker_release() - let a held write go
 * @t: tracker that held it
 * @bio: write, on no list
 *
 * It is counted and marked now, with the number that is in force now: a write
 * that was held across the flip belongs to the new epoch.
 */
void stb_tracker_release(struct stb_tracker *t, struct bio *bio)
{
	struct stb_range r = {};
	struct stb_change_map *map;

	rcu_read_lock();
	map = rcu_dereference(t->map);
	if (stb_tracker_range(t, map->nr_sect, bio, &r))
		stb_change_map_mark(map, r);
	stb_tracker_count(t, bio);
	rcu_read_unlock();
	trace_stillblock_release(t->id, r.first, r.end - r.first);
	stb_hook_released(bio);
	stb_hook_resume(bio, t);
}

/* Release what was held, when the mode is STB_PASS again. */
static void tracker_work(struct work_struct *work)
{
	struct stb_tracker *t = container_of(work, struct stb_tracker, work);
	unsigned int noio = memalloc_noio_save();
	struct blk_plug plug;
	struct bio *bio;

	blk_start_plug(&plug);
	do {
		raw_spin_lock_irq(&t->lock);
		bio = t->mode == STB_PASS ? bio_list_pop(&t->held) : NULL;
		raw_spin_unlock_irq(&t->lock);
		if (bio)
			stb_tracker_release(t, bio);
	} while (bio);
	blk_finish_plug(&plug);
	memalloc_noio_restore(noio);
}

/**
 * stb_tracker_set_mode() - the only place where a tracker's mode changes
 * @t: tracker
 * @mode: new mode; see the transitions above enum stb_mode
 * @cow: with STB_COW, who preserves; else NULL
 *
 * @t->cow is left as it is when the mode becomes STB_PASS: its worker still
 * releases what it holds. stb_cow_detach() clears it.
 */
void stb_tracker_set_mode(struct stb_tracker *t, enum stb_mode mode,
			  struct stb_cow *cow)
{
	unsigned long flags;

	raw_spin_lock_irqsave(&t->lock, flags);
	if (cow)
		rcu_assign_pointer(t->cow, cow);
	/*
	 * Pairs with the acquire in hook_hold(): who sees the mode sees the
	 * number and the bitmaps that belong to it.
	 */
	smp_store_release(&t->mode, mode);
	raw_spin_unlock_irqrestore(&t->lock, flags);
}

/*
 * Wait for writes that were not counted. Their submitters have entered the
 * queue, so an empty queue is the proof. Request-based queues are emptied by a
 * freeze of the queue, which new reads wait out; bio-based drivers account what
 * they have in flight.
 */
static int tracker_drain_queue(struct stb_tracker *t, unsigned long deadline)
{
	struct request_queue *q = t->disk->queue;
	long left = max_t(long, deadline - jiffies, 1);
	int ret = 0;

	if (!queue_is_mq(q)) {
		while (stb_disk_inflight_writes(t->disk)) {
			if (time_after(jiffies, deadline))
				return -ETIMEDOUT;
			usleep_range(100, 200);
		}
		return 0;
	}
	blk_freeze_queue_start(q);
	if (blk_mq_freeze_queue_wait_timeout(q, left) <= 0)
		ret = -ETIMEDOUT;
	stb_unfreeze_queue(q);
	return ret;
}

/**
 * stb_tracker_settle() - prepare for the gate, while nothing is frozen yet
 * @t: tracker
 *
 * Context: control mutex held.
 * Return: true when the caller has to wait for RCU tasks before it gates: a task
 * may have been preempted between the hook and the queue with a write that was
 * not counted.
 */
bool stb_tracker_settle(struct stb_tracker *t)
{
	stb_assert_control();
	if (READ_ONCE(t->uncounted) != STB_UNCOUNTED_ANYWHERE)
		return false;
	WRITE_ONCE(t->uncounted, STB_UNCOUNTED_QUEUED);
	return true;
}

/**
 * stb_tracker_gate() - hold every write and wait for those in flight
 * @t: tracker in STB_PASS. Of stacked trackers the upper one is gated first,
 *	or its writes would wait at the gate of the lower one for ever
 * @deadline: jiffies
 *
 * Context: control mutex held.
 * Return: 0 when no write of the device is in flight and none will start until
 * the mode changes; -ETIMEDOUT.
 */
int stb_tracker_gate(struct stb_tracker *t, unsigned long deadline)
{
	int ret;

	stb_assert_control();
	stb_tracker_set_mode(t, STB_GATE, NULL);
	/* Whoever decided by the mode before has counted its write behind this. */
	synchronize_rcu_expedited();
	/* The worker may have taken a write off the list and not counted it yet. */
	flush_work(&t->work);
	while (stb_tracker_inflight(t)) {
		if (time_after(jiffies, deadline))
			return -ETIMEDOUT;
		usleep_range(50, 100);
	}
	if (READ_ONCE(t->uncounted) == STB_UNCOUNTED_NONE)
		return 0;
	if (stb_tracker_settle(t))
		synchronize_rcu_tasks();
	ret = tracker_drain_queue(t, deadline);
	if (!ret)
		WRITE_ONCE(t->uncounted, STB_UNCOUNTED_NONE);
	return ret;
}

/**
 * stb_tracker_ungate() - give a take up
 * @t: tracker in STB_PASS or STB_GATE
 *
 * All held writes go on, marked with the number that is still in force.
 *
 * Context: control mutex held.
 */
void stb_tracker_ungate(struct stb_tracker *t)
{
	stb_assert_control();
	stb_tracker_set_mode(t, STB_PASS, NULL);
	queue_work(stb_wq, &t->work);
	flush_work(&t->work);
}

/**
 * stb_tracker_map() - the change map, for those who change it or its owner
 * @t: tracker
 *
 * Context: control mutex held.
 * Return: the map.
 */
struct stb_change_map *stb_tracker_map(struct stb_tracker *t)
{
	stb_assert_control();
	return rcu_dereference_protected(t->map, true);
}

/*
 * A map for a device of this size, with the block size that was asked for at
 * attach.
 */
static struct stb_change_map *tracker_new_map(struct stb_tracker *t,
					      sector_t nr_sect, u32 began,
					      u32 *reason)
{
	unsigned int shift = t->block_size ? ilog2(t->block_size) :
					     stb_block_shift(nr_sect);
	struct stb_change_map *map;

	if (nr_sect < 1ull << (shift - SECTOR_SHIFT)) {
		*reason = STILLBLOCK_REASON_TOO_SMALL;
		return ERR_PTR(-EOPNOTSUPP);
	}
	if (stb_nr_blocks(nr_sect, shift) > STB_MAP_MAX_BYTES) {
		*reason = STILLBLOCK_REASON_BAD_BLOCK_SIZE;
		return ERR_PTR(-EINVAL);
	}
	map = stb_change_map_create(nr_sect, shift, began);
	if (!map) {
		*reason = STILLBLOCK_REASON_NO_MEMORY;
		return ERR_PTR(-ENOMEM);
	}
	return map;
}

/**
 * stb_tracker_refresh() - is the device still what its history is about?
 * @t: tracker of no snapshot
 * @reason: out: why it cannot be used
 *
 * With another size than before a new history begins, in a new generation:
 * writes beyond the old end were not seen.
 *
 * Context: control mutex held.
 * Return: 0 or a negative errno.
 */
int stb_tracker_refresh(struct stb_tracker *t, u32 *reason)
{
	struct stb_change_map *old = stb_tracker_map(t);
	struct stb_change_map *fresh;

	if (!stb_disk_live(t->disk)) {
		*reason = STILLBLOCK_REASON_GONE;
		return -ESTALE;
	}
	if (stb_bdev_nr_sect(t->dev.bdev) == old->nr_sect)
		return 0;
	fresh = tracker_new_map(t, stb_bdev_nr_sect(t->dev.bdev),
				STILLBLOCK_HISTORY_RESIZED, reason);
	if (IS_ERR(fresh))
		return PTR_ERR(fresh);
	rcu_assign_pointer(t->map, fresh);
	pr_info("%pg: %llu sectors instead of %llu, generation %pU\n",
		t->dev.bdev, (u64)fresh->nr_sect, (u64)old->nr_sect,
		&fresh->generation);
	synchronize_rcu();
	stb_change_map_destroy(old);
	stb_persist_resized(t);
	return 0;
}

static void tracker_free(struct kref *ref)
{
	struct stb_tracker *t = container_of(ref, struct stb_tracker, ref);

	stb_change_map_destroy(rcu_dereference_protected(t->map, true));
	free_percpu(t->figures);
	stb_bdev_close(&t->dev);
	kfree(t);
}

/**
 * stb_tracker_put() - give a reference back
 * @t: tracker
 */
void stb_tracker_put(struct stb_tracker *t)
{
	kref_put(&t->ref, tracker_free);
}

/*
 * The end of a detached tracker. A write of it may be in a device that hangs:
 * its completion still comes here, so the module stays until then.
 */
static void tracker_free_work(struct work_struct *work)
{
	struct stb_tracker *t = container_of(to_delayed_work(work),
					     struct stb_tracker, free_work);

	if (stb_tracker_inflight(t)) {
		queue_delayed_work(stb_wq, &t->free_work, STB_DETACH_TIMEOUT);
		return;
	}
	/* The last completion may be between its count and its return. */
	synchronize_rcu();
	stb_tracker_put(t);
	module_put(THIS_MODULE);
}

/**
 * stb_tracker_find() - find a tracker by its id
 * @id: id
 *
 * Context: control mutex held.
 * Return: the tracker, without a reference, or NULL.
 */
struct stb_tracker *stb_tracker_find(u64 id)
{
	stb_assert_control();
	return id <= U32_MAX ? xa_load(&trackers, id) : NULL;
}

/**
 * stb_tracker_next() - go through all trackers
 * @after: id of the one before, 0 for the first
 *
 * Context: control mutex held.
 * Return: the tracker with the next id, without a reference, or NULL.
 */
struct stb_tracker *stb_tracker_next(u64 after)
{
	unsigned long id = after;

	stb_assert_control();
	return xa_find_after(&trackers, &id, ULONG_MAX, XA_PRESENT);
}

static u32 tracker_unsuitable(struct block_device *bdev)
{
	if (bdev_is_zoned(bdev))
		return STILLBLOCK_REASON_ZONED;
	if (stb_is_dax(bdev->bd_disk))
		return STILLBLOCK_REASON_DAX;
	if (stb_has_rw_page(bdev->bd_disk) || stb_is_image(bdev->bd_disk))
		return STILLBLOCK_REASON_BYPASSES_BIO;
	return STILLBLOCK_REASON_NONE;
}

static struct stb_tracker *tracker_of(struct block_device *bdev)
{
	struct stb_tracker *t;
	unsigned long id;

	stb_assert_control();
	xa_for_each(&trackers, id, t)
		if (t->dev.bdev == bdev)
			return t;
	return NULL;
}

static int tracker_open(struct stb_tracker *t, dev_t dev, u32 *reason)
{
	struct stb_change_map *map;
	struct stb_tracker *other;
	int ret;

	ret = stb_bdev_open(dev, STB_OPEN_READ, NULL, &t->dev);
	if (ret) {
		*reason = ret == -ENOMEM ? STILLBLOCK_REASON_NO_MEMORY :
					   STILLBLOCK_REASON_GONE;
		return ret;
	}
	t->disk = t->dev.bdev->bd_disk;
	t->start = stb_bdev_start(t->dev.bdev);
	*reason = tracker_unsuitable(t->dev.bdev);
	ret = -EOPNOTSUPP;
	if (*reason)
		goto close;
	other = tracker_of(t->dev.bdev);
	ret = -EEXIST;
	if (other) {
		*reason = STILLBLOCK_REASON_ALREADY_ATTACHED;
		goto close;
	}
	map = tracker_new_map(t, stb_bdev_nr_sect(t->dev.bdev),
			      STILLBLOCK_HISTORY_FIRST, reason);
	if (IS_ERR(map)) {
		ret = PTR_ERR(map);
		goto close;
	}
	rcu_assign_pointer(t->map, map);
	return 0;

close:
	stb_bdev_close(&t->dev);
	return ret;
}

/**
 * stb_tracker_attach() - begin to track a device
 * @args: STILLBLOCK_IOC_ATTACH
 *
 * Context: control mutex held.
 * Return: 0 or a negative errno, with @args->reason.
 */
int stb_tracker_attach(struct stillblock_attach *args)
{
	struct stb_record *saved;
	struct stb_tracker *t;
	dev_t dev;
	int ret;

	stb_assert_control();
	if (args->flags)
		return -EINVAL;
	if (stb_persist_sealed()) {
		args->reason = STILLBLOCK_REASON_SHUTDOWN;
		return -ESHUTDOWN;
	}
	if (args->block_size &&
	    (!is_power_of_2(args->block_size) ||
	     args->block_size < 1u << STB_BLOCK_SHIFT_MIN ||
	     args->block_size > 1u << STB_BLOCK_SHIFT_MAX)) {
		args->reason = STILLBLOCK_REASON_BAD_BLOCK_SIZE;
		return -EINVAL;
	}
	ret = stb_dev_of_fd(args->bdev_fd, &dev);
	if (ret) {
		args->reason = STILLBLOCK_REASON_NOT_BLOCK_DEVICE;
		return ret;
	}

	args->reason = STILLBLOCK_REASON_NO_MEMORY;
	t = kzalloc(sizeof(*t), GFP_KERNEL);
	if (!t)
		return -ENOMEM;
	ret = -ENOMEM;
	t->figures = alloc_percpu(struct stb_tracker_figures);
	if (!t->figures)
		goto free;
	kref_init(&t->ref);
	raw_spin_lock_init(&t->lock);
	bio_list_init(&t->held);
	INIT_WORK(&t->work, tracker_work);
	INIT_DELAYED_WORK(&t->free_work, tracker_free_work);
	t->uncounted = STB_UNCOUNTED_ANYWHERE;
	atomic64_set(&t->nr_held_writes, 0);
	t->mode = STB_PASS;
	t->block_size = args->block_size;
	memcpy(t->identity, args->identity, sizeof(t->identity));
	t->record = -1;

	args->reason = STILLBLOCK_REASON_NONE;
	ret = tracker_open(t, dev, &args->reason);
	if (ret)
		goto free_percpu;

	t->id = last_id + 1;
	ret = xa_insert(&trackers, t->id, t, GFP_KERNEL);
	if (ret) {
		args->reason = STILLBLOCK_REASON_NO_MEMORY;
		goto close;
	}
	/* In use, on stable storage, before the first write is tracked. */
	saved = stb_persist_claim(t);
	if (saved)
		stb_tracker_set_mode(t, STB_GATE, NULL);
	ret = stb_hook_add(t, &args->reason);
	if (ret)
		goto forget;
	last_id = t->id;
	stb_persist_attached(t, saved);
	/* A module with trackers is in use: their history would be lost. */
	__module_get(THIS_MODULE);
	args->tracker = t->id;
	pr_info("%pg: tracked, generation %pU %s\n", t->dev.bdev,
		&stb_tracker_map(t)->generation,
		t->taken_up ? "taken up" : "begun");
	return 0;

forget:
	kfree(saved);
	stb_persist_forget(t);
	xa_erase(&trackers, t->id);
close:
	stb_change_map_destroy(stb_tracker_map(t));
	stb_bdev_close(&t->dev);
free_percpu:
	free_percpu(t->figures);
free:
	kfree(t);
	return ret;
}

/**
 * stb_tracker_detach() - end the tracking of a device and its history
 * @args: STILLBLOCK_IOC_DETACH
 *
 * Context: control mutex held.
 * Return: 0 or a negative errno, with @args->reason.
 */
int stb_tracker_detach(struct stillblock_detach *args)
{
	struct stb_tracker *t;
	unsigned long limit;
	bool keep = args->flags & STILLBLOCK_DETACH_KEEP;
	int ret;

	stb_assert_control();
	if (args->flags & ~STILLBLOCK_DETACH_KEEP)
		return -EINVAL;
	if (stb_persist_sealed()) {
		args->reason = STILLBLOCK_REASON_SHUTDOWN;
		return -ESHUTDOWN;
	}
	t = stb_tracker_find(args->tracker);
	if (!t) {
		args->reason = STILLBLOCK_REASON_NOT_ATTACHED;
		return -ENOENT;
	}
	if (t->snapshot) {
		args->reason = STILLBLOCK_REASON_IN_SNAPSHOT;
		return -EBUSY;
	}
	if (keep) {
		ret = stb_tracker_gate(t, jiffies + STB_DETACH_TIMEOUT);
		if (ret) {
			stb_tracker_ungate(t);
			args->reason = STILLBLOCK_REASON_DRAIN_TIMEOUT;
			return ret;
		}
		stb_persist_prepare(t);
	}
	xa_erase(&trackers, t->id);
	stb_hook_remove(t);
	if (keep)
		stb_persist_keep(t);
	else
		stb_persist_forget(t);
	/* What waited meanwhile is written unseen, and the next attach knows. */
	stb_tracker_ungate(t);
	pr_info("%pg: no longer tracked\n", t->dev.bdev);
	limit = jiffies + STB_DETACH_TIMEOUT;
	while (stb_tracker_inflight(t) && time_before(jiffies, limit))
		usleep_range(100, 200);
	tracker_free_work(&t->free_work.work);
	return 0;
}

static void tracker_describe(struct stb_tracker *t,
			     struct stillblock_tracker *out)
{
	struct stb_change_map *map = stb_tracker_map(t);
	int cpu;

	memset(out, 0, sizeof(*out));
	out->tracker = t->id;
	out->major = MAJOR(t->dev.bdev->bd_dev);
	out->minor = MINOR(t->dev.bdev->bd_dev);
	out->nr_sect = map->nr_sect;
	out->block_size = 1u << map->block_shift;
	if (t->snapshot)
		out->flags |= STILLBLOCK_TRACKER_IN_SNAPSHOT;
	if (!stb_disk_live(t->disk))
		out->flags |= STILLBLOCK_TRACKER_GONE;
	else if (stb_bdev_nr_sect(t->dev.bdev) != map->nr_sect)
		out->flags |= STILLBLOCK_TRACKER_RESIZED;
	memcpy(out->generation, &map->generation, sizeof(out->generation));
	out->number = map->number;
	out->began = map->began;
	out->kept = stb_persist_kept(t);
	if (t->taken_up)
		out->flags |= STILLBLOCK_TRACKER_TAKEN_UP;
	for_each_possible_cpu(cpu)
		out->nr_writes += per_cpu_ptr(t->figures, cpu)->writes;
	out->nr_held_writes = atomic64_read(&t->nr_held_writes);
}

/**
 * stb_tracker_list() - describe all trackers
 * @args: STILLBLOCK_IOC_LIST
 *
 * Context: control mutex held.
 * Return: 0 or -EFAULT.
 */
int stb_tracker_list(struct stillblock_list *args)
{
	struct stillblock_tracker __user *to = u64_to_user_ptr(args->trackers);
	struct stillblock_tracker out;
	struct stb_tracker *t;
	unsigned long id;

	stb_assert_control();
	args->count = 0;
	xa_for_each(&trackers, id, t) {
		if (args->count < args->capacity) {
			tracker_describe(t, &out);
			if (copy_to_user(to + args->count, &out, sizeof(out)))
				return -EFAULT;
		}
		args->count++;
	}
	return 0;
}

/**
 * stb_tracker_mark() - call a range of a device changed
 * @args: STILLBLOCK_IOC_MARK
 *
 * Context: control mutex held, so that the number in force stays.
 * Return: 0 or a negative errno, with @args->reason.
 */
int stb_tracker_mark(struct stillblock_mark *args)
{
	struct stb_change_map *map;
	struct stb_tracker *t;
	struct stb_range r;
	u64 size, end, step;

	stb_assert_control();
	if (args->flags)
		return -EINVAL;
	t = stb_tracker_find(args->tracker);
	if (!t) {
		args->reason = STILLBLOCK_REASON_NOT_ATTACHED;
		return -ENOENT;
	}
	map = stb_tracker_map(t);
	size = (u64)map->nr_sect << SECTOR_SHIFT;
	if (!args->length || args->offset > size ||
	    args->length > size - args->offset)
		return -ERANGE;
	end = DIV_ROUND_UP_ULL(args->offset + args->length, SECTOR_SIZE);
	step = (u64)STB_MARK_BLOCKS << (map->block_shift - SECTOR_SHIFT);
	for (r.first = args->offset >> SECTOR_SHIFT; r.first < end;
	     r.first = r.end) {
		r.end = min_t(u64, end, r.first + step);
		stb_change_map_mark(map, r);
		cond_resched();
	}
	return 0;
}

/**
 * stb_tracker_init() - prepare for trackers
 *
 * Return: 0 or -ENOMEM.
 */
int stb_tracker_init(void)
{
	counted_cache = KMEM_CACHE(stb_counted, 0);
	return counted_cache ? 0 : -ENOMEM;
}

/**
 * stb_tracker_exit() - undo stb_tracker_init(); there is no tracker left
 */
void stb_tracker_exit(void)
{
	int cpu;

	WARN_ON(!xa_empty(&trackers));
	for_each_possible_cpu(cpu) {
		struct stb_counted_spares *spares =
			per_cpu_ptr(&counted_spares, cpu);

		while (spares->nr)
			kmem_cache_free(counted_cache,
					spares->spare[--spares->nr]);
	}
	xa_destroy(&trackers);
	kmem_cache_destroy(counted_cache);
}
