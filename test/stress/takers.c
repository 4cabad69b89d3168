// SPDX-License-Identifier: Apache-2.0
/*
 * The takers: each step of one of them is the life of a snapshot, from the
 * choice of devices and stores to its end, with all that is checked in it.
 */
#define _GNU_SOURCE
#include "stress.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#define MAX_TAKERS	4
#define MAX_PIECE	(1u << 20)
#define KEPT_IMAGES	6
#define MIB		(1ull << 20)
#define MS		1000000ull
/* A taker that does one thing for longer says so. */
#define SLOW_S		20

/* What is kept of an image: hashes of its 4 KiB blocks, 0 where not known. */
struct kept_image {
	uint64_t step;
	uint8_t generation[STILLBLOCK_UUID_SIZE];
	uint32_t number;
	uint64_t *hashes;
};

/* A take of the generation: it ended the epoch @number. */
struct kept_take {
	uint32_t number;
	uint64_t before;
	uint64_t after;
};

/**
 * struct history - what earlier takes of a device tell about its change map
 * @known: @generation is
 * @generation: the map's
 * @from_before: the generation began after this
 * @from_after: and before this
 * @takes: of the generation, by number
 * @nr_unseen: takes whose owner was killed before it could tell the number
 * @images: the newest ones, of any generation, in a ring
 */
struct history {
	bool known;
	uint8_t generation[STILLBLOCK_UUID_SIZE];
	uint64_t from_before;
	uint64_t from_after;
	struct kept_take takes[STILLBLOCK_MAX_NUMBER];
	uint32_t nr_takes;
	uint32_t nr_unseen;
	struct kept_image images[KEPT_IMAGES];
	uint64_t nr_images;
};

enum plan {
	PLAN_AMPLE,		/* room for everything from the start */
	PLAN_GROW,		/* little room, more at the low watermark */
	PLAN_OVERFLOW,		/* too little room */
};

/* An image of the step's snapshot. */
struct taken_image {
	struct device *device;
	struct view *view;
	char name[STILLBLOCK_NAME_SIZE + 8];
	int fd;
	uint64_t *hashes;
	uint64_t *written_before;
	uint64_t *last_after;	/* NEVER where a write was under way */
};

struct taker {
	pthread_t thread;
	uint32_t index;
	struct rng rng;
	uint64_t step;
	enum plan plan;
	uint64_t kill_at_ns;
	bool alive;		/* the owner is */
	bool failed;		/* the snapshot is */
	bool known;		/* what the images may hold is */
	struct owner *owner;
	struct taken_image images[MAX_DEVICES];
	uint32_t nr_images;
	struct view *views[2 * MAX_DEVICES];
	uint32_t nr_views;
	struct store *stores[MAX_STORES];
	uint32_t nr_stores;
	const char *doing;
	_Atomic uint64_t since_ns;
	bool reported;
	struct instant instant;
	uint64_t numbers[MAX_WRITERS];
	char *buffer;
	char *other_buffer;
};

int control = -1;

static struct taker takers[MAX_TAKERS];
static pthread_mutex_t claims = PTHREAD_MUTEX_INITIALIZER;

/* What a taker does, for those who wonder why it takes so long. */
static void doing(struct taker *taker, const char *what)
{
	taker->doing = what;
	taker->since_ns = now_ns();
	taker->reported = false;
}

static void taker_say(struct taker *taker)
{
	char line[512];
	size_t len = 0;
	uint32_t i;

	for (i = 0; i < taker->nr_images && len < sizeof(line) - PATH_BYTES; i++)
		len += snprintf(line + len, sizeof(line) - len, " %s",
				taker->images[i].device->path);
	say("step %llu: %s for %llu s with%s", (unsigned long long)taker->step,
	    taker->doing,
	    (unsigned long long)((now_ns() - taker->since_ns) / 1000000000),
	    line);
}

void takers_say(void)
{
	uint32_t i;

	for (i = 0; i < world.nr_takers; i++)
		if (takers[i].doing)
			taker_say(&takers[i]);
}

void takers_watch(void)
{
	uint32_t i;

	for (i = 0; i < world.nr_takers; i++) {
		struct taker *taker = &takers[i];

		if (!taker->doing || taker->reported ||
		    now_ns() < taker->since_ns + SLOW_S * 1000000000ull)
			continue;
		taker->reported = true;
		taker_say(taker);
	}
}

/* Attaching */

struct history *history_new(void)
{
	return zeroed(1, sizeof(struct history));
}

void device_attach(struct device *device, uint32_t block_bytes)
{
	struct stillblock_attach args = {
		.bdev_fd = device->fd, .block_size = block_bytes,
	};

	device->attached_before = tick();
	if (ioctl(control, STILLBLOCK_IOC_ATTACH, &args))
		give_up("attach %s: %s, reason %u", device->path,
			strerror(errno), args.reason);
	device->attached_after = tick();
	device->tracker = args.tracker;
	device->history->known = false;
	device->history->nr_takes = 0;
	device->history->nr_unseen = 0;
	device->history->from_before = device->attached_before;
	device->history->from_after = device->attached_after;
}

void device_detach(struct device *device)
{
	struct stillblock_detach args = { .tracker = device->tracker };

	if (ioctl(control, STILLBLOCK_IOC_DETACH, &args))
		violation(0, "detach %s: %s, reason %u", device->path,
			  strerror(errno), args.reason);
}

static uint32_t random_block_bytes(struct rng *rng)
{
	static const uint32_t sizes[] = { 0, 0, 4096, 16384, 65536, 262144 };

	return sizes[rng_below(rng, sizeof(sizes) / sizeof(*sizes))];
}

static void mark_somewhere(struct taker *taker, struct device *device)
{
	uint64_t first = rng_below(&taker->rng, device->nr_blocks - 1);
	uint64_t nr = 1 + rng_below(&taker->rng, 8), stamp;
	struct stillblock_mark args = { .tracker = device->tracker };

	if (first + nr >= device->nr_blocks)
		nr = device->nr_blocks - 1 - first;
	if (!nr)
		return;
	args.offset = first * BLOCK_BYTES + rng_below(&taker->rng, BLOCK_BYTES);
	args.length = nr * BLOCK_BYTES - args.offset % BLOCK_BYTES;
	stamp = touch_begin(device, first, nr);
	if (ioctl(control, STILLBLOCK_IOC_MARK, &args))
		violation(taker->step, "mark %s: %s, reason %u", device->path,
			  strerror(errno), args.reason);
	touch_end(device, first, nr, stamp);
	atomic_fetch_add(&world.nr_marks, 1);
}

/* Choosing */

static uint32_t choose_count(struct rng *rng)
{
	uint64_t kind = rng_below(rng, 100);

	if (kind < 35)
		return 1;
	if (kind < 80)
		return 2 + rng_below(rng, 3);
	return world.nr_devices;
}

/* Claims devices that nobody has taken; they come in the world's order. */
static void claim_devices(struct taker *taker)
{
	uint32_t wanted = choose_count(&taker->rng), left, i;
	bool chosen[MAX_DEVICES] = {};

	pthread_mutex_lock(&claims);
	for (left = world.nr_devices; left && wanted; left--) {
		uint32_t nth = rng_below(&taker->rng, left);

		for (i = 0; i < world.nr_devices; i++)
			if (!chosen[i] && !nth--)
				break;
		chosen[i] = true;
		if (!world.devices[i].taken)
			wanted--;
	}
	taker->nr_images = 0;
	for (i = 0; i < world.nr_devices; i++) {
		struct taken_image *image = &taker->images[taker->nr_images];

		if (!chosen[i] || world.devices[i].taken)
			continue;
		memset(image, 0, sizeof(*image));
		image->device = &world.devices[i];
		image->device->taken = true;
		image->fd = -1;
		taker->nr_images++;
	}
	pthread_mutex_unlock(&claims);
}

static void release_claims(struct taker *taker)
{
	uint32_t i;

	pthread_mutex_lock(&claims);
	for (i = 0; i < taker->nr_images; i++)
		taker->images[i].device->taken = false;
	for (i = 0; i < taker->nr_stores; i++)
		taker->stores[i]->taken = false;
	pthread_mutex_unlock(&claims);
	taker->nr_stores = 0;
}

static struct taken_image *image_of(struct taker *taker, struct device *device)
{
	uint32_t i;

	for (i = 0; i < taker->nr_images; i++)
		if (taker->images[i].device == device)
			return &taker->images[i];
	return NULL;
}

/* A store that is free and may serve this snapshot, or NULL. */
static struct store *claim_store(struct taker *taker, bool growth)
{
	struct store *found = NULL;
	uint32_t start, i;

	if (!world.nr_stores)
		return NULL;
	start = rng_below(&taker->rng, world.nr_stores);
	pthread_mutex_lock(&claims);
	for (i = 0; i < world.nr_stores && !found; i++) {
		struct store *store =
			&world.stores[(start + i) % world.nr_stores];

		if (store->taken)
			continue;
		if (store->origin &&
		    (growth || !image_of(taker, store->origin)))
			continue;
		found = store;
		found->taken = true;
	}
	pthread_mutex_unlock(&claims);
	if (found)
		taker->stores[taker->nr_stores++] = found;
	return found;
}

static void add_store(struct taker *taker, struct store *claimed)
{
	struct stillblock_store store = {
		.kind = claimed->is_device ? STILLBLOCK_STORE_DEVICE :
					     STILLBLOCK_STORE_FILE,
		.nr_extents = claimed->nr_extents,
	};

	store.file_fd = open(claimed->path, O_RDWR | O_CLOEXEC);
	if (store.file_fd < 0)
		give_up("%s: %s", claimed->path, strerror(errno));
	if (!owner_add_piece(taker->owner, store, claimed->extents))
		give_up("%s has too many extents", claimed->path);
}

static void add_memory(struct taker *taker, uint64_t bytes)
{
	struct stillblock_store store = {
		.kind = STILLBLOCK_STORE_MEMORY, .file_fd = -1, .limit = bytes,
	};

	owner_add_piece(taker->owner, store, NULL);
}

/* Room for everything that can be overwritten, and for rounding. */
static uint64_t ample_bytes(struct taker *taker)
{
	uint64_t bytes = 16 * MIB;
	uint32_t i;

	for (i = 0; i < taker->nr_images; i++)
		bytes += taker->images[i].device->nr_units << UNIT_SHIFT;
	return bytes;
}

static void plan_ample(struct taker *taker)
{
	uint64_t nr = rng_below(&taker->rng, 4), i;
	bool memory_first = rng_chance(&taker->rng, 20);
	struct owner *owner = taker->owner;
	struct store *store;

	if (memory_first)
		add_memory(taker, ample_bytes(taker));
	owner->nr_pieces = memory_first;
	for (i = 0; i < nr; i++) {
		store = claim_store(taker, false);
		if (!store)
			break;
		add_store(taker, store);
		owner->nr_pieces++;
	}
	if (!memory_first) {
		add_memory(taker, ample_bytes(taker));
		owner->nr_pieces++;
	}
	owner->low_watermark = rng_chance(&taker->rng, 50) ? MIB : 0;
}

static void plan_growth(struct taker *taker)
{
	uint64_t first = 2 * MIB + (rng_below(&taker->rng, 6 * MIB) & ~4095ull);
	struct owner *owner = taker->owner;
	uint32_t nr_growth = 0;
	struct store *store;

	add_memory(taker, first);
	owner->nr_pieces = 1;
	owner->low_watermark = first / 2 +
			       rng_below(&taker->rng, first / 2);
	if (rng_chance(&taker->rng, 70)) {
		store = claim_store(taker, true);
		if (store) {
			owner->nr_growth = nr_growth;
			add_store(taker, store);
			owner->nr_growth = ++nr_growth;
		}
	}
	add_memory(taker, ample_bytes(taker));
	owner->nr_growth = nr_growth + 1;
}

static void plan_overflow(struct taker *taker)
{
	add_memory(taker, 65536 + (rng_below(&taker->rng, MIB) & ~4095ull));
	taker->owner->nr_pieces = 1;
	taker->owner->low_watermark = 65536;
}

static void plan(struct taker *taker)
{
	uint64_t kind = rng_below(&taker->rng, 100);
	struct owner *owner = taker->owner;
	uint32_t i;

	owner_reset(owner);
	if (kind < 55) {
		taker->plan = PLAN_AMPLE;
		plan_ample(taker);
	} else if (kind < 82) {
		taker->plan = PLAN_GROW;
		plan_growth(taker);
	} else {
		taker->plan = PLAN_OVERFLOW;
		plan_overflow(taker);
	}
	for (i = 0; i < taker->nr_images; i++) {
		struct device *device = taker->images[i].device;

		owner->trackers[owner->nr_trackers++] = device->tracker;
		if (!device->mount[0])
			continue;
		owner->mounts[owner->nr_mounts] =
			open(device->mount, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
		if (owner->mounts[owner->nr_mounts] < 0)
			give_up("%s: %s", device->mount, strerror(errno));
		owner->nr_mounts++;
	}
}

static void close_plan(struct owner *owner)
{
	uint32_t i;

	for (i = 0; i < owner->nr_mounts; i++)
		close(owner->mounts[i]);
	for (i = 0; i < owner->nr_pieces + owner->nr_growth; i++)
		if (owner->pieces[i].store.file_fd >= 0)
			close(owner->pieces[i].store.file_fd);
}

/* Knowing what the images may hold */

static struct view *view_of(struct taker *taker, struct space *space)
{
	uint32_t i;

	for (i = 0; i < taker->nr_views; i++)
		if (taker->views[i]->space == space)
			return taker->views[i];
	taker->views[taker->nr_views++] = view_begin(space);
	return taker->views[taker->nr_views - 1];
}

/* Returns the clock from before everything that it copied. */
static uint64_t copy_before(struct taker *taker)
{
	uint64_t begun, j;
	uint32_t i;

	journals_note(taker->numbers);
	begun = tick();
	taker->nr_views = 0;
	for (i = 0; i < taker->nr_images; i++) {
		struct taken_image *image = &taker->images[i];
		struct device *device = image->device;

		if (device->space)
			image->view = view_of(taker, device->space);
		if (device->file)
			view_of(taker, device->file);
		image->hashes = zeroed(device->nr_blocks, sizeof(uint64_t));
		image->last_after = zeroed(device->nr_blocks, sizeof(uint64_t));
		image->written_before = zeroed(device->nr_blocks,
					       sizeof(uint64_t));
		for (j = 0; j < device->nr_blocks; j++)
			image->written_before[j] = device->written[j];
	}
	return begun;
}

static void copy_after(struct taker *taker)
{
	uint64_t j;
	uint32_t i;

	for (i = 0; i < taker->nr_images; i++) {
		struct taken_image *image = &taker->images[i];

		for (j = 0; j < image->device->nr_blocks; j++)
			image->last_after[j] = image->device->flying[j] ?
				NEVER : image->device->last[j];
	}
}

static void free_copies(struct taker *taker)
{
	uint32_t i;

	for (i = 0; i < taker->nr_images; i++) {
		struct taken_image *image = &taker->images[i];

		if (image->fd >= 0)
			close(image->fd);
		free(image->hashes);
		free(image->written_before);
		free(image->last_after);
	}
	for (i = 0; i < taker->nr_views; i++)
		view_free(taker->views[i]);
	taker->nr_views = 0;
}

/* Reading images */

long read_direct(int fd, void *buffer, size_t bytes, uint64_t offset)
{
	ssize_t done = pread(fd, buffer, bytes, offset);

	return done < 0 ? -errno : done;
}

static uint64_t hash_block(const void *data, size_t bytes)
{
	const uint64_t *word = data;
	uint64_t hash = bytes, i;

	for (i = 0; i < bytes / sizeof(*word); i++)
		hash = (hash ^ word[i]) * 0x9fb21c651e98df25ull + (hash >> 29);
	return hash | 1;
}

static void kill_if_due(struct taker *taker)
{
	if (!taker->alive || now_ns() < taker->kill_at_ns)
		return;
	owner_kill(taker->owner);
	taker->alive = false;
	atomic_fetch_add(&world.nr_kills, 1);
}

/* May this read of an image have failed? Notes that the snapshot has. */
static void judge_error(struct taker *taker, struct taken_image *image,
			uint64_t offset, long error)
{
	struct owner *owner = taker->owner;

	if (!taker->alive) {
		/* Nobody owns it any more: the disk is gone or about to. */
		if (error != -EIO && error != -ENXIO && error != -ENODEV && error)
			violation(taker->step, "%s without owner, byte %llu: %s",
				  image->name, (unsigned long long)offset,
				  strerror(-error));
		return;
	}
	if (error != -EIO) {
		violation(taker->step, "read of %s at byte %llu: %s",
			  image->name, (unsigned long long)offset,
			  error < 0 ? strerror(-error) : "short");
		return;
	}
	if (!owner_ask_state(owner))
		give_up("no state of a snapshot");
	if (owner->state.state != STILLBLOCK_STATE_FAILED)
		violation(taker->step, "EIO from %s at byte %llu, but its snapshot has not failed",
			  image->name, (unsigned long long)offset);
	else if (owner->state.reason != STILLBLOCK_REASON_STORE_FULL ||
		 taker->plan == PLAN_AMPLE)
		violation(taker->step, "the snapshot of %s failed for reason %u with %llu of %llu bytes of store used",
			  image->name, owner->state.reason,
			  (unsigned long long)owner->state.store_used,
			  (unsigned long long)owner->state.store_capacity);
	taker->failed = true;
}

/* Compares hashes with those of the first read, and keeps those of new blocks. */
static bool check_hashes(struct taker *taker, struct taken_image *image,
			 uint64_t offset, size_t bytes, const char *data)
{
	uint64_t block = offset / BLOCK_BYTES;
	size_t at, len;

	for (at = 0; at < bytes; at += len, block++) {
		uint64_t hash;

		len = bytes - at < BLOCK_BYTES ? bytes - at : BLOCK_BYTES;
		hash = hash_block(data + at, len);
		if (image->hashes[block] && image->hashes[block] != hash) {
			violation(taker->step, "%s of %s changed at byte %llu while it was held",
				  image->name, image->device->path,
				  (unsigned long long)block * BLOCK_BYTES);
			return false;
		}
		image->hashes[block] = hash;
	}
	return true;
}

/*
 * Reads a piece of an image and checks it. Whole blocks are compared with
 * earlier reads, too. False when the image cannot be read any more.
 */
static bool read_piece(struct taker *taker, struct taken_image *image,
		       uint64_t offset, size_t bytes)
{
	struct device *device = image->device;
	uint64_t first = offset >> UNIT_SHIFT;
	bool again = true;
	long done;

	kill_if_due(taker);
	done = read_direct(image->fd, taker->buffer, bytes, offset);
	if (done != (long)bytes) {
		judge_error(taker, image, offset, done);
		return false;
	}
	if (taker->failed) {
		violation(taker->step, "%s can be read at byte %llu after its snapshot failed",
			  image->name, (unsigned long long)offset);
		return false;
	}
	if (offset % BLOCK_BYTES == 0 &&
	    (bytes % BLOCK_BYTES == 0 ||
	     offset + bytes == device->nr_units << UNIT_SHIFT)) {
		again = image->hashes[offset / BLOCK_BYTES] != 0;
		if (again)
			atomic_fetch_add(&world.nr_reread_bytes, bytes);
		if (!check_hashes(taker, image, offset, bytes, taker->buffer))
			return false;
	}
	atomic_fetch_add(&world.nr_image_bytes, bytes);
	return !image->view || !taker->known ||
	       view_check(image->view, &taker->instant, image->name,
			  device->at + first, bytes >> UNIT_SHIFT,
			  taker->buffer);
}

/* Reads all pieces of all images, or @percent of them, image by image in turn. */
static void read_images(struct taker *taker, unsigned int percent)
{
	uint64_t next[MAX_DEVICES] = {};
	uint32_t left = taker->nr_images, i;

	while (left && !taker->failed && !world.violations) {
		struct taken_image *image;
		uint64_t bytes, size;

		i = rng_below(&taker->rng, taker->nr_images);
		image = &taker->images[i];
		size = image->device->nr_units << UNIT_SHIFT;
		if (next[i] == size)
			continue;
		bytes = 65536ull << rng_below(&taker->rng, 5);
		if (bytes > size - next[i])
			bytes = size - next[i];
		if (rng_chance(&taker->rng, percent) &&
		    !read_piece(taker, image, next[i], bytes))
			return;
		next[i] += bytes;
		left -= next[i] == size;
	}
}

/* Reads here and there, for as long as the snapshot is to be held. */
static void read_about(struct taker *taker, uint64_t until_ns)
{
	do {
		struct taken_image *image =
			&taker->images[rng_below(&taker->rng, taker->nr_images)];
		uint64_t units = image->device->nr_units;
		uint64_t first, nr;

		if (rng_chance(&taker->rng, 70)) {
			/* Whole blocks, which have to be as they were. */
			first = rng_below(&taker->rng, units) / BLOCK_UNITS *
				BLOCK_UNITS;
			nr = BLOCK_UNITS * (1 + rng_below(&taker->rng, 64));
		} else {
			first = rng_below(&taker->rng, units);
			nr = 1 + rng_below(&taker->rng, 64);
		}
		if (nr > units - first)
			nr = units - first;
		if (!read_piece(taker, image, first << UNIT_SHIFT,
				nr << UNIT_SHIFT))
			return;
		pause_up_to(&taker->rng, 20000);
	} while (now_ns() < until_ns && !world.violations);
}

/*
 * A failed snapshot gives EIO everywhere and nothing else, for good. That of a
 * killed owner gives what is right, or an error.
 */
static void read_failed(struct taker *taker)
{
	unsigned int i;

	for (i = 0; i < 24 && !world.violations; i++) {
		struct taken_image *image =
			&taker->images[rng_below(&taker->rng, taker->nr_images)];
		uint64_t unit = rng_below(&taker->rng,
					  image->device->nr_units);

		/* read_piece() reports success as what it is now. */
		read_piece(taker, image, unit << UNIT_SHIFT, UNIT_BYTES);
	}
}

static void open_images(struct taker *taker)
{
	uint32_t i;

	for (i = 0; i < taker->nr_images; i++) {
		struct taken_image *image = &taker->images[i];
		struct stillblock_image *told = &taker->owner->images[i];
		uint64_t bytes = 0;
		int writable = 0;

		snprintf(image->name, sizeof(image->name), "/dev/%s",
			 told->disk_name);
		image->fd = open(image->name, O_RDONLY | O_DIRECT | O_CLOEXEC);
		if (image->fd < 0) {
			violation(taker->step, "%s: %s", image->name,
				  strerror(errno));
			continue;
		}
		if (ioctl(image->fd, BLKGETSIZE64, &bytes) ||
		    ioctl(image->fd, BLKROGET, &writable) || !writable ||
		    bytes != image->device->nr_units << UNIT_SHIFT ||
		    told->tracker != image->device->tracker)
			violation(taker->step, "%s is not a read-only image of %s with %llu sectors",
				  image->name, image->device->path,
				  (unsigned long long)image->device->nr_units);
	}
}

/* What several images of one instant hold of the same sectors is the same. */
static void compare_pair(struct taker *taker, struct taken_image *a,
			 struct taken_image *b)
{
	uint64_t first = a->device->at > b->device->at ? a->device->at :
							 b->device->at;
	uint64_t end_a = a->device->at + a->device->nr_units;
	uint64_t end_b = b->device->at + b->device->nr_units;
	uint64_t end = end_a < end_b ? end_a : end_b, i;
	size_t bytes;

	for (i = 0; i < 24 && first < end; i++) {
		uint64_t unit = first + rng_below(&taker->rng, end - first);
		uint64_t nr = 1 + rng_below(&taker->rng, 128);
		long ra, rb;

		if (nr > end - unit)
			nr = end - unit;
		bytes = nr << UNIT_SHIFT;
		kill_if_due(taker);
		ra = read_direct(a->fd, taker->buffer, bytes,
				 (unit - a->device->at) << UNIT_SHIFT);
		rb = read_direct(b->fd, taker->other_buffer, bytes,
				 (unit - b->device->at) << UNIT_SHIFT);
		if (ra != (long)bytes || rb != (long)bytes) {
			judge_error(taker, ra != (long)bytes ? a : b,
				    unit << UNIT_SHIFT,
				    ra != (long)bytes ? ra : rb);
			return;
		}
		if (memcmp(taker->buffer, taker->other_buffer, bytes))
			violation(taker->step, "%s of %s and %s of %s differ in unit %llu.. of %s",
				  a->name, a->device->path, b->name,
				  b->device->path, (unsigned long long)unit,
				  a->device->space->name);
		atomic_fetch_add(&world.nr_stacked_blocks,
				 (nr + BLOCK_UNITS - 1) / BLOCK_UNITS);
	}
	/* Where both were read and lie alike, all of it. */
	if ((a->device->at - b->device->at) % BLOCK_UNITS)
		return;
	for (; first + BLOCK_UNITS <= end; first += BLOCK_UNITS) {
		uint64_t in_a = first - a->device->at;
		uint64_t in_b = first - b->device->at;
		uint64_t ha, hb;

		if (in_a % BLOCK_UNITS)
			return;
		ha = a->hashes[in_a / BLOCK_UNITS];
		hb = b->hashes[in_b / BLOCK_UNITS];
		if (!ha || !hb)
			continue;
		if (ha != hb)
			violation(taker->step, "%s of %s and %s of %s differ in unit %llu of %s",
				  a->name, a->device->path, b->name,
				  b->device->path, (unsigned long long)first,
				  a->device->space->name);
		atomic_fetch_add(&world.nr_stacked_blocks, 1);
	}
}

static void compare_stacked(struct taker *taker)
{
	uint32_t i, j;

	for (i = 0; i < taker->nr_images; i++) {
		for (j = i + 1; j < taker->nr_images; j++) {
			struct taken_image *a = &taker->images[i];
			struct taken_image *b = &taker->images[j];

			if (a->device->space && !taker->failed &&
			    a->device->space == b->device->space)
				compare_pair(taker, a, b);
		}
	}
}

/* File systems in images */

/* What it says is shown if it fails. */
static int run_quietly(const char *command, const char *log)
{
	char line[2048];
	int result;
	FILE *said;

	snprintf(line, sizeof(line), "exec >%s 2>&1 </dev/null; %s", log,
		 command);
	result = system(line);
	said = result ? fopen(log, "r") : NULL;
	while (said && fgets(line, sizeof(line), said)) {
		line[strcspn(line, "\n")] = '\0';
		say("%s", line);
	}
	if (said)
		fclose(said);
	return result;
}

static void check_file_units(struct taker *taker, struct device *device,
			     const char *path, const char *image)
{
	struct view *view = view_of(taker, device->file);
	uint64_t bytes = device->file->nr_units << UNIT_SHIFT, offset;
	int fd = open(path, O_RDONLY | O_CLOEXEC);

	if (fd < 0) {
		violation(taker->step, "%s in the image of %s: %s", path,
			  device->path, strerror(errno));
		return;
	}
	for (offset = 0; offset < bytes; offset += MAX_PIECE) {
		size_t piece = bytes - offset < MAX_PIECE ? bytes - offset :
							    MAX_PIECE;
		long done = read_direct(fd, taker->buffer, piece, offset);

		if (done != (long)piece) {
			violation(taker->step, "%s in the image of %s, byte %llu: %s",
				  path, device->path,
				  (unsigned long long)offset,
				  done < 0 ? strerror(-done) : "short");
			break;
		}
		if (!view_check(view, &taker->instant, image,
				offset >> UNIT_SHIFT, piece >> UNIT_SHIFT,
				taker->buffer))
			break;
	}
	close(fd);
	atomic_fetch_add(&world.nr_file_checks, 1);
}

/*
 * btrfs knows its devices by their UUID and will not mount another with the
 * same: its own tool reads the file.
 */
static void check_btrfs(struct taker *taker, struct taken_image *image,
			const char *folder, const char *log)
{
	char command[512], path[2 * PATH_BYTES];

	/* Alone: what was a file in one image may be a folder in the next. */
	snprintf(command, sizeof(command),
		 "rm -rf %s/btrfs && mkdir %s/btrfs && btrfs restore %s %s/btrfs",
		 folder, folder, image->name, folder);
	if (run_quietly(command, log)) {
		violation(taker->step, "%s failed on the image of %s",
			  command, image->device->path);
		return;
	}
	snprintf(path, sizeof(path), "%s/btrfs/%s", folder,
		 image->device->file_name);
	check_file_units(taker, image->device, path, image->name);
	snprintf(command, sizeof(command), "rm -rf %s/btrfs", folder);
	run_quietly(command, log);
}

/*
 * The owner that another taker has just started has this one's files open, too,
 * until it has closed what is not its own.
 */
static void unmount(const char *folder)
{
	int tries = 1000;

	while (umount(folder)) {
		if (errno != EBUSY || !--tries)
			give_up("umount %s: %s", folder, strerror(errno));
		usleep(10000);
	}
}

static void check_mounted(struct taker *taker, struct taken_image *image,
			  const char *folder)
{
	bool xfs = !strcmp(image->device->fs, "xfs");
	char path[2 * PATH_BYTES];

	if (mount(image->name, folder, image->device->fs, MS_RDONLY,
		  xfs ? "norecovery,nouuid" : "noload")) {
		violation(taker->step, "mount of %s, the image of %s: %s",
			  image->name, image->device->path, strerror(errno));
		return;
	}
	snprintf(path, sizeof(path), "%s/%s", folder,
		 image->device->file_name);
	check_file_units(taker, image->device, path, image->name);
	unmount(folder);
}

/*
 * A frozen XFS has records in its log still: what is not clean without them has
 * to be when they are replayed, on a copy.
 */
static void check_fsck(struct taker *taker, struct taken_image *image,
		       const char *folder, const char *log)
{
	const char *fs = image->device->fs, *name = image->name;
	char command[1024];

	if (!strcmp(fs, "xfs"))
		snprintf(command, sizeof(command),
			 "xfs_repair -n %s && exit; "
			 "dd if=%s of=%s.copy bs=1M conv=sparse status=none; "
			 "loop=$(losetup --find --show %s.copy); "
			 "mount -o nouuid $loop %s && umount %s && "
			 "xfs_repair -n $loop; "
			 "clean=$?; losetup -d $loop; rm %s.copy; exit $clean",
			 name, name, folder, folder, folder, folder, folder);
	else
		snprintf(command, sizeof(command), "%s %s",
			 !strcmp(fs, "ext4") ? "e2fsck -fn" :
					       "btrfs check --readonly --force",
			 name);
	if (run_quietly(command, log))
		violation(taker->step, "%s, the image of %s, is not clean",
			  name, image->device->path);
	atomic_fetch_add(&world.nr_fsck, 1);
}

static void check_file_systems(struct taker *taker)
{
	char folder[64], log[64];
	uint32_t i;

	snprintf(folder, sizeof(folder), "/run/stress-%u", taker->index);
	snprintf(log, sizeof(log), "/run/stress-%u.log", taker->index);
	mkdir(folder, 0700);
	for (i = 0; i < taker->nr_images && !world.violations; i++) {
		struct taken_image *image = &taker->images[i];

		if (!image->device->file)
			continue;
		if (rng_chance(&taker->rng, 30))
			check_fsck(taker, image, folder, log);
		if (!rng_chance(&taker->rng, 60))
			continue;
		if (!strcmp(image->device->fs, "btrfs"))
			check_btrfs(taker, image, folder, log);
		else
			check_mounted(taker, image, folder);
	}
}

/* Change maps */

/* Epoch of a change that was submitted at @stamp, at least. */
static uint32_t epoch_from(const struct history *history, uint64_t stamp)
{
	uint32_t epoch = stamp > history->from_after ? 1 : 0, i;

	for (i = 0; i < history->nr_takes; i++)
		if (history->takes[i].after < stamp)
			epoch = history->takes[i].number + 1;
	return stamp ? epoch : 0;
}

/* Epoch of a change that had completed at @completed, at most. */
static uint32_t epoch_until(const struct history *history, uint64_t completed,
			    uint32_t number)
{
	uint32_t i;

	if (completed < history->from_before)
		return 0;
	for (i = 0; i < history->nr_takes; i++)
		if (completed < history->takes[i].before)
			return history->takes[i].number;
	return number;
}

static void check_bounds(struct taker *taker, struct taken_image *image,
			 const struct stillblock_image *told,
			 const uint8_t *map)
{
	struct device *device = image->device;
	uint64_t per = told->block_size / BLOCK_BYTES, block, i;

	for (block = 0; block < told->nr_blocks; block++) {
		uint64_t written = 0, last = 0;
		uint32_t least, most;

		for (i = block * per;
		     i < (block + 1) * per && i < device->nr_blocks; i++) {
			if (image->written_before[i] > written)
				written = image->written_before[i];
			if (image->last_after[i] > last)
				last = image->last_after[i];
		}
		least = epoch_from(device->history, written);
		most = epoch_until(device->history, last, told->number);
		if (map[block] < least || map[block] > most) {
			violation(taker->step,
				  "change map of %s, block %llu of %u bytes: number %u, expected %u to %u (last write submitted at %llu, completed at %llu; epoch %u)",
				  device->path, (unsigned long long)block,
				  told->block_size, map[block], least, most,
				  (unsigned long long)written,
				  (unsigned long long)last, told->number);
			return;
		}
	}
	atomic_fetch_add(&world.nr_map_blocks, told->nr_blocks);
}

static void check_pair(struct taker *taker, struct taken_image *image,
		       const struct kept_image *old,
		       const struct stillblock_image *told,
		       const uint8_t *map)
{
	uint64_t per = told->block_size / BLOCK_BYTES, i, compared = 0;

	for (i = 0; i < image->device->nr_blocks; i++) {
		if (!old->hashes[i] || !image->hashes[i])
			continue;
		compared++;
		if (old->hashes[i] == image->hashes[i] ||
		    map[i / per] > old->number)
			continue;
		violation(taker->step,
			  "%s: byte %llu differs from step %llu's image, but its block's number is %u and that checkpoint's %u",
			  image->device->path,
			  (unsigned long long)i * BLOCK_BYTES,
			  (unsigned long long)old->step, map[i / per],
			  old->number);
		return;
	}
	atomic_fetch_add(&world.nr_pairs, 1);
	atomic_fetch_add(&world.nr_pair_blocks, compared);
}

/* The image reads as zeroes where its own store is, so it says nothing there. */
static void forget_store(struct taker *taker, struct taken_image *image)
{
	uint32_t i, j;

	for (i = 0; i < taker->nr_stores; i++) {
		struct store *store = taker->stores[i];

		if (store->origin != image->device)
			continue;
		for (j = 0; j < store->nr_extents; j++) {
			uint64_t end = store->extents[j].offset +
				       store->extents[j].length;
			uint64_t block;

			for (block = store->extents[j].offset / BLOCK_BYTES;
			     block * BLOCK_BYTES < end; block++)
				image->hashes[block] = 0;
		}
	}
}

/* The history learns of a take, whatever became of its images. */
static void note_take(struct taker *taker, struct taken_image *image,
		      const struct stillblock_image *told)
{
	struct history *history = image->device->history;
	struct kept_take *take;

	if (!history->known) {
		memcpy(history->generation, told->generation,
		       STILLBLOCK_UUID_SIZE);
		history->known = true;
	} else if (memcmp(history->generation, told->generation,
			  STILLBLOCK_UUID_SIZE)) {
		violation(taker->step, "%s has another generation than the last take told",
			  image->device->path);
		return;
	}
	if (history->nr_takes &&
	    told->number <= history->takes[history->nr_takes - 1].number) {
		violation(taker->step, "%s: number %u after number %u",
			  image->device->path, told->number,
			  history->takes[history->nr_takes - 1].number);
		return;
	}
	take = &history->takes[history->nr_takes++];
	take->number = told->number;
	take->before = taker->owner->before;
	take->after = taker->owner->after;
}

/* The numbers of a generation are used up: the next one began at this take. */
static void follow_generation(struct taker *taker, struct taken_image *image,
			      const struct stillblock_image *told)
{
	struct history *history = image->device->history;

	if (!memcmp(told->generation, told->checkpoint_generation,
		    STILLBLOCK_UUID_SIZE))
		return;
	memcpy(history->generation, told->checkpoint_generation,
	       STILLBLOCK_UUID_SIZE);
	history->nr_takes = 0;
	history->nr_unseen = 0;
	history->from_before = taker->owner->before;
	history->from_after = taker->owner->after;
}

/*
 * A take whose owner was killed may have happened or not. It may even have
 * used the numbers up, and then nothing is known of the generation.
 */
static void note_unseen_take(struct taker *taker)
{
	uint32_t i, last;

	for (i = 0; i < taker->nr_images; i++) {
		struct history *history = taker->images[i].device->history;

		last = history->nr_takes ?
		       history->takes[history->nr_takes - 1].number : 0;
		if (last + ++history->nr_unseen < STILLBLOCK_MAX_NUMBER)
			continue;
		history->known = false;
		history->nr_takes = 0;
		history->from_before = 0;
		history->from_after = NEVER;
	}
}

static void check_maps(struct taker *taker)
{
	uint32_t i, j;

	for (i = 0; i < taker->nr_images && !world.violations; i++) {
		struct taken_image *image = &taker->images[i];
		struct stillblock_image *told = &taker->owner->images[i];
		struct history *history = image->device->history;
		struct kept_image *kept;

		note_take(taker, image, told);
		if (!taker->alive || !owner_ask_map(taker->owner, i)) {
			if (taker->alive)
				violation(taker->step, "no change map of %s: %s",
					  image->device->path,
					  strerror(taker->owner->map_error));
			follow_generation(taker, image, told);
			continue;
		}
		if (image->device->space)
			check_bounds(taker, image, told, taker->owner->map);
		forget_store(taker, image);
		for (j = 0; j < KEPT_IMAGES; j++)
			if (history->images[j].hashes &&
			    !memcmp(history->images[j].generation,
				    told->generation, STILLBLOCK_UUID_SIZE))
				check_pair(taker, image, &history->images[j],
					   told, taker->owner->map);
		kept = &history->images[history->nr_images++ % KEPT_IMAGES];
		free(kept->hashes);
		kept->hashes = image->hashes;
		image->hashes = NULL;
		kept->step = taker->step;
		kept->number = told->checkpoint_number;
		memcpy(kept->generation, told->checkpoint_generation,
		       STILLBLOCK_UUID_SIZE);
		follow_generation(taker, image, told);
	}
}

/* A step */

static void hold(struct taker *taker)
{
	bool full = rng_chance(&taker->rng, 70);

	doing(taker, "reading");
	open_images(taker);
	if (world.violations)
		return;
	if (rng_chance(&taker->rng, 25))
		read_about(taker, now_ns() + rng_below(&taker->rng, 1000) * MS);
	read_images(taker, full ? 100 : 30);
	if (!taker->failed && !world.violations)
		compare_stacked(taker);
	/*
	 * A store that is too small is given time to overflow; a kernel that
	 * mounts a failing image would complain with every reason.
	 */
	if (taker->plan == PLAN_AMPLE && taker->kill_at_ns == NEVER &&
	    taker->known && !world.violations) {
		doing(taker, "checking file systems");
		check_file_systems(taker);
	}
	doing(taker, "rereading");
	if (!taker->failed && !world.violations)
		read_about(taker, now_ns() + rng_below(&taker->rng, 2500) * MS);
	if (taker->failed || !taker->alive)
		read_failed(taker);
	doing(taker, "checking change maps");
	if (!world.violations)
		check_maps(taker);
}

static void judge_refusal(struct taker *taker)
{
	struct owner *owner = taker->owner;

	/* An emulated machine under load may need longer than a deadline. */
	if (owner->reason == STILLBLOCK_REASON_FREEZE_TIMEOUT ||
	    owner->reason == STILLBLOCK_REASON_DRAIN_TIMEOUT) {
		say("step %llu: refused, reason %u, %s",
		    (unsigned long long)taker->step, owner->reason,
		    taker->images[owner->culprit].device->path);
		atomic_fetch_add(&world.nr_refused, 1);
		return;
	}
	violation(taker->step, "take: %s, reason %u, culprit %u (%u images, %u mounts, %u stores)",
		  strerror(owner->error), owner->reason, owner->culprit,
		  owner->nr_trackers, owner->nr_mounts, owner->nr_pieces);
}

static void after_take(struct taker *taker, uint64_t begun)
{
	struct owner *owner = taker->owner;

	copy_after(taker);
	atomic_fetch_add(&world.nr_takes, 1);
	atomic_fetch_add(&world.nr_images, taker->nr_images);
	memset(&taker->instant, 0, sizeof(taker->instant));
	taker->instant.step = taker->step;
	taker->instant.from = owner->before;
	taker->instant.until = owner->after;
	strcpy(taker->instant.from_what, "the take began then");
	strcpy(taker->instant.until_what, "the take had returned then");
	taker->known = views_complete(taker->views, taker->nr_views, begun,
				      owner->after, taker->numbers);
	if (!taker->known)
		atomic_fetch_add(&world.nr_unknown, 1);
	if (rng_chance(&taker->rng, 20))
		taker->kill_at_ns = now_ns() +
				    rng_below(&taker->rng, 3000) * MS;
	hold(taker);
	if (taker->alive && owner->add_error)
		violation(taker->step, "growth refused: %s, reason %u",
			  strerror(owner->add_error), owner->add_reason);
	atomic_fetch_add(&world.nr_growths, owner->added);
	if (taker->failed)
		atomic_fetch_add(taker->plan == PLAN_GROW ?
				 &world.nr_late_growths : &world.nr_overflows, 1);
}

static void step(struct taker *taker)
{
	uint64_t begun;
	uint32_t i;

	taker->step = atomic_fetch_add(&world.nr_steps, 1) + 1;
	claim_devices(taker);
	if (!taker->nr_images) {
		pause_up_to(&taker->rng, 50000);
		return;
	}
	for (i = 0; i < taker->nr_images; i++) {
		struct device *device = taker->images[i].device;

		if (rng_chance(&taker->rng, 4)) {
			device_detach(device);
			device_attach(device, random_block_bytes(&taker->rng));
			atomic_fetch_add(&world.nr_reattached, 1);
		}
		if (rng_chance(&taker->rng, 10))
			mark_somewhere(taker, device);
	}
	doing(taker, "planning");
	plan(taker);
	taker->kill_at_ns = NEVER;
	taker->failed = false;
	begun = copy_before(taker);
	if (rng_chance(&taker->rng, 12))
		taker->kill_at_ns = now_ns() + rng_below(&taker->rng, 500) * MS;
	doing(taker, "taking");
	owner_start(taker->owner);
	taker->alive = owner_wait(taker->owner, taker->kill_at_ns);
	taker->kill_at_ns = NEVER;
	if (!taker->alive) {
		atomic_fetch_add(&world.nr_kills, 1);
		note_unseen_take(taker);
	} else if (taker->owner->error) {
		judge_refusal(taker);
	} else {
		after_take(taker, begun);
	}
	/* It is the owner's end that frees devices and stores. */
	doing(taker, "ending");
	if (taker->alive)
		owner_end(taker->owner);
	close_plan(taker->owner);
	free_copies(taker);
	release_claims(taker);
	doing(taker, "nothing");
}

static void *taker_thread(void *data)
{
	struct taker *taker = data;
	uint64_t nr = 0;

	while (!world.stop_takers && !world.violations) {
		rng_seed(&taker->rng, world.seed, 1000 + taker->index, nr++);
		step(taker);
		pause_up_to(&taker->rng, 300000);
	}
	return NULL;
}

void takers_start(void)
{
	uint64_t longest = 0;
	uint32_t i;

	for (i = 0; i < world.nr_devices; i++)
		if (world.devices[i].nr_blocks > longest)
			longest = world.devices[i].nr_blocks;
	if (world.nr_takers > MAX_TAKERS)
		give_up("at most %u takers", MAX_TAKERS);
	for (i = 0; i < world.nr_takers; i++) {
		struct taker *taker = &takers[i];

		taker->index = i;
		taker->owner = owner_new(longest);
		taker->buffer = shared_memory(MAX_PIECE);
		taker->other_buffer = shared_memory(MAX_PIECE);
		if (pthread_create(&taker->thread, NULL, taker_thread, taker))
			give_up("no thread");
		pthread_setname_np(taker->thread, "taker");
	}
}

void takers_join(void)
{
	uint32_t i;

	world.stop_takers = true;
	for (i = 0; i < world.nr_takers; i++)
		pthread_join(takers[i].thread, NULL);
}
