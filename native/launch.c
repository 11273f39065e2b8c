/* The interpreter of launch programs: runs in a fresh child, allocates nothing, decides nothing.
 *
 * program_check() runs in the holder and is the only judge of bounds: whatever it lets pass cannot
 * make program_run() touch memory outside the program. What the system calls themselves do is the
 * business of whoever may connect to the holder (its own user).
 */
#define _GNU_SOURCE
#include "launch.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/sched.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/vfs.h>
#include <unistd.h>

static long slots[PROGRAM_MAX_OPS];
int program_parent = -1;

/* --- checking ------------------------------------------------------------------------------ */

/* How many arguments a kind takes; -1: up to six. */
static const int arity[] = {0, -1, 4, 2, 2, 2, 0, 1, 6, 4, 3, 3, 1, -1};

struct check {
    const struct header *head;
    const unsigned char *data;
    uint64_t size; /* of the data */
};

static int is_const(const struct op *op, int i) { return op->tag[i] == T_INT; }

static int in_data(const struct check *c, const struct op *op, int blob, uint64_t offset, uint64_t size)
{
    uint64_t at = op->arg[blob];
    return op->tag[blob] == T_BLOB && offset <= c->size && at + offset <= c->size
        && size <= c->size - at - offset;
}

static const char *check_vector(const struct check *c, const struct op *op, int i)
{
    uint64_t at = op->arg[i], count = op->arg[i + 1];
    if (op->tag[i] != T_BLOB || !is_const(op, i + 1) || at % 8 || at >= c->size)
        return "a vector is not in the data";
    if (count > (c->size - at) / 8 || count + 1 > (c->size - at) / 8)
        return "a vector is longer than the data";
    for (uint64_t k = 0; k <= count; k++) {
        uint64_t offset;
        memcpy(&offset, c->data + at + 8 * k, 8);
        if (k == count ? offset != 0 : offset >= c->size || offset < 8)
            return "a string of a vector is not in the data";
    }
    return NULL;
}

static const char *check_special(const struct check *c, const struct op *op, uint32_t index)
{
    const char *error;
    switch (op->kind) {
    case WRITE:
        if (op->tag[1] != T_BLOB || !is_const(op, 3) || !in_data(c, op, 2, 0, op->arg[3]))
            return "what to write is not in the data";
        return NULL;
    case SEND_FD:
        return op->tag[0] == T_BLOB ? NULL : "a name is not in the data";
    case EXEC:
        for (int i = 0; i < 6; i += 2)
            if ((error = check_vector(c, op, i)))
                return error;
        return op->arg[1] && op->arg[3] ? NULL : "nothing to execute";
    case STORE:
    case LOAD:
        if (!is_const(op, 1) || !is_const(op, 2) || !in_data(c, op, 0, op->arg[1], op->arg[2]))
            return "a field is not in the data";
        if (op->arg[2] != 1 && op->arg[2] != 2 && op->arg[2] != 4 && op->arg[2] != 8)
            return "a field has no such size";
        return NULL;
    case SKIP:
        if (op->tag[0] != T_SLOT || !is_const(op, 1) || !is_const(op, 2)
            || op->arg[1] > c->head->ops - index - 1)
            return "a skip leads outside the program";
        return NULL;
    case FAIL:
        return is_const(op, 0) && op->arg[0] && op->arg[0] < 4096 ? NULL : "not an errno";
    case CLOSE:
        if (op->number && (op->number > KEPT_MORE || op->args != 6 || op->tag[5] != T_FD || op->arg[5] + op->number >= c->head->fds))
            return "no such descriptors to keep";
        return NULL;
    default:
        return NULL;
    }
}

static const char *check_op(const struct check *c, const struct op *op, uint32_t index, int new_pid)
{
    if (op->kind < CALL || op->kind > CLOSE)
        return "unknown kind of step";
    if (op->args > 6 || op->oks > 8 || (arity[op->kind] >= 0 && op->args != arity[op->kind]))
        return "wrong number of arguments";
    if (op->kind == FORK && new_pid)
        return "fork in a program that starts in a PID namespace of its own";
    for (int i = 0; i < op->args; i++) {
        uint64_t value = op->arg[i];
        switch (op->tag[i]) {
        case T_INT: break;
        case T_SLOT:
            if (value >= index)
                return "a result is used before it exists";
            break;
        case T_FD:
            if (value >= c->head->fds)
                return "no such descriptor";
            break;
        case T_BLOB:
            if (value >= c->size)
                return "an address is outside the data";
            break;
        default: return "unknown kind of argument";
        }
    }
    return check_special(c, op, index);
}

const char *program_check(const void *program, size_t size, unsigned fds, int new_pid)
{
    const struct header *head = program;
    if (size < sizeof *head || head->magic != PROGRAM_MAGIC)
        return "not a launch program";
    if (head->arch != PROGRAM_ARCH)
        return "made for another architecture";
    if (head->size != size || size > PROGRAM_MAX_SIZE)
        return "wrong size";
    if (head->ops == 0 || head->ops > PROGRAM_MAX_OPS)
        return "too many steps, or none";
    if (head->data != sizeof *head + head->ops * sizeof(struct op) || (uint64_t)head->data + 8 > size)
        return "no data after the steps";
    if (head->fds > PROGRAM_MAX_FDS || head->fds > fds)
        return "fewer descriptors than the program uses";
    struct check c = {head, (const unsigned char *)program + head->data, size - head->data};
    if (c.data[c.size - 1] != 0)
        return "the data does not end with NUL";
    const struct op *ops = (const struct op *)(head + 1);
    for (uint32_t i = 0; i < head->ops; i++) {
        const char *error = check_op(&c, &ops[i], i, new_pid);
        if (error)
            return error;
    }
    return NULL;
}

/* --- running -------------------------------------------------------------------------------- */

struct run {
    unsigned char *data;
    const int *fds;
    int channel;
    struct progress *progress;
};

static _Noreturn void leave(void)
{
    for (;;)
        syscall(SYS_exit_group, 127);
}

static _Noreturn void fail(struct run *run, int error)
{
    run->progress->error = error;
    __atomic_store_n(&run->progress->state, S_FAILED, __ATOMIC_RELEASE);
    leave();
}

static long value(const struct run *run, const struct op *op, int i)
{
    uint64_t raw = op->arg[i];
    switch (op->tag[i]) {
    case T_SLOT: return slots[raw];
    case T_FD: return run->fds[raw];
    case T_BLOB: return (long)(run->data + raw);
    default: return (long)raw;
    }
}

/* A system call's result as the kernel gives it: -errno on failure. */
static long result(long value) { return value < 0 ? -errno : value; }

static long do_call(const struct run *run, const struct op *op)
{
    long a[6] = {0};
    for (int i = 0; i < op->args; i++)
        a[i] = value(run, op, i);
    return result(syscall(op->number, a[0], a[1], a[2], a[3], a[4], a[5]));
}

static long do_write(const struct run *run, const struct op *op)
{
    long fd = openat((int)value(run, op, 0), (char *)value(run, op, 1), O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        return -errno;
    size_t size = (size_t)op->arg[3];
    ssize_t n = write((int)fd, (void *)value(run, op, 2), size);
    long error = n < 0 ? -errno : (size_t)n != size ? -EIO : 0;
    close((int)fd);
    return error;
}

static long do_same_inode(const struct run *run, const struct op *op)
{
    struct stat a, b;
    if (fstat((int)value(run, op, 0), &a) || fstat((int)value(run, op, 1), &b))
        return -errno;
    return a.st_dev == b.st_dev && a.st_ino == b.st_ino ? 0 : -ESTALE;
}

static long do_fstype(const struct run *run, const struct op *op)
{
    struct statfs s;
    if (fstatfs((int)value(run, op, 0), &s))
        return -errno;
    return (uint32_t)s.f_type == (uint32_t)value(run, op, 1) ? 0 : -EXDEV;
}

static long do_send_fd(const struct run *run, const struct op *op)
{
    char *name = (char *)value(run, op, 0);
    int fd = (int)value(run, op, 1);
    union { struct cmsghdr align; char bytes[CMSG_SPACE(sizeof(int))]; } control = {0};
    struct iovec iov = {name, strnlen(name, 64)};
    struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1,
                         .msg_control = control.bytes, .msg_controllen = sizeof control.bytes};
    struct cmsghdr *c = CMSG_FIRSTHDR(&msg);
    c->cmsg_level = SOL_SOCKET;
    c->cmsg_type = SCM_RIGHTS;
    c->cmsg_len = CMSG_LEN(sizeof fd);
    memcpy(CMSG_DATA(c), &fd, sizeof fd);
    return sendmsg(run->channel, &msg, MSG_NOSIGNAL) < 0 ? -errno : 0;
}

long program_follow_parent(void)
{
    struct pollfd parent = {.fd = program_parent, .events = POLLIN};
    if (prctl(PR_SET_PDEATHSIG, SIGKILL))
        return -errno;
    /* One that ended before that sends no signal. */
    return program_parent >= 0 && poll(&parent, 1, 0) != 0 ? -ESRCH : 0;
}

static long do_fork(const struct run *run)
{
    /* With CLONE_PARENT_SETTID the pid is in shared memory before the new process runs. */
    struct clone_args args = {.flags = CLONE_PARENT | CLONE_PARENT_SETTID,
                              .parent_tid = (uint64_t)(uintptr_t)&run->progress->forked};
    long pid = syscall(SYS_clone3, &args, sizeof args);
    if (pid < 0)
        return -errno;
    if (pid > 0)
        for (;;)
            syscall(SYS_exit_group, 0);
    return program_follow_parent();
}

static long do_gate(const struct run *run, const struct op *op)
{
    char byte;
    ssize_t n;
    do
        n = read((int)value(run, op, 0), &byte, 1);
    while (n < 0 && errno == EINTR);
    return n < 0 ? -errno : 0;
}

static char **relocate(const struct run *run, const struct op *op, int i)
{
    uint64_t *table = (uint64_t *)(run->data + op->arg[i]);
    uint64_t base = (uint64_t)(uintptr_t)run->data;
    /* Vectors may be shared between places: one that was relocated holds addresses already. */
    if (table[0] >= base)
        return (char **)table;
    for (uint64_t k = 0; k < op->arg[i + 1]; k++)
        table[k] += base;
    return (char **)table;
}

static long do_exec(struct run *run, const struct op *op)
{
    char **names = relocate(run, op, 0), **argv = relocate(run, op, 2), **env = relocate(run, op, 4);
    long denied = 0, error = -ENOENT;
    prctl(PR_SET_PDEATHSIG, 0);
    __atomic_store_n(&run->progress->state, S_EXEC, __ATOMIC_RELEASE);
    for (; *names; names++) {
        execve(*names, argv, env);
        error = -errno;
        if (error == -ENOENT && access(*names, F_OK) == 0) {
            run->progress->no_interpreter = 1;
            break;
        }
        if (error == -EACCES)
            denied = error;
        else if (error != -ENOENT && error != -ENOTDIR)
            break;
    }
    if ((error == -ENOENT && !run->progress->no_interpreter) || error == -ENOTDIR)
        error = denied ? denied : error;
    strncpy(run->progress->text, argv[0], sizeof run->progress->text - 1);
    run->progress->error = (int)-error;
    __atomic_store_n(&run->progress->state, S_EXEC_FAILED, __ATOMIC_RELEASE);
    leave();
}

static long do_store(const struct run *run, const struct op *op)
{
    unsigned char *at = run->data + op->arg[0] + op->arg[1];
    uint64_t wide = (uint64_t)value(run, op, 3);
    memcpy(at, &wide, op->arg[2]); /* both architectures are little-endian */
    return 0;
}

static long do_load(const struct run *run, const struct op *op)
{
    uint64_t wide = 0;
    memcpy(&wide, run->data + op->arg[0] + op->arg[1], op->arg[2]);
    return (long)wide;
}

static long close_between(unsigned first, unsigned end)
{
    return first < end ? result(syscall(SYS_close_range, first, end - 1, 0)) : 0;
}

/* Everything but the standard streams and the channel, whose end tells the holder of the exec.
 * The descriptors given as arguments are kept, as KEPT_FIRST and the numbers after it; and `number`
 * more, which follow the last of them in the request. */
static long do_close(struct run *run, const struct op *op)
{
    unsigned first = 3;
    if (op->args) {
        int kept[6 + KEPT_MORE], count = op->args + (int)op->number;
        int channel = fcntl(run->channel, F_DUPFD_CLOEXEC, KEPT_FIRST + count);
        if (channel < 0)
            return -errno;
        run->channel = channel;
        for (int i = 0; i < count; i++) {
            int fd = i < op->args ? (int)value(run, op, i) : run->fds[op->arg[op->args - 1] + (uint64_t)(i - op->args) + 1];
            if ((kept[i] = fcntl(fd, F_DUPFD_CLOEXEC, KEPT_FIRST + count)) < 0)
                return -errno;
        }
        for (int i = 0; i < count; i++)
            if (dup3(kept[i], KEPT_FIRST + i, 0) < 0)
                return -errno;
        if (close_between(first, KEPT_FIRST))
            return -errno;
        first = (unsigned)(KEPT_FIRST + count);
    }
    if (close_between(first, (unsigned)run->channel))
        return -errno;
    return result(syscall(SYS_close_range, (unsigned)run->channel + 1, ~0u, 0));
}

static long execute(struct run *run, const struct op *op)
{
    switch (op->kind) {
    case CALL: return do_call(run, op);
    case WRITE: return do_write(run, op);
    case SAME_INODE: return do_same_inode(run, op);
    case FSTYPE: return do_fstype(run, op);
    case SEND_FD: return do_send_fd(run, op);
    case FORK: return do_fork(run);
    case GATE: return do_gate(run, op);
    case EXEC: return do_exec(run, op);
    case STORE: return do_store(run, op);
    case LOAD: return do_load(run, op);
    case FAIL: return -(long)op->arg[0];
    case CLOSE: return do_close(run, op);
    default: return -ENOSYS;
    }
}

static int is_ok(const struct op *op, long error)
{
    for (int i = 0; i < op->oks; i++)
        if (op->ok[i] == -error)
            return 1;
    return 0;
}

_Noreturn void program_run(void *program, const int *fds, int channel, struct progress *progress)
{
    const struct header *head = program;
    const struct op *ops = (const struct op *)(head + 1);
    struct run run = {(unsigned char *)program + head->data, fds, channel, progress};
    for (uint32_t i = 0; i < head->ops; i++) {
        const struct op *op = &ops[i];
        if (op->kind == SKIP) {
            slots[i] = 0;
            if ((slots[op->arg[0]] < 0) != (op->arg[2] != 0)) {
                for (uint64_t k = op->arg[1]; k; k--)
                    slots[++i] = -EBADF;
            }
            continue;
        }
        progress->step = i;
        if (op->kind == CALL && (op->number == SYS_execve || op->number == SYS_execveat))
            __atomic_store_n(&progress->state, S_EXEC, __ATOMIC_RELEASE);
        slots[i] = execute(&run, op);
        if (slots[i] < 0 && slots[i] >= -4095 && op->kind != LOAD && !is_ok(op, slots[i]))
            fail(&run, (int)-slots[i]);
        __atomic_store_n(&progress->state, S_RUNNING, __ATOMIC_RELEASE);
    }
    progress->done = 1;
    fail(&run, ENOEXEC); /* the program ends without an exec */
}
