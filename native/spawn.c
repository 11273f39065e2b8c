/* Clones one child for a launch program, for callers without a holder (bulkhead-runtime), and ends.
 *
 *   bulkhead-spawn PROGRAM PROGRESS CHANNEL FLAGS MAPPED CGROUP FD...
 *
 * All are numbers: descriptors of the program (a file), of a struct spawned (a file, mapped), and of
 * the channel's end for the child; the CLONE_NEW* flags; whether the child waits for a byte on the
 * channel before it begins (its id maps are being written); a cgroup directory or -1; and the
 * program's own descriptors.
 *
 * CLONE_PARENT makes the child the caller's: it reaps it, and this process is gone by then. What can
 * be wrong is said on standard error, with exit code 2 for a refused program and 1 otherwise.
 */
#define _GNU_SOURCE
#include "launch.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define NAMESPACES (uint64_t)(CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET \
                              | CLONE_NEWCGROUP | CLONE_NEWUSER | CLONE_NEWTIME)
enum { A_PROGRAM = 1, A_PROGRESS, A_CHANNEL, A_FLAGS, A_MAPPED, A_CGROUP, A_FDS };

/* What the caller reads in the file; `pid` is 0 until the child exists. */
struct spawned { struct progress progress; int32_t pid; };

static _Noreturn void give_up(int code, const char *what)
{
    fprintf(stderr, "bulkhead-spawn: %s\n", what);
    _exit(code);
}

static long long number(const char *text)
{
    char *end;
    errno = 0;
    long long value = strtoll(text, &end, 10);
    if (errno || end == text || *end)
        give_up(2, "not a number");
    return value;
}

static char *read_program(int fd, size_t *size)
{
    struct stat s;
    if (fstat(fd, &s) || s.st_size <= 0 || s.st_size > (off_t)PROGRAM_MAX_SIZE)
        give_up(2, "the program's file has no such size");
    *size = (size_t)s.st_size;
    char *program = aligned_alloc(16, (*size + 15) & ~(size_t)15);
    if (!program || pread(fd, program, *size, 0) != (ssize_t)*size)
        give_up(1, "cannot read the program");
    return program;
}

/* Ignored signals and a mask would go through the exec into the workload; signal(7). */
static void default_signals(void)
{
    sigset_t none;
    sigemptyset(&none);
    for (int i = 1; i < NSIG; i++)
        if (i != SIGKILL && i != SIGSTOP)
            signal(i, SIG_DFL);
    sigprocmask(SIG_SETMASK, &none, NULL);
}

static _Noreturn void child(char *program, const int *fds, int channel, int mapped, struct progress *p)
{
    char go;
    /* It came through our own exec; the workload's must close it, by which the caller knows. */
    fcntl(channel, F_SETFD, FD_CLOEXEC);
    /* Until the program says that it stays without its parent, it goes with it. */
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (mapped && recv(channel, &go, 1, 0) != 1)
        _exit(127);
    program_run(program, fds, channel, p);
}

int main(int argc, char **argv)
{
    static int fds[PROGRAM_MAX_FDS];
    if (argc < A_FDS || argc - A_FDS > (int)PROGRAM_MAX_FDS)
        give_up(2, "wrong number of arguments");
    int count = argc - A_FDS, cgroup = (int)number(argv[A_CGROUP]);
    for (int i = 0; i < count; i++)
        fds[i] = (int)number(argv[A_FDS + i]);
    uint64_t flags = (uint64_t)number(argv[A_FLAGS]);
    if (flags & ~NAMESPACES)
        give_up(2, "clone flags other than namespaces");
    size_t size;
    char *program = read_program((int)number(argv[A_PROGRAM]), &size);
    const char *wrong = program_check(program, size, (unsigned)count, !!(flags & CLONE_NEWPID));
    if (wrong)
        give_up(2, wrong);
    struct spawned *shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED,
                                  (int)number(argv[A_PROGRESS]), 0);
    if (shared == MAP_FAILED)
        give_up(1, "cannot map the progress");
    default_signals();
    struct clone_args args = {.flags = flags | CLONE_PARENT, .cgroup = cgroup < 0 ? 0 : (uint64_t)cgroup};
    if (cgroup >= 0)
        args.flags |= CLONE_INTO_CGROUP;
    long pid = syscall(SYS_clone3, &args, sizeof args);
    if (pid == 0)
        child(program, fds, (int)number(argv[A_CHANNEL]), (int)number(argv[A_MAPPED]), &shared->progress);
    if (pid < 0)
        give_up(1, strerror(errno));
    __atomic_store_n(&shared->pid, (int32_t)pid, __ATOMIC_RELEASE);
    return 0;
}
