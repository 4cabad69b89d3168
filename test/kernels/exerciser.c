// SPDX-License-Identifier: Apache-2.0
/*
 * Does to one file whatever may be done to a file, in a random order, and
 * compares it with a model in memory all the time: reads, writes, both also
 * mapped and past the page cache, truncation, every mode of fallocate(2),
 * copy_file_range(2), syncs, closing and opening again. The idea is fsx's.
 *
 *   exerciser FILE SEED
 *
 * Ends with a last look at the whole file when it gets SIGTERM: exit code 0 and
 * the number of steps of each kind in one line of JSON. A difference or a
 * failed call ends it with 1, the last steps and where the difference is.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* The alignment of direct I/O, and of ranges that are taken out or put in. */
#define BLOCK 4096u
#define MAX_SIZE (256u * BLOCK)
#define MAX_STEP (32u * BLOCK)
#define KEPT_STEPS 16

enum kind {
	READ, MAPPED_READ, DIRECT_READ, WRITE, MAPPED_WRITE, DIRECT_WRITE,
	TRUNCATE, ALLOCATE, PUNCH, ZERO, COLLAPSE, INSERT, COPY, SYNC, REOPEN,
	NR_KINDS
};

static const char *const names[NR_KINDS] = {
	"read", "mappedRead", "directRead", "write", "mappedWrite",
	"directWrite", "truncate", "allocate", "punch", "zero", "collapse",
	"insert", "copy", "sync", "reopen"
};

struct step {
	enum kind kind;
	uint32_t offset, length, size_before;
};

static const char *path;
static int cached, direct;
static uint32_t size;
static unsigned char model[MAX_SIZE];
static unsigned char *buffer;
static uint64_t state;
static uint64_t counts[NR_KINDS], nr_steps;
static struct step steps[KEPT_STEPS];
static volatile sig_atomic_t over;

static void on_signal(int signal)
{
	(void)signal;
	over = 1;
}

static uint32_t below(uint32_t limit)
{
	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return limit ? (uint32_t)((state >> 16) % limit) : 0;
}

static void tell_steps(void)
{
	uint64_t i = nr_steps > KEPT_STEPS ? nr_steps - KEPT_STEPS : 0;

	for (; i < nr_steps; i++) {
		const struct step *s = &steps[i % KEPT_STEPS];

		fprintf(stderr, "  step %llu: %s %u + %u, size %u\n",
			(unsigned long long)i, names[s->kind], s->offset,
			s->length, s->size_before);
	}
}

static void must(bool fine, const char *what)
{
	if (fine)
		return;
	fprintf(stderr, "%s: %s: %s\n", path, what, strerror(errno));
	tell_steps();
	exit(1);
}

static void compare(const unsigned char *got, uint32_t offset, uint32_t length)
{
	uint32_t i = 0, nr = 0, j;

	if (!memcmp(got, model + offset, length))
		return;
	while (got[i] == model[offset + i])
		i++;
	for (j = i; j < length; j++)
		nr += got[j] != model[offset + j];
	fprintf(stderr, "%s: %u bytes differ from %u on: %#x instead of %#x\n",
		path, nr, offset + i, got[i], model[offset + i]);
	tell_steps();
	exit(1);
}

static void open_file(int flags)
{
	cached = open(path, O_RDWR | O_CLOEXEC | flags, 0600);
	must(cached >= 0, "open");
	direct = open(path, O_RDWR | O_CLOEXEC | O_DIRECT);
	must(direct >= 0, "open, O_DIRECT");
}

static void close_file(void)
{
	must(!close(cached) && !close(direct), "close");
}

static void check_size(void)
{
	must(lseek(cached, 0, SEEK_END) == (off_t)size, "another size");
}

static void grow_to(uint32_t end)
{
	if (end > size)
		size = end;
}

/* New bytes for the range, in the model and in the buffer. */
static void make_data(uint32_t offset, uint32_t length)
{
	unsigned char first = (unsigned char)below(256);
	uint32_t i;

	for (i = 0; i < length; i++)
		buffer[i] = (unsigned char)(first + i * 7 + (i >> 8));
	memcpy(model + offset, buffer, length);
}

/* What of the model lies behind the end of the file is always zero. */
static void cut_to(uint32_t end)
{
	if (end < size)
		memset(model + end, 0, size - end);
	size = end;
}

static void do_read(int fd, uint32_t offset, uint32_t length)
{
	uint32_t there = offset >= size ? 0 :
			 length < size - offset ? length : size - offset;

	must(pread(fd, buffer, length, offset) == (ssize_t)there, "pread");
	compare(buffer, offset, there);
}

/*
 * To the block with the end of the file, and no further: where XFS has put off the
 * allocation of what is behind, it says EIO, and on the console `Direct I/O
 * collision with buffered writes!` (iomap_dio_iter() in fs/iomap/direct-io.c).
 */
static void do_direct_read(uint32_t offset, uint32_t length)
{
	uint32_t end = (size + BLOCK - 1) / BLOCK * BLOCK;

	if (offset >= size)
		return;
	do_read(direct, offset, length < end - offset ? length : end - offset);
}

static unsigned char *map(uint32_t offset, uint32_t length, int protection)
{
	uint32_t before = offset % BLOCK;
	unsigned char *at = mmap(NULL, before + length, protection, MAP_SHARED,
				 cached, offset - before);

	must(at != MAP_FAILED, "mmap");
	return at + before;
}

static void unmap(unsigned char *at, uint32_t offset, uint32_t length)
{
	must(!munmap(at - offset % BLOCK, offset % BLOCK + length), "munmap");
}

static void do_mapped_read(uint32_t offset, uint32_t length)
{
	unsigned char *at;

	if (offset >= size)
		return;
	/* The last page is zero behind the end. */
	if (offset + length > size)
		length = (size + BLOCK - 1) / BLOCK * BLOCK - offset;
	at = map(offset, length, PROT_READ);
	compare(at, offset, length);
	unmap(at, offset, length);
}

static void do_mapped_write(uint32_t offset, uint32_t length)
{
	unsigned char *at;

	if (offset + length > size) {
		must(!ftruncate(cached, offset + length), "ftruncate");
		grow_to(offset + length);
	}
	at = map(offset, length, PROT_READ | PROT_WRITE);
	make_data(offset, length);
	memcpy(at, buffer, length);
	if (!below(4))
		must(!msync(at - offset % BLOCK, offset % BLOCK + length,
			    MS_SYNC), "msync");
	unmap(at, offset, length);
}

static void do_write(int fd, uint32_t offset, uint32_t length)
{
	make_data(offset, length);
	must(pwrite(fd, buffer, length, offset) == (ssize_t)length, "pwrite");
	grow_to(offset + length);
}

static void do_zero(uint32_t offset, uint32_t length)
{
	bool keep = below(2);

	must(!fallocate(cached, FALLOC_FL_ZERO_RANGE |
			(keep ? FALLOC_FL_KEEP_SIZE : 0), offset, length),
	     "fallocate, ZERO_RANGE");
	memset(model + offset, 0, length);
	if (!keep)
		grow_to(offset + length);
}

static void do_allocate(uint32_t offset, uint32_t length)
{
	bool keep = below(2);

	must(!fallocate(cached, keep ? FALLOC_FL_KEEP_SIZE : 0, offset, length),
	     "fallocate");
	if (!keep)
		grow_to(offset + length);
}

static void do_collapse(uint32_t offset, uint32_t length)
{
	if (offset + length >= size)
		return;
	must(!fallocate(cached, FALLOC_FL_COLLAPSE_RANGE, offset, length),
	     "fallocate, COLLAPSE_RANGE");
	memmove(model + offset, model + offset + length,
		size - offset - length);
	cut_to(size - length);
}

static void do_insert(uint32_t offset, uint32_t length)
{
	if (offset >= size || size + length > MAX_SIZE)
		return;
	must(!fallocate(cached, FALLOC_FL_INSERT_RANGE, offset, length),
	     "fallocate, INSERT_RANGE");
	memmove(model + offset + length, model + offset, size - offset);
	memset(model + offset, 0, length);
	size += length;
}

static void do_copy(uint32_t offset, uint32_t length)
{
	uint32_t to = below(MAX_SIZE - length);
	off_t in = offset, out = to;

	if (offset + length > size ||
	    (to < offset + length && offset < to + length))
		return;
	memmove(model + to, model + offset, length);
	grow_to(to + length);
	while (length) {
		ssize_t done = copy_file_range(cached, &in, cached, &out,
					       length, 0);

		must(done > 0, "copy_file_range");
		length -= (uint32_t)done;
	}
}

static void do_sync(void)
{
	must(!(below(2) ? fsync(cached) : fdatasync(cached)), "fsync");
}

static void do_reopen(void)
{
	if (below(2)) {
		do_sync();
		posix_fadvise(cached, 0, 0, POSIX_FADV_DONTNEED);
	}
	close_file();
	open_file(0);
}

static void one_step(void)
{
	enum kind kind = (enum kind)below(NR_KINDS);
	uint32_t offset = below(MAX_SIZE - 1);
	uint32_t length = 1 + below(MAX_STEP);

	if (length > MAX_SIZE - offset)
		length = MAX_SIZE - offset;
	if (kind == DIRECT_READ || kind == DIRECT_WRITE || kind == COLLAPSE ||
	    kind == INSERT) {
		offset -= offset % BLOCK;
		length = (length + BLOCK - 1) / BLOCK * BLOCK;
	}
	steps[nr_steps++ % KEPT_STEPS] =
		(struct step){ kind, offset, length, size };
	counts[kind]++;
	switch (kind) {
	case READ:
		do_read(cached, offset, length);
		break;
	case MAPPED_READ:
		do_mapped_read(offset, length);
		break;
	case DIRECT_READ:
		do_direct_read(offset, length);
		break;
	case WRITE:
		do_write(cached, offset, length);
		break;
	case MAPPED_WRITE:
		do_mapped_write(offset, length);
		break;
	case DIRECT_WRITE:
		do_write(direct, offset, length);
		break;
	case TRUNCATE:
		must(!ftruncate(cached, offset), "ftruncate");
		cut_to(offset);
		break;
	case ALLOCATE:
		do_allocate(offset, length);
		break;
	case PUNCH:
		must(!fallocate(cached, FALLOC_FL_PUNCH_HOLE |
				FALLOC_FL_KEEP_SIZE, offset, length),
		     "fallocate, PUNCH_HOLE");
		memset(model + offset, 0, length);
		break;
	case ZERO:
		do_zero(offset, length);
		break;
	case COLLAPSE:
		do_collapse(offset, length);
		break;
	case INSERT:
		do_insert(offset, length);
		break;
	case COPY:
		do_copy(offset, length);
		break;
	case SYNC:
		do_sync();
		break;
	case REOPEN:
		do_reopen();
		break;
	case NR_KINDS:
		break;
	}
	check_size();
}

int main(int argc, char **argv)
{
	struct sigaction action = { .sa_handler = on_signal };
	int kind;

	if (argc != 3) {
		fprintf(stderr, "usage: exerciser FILE SEED\n");
		return 2;
	}
	path = argv[1];
	state = strtoull(argv[2], NULL, 0) * 0x9e3779b97f4a7c15u + 1;
	sigaction(SIGTERM, &action, NULL);
	if (posix_memalign((void **)&buffer, BLOCK, MAX_SIZE))
		return 2;
	open_file(O_CREAT | O_TRUNC);
	while (!over)
		one_step();
	do_read(cached, 0, MAX_SIZE);
	do_reopen();
	do_direct_read(0, MAX_SIZE);
	close_file();
	for (kind = 0; kind < NR_KINDS; kind++)
		printf("%s\"%s\": %llu", kind ? ", " : "{", names[kind],
		       (unsigned long long)counts[kind]);
	printf("}\n");
	return 0;
}
