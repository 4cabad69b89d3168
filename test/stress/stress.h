/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The stress test's vocabulary.
 *
 * One logical clock orders everything. A write takes its stamp from it before
 * it is submitted and a second reading when it has completed; a take reads it
 * before and after its ioctl. All data is written in units of 512 bytes that
 * carry their stamp, so that each unit of an image says which write it shows.
 */
#ifndef STRESS_H
#define STRESS_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <linux/stillblock.h>

#define UNIT_SHIFT	9
#define UNIT_BYTES	(1u << UNIT_SHIFT)
/* What the tracked devices' bookkeeping, hashes and comparisons are in. */
#define BLOCK_BYTES	4096u
#define BLOCK_UNITS	(BLOCK_BYTES / UNIT_BYTES)
#define MAX_WRITE	(1u << 20)

#define MAX_DEVICES	48
#define MAX_TARGETS	64
#define MAX_SPACES	64
#define MAX_STORES	64
#define MAX_WRITERS	32
#define PATH_BYTES	128

#define NEVER		UINT64_MAX

typedef _Atomic uint64_t clock_cell;

/* random.c: xorshift64* seeded through splitmix64. */
struct rng {
	uint64_t state;
};

void rng_seed(struct rng *rng, uint64_t a, uint64_t b, uint64_t c);
uint64_t rng_next(struct rng *rng);
/* A number below @n, which is not zero. */
uint64_t rng_below(struct rng *rng, uint64_t n);
/* True @percent times out of a hundred. */
bool rng_chance(struct rng *rng, unsigned int percent);

/* What a write leaves behind in a unit. */
enum unit_kind {
	KIND_DATA,	/* its stamp */
	KIND_ZERO,	/* zeroes */
	KIND_UNDEFINED,	/* a discard: zeroes, or what was there */
};

/**
 * struct space - addresses that hold one content, whatever the devices' names
 * @name: for messages
 * @id: index, part of every unit's content
 * @nr_units: size
 * @done: per unit: stamp << 2 | kind of the last write that has completed
 * @busy: bit per unit: a write is under way. Two writes of one unit never are,
 *	which is what makes stamps rise in each unit
 * @lock: protects @busy
 */
struct space {
	char name[2 * PATH_BYTES];
	uint32_t id;
	uint64_t nr_units;
	clock_cell *done;
	uint64_t *busy;
	pthread_mutex_t lock;
};

/**
 * struct device - a tracked device
 * @path: node
 * @fd: open for reading
 * @nr_units: size
 * @nr_blocks: size, rounded up
 * @space: its content, or NULL when a file system or another driver writes it
 * @at: where the device begins in @space, units
 * @nr_written: units from its start that are written through it
 * @mount: folder where its file system is mounted, or empty
 * @fs: type of that
 * @file: space of the stamped file in it, or NULL
 * @file_name: below @mount
 * @tracker: id
 * @block_bytes: unit of its change map
 * @attached_before: clock before the attach
 * @attached_after: clock after it
 * @flying: per 4 KiB: writes under way
 * @last: per 4 KiB: clock at the last completion of anything
 * @written: per 4 KiB: highest stamp of a completed write that is no discard
 * @taken: claimed by a taker; under the takers' lock
 * @history: what its earlier images held
 */
struct device {
	char path[PATH_BYTES];
	int fd;
	uint64_t nr_units;
	uint64_t nr_blocks;
	struct space *space;
	uint64_t at;
	uint64_t nr_written;
	char mount[PATH_BYTES];
	char fs[16];
	struct space *file;
	char file_name[PATH_BYTES];
	uint64_t tracker;
	uint32_t block_bytes;
	uint64_t attached_before;
	uint64_t attached_after;
	_Atomic uint32_t *flying;
	clock_cell *last;
	clock_cell *written;
	bool taken;
	struct history *history;
};

/**
 * struct target - something that writers write to
 * @path: device or file
 * @space: its content
 * @at: where it begins there, units
 * @nr_units: size
 * @nr_direct: units that are written past the page cache; the rest is written
 *	through it. No page belongs to both
 * @align: what offsets and lengths of direct writes are multiples of, units
 * @is_file: of a file system
 * @can_poll: completions can be polled for
 * @device: the tracked device, NULL for a file
 * @no_discard: the device refuses discards; found by trying
 */
struct target {
	char path[2 * PATH_BYTES];
	struct space *space;
	uint64_t at;
	uint64_t nr_units;
	uint64_t nr_direct;
	uint32_t align;
	bool is_file;
	bool can_poll;
	struct device *device;
	_Atomic bool no_discard;
};

/* Room for differences: a file, or a block device. */
struct store {
	char path[PATH_BYTES];
	bool is_device;
	struct device *origin;	/* it lies on this one */
	bool taken;
	uint64_t bytes;
	struct stillblock_extent *extents;
	uint32_t nr_extents;
};

/**
 * struct world - all there is, fixed after the start but for the counters
 * @clock: shared with the owners' processes
 * @pace_us: longest pause between two writes of one writer
 * @stop_takers: no new step
 * @stop_writers: no new write
 */
struct world {
	uint64_t seed;
	unsigned int seconds;
	unsigned int nr_takers;
	clock_cell *clock;
	_Atomic uint32_t pace_us;
	_Atomic bool stop_takers;
	_Atomic bool stop_writers;
	_Atomic uint64_t violations;

	struct space spaces[MAX_SPACES];
	uint32_t nr_spaces;
	struct device devices[MAX_DEVICES];
	uint32_t nr_devices;
	struct target targets[MAX_TARGETS];
	uint32_t nr_targets;
	struct store stores[MAX_STORES];
	uint32_t nr_stores;

	_Atomic uint64_t nr_writes;
	_Atomic uint64_t bytes_written;
	_Atomic uint64_t nr_nowait_refused;
	_Atomic uint64_t nr_zeroes;
	_Atomic uint64_t nr_discards;
	_Atomic uint64_t slowest_write_ns;

	_Atomic uint64_t nr_steps;
	_Atomic uint64_t nr_takes;
	_Atomic uint64_t nr_images;
	_Atomic uint64_t nr_image_bytes;
	_Atomic uint64_t nr_units_checked;
	_Atomic uint64_t nr_reread_bytes;
	_Atomic uint64_t nr_file_checks;
	_Atomic uint64_t nr_fsck;
	_Atomic uint64_t nr_stacked_blocks;
	_Atomic uint64_t nr_map_blocks;
	_Atomic uint64_t nr_pairs;
	_Atomic uint64_t nr_pair_blocks;
	_Atomic uint64_t nr_kills;
	_Atomic uint64_t nr_overflows;
	_Atomic uint64_t nr_late_growths;
	_Atomic uint64_t nr_unknown;
	_Atomic uint64_t nr_growths;
	_Atomic uint64_t nr_marks;
	_Atomic uint64_t nr_reattached;
	_Atomic uint64_t nr_refused;
};

extern struct world world;

/* A reading of the clock that nobody else has. */
uint64_t tick(void);
uint64_t now_ns(void);
/* Pacing, not synchronisation: up to @max_us. */
void pause_up_to(struct rng *rng, unsigned int max_us);
/* Memory that a fork shares, since direct I/O into copied pages gets lost. */
void *shared_memory(size_t bytes);
void *zeroed(size_t count, size_t bytes);

__attribute__((format(printf, 1, 2)))
void say(const char *format, ...);
/* An expectation of the test's surroundings failed: exit code 2. */
__attribute__((format(printf, 1, 2), noreturn))
void give_up(const char *format, ...);
/* The module broke a promise: everything stops, exit code 1. */
__attribute__((format(printf, 2, 3)))
void violation(uint64_t step, const char *format, ...);

/* oracle.c: stamps, and what they say about an image. */

/* A write under way, and for a while after. */
struct record {
	clock_cell stamp;
	clock_cell completed;	/* 0 while it is under way */
	struct space *space;
	uint64_t first;
	uint64_t nr;
	enum unit_kind kind;
};

#define NR_RECORDS	16384

/* The writes of one writer; written by it alone. */
struct journal {
	const char *writer;
	struct record records[NR_RECORDS];
	clock_cell nr;		/* begun so far */
	uint64_t next;
	uint64_t begun_ns[NR_RECORDS];
};

extern struct journal *journals[MAX_WRITERS];
extern _Atomic uint32_t nr_journals;

struct space *space_new(const char *name, uint64_t nr_units);
struct journal *journal_new(const char *writer);

/*
 * Claims a range of a target, for one write at a time. Returns NULL when
 * somebody writes there.
 */
struct record *write_begin(struct journal *journal, struct target *target,
			   uint64_t first, uint64_t nr, enum unit_kind kind);
void write_end(struct journal *journal, struct target *target,
	       struct record *record);
/* The same for a change that only the change map sees. */
uint64_t touch_begin(struct device *device, uint64_t first_block, uint64_t nr);
void touch_end(struct device *device, uint64_t first_block, uint64_t nr,
	       uint64_t stamp);

void fill_units(void *buffer, struct space *space, uint64_t first, uint64_t nr,
		uint64_t stamp);

/**
 * struct view - what a space may hold in an image
 * @space: what of
 * @before: copy of space->done from before the take
 * @heads: per unit: index + 1 of its first node
 * @nodes: writes that the instant may have caught, per unit in their order
 */
struct view {
	struct space *space;
	uint64_t *before;
	uint32_t *heads;
	struct view_node *nodes;
	uint32_t nr_nodes;
	uint32_t max_nodes;
};

/**
 * struct instant - when a take can have happened, as its images tell
 * @step: for messages
 * @from: not before
 * @until: not after
 * @from_what: whose content says so
 * @until_what: likewise
 */
struct instant {
	uint64_t step;
	uint64_t from;
	uint64_t until;
	char from_what[4 * PATH_BYTES];
	char until_what[4 * PATH_BYTES];
};

/*
 * A view is begun before the take, at the returned reading of the clock (the
 * journals' numbers are kept, too), and completed after it.
 */
struct view *view_begin(struct space *space);
/* False if too much was written meanwhile to know what the images may hold. */
bool views_complete(struct view **views, uint32_t nr, uint64_t begun,
		    uint64_t returned, const uint64_t *journal_numbers);
void journals_note(uint64_t *journal_numbers);
void view_free(struct view *view);
/*
 * Checks units of an image, narrows the instant down and reports a violation
 * if there is none left. False after a violation.
 */
bool view_check(struct view *view, struct instant *instant, const char *image,
		uint64_t first, uint64_t nr, const void *data);

/* writers.c */
void writers_start(void);
void writers_join(void);
/* Stamps all of every target once, so that nothing is unknown. */
void writers_initialise(void);

/* owner.c: the process that owns a snapshot. */
#define OWNER_MAX_IMAGES	MAX_DEVICES
#define OWNER_MAX_PIECES	8
#define OWNER_MAX_EXTENTS	(1u << 14)

struct owner_piece {
	struct stillblock_store store;
	uint32_t first_extent;
};

/**
 * struct owner - what taker and owner share
 * @pid: of the process
 * @command: write end of its commands
 * @report: read end of its reports
 */
struct owner {
	/* The taker fills these. */
	uint32_t nr_trackers;
	uint64_t trackers[OWNER_MAX_IMAGES];
	uint32_t nr_mounts;
	int mounts[OWNER_MAX_IMAGES];
	uint32_t nr_pieces;		/* at the take */
	uint32_t nr_growth;		/* behind those, added one by one */
	struct owner_piece pieces[OWNER_MAX_PIECES];
	uint32_t nr_extents;
	struct stillblock_extent extents[OWNER_MAX_EXTENTS];
	uint64_t low_watermark;

	/* The owner fills these. */
	int error;
	uint32_t reason;
	uint32_t culprit;
	uint64_t before;
	uint64_t after;
	struct stillblock_image images[OWNER_MAX_IMAGES];
	uint32_t added;
	int add_error;
	uint32_t add_reason;
	_Atomic uint32_t failed_reason;
	struct stillblock_state state;
	int map_error;
	uint8_t *map;			/* room for the longest */

	pid_t pid;
	int command;
	int report;
};

struct owner *owner_new(uint64_t map_bytes);
void owner_reset(struct owner *owner);
bool owner_add_piece(struct owner *owner, struct stillblock_store store,
		     const struct stillblock_extent *extents);
void owner_start(struct owner *owner);
/*
 * Waits for the answer to the take or to a command. False when it was killed;
 * @kill_at_ns says when to do that, NEVER for not at all.
 */
bool owner_wait(struct owner *owner, uint64_t kill_at_ns);
bool owner_ask_map(struct owner *owner, uint32_t index);
bool owner_ask_state(struct owner *owner);
void owner_kill(struct owner *owner);
/* Lets it close the snapshot and end. */
void owner_end(struct owner *owner);

/* takers.c */
void takers_start(void);
/* Says what each taker does; watching, it does so of those that are stuck. */
void takers_say(void);
void takers_watch(void);
void takers_join(void);
void device_attach(struct device *device, uint32_t block_bytes);
void device_detach(struct device *device);
struct history *history_new(void);
extern int control;

/* Reads a device without the page cache. Returns bytes or -errno. */
long read_direct(int fd, void *buffer, size_t bytes, uint64_t offset);

#endif
