"""The worst leases: lost or copied pages, held across an invalidation, held for long."""

from __future__ import annotations

import heapq
from typing import Final, NamedTuple

from ...events import LeaseTaken

MOST: Final = 8
"""How many leases there are at most for each reason."""


class Held(NamedTuple):
    """A lease, and how it ended. Immutable.

    Attributes:
        taken: the event.
        stream: the number of its stream.
        start: in ns since the recording began; 0 if it was taken before.
        held: for how long, in ns.
        across: across how many invalidations.
        stale: whether it was stale at its end.
        copied: how many pages were copied to the guest at its end.
        lost: how many pages were lost.
        is_open: whether the recording does not show its end.
    """

    taken: LeaseTaken
    stream: int
    start: int
    held: int
    across: int
    stale: bool
    copied: int = 0
    lost: int = 0
    is_open: bool = False

    def badness(self) -> tuple[int, int, int, int]:
        """Return what the table is sorted by: higher is worse."""
        return self.lost, self.copied, self.across, self.held


class Worst:
    """Keeps the worst leases, by each reason.

    Synchronization: for one thread.
    """

    def __init__(self) -> None:
        # By pages, by invalidations, by time. A number makes each entry different.
        self._heaps: tuple[list[tuple[tuple[int, ...], int, Held]], ...] = ([], [], [])
        self._number = 0

    def add(self, lease: Held) -> None:
        """Take note of a lease."""
        self._number += 1
        keys = (
            (lease.lost, lease.copied) if lease.lost or lease.copied else None,
            (lease.across, lease.held) if lease.across or lease.stale else None,
            # Device memory may be held for as long as the guest lives.
            (lease.held,) if lease.taken.kind == "dma" else None,
        )
        for heap, key in zip(self._heaps, keys, strict=True):
            if key is None:
                continue
            entry = key, -self._number, lease
            if len(heap) < MOST:
                heapq.heappush(heap, entry)
            elif heap[0] < entry:
                heapq.heapreplace(heap, entry)

    def leases(self) -> list[Held]:
        """Return the leases, the worst one first."""
        found = {number: lease for heap in self._heaps for _, number, lease in heap}
        return sorted(found.values(), key=Held.badness, reverse=True)
