// SPDX-License-Identifier: GPL-2.0-only
/*
 * Loses memory on purpose: whoever looks for leaks afterwards has to find it.
 */
#include <linux/module.h>
#include <linux/slab.h>
#include <linux/string.h>

#define LOST_OBJECTS 10

static int __init lost_memory_init(void)
{
	int i;

	for (i = 0; i < LOST_OBJECTS; i++) {
		/* kmemleak prints what an object begins with. */
		char *lost = kmalloc(64, GFP_KERNEL);

		if (!lost)
			return -ENOMEM;
		strscpy(lost, "lost on purpose", 64);
	}
	return 0;
}

static void __exit lost_memory_exit(void)
{
}

module_init(lost_memory_init);
module_exit(lost_memory_exit);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("Loses memory");
