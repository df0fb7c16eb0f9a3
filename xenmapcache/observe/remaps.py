"""Buckets that QEMU has mapped, and those that it maps again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Final, TypeAlias

from ..formats.qemu_runs import MappedRun
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
        counts = Counter(run.starts)
        if len(self._mapped) + len(counts) <= _MAX_BUCKETS and self.again.has_room(len(counts)):
            return self._add_run(run, counts)
        dropped: list[Timed] = []
        for time, start, length, duration, host, _ in run.events():
            # One by one, because which bucket is forgotten depends on the order.
            if len(self._mapped) >= _MAX_BUCKETS and start not in self._mapped:
                del self._mapped[next(iter(self._mapped))]
            single = MappedRun((time,), (start,), length, (duration,), (host,))
            dropped += self._add_run(single, {start: 1})
        return dropped

    def _add_run(self, run: MappedRun, counts: Mapping[int, int]) -> list[Timed]:
        """Add map calls for which there is room; ``counts`` says how many each start has."""
        stale = []
        for start, count in counts.items():
            epoch, _ = self._mapped.get(start, (None, None))
            again = count - (epoch is None)
            if epoch is not None and epoch < self._epoch:
                stale.append(start)
            if again:
                self.again.add((start, run.length), again)
                self.without += again
        self.after_invalidate += len(stale)
        self.without -= len(stale)
        hosts = dict(zip(run.starts, run.hosts, strict=True))  # each one's last
        for start in reversed(dict.fromkeys(reversed(run.starts))):  # the last one at the end
            self._mapped.pop(start, None)
            self._mapped[start] = self._epoch, hosts[start]
        if not stale:
            return []
        places = range(len(run.starts) - 1, -1, -1)
        first = dict(zip(reversed(run.starts), places, strict=True))
        return [(run.times[first[start]], run.durations[first[start]]) for start in stale]
