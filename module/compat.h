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
#include <linux/module.h>
#include <linux/part_stat.h>
#include <linux/version.h>

#define STB_KERNEL(a, b)	(KERNEL_VERSION(a, b, 0) <= LINUX_VERSION_CODE)

#if !STB_KERNEL(5, 10)
#error "Stillblock supports Linux 5.10, 6.1 and newer"
#endif
#if STB_KERNEL(5, 11) && !STB_KERNEL(6, 1)
#error "Stillblock does not support Linux 5.11 to 6.0; use 5.10 or 6.1"
#endif
#if STB_KERNEL(6, 5) && !STB_KERNEL(6, 9)
#error "Stillblock does not support Linux 6.5 to 6.8; use 6.1 or 6.9 and newer"
#endif
#if !defined(CONFIG_X86_64) || !defined(CONFIG_DYNAMIC_FTRACE)
#error "Stillblock needs x86-64 and dynamic function tracing"
#endif

/* 5.10 knows disks with partitions in them, later kernels devices alone. */
#define STB_HAS_HD_STRUCT	(!STB_KERNEL(5, 11))

#if !STB_KERNEL(6, 0)
#define blk_opf_t		unsigned int
#endif
#if !STB_KERNEL(5, 17)
#define GENHD_FL_NO_PART	GENHD_FL_NO_PART_SCAN
#endif

#if !STB_KERNEL(5, 16)
/**
 * bio_clear_polled() - let a bio that was submitted for polling end in an interrupt
 * @bio: bio
 */
static inline void bio_clear_polled(struct bio *bio)
{
	bio->bi_opf &= ~REQ_HIPRI;
}
#endif

/*
 * Devices: opening, size and place on their disk.
 */

#if STB_KERNEL(6, 5)
#define stb_mode_t	blk_mode_t
#define STB_OPEN_READ	BLK_OPEN_READ
#define STB_OPEN_WRITE	BLK_OPEN_WRITE
#else
#define stb_mode_t	fmode_t
#define STB_OPEN_READ	FMODE_READ
#define STB_OPEN_WRITE	FMODE_WRITE
#endif

/**
 * struct stb_bdev - a block device held open
 * @bdev: the device
 * @file: what it was opened by, from 6.9 on
 * @mode: how it was opened, before
 */
struct stb_bdev {
	struct block_device *bdev;
#if STB_KERNEL(6, 9)
	struct file *file;
#else
	stb_mode_t mode;
#endif
};

/**
 * stb_bdev_open() - open a block device
 * @dev: its number
 * @mode: STB_OPEN_*
 * @holder: who claims it exclusively, or NULL
 * @b: out
 *
 * Return: 0 or a negative errno; EBUSY when somebody else claims it.
 */
static inline int stb_bdev_open(dev_t dev, stb_mode_t mode, void *holder,
				struct stb_bdev *b)
{
#if STB_KERNEL(6, 9)
	b->file = bdev_file_open_by_dev(dev, mode, holder, NULL);
	if (IS_ERR(b->file))
		return PTR_ERR(b->file);
	b->bdev = file_bdev(b->file);
#else
	if (holder)
		mode |= FMODE_EXCL;
	b->mode = mode;
	b->bdev = blkdev_get_by_dev(dev, mode, holder);
	if (IS_ERR(b->bdev))
		return PTR_ERR(b->bdev);
#endif
	return 0;
}

/**
 * stb_bdev_close() - undo stb_bdev_open()
 * @b: device
 */
static inline void stb_bdev_close(struct stb_bdev *b)
{
#if STB_KERNEL(6, 9)
	fput(b->file);
#else
	blkdev_put(b->bdev, b->mode);
#endif
	b->bdev = NULL;
}

/**
 * stb_bdev_nr_sect() - size of a device
 * @bdev: device that is open
 *
 * Return: sectors.
 */
static inline sector_t stb_bdev_nr_sect(struct block_device *bdev)
{
#if STB_HAS_HD_STRUCT
	return i_size_read(bdev->bd_inode) >> SECTOR_SHIFT;
#else
	return bdev_nr_sectors(bdev);
#endif
}

/**
 * stb_bdev_start() - where a device begins
 * @bdev: device that is open
 *
 * Return: its first sector, counted on its disk.
 */
static inline sector_t stb_bdev_start(struct block_device *bdev)
{
#if STB_HAS_HD_STRUCT
	return get_start_sect(bdev);
#else
	return bdev->bd_start_sect;
#endif
}

/**
 * stb_disk_live() - is a disk there still?
 * @disk: disk
 *
 * Return: false once it has been unplugged.
 */
static inline bool stb_disk_live(struct gendisk *disk)
{
#if STB_HAS_HD_STRUCT
	return disk->flags & GENHD_FL_UP;
#else
	return disk_live(disk);
#endif
}

/**
 * stb_fd_file() - the file of a descriptor
 * @f: from fdget()
 *
 * Return: the file, or NULL.
 */
static inline struct file *stb_fd_file(struct fd f)
{
#if STB_KERNEL(6, 12)
	return fd_file(f);
#else
	return f.file;
#endif
}

/**
 * stb_has_rw_page() - does a driver take pages beside bios?
 * @disk: its disk
 *
 * Return: true where the hook cannot see them.
 */
static inline bool stb_has_rw_page(struct gendisk *disk)
{
#if STB_KERNEL(6, 5)
	return false;
#else
	return disk->fops->rw_page;
#endif
}

/**
 * stb_is_dax() - may a disk be written to by stores into mapped memory?
 * @disk: disk
 *
 * Return: true if so.
 */
static inline bool stb_is_dax(struct gendisk *disk)
{
	return blk_queue_dax(disk->queue);
}

/**
 * stb_disk_inflight_writes() - writes that a driver has accounted and not completed
 * @disk: its disk
 *
 * Return: how many, partitions included.
 */
static inline unsigned int stb_disk_inflight_writes(struct gendisk *disk)
{
	unsigned int nr = 0;
	int cpu;
#if STB_HAS_HD_STRUCT
	struct disk_part_iter it;
	struct hd_struct *part;

	disk_part_iter_init(&it, disk, DISK_PITER_INCL_EMPTY_PART0);
	while ((part = disk_part_iter_next(&it)))
		for_each_possible_cpu(cpu)
			nr += part_stat_local_read_cpu(part, in_flight[1], cpu);
	disk_part_iter_exit(&it);
#else
	struct block_device *part;
	unsigned long i;

	rcu_read_lock();
	xa_for_each(&disk->part_tbl, i, part)
		for_each_possible_cpu(cpu)
			nr += part_stat_local_read_cpu(part, in_flight[1], cpu);
	rcu_read_unlock();
#endif
	return nr;
}

/**
 * stb_disk_written_sect() - sectors written to a disk since it appeared
 * @disk: disk
 *
 * Return: how many, of all its partitions, discards included.
 */
static inline u64 stb_disk_written_sect(struct gendisk *disk)
{
#if STB_HAS_HD_STRUCT
	return (u64)part_stat_read(&disk->part0, sectors[STAT_WRITE]) +
	       part_stat_read(&disk->part0, sectors[STAT_DISCARD]);
#else
	return (u64)part_stat_read(disk->part0, sectors[STAT_WRITE]) +
	       part_stat_read(disk->part0, sectors[STAT_DISCARD]);
#endif
}

/**
 * stb_whole() - the device that is all of a disk
 * @bdev: it, or a partition of it
 *
 * Return: the device.
 */
static inline struct block_device *stb_whole(struct block_device *bdev)
{
#if STB_HAS_HD_STRUCT
	return bdev->bd_contains;
#else
	return bdev_whole(bdev);
#endif
}

/**
 * stb_disk_parts() - where the partitions of a disk begin
 * @disk: disk
 * @starts: out: first sectors
 * @max: length of @starts
 *
 * Return: how many there are, or -E2BIG for more than @max.
 */
static inline int stb_disk_parts(struct gendisk *disk, u64 *starts, int max)
{
	int nr = 0;
#if STB_HAS_HD_STRUCT
	struct disk_part_iter it;
	struct hd_struct *part;

	disk_part_iter_init(&it, disk, 0);
	while ((part = disk_part_iter_next(&it)) && nr <= max) {
		if (nr < max)
			starts[nr] = part->start_sect;
		nr++;
	}
	disk_part_iter_exit(&it);
#else
	struct block_device *part;
	unsigned long i;

	rcu_read_lock();
	xa_for_each_start(&disk->part_tbl, i, part, 1) {
		if (nr < max)
			starts[nr] = part->bd_start_sect;
		nr++;
	}
	rcu_read_unlock();
#endif
	return nr > max ? -E2BIG : nr;
}

/*
 * Bios.
 */

/**
 * stb_bio_disk() - where a bio goes
 * @bio: bio
 *
 * Return: the disk.
 */
static __always_inline struct gendisk *stb_bio_disk(struct bio *bio)
{
#if STB_HAS_HD_STRUCT
	return bio->bi_disk;
#else
	return bio->bi_bdev->bd_disk;
#endif
}

/**
 * stb_bio_sector() - first sector of a bio, counted on its disk
 * @bio: bio that has not been submitted
 *
 * A bio carries sectors of its device until the block layer has remapped it.
 *
 * Context: RCU read-side section.
 * Return: the sector.
 */
static __always_inline sector_t stb_bio_sector(struct bio *bio)
{
#if STB_HAS_HD_STRUCT
	sector_t sector = bio->bi_iter.bi_sector;
	struct disk_part_tbl *table;
	struct hd_struct *part;

	if (!bio->bi_partno)
		return sector;
	table = rcu_dereference_raw(bio->bi_disk->part_tbl);
	if (unlikely(bio->bi_partno >= table->len))
		return sector;
	part = rcu_dereference_raw(table->part[bio->bi_partno]);
	return part ? sector + part->start_sect : sector;
#else
	if (bio_flagged(bio, BIO_REMAPPED))
		return bio->bi_iter.bi_sector;
	return bio->bi_iter.bi_sector + bio->bi_bdev->bd_start_sect;
#endif
}

/**
 * stb_bio_init() - prepare a bio
 * @bio: bio
 * @bdev: where it goes
 * @table: its vector
 * @max: length of @table
 * @opf: operation and flags
 */
static inline void stb_bio_init(struct bio *bio, struct block_device *bdev,
				struct bio_vec *table, unsigned short max,
				blk_opf_t opf)
{
#if STB_KERNEL(5, 18)
	bio_init(bio, bdev, table, max, opf);
#else
	bio_init(bio, table, max);
	bio_set_dev(bio, bdev);
	bio->bi_opf = opf;
#endif
}

/**
 * stb_bio_clone() - clone a bio, sharing its pages
 * @bdev: where the clone goes
 * @bio: bio
 * @gfp: how to allocate
 * @bs: from where
 *
 * Return: the clone, or NULL.
 */
static inline struct bio *stb_bio_clone(struct block_device *bdev,
					struct bio *bio, gfp_t gfp,
					struct bio_set *bs)
{
#if STB_KERNEL(5, 18)
	return bio_alloc_clone(bdev, bio, gfp, bs);
#else
	struct bio *clone = bio_clone_fast(bio, gfp, bs);

	if (clone)
		bio_set_dev(clone, bdev);
	return clone;
#endif
}

/* What functions that take a bio return, and the value for "nothing to poll". */
#if STB_KERNEL(5, 16)
#define stb_submit_ret_t	void
#define STB_SUBMITTED
#else
#define stb_submit_ret_t	blk_qc_t
#define STB_SUBMITTED		BLK_QC_T_NONE
#endif

/*
 * Freezing: of file systems, and of request queues.
 */

/**
 * stb_freeze_super() - freeze a file system
 * @sb: its super block
 *
 * Return: 0 or a negative errno.
 */
static inline int stb_freeze_super(struct super_block *sb)
{
#if STB_KERNEL(6, 15)
	if (sb->s_op->freeze_super)
		return sb->s_op->freeze_super(sb, FREEZE_HOLDER_KERNEL, NULL);
	return freeze_super(sb, FREEZE_HOLDER_KERNEL, NULL);
#elif STB_KERNEL(6, 6)
	if (sb->s_op->freeze_super)
		return sb->s_op->freeze_super(sb, FREEZE_HOLDER_KERNEL);
	return freeze_super(sb, FREEZE_HOLDER_KERNEL);
#else
	if (sb->s_op->freeze_super)
		return sb->s_op->freeze_super(sb);
	return freeze_super(sb);
#endif
}

/**
 * stb_thaw_super() - undo stb_freeze_super()
 * @sb: super block
 *
 * Return: 0 or a negative errno.
 */
static inline int stb_thaw_super(struct super_block *sb)
{
#if STB_KERNEL(6, 15)
	if (sb->s_op->thaw_super)
		return sb->s_op->thaw_super(sb, FREEZE_HOLDER_KERNEL, NULL);
	return thaw_super(sb, FREEZE_HOLDER_KERNEL, NULL);
#elif STB_KERNEL(6, 6)
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
 * stb_unfreeze_queue() - undo blk_freeze_queue_start()
 * @q: request queue
 */
static inline void stb_unfreeze_queue(struct request_queue *q)
{
#if STB_KERNEL(6, 14)
	blk_mq_unfreeze_queue_nomemrestore(q);
#else
	blk_mq_unfreeze_queue(q);
#endif
}

/*
 * Disks of our own.
 */

/* Longest read of an image in one piece: what the block layer likes by default. */
#define STB_IMAGE_MAX_SECT	2560

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
		.max_hw_sectors = STB_IMAGE_MAX_SECT,
	};

	return blk_alloc_disk(&lim, NUMA_NO_NODE);
#else
	struct gendisk *disk;

#if STB_KERNEL(5, 15)
	disk = blk_alloc_disk(NUMA_NO_NODE);
	if (!disk)
		return ERR_PTR(-ENOMEM);
#else
	disk = alloc_disk(1);
	if (!disk)
		return ERR_PTR(-ENOMEM);
	disk->queue = blk_alloc_queue(NUMA_NO_NODE);
	if (!disk->queue) {
		put_disk(disk);
		return ERR_PTR(-ENOMEM);
	}
#endif
	blk_queue_logical_block_size(disk->queue, bdev_logical_block_size(like));
	blk_queue_physical_block_size(disk->queue,
				      bdev_physical_block_size(like));
	blk_queue_io_min(disk->queue, bdev_io_min(like));
	blk_queue_io_opt(disk->queue, bdev_io_opt(like));
	blk_queue_max_hw_sectors(disk->queue, STB_IMAGE_MAX_SECT);
	return disk;
#endif
}

/**
 * stb_add_disk() - make a disk visible
 * @disk: disk of ours
 *
 * Return: 0 or a negative errno.
 */
static inline int stb_add_disk(struct gendisk *disk)
{
#if STB_KERNEL(5, 16)
	return add_disk(disk);
#else
	add_disk(disk);
	return 0;
#endif
}

/**
 * stb_del_disk() - hide a disk
 * @disk: disk of ours, visible
 *
 * When it returns no bio of whoever has it open still is in its driver, and none
 * comes any more.
 */
static inline void stb_del_disk(struct gendisk *disk)
{
	del_gendisk(disk);
#if !STB_KERNEL(5, 15)
	/* Later kernels do it with the disk. */
	blk_cleanup_queue(disk->queue);
#endif
}

/**
 * stb_put_disk() - let go of a disk
 * @disk: disk of ours, not visible
 * @added: it has been visible
 */
static inline void stb_put_disk(struct gendisk *disk, bool added)
{
#if !STB_KERNEL(5, 15)
	struct request_queue *q = disk->queue;

	/* A disk that was never added holds no reference to its queue. */
	if (!added) {
		disk->queue = NULL;
		blk_cleanup_queue(q);
	}
#endif
	put_disk(disk);
}

/*
 * The hook's registers.
 */

#if STB_KERNEL(5, 11)
#define stb_ftrace_regs		ftrace_regs
#define STB_FTRACE_FLAGS	(FTRACE_OPS_FL_IPMODIFY | FTRACE_OPS_FL_PERMANENT)
#else
#define stb_ftrace_regs		pt_regs
#define STB_FTRACE_FLAGS	(FTRACE_OPS_FL_IPMODIFY | FTRACE_OPS_FL_PERMANENT | \
				 FTRACE_OPS_FL_SAVE_REGS | \
				 FTRACE_OPS_FL_RECURSION_SAFE)
#endif

/**
 * stb_is_own_text() - does an address lie in this module's code?
 * @address: address
 *
 * within_module() goes through all kinds of a module's memory on newer kernels,
 * which costs more than all the rest of the hook.
 *
 * Return: true if so.
 */
static __always_inline bool stb_is_own_text(unsigned long address)
{
#if STB_KERNEL(6, 4)
	return within_module_mem_type(address, THIS_MODULE, MOD_TEXT);
#else
	return address - (unsigned long)THIS_MODULE->core_layout.base <
	       THIS_MODULE->core_layout.text_size;
#endif
}

/**
 * stb_ftrace_bio() - the bio that a call of submit_bio_noacct() carries
 * @regs: registers at its entry
 *
 * Return: the bio.
 */
static __always_inline struct bio *stb_ftrace_bio(struct stb_ftrace_regs *regs)
{
#if STB_KERNEL(6, 4)
	return (struct bio *)ftrace_regs_get_argument(regs, 0);
#elif STB_KERNEL(5, 11)
	return (struct bio *)regs->regs.di;
#else
	return (struct bio *)regs->di;
#endif
}

/**
 * stb_ftrace_redirect() - call another function in the place of the hooked one
 * @regs: registers at its entry
 * @to: function with the same signature
 */
static __always_inline void
stb_ftrace_redirect(struct stb_ftrace_regs *regs,
		    stb_submit_ret_t (*to)(struct bio *bio))
{
#if STB_KERNEL(6, 4)
	ftrace_regs_set_instruction_pointer(regs, (unsigned long)to);
#elif STB_KERNEL(5, 11)
	ftrace_instruction_pointer_set(regs, (unsigned long)to);
#else
	regs->ip = (unsigned long)to;
#endif
}

#endif /* STILLBLOCK_COMPAT_H */
