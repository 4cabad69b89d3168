// SPDX-License-Identifier: GPL-2.0-only
/*
 * /dev/stillblock: one ioctl at a time, for administrators.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/capability.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/uaccess.h>

#include <linux/stillblock.h>
#include <linux/stillblock_assert.h>

#include "geometry.h"
#include "main.h"
#include "persist.h"
#include "snapshot.h"
#include "tracker.h"

/* Serialises everything that user space asks of trackers and snapshots. */
static DEFINE_MUTEX(control_mutex);

/**
 * stb_control_lock() - begin a change of trackers or snapshots
 */
void stb_control_lock(void)
{
	mutex_lock(&control_mutex);
}

/**
 * stb_control_unlock() - end it
 */
void stb_control_unlock(void)
{
	mutex_unlock(&control_mutex);
}

/**
 * stb_assert_control() - the caller is within such a change
 */
void stb_assert_control(void)
{
	lockdep_assert_held(&control_mutex);
}

/**
 * stb_dev_of_fd() - the device that user space has open
 * @fd: descriptor
 * @dev: out: its number
 *
 * Return: 0, -EBADF or -ENOTBLK.
 */
int stb_dev_of_fd(int fd, dev_t *dev)
{
	struct fd f = fdget(fd);
	struct file *file = stb_fd_file(f);
	int ret = 0;

	if (!file)
		return -EBADF;
	if (S_ISBLK(file_inode(file)->i_mode))
		*dev = file_inode(file)->i_rdev;
	else
		ret = -ENOTBLK;
	fdput(f);
	return ret;
}

static long control_info(void __user *to)
{
	struct stillblock_info info = {
		.abi = STILLBLOCK_ABI,
		.chunk_size = STB_CHUNK_SIZE,
	};

	strscpy(info.version, THIS_MODULE->version, sizeof(info.version));
	return copy_to_user(to, &info, sizeof(info)) ? -EFAULT : 0;
}

static long control_attach(void __user *arg)
{
	struct stillblock_detach undo = {};
	struct stillblock_attach args;
	long ret;

	if (copy_from_user(&args, arg, sizeof(args)))
		return -EFAULT;
	args.reason = STILLBLOCK_REASON_NONE;
	args.tracker = 0;
	stb_control_lock();
	ret = stb_tracker_attach(&args);
	if (copy_to_user(arg, &args, sizeof(args))) {
		/* Nobody will ever know its id. */
		undo.tracker = args.tracker;
		if (!ret)
			stb_tracker_detach(&undo);
		ret = -EFAULT;
	}
	stb_control_unlock();
	return ret;
}

static long control_detach(void __user *arg)
{
	struct stillblock_detach args;
	long ret;

	if (copy_from_user(&args, arg, sizeof(args)))
		return -EFAULT;
	args.reason = STILLBLOCK_REASON_NONE;
	stb_control_lock();
	ret = stb_tracker_detach(&args);
	stb_control_unlock();
	return copy_to_user(arg, &args, sizeof(args)) ? -EFAULT : ret;
}

static long control_mark(void __user *arg)
{
	struct stillblock_mark args;
	long ret;

	if (copy_from_user(&args, arg, sizeof(args)))
		return -EFAULT;
	args.reason = STILLBLOCK_REASON_NONE;
	stb_control_lock();
	ret = stb_tracker_mark(&args);
	stb_control_unlock();
	return copy_to_user(arg, &args, sizeof(args)) ? -EFAULT : ret;
}

static long control_list(void __user *arg)
{
	struct stillblock_list args;
	long ret;

	if (copy_from_user(&args, arg, sizeof(args)))
		return -EFAULT;
	stb_control_lock();
	ret = stb_tracker_list(&args);
	stb_control_unlock();
	if (!ret && copy_to_user(arg, &args, sizeof(args)))
		ret = -EFAULT;
	return ret;
}

static long control_take(void __user *arg)
{
	struct stillblock_take args;
	struct file *file = NULL;
	long ret;
	int fd;

	if (copy_from_user(&args, arg, sizeof(args)))
		return -EFAULT;
	args.reason = STILLBLOCK_REASON_NONE;
	args.culprit = 0;
	args.snapshot_fd = -1;
	fd = get_unused_fd_flags(O_CLOEXEC);
	if (fd < 0)
		return fd;
	stb_control_lock();
	ret = stb_snapshot_take(&args, &file);
	stb_control_unlock();
	if (!ret)
		args.snapshot_fd = fd;
	if (copy_to_user(arg, &args, sizeof(args)))
		ret = -EFAULT;
	if (!ret) {
		fd_install(fd, file);
		return 0;
	}
	put_unused_fd(fd);
	/* Nobody will ever know of it: putting the file ends the snapshot. */
	if (file)
		fput(file);
	return ret;
}

static long control_place(void __user *arg)
{
	struct stillblock_place args;
	long ret;

	if (copy_from_user(&args, arg, sizeof(args)))
		return -EFAULT;
	args.reason = STILLBLOCK_REASON_NONE;
	if (args.flags != STILLBLOCK_PLACE_DROP)
		args.history = STILLBLOCK_HISTORY_OK;
	stb_control_lock();
	ret = stb_persist_place(&args);
	stb_control_unlock();
	return copy_to_user(arg, &args, sizeof(args)) ? -EFAULT : ret;
}

static long control_ioctl(struct file *file, unsigned int cmd,
			  unsigned long arg)
{
	void __user *p = (void __user *)arg;

	if (!capable(CAP_SYS_ADMIN))
		return -EPERM;
	switch (cmd) {
	case STILLBLOCK_IOC_INFO:
		return control_info(p);
	case STILLBLOCK_IOC_ATTACH:
		return control_attach(p);
	case STILLBLOCK_IOC_DETACH:
		return control_detach(p);
	case STILLBLOCK_IOC_LIST:
		return control_list(p);
	case STILLBLOCK_IOC_TAKE:
		return control_take(p);
	case STILLBLOCK_IOC_MARK:
		return control_mark(p);
	case STILLBLOCK_IOC_PLACE:
		return control_place(p);
	default:
		return -ENOTTY;
	}
}

static const struct file_operations control_fops = {
	.owner = THIS_MODULE,
	.unlocked_ioctl = control_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
	.llseek = noop_llseek,
};

static struct miscdevice control_device = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = KBUILD_MODNAME,
	.fops = &control_fops,
	.mode = 0600,
};

/**
 * stb_control_init() - make /dev/stillblock
 *
 * Return: 0 or a negative errno.
 */
int stb_control_init(void)
{
	return misc_register(&control_device);
}

/**
 * stb_control_exit() - remove /dev/stillblock
 */
void stb_control_exit(void)
{
	misc_deregister(&control_device);
}
