// SPDX-License-Identifier: Apache-2.0
/*
 * Preloaded into a program, it kills that program as SIGKILL does, at a chosen
 * one of the calls that make up the begin of a backup: KILL_AT=3 kills it
 * before the third. KILL_LOG names a file that gets a line for each call.
 * KILL_FILE names a file that may come later: when it holds "rename 1", the
 * program is killed before its second rename from then on.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <linux/fs.h>
#include <linux/fiemap.h>
#include <linux/stillblock.h>

static atomic_uint calls;

/* Ends the program if the file asks for it; else counts this call there. */
static void ask_file(const char *path, const char *name)
{
	char wanted[32];
	unsigned int skip;
	FILE *file = fopen(path, "r+");

	if (!file)
		return;
	if (fscanf(file, "%31s %u", wanted, &skip) == 2 &&
	    !strcmp(wanted, name)) {
		if (!skip)
			raise(SIGKILL);
		rewind(file);
		fprintf(file, "%s %u\n", wanted, skip - 1);
	}
	fclose(file);
}

static void step(const char *name, unsigned long detail)
{
	const char *path = getenv("KILL_FILE");
	const char *at = getenv("KILL_AT"), *log = getenv("KILL_LOG");
	unsigned int number = atomic_fetch_add(&calls, 1) + 1;
	char line[64];
	int fd;

	if (path)
		ask_file(path, name);
	if (log) {
		fd = open(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
		snprintf(line, sizeof(line), "%u %s %lx\n", number, name,
			 detail);
		if (fd < 0 || write(fd, line, strlen(line)) < 0)
			abort();
		close(fd);
	}
	if (at && number == strtoul(at, NULL, 10))
		raise(SIGKILL);
}

int ioctl(int fd, unsigned long request, ...)
{
	int (*next)(int, unsigned long, ...) = dlsym(RTLD_NEXT, "ioctl");
	void *argument;
	va_list args;

	va_start(args, request);
	argument = va_arg(args, void *);
	va_end(args);
	if (_IOC_TYPE(request) == STILLBLOCK_IOC_MAGIC ||
	    request == FS_IOC_FIEMAP)
		step("ioctl", request);
	return next(fd, request, argument);
}

int fallocate(int fd, int mode, off_t offset, off_t length)
{
	int (*next)(int, int, off_t, off_t) = dlsym(RTLD_NEXT, "fallocate");

	step("fallocate", length);
	return next(fd, mode, offset, length);
}

/* The same, by the name that 64-bit offsets have been given. */
int fallocate64(int fd, int mode, off64_t offset, off64_t length)
{
	return fallocate(fd, mode, offset, length);
}

int fsync(int fd)
{
	int (*next)(int) = dlsym(RTLD_NEXT, "fsync");

	step("fsync", 0);
	return next(fd);
}

int rename(const char *from, const char *to)
{
	int (*next)(const char *, const char *) = dlsym(RTLD_NEXT, "rename");

	step("rename", 0);
	return next(from, to);
}

int unlink(const char *path)
{
	int (*next)(const char *) = dlsym(RTLD_NEXT, "unlink");

	step("unlink", 0);
	return next(path);
}
