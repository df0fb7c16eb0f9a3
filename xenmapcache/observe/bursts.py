"""Bursts of INVALIDATEs in a log of QEMU's, and what each of them costs."""

from __future__ import annotations

from collections.abc import Iterable
from heapq import nlargest
from typing import Any, Final

from ..formats.qemu_runs import InvalidatedRun
from .remaps import Timed

_GAP_NS: Final = 100_000_000
_SHOWN: Final = 20
_KEPT: Final = 10 * _SHOWN


class _Cost:
    """Map calls of buckets that were dropped.

    Attributes:
        calls: how many.
        timed: of how many the duration is known.
        map_ns: the sum of these durations, in ns.
    """

    __slots__ = ("calls", "map_ns", "timed")

    def __init__(self) -> None:
        self.calls = self.timed = self.map_ns = 0

    def add(self, duration: int | None) -> None:
        """Add one call."""
        self.calls += 1
        if duration is not None:
            self.timed += 1
            self.map_ns += duration

    def report(self, *, is_known: bool) -> dict[str, Any]:
        """Return it for JSON; without the event of a map call there is no number."""
        is_timed = is_known and self.timed == self.calls > 0
        seconds = self.map_ns / 1e9 if is_timed else None
        return {"mapped_again": self.calls if is_known else None, "map_seconds": seconds}


class _Burst:
    """INVALIDATEs that follow each other closely."""

    __slots__ = ("cost", "count", "first", "held", "last", "number", "recovered")

    def __init__(self, time: int | None, number: int) -> None:
        self.first = self.last = time
        self.number = number
        self.count = 1
        self.held = 0
        self.cost = _Cost()
        self.recovered: int | None = None

    def report(self, *, is_known: bool) -> dict[str, Any]:
        duration = _seconds_between(self.first, self.last)
        return {
            "first": self.number,
            "count": self.count,
            "time": None if self.first is None else self.first / 1e9,
            "duration": duration,
            "mean_interval": duration / (self.count - 1) if duration is not None and self.count > 1
            else None,
            "dma_held": self.held,
            **self.cost.report(is_known=is_known),
            "recovery_seconds": _seconds_between(self.first, self.recovered),
        }  # fmt: skip


class Bursts:
    """Groups INVALIDATEs, and counts what each group costs, in bounded memory.

    A burst is INVALIDATEs that are at most 0.1 s apart, or, without times, without an access
    between them. What is mapped again belongs to the burst before it, whichever dropped it.

    Attributes:
        invalidations: how many INVALIDATEs there were.
        count: how many bursts they came in.

    Synchronization: for one thread.
    """

    def __init__(self) -> None:
        self.invalidations = self.count = 0
        self._current: _Burst | None = None
        self._worst: list[_Burst] = []
        self._total = _Cost()
        self._accessed = False

    def add_invalidated(self, run: InvalidatedRun) -> None:
        """Add INVALIDATEs."""
        self.invalidations += len(run.times)
        for number, time in enumerate(run.times, run.number):
            burst = self._current
            if burst is not None and self._continues(burst, time):
                burst.count += 1
                burst.last = time
            else:
                self._end()
                self.count += 1
                self._current = _Burst(time, number)
            self._accessed = False

    def add_access(self) -> None:
        """Note that the map cache was accessed."""
        self._accessed = True

    def add_held(self, count: int) -> None:
        """Add DMA that was held across the last INVALIDATE."""
        if self._current is not None:
            self._current.held += count

    def add_mapped_again(self, calls: Iterable[Timed]) -> None:
        """Add map calls of buckets that were mapped before an INVALIDATE."""
        burst = self._current
        if burst is None:  # the log shows INVALIDATEs by their messages only
            return
        for time, duration in calls:
            burst.cost.add(duration)
            self._total.add(duration)
            if time is not None:
                burst.recovered = max(burst.recovered or 0, time + (duration or 0))

    def _continues(self, burst: _Burst, time: int | None) -> bool:
        if time is None or burst.last is None:
            return not self._accessed
        return 0 <= time - burst.last <= _GAP_NS

    def _end(self) -> None:
        if self._current is not None:
            self._worst.append(self._current)
            if len(self._worst) > _KEPT:
                self._worst = _largest(self._worst)
            self._current = None

    def report(self, *, has_maps: bool, has_ends: bool) -> dict[str, Any]:
        """Return everything for JSON; times are in seconds.

        Args:
            has_maps: whether the log has the event of a map call.
            has_ends: whether it shows where a burst ends: it has times, or accesses.
        """
        current = [self._current] if self._current is not None and has_ends else []
        largest = sorted(_largest([*self._worst, *current]), key=lambda burst: burst.number)
        return {
            "count": self.invalidations,
            "bursts": self.count if has_ends else None,
            **self._total.report(is_known=has_maps),
            "largest": [burst.report(is_known=has_maps) for burst in largest],
        }


def _largest(bursts: list[_Burst]) -> list[_Burst]:
    return nlargest(_SHOWN, bursts, key=lambda burst: (burst.cost.calls, burst.held, burst.count))


def _seconds_between(first: int | None, last: int | None) -> float | None:
    """Return the time between two; None if one is unknown, or the clock was set back."""
    return None if first is None or last is None or last < first else (last - first) / 1e9
