// SPDX-License-Identifier: GPL-2.0-only
/*
 * Copy-on-write: read the old data, make it safe, let the write go.
 *
 * One work item per origin does everything that decides, so that only what
 * completions and image reads touch needs a lock. Nothing here allocates on
 * the way of a write but the index of stored chunks and memory that is itself
 * the store; when that fails the snapshot fails, not the write.
 *
 * A second one submits writes to the store and image reads. It may have to wait in
 * a queue that is full, for as long as a device hangs; who releases held writes,
 * and ends the snapshot, never does so for the store's.
 *
 * A write is released when its chunks are open: their old data is in memory
 * on its way to the store, and no image read of them is in flight to the
 * origin. Two bitmaps keep these apart: `copied` turns new image reads away
 * from the origin, `open` lets writes pass once the earlier ones have ended.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/bio.h>
#include <linux/bitmap.h>
#include <linux/mm.h>
#include <linux/sched/mm.h>
#include <linux/slab.h>
#include <linux/sort.h>
#include <linux/vmalloc.h>

#include "compat.h"
#include "cow.h"
#include "hook.h"
#include "image.h"
#include "main.h"
#include "snapshot.h"
#include "trace.h"
#include "tracker.h"

/* Writes looked at that have to wait while no job is free. */
#define STB_MAX_STUCK	64
/*
 * What a held write waits for may fail: a plain GFP_NOIO goes on for as long as there
 * is no memory, and there may be none before that write has gone.
 */
#define STB_GFP_COW	(GFP_NOIO | __GFP_RETRY_MAYFAIL | __GFP_NOWARN)

/*
 * bitmap_set() for all chunks that there may be: its own arguments are of 32 bits,
 * and a device of more than 64 TiB has more of them.
 */
static void cow_set_bits(unsigned long *map, u64 first, u64 nr)
{
	while (nr) {
		unsigned int step = min_t(u64, nr, INT_MAX);

		bitmap_set(map + BIT_WORD(first), first % BITS_PER_LONG, step);
		first += step;
		nr -= step;
	}
}

static void job_end_io(struct bio *bio)
{
	struct stb_job *job = bio->bi_private;
	struct stb_cow *cow = job->cow;
	struct stb_snapshot *snapshot = cow->snapshot;

	/* Pairs with the acquire in cow_collect(): the data is there. */
	smp_store_release(&job->done, true);
	queue_work(stb_wq, &cow->work);
	stb_snapshot_put(snapshot);
}

static void job_submit(struct stb_job *job, struct block_device *bdev,
		       blk_opf_t opf, sector_t sector, unsigned int first_page,
		       unsigned int bytes)
{
	struct stb_cow *cow = job->cow;
	unsigned int page = first_page;

	stb_bio_init(&job->bio, bdev, job->bvecs, STB_JOB_PAGES, opf);
	job->bio.bi_iter.bi_sector = sector;
	job->bio.bi_end_io = job_end_io;
	job->bio.bi_private = job;
	while (bytes) {
		unsigned int len = min_t(unsigned int, bytes, PAGE_SIZE);

		__bio_add_page(&job->bio, job->pages[page++], len, 0);
		bytes -= len;
	}
	stb_snapshot_get(cow->snapshot);
	if (!op_is_write(opf)) {
		stb_hook_submit(&job->bio);
		return;
	}
	spin_lock_irq(&cow->lock);
	/* cow_pass_on() has it submitted, together with others. */
	bio_list_add(&cow->store_writes, &job->bio);
	spin_unlock_irq(&cow->lock);
}

static void job_free(struct stb_cow *cow, struct stb_job *job)
{
	spin_lock_irq(&cow->lock);
	if (job->state == STB_JOB_STORING && !job->opened)
		cow->nr_closed--;
	job->state = STB_JOB_FREE;
	list_move(&job->node, &cow->free);
	spin_unlock_irq(&cow->lock);
}

static void job_fail(struct stb_cow *cow, struct stb_job *job, u32 reason)
{
	stb_snapshot_fail(cow->snapshot, reason);
	job_free(cow, job);
}

static struct stb_job *job_covering(struct stb_cow *cow, u64 chunk)
{
	struct stb_job *job;

	list_for_each_entry(job, &cow->active, node)
		if (chunk >= job->first && chunk < job->first + job->nr)
			return job;
	return NULL;
}

/*
 * The last chunk of a device may be shorter, a slot of the store never is: what is
 * behind its end shall not be what was in the kernel's memory before.
 */
static void job_clear_tail(struct stb_job *job, unsigned int bytes)
{
	unsigned int len;

	for (; bytes < job->nr << STB_CHUNK_SHIFT; bytes += len) {
		len = PAGE_SIZE - offset_in_page(bytes);
		memset(page_address(job->pages[bytes >> PAGE_SHIFT]) +
		       offset_in_page(bytes), 0, len);
	}
}

/* Begin to copy @nr chunks at most, from @chunk on, which no job covers. */
static u64 job_start(struct stb_cow *cow, u64 chunk, u64 nr)
{
	struct stb_tracker *t = cow->tracker;
	sector_t sector = chunk * STB_CHUNK_SECT;
	struct stb_job *job, *other;
	u64 sectors;

	nr = min_t(u64, nr, STB_JOB_CHUNKS);
	/* Not into chunks that are safe, nor into the store itself. */
	nr = find_next_bit(cow->copied, chunk + nr, chunk) - chunk;
	list_for_each_entry(other, &cow->active, node)
		if (other->first > chunk)
			nr = min(nr, other->first - chunk);

	job = list_first_entry(&cow->free, struct stb_job, node);
	job->first = chunk;
	job->nr = nr;
	job->stored = 0;
	job->storing = 0;
	job->opened = false;
	job->done = false;
	job->since = jiffies;
	spin_lock_irq(&cow->lock);
	job->state = STB_JOB_READING;
	list_move_tail(&job->node, &cow->active);
	spin_unlock_irq(&cow->lock);

	sectors = min_t(u64, nr * STB_CHUNK_SECT, cow->nr_sect - sector);
	job_clear_tail(job, sectors << SECTOR_SHIFT);
	trace_stillblock_preserve(t->id, sector, sectors);
	job_submit(job, t->dev.bdev, REQ_OP_READ, sector, 0,
		   sectors << SECTOR_SHIFT);
	return nr;
}

/* Open the job's chunks unless an earlier image read of them is in flight. */
static void job_try_open(struct stb_cow *cow, struct stb_job *job)
{
	u64 last = job->first + job->nr - 1;
	struct stb_reader *reader;

	spin_lock_irq(&cow->lock);
	list_for_each_entry(reader, &cow->readers, node)
		if (reader->first <= last && reader->last >= job->first)
			goto unlock;
	cow_set_bits(cow->open, job->first, job->nr);
	job->opened = true;
	cow->nr_closed--;
unlock:
	spin_unlock_irq(&cow->lock);
}

/* Note where chunks of the job are stored; the image finds them from here on. */
static int job_index(struct stb_cow *cow, struct stb_job *job)
{
	unsigned int i;
	int ret;

	for (i = 0; i < job->storing; i++) {
		ret = xa_err(xa_store(&cow->slots, job->first + job->stored + i,
				      xa_mk_value(job->slot + i), STB_GFP_COW));
		if (ret)
			return ret;
	}
	job->stored += job->storing;
	job->storing = 0;
	return 0;
}

/* Memory as store: the job's pages become the slots', and it gets new ones. */
static int job_keep_pages(struct stb_job *job, struct stb_slots *where)
{
	unsigned int page = job->stored * STB_CHUNK_PAGES;
	unsigned int i;

	for (i = 0; i < where->nr * STB_CHUNK_PAGES; i++) {
		struct page *fresh = alloc_page(STB_GFP_COW);

		if (!fresh)
			return -ENOMEM;
		where->pages[i] = job->pages[page + i];
		job->pages[page + i] = fresh;
	}
	return 0;
}

/* Store what is not stored yet, piece by piece; free the job in the end. */
static void job_store(struct stb_cow *cow, struct stb_job *job)
{
	struct stb_snapshot *snapshot = cow->snapshot;
	struct stb_slots where;
	bool low;

	while (job->stored < job->nr) {
		if (!stb_store_alloc(&snapshot->store, job->nr - job->stored,
				     &where, &low)) {
			job_fail(cow, job, STILLBLOCK_REASON_STORE_FULL);
			return;
		}
		if (low)
			stb_snapshot_low(snapshot);
		job->slot = where.slot;
		job->storing = where.nr;
		if (where.bdev) {
			job_submit(job, where.bdev, REQ_OP_WRITE, where.sector,
				   job->stored * STB_CHUNK_PAGES,
				   where.nr << STB_CHUNK_SHIFT);
			return;
		}
		if (job_keep_pages(job, &where) || job_index(cow, job)) {
			job_fail(cow, job, STILLBLOCK_REASON_NO_MEMORY);
			return;
		}
	}
	if (job->opened)
		job_free(cow, job);
}

/* The I/O of a job has ended. */
static void job_step(struct stb_cow *cow, struct stb_job *job)
{
	blk_status_t status = job->bio.bi_status;

	if (!stb_snapshot_held(cow->snapshot)) {
		job_free(cow, job);
		return;
	}
	if (job->state == STB_JOB_READING) {
		if (status) {
			job_fail(cow, job, stb_disk_live(cow->tracker->disk) ?
				 STILLBLOCK_REASON_ORIGIN_ERROR :
				 STILLBLOCK_REASON_GONE);
			return;
		}
		spin_lock_irq(&cow->lock);
		cow_set_bits(cow->copied, job->first, job->nr);
		job->state = STB_JOB_STORING;
		cow->nr_closed++;
		spin_unlock_irq(&cow->lock);
		job_try_open(cow, job);
	} else {
		if (status) {
			job_fail(cow, job, STILLBLOCK_REASON_STORE_ERROR);
			return;
		}
		if (job_index(cow, job)) {
			job_fail(cow, job, STILLBLOCK_REASON_NO_MEMORY);
			return;
		}
	}
	job_store(cow, job);
}

static void cow_collect(struct stb_cow *cow)
{
	struct stb_job *job, *next;

	/* The list itself is changed by this worker only. */
	list_for_each_entry_safe(job, next, &cow->active, node) {
		/* Pairs with the release in job_end_io(). */
		if (smp_load_acquire(&job->done)) {
			job->done = false;
			job_step(cow, job);
		} else if (job->state == STB_JOB_STORING && !job->opened) {
			job_try_open(cow, job);
			if (job->opened && job->stored == job->nr)
				job_free(cow, job);
		}
	}
}

/* The area that a chunk lies in, or NULL. */
static struct stb_area *cow_area(struct stb_cow *cow, u64 chunk)
{
	u32 low = 0, high = cow->nr_areas;

	while (low < high) {
		u32 middle = low + (high - low) / 2;
		struct stb_area *area = &cow->areas[middle];

		if (chunk < area->first)
			high = middle;
		else if (chunk >= area->end)
			low = middle + 1;
		else
			return area;
	}
	return NULL;
}

/*
 * Are all chunks of the range open? Begin to copy those that nobody copies, as
 * far as jobs are free.
 */
static bool cow_prepare(struct stb_cow *cow, struct stb_range r)
{
	u64 last = stb_last_chunk(r);
	u64 chunk = stb_chunk_of(r.first);
	bool ready = true;

	for (;;) {
		struct stb_job *job;

		chunk = find_next_zero_bit(cow->open, last + 1, chunk);
		if (chunk > last)
			return ready;
		ready = false;
		if (cow_area(cow, chunk)) {
			/* Whoever writes there writes over old data of others. */
			stb_snapshot_fail(cow->snapshot,
					  STILLBLOCK_REASON_FOREIGN_WRITE);
			return false;
		}
		job = job_covering(cow, chunk);
		if (job)
			chunk = job->first + job->nr;
		else if (!list_empty(&cow->free))
			chunk += job_start(cow, chunk, last + 1 - chunk);
		else
			return false;
	}
}

/* Take over what the hook has held since. */
static void cow_take_held(struct stb_cow *cow)
{
	struct stb_tracker *t = cow->tracker;

	raw_spin_lock_irq(&t->lock);
	if (rcu_access_pointer(t->cow) == cow) {
		bio_list_merge(&cow->waiting, &t->held);
		bio_list_init(&t->held);
	}
	raw_spin_unlock_irq(&t->lock);
}

static bool cow_range(struct stb_cow *cow, struct bio *bio,
		      struct stb_range *r)
{
	bool touches;

	rcu_read_lock();
	touches = stb_tracker_range(cow->tracker, cow->nr_sect, bio, r);
	rcu_read_unlock();
	return touches;
}

/*
 * Release what can be. Those behind a long queue of others that wait for free
 * jobs are left for a later time: looking at all of them at each completion
 * would cost more than the copying.
 */
static void cow_serve_waiting(struct stb_cow *cow)
{
	struct bio_list waiting = cow->waiting;
	unsigned int stuck = 0;
	struct stb_range r = {};
	struct bio *bio;

	bio_list_init(&cow->waiting);
	while (stuck < STB_MAX_STUCK && (bio = bio_list_pop(&waiting))) {
		if (!stb_snapshot_held(cow->snapshot)) {
			stb_tracker_release(cow->tracker, bio);
		} else if (bio_op(bio) == REQ_OP_DISCARD) {
			/* Advisory: nothing is written, nothing has changed. */
			stb_hook_released(bio);
			bio_endio(bio);
		} else if (!cow_range(cow, bio, &r) || cow_prepare(cow, r)) {
			stb_tracker_release(cow->tracker, bio);
		} else {
			bio_list_add(&cow->waiting, bio);
			stuck += list_empty(&cow->free);
		}
	}
	bio_list_merge(&cow->waiting, &waiting);
}

/*
 * Have written to the store what was read, and looked at image reads again that were
 * put off: something may be stored now. Those of a snapshot that has failed wait for
 * no device, they fail here.
 */
static void cow_pass_on(struct stb_cow *cow)
{
	LIST_HEAD(failed);
	bool any;

	spin_lock_irq(&cow->lock);
	if (!stb_snapshot_held(cow->snapshot)) {
		list_splice_init(&cow->deferred, &failed);
		list_splice_init(&cow->retried, &failed);
	}
	any = !bio_list_empty(&cow->store_writes) || !list_empty(&cow->deferred);
	spin_unlock_irq(&cow->lock);
	if (any)
		stb_cow_kick_io(cow);
	stb_image_retry(cow, &failed);
}

/* Take the next read to look at, or leave @one empty. */
static bool cow_next_read(struct stb_cow *cow, struct list_head *one)
{
	spin_lock_irq(&cow->lock);
	if (!list_empty(&cow->retried))
		list_move(cow->retried.next, one);
	spin_unlock_irq(&cow->lock);
	return !list_empty(one);
}

static void cow_io_work(struct work_struct *work)
{
	struct stb_cow *cow = container_of(work, struct stb_cow, io_work);
	unsigned int noio = memalloc_noio_save();
	struct bio_list writes;
	struct blk_plug plug;
	LIST_HEAD(one);
	struct bio *bio;

	spin_lock_irq(&cow->lock);
	writes = cow->store_writes;
	bio_list_init(&cow->store_writes);
	/* Once each: what has to wait still is deferred again. */
	list_splice_tail_init(&cow->deferred, &cow->retried);
	spin_unlock_irq(&cow->lock);

	blk_start_plug(&plug);
	while ((bio = bio_list_pop(&writes))) {
		if (stb_snapshot_held(cow->snapshot))
			stb_hook_submit_write(bio);
		else
			bio_io_error(bio);
	}
	while (cow_next_read(cow, &one))
		stb_image_retry(cow, &one);
	blk_finish_plug(&plug);
	memalloc_noio_restore(noio);
}

static void cow_work(struct work_struct *work)
{
	struct stb_cow *cow = container_of(work, struct stb_cow, work);
	/* Pairs with the release in stb_cow_detach(): the snapshot has ended. */
	bool ending = smp_load_acquire(&cow->ending);
	struct blk_plug plug;
	unsigned int noio;

	if (!ending && !stb_snapshot_switched(cow->snapshot))
		return;
	noio = memalloc_noio_save();
	blk_start_plug(&plug);
	if (READ_ONCE(cow->overloaded))
		stb_snapshot_fail(cow->snapshot, STILLBLOCK_REASON_OVERLOADED);
	cow_take_held(cow);
	cow_collect(cow);
	cow_serve_waiting(cow);
	/* It may have failed in between, after some were put back. */
	if (!stb_snapshot_held(cow->snapshot))
		cow_serve_waiting(cow);
	cow_pass_on(cow);
	blk_finish_plug(&plug);
	memalloc_noio_restore(noio);
	if (ending)
		complete_all(&cow->ended);
}

/**
 * stb_cow_kick() - let the worker look at everything again
 * @cow: cow
 */
void stb_cow_kick(struct stb_cow *cow)
{
	queue_work(stb_wq, &cow->work);
}

/**
 * stb_cow_kick_io() - let what has been put off be submitted
 * @cow: cow
 */
void stb_cow_kick_io(struct stb_cow *cow)
{
	queue_work(stb_io_wq, &cow->io_work);
}

/**
 * stb_cow_attach() - begin to preserve: the flip
 * @cow: cow, whose tracker is gated
 *
 * Writes are held from then on; stb_cow_kick() lets the worker see to them, when all
 * origins have been flipped.
 *
 * Context: control mutex held.
 */
void stb_cow_attach(struct stb_cow *cow)
{
	stb_assert_control();
	stb_tracker_set_mode(cow->tracker, STB_COW, cow);
}

/**
 * stb_cow_detach() - let every write pass and forget the tracker's list
 * @cow: cow; its snapshot is no longer held
 *
 * When it returns no callback looks at @cow, and it holds no write. Flushing
 * the work would not do: while another processor is about to queue it, between
 * its mark and the list, queueing it does nothing and flushing it finds nothing.
 * But whoever finds it marked is seen by the run that follows.
 *
 * Context: control mutex held.
 */
void stb_cow_detach(struct stb_cow *cow)
{
	struct stb_tracker *t = cow->tracker;

	stb_assert_control();
	stb_tracker_set_mode(t, STB_PASS, NULL);
	/* Pairs with the acquire in cow_work(). */
	smp_store_release(&cow->ending, true);
	stb_cow_kick(cow);
	wait_for_completion(&cow->ended);
	raw_spin_lock_irq(&t->lock);
	WARN_ON_ONCE(!bio_list_empty(&t->held));
	if (rcu_access_pointer(t->cow) == cow)
		RCU_INIT_POINTER(t->cow, NULL);
	raw_spin_unlock_irq(&t->lock);
	synchronize_rcu();
}

/**
 * stb_cow_overdue() - is the origin gone, or a chunk not safe that should be?
 * @cow: cow
 *
 * Return: enum stillblock_reason.
 */
u32 stb_cow_overdue(struct stb_cow *cow)
{
	u32 reason = STILLBLOCK_REASON_NONE;
	struct stb_job *job;

	if (!stb_disk_live(cow->tracker->disk))
		return STILLBLOCK_REASON_GONE;
	spin_lock_irq(&cow->lock);
	list_for_each_entry(job, &cow->active, node) {
		if (!time_after(jiffies, job->since + STB_JOB_TIMEOUT))
			continue;
		reason = job->state == STB_JOB_STORING &&
			 job->stored < job->nr ?
			 STILLBLOCK_REASON_STORE_TIMEOUT :
			 STILLBLOCK_REASON_ORIGIN_ERROR;
		break;
	}
	spin_unlock_irq(&cow->lock);
	return reason;
}

/**
 * stb_cow_find() - where the image finds the beginning of a range
 * @cow: cow
 * @r: in: sectors wanted; out: shortened to what lies in one place
 * @reader: filled and registered for STB_PLACE_ORIGIN
 * @slots: out: place of the first chunk, for STB_PLACE_STORE
 * @read: put on @cow->deferred for STB_PLACE_IN_TRANSIT, and somebody else's then.
 *	At once, so that the worker sees it when it has stored that chunk
 *
 * Return: which place that is.
 */
enum stb_place stb_cow_find(struct stb_cow *cow, struct stb_range *r,
			    struct stb_reader *reader, struct stb_slots *slots,
			    struct list_head *read)
{
	u64 chunk = stb_chunk_of(r->first);
	u64 last = stb_last_chunk(*r);
	enum stb_place place;
	unsigned long flags;
	void *entry;
	u64 end;

	spin_lock_irqsave(&cow->lock, flags);
	if (!test_bit(chunk, cow->copied)) {
		end = find_next_bit(cow->copied, last + 1, chunk);
		reader->first = chunk;
		reader->last = end - 1;
		list_add(&reader->node, &cow->readers);
		place = STB_PLACE_ORIGIN;
		goto unlock;
	}
	end = chunk + 1;
	entry = xa_load(&cow->slots, chunk);
	if (!entry) {
		struct stb_area *area = cow_area(cow, chunk);

		place = area ? STB_PLACE_ZERO : STB_PLACE_IN_TRANSIT;
		if (area)
			end = min(last + 1, area->end);
		else
			list_add_tail(read, &cow->deferred);
		goto unlock;
	}
	place = STB_PLACE_ERROR;
	if (WARN_ON_ONCE(!stb_store_find(&cow->snapshot->store,
					 xa_to_value(entry), slots)))
		goto unlock;
	while (end <= last && end - chunk < slots->nr &&
	       xa_load(&cow->slots, end) ==
	       xa_mk_value(slots->slot + (end - chunk)))
		end++;
	place = STB_PLACE_STORE;
unlock:
	spin_unlock_irqrestore(&cow->lock, flags);
	r->end = min_t(sector_t, r->end, end * STB_CHUNK_SECT);
	return place;
}

/**
 * stb_cow_reader_done() - an image read of the origin has ended
 * @cow: cow
 * @reader: what stb_cow_find() registered
 *
 * Context: any.
 */
void stb_cow_reader_done(struct stb_cow *cow, struct stb_reader *reader)
{
	unsigned long flags;
	bool closed;

	spin_lock_irqsave(&cow->lock, flags);
	list_del(&reader->node);
	closed = cow->nr_closed;
	spin_unlock_irqrestore(&cow->lock, flags);
	if (closed)
		stb_cow_kick(cow);
}

/**
 * stb_cow_all_clean() - does a whole range come from the origin?
 * @cow: cow
 * @r: sectors
 *
 * Return: true if so; a hint, right at some moment during the call.
 */
bool stb_cow_all_clean(struct stb_cow *cow, struct stb_range r)
{
	u64 last = stb_last_chunk(r);

	return find_next_bit(cow->copied, last + 1, stb_chunk_of(r.first)) >
	       last;
}

/**
 * stb_cow_add_area() - a part of the origin is going to be store
 * @cow: cow that is not attached yet
 * @first: first chunk
 * @end: behind the last chunk
 *
 * Return: 0 or -ENOMEM.
 */
int stb_cow_add_area(struct stb_cow *cow, u64 first, u64 end)
{
	if (cow->nr_areas == cow->max_areas) {
		u32 max = max(2 * cow->max_areas, 16u);
		struct stb_area *longer = kvmalloc_array(max, sizeof(*longer),
							 GFP_KERNEL);

		if (!longer)
			return -ENOMEM;
		if (cow->nr_areas)
			memcpy(longer, cow->areas,
			       cow->nr_areas * sizeof(*longer));
		kvfree(cow->areas);
		cow->areas = longer;
		cow->max_areas = max;
	}
	cow->areas[cow->nr_areas++] = (struct stb_area){ first, end };
	cow_set_bits(cow->copied, first, end - first);
	return 0;
}

static int area_compare(const void *a, const void *b)
{
	const struct stb_area *left = a, *right = b;

	return left->first < right->first ? -1 : left->first > right->first;
}

/**
 * stb_cow_sort_areas() - all areas are there
 * @cow: cow that is not attached yet
 */
void stb_cow_sort_areas(struct stb_cow *cow)
{
	sort(cow->areas, cow->nr_areas, sizeof(*cow->areas), area_compare, NULL);
}

/**
 * stb_cow_is_own_store() - is a range nothing but store of this snapshot?
 * @cow: cow of an origin
 * @r: sectors of a write
 * @bio: write
 *
 * Whose store it goes to is known by how it ends: so the write itself carries it,
 * whoever held it on its way here, and let it go.
 *
 * Context: RCU read-side section.
 * Return: true if so, and the write is one of this snapshot's jobs.
 */
bool stb_cow_is_own_store(struct stb_cow *cow, struct stb_range r,
			  struct bio *bio)
{
	u64 chunk = stb_chunk_of(r.first);
	u64 last = stb_last_chunk(r);
	const struct stb_job *job;
	void *private;

	if (stb_tracker_end_io(bio, &private) != job_end_io)
		return false;
	job = private;
	if (job->cow->snapshot != cow->snapshot)
		return false;
	while (chunk <= last) {
		struct stb_area *area = cow_area(cow, chunk);

		if (!area)
			return false;
		chunk = area->end;
	}
	return true;
}

static int cow_alloc_jobs(struct stb_cow *cow)
{
	unsigned int i, page;

	cow->jobs = kvcalloc(STB_NR_JOBS, sizeof(*cow->jobs), GFP_KERNEL);
	if (!cow->jobs)
		return -ENOMEM;
	for (i = 0; i < STB_NR_JOBS; i++) {
		struct stb_job *job = &cow->jobs[i];

		job->cow = cow;
		list_add_tail(&job->node, &cow->free);
		for (page = 0; page < STB_JOB_PAGES; page++) {
			job->pages[page] = alloc_page(GFP_KERNEL);
			if (!job->pages[page])
				return -ENOMEM;
		}
	}
	return 0;
}

/**
 * stb_cow_init() - prepare copy-on-write of an origin
 * @cow: cow to fill
 * @snapshot: owner
 * @t: origin; a reference is taken
 *
 * All memory of the write path is allocated here, before anything is held.
 *
 * Return: 0, or -ENOMEM; then stb_cow_destroy() is still to be called.
 */
int stb_cow_init(struct stb_cow *cow, struct stb_snapshot *snapshot,
		 struct stb_tracker *t)
{
	size_t bytes;

	kref_get(&t->ref);
	cow->snapshot = snapshot;
	cow->tracker = t;
	cow->nr_sect = stb_tracker_map(t)->nr_sect;
	cow->nr_chunks = stb_nr_chunks(cow->nr_sect);
	xa_init(&cow->slots);
	spin_lock_init(&cow->lock);
	INIT_LIST_HEAD(&cow->readers);
	INIT_LIST_HEAD(&cow->deferred);
	INIT_LIST_HEAD(&cow->retried);
	bio_list_init(&cow->store_writes);
	INIT_LIST_HEAD(&cow->active);
	INIT_LIST_HEAD(&cow->free);
	bio_list_init(&cow->waiting);
	INIT_WORK(&cow->work, cow_work);
	INIT_WORK(&cow->io_work, cow_io_work);
	init_completion(&cow->ended);

	bytes = BITS_TO_LONGS(cow->nr_chunks) * sizeof(long);
	cow->copied = vzalloc(bytes);
	cow->open = vzalloc(bytes);
	if (!cow->copied || !cow->open)
		return -ENOMEM;
	return cow_alloc_jobs(cow);
}

/**
 * stb_cow_destroy() - free everything
 * @cow: cow; no I/O of it is in flight
 */
void stb_cow_destroy(struct stb_cow *cow)
{
	unsigned int i, page;

	cancel_work_sync(&cow->work);
	cancel_work_sync(&cow->io_work);
	WARN_ON_ONCE(!bio_list_empty(&cow->waiting));
	for (i = 0; cow->jobs && i < STB_NR_JOBS; i++)
		for (page = 0; page < STB_JOB_PAGES; page++)
			if (cow->jobs[i].pages[page])
				__free_page(cow->jobs[i].pages[page]);
	kvfree(cow->jobs);
	vfree(cow->copied);
	vfree(cow->open);
	kvfree(cow->areas);
	xa_destroy(&cow->slots);
	stb_tracker_put(cow->tracker);
}
