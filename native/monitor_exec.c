/* `bulkhead-monitor exec`: one more process in a guest, for whom this one stands; and what it shares
 * with monitor.c.
 */
#define _GNU_SOURCE
#include "monitor.h"

#include <poll.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <termios.h>

#define FAREWELL_MS 20000

uint64_t now_ms(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

void put_json(FILE *file, const char *text, size_t size)
{
    fputc('"', file);
    for (size_t i = 0; i < size; i++) {
        unsigned char c = (unsigned char)text[i];
        if (c < 0x20 || c == '"' || c == '\\' || c >= 0x7f)
            fprintf(file, "\\u%04x", c);
        else
            fputc(c, file);
    }
    fputc('"', file);
}

void send_packet(int fd, enum frame_type type, uint32_t id, uint32_t arg, const void *payload, size_t size)
{
    struct buffer b = {0};
    frame_add(&b, type, id, arg, payload, size);
    if (fd >= 0 && send(fd, b.bytes, buffer_size(&b), MSG_NOSIGNAL | MSG_DONTWAIT) < 0 && errno == EMSGSIZE)
        fprintf(stderr, "bulkhead-monitor: a packet is too large\n");
    buffer_free(&b);
}

int connect_to(const char *path, int type, int seconds)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    uint64_t until = now_ms(CLOCK_MONOTONIC) + (uint64_t)seconds * 1000;
    int fd = socket(AF_UNIX, type | SOCK_CLOEXEC, 0);
    if (strlen(path) >= sizeof address.sun_path || fd < 0)
        fail("%s: %s", path, fd < 0 ? strerror(errno) : "the name is too long");
    strcpy(address.sun_path, path);
    while (connect(fd, (struct sockaddr *)&address, sizeof address)) {
        if ((errno != ENOENT && errno != ECONNREFUSED && errno != EINTR && errno != EAGAIN) || now_ms(CLOCK_MONOTONIC) > until)
            fail("%s: %s", path, strerror(errno));
        poll(NULL, 0, 5);
    }
    return fd;
}

void read_frames(const char *path, struct buffer *into)
{
    int fd = path ? open(path, O_RDONLY | O_CLOEXEC) : 10;
    ssize_t n = fd < 0 ? -1 : 1;
    while (n > 0 && buffer_size(into) <= 4 * MESSAGE_MAX)
        n = buffer_read(into, fd, FRAME_MAX);
    if (n != 0)
        fail("the frames: %s", n < 0 ? strerror(errno) : "too many");
    close(fd);
}

void make_raw(int fd)
{
    struct termios t;
    if (tcgetattr(fd, &t))
        return;
    cfmakeraw(&t);
    tcsetattr(fd, TCSANOW, &t);
}

int catch_signals(void)
{
    sigset_t all;
    sigfillset(&all);
    for (const int *s = (const int[]){SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT, 0}; *s; s++)
        sigdelset(&all, *s);
    sigprocmask(SIG_SETMASK, &all, NULL);
    int fd = signalfd(-1, &all, SFD_CLOEXEC | SFD_NONBLOCK);
    if (fd < 0)
        fail("signalfd: %s", strerror(errno));
    return fd;
}

/* --- exec -------------------------------------------------------------------------------------- */

static void send_run(int fd, const struct buffer *frames)
{
    struct buffer rest = *frames;
    struct frame f;
    const char *bytes;
    int streams[3] = {0, 1, 2}, first = 1;
    union { struct cmsghdr align; char bytes[CMSG_SPACE(sizeof streams)]; } control = {0};
    while (frame_peek(&rest, &f, &bytes) > 0 && f.type == H_RUN) {
        struct iovec iov = {rest.bytes + rest.start, sizeof f + f.length};
        struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};
        if (first) {
            msg.msg_control = control.bytes;
            msg.msg_controllen = sizeof control.bytes;
            struct cmsghdr *c = CMSG_FIRSTHDR(&msg);
            c->cmsg_level = SOL_SOCKET;
            c->cmsg_type = SCM_RIGHTS;
            c->cmsg_len = CMSG_LEN(sizeof streams);
            memcpy(CMSG_DATA(c), streams, sizeof streams);
        }
        if (sendmsg(fd, &msg, MSG_NOSIGNAL) < 0)
            fail("the guest's monitor: %s", strerror(errno));
        first = 0;
        rest.start += sizeof f + f.length;
    }
    if (first || buffer_size(&rest))
        fail("the frames: not one RUN");
}

static void send_size(int fd, uint32_t id)
{
    struct winsize size;
    if (!ioctl(2, TIOCGWINSZ, &size) && size.ws_row && size.ws_col)
        send_packet(fd, H_RESIZE, id, (uint32_t)size.ws_row << 16 | size.ws_col, NULL, 0);
}

static void on_signals(int signals, int fd, uint32_t id)
{
    struct signalfd_siginfo info;
    while (read(signals, &info, sizeof info) == sizeof info)
        if (info.ssi_signo == SIGWINCH)
            send_size(fd, id);
        else if (info.ssi_signo != SIGCHLD && info.ssi_signo != SIGPIPE)
            send_packet(fd, H_SIGNAL, id, info.ssi_signo == KILL_SIGNAL ? SIGKILL : info.ssi_signo, NULL, 0);
}

/* One packet of the monitor; -1, or the code to end with. A member's guest may end under it. */
static int on_packet(int fd, int *reporter, int member)
{
    static char packet[sizeof(struct frame) + FRAME_MAX];
    struct frame f;
    ssize_t n = recv(fd, packet, sizeof packet, 0);
    if (n < (ssize_t)sizeof f && member && *reporter < 0)
        return 128 + SIGKILL;
    if (n < (ssize_t)sizeof f)
        fail("the guest's monitor has ended");
    memcpy(&f, packet, sizeof f);
    switch (f.type) {
    case G_STARTED:
        send_packet(*reporter, G_STARTED, f.id, f.arg, packet + sizeof f, (size_t)n - sizeof f);
        close_fd(reporter);
        send_size(fd, f.id);
        return -1;
    case G_FAILED:
        if (*reporter < 0)
            dprintf(2, "bulkhead-monitor: it did not start: %s\n", strerror((int)f.arg));
        send_packet(*reporter, G_FAILED, f.id, f.arg, packet + sizeof f, (size_t)n - sizeof f);
        return f.arg == EACCES ? 126 : f.arg == ENOENT ? 127 : FAILED_CODE;
    case G_EXITED: return WIFSIGNALED(f.arg) ? 128 + WTERMSIG(f.arg) : WEXITSTATUS(f.arg);
    default: return -1;
    }
}

/* The monitor undoes a member's set-up when its process has ended: until then its disk is in use. */
static void await_farewell(int fd)
{
    char packet[sizeof(struct frame) + 4096];
    struct pollfd set = {fd, POLLIN, 0};
    struct frame f = {0};
    while (poll(&set, 1, FAREWELL_MS) > 0 && recv(fd, packet, sizeof packet, 0) >= (ssize_t)sizeof f) {
        memcpy(&f, packet, sizeof f);
        if (f.type == G_DONE || f.type == G_FAILED)
            return;
    }
}

int exec_main(const struct options *given)
{
    struct buffer frames = {0};
    struct frame f;
    const char *bytes;
    read_frames(given->frames, &frames);
    if (frame_peek(&frames, &f, &bytes) <= 0)
        fail("the frames: not one RUN");
    int signals = catch_signals(), code = -1;
    int reporter = given->report ? connect_to(given->report, SOCK_SEQPACKET, 10) : -1;
    int fd = given->channel ? atoi(given->channel) : connect_to(given->socket, SOCK_SEQPACKET, 10);
    make_raw(0);
    send_run(fd, &frames);
    /* The monitor has them now; 2 stays for messages and for a terminal's size. */
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);
    if (null < 0 || dup2(null, 0) < 0 || dup2(null, 1) < 0)
        fail("/dev/null: %s", strerror(errno));
    while (code < 0) {
        struct pollfd set[] = {{fd, POLLIN, 0}, {signals, POLLIN, 0}};
        if (poll(set, 2, -1) < 0)
            continue;
        if (set[1].revents)
            on_signals(signals, fd, f.id);
        if (set[0].revents)
            code = on_packet(fd, &reporter, given->member);
    }
    if (given->member)
        await_farewell(fd);
    return code;
}
