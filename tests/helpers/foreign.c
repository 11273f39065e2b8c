/* A static program for tests of other machines: says what machine it runs on, runs itself once
 * more by execve(2), and with arguments does a little of what a shell would do. */
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <unistd.h>

static void on_term(int number)
{
    (void)number;
    _exit(5);
}

int main(int argc, char **argv)
{
    struct utsname names;

    uname(&names);
    if (argc < 2) { /* a child by fork and exec: is it emulated as well? */
        char *again[] = {"again", "machine", NULL};
        int status = 0;
        pid_t child = fork();

        if (child == 0) {
            execv("/bin/probe", again);
            _exit(99);
        }
        waitpid(child, &status, 0);
        return WIFEXITED(status) ? WEXITSTATUS(status) : 98;
    }
    if (strcmp(argv[1], "machine") == 0) {
        printf("%s %s %d\n", argv[0], names.machine, getuid());
        return 0;
    }
    if (strcmp(argv[1], "wait") == 0) {
        signal(SIGTERM, on_term);
        printf("waiting\n");
        fflush(stdout);
        pause();
    }
    if (strcmp(argv[1], "write") == 0 && argc > 2) {
        int fd = open(argv[2], O_WRONLY | O_CREAT | O_TRUNC, 0644);

        return fd < 0 || write(fd, names.machine, strlen(names.machine)) < 0;
    }
    return 7;
}
