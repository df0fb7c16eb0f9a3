"""Counts by key in bounded memory."""

from __future__ import annotations

from collections.abc import Hashable
from heapq import nsmallest
from typing import Generic, NamedTuple, TypeVar

Key = TypeVar("Key", bound=Hashable)


class Top(NamedTuple, Generic[Key]):
    """The largest counts, and the rest. Immutable.

    Attributes:
        entries: ``(key, count)``, the largest count first; of equal counts the smallest key.
        other_keys: how many other keys there are, at least.
        other_count: the sum of their counts.
    """

    entries: list[tuple[Key, int]]
    other_keys: int
    other_count: int


def _rank(entry: tuple[Key, int]) -> tuple[int, Key]:
    """Return what sorts entries: the largest count first; of equal ones the smallest key."""
    key, count = entry
    return -count, key


class Tally(Generic[Key]):
    """Counts by key. If there are too many keys, those of small counts are folded into a sum.

    A key that comes again after that starts at 0, so that its count is a lower bound.

    Args:
        limit: how many keys stay when there are twice as many.

    Attributes:
        counts: by key.
        total: of all counts, the folded ones included.
        folded: how often a key was folded.

    Synchronization: for one thread.
    """

    def __init__(self, limit: int = 4096) -> None:
        self.counts: dict[Key, int] = {}
        self.total = self.folded = 0
        self._limit = limit

    def add(self, key: Key, count: int = 1) -> None:
        """Add to a key's count."""
        self.total += count
        self.counts[key] = self.counts.get(key, 0) + count
        if len(self.counts) > 2 * self._limit:
            kept = nsmallest(self._limit, self.counts.items(), key=_rank)
            self.folded += len(self.counts) - len(kept)
            self.counts = dict(kept)

    def has_room(self, keys: int) -> bool:
        """Return whether that many further keys fit without folding any."""
        return len(self.counts) + keys <= 2 * self._limit

    def top(self, number: int) -> Top[Key]:
        """Return that many of the largest counts."""
        entries = nsmallest(number, self.counts.items(), key=_rank)
        others = len(self.counts) - len(entries) + self.folded
        return Top(entries, others, self.total - sum(count for _, count in entries))
