// SPDX-License-Identifier: Apache-2.0
/*
 * The process that owns a snapshot: it takes it, lets it grow at the low
 * watermark and ends with it, by its own will or by SIGKILL. It is a fork of
 * the test that makes system calls only.
 */
#define _GNU_SOURCE
#include "stress.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

/* Commands and, but for TAKEN, their answers. */
#define TAKEN	't'
#define MAP	'm'
#define STATE	's'
#define CLOSE	'c'

static struct stillblock_store piece_store(struct owner *owner, uint32_t index)
{
	struct owner_piece *piece = &owner->pieces[index];
	struct stillblock_store store = piece->store;

	if (store.kind == STILLBLOCK_STORE_FILE)
		store.extents = (uintptr_t)&owner->extents[piece->first_extent];
	return store;
}

static int take(struct owner *owner)
{
	struct stillblock_store stores[OWNER_MAX_PIECES];
	struct stillblock_take args = {
		.trackers = (uintptr_t)owner->trackers,
		.nr_trackers = owner->nr_trackers,
		.mounts = (uintptr_t)owner->mounts,
		.nr_mounts = owner->nr_mounts,
		.stores = (uintptr_t)stores,
		.nr_stores = owner->nr_pieces,
		.freeze_timeout_ms = 30000,
		.low_watermark = owner->low_watermark,
	};
	uint32_t i;

	for (i = 0; i < owner->nr_pieces; i++)
		stores[i] = piece_store(owner, i);
	owner->before = tick();
	owner->error = ioctl(control, STILLBLOCK_IOC_TAKE, &args) ? errno : 0;
	owner->after = tick();
	owner->reason = args.reason;
	owner->culprit = args.culprit;
	if (owner->error)
		return -1;
	for (i = 0; i < owner->nr_trackers; i++) {
		owner->images[i].index = i;
		if (ioctl(args.snapshot_fd, STILLBLOCK_SNAP_IOC_IMAGE,
			  &owner->images[i]))
			owner->error = errno;
	}
	return args.snapshot_fd;
}

/* The store runs low: the next piece, if there is one left. */
static void grow(struct owner *owner, int fd)
{
	struct stillblock_add_store args = {};

	if (owner->added == owner->nr_growth)
		return;
	args.store = piece_store(owner, owner->nr_pieces + owner->added);
	if (ioctl(fd, STILLBLOCK_SNAP_IOC_ADD_STORE, &args)) {
		/* A snapshot that has failed meanwhile takes none. */
		if (args.reason != STILLBLOCK_REASON_FAILED) {
			owner->add_error = errno;
			owner->add_reason = args.reason;
		}
		return;
	}
	owner->added++;
}

static void read_events(struct owner *owner, int fd)
{
	struct stillblock_event event;

	if (read(fd, &event, sizeof(event)) != sizeof(event))
		return;
	if (event.type == STILLBLOCK_EVENT_LOW_WATERMARK)
		grow(owner, fd);
	else if (event.type == STILLBLOCK_EVENT_FAILED)
		owner->failed_reason = event.value;
}

static void read_map(struct owner *owner, int fd, uint32_t index)
{
	struct stillblock_map args = {
		.index = index,
		.nr_blocks = owner->images[index].nr_blocks,
		.buffer = (uintptr_t)owner->map,
	};

	owner->map_error = ioctl(fd, STILLBLOCK_SNAP_IOC_MAP, &args) ? errno : 0;
}

static void answer(int report, char what)
{
	if (write(report, &what, 1) != 1)
		_exit(3);
}

/* Returns when it is asked to close, or nobody is left to ask. */
static void serve(struct owner *owner, int fd, int commands, int report)
{
	for (;;) {
		struct pollfd polls[] = {
			{ .fd = commands, .events = POLLIN },
			{ .fd = fd, .events = POLLIN },
		};
		unsigned char command[2];

		if (poll(polls, 2, -1) < 0)
			continue;
		if (polls[1].revents & POLLIN)
			read_events(owner, fd);
		if (!polls[0].revents)
			continue;
		if (read(commands, command, 2) != 2 || command[0] == CLOSE)
			return;
		if (command[0] == MAP)
			read_map(owner, fd, command[1]);
		else if (ioctl(fd, STILLBLOCK_SNAP_IOC_STATE, &owner->state))
			owner->state.state = 0;
		answer(report, command[0]);
	}
}

static int by_number(const void *a, const void *b)
{
	return *(const int *)a - *(const int *)b;
}

/* Leaves only what the owner needs, so that nothing else lives as long as it. */
static void close_others(struct owner *owner, int commands, int report)
{
	int keep[3 + OWNER_MAX_IMAGES + OWNER_MAX_PIECES];
	unsigned int nr = 0, next = 3;
	uint32_t i;

	keep[nr++] = commands;
	keep[nr++] = report;
	keep[nr++] = control;
	for (i = 0; i < owner->nr_mounts; i++)
		keep[nr++] = owner->mounts[i];
	for (i = 0; i < owner->nr_pieces + owner->nr_growth; i++)
		if (owner->pieces[i].store.file_fd >= 0)
			keep[nr++] = owner->pieces[i].store.file_fd;
	qsort(keep, nr, sizeof(*keep), by_number);
	for (i = 0; i < nr; i++) {
		if ((unsigned int)keep[i] > next)
			close_range(next, keep[i] - 1, 0);
		next = keep[i] + 1;
	}
	close_range(next, ~0u, 0);
}

struct owner *owner_new(uint64_t map_bytes)
{
	struct owner *owner = shared_memory(sizeof(*owner));

	owner->map = shared_memory(map_bytes);
	return owner;
}

void owner_reset(struct owner *owner)
{
	uint8_t *map = owner->map;

	memset(owner, 0, offsetof(struct owner, extents));
	owner->nr_extents = 0;
	memset(&owner->low_watermark, 0,
	       sizeof(*owner) - offsetof(struct owner, low_watermark));
	owner->map = map;
}

bool owner_add_piece(struct owner *owner, struct stillblock_store store,
		     const struct stillblock_extent *extents)
{
	uint32_t index = owner->nr_pieces + owner->nr_growth;
	struct owner_piece *piece = &owner->pieces[index];

	if (index == OWNER_MAX_PIECES ||
	    owner->nr_extents + store.nr_extents > OWNER_MAX_EXTENTS)
		return false;
	piece->store = store;
	piece->first_extent = owner->nr_extents;
	memcpy(&owner->extents[owner->nr_extents], extents,
	       store.nr_extents * sizeof(*extents));
	owner->nr_extents += store.nr_extents;
	return true;
}

void owner_start(struct owner *owner)
{
	int commands[2], reports[2], fd;
	pid_t pid;

	if (pipe2(commands, O_CLOEXEC) || pipe2(reports, O_CLOEXEC))
		give_up("pipe: %s", strerror(errno));
	pid = fork();
	if (pid < 0)
		give_up("fork: %s", strerror(errno));
	if (!pid) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		close_others(owner, commands[0], reports[1]);
		fd = take(owner);
		answer(reports[1], TAKEN);
		if (fd >= 0) {
			serve(owner, fd, commands[0], reports[1]);
			close(fd);
		}
		_exit(0);
	}
	close(commands[0]);
	close(reports[1]);
	/* The child shares this memory, so that it must not store its 0. */
	owner->pid = pid;
	owner->command = commands[1];
	owner->report = reports[0];
}

static void owner_reap(struct owner *owner)
{
	while (waitpid(owner->pid, NULL, 0) < 0 && errno == EINTR)
		;
	close(owner->command);
	close(owner->report);
	owner->pid = 0;
}

void owner_kill(struct owner *owner)
{
	kill(owner->pid, SIGKILL);
	owner_reap(owner);
}

bool owner_wait(struct owner *owner, uint64_t kill_at_ns)
{
	struct pollfd poll_report = { .fd = owner->report, .events = POLLIN };
	char what;

	for (;;) {
		uint64_t now = now_ns();
		int timeout = -1, ready;

		if (kill_at_ns != NEVER && now >= kill_at_ns) {
			owner_kill(owner);
			return false;
		}
		if (kill_at_ns != NEVER)
			timeout = (kill_at_ns - now) / 1000000 + 1;
		ready = poll(&poll_report, 1, timeout);
		if (ready <= 0)
			continue;
		if (read(owner->report, &what, 1) == 1)
			return true;
		give_up("the owner of a snapshot ended by itself");
	}
}

static bool owner_ask(struct owner *owner, char command, uint32_t index)
{
	unsigned char bytes[2] = { command, index };

	if (write(owner->command, bytes, 2) != 2)
		give_up("the owner of a snapshot ended by itself");
	return owner_wait(owner, NEVER);
}

bool owner_ask_map(struct owner *owner, uint32_t index)
{
	return owner_ask(owner, MAP, index) && !owner->map_error;
}

bool owner_ask_state(struct owner *owner)
{
	return owner_ask(owner, STATE, 0) && owner->state.state;
}

void owner_end(struct owner *owner)
{
	unsigned char bytes[2] = { CLOSE, 0 };

	if (write(owner->command, bytes, 2) != 2)
		give_up("the owner of a snapshot ended by itself");
	owner_reap(owner);
}
