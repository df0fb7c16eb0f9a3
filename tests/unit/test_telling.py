"""What a cache tells if a signal handler, or an exception, comes between a step and its event."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.property.replay import Replay
from xenmapcache import MapCache, open_backend
from xenmapcache.cache import telling
from xenmapcache.cache.clock import Clock
from xenmapcache.cache.registry import LeaseRegistry
from xenmapcache.events import CacheClosed, Event, Invalidated, LeaseReleased
from xenmapcache.mapping import Mapping

BUCKET = 0x10000


class Interrupt(BaseException):
    """As KeyboardInterrupt, which pytest would take for the user's."""


@pytest.fixture
def cache() -> Iterator[MapCache]:
    with (
        open_backend("mock", memory="1M") as backend,
        MapCache(backend, bucket_shift=16, max_resident=4 * BUCKET) as cache,
    ):
        yield cache


@pytest.fixture
def told(cache: MapCache) -> list[Event]:
    events: list[Event] = []
    cache.observe(events.append)
    return events


def check(cache: MapCache, told: list[Event]) -> Replay:
    """Compare what follows from the events with the cache."""
    cache.stats()
    replay = Replay()
    for event in told:
        replay(event)
    assert replay.leases.keys() == {info.id for info in cache.leases()}
    buckets = cache._table.generation.buckets
    assert replay.buckets == {index * BUCKET: each.address for index, each in buckets.items()}
    return replay


def interrupt_once(
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,  # noqa: ANN401 - a module or a class
    name: str,
    *,
    after: bool = False,
) -> None:
    """Raise once where a function is called, before or after it."""
    function: Callable[..., object] = getattr(owner, name)

    def interrupted(*arguments: object, **options: object) -> object:
        monkeypatch.setattr(owner, name, function)
        if after:
            function(*arguments, **options)
        raise Interrupt

    monkeypatch.setattr(owner, name, interrupted)


@pytest.mark.parametrize("name", ["mapped", "_come", "_bucket", "settle"])
def test_a_bucket_whose_event_was_interrupted(
    name: str, cache: MapCache, told: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told all the same, and only once."""
    interrupt_once(monkeypatch, telling, name)
    with pytest.raises(Interrupt):
        cache.read(0, 1)
    assert check(cache, told).buckets


@pytest.mark.parametrize(("owner", "name"), [(telling, "dropped"), (Clock, "sweep")])
def test_an_eviction_whose_event_was_interrupted(
    owner: Any,  # noqa: ANN401 - a module or a class
    name: str,
    cache: MapCache,
    told: list[Event],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What has gone is told."""
    for bucket in range(4):
        cache.read(bucket * BUCKET, 1)
    interrupt_once(monkeypatch, owner, name, after=owner is Clock)
    with pytest.raises(Interrupt):
        cache.read(4 * BUCKET, 1)
    check(cache, told)
    cache.read(5 * BUCKET, 1)
    check(cache, told)


def test_steps_that_fail_without_observers(
    cache: MapCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is told, and the exception comes through."""
    interrupt_once(monkeypatch, Clock, "admit")
    with pytest.raises(Interrupt):
        cache.read(0, 1)
    for bucket in range(4):
        cache.read(bucket * BUCKET, 1)
    interrupt_once(monkeypatch, Clock, "sweep")
    with pytest.raises(Interrupt):
        cache.read(4 * BUCKET, 1)
    lease = cache.map_dma(0, 1, owner="x")
    interrupt_once(monkeypatch, LeaseRegistry, "mark_dirty")
    with pytest.raises(Interrupt):
        lease.release()
    lease.release()


@pytest.mark.parametrize("read", [True, False])
def test_an_interrupted_invalidation(
    cache: MapCache, told: list[Event], monkeypatch: pytest.MonkeyPatch, *, read: bool
) -> None:
    """It is told before what comes after it, or with the statistics."""
    cache.read(0, 1)
    lease = cache.map_dma(BUCKET, 1, owner="nic")
    cache.map_device(BUCKET, 1, owner="rom")
    interrupt_once(monkeypatch, cache._mapper.__class__, "clear_retired")
    with pytest.raises(Interrupt):
        cache.invalidate()
    cache.map_dma(BUCKET - 1, 2, owner="edge").release()
    edge = cache.map_dma(BUCKET - 1, 2, owner="edge")
    if read:
        cache.read(0, 1)
    check(cache, told)
    edge.release()
    (event,) = [each for each in told if isinstance(each, Invalidated)]
    assert (event.number, event.held, event.duration) == (1, (lease.id,), None)
    later = cache.map_dma(0, 1, owner="later")
    cache.invalidate()
    last = told[-1]
    assert isinstance(last, Invalidated)
    assert last.held == (lease.id, later.id)
    assert last.duration is not None
    for each in (lease, later):
        each.release()
    cache.close(force=True)


@pytest.mark.parametrize("force", [True, False])
def test_an_interrupted_end_of_a_lease(
    cache: MapCache, told: list[Event], monkeypatch: pytest.MonkeyPatch, *, force: bool
) -> None:
    """It is told once, although the call does not return."""
    lease = cache.map_dma(0, 1, owner="nic")
    interrupt_once(monkeypatch, telling, "ended")
    with pytest.raises(Interrupt):
        cache.close(force=True) if force else lease.release()
    assert lease.released
    assert len([each for each in told if isinstance(each, LeaseReleased)]) == 1
    cache.close(force=True)
    assert len([each for each in told if isinstance(each, CacheClosed)]) == 1


def test_a_failed_release_is_no_end(
    cache: MapCache, told: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lease is still held, and nothing is told of it."""
    lease = cache.map_dma(0, 1, owner="nic")
    interrupt_once(monkeypatch, LeaseRegistry, "mark_dirty")
    with pytest.raises(Interrupt):
        lease.release()
    assert check(cache, told).leases
    lease.release()


def test_an_eviction_amid_the_event(
    cache: MapCache, told: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bucket that a signal handler evicts before it was told is not told at all."""
    make = telling._bucket

    def interrupted(*arguments: Any) -> Event:  # noqa: ANN401 - those of another function
        monkeypatch.setattr(telling, "_bucket", make)
        event = make(*arguments)
        cache.invalidate()
        return event

    monkeypatch.setattr(telling, "_bucket", interrupted)
    cache.read(0, 1)
    check(cache, told)


def test_an_invalidation_right_before_the_event(
    cache: MapCache, told: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bucket that is not found any more is not told."""
    make = telling.KnownBucket

    def interrupted(*arguments: Any) -> telling.KnownBucket:  # noqa: ANN401 - as above
        monkeypatch.setattr(telling, "KnownBucket", make)
        cache.invalidate()
        return make(*arguments)

    monkeypatch.setattr(telling, "KnownBucket", interrupted)
    cache.read(0, 1)
    assert not check(cache, told).buckets


def test_another_bucket_amid_the_end_of_one(
    cache: MapCache, told: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal handler maps it again, before its end is told: its end comes first, once."""
    put = type(cache.stream).put
    cache.read(0, 1)
    mapping = cache._table.generation.buckets[0]

    def interrupted(*arguments: Any) -> None:  # noqa: ANN401 - those of another function
        monkeypatch.setattr(type(cache.stream), "put", put)
        telling.mapped(cache._table, 0, mapping, None, former=False)
        put(*arguments)

    monkeypatch.setattr(type(cache.stream), "put", interrupted)
    telling._gone(cache._table, 0, 1, "evicted")
    check(cache, told)


def test_a_mapping_that_observers_do_not_know(cache: MapCache, told: list[Event]) -> None:
    """Its end is not told."""
    cache.read(0, 1)
    mapping = cache._table.generation.buckets[0]
    before = [*told]
    known = cache._table.generation.known
    known[0].host += 1
    telling.dropped(cache._table, [mapping])
    known.clear()
    telling.dropped(cache._table, [mapping])
    cache.stats()
    assert told == before


def test_an_eviction_amid_a_snapshot(cache: MapCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a signal handler evicts is told to an observer that knows it, and to no other."""
    make = telling.KnownBucket

    def interrupted(mapping: Mapping, *, told: bool) -> telling.KnownBucket:
        monkeypatch.setattr(telling, "KnownBucket", make)
        cache._table.evict(BUCKET)
        return make(mapping, told=told)

    events: list[list[Event]] = [[], []]
    for got in events:
        cache.read(0, 1)
        monkeypatch.setattr(telling, "KnownBucket", interrupted)
        cache.observe(got.append)
        monkeypatch.setattr(telling, "KnownBucket", make)
        cache.read(0, 1)
    for got in events:
        check(cache, got)


def test_a_lease_that_ended_before_it_was_told(cache: MapCache) -> None:
    """A snapshot leaves it out."""
    lease = cache.map_dma(0, 1, owner="nic")
    records = cache._registry.held()
    lease.release()
    opened = cache._snapshot()[0]
    events = telling.snapshot(opened, records, cache._table)  # type: ignore[arg-type] # it is one
    assert [type(each).__name__ for each in events] == ["CacheOpened", "BucketMapped"]
    assert not records[0].told
