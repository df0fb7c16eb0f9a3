"""The model of the picture: which bars, lines, numbers and notes a stream of events gives."""

from __future__ import annotations

import pytest

from tests.observe.recordings import EVENTS, START, released, taken
from xenmapcache.address import MiB
from xenmapcache.events import (
    Accessed,
    BucketDropped,
    BucketMapped,
    CacheClosed,
    CacheOpened,
    Event,
    EventsLost,
    HoleFault,
    Invalidated,
    LeaseHeld,
    LeaseReleased,
    MapFailed,
    PagesDirtied,
    Quiesced,
    RequestHandled,
    RequestKey,
    RequestsHandled,
)
from xenmapcache.observe.recording import Entry
from xenmapcache.observe.timeline import model
from xenmapcache.observe.timeline.bars import (
    BIDIRECTIONAL,
    DEVICE,
    STALE,
    STYLES,
    TO_DEVICE,
    WINDOW,
    Burst,
)
from xenmapcache.observe.timeline.model import MAX_TIME, Model, Picture
from xenmapcache.observe.timeline.worst import MOST, Held, Worst


def draw(*events: Event, base: int | None = START) -> Picture:
    """Return the picture of a stream."""
    made = Model(base)
    made.add(Entry(0, event) for event in events)
    return made.finish("a program")


def at(nanoseconds: int) -> int:
    return START + nanoseconds


def bars(picture: Picture) -> list[tuple[int, int, int]]:
    return [(bar.start, bar.end, bar.style) for bar in picture.bars]


def test_a_lease_is_a_bar() -> None:
    """It has the lease's times, range, number and owner, in the owner's lane."""
    picture = draw(taken(), released())
    (bar,) = picture.bars
    assert bars(picture) == [(1000, 2_001_000, TO_DEVICE)]
    assert (bar.lease, bar.low, bar.high, bar.row) == (7, 0x5000, 0x7000, 0)
    assert picture.owners[bar.owner] == picture.lanes[bar.lane].name == "disk"
    assert (picture.span, picture.leases, picture.stale, picture.events) == (2_001_000, 1, 0, 2)
    (worst,) = picture.worst
    assert (worst.held, worst.across, worst.is_open) == (2_000_000, 0, False)


def test_red_begins_with_the_invalidation() -> None:
    """A DMA lease that is held across it has a usual part and a red one."""
    picture = draw(
        taken(),
        Invalidated(at(5000), 1, 3, (7, 99), 10),
        Invalidated(at(6000), 2, 0, (7,), None),
        LeaseReleased(at(9000), 7, True, 1, 2),
    )
    assert bars(picture) == [(1000, 5000, TO_DEVICE), (5000, 9000, STALE)]
    assert (picture.stale, picture.copied, picture.lost) == (1, 1, 2)
    assert picture.bursts == [Burst(5000, 5000, 1, 3, 2, 10), Burst(6000, 6000, 1, 0, 1, 0)]
    assert picture.invalidations == 2
    (worst,) = picture.worst
    assert (worst.across, worst.stale, worst.copied, worst.lost) == (2, True, 1, 2)


def test_a_lease_that_was_moved_is_not_stale() -> None:
    """The release has the last word: after `replace`, a lease is fresh again."""
    picture = draw(taken(), Invalidated(at(5000), 1, 0, (7,)), LeaseReleased(at(9000), 7))
    assert bars(picture) == [(1000, 9000, TO_DEVICE)]
    assert picture.stale == 0


def test_stale_without_a_known_time() -> None:
    """If the invalidation is not in the recording, all of the bar is red."""
    picture = draw(taken(), LeaseReleased(at(9000), 7, True))
    assert bars(picture) == [(1000, 9000, STALE)]
    picture = draw(taken()._replace(stale=True), released(at=at(500)))
    assert bars(picture) == [(1000, 1000, TO_DEVICE)], "the clock went back"


def test_device_memory_is_apart() -> None:
    """It has lanes of its own, after DMA's, and does not become red."""
    picture = draw(
        taken(1)._replace(kind="device", direction=None),
        taken(2),
        taken(3)._replace(kind="window", direction=None),
        taken(4)._replace(direction="sideways"),
        LeaseReleased(at(9000), 1, True),
        LeaseReleased(at(9000), 12),
    )
    assert [(lane.group, lane.name, lane.rows) for lane in picture.lanes] == [
        ("dma", "disk", 2),
        ("device", "disk", 2),
    ]
    assert {bar.style for bar in picture.bars} == {DEVICE, WINDOW, TO_DEVICE, BIDIRECTIONAL}
    assert picture.stale == 0
    assert len(STYLES) == 6


def test_what_is_held_ends_with_the_recording() -> None:
    """A lease without an end is drawn to the end; its number may be taken again."""
    picture = draw(
        taken(at=at(-500)),
        taken(at=at(2000)),
        Invalidated(at(3000), 1, None, (7,)),
        HoleFault(at(4000), 0x1000),
    )
    assert bars(picture) == [
        (0, 2000, TO_DEVICE),
        (2000, 3000, TO_DEVICE),
        (3000, 4000, STALE),
    ]
    assert [(lease.held, lease.is_open) for lease in picture.worst] == [(2000, True), (2500, True)]


def test_streams_are_apart() -> None:
    """A number of a lease belongs to its stream; so do INVALIDATE and the buckets."""
    made = Model()
    made.add(
        [
            Entry(0, taken()),
            Entry(1, taken(at=at(2000))),
            Entry(0, BucketMapped(at(2000), 0, MiB, None, None)),
            Entry(1, BucketMapped(at(2000), 0, MiB, None, None)),
            Entry(1, Invalidated(at(3000), 1, 1, (7,))),
            Entry(0, released(at=at(400_000))),
        ]
    )
    picture = made.finish()
    assert picture.base == at(1000)
    assert [(lane.name, lane.group) for lane in picture.lanes] == [
        ("disk [1]", "dma"),
        ("disk", "dma"),
    ]
    assert picture.stale == 1
    assert picture.heat.cells(picture.span)[0][-1] == 0, "stream 0 still has it mapped"


def test_buckets_are_heat() -> None:
    """A bucket is present until it is dropped, invalidated or closed; leases count as uses."""
    picture = draw(
        CacheOpened(at(0), 8, "xen domain 3"),
        BucketMapped(at(0), MiB, MiB, 30, None),
        BucketMapped(at(0), 3 * MiB, MiB, 30, None),
        BucketMapped(at(0), 3 * MiB, MiB, 30, None),
        BucketDropped(at(2048), MiB, MiB, "evicted"),
        BucketDropped(at(2048), 9 * MiB, MiB, "evicted"),
        Accessed({3: 5, 5: 2}),
        PagesDirtied(at(2048), 0x5000, 0x1000),
        CacheClosed(at(4096)),
        HoleFault(at(8192), 0),
    )
    assert picture.heat.rows() == [0, MiB, 3 * MiB, 5 * MiB]
    cells = picture.heat.cells(picture.span)
    assert cells[1][:4] == [1, 0, 0, -1]
    assert cells[2][:6] == [2, 0, 3, 0, 0, -1]
    assert cells[0][:3] == [-1, -1, 1]


def test_rates_and_times() -> None:
    """Map calls, faults and ioreqs are counted, and handlers' times are summed up."""
    handled = RequestHandled(at(10), 0, 0, True, 0x3F8, 1, 800)
    picture = draw(
        BucketMapped(at(5), 0, MiB, 30, None),
        HoleFault(at(5), 0),
        MapFailed(at(5), 0),
        handled,
        handled._replace(duration=-5),
        handled._replace(duration=1 << 63),
        RequestsHandled({RequestKey(0, True, 1, None): 4}),
        Quiesced(at(20), 700),
        Quiesced(at(20), 300),
    )
    totals = {name: series.values[0] for name, series in picture.series.items()}
    assert totals == {
        "maps": 1, "faults": 2, "requests": 7, "handled": 3, "handler_sum": 800 + MAX_TIME,
        "handler_max": MAX_TIME, "quiesce_max": 700,
    }  # fmt: skip


def test_held_dma_of_qemu() -> None:
    """It is a red moment in a lane of its own, at the bucket's address."""
    picture = draw(LeaseHeld(at(5), 0x300000, 0x100000, 0x7F00, 2))
    (bar,) = picture.bars
    assert (bar.start, bar.end, bar.style, bar.low, bar.high) == (5, 5, STALE, 0x300000, 0x400000)
    assert picture.lanes[0].name.startswith("QEMU")
    assert picture.stale == 1


def test_notes_say_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events without a time, lost events, and what does not fit, are counted."""
    monkeypatch.setattr(model, "_MAX_LEASES", 1)
    monkeypatch.setattr(model, "_MAX_BUCKETS", 1)
    picture = draw(
        taken(1),
        taken(2),
        BucketMapped(at(5), 0, MiB, None, None),
        BucketMapped(at(5), MiB, MiB, None, None),
        BucketDropped(at(6), 0, MiB, "evicted"),
        BucketMapped(at(6), MiB, MiB, None, None),
        released()._replace(time=None),
        EventsLost(None, 12),
        EventsLost(at(7), 3),
    )
    assert picture.notes == [
        "2 events have no time and are not shown",
        "15 events were lost, because the recorder could not follow",
        "2 leases or buckets are not shown, because too many were open",
    ]


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many leases and invalidations there are, bars and bursts are merged in time."""
    monkeypatch.setattr(model, "MAX_BARS", 40)
    monkeypatch.setattr(model, "MAX_BURSTS", 10)
    made = Model(START)
    for number in range(3000):
        time = at(number * 1000)
        made.add([Entry(0, taken(number, at=time)), Entry(0, released(number, time + 400))])
        made.add([Entry(0, Invalidated(time + 500, number, 1))])
        assert len(made._bars) <= 40
        assert len(made._bursts) <= 10
    picture = made.finish()
    assert sum(bar.total for bar in picture.bars) == 3000
    assert sum(burst.total for burst in picture.bursts) == 3000


def test_hostile_numbers_are_finite() -> None:
    """Times, addresses and counts of any size give a picture."""
    lease = taken()._replace(start=-(1 << 63), length=(1 << 64) - 1, time=-(1 << 63))
    picture = draw(
        lease,
        lease._replace(lease=8, time=(1 << 64) - 1, owner="\x1b<b>" * 1000),
        Invalidated(at(5), -1, -5, (), -5),
        LeaseReleased(at(5), 7, False, -5, -5),
        Accessed({-1: -1, 1 << 62: (1 << 64) - 1}),
        RequestsHandled({RequestKey(0, True, 0, None): -7}),
        *EVENTS,
    )
    assert picture.span == MAX_TIME
    assert all(0 <= bar.start <= bar.end <= MAX_TIME for bar in picture.bars)
    assert all(0 <= lease.held <= MAX_TIME for lease in picture.worst)
    assert (picture.copied, picture.lost) == (1, 2)
    assert all(len(lane.name) <= 64 and lane.name.isprintable() for lane in picture.lanes)


def test_the_worst_leases() -> None:
    """For each reason the table has the worst ones; the first lines are lost pages."""
    worst = Worst()
    for number in range(1, 100):
        lease = Held(taken(number), 0, 0, number, 0, False)
        worst.add(lease)
        worst.add(lease._replace(held=0, across=number, stale=True))
        worst.add(lease._replace(held=0, lost=number))
        worst.add(lease._replace(held=0, copied=number))
        worst.add(lease._replace(taken=taken(number)._replace(kind="device"), held=1000))
    found = worst.leases()
    assert len(found) == 3 * MOST
    assert [lease.lost for lease in found[:MOST]] == list(range(99, 99 - MOST, -1))
    assert [lease.across for lease in found[MOST:-MOST]] == list(range(99, 99 - MOST, -1))
    assert [lease.held for lease in found[-MOST:]] == list(range(99, 99 - MOST, -1))
