/* How the init of a guest comes up, before it speaks to anybody.
 *
 * BULKHEAD_GUEST_CHANNEL (a kernel parameter of that name comes as a variable) names the channel:
 *   unset      the virtio port "bulkhead.0", or else /dev/ttyS0 (at once if there is no virtio bus)
 *   /dev/NAME  this device
 *   fd:N       an inherited socket; nothing is booted: for tests in a plain PID namespace
 *
 * Booting: the modules that the initramfs lists in /modules/order (one "PATH ARGUMENTS" a line) are
 * loaded. The root becomes a tmpfs, as pivot_root(2) needs one that is not the first, with /dev,
 * /proc, /sys, /run, and the initramfs at /initramfs.
 */
#define _GNU_SOURCE
#include "guest.h"

#include <dirent.h>
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <termios.h>

static void load_modules(void)
{
    char line[512];
    FILE *order = fopen("/modules/order", "re");
    while (order && fgets(line, sizeof line, order)) {
        line[strcspn(line, "\n")] = 0;
        char *arguments = strchr(line, ' ');
        if (arguments)
            *arguments++ = 0;
        int fd = open(line, O_RDONLY | O_CLOEXEC);
        if (fd < 0 || (syscall(SYS_finit_module, fd, arguments ? arguments : "", 0) && errno != EEXIST))
            say("bulkhead-guest: module %s: %s", line, strerror(errno));
        close_fd(&fd);
    }
    if (order)
        fclose(order);
}

int boot(void)
{
    static const struct { const char *type, *target; } mounts[] = {
        {"devtmpfs", "/dev"}, {"proc", "/proc"}, {"sysfs", "/sys"}, {"tmpfs", "/run"}};
    mkdir("/dev", 0755);
    mknod("/dev/kmsg", S_IFCHR | 0600, makedev(1, 11));
    kmsg = open("/dev/kmsg", O_WRONLY | O_CLOEXEC);
    load_modules();
    mkdir("/root", 0755);
    if (mount("root", "/root", "tmpfs", 0, "mode=755") || mkdir("/root/initramfs", 0755)
        || mount("/", "/root/initramfs", NULL, MS_BIND, NULL) || chdir("/root")
        || mount(".", "/", NULL, MS_MOVE, NULL) || chroot(".") || chdir("/"))
        say("bulkhead-guest: the root: %s", strerror(errno));
    for (size_t i = 0; i < sizeof mounts / sizeof *mounts; i++) {
        mkdir(mounts[i].target, 0755);
        if (mount(mounts[i].type, mounts[i].target, mounts[i].type, 0, NULL))
            say("bulkhead-guest: %s: %s", mounts[i].target, strerror(errno));
    }
    return 1;
}

static int find_port(char *path, size_t size)
{
    struct dirent *d;
    int found = 0;
    DIR *ports = opendir("/sys/class/virtio-ports");
    while (ports && !found && (d = readdir(ports))) {
        char file[512], name[32] = "";
        snprintf(file, sizeof file, "/sys/class/virtio-ports/%.250s/name", d->d_name);
        int fd = open(file, O_RDONLY | O_CLOEXEC);
        ssize_t n = fd < 0 ? -1 : read(fd, name, sizeof name - 1);
        close_fd(&fd);
        found = n > 0 && !strcmp(name, "bulkhead.0\n");
        snprintf(path, size, "/dev/%.250s", d->d_name);
    }
    if (ports)
        closedir(ports);
    return found;
}

int open_channel(const char *wanted)
{
    char path[300];
    struct termios t;
    int fd = -1;
    if (wanted && !strncmp(wanted, "fd:", 3)) {
        fd = atoi(wanted + 3);
        fcntl(fd, F_SETFD, FD_CLOEXEC);
        no_block(fd);
        return fd;
    }
    for (int tries = 0; fd < 0 && tries < 5000; tries++) { /* ports come some time after their module */
        if (wanted)
            snprintf(path, sizeof path, "%s", wanted);
        else if (!find_port(path, sizeof path)) {
            if (!access("/sys/bus/virtio", F_OK) && tries < 2500) {
                poll(NULL, 0, 2);
                continue;
            }
            snprintf(path, sizeof path, "/dev/ttyS0");
        }
        fd = open(path, O_RDWR | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
        if (fd < 0)
            poll(NULL, 0, 2);
    }
    if (fd >= 0 && !tcgetattr(fd, &t)) {
        cfmakeraw(&t);
        t.c_cflag |= CLOCAL | CREAD;
        tcsetattr(fd, TCSANOW, &t);
        tcflush(fd, TCIOFLUSH);
    }
    return fd;
}
