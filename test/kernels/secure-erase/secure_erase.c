// SPDX-License-Identifier: GPL-2.0-only
/*
 * Submits a secure erase, which no emulated disk can do: BLKSECDISCARD does not get as
 * far as the block layer then. This one does, and fails behind whoever looks at it first.
 * Loading the module is refused with ECANCELED when it has done so, and with the error
 * otherwise.
 */
#include <linux/bio.h>
#include <linux/blkdev.h>
#include <linux/module.h>
#include <linux/version.h>

static unsigned int major, minor;
module_param(major, uint, 0);
MODULE_PARM_DESC(major, "number of the device");
module_param(minor, uint, 0);
MODULE_PARM_DESC(minor, "number of the device");

static unsigned long first;
module_param(first, ulong, 0);
MODULE_PARM_DESC(first, "first sector");

static unsigned int sectors;
module_param(sectors, uint, 0);
MODULE_PARM_DESC(sectors, "how many");

static int erase(struct block_device *bdev)
{
	struct bio *bio;
	int ret;

#if LINUX_VERSION_CODE >= KERNEL_VERSION(5, 18, 0)
	bio = bio_alloc(bdev, 0, REQ_OP_SECURE_ERASE, GFP_KERNEL);
#else
	bio = bio_alloc(GFP_KERNEL, 0);
	bio_set_dev(bio, bdev);
	bio->bi_opf = REQ_OP_SECURE_ERASE;
#endif
	bio->bi_iter.bi_sector = first;
	bio->bi_iter.bi_size = sectors << SECTOR_SHIFT;
	ret = submit_bio_wait(bio);
	bio_put(bio);
	return ret;
}

static int __init secure_erase_init(void)
{
	dev_t dev = MKDEV(major, minor);
	int ret;

#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 9, 0)
	struct file *file = bdev_file_open_by_dev(dev, BLK_OPEN_WRITE, NULL, NULL);

	if (IS_ERR(file))
		return PTR_ERR(file);
	ret = erase(file_bdev(file));
	bdev_fput(file);
#else
	struct block_device *bdev = blkdev_get_by_dev(dev, FMODE_WRITE, NULL);

	if (IS_ERR(bdev))
		return PTR_ERR(bdev);
	ret = erase(bdev);
	blkdev_put(bdev, FMODE_WRITE);
#endif
	return ret == -EOPNOTSUPP ? -ECANCELED : ret ?: -EEXIST;
}

/* Never called: it is never loaded. */
static void __exit secure_erase_exit(void)
{
}

module_init(secure_erase_init);
module_exit(secure_erase_exit);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("Submits a secure erase");
