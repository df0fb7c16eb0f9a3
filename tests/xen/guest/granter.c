/* Grants pages to Dom0, in a Linux guest with the module xen_gntalloc; see tests/xen/test_grants.py.
 *
 *     granter WRITABLE READ_ONLY   grants WRITABLE and READ_ONLY pages, and prints references
 *
 * The first page is the mailbox: word 0 is what to do (0: nothing), words 1 and 2 its arguments,
 * word 3 the result. The program writes the result, and then 0 into word 0.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>

enum { PAGE = 4096, MOST = 64 };
enum { NOTHING, WORD, TAKE_BACK };
enum { WRITABLE = 1 };

/* include/uapi/xen/gntalloc.h */
struct allocation {
    uint16_t domid, flags;
    uint32_t count;
    uint64_t index;
    uint32_t refs[MOST];
};
struct end {
    uint64_t index;
    uint32_t count;
};
static const unsigned long ALLOCATE = _IOC(_IOC_NONE, 'G', 5, 24), END = _IOC(_IOC_NONE, 'G', 6, 16);

static struct allocation pages[2];
static uint32_t *memory[2];

static int grant(int device, int kind, uint32_t count) {
    struct allocation *made = &pages[kind];
    *made = (struct allocation){.domid = 0, .flags = kind ? 0 : WRITABLE, .count = count};
    if (ioctl(device, ALLOCATE, made))
        return errno;
    size_t length = (size_t)count * PAGE;
    memory[kind] = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED, device, made->index);
    if (memory[kind] == MAP_FAILED)
        return errno;
    for (uint32_t i = 0; i < count; i++)
        for (uint32_t word = 0; word < PAGE / 4; word++)
            memory[kind][i * (PAGE / 4) + word] = (uint32_t)kind << 24 | i << 16 | word;
    return 0;
}

static int take_back(int device, int kind) {
    struct end end = {pages[kind].index, pages[kind].count};
    munmap(memory[kind], (size_t)end.count * PAGE);
    return ioctl(device, END, &end) ? errno : 0;
}

int main(int count, char **values) {
    int device = open("/dev/xen/gntalloc", O_RDWR);
    if (count != 3 || device < 0)
        return 1;
    static uint32_t *mail;
    struct allocation box = {.domid = 0, .flags = WRITABLE, .count = 1};
    if (ioctl(device, ALLOCATE, &box))
        return 1;
    mail = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, device, box.index);
    if (mail == MAP_FAILED)
        return 1;
    memset(mail, 0, PAGE);
    for (int kind = 0; kind < 2; kind++)
        if (grant(device, kind, atoi(values[1 + kind])))
            return 1;
    for (int kind = 0; kind < 2; kind++)
        for (uint32_t i = 1; i < pages[kind].count; i++)
            if (pages[kind].refs[i] != pages[kind].refs[0] + i)
                return 1; /* a lease of several pages needs references in order */
    printf("STOCK refs %u %u %u\n", box.refs[0], pages[0].refs[0], pages[1].refs[0]);
    fflush(stdout);
    for (;;) {
        struct timespec pause = {0, 5000000};
        nanosleep(&pause, NULL);
        volatile uint32_t *box_words = mail;
        uint32_t kind = box_words[1] & 1;
        switch (box_words[0]) {
        case NOTHING: continue;
        case WORD:
            box_words[3] = memory[kind][box_words[2] % (pages[kind].count * (PAGE / 4))];
            break;
        case TAKE_BACK:
            box_words[3] = take_back(device, kind);
            break;
        default: return 0;
        }
        __sync_synchronize();
        box_words[0] = NOTHING;
    }
}
