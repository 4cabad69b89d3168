// SPDX-License-Identifier: Apache-2.0
/*
 * Writers, takers and an oracle on a set of block devices: see docs/stress.md.
 *
 *   stress --seconds N [--seed N] [--takers N] [--pace US]
 *          --device path=NODE[,on=NODE,at=SECTORS][,written=SECTORS][,opaque]
 *                   [,mount=FOLDER,fs=TYPE,file=NAME]...
 *          [--store-device NODE]... [--store-file FILE[,origin=NODE]]...
 *
 * Devices come top down, as the module wants them. One "on" another shares its
 * content and bookkeeping: a partition on its disk, both of which are written;
 * or a mapped device, whose part of the disk nobody may write past it: then
 * only the disk's first sectors are "written". An opaque device is written by
 * whoever lies above it; one with a mounted file system has a stamped file
 * there. The stores' content is lost. Writers rest for up to the pace between two
 * writes at all times, where they would leave others no time.
 *
 * Prints its seed first and a line of JSON last. Exit code 0: nothing found;
 * 1: a violation, which it describes; 2: it could not do its work.
 */
#define _GNU_SOURCE
#include "stress.h"

#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <linux/fiemap.h>
#include <linux/fs.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <time.h>
#include <unistd.h>

/* A quarter of each device is written through the page cache. */
#define CACHED_PART	4
#define FILE_BYTES	(8ull << 20)
/* A write that takes longer hangs; emulated machines are slow. */
#define HUNG_S		180
/* The last steps end within this, or something hangs. */
#ifndef END_S
#define END_S		300
#endif
/* How often it says how far it is. */
#define REPORT_S	20
/* What a writer rests after each write while the last steps end. */
#define LAST_PACE_US	100000

struct world world;

/* Which devices lie on which: resolved when all are there. */
static char below[MAX_DEVICES][PATH_BYTES];
static char origin_names[MAX_STORES][PATH_BYTES];
static uint64_t started_ns;
static uint32_t least_pace_us;

uint64_t tick(void)
{
	return atomic_fetch_add(world.clock, 1) + 1;
}

uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ull + t.tv_nsec;
}

void pause_up_to(struct rng *rng, unsigned int max_us)
{
	if (max_us)
		usleep(rng_below(rng, max_us));
}

void *shared_memory(size_t bytes)
{
	void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
			    MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	if (memory == MAP_FAILED)
		give_up("no memory");
	return memory;
}

void *zeroed(size_t count, size_t bytes)
{
	void *memory = calloc(count, bytes);

	if (!memory)
		give_up("no memory");
	return memory;
}

static void print(const char *format, va_list args)
{
	char line[2048];

	vsnprintf(line, sizeof(line), format, args);
	printf("%7.2f %s\n", (now_ns() - started_ns) / 1e9, line);
}

void say(const char *format, ...)
{
	va_list args;

	va_start(args, format);
	print(format, args);
	va_end(args);
}

void give_up(const char *format, ...)
{
	va_list args;

	va_start(args, format);
	print(format, args);
	va_end(args);
	exit(2);
}

void violation(uint64_t step, const char *format, ...)
{
	char what[1600];
	va_list args;

	/* What follows the first one is mostly its consequence. */
	if (atomic_fetch_add(&world.violations, 1) >= 8)
		return;
	va_start(args, format);
	vsnprintf(what, sizeof(what), format, args);
	va_end(args);
	say("VIOLATION: seed %llu, step %llu: %s",
	    (unsigned long long)world.seed, (unsigned long long)step, what);
}

/* The value of "key=value" if @text is that. */
static const char *value_of(const char *text, const char *key)
{
	size_t len = strlen(key);

	return !strncmp(text, key, len) && text[len] == '=' ? text + len + 1 :
							      NULL;
}

static void add_device(char *spec)
{
	struct device *device = &world.devices[world.nr_devices];
	bool opaque = false;
	uint64_t bytes = 0;
	char *part;

	device->nr_written = NEVER;
	if (world.nr_devices == MAX_DEVICES)
		give_up("too many devices");
	for (part = strtok(spec, ","); part; part = strtok(NULL, ",")) {
		const char *value;

		if ((value = value_of(part, "path")))
			snprintf(device->path, PATH_BYTES, "%s", value);
		else if ((value = value_of(part, "on")))
			snprintf(below[world.nr_devices], PATH_BYTES, "%s",
				 value);
		else if ((value = value_of(part, "at")))
			device->at = strtoull(value, NULL, 10);
		else if ((value = value_of(part, "written")))
			device->nr_written = strtoull(value, NULL, 10);
		else if ((value = value_of(part, "mount")))
			snprintf(device->mount, PATH_BYTES, "%s", value);
		else if ((value = value_of(part, "fs")))
			snprintf(device->fs, sizeof(device->fs), "%s", value);
		else if ((value = value_of(part, "file")))
			snprintf(device->file_name, PATH_BYTES, "%s", value);
		else if (!strcmp(part, "opaque"))
			opaque = true;
		else
			give_up("what is %s?", part);
	}
	device->fd = open(device->path, O_RDONLY | O_CLOEXEC);
	if (device->fd < 0 || ioctl(device->fd, BLKGETSIZE64, &bytes))
		give_up("%s: %s", device->path, strerror(errno));
	device->nr_units = bytes >> UNIT_SHIFT;
	if (device->nr_written > device->nr_units)
		device->nr_written = device->nr_units;
	device->nr_blocks = (bytes + BLOCK_BYTES - 1) / BLOCK_BYTES;
	device->flying = zeroed(device->nr_blocks, sizeof(*device->flying));
	device->last = zeroed(device->nr_blocks, sizeof(*device->last));
	device->written = zeroed(device->nr_blocks, sizeof(*device->written));
	device->history = history_new();
	if (!opaque && !device->mount[0] && !below[world.nr_devices][0])
		device->space = space_new(device->path, device->nr_units);
	world.nr_devices++;
}

static struct device *device_named(const char *path)
{
	uint32_t i;

	for (i = 0; i < world.nr_devices; i++)
		if (!strcmp(world.devices[i].path, path))
			return &world.devices[i];
	give_up("no device %s", path);
}

static void load_extents(struct store *store, int fd)
{
	size_t room = 4096;
	struct fiemap *map = zeroed(1, sizeof(*map) +
				    room * sizeof(struct fiemap_extent));
	uint32_t i;

	map->fm_length = FIEMAP_MAX_OFFSET;
	map->fm_flags = FIEMAP_FLAG_SYNC;
	map->fm_extent_count = room;
	if (ioctl(fd, FS_IOC_FIEMAP, map))
		give_up("%s: FIEMAP: %s", store->path, strerror(errno));
	store->nr_extents = map->fm_mapped_extents;
	store->extents = zeroed(store->nr_extents, sizeof(*store->extents));
	for (i = 0; i < store->nr_extents; i++) {
		store->extents[i].offset = map->fm_extents[i].fe_physical;
		store->extents[i].length = map->fm_extents[i].fe_length;
	}
	free(map);
}

static void add_store(char *spec, bool is_device)
{
	struct store *store = &world.stores[world.nr_stores];
	char *origin = strstr(spec, ",origin=");
	int fd;

	if (world.nr_stores == MAX_STORES)
		give_up("too many stores");
	if (origin) {
		snprintf(origin_names[world.nr_stores], PATH_BYTES, "%s",
			 origin + strlen(",origin="));
		*origin = '\0';
	}
	snprintf(store->path, PATH_BYTES, "%s", spec);
	store->is_device = is_device;
	fd = open(store->path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		give_up("%s: %s", store->path, strerror(errno));
	if (!is_device)
		load_extents(store, fd);
	close(fd);
	world.nr_stores++;
}

static uint32_t sector_units(const struct device *device)
{
	int bytes = 0;

	if (ioctl(device->fd, BLKSSZGET, &bytes) || bytes < (int)UNIT_BYTES)
		give_up("%s: no sector size", device->path);
	return bytes / UNIT_BYTES;
}

static struct target *new_target(const char *path, struct space *space)
{
	struct target *target = &world.targets[world.nr_targets];

	if (world.nr_targets++ == MAX_TARGETS)
		give_up("too many targets");
	snprintf(target->path, sizeof(target->path), "%s", path);
	target->space = space;
	return target;
}

/* Can completions of the device be polled for? Others refuse such writes. */
static bool can_poll(const struct device *device)
{
	char path[PATH_BYTES];
	struct stat stat;
	FILE *file;
	int answer = '0';

	if (fstat(device->fd, &stat))
		return false;
	snprintf(path, sizeof(path), "/sys/dev/block/%u:%u/queue/io_poll",
		 major(stat.st_rdev), minor(stat.st_rdev));
	file = fopen(path, "r");
	if (file) {
		answer = fgetc(file);
		fclose(file);
	}
	return answer == '1';
}

static bool shares_space(const struct device *device)
{
	uint32_t i;

	for (i = 0; i < world.nr_devices; i++)
		if (&world.devices[i] != device &&
		    world.devices[i].space == device->space)
			return true;
	return false;
}

static void add_file(struct device *device)
{
	char path[2 * PATH_BYTES];
	struct target *target;

	snprintf(path, sizeof(path), "%s/%s", device->mount,
		 device->file_name);
	device->file = space_new(path, FILE_BYTES / UNIT_BYTES);
	target = new_target(path, device->file);
	target->nr_units = device->file->nr_units;
	target->nr_direct = target->nr_units / 2;
	target->align = BLOCK_UNITS;
	target->is_file = true;
}

static void add_targets(void)
{
	uint32_t i;

	for (i = 0; i < world.nr_devices; i++) {
		struct device *device = &world.devices[i];

		if (!below[i][0])
			continue;
		device->space = device_named(below[i])->space;
		if (!device->space || device->at + device->nr_units >
				      device->space->nr_units)
			give_up("%s does not lie on %s", device->path,
				below[i]);
	}
	for (i = 0; i < world.nr_devices; i++) {
		struct device *device = &world.devices[i];
		struct target *target;

		if (device->file_name[0])
			add_file(device);
		if (!device->space || !device->nr_written)
			continue;
		target = new_target(device->path, device->space);
		target->at = device->at;
		target->nr_units = device->nr_written;
		target->align = sector_units(device);
		target->can_poll = can_poll(device);
		target->device = device;
		/* Two devices' page caches do not know of each other. */
		target->nr_direct = target->nr_units;
		if (!shares_space(device))
			target->nr_direct -= target->nr_units / CACHED_PART;
		target->nr_direct = target->nr_direct / BLOCK_UNITS *
				    BLOCK_UNITS;
	}
	for (i = 0; i < world.nr_stores; i++)
		if (origin_names[i][0])
			world.stores[i].origin = device_named(origin_names[i]);
}

static void parse(int argc, char **argv)
{
	static const struct option options[] = {
		{ "seed", required_argument, NULL, 's' },
		{ "seconds", required_argument, NULL, 't' },
		{ "takers", required_argument, NULL, 'k' },
		{ "pace", required_argument, NULL, 'p' },
		{ "device", required_argument, NULL, 'd' },
		{ "store-device", required_argument, NULL, 'b' },
		{ "store-file", required_argument, NULL, 'f' },
		{ }
	};
	int option;

	world.seed = time(NULL);
	world.seconds = 60;
	world.nr_takers = 2;
	while ((option = getopt_long(argc, argv, "", options, NULL)) != -1) {
		switch (option) {
		case 's':
			world.seed = strtoull(optarg, NULL, 0);
			break;
		case 't':
			world.seconds = strtoul(optarg, NULL, 10);
			break;
		case 'k':
			world.nr_takers = strtoul(optarg, NULL, 10);
			break;
		case 'p':
			least_pace_us = strtoul(optarg, NULL, 10);
			world.pace_us = least_pace_us;
			break;
		case 'd':
			add_device(optarg);
			break;
		case 'b':
			add_store(optarg, true);
			break;
		case 'f':
			add_store(optarg, false);
			break;
		default:
			give_up("see the head of stress.c");
		}
	}
	if (optind < argc || !world.nr_devices)
		give_up("see the head of stress.c");
	add_targets();
}

/* A write that has not come back says so before the kernel does. */
static void find_hung_writes(void)
{
	uint64_t now = now_ns();
	uint32_t i, j;

	for (i = 0; i < nr_journals; i++) {
		for (j = 0; j < NR_RECORDS; j++) {
			struct record *record = &journals[i]->records[j];
			uint64_t stamp = atomic_load(&record->stamp);
			uint64_t begun = journals[i]->begun_ns[j];

			if (!stamp || atomic_load(&record->completed) ||
			    now < begun + HUNG_S * 1000000000ull ||
			    atomic_load(&record->stamp) != stamp)
				continue;
			violation(0, "a write (%s) to %s at unit %llu has taken %llu s",
				  journals[i]->writer, record->space->name,
				  (unsigned long long)record->first,
				  (unsigned long long)((now - begun) / 1000000000));
			return;
		}
	}
}

/* Quiet times, and storms. */
static void change_pace(struct rng *rng)
{
	static const uint32_t paces[] = { 0, 1000, 5000, 20000, 100000 };

	uint32_t pace = paces[rng_below(rng, sizeof(paces) / sizeof(*paces))];

	world.pace_us = pace > least_pace_us ? pace : least_pace_us;
}

static void wait_for_the_end(void)
{
	uint64_t end = now_ns() + world.seconds * 1000000000ull;
	uint64_t report = now_ns();
	struct rng rng;

	rng_seed(&rng, world.seed, 2, 0);
	while (now_ns() < end && !world.violations) {
		change_pace(&rng);
		usleep(500000 + rng_below(&rng, 1500000));
		find_hung_writes();
		takers_watch();
		if (now_ns() < report)
			continue;
		report += REPORT_S * 1000000000ull;
		say("%llu takes, %llu images, %llu MiB written",
		    (unsigned long long)world.nr_takes,
		    (unsigned long long)world.nr_images,
		    (unsigned long long)world.bytes_written >> 20);
	}
	/* The checks that are under way come to their end sooner. */
	world.pace_us = LAST_PACE_US;
}

/* Everything that was written last is there, whoever held it up meanwhile. */
static void check_origins(void)
{
	struct instant always = { .until = NEVER };
	char *buffer = shared_memory(MAX_WRITE);
	uint32_t i;

	for (i = 0; i < world.nr_targets; i++) {
		struct target *target = &world.targets[i];
		struct view *view = view_begin(target->space);
		int fd = open(target->path, O_RDONLY | O_DIRECT);
		uint64_t first, nr;

		for (first = 0; first < target->nr_units; first += nr) {
			long done;

			nr = target->nr_units - first;
			if (nr > MAX_WRITE / UNIT_BYTES)
				nr = MAX_WRITE / UNIT_BYTES;
			done = read_direct(fd, buffer, nr << UNIT_SHIFT,
					   first << UNIT_SHIFT);
			if (done != (long)(nr << UNIT_SHIFT)) {
				violation(0, "read of %s: %s", target->path,
					  strerror(done < 0 ? -done : EIO));
				break;
			}
			if (!view_check(view, &always, target->path,
					target->at + first, nr, buffer))
				break;
		}
		close(fd);
		view_free(view);
	}
}

static void print_results(void)
{
	struct {
		const char *name;
		uint64_t value;
	} const results[] = {
		{ "steps", world.nr_steps },
		{ "takes", world.nr_takes },
		{ "images", world.nr_images },
		{ "imageBytesRead", world.nr_image_bytes },
		{ "imageBytesReread", world.nr_reread_bytes },
		{ "unitsChecked", world.nr_units_checked },
		{ "filesChecked", world.nr_file_checks },
		{ "fileSystemsChecked", world.nr_fsck },
		{ "stackedBlocksCompared", world.nr_stacked_blocks },
		{ "mapBlocksChecked", world.nr_map_blocks },
		{ "checkpointPairs", world.nr_pairs },
		{ "pairBlocksCompared", world.nr_pair_blocks },
		{ "writes", world.nr_writes },
		{ "bytesWritten", world.bytes_written },
		{ "zeroings", world.nr_zeroes },
		{ "discards", world.nr_discards },
		{ "nowaitRefused", world.nr_nowait_refused },
		{ "slowestWriteMs", world.slowest_write_ns / 1000000 },
		{ "kills", world.nr_kills },
		{ "overflows", world.nr_overflows },
		{ "growths", world.nr_growths },
		{ "lateGrowths", world.nr_late_growths },
		{ "marks", world.nr_marks },
		{ "reattached", world.nr_reattached },
		{ "refused", world.nr_refused },
		{ "unknown", world.nr_unknown },
		{ "violations", world.violations },
	};
	size_t i;

	printf("{\"seed\":%llu,\"seconds\":%u,\"devices\":%u",
	       (unsigned long long)world.seed, world.seconds, world.nr_devices);
	for (i = 0; i < sizeof(results) / sizeof(*results); i++)
		printf(",\"%s\":%llu", results[i].name,
		       (unsigned long long)results[i].value);
	printf("}\n");
}

/* Who is stuck where, in the kernel's words. */
static void show_threads(void)
{
	static const char command[] =
		"for t in /proc/$PPID/task/* $(pgrep -P $PPID | sed s,^,/proc/,); do"
		" echo \"$(cat $t/comm):\"; cat $t/stack; done;"
		" echo w >/proc/sysrq-trigger; dmesg | tail -n 200";

	if (system(command))
		say("no stacks");
}

static void *watch_the_end(void *data)
{
	uint64_t limit = now_ns() + END_S * 1000000000ull;

	(void)data;
	while (now_ns() < limit)
		usleep(500000);
	violation(0, "the end does not come");
	find_hung_writes();
	takers_say();
	show_threads();
	_exit(1);
}

int main(int argc, char **argv)
{
	struct rlimit files = { 65536, 65536 };
	pthread_t watcher;
	uint32_t i;

	started_ns = now_ns();
	setlinebuf(stdout);
	world.clock = shared_memory(sizeof(*world.clock));
	setrlimit(RLIMIT_NOFILE, &files);
	signal(SIGPIPE, SIG_IGN);
	parse(argc, argv);
	say("seed %llu, %u seconds, %u devices, %u stores",
	    (unsigned long long)world.seed, world.seconds, world.nr_devices,
	    world.nr_stores);
	control = open(STILLBLOCK_DEVICE, O_RDWR | O_CLOEXEC);
	if (control < 0)
		give_up("%s: %s", STILLBLOCK_DEVICE, strerror(errno));

	writers_initialise();
	for (i = 0; i < world.nr_devices; i++)
		device_attach(&world.devices[i], 0);
	say("all devices are stamped and tracked");
	writers_start();
	takers_start();
	wait_for_the_end();
	if (pthread_create(&watcher, NULL, watch_the_end, NULL))
		give_up("no thread");
	takers_join();
	writers_join();
	if (!world.violations)
		check_origins();
	for (i = 0; i < world.nr_devices; i++)
		device_detach(&world.devices[i]);
	say("done");
	print_results();
	return world.violations ? 1 : 0;
}
