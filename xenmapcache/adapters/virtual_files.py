"""Files whose content is a guest's memory, read through a map cache when it is asked for.

It needs nothing but a cache. :mod:`.mount` shows the files to other programs.
"""

from __future__ import annotations

import abc
import logging
from array import array
from bisect import bisect_right
from collections.abc import Iterator

from ..address import PAGE_MASK, PAGE_SHIFT, MiB, as_int
from ..cache import MapCache
from ..escape import printable
from ..formats.lime import HEADER, MAGIC, VERSION
from ..guest.vmcoreinfo import find_vmcoreinfo
from ..writers.guest import Guest
from ..writers.vmcore_head import MACHINES, Head

logger = logging.getLogger("xenmapcache")

MAX_READ_BYTES = 16 * MiB
"""The longest read of a file at once. The kernel asks for at most 1 MiB."""
MAX_RANGES = 1 << 20
LEECHCORE_RANGES = 144
"""Of an ELF core that LeechCore reads: the headers of more do not fit where it looks for them."""

_WINDOW_BYTES = 16 * MiB


class Ranges:
    """Where the pages of a guest are: runs, and the number of each run's first page.

    Args:
        runs: ``(gfn, pages)``, in ascending order; runs that touch become one.

    Attributes:
        pages: how many pages there are.

    Raises:
        ValueError: there are more than :data:`MAX_RANGES`.
    """

    def __init__(self, runs: Iterator[tuple[int, int]]) -> None:
        self._gfns = array("Q")
        self._counts = array("Q")
        self._numbers = array("Q")
        self.pages = 0
        end = -1
        for gfn, count in runs:
            if gfn == end:
                self._counts[-1] += count
            else:
                if len(self._gfns) == MAX_RANGES:
                    raise ValueError(
                        f"the memory below {gfn << PAGE_SHIFT:#x} is in {MAX_RANGES} ranges, and "
                        "files of more are not made: give a smaller length"
                    )
                self._gfns.append(gfn)
                self._counts.append(count)
                self._numbers.append(self.pages)
            self.pages += count
            end = gfn + count

    def __len__(self) -> int:
        return len(self._gfns)

    def segments(self) -> Iterator[tuple[int, int, int]]:
        """Return ``(gfn, pages, number)`` of all runs."""
        return zip(self._gfns, self._counts, self._numbers, strict=True)

    def find(self, place: int, header_bytes: int = 0) -> tuple[int, int, int]:
        """Return the run at a place among all pages, where each run has a header before it.

        Args:
            place: in bytes.
            header_bytes: the length of a header.

        Returns:
            How far the place is from the beginning of the run's header; the address of the run,
            and one past its last address.
        """

        def begin(index: int) -> int:
            return (self._numbers[index] << PAGE_SHIFT) + index * header_bytes

        index = bisect_right(range(len(self)), place, key=begin) - 1
        first, count = self._gfns[index], self._counts[index]
        return place - begin(index), first << PAGE_SHIFT, first + count << PAGE_SHIFT


class VirtualFile(abc.ABC):
    """A read-only file whose content is read through a cache when it is asked for.

    Attributes:
        name: of the file.
        size: in bytes.

    Synchronization: all methods may be called in any threads at once.
    """

    name: str
    size: int

    def __init__(self, cache: MapCache) -> None:
        self._cache = cache

    def read(self, offset: int, length: int) -> bytes:
        """Return a part of the file; less than `length` only at its end.

        Args:
            offset: in bytes.
            length: in bytes, at most :data:`MAX_READ_BYTES`.

        Raises:
            ValueError: a number is negative, or the length is too large.
            FaultError: a page has vanished since the file was laid out.
            XenMapCacheError: others as :meth:`MapCache.read`.
        """
        offset, length = as_int("offset", offset), as_int("length", length)
        if offset < 0 or not 0 <= length <= MAX_READ_BYTES:
            raise ValueError(
                f"offset {offset:#x} must not be negative, and length {length:#x} must be "
                f"0 to {MAX_READ_BYTES:#x}"
            )
        end = min(offset + length, self.size)
        parts = []
        while offset < end:
            part = self._part(offset, end - offset)
            parts.append(part)
            offset += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    @abc.abstractmethod
    def _part(self, offset: int, length: int) -> bytes:
        """Return at least one byte of a part that is in the file, and at most all of it."""


class RawFile(VirtualFile):
    """``memory.raw``: an address is an offset. Holes are zeros.

    Args:
        cache: to read through.
        end: one past the last address.
    """

    name = "memory.raw"

    def __init__(self, cache: MapCache, end: int) -> None:
        super().__init__(cache)
        self.size = end

    def _part(self, offset: int, length: int) -> bytes:
        return self._cache.read(offset, length, fill=0)


class ElfFile(VirtualFile):
    """``memory.elf``: an ELF core, as :func:`.write_vmcore` writes it.

    Args:
        cache: to read through.
        ranges: the memory.
        machine: of :data:`.MACHINES`.
        end: where to stop looking for VMCOREINFO, unless the source has it as a note.
    """

    name = "memory.elf"

    def __init__(self, cache: MapCache, ranges: Ranges, machine: str, end: int) -> None:
        super().__init__(cache)
        self._ranges = ranges
        head = Head(machine, getattr(cache.backend, "notes", ()), len(ranges))
        if not head.described:
            info = find_vmcoreinfo(cache, 0, end)
            if info is not None:
                head.describe(info)
        self.described = head.described
        self._head = b"".join(head.chunks(ranges.segments)).ljust(head.start, b"\0")
        self.size = head.start + (ranges.pages << PAGE_SHIFT)

    def _part(self, offset: int, length: int) -> bytes:
        start = len(self._head)
        if offset < start:
            return self._head[offset : offset + length]
        inside, address, end = self._ranges.find(offset - start)
        address += inside
        return self._cache.read(address, min(length, end - address))


class LimeFile(VirtualFile):
    """``memory.lime``: ranges, each after a header, as :func:`.write_lime` writes them.

    Args:
        cache: to read through.
        ranges: the memory.
    """

    name = "memory.lime"

    def __init__(self, cache: MapCache, ranges: Ranges) -> None:
        super().__init__(cache)
        self._ranges = ranges
        self.size = (ranges.pages << PAGE_SHIFT) + len(ranges) * HEADER.size

    def _part(self, offset: int, length: int) -> bytes:
        inside, address, end = self._ranges.find(offset, HEADER.size)
        if inside < HEADER.size:
            header = HEADER.pack(MAGIC, VERSION, address, end - 1, 0)
            return header[inside : inside + length]
        address += inside - HEADER.size
        return self._cache.read(address, min(length, end - address))


def virtual_files(cache: MapCache, length: int | str | None = None) -> list[VirtualFile]:
    """Return the files of a guest: ``memory.raw``, ``memory.elf`` and ``memory.lime``.

    Which pages exist is found out once, here. A page that a guest gets later is only in
    ``memory.raw``. A page that it gives up is zeros there; in the others, reading it fails.
    VMCOREINFO, which a Linux guest keeps, is looked for in memory if the source has no such note.
    Without it a WARNING says what does not work.

    Args:
        cache: stays yours to close, after the last read.
        length: how far to go, in bytes or as ``"4GiB"``; by default to the end of memory.

    Returns:
        The files; ``memory.elf`` is missing, and a WARNING is logged, if ELF cores of the guest's
        machine cannot be made.

    Raises:
        TypeError, ValueError: the length is wrong; the source does not know its end and no length
            is given; or there are more than :data:`MAX_RANGES` ranges.
        XenMapCacheError: others as :meth:`MapCache.present` and :meth:`MapCache.read`.
    """
    guest = Guest(cache, length)
    end = guest.end + PAGE_MASK & ~PAGE_MASK
    ranges = Ranges(_runs(cache, guest))
    files: list[VirtualFile] = [RawFile(cache, end), LimeFile(cache, ranges)]
    machine = guest.machine(None)
    if machine not in MACHINES:
        logger.warning("there is no memory.elf of the machine %s", printable(machine))
        return files
    elf = ElfFile(cache, ranges, machine, end)
    if not elf.described:
        logger.warning(
            "no VMCOREINFO was found in the guest's memory, as a Linux guest has it: drgn and "
            "crash cannot translate virtual addresses in memory.elf; physical ones can be read"
        )
    if len(ranges) > LEECHCORE_RANGES:
        logger.warning(
            "memory.elf has %d ranges, and MemProcFS reads at most %d: give it memory.raw",
            len(ranges),
            LEECHCORE_RANGES,
        )
    return [files[0], elf, files[1]]


def _runs(cache: MapCache, guest: Guest) -> Iterator[tuple[int, int]]:
    """Yield ``(gfn, pages)`` of the present pages, in order; one run may touch the next."""
    known = guest.known_runs()
    if known is not None:
        yield from known
        return
    for gfn, pages in guest.extents():
        end = min(gfn + pages << PAGE_SHIFT, guest.end)
        for window in range(gfn << PAGE_SHIFT, end, _WINDOW_BYTES):
            for address, size in cache.present(window, min(_WINDOW_BYTES, end - window)):
                first = address >> PAGE_SHIFT
                yield first, (address + size + PAGE_MASK >> PAGE_SHIFT) - first
