"""The backend of files that ``xl dump-core`` writes."""

from __future__ import annotations

import os
import struct
from array import array
from collections.abc import Iterator
from typing import ClassVar

from ..address import PAGE_SIZE
from ..elf import (
    ET_CORE,
    MACHINES,
    SHT_NOTE,
    SHT_PROGBITS,
    SHT_STRTAB,
    Elf,
    Section,
)
from ..errors import CorruptImageError
from ..imagefile import ImageFile
from .image import ImageBackend, Run
from .pageindex import GFN_LIMIT, PageIndex, is_ascending

NOTE_NONE, NOTE_HEADER, NOTE_XEN_VERSION, NOTE_FORMAT_VERSION = range(0x2000000, 0x2000004)
HEADER = struct.Struct("<QQQQ")
"""magic, vCPUs, pages, page size."""
XEN_VERSION = struct.Struct("<QQ16s")
"""major, minor, extra; what was compiled by whom follows."""
MAGIC_PV, MAGIC_HVM = 0xF00FEBED, 0xF00FEBEE
PADDING = (1 << 64) - 1

_KINDS = {MAGIC_PV: "pv", MAGIC_HVM: "hvm"}
_ENTRY = {".xen_pfn": 8, ".xen_p2m": 16}
_PIECE = 1 << 16
"""Entries that are read and checked at once: an index that lies is found out before it is held."""


class CoredumpBackend(ImageBackend):
    """The backend ``"coredump"``: a file that ``xl dump-core`` wrote.

    Of PV guests the addresses are pseudo-physical. Pages are mapped from the file.

    Args:
        path: the file.

    Attributes:
        kind: ``"pv"`` or ``"hvm"`` (PVH and Arm guests are that, too).
        machine: ``"x86-64"``, ``"x86-32"`` or ``"arm"``.
        vcpus: how many the guest had.
        pages: how many are in the file.
        page_size: in bytes, always 4096.
        xen_version: for example ``"4.17.7"``; empty if the file does not say it.
        format_version: ``(major, minor)``.

    Raises:
        BackendUnavailableError: pyelftools is not installed.
        CorruptImageError: the file contradicts the format; the message names the place.
        ValueError: that is no regular file.
        OSError: the file cannot be opened.
    """

    name: ClassVar[str] = "coredump"

    def __init__(self, *, path: str | os.PathLike[str]) -> None:
        super().__init__(ImageFile(path))
        try:
            self._open(Elf(self._file))
        except BaseException:
            self.close()
            raise

    def _open(self, elf: Elf) -> None:
        if elf.kind != ET_CORE or elf.bits != 64 or elf.machine not in MACHINES:
            raise elf.corrupt(
                f"is an ELF file of type {elf.kind}, {elf.bits} bits, machine {elf.machine}: "
                "xl dump-core writes cores (4) of 64 bits, of x86 (62, 3) or Arm (40)"
            )
        sections = elf.sections({SHT_PROGBITS, SHT_STRTAB, SHT_NOTE})
        present = [name for name in _ENTRY if name in sections]
        for name in (".note.Xen", ".xen_pages", *(present or [" or ".join(_ENTRY)])):
            if name not in sections:
                raise elf.corrupt(f"has no section {name}: is it a file of xl dump-core?")
        if len(present) > 1:
            raise elf.corrupt(
                "has both .xen_p2m and .xen_pfn: it cannot be of a PV and an HVM guest"
            )
        table, pages = sections[present[0]], sections[".xen_pages"]
        _check_apart(elf, [table, pages, sections[".note.Xen"]])
        self.machine = MACHINES[elf.machine]
        self.format_version = (0, 0)
        self.xen_version = ""
        self._read_notes(elf, sections[".note.Xen"])
        for section, size in ((table, _ENTRY[table.name]), (pages, PAGE_SIZE)):
            if section.size != size * self._entries:
                raise elf.corrupt(
                    f"has {section.size:#x} bytes in {section.name}, and {self._entries:#x} pages "
                    "as its notes say: one of them lies"
                )
        self._index = self._read_index(table, pages.offset)
        self.pages = len(self._index)
        self.memory_end = self._index.memory_end

    def _read_notes(self, elf: Elf, section: Section) -> None:
        header = None
        for name, kind, data in elf.notes(section):
            if name != "Xen":
                continue
            if kind == NOTE_HEADER and len(data) >= HEADER.size:
                header = HEADER.unpack_from(data)
            elif kind == NOTE_XEN_VERSION and len(data) >= XEN_VERSION.size:
                major, minor, extra = XEN_VERSION.unpack_from(data)
                text = extra.partition(b"\0")[0].decode("ascii", "replace")
                self.xen_version = f"{major}.{minor}{text}"
            elif kind == NOTE_FORMAT_VERSION and len(data) >= 8:
                version = int.from_bytes(data[:8], "little")
                self.format_version = (version >> 32, version & 0xFFFFFFFF)
        if header is None:
            raise elf.corrupt(f"has no header note in .note.Xen at {section.offset:#x}")
        magic, self.vcpus, self._entries, self.page_size = header
        if magic not in _KINDS:
            raise elf.corrupt(f"has a header note of magic {magic:#x}, which no guest has")
        if self.page_size != PAGE_SIZE:
            raise elf.corrupt(
                f"has pages of {self.page_size:#x} bytes: Xen's are of {PAGE_SIZE:#x}"
            )
        if self.format_version[0]:
            raise elf.corrupt(f"has the format version {self.format_version}, which is not known")
        self.kind = _KINDS[magic]

    def _read_index(self, table: Section, start: int) -> PageIndex:
        """Read the pages' frame numbers, and check their order."""
        words = _ENTRY[table.name] // 8
        gfns = array("Q")
        offsets: array[int] | None = None
        for first in range(0, self._entries, _PIECE):
            count = min(_PIECE, self._entries - first)
            piece = array("Q", bytes(8 * words * count))
            self._file.read_into(table.offset + 8 * words * first, memoryview(piece).cast("B"))
            piece = piece[::words] if words > 1 else piece
            ordered = is_ascending(piece) and not (gfns and piece[0] <= gfns[-1])
            if ordered and piece[-1] < GFN_LIMIT and offsets is None and len(gfns) == first:
                gfns.extend(piece)  # a sum would copy all of it for each piece
                continue
            # Padding, or an error.
            for entry, gfn in enumerate(piece, first):
                if gfn == PADDING:
                    continue
                if gfn >= GFN_LIMIT or (gfns and gfn <= gfns[-1]):
                    raise self._bad_entry(table, entry, gfn, gfns)
                if offsets is None and len(gfns) != entry:
                    offsets = array("Q", range(start, start + len(gfns) * PAGE_SIZE, PAGE_SIZE))
                if offsets is not None:
                    offsets.append(start + entry * PAGE_SIZE)
                gfns.append(gfn)
        return PageIndex(gfns, offsets, start)

    def _bad_entry(
        self, table: Section, entry: int, gfn: int, gfns: array[int]
    ) -> CorruptImageError:
        place = f"{self.path}: entry {entry} of {table.name}, at "
        place += f"{table.offset + entry * _ENTRY[table.name]:#x}, is pfn {gfn:#x}"
        if gfn >= GFN_LIMIT:
            return CorruptImageError(f"{place}: no guest has an address beyond 52 bits")
        what = "again" if gfn == gfns[-1] else f"after {gfns[-1]:#x}"
        return CorruptImageError(f"{place} {what}: pfns must ascend")

    def runs(self, gfn: int, count: int) -> Iterator[Run]:
        """Return what is there of a range of pages; see :meth:`ImageBackend.runs`."""
        return self._index.runs(gfn, count)

    def describe(self) -> dict[str, object]:
        """Return the notes; see :meth:`Backend.describe`."""
        return {
            "kind": self.kind,
            "machine": self.machine,
            "vcpus": self.vcpus,
            "pages": self.pages,
            "page_size": self.page_size,
            "xen_version": self.xen_version,
            "format_version": "{}.{}".format(*self.format_version),
        }


def _check_apart(elf: Elf, sections: list[Section]) -> None:
    end, before = 64, "the header"
    for section in sorted(sections, key=lambda section: section.offset):
        if section.size and section.offset < end:
            raise elf.corrupt(
                f"has {section.name} at {section.offset:#x}, which overlaps {before}, "
                f"whose end is {end:#x}"
            )
        if section.size:
            end, before = section.offset + section.size, section.name
