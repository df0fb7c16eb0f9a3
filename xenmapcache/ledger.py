"""The ledger: who holds which guest memory, since when and what for. It knows no pointers."""

from __future__ import annotations

import enum
import itertools
import os
import threading
import time
import traceback
from collections.abc import Iterator
from operator import attrgetter
from typing import Generic, NamedTuple, TypeVar

_PACKAGE = os.path.dirname(__file__) + os.sep  # noqa: PTH120 - pathlib at import is slow
_next_id = itertools.count(1).__next__
_monotonic = time.monotonic
_id_of = attrgetter("id")


class _Here(threading.local):
    """The thread that asks, found faster than by ``current_thread()``."""

    def __init__(self) -> None:
        self.thread = threading.current_thread()


_here = _Here()


class LeaseKind(enum.Enum):
    """Why memory is locked: the two kinds that QEMU's map cache could not tell apart."""

    DEVICE = "device"
    """Memory of a device, for long (option ROM, video memory). Ballooning does not touch it."""
    DMA = "dma"
    """A transfer under way. Still held at an invalidation, it may be lost."""


_DMA = LeaseKind.DMA  # CPython 3.11 takes long to find it in the class


class DmaDirection(enum.Enum):
    """Which way the data goes, in the kernel's words."""

    TO_DEVICE = "to-device"
    """The device reads guest memory; the view is read-only."""
    FROM_DEVICE = "from-device"
    """The device writes guest memory."""
    BIDIRECTIONAL = "bidirectional"
    """Both, or not known."""


class LeaseInfo(NamedTuple):
    """What is known of a lease, at one moment. Immutable.

    Attributes:
        id: unique in its cache, never used again.
        kind: DEVICE or DMA.
        address: guest-physical, in bytes.
        length: in bytes.
        owner: who took it, in the words of the one who did.
        direction: of a DMA lease; None for DEVICE.
        age: seconds since it was taken.
        thread: name of the thread that took it.
        stale: whether an invalidation has passed since (DMA), or its memory was lost.
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
        return (
            f"{self.kind.name} lease of {self.owner!r}: address {self.address:#x}, "
            f"length {self.length:#x}{direction}, age {self.age:.3f} s"
        )


class LeaseRecord:
    """A lease as the ledger keeps it. Made by the cache; the handle people use derives from it."""

    __slots__ = (
        "address",
        "delivered",
        "direction",
        "id",
        "kind",
        "length",
        "lost",
        "origin",
        "owner",
        "sequence",
        "since",
        "thread",
        "warned",
    )

    def __init__(
        self,
        kind: LeaseKind,
        address: int,
        length: int,
        owner: str,
        direction: DmaDirection | None,
        sequence: int,
        origin: tuple[str, ...] | None = None,
    ) -> None:
        self.id = _next_id()
        self.kind = kind
        self.address = address
        self.length = length
        self.owner = owner
        self.direction = direction
        self.sequence = sequence
        self.origin = origin
        self.since = _monotonic()
        self.thread = _here.thread
        self.warned = False
        self.lost = False
        self.delivered = 0

    def stale_at(self, sequence: int) -> bool:
        """Tell whether the invalidation of that number has made it stale."""
        return self.lost or (self.kind is _DMA and self.sequence < sequence)

    def info(self, sequence: int) -> LeaseInfo:
        """Return what is known of it, as seen after the invalidation of that number."""
        return LeaseInfo(
            self.id,
            self.kind,
            self.address,
            self.length,
            self.owner,
            self.direction,
            time.monotonic() - self.since,
            self.thread.name,
            self.stale_at(sequence),
            self.origin,
        )


Record = TypeVar("Record", bound=LeaseRecord)


class Ledger(Generic[Record]):
    """All leases that are held.

    Synchronization: every method may be called in any thread and from finalizers;
    each is one atomic dictionary operation a kind, or works on copies.
    """

    __slots__ = ("_device", "_dma")

    def __init__(self) -> None:
        # Two, so that device leases, which are few, are found among any number of DMA.
        self._device: dict[int, Record] = {}
        self._dma: dict[int, Record] = {}

    def __len__(self) -> int:
        return len(self._device) + len(self._dma)

    def __iter__(self) -> Iterator[Record]:
        """Return an iterator of what is held now, in no order: sorting costs more than a walk."""
        return iter([*self._device.values(), *self._dma.values()])

    def _of(self, kind: LeaseKind) -> dict[int, Record]:
        return self._dma if kind is _DMA else self._device

    def add(self, record: Record) -> None:
        """Note that a lease is held."""
        (self._dma if record.kind is _DMA else self._device)[record.id] = record

    def remove(self, record: Record) -> bool:
        """Note that it is not; False if that was noted before: exactly one caller gets True."""
        held = self._dma if record.kind is _DMA else self._device
        return held.pop(record.id, None) is not None

    def count(self, kind: LeaseKind) -> int:
        """Return how many leases of a kind are held."""
        return len(self._of(kind))

    def held(self, kind: LeaseKind | None = None) -> list[Record]:
        """Return what is held, or only what is of a kind; oldest first."""
        if kind is None:
            found = [*self._device.values(), *self._dma.values()]
        else:
            found = list(self._of(kind).values())
        found.sort(key=_id_of)  # a lease whose release failed was put back behind younger ones
        return found


def call_stack() -> tuple[str, ...]:
    """Return the stack as ``file:line in function``, up to who called this package."""
    frames = traceback.extract_stack()
    while frames and frames[-1].filename.startswith(_PACKAGE):
        frames.pop()
    return tuple(f"{frame.filename}:{frame.lineno} in {frame.name}" for frame in frames)
