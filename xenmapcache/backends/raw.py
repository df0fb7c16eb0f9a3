"""The backend of memory as it is: a flat image, with an address or ranges, or a LiME file."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator
from typing import ClassVar

from ..address import ADDRESS_LIMIT, PAGE_MASK, PAGE_SHIFT, PAGE_SIZE, as_int, check_range
from ..errors import CorruptImageError, UnsupportedOperationError
from ..imagefile import ImageFile
from .image import ImageBackend, Run, clip

LIME_HEADER = struct.Struct("<IIQQQ")
"""magic, version, first address, last address, reserved."""
LIME_MAGIC, LIME_VERSION = 0x4C694D45, 1

_LIME, _AVML = LIME_MAGIC.to_bytes(4, "little"), b"AVML"
_MAX_RANGES = 1 << 16


class RawBackend(ImageBackend):
    """The backend ``"raw"``: a file that holds memory and nothing else, or a LiME file.

    A LiME file (version 1) is recognised by its magic, unless ``address`` or ``ranges`` is
    given; it brings its own ranges. Pages of which it has only a part are not there. The last
    page of a flat image may be a part of one: the rest of it reads as zeros.

    Args:
        path: the file.
        address: guest-physical, page-aligned, of the file's first byte.
        ranges: instead of ``address``: ``(address, length)`` pairs, page-aligned and ascending,
            whose memory lies in the file one after the other.

    Raises:
        CorruptImageError: the file is empty or shorter than the ranges, or its LiME headers
            contradict it.
        UnsupportedOperationError: it is compressed by AVML.
        ValueError, TypeError: an argument is wrong, or that is no regular file.
        OSError: the file cannot be opened.
    """

    name: ClassVar[str] = "raw"

    def __init__(
        self,
        *,
        path: str | os.PathLike[str],
        address: int | None = None,
        ranges: Iterable[tuple[int, int]] | None = None,
    ) -> None:
        if address is not None and ranges is not None:
            raise TypeError("raw takes either address= or ranges=")
        spans = None if ranges is None else _checked(ranges)
        start = 0 if address is None else _aligned("address", address)
        super().__init__(ImageFile(path))
        try:
            if not self._file.size:
                raise CorruptImageError(f"{self.path} is empty")
            magic = self._file.read(0, min(4, self._file.size))
            if spans is not None:
                self._runs = _packed(self._file, spans)
            elif address is None and magic == _LIME:
                self._runs = _lime(self._file)
            elif address is None and magic == _AVML:
                raise UnsupportedOperationError(
                    f"{self.path} is compressed by AVML: avml-convert makes a LiME file of it"
                )
            else:
                self._runs = _flat(self._file, start)
        except BaseException:
            self.close()
            raise
        last = self._runs[-1]
        self.memory_end = last.gfn + last.pages << PAGE_SHIFT

    def runs(self, gfn: int, count: int) -> Iterator[Run]:
        """Return what is there of a range of pages; see :meth:`ImageBackend.runs`."""
        return clip(self._runs, gfn, count)


def _aligned(name: str, value: object) -> int:
    number = as_int(name, value)
    if number < 0 or number & PAGE_MASK:
        raise ValueError(f"{name} {number:#x} is not the beginning of a page of {PAGE_SIZE:#x}")
    return number


def _checked(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return ranges, as ints, if they are such as can be."""
    spans: list[tuple[int, int]] = []
    end = 0
    for pair in ranges:
        try:
            address, length = pair
        except (TypeError, ValueError):
            raise TypeError(f"ranges= wants (address, length) pairs, not {pair!r}") from None
        address, length = check_range(address, length)
        if (address | length) & PAGE_MASK:
            raise ValueError(f"range {address:#x}, length {length:#x} is not whole pages")
        if address < end:
            raise ValueError(
                f"range at {address:#x} begins before the one before it ends, {end:#x}"
            )
        end = address + length
        spans.append((address, length))
    if not spans:
        raise ValueError("ranges= is empty")
    return spans


def _flat(file: ImageFile, address: int) -> list[Run]:
    if address + file.size > ADDRESS_LIMIT:
        raise ValueError(
            f"{file.path} of {file.size:#x} bytes at {address:#x} ends beyond {ADDRESS_LIMIT:#x}, "
            "the end of a 52-bit physical address space"
        )
    return [Run(address >> PAGE_SHIFT, file.size + PAGE_MASK >> PAGE_SHIFT, 0)]


def _packed(file: ImageFile, spans: list[tuple[int, int]]) -> list[Run]:
    """Return the runs of ranges that lie in a file one after the other."""
    runs: list[Run] = []
    offset = 0
    for address, length in spans:
        if offset + length > file.size:
            raise CorruptImageError(
                f"{file.path} ends at {file.size:#x}: of the range {address:#x}.."
                f"{address + length:#x}, at {offset:#x}, {offset + length - file.size:#x} bytes "
                "are missing"
            )
        gfn, pages = address >> PAGE_SHIFT, length >> PAGE_SHIFT
        if runs and runs[-1].gfn + runs[-1].pages == gfn:
            last = runs.pop()
            runs.append(Run(last.gfn, last.pages + pages, last.offset))
        else:
            runs.append(Run(gfn, pages, offset))
        offset += length
    return runs


def _lime(file: ImageFile) -> list[Run]:
    """Return the runs of a LiME file, from its headers, one before each range."""
    spans: list[tuple[int, int, int]] = []  # first address, end, offset
    offset = 0
    while offset < file.size:
        place = f"{file.path}: LiME header {len(spans)} at {offset:#x}"
        if len(spans) == _MAX_RANGES:
            raise CorruptImageError(f"{place}: no more than {_MAX_RANGES} ranges are read")
        if offset + LIME_HEADER.size > file.size:
            raise CorruptImageError(f"{place} is cut off: the file ends at {file.size:#x}")
        magic, version, first, last, _ = LIME_HEADER.unpack(file.read(offset, LIME_HEADER.size))
        if magic != LIME_MAGIC or version != LIME_VERSION:
            raise CorruptImageError(
                f"{place} has magic {magic:#x} and version {version}: they should be "
                f"{LIME_MAGIC:#x} and {LIME_VERSION}"
            )
        if not first <= last < ADDRESS_LIMIT:
            raise CorruptImageError(f"{place} is of {first:#x}..{last:#x}, which is no range")
        offset += LIME_HEADER.size
        length = last + 1 - first
        if offset + length > file.size:
            raise CorruptImageError(
                f"{place} is of {length:#x} bytes, and the file ends at {file.size:#x}: "
                f"{offset + length - file.size:#x} bytes are missing"
            )
        spans.append((first, last + 1, offset))
        offset += length
    spans.sort()
    runs = []
    before = 0
    for first, end, offset in spans:
        if first < before:
            raise CorruptImageError(
                f"{file.path}: LiME range {first:#x}..{end:#x} at {offset:#x} overlaps another, "
                f"which ends at {before:#x}"
            )
        before = end
        gfn = first + PAGE_MASK >> PAGE_SHIFT
        pages = (end >> PAGE_SHIFT) - gfn
        if pages > 0:
            runs.append(Run(gfn, pages, offset + (gfn << PAGE_SHIFT) - first))
    if not runs:
        raise CorruptImageError(f"{file.path}: no LiME range has a whole page")
    return runs
