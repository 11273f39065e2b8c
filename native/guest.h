/* What guest.c, guest_boot.c, guest_files.c and guest_tool.c share. */
#ifndef BULKHEAD_GUEST_H
#define BULKHEAD_GUEST_H

#include "frames.h"

#include <fcntl.h>
#include <unistd.h>

extern int kmsg; /* the kernel's log, or -1 */
extern int setup_failed;
extern struct buffer outbox; /* to the monitor */

/* To the kernel's log and, once there is a channel, to the monitor. */
__attribute__((format(printf, 1, 2))) void say(const char *format, ...);

/* The other role, of one that is not process 1 (guest_tool.c); its exit code. */
int tool_main(int argc, char **argv);

/* Load modules, make the root; 1. */
int boot(void);

/* The channel, raw and non-blocking, or -1. */
int open_channel(const char *wanted);

/* FAILED, of what was never tried. */
void refuse(uint32_t id, int error, const char *text);

/* A place in the poll set, -1 if there is none, and what came of it. */
int want(int fd, short events);
short got(int at);

void on_fuse_mount(const struct frame *f, const char *bytes, size_t size);
void on_fuse_reply(const struct frame *f, const char *bytes);
void drop_mount(uint32_t id);
void on_read(const struct frame *f, const char *bytes);

/* The host's bytes come by a disk instead (guest_ring.c); the channel then only says how many. */
void open_ring(const char *device);
int ring_is_open(void);

/* What has been announced, into `b`: bytes, 0 at the channel's end, -1 with errno; `*bells` is how often. */
ssize_t ring_read(struct buffer *b, int line, uint32_t *bells);

/* Every request of a mount fails from now on. */
void drop_mounts(void);

/* Await requests of the mounts, unless the queue is `full`; pass on those that came. */
void want_mounts(int full);
void serve_mounts(void);

static inline void close_fd(int *fd)
{
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

static inline int no_block(int fd) { return fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK); }

#endif
