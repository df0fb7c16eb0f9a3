"""GuestMemory: typed access to guest memory through a map cache."""

from __future__ import annotations

import contextlib
import ctypes
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from typing import Literal, TypeVar

from .address import PAGE_MASK, PAGE_SHIFT, KiB, MiB, as_int, check_range, page_span
from .binding import libc
from .cache import MapCache
from .errors import FaultError
from .ledger import DmaDirection

Structure = TypeVar("Structure", bound=ctypes.Structure)

_Search = Callable[[bytearray, int, int], Iterator[tuple[int, int]]]
"""Finds matches between two positions of a text: where each begins and where it ends."""

_PIECE = MiB
_LONGEST_STRING = 64 * KiB
_KINDS = bytes(1 if 32 <= byte < 127 or byte == 9 else 2 * (not byte) for byte in range(256))
"""Translates printable characters to 1, zeros to 2, others to 0: quicker than a regular class."""
_CHARACTERS = {"ascii": rb"\x01", "utf-16le": rb"\x01\x02"}
_POINTERS = (
    ctypes.c_char_p,
    ctypes.c_wchar_p,
    ctypes.py_object,
    ctypes._Pointer,  # noqa: SLF001 - the base of what POINTER() makes has no other name
    ctypes._CFuncPtr,  # type: ignore[attr-defined] # noqa: SLF001 - nor has that of CFUNCTYPE()
)


class GuestMemory:
    """Numbers, strings, structures, scatter-gather lists and search. All little-endian.

    Args:
        cache: the cache to go through; it stays yours to close.

    All methods raise what :meth:`MapCache.read` and :meth:`MapCache.write` raise:
    FaultError where a page is not there, ClosedError after close, and so on.

    Synchronization: as the cache. A number that does not cross a bucket's edge is read
    and written by one copy; the guest may be writing it at the same time.
    """

    def __init__(self, cache: MapCache) -> None:
        self.cache = cache

    def read_u8(self, address: int) -> int:
        """Return the byte at a guest address."""
        return self.cache.read(address, 1)[0]

    def read_u16(self, address: int) -> int:
        """Return the 2-byte number at a guest address."""
        return int.from_bytes(self.cache.read(address, 2), "little")

    def read_u32(self, address: int) -> int:
        """Return the 4-byte number at a guest address."""
        return int.from_bytes(self.cache.read(address, 4), "little")

    def read_u64(self, address: int) -> int:
        """Return the 8-byte number at a guest address."""
        return int.from_bytes(self.cache.read(address, 8), "little")

    def write_u8(self, address: int, value: int) -> None:
        """Write a byte; ValueError if the value does not fit."""
        self._write(address, value, 1)

    def write_u16(self, address: int, value: int) -> None:
        """Write a 2-byte number; ValueError if the value does not fit."""
        self._write(address, value, 2)

    def write_u32(self, address: int, value: int) -> None:
        """Write a 4-byte number; ValueError if the value does not fit."""
        self._write(address, value, 4)

    def write_u64(self, address: int, value: int) -> None:
        """Write an 8-byte number; ValueError if the value does not fit."""
        self._write(address, value, 8)

    def _write(self, address: int, value: int, size: int) -> None:
        number = as_int("value", value)
        if not 0 <= number < 1 << 8 * size:
            raise ValueError(f"value {number:#x} does not fit a u{8 * size}")
        self.cache.write(address, number.to_bytes(size, "little"))

    def read_cstring(self, address: int, max_length: int = 4096) -> bytes:
        """Return the bytes before the next zero byte.

        Args:
            address: guest-physical, in bytes.
            max_length: how many bytes may come before the zero byte.

        Raises:
            ValueError: there is no zero byte in ``max_length + 1`` bytes.
            FaultError: a page is not there before a zero byte has come.
        """
        position, limit = check_range(address, as_int("max_length", max_length) + 1)
        end = position + limit
        found = b""
        while position < end:
            # Up to the page's end: what lies behind the string need not be there.
            step = min(PAGE_MASK + 1 - (position & PAGE_MASK), end - position)
            head, zero, _ = self.cache.read(position, step).partition(b"\0")
            found += head
            if zero:
                return found
            position += step
        raise ValueError(f"no zero byte in {limit} bytes at {address:#x}")

    @contextlib.contextmanager
    def structure(
        self,
        address: int,
        layout: type[Structure],
        *,
        owner: str = "GuestMemory.structure",
        direction: DmaDirection = DmaDirection.BIDIRECTIONAL,
    ) -> Iterator[Structure]:
        """Overlay a ctypes structure on guest memory, without a copy, for a ``with`` block.

        Its fields are the guest's memory under a DMA lease, which ends with the block;
        the structure stays safe after it, but may show memory that is no longer the guest's.

        Args:
            address: guest-physical, in bytes.
            layout: a subclass of ctypes.Structure (LittleEndianStructure).
            owner: of the lease.
            direction: of the lease. TO_DEVICE gives a copy, as ctypes cannot be read-only.

        Raises:
            TypeError: ``layout`` is no structure, or has pointers.
            XenMapCacheError: others as :meth:`MapCache.map_dma`.
        """
        if not (isinstance(layout, type) and issubclass(layout, ctypes.Structure)):
            raise TypeError(f"layout must be a ctypes.Structure class, not {layout!r}")
        if _holds_pointers(layout):
            raise TypeError(
                f"{layout.__name__} has pointers, which ctypes would follow into this process: "
                "declare guest addresses as c_uint64 or c_uint32"
            )
        size = ctypes.sizeof(layout)
        with self.cache.map_dma(address, size, owner=owner, direction=direction) as lease:
            if direction is DmaDirection.TO_DEVICE:
                yield layout.from_buffer_copy(lease.view)
            else:
                yield layout.from_buffer(lease.view)

    @contextlib.contextmanager
    def segments(
        self,
        ranges: Iterable[tuple[int, int]],
        *,
        owner: str = "GuestMemory.segments",
        direction: DmaDirection = DmaDirection.BIDIRECTIONAL,
    ) -> Iterator[list[memoryview]]:
        """Map a scatter-gather list for a ``with`` block: all of it, or on an error nothing.

        The views go as they are into ``os.preadv``, ``os.pwritev``, ``socket.sendmsg``.

        Args:
            ranges: ``(address, length)`` pairs.
            owner: of the leases.
            direction: of the leases.

        Raises:
            XenMapCacheError: as :meth:`MapCache.map_dma`.
        """
        with contextlib.ExitStack() as stack:
            yield [
                stack.enter_context(
                    self.cache.map_dma(address, length, owner=owner, direction=direction)
                ).view
                for address, length in ranges
            ]

    def find(
        self,
        pattern: bytes | re.Pattern[bytes],
        address: int = 0,
        length: int | None = None,
        *,
        max_match: int = 4096,
    ) -> Iterator[tuple[int, bytes]]:
        """Search memory, passing over holes; return an iterator of ``(address, match)``.

        Matches come in order and do not overlap. Memory is read a MiB at a time: anchors
        and look-behind take the beginning of such a piece for that of the text.

        Args:
            pattern: bytes, or a regular expression compiled from bytes.
            address: where to begin, guest-physical.
            length: how far to go, in bytes; by default to the end of memory.
            max_match: the longest match that is sure to be found whole where it crosses
                the edge of a chunk, in bytes; at least the length of plain bytes.

        Raises:
            TypeError: the pattern is neither.
            ValueError: it matches nothing, or the source does not know its end and no
                length is given.
        """
        if as_int("max_match", max_match) < 1:
            raise ValueError(f"max_match {max_match} is no length of a match")
        if isinstance(pattern, re.Pattern):
            if not isinstance(pattern.pattern, bytes):
                raise TypeError("pattern must be compiled from bytes, not from str")
            empty = pattern.match(b"") is not None
            search = partial(_spans, pattern)
        elif isinstance(pattern, bytes | bytearray):
            empty = not pattern
            if len(pattern) == 2:  # for which memmem has no shortcut, and the engine has
                search = partial(_spans, re.compile(re.escape(bytes(pattern))))
            else:
                search = partial(_spans_of_bytes, bytes(pattern))
            max_match = len(pattern)
        else:
            raise TypeError(f"pattern must be bytes or a compiled pattern, not {pattern!r}")
        if empty:
            raise ValueError(f"pattern {pattern!r} matches nothing at all, and so everywhere")
        return self._search(search, *self._range(address, length), max_match)

    def strings(
        self,
        address: int = 0,
        length: int | None = None,
        *,
        min_length: int = 4,
        encoding: Literal["ascii", "utf-16le"] = "ascii",
    ) -> Iterator[tuple[int, str]]:
        """Return an iterator of ``(address, text)`` of the runs of printable ASCII, in order.

        Printable are the space, the tab and what is between ``!`` and ``~``. Holes end a run.
        One of more than 64 KiB may come in pieces.

        Args:
            address: where to begin, guest-physical.
            length: how far to go, in bytes; by default to the end of memory.
            min_length: of a run, in characters.
            encoding: one byte a character, or two with the second one zero.

        Raises:
            ValueError: an argument is none of these, or as :meth:`find`.
        """
        if as_int("min_length", min_length) < 1:
            raise ValueError(f"min_length {min_length} is no length of a string")
        if encoding not in _CHARACTERS:
            raise ValueError(f"encoding {encoding!r} is not one of {', '.join(_CHARACTERS)}")
        longest = _LONGEST_STRING // len("a".encode(encoding))
        if min_length > longest:
            raise ValueError(
                f"min_length {min_length} is more than {longest}: so many characters may come "
                "in pieces that are too short"
            )
        one = _CHARACTERS[encoding]
        # Written out, so that the engine has a prefix to look for.
        expression = re.compile(one * min_length + b"(?:%b)*+" % one)
        found = self._search(
            lambda text, *span: _spans(expression, text.translate(_KINDS), *span),
            *self._range(address, length),
            _LONGEST_STRING,
        )
        return ((start, text.decode(encoding)) for start, text in found)

    def _range(self, address: int, length: int | None) -> tuple[int, int]:
        """Return the first address of a range and its end; the end of memory by default."""
        if length is None:
            end = self.cache.memory_end
            if end is None:
                raise ValueError("this source does not know where its memory ends: give a length")
            length = max(0, end - address)
        address, length = check_range(address, length, empty=True)
        return address, address + length

    def _search(
        self, search: _Search, address: int, end: int, overlap: int
    ) -> Iterator[tuple[int, bytes]]:
        after = address  # where the last match ended
        # One for all pieces: taking and giving back so much memory costs more than the search.
        text = bytearray(_PIECE + overlap)
        for piece, edge in self._pieces(address, end):
            for start, size in self.cache.present(piece, min(edge + overlap, end) - piece):
                if start >= edge:
                    break
                try:
                    self._fill(text, start, size)
                except FaultError:
                    continue  # ballooned out just now: a hole like others
                for first, behind in search(text, max(0, after - start), size):
                    if start + first >= edge:
                        break  # the next piece finds it whole
                    yield start + first, bytes(text[first:behind])
                    after = start + behind

    def _pieces(self, address: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield where each piece of a range begins and ends, without those known to be holes."""
        known = self.cache.backend.present(*page_span(address, end - address))
        whole = [(address >> PAGE_SHIFT, (end - address >> PAGE_SHIFT) + 2)]
        for gfn, pages in whole if known is None else known:
            address = max(address, gfn << PAGE_SHIFT)
            while address < min(end, gfn + pages << PAGE_SHIFT):
                edge = min((address | _PIECE - 1) + 1, end)
                yield address, edge
                address = edge

    def _fill(self, text: bytearray, address: int, length: int) -> None:
        position = 0
        for view in self.cache.views(address, length):
            behind = position + len(view)
            text[position:behind] = view
            position = behind
            del view  # or there may be no room for the next one


def _spans(
    expression: re.Pattern[bytes], text: bytearray, start: int, end: int
) -> Iterator[tuple[int, int]]:
    return (match.span() for match in expression.finditer(text, start, end))


def _spans_of_bytes(
    pattern: bytes, text: bytearray, start: int, end: int
) -> Iterator[tuple[int, int]]:
    size = len(pattern)
    return ((found, found + size) for found in libc.positions(text, pattern, start, end))


@cache
def _holds_pointers(kind: type) -> bool:
    """Tell whether reading a ctypes type would follow an address that the guest chose."""
    if issubclass(kind, ctypes.Structure | ctypes.Union):
        fields = [field for base in kind.__mro__ for field in vars(base).get("_fields_", ())]
        return any(_holds_pointers(field[1]) for field in fields)
    if issubclass(kind, ctypes.Array):
        return _holds_pointers(kind._type_)
    return issubclass(kind, _POINTERS)
