/* Launch programs: the C side of src/bulkhead/linux/program.py, which describes the format. */
#ifndef BULKHEAD_LAUNCH_H
#define BULKHEAD_LAUNCH_H

#include <stddef.h>
#include <stdint.h>

#define PROGRAM_MAGIC 0x31504842u
#define PROGRAM_MAX_OPS 4096u
#define PROGRAM_MAX_SIZE (8u << 20)
#define PROGRAM_MAX_FDS 200u

#if defined(__x86_64__)
#define PROGRAM_ARCH 0xC000003Eu
#elif defined(__aarch64__)
#define PROGRAM_ARCH 0xC00000B7u
#else
#error "no launch programs for this architecture: add its AUDIT_ARCH here and in linux/program.py"
#endif

enum kind { CALL = 1, WRITE, SAME_INODE, FSTYPE, SEND_FD, FORK, GATE, EXEC, STORE, LOAD, SKIP, FAIL, CLOSE };
#define KEPT_MORE 16u /* beside the six that a step names */
#define KEPT_FIRST 10 /* the number of the first descriptor that CLOSE keeps */

enum tag { T_INT, T_SLOT, T_FD, T_BLOB };

struct header { uint32_t magic, arch, size, ops, data, fds, zero[2]; };

struct op {
    uint8_t kind, args, oks, zero;
    uint32_t number;
    uint8_t tag[6], zero2[2];
    uint16_t ok[8];
    uint64_t arg[6];
};

/* What the child says about itself, in memory it shares with the holder until its exec. */
enum state { S_RUNNING = 0, S_FAILED, S_EXEC, S_EXEC_FAILED };

struct progress {
    uint32_t state, step;
    int32_t error;
    int32_t forked;      /* pid of the process that FORK made, else 0 */
    uint32_t no_interpreter; /* the program is there, but execve said ENOENT */
    uint32_t used;
    uint32_t done;       /* the program came to its end (a set-up program of a guest) */
    char text[228];      /* argv[0] of a failed EXEC */
};

/* NULL, or why the program is refused. `new_pid`: it starts in a PID namespace of its own. */
const char *program_check(const void *program, size_t size, unsigned fds, int new_pid);

/* A pidfd of the child's parent where getppid() cannot tell (another PID namespace), else -1. */
extern int program_parent;

/* In the child: end with the parent (PR_SET_PDEATHSIG). 0, -errno; -ESRCH if it has ended already. */
long program_follow_parent(void);

/* In the child: interpret. `program` is private writable memory that was checked. */
_Noreturn void program_run(void *program, const int *fds, int channel, struct progress *progress);

#endif
