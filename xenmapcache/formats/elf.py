"""ELF files: header, sections and segments.

Every number in the file may be wrong on purpose. A table is read only after its place and
its size were checked. Limits apply to the file, not to its parts: all section names together,
and all notes together (`elf_notes.py`), have a limit in bytes and in number. Without that, a file
of a few kilobytes could name the same bytes a thousand times.

The header is read at once, and each table when it is asked for: a core whose section headers
are damaged still has its segments.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

from ..errors import CorruptImageError
from .content import Content, start_of
from .elf_notes import Note, NoteError, notes_in, segment_notes
from .spans import Warn

ET_CORE = 4
EM_386, EM_ARM, EM_X86_64, EM_AARCH64 = 3, 40, 62, 183
MACHINES = {EM_X86_64: "x86-64", EM_386: "x86-32", EM_ARM: "arm", EM_AARCH64: "arm"}
"""The machines that Xen has guests of."""
PT_LOAD, PT_NOTE = 1, 4
PN_XNUM = 0xFFFF
SHT_NULL, SHT_PROGBITS, SHT_SYMTAB, SHT_STRTAB, SHT_NOTE, SHT_NOBITS = 0, 1, 2, 3, 7, 8

_MAGIC = b"\x7fELF"
_EHDR_SIZE = {1: 52, 2: 64}
_EHDR = {1: struct.Struct("<16sHHIIIIIHHHHHH"), 2: struct.Struct("<16sHHIQQQIHHHHHH")}
_SHDR = {1: struct.Struct("<10I"), 2: struct.Struct("<IIQQQQIIQQ")}
_PHDR = {1: struct.Struct("<8I"), 2: struct.Struct("<IIQQQQQQ")}
_MAX_SECTIONS = 1024
MAX_SEGMENTS = 1 << 22
"""QEMU with -p writes one for each mapping of a guest's kernel and processes, of which there may
be any number. The file's size limits them first: this is a table of 224 MiB."""
_CHUNK_SEGMENTS = 1 << 12
"""Program headers that are read at once: of a sparse file most may be zeros."""
_MAX_SHSTRTAB_BYTES = 1 << 16
_MAX_SECTION_NOTE_BYTES = 1 << 20


class Section(NamedTuple):
    """A section whose bytes lie inside the file. Immutable.

    Attributes:
        name: from the section name table.
        sh_type: a number.
        offset, size, entry_size: in bytes.
        link: the number of another section.
    """

    name: str
    sh_type: int
    offset: int
    size: int
    entry_size: int
    link: int


class Segment(NamedTuple):
    """A PT_LOAD segment whose bytes lie inside the file. Immutable.

    Attributes:
        virtual, physical: the addresses that it belongs to.
        offset, file_size, memory_size: in bytes; memory beyond ``file_size`` is zero.
    """

    virtual: int
    physical: int
    offset: int
    file_size: int
    memory_size: int


class Elf:
    """An ELF file's header and tables.

    Args:
        content: the file's bytes.

    Attributes:
        content: as given.
        e_type, machine, entry: ``e_type``, ``e_machine`` and ``e_entry`` of the header.
        bits: 64 or 32.

    Raises:
        CorruptImageError: the content is not a little-endian ELF file, or its tables
            contradict it.
    """

    def __init__(self, content: Content) -> None:
        self.content = content
        start = start_of(content, 64)
        if start[:4] != _MAGIC:
            raise self.corrupt(f"begins with {start[:4].hex() or 'nothing'}: not an ELF file")
        if len(start) < 5 or start[4] not in _EHDR or len(start) < _EHDR_SIZE[start[4]]:
            raise self.corrupt(
                "has a truncated ELF header, or an EI_CLASS other than 32 or 64 bits"
            )
        if start[5] != 1:
            raise self.corrupt("EI_DATA is not little-endian, as x86 and Arm guests are")
        self._class = start[4]
        self.bits = 32 * start[4]
        (_, self.e_type, self.machine, _, self.entry, self._phoff, self._shoff, _, _,
         self._phentsize, self._phnum, self._shentsize, self._shnum, self._shstrndx,
         ) = _EHDR[start[4]].unpack_from(start)  # fmt: skip
        self._names: dict[int, str] = {}
        self._name_bytes = 0

    @cached_property
    def _sections(self) -> list[tuple[int, ...]]:
        """The section headers, if all of them are right."""
        layout = _SHDR[self._class]
        place = "sh", "section", self._shoff, self._shentsize, self._shnum
        self._check_table(*place, layout.size, _MAX_SECTIONS)
        size = layout.size * self._shnum
        return list(layout.iter_unpack(self.content.read(self._shoff, size) if size else b""))

    @property
    def declared_segments(self) -> int | None:
        """How many program headers the file should have; None if it does not say so."""
        if self._phnum != PN_XNUM:
            return int(self._phnum)
        # Too many for the field: sh_info of the first section header counts them.
        layout = _SHDR[self._class]
        if self._shentsize != layout.size or self._shoff + layout.size > self.content.size:
            return None
        first = layout.unpack(self.content.read(self._shoff, layout.size))
        return int(first[7]) or None if first[1] == SHT_NULL else None

    @cached_property
    def segment_count(self) -> int:
        """How many program headers the file has.

        Raises:
            CorruptImageError: there is no count, or their table contradicts it or the file's size.
        """
        count = self.declared_segments
        if count is None:
            raise self.corrupt("e_phnum is PN_XNUM, but no section header counts the segments")
        place = "ph", "program", self._phoff, self._phentsize, count
        self._check_table(*place, _PHDR[self._class].size, MAX_SEGMENTS)
        return count

    def segments_inside(self, limit: int) -> int:
        """Return how many of the first ``limit`` program headers lie inside the file.

        Raises:
            CorruptImageError: ``e_phentsize`` is wrong, or there is not even one.
        """
        size = _PHDR[self._class].size
        place = "ph", "program", self._phoff, self._phentsize, min(1, limit)
        self._check_table(*place, size, 1)
        return min(limit, int(self.content.size - self._phoff) // size)

    def guess_segments(self) -> int:
        """Return how many program headers there can be before the memory of the first segment.

        Raises:
            CorruptImageError: ``e_phentsize`` is wrong.
        """
        layout, wide = _PHDR[self._class], self.bits == 64
        self._check_table("ph", "program", self._phoff, self._phentsize, 1, layout.size, 1)
        end = self.content.size if self._shoff <= self._phoff else self._shoff
        end = min(end, self.content.size, self._phoff + layout.size * MAX_SEGMENTS)
        count = 0
        place = self._phoff
        while place + layout.size <= end:
            size = layout.size * min(_CHUNK_SEGMENTS, (end - place) // layout.size)
            for raw in layout.iter_unpack(self.content.read(place, size)):
                offset, file_size = (raw[2], raw[5]) if wide else (raw[1], raw[4])
                if file_size and offset > self._phoff:
                    end = min(end, offset)
                place += layout.size
                if place > end:
                    break
                count += 1
        return count

    def corrupt(self, text: str) -> CorruptImageError:
        """Return an error that names the file."""
        return CorruptImageError(f"{self.content.path}: {text}")

    def check_sections(self) -> None:
        """Raise CorruptImageError if the section headers or their names contradict the file."""
        len(self._shstrtab)

    def sections(self, sh_types: set[int]) -> dict[str, Section]:
        """Return the sections of some types by name.

        Raises:
            CorruptImageError: two have the same name, or one ends beyond the file.
        """
        found: dict[str, Section] = {}
        self.check_sections()
        for number, raw in enumerate(self._sections):
            if raw[1] in sh_types and raw[1] != SHT_NULL:
                section = self.section(number)
                if section.name in found:
                    raise self.corrupt(f"has two sections named {section.name}")
                found[section.name] = section
        return found

    def unnamed_sections(self) -> list[Section]:
        """Return all sections without their names; they may end beyond the file.

        Raises:
            CorruptImageError: the section headers contradict the file.
        """
        return [
            Section("", sh_type, offset, size, entry_size, link)
            for _, sh_type, _, _, offset, size, link, _, _, entry_size in self._sections
        ]

    def section(self, number: int) -> Section:
        """Return a section by its number.

        Raises:
            CorruptImageError: there is no section of that number, or it ends beyond the file.
        """
        if number >= len(self._sections):
            raise self.corrupt(f"has no section {number}; it has {len(self._sections)}")
        _, sh_type, _, _, offset, size, link, _, _, entry_size = self._sections[number]
        name = self._name(number)
        self._check_inside(f"section {name}", offset, size if sh_type != SHT_NOBITS else 0)
        return Section(name, sh_type, offset, size, entry_size, link)

    def headers(
        self, p_type: int, count: int | None = None
    ) -> Iterator[tuple[int, int, int, int, int, int]]:
        """Yield the program headers of a type.

        Args:
            p_type: such as :data:`PT_LOAD`.
            count: how many headers of any type to read; by default all.

        Yields:
            ``(number, p_offset, p_vaddr, p_paddr, p_filesz, p_memsz)``, which may contradict
            the file.

        Raises:
            CorruptImageError: as :attr:`segment_count`.
        """
        layout, wide = _PHDR[self._class], self.bits == 64
        count = self.segment_count if count is None else count
        for first in range(0, count, _CHUNK_SEGMENTS):
            size = layout.size * min(_CHUNK_SEGMENTS, count - first)
            table = self.content.read(self._phoff + layout.size * first, size)
            for number, raw in enumerate(layout.iter_unpack(table), first):
                if raw[0] == p_type and wide:
                    yield number, raw[2], raw[3], raw[4], raw[5], raw[6]
                elif raw[0] == p_type:
                    yield number, raw[1], raw[2], raw[3], raw[4], raw[5]

    def loads(self) -> list[Segment]:
        """Return the PT_LOAD segments in the file's order.

        Raises:
            CorruptImageError: one ends beyond the file, or its p_filesz exceeds its p_memsz.
        """
        found = []
        for number, offset, virtual, physical, file_size, memory_size in self.headers(PT_LOAD):
            self._check_inside(f"segment {number}", offset, file_size)
            if memory_size < file_size:
                raise self.corrupt(
                    f"segment {number}: p_filesz {file_size:#x} exceeds p_memsz {memory_size:#x}"
                )
            found.append(Segment(virtual, physical, offset, file_size, memory_size))
        return found

    def section_notes(self, section: Section) -> Iterator[Note]:
        """Yield the notes of a section.

        Raises:
            CorruptImageError: it has more than 1 MiB, or a note ends beyond it.
        """
        if section.size > _MAX_SECTION_NOTE_BYTES:
            raise self.corrupt(
                f"section {section.name}: sh_size {section.size:#x} is implausible; "
                f"at most {_MAX_SECTION_NOTE_BYTES:#x} bytes of notes are read"
            )
        try:
            place = f"section {section.name}"
            for note in notes_in(self.content, place, section.offset, section.size):
                if note is not None:
                    yield note
        except NoteError as error:
            raise self.corrupt(str(error)) from None

    def segment_notes(self, warn: Warn, count: int | None = None) -> Iterator[Note]:
        """Yield the notes of all PT_NOTE segments; see :func:`.segment_notes` for the limits.

        Args:
            warn: called once if notes are damaged or left out.
            count: how many program headers to look at; by default all.
        """
        return segment_notes(self.content, self.headers(PT_NOTE, count), warn)

    def _check_table(
        self, prefix: str, name: str, offset: int, entry_size: int, count: int, size: int,
        limit: int,
    ) -> None:  # fmt: skip
        """Raise CorruptImageError if a table of headers cannot be read."""
        if not count:
            return
        if entry_size != size:
            raise self.corrupt(f"e_{prefix}entsize is {entry_size}; expected {size}")
        if count > limit:
            raise self.corrupt(f"{count} {name} headers are implausible; at most {limit} are read")
        self._check_inside(f"table of {name} headers", offset, size * count)

    @cached_property
    def _shstrtab(self) -> bytes:
        """The table of the sections' names, if there is a section to name."""
        number = self._shstrndx
        if not number and all(section[1] == SHT_NULL for section in self._sections):
            return b""
        if number >= len(self._sections):
            raise self.corrupt(
                f"e_shstrndx is {number}, but the file has {len(self._sections)} sections"
            )
        _, sh_type, _, _, offset, size, *_ = self._sections[number]
        if sh_type != SHT_STRTAB or not 0 < size <= _MAX_SHSTRTAB_BYTES:
            raise self.corrupt(
                f"section {number} should have the sections' names, but has sh_type {sh_type} "
                f"and sh_size {size:#x}; at most {_MAX_SHSTRTAB_BYTES:#x} bytes are read"
            )
        self._check_inside("table of the sections' names", offset, size)
        table = self.content.read(offset, size)
        if table[-1]:
            raise self.corrupt(f"the last section name, at {offset + size - 1:#x}, has no end")
        for place, section in enumerate(self._sections):
            if section[0] >= size:
                raise self.corrupt(
                    f"section {place}: sh_name {section[0]:#x} is beyond the names, "
                    f"which are {size:#x} bytes"
                )
        return table

    def _name(self, number: int) -> str:
        """Return a section's name; the sum of all names is limited."""
        if number not in self._names:
            start = self._sections[number][0]
            name = self._shstrtab[start : self._shstrtab.find(b"\0", start)]
            self._name_bytes += len(name)
            if self._name_bytes > _MAX_SHSTRTAB_BYTES:
                raise self.corrupt(
                    f"all section names together have more than {_MAX_SHSTRTAB_BYTES:#x} bytes, "
                    "which is implausible"
                )
            self._names[number] = name.decode("utf-8", "replace")
        return self._names[number]

    def _check_inside(self, name: str, offset: int, size: int) -> None:
        if offset + size > self.content.size:
            raise self.corrupt(
                f"is truncated or corrupt: its {name} is {offset:#x}..{offset + size:#x}, "
                f"but the file ends at {self.content.size:#x}"
            )
