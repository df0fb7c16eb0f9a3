"""ImageFile: a file that must not change while it is open, and is mapped without risk."""

# Theory of operation
#
# An ImageFile is open or closed; `_lease` is its only state. Every call takes the FileLease once,
# into a local variable, and works with that one alone. The FileLease owns the descriptor. So a
# thread that reads while another one closes the file keeps the descriptor by its reference, and
# what is mapped keeps it by its record in the table of live mappings. Nothing is counted, and
# there is no lock that an interrupt could leave held.
#
#   open --close (one store)--> closed; the descriptor is closed when the last user has dropped it
#
# map() maps first, enters the range into the table, and looks last: at the file lease, then at the
# file's size and time. If both are as they were, then every later change of the file begins with
# a lease break, and the guard finds the range in the table (see filelease.py). If not, the mapping
# is dropped: nobody has seen it, and nobody has touched its pages.
#
# map_over() does the same for a part of memory that has its record already. If the file lease is
# not intact, the caller drops all of that memory. It may not map or read anything over the part:
# the guard may be putting a copy there.
#
# No frame that an exception's traceback may keep has a reference to a mapping or a descriptor:
# each function deletes its own on the way out.

from __future__ import annotations

import os
import resource
import sys
import time
import warnings
from collections.abc import Sequence
from functools import partial

from .. import flat
from ..address import PAGE_MASK, PAGE_SHIFT
from ..binding import libc
from ..errors import ClosedError, CorruptImageError, XenCallError
from ..mapping import Mapping, sweep
from .filelease import FileLease, MappedPart, MappedParts, MappedRange
from .guard import image_guard
from .regular import is_foreign, open_regular

_IOV_MAX = os.sysconf("SC_IOV_MAX")
_TICK_NS = 20_000_000
"""More than the resolution of a file's time on kernels before 6.13."""


class ImageFile:
    """An open file of guest memory.

    Args:
        path: of a regular file.

    Attributes:
        path: as given.
        size: in bytes, when the file was opened.
        mtime_ns: the file's time of change then.

    Raises:
        OSError: the file cannot be opened.
        ValueError: the file is not a regular file.

    Synchronization: all methods may be called in any threads at once.
    """

    _lease: FileLease | None = None

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fsdecode(path)
        file = open_regular(path)
        age = time.time_ns() - os.fstat(file.fileno()).st_mtime_ns
        if 0 <= age < _TICK_NS:  # or the next change might leave the file with the same time
            time.sleep((_TICK_NS - age) / 1e9)
        lease = self._lease = FileLease(file, self.path, image_guard)
        self.size = lease.size
        self.mtime_ns = lease.mtime_ns

    def _open_lease(self) -> FileLease:
        """Return what owns the descriptor; a reference to it keeps the descriptor open."""
        lease = self._lease
        if lease is None or lease.file.closed:
            raise ClosedError(f"{self.path} is closed")
        return lease

    def check(self) -> None:
        """Raise CorruptImageError if the file has changed since it was opened."""
        lease = self._open_lease()
        try:
            changed = lease.change()
            if changed:
                raise changed
        finally:
            del lease

    def read(self, offset: int, length: int) -> bytes:
        """Return bytes of the file.

        Raises:
            CorruptImageError: the file ends before; nothing was allocated.
            XenCallError: the bytes cannot be read.
        """
        self._check_inside(offset, length)
        chunks: list[bytes] = []
        lease = self._open_lease()
        try:
            while length:
                chunk = os.pread(lease.file.fileno(), length, offset)
                if len(chunk) == length and not chunks:
                    return chunk  # as nearly always; indexes are read in many small parts
                if not chunk:
                    raise self._ends_at(offset, length)
                chunks.append(chunk)
                offset += len(chunk)
                length -= len(chunk)
        except OSError as error:
            if is_foreign(error):
                raise
            raise self._unreadable(offset, length, error) from None
        finally:
            del lease
        return b"".join(chunks)

    def read_into(self, offset: int, *views: memoryview) -> None:
        """Fill views, one after the other, with the file's bytes from an offset on.

        Raises:
            CorruptImageError: the file ends before.
            XenCallError: the bytes cannot be read.
        """
        length = sum(view.nbytes for view in views)
        self._check_inside(offset, length)
        remaining = list(views)
        lease = self._open_lease()
        try:
            while length:
                count = os.preadv(lease.file.fileno(), remaining[:_IOV_MAX], offset)
                if not count:
                    raise self._ends_at(offset, length)
                offset += count
                length -= count
                remaining = _after(remaining, count)
        except OSError as error:
            if is_foreign(error):
                raise
            raise self._unreadable(offset, length, error) from None
        finally:
            del lease, remaining

    def _check_inside(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise CorruptImageError(
                f"{self.path}: {length:#x} bytes at {offset:#x} are wanted, and the file ends at "
                f"{self.size:#x}"
            )

    def _ends_at(self, offset: int, length: int) -> CorruptImageError:
        return CorruptImageError(
            f"{self.path} ends at {offset:#x} now: it has changed since it was opened, and "
            f"{length:#x} more bytes are wanted"
        )

    def _unreadable(self, offset: int, length: int, error: OSError) -> XenCallError:
        return XenCallError(
            "pread", None, error.errno or 0, f"{length:#x} bytes at {offset:#x} of {self.path}"
        )

    def maps(self, length: int) -> bool:
        """Tell whether `length` bytes would be mapped now, and not read."""
        lease = self._open_lease()
        try:
            return lease.take() and length <= _largest_copy()
        finally:
            del lease

    def largest_map(self) -> int:
        """Return how many bytes can be mapped in one piece now; 0 if the file is read instead."""
        lease = self._open_lease()
        try:
            return _largest_copy() if lease.take() else 0
        finally:
            del lease

    def map_over(self, mapping: Mapping, position: int, offset: int, count: int) -> bool:
        """Map consecutive pages of the file over a part of memory of :mod:`.flat`.

        Args:
            mapping: the memory.
            position: of the part in it, in bytes.
            offset: of the first page in the file, in bytes, page-aligned.
            count: pages, of which the file has the last one at least in part.

        Returns:
            False if another program opens the file for writing, so that the pages must be read
            instead. The memory is to be dropped then: the image guard may be replacing it.

        Raises:
            CorruptImageError: the file has changed, or ends before.
            XenCallError: mmap failed.
        """
        length = count << PAGE_SHIFT
        self._check_inside(offset, max(1, length - PAGE_MASK))
        lease = self._open_lease()
        try:
            if not lease.take() or length > _largest_copy():
                return False
            flat.place(mapping, position, length, partial(_map_at, lease, offset, length))
            libc.dont_fork(mapping.address + position, length)
            parts = _parts_of(mapping, lease)
            parts.append(MappedPart(position, length, offset))
            if not lease.is_intact():
                return False
            changed = lease.change()
            if changed:
                raise changed
            return parts.claim()
        finally:
            del lease, mapping

    def map(self, offset: int, gfn: int, count: int) -> Mapping | None:
        """Map guest pages that follow each other in the file.

        Args:
            offset: of the first page in the file, in bytes, page-aligned.
            gfn: the first guest frame number.
            count: pages, of which the file has the last one at least in part.

        Returns:
            The mapping, or None if the pages must be read instead.

        Raises:
            CorruptImageError: the file has changed, or ends before.
            XenCallError: mmap failed.
        """
        length = count << PAGE_SHIFT
        self._check_inside(offset, max(1, length - PAGE_MASK))
        lease = self._open_lease()
        mapping = None
        mapped = MappedRange(lease, offset)
        try:
            if not lease.take() or length > _largest_copy():
                return None
            mapping = _map(mapped, lease, gfn, count)
            libc.dont_fork(mapping.address, length)
            if not lease.is_intact():
                return None
            changed = lease.change()
            if changed:
                raise changed
            return mapping if mapped.claim() else None
        finally:
            del lease, mapping, mapped

    def close(self) -> None:
        """End reading and mapping. Idempotent.

        What is mapped stays, and keeps the file lease.
        """
        self._lease = None
        sweep()  # a finalizer that was interrupted may have left a mapping, which keeps the file

    def __del__(self) -> None:
        if self._lease is not None and not self._lease.file.closed:
            warnings.warn(f"unclosed image {self.path}", ResourceWarning, stacklevel=1, source=self)


def _map(mapped: MappedRange, lease: FileLease, gfn: int, count: int) -> Mapping:
    """Map a range of a file, and enter it into the table of live mappings."""
    length = count << PAGE_SHIFT
    found: list[int] = []
    try:
        fd = lease.file.fileno()
        address = libc.map_file(fd, mapped.offset, length, writable=False, result_out=found)
        return Mapping(
            address, gfn, count, writable=False, errors=None, result_out=found, keeps=mapped
        )
    finally:
        for address in found:  # interrupted, and no mapping has taken the memory over
            libc.munmap(address, length)
        del lease, mapped


def _map_at(
    lease: FileLease, offset: int, length: int, address: int, result_out: list[int]
) -> None:
    """Map a range of a file at an address, in place of what it has."""
    fd = lease.file.fileno()
    libc.map_file(fd, offset, length, writable=False, address=address, result_out=result_out)


def _parts_of(mapping: Mapping, lease: FileLease) -> MappedParts:
    """Return what the table of live mappings has of what is mapped over some memory."""
    keeps = mapping.record.keeps
    if not isinstance(keeps, MappedParts):
        keeps = mapping.record.keeps = MappedParts(lease)
    return keeps


def _largest_copy() -> int:
    """Return how large a file this process may write, and so a copy may be (ulimit -f)."""
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    return sys.maxsize if limit == resource.RLIM_INFINITY else limit


def _after(views: Sequence[memoryview], count: int) -> list[memoryview]:
    """Return what of some views comes after ``count`` bytes."""
    for number, view in enumerate(views):
        if count < view.nbytes:
            return [view[count:], *views[number + 1 :]]
        count -= view.nbytes
    return []
