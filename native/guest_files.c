/* Files over the channel: FUSE mounts, whose requests and replies are only passed on, and READ. */
#define _GNU_SOURCE
#include "guest.h"

#include <poll.h>
#include <stdio.h>
#include <sys/mount.h>

struct mountpoint {
    uint32_t id;
    int fd, at;
    struct buffer reply;
    struct mountpoint *next;
};

static struct mountpoint *mountpoints;
static char fuse_request[FUSE_REQUEST_MAX];

void on_fuse_mount(const struct frame *f, const char *bytes, size_t size)
{
    char options[512];
    const char *target = bytes, *more = memchr(bytes, 0, size);
    int fd = open("/dev/fuse", O_RDWR | O_CLOEXEC | O_NONBLOCK);
    if (!more || bytes[size - 1] || fd < 0) {
        refuse(f->id, fd < 0 ? errno : EINVAL, "/dev/fuse");
        setup_failed |= f->id < FIRST_CLIENT_ID;
        close_fd(&fd);
        return;
    }
    snprintf(options, sizeof options, "fd=%d,rootmode=40000,user_id=0,group_id=0,%s", fd, more + 1);
    if (mount("bulkhead", target, "fuse", MS_NODEV, options)) {
        refuse(f->id, errno, target);
        setup_failed |= f->id < FIRST_CLIENT_ID;
        close(fd);
        return;
    }
    struct mountpoint *m = calloc(1, sizeof *m);
    if (!m)
        abort();
    *m = (struct mountpoint){.id = f->id, .fd = fd, .at = -1, .next = mountpoints};
    mountpoints = m;
    frame_add(&outbox, G_DONE, f->id, 0, NULL, 0);
}

static void read_fuse(struct mountpoint *m)
{
    ssize_t n = read(m->fd, fuse_request, sizeof fuse_request);
    if (n > 0)
        frame_add(&outbox, G_FUSE, m->id, 0, fuse_request, (size_t)n);
    else if (n == 0 || errno == ENODEV)
        close_fd(&m->fd); /* unmounted */
}

void on_fuse_reply(const struct frame *f, const char *bytes)
{
    struct mountpoint *m = mountpoints;
    while (m && m->id != f->id)
        m = m->next;
    if (!m || m->fd < 0 || buffer_size(&m->reply) + f->length > MESSAGE_MAX)
        return;
    buffer_add(&m->reply, bytes, f->length);
    if (f->flags & FLAG_MORE)
        return;
    /* ENOENT: who asked was interrupted and has gone. */
    if (write(m->fd, m->reply.bytes + m->reply.start, buffer_size(&m->reply)) < 0 && errno != ENOENT)
        say("a reply for /dev/fuse: %s", strerror(errno));
    buffer_take(&m->reply, buffer_size(&m->reply));
}

void on_read(const struct frame *f, const char *bytes)
{
    char path[4096], data[FRAME_MAX];
    size_t size = 0;
    ssize_t n = -1;
    snprintf(path, sizeof path, "%.*s", (int)f->length, bytes);
    int fd = f->length < sizeof path ? open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK) : -1;
    while (fd >= 0 && size < sizeof data && (n = read(fd, data + size, sizeof data - size)) > 0)
        size += (size_t)n;
    int error = n < 0 ? errno : 0;
    close_fd(&fd);
    frame_add(&outbox, G_DATA, f->id, (uint32_t)error, data, error ? 0 : size);
}

void want_mounts(int full)
{
    for (struct mountpoint *m = mountpoints; m; m = m->next)
        m->at = full ? -1 : want(m->fd, POLLIN);
}

void serve_mounts(void)
{
    for (struct mountpoint *m = mountpoints; m; m = m->next)
        if (got(m->at))
            read_fuse(m);
}

void drop_mount(uint32_t id)
{
    for (struct mountpoint **at = &mountpoints, *m; (m = *at); at = &m->next)
        if (m->id == id) {
            *at = m->next;
            close_fd(&m->fd);
            buffer_free(&m->reply);
            free(m);
            return;
        }
}

void drop_mounts(void)
{
    for (struct mountpoint *m = mountpoints; m; m = m->next)
        close_fd(&m->fd);
}
