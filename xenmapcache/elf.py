"""ELF files through pyelftools, which is asked only about headers that are known to be sane.

pyelftools believes what it reads: counts that lie make it loop or allocate. So the header
and both tables are checked first, and only plain sections are ever shown to it.
"""

from __future__ import annotations

import contextlib
import io
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple, Protocol

from .errors import BackendUnavailableError, CorruptImageError, XenMapCacheError

if TYPE_CHECKING:
    from elftools.elf.elffile import ELFFile
    from typing_extensions import Buffer

ET_CORE = 4
EM_386, EM_ARM, EM_X86_64, EM_AARCH64 = 3, 40, 62, 183
MACHINES = {EM_X86_64: "x86-64", EM_386: "x86-32", EM_ARM: "arm", EM_AARCH64: "arm"}
"""Those that Xen has guests of."""
PT_LOAD, PT_NOTE = 1, 4
PN_XNUM = 0xFFFF
SHT_NULL, SHT_PROGBITS, SHT_SYMTAB, SHT_STRTAB, SHT_NOTE, SHT_NOBITS = 0, 1, 2, 3, 7, 8

_MAGIC = b"\x7fELF"
_HEADER = {1: struct.Struct("<16sHHIIIIIHHHHHH"), 2: struct.Struct("<16sHHIQQQIHHHHHH")}
_SECTION = {1: struct.Struct("<10I"), 2: struct.Struct("<IIQQQQIIQQ")}
_SEGMENT = {1: struct.Struct("<8I"), 2: struct.Struct("<IIQQQQQQ")}
_NOTE = struct.Struct("<III")
_MAX_SECTIONS = 1024
_MAX_SEGMENTS = 1 << 16
_MAX_NAMES = 1 << 16
_MAX_NOTES = 1 << 20


class File(Protocol):
    """What is needed of a file."""

    path: str
    size: int

    def read(self, offset: int, length: int) -> bytes:
        """Return a piece of it."""


class Section(NamedTuple):
    """A section of a file, which lies inside the file. Immutable.

    Attributes:
        name, kind: as the file has them; kind is a number.
        offset, size, entry_size: in bytes.
        link: the number of another section.
    """

    name: str
    kind: int
    offset: int
    size: int
    entry_size: int
    link: int


class Segment(NamedTuple):
    """A PT_LOAD segment, whose bytes lie inside the file. Immutable.

    Attributes:
        virtual, physical: where it belongs.
        offset, file_size, memory_size: in bytes; what the file lacks of the memory is zero.
    """

    virtual: int
    physical: int
    offset: int
    file_size: int
    memory_size: int


class Elf:
    """An ELF file's header and tables.

    Args:
        file: that holds it.

    Attributes:
        file: as given.
        kind: ``e_type``.
        machine: ``e_machine``.
        bits: 64 or 32.
        entry: ``e_entry``.

    Raises:
        BackendUnavailableError: pyelftools is not installed.
        CorruptImageError: that is no little-endian ELF file, or its header lies.
    """

    def __init__(self, file: File) -> None:
        elf_file = _elf_file()
        self.file = file
        start = file.read(0, min(64, file.size)) if file.size else b""
        if start[:4] != _MAGIC:
            raise self.corrupt(f"begins with {start[:4].hex() or 'nothing'}: that is no ELF file")
        if len(start) < 64 or start[4] not in _HEADER:
            raise self.corrupt("has an ELF header that is cut off, or of no class that there is")
        if start[5] != 1:
            raise self.corrupt("is not little-endian, as x86 and Arm guests are")
        header = _HEADER[start[4]]
        self.bits = 32 * start[4]
        (_, self.kind, self.machine, _, self.entry, phoff, shoff, _, _, phsize, segments, shsize,
         sections, names) = header.unpack_from(start)  # fmt: skip
        self._sections = self._table("section", shoff, shsize, sections, _SECTION, _MAX_SECTIONS)
        if segments == PN_XNUM:  # too many for that field: the first section header has the number
            if not self._sections:
                raise self.corrupt("has no section header, which should count its segments")
            segments = self._sections[0][7]
        self._segments = self._table("program", phoff, phsize, segments, _SEGMENT, _MAX_SEGMENTS)
        self._check_names(names)
        with self._converted():
            self._elf: ELFFile = elf_file(io.BufferedReader(_Stream(file)))

    def corrupt(self, what: str) -> CorruptImageError:
        """Return an error that names the file."""
        return CorruptImageError(f"{self.file.path} {what}")

    def sections(self, kinds: set[int]) -> dict[str, Section]:
        """Return the sections of some kinds by name.

        Raises:
            CorruptImageError: a name is there twice, or a section ends beyond the file.
        """
        found: dict[str, Section] = {}
        for number, raw in enumerate(self._sections):
            if raw[1] in kinds and raw[1] != SHT_NULL:
                section = self.section(number)
                if section.name in found:
                    raise self.corrupt(f"has two sections {section.name}")
                found[section.name] = section
        return found

    def section(self, number: int) -> Section:
        """Return a section.

        Raises:
            CorruptImageError: there is none of that number, or it ends beyond the file.
        """
        with self._converted():
            kind = self._sections[number][1]
            part = self._elf.get_section(number)
            name, offset, size = part.name, part["sh_offset"], part["sh_size"]
            section = Section(name, kind, offset, size, part["sh_entsize"], part["sh_link"])
        self._check_inside(f"section {name}", offset, size if kind != SHT_NOBITS else 0)
        return section

    def loads(self) -> list[Segment]:
        """Return the PT_LOAD segments in the file's order.

        Raises:
            CorruptImageError: one ends beyond the file, or has less memory than bytes.
        """
        found = []
        for number, raw in enumerate(self._segments):
            if raw[0] != PT_LOAD:
                continue
            # Not through pyelftools: a core may have thousands, and this takes a tenth of the time.
            if self.bits == 32:
                _, offset, virtual, physical, file_size, memory_size, *_ = raw
            else:
                _, _, offset, virtual, physical, file_size, memory_size, _ = raw
            segment = Segment(virtual, physical, offset, file_size, memory_size)
            self._check_inside(f"segment {number}", segment.offset, segment.file_size)
            if segment.memory_size < segment.file_size:
                raise self.corrupt(f"has more bytes than memory in segment {number}")
            found.append(segment)
        return found

    def note_segments(self) -> list[Section]:
        """Return the PT_NOTE segments as sections, for :meth:`notes`.

        Raises:
            CorruptImageError: one ends beyond the file.
        """
        found = []
        for number, raw in enumerate(self._segments):
            if raw[0] == PT_NOTE:
                offset, size = (raw[1], raw[4]) if self.bits == 32 else (raw[2], raw[5])
                name = f"segment {number}"
                self._check_inside(name, offset, size)
                found.append(Section(name, SHT_NOTE, offset, size, 0, 0))
        return found

    def notes(self, section: Section, most: int = _MAX_NOTES) -> Iterator[tuple[str, int, bytes]]:
        """Yield ``(name, type, description)`` of a note section of at most so many bytes.

        Raises:
            CorruptImageError: the section is absurdly large, or a note ends beyond it.
        """
        if section.size > most:
            raise self.corrupt(f"has {section.size:#x} bytes of notes in {section.name}: absurd")
        data = self.file.read(section.offset, section.size) if section.size else b""
        position = 0
        while position + _NOTE.size <= len(data):
            name_size, size, kind = _NOTE.unpack_from(data, position)
            name = position + _NOTE.size
            start = name + (name_size + 3 & ~3)
            if start + size > len(data):
                raise self.corrupt(
                    f"has a note at {section.offset + position:#x} that ends beyond {section.name}"
                )
            text = data[name : name + name_size].rstrip(b"\0").decode("ascii", "replace")
            yield text, kind, data[start : start + size]
            position = start + (size + 3 & ~3)

    def _table(
        self, what: str, offset: int, size: int, count: int,
        layouts: dict[int, struct.Struct], most: int,
    ) -> list[tuple[int, ...]]:  # fmt: skip
        layout = layouts[self.bits // 32]
        if not count:
            return []
        if size != layout.size:
            raise self.corrupt(f"has {what} headers of {size} bytes: there are none such")
        if count > most:
            raise self.corrupt(f"has {count} {what} headers: absurd, at most {most} are read")
        self._check_inside(f"table of {what} headers", offset, size * count)
        return list(layout.iter_unpack(self.file.read(offset, size * count)))

    def _check_names(self, number: int) -> None:
        if not number and all(section[1] == SHT_NULL for section in self._sections):
            return
        if number >= len(self._sections):
            raise self.corrupt(f"has no section {number}, which should hold the sections' names")
        _, kind, _, _, offset, size, *_ = self._sections[number]
        if kind != SHT_STRTAB or not 0 < size <= _MAX_NAMES:
            raise self.corrupt(f"has no sections' names at {offset:#x} ({size:#x} bytes)")
        self._check_inside("section of the sections' names", offset, size)
        # Or pyelftools would look for a name's end through the whole file.
        if self.file.read(offset + size - 1, 1) != b"\0":
            raise self.corrupt(f"has a section's name without an end at {offset + size - 1:#x}")
        for section in self._sections:
            if section[0] >= size:
                raise self.corrupt(f"has a section whose name is at {section[0]:#x} of {size:#x}")

    def _check_inside(self, what: str, offset: int, size: int) -> None:
        if offset + size > self.file.size:
            raise self.corrupt(
                f"is cut off, or lies: its {what} is {offset:#x}..{offset + size:#x}, and the "
                f"file ends at {self.file.size:#x}"
            )

    @contextlib.contextmanager
    def _converted(self) -> Iterator[None]:
        try:
            yield
        except (XenMapCacheError, OSError, MemoryError):
            raise
        except Exception as error:
            raise self.corrupt(f"has headers that pyelftools cannot read: {error!r}") from error


class _Stream(io.RawIOBase):
    """A file as a stream, for pyelftools."""

    def __init__(self, file: File) -> None:
        self._file = file
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.size}
        self._position = base[whence] + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Buffer) -> int:
        view = memoryview(buffer).cast("B")
        size = max(0, min(len(view), self._file.size - self._position))
        if size:
            view[:size] = self._file.read(self._position, size)
            self._position += size
        return size


def _elf_file() -> type[ELFFile]:
    try:
        from elftools.elf.elffile import ELFFile
    except ImportError as error:
        raise BackendUnavailableError(
            f"pyelftools is needed to read ELF files ({error}): pip install xenmapcache[elf]"
        ) from error
    return ELFFile
