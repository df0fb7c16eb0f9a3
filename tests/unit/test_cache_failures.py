"""MapCache: calls that fail, threads at once, close, and what errors keep."""

from __future__ import annotations

import errno
import gc
import logging
import threading
import tracemalloc
from collections.abc import Callable

import pytest

from tests.conftest import HOLE
from tests.kit import BUCKET, heat, maps
from xenmapcache import (
    Backend,
    ClosedError,
    DmaDirection,
    FaultError,
    LeaseError,
    MapCache,
    Mapping,
    MockDomain,
    MockHypervisor,
    XenCallError,
    open_backend,
)


@pytest.mark.parametrize(
    "call",
    [
        lambda c: c.read(0x300000, 8),
        lambda c: c.read_into(0x300000, bytearray(8)),
        lambda c: c.write(0x300000, b"x"),
        lambda c: c.read(0x2FFFFC, 8),
        lambda c: c.map_dma(0x300000, 8, owner="t"),
        lambda c: c.map_dma(0x2FFFFC, 8, owner="t"),
        lambda c: c.map_device(0x300000, 8, owner="t"),
        lambda c: list(c.present(0x300000, 8)),
        lambda c: c.read(HOLE[0], 1),
    ],
    ids=[
        "read",
        "read_into",
        "write",
        "read-crossing",
        "map_dma",
        "map_dma-crossing",
        "map_device",
        "present",
        "hole",
    ],
)
def test_a_failed_map_call_leaves_what_was_there(
    domain: MockDomain, cache: MapCache, call: Callable[[MapCache], object]
) -> None:
    """Each call site reports the errno, keeps books and resident buckets, and works next time."""
    with pytest.raises(FaultError):
        cache.read(HOLE[0], 1)  # leaves a bucket with holes, whose retry will fail
    cache.write(0x400000, b"kept")
    before = cache.stats()
    domain.inject_fault("map", errno=errno.EIO, repeat=True)
    with pytest.raises(XenCallError, match=r"mock_map failed for domain 1 with EIO") as caught:
        call(cache)
    assert caught.value.errno == errno.EIO
    after = cache.stats()
    assert (after.resident_bytes, after.maps) == (before.resident_bytes, before.maps)
    assert cache.read(0x400000, 4) == b"kept"
    assert cache.leases() == ()
    domain.clear_faults()
    try:
        result = call(cache)
    except FaultError as fault:
        assert fault.address == HOLE[0]
    else:
        assert result is not XenCallError
    cache.read(0x300000, 8)


def test_one_bad_page_of_a_call_is_a_hole(domain: MockDomain, cache: MapCache) -> None:
    """A page's own errno reaches the FaultError; its neighbours read; it is tried again."""
    domain.inject_fault("map", gfn=0x201, errno=errno.ENOENT)
    assert cache.read(0x200000, 8) == bytes(8)
    domain.inject_fault("map", gfn=0x201, errno=errno.ENOENT)
    with pytest.raises(FaultError) as caught:
        cache.read(0x200FFC, 8)
    assert (caught.value.address, caught.value.errno) == (0x201000, errno.ENOENT)
    assert cache.read(0x200FFC, 8) == bytes(8)


def test_enomem_gives_back_and_tries_again(domain: MockDomain, cache: MapCache) -> None:
    """When the kernel's limit is lower than ours, unleased buckets go, and the call repeats."""
    for index in range(4):
        cache.read(0x100000 + index * BUCKET, 1)
    domain.inject_fault("map", errno=errno.ENOMEM)
    assert cache.read(0x300000, 1) == b"\0"
    assert cache.stats().evictions == 4
    assert cache.stats().resident_buckets == 1
    domain.inject_fault("map", errno=errno.ENOMEM, repeat=True)
    with pytest.raises(XenCallError, match="ENOMEM"):
        cache.read(0x400000, 1)


def test_threads_that_miss_the_same_bucket_map_it_once(domain: MockDomain, cache: MapCache) -> None:
    """One thread maps, the others wait for it: never two mappings of one bucket."""
    domain.inject_fault("map", delay=0.05)
    barrier = threading.Barrier(8)
    results = []

    def read() -> None:
        barrier.wait()
        results.append(cache.read(0x200000, 8))

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [bytes(8)] * 8
    assert maps(domain) == 1


def test_a_thread_that_failed_leaves_the_bucket_to_the_next(
    domain: MockDomain, cache: MapCache
) -> None:
    """A failed map wakes who waits; each tries for itself."""
    domain.inject_fault("map", errno=errno.EIO, delay=0.05)
    barrier = threading.Barrier(4)
    outcomes = []

    def read() -> None:
        barrier.wait()
        try:
            outcomes.append(cache.read(0x200000, 1))
        except XenCallError:
            outcomes.append(b"failed")

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == [b"\0", b"\0", b"\0", b"failed"]


@pytest.mark.parametrize(
    "call",
    [
        lambda c: c.read(0x2000, 8),
        lambda c: c.read(0x2000, 0),
        lambda c: c.read_into(0x2000, bytearray(8)),
        lambda c: c.write(0x2000, b"x"),
        lambda c: c.map_dma(0x2000, 8, owner="t"),
        lambda c: c.map_device(0x2000, 8, owner="t"),
        lambda c: c.invalidate(),
        lambda c: c.replace(0x1000, 0x2000, 8),
        lambda c: list(c.present(0, 8)),
    ],
)
def test_a_closed_cache_refuses(
    domain: MockDomain, cache: MapCache, call: Callable[[MapCache], object]
) -> None:
    """Every access after close raises ClosedError, resident or not; statistics still answer."""
    heat(cache, 0x2000)
    cache.close()
    cache.close()
    with pytest.raises(ClosedError, match="this map cache is closed"):
        call(cache)
    assert cache.stats().resident_bytes == 0
    assert cache.leases() == ()


def test_close_names_the_leases_that_are_held(cache: MapCache) -> None:
    """Close with leases raises and changes nothing; by force it drops them, views stay safe."""
    lease = cache.map_dma(0x2000, 8, owner="disk0", direction=DmaDirection.FROM_DEVICE)
    with pytest.raises(
        LeaseError, match=r"leases are held \(1\): DMA lease of 'disk0': address 0x2000"
    ):
        cache.close()
    view = lease.view
    view[:] = b"12345678"
    assert cache.read(0x2000, 8) == b"12345678"
    cache.close(force=True)
    assert bytes(view) == b"12345678"
    assert lease.released


def test_close_names_ten_leases(cache: MapCache) -> None:
    """Of more it says how many."""
    for more in ("Release them", "and 1 more. Release them"):
        cache.map_dma(0x2000, 8, owner="t")
        for _ in range(9):
            if len(cache.leases()) < 10:
                cache.map_dma(0x2000, 8, owner="t")
        with pytest.raises(LeaseError, match=rf"thread '[^']*'[.;] {more}"):
            cache.close()


def test_forced_close_warns_of_each_lease(
    cache: MapCache, caplog: pytest.LogCaptureFixture
) -> None:
    """What is dropped by force is named in a WARNING."""
    cache.map_dma(0x2000, 8, owner="disk0")
    with caplog.at_level(logging.WARNING, "xenmapcache"):
        cache.close(force=True)
    assert [record.getMessage() for record in caplog.records if "'disk0'" in record.getMessage()]


def test_an_exception_is_not_hidden_by_its_leases(backend: Backend) -> None:
    """Leaving the with block by an exception drops the leases and lets it through."""
    with pytest.raises(KeyError), MapCache(backend) as cache:
        cache.map_dma(0x2000, 8, owner="t")
        raise KeyError("the caller's own")
    with pytest.raises(ClosedError):
        cache.read(0, 1)


def test_a_closed_backend_refuses_to_map(backend: Backend, cache: MapCache) -> None:
    """What is resident stays readable, what is not raises ClosedError."""
    cache.read(0x2000, 1)
    backend.close()
    assert cache.read(0x2000, 1) == b"\0"
    with pytest.raises(ClosedError, match="is closed"):
        cache.read(0x200000, 1)


def test_dirty_pages_are_told(domain: MockDomain, cache: MapCache) -> None:
    """A write over several pages dirties all of them and no other; nothing for an empty one."""
    cache.write(0x20FFF, bytes(0x1002))
    cache.write(0x20FFF, b"")
    assert domain.dirty_gfns == {0x20, 0x21, 0x22}
    domain.dirty_gfns.clear()
    heat(cache, 0x20000)
    cache.write(0x23010, b"hot")
    assert domain.dirty_gfns == {0x23}


def test_small_buckets_work(domain: MockDomain) -> None:
    """One page a bucket is the least, and right."""
    hypervisor = MockHypervisor()
    guest = hypervisor.create_domain(memory="64k")
    with open_backend("mock", domain=guest) as backend, MapCache(backend, bucket_shift=12) as cache:
        guest.write(0xFFC, b"12345678")
        assert cache.read(0xFFC, 8) == b"12345678"
        assert cache.stats().maps == 2


def test_an_exception_that_is_kept_keeps_no_memory(domain: MockDomain, cache: MapCache) -> None:
    """Tracebacks hold frames; no frame of ours holds the mapping that the fault was found in."""
    gc.disable()
    try:
        kept = []
        for call in (
            lambda: cache.read(HOLE[0], 1),
            lambda: cache.map_dma(HOLE[0] - 8, 16, owner="t"),
            lambda: cache.map_device(HOLE[0], 1, owner="t"),
        ):
            with pytest.raises(FaultError) as caught:
                call()
            kept.append(caught.value)
        cache.invalidate()
        assert cache.stats().resident_bytes == 0
        assert len(kept) == 3
    finally:
        gc.enable()


def test_a_hit_takes_no_lock(cache: MapCache) -> None:
    """Reads and writes of a resident bucket go on while another thread holds the cache's lock."""
    heat(cache, 0x2000)
    done = []

    def hit() -> None:
        cache.write(0x2000, b"12345678")
        done.append(cache.read(0x2000, 8))

    with cache._budget.lock:
        thread = threading.Thread(target=hit)
        thread.start()
        thread.join(10)
        assert done == [b"12345678"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, MemoryError])
def test_whatever_a_backend_raises_the_books_are_right(
    backend: Backend, cache: MapCache, error: type[BaseException]
) -> None:
    """An interrupt or a bug in the middle of a map leaves neither a reservation nor a note."""

    def broken(gfn: int, count: int, *, writable: bool) -> object:
        raise error

    original, backend.map = backend.map, broken  # type: ignore[method-assign,assignment] # for this test alone
    for call in (
        lambda: cache.read(0x2000, 1),
        lambda: cache.map_device(0x2000, 1, owner="t"),
    ):
        with pytest.raises(error):
            call()
    backend.map = original  # type: ignore[method-assign] # for this test alone
    assert cache.stats().resident_bytes == 0
    assert cache._table.generation.notes == {}
    assert cache.read(0x2000, 1) == b"\0"
    assert cache.stats().resident_bytes == BUCKET


def test_a_failed_retry_of_a_hole_keeps_the_bucket(domain: MockDomain, cache: MapCache) -> None:
    """Pages next to a hole stay resident when the hole is still one."""
    cache.read(0x9F000, 1)
    kept = cache._table.generation.buckets[0x9]
    for _ in range(2):
        with pytest.raises(FaultError):
            cache.map_dma(0x9FFF0, 0x20, owner="t")
    cache.read(0xB0000 - 0x11000, 1)
    assert cache._table.generation.buckets[0x9] is kept
    with pytest.raises(FaultError):
        cache.read(0xA0000, 1)
    hole = cache._table.generation.buckets[0xA]
    with pytest.raises(FaultError):
        cache.read(0xA0000, 1)
    assert cache._table.generation.buckets[0xA] is hole


def test_an_edge_is_crossed_with_room_for_one_bucket(domain: MockDomain, backend: Backend) -> None:
    """The least max_resident is enough for writes and read_into over an edge, all or nothing."""
    cache = MapCache(backend, bucket_shift=16, max_resident=BUCKET)
    cache.write(0x300000 - 4, b"12345678")
    assert domain.read(0x300000 - 4, 8) == b"12345678"
    buffer = bytearray(8)
    cache.read_into(0x300000 - 4, buffer)
    assert buffer == b"12345678"
    with pytest.raises(FaultError, match=f"no page at {HOLE[0]:#x}: "):
        cache.write(HOLE[0] - 4, b"12345678")
    assert domain.read(HOLE[0] - 4, 4) == bytes(4)


def test_a_huge_read_copies_nothing_in_vain(backend: Backend) -> None:
    """A length far beyond the end is a fault at the end, before a byte is copied."""
    tracemalloc.start()
    cache = MapCache(backend)
    with pytest.raises(FaultError, match="no page at 0x1000000: "):
        cache.read(HOLE[0] + HOLE[1], 1 << 51)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_a_huge_read_is_all_there(domain: MockDomain) -> None:
    """A read over the size at which it looks first gives every byte, from its edges too."""
    guest = MockHypervisor().create_domain(memory="66M")
    guest.write(0, b"first")
    guest.write(guest.memory_end - 4, b"last")
    with open_backend("mock", domain=guest) as backend, MapCache(backend) as cache:
        data = cache.read(0, guest.memory_end)
    assert (len(data), data[:5], data[-4:]) == (66 << 20, b"first", b"last")


def test_nothing_is_written(domain: MockDomain, cache: MapCache) -> None:
    """No bytes, written where a bucket can be hit, make no page dirty."""
    for _ in range(3):
        cache.read(0x2000, 1)
    cache.write(0x2000, b"")
    assert domain.dirty_gfns == set()


def test_a_miss_in_the_middle_of_the_same_miss(
    domain: MockDomain, cache: MapCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal handler that reads the bucket which its thread is mapping waits for nobody."""
    domain.write(0x2000, b"here")
    original, nested = cache.backend.map, []

    def interrupted(gfn: int, count: int, *, writable: bool) -> Mapping:
        monkeypatch.setattr(cache.backend, "map", original)
        nested.append(cache.read(0x2000, 4))
        return original(gfn, count, writable=writable)

    monkeypatch.setattr(cache.backend, "map", interrupted)
    assert [cache.read(0x2000, 4), *nested] == [b"here"] * 2
    assert maps(domain) == 2
    assert cache._table.generation.notes == {}
    assert cache.stats().resident_bytes == BUCKET


@pytest.mark.parametrize("hot", [False, True])
def test_pages_are_told_when_they_are_written(
    domain: MockDomain, backend: Backend, monkeypatch: pytest.MonkeyPatch, hot: bool
) -> None:
    """A migration that takes the pages between report and write would miss what is written."""
    seen: list[bytes] = []
    monkeypatch.setattr(backend, "mark_dirty", lambda *_: seen.append(domain.read(0x2000, 3)))
    cache = MapCache(backend, bucket_shift=16)
    for _ in range(2 * hot):
        cache.read(0x2000, 1)
    assert (0 in cache._table.generation.writable) == hot
    cache.write(0x2000, b"new")
    assert seen == [b"new"]


CALLS: dict[str, Callable[[MapCache], object]] = {
    "read": lambda cache: cache.read(0x200000, 1),
    "map_dma": lambda cache: cache.map_dma(0x200000, 1, owner="t"),
    "map_dma-crossing": lambda cache: cache.map_dma(0x200000 - 4, 8, owner="t"),
    "map_device": lambda cache: cache.map_device(0x200000, 1, owner="t"),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_cache_that_is_closed_while_it_maps(
    backend: Backend, cache: MapCache, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """What another thread's close() overtakes is refused, and nothing stays mapped or leased."""
    original = backend.map

    def map_and_close(gfn: int, count: int, *, writable: bool) -> Mapping:
        mapping = original(gfn, count, writable=writable)
        cache.close()
        return mapping

    monkeypatch.setattr(backend, "map", map_and_close)
    with pytest.raises(ClosedError, match="this map cache is closed"):
        CALLS[call](cache)
    gc.collect()
    assert (cache.stats().resident_bytes, cache.leases()) == (0, ())


def test_what_is_counted_of_leases(cache: MapCache) -> None:
    """A lease of what had to be mapped is a miss, one of what was there a hit, and only one."""
    for expected in [(0, 1), (1, 1), (2, 1)]:
        cache.map_dma(0x2000, 8, owner="t")
        stats = cache.stats()
        assert (stats.slow_path_hits, stats.misses) == expected


def test_an_access_to_all_that_fits_is_resident(domain: MockDomain, backend: Backend) -> None:
    """A range of just max_resident goes into buckets, which the next access finds."""
    cache = MapCache(backend, bucket_shift=16, max_resident=2 * BUCKET)
    for _ in range(3):
        cache.write(0x200000, bytes(2 * BUCKET))
    assert maps(domain) == 2


def test_a_fault_of_too_much_for_buckets_keeps_no_memory(backend: Backend) -> None:
    """Nor does the traceback of an access that is mapped for this once hold its mapping."""
    cache = MapCache(backend, bucket_shift=16, max_resident=BUCKET)
    gc.disable()
    try:
        with pytest.raises(FaultError) as caught:
            cache.write(HOLE[0] - 4, b"12345678")
        assert cache.stats().resident_bytes == 0
        assert caught.value.address == HOLE[0]
    finally:
        gc.enable()


def test_no_more_is_evicted_than_has_to_be(backend: Backend) -> None:
    """A bucket makes room for a bucket: the cache stays as full as it may be."""
    cache = MapCache(backend, bucket_shift=16, max_resident=4 * BUCKET)
    for address in range(0x800000, 0x1000000, BUCKET):
        cache.read(address, 1)
        assert cache.stats().resident_buckets == min(4, (address - 0x800000) // BUCKET + 1)


def test_a_block_that_ends_well_does_not_hide_its_leases(backend: Backend) -> None:
    """Leaving the with block with a lease held is the error that close() would raise."""
    with pytest.raises(LeaseError, match=r"leases are held \(1\): DMA lease of 'disk0'"):
        with MapCache(backend) as cache:
            lease = cache.map_dma(0x2000, 8, owner="disk0")
    assert not lease.released
    lease.release()
    cache.close()


def test_present_of_a_source_that_knows(
    backend: Backend, cache: MapCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a source lists in pages is cut to the bytes of the range, at both of its ends."""
    monkeypatch.setattr(backend, "present", lambda *_: iter([(0x200, 2), (0x203, 2)]))
    assert list(cache.present(0x200010, 0x3FF0)) == [(0x200010, 0x1FF0), (0x203000, 0x1000)]


def test_present_ends_in_a_hole(domain: MockDomain, cache: MapCache) -> None:
    """A range that ends amid a page which is not there does not have that page's first bytes."""
    domain.balloon_out(0x200000 + 0x1000, 0x1000)
    assert list(cache.present(0x200000, 0x1010)) == [(0x200000, 0x1000)]


def test_a_closed_cache_lists_nothing(
    backend: Backend, cache: MapCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when its source could tell without being read."""
    monkeypatch.setattr(backend, "present", lambda *_: iter([(0x200, 2)]))
    cache.close()
    with pytest.raises(ClosedError, match="this map cache is closed"):
        list(cache.present(0x200000, 0x1000))
