/* What monitor.c, monitor_peers.c and monitor_exec.c share. */
#ifndef BULKHEAD_MONITOR_H
#define BULKHEAD_MONITOR_H

#include "frames.h"

#include <fcntl.h>
#include <stdio.h>
#include <time.h>

#define FAILED_CODE 125
#define QUEUE_FULL (512u << 10)
#define FILES_FULL (4u << 20)
#define CLIENTS_MAX 64u
#define REQUESTS_MAX 512u
#define CHUNK 32768u
#define KILL_SIGNAL 63 /* the real-time signal by which the workload is killed, not the guest */
#define VMM_CHANNEL 9
#define RING (512u << 10) /* bytes of the ring */
#define BELLS_MAX 64u
#define SERVERS_MAX 33u

enum stage { BOOTING, GREETING, RUNNING, ENDING };

struct output { int fd, ended, at; struct buffer bytes; uint32_t unacked, flushed; };

/* A client that has sent MEMBER stays known until its farewell is answered. `lock` is open until then. */
struct client {
    int fd, dead, at, fds[3], nfds, member, left, lock;
    uint32_t farewell_id;
    struct buffer run, farewell;
    struct server *server;
    struct client *next;
};

/* A file server: the script's own (no owner), or a member's, whose mounts have ids of its own. */
struct server { int fd, at; struct client *owner; struct buffer to, from; struct server *next; };

struct process {
    uint32_t id, owner_id, mode, in_credit, status, oom_kills;
    int started, exited, told, in, at_in;
    struct output out[2];
    struct client *owner;
    struct process *next;
};

/* An answer that is expected: to a set-up program, a mount, or a client's READ. */
struct request { uint32_t id, owner_id; int is_mount, done, dropped /* answers that are awaited since */; struct client *owner; struct server *server; struct request *next; };

/* --- state, in monitor.c --- */

struct options { const char *frames, *socket, *report, *files, *files_fd, *ring, *detail, *channel; int clone, resume, member; long boot_seconds, window; char **vmm; };

extern struct options options;
extern size_t under_way; /* bytes the guest has not told to have read */
extern struct buffer script, to_guest;
extern struct server *servers;
extern struct client *clients;
extern struct process *processes, *main_process;
extern struct request *requests;
extern enum stage stage;
extern int guest, listener, report;
extern unsigned client_count, process_count, request_count, server_count;
extern uint64_t deadline; /* of the stage, or for the streams' ends; 0: none */

/* End with what is known; the VMM is killed. */
_Noreturn void leave(const char *reason, const char *text);

/* Keep the last of what the guest's console says. */
void remember(const char *bytes, size_t size);

void report_refusal(int fd, uint32_t id, int error, const char *text);

/* --- monitor_peers.c: what the guest, the file server and clients send --- */

struct process *add_process(uint32_t id, uint32_t mode, const int *fds);
struct request *add_request(uint32_t id, struct client *owner, uint32_t owner_id, int is_mount);
struct server *add_server(int fd, struct client *owner);
void free_process(struct process *p);
void flush_output(struct process *p, int i);
void read_input(struct process *p);
void send_resize(void);
void greet(void);
void read_guest(void);
void write_guest(void);
int may_write_guest(void);
void open_ring(const char *path);
void read_files(struct server *s);
void flush_files(struct server *s);
int files_full(void);
void say_farewell(struct client *c);
void read_client(struct client *c);
void accept_client(void);
void forget_client(struct client *c);

static inline int flushed(const struct process *p) { return !buffer_size(&p->out[0].bytes) && !buffer_size(&p->out[1].bytes); }

static inline int streams_ended(const struct process *p) { return p->out[0].ended && (p->mode == MODE_TERMINAL || p->out[1].ended); }

/* --- shared, in monitor_exec.c --- */

/* Say what went wrong, wherever it is read, and end with FAILED_CODE. */
__attribute__((format(printf, 1, 2))) _Noreturn void fail(const char *format, ...);

/* Connect to a socket that may yet have to come into being; fail() if it does not in `seconds`. */
int connect_to(const char *path, int type, int seconds);

/* One frame as one packet; a peer that does not read loses it. */
void send_packet(int fd, enum frame_type type, uint32_t id, uint32_t arg, const void *payload, size_t size);

/* Block all signals but those of a crash; a signalfd of them. */
int catch_signals(void);

/* The terminal `fd` in raw mode, if it is one. */
void make_raw(int fd);

/* Everything in `path`, or in descriptor 10. */
void read_frames(const char *path, struct buffer *into);

int exec_main(const struct options *given);

void put_json(FILE *file, const char *text, size_t size);

uint64_t now_ms(clockid_t clock);

static inline void close_fd(int *fd)
{
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

static inline int no_block(int fd) { return fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK); }

#endif
