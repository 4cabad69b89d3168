/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Units and the arithmetic between them: sectors of 512 bytes, chunks of
 * copy-on-write, blocks of change tracking. All sector numbers are relative to
 * the start of the tracked device unless a name says absolute.
 */
#ifndef STILLBLOCK_GEOMETRY_H
#define STILLBLOCK_GEOMETRY_H

#include <linux/blkdev.h>
#include <linux/log2.h>
#include <linux/math64.h>

/*
 * A chunk of 16 KiB bounds the copying for a scattered 4 KiB write to four
 * bytes per byte first overwritten; neighbouring chunks travel in one I/O.
 */
#define STB_CHUNK_SHIFT		14
#define STB_CHUNK_SIZE		((u32)BIT(STB_CHUNK_SHIFT))
#define STB_CHUNK_SECT		(STB_CHUNK_SIZE >> SECTOR_SHIFT)
#define STB_CHUNK_PAGES		(STB_CHUNK_SIZE >> PAGE_SHIFT)

#define STB_BLOCK_SHIFT_DEFAULT	16
#define STB_BLOCK_SHIFT_MIN	12
#define STB_BLOCK_SHIFT_MAX	30

/* The change map of a very large device stays under this many bytes. */
#define STB_MAP_MAX_BYTES	(64ul << 20)

/**
 * struct stb_range - sectors, relative to the tracked device
 * @first: first sector
 * @end: behind the last sector
 */
struct stb_range {
	sector_t first;
	sector_t end;
};

/**
 * stb_chunk_of() - the chunk that a sector lies in
 * @sect: sector
 *
 * Return: the chunk.
 */
static inline u64 stb_chunk_of(sector_t sect)
{
	return sect / STB_CHUNK_SECT;
}

/**
 * stb_last_chunk() - the last chunk that a range touches
 * @r: sectors, not empty
 *
 * Return: the chunk.
 */
static inline u64 stb_last_chunk(struct stb_range r)
{
	return (r.end - 1) / STB_CHUNK_SECT;
}

/**
 * stb_nr_chunks() - chunks of a device
 * @nr_sect: its size, sectors
 *
 * Return: how many, the last one may be shorter.
 */
static inline u64 stb_nr_chunks(sector_t nr_sect)
{
	return DIV_ROUND_UP_ULL(nr_sect, STB_CHUNK_SECT);
}

/**
 * stb_nr_blocks() - blocks of a device
 * @nr_sect: its size, sectors
 * @block_shift: log2 of the block size in bytes
 *
 * Return: how many, the last one may be shorter.
 */
static inline u64 stb_nr_blocks(sector_t nr_sect, unsigned int block_shift)
{
	return DIV_ROUND_UP_ULL(nr_sect, 1ull << (block_shift - SECTOR_SHIFT));
}

/**
 * stb_block_shift() - choose the unit of change tracking
 * @nr_sect: size of the device, sectors
 *
 * Return: the smallest shift from the default upwards whose map stays under
 * STB_MAP_MAX_BYTES.
 */
static inline unsigned int stb_block_shift(sector_t nr_sect)
{
	unsigned int shift = STB_BLOCK_SHIFT_DEFAULT;

	while (stb_nr_blocks(nr_sect, shift) > STB_MAP_MAX_BYTES &&
	       shift < STB_BLOCK_SHIFT_MAX)
		shift++;
	return shift;
}

#endif /* STILLBLOCK_GEOMETRY_H */
