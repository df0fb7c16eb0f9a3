"""Counts of events by owner and by kind of request, for metrics: small, bounded, without locks."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from itertools import accumulate
from typing import Final, TypeAlias

from ..escape import printable
from ..events import (
    CacheClosed,
    Event,
    EventsLost,
    LeaseReleased,
    LeaseTaken,
    Quiesced,
    RequestHandled,
    RequestsHandled,
)
from ..ioreq import RequestKind

OTHER: Final = "other"
"""The owner to whom leases belong that have no label of their own."""

MAX_LABEL: Final = 64
"""Characters of an owner's label."""

HELD_SECONDS: Final = (1e-5, 1e-4, 0.001, 0.01, 0.1, 0.5, 1.0, 5.0, 10.0, 60.0, 600.0)
"""Bounds of the buckets for how long leases are held."""

HANDLER_SECONDS: Final = (1e-5, 1e-4, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0)
"""Bounds of the buckets for how long handlers and callbacks run."""

KINDS: Final = {kind.value: kind.name.lower() for kind in RequestKind}
"""Labels of the kinds of requests; of a kind that this package does not know it is "other"."""

_SECOND: Final = 1_000_000_000
_MAX_KNOWN: Final = 256


class Histogram:
    """How often a duration was in each bucket.

    Args:
        bounds: the upper bounds of the buckets, in seconds and rising; they are part of the bucket.

    Attributes:
        counts: one for each bucket, and one for what is longer.
        total: the sum of all durations, in nanoseconds.

    Synchronization: one thread adds at a time. Any thread may read.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0

    def add(self, duration: int) -> None:
        """Count a duration, in nanoseconds. A negative one, of a clock set back, counts as 0."""
        duration = max(duration, 0)
        self.counts[bisect_left(self.bounds, duration / _SECOND)] += 1
        self.total += duration

    @property
    def sum(self) -> float:
        """The sum of all durations, in seconds."""
        return self.total / _SECOND

    def buckets(self) -> list[tuple[float, int]]:
        """Return ``(bound, how many are at most that long)``; the last bound is infinite."""
        return list(zip((*self.bounds, float("inf")), accumulate(self.counts), strict=True))


class KindCounts:
    """What leases of one owner and one kind have done.

    Attributes:
        taken: how many were taken.
        bytes: their lengths, in bytes.
        held: how long those were held that have ended.
    """

    __slots__ = ("bytes", "held", "taken")

    def __init__(self) -> None:
        self.taken = 0
        self.bytes = 0
        self.held = Histogram(HELD_SECONDS)


class OwnerCounts:
    """What the leases of one owner have done.

    Attributes:
        kinds: by the kind of the leases.
        stale_released: DMA leases that were stale when they were released.
        copied: pages that were copied to the guest.
        lost: pages that the guest may never see.
    """

    __slots__ = ("copied", "kinds", "lost", "stale_released")

    def __init__(self) -> None:
        self.kinds: dict[str, KindCounts] = {}
        self.stale_released = 0
        self.copied = 0
        self.lost = 0

    def kind(self, name: str) -> KindCounts:
        """Return the counts of a kind of leases."""
        found = self.kinds.get(name)
        return found if found is not None else self.kinds.setdefault(name, KindCounts())


_Counts: TypeAlias = tuple[OwnerCounts, KindCounts]
"""What a lease is counted in."""


class LeaseCounts:
    """An observer of a cache that counts leases by owner.

    The first ``max_owners`` labels are kept; leases of all further owners are counted under
    :data:`OTHER`. A label is the owner's name, escaped and shortened.

    Args:
        max_owners: how many labels, apart from OTHER.
        label: makes the label of a name; the name itself by default.
        held: returns the numbers of the leases that are held. It is called after events were lost,
            because the ends of leases may be among them.
        closed: is called when the cache has closed.

    Attributes:
        owners: counts by label.
        lost_events: how many events were not delivered.

    Synchronization: events come one at a time. Any thread may read.
    """

    def __init__(
        self,
        max_owners: int,
        label: Callable[[str], str] | None,
        held: Callable[[], set[int]],
        closed: Callable[[], object],
    ) -> None:
        self.owners: dict[str, OwnerCounts] = {}
        self.lost_events = 0
        self._max_owners = max_owners
        self._label = label
        self._ids = held
        self._closed = closed
        self._held: dict[int, tuple[OwnerCounts, KindCounts, int | None]] = {}
        self._known: dict[tuple[str, str], _Counts] = {}

    def label_of(self, owner: str) -> str:
        """Return the label of an owner that has one already; otherwise :data:`OTHER`."""
        label = self._name(owner)
        return label if label in self.owners else OTHER

    def __call__(self, event: Event) -> None:
        """Count an event."""
        # Each transfer of a device comes here twice: few steps, and the frequent events first.
        if isinstance(event, LeaseReleased):
            self._release(event)
        elif isinstance(event, LeaseTaken):
            lease = event.lease
            if lease in self._held:  # an observer that is attached may be told of it twice
                return
            found = self._known.get((event.owner, event.kind)) or self._find(event)
            owner, counts = found
            counts.taken += 1
            counts.bytes += event.length
            self._held[lease] = owner, counts, event.time
        elif isinstance(event, EventsLost):
            self.lost_events += event.lost
            for lease in self._held.keys() - self._ids():
                del self._held[lease]
        elif isinstance(event, CacheClosed):
            self._closed()

    def _name(self, owner: str) -> str:
        name = owner if self._label is None else self._label(owner)
        return printable(name[:MAX_LABEL])[:MAX_LABEL]

    def _owner(self, label: str) -> OwnerCounts:
        found = self.owners.get(label)
        if found is not None:
            return found
        if len(self.owners) - (OTHER in self.owners) >= self._max_owners:
            label = OTHER
        return self.owners.setdefault(label, OwnerCounts())

    def _find(self, event: LeaseTaken) -> _Counts:
        owner = self._owner(self._name(event.owner))
        found = owner, owner.kind(event.kind)
        if len(self._known) >= _MAX_KNOWN:  # a guest may have multiplied names
            self._known.clear()
        self._known[event.owner, event.kind] = found
        return found

    def _release(self, event: LeaseReleased) -> None:
        held = self._held.pop(event.lease, None)
        if held is not None:
            owner, counts, since = held
            if event.time is not None and since is not None:
                counts.held.add(event.time - since)
            if not event.stale:
                return
            owner.stale_released += counts is owner.kinds.get("dma")
        else:  # its beginning was lost
            owner = self.owners.setdefault(OTHER, OwnerCounts())
            owner.stale_released += event.stale
        owner.copied += event.copied
        owner.lost += event.lost


class RequestCounts:
    """An observer of an ioreq server that counts requests by kind.

    Attributes:
        requests: how many were handled, by the label of their kind.
        failures: how many of these failed.
        handlers: how long handlers ran, by the label of the request's kind.
        quiesce: how long it took to stop DMA before an invalidation.
        quiesce_failures: callbacks that failed.
        lost_events: how many events were not delivered.

    Synchronization: events come one at a time. Any thread may read.
    """

    def __init__(self) -> None:
        labels = (*KINDS.values(), OTHER)
        self.requests = dict.fromkeys(labels, 0)
        self.failures = dict.fromkeys(labels, 0)
        self.handlers = {label: Histogram(HANDLER_SECONDS) for label in labels}
        self.quiesce = Histogram(HANDLER_SECONDS)
        self.quiesce_failures = 0
        self.lost_events = 0

    def __call__(self, event: Event) -> None:
        """Count an event."""
        if isinstance(event, RequestHandled):
            kind = KINDS.get(event.kind, OTHER)
            self.requests[kind] += 1
            self.failures[kind] += event.failure is not None
            self.handlers[kind].add(event.duration)
        elif isinstance(event, Quiesced):
            self.quiesce.add(event.duration)
            self.quiesce_failures += event.failures
        elif isinstance(event, RequestsHandled):
            for key, count in event.counts.items():
                self.requests[KINDS.get(key.kind, OTHER)] += count
        elif isinstance(event, EventsLost):
            self.lost_events += event.lost
