/* The holder: one static process per engine, parent of every workload process and of the helpers.
 *
 *   bulkhead-holder SOCKET_PATH [IDLE_SECONDS]
 *
 * Descriptor 0 is /dev/null, 1 and 2 its log, 3 the listening SEQPACKET socket.
 *
 * It launches (launch.c), reaps, writes exit records, keeps second copies of pipes and terminals,
 * and starts helpers again when they end. It decides nothing else. One thread, one epoll; it waits
 * for no child and for no peer. A peer that dies, floods or speaks nonsense loses its connection.
 *
 * It ends on M_SHUTDOWN, or after IDLE_SECONDS without entries and without connections other than
 * keepers'.
 */
#define _GNU_SOURCE
#include "holder.h"
#include "launch.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define MAX_RECEIVED 253
#define MAX_QUEUED (32u << 20)
#define FLIGHTS 1024
#define NS 1000000000ull
#define HELPER_STEADY (5 * NS)
#define START_PATIENCE (60 * NS)

enum what { W_LISTEN, W_SIGNAL, W_CONN, W_ENTRY };

struct packet {
    struct packet *next;
    int nfds, fds[MAX_KEPT];
    size_t size;
    char bytes[];
};

struct conn {
    enum what what;
    int fd, keeper, dead;
    size_t queued;
    struct packet *head, **tail;
    struct conn *next;
};

struct entry {
    enum what what;
    char *id, *record, *meta;
    uint32_t meta_size;
    pid_t pid;
    int launching, reaped, failed, status;
    int channel, pidfd, nkept, kept[MAX_KEPT];
    uint64_t started, finished;
    struct progress *progress;
    struct conn *conn; /* who waits for the answer */
    uint32_t seq;
    struct entry *next;
};

struct helper {
    char *name, **argv, **env;
    int nfds, *fds, dismissed;
    pid_t pid;
    uint64_t started, due, delay;
    struct helper *next;
};

static struct conn *conns;
static struct entry *entries;
static struct helper *helpers;
static struct progress *flights;
static struct rlimit original_files;
static sigset_t no_signals;
static int epoll = -1, signals = -1, listener = -1, ending, greeted;
static const char *socket_path;
static _Alignas(16) char inbox[MAX_PACKET];

static uint64_t now(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return (uint64_t)t.tv_sec * NS + (uint64_t)t.tv_nsec;
}

static void *need(void *memory)
{
    if (!memory) {
        fprintf(stderr, "bulkhead-holder: out of memory\n");
        abort();
    }
    return memory;
}

static void close_all(int *fds, int count)
{
    for (int i = 0; i < count; i++)
        if (fds[i] >= 0)
            close(fds[i]);
}

/* Children being cloned have copies of the descriptor, and epoll forgets only with the last one. */
static void unwatch_and_close(int fd)
{
    epoll_ctl(epoll, EPOLL_CTL_DEL, fd, NULL);
    close(fd);
}

static int watch(int fd, uint32_t events, void *what)
{
    struct epoll_event e = {.events = events, .data.ptr = what};
    return epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &e);
}

/* --- sending -------------------------------------------------------------------------------- */

static ssize_t transmit(int fd, const struct iovec *iov, int count, const int *fds, int nfds)
{
    union { struct cmsghdr align; char bytes[CMSG_SPACE(sizeof(int) * MAX_KEPT)]; } control;
    struct msghdr msg = {.msg_iov = (struct iovec *)iov, .msg_iovlen = (size_t)count};
    if (nfds) {
        memset(&control, 0, sizeof control);
        msg.msg_control = control.bytes;
        msg.msg_controllen = CMSG_SPACE(sizeof(int) * (size_t)nfds);
        struct cmsghdr *c = CMSG_FIRSTHDR(&msg);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(sizeof(int) * (size_t)nfds);
        memcpy(CMSG_DATA(c), fds, sizeof(int) * (size_t)nfds);
    }
    ssize_t n;
    do
        n = sendmsg(fd, &msg, MSG_NOSIGNAL | MSG_DONTWAIT);
    while (n < 0 && errno == EINTR);
    return n;
}

/* Connections are only marked here; sweep() closes them when nobody holds a pointer. */
static void drop(struct conn *c) { c->dead = 1; }

static void arm(struct conn *c)
{
    struct epoll_event e = {.events = EPOLLIN | (c->head ? EPOLLOUT : 0u), .data.ptr = c};
    if (epoll_ctl(epoll, EPOLL_CTL_MOD, c->fd, &e))
        drop(c);
}

static void enqueue(struct conn *c, const struct iovec *iov, int count, const int *fds, int nfds)
{
    size_t size = 0;
    for (int i = 0; i < count; i++)
        size += iov[i].iov_len;
    if (c->queued + size > MAX_QUEUED) {
        drop(c);
        return;
    }
    struct packet *p = need(malloc(sizeof *p + size));
    *p = (struct packet){.size = size, .nfds = nfds};
    char *at = p->bytes;
    for (int i = 0; i < count; i++) {
        memcpy(at, iov[i].iov_base, iov[i].iov_len);
        at += iov[i].iov_len;
    }
    for (int i = 0; i < nfds; i++) {
        p->fds[i] = fcntl(fds[i], F_DUPFD_CLOEXEC, 3);
        if (p->fds[i] < 0)
            drop(c);
    }
    *c->tail = p;
    c->tail = &p->next;
    c->queued += size;
    arm(c);
}

static void send_parts(struct conn *c, const struct iovec *iov, int count, const int *fds, int nfds)
{
    if (!c || c->dead)
        return;
    if (!c->head) {
        if (transmit(c->fd, iov, count, fds, nfds) >= 0)
            return;
        if (errno != EAGAIN && errno != ENOBUFS && errno != ETOOMANYREFS) {
            drop(c);
            return;
        }
    }
    enqueue(c, iov, count, fds, nfds);
}

static void flush(struct conn *c)
{
    struct packet *p;
    while ((p = c->head)) {
        struct iovec iov = {p->bytes, p->size};
        if (transmit(c->fd, &iov, 1, p->fds, p->nfds) < 0) {
            if (errno != EAGAIN && errno != ENOBUFS && errno != ETOOMANYREFS)
                drop(c);
            return;
        }
        c->head = p->next;
        if (!c->head)
            c->tail = &c->head;
        c->queued -= p->size;
        close_all(p->fds, p->nfds);
        free(p);
    }
    arm(c);
}

static void reply(struct conn *c, uint32_t seq, int status, const char *text)
{
    struct message m = {.type = M_REPLY, .seq = seq, .status = status};
    struct iovec iov[] = {{&m, sizeof m}, {(void *)text, strlen(text)}};
    send_parts(c, iov, 2, NULL, 0);
}

/* --- entries -------------------------------------------------------------------------------- */

static struct entry *find(const char *id, size_t size)
{
    for (struct entry *e = entries; e; e = e->next)
        if (strlen(e->id) == size && !memcmp(e->id, id, size))
            return e;
    return NULL;
}

static void free_entry(struct entry *e)
{
    for (struct entry **at = &entries; *at; at = &(*at)->next)
        if (*at == e) {
            *at = e->next;
            break;
        }
    close_all(e->kept, e->nkept);
    if (e->channel >= 0)
        unwatch_and_close(e->channel);
    if (e->pidfd >= 0)
        close(e->pidfd);
    if (e->progress)
        e->progress->used = 0;
    free(e->id);
    free(e->record);
    free(e->meta);
    free(e);
}

static void tell_entry(struct conn *c, uint32_t seq, struct entry *e)
{
    struct message m = {.type = M_ENTRY, .seq = seq};
    struct entry_info info = {.pid = e->pid, .wait_status = e->status, .running = !e->reaped,
                              .started_ns = e->started, .finished_ns = e->finished,
                              .id = (uint32_t)strlen(e->id), .meta = e->meta_size};
    struct iovec iov[] = {{&m, sizeof m}, {&info, sizeof info}, {e->id, info.id}, {e->meta, info.meta}};
    send_parts(c, iov, 4, NULL, 0);
}

static void give(struct conn *c, struct entry *e)
{
    int fds[MAX_KEPT], n = 0;
    struct message m = {.type = M_ADOPT};
    struct adopt a = {.pid = e->pid, .running = !e->reaped, .id = (uint32_t)strlen(e->id), .meta = e->meta_size};
    for (int i = 0; i < e->nkept; i++)
        if (e->kept[i] >= 0) {
            a.index[n] = (uint8_t)i;
            fds[n++] = e->kept[i];
        }
    if (!n)
        return;
    a.fds = (uint32_t)n;
    struct iovec iov[] = {{&m, sizeof m}, {&a, sizeof a}, {e->id, a.id}, {e->meta, a.meta}};
    send_parts(c, iov, 4, fds, n);
}

static void write_record(const struct entry *e)
{
    char path[MAX_PATH_BYTES + 8], text[256];
    if (!e->record[0])
        return;
    int size = snprintf(text, sizeof text, "{\"pid\":%d,\"wait_status\":%d,\"started_ns\":%llu,\"finished_ns\":%llu}\n",
                        e->pid, e->status, (unsigned long long)e->started, (unsigned long long)e->finished);
    snprintf(path, sizeof path, "%s.new", e->record);
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (fd < 0)
        return; /* its directory is gone, so nobody will ask */
    int whole = write(fd, text, (size_t)size) == size;
    close(fd);
    if (!whole || rename(path, e->record))
        fprintf(stderr, "bulkhead-holder: exit record %s: %s\n", e->record, strerror(errno));
}

static void announce_exit(struct entry *e)
{
    struct message m = {.type = M_EXIT};
    struct exited x = {.pid = e->pid, .wait_status = e->status, .finished_ns = e->finished};
    struct iovec iov[] = {{&m, sizeof m}, {&x, sizeof x}, {e->id, strlen(e->id)}};
    for (struct conn *c = conns; c; c = c->next)
        send_parts(c, iov, 3, NULL, 0);
    write_record(e);
}

/* --- launching ------------------------------------------------------------------------------ */

static void answer_failure(struct entry *e)
{
    const struct progress *p = e->progress;
    struct message m = {.type = M_REPLY, .seq = e->seq, .status = -1};
    struct failure f = {.step = p->step, .error = p->error, .no_interpreter = p->no_interpreter};
    f.kind = p->state == S_EXEC_FAILED ? F_EXEC : p->state == S_FAILED ? F_STEP : F_DIED;
    if (f.kind == F_DIED)
        f.error = e->status;
    struct iovec iov[] = {{&m, sizeof m}, {&f, sizeof f}, {(void *)p->text, strnlen(p->text, sizeof p->text)}};
    send_parts(e->conn, iov, 3, NULL, 0);
    free_entry(e);
}

/* The channel has ended: the child has executed its program, or it never will. */
static void finish_launch(struct entry *e)
{
    struct progress *p = e->progress;
    uint32_t state = __atomic_load_n(&p->state, __ATOMIC_ACQUIRE);
    unwatch_and_close(e->channel);
    e->channel = -1;
    if (p->forked && e->pid != p->forked) {
        /* The intermediate process is reaped as a stranger; the pid cannot be taken meanwhile,
         * for only this process reaps it. */
        e->pid = p->forked;
        close(e->pidfd);
        e->pidfd = (int)syscall(SYS_pidfd_open, e->pid, 0);
    }
    if (state != S_EXEC) {
        e->failed = 1;
        if (e->reaped)
            answer_failure(e);
        else /* reap() answers, so that nothing of it is left by then */
            kill(e->pid, SIGKILL);
        return;
    }
    e->launching = 0;
    for (struct conn *c = conns; c; c = c->next)
        if (c->keeper)
            give(c, e);
    struct message m = {.type = M_REPLY, .seq = e->seq};
    struct launched l = {.pid = e->pid, .started_ns = e->started};
    struct iovec iov[] = {{&m, sizeof m}, {&l, sizeof l}};
    send_parts(e->conn, iov, 2, &e->pidfd, e->pidfd >= 0);
    e->conn = NULL;
    p->used = 0;
    e->progress = NULL;
    if (e->pidfd >= 0)
        close(e->pidfd);
    e->pidfd = -1;
    if (e->reaped)
        announce_exit(e);
}

static void read_channel(struct entry *e)
{
    for (;;) {
        char name[64];
        union { struct cmsghdr align; char bytes[CMSG_SPACE(sizeof(int))]; } control;
        struct iovec iov = {name, sizeof name};
        struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1,
                             .msg_control = control.bytes, .msg_controllen = sizeof control.bytes};
        ssize_t n = recvmsg(e->channel, &msg, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && errno == EAGAIN)
            return;
        if (n <= 0) {
            finish_launch(e);
            return;
        }
        struct cmsghdr *c = CMSG_FIRSTHDR(&msg);
        if (!c || c->cmsg_type != SCM_RIGHTS)
            continue;
        int fd;
        memcpy(&fd, CMSG_DATA(c), sizeof fd);
        if (e->nkept < (int)MAX_KEPT)
            e->kept[e->nkept++] = fd;
        else
            close(fd);
    }
}

static int write_map(pid_t pid, const char *file, const char *text, size_t size)
{
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/%s", pid, file);
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        return errno;
    int error = write(fd, text, size) < 0 ? errno : 0;
    close(fd);
    return error;
}

static int write_maps(pid_t pid, const struct launch *l, const char *uid_map, const char *gid_map)
{
    int error = 0;
    if (l->uid_map)
        error = write_map(pid, "uid_map", uid_map, l->uid_map);
    if (!error && l->gid_map) {
        error = write_map(pid, "gid_map", gid_map, l->gid_map);
        if (error == EPERM) { /* without privilege setgroups(2) must be given up first; user_namespaces(7) */
            error = write_map(pid, "setgroups", "deny", 4);
            if (!error)
                error = write_map(pid, "gid_map", gid_map, l->gid_map);
        }
    }
    return error;
}

/* Close everything but `keep` (ascending after sorting), so that a child that waits long before
 * its exec holds no copy of anybody's pipe. */
static void close_others(int *keep, int count)
{
    for (int i = 1; i < count; i++)
        for (int k = i; k > 0 && keep[k - 1] > keep[k]; k--) {
            int other = keep[k];
            keep[k] = keep[k - 1];
            keep[k - 1] = other;
        }
    unsigned from = 3;
    for (int i = 0; i < count; i++) {
        if ((unsigned)keep[i] > from)
            syscall(SYS_close_range, from, (unsigned)keep[i] - 1, 0);
        from = (unsigned)keep[i] + 1;
    }
    syscall(SYS_close_range, from, ~0u, 0);
}

static void become_child(void)
{
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    sigprocmask(SIG_SETMASK, &no_signals, NULL);
    setrlimit(RLIMIT_NOFILE, &original_files);
}

static _Noreturn void child(char *program, const int *fds, int count, int channel, struct progress *p, int wait_for_maps)
{
    int keep[PROGRAM_MAX_FDS + 1];
    memcpy(keep, fds, sizeof(int) * (size_t)count);
    keep[count] = channel;
    close_others(keep, count + 1);
    /* 0, 1, 2 are taken, so that nothing a program opens is overwritten when it sets up stdio. */
    dup2(0, 1);
    dup2(0, 2);
    become_child();
    char go;
    if (wait_for_maps && recv(channel, &go, 1, 0) != 1)
        _exit(127);
    program_run(program, fds, channel, p);
}

static struct progress *take_flight(void)
{
    for (int i = 0; i < FLIGHTS; i++)
        if (!flights[i].used) {
            memset(&flights[i], 0, sizeof flights[i]);
            flights[i].used = 1;
            return &flights[i];
        }
    return NULL;
}

static char *copy(const char *bytes, size_t size)
{
    char *text = need(malloc(size + 1));
    if (size)
        memcpy(text, bytes, size);
    text[size] = 0;
    return text;
}

struct parts { const char *id, *record, *meta, *uid_map, *gid_map; char *program; size_t program_size; };

/* Clone and start the program; an errno, with the entry gone, or 0. */
static int start(struct entry *e, const struct launch *l, const struct parts *p, const int *fds)
{
    int pair[2];
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair))
        return errno;
    int mapped = l->uid_map || l->gid_map;
    struct clone_args args = {
        .flags = l->clone_flags | CLONE_PIDFD | CLONE_CLEAR_SIGHAND | (l->cgroup ? CLONE_INTO_CGROUP : 0),
        .pidfd = (uint64_t)(uintptr_t)&e->pidfd,
        .exit_signal = SIGCHLD,
        .cgroup = l->cgroup ? (uint64_t)fds[l->fds + l->keep] : 0,
    };
    e->started = now(CLOCK_REALTIME);
    long pid = syscall(SYS_clone3, &args, sizeof args);
    if (pid == 0)
        child(p->program, fds, (int)l->fds, pair[1], e->progress, mapped);
    int error = pid < 0 ? errno : 0;
    close(pair[1]);
    if (error) {
        close(pair[0]);
        return error;
    }
    e->pid = (pid_t)pid;
    e->channel = pair[0];
    if (watch(e->channel, EPOLLIN, e))
        error = errno;
    if (!error && mapped && !(error = write_maps(e->pid, l, p->uid_map, p->gid_map)))
        if (send(e->channel, "g", 1, MSG_NOSIGNAL) != 1)
            error = errno;
    if (error) {
        /* reap() will answer with what is said here. */
        e->progress->error = error;
        __atomic_store_n(&e->progress->state, S_FAILED, __ATOMIC_RELEASE);
        e->failed = 1;
        kill(e->pid, SIGKILL);
    }
    return 0;
}

/* The parts of a launch message; NULL, or what is wrong with it. */
static const char *split(const char *body, size_t size, const struct launch *l, struct parts *p, int nfds)
{
    const uint32_t sizes[] = {l->id, l->record, l->meta, l->uid_map, l->gid_map, l->program};
    const uint32_t limits[] = {MAX_ID, MAX_PATH_BYTES, MAX_META, MAX_MAP, MAX_MAP, MAX_PACKET};
    const char **places[] = {&p->id, &p->record, &p->meta, &p->uid_map, &p->gid_map, (const char **)&p->program};
    size_t at = 0;
    for (int i = 0; i < 6; i++) {
        if (sizes[i] > limits[i] || sizes[i] > size - at)
            return "a length is out of bounds";
        *places[i] = body + at;
        at += sizes[i];
    }
    if (at != size)
        return "wrong length";
    if (!l->id || memchr(p->id, 0, l->id) || memchr(p->record, 0, l->record))
        return "no id, or a NUL inside a name";
    if (l->fds > PROGRAM_MAX_FDS || l->keep > MAX_KEPT || l->cgroup > 1
        || (int)(l->fds + l->keep + l->cgroup + !l->program) != nfds)
        return "wrong number of descriptors";
    if (l->clone_flags & ~(uint64_t)(CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID
                                     | CLONE_NEWNET | CLONE_NEWCGROUP | CLONE_NEWUSER | CLONE_NEWTIME))
        return "clone flags other than namespaces";
    return NULL;
}

/* Read the program from a file: a copy, for a mapping could shrink under us. */
static const char *read_program(struct parts *p, int fd)
{
    struct stat s;
    if (fstat(fd, &s) || !S_ISREG(s.st_mode) || s.st_size <= 0 || s.st_size > PROGRAM_MAX_SIZE)
        return "the program's file has a wrong size or type";
    p->program_size = (size_t)s.st_size;
    p->program = need(malloc(p->program_size));
    size_t at = 0;
    while (at < p->program_size) {
        ssize_t n = pread(fd, p->program + at, p->program_size - at, (off_t)at);
        if (n <= 0)
            return "the program's file cannot be read";
        at += (size_t)n;
    }
    return NULL;
}

static struct entry *add_entry(struct conn *c, uint32_t seq, const struct launch *l, const struct parts *p)
{
    struct entry *e = need(calloc(1, sizeof *e));
    e->what = W_ENTRY;
    e->id = copy(p->id, l->id);
    e->record = copy(p->record, l->record);
    e->meta = copy(p->meta, l->meta);
    e->meta_size = l->meta;
    e->channel = e->pidfd = -1;
    e->launching = 1;
    e->conn = c;
    e->seq = seq;
    e->next = entries;
    entries = e;
    return e;
}

static void on_launch(struct conn *c, const struct message *m, const char *body, size_t size, int *fds, int nfds)
{
    struct launch l;
    struct parts p = {0};
    const char *problem = NULL;
    char *file = NULL;
    int error = EINVAL;
    if (size < sizeof l) {
        problem = "launch: too short";
        goto out;
    }
    memcpy(&l, body, sizeof l);
    if ((problem = split(body + sizeof l, size - sizeof l, &l, &p, nfds)))
        goto out;
    p.program_size = l.program;
    if (!l.program) {
        p.program = NULL;
        problem = read_program(&p, fds[nfds - 1]);
        file = p.program;
    } else { /* into aligned memory */
        file = need(malloc(l.program));
        p.program = memcpy(file, p.program, l.program);
    }
    if (problem || (problem = program_check(p.program, p.program_size, l.fds, !!(l.clone_flags & CLONE_NEWPID))))
        goto out;
    if (find(p.id, l.id)) {
        error = EEXIST;
        problem = "an entry with this id exists";
        goto out;
    }
    struct progress *flight = take_flight();
    if (!flight) {
        error = EAGAIN;
        problem = "too many launches at once";
        goto out;
    }
    struct entry *e = add_entry(c, m->seq, &l, &p);
    e->progress = flight;
    if ((error = start(e, &l, &p, fds))) {
        free_entry(e);
        problem = strerror(error);
        goto out;
    }
    for (uint32_t i = 0; i < l.keep; i++) {
        e->kept[e->nkept++] = fds[l.fds + i];
        fds[l.fds + i] = -1;
    }
out:
    free(file);
    if (problem)
        reply(c, m->seq, error, problem);
}

/* --- helpers -------------------------------------------------------------------------------- */

static _Noreturn void helper_child(struct helper *h)
{
    int base = 3 + h->nfds, null = open("/dev/null", O_RDONLY);
    dup2(null, 0);
    if (fcntl(2, F_GETFD) >= 0)
        dup2(2, 1);
    for (int i = 0; i < h->nfds; i++)
        h->fds[i] = fcntl(h->fds[i], F_DUPFD, base);
    for (int i = 0; i < h->nfds; i++)
        dup2(h->fds[i], 3 + i);
    syscall(SYS_close_range, (unsigned)base, ~0u, 0);
    setsid();
    prctl(PR_SET_PDEATHSIG, 0); /* a keeper outlives the holder, for its workloads do */
    sigprocmask(SIG_SETMASK, &no_signals, NULL);
    setrlimit(RLIMIT_NOFILE, &original_files);
    execve(h->argv[0], h->argv, h->env);
    fprintf(stderr, "bulkhead-holder: helper %s: %s: %s\n", h->name, h->argv[0], strerror(errno));
    _exit(127);
}

static void start_helper(struct helper *h)
{
    struct clone_args args = {.flags = CLONE_CLEAR_SIGHAND, .exit_signal = SIGCHLD};
    h->started = now(CLOCK_MONOTONIC);
    long pid = syscall(SYS_clone3, &args, sizeof args);
    if (pid == 0)
        helper_child(h);
    h->due = 0;
    h->pid = pid > 0 ? (pid_t)pid : 0;
    if (pid < 0) {
        fprintf(stderr, "bulkhead-holder: helper %s: %s\n", h->name, strerror(errno));
        h->due = h->started + NS;
    }
}

static void free_helper(struct helper *h)
{
    for (struct helper **at = &helpers; *at; at = &(*at)->next)
        if (*at == h) {
            *at = h->next;
            break;
        }
    close_all(h->fds, h->nfds);
    for (char **s = h->argv; *s; s++)
        free(*s);
    for (char **s = h->env; *s; s++)
        free(*s);
    free(h->argv);
    free(h->env);
    free(h->fds);
    free(h->name);
    free(h);
}

static struct helper *find_helper(const char *name, size_t size)
{
    for (struct helper *h = helpers; h; h = h->next)
        if (!h->dismissed && strlen(h->name) == size && !memcmp(h->name, name, size))
            return h;
    return NULL;
}

/* `count` NUL-terminated strings from `*at`, as a NULL-terminated vector; NULL if they are not there. */
static char **strings(const char **at, const char *end, uint32_t count)
{
    char **list = need(calloc((size_t)count + 1, sizeof *list));
    for (uint32_t i = 0; i < count; i++) {
        const char *stop = memchr(*at, 0, (size_t)(end - *at));
        if (!stop) {
            for (uint32_t k = 0; k < i; k++)
                free(list[k]);
            free(list);
            return NULL;
        }
        list[i] = copy(*at, (size_t)(stop - *at));
        *at = stop + 1;
    }
    return list;
}

static void on_supervise(struct conn *c, const struct message *m, const char *body, size_t size, int *fds, int nfds)
{
    struct supervise s;
    const char *end = body + size, *at = body + sizeof s;
    if (size < sizeof s) {
        reply(c, m->seq, EINVAL, "supervise: too short");
        return;
    }
    memcpy(&s, body, sizeof s);
    if (!s.name || s.name > MAX_ID || s.name > (size_t)(end - at) || memchr(at, 0, s.name) || !s.argc
        || s.argc > 256 || s.envc > 1024 || nfds > 64) {
        reply(c, m->seq, EINVAL, "supervise: a length is out of bounds");
        return;
    }
    const char *name = at;
    at += s.name;
    if (find_helper(name, s.name)) {
        reply(c, m->seq, EEXIST, "a helper with this name is supervised already");
        return;
    }
    char **argv = strings(&at, end, s.argc), **env = argv ? strings(&at, end, s.envc) : NULL;
    if (!env) {
        for (char **x = argv; x && *x; x++)
            free(*x);
        free(argv);
        reply(c, m->seq, EINVAL, "supervise: a string is out of bounds");
        return;
    }
    struct helper *h = need(calloc(1, sizeof *h));
    h->name = copy(name, s.name);
    h->argv = argv;
    h->env = env;
    h->nfds = nfds;
    h->fds = need(malloc(sizeof(int) * (size_t)(nfds + 1)));
    for (int i = 0; i < nfds; i++) {
        h->fds[i] = fds[i];
        fds[i] = -1;
    }
    h->next = helpers;
    helpers = h;
    start_helper(h);
    reply(c, m->seq, 0, "");
}

static void dismiss(struct helper *h)
{
    h->dismissed = 1;
    if (h->pid)
        kill(h->pid, SIGTERM);
    else
        free_helper(h);
}

static void helper_ended(struct helper *h, int status)
{
    uint64_t t = now(CLOCK_MONOTONIC);
    h->pid = 0;
    if (h->dismissed) {
        free_helper(h);
        return;
    }
    fprintf(stderr, "bulkhead-holder: helper %s ended (wait status %d), starting it again\n", h->name, status);
    /* 20 ms, doubled up to 5 s as long as it does not live that long. */
    h->delay = t - h->started >= HELPER_STEADY || !h->delay ? NS / 50 : h->delay * 2;
    if (h->delay > 5 * NS)
        h->delay = 5 * NS;
    h->due = t + h->delay;
}

/* Start what is due; milliseconds until the next, or -1. */
static int run_helpers(void)
{
    uint64_t t = now(CLOCK_MONOTONIC), next = 0;
    for (struct helper *h = helpers; h; h = h->next) {
        if (h->pid || !h->due)
            continue;
        if (h->due <= t)
            start_helper(h);
        if (h->due && (!next || h->due < next))
            next = h->due;
    }
    return next ? (int)((next - t) / 1000000) + 1 : -1;
}

/* --- reaping -------------------------------------------------------------------------------- */

static void entry_ended(struct entry *e, int status)
{
    e->reaped = 1;
    e->status = status;
    e->finished = now(CLOCK_REALTIME);
    if (!e->launching) {
        announce_exit(e);
        return;
    }
    if (e->channel >= 0)
        read_channel(e); /* its end may be there already, and with it the answer */
    else if (e->failed)
        answer_failure(e);
}

static int reap_one(pid_t pid, int status)
{
    for (struct entry *e = entries; e; e = e->next) {
        int32_t forked = e->progress ? e->progress->forked : 0;
        if (forked && forked != pid && e->pid == pid && e->launching) { /* the intermediate process of FORK */
            e->pid = forked;
            if (e->pidfd >= 0)
                close(e->pidfd);
            e->pidfd = (int)syscall(SYS_pidfd_open, forked, 0);
            if (e->failed)
                kill(forked, SIGKILL);
            return 1;
        }
        if (forked && forked == pid) /* e->pid may be the intermediate's: which ends first is open */
            e->pid = pid; /* and e->pidfd too, which says the same: ended */
        if (e->pid == pid && !e->reaped) {
            entry_ended(e, status);
            return 1;
        }
    }
    for (struct helper *h = helpers; h; h = h->next)
        if (h->pid == pid) {
            helper_ended(h, status);
            return 1;
        }
    return 0; /* an orphan that fell to us */
}

static void reap(void)
{
    struct signalfd_siginfo info[8];
    while (read(signals, info, sizeof info) > 0)
        ;
    for (;;) {
        int status;
        pid_t pid = waitpid(-1, &status, WNOHANG);
        if (pid <= 0)
            return;
        reap_one(pid, status);
    }
}

/* --- other requests ------------------------------------------------------------------------- */

static void on_id(struct conn *c, const struct message *m, const char *id, size_t size)
{
    struct entry *e = find(id, size);
    if (!e) {
        reply(c, m->seq, ENOENT, "no such entry");
        return;
    }
    int error = 0;
    switch (m->type) {
    case M_SIGNAL:
        if (e->reaped)
            error = ESRCH;
        else if (kill(e->pid, m->status))
            error = errno;
        break;
    case M_FORGET:
        if (!e->reaped || e->launching)
            error = EBUSY;
        else
            free_entry(e);
        break;
    case M_CLOSE_KEPT:
        for (int i = 0; i < e->nkept; i++)
            if ((m->status == -1 || m->status == i) && e->kept[i] >= 0) {
                close(e->kept[i]);
                e->kept[i] = -1;
            }
        break;
    }
    reply(c, m->seq, error, error ? strerror(error) : "");
}

static int busy(void)
{
    for (struct entry *e = entries; e; e = e->next)
        if (!e->reaped)
            return 1;
    return 0;
}

static void on_message(struct conn *c, size_t size, int *fds, int nfds)
{
    struct message m;
    memcpy(&m, inbox, sizeof m);
    const char *body = inbox + sizeof m;
    size -= sizeof m;
    switch (m.type) {
    case M_HELLO: {
        c->keeper = m.status == 1;
        char pid[16];
        snprintf(pid, sizeof pid, "%d", getpid());
        reply(c, m.seq, 0, pid);
        for (struct entry *e = entries; c->keeper && e; e = e->next)
            if (!e->launching)
                give(c, e);
        return;
    }
    case M_LAUNCH: on_launch(c, &m, body, size, fds, nfds); return;
    case M_SUPERVISE: on_supervise(c, &m, body, size, fds, nfds); return;
    case M_SIGNAL:
    case M_FORGET:
    case M_CLOSE_KEPT: on_id(c, &m, body, size); return;
    case M_ENTRIES:
        for (struct entry *e = entries; e; e = e->next)
            if (!e->launching)
                tell_entry(c, m.seq, e);
        reply(c, m.seq, 0, "");
        return;
    case M_DISMISS: {
        struct helper *h = find_helper(body, size);
        if (h)
            dismiss(h);
        reply(c, m.seq, h ? 0 : ENOENT, h ? "" : "no such helper");
        return;
    }
    case M_SHUTDOWN:
        reap(); /* whoever asks may have seen the last end already */
        ending = m.status == 1 || !busy();
        reply(c, m.seq, ending ? 0 : EBUSY, ending ? "" : "workloads are running");
        return;
    default: reply(c, m.seq, ENOSYS, "unknown request");
    }
}

static void read_conn(struct conn *c)
{
    union { struct cmsghdr align; char bytes[CMSG_SPACE(sizeof(int) * MAX_RECEIVED)]; } control;
    struct iovec iov = {inbox, sizeof inbox};
    struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1,
                         .msg_control = control.bytes, .msg_controllen = sizeof control.bytes};
    ssize_t n = recvmsg(c->fd, &msg, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (n <= 0) {
        drop(c);
        return;
    }
    int fds[MAX_RECEIVED], nfds = 0;
    for (struct cmsghdr *h = CMSG_FIRSTHDR(&msg); h; h = CMSG_NXTHDR(&msg, h))
        if (h->cmsg_level == SOL_SOCKET && h->cmsg_type == SCM_RIGHTS) {
            nfds = (int)((h->cmsg_len - CMSG_LEN(0)) / sizeof(int));
            memcpy(fds, CMSG_DATA(h), sizeof(int) * (size_t)nfds);
        }
    if ((msg.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) || (size_t)n < sizeof(struct message))
        drop(c);
    else
        on_message(c, (size_t)n, fds, nfds);
    close_all(fds, nfds);
}

static void accept_conn(void)
{
    int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd < 0)
        return;
    int size = 1 << 20;
    setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
    struct conn *c = need(calloc(1, sizeof *c));
    *c = (struct conn){.what = W_CONN, .fd = fd, .tail = &c->head, .next = conns};
    if (watch(fd, EPOLLIN, c)) {
        close(fd);
        free(c);
        return;
    }
    conns = c;
    greeted = 1;
}

/* Close what drop() has marked. Returns the number of connections that are not keepers'. */
static int sweep(void)
{
    int left = 0;
    for (struct conn **at = &conns; *at;) {
        struct conn *c = *at;
        if (!c->dead) {
            left += !c->keeper;
            at = &c->next;
            continue;
        }
        for (struct entry *e = entries; e; e = e->next)
            if (e->conn == c)
                e->conn = NULL;
        *at = c->next;
        while (c->head) {
            struct packet *p = c->head;
            c->head = p->next;
            close_all(p->fds, p->nfds);
            free(p);
        }
        unwatch_and_close(c->fd);
        free(c);
    }
    return left;
}

/* --- main ----------------------------------------------------------------------------------- */

static void prepare(void)
{
    static const char standard[64]; /* the kernel's struct sigaction: SIG_DFL, no flags */
    sigset_t all;
    for (int s = 1; s < 65; s++) /* not by libc, which keeps 32 and 33 for itself */
        syscall(SYS_rt_sigaction, s, standard, NULL, 8);
    sigemptyset(&no_signals);
    sigfillset(&all);
    for (const int *s = (const int[]){SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT, 0}; *s; s++)
        sigdelset(&all, *s);
    sigprocmask(SIG_SETMASK, &all, NULL);
    getrlimit(RLIMIT_NOFILE, &original_files);
    struct rlimit most = {original_files.rlim_max, original_files.rlim_max};
    setrlimit(RLIMIT_NOFILE, &most);
    prctl(PR_SET_CHILD_SUBREAPER, 1);
    prctl(PR_SET_NAME, "bulkhead-holder");
    umask(0022);
    sigset_t child_signal;
    sigemptyset(&child_signal);
    sigaddset(&child_signal, SIGCHLD);
    signals = signalfd(-1, &child_signal, SFD_CLOEXEC | SFD_NONBLOCK);
    epoll = epoll_create1(EPOLL_CLOEXEC);
    flights = mmap(NULL, FLIGHTS * sizeof *flights, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (signals < 0 || epoll < 0 || flights == MAP_FAILED) {
        perror("bulkhead-holder");
        exit(1);
    }
}

static void dispatch(const struct epoll_event *e, int *reaping)
{
    switch (*(enum what *)e->data.ptr) {
    case W_LISTEN: accept_conn(); break;
    case W_SIGNAL: *reaping = 1; break;
    case W_CONN: {
        struct conn *c = e->data.ptr;
        if (e->events & EPOLLOUT)
            flush(c);
        if (e->events & EPOLLIN && !c->dead)
            read_conn(c);
        else if (e->events & (EPOLLHUP | EPOLLERR))
            drop(c);
        break;
    }
    case W_ENTRY: break;
    }
}

static void unlink_socket(const struct stat *mine)
{
    struct stat s;
    if (!stat(socket_path, &s) && s.st_dev == mine->st_dev && s.st_ino == mine->st_ino)
        unlink(socket_path);
}

int main(int argc, char **argv)
{
    static enum what w_listen = W_LISTEN, w_signal = W_SIGNAL;
    struct stat mine = {0};
    if (argc < 2 || fcntl(3, F_SETFD, FD_CLOEXEC)) {
        fprintf(stderr, "usage: bulkhead-holder SOCKET_PATH [IDLE_SECONDS], listening on descriptor 3\n");
        return 2;
    }
    socket_path = argv[1];
    uint64_t idle = (argc > 2 ? strtoull(argv[2], NULL, 10) : 10) * NS, idle_since = 0;
    listener = 3;
    fcntl(listener, F_SETFL, O_NONBLOCK);
    stat(socket_path, &mine);
    prepare();
    if (watch(listener, EPOLLIN, &w_listen) || watch(signals, EPOLLIN, &w_signal)) {
        perror("bulkhead-holder");
        return 1;
    }
    while (!ending) {
        struct epoll_event events[64];
        int reaping = 0, timeout = run_helpers();
        int others = sweep();
        if (!entries && !others) {
            uint64_t t = now(CLOCK_MONOTONIC);
            idle_since = idle_since ? idle_since : t;
            /* Whoever started it may be slow to connect. */
            uint64_t patience = greeted || idle > START_PATIENCE ? idle : START_PATIENCE;
            if (t - idle_since >= patience)
                break;
            int left = (int)((patience - (t - idle_since)) / 1000000) + 1;
            timeout = timeout < 0 || left < timeout ? left : timeout;
        } else
            idle_since = 0;
        int n = epoll_wait(epoll, events, 64, timeout);
        /* Children's channels first, one pass: an entry may be freed by its own event only. */
        for (int i = 0; i < n; i++)
            if (*(enum what *)events[i].data.ptr == W_ENTRY) {
                read_channel(events[i].data.ptr);
                events[i].data.ptr = NULL;
            }
        for (int i = 0; i < n; i++)
            if (events[i].data.ptr)
                dispatch(&events[i], &reaping);
        if (reaping)
            reap();
    }
    unlink_socket(&mine);
    for (struct helper *h = helpers; h; h = h->next)
        if (h->pid)
            kill(h->pid, SIGTERM);
    return 0;
}
