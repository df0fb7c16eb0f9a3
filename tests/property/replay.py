"""What follows from the events of a cache alone."""

from __future__ import annotations

from xenmapcache.events import (
    BucketDropped,
    BucketMapped,
    BucketReplaced,
    CacheClosed,
    CacheOpened,
    Event,
    Invalidated,
    LeaseReleased,
    LeaseTaken,
    PagesDirtied,
)

from .model import pages_of


class Replay:
    """An observer that keeps account.

    Attributes:
        buckets: the host address of each resident bucket, by its guest address.
        leases: the range of each lease that is held, by its number.
        dirty: frames that were reported.
        maps, evictions, invalidations, stale_released: how many.
    """

    def __init__(self) -> None:
        self.buckets: dict[int, int | None] = {}
        self.leases: dict[int, tuple[int, int]] = {}
        self.dma: set[int] = set()
        self.dirty: set[int] = set()
        self.maps = self.evictions = self.invalidations = self.stale_released = 0

    def __call__(self, event: Event) -> None:
        """Take an event."""
        match event:
            case CacheOpened():
                assert not self.buckets
            case BucketMapped():
                assert event.start not in self.buckets
                self.buckets[event.start] = event.host
                self.maps += event.duration is not None
            case BucketDropped():
                del self.buckets[event.start]
                self.evictions += event.reason == "evicted"
            case Invalidated():
                assert event.dropped == len(self.buckets)
                assert self.dma.issuperset(event.held)
                self.buckets.clear()
                self.invalidations += 1
                assert event.number == self.invalidations
            case LeaseTaken():
                assert event.lease not in self.leases
                self.leases[event.lease] = event.start, event.length
                if event.kind == "dma":
                    self.dma.add(event.lease)
            case LeaseReleased():
                del self.leases[event.lease]
                self.stale_released += event.stale and event.lease in self.dma
                self.dma.discard(event.lease)
            case BucketReplaced():
                (first, *_) = sorted(
                    lease
                    for lease, (start, _) in self.leases.items()
                    if start == event.old and lease not in self.dma
                )
                self.leases[first] = event.new, self.leases[first][1]
            case PagesDirtied():
                self.dirty.update(pages_of(event.start, event.length))
            case CacheClosed():
                assert not self.leases
                self.buckets.clear()
