/* A library preloaded into QEMU that writes the process into a file: an image, from which thaw.c
 * makes processes that go on where it stood, with everything it had translated. x86-64 only.
 *
 * A thread of ours waits at the socket BULKHEAD_CAPTURE names. A client sends one byte with the
 * file to write to:
 *     T   write the image; the process has no more to do and is ended by whoever asked
 *     S   stop the machine (over the control socket's other end, BULKHEAD_CONTROL), write, answer,
 *         wait for one byte more or for the client's end, go on
 * An answer is a byte 0, or 1 and a text; after S there are two.
 *
 * To write, every other thread is interrupted (SIGFPE: what QEMU's threads do not block, and no
 * correct program causes) and waits in the handler: the kernel has put its registers on its stack,
 * and rt_sigreturn(2) takes them from there, now or in another process. Nothing here uses libc,
 * whose locks and thread-local variables are those of the threads that stand still.
 */
#define _GNU_SOURCE
#include "image.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <linux/sched.h>
#include <poll.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <sys/un.h>

#define PARK SIGFPE
#define MERGE 16 /* pages: smaller gaps are written with what is around them */
#define CHUNK 256u
#define PATIENCE_MS 60000

struct old_action { void (*handler)(int, siginfo_t *, void *); uint64_t flags; void (*restorer)(void); uint64_t mask; };

static struct image image;
static char text[1 << 20];
static uint64_t pages[4096];
static _Alignas(16) char stack[1 << 16];
static char socket_path[IMAGE_PATH];
static int listener = -1, client = -1, target = -1, control = -1;
static uint32_t parked, phase, in_image, active;
static int own_tid;
static const char *problem;

void *memset(void *to, int c, size_t n)
{
    char *at = to;
    for (size_t i = 0; i < n; i++) {
        at[i] = (char)c;
        __asm__ volatile("" ::: "memory"); /* not a call of itself */
    }
    return to;
}

void *memcpy(void *to, const void *from, size_t n)
{
    char *at = to;
    const char *source = from;
    for (size_t i = 0; i < n; i++) {
        at[i] = source[i];
        __asm__ volatile("" ::: "memory");
    }
    return to;
}

static void copy_text(char *to, const char *from, size_t size)
{
    size_t n = 0;
    for (; n + 1 < size && from[n]; n++)
        to[n] = from[n];
    to[n] = 0;
}

static char *add_number(char *to, uint64_t value)
{
    char digits[24];
    int n = 0;
    do
        digits[n++] = (char)('0' + value % 10);
    while (value /= 10);
    while (n)
        *to++ = digits[--n];
    *to = 0;
    return to;
}

/* The file as text in `into`; its size, or -errno. */
static long read_text(const char *path, char *into, size_t size)
{
    long fd = raw4(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC, 0), n = 0, got = 0;
    if (fd < 0)
        return fd;
    while (n + 1 < (long)size && (got = raw(SYS_read, fd, into + n, size - 1 - (size_t)n)) > 0)
        n += got;
    raw(SYS_close, fd, 0, 0);
    into[n < 0 ? 0 : n] = 0;
    return got < 0 ? got : n;
}

/* --- memory ------------------------------------------------------------------------------------ */

static int is_zero(const uint64_t *page)
{
    for (unsigned i = 0; i < IMAGE_PAGE / sizeof *page; i++)
        if (page[i])
            return 0;
    return 1;
}

static void add_run(uint64_t start, uint64_t end, uint64_t offset, uint32_t prot, enum run_kind kind)
{
    if (start >= end)
        return;
    if (image.runs == IMAGE_RUNS) {
        problem = "its memory is in too many pieces";
        return;
    }
    image.run[image.runs++] = (struct image_run){start, end, offset, prot, kind};
}

/* Write pages to their place in the file; those of zeros stay holes. */
static void write_pages(uint64_t start, uint64_t end, uint64_t offset)
{
    for (uint64_t at = start; at < end && !problem;) {
        uint64_t from = at;
        while (at < end && at - from < CHUNK * IMAGE_PAGE && !is_zero((const uint64_t *)at))
            at += IMAGE_PAGE;
        for (uint64_t done = from; done < at;) {
            long n = raw4(SYS_pwrite64, target, done, at - done, offset + done - start);
            if (n <= 0) {
                problem = "the file could not be written";
                return;
            }
            done += (uint64_t)n;
        }
        if (at == from)
            at += IMAGE_PAGE;
    }
}

static void add_data(uint64_t start, uint64_t end, uint32_t prot)
{
    add_run(start, end, image.size, prot, RUN_DATA);
    write_pages(start, end, image.size);
    image.size += end - start;
}

/* Anonymous memory: what has never been touched is new memory in the image too. */
static void add_sparse(uint64_t start, uint64_t end, uint32_t prot, long pagemap)
{
    uint64_t data = 0, last = 0, clean = start; /* a run under way: data..last */
    for (uint64_t at = start; at < end;) {
        uint64_t count = (end - at) / IMAGE_PAGE;
        if (count > sizeof pages / sizeof *pages)
            count = sizeof pages / sizeof *pages;
        long n = raw4(SYS_pread64, pagemap, pages, count * 8, at / IMAGE_PAGE * 8);
        if (n < 8) {
            problem = "which of its pages are used could not be read";
            return;
        }
        for (long i = 0; i < n / 8; i++, at += IMAGE_PAGE) {
            if (!(pages[i] >> 62)) /* neither present nor swapped out */
                continue;
            if (data && at - last > MERGE * IMAGE_PAGE) {
                add_run(clean, data, 0, prot, RUN_NEW);
                add_data(data, last, prot);
                clean = last;
                data = 0;
            }
            if (!data)
                data = at;
            last = at + IMAGE_PAGE;
        }
    }
    if (data) {
        add_run(clean, data, 0, prot, RUN_NEW);
        add_data(data, last, prot);
        clean = last;
    }
    add_run(clean, end, 0, prot, RUN_NEW);
}

static void add_memory(void)
{
    struct map_line line;
    long pagemap = raw4(SYS_openat, AT_FDCWD, "/proc/self/pagemap", O_RDONLY | O_CLOEXEC, 0);
    if (pagemap < 0 || read_text("/proc/self/maps", text, sizeof text) <= 0) {
        problem = "its memory map could not be read";
        return;
    }
    for (const char *at = text; !problem && (at = next_map(at, &line));) {
        if (starts(line.name, "[vsyscall]") || line.end <= OURS_END)
            continue;
        if (is_kernel_map(&line)) {
            add_run(line.start, line.end, 0, (uint32_t)(line.name[2] == 'd'), RUN_KERNEL);
            if (starts(line.name, "[vdso]"))
                image.kernel_hash = hash_bytes((void *)line.start, (void *)line.end);
        } else if (!(line.prot & PROT_READ))
            add_run(line.start, line.end, 0, line.prot, RUN_NEW);
        else if (line.is_shared && line.inode)
            problem = "it shares memory with others";
        else if (line.inode)
            add_data(line.start, line.end, line.prot);
        else
            add_sparse(line.start, line.end, line.prot, pagemap);
    }
    raw(SYS_close, pagemap, 0, 0);
}

/* --- descriptors -------------------------------------------------------------------------------- */

static uint64_t number_after(const char *name, int base)
{
    for (const char *at = text; *at; at++)
        if (starts(at, name)) {
            while (*name++)
                at++;
            while (*at == ' ' || *at == '\t')
                at++;
            return read_number(&at, base);
        }
    return 0;
}

static void add_fd(int fd)
{
    char path[40] = "/proc/self/fd/", info[40] = "/proc/self/fdinfo/", link[IMAGE_PATH + 1];
    add_number(path + 14, (uint64_t)fd);
    add_number(info + 18, (uint64_t)fd);
    long n = raw(SYS_readlink, path, link, IMAGE_PATH);
    if (n <= 0 || fd == client || fd == target)
        return;
    link[n] = 0;
    if (read_text(info, text, sizeof text) < 0 || image.fds == IMAGE_FDS || n == (long)IMAGE_PATH) {
        problem = "its descriptors could not be read";
        return;
    }
    struct image_fd *one = &image.fd[image.fds++];
    *one = (struct image_fd){.fd = fd, .flags = (uint32_t)number_after("flags:", 8)};
    if (starts(link, "anon_inode:[eventfd]")) {
        one->kind = FD_EVENT;
        one->value = number_after("eventfd-count:", 16);
    } else if (starts(link, "anon_inode:[eventpoll]")) {
        one->kind = FD_POLL;
        if (number_after("tfd:", 10))
            problem = "it polls in a way that is not known";
    } else if (starts(link, "anon_inode:[signalfd]")) {
        one->kind = FD_SIGNAL;
        one->value = number_after("sigmask:", 16);
    } else if (fd == listener) {
        one->kind = FD_LISTENER;
        copy_text(one->path, socket_path, sizeof one->path);
    } else if (fd <= 2 || starts(link, "socket:") || starts(link, "pipe:") || starts(link, "/dev/net/tun")) {
        one->kind = FD_GIVEN;
    } else if (link[0] == '/' && !starts(link, "/memfd:")) {
        one->kind = FD_FILE;
        one->value = number_after("pos:", 10);
        copy_text(one->path, link, sizeof one->path);
    } else
        problem = "it has a descriptor of an unknown kind";
}

static void each_entry(const char *path, void (*visit)(int))
{
    static char entries[8192];
    long fd = raw4(SYS_openat, AT_FDCWD, path, O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0), n;
    if (fd < 0) {
        problem = "/proc could not be read";
        return;
    }
    while ((n = raw(SYS_getdents64, fd, entries, sizeof entries)) > 0)
        for (long at = 0; at < n;) {
            const struct { uint64_t inode, next; uint16_t size; uint8_t type; char name[]; } *one = (void *)(entries + at);
            const char *digits = one->name;
            at += one->size;
            uint64_t value = read_number(&digits, 10);
            if (digits != one->name && !*digits && (int)value != fd)
                visit((int)value);
        }
    raw(SYS_close, fd, 0, 0);
}

/* --- threads ------------------------------------------------------------------------------------ */

static void add_thread(void *context, int ours)
{
    uint32_t slot = __atomic_fetch_add(&image.threads, 1, __ATOMIC_SEQ_CST);
    if (slot >= IMAGE_THREADS)
        return;
    uint64_t fs = 0;
    raw(SYS_arch_prctl, 0x1003, &fs, 0); /* ARCH_GET_FS */
    image.thread[slot] = (struct image_thread){(uint64_t)context, fs, (uint32_t)raw(SYS_gettid, 0, 0, 0), (uint32_t)ours};
}

/* Where libc has a thread's number in what its fs points to: the same place in all of them. */
static int find_numbers(void)
{
    for (uint32_t at = 0; at < 2304; at += 4) {
        uint32_t same = 0;
        for (uint32_t i = 0; i < image.threads; i++) {
            const struct image_thread *one = &image.thread[i];
            same += one->is_ours || *(uint32_t *)(one->fs + at) == one->tid;
        }
        image.tid_offset = at;
        if (same == image.threads)
            return 1;
    }
    return 0;
}

static void write_image(void *context)
{
    add_thread(context, 1);
    for (uint32_t i = 0; i < image.threads; i++)
        if (image.thread[i].tid == (uint32_t)raw(SYS_getpid, 0, 0, 0)) {
            struct image_thread main = image.thread[i];
            image.thread[i] = image.thread[0];
            image.thread[0] = main;
        }
    if (!find_numbers())
        problem = "its C library is not known";
    for (int i = 1; i <= (int)IMAGE_SIGNALS; i++)
        raw4(SYS_rt_sigaction, i, 0, &image.actions[i - 1], 8);
    image.size = (sizeof image + IMAGE_PAGE - 1) / IMAGE_PAGE * IMAGE_PAGE;
    each_entry("/proc/self/fd", add_fd);
    in_image = 1;
    if (!problem)
        add_memory();
    in_image = 0;
    for (uint64_t done = 0; !problem && done < sizeof image;) {
        long n = raw4(SYS_pwrite64, target, (char *)&image + done, sizeof image - done, done);
        if (n <= 0)
            problem = "the file could not be written";
        else
            done += (uint64_t)n;
    }
    if (!problem && raw(SYS_ftruncate, target, image.size, 0))
        problem = "the file could not be written";
}

static void on_park(int signal, siginfo_t *info, void *context)
{
    (void)signal;
    (void)info;
    if ((int)raw(SYS_gettid, 0, 0, 0) == own_tid) {
        write_image(context);
        return;
    }
    if (!active)
        return; /* asked twice */
    uint32_t now = phase;
    add_thread(context, 0);
    __atomic_fetch_add(&parked, 1, __ATOMIC_SEQ_CST);
    raw(SYS_futex, &parked, FUTEX_WAKE, 1);
    while (__atomic_load_n(&phase, __ATOMIC_SEQ_CST) == now)
        raw4(SYS_futex, &phase, FUTEX_WAIT, now, 0);
}

static uint32_t wanted;

static void park(int tid)
{
    if (tid == own_tid)
        return;
    wanted++;
    for (uint32_t i = 0; i < parked && i < IMAGE_THREADS; i++)
        if (image.thread[i].tid == (uint32_t)tid)
            return;
    raw(SYS_tgkill, raw(SYS_getpid, 0, 0, 0), tid, PARK);
}

/* Until every thread there is stands still: some end or begin meanwhile. */
static void park_all(void)
{
    const struct timespec moment = {0, 20000000};
    do {
        wanted = 0;
        each_entry("/proc/self/task", park);
        uint32_t now = __atomic_load_n(&parked, __ATOMIC_SEQ_CST);
        if (now != wanted)
            raw4(SYS_futex, &parked, FUTEX_WAIT, now, &moment);
    } while (!problem && __atomic_load_n(&parked, __ATOMIC_SEQ_CST) != wanted);
}

/* Everybody stands still, the image is written, everybody goes on. */
static void capture(void)
{
    problem = NULL;
    parked = 0;
    active = 1;
    image = (struct image){.magic = IMAGE_MAGIC};
    own_tid = (int)raw(SYS_gettid, 0, 0, 0);
    park_all();
    if (image.threads >= IMAGE_THREADS)
        problem = "it has too many threads";
    raw(SYS_tgkill, raw(SYS_getpid, 0, 0, 0), own_tid, PARK); /* write_image() */
    active = 0;
    if (in_image) /* in a process made of the image: the others do not wait */
        return;
    __atomic_fetch_add(&phase, 1, __ATOMIC_SEQ_CST);
    raw(SYS_futex, &phase, FUTEX_WAKE, 0x7fffffff);
}

/* --- what is asked ------------------------------------------------------------------------------ */

static void answer(const char *failure)
{
    struct msghdr message = {0};
    struct iovec parts[2] = {{(void *)(failure ? "\1" : "\0"), 1}, {(void *)failure, 0}};
    while (failure && failure[parts[1].iov_len])
        parts[1].iov_len++;
    message.msg_iov = parts;
    message.msg_iovlen = 2;
    raw(SYS_sendmsg, client, &message, MSG_NOSIGNAL);
}

/* One request on `client`; 0 when there is none. */
static char receive(void)
{
    char command = 0;
    union { struct cmsghdr align; char bytes[CMSG_SPACE(sizeof(int))]; } rights;
    struct iovec part = {&command, 1};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = rights.bytes, .msg_controllen = sizeof rights.bytes};
    target = -1;
    if (raw(SYS_recvmsg, client, &message, MSG_CMSG_CLOEXEC) != 1)
        return 0;
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    if (header && header->cmsg_type == SCM_RIGHTS)
        __builtin_memcpy(&target, CMSG_DATA(header), sizeof target);
    return command;
}

/* Tell QEMU, and wait for its answer; events and older answers are passed over. */
static int tell(const char *line)
{
    size_t size = 0;
    while (line[size])
        size++;
    while (raw6(SYS_recvfrom, control, (long)text, sizeof text, MSG_DONTWAIT, 0, 0) > 0)
        ;
    if (raw6(SYS_sendto, control, (long)line, (long)size, MSG_NOSIGNAL, 0, 0) != (long)size)
        return -1;
    for (long n = 0;;) {
        struct pollfd ready = {control, POLLIN, 0}; /* the socket may be one that does not block */
        if (raw(SYS_poll, &ready, 1, PATIENCE_MS) <= 0)
            return -1;
        long got = raw6(SYS_recvfrom, control, (long)(text + n), (long)sizeof text - n - 1, 0, 0, 0);
        if (got <= 0)
            return -1;
        n += got;
        text[n] = 0;
        for (const char *at = text; *at; at++)
            if (starts(at, "{\"return\"") || starts(at, "{\"error\""))
                return at[2] == 'r' ? 0 : -1;
    }
}

static _Noreturn void serve(void)
{
    for (;;) {
        client = (int)raw4(SYS_accept4, listener, 0, 0, SOCK_CLOEXEC);
        if (client < 0)
            continue;
        char command = receive();
        if ((command == 'T' || command == 'S') && target >= 0) {
            int stopped = command == 'S' && tell("{\"execute\":\"stop\"}\n");
            if (stopped)
                problem = "QEMU does not stop";
            else
                capture();
            if (in_image) {
                in_image = 0;
                client = target = -1;
                continue;
            }
            answer(problem);
            if (command == 'S') {
                raw6(SYS_recvfrom, client, (long)text, 1, 0, 0, 0);
                answer(tell("{\"execute\":\"cont\"}\n") ? "QEMU does not go on" : NULL);
            }
        }
        if (target >= 0)
            raw(SYS_close, target, 0, 0);
        raw(SYS_close, client, 0, 0);
        client = target = -1;
    }
}

__asm__(".text\n"
        "return_from_signal: mov $15, %eax\n syscall\n"
        /* (flags, stack, function): a thread of nobody but ours */
        "begin_thread: mov $56, %eax\n mov %rdx, %r9\n xor %edx, %edx\n xor %r10d, %r10d\n xor %r8d, %r8d\n"
        " syscall\n test %rax, %rax\n jnz 1f\n xor %ebp, %ebp\n call *%r9\n1: ret\n");
extern void return_from_signal(void) __attribute__((visibility("hidden")));
extern long begin_thread(long flags, void *top, void (*function)(void)) __attribute__((visibility("hidden")));

static const char *variable(char **environment, const char *name)
{
    for (; *environment; environment++)
        if (starts(*environment, name)) {
            const char *value = *environment;
            while (*value++ != '=')
                ;
            return value;
        }
    return NULL;
}

/* The heap does not grow by brk(2), which the kernel counts from a place of its own in a process
 * made of the image; libc then maps memory instead. */
static void block_heap(void)
{
    uint64_t end = (uint64_t)raw(SYS_brk, 0, 0, 0);
    end = (end + 2 * IMAGE_PAGE - 1) / IMAGE_PAGE * IMAGE_PAGE;
    raw6(SYS_mmap, (long)end, IMAGE_PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
}

__attribute__((constructor)) static void begin(int argc, char **argv, char **environment)
{
    (void)argc;
    (void)argv;
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    const char *path = variable(environment, "BULKHEAD_CAPTURE="), *other = variable(environment, "BULKHEAD_CONTROL=");
    if (!path)
        return;
    block_heap();
    if (other)
        control = (int)read_number(&other, 10);
    copy_text(socket_path, path, sizeof socket_path);
    copy_text(address.sun_path, path, sizeof address.sun_path);
    listener = (int)raw(SYS_socket, AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    raw(SYS_unlink, path, 0, 0);
    struct old_action action = {on_park, SA_SIGINFO | SA_RESTART | 0x04000000, return_from_signal, ~0ull};
    uint64_t all = ~(1ull << (PARK - 1)), before;
    if (raw(SYS_bind, listener, &address, sizeof address) || raw(SYS_listen, listener, 4, 0)
        || raw4(SYS_rt_sigaction, PARK, &action, 0, 8))
        raw(SYS_exit_group, 126, 0, 0);
    raw4(SYS_rt_sigprocmask, SIG_SETMASK, &all, &before, 8);
    begin_thread(CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM, stack + sizeof stack, serve);
    raw4(SYS_rt_sigprocmask, SIG_SETMASK, &before, 0, 8);
}
