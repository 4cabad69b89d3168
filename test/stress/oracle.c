// SPDX-License-Identifier: Apache-2.0
/*
 * What an image may hold.
 *
 * Writes of one unit never overlap, so the stamps of a unit rise. Of every
 * unit that is read from an image this gives an interval of the clock: not
 * before the write that it shows was submitted, not after the next write of
 * the unit had completed. All intervals of all images of one take have to
 * meet: that point is the instant.
 */
#include "stress.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define KIND_BITS	2
#define KIND_MASK	((1u << KIND_BITS) - 1)

#define MAGIC		0x5354494c4c424c4bull
#define MIX_STAMP	0x9e3779b97f4a7c15ull
#define MIX_UNIT	0xd1342543de82ef95ull
#define MIX_WORD	0xaef17502108ef2d9ull
#define UNIT_WORDS	(UNIT_BYTES / sizeof(uint64_t))
#define HEADER_WORDS	3

struct view_node {
	uint64_t stamp;
	uint64_t completed;	/* NEVER while it was under way at the end */
	enum unit_kind kind;
	uint32_t next;		/* index + 1 */
};

/* What a unit of an image shows. */
enum content {
	CONTENT_STAMPED,
	CONTENT_ZERO,
	CONTENT_OTHER,
};

struct journal *journals[MAX_WRITERS];
_Atomic uint32_t nr_journals;

static uint64_t bits_of(uint64_t nr)
{
	return (nr + 63) / 64;
}

struct space *space_new(const char *name, uint64_t nr_units)
{
	struct space *space;

	if (world.nr_spaces == MAX_SPACES)
		give_up("too many devices and files");
	space = &world.spaces[world.nr_spaces];
	snprintf(space->name, sizeof(space->name), "%s", name);
	space->id = world.nr_spaces++;
	space->nr_units = nr_units;
	space->done = zeroed(nr_units, sizeof(*space->done));
	space->busy = zeroed(bits_of(nr_units), sizeof(*space->busy));
	pthread_mutex_init(&space->lock, NULL);
	return space;
}

struct journal *journal_new(const char *writer)
{
	struct journal *journal = zeroed(1, sizeof(*journal));
	uint32_t index = atomic_fetch_add(&nr_journals, 1);

	if (index >= MAX_WRITERS)
		give_up("too many writers");
	journal->writer = writer;
	journals[index] = journal;
	return journal;
}

static bool range_claim(struct space *space, uint64_t first, uint64_t nr)
{
	bool free = true;
	uint64_t i;

	pthread_mutex_lock(&space->lock);
	for (i = first; i < first + nr && free; i++)
		free = !(space->busy[i / 64] >> (i % 64) & 1);
	for (i = first; i < first + nr && free; i++)
		space->busy[i / 64] |= 1ull << (i % 64);
	pthread_mutex_unlock(&space->lock);
	return free;
}

static void range_release(struct space *space, uint64_t first, uint64_t nr)
{
	uint64_t i;

	pthread_mutex_lock(&space->lock);
	for (i = first; i < first + nr; i++)
		space->busy[i / 64] &= ~(1ull << (i % 64));
	pthread_mutex_unlock(&space->lock);
}

static void raise_to(clock_cell *cell, uint64_t value)
{
	uint64_t old = atomic_load(cell);

	while (old < value && !atomic_compare_exchange_weak(cell, &old, value))
		;
}

static void blocks_begin(struct device *device, uint64_t first, uint64_t nr)
{
	uint64_t i;

	for (i = first; i < first + nr; i++)
		atomic_fetch_add(&device->flying[i], 1);
}

static void blocks_end(struct device *device, uint64_t first, uint64_t nr,
		       uint64_t stamp, uint64_t completed)
{
	uint64_t i;

	for (i = first; i < first + nr; i++) {
		if (stamp)
			raise_to(&device->written[i], stamp);
		raise_to(&device->last[i], completed);
		atomic_fetch_sub(&device->flying[i], 1);
	}
}

uint64_t touch_begin(struct device *device, uint64_t first_block, uint64_t nr)
{
	blocks_begin(device, first_block, nr);
	return tick();
}

void touch_end(struct device *device, uint64_t first_block, uint64_t nr,
	       uint64_t stamp)
{
	blocks_end(device, first_block, nr, stamp, tick());
}

/* Calls back for every tracked device that a range of a space lies on. */
static void for_each_device(const struct record *record, bool begin,
			    uint64_t completed)
{
	uint64_t end = record->first + record->nr;
	uint32_t i;

	for (i = 0; i < world.nr_devices; i++) {
		struct device *device = &world.devices[i];
		uint64_t first, last;

		if (device->space != record->space || end <= device->at ||
		    record->first >= device->at + device->nr_units)
			continue;
		first = record->first > device->at ?
			record->first - device->at : 0;
		last = end - device->at < device->nr_units ?
		       end - device->at : device->nr_units;
		first /= BLOCK_UNITS;
		last = (last - 1) / BLOCK_UNITS;
		if (begin)
			blocks_begin(device, first, last - first + 1);
		else
			blocks_end(device, first, last - first + 1,
				   record->kind == KIND_UNDEFINED ?
				   0 : atomic_load(&record->stamp), completed);
	}
}

struct record *write_begin(struct journal *journal, struct target *target,
			   uint64_t first, uint64_t nr, enum unit_kind kind)
{
	struct record *record;
	uint64_t slot;

	first += target->at;
	if (!range_claim(target->space, first, nr))
		return NULL;
	do {
		slot = journal->next++ % NR_RECORDS;
		record = &journal->records[slot];
	} while (atomic_load(&record->stamp) &&
		 !atomic_load(&record->completed));
	atomic_store(&record->stamp, 0);
	atomic_store(&record->completed, 0);
	record->space = target->space;
	record->first = first;
	record->nr = nr;
	record->kind = kind;
	for_each_device(record, true, 0);
	journal->begun_ns[slot] = now_ns();
	atomic_fetch_add(&journal->nr, 1);
	atomic_store(&record->stamp, tick());
	return record;
}

void write_end(struct journal *journal, struct target *target,
	       struct record *record)
{
	uint64_t stamp = atomic_load(&record->stamp), completed, ns;
	uint64_t i;

	/*
	 * First the content, then the clock: whoever reads the clock and copies
	 * the content afterwards has every write that completed before.
	 */
	for (i = record->first; i < record->first + record->nr; i++)
		atomic_store_explicit(&record->space->done[i],
				      stamp << KIND_BITS | record->kind,
				      memory_order_relaxed);
	completed = tick();
	atomic_store(&record->completed, completed);
	for_each_device(record, false, completed);
	range_release(target->space, record->first, record->nr);

	ns = now_ns() - journal->begun_ns[record - journal->records];
	raise_to(&world.slowest_write_ns, ns);
	atomic_fetch_add(&world.nr_writes, 1);
	switch (record->kind) {
	case KIND_DATA:
		atomic_fetch_add(&world.bytes_written,
				 record->nr << UNIT_SHIFT);
		break;
	case KIND_ZERO:
		atomic_fetch_add(&world.nr_zeroes, 1);
		break;
	case KIND_UNDEFINED:
		atomic_fetch_add(&world.nr_discards, 1);
		break;
	}
}

static uint64_t unit_mix(struct space *space, uint64_t unit, uint64_t stamp)
{
	return stamp * MIX_STAMP + (unit << 8 | space->id) * MIX_UNIT;
}

void fill_units(void *buffer, struct space *space, uint64_t first, uint64_t nr,
		uint64_t stamp)
{
	uint64_t *word = buffer;
	uint64_t unit;
	unsigned int i;

	for (unit = first; unit < first + nr; unit++, word += UNIT_WORDS) {
		uint64_t mix = unit_mix(space, unit, stamp);

		word[0] = MAGIC;
		word[1] = stamp;
		word[2] = unit << 8 | space->id;
		for (i = HEADER_WORDS; i < UNIT_WORDS; i++)
			word[i] = mix + i * MIX_WORD;
	}
}

static enum content unit_content(const uint64_t *word, struct space *space,
				 uint64_t unit, uint64_t *stamp)
{
	uint64_t mix, wrong = 0;
	unsigned int i;

	*stamp = 0;
	if (word[0] == MAGIC && word[2] == (unit << 8 | space->id)) {
		mix = unit_mix(space, unit, word[1]);
		for (i = HEADER_WORDS; i < UNIT_WORDS; i++)
			wrong |= word[i] ^ (mix + i * MIX_WORD);
		if (wrong)
			return CONTENT_OTHER;
		*stamp = word[1];
		return CONTENT_STAMPED;
	}
	for (i = 0; i < UNIT_WORDS; i++)
		wrong |= word[i];
	return wrong ? CONTENT_OTHER : CONTENT_ZERO;
}

struct view *view_begin(struct space *space)
{
	struct view *view = zeroed(1, sizeof(*view));
	uint64_t i;

	view->space = space;
	view->before = zeroed(space->nr_units, sizeof(*view->before));
	view->heads = zeroed(space->nr_units, sizeof(*view->heads));
	for (i = 0; i < space->nr_units; i++)
		view->before[i] = atomic_load_explicit(&space->done[i],
						       memory_order_relaxed);
	return view;
}

void view_free(struct view *view)
{
	if (!view)
		return;
	free(view->before);
	free(view->heads);
	free(view->nodes);
	free(view);
}

static void view_add(struct view *view, const struct record *seen,
		     uint64_t stamp, uint64_t completed)
{
	uint64_t unit;

	for (unit = seen->first; unit < seen->first + seen->nr; unit++) {
		uint32_t *link = &view->heads[unit];
		struct view_node *node;

		if (stamp <= view->before[unit] >> KIND_BITS)
			continue;
		if (view->nr_nodes == view->max_nodes) {
			uint64_t max = view->max_nodes ? 2 * view->max_nodes :
							 4096;

			view->nodes = realloc(view->nodes,
					      max * sizeof(*view->nodes));
			if (!view->nodes)
				give_up("no memory");
			view->max_nodes = max;
		}
		while (*link && view->nodes[*link - 1].stamp < stamp)
			link = &view->nodes[*link - 1].next;
		node = &view->nodes[view->nr_nodes++];
		node->stamp = stamp;
		node->completed = completed ? completed : NEVER;
		node->kind = seen->kind;
		node->next = *link;
		*link = view->nr_nodes;
	}
}

void journals_note(uint64_t *journal_numbers)
{
	uint32_t i;

	for (i = 0; i < nr_journals; i++)
		journal_numbers[i] = atomic_load(&journals[i]->nr);
}

bool views_complete(struct view **views, uint32_t nr, uint64_t begun,
		    uint64_t returned, const uint64_t *journal_numbers)
{
	uint32_t i, j, k;

	for (i = 0; i < nr_journals; i++) {
		struct journal *journal = journals[i];

		for (j = 0; j < NR_RECORDS; j++) {
			struct record *record = &journal->records[j], seen;
			uint64_t stamp = atomic_load(&record->stamp);
			uint64_t completed = atomic_load(&record->completed);

			if (!stamp || stamp >= returned ||
			    (completed && completed <= begun))
				continue;
			seen.space = record->space;
			seen.first = record->first;
			seen.nr = record->nr;
			seen.kind = record->kind;
			/* Reused meanwhile: see below. */
			if (atomic_load(&record->stamp) != stamp)
				continue;
			for (k = 0; k < nr; k++)
				if (views[k]->space == seen.space)
					view_add(views[k], &seen, stamp,
						 completed);
		}
	}
	/* A journal that has gone round may have lost what was needed. */
	for (i = 0; i < nr_journals; i++)
		if (atomic_load(&journals[i]->nr) - journal_numbers[i] >
		    NR_RECORDS / 2)
			return false;
	return true;
}

static bool unit_matches(enum unit_kind kind, uint64_t stamp,
			 enum content content, uint64_t shown)
{
	switch (kind) {
	case KIND_DATA:
		return content == CONTENT_STAMPED && shown == stamp;
	case KIND_ZERO:
		return content == CONTENT_ZERO;
	case KIND_UNDEFINED:
		return content == CONTENT_ZERO ||
		       (content == CONTENT_STAMPED && shown < stamp);
	}
	return false;
}

static size_t describe_candidate(char *to, size_t room, enum unit_kind kind,
				 uint64_t stamp, uint64_t completed)
{
	static const char * const kinds[] = {
		[KIND_DATA] = "write", [KIND_ZERO] = "zeroes",
		[KIND_UNDEFINED] = "discard",
	};
	int len = snprintf(to, room, " %s %llu..", kinds[kind],
			   (unsigned long long)stamp);

	if (completed == NEVER)
		len += snprintf(to + len, room - len, "open");
	else if (completed)
		len += snprintf(to + len, room - len, "%llu",
				(unsigned long long)completed);
	return len;
}

static void report_unit(struct view *view, struct instant *instant,
			const char *image, uint64_t unit,
			enum content content, uint64_t shown,
			const uint64_t *word)
{
	uint64_t before = view->before[unit];
	char expected[512], found[128];
	uint32_t link;
	size_t len;

	len = describe_candidate(expected, sizeof(expected),
				 before & KIND_MASK, before >> KIND_BITS, 0);
	for (link = view->heads[unit]; link && len < sizeof(expected) - 80;
	     link = view->nodes[link - 1].next)
		len += describe_candidate(expected + len, sizeof(expected) - len,
					  view->nodes[link - 1].kind,
					  view->nodes[link - 1].stamp,
					  view->nodes[link - 1].completed);
	if (content == CONTENT_STAMPED)
		snprintf(found, sizeof(found), "write %llu",
			 (unsigned long long)shown);
	else if (content == CONTENT_ZERO)
		snprintf(found, sizeof(found), "zeroes");
	else
		snprintf(found, sizeof(found), "%016llx %016llx %016llx",
			 (unsigned long long)word[0],
			 (unsigned long long)word[1],
			 (unsigned long long)word[2]);
	violation(instant->step,
		  "%s shows of %s, unit %llu (byte %llu of it): found %s, expected one of%s; the take was between %llu and %llu",
		  image, view->space->name, (unsigned long long)unit,
		  (unsigned long long)unit << UNIT_SHIFT, found, expected,
		  (unsigned long long)instant->from,
		  (unsigned long long)instant->until);
}

static bool narrow(struct view *view, struct instant *instant,
		   const char *image, uint64_t unit, uint64_t from,
		   uint64_t until)
{
	if (from > instant->from) {
		instant->from = from;
		snprintf(instant->from_what, sizeof(instant->from_what),
			 "%s, unit %llu of %s, shows a write of then", image,
			 (unsigned long long)unit, view->space->name);
	}
	if (until < instant->until) {
		instant->until = until;
		snprintf(instant->until_what, sizeof(instant->until_what),
			 "%s, unit %llu of %s, lacks a write completed then",
			 image, (unsigned long long)unit, view->space->name);
	}
	if (instant->from <= instant->until)
		return true;
	violation(instant->step,
		  "no instant: not before %llu (%s), not after %llu (%s)",
		  (unsigned long long)instant->from, instant->from_what,
		  (unsigned long long)instant->until, instant->until_what);
	return false;
}

static bool unit_check(struct view *view, struct instant *instant,
		       const char *image, uint64_t unit, const uint64_t *word)
{
	uint64_t stamp = view->before[unit] >> KIND_BITS, shown;
	enum unit_kind kind = view->before[unit] & KIND_MASK;
	enum content content = unit_content(word, view->space, unit, &shown);
	uint64_t from = 0, until = NEVER;
	bool matched = unit_matches(kind, stamp, content, shown);
	bool previous = matched;
	uint32_t link;

	for (link = view->heads[unit]; link;
	     link = view->nodes[link - 1].next) {
		struct view_node *node = &view->nodes[link - 1];
		bool matches = unit_matches(node->kind, node->stamp, content,
					    shown);

		if (matches) {
			if (!matched)
				from = node->stamp;
			until = NEVER;
		} else if (previous) {
			until = node->completed;
		}
		matched |= matches;
		previous = matches;
	}
	if (!matched) {
		report_unit(view, instant, image, unit, content, shown, word);
		return false;
	}
	return narrow(view, instant, image, unit, from, until);
}

bool view_check(struct view *view, struct instant *instant, const char *image,
		uint64_t first, uint64_t nr, const void *data)
{
	const uint64_t *word = data;
	uint64_t i;

	for (i = 0; i < nr; i++, word += UNIT_WORDS)
		if (!unit_check(view, instant, image, first + i, word))
			return false;
	atomic_fetch_add(&world.nr_units_checked, nr);
	return true;
}
