/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef STILLBLOCK_PERSIST_H
#define STILLBLOCK_PERSIST_H

#include <linux/types.h>

#include <linux/stillblock.h>

struct stb_tracker;

/* Most partitions of a disk whose history is kept. */
#define STB_RECORD_PARTS	128

/**
 * enum stb_record_state - what a record in the place says of its device
 * @STB_RECORD_EMPTY: nothing; the record is free
 * @STB_RECORD_IN_USE: tracked since, with no clean end: worthless
 * @STB_RECORD_CLEAN: map and fingerprint are those of the last write
 * @STB_RECORD_DETACHED: the same, but somebody may have written since: only this
 *	boot's figures of the disk can tell, so another boot does not believe it
 *
 *              attach              shutdown / detach with KEEP
 *   EMPTY ---------------> IN_USE -----------------------------> CLEAN / DETACHED
 *     ^      detach          |  ^              attach                 |
 *     +----------------------+  +-------------------------------------+
 */
enum stb_record_state {
	STB_RECORD_EMPTY	= 0,
	STB_RECORD_IN_USE	= 1,
	STB_RECORD_CLEAN	= 2,
	STB_RECORD_DETACHED	= 3,
};

/**
 * struct stb_record - the history of one device, a page of the place
 * @hash: of the page, with this as zero
 * @state: enum stb_record_state
 * @index: of the record
 * @place: UUID of the place
 * @identity: of the device
 * @generation: of the history
 * @boot_id: of the boot that wrote it
 * @nr_sect: size of the device, sectors
 * @map_hash: of all pages of the map
 * @fingerprint: of the device
 * @foreign: sectors written to its disk in that boot, by others than us; of
 *	STB_RECORD_DETACHED
 * @first_page: where its map is kept
 * @nr_pages: room for it
 * @block_shift: log2 of the block size in bytes
 * @number: number in force
 * @turn: which setting of the place it was kept by, counted from 1
 * @began: enum stillblock_history: why the generation began
 * @nr_parts: length of @parts
 * @parts: where partitions begin, sectors of the device
 */
struct stb_record {
	__le64 hash;
	__le32 state;
	__le32 index;
	u8 place[STILLBLOCK_UUID_SIZE];
	u8 identity[STILLBLOCK_IDENTITY_SIZE];
	u8 generation[STILLBLOCK_UUID_SIZE];
	u8 boot_id[STILLBLOCK_UUID_SIZE];
	__le64 nr_sect;
	__le64 map_hash;
	__le64 fingerprint;
	__le64 foreign;
	__le64 first_page;
	__le64 nr_pages;
	__le32 block_shift;
	__le32 number;
	__le32 began;
	__le32 nr_parts;
	__le64 turn;
	__le64 parts[STB_RECORD_PARTS];
};

int stb_persist_place(struct stillblock_place *args);
struct stb_record *stb_persist_claim(struct stb_tracker *t);
void stb_persist_attached(struct stb_tracker *t, struct stb_record *saved);
void stb_persist_resized(struct stb_tracker *t);
void stb_persist_forget(struct stb_tracker *t);
void stb_persist_prepare(struct stb_tracker *t);
void stb_persist_keep(struct stb_tracker *t);
u32 stb_persist_kept(struct stb_tracker *t);
bool stb_persist_sealed(void);

int stb_persist_init(void);
void stb_persist_exit(void);

#endif /* STILLBLOCK_PERSIST_H */
