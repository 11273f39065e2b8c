/* The image of a process: written by capture.c inside of it, given life again by thaw.c.
 *
 *   struct image, at offset 0, its tables at their greatest size; then pages of data.
 *
 * A region of memory is one run or several: those with data (mapped from the image, copy-on-write)
 * and those without (new memory). Whoever opens an image trusts it: it comes from a process that
 * has run nothing but ours, or it belongs to the one workload that it is given back to.
 */
#ifndef BULKHEAD_IMAGE_H
#define BULKHEAD_IMAGE_H

#include <stddef.h>
#include <stdint.h>

#define IMAGE_MAGIC 0x31656d616e657266ull
#define OURS_END 0x80000000ull /* below is thaw.c (its heap within 1 GiB), nothing of an image */
#define IMAGE_PAGE 4096ull
#define IMAGE_RUNS 12288u
#define IMAGE_THREADS 256u
#define IMAGE_FDS 128u
#define IMAGE_SIGNALS 64u
#define IMAGE_PATH 104u

enum run_kind { RUN_NEW, RUN_DATA, RUN_KERNEL };
enum fd_kind { FD_GIVEN, FD_EVENT, FD_POLL, FD_SIGNAL, FD_FILE, FD_LISTENER };

struct image_run { uint64_t start, end, offset; uint32_t prot, kind; };
struct image_thread { uint64_t context, fs; uint32_t tid, is_ours; };
struct image_fd { int32_t fd; uint32_t kind, flags; uint64_t value; char path[IMAGE_PATH]; };
struct image_action { uint64_t handler, flags, restorer, mask; };

struct image {
    uint64_t magic, size, kernel_hash;
    uint32_t tid_offset, runs, threads, fds; /* threads: the first is the main one */
    struct image_action actions[IMAGE_SIGNALS];
    struct image_thread thread[IMAGE_THREADS];
    struct image_fd fd[IMAGE_FDS];
    struct image_run run[IMAGE_RUNS];
};

/* --- system calls without libc: it belongs to the process that is captured --------------------- */

static inline long raw6(long n, long a, long b, long c, long d, long e, long f)
{
    long result;
    register long r10 __asm__("r10") = d;
    register long r8 __asm__("r8") = e;
    register long r9 __asm__("r9") = f;
    __asm__ volatile("syscall" : "=a"(result) : "a"(n), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return result;
}

#define raw(n, a, b, c) raw6(n, (long)(a), (long)(b), (long)(c), 0, 0, 0)
#define raw4(n, a, b, c, d) raw6(n, (long)(a), (long)(b), (long)(c), (long)(d), 0, 0)

static inline uint64_t hash_bytes(const unsigned char *at, const unsigned char *end)
{
    uint64_t value = 0xcbf29ce484222325ull;
    for (; at < end; at++)
        value = (value ^ *at) * 0x100000001b3ull;
    return value;
}

/* One line of /proc/PID/maps; the rest of the text, or NULL at its end. */
struct map_line { uint64_t start, end, inode; uint32_t prot, is_shared; const char *name; size_t name_size; };

static inline uint64_t read_number(const char **at, int base)
{
    uint64_t value = 0;
    for (;; (*at)++) {
        int c = **at, digit = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : 99;
        if (digit >= base)
            return value;
        value = value * (uint64_t)base + (uint64_t)digit;
    }
}

static inline const char *next_map(const char *at, struct map_line *line)
{
    if (!*at)
        return NULL;
    line->start = read_number(&at, 16);
    at++;
    line->end = read_number(&at, 16);
    line->prot = (at[1] == 'r' ? 1 : 0) | (at[2] == 'w' ? 2 : 0) | (at[3] == 'x' ? 4 : 0);
    line->is_shared = at[4] == 's';
    for (int spaces = 0; spaces < 4;) /* permissions, offset, device */
        spaces += *at++ == ' ';
    line->inode = read_number(&at, 10);
    while (*at == ' ')
        at++;
    line->name = at;
    while (*at != '\n')
        at++;
    line->name_size = (size_t)(at - line->name);
    return at + 1;
}

static inline int starts(const char *text, const char *with)
{
    while (*with)
        if (*text++ != *with++)
            return 0;
    return 1;
}

/* The kernel's own pages in every process: moved, not copied. */
static inline int is_kernel_map(const struct map_line *line)
{
    return starts(line->name, "[vvar") || starts(line->name, "[vdso]");
}

#endif
