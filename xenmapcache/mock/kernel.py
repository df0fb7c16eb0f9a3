"""An ELF kernel: which part of it goes where in memory, and where its symbols are then.

Limits apply to the file: to the number of symbols, and to the sum of their names. Names may
share bytes, so a table of 1 MiB could otherwise stand for gigabytes of names.
"""

from __future__ import annotations

import os
import struct
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import Self

from ..files.image import ImageFile
from ..formats.elf import SHT_STRTAB, SHT_SYMTAB, Elf, Section, Segment
from ..formats.intervals import first_wins

_CHUNK_BYTES = 1 << 20
_CHUNK_SYMBOLS = 1 << 12
_MAX_SYMBOLS = 1 << 19
_MAX_STRTAB_BYTES = 1 << 24
_MAX_NAME_BYTES = 1 << 12
_start = attrgetter("start")
_SYMBOL = {32: struct.Struct("<IIIBBH"), 64: struct.Struct("<IBBHQQ")}
_FIELDS = {32: (1, 3, 5), 64: (4, 1, 3)}
"""Where value, info and section are in a symbol."""
_UNDEFINED, _ABSOLUTE = 0, 0xFFF1
_STT_LOADED = {0, 1, 2}
"""STT_NOTYPE, STT_OBJECT, STT_FUNC; the others name sections and source files."""


class LoadedElf(dict[str, int]):
    """The symbols of an ELF file that was loaded: guest-physical addresses by name.

    Symbols outside of all segments are left out, absolute ones among them. If several symbols
    have the same name, a global one counts, or else the first. A stripped file has no symbols.

    Attributes:
        entry: the guest-physical address of the entry point; None if it is in no segment.
        segments: ``(address, length)`` of each loaded segment, guest-physical, including the
            zeros at its end.
    """

    entry: int | None
    segments: tuple[tuple[int, int], ...]


class KernelFile:
    """An ELF file to be loaded. A context manager, which closes it.

    Args:
        path: the file.

    Raises:
        CorruptImageError: it is not an ELF file, contradicts the format, or has no segment to
            load.
        OSError, ValueError: it cannot be opened, or is not a regular file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = ImageFile(path)
        try:
            self._elf = Elf(self._file)
            self.segments = [segment for segment in self._elf.loads() if segment.memory_size]
            if not self.segments:
                raise self._elf.corrupt("has no PT_LOAD segment to load")
            _check_apart(self._elf, self.segments)
            # In the file's order, as the first one counts where addresses overlap.
            self._virtual = first_wins(
                [(each.virtual, each.virtual + each.memory_size) for each in self.segments]
            )
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def content(self, segment: Segment) -> Iterator[tuple[int, bytes]]:
        """Yield ``(address, data)`` of a segment, including the zeros at its end."""
        for start in range(0, segment.memory_size, _CHUNK_BYTES):
            size = min(_CHUNK_BYTES, segment.memory_size - start)
            in_file = max(0, min(size, segment.file_size - start))
            data = self._file.read(segment.offset + start, in_file) if in_file else b""
            yield segment.physical + start, data.ljust(size, b"\0")

    def loaded(self) -> LoadedElf:
        """Return the symbols, as they are when all segments are in their places."""
        symbols = LoadedElf()
        symbols.entry = self._entry()
        symbols.segments = tuple((part.physical, part.memory_size) for part in self.segments)
        names: set[str] = set()
        for name, value, is_global in self._symbols():
            if name and (name not in symbols or (is_global and name not in names)):
                address = self._physical(value)
                if address is not None:
                    symbols[name] = address
                    if is_global:
                        names.add(name)
        return symbols

    def _entry(self) -> int | None:
        address: int = self._elf.entry
        for part in self.segments:
            if 0 <= address - part.physical < part.memory_size:
                return address  # as Linux on x86 has it
        return self._physical(address)

    def _physical(self, address: int) -> int | None:
        # A symbol may mark the end of a segment, unless another segment begins there.
        for target in (address, address - 1):
            position = bisect_right(self._virtual, target, key=_start) - 1
            if position >= 0 and target < self._virtual[position].end:
                segment = self.segments[self._virtual[position].number]
                return segment.physical + address - segment.virtual
        return None

    def _symbols(self) -> Iterator[tuple[str, int, bool]]:
        """Yield ``(name, value, whether it is global)``."""
        tables = self._elf.sections({SHT_SYMTAB})
        if not tables:
            return
        if len(tables) > 1:
            raise self._elf.corrupt(f"has {len(tables)} symbol tables; expected one")
        (table,) = tables.values()
        layout = _SYMBOL[self._elf.bits]
        if table.entry_size != layout.size or table.size % layout.size:
            raise self._elf.corrupt(
                f"symbol table: sh_entsize {table.entry_size} and sh_size {table.size:#x} must "
                f"be {layout.size} and a multiple of it"
            )
        if table.size > _MAX_SYMBOLS * layout.size:
            raise self._elf.corrupt(
                f"{table.size // layout.size} symbols are implausible; "
                f"at most {_MAX_SYMBOLS} are read"
            )
        if not table.size:
            return
        names = self._read_names(table.link)
        value, info, section = _FIELDS[self._elf.bits]
        total = 0
        for symbol in self._entries(table, layout):
            if symbol[section] in (_UNDEFINED, _ABSOLUTE) or symbol[info] & 15 not in _STT_LOADED:
                continue
            start = symbol[0]
            end = names.find(b"\0", start, start + _MAX_NAME_BYTES + 1)
            if end < 0:
                raise self._elf.corrupt(
                    f"a symbol's name at {start:#x} of {len(names):#x} does not end within "
                    f"{_MAX_NAME_BYTES} bytes"
                )
            total += end - start
            if total > _MAX_STRTAB_BYTES:
                raise self._elf.corrupt(
                    f"all symbol names together have more than {_MAX_STRTAB_BYTES:#x} bytes, "
                    "which is implausible"
                )
            name = names[start:end].decode("utf-8", "replace")
            yield name, symbol[value], bool(symbol[info] >> 4)

    def _entries(self, table: Section, layout: struct.Struct) -> Iterator[tuple[int, ...]]:
        chunk = _CHUNK_SYMBOLS * layout.size
        for start in range(0, table.size, chunk):
            size = min(chunk, table.size - start)
            yield from layout.iter_unpack(self._file.read(table.offset + start, size))

    def _read_names(self, number: int) -> bytes:
        strings = self._elf.section(number)
        if strings.sh_type != SHT_STRTAB or not 0 < strings.size <= _MAX_STRTAB_BYTES:
            raise self._elf.corrupt(
                f"section {number} should have the names of the symbols, but has sh_type "
                f"{strings.sh_type} and sh_size {strings.size:#x}; at most "
                f"{_MAX_STRTAB_BYTES:#x} bytes are read"
            )
        return self._file.read(strings.offset, strings.size)


def _check_apart(elf: Elf, segments: Sequence[Segment]) -> None:
    """Refuse overlaps: thousands of segments could be copied over each other."""
    end = 0
    for segment in sorted(segments, key=attrgetter("physical")):
        if segment.physical < end:
            raise elf.corrupt(
                f"the segment at {segment.physical:#x} overlaps another, which ends at {end:#x}"
            )
        end = segment.physical + segment.memory_size
