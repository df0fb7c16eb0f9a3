"""The backend of ELF cores whose segments have physical addresses: kdump's, QEMU's."""

from __future__ import annotations

import heapq
import os
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import ClassVar, NamedTuple

from ..address import ADDRESS_LIMIT, PAGE_MASK, PAGE_SHIFT
from ..elf import ET_CORE, MACHINES, Elf
from ..errors import UnsupportedOperationError
from ..imagefile import ImageFile
from .image import ImageBackend, Run, clip

_BIG_ENDIAN = (b"\x7fELF\x01\x02", b"\x7fELF\x02\x02")
_COMPRESSED = (b"KDUMP   ", b"DISKDUMP")
_FLATTENED = b"makedumpfile\0"
_MAX_NOTES = 1 << 16
_MAX_NOTE_BYTES = 1 << 24  # each processor has some, and there are machines with thousands


class Note(NamedTuple):
    """A note of an ELF file. Immutable.

    Attributes:
        name: who defined it: ``"CORE"``, ``"QEMU"``, ``"VMCOREINFO"``.
        kind: its type, a number that means something together with the name.
        data: as it is in the file.
    """

    name: str
    kind: int
    data: bytes


class ElfCoreBackend(ImageBackend):
    """The backend ``"elfcore"``: ELF cores with physical addresses, as kdump and QEMU write them.

    ELF64 and ELF32, little-endian. Where segments overlap, the first one in the file counts.
    Memory that a segment has and the file has not, and pages of which it has only a part, are
    not there.

    Args:
        path: the file.

    Attributes:
        bits: 64 or 32.
        machine: ``"x86-64"``, ``"x86-32"`` or ``"arm"``; others by number.
        notes: a tuple of :class:`Note`, in the file's order.

    Raises:
        BackendUnavailableError: pyelftools is not installed.
        CorruptImageError: the file contradicts the format, or is none of physical memory.
        UnsupportedOperationError: it is big-endian, or compressed by makedumpfile.
        ValueError: that is no regular file.
        OSError: the file cannot be opened.
    """

    name: ClassVar[str] = "elfcore"

    def __init__(self, *, path: str | os.PathLike[str]) -> None:
        super().__init__(ImageFile(path))
        try:
            _refuse_relatives(self._file)
            elf = Elf(self._file)
            self.bits = elf.bits
            self.machine = MACHINES.get(elf.machine, f"ELF machine {elf.machine}")
            self._runs = _runs(elf)
            self.notes = _notes(elf)
        except BaseException:
            self.close()
            raise
        last = self._runs[-1]
        self.memory_end = last.gfn + last.pages << PAGE_SHIFT

    def describe(self) -> dict[str, object]:
        """Return what the headers and notes say; see :meth:`Backend.describe`."""
        known: dict[str, object] = {"bits": self.bits, "machine": self.machine}
        known["notes"] = [
            {"name": name, "kind": kind, "size": len(data)} for name, kind, data in self.notes
        ]
        for name, _, data in self.notes:
            if name == "VMCOREINFO":
                known["vmcoreinfo"] = data.rstrip(b"\0").decode("utf-8", "replace")
        return known

    def runs(self, gfn: int, count: int) -> Iterator[Run]:
        """Return what is there of a range of pages; see :meth:`ImageBackend.runs`."""
        return clip(self._runs, gfn, count)


def _refuse_relatives(file: ImageFile) -> None:
    start = file.read(0, min(16, file.size))
    if start.startswith(_COMPRESSED):
        raise UnsupportedOperationError(
            f"{file.path} is a dump in makedumpfile's compressed format, and not ELF: write it "
            "with makedumpfile -E, or QEMU's dump-guest-memory without -z, -l and -s"
        )
    if start.startswith(_FLATTENED):
        raise UnsupportedOperationError(
            f"{file.path} is flattened by makedumpfile -F: makedumpfile -R puts it together again"
        )
    if start.startswith(_BIG_ENDIAN):
        raise UnsupportedOperationError(f"{file.path} is a big-endian ELF file: none is read")


def _notes(elf: Elf) -> tuple[Note, ...]:
    notes: list[Note] = []
    for section in elf.note_segments():
        for note in elf.notes(section, _MAX_NOTE_BYTES):
            if not any(note):
                break  # what is left of the room that the kernel has reserved
            if len(notes) == _MAX_NOTES:
                raise elf.corrupt(f"has more than {_MAX_NOTES} notes in {section.name}: absurd")
            notes.append(Note(*note))
    return tuple(notes)


def _runs(elf: Elf) -> list[Run]:
    """Return what a core has of physical memory."""
    if elf.kind != ET_CORE:
        raise elf.corrupt(f"is an ELF file of type {elf.kind}, and no core (4)")
    nowhere = (1 << elf.bits) - 1  # what has no physical address: vmalloc, in a live kernel's core
    loads = [load for load in elf.loads() if load.file_size and load.physical != nowhere]
    if not loads:
        raise elf.corrupt(
            "has no segment of memory: open a file of xl dump-core with the backend 'coredump'"
        )
    if len(loads) > 1 and not any(load.physical for load in loads):
        raise elf.corrupt("has no physical addresses: it is the core of a process")
    runs = []
    for load in loads:
        end = load.physical + load.file_size
        if end > ADDRESS_LIMIT:
            raise elf.corrupt(
                f"has a segment of {load.physical:#x}..{end:#x}, beyond the 52 bits of physical "
                "addresses"
            )
        gfn = load.physical + PAGE_MASK >> PAGE_SHIFT
        pages = (end >> PAGE_SHIFT) - gfn
        if pages > 0:
            runs.append(Run(gfn, pages, load.offset + (gfn << PAGE_SHIFT) - load.physical))
    if not runs:
        raise elf.corrupt("has no segment with a whole page")
    return first_wins(runs)


def first_wins(runs: Sequence[Run]) -> list[Run]:
    """Return runs in order of gfn, without overlaps: where two overlap, the first given counts."""
    edges = sorted({edge for run in runs for edge in (run.gfn, run.gfn + run.pages)})
    by_gfn = sorted(range(len(runs)), key=lambda number: runs[number].gfn)
    upcoming = iter(by_gfn)
    following = next(upcoming, None)
    open_runs: list[int] = []  # a heap: the first given on top
    found: list[Run] = []
    for begin, end in pairwise(edges):
        while following is not None and runs[following].gfn <= begin:
            heapq.heappush(open_runs, following)
            following = next(upcoming, None)
        while open_runs and sum(runs[open_runs[0]][:2]) <= begin:
            heapq.heappop(open_runs)
        if not open_runs:
            continue
        run = runs[open_runs[0]]
        part = Run(begin, end - begin, run.offset + (begin - run.gfn << PAGE_SHIFT))
        if found and _continues(found[-1], part):
            before = found.pop()
            part = before._replace(pages=before.pages + part.pages)
        found.append(part)
    return found


def _continues(before: Run, part: Run) -> bool:
    """Tell whether a run goes on in another, as memory and in the file."""
    return (
        before.gfn + before.pages == part.gfn
        and before.offset + (before.pages << PAGE_SHIFT) == part.offset
    )
