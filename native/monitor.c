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
 *       --files-fd N    or this descriptor is connected to it
 *       --ring PATH     bytes for the guest go through this new file, which is its last disk
 *                       (guest_ring.c), and the channel only says how many
 *       --detail FILE   how it ended, as JSON, written into this file, which is there
 *       --clone         the guest was booted before: speak first
 *       --resume        likewise; and its main process, which the frames adopt, goes on
 *       --boot-seconds N   how long the guest may take to its HELLO (120)
 *       --window N      at most N bytes that the guest has not told to have read (TAKEN): for
 *                       user-mode-linux, whose serial line is dead once it was too full
 *       Signals are passed on to the main process, 63 as SIGKILL.
 *   bulkhead-monitor exec --socket PATH|--channel N [--member] [--frames FILE] [--report PATH]
 *       Runs one more process: hands its own standard streams to the monitor, ends as it does.
 *       With --channel that socket is connected already; with --member MEMBER was sent on it: the
 *       farewell is waited for.
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
#include <sys/reboot.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>

struct options options = {.boot_seconds = 120, .window = LONG_MAX};
size_t under_way;
struct buffer script, to_guest;
struct server *servers;
static struct buffer last_words;
struct client *clients;
struct process *processes, *main_process;
struct request *requests;
enum stage stage;
static pid_t vmm;
int guest = -1, listener = -1, report = -1;
static int signals = -1, console = -1;
static int vmm_ended, late, exit_code = FAILED_CODE;
unsigned client_count, request_count, process_count, server_count;
uint64_t deadline;
static char console_tail[16384];
#define LAST_WORDS 1024u /* of the console, in the report of a failure */
static size_t console_size;

/* --- the end ---------------------------------------------------------------------------------- */

static void write_detail(const char *reason, const char *text)
{
    FILE *file = options.detail ? fopen(options.detail, "we") : NULL;
    if (!file)
        return;
    fprintf(file, "{\"reason\":\"%s\",\"code\":%d,\"wait_status\":%u,\"oom_kills\":%u,\"text\":", reason, exit_code,
            main_process ? main_process->status : 0, main_process ? main_process->oom_kills : 0);
    put_json(file, text, strlen(text));
    fprintf(file, ",\"console\":");
    put_json(file, console_tail, console_size);
    fprintf(file, "}\n");
    fclose(file);
}

static void report_failure(int fd, uint32_t id, int error, const char *text, size_t size)
{
    char payload[sizeof(struct failed) + 600 + LAST_WORDS + 1];
    struct failed f = {.kind = FAILED_REFUSED};
    if (size > sizeof payload - sizeof f)
        size = sizeof payload - sizeof f;
    memcpy(payload, &f, sizeof f);
    memcpy(payload + sizeof f, text, size);
    send_packet(fd, G_FAILED, id, (uint32_t)error, payload, sizeof f + size);
}

void report_refusal(int fd, uint32_t id, int error, const char *text)
{
    report_failure(fd, id, error, text, strnlen(text, 512));
}

_Noreturn void leave(const char *reason, const char *text)
{
    if (vmm > 0) {
        kill(vmm, SIGKILL);
        while (waitpid(vmm, NULL, 0) < 0 && errno == EINTR)
            ;
    }
    write_detail(reason, text);
    exit(exit_code);
}

static void read_console(void);

_Noreturn void fail(const char *format, ...)
{
    char text[600];
    va_list list;
    va_start(list, format);
    vsnprintf(text, sizeof text, format, list);
    va_end(list);
    read_console(); /* as much as a pipe has at once */
    /* What a client reads by is the report; the streams get it too if the workload had begun. */
    if (stage == ENDING)
        leave("exited", text);
    if (report >= 0) {
        /* With the last words of the console, which Python makes fit for people. */
        char whole[sizeof text + LAST_WORDS + 1];
        size_t last = console_size < LAST_WORDS ? console_size : LAST_WORDS, size = strlen(text) + 1;
        memcpy(whole, text, size);
        memcpy(whole + size, console_tail + console_size - last, last);
        report_failure(report, 0, EIO, whole, size + last);
    } else
        dprintf(2, "bulkhead-monitor: %s\n", text);
    exit_code = FAILED_CODE;
    leave("failed", text);
}

/* The main process has ended and everything it wrote is out. */
static void finish(void)
{
    uint32_t status = main_process->status;
    exit_code = WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
    int members = 0; /* have disks of their own, which are to be written back */
    for (struct client *c = clients; c; c = c->next)
        members |= c->member;
    if (members && !buffer_size(&last_words))
        frame_add(&last_words, H_SHUTDOWN, 0, (uint32_t)RB_POWER_OFF, NULL, 0);
    if (!buffer_size(&last_words) || vmm_ended || guest < 0)
        leave("exited", "");
    buffer_add(&to_guest, last_words.bytes + last_words.start, buffer_size(&last_words));
    stage = ENDING;
    deadline = now_ms(CLOCK_MONOTONIC) + 10000;
}

void remember(const char *bytes, size_t size)
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
        if (f.type == H_ADOPT && f.length == sizeof r && !main_process) {
            memcpy(&r, bytes, sizeof r);
            main_process = add_process(f.id, r.mode, own_streams());
        } else if (f.type == H_FUSE_MOUNT)
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

static struct pollfd set[3 * PROCESSES_MAX + CLIENTS_MAX + SERVERS_MAX + 8];
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
    static char bytes[sizeof console_tail];
    ssize_t n = console < 0 ? -1 : read(console, bytes, sizeof bytes);
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
        if (p->owner && !p->told) {
            send_packet(p->owner->fd, G_EXITED, p->owner_id, p->status, NULL, 0);
            p->owner->left = 1;
        }
        p->told = 1;
        if (p == main_process) {
            if (stage != ENDING && (streams_ended(p) || (late && !deadline) || guest < 0))
                finish();
        } else if (streams_ended(p))
            free_process(p);
    }
    for (struct client *c = clients, *next; c; c = next) {
        next = c->next;
        int member = c->member;
        if (c->dead)
            forget_client(c); /* a member stays known */
        if (member)
            say_farewell(c);
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
    want(guest, 1, (short)((files_full() ? 0 : POLLIN) | (may_write_guest() ? POLLOUT : 0)));
    if (guest < 0)
        set[set_size++] = (struct pollfd){-1, 0, 0};
    for (struct server *s = servers; s; s = s->next)
        s->at = want(s->fd, 1, (short)((space ? POLLIN : 0) | (buffer_size(&s->to) ? POLLOUT : 0)));
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
    short on_signal = set[0].revents, on_guest = set[1].revents;
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
    for (struct server *s = servers, *next; s; s = next) {
        next = s->next;
        if (got(s->at) & POLLOUT)
            flush_files(s);
        else if (got(s->at))
            read_files(s);
    }
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
    if (options.files || options.files_fd)
        add_server(options.files ? connect_to(options.files, SOCK_STREAM, 30) : atoi(options.files_fd), NULL);
    if (options.ring)
        open_ring(options.ring);
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
               "       bulkhead-monitor exec --socket PATH|--channel N [--member] [--frames FILE] [--report PATH]\n");
    exit(FAILED_CODE);
}

int main(int argc, char **argv)
{
    const struct { const char *name, **value; } texts[] = {
        {"--frames", &options.frames}, {"--socket", &options.socket}, {"--report", &options.report},
        {"--files", &options.files}, {"--files-fd", &options.files_fd}, {"--ring", &options.ring}, {"--detail", &options.detail}, {"--channel", &options.channel}};
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
        else if (!strcmp(argv[i], "--member"))
            options.member = 1;
        else if (!strcmp(argv[i], "--resume"))
            options.clone = options.resume = 1;
        else if (!value || i + 1 >= argc)
            usage();
        else
            *value = argv[++i];
    }
    options.boot_seconds = seconds ? strtol(seconds, NULL, 10) : 120;
    if (window && (options.window = strtol(window, NULL, 10)) < 1)
        usage();
    options.vmm = argv + i + 1;
    if (argc > 2 && !strcmp(argv[1], "exec") && (options.socket || options.channel))
        return exec_main(&options);
    if (argc < 3 || strcmp(argv[1], "run") || i + 1 >= argc)
        usage();
    run_main();
}
