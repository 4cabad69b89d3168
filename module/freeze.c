// SPDX-License-Identifier: GPL-2.0-only
/*
 * Freezing file systems, by mount and with a deadline.
 *
 * By mount, because a freeze of a block device reaches neither the file
 * systems on its partitions and logical volumes nor all of btrfs. With a
 * deadline, because a freeze syncs, and a sync can take for ever: a work item
 * of its own does it, and a take that gives up leaves it behind. Whatever that
 * one still freezes it thaws by itself.
 *
 * They are thawed by a work item, too, and not by the task that takes: that one
 * may have been killed. btrfs looks at its super block before it thaws, and
 * takes a read that a deadly signal ends for a device that somebody tampered
 * with, which makes the file system read-only.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/completion.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/kref.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#include <linux/workqueue.h>

#include <linux/stillblock.h>

#include "compat.h"
#include "freeze.h"
#include "main.h"

/**
 * struct stb_freeze - file systems to freeze together
 * @ref: the take and the work item
 * @work: freezes one after the other, in the order given
 * @thaw: thaws what is frozen, in reverse, once it is @over
 * @done: the work item has come to its end
 * @lock: protects all below
 * @over: the take has ended or given up: freeze nothing more
 * @nr_frozen: how many are frozen, from the first on
 * @ret: error of the one that could not be frozen
 * @nr: length of @files
 * @files: one open file on each
 */
struct stb_freeze {
	struct kref ref;
	struct work_struct work;
	struct work_struct thaw;
	struct completion done;
	struct mutex lock;	/* all below */
	bool over;
	u32 nr_frozen;
	int ret;
	u32 nr;
	struct file *files[];
};

static struct super_block *freeze_sb(struct stb_freeze *f, u32 i)
{
	return file_inode(f->files[i])->i_sb;
}

static void freeze_free(struct kref *ref)
{
	struct stb_freeze *f = container_of(ref, struct stb_freeze, ref);
	u32 i;

	for (i = 0; i < f->nr; i++)
		fput(f->files[i]);
	kfree(f);
}

static void freeze_work(struct work_struct *work)
{
	struct stb_freeze *f = container_of(work, struct stb_freeze, work);
	u32 i;

	for (i = 0; i < f->nr; i++) {
		bool over;
		int ret;

		ret = stb_freeze_super(freeze_sb(f, i));
		mutex_lock(&f->lock);
		over = f->over;
		if (ret)
			f->ret = ret;
		else if (!over)
			f->nr_frozen++;
		mutex_unlock(&f->lock);
		if (over && !ret)
			stb_thaw_super(freeze_sb(f, i));
		if (over || ret)
			break;
	}
	complete(&f->done);
	kref_put(&f->ref, freeze_free);
	module_put(THIS_MODULE);
}

static void freeze_thaw(struct work_struct *work)
{
	struct stb_freeze *f = container_of(work, struct stb_freeze, thaw);
	u32 nr;

	mutex_lock(&f->lock);
	nr = f->nr_frozen;
	mutex_unlock(&f->lock);
	/* In reverse: what was frozen last lies beneath. */
	while (nr--)
		if (stb_thaw_super(freeze_sb(f, nr)))
			pr_err("%s: cannot thaw\n", freeze_sb(f, nr)->s_id);
}

/**
 * stb_freeze_prepare() - resolve the descriptors of mounts
 * @fds: user pointer to an array of __s32
 * @nr: its length, checked by the caller
 * @reason: out: enum stillblock_reason
 * @culprit: out: index of the mount that @reason is about
 *
 * Return: what stb_freeze_end() takes, or an ERR_PTR.
 */
struct stb_freeze *stb_freeze_prepare(u64 fds, u32 nr, u32 *reason,
				      u32 *culprit)
{
	const __s32 __user *from = u64_to_user_ptr(fds);
	struct stb_freeze *f = kzalloc(struct_size(f, files, nr), GFP_KERNEL);
	u32 i;

	if (!f) {
		*reason = STILLBLOCK_REASON_NO_MEMORY;
		return ERR_PTR(-ENOMEM);
	}
	kref_init(&f->ref);
	INIT_WORK(&f->work, freeze_work);
	INIT_WORK(&f->thaw, freeze_thaw);
	init_completion(&f->done);
	mutex_init(&f->lock);
	for (i = 0; i < nr; i++) {
		__s32 fd;
		int ret = -EFAULT;

		if (!get_user(fd, from + i)) {
			f->files[i] = fget(fd);
			ret = f->files[i] ? 0 : -EBADF;
		}
		if (ret) {
			*reason = STILLBLOCK_REASON_FREEZE_FAILED;
			*culprit = i;
			kref_put(&f->ref, freeze_free);
			return ERR_PTR(ret);
		}
		f->nr = i + 1;
	}
	return f;
}

/**
 * stb_freeze_all() - freeze them
 * @f: from stb_freeze_prepare()
 * @deadline: jiffies
 * @reason: out: enum stillblock_reason
 * @culprit: out: index of the mount that @reason is about
 *
 * Return: 0 when all are frozen, or a negative errno; stb_freeze_end() thaws.
 */
int stb_freeze_all(struct stb_freeze *f, unsigned long deadline, u32 *reason,
		   u32 *culprit)
{
	long left = max_t(long, deadline - jiffies, 1);
	int ret = 0;
	bool done;

	if (!f->nr)
		return 0;
	kref_get(&f->ref);
	__module_get(THIS_MODULE);
	queue_work(stb_freeze_wq, &f->work);
	done = wait_for_completion_timeout(&f->done, left);
	mutex_lock(&f->lock);
	if (f->nr_frozen < f->nr) {
		ret = done ? f->ret : -ETIMEDOUT;
		*culprit = f->nr_frozen;
		*reason = ret == -ETIMEDOUT ? STILLBLOCK_REASON_FREEZE_TIMEOUT :
			  ret == -EBUSY ? STILLBLOCK_REASON_ALREADY_FROZEN :
			  STILLBLOCK_REASON_FREEZE_FAILED;
	}
	mutex_unlock(&f->lock);
	return ret;
}

/**
 * stb_freeze_end() - thaw whatever is frozen and let go
 * @f: from stb_freeze_prepare()
 */
void stb_freeze_end(struct stb_freeze *f)
{
	bool frozen;

	mutex_lock(&f->lock);
	/* From here on no more of them counts as frozen. */
	f->over = true;
	frozen = f->nr_frozen > 0;
	mutex_unlock(&f->lock);
	if (frozen) {
		queue_work(stb_thaw_wq, &f->thaw);
		flush_work(&f->thaw);
	}
	kref_put(&f->ref, freeze_free);
}
