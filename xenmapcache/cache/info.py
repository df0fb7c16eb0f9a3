"""What a cache reports: its leases, its invalidations and its counters. Plain values."""

from __future__ import annotations

import enum
from typing import Literal, NamedTuple

from ..escape import printable

OnStale = Literal["warn", "raise", "copy"]


class LeaseKind(enum.Enum):
    """Why memory is locked: two kinds that QEMU's map cache could not tell apart, and windows."""

    DEVICE = "device"
    """Memory of a device (option ROM, video memory). Ballooning does not touch it."""
    DMA = "dma"
    """A transfer. If the lease is still held at an invalidation, its data may be lost."""
    WINDOW = "window"
    """A flat view, to be read. After an invalidation it may show pages that the guest gave up."""


class DmaDirection(enum.Enum):
    """Which way the data goes, in the kernel's words."""

    TO_DEVICE = "to-device"
    """The device reads guest memory; the view is read-only."""
    FROM_DEVICE = "from-device"
    """The device writes guest memory."""
    BIDIRECTIONAL = "bidirectional"
    """Both, or not known."""


class LeaseInfo(NamedTuple):
    """What the cache knows of a lease at one moment. Immutable.

    Attributes:
        id: unique in the process, never used again.
        kind: DEVICE, DMA or WINDOW.
        address: guest-physical, in bytes.
        length: in bytes.
        owner: the name that the caller of ``map_dma``, ``map_device`` or ``window`` gave.
        direction: of a DMA lease; None for others.
        age: seconds since it was taken.
        thread: name of the thread that took it.
        stale: whether an invalidation has passed since (DMA, WINDOW), or its memory was lost.
        origin: the stack where it was taken, innermost last, if the cache records that.
    """

    id: int
    kind: LeaseKind
    address: int
    length: int
    owner: str
    direction: DmaDirection | None
    age: float
    thread: str
    stale: bool
    origin: tuple[str, ...] | None

    def __str__(self) -> str:
        direction = f", direction {self.direction.value}" if self.direction else ""
        taken = f", taken at {printable(self.origin[-1])}" if self.origin else ""
        return (
            f"{self.kind.name} lease of {self.owner!r}: address {self.address:#x}, "
            f"length {self.length:#x}{direction}, age {self.age:.3f} s, "
            f"thread {self.thread!r}{taken}"
        )


class Invalidation(NamedTuple):
    """What an invalidation dropped, and which leases were held across it. Immutable.

    Attributes:
        sequence: how many invalidations this cache has had, this one included.
        dropped_buckets: how many buckets the cache dropped.
        dropped_bytes: their size.
        device: the device leases held across it; they stay as they are.
        dma: the DMA leases held across it; each one is a bug in its owner.
        windows: the windows held across it; they stay as they are, and are stale.
    """

    sequence: int
    dropped_buckets: int
    dropped_bytes: int
    device: tuple[LeaseInfo, ...]
    dma: tuple[LeaseInfo, ...]
    windows: tuple[LeaseInfo, ...]


class CacheStats(NamedTuple):
    """Counters since the cache was made, and what it holds now. Immutable.

    Attributes:
        slow_path_hits: accesses that found a resident bucket under the lock: leases, and the
            first accesses after a sweep. Plain reads and writes of a hot bucket are not counted.
        misses: buckets that had to be mapped.
        maps: mappings made: buckets, and the leases' own.
        unmaps: mappings that were unmapped.
        evictions: buckets dropped to stay under ``max_resident`` or ``max_copies``.
        hole_faults: accesses that found no page, or were refused it; each was a new attempt to
            map it.
        invalidations: how many.
        stale_dma_released: DMA leases that were stale when they were released.
        stale_dma_held: DMA leases that are stale and still held: what a device writes there
            is lost, and the guest may see neither.
        resident_bytes: guest memory mapped now, kept views included.
        resident_buckets: buckets that an access finds now.
        device_leases: held now.
        dma_leases: held now.
        copied_bytes: how many of the resident bytes are copies of a file's pages.
        windows: held now.
    """

    slow_path_hits: int
    misses: int
    maps: int
    unmaps: int
    evictions: int
    hole_faults: int
    invalidations: int
    stale_dma_released: int
    stale_dma_held: int
    resident_bytes: int
    resident_buckets: int
    device_leases: int
    dma_leases: int
    copied_bytes: int
    windows: int


def as_direction(direction: DmaDirection | str) -> DmaDirection:
    """Return a direction that was given as such or by its text."""
    if type(direction) is DmaDirection:  # a call of an enum takes three times as long
        return direction
    if not isinstance(direction, DmaDirection | str):
        raise TypeError(
            f"direction must be a DmaDirection or its text, not {type(direction).__name__}"
        )
    try:
        return DmaDirection(direction)
    except ValueError:
        known = ", ".join(repr(each.value) for each in DmaDirection)
        raise ValueError(f"direction must be one of {known}, not {direction!r}") from None
