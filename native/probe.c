/* The measuring program of `bulkhead compare`: static, so that it runs in any root file system.
 *
 *   bulkhead-probe first              one byte on standard output, then the end
 *   bulkhead-probe idle               one line on standard output, then wait for a SIGTERM
 *   bulkhead-probe serve PORT         a server for readiness, round trips and throughput (below)
 *   bulkhead-probe later S PORT       the same server, and after S seconds what `calls` does
 *   bulkhead-probe calls|cpu|memory   JSON on one line: nanoseconds per call, ms, MB/s
 *   bulkhead-probe disk DIRECTORY     JSON: MB/s of a sequential file, microseconds of a small fsync
 *   bulkhead-probe beat SECONDS       JSON: how long equal pieces of work took, in microseconds
 *   bulkhead-probe hog cpu|disk WHERE N   a noisy neighbour of N processes, until it is killed
 *
 * The server's protocol, one client after the other: the first byte says what is wanted. 'e': each
 * further byte is sent back. 's': everything is taken in until the client's half-close, then one
 * byte answers. 'r' and a 64-bit number, host order: so many bytes are sent. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { MIB = 1 << 20, FILE_MIB = 64, FSYNCS = 40, BEATS_MAX = 200000 };

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static _Noreturn void die(const char *what) {
    dprintf(2, "bulkhead-probe: %s: %s\n", what, strerror(errno));
    _exit(1);
}

/* --- system calls, by class --- */

static int pair[2], back[2];
static char *page;

static void one_getppid(void) { syscall(SYS_getppid); }

static void one_file(void) {
    int fd = open("/", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0)
        die("open /");
    close(fd);
}

static void one_stat(void) {
    struct stat found;
    if (stat("/", &found) < 0)
        die("stat /");
}

static void one_pipe(void) {
    char byte = 0;
    if (write(pair[1], &byte, 1) != 1 || read(pair[0], &byte, 1) != 1)
        die("pipe");
}

static void one_switch(void) {
    char byte = 0;
    if (write(pair[1], &byte, 1) != 1 || read(back[0], &byte, 1) != 1)
        die("pipe between two processes");
}

static void one_fault(void) {
    page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (page == MAP_FAILED)
        die("mmap");
    *(volatile char *)page = 1;
    munmap(page, 4096);
}

static void one_fork(void) {
    pid_t child = fork();
    if (child == 0)
        _exit(0);
    if (child < 0 || waitpid(child, NULL, 0) != child)
        die("fork");
}

/* Nanoseconds per call: batches until `seconds` are over, the fastest batch counts. */
static double cost(void (*call)(void), int batch, double seconds) {
    double best = 1e18, end = now() + seconds;
    call();
    do {
        double start = now();
        for (int i = 0; i < batch; i++)
            call();
        double each = (now() - start) / batch;
        if (each < best)
            best = each;
    } while (now() < end);
    return best * 1e9;
}

static int calls(void) {
    if (pipe2(pair, O_CLOEXEC) < 0)
        die("pipe");
    printf("{\"getppid\": %.1f", cost(one_getppid, 2000, 0.15));
    printf(", \"open\": %.1f", cost(one_file, 500, 0.15));
    printf(", \"stat\": %.1f", cost(one_stat, 500, 0.15));
    printf(", \"pipe\": %.1f", cost(one_pipe, 500, 0.15));
    printf(", \"fault\": %.1f", cost(one_fault, 200, 0.15));
    fflush(stdout);
    printf(", \"fork\": %.1f", cost(one_fork, 5, 0.3));
    fflush(stdout);
    if (pipe2(back, O_CLOEXEC) < 0)
        die("pipe");
    pid_t child = fork();
    if (child == 0) {
        char byte;
        close(pair[1]);
        while (read(pair[0], &byte, 1) == 1)
            if (write(back[1], &byte, 1) != 1)
                break;
        _exit(0);
    }
    if (child < 0)
        die("fork");
    printf(", \"switch\": %.1f}\n", cost(one_switch, 200, 0.3));
    close(pair[1]);
    waitpid(child, NULL, 0);
    return 0;
}

/* --- processor and memory --- */

static volatile double sink;

static double work(unsigned long rounds) {
    unsigned long n = 1;
    double x = 1.0, start = now();
    for (unsigned long i = 1; i < rounds; i++) {
        n = n * 2862933555777941757ul + i;
        x += (double)(n >> 40) * 1e-9;
    }
    sink = x;
    return now() - start;
}

static int cpu(void) {
    double best = 1e18;
    for (int i = 0; i < 3; i++) {
        double took = work(20000000);
        if (took < best)
            best = took;
    }
    printf("{\"cpu\": %.3f}\n", best * 1e3);
    return 0;
}

static int memory(void) {
    size_t size = 16 * MIB;
    char *from = malloc(size), *to = malloc(size);
    double best = 1e18;
    if (!from || !to)
        die("malloc");
    memset(from, 1, size);
    memset(to, 2, size);
    for (int i = 0; i < 12; i++) {
        double start = now();
        memcpy(to, from, size);
        __asm__ volatile("" ::"r"(to) : "memory");
        double took = now() - start;
        if (took < best)
            best = took;
    }
    printf("{\"copy\": %.1f}\n", (double)size / best / 1e6);
    free(from);
    free(to);
    return 0;
}

/* --- disk --- */

static int compare_doubles(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static int disk(const char *directory) {
    static char buffer[MIB];
    static double times[FSYNCS];
    if (chdir(directory) < 0)
        die(directory);
    int fd = open("bulkhead-probe.tmp", O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (fd < 0)
        die("create a file");
    unlink("bulkhead-probe.tmp");
    memset(buffer, 0x5a, sizeof buffer);
    double start = now();
    for (int i = 0; i < FILE_MIB; i++)
        if (write(fd, buffer, MIB) != MIB)
            die("write");
    if (fsync(fd) < 0)
        die("fsync");
    double wrote = now() - start;
    posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
    lseek(fd, 0, SEEK_SET);
    start = now();
    for (int i = 0; i < FILE_MIB; i++)
        if (read(fd, buffer, MIB) != MIB)
            die("read");
    double took = now() - start;
    for (int i = 0; i < FSYNCS; i++) {
        start = now();
        if (pwrite(fd, buffer, 4096, (off_t)i * 4096) != 4096 || fdatasync(fd) < 0)
            die("fdatasync");
        times[i] = now() - start;
    }
    qsort(times, FSYNCS, sizeof *times, compare_doubles);
    printf("{\"write\": %.1f, \"read\": %.1f, \"fsync\": %.1f}\n", FILE_MIB * 1.048576 / wrote,
           FILE_MIB * 1.048576 / took, times[FSYNCS / 2] * 1e6);
    close(fd);
    return 0;
}

/* --- a neighbour's effect --- */

static int beat(double seconds) {
    static double times[BEATS_MAX];
    int count = 0;
    double end = now() + seconds;
    while (now() < end && count < BEATS_MAX) {
        struct timespec rest = {0, 500000};
        times[count++] = work(150000);
        nanosleep(&rest, NULL);
    }
    qsort(times, (size_t)count, sizeof *times, compare_doubles);
    printf("{\"beats\": %d, \"median\": %.1f, \"p99\": %.1f}\n", count, times[count / 2] * 1e6,
           times[(int)(count * 0.99)] * 1e6);
    return 0;
}

static _Noreturn void hog_disk(const char *directory) {
    static char buffer[MIB];
    if (chdir(directory) < 0)
        die(directory);
    int fd = open(".", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
    if (fd < 0)
        die("create a file");
    for (;;)
        for (int i = 0; i < FILE_MIB; i++) {
            if (pwrite(fd, buffer, MIB, (off_t)i * MIB) != MIB)
                die("write");
            if (i % 8 == 7)
                fdatasync(fd);
        }
}

static _Noreturn int hog(const char *kind, const char *where, int count) {
    for (int i = 1; i < count; i++) {
        pid_t child = fork();
        if (child < 0)
            die("fork");
        if (child == 0) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            break;
        }
    }
    if (strcmp(kind, "disk") == 0)
        hog_disk(where);
    for (;;)
        work(10000000);
}

/* --- the server --- */

static void answer(int client) {
    static char buffer[256 * 1024];
    char kind;
    ssize_t size;
    if (read(client, &kind, 1) != 1)
        return;
    if (kind == 'e') {
        while ((size = read(client, buffer, sizeof buffer)) > 0)
            if (write(client, buffer, (size_t)size) != size)
                return;
    } else if (kind == 's') {
        while ((size = read(client, buffer, sizeof buffer)) > 0)
            ;
        if (size == 0 && write(client, "k", 1) != 1)
            return;
    } else if (kind == 'r') {
        uint64_t left;
        if (recv(client, &left, sizeof left, MSG_WAITALL) != sizeof left)
            return;
        while (left > 0) {
            size = write(client, buffer, left < sizeof buffer ? left : sizeof buffer);
            if (size <= 0)
                return;
            left -= (uint64_t)size;
        }
    }
}

static _Noreturn int serve(int port) {
    int one = 1, zero = 0;
    int listener = socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct sockaddr_in6 any6 = {.sin6_family = AF_INET6, .sin6_port = htons((uint16_t)port)};
    struct sockaddr_in any4 = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    struct sockaddr *address = (struct sockaddr *)&any6;
    socklen_t length = sizeof any6;
    if (listener < 0) { /* a kernel without IPv6 */
        listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        address = (struct sockaddr *)&any4;
        length = sizeof any4;
    } else {
        setsockopt(listener, IPPROTO_IPV6, IPV6_V6ONLY, &zero, sizeof zero);
    }
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(listener, address, length) < 0 || listen(listener, 64) < 0)
        die("listen");
    for (;;) {
        int client = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        if (client < 0)
            continue;
        setsockopt(client, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        answer(client);
        close(client);
    }
}

/* Something to watch: it serves, and after a while it calls. */
static _Noreturn int later(double seconds, int port) {
    struct timespec rest = {(time_t)seconds, 0};
    pid_t child = fork();
    if (child < 0)
        die("fork");
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        serve(port);
    }
    nanosleep(&rest, NULL);
    calls();
    for (;;)
        pause();
}

static void stop(int number) {
    (void)number;
    _exit(0);
}

int main(int argc, char **argv) {
    const char *what = argc > 1 ? argv[1] : "";
    /* The first process of a PID namespace gets only signals that it handles: pid_namespaces(7). */
    signal(SIGTERM, stop);
    signal(SIGINT, stop);
    signal(SIGPIPE, SIG_IGN);
    if (strcmp(what, "first") == 0)
        return write(1, "1\n", 2) == 2 ? 0 : 1;
    if (strcmp(what, "idle") == 0 && write(1, "1\n", 2) == 2)
        for (;;)
            pause();
    if (strcmp(what, "calls") == 0)
        return calls();
    if (strcmp(what, "cpu") == 0)
        return cpu();
    if (strcmp(what, "memory") == 0)
        return memory();
    if (strcmp(what, "disk") == 0 && argc == 3)
        return disk(argv[2]);
    if (strcmp(what, "beat") == 0 && argc == 3)
        return beat(atof(argv[2]));
    if (strcmp(what, "hog") == 0 && argc == 5)
        return hog(argv[2], argv[3], atoi(argv[4]));
    if (strcmp(what, "serve") == 0 && argc == 3)
        return serve(atoi(argv[2]));
    if (strcmp(what, "later") == 0 && argc == 4)
        return later(atof(argv[2]), atoi(argv[3]));
    dprintf(2, "usage: bulkhead-probe first|idle|calls|cpu|memory|disk DIR|beat S|hog KIND DIR N|"
               "serve PORT|later S PORT\n");
    return 2;
}
