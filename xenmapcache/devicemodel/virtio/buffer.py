"""GuestBuffer: the guest memory that a virtio request names, before it is leased."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...cache import DmaDirection, MapCache
from ...errors import XenMapCacheError
from ...guest.scatter import Segments

if TYPE_CHECKING:
    from typing_extensions import Buffer


class BrokenDriverError(XenMapCacheError):
    """A driver has broken the rules of virtio, or its ring or a buffer cannot be accessed.

    :class:`VirtioDevice` then sets NEEDS_RESET. A device raises this error if a request has no
    room for an answer.
    """


class GuestBuffer:
    """Ranges of guest memory that are used as one. It holds no memory and no lease.

    A slice, counted in bytes, is a :class:`GuestBuffer` too.

    Args:
        cache: of the guest's memory.
        ranges: ``(address, length)`` pairs; the guest has chosen the addresses.
        direction: TO_DEVICE if the device only reads it.

    Synchronization: it does not change; the guest may write the bytes at any time.
    """

    __slots__ = ("_cache", "_length", "direction", "ranges")

    def __init__(
        self, cache: MapCache, ranges: Sequence[tuple[int, int]], direction: DmaDirection
    ) -> None:
        self._cache = cache
        self.ranges = tuple(ranges)
        self.direction = direction
        total = 0
        for _, length in self.ranges:  # a sum over a generator takes twice as long
            total += length
        self._length = total

    def __repr__(self) -> str:
        place = f" from {self.ranges[0][0]:#x}" if self.ranges else ""
        return (
            f"<GuestBuffer, {self.direction.value}, {self._length} bytes in "
            f"{len(self.ranges)} ranges{place}>"
        )

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, part: slice) -> GuestBuffer:
        start, stop, step = part.indices(self._length)
        if step != 1:
            raise ValueError(f"the step of a slice must be 1, not {step}")
        if not start and stop == self._length:
            return self
        found = []
        for address, length in self.ranges:
            if start < length and stop > 0:
                low = start if start > 0 else 0
                high = stop if stop < length else length
                if low < high:
                    found.append((address + low, high - low))
            start, stop = start - length, stop - length
        return GuestBuffer(self._cache, found, self.direction)

    def read(self, length: int | None = None) -> bytes:
        """Return a copy of the bytes. Meant for headers.

        Args:
            length: how many, from the first one on; None for all.

        Raises:
            BrokenDriverError: a page is missing, or cannot be mapped.
        """
        if length is not None and (not self.ranges or self.ranges[0][1] < length):
            return self[:length].read()
        try:
            if length is not None:
                return self._cache.read(self.ranges[0][0], length)
            return b"".join(self._cache.read(address, length) for address, length in self.ranges)
        except XenMapCacheError as error:
            raise BrokenDriverError(f"{self!r} cannot be read: {error}") from error

    def write(self, data: Buffer, offset: int = 0) -> int:
        """Write bytes into the buffer, and return how many there are.

        Use it for a status, or for what is not worth a lease. The device must have checked that
        they fit.

        Args:
            data: the bytes.
            offset: in the buffer.

        Raises:
            BrokenDriverError: a page is missing, or cannot be mapped. A part may be written.
        """
        rest = data if isinstance(data, bytes | bytearray) else bytes(data)
        total = len(rest)
        try:
            for address, length in self.ranges:
                if offset >= length:
                    offset -= length
                    continue
                if len(rest) <= length - offset:
                    self._cache.write(address + offset, rest)
                    break
                self._cache.write(address + offset, rest[: length - offset])
                rest, offset = rest[length - offset :], 0
        except XenMapCacheError as error:
            raise BrokenDriverError(f"{self!r} cannot be written: {error}") from error
        return total

    def lease(self, owner: str) -> Segments:
        """Return the buffer as :class:`Segments`, which a ``with`` block leases."""
        return Segments(self._cache, self.ranges, owner, self.direction)
