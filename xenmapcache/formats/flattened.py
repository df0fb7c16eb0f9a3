"""Flattened dumps of ``makedumpfile -F`` and QEMU: a file as a stream of pieces with offsets."""

from __future__ import annotations

import struct
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from typing import NamedTuple

from ..errors import CorruptImageError
from .content import Content, start_of

MAGIC = b"makedumpfile\0\0\0\0"

_HEADER = struct.Struct(">16sqq")
_HEADER_BYTES = 1 << 12
_PIECE = struct.Struct(">qq")
_PIECE_BYTES = 16
_END = (-1, -1)
_MAX_PIECES = 1 << 21
_MAX_STREAMS = 64
REMEDY = "put it together with makedumpfile -R, and open the result"
_MAX_OFFSET = 1 << 62
_FEW_PIECES, _SMALL_BYTES = 1 << 12, 1 << 9
"""More pieces than that are refused if they have fewer bytes than that on average."""


class _Part(NamedTuple):
    """A part of a piece: where in the file it is, where in the range, and how long. Immutable."""

    place: int
    start: int
    size: int


class _Stream:
    """Pieces in ascending order, without overlaps."""

    def __init__(self) -> None:
        self.starts, self.sizes, self.places = array("Q"), array("Q"), array("Q")
        self.end = 0

    def append(self, start: int, size: int, place: int) -> None:
        self.starts.append(start)
        self.sizes.append(size)
        self.places.append(place)
        self.end = start + size

    def parts(self, offset: int, length: int) -> Iterator[_Part]:
        """Yield the parts that lie in a range."""
        number = max(0, bisect_right(self.starts, offset) - 1)
        while number < len(self.starts) and self.starts[number] < offset + length:
            start, size = self.starts[number], self.sizes[number]
            first, end = max(start, offset), min(start + size, offset + length)
            if first < end:
                yield _Part(self.places[number] + first - start, first - offset, end - first)
            number += 1


class Flattened:
    """The file that a flattened dump stands for. Immutable.

    What no piece has reads as zeros; where pieces overlap, the last one in the stream counts.

    Args:
        content: the flattened dump.

    Attributes:
        path: of the flattened dump.
        size: of the file that it stands for, in bytes.
        unfinished: why the stream is not complete; empty if it is.

    Raises:
        CorruptImageError: the stream contradicts the format, or has more pieces than are read.
    """

    def __init__(self, content: Content) -> None:
        self.path = content.path
        self.unfinished = ""
        self._content = content
        self._streams = [_Stream()]
        self._scan()
        self.size = max(stream.end for stream in self._streams)

    def _scan(self) -> None:
        content = self._content
        header = start_of(content, _HEADER.size)
        if len(header) < _HEADER.size or content.size < _HEADER_BYTES:
            raise self._corrupt(f"ends at {content.size:#x}, inside its header")
        magic, header_type, version = _HEADER.unpack(header)
        if (magic, header_type, version) != (MAGIC, 1, 1):
            raise self._corrupt(
                f"has type {header_type} and version {version}; expected 1 and 1, flattened"
            )
        position, read, unpack = _HEADER_BYTES, content.read, _PIECE.unpack
        last, end = self._streams[0], content.size - _PIECE_BYTES
        for number in range(_MAX_PIECES + 1):
            if position > end:
                self.unfinished = f"the stream ends at {content.size:#x} without its last piece"
                return
            offset, size = unpack(read(position, _PIECE_BYTES))
            start = position + _PIECE_BYTES
            position = start + size
            if number > _FEW_PIECES and position < number * _SMALL_BYTES:
                raise self._corrupt(f"its {number} pieces up to {position:#x} are too small")
            if size <= 0 or offset < 0 or position > content.size or offset + size > _MAX_OFFSET:
                if (offset, size) == _END:
                    return
                if size < 0 or offset < 0 or offset + size > _MAX_OFFSET:
                    raise self._corrupt(
                        f"piece {number} at {start:#x} has offset {offset:#x} and size {size:#x}"
                    )
                if position > content.size:
                    self._take_part_of_last(number, offset, start, size)
                    return
                continue
            if offset != last.end:  # most continue the previous one
                last = self._stream_for(offset, start)
            last.append(offset, size, start)
        raise self._corrupt(f"has more than {_MAX_PIECES} pieces: {REMEDY}")

    def _take_part_of_last(self, number: int, offset: int, start: int, size: int) -> None:
        end = self._content.size
        self.unfinished = (
            f"piece {number} at {start:#x} has {size:#x} bytes, but the stream ends at {end:#x}"
        )
        if end > start:
            self._stream_for(offset, start).append(offset, end - start, start)

    def _stream_for(self, offset: int, place: int) -> _Stream:
        """Return the stream that ends the nearest in front of an offset; a new one if none does."""
        best = None
        for stream in self._streams:
            if stream.end <= offset and (best is None or stream.end > best.end):
                best = stream
        if best is None:
            if len(self._streams) == _MAX_STREAMS:
                raise self._corrupt(
                    f"the piece at {place:#x} goes back to {offset:#x}, as too many others do: "
                    f"{REMEDY}"
                )
            best = _Stream()
            self._streams.append(best)
        return best

    def read(self, offset: int, length: int) -> bytes:
        """Return a range of bytes; see :meth:`.Content.read`."""
        self._check_inside(offset, length)
        data = bytearray(length)
        self.read_into(offset, memoryview(data))
        return bytes(data)

    def read_into(self, offset: int, *views: memoryview) -> None:
        """Fill views; see :meth:`.Content.read_into`."""
        self._check_inside(offset, sum(view.nbytes for view in views))
        for view in views:
            # In the order in which they were written.
            parts = sorted(
                part for stream in self._streams for part in stream.parts(offset, view.nbytes)
            )
            if len(parts) != 1 or parts[0].size < view.nbytes:
                view[:] = bytes(view.nbytes)
            for place, start, size in parts:
                self._content.read_into(place, view[start : start + size])
            offset += view.nbytes

    def _check_inside(self, offset: int, length: int) -> None:
        if min(offset, length) < 0 or offset + length > self.size:
            raise self._corrupt(
                f"{length:#x} bytes at {offset:#x} are wanted, and the unflattened file ends at "
                f"{self.size:#x}"
            )

    def _corrupt(self, text: str) -> CorruptImageError:
        return CorruptImageError(f"{self.path}, a flattened dump: {text}")
