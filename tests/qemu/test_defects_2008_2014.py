"""Rows 1 to 15 of docs/qemu-defects.md: what was fixed in QEMU's map cache until 2014."""

from __future__ import annotations

import errno
import gc
import resource
from pathlib import Path

import pytest

from tests.conformance.guests import Guest
from tests.fake_xen.child import in_child
from tests.qemu.conftest import fresh, made_here
from xenmapcache import (
    DmaDirection,
    FaultError,
    GuestMemory,
    LeaseKind,
    MapCache,
    XenCallError,
)
from xenmapcache.address import PAGE_SIZE, GiB, MiB
from xenmapcache.mapping import live_mappings

TO_DEVICE = DmaDirection.TO_DEVICE


def test_defect_01_a_failed_lookup_leaves_the_bucket_live(guest: Guest) -> None:
    """A fault in a bucket leaves its other pages mapped: the next access needs no call.

    QEMU, 2008: the access after a failed lookup in the same bucket crashed.
    """
    there, hole = guest.hole * PAGE_SIZE - 8, guest.hole * PAGE_SIZE
    shift = max(20, (there ^ hole).bit_length())  # so large that both lie in one bucket
    if 2 << shift > guest.backend.mapping_room:
        pytest.skip(f"a bucket with memory and a hole would have {1 << shift:#x} bytes here")
    with MapCache(guest.backend, bucket_shift=shift) as cache:
        before = cache.read(there, 8)
        lease = cache.map_dma(there, 8, owner="disk", direction=TO_DEVICE)
        with pytest.raises(FaultError):
            cache.read(hole, 8)
        maps = cache.stats().maps
        assert cache.read(there, 8) == lease.view == before
        assert cache.stats().maps == maps
        lease.release()


def test_defect_02_growth_is_bounded_without_a_limit_on_the_process(guest: Guest) -> None:
    """Mapped memory stays under max_resident, which has a default, whatever the rlimit.

    QEMU, 2011: with an infinite RLIMIT_AS nothing bounded the cache.
    """
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (before[1], before[1]))  # usually infinite
    try:
        assert 0 < MapCache(guest.backend).max_resident <= 32 * GiB
        gc.collect()
        idle = live_mappings()
        with MapCache(guest.backend, bucket_shift=16, max_resident="256KiB") as cache:
            for address in range(guest.address, guest.address + 3 * MiB, 0x10000):
                assert cache.read(address, 8) == fresh(guest, address, 8)
                assert cache.stats().resident_bytes <= 0x40000
                assert live_mappings() - idle <= 4
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_defect_03_locks_balance_after_a_rom_load(guest: Guest, cache: MapCache) -> None:
    """Once a ROM is loaded and given back nothing is held, and nothing of it is mapped.

    QEMU, 2011: loading a ROM left its bucket locked.
    """
    address, length = guest.address + MiB - 0x8000, 0x10000  # over a bucket's edge
    rom = b"\x55\xaa" * (length // 2) if guest.scratch else fresh(guest, address, length)
    with cache.map_device(address, length, owner="option rom") as lease:
        lease.view[:] = rom
        assert [info.kind for info in cache.leases()] == [LeaseKind.DEVICE]
    cache.write(address, rom)  # the other way to load one
    assert fresh(guest, address, length) == rom
    assert cache.leases() == ()
    assert cache.invalidate().dropped_buckets == 2
    assert cache.stats().resident_bytes == 0


def test_defect_04_a_lease_over_edges_is_resolved_and_unmapped_whole(
    guest: Guest, cache: MapCache
) -> None:
    """A lease of 2.5 buckets at an odd offset leads back to its addresses, and goes whole.

    QEMU, 2011: the unmapped length was wrong, and the address led back without its offset.
    """
    address, length = guest.address + 0x123, 2 * MiB + MiB // 2
    lease = cache.map_dma(address, length, owner="disk", direction=TO_DEVICE)
    host = lease.host_address
    for offset in (0, 1, MiB - 0x123, MiB, 2 * MiB, length - 1):
        assert cache.resolve(host + offset) == address + offset
    assert lease.view == fresh(guest, address, length)
    assert mapped(host, length)
    lease.release()
    gc.collect()
    assert not mapped(host & -PAGE_SIZE, length + PAGE_SIZE - 0x123)
    assert cache.stats().resident_bytes == 0


def mapped(address: int, length: int) -> bool:
    """Whether shared memory, as a guest's is, lies in a range of this process."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        place, access, _ = line.split(maxsplit=2)
        first, end = (int(part, 16) for part in place.split("-"))
        if access.endswith("s") and first < address + length and address < end:
            return True
    return False


def test_defect_05_plain_accesses_lock_nothing(guest: Guest) -> None:
    """After reads and writes no bucket is held: each can be evicted for the next.

    QEMU, 2011: plain accesses locked what they touched.
    """
    with MapCache(guest.backend, bucket_shift=16, max_resident=0x10000) as cache:
        for address in (guest.address, guest.address + MiB, guest.address + 2 * MiB):
            data = [cache.read(address, 8) for _ in range(100)]
            cache.write(address, data[-1])
            assert cache.leases() == ()
        assert cache.stats().evictions == 2


def test_defect_06_a_low_limit_on_the_process_is_an_error(guest: Guest) -> None:
    """Under a low RLIMIT_AS a cache is made and filled; what cannot be had is said why.

    QEMU, 2011: the process was killed where RLIMIT_AS was low.
    """

    def limit(room: int) -> None:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (pages * PAGE_SIZE + room, hard))

    def child() -> bool:
        with guest.reopen() as backend:
            expected = backend.map(guest.gfn, 768, writable=False).memory[:]
            limit(8 * MiB)
            with MapCache(backend) as cache:
                held = []
                with pytest.raises(XenCallError, match="ulimit -v") as caught:
                    while True:
                        held.append(cache.map_device(guest.address, 3 * MiB, owner="vga"))
                for lease in held:
                    assert lease.view == expected
                    lease.release()
                del lease, held
                limit(MiB + 0xC0000)  # one bucket, and what Python itself may need
                for offset in range(0, 3 * MiB, MiB):
                    assert cache.read(guest.address + offset, 8) == expected[offset : offset + 8]
                return caught.value.errno == errno.ENOMEM and cache.stats().evictions > 0

    assert in_child(child) == 0


def test_defect_07_a_moved_region_is_mapped_where_it_is_now(guest: Guest, cache: MapCache) -> None:
    """A region that moved shows its new range, resolves there, and can be leased there.

    QEMU, 2012: a region that a guest had moved could not be mapped any more.
    """
    old, new, length = guest.address + 0x10, guest.address + MiB + 0x10, 3 * PAGE_SIZE
    vram = cache.map_device(old, length, owner="vga", writable=False)
    cache.replace(old, new, length)
    assert vram.address == new
    assert vram.view == fresh(guest, new, length)
    assert cache.resolve(vram.host_address + PAGE_SIZE) == new + PAGE_SIZE
    with cache.map_dma(new, length, owner="blitter", direction=TO_DEVICE) as lease:
        assert lease.view == vram.view
    assert cache.read(old, length) == fresh(guest, old, length)  # an ordinary place again
    vram.release()


def test_defect_08_a_section_is_right_past_its_first_bucket(guest: Guest, cache: MapCache) -> None:
    """Far into a range, by reads and by a lease of all of it, are the right pages.

    QEMU, 2012: accesses past a section's first bucket reached other memory.
    """
    with cache.map_device(guest.address, 3 * MiB, owner="ram", writable=False) as lease:
        for offset in (0, MiB - 8, MiB, MiB + 0x5008, 2 * MiB + 0x9008, 3 * MiB - 8):
            expected = fresh(guest, guest.address + offset, 8)
            assert lease.view[offset : offset + 8] == expected
            assert cache.read(guest.address + offset, 8) == expected


def test_defect_09_a_mapping_is_as_long_as_its_access(guest: Guest, cache: MapCache) -> None:
    """A bucket's length from a bucket's last byte on is there to its last byte.

    QEMU, 2012: such a mapping was one bucket long, and too short.
    """
    address = guest.address + MiB - 1
    expected = fresh(guest, address, MiB)
    with cache.map_dma(address, MiB, owner="disk", direction=TO_DEVICE) as lease:
        assert lease.view.nbytes == MiB
        assert lease.view == expected
        assert cache.resolve(lease.host_address + MiB - 1) == address + MiB - 1
    assert cache.read(address, MiB) == expected


def test_defect_10_a_locked_view_survives_an_invalidation(guest: Guest, cache: MapCache) -> None:
    """Leases of both kinds keep their memory across an invalidation, and can be written.

    QEMU, 2012: what was locked was unmapped, and its next use crashed.
    """
    dma = cache.map_dma(guest.address + 8, 16, owner="disk")
    wide = cache.map_dma(guest.address + MiB - 8, 16, owner="disk")
    vram = cache.map_device(guest.address + PAGE_SIZE, 16, owner="vga")
    for _ in range(3):
        cache.invalidate()
    gc.collect()
    for number, lease in enumerate((dma, wide, vram), start=1):
        assert lease.view == fresh(guest, lease.address, 16)
        lease.view[:] = bytes([number]) * 16 if guest.scratch else bytes(lease.view)
        assert lease.view == fresh(guest, lease.address, 16)


def test_defect_11_no_shortcut_remembers_a_dead_pointer(guest: Guest, cache: MapCache) -> None:
    """A plain read after a lease at a nonzero offset has ended is the guest's memory.

    QEMU, 2012: the shortcut to the last hit kept the pointer of a lock that was gone.
    """
    address = guest.address + 0x3008
    cache.map_dma(address, 64, owner="disk", direction=TO_DEVICE).release()
    for text in (b"live, at its offset", b"live after it, too"):
        if guest.write is not None:
            guest.write(address, text)
        for _ in range(3):  # the first that maps, and those that take the shortcut
            assert cache.read(address, 64) == fresh(guest, address, 64)
            assert cache.read(guest.address, 8) == fresh(guest, guest.address, 8)
        maps = cache.stats().maps
        cache.invalidate()
        cache.read(address, 64)
        assert cache.stats().maps == maps + 1  # not by what was remembered


def test_defect_13_an_absent_page_is_not_present(guest: Guest, cache: MapCache) -> None:
    """A missing page is an error that names it; the neighbouring page can be read.

    QEMU, 2013: a page that had failed to map was taken for mapped.
    """
    hole = guest.hole * PAGE_SIZE
    for _ in range(2):
        with pytest.raises(FaultError, match=f"no page at {hole:#x}: ") as caught:
            cache.read(hole, 8)
        assert (caught.value.address, caught.value.length) == (hole, 8)
        assert cache.read(hole - PAGE_SIZE, PAGE_SIZE) == fresh(guest, hole - PAGE_SIZE, PAGE_SIZE)


@pytest.mark.parametrize("edge", [PAGE_SIZE, MiB])
def test_defect_14_eight_bytes_over_an_edge(guest: Guest, cache: MapCache, edge: int) -> None:
    """A number that straddles a page, or a bucket, is read and written whole.

    QEMU, 2014: such an access reached past its mapping; one guest install in ten crashed.
    """
    memory = GuestMemory(cache)
    for before in range(1, 8):
        address = guest.address + edge - before
        expected = fresh(guest, address, 8)
        assert memory.read_u64(address).to_bytes(8, "little") == expected
        value = int.from_bytes(expected, "little") ^ (0xFF << 56 | 0xFF if guest.scratch else 0)
        memory.write_u64(address, value)
        assert fresh(guest, address, 8) == value.to_bytes(8, "little")


@made_here
def test_defect_15_a_write_over_pages_dirties_each(guest: Guest, cache: MapCache) -> None:
    """Every page that a write or a transfer touches is reported, over buckets too.

    QEMU, 2014: only the first page of a write was, so a migration lost the others.
    """
    assert guest.dirty is not None
    last = guest.gfn + 256  # the first page of the next bucket
    for _ in range(2):  # cold, then hot
        cache.write(guest.address + MiB - 2 * PAGE_SIZE - 1, bytes(2 * PAGE_SIZE + 2))
        assert guest.dirty() == {last - 3, last - 2, last - 1, last}
    cache.write(guest.address + PAGE_SIZE - 1, bytes(2 * PAGE_SIZE))
    assert guest.dirty() == {guest.gfn, guest.gfn + 1, guest.gfn + 2}
    cache.map_dma(guest.address + MiB - 1, PAGE_SIZE + 2, owner="disk").release()
    assert guest.dirty() == {last - 1, last, last + 1}
