/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef STILLBLOCK_IMAGE_H
#define STILLBLOCK_IMAGE_H

#include <linux/blkdev.h>
#include <linux/list.h>

#include "change_map.h"
#include "cow.h"

struct stb_snapshot;

/**
 * struct stb_image - one image of a snapshot
 * @snapshot: owner
 * @cow: where its data comes from
 * @disk: /dev/stillblockN
 * @minor: N
 * @visible: the disk is there for everybody
 * @added: it has been visible
 * @map: the change map of the origin at the instant
 * @nr_blocks: length of @map
 * @block_shift: log2 of its blocks
 * @number: highest number in @map
 * @generation: what @map belongs to
 * @checkpoint_number: what a checkpoint of this instant records
 * @checkpoint_generation: what a checkpoint of this instant records
 */
struct stb_image {
	struct stb_snapshot *snapshot;
	struct stb_cow cow;
	struct gendisk *disk;
	int minor;
	bool visible;
	bool added;
	u8 *map;
	u64 nr_blocks;
	unsigned int block_shift;
	u8 number;
	uuid_t generation;
	u8 checkpoint_number;
	uuid_t checkpoint_generation;
};

int stb_image_init(struct stb_image *image, struct stb_snapshot *snapshot,
		   struct stb_tracker *t);
void stb_image_destroy(struct stb_image *image);
int stb_image_add(struct stb_image *image);
void stb_image_del(struct stb_image *image);
bool stb_is_image(struct gendisk *disk);
void stb_image_retry(struct stb_cow *cow, struct list_head *reads);
void stb_image_switch(struct stb_image *image);

int stb_image_module_init(void);
void stb_image_module_exit(void);

#endif /* STILLBLOCK_IMAGE_H */
