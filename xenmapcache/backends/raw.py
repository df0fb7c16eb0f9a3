"""The backend of flat images, with an address or ranges, and of LiME files."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import ClassVar

from ..address import ADDRESS_LIMIT, PAGE_MASK, PAGE_SIZE, as_int, check_range
from ..errors import CorruptImageError, WrongFormatError
from ..files.image import ImageFile
from ..formats import lime, signatures
from ..formats.content import start_of
from ..formats.spans import SALVAGE, Span, Warn, cut
from .image import SpanBackend

_AS_IT_IS = ". To read its bytes as they are, give an address: @0 after the name, or address=0"


class RawBackend(SpanBackend):
    """The backend ``"raw"``: a flat image of memory, or a LiME file.

    A LiME file (version 1) is recognised by its magic, unless ``address`` or ``ranges`` is
    given. It has its own ranges, which may begin and end in any byte. If the file has only a part
    of a page, the rest of the page reads as zeros.

    A file of another known format is not memory. It is refused, unless ``address`` or
    ``ranges`` is given.

    Args:
        path: the file.
        address: guest-physical, page-aligned, of the file's first byte.
        ranges: instead of ``address``: ``(address, length)`` pairs, page-aligned and ascending,
            whose memory lies one after the other in the file. Data after the last range is
            ignored.
        salvage: open the intact part of a LiME file that was cut off or damaged, or of a file that
            is shorter than its ranges.

    Raises:
        CorruptImageError: the file is empty or shorter than the ranges, or its LiME headers
            contradict it.
        WrongFormatError: it has another known format; the message says what reads it.
        ValueError, TypeError: an argument is wrong, or the path is not a regular file.
        OSError: the file cannot be opened.
    """

    name: ClassVar[str] = "raw"

    def __init__(
        self,
        *,
        path: str | os.PathLike[str],
        address: int | None = None,
        ranges: Iterable[tuple[int, int]] | None = None,
        salvage: bool = False,
    ) -> None:
        if address is not None and ranges is not None:
            raise TypeError("raw takes either address= or ranges=")
        spans = None if ranges is None else _checked(ranges)
        start = None if address is None else _aligned("address", address)
        super().__init__(ImageFile(path))
        try:
            found: list[str] = []
            memory = self._find_memory(start, spans, salvage, found.append)
            self._take(memory, "no range has memory in the file")
            self.warn(*found)
        except BaseException:
            self.close()
            raise

    def _find_memory(
        self,
        address: int | None,
        spans: list[tuple[int, int]] | None,
        salvage: bool,
        warn: Warn,
    ) -> list[Span]:
        """Return where the file's memory belongs."""
        if not self._file.size:
            raise WrongFormatError(f"{self.path} is empty: {signatures.EMPTY.remedy}")
        if spans is not None:
            return _packed(self._file, spans, salvage)
        if address is not None:
            return _flat(self._file, address)
        if start_of(self._file, len(lime.START)) == lime.START:
            return lime.ranges(self._file, salvage=salvage, warn=warn)
        signatures.refuse_others(self._file, self.name, hint=_AS_IT_IS)
        return _flat(self._file, 0)


def _aligned(name: str, value: object) -> int:
    number = as_int(name, value)
    if number < 0 or number & PAGE_MASK:
        raise ValueError(f"{name} {number:#x} must be a multiple of {PAGE_SIZE:#x}, not negative")
    return number


def _checked(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return ranges as ints, after checks."""
    spans: list[tuple[int, int]] = []
    end = 0
    for pair in ranges:
        try:
            address, length = pair
        except (TypeError, ValueError):
            raise TypeError(f"ranges= must be (address, length) pairs, not {pair!r}") from None
        address, length = check_range(address, length)
        if (address | length) & PAGE_MASK:
            raise ValueError(
                f"range {address:#x}, length {length:#x}: both must be multiples of {PAGE_SIZE:#x}"
            )
        if address < end:
            raise ValueError(
                f"range at {address:#x} must not begin before {end:#x}, where the previous one ends"
            )
        end = address + length
        spans.append((address, length))
    if not spans:
        raise ValueError("ranges= is empty")
    return spans


def _flat(file: ImageFile, address: int) -> list[Span]:
    if address + file.size > ADDRESS_LIMIT:
        raise ValueError(
            f"{file.path}: {file.size:#x} bytes at {address:#x} end beyond {ADDRESS_LIMIT:#x}, "
            "the end of a 52-bit physical address space"
        )
    return [Span(address, address + file.size, 0)]


def _packed(file: ImageFile, spans: list[tuple[int, int]], salvage: bool) -> list[Span]:
    """Return ranges whose bytes follow each other in a file."""
    found: list[Span] = []
    offset = 0
    for address, length in spans:
        if offset + length > file.size and not salvage:
            raise CorruptImageError(
                f"{file.path}: range {address:#x}..{address + length:#x}, at offset {offset:#x}, "
                f"lacks {offset + length - file.size:#x} bytes: the file ends at {file.size:#x}; "
                f"{SALVAGE}"
            )
        found += cut(Span(address, address + length, offset), file.size)
        offset += length
    return found
