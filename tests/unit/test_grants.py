"""Leases and copies of granted pages: over the mock, and over the stand-in for Xen's library."""

from __future__ import annotations

import errno
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.lender import Lender, cache, grants, lender, make_fake, ref_of
from xenmapcache import (
    CacheFullError,
    FaultError,
    GrantError,
    GuestMemory,
    LeaseError,
    MapCache,
    UnsupportedOperationError,
    open_backend,
)
from xenmapcache.address import PAGE_SIZE
from xenmapcache.events import LeaseReleased, LeaseTaken
from xenmapcache.grants import GrantSource, grant_address, is_granted
from xenmapcache.grants.address import parts

__all__ = ["cache", "grants", "lender", "make_fake"]


# --- addresses -----------------------------------------------------------------------------


def test_addresses() -> None:
    """Bit 63 alone says that an address names granted pages."""
    assert grant_address(200, 0x123) == 0x80000000000C8123
    assert [is_granted(each) for each in (0, 1 << 62, 1 << 63, (1 << 64) - 1, 1 << 64, -1)] == [
        False,
        False,
        True,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize("offset", [0, 1, PAGE_SIZE - 1])
@pytest.mark.parametrize("length", [0, 1, PAGE_SIZE - 1, PAGE_SIZE, PAGE_SIZE + 1, 3 * PAGE_SIZE])
def test_parts_stay_in_their_pages(offset: int, length: int) -> None:
    """The parts of a copy are the whole range, in order, and none crosses a page's end."""
    found = [*parts(grant_address(7, offset), length)]
    assert sum(part.length for part in found) == length
    assert [part.ref for part in found] == [*range(7, 7 + len(found))]
    assert all(part.offset + part.length <= PAGE_SIZE for part in found)
    assert [part.offset for part in found[1:]] == [0] * (len(found) - 1)


@pytest.mark.parametrize(
    "use",
    [
        lambda cache, address: cache.map_device(address, 8, owner="vga"),
        lambda cache, address: [*cache.views(address, 8)],
        lambda cache, address: cache.window(address, 8),
    ],
    ids=["map_device", "views", "window"],
)
def test_who_takes_no_grants_says_who_does(
    cache: MapCache, use: Callable[[MapCache, int], object]
) -> None:
    """No page has an address with bit 63, and the message says which calls take it."""
    with pytest.raises(FaultError, match=r"only read, read_into, write and map_dma of MapCache"):
        use(cache, grant_address(8))


# --- leases --------------------------------------------------------------------------------


def test_a_lease_shows_the_pages(lender: Lender, cache: MapCache, grants: GrantSource) -> None:
    """Consecutive references are one mapping, which both sides see, and its end ends the grants."""
    address = lender.lend(3)
    with cache.map_dma(address + 8, 2 * PAGE_SIZE, owner="disk") as lease:
        assert bytes(lease.view[PAGE_SIZE - 8 : PAGE_SIZE - 1]) == b"page 02"
        lease.view[:4] = b"disk"
        assert lender.read(PAGE_SIZE + 8, 4) == b"disk"
        lender.write(3 * PAGE_SIZE, b"now")
        assert bytes(lease.view[2 * PAGE_SIZE - 8 :][:3]) == b"now"
        assert grants.mapped == 3
        assert lender.is_mapped(ref_of(address))
        (info,) = cache.leases()
        assert (info.address, info.length) == (address + 8, 2 * PAGE_SIZE)
        assert cache.resolve(lease.host_address + 5) == address + 13
    assert grants.mapped == 0
    assert not lender.is_mapped(ref_of(address))
    assert cache.leases() == ()
    with pytest.raises(LeaseError, match="was released"):
        _ = lease.view


def test_each_lease_has_a_mapping_of_its_own(
    lender: Lender, cache: MapCache, grants: GrantSource
) -> None:
    """No lease is served from another one's mapping, and none stays in the cache."""
    address = lender.lend()
    with (
        cache.map_dma(address, 16, owner="a") as first,
        cache.map_dma(address, 16, owner="b") as second,
    ):
        assert first.host_address != second.host_address
        assert grants.mapped == 2
    assert cache.stats().resident_bytes == 0
    lender.revoke(ref_of(address))
    with pytest.raises(GrantError):
        cache.map_dma(address, 16, owner="c")


def test_read_only_grants_are_mapped_to_be_read(lender: Lender, cache: MapCache) -> None:
    """TO_DEVICE maps a page that was granted read-only; to write it is refused."""
    address = lender.lend(readonly=True)
    with cache.map_dma(address, 16, owner="disk", direction="to-device") as lease:
        assert lease.view.readonly
        assert bytes(lease.view[:7]) == b"page 01"
        maps = Path("/proc/self/maps").read_text()
        (line,) = [each for each in maps.splitlines() if f"{lease.host_address:x}-" in each]
        assert line.split()[1] == "r--s"
    with pytest.raises(GrantError, match="read-only") as caught:
        cache.map_dma(address, 16, owner="disk", direction="from-device")
    assert (caught.value.domid, caught.value.errno) == (lender.domid, errno.EINVAL)


def test_all_or_none(lender: Lender, cache: MapCache, grants: GrantSource) -> None:
    """If one page is not granted, none is mapped, and the error names domain and references."""
    address = lender.lend(3)
    ref = ref_of(address)
    lender.revoke(ref + 1)
    with pytest.raises(GrantError) as caught:
        cache.map_dma(address, 3 * PAGE_SIZE, owner="disk")
    assert f"for domain {lender.domid} at {address:#x} with EINVAL" in str(caught.value)
    assert (caught.value.address, caught.value.length) == (address, 3 * PAGE_SIZE)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert f"references {ref} to {ref + 2}:" in str(caught.value)
    assert grants.mapped == 0
    assert cache.leases() == ()
    with cache.map_dma(address, PAGE_SIZE, owner="disk"):
        assert lender.is_mapped(ref)


@pytest.mark.parametrize(
    ("address", "length", "kind", "text"),
    [
        (grant_address(1 << 32), 1, FaultError, "no page at 0x8000100000000000"),
        (grant_address((1 << 32) - 1), PAGE_SIZE + 1, FaultError, "no page at 0x8000100000000000"),
        ((1 << 64) - 1, 1, FaultError, "no page at 0xffffffffffffffff"),
        (grant_address(8), 0, FaultError, "length at address"),
        (grant_address(8), 4 * PAGE_SIZE + 1, CacheFullError, "more than max_refs 4"),
        (grant_address(8), 1 << 40, CacheFullError, "more than max_"),
        (grant_address(8), -1, ValueError, "is negative"),
        (1 << 62, 1, FaultError, "no page at"),
    ],
)
def test_what_a_guest_may_choose(
    cache: MapCache, address: int, length: int, kind: type[Exception], text: str
) -> None:
    """Addresses without a page, and lengths beyond all bounds, are refused before a call."""
    with pytest.raises(kind, match=text):
        cache.map_dma(address, length, owner="disk")
    if length:
        with pytest.raises(kind):
            cache.read(address, length)


def test_a_buffer_of_wider_items(lender: Lender, grants: GrantSource) -> None:
    """The bound of a copy counts bytes, whatever the items of the buffer are."""
    words = memoryview(bytes(8 * PAGE_SIZE)).cast("Q")
    with pytest.raises(CacheFullError, match="8 granted pages .* are more than max_refs 4"):
        grants.write(lender.lend(8), words)


def test_how_many_may_be_mapped(lender: Lender, cache: MapCache, grants: GrantSource) -> None:
    """The grants that are mapped at a time are bounded, whichever leases have them."""
    address = lender.lend(4)
    leases = [cache.map_dma(address, 4 * PAGE_SIZE, owner="disk") for _ in range(2)]
    with pytest.raises(CacheFullError, match=r"9 grants would be mapped, and max_mapped is 8"):
        cache.map_dma(address, 1, owner="disk")
    leases.pop().release()
    cache.map_dma(address, 1, owner="disk").release()
    assert grants.mapped == 4


def test_max_lease_bounds_them_too(lender: Lender, grants: GrantSource) -> None:
    """The cache's own bound of a lease's length is valid for granted pages."""
    address = lender.lend(2)
    with (
        MapCache(lender.backend, max_lease=PAGE_SIZE, grants=grants) as cache,
        pytest.raises(CacheFullError, match="max_lease 0x1000"),
    ):
        cache.map_dma(address, PAGE_SIZE + 1, owner="disk")


def test_leases_fill_the_cache_and_grants_go_on(lender: Lender, grants: GrantSource) -> None:
    """Granted pages take no room of max_resident, nor does what is leased hinder them."""
    address = lender.lend(4)
    with MapCache(lender.backend, bucket_shift=12, max_resident=PAGE_SIZE, grants=grants) as cache:
        with cache.map_dma(address, PAGE_SIZE, owner="granted"):
            assert cache.read(0x5000, 1) == b"\0"
            with (
                cache.map_dma(0x6000, 16, owner="dma"),
                cache.map_dma(address, PAGE_SIZE, owner="granted"),
                pytest.raises(CacheFullError),
            ):
                cache.read(0x5000, 1)


def test_an_invalidation_does_not_concern_them(
    lender: Lender, cache: MapCache, caplog: pytest.LogCaptureFixture
) -> None:
    """A lease that is held across INVALIDATE is not stale, and nobody is warned."""
    address = lender.lend()
    with cache.map_dma(address, 16, owner="disk") as lease:
        report = cache.invalidate()
        assert (report.dma, report.device) == ((), ())
        assert not lease.stale
        assert not cache.leases()[0].stale
        assert cache.stats().stale_dma_held == 0
        lease.view[:4] = b"disk"
    assert not lease.stale
    assert cache.stats().stale_dma_released == 0
    assert lender.read(PAGE_SIZE, 4) == b"disk"
    assert caplog.records == []


def test_events_tell_of_them(lender: Lender, cache: MapCache) -> None:
    """Observers hear of a lease of granted pages as of any other."""
    address = lender.lend()
    seen: list[object] = []
    with cache.observe(seen.append):
        cache.map_dma(address, 16, owner="disk", direction="to-device").release()
    taken, released = (each for each in seen if isinstance(each, LeaseTaken | LeaseReleased))
    assert isinstance(taken, LeaseTaken)
    assert (taken.start, taken.kind, taken.owner, taken.stale) == (address, "dma", "disk", False)
    assert isinstance(released, LeaseReleased)
    assert (released.lease, released.stale) == (taken.lease, False)


def test_written_pages_are_not_reported(lender: Lender, cache: MapCache) -> None:
    """Xen itself notes what was written through a grant: there is no frame number to report."""
    address = lender.lend()
    seen: list[object] = []
    with cache.observe(seen.append):
        lease = cache.map_dma(address, 16, owner="disk")
        assert cache.mark_leases_dirty() == 0
        lease.release(written=8)
    assert not [each for each in seen if type(each).__name__ == "PagesDirty"]


def test_scatter_gather_takes_both_kinds(
    lender: Lender, cache: MapCache, grants: GrantSource
) -> None:
    """A list may have granted pages next to guest addresses; an error leaves none mapped."""
    address = lender.lend(2)
    ranges = [(0x8FF8, 16), (address + PAGE_SIZE - 4, 8), (address, 0), (address, 4)]
    with GuestMemory(cache).segments(ranges, owner="disk", direction="from-device") as segments:
        segments[:] = bytes(range(28))
        assert grants.mapped == 3
    assert lender.read(0x8FF8, 16) == bytes(range(16))
    assert lender.read(2 * PAGE_SIZE - 4, 8) == bytes(range(16, 24))
    assert lender.read(PAGE_SIZE, 4) == bytes(range(24, 28))
    bad = [*ranges, (grant_address(100), 1)]
    with (
        pytest.raises(GrantError, match="reference 100:"),
        GuestMemory(cache).segments(bad, owner="disk", direction="from-device"),
    ):
        pass
    assert (grants.mapped, cache.leases()) == (0, ())


def test_options_of_leases(lender: Lender, grants: GrantSource) -> None:
    """strict_views, record_origin and warn_age know leases of granted pages."""
    address = lender.lend()
    with MapCache(
        lender.backend, grants=grants, strict_views=True, record_origin=True, warn_age=1000
    ) as cache:
        lease = cache.map_dma(address, 16, owner="disk")
        assert __file__ in str(cache.leases()[0])
        view = lease.view
        with pytest.raises(LeaseError, match="while views of it are in use"):
            lease.release()
        assert lender.is_mapped(ref_of(address))
        del view
        lease.release()


# --- copies --------------------------------------------------------------------------------


def test_reads_and_writes_are_copies(lender: Lender, cache: MapCache, grants: GrantSource) -> None:
    """Plain accesses of the cache reach granted pages without mapping them, across pages too."""
    address = lender.lend(3)
    memory = GuestMemory(cache)
    assert cache.read(address, 7) == b"page 01"
    assert cache.read(address + PAGE_SIZE - 1, PAGE_SIZE + 8)[1:8] == b"page 02"
    assert cache.read(address, 0) == b""
    cache.write(address + PAGE_SIZE - 2, b"abcd")
    cache.write(address, b"")
    assert lender.read(2 * PAGE_SIZE - 2, 4) == b"abcd"
    buffer = bytearray(4)
    cache.read_into(address + PAGE_SIZE - 2, buffer)
    assert buffer == b"abcd"
    memory.write_u32(address + 16, 0x12345678)
    assert memory.read_u32(address + 16) == 0x12345678
    assert grants.mapped == 0


def test_a_copy_that_is_refused(lender: Lender, cache: MapCache) -> None:
    """The error names domain, reference and address of the first page that Xen refused."""
    address = lender.lend(2)
    readonly = lender.lend(gfn=4, readonly=True)
    ref = ref_of(address) + 1
    lender.revoke(ref)
    with pytest.raises(GrantError) as caught:
        cache.read(address + 8, PAGE_SIZE + 8)
    assert (caught.value.address, caught.value.length) == (address + PAGE_SIZE, 16)
    assert (caught.value.domid, caught.value.errno) == (lender.domid, errno.EINVAL)
    assert f"reference {ref}: the guest has not granted it" in str(caught.value)
    with pytest.raises(GrantError, match="read-only") as caught:
        cache.write(readonly, b"x")
    assert caught.value.errno == errno.EACCES
    assert cache.read(readonly, 7) == b"page 04"


# --- arguments -----------------------------------------------------------------------------


def test_without_grants_nothing_is_there(lender: Lender) -> None:
    """A cache that was given no grants finds no page at such addresses."""
    address = lender.lend()
    with MapCache(lender.backend) as cache:
        for access in (
            lambda: cache.map_dma(address, 16, owner="disk"),
            lambda: cache.read(address, 16),
            lambda: cache.write(address, b"x"),
        ):
            with pytest.raises(FaultError):
                access()


def test_other_methods_find_no_page(lender: Lender, cache: MapCache) -> None:
    """Device leases and windows are for guest addresses, which granted pages do not have."""
    address = lender.lend()
    for access in (
        lambda: cache.map_device(address, 16, owner="disk"),
        lambda: cache.window(address, 16),
        lambda: next(cache.views(address, 16)),
    ):
        with pytest.raises(FaultError):
            access()


def test_wrong_arguments(lender: Lender, cache: MapCache, grants: GrantSource) -> None:
    """Bounds below 1, what is not a source, and what is not a number."""
    with pytest.raises(TypeError, match="grants must be a GrantSource"):
        MapCache(lender.backend, grants=lender)  # type: ignore[arg-type] # wrong on purpose
    for bound in ("max_refs", "max_mapped"):
        with pytest.raises(ValueError, match=f"{bound} must be at least 1, not 0"):
            lender.backend.open_grants(**{bound: 0})
    with pytest.raises(TypeError, match="address must be an int"):
        cache.map_dma("here", 16, owner="disk")  # type: ignore[arg-type] # wrong on purpose
    with pytest.raises(ValueError, match="bit 63 must be set"):
        grants.read(PAGE_SIZE, 1)


def test_a_file_has_no_grants(tmp_path: Path) -> None:
    """Only a guest that runs can grant pages."""
    (tmp_path / "image").write_bytes(bytes(PAGE_SIZE))
    with (
        open_backend("raw", path=tmp_path / "image") as backend,
        pytest.raises(UnsupportedOperationError, match="no running guest that could grant"),
    ):
        backend.open_grants()
