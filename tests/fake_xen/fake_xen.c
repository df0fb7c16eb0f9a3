/*
 * A stand-in for libxenforeignmemory and for libxenctrl's legacy mapping call.
 *
 * One guest, whose frame n lies at n << 12 of a memfd and is mapped with real mmap. What a call
 * returns, and how it fails, follows what a real Xen was seen to do (err[] negative, a domain that
 * is not there failing page by page). Every call is recorded in memory that forked children share.
 * Each copy of the built file has a state of its own.
 *
 * -DOLD builds a library of VERS_1.0 alone, -DWRONG one without the functions that map.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE_SHIFT 12
#define LIVE 0x584e4846u
#define EXPORT __attribute__((visibility("default")))
#define LENGTH(array) (sizeof(array) / sizeof((array)[0]))

typedef uint64_t xen_pfn_t;
typedef uint16_t domid_t;
typedef struct handle {
    uint32_t live;
    int64_t restricted; /* to this domain, or -1 */
    int under_way;
} handle;
typedef struct resource {
    void *address;
    size_t length;
} resource;

/* --- what Python sees; mirrored by ctypes structures in __init__.py --- */

enum behaviour {
    FAIL = 1,    /* NULL or -1 with errno value; err[] is not written */
    SIGN,        /* err[] with the other sign */
    ALL_PAGES,   /* a pointer, and every page failed with errno value */
    IGNORE,      /* MAP_FIXED is ignored */
    DROP,        /* as FAIL, after the mapping at the fixed address has gone */
    BLOCK,       /* tell that the call has begun, go on when told to */
};

struct call {
    char name[40];
    uint64_t arguments[9];
    uint32_t count;
    uint32_t frames; /* how many of them are kept */
    uint64_t gfns[16];
};

struct plan {
    char name[40];
    int32_t behaviour;
    int32_t value;
    int32_t nth; /* counted down; 0: no plan */
};

struct state {
    int32_t fd;       /* guest memory */
    uint32_t domid;
    uint64_t pages;
    int32_t entered;  /* pipe ends of BLOCK */
    int32_t proceed;
    uint32_t calls;
    uint32_t misuses; /* a closed handle was used, or one was closed during a call */
    struct plan plans[8];
    struct call log[256];
    int32_t errors[4096]; /* of each page, positive; 0: present */
};

static struct state *state;

EXPORT struct state *fake_xen_state(void)
{
    if (!state) {
        state = mmap(NULL, sizeof(*state), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        if (state == MAP_FAILED)
            abort();
    }
    return state;
}

EXPORT size_t fake_xen_state_size(void)
{
    return sizeof(struct state);
}

/* --- recording and planning --- */

static void record(const char *name, const uint64_t *arguments, uint32_t count,
                   const xen_pfn_t *gfns, size_t pages)
{
    uint32_t index = __atomic_fetch_add(&fake_xen_state()->calls, 1, __ATOMIC_SEQ_CST);
    struct call *call = &state->log[index % LENGTH(state->log)];

    memset(call, 0, sizeof(*call));
    strncpy(call->name, name, sizeof(call->name) - 1);
    memcpy(call->arguments, arguments, count * sizeof(*arguments));
    call->count = count;
    for (size_t i = 0; gfns && i < pages && i < LENGTH(call->gfns); i++)
        call->gfns[call->frames++] = gfns[i];
}

#define U(value) ((uint64_t)(uintptr_t)(value))
#define RECORD_PAGES(gfns, pages, ...)                                                \
    record(__func__, (const uint64_t[]){ __VA_ARGS__ },                               \
           sizeof((const uint64_t[]){ __VA_ARGS__ }) / sizeof(uint64_t), gfns, pages)
#define RECORD(...) RECORD_PAGES(NULL, 0, __VA_ARGS__)

static struct plan planned(const char *name)
{
    struct plan now = { .behaviour = 0 };

    for (size_t i = 0; i < LENGTH(state->plans); i++) {
        struct plan *plan = &state->plans[i];
        if (plan->nth && !strcmp(plan->name, name) && !--plan->nth)
            now = *plan;
    }
    return now;
}

/* Whether the call is to fail, with errno set. */
static int fails(const struct plan *plan)
{
    char byte = 'x';
    struct pollfd wait = { .fd = state->proceed, .events = POLLIN };

    if (plan->behaviour == BLOCK) {
        if (write(state->entered, &byte, 1) != 1 || poll(&wait, 1, 20000) != 1 ||
            read(state->proceed, &byte, 1) != 1) {
            errno = ETIMEDOUT; /* Python could not run meanwhile */
            return 1;
        }
        return 0;
    }
    if (plan->behaviour != FAIL && plan->behaviour != DROP)
        return 0;
    if (plan->value)
        errno = plan->value;
    return 1;
}

static int enter(handle *h)
{
    if (h->live != LIVE) {
        __atomic_fetch_add(&state->misuses, 1, __ATOMIC_SEQ_CST);
        errno = EBADF;
        return -1;
    }
    __atomic_fetch_add(&h->under_way, 1, __ATOMIC_SEQ_CST);
    return 0;
}

static void leave(handle *h)
{
    __atomic_fetch_sub(&h->under_way, 1, __ATOMIC_SEQ_CST);
}

/* --- the work --- */

static handle *open_handle(const char *name)
{
    struct plan plan = planned(name);
    handle *h;

    if (fails(&plan) || !(h = calloc(1, sizeof(*h))))
        return NULL;
    h->live = LIVE;
    h->restricted = -1;
    return h;
}

/* It is not freed, so that a later use is seen and not merely undefined. */
static int close_handle(handle *h)
{
    if (h->live != LIVE || h->under_way)
        __atomic_fetch_add(&state->misuses, 1, __ATOMIC_SEQ_CST);
    h->live = 0;
    return 0;
}

static int page_error(const struct plan *plan, uint32_t dom, xen_pfn_t gfn)
{
    if (plan->behaviour == ALL_PAGES)
        return plan->value;
    if (dom != state->domid)
        return ESRCH;
    return gfn < state->pages ? state->errors[gfn] : EINVAL;
}

static void *map_pages(const struct plan *plan, handle *h, uint32_t dom, void *addr, int prot,
                       int flags, size_t pages, const xen_pfn_t *arr, int *err)
{
    size_t length = pages << PAGE_SHIFT;
    int fixed = plan->behaviour == IGNORE ? 0 : flags & MAP_FIXED;
    int first_error = 0;
    char *base;

    if (fails(plan)) {
        if (plan->behaviour == DROP) {
            munmap(addr, length);
            errno = plan->value;
        }
        return NULL;
    }
    if (!pages) {
        errno = EINVAL;
        return NULL;
    }
    if (h->restricted != -1 && h->restricted != dom) {
        errno = EPERM;
        return NULL;
    }
    /* Pages that are not there fault when they are touched. */
    base = mmap(fixed ? addr : NULL, length, PROT_NONE,
                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | fixed, -1, 0);
    if (base == MAP_FAILED)
        return NULL;
    for (size_t i = 0; i < pages; i++) {
        int error = page_error(plan, dom, arr[i]);
        if (!error && mmap(base + (i << PAGE_SHIFT), 1 << PAGE_SHIFT, prot, MAP_SHARED | MAP_FIXED,
                           state->fd, (off_t)(arr[i] << PAGE_SHIFT)) == MAP_FAILED) {
            error = errno;
        }
        if (err)
            err[i] = plan->behaviour == SIGN ? error : -error;
        if (!first_error)
            first_error = error;
    }
    madvise(base, length, MADV_DONTFORK);
    if (first_error && !err) {
        munmap(base, length);
        errno = first_error;
        return NULL;
    }
    errno = EDOM; /* a call that succeeds may leave anything here */
    return base;
}

/* --- libxenforeignmemory --- */

EXPORT handle *xenforeignmemory_open(void *logger, unsigned open_flags)
{
    RECORD(U(logger), open_flags);
    return open_handle(__func__);
}

EXPORT int xenforeignmemory_close(handle *fmem)
{
    RECORD(U(fmem));
    return close_handle(fmem);
}

EXPORT int xenforeignmemory_unmap(handle *fmem, void *addr, size_t pages)
{
    struct plan plan = planned(__func__);

    RECORD(U(fmem), U(addr), pages);
    return fails(&plan) ? -1 : munmap(addr, pages << PAGE_SHIFT);
}

#ifndef WRONG
EXPORT void *xenforeignmemory_map(handle *fmem, uint32_t dom, int prot, size_t pages,
                                  const xen_pfn_t arr[], int err[])
{
    struct plan plan = planned(__func__);
    void *address;

    RECORD_PAGES(arr, pages, U(fmem), dom, (uint64_t)prot, pages, U(arr), U(err));
    if (enter(fmem))
        return NULL;
    address = map_pages(&plan, fmem, dom, NULL, prot, 0, pages, arr, err);
    leave(fmem);
    return address;
}
#endif

#ifndef OLD
EXPORT int xenforeignmemory_restrict(handle *fmem, domid_t domid)
{
    struct plan plan = planned(__func__);

    RECORD(U(fmem), domid);
    if (fails(&plan))
        return -1;
    fmem->restricted = domid;
    return 0;
}

EXPORT void *xenforeignmemory_map2(handle *fmem, uint32_t dom, void *addr, int prot, int flags,
                                   size_t pages, const xen_pfn_t arr[], int err[])
{
    struct plan plan = planned(__func__);
    void *address;

    RECORD_PAGES(arr, pages, U(fmem), dom, U(addr), (uint64_t)prot, (uint64_t)flags, pages, U(arr),
                 U(err));
    if (enter(fmem))
        return NULL;
    address = map_pages(&plan, fmem, dom, addr, prot, flags, pages, arr, err);
    leave(fmem);
    return address;
}

EXPORT resource *xenforeignmemory_map_resource(handle *fmem, domid_t domid, unsigned type,
                                               unsigned id, unsigned long frame,
                                               unsigned long nr_frames, void **paddr, int prot,
                                               int flags)
{
    struct plan plan = planned(__func__);
    resource *made;

    RECORD(U(fmem), domid, type, id, frame, nr_frames, U(*paddr), (uint64_t)prot, (uint64_t)flags);
    if (fails(&plan) || !(made = malloc(sizeof(*made))))
        return NULL;
    made->length = nr_frames << PAGE_SHIFT;
    made->address = mmap(*paddr, made->length, prot, MAP_SHARED | MAP_ANONYMOUS | flags, -1, 0);
    if (made->address == MAP_FAILED) {
        free(made);
        return NULL;
    }
    *paddr = made->address;
    return made;
}

EXPORT int xenforeignmemory_unmap_resource(handle *fmem, resource *fres)
{
    struct plan plan = planned(__func__);
    int result;

    RECORD(U(fmem), U(fres));
    if (fails(&plan))
        return -1;
    result = munmap(fres->address, fres->length);
    free(fres);
    return result;
}

EXPORT int xenforeignmemory_resource_size(handle *fmem, domid_t domid, unsigned type, unsigned id,
                                          size_t *size)
{
    struct plan plan = planned(__func__);

    RECORD(U(fmem), domid, type, id);
    if (fails(&plan))
        return -1;
    *size = 2 << PAGE_SHIFT;
    return 0;
}
#endif

/* --- libxenctrl --- */

EXPORT handle *xc_interface_open(void *logger, void *dombuild_logger, unsigned open_flags)
{
    RECORD(U(logger), U(dombuild_logger), open_flags);
    return open_handle(__func__);
}

EXPORT int xc_interface_close(handle *xch)
{
    RECORD(U(xch));
    return close_handle(xch);
}

#ifndef WRONG
EXPORT void *xc_map_foreign_bulk(handle *xch, uint32_t dom, int prot, const xen_pfn_t *arr,
                                 int *err, unsigned num)
{
    struct plan plan = planned(__func__);
    void *address;

    RECORD_PAGES(arr, num, U(xch), dom, (uint64_t)prot, U(arr), U(err), num);
    if (enter(xch))
        return NULL;
    address = map_pages(&plan, xch, dom, NULL, prot, 0, num, arr, err);
    leave(xch);
    return address;
}
#endif
