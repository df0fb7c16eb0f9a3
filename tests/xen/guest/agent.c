/* The guest's half of tests/xen/agent.py, which says what each operation means.
 *
 * First process of a Linux guest. It does what a device at the ports from CONTROL on tells it to:
 *     CONTROL      read: an operation, or 0; all ones while no device is there
 *     CONTROL + 4  read: its next argument; write: its next result
 *     CONTROL + 8  write: it is done; 0 or an errno
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/io.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/sysinfo.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { CONTROL = 0x600, PAGE = 4096, SECTOR = 512, PAGES = 5 * 512, SIZE = PAGES * PAGE };
enum { PING = 1, CPU, FRAMES, PEEK, POKE, FILL, CHECKSUM, IN, OUT, INS, OUTS, LOAD, STORE,
       MOVE_IN, MOVE_OUT, REPEAT_STORE, DISK, LOOP, BOTH, GIVE, TAKE, RENEW, TOTAL };

static uint8_t *buffer;
static uint64_t frame[PAGES];

static uint32_t argument(void) { return inl(CONTROL + 4); }
static void result(uint32_t word) { outl(word, CONTROL + 4); }

static uint64_t long_argument(void) {
    uint64_t low = argument();
    return low | (uint64_t)argument() << 32;
}

static void long_result(uint64_t word) {
    result(word);
    result(word >> 32);
}

static void pause_ms(long ms) {
    struct timespec time = {0, ms * 1000000};
    nanosleep(&time, NULL);
}

/* A place in the buffer: what an absent device answers must do no harm. */
static uint8_t *place(uint64_t offset, uint64_t length) {
    return offset <= SIZE && length <= SIZE - offset ? buffer + offset : NULL;
}

/* Huge pages: the kernel never moves them, and they lie in one piece each. */
static int make_buffer(void) {
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB | MAP_POPULATE | MAP_LOCKED;
    buffer = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, flags, -1, 0);
    int map = open("/proc/self/pagemap", O_RDONLY);
    if (buffer == MAP_FAILED || map < 0)
        return errno;
    memset(buffer, 0x11, SIZE);
    if (pread(map, frame, sizeof frame, (uintptr_t)buffer / PAGE * 8) != sizeof frame)
        return EIO;
    for (int i = 0; i < PAGES; i++)
        frame[i] &= (1ull << 55) - 1;
    return close(map);
}

static uint32_t random_word(uint32_t *state) {
    *state ^= *state << 13;
    *state ^= *state >> 17;
    return *state ^= *state << 5;
}

static void fill(uint8_t *at, size_t length, uint32_t seed) {
    for (size_t i = 0; i + 4 <= length; i += 4) {
        uint32_t word = random_word(&seed);
        memcpy(at + i, &word, 4);
    }
}

/* As zlib's crc32. */
static uint32_t checksum(const uint8_t *at, size_t length) {
    static uint32_t table[256];
    for (uint32_t i = 0; !table[255] && i < 256; i++) {
        uint32_t value = i;
        for (int bit = 0; bit < 8; bit++)
            value = value >> 1 ^ (value & 1 ? 0xedb88320 : 0);
        table[i] = value;
    }
    uint32_t sum = ~0u;
    while (length--)
        sum = sum >> 8 ^ table[(sum ^ *at++) & 255];
    return ~sum;
}

static int choose_cpu(uint32_t cpu) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu & 63, &set);
    return sched_setaffinity(0, sizeof set, &set) ? errno : 0;
}

static int port_in(uint16_t port, uint32_t size) {
    switch (size) {
    case 1: result(inb(port)); return 0;
    case 2: result(inw(port)); return 0;
    case 4: result(inl(port)); return 0;
    }
    return EINVAL;
}

static int port_out(uint16_t port, uint32_t size, uint32_t value) {
    switch (size) {
    case 1: outb(value, port); return 0;
    case 2: outw(value, port); return 0;
    case 4: outl(value, port); return 0;
    }
    return EINVAL;
}

#define REPEATED(instruction, ...) \
    do { \
        if (backward) \
            asm volatile("std; rep " instruction "; cld" __VA_ARGS__ : "memory", "cc"); \
        else \
            asm volatile("rep " instruction __VA_ARGS__ : "memory", "cc"); \
        return 0; \
    } while (0)

static int port_string(int in, uint16_t port, uint32_t size, uint64_t count, int backward,
                       uint8_t *at) {
    if (backward)
        at += (count - 1) * size;
    switch (size * 2 + in) {
    case 3: REPEATED("insb", : "+D"(at), "+c"(count) : "d"(port));
    case 5: REPEATED("insw", : "+D"(at), "+c"(count) : "d"(port));
    case 9: REPEATED("insl", : "+D"(at), "+c"(count) : "d"(port));
    case 2: REPEATED("outsb", : "+S"(at), "+c"(count) : "d"(port));
    case 4: REPEATED("outsw", : "+S"(at), "+c"(count) : "d"(port));
    case 8: REPEATED("outsl", : "+S"(at), "+c"(count) : "d"(port));
    }
    return EINVAL;
}

static int move(uint8_t *to, const uint8_t *from, uint32_t size, uint64_t count, int backward) {
    if (backward) {
        to += (count - 1) * size;
        from += (count - 1) * size;
    }
    switch (size) {
    case 1: REPEATED("movsb", : "+D"(to), "+S"(from), "+c"(count) :);
    case 2: REPEATED("movsw", : "+D"(to), "+S"(from), "+c"(count) :);
    case 4: REPEATED("movsl", : "+D"(to), "+S"(from), "+c"(count) :);
    case 8: REPEATED("movsq", : "+D"(to), "+S"(from), "+c"(count) :);
    }
    return EINVAL;
}

static int store_repeatedly(uint8_t *to, uint32_t size, uint64_t count, int backward,
                            uint64_t value) {
    if (backward)
        to += (count - 1) * size;
    switch (size) {
    case 1: REPEATED("stosb", : "+D"(to), "+c"(count) : "a"(value));
    case 2: REPEATED("stosw", : "+D"(to), "+c"(count) : "a"(value));
    case 4: REPEATED("stosl", : "+D"(to), "+c"(count) : "a"(value));
    case 8: REPEATED("stosq", : "+D"(to), "+c"(count) : "a"(value));
    }
    return EINVAL;
}

static int load(volatile uint8_t *at, uint32_t size) {
    switch (size) {
    case 1: long_result(*at); return 0;
    case 2: long_result(*(volatile uint16_t *)at); return 0;
    case 4: long_result(*(volatile uint32_t *)at); return 0;
    case 8: long_result(*(volatile uint64_t *)at); return 0;
    }
    return EINVAL;
}

static int store(volatile uint8_t *at, uint32_t size, uint64_t value) {
    switch (size) {
    case 1: *at = value; return 0;
    case 2: *(volatile uint16_t *)at = value; return 0;
    case 4: *(volatile uint32_t *)at = value; return 0;
    case 8: *(volatile uint64_t *)at = value; return 0;
    }
    return EINVAL;
}

/* What works on device memory begins with its address and the size of an item. */
static int device_memory(uint32_t operation) {
    uint64_t address = long_argument();
    uint32_t size = argument();
    uint64_t count = 1, value = 0;
    uint32_t backward = 0;
    uint8_t *at = NULL;
    if (operation == STORE) {
        value = long_argument();
    } else if (operation != LOAD) {
        count = argument();
        backward = argument();
        if (operation == REPEAT_STORE)
            value = long_argument();
        else if (!(at = place(argument(), count * size)))
            return ERANGE;
    }
    if (size > 8 || !count || count > PAGE)
        return EINVAL;
    int memory = open("/dev/mem", O_RDWR | O_SYNC);
    if (memory < 0)
        return errno;
    size_t length = address % PAGE + count * size;
    off_t start = address & -PAGE;
    uint8_t *window = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED, memory, start);
    int error = window == MAP_FAILED ? errno : 0;
    close(memory);
    if (error)
        return error;
    uint8_t *device = window + address % PAGE;
    switch (operation) {
    case LOAD: error = load(device, size); break;
    case STORE: error = store(device, size, value); break;
    case MOVE_IN: error = move(at, device, size, count, backward); break;
    case MOVE_OUT: error = move(device, at, size, count, backward); break;
    case REPEAT_STORE: error = store_repeatedly(device, size, count, backward, value); break;
    }
    munmap(window, length);
    return error;
}

/* The registers of examples/block_device.py. */
static int transfer(uint16_t port, uint32_t command, uint32_t sector, size_t offset,
                    uint32_t count) {
    uint64_t address = frame[offset / PAGE] * PAGE + offset % PAGE;
    uint32_t status;
    outl(sector, port);
    outl(address, port + 4);
    outl(address >> 32, port + 8);
    outl(count, port + 12);
    outl(command, port + 16);
    while ((status = inl(port + 20)) == 1)
        ;
    return status ? EIO : 0;
}

/* One way through the buffer and the disk, at sizes that `seed` draws. Returns the number of
 * requests, or a negative errno. */
static int pass(uint16_t port, uint32_t command, size_t length, uint32_t most, uint32_t seed) {
    int requests = 0;
    for (size_t done = 0; done < length; requests++) {
        uint32_t count = 1 + random_word(&seed) % most;
        if (count > (length - done) / SECTOR)
            count = (length - done) / SECTOR;
        size_t end = done / PAGE;
        while ((end + 1) * PAGE < done + count * SECTOR && frame[end + 1] == frame[end] + 1)
            end++;
        if (count > ((end + 1) * PAGE - done) / SECTOR)
            count = ((end + 1) * PAGE - done) / SECTOR;
        int error = transfer(port, command, done / SECTOR, done, count);
        if (error)
            return -error;
        done += count * SECTOR;
    }
    return requests;
}

static int disk(void) {
    uint16_t port = argument();
    uint32_t length = argument(), most = argument(), seed = argument();
    if (!place(0, length) || length % SECTOR || !most || !seed)
        return EINVAL;
    if (inl(port + 24) < length / SECTOR)
        return ENOSPC;
    fill(buffer, length, seed);
    result(checksum(buffer, length));
    int written = pass(port, 2, length, most, seed);
    if (written < 0)
        return -written;
    memset(buffer, 0, length);
    int read = pass(port, 1, length, most, seed + 1);
    if (read < 0)
        return -read;
    result(checksum(buffer, length));
    result(written);
    result(read);
    return 0;
}

static int loop(void) {
    uint16_t port = argument();
    uint32_t count = argument();
    struct timespec from, to;
    clock_gettime(CLOCK_MONOTONIC, &from);
    while (count--)
        inl(port);
    clock_gettime(CLOCK_MONOTONIC, &to);
    result((to.tv_sec - from.tv_sec) * 1000000 + (to.tv_nsec - from.tv_nsec) / 1000);
    return 0;
}

/* How many reads of `port` do not give 0, 1, 2, ... */
static uint32_t miscounted(uint16_t port, uint32_t count) {
    uint32_t wrong = 0;
    for (uint32_t i = 0; i < count; i++)
        wrong += inl(port) != i;
    return wrong;
}

static int both(void) {
    uint16_t port = argument();
    uint32_t count = argument();
    int status;
    pid_t child = fork();
    if (!child) {
        choose_cpu(1);
        _exit(miscounted(port + 4, count) != 0);
    }
    choose_cpu(0);
    uint32_t wrong = miscounted(port, count);
    if (waitpid(child, &status, 0) != child)
        return errno;
    result(wrong);
    result(status);
    return 0;
}

/* XENMEM_decrease_reservation (1) or XENMEM_populate_physmap (6) for one frame. */
static int reserve(unsigned command, uint64_t gfn) {
    struct {
        uint64_t *extents;
        uint64_t count;
        uint32_t order, flags;
        uint16_t domain;
    } reservation = {&gfn, 1, 0, 0, 0x7ff0};
    struct {
        uint64_t number, arguments[5];
    } hypercall = {12, {command, (uintptr_t)&reservation}};
    int privcmd = open("/dev/xen/privcmd", O_RDWR);
    if (privcmd < 0)
        return errno;
    int done = ioctl(privcmd, _IOC(_IOC_NONE, 'P', 0, sizeof hypercall), &hypercall);
    int error = done == 1 ? 0 : done < 0 ? errno : EAGAIN;
    close(privcmd);
    return error;
}

static int reservation(uint32_t operation) {
    uint32_t page = argument();
    if (page >= PAGES)
        return ERANGE;
    int error = operation == TAKE ? 0 : reserve(1, frame[page]);
    return error || operation == GIVE ? error : reserve(6, frame[page]);
}

static int total(void) {
    struct sysinfo info;
    if (sysinfo(&info))
        return errno;
    result(info.totalram * info.mem_unit / 1024);
    return 0;
}

/* What works on the buffer begins with a place in it. */
static int in_buffer(uint32_t operation) {
    uint32_t offset = argument(), length = argument(), word;
    uint8_t *at = place(offset, length);
    if (!at)
        return ERANGE;
    switch (operation) {
    case FILL:
        fill(at, length, argument());
        return 0;
    case CHECKSUM:
        result(checksum(at, length));
        return 0;
    }
    for (uint32_t i = 0; i + 4 <= length; i += 4) {
        if (operation == PEEK) {
            memcpy(&word, at + i, 4);
            result(word);
        } else {
            word = argument();
            memcpy(at + i, &word, 4);
        }
    }
    return 0;
}

static int perform(uint32_t operation) {
    uint32_t port, size, count, backward;
    uint8_t *at;
    switch (operation) {
    case PING:
        result(~argument());
        result(sched_getcpu());
        return 0;
    case CPU:
        return choose_cpu(argument());
    case FRAMES:
        for (int i = 0; i < PAGES; i++)
            if (!i || frame[i] != frame[i - 1] + 1) {
                result(i);
                result(frame[i]);
            }
        result(PAGES);
        return 0;
    case PEEK: case POKE: case FILL: case CHECKSUM:
        return in_buffer(operation);
    case IN:
        port = argument();
        return port_in(port, argument());
    case OUT:
        port = argument();
        size = argument();
        return port_out(port, size, argument());
    case INS: case OUTS:
        port = argument();
        size = argument();
        count = argument();
        backward = argument();
        at = size <= 4 && count <= SIZE ? place(argument(), size * count) : NULL;
        return at ? port_string(operation == INS, port, size, count, backward, at) : ERANGE;
    case LOAD: case STORE: case MOVE_IN: case MOVE_OUT: case REPEAT_STORE:
        return device_memory(operation);
    case DISK:
        return disk();
    case LOOP:
        return loop();
    case BOTH:
        return both();
    case GIVE: case TAKE: case RENEW:
        return reservation(operation);
    case TOTAL:
        return total();
    }
    return ENOSYS;
}

static void switch_cpu_1(const char *on) {
    int file = open("/sys/devices/system/cpu/cpu1/online", O_WRONLY);
    if (file < 0 || write(file, on, 1) != 1)
        _exit(1);
    close(file);
}

/* QEMU refuses port instructions outside of the kernel if the task register's type is "busy", which
 * it is in what Xen saves of a vCPU. A vCPU that starts loads the register again: start vCPU 1, go
 * on there, and repeat the instruction. */
static void restored(int number) {
    (void)number;
    choose_cpu(0);
    switch_cpu_1("0");
    switch_cpu_1("1");
    choose_cpu(1);
}

int main(void) {
    int error = iopl(3) ? errno : make_buffer();
    signal(SIGSEGV, restored);
    choose_cpu(0);
    printf("AGENT %s\n", error ? strerror(error) : "up");
    fflush(stdout);
    for (;;) {
        uint32_t operation = inl(CONTROL);
        if (operation == ~0u || error)
            pause_ms(50); /* or all that others do on the one processor takes three times as long */
        else if (operation == 0)
            pause_ms(2);
        else
            outl(perform(operation), CONTROL + 8);
    }
}
