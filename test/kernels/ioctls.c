// SPDX-License-Identifier: Apache-2.0
/*
 * The module's requests without the product around them, for guests: in
 * milliseconds, with arguments that the product would never pass, and with
 * failures of the kernel's allocations at a chosen call.
 *
 * One command per line on stdin, one answer per line on stdout:
 *
 *   attach PATH [BLOCK_SIZE [IDENTITY]]   "ok ID"
 *   detach ID                        "ok"
 *   keep ID                          "ok": detach, with its history kept
 *   detach all                       "ok COUNT"
 *   mark ID OFFSET LENGTH            "ok"
 *   list                             "ok ID:MAJOR:MINOR:NUMBER:FLAGS:GENERATION:
 *                                    BEGAN:KEPT:BLOCK_SIZE..."
 *   repeat COUNT ID                  "ok": so many snapshots, each ended at once
 *   place device:PATH [format]       "ok SET HELD HISTORY CAPACITY USED"
 *   place device:PATH bootless       the same, with a boot id of zeroes
 *   place file:PATH:DEVICE [format]  the same; the file is held fast
 *   place at:DEVICE:OFFSET+LENGTH[,...]   the same, by what "extents" said
 *   place query, place drop          the same
 *   place refuse                     the same; dropped as one above a device
 *   extents PATH                     "ok OFFSET+LENGTH[,...]"
 *   take NAME [trackers=ID,...] [mounts=PATH,...] [stores=KIND:VALUE,...]
 *        [freeze=MS] [low=BYTES]     "ok IMAGE..."; stores are memory:BYTES,
 *                                    file:PATH and device:PATH
 *   add NAME KIND:VALUE              "ok": one more store
 *   state NAME                       "ok held|failed REASON USED CAPACITY"
 *   event NAME MS                    "ok TYPE VALUE", or "bad ETIMEDOUT"
 *   map NAME INDEX ABOVE             "ok OFFSET:LENGTH...", whole blocks
 *   close NAME, close all            "ok"
 *   sweep PATH                       "ok GOOD EIO OTHER": how many reads of
 *                                    64 KiB of a device had which result, past
 *                                    the page cache and through it
 *   flood PATH COUNT [nowait]        "ok MS": so many writes of a sector submitted
 *                                    at once, each in another chunk than the one
 *                                    before, and how long that took
 *   ebb                              "ok GOOD BAD": all of them have ended
 *   nth N COMMAND                    COMMAND, while the N-th allocation of the
 *                                    kernel for this task fails; "injected" or
 *                                    "untouched" comes before its answer
 *
 * A request that fails is answered with "bad ERRNO REASON CULPRIT", by numbers.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <linux/fiemap.h>
#include <linux/fs.h>
#include <poll.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <linux/stillblock.h>

#define MAX_SNAPSHOTS 64
#define MAX_EXTENTS 1024
#define SWEEP_BYTES (64 << 10)
#define FLOOD_MAX (1 << 17)
#define FLOOD_BYTES 512
#define FLOOD_STRIDE (16 << 10)

struct store {
	struct stillblock_store spec;
	struct stillblock_extent extents[MAX_EXTENTS];
};

struct snapshot {
	char name[32];
	int fd;
};

static struct snapshot snapshots[MAX_SNAPSHOTS];

static int control;
/* The allocation to fail in the next request, 0 for none. */
static unsigned int nth;

static void nth_failed(void)
{
	perror("fail-nth");
	exit(2);
}

/* A request, with one allocation failing if that was asked for. */
static int request(int fd, unsigned long command, void *argument)
{
	int file = -1, result, error;
	char text[16] = "";

	if (nth) {
		/* Opened before and read after: neither allocates then. */
		file = open("/proc/thread-self/fail-nth", O_RDWR | O_CLOEXEC);
		snprintf(text, sizeof(text), "%u", nth);
		if (file < 0 || pwrite(file, text, strlen(text), 0) < 0)
			nth_failed();
	}
	result = ioctl(fd, command, argument);
	error = result < 0 ? errno : 0;
	if (nth) {
		/* What is left of the count may make one of these fail, and is used up then. */
		bool untouched = false;

		memset(text, 0, sizeof(text));
		if (pread(file, text, sizeof(text) - 1, 0) < 0) {
			if (errno != EFAULT)
				nth_failed();
			untouched = true;
		}
		if (pwrite(file, "0", 1, 0) < 0 &&
		    (errno != EFAULT || pwrite(file, "0", 1, 0) < 0))
			nth_failed();
		close(file);
		untouched |= strtoul(text, NULL, 10) != 0;
		printf("%s ", untouched ? "untouched" : "injected");
	}
	return error;
}

static void answer(int error, uint32_t reason, uint32_t culprit)
{
	if (error)
		printf("bad %d %u %u", error, reason, culprit);
	else
		printf("ok");
}

static void attach(const char *path, unsigned int block_size,
		   const char *identity)
{
	struct stillblock_attach args = { .block_size = block_size };
	int error;

	memcpy(args.identity, identity, strlen(identity));
	args.bdev_fd = open(path, O_RDONLY | O_CLOEXEC);
	error = request(control, STILLBLOCK_IOC_ATTACH, &args);
	answer(error, args.reason, 0);
	if (!error)
		printf(" %llu", (unsigned long long)args.tracker);
	if (args.bdev_fd >= 0)
		close(args.bdev_fd);
}

static uint32_t list(struct stillblock_tracker *trackers)
{
	struct stillblock_list args = {
		.trackers = (uintptr_t)trackers,
		.capacity = STILLBLOCK_MAX_TRACKERS,
	};

	if (request(control, STILLBLOCK_IOC_LIST, &args))
		return 0;
	return args.count;
}

static void print_list(void)
{
	struct stillblock_tracker t[STILLBLOCK_MAX_TRACKERS];
	uint32_t i, j, nr = list(t);

	printf("ok");
	for (i = 0; i < nr; i++) {
		printf(" %llu:%u:%u:%u:%x:", (unsigned long long)t[i].tracker,
		       t[i].major, t[i].minor, t[i].number, t[i].flags);
		for (j = 0; j < STILLBLOCK_UUID_SIZE; j++)
			printf("%02x", t[i].generation[j]);
		printf(":%u:%u:%u", t[i].began, t[i].kept, t[i].block_size);
	}
}

static void detach(const char *what)
{
	struct stillblock_tracker t[STILLBLOCK_MAX_TRACKERS];
	struct stillblock_detach args = {};
	uint32_t i, nr;
	int error = 0;

	if (strcmp(what, "all")) {
		args.tracker = strtoull(what, NULL, 10);
		error = request(control, STILLBLOCK_IOC_DETACH, &args);
		answer(error, args.reason, 0);
		return;
	}
	nr = list(t);
	for (i = 0; i < nr && !error; i++) {
		args.tracker = t[i].tracker;
		error = request(control, STILLBLOCK_IOC_DETACH, &args);
	}
	answer(error, args.reason, 0);
	if (!error)
		printf(" %u", nr);
}

static void detach_and_keep(uint64_t tracker)
{
	struct stillblock_detach args = {
		.tracker = tracker,
		.flags = STILLBLOCK_DETACH_KEEP,
	};
	int error = request(control, STILLBLOCK_IOC_DETACH, &args);

	answer(error, args.reason, 0);
}

static void mark(uint64_t tracker, uint64_t offset, uint64_t length)
{
	struct stillblock_mark args = {
		.tracker = tracker,
		.offset = offset,
		.length = length,
	};
	int error = request(control, STILLBLOCK_IOC_MARK, &args);

	answer(error, args.reason, 0);
}

static int read_extents(struct store *store)
{
	static char bytes[sizeof(struct fiemap) +
			  MAX_EXTENTS * sizeof(struct fiemap_extent)];
	struct fiemap *map = (void *)bytes;
	uint32_t i;

	memset(bytes, 0, sizeof(bytes));
	map->fm_length = FIEMAP_MAX_OFFSET;
	map->fm_flags = FIEMAP_FLAG_SYNC;
	map->fm_extent_count = MAX_EXTENTS;
	if (ioctl(store->spec.file_fd, FS_IOC_FIEMAP, map))
		return errno;
	for (i = 0; i < map->fm_mapped_extents; i++) {
		store->extents[i].offset = map->fm_extents[i].fe_physical;
		store->extents[i].length = map->fm_extents[i].fe_length;
	}
	store->spec.nr_extents = map->fm_mapped_extents;
	return 0;
}

/* KIND:VALUE */
static int open_store(struct store *store, const char *text)
{
	const char *value = strchr(text, ':');

	memset(store, 0, sizeof(*store));
	store->spec.file_fd = -1;
	if (!value++)
		return EINVAL;
	if (!strncmp(text, "memory:", 7)) {
		store->spec.kind = STILLBLOCK_STORE_MEMORY;
		store->spec.limit = strtoull(value, NULL, 10);
		return 0;
	}
	store->spec.file_fd = open(value, O_RDWR | O_CLOEXEC);
	if (store->spec.file_fd < 0)
		return errno;
	if (!strncmp(text, "device:", 7)) {
		store->spec.kind = STILLBLOCK_STORE_DEVICE;
		return 0;
	}
	store->spec.kind = STILLBLOCK_STORE_FILE;
	store->spec.extents = (uintptr_t)store->extents;
	return read_extents(store);
}

static void close_store(struct store *store)
{
	if (store->spec.file_fd >= 0)
		close(store->spec.file_fd);
}

/* Extents of a file, written as read_written_extents() reads them. */
static void print_extents(const char *path)
{
	static struct store store;
	int error = EBADF;
	uint32_t i;

	store.spec.file_fd = open(path, O_RDONLY | O_CLOEXEC);
	if (store.spec.file_fd >= 0) {
		error = read_extents(&store);
		close(store.spec.file_fd);
	}
	answer(error, 0, 0);
	for (i = 0; !error && i < store.spec.nr_extents; i++)
		printf("%c%llu+%llu", i ? ',' : ' ',
		       (unsigned long long)store.extents[i].offset,
		       (unsigned long long)store.extents[i].length);
}

static void read_written_extents(struct store *store, const char *text)
{
	unsigned long long offset, length;
	int used;

	while (store->spec.nr_extents < MAX_EXTENTS &&
	       sscanf(text, "%llu+%llu%n", &offset, &length, &used) == 2) {
		struct stillblock_extent *e =
			&store->extents[store->spec.nr_extents++];

		e->offset = offset;
		e->length = length;
		text += used + (text[used] == ',');
	}
}

/* KIND:PATH[:DEVICE] */
static void place(char *text, const char *how)
{
	static struct store store;
	struct stillblock_place args = { .bdev_fd = -1, .file_fd = -1 };
	char *path = strchr(text, ':');
	char *device = path ? strchr(path + 1, ':') : NULL;
	int file = -1, error = 0;

	if (!strcmp(how, "format"))
		args.flags = STILLBLOCK_PLACE_FORMAT;
	file = open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC);
	if (file < 0 || read(file, args.boot_id, sizeof(args.boot_id)) < 0)
		exit(2);
	close(file);
	if (!strcmp(how, "bootless"))
		memset(args.boot_id, 0, sizeof(args.boot_id));
	memset(&store, 0, sizeof(store));
	store.spec.file_fd = -1;
	if (!strcmp(text, "query")) {
		args.flags = STILLBLOCK_PLACE_QUERY;
	} else if (!strcmp(text, "drop")) {
		args.flags = STILLBLOCK_PLACE_DROP;
	} else if (!strcmp(text, "refuse")) {
		args.flags = STILLBLOCK_PLACE_DROP;
		args.history = STILLBLOCK_HISTORY_PLACE_ABOVE;
	} else if (device && !strncmp(text, "at:", 3)) {
		*device++ = '\0';
		args.bdev_fd = open(path + 1, O_RDONLY | O_CLOEXEC);
		read_written_extents(&store, device);
		args.extents = (uintptr_t)store.extents;
		args.nr_extents = store.spec.nr_extents;
	} else if (device) {
		*device++ = '\0';
		args.bdev_fd = open(device, O_RDONLY | O_CLOEXEC);
		store.spec.file_fd = open(path + 1, O_RDWR | O_CLOEXEC);
		error = read_extents(&store);
		args.extents = (uintptr_t)store.extents;
		args.nr_extents = store.spec.nr_extents;
		args.file_fd = store.spec.file_fd;
	} else if (path) {
		args.bdev_fd = open(path + 1, O_RDONLY | O_CLOEXEC);
	}
	if (!error)
		error = request(control, STILLBLOCK_IOC_PLACE, &args);
	answer(error, args.reason, args.history);
	if (!error)
		printf(" %d %d %u %llu %llu",
		       !!(args.flags & STILLBLOCK_PLACE_SET),
		       !!(args.flags & STILLBLOCK_PLACE_HELD), args.history,
		       (unsigned long long)args.capacity,
		       (unsigned long long)args.used);
	if (args.bdev_fd >= 0)
		close(args.bdev_fd);
	if (store.spec.file_fd >= 0)
		close(store.spec.file_fd);
}

static struct snapshot *find(const char *name)
{
	unsigned int i;

	for (i = 0; i < MAX_SNAPSHOTS; i++)
		if (snapshots[i].name[0] && !strcmp(snapshots[i].name, name))
			return &snapshots[i];
	return NULL;
}

static void keep(const char *name, int fd)
{
	unsigned int i = 0;

	while (i < MAX_SNAPSHOTS - 1 && snapshots[i].name[0])
		i++;
	snprintf(snapshots[i].name, sizeof(snapshots[i].name), "%s", name);
	snapshots[i].fd = fd;
}

static void print_images(int fd, uint32_t nr)
{
	uint32_t i;

	for (i = 0; i < nr; i++) {
		struct stillblock_image image = { .index = i };

		if (!ioctl(fd, STILLBLOCK_SNAP_IOC_IMAGE, &image))
			printf(" %s", image.disk_name);
	}
}

/* Which list an argument of "take" belongs to is known by its key. */
static void take(char *words)
{
	static struct store stores[STILLBLOCK_MAX_STORES];
	static struct stillblock_store specs[STILLBLOCK_MAX_STORES];
	uint64_t trackers[STILLBLOCK_MAX_TRACKERS];
	int32_t mounts[STILLBLOCK_MAX_MOUNTS];
	struct stillblock_take args = {
		.trackers = (uintptr_t)trackers,
		.mounts = (uintptr_t)mounts,
		.stores = (uintptr_t)specs,
	};
	char *word, *name = strtok_r(words, " ", &words);
	int error = name ? 0 : EINVAL;
	uint32_t i;

	while ((word = strtok_r(words, " ", &words))) {
		char *value = strchr(word, '=');
		char *item;

		if (!value)
			continue;
		*value++ = '\0';
		if (!strcmp(word, "freeze"))
			args.freeze_timeout_ms = strtoul(value, NULL, 10);
		else if (!strcmp(word, "low"))
			args.low_watermark = strtoull(value, NULL, 10);
		else
			while ((item = strtok_r(value, ",", &value)) &&
			       !error) {
				if (!strcmp(word, "trackers"))
					trackers[args.nr_trackers++] =
						strtoull(item, NULL, 10);
				else if (!strcmp(word, "mounts"))
					mounts[args.nr_mounts++] =
						open(item, O_RDONLY | O_CLOEXEC);
				else
					error = open_store(&stores[args.nr_stores++],
							   item);
			}
	}
	for (i = 0; i < args.nr_stores; i++)
		specs[i] = stores[i].spec;
	if (!error)
		error = request(control, STILLBLOCK_IOC_TAKE, &args);
	for (i = 0; i < args.nr_stores; i++)
		close_store(&stores[i]);
	for (i = 0; i < args.nr_mounts; i++)
		close(mounts[i]);
	answer(error, args.reason, args.culprit);
	if (!error) {
		keep(name, args.snapshot_fd);
		print_images(args.snapshot_fd, args.nr_trackers);
	}
}

static void repeat(unsigned int count, uint64_t tracker)
{
	struct stillblock_store store = {
		.kind = STILLBLOCK_STORE_MEMORY,
		.file_fd = -1,
		.limit = 1 << 20,
	};
	struct stillblock_take args = {
		.trackers = (uintptr_t)&tracker,
		.stores = (uintptr_t)&store,
		.nr_trackers = 1,
		.nr_stores = 1,
	};
	int error = 0;

	while (count-- && !error) {
		error = request(control, STILLBLOCK_IOC_TAKE, &args);
		if (!error)
			close(args.snapshot_fd);
	}
	answer(error, args.reason, args.culprit);
}

static void add(int fd, const char *text)
{
	static struct store store;
	struct stillblock_add_store args = {};
	int error = open_store(&store, text);

	args.store = store.spec;
	if (!error)
		error = request(fd, STILLBLOCK_SNAP_IOC_ADD_STORE, &args);
	close_store(&store);
	answer(error, args.reason, 0);
}

static void state(int fd)
{
	struct stillblock_state args = {};
	int error = request(fd, STILLBLOCK_SNAP_IOC_STATE, &args);

	answer(error, 0, 0);
	if (!error)
		printf(" %s %u %llu %llu",
		       args.state == STILLBLOCK_STATE_HELD ? "held" : "failed",
		       args.reason, (unsigned long long)args.store_used,
		       (unsigned long long)args.store_capacity);
}

static void event(int fd, int ms)
{
	struct pollfd wanted = { .fd = fd, .events = POLLIN };
	struct stillblock_event args;
	int ready = poll(&wanted, 1, ms);

	if (ready == 0)
		answer(ETIMEDOUT, 0, 0);
	else if (ready < 0 || read(fd, &args, sizeof(args)) < 0)
		answer(errno, 0, 0);
	else
		printf("ok %u %llu", args.type,
		       (unsigned long long)args.value);
}

static void map(int fd, uint32_t index, uint32_t above)
{
	struct stillblock_image image = { .index = index };
	struct stillblock_map args = { .index = index };
	int error = ioctl(fd, STILLBLOCK_SNAP_IOC_IMAGE, &image) ? errno : 0;
	uint64_t block, first;
	uint8_t *numbers = NULL;

	if (!error) {
		numbers = calloc(image.nr_blocks + 1, 1);
		args.nr_blocks = image.nr_blocks;
		args.buffer = (uintptr_t)numbers;
		error = request(fd, STILLBLOCK_SNAP_IOC_MAP, &args);
	}
	answer(error, 0, 0);
	for (block = 0; !error && block < image.nr_blocks; block++) {
		if (numbers[block] <= above)
			continue;
		first = block;
		while (block < image.nr_blocks && numbers[block] > above)
			block++;
		printf(" %llu:%llu",
		       (unsigned long long)first * image.block_size,
		       (unsigned long long)(block - first) * image.block_size);
	}
	free(numbers);
}

static void close_all(void)
{
	unsigned int i;

	for (i = 0; i < MAX_SNAPSHOTS; i++) {
		if (snapshots[i].name[0])
			close(snapshots[i].fd);
		snapshots[i].name[0] = '\0';
	}
	answer(0, 0, 0);
}

/* Adds up the results of reading all of a device: good ones, EIO, others. */
static void read_device(const char *path, int flags, unsigned int counts[3])
{
	int fd = open(path, O_RDONLY | O_CLOEXEC | flags);
	off_t at, size = fd < 0 ? 0 : lseek(fd, 0, SEEK_END);
	void *buffer;

	if (posix_memalign(&buffer, 4096, SWEEP_BYTES))
		exit(2);
	for (at = 0; at < size; at += SWEEP_BYTES) {
		ssize_t got = pread(fd, buffer, SWEEP_BYTES, at);

		counts[got >= 0 ? 0 : errno == EIO ? 1 : 2]++;
	}
	if (!size)
		counts[2]++;
	free(buffer);
	if (fd >= 0)
		close(fd);
}

static void sweep(const char *path)
{
	unsigned int counts[3] = {};

	read_device(path, O_DIRECT, counts);
	read_device(path, 0, counts);
	printf("ok %u %u %u", counts[0], counts[1], counts[2]);
}

static aio_context_t flood_context;
static int flood_file = -1;
static unsigned int flood_count;

static int64_t now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000ll + now.tv_nsec / 1000000;
}

static void flood(const char *path, unsigned int count, bool nowait)
{
	static void *buffer;
	int64_t begin;
	off_t size;

	if (flood_file < 0) {
		flood_file = open(path, O_WRONLY | O_DIRECT | O_CLOEXEC);
		if (flood_file < 0 || posix_memalign(&buffer, 4096, 4096) ||
		    syscall(SYS_io_setup, FLOOD_MAX, &flood_context))
			exit(2);
	}
	size = lseek(flood_file, 0, SEEK_END);
	begin = now_ms();
	while (count--) {
		struct iocb block = {
			.aio_fildes = flood_file,
			.aio_lio_opcode = IOCB_CMD_PWRITE,
			.aio_rw_flags = nowait ? RWF_NOWAIT : 0,
			.aio_buf = (uintptr_t)buffer,
			.aio_nbytes = FLOOD_BYTES,
			.aio_offset = (off_t)flood_count * FLOOD_STRIDE % size,
		};
		struct iocb *blocks = &block;

		if (syscall(SYS_io_submit, flood_context, 1, &blocks) != 1) {
			answer(errno, 0, 0);
			return;
		}
		flood_count++;
	}
	printf("ok %lld", (long long)(now_ms() - begin));
}

static void ebb(void)
{
	unsigned int counts[2] = {};
	struct io_event events[256];

	while (flood_count) {
		long i, got = syscall(SYS_io_getevents, flood_context, 1,
				      sizeof(events) / sizeof(*events), events,
				      NULL);

		if (got < 1)
			exit(2);
		for (i = 0; i < got; i++)
			counts[events[i].res != FLOOD_BYTES]++;
		flood_count -= got;
	}
	if (flood_file >= 0) {
		syscall(SYS_io_destroy, flood_context);
		close(flood_file);
	}
	flood_file = -1;
	flood_context = 0;
	printf("ok %u %u", counts[0], counts[1]);
}

static void serve_snapshot(const char *verb, char *line)
{
	char name[32] = "", text[256] = "";
	unsigned int a = 0, b = 0;
	struct snapshot *s;

	sscanf(line, "%*s %31s", name);
	s = find(name);
	if (!s)
		answer(ENOENT, 0, 0);
	else if (!strcmp(verb, "state"))
		state(s->fd);
	else if (sscanf(line, "event %*s %u", &a) == 1)
		event(s->fd, a);
	else if (sscanf(line, "map %*s %u %u", &a, &b) == 2)
		map(s->fd, a, b);
	else if (sscanf(line, "add %*s %255s", text) == 1)
		add(s->fd, text);
	else if (!strcmp(verb, "close")) {
		close(s->fd);
		s->name[0] = '\0';
		answer(0, 0, 0);
	} else {
		answer(EINVAL, 0, 0);
	}
}

static void serve(char *line)
{
	unsigned long long id = 0, offset = 0, length = 0;
	char verb[16] = "", path[256] = "", word[192] = "";
	unsigned int number = 0;
	int rest = 0;

	nth = 0;
	if (sscanf(line, "nth %u %n", &nth, &rest) == 1)
		line += rest;
	sscanf(line, "%15s", verb);
	if (sscanf(line, "attach %255s %u %191s", path, &number, word) >= 1)
		attach(path, number, word);
	else if (sscanf(line, "keep %llu", &id) == 1)
		detach_and_keep(id);
	else if (sscanf(line, "extents %255s", path) == 1)
		print_extents(path);
	else if (sscanf(line, "place %255s %15s", path, word) >= 1)
		place(path, word);
	else if (sscanf(line, "detach %255s", path) == 1)
		detach(path);
	else if (sscanf(line, "mark %llu %llu %llu", &id, &offset, &length) == 3)
		mark(id, offset, length);
	else if (!strcmp(verb, "list"))
		print_list();
	else if (sscanf(line, "flood %255s %u %15s", path, &number, word) >= 2)
		flood(path, number, !strcmp(word, "nowait"));
	else if (!strcmp(line, "ebb"))
		ebb();
	else if (sscanf(line, "repeat %u %llu", &number, &id) == 2)
		repeat(number, id);
	else if (!strcmp(line, "close all"))
		close_all();
	else if (sscanf(line, "sweep %255s", path) == 1)
		sweep(path);
	else if (!strcmp(verb, "take"))
		take(line + strlen("take "));
	else
		serve_snapshot(verb, line);
	putchar('\n');
	fflush(stdout);
}

int main(void)
{
	char *line = NULL;
	size_t size = 0;

	while (getline(&line, &size, stdin) > 0) {
		line[strcspn(line, "\n")] = '\0';
		/* For no longer than a command: the module could not be unloaded. */
		control = open(STILLBLOCK_DEVICE, O_RDWR | O_CLOEXEC);
		serve(line);
		close(control);
	}
	free(line);
	return 0;
}
