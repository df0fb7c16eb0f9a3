"""Windows over the stand-in for Xen's libraries: pages at a given address, and what goes wrong."""

from __future__ import annotations

import errno
import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fake_xen import DOMID, Behaviour, FakeXen
from tests.fake_xen.fixtures import MakeFake
from xenmapcache import CacheFullError, FaultError, MapCache, XenCallError
from xenmapcache.address import PAGE_SIZE
from xenmapcache.backends.xen import XenBackend
from xenmapcache.binding import libc
from xenmapcache.mapping import live_mappings

MAP2 = "xenforeignmemory_map2"


@pytest.fixture(autouse=True)
def _collected() -> None:
    """Nothing that earlier tests have left goes while a test counts mappings."""
    gc.collect()


@pytest.fixture
def cache(fake: FakeXen, binding: str) -> Iterator[MapCache]:
    """A cache over the stand-in's guest of 64 pages, each of which says which it is."""
    for gfn in range(64):
        if not fake._state.errors[gfn]:
            fake.write(gfn * PAGE_SIZE, b"page %04d" % gfn)
    with XenBackend(domid=DOMID, binding=binding, library=fake.library) as backend:
        cache = MapCache(backend, bucket_shift=14)
        fake._state.calls = 0
        yield cache
        cache.close(force=True)
    assert fake.misuses == 0


def seen(view: memoryview) -> list[str]:
    """Return what the pages of a window say."""
    pages = [bytes(view[start : start + 9]) for start in range(0, len(view), PAGE_SIZE)]
    return [page.strip(b"\0").decode() for page in pages]


def named(*gfns: int | None) -> list[str]:
    return ["" if gfn is None else f"page {gfn:04d}" for gfn in gfns]


def test_pages_are_mapped_at_the_address(fake: FakeXen, cache: MapCache) -> None:
    """By one call with MAP_FIXED, to be read; what the guest writes is seen."""
    with cache.window(8 * PAGE_SIZE, 8 * PAGE_SIZE) as window:
        assert seen(window.view) == named(*range(8, 16))
        fake.write(9 * PAGE_SIZE, b"now")
        assert bytes(window.view[PAGE_SIZE : PAGE_SIZE + 3]) == b"now"
        calls = [call for call in fake.calls if call.name == MAP2]
        assert [call.gfns for call in calls] == [tuple(range(8, 16))]
        # fmem, dom, addr, prot, flags, pages
        assert calls[0].arguments[1:6] == (
            DOMID,
            window.host_address,
            libc.PROT_READ,
            libc.MAP_FIXED,
            8,
        )


def test_holes_are_cut_out(fake: FakeXen, cache: MapCache) -> None:
    """No part of a foreign mapping can be replaced: each run of pages is mapped again."""
    for gfn in (8, 11, 12, 15):
        fake.set_error(errno.EINVAL, gfn)
    with cache.window(8 * PAGE_SIZE, 8 * PAGE_SIZE) as window:
        assert seen(window.view) == named(None, 9, 10, None, None, 13, 14, None)
    mapped = {call.gfns for call in fake.calls if call.name == MAP2}
    assert mapped == {tuple(range(8, 16)), (9, 10), (13, 14)}
    with pytest.raises(FaultError) as caught:
        cache.window(9 * PAGE_SIZE, 4 * PAGE_SIZE, holes="raise")
    assert caught.value.address == 11 * PAGE_SIZE


def test_a_page_that_goes_amid_the_work_is_a_hole(fake: FakeXen, cache: MapCache) -> None:
    """The second attempt at a run finds fewer pages than the first one."""
    fake.set_error(errno.EINVAL, 8)
    fake.plan(MAP2, Behaviour.PARTIAL, nth=2)  # of pages 9 to 15 the second half
    with cache.window(8 * PAGE_SIZE, 8 * PAGE_SIZE) as window:
        assert seen(window.view) == named(None, 9, 10, 11, None, None, None, None)


def test_all_pages_may_be_holes(fake: FakeXen, cache: MapCache) -> None:
    """The window shows zeros then."""
    with cache.window(64 * PAGE_SIZE, 4 * PAGE_SIZE) as window:
        assert window.view == bytes(4 * PAGE_SIZE)


def test_a_domain_that_has_gone_is_an_error(fake: FakeXen, cache: MapCache) -> None:
    """Xen says so page by page."""
    fake.plan(MAP2, Behaviour.ALL_PAGES, errno.ESRCH)
    with pytest.raises(XenCallError, match="no such domain"):
        cache.window(0, 4 * PAGE_SIZE)


def test_a_refused_page_is_an_error(fake: FakeXen, cache: MapCache) -> None:
    """It names the call, the domain and the address."""
    fake.set_error(errno.EACCES, 10)
    text = f"{MAP2} failed for domain {DOMID} at 0xa000 with EACCES"
    with pytest.raises(XenCallError, match=text):
        cache.window(8 * PAGE_SIZE, 8 * PAGE_SIZE)


@pytest.mark.parametrize(
    ("behaviour", "value", "text"),
    [
        (Behaviour.FAIL, errno.EINVAL, "EINVAL"),
        (Behaviour.DROP, errno.EINVAL, "EINVAL"),
        (Behaviour.IGNORE, 0, "it ignored the address 0x"),
        (Behaviour.ASKEW, 0, "it ignored the address 0x"),
    ],
)
def test_a_failed_call_leaves_nothing(
    fake: FakeXen, cache: MapCache, behaviour: Behaviour, value: int, text: str
) -> None:
    """Whatever it has unmapped or mapped: the whole is unmapped, and nothing else."""
    before = live_mappings()
    lines = len(Path("/proc/self/maps").read_text(encoding="utf-8").splitlines())
    fake.plan(MAP2, behaviour, value)
    with pytest.raises(XenCallError, match=text):
        cache.window(8 * PAGE_SIZE, 8 * PAGE_SIZE)
    assert live_mappings() == before
    assert cache.stats().resident_bytes == 0
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    assert str(fake.inode) not in [line.split()[4] for line in maps]
    assert abs(len(maps) - lines) <= 2
    with cache.window(8 * PAGE_SIZE, PAGE_SIZE) as window:
        assert seen(window.view) == named(8)


def test_memory_for_a_call_is_made_by_eviction(fake: FakeXen, cache: MapCache) -> None:
    """ENOMEM is tried again as long as buckets can go; the parts that were mapped are kept."""
    cache.read(32 * PAGE_SIZE, 1)
    fake.plan(MAP2, Behaviour.DROP, errno.ENOMEM)
    with cache.window(8 * PAGE_SIZE, 8 * PAGE_SIZE) as window:
        assert seen(window.view) == named(*range(8, 16))
    assert cache.stats().evictions == 1


def test_a_library_without_map2_copies(make_fake: MakeFake, binding: str) -> None:
    """Xen 4.9 and older: within max_copies."""
    fake = make_fake("OLD", holes=[(9, 1)])
    fake.write(8 * PAGE_SIZE, b"page 0008")
    fake.write(10 * PAGE_SIZE, b"page 0010")
    with XenBackend(domid=DOMID, binding=binding, library=fake.library) as backend:
        with MapCache(backend, bucket_shift=14, max_copies=4 * PAGE_SIZE) as cache:
            with cache.window(8 * PAGE_SIZE, 4 * PAGE_SIZE) as window:
                assert seen(window.view) == named(8, None, 10, None)
                assert cache.stats().copied_bytes == 4 * PAGE_SIZE
            with pytest.raises(CacheFullError, match="max_copies"):
                cache.window(8 * PAGE_SIZE, 5 * PAGE_SIZE)
