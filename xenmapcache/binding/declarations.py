"""The C that this package calls, written down once.

Each library's ``source`` is plain C, in the words of the header it names.
``build_ffi.py`` hands it to cffi, :mod:`.ctypes_loader` reads it with
:func:`prototypes`, and a test compiles it against the real headers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from types import MappingProxyType
from typing import NamedTuple

TYPES = """
typedef uint64_t xen_pfn_t;
typedef uint16_t domid_t;
typedef uint32_t evtchn_port_t;
typedef struct xentoollog_logger xentoollog_logger;
"""


class Library(NamedTuple):
    """One shared library: how it is found, and what is called in it.

    Attributes:
        name: as people call it.
        soname: what the dynamic linker is asked for; with a ``*`` where the name
            carries Xen's release and has to be searched for; empty for libc.
        package: a distribution's package, for messages.
        includes: the C lines that bring the real declarations.
        source: our copy of them.
    """

    name: str
    soname: str
    package: str
    includes: str
    source: str


FOREIGN_MEMORY = Library(
    name="libxenforeignmemory",
    soname="libxenforeignmemory.so.1",
    package="libxenforeignmemory1",
    includes="#include <xenforeignmemory.h>",
    source="""
typedef struct xenforeignmemory_handle xenforeignmemory_handle;
typedef struct xenforeignmemory_resource_handle xenforeignmemory_resource_handle;
/* VERS_1.0, Xen 4.7 */
xenforeignmemory_handle *xenforeignmemory_open(xentoollog_logger *logger, unsigned open_flags);
int xenforeignmemory_close(xenforeignmemory_handle *fmem);
void *xenforeignmemory_map(xenforeignmemory_handle *fmem, uint32_t dom, int prot, size_t pages,
                           const xen_pfn_t arr[], int err[]);
int xenforeignmemory_unmap(xenforeignmemory_handle *fmem, void *addr, size_t pages);
/* VERS_1.1, Xen 4.9 */
int xenforeignmemory_restrict(xenforeignmemory_handle *fmem, domid_t domid);
/* VERS_1.2, Xen 4.10 */
void *xenforeignmemory_map2(xenforeignmemory_handle *fmem, uint32_t dom, void *addr, int prot,
                            int flags, size_t pages, const xen_pfn_t arr[], int err[]);
/* VERS_1.3, Xen 4.11 */
xenforeignmemory_resource_handle *xenforeignmemory_map_resource(
    xenforeignmemory_handle *fmem, domid_t domid, unsigned type, unsigned id,
    unsigned long frame, unsigned long nr_frames, void **paddr, int prot, int flags);
int xenforeignmemory_unmap_resource(xenforeignmemory_handle *fmem,
                                    xenforeignmemory_resource_handle *fres);
/* VERS_1.4, Xen 4.15 */
int xenforeignmemory_resource_size(xenforeignmemory_handle *fmem, domid_t domid, unsigned type,
                                   unsigned id, size_t *size);
""",
)

CONTROL = Library(
    name="libxenctrl",
    soname="libxenctrl.so.*",
    package="libxenmisc4.17, where 4.17 is Xen's release",
    # The last function is for Xen's other libraries: exported, and in no header that is installed.
    includes="#define XC_WANT_COMPAT_MAP_FOREIGN_API\n#include <xenctrl.h>\n"
    "int xc_get_pfn_type_batch(xc_interface *, uint32_t, unsigned, xen_pfn_t *);",
    source="""
typedef struct xc_interface_core xc_interface;
xc_interface *xc_interface_open(xentoollog_logger *logger, xentoollog_logger *dombuild_logger,
                                unsigned open_flags);
int xc_interface_close(xc_interface *xch);
void *xc_map_foreign_bulk(xc_interface *xch, uint32_t dom, int prot, const xen_pfn_t *arr,
                          int *err, unsigned num);
int xc_domain_maximum_gpfn(xc_interface *xch, uint32_t domid, xen_pfn_t *gpfns);
typedef struct xen_domctl_getdomaininfo xc_domaininfo_t;
int xc_domain_getinfolist(xc_interface *xch, uint32_t first_domain, unsigned max_domains,
                          xc_domaininfo_t *info);
int xc_domain_pause(xc_interface *xch, uint32_t domid);
int xc_domain_unpause(xc_interface *xch, uint32_t domid);
int xc_get_pfn_type_batch(xc_interface *xch, uint32_t dom, unsigned num, xen_pfn_t *arr);
""",
)

DEVICE_MODEL = Library(
    name="libxendevicemodel",
    soname="libxendevicemodel.so.1",
    package="libxendevicemodel1",
    includes="#include <xendevicemodel.h>",
    source="""
typedef uint16_t ioservid_t;
typedef struct xendevicemodel_handle xendevicemodel_handle;
/* VERS_1.0, Xen 4.9 */
xendevicemodel_handle *xendevicemodel_open(xentoollog_logger *logger, unsigned open_flags);
int xendevicemodel_close(xendevicemodel_handle *dmod);
int xendevicemodel_create_ioreq_server(xendevicemodel_handle *dmod, domid_t domid,
                                       int handle_bufioreq, ioservid_t *id);
int xendevicemodel_destroy_ioreq_server(xendevicemodel_handle *dmod, domid_t domid,
                                        ioservid_t id);
int xendevicemodel_set_ioreq_server_state(xendevicemodel_handle *dmod, domid_t domid,
                                          ioservid_t id, int enabled);
int xendevicemodel_get_ioreq_server_info(xendevicemodel_handle *dmod, domid_t domid,
                                         ioservid_t id, xen_pfn_t *ioreq_gfn,
                                         xen_pfn_t *bufioreq_gfn, evtchn_port_t *bufioreq_port);
int xendevicemodel_map_io_range_to_ioreq_server(xendevicemodel_handle *dmod, domid_t domid,
                                                ioservid_t id, int is_mmio,
                                                uint64_t start, uint64_t end);
int xendevicemodel_unmap_io_range_from_ioreq_server(xendevicemodel_handle *dmod, domid_t domid,
                                                    ioservid_t id, int is_mmio,
                                                    uint64_t start, uint64_t end);
int xendevicemodel_map_pcidev_to_ioreq_server(xendevicemodel_handle *dmod, domid_t domid,
                                              ioservid_t id, uint16_t segment, uint8_t bus,
                                              uint8_t device, uint8_t function);
int xendevicemodel_unmap_pcidev_from_ioreq_server(xendevicemodel_handle *dmod, domid_t domid,
                                                  ioservid_t id, uint16_t segment, uint8_t bus,
                                                  uint8_t device, uint8_t function);
int xendevicemodel_modified_memory(xendevicemodel_handle *dmod, domid_t domid,
                                   uint64_t first_pfn, uint32_t nr);
int xendevicemodel_track_dirty_vram(xendevicemodel_handle *dmod, domid_t domid,
                                    uint64_t first_pfn, uint32_t nr,
                                    unsigned long *dirty_bitmap);
int xendevicemodel_inject_msi(xendevicemodel_handle *dmod, domid_t domid, uint64_t msi_addr,
                              uint32_t msi_data);
int xendevicemodel_set_isa_irq_level(xendevicemodel_handle *dmod, domid_t domid, uint8_t irq,
                                     unsigned level);
int xendevicemodel_set_pci_intx_level(xendevicemodel_handle *dmod, domid_t domid,
                                      uint16_t segment, uint8_t bus, uint8_t device,
                                      uint8_t intx, unsigned level);
/* VERS_1.3 */
int xendevicemodel_modified_memory_bulk(xendevicemodel_handle *dmod, domid_t domid,
                                        struct xen_dm_op_modified_memory_extent extents[],
                                        uint32_t nr);
/* VERS_1.4, Xen 4.15 */
int xendevicemodel_set_irq_level(xendevicemodel_handle *dmod, domid_t domid, unsigned irq,
                                 unsigned level);
int xendevicemodel_nr_vcpus(xendevicemodel_handle *dmod, domid_t domid, unsigned *vcpus);
""",
)

EVENT_CHANNEL = Library(
    name="libxenevtchn",
    soname="libxenevtchn.so.1",
    package="libxenevtchn1",
    includes="#include <xenevtchn.h>",
    source="""
typedef int xenevtchn_port_or_error_t;
typedef struct xenevtchn_handle xenevtchn_handle;
xenevtchn_handle *xenevtchn_open(xentoollog_logger *logger, unsigned flags);
int xenevtchn_close(xenevtchn_handle *xce);
int xenevtchn_fd(xenevtchn_handle *xce);
int xenevtchn_notify(xenevtchn_handle *xce, evtchn_port_t port);
xenevtchn_port_or_error_t xenevtchn_bind_interdomain(xenevtchn_handle *xce, uint32_t domid,
                                                     evtchn_port_t remote_port);
int xenevtchn_unbind(xenevtchn_handle *xce, evtchn_port_t port);
xenevtchn_port_or_error_t xenevtchn_pending(xenevtchn_handle *xce);
int xenevtchn_unmask(xenevtchn_handle *xce, evtchn_port_t port);
""",
)

GRANT_TABLE = Library(
    name="libxengnttab",
    soname="libxengnttab.so.1",
    package="libxengnttab1",
    includes="#include <xengnttab.h>",
    source="""
typedef struct xengntdev_handle xengnttab_handle;
/* VERS_1.0, Xen 4.7 */
xengnttab_handle *xengnttab_open(xentoollog_logger *logger, unsigned open_flags);
int xengnttab_close(xengnttab_handle *xgt);
void *xengnttab_map_domain_grant_refs(xengnttab_handle *xgt, uint32_t count, uint32_t domid,
                                      uint32_t *refs, int prot);
int xengnttab_unmap(xengnttab_handle *xgt, void *start_address, uint32_t count);
/* VERS_1.1, Xen 4.9 */
typedef struct xengnttab_grant_copy_segment xengnttab_grant_copy_segment_t;
int xengnttab_grant_copy(xengnttab_handle *xgt, uint32_t count,
                         xengnttab_grant_copy_segment_t *segs);
/* VERS_1.2 */
int xengnttab_fd(xengnttab_handle *xgt);
""",
)

TOOL_CORE = Library(
    name="libxentoolcore",
    soname="libxentoolcore.so.1",
    package="libxentoolcore1",
    includes="#include <xentoolcore.h>",
    source="""
int xentoolcore_restrict_all(domid_t domid);
""",
)

TOOL_LOG = Library(
    name="libxentoollog",
    soname="libxentoollog.so.1",
    package="libxentoollog1",
    includes="#include <stdio.h>\n#include <xentoollog.h>",
    source="""
typedef struct xentoollog_logger_stdiostream xentoollog_logger_stdiostream;
xentoollog_logger_stdiostream *xtl_createlogger_stdiostream(FILE *f, xentoollog_level min_level,
                                                            unsigned flags);
void xtl_logger_destroy(xentoollog_logger *logger);
""",
)

LIBC = Library(
    name="libc",
    soname="",
    package="libc6",
    includes="#include <stdio.h>\n#include <string.h>\n#include <sys/mman.h>",
    source="""
void *mmap(void *addr, size_t length, int prot, int flags, int fd, long offset);
int munmap(void *addr, size_t length);
int madvise(void *addr, size_t length, int advice);
int mprotect(void *addr, size_t length, int prot);
FILE *fdopen(int fd, const char *mode);
int setvbuf(FILE *stream, char *buf, int mode, size_t size);
int fclose(FILE *stream);
void *memmem(const void *haystack, size_t haystacklen, const void *needle, size_t needlelen);
""",
)

LIBRARIES = (
    FOREIGN_MEMORY,
    CONTROL,
    DEVICE_MODEL,
    EVENT_CHANNEL,
    GRANT_TABLE,
    TOOL_CORE,
    TOOL_LOG,
    LIBC,
)

# Types that the real headers define and our sources only use.
OPAQUE = """
typedef struct _IO_FILE FILE;
typedef int xentoollog_level;
"""


# What is passed by value; everything else is a pointer.
SCALARS = frozenset(
    {
        "int",
        "unsigned",
        "long",
        "unsigned long",
        "size_t",
        "uint8_t",
        "uint16_t",
        "uint32_t",
        "uint64_t",
        "domid_t",
        "ioservid_t",
        "evtchn_port_t",
        "xenevtchn_port_or_error_t",
        "xentoollog_level",
    }
)


class Prototype(NamedTuple):
    """A C function: the types of its result and parameters as text, ``*`` for any pointer."""

    name: str
    result: str
    parameters: tuple[str, ...]


_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_FUNCTION = re.compile(r"(?P<result>[\w\s]+?[\s*]+)(?P<name>\w+)\s*\((?P<parameters>[^()]*)\)")


def _type(text: str) -> str:
    """Return a parameter's type, or an empty string if it is not understood."""
    text = text.replace("const ", "").strip()
    if "*" in text or "[" in text:
        return "*"
    kind, _, name = text.rpartition(" ")
    return kind if kind in SCALARS and name not in SCALARS else ""


@cache
def prototypes(library: Library) -> Mapping[str, Prototype]:
    """Read a library's functions out of its C source, once.

    It understands what :data:`LIBRARIES` holds and raises ValueError for anything else.
    """
    found = {}
    for statement in _COMMENT.sub("", library.source).split(";"):
        declaration = " ".join(statement.split())
        if not declaration or declaration.startswith("typedef "):
            continue
        match = _FUNCTION.fullmatch(declaration)
        parameters = tuple(map(_type, match["parameters"].split(","))) if match else ("",)
        if match is None or "" in parameters:
            raise ValueError(f"{library.name}: cannot read the declaration {declaration!r}")
        result = "*" if "*" in match["result"] else match["result"].strip()
        if result not in SCALARS | {"*", "void"}:
            raise ValueError(f"{library.name}: cannot read the result of {declaration!r}")
        found[match["name"]] = Prototype(match["name"], result, parameters)
    return MappingProxyType(found)
