"""replace(): a device lease shows other guest pages at the same host address."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable

import pytest

from tests.conftest import HOLE
from tests.kit import reballoon
from xenmapcache import (
    Backend,
    ClosedError,
    FaultError,
    Lease,
    LeaseError,
    MapCache,
    Mapping,
    MappingLostError,
    MockDomain,
    XenCallError,
)
from xenmapcache.binding import libc

AT = 0x200000


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
    domain.dirty_gfns.clear()
    lease.release()
    assert domain.dirty_gfns == {0x900, 0x901}  # and not those of before (QEMU, 2018)


def test_replace_reports_what_it_leaves(domain: MockDomain, cache: MapCache) -> None:
    """What was written to the old range would be missed by a migration. ROMs are not written."""
    lease = cache.map_device(AT + 0x10, 0x1800, owner="vram")
    cache.map_device(AT + 0x4000, 0x1000, owner="rom", writable=False)
    cache.replace(AT + 0x10, 0x900010, 0x1800)
    cache.replace(AT + 0x4000, 0x904000, 0x1000)
    assert domain.dirty_gfns == {0x200, 0x201}
    domain.inject_fault("mark_dirty", errno=errno.EIO)
    with pytest.raises(XenCallError, match="mock_mark_dirty failed for domain 1 with EIO"):
        cache.replace(0x900010, AT + 0x10, 0x1800)
    assert (lease.address, lease.stale) == (AT + 0x10, False)


def test_replace_by_a_hole_changes_nothing(domain: MockDomain, cache: MapCache) -> None:
    """The new range must be there; until then the lease shows the old one."""
    lease = cache.map_device(AT, 0x2000, owner="vram")
    lease.view[:3] = b"old"
    with pytest.raises(FaultError, match=f"no page at {HOLE[0]:#x}: "):
        cache.replace(AT, HOLE[0] - 0x1000, 0x2000)
    assert bytes(lease.view[:3]) == b"old"
    assert lease.address == AT
    assert not lease.stale


def test_replace_that_loses_the_memory_says_so(domain: MockDomain, cache: MapCache) -> None:
    """When Xen drops the old mapping and fails, views are safe zeros and the lease is stale."""
    lease = cache.map_device(AT, 0x1000, owner="vram")
    lease.view[:3] = b"old"
    domain.inject_fault("remap", errno=errno.ENOMEM)
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
    domain.inject_fault("remap", errno=errno.ENOMEM)
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
    mapping = lease._record.mapping
    assert mapping is not None
    mapping.abandon()
    with pytest.raises(LeaseError, match="was lost"):
        cache.replace(AT, 0x900000, 0x1000)
    assert not [call for call in domain.calls if call.name == "remap"]
    libc.munmap(mapping.address, mapping.length)


def test_replace_needs_a_device_lease(cache: MapCache) -> None:
    """DMA leases and other ranges are not moved."""
    cache.map_dma(AT, 0x1000, owner="t")
    cache.map_device(AT, 0x2000, owner="t")
    with pytest.raises(LeaseError, match="no device lease covers exactly 0x200000..0x201000"):
        cache.replace(AT, 0x900000, 0x1000)


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


def test_a_replace_that_a_release_overtakes(
    cache: MapCache, overtaken: Callable[[Lease], None]
) -> None:
    """There is nothing to be moved any more, and the error says why."""
    overtaken(cache.map_device(AT, 0x1000, owner="rom"))
    with pytest.raises(LeaseError, match="'rom'.* was released by another thread"):
        cache.replace(AT, AT + 0x1000, 0x1000)


def test_one_replace_at_a_time(
    backend: Backend, cache: MapCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a lease moves no other thread moves it: its address and its memory would differ."""
    cache.map_device(AT, 0x1000, owner="vram")
    original, free = backend.remap, list[bool]()

    def remap(mapping: Mapping, gfn: int) -> None:
        attempt = threading.Thread(
            target=lambda: free.append(cache._parts.mover._one_at_a_time.acquire(blocking=False))
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

    with cache._parts.mover._one_at_a_time:
        thread = threading.Thread(target=replace)
        thread.start()
        thread.join(10)
        assert len(refused) == 1
    thread.join()


def test_of_two_equal_device_leases_the_older_is_moved(domain: MockDomain, cache: MapCache) -> None:
    """Also if its release has failed before."""
    older, younger = (cache.map_device(AT, 0x1000, owner="vram") for _ in range(2))
    domain.inject_fault("mark_dirty", errno=errno.EIO)
    with pytest.raises(XenCallError):
        older.release()
    cache.replace(AT, 0x900000, 0x1000)
    assert (older.address, younger.address) == (0x900000, AT)


def test_a_closed_backend_moves_nothing(backend: Backend, cache: MapCache) -> None:
    """The lease goes on showing what it showed."""
    lease = cache.map_device(AT, 0x1000, owner="vram")
    backend.close()
    with pytest.raises(ClosedError, match="is closed"):
        cache.replace(AT, 0x900000, 0x1000)
    assert (lease.address, lease.stale) == (AT, False)


@pytest.mark.parametrize("step", ["before", "remap", "mark"])
def test_an_error_of_a_handler_amid_a_move_is_an_interrupt(
    backend: Backend, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """From the remap on the lease counts as lost, and the old page is reported; before, nothing."""
    cache = MapCache(backend, bucket_shift=16)
    lease = cache.map_device(AT, 4096, owner="vga")
    mark = backend.mark_dirty
    remap = backend.remap
    marked: list[int] = []

    def mark_dirty(gfn: int, count: int) -> None:
        if step == "mark" and not marked:
            marked.append(0)
            raise ValueError("the handler's")
        marked.append(gfn)
        mark(gfn, count)

    def remapped(mapping: Mapping, gfn: int) -> None:
        remap(mapping, gfn)
        if step == "remap":
            raise ValueError("the handler's")

    def reserve(*_: object) -> None:
        raise ValueError("the handler's")

    monkeypatch.setattr(cache._parts.mover._dirty, "mark", mark_dirty)
    monkeypatch.setattr(backend, "mark_dirty", mark_dirty)
    monkeypatch.setattr(backend, "remap", remapped)
    if step == "before":
        monkeypatch.setattr(cache._parts.mover._mapper, "reserve", reserve)
    with pytest.raises(ValueError, match="the handler's"):
        cache.replace(AT, AT + 0x10000, 4096)
    assert lease.stale == (step != "before")
    assert (AT >> 12 in marked) == (step != "before")
    lease.release()
    cache.close()
