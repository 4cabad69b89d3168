/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef STILLBLOCK_MAIN_H
#define STILLBLOCK_MAIN_H

#include <linux/types.h>
#include <linux/workqueue.h>

/* All other work of the module; its workers make progress under memory pressure. */
extern struct workqueue_struct *stb_wq;
/* I/O to stores, and reads of images: its workers may hang as their devices do. */
extern struct workqueue_struct *stb_io_wq;
/* Freezes of file systems, which may hang for as long as their devices do. */
extern struct workqueue_struct *stb_freeze_wq;
/*
 * Thaws: with a worker of their own when there is no memory for another, since
 * what would free some may wait for the file systems to be thawed.
 */
extern struct workqueue_struct *stb_thaw_wq;

/*
 * Lock order, outermost first:
 *   control mutex > hook_mutex
 *   control mutex > cow->lock > store->lock
 *   control mutex > snapshot->lock
 *   control mutex > freeze->lock
 *   tracker->lock is taken inside the ftrace callback, under whatever locks a
 *   submitter of I/O holds: nothing but the work queue is used inside it.
 */
void stb_control_lock(void);
void stb_control_unlock(void);
void stb_assert_control(void);

int stb_dev_of_fd(int fd, dev_t *dev);

int stb_control_init(void);
void stb_control_exit(void);

#endif /* STILLBLOCK_MAIN_H */
