/* Locks of files: flock(2) and fcntl(2) locks of the guest are locks on the host.
 *
 * flock: of the handle's open file. POSIX: an open file description for each owner and file, whose
 * locks (F_OFD_SETLK) conflict with everybody else's on the host. Nobody is waited for: who has to
 * wait is tried again later.
 */
#define _GNU_SOURCE
#include "files.h"

#include <fcntl.h>
#include <stdio.h>
#include <sys/file.h>

#define FIRST_RETRY_MS 5
#define LAST_RETRY_MS 100

struct owner { struct share *share; uint64_t node, owner; int fd; struct owner *next; };
struct waiter { struct share *share; uint64_t unique, node; struct fuse_lk_in in; int tries; struct waiter *next; };

static struct owner *owners;
static struct waiter *waiters;
static unsigned owner_count, waiter_count;

static struct owner *find_owner(const struct share *share, uint64_t node, uint64_t owner)
{
    struct owner *o = owners;
    while (o && (o->share != share || o->node != node || o->owner != owner))
        o = o->next;
    return o;
}

static int reopen(const struct handle *h)
{
    char name[16];
    snprintf(name, sizeof name, "%d", h->fd);
    int fd = openat(proc_fds, name, O_RDWR | O_CLOEXEC | O_NONBLOCK);
    return fd >= 0 ? fd : openat(proc_fds, name, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
}

static void free_owner(struct owner *o)
{
    struct owner **at = &owners;
    while (*at != o)
        at = &(*at)->next;
    *at = o->next;
    close(o->fd);
    free(o);
    owner_count--;
}

static int to_flock(const struct fuse_file_lock *lk, struct flock *f)
{
    uint64_t last = INT64_MAX;
    if ((lk->type != F_RDLCK && lk->type != F_WRLCK && lk->type != F_UNLCK) || lk->start > last || lk->end < lk->start)
        return EINVAL;
    *f = (struct flock){.l_type = (short)lk->type, .l_whence = SEEK_SET, .l_start = (off_t)lk->start,
                        .l_len = lk->end >= last ? 0 : (off_t)(lk->end - lk->start + 1)};
    return 0;
}

int get_lock(const struct request *r)
{
    struct fuse_lk_in in;
    struct fuse_lk_out out = {.lk = {.type = F_UNLCK}};
    struct flock f;
    memcpy(&in, r->bytes, sizeof in);
    struct handle *h = find_handle(r->share, in.fh);
    int error = !h || h->directory ? EBADF : to_flock(&in.lk, &f);
    if (error)
        return error;
    struct owner *o = find_owner(r->share, h->node->id, in.owner);
    int fd = o ? o->fd : reopen(h);
    if (fd < 0)
        return errno;
    error = fcntl(fd, F_OFD_GETLK, &f) ? errno : 0;
    if (!o)
        close(fd);
    if (!error && f.l_type != F_UNLCK)
        out.lk = (struct fuse_file_lock){.start = (uint64_t)f.l_start, .type = (uint32_t)f.l_type,
                                         .end = f.l_len ? (uint64_t)(f.l_start + f.l_len - 1) : INT64_MAX};
    if (!error)
        answer(r->share, r->in->unique, 0, &out, sizeof out);
    return error;
}

static int try_flock(const struct handle *h, uint32_t type)
{
    int wanted = type == F_RDLCK ? LOCK_SH : type == F_WRLCK ? LOCK_EX : LOCK_UN;
    return flock(h->fd, wanted | LOCK_NB) ? errno : 0;
}

/* 0, EAGAIN if somebody else has it, or another errno. */
static int try_lock(struct share *share, const struct fuse_lk_in *in)
{
    struct flock f;
    struct handle *h = find_handle(share, in->fh);
    int error = !h ? EBADF : to_flock(&in->lk, &f);
    if (error)
        return error;
    if (in->lk_flags & FUSE_LK_FLOCK)
        return try_flock(h, in->lk.type);
    struct owner *o = find_owner(share, h->node->id, in->owner);
    if (!o && (in->lk.type == F_UNLCK || h->directory))
        return h->directory ? EBADF : 0;
    if (!o) {
        int fd = owner_count < LOCK_OWNERS_MAX ? reopen(h) : -1;
        if (fd < 0 || !(o = malloc(sizeof *o))) {
            close(fd);
            return ENOLCK;
        }
        *o = (struct owner){share, h->node->id, in->owner, fd, owners};
        owners = o;
        owner_count++;
    }
    error = fcntl(o->fd, F_OFD_SETLK, &f) ? errno : 0;
    if (in->lk.type == F_UNLCK && !f.l_start && !f.l_len)
        free_owner(o);
    return error == EACCES ? EAGAIN : error;
}

int set_lock(const struct request *r, int wait)
{
    struct fuse_lk_in in;
    memcpy(&in, r->bytes, sizeof in);
    int error = try_lock(r->share, &in);
    if (error != EAGAIN || !wait)
        return error;
    struct waiter *w = waiter_count < WAITERS_MAX ? malloc(sizeof *w) : NULL;
    if (!w)
        return ENOLCK;
    *w = (struct waiter){r->share, r->in->unique, r->in->nodeid, in, 0, waiters};
    waiters = w;
    waiter_count++;
    return -1; /* answered later */
}

static void end_waiter(struct waiter *w, int error)
{
    struct waiter **at = &waiters;
    while (*at != w)
        at = &(*at)->next;
    *at = w->next;
    answer(w->share, w->unique, error, NULL, 0);
    free(w);
    waiter_count--;
}

void interrupt_lock(const struct share *share, uint64_t unique)
{
    for (struct waiter *w = waiters; w; w = w->next)
        if (w->share == share && w->unique == unique) {
            end_waiter(w, EINTR);
            return;
        }
}

int retry_locks(void)
{
    int next = -1;
    for (struct waiter *w = waiters, *after; w; w = after) {
        after = w->next;
        int error = try_lock(w->share, &w->in);
        if (error != EAGAIN) {
            end_waiter(w, error);
            continue;
        }
        int pause = FIRST_RETRY_MS << (w->tries < 5 ? w->tries++ : 5);
        pause = pause < LAST_RETRY_MS ? pause : LAST_RETRY_MS;
        next = next < 0 || pause < next ? pause : next;
    }
    return next;
}

void end_locks(const struct share *share, uint64_t node, uint64_t owner)
{
    struct owner *o = find_owner(share, node, owner);
    if (o)
        free_owner(o);
}

void end_node_locks(const struct share *share, uint64_t node)
{
    for (struct owner *o = owners, *next; o; o = next) {
        next = o->next;
        if (o->share == share && o->node == node)
            free_owner(o);
    }
}
