/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef STILLBLOCK_COW_H
#define STILLBLOCK_COW_H

#include <linux/bio.h>
#include <linux/bitops.h>
#include <linux/completion.h>
#include <linux/list.h>
#include <linux/spinlock.h>
#include <linux/workqueue.h>
#include <linux/xarray.h>

#include "geometry.h"
#include "store.h"

struct stb_snapshot;
struct stb_tracker;

/* Most data of one copy. Neighbouring jobs are merged by the plug. */
#define STB_JOB_PAGES		16
#define STB_JOB_CHUNKS		(STB_JOB_PAGES / STB_CHUNK_PAGES)
/* Copies under way at once per image: 2 MiB of buffers. */
#define STB_NR_JOBS		32
/* A chunk that is not safe by then fails the snapshot. */
#define STB_JOB_TIMEOUT		(30 * HZ)

/**
 * enum stb_job_state - life of a copy of up to STB_JOB_CHUNKS neighbouring chunks
 * @STB_JOB_FREE: there is none
 * @STB_JOB_READING: old data is on its way from the origin into the job's pages
 * @STB_JOB_STORING: it is safe in memory and on its way to the store; image
 *	reads of these chunks wait for the store. As soon as no image read of
 *	them is in flight to the origin, they are open: writes may pass
 *
 *   FREE -> READING -> STORING -> (stored and opened) -> FREE
 */
enum stb_job_state {
	STB_JOB_FREE,
	STB_JOB_READING,
	STB_JOB_STORING,
};

/**
 * struct stb_job - one copy
 * @node: in cow->free, cow->active or both lists' hand-over
 * @cow: owner
 * @state: see enum stb_job_state
 * @first: first chunk
 * @nr: chunks
 * @stored: chunks that are in the store
 * @storing: chunks that the write under way carries
 * @slot: store slot of the write under way
 * @opened: the chunks are open
 * @done: the I/O under way has ended; set by its completion
 * @since: jiffies at the start
 * @bio: the I/O under way
 * @bvecs: its vector
 * @pages: the data
 */
struct stb_job {
	struct list_head node;
	struct stb_cow *cow;
	enum stb_job_state state;
	u64 first;
	unsigned int nr;
	unsigned int stored;
	unsigned int storing;
	u64 slot;
	bool opened;
	bool done;
	unsigned long since;
	struct bio bio;
	struct bio_vec bvecs[STB_JOB_PAGES];
	struct page *pages[STB_JOB_PAGES];
};

/**
 * struct stb_reader - an image read in flight to the origin
 * @node: in cow->readers
 * @first: first chunk
 * @last: last chunk
 */
struct stb_reader {
	struct list_head node;
	u64 first;
	u64 last;
};

/**
 * struct stb_area - chunks of an origin that hold store
 * @first: first chunk
 * @end: behind the last chunk
 */
struct stb_area {
	u64 first;
	u64 end;
};

/**
 * struct stb_cow - copy-on-write of one origin for one snapshot
 * @snapshot: owner
 * @tracker: origin
 * @nr_sect: size of the origin at the instant, sectors
 * @nr_chunks: chunks of the origin
 * @copied: bit per chunk: image reads no longer go to the origin. Changed
 *	under @lock
 * @open: bit per chunk: writes may pass. Set after @copied, once all image
 *	reads that began before it have ended. Read without a lock by the hook
 * @slots: chunk -> slot of the store, for chunks that are stored
 * @areas: chunks of the origin that are the store itself, sorted, disjoint;
 *	fixed before the instant. They are copied, never open, and in no slot
 * @nr_areas: length of @areas
 * @max_areas: room in @areas
 * @overloaded: too many writes wait; set by the hook
 * @lock: protects @readers, @deferred, @retried, @store_writes, @active, changes
 *	of the bitmaps and job->done
 * @readers: image reads in flight to the origin
 * @deferred: image reads for @io_work: mixed, or waiting for a chunk to be stored
 * @retried: those that it looks at now
 * @store_writes: I/O of jobs to the store, for @io_work
 * @active: jobs under way
 * @free: jobs that are not; worker only
 * @nr_closed: jobs whose chunks wait for readers before they open
 * @waiting: held writes that the worker has taken over; worker only
 * @work: does everything that decides
 * @io_work: submits what a store that hangs may keep it from submitting
 * @ending: the next run of @work that sees this lets everything go and completes
 *	@ended
 * @ended: @work holds no write any more
 * @jobs: all jobs
 */
struct stb_cow {
	struct stb_snapshot *snapshot;
	struct stb_tracker *tracker;
	sector_t nr_sect;
	u64 nr_chunks;
	unsigned long *copied;
	unsigned long *open;
	struct xarray slots;
	struct stb_area *areas;
	u32 nr_areas;
	u32 max_areas;
	bool overloaded;
	spinlock_t lock;	/* see above */
	struct list_head readers;
	struct list_head deferred;
	struct list_head retried;
	struct bio_list store_writes;
	struct list_head active;
	struct list_head free;
	unsigned int nr_closed;
	struct bio_list waiting;
	struct work_struct work;
	struct work_struct io_work;
	bool ending;
	struct completion ended;
	struct stb_job *jobs;
};

/**
 * enum stb_place - where the image finds a run of chunks
 * @STB_PLACE_ORIGIN: on the origin; the reader has been registered
 * @STB_PLACE_STORE: in the store
 * @STB_PLACE_ZERO: nowhere: the store was here at the instant
 * @STB_PLACE_IN_TRANSIT: on its way to the store; the read has been put off
 * @STB_PLACE_ERROR: lost
 */
enum stb_place {
	STB_PLACE_ORIGIN,
	STB_PLACE_STORE,
	STB_PLACE_ZERO,
	STB_PLACE_IN_TRANSIT,
	STB_PLACE_ERROR,
};

int stb_cow_init(struct stb_cow *cow, struct stb_snapshot *snapshot,
		 struct stb_tracker *t);
void stb_cow_destroy(struct stb_cow *cow);
int stb_cow_add_area(struct stb_cow *cow, u64 first, u64 end);
void stb_cow_sort_areas(struct stb_cow *cow);
bool stb_cow_is_own_store(struct stb_cow *cow, struct stb_range r,
			  struct bio *bio);
void stb_cow_attach(struct stb_cow *cow);
void stb_cow_detach(struct stb_cow *cow);
void stb_cow_kick(struct stb_cow *cow);
void stb_cow_kick_io(struct stb_cow *cow);
u32 stb_cow_overdue(struct stb_cow *cow);

enum stb_place stb_cow_find(struct stb_cow *cow, struct stb_range *r,
			    struct stb_reader *reader, struct stb_slots *slots,
			    struct list_head *read);
void stb_cow_reader_done(struct stb_cow *cow, struct stb_reader *reader);
bool stb_cow_all_clean(struct stb_cow *cow, struct stb_range r);

/**
 * stb_cow_overload() - more waits than the server can bear
 * @cow: cow
 *
 * Called from the ftrace callback, which calls for the worker afterwards.
 */
static inline void stb_cow_overload(struct stb_cow *cow)
{
	WRITE_ONCE(cow->overloaded, true);
}

/**
 * stb_cow_work() - what has to run when the hook has held a write
 * @cow: cow
 *
 * Return: its work item.
 */
static inline struct work_struct *stb_cow_work(struct stb_cow *cow)
{
	return &cow->work;
}

/**
 * stb_cow_is_open() - may a write to a range pass?
 * @cow: cow
 * @r: sectors
 *
 * Called from the ftrace callback.
 *
 * Return: true when all chunks of it are open.
 */
static __always_inline bool stb_cow_is_open(struct stb_cow *cow,
					    struct stb_range r)
{
	u64 last = stb_last_chunk(r);

	return find_next_zero_bit(cow->open, last + 1,
				  stb_chunk_of(r.first)) > last;
}

#endif /* STILLBLOCK_COW_H */
