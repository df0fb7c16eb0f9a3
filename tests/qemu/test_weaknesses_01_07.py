"""Weaknesses 1 to 7 of docs/qemu-defects.md: what QEMU's map cache still has, done better."""

from __future__ import annotations

import errno
import gc
import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.conformance.guests import Guest
from tests.conftest import HOLE
from tests.qemu.conftest import fresh
from xenmapcache import (
    DmaDirection,
    FaultError,
    LeaseError,
    MapCache,
    MockDomain,
    XenCallError,
    open_backend,
)
from xenmapcache.address import PAGE_SIZE, MiB
from xenmapcache.mapping import live_mappings

TO_DEVICE = DmaDirection.TO_DEVICE
AT = 0x200000


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_weakness_01_one_range_mapped_with_different_holes(
    domain: MockDomain, connected: MapCache, order: tuple[int, ...]
) -> None:
    """Leases of one range, mapped before and after a neighbouring hole was filled, stay apart.

    QEMU: a release takes the mapping of the other one, and unmaps memory in use.
    """
    domain.write(0, b"the same page")
    wide = (0, HOLE[0])  # just up to the hole
    leases = [connected.map_dma(*wide, owner="before")]
    domain.balloon_in(HOLE[0], PAGE_SIZE)
    connected.read(HOLE[0], 8)  # which maps the bucket again, with one hole less
    leases.append(connected.map_dma(*wide, owner="after"))
    domain.balloon_in(HOLE[0] + PAGE_SIZE, HOLE[1] - PAGE_SIZE)
    connected.read(*HOLE)
    leases.append(connected.map_dma(*wide, owner="filled"))
    assert len({lease.host_address for lease in leases}) == 3
    held = dict(enumerate(leases))
    for ended in order:
        for number, lease in held.items():
            assert connected.resolve(lease.host_address + 5) == 5
            assert bytes(lease.view[:13]) == b"the same page"
            lease.view[0x100 + number] = 0xEE
            assert domain.read(0x100 + number, 1) == b"\xee"
        held.pop(ended).release()
        gc.collect()
        assert [info.owner for info in connected.leases()] == [each.owner for each in held.values()]


def test_weakness_02_no_stale_page_after_an_invalidation(
    domain: MockDomain, connected: MapCache
) -> None:
    """However many mappings overlap a page that went, each read and each new lease is fresh.

    QEMU: an invalidation overlooks chained entries, and a stale page is returned.
    """
    held = [
        connected.map_dma(AT, length, owner=f"{length:#x}")
        for length in (8, MiB, MiB + 8, 2 * MiB)  # buckets, and mappings of their own over an edge
    ]
    held[2].release()  # of those that are gone, too
    for round_ in range(3):
        page = AT + MiB - PAGE_SIZE
        for _ in range(2):
            connected.read(AT, 3 * MiB)  # the second time without a look at anything else
        domain.balloon_out(page, 2 * PAGE_SIZE)
        domain.balloon_in(page, 2 * PAGE_SIZE)
        domain.write(page, bytes([round_ + 1]) * (2 * PAGE_SIZE))
        expected = domain.read(AT, 2 * MiB)
        assert (
            connected.read(page + 5, 2 * PAGE_SIZE - 5)
            == expected[page + 5 - AT :][: 2 * PAGE_SIZE - 5]
        )
        for length in (8, MiB, MiB + 8, 2 * MiB):
            with connected.map_dma(AT, length, owner="new") as lease:
                assert lease.view == expected[:length]
                assert not lease.stale


def test_weakness_03_replace_tells_the_records(guest: Guest, cache: MapCache) -> None:
    """After each move pointers, leases() and the next move know a held lease's new address.

    QEMU: the records of a locked entry keep the old address.
    """
    length, places = 2 * PAGE_SIZE, [guest.address + n * MiB + 0x10 for n in (0, 1, 2)]
    lease = cache.map_device(places[0], length, owner="vga", writable=False)
    view = lease.view[8:]  # held over all moves
    for old, new in itertools.pairwise([*places, places[0]]):
        cache.replace(old, new, length)
        (info,) = cache.leases()
        assert (info.address, info.length) == (new, length)
        assert cache.resolve(lease.host_address + 0x1005) == new + 0x1005
        assert view == fresh(guest, new + 8, length - 8)
        with pytest.raises(LeaseError, match=f"no device lease covers exactly {old:#x}"):
            cache.replace(old, new, length)
    lease.release()


def test_weakness_04_a_view_outlives_its_lock(guest: Guest) -> None:
    """A view that is kept after the release stays readable, whatever other threads do.

    QEMU: a plain pointer is used after the lock is dropped, and a remap pulls it away.
    """
    # Room for the view's bucket, and for the one that each thread reads at a time.
    with MapCache(guest.backend, bucket_shift=16, max_resident=0x30000) as cache:
        with cache.map_dma(guest.address, 0x100, owner="disk", direction=TO_DEVICE) as lease:
            view = lease.view
        expected = fresh(guest, guest.address, 0x100)

        def others() -> None:
            for bucket in range(1, 20):
                cache.read(guest.address + bucket * 0x10000, 8)

        with ThreadPoolExecutor(2) as pool:
            for work in (others, cache.invalidate):  # by eviction, and if not by that
                for done in [pool.submit(work) for _ in range(2)]:
                    done.result()
                gc.collect()
                assert view == expected
        assert cache.read(guest.address, 0x100) == expected


def test_weakness_05_pointers_into_a_lease_resolve(guest: Guest, cache: MapCache) -> None:
    """Every pointer from a lease's first byte to its last leads back, in leases of all forms.

    QEMU: only the exact pointer that was returned is found.
    """
    place = guest.address + MiB - 0x1234
    leases = [
        cache.map_dma(guest.address + 0x77, 0x1234, owner="in a bucket", direction=TO_DEVICE),
        cache.map_dma(place, 0x3000, owner="over an edge", direction=TO_DEVICE),
        cache.map_device(place + 1, 0x3000, owner="device", writable=False),
    ]
    for lease in leases:
        for offset in (*range(0, lease.length, 0x101), lease.length - 1):
            assert cache.resolve(lease.host_address + offset) == lease.address + offset


def test_weakness_06_one_absent_page_fails_only_itself(guest: Guest, cache: MapCache) -> None:
    """The pages before and after an absent page are read and leased; only an access to it fails.

    QEMU: one absent page fails the whole span, and callers do not expect the NULL.
    """
    hole = guest.hole * PAGE_SIZE
    before = hole - 4 * PAGE_SIZE
    assert cache.read(before, 4 * PAGE_SIZE) == fresh(guest, before, 4 * PAGE_SIZE)
    with cache.map_dma(before, 4 * PAGE_SIZE, owner="disk", direction=TO_DEVICE) as lease:
        assert lease.view == fresh(guest, before, 4 * PAGE_SIZE)
    for call in (
        lambda: cache.read(before, 4 * PAGE_SIZE + 1),
        lambda: cache.map_dma(before, 4 * PAGE_SIZE + 1, owner="disk", direction=TO_DEVICE),
        lambda: cache.map_device(before, 4 * PAGE_SIZE + 1, owner="vga", writable=False),
    ):
        with pytest.raises(FaultError, match=f"no page at {hole:#x}: .* the last 0x1 bytes"):
            call()
    assert cache.leases() == ()


def test_weakness_06_a_failed_call_ends_nothing(domain: MockDomain, connected: MapCache) -> None:
    """When a map call fails it is an exception, and what was mapped before goes on.

    QEMU: it ends the process.
    """
    domain.write(AT, b"resident")
    lease = connected.map_dma(AT, 8, owner="disk")
    domain.inject_fault("map", errno=errno.ENOMEM, repeat=True)
    for _ in range(3):
        with pytest.raises(XenCallError, match="ENOMEM"):
            connected.read(AT + MiB, 8)
    assert connected.read(AT, 8) == bytes(lease.view) == b"resident"
    domain.clear_faults()
    assert connected.read(AT + MiB, 8) == bytes(8)


def test_weakness_07_what_is_mapped_has_a_cap() -> None:
    """3,000 buckets that are touched are never more than the 64 that the cap allows.

    QEMU: they are 3,000 mappings, for ever.
    """
    gc.collect()
    idle = live_mappings()
    with (
        open_backend("mock", memory="3000MiB") as backend,
        MapCache(backend, max_resident="64MiB") as cache,
    ):
        for bucket in range(3000):
            cache.read(bucket * MiB, 1)
            assert live_mappings() - idle <= 64
        stats = cache.stats()
        assert (stats.maps, stats.evictions) == (3000, 2936)
        assert stats.resident_bytes == 64 * MiB
    assert live_mappings() == idle
