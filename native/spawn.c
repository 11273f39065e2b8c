/* Clones one child for a launch program, for callers without a holder (bulkhead-runtime), and ends.
 *
 *   bulkhead-spawn PROGRAM PROGRESS CHANNEL PARENT FLAGS MAPPED CGROUP FD...
 *
 * All are numbers: descriptors of the program (a file), of a struct spawned (a file, mapped), of the
 * channel's end for the child, and of the caller (a pidfd); the CLONE_NEW* flags; whether the child
 * waits for a byte on the channel before it begins (its id maps are being written); a cgroup
 * directory or -1; and the program's own descriptors.
 *
 * CLONE_PARENT makes the child the caller's: it reaps it, and this process is gone by then. What can
 * be wrong is said on standard error, with exit code 2 for a refused program and 1 otherwise.
 */
#define _GNU_SOURCE
#include "child.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { A_PROGRAM = 1, A_PROGRESS, A_CHANNEL, A_PARENT, A_FLAGS, A_MAPPED, A_CGROUP, A_FDS };

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

int main(int argc, char **argv)
{
    static int fds[PROGRAM_MAX_FDS];
    const char *wrong;
    if (argc < A_FDS || argc - A_FDS > (int)PROGRAM_MAX_FDS)
        give_up(2, "wrong number of arguments");
    int count = argc - A_FDS;
    for (int i = 0; i < count; i++)
        fds[i] = (int)number(argv[A_FDS + i]);
    struct birth birth = {
        .program = (int)number(argv[A_PROGRAM]), .progress = (int)number(argv[A_PROGRESS]),
        .channel = (int)number(argv[A_CHANNEL]), .parent = (int)number(argv[A_PARENT]),
        .flags = (uint64_t)number(argv[A_FLAGS]), .mapped = (int)number(argv[A_MAPPED]),
        .cgroup = (int)number(argv[A_CGROUP]), .sibling = 1, .secret = -1, .fds = fds, .count = (unsigned)count,
    };
    long pid = child_clone(&birth, &wrong);
    if (wrong)
        give_up(2, wrong);
    if (pid < 0)
        give_up(1, strerror((int)-pid));
    return 0;
}
