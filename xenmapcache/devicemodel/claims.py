"""Claims: Xen and the table of regions know the same ranges, whatever interrupts a claim."""

# Theory of operation
#
# A signal handler may raise after Xen has claimed a range and before this knows. So an
# interrupted claim is undone on both sides, and an interrupted release is completed on both. Xen
# refuses to release a range that it has not got: that refusal is expected then. It is safe to
# ask, because the table has no other region there as long as the server's lock is held.

from __future__ import annotations

import contextlib

from ..address import PAGE_SHIFT, as_int, check_range, page_span
from ..arch import Architecture
from ..cache import MapCache
from ..errors import ClosedError, UnsupportedOperationError, XenCallError
from ..ioreq import BUS_OFFSET, RequestKind, bdf_number
from .connection import Connection
from .regions import Region, RegionTable
from .runtime import Runtime

_PORTS = 1 << 16
_PCI_CONFIG_SIZE = 4096
_NAMES = {RequestKind.PORT: "ports", RequestKind.PCI_CONFIG: "PCI configuration space"}


def check_kind(domid: int, architecture: Architecture, kind: RequestKind) -> None:
    """Refuse a claim of what no vCPU of the guest can access by way of Xen.

    Raises:
        UnsupportedOperationError: Xen sends this guest's device memory only.
    """
    if architecture.mmio_only and kind is not RequestKind.MMIO:
        raise UnsupportedOperationError(
            f"domain {domid}: {_NAMES[kind]} cannot be claimed for an {architecture.name} guest: "
            "Xen sends a device model its device memory only; use claim_mmio"
        )


def ports(first: int, count: int) -> tuple[int, int]:
    """Return the first port and how many; ValueError if a guest has no such ports."""
    first, count = as_int("first", first), as_int("count", count)
    if count < 1:
        raise ValueError(f"count must be at least 1 port, not {count}")
    if not 0 <= first <= first + count <= _PORTS:
        raise ValueError(f"ports {first:#x}..{first + count:#x} are not within 0..{_PORTS:#x}")
    return first, count


def pci_function(bdf: str) -> tuple[int, int]:
    """Return where Xen has a function's configuration space, and its length in bytes."""
    return bdf_number(bdf) << BUS_OFFSET, _PCI_CONFIG_SIZE


def mmio(cache: MapCache, address: int, length: int) -> tuple[int, int]:
    """Return the range as it is, if the guest has no RAM there.

    A live Xen shows only by mapping which pages exist, so there it is not asked.

    Raises:
        ValueError: the guest has RAM there, so its accesses would never reach a device.
    """
    address, length = check_range(address, length)
    for gfn, _ in cache.backend.present(*page_span(address, length)) or ():
        raise ValueError(
            f"MMIO {address:#x}..{address + length:#x} covers RAM of the guest at "
            f"{gfn << PAGE_SHIFT:#x}, so the guest would never reach the device; claim addresses "
            "without RAM, or make a hole there (create_domain(holes=...))"
        )
    return address, length


def claim(runtime: Runtime, regions: RegionTable, region: Region) -> None:
    """Claim a region: an error or an interrupt leaves it unclaimed.

    Raises:
        ValueError: another region lies there.
        XenCallError: Xen refused.
        ClosedError: the server is closed, perhaps by a signal handler just now.
    """
    with runtime.lock:
        if runtime.closed:
            raise ClosedError(f"{runtime!r} cannot claim")
        connection = runtime.connection
        try:
            regions.add(region)
            if connection is not None:
                connection.link.claim(region.kind, *region.xen_range)
        except BaseException as error:
            if regions.holds(region):
                regions.remove(region)
                if not isinstance(error, XenCallError):
                    _forget(runtime, region)
            _check_closed(connection, error)
            raise


def release(runtime: Runtime, regions: RegionTable, region: Region) -> None:
    """Release a region: an interrupt leaves it released, or as it was.

    Raises:
        ValueError: it was released before.
        XenCallError: Xen refused; the region stays claimed.
        ClosedError: a signal handler has closed the server just now.
    """
    with runtime.lock:
        connection = runtime.connection
        if not regions.holds(region):
            if runtime.closed:
                raise ClosedError(f"{runtime!r} has no regions")
            raise ValueError(f"{region!r} was given back before")
        try:
            regions.remove(region)
            if connection is not None:
                connection.link.unclaim(region.kind, *region.xen_range)
        except BaseException as error:
            _check_closed(connection, error)
            if isinstance(error, XenCallError):
                regions.add(region)
            elif not regions.holds(region):
                _forget(runtime, region)
            raise


def _forget(runtime: Runtime, region: Region) -> None:
    """Have Xen release a range, if Xen has got it; a forked child leaves it to its parent."""
    connection = runtime.connection
    if connection is not None and runtime.is_ours():
        with contextlib.suppress(XenCallError):
            connection.link.unclaim(region.kind, *region.xen_range)


def _check_closed(connection: Connection | None, error: BaseException) -> None:
    """Raise ClosedError for an error that comes of closing the server in the middle."""
    if connection is not None and connection.closed and isinstance(error, Exception):
        raise ClosedError("this ioreq server was closed in the middle of a claim") from error
