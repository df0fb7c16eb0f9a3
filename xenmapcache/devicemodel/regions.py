"""Which device answers where: claimed ranges, and their handlers."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Callable, Iterator
from operator import attrgetter, index
from typing import Protocol, TypeVar

from ..ioreq import RequestKind

Read = Callable[[int, int], int]
Write = Callable[[int, int, int], object]
ReadT = TypeVar("ReadT", bound=Read)
WriteT = TypeVar("WriteT", bound=Write)
Handler = TypeVar("Handler")

_start = attrgetter("start")


class Readable(Protocol):
    """A device that the guest can read."""

    def read(self, offset: int, size: int) -> int:
        """Return what the guest is to read.

        Args:
            offset: from the start of the region, in bytes.
            size: 1, 2, 4 or 8 bytes.

        Returns:
            A number that fits ``size`` bytes.
        """


class Writable(Protocol):
    """A device that the guest can write."""

    def write(self, offset: int, size: int, value: int) -> object:
        """Take what the guest wrote.

        Args:
            offset: from the start of the region, in bytes.
            size: 1, 2, 4 or 8 bytes.
            value: a number of that size.
        """


Device = Readable | Writable
"""What answers for a region: it has one of the two methods, or both."""


class Region:
    """A range that an ioreq server has claimed. Give it handlers with its two decorators.

    Without a handler, reads give all ones and writes are ignored.

    Attributes:
        kind: PORT, MMIO or PCI_CONFIG.
        start: of the range: a port, an address, or ``bdf << 32``.
        length: in ports or bytes; the range is half-open.

    Synchronization: handlers run one at a time, in the thread that serves.
    """

    __slots__ = ("_handle_read", "_handle_write", "_release", "kind", "length", "start")

    def __init__(
        self,
        kind: RequestKind,
        start: int,
        length: int,
        device: object,
        release: Callable[[Region], None],
    ) -> None:
        self.kind = kind
        self.start = start
        self.length = length
        self._release = release
        self._handle_read: Read | None = getattr(device, "read", None)
        self._handle_write: Write | None = getattr(device, "write", None)
        if device is not None and self._handle_read is None and self._handle_write is None:
            raise TypeError(
                f"device {device!r} has neither read(offset, size) nor write(offset, size, value)"
            )

    def __repr__(self) -> str:
        return f"<{self.kind.name} region {self.start:#x}..{self.end:#x}>"

    @property
    def end(self) -> int:
        """One past the range."""
        return self.start + self.length

    def read(self, handler: ReadT) -> ReadT:
        """Have ``handler(offset, size) -> int`` called for reads; a decorator."""
        self._handle_read = _callable(handler)
        return handler

    def write(self, handler: WriteT) -> WriteT:
        """Have ``handler(offset, size, value)`` called for writes; a decorator."""
        self._handle_write = _callable(handler)
        return handler

    def release(self) -> None:
        """Give the range back: what the guest does there is no longer seen.

        Raises:
            XenCallError: Xen refused.
            ValueError: it was given back before.
        """
        self._release(self)

    def do_read(self, offset: int, size: int) -> int:
        """Return what the device answers.

        Raises:
            TypeError, ValueError: that is no number of so many bytes.
            Exception: what the handler raised.
        """
        if self._handle_read is None:
            return (1 << 8 * size) - 1
        value = index(self._handle_read(offset, size))
        if value >> 8 * size:  # -1 of a negative number
            raise ValueError(f"the handler returned {value:#x}, which does not fit {size} bytes")
        return value

    def do_write(self, offset: int, size: int, value: int) -> None:
        """Hand what was written to the device; raises what the handler raises."""
        if self._handle_write is not None:
            self._handle_write(offset, size, value)


def _callable(handler: Handler) -> Handler:
    if not callable(handler):
        raise TypeError(f"handler {handler!r} cannot be called")
    return handler


class Regions:
    """All regions of a server, found by address.

    Synchronization: changed under the server's lock only.
    """

    def __init__(self) -> None:
        self._sorted: dict[RequestKind, list[Region]] = {
            RequestKind.PORT: [],
            RequestKind.MMIO: [],
            RequestKind.PCI_CONFIG: [],
        }

    def __iter__(self) -> Iterator[Region]:
        return (region for regions in self._sorted.values() for region in regions)

    def add(self, region: Region) -> None:
        """Note a region.

        Raises:
            ValueError: another one lies there already.
        """
        regions = self._sorted[region.kind]
        for other in regions:
            if other.start < region.end and region.start < other.end:
                raise ValueError(f"{region!r} overlaps {other!r}, which this server has claimed")
        insort(regions, region, key=_start)

    def remove(self, region: Region) -> None:
        """Forget a region.

        Raises:
            ValueError: it is not there.
        """
        try:
            self._sorted[region.kind].remove(region)
        except ValueError:
            raise ValueError(f"{region!r} was given back before") from None

    def find(self, kind: RequestKind, address: int, size: int) -> Region | None:
        """Return the region that holds the whole of an access; None if there is none."""
        regions = self._sorted[kind]
        position = bisect_right(regions, address, key=_start)
        if not position:
            return None
        region = regions[position - 1]
        return region if address + size <= region.end else None
