// SPDX-License-Identifier: Apache-2.0
/*
 * Reads or writes pieces of devices, one at a time and directly, in turn: the
 * same piece of each device, then the next piece. So whatever disturbs the
 * machine meanwhile disturbs all of them alike. Under QEMU's -icount the guest's
 * clock counts instructions.
 *
 *   accesses read|write BYTES START STRIDE COUNT SEED DEVICE...
 *
 * The COUNT pieces of BYTES lie STRIDE bytes apart, from START on, and are taken
 * in an order that SEED alone decides. Prints one line of JSON, an array of what
 * each device took, in nanoseconds.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define ALIGNMENT 4096
#define MAX_DEVICES 16

struct device {
	int fd;
	uint64_t total;
	uint64_t *took;
};

static uint64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static uint64_t next_random(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state;
}

static int compare(const void *a, const void *b)
{
	const uint64_t left = *(const uint64_t *)a, right = *(const uint64_t *)b;

	return left < right ? -1 : left > right;
}

static int fail(const char *what)
{
	fprintf(stderr, "accesses: %s: %s\n", what, strerror(errno));
	return 1;
}

int main(int argc, char **argv)
{
	struct device devices[MAX_DEVICES];
	uint64_t bytes, start, stride, count, seed, i;
	int nr = argc - 7, d;
	uint64_t *order;
	void *piece;
	bool reads;

	if (nr < 1 || nr > MAX_DEVICES ||
	    (strcmp(argv[1], "read") && strcmp(argv[1], "write"))) {
		fprintf(stderr, "usage: accesses read|write BYTES START STRIDE COUNT SEED DEVICE...\n");
		return 2;
	}
	reads = !strcmp(argv[1], "read");
	bytes = strtoull(argv[2], NULL, 0);
	start = strtoull(argv[3], NULL, 0);
	stride = strtoull(argv[4], NULL, 0);
	count = strtoull(argv[5], NULL, 0);
	seed = strtoull(argv[6], NULL, 0) * 2654435761u + 1;
	order = calloc(count, sizeof(*order));
	if (!order || posix_memalign(&piece, ALIGNMENT, bytes))
		return fail("memory");
	for (d = 0; d < nr; d++) {
		devices[d].total = 0;
		devices[d].took = calloc(count, sizeof(*devices[d].took));
		if (!devices[d].took)
			return fail("memory");
		devices[d].fd = open(argv[7 + d], (reads ? O_RDONLY : O_WRONLY) | O_DIRECT);
		if (devices[d].fd < 0)
			return fail(argv[7 + d]);
	}
	memset(piece, (int)seed, bytes);
	for (i = 0; i < count; i++)
		order[i] = i;
	for (i = count; i > 1; i--) {
		uint64_t j = next_random(&seed) % i, swap = order[j];

		order[j] = order[i - 1];
		order[i - 1] = swap;
	}
	for (i = 0; i < count; i++) {
		off_t at = (off_t)(start + order[i] * stride);

		/* Each is the first of a turn as often as the others. */
		for (d = 0; d < nr; d++) {
			struct device *device = &devices[(i + (uint64_t)d) % (uint64_t)nr];
			uint64_t begin = now();
			ssize_t done = reads ? pread(device->fd, piece, bytes, at) :
					       pwrite(device->fd, piece, bytes, at);

			if (done != (ssize_t)bytes)
				return fail(reads ? "pread" : "pwrite");
			device->took[i] = now() - begin;
			device->total += device->took[i];
		}
	}
	for (d = 0; d < nr; d++) {
		uint64_t *took = devices[d].took;

		qsort(took, count, sizeof(*took), compare);
		printf("%s{\"count\": %llu, \"mean\": %llu, \"p50\": %llu, \"p99\": %llu}",
		       d ? ", " : "[", (unsigned long long)count,
		       (unsigned long long)(devices[d].total / count),
		       (unsigned long long)took[count / 2],
		       (unsigned long long)took[count * 99 / 100]);
	}
	printf("]\n");
	return 0;
}
