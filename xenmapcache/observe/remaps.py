"""Buckets that QEMU has mapped, and those that it maps again."""

from __future__ import annotations

from collections import Counter
from typing import Final, TypeAlias

from ..formats.qemu_events import MappedRun
from .tally import Tally

_MAX_BUCKETS: Final = 1 << 16

Timed: TypeAlias = tuple[int | None, int | None]
"""Time and duration of a map call, in ns; None if unknown."""


class Remaps:
    """Takes QEMU's map calls, and tells those that map a bucket again. Memory is bounded.

    QEMU writes no event when it unmaps a bucket: that it did so is visible here.

    Attributes:
        after_invalidate: how many of these calls are the first one of their bucket since an
            INVALIDATE.
        without: how many are not: QEMU had unmapped the bucket for another reason.
        again: how many of these calls each bucket had, by its start and length.

    Synchronization: for one thread.
    """

    def __init__(self) -> None:
        self.after_invalidate = self.without = 0
        self.again: Tally[tuple[int, int]] = Tally()
        self._epoch = 0
        # Epoch and host address of the last map call; the longest ago first.
        self._mapped: dict[int, tuple[int, int | None]] = {}

    def invalidate(self) -> None:
        """Take an INVALIDATE: QEMU unmaps all buckets that are not locked."""
        self._epoch += 1

    def restart(self) -> None:
        """Forget all buckets: another QEMU begins."""
        self._mapped.clear()

    def host_of(self, start: int) -> int | None:
        """Return the host address of a bucket; None if it is unknown."""
        return self._mapped.get(start, (0, None))[1]

    def add(self, run: MappedRun) -> list[Timed]:
        """Add map calls; return those of buckets that were mapped before the last INVALIDATE."""
        buckets = len(set(run.starts))
        if len(self._mapped) + buckets <= _MAX_BUCKETS and self.again.has_room(buckets):
            return self._add_run(run)
        dropped: list[Timed] = []
        for time, start, length, duration, host, _ in run.events():
            # One by one, because which bucket is forgotten depends on the order.
            if len(self._mapped) >= _MAX_BUCKETS and start not in self._mapped:
                del self._mapped[next(iter(self._mapped))]
            dropped += self._add_run(MappedRun((time,), (start,), length, (duration,), (host,)))
        return dropped

    def _add_run(self, run: MappedRun) -> list[Timed]:
        """Add map calls for which there is room."""
        starts = run.starts
        first = dict(zip(reversed(starts), range(len(starts) - 1, -1, -1), strict=True))
        dropped = []
        for start, count in Counter(starts).items():
            epoch, _ = self._mapped.get(start, (None, None))
            again = count - (epoch is None)
            if epoch is not None and epoch < self._epoch:
                place = first[start]
                dropped.append((run.times[place], run.durations[place]))
            if again:
                self.again.add((start, run.length), again)
                self.without += again
        self.after_invalidate += len(dropped)
        self.without -= len(dropped)
        hosts = dict(zip(starts, run.hosts, strict=True))  # the last one of each
        for start in reversed(dict.fromkeys(reversed(starts))):
            self._mapped.pop(start, None)
            self._mapped[start] = self._epoch, hosts[start]
        return dropped
