/*
 * The least that passes for Xen's libraries: what a library's driver for live guests costs when no
 * hypercall is paid. One guest, number 3, named "guest", whose memory is the file that the variable
 * XENMAPCACHE_BENCH_IMAGE names; frame n lies at n << 12 of it.
 *
 * The same source is built under the name of each library: libxenforeignmemory, libxenctrl,
 * libxenevtchn and libxenstore. What a driver looks up but must not need says ENOSYS.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define PAGE_SHIFT 12
#define PAGE_SIZE (1UL << PAGE_SHIFT)
#define DOMID 3
#define VERSION (4 << 16 | 17)
#define XENVER_VERSION 0
#define HVM_GUEST (1u << 1)
#define EXPORT __attribute__((visibility("default")))

typedef uint64_t xen_pfn_t;

typedef struct handle {
    int fd;
    uint64_t pages;
} handle;

/* The beginning of struct xen_domctl_getdomaininfo. */
typedef struct domaininfo {
    uint16_t domain;
    uint16_t pad;
    uint32_t flags;
    uint64_t tot_pages;
    uint64_t max_pages;
} domaininfo;

static handle *open_image(void)
{
    const char *path = getenv("XENMAPCACHE_BENCH_IMAGE");
    struct stat status;
    handle *made = malloc(sizeof(*made));

    if (!made)
        return NULL;
    made->fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    if (made->fd < 0 || fstat(made->fd, &status)) {
        free(made);
        return NULL;
    }
    made->pages = (uint64_t)status.st_size >> PAGE_SHIFT;
    return made;
}

static int close_image(handle *h)
{
    close(h->fd);
    free(h);
    return 0;
}

static void *map(handle *h, uint32_t domid, int prot, xen_pfn_t gfn, size_t pages)
{
    void *address;

    if (domid != DOMID || gfn + pages > h->pages) {
        errno = domid == DOMID ? EINVAL : ESRCH;
        return NULL;
    }
    address = mmap(NULL, pages << PAGE_SHIFT, prot, MAP_SHARED, h->fd, (off_t)(gfn << PAGE_SHIFT));
    return address == MAP_FAILED ? NULL : address;
}

/* --- the kernel's word that this is Xen, for libvmi; preloaded, this comes before libc's --- */

EXPORT FILE *fopen(const char *path, const char *mode)
{
    static const char *const files[][2] = {
        { "/sys/hypervisor/type", "xen\n" },
        { "/sys/hypervisor/version/major", "4\n" },
        { "/sys/hypervisor/version/minor", "17\n" },
    };
    FILE *(*real)(const char *, const char *);

    for (size_t i = 0; i < sizeof(files) / sizeof(files[0]); i++) {
        if (!strcmp(path, files[i][0]))
            return fmemopen((void *)files[i][1], strlen(files[i][1]), "r");
    }
    *(void **)&real = dlsym(RTLD_NEXT, "fopen");
    return real(path, mode);
}

/* --- libxenforeignmemory: frames in a row, as everybody asks for them --- */

EXPORT handle *xenforeignmemory_open(void *logger, unsigned flags)
{
    (void)logger, (void)flags;
    return open_image();
}

EXPORT int xenforeignmemory_close(handle *h)
{
    return close_image(h);
}

EXPORT void *xenforeignmemory_map(handle *h, uint32_t domid, int prot, size_t pages,
                                  const xen_pfn_t arr[], int err[])
{
    for (size_t i = 0; i < pages; i++) {
        if (arr[i] != arr[0] + i) {
            errno = EOPNOTSUPP;
            return NULL;
        }
    }
    if (err)
        memset(err, 0, pages * sizeof(*err));
    return map(h, domid, prot, arr[0], pages);
}

EXPORT int xenforeignmemory_unmap(handle *h, void *address, size_t pages)
{
    (void)h;
    return munmap(address, pages << PAGE_SHIFT);
}

/* --- libxenctrl --- */

EXPORT handle *xc_interface_open(void *logger, void *dombuild_logger, unsigned flags)
{
    (void)logger, (void)dombuild_logger, (void)flags;
    return open_image();
}

EXPORT int xc_interface_close(handle *h)
{
    return close_image(h);
}

EXPORT int xc_version(handle *h, int command, void *argument)
{
    (void)h, (void)argument;
    return command == XENVER_VERSION ? VERSION : 0;
}

EXPORT int xc_domain_getinfolist(handle *h, uint32_t first, unsigned count, domaininfo *info)
{
    if (!count || first > DOMID)
        return 0;
    info->domain = DOMID;
    info->flags = HVM_GUEST;
    info->tot_pages = info->max_pages = h->pages;
    return 1;
}

EXPORT int xc_domain_maximum_gpfn(handle *h, uint32_t domid, xen_pfn_t *gpfn)
{
    (void)domid;
    *gpfn = h->pages - 1;
    return 0;
}

EXPORT void *xc_map_foreign_range(handle *h, uint32_t domid, int size, int prot, unsigned long gfn)
{
    return map(h, domid, prot, gfn, ((size_t)size + PAGE_SIZE - 1) >> PAGE_SHIFT);
}

EXPORT void *xc_monitor_enable(handle *h, uint32_t domid, uint32_t *port)
{
    void *page = mmap(NULL, PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    (void)h, (void)domid;
    *port = 1;
    return page == MAP_FAILED ? NULL : page;
}

#define SUCCEEDS(name) EXPORT int name(void) { return 0; }

SUCCEEDS(xc_monitor_disable)
SUCCEEDS(xc_domain_pause)
SUCCEEDS(xc_domain_unpause)
SUCCEEDS(xc_domain_setmaxmem)
SUCCEEDS(xc_clear_last_error)

/* --- libxenevtchn: microvmi binds a channel for events, which never come --- */

EXPORT handle *xenevtchn_open(void *logger, unsigned flags)
{
    (void)logger, (void)flags;
    return open_image();
}

EXPORT int xenevtchn_close(handle *h)
{
    return close_image(h);
}

EXPORT int xenevtchn_fd(handle *h)
{
    return h->fd;
}

EXPORT int xenevtchn_bind_interdomain(handle *h, uint32_t domid, uint32_t port)
{
    (void)h, (void)domid, (void)port;
    return 1;
}

SUCCEEDS(xenevtchn_unbind)
SUCCEEDS(xenevtchn_notify)
SUCCEEDS(xenevtchn_unmask)

/* --- libxenstore --- */

EXPORT handle *xs_open(unsigned long flags)
{
    (void)flags;
    return open_image();
}

EXPORT void xs_close(handle *h)
{
    if (h)
        close_image(h);
}

/* One block with the pointer and the string, as the caller frees the block alone. */
EXPORT char **xs_directory(handle *h, uint32_t transaction, const char *path, unsigned *count)
{
    char **entries = malloc(sizeof(*entries) + sizeof("3"));

    (void)h, (void)transaction, (void)path;
    if (!entries)
        return NULL;
    entries[0] = strcpy((char *)(entries + 1), "3");
    *count = 1;
    return entries;
}

EXPORT void *xs_read(handle *h, uint32_t transaction, const char *path, unsigned *length)
{
    const char *value = strcmp(path, "/local/domain/3/name") ? NULL : "guest";

    (void)h, (void)transaction;
    if (!value) {
        errno = ENOENT;
        return NULL;
    }
    if (length)
        *length = (unsigned)strlen(value);
    return strdup(value);
}

/* --- looked up, and not needed for reading --- */

#define LACKS(name) EXPORT int name(void) { errno = ENOSYS; return -1; }

LACKS(xc_altp2m_change_gfn)
LACKS(xc_altp2m_create_view)
LACKS(xc_altp2m_destroy_view)
LACKS(xc_altp2m_get_domain_state)
LACKS(xc_altp2m_set_domain_state)
LACKS(xc_altp2m_set_mem_access)
LACKS(xc_altp2m_set_mem_access_multi)
LACKS(xc_altp2m_set_vcpu_enable_notify)
LACKS(xc_altp2m_switch_to_view)
LACKS(xc_domain_cacheflush)
LACKS(xc_domain_debug_control)
LACKS(xc_domain_decrease_reservation_exact)
LACKS(xc_domain_get_tsc_info)
LACKS(xc_domain_hvm_getcontext)
LACKS(xc_domain_hvm_getcontext_partial)
LACKS(xc_domain_hvm_setcontext)
LACKS(xc_domain_populate_physmap_exact)
LACKS(xc_domain_set_access_required)
LACKS(xc_domctl)
LACKS(xc_error_code_to_desc)
LACKS(xc_get_last_error)
LACKS(xc_get_mem_access)
LACKS(xc_getcpuinfo)
LACKS(xc_hvm_inject_trap)
LACKS(xc_hvm_param_get)
LACKS(xc_hvm_param_set)
LACKS(xc_map_foreign_pages)
LACKS(xc_monitor_cpuid)
LACKS(xc_monitor_debug_exceptions)
LACKS(xc_monitor_descriptor_access)
LACKS(xc_monitor_emul_unimplemented)
LACKS(xc_monitor_get_capabilities)
LACKS(xc_monitor_guest_request)
LACKS(xc_monitor_io)
LACKS(xc_monitor_mov_to_msr)
LACKS(xc_monitor_privileged_call)
LACKS(xc_monitor_resume)
LACKS(xc_monitor_singlestep)
LACKS(xc_monitor_software_breakpoint)
LACKS(xc_monitor_vmexit)
LACKS(xc_monitor_write_ctrlreg)
LACKS(xc_domain_getinfo)
LACKS(xc_physinfo)
LACKS(xc_get_cpufreq_avgfreq)
LACKS(xc_pm_get_cxstat)
LACKS(xc_pm_get_max_cx)
LACKS(xc_pm_get_max_px)
LACKS(xc_pm_get_pxstat)
LACKS(xc_set_mem_access)
LACKS(xc_vcpu_getcontext)
LACKS(xc_vcpu_getinfo)
LACKS(xc_vcpu_setcontext)
LACKS(xc_vm_event_get_version)
LACKS(xenevtchn_pending)
LACKS(xs_fileno)
LACKS(xs_is_domain_introduced)
LACKS(xs_read_watch)
LACKS(xs_unwatch)
LACKS(xs_watch)
