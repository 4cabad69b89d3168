// SPDX-License-Identifier: GPL-2.0-only
/*
 * Makes a moment longer that is hardly ever met: some origins of a snapshot have been
 * flipped, others are gated still. A hypervisor that takes a processor away just then
 * does the same.
 */
#include <linux/kprobes.h>
#include <linux/module.h>
#include <linux/timekeeping.h>

static unsigned int delay_ms = 300;
module_param(delay_ms, uint, 0444);
MODULE_PARM_DESC(delay_ms, "how long the moment before each flip lasts");

static int before_flip(struct kprobe *p, struct pt_regs *regs)
{
	u64 end = ktime_get_mono_fast_ns() + (u64)delay_ms * NSEC_PER_MSEC;

	/* An emulated processor lets others run at this, and not in mdelay(). */
	while (ktime_get_mono_fast_ns() < end)
		cpu_relax();
	return 0;
}

static struct kprobe probe = {
	.symbol_name = "stb_cow_attach",
	.pre_handler = before_flip,
};

static int __init slow_flip_init(void)
{
	return register_kprobe(&probe);
}

static void __exit slow_flip_exit(void)
{
	unregister_kprobe(&probe);
}

module_init(slow_flip_init);
module_exit(slow_flip_exit);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("Slows down the flip of a snapshot's origins");
