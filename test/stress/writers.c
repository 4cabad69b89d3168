// SPDX-License-Identifier: Apache-2.0
/*
 * The writers: each is a thread with a way of its own to write. None of their
 * writes may ever fail, whatever becomes of a snapshot.
 */
#define _GNU_SOURCE
#include "stress.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <linux/io_uring.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define MAX_DEPTH	32
/* Room to begin a buffer anywhere in a page. */
#define SLOT_BYTES	(MAX_WRITE + 4096)
/*
 * A polled write is a NOWAIT one to the block layer, which refuses to split
 * it, and io_uring then tries again for ever. So it stays below what every
 * device takes at once.
 */
#define MAX_POLLED	(64u << 10)
/* A write that waits no longer than this is retried at once. */
#define EVENT_WAIT_S	1

/* A write on its way. */
struct slot {
	struct target *target;
	struct record *record;
	void *memory;
	char *data;
	bool nowait;
	bool busy;
};

struct writer {
	const char *name;
	void (*run)(struct writer *writer);
	uint32_t index;
	unsigned int depth;
	bool files;
	bool polled;
	pthread_t thread;
	struct rng rng;
	struct journal *journal;
	int direct[MAX_TARGETS];
	int cached[MAX_TARGETS];
	struct slot slots[MAX_DEPTH];
};

static struct writer writers[MAX_WRITERS];
static uint32_t nr_writers;

static uint32_t target_index(struct target *target)
{
	return target - world.targets;
}

static struct target *pick_target(struct writer *writer)
{
	uint32_t start = rng_below(&writer->rng, world.nr_targets), i;

	for (i = 0; i < world.nr_targets; i++) {
		struct target *target =
			&world.targets[(start + i) % world.nr_targets];

		if (target->is_file == writer->files &&
		    (target->can_poll || !writer->polled))
			return target;
	}
	return NULL;
}

/* 512 bytes to 1 MiB, mostly small. */
static uint64_t pick_length(struct rng *rng)
{
	uint64_t kind = rng_below(rng, 100);

	if (kind < 45)
		return BLOCK_UNITS;
	if (kind < 60)
		return 1 + rng_below(rng, 2 * BLOCK_UNITS);
	if (kind < 82)
		return 1 + rng_below(rng, 16 * BLOCK_UNITS);
	if (kind < 94)
		return 1 + rng_below(rng, 64 * BLOCK_UNITS);
	return 1 + rng_below(rng, MAX_WRITE / UNIT_BYTES);
}

/* A range of the target's direct or cached part, often where others were. */
static bool pick_range(struct rng *rng, struct target *target, bool cached,
		       uint64_t *first, uint64_t *nr)
{
	uint64_t begin = cached ? target->nr_direct : 0;
	uint64_t room = (cached ? target->nr_units : target->nr_direct) - begin;
	uint64_t align = target->align, hot = room / 8;

	*nr = pick_length(rng);
	*nr = (*nr + align - 1) / align * align;
	if (room < align)
		return false;
	if (*nr > room)
		*nr = room / align * align;
	if (hot > align && rng_chance(rng, 60)) {
		/* A hot eighth, which moves every eight seconds. */
		*first = now_ns() >> 33;
		*first = *first * 0x9e3779b97f4a7c15ull % (room - hot);
		*first += rng_below(rng, hot);
	} else {
		*first = rng_below(rng, room);
	}
	if (*first > room - *nr)
		*first = room - *nr;
	*first = *first / align * align;
	/* Writes of whole blocks mostly lie on whole blocks. */
	if (*nr % BLOCK_UNITS == 0 && rng_chance(rng, 80))
		*first = *first / BLOCK_UNITS * BLOCK_UNITS;
	*first += begin;
	return true;
}

/* Finds something to write and fills the slot's buffer. False: try again. */
static bool slot_begin(struct writer *writer, struct slot *slot, bool cached)
{
	struct target *target = pick_target(writer);
	uint64_t first, nr;

	if (!pick_range(&writer->rng, target, cached, &first, &nr))
		return false;
	if (writer->polled && nr > MAX_POLLED / UNIT_BYTES)
		nr = MAX_POLLED / UNIT_BYTES;
	slot->record = write_begin(writer->journal, target, first, nr,
				   KIND_DATA);
	if (!slot->record)
		return false;
	slot->target = target;
	slot->busy = true;
	slot->data = (char *)slot->memory +
		     rng_below(&writer->rng, 4096 / UNIT_BYTES) * UNIT_BYTES;
	fill_units(slot->data, target->space, slot->record->first, nr,
		   atomic_load(&slot->record->stamp));
	return true;
}

static size_t slot_bytes(const struct slot *slot)
{
	return slot->record->nr << UNIT_SHIFT;
}

static uint64_t slot_offset(const struct slot *slot)
{
	return (slot->record->first - slot->target->at) << UNIT_SHIFT;
}

static void slot_end(struct writer *writer, struct slot *slot)
{
	write_end(writer->journal, slot->target, slot->record);
	slot->busy = false;
}

static void write_failed(const char *what, const struct target *target,
			 uint64_t unit, long error)
{
	violation(0, "%s: %s failed at byte %llu: %s", what, target->path,
		  (unsigned long long)unit << UNIT_SHIFT, strerror(error));
}

/*
 * What became of a write: true when it has to be submitted again, without
 * NOWAIT then. A NOWAIT write may be refused half way, so all of it is.
 */
static bool slot_completed(struct writer *writer, struct slot *slot, long res)
{
	if (res == (long)slot_bytes(slot)) {
		slot_end(writer, slot);
		return false;
	}
	/* Some drivers know no NOWAIT at all. */
	if (slot->nowait &&
	    (res == -EAGAIN || res == -EOPNOTSUPP || res >= 0)) {
		slot->nowait = false;
		atomic_fetch_add(&world.nr_nowait_refused, 1);
		return true;
	}
	if (res >= 0)
		return true;
	write_failed(writer->name, slot->target, slot_offset(slot) >> UNIT_SHIFT,
		     -res);
	slot_end(writer, slot);
	return false;
}

static void write_all(struct writer *writer, struct slot *slot, int fd)
{
	size_t bytes = slot_bytes(slot), half = bytes / 2 / 4096 * 4096;
	struct iovec parts[2] = {
		{ slot->data, half }, { slot->data + half, bytes - half },
	};
	ssize_t done;

	do {
		if (half && rng_chance(&writer->rng, 30))
			done = pwritev(fd, parts, 2, slot_offset(slot));
		else
			done = pwrite(fd, slot->data, bytes, slot_offset(slot));
	} while (slot_completed(writer, slot, done < 0 ? -errno : done));
}

/* One after the other, past the page cache. */
static void run_direct(struct writer *writer)
{
	struct slot *slot = &writer->slots[0];

	while (!world.stop_writers) {
		if (slot_begin(writer, slot, false))
			write_all(writer, slot,
				  writer->direct[target_index(slot->target)]);
		pause_up_to(&writer->rng, world.pace_us);
	}
}

/*
 * Through the page cache, several at once before they are made safe. On a
 * device they have completed when fsync() says so. A file system is frozen for
 * every take, which makes everything safe that was written before.
 */
static void run_cached(struct writer *writer)
{
	while (!world.stop_writers) {
		unsigned int nr = 0, limit;
		int fd = -1;

		limit = 1 + rng_below(&writer->rng, writer->depth);
		while (nr < limit && !world.stop_writers) {
			struct slot *slot = &writer->slots[nr];
			ssize_t done;

			if (!slot_begin(writer, slot, true))
				break;
			fd = writer->cached[target_index(slot->target)];
			done = pwrite(fd, slot->data, slot_bytes(slot),
				      slot_offset(slot));
			if (done != (ssize_t)slot_bytes(slot))
				write_failed("write", slot->target,
					     slot_offset(slot) >> UNIT_SHIFT,
					     done < 0 ? errno : ENOSPC);
			if (slot->target->is_file && rng_chance(&writer->rng, 50))
				slot_end(writer, slot);
			nr++;
		}
		for (limit = 0; limit < nr; limit++) {
			struct slot *slot = &writer->slots[limit];

			if (!slot->busy)
				continue;
			fd = writer->cached[target_index(slot->target)];
			if (rng_chance(&writer->rng, 50) ? fsync(fd) :
							   fdatasync(fd))
				write_failed("fsync", slot->target,
					     slot_offset(slot) >> UNIT_SHIFT,
					     errno);
			slot_end(writer, slot);
		}
		pause_up_to(&writer->rng, world.pace_us);
	}
}

static void aio_prepare(struct writer *writer, struct slot *slot,
			struct iocb *iocb)
{
	memset(iocb, 0, sizeof(*iocb));
	iocb->aio_data = (uintptr_t)slot;
	iocb->aio_lio_opcode = IOCB_CMD_PWRITE;
	iocb->aio_rw_flags = slot->nowait ? RWF_NOWAIT : 0;
	iocb->aio_fildes = writer->direct[target_index(slot->target)];
	iocb->aio_buf = (uintptr_t)slot->data;
	iocb->aio_nbytes = slot_bytes(slot);
	iocb->aio_offset = slot_offset(slot);
}

static void aio_submit(aio_context_t context, struct iocb **list, long nr)
{
	while (nr > 0) {
		long done = syscall(SYS_io_submit, context, nr, list);

		if (done < 0 && errno == EOPNOTSUPP && list[0]->aio_rw_flags) {
			/* A device without NOWAIT is refused here by now. */
			struct slot *slot = (void *)(uintptr_t)list[0]->aio_data;

			slot->nowait = false;
			list[0]->aio_rw_flags = 0;
			atomic_fetch_add(&world.nr_nowait_refused, 1);
			continue;
		}
		if (done < 0 && errno != EAGAIN && errno != EINTR)
			give_up("io_submit: %s", strerror(errno));
		if (done > 0) {
			list += done;
			nr -= done;
		}
	}
}

static void run_aio(struct writer *writer)
{
	struct iocb iocbs[MAX_DEPTH], *list[MAX_DEPTH];
	struct io_event events[MAX_DEPTH];
	aio_context_t context = 0;
	unsigned int flying = 0, i;

	if (syscall(SYS_io_setup, MAX_DEPTH, &context))
		give_up("io_setup: %s", strerror(errno));
	while (flying || !world.stop_writers) {
		struct timespec wait = { .tv_sec = EVENT_WAIT_S };
		long nr = 0, done;

		for (i = 0; i < writer->depth && !world.stop_writers; i++) {
			struct slot *slot = &writer->slots[i];

			if (slot->busy || !slot_begin(writer, slot, false))
				continue;
			slot->nowait = rng_chance(&writer->rng, 40);
			aio_prepare(writer, slot, &iocbs[i]);
			list[nr++] = &iocbs[i];
		}
		aio_submit(context, list, nr);
		flying += nr;
		done = syscall(SYS_io_getevents, context, flying ? 1 : 0,
			       MAX_DEPTH, events, &wait);
		nr = 0;
		for (i = 0; (long)i < done; i++) {
			struct slot *slot = (void *)(uintptr_t)events[i].data;
			struct iocb *iocb = &iocbs[slot - writer->slots];

			if (!slot_completed(writer, slot, events[i].res)) {
				flying--;
				continue;
			}
			aio_prepare(writer, slot, iocb);
			list[nr++] = iocb;
		}
		aio_submit(context, list, nr);
		pause_up_to(&writer->rng, world.pace_us);
	}
	syscall(SYS_io_destroy, context);
}

/* io_uring by its system calls and its shared rings. */
struct ring {
	int fd;
	_Atomic uint32_t *sq_tail;
	uint32_t sq_mask;
	uint32_t *sq_array;
	struct io_uring_sqe *sqes;
	_Atomic uint32_t *cq_head;
	_Atomic uint32_t *cq_tail;
	uint32_t cq_mask;
	struct io_uring_cqe *cqes;
};

static void *ring_map(int fd, size_t bytes, uint64_t offset)
{
	void *map = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
			 MAP_SHARED | MAP_POPULATE, fd, offset);

	if (map == MAP_FAILED)
		give_up("mmap of an io_uring: %s", strerror(errno));
	return map;
}

static void ring_open(struct ring *ring, bool polled)
{
	struct io_uring_params p = {
		.flags = polled ? IORING_SETUP_IOPOLL : 0,
	};
	char *sq, *cq;

	ring->fd = syscall(SYS_io_uring_setup, MAX_DEPTH, &p);
	if (ring->fd < 0)
		give_up("io_uring_setup: %s", strerror(errno));
	sq = ring_map(ring->fd, p.sq_off.array + p.sq_entries * sizeof(uint32_t),
		      IORING_OFF_SQ_RING);
	cq = ring_map(ring->fd, p.cq_off.cqes +
		      p.cq_entries * sizeof(struct io_uring_cqe),
		      IORING_OFF_CQ_RING);
	ring->sqes = ring_map(ring->fd,
			      p.sq_entries * sizeof(struct io_uring_sqe),
			      IORING_OFF_SQES);
	ring->sq_tail = (void *)(sq + p.sq_off.tail);
	ring->sq_mask = *(uint32_t *)(sq + p.sq_off.ring_mask);
	ring->sq_array = (void *)(sq + p.sq_off.array);
	ring->cq_head = (void *)(cq + p.cq_off.head);
	ring->cq_tail = (void *)(cq + p.cq_off.tail);
	ring->cq_mask = *(uint32_t *)(cq + p.cq_off.ring_mask);
	ring->cqes = (void *)(cq + p.cq_off.cqes);
}

static void ring_queue(struct writer *writer, struct ring *ring,
		       struct slot *slot)
{
	uint32_t tail = atomic_load(ring->sq_tail);
	uint32_t index = tail & ring->sq_mask;
	struct io_uring_sqe *sqe = &ring->sqes[index];

	memset(sqe, 0, sizeof(*sqe));
	sqe->opcode = IORING_OP_WRITE;
	sqe->fd = writer->direct[target_index(slot->target)];
	sqe->addr = (uintptr_t)slot->data;
	sqe->len = slot_bytes(slot);
	sqe->off = slot_offset(slot);
	sqe->rw_flags = slot->nowait ? RWF_NOWAIT : 0;
	if (!slot->nowait && rng_chance(&writer->rng, 20))
		sqe->flags = IOSQE_ASYNC;
	sqe->user_data = (uintptr_t)slot;
	ring->sq_array[index] = index;
	atomic_store(ring->sq_tail, tail + 1);
}

/* Returns the completions there are, after waiting for one if any is due. */
static void ring_enter(struct ring *ring, unsigned int nr, bool wait)
{
	while (nr || wait) {
		long done = syscall(SYS_io_uring_enter, ring->fd, nr, wait,
				    wait ? IORING_ENTER_GETEVENTS : 0, NULL, 0);

		if (done >= 0)
			nr -= done;
		else if (errno != EINTR && errno != EAGAIN && errno != EBUSY)
			give_up("io_uring_enter: %s", strerror(errno));
		if (atomic_load(ring->cq_head) != atomic_load(ring->cq_tail))
			wait = false;
	}
}

static void run_uring(struct writer *writer)
{
	unsigned int flying = 0, nr = 0, i;
	struct ring ring;

	ring_open(&ring, writer->polled);
	while (flying || !world.stop_writers) {
		uint32_t head;

		for (i = 0; i < writer->depth && !world.stop_writers; i++) {
			struct slot *slot = &writer->slots[i];

			if (slot->busy || !slot_begin(writer, slot, false))
				continue;
			slot->nowait = rng_chance(&writer->rng, 40);
			ring_queue(writer, &ring, slot);
			flying++;
			nr++;
		}
		ring_enter(&ring, nr, flying);
		nr = 0;
		head = atomic_load(ring.cq_head);
		while (head != atomic_load(ring.cq_tail)) {
			struct io_uring_cqe *cqe = &ring.cqes[head & ring.cq_mask];
			struct slot *slot = (void *)(uintptr_t)cqe->user_data;
			long res = cqe->res;

			atomic_store(ring.cq_head, ++head);
			if (slot_completed(writer, slot, res)) {
				ring_queue(writer, &ring, slot);
				nr++;
			} else {
				flying--;
			}
		}
		pause_up_to(&writer->rng, world.pace_us);
	}
	close(ring.fd);
}

static int zero_range(struct target *target, int fd, uint64_t offset,
		      uint64_t bytes, bool punch)
{
	uint64_t range[2] = { offset, bytes };

	if (target->is_file)
		return fallocate(fd, FALLOC_FL_KEEP_SIZE |
				 (punch ? FALLOC_FL_PUNCH_HOLE :
					  FALLOC_FL_ZERO_RANGE),
				 offset, bytes);
	return ioctl(fd, BLKZEROOUT, range);
}

/* Zeroes and discards, as file systems and administrators send them. */
static void run_erasing(struct writer *writer)
{
	while (!world.stop_writers) {
		struct target *target = pick_target(writer);
		struct record *record;
		uint64_t first, nr, range[2];
		bool discard = !target->is_file && !target->no_discard &&
			       rng_chance(&writer->rng, 60);
		int fd = writer->cached[target_index(target)];

		pause_up_to(&writer->rng, 4 * world.pace_us + 20000);
		if (!pick_range(&writer->rng, target, false, &first, &nr))
			continue;
		record = write_begin(writer->journal, target, first, nr,
				     discard ? KIND_UNDEFINED : KIND_ZERO);
		if (!record)
			continue;
		range[0] = first << UNIT_SHIFT;
		range[1] = nr << UNIT_SHIFT;
		if (discard) {
			if (ioctl(fd, BLKDISCARD, range)) {
				if (errno != EOPNOTSUPP)
					write_failed("discard", target, first,
						     errno);
				target->no_discard = true;
			}
		} else if (zero_range(target, fd, range[0], range[1],
				      rng_chance(&writer->rng, 50))) {
			write_failed("zeroing", target, first, errno);
		}
		write_end(writer->journal, target, record);
	}
}

/* Names that a churner uses at once in a file system. */
#define CHURN_NAMES	48

static void churn_file(struct writer *writer, const char *path)
{
	struct slot *slot = &writer->slots[0];
	size_t bytes = rng_below(&writer->rng, 262144);
	int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);

	if (fd < 0)
		return;
	if (rng_chance(&writer->rng, 30) &&
	    ftruncate(fd, rng_below(&writer->rng, 262144)))
		write_failed("truncate", slot->target, 0, errno);
	memset(slot->memory, rng_next(&writer->rng), bytes);
	/* The file system may be full; that is not the module's doing. */
	if (pwrite(fd, slot->memory, bytes,
		   rng_below(&writer->rng, 65536)) < 0 && errno != ENOSPC)
		write_failed("write", slot->target, 0, errno);
	if (rng_chance(&writer->rng, 30) && fsync(fd))
		write_failed("fsync", slot->target, 0, errno);
	close(fd);
}

/* Makes and unmakes files and folders beside the stamped file. */
static void run_churn(struct writer *writer)
{
	struct slot *slot = &writer->slots[0];

	while (!world.stop_writers) {
		struct target *target = pick_target(writer);
		const char *slash = strrchr(target->path, '/');
		int folder = slash - target->path;
		char a[2 * PATH_BYTES + 32], b[2 * PATH_BYTES + 32];

		slot->target = target;
		snprintf(a, sizeof(a), "%.*s/churn%u", folder, target->path,
			 (unsigned int)rng_below(&writer->rng, CHURN_NAMES));
		snprintf(b, sizeof(b), "%.*s/churn%u", folder, target->path,
			 (unsigned int)rng_below(&writer->rng, CHURN_NAMES));
		switch (rng_below(&writer->rng, 6)) {
		case 0:
			unlink(a);
			break;
		case 1:
			rename(a, b);
			break;
		case 2:
			link(a, b);
			break;
		case 3:
			if (mkdir(a, 0700))
				rmdir(a);
			break;
		default:
			churn_file(writer, a);
			break;
		}
		pause_up_to(&writer->rng, 2 * world.pace_us);
	}
}

static void open_targets(struct writer *writer)
{
	uint32_t i;

	for (i = 0; i < world.nr_targets; i++) {
		struct target *target = &world.targets[i];

		if (target->is_file != writer->files)
			continue;
		writer->direct[i] = open(target->path, O_RDWR | O_DIRECT | O_CLOEXEC);
		writer->cached[i] = open(target->path, O_RDWR | O_CLOEXEC);
		if (writer->direct[i] < 0 || writer->cached[i] < 0)
			give_up("%s: %s", target->path, strerror(errno));
	}
}

static void *writer_thread(void *data)
{
	struct writer *writer = data;

	writer->run(writer);
	return NULL;
}

static void writer_add(const char *name, void (*run)(struct writer *),
		       unsigned int depth, bool files, bool polled)
{
	struct writer *writer = &writers[nr_writers];
	unsigned int i;

	writer->name = name;
	writer->run = run;
	writer->depth = depth;
	writer->files = files;
	writer->polled = polled;
	writer->index = nr_writers;
	if (!pick_target(writer))
		return;
	nr_writers++;
	writer->journal = journal_new(name);
	rng_seed(&writer->rng, world.seed, 1, writer->index);
	for (i = 0; i < depth; i++)
		writer->slots[i].memory = shared_memory(SLOT_BYTES);
	open_targets(writer);
	if (pthread_create(&writer->thread, NULL, writer_thread, writer))
		give_up("no thread");
	pthread_setname_np(writer->thread, name);
}

void writers_start(void)
{
	writer_add("write", run_direct, 1, false, false);
	writer_add("write", run_direct, 1, false, false);
	writer_add("cached", run_cached, 8, false, false);
	writer_add("libaio", run_aio, 32, false, false);
	writer_add("libaio", run_aio, 8, false, false);
	writer_add("io_uring", run_uring, 24, false, false);
	writer_add("polled", run_uring, 8, false, true);
	writer_add("erasing", run_erasing, 1, false, false);
	writer_add("file", run_direct, 1, true, false);
	writer_add("cached file", run_cached, 8, true, false);
	writer_add("erasing file", run_erasing, 1, true, false);
	writer_add("churn", run_churn, 1, true, false);
}

void writers_join(void)
{
	uint32_t i;

	world.stop_writers = true;
	for (i = 0; i < nr_writers; i++)
		pthread_join(writers[i].thread, NULL);
}

static void stamp_all(struct journal *journal, struct target *target,
		      void *buffer)
{
	int fd = open(target->path, O_RDWR | O_DIRECT | (target->is_file ? O_CREAT : 0), 0600);
	uint64_t first, nr;

	if (fd < 0)
		give_up("%s: %s", target->path, strerror(errno));
	for (first = 0; first < target->nr_units; first += nr) {
		struct record *record;
		ssize_t bytes;

		nr = target->nr_units - first;
		if (nr > MAX_WRITE / UNIT_BYTES)
			nr = MAX_WRITE / UNIT_BYTES;
		bytes = nr << UNIT_SHIFT;
		record = write_begin(journal, target, first, nr, KIND_DATA);
		fill_units(buffer, target->space, record->first, nr,
			   atomic_load(&record->stamp));
		if (pwrite(fd, buffer, bytes, first << UNIT_SHIFT) != bytes)
			give_up("%s: %s", target->path, strerror(errno));
		write_end(journal, target, record);
	}
	if (fsync(fd))
		give_up("%s: %s", target->path, strerror(errno));
	close(fd);
}

void writers_initialise(void)
{
	struct journal *journal = journal_new("stamping");
	void *buffer = shared_memory(MAX_WRITE);
	uint32_t i;

	for (i = 0; i < world.nr_targets; i++)
		stamp_all(journal, &world.targets[i], buffer);
}
