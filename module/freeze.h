/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef STILLBLOCK_FREEZE_H
#define STILLBLOCK_FREEZE_H

#include <linux/types.h>

struct stb_freeze;

struct stb_freeze *stb_freeze_prepare(u64 fds, u32 nr, u32 *reason,
				      u32 *culprit);
int stb_freeze_all(struct stb_freeze *f, unsigned long deadline, u32 *reason,
		   u32 *culprit);
void stb_freeze_end(struct stb_freeze *f);

#endif /* STILLBLOCK_FREEZE_H */
