/* A child that runs a launch program, cloned without a holder: by bulkhead-spawn and bulkhead-runtime. */
#ifndef BULKHEAD_CHILD_H
#define BULKHEAD_CHILD_H

#include "launch.h"

/* What whoever made the file reads in it; `pid` is 0 until the child exists. */
struct spawned { struct progress progress; int32_t pid; };

struct birth {
    int program, progress, channel; /* files with the program and a struct spawned; the child's socket */
    int cgroup;                     /* a directory to be born in, or -1 */
    int parent;                     /* a pidfd of who will be its parent */
    int mapped;                     /* wait for a byte on the channel: its id maps are being written */
    int sibling;                    /* CLONE_PARENT: the child is our parent's */
    int secret;                     /* a descriptor that the child must not keep, or -1 */
    uint64_t flags;                 /* CLONE_NEW* */
    const int *fds;                 /* the program's own */
    unsigned count;
};

/* The child's pid. 0: refused, `*wrong` says why. Below 0: -errno. */
long child_clone(const struct birth *birth, const char **wrong);

#endif
