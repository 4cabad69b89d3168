/* SPDX-License-Identifier: GPL-2.0-only WITH Linux-syscall-note */
/*
 * Static assertions on the layout of <linux/stillblock.h>, compiled by the
 * module (C) and by the addon (C++): if either compiler disagrees with the
 * other about a structure, the build stops.
 */
#ifndef _UAPI_LINUX_STILLBLOCK_ASSERT_H
#define _UAPI_LINUX_STILLBLOCK_ASSERT_H

#include <linux/stillblock.h>

#ifdef __KERNEL__
#include <linux/build_bug.h>
#elif !defined(__cplusplus)
#include <assert.h>
#endif

#define STILLBLOCK_ASSERT_SIZE(type, size) \
	static_assert(sizeof(struct type) == (size), #type)

STILLBLOCK_ASSERT_SIZE(stillblock_info, 40);
STILLBLOCK_ASSERT_SIZE(stillblock_attach, 216);
STILLBLOCK_ASSERT_SIZE(stillblock_detach, 16);
STILLBLOCK_ASSERT_SIZE(stillblock_tracker, 80);
STILLBLOCK_ASSERT_SIZE(stillblock_place, 80);
STILLBLOCK_ASSERT_SIZE(stillblock_list, 16);
STILLBLOCK_ASSERT_SIZE(stillblock_mark, 32);
STILLBLOCK_ASSERT_SIZE(stillblock_extent, 16);
STILLBLOCK_ASSERT_SIZE(stillblock_store, 32);
STILLBLOCK_ASSERT_SIZE(stillblock_take, 64);
STILLBLOCK_ASSERT_SIZE(stillblock_state, 64);
STILLBLOCK_ASSERT_SIZE(stillblock_image, 112);
STILLBLOCK_ASSERT_SIZE(stillblock_map, 32);
STILLBLOCK_ASSERT_SIZE(stillblock_add_store, 40);
STILLBLOCK_ASSERT_SIZE(stillblock_event, 24);

#endif /* _UAPI_LINUX_STILLBLOCK_ASSERT_H */
