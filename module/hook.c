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
 * Writes that may wait at once before their submitters are slowed down. A held
 * write costs no memory of ours, but its pages cannot be reclaimed.
 */
#define STB_HELD_LIMIT		4096
/* How long one submitter is made to wait for room. It then goes on in any case. */
#define STB_PRESSURE_WAIT	(HZ / 2)

/* Trackers by disk. Read under RCU, changed under hook_mutex. */
static struct hlist_head hook_table[1 << STB_HOOK_HASH_BITS];
static DEFINE_MUTEX(hook_mutex);
static unsigned int nr_hooked;

static atomic_t nr_held = ATOMIC_INIT(0);
static DECLARE_WAIT_QUEUE_HEAD(pressure_wait);

enum stb_verdict {
	STB_VERDICT_PASS,
	STB_VERDICT_HELD,
};

static __always_inline struct hlist_head *hook_bucket(struct gendisk *disk)
{
	return &hook_table[hash_ptr(disk, STB_HOOK_HASH_BITS)];
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
	}
	bio_list_add(&t->held, bio);
	raw_spin_unlock_irqrestore(&t->lock, flags);

	atomic64_inc(&t->nr_held_writes);
	atomic_inc(&nr_held);
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
	struct gendisk *disk = bio->bi_bdev->bd_disk;
	struct stb_tracker *t;
	struct stb_range r;

	hlist_for_each_entry_rcu_notrace(t, hook_bucket(disk), node) {
		if (t->disk != disk || t->id <= after)
			continue;
		if (!stb_tracker_range(t, bio, &r))
			continue;
		this_cpu_inc(*t->nr_writes);
		if (hook_hold(t, bio, r))
			return STB_VERDICT_HELD;
		/*
		 * A write that was held is marked when it is released: the flip
		 * may lie between, and then it belongs to the next epoch.
		 */
		stb_change_map_mark(&t->map, r);
	}
	return STB_VERDICT_PASS;
}

/* Run in the place of submit_bio_noacct() for a bio that we keep. */
static noinline notrace void hook_taken(struct bio *bio)
{
}

/*
 * The same, and slow the submitter down. It may sleep, so it counts itself for
 * stb_hook_quiesce(). The bio may be gone: it is not touched.
 */
static atomic_t nr_slowed = ATOMIC_INIT(0);

static noinline notrace void hook_taken_slowly(struct bio *bio)
{
	wait_event_timeout(pressure_wait,
			   atomic_read(&nr_held) < STB_HELD_LIMIT,
			   STB_PRESSURE_WAIT);
	atomic_dec(&nr_slowed);
}

/* May the current submitter be made to wait? Never under another submit. */
static __always_inline bool hook_may_sleep(blk_opf_t opf)
{
	return !current->bio_list && !(opf & REQ_NOWAIT) &&
	       !(current->flags & PF_MEMALLOC);
}

static notrace void hook_callback(unsigned long ip, unsigned long parent_ip,
				  struct ftrace_ops *ops,
				  struct ftrace_regs *fregs)
{
	struct bio *bio = stb_ftrace_bio(fregs);
	blk_opf_t opf = bio->bi_opf;
	enum stb_verdict verdict;

	if (!op_is_write(opf & REQ_OP_MASK) || !bio_sectors(bio))
		return;
	/* What we submit ourselves has been through the trackers already. */
	if (within_module(parent_ip, THIS_MODULE))
		return;

	preempt_disable_notrace();
	verdict = hook_filter(bio, 0);
	if (verdict == STB_VERDICT_HELD) {
		if (unlikely(atomic_read(&nr_held) >= STB_HELD_LIMIT) &&
		    hook_may_sleep(opf)) {
			atomic_inc(&nr_slowed);
			stb_ftrace_redirect(fregs, hook_taken_slowly);
		} else {
			stb_ftrace_redirect(fregs, hook_taken);
		}
	}
	preempt_enable_notrace();
}

/*
 * PERMANENT makes kernel.ftrace_enabled=0 fail with EBUSY, where it would
 * otherwise switch copy-on-write off in silence.
 */
static struct ftrace_ops hook_ops = {
	.func = hook_callback,
	.flags = FTRACE_OPS_FL_IPMODIFY | FTRACE_OPS_FL_PERMANENT,
};

static int hook_register(u32 *reason)
{
	int ret;

	ret = ftrace_set_filter(&hook_ops, STB_HOOK_TARGET,
				strlen(STB_HOOK_TARGET), 1);
	if (!ret)
		ret = register_ftrace_function(&hook_ops);
	if (ret) {
		*reason = ret == -EBUSY ? STILLBLOCK_REASON_HOOK_BUSY :
					  STILLBLOCK_REASON_HOOK_UNAVAILABLE;
		pr_err("cannot hook %s (%d): %s\n", STB_HOOK_TARGET, ret,
		       ret == -EBUSY ? "another filter driver holds it" :
				       "function tracing is not available");
		ftrace_free_filter(&hook_ops);
	}
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
	if (!--nr_hooked) {
		unregister_ftrace_function(&hook_ops);
		ftrace_free_filter(&hook_ops);
	}
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
 * @after: tracker that held it and has done with it, or NULL for a write of
 *	our own, to a store, that may lie on a device tracked for others
 *
 * The trackers behind @after may hold it. Whoever held it preserved or
 * counted it, so it can wait: NOWAIT is cleared, since the submitter was told
 * that the write is on its way, and POLLED, since nobody polls for it here.
 */
void stb_hook_resume(struct bio *bio, const struct stb_tracker *after)
{
	enum stb_verdict verdict;

	bio->bi_opf &= ~(REQ_NOWAIT | REQ_POLLED);
	rcu_read_lock();
	verdict = hook_filter(bio, after ? after->id : 0);
	rcu_read_unlock();
	if (verdict == STB_VERDICT_PASS)
		stb_hook_submit(bio);
}

/**
 * stb_hook_released() - tell that held writes have gone
 * @nr: how many left a tracker's list
 */
void stb_hook_released(unsigned int nr)
{
	if (atomic_sub_return(nr, &nr_held) < STB_HELD_LIMIT &&
	    wq_has_sleeper(&pressure_wait))
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
