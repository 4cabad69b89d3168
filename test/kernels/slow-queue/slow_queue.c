// SPDX-License-Identifier: GPL-2.0-only
/*
 * Makes a moment longer that is hardly ever met: a work item of another module has
 * been marked as pending, and is in no list yet. A hypervisor that takes a processor
 * away just then does the same.
 */
#include <linux/kprobes.h>
#include <linux/module.h>
#include <linux/timekeeping.h>
#include <linux/workqueue.h>

static unsigned long start;
module_param(start, ulong, 0444);
MODULE_PARM_DESC(start, "where the other module's code begins");

static unsigned long size;
module_param(size, ulong, 0444);
MODULE_PARM_DESC(size, "how long that is, bytes");

static unsigned int delay_ms = 5;
module_param(delay_ms, uint, 0444);
MODULE_PARM_DESC(delay_ms, "how long the moment lasts");

/* __queue_work(cpu, wq, work), with interrupts disabled. */
static int before_queued(struct kprobe *p, struct pt_regs *regs)
{
	struct work_struct *work = (struct work_struct *)regs->dx;
	u64 end = ktime_get_mono_fast_ns() + delay_ms * NSEC_PER_MSEC;

	if ((unsigned long)work->func - start >= size)
		return 0;
	/* An emulated processor lets others run at this, and not in mdelay(). */
	while (ktime_get_mono_fast_ns() < end)
		cpu_relax();
	return 0;
}

static struct kprobe probe = {
	.symbol_name = "__queue_work",
	.pre_handler = before_queued,
};

static int __init slow_queue_init(void)
{
	return register_kprobe(&probe);
}

static void __exit slow_queue_exit(void)
{
	unregister_kprobe(&probe);
}

module_init(slow_queue_init);
module_exit(slow_queue_exit);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("Slows down the queueing of work");
