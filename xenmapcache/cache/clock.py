"""The clock: which bucket is evicted next, and which are set aside because they are leased."""

from __future__ import annotations

import contextlib
from collections import deque
from typing import Protocol, TypeVar

from ..mapping import Mapping

Item = TypeVar("Item")


class Pin:
    """The leases of one bucket.

    Attributes:
        index: of the bucket.
        lease_ids: the ids of its leases. The grant adds under the lock; a release removes
            without it.
        off_clock: whether a sweep has set the bucket aside. Only the holder of the lock writes it.
    """

    __slots__ = ("index", "lease_ids", "off_clock")

    def __init__(self, index: int) -> None:
        self.index = index
        self.lease_ids: set[int] = set()
        self.off_clock = False


class Tables(Protocol):
    """What a sweep needs of a generation."""

    buckets: dict[int, Mapping]

    def cool(self, index: int) -> bool:
        """Take a bucket from the hit tables; return whether it was accessed since the last time."""


class Clock:
    """The order in which a generation's buckets are considered for eviction.

    Synchronization: all methods are called under the cache's lock.
    """

    __slots__ = ("order", "pins")

    def __init__(self) -> None:
        self.order: deque[int] = deque()
        self.pins: dict[int, Pin] = {}

    def pin(self, index: int) -> Pin:
        """Return the pin of a bucket, made if need be."""
        pin = self.pins.get(index)
        if pin is None:
            pin = self.pins[index] = Pin(index)
        return pin

    def admit(self, index: int, *, replaces: bool) -> None:
        """Put a bucket on the clock.

        Args:
            index: of the bucket.
            replaces: whether another mapping of the same bucket was found until now. Its leases
                keep that one, and do not keep this one from eviction.
        """
        former = self.pins.pop(index, None)
        if not replaces or (former is not None and former.off_clock):
            self.order.append(index)

    def put_back(self, returned: deque[Pin]) -> None:
        """Put buckets on the clock again whose last lease has ended."""
        while returned:
            pin = returned[0]
            if pin.off_clock and self.pins.get(pin.index) is pin:
                self.order.append(pin.index)
                pin.off_clock = False
            _remove(returned, pin)

    def sweep(self, tables: Tables, wanted: int, *, copied: bool | None = None) -> list[Mapping]:
        """Take about `wanted` bytes of buckets away, approximately the least recently used first.

        A bucket that was accessed since the last sweep is made cool and skipped once, so that
        its next access is seen. A leased bucket is set aside, or every sweep would meet it.

        An index leaves `order` last of all: an interrupt before that costs the next sweep one
        look, while a bucket that is not on the clock would never be evicted.

        Args:
            tables: the generation's.
            wanted: in bytes.
            copied: take only buckets that are copies, or only those that are not; None takes both.

        Returns:
            The mappings, for the caller to drop after the lock.
        """
        victims: list[Mapping] = []
        for _ in range(2 * len(self.order)):
            if wanted <= 0 or not self.order:
                break
            index = self.order[0]
            mapping = tables.buckets.get(index)
            if mapping is not None and copied not in (None, mapping.copied):
                del mapping
                self.order.rotate(-1)
                continue
            del mapping
            pin = self.pins.get(index)
            if pin is not None and pin.lease_ids:
                pin.off_clock = True
                # Because a release in another thread may have looked before that store.
                if pin.lease_ids:
                    _remove(self.order, index)
                    continue
                pin.off_clock = False
            if tables.cool(index):
                self.order.rotate(-1)
                continue
            mapping = tables.buckets.pop(index, None)
            if mapping is not None:
                victims.append(mapping)
                wanted -= mapping.length
            self.pins.pop(index, None)
            _remove(self.order, index)
        return victims


def _remove(items: deque[Item], item: Item) -> None:
    """Remove an item that is at the head, unless a signal handler has removed it already."""
    with contextlib.suppress(ValueError):
        items.remove(item)
