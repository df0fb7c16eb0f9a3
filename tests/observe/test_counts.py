"""Counts of events by owner and kind: bounded, and right after events were lost."""

from __future__ import annotations

from tests.observe.metrics_kit import MS, SECOND
from xenmapcache.events import (
    CacheClosed,
    EventsLost,
    LeaseReleased,
    LeaseTaken,
    Quiesced,
    RequestHandled,
    RequestKey,
    RequestsHandled,
)
from xenmapcache.ioreq import RequestKind
from xenmapcache.observe.counts import (
    HANDLER_SECONDS,
    MAX_LABEL,
    OTHER,
    Histogram,
    LeaseCounts,
    RequestCounts,
)


def taken(lease: int, owner: str, kind: str = "dma", time: int | None = SECOND) -> LeaseTaken:
    return LeaseTaken(time, lease, kind, 0x1000, 0x200, owner, None, "MainThread", False)


def request(kind: int, duration: int, failure: str | None = None) -> RequestHandled:
    return RequestHandled(SECOND, 0, kind, True, 0x300, 1, duration, failure)


def counts(max_owners: int = 64, held: frozenset[int] = frozenset()) -> LeaseCounts:
    return LeaseCounts(max_owners, None, lambda: set(held), list)


def test_a_histogram_has_each_duration_in_its_bucket() -> None:
    """A bound belongs to its bucket; what is longer than all is in the last one."""
    histogram = Histogram((0.1, 1.0))
    for milliseconds in (-1000, 100, 110, 1000, 1500):
        histogram.add(milliseconds * MS)
    assert histogram.buckets() == [(0.1, 2), (1.0, 4), (float("inf"), 5)]
    assert histogram.sum == 0.1 + 0.11 + 1.0 + 1.5


def test_leases_are_counted_by_owner_and_kind() -> None:
    """Numbers, bytes, and how long they were held."""
    observer = counts()
    observer(taken(1, "disk0"))
    observer(taken(2, "disk0", "device"))
    observer(taken(3, "net0"))
    observer(LeaseReleased(SECOND + 2 * MS, 1))
    disk = observer.owners["disk0"]
    assert {kind: (each.taken, each.bytes) for kind, each in disk.kinds.items()} == {
        "dma": (1, 0x200),
        "device": (1, 0x200),
    }
    assert disk.kinds["dma"].held.sum == 0.002
    assert sum(disk.kinds["device"].held.counts) == 0
    assert sum(observer.owners["net0"].kinds["dma"].held.counts) == 0


def test_what_was_lost_is_counted_by_owner() -> None:
    """Stale DMA, pages copied and pages lost; a stale window has lost nothing."""
    observer = counts()
    observer(taken(1, "disk0"))
    observer(taken(2, "disk0", "window"))
    observer(LeaseReleased(SECOND, 1, True, copied=3, lost=2))
    observer(LeaseReleased(SECOND, 2, True))
    disk = observer.owners["disk0"]
    assert (disk.stale_released, disk.copied, disk.lost) == (1, 3, 2)


def test_a_lease_that_is_told_twice_is_counted_once() -> None:
    """An observer that is attached while leases are taken may hear of one twice."""
    observer = counts()
    observer(taken(1, "disk0"))
    observer(taken(1, "disk0"))
    assert observer.owners["disk0"].kinds["dma"].taken == 1


def test_without_a_clock_nothing_is_timed() -> None:
    """Neither a beginning nor an end without a time makes a duration."""
    observer = counts()
    observer(taken(1, "disk0", time=None))
    observer(taken(2, "disk0"))
    observer(LeaseReleased(SECOND, 1))
    observer(LeaseReleased(None, 2))
    assert sum(observer.owners["disk0"].kinds["dma"].held.counts) == 0


def test_owners_are_folded() -> None:
    """The first ones have labels; however many come after them share one."""
    observer = counts(max_owners=2)
    for lease, owner in enumerate(("a", "b", OTHER, "c", "a", *map(str, range(100)))):
        observer(taken(lease, owner))
    assert list(observer.owners) == ["a", "b", OTHER]
    assert observer.owners["a"].kinds["dma"].taken == 2
    assert observer.owners[OTHER].kinds["dma"].taken == 102
    assert [observer.label_of(owner) for owner in ("a", "c")] == ["a", OTHER]


def test_the_label_of_all_others_takes_no_place() -> None:
    """An owner that comes after the first one that was folded still has a label of its own."""
    observer = counts(max_owners=2)
    for lease, owner in enumerate(("a", OTHER, "b")):
        observer(taken(lease, owner))
    assert list(observer.owners) == ["a", OTHER, "b"]


def test_names_that_are_remembered_are_bounded() -> None:
    """A guest that multiplies names takes no memory, and the counts stay right."""
    observer = counts(max_owners=1)
    for lease in range(1000):
        observer(taken(lease, f"request {lease}"))
        observer(LeaseReleased(SECOND, lease))
    assert len(observer._known) <= 256
    assert len(observer._held) == 0
    assert observer.owners[OTHER].kinds["dma"].taken == 999


def test_labels_are_escaped_and_short() -> None:
    """What a name contains does not reach the output as it is."""
    observer = counts()
    observer(taken(1, "\x1b[2J\n"))
    observer(taken(2, "\0" * 10**6))
    escaped, long = observer.owners
    assert escaped == r"\x1b[2J\n"
    assert long == r"\x00" * (MAX_LABEL // 4)


def test_a_program_folds_owners_itself() -> None:
    """A number that a guest chooses is left out."""
    observer = LeaseCounts(64, lambda owner: owner.partition(" ")[0], set, list)
    for lease in range(100):
        observer(taken(lease, f"disk0 request {lease}"))
    assert list(observer.owners) == ["disk0"]


def test_after_lost_events_nothing_is_kept_of_leases_that_ended() -> None:
    """Their ends may be among what was lost; a lease that is held is still known."""
    observer = counts(held=frozenset({2}))
    observer(taken(1, "disk0"))
    observer(taken(2, "disk0"))
    observer(EventsLost(SECOND, 5))
    assert observer.lost_events == 5
    assert list(observer._held) == [2]
    observer(LeaseReleased(2 * SECOND, 1, True, lost=1))
    assert observer.owners["disk0"].lost == 0
    other = observer.owners[OTHER]
    assert (other.lost, other.stale_released) == (1, 1)
    assert list(other.kinds) == []


def test_other_events_are_not_counted() -> None:
    """Each observer leaves out what is not its own."""
    leases, requests = counts(), RequestCounts()
    leases(Quiesced(SECOND, 0))
    requests(CacheClosed(SECOND))
    assert leases.owners == {}
    assert set(requests.requests.values()) == {0}


def test_requests_are_counted_by_kind() -> None:
    """With failures and durations; kinds that a guest makes up share one label."""
    observer = RequestCounts()
    observer(request(RequestKind.PORT, 50 * MS))
    observer(request(RequestKind.PORT, 200 * MS, "no region"))
    for kind in range(100, 200):
        observer(request(kind, 0, "unknown"))
    key = RequestKey(RequestKind.MMIO, True, 0x1000, None)
    observer(RequestsHandled({key: 7}))
    assert {kind: number for kind, number in observer.requests.items() if number} == {
        "port": 2,
        "mmio": 7,
        OTHER: 100,
    }
    assert {kind: number for kind, number in observer.failures.items() if number} == {
        "port": 1,
        OTHER: 100,
    }
    slow = dict(observer.handlers["port"].buckets())
    assert (slow[0.1], slow[float("inf")]) == (1, 2)
    assert list(observer.requests) == list(observer.handlers)


def test_quiesce_is_timed() -> None:
    """With the callbacks that failed, and the events that were lost."""
    observer = RequestCounts()
    observer(Quiesced(SECOND, 20 * SECOND, 2))
    observer(EventsLost(SECOND, 3))
    assert observer.quiesce.buckets()[len(HANDLER_SECONDS) - 1 :] == [
        (10.0, 0),
        (float("inf"), 1),
    ]
    assert (observer.quiesce_failures, observer.lost_events) == (2, 3)
