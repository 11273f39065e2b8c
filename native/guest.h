/* What guest.c and guest_boot.c share. */
#ifndef BULKHEAD_GUEST_H
#define BULKHEAD_GUEST_H

#include <fcntl.h>
#include <unistd.h>

extern int kmsg; /* the kernel's log, or -1 */

/* To the kernel's log and, once there is a channel, to the monitor. */
__attribute__((format(printf, 1, 2))) void say(const char *format, ...);

/* Load modules, make the root; 1. */
int boot(void);

/* The channel, raw and non-blocking, or -1. */
int open_channel(const char *wanted);

static inline void close_fd(int *fd)
{
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

static inline int no_block(int fd) { return fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK); }

#endif
