/* The init of every guest: executes what the monitor outside sends as frames (frames.h).
 *
 * It decides nothing. Set-up (mounts, network, names) and workloads come as launch programs, which
 * it runs with the same interpreter as the holder (launch.c): set-up programs one after another in
 * its own namespaces, others beside each other in theirs. It pumps their streams, tells their ends,
 * and reaps. One thread, one poll loop; it always reads the channel, so that nothing can lock up.
 */
#define _GNU_SOURCE
#include "frames.h"
#include "guest.h"
#include "launch.h"

#include <fcntl.h>
#include <linux/random.h>
#include <linux/sched.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/reboot.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <time.h>

#define QUEUE_FULL (512u << 10) /* streams and FUSE wait while this much is to be sent */
#define CHUNK 32768u
#define NAMESPACES (CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWCGROUP \
                    | CLONE_NEWUSER | CLONE_NEWTIME)

struct process {
    uint32_t id, mode, rows, columns;
    pid_t pid;
    int launching, reaped, told, silent, status;
    int channel, in, out[2], input_ended;
    uint32_t credit[2];
    struct buffer input;
    struct progress *progress;
    int at_channel, at_in, at_out[2]; /* places in the poll set */
    struct process *next;
};

struct pending { struct pending *next; struct frame frame; char bytes[]; };

static struct process *processes;
static struct pending *pending;
static struct progress *flights;
struct buffer outbox;
static struct buffer inbox, run_message;
static sigset_t no_signals;
static int channel = -1, signals = -1, booted, is_line;
static enum { OPEN, ENDS, WRITES_BACK, ENDED } closing;
static struct buffer closing_paths;
static uint32_t closing_how;
static pid_t closer;
int kmsg = -1, setup_failed;
static unsigned process_count;

void say(const char *format, ...)
{
    char text[512];
    va_list list;
    va_start(list, format);
    int n = vsnprintf(text, sizeof text, format, list);
    va_end(list);
    if (n < 0 || (size_t)n >= sizeof text)
        n = sizeof text - 1;
    if (kmsg >= 0 && write(kmsg, text, (size_t)n) < 0)
        kmsg = -1;
    if (channel >= 0 && buffer_size(&outbox) < QUEUE_FULL)
        frame_add(&outbox, G_LOG, 0, 0, text, (size_t)n);
}

/* --- processes ------------------------------------------------------------------------------ */

static struct process *find(uint32_t id)
{
    for (struct process *p = processes; p; p = p->next)
        if (p->id == id)
            return p;
    return NULL;
}

static void tell(struct process *p, enum frame_type type, uint32_t arg)
{
    if (!p->silent)
        frame_add(&outbox, type, p->id, arg, NULL, 0);
}

void refuse(uint32_t id, int error, const char *text)
{
    struct failed f = {.kind = FAILED_REFUSED};
    frame_add2(&outbox, G_FAILED, id, (uint32_t)error, &f, sizeof f, text, strlen(text));
}

static void free_process(struct process *p)
{
    for (struct process **at = &processes; *at; at = &(*at)->next)
        if (*at == p) {
            *at = p->next;
            break;
        }
    close_fd(&p->channel);
    close_fd(&p->in);
    close_fd(&p->out[0]);
    close_fd(&p->out[1]);
    buffer_free(&p->input);
    if (p->progress)
        p->progress->used = 0;
    free(p);
    process_count--;
}

/* It runs no program: say why, or that a set-up program is done. The process is freed. */
static void end_launch(struct process *p)
{
    struct progress *g = p->progress;
    struct failed f = {.step = g->step, .no_interpreter = g->no_interpreter};
    if (p->mode == MODE_SETUP && g->done) {
        tell(p, G_DONE, 0);
    } else {
        int error = g->error;
        f.kind = g->state == S_EXEC_FAILED ? FAILED_EXEC : g->state == S_FAILED ? FAILED_STEP : FAILED_DIED;
        if (f.kind == FAILED_DIED)
            error = p->status;
        setup_failed |= p->mode == MODE_SETUP && !p->silent && p->id < FIRST_CLIENT_ID;
        if (!p->silent)
            frame_add2(&outbox, G_FAILED, p->id, (uint32_t)error, &f, sizeof f, g->text,
                       strnlen(g->text, sizeof g->text));
    }
    free_process(p);
}

static void announce_end(struct process *p);

/* The child has executed its program, or it never will. 1 if the process is gone. */
static int finish_launch(struct process *p)
{
    struct progress *g = p->progress;
    close_fd(&p->channel);
    if (g->forked && p->pid != g->forked)
        p->pid = g->forked; /* the intermediate process is reaped as a stranger */
    if (__atomic_load_n(&g->state, __ATOMIC_ACQUIRE) != S_EXEC) {
        if (!p->reaped && !g->forked)
            return 0; /* reap() answers, so that nothing of it is left by then */
        end_launch(p);
        return 1;
    }
    p->launching = 0;
    tell(p, G_STARTED, (uint32_t)p->pid);
    p->progress = NULL;
    g->used = 0;
    if (p->reaped)
        announce_end(p);
    return 0;
}

static int read_channel(struct process *p)
{
    while (p->channel >= 0) {
        char name[64];
        union { struct cmsghdr align; char bytes[CMSG_SPACE(sizeof(int))]; } control;
        struct iovec iov = {name, sizeof name};
        struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1,
                             .msg_control = control.bytes, .msg_controllen = sizeof control.bytes};
        ssize_t n = recvmsg(p->channel, &msg, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && errno == EAGAIN)
            return 0;
        if (n <= 0)
            return finish_launch(p);
        struct cmsghdr *c = CMSG_FIRSTHDR(&msg);
        if (!c || c->cmsg_type != SCM_RIGHTS)
            continue;
        int fd;
        memcpy(&fd, CMSG_DATA(c), sizeof fd);
        if (p->mode != MODE_TERMINAL || p->in >= 0) {
            close(fd);
            continue;
        }
        struct winsize size = {.ws_row = (unsigned short)p->rows, .ws_col = (unsigned short)p->columns};
        if (p->rows && p->columns)
            ioctl(fd, TIOCSWINSZ, &size);
        no_block(fd);
        p->in = fd;
        p->out[0] = fcntl(fd, F_DUPFD_CLOEXEC, 3);
    }
    return 0;
}

static struct progress *take_flight(void)
{
    for (unsigned i = 0; i < PROCESSES_MAX; i++)
        if (!flights[i].used) {
            memset(&flights[i], 0, sizeof flights[i]);
            flights[i].used = 1;
            return &flights[i];
        }
    return NULL;
}

static _Noreturn void child(char *program, const int *fds, int report, struct progress *progress)
{
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    sigprocmask(SIG_SETMASK, &no_signals, NULL);
    program_run(program, fds, report, progress);
}

/* Clone; an errno or 0. `theirs` are the program's descriptors. */
static int start(struct process *p, const struct run *r, char *program, const int *theirs)
{
    int pair[2];
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair))
        return errno;
    struct clone_args args = {.flags = r->clone_flags | CLONE_CLEAR_SIGHAND, .exit_signal = SIGCHLD};
    long pid = syscall(SYS_clone3, &args, sizeof args);
    if (pid == 0)
        child(program, theirs, pair[1], p->progress);
    int error = pid < 0 ? errno : 0;
    close(pair[1]);
    if (error)
        close(pair[0]);
    else {
        p->pid = (pid_t)pid;
        p->channel = pair[0];
    }
    return error;
}

static int make_pipes(struct process *p, int *theirs)
{
    for (int i = 0; i < 3; i++) {
        int ends[2];
        if (pipe2(ends, O_CLOEXEC))
            return errno;
        int mine = ends[i == 0];
        theirs[i] = ends[i != 0];
        *(i ? &p->out[i - 1] : &p->in) = mine;
        no_block(mine);
    }
    return 0;
}

static void on_run(const struct frame *f, char *bytes, size_t size)
{
    struct run r;
    const char *problem = NULL;
    int theirs[5] = {-1, -1, -1, -1, -1}, error = EINVAL; /* the context twice: a program may join two of its namespaces */
    if (size < sizeof r || process_count >= PROCESSES_MAX || !f->id || find(f->id)) {
        refuse(f->id, size < sizeof r ? EINVAL : EAGAIN, "too short, too many, or an id that is taken");
        return;
    }
    memcpy(&r, bytes, sizeof r);
    char *program = memmove(bytes, bytes + sizeof r, size - sizeof r); /* aligned as malloc does */
    if (setup_failed) {
        refuse(f->id, ECANCELED, "an earlier set-up program failed");
        return;
    }
    struct process *p = calloc(1, sizeof *p), *context = find(r.context);
    if (!p)
        abort();
    *p = (struct process){.id = f->id, .mode = r.mode, .rows = r.rows, .columns = r.columns, .launching = 1,
                          .channel = -1, .in = -1, .out = {-1, -1}, .credit = {WINDOW, WINDOW},
                          .at_channel = -1, .at_in = -1, .at_out = {-1, -1}, .next = processes};
    processes = p;
    process_count++;
    p->progress = take_flight();
    if (r.mode > MODE_TERMINAL || r.clone_flags & ~NAMESPACES || !p->progress)
        problem = "unknown mode, flags other than namespaces, or too many launches at once";
    else if (!(problem = program_check(program, size - sizeof r, 5, !!(r.clone_flags & CLONE_NEWPID)))) {
        if (r.mode == MODE_PIPES)
            error = make_pipes(p, theirs);
        else {
            theirs[0] = open("/dev/null", O_RDWR | O_CLOEXEC); /* its number is none that is set up */
            theirs[1] = fcntl(theirs[0], F_DUPFD_CLOEXEC, 3);
            theirs[2] = fcntl(theirs[0], F_DUPFD_CLOEXEC, 3);
            error = theirs[2] < 0 ? errno : 0;
        }
        if (!error && r.context) {
            error = !context || context->reaped ? ESRCH : 0;
            if (!error && ((theirs[3] = (int)syscall(SYS_pidfd_open, context->pid, 0)) < 0
                           || (theirs[4] = fcntl(theirs[3], F_DUPFD_CLOEXEC, 3)) < 0))
                error = errno;
        }
        if (!error)
            error = start(p, &r, program, theirs);
        if (error)
            problem = error == ESRCH ? "the process to join has ended" : strerror(error);
    }
    for (int i = 0; i < 5; i++)
        close_fd(&theirs[i]);
    if (problem) {
        refuse(f->id, error, problem);
        setup_failed |= r.mode == MODE_SETUP && f->id < FIRST_CLIENT_ID;
        free_process(p);
    }
}

static void pump_out(struct process *p, int i)
{
    char bytes[CHUNK];
    if (p->out[i] < 0 || !p->credit[i])
        return;
    ssize_t n = read(p->out[i], bytes, p->credit[i] < CHUNK ? p->credit[i] : CHUNK);
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (n > 0) {
        p->credit[i] -= (uint32_t)n;
        if (!p->silent)
            frame_add(&outbox, G_OUT, p->id, (uint32_t)i + 1, bytes, (size_t)n);
        return;
    }
    close_fd(&p->out[i]); /* its end; for a terminal that is EIO */
    tell(p, G_EOF, (uint32_t)i + 1);
}

/* How many processes this kernel has killed for want of memory. */
static uint32_t oom_kills(void)
{
    static char text[32768];
    int fd = booted ? open("/proc/vmstat", O_RDONLY | O_CLOEXEC) : -1;
    ssize_t n = fd < 0 ? -1 : read(fd, text, sizeof text - 1);
    close_fd(&fd);
    text[n < 0 ? 0 : n] = 0;
    const char *at = strstr(text, "\noom_kill ");
    return at ? (uint32_t)strtoul(at + 10, NULL, 10) : 0;
}

static void stop_input(struct process *p)
{
    uint32_t dropped = (uint32_t)buffer_size(&p->input);
    buffer_free(&p->input);
    if (dropped)
        tell(p, G_CREDIT, dropped);
    if (p->in < 0)
        return;
    close_fd(&p->in);
    tell(p, G_EOF, 0);
}

static void pump_in(struct process *p)
{
    size_t before = buffer_size(&p->input);
    if (p->in < 0 || buffer_flush(&p->input, p->in)) {
        stop_input(p);
        return;
    }
    if (before != buffer_size(&p->input))
        tell(p, G_CREDIT, (uint32_t)(before - buffer_size(&p->input)));
    if (!buffer_size(&p->input) && p->input_ended && p->mode == MODE_PIPES)
        close_fd(&p->in);
}

/* What is in its streams, as far as there is credit, goes out before the news of its end. */
static void announce_end(struct process *p)
{
    for (int i = 0; i < 2; i++)
        for (uint32_t before = 0; p->out[i] >= 0 && before != p->credit[i];) {
            before = p->credit[i];
            pump_out(p, i);
        }
    stop_input(p);
    p->told = 1;
    uint32_t kills = oom_kills();
    if (!p->silent)
        frame_add(&outbox, G_EXITED, p->id, (uint32_t)p->status, &kills, sizeof kills);
}

static void ended(struct process *p, int status)
{
    p->reaped = 1;
    p->status = status;
    if (!p->launching)
        announce_end(p);
    else if (p->channel >= 0)
        read_channel(p); /* its end may be there already, and with it the answer */
    else
        end_launch(p);
}

static void reap_one(pid_t pid, int status)
{
    for (struct process *p = processes; p; p = p->next) {
        int32_t forked = p->progress ? p->progress->forked : 0;
        if (forked && forked != pid && p->pid == pid && p->launching) {
            p->pid = forked;
            return;
        }
        if (forked && forked == pid)
            p->pid = pid;
        if (p->pid == pid && !p->reaped) {
            ended(p, status);
            return;
        }
    }
}

static void reap(void)
{
    struct signalfd_siginfo info[8];
    int status;
    while (read(signals, info, sizeof info) > 0)
        ;
    for (pid_t pid; (pid = waitpid(-1, &status, WNOHANG)) > 0;)
        reap_one(pid, status);
}

/* --- frames ---------------------------------------------------------------------------------- */

static void kill_all(void)
{
    kill(-1, SIGKILL);
    for (struct process *p = processes; p; p = p->next) {
        p->silent = 1;
        p->id = 0; /* which may be taken again */
    }
}

/* A guest that was saved while it ran: its first process stays, what clients had begun ends. */
static void keep_main(void)
{
    for (struct process *p = processes; p; p = p->next) {
        if (p->mode != MODE_SETUP && p->id && p->id < FIRST_CLIENT_ID) {
            p->credit[0] = p->credit[1] = 0; /* until somebody adopts it */
            continue;
        }
        if (p->pid > 1 && !p->reaped)
            kill(p->pid, SIGKILL);
        p->silent = 1;
        p->id = 0;
    }
}

static void on_adopt(const struct frame *f)
{
    struct process *p = find(f->id);
    if (setup_failed || !p || p->reaped || p->launching) {
        refuse(f->id, setup_failed ? ECANCELED : ESRCH, setup_failed ? "an earlier set-up program failed" : "the process has ended");
        return;
    }
    buffer_free(&p->input); /* what somebody else had typed */
    p->input_ended = 0;
    tell(p, G_STARTED, (uint32_t)p->pid);
    for (uint32_t i = 0; i < 2; i++) {
        p->credit[i] = WINDOW;
        if (p->out[i] < 0 && (i == 0 || p->mode == MODE_PIPES))
            tell(p, G_EOF, i + 1);
    }
    if (p->in < 0)
        tell(p, G_EOF, 0);
}

static void on_hello(const struct frame *f, const char *bytes)
{
    struct hello h;
    struct utsname name;
    struct { int bits, size; uint8_t bytes[sizeof h.entropy]; } entropy = {8 * sizeof h.entropy, sizeof h.entropy, {0}};
    if (f->length < sizeof h)
        return;
    memcpy(&h, bytes, sizeof h);
    memcpy(entropy.bytes, h.entropy, sizeof h.entropy);
    if (f->arg & HELLO_KEEP)
        keep_main();
    else
        kill_all();
    setup_failed = 0;
    for (struct pending *p; (p = pending); free(p))
        pending = p->next;
    buffer_take(&run_message, buffer_size(&run_message));
    int random = booted ? open("/dev/urandom", O_RDWR | O_CLOEXEC) : -1;
    if (random >= 0 && (ioctl(random, RNDADDENTROPY, &entropy) || ioctl(random, RNDRESEEDCRNG)))
        say("entropy: %s", strerror(errno));
    close_fd(&random);
    struct timespec t = {(time_t)(h.realtime_ns / 1000000000), (long)(h.realtime_ns % 1000000000)};
    if (booted && clock_settime(CLOCK_REALTIME, &t))
        say("clock: %s", strerror(errno));
    char text[sizeof name];
    uname(&name);
    int n = snprintf(text, sizeof text, "%s%c%s%c%s", name.release, 0, name.version, 0, name.machine);
    frame_add2(&outbox, G_HELLO, 0, PROTOCOL_VERSION, h.nonce, sizeof h.nonce, text, (size_t)n);
}

/* What was written is written back; for a process beside the init, which serves mounts meanwhile. */
static _Noreturn void write_back(void)
{
    /* The payload named what to unmount, each with its NUL, in this order. */
    const char *at = closing_paths.bytes + closing_paths.start, *end;
    for (size_t left = buffer_size(&closing_paths); left && (end = memchr(at, 0, left)); left -= (size_t)(end + 1 - at), at = end + 1)
        if (umount2(at, 0))
            umount2(at, MNT_DETACH);
    if (booted)
        sync();
    _exit(0);
}

static _Noreturn void end_guest(void)
{
    if (booted)
        syscall(SYS_reboot, 0xfee1dead, 672274793, closing_how, NULL);
    _exit(0);
}

/* After a SHUTDOWN: first everything ends, then it is written back, then this. */
static void go_on_closing(void)
{
    if (closing == ENDS && waitpid(-1, NULL, WNOHANG) < 0 && errno == ECHILD) {
        closer = fork();
        if (closer == 0)
            write_back();
        closing = closer < 0 ? ENDED : WRITES_BACK;
    } else if (closing == WRITES_BACK && waitpid(closer, NULL, WNOHANG))
        closing = ENDED;
    if (closing == ENDED)
        end_guest();
}

static void on_shutdown(const struct frame *f, const char *bytes)
{
    if (closing != OPEN)
        return;
    closing = ENDS;
    closing_how = f->arg;
    buffer_add(&closing_paths, bytes, f->length);
    kill_all();
}

static void run_pending(void)
{
    for (struct process *p = processes; p; p = p->next)
        if (p->mode == MODE_SETUP)
            return; /* set-up is done in order */
    struct pending *next = pending;
    if (!next)
        return;
    pending = next->next;
    if (next->frame.type == H_RUN)
        on_run(&next->frame, next->bytes, next->frame.length);
    else if (next->frame.type == H_ADOPT)
        on_adopt(&next->frame);
    else
        on_fuse_mount(&next->frame, next->bytes, next->frame.length);
    free(next);
    run_pending();
}

static void put_off(const struct frame *f, const char *bytes, size_t size)
{
    struct pending **at = &pending, *p = malloc(sizeof *p + size + 8);
    if (!p)
        abort();
    p->next = NULL;
    p->frame = *f;
    p->frame.length = (uint32_t)size;
    memcpy(p->bytes, bytes, size);
    while (*at)
        at = &(*at)->next;
    *at = p;
    run_pending();
}

/* A mount whose server has gone; maybe its turn has not come yet. */
static void on_fuse_drop(const struct frame *f)
{
    for (struct pending **at = &pending, *p; (p = *at); at = &p->next)
        if (p->frame.type == H_FUSE_MOUNT && p->frame.id == f->id) {
            *at = p->next;
            free(p);
            refuse(f->id, ECANCELED, "its file server has ended");
            break;
        }
    drop_mount(f->id);
    frame_add(&outbox, G_DONE, f->id, 0, NULL, 0);
}

static void on_stream(const struct frame *f, const char *bytes)
{
    struct process *p = find(f->id);
    struct winsize size = {.ws_row = (unsigned short)(f->arg >> 16), .ws_col = (unsigned short)f->arg};
    uint32_t stream = 0;
    if (!p)
        return; /* it has ended meanwhile */
    switch (f->type) {
    case H_STDIN:
        if (p->reaped || (p->in < 0 && !p->launching) || buffer_size(&p->input) + f->length > WINDOW)
            tell(p, G_CREDIT, f->length);
        else
            buffer_add(&p->input, bytes, f->length);
        break;
    case H_STDIN_EOF: p->input_ended = 1; break;
    case H_RESIZE:
        p->rows = size.ws_row;
        p->columns = size.ws_col;
        if (p->mode == MODE_TERMINAL && p->in >= 0)
            ioctl(p->in, TIOCSWINSZ, &size);
        return;
    case H_CREDIT:
        if (f->length == sizeof stream)
            memcpy(&stream, bytes, sizeof stream);
        if ((stream == 1 || stream == 2) && f->arg <= WINDOW - p->credit[stream - 1])
            p->credit[stream - 1] += f->arg;
        return;
    }
    if (p->in >= 0)
        pump_in(p);
}

static void on_signal(const struct frame *f)
{
    struct process *p = f->id ? find(f->id) : NULL;
    if (f->arg < 1 || f->arg > 64)
        return;
    if (!f->id)
        kill(-1, (int)f->arg);
    else if (p && !p->reaped && p->pid > 1)
        kill(p->pid, (int)f->arg);
}

static void on_frame(const struct frame *f, const char *bytes)
{
    switch (f->type) {
    case H_HELLO: on_hello(f, bytes); break;
    case H_RUN:
        if (buffer_size(&run_message) + f->length <= MESSAGE_MAX)
            buffer_add(&run_message, bytes, f->length);
        if (f->flags & FLAG_MORE)
            break;
        put_off(f, run_message.bytes + run_message.start, buffer_size(&run_message));
        buffer_take(&run_message, buffer_size(&run_message));
        break;
    case H_STDIN:
    case H_STDIN_EOF:
    case H_RESIZE:
    case H_CREDIT: on_stream(f, bytes); break;
    case H_SIGNAL: on_signal(f); break;
    case H_READ: on_read(f, bytes); break;
    case H_ADOPT:
    case H_FUSE_MOUNT: put_off(f, bytes, f->length); break;
    case H_FUSE_REPLY: on_fuse_reply(f, bytes); break;
    case H_FUSE_DROP: on_fuse_drop(f); break;
    case H_SHUTDOWN: on_shutdown(f, bytes); break;
    default: say("a frame of unknown type %u", f->type);
    }
}

/* 0, or what ends the conversation. */
static const char *read_frames(void)
{
    struct frame f;
    const char *bytes;
    int whole;
    uint32_t bells = 0;
    ssize_t n = ring_is_open() ? ring_read(&inbox, channel, &bells) : buffer_read(&inbox, channel, 2 * FRAME_MAX);
    if (n < 0)
        return errno == EAGAIN ? NULL : strerror(errno);
    if (n == 0)
        return "the channel ended";
    while ((whole = frame_peek(&inbox, &f, &bytes)) > 0) {
        on_frame(&f, bytes);
        buffer_take(&inbox, sizeof f + f.length);
    }
    if (is_line)
        frame_add(&outbox, G_TAKEN, bells, (uint32_t)n, NULL, 0);
    return whole < 0 ? "not a frame" : NULL;
}

/* --- the loop --------------------------------------------------------------------------------- */

static void prepare(void)
{
    sigset_t all;
    sigfillset(&all);
    sigemptyset(&no_signals);
    for (const int *s = (const int[]){SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT, 0}; *s; s++)
        sigdelset(&all, *s);
    sigprocmask(SIG_SETMASK, &all, NULL);
    umask(0022);
    int null = open("/dev/null", O_RDWR);
    for (int fd = 0; null >= 0 && booted && fd < 3; fd++)
        dup2(null, fd);
    if (null > 2)
        close(null);
    sigset_t children;
    sigemptyset(&children);
    sigaddset(&children, SIGCHLD);
    signals = signalfd(-1, &children, SFD_CLOEXEC | SFD_NONBLOCK);
    flights = mmap(NULL, PROCESSES_MAX * sizeof *flights, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (signals < 0 || flights == MAP_FAILED)
        abort();
}

static struct pollfd set[4 * PROCESSES_MAX + 2048];
static unsigned set_size;

int want(int fd, short events)
{
    if (fd < 0 || set_size == sizeof set / sizeof *set)
        return -1;
    set[set_size] = (struct pollfd){fd, events, 0};
    return (int)set_size++;
}

short got(int at) { return at < 0 ? 0 : set[at].revents; }

static void wait_for_events(void)
{
    int full = buffer_size(&outbox) >= QUEUE_FULL;
    set_size = 0;
    want(channel, (short)(POLLIN | (buffer_size(&outbox) ? POLLOUT : 0)));
    want(signals, POLLIN);
    for (struct process *p = processes; p; p = p->next) {
        p->at_channel = want(p->channel, POLLIN);
        p->at_in = p->mode == MODE_TERMINAL && !buffer_size(&p->input) ? -1 : want(p->in, buffer_size(&p->input) ? POLLOUT : 0);
        for (int i = 0; i < 2; i++)
            p->at_out[i] = full || !p->credit[i] || (p->launching && p->mode == MODE_TERMINAL) ? -1 : want(p->out[i], POLLIN);
    }
    want_mounts(full);
    if (poll(set, set_size, -1) < 0)
        for (unsigned i = 0; i < set_size; i++)
            set[i].revents = 0;
}

static void serve_processes(void)
{
    for (struct process *p = processes, *next; p; p = next) {
        next = p->next;
        if (got(p->at_channel) && read_channel(p))
            continue;
        if (got(p->at_in))
            pump_in(p);
        if (got(p->at_in) & POLLERR)
            stop_input(p);
        for (int i = 0; i < 2; i++)
            if (got(p->at_out[i]))
                pump_out(p, i);
        p->at_channel = p->at_in = p->at_out[0] = p->at_out[1] = -1;
    }
    serve_mounts();
}

int main(int argc, char **argv)
{
    const char *wanted = getenv("BULKHEAD_GUEST_CHANNEL"), *problem = NULL;
    static const uint8_t no_nonce[16];
    if (getpid() != 1 && argc > 1)
        return tool_main(argc, argv);
    if (getpid() != 1) {
        fprintf(stderr, "bulkhead-guest is the process 1 of a guest\n");
        return 2;
    }
    if (!wanted || strncmp(wanted, "fd:", 3))
        booted = boot();
    prepare();
    channel = open_channel(wanted);
    if (booted && getenv("BULKHEAD_GUEST_RING"))
        open_ring(getenv("BULKHEAD_GUEST_RING"));
    if (channel < 0)
        say("bulkhead-guest: no channel: %s", strerror(errno));
    is_line = channel >= 0 && isatty(channel);
    /* Spoken first: by then the line is raw and somebody reads. */
    frame_add(&outbox, G_HELLO, 0, PROTOCOL_VERSION, no_nonce, sizeof no_nonce);
    while (channel >= 0 && !problem) {
        wait_for_events();
        short on_channel = set[0].revents;
        if (on_channel & POLLOUT)
            buffer_flush(&outbox, channel);
        if (set[1].revents)
            reap();
        serve_processes();
        if (on_channel & POLLIN)
            problem = read_frames();
        else if (on_channel & (POLLHUP | POLLERR)) {
            problem = booted ? NULL : "the channel ended";
            poll(NULL, 0, 50); /* nobody is at the other end just now */
        }
        if (problem && booted && !strcmp(problem, "the channel ended")) {
            problem = NULL;
            poll(NULL, 0, 50);
        }
        for (struct process *p = processes, *next; p; p = next) {
            next = p->next;
            if (p->told && p->out[0] < 0 && p->out[1] < 0)
                free_process(p);
        }
        run_pending();
        go_on_closing();
    }
    say("bulkhead-guest: %s", problem ? problem : "no channel");
    /* Nobody serves the mounts any more. */
    drop_mounts();
    kill_all();
    while (waitpid(-1, NULL, 0) > 0)
        ;
    closing_how = (uint32_t)RB_POWER_OFF;
    if (booted)
        sync();
    end_guest();
}
