/* The guest protocol: frames between the monitor outside a guest and the init inside it.
 * src/bulkhead/boundaries/guest/frames.py is its other description, docs/guest-protocol.md the words.
 *
 * A frame is a header and at most FRAME_MAX bytes of payload, all little-endian, on a byte stream
 * (virtio port, serial line, socket). On the SEQPACKET sockets of the jail a packet is one frame.
 * A message longer than FRAME_MAX comes in fragments: all but the last have FLAG_MORE, and between
 * them there is no other frame of the same type (FUSE, FUSE_REPLY: of the same type and id).
 */
#ifndef BULKHEAD_FRAMES_H
#define BULKHEAD_FRAMES_H

#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

#define PROTOCOL_VERSION 1u
#define FRAME_MAX 65536u
#define FLAG_MORE 1u
#define HELLO_KEEP 0x80000000u /* in a HELLO's arg: the script's process goes on, see H_ADOPT */
#define WINDOW (256u << 10)   /* bytes of a stream that may be under way without a CREDIT */
#define MESSAGE_MAX (4u << 20) /* of a message put together from fragments */
#define FUSE_REQUEST_MAX ((1u << 20) + 4096u) /* a guest reads so much at once: as many FORGETs as fit */
#define PROCESSES_MAX 256u
#define FIRST_CLIENT_ID 0x10000u /* the script's ids are below; of clients nothing but theirs may fail */

enum frame_type {
    /* host to guest */
    H_HELLO = 1,   /* arg version; payload struct hello: forget everything, answer with the nonce */
    H_RUN,         /* payload struct run, program */
    H_STDIN,       /* payload bytes */
    H_STDIN_EOF,
    H_RESIZE,      /* arg rows << 16 | columns */
    H_SIGNAL,      /* arg signal; id 0: every process of the guest */
    H_CREDIT,      /* arg bytes; payload u32 stream (1 output, 2 error output) */
    H_READ,        /* payload path: answered by one DATA of at most FRAME_MAX bytes */
    H_FUSE_MOUNT,  /* id of the mount; payload target NUL options */
    H_FUSE_REPLY,  /* id of the mount; payload what is to be written to /dev/fuse */
    H_SHUTDOWN,    /* arg LINUX_REBOOT_CMD_*: end everything, write back, end the guest */
    H_ADOPT,       /* payload struct run: the process of that id, of before a HELLO_KEEP, is ours */
    H_FUSE_DROP,   /* id of the mount: its requests fail from now on; answered by DONE */
    H_MEMBER,      /* of a client, to the monitor: payload a set-up RUN, done when all of its processes have ended */
    /* guest to host */
    G_HELLO = 64,  /* arg version; payload nonce, then release NUL version NUL machine */
    G_STARTED,     /* arg pid */
    G_FAILED,      /* arg errno; payload struct failed, text */
    G_DONE,        /* a set-up program or a FUSE mount */
    G_OUT,         /* arg stream (1, 2); payload bytes */
    G_EOF,         /* arg stream (1, 2; 0: nobody reads its input any more) */
    G_EXITED,      /* arg wait status; payload u32 kills for want of memory in this guest */
    G_DATA,        /* arg errno; payload bytes */
    G_FUSE,        /* id of the mount; payload what was read from /dev/fuse */
    G_CREDIT,      /* arg bytes of input taken */
    G_LOG,         /* payload text */
    G_TAKEN,       /* arg bytes read from the channel; told on lines that must not be flooded */
};

enum run_mode { MODE_SETUP = 0, MODE_PIPES, MODE_TERMINAL };
enum failed_kind { FAILED_STEP = 1, FAILED_EXEC, FAILED_DIED, FAILED_REFUSED };

struct frame { uint32_t length; uint8_t type, flags; uint16_t zero; uint32_t id, arg; };
struct hello { uint8_t nonce[16]; uint64_t realtime_ns; uint8_t entropy[32]; };
struct run { uint32_t clone_flags, mode, context; uint16_t rows, columns; };
struct failed { uint32_t step, kind, no_interpreter; };

/* A byte queue that grows. */
struct buffer { char *bytes; size_t start, end, room; };

static inline size_t buffer_size(const struct buffer *b) { return b->end - b->start; }

static inline void buffer_free(struct buffer *b)
{
    free(b->bytes);
    memset(b, 0, sizeof *b);
}

/* Room for `size` more bytes at the end. */
static inline char *buffer_reserve(struct buffer *b, size_t size)
{
    if (b->start && (b->start == b->end || b->end + size > b->room)) {
        memmove(b->bytes, b->bytes + b->start, b->end - b->start);
        b->end -= b->start;
        b->start = 0;
    }
    if (b->end + size > b->room) {
        b->room = (b->end + size) * 2;
        b->bytes = realloc(b->bytes, b->room);
        if (!b->bytes)
            abort();
    }
    return b->bytes + b->end;
}

static inline void buffer_add(struct buffer *b, const void *bytes, size_t size)
{
    if (size)
        memcpy(buffer_reserve(b, size), bytes, size);
    b->end += size;
}

static inline void buffer_take(struct buffer *b, size_t size)
{
    b->start += size;
    if (b->start == b->end && b->room > 4 * FRAME_MAX)
        buffer_free(b); /* what a burst needed is given back */
}

/* Append a message as one frame or as fragments; `head` comes before `body` in the payload. */
static inline void frame_add2(struct buffer *b, enum frame_type type, uint32_t id, uint32_t arg,
                              const void *head, size_t head_size, const void *body, size_t size)
{
    const char *at = body;
    do {
        size_t part = size > FRAME_MAX - head_size ? FRAME_MAX - head_size : size;
        struct frame f = {.length = (uint32_t)(head_size + part), .type = (uint8_t)type,
                          .flags = part < size ? FLAG_MORE : 0, .id = id, .arg = arg};
        buffer_add(b, &f, sizeof f);
        buffer_add(b, head, head_size);
        buffer_add(b, at, part);
        head_size = 0;
        at += part;
        size -= part;
    } while (size);
}

static inline void frame_add(struct buffer *b, enum frame_type type, uint32_t id, uint32_t arg,
                             const void *payload, size_t size)
{
    frame_add2(b, type, id, arg, NULL, 0, payload, size);
}

/* The frame at the start of `b`: 1 with `f` and `payload` (valid until `b` changes), 0 if it is not
 * whole yet, -1 if it cannot be one. The caller takes sizeof *f + f->length bytes. */
static inline int frame_peek(const struct buffer *b, struct frame *f, const char **payload)
{
    if (buffer_size(b) < sizeof *f)
        return 0;
    memcpy(f, b->bytes + b->start, sizeof *f);
    if (f->length > FRAME_MAX || f->zero || f->flags & ~FLAG_MORE)
        return -1;
    *payload = b->bytes + b->start + sizeof *f;
    return buffer_size(b) >= sizeof *f + f->length;
}

/* Write what can be written now, at most `*most` bytes, which is lessened: 0, or an errno. */
static inline int buffer_flush_some(struct buffer *b, int fd, size_t *most)
{
    while (buffer_size(b) && *most) {
        ssize_t n = write(fd, b->bytes + b->start, buffer_size(b) < *most ? buffer_size(b) : *most);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return errno == EAGAIN ? 0 : errno;
        buffer_take(b, (size_t)n);
        *most -= (size_t)n;
    }
    return 0;
}

/* Write what can be written now: 0, or an errno. */
static inline int buffer_flush(struct buffer *b, int fd)
{
    size_t most = (size_t)-1;
    return buffer_flush_some(b, fd, &most);
}

/* Read once: bytes read, 0 at the end, -1 with errno. */
static inline ssize_t buffer_read(struct buffer *b, int fd, size_t most)
{
    ssize_t n;
    char *at = buffer_reserve(b, most);
    do
        n = read(fd, at, most);
    while (n < 0 && errno == EINTR);
    if (n > 0)
        b->end += (size_t)n;
    return n;
}

#endif
