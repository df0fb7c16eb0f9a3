"""P2m: which frame is at which guest frame number, and how frames are mapped."""

# Theory of operation
#
# The table is a sorted tuple of runs (gfn, frame, pages). Pages between two runs are absent. A
# change makes a new tuple and stores it in one step, so a reader that has fetched the tuple sees
# the table of one moment and needs no lock. A guest of 64 GiB without holes is one run.
#
# Changes are made under a lock that a signal handler of the same thread may enter. The handler may
# have stored a table in between: then the change is made again, on the new table.
#
# A map call looks at the table once, at its start. If the guest gives a page up before the call
# returns, the mapping shows the old frame, as on Xen; INVALIDATE comes after that.

from __future__ import annotations

import errno as _errno
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

from .. import flat
from ..address import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE, check_range, page_span
from ..binding import libc
from ..errors import FaultError, MappingLostError, XenCallError
from ..mapping import Mapping, PageErrors
from .frames import Frames

Run = tuple[int, int, int]
"""gfn, first frame, pages."""

_FILL_BYTES = 1 << 20


class _Table(NamedTuple):
    runs: tuple[Run, ...]
    end: int


class P2m:
    """The guest's page table as Xen keeps it, and the guest's memory seen from inside.

    Args:
        frames: the machine's memory.
        domid: the domain, for errors.
        pages: how many the guest has at the start.

    Synchronization: all methods may be called in any threads and signal handlers.
    """

    def __init__(self, frames: Frames, domid: int, pages: int) -> None:
        self.frames = frames
        self._domid = domid
        self._lock = threading.RLock()
        self._table = _Table(((0, frames.allocate(pages), pages),), pages)

    @property
    def end(self) -> int:
        """One past the highest gfn that can be there."""
        return self._table.end

    def runs(self, gfn: int, count: int) -> tuple[Run, ...]:
        """Return the runs of present pages, cut to a range of pages."""
        return _cut(self._table.runs, gfn, gfn + count)

    def remove(self, gfn: int, count: int) -> int:
        """Take pages away; return how many of them were there."""
        self.frames.check_process()
        before = self._change(lambda old: _Table(_without(old.runs, gfn, gfn + count), old.end))
        return sum(pages for _, _, pages in _cut(before.runs, gfn, gfn + count))

    def add(self, gfn: int, count: int) -> None:
        """Give new, zeroed frames to the pages of a range that are absent; grow if need be."""
        self.frames.check_process()

        def filled(old: _Table) -> _Table:
            runs = list(old.runs)
            for start, pages in _gaps(old.runs, gfn, gfn + count):
                run = (start, self.frames.allocate(pages), pages)
                runs.insert(bisect_left(runs, run), run)
            return _Table(tuple(runs), max(old.end, gfn + count))

        self._change(filled)

    def restore(self, end: int, pages: dict[int, bytes]) -> None:
        """Replace the whole table: these pages are there, and no others."""
        runs: list[Run] = []
        for gfn in sorted(pages):
            frame = self.frames.allocate(1)
            self.frames.write([(frame << PAGE_SHIFT, PAGE_SIZE)], memoryview(pages[gfn]))
            runs.append((gfn, frame, 1))
        self._change(lambda _: _Table(tuple(runs), end))

    def clear(self) -> None:
        """Take all pages away."""
        self._change(lambda old: _Table((), old.end))

    def _change(self, make: Callable[[_Table], _Table]) -> _Table:
        """Store a changed table; return the one that was changed."""
        with self._lock:
            while True:
                old = self._table
                new = make(old)
                # No call, and so no signal handler, comes between these two.
                if self._table is old:
                    self._table = new
                    return old

    # --- the guest's side -----------------------------------------------------------

    def pieces(self, address: int, length: int) -> list[tuple[int, int]]:
        """Return ``(offset, size)`` in the machine's memory, for each run of a range.

        Raises:
            FaultError: a page is not there.
            ValueError: not a range of guest memory.
            ClosedError: a parent process has made the guest.
        """
        self.frames.check_process()
        address, length = check_range(address, length, empty=True)
        end = address + length
        pieces = []
        for gfn, frame, pages in self.runs(*page_span(address, length)):
            start = max(address, gfn << PAGE_SHIFT)
            if start > address:
                break
            size = min(end, gfn + pages << PAGE_SHIFT) - start
            pieces.append(((frame << PAGE_SHIFT) + start - (gfn << PAGE_SHIFT), size))
            address += size
        if address < end:
            raise FaultError(address, end - address, _errno.EINVAL)
        return pieces

    def read(self, address: int, length: int) -> bytes:
        """Return what the guest sees; see :meth:`.MockDomain.read`."""
        return self.frames.read(self.pieces(address, length))

    def write(self, address: int, data: bytes) -> None:
        """Write as the guest does; see :meth:`.MockDomain.write`."""
        view = memoryview(data).cast("B")
        self.frames.write(self.pieces(address, len(view)), view)

    def fill(self, address: int, length: int, byte: int) -> None:
        """Write the same byte everywhere in a range; errors as :meth:`pieces`."""
        block = memoryview(bytes([byte]) * min(length, _FILL_BYTES))
        for offset, size in self.pieces(address, length):
            for start in range(0, size, _FILL_BYTES):
                part = min(_FILL_BYTES, size - start)
                self.frames.write([(offset + start, part)], block[:part])

    # --- the hypervisor's side --------------------------------------------------------

    def map(self, gfn: int, count: int, writable: bool, page_errors: dict[int, int]) -> Mapping:
        """Map pages as ``xenforeignmemory_map`` does.

        Args:
            gfn: the first page.
            count: pages.
            writable: map for writing too.
            page_errors: errnos of pages that fail although they are there.

        Raises:
            XenCallError: the kernel refused.
        """
        runs, errors = self._runs_and_errors(gfn, count, page_errors)
        address: list[int] = []
        try:
            self.frames.map(_relative(runs, gfn), count, writable, address)
            return Mapping(
                address[0],
                gfn,
                count,
                writable=writable,
                errors=errors,
                result_out=address,
                call="mock_map",
                domid=self._domid,
            )
        finally:
            for mapped in address:  # it failed or was interrupted, and no Mapping owns it
                libc.munmap(mapped, count << PAGE_SHIFT)

    def map_into(
        self, mapping: Mapping, gfn: int, count: int, page_errors: dict[int, int]
    ) -> PageErrors | None:
        """Map pages over a part of a window; see :meth:`.Backend.map_into`.

        ``page_errors`` is as of :meth:`map`.
        """
        runs, errors = self._runs_and_errors(gfn, count, page_errors)
        for start, frame, pages in runs:
            self.frames.check_process()
            offset, length = start - mapping.gfn << PAGE_SHIFT, pages << PAGE_SHIFT
            flat.place(mapping, offset, length, partial(self._map_at, frame, pages))
            libc.dont_fork(mapping.address + offset, length)
        return None if errors is None else PageErrors(errors, "mock_map", self._domid)

    def _map_at(self, frame: int, pages: int, address: int, result_out: list[int]) -> None:
        self.frames.map_over(address, [(0, frame, pages)], False, result_out)

    def _runs_and_errors(
        self, gfn: int, count: int, page_errors: dict[int, int]
    ) -> tuple[tuple[Run, ...], bytes | None]:
        """Return the runs of pages that can be mapped, and the errno of each page of a range."""
        runs = self.runs(gfn, count)
        for page in page_errors:
            runs = _without(runs, page, page + 1)
        if sum(pages for _, _, pages in runs) == count:
            return runs, None
        errors = bytearray([_errno.EINVAL]) * count
        for start, _, pages in runs:
            errors[start - gfn : start - gfn + pages] = bytes(pages)
        for page, errno in page_errors.items():
            errors[page - gfn] = errno
        return runs, bytes(errors)

    def check_present(self, gfn: int, count: int) -> None:
        """Refuse a range of pages in which one is absent.

        Raises:
            FaultError: it names the first such page, and all that follows.
        """
        for start, _ in _gaps(self.runs(gfn, count), gfn, gfn + count):
            rest = gfn + count - start
            raise FaultError(start << PAGE_SHIFT, rest << PAGE_SHIFT, _errno.EINVAL)

    def remap(self, mapping: Mapping, gfn: int) -> None:
        """Map other pages over a mapping. If a page is gone by then, the mapping loses its memory.

        Raises:
            MappingLostError: the kernel refused, and the old memory is gone.
        """
        runs = self.runs(gfn, mapping.count)
        if sum(pages for _, _, pages in runs) < mapping.count:
            lose(mapping)
            hint = "a page vanished during the move"
            raise MappingLostError("mock_remap", self._domid, _errno.EINVAL, hint)
        mapped: list[int] = []
        try:
            self.frames.map_over(mapping.address, _relative(runs, gfn), mapping.writable, mapped)
            libc.dont_fork(mapping.address, mapping.length)
            mapped.clear()
        except XenCallError as error:
            lose(mapping)
            raise MappingLostError("mock_remap", self._domid, error.errno, error.hint) from error
        finally:
            if mapped:  # interrupted, so the gfn of the mapping is not that of its memory
                lose(mapping)


def merged(runs: Iterable[Run]) -> Iterator[Run]:
    """Yield runs that do not touch: neighbours are one run, whatever their frames are."""
    first = None
    for gfn, frame, pages in runs:
        if first is not None and first[0] + first[2] == gfn:
            first = first[0], first[1], first[2] + pages
            continue
        if first is not None:
            yield first
        first = gfn, frame, pages
    if first is not None:
        yield first


def lose(mapping: Mapping) -> None:
    """Put zeros in the place of a mapping's memory, as Xen leaves nothing there."""
    libc.map_zeros_over(mapping.address, mapping.length, replace=True)


def whole_pages(address: int, length: int) -> tuple[int, int]:
    """Return ``(gfn, count)`` of a range that consists of whole pages.

    Raises:
        ValueError: it does not, or is not a range of guest memory.
    """
    address, length = check_range(address, length)
    if (address | length) & PAGE_MASK:
        raise ValueError(f"address {address:#x} and length {length:#x} must be multiples of 0x1000")
    return page_span(address, length)


def _relative(runs: Iterable[Run], gfn: int) -> list[tuple[int, int, int]]:
    return [(start - gfn, frame, pages) for start, frame, pages in runs]


def _cut(runs: tuple[Run, ...], first: int, end: int) -> tuple[Run, ...]:
    """Return the parts of runs that lie in a range of pages."""
    low = max(0, bisect_left(runs, (first + 1,)) - 1)
    found = []
    for gfn, frame, pages in runs[low : bisect_left(runs, (end,))]:
        start, stop = max(first, gfn), min(end, gfn + pages)
        if start < stop:
            found.append((start, frame + start - gfn, stop - start))
    return tuple(found)


def _without(runs: tuple[Run, ...], first: int, end: int) -> tuple[Run, ...]:
    """Return the parts of runs that do not lie in a range of pages."""
    low, high = max(0, bisect_left(runs, (first + 1,)) - 1), bisect_left(runs, (end,))
    kept = []
    for gfn, frame, pages in runs[low:high]:
        if gfn < first:
            kept.append((gfn, frame, min(pages, first - gfn)))
        if gfn + pages > end:
            kept.append((end, frame + end - gfn, gfn + pages - end))
    return (*runs[:low], *kept, *runs[high:])


def _gaps(runs: tuple[Run, ...], first: int, end: int) -> list[tuple[int, int]]:
    """Return ``(gfn, pages)`` of what is absent in a range of pages."""
    gaps = []
    for gfn, _, pages in (*_cut(runs, first, end), (end, 0, 0)):
        if gfn > first:
            gaps.append((first, gfn - first))
        first = gfn + pages
    return gaps
