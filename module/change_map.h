/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef STILLBLOCK_CHANGE_MAP_H
#define STILLBLOCK_CHANGE_MAP_H

#include <linux/compiler.h>
#include <linux/types.h>
#include <linux/uuid.h>

#include "geometry.h"

/**
 * struct stb_change_map - which blocks changed, and in which epoch
 * @numbers: one byte per block: the number in force at its last write, 0 for
 *	a block that was not written in this generation
 * @nr_sect: size of the device that it describes, sectors
 * @nr_blocks: length of @numbers
 * @block_shift: log2 of a block's size in bytes
 * @number: the number that writes are marked with now, 1..255. Changed only
 *	while every write of the device is held
 * @generation: identity of this history. A checkpoint of another generation
 *	says nothing about this map
 * @began: enum stillblock_history: why @generation began
 */
struct stb_change_map {
	u8 *numbers;
	sector_t nr_sect;
	u64 nr_blocks;
	unsigned int block_shift;
	u8 number;
	uuid_t generation;
	u32 began;
};

struct stb_change_map *stb_change_map_create(sector_t nr_sect,
					     unsigned int block_shift,
					     u32 began);
void stb_change_map_destroy(struct stb_change_map *map);
void stb_change_map_switch(struct stb_change_map *map, u8 *copy);

/**
 * stb_change_map_mark() - record that a range is being written
 * @map: map
 * @r: sectors, not empty and within the device
 *
 * Called from the ftrace callback: no locks, no allocation. Concurrent marks
 * of one block store the same byte, since the number cannot change while a
 * write is passing.
 */
static __always_inline void stb_change_map_mark(struct stb_change_map *map,
						struct stb_range r)
{
	unsigned int shift = map->block_shift - SECTOR_SHIFT;
	u64 block = r.first >> shift;
	u64 last = (r.end - 1) >> shift;
	u8 number = READ_ONCE(map->number);

	for (; block <= last; block++) {
		/* Most writes hit a block that is marked already: keep the line shared. */
		if (READ_ONCE(map->numbers[block]) != number)
			WRITE_ONCE(map->numbers[block], number);
	}
}

#endif /* STILLBLOCK_CHANGE_MAP_H */
