/* The files that the guest knows, and descriptors for some of them.
 *
 * A node is found again from its parent by one name, without following links, and only if it is
 * still the same file (device, inode, time of birth); else it is stale. Memory is bounded by
 * `nodes_max`, descriptors by OPEN_NODES_MAX: the least recently used are closed.
 */
#define _GNU_SOURCE
#include "files.h"

#include <fcntl.h>

#define BUCKETS (1u << 16)

static struct node *buckets[BUCKETS];
static struct node **table; /* by id; those of free ids are NULL */
static uint64_t *free_ids, free_count, table_room, last_id = FUSE_ROOT_ID;
static uint32_t node_count, open_count, pinned_count;
static struct node newest = {.newer = NULL}, *const ring = &newest; /* of open nodes */

int stat_fd(int fd, struct statx *stx)
{
    return statx(fd, "", AT_EMPTY_PATH | AT_SYMLINK_NOFOLLOW, STATX_BASIC_STATS | STATX_BTIME, stx) ? errno : 0;
}

static uint64_t device(const struct statx *stx) { return (uint64_t)stx->stx_dev_major << 32 | stx->stx_dev_minor; }

static int is_same(const struct node *n, const struct statx *stx)
{
    return n->ino == stx->stx_ino && n->dev == device(stx) && n->type == (stx->stx_mode & S_IFMT)
           && (!(stx->stx_mask & STATX_BTIME) || (n->born_s == stx->stx_btime.tv_sec && n->born_ns == stx->stx_btime.tv_nsec));
}

static struct node **bucket(const struct share *share, uint64_t dev, uint64_t ino)
{
    uint64_t h = (ino ^ dev << 20 ^ (uint64_t)share->id << 50) * 0x9E3779B97F4A7C15u;
    return &buckets[h >> 48];
}

struct node *find_node(const struct share *share, uint64_t id)
{
    if (id == FUSE_ROOT_ID)
        return share->root;
    struct node *n = id < table_room ? table[id] : NULL;
    return n && n->share == share ? n : NULL;
}

struct node *find_identity(const struct share *share, const struct statx *stx)
{
    for (struct node *n = *bucket(share, device(stx), stx->stx_ino); n; n = n->next)
        if (n->share == share && is_same(n, stx))
            return n;
    return NULL;
}

static void unhash(struct node *n)
{
    struct node **at = bucket(n->share, n->dev, n->ino);
    if (!n->hashed)
        return;
    while (*at != n)
        at = &(*at)->next;
    *at = n->next;
    n->hashed = 0;
}

/* --- descriptors ------------------------------------------------------------------------------- */

static void unlink_open(struct node *n)
{
    if (!n->newer)
        return;
    n->newer->older = n->older;
    n->older->newer = n->newer;
    n->newer = n->older = NULL;
}

static void mark_used(struct node *n)
{
    if (!ring->newer)
        ring->newer = ring->older = ring;
    unlink_open(n);
    n->newer = ring;
    n->older = ring->older;
    ring->older->newer = n;
    ring->older = n;
}

static void close_node(struct node *n)
{
    if (n->fd < 0)
        return;
    unlink_open(n);
    close(n->fd);
    n->fd = -1;
    open_count--;
}

static int keep_fd(struct node *n, int fd)
{
    n->fd = fd;
    open_count++;
    mark_used(n);
    while (open_count > OPEN_NODES_MAX && ring->newer != n)
        close_node(ring->newer);
    return fd;
}

static int open_node(struct node *n)
{
    struct statx stx;
    int fd = openat(n->parent->fd, n->name, O_PATH | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0)
        return errno == ENOENT || errno == ENOTDIR ? -ESTALE : -errno;
    if (stat_fd(fd, &stx) || !is_same(n, &stx)) {
        close(fd);
        return -ESTALE;
    }
    return keep_fd(n, fd);
}

int node_fd(struct node *n)
{
    for (unsigned steps = 0; n->fd < 0; steps++) {
        struct node *at = n;
        for (unsigned depth = 0; at->parent->fd < 0; depth++) {
            if (depth > DEPTH_MAX)
                return -ELOOP;
            at = at->parent;
        }
        int fd = open_node(at);
        if (fd < 0)
            return fd;
        if (steps > DEPTH_MAX)
            return -ELOOP;
    }
    if (n->newer)
        mark_used(n);
    return n->fd;
}

void pin_node(struct node *n)
{
    if (n->pinned || !n->parent || pinned_count >= PINNED_MAX || node_fd(n) < 0)
        return;
    n->pinned = 1;
    pinned_count++;
    unlink_open(n); /* it is not closed for others */
}

/* --- life -------------------------------------------------------------------------------------- */

static void give_name(struct node *n, struct node *parent, const char *name)
{
    char *copy = strdup(name);
    if (!copy)
        abort();
    free(n->name);
    n->name = copy;
    parent->children++;
    n->parent = parent;
}

static void free_if_unused(struct node *n)
{
    while (n->parent && !n->lookups && !n->children) {
        struct node *parent = n->parent;
        end_node_locks(n->share, n->id);
        close_node(n);
        pinned_count -= n->pinned;
        unhash(n);
        table[n->id] = NULL;
        free_ids[free_count++] = n->id;
        free(n->name);
        free(n);
        node_count--;
        parent->children--;
        n = parent;
    }
}

void node_moved(struct node *n, struct node *parent, const char *name)
{
    struct node *old = n->parent;
    if (!old || (old == parent && !strcmp(n->name, name)))
        return;
    unsigned depth = 0;
    for (struct node *at = parent; at; at = at->parent)
        if (at == n || depth++ > DEPTH_MAX)
            return; /* what is known is older than what is; it is stale then */
    give_name(n, parent, name);
    old->children--;
    free_if_unused(old);
}

static uint64_t new_id(void)
{
    if (free_count)
        return free_ids[--free_count];
    if (++last_id >= table_room) {
        uint64_t room = table_room ? table_room * 2 : 1024;
        table = realloc(table, room * sizeof *table);
        free_ids = realloc(free_ids, room * sizeof *free_ids);
        if (!table || !free_ids)
            abort();
        memset(table + table_room, 0, (room - table_room) * sizeof *table);
        table_room = room;
    }
    return last_id;
}

static struct node *make_node(struct share *share, const struct statx *stx)
{
    struct node *n = calloc(1, sizeof *n);
    if (!n)
        abort();
    *n = (struct node){.share = share, .fd = -1, .dev = device(stx), .ino = stx->stx_ino,
                       .type = (uint16_t)(stx->stx_mode & S_IFMT),
                       .born_s = stx->stx_btime.tv_sec, .born_ns = stx->stx_btime.tv_nsec};
    return n;
}

int look_up(struct node *parent, const char *name, struct node **found, struct statx *stx)
{
    int fd = node_fd(parent);
    if (fd < 0)
        return -fd;
    if (statx(fd, name, AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT, STATX_BASIC_STATS | STATX_BTIME, stx))
        return errno;
    struct node *n = find_identity(parent->share, stx);
    if (n == parent->share->root)
        return ELOOP; /* a mount of the share in itself */
    if (n)
        node_moved(n, parent, name);
    else {
        if (node_count >= nodes_max)
            return ENFILE;
        n = make_node(parent->share, stx);
        n->id = new_id();
        table[n->id] = n;
        node_count++;
        give_name(n, parent, name);
        struct node **at = bucket(n->share, n->dev, n->ino);
        n->next = *at;
        *at = n;
        n->hashed = 1;
    }
    n->lookups++;
    *found = n;
    return 0;
}

void hold_node(struct node *n) { n->children++; }

void release_node(struct node *n)
{
    n->children--;
    free_if_unused(n);
}

void forget_lookups(struct node *n, uint64_t count)
{
    n->lookups -= count < n->lookups ? count : n->lookups;
    free_if_unused(n);
}

int add_root(struct share *share, const char *path)
{
    struct statx stx;
    int fd = open(path, O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0 || stat_fd(fd, &stx))
        return errno;
    share->root = make_node(share, &stx);
    share->root->id = FUSE_ROOT_ID;
    share->root->fd = fd; /* for ever, and not among those that may be closed */
    share->dev = share->root->dev;
    struct node **at = bucket(share, share->root->dev, share->root->ino);
    share->root->next = *at;
    *at = share->root;
    share->root->hashed = 1;
    return 0;
}
