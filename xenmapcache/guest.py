"""GuestMemory: typed access to guest memory through a map cache."""

from __future__ import annotations

import contextlib
import ctypes
import re
from collections.abc import Iterable, Iterator
from functools import cache
from typing import TypeVar

from .address import PAGE_MASK, MiB, as_int, check_range
from .cache import MapCache
from .errors import FaultError
from .ledger import DmaDirection

Structure = TypeVar("Structure", bound=ctypes.Structure)

_PIECE = MiB
_POINTERS = (
    ctypes.c_char_p,
    ctypes.c_wchar_p,
    ctypes.py_object,
    ctypes._Pointer,  # noqa: SLF001 - the base of what POINTER() makes has no other name
    ctypes._CFuncPtr,  # type: ignore[attr-defined] # noqa: SLF001
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
        if isinstance(pattern, re.Pattern):
            expression = pattern
            if not isinstance(pattern.pattern, bytes):
                raise TypeError("pattern must be compiled from bytes, not from str")
        elif isinstance(pattern, bytes | bytearray):
            expression = re.compile(re.escape(bytes(pattern)), re.DOTALL)
            max_match = max(max_match, len(pattern))
        else:
            raise TypeError(f"pattern must be bytes or a compiled pattern, not {pattern!r}")
        if as_int("max_match", max_match) < 1:
            raise ValueError(f"max_match {max_match} is no length of a match")
        if expression.match(b""):
            raise ValueError(f"pattern {pattern!r} matches nothing at all, and so everywhere")
        if length is None:
            end = self.cache.memory_end
            if end is None:
                raise ValueError("this source does not know where its memory ends: give a length")
            length = max(0, end - address)
        address, length = check_range(address, length, empty=True)
        return self._find(expression, address, address + length, max_match)

    def _find(
        self, expression: re.Pattern[bytes], address: int, end: int, overlap: int
    ) -> Iterator[tuple[int, bytes]]:
        after = address  # where the last match ended
        for piece in range(address, end, _PIECE):
            edge = min(piece + _PIECE, end)
            for start, size in self.cache.present(piece, min(edge + overlap, end) - piece):
                try:
                    text = self.cache.read(start, size)
                except FaultError:
                    continue  # ballooned out just now: a hole like others
                for match in expression.finditer(text, max(0, after - start)):
                    if start + match.start() >= edge:
                        break  # the next piece finds it whole
                    yield start + match.start(), match[0]
                    after = start + match.end()


@cache
def _holds_pointers(kind: type) -> bool:
    """Tell whether reading a ctypes type would follow an address that the guest chose."""
    if issubclass(kind, ctypes.Structure | ctypes.Union):
        fields = [field for base in kind.__mro__ for field in vars(base).get("_fields_", ())]
        return any(_holds_pointers(field[1]) for field in fields)
    if issubclass(kind, ctypes.Array):
        return _holds_pointers(kind._type_)
    return issubclass(kind, _POINTERS)
