"""Leases: bookkeeping, staleness, and what on_stale does about it."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import gc
import threading
import weakref
from collections.abc import Callable

import pytest

from tests.kit import BUCKET, connected, reballoon
from xenmapcache import (
    Backend,
    ClosedError,
    DmaDirection,
    Lease,
    LeaseError,
    LeaseKind,
    MapCache,
    MockDomain,
    UnsupportedOperationError,
    XenCallError,
)
from xenmapcache.backend import Capability

AT = 0x200000


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
    text = str(device)
    assert text.startswith("DEVICE lease of 'vga': address 0x200000, length 0x40, age ")
    assert text.endswith(" s, thread 'painter'")
    assert str(dma).endswith(f" s, thread {threading.current_thread().name!r}")
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
        assert str(cache.leases()[-1]).endswith(f", taken at {origin[-1]}")
        assert "test_lease.py" in origin[-1]
    with pytest.raises(LeaseError, match=r"(?s)thread '.*', taken at .*; DEVICE lease.*taken at "):
        cache.close()
    cache.close(force=True)


def test_a_lease_names_no_line_that_is_unknown_or_hostile(cache: MapCache) -> None:
    """An empty stack says nothing; what a file's or thread's name contains is escaped."""
    cache.map_dma(AT, 64, owner="t")
    (info,) = cache.leases()
    assert "taken" not in str(info._replace(origin=()))
    hostile = str(info._replace(thread="a\x1b[2J", origin=("\x1b.py:1 in f",)))
    assert hostile.endswith(r"thread 'a\x1b[2J', taken at \x1b.py:1 in f")


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
    assert cache._table.generation.clock.pins[AT // BUCKET].off_clock
    for _ in range(1000):
        lease.release()
        lease = cache.map_dma(AT, 8, owner="t", direction=DmaDirection.TO_DEVICE)
    assert len(cache._table.returned) <= 1
    lease.release()


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
    with cache._budget.lock:
        del request
        gc.collect()
    assert cache.leases() == ()
    assert cache.read(AT, 1) == b"\0"


def test_a_release_in_a_finalizer_of_another_thread_does_not_wait(cache: MapCache) -> None:
    """Release takes no lock that another thread may hold."""
    lease = cache.map_dma(AT, 8, owner="t")
    with cache._budget.lock:
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
    assert domain.dirty_gfns == set()
    cache.map_dma(AT + 0xFFF, 2, owner="t", direction=DmaDirection.FROM_DEVICE).release()
    assert domain.dirty_gfns == {0x200, 0x201}
    domain.dirty_gfns.clear()
    cache.map_dma(AT + BUCKET - 1, 2, owner="t").release()
    names = [call.name for call in domain.calls]
    assert names[-2:] == ["mark_dirty", "unmap"]
    assert domain.dirty_gfns == {0x20F, 0x210}


def test_leases_under_way_can_be_reported_dirty(domain: MockDomain, cache: MapCache) -> None:
    """A migration need not wait for the releases: all that can be written is reported on demand."""
    cache.map_dma(AT, 8, owner="reads", direction=DmaDirection.TO_DEVICE)
    assert cache.mark_leases_dirty() == 0
    cache.map_dma(AT + 0xFFF, 2, owner="disk0", direction=DmaDirection.FROM_DEVICE)
    cache.map_device(0x800000, 0x2000, owner="vga")
    cache.map_device(0xC0000, 0x2000, owner="rom", writable=False)
    cache.map_dma(AT + 0x8000, 8, owner="done").release()
    for _ in range(2):
        domain.dirty_gfns.clear()
        assert cache.mark_leases_dirty() == 2
        assert domain.dirty_gfns == {0x200, 0x201, 0x800, 0x801}
    cache.close(force=True)
    with pytest.raises(ClosedError):
        cache.mark_leases_dirty()


def test_a_forced_close_marks_dirty_what_could_be_written(
    domain: MockDomain, cache: MapCache, warnings: Callable[[], list[str]]
) -> None:
    """What a device wrote before its cache was closed by force is not lost to a migration."""
    leases = [cache.map_dma(AT + 0x1000 * n, 8, owner=f"disk{n}") for n in range(3)]
    cache.map_device(0x800000, 8, owner="rom", writable=False)
    domain.inject_fault("mark_dirty", errno=errno.EIO, nth=2)
    cache.close(force=True)
    assert domain.dirty_gfns == {0x200, 0x202}
    assert all(lease.released for lease in leases)
    assert next(text for text in warnings() if "'disk1'" in text).startswith(
        "closed by force, dirty pages are not reported: DMA lease of 'disk1': address 0x201000"
    )


def test_a_release_that_fails_can_be_repeated(domain: MockDomain, cache: MapCache) -> None:
    """When the backend cannot note the dirty pages, the lease is still held."""
    lease = cache.map_dma(AT, 8, owner="t")
    domain.inject_fault("mark_dirty", errno=errno.EIO)
    with pytest.raises(XenCallError, match="mock_mark_dirty failed"):
        lease.release()
    assert not lease.released
    assert len(cache.leases()) == 1
    lease.release()
    assert cache.leases() == ()


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
    for module in ("mapping", "cache.lease", "cache.buckets"):
        monkeypatch.setattr(f"xenmapcache.{module}.FREE_THREADED", True)
    cache = MapCache(backend, bucket_shift=16)
    for number in range(4):  # hot or not
        cache.write(AT, bytes([number]) * 8)
        assert cache.read(AT, 8) == domain.read(AT, 8) == bytes([number]) * 8
    assert cache.stats().maps == 1
    mapping = cache._table.generation.buckets[AT >> 16]
    mapping.bytes.release()
    for direction in DmaDirection:
        with cache.map_dma(AT + 2, 4, owner="t", direction=direction) as lease:
            reads = direction is DmaDirection.TO_DEVICE
            lease._record.view = memoryview(
                b"view" if reads else bytearray(4)
            )  # others may slice it
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
    assert domain.dirty_gfns == {0x200}


@pytest.mark.usefixtures("interrupted")
def test_a_forced_close_that_was_interrupted_goes_on(cache: MapCache) -> None:
    """The second close(force=True) drops what the first did not come to."""
    leases = [cache.map_dma(AT, 8, owner=str(number)) for number in range(3)]
    with pytest.raises(KeyboardInterrupt):
        cache.close(force=True)
    cache.close(force=True)
    assert cache.leases() == ()
    assert all(lease.released for lease in leases)


def test_a_release_that_failed_keeps_its_place(domain: MockDomain, cache: MapCache) -> None:
    """Leases are listed oldest first also after one could not be given back; the model found it."""
    leases = [cache.map_dma(AT, 4, owner="t") for _ in range(3)]
    domain.inject_fault("mark_dirty", errno=errno.EIO)
    with pytest.raises(XenCallError):
        leases[0].release()
    assert [info.id for info in cache.leases()] == [lease.id for lease in leases]
    for lease in leases:
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
    assert domain.dirty_gfns == set()


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
