"""Windows over every source of guest memory."""

from __future__ import annotations

import errno
import gc
import hashlib

import pytest

from xenmapcache import CacheFullError, FaultError, LeaseKind, MapCache
from xenmapcache.address import PAGE_SIZE, MiB
from xenmapcache.mapping import live_mappings

from .guests import Guest
from .test_cache import fill


@pytest.mark.parametrize(
    ("offset", "length"), [(0, 3 * MiB), (PAGE_SIZE - 4, 8), (5, MiB), (MiB - 1, MiB + 2)]
)
def test_a_window_shows_what_a_read_returns(
    guest: Guest, cache: MapCache, offset: int, length: int
) -> None:
    """One read-only view of pages that are all there, over the edges of buckets."""
    fill(guest)
    expected = cache.read(guest.address + offset, length)
    with cache.window(guest.address + offset, length, holes="raise", owner="tool") as window:
        assert window.view.readonly
        assert window.view.contiguous
        assert window.view == expected
        assert hashlib.sha256(window.view).digest() == hashlib.sha256(expected).digest()
        assert [info[1:6] for info in cache.leases()] == [
            (LeaseKind.WINDOW, guest.address + offset, length, "tool", None)
        ]
    assert cache.leases() == ()
    assert cache.stats().windows == 0


@pytest.mark.parametrize("place", ["start", "middle", "end"])
def test_holes_are_zeros(guest: Guest, cache: MapCache, place: str) -> None:
    """The pages around them show; with holes="raise" the error names the first of them."""
    if place not in guest.holes:
        pytest.skip(f"this guest has no hole at the {place} of other pages")
    span = guest.holes[place]
    start, length = span.gfn * PAGE_SIZE, span.pages * PAGE_SIZE
    with cache.window(start, length) as window:
        for page in range(span.pages):
            view = window.view[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]
            hole = span.first <= page < span.end
            address = start + page * PAGE_SIZE
            assert view == (bytes(PAGE_SIZE) if hole else cache.read(address, PAGE_SIZE))
    with pytest.raises(FaultError) as caught:
        cache.window(start, length, holes="raise")
    assert caught.value.address == start + span.first * PAGE_SIZE
    assert cache.leases() == ()


def test_a_view_outlives_its_window_cache_and_source(guest: Guest) -> None:
    """The memory is counted until its last view has gone, and is unmapped once then."""
    gc.collect()
    before = live_mappings()
    cache = MapCache(guest.backend)
    expected = cache.read(guest.address, MiB)
    cache.invalidate()
    window = cache.window(guest.address, MiB)
    kept = window.view[16:]
    window.release()
    assert cache.stats().resident_bytes == MiB
    cache.close()
    assert kept == expected[16:]
    assert live_mappings() == before + 1
    del kept, window
    gc.collect()
    assert live_mappings() == before
    assert (cache.stats().resident_bytes, cache.stats().copied_bytes) == (0, 0)


def test_what_is_copied_counts_as_such(guest: Guest) -> None:
    """The source says how much that is; if it does not fit, the error names max_copies."""
    gfn, count = guest.gfn, 2 * MiB // PAGE_SIZE
    copied = guest.backend.copied_pages(gfn, count) * PAGE_SIZE
    with MapCache(guest.backend, max_copies=MiB) as cache:
        if copied <= MiB:
            with cache.window(guest.address, 2 * MiB):
                stats = cache.stats()
                assert (stats.resident_bytes, stats.copied_bytes) == (2 * MiB, copied)
            return
        with pytest.raises(CacheFullError, match="are more than max_copies 0x100000"):
            cache.window(guest.address, 2 * MiB)
        assert cache.stats().resident_bytes == 0


def test_memory_that_ends_is_followed_by_zeros(guest: Guest, cache: MapCache) -> None:
    """A window may go beyond the end; by default it goes up to it."""
    end = guest.backend.memory_end
    if end is None:
        with pytest.raises(ValueError, match="does not know where its memory ends: give a length"):
            cache.window()
        return
    with cache.window(end - 8, 16) as window:
        assert window.view[8:] == bytes(8)
    with cache.window(end - MiB) as window:
        assert len(window.view) == MiB
    with pytest.raises(FaultError) as caught:
        cache.window(end)
    assert (caught.value.address, caught.value.errno) == (end, errno.EINVAL)
