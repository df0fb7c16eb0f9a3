"""How fast the counters of two snapshots of a process have changed, and leases in an order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from ..cache.info import CacheStats
from .snapshot import LeaseState, Snapshot

CACHE_COUNTERS: Final = ("maps", "evictions", "invalidations")
"""Attributes of :class:`CacheStats` that :class:`Rates` has, too."""


class Rates(NamedTuple):
    """Changes per second. None if no counter could be compared.

    Attributes:
        seconds: the time between the two snapshots.
        maps: mappings made.
        evictions: buckets dropped to stay under a limit.
        invalidations: times all mappings were dropped.
        requests: ioreqs handled.
    """

    seconds: float
    maps: float | None
    evictions: float | None
    invalidations: float | None
    requests: float | None


def rates(previous: Snapshot, current: Snapshot) -> Rates | None:
    """Return the rates between two snapshots of one process; None if no time has passed.

    A cache or server is the same one if its name, and its place among those of its name, are the
    same. One that is new counts from 0, and so does one whose counter is lower than before.
    """
    elapsed = current.now_ns - previous.now_ns
    if elapsed <= 0:
        return None
    seconds = elapsed / 1e9
    before, after = _caches(previous), _caches(current)
    changes = [
        _change(
            {key: _counter(stats, name) for key, stats in before.items()},
            {key: _counter(stats, name) for key, stats in after.items()},
        )
        for name in CACHE_COUNTERS
    ]
    changes.append(_change(_requests(previous), _requests(current)))
    return Rates(seconds, *(None if change is None else change / seconds for change in changes))


_Key = tuple[str, int]


def _keys(names: Iterator[str]) -> Iterator[_Key]:
    """Yield each name with its place among equal names."""
    seen: dict[str, int] = {}
    for name in names:
        place = seen[name] = seen.get(name, -1) + 1
        yield name, place


def _caches(snapshot: Snapshot) -> dict[_Key, CacheStats | None]:
    keys = _keys(cache.name for cache in snapshot.caches)
    return {key: cache.stats for key, cache in zip(keys, snapshot.caches, strict=True)}


def _counter(stats: CacheStats | None, name: str) -> int | None:
    return None if stats is None else getattr(stats, name)


def _requests(snapshot: Snapshot) -> dict[_Key, int | None]:
    # A server's name says whether it is open, so it is not the same for all of its life.
    keys = _keys(f"{server.domid}" for server in snapshot.servers)
    return {key: server.requests for key, server in zip(keys, snapshot.servers, strict=True)}


def _change(before: dict[_Key, int | None], after: dict[_Key, int | None]) -> int | None:
    """Return by how much counters grew; None if none is known at both times."""
    total: int | None = None
    for key, value in after.items():
        last = before.get(key, 0)
        if value is None or last is None:
            continue
        total = (total or 0) + (value - last if value >= last else value)
    return total


ORDERS: Final[dict[str, Callable[[LeaseState], object]]] = {
    "age": lambda lease: lease.taken_ns,
    "owner": lambda lease: (lease.owner, lease.taken_ns),
    "size": lambda lease: (lease.start - lease.end, lease.taken_ns),
    "stale": lambda lease: (not lease.stale, lease.taken_ns),
}
"""By what leases are sorted: oldest first, by name, largest first, stale ones first."""


def sorted_leases(snapshot: Snapshot, order: str) -> list[tuple[int, LeaseState]]:
    """Return all leases in an order of :data:`ORDERS`, each with the index of its cache."""
    key = ORDERS[order]
    leases = [(index, each) for index, cache in enumerate(snapshot.caches) for each in cache.leases]
    leases.sort(key=lambda each: key(each[1]))  # type: ignore[arg-type,return-value] # each key orders
    return leases
