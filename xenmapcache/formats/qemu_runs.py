"""Runs: equal events of a log of QEMU's that follow each other, as columns.

A large log has millions of them, and a column costs much less than as many events.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import count, repeat
from typing import NamedTuple, TypeAlias

from ..events import BucketMapped, Event, Invalidated, LeaseHeld

Times: TypeAlias = Sequence[int | None]


class MappedRun(NamedTuple):
    """Map calls that follow each other. Immutable.

    Attributes:
        times, starts, durations, hosts: as :class:`.BucketMapped` has them.
        length: of all buckets, in bytes.
    """

    times: Times
    starts: Sequence[int]
    length: int
    durations: Times
    hosts: Sequence[int | None]

    def events(self) -> Iterator[BucketMapped]:
        """Yield each map call on its own."""
        columns = self.times, self.starts, repeat(self.length), self.durations, self.hosts
        return map(BucketMapped, *columns)

    def part(self, start: int, end: int) -> MappedRun:
        """Return some of them, from one place to another."""
        return MappedRun(
            self.times[start:end],
            self.starts[start:end],
            self.length,
            self.durations[start:end],
            self.hosts[start:end],
        )


class InvalidatedRun(NamedTuple):
    """INVALIDATEs that follow each other. Immutable.

    Attributes:
        times: in ns.
        number: of the first one, from 1 on.
    """

    times: Times
    number: int

    def events(self) -> Iterator[Invalidated]:
        """Yield each INVALIDATE on its own."""
        return map(Invalidated, self.times, count(self.number))


class HeldRun(NamedTuple):
    """DMA that was held across the same INVALIDATE, or across INVALIDATEs of no number. Immutable.

    Attributes:
        times, starts, hosts: as :class:`.LeaseHeld` has them.
        length: of all buckets, in bytes.
        number: of the invalidation; 0 if the log does not show invalidations.
    """

    times: Times
    starts: Sequence[int]
    length: int
    hosts: Sequence[int]
    number: int

    def events(self) -> Iterator[LeaseHeld]:
        """Yield each lease on its own."""
        columns = self.times, self.starts, repeat(self.length), self.hosts, repeat(self.number)
        return map(LeaseHeld, *columns)


Run: TypeAlias = MappedRun | InvalidatedRun | HeldRun
Found: TypeAlias = Event | Run
"""What a parser finds."""


def separate(found: Iterable[Found]) -> Iterator[Event]:
    """Yield each event on its own."""
    for each in found:
        if isinstance(each, Run):
            yield from each.events()
        else:
            yield each
