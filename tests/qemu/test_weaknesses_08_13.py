"""Weaknesses 8 to 13 of docs/qemu-defects.md: what QEMU's map cache still has, done better."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.conformance.guests import Guest
from tests.conftest import HOLE
from tests.qemu.conftest import lines_of, mock_and_live
from xenmapcache import (
    Capability,
    DmaDirection,
    FaultError,
    LeaseError,
    MapCache,
    Mapping,
    MockDomain,
    MockHypervisor,
    open_backend,
)
from xenmapcache.address import PAGE_SIZE, MiB
from xenmapcache.backends.mock import MockBackend
from xenmapcache.cache import OnStale
from xenmapcache.mapping import live_mappings

TO_DEVICE = DmaDirection.TO_DEVICE
AT = 0x200000


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What was logged as a WARNING so far."""
    return lambda: [
        record.getMessage() for record in caplog.records if record.levelno == logging.WARNING
    ]


def test_weakness_08_a_page_stays_mapped_between_transfers(guest: Guest, cache: MapCache) -> None:
    """1,000 transfers with one page are one mapping.

    QEMU: since the fix of row 29 each is a mapping of its own.
    """
    for _ in range(1000):
        cache.map_dma(guest.address, PAGE_SIZE, owner="disk", direction=TO_DEVICE).release()
    assert cache.stats().maps == 1


def test_weakness_09_a_retry_costs_one_call_and_its_neighbours_none(
    guest: Guest, cache: MapCache
) -> None:
    """An absent page is tried again when it is asked for, and counted; its neighbours are hits.

    QEMU: the same, but the retry takes the bucket's mapping away. That there is a retry is meant:
    Xen does not tell when a page comes back, so only a call can find out.
    """
    hole, before = guest.hole * PAGE_SIZE, guest.hole * PAGE_SIZE - PAGE_SIZE
    with pytest.raises(FaultError):
        cache.read(hole, 8)
    lease = cache.map_dma(before, 8, owner="disk", direction=TO_DEVICE)
    gc.collect()  # what other tests left
    maps, alive = cache.stats().maps, live_mappings()
    for attempt in range(1, 11):
        with pytest.raises(FaultError):
            cache.read(hole, 8)
        assert cache.read(before, 8) == lease.view
        assert cache.stats().maps == maps + attempt
        assert cache.stats().hole_faults == 1 + attempt
    assert live_mappings() == alive
    list(cache.present(before, 2 * PAGE_SIZE))  # a look at the present pages tries nothing
    assert cache.stats().maps == maps + 10
    lease.release()


def test_weakness_09_a_page_that_comes_back_is_found(
    domain: MockDomain, connected: MapCache
) -> None:
    """The next access after a page was ballooned in has it, without an INVALIDATE.

    QEMU: the same.
    """
    with pytest.raises(FaultError):
        connected.read(HOLE[0], 8)
    domain.balloon_in(HOLE[0], PAGE_SIZE)
    domain.write(HOLE[0], b"is back.")
    assert connected.read(HOLE[0], 8) == b"is back."
    assert domain.invalidations == 0


# --- weakness 10 ------------------------------------------------------------------------


@mock_and_live
def test_weakness_10_a_release_looks_through_nothing(guest: Guest, cache: MapCache) -> None:
    """To take and release a lease is as little work with 1,000 others as with none.

    QEMU: each unmap goes through all locked records, twice. Here only resolve() does, once.
    """

    def transfer() -> None:
        cache.map_dma(guest.address, 8, owner="disk", direction=TO_DEVICE).release()

    for _ in range(2):  # the second also counts what the first has left
        transfer()
    alone = lines_of(transfer)
    held = [
        cache.map_dma(guest.address + number, 8, owner="other", direction=TO_DEVICE)
        for number in range(1000)
    ]
    transfer()
    assert lines_of(transfer) == alone
    for lease in held:
        lease.release()


class SlowBackend(MockBackend):
    """Its map calls wait until they may go on."""

    entered = threading.Event()
    proceed = threading.Event()

    def map(self, gfn: int, count: int, *, writable: bool) -> Mapping:
        self.entered.set()
        assert self.proceed.wait(30)
        return super().map(gfn, count, writable=writable)


def test_weakness_10_no_lock_is_held_across_a_map_call() -> None:
    """While one thread waits for Xen to map, others read, lease, resolve, release, invalidate.

    QEMU: one lock is held across the call, and everybody waits.
    """
    domain = MockHypervisor().create_domain(memory="16M")
    backend = SlowBackend(domain=domain)
    with MapCache(backend) as cache, ThreadPoolExecutor(2) as pool:

        def others() -> bytes:
            with cache.map_dma(8, 8, owner="disk") as lease:
                assert cache.resolve(lease.host_address) == 8
            data = cache.read(0, 8)
            cache.invalidate()
            return data

        backend.proceed.set()
        cache.read(0, 8)
        backend.entered.clear()
        backend.proceed.clear()
        slow = pool.submit(cache.read, AT, 8)
        try:
            assert backend.entered.wait(30)
            assert pool.submit(others).result(20) == bytes(8)
            assert not slow.done()
        finally:
            backend.proceed.set()
        assert slow.result(30) == bytes(8)


# ----------------------------------------------------------------------------------------


def test_weakness_11_the_warning_names_the_transfer_once(
    guest: Guest, cache: MapCache, warnings: Callable[[], list[str]]
) -> None:
    """Owner, address, length, direction and age, once for each transfer in 200 invalidations.

    QEMU: a trace event without owner or address, at each INVALIDATE of a burst (Qubes 3651).
    """
    cache.map_device(guest.address, 16, owner="vga", writable=False)
    cache.map_dma(guest.address + 0x10, 0x200, owner="ide0", direction=TO_DEVICE)
    cache.map_dma(guest.address + MiB - 8, 0x5EA, owner="e1000")
    for _ in range(200):
        report = cache.invalidate()
        assert [info.owner for info in report.dma] == ["ide0", "e1000"]
        assert [info.owner for info in report.device] == ["vga"]
    assert len(warnings()) == 2
    for warning, owner, address, length, direction in zip(
        warnings(),
        ("ide0", "e1000"),
        (guest.address + 0x10, guest.address + MiB - 8),
        (0x200, 0x5EA),
        ("to-device", "bidirectional"),
        strict=True,
    ):
        assert warning.startswith(
            f"invalidation 1: still held, may be lost: DMA lease of '{owner}': address "
            f"{address:#x}, length {length:#x}, direction {direction}, age "
        )


@pytest.mark.parametrize("on_stale", ["warn", "raise", "copy"])
def test_weakness_12_dma_into_an_orphan_is_told_or_delivered(
    domain: MockDomain, warnings: Callable[[], list[str]], on_stale: OnStale
) -> None:
    """A transfer over an INVALIDATE is stale; what it wrote is reported, refused or copied.

    QEMU: its mapping is kept without a word, and the data land in a page that nobody has.
    """
    with (
        open_backend("mock", domain=domain) as backend,
        MapCache(backend, on_stale=on_stale) as cache,
    ):
        domain.on_invalidate(cache.invalidate)
        lease = cache.map_dma(AT, 8, owner="disk", direction=DmaDirection.FROM_DEVICE)
        domain.balloon_out(AT, PAGE_SIZE)
        domain.balloon_in(AT, PAGE_SIZE)
        assert [info.stale for info in cache.leases()] == [True]
        lease.view[:] = b"from it."
        assert domain.read(AT, 8) == bytes(8)  # into the orphan
        if on_stale == "raise":
            with pytest.raises(LeaseError, match="what the device wrote may be lost"):
                lease.release()
        else:
            lease.release()
        assert domain.read(AT, 8) == (b"from it." if on_stale == "copy" else bytes(8))
        assert cache.stats().stale_dma_released == 1
    assert len(warnings()) == (2 if on_stale == "warn" else 1)


def test_weakness_13_transfers_under_way_can_be_reported(guest: Guest, cache: MapCache) -> None:
    """A migration can ask at any moment for the pages that transfers under way may write.

    QEMU: dirty logging sees a transfer only when it is released.
    """
    cache.map_dma(guest.address, 8, owner="reads", direction=TO_DEVICE)
    leases = [
        cache.map_dma(guest.address + MiB - 8, 16, owner="over an edge"),
        cache.map_dma(guest.address + 0x5000, 1, owner="writes"),
    ]
    tracked = Capability.DIRTY in guest.backend.capabilities
    assert cache.mark_leases_dirty() == (len(leases) if tracked else 0)
    if guest.dirty is not None:
        assert guest.dirty() == {guest.gfn + 255, guest.gfn + 256, guest.gfn + 5}
    assert not any(lease.released for lease in leases)
