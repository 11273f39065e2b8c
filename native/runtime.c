/* The `bulkhead-runtime` command: has a planner's worker do what it can without being its caller's
 * child, and does the rest itself: it is the parent of what is launched, and waits for it.
 *
 * The protocol is drawn in src/bulkhead/runtime/planner.py. A command that no worker takes is run by
 * Python in this process instead, with the same result; that also starts the planner for the next.
 */
#define _GNU_SOURCE
#include "child.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/mount.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#define MAGIC 0x31524842u /* "BHR1" */
#define PROTOCOL 1u
#define MAX_MESSAGE (64u << 10)
#define MAX_FDS 253
#define SELF "BULKHEAD_RUNTIME_SELF"
#define FAILED 1

extern char **environ;

enum { REFUSED = 1, LAUNCH, REAP, FOLLOW, EXIT };

struct order { uint32_t kind, mapped, subreaper, cgroup; int32_t value; uint32_t zero; uint64_t flags; };
struct answer { int32_t value; char text[124]; };

static char self_path[PATH_MAX];
static volatile sig_atomic_t followed;
static int sealed_by_us;

/* What a worker does; everything else is rare, or wants a terminal. */
static const char *const planned[] = {"create", "start", "run", "state", "kill", "delete", "exec",
                                      "pause", "resume"};
static const char *const launching[] = {"create", "run", "exec"};
static const char *const valued[] = {"root", "log", "log-format", "criu", "rootless"};

static int is_one_of(const char *word, const char *const *words, size_t count)
{
    for (size_t n = 0; n < count; n++)
        if (!strcmp(word, words[n]))
            return 1;
    return 0;
}
#define ONE_OF(word, words) is_one_of(word, words, sizeof words / sizeof *words)

/* The command's name, NULL if there is none; `*root` is the value of --root if it is given. */
static const char *find_command(char **argv, const char **root)
{
    for (int at = 1; argv[at]; at++) {
        const char *word = argv[at];
        if (*word != '-')
            return word;
        word += strspn(word, "-");
        if (!strncmp(word, "root=", 5)) {
            *root = word + 5;
        } else if (ONE_OF(word, valued)) {
            if (!argv[at + 1])
                return NULL;
            if (!strcmp(word, "root"))
                *root = argv[at + 1];
            at++;
        }
    }
    return NULL;
}

static int default_root(char *out, size_t size)
{
    const char *run = getenv("XDG_RUNTIME_DIR");
    int length;
    if (geteuid() == 0)
        length = snprintf(out, size, "/run/bulkhead-runtime");
    else if (run && *run)
        length = snprintf(out, size, "%s/bulkhead-runtime", run);
    else
        length = snprintf(out, size, "/run/user/%u/bulkhead-runtime", geteuid());
    return length > 0 && (size_t)length < size ? 0 : -1;
}

/* A connection to the planner of this user, root directory and mount namespace; -1 if there is none. */
static int connect_planner(const char *root)
{
    char place[PATH_MAX], link[64] = "";
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct ucred peer;
    socklen_t size = sizeof peer;
    struct stat s;
    int length = root && *root ? snprintf(place, sizeof place, "%s", root) : 0;
    if ((!length && default_root(place, sizeof place - 10)) || length < 0 || length >= (int)sizeof place - 10)
        return -1;
    strcat(place, "/.planner");
    if (readlink("/proc/self/ns/mnt", link, sizeof link - 1) < 6 || strncmp(link, "mnt:[", 5))
        return -1;
    link[strcspn(link, "]")] = '\0';
    int dir = open(place, O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (dir < 0)
        return -1;
    int fd = -1;
    if (!fstat(dir, &s) && s.st_uid == geteuid() && !(s.st_mode & 077)) {
        snprintf(address.sun_path, sizeof address.sun_path, "/proc/self/fd/%d/%.20s", dir, link + 5);
        fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    }
    if (fd >= 0 && (connect(fd, (struct sockaddr *)&address, sizeof address)
                    || getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) || peer.uid != geteuid())) {
        close(fd);
        fd = -1;
    }
    close(dir);
    return fd;
}

static int is_for_planner(const char *variable)
{
    return strncmp(variable, SELF "=", sizeof SELF)
        && (!strncmp(variable, "BULKHEAD_", 9) || !strncmp(variable, "XDG_", 4) || !strncmp(variable, "HOME=", 5));
}

static char *append(char *at, const char *end, const char *text)
{
    size_t length = strlen(text) + 1;
    if (!at || length > (size_t)(end - at))
        return NULL;
    memcpy(at, text, length);
    return at + length;
}

/* Ask; 0, or -1 if it could not be sent (or is too long to be). */
static int send_request(int fd, char **argv)
{
    static char data[MAX_MESSAGE];
    uint32_t head[5] = {MAGIC, PROTOCOL};
    char *at = data + sizeof head, *end = data + sizeof data;
    mode_t mask = umask(077);
    umask(mask);
    head[4] = mask;
    at = append(at, end, self_path);
    for (; argv[head[2]]; head[2]++)
        at = append(at, end, argv[head[2]]);
    for (char **variable = environ; *variable; variable++)
        if (is_for_planner(*variable)) {
            at = append(at, end, *variable);
            head[3]++;
        }
    if (!at)
        return -1;
    memcpy(data, head, sizeof head);
    int here = open(".", O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (here < 0)
        return -1;
    int fds[4] = {0, 1, 2, here};
    union { struct cmsghdr align; char bytes[CMSG_SPACE(sizeof fds)]; } control = {0};
    struct iovec part = {data, (size_t)(at - data)};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1,
                             .msg_control = control.bytes, .msg_controllen = sizeof control.bytes};
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof fds);
    memcpy(CMSG_DATA(header), fds, sizeof fds);
    ssize_t sent = sendmsg(fd, &message, MSG_NOSIGNAL);
    close(here);
    return sent < 0 ? -1 : 0;
}

/* One order; its length with the text behind it, or -1. */
static ssize_t receive(int fd, char *data, size_t size, int *fds, int *count)
{
    union { struct cmsghdr align; char bytes[CMSG_SPACE(MAX_FDS * sizeof(int))]; } control;
    struct iovec part = {data, size};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1,
                             .msg_control = control.bytes, .msg_controllen = sizeof control.bytes};
    ssize_t got;
    *count = 0;
    do
        got = recvmsg(fd, &message, MSG_CMSG_CLOEXEC);
    while (got < 0 && errno == EINTR);
    struct cmsghdr *header = got > 0 ? CMSG_FIRSTHDR(&message) : NULL;
    if (header && header->cmsg_level == SOL_SOCKET && header->cmsg_type == SCM_RIGHTS) {
        *count = (int)((header->cmsg_len - CMSG_LEN(0)) / sizeof(int));
        memcpy(fds, CMSG_DATA(header), (size_t)*count * sizeof(int));
    }
    return got < (ssize_t)sizeof(struct order) || message.msg_flags & (MSG_TRUNC | MSG_CTRUNC) ? -1 : got;
}

static void launch(int server, const struct order *order, const int *fds, int count, struct answer *answer)
{
    const char *wrong = NULL;
    int own = 3 + !!order->cgroup;
    int parent = (int)syscall(SYS_pidfd_open, getpid(), 0);
    struct birth birth = {
        .program = fds[0], .progress = fds[1], .channel = fds[2], .cgroup = order->cgroup ? fds[3] : -1,
        .parent = parent, .mapped = (int)order->mapped, .secret = server, .flags = order->flags,
        .fds = fds + own, .count = (unsigned)(count - own),
    };
    if (order->subreaper)
        prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0);
    answer->value = count < own || parent < 0 ? -EINVAL : (int32_t)child_clone(&birth, &wrong);
    if (wrong)
        snprintf(answer->text, sizeof answer->text, "%s", wrong);
    if (parent >= 0)
        close(parent);
}

static void pass_on(int number)
{
    int before = errno;
    if (followed > 0)
        kill(followed, number);
    errno = before;
}

/* Wait for `pid`, passing on the signals that come; its exit code, 128 + signal. */
static int follow(int pid)
{
    static const int kept[] = {SIGKILL, SIGSTOP, SIGCHLD, SIGWINCH, SIGURG, SIGSEGV, SIGBUS, SIGFPE, SIGILL};
    struct sigaction action = {.sa_handler = pass_on, .sa_flags = SA_RESTART};
    int status;
    pid_t ended;
    followed = pid;
    for (int number = 1; number < NSIG; number++) {
        int keep = 0;
        for (size_t n = 0; n < sizeof kept / sizeof *kept; n++)
            keep |= kept[n] == number;
        if (!keep)
            sigaction(number, &action, NULL);
    }
    do
        ended = waitpid(-1, &status, 0);
    while (ended != pid && (ended >= 0 || errno == EINTR));
    followed = 0;
    if (ended < 0)
        return FAILED;
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

static int executable(const char *path)
{
    struct stat found;
    return stat(path, &found) == 0 && S_ISREG(found.st_mode) && access(path, X_OK) == 0;
}

/* The interpreter this program belongs to, into `out`. */
static void find_python(char *out, size_t size)
{
    static const char *const places[] = {"bin/python3", ".venv/bin/python3", "python3"};
    const char *named = getenv("BULKHEAD_PYTHON");
    char folder[PATH_MAX], *slash;
    if (named && *named) {
        snprintf(out, size, "%s", named);
        return;
    }
    snprintf(folder, sizeof folder, "%s", self_path);
    while ((slash = strrchr(folder, '/')) && slash != folder) {
        *slash = '\0';
        for (size_t n = 0; n < sizeof places / sizeof *places; n++) {
            int length = snprintf(out, size, "%s/%s", folder, places[n]);
            if (length > 0 && (size_t)length < size && executable(out))
                return;
        }
    }
    snprintf(out, size, "python3");
}

/* Run the command by Python in this process; returns only the exit code of a failure. */
static int run_python(char **argv)
{
    /* Without `site`, which costs more than all the rest, unless it is needed to find the package. */
    static char code[] =
        "import sys; s = sys.argv.pop(1); s and sys.path.insert(0, s)\n"
        "sys.path.append('%s/lib/python%d.%d/site-packages' % ((sys.executable.rpartition('/bin/')[0],) + "
        "sys.version_info[:2]))\n"
        "try:\n import msgspec; from bulkhead.runtime.main import entry\n"
        "except ImportError:\n import site; site.main(); from bulkhead.runtime.main import entry\n"
        "entry(sys.argv.pop(1))\n";
    char python[PATH_MAX], source[PATH_MAX] = "";
    int argc = 0, count = 0;
    while (argv[argc])
        argc++;
    char **words = calloc((size_t)argc + 10, sizeof *words);
    char *native = strstr(self_path, "/bulkhead/_native/");
    if (!words) {
        fputs("bulkhead-runtime: out of memory\n", stderr);
        return FAILED;
    }
    find_python(python, sizeof python);
    if (native)
        snprintf(source, sizeof source, "%.*s", (int)(native - self_path), self_path);
    unsetenv(SELF);
    words[count++] = python;
    for (const char *const *option = (const char *const[]){"-I", "-S", "-X", "frozen_modules=on", "-c", NULL}; *option; option++)
        words[count++] = (char *)*option;
    words[count++] = code;
    words[count++] = source;
    words[count++] = self_path;
    for (int at = 1; at < argc; at++)
        words[count++] = argv[at];
    execvp(python, words);
    fprintf(stderr, "bulkhead-runtime: cannot run %s: %s; set BULKHEAD_PYTHON to the interpreter that has "
            "the bulkhead package\n", python, strerror(errno));
    return FAILED;
}

static int ask(const char *root, char **argv);

/* Another command, after the one that we were started for. */
static int run_after(const char *root, char *words, const char *end)
{
    char *argv[32] = {NULL};
    int count = 0, status;
    for (char *word = words; word < end && count < 31; word += strlen(word) + 1)
        argv[count++] = word;
    int code = ask(root, argv);
    if (code >= 0)
        return code;
    pid_t pid = fork();
    if (pid == 0)
        _exit(run_python(argv));
    while (waitpid(pid, &status, 0) < 0)
        if (errno != EINTR)
            return FAILED;
    return WIFEXITED(status) ? WEXITSTATUS(status) : FAILED;
}

/* Have a worker run the command; its exit code, -1 if nobody has begun with it. */
static int ask(const char *root, char **argv)
{
    static union { struct order order; char bytes[MAX_MESSAGE]; } data;
    int begun = 0, count, fds[MAX_FDS];
    int server = connect_planner(root);
    if (server < 0)
        return -1;
    if (send_request(server, argv)) {
        close(server);
        return -1;
    }
    for (;;) {
        struct answer answer = {0};
        ssize_t got = receive(server, data.bytes, sizeof data - 1, fds, &count);
        if (got < 0)
            break;
        switch (data.order.kind) {
        case LAUNCH: launch(server, &data.order, fds, count, &answer); break;
        case REAP: {
            int status;
            answer.value = waitpid(data.order.value, &status, 0) < 0 ? -errno : status;
            break;
        }
        case FOLLOW: {
            close(server);
            data.bytes[got] = '\0';
            char *words = data.bytes + sizeof data.order;
            int code = follow(data.order.value);
            int after = got > (ssize_t)sizeof data.order ? run_after(root, words, data.bytes + got) : 0;
            return after ? after : code;
        }
        case EXIT: close(server); return data.order.value & 0xFF;
        default: /* REFUSED */
            if (begun)
                break;
            close(server);
            return -1;
        }
        if (data.order.kind != LAUNCH && data.order.kind != REAP)
            break;
        begun = 1;
        for (int n = 0; n < count; n++)
            close(fds[n]);
        if (send(server, &answer, sizeof answer, MSG_NOSIGNAL) < 0)
            break;
    }
    close(server);
    if (!begun)
        return -1;
    fputs("bulkhead-runtime: the process that planned this command ended unexpectedly; see .planner/log "
          "below the root directory\n", stderr);
    return FAILED; /* what was launched ends with us */
}

/* Be executed from a read-only mount of our file, so that no container can write to it through a
 * process of ours (CVE-2019-5736). 0, or -1 if that cannot be had. */
static int seal(char **argv)
{
    struct statvfs s;
    struct mount_attr attributes = {.attr_set = MOUNT_ATTR_RDONLY};
    if (statvfs("/proc/self/exe", &s))
        return -1;
    if (s.f_flag & ST_RDONLY)
        return 0;
    if (sealed_by_us)
        return -1;
    int fd = (int)syscall(SYS_open_tree, AT_FDCWD, self_path, OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC);
    if (fd < 0)
        return -1;
    if (!syscall(SYS_mount_setattr, fd, "", AT_EMPTY_PATH, &attributes, sizeof attributes)
        && !setenv(SELF, self_path, 1))
        execveat(fd, "", argv, environ, AT_EMPTY_PATH);
    close(fd);
    return -1;
}

static void open_missing(void)
{
    for (int fd = 0; fd < 3; fd++)
        if (fcntl(fd, F_GETFD) < 0 && errno == EBADF)
            (void)!open("/dev/null", O_RDWR); /* takes the lowest free number: this one */
}

int main(int argc, char **argv)
{
    const char *wanted = getenv("BULKHEAD_RUNTIME_PLANNER"), *before = getenv(SELF), *root = NULL;
    if (argc < 1)
        return FAILED;
    open_missing();
    signal(SIGCHLD, SIG_DFL); /* ignored, it would take our children's exit codes; wait(2) */
    if (before) {
        sealed_by_us = 1;
        snprintf(self_path, sizeof self_path, "%s", before);
    } else {
        ssize_t length = readlink("/proc/self/exe", self_path, sizeof self_path - 1);
        self_path[length > 0 ? length : 0] = '\0';
    }
    const char *command = find_command(argv, &root);
    if (command && ONE_OF(command, planned) && !(wanted && !strcmp(wanted, "0"))
        && !(ONE_OF(command, launching) && seal(argv))) {
        int code = ask(root, argv);
        if (code >= 0)
            return code;
    }
    return run_python(argv);
}
