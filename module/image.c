// SPDX-License-Identifier: GPL-2.0-only
/*
 * The image: a read-only disk that shows the origin as it was at the instant.
 *
 * A read is cut into runs that lie in one place. Runs that are still clean are
 * cloned to the origin, registered as readers until they end, so that no write
 * overtakes them; stored runs are cloned to the store or copied from memory;
 * what is between the two waits for the worker.
 *
 * Whether the snapshot is still held is asked after the data has arrived: once
 * it has failed, writes pass without being preserved.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/bio.h>
#include <linux/mm.h>
#include <linux/idr.h>
#include <linux/mempool.h>
#include <linux/module.h>
#include <linux/slab.h>
#include <linux/vmalloc.h>

#include "compat.h"
#include "image.h"
#include "main.h"
#include "snapshot.h"
#include "tracker.h"

#define STB_IMAGE_POOL	64

/**
 * struct stb_image_read - a read of an image
 * @node: in cow->deferred
 * @cow: cow of the image
 * @bio: the read
 * @iter: what of it has not been started
 * @pending: runs in flight, and one for who starts them
 * @status: first error
 */
struct stb_image_read {
	struct list_head node;
	struct stb_cow *cow;
	struct bio *bio;
	struct bvec_iter iter;
	atomic_t pending;
	blk_status_t status;
};

/* A run of a read in flight; the clone's front pad. */
struct stb_image_run {
	struct stb_image_read *read;
	struct stb_reader reader;
	bool origin;
	struct bio bio;
};

static struct kmem_cache *read_cache;
static mempool_t *read_pool;
static struct bio_set run_bios;
static int image_major;
static DEFINE_IDA(image_minors);

static void read_put(struct stb_image_read *read)
{
	struct stb_snapshot *snapshot = read->cow->snapshot;
	struct bio *bio = read->bio;

	if (!atomic_dec_and_test(&read->pending))
		return;
	bio->bi_status = read->status;
	mempool_free(read, read_pool);
	bio_endio(bio);
	stb_snapshot_put(snapshot);
}

static void run_end_io(struct bio *bio)
{
	struct stb_image_run *run = container_of(bio, struct stb_image_run, bio);
	struct stb_image_read *read = run->read;
	blk_status_t status = bio->bi_status;

	if (run->origin)
		stb_cow_reader_done(read->cow, &run->reader);
	if (!status && !stb_snapshot_held(read->cow->snapshot))
		status = BLK_STS_IOERR;
	if (status)
		read->status = status;
	bio_put(bio);
	read_put(read);
}

/* Copy a run that lies in memory. */
static void run_copy(struct bio *bio, struct stb_slots *slots,
		     sector_t into)
{
	size_t from = into << SECTOR_SHIFT;
	struct bvec_iter iter;
	struct bio_vec bv;

	bio_for_each_segment(bv, bio, iter) {
		unsigned int done = 0;

		while (done < bv.bv_len) {
			struct page *page = slots->pages[from >> PAGE_SHIFT];
			size_t off = offset_in_page(from);
			size_t len = min_t(size_t, bv.bv_len - done,
					   PAGE_SIZE - off);

			/* No high memory on the machines we run on. */
			memcpy(page_address(bv.bv_page) + bv.bv_offset + done,
			       page_address(page) + off, len);
			done += len;
			from += len;
		}
	}
}

/*
 * A read has been put off, and is somebody else's by now. If the snapshot failed
 * before that, nobody may look for it: who does may hang where the store does.
 */
static void read_deferred(struct stb_cow *cow)
{
	if (!stb_snapshot_held(cow->snapshot))
		stb_cow_kick(cow);
}

static void read_defer(struct stb_image_read *read)
{
	struct stb_cow *cow = read->cow;
	unsigned long flags;

	spin_lock_irqsave(&cow->lock, flags);
	list_add_tail(&read->node, &cow->deferred);
	spin_unlock_irqrestore(&cow->lock, flags);
	stb_cow_kick_io(cow);
	read_deferred(cow);
}

/*
 * Start all of the read that can be. @worker tells a worker of the cow from a
 * submitter, who must not wait for memory.
 */
static void read_start(struct stb_image_read *read, bool worker)
{
	struct stb_cow *cow = read->cow;

	while (read->iter.bi_size) {
		struct stb_range r = {
			.first = read->iter.bi_sector,
			.end = read->iter.bi_sector +
			       (read->iter.bi_size >> SECTOR_SHIFT),
		};
		struct block_device *origin = cow->tracker->dev.bdev;
		struct stb_image_run *run;
		enum stb_place place;
		struct stb_slots slots;
		struct bio *clone;

		if (!stb_snapshot_held(cow->snapshot))
			break;
		clone = stb_bio_clone(origin, read->bio,
				      worker ? GFP_NOIO : GFP_NOWAIT,
				      &run_bios);
		if (!clone) {
			read_defer(read);
			return;
		}
		run = container_of(clone, struct stb_image_run, bio);
		run->read = read;
		run->origin = false;

		place = stb_cow_find(cow, &r, &run->reader, &slots,
				     &read->node);
		switch (place) {
		case STB_PLACE_IN_TRANSIT:
			bio_put(clone);
			read_deferred(cow);
			return;
		case STB_PLACE_ERROR:
			bio_put(clone);
			read->status = BLK_STS_IOERR;
			read_put(read);
			return;
		case STB_PLACE_ORIGIN:
			run->origin = true;
			clone->bi_iter = read->iter;
			break;
		case STB_PLACE_ZERO:
			clone->bi_iter = read->iter;
			break;
		case STB_PLACE_STORE:
			clone->bi_iter = read->iter;
			if (slots.bdev) {
				bio_set_dev(clone, slots.bdev);
				clone->bi_iter.bi_sector = slots.sector +
					r.first % STB_CHUNK_SECT;
			}
			break;
		}
		clone->bi_iter.bi_size = (r.end - r.first) << SECTOR_SHIFT;
		bio_advance_iter(read->bio, &read->iter,
				 clone->bi_iter.bi_size);
		if (place == STB_PLACE_ZERO) {
			zero_fill_bio(clone);
			bio_put(clone);
			continue;
		}
		if (place == STB_PLACE_STORE && !slots.bdev) {
			run_copy(clone, &slots, r.first % STB_CHUNK_SECT);
			bio_put(clone);
			continue;
		}
		clone->bi_end_io = run_end_io;
		atomic_inc(&read->pending);
		submit_bio_noacct(clone);
	}
	/* As in run_end_io(), of what has been copied here. */
	if (!stb_snapshot_held(cow->snapshot))
		read->status = BLK_STS_IOERR;
	read_put(read);
}

/**
 * stb_image_retry() - go on with reads that were put off
 * @cow: cow
 * @reads: list of struct stb_image_read, empty then
 *
 * Context: a worker of the cow.
 */
void stb_image_retry(struct stb_cow *cow, struct list_head *reads)
{
	struct stb_image_read *read, *next;

	list_for_each_entry_safe(read, next, reads, node) {
		list_del(&read->node);
		read_start(read, true);
	}
}

static stb_submit_ret_t image_submit_bio(struct bio *bio)
{
	struct stb_image *image = stb_bio_disk(bio)->private_data;
	struct stb_cow *cow = &image->cow;
	struct stb_image_read *read;
	struct stb_range r = {
		.first = bio->bi_iter.bi_sector,
		.end = bio_end_sector(bio),
	};

	if (bio_op(bio) != REQ_OP_READ) {
		bio_io_error(bio);
		return STB_SUBMITTED;
	}
	if (!bio_sectors(bio)) {
		bio_endio(bio);
		return STB_SUBMITTED;
	}
	/* No worker is waited for then: it may hang where the store does. */
	if (!stb_snapshot_held(image->snapshot)) {
		bio_io_error(bio);
		return STB_SUBMITTED;
	}
	read = mempool_alloc(read_pool, GFP_NOIO);
	read->cow = cow;
	read->bio = bio;
	read->iter = bio->bi_iter;
	read->status = BLK_STS_OK;
	atomic_set(&read->pending, 1);
	stb_snapshot_get(image->snapshot);
	/*
	 * A read that will be cut goes to the worker: many clones allocated
	 * here, where they are submitted only after our return, could wait for
	 * each other.
	 */
	if (stb_cow_all_clean(cow, r))
		read_start(read, false);
	else
		read_defer(read);
	return STB_SUBMITTED;
}

static const struct block_device_operations image_ops = {
	.owner = THIS_MODULE,
	.submit_bio = image_submit_bio,
};

/**
 * stb_is_image() - is a disk one of our images?
 * @disk: disk
 *
 * Return: true if so.
 */
bool stb_is_image(struct gendisk *disk)
{
	return disk->fops == &image_ops;
}

/**
 * stb_image_init() - prepare an image, with all the memory that it needs
 * @image: image to fill, zeroed
 * @snapshot: owner
 * @t: origin
 *
 * Return: 0, or a negative errno; stb_image_destroy() is to be called in
 * either case.
 */
int stb_image_init(struct stb_image *image, struct stb_snapshot *snapshot,
		   struct stb_tracker *t)
{
	struct stb_change_map *map = stb_tracker_map(t);
	struct gendisk *disk;
	int ret;

	image->snapshot = snapshot;
	image->minor = -1;
	ret = stb_cow_init(&image->cow, snapshot, t);
	if (ret)
		return ret;
	image->nr_blocks = map->nr_blocks;
	image->block_shift = map->block_shift;
	image->map = vmalloc(image->nr_blocks);
	if (!image->map)
		return -ENOMEM;
	ret = ida_alloc_max(&image_minors, MINORMASK, GFP_KERNEL);
	if (ret < 0)
		return ret;
	image->minor = ret;
	disk = stb_alloc_disk(t->dev.bdev);
	if (IS_ERR(disk))
		return PTR_ERR(disk);
	image->disk = disk;
	disk->major = image_major;
	disk->first_minor = image->minor;
	disk->minors = 1;
	disk->flags |= GENHD_FL_NO_PART;
	disk->fops = &image_ops;
	disk->private_data = image;
	snprintf(disk->disk_name, sizeof(disk->disk_name), "stillblock%d",
		 image->minor);
	set_capacity(disk, image->cow.nr_sect);
	set_disk_ro(disk, true);
	return 0;
}

/**
 * stb_image_switch() - the instant: end the epoch of the change map
 * @image: image; every write of its origin is held
 */
void stb_image_switch(struct stb_image *image)
{
	struct stb_change_map *map = stb_tracker_map(image->cow.tracker);

	image->number = map->number;
	image->generation = map->generation;
	stb_change_map_switch(map, image->map);
	image->checkpoint_generation = map->generation;
	image->checkpoint_number = map->number - 1;
}

/**
 * stb_image_add() - make the disk visible
 * @image: image
 *
 * Return: 0 or a negative errno.
 */
int stb_image_add(struct stb_image *image)
{
	int ret = stb_add_disk(image->disk);

	image->visible = !ret;
	image->added |= image->visible;
	return ret;
}

/**
 * stb_image_del() - hide the disk; no new read arrives when it returns
 * @image: image
 */
void stb_image_del(struct stb_image *image)
{
	if (image->visible)
		stb_del_disk(image->disk);
	image->visible = false;
}

/**
 * stb_image_destroy() - free an image
 * @image: image, hidden, with no read in flight
 */
void stb_image_destroy(struct stb_image *image)
{
	if (image->disk)
		stb_put_disk(image->disk, image->added);
	if (image->minor >= 0)
		ida_free(&image_minors, image->minor);
	vfree(image->map);
	stb_cow_destroy(&image->cow);
}

/**
 * stb_image_module_init() - prepare for images
 *
 * Return: 0 or a negative errno.
 */
int stb_image_module_init(void)
{
	int ret = -ENOMEM;

	read_cache = KMEM_CACHE(stb_image_read, 0);
	if (!read_cache)
		return ret;
	read_pool = mempool_create_slab_pool(STB_IMAGE_POOL, read_cache);
	if (!read_pool)
		goto destroy_cache;
	ret = bioset_init(&run_bios, STB_IMAGE_POOL,
			  offsetof(struct stb_image_run, bio), 0);
	if (ret)
		goto destroy_pool;
	image_major = register_blkdev(0, KBUILD_MODNAME);
	ret = image_major;
	if (ret < 0)
		goto exit_bios;
	return 0;

exit_bios:
	bioset_exit(&run_bios);
destroy_pool:
	mempool_destroy(read_pool);
destroy_cache:
	kmem_cache_destroy(read_cache);
	return ret;
}

/**
 * stb_image_module_exit() - undo stb_image_module_init()
 */
void stb_image_module_exit(void)
{
	unregister_blkdev(image_major, KBUILD_MODNAME);
	bioset_exit(&run_bios);
	mempool_destroy(read_pool);
	kmem_cache_destroy(read_cache);
	ida_destroy(&image_minors);
}
