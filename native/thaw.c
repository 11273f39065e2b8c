/* Gives an image (capture.c) life: this process becomes the one that was captured.
 *
 *   bulkhead-thaw NAME IMAGE [TO=FROM...]
 *
 * IMAGE is a descriptor. NAME is for whoever lists processes. TO=FROM: what the captured process
 * had open as TO and cannot open itself (sockets, pipes, taps) is our descriptor FROM; those that
 * are not named are closed, but for 0, 1 and 2. Memory is mapped copy-on-write: many processes of
 * one image share what they do not change, translated code as well as a guest's memory.
 *
 * The program lies where no other does (Makefile: -Ttext-segment). It leaves its own stack, moves
 * the kernel's pages (vdso) to where the image has them, takes away everything else, maps the
 * image's memory, and begins its threads: each with rt_sigreturn(2) on what the kernel had saved.
 */
#define _GNU_SOURCE
#include "image.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/sched.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#define PARKING 0x60000000ull
#define HIGH 1024 /* descriptors are kept from here on while they are sorted */
#define STACK_ROOM (4ull << 20)
#define KERNEL_MAPS 8

static _Alignas(4096) struct image image;
static struct { int to, from; } given[IMAGE_FDS];
static unsigned given_count;
static struct map_line kernel_map[KERNEL_MAPS];
static unsigned kernel_count;
static char maps[1 << 16];
static int image_fd;
static _Alignas(16) char stack[1 << 16];

static _Noreturn void fail(const char *what, int error)
{
    dprintf(2, "bulkhead-thaw: %s%s%s\n", what, error ? ": " : "", error ? strerror(error) : "");
    exit(125);
}

static void read_image(void)
{
    if (pread(image_fd, &image, sizeof image, 0) != (ssize_t)sizeof image || image.magic != IMAGE_MAGIC)
        fail("not an image", 0);
    if (image.runs > IMAGE_RUNS || image.threads > IMAGE_THREADS || image.fds > IMAGE_FDS || !image.threads)
        fail("a damaged image", 0);
    for (unsigned i = 0; i < image.runs; i++)
        if (image.run[i].start < OURS_END || image.run[i].start >= image.run[i].end)
            fail("a damaged image", 0);
}

static void read_maps(void)
{
    int fd = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
    size_t size = 0;
    for (ssize_t n; fd >= 0 && size + 1 < sizeof maps && (n = read(fd, maps + size, sizeof maps - 1 - size)) > 0;)
        size += (size_t)n;
    if (!size)
        fail("/proc/self/maps", errno);
    close(fd);
    struct map_line line;
    uint64_t hash = 0;
    for (const char *at = maps; (at = next_map(at, &line));)
        if (is_kernel_map(&line) && kernel_count < KERNEL_MAPS) {
            kernel_map[kernel_count++] = line;
            if (starts(line.name, "[vdso]"))
                hash = hash_bytes((void *)line.start, (void *)line.end);
        }
    unsigned wanted = 0;
    for (unsigned i = 0; i < image.runs; i++)
        if (image.run[i].kind == RUN_KERNEL) {
            if (wanted == kernel_count
                || kernel_map[wanted].end - kernel_map[wanted].start != image.run[i].end - image.run[i].start)
                fail("the image was made under another kernel", 0);
            wanted++;
        }
    if (wanted != kernel_count || hash != image.kernel_hash)
        fail("the image was made under another kernel", 0);
}

/* --- descriptors -------------------------------------------------------------------------------- */

static int source_of(int fd)
{
    for (unsigned i = 0; i < given_count; i++)
        if (given[i].to == fd)
            return given[i].from;
    return fd <= 2 ? fd : -1;
}

static int listen_at(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    memcpy(address.sun_path, path, sizeof address.sun_path < IMAGE_PATH ? sizeof address.sun_path : IMAGE_PATH);
    unlink(path);
    return fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof address) || listen(fd, 4) ? -1 : fd;
}

static int make_fd(const struct image_fd *one)
{
    int fd;
    switch (one->kind) {
    case FD_GIVEN:
        fd = source_of(one->fd);
        if (fd < 0)
            return -2;
        return fd;
    case FD_EVENT: return eventfd((unsigned)one->value, EFD_CLOEXEC);
    case FD_POLL: return epoll_create1(EPOLL_CLOEXEC);
    case FD_SIGNAL: return (int)syscall(SYS_signalfd4, -1, &one->value, 8, O_CLOEXEC);
    case FD_LISTENER: return listen_at(one->path);
    case FD_FILE:
        fd = open(one->path, (int)(one->flags & ~(unsigned)(O_CREAT | O_EXCL | O_TRUNC)) | O_CLOEXEC);
        if (fd >= 0 && one->value)
            lseek(fd, (off_t)one->value, SEEK_SET);
        return fd;
    default: return -1;
    }
}

static void sort_descriptors(void)
{
    int high[IMAGE_FDS];
    for (unsigned i = 0; i < image.fds; i++) {
        const struct image_fd *one = &image.fd[i];
        int fd = make_fd(one);
        high[i] = fd < 0 ? fd : fcntl(fd, F_DUPFD_CLOEXEC, HIGH);
        if (fd >= 0 && one->kind != FD_GIVEN)
            close(fd);
        if (high[i] == -1)
            fail(one->path[0] ? one->path : "a descriptor of the image", errno);
        if (high[i] >= 0 && fcntl(high[i], F_SETFL, one->flags & (O_NONBLOCK | O_APPEND)))
            fail("a descriptor's flags", errno);
    }
    int kept = fcntl(image_fd, F_DUPFD_CLOEXEC, HIGH);
    if (kept < 0)
        fail("the image", errno);
    image_fd = kept;
    syscall(SYS_close_range, 3, HIGH - 1, 0);
    for (unsigned i = 0; i < image.fds; i++)
        if (high[i] >= 0 && dup3(high[i], image.fd[i].fd, image.fd[i].flags & O_CLOEXEC) < 0
            && dup2(high[i], image.fd[i].fd) < 0)
            fail("a descriptor", errno);
    for (unsigned i = 0; i < image.fds; i++)
        if (high[i] >= 0 && high[i] != image.fd[i].fd)
            close(high[i]);
}

/* What this process is called is on a stack that will be gone: move it. A kernel that does not let
 * us shows no name. */
static void keep_name(int argc, char **argv)
{
    static char words[4096];
    size_t size = 0;
    for (int i = 0; i < argc && size + strlen(argv[i]) + 1 <= sizeof words; i++)
        size += (size_t)(stpcpy(words + size, argv[i]) - (words + size)) + 1;
    uint64_t low = (uint64_t)words, high = (uint64_t)words + size, end = (uint64_t)sbrk(0);
    struct prctl_mm_map map = {.start_code = low, .end_code = high, .start_data = low, .end_data = high,
                               .start_brk = end, .brk = end, .start_stack = low, .arg_start = low,
                               .arg_end = high, .env_start = high, .env_end = high, .exe_fd = (uint32_t)-1};
    prctl(PR_SET_MM, PR_SET_MM_MAP, &map, sizeof map, 0);
}

/* What QEMU's own filter forbids, and the captured process had no need to load: new programs and
 * processes. Everything else is the jail's filter's. */
static void forbid(void)
{
#define LOAD(what) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, what))
#define REFUSE(call) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, call, 0, 1), BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM)
    struct sock_filter code[] = {
        LOAD(nr),
        /* The break is that of this program: the captured libc is to map memory instead. */
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_brk, 0, 1), BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO),
        REFUSE(SYS_execve), REFUSE(SYS_execveat), REFUSE(SYS_fork), REFUSE(SYS_vfork), REFUSE(SYS_ptrace),
        REFUSE(SYS_socket), REFUSE(SYS_bind), REFUSE(SYS_connect), REFUSE(SYS_setsid), REFUSE(SYS_unshare),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_clone3, 0, 1), BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | ENOSYS),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_clone, 0, 3),
        LOAD(args[0]),
        BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, CLONE_THREAD, 1, 0),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {sizeof code / sizeof *code, code};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program))
        fail("the filter", errno);
}

/* --- the point of no return: no libc, no stack but ours ------------------------------------------ */

static _Noreturn void lost(const char *what, long error)
{
    char text[64];
    size_t n = 0;
    for (const char *part = "bulkhead-thaw: "; *part;)
        text[n++] = *part++;
    while (*what && n < 50)
        text[n++] = *what++;
    text[n++] = ' ';
    for (long digit = 100; digit; digit /= 10)
        text[n++] = (char)('0' + -error / digit % 10);
    text[n++] = '\n';
    raw(SYS_write, 2, text, n);
    raw(SYS_exit_group, 125, 0, 0);
    __builtin_unreachable();
}

static void move(uint64_t from, uint64_t size, uint64_t to)
{
    long moved = raw6(SYS_mremap, (long)from, (long)size, (long)size, MREMAP_MAYMOVE | MREMAP_FIXED, (long)to, 0);
    if (moved != (long)to)
        lost("the kernel's pages", moved);
}

static void map_memory(void)
{
    uint64_t parked[KERNEL_MAPS], at = PARKING;
    unsigned which = 0;
    for (unsigned i = 0; i < kernel_count; i++) { /* what is side by side stays so: vdso code counts on it */
        parked[i] = at;
        move(kernel_map[i].start, kernel_map[i].end - kernel_map[i].start, at);
        at += kernel_map[i].end - kernel_map[i].start;
    }
    raw(SYS_munmap, OURS_END, 0x7ffffffff000ull - OURS_END, 0);
    for (unsigned i = 0; i < image.runs; i++) {
        const struct image_run *run = &image.run[i];
        uint64_t size = run->end - run->start;
        if (run->kind == RUN_KERNEL) {
            move(parked[which++], size, run->start);
            continue;
        }
        long flags = MAP_PRIVATE | MAP_FIXED | (run->kind == RUN_NEW ? MAP_ANONYMOUS | MAP_NORESERVE : 0);
        long mapped = raw6(SYS_mmap, (long)run->start, (long)size, run->prot, flags,
                           run->kind == RUN_NEW ? -1 : image_fd, (long)run->offset);
        if (mapped != (long)run->start)
            lost("its memory", mapped);
    }
    /* The main thread's stack would have grown by itself. */
    uint64_t bottom = image.thread[0].context;
    for (unsigned i = image.runs; i-- > 0;)
        if (image.run[i].start <= bottom && bottom <= image.run[i].end)
            bottom = image.run[i].start;
    raw6(SYS_mmap, (long)(bottom - STACK_ROOM), STACK_ROOM, PROT_READ | PROT_WRITE,
         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0);
    raw(SYS_close, image_fd, 0, 0);
}

__asm__(".text\n"
        /* (flags, context, tid, fs): a thread that begins by returning from a signal */
        "begin_thread: mov $56, %eax\n mov %rdx, %r10\n mov %rcx, %r8\n"
        " syscall\n test %rax, %rax\n jnz 1f\n mov $15, %eax\n syscall\n1: ret\n"
        "return_to: mov %rdi, %rsp\n mov $15, %eax\n syscall\n"
        "on_stack: mov %rdi, %rsp\n xor %ebp, %ebp\n call *%rsi\n");
extern long begin_thread(long flags, uint64_t context, uint64_t tid, uint64_t fs);
extern _Noreturn void return_to(uint64_t context);
extern _Noreturn void on_stack(void *top, void (*function)(void));

static _Noreturn void live(void)
{
    map_memory();
    for (int i = 1; i <= (int)IMAGE_SIGNALS; i++)
        if (i != SIGKILL && i != SIGSTOP)
            raw4(SYS_rt_sigaction, i, &image.actions[i - 1], 0, 8);
    long flags = CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM | CLONE_SETTLS;
    for (unsigned i = 1; i < image.threads; i++) {
        const struct image_thread *one = &image.thread[i];
        long own = one->is_ours ? 0 : CLONE_PARENT_SETTID | CLONE_CHILD_CLEARTID;
        uint64_t tid = one->fs + image.tid_offset;
        /* clone(flags, stack, parent's tid, child's tid, fs): both numbers are libc's one. */
        long made = begin_thread(flags | own, one->context, tid, one->fs);
        if (made < 0)
            lost("its threads", made);
    }
    struct image_thread main = image.thread[0];
    uint64_t tid = main.fs + image.tid_offset;
    *(volatile int *)tid = (int)raw(SYS_set_tid_address, tid, 0, 0);
    raw(SYS_arch_prctl, 0x1002, main.fs, 0); /* ARCH_SET_FS */
    raw(SYS_madvise, &image, sizeof image, MADV_DONTNEED);
    return_to(main.context);
}

int main(int argc, char **argv)
{
    if (argc < 3)
        fail("usage: bulkhead-thaw NAME IMAGE [TO=FROM...]", 0);
    image_fd = atoi(argv[2]);
    for (int i = 3; i < argc; i++) {
        char *equals = strchr(argv[i], '=');
        if (!equals || given_count == IMAGE_FDS)
            fail("usage: bulkhead-thaw NAME IMAGE [TO=FROM...]", 0);
        given[given_count].to = atoi(argv[i]);
        given[given_count++].from = atoi(equals + 1);
    }
    read_image();
    read_maps();
    sort_descriptors();
    prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0); /* a changed byte is to cost a page, not two megabytes */
    prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0);
    prctl(PR_SET_NAME, "qemu", 0, 0, 0);
    keep_name(argc, argv);
    forbid();
    sigset_t all;
    sigfillset(&all);
    sigprocmask(SIG_SETMASK, &all, NULL);
    on_stack(stack + sizeof stack, live);
}
