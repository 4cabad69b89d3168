// SPDX-License-Identifier: GPL-2.0-only
/*
 * Stillblock: consistent read-only images of block devices in use, and what
 * changed since earlier ones. ARCHITECTURE.md has the whole picture.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/module.h>
#include <linux/workqueue.h>

#include "hook.h"
#include "image.h"
#include "main.h"
#include "persist.h"
#include "tracker.h"

#define CREATE_TRACE_POINTS
#include "trace.h"

struct workqueue_struct *stb_wq;
struct workqueue_struct *stb_io_wq;
struct workqueue_struct *stb_freeze_wq;
struct workqueue_struct *stb_thaw_wq;

static int __init stb_init(void)
{
	int ret = stb_hook_try();

	if (ret)
		return ret;
	ret = -ENOMEM;
	stb_wq = alloc_workqueue(KBUILD_MODNAME, WQ_MEM_RECLAIM | WQ_UNBOUND, 0);
	if (!stb_wq)
		return ret;
	stb_io_wq = alloc_workqueue(KBUILD_MODNAME "_io",
				    WQ_MEM_RECLAIM | WQ_UNBOUND, 0);
	if (!stb_io_wq)
		goto destroy_wq;
	stb_freeze_wq = alloc_workqueue(KBUILD_MODNAME "_freeze", WQ_UNBOUND, 0);
	if (!stb_freeze_wq)
		goto destroy_io_wq;
	stb_thaw_wq = alloc_workqueue(KBUILD_MODNAME "_thaw",
				      WQ_MEM_RECLAIM | WQ_UNBOUND, 0);
	if (!stb_thaw_wq)
		goto destroy_freeze_wq;
	ret = stb_tracker_init();
	if (ret)
		goto destroy_thaw_wq;
	ret = stb_image_module_init();
	if (ret)
		goto exit_tracker;
	ret = stb_persist_init();
	if (ret)
		goto exit_image;
	ret = stb_control_init();
	if (ret)
		goto exit_persist;
	return 0;

exit_persist:
	stb_persist_exit();
exit_image:
	stb_image_module_exit();
exit_tracker:
	stb_tracker_exit();
destroy_thaw_wq:
	destroy_workqueue(stb_thaw_wq);
destroy_freeze_wq:
	destroy_workqueue(stb_freeze_wq);
destroy_io_wq:
	destroy_workqueue(stb_io_wq);
destroy_wq:
	destroy_workqueue(stb_wq);
	return ret;
}

static void __exit stb_exit(void)
{
	stb_control_exit();
	stb_persist_exit();
	/* What was left to a worker may just be returning from it. */
	destroy_workqueue(stb_thaw_wq);
	destroy_workqueue(stb_freeze_wq);
	destroy_workqueue(stb_io_wq);
	destroy_workqueue(stb_wq);
	stb_hook_quiesce();
	stb_image_module_exit();
	stb_tracker_exit();
}

module_init(stb_init);
module_exit(stb_exit);

MODULE_DESCRIPTION("Consistent images of block devices in use, and what changed since");
MODULE_AUTHOR("The Stillblock authors");
MODULE_LICENSE("GPL");
MODULE_VERSION("0.1.0");
