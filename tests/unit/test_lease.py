"""Leases: bookkeeping, staleness, and what on_stale does about it."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import gc
import logging
import threading
import weakref
from collections.abc import Callable, Iterator

import pytest

from tests.conftest import HOLE
from xenmapcache import (
    Backend,
    ClosedError,
    DmaDirection,
    FaultError,
    Lease,
    LeaseError,
    LeaseKind,
    MapCache,
    Mapping,
    MappingLostError,
    MockDomain,
    UnsupportedOperationError,
    XenCallError,
)
from xenmapcache.backend import Capability
from xenmapcache.binding import libc
from xenmapcache.ledger import Ledger

BUCKET = 1 << 16
AT = 0x200000


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """What was logged as a WARNING so far."""
    with caplog.at_level(logging.INFO, "xenmapcache"):
        yield lambda: [
            record.getMessage() for record in caplog.records if record.levelno == logging.WARNING
        ]


def reballoon(domain: MockDomain, address: int, length: int = 0x1000) -> None:
    """Let the guest give pages up and get new frames for them."""
    domain.balloon_out(address, length)
    domain.balloon_in(address, length)


@pytest.fixture(params=["warn", "raise", "copy"])
def policy(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def connected(domain: MockDomain, backend: Backend, on_stale: str = "warn") -> MapCache:
    cache = MapCache(backend, bucket_shift=16, on_stale=on_stale)  # type: ignore[arg-type] # from parametrize
    domain.on_invalidate(cache.invalidate)
    return cache


# --- what a lease is ---


@pytest.mark.parametrize("address", [AT, AT + 0x123, AT + BUCKET - 7, AT + BUCKET - 0x1001])
@pytest.mark.parametrize("length", [1, 64, 0x1234, 2 * BUCKET + BUCKET // 2])
def test_a_lease_is_the_guests_memory(
    domain: MockDomain, cache: MapCache, address: int, length: int
) -> None:
    """DMA and device leases alias the guest, at any offset and over any edge (QEMU, 2011)."""
    before = domain.read(address - 1, length + 2)
    for take in (cache.map_dma, cache.map_device):
        with take(address, length, owner="t") as lease:
            assert (lease.address, lease.length) == (address, length)
            assert (len(lease.view), lease.view.format, lease.view.readonly) == (length, "B", False)
            lease.view[:] = b"\xab" * length
            assert domain.read(address - 1, length + 2) == b"\0" + b"\xab" * length + b"\0"
            domain.write(address, bytes(length))
            assert bytes(lease.view) == bytes(length)
            assert cache.resolve(lease.host_address) == address
            assert cache.resolve(lease.host_address + length - 1) == address + length - 1
            with pytest.raises(LeaseError, match="lies in no lease"):
                cache.resolve(lease.host_address + length)
    assert domain.read(address - 1, length + 2) == before


def test_what_is_known_of_leases(cache: MapCache) -> None:
    """Leases are listed oldest first, with all that was said of them."""
    thread = threading.Thread(target=lambda: cache.map_device(AT, 64, owner="vga"), name="painter")
    thread.start()
    thread.join()
    cache.map_dma(AT + 1, 2, owner="disk0", direction=DmaDirection.FROM_DEVICE)
    device, dma = cache.leases()
    assert (device.kind, device.address, device.length) == (LeaseKind.DEVICE, AT, 64)
    assert (device.owner, device.direction, device.thread) == ("vga", None, "painter")
    assert (dma.kind, dma.address, dma.length) == (LeaseKind.DMA, AT + 1, 2)
    assert (dma.owner, dma.direction) == ("disk0", DmaDirection.FROM_DEVICE)
    assert dma.id > device.id
    assert min(device.age, dma.age) >= 0  # measured one after the other, under whatever load
    assert not device.stale
    assert device.origin is None
    assert "DEVICE lease of 'vga': address 0x200000, length 0x40, age " in str(device)
    stats = cache.stats()
    assert (stats.device_leases, stats.dma_leases) == (1, 1)


def test_the_stack_is_recorded_when_asked(backend: Backend) -> None:
    """With record_origin, the last line is the caller's own."""
    cache = MapCache(backend, record_origin=True)
    for take in (cache.map_dma, cache.map_device):
        take(AT, 64, owner="t")
        origin = cache.leases()[-1].origin
        assert origin is not None
        assert origin[-1].endswith("in test_the_stack_is_recorded_when_asked")
        assert "test_lease.py" in origin[-1]


def test_directions_decide_what_can_be_written(cache: MapCache) -> None:
    """A TO_DEVICE view, and a device lease that is not writable, are read-only."""
    with cache.map_dma(AT, 8, owner="t", direction=DmaDirection.TO_DEVICE) as lease:
        with pytest.raises(TypeError, match="read-only"):
            lease.view[0] = 1
    with cache.map_device(AT, 8, owner="rom", writable=False) as lease:
        with pytest.raises(TypeError, match="read-only"):
            lease.view[0] = 1
        with cache.map_dma(AT, 8, owner="t") as other:  # both orders (QEMU, 2025)
            other.view[0] = 7
            assert lease.view[0] == 7


def test_a_read_only_source_refuses_to_be_written(domain: MockDomain, backend: Backend) -> None:
    """Without the capability, writing and writable leases say what to ask for instead."""
    backend.capabilities = Capability.NONE
    cache = MapCache(backend)
    assert cache.read(AT, 1) == b"\0"
    for hot in range(2):
        with pytest.raises(UnsupportedOperationError, match="'mock' is read-only"):
            cache.write(AT, b"x" * (1 + hot))
    with pytest.raises(UnsupportedOperationError, match="direction=DmaDirection.TO_DEVICE"):
        cache.map_dma(AT, 1, owner="t")
    with pytest.raises(UnsupportedOperationError, match="writable=False"):
        cache.map_device(AT, 1, owner="t")
    with cache.map_dma(AT, 1, owner="t", direction=DmaDirection.TO_DEVICE) as lease:
        assert lease.view.readonly
        memory = lease.view
        with pytest.raises(TypeError):
            memory[0] = 1
    with pytest.raises(UnsupportedOperationError, match="on_stale='copy' writes"):
        MapCache(backend, on_stale="copy")


# --- release ---


def test_a_lease_is_released_once(cache: MapCache) -> None:
    """The second release, and everything that needs memory, raises LeaseError naming the lease."""
    lease = cache.map_dma(AT, 8, owner="disk0")
    address = lease.host_address
    lease.release()
    assert lease.released
    for call in (lease.release, lambda: lease.view, lambda: lease.host_address):
        with pytest.raises(LeaseError, match="'disk0': address 0x200000.* was released"):
            call()
    with pytest.raises(LeaseError, match=f"{address:#x} lies in no lease"):
        cache.resolve(address)
    with cache.map_dma(AT, 8, owner="t") as other:
        other.release()  # inside the block: leaving it does not release again


def test_a_lease_that_ended_in_time_is_not_stale(cache: MapCache) -> None:
    """What comes after the release is no business of the lease's, nor of its name in a log."""
    lease = cache.map_dma(AT, 8, owner="t")
    lease.release()
    cache.invalidate()
    assert not lease.stale


def test_a_pointer_is_that_of_the_first_byte(cache: MapCache) -> None:
    """Not that of the bucket, or of the mapping, around it."""
    for address in (AT + 5, AT + BUCKET - 3):
        with cache.map_dma(address, 8, owner="t") as lease:
            lease.view[:] = b"by view!"
            assert ctypes.string_at(lease.host_address, 8) == b"by view!"


def test_ended_leases_leave_nothing(backend: Backend) -> None:
    """However many end between two misses, what the cache notes of them does not grow."""
    cache = MapCache(backend, bucket_shift=16, max_resident=2 * BUCKET)
    lease = cache.map_dma(AT, 8, owner="t", direction=DmaDirection.TO_DEVICE)
    for number in range(1, 5):  # a sweep sets the leased bucket aside
        cache.read(AT + number * BUCKET, 1)
    assert cache._buckets[AT // BUCKET].parked
    for _ in range(1000):
        lease.release()
        lease = cache.map_dma(AT, 8, owner="t", direction=DmaDirection.TO_DEVICE)
    assert len(cache._lessor.returned) <= 1


def test_one_of_two_overlapping_leases_ends(cache: MapCache) -> None:
    """Releases go by handle: the other one resolves and lives (QEMU, 2017 and 2024)."""
    first = cache.map_dma(AT, 2 * BUCKET, owner="a")
    second = cache.map_dma(AT, BUCKET, owner="b")
    first.release()
    third = cache.map_dma(AT, BUCKET, owner="c")
    second_address = second.host_address
    assert cache.resolve(second_address) == AT
    second.release()
    third.view[:4] = b"live"
    assert cache.read(AT, 4) == b"live"
    assert cache.resolve(third.host_address + 5) == AT + 5
    third.release()
    assert cache.leases() == ()


def test_exactly_one_of_many_threads_releases(cache: MapCache) -> None:
    """Racing releases: one succeeds, the others raise."""
    for _ in range(50):
        lease = cache.map_dma(AT, 8, owner="t")
        barrier = threading.Barrier(4)
        outcomes: list[str] = []

        def release(lease=lease, barrier=barrier, outcomes=outcomes) -> None:  # type: ignore[no-untyped-def] # noqa: ANN001 - bound now
            barrier.wait()
            try:
                lease.release()
                outcomes.append("released")
            except LeaseError:
                outcomes.append("refused")

        threads = [threading.Thread(target=release) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(outcomes) == ["refused"] * 3 + ["released"]


def test_release_from_asyncio(cache: MapCache) -> None:
    """A lease may be taken and released by coroutines and their executor threads."""

    async def transfer() -> None:
        lease = cache.map_dma(AT, 8, owner="async")
        await asyncio.to_thread(lease.release)
        with cache.map_dma(AT, 8, owner="async"):
            await asyncio.sleep(0)

    asyncio.run(transfer())
    assert cache.leases() == ()


def test_release_from_a_finalizer_under_the_lock(cache: MapCache) -> None:
    """A garbage collection anywhere in the cache may release leases: no deadlock."""

    class Request:
        pass

    request = Request()
    lease = cache.map_dma(AT, 8, owner="t")
    weakref.finalize(request, lease.release)
    with cache._lock:
        del request
        gc.collect()
    assert cache.leases() == ()
    assert cache.read(AT, 1) == b"\0"


def test_a_release_in_a_finalizer_of_another_thread_does_not_wait(cache: MapCache) -> None:
    """Release takes no lock that another thread may hold."""
    lease = cache.map_dma(AT, 8, owner="t")
    with cache._lock:
        thread = threading.Thread(target=lease.release)
        thread.start()
        thread.join(10)
        assert not thread.is_alive()


def test_a_dropped_lease_stays_in_the_books(cache: MapCache) -> None:
    """Who forgets to release is still named."""
    cache.map_dma(AT, 8, owner="forgetful")
    gc.collect()
    assert [info.owner for info in cache.leases()] == ["forgetful"]


def test_release_marks_dirty_what_could_be_written(domain: MockDomain, cache: MapCache) -> None:
    """All pages of the range, before the mapping can go; none for a transfer to the device."""
    cache.map_dma(AT, 0x3000, owner="t", direction=DmaDirection.TO_DEVICE).release()
    assert domain.dirty == set()
    cache.map_dma(AT + 0xFFF, 2, owner="t", direction=DmaDirection.FROM_DEVICE).release()
    assert domain.dirty == {0x200, 0x201}
    domain.dirty.clear()
    cache.map_dma(AT + BUCKET - 1, 2, owner="t").release()
    names = [call.name for call in domain.calls]
    assert names[-2:] == ["mark_dirty", "unmap"]
    assert domain.dirty == {0x20F, 0x210}


def test_leases_under_way_can_be_reported_dirty(domain: MockDomain, cache: MapCache) -> None:
    """A migration need not wait for the releases: all that can be written is reported on demand."""
    cache.map_dma(AT, 8, owner="reads", direction=DmaDirection.TO_DEVICE)
    assert cache.mark_leases_dirty() == 0
    cache.map_dma(AT + 0xFFF, 2, owner="disk0", direction=DmaDirection.FROM_DEVICE)
    cache.map_device(0x800000, 0x2000, owner="vga")
    cache.map_device(0xC0000, 0x2000, owner="rom", writable=False)
    cache.map_dma(AT + 0x8000, 8, owner="done").release()
    for _ in range(2):
        domain.dirty.clear()
        assert cache.mark_leases_dirty() == 2
        assert domain.dirty == {0x200, 0x201, 0x800, 0x801}
    cache.close(force=True)
    with pytest.raises(ClosedError):
        cache.mark_leases_dirty()


def test_a_forced_close_marks_dirty_what_could_be_written(
    domain: MockDomain, cache: MapCache, warnings: Callable[[], list[str]]
) -> None:
    """What a device wrote before its cache was closed by force is not lost to a migration."""
    leases = [cache.map_dma(AT + 0x1000 * n, 8, owner=f"disk{n}") for n in range(3)]
    cache.map_device(0x800000, 8, owner="rom", writable=False)
    domain.arm("mark_dirty", errno=errno.EIO, nth=2)
    cache.close(force=True)
    assert domain.dirty == {0x200, 0x202}
    assert all(lease.released for lease in leases)
    assert next(text for text in warnings() if "'disk1'" in text).startswith(
        "closed by force, dirty pages are not reported: DMA lease of 'disk1': address 0x201000"
    )


def test_a_release_that_fails_can_be_repeated(domain: MockDomain, cache: MapCache) -> None:
    """When the backend cannot note the dirty pages, the lease is still held."""
    lease = cache.map_dma(AT, 8, owner="t")
    domain.arm("mark_dirty", errno=errno.EIO)
    with pytest.raises(XenCallError, match="mock_mark_dirty failed"):
        lease.release()
    assert not lease.released
    assert len(cache.leases()) == 1
    lease.release()
    assert cache.leases() == ()


# --- invalidation and stale DMA ---


def test_the_warning_of_the_seed(
    domain: MockDomain, backend: Backend, warnings: Callable[[], list[str]]
) -> None:
    """One WARNING per DMA lease, with all that is known; none for device leases or in a burst."""
    cache = connected(domain, backend)
    vram = cache.map_device(0x800000, 0x10000, owner="vga")
    cache.map_dma(AT, 0x1000, owner="disk0", direction=DmaDirection.FROM_DEVICE)
    cache.map_dma(AT + BUCKET - 8, 16, owner="nic1", direction=DmaDirection.TO_DEVICE)
    reports = []
    domain.on_invalidate(lambda: reports.append(cache.invalidate()))
    domain.balloon_out(0x400000, 0x100000)
    assert len(reports) == 4  # 256 pages in batches of 84
    first, second = warnings()
    assert first.startswith("invalidation 1: still held, may be lost: DMA lease of 'disk0': ")
    assert "address 0x200000, length 0x1000, direction from-device, age 0." in first
    assert "'nic1': address 0x20fff8, length 0x10, direction to-device" in second
    for report in reports:
        assert [info.owner for info in report.device] == ["vga"]
        assert [info.owner for info in report.dma] == ["disk0", "nic1"]
        assert all(info.stale for info in report.dma)
    assert [report.sequence for report in reports] == [2, 4, 6, 8]
    assert not vram.stale
    vram.view[:3] = b"pix"
    assert domain.read(0x800000, 3) == b"pix"


def test_a_new_lease_after_the_burst_is_warned_of_anew(
    cache: MapCache, warnings: Callable[[], list[str]]
) -> None:
    """Once a lease, not once a cache; and a fresh lease is not stale."""
    for round_ in range(1, 4):
        lease = cache.map_dma(AT, 8, owner="t")
        before = lease.stale
        cache.invalidate()
        cache.invalidate()
        assert (before, lease.stale) == (False, True)
        assert sum("still held" in message for message in warnings()) == round_
        lease.release()


def test_a_view_survives_and_shows_the_orphan(domain: MockDomain, backend: Backend) -> None:
    """After an invalidation a lease's view is alive, and is what the guest gave up."""
    cache = connected(domain, backend)
    lease = cache.map_dma(AT, 0x1000, owner="t")
    lease.view[:3] = b"old"
    reballoon(domain, AT)
    assert bytes(lease.view[:3]) == b"old"
    assert domain.read(AT, 3) == bytes(3)
    assert cache.read(AT, 3) == bytes(3)


def test_stale_dma_that_wrote(
    domain: MockDomain, backend: Backend, policy: str, warnings: Callable[[], list[str]]
) -> None:
    """warn: lost and said; raise: lost and raised; copy: the guest sees it. Counted each time."""
    cache = connected(domain, backend, policy)
    lease = cache.map_dma(AT + 8, 0x1800, owner="disk0", direction=DmaDirection.FROM_DEVICE)
    reballoon(domain, AT)
    reballoon(domain, AT + 0x1000)
    domain.write(AT, b"\x99" * 0x2000)
    lease.view[:] = b"\x42" * 0x1800
    before = warnings()
    domain.dirty.clear()
    if policy == "raise":
        with pytest.raises(LeaseError, match="released stale: DMA lease of 'disk0'.* may be lost"):
            lease.release()
    else:
        lease.release()
    inside = b"\x42" if policy == "copy" else b"\x99"
    assert domain.read(AT, 0x2000) == b"\x99" * 8 + inside * 0x1800 + b"\x99" * 0x7F8
    said = [message for message in warnings() if message not in before]
    assert len(said) == (policy == "warn")
    assert all("released stale: DMA lease of 'disk0'" in message for message in said)
    assert domain.dirty == {0x200, 0x201}
    assert cache.leases() == ()
    assert cache.stats().stale_dma == 1
    assert lease.stale
    assert lease.released


def test_copy_leaves_alone_what_is_still_the_guests(
    domain: MockDomain, backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    """A page that kept its frame is not written back: the guest may be writing it."""
    cache = connected(domain, backend, "copy")
    lease = cache.map_dma(AT, 0x2000, owner="t", direction=DmaDirection.FROM_DEVICE)
    reballoon(domain, AT)
    lease.view[:] = b"\x42" * 0x2000
    with caplog.at_level(logging.INFO, "xenmapcache"):
        lease.release()
    assert caplog.messages[-1].endswith("copied 1 of 2 pages to the guest")
    assert domain.read(AT, 0x2000) == b"\x42" * 0x2000


def test_copy_is_for_what_is_stale(domain: MockDomain, backend: Backend) -> None:
    """A lease that no invalidation has met is released without a call, as under other policies."""
    cache = connected(domain, backend, "copy")
    reballoon(domain, AT)
    for take in (cache.map_dma, cache.map_device):
        lease = take(AT, 8, owner="t")
        before = cache.stats().maps, len(domain.calls)
        lease.view[:] = b"in time!"
        lease.release()
        assert domain.calls[before[1]].name == "mark_dirty"
        assert cache.stats().maps == before[0]


def test_copy_to_a_page_that_is_gone_is_a_fault(domain: MockDomain, backend: Backend) -> None:
    """What can be delivered is; the first that cannot is named; the lease is given back."""
    cache = connected(domain, backend, "copy")
    lease = cache.map_dma(AT + 8, 0x4000 - 8, owner="t")
    lease.view[:] = b"\x42" * (0x4000 - 8)
    reballoon(domain, AT)
    domain.balloon_out(AT + 0x1000, 0x1000)
    reballoon(domain, AT + 0x2000)
    domain.balloon_out(AT + 0x3000, 0x1000)
    with pytest.raises(FaultError, match="no page at 0x201000 ") as caught:
        lease.release()
    assert caught.value.length == 0x3000
    assert lease.released
    assert domain.read(AT, 0x1000) == bytes(8) + b"\x42" * (0x1000 - 8)
    assert domain.read(AT + 0x2000, 0x1000) == b"\x42" * 0x1000


def test_a_device_lease_is_no_stale_dma(
    domain: MockDomain, backend: Backend, warnings: Callable[[], list[str]]
) -> None:
    """Its release after an invalidation is neither refused, nor told of, nor counted."""
    cache = connected(domain, backend, "raise")
    lease = cache.map_device(AT, 0x1000, owner="vga")
    reballoon(domain, 0x900000)
    lease.release()
    assert warnings() == []
    assert cache.stats().stale_dma == 0


def test_copy_that_fails_can_be_repeated(domain: MockDomain, backend: Backend) -> None:
    """When the fresh mapping fails as a whole, nothing is lost: the lease is still held."""
    cache = connected(domain, backend, "copy")
    lease = cache.map_dma(AT, 8, owner="t")
    reballoon(domain, AT)
    lease.view[:] = b"precious"
    domain.arm("map", errno=errno.EIO)
    with pytest.raises(XenCallError):
        lease.release()
    assert not lease.released
    lease.release()
    assert domain.read(AT, 8) == b"precious"
    assert cache.stats().stale_dma == 1


@pytest.mark.parametrize("on_stale", ["warn", "copy"])
def test_stale_dma_that_read(
    domain: MockDomain, backend: Backend, on_stale: str, warnings: Callable[[], list[str]]
) -> None:
    """A transfer to the device writes nothing back, and its report speaks of reading."""
    cache = connected(domain, backend, on_stale)
    lease = cache.map_dma(AT, 8, owner="t", direction=DmaDirection.TO_DEVICE)
    reballoon(domain, AT)
    domain.write(AT, b"guest's!")
    lease.release()
    assert domain.read(AT, 8) == b"guest's!"
    assert domain.dirty == set()
    assert cache.stats().stale_dma == 1
    assert "the device may have read pages that the guest has given up" in warnings()[-1]


# --- replace ---


def test_replace_moves_a_device_lease(domain: MockDomain, cache: MapCache) -> None:
    """Same host address, same views, other guest pages; pointers resolve to the new range."""
    lease = cache.map_device(AT + 0x10, 0x1800, owner="vram")
    view, host = lease.view, lease.host_address
    domain.write(0x900000, b"\x77" * 0x2000)
    cache.replace(AT + 0x10, 0x900010, 0x1800)
    assert (lease.host_address, lease.address) == (host, 0x900010)
    assert bytes(view) == b"\x77" * 0x1800
    view[:3] = b"new"
    assert domain.read(0x900010, 3) == b"new"
    assert domain.read(AT + 0x10, 3) == bytes(3)
    assert cache.resolve(host + 0x1000) == 0x901010
    domain.dirty.clear()
    lease.release()
    assert domain.dirty == {0x900, 0x901}  # and not those of before (QEMU, 2018)


def test_replace_reports_what_it_leaves(domain: MockDomain, cache: MapCache) -> None:
    """What was written to the old range would be missed by a migration. ROMs are not written."""
    lease = cache.map_device(AT + 0x10, 0x1800, owner="vram")
    cache.map_device(AT + 0x4000, 0x1000, owner="rom", writable=False)
    cache.replace(AT + 0x10, 0x900010, 0x1800)
    cache.replace(AT + 0x4000, 0x904000, 0x1000)
    assert domain.dirty == {0x200, 0x201}
    domain.arm("mark_dirty", errno=errno.EIO)
    with pytest.raises(XenCallError, match="mock_mark_dirty failed for domain 1 with EIO"):
        cache.replace(0x900010, AT + 0x10, 0x1800)
    assert (lease.address, lease.stale) == (AT + 0x10, False)


def test_replace_by_a_hole_changes_nothing(domain: MockDomain, cache: MapCache) -> None:
    """The new range must be there; until then the lease shows the old one."""
    lease = cache.map_device(AT, 0x2000, owner="vram")
    lease.view[:3] = b"old"
    with pytest.raises(FaultError, match=f"no page at {HOLE[0]:#x} "):
        cache.replace(AT, HOLE[0] - 0x1000, 0x2000)
    assert bytes(lease.view[:3]) == b"old"
    assert lease.address == AT
    assert not lease.stale


def test_replace_that_loses_the_memory_says_so(domain: MockDomain, cache: MapCache) -> None:
    """When Xen drops the old mapping and fails, views are safe zeros and the lease is stale."""
    lease = cache.map_device(AT, 0x1000, owner="vram")
    lease.view[:3] = b"old"
    domain.arm("remap", errno=errno.ENOMEM)
    with pytest.raises(MappingLostError, match="mock_remap failed for domain 1 with ENOMEM"):
        cache.replace(AT, 0x900000, 0x1000)
    assert bytes(lease.view[:3]) == bytes(3)
    assert lease.stale
    lease.view[:3] = b"off"
    assert domain.read(AT, 3) == b"old"
    lease.release()


def test_a_lost_lease_can_be_replaced_again(domain: MockDomain, cache: MapCache) -> None:
    """When that succeeds it shows the guest again, and is not stale; the model test found that."""
    lease = cache.map_device(AT, 0x1000, owner="vram")
    domain.write(0x900000, b"new")
    domain.arm("remap", errno=errno.ENOMEM)
    with pytest.raises(MappingLostError):
        cache.replace(AT, 0x900000, 0x1000)
    assert lease.stale
    cache.replace(AT, 0x900000, 0x1000)
    assert not cache.leases()[0].stale
    assert bytes(lease.view[:3]) == b"new"
    lease.release()


def test_an_address_that_belongs_to_others_is_not_mapped_over(
    domain: MockDomain, cache: MapCache
) -> None:
    """A lease whose address another thread was given is not replaced: it could only be there."""
    lease = cache.map_device(AT, 0x1000, owner="vram")
    mapping = lease._mapping
    assert mapping is not None
    mapping.abandon()
    with pytest.raises(LeaseError, match="was lost"):
        cache.replace(AT, 0x900000, 0x1000)
    assert not [call for call in domain.calls if call.name == "remap"]
    domain.unmap(mapping.address, mapping.length)


def test_replace_needs_a_device_lease(cache: MapCache) -> None:
    """DMA leases and other ranges are not moved."""
    cache.map_dma(AT, 0x1000, owner="t")
    cache.map_device(AT, 0x2000, owner="t")
    with pytest.raises(LeaseError, match="no device lease covers just 0x200000..0x201000"):
        cache.replace(AT, 0x900000, 0x1000)


# --- views outlive everything ---


def test_a_view_outlives_lease_cache_and_backend(domain: MockDomain, backend: Backend) -> None:
    """A kept view shows the same memory after all else is gone; then it is unmapped, once."""
    cache = MapCache(backend, bucket_shift=16)
    lease = cache.map_dma(AT, 0x1000, owner="t")
    view = lease.view[0x10:0x20]
    view[:4] = b"kept"
    lease.release()
    cache.close()
    backend.close()
    del lease, cache
    gc.collect()
    assert bytes(view[:4]) == b"kept"
    domain.write(AT + 0x10, b"more")
    assert bytes(view[:4]) == b"more"
    assert [call.name for call in domain.calls].count("unmap") == 0
    view.release()
    assert [call.name for call in domain.calls].count("unmap") == 1


def test_leases_of_a_closed_cache(domain: MockDomain, backend: Backend) -> None:
    """A lease dropped by force refuses its view."""
    cache = MapCache(backend)
    lease = cache.map_dma(AT, 8, owner="t")
    cache.close(force=True)
    with pytest.raises(LeaseError, match="was released"):
        _ = lease.view
    with pytest.raises(ClosedError):
        cache.map_dma(AT, 8, owner="t")


def test_views_without_a_gil_are_apart(
    domain: MockDomain, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There each has its own count of slices: CPython loses count of those that threads share."""
    for module in ("mapping", "lease", "buckets"):
        monkeypatch.setattr(f"xenmapcache.{module}.FREE_THREADED", True)
    cache = MapCache(backend, bucket_shift=16)
    for number in range(4):  # hot or not
        cache.write(AT, bytes([number]) * 8)
        assert cache.read(AT, 8) == domain.read(AT, 8) == bytes([number]) * 8
    assert cache.stats().maps == 1
    mapping = cache._buckets[AT >> 16]
    mapping.bytes.release()
    for direction in DmaDirection:
        with cache.map_dma(AT + 2, 4, owner="t", direction=direction) as lease:
            reads = direction is DmaDirection.TO_DEVICE
            lease._view = memoryview(b"view" if reads else bytearray(4))  # others may slice it
            assert bytes(lease.view) == b"\x03" * 4
            assert lease.view.readonly == reads
    with pytest.raises(TypeError):
        backend.map(AT >> 12, 1, writable=False).bytes[0] = 1


def test_a_view_is_the_callers_own(domain: MockDomain, cache: MapCache) -> None:
    """A caller may release the view that it was given; the lease can still be released."""
    lease = cache.map_dma(AT, 8, owner="t")
    with lease.view as view:
        view[:4] = b"mine"
    assert bytes(lease.view[:4]) == b"mine"
    lease.release()
    assert domain.dirty == {0x200}


def test_two_invalidations_at_once_warn_once(
    cache: MapCache, warnings: Callable[[], list[str]]
) -> None:
    """The one that comes second finds the lease warned of when its turn has come."""
    lease = cache.map_dma(AT, 8, owner="t")
    turn = cache._lessor._warning

    @contextlib.contextmanager
    def second() -> Iterator[None]:
        cache._lessor._warning = turn
        cache.invalidate()
        yield

    cache._lessor._warning = second()  # type: ignore[assignment] # for this test alone
    assert [info.id for info in cache.invalidate().dma] == [lease.id]
    assert len(warnings()) == 1


def test_a_lease_taken_during_an_invalidation_belongs_to_the_next(
    cache: MapCache, warnings: Callable[[], list[str]]
) -> None:
    """It is not in the report, is not warned of, and is when the next invalidation comes."""
    survivors = cache._lessor.survivors

    def late(sequence: int) -> object:
        cache.map_dma(AT, 8, owner="late")
        cache._lessor.survivors = survivors  # type: ignore[method-assign] # for this test alone
        return survivors(sequence)

    cache.map_dma(AT, 8, owner="early")
    cache._lessor.survivors = late  # type: ignore[method-assign,assignment] # for this test alone
    assert [info.owner for info in cache.invalidate().dma] == ["early"]
    assert [info.owner for info in cache.invalidate().dma] == ["early", "late"]
    assert sum("'late'" in message for message in warnings()) == 1


class Refusal(logging.Filter):
    """Raises at the first record that it sees."""

    armed = True

    def filter(self, record: logging.LogRecord) -> bool:
        if self.armed:
            self.armed = False
            raise KeyboardInterrupt
        return True


@pytest.fixture
def interrupted() -> Iterator[None]:
    """The next warning is interrupted."""
    refusal = Refusal()
    logger = logging.getLogger("xenmapcache")
    logger.addFilter(refusal)
    yield
    logger.removeFilter(refusal)


@pytest.mark.usefixtures("interrupted")
def test_a_forced_close_that_was_interrupted_goes_on(cache: MapCache) -> None:
    """The second close(force=True) drops what the first did not come to."""
    leases = [cache.map_dma(AT, 8, owner=str(number)) for number in range(3)]
    with pytest.raises(KeyboardInterrupt):
        cache.close(force=True)
    cache.close(force=True)
    assert cache.leases() == ()
    assert all(lease.released for lease in leases)


@pytest.mark.usefixtures("interrupted")
def test_a_stale_release_that_was_interrupted_counts_once(cache: MapCache) -> None:
    """Interrupted at its warning, the release can be repeated, and is counted once."""
    lease = cache.map_dma(AT, 8, owner="t")
    with pytest.raises(KeyboardInterrupt):
        cache.invalidate()
    assert len(cache.invalidate().dma) == 1
    lease.release()
    assert cache.stats().stale_dma == 1


def test_a_copy_is_delivered_once(domain: MockDomain, backend: Backend) -> None:
    """When only the marking fails, the repeated release does not overwrite what came since."""
    cache = connected(domain, backend, "copy")
    lease = cache.map_dma(AT, 4, owner="t")
    reballoon(domain, AT)
    lease.view[:] = b"DMA!"
    domain.arm("mark_dirty", errno=errno.EIO)
    with pytest.raises(XenCallError):
        lease.release()
    assert domain.read(AT, 4) == b"DMA!"
    domain.write(AT, b"NEW!")
    lease.release()
    assert domain.read(AT, 4) == b"NEW!"
    assert domain.dirty == {0x200}


def test_what_a_copy_could_not_reach_is_told_when_the_lease_ends(
    domain: MockDomain, backend: Backend
) -> None:
    """A release that fails in between does not lose the FaultError."""
    cache = connected(domain, backend, "copy")
    lease = cache.map_dma(AT, 4, owner="t")
    domain.balloon_out(AT, 0x1000)
    lease.view[:] = b"DMA!"
    domain.arm("mark_dirty", errno=errno.EIO)
    with pytest.raises(XenCallError):
        lease.release()
    assert not lease.released
    with pytest.raises(FaultError, match="no page at 0x200000 "):
        lease.release()
    assert lease.released


def test_a_release_that_failed_keeps_its_place(domain: MockDomain, cache: MapCache) -> None:
    """Leases are listed oldest first also after one could not be given back; the model found it."""
    leases = [cache.map_dma(AT, 4, owner="t") for _ in range(3)]
    domain.arm("mark_dirty", errno=errno.EIO)
    with pytest.raises(XenCallError):
        leases[0].release()
    assert [info.id for info in cache.leases()] == [lease.id for lease in leases]
    for lease in leases:
        lease.release()


def test_a_replace_that_fails_halfway_is_safe(
    domain: MockDomain, cache: MapCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the kernel runs out of mappings in the middle, views are zeros, and it is said."""
    for page in range(0, 8, 2):  # fragments: one mapping each
        reballoon(domain, 0x900000 + page * 0x1000)
    lease = cache.map_device(AT, 0x8000, owner="vram")
    view = lease.view
    view[:3] = b"old"
    calls = []
    original = libc.map_file

    def limited(*arguments: int, **options: object) -> int:
        calls.append(arguments)
        if len(calls) == 3:
            raise XenCallError("mmap", None, errno.ENOMEM)
        return original(*arguments, **options)  # type: ignore[arg-type] # whatever it takes

    monkeypatch.setattr(libc, "map_file", limited)
    with pytest.raises(MappingLostError, match="ENOMEM"):
        cache.replace(AT, 0x900000, 0x8000)
    assert bytes(view) == bytes(0x8000)
    assert lease.stale
    lease.release()


def test_a_lease_shows_what_became_of_it(domain: MockDomain, backend: Backend) -> None:
    """Its repr says what and whose it is, whether it is stale, and that it was released."""
    cache = connected(domain, backend)
    lease = cache.map_dma(AT, 8, owner="nic")
    assert repr(lease).startswith("<DMA lease of 'nic': address 0x200000, length 0x8")
    reballoon(domain, AT)
    assert repr(lease).startswith("<stale DMA lease of 'nic'")
    lease.release()
    assert repr(lease).startswith("<released DMA lease of 'nic'")


def test_a_source_without_dirty_pages(domain: MockDomain, backend: Backend) -> None:
    """Leases and writes, hot ones too, ask such a backend to mark nothing."""
    backend.capabilities = Capability.WRITE
    cache = MapCache(backend)
    with cache.map_dma(AT, 8, owner="t") as lease:
        lease.view[:] = b"by lease"
    for _ in range(3):
        cache.write(AT + 8, b"by write")
    assert domain.read(AT, 16) == b"by leaseby write"
    assert domain.dirty == set()


@pytest.fixture
def overtaken(cache: MapCache, monkeypatch: pytest.MonkeyPatch) -> Callable[[Lease], None]:
    """A function that lets a lease be released by another thread right after it was looked up."""
    kind = type(cache._lessor.ledger)
    held = kind.held

    def overtake(lease: Lease) -> None:
        def released_since(ledger: Ledger[Lease], only: LeaseKind | None = None) -> list[Lease]:
            found = held(ledger, only)
            if not lease.released:
                lease.release()
            return found

        monkeypatch.setattr(kind, "held", released_since)
        monkeypatch.setattr(kind, "__iter__", lambda ledger: iter(released_since(ledger)))

    return overtake


def test_a_replace_that_a_release_overtakes(
    cache: MapCache, overtaken: Callable[[Lease], None]
) -> None:
    """There is nothing to be moved any more, and the error says why."""
    overtaken(cache.map_device(AT, 0x1000, owner="rom"))
    with pytest.raises(LeaseError, match="'rom'.* was released meanwhile"):
        cache.replace(AT, AT + 0x1000, 0x1000)


def test_a_resolve_that_a_release_overtakes(
    cache: MapCache, overtaken: Callable[[Lease], None]
) -> None:
    """An address of a lease that has just ended is in none; others are found."""
    gone, other = (cache.map_device(AT + n * 0x1000, 0x1000, owner=str(n)) for n in range(2))
    address = gone.host_address
    overtaken(gone)
    with pytest.raises(LeaseError, match="lies in no lease that is held"):
        cache.resolve(address)
    assert cache.resolve(other.host_address + 5) == AT + 0x1005


def test_a_forced_close_that_a_release_overtakes(
    cache: MapCache, overtaken: Callable[[Lease], None], warnings: Callable[[], list[str]]
) -> None:
    """What was given back in time is not warned of."""
    overtaken(cache.map_dma(AT, 8, owner="t"))
    cache.close(force=True)
    assert warnings() == []
    assert cache.leases() == ()


def test_one_replace_at_a_time(
    backend: Backend, cache: MapCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a lease moves no other thread moves it: its address and its memory would differ."""
    cache.map_device(AT, 0x1000, owner="vram")
    original, free = backend.remap, list[bool]()

    def remap(mapping: Mapping, gfn: int) -> None:
        attempt = threading.Thread(
            target=lambda: free.append(cache._replacing.acquire(blocking=False))
        )
        attempt.start()
        attempt.join()
        original(mapping, gfn)

    monkeypatch.setattr(backend, "remap", remap)
    cache.replace(AT, 0x900000, 0x1000)
    assert free == [False]


def test_a_closed_cache_refuses_to_replace_at_once(cache: MapCache) -> None:
    """It does not wait for a thread that replaces, which a forked child would do for ever."""
    cache.close()
    refused = []

    def replace() -> None:
        try:
            cache.replace(0x1000, 0x2000, 8)
        except ClosedError as error:
            refused.append(error)

    with cache._replacing:
        thread = threading.Thread(target=replace)
        thread.start()
        thread.join(10)
        assert len(refused) == 1
    thread.join()


def test_a_copy_is_delivered_anew_after_another_invalidation(
    domain: MockDomain, backend: Backend
) -> None:
    """What was delivered to pages that the guest then gave up is delivered to the next ones."""
    cache = MapCache(backend, bucket_shift=16, on_stale="copy")
    domain.on_invalidate(cache.invalidate)
    lease = cache.map_dma(AT, 4, owner="t")
    lease.view[:] = b"DMA!"
    for _ in range(2):
        domain.balloon_out(AT, 0x1000)
        domain.balloon_in(AT, 0x1000)
        domain.arm("mark_dirty", errno=errno.EIO)
        with pytest.raises(XenCallError):
            lease.release()
        assert domain.read(AT, 4) == b"DMA!"
    lease.release()


def test_stale_dma_that_read_is_refused(domain: MockDomain, backend: Backend) -> None:
    """on_stale="raise" raises for a transfer to the device, too, and gives the lease back."""
    cache = MapCache(backend, bucket_shift=16, on_stale="raise")
    lease = cache.map_dma(AT, 8, owner="t", direction=DmaDirection.TO_DEVICE)
    cache.invalidate()
    with pytest.raises(LeaseError, match="the device may have read pages that the guest has"):
        lease.release()
    assert lease.released


def test_a_copy_is_logged_with_its_pages(
    domain: MockDomain, backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    """How many pages a lease has, and how many of them had to be copied."""
    caplog.set_level(logging.INFO, "xenmapcache")
    cache = MapCache(backend, bucket_shift=16, on_stale="copy")
    domain.on_invalidate(cache.invalidate)
    lease = cache.map_dma(AT, 0x3000, owner="t")
    domain.balloon_out(AT, 0x2000)
    domain.balloon_in(AT, 0x2000)
    lease.view[:] = b"x" * 0x3000
    lease.release()
    assert "copied 2 of 3 pages to the guest" in caplog.text


def test_of_two_equal_device_leases_the_older_is_moved(domain: MockDomain, cache: MapCache) -> None:
    """Also when it was put back behind the younger one, because its release failed."""
    older, younger = (cache.map_device(AT, 0x1000, owner="vram") for _ in range(2))
    domain.arm("mark_dirty", errno=errno.EIO)
    with pytest.raises(XenCallError):
        older.release()
    cache.replace(AT, 0x900000, 0x1000)
    assert (older.address, younger.address) == (0x900000, AT)


def test_a_closed_backend_moves_nothing(backend: Backend, cache: MapCache) -> None:
    """The lease goes on showing what it showed."""
    lease = cache.map_device(AT, 0x1000, owner="vram")
    backend.close()
    with pytest.raises(ClosedError, match="mock backend is closed"):
        cache.replace(AT, 0x900000, 0x1000)
    assert (lease.address, lease.stale) == (AT, False)
