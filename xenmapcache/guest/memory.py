"""GuestMemory: typed access to guest memory through a map cache."""

from __future__ import annotations

import contextlib
import ctypes
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar, cast

from ..address import PAGE_MASK, as_int
from ..backend import Capability
from ..cache import DmaDirection, MapCache
from . import scatter, search
from .printable import Encoding

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from .yara import YaraMatch

Structure = TypeVar("Structure", bound=ctypes.Structure)

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
        if not isinstance(cache, MapCache):
            raise TypeError(
                f"cache must be a MapCache, not {cache!r}; over a backend write "
                "GuestMemory(MapCache(backend))"
            )
        self.cache = cache

    def read(self, address: int, length: int, *, fill: int | None = None) -> bytes:
        """Return bytes at a guest address; see :meth:`MapCache.read`."""
        return self.cache.read(address, length, fill=fill)

    def read_into(self, address: int, buffer: Buffer, *, fill: int | None = None) -> None:
        """Fill a buffer from a guest address on; see :meth:`MapCache.read_into`."""
        self.cache.read_into(address, buffer, fill=fill)

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
        position = as_int("address", address)
        limit = as_int("max_length", max_length) + 1
        if limit < 1:
            raise ValueError(f"max_length must be at least 0, not {max_length}")
        end = position + limit
        found = bytearray()
        while position < end:
            # Up to the page's end: the page after the string need not exist.
            step = min(PAGE_MASK + 1 - (position & PAGE_MASK), end - position)
            head, zero, _ = self.cache.read(position, step).partition(b"\0")
            found += head
            if zero:
                return bytes(found)
            position += step
        raise ValueError(f"no zero byte in {limit} bytes at {address:#x}")

    @contextlib.contextmanager
    def structure(
        self,
        address: int,
        layout: type[Structure],
        *,
        owner: str = "GuestMemory.structure",
        direction: DmaDirection | str | None = None,
    ) -> Iterator[Structure]:
        """Overlay a ctypes structure on guest memory, without a copy, for a ``with`` block.

        Its fields are the guest's memory under a DMA lease, which ends with the block;
        the structure stays safe after it, but may show memory that is no longer the guest's.
        Over a read-only source, such as a dump, it is a private copy: what is written to it
        reaches nothing else.

        Args:
            address: guest-physical, in bytes.
            layout: a subclass of ctypes.Structure (LittleEndianStructure).
            owner: of the lease.
            direction: of the lease; by default BIDIRECTIONAL, or TO_DEVICE over a read-only
                source. TO_DEVICE gives a copy, as ctypes cannot be read-only.

        Raises:
            TypeError: ``layout`` is not a structure, or has pointers.
            XenMapCacheError: others as :meth:`MapCache.map_dma`.
        """
        if not (isinstance(layout, type) and issubclass(layout, ctypes.Structure)):
            raise TypeError(f"layout must be a ctypes.Structure class, not {layout!r}")
        if _holds_pointers(layout):
            raise TypeError(
                f"{layout.__name__} has pointers, which ctypes would follow into this process: "
                "declare guest addresses as c_uint64 or c_uint32"
            )
        if direction is None:
            writes = Capability.WRITE in self.cache.backend.capabilities
            direction = DmaDirection.BIDIRECTIONAL if writes else DmaDirection.TO_DEVICE
        size = ctypes.sizeof(layout)
        with self.cache.map_dma(address, size, owner=owner, direction=direction) as lease:
            if lease.direction is DmaDirection.TO_DEVICE:
                yield layout.from_buffer_copy(lease.view)
            else:
                yield layout.from_buffer(lease.view)

    def segments(
        self,
        ranges: Iterable[tuple[int, int]],
        *,
        owner: str = "GuestMemory.segments",
        direction: DmaDirection | str = DmaDirection.BIDIRECTIONAL,
    ) -> scatter.Segments:
        """Lease a scatter-gather list for a ``with`` block: all ranges, or on an error none.

        ``read_from(fd, offset)`` and ``write_to(fd, offset)`` move data between the ranges and a
        file; ``views`` go into ``os.preadv``, ``socket.sendmsg`` and the like. Slices are counted
        in bytes across all ranges.

        Args:
            ranges: ``(address, length)`` pairs. A length of 0 takes no lease.
            owner: of the leases.
            direction: of the leases.

        Raises:
            XenMapCacheError: as :meth:`MapCache.map_dma`.
        """
        return scatter.Segments(self.cache, ranges, owner, direction)

    def find(
        self,
        pattern: bytes | re.Pattern[bytes],
        address: int = 0,
        length: int | None = None,
        *,
        max_match: int = 4096,
    ) -> Iterator[tuple[int, bytes]]:
        """Search memory, skipping holes; return an iterator of ``(address, match)``.

        Matches come in order and do not overlap. Memory is read a MiB at a time: anchors
        and lookbehind treat the beginning of such a chunk as the beginning of the text.

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
        return search.find(self.cache, pattern, address, length, max_match)

    def find_yara(
        self,
        rules: Any,  # noqa: ANN401 - yara need not be installed
        address: int = 0,
        length: int | None = None,
        *,
        max_match: int = 4096,
    ) -> Iterator[YaraMatch]:
        """Search memory by YARA's rules; return an iterator of the strings found, in order.

        Memory is read a MiB at a time, without holes, and YARA sees each such chunk as a file of
        its own: it judges a rule's condition there, and offsets and ``filesize`` are the chunk's.
        A rule without strings finds nothing. A string that crosses the edge of a chunk is found
        once. Of a string that matches more than a million times in a chunk, a WARNING is logged,
        and YARA leaves out the others.

        Args:
            rules: what ``yara.compile()`` returns.
            address: where to begin, guest-physical.
            length: how far to go, in bytes; by default to the end of memory.
            max_match: the longest match that is sure to be found whole where it crosses the edge
                of a chunk, in bytes.

        Raises:
            BackendUnavailableError: yara-python is not installed.
            TypeError, ValueError: an argument is wrong; or as :meth:`find`.
            yara.Error: YARA failed, for example because a chunk took too long.
        """
        from .yara import find_yara

        return find_yara(self.cache, rules, address, length, max_match)

    def strings(
        self,
        address: int = 0,
        length: int | None = None,
        *,
        min_length: int = 4,
        encoding: Encoding = "ascii",
    ) -> Iterator[tuple[int, str]]:
        """Return an iterator of ``(address, text)`` of the runs of printable ASCII, in order.

        Printable are the space, the tab and the characters from ``!`` and ``~``. Holes end a run.
        A run of more than 64 KiB may be reported in parts.

        Args:
            address: where to begin, guest-physical.
            length: how far to go, in bytes; by default to the end of memory.
            min_length: of a run, in characters.
            encoding: one byte a character, or two with the second one zero.

        Raises:
            ValueError: an argument has another value, or as :meth:`find`.
        """
        found = search.strings(self.cache, address, length, min_length, encoding)
        return chain.from_iterable(runs.pairs() for runs in found)


def _holds_pointers(kind: type) -> bool:
    """Tell whether reading a ctypes type would follow an address that the guest chose."""
    if issubclass(kind, ctypes.Structure | ctypes.Union):
        fields = [field for base in kind.__mro__ for field in vars(base).get("_fields_", ())]
        return any(_holds_pointers(field[1]) for field in fields)
    if issubclass(kind, ctypes.Array):
        return _holds_pointers(cast("type", kind._type_))
    return issubclass(kind, _POINTERS)
