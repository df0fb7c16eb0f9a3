"""PageIndex: where each page of a guest lies in a file, in 16 bytes a page at most."""

from __future__ import annotations

import logging
import operator
import os
import struct
import zlib
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from ..address import ADDRESS_LIMIT, PAGE_SHIFT, PAGE_SIZE
from ..atomicfile import new_file
from .image import Run

logger = logging.getLogger("xenmapcache")

GFN_LIMIT = ADDRESS_LIMIT >> PAGE_SHIFT
_BLOCK = 1 << 12
_KEPT = struct.Struct("<8sQQQ16s")
"""magic, the image's size and time of change, pages, notes; the checksum and the arrays follow."""
_KEPT_MAGIC = b"xmcindx1"
_WORD = (1 << 64) - 1  # of a time, which may be before 1970 or after 2262


class PageIndex:
    """An index of pages. Immutable.

    Args:
        gfns: frame numbers, strictly ascending.
        offsets: of the pages in the file, in bytes; None if they lie one after the other.
        start: where the first one lies then.
    """

    def __init__(self, gfns: array[int], offsets: array[int] | None, start: int = 0) -> None:
        if offsets is not None:  # an array that grew has room to spare, which two cannot have
            gfns, offsets = gfns[:], offsets[:]
        self.gfns = gfns
        self.offsets = offsets
        self._start = start

    def __len__(self) -> int:
        return len(self.gfns)

    @property
    def memory_end(self) -> int:
        """One past the last address, in bytes."""
        return self.gfns[-1] + 1 << PAGE_SHIFT if self.gfns else 0

    def runs(self, gfn: int, count: int) -> Iterator[Run]:
        """Return what is there of a range of pages; see :meth:`.ImageBackend.runs`."""
        gfns = self.gfns
        first = bisect_left(gfns, gfn)
        end = bisect_left(gfns, gfn + count, first)
        while first < end:
            number = gfns[first]
            stop = end
            if gfns[end - 1] - number != end - 1 - first:
                # Where numbers ascend, number - position never falls. Runs may be short: gallop.
                step = 1
                while first + step < end and gfns[first + step] - number == step:
                    step *= 2
                low, high = first + step // 2, min(first + step, end)
                stop = low + bisect_right(
                    range(low, high), number - first, key=lambda position: gfns[position] - position
                )
            if self.offsets is None:
                yield Run(number, stop - first, self._start + (first << PAGE_SHIFT))
            else:
                yield from self._adjacent(self.offsets, number, first, stop)
            first = stop

    @staticmethod
    def _adjacent(offsets: array[int], gfn: int, first: int, stop: int) -> Iterator[Run]:
        """Cut consecutive pages where they are not so in the file, too."""
        pages, begin = stop - first, offsets[first]
        end = begin + (pages << PAGE_SHIFT)
        # A bucket's mostly are: compared at once, in half the time.
        if (
            pages <= _BLOCK
            and offsets[stop - 1] == end - PAGE_SIZE
            and offsets[first:stop] == array("Q", range(begin, end, PAGE_SIZE))
        ):
            yield Run(gfn, pages, begin)
            return
        while first < stop:
            begin = expected = offsets[first]
            pages = 0
            for offset in islice(offsets, first, stop):
                if offset != expected:
                    break
                expected += PAGE_SIZE
                pages += 1
            yield Run(gfn, pages, begin)
            gfn += pages
            first += pages


def is_ascending(numbers: array[int]) -> bool:
    """Tell whether numbers are strictly ascending; quickly where many are consecutive."""
    total, position, template = len(numbers), 0, _Consecutive()
    while position < total - 1:
        first = numbers[position]
        room = min(_BLOCK - first % _BLOCK, total - position)
        for size in (room, min(room, 512), min(room, 64)):
            if numbers[position + size - 1] - first == size - 1:
                if numbers[position : position + size] != template.numbers(first, size):
                    return False
                break
        else:
            size = min(64, total - position)
            some = numbers[position : position + size]
            if not all(map(operator.lt, some, islice(some, 1, None))):
                return False
        position += size
        if position < total and numbers[position] <= numbers[position - 1]:
            return False
    return True


class _Consecutive:
    """Arrays of consecutive numbers, made from their octets: faster than a range by far."""

    def __init__(self) -> None:
        self._octets = bytearray(8 * _BLOCK)
        self._octets[0::8] = bytes(range(256)) * (_BLOCK >> 8)
        self._first = bytes(8)  # the octets of the block's first number
        self._block = -1
        self._numbers = array("Q")

    def numbers(self, first: int, count: int) -> array[int]:
        """Return ``count`` numbers from ``first`` on, which do not cross a multiple of _BLOCK."""
        block, start = divmod(first, _BLOCK)
        if block != self._block:
            octets = (block * _BLOCK).to_bytes(8, "little")
            if octets[1] != self._first[1] or self._block < 0:
                parts = (bytes([octets[1] + high]) * 256 for high in range(_BLOCK >> 8))
                self._octets[1::8] = b"".join(parts)
            for position in range(2, 8):
                if octets[position] != self._first[position]:
                    self._octets[position::8] = bytes([octets[position]]) * _BLOCK
            self._block, self._first = block, octets
            self._numbers = array("Q", self._octets)
        return self._numbers[start : start + count]


def store_index(path: str, size: int, changed: int, index: PageIndex, notes: bytes) -> None:
    """Write an index to a file of its own; where that cannot be, log why.

    Args:
        path: of that file.
        size: of the image that it is about, in bytes.
        changed: when that was, in ns.
        index: one with offsets.
        notes: 16 bytes to keep with it.
    """
    assert index.offsets is not None  # noqa: S101 - the others are read as fast as they are kept
    head = _KEPT.pack(_KEPT_MAGIC, size, changed & _WORD, len(index), notes)
    checksum = zlib.crc32(index.offsets, zlib.crc32(index.gfns, zlib.crc32(head)))
    try:
        with new_file(path) as fd, open(fd, "wb", closefd=False) as file:
            file.write(head + checksum.to_bytes(4, "little"))
            file.write(index.gfns)
            file.write(index.offsets)
    except OSError as error:
        logger.warning("%s cannot be written, so the index is not kept: %s", path, error)


def load_index(path: str, size: int, changed: int) -> tuple[PageIndex, bytes] | None:
    """Return an index that was kept, and its notes; None if there is none that is right.

    Args:
        path: of that file.
        size: of the image, in bytes.
        changed: when that was, in ns.
    """
    try:
        with Path(path).open("rb") as file:
            head, checksum = file.read(_KEPT.size), file.read(4)
            if len(head) < _KEPT.size:
                raise ValueError("it is cut off")
            magic, old_size, old_changed, pages, notes = _KEPT.unpack(head)
            if (magic, old_size, old_changed) != (_KEPT_MAGIC, size, changed & _WORD):
                raise ValueError("it is of another file, or of what this one was before")
            if os.fstat(file.fileno()).st_size != _KEPT.size + 4 + 16 * pages:
                raise ValueError("it has not the size that it should have")
            gfns, offsets = array("Q", file.read(8 * pages)), array("Q", file.read(8 * pages))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.info("%s is not used: %s", path, error)
        return None
    if (
        int.from_bytes(checksum, "little")
        != zlib.crc32(offsets, zlib.crc32(gfns, zlib.crc32(head)))
        or not is_ascending(gfns)
        or (pages and (gfns[-1] >= GFN_LIMIT or max(offsets) + PAGE_SIZE > size))
    ):
        logger.info("%s is not used: it is damaged", path)
        return None
    return PageIndex(gfns, offsets), notes
