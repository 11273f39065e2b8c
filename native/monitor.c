/* The host's side of a guest, inside the guest's jail.
 *
 *   bulkhead-monitor run [OPTION...] -- VMM [ARGUMENT...]
 *       Starts the VMM with the guest's channel as descriptor 9, sends the frames that were made
 *       for it, connects its own standard streams to the guest's main process, and ends as that
 *       does: with its exit code, or 128 + signal; 125 if the guest itself failed.
 *       --frames FILE   (else descriptor 10) set-up, FUSE mounts, one main RUN, maybe a SHUTDOWN,
 *                       which is sent when the main process has ended (without it the VMM is killed)
 *       --socket PATH   listen for exec and for the engine; SEQPACKET, a packet is a frame
 *       --report PATH   connect and send one STARTED or FAILED; SEQPACKET
 *       --files PATH    connect to the server of FUSE mounts; SOCK_STREAM of frames
 *       --detail FILE   how it ended, as JSON
 *       --clone         the guest was booted before: speak first
 *       --boot-seconds N   how long the guest may take to its HELLO (120)
 *       --window N      at most N bytes that the guest has not told to have read (TAKEN): for
 *                       user-mode-linux, whose serial line is dead once it was too full
 *       Signals are passed on to the main process, 63 as SIGKILL.
 *   bulkhead-monitor exec --socket PATH [--frames FILE] [--report PATH]
 *       Runs one more process: hands its own standard streams to the monitor, ends as it does.
 *
 * The guest is hostile: what it sends is bounded by credits, and a frame out of place ends it.
 */
#define _GNU_SOURCE
#include "monitor.h"

#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>

#define QUEUE_FULL (512u << 10)
#define FILES_FULL (4u << 20)
#define CLIENTS_MAX 64u
#define REQUESTS_MAX 512u
#define CHUNK 32768u
#define KILL_SIGNAL 63 /* the real-time signal by which the workload is killed, not the guest */
#define FIRST_CLIENT_ID 0x10000u
#define VMM_CHANNEL 9

enum stage { BOOTING, GREETING, RUNNING, ENDING };

struct output { int fd, ended, at; struct buffer bytes; uint32_t unacked, flushed; };

struct client { int fd, dead, at, fds[3], nfds; struct buffer run; struct client *next; };

struct process {
    uint32_t id, owner_id, mode, in_credit, status;
    int started, exited, told, in, at_in;
    struct output out[2];
    struct client *owner;
    struct process *next;
};

/* An answer that is expected: to a set-up program, a mount, or a client's READ. */
struct request { uint32_t id, owner_id; int is_mount, done; struct client *owner; struct request *next; };

static struct { const char *frames, *socket, *report, *files, *detail; int clone; long boot_seconds, window; char **vmm; } options = {.boot_seconds = 120, .window = LONG_MAX};
static size_t under_way; /* bytes the guest has not told to have read */
static struct buffer script, from_guest, to_guest, from_files, to_files, last_words;
static struct client *clients;
static struct process *processes, *main_process;
static struct request *requests;
static enum stage stage;
static struct hello greeting;
static pid_t vmm;
static int guest = -1, files = -1, listener = -1, report = -1, signals = -1, console = -1;
static int vmm_ended, late, exit_code = FAILED_CODE;
static unsigned client_count, request_count, process_count;
static uint64_t deadline; /* of the stage, or for the streams' ends; 0: none */
static uint32_t next_id = FIRST_CLIENT_ID;
static char console_tail[16384];
static size_t console_size;

static void *need(void *memory)
{
    if (!memory)
        abort();
    return memory;
}

/* --- the end ---------------------------------------------------------------------------------- */

static void write_detail(const char *reason, const char *text)
{
    char path[4096];
    snprintf(path, sizeof path, "%s.new", options.detail ? options.detail : "");
    FILE *file = options.detail ? fopen(path, "we") : NULL;
    if (!file)
        return;
    fprintf(file, "{\"reason\":\"%s\",\"code\":%d,\"wait_status\":%u,\"text\":", reason, exit_code,
            main_process ? main_process->status : 0);
    put_json(file, text, strlen(text));
    fprintf(file, ",\"console\":");
    put_json(file, console_tail, console_size);
    fprintf(file, "}\n");
    if (!fclose(file))
        rename(path, options.detail);
}

static void report_refusal(int fd, uint32_t id, int error, const char *text)
{
    char payload[sizeof(struct failed) + 512];
    struct failed f = {.kind = FAILED_REFUSED};
    size_t size = strnlen(text, 512);
    memcpy(payload, &f, sizeof f);
    memcpy(payload + sizeof f, text, size);
    send_packet(fd, G_FAILED, id, (uint32_t)error, payload, sizeof f + size);
}

static _Noreturn void leave(const char *reason, const char *text)
{
    if (vmm > 0) {
        kill(vmm, SIGKILL);
        while (waitpid(vmm, NULL, 0) < 0 && errno == EINTR)
            ;
    }
    write_detail(reason, text);
    exit(exit_code);
}

_Noreturn void fail(const char *format, ...)
{
    char text[600];
    va_list list;
    va_start(list, format);
    vsnprintf(text, sizeof text, format, list);
    va_end(list);
    /* What a client reads by is the report; the streams get it too if the workload had begun. */
    if (stage == ENDING)
        leave("exited", text);
    if (report >= 0)
        report_refusal(report, 0, EIO, text);
    else
        dprintf(2, "bulkhead-monitor: %s\n", text);
    exit_code = FAILED_CODE;
    leave("failed", text);
}

/* The main process has ended and everything it wrote is out. */
static void finish(void)
{
    uint32_t status = main_process->status;
    exit_code = WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
    if (!buffer_size(&last_words) || vmm_ended || guest < 0)
        leave("exited", "");
    buffer_add(&to_guest, last_words.bytes + last_words.start, buffer_size(&last_words));
    stage = ENDING;
    deadline = now_ms(CLOCK_MONOTONIC) + 10000;
}

static void remember(const char *bytes, size_t size)
{
    if (size > sizeof console_tail) {
        bytes += size - sizeof console_tail;
        size = sizeof console_tail;
    }
    size_t kept = console_size + size > sizeof console_tail ? sizeof console_tail - size : console_size;
    memmove(console_tail, console_tail + console_size - kept, kept);
    memcpy(console_tail + kept, bytes, size);
    console_size = kept + size;
}

/* --- what is known ---------------------------------------------------------------------------- */

static struct process *find_process(uint32_t id)
{
    for (struct process *p = processes; p; p = p->next)
        if (p->id == id)
            return p;
    return NULL;
}

static struct request *find_request(uint32_t id)
{
    for (struct request *r = requests; r; r = r->next)
        if (r->id == id)
            return r;
    return NULL;
}

static struct process *add_process(uint32_t id, uint32_t mode, const int *fds)
{
    struct process *p = need(calloc(1, sizeof *p));
    *p = (struct process){.id = id, .mode = mode, .in = fds[0], .in_credit = WINDOW, .at_in = -1, .next = processes};
    for (int i = 0; i < 2; i++)
        p->out[i] = (struct output){.fd = fds[i + 1], .at = -1};
    for (int i = 0; i < 3; i++)
        no_block(fds[i]);
    processes = p;
    process_count++;
    return p;
}

static struct request *add_request(uint32_t id, struct client *owner, uint32_t owner_id, int is_mount)
{
    struct request *r = need(calloc(1, sizeof *r));
    *r = (struct request){.id = id, .owner = owner, .owner_id = owner_id, .is_mount = is_mount, .next = requests};
    requests = r;
    request_count++;
    return r;
}

static void free_request(struct request *r)
{
    struct request **at = &requests;
    while (*at != r)
        at = &(*at)->next;
    *at = r->next;
    free(r);
    request_count--;
}

static void free_process(struct process *p)
{
    struct process **at = &processes;
    while (*at != p)
        at = &(*at)->next;
    *at = p->next;
    close_fd(&p->in);
    for (int i = 0; i < 2; i++) {
        close_fd(&p->out[i].fd);
        buffer_free(&p->out[i].bytes);
    }
    free(p);
    process_count--;
}

/* --- streams ----------------------------------------------------------------------------------- */

static void give_credit(struct process *p, int i)
{
    struct output *o = &p->out[i];
    uint32_t stream = (uint32_t)i + 1;
    if (!o->flushed || o->ended || (o->flushed < CHUNK && buffer_size(&o->bytes)))
        return;
    frame_add(&to_guest, H_CREDIT, p->id, o->flushed, &stream, sizeof stream);
    o->unacked -= o->flushed;
    o->flushed = 0;
}

static void flush_output(struct process *p, int i)
{
    struct output *o = &p->out[i];
    size_t before = buffer_size(&o->bytes);
    if (o->fd < 0 || buffer_flush(&o->bytes, o->fd)) {
        buffer_free(&o->bytes); /* nobody reads it */
        close_fd(&o->fd);
    }
    o->flushed += (uint32_t)(before - buffer_size(&o->bytes));
    give_credit(p, i);
    if (o->ended && !buffer_size(&o->bytes))
        close_fd(&o->fd);
}

static void read_input(struct process *p)
{
    char bytes[CHUNK];
    ssize_t n = read(p->in, bytes, p->in_credit < CHUNK ? p->in_credit : CHUNK);
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (n > 0) {
        frame_add(&to_guest, H_STDIN, p->id, 0, bytes, (size_t)n);
        p->in_credit -= (uint32_t)n;
        return;
    }
    close_fd(&p->in);
    frame_add(&to_guest, H_STDIN_EOF, p->id, 0, NULL, 0);
}

static int flushed(const struct process *p) { return !buffer_size(&p->out[0].bytes) && !buffer_size(&p->out[1].bytes); }

static int streams_ended(const struct process *p) { return p->out[0].ended && (p->mode == MODE_TERMINAL || p->out[1].ended); }

static void send_resize(void)
{
    struct winsize size;
    if (!ioctl(2, TIOCGWINSZ, &size) && size.ws_row && size.ws_col)
        frame_add(&to_guest, H_RESIZE, main_process->id, (uint32_t)size.ws_row << 16 | size.ws_col, NULL, 0);
}

/* --- frames of the guest ----------------------------------------------------------------------- */

static void on_out(struct process *p, const struct frame *f, const char *bytes)
{
    if (!p || !p->started || f->arg < 1 || f->arg > (p->mode == MODE_TERMINAL ? 1u : 2u) || !f->length)
        fail("the guest broke the protocol: output of no process");
    struct output *o = &p->out[f->arg - 1];
    if (o->ended || f->length > WINDOW - o->unacked)
        fail("the guest broke the protocol: more output than it has credit for");
    o->unacked += f->length;
    buffer_add(&o->bytes, bytes, f->length);
    flush_output(p, (int)f->arg - 1);
    if (p->exited && p == main_process)
        deadline = now_ms(CLOCK_MONOTONIC) + 2000;
}

static void on_eof(struct process *p, const struct frame *f)
{
    if (!p || f->arg > 2)
        fail("the guest broke the protocol: an end of no stream");
    if (f->arg == 0) {
        close_fd(&p->in);
        return;
    }
    p->out[f->arg - 1].ended = 1;
    flush_output(p, (int)f->arg - 1);
}

static void on_started(struct process *p, const struct frame *f)
{
    if (!p || p->started)
        fail("the guest broke the protocol: no such process was to start");
    p->started = 1;
    if (p->owner)
        send_packet(p->owner->fd, G_STARTED, p->owner_id, f->arg, NULL, 0);
    if (p != main_process)
        return;
    send_packet(report, G_STARTED, p->id, f->arg, NULL, 0);
    close_fd(&report);
    if (p->mode == MODE_TERMINAL)
        send_resize();
}

static void on_exited(struct process *p, const struct frame *f)
{
    if (!p || !p->started || p->exited || f->arg > 0xffff)
        fail("the guest broke the protocol: the end of no process");
    p->exited = 1;
    p->status = f->arg;
    if (p == main_process)
        deadline = now_ms(CLOCK_MONOTONIC) + 2000;
}

static void on_failed(struct process *p, struct request *r, const struct frame *f, const char *bytes)
{
    struct client *owner = p ? p->owner : r ? r->owner : NULL;
    if ((!p && !r) || (p && p->started) || f->length < sizeof(struct failed) || f->length > 4096)
        fail("the guest broke the protocol: the failure of nothing");
    if (owner)
        send_packet(owner->fd, G_FAILED, p ? p->owner_id : r->owner_id, f->arg, bytes, f->length);
    if (!(p ? p->owner_id : r->owner_id)) { /* of the script */
        send_packet(report, G_FAILED, f->id, f->arg, bytes, f->length);
        leave("not started", "");
    }
    if (p)
        free_process(p);
    else
        free_request(r);
}

static void on_answer(struct request *r, const struct frame *f, const char *bytes)
{
    if (!r || r->done)
        fail("the guest broke the protocol: an answer to nothing");
    if (r->owner)
        send_packet(r->owner->fd, f->type, r->owner_id, f->arg, bytes, f->length);
    r->done = 1;
    if (!r->is_mount)
        free_request(r);
}

static void on_credit(struct process *p, const struct frame *f)
{
    if (!p || f->arg > WINDOW - p->in_credit)
        fail("the guest broke the protocol: credit for nothing");
    p->in_credit += f->arg;
}

static void on_fuse(struct request *r, const struct frame *f, const char *bytes)
{
    if (!r || !r->is_mount)
        fail("the guest broke the protocol: a request to no mount");
    if (files < 0)
        return;
    buffer_add(&to_files, f, sizeof *f);
    buffer_add(&to_files, bytes, f->length);
}

static void greet(void)
{
    greeting.realtime_ns = now_ms(CLOCK_REALTIME) * 1000000;
    if (getrandom(greeting.nonce, sizeof greeting.nonce, 0) < 0 || getrandom(greeting.entropy, sizeof greeting.entropy, 0) < 0)
        fail("getrandom: %s", strerror(errno));
    frame_add(&to_guest, H_HELLO, 0, PROTOCOL_VERSION, &greeting, sizeof greeting);
    memset(greeting.entropy, 0, sizeof greeting.entropy);
    stage = GREETING;
}

static void on_hello(const struct frame *f, const char *bytes)
{
    if (f->length < sizeof greeting.nonce || f->arg != PROTOCOL_VERSION)
        fail("the guest speaks another version of the protocol");
    if (stage == BOOTING)
        greet();
    else if (stage == GREETING && !memcmp(bytes, greeting.nonce, sizeof greeting.nonce)) {
        stage = RUNNING;
        deadline = 0;
        under_way = 0; /* the greeting was read */
        buffer_add(&to_guest, script.bytes + script.start, buffer_size(&script));
        buffer_free(&script);
    } else if (stage != GREETING)
        fail("the guest broke the protocol: it began anew");
}

static void on_guest_frame(const struct frame *f, const char *bytes)
{
    struct process *p = find_process(f->id);
    struct request *r = find_request(f->id);
    if (f->flags && f->type != G_FUSE)
        fail("the guest broke the protocol: a fragment");
    if (f->type == G_LOG)
        remember(bytes, f->length);
    else if (f->type == G_TAKEN)
        under_way -= f->arg < under_way ? f->arg : under_way;
    else if (f->type == G_HELLO)
        on_hello(f, bytes);
    else if (stage == BOOTING)
        fail("the guest broke the protocol: no greeting");
    else if (stage == GREETING)
        return; /* said before it was greeted */
    else
        switch (f->type) {
        case G_STARTED: on_started(p, f); break;
        case G_FAILED: on_failed(p, r, f, bytes); break;
        case G_DONE:
        case G_DATA: on_answer(r, f, bytes); break;
        case G_OUT: on_out(p, f, bytes); break;
        case G_EOF: on_eof(p, f); break;
        case G_EXITED: on_exited(p, f); break;
        case G_CREDIT: on_credit(p, f); break;
        case G_FUSE: on_fuse(r, f, bytes); break;
        default: fail("the guest broke the protocol: a frame of type %u", f->type);
        }
}

static void read_guest(void)
{
    struct frame f;
    const char *bytes;
    int whole = 0;
    ssize_t n = buffer_read(&from_guest, guest, 2 * FRAME_MAX);
    if (n < 0 && errno == EAGAIN)
        return;
    if (n <= 0) {
        close_fd(&guest);
        return;
    }
    while ((whole = frame_peek(&from_guest, &f, &bytes)) > 0) {
        on_guest_frame(&f, bytes);
        buffer_take(&from_guest, sizeof f + f.length);
    }
    if (whole < 0)
        fail("the guest broke the protocol: not a frame");
}

static void write_guest(void)
{
    size_t most = (size_t)options.window - under_way, left = most;
    if (buffer_flush_some(&to_guest, guest, &left))
        buffer_free(&to_guest); /* its end will be read */
    under_way += most - left;
}

/* --- the file server --------------------------------------------------------------------------- */

static void read_files(void)
{
    struct frame f;
    const char *bytes;
    int whole;
    ssize_t n = buffer_read(&from_files, files, 2 * FRAME_MAX);
    if (n < 0 && errno == EAGAIN)
        return;
    while (n > 0 && (whole = frame_peek(&from_files, &f, &bytes)) > 0) {
        if (f.type != H_FUSE_REPLY || !find_request(f.id))
            fail("the file server sent a frame of type %u", f.type);
        buffer_add(&to_guest, from_files.bytes + from_files.start, sizeof f + f.length);
        buffer_take(&from_files, sizeof f + f.length);
    }
    if (n <= 0 || whole < 0)
        fail("the file server ended");
}

/* --- clients ----------------------------------------------------------------------------------- */

static uint32_t new_id(void)
{
    do
        next_id = next_id == UINT32_MAX ? FIRST_CLIENT_ID : next_id + 1;
    while (find_process(next_id) || find_request(next_id));
    return next_id;
}

static void on_client_run(struct client *c, const struct frame *f)
{
    struct run r;
    size_t size = buffer_size(&c->run);
    const char *bytes = c->run.bytes + c->run.start;
    if (size >= sizeof r)
        memcpy(&r, bytes, sizeof r);
    int streams = size >= sizeof r && r.mode != MODE_SETUP;
    if (size < sizeof r || stage != RUNNING || (streams && c->nfds != 3) || process_count >= PROCESSES_MAX - 8
        || request_count >= REQUESTS_MAX || !f->id) {
        report_refusal(c->fd, f->id, EAGAIN, "the monitor cannot run that now");
        buffer_free(&c->run);
        return;
    }
    uint32_t id = new_id();
    if (streams) {
        struct process *p = add_process(id, r.mode, c->fds);
        p->owner = c;
        p->owner_id = f->id;
        c->nfds = 0;
    } else
        add_request(id, c, f->id, 0);
    frame_add(&to_guest, H_RUN, id, 0, bytes, size);
    buffer_free(&c->run);
}

static void on_client_frame(struct client *c, const struct frame *f, const char *bytes)
{
    struct process *p = processes;
    switch (f->type) {
    case H_RUN:
        if (buffer_size(&c->run) + f->length > MESSAGE_MAX) {
            c->dead = 1;
            return;
        }
        buffer_add(&c->run, bytes, f->length);
        if (!(f->flags & FLAG_MORE))
            on_client_run(c, f);
        return;
    case H_READ:
        if (!f->id || stage != RUNNING || request_count >= REQUESTS_MAX)
            report_refusal(c->fd, f->id, EAGAIN, "the monitor cannot read that now");
        else
            frame_add(&to_guest, H_READ, add_request(new_id(), c, f->id, 0)->id, 0, bytes, f->length);
        return;
    case H_SIGNAL:
    case H_RESIZE: /* of its own processes; id 0 and SIGNAL: of everything */
        while (p && (p->owner != c || p->owner_id != f->id))
            p = p->next;
        if ((p || (!f->id && f->type == H_SIGNAL)) && stage == RUNNING)
            frame_add(&to_guest, f->type, p ? p->id : 0, f->arg, NULL, 0);
        return;
    default: c->dead = 1;
    }
}

static void read_client(struct client *c)
{
    static _Alignas(16) char packet[sizeof(struct frame) + FRAME_MAX];
    union { struct cmsghdr align; char bytes[CMSG_SPACE(sizeof(int) * 3)]; } control;
    struct iovec iov = {packet, sizeof packet};
    struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1,
                         .msg_control = control.bytes, .msg_controllen = sizeof control.bytes};
    struct frame f;
    ssize_t n = recvmsg(c->fd, &msg, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    struct cmsghdr *h = n < 0 ? NULL : CMSG_FIRSTHDR(&msg);
    if (h && h->cmsg_level == SOL_SOCKET && h->cmsg_type == SCM_RIGHTS) {
        int fds[3], count = (int)((h->cmsg_len - CMSG_LEN(0)) / sizeof(int));
        memcpy(fds, CMSG_DATA(h), sizeof(int) * (size_t)count);
        for (int i = 0; i < count; i++)
            if (c->nfds < 3)
                c->fds[c->nfds++] = fds[i];
            else
                close(fds[i]);
    }
    if (n < (ssize_t)sizeof f || msg.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) {
        c->dead = 1;
        return;
    }
    memcpy(&f, packet, sizeof f);
    if (f.length != (size_t)n - sizeof f || f.zero || f.flags & ~FLAG_MORE)
        c->dead = 1;
    else
        on_client_frame(c, &f, packet + sizeof f);
}

static void accept_client(void)
{
    int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK), size = 1 << 20;
    if (fd < 0)
        return;
    setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
    struct client *c = need(calloc(1, sizeof *c));
    *c = (struct client){.fd = fd, .at = -1, .next = clients};
    clients = c;
    client_count++;
}

/* What a client that has gone had asked for ends; its processes are killed. */
static void forget_client(struct client *c)
{
    for (struct process *p = processes; p; p = p->next)
        if (p->owner == c) {
            p->owner = NULL;
            close_fd(&p->in);
            close_fd(&p->out[0].fd);
            close_fd(&p->out[1].fd);
            flush_output(p, 0);
            flush_output(p, 1);
            if (!p->exited)
                frame_add(&to_guest, H_SIGNAL, p->id, SIGKILL, NULL, 0);
        }
    for (struct request *r = requests; r; r = r->next)
        if (r->owner == c)
            r->owner = NULL;
    struct client **at = &clients;
    while (*at != c)
        at = &(*at)->next;
    *at = c->next;
    for (int i = 0; i < c->nfds; i++)
        close(c->fds[i]);
    buffer_free(&c->run);
    close(c->fd);
    free(c);
    client_count--;
}

/* --- beginning --------------------------------------------------------------------------------- */

static void listen_at(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    listener = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (listener < 0 || strlen(path) >= sizeof address.sun_path)
        fail("%s: %s", path, listener < 0 ? strerror(errno) : "the name is too long");
    strcpy(address.sun_path, path);
    unlink(path);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || chmod(path, 0600) || listen(listener, 64))
        fail("%s: %s", path, strerror(errno));
}

/* Its own streams under other numbers, so that the ends of pipes are really closed with them; 2
 * stays for messages, and as what a terminal is asked by. */
static const int *own_streams(void)
{
    static int fds[3];
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);
    for (int i = 0; i < 3; i++)
        if ((fds[i] = fcntl(i, F_DUPFD_CLOEXEC, 20)) < 0 || null < 0)
            fail("stream %d: %s", i, strerror(errno));
    dup2(null, 0);
    dup2(null, 1);
    close(null);
    return fds;
}

/* What the script will be answered by. A SHUTDOWN at its end is kept for the end. */
static void learn_script(void)
{
    struct buffer all = script;
    struct frame f;
    struct run r;
    const char *bytes;
    int whole, first = 1;
    while ((whole = frame_peek(&all, &f, &bytes)) > 0) {
        size_t size = sizeof f + f.length;
        if (f.type == H_SHUTDOWN) {
            buffer_add(&last_words, all.bytes + all.start, size);
            script.end = all.start;
            break;
        }
        if (f.type == H_FUSE_MOUNT)
            add_request(f.id, NULL, 0, 1);
        else if (f.type == H_RUN && first) {
            if (f.length < sizeof r)
                fail("the frames: a RUN is too short");
            memcpy(&r, bytes, sizeof r);
            if (r.mode == MODE_SETUP)
                add_request(f.id, NULL, 0, 0);
            else if (main_process)
                fail("the frames: two main programs");
            else
                main_process = add_process(f.id, r.mode, own_streams());
        }
        first = f.type != H_RUN || !(f.flags & FLAG_MORE);
        all.start += size;
    }
    if (whole < 0 || !main_process || (whole == 0 && buffer_size(&all)))
        fail("the frames: not whole, or without a main program");
}

static void start_vmm(void)
{
    int pair[2], output[2], null = open("/dev/null", O_RDWR | O_CLOEXEC);
    sigset_t none;
    if (null < 0 || socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) || pipe2(output, O_CLOEXEC))
        fail("the VMM's channel: %s", strerror(errno));
    pid_t parent = getpid();
    vmm = fork();
    if (vmm < 0)
        fail("the VMM: %s", strerror(errno));
    if (!vmm) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        sigemptyset(&none);
        sigprocmask(SIG_SETMASK, &none, NULL);
        setsid();
        if (getppid() != parent || dup2(null, 0) < 0 || dup2(output[1], 1) < 0 || dup2(output[1], 2) < 0)
            _exit(127);
        if (pair[1] == VMM_CHANNEL ? fcntl(VMM_CHANNEL, F_SETFD, 0) : dup2(pair[1], VMM_CHANNEL) < 0)
            _exit(127);
        execv(options.vmm[0], options.vmm);
        dprintf(2, "%s: %s\n", options.vmm[0], strerror(errno));
        _exit(127);
    }
    close(pair[1]);
    close(output[1]);
    close(null);
    guest = pair[0];
    console = output[0];
    no_block(guest);
    no_block(console);
}

/* --- the loop ----------------------------------------------------------------------------------- */

static struct pollfd set[3 * PROCESSES_MAX + CLIENTS_MAX + 8];
static unsigned set_size;

static int want(int fd, int wanted, short events)
{
    if (fd < 0 || !wanted || set_size == sizeof set / sizeof *set)
        return -1;
    set[set_size] = (struct pollfd){fd, events, 0};
    return (int)set_size++;
}

static short got(int at) { return at < 0 ? 0 : set[at].revents; }

static void on_signals(void)
{
    struct signalfd_siginfo info;
    while (read(signals, &info, sizeof info) == sizeof info) {
        uint32_t signal = info.ssi_signo;
        if (signal == SIGCHLD || signal == SIGPIPE)
            continue;
        if (signal == SIGWINCH) {
            if (main_process->started)
                send_resize();
        } else if (main_process->started)
            frame_add(&to_guest, H_SIGNAL, main_process->id, signal == KILL_SIGNAL ? SIGKILL : signal, NULL, 0);
        else if (signal != SIGCONT && signal != SIGURG) {
            exit_code = 128 + (int)signal; /* nothing of the workload runs yet */
            leave("not started", "ended by a signal before it had started");
        }
    }
    int status;
    for (pid_t pid; (pid = waitpid(-1, &status, WNOHANG)) > 0;)
        if (pid == vmm) {
            vmm = 0;
            vmm_ended = 1;
            if (stage == ENDING)
                leave("exited", "");
            deadline = now_ms(CLOCK_MONOTONIC) + 2000; /* what it has said is still read */
        }
}

static void read_console(void)
{
    char bytes[4096];
    ssize_t n = read(console, bytes, sizeof bytes);
    if (n > 0)
        remember(bytes, (size_t)n);
    else if (n == 0)
        close_fd(&console);
}

/* News for who asked, and what is over. */
static void settle(int expired)
{
    if (expired) {
        late = 1;
        deadline = 0;
    }
    for (struct process *p = processes, *next; p; p = next) {
        next = p->next;
        if (!p->exited || !flushed(p))
            continue;
        if (p->owner && !p->told)
            send_packet(p->owner->fd, G_EXITED, p->owner_id, p->status, NULL, 0);
        p->told = 1;
        if (p == main_process) {
            if (stage != ENDING && (streams_ended(p) || (late && !deadline) || guest < 0))
                finish();
        } else if (streams_ended(p))
            free_process(p);
    }
    for (struct client *c = clients, *next; c; c = next) {
        next = c->next;
        if (c->dead)
            forget_client(c);
    }
    if (guest < 0 && stage == ENDING)
        leave("exited", "");
    if (guest < 0 && !main_process->exited)
        fail("the guest ended%s", vmm_ended ? "" : " its channel");
    if (!expired)
        return;
    if (stage < RUNNING && !vmm_ended)
        fail("the guest did not answer within %ld s", options.boot_seconds);
    if (stage == ENDING)
        leave("exited", "the guest did not end by itself");
    if (!main_process->exited)
        fail("the guest ended");
}

static void wait_for_events(void)
{
    int space = buffer_size(&to_guest) < QUEUE_FULL;
    uint64_t now = now_ms(CLOCK_MONOTONIC);
    set_size = 0;
    want(signals, 1, POLLIN);
    want(guest, 1, (short)((buffer_size(&to_files) < FILES_FULL ? POLLIN : 0) | (buffer_size(&to_guest) && under_way < (size_t)options.window ? POLLOUT : 0)));
    if (guest < 0)
        set[set_size++] = (struct pollfd){-1, 0, 0};
    want(files, 1, (short)((space ? POLLIN : 0) | (buffer_size(&to_files) ? POLLOUT : 0)));
    if (files < 0)
        set[set_size++] = (struct pollfd){-1, 0, 0};
    int at_console = want(console, 1, POLLIN), at_listener = want(listener, client_count < CLIENTS_MAX, POLLIN);
    for (struct client *c = clients; c; c = c->next)
        c->at = want(c->fd, space, POLLIN);
    for (struct process *p = processes; p; p = p->next) {
        p->at_in = want(p->in, space && p->started && p->in_credit, POLLIN);
        for (int i = 0; i < 2; i++)
            p->out[i].at = want(p->out[i].fd, buffer_size(&p->out[i].bytes) > 0, POLLOUT);
    }
    int timeout = !deadline ? -1 : deadline > now ? (int)(deadline - now) : 0;
    if (poll(set, set_size, timeout) < 0)
        for (unsigned i = 0; i < set_size; i++)
            set[i].revents = 0;
    if (got(at_console))
        read_console();
    if (got(at_listener))
        accept_client();
}

static void serve(void)
{
    wait_for_events();
    short on_signal = set[0].revents, on_guest = set[1].revents, on_files = set[2].revents;
    for (struct process *p = processes; p; p = p->next) {
        if (got(p->at_in))
            read_input(p);
        for (int i = 0; i < 2; i++)
            if (got(p->out[i].at))
                flush_output(p, i);
    }
    for (struct client *c = clients; c; c = c->next) {
        if (got(c->at))
            read_client(c);
        c->at = -1;
    }
    if (on_guest & POLLOUT)
        write_guest();
    if (on_guest & (POLLIN | POLLHUP | POLLERR))
        read_guest();
    if (on_files & POLLOUT && buffer_flush(&to_files, files))
        fail("the file server: %s", strerror(errno));
    if (on_files & (POLLIN | POLLHUP | POLLERR))
        read_files();
    if (on_signal)
        on_signals();
    settle(deadline && now_ms(CLOCK_MONOTONIC) >= deadline);
}

static _Noreturn void run_main(void)
{
    if (options.report)
        report = connect_to(options.report, SOCK_SEQPACKET, 10);
    read_frames(options.frames, &script);
    signals = catch_signals();
    learn_script();
    if (main_process->mode == MODE_TERMINAL)
        make_raw(main_process->in);
    if (options.files) {
        files = connect_to(options.files, SOCK_STREAM, 30);
        no_block(files);
    }
    if (options.socket)
        listen_at(options.socket);
    start_vmm();
    deadline = now_ms(CLOCK_MONOTONIC) + (uint64_t)options.boot_seconds * 1000;
    if (options.clone)
        greet();
    for (;;)
        serve();
}

static _Noreturn void usage(void)
{
    dprintf(2, "usage: bulkhead-monitor run [OPTION...] -- VMM [ARGUMENT...]\n"
               "       bulkhead-monitor exec --socket PATH [--frames FILE] [--report PATH]\n");
    exit(FAILED_CODE);
}

int main(int argc, char **argv)
{
    const struct { const char *name, **value; } texts[] = {
        {"--frames", &options.frames}, {"--socket", &options.socket}, {"--report", &options.report},
        {"--files", &options.files}, {"--detail", &options.detail}};
    const char *seconds = NULL, *window = NULL;
    int i = 2;
    for (; i < argc && strcmp(argv[i], "--"); i++) {
        const char **value = !strcmp(argv[i], "--boot-seconds") ? &seconds
                             : !strcmp(argv[i], "--window")   ? &window
                                                              : NULL;
        for (size_t k = 0; k < sizeof texts / sizeof *texts; k++)
            if (!strcmp(argv[i], texts[k].name))
                value = texts[k].value;
        if (!strcmp(argv[i], "--clone"))
            options.clone = 1;
        else if (!value || i + 1 >= argc)
            usage();
        else
            *value = argv[++i];
    }
    options.boot_seconds = seconds ? strtol(seconds, NULL, 10) : 120;
    if (window && (options.window = strtol(window, NULL, 10)) < 1)
        usage();
    options.vmm = argv + i + 1;
    if (argc > 2 && !strcmp(argv[1], "exec") && options.socket)
        return exec_main(options.socket, options.frames, options.report);
    if (argc < 3 || strcmp(argv[1], "run") || i + 1 >= argc)
        usage();
    run_main();
}
