"""Writing a guest's memory as an ELF core that drgn, crash, makedumpfile and gdb read."""

from __future__ import annotations

import logging
import os
from array import array
from collections.abc import Iterator, Sequence

from ..address import PAGE_MASK, PAGE_SHIFT, MiB
from ..backend import Backend
from ..cache import MapCache
from ..files.atomic import new_file
from ..formats import vmcoreinfo
from ..formats.elf_notes import Note
from .guest import Guest, Progress
from .sparse import write_all, write_but_zeros
from .vmcore_head import MACHINES, Head

logger = logging.getLogger("xenmapcache")

_RUNS_AT_FIRST = 1024
"""For how many runs there is room before the pages if nobody knows how many there will be."""
_MAX_CANDIDATES = 64
_CHUNK_PAGES = MiB >> PAGE_SHIFT


def write_vmcore(
    source: Backend | MapCache,
    path: str | os.PathLike[str],
    *,
    length: int | str | None = None,
    machine: str | None = None,
    progress: Progress | None = None,
) -> int:
    """Write a guest's memory to an ELF core with physical addresses, as kdump and QEMU write it.

    The file has a segment for each run of present pages, whose virtual address is the physical
    one; the notes of the source; and the VMCOREINFO of a Linux guest, which is looked for in its
    memory unless the source has it as a note. Without VMCOREINFO a WARNING says what does not
    work. Otherwise as :func:`write_coredump`: pages of zeros take no room on the disk, and the
    file appears when it is complete.

    A guest that runs during the dump changes its memory; pause it for a consistent dump.

    Args:
        source: an open source of guest memory. Of a cache, the pages that its backend has now are
            written, and mapped within its ``max_resident``.
        path: of the file. It is readable by its owner only.
        length: how far to go, in bytes or as ``"4GiB"``; by default to the end of memory.
        machine: ``"x86-64"``, ``"x86-32"`` or ``"arm"`` (64 bits); by default the source's, or
            this machine's.
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
    name = guest.machine(machine)
    if name not in MACHINES:
        raise ValueError(f"machine must be one of {', '.join(MACHINES)}, not {name!r}")
    notes: Sequence[Note] = getattr(guest.backend, "notes", ())
    known = guest.known_runs()
    runs = _RUNS_AT_FIRST if known is None else sum(1 for _ in known)
    with new_file(path) as fd:
        core = _Core(fd, Head(name, notes, runs))
        core.write_pages(guest, progress)
        core.finish(guest)
    if not core.head.described:
        logger.warning(
            "no VMCOREINFO was found in the guest's memory, as a Linux guest has it: drgn and "
            "crash cannot translate virtual addresses; physical ones can be read"
        )
    return core.pages


class _Core:
    """A file that is being written: headers and notes, and then the pages.

    If headers and notes need more room than was left for them, the first pages of the file are
    moved to its end.

    Attributes:
        head: headers and notes.
        pages: how many were written.
    """

    def __init__(self, fd: int, head: Head) -> None:
        self._fd = fd
        self.head = head
        self._start = head.start
        self._gfns = array("Q")
        self._counts = array("Q")
        self._moved = 0
        self.pages = 0
        self._candidates: list[vmcoreinfo.VmcoreInfo] = []

    def write_pages(self, guest: Guest, progress: Progress | None) -> None:
        """Write all pages, and keep the VMCOREINFO texts that are in them."""
        end = -1
        for gfn, data in guest.pages(progress):
            count = len(data) >> PAGE_SHIFT
            write_but_zeros(self._fd, data, self._start + (self.pages << PAGE_SHIFT))
            if gfn == end:
                self._counts[-1] += count
            else:
                self._gfns.append(gfn)
                self._counts.append(count)
            end = gfn + count
            self.pages += count
            if not self.head.described:
                found = vmcoreinfo.in_pages(data, gfn << PAGE_SHIFT)
                room = _MAX_CANDIDATES - len(self._candidates)
                self._candidates += [each for each, _ in zip(found, range(room), strict=False)]

    def finish(self, guest: Guest) -> None:
        """Write what comes before the pages."""
        info = vmcoreinfo.choose(self._candidates, guest.read)
        if info is not None:
            self.head.describe(info)
        needed = self.head.size(len(self._gfns) + 1) - self._start
        if needed > 0:
            self._move(needed + PAGE_MASK >> PAGE_SHIFT)
        os.ftruncate(self._fd, self._start + (self.pages + self._moved << PAGE_SHIFT))
        self._write_head()

    def _write_head(self) -> None:
        """Write headers and notes."""
        offset = 0
        for chunk in self.head.chunks(self._segments):
            write_all(self._fd, chunk, offset)
            offset += len(chunk)
        if self._moved:  # over what is left of the pages there
            first = self._start + (self._moved << PAGE_SHIFT)
            write_all(self._fd, bytes(first - offset), offset)

    def _move(self, count: int) -> None:
        """Move the first pages of the file to its end."""
        for first in range(0, count, _CHUNK_PAGES):
            size = min(_CHUNK_PAGES, count - first) << PAGE_SHIFT
            place = self._start + (first << PAGE_SHIFT)
            data = os.pread(self._fd, size, place).ljust(size, b"\0")
            write_but_zeros(self._fd, data, place + (self.pages << PAGE_SHIFT))
        self._moved = count

    def _segments(self) -> Iterator[tuple[int, int, int]]:
        """Yield ``(gfn, pages, number)``; the number is that of the first page in the file."""
        number = 0
        for gfn, count in zip(self._gfns, self._counts, strict=True):
            apart = min(max(self._moved - number, 0), count)  # pages that were moved
            if apart:
                yield gfn, apart, number + self.pages
            if apart < count:
                yield gfn + apart, count - apart, number + apart
            number += count
