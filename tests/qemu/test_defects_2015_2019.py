"""Rows 16 to 24 of docs/qemu-defects.md: what was fixed in QEMU's map cache from 2015 to 2019."""

from __future__ import annotations

import errno
import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from random import Random

import pytest

from tests.conformance.guests import LIVE_END, Guest
from tests.fake_xen import DOMID, Behaviour
from tests.fake_xen.fixtures import MakeFake
from tests.qemu.conftest import fresh, made_here, mock_and_live
from xenmapcache import (
    DmaDirection,
    FaultError,
    LeaseError,
    MapCache,
    MappingLostError,
    MockDomain,
    XenCallError,
    open_backend,
)
from xenmapcache.address import PAGE_SIZE, GiB, MiB
from xenmapcache.binding import libc
from xenmapcache.binding.foreignmemory import MAP2
from xenmapcache.mapping import live_mappings

TO_DEVICE = DmaDirection.TO_DEVICE


def test_defect_16_threads_need_no_big_lock(guest: Guest) -> None:
    """Four threads read, lease, resolve, evict and invalidate: each byte is the guest's.

    QEMU, 2015: the cache was only safe under the lock of the whole emulator.
    """
    expected = fresh(guest, guest.address, 3 * MiB)
    rounds = 600 if guest.scratch else 60  # a live guest's machine is emulated
    with MapCache(guest.backend, bucket_shift=16, max_resident=MiB) as cache:

        def work(seed: int) -> None:
            random = Random(seed)
            for number in range(rounds):
                length = random.randrange(1, 2 * PAGE_SIZE)
                offset = random.randrange(3 * MiB - length)
                address = guest.address + offset
                if number % 3:
                    data = cache.read(address, length)
                else:
                    owner = f"thread {seed}"
                    with cache.map_dma(address, length, owner=owner, direction=TO_DEVICE) as lease:
                        data = bytes(lease.view)
                        assert (
                            cache.resolve(lease.host_address + length - 1) == address + length - 1
                        )
                assert data == expected[offset : offset + length]
                if not number % 50:
                    cache.invalidate()

        with ThreadPoolExecutor(4) as pool:
            for done in [pool.submit(work, seed) for seed in range(4)]:
                done.result()
        assert cache.leases() == ()
        assert cache.stats().resident_bytes <= MiB


def test_defect_17_dma_past_the_end_of_memory(guest: Guest, cache: MapCache) -> None:
    """A transfer over the end of RAM is refused with the address where it ends, at any length.

    QEMU, 2015: the length was not clamped to the present pages.
    """
    *_, (address, length) = cache.present(guest.address, LIVE_END * PAGE_SIZE)
    end = address + length
    for reach in (1, PAGE_SIZE, MiB // 2):  # of more than 1 MiB it names a page, not the first
        with pytest.raises(FaultError) as caught:
            cache.map_dma(end - 8, 8 + reach, owner="disk", direction=TO_DEVICE)
        assert (caught.value.address, caught.value.length) == (end, reach)
    for huge in (4 * GiB, 1 << 40, 1 << 60, (1 << 64) - 1):
        maps = cache.stats().maps
        with pytest.raises(FaultError) as caught:
            cache.map_dma(end - 8, huge, owner="disk", direction=TO_DEVICE)
        assert end - 8 < caught.value.address < end - 8 + huge
        assert cache.stats().maps <= maps + 2
    with cache.map_dma(end - 8, 8, owner="disk", direction=TO_DEVICE) as lease:
        assert lease.view == fresh(guest, end - 8, 8)
    assert cache.leases() == ()


def test_defect_18_a_pointer_is_looked_up_beside_what_is_not_mapped(
    guest: Guest, cache: MapCache
) -> None:
    """A pointer leads to its guest address though other blocks are not mapped, or no longer.

    QEMU, 2016: migration looked through all blocks, and one that was not mapped crashed it.
    """
    with pytest.raises(FaultError):
        cache.map_device(guest.hole * PAGE_SIZE, 8, owner="never there")
    gone = cache.map_device(guest.address + PAGE_SIZE, 8, owner="gone")
    lease = cache.map_dma(guest.address + 0x5008, 64, owner="disk", direction=TO_DEVICE)
    old = gone.host_address
    gone.release()
    assert cache.resolve(lease.host_address + 5) == guest.address + 0x500D
    for pointer in (old, 0):
        with pytest.raises(LeaseError, match=f"{pointer:#x} lies in no lease"):
            cache.resolve(pointer)


@mock_and_live
def test_defect_19_reads_leak_no_locks(guest: Guest) -> None:
    """After 10^6 reads (10^4 under emulation) nothing is held, and the bucket gives way.

    QEMU, 2017: each read took a lock that nobody gave back.
    """
    with MapCache(guest.backend, bucket_shift=16, max_resident=0x10000) as cache:
        for _ in range(10**6 if guest.scratch else 10**4):
            cache.read(guest.address, 8)
        stats = cache.stats()
        assert (stats.maps, stats.dma_leases, stats.device_leases) == (1, 0, 0)
        assert cache.leases() == ()
        cache.read(guest.address + MiB, 8)
        assert cache.stats().evictions == 1


def test_defect_20_overlapping_transfers_end_in_any_order(guest: Guest, cache: MapCache) -> None:
    """A of 2 MiB, B of 1 MiB, end A, C of 1 MiB, end B: B has its own address, C lives.

    QEMU, 2017: the release of B looked by address, found another entry and unmapped C.
    """
    at, expected = guest.address, fresh(guest, guest.address, 2 * MiB)
    a = cache.map_dma(at, 2 * MiB, owner="A", direction=TO_DEVICE)
    b = cache.map_dma(at, MiB, owner="B", direction=TO_DEVICE)
    a.release()
    c = cache.map_dma(at, MiB, owner="C", direction=TO_DEVICE)
    assert cache.resolve(b.host_address + 0x1234) == at + 0x1234
    assert b.view == expected[:MiB]
    b.release()
    cache.invalidate()
    gc.collect()
    assert [info.owner for info in cache.leases()] == ["C"]
    assert c.view == expected[:MiB]
    assert cache.resolve(c.host_address + MiB - 1) == at + MiB - 1
    c.release()


# --- row 22 -----------------------------------------------------------------------------

AT, ELSEWHERE = 0x200000, 0x900000
OPERATIONS: dict[str, Callable[[MapCache], object]] = {
    "read": lambda cache: cache.read(AT, 8),
    "read over an edge": lambda cache: cache.read(AT + MiB - 4, 8),
    "write": lambda cache: cache.write(AT, b"8 bytes."),
    "DMA": lambda cache: cache.map_dma(AT, 8, owner="disk").release(),
    "DMA over an edge": lambda cache: cache.map_dma(AT + MiB - 4, 8, owner="disk").release(),
    "device": lambda cache: cache.map_device(AT, 8, owner="vga").release(),
}
FAILING = [
    (name, call, nth)
    for name, calls in {
        "read": ["map"],
        "read over an edge": ["map", "map"],
        "write": ["map", "mark_dirty"],
        "DMA": ["map", "mark_dirty"],
        "DMA over an edge": ["map", "mark_dirty"],
        "device": ["map", "mark_dirty"],
    }.items()
    for call in dict.fromkeys(calls)
    for nth in range(1, calls.count(call) + 1)
]


@pytest.mark.parametrize(("name", "call", "nth"), FAILING)
def test_defect_22_every_failing_call_is_noticed(
    domain: MockDomain, connected: MapCache, name: str, call: str, nth: int
) -> None:
    """Whichever call of an operation fails, it raises with that errno, and works the next time.

    QEMU, 2017: a failed mmap was not noticed, as it was compared with NULL.
    """
    domain.inject_fault(call, errno=errno.EIO, nth=nth)
    with pytest.raises(XenCallError, match=f"mock_{call} failed for domain 1 with EIO") as caught:
        OPERATIONS[name](connected)
    assert caught.value.errno == errno.EIO
    kept = call == "mark_dirty" and name != "write"  # whose release failed is held as before
    assert len(connected.leases()) == kept
    OPERATIONS[name](connected)
    assert len(connected.leases()) == kept


def test_defect_22_every_operation_is_tried_with_all_its_calls(
    domain: MockDomain, connected: MapCache
) -> None:
    """The test above knows of each call that an operation makes, when nothing is mapped yet.

    QEMU, 2017: as there.
    """
    for name, operation in OPERATIONS.items():
        connected.invalidate()
        before = len(domain.calls)
        operation(connected)
        made = [call.name for call in domain.calls[before:] if call.name != "unmap"]
        assert made == [call for failing, call, _ in FAILING if failing == name], name


def test_defect_22_a_failed_mmap_is_an_error(
    connected: MapCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MAP_FAILED, which is not NULL, raises with the errno, and nothing is at that address.

    QEMU, 2017: as above.
    """
    calls = []

    def failing(*arguments: int, result_out: list[int] | None = None) -> tuple[int, int]:
        calls.append(arguments)
        return (1 << 64) - 1, errno.EAGAIN

    monkeypatch.setitem(libc.functions(), "mmap", failing)
    for operation in OPERATIONS.values():
        with pytest.raises(XenCallError, match="mmap failed with EAGAIN"):
            operation(connected)
    assert len(calls) == len(OPERATIONS)
    monkeypatch.undo()
    assert connected.stats().resident_bytes == 0
    assert connected.read(AT, 8) == bytes(8)


def test_defect_22_a_failed_replace_is_noticed(domain: MockDomain, connected: MapCache) -> None:
    """When moving a mapping fails, that is said, and the view shows zeros, not other memory.

    QEMU, 2017: as above.
    """
    lease = connected.map_device(AT, PAGE_SIZE, owner="vga")
    lease.view[:3] = b"old"
    domain.inject_fault("remap", errno=errno.EIO)
    with pytest.raises(MappingLostError, match="mock_remap failed for domain 1 with EIO"):
        connected.replace(AT, ELSEWHERE, PAGE_SIZE)
    assert lease.view == bytes(PAGE_SIZE)
    assert lease.stale
    lease.release()
    assert domain.read(AT, 3) == b"old"


@pytest.mark.parametrize("number", [errno.EFAULT, 0])
def test_defect_22_a_library_that_returns_null(make_fake: MakeFake, number: int) -> None:
    """When Xen's library gives NULL, with an errno or none, every operation raises.

    QEMU, 2017: as above.
    """
    fake = make_fake(pages=2048)
    with (
        open_backend("xen", domid=DOMID, binding="ctypes", library=fake.library) as backend,
        MapCache(backend) as cache,
    ):
        for operation in OPERATIONS.values():
            fake.plan(MAP2, Behaviour.FAIL, number)
            with pytest.raises(XenCallError, match=f"{MAP2} failed for domain {DOMID}"):
                operation(cache)
            operation(cache)
            cache.invalidate()
        vram = cache.map_device(AT, PAGE_SIZE, owner="vga")
        for nth in (1, 2):  # a look at the new pages, then the move
            fake.plan(MAP2, Behaviour.FAIL, number, nth=nth)
            with pytest.raises(XenCallError, match=f"{MAP2} failed for domain {DOMID}"):
                cache.replace(AT, AT + MiB, PAGE_SIZE)
            assert (vram.address, vram.stale) == (AT, False)
        vram.release()


# ----------------------------------------------------------------------------------------


@made_here
def test_defect_23_page_k_of_a_moved_region_is_reported_there(
    guest: Guest, cache: MapCache
) -> None:
    """What is written to page k of video memory that moved is reported at its start + k.

    QEMU, 2018: the pages of the place before the move were marked dirty.
    """
    assert guest.dirty is not None
    old, new, pages = guest.address, guest.address + MiB, 8
    vram = cache.map_device(old, pages * PAGE_SIZE, owner="vga")
    cache.replace(old, new, pages * PAGE_SIZE)
    guest.dirty()
    start = guest.gfn + 256
    for k in range(pages):
        cache.write(new + k * PAGE_SIZE + 8, b"pixel")
        assert guest.dirty() == {start + k}
        cache.map_dma(new + k * PAGE_SIZE, 1, owner="blitter").release()
        assert guest.dirty() == {start + k}
    vram.release()
    assert guest.dirty() == set(range(start, start + pages))


def test_defect_24_a_refused_address_is_an_error_at_once(make_fake: MakeFake) -> None:
    """When the address that was asked for is not honoured, replace raises, and nothing changed.

    QEMU, 2019: the mapping was somewhere else, which showed much later, if at all.
    """
    fake = make_fake(pages=64)
    fake.write(8 * PAGE_SIZE, b"old")
    with (
        open_backend("xen", domid=DOMID, binding="ctypes", library=fake.library) as backend,
        MapCache(backend) as cache,
    ):
        lease = cache.map_device(8 * PAGE_SIZE, PAGE_SIZE, owner="vga")
        gc.collect()  # what other tests left
        host, idle = lease.host_address, live_mappings()
        fake.plan(MAP2, Behaviour.IGNORE, nth=2)  # the first one looks whether all is there
        with pytest.raises(XenCallError, match=f"it ignored the address {host:#x}"):
            cache.replace(8 * PAGE_SIZE, 20 * PAGE_SIZE, PAGE_SIZE)
        assert (lease.address, lease.host_address, lease.stale) == (8 * PAGE_SIZE, host, False)
        assert bytes(lease.view[:3]) == b"old"
        gc.collect()
        assert live_mappings() == idle
        lease.release()
