"""What makes room, what stays, and what a full cache says."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import nullcontext

import pytest

from tests.kit import BUCKET, heat
from xenmapcache import (
    Backend,
    CacheFullError,
    DmaDirection,
    Lease,
    MapCache,
    MockDomain,
)


def test_resident_memory_stays_under_max_resident(backend: Backend) -> None:
    """However much is touched, the limit holds, and what was hot is still right."""
    cache = MapCache(backend, bucket_shift=16, max_resident=4 * BUCKET)
    for address in range(0x100000, 16 << 20, BUCKET):
        heat(cache, address)
        cache.write(address, b"hot")
        assert cache.stats().resident_bytes <= 4 * BUCKET
    stats = cache.stats()
    assert stats.evictions == stats.misses - 4
    assert stats.unmaps == stats.evictions


@pytest.mark.parametrize("holes", [False, True])
def test_what_is_used_is_evicted_last(domain: MockDomain, backend: Backend, holes: bool) -> None:
    """A bucket that is read between misses survives a scan of others, with holes and without."""
    if holes:
        domain.balloon_out(0x101000, 0x1000)
    cache = MapCache(backend, bucket_shift=16, max_resident=4 * BUCKET)
    cache.read(0x100000, 1)
    for address in range(0x200000, 0x300000, BUCKET):
        cache.read(address, 1)
        cache.read(0x100000, 1)
    mapped = [call.gfn for call in domain.calls if call.name == "map"]
    assert mapped.count(0x100) == 1


def test_what_is_leased_now_and_then_is_evicted_last(domain: MockDomain, backend: Backend) -> None:
    """A bucket that only transfers use, one after the other, survives a scan of others, too."""
    cache = MapCache(backend, bucket_shift=16, max_resident=4 * BUCKET)
    direction = DmaDirection.TO_DEVICE
    for address in range(0x200000, 0x300000, BUCKET):
        cache.map_dma(0x100000, 1, owner="t", direction=direction).release()
        cache.read(address, 1)
    mapped = [call.gfn for call in domain.calls if call.name == "map"]
    assert mapped.count(0x100) == 1


def test_leased_buckets_are_not_evicted(domain: MockDomain, backend: Backend) -> None:
    """A lease pins its bucket, its last release makes it evictable again, 70,000 holds or one."""
    cache = MapCache(backend, bucket_shift=16, max_resident=2 * BUCKET)
    direction = DmaDirection.TO_DEVICE  # or the log would hold nothing but dirty pages
    leases = [cache.map_dma(0x100000, 64, owner="t", direction=direction) for _ in range(70_000)]
    for address in range(0x200000, 0x280000, BUCKET):
        cache.read(address, 1)
    cache.read(0x100000, 1)
    assert [call.gfn for call in domain.calls if call.name == "map"].count(0x100) == 1
    for lease in leases:
        lease.release()
    for address in range(0x200000, 0x280000, BUCKET):
        cache.read(address, 1)
    cache.read(0x100000, 1)
    assert [call.gfn for call in domain.calls if call.name == "map"].count(0x100) == 2


def test_a_full_cache_says_so(domain: MockDomain, backend: Backend) -> None:
    """When all that is resident is leased or viewed, a miss raises, and a release helps."""
    cache = MapCache(backend, bucket_shift=16, max_resident=2 * BUCKET)
    lease = cache.map_dma(0x100000, 64, owner="t")
    other = cache.map_device(0x200000, BUCKET, owner="vram")
    for call in (
        lambda: cache.read(0x300000, 1),
        lambda: cache.map_device(0x300000, 1, owner="t"),
        lambda: cache.map_dma(0x30FFFF, 2, owner="t"),
    ):
        with pytest.raises(CacheFullError, match="no room for 0x[0-9a-f]+ bytes at 0x30"):
            call()
    view = other.view
    other.release()
    with pytest.raises(CacheFullError, match="in views that are kept"):
        cache.read(0x300000, 1)
    view.release()
    assert cache.read(0x300000, 1) == b"\0"
    lease.release()


def test_garbage_in_a_full_cache(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GIL what is dropped may live on until it is collected, and is before giving up."""
    cache = MapCache(backend, bucket_shift=16, max_resident=BUCKET)
    gc.disable()  # until the end: nothing else is to collect it
    try:
        for free_threaded in (False, True):
            monkeypatch.setattr("xenmapcache.cache.budget.FREE_THREADED", free_threaded)
            garbage: list[object] = [cache.map_dma(0x100000, 64, owner="t")]
            lease = garbage[0]
            assert isinstance(lease, Lease)
            garbage += [lease.view, garbage]
            lease.release()
            del garbage, lease
            with nullcontext() if free_threaded else pytest.raises(CacheFullError):
                cache.read(0x300000, 1)
    finally:
        gc.enable()


def test_a_read_of_any_length_needs_one_bucket(domain: MockDomain, backend: Backend) -> None:
    """A plain read holds one bucket at a time, so that the least max_resident is enough."""
    cache = MapCache(backend, bucket_shift=16, max_resident=BUCKET)
    domain.write(0x300000 - 2, b"over")
    assert cache.read(0x300000 - 2, 4) == b"over"
    assert cache.read(0x200000, 1 << 20)[-2:] == b"ov"


@pytest.mark.parametrize("operation", ["write", "read_into", "map_device"])
def test_what_cannot_be_held_at_once_is_refused(backend: Backend, operation: str) -> None:
    """All-or-nothing needs the whole range resident; a plain read goes through any length."""
    cache = MapCache(backend, bucket_shift=16, max_resident=2 * BUCKET)
    length = 3 * BUCKET
    calls: dict[str, Callable[[], object]] = {
        "write": lambda: cache.write(0x100000, bytes(length)),
        "read_into": lambda: cache.read_into(0x100000, bytearray(length)),
        "map_device": lambda: cache.map_device(0x100000, length, owner="t"),
    }
    with pytest.raises(CacheFullError, match="0x30000 bytes at 0x100000 are more than"):
        calls[operation]()
    assert cache.read(0x100000, length) == bytes(length)
