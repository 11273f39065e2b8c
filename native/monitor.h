/* What monitor.c and monitor_exec.c share. */
#ifndef BULKHEAD_MONITOR_H
#define BULKHEAD_MONITOR_H

#include "frames.h"

#include <fcntl.h>
#include <stdio.h>
#include <time.h>

#define FAILED_CODE 125

/* Say what went wrong, wherever it is read, and end with FAILED_CODE. */
__attribute__((format(printf, 1, 2))) _Noreturn void fail(const char *format, ...);

/* Connect to a socket that may yet have to come into being; fail() if it does not in `seconds`. */
int connect_to(const char *path, int type, int seconds);

/* One frame as one packet; a peer that does not read loses it. */
void send_packet(int fd, enum frame_type type, uint32_t id, uint32_t arg, const void *payload, size_t size);

/* Block all signals but those of a crash; a signalfd of them. */
int catch_signals(void);

/* The terminal `fd` in raw mode, if it is one. */
void make_raw(int fd);

/* Everything in `path`, or in descriptor 10. */
void read_frames(const char *path, struct buffer *into);

int exec_main(const char *socket, const char *frames, const char *report);

void put_json(FILE *file, const char *text, size_t size);

uint64_t now_ms(clockid_t clock);

static inline void close_fd(int *fd)
{
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

static inline int no_block(int fd) { return fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK); }

#endif
