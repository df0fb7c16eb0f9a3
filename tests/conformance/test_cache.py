"""The cache and what builds on it, over every source of guest memory."""

from __future__ import annotations

import ctypes
import gc
import logging
import re
from collections.abc import Callable

import pytest

from tests.fake_xen.child import in_child
from xenmapcache import (
    CacheFullError,
    Capability,
    ClosedError,
    DmaDirection,
    FaultError,
    GuestMemory,
    LeaseError,
    LeaseKind,
    MapCache,
    UnsupportedOperationError,
)
from xenmapcache.address import PAGE_SIZE, MiB
from xenmapcache.mapping import live_mappings

from .guests import Guest

RANGES = [(0, 1), (PAGE_SIZE - 4, 8), (MiB - 4, 8), (5, MiB), (MiB - 1, MiB + 2), (77, 0)]
TO_DEVICE = DmaDirection.TO_DEVICE


def fill(guest: Guest) -> None:
    """Make the pages of a scratch guest differ."""
    if guest.scratch:
        assert guest.write is not None
        for page in range(guest.pages):
            guest.write(guest.address + page * PAGE_SIZE, page.to_bytes(2, "little") * 2048)


@pytest.mark.parametrize(("offset", "length"), RANGES)
def test_read(guest: Guest, cache: MapCache, offset: int, length: int) -> None:
    """Cold, hot and into a buffer, inside buckets and over their edges: the guest's bytes."""
    fill(guest)
    mapping = guest.backend.map(guest.gfn, guest.pages, writable=False)
    expected = bytes(mapping.view(offset, length))
    for _ in range(3):
        assert cache.read(guest.address + offset, length) == expected
    buffer = bytearray(length)
    cache.read_into(guest.address + offset, buffer)
    assert buffer == expected
    if guest.read is not None:
        assert guest.read(guest.address + offset, length) == expected


@pytest.mark.parametrize(("offset", "length"), RANGES)
def test_write_back(writable: Guest, cache: MapCache, offset: int, length: int) -> None:
    """Writing the present content changes nothing, whatever the range."""
    fill(writable)
    before = cache.read(writable.address + offset, length)
    for _ in range(3):
        cache.write(writable.address + offset, before)
    assert cache.read(writable.address + offset, length) == before


@pytest.mark.parametrize(("offset", "length"), RANGES[:-1])
def test_write(scratch: Guest, cache: MapCache, offset: int, length: int) -> None:
    """The guest sees what is written, cold and hot, and its neighbours stay as they were."""
    assert scratch.read is not None
    address = scratch.address + PAGE_SIZE + offset
    for byte in (b"\x11", b"\x22", b"\x33"):
        cache.write(address, byte * length)
        assert scratch.read(address - 1, length + 2) == b"\0" + byte * length + b"\0"


def test_write_marks_dirty(scratch: Guest, cache: MapCache) -> None:
    """Writes and leases that could be written are reported to a source that wants it."""
    if Capability.DIRTY not in scratch.backend.capabilities:
        pytest.skip(f"the backend {scratch.backend.name!r} keeps no dirty pages")
    assert scratch.dirty is not None
    cache.write(scratch.address + PAGE_SIZE - 1, b"ab")
    assert scratch.dirty() == {scratch.gfn, scratch.gfn + 1}
    cache.map_dma(scratch.address, 1, owner="disk", direction=TO_DEVICE).release()
    assert scratch.dirty() == set()
    cache.map_dma(scratch.address + 5 * PAGE_SIZE, 1, owner="disk").release()
    assert scratch.dirty() == {scratch.gfn + 5}


ACCESSES: dict[str, Callable[[MapCache, int, int], object]] = {
    "read": lambda cache, address, length: cache.read(address, length),
    "read_into": lambda cache, address, length: cache.read_into(address, bytearray(length)),
    "write": lambda cache, address, length: cache.write(address, bytes(length)),
    "map_dma": lambda cache, address, length: cache.map_dma(
        address, length, owner="t", direction=TO_DEVICE
    ),
    "map_device": lambda cache, address, length: cache.map_device(
        address, length, owner="t", writable=False
    ),
}


def accesses(guest: Guest) -> list[Callable[[MapCache, int, int], object]]:
    """Return the accesses that a guest allows."""
    writes = Capability.WRITE in guest.backend.capabilities
    return [access for name, access in ACCESSES.items() if writes or name != "write"]


@pytest.mark.parametrize("name", ACCESSES)
@pytest.mark.parametrize("reach", [-3, 0, 5])
def test_access_to_a_hole(guest: Guest, cache: MapCache, name: str, reach: int) -> None:
    """Every access that meets a hole raises, naming where, and leaves nothing behind."""
    if name == "write" and Capability.WRITE not in guest.backend.capabilities:
        pytest.skip(f"the backend {guest.backend.name!r} is read-only")
    hole = guest.hole * PAGE_SIZE
    address = hole + reach
    if name == "write" and reach < 0 and not guest.scratch:
        address = hole  # should the write begin, it must not be in a live guest
    for _ in range(2):
        with pytest.raises(FaultError) as caught:
            ACCESSES[name](cache, address, 8)
        bad = max(hole, address)
        assert (caught.value.address, caught.value.length) == (bad, address + 8 - bad)
    assert cache.leases() == ()


def test_all_or_nothing(scratch: Guest, cache: MapCache) -> None:
    """A write or read that would meet a hole changes neither the guest nor the buffer."""
    assert scratch.read is not None
    assert scratch.write is not None
    address = scratch.hole * PAGE_SIZE - 2 * PAGE_SIZE
    scratch.write(address, b"guest" + bytes(2 * PAGE_SIZE - 5))
    buffer = bytearray(b"\x55") * (3 * PAGE_SIZE)
    with pytest.raises(FaultError):
        cache.write(address, b"\xff" * (3 * PAGE_SIZE))
    with pytest.raises(FaultError):
        cache.read_into(address, buffer)
    assert scratch.read(address, 2 * PAGE_SIZE) == b"guest" + bytes(2 * PAGE_SIZE - 5)
    assert buffer == b"\x55" * (3 * PAGE_SIZE)
    assert cache.read(address, 5) == b"guest"


def test_device_lease(guest: Guest, cache: MapCache) -> None:
    """It has a page-exact mapping of its own, is registered until it is released, and once."""
    address, length = guest.address + 100, 2 * PAGE_SIZE
    before = cache.stats().resident_bytes
    lease = cache.map_device(address, length, owner="vga", writable=False)
    assert cache.stats().resident_bytes - before == 3 * PAGE_SIZE
    assert cache.stats().resident_buckets == 0
    assert lease.view == cache.read(address, length)
    assert lease.view.readonly
    (info,) = cache.leases()
    assert (info.kind, info.address, info.length, info.owner, info.stale) == (
        LeaseKind.DEVICE,
        address,
        length,
        "vga",
        False,
    )
    lease.release()
    assert cache.leases() == ()
    with pytest.raises(LeaseError):
        lease.release()


@pytest.mark.parametrize(("offset", "own"), [(0x100, False), (MiB - 0x800, True)])
def test_dma_lease(writable: Guest, cache: MapCache, offset: int, own: bool) -> None:
    """Inside a bucket it shares the bucket's mapping; over an edge it has one of its own."""
    fill(writable)
    address, length = writable.address + offset, PAGE_SIZE
    expected = cache.read(address, length)
    maps = cache.stats().maps
    with cache.map_dma(address, length, owner="disk") as lease:
        assert cache.stats().maps - maps == own
        assert lease.view == expected
        lease.view[:] = expected
        if writable.scratch:
            lease.view[7] = 0xEE
            assert cache.read(address + 7, 1) == b"\xee"
    assert lease.released
    with pytest.raises(LeaseError):
        _ = lease.view


def test_resolve(guest: Guest, cache: MapCache) -> None:
    """Any host address in a lease leads back to its guest address, and one byte out to none."""
    address = guest.address + MiB - 0x300
    with (
        cache.map_dma(address, 0x600, owner="disk", direction=TO_DEVICE) as dma,
        cache.map_device(guest.address, 0x10, owner="rom", writable=False) as device,
    ):
        for lease in (dma, device):
            for offset in (0, 1, lease.length - 1):
                assert cache.resolve(lease.host_address + offset) == lease.address + offset
            with pytest.raises(LeaseError):
                cache.resolve(lease.host_address + lease.length)
        host = dma.host_address
    with pytest.raises(LeaseError):
        cache.resolve(host)


def test_host_address(guest: Guest, cache: MapCache) -> None:
    """What a pointer reads there is what the guest has there."""
    with cache.map_dma(guest.address + 33, 64, owner="disk", direction=TO_DEVICE) as lease:
        # SAFETY: the lease is held.
        assert ctypes.string_at(lease.host_address, 64) == cache.read(guest.address + 33, 64)


def test_invalidate(guest: Guest, cache: MapCache, caplog: pytest.LogCaptureFixture) -> None:
    """Buckets are dropped and mapped again; leases stay, apart by kind; DMA is warned of once."""
    before = cache.read(guest.address, 2 * MiB)
    device = cache.map_device(guest.address, 16, owner="vga", writable=False)
    dma = cache.map_dma(guest.address, 16, owner="disk", direction=TO_DEVICE)
    misses = cache.stats().misses
    first, second = cache.invalidate(), cache.invalidate()
    assert (first.sequence, first.dropped_buckets, first.dropped_bytes) == (1, 2, 2 * MiB)
    assert (second.sequence, second.dropped_buckets) == (2, 0)
    assert [info.owner for info in first.device] == ["vga"]
    assert [info.owner for info in first.dma] == ["disk"]
    assert (device.stale, dma.stale) == (False, True)
    assert bytes(device.view) == bytes(dma.view) == before[:16]
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "'disk'" in warnings[0].getMessage()
    assert cache.read(guest.address, 2 * MiB) == before
    assert cache.stats().misses == misses + 2
    dma.release()
    device.release()
    assert cache.stats().stale_dma_released == 1


def test_invalidation_unmaps(guest: Guest, cache: MapCache) -> None:
    """Mappings that nobody sees go with the invalidation; a view that is kept stays readable."""
    gc.collect()
    idle = live_mappings()
    lease = cache.map_dma(guest.address + MiB, 16, owner="disk", direction=TO_DEVICE)
    cache.read(guest.address, 16)
    view = lease.view
    lease.release()
    before = bytes(view)
    assert live_mappings() == idle + 2
    cache.invalidate()
    assert live_mappings() == idle + 1
    assert view == before
    del view
    assert live_mappings() == idle


def test_replace(guest: Guest, cache: MapCache) -> None:
    """A device lease moves at its host address; where that cannot be, it stays as it was."""
    fill(guest)
    old, new, length = guest.address, guest.address + MiB, 2 * PAGE_SIZE
    lease = cache.map_device(old, length, owner="vga", writable=False)
    host, view = lease.host_address, lease.view
    if Capability.REMAP not in guest.backend.capabilities:
        with pytest.raises(UnsupportedOperationError):
            cache.replace(old, new, length)
        new = old
    else:
        cache.replace(old, new, length)
    assert (lease.address, lease.host_address) == (new, host)
    assert view == cache.read(new, length)
    assert cache.resolve(host + 5) == new + 5
    lease.release()


def test_eviction(guest: Guest) -> None:
    """Mapped memory stays under max_resident while more than that is read, again and again."""
    gc.collect()
    idle = live_mappings()
    limit = 4 * 65536
    with MapCache(guest.backend, bucket_shift=16, max_resident=limit) as cache:
        for _ in range(2):
            for address in range(guest.address, guest.address + guest.pages * PAGE_SIZE, 65536):
                cache.read(address, 8)
                assert cache.stats().resident_bytes <= limit
                assert live_mappings() - idle <= 4
        assert cache.stats().evictions > 0
    assert live_mappings() == idle


def test_leases_are_not_evicted(guest: Guest) -> None:
    """Where everything resident is leased, there is no room, and every lease keeps its memory."""
    with MapCache(guest.backend, bucket_shift=16, max_resident=2 * 65536) as cache:
        leases = [
            cache.map_dma(guest.address + index * 65536, 8, owner="disk", direction=TO_DEVICE)
            for index in range(2)
        ]
        before = [bytes(lease.view) for lease in leases]
        with pytest.raises(CacheFullError, match="max_resident"):
            cache.read(guest.address + 2 * 65536, 8)
        assert [bytes(lease.view) for lease in leases] == before
        leases[0].release()
        assert len(cache.read(guest.address + 2 * 65536, 8)) == 8
        leases[1].release()


@pytest.mark.parametrize("offset", [0, MiB])
def test_closed_cache(guest: Guest, cache: MapCache, offset: int) -> None:
    """After close every access is refused, of buckets that were resident too; views stay."""
    lease = cache.map_dma(guest.address, 16, owner="disk", direction=TO_DEVICE)
    view, before = lease.view, bytes(lease.view)
    with pytest.raises(LeaseError, match="'disk'"):
        cache.close()
    lease.release()
    cache.close()
    cache.close()
    for access in accesses(guest):
        with pytest.raises(ClosedError):
            access(cache, guest.address + offset, 8)
    with pytest.raises(ClosedError):
        cache.invalidate()
    assert view == before


def test_closed_backend(guest: Guest) -> None:
    """Over a closed backend what is resident is served; what would have to be mapped is refused."""
    backend = guest.reopen()
    with MapCache(backend) as cache:
        before = cache.read(guest.address, 8)
        backend.close()
        assert cache.read(guest.address, 8) == before
        with pytest.raises(ClosedError):
            cache.read(guest.address + MiB, 8)


def test_forked_child(guest: Guest, cache: MapCache) -> None:
    """A child's cache is closed, views taken before show zeros, and a release does nothing."""
    lease = cache.map_dma(guest.address, 64, owner="disk", direction=TO_DEVICE)
    view, before = lease.view, cache.read(guest.address, 64)

    def child() -> bool:
        refused = 0
        for access in accesses(guest):
            try:
                access(cache, guest.address, 8)
            except ClosedError:
                refused += 1
        try:
            lease.view  # noqa: B018 - the access is what is refused
        except ClosedError:
            refused += 1
        lease.release()
        cache.close()
        return refused == len(accesses(guest)) + 1 and view == bytes(64)

    assert in_child(child) == 0
    assert view == before == cache.read(guest.address, 64)
    lease.release()


# --- GuestMemory ------------------------------------------------------------------------


def test_numbers(guest: Guest, cache: MapCache) -> None:
    """Numbers are little-endian, over page and bucket edges too."""
    fill(guest)
    memory = GuestMemory(cache)
    for offset in (0, PAGE_SIZE - 3, MiB - 5):
        address = guest.address + offset
        expected = cache.read(address, 8)
        assert memory.read_u8(address) == expected[0]
        assert memory.read_u16(address).to_bytes(2, "little") == expected[:2]
        assert memory.read_u32(address).to_bytes(4, "little") == expected[:4]
        assert memory.read_u64(address).to_bytes(8, "little") == expected


def test_read_cstring(scratch: Guest, cache: MapCache) -> None:
    """A string may cross a bucket's edge and end just before a hole; one without an end may not."""
    assert scratch.write is not None
    memory = GuestMemory(cache)
    hole = scratch.hole * PAGE_SIZE
    scratch.write(scratch.address + MiB - 3, b"over the edge\0not this")
    scratch.write(hole - 5, b"last\0")
    assert memory.read_cstring(scratch.address + MiB - 3) == b"over the edge"
    assert memory.read_cstring(hole - 5) == b"last"
    scratch.write(hole - 5, b"last!")
    with pytest.raises(FaultError) as caught:
        memory.read_cstring(hole - 5)
    assert caught.value.address == hole


def test_find(guest: Guest, cache: MapCache) -> None:
    """It finds just what Python finds in the same bytes, over bucket edges too."""
    fill(guest)
    length = guest.pages * PAGE_SIZE
    whole = cache.read(guest.address, length)
    pattern = whole[MiB - 24 : MiB + 24]
    expected = [
        (guest.address + match.start(), match[0])
        for match in re.finditer(re.escape(pattern), whole, re.DOTALL)
    ]
    assert expected
    assert list(GuestMemory(cache).find(pattern, guest.address, length)) == expected


def test_find_passes_over_holes(scratch: Guest, cache: MapCache) -> None:
    """Matches on both sides of a hole are found, and none that would reach over it."""
    assert scratch.write is not None
    span = scratch.holes["middle"]
    start = span.gfn * PAGE_SIZE
    before, after = start + span.first * PAGE_SIZE, start + span.end * PAGE_SIZE
    scratch.write(before - 9, b"needle")
    scratch.write(before - 3, b"nee")
    scratch.write(after, b"dleneedle")
    found = GuestMemory(cache).find(b"needle", start, span.pages * PAGE_SIZE)
    assert list(found) == [(before - 9, b"needle"), (after + 3, b"needle")]


def test_structure(writable: Guest, cache: MapCache) -> None:
    """A structure over guest memory shows its bytes, and on a scratch guest changes them."""

    class Header(ctypes.LittleEndianStructure):
        _fields_ = (("magic", ctypes.c_uint32), ("size", ctypes.c_uint64))

    fill(writable)
    address = writable.address + 0x2008
    expected = cache.read(address, 16)
    with GuestMemory(cache).structure(address, Header) as header:
        assert bytes(header) == expected
        if writable.scratch:
            header.size = 0x1122334455667788
            assert GuestMemory(cache).read_u64(address + 8) == 0x1122334455667788
    assert cache.leases() == ()


def test_segments(guest: Guest, cache: MapCache) -> None:
    """A scatter-gather list is mapped whole; one with a hole in it is not mapped at all."""
    memory = GuestMemory(cache)
    ranges = [(guest.address + 5, 7), (guest.address + MiB - 2, 4), (guest.address, PAGE_SIZE)]
    with memory.segments(ranges, direction=TO_DEVICE) as segments:
        assert [bytes(view) for view in segments.views] == [cache.read(*each) for each in ranges]
        assert len(cache.leases()) == 3
    with pytest.raises(FaultError):
        memory.segments([*ranges, (guest.hole * PAGE_SIZE, 1)], direction=TO_DEVICE).__enter__()
    assert cache.leases() == ()
