/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Every difference between kernel versions. The rest of the module reads as if
 * there were one kernel; nothing outside this file tests a version.
 */
#ifndef STILLBLOCK_COMPAT_H
#define STILLBLOCK_COMPAT_H

#include <linux/blkdev.h>
#include <linux/blk-mq.h>
#include <linux/bio.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/ftrace.h>
#include <linux/part_stat.h>
#include <linux/version.h>

#define STB_KERNEL(a, b)	(LINUX_VERSION_CODE >= KERNEL_VERSION(a, b, 0))

#if !STB_KERNEL(6, 1)
#error "Stillblock supports Linux 6.1 and newer"
#endif
#if STB_KERNEL(6, 5) && !STB_KERNEL(6, 9)
#error "Stillblock does not support Linux 6.5 to 6.8; use 6.1 or 6.9 and newer"
#endif

/* A block device held open for reading. */
struct stb_bdev {
	struct block_device *bdev;
#if STB_KERNEL(6, 9)
	struct file *file;
#endif
};

static inline int stb_bdev_open(dev_t dev, struct stb_bdev *b)
{
#if STB_KERNEL(6, 9)
	b->file = bdev_file_open_by_dev(dev, BLK_OPEN_READ, NULL, NULL);
	if (IS_ERR(b->file))
		return PTR_ERR(b->file);
	b->bdev = file_bdev(b->file);
#else
	b->bdev = blkdev_get_by_dev(dev, FMODE_READ, NULL);
	if (IS_ERR(b->bdev))
		return PTR_ERR(b->bdev);
#endif
	return 0;
}

static inline void stb_bdev_close(struct stb_bdev *b)
{
#if STB_KERNEL(6, 9)
	fput(b->file);
#else
	blkdev_put(b->bdev, FMODE_READ);
#endif
	b->bdev = NULL;
}

static inline struct file *stb_fd_file(struct fd f)
{
#if STB_KERNEL(6, 12)
	return fd_file(f);
#else
	return f.file;
#endif
}

/* Does the driver take pages beside bios, where the hook cannot see them? */
static inline bool stb_has_rw_page(struct gendisk *disk)
{
#if STB_KERNEL(6, 5)
	return false;
#else
	return disk->fops->rw_page;
#endif
}

static inline bool stb_is_dax(struct gendisk *disk)
{
	return blk_queue_dax(disk->queue);
}

static inline int stb_freeze_super(struct super_block *sb)
{
#if STB_KERNEL(6, 6)
	if (sb->s_op->freeze_super)
		return sb->s_op->freeze_super(sb, FREEZE_HOLDER_KERNEL);
	return freeze_super(sb, FREEZE_HOLDER_KERNEL);
#else
	if (sb->s_op->freeze_super)
		return sb->s_op->freeze_super(sb);
	return freeze_super(sb);
#endif
}

static inline int stb_thaw_super(struct super_block *sb)
{
#if STB_KERNEL(6, 6)
	if (sb->s_op->thaw_super)
		return sb->s_op->thaw_super(sb, FREEZE_HOLDER_KERNEL);
	return thaw_super(sb, FREEZE_HOLDER_KERNEL);
#else
	if (sb->s_op->thaw_super)
		return sb->s_op->thaw_super(sb);
	return thaw_super(sb);
#endif
}

/**
 * stb_alloc_disk() - allocate a bio-based disk for an image
 * @like: the origin, whose block sizes the image has
 *
 * Return: the disk, or an ERR_PTR.
 */
static inline struct gendisk *stb_alloc_disk(struct block_device *like)
{
#if STB_KERNEL(6, 9)
	struct queue_limits lim = {
		.logical_block_size = bdev_logical_block_size(like),
		.physical_block_size = bdev_physical_block_size(like),
		.io_min = bdev_io_min(like),
		.io_opt = bdev_io_opt(like),
		.max_hw_sectors = BLK_DEF_MAX_SECTORS_CAP,
	};

	return blk_alloc_disk(&lim, NUMA_NO_NODE);
#else
	struct gendisk *disk = blk_alloc_disk(NUMA_NO_NODE);

	if (!disk)
		return ERR_PTR(-ENOMEM);
	blk_queue_logical_block_size(disk->queue, bdev_logical_block_size(like));
	blk_queue_physical_block_size(disk->queue,
				      bdev_physical_block_size(like));
	blk_queue_io_min(disk->queue, bdev_io_min(like));
	blk_queue_io_opt(disk->queue, bdev_io_opt(like));
	blk_queue_max_hw_sectors(disk->queue, BLK_DEF_MAX_SECTORS);
	return disk;
#endif
}

/* The bio that a call of submit_bio_noacct() carries. */
static __always_inline struct bio *stb_ftrace_bio(struct ftrace_regs *fregs)
{
#if STB_KERNEL(6, 4)
	return (struct bio *)ftrace_regs_get_argument(fregs, 0);
#else
	return (struct bio *)fregs->regs.di;
#endif
}

static __always_inline void stb_ftrace_redirect(struct ftrace_regs *fregs,
						void (*to)(struct bio *bio))
{
#if STB_KERNEL(6, 4)
	ftrace_regs_set_instruction_pointer(fregs, (unsigned long)to);
#else
	ftrace_instruction_pointer_set(fregs, (unsigned long)to);
#endif
}

#endif /* STILLBLOCK_COMPAT_H */
