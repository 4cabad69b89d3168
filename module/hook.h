/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef STILLBLOCK_HOOK_H
#define STILLBLOCK_HOOK_H

#include <linux/bio.h>
#include <linux/types.h>

struct stb_tracker;

int stb_hook_try(void);
int stb_hook_add(struct stb_tracker *t, u32 *reason);
void stb_hook_remove(struct stb_tracker *t);
void stb_hook_submit(struct bio *bio);
void stb_hook_resume(struct bio *bio, const struct stb_tracker *after);
void stb_hook_submit_write(struct bio *bio);
void stb_hook_released(struct bio *bio);
void stb_hook_quiesce(void);

#endif /* STILLBLOCK_HOOK_H */
