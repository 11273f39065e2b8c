/* The holder's messages; src/bulkhead/keeper/holder.py speaks the other side.
 *
 * One SOCK_SEQPACKET packet is one message: `struct message`, then what its type says. Integers are
 * in the byte order of the machine. Strings are length-prefixed in the type's own structure and
 * follow it without padding, in the order of their lengths.
 */
#ifndef BULKHEAD_HOLDER_H
#define BULKHEAD_HOLDER_H

#include <stdint.h>

#define MAX_PACKET (128 << 10)
#define MAX_ID 256u
#define MAX_META (16u << 10)
#define MAX_PATH_BYTES 4096u
#define MAX_MAP 8192u
#define MAX_KEPT 16u

enum type {
    /* requests */
    M_HELLO = 1,  /* status: 1 a keeper (is given kept descriptors); the reply's text is our pid */
    M_LAUNCH,     /* struct launch; id record meta uid_map gid_map program; descriptors */
    M_SIGNAL,     /* status: signal; id */
    M_FORGET,     /* id */
    M_ENTRIES,    /* answered by M_ENTRY..., then M_REPLY */
    M_SUPERVISE,  /* struct supervise; name, argv strings, env strings (each with NUL); descriptors */
    M_DISMISS,    /* name */
    M_SHUTDOWN,   /* status: 1 also with entries that run */
    M_CLOSE_KEPT, /* status: index, -1 all; id */
    /* answers */
    M_REPLY = 64, /* status: 0, an errno (text follows), or -1 (struct failure, text) */
    M_EXIT,       /* struct exited; id */
    M_ENTRY,      /* struct entry_info; id meta */
    M_ADOPT,      /* struct adopt; id meta; descriptors */
};

struct message { uint32_t type, seq; int32_t status; uint32_t zero; };

struct launch {
    uint64_t clone_flags;
    uint32_t fds, keep, cgroup;            /* descriptors: program's, kept, 0 or 1 */
    uint32_t id, record, meta, uid_map, gid_map; /* lengths */
    uint32_t program;                      /* length; 0: in a file passed as last descriptor */
    uint32_t zero;
};

struct supervise { uint32_t name, argc, envc, zero; };
struct launched { int64_t pid; uint64_t started_ns; };
enum failure_kind { F_STEP = 1, F_EXEC, F_DIED };
struct failure { uint32_t kind, step; int32_t error; uint32_t no_interpreter; };
struct exited { int64_t pid; int32_t wait_status; uint32_t zero; uint64_t finished_ns; };
struct entry_info { int64_t pid; int32_t wait_status; uint32_t running; uint64_t started_ns, finished_ns; uint32_t id, meta; };
struct adopt { int64_t pid; uint32_t running, id, meta, fds; uint8_t index[MAX_KEPT]; };

#endif
