"""The description that a Linux guest's kernel keeps of itself."""

from __future__ import annotations

from collections.abc import Iterator

from ..address import PAGE_MASK, PAGE_SIZE
from ..cache import MapCache
from ..errors import FaultError
from ..formats import vmcoreinfo
from ..formats.vmcoreinfo import VmcoreInfo
from . import search


def find_vmcoreinfo(
    cache: MapCache, address: int = 0, length: int | None = None
) -> VmcoreInfo | None:
    """Return the VMCOREINFO text in a Linux guest's memory, or None if it has none.

    The text is found by its first line, ``OSRELEASE=``, at the beginning of a page. If a guest
    has several, as after a reboot, the first one whose kernel is in memory counts; if that can
    be said of none of them, the first one.

    Args:
        cache: the cache to search through.
        address: guest-physical, where to begin.
        length: in bytes; None: to the end of memory.

    Raises:
        ValueError: the source does not know where its memory ends, and no length is given.
        XenMapCacheError: as :meth:`MapCache.read`, but for missing pages, which are skipped.
    """

    def read(start: int, size: int) -> bytes:
        try:
            return cache.read(start, size)
        except FaultError:
            return b""

    def candidates() -> Iterator[VmcoreInfo]:
        for place, _ in search.find(cache, vmcoreinfo.START, address, length, 1):
            if not place & PAGE_MASK:
                yield from vmcoreinfo.in_pages(read(place, PAGE_SIZE), place)

    return vmcoreinfo.choose(candidates(), read)
