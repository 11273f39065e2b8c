/* See child.h. Nothing but the program is allocated, and that is left to the end of the process. */
#define _GNU_SOURCE
#include "child.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/sched.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define NAMESPACES (uint64_t)(CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET \
                              | CLONE_NEWCGROUP | CLONE_NEWUSER | CLONE_NEWTIME)

static char *read_program(int fd, size_t *size, const char **wrong)
{
    struct stat s;
    if (fstat(fd, &s) || s.st_size <= 0 || s.st_size > (off_t)PROGRAM_MAX_SIZE) {
        *wrong = "the program's file has no such size";
        return NULL;
    }
    *size = (size_t)s.st_size;
    char *program = aligned_alloc(16, (*size + 15) & ~(size_t)15);
    if (!program || pread(fd, program, *size, 0) != (ssize_t)*size) {
        *wrong = "cannot read the program";
        free(program);
        return NULL;
    }
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

static _Noreturn void child(const struct birth *birth, char *program, struct progress *p)
{
    char go;
    default_signals();
    if (birth->secret >= 0)
        close(birth->secret);
    /* It may have come through an exec; the workload's must close it, by which the caller knows. */
    fcntl(birth->channel, F_SETFD, FD_CLOEXEC);
    /* Until the program says that it stays without its parent, it goes with it. */
    program_parent = birth->parent;
    if (program_follow_parent())
        _exit(127);
    if (birth->mapped && recv(birth->channel, &go, 1, 0) != 1)
        _exit(127);
    program_run(program, birth->fds, birth->channel, p);
}

long child_clone(const struct birth *birth, const char **wrong)
{
    size_t size;
    *wrong = NULL;
    if (birth->flags & ~NAMESPACES) {
        *wrong = "clone flags other than namespaces";
        return 0;
    }
    char *program = read_program(birth->program, &size, wrong);
    if (!program)
        return 0;
    *wrong = program_check(program, size, birth->count, !!(birth->flags & CLONE_NEWPID));
    if (*wrong)
        return 0;
    struct spawned *shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED, birth->progress, 0);
    if (shared == MAP_FAILED)
        return -errno;
    struct clone_args args = {.flags = birth->flags, .exit_signal = birth->sibling ? 0 : SIGCHLD,
                              .cgroup = birth->cgroup < 0 ? 0 : (uint64_t)birth->cgroup};
    if (birth->sibling)
        args.flags |= CLONE_PARENT;
    if (birth->cgroup >= 0)
        args.flags |= CLONE_INTO_CGROUP;
    long pid = syscall(SYS_clone3, &args, sizeof args);
    if (pid == 0)
        child(birth, program, &shared->progress);
    if (pid < 0)
        return -errno;
    __atomic_store_n(&shared->pid, (int32_t)pid, __ATOMIC_RELEASE);
    return pid;
}
