/* What files.c, files_nodes.c, files_locks.c and files_ops.c share: the file server of a guest. */
#ifndef BULKHEAD_FILES_H
#define BULKHEAD_FILES_H

#include "frames.h"

#include <linux/fuse.h>
#include <linux/stat.h>
#include <sys/stat.h>

#define IO_MAX (256u << 10)               /* of one read or write; FUSE max_write */
#define SHARES_MAX 64u
#define OPEN_NODES_MAX 2048u              /* O_PATH descriptors that are kept */
#define PINNED_MAX 1024u                  /* of them, of files without a name */
#define HANDLES_MAX 8192u
#define LOCK_OWNERS_MAX 4096u
#define WAITERS_MAX 256u
#define DEPTH_MAX 4096u

struct share;

/* A file the guest knows: reached from its parent by its name, never by a path. */
struct node {
    uint64_t id, lookups;
    struct share *share;
    struct node *parent, *next; /* next: of the same hash */
    struct node *newer, *older; /* of those with a descriptor */
    uint64_t dev, ino;
    int64_t born_s;
    uint32_t born_ns, children; /* children: and handles */
    int fd;
    uint16_t type;
    uint8_t pinned, hashed;
    char *name;
};

struct share {
    uint32_t id, valid_ms;
    int greeted, own; /* own: nobody else writes it */
    uint64_t dev;
    struct node *root;
    struct buffer request;
};

/* An open file or directory; free if it has no share. */
struct handle { int fd; uint32_t serial; int directory; struct share *share; struct node *node; };

/* One request, whose payload is `bytes`. */
struct request { struct share *share; const struct fuse_in_header *in; const char *bytes; size_t size; };

extern int proc_fds; /* /proc/self/fd */
extern uint32_t nodes_max;

/* --- files.c --- */

/* Answer: an errno, or bytes. */
void answer(struct share *share, uint64_t unique, int error, const void *bytes, size_t size);

/* --- files_nodes.c --- */

/* The node `id` of the share, NULL if the guest knows none. */
struct node *find_node(const struct share *share, uint64_t id);

/* The node of what `name` in `parent` is: `*found` with one lookup more and `stx` filled; or an errno. */
int look_up(struct node *parent, const char *name, struct node **found, struct statx *stx);

/* The node that has this identity in the share, if the guest knows it. */
struct node *find_identity(const struct share *share, const struct statx *stx);

/* An O_PATH descriptor of the node, valid until the next call: or minus an errno. */
int node_fd(struct node *n);

void node_moved(struct node *n, struct node *parent, const char *name);

/* Its name is about to be removed: what the guest has of it stays reachable. */
void pin_node(struct node *n);

void forget_lookups(struct node *n, uint64_t count);

/* It stays known, whatever the guest forgets. */
void hold_node(struct node *n);
void release_node(struct node *n);
int add_root(struct share *share, const char *path);
int stat_fd(int fd, struct statx *stx);

/* --- files_locks.c --- */

int get_lock(const struct request *r);
int set_lock(const struct request *r, int wait);

/* The owner's locks on the file end. */
void end_locks(const struct share *share, uint64_t node, uint64_t owner);
void end_node_locks(const struct share *share, uint64_t node);

/* A request was interrupted: who waits for a lock need not any more. */
void interrupt_lock(const struct share *share, uint64_t unique);

/* Try again for all that wait; milliseconds until the next time, -1 if nobody waits. */
int retry_locks(void);

/* --- files_ops.c --- */

/* Serve it and answer it. */
void serve_request(const struct request *r);
struct handle *find_handle(const struct share *share, uint64_t fh);

#endif
