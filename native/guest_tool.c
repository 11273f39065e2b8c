/* The second role of the guest's init: files and processes of a workload, seen from inside.
 *
 *   bulkhead-guest stat ROOT DIRECTORY NAME       one entry
 *   bulkhead-guest get ROOT DIRECTORY NAME        the file, and all below it, with contents
 *   bulkhead-guest put ROOT DIRECTORY KEEP_KINDS  the entries of standard input, below DIRECTORY
 *   bulkhead-guest upper CONTENTS FREEZE          the writable layer as overlayfs keeps it
 *   bulkhead-guest export OPTIONS                 the union that these overlay options make
 *   bulkhead-guest hold                           nothing, until standard input ends
 *   bulkhead-guest connect ADDRESS PORT           a TCP connection from inside, at the standard streams
 *   bulkhead-guest ps                             processes of the workload
 *
 * BULKHEAD_BASE and BULKHEAD_GROUP say where a member of a pod has its layers and its control group.
 *
 * The monitor's clients run it (RUN) in init's namespaces. ROOT is a path, or "main": the root of the
 * process that descriptor 100 (a pidfd) is of. Paths are opened with RESOLVE_IN_ROOT and used by
 * descriptor, as in engine/archive.py: a workload cannot lead us out of its own root.
 *
 * Standard output is a sequence of entries (src/bulkhead/boundaries/guest/tree.py reads it), the last
 * of which has mode 0 and says how it went: `size` an errno, `flags` a kind, `link` what it is about.
 */
#define _GNU_SOURCE
#include "guest.h"

#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <linux/openat2.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>

#define PATH_ROOM 8192u
#define XATTRS_MAX (256u << 10)
#define MAIN_FD 100

enum entry_flags { OPAQUE = 1, HARD = 2 };
enum end_kind { END_ERRNO = 0, END_OVER_DIRECTORY, END_OVER_FILE, END_ESCAPE };

struct entry {
    uint32_t mode, uid, gid, major, minor, nlink, flags, name, link, xattrs;
    uint64_t size;
    int64_t mtime;
    uint64_t ino, dev;
    uint32_t mtime_ns, zero;
};

static const struct open_how in_root = {.flags = O_RDONLY | O_DIRECTORY | O_CLOEXEC,
                                        .resolve = RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS};
static int with_contents, root = -1;

static _Noreturn void end(uint32_t kind, int error, const char *about)
{
    size_t size = strnlen(about, PATH_ROOM / 2);
    struct entry e = {.flags = kind, .size = (uint64_t)error, .link = (uint32_t)size};
    fwrite(&e, sizeof e, 1, stdout);
    fwrite(about, 1, size, stdout);
    exit(fflush(stdout) || error || kind);
}

static void put_out(const void *bytes, size_t size)
{
    if (size && fwrite(bytes, 1, size, stdout) != size)
        exit(1); /* nobody reads on */
}

static int open_in_root(const char *path)
{
    return (int)syscall(SYS_openat2, root, path, &in_root, sizeof in_root);
}

/* --- out --------------------------------------------------------------------------------------- */

/* Attributes as u16 name, u32 value (their lengths) and both; how many bytes. */
static size_t read_xattrs(const char *path, char *into, int *opaque)
{
    static char names[65536];
    size_t at = 0;
    ssize_t all = llistxattr(path, names, sizeof names);
    for (char *name = names; name < names + all; name += strlen(name) + 1) {
        uint16_t length = (uint16_t)strlen(name);
        uint32_t value = 0;
        size_t head = sizeof length + sizeof value + length;
        if (at + head + 65536 > XATTRS_MAX)
            break;
        ssize_t n = lgetxattr(path, name, into + at + head, 65536);
        if (n < 0)
            continue;
        if (!strcmp(name, "trusted.overlay.opaque"))
            *opaque = n == 1 && into[at + head] == 'y';
        value = (uint32_t)n;
        memcpy(into + at, &length, sizeof length);
        memcpy(into + at + sizeof length, &value, sizeof value);
        memcpy(into + at + sizeof length + sizeof value, name, length);
        at += head + value;
    }
    return at;
}

/* Exactly `size` bytes: cut if it grew, zeros if it shrank or is another file now. */
static void put_contents(int dir, const char *name, const struct stat *info)
{
    static char bytes[1 << 16];
    char path[64];
    struct stat now;
    uint64_t left = (uint64_t)info->st_size;
    int fd = -1, at = openat(dir, name, O_PATH | O_NOFOLLOW | O_CLOEXEC);
    if (at >= 0 && !fstat(at, &now) && S_ISREG(now.st_mode) && now.st_ino == info->st_ino) {
        snprintf(path, sizeof path, "/proc/self/fd/%d", at);
        fd = open(path, O_RDONLY | O_CLOEXEC);
    }
    while (left) {
        size_t most = left < sizeof bytes ? (size_t)left : sizeof bytes;
        ssize_t n = fd < 0 ? 0 : read(fd, bytes, most);
        if (n < 0)
            exit(errno); /* in the midst of contents nothing can be said: what was sent is cut short */
        if (n == 0) {
            memset(bytes, 0, most);
            n = (ssize_t)most;
            close_fd(&fd);
        }
        put_out(bytes, (size_t)n);
        left -= (uint64_t)n;
    }
    close_fd(&fd);
    close_fd(&at);
}

static void put_entry(int dir, const char *name, const char *shown, const struct stat *info)
{
    static char link[PATH_ROOM], xattrs[XATTRS_MAX];
    char path[PATH_ROOM];
    int opaque = 0;
    ssize_t link_size = 0;
    snprintf(path, sizeof path, "/proc/self/fd/%d/%s", dir, name);
    size_t xattr_size = read_xattrs(path, xattrs, &opaque);
    if (S_ISLNK(info->st_mode) && (link_size = readlinkat(dir, name, link, sizeof link)) < 0)
        link_size = 0;
    struct entry e = {.mode = info->st_mode, .uid = info->st_uid, .gid = info->st_gid,
                      .major = major(info->st_rdev), .minor = minor(info->st_rdev),
                      .nlink = (uint32_t)info->st_nlink, .flags = opaque ? OPAQUE : 0,
                      .name = (uint32_t)strlen(shown), .link = (uint32_t)link_size,
                      .xattrs = (uint32_t)xattr_size, .size = (uint64_t)info->st_size,
                      .mtime = info->st_mtim.tv_sec, .ino = info->st_ino, .dev = info->st_dev,
                      .mtime_ns = (uint32_t)info->st_mtim.tv_nsec};
    if (!with_contents || !S_ISREG(info->st_mode))
        e.zero = 1; /* no contents follow */
    put_out(&e, sizeof e);
    put_out(shown, e.name);
    put_out(link, e.link);
    put_out(xattrs, e.xattrs);
    if (!e.zero)
        put_contents(dir, name, info);
}

static int by_name(const void *a, const void *b) { return strcmp(*(char *const *)a, *(char *const *)b); }

static char **list(int fd, size_t *count)
{
    char **names = NULL;
    size_t room = 0;
    struct dirent *d;
    DIR *directory = fdopendir(fcntl(fd, F_DUPFD_CLOEXEC, 3));
    *count = 0;
    if (!directory)
        end(END_ERRNO, errno, "a directory");
    while (errno = 0, d = readdir(directory)) {
        if (!strcmp(d->d_name, ".") || !strcmp(d->d_name, ".."))
            continue;
        if (*count == room)
            names = realloc(names, (room = room * 2 + 64) * sizeof *names);
        if (!names || !(names[*count] = strdup(d->d_name)))
            abort();
        (*count)++;
    }
    if (errno)
        end(END_ERRNO, errno, "a directory");
    closedir(directory);
    if (*count)
        qsort(names, *count, sizeof *names, by_name);
    return names;
}

static void walk(int fd, char *shown, size_t length);

/* One file of directory `dir`, and all below it; `shown` has its name of `length` bytes. */
static void put_tree(int dir, const char *name, char *shown, size_t length)
{
    struct stat info;
    if (fstatat(dir, name, &info, AT_SYMLINK_NOFOLLOW))
        return; /* it has gone meanwhile */
    put_entry(dir, name, shown, &info);
    if (!S_ISDIR(info.st_mode))
        return;
    int fd = openat(dir, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0) {
        if (errno == ENOENT || errno == ENOTDIR)
            return;
        end(END_ERRNO, errno, shown);
    }
    walk(fd, shown, length);
    close(fd);
}

static void walk(int fd, char *shown, size_t length)
{
    size_t count;
    char **names = list(fd, &count);
    for (size_t i = 0; i < count; i++) {
        size_t more = strlen(names[i]), at = length;
        if (at + more + 2 > PATH_ROOM)
            end(END_ERRNO, ENAMETOOLONG, shown);
        if (at)
            shown[at++] = '/';
        memcpy(shown + at, names[i], more + 1);
        put_tree(fd, names[i], shown, at + more);
        free(names[i]);
        shown[length] = 0;
    }
    free(names);
}

static void put_directory(int fd)
{
    char shown[PATH_ROOM] = "";
    struct stat info;
    if (fstat(fd, &info))
        end(END_ERRNO, errno, "");
    put_entry(fd, ".", "", &info);
    walk(fd, shown, 0);
}

static void look(const char *directory, const char *name, int all)
{
    char shown[PATH_ROOM] = "";
    struct stat info;
    int fd = open_in_root(directory);
    with_contents = all;
    if (fd < 0)
        end(END_ERRNO, errno, directory);
    if (!*name)
        name = ".";
    if (fstatat(fd, name, &info, AT_SYMLINK_NOFOLLOW))
        end(END_ERRNO, errno, name);
    put_entry(fd, name, "", &info);
    if (!all || !S_ISDIR(info.st_mode))
        return;
    int below = openat(fd, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (below < 0)
        end(END_ERRNO, errno, name);
    walk(below, shown, 0);
}

/* --- in ---------------------------------------------------------------------------------------- */

static void get_in(void *into, size_t size)
{
    if (size && fread(into, 1, size, stdin) != size)
        end(END_ERRNO, EPIPE, "the archive ends early");
}

/* The directory that `path` (below `top`) is in, made if it is not there; `path` becomes its name. */
static int open_parent(const char *top, char *path, char **name)
{
    char whole[2 * PATH_ROOM];
    size_t length = (size_t)snprintf(whole, PATH_ROOM, "%s", top);
    int fd = open_in_root(whole);
    char *part = path;
    for (char *slash; fd >= 0 && (slash = strchr(part, '/')); part = slash + 1) {
        *slash = 0;
        length += (size_t)snprintf(whole + length, sizeof whole - length, "/%s", part);
        int deeper = open_in_root(whole);
        if (deeper < 0 && errno == ENOENT) {
            if (mkdirat(fd, part, 0755) && errno != EEXIST)
                return -1;
            deeper = openat(fd, part, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
        }
        close(fd);
        fd = deeper;
    }
    *name = part;
    return fd;
}

static int bad_name(const char *path)
{
    for (const char *part = path;; part = strchr(part, '/') + 1) {
        size_t length = strcspn(part, "/");
        if (!length || (length == 1 && part[0] == '.') || (length == 2 && !memcmp(part, "..", 2)))
            return 1;
        if (!part[length])
            return 0;
    }
}

/* Make room for an entry; a directory stays for a directory. */
static void clear(int dir, const char *name, const struct entry *e, int keep_kinds)
{
    struct stat old;
    if (fstatat(dir, name, &old, AT_SYMLINK_NOFOLLOW))
        return;
    if (S_ISDIR(old.st_mode)) {
        if (S_ISDIR(e->mode) && !(e->flags & HARD))
            return;
        end(END_OVER_DIRECTORY, 0, name);
    }
    if (S_ISDIR(e->mode) && keep_kinds)
        end(END_OVER_FILE, 0, name);
    if (unlinkat(dir, name, 0))
        end(END_ERRNO, errno, name);
}

static void get_contents(int fd, uint64_t left, const char *name)
{
    static char bytes[1 << 16];
    while (left) {
        size_t size = left < sizeof bytes ? (size_t)left : sizeof bytes;
        get_in(bytes, size);
        for (size_t at = 0; at < size;) {
            ssize_t n = write(fd, bytes + at, size - at);
            if (n < 0)
                end(END_ERRNO, errno, name);
            at += (size_t)n;
        }
        left -= size;
    }
}

static void set_xattrs(const char *path, const char *xattrs, size_t size)
{
    for (size_t at = 0; at + 6 <= size;) {
        char name[256];
        uint16_t length;
        uint32_t value;
        memcpy(&length, xattrs + at, sizeof length);
        memcpy(&value, xattrs + at + 2, sizeof value);
        at += 6;
        if (length >= sizeof name || value > size || at + length + value > size)
            return;
        memcpy(name, xattrs + at, length);
        name[length] = 0;
        lsetxattr(path, name, xattrs + at + length, value, 0); /* as far as this file system has them */
        at += (size_t)length + value;
    }
}

static void place(const char *top, const struct entry *e, char *path, char *link, const char *xattrs, int keep_kinds)
{
    const struct timespec times[] = {{e->mtime, e->mtime_ns}, {e->mtime, e->mtime_ns}};
    char *name, *target, self[PATH_ROOM];
    if (bad_name(path) || (e->flags & HARD && bad_name(link)))
        end(END_ESCAPE, 0, path);
    int dir = open_parent(top, path, &name), error = 0;
    if (dir < 0)
        end(END_ERRNO, errno, path);
    clear(dir, name, e, keep_kinds);
    if (e->flags & HARD) {
        int from = open_parent(top, link, &target);
        if (from < 0 || linkat(from, target, dir, name, 0))
            end(END_ERRNO, errno, name);
        close(from);
        close(dir);
        return;
    }
    if (S_ISDIR(e->mode))
        error = mkdirat(dir, name, 0700) && errno != EEXIST;
    else if (S_ISREG(e->mode)) {
        int fd = openat(dir, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
        if (fd < 0)
            end(END_ERRNO, errno, name);
        get_contents(fd, e->size, name);
        close(fd);
    } else if (S_ISLNK(e->mode))
        error = symlinkat(link, dir, name);
    else
        error = mknodat(dir, name, (e->mode & S_IFMT) | 0600, makedev(e->major, e->minor));
    if (error || fchownat(dir, name, e->uid, e->gid, AT_SYMLINK_NOFOLLOW))
        end(END_ERRNO, errno, name);
    /* After chown, which clears set-id bits. By O_PATH, as a link may be there by now. */
    int fd = openat(dir, name, O_PATH | O_NOFOLLOW | O_CLOEXEC);
    struct stat now;
    if (fd >= 0 && !fstat(fd, &now) && !S_ISLNK(now.st_mode)) {
        snprintf(self, sizeof self, "/proc/self/fd/%d", fd);
        if (chmod(self, e->mode & 07777))
            end(END_ERRNO, errno, name);
        snprintf(self, sizeof self, "/proc/self/fd/%d/%s", dir, name);
        set_xattrs(self, xattrs, e->xattrs);
    }
    close_fd(&fd);
    utimensat(dir, name, times, AT_SYMLINK_NOFOLLOW);
    close(dir);
}

static void put(const char *top, int keep_kinds)
{
    static char path[PATH_ROOM], link[PATH_ROOM], xattrs[XATTRS_MAX];
    struct entry e;
    int fd = open_in_root(top);
    if (fd < 0)
        end(END_ERRNO, errno, top);
    close(fd);
    for (;;) {
        get_in(&e, sizeof e);
        if (!e.mode && !(e.flags & HARD))
            return;
        if (e.name >= PATH_ROOM / 2 || e.link >= PATH_ROOM / 2 || e.xattrs > XATTRS_MAX)
            end(END_ERRNO, ENAMETOOLONG, "");
        get_in(path, e.name);
        get_in(link, e.link);
        get_in(xattrs, e.xattrs);
        path[e.name] = link[e.link] = 0;
        place(top, &e, path, link, xattrs, keep_kinds);
    }
}

/* --- layers ------------------------------------------------------------------------------------ */

static int open_of_group(const char *name, int flags)
{
    char path[256];
    const char *group = getenv("BULKHEAD_GROUP");
    snprintf(path, sizeof path, "%s/%s", group ? group : "/sys/fs/cgroup/workload", name);
    return open(path, flags | O_CLOEXEC);
}

static void set_frozen(const char *value)
{
    int fd = open_of_group("cgroup.freeze", O_WRONLY);
    if (fd >= 0 && write(fd, value, 1) < 0)
        say("cgroup.freeze: %s", strerror(errno));
    close_fd(&fd);
}

/* The workload stands still until this process has ended, however it ends. */
static void freeze(void)
{
    int pair[2], frozen = 0;
    char byte, events[256];
    if (pipe2(pair, O_CLOEXEC))
        end(END_ERRNO, errno, "pipe");
    pid_t watcher = fork();
    if (watcher < 0)
        end(END_ERRNO, errno, "fork");
    if (!watcher) {
        close(pair[1]);
        for (int fd = 0; fd < 3; fd++)
            close(fd);
        while (read(pair[0], &byte, 1) < 0 && errno == EINTR)
            ;
        set_frozen("0");
        _exit(0);
    }
    close(pair[0]);
    set_frozen("1");
    for (int tries = 0; tries < 2000 && !frozen; tries++) {
        int fd = open_of_group("cgroup.events", O_RDONLY);
        ssize_t n = fd < 0 ? -1 : read(fd, events, sizeof events - 1);
        close_fd(&fd);
        if (n < 0)
            return;
        events[n] = 0;
        frozen = strstr(events, "frozen 1") != NULL;
        if (!frozen)
            usleep(1000);
    }
}

static void export_union(const char *options)
{
    if (unshare(CLONE_NEWNS) || mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL))
        end(END_ERRNO, errno, "a mount namespace");
    if ((mkdir("/view", 0755) && errno != EEXIST) || mount("overlay", "/view", "overlay", MS_RDONLY, options))
        end(END_ERRNO, errno, options);
    int fd = open("/view", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0)
        end(END_ERRNO, errno, "/view");
    with_contents = 1;
    put_directory(fd);
}

static int hold(void)
{
    char byte;
    while (read(0, &byte, 1) > 0 || errno == EINTR)
        ;
    return 0;
}

/* --- connections ------------------------------------------------------------------------------- */

static int pass(int from, int to)
{
    char bytes[16384];
    ssize_t n = read(from, bytes, sizeof bytes);
    for (ssize_t at = 0, done; at < n; at += done)
        if ((done = write(to, bytes + at, (size_t)(n - at))) < 0)
            return 0;
    return n > 0;
}

/* An i32 says how it went: 0, or an errno; then bytes both ways. */
static int connect_to(const char *address, const char *port)
{
    struct sockaddr_in6 six = {.sin6_family = AF_INET6, .sin6_port = htons((uint16_t)atoi(port))};
    struct sockaddr_in four = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(port))};
    int is_six = inet_pton(AF_INET6, address, &six.sin6_addr) == 1;
    int32_t error = is_six || inet_pton(AF_INET, address, &four.sin_addr) == 1 ? 0 : EINVAL;
    int fd = error ? -1 : socket(is_six ? AF_INET6 : AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (!error && (fd < 0 || connect(fd, is_six ? (struct sockaddr *)&six : (struct sockaddr *)&four, is_six ? sizeof six : sizeof four)))
        error = errno;
    if (write(1, &error, sizeof error) != sizeof error || error)
        return 1;
    struct pollfd set[] = {{fd, POLLIN, 0}, {0, POLLIN, 0}};
    while (set[0].fd >= 0 && poll(set, 2, -1) > 0) {
        if (set[0].revents && !pass(fd, 1))
            set[0].fd = -1;
        if (set[1].revents && !pass(0, fd)) {
            shutdown(fd, SHUT_WR);
            set[1].fd = -1;
        }
    }
    return 0;
}

/* --- processes --------------------------------------------------------------------------------- */

static size_t slurp(const char *path, char *into, size_t room)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    size_t size = 0;
    ssize_t n;
    while (fd >= 0 && size < room && (n = read(fd, into + size, room - size)) > 0)
        size += (size_t)n;
    close_fd(&fd);
    return size;
}

/* Entries: mode a number, uid and gid, link /proc/PID/stat, name the command line. */
static void ps(pid_t main_pid)
{
    struct stat wanted, info;
    char path[300], stat_line[2048];
    static char command[4096];
    size_t count;
    snprintf(path, sizeof path, "/proc/%d/ns/pid", main_pid);
    int proc = open("/proc", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (proc < 0 || stat(path, &wanted))
        end(END_ERRNO, errno, path);
    char **names = list(proc, &count);
    for (size_t i = 0; i < count; i++) {
        if (names[i][0] < '1' || names[i][0] > '9')
            continue;
        snprintf(path, sizeof path, "/proc/%s/ns/pid", names[i]);
        if (stat(path, &info) || info.st_ino != wanted.st_ino)
            continue;
        snprintf(path, sizeof path, "/proc/%s", names[i]);
        if (stat(path, &info))
            continue;
        snprintf(path, sizeof path, "/proc/%s/stat", names[i]);
        size_t line = slurp(path, stat_line, sizeof stat_line);
        snprintf(path, sizeof path, "/proc/%s/cmdline", names[i]);
        size_t words = slurp(path, command, sizeof command);
        struct entry e = {.mode = S_IFREG, .uid = info.st_uid, .gid = info.st_gid, .name = (uint32_t)words,
                          .link = (uint32_t)line, .zero = 1};
        if (!line)
            continue;
        put_out(&e, sizeof e);
        put_out(command, words);
        put_out(stat_line, line);
    }
}

static pid_t main_process(void)
{
    char text[512], *at;
    snprintf(text, sizeof text, "/proc/self/fdinfo/%d", MAIN_FD);
    size_t size = slurp(text, text, sizeof text - 1);
    text[size] = 0;
    at = strstr(text, "Pid:");
    return at ? atoi(at + 4) : -1;
}

static void open_root(const char *path)
{
    char text[64];
    if (!strcmp(path, "main")) {
        snprintf(text, sizeof text, "/proc/%d/root", main_process());
        path = text;
    }
    root = open(path, O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (root < 0)
        end(END_ERRNO, errno, path);
}

int tool_main(int argc, char **argv)
{
    const struct rlimit files = {1 << 16, 1 << 16};
    const char *verb = argv[1];
    setrlimit(RLIMIT_NOFILE, &files);
    signal(SIGPIPE, SIG_IGN);
    setvbuf(stdout, NULL, _IOFBF, 1 << 16);
    umask(0);
    if (!strcmp(verb, "hold") && argc == 2)
        return hold();
    if (!strcmp(verb, "connect") && argc == 4)
        return connect_to(argv[2], argv[3]);
    if (!strcmp(verb, "upper") && argc == 4) {
        with_contents = atoi(argv[2]);
        if (atoi(argv[3]))
            freeze();
        char upper[256];
        const char *base = getenv("BULKHEAD_BASE");
        snprintf(upper, sizeof upper, "%s/upper/upper", base ? base : "");
        int fd = open(upper, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        if (fd < 0)
            end(END_ERRNO, errno, upper);
        put_directory(fd);
    } else if (!strcmp(verb, "export") && argc == 3)
        export_union(argv[2]);
    else if (!strcmp(verb, "ps") && argc == 2)
        ps(main_process());
    else if (argc == 5) {
        open_root(argv[2]);
        if (!strcmp(verb, "put"))
            put(argv[3], atoi(argv[4]));
        else
            look(argv[3], argv[4], !strcmp(verb, "get"));
    } else
        end(END_ERRNO, EINVAL, verb);
    end(END_ERRNO, 0, "");
}
