"""Bitmaps of pages in a file: which pages are set, and how many are set before each."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterator
from typing import NamedTuple

from .content import Content

_BLOCK_BYTES = 1 << 12
_BLOCK_BITS = 8 * _BLOCK_BYTES
_CHUNK_BYTES = 1 << 20


class SetPages(NamedTuple):
    """Consecutive pages whose bits are set. Immutable.

    Attributes:
        gfn: the first page.
        pages: how many.
        rank: how many bits are set before the first one.
    """

    gfn: int
    pages: int
    rank: int


class PageBitmap:
    """A bitmap in a file, a bit for each page, the lowest bit of a byte first. Immutable.

    It stays in the file: 8 bytes of memory for each 32,768 pages say how many bits are set
    before them.

    Args:
        content: the file.
        offset: of the bitmap in the file, in bytes.
        pages: bits that count.

    Raises:
        CorruptImageError: the bitmap ends beyond the file.
    """

    def __init__(self, content: Content, offset: int, pages: int) -> None:
        self._content = content
        self._offset = offset
        self._pages = pages
        self._ranks = array("Q", [0])
        self._scan()

    def _scan(self) -> None:
        size = -(-self._pages // 8)
        total = 0
        for start in range(0, size, _CHUNK_BYTES):
            chunk = self._content.read(self._offset + start, min(_CHUNK_BYTES, size - start))
            if start + len(chunk) == size:
                chunk = self._cut(chunk, start)
            if not chunk.strip(b"\0"):  # as in a sparse file, of which much costs nothing
                self._ranks.extend([total] * -(-len(chunk) // _BLOCK_BYTES))
                continue
            for place in range(0, len(chunk), _BLOCK_BYTES):
                block = chunk[place : place + _BLOCK_BYTES]
                total += int.from_bytes(block, "little").bit_count()
                self._ranks.append(total)

    def _cut(self, data: bytes, start: int) -> bytes:
        """Clear the bits of a bitmap's bytes, from `start` on, that are of no page."""
        bits = self._pages - 8 * start
        if bits >= 8 * len(data):
            return data
        return data[:-1] + bytes([data[-1] & (1 << bits % 8) - 1])

    def __len__(self) -> int:
        """Return how many bits are set."""
        return self._ranks[-1]

    @property
    def end(self) -> int:
        """One past the last page whose bit is set; 0 if there is none."""
        block = bisect_left(self._ranks, len(self)) - 1
        if block < 0:
            return 0
        return block * _BLOCK_BITS + self._block(block, _BLOCK_BYTES).bit_length()

    def _block(self, block: int, length: int) -> int:
        """Return the first bytes of a block as a number."""
        start = block * _BLOCK_BYTES
        length = min(length, -(-self._pages // 8) - start)
        data = self._content.read(self._offset + start, length)
        return int.from_bytes(self._cut(data, start), "little")

    def runs(self, gfn: int, count: int) -> Iterator[SetPages]:
        """Yield the pages of a range whose bits are set, in ascending order.

        Two that touch may come one after the other.
        """
        end = min(gfn + count, self._pages)
        while gfn < end:
            block = gfn // _BLOCK_BITS
            stop = min(end, (block + 1) * _BLOCK_BITS)
            rank, following = self._ranks[block], self._ranks[block + 1]
            if following - rank == _BLOCK_BITS:
                yield SetPages(gfn, stop - gfn, rank + gfn % _BLOCK_BITS)
            elif following > rank:
                yield from self._in_block(block, gfn, stop)
            gfn = stop

    def _in_block(self, block: int, gfn: int, stop: int) -> Iterator[SetPages]:
        base = block * _BLOCK_BITS
        first, end = gfn - base, stop - base
        bits = self._block(block, -(-end // 8)) & (1 << end) - 1
        rank = self._ranks[block] + (bits & (1 << first) - 1).bit_count()
        # As text, of which find() finds the next change fast.
        text = f"{bits >> first:b}"[::-1]
        position = text.find("1")
        while position >= 0:
            change = text.find("0", position)
            pages = (change if change >= 0 else len(text)) - position
            yield SetPages(gfn + position, pages, rank)
            rank += pages
            position = text.find("1", position + pages)
