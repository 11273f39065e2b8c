/* The bytes from the host by way of a disk: for lines that are slow to read.
 *
 * User-mode-linux reads its serial line one byte per system call, but a disk as fast as memory. So
 * the monitor writes what it has to say round and round into a small file, which is the guest's
 * last disk, and sends down the line only how many bytes there are more (u32, a "bell"). The frame
 * TAKEN tells that they have been read, and their place is free again.
 */
#define _GNU_SOURCE
#include "guest.h"

#include <linux/fs.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#define SECTOR 512u

static int disk = -1;
static size_t ring_size, at;
static char *sectors, bell[256];
static size_t bell_bytes;

void open_ring(const char *device)
{
    uint64_t size = 0;
    disk = open(device, O_RDONLY | O_DIRECT | O_CLOEXEC);
    if (disk < 0 || ioctl(disk, BLKGETSIZE64, &size) || size < SECTOR) {
        say("bulkhead-guest: %s: %s", device, strerror(errno));
        close_fd(&disk);
        return;
    }
    ring_size = size;
    sectors = mmap(NULL, ring_size + 2 * SECTOR, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (sectors == MAP_FAILED)
        abort();
}

int ring_is_open(void) { return disk >= 0; }

/* `size` bytes from `at` on; they do not go round. */
static int copy_out(struct buffer *b, size_t size)
{
    size_t from = at & ~(size_t)(SECTOR - 1), to = (at + size + SECTOR - 1) & ~(size_t)(SECTOR - 1);
    ssize_t n = pread(disk, sectors, to - from, (off_t)from);
    if (n != (ssize_t)(to - from)) {
        errno = n < 0 ? errno : EIO;
        return -1;
    }
    buffer_add(b, sectors + (at - from), size);
    at = (at + size) % ring_size;
    return 0;
}

ssize_t ring_read(struct buffer *b, int line, uint32_t *bells)
{
    ssize_t n = read(line, bell + bell_bytes, sizeof bell - bell_bytes);
    if (n <= 0)
        return n;
    bell_bytes += (size_t)n;
    size_t total = 0, rung = bell_bytes / sizeof(uint32_t);
    for (size_t i = 0; i < rung; i++) {
        uint32_t more;
        memcpy(&more, bell + i * sizeof more, sizeof more);
        total += more;
    }
    memmove(bell, bell + rung * sizeof(uint32_t), bell_bytes % sizeof(uint32_t));
    bell_bytes %= sizeof(uint32_t);
    *bells = (uint32_t)rung;
    if (!rung || total > ring_size) {
        errno = rung ? EPROTO : EAGAIN;
        return -1;
    }
    size_t first = total < ring_size - at ? total : ring_size - at;
    if (copy_out(b, first) || (total > first && copy_out(b, total - first)))
        return -1;
    return (ssize_t)total;
}
