"""Rows 25 to 33 of docs/qemu-defects.md: what was fixed in QEMU's map cache since 2021."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import itertools
import mmap
import threading
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.conformance.guests import Guest
from tests.effort import RACES
from tests.fake_xen.child import in_child
from tests.qemu.conftest import LIVE, fresh, lines_of, mock_and_live
from xenmapcache import CacheFullError, DmaDirection, LeaseError, LeaseKind, MapCache
from xenmapcache.address import PAGE_SIZE, MiB
from xenmapcache.cache.lease import Lease
from xenmapcache.mapping import live_mappings

TO_DEVICE = DmaDirection.TO_DEVICE


@pytest.mark.slow
def test_defect_25_nobody_steals_the_address_during_replace(guest: Guest) -> None:
    """While threads map and unmap as much as they can, a lease moves without losing its address.

    QEMU, 2021: it unmapped before it mapped again, and another thread got the address between.
    """
    rounds = RACES * (20 if guest.scratch else 10)
    length = 4 * PAGE_SIZE
    here, there = guest.address, guest.address + MiB

    def child() -> bool:  # a process of its own: a stolen address can end one
        done = threading.Event()
        spoiled = []

        def hammer(byte: bytes) -> None:
            own: deque[mmap.mmap] = deque()
            while not done.is_set():
                own.append(mmap.mmap(-1, length))
                own[-1][:] = byte * length
                if len(own) == 3:
                    with own.popleft() as oldest:
                        if oldest[:] != byte * length:
                            spoiled.append(byte)

        with guest.reopen() as backend, MapCache(backend) as cache:
            lease = cache.map_device(here, length, owner="vga", writable=False)
            view, host = lease.view, lease.host_address
            expected = {address: cache.read(address, length) for address in (here, there)}
            threads = [threading.Thread(target=hammer, args=(byte,)) for byte in (b"\xa5", b"\x5a")]
            for thread in threads:
                thread.start()
            try:
                for old, new in itertools.islice(
                    itertools.cycle([(here, there), (there, here)]), rounds
                ):
                    cache.replace(old, new, length)
                    assert view == expected[new]
                    assert lease.host_address == host
            finally:
                done.set()
                for thread in threads:
                    thread.join()
            lease.release()
        return not spoiled

    assert in_child(child) == 0


@pytest.mark.parametrize(
    ("guest", "holds"),
    [
        *itertools.product(["mock"], [256, 257, 70_000]),
        *(pytest.param(*LIVE.values, holds, marks=LIVE.marks) for holds in (256, 257)),
    ],
    indirect=["guest"],
)
def test_defect_26_many_holds_on_one_bucket(guest: Guest, holds: int) -> None:
    """A bucket that is held very often is kept until the last hold has ended, and no longer.

    QEMU, 2022: the counter of locks had 8 bits; the 256th lock made it 0.
    """
    with MapCache(guest.backend, bucket_shift=16, max_resident=0x10000) as cache:
        leases = [
            cache.map_dma(guest.address + number % 0x10000, 1, owner="disk", direction=TO_DEVICE)
            for number in range(holds)
        ]
        assert cache.stats().maps == 1
        last = leases.pop()
        with pytest.raises(CacheFullError):
            cache.read(guest.address + MiB, 1)
        for lease in leases:
            lease.release()
        with pytest.raises(CacheFullError):
            cache.read(guest.address + MiB, 1)
        assert last.view == fresh(guest, last.address, 1)
        last.release()
        assert cache.read(guest.address + MiB, 1) == fresh(guest, guest.address + MiB, 1)


def test_defect_27_a_foreign_pointer_is_an_error(guest: Guest, cache: MapCache) -> None:
    """A pointer that lies in no lease raises LeaseError, which names it; it is not address 0.

    QEMU, 2023: it aborted, or took the pointer for guest address 0.
    """
    lease = cache.map_dma(guest.address + 8, 64, owner="disk", direction=TO_DEVICE)
    own = ctypes.create_string_buffer(8)
    host = lease.host_address
    foreign = [0, ctypes.addressof(own), host - 1, host + 64, -1, (1 << 64) - 1]
    for pointer in foreign:
        with pytest.raises(LeaseError, match=f"host address {pointer:#x} lies in no lease"):
            cache.resolve(pointer)
    with pytest.raises(TypeError, match="host_address must be an int"):
        cache.resolve(None)  # type: ignore[arg-type] # that is the point
    lease.release()
    with pytest.raises(LeaseError):
        cache.resolve(host)


class Request:
    """Something that ends with the last reference to it."""


def from_a_coroutine(lease: Lease, cache: MapCache) -> None:
    async def transfer() -> None:
        await asyncio.sleep(0)
        lease.release()

    asyncio.run(transfer())


def from_a_thread_of_a_coroutine(lease: Lease, cache: MapCache) -> None:
    async def transfer() -> None:
        await asyncio.to_thread(lease.release)

    asyncio.run(transfer())


def from_a_thread_while_the_cache_is_locked(lease: Lease, cache: MapCache) -> None:
    with cache._budget.lock:
        thread = threading.Thread(target=lease.release)
        thread.start()
        thread.join(20)
        assert not thread.is_alive()


def from_a_finalizer_while_the_cache_is_locked(lease: Lease, cache: MapCache) -> None:
    request = Request()
    weakref.finalize(request, lease.release)
    with cache._budget.lock:
        del request
        gc.collect()


@pytest.mark.parametrize(
    "release",
    [
        from_a_coroutine,
        from_a_thread_of_a_coroutine,
        from_a_thread_while_the_cache_is_locked,
        from_a_finalizer_while_the_cache_is_locked,
    ],
    ids=lambda release: release.__name__,
)
def test_defect_28_a_release_from_anywhere(
    guest: Guest, cache: MapCache, release: Callable[[Lease, MapCache], None]
) -> None:
    """A lease may be released in a coroutine, in any thread and in a finalizer, without waiting.

    QEMU, 2024: a release in an asynchronous context failed an assertion.
    """
    lease = cache.map_dma(guest.address, 64, owner="disk", direction=TO_DEVICE)
    release(lease, cache)
    assert lease.released
    assert cache.leases() == ()
    assert cache.read(guest.address, 8) == fresh(guest, guest.address, 8)


def test_defect_29_the_last_release_lets_go(guest: Guest) -> None:
    """A bucket can be evicted after its last release, not before; what was mapped for one goes.

    QEMU, 2024: some mappings were kept for ever, though nobody held them.
    """
    with MapCache(guest.backend, bucket_shift=16, max_resident=0x20000) as cache:
        wide = cache.map_dma(guest.address + MiB - 8, 16, owner="wide", direction=TO_DEVICE)
        assert cache.stats().resident_bytes == 2 * PAGE_SIZE
        wide.release()
        assert cache.stats().resident_bytes == 0
        first, last = (
            cache.map_dma(guest.address, 16, owner="disk", direction=TO_DEVICE) for _ in range(2)
        )
        first.release()
        for bucket in range(1, 5):
            cache.read(guest.address + bucket * 0x10000, 8)
        maps = cache.stats().maps
        assert last.view == cache.read(guest.address, 16)
        assert cache.stats().maps == maps  # all the others went, one by one
        last.release()
        for bucket in range(1, 5):
            cache.read(guest.address + bucket * 0x10000, 8)
        maps = cache.stats().maps
        cache.read(guest.address, 8)
        assert cache.stats().maps == maps + 1


@pytest.mark.parametrize("order", list(itertools.permutations("ABC")), ids="".join)
def test_defect_30_one_of_overlapping_leases_ends(
    guest: Guest, cache: MapCache, order: tuple[str, ...]
) -> None:
    """Whichever of three overlapping leases ends, the others resolve and show their memory.

    QEMU, 2024: the fix before lost the rest of the chain that the released entry was in.
    """
    expected = fresh(guest, guest.address, 2 * MiB)
    lengths = {"A": 2 * MiB, "B": MiB, "C": PAGE_SIZE}
    leases = {
        owner: cache.map_dma(guest.address, length, owner=owner, direction=TO_DEVICE)
        for owner, length in lengths.items()
    }
    for ended in order:
        leases.pop(ended).release()
        gc.collect()
        assert [info.owner for info in cache.leases()] == list(leases)
        for lease in leases.values():
            assert cache.resolve(lease.host_address + 0x123) == guest.address + 0x123
            assert lease.view == expected[: lease.length]


@mock_and_live
def test_defect_31_invalidations_of_an_empty_cache_do_nothing(
    guest: Guest, cache: MapCache
) -> None:
    """10^5 of them make no call, and the last does as little as the first: no table is walked.

    QEMU, 2025: each INVALIDATE walked a table that was empty; a boot took 50 s, not 8.
    """
    work = lines_of(cache.invalidate)
    assert work < 50
    cache.read(guest.address, 3 * MiB)
    cache.map_dma(guest.address, 8, owner="disk", direction=TO_DEVICE).release()
    assert cache.invalidate().dropped_buckets == 3
    gc.collect()  # what other tests left
    maps, alive = cache.stats().maps, live_mappings()
    for _ in range(10**5):
        cache.invalidate()
    assert lines_of(cache.invalidate) == work
    stats = cache.stats()
    assert (stats.maps, stats.invalidations, live_mappings()) == (maps, 10**5 + 3, alive)


def test_defect_32_a_bucket_is_mapped_once_and_released_once(guest: Guest, cache: MapCache) -> None:
    """However many ask at once, a bucket is mapped once; a second release is refused, not counted.

    QEMU, 2025: a valid bucket was mapped a second time, and its count of locks went below 0.
    """
    barrier = threading.Barrier(4)

    def work(number: int) -> Lease:
        barrier.wait()
        cache.read(guest.address + number * PAGE_SIZE, 8)
        return cache.map_dma(
            guest.address + number * PAGE_SIZE, MiB // 2, owner="disk", direction=TO_DEVICE
        )

    with ThreadPoolExecutor(4) as pool:
        first, *others = pool.map(work, range(4))
    data = cache.read(guest.address, MiB)
    cache.write(guest.address, data)
    assert cache.stats().maps == 1
    first.release()
    with pytest.raises(LeaseError, match="was released before"):
        first.release()
    for lease in others[1:]:
        lease.release()
    assert [info.kind for info in cache.leases()] == [LeaseKind.DMA]
    assert others[0].view == fresh(guest, others[0].address, MiB // 2)
    assert not cache._table.evict(MiB)  # the lease that is left still counts
    others[0].release()
    assert cache._table.evict(MiB)


@pytest.mark.parametrize("read_only_first", [True, False])
@pytest.mark.parametrize("kind", [LeaseKind.DEVICE, LeaseKind.DMA])
def test_defect_33_read_only_and_writable_side_by_side(
    guest: Guest, cache: MapCache, kind: LeaseKind, read_only_first: bool
) -> None:
    """A read-only and a writable lease of one range, in both orders: each is what it says.

    QEMU, 2025: a write went through a mapping that had been made read-only before.
    """

    def take(writable: bool) -> Lease:
        if kind is LeaseKind.DEVICE:
            return cache.map_device(guest.address, 64, owner="rom", writable=writable)
        direction = DmaDirection.FROM_DEVICE if writable else TO_DEVICE
        return cache.map_dma(guest.address, 64, owner="disk", direction=direction)

    first, second = take(not read_only_first), take(read_only_first)
    read_only, writable = (first, second) if read_only_first else (second, first)
    assert (read_only.view.readonly, writable.view.readonly) == (True, False)
    with pytest.raises(TypeError, match="read-only"):
        read_only.view[:1] = b"x"
    writable.view[:8] = b"written." if guest.scratch else bytes(writable.view[:8])
    assert read_only.view == writable.view == fresh(guest, guest.address, 64)
    first.release()
    second.release()
