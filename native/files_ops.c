/* What the guest's kernel asks of its files: FUSE requests, carried out on the host.
 *
 * The guest is hostile. Names are single components, "." and ".." are none; only regular files are
 * opened, without blocking; devices are not made; extended attributes are those of a short list. Who may do
 * what is decided by the guest's kernel (default_permissions), as for every disk of its own.
 */
#define _GNU_SOURCE
#include "files.h"

#include <dirent.h>
#include <fcntl.h>
#include <limits.h>
#include <stddef.h>
#include <stdio.h>
#include <sys/file.h>
#include <sys/statfs.h>
#include <sys/sysmacros.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/xattr.h>

#define COPY_MAX (16u << 20)
#define WANTED (FUSE_ASYNC_READ | FUSE_POSIX_LOCKS | FUSE_ATOMIC_O_TRUNC | FUSE_BIG_WRITES | FUSE_FLOCK_LOCKS \
                | FUSE_AUTO_INVAL_DATA | FUSE_DO_READDIRPLUS | FUSE_READDIRPLUS_AUTO | FUSE_ASYNC_DIO \
                | FUSE_PARALLEL_DIROPS | FUSE_MAX_PAGES | FUSE_HANDLE_KILLPRIV_V2)
#define LOCKS (FUSE_POSIX_LOCKS | FUSE_FLOCK_LOCKS)
#define SYNC_FLAGS (O_SYNC | O_DSYNC)

static struct handle handles[HANDLES_MAX];
static uint32_t handle_serial, handle_hint;
static char data[IO_MAX + 4096];

/* --- handles ----------------------------------------------------------------------------------- */

struct handle *find_handle(const struct share *share, uint64_t fh)
{
    struct handle *h = &handles[fh % HANDLES_MAX];
    return h->share == share && h->serial == fh / HANDLES_MAX ? h : NULL;
}

/* A number for the open `fd`, which it owns; 0 if there are too many. */
static uint64_t add_handle(struct node *n, int fd, int directory)
{
    for (uint32_t i = 0; i < HANDLES_MAX; i++) {
        uint32_t at = (handle_hint + i) % HANDLES_MAX;
        if (handles[at].share)
            continue;
        handle_hint = at + 1;
        handle_serial = handle_serial == UINT32_MAX ? 1 : handle_serial + 1;
        handles[at] = (struct handle){fd, handle_serial, directory, n->share, n};
        hold_node(n);
        return (uint64_t)handle_serial * HANDLES_MAX + at;
    }
    close(fd);
    return 0;
}

static void free_handle(struct handle *h)
{
    struct node *n = h->node;
    close(h->fd);
    memset(h, 0, sizeof *h);
    release_node(n);
}

/* Open the node's file itself, whatever its names are now: a descriptor or minus an errno. */
static int open_file(struct node *n, int flags)
{
    char name[16];
    int fd = node_fd(n);
    if (fd < 0)
        return fd;
    if (n->type != S_IFREG && n->type != S_IFDIR)
        return -EINVAL; /* the guest's kernel opens those itself */
    snprintf(name, sizeof name, "%d", fd);
    fd = openat(proc_fds, name, flags | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    return fd < 0 ? -errno : fd;
}

/* --- what is said about files ------------------------------------------------------------------ */

static void put_attr(const struct share *share, const struct statx *stx, struct fuse_attr *attr)
{
    uint64_t dev = (uint64_t)stx->stx_dev_major << 32 | stx->stx_dev_minor, ino = stx->stx_ino;
    if (dev != share->dev)
        ino ^= dev * 0x9E3779B97F4A7C15u; /* of a mount below: another's numbers */
    *attr = (struct fuse_attr){
        .ino = ino, .size = stx->stx_size, .blocks = stx->stx_blocks,
        .atime = (uint64_t)stx->stx_atime.tv_sec, .atimensec = stx->stx_atime.tv_nsec,
        .mtime = (uint64_t)stx->stx_mtime.tv_sec, .mtimensec = stx->stx_mtime.tv_nsec,
        .ctime = (uint64_t)stx->stx_ctime.tv_sec, .ctimensec = stx->stx_ctime.tv_nsec,
        .mode = stx->stx_mode, .nlink = stx->stx_nlink, .uid = stx->stx_uid, .gid = stx->stx_gid,
        .rdev = (uint32_t)makedev(stx->stx_rdev_major, stx->stx_rdev_minor), .blksize = stx->stx_blksize};
}

static void put_entry(const struct share *share, const struct node *n, const struct statx *stx, struct fuse_entry_out *out)
{
    uint64_t seconds = share->valid_ms / 1000;
    uint32_t ns = share->valid_ms % 1000 * 1000000;
    memset(out, 0, sizeof *out);
    out->nodeid = n ? n->id : 0;
    out->entry_valid = out->attr_valid = seconds;
    out->entry_valid_nsec = out->attr_valid_nsec = ns;
    if (n)
        put_attr(share, stx, &out->attr);
}

static int answer_attr(const struct request *r, const struct statx *stx)
{
    struct fuse_attr_out out = {.attr_valid = r->share->valid_ms / 1000, .attr_valid_nsec = r->share->valid_ms % 1000 * 1000000};
    put_attr(r->share, stx, &out.attr);
    answer(r->share, r->in->unique, 0, &out, sizeof out);
    return 0;
}

/* Look a name up that was just made, and say what it is. */
static int answer_entry(const struct request *r, struct node *parent, const char *name)
{
    struct fuse_entry_out out;
    struct statx stx;
    struct node *n = NULL;
    int error = look_up(parent, name, &n, &stx);
    if (error && error != ENOENT)
        return error;
    put_entry(r->share, n, &stx, &out);
    answer(r->share, r->in->unique, 0, &out, sizeof out);
    return 0;
}

static int bad_name; /* what to say of a name that is none */

/* A name of one component at `at` of the payload, NULL if it is none; `*end` is behind it. */
static const char *name_at(const struct request *r, size_t at, size_t *end)
{
    const char *name = r->bytes + at;
    const char *zero = at < r->size ? memchr(name, 0, r->size - at) : NULL;
    bad_name = zero && zero - name > NAME_MAX ? ENAMETOOLONG : EINVAL;
    if (!zero || zero == name || zero - name > NAME_MAX || memchr(name, '/', (size_t)(zero - name))
        || !strcmp(name, ".") || !strcmp(name, ".."))
        return NULL;
    if (end)
        *end = (size_t)(zero - r->bytes) + 1;
    return name;
}

static struct node *directory(const struct request *r, uint64_t id)
{
    struct node *n = find_node(r->share, id);
    return n && n->type == S_IFDIR ? n : NULL;
}

/* --- looking ----------------------------------------------------------------------------------- */

static int on_init(const struct request *r)
{
    struct fuse_init_in in = {0};
    struct fuse_init_out out = {.major = FUSE_KERNEL_VERSION, .minor = 33, .max_background = 32, .congestion_threshold = 24,
                                .max_write = IO_MAX, .time_gran = 1, .max_pages = IO_MAX / 4096};
    memcpy(&in, r->bytes, r->size < sizeof in ? r->size : sizeof in);
    if (in.major < 7 || (in.major == 7 && in.minor < 31))
        return EPROTO;
    out.max_readahead = in.max_readahead < IO_MAX ? in.max_readahead : IO_MAX;
    out.flags = in.flags & WANTED & ~(uint32_t)(r->share->own ? LOCKS : 0);
    r->share->greeted = 1;
    answer(r->share, r->in->unique, 0, &out, sizeof out);
    return 0;
}

static int on_lookup(const struct request *r)
{
    struct node *parent = directory(r, r->in->nodeid);
    const char *name = name_at(r, 0, NULL);
    return !parent ? ESTALE : !name ? bad_name : answer_entry(r, parent, name);
}

static int on_getattr(const struct request *r)
{
    struct fuse_getattr_in in;
    struct statx stx;
    memcpy(&in, r->bytes, sizeof in);
    struct node *n = find_node(r->share, r->in->nodeid);
    struct handle *h = in.getattr_flags & FUSE_GETATTR_FH ? find_handle(r->share, in.fh) : NULL;
    int fd = h ? h->fd : n ? node_fd(n) : -ESTALE;
    int error = fd < 0 ? -fd : stat_fd(fd, &stx);
    return error ? error : answer_attr(r, &stx);
}

static int on_readlink(const struct request *r)
{
    struct node *n = find_node(r->share, r->in->nodeid);
    int fd = n ? node_fd(n) : -ESTALE;
    ssize_t size = fd < 0 ? -1 : readlinkat(fd, "", data, PATH_MAX);
    if (size < 0)
        return fd < 0 ? -fd : errno;
    answer(r->share, r->in->unique, 0, data, (size_t)size);
    return 0;
}

static int on_statfs(const struct request *r)
{
    struct node *n = find_node(r->share, r->in->nodeid);
    struct statfs s;
    int fd = n ? node_fd(n) : -ESTALE;
    if (fd < 0 || fstatfs(fd, &s))
        return fd < 0 ? -fd : errno;
    struct fuse_statfs_out out = {.st = {.blocks = s.f_blocks, .bfree = s.f_bfree, .bavail = s.f_bavail, .files = s.f_files,
                                         .ffree = s.f_ffree, .bsize = (uint32_t)s.f_bsize, .namelen = (uint32_t)s.f_namelen,
                                         .frsize = (uint32_t)s.f_frsize}};
    answer(r->share, r->in->unique, 0, &out, sizeof out);
    return 0;
}

/* --- changing what is said --------------------------------------------------------------------- */

/* A name for `fd` that system calls without AT_EMPTY_PATH take. */
static const char *proc_name(int fd)
{
    static char name[40];
    snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
    return name;
}

static int kill_privileges(int fd)
{
    struct stat st;
    if (fstat(fd, &st))
        return errno;
    mode_t mode = st.st_mode & 07777 & ~(mode_t)S_ISUID;
    if (st.st_mode & S_IXGRP)
        mode &= ~(mode_t)S_ISGID;
    return mode != (st.st_mode & 07777) && fchmod(fd, mode) ? errno : 0;
}

static int set_size(struct node *n, struct handle *h, const struct fuse_setattr_in *in)
{
    int fd = h ? h->fd : open_file(n, O_WRONLY), error = 0;
    if (fd < 0)
        return -fd;
    if (in->size > INT64_MAX || ftruncate(fd, (off_t)in->size))
        error = in->size > INT64_MAX ? EFBIG : errno;
    else if (in->valid & FATTR_KILL_SUIDGID)
        error = kill_privileges(fd);
    if (!h)
        close(fd);
    return error;
}

static int set_times(int fd, const struct fuse_setattr_in *in)
{
    struct timespec t[2] = {{.tv_nsec = UTIME_OMIT}, {.tv_nsec = UTIME_OMIT}};
    if (in->valid & FATTR_ATIME)
        t[0] = (struct timespec){(time_t)in->atime, in->atimensec < 1000000000 ? (long)in->atimensec : 0};
    if (in->valid & FATTR_ATIME_NOW)
        t[0].tv_nsec = UTIME_NOW;
    if (in->valid & FATTR_MTIME)
        t[1] = (struct timespec){(time_t)in->mtime, in->mtimensec < 1000000000 ? (long)in->mtimensec : 0};
    if (in->valid & FATTR_MTIME_NOW)
        t[1].tv_nsec = UTIME_NOW;
    return utimensat(fd, "", t, AT_EMPTY_PATH) ? errno : 0;
}

static int on_setattr(const struct request *r)
{
    struct fuse_setattr_in in;
    struct statx stx;
    memcpy(&in, r->bytes, sizeof in);
    struct node *n = find_node(r->share, r->in->nodeid);
    struct handle *h = in.valid & FATTR_FH ? find_handle(r->share, in.fh) : NULL;
    if (!n || (h && h->node != n))
        return ESTALE;
    int error = 0, fd = h ? h->fd : node_fd(n);
    if (fd < 0)
        return -fd;
    uid_t uid = in.valid & FATTR_UID ? in.uid : (uid_t)-1;
    gid_t gid = in.valid & FATTR_GID ? in.gid : (gid_t)-1;
    if (in.valid & (FATTR_UID | FATTR_GID) && fchownat(fd, "", uid, gid, AT_EMPTY_PATH))
        return errno;
    if (in.valid & FATTR_MODE && n->type == S_IFLNK)
        return EOPNOTSUPP;
    if (in.valid & FATTR_MODE && chmod(proc_name(fd), in.mode & 07777))
        return errno;
    if (in.valid & FATTR_SIZE && (error = n->type != S_IFREG ? EINVAL : set_size(n, h && !h->directory ? h : NULL, &in)))
        return error;
    if (in.valid & (FATTR_ATIME | FATTR_MTIME | FATTR_ATIME_NOW | FATTR_MTIME_NOW) && (error = set_times(fd, &in)))
        return error;
    fd = h ? h->fd : node_fd(n);
    error = fd < 0 ? -fd : stat_fd(fd, &stx);
    return error ? error : answer_attr(r, &stx);
}

/* --- names ------------------------------------------------------------------------------------- */

/* What was just made belongs to who made it; in a set-group-id directory its group does already. */
static int give(const struct request *r, struct node *parent, int fd, const char *name, mode_t mode, int is_link)
{
    struct stat st;
    int dir = node_fd(parent);
    if (dir < 0 || fstatat(dir, "", &st, AT_EMPTY_PATH))
        return dir < 0 ? -dir : errno;
    gid_t gid = st.st_mode & S_ISGID ? (gid_t)-1 : r->in->gid;
    if (fd >= 0 ? fchown(fd, r->in->uid, gid) : fchownat(dir, name, r->in->uid, gid, AT_SYMLINK_NOFOLLOW))
        return errno;
    if (is_link || !(mode & 07000))
        return 0;
    /* A change of owner has taken those bits away. */
    if (fd >= 0)
        return fchmod(fd, mode & 07777) ? errno : 0;
    return fchmodat(dir, name, mode & 07777, 0) ? errno : 0;
}

static int on_mknod(const struct request *r)
{
    struct fuse_mknod_in in;
    memcpy(&in, r->bytes, sizeof in);
    struct node *parent = directory(r, r->in->nodeid);
    const char *name = name_at(r, sizeof in, NULL);
    int dir = parent ? node_fd(parent) : -ESTALE;
    if (dir < 0 || !name)
        return dir < 0 ? -dir : bad_name;
    mode_t type = in.mode & S_IFMT;
    if (type != S_IFREG && type != S_IFIFO && type != S_IFSOCK)
        return EPERM;
    if (mknodat(dir, name, in.mode, 0))
        return errno;
    int error = give(r, parent, -1, name, in.mode & 0777, 0);
    return error ? error : answer_entry(r, parent, name);
}

static int on_mkdir(const struct request *r)
{
    struct fuse_mkdir_in in;
    memcpy(&in, r->bytes, sizeof in);
    struct node *parent = directory(r, r->in->nodeid);
    const char *name = name_at(r, sizeof in, NULL);
    int dir = parent ? node_fd(parent) : -ESTALE;
    if (dir < 0 || !name)
        return dir < 0 ? -dir : bad_name;
    if (mkdirat(dir, name, in.mode & 07777))
        return errno;
    int error = give(r, parent, -1, name, 0, 0);
    return error ? error : answer_entry(r, parent, name);
}

static int on_symlink(const struct request *r)
{
    size_t end;
    struct node *parent = directory(r, r->in->nodeid);
    const char *name = name_at(r, 0, &end);
    int dir = parent ? node_fd(parent) : -ESTALE;
    if (dir < 0 || !name || end >= r->size || !memchr(r->bytes + end, 0, r->size - end))
        return dir < 0 ? -dir : bad_name;
    if (symlinkat(r->bytes + end, dir, name))
        return errno;
    int error = give(r, parent, -1, name, 0, 1);
    return error ? error : answer_entry(r, parent, name);
}

/* What the name means now, if the guest knows it. */
static struct node *known(struct node *parent, const char *name)
{
    struct statx stx;
    int fd = node_fd(parent);
    if (fd < 0 || statx(fd, name, AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT, STATX_BASIC_STATS | STATX_BTIME, &stx))
        return NULL;
    return find_identity(parent->share, &stx);
}

static int on_unlink(const struct request *r, int flags)
{
    struct node *parent = directory(r, r->in->nodeid);
    const char *name = name_at(r, 0, NULL);
    if (!parent || !name)
        return parent ? bad_name : ESTALE;
    struct node *n = known(parent, name);
    if (n)
        pin_node(n);
    int dir = node_fd(parent);
    return dir < 0 ? -dir : unlinkat(dir, name, flags) ? errno : 0;
}

static int rename_to(const struct request *r, uint64_t newdir, unsigned flags, size_t at)
{
    size_t end;
    struct node *from = directory(r, r->in->nodeid), *to = directory(r, newdir);
    const char *name = name_at(r, at, &end), *new_name = name ? name_at(r, end, NULL) : NULL;
    if (!from || !to || !new_name)
        return !from || !to ? ESTALE : bad_name;
    if (flags & ~(unsigned)(RENAME_NOREPLACE | RENAME_EXCHANGE))
        return EINVAL;
    struct node *n = known(from, name), *other = known(to, new_name);
    if (other && !(flags & RENAME_EXCHANGE))
        pin_node(other);
    if (node_fd(from) < 0 || node_fd(to) < 0)
        return ESTALE;
    if (renameat2(node_fd(from), name, node_fd(to), new_name, flags))
        return errno;
    /* What the guest has forgotten is known by its children alone: one that moves takes it away. */
    hold_node(from);
    if (other)
        hold_node(other);
    if (n && n != other)
        node_moved(n, to, new_name);
    if (other && flags & RENAME_EXCHANGE)
        node_moved(other, from, name);
    if (other)
        release_node(other);
    release_node(from);
    return 0;
}

static int on_link(const struct request *r)
{
    struct fuse_link_in in;
    char number[16];
    memcpy(&in, r->bytes, sizeof in);
    struct node *parent = directory(r, r->in->nodeid), *n = find_node(r->share, in.oldnodeid);
    const char *name = name_at(r, sizeof in, NULL);
    if (!parent || !n || !name || n->type == S_IFDIR)
        return !name ? bad_name : n && n->type == S_IFDIR ? EPERM : ESTALE;
    int fd = node_fd(n);
    snprintf(number, sizeof number, "%d", fd);
    int dir = fd < 0 ? fd : node_fd(parent);
    if (dir < 0)
        return -dir;
    if (linkat(proc_fds, number, dir, name, AT_SYMLINK_FOLLOW))
        return errno;
    return answer_entry(r, parent, name);
}

/* --- open files -------------------------------------------------------------------------------- */

static int answer_open(const struct request *r, struct node *n, int fd, int is_directory)
{
    struct fuse_open_out out = {.fh = add_handle(n, fd, is_directory)};
    if (!out.fh)
        return ENFILE;
    /* What is cached is thrown away when size or time differ (AUTO_INVAL_DATA). */
    out.open_flags = is_directory ? 0 : FOPEN_KEEP_CACHE;
    answer(r->share, r->in->unique, 0, &out, sizeof out);
    return 0;
}

static int on_open(const struct request *r, int is_directory)
{
    struct fuse_open_in in;
    memcpy(&in, r->bytes, sizeof in);
    struct node *n = is_directory ? directory(r, r->in->nodeid) : find_node(r->share, r->in->nodeid);
    if (!n)
        return ESTALE;
    if (!is_directory && n->type != S_IFREG)
        return n->type == S_IFDIR ? EISDIR : EINVAL;
    int flags = is_directory ? O_RDONLY | O_DIRECTORY : (int)in.flags & (O_ACCMODE | O_TRUNC | SYNC_FLAGS);
    int fd = open_file(n, flags), error;
    if (fd >= 0 && !is_directory && in.open_flags & FUSE_OPEN_KILL_SUIDGID && (error = kill_privileges(fd))) {
        close(fd);
        return error;
    }
    return fd < 0 ? -fd : answer_open(r, n, fd, is_directory);
}

static int on_create(const struct request *r)
{
    struct fuse_create_in in;
    struct { struct fuse_entry_out entry; struct fuse_open_out open; } out;
    struct statx stx;
    struct node *n;
    memcpy(&in, r->bytes, sizeof in);
    struct node *parent = directory(r, r->in->nodeid);
    const char *name = name_at(r, sizeof in, NULL);
    int dir = parent ? node_fd(parent) : -ESTALE, error = 0;
    if (dir < 0 || !name)
        return dir < 0 ? -dir : bad_name;
    int flags = (int)in.flags & (O_ACCMODE | SYNC_FLAGS);
    int fd = openat(dir, name, flags | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, in.mode & 07777);
    int made = fd >= 0;
    if (!made && (errno != EEXIST || in.flags & O_EXCL))
        return errno;
    if (made && (error = give(r, parent, fd, name, in.mode, 0))) {
        close(fd);
        return error;
    }
    error = look_up(parent, name, &n, &stx);
    if (!error && !made) { /* somebody else has made it: opened as what it is */
        fd = n->type == S_IFREG ? open_file(n, flags | ((int)in.flags & O_TRUNC)) : -EINVAL;
        if (fd < 0)
            error = -fd;
        else if (in.flags & O_TRUNC)
            stat_fd(fd, &stx);
        if (error)
            forget_lookups(n, 1);
    }
    if (error) {
        if (made)
            close(fd);
        return error;
    }
    memset(&out, 0, sizeof out);
    out.open.fh = add_handle(n, fd, 0);
    if (!out.open.fh) {
        forget_lookups(n, 1);
        return ENFILE;
    }
    put_entry(r->share, n, &stx, &out.entry);
    out.open.open_flags = FOPEN_KEEP_CACHE;
    answer(r->share, r->in->unique, 0, &out, sizeof out);
    return 0;
}

static int on_release(const struct request *r)
{
    struct fuse_release_in in;
    memcpy(&in, r->bytes, sizeof in);
    struct handle *h = find_handle(r->share, in.fh);
    if (!h)
        return EBADF;
    free_handle(h);
    return 0;
}

static struct handle *file_of(const struct request *r, uint64_t fh)
{
    struct handle *h = find_handle(r->share, fh);
    return h && !h->directory ? h : NULL;
}

static int on_read(const struct request *r)
{
    struct fuse_read_in in;
    memcpy(&in, r->bytes, sizeof in);
    struct handle *h = file_of(r, in.fh);
    if (!h)
        return EBADF;
    ssize_t n = pread(h->fd, data, in.size < IO_MAX ? in.size : IO_MAX, (off_t)in.offset);
    if (n < 0)
        return errno;
    answer(r->share, r->in->unique, 0, data, (size_t)n);
    return 0;
}

static int on_write(const struct request *r)
{
    struct fuse_write_in in;
    memcpy(&in, r->bytes, sizeof in);
    struct handle *h = file_of(r, in.fh);
    if (!h || in.size > r->size - sizeof in)
        return h ? EINVAL : EBADF;
    struct iovec iov = {(char *)r->bytes + sizeof in, in.size};
    int error = 0, append = in.flags & O_APPEND && !(in.write_flags & FUSE_WRITE_CACHE);
    ssize_t n = pwritev2(h->fd, &iov, 1, (off_t)in.offset, append ? RWF_APPEND : 0);
    if (n < 0)
        return errno;
    if (in.write_flags & FUSE_WRITE_KILL_SUIDGID && (error = kill_privileges(h->fd)))
        return error;
    struct fuse_write_out out = {.size = (uint32_t)n};
    answer(r->share, r->in->unique, 0, &out, sizeof out);
    return 0;
}

static int on_flush(const struct request *r)
{
    struct fuse_flush_in in;
    memcpy(&in, r->bytes, sizeof in);
    struct handle *h = find_handle(r->share, in.fh);
    if (r->share->own)
        return ENOSYS; /* there are no locks to end: do not ask any more */
    if (!h)
        return EBADF;
    end_locks(r->share, h->node->id, in.lock_owner);
    return 0;
}

static int on_fsync(const struct request *r)
{
    struct fuse_fsync_in in;
    memcpy(&in, r->bytes, sizeof in);
    struct handle *h = find_handle(r->share, in.fh);
    if (!h)
        return EBADF;
    return (in.fsync_flags & FUSE_FSYNC_FDATASYNC ? fdatasync(h->fd) : fsync(h->fd)) ? errno : 0;
}

static int on_fallocate(const struct request *r)
{
    struct fuse_fallocate_in in;
    memcpy(&in, r->bytes, sizeof in);
    struct handle *h = file_of(r, in.fh);
    if (!h)
        return EBADF;
    return fallocate(h->fd, (int)in.mode, (off_t)in.offset, (off_t)in.length) ? errno : 0;
}

static int on_lseek(const struct request *r)
{
    struct fuse_lseek_in in;
    memcpy(&in, r->bytes, sizeof in);
    struct handle *h = file_of(r, in.fh);
    if (!h || (in.whence != SEEK_DATA && in.whence != SEEK_HOLE))
        return h ? EINVAL : EBADF;
    off_t at = lseek(h->fd, (off_t)in.offset, (int)in.whence);
    if (at < 0)
        return errno;
    struct fuse_lseek_out out = {.offset = (uint64_t)at};
    answer(r->share, r->in->unique, 0, &out, sizeof out);
    return 0;
}

static int on_copy(const struct request *r)
{
    struct fuse_copy_file_range_in in;
    memcpy(&in, r->bytes, sizeof in);
    struct handle *from = file_of(r, in.fh_in), *to = file_of(r, in.fh_out);
    if (!from || !to)
        return EBADF;
    loff_t at = (loff_t)in.off_in, into = (loff_t)in.off_out;
    ssize_t n = copy_file_range(from->fd, &at, to->fd, &into, in.len < COPY_MAX ? in.len : COPY_MAX, 0);
    if (n < 0)
        return errno;
    struct fuse_write_out out = {.size = (uint32_t)n};
    answer(r->share, r->in->unique, 0, &out, sizeof out);
    return 0;
}

/* --- directories ------------------------------------------------------------------------------- */

struct entry { uint64_t ino; int64_t off; unsigned short size; unsigned char type; char name[]; };

/* One entry into the answer: its size there, or 0 if there is no room. */
static size_t put_dirent(const struct request *r, struct node *n, const struct entry *e, char *at, size_t room, int plus)
{
    size_t length = strlen(e->name), head = plus ? sizeof(struct fuse_entry_out) : 0;
    size_t size = FUSE_DIRENT_ALIGN(head + FUSE_NAME_OFFSET + length);
    struct fuse_dirent d = {.ino = e->ino, .off = (uint64_t)e->off, .namelen = (uint32_t)length, .type = e->type};
    if (size > room)
        return 0;
    memset(at, 0, size);
    if (plus && strcmp(e->name, ".") && strcmp(e->name, "..")) {
        struct fuse_entry_out out;
        struct statx stx;
        struct node *found;
        if (!look_up(n, e->name, &found, &stx)) {
            put_entry(r->share, found, &stx, &out);
            memcpy(at, &out, sizeof out);
            d.ino = out.attr.ino;
        }
    }
    memcpy(at + head, &d, FUSE_NAME_OFFSET);
    memcpy(at + head + FUSE_NAME_OFFSET, e->name, length);
    return size;
}

static int on_readdir(const struct request *r, int plus)
{
    struct fuse_read_in in;
    static _Alignas(8) char entries[32768];
    memcpy(&in, r->bytes, sizeof in);
    struct handle *h = find_handle(r->share, in.fh);
    if (!h || !h->directory)
        return EBADF;
    if (lseek(h->fd, (off_t)in.offset, SEEK_SET) < 0)
        return errno;
    size_t room = in.size < IO_MAX ? in.size : IO_MAX, used = 0;
    size_t most = room < sizeof entries ? room : sizeof entries;
    if (plus)
        most = most / 4 > 1024 ? most / 4 : 1024; /* what is not used is read again */
    for (int full = 0; !full;) {
        long n = syscall(SYS_getdents64, h->fd, entries, most);
        if (n < 0 && !used)
            return errno;
        if (n <= 0)
            break;
        for (long at = 0; at < n && !full;) {
            const struct entry *e = (const struct entry *)(entries + at);
            size_t size = put_dirent(r, h->node, e, data + used, room - used, plus);
            full = !size;
            used += size;
            at += e->size;
        }
    }
    answer(r->share, r->in->unique, 0, data, used);
    return 0;
}

/* --- extended attributes ----------------------------------------------------------------------- */

static int allowed(const char *name)
{
    return !strncmp(name, "user.", 5) || !strcmp(name, "security.capability") || !strcmp(name, "system.posix_acl_access")
           || !strcmp(name, "system.posix_acl_default");
}

static const char *xattr_name(const struct request *r, size_t at, size_t *end)
{
    const char *name = r->bytes + at;
    const char *zero = at < r->size ? memchr(name, 0, r->size - at) : NULL;
    if (!zero || zero - name > XATTR_NAME_MAX)
        return NULL;
    *end = (size_t)(zero - r->bytes) + 1;
    return name;
}

static int answer_xattr(const struct request *r, uint32_t wanted, ssize_t size)
{
    struct fuse_getxattr_out out = {.size = (uint32_t)size};
    if (size < 0)
        return errno;
    if (wanted && (size_t)size > wanted)
        return ERANGE;
    answer(r->share, r->in->unique, 0, wanted ? (void *)data : &out, wanted ? (size_t)size : sizeof out);
    return 0;
}

static int on_getxattr(const struct request *r)
{
    struct fuse_getxattr_in in;
    size_t end;
    memcpy(&in, r->bytes, sizeof in);
    struct node *n = find_node(r->share, r->in->nodeid);
    const char *name = xattr_name(r, sizeof in, &end);
    int fd = n ? node_fd(n) : -ESTALE;
    if (fd < 0 || !name)
        return fd < 0 ? -fd : EINVAL;
    if (!allowed(name))
        return EOPNOTSUPP;
    return answer_xattr(r, in.size, getxattr(proc_name(fd), name, data, XATTR_SIZE_MAX));
}

static int on_listxattr(const struct request *r)
{
    struct fuse_getxattr_in in;
    memcpy(&in, r->bytes, sizeof in);
    struct node *n = find_node(r->share, r->in->nodeid);
    int fd = n ? node_fd(n) : -ESTALE;
    if (fd < 0)
        return -fd;
    ssize_t size = listxattr(proc_name(fd), data, XATTR_LIST_MAX), kept = 0;
    for (ssize_t at = 0; at < size;) {
        ssize_t length = (ssize_t)strlen(data + at) + 1;
        if (allowed(data + at)) {
            memmove(data + kept, data + at, (size_t)length);
            kept += length;
        }
        at += length;
    }
    return answer_xattr(r, in.size, size < 0 ? size : kept);
}

static int on_setxattr(const struct request *r)
{
    struct fuse_setxattr_in in = {0};
    size_t end, head = FUSE_COMPAT_SETXATTR_IN_SIZE;
    memcpy(&in, r->bytes, head);
    struct node *n = find_node(r->share, r->in->nodeid);
    const char *name = xattr_name(r, head, &end);
    int fd = n ? node_fd(n) : -ESTALE;
    if (fd < 0 || !name || in.size > r->size - end)
        return fd < 0 ? -fd : EINVAL;
    if (!allowed(name))
        return EOPNOTSUPP;
    return setxattr(proc_name(fd), name, r->bytes + end, in.size, (int)in.flags & (XATTR_CREATE | XATTR_REPLACE)) ? errno : 0;
}

static int on_removexattr(const struct request *r)
{
    size_t end;
    struct node *n = find_node(r->share, r->in->nodeid);
    const char *name = xattr_name(r, 0, &end);
    int fd = n ? node_fd(n) : -ESTALE;
    if (fd < 0 || !name)
        return fd < 0 ? -fd : EINVAL;
    if (!allowed(name))
        return EOPNOTSUPP;
    return removexattr(proc_name(fd), name) ? errno : 0;
}

/* --- all of them ------------------------------------------------------------------------------- */

static void forget_one(const struct request *r, uint64_t id, uint64_t count)
{
    struct node *n = find_node(r->share, id);
    if (n && n->parent)
        forget_lookups(n, count);
}

static void on_forgets(const struct request *r)
{
    struct fuse_batch_forget_in in;
    struct fuse_forget_one one;
    memcpy(&in, r->bytes, sizeof in);
    for (size_t i = 0, at = sizeof in; i < in.count && at + sizeof one <= r->size; i++, at += sizeof one) {
        memcpy(&one, r->bytes + at, sizeof one);
        forget_one(r, one.nodeid, one.nlookup);
    }
}

static size_t least_size(uint32_t opcode)
{
    switch (opcode) {
    case FUSE_INIT: return 16;
    case FUSE_FORGET: return sizeof(struct fuse_forget_in);
    case FUSE_BATCH_FORGET: return sizeof(struct fuse_batch_forget_in);
    case FUSE_GETATTR: return sizeof(struct fuse_getattr_in);
    case FUSE_SETATTR: return sizeof(struct fuse_setattr_in);
    case FUSE_MKNOD: return sizeof(struct fuse_mknod_in);
    case FUSE_MKDIR: return sizeof(struct fuse_mkdir_in);
    case FUSE_RENAME: return sizeof(struct fuse_rename_in);
    case FUSE_RENAME2: return sizeof(struct fuse_rename2_in);
    case FUSE_LINK: return sizeof(struct fuse_link_in);
    case FUSE_OPEN:
    case FUSE_OPENDIR: return sizeof(struct fuse_open_in);
    case FUSE_CREATE: return sizeof(struct fuse_create_in);
    case FUSE_READ:
    case FUSE_READDIR:
    case FUSE_READDIRPLUS: return sizeof(struct fuse_read_in);
    case FUSE_WRITE: return sizeof(struct fuse_write_in);
    case FUSE_RELEASE:
    case FUSE_RELEASEDIR: return sizeof(struct fuse_release_in);
    case FUSE_FLUSH: return sizeof(struct fuse_flush_in);
    case FUSE_FSYNC:
    case FUSE_FSYNCDIR: return sizeof(struct fuse_fsync_in);
    case FUSE_GETLK:
    case FUSE_SETLK:
    case FUSE_SETLKW: return sizeof(struct fuse_lk_in);
    case FUSE_INTERRUPT: return sizeof(struct fuse_interrupt_in);
    case FUSE_GETXATTR:
    case FUSE_LISTXATTR: return sizeof(struct fuse_getxattr_in);
    case FUSE_SETXATTR: return FUSE_COMPAT_SETXATTR_IN_SIZE;
    case FUSE_FALLOCATE: return sizeof(struct fuse_fallocate_in);
    case FUSE_LSEEK: return sizeof(struct fuse_lseek_in);
    case FUSE_COPY_FILE_RANGE: return sizeof(struct fuse_copy_file_range_in);
    default: return 0;
    }
}

/* An errno; 0 with `*answered` 0: there is nothing more to say than that it was done. */
static int carry_out(const struct request *r, int *answered)
{
    struct fuse_rename_in old;
    struct fuse_rename2_in new;
    int error;
    *answered = 1; /* those below that return 0 have */
    switch (r->in->opcode) {
    case FUSE_INIT: return on_init(r);
    case FUSE_LOOKUP: return on_lookup(r);
    case FUSE_GETATTR: return on_getattr(r);
    case FUSE_SETATTR: return on_setattr(r);
    case FUSE_READLINK: return on_readlink(r);
    case FUSE_STATFS: return on_statfs(r);
    case FUSE_SYMLINK: return on_symlink(r);
    case FUSE_MKNOD: return on_mknod(r);
    case FUSE_MKDIR: return on_mkdir(r);
    case FUSE_LINK: return on_link(r);
    case FUSE_OPEN: return on_open(r, 0);
    case FUSE_OPENDIR: return on_open(r, 1);
    case FUSE_CREATE: return on_create(r);
    case FUSE_READ: return on_read(r);
    case FUSE_READDIR: return on_readdir(r, 0);
    case FUSE_READDIRPLUS: return on_readdir(r, 1);
    case FUSE_WRITE: return on_write(r);
    case FUSE_LSEEK: return on_lseek(r);
    case FUSE_COPY_FILE_RANGE: return on_copy(r);
    case FUSE_GETXATTR: return on_getxattr(r);
    case FUSE_LISTXATTR: return on_listxattr(r);
    case FUSE_GETLK: return get_lock(r);
    default: break;
    }
    *answered = 0;
    switch (r->in->opcode) {
    case FUSE_UNLINK: return on_unlink(r, 0);
    case FUSE_RMDIR: return on_unlink(r, AT_REMOVEDIR);
    case FUSE_RENAME:
        memcpy(&old, r->bytes, sizeof old);
        return rename_to(r, old.newdir, 0, sizeof old);
    case FUSE_RENAME2:
        memcpy(&new, r->bytes, sizeof new);
        return rename_to(r, new.newdir, new.flags, sizeof new);
    case FUSE_RELEASE:
    case FUSE_RELEASEDIR: return on_release(r);
    case FUSE_FLUSH: return on_flush(r);
    case FUSE_FSYNC:
    case FUSE_FSYNCDIR: return on_fsync(r);
    case FUSE_FALLOCATE: return on_fallocate(r);
    case FUSE_SETXATTR: return on_setxattr(r);
    case FUSE_REMOVEXATTR: return on_removexattr(r);
    case FUSE_DESTROY: return 0;
    case FUSE_SETLK: return set_lock(r, 0);
    case FUSE_SETLKW:
        error = set_lock(r, 1);
        *answered = error < 0; /* later */
        return error < 0 ? 0 : error;
    default: return ENOSYS;
    }
}

void serve_request(const struct request *r)
{
    struct fuse_forget_in forget;
    struct fuse_interrupt_in interrupt;
    int answered, error;
    uint32_t opcode = r->in->opcode;
    if (r->size < least_size(opcode)) {
        if (opcode != FUSE_FORGET && opcode != FUSE_BATCH_FORGET && opcode != FUSE_INTERRUPT)
            answer(r->share, r->in->unique, EINVAL, NULL, 0);
        return;
    }
    switch (opcode) { /* those that nobody awaits an answer to */
    case FUSE_FORGET:
        memcpy(&forget, r->bytes, sizeof forget);
        forget_one(r, r->in->nodeid, forget.nlookup);
        return;
    case FUSE_BATCH_FORGET: on_forgets(r); return;
    case FUSE_INTERRUPT:
        memcpy(&interrupt, r->bytes, sizeof interrupt);
        interrupt_lock(r->share, interrupt.unique);
        return;
    default: break;
    }
    if (!r->share->greeted && opcode != FUSE_INIT)
        error = EIO, answered = 0;
    else
        error = carry_out(r, &answered);
    if (error || !answered)
        answer(r->share, r->in->unique, error, NULL, 0);
}
