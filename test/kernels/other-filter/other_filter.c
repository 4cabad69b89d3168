// SPDX-License-Identifier: GPL-2.0-only
/*
 * Another product's filter: it may change what submit_bio_noacct() does, and changes
 * nothing. Two of that kind cannot be there at once.
 */
#include <linux/ftrace.h>
#include <linux/module.h>
#include <linux/string.h>

/* What a callback is given differs from kernel to kernel; this one wants none of it. */
static notrace void look_away(void)
{
}

static struct ftrace_ops ops = {
	.func = (ftrace_func_t)look_away,
	.flags = FTRACE_OPS_FL_IPMODIFY
#ifndef CONFIG_DYNAMIC_FTRACE_WITH_ARGS
		 | FTRACE_OPS_FL_SAVE_REGS
#endif
		 ,
};

static int __init other_filter_init(void)
{
	char target[] = "submit_bio_noacct";
	int ret = ftrace_set_filter(&ops, target, strlen(target), 1);

	return ret ?: register_ftrace_function(&ops);
}

static void __exit other_filter_exit(void)
{
	unregister_ftrace_function(&ops);
}

module_init(other_filter_init);
module_exit(other_filter_exit);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("Takes the place of Stillblock's hook");
