"""What the backends of saved guests share: memory that lies in a file, in runs of pages."""

from __future__ import annotations

import abc
import errno as _errno
import logging
import os
from collections.abc import Iterable, Iterator
from typing import ClassVar

from .. import flat
from ..address import PAGE_MASK, PAGE_SHIFT
from ..backend import Backend
from ..binding import libc
from ..errors import (
    ClosedError,
    CorruptImageError,
    UnsupportedOperationError,
    XenCallError,
    XenMapCacheError,
)
from ..escape import printable
from ..files.image import ImageFile
from ..files.runs import MAX_FRAGMENTS, Layout, Run, clip
from ..formats.spans import Span
from ..mapping import Mapping, PageErrors

logger = logging.getLogger("xenmapcache")

_ZEROS = memoryview(bytes(1 << 18))
_MIN_MAPPED_PAGES = 16
"""A shorter run is read into a window: that is faster, and the kernel limits mappings (65,530)."""
_MAX_LISTED = 1024
"""Partial pages that :meth:`SpanBackend.describe` lists."""


class ImageBackend(Backend):
    """A guest's memory in a file, read-only.

    A range of memory that lies in the file as it is, page-aligned, is mapped from the file.
    Other ranges are read into memory of this process. See :class:`.ImageFile` for what happens
    when the file changes.

    Attributes:
        path: of the file.
        warnings: a tuple of sentences about the parts of the file that cannot be used.

    Synchronization: all methods may be called in any threads at once.
    """

    _maps_file: ClassVar[bool] = True
    """Whether a run's offset is where its pages lie in the file as they are."""

    def __init__(self, file: ImageFile) -> None:
        self._file = file
        self.path = file.path
        self.warnings: tuple[str, ...] = ()
        self._pid = os.getpid()
        self._closed = False

    @abc.abstractmethod
    def runs(self, gfn: int, count: int) -> Iterator[Run]:
        """Return the runs of a range's present pages, in ascending order, without overlaps."""

    def present(self, gfn: int, count: int) -> Iterator[tuple[int, int]]:
        """Return the present pages of a range; see :meth:`Backend.present`."""
        first = end = gfn
        for run in self.runs(gfn, count):
            if run.gfn != end:
                if end > first:
                    yield first, end - first
                first = run.gfn
            end = run.gfn + run.pages
        if end > first:
            yield first, end - first

    def copies(self, gfn: int, count: int) -> bool:
        """Tell whether a range would be read instead of mapped; see :meth:`Backend.copies`."""
        if self._closed or os.getpid() != self._pid:
            return False  # map() says why it does not work
        if not (self._maps_file and self._file.maps(count << PAGE_SHIFT)):
            return True
        run = next(self.runs(gfn, count), None)
        return run is None or run.pages < count or bool(run.offset & PAGE_MASK)

    def copied_pages(self, gfn: int, count: int) -> int:
        """Return how many pages a window copies; see :meth:`Backend.copied_pages`.

        Runs that are not page-aligned in the file, and those of fewer than 16 pages, for each of
        which the kernel would keep a mapping.
        """
        if self._closed or os.getpid() != self._pid:
            return 0  # map_into() says why it does not work
        largest = self._largest_map()
        return sum([run.pages for run in self.runs(gfn, count) if not _is_mappable(run, largest)])

    def map_into(self, mapping: Mapping, gfn: int, count: int) -> PageErrors | None:
        """Map guest pages over a part of a window, or read them; see :meth:`Backend.map_into`."""
        self._check_open()
        largest = self._largest_map()
        runs = list(self.runs(gfn, count))
        begin = gfn
        copied: list[Run] = []
        for run in (*runs, Run(gfn + count, 0, 0)):
            if run.pages and not _is_mappable(run, largest):
                copied.append(run)
                continue
            if copied:  # all between two mapped runs, so that the kernel keeps one area for it
                self._copy_into(mapping, begin, run.gfn - begin, copied)
                copied.clear()
            begin = run.gfn + run.pages
            position = run.gfn - mapping.gfn << PAGE_SHIFT
            self._check_open()
            if run.pages and not self._file.map_over(mapping, position, run.offset, run.pages):
                hint = f"{self.path} is opened for writing by another program"
                raise XenCallError("mmap", None, _errno.EAGAIN, hint)
        errors = _errors(runs, gfn, count)
        return None if errors is None else PageErrors(errors, "map", None)

    def _largest_map(self) -> int:
        """Return how much of the file can be mapped in one piece; 0 if nothing."""
        return self._file.largest_map() if self._maps_file else 0

    def _copy_into(self, mapping: Mapping, gfn: int, count: int, runs: list[Run]) -> None:
        """Read runs into a part of a window, of which nothing is mapped."""
        start = gfn - mapping.gfn << PAGE_SHIFT
        self._fill(gfn, flat.writable(mapping, start, count << PAGE_SHIFT), runs)

    def map(self, gfn: int, count: int, *, writable: bool) -> Mapping:
        """Map guest pages, or read them; see :meth:`Backend.map`.

        Raises:
            UnsupportedOperationError: `writable` is true.
            CorruptImageError: the file has changed since it was opened.
            XenCallError: mmap failed, or the file cannot be read.
            ClosedError: the backend is closed.
        """
        self._check_open()
        if writable:
            raise UnsupportedOperationError(f"{self.path}: the backend {self.name!r} is read-only")
        runs = list(self.runs(gfn, count))
        whole = self._maps_file and len(runs) == 1 and runs[0].pages == count
        if whole and not runs[0].offset & PAGE_MASK:
            mapping = self._file.map(runs[0].offset, gfn, count)
            if mapping is not None:
                return mapping
        in_file = all(run.fragments is None for run in runs)
        mapping = _allocate(gfn, count, _errors(runs, gfn, count), at_once=in_file)
        try:
            libc.dont_fork(mapping.address, mapping.length)
            self._fill(gfn, memoryview(mapping.memory).cast("B"), runs)
        except XenMapCacheError as error:
            failure = error.with_traceback(None)  # whose frames would keep the memory
            failure.__context__ = None
        else:
            return mapping
        try:
            raise failure
        finally:
            del mapping, failure

    def read_pages(self, gfn: int, buffer: memoryview) -> bool:
        """Read pages from the file into a buffer; see :meth:`Backend.read_pages`.

        That takes half the time of mapping them and touching each page.

        Raises:
            CorruptImageError: the file has changed since it was opened.
            XenCallError: the file cannot be read.
            ClosedError: the backend is closed.
        """
        self._check_open()
        count = len(buffer) >> PAGE_SHIFT
        runs = list(self.runs(gfn, count))
        if sum(run.pages for run in runs) != count:
            return False
        for start in range(0, len(buffer), len(_ZEROS)):
            part = buffer[start : start + len(_ZEROS)]
            part[:] = _ZEROS[: len(part)]
        self._fill(gfn, buffer, runs)
        return True

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"this backend of {self.path} is closed")
        if os.getpid() != self._pid:
            raise ClosedError(
                f"this backend of {self.path} belongs to process {self._pid}, which forked this one"
            )

    def _fill(self, gfn: int, memory: memoryview, runs: list[Run]) -> None:
        """Fill memory of zeros, which begins with the page `gfn`, with what the file has of it."""
        for run in runs:
            start = run.gfn - gfn << PAGE_SHIFT
            if run.fragments is not None:
                for place, length, offset in run.fragments:
                    self._file.read_into(offset, memory[start + place : start + place + length])
                continue
            size = min(run.pages << PAGE_SHIFT, self._file.size - run.offset)
            self._file.read_into(run.offset, memory[start : start + size])
        self._file.check()  # or what was read may be half old and half new

    def warn(self, *texts: str) -> None:
        """Log sentences about the file at WARNING, and keep them in :attr:`warnings`."""
        self.warnings += texts
        for text in texts:
            logger.warning("%s: %s", printable(self.path), printable(text))

    def close(self) -> None:
        """End mapping; see :meth:`Backend.close`."""
        self._closed = True
        self._file.close()


class SpanBackend(ImageBackend):
    """A guest's memory in a file that has it in ranges, which may begin and end in any byte.

    A page exists if the file has a part of it. Its other bytes read as zeros.

    Attributes:
        partial_pages: a tuple of :class:`.PartialPage`: those that the file has only in part.
    """

    def _take(self, spans: Iterable[Span], no_memory: str) -> None:
        """Take over the memory that a file has, and warn of what is missing.

        Raises:
            CorruptImageError: there is no memory.
        """
        layout = Layout(spans)
        if not layout.runs:
            raise CorruptImageError(f"{self.path}: {no_memory}")
        self._runs = layout.runs
        last = self._runs[-1]
        self.memory_end = last.gfn + last.pages << PAGE_SHIFT
        self.partial_pages = tuple(layout.partial)
        if layout.lost_bytes:
            self.warn(
                f"is truncated: {layout.lost_bytes:#x} bytes of its memory are missing, and "
                f"{_pages(layout.lost_pages)} missing because of that"
            )
        if layout.dropped:
            self.warn(
                f"{_pages(layout.dropped)} missing, although the file has parts of them: at most "
                f"{MAX_FRAGMENTS} parts are read"
            )
        if self.partial_pages:
            missing = sum(page.missing for page in self.partial_pages)
            self.warn(
                f"{_pages(len(self.partial_pages))} in the file only in part: "
                f"{missing} of their bytes are missing, and read as zeros "
                f"(the first page is at {self.partial_pages[0].gfn << PAGE_SHIFT:#x})"
            )

    def runs(self, gfn: int, count: int) -> Iterator[Run]:
        """Yield the runs of a range of pages; see :meth:`ImageBackend.runs`."""
        return clip(self._runs, gfn, count)

    def describe(self) -> dict[str, object]:
        """Return the pages that the file has in part; see :meth:`Backend.describe`."""
        if not self.partial_pages:
            return {}
        return {
            "partial_pages": [
                {"page": f"{page.gfn << PAGE_SHIFT:#x}", "missing_bytes": page.missing}
                for page in self.partial_pages[:_MAX_LISTED]
            ]
        }


def _is_mappable(run: Run, largest: int) -> bool:
    """Tell whether a window maps a run; `largest` is how much of the file it can map at once."""
    return (
        run.fragments is None
        and not run.offset & PAGE_MASK
        and run.pages >= _MIN_MAPPED_PAGES
        and run.pages << PAGE_SHIFT <= largest
    )


def _pages(count: int) -> str:
    return "1 page is" if count == 1 else f"{count} pages are"


def _allocate(gfn: int, count: int, errors: bytes | None, *, at_once: bool) -> Mapping:
    """Return pages of this process's own memory, zeroed, as a mapping of guest pages."""
    length = count << PAGE_SHIFT
    allocated: list[int] = []
    try:
        at_once = at_once and errors is None
        address = libc.allocate(length, at_once=at_once, result_out=allocated)
        return Mapping(address, gfn, count, writable=False, errors=errors, result_out=allocated)
    finally:
        for address in allocated:  # interrupted, and no mapping has taken the memory over
            libc.munmap(address, length)


def _errors(runs: list[Run], gfn: int, count: int) -> bytes | None:
    """Return the pages' errnos: those in no run are not there, as Xen says it."""
    if sum(run.pages for run in runs) == count:
        return None
    errors = bytearray([_errno.EINVAL]) * count
    for run in runs:
        errors[run.gfn - gfn : run.gfn - gfn + run.pages] = bytes(run.pages)
    return bytes(errors)
