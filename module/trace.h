/* SPDX-License-Identifier: GPL-2.0-only */
#undef TRACE_SYSTEM
#define TRACE_SYSTEM stillblock

#if !defined(STILLBLOCK_TRACE_H) || defined(TRACE_HEADER_MULTI_READ)
#define STILLBLOCK_TRACE_H

#include <linux/tracepoint.h>

/* A write waits: for the gate, or for its old data to be preserved. */
TRACE_EVENT(stillblock_hold,
	TP_PROTO(u64 tracker, sector_t sector, u64 nr_sect, int mode),
	TP_ARGS(tracker, sector, nr_sect, mode),
	TP_STRUCT__entry(
		__field(u64, tracker)
		__field(u64, sector)
		__field(u64, nr_sect)
		__field(int, mode)
	),
	TP_fast_assign(
		__entry->tracker = tracker;
		__entry->sector = sector;
		__entry->nr_sect = nr_sect;
		__entry->mode = mode;
	),
	TP_printk("tracker %llu sector %llu + %llu mode %d", __entry->tracker,
		  __entry->sector, __entry->nr_sect, __entry->mode)
);

DECLARE_EVENT_CLASS(stillblock_range,
	TP_PROTO(u64 tracker, sector_t sector, u64 nr_sect),
	TP_ARGS(tracker, sector, nr_sect),
	TP_STRUCT__entry(
		__field(u64, tracker)
		__field(u64, sector)
		__field(u64, nr_sect)
	),
	TP_fast_assign(
		__entry->tracker = tracker;
		__entry->sector = sector;
		__entry->nr_sect = nr_sect;
	),
	TP_printk("tracker %llu sector %llu + %llu", __entry->tracker,
		  __entry->sector, __entry->nr_sect)
);

/* A write that was held goes on. */
DEFINE_EVENT(stillblock_range, stillblock_release,
	TP_PROTO(u64 tracker, sector_t sector, u64 nr_sect),
	TP_ARGS(tracker, sector, nr_sect)
);

/* Old data is being read from the origin, to be preserved. */
DEFINE_EVENT(stillblock_range, stillblock_preserve,
	TP_PROTO(u64 tracker, sector_t sector, u64 nr_sect),
	TP_ARGS(tracker, sector, nr_sect)
);

/* A snapshot fails: enum stillblock_reason. */
TRACE_EVENT(stillblock_fail,
	TP_PROTO(u32 reason),
	TP_ARGS(reason),
	TP_STRUCT__entry(
		__field(u32, reason)
	),
	TP_fast_assign(
		__entry->reason = reason;
	),
	TP_printk("reason %u", __entry->reason)
);

#endif /* STILLBLOCK_TRACE_H */

#undef TRACE_INCLUDE_PATH
#undef TRACE_INCLUDE_FILE
#define TRACE_INCLUDE_PATH .
#define TRACE_INCLUDE_FILE trace
#include <trace/define_trace.h>
