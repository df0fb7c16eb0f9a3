"""What the backends of saved guests share: memory that lies in a file, in runs of pages."""

from __future__ import annotations

import abc
import errno as _errno
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import NamedTuple

from ..address import PAGE_MASK, PAGE_SHIFT
from ..backend import Backend
from ..binding import libc
from ..errors import ClosedError, UnsupportedOperationError, XenMapCacheError
from ..imagefile import ImageFile
from ..mapping import Mapping

_gfn = attrgetter("gfn")


class Run(NamedTuple):
    """Consecutive guest pages that lie one after the other in the file. Immutable.

    Attributes:
        gfn: the first guest frame number.
        pages: how many.
        offset: of the first one in the file, in bytes; need not be page-aligned.
    """

    gfn: int
    pages: int
    offset: int


class ImageBackend(Backend):
    """A guest's memory in a file, read-only.

    A stretch of memory that lies in the file as it is, page-aligned, is mapped from there;
    other stretches are read into memory of their own. See :class:`.imagefile.ImageFile` for
    what happens when the file changes.

    Attributes:
        path: of the file.

    Synchronization: all methods may be called in any threads at once.
    """

    def __init__(self, file: ImageFile) -> None:
        self._file = file
        self.path = file.path
        self._pid = os.getpid()
        self._closed = False

    @abc.abstractmethod
    def runs(self, gfn: int, count: int) -> Iterator[Run]:
        """Return what is there of a range of pages, in order of gfn, without overlaps."""

    def present(self, gfn: int, count: int) -> Iterator[tuple[int, int]]:
        """Return what is there of a range of pages; see :meth:`Backend.present`."""
        first = end = gfn
        for run in self.runs(gfn, count):
            if run.gfn != end:
                if end > first:
                    yield first, end - first
                first = run.gfn
            end = run.gfn + run.pages
        if end > first:
            yield first, end - first

    def map(self, gfn: int, count: int, *, writable: bool) -> Mapping:
        """Map guest pages, or read them; see :meth:`Backend.map`.

        Raises:
            UnsupportedOperationError: they are to be writable.
            CorruptImageError: the file has changed since it was opened.
            XenCallError: mmap failed, or the file cannot be read.
            ClosedError: the backend is closed.
        """
        if self._closed:
            raise ClosedError(f"this backend of {self.path} is closed")
        if os.getpid() != self._pid:
            raise ClosedError(
                f"this backend of {self.path} belongs to process {self._pid}, which forked this one"
            )
        if writable:
            raise UnsupportedOperationError(f"{self.path}: the backend {self.name!r} is read-only")
        runs = list(self.runs(gfn, count))
        length = count << PAGE_SHIFT
        if len(runs) == 1 and runs[0].pages == count and not runs[0].offset & PAGE_MASK:
            address = self._file.map(runs[0].offset, length)
            if address is not None:
                return Mapping(
                    address, gfn, count, writable=False, errors=None, unmap=self._file.unmap
                )
        errors = _errors(runs, gfn, count)
        address = libc.allocate(length, at_once=errors is None)
        mapping = Mapping(address, gfn, count, writable=False, errors=errors, unmap=libc.unmap)
        try:
            libc.dont_fork(address, length)
            self._fill(mapping, runs)
        except XenMapCacheError as error:
            failure = error.with_traceback(None)  # whose frames would keep the memory
            failure.__context__ = None
        else:
            return mapping
        try:
            raise failure
        finally:
            del mapping, failure

    def _fill(self, mapping: Mapping, runs: list[Run]) -> None:
        memory = memoryview(mapping.memory).cast("B")  # writable, as the mapping's own is not
        for run in runs:
            start = run.gfn - mapping.gfn << PAGE_SHIFT
            size = min(run.pages << PAGE_SHIFT, self._file.size - run.offset)
            self._file.read_into(run.offset, memory[start : start + size])
        self._file.check()  # or what was read may be half old and half new

    def close(self) -> None:
        """Map no more; see :meth:`Backend.close`."""
        self._closed = True
        self._file.close()


def clip(runs: Sequence[Run], gfn: int, count: int) -> Iterator[Run]:
    """Return those parts of runs, in order of gfn and without overlaps, that lie in a range."""
    end = gfn + count
    for position in range(max(0, bisect_right(runs, gfn, key=_gfn) - 1), len(runs)):
        run = runs[position]
        if run.gfn >= end:
            return
        skipped = max(0, gfn - run.gfn)
        pages = min(run.gfn + run.pages, end) - run.gfn - skipped
        if pages > 0:
            yield Run(run.gfn + skipped, pages, run.offset + (skipped << PAGE_SHIFT))


def _errors(runs: list[Run], gfn: int, count: int) -> bytes | None:
    """Return the pages' errnos: those in no run are not there, as Xen says it."""
    if sum(run.pages for run in runs) == count:
        return None
    errors = bytearray([_errno.EINVAL]) * count
    for run in runs:
        errors[run.gfn - gfn : run.gfn - gfn + run.pages] = bytes(run.pages)
    return bytes(errors)
