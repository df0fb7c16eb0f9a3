"""Rates between two snapshots, and orders of leases."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.observe.monitor_kit import NOW, SNAPSHOT, STATS, S
from xenmapcache.observe.rates import ORDERS, Rates, rates, sorted_leases
from xenmapcache.observe.snapshot import CacheState, LeaseState, ServerState, Snapshot


def cache(name: str, **counters: int) -> CacheState:
    return CacheState(name, None, False, STATS._replace(**counters), (), 0, False)


def unreadable(name: str) -> CacheState:
    return CacheState(name, None, False, None, (), 0, True)


def server(requests: int, domid: int = 3, name: str = "<IoreqServer>") -> ServerState:
    return ServerState(name, domid, requests, 0, 0, 0, ())


def at(seconds: float, *watched: CacheState | ServerState) -> Snapshot:
    caches = tuple(each for each in watched if isinstance(each, CacheState))
    servers = tuple(each for each in watched if isinstance(each, ServerState))
    return replace(SNAPSHOT, now_ns=NOW + int(seconds * S), caches=caches, servers=servers)


def test_changes_are_divided_by_the_time_between() -> None:
    """Each counter has its own rate; caches and servers are added up."""
    before = at(
        0,
        cache("a", maps=10, evictions=2, invalidations=1),
        cache("b", maps=5, evictions=0, invalidations=0),
        server(100),
        server(7, domid=4),
    )
    after = at(
        2,
        cache("a", maps=14, evictions=3, invalidations=1),
        cache("b", maps=7, evictions=0, invalidations=4),
        server(110),
        server(8, domid=4),
    )
    assert rates(before, after) == Rates(2.0, 3.0, 0.5, 2.0, 5.5)


@pytest.mark.parametrize("seconds", [0, -1])
def test_without_time_between_there_is_no_rate(seconds: float) -> None:
    """The clock of the process may have been set back."""
    assert rates(at(0, cache("a")), at(seconds, cache("a"))) is None


def test_what_is_new_counts_from_zero() -> None:
    """So does a counter that is lower than before: another cache has the name."""
    before = at(0, cache("a", maps=10), server(100))
    after = at(1, cache("a", maps=3), cache("b", maps=4), server(2), server(5))
    found = rates(before, after)
    assert found is not None
    assert (found.maps, found.requests) == (7.0, 7.0)


def test_caches_of_one_name_are_told_apart() -> None:
    """By their place among those of that name."""
    before = at(0, cache("a", maps=10), cache("a", maps=1000))
    after = at(1, cache("a", maps=11), cache("a", maps=1002))
    found = rates(before, after)
    assert found is not None
    assert found.maps == 3.0


def test_a_server_that_is_opened_is_the_same() -> None:
    """Its name changes then."""
    closed, opened = "<IoreqServer of domain 3, not open>", "<IoreqServer of domain 3, open>"
    found = rates(at(0, server(5, name=closed)), at(1, server(6, name=opened)))
    assert found is not None
    assert found.requests == 1.0


def test_counters_that_cannot_be_read_are_left_out() -> None:
    """At either time. If none is left, there is no rate, and not a rate of 0."""
    before = at(0, cache("a", maps=1), unreadable("b"), cache("c", maps=1))
    after = at(1, unreadable("a"), cache("b", maps=50), cache("c", maps=2))
    found = rates(before, after)
    assert found == Rates(1.0, 1.0, 0.0, 0.0, None)
    assert rates(at(0, unreadable("a")), at(1, unreadable("a"))) == Rates(1.0, *[None] * 4)


def lease(number: int, owner: str, length: int, age: int, *, stale: bool = False) -> LeaseState:
    taken = NOW - age * S
    return LeaseState(
        number, owner, "dma", 0x1000, 0x1000 + length, "to-device", taken, stale, "t", None
    )


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("age", [3, 1, 2, 4]),
        ("owner", [3, 4, 1, 2]),
        ("size", [2, 3, 1, 4]),
        ("stale", [1, 4, 3, 2]),
    ],
)
def test_orders(order: str, expected: list[int]) -> None:
    """Oldest first, by name, largest first, stale first. Equal ones: oldest first."""
    first = cache("a")
    leases = (
        lease(1, "b", 16, 8, stale=True),
        lease(2, "c", 64, 5),
        lease(3, "a", 16, 9),
    )
    second = replace(first, leases=(lease(4, "a", 8, 1, stale=True),))
    snapshot = at(0, replace(first, leases=leases), second)
    found = sorted_leases(snapshot, order)
    assert [each.id for _, each in found] == expected
    assert {each.id: index for index, each in found} == {1: 0, 2: 0, 3: 0, 4: 1}
    assert order in ORDERS
