"""MapCache.observe: what a cache tells, and when."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from xenmapcache import (
    FaultError,
    MapCache,
    MockDomain,
    MockHypervisor,
    XenCallError,
    XenMapCacheError,
    open_backend,
    open_cache,
)
from xenmapcache.cache.budget import Operation
from xenmapcache.cache.record import LeaseRecord
from xenmapcache.events import (
    BucketDropped,
    BucketMapped,
    CacheClosed,
    CacheOpened,
    Event,
    HoleFault,
    Invalidated,
    LeaseReleased,
    LeaseTaken,
    MapFailed,
    PagesDirtied,
)
from xenmapcache.stream import new_hooks

BUCKET = 0x10000


@pytest.fixture
def domain() -> MockDomain:
    return MockHypervisor().create_domain(memory="1M")


@pytest.fixture
def cache(domain: MockDomain) -> Iterator[MapCache]:
    with (
        open_backend("mock", domain=domain) as backend,
        MapCache(backend, bucket_shift=16, max_resident=4 * BUCKET) as cache,
    ):
        yield cache


@pytest.fixture
def told(cache: MapCache) -> list[Event]:
    got: list[Event] = []
    cache.observe(got.append)
    got.clear()
    return got


def kinds(events: list[Event]) -> list[str]:
    return [type(each).__name__ for each in events]


def test_a_lease(cache: MapCache, told: list[Event]) -> None:
    """It maps a bucket; its pages are reported at its end."""
    lease = cache.map_dma(0x11000, 0x20, owner="nic", direction="from-device")
    mapped, taken = told
    assert isinstance(mapped, BucketMapped)
    assert (mapped.start, mapped.length, mapped.holes) == (BUCKET, BUCKET, 0)
    assert mapped.host == lease.host_address - 0x1000
    assert mapped.duration is not None
    assert isinstance(taken, LeaseTaken)
    assert taken[1:8] == (lease.id, "dma", 0x11000, 0x20, "nic", "from-device", "MainThread")
    assert (taken.stale, taken.origin) == (False, None)
    told.clear()
    lease.release()
    dirtied, released = told
    assert isinstance(dirtied, PagesDirtied)
    assert dirtied[1:] == (0x11000, 0x1000)
    assert isinstance(released, LeaseReleased)
    assert released[1:] == (lease.id, False, 0, 0)


def test_what_is_so_already(cache: MapCache) -> None:
    """The source, the buckets and the leases, once each."""
    device = cache.map_device(0, 0x2000, owner="vga")
    cache.read(0x20000, 1)
    got: list[Event] = []
    with cache.observe(got.append):
        device.release()
    opened, mapped, taken, _, released = got
    assert isinstance(opened, CacheOpened)
    assert opened[1:] == (4, repr(cache.backend), BUCKET)
    assert isinstance(mapped, BucketMapped)
    assert (mapped.start, mapped.duration) == (0x20000, None)
    assert isinstance(taken, LeaseTaken)
    assert (taken.kind, taken.direction) == ("device", None)
    assert isinstance(released, LeaseReleased)
    times = [each.time for each in got if not isinstance(each, LeaseTaken)]  # type: ignore[union-attr] # all have one
    assert times == sorted(times)  # type: ignore[type-var] # none is None
    assert taken.time is not None
    assert opened.time is not None
    assert taken.time < opened.time


def test_eviction(cache: MapCache, told: list[Event]) -> None:
    for number in range(5):
        cache.read(number * BUCKET, 1)
    dropped = [each for each in told if isinstance(each, BucketDropped)]
    assert [each[1:] for each in dropped] == [(0, BUCKET, "evicted")]


def test_stale_leases(cache: MapCache, told: list[Event]) -> None:
    """An invalidation names the DMA that is held; what it wrote is lost."""
    lease = cache.map_dma(0x1000, 0x1001, owner="nic")
    window = cache.window(0, 0x1000)
    told.clear()
    cache.invalidate()
    lease.release()
    window.release()
    invalidated = told[0]
    assert isinstance(invalidated, Invalidated)
    assert invalidated[1:4] == (1, 1, (lease.id,))
    ends = [each[1:] for each in told if isinstance(each, LeaseReleased)]
    assert ends == [(lease.id, True, 0, 2), (window.id, True, 0, 0)]


def test_copied_and_lost_pages(domain: MockDomain) -> None:
    """Of on_stale="copy": one page differs, one is not there any more."""
    got: list[Event] = []
    with (
        open_backend("mock", domain=domain) as backend,
        MapCache(backend, on_stale="copy") as cache,
        cache.observe(got.append),
    ):
        lease = cache.map_dma(0x1000, 0x2000, owner="nic")
        domain.balloon_out(0x1000, 0x1000)
        domain.balloon_out(0x2000, 0x1000)
        domain.balloon_in(0x1000, 0x1000)
        lease.view[:] = b"x" * 0x2000
        cache.invalidate()
        with pytest.raises(FaultError):
            lease.release()
    assert [each[1:] for each in got if isinstance(each, LeaseReleased)] == [(lease.id, True, 1, 1)]


def test_holes(cache: MapCache, domain: MockDomain, told: list[Event]) -> None:
    """A bucket is mapped with its holes; an access and a lease fault; a bucket is replaced."""
    domain.balloon_out(0x1000, 0x1000)
    for work in (
        lambda: cache.read(0x1800, 1),
        lambda: cache.map_dma(0x1000, 1, owner="x"),
        lambda: cache.map_device(0x800, 0x1000, owner="x"),
    ):
        with pytest.raises(FaultError):
            work()
    assert [each.address for each in told if isinstance(each, HoleFault)] == [0x1000] * 3
    assert [each.holes for each in told if isinstance(each, BucketMapped)] == [0x1000]
    told.clear()
    domain.balloon_in(0x1000, 0x1000)
    cache.read(0x1800, 1)
    assert kinds(told) == ["BucketDropped", "BucketMapped"]
    assert told[0][1:] == (0, BUCKET, "replaced")


def test_writes(cache: MapCache, told: list[Event]) -> None:
    """Pages are told when they are reported: cold, hot, and after the observer has gone."""
    for _ in range(3):
        cache.write(0xFFF, b"ab")
    dirtied = [each[1:] for each in told if isinstance(each, PagesDirtied)]
    assert dirtied == [(0, 0x2000)] * 3


def test_replace(cache: MapCache, told: list[Event]) -> None:
    cache.map_device(0x1000, 0x1000, owner="rom")
    told.clear()
    cache.replace(0x1000, 0x5000, 0x1000)
    assert told[0][1:] == (0x1000, 0x5000)
    assert kinds(told) == ["BucketReplaced", "PagesDirtied"]
    cache.close(force=True)
    assert kinds(told)[2:] == ["PagesDirtied", "LeaseReleased", "CacheClosed"]
    cache.close()
    assert isinstance(told[-1], CacheClosed)
    assert len(told) == 5
    with pytest.raises(XenMapCacheError, match="closed"):
        cache.observe(told.append)


@pytest.mark.parametrize(("invalidations", "lost"), [(0, 0), (1, 2)])
def test_a_forced_close_delivers_nothing(domain: MockDomain, invalidations: int, lost: int) -> None:
    """What a stale lease's device wrote is lost, also if a release would have copied it."""
    got: list[Event] = []
    with open_backend("mock", domain=domain) as backend:
        cache = MapCache(backend, on_stale="copy")
        cache.observe(got.append)
        cache.map_dma(0xFFF, 2, owner="nic")
        for _ in range(invalidations):
            cache.invalidate()
        cache.close(force=True)
    (released,) = [each for each in got if isinstance(each, LeaseReleased)]
    assert released[2:] == (invalidations > 0, 0, lost)


def test_an_interrupted_observer_of_a_lease(cache: MapCache) -> None:
    """The caller gets no lease, so none is held; observers know it."""
    got: list[Event] = []

    class Interrupt(BaseException):
        pass

    def observe(each: Event) -> None:
        got.append(each)
        if isinstance(each, LeaseTaken):
            raise Interrupt

    with cache.observe(observe):
        with pytest.raises(Interrupt):
            cache.map_dma(0, 1, owner="x")
        assert not cache.leases()
    assert kinds(got)[-2:] == ["LeaseTaken", "LeaseReleased"]


def test_an_observer_that_uses_the_cache(cache: MapCache) -> None:
    """It holds no lock and is inside of no operation; what it does is told afterwards."""
    order: list[str] = []

    def observe(each: Event) -> None:
        order.append(type(each).__name__)
        assert not cache._budget.operations
        if isinstance(each, BucketMapped) and each.start < 2 * BUCKET:
            cache.read(each.start + BUCKET, 1)
            cache.map_dma(each.start + BUCKET, 1, owner="observer", direction="to-device").release()
        order.append("end")

    with cache.observe(observe):
        cache.read(0, 1)
        cache.stats()
    names = ["CacheOpened", "BucketMapped", *(["BucketMapped", "LeaseTaken", "LeaseReleased"] * 2)]
    assert order == [each for name in names for each in (name, "end")]


def test_what_a_handler_puts_in_under_the_lock(cache: MapCache, told: list[Event]) -> None:
    """It is told when the operation that was interrupted has ended, here a call of stats."""
    with cache._budget.lock:
        cache.map_device(0, 1, owner="handler")
        assert not told
    cache.stats()
    assert kinds(told) == ["LeaseTaken"]
    with cache._budget.lock:
        cache.close(force=True)
    assert "CacheClosed" not in kinds(told)


def test_new_caches_are_announced(domain: MockDomain) -> None:
    got: list[Event] = []
    new_hooks.append(lambda observe: observe(got.append))
    try:
        with open_backend("mock", domain=domain) as backend, MapCache(backend):
            pass
    finally:
        new_hooks.pop()
    assert kinds(got) == ["CacheOpened", "CacheClosed"]


def test_a_page_that_was_refused(domain: MockDomain, cache: MapCache, told: list[Event]) -> None:
    """It is told as a failure of the access, and not as a hole."""
    domain.inject_fault("map", gfn=5, errno=errno.EPERM, repeat=True)
    with pytest.raises(XenCallError):
        cache.read(0x5000, 8)
    with pytest.raises(XenCallError):
        cache.map_dma(0x5000, 2 * BUCKET, owner="nic")
    assert [each.address for each in told if isinstance(each, MapFailed)] == [0x5000] * 2
    assert not [each for each in told if isinstance(each, HoleFault)]


def test_a_thread_inside_of_an_operation(cache: MapCache) -> None:
    """No observer runs in it; another thread's operation does not matter."""
    budget = cache._budget
    assert not budget.is_inside()
    operation = Operation()
    budget.operations[operation] = None
    assert budget.is_inside()
    operation.thread += 1
    assert not budget.is_inside()
    del budget.operations[operation]
    with budget.lock:
        assert budget.is_inside()


def test_a_source_that_tracks_no_dirty_pages(tmp_path: Path) -> None:
    """A file: nothing is told of reports that nobody makes."""
    path = tmp_path / "guest.raw"
    path.write_bytes(bytes(BUCKET))
    got: list[Event] = []
    with open_cache(f"raw:{path}", bucket_shift=16) as cache, cache.observe(got.append):
        cache.read(0, 8)
    assert kinds(got) == ["CacheOpened", "BucketMapped"]


def test_a_lease_without_memory_counts_for_nothing(cache: MapCache) -> None:
    """One that is ending in another thread has given its mapping up already."""
    lease = cache.map_dma(0, 8, owner="nic")
    before, lease._record.mapping = lease._record.mapping, None
    assert cache._registry.leased_bytes(False) == 0
    lease._record.mapping = before
    assert cache._registry.leased_bytes(False) == BUCKET
    lease.release()


def test_who_closes_tells_it(
    cache: MapCache, told: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A close that a signal handler overtakes has closed nothing, so one CacheClosed is told."""
    held = cache._registry.held

    def overtaken() -> list[LeaseRecord]:
        monkeypatch.undo()
        cache.close()
        return held()

    monkeypatch.setattr(cache._registry, "held", overtaken)
    cache.close()
    assert kinds(told).count("CacheClosed") == 1
