// SPDX-License-Identifier: GPL-2.0-only
/*
 * A snapshot: taken by one ioctl, owned by a file descriptor, gone with it.
 *
 * The take: freeze file systems, gate and drain every origin, flip all of them,
 * thaw. Between freeze and thaw it touches no user memory
 * and allocates nothing, since either could wait for a frozen file system.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/anon_inodes.h>
#include <linux/capability.h>
#include <linux/fcntl.h>
#include <linux/fs.h>
#include <linux/module.h>
#include <linux/poll.h>
#include <linux/rcupdate.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/timekeeping.h>
#include <linux/uaccess.h>

#include "cow.h"
#include "freeze.h"
#include "main.h"
#include "persist.h"
#include "snapshot.h"
#include "trace.h"
#include "tracker.h"

#define STB_FREEZE_MS_DEFAULT	10000
/* Writes in flight must end within this once their file systems are frozen. */
#define STB_DRAIN_TIMEOUT	(5 * HZ)
#define STB_WATCHDOG_PERIOD	HZ
/* How long closing waits for I/O in flight before it leaves that to a worker. */
#define STB_CLOSE_TIMEOUT	(10 * HZ)

/* For closing: a reference has gone. Global, since the snapshot may have, too. */
static DECLARE_WAIT_QUEUE_HEAD(put_wait);

static void snapshot_destroy(struct stb_snapshot *s)
{
	u32 i;

	for (i = 0; i < s->nr_images; i++)
		stb_image_destroy(&s->images[i]);
	stb_store_destroy(&s->store);
	kvfree(s->images);
	kfree(s);
	module_put(THIS_MODULE);
}

static void snapshot_free_work(struct work_struct *work)
{
	snapshot_destroy(container_of(work, struct stb_snapshot, free_work));
}

static void snapshot_last_put(struct kref *ref)
{
	struct stb_snapshot *s = container_of(ref, struct stb_snapshot, ref);

	queue_work(stb_wq, &s->free_work);
}

/**
 * stb_snapshot_get() - take a reference for an I/O
 * @s: snapshot
 */
void stb_snapshot_get(struct stb_snapshot *s)
{
	kref_get(&s->ref);
}

/**
 * stb_snapshot_put() - give a reference back
 * @s: snapshot
 *
 * Context: any.
 */
void stb_snapshot_put(struct stb_snapshot *s)
{
	if (!kref_put(&s->ref, snapshot_last_put) && wq_has_sleeper(&put_wait))
		wake_up_all(&put_wait);
}

static void snapshot_event(struct stb_snapshot *s, u32 type, u64 value)
{
	struct stillblock_event *e;

	lockdep_assert_held(&s->lock);
	if (s->nr_events == STB_MAX_EVENTS) {
		s->nr_lost++;
		return;
	}
	e = &s->events[(s->first_event + s->nr_events++) % STB_MAX_EVENTS];
	e->type = type;
	e->pad = 0;
	e->value = value;
	e->time_ns = ktime_get_real_ns();
}

/*
 * Return: true when the phase has changed; false for a transition that there
 * is not, such as a second failure.
 */
static bool snapshot_set_state(struct stb_snapshot *s,
			       enum stb_snapshot_phase phase, u32 reason)
{
	unsigned long flags;
	bool changed;

	spin_lock_irqsave(&s->lock, flags);
	changed = s->phase < phase &&
		  (phase != STB_SNAPSHOT_FAILED ||
		   s->phase == STB_SNAPSHOT_HELD);
	if (changed) {
		if (phase == STB_SNAPSHOT_FAILED) {
			s->reason = reason;
			snapshot_event(s, STILLBLOCK_EVENT_FAILED, reason);
		}
		/* Pairs with the acquire in stb_snapshot_held(). */
		smp_store_release(&s->phase, phase);
	}
	spin_unlock_irqrestore(&s->lock, flags);
	if (changed)
		wake_up_interruptible(&s->wait);
	return changed;
}

/**
 * stb_snapshot_fail() - the images are wrong from now on
 * @s: snapshot
 * @reason: enum stillblock_reason
 *
 * Every write passes, every image read gives EIO. Held writes are released by
 * the workers.
 *
 * Context: process; no lock but the control mutex.
 */
void stb_snapshot_fail(struct stb_snapshot *s, u32 reason)
{
	u32 i;

	if (!snapshot_set_state(s, STB_SNAPSHOT_FAILED, reason))
		return;
	trace_stillblock_fail(reason);
	pr_warn("snapshot failed (reason %u), its origins go on\n", reason);
	for (i = 0; i < s->nr_images; i++) {
		stb_tracker_set_mode(s->images[i].cow.tracker, STB_PASS, NULL);
		stb_cow_kick(&s->images[i].cow);
	}
}

/**
 * stb_snapshot_low() - tell that the store runs low
 * @s: snapshot
 */
void stb_snapshot_low(struct stb_snapshot *s)
{
	u64 capacity, used, left;
	unsigned long flags;

	stb_store_usage(&s->store, &capacity, &used, &left);
	spin_lock_irqsave(&s->lock, flags);
	snapshot_event(s, STILLBLOCK_EVENT_LOW_WATERMARK, left);
	spin_unlock_irqrestore(&s->lock, flags);
	wake_up_interruptible(&s->wait);
}

static void snapshot_watchdog(struct work_struct *work)
{
	struct stb_snapshot *s = container_of(to_delayed_work(work),
					      struct stb_snapshot, watchdog);
	u32 i;

	for (i = 0; i < s->nr_images; i++) {
		u32 reason = stb_cow_overdue(&s->images[i].cow);

		if (reason)
			stb_snapshot_fail(s, reason);
	}
	if (stb_snapshot_held(s))
		queue_delayed_work(stb_wq, &s->watchdog, STB_WATCHDOG_PERIOD);
}

static u64 snapshot_held_writes(struct stb_snapshot *s)
{
	u64 nr = 0;
	u32 i;

	for (i = 0; i < s->nr_images; i++)
		nr += atomic64_read(&s->images[i].cow.tracker->nr_held_writes);
	return nr;
}

/* The part of a range of @bdev that lies on an origin, in sectors of that. */
static bool snapshot_overlap(struct stb_cow *cow, struct block_device *bdev,
			     struct stb_range r, struct stb_range *on_origin)
{
	struct stb_tracker *t = cow->tracker;
	sector_t first = stb_bdev_start(bdev) + r.first;
	sector_t end = stb_bdev_start(bdev) + r.end;

	if (t->disk != bdev->bd_disk || end <= t->start ||
	    first >= t->start + cow->nr_sect)
		return false;
	on_origin->first = max(first, t->start) - t->start;
	on_origin->end = min(end, t->start + cow->nr_sect) - t->start;
	return true;
}

/*
 * What is about a store on @bdev that this snapshot cannot do with? Files of a
 * file system on an origin will do until the instant: what they hold now is
 * theirs. Later their blocks may be those of a file that was deleted since,
 * which the image still needs.
 */
static u32 snapshot_check_store(void *data, struct block_device *bdev, u32 kind)
{
	struct stb_range all = { .end = stb_bdev_nr_sect(bdev) };
	struct stb_snapshot *s = data;
	struct stb_range on_origin;
	u32 i;

	for (i = 0; i < s->nr_images; i++) {
		struct stb_cow *cow = &s->images[i].cow;

		if ((kind != STILLBLOCK_STORE_FILE || stb_snapshot_held(s)) &&
		    snapshot_overlap(cow, bdev, all, &on_origin))
			return STILLBLOCK_REASON_STORE_ON_ORIGIN;
		if (bdev_logical_block_size(bdev) >
		    bdev_logical_block_size(cow->tracker->dev.bdev))
			return STILLBLOCK_REASON_STORE_UNSUITABLE;
	}
	return STILLBLOCK_REASON_NONE;
}

/*
 * A range of @bdev becomes store. On each origin that it lies on, the chunks
 * that are wholly within it become an area of the store, and only they are
 * used: a chunk with other data beside would have to be preserved from our own
 * writes.
 */
static int snapshot_claim_store(void *data, struct block_device *bdev,
				struct stb_range *r)
{
	struct stb_snapshot *s = data;
	struct stb_range usable = *r;
	u32 i;

	for (i = 0; i < s->nr_images; i++) {
		struct stb_cow *cow = &s->images[i].cow;
		struct stb_range on_origin;
		sector_t from_origin;
		u64 first, end;
		int ret;

		if (!snapshot_overlap(cow, bdev, *r, &on_origin))
			continue;
		/* Half on an origin, half beside it: who would do that? */
		if (on_origin.end - on_origin.first != r->end - r->first)
			return -ERANGE;
		first = DIV_ROUND_UP_ULL(on_origin.first, STB_CHUNK_SECT);
		end = on_origin.end / STB_CHUNK_SECT;
		if (first >= end) {
			usable.end = usable.first;
			continue;
		}
		ret = stb_cow_add_area(cow, first, end);
		if (ret)
			return ret;
		from_origin = r->first - on_origin.first;
		usable.first = max_t(sector_t, usable.first,
				     from_origin + first * STB_CHUNK_SECT);
		usable.end = min_t(sector_t, usable.end,
				   from_origin + end * STB_CHUNK_SECT);
	}
	*r = usable;
	return 0;
}

static const struct stb_store_rules snapshot_store_rules = {
	.check = snapshot_check_store,
	.claim = snapshot_claim_store,
};

static int snapshot_add_images(struct stb_snapshot *s,
			       struct stillblock_take *args)
{
	const u64 __user *ids = u64_to_user_ptr(args->trackers);
	u32 i;

	for (i = 0; i < args->nr_trackers; i++) {
		struct stb_tracker *t;
		int ret;
		u64 id;

		args->culprit = i;
		if (get_user(id, ids + i))
			return -EFAULT;
		t = stb_tracker_find(id);
		if (!t) {
			args->reason = STILLBLOCK_REASON_NOT_ATTACHED;
			return -ENOENT;
		}
		if (t->snapshot) {
			args->reason = STILLBLOCK_REASON_IN_SNAPSHOT;
			return -EBUSY;
		}
		ret = stb_tracker_refresh(t, &args->reason);
		if (ret)
			return ret;
		t->snapshot = s;
		s->nr_images = i + 1;
		ret = stb_image_init(&s->images[i], s, t);
		if (ret) {
			args->reason = STILLBLOCK_REASON_NO_MEMORY;
			return ret;
		}
	}
	return 0;
}

static int snapshot_add_stores(struct stb_snapshot *s,
			       struct stillblock_take *args)
{
	const struct stillblock_store __user *from =
		u64_to_user_ptr(args->stores);
	u32 i;

	for (i = 0; i < args->nr_stores; i++) {
		struct stillblock_store spec;
		int ret;

		args->culprit = i;
		if (copy_from_user(&spec, from + i, sizeof(spec)))
			return -EFAULT;
		ret = stb_store_add(&s->store, &spec, &snapshot_store_rules, s,
				    &args->reason);
		if (ret)
			return ret;
	}
	for (i = 0; i < s->nr_images; i++)
		stb_cow_sort_areas(&s->images[i].cow);
	return 0;
}

/*
 * Let writes that were not counted reach their queues, while nothing is frozen
 * and nothing is held up.
 */
static void snapshot_settle(struct stb_snapshot *s)
{
	bool wait = false;
	u32 i;

	for (i = 0; i < s->nr_images; i++)
		wait |= stb_tracker_settle(s->images[i].cow.tracker);
	if (wait)
		synchronize_rcu_tasks();
}

static void snapshot_ungate(struct stb_snapshot *s)
{
	u32 i;

	for (i = 0; i < s->nr_images; i++)
		stb_tracker_ungate(s->images[i].cow.tracker);
}

/*
 * The tracker to gate before or together with that of image @i: on one disk
 * they are gated by rising id, as a bio passes them. The other way round, a
 * write counted by the first would wait at the gate of the second for ever.
 */
static struct stb_tracker *snapshot_next_to_gate(struct stb_snapshot *s, u32 i)
{
	struct gendisk *disk = s->images[i].cow.tracker->disk;
	struct stb_tracker *first = NULL;
	u32 j;

	for (j = i; j < s->nr_images; j++) {
		struct stb_tracker *t = s->images[j].cow.tracker;

		if (t->disk == disk && t->mode == STB_PASS &&
		    (!first || t->id < first->id))
			first = t;
	}
	return first;
}

/* Gate all, drain all, flip all. */
static int snapshot_switch(struct stb_snapshot *s, struct stillblock_take *args)
{
	unsigned long deadline = jiffies + STB_DRAIN_TIMEOUT;
	u64 begin = ktime_get_ns();
	u32 i;

	for (i = 0; i < s->nr_images; i++) {
		struct stb_tracker *t;

		while ((t = snapshot_next_to_gate(s, i))) {
			int ret = stb_tracker_gate(t, deadline);

			if (ret) {
				args->reason = STILLBLOCK_REASON_DRAIN_TIMEOUT;
				args->culprit = i;
				return ret;
			}
		}
	}
	s->taken_ns = ktime_get_real_ns();
	for (i = 0; i < s->nr_images; i++)
		stb_image_switch(&s->images[i]);
	snapshot_set_state(s, STB_SNAPSHOT_HELD, 0);
	for (i = 0; i < s->nr_images; i++)
		stb_cow_attach(&s->images[i].cow);
	/* Pairs with the acquire in stb_snapshot_switched(). */
	smp_store_release(&s->switched, true);
	for (i = 0; i < s->nr_images; i++)
		stb_cow_kick(&s->images[i].cow);
	s->gate_ns = ktime_get_ns() - begin;
	return 0;
}

static int snapshot_freeze_and_switch(struct stb_snapshot *s,
				      struct stb_freeze *freeze,
				      struct stillblock_take *args)
{
	u32 ms = args->freeze_timeout_ms ?: STB_FREEZE_MS_DEFAULT;
	u64 begin;
	int ret;

	snapshot_settle(s);
	begin = ktime_get_ns();
	ret = stb_freeze_all(freeze, jiffies + msecs_to_jiffies(ms),
			     &args->reason, &args->culprit);
	if (!ret)
		ret = snapshot_switch(s, args);
	if (ret)
		snapshot_ungate(s);
	stb_freeze_end(freeze);
	s->freeze_ns = ktime_get_ns() - begin;
	return ret;
}

/* Let every write pass and forget the trackers. */
static void snapshot_release_origins(struct stb_snapshot *s)
{
	u32 i;

	stb_assert_control();
	snapshot_set_state(s, STB_SNAPSHOT_ENDED, 0);
	/*
	 * It may be failing the snapshot at this moment, which lets all writes
	 * of the origins pass: not those of the next snapshot.
	 */
	cancel_delayed_work_sync(&s->watchdog);
	for (i = 0; i < s->nr_images; i++) {
		struct stb_tracker *t = s->images[i].cow.tracker;

		if (t->snapshot != s)
			continue;
		stb_cow_detach(&s->images[i].cow);
		t->snapshot = NULL;
	}
}

/**
 * stb_snapshot_abandon() - end a snapshot for the machine goes down
 * @s: snapshot
 *
 * Context: control mutex held.
 */
void stb_snapshot_abandon(struct stb_snapshot *s)
{
	stb_snapshot_fail(s, STILLBLOCK_REASON_SHUTDOWN);
	snapshot_release_origins(s);
}

/*
 * The end of a snapshot whose origins have been released. I/O may be in
 * flight, to a store that hangs perhaps: then a worker frees the rest when it
 * comes back.
 */
static void snapshot_end(struct stb_snapshot *s)
{
	u32 i;

	for (i = 0; i < s->nr_images; i++) {
		stb_cow_kick(&s->images[i].cow);
		stb_image_del(&s->images[i]);
	}
	if (wait_event_timeout(put_wait, kref_read(&s->ref) == 1,
			       STB_CLOSE_TIMEOUT))
		snapshot_destroy(s);
	else
		stb_snapshot_put(s);
}

static int snapshot_fop_release(struct inode *inode, struct file *file)
{
	struct stb_snapshot *s = file->private_data;

	if (!s)
		return 0;
	stb_control_lock();
	snapshot_release_origins(s);
	stb_control_unlock();
	snapshot_end(s);
	return 0;
}

static __poll_t snapshot_fop_poll(struct file *file, poll_table *wait)
{
	struct stb_snapshot *s = file->private_data;

	poll_wait(file, &s->wait, wait);
	return READ_ONCE(s->nr_events) ? EPOLLIN | EPOLLRDNORM : 0;
}

static bool snapshot_next_event(struct stb_snapshot *s,
				struct stillblock_event *e)
{
	unsigned long flags;
	bool got;

	spin_lock_irqsave(&s->lock, flags);
	got = s->nr_events;
	if (got) {
		*e = s->events[s->first_event];
		s->first_event = (s->first_event + 1) % STB_MAX_EVENTS;
		s->nr_events--;
		if (s->nr_lost) {
			snapshot_event(s, STILLBLOCK_EVENT_LOST, s->nr_lost);
			s->nr_lost = 0;
		}
	}
	spin_unlock_irqrestore(&s->lock, flags);
	return got;
}

static ssize_t snapshot_fop_read(struct file *file, char __user *to,
				 size_t len, loff_t *pos)
{
	struct stb_snapshot *s = file->private_data;
	struct stillblock_event e;
	size_t done = 0;
	int ret;

	if (len < sizeof(e))
		return -EINVAL;
	while (len - done >= sizeof(e)) {
		if (snapshot_next_event(s, &e)) {
			if (copy_to_user(to + done, &e, sizeof(e)))
				return -EFAULT;
			done += sizeof(e);
			continue;
		}
		if (done)
			break;
		if (file->f_flags & O_NONBLOCK)
			return -EAGAIN;
		ret = wait_event_interruptible(s->wait,
					       READ_ONCE(s->nr_events));
		if (ret)
			return ret;
	}
	return done;
}

static long snapshot_ioc_state(struct stb_snapshot *s, void __user *to)
{
	struct stillblock_state state = {
		.nr_images = s->nr_images,
		.taken_ns = s->taken_ns,
		.freeze_ns = s->freeze_ns,
		.gate_ns = s->gate_ns,
		.nr_held_writes = snapshot_held_writes(s) - s->held_before,
	};
	unsigned long flags;
	u64 left;

	spin_lock_irqsave(&s->lock, flags);
	state.state = s->phase == STB_SNAPSHOT_HELD ? STILLBLOCK_STATE_HELD :
						      STILLBLOCK_STATE_FAILED;
	state.reason = s->reason;
	spin_unlock_irqrestore(&s->lock, flags);
	stb_store_usage(&s->store, &state.store_capacity, &state.store_used,
			&left);
	return copy_to_user(to, &state, sizeof(state)) ? -EFAULT : 0;
}

static long snapshot_ioc_image(struct stb_snapshot *s, void __user *arg)
{
	struct stillblock_image out;
	struct stb_image *image;
	u32 index;

	if (copy_from_user(&out, arg, sizeof(out)))
		return -EFAULT;
	index = out.index;
	if (index >= s->nr_images)
		return -EINVAL;
	image = &s->images[index];
	memset(&out, 0, sizeof(out));
	out.index = index;
	out.block_size = 1u << image->block_shift;
	out.tracker = image->cow.tracker->id;
	out.major = image->disk->major;
	out.minor = image->minor;
	out.nr_sect = image->cow.nr_sect;
	out.nr_blocks = image->nr_blocks;
	memcpy(out.generation, &image->generation, sizeof(out.generation));
	memcpy(out.checkpoint_generation, &image->checkpoint_generation,
	       sizeof(out.checkpoint_generation));
	out.number = image->number;
	out.checkpoint_number = image->checkpoint_number;
	strscpy(out.disk_name, image->disk->disk_name, sizeof(out.disk_name));
	return copy_to_user(arg, &out, sizeof(out)) ? -EFAULT : 0;
}

static long snapshot_ioc_map(struct stb_snapshot *s, void __user *arg)
{
	struct stillblock_map map;
	struct stb_image *image;

	if (copy_from_user(&map, arg, sizeof(map)))
		return -EFAULT;
	if (map.pad || map.index >= s->nr_images)
		return -EINVAL;
	image = &s->images[map.index];
	if (map.first_block > image->nr_blocks ||
	    map.nr_blocks > image->nr_blocks - map.first_block)
		return -EINVAL;
	if (copy_to_user(u64_to_user_ptr(map.buffer),
			 image->map + map.first_block, map.nr_blocks))
		return -EFAULT;
	return 0;
}

static long snapshot_ioc_add_store(struct stb_snapshot *s, void __user *arg)
{
	struct stillblock_add_store args;
	long ret;

	/* Whoever has been given the snapshot's descriptor may not take devices. */
	if (!capable(CAP_SYS_ADMIN))
		return -EPERM;
	if (copy_from_user(&args, arg, sizeof(args)))
		return -EFAULT;
	if (args.flags)
		return -EINVAL;
	args.reason = STILLBLOCK_REASON_NONE;
	/* All that there is to say of a success, said while it can be refused. */
	if (copy_to_user(arg, &args, sizeof(args)))
		return -EFAULT;
	stb_control_lock();
	if (stb_snapshot_held(s)) {
		ret = stb_store_add(&s->store, &args.store,
				    &snapshot_store_rules, s, &args.reason);
	} else {
		args.reason = STILLBLOCK_REASON_FAILED;
		ret = -EIO;
	}
	stb_control_unlock();
	if (ret && copy_to_user(arg, &args, sizeof(args)))
		return -EFAULT;
	return ret;
}

static long snapshot_fop_ioctl(struct file *file, unsigned int cmd,
			       unsigned long arg)
{
	struct stb_snapshot *s = file->private_data;
	void __user *p = (void __user *)arg;

	switch (cmd) {
	case STILLBLOCK_SNAP_IOC_STATE:
		return snapshot_ioc_state(s, p);
	case STILLBLOCK_SNAP_IOC_IMAGE:
		return snapshot_ioc_image(s, p);
	case STILLBLOCK_SNAP_IOC_MAP:
		return snapshot_ioc_map(s, p);
	case STILLBLOCK_SNAP_IOC_ADD_STORE:
		return snapshot_ioc_add_store(s, p);
	default:
		return -ENOTTY;
	}
}

static const struct file_operations snapshot_fops = {
	.owner = THIS_MODULE,
	.release = snapshot_fop_release,
	.poll = snapshot_fop_poll,
	.read = snapshot_fop_read,
	.unlocked_ioctl = snapshot_fop_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
	.llseek = noop_llseek,
};

static struct stb_snapshot *snapshot_alloc(const struct stillblock_take *args)
{
	struct stb_snapshot *s = kzalloc(sizeof(*s), GFP_KERNEL);

	if (!s)
		return NULL;
	s->images = kvcalloc(args->nr_trackers, sizeof(*s->images), GFP_KERNEL);
	if (!s->images) {
		kfree(s);
		return NULL;
	}
	kref_init(&s->ref);
	spin_lock_init(&s->lock);
	init_waitqueue_head(&s->wait);
	INIT_DELAYED_WORK(&s->watchdog, snapshot_watchdog);
	INIT_WORK(&s->free_work, snapshot_free_work);
	stb_store_init(&s->store, args->low_watermark);
	__module_get(THIS_MODULE);
	return s;
}

static int snapshot_check_args(const struct stillblock_take *args)
{
	if (args->flags ||
	    !args->nr_trackers || args->nr_trackers > STILLBLOCK_MAX_TRACKERS ||
	    args->nr_mounts > STILLBLOCK_MAX_MOUNTS ||
	    !args->nr_stores || args->nr_stores > STILLBLOCK_MAX_STORES ||
	    args->freeze_timeout_ms > STILLBLOCK_MAX_FREEZE_MS)
		return -EINVAL;
	return 0;
}

/**
 * stb_snapshot_take() - take a snapshot
 * @args: STILLBLOCK_IOC_TAKE; @args->reason and @args->culprit are set
 * @file: out: what owns it. Putting it ends the snapshot
 *
 * Context: control mutex held.
 * Return: 0 or a negative errno, and then nothing has changed.
 */
int stb_snapshot_take(struct stillblock_take *args, struct file **file)
{
	struct stb_freeze *freeze;
	struct stb_snapshot *s;
	struct file *f;
	int ret;
	u32 i;

	stb_assert_control();
	ret = snapshot_check_args(args);
	if (ret)
		return ret;
	if (stb_persist_sealed()) {
		args->reason = STILLBLOCK_REASON_SHUTDOWN;
		return -ESHUTDOWN;
	}
	args->reason = STILLBLOCK_REASON_NO_MEMORY;
	s = snapshot_alloc(args);
	if (!s)
		return -ENOMEM;
	args->reason = STILLBLOCK_REASON_NONE;
	ret = snapshot_add_images(s, args);
	if (ret)
		goto destroy;
	ret = snapshot_add_stores(s, args);
	if (ret)
		goto destroy;
	args->culprit = 0;
	freeze = stb_freeze_prepare(args->mounts, args->nr_mounts,
				    &args->reason, &args->culprit);
	ret = PTR_ERR_OR_ZERO(freeze);
	if (ret)
		goto destroy;
	f = anon_inode_getfile("[stillblock]", &snapshot_fops, NULL, O_RDONLY);
	ret = PTR_ERR_OR_ZERO(f);
	if (ret) {
		args->reason = STILLBLOCK_REASON_NO_MEMORY;
		stb_freeze_end(freeze);
		goto destroy;
	}

	s->held_before = snapshot_held_writes(s);
	ret = snapshot_freeze_and_switch(s, freeze, args);
	if (!ret && fatal_signal_pending(current)) {
		args->reason = STILLBLOCK_REASON_INTERRUPTED;
		ret = -EINTR;
	}
	for (i = 0; i < s->nr_images && !ret; i++) {
		ret = stb_image_add(&s->images[i]);
		if (ret)
			args->reason = STILLBLOCK_REASON_NO_MEMORY;
	}
	if (ret) {
		fput(f);
		goto destroy;
	}
	queue_delayed_work(stb_wq, &s->watchdog, STB_WATCHDOG_PERIOD);
	f->private_data = s;
	*file = f;
	pr_info("snapshot of %u devices taken, frozen for %llu us, writes held for %llu us\n",
		s->nr_images, s->freeze_ns / 1000, s->gate_ns / 1000);
	return 0;

destroy:
	snapshot_release_origins(s);
	snapshot_end(s);
	return ret;
}
