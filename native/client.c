/* The `bulkhead` command: hands its arguments, environment, directory, umask and standard streams to
 * a worker of the command server, forwards signals to it and ends with its exit code.
 *
 * The protocol is drawn in src/bulkhead/cli/server.py; src/bulkhead/cli/pyclient.py is the twin of
 * this program. Whatever goes wrong before the worker says that it has taken the command, the same
 * command is run by Python in this process instead (which starts the server for the next one).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <termios.h>
#include <unistd.h>

#define MAGIC 0x31434842u
#define PROTOCOL 1u
#define MAX_REQUEST (8u << 20)

extern char **environ;

static const int forwarded[] = {SIGHUP, SIGINT, SIGQUIT, SIGUSR1, SIGUSR2, SIGALRM,
                                SIGTERM, SIGCONT, SIGWINCH};
static int server = -1;
static volatile sig_atomic_t last_fatal;
static char self_path[PATH_MAX];

static int takes_value(const char *word)
{
    return !strcmp(word, "--root") || !strcmp(word, "--run-root") || !strcmp(word, "--config") ||
           !strcmp(word, "-H") || !strcmp(word, "--host");
}

/* The path of command.sock for this command line, as home.py finds it; 0, or -1 if it is too long. */
static int socket_path(char **argv, char *out, size_t size)
{
    const char *run = NULL, *host = NULL;
    char here[PATH_MAX];
    int length;

    for (int at = 1; argv[at] != NULL && argv[at][0] == '-'; at++) {
        char *word = argv[at], *value = NULL;
        if (takes_value(word)) {
            if (argv[at + 1] == NULL)
                break;
            value = argv[++at];
        } else if (!strncmp(word, "--run-root=", 11)) {
            value = word + 11;
        } else if (!strncmp(word, "--host=", 7)) {
            value = word + 7;
        }
        if (value != NULL && !strncmp(word, "--run-root", 10))
            run = value;
        else if (value != NULL && (!strncmp(word, "--host", 6) || !strcmp(word, "-H")))
            host = value;
    }
    if (run == NULL && host != NULL) {
        size_t end = strlen(host);
        if (strncmp(host, "unix://", 7) != 0 || end < 19 ||
            strcmp(host + end - 12, "/engine.sock") != 0)
            return -1;
        length = snprintf(here, sizeof here, "%.*s", (int)(end - 19), host + 7);
        if (length < 0 || (size_t)length >= sizeof here)
            return -1;
        run = here;
    }
    if (run == NULL || *run == '\0')
        run = getenv("BULKHEAD_RUN");
    if (run != NULL && *run != '\0') {
        length = snprintf(out, size, "%s/command.sock", run);
    } else if (geteuid() == 0) {
        length = snprintf(out, size, "/run/bulkhead/command.sock");
    } else {
        const char *base = getenv("XDG_RUNTIME_DIR");
        if (base != NULL && *base != '\0')
            length = snprintf(out, size, "%s/bulkhead/command.sock", base);
        else
            length = snprintf(out, size, "/run/user/%u/bulkhead/command.sock", geteuid());
    }
    return length < 0 || (size_t)length >= size ? -1 : 0;
}

static int connect_server(char **argv)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct ucred peer;
    socklen_t size = sizeof peer;
    int fd;

    if (socket_path(argv, address.sun_path, sizeof address.sun_path) < 0)
        return -1;
    fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return -1;
    if (connect(fd, (struct sockaddr *)&address, sizeof address) < 0 ||
        getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) < 0 || peer.uid != geteuid()) {
        close(fd);
        return -1;
    }
    return fd;
}

/* Not for the workload's eyes: how this client was started. */
static int internal(const char *variable)
{
    return !strncmp(variable, "BULKHEAD_CLIENT=", 16) || !strncmp(variable, "BULKHEAD_PYTHON=", 16);
}

static void put(unsigned char *at, uint32_t number)
{
    at[0] = (unsigned char)number;
    at[1] = (unsigned char)(number >> 8);
    at[2] = (unsigned char)(number >> 16);
    at[3] = (unsigned char)(number >> 24);
}

static char *append(char *at, const char *text)
{
    size_t length = strlen(text) + 1;
    memcpy(at, text, length);
    return at + length;
}

/* The whole request in memory of its own; NULL if it is larger than the server takes. */
static unsigned char *make_request(char **argv, size_t *size)
{
    size_t length = strlen(self_path) + 1;
    uint32_t argc = 0, envc = 0;
    unsigned char *data;
    mode_t mask = umask(077);
    char *at;

    umask(mask);
    for (; argv[argc] != NULL; argc++)
        length += strlen(argv[argc]) + 1;
    for (char **variable = environ; *variable != NULL; variable++) {
        if (internal(*variable))
            continue;
        length += strlen(*variable) + 1;
        envc++;
    }
    if (length > MAX_REQUEST)
        return NULL;
    data = malloc(24 + length);
    if (data == NULL)
        return NULL;
    put(data, MAGIC);
    put(data + 4, PROTOCOL);
    put(data + 8, (uint32_t)length);
    put(data + 12, argc);
    put(data + 16, envc);
    put(data + 20, (uint32_t)mask);
    at = append((char *)data + 24, self_path);
    for (uint32_t n = 0; n < argc; n++)
        at = append(at, argv[n]);
    for (char **variable = environ; *variable != NULL; variable++)
        if (!internal(*variable))
            at = append(at, *variable);
    *size = 24 + length;
    return data;
}

static int send_request(int fd, const unsigned char *data, size_t size)
{
    union {
        struct cmsghdr align;
        char space[CMSG_SPACE(4 * sizeof(int))];
    } control = {0};
    struct iovec part = {.iov_base = (void *)data, .iov_len = size};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = control.space,
                             .msg_controllen = sizeof control.space};
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    int here = open(".", O_PATH | O_DIRECTORY | O_CLOEXEC);
    int fds[4] = {0, 1, 2, here};
    ssize_t sent;

    if (here < 0)
        return -1;
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof fds);
    memcpy(CMSG_DATA(header), fds, sizeof fds);
    sent = sendmsg(fd, &message, MSG_NOSIGNAL);
    close(here);
    while (sent >= 0 && (size_t)sent < size) {
        ssize_t more = send(fd, data + sent, size - (size_t)sent, MSG_NOSIGNAL);
        if (more < 0 && errno != EINTR)
            return -1;
        if (more > 0)
            sent += more;
    }
    return sent < 0 ? -1 : 0;
}

static void forward(int number)
{
    int before = errno;
    unsigned char byte = (unsigned char)number;

    if (number != SIGCONT && number != SIGWINCH)
        last_fatal = number;
    (void)!send(server, &byte, 1, MSG_NOSIGNAL | MSG_DONTWAIT);
    errno = before;
}

/* Hold back, or let through, what is to be forwarded: not in the middle of the request. */
static void hold_signals(int how)
{
    sigset_t set;

    sigemptyset(&set);
    for (size_t n = 0; n < sizeof forwarded / sizeof *forwarded; n++)
        sigaddset(&set, forwarded[n]);
    sigprocmask(how, &set, NULL);
}

static void handle_signals(int forwarding)
{
    struct sigaction action = {.sa_flags = SA_RESTART}, old;

    for (size_t n = 0; n < sizeof forwarded / sizeof *forwarded; n++) {
        action.sa_handler = forwarding ? forward : SIG_DFL;
        if (forwarding && sigaction(forwarded[n], NULL, &old) == 0 && old.sa_handler == SIG_IGN)
            continue; /* nohup(1) */
        sigaction(forwarded[n], &action, NULL);
    }
}

/* Wait for the exit code. -1: the worker did not take the command. */
static int follow(int fd)
{
    struct termios terminal;
    int taken = 0, saved = isatty(0) && tcgetattr(0, &terminal) == 0;

    for (;;) {
        unsigned char byte;
        ssize_t got = recv(fd, &byte, 1, 0);
        if (got < 0 && errno == EINTR)
            continue;
        if (got == 1 && byte == 'S') {
            taken = 1;
            continue;
        }
        if (got == 1 && byte == 'X') {
            do
                got = recv(fd, &byte, 1, 0);
            while (got < 0 && errno == EINTR);
            if (got == 1)
                return byte;
        }
        break;
    }
    if (!taken)
        return -1;
    if (saved) {
        signal(SIGTTOU, SIG_IGN);
        tcsetattr(0, TCSADRAIN, &terminal);
    }
    if (last_fatal) { /* the worker ended by the signal that we passed on: so do we */
        handle_signals(0);
        raise(last_fatal);
    }
    fputs("bulkhead: the process that ran this command ended unexpectedly; "
          "see command.log in the run directory\n", stderr);
    return 125;
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
    char folder[PATH_MAX];
    char *slash;

    if (named != NULL && *named != '\0') {
        snprintf(out, size, "%s", named);
        return;
    }
    snprintf(folder, sizeof folder, "%s", self_path);
    while ((slash = strrchr(folder, '/')) != NULL && slash != folder) {
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
static int run_python(int argc, char **argv)
{
    static char code[] = "import sys; p = sys.argv.pop(1); p and sys.path.insert(0, p); "
                         "from bulkhead.cli.main import direct; direct()";
    char python[PATH_MAX], source[PATH_MAX] = "";
    char **words = calloc((size_t)argc + 5, sizeof *words);
    char *native = strstr(self_path, "/bulkhead/_native/");
    int count = 0;

    if (words == NULL) {
        fputs("bulkhead: out of memory\n", stderr);
        return 125;
    }
    find_python(python, sizeof python);
    if (native != NULL)
        snprintf(source, sizeof source, "%.*s", (int)(native - self_path), self_path);
    words[count++] = python;
    words[count++] = "-c";
    words[count++] = code;
    words[count++] = source;
    for (int at = 1; at < argc; at++)
        words[count++] = argv[at];
    setenv("BULKHEAD_CLIENT", "native", 1);
    execvp(python, words);
    fprintf(stderr, "bulkhead: cannot run %s: %s; set BULKHEAD_PYTHON to the interpreter that has "
            "the bulkhead package\n", python, strerror(errno));
    return 125;
}

static void open_missing(void)
{
    for (int fd = 0; fd < 3; fd++)
        if (fcntl(fd, F_GETFD) < 0 && errno == EBADF)
            (void)!open("/dev/null", O_RDWR); /* takes the lowest free number: this one */
}

int main(int argc, char **argv)
{
    const char *wanted = getenv("BULKHEAD_COMMAND_SERVER");
    ssize_t length = readlink("/proc/self/exe", self_path, sizeof self_path - 1);
    unsigned char *data;
    size_t size = 0;
    int code = -1;

    self_path[length > 0 ? length : 0] = '\0';
    if (argc < 1)
        return 125;
    open_missing();
    if (wanted != NULL && !strcmp(wanted, "0"))
        return run_python(argc, argv);
    server = connect_server(argv);
    if (server < 0)
        return run_python(argc, argv);
    data = make_request(argv, &size);
    hold_signals(SIG_BLOCK);
    handle_signals(1);
    if (data != NULL && send_request(server, data, size) == 0) {
        hold_signals(SIG_UNBLOCK);
        code = follow(server);
    }
    if (code < 0) {
        handle_signals(0);
        hold_signals(SIG_UNBLOCK);
    }
    free(data);
    if (code >= 0)
        return code;
    close(server);
    return run_python(argc, argv);
}
