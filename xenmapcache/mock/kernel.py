"""An ELF kernel: what of it goes where in memory, and where its symbols are then."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import Self

from ..elf import SHT_STRTAB, SHT_SYMTAB, Elf, Segment
from ..errors import CorruptImageError
from ..imagefile import ImageFile

_PIECE = 1 << 20
_SYMBOL = {32: struct.Struct("<IIIBBH"), 64: struct.Struct("<IBBHQQ")}
_FIELDS = {32: (1, 3, 5), 64: (4, 1, 3)}
"""Of a symbol: where in it value, info and section are."""
_UNDEFINED, _ABSOLUTE = 0, 0xFFF1
_KINDS = {0, 1, 2}
"""No type, objects and functions: the others name sections and source files."""


class LoadedElf(dict[str, int]):
    """The symbols of an ELF file that was loaded: guest-physical addresses by name.

    A symbol that lies in no segment is left out, absolute ones among them. Of several with one
    name a global one counts, or else the first. A file that was stripped has none.

    Attributes:
        entry: the guest-physical address where it begins to run; None if it is in no segment.
        segments: ``(address, length)`` of what was loaded, guest-physical, zeros behind included.
    """

    entry: int | None
    segments: tuple[tuple[int, int], ...]


class KernelFile:
    """An ELF file to be loaded. A context manager, which closes it.

    Args:
        path: the file.

    Raises:
        BackendUnavailableError: pyelftools is not installed.
        CorruptImageError: it is no ELF file, contradicts the format, or has no segment to load.
        OSError, ValueError: it cannot be opened, or is no regular file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = ImageFile(path)
        try:
            self._elf = Elf(self._file)
            self.segments = [segment for segment in self._elf.loads() if segment.memory_size]
            if not self.segments:
                raise self._elf.corrupt("has no PT_LOAD segment: there is nothing to load")
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def content(self, segment: Segment) -> Iterator[tuple[int, bytes]]:
        """Yield ``(address, data)`` of a segment, zeros behind its bytes included."""
        for start in range(0, segment.memory_size, _PIECE):
            size = min(_PIECE, segment.memory_size - start)
            there = max(0, min(size, segment.file_size - start))
            data = self._file.read(segment.offset + start, there) if there else b""
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
        for reach in (0, 1):  # a symbol may mark the end of a segment, unless another begins there
            for part in self.segments:
                if 0 <= address - part.virtual < part.memory_size + reach:
                    return part.physical + address - part.virtual
        return None

    def _symbols(self) -> Iterator[tuple[str, int, bool]]:
        """Yield ``(name, value, whether it is global)``."""
        tables = self._elf.sections({SHT_SYMTAB})
        if not tables:
            return
        (table,) = tables.values() if len(tables) == 1 else (None,)
        layout = _SYMBOL[self._elf.bits]
        if table is None or table.entry_size != layout.size or table.size % layout.size:
            raise self._elf.corrupt("has a symbol table of no size that there is, or several")
        if not table.size:
            return
        strings = self._elf.section(table.link)
        if strings.kind != SHT_STRTAB or not strings.size:
            raise self._elf.corrupt(f"has no section {table.link} with the names of its symbols")
        names = self._file.read(strings.offset, strings.size)
        value, info, section = _FIELDS[self._elf.bits]
        for symbol in layout.iter_unpack(self._file.read(table.offset, table.size)):
            if symbol[section] in (_UNDEFINED, _ABSOLUTE) or symbol[info] & 15 not in _KINDS:
                continue
            start = symbol[0]
            end = names.find(b"\0", start)
            if end < 0:
                raise CorruptImageError(f"{self._file.path} has a symbol's name at {start:#x}")
            yield (
                names[start:end].decode("utf-8", "replace"),
                symbol[value],
                bool(symbol[info] >> 4),
            )
