/* Reads or writes a block device, and says how long that took: see tests/xen/test_disk_speed.py.
 *     load DEVICE read|write random|sequential BYTES DEPTH MILLISECONDS
 * prints "REQUESTS MICROSECONDS". Requests of BYTES each, past the page cache, DEPTH of them at a
 * time (the kernel's aio, which needs no thread).
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

enum { MOST = 64 };

static uint64_t blocks, next_block;
static int is_random;

static uint64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000ull + time.tv_nsec / 1000;
}

/* xorshift: the same places in each run. */
static uint64_t choose(void) {
    static uint64_t state = 88172645463325252ull;
    if (!is_random)
        return next_block++ % blocks;
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state % blocks;
}

static int fail(const char *what) {
    perror(what);
    return 1;
}

int main(int count, char **words) {
    if (count != 7)
        return fprintf(stderr, "usage: load DEVICE read|write random|sequential BYTES DEPTH MS\n");
    int writes = !strcmp(words[2], "write");
    is_random = !strcmp(words[3], "random");
    size_t bytes = strtoul(words[4], NULL, 0);
    unsigned depth = strtoul(words[5], NULL, 0);
    uint64_t limit = strtoull(words[6], NULL, 0) * 1000, size;
    int disk = open(words[1], O_RDWR | O_DIRECT);
    if (disk < 0 || ioctl(disk, BLKGETSIZE64, &size))
        return fail(words[1]);
    blocks = size / bytes;
    if (!blocks || !depth || depth > MOST)
        return fprintf(stderr, "load: no such load\n");

    aio_context_t context = 0;
    struct iocb requests[MOST], *pointers[MOST];
    struct io_event events[MOST];
    if (syscall(SYS_io_setup, depth, &context))
        return fail("io_setup");
    for (unsigned i = 0; i < depth; i++) {
        void *buffer;
        if (posix_memalign(&buffer, 4096, bytes))
            return fail("memory");
        memset(buffer, i + 1, bytes);
        memset(&requests[i], 0, sizeof requests[i]);
        requests[i].aio_lio_opcode = writes ? IOCB_CMD_PWRITE : IOCB_CMD_PREAD;
        requests[i].aio_fildes = disk;
        requests[i].aio_buf = (uintptr_t)buffer;
        requests[i].aio_nbytes = bytes;
        requests[i].aio_offset = choose() * bytes;
        pointers[i] = &requests[i];
    }

    uint64_t start = now(), done = 0;
    long under_way = 0, ready = depth;
    while (ready || under_way) {
        if (ready) {
            long begun = syscall(SYS_io_submit, context, ready, pointers);
            if (begun != ready)
                return fail("io_submit");
            under_way += begun;
        }
        long ended = syscall(SYS_io_getevents, context, 1, depth, events, NULL);
        if (ended < 1)
            return fail("io_getevents");
        under_way -= ended;
        done += ended;
        ready = 0;
        for (long i = 0; i < ended; i++) {
            if (events[i].res != (int64_t)bytes) {
                errno = -events[i].res;
                return fail("request");
            }
            struct iocb *request = (struct iocb *)(uintptr_t)events[i].obj;
            request->aio_offset = choose() * bytes;
            if (now() - start < limit)
                pointers[ready++] = request;
        }
    }
    printf("%llu %llu\n", (unsigned long long)done, (unsigned long long)(now() - start));
    return 0;
}
