/* What comes in from the guest, from the file server and from clients, and the streams between.
 *
 * The guest is hostile: each of its frames is checked against what was asked of it and against its
 * credits; one that is out of place ends it. Memory for what it sends is bounded by the window of
 * each stream, by FILES_FULL, and by the sizes of frames.
 */
#define _GNU_SOURCE
#include "monitor.h"

#include <poll.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/random.h>
#include <sys/socket.h>

static struct buffer from_guest;
static struct hello greeting;
static uint32_t next_id = FIRST_CLIENT_ID;
static int ring = -1;      /* the file of native/guest_ring.c */
static size_t ring_at;
static unsigned bells;     /* that the guest has not told to have heard */

static int bells_left(void) { return bells < BELLS_MAX; }

static void *need(void *memory)
{
    if (!memory)
        abort();
    return memory;
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

struct process *add_process(uint32_t id, uint32_t mode, const int *fds)
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

struct request *add_request(uint32_t id, struct client *owner, uint32_t owner_id, int is_mount)
{
    struct request *r = need(calloc(1, sizeof *r));
    *r = (struct request){.id = id, .owner = owner, .owner_id = owner_id, .is_mount = is_mount, .next = requests};
    requests = r;
    request_count++;
    return r;
}

struct server *add_server(int fd, struct client *owner)
{
    if (no_block(fd) || fcntl(fd, F_SETFD, FD_CLOEXEC))
        fail("the file server's socket: %s", strerror(errno));
    struct server *s = need(calloc(1, sizeof *s));
    *s = (struct server){.fd = fd, .at = -1, .owner = owner, .next = servers};
    servers = s;
    server_count++;
    for (struct request *r = requests; r && !owner; r = r->next)
        if (r->is_mount)
            r->server = s;
    return s;
}

/* Requests of its mounts are not passed on any more; the guest is told to fail them. */
static void free_server(struct server *s)
{
    struct server **at = &servers;
    while (*at != s)
        at = &(*at)->next;
    *at = s->next;
    for (struct request *r = requests; r; r = r->next)
        if (r->server == s) {
            r->server = NULL;
            r->owner = NULL;
            r->dropped = r->done ? 1 : 2;
            r->done = 0;
            frame_add(&to_guest, H_FUSE_DROP, r->id, 0, NULL, 0);
        }
    if (s->owner)
        s->owner->server = NULL;
    close(s->fd);
    buffer_free(&s->to);
    buffer_free(&s->from);
    free(s);
    server_count--;
}

int files_full(void)
{
    for (struct server *s = servers; s; s = s->next)
        if (buffer_size(&s->to) >= FILES_FULL)
            return 1;
    return 0;
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

void free_process(struct process *p)
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
    if (buffer_size(&to_guest) >= QUEUE_FULL)
        return; /* it does not read; write_guest() gives it when it does */
    frame_add(&to_guest, H_CREDIT, p->id, o->flushed, &stream, sizeof stream);
    o->unacked -= o->flushed;
    o->flushed = 0;
}

void flush_output(struct process *p, int i)
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

void read_input(struct process *p)
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

void send_resize(void)
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
    if (p->owner) /* with the id by which others may name it (a RUN's context) */
        send_packet(p->owner->fd, G_STARTED, p->owner_id, f->arg, &p->id, sizeof p->id);
    if (p != main_process)
        return;
    send_packet(report, G_STARTED, p->id, f->arg, NULL, 0);
    close_fd(&report);
    if (p->mode == MODE_TERMINAL)
        send_resize();
}

static void on_exited(struct process *p, const struct frame *f, const char *bytes)
{
    if (!p || !p->started || p->exited || f->arg > 0xffff || f->length > sizeof p->oom_kills)
        fail("the guest broke the protocol: the end of no process");
    p->exited = 1;
    p->status = f->arg;
    if (f->length == sizeof p->oom_kills)
        memcpy(&p->oom_kills, bytes, sizeof p->oom_kills);
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
    else if (!r->dropped || !--r->dropped)
        free_request(r);
}

static void end_farewell(struct client *c);

static void on_answer(struct request *r, const struct frame *f, const char *bytes)
{
    if (!r || r->done)
        fail("the guest broke the protocol: an answer to nothing");
    struct client *owner = r->owner;
    if (owner && owner->farewell_id == f->id)
        end_farewell(owner); /* before it hears of it */
    if (owner)
        send_packet(owner->fd, f->type, r->owner_id, f->arg, bytes, f->length);
    if (r->dropped ? !--r->dropped : !r->is_mount)
        free_request(r);
    else
        r->done = !r->dropped;
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
    struct frame known = *f;
    if (!r->server)
        return;
    known.id = r->owner_id ? r->owner_id : r->id;
    buffer_add(&r->server->to, &known, sizeof known);
    buffer_add(&r->server->to, bytes, f->length);
}

void greet(void)
{
    greeting.realtime_ns = now_ms(CLOCK_REALTIME) * 1000000;
    if (getrandom(greeting.nonce, sizeof greeting.nonce, 0) < 0 || getrandom(greeting.entropy, sizeof greeting.entropy, 0) < 0)
        fail("getrandom: %s", strerror(errno));
    frame_add(&to_guest, H_HELLO, 0, PROTOCOL_VERSION | (options.resume ? HELLO_KEEP : 0), &greeting, sizeof greeting);
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
        if (ring < 0)
            under_way = 0; /* the greeting was read */
        buffer_add(&to_guest, script.bytes + script.start, buffer_size(&script));
        buffer_free(&script);
    } else if (stage != GREETING)
        fail("the guest broke the protocol: it began anew");
}

static void on_taken(const struct frame *f)
{
    if (ring >= 0 && (f->arg > under_way || f->id > bells))
        fail("the guest broke the protocol: it took what was not sent");
    under_way -= f->arg < under_way ? f->arg : under_way;
    bells -= f->id < bells ? f->id : bells;
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
        on_taken(f);
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
        case G_EXITED: on_exited(p, f, bytes); break;
        case G_CREDIT: on_credit(p, f); break;
        case G_FUSE: on_fuse(r, f, bytes); break;
        default: fail("the guest broke the protocol: a frame of type %u", f->type);
        }
}

void read_guest(void)
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

/* Bytes into the ring, and the bell for them. */
static void write_ring(void)
{
    size_t size = buffer_size(&to_guest), room = RING - under_way;
    if (!bells_left() || !room)
        return;
    size = size < room ? size : room;
    for (size_t done = 0, part; done < size; done += part) {
        part = size - done < RING - ring_at ? size - done : RING - ring_at;
        if (pwrite(ring, to_guest.bytes + to_guest.start + done, part, (off_t)ring_at) != (ssize_t)part)
            fail("the ring: %s", strerror(errno));
        ring_at = (ring_at + part) % RING;
    }
    uint32_t more = (uint32_t)size;
    ssize_t n = write(guest, &more, sizeof more);
    if (n != sizeof more) { /* there is always room for the few bells that may be under way */
        if (n >= 0 || errno == EAGAIN)
            fail("the guest does not read its line");
        buffer_free(&to_guest); /* its end will be read */
        return;
    }
    buffer_take(&to_guest, size);
    under_way += size;
    bells++;
}

static void write_line(void)
{
    size_t most = (size_t)options.window - under_way, left = most;
    if (buffer_flush_some(&to_guest, guest, &left))
        buffer_free(&to_guest); /* its end will be read */
    under_way += most - left;
}

void write_guest(void)
{
    if (ring >= 0)
        write_ring();
    else
        write_line();
    for (struct process *p = processes; p; p = p->next)
        for (int i = 0; i < 2; i++)
            give_credit(p, i);
}

int may_write_guest(void)
{
    return buffer_size(&to_guest) && (ring >= 0 ? bells_left() && under_way < RING : under_way < (size_t)options.window);
}

void open_ring(const char *path)
{
    ring = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (ring < 0 || ftruncate(ring, RING))
        fail("%s: %s", path, strerror(errno));
}

/* --- file servers ------------------------------------------------------------------------------ */

/* A member's takes the member along, the script's everything. */
static void lose_server(struct server *s)
{
    if (!s->owner)
        fail("the file server ended");
    s->owner->dead = 1;
    free_server(s);
}

void flush_files(struct server *s)
{
    if (buffer_flush(&s->to, s->fd))
        lose_server(s);
}

void read_files(struct server *s)
{
    struct frame f;
    const char *bytes;
    int whole = 0;
    ssize_t n = buffer_read(&s->from, s->fd, 2 * FRAME_MAX);
    if (n < 0 && errno == EAGAIN)
        return;
    while (n > 0 && (whole = frame_peek(&s->from, &f, &bytes)) > 0) {
        struct request *r = requests;
        while (r && (r->server != s || (r->owner_id ? r->owner_id : r->id) != f.id))
            r = r->next;
        if (f.type != H_FUSE_REPLY || !r) {
            if (!s->owner)
                fail("the file server sent a frame of type %u", f.type);
            whole = -1;
            break;
        }
        f.id = r->id;
        buffer_add(&to_guest, &f, sizeof f);
        buffer_add(&to_guest, bytes, f.length);
        buffer_take(&s->from, sizeof f + f.length);
    }
    if (n <= 0 || whole < 0)
        lose_server(s);
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

static int has_process(const struct client *c)
{
    const struct process *p = processes;
    while (p && (p->owner != c || p->exited))
        p = p->next;
    return p != NULL;
}

/* It becomes a member: descriptors are what is locked until its farewell, and maybe a file server. */
static void on_client_member(struct client *c, const struct frame *f, const char *bytes)
{
    if (c->member || !f->id || buffer_size(&c->farewell) + f->length > MESSAGE_MAX || stage != RUNNING
        || (!(f->flags & FLAG_MORE) && (c->nfds < 1 || server_count == SERVERS_MAX))) {
        c->dead = 1;
        return;
    }
    buffer_add(&c->farewell, bytes, f->length);
    if (f->flags & FLAG_MORE)
        return;
    c->member = (int)f->id;
    c->lock = c->fds[0];
    if (c->nfds > 1)
        c->server = add_server(c->fds[1], c);
    if (c->nfds > 2)
        close(c->fds[2]);
    c->nfds = 0;
    send_packet(c->fd, G_DONE, f->id, 0, NULL, 0);
}

/* When it has gone, or all that it had run has ended: what undoes its set-up. */
void say_farewell(struct client *c)
{
    if (c->farewell_id || has_process(c) || (!c->left && c->fd >= 0))
        return;
    c->farewell_id = new_id();
    add_request(c->farewell_id, c, (uint32_t)c->member, 0);
    frame_add(&to_guest, H_RUN, c->farewell_id, 0, c->farewell.bytes + c->farewell.start, buffer_size(&c->farewell));
}

static void free_client(struct client *c)
{
    struct client **at = &clients;
    while (*at != c)
        at = &(*at)->next;
    *at = c->next;
    for (int i = 0; i < c->nfds; i++)
        close(c->fds[i]);
    buffer_free(&c->run);
    buffer_free(&c->farewell);
    close_fd(&c->fd);
    free(c);
    client_count--;
}

/* Nothing of the member is left in the guest. Had it failed, the lock would be kept. */
static void end_farewell(struct client *c)
{
    if (c->server)
        free_server(c->server);
    for (struct process *p = processes; p; p = p->next)
        if (p->owner == c)
            p->owner = NULL;
    for (struct request *r = requests; r; r = r->next)
        if (r->owner == c)
            r->owner = NULL;
    close_fd(&c->lock);
    c->member = 0;
    if (c->fd < 0)
        c->dead = 1;
}

static void on_client_frame(struct client *c, const struct frame *f, const char *bytes)
{
    struct process *p = processes;
    switch (f->type) {
    case H_MEMBER: on_client_member(c, f, bytes); return;
    case H_FUSE_MOUNT:
        if (!c->server || !f->id || stage != RUNNING || request_count >= REQUESTS_MAX)
            report_refusal(c->fd, f->id, EAGAIN, "the monitor cannot mount that now");
        else {
            struct request *r = add_request(new_id(), c, f->id, 1);
            r->server = c->server;
            frame_add(&to_guest, H_FUSE_MOUNT, r->id, 0, bytes, f->length);
        }
        return;
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

void read_client(struct client *c)
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

void accept_client(void)
{
    int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK), size = 1 << 20;
    if (fd < 0)
        return;
    setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
    struct client *c = need(calloc(1, sizeof *c));
    *c = (struct client){.fd = fd, .at = -1, .lock = -1, .next = clients};
    clients = c;
    client_count++;
}

/* What a client that has gone had asked for ends; its processes are killed. */
void forget_client(struct client *c)
{
    for (struct process *p = processes; p; p = p->next)
        if (p->owner == c) {
            if (!c->member)
                p->owner = NULL;
            close_fd(&p->in);
            close_fd(&p->out[0].fd);
            close_fd(&p->out[1].fd);
            flush_output(p, 0);
            flush_output(p, 1);
            if (!p->exited)
                frame_add(&to_guest, H_SIGNAL, p->id, SIGKILL, NULL, 0);
        }
    if (c->member) { /* its farewell comes when they have ended; who waits for its files must not wait */
        c->dead = 0;
        close_fd(&c->fd);
        if (c->server)
            free_server(c->server);
        return;
    }
    for (struct request *r = requests; r; r = r->next)
        if (r->owner == c)
            r->owner = NULL;
    free_client(c);
}
