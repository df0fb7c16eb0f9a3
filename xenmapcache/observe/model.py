"""How often a map cache like ours would map for the accesses of a log: a count, without memory."""

from __future__ import annotations

from collections.abc import Iterable

_DEFAULT_BUCKETS = 1 << 15
"""32 GiB in buckets of 1 MiB, as :class:`.MapCache` has by default."""


class CacheModel:
    """A map cache that maps nothing, and counts what it would map.

    A bucket of 1 MiB stays mapped until an invalidation, or until it is evicted. Leases are not
    modelled: if one is held across an invalidation, the next access maps the bucket again, too.

    Args:
        limit: how many buckets may be mapped.

    Attributes:
        maps: how many map calls were needed.

    Synchronization: for one thread.
    """

    def __init__(self, limit: int = _DEFAULT_BUCKETS) -> None:
        self.maps = 0
        self._limit = limit
        self._mapped: dict[int, None] = {}  # the least recently used first

    def access(self, buckets: Iterable[int]) -> None:
        """Access buckets, by their numbers, in this order."""
        accessed = list(buckets)
        latest = list(dict.fromkeys(reversed(accessed)))
        latest.reverse()
        mapped = self._mapped
        if len(mapped) + len(latest) <= self._limit:  # none is evicted: only the last access counts
            accessed = latest
        for bucket in accessed:
            if bucket in mapped:
                del mapped[bucket]
            else:
                self.maps += 1
                if len(mapped) >= self._limit:
                    del mapped[next(iter(mapped))]
            mapped[bucket] = None

    def invalidate(self) -> None:
        """Drop all buckets."""
        self._mapped.clear()
