/* Loads a disk for some time, and prints how much it did; see tests/xen/test_disk_speed.py.
 *
 *     load DEVICE read|write random|sequential BYTES DEPTH MILLISECONDS SEED
 *
 * prints the number of requests, and the microseconds that they took. DEPTH requests of BYTES are
 * under way at any time, past the page cache. Of `random`, SEED chooses the places.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <linux/fs.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { MOST = 64, PAGE = 4096 };

static uint32_t state;
static uint64_t blocks, next;
static int is_random;

static int fail(const char *what) {
    printf("failed: %s: %s\n", what, strerror(errno));
    return 1;
}

static uint64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000ull + time.tv_nsec / 1000;
}

static uint64_t place(void) {
    if (!is_random)
        return next++ % blocks;
    state ^= state << 13;
    state ^= state >> 17;
    state ^= state << 5;
    return state % blocks;
}

int main(int count, char **arguments) {
    struct iocb requests[MOST];
    struct io_event events[MOST];
    aio_context_t context = 0;
    uint64_t size = 0, done = 0, from;
    if (count != 8)
        return fail("seven arguments are needed");
    int is_write = !strcmp(arguments[2], "write");
    is_random = !strcmp(arguments[3], "random");
    size_t bytes = strtoul(arguments[4], NULL, 0);
    long depth = strtol(arguments[5], NULL, 0);
    uint64_t limit = strtoul(arguments[6], NULL, 0) * 1000;
    state = strtoul(arguments[7], NULL, 0);
    int disk = open(arguments[1], O_RDWR | O_DIRECT);
    if (disk < 0 || ioctl(disk, BLKGETSIZE64, &size))
        return fail(arguments[1]);
    blocks = bytes ? size / bytes : 0;
    errno = EINVAL;
    if (!blocks || depth < 1 || depth > MOST || !state)
        return fail("an argument");
    if (syscall(SYS_io_setup, MOST, &context))
        return fail("io_setup");
    memset(requests, 0, sizeof requests);
    struct iocb *ready[MOST];
    for (long i = 0; i < depth; i++) {
        void *buffer = aligned_alloc(PAGE, bytes);
        if (!buffer)
            return fail("memory");
        memset(buffer, (int)i + 1, bytes);
        requests[i].aio_fildes = disk;
        requests[i].aio_lio_opcode = is_write ? IOCB_CMD_PWRITE : IOCB_CMD_PREAD;
        requests[i].aio_buf = (uintptr_t)buffer;
        requests[i].aio_nbytes = bytes;
        ready[i] = &requests[i];
    }
    long idle = depth, busy = 0;
    for (from = now(); busy || idle;) {
        if (now() - from >= limit)
            idle = 0; /* no new ones; those under way are waited for */
        for (long i = 0; i < idle; i++)
            ready[i]->aio_offset = place() * bytes;
        if (idle && syscall(SYS_io_submit, context, idle, ready) != idle)
            return fail("io_submit");
        busy += idle;
        idle = 0;
        if (!busy)
            break;
        long ended = syscall(SYS_io_getevents, context, 1L, busy, events, NULL);
        if (ended < 1)
            return fail("io_getevents");
        for (long i = 0; i < ended; i++) {
            errno = EIO;
            if (events[i].res != (int64_t)bytes)
                return fail("a request");
            ready[idle++] = (struct iocb *)(uintptr_t)events[i].obj;
        }
        busy -= ended;
        done += ended;
    }
    printf("%llu %llu\n", (unsigned long long)done, (unsigned long long)(now() - from));
    return 0;
}
