/*
 * A stand-in for libxenforeignmemory, for libxenctrl's legacy mapping call, and for
 * libxendevicemodel, libxenevtchn, libxengnttab and libxentoolcore; and for libatomic's fence.
 *
 * One guest, whose frame n lies at n << 12 of a memfd and is mapped with real mmap. What a call
 * returns, and how it fails, follows what a real Xen was seen to do (err[] negative, a domain that
 * is not there failing page by page). Every call is recorded in memory that forked children share.
 * Each copy of the built file has a state of its own.
 *
 * An ioreq server's pages are those of another memfd, so that Python can play Xen and the guest.
 * An event channel handle reads a pipe, which fake_xen_send() writes to; what it notifies goes to
 * a pipe that Python reads. Guest ports: of vCPU n of server s 64 s + n + 1, for buffered requests 64 s + 64.
 *
 * What the guest grants, Python writes into the state. Granted pages are mapped as in a PVH Dom0: a
 * forked child would see them. `ioctl` plays gntdev's, which begins to use an index again as soon as
 * it was given back.
 *
 * -DOLD builds a library of VERS_1.0 alone, -DWRONG one without the functions that map or are
 * otherwise required, -DALONE one without what device models need and without a guest's size.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE_SHIFT 12
#define LIVE 0x584e4846u
#define IOREQ_SERVER 0 /* XENMEM_resource_ioreq_server */
#define VP_EPORT 24    /* in struct ioreq, of which there is one for each vCPU */
#define IOREQ_SIZE 32
#define EXPORT __attribute__((visibility("default")))
#define LENGTH(array) (sizeof(array) / sizeof((array)[0]))

typedef uint64_t xen_pfn_t;
typedef uint16_t domid_t;
typedef uint16_t ioservid_t;
typedef uint32_t evtchn_port_t;
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
    PARTIAL,     /* a pointer, and of err[] only the first half is written; there are no others */
    ASKEW,       /* a pointer to where no page begins, and nothing there */
    BLOCK,       /* tell that the call has begun, go on when told to */
};

struct call {
    char name[48];
    uint64_t arguments[9];
    uint32_t count;
    uint32_t frames; /* how many of them are kept */
    uint64_t gfns[16];
};

struct plan {
    char name[48];
    int32_t behaviour;
    int32_t value;
    int32_t nth; /* counted down; 0: no plan */
};

struct server {
    uint8_t live;
    uint8_t enabled;
    uint8_t buffered;
    uint8_t unused;
};

struct grant {
    uint32_t gfn;
    uint8_t live;
    uint8_t readonly;
    uint16_t mapped; /* how often */
};

struct grant_map {
    uint64_t address; /* 0: a free index */
    uint32_t count;
    uint32_t refs[64];
};

struct state {
    int32_t fd;       /* guest memory */
    uint32_t domid;
    uint64_t pages;
    int32_t entered;  /* pipe ends of BLOCK */
    int32_t proceed;
    int32_t notified; /* pipe end for the guest's ports that are notified */
    int32_t ioreq_fd; /* the ioreq servers' pages, two each: buffered, synchronous */
    uint32_t vcpus;
    uint32_t calls;
    uint32_t misuses; /* a closed handle was used, one was closed during a call, pending unpolled */
    int32_t handles;  /* that are open */
    struct plan plans[8];
    struct server servers[8];
    struct call log[1024];
    int32_t errors[4096]; /* of each page, positive; 0: present */
    uint8_t dirty[4096];  /* pages that were reported as written */
    uint8_t xens[4096];   /* pages that can be mapped, and are Xen's own */
    int64_t nowhere;      /* how many more pages Xen counts as the guest's than it has gfns for */
    struct grant grants[128];
    struct grant_map maps[32];
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
        int waited;

        if (write(state->entered, &byte, 1) != 1) {
            errno = EIO;
            return 1;
        }
        do /* as a hypercall, it is not ended by a signal */
            waited = poll(&wait, 1, 20000);
        while (waited < 0 && errno == EINTR);
        if (waited != 1 || read(state->proceed, &byte, 1) != 1) {
            errno = ETIMEDOUT; /* Python could not run during the wait */
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
    __atomic_fetch_add(&state->handles, 1, __ATOMIC_SEQ_CST);
    return h;
}

/* It is not freed, so that a later use is seen and not merely undefined. */
static int close_handle(handle *h)
{
    if (h->live != LIVE || h->under_way)
        __atomic_fetch_add(&state->misuses, 1, __ATOMIC_SEQ_CST);
    h->live = 0;
    __atomic_fetch_sub(&state->handles, 1, __ATOMIC_SEQ_CST);
    return 0;
}

/* half: whether it is a page of the second half */
static int page_error(const struct plan *plan, uint32_t dom, xen_pfn_t gfn, int half)
{
    if (plan->behaviour == ALL_PAGES)
        return plan->value;
    if (plan->behaviour == PARTIAL && half)
        return EINVAL;
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
        int error = page_error(plan, dom, arr[i], i >= pages / 2);
        if (!error && mmap(base + (i << PAGE_SHIFT), 1 << PAGE_SHIFT, prot, MAP_SHARED | MAP_FIXED,
                           state->fd, (off_t)(arr[i] << PAGE_SHIFT)) == MAP_FAILED) {
            error = errno;
        }
        if (err && !(plan->behaviour == PARTIAL && i >= pages / 2))
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
    if (plan->behaviour == ASKEW) {
        munmap(base, length);
        return base + 8;
    }
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

static void *map_server(void *addr, unsigned id, unsigned long frame, unsigned long frames,
                        int prot, int flags)
{
    if (id >= LENGTH(state->servers) || !state->servers[id].live ||
        (frame == 0 && !state->servers[id].buffered)) {
        errno = ENOENT;
        return MAP_FAILED;
    }
    if (!frames || frame + frames > 2) {
        errno = EINVAL;
        return MAP_FAILED;
    }
    return mmap(addr, frames << PAGE_SHIFT, prot, MAP_SHARED | flags, state->ioreq_fd,
                (off_t)((id * 2 + frame) << PAGE_SHIFT));
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
    if (type == IOREQ_SERVER)
        made->address = map_server(*paddr, id, frame, nr_frames, prot, flags);
    else
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

#ifndef ALONE
/* Whether it is a page of the guest's memory, and not Xen's own. */
static int has_page(xen_pfn_t gfn)
{
    return gfn < state->pages && !state->errors[gfn] && !state->xens[gfn];
}

/* The head of struct xen_domctl_getdomaininfo: domain, pad, flags, tot_pages. The plan's value is flags. */
EXPORT int xc_domain_getinfolist(handle *xch, uint32_t first_domain, unsigned max_domains,
                                 void *info)
{
    struct plan plan = planned(__func__);
    struct { uint16_t domain, pad; uint32_t flags; uint64_t pages; } *head = info;

    RECORD(U(xch), first_domain, max_domains, U(info));
    if (plan.behaviour == FAIL && plan.value >= 0) {
        errno = plan.value;
        return -1;
    }
    if (first_domain > state->domid)
        return 0;
    head->domain = state->domid;
    head->flags = plan.behaviour == FAIL ? -plan.value : 0;
    head->pages = (uint64_t)state->nowhere;
    for (xen_pfn_t gfn = 0; gfn < state->pages; gfn++)
        head->pages += has_page(gfn);
    return 1;
}

EXPORT int xc_get_pfn_type_batch(handle *xch, uint32_t dom, unsigned num, xen_pfn_t *arr)
{
    struct plan plan = planned(__func__);

    RECORD_PAGES(arr, num, U(xch), dom, num, U(arr));
    if (fails(&plan))
        return -1;
    if (dom != state->domid || num > 1024) {
        errno = num > 1024 ? E2BIG : ESRCH;
        return -1;
    }
    for (unsigned i = 0; i < num; i++)
        arr[i] = has_page(arr[i]) ? 0 : 0xfu << 28; /* NOTAB, XTAB */
    return 0;
}

EXPORT int xc_domain_maximum_gpfn(handle *xch, uint32_t domid, xen_pfn_t *gpfns)
{
    struct plan plan = planned(__func__);

    RECORD(U(xch), domid, U(gpfns));
    if (fails(&plan))
        return -1;
    if (domid != state->domid) {
        errno = ESRCH;
        return -1;
    }
    *gpfns = state->pages - 1;
    return 0;
}

EXPORT int xc_domain_pause(handle *xch, uint32_t domid)
{
    struct plan plan = planned(__func__);

    RECORD(U(xch), domid);
    return fails(&plan) ? -1 : 0;
}

EXPORT int xc_domain_unpause(handle *xch, uint32_t domid)
{
    struct plan plan = planned(__func__);

    RECORD(U(xch), domid);
    return fails(&plan) ? -1 : 0;
}
#endif

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

#ifndef ALONE
/* --- libxendevicemodel --- */

EXPORT handle *xendevicemodel_open(void *logger, unsigned open_flags)
{
    RECORD(U(logger), open_flags);
    return open_handle(__func__);
}

EXPORT int xendevicemodel_close(handle *dmod)
{
    RECORD(U(dmod));
    return close_handle(dmod);
}

/* What such a call begins with; -1 if it fails, or else finish() ends it. */
static int begin(const char *name, handle *dmod, domid_t domid)
{
    struct plan plan = planned(name);

    if (enter(dmod))
        return -1;
    if (!fails(&plan)) {
        if (domid == state->domid)
            return 0;
        errno = ESRCH;
    }
    leave(dmod);
    return -1;
}

static int finish(handle *dmod, int error)
{
    leave(dmod);
    errno = error ? error : EDOM; /* a call that succeeds may leave anything here */
    return error ? -1 : 0;
}

static struct server *server_of(ioservid_t id)
{
    return id < LENGTH(state->servers) && state->servers[id].live ? &state->servers[id] : NULL;
}

EXPORT int xendevicemodel_create_ioreq_server(handle *dmod, domid_t domid, int handle_bufioreq,
                                              ioservid_t *id)
{
    ioservid_t free = 0;
    char zeros[2 << PAGE_SHIFT] = { 0 };

    RECORD(U(dmod), domid, (uint64_t)handle_bufioreq, U(id));
    if (begin(__func__, dmod, domid))
        return -1;
    if (handle_bufioreq < 0 || handle_bufioreq > 2)
        return finish(dmod, EINVAL);
    while (free < LENGTH(state->servers) && state->servers[free].live)
        free++;
    if (free == LENGTH(state->servers))
        return finish(dmod, ENOSPC);
    if (pwrite(state->ioreq_fd, zeros, sizeof(zeros), free * (off_t)sizeof(zeros)) < 0)
        return finish(dmod, errno);
    state->servers[free] = (struct server){ .live = 1, .buffered = handle_bufioreq != 0 };
    *id = free;
    return finish(dmod, 0);
}

EXPORT int xendevicemodel_destroy_ioreq_server(handle *dmod, domid_t domid, ioservid_t id)
{
    struct server *server;

    RECORD(U(dmod), domid, id);
    if (begin(__func__, dmod, domid))
        return -1;
    if (!(server = server_of(id)))
        return finish(dmod, ENOENT);
    server->live = server->enabled = 0;
    return finish(dmod, 0);
}

EXPORT int xendevicemodel_set_ioreq_server_state(handle *dmod, domid_t domid, ioservid_t id,
                                                 int enabled)
{
    struct server *server;

    RECORD(U(dmod), domid, id, (uint64_t)enabled);
    if (begin(__func__, dmod, domid))
        return -1;
    if (!(server = server_of(id)))
        return finish(dmod, ENOENT);
    for (uint32_t vcpu = 0; enabled && vcpu < state->vcpus; vcpu++) {
        evtchn_port_t port = 64 * id + vcpu + 1;
        off_t page = (id * 2 + 1) << PAGE_SHIFT;
        if (pwrite(state->ioreq_fd, &port, sizeof(port), page + vcpu * IOREQ_SIZE + VP_EPORT) < 0)
            return finish(dmod, errno);
    }
    server->enabled = enabled != 0;
    return finish(dmod, 0);
}

EXPORT int xendevicemodel_get_ioreq_server_info(handle *dmod, domid_t domid, ioservid_t id,
                                                xen_pfn_t *ioreq_gfn, xen_pfn_t *bufioreq_gfn,
                                                evtchn_port_t *bufioreq_port)
{
    struct server *server;

    RECORD(U(dmod), domid, id, U(ioreq_gfn), U(bufioreq_gfn), U(bufioreq_port));
    if (begin(__func__, dmod, domid))
        return -1;
    if (!(server = server_of(id)))
        return finish(dmod, ENOENT);
    if (bufioreq_port && server->buffered)
        *bufioreq_port = 64 * id + 64;
    return finish(dmod, 0);
}

static int range(const char *name, handle *dmod, domid_t domid, ioservid_t id, uint64_t start,
                 uint64_t end)
{
    if (begin(name, dmod, domid))
        return -1;
    return finish(dmod, start > end ? EINVAL : server_of(id) ? 0 : ENOENT);
}

EXPORT int xendevicemodel_map_io_range_to_ioreq_server(handle *dmod, domid_t domid, ioservid_t id,
                                                       int is_mmio, uint64_t start, uint64_t end)
{
    RECORD(U(dmod), domid, id, (uint64_t)is_mmio, start, end);
    return range(__func__, dmod, domid, id, start, end);
}

EXPORT int xendevicemodel_unmap_io_range_from_ioreq_server(handle *dmod, domid_t domid,
                                                           ioservid_t id, int is_mmio,
                                                           uint64_t start, uint64_t end)
{
    RECORD(U(dmod), domid, id, (uint64_t)is_mmio, start, end);
    return range(__func__, dmod, domid, id, start, end);
}

static int pcidev(const char *name, handle *dmod, domid_t domid, ioservid_t id, uint8_t device,
                  uint8_t function)
{
    if (begin(name, dmod, domid))
        return -1;
    return finish(dmod, device > 31 || function > 7 ? EINVAL : server_of(id) ? 0 : ENOENT);
}

EXPORT int xendevicemodel_map_pcidev_to_ioreq_server(handle *dmod, domid_t domid, ioservid_t id,
                                                     uint16_t segment, uint8_t bus, uint8_t device,
                                                     uint8_t function)
{
    RECORD(U(dmod), domid, id, segment, bus, device, function);
    return pcidev(__func__, dmod, domid, id, device, function);
}

EXPORT int xendevicemodel_unmap_pcidev_from_ioreq_server(handle *dmod, domid_t domid, ioservid_t id,
                                                         uint16_t segment, uint8_t bus,
                                                         uint8_t device, uint8_t function)
{
    RECORD(U(dmod), domid, id, segment, bus, device, function);
    return pcidev(__func__, dmod, domid, id, device, function);
}

/* As during a migration: without one, Xen does not even look at the pages. */
static int mark(uint64_t first_pfn, uint32_t nr)
{
    if (first_pfn > state->pages || nr > state->pages - first_pfn)
        return EINVAL;
    memset(state->dirty + first_pfn, 1, nr);
    return 0;
}

#ifndef WRONG
EXPORT int xendevicemodel_modified_memory(handle *dmod, domid_t domid, uint64_t first_pfn,
                                          uint32_t nr)
{
    RECORD(U(dmod), domid, first_pfn, nr);
    return begin(__func__, dmod, domid) ? -1 : finish(dmod, mark(first_pfn, nr));
}
#endif

#ifndef OLD
struct xen_dm_op_modified_memory_extent {
    uint32_t nr;
    uint32_t pad;
    uint64_t first_pfn;
};

/* Of the extents the first is recorded. */
EXPORT int xendevicemodel_modified_memory_bulk(handle *dmod, domid_t domid,
                                               struct xen_dm_op_modified_memory_extent extents[],
                                               uint32_t nr)
{
    RECORD(U(dmod), domid, nr, extents[0].nr, extents[0].pad, extents[0].first_pfn);
    if (begin(__func__, dmod, domid))
        return -1;
    for (uint32_t i = 0; i < nr; i++) {
        int error = extents[i].pad ? EINVAL : mark(extents[i].first_pfn, extents[i].nr);
        if (error)
            return finish(dmod, error);
    }
    return finish(dmod, 0);
}
#endif

/* What was reported as written stands for what the guest writes. */
EXPORT int xendevicemodel_track_dirty_vram(handle *dmod, domid_t domid, uint64_t first_pfn,
                                           uint32_t nr, unsigned long *dirty_bitmap)
{
    RECORD(U(dmod), domid, first_pfn, nr);
    if (begin(__func__, dmod, domid))
        return -1;
    memset(dirty_bitmap, 0, (nr + 7) / 8);
    for (uint32_t i = 0; i < nr; i++) {
        ((unsigned char *)dirty_bitmap)[i / 8] |= state->dirty[first_pfn + i] << i % 8;
        state->dirty[first_pfn + i] = 0;
    }
    return finish(dmod, 0);
}

EXPORT int xendevicemodel_inject_msi(handle *dmod, domid_t domid, uint64_t msi_addr,
                                     uint32_t msi_data)
{
    RECORD(U(dmod), domid, msi_addr, msi_data);
    return begin(__func__, dmod, domid) ? -1 : finish(dmod, 0);
}

EXPORT int xendevicemodel_set_isa_irq_level(handle *dmod, domid_t domid, uint8_t irq,
                                            unsigned level)
{
    RECORD(U(dmod), domid, irq, level);
    return begin(__func__, dmod, domid) ? -1 : finish(dmod, irq > 15 || level > 1 ? EINVAL : 0);
}

EXPORT int xendevicemodel_set_pci_intx_level(handle *dmod, domid_t domid, uint16_t segment,
                                             uint8_t bus, uint8_t device, uint8_t intx,
                                             unsigned level)
{
    int odd = segment || bus || device > 31 || intx > 3 || level > 1;

    RECORD(U(dmod), domid, segment, bus, device, intx, level);
    return begin(__func__, dmod, domid) ? -1 : finish(dmod, odd ? EINVAL : 0);
}

#ifndef OLD
EXPORT int xendevicemodel_set_irq_level(handle *dmod, domid_t domid, unsigned irq, unsigned level)
{
    RECORD(U(dmod), domid, irq, level);
    return begin(__func__, dmod, domid) ? -1 : finish(dmod, irq < 32 || level > 1 ? EINVAL : 0);
}

EXPORT int xendevicemodel_nr_vcpus(handle *dmod, domid_t domid, unsigned *vcpus)
{
    RECORD(U(dmod), domid, U(vcpus));
    if (begin(__func__, dmod, domid))
        return -1;
    *vcpus = state->vcpus;
    return finish(dmod, 0);
}
#endif

/* --- libatomic --- */

#ifndef WRONG
EXPORT void atomic_thread_fence(int order)
{
    RECORD((uint64_t)order);
}
#endif

/* --- libxenevtchn --- */

typedef struct channels {
    handle base; /* first, so that it can stand for all */
    int events[2];
    struct {
        evtchn_port_t remote; /* 0: not bound */
        int masked;           /* it was told of, and is not unmasked yet */
        int again;            /* it came during the call */
    } ports[64];
} channels;

static pthread_mutex_t events_lock = PTHREAD_MUTEX_INITIALIZER;
static channels *opened[16];

EXPORT channels *xenevtchn_open(void *logger, unsigned flags)
{
    struct plan plan = planned(__func__);
    channels *made;
    size_t i = 0;

    RECORD(U(logger), flags);
    if (fails(&plan))
        return NULL;
    while (i < LENGTH(opened) && opened[i])
        i++;
    if (i == LENGTH(opened) || !(made = calloc(1, sizeof(*made)))) {
        errno = EMFILE;
        return NULL;
    }
    if (pipe2(made->events, O_CLOEXEC)) {
        free(made);
        return NULL;
    }
    made->base.live = LIVE;
    opened[i] = made;
    return made;
}

EXPORT int xenevtchn_close(channels *xce)
{
    RECORD(U(xce));
    pthread_mutex_lock(&events_lock);
    for (size_t i = 0; xce->base.live == LIVE && i < LENGTH(opened); i++) {
        if (opened[i] == xce) {
            opened[i] = NULL;
            close(xce->events[0]);
            close(xce->events[1]);
        }
    }
    pthread_mutex_unlock(&events_lock);
    return close_handle(&xce->base);
}

static int begin_event(const char *name, channels *xce)
{
    struct plan plan = planned(name);

    if (enter(&xce->base))
        return -1;
    if (!fails(&plan))
        return 0;
    leave(&xce->base);
    return -1;
}

/* result, or -1 with error; either may be what the work came to. */
static int end_event(channels *xce, int result, int error)
{
    leave(&xce->base);
    errno = error ? error : EDOM;
    return error ? -1 : result;
}

static int bound(const channels *xce, evtchn_port_t port)
{
    return port < LENGTH(xce->ports) && xce->ports[port].remote;
}

/* Under the lock. As in Linux, a port that was told of is masked, read or not. */
static void tell(channels *xce, evtchn_port_t port)
{
    if (xce->ports[port].masked)
        xce->ports[port].again = 1;
    else
        xce->ports[port].masked = write(xce->events[1], &port, sizeof(port)) == sizeof(port);
}

/* Under the lock: who has bound the guest's port, and to which of its own. */
static channels *owner(evtchn_port_t remote, evtchn_port_t *port)
{
    for (size_t i = 0; i < LENGTH(opened); i++) {
        for (*port = 1; opened[i] && *port < LENGTH(opened[i]->ports); ++*port) {
            if (opened[i]->ports[*port].remote == remote)
                return opened[i];
        }
    }
    return NULL;
}

/* An event of the guest's port, from Python. Returns whether it is bound. */
EXPORT int fake_xen_send(evtchn_port_t remote)
{
    evtchn_port_t port;
    channels *to;

    pthread_mutex_lock(&events_lock);
    to = owner(remote, &port);
    if (to)
        tell(to, port);
    pthread_mutex_unlock(&events_lock);
    return to != NULL;
}

EXPORT int xenevtchn_fd(channels *xce)
{
    RECORD(U(xce));
    return begin_event(__func__, xce) ? -1 : end_event(xce, xce->events[0], 0);
}

EXPORT int xenevtchn_bind_interdomain(channels *xce, uint32_t domid, evtchn_port_t remote_port)
{
    evtchn_port_t port;

    RECORD(U(xce), domid, remote_port);
    if (begin_event(__func__, xce))
        return -1;
    if (domid != state->domid)
        return end_event(xce, -1, ESRCH);
    pthread_mutex_lock(&events_lock);
    if (!remote_port || owner(remote_port, &port)) {
        pthread_mutex_unlock(&events_lock);
        return end_event(xce, -1, EINVAL);
    }
    for (port = 1; port < LENGTH(xce->ports) && xce->ports[port].remote; port++)
        ;
    if (port < LENGTH(xce->ports)) {
        memset(&xce->ports[port], 0, sizeof(xce->ports[port]));
        xce->ports[port].remote = remote_port;
        tell(xce, port); /* as Xen does: something may have been sent before */
    }
    pthread_mutex_unlock(&events_lock);
    return end_event(xce, (int)port, port < LENGTH(xce->ports) ? 0 : ENOSPC);
}

EXPORT int xenevtchn_unbind(channels *xce, evtchn_port_t port)
{
    int error = ENOTCONN;

    RECORD(U(xce), port);
    if (begin_event(__func__, xce))
        return -1;
    pthread_mutex_lock(&events_lock);
    if (bound(xce, port)) {
        xce->ports[port].remote = 0;
        error = 0;
    }
    pthread_mutex_unlock(&events_lock);
    return end_event(xce, 0, error);
}

EXPORT int xenevtchn_notify(channels *xce, evtchn_port_t port)
{
    int error = 0;

    RECORD(U(xce), port);
    if (begin_event(__func__, xce))
        return -1;
    if (!bound(xce, port))
        error = ENOTCONN;
    else if (write(state->notified, &xce->ports[port].remote, sizeof(port)) < 0)
        error = errno == EAGAIN ? 0 : errno; /* nobody looks, and the pipe is full */
    return end_event(xce, 0, error);
}

#ifndef WRONG
EXPORT int xenevtchn_pending(channels *xce)
{
    struct pollfd wait = { .fd = xce->events[0], .events = POLLIN };
    evtchn_port_t port = 0;

    RECORD(U(xce));
    if (begin_event(__func__, xce))
        return -1;
    if (poll(&wait, 1, 0) != 1) {
        __atomic_fetch_add(&state->misuses, 1, __ATOMIC_SEQ_CST); /* the real one would block */
        return end_event(xce, -1, EAGAIN);
    }
    if (read(xce->events[0], &port, sizeof(port)) != sizeof(port))
        return end_event(xce, -1, EIO);
    return end_event(xce, (int)port, 0);
}
#endif

EXPORT int xenevtchn_unmask(channels *xce, evtchn_port_t port)
{
    RECORD(U(xce), port);
    if (begin_event(__func__, xce))
        return -1;
    pthread_mutex_lock(&events_lock);
    if (bound(xce, port) && xce->ports[port].masked) {
        int again = xce->ports[port].again;
        xce->ports[port].masked = xce->ports[port].again = 0;
        if (again)
            tell(xce, port);
    }
    pthread_mutex_unlock(&events_lock);
    return end_event(xce, 0, 0);
}

/* --- libxengnttab --- */

#define GRANT_FD 7777
#define COPY_SOURCE_GRANT 1
#define COPY_DEST_GRANT 2

union copy_pointer {
    void *virt;
    struct {
        uint32_t ref;
        uint16_t offset;
        uint16_t domid;
    } foreign;
};

struct copy_segment {
    union copy_pointer source, dest;
    uint16_t len;
    uint16_t flags;
    int16_t status;
};

EXPORT handle *xengnttab_open(void *logger, unsigned open_flags)
{
    RECORD(U(logger), open_flags);
    return open_handle(__func__);
}

EXPORT int xengnttab_close(handle *xgt)
{
    RECORD(U(xgt));
    return close_handle(xgt);
}

static struct grant *grant_of(uint32_t ref)
{
    return ref < LENGTH(state->grants) && state->grants[ref].live ? &state->grants[ref] : NULL;
}

static struct grant_map *grant_map_at(uint64_t address)
{
    for (size_t i = 0; i < LENGTH(state->maps); i++) {
        if (address && state->maps[i].address == address)
            return &state->maps[i];
    }
    return NULL;
}

static void drop_grants(struct grant_map *map)
{
    for (uint32_t i = 0; i < map->count; i++)
        state->grants[map->refs[i]].mapped--;
    map->address = 0;
}

#ifndef WRONG
/* As the kernel: all or none, and EINVAL whatever the reason is. */
EXPORT void *xengnttab_map_domain_grant_refs(handle *xgt, uint32_t count, uint32_t domid,
                                             uint32_t *refs, int prot)
{
    struct plan plan = planned(__func__);
    size_t index = 0, length = (size_t)count << PAGE_SHIFT;
    char *base;

    RECORD(U(xgt), count, domid, count ? refs[0] : 0, (uint64_t)prot);
    if (enter(xgt))
        return NULL;
    leave(xgt);
    if (fails(&plan))
        return NULL;
    while (index < LENGTH(state->maps) && state->maps[index].address)
        index++;
    errno = EINVAL;
    if (!count || count > LENGTH(state->maps[0].refs) || index == LENGTH(state->maps) ||
        domid != state->domid)
        return NULL;
    for (uint32_t i = 0; i < count; i++) {
        struct grant *grant = grant_of(refs[i]);
        if (!grant || (grant->readonly && prot & PROT_WRITE))
            return NULL;
    }
    base = mmap(NULL, length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED)
        return NULL;
    for (uint32_t i = 0; i < count; i++) {
        struct grant *grant = grant_of(refs[i]);
        if (mmap(base + ((size_t)i << PAGE_SHIFT), 1 << PAGE_SHIFT, prot, MAP_SHARED | MAP_FIXED,
                 state->fd, (off_t)grant->gfn << PAGE_SHIFT) == MAP_FAILED)
            abort();
        grant->mapped++;
        state->maps[index].refs[i] = refs[i];
    }
    state->maps[index].address = U(base);
    state->maps[index].count = count;
    errno = EDOM; /* a call that succeeds may leave anything here */
    return base;
}
#endif

EXPORT int xengnttab_unmap(handle *xgt, void *start_address, uint32_t count)
{
    struct plan plan = planned(__func__);
    struct grant_map *map = grant_map_at(U(start_address));

    RECORD(U(xgt), U(start_address), count);
    if (fails(&plan))
        return -1;
    if (!map || map->count != count) {
        errno = EINVAL;
        return -1;
    }
    drop_grants(map);
    return munmap(start_address, (size_t)count << PAGE_SHIFT);
}

#ifndef OLD
EXPORT int xengnttab_fd(handle *xgt)
{
    struct plan plan = planned(__func__);

    RECORD(U(xgt));
    if (enter(xgt))
        return -1;
    leave(xgt);
    return fails(&plan) ? -1 : GRANT_FD;
}

/* A plan's value is an errno, or if it is negative the status of the first segment. */
EXPORT int xengnttab_grant_copy(handle *xgt, uint32_t count, struct copy_segment *segs)
{
    struct plan plan = planned(__func__);

    RECORD(U(xgt), count);
    if (enter(xgt))
        return -1;
    leave(xgt);
    if (plan.behaviour == FAIL && plan.value >= 0) {
        errno = plan.value;
        return -1;
    }
    for (uint32_t i = 0; i < count; i++) {
        int to_guest = segs[i].flags == COPY_DEST_GRANT;
        union copy_pointer far = to_guest ? segs[i].dest : segs[i].source;
        if ((!to_guest && segs[i].flags != COPY_SOURCE_GRANT) ||
            far.foreign.offset + segs[i].len > 1 << PAGE_SHIFT) {
            errno = EINVAL;
            return -1;
        }
    }
    for (uint32_t i = 0; i < count; i++) {
        int to_guest = segs[i].flags == COPY_DEST_GRANT;
        union copy_pointer far = to_guest ? segs[i].dest : segs[i].source;
        struct grant *grant = grant_of(far.foreign.ref);
        off_t place;
        ssize_t copied;

        if (far.foreign.domid != state->domid)
            segs[i].status = -2;
        else if (!grant)
            segs[i].status = -3;
        else if (to_guest && grant->readonly)
            segs[i].status = -1;
        else if (plan.behaviour == FAIL && !i)
            segs[i].status = (int16_t)plan.value;
        else {
            place = ((off_t)grant->gfn << PAGE_SHIFT) + far.foreign.offset;
            copied = to_guest ? pwrite(state->fd, segs[i].source.virt, segs[i].len, place)
                              : pread(state->fd, segs[i].dest.virt, segs[i].len, place);
            segs[i].status = copied == segs[i].len ? 0 : -9;
        }
    }
    return 0;
}

EXPORT int ioctl(int fd, unsigned long request, void *argument)
{
    struct plan plan = planned(__func__);
    uint64_t *words = argument;
    uint32_t count = (uint32_t)words[1];
    uint64_t index = words[0] >> PAGE_SHIFT;
    struct grant_map *map;

    RECORD((uint64_t)fd, request, words[0], words[1]);
    if (fd != GRANT_FD) {
        errno = EBADF;
        return -1;
    }
    if (fails(&plan))
        return -1;
    switch (request) {
    case 24 << 16 | 'G' << 8 | 2: /* GET_OFFSET_FOR_VADDR */
        if (!(map = grant_map_at(words[0])))
            break;
        words[1] = (uint64_t)(map - state->maps) << PAGE_SHIFT;
        *(uint32_t *)&words[2] = map->count;
        return 0;
    case 16 << 16 | 'G' << 8 | 1: /* UNMAP_GRANT_REF */
        errno = ENOENT;
        if (index >= LENGTH(state->maps) || !state->maps[index].address ||
            state->maps[index].count != count)
            return -1;
        drop_grants(&state->maps[index]);
        return 0;
    }
    errno = EINVAL;
    return -1;
}
#endif

/* --- libxentoolcore --- */

#ifndef WRONG
EXPORT int xentoolcore_restrict_all(domid_t domid)
{
    struct plan plan;

    RECORD(domid);
    plan = planned(__func__);
    return fails(&plan) ? -1 : 0;
}
#endif
#endif
