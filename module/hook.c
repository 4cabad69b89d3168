// SPDX-License-Identifier: GPL-2.0-only
/*
 * The hook on submit_bio_noacct(), through which every bio of the machine
 * passes once per device that it visits.
 *
 * The whole decision is taken inside the ftrace callback, which is atomic. A
 * bio that may pass leaves no frame of this module on any stack, so unloading
 * is safe whenever ftrace says that the callback has gone. A bio that has to
 * wait is linked into its tracker's list through bi_next, with no allocation,
 * and the instruction pointer is set to an empty function in the place of
 * submit_bio_noacct(): to the submitter the bio is simply on its way.
 *
 * One bio can belong to several trackers (a partition and its disk): it passes
 * through all of them by rising id, and one that was held by the first goes on
 * with the second when it is released (stb_hook_resume()).
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/atomic.h>
#include <linux/ftrace.h>
#include <linux/hash.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/rcupdate.h>
#include <linux/rculist.h>
#include <linux/sched.h>
#include <linux/wait.h>

#include "compat.h"
#include "cow.h"
#include "hook.h"
#include "main.h"
#include "trace.h"
#include "tracker.h"

#define STB_HOOK_TARGET		"submit_bio_noacct"
#define STB_HOOK_HASH_BITS	6

/*
 * Writes that may wait at once, in number and in data, before their submitters
 * are slowed down. A held write costs no memory of ours, but its pages cannot
 * be reclaimed.
 */
#define STB_HELD_WRITES		4096
#define STB_HELD_SECTORS	((64u << 20) >> SECTOR_SHIFT)
/*
 * Not everybody can be slowed down. A snapshot for which this many times as
 * much waits has become a danger to the server and fails.
 */
#define STB_HELD_TOO_MANY	16
/* How long one submitter is made to wait for room. It then goes on in any case. */
#define STB_PRESSURE_WAIT	(HZ / 2)
/* Tasks remembered for being slowed down later; a power of two. */
#define STB_SLOW_TASKS_BITS	5

/* Trackers by disk. Read under RCU, changed under hook_mutex. */
static struct hlist_head hook_table[1 << STB_HOOK_HASH_BITS];
static DEFINE_MUTEX(hook_mutex);
static unsigned int nr_hooked;

/* What is held now, of all trackers. */
static atomic_t held_writes = ATOMIC_INIT(0);
static atomic64_t held_sectors = ATOMIC64_INIT(0);
static DECLARE_WAIT_QUEUE_HEAD(pressure_wait);

/*
 * Tasks whose write was held beyond the limits where they could not wait, under
 * another submit. They wait at their next write that enters the block layer
 * from above. A hint: two tasks may share a place, and then one gets away.
 */
static struct task_struct *slow_tasks[1 << STB_SLOW_TASKS_BITS];
static bool have_slow_tasks;

enum stb_verdict {
	STB_VERDICT_PASS,
	STB_VERDICT_HELD,
};

static __always_inline struct hlist_head *hook_bucket(struct gendisk *disk)
{
	return &hook_table[hash_ptr(disk, STB_HOOK_HASH_BITS)];
}

/* Sectors of data that a write keeps in memory while it waits. */
static __always_inline unsigned int hook_weight(struct bio *bio)
{
	return bio_has_data(bio) ? bio_sectors(bio) : 0;
}

/* Is @times as much held as should be? */
static __always_inline bool hook_pressed(unsigned int times)
{
	return atomic_read(&held_writes) >= times * STB_HELD_WRITES ||
	       atomic64_read(&held_sectors) >=
	       (s64)times * STB_HELD_SECTORS;
}

static __always_inline struct task_struct **hook_slow_task(void)
{
	return &slow_tasks[hash_ptr(current, STB_SLOW_TASKS_BITS)];
}

/*
 * Hold the bio if the tracker's mode asks for it. The mode is read once
 * without the lock, for the common case, and decides under it. Discards are
 * advisory: while an image is held they are swallowed by the worker, which
 * preserves everything at no cost.
 */
static __always_inline bool hook_hold(struct stb_tracker *t, struct bio *bio,
				      struct stb_range r)
{
	struct work_struct *work = &t->work;
	struct stb_cow *cow;
	unsigned long flags;
	enum stb_mode mode;

	/* Pairs with the release in stb_tracker_set_mode(). */
	mode = smp_load_acquire(&t->mode);
	if (likely(mode == STB_PASS))
		return false;
	if (mode == STB_COW && bio_op(bio) != REQ_OP_DISCARD) {
		cow = rcu_dereference_raw(t->cow);
		if (cow && stb_cow_is_open(cow, r))
			return false;
		if (cow && stb_cow_is_own_store(cow, r, bio))
			return false;
	}

	raw_spin_lock_irqsave(&t->lock, flags);
	mode = t->mode;
	if (mode == STB_PASS) {
		raw_spin_unlock_irqrestore(&t->lock, flags);
		return false;
	}
	if (mode == STB_COW) {
		cow = rcu_dereference_protected(t->cow,
						lockdep_is_held(&t->lock));
		work = stb_cow_work(cow);
		if (unlikely(hook_pressed(STB_HELD_TOO_MANY)))
			stb_cow_overload(cow);
	}
	atomic64_inc(&t->nr_held_writes);
	atomic_inc(&held_writes);
	atomic64_add(hook_weight(bio), &held_sectors);
	/* With the lock the bio goes: a worker may have ended it by then. */
	bio_list_add(&t->held, bio);
	raw_spin_unlock_irqrestore(&t->lock, flags);

	trace_stillblock_hold(t->id, r.first, r.end - r.first, mode);
	if (mode != STB_GATE)
		queue_work(stb_wq, work);
	return true;
}

/*
 * Pass a write through the trackers of its disk, those with an id above @after.
 * The caller is in an RCU read-side section and does not sleep.
 */
static __always_inline enum stb_verdict hook_filter(struct bio *bio, u64 after)
{
	struct gendisk *disk = stb_bio_disk(bio);
	struct stb_change_map *map;
	struct stb_tracker *t;
	struct stb_range r;

	hlist_for_each_entry_rcu_notrace(t, hook_bucket(disk), node) {
		if (t->disk != disk || t->id <= after)
			continue;
		map = rcu_dereference_raw(t->map);
		if (!stb_tracker_range(t, map->nr_sect, bio, &r) ||
		    stb_tracker_has_counted(t, bio))
			continue;
		this_cpu_inc(t->figures->writes);
		if (hook_hold(t, bio, r))
			return STB_VERDICT_HELD;
		/*
		 * A write that was held is counted and marked when it is
		 * released: the flip may lie between, and then it belongs to
		 * the next epoch.
		 */
		stb_tracker_count(t, bio);
		stb_change_map_mark(map, r);
	}
	return STB_VERDICT_PASS;
}

/* Pass a bio on through the trackers with an id above @after. */
static void hook_pass(struct bio *bio, u64 after)
{
	enum stb_verdict verdict;

	rcu_read_lock();
	verdict = hook_filter(bio, after);
	rcu_read_unlock();
	if (verdict == STB_VERDICT_PASS)
		stb_hook_submit(bio);
}

/* Run in the place of submit_bio_noacct() for a bio that we keep. */
static noinline notrace stb_submit_ret_t hook_taken(struct bio *bio)
{
	return STB_SUBMITTED;
}

/*
 * Submitters inside of the two functions below. These may sleep, so they count
 * themselves for stb_hook_quiesce().
 */
static atomic_t nr_slowed = ATOMIC_INIT(0);

static void hook_wait_for_room(void)
{
	wait_event_timeout(pressure_wait, !hook_pressed(1), STB_PRESSURE_WAIT);
}

/* Like hook_taken(), and slow the submitter down. The bio may be gone. */
static noinline notrace stb_submit_ret_t hook_taken_slowly(struct bio *bio)
{
	hook_wait_for_room();
	atomic_dec(&nr_slowed);
	return STB_SUBMITTED;
}

/*
 * Run in the place of submit_bio_noacct() for a bio that no tracker has seen
 * yet, by a task that is due to wait. Before 5.16 it is told here what to poll for,
 * and we do not know.
 */
static noinline notrace stb_submit_ret_t hook_slow(struct bio *bio)
{
	hook_wait_for_room();
	bio_clear_polled(bio);
	hook_pass(bio, 0);
	atomic_dec(&nr_slowed);
	return STB_SUBMITTED;
}

/* May the current submitter be made to wait? Never under another submit. */
static __always_inline bool hook_may_sleep(blk_opf_t opf)
{
	return !current->bio_list && !(opf & REQ_NOWAIT) &&
	       !(current->flags & PF_MEMALLOC);
}

/* Is the current task to be slowed down for what it submitted before? */
static __always_inline bool hook_is_due(blk_opf_t opf)
{
	struct task_struct **slow = hook_slow_task();

	if (READ_ONCE(*slow) != current || !hook_may_sleep(opf))
		return false;
	WRITE_ONCE(*slow, NULL);
	return true;
}

/* What the callback does with a write that a tracker may want to see. */
static noinline notrace void hook_write(struct bio *bio, blk_opf_t opf,
					struct stb_ftrace_regs *regs)
{
	preempt_disable_notrace();
	if (unlikely(READ_ONCE(have_slow_tasks)) && hook_is_due(opf)) {
		atomic_inc(&nr_slowed);
		stb_ftrace_redirect(regs, hook_slow);
	} else if (hook_filter(bio, 0) == STB_VERDICT_HELD) {
		if (likely(!hook_pressed(1))) {
			stb_ftrace_redirect(regs, hook_taken);
		} else if (hook_may_sleep(opf)) {
			atomic_inc(&nr_slowed);
			stb_ftrace_redirect(regs, hook_taken_slowly);
		} else {
			WRITE_ONCE(*hook_slow_task(), current);
			WRITE_ONCE(have_slow_tasks, true);
			stb_ftrace_redirect(regs, hook_taken);
		}
	}
	preempt_enable_notrace();
}

/*
 * Every I/O of the machine comes here: what most of them share is asked first,
 * and nothing is saved or disabled for it.
 */
static notrace void hook_callback(unsigned long ip, unsigned long parent_ip,
				  struct ftrace_ops *ops,
				  struct stb_ftrace_regs *regs)
{
	struct bio *bio = stb_ftrace_bio(regs);
	blk_opf_t opf = bio->bi_opf;

	if (!op_is_write(opf & REQ_OP_MASK))
		return;
	/* An empty bucket: nobody tracks this disk. Nothing behind it is read. */
	if (hlist_empty(hook_bucket(stb_bio_disk(bio))) &&
	    likely(!READ_ONCE(have_slow_tasks)))
		return;
	/* What we submit ourselves has been through the trackers already. */
	if (!bio_sectors(bio) || stb_is_own_text(parent_ip))
		return;
	hook_write(bio, opf, regs);
}

/*
 * PERMANENT makes kernel.ftrace_enabled=0 fail with EBUSY, where it would
 * otherwise switch copy-on-write off in silence.
 */
static struct ftrace_ops hook_ops = {
	.func = hook_callback,
	.flags = STB_FTRACE_FLAGS,
};

/*
 * Free what ftrace_set_filter() has allocated. ftrace_free_filter() will not do:
 * 5.10 does not export it, and elsewhere it leaves the pointers behind, which
 * the next registration would use.
 */
static void hook_free_filter(void)
{
	ftrace_set_filter(&hook_ops, NULL, 0, 1);
}

static int hook_register(u32 *reason)
{
	int ret;

	lockdep_assert_held(&hook_mutex);
	ret = ftrace_set_filter(&hook_ops, STB_HOOK_TARGET,
				strlen(STB_HOOK_TARGET), 1);
	if (!ret)
		ret = register_ftrace_function(&hook_ops);
	if (ret) {
		*reason = ret == -EBUSY ? STILLBLOCK_REASON_HOOK_BUSY :
			  ret == -ENOMEM ? STILLBLOCK_REASON_NO_MEMORY :
					   STILLBLOCK_REASON_HOOK_UNAVAILABLE;
		/* ftrace has the same error for both. */
		pr_err("cannot hook %s (%d): %s\n", STB_HOOK_TARGET, ret,
		       ret == -EBUSY ?
		       "another filter or a live patch holds it, or kernel.ftrace_enabled is 0" :
		       ret == -ENOMEM ? "no memory" :
		       "this kernel lacks function tracing");
		hook_free_filter();
	}
	return ret;
}

static void hook_unregister(void)
{
	lockdep_assert_held(&hook_mutex);
	unregister_ftrace_function(&hook_ops);
	hook_free_filter();
}

/**
 * stb_hook_try() - can the hook be had at all?
 *
 * For the load of the module, which is the time to tell: it is registered and
 * unregistered.
 *
 * Return: 0 or a negative errno; the kernel's log has the reason in words.
 */
int stb_hook_try(void)
{
	u32 reason;
	int ret;

	mutex_lock(&hook_mutex);
	ret = hook_register(&reason);
	if (!ret)
		hook_unregister();
	mutex_unlock(&hook_mutex);
	return ret;
}

/**
 * stb_hook_add() - let the hook see a tracker
 * @t: tracker, complete
 * @reason: out: why not
 *
 * The hook is registered with the first tracker.
 *
 * Return: 0 or a negative errno.
 */
int stb_hook_add(struct stb_tracker *t, u32 *reason)
{
	int ret = 0;

	mutex_lock(&hook_mutex);
	if (!nr_hooked)
		ret = hook_register(reason);
	if (!ret) {
		nr_hooked++;
		/* At the tail: the chain goes by rising id. */
		hlist_add_tail_rcu(&t->node, hook_bucket(t->disk));
	}
	mutex_unlock(&hook_mutex);
	return ret;
}

/**
 * stb_hook_remove() - hide a tracker from the hook
 * @t: tracker
 *
 * When it returns no callback looks at the tracker any more. The hook is
 * unregistered with the last tracker.
 */
void stb_hook_remove(struct stb_tracker *t)
{
	mutex_lock(&hook_mutex);
	hlist_del_rcu(&t->node);
	synchronize_rcu();
	if (!--nr_hooked)
		hook_unregister();
	mutex_unlock(&hook_mutex);
}

/**
 * stb_hook_submit() - submit a bio past all trackers
 * @bio: bio
 *
 * The callback knows its own submissions by the return address, so this
 * function is never inlined, and the barrier keeps the compiler from turning
 * the call into a jump, which would leave a foreign address there.
 */
noinline void stb_hook_submit(struct bio *bio)
{
	submit_bio_noacct(bio);
	barrier();
}

/**
 * stb_hook_resume() - let a write go through the trackers that are left
 * @bio: write; on no list
 * @after: tracker that held it and has done with it
 *
 * The trackers behind @after may hold it. Whoever held it preserved or
 * counted it, so it can wait: NOWAIT is cleared, since the submitter was told
 * that the write is on its way, and POLLED, since nobody polls for it here: it
 * ends in an interrupt then, in which 6.1 wants no bio back from a task's cache.
 */
void stb_hook_resume(struct bio *bio, const struct stb_tracker *after)
{
	bio->bi_opf &= ~REQ_NOWAIT;
	bio_clear_polled(bio);
	hook_pass(bio, after->id);
}

/**
 * stb_hook_submit_write() - submit a write of ours that trackers have to see
 * @bio: write
 *
 * It may go to a device that is tracked, too, as a write into a store does, or of
 * a record: to all its trackers it is one as any other, but an origin whose image
 * has the store excluded lets what its own snapshot stores pass.
 */
void stb_hook_submit_write(struct bio *bio)
{
	hook_pass(bio, 0);
}

/**
 * stb_hook_released() - tell that a held write goes
 * @bio: write that left a tracker's list; not submitted yet
 */
void stb_hook_released(struct bio *bio)
{
	atomic_dec(&held_writes);
	atomic64_sub(hook_weight(bio), &held_sectors);
	if (hook_pressed(1))
		return;
	if (READ_ONCE(have_slow_tasks))
		WRITE_ONCE(have_slow_tasks, false);
	if (wq_has_sleeper(&pressure_wait))
		wake_up_all(&pressure_wait);
}

/**
 * stb_hook_quiesce() - wait until no task runs code of this module
 *
 * For the exit of the module, after the last stb_hook_remove(). A submitter
 * that was made to wait is counted until it stops sleeping; what is left of it
 * then, and of completions that are about to return, ends at the latest when
 * the task next sleeps.
 */
void stb_hook_quiesce(void)
{
	while (atomic_read(&nr_slowed)) {
		wake_up_all(&pressure_wait);
		schedule_timeout_uninterruptible(1);
	}
	synchronize_rcu();
	synchronize_rcu_tasks();
}
