/* The file server of a guest: directories of the host, over the guest's channel, as FUSE.
 *
 *   bulkhead-files FD NODES ID=PATH:MS[o] [ID=PATH:MS[o]…]
 *
 * On the socket FD it is sent FUSE frames (frames.h) by the monitor and answers with FUSE_REPLY. ID
 * is the mount's, PATH the directory that it shows, MS for how long the guest may keep what it has
 * seen; "o" is for one that nobody else writes: its locks are the guest's own affair. NODES is how many files a guest may know at a time. It ends with the socket.
 *
 * It runs in a jail with nothing but those directories and its own descriptors in /proc; what is
 * shown read-only is mounted read-only there. The guest is hostile: memory, descriptors and time
 * that it can take are bounded, a request that is none ends it.
 */
#define _GNU_SOURCE
#include "files.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>

int proc_fds = -1;
uint32_t nodes_max;
static struct share shares[SHARES_MAX];
static unsigned share_count;
static struct buffer input, output;
static int channel;

__attribute__((format(printf, 1, 2))) static _Noreturn void fail(const char *format, ...)
{
    va_list list;
    va_start(list, format);
    vdprintf(2, format, list);
    va_end(list);
    dprintf(2, "\n");
    exit(1);
}

void answer(struct share *share, uint64_t unique, int error, const void *bytes, size_t size)
{
    struct fuse_out_header head = {.len = (uint32_t)(sizeof head + size), .error = -error, .unique = unique};
    frame_add2(&output, H_FUSE_REPLY, share->id, 0, &head, sizeof head, bytes, size);
}

/* All that is to be said is said before more is heard: so nothing piles up. */
static void flush(void)
{
    struct pollfd p = {channel, POLLOUT, 0};
    while (buffer_size(&output)) {
        int error = buffer_flush(&output, channel);
        if (error)
            exit(0); /* the monitor has gone */
        if (buffer_size(&output))
            poll(&p, 1, -1);
    }
}

static void on_request(struct share *share)
{
    struct fuse_in_header in;
    size_t size = buffer_size(&share->request);
    const char *bytes = share->request.bytes + share->request.start;
    if (size < sizeof in)
        fail("the guest sent what is no request");
    memcpy(&in, bytes, sizeof in);
    if (in.len != size)
        fail("the guest sent a request of another size than it says");
    struct request r = {share, &in, bytes + sizeof in, size - sizeof in};
    serve_request(&r);
    flush();
    buffer_take(&share->request, size);
}

static void on_frame(const struct frame *f, const char *bytes)
{
    struct share *share = NULL;
    for (unsigned i = 0; i < share_count; i++)
        if (shares[i].id == f->id)
            share = &shares[i];
    if (f->type != G_FUSE || !share)
        fail("a frame of type %u for mount %u", f->type, f->id);
    if (buffer_size(&share->request) + f->length > FUSE_REQUEST_MAX)
        fail("the guest sent a request that is too long");
    buffer_add(&share->request, bytes, f->length);
    if (!(f->flags & FLAG_MORE))
        on_request(share);
}

static void read_frames(void)
{
    struct frame f;
    const char *bytes;
    int whole;
    ssize_t n = buffer_read(&input, channel, 4 * FRAME_MAX);
    if (n < 0 && errno == EAGAIN)
        return;
    if (n <= 0)
        exit(0);
    while ((whole = frame_peek(&input, &f, &bytes)) > 0) {
        on_frame(&f, bytes);
        buffer_take(&input, sizeof f + f.length);
    }
    if (whole < 0)
        fail("not a frame");
}

static void add_share(char *text)
{
    char *path = strchr(text, '='), *ms = strrchr(text, ':');
    if (!path || !ms || ms < path || share_count == SHARES_MAX)
        fail("usage: bulkhead-files FD NODES ID=PATH:MS...");
    *path++ = *ms++ = 0;
    struct share *share = &shares[share_count++];
    *share = (struct share){.id = (uint32_t)strtoul(text, NULL, 10), .valid_ms = (uint32_t)strtoul(ms, NULL, 10),
                            .own = ms[strspn(ms, "0123456789")] == 'o'};
    int error = add_root(share, path);
    if (error)
        fail("%s: %s", path, strerror(error));
}

int main(int argc, char **argv)
{
    if (argc < 4)
        fail("usage: bulkhead-files FD NODES ID=PATH:MS...");
    channel = atoi(argv[1]);
    nodes_max = (uint32_t)strtoul(argv[2], NULL, 10);
    proc_fds = open("/proc/self/fd", O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (proc_fds < 0 || fcntl(channel, F_SETFL, fcntl(channel, F_GETFL) | O_NONBLOCK) < 0)
        fail("%s: %s", proc_fds < 0 ? "/proc/self/fd" : "the channel", strerror(errno));
    for (int i = 3; i < argc; i++)
        add_share(argv[i]);
    umask(0);
    signal(SIGPIPE, SIG_IGN);
    for (;;) {
        struct pollfd p = {channel, POLLIN, 0};
        int wait = retry_locks();
        flush();
        if (poll(&p, 1, wait) > 0)
            read_frames();
    }
}
