/* The process 1 of `--init`:  bulkhead-init PROGRAM [ARGUMENT...]
 *
 * Starts the program in its own process group with the terminal, forwards signals to it, reaps
 * whatever falls to it, and ends with the program's exit code (128 + signal if one killed it;
 * 127 not found, 126 not executable).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/wait.h>
#include <unistd.h>

static const int own[] = {SIGFPE, SIGILL, SIGSEGV, SIGBUS, SIGABRT, SIGTRAP, SIGSYS, SIGTTIN, SIGTTOU, 0};

static _Noreturn void become(char **argv, const sigset_t *mask)
{
    setpgid(0, 0);
    tcsetpgrp(0, getpid()); /* SIGTTOU is blocked; without a terminal this fails, as it should */
    sigprocmask(SIG_SETMASK, mask, NULL);
    execvp(argv[0], argv);
    int code = errno == ENOENT || errno == ENOTDIR ? 127 : 126;
    fprintf(stderr, "bulkhead-init: %s: %s\n", argv[0], strerror(errno));
    _exit(code);
}

int main(int argc, char **argv)
{
    sigset_t all, before;
    if (argc < 2) {
        fprintf(stderr, "usage: bulkhead-init PROGRAM [ARGUMENT...]\n");
        return 2;
    }
    sigfillset(&all);
    for (const int *s = own; *s; s++)
        if (*s != SIGTTIN && *s != SIGTTOU)
            sigdelset(&all, *s);
    sigprocmask(SIG_SETMASK, &all, &before);
    pid_t child = fork();
    if (child < 0) {
        perror("bulkhead-init: fork");
        return 126;
    }
    if (!child)
        become(argv + 1, &before);
    for (;;) {
        siginfo_t info;
        int signal = sigwaitinfo(&all, &info);
        if (signal < 0)
            continue;
        if (signal != SIGCHLD) {
            if (signal != SIGTTIN && signal != SIGTTOU)
                kill(child, signal);
            continue;
        }
        int status, code = -1;
        for (pid_t pid; (pid = waitpid(-1, &status, WNOHANG)) > 0;)
            if (pid == child)
                code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
        if (code >= 0)
            return code;
    }
}
