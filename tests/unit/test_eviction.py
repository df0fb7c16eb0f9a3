"""Eviction where much is leased, which is neither evicted nor looked at again and again."""

from __future__ import annotations

from collections import deque

from tests.conftest import HOLE
from xenmapcache import Backend, DmaDirection, Lease, MapCache, MockDomain
from xenmapcache.address import PAGE_SIZE

BUCKET = 1 << 16
OTHERS = range(0x800000, 0x1000000, BUCKET)


def maps(domain: MockDomain, address: int) -> int:
    """Return how often the bucket that begins at an address was mapped."""
    return [call.gfn for call in domain.calls if call.name == "map"].count(address >> 12)


def read_others(cache: MapCache) -> None:
    for address in OTHERS:
        cache.read(address, 1)


class Clock(deque[int]):
    """A clock that counts how many buckets a sweep looks at."""

    looks = 0

    def __getitem__(self, at: int) -> int:  # type: ignore[override] # a sweep takes no slices
        self.looks += 1
        return super().__getitem__(at)


def test_a_leased_bucket_is_met_by_one_sweep(backend: Backend) -> None:
    """With 100 buckets leased, 124 evictions look at each of them once, not 256 times."""
    cache = MapCache(backend, bucket_shift=16, max_resident=104 * BUCKET)
    leased = range(0x100000, 0x100000 + 100 * BUCKET, BUCKET)
    leases = [cache.map_dma(address, 64, owner="t") for address in leased]
    clock = cache._table.generation.clock.order = Clock(cache._table.generation.clock.order)
    read_others(cache)
    assert cache.stats().evictions == len(OTHERS) - 4
    assert clock.looks <= len(leases) + 2 * len(OTHERS)
    for lease in leases:
        lease.release()
    cache.close()


def test_a_release_between_the_looks_of_a_sweep(domain: MockDomain, backend: Backend) -> None:
    """A last release in another thread, as the sweep sets the bucket aside, loses no bucket."""
    cache = MapCache(backend, bucket_shift=16, max_resident=2 * BUCKET)
    lease = cache.map_dma(0x100000, 64, owner="t")

    class Holders(set[int]):
        """Ends the lease right after it was seen."""

        def __bool__(self) -> bool:
            held = len(self) > 0
            if held and not lease.released:
                lease.release()
            return held

    pin = cache._table.generation.clock.pins[0x100000 >> 16]
    pin.lease_ids = Holders(pin.lease_ids)
    read_others(cache)
    assert lease.released
    assert cache.read(0x100000, 1) == b"\0"
    assert maps(domain, 0x100000) == 2


def test_a_bucket_leased_again_stays(domain: MockDomain, backend: Backend) -> None:
    """Released and leased again before the next sweep, a bucket that was set aside stays."""
    cache = MapCache(backend, bucket_shift=16, max_resident=2 * BUCKET)

    def take() -> Lease:
        return cache.map_dma(0x100000, 64, owner="t", direction=DmaDirection.TO_DEVICE)

    lease = take()
    read_others(cache)
    for _ in range(3):
        lease.release()
        lease = take()
        read_others(cache)
    assert maps(domain, 0x100000) == 1
    lease.release()
    read_others(cache)
    take().release()
    assert maps(domain, 0x100000) == 2


def test_a_bucket_mapped_anew_beside_a_lease_is_evictable(
    domain: MockDomain, backend: Backend
) -> None:
    """A bucket whose hole was filled is evicted, though a lease holds what it was before."""
    start, hole = 0x80000, HOLE[0]
    cache = MapCache(backend, bucket_shift=18, max_resident=3 << 18)
    lease = cache.map_dma(start, 64, owner="t")
    read_others(cache)
    domain.balloon_in(hole, PAGE_SIZE)
    assert cache.read(hole, 1) == b"\0"
    assert maps(domain, start) == 2
    read_others(cache)
    assert cache.read(hole, 1) == b"\0"
    assert maps(domain, start) == 3
    lease.release()


def test_an_invalidation_by_a_signal_handler_amid_a_sweep(backend: Backend) -> None:
    """A handler that runs between two steps of a sweep, and invalidates, breaks nothing."""
    cache = MapCache(backend, bucket_shift=16, max_resident=4 * BUCKET)
    for address in OTHERS[:4]:
        cache.read(address, 1)

    class Interrupted(Clock):
        def __getitem__(self, at: int) -> int:  # type: ignore[override] # as above
            index = super().__getitem__(at)
            if self.looks == 2:
                cache.invalidate()  # what the handler does, in the same thread
            return index

    cache._table.generation.clock.order = Interrupted(cache._table.generation.clock.order)
    read_others(cache)
    assert cache.stats().invalidations == 1
    assert cache.stats().resident_bytes <= 4 * BUCKET


def test_a_bucket_is_swept_once(domain: MockDomain, backend: Backend) -> None:
    """Mapped again because its hole was filled, it stays on the clock once."""
    start, hole = 0x80000, HOLE[0]
    cache = MapCache(backend, bucket_shift=18, max_resident=3 << 18)
    cache.read(start, 1)
    domain.balloon_in(hole, PAGE_SIZE)
    cache.read(hole, 1)
    assert list(cache._table.generation.clock.order) == [start >> 18]


def test_a_lease_of_what_a_bucket_was_before(domain: MockDomain, backend: Backend) -> None:
    """Its end does not put the bucket that took its bucket's place on the clock again."""
    start, hole = 0x80000, HOLE[0]
    cache = MapCache(backend, bucket_shift=18, max_resident=3 << 18)
    lease = cache.map_dma(start, 64, owner="t")
    read_others(cache)
    domain.balloon_in(hole, PAGE_SIZE)
    cache.read(hole, 1)
    lease.release()
    cache.stats()
    assert list(cache._table.generation.clock.order).count(start >> 18) == 1
