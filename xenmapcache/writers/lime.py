"""Writing a guest's memory as LiME does: ranges, each after a header of its own."""

from __future__ import annotations

import os

from ..address import PAGE_SHIFT
from ..backend import Backend
from ..cache import MapCache
from ..files.atomic import new_file
from ..formats.lime import HEADER, MAGIC, VERSION
from .guest import Guest, Progress
from .sparse import write_all, write_but_zeros


def write_lime(
    source: Backend | MapCache,
    path: str | os.PathLike[str],
    *,
    length: int | str | None = None,
    progress: Progress | None = None,
) -> int:
    """Write a guest's memory to a LiME file (version 1), with a range for each run of pages.

    Otherwise as :func:`write_coredump`: pages of zeros take no room on the disk, and the file
    appears when it is complete.

    Args:
        source: an open source of guest memory. Of a cache, the pages that its backend has now are
            written, and mapped within its ``max_resident``.
        path: of the file. It is readable by its owner only.
        length: how far to go, in bytes or as ``"4GiB"``; by default to the end of memory.
        progress: called as ``progress(done, total)``, in bytes of guest addresses.

    Returns:
        How many pages are in the file.

    Raises:
        TypeError, ValueError: an argument is wrong, or the source does not know its end and
            no length is given.
        OSError: the file cannot be written.
        XenMapCacheError: as mapping the source raises.
    """
    guest = Guest(source, length)
    pages = offset = header = first = end = 0
    with new_file(path) as fd:
        for gfn, data in guest.pages(progress):
            if gfn != end or not offset:
                _finish(fd, header, first, end)
                header, first = offset, gfn
                offset += HEADER.size
            write_but_zeros(fd, data, offset)
            offset += len(data)
            pages += len(data) >> PAGE_SHIFT
            end = gfn + (len(data) >> PAGE_SHIFT)
        os.ftruncate(fd, offset)
        _finish(fd, header, first, end)
    return pages


def _finish(fd: int, offset: int, first: int, end: int) -> None:
    """Write the header of a range of pages, whose end is now known; nothing for no pages."""
    if end > first:
        header = HEADER.pack(MAGIC, VERSION, first << PAGE_SHIFT, (end << PAGE_SHIFT) - 1, 0)
        write_all(fd, header, offset)
