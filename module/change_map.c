// SPDX-License-Identifier: GPL-2.0-only
/*
 * The change map: one byte per block holding the number of the epoch in which
 * the block was last written. A snapshot ends an epoch; what changed since a
 * checkpoint is every block whose number is above the checkpoint's.
 */
#include <linux/slab.h>
#include <linux/string.h>
#include <linux/vmalloc.h>

#include <linux/stillblock.h>

#include "change_map.h"

/**
 * stb_change_map_create() - begin a history with a new generation
 * @nr_sect: size of the device, sectors
 * @block_shift: log2 of the block size in bytes
 * @began: enum stillblock_history: why
 *
 * Return: the map, or NULL without memory.
 */
struct stb_change_map *stb_change_map_create(sector_t nr_sect,
					     unsigned int block_shift,
					     u32 began)
{
	struct stb_change_map *map = kzalloc(sizeof(*map), GFP_KERNEL);

	if (!map)
		return NULL;
	map->nr_sect = nr_sect;
	map->nr_blocks = stb_nr_blocks(nr_sect, block_shift);
	map->block_shift = block_shift;
	map->number = 1;
	map->began = began;
	uuid_gen(&map->generation);
	map->numbers = vzalloc(map->nr_blocks);
	if (!map->numbers) {
		kfree(map);
		return NULL;
	}
	return map;
}

/**
 * stb_change_map_destroy() - free a map
 * @map: map that nobody is marking, or NULL
 */
void stb_change_map_destroy(struct stb_change_map *map)
{
	if (!map)
		return;
	vfree(map->numbers);
	kfree(map);
}

/**
 * stb_change_map_switch() - end the epoch and begin the next one
 * @map: map; every write of its device is held
 * @copy: nr_blocks bytes that receive the map as it is at this instant
 *
 * When the numbers of the generation are used up, a new generation begins
 * with an empty map; checkpoints of the old one are invalid from here on, as
 * anybody can tell from the generation they carry.
 */
void stb_change_map_switch(struct stb_change_map *map, u8 *copy)
{
	memcpy(copy, map->numbers, map->nr_blocks);
	if (map->number < STILLBLOCK_MAX_NUMBER) {
		WRITE_ONCE(map->number, map->number + 1);
		return;
	}
	memset(map->numbers, 0, map->nr_blocks);
	WRITE_ONCE(map->number, 1);
	map->began = STILLBLOCK_HISTORY_EXHAUSTED;
	uuid_gen(&map->generation);
}
