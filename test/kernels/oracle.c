// SPDX-License-Identifier: Apache-2.0
/*
 * Writers with an oracle, for guests: proves that an image is what was on a
 * device at one instant, and that a change map names what changed.
 *
 * Each device has one thread that writes runs of stamped blocks of 4 KiB, one
 * write at a time: write N is submitted after write N - 1 has completed. So the
 * device holds, at any instant, the result of the writes 1..N for some N, and
 * an image is right if all of it is the result of 1..N, where N is the highest
 * stamp in it, and N lies between the writes that had completed before the take
 * and those that had been submitted after it.
 *
 * One command per line on stdin, one answer per line on stdout, which begins
 * with "ok" or "bad":
 *
 *   open NAME PATH BYTES PAUSE [buffered]
 *                                    fills the first BYTES of PATH; "ok BLOCKS".
 *                                    Between two writes are PAUSE microseconds
 *   start NAME, stop NAME            begins and ends writing; "ok COMPLETED"
 *   now NAME                         "ok COMPLETED SUBMITTED ERRNO", ERRNO of
 *                                    the write that failed, after which the
 *                                    thread has ended, or 0
 *   reach NAME COUNT                 waits until COUNT more have completed or
 *                                    one has failed; answers as "now"
 *   stuck NAME                       waits until a write has been under way for
 *                                    a second; answers as "now"
 *   check NAME PATH LOW HIGH         "ok N" if PATH is of one instant
 *   covers NAME OLD NEW UNIT OFFSET:LENGTH...
 *                                    are the ranges what the writes OLD + 1 to
 *                                    NEW changed, in units of UNIT bytes? "ok
 *                                    CHANGED RANGES", both in bytes
 *   close NAME
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define BLOCK 4096u
#define WORDS (BLOCK / sizeof(uint64_t))
/* Longest write: larger than what the module copies at once. */
#define MAX_RUN 32u
#define MAX_DEVICES 32
#define MAX_WRITES (1u << 22)
#define READ_BLOCKS 256u

/* One write, in blocks. */
struct record {
	uint32_t first;
	uint32_t nr;
};

struct device {
	char name[64];
	int fd;
	uint32_t nr_blocks;
	uint64_t seed;
	unsigned int pause_us;
	pthread_t thread;
	bool running;
	pthread_mutex_t lock;	/* all below */
	pthread_cond_t moved;
	bool stop;
	uint64_t submitted;
	uint64_t completed;
	int error;
	/* Write N is records[N - 1]. */
	struct record *records;
};

static struct device *devices[MAX_DEVICES];

static void answer(const char *format, ...)
{
	va_list args;

	va_start(args, format);
	vprintf(format, args);
	va_end(args);
	putchar('\n');
	fflush(stdout);
}

static uint64_t next_random(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state;
}

/* The content of a block after write @stamp; 0 is the first filling. */
static void fill_block(uint64_t *block, uint64_t stamp, uint32_t index)
{
	unsigned int i;

	block[0] = stamp;
	block[1] = index;
	for (i = 2; i < WORDS; i++)
		block[i] = (stamp << 32 | index) * 0x9e3779b97f4a7c15ull + i;
}

static void *allocate(size_t bytes)
{
	void *memory;

	if (posix_memalign(&memory, BLOCK, bytes)) {
		perror("oracle");
		exit(2);
	}
	return memory;
}

static int write_all(int fd, const void *data, size_t bytes, off_t at)
{
	ssize_t done = pwrite(fd, data, bytes, at);

	if (done < 0)
		return errno;
	return (size_t)done == bytes ? 0 : EIO;
}

static void *write_on(void *data)
{
	struct device *d = data;
	uint64_t *run = allocate((size_t)MAX_RUN * BLOCK);
	int error = 0;

	while (!error) {
		uint64_t stamp;
		uint32_t i, nr, first;

		/* Many small ones and some large ones. */
		nr = 1 + next_random(&d->seed) % MAX_RUN;
		if (next_random(&d->seed) % 4)
			nr = 1 + nr % 4;
		first = next_random(&d->seed) % (d->nr_blocks - nr + 1);
		pthread_mutex_lock(&d->lock);
		if (d->submitted == MAX_WRITES)
			d->error = E2BIG;
		if (d->stop || d->error) {
			pthread_cond_broadcast(&d->moved);
			pthread_mutex_unlock(&d->lock);
			break;
		}
		stamp = ++d->submitted;
		d->records[stamp - 1] = (struct record){ first, nr };
		pthread_mutex_unlock(&d->lock);
		for (i = 0; i < nr; i++)
			fill_block(run + i * WORDS, stamp, first + i);
		error = write_all(d->fd, run, (size_t)nr * BLOCK,
				  (off_t)first * BLOCK);
		pthread_mutex_lock(&d->lock);
		if (error)
			d->error = error;
		else
			d->completed = stamp;
		pthread_cond_broadcast(&d->moved);
		pthread_mutex_unlock(&d->lock);
		usleep(d->pause_us);
	}
	free(run);
	return NULL;
}

static struct device **find(const char *name)
{
	unsigned int i;

	for (i = 0; i < MAX_DEVICES; i++)
		if (devices[i] && !strcmp(devices[i]->name, name))
			return &devices[i];
	return NULL;
}

static void open_device(const char *name, const char *path, uint64_t bytes,
			unsigned int pause_us, bool buffered)
{
	struct device *d = calloc(1, sizeof(*d));
	uint64_t *run = allocate((size_t)READ_BLOCKS * BLOCK);
	int flags = O_RDWR | O_CLOEXEC | (buffered ? 0 : O_DIRECT);
	unsigned int slot = 0;
	int error = 0;
	uint32_t i, at;

	while (slot < MAX_DEVICES && devices[slot])
		slot++;
	if (!d || slot == MAX_DEVICES || strlen(name) >= sizeof(d->name)) {
		answer("bad cannot open so many");
		exit(2);
	}
	strcpy(d->name, name);
	d->nr_blocks = bytes / BLOCK;
	d->pause_us = pause_us;
	d->seed = 88172645463325252ull + slot;
	pthread_mutex_init(&d->lock, NULL);
	pthread_cond_init(&d->moved, NULL);
	d->records = mmap(NULL, MAX_WRITES * sizeof(*d->records),
			  PROT_READ | PROT_WRITE,
			  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	d->fd = open(path, flags);
	if (d->fd < 0 || d->records == MAP_FAILED) {
		answer("bad open %s: %s", path, strerror(errno));
		exit(2);
	}
	for (at = 0; at < d->nr_blocks && !error; at += READ_BLOCKS) {
		uint32_t nr = d->nr_blocks - at;

		if (nr > READ_BLOCKS)
			nr = READ_BLOCKS;
		for (i = 0; i < nr; i++)
			fill_block(run + i * WORDS, 0, at + i);
		error = write_all(d->fd, run, (size_t)nr * BLOCK,
				  (off_t)at * BLOCK);
	}
	if (!error && fsync(d->fd))
		error = errno;
	free(run);
	devices[slot] = d;
	if (error)
		answer("bad fill %s: %s", path, strerror(error));
	else
		answer("ok %u", d->nr_blocks);
}

static void start(struct device *d)
{
	d->stop = false;
	if (!d->running)
		pthread_create(&d->thread, NULL, write_on, d);
	d->running = true;
	answer("ok %llu", (unsigned long long)d->completed);
}

static void stop(struct device *d)
{
	if (d->running) {
		pthread_mutex_lock(&d->lock);
		d->stop = true;
		pthread_mutex_unlock(&d->lock);
		pthread_join(d->thread, NULL);
		d->running = false;
	}
}

/* Waits for @more writes, 0 for none. */
static void now(struct device *d, uint64_t more)
{
	uint64_t target;

	pthread_mutex_lock(&d->lock);
	target = d->completed + more;
	while (d->completed < target && !d->error)
		pthread_cond_wait(&d->moved, &d->lock);
	answer("ok %llu %llu %d", (unsigned long long)d->completed,
	       (unsigned long long)d->submitted, d->error);
	pthread_mutex_unlock(&d->lock);
}

/* Waits until one write takes longer than a second. */
static void stuck(struct device *d)
{
	struct timespec until;
	uint64_t seen;

	pthread_mutex_lock(&d->lock);
	do {
		seen = d->submitted;
		clock_gettime(CLOCK_REALTIME, &until);
		until.tv_sec++;
		while ((d->submitted == seen || d->submitted == d->completed) &&
		       !d->error &&
		       !pthread_cond_timedwait(&d->moved, &d->lock, &until))
			;
	} while ((d->submitted != seen || d->submitted == d->completed) &&
		 !d->error);
	pthread_mutex_unlock(&d->lock);
	now(d, 0);
}

static int read_all(int fd, void *to, size_t bytes, off_t at)
{
	while (bytes) {
		ssize_t got = pread(fd, to, bytes, at);

		if (got <= 0)
			return got ? errno : EIO;
		to = (char *)to + got;
		bytes -= got;
		at += got;
	}
	return 0;
}

/* The stamps of all blocks; blocks that are no result of any write are bad. */
static bool read_stamps(struct device *d, int fd, uint64_t *stamps)
{
	uint64_t *run = allocate((size_t)READ_BLOCKS * BLOCK);
	uint64_t expected[WORDS];
	bool good = true;
	uint32_t at, i;

	for (at = 0; at < d->nr_blocks && good; at += READ_BLOCKS) {
		uint32_t nr = d->nr_blocks - at;
		int error;

		if (nr > READ_BLOCKS)
			nr = READ_BLOCKS;
		error = read_all(fd, run, (size_t)nr * BLOCK,
				 (off_t)at * BLOCK);
		if (error) {
			answer("bad read at %llu: %s",
			       (unsigned long long)at * BLOCK, strerror(error));
			good = false;
			break;
		}
		for (i = 0; i < nr && good; i++) {
			stamps[at + i] = run[i * WORDS];
			fill_block(expected, stamps[at + i], at + i);
			if (memcmp(run + i * WORDS, expected, BLOCK)) {
				answer("bad block %u has no content of ours (%llx %llx)",
				       at + i,
				       (unsigned long long)run[i * WORDS],
				       (unsigned long long)run[i * WORDS + 1]);
				good = false;
			}
		}
	}
	free(run);
	return good;
}

/* Are @stamps the result of the writes 1..@last? */
static bool is_result(struct device *d, const uint64_t *stamps, uint64_t last)
{
	uint64_t *result = calloc(d->nr_blocks, sizeof(*result));
	bool good = result;
	uint64_t n;
	uint32_t i;

	for (n = 1; good && n <= last; n++)
		for (i = 0; i < d->records[n - 1].nr; i++)
			result[d->records[n - 1].first + i] = n;
	for (i = 0; good && i < d->nr_blocks; i++) {
		if (stamps[i] == result[i])
			continue;
		answer("bad block %u is of write %llu, and not of %llu, among %llu",
		       i, (unsigned long long)stamps[i],
		       (unsigned long long)result[i],
		       (unsigned long long)last);
		good = false;
	}
	free(result);
	return good;
}

static void check(struct device *d, const char *path, uint64_t low,
		  uint64_t high)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC | O_DIRECT);
	uint64_t *stamps = calloc(d->nr_blocks, sizeof(*stamps));
	uint64_t last = 0;
	uint32_t i;

	if (fd < 0 || !stamps) {
		answer("bad open %s: %s", path, strerror(errno));
	} else if (read_stamps(d, fd, stamps)) {
		for (i = 0; i < d->nr_blocks; i++)
			if (stamps[i] > last)
				last = stamps[i];
		if (last > high)
			answer("bad write %llu is in it, of which %llu came before",
			       (unsigned long long)last,
			       (unsigned long long)high);
		else if (is_result(d, stamps, last < low ? low : last))
			answer("ok %llu",
			       (unsigned long long)(last < low ? low : last));
	}
	if (fd >= 0)
		close(fd);
	free(stamps);
}

static void covers(struct device *d, uint64_t from, uint64_t to, uint64_t unit,
		   char *ranges)
{
	uint64_t size = (uint64_t)d->nr_blocks * BLOCK;
	uint64_t nr_units = (size + unit - 1) / unit, changed = 0, covered = 0;
	char *wrote = calloc(nr_units, 1);
	char *marked = calloc(nr_units, 1);
	unsigned long long offset, length;
	uint64_t n, u;
	char *word;
	uint32_t i;

	for (n = from + 1; n <= to; n++)
		for (i = 0; i < d->records[n - 1].nr; i++)
			wrote[(d->records[n - 1].first + i) *
			      (uint64_t)BLOCK / unit] = 1;
	for (word = strtok(ranges, " "); word; word = strtok(NULL, " "))
		if (sscanf(word, "%llu:%llu", &offset, &length) == 2)
			for (u = offset / unit; u < nr_units &&
			     u * unit < offset + length; u++)
				marked[u] = 1;
	for (u = 0; u < nr_units; u++) {
		changed += wrote[u] * unit;
		covered += marked[u] * unit;
	}
	for (u = 0; u < nr_units && wrote[u] == marked[u]; u++)
		;
	if (u == nr_units)
		answer("ok %llu %llu", (unsigned long long)changed,
		       (unsigned long long)covered);
	else
		answer("bad the unit at %llu %s", (unsigned long long)u * unit,
		       wrote[u] ? "has changed and is not marked" :
				  "is marked and has not changed");
	free(wrote);
	free(marked);
}

static void close_device(struct device **slot)
{
	struct device *d = *slot;

	stop(d);
	close(d->fd);
	munmap(d->records, MAX_WRITES * sizeof(*d->records));
	free(d);
	*slot = NULL;
	answer("ok");
}

static void serve(char *line)
{
	unsigned long long a = 0, b = 0, c = 0;
	char verb[16] = "", name[64] = "", path[256] = "", mode[16] = "";
	struct device **slot;
	int rest = 0;

	if (sscanf(line, "open %63s %255s %llu %llu %15s", name, path, &a, &b,
		   mode) >= 4) {
		open_device(name, path, a, b, !strcmp(mode, "buffered"));
		return;
	}
	sscanf(line, "%15s %63s", verb, name);
	slot = find(name);
	if (!slot)
		answer("bad there is no %s", name);
	else if (!strcmp(verb, "start"))
		start(*slot);
	else if (!strcmp(verb, "stop"))
		stop(*slot), now(*slot, 0);
	else if (!strcmp(verb, "stuck"))
		stuck(*slot);
	else if (!strcmp(verb, "now"))
		now(*slot, 0);
	else if (sscanf(line, "reach %*s %llu", &a) == 1)
		now(*slot, a);
	else if (sscanf(line, "check %*s %255s %llu %llu", path, &a, &b) == 3)
		check(*slot, path, a, b);
	else if (sscanf(line, "covers %*s %llu %llu %llu %n", &a, &b, &c,
			&rest) == 3)
		covers(*slot, a, b, c, line + rest);
	else if (!strcmp(verb, "close"))
		close_device(slot);
	else
		answer("bad command %s", verb);
}

int main(void)
{
	char *line = NULL;
	size_t size = 0;

	while (getline(&line, &size, stdin) > 0) {
		line[strcspn(line, "\n")] = '\0';
		serve(line);
	}
	free(line);
	return 0;
}
