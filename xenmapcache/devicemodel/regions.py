"""Which device answers where: claimed ranges, and their handlers."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Protocol, TypeVar

from ..ioreq import BUS_OFFSET, RequestKind, bdf_text

Read = Callable[[int, int], int]
Write = Callable[[int, int, int], object]
ReadT = TypeVar("ReadT", bound=Read)
WriteT = TypeVar("WriteT", bound=Write)
HandlerT = TypeVar("HandlerT")
Handler = Read | Write

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
        repeatable: a write that a process had begun when it was killed is carried out again by the
            next one. False, unless the device has an attribute of that name that is true.

    Synchronization: handlers run one at a time, in the thread that serves.
    """

    __slots__ = (
        "_release",
        "kind",
        "length",
        "read_handler",
        "repeatable",
        "start",
        "write_handler",
    )

    def __init__(
        self,
        kind: RequestKind,
        start: int,
        length: int,
        device: object,
        release: Callable[[Region], None],
    ) -> None:
        if isinstance(device, type):
            raise TypeError(f"device {device!r} is a class; pass an instance of it")
        self.kind = kind
        self.start = start
        self.length = length
        self._release = release
        self.repeatable = bool(getattr(device, "repeatable", False))
        self.read_handler: Read | None = getattr(device, "read", None)
        self.write_handler: Write | None = getattr(device, "write", None)
        if device is not None and self.read_handler is None and self.write_handler is None:
            raise TypeError(
                f"device {device!r} has neither read(offset, size) nor write(offset, size, value)"
            )

    def __repr__(self) -> str:
        if self.kind is RequestKind.PCI_CONFIG:
            return f"<PCI_CONFIG region {bdf_text(self.start >> BUS_OFFSET)}>"
        return f"<{self.kind.name} region {self.start:#x}..{self.end:#x}>"

    @property
    def end(self) -> int:
        """One past the range."""
        return self.start + self.length

    @property
    def xen_range(self) -> tuple[int, int]:
        """What Xen is told: the first and last address, or a PCI function's number twice."""
        if self.kind is RequestKind.PCI_CONFIG:
            bdf = self.start >> BUS_OFFSET
            return bdf, bdf
        return self.start, self.end - 1

    def read(self, handler: ReadT) -> ReadT:
        """Have ``handler(offset, size) -> int`` called for reads; a decorator."""
        self.read_handler = _callable(handler)
        return handler

    def write(self, handler: WriteT) -> WriteT:
        """Have ``handler(offset, size, value)`` called for writes; a decorator."""
        self.write_handler = _callable(handler)
        return handler

    def release(self) -> None:
        """Give the range back: what the guest does there is no longer seen.

        Raises:
            XenCallError: Xen refused.
            ValueError: it was given back before.
        """
        self._release(self)


def _callable(handler: HandlerT) -> HandlerT:
    if not callable(handler):
        raise TypeError(f"handler {handler!r} cannot be called")
    return handler


class RegionTable:
    """All regions of a server, found by address.

    Synchronization: changed under the server's lock only.
    """

    def __init__(self) -> None:
        self._sorted: dict[int, list[Region]] = {
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

    def clear(self) -> None:
        """Forget all regions."""
        for regions in self._sorted.values():
            regions.clear()

    def holds(self, region: Region) -> bool:
        """Return whether a region is there."""
        return region in self._sorted[region.kind]

    def remove(self, region: Region) -> None:
        """Forget a region.

        Raises:
            ValueError: it is not there.
        """
        self._sorted[region.kind].remove(region)

    def find(self, kind: int, address: int, size: int) -> Region | None:
        """Return the region that holds the whole of an access; None if there is none."""
        regions = self._sorted[kind]
        position = bisect_right(regions, address, key=_start)
        if not position:
            return None
        region = regions[position - 1]
        return region if address + size <= region.end else None
