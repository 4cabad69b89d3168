// SPDX-License-Identifier: Apache-2.0
/*
 * Writes 4 KiB blocks of a device, one at a time and directly, and says how long
 * they took. Under QEMU's -icount the guest's clock counts instructions.
 *
 *   writes DEVICE STRIDE COUNT SEED
 *
 * The COUNT blocks lie STRIDE bytes apart, from the device's start, and are
 * written in an order that SEED alone decides. Prints one line of JSON, times in
 * nanoseconds.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define BLOCK 4096

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
	fprintf(stderr, "writes: %s: %s\n", what, strerror(errno));
	return 1;
}

int main(int argc, char **argv)
{
	uint64_t stride, count, seed, i, begin, total;
	uint64_t *order, *took;
	void *block;
	int fd;

	if (argc != 5) {
		fprintf(stderr, "usage: writes DEVICE STRIDE COUNT SEED\n");
		return 2;
	}
	stride = strtoull(argv[2], NULL, 0);
	count = strtoull(argv[3], NULL, 0);
	seed = strtoull(argv[4], NULL, 0) * 2654435761u + 1;
	fd = open(argv[1], O_WRONLY | O_DIRECT);
	if (fd < 0)
		return fail(argv[1]);
	order = calloc(count, sizeof(*order));
	took = calloc(count, sizeof(*took));
	if (!order || !took || posix_memalign(&block, BLOCK, BLOCK))
		return fail("memory");
	memset(block, (int)seed, BLOCK);
	for (i = 0; i < count; i++)
		order[i] = i;
	for (i = count; i > 1; i--) {
		uint64_t j = next_random(&seed) % i, swap = order[j];

		order[j] = order[i - 1];
		order[i - 1] = swap;
	}
	begin = now();
	for (i = 0; i < count; i++) {
		uint64_t start = now();

		if (pwrite(fd, block, BLOCK, (off_t)(order[i] * stride)) != BLOCK)
			return fail("pwrite");
		took[i] = now() - start;
	}
	total = now() - begin;
	qsort(took, count, sizeof(*took), compare);
	printf("{\"count\": %llu, \"mean\": %llu, \"p50\": %llu, \"p99\": %llu}\n",
	       (unsigned long long)count, (unsigned long long)(total / count),
	       (unsigned long long)took[count / 2],
	       (unsigned long long)took[count * 99 / 100]);
	return 0;
}
