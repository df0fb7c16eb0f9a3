"""Pages that Xen refuses are not holes: over both libraries, both loaders and the mock."""

from __future__ import annotations

import errno
import gc
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.fake_xen import DOMID, Behaviour, FakeXen, need
from tests.fake_xen.fixtures import MakeFake
from xenmapcache import (
    Backend,
    FaultError,
    GuestMemory,
    MapCache,
    Mapping,
    MockHypervisor,
    XenCallError,
    open_backend,
    write_coredump,
    write_lime,
    write_vmcore,
)
from xenmapcache.address import PAGE_SIZE
from xenmapcache.binding.hints import PAGE_HINTS
from xenmapcache.mapping import live_mappings

PAGES = 64
HOLE, REFUSED = 5, 9
ADDRESS = REFUSED * PAGE_SIZE
REFUSALS = sorted(PAGE_HINTS)
SOURCES = ["mock", "xen-cffi", "xen-ctypes", "xenctrl-cffi", "xenctrl-ctypes"]


class Guest(NamedTuple):
    """A guest of 64 pages with a hole, and a function that has a page refused from now on."""

    backend: Backend
    refuse: Callable[[int, int], object]


@pytest.fixture(params=SOURCES)
def guest(request: pytest.FixtureRequest, make_fake: MakeFake) -> Iterator[Guest]:
    """The guest, over each source."""
    name, _, binding = request.param.partition("-")
    if name == "mock":
        holes = [(HOLE * PAGE_SIZE, PAGE_SIZE)]
        domain = MockHypervisor().create_domain(memory=PAGES * PAGE_SIZE, holes=holes)
        for gfn in set(range(PAGES)) - {HOLE}:
            domain.write(gfn * PAGE_SIZE, b"page %02d" % gfn)

        def refuse(gfn: int, number: int) -> None:
            domain.clear_faults()
            if number:
                domain.inject_fault("map", gfn=gfn, errno=number, repeat=True)

        with open_backend("mock", domain=domain) as backend:
            yield Guest(backend, refuse)
        return
    if binding == "cffi":
        need("_cffi_backend")
    fake = make_fake(holes=[(HOLE, 1)], pages=PAGES)
    for gfn in set(range(PAGES)) - {HOLE}:
        fake.write(gfn * PAGE_SIZE, b"page %02d" % gfn)
    with open_backend(name, domid=DOMID, binding=binding, library=fake.library) as backend:
        yield Guest(backend, lambda gfn, number: fake.set_error(number, gfn))


@pytest.fixture
def cache(guest: Guest) -> Iterator[MapCache]:
    """A cache of which one bucket holds the good pages, the hole and the refused page."""
    cache = MapCache(guest.backend, bucket_shift=16)
    yield cache
    cache.close(force=True)


def check(error: XenCallError, number: int, address: int = ADDRESS) -> None:
    """Check that an error says what was refused, where, and what to do."""
    assert (error.errno, error.address) == (number, address)
    assert error.call in ("mock_map", "xenforeignmemory_map2", "xc_map_foreign_bulk")
    assert error.hint == PAGE_HINTS[number]
    assert f"at {address:#x} with {errno.errorcode[number]}" in str(error)
    again = pickle.loads(pickle.dumps(error))
    assert (again.address, str(again)) == (address, str(error))


@pytest.mark.parametrize("number", REFUSALS)
def test_an_access_names_the_refused_page(guest: Guest, cache: MapCache, number: int) -> None:
    """Its neighbours in the same bucket can be read; it raises, and is tried again each time."""
    guest.refuse(REFUSED, number)
    assert cache.read(ADDRESS - PAGE_SIZE, 7) == b"page 08"
    assert cache.read(ADDRESS + PAGE_SIZE, 7) == b"page 10"
    buffer = bytearray(16)
    for access in (
        lambda: cache.read(ADDRESS + 8, 4),
        lambda: list(cache.views(ADDRESS + 8, 4)),
        lambda: cache.read_into(ADDRESS + 8, buffer),
        lambda: cache.write(ADDRESS + 8, b"x"),
        lambda: cache.map_dma(ADDRESS + 8, 4, owner="test"),
        lambda: cache.map_device(ADDRESS + 8, 4, owner="test"),
    ):
        with pytest.raises(XenCallError) as caught:
            access()
        check(caught.value, number, ADDRESS + 8)
    with pytest.raises(XenCallError) as caught:
        cache.read(ADDRESS - 4, 2 * PAGE_SIZE)
    check(caught.value, number)
    with pytest.raises(FaultError, match="no page at 0x5000"):  # the first bad page counts
        cache.read(HOLE * PAGE_SIZE, 8 * PAGE_SIZE)
    assert cache.leases() == ()
    guest.refuse(REFUSED, 0)
    assert cache.read(ADDRESS, 7) == b"page 09"


@pytest.mark.parametrize("number", REFUSALS)
def test_nothing_skips_a_refused_page(
    guest: Guest, cache: MapCache, number: int, tmp_path: Path
) -> None:
    """What skips or fills holes raises: present, find, strings, fill=, map_pages and writers."""
    guest.refuse(REFUSED, number)
    memory = GuestMemory(cache)
    end = PAGES * PAGE_SIZE
    core = tmp_path / "guest.core"
    for pass_over in (
        lambda: list(cache.present(0, end)),
        lambda: list(memory.find(b"page 40", 0, end)),
        lambda: list(memory.strings(0, end)),
        lambda: cache.read(0, end, fill=0),
        lambda: cache.read_into(0, bytearray(end), fill=0),
        lambda: cache.map_pages(0, PAGES),
        lambda: write_vmcore(guest.backend, core, length=end),
        lambda: write_lime(cache, core, length=end),
        lambda: write_coredump(cache, core, length=end),
        lambda: write_coredump(guest.backend, core, length=end),
    ):
        with pytest.raises(XenCallError) as caught:
            pass_over()
        check(caught.value, number)
    assert not core.exists()
    # Where it is not asked for, it is in nobody's way.
    assert list(cache.present(0, ADDRESS)) == [(0, 0x5000), (0x6000, 0x3000)]
    assert next(memory.find(b"page 1", 0x10000, 0x1000))[0] == 0x10000
    guest.refuse(REFUSED, 0)
    assert list(cache.present(0, end)) == [(0, 0x5000), (0x6000, end - 0x6000)]
    assert list(memory.find(b"page 40", 0, end)) == [(0x28000, b"page 40")]
    assert write_coredump(cache, core, length=end) == PAGES - 1


def test_a_kept_error_keeps_no_memory(guest: Guest, cache: MapCache) -> None:
    """The tracebacks of refusals hold no mapping."""
    guest.refuse(REFUSED, errno.EACCES)
    gc.collect()
    before = live_mappings()
    kept = []
    for pass_over in (
        lambda: cache.map_pages(0, PAGES),
        lambda: cache.map_device(ADDRESS, 4, owner="test"),
        lambda: cache._access.check_ends(ADDRESS, 8),
    ):
        with pytest.raises(XenCallError) as caught:
            pass_over()
        kept.append(caught)
    assert live_mappings() == before


def test_a_long_lease_is_refused_before_it_is_mapped(guest: Guest) -> None:
    """The look at a range's first and last page takes a refusal for what it is."""
    guest.refuse(REFUSED, errno.EPERM)
    cache = MapCache(guest.backend, bucket_shift=12, max_lease=PAGE_SIZE)
    with pytest.raises(XenCallError) as caught:
        cache.map_dma(ADDRESS, 2 * PAGE_SIZE, owner="test")
    check(caught.value, errno.EPERM)


def test_copying_of_stale_leases_says_that_a_page_was_refused(guest: Guest) -> None:
    """``on_stale="copy"`` copies what it can, and raises the refusal, not a fault."""
    with MapCache(guest.backend, bucket_shift=16, on_stale="copy") as cache:
        lease = cache.map_dma(ADDRESS - 8, 16, owner="test")
        lease.view[:] = b"x" * 16
        cache.invalidate()
        guest.refuse(REFUSED, errno.EACCES)
        with pytest.raises(XenCallError) as caught:
            lease.release()
        check(caught.value, errno.EACCES)
        assert lease.released


def test_a_lack_of_memory_for_pages_makes_room_first(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ENOMEM of single pages evicts buckets and tries again, as that of a call does."""
    with MapCache(guest.backend, bucket_shift=12) as cache:
        cache.read(0, 1)
        cache.read(PAGE_SIZE, 1)
        guest.refuse(REFUSED, errno.ENOMEM)
        original = guest.backend.map

        def mapped(gfn: int, count: int, *, writable: bool) -> Mapping:
            if cache.stats().resident_buckets == 0:
                guest.refuse(REFUSED, 0)
            return original(gfn, count, writable=writable)

        monkeypatch.setattr(guest.backend, "map", mapped)
        assert cache.read(ADDRESS, 7) == b"page 09"
        assert cache.stats().evictions == 2


@pytest.mark.parametrize("number", REFUSALS)
@pytest.mark.parametrize("name", ["xen", "xenctrl"])
def test_opening_a_refused_domain(fake: FakeXen, binding: str, name: str, number: int) -> None:
    """A domain whose first page is refused does not open: everything after it would fail, too."""
    fake.set_error(number, 0, PAGES)
    with pytest.raises(XenCallError) as caught:
        open_backend(name, domid=DOMID, binding=binding, library=fake.library)
    check(caught.value, number, 0)
    assert caught.value.domid == DOMID
    assert fake.calls[-1].name in ("xenforeignmemory_close", "xc_interface_close")
    assert fake.misuses == 0


@pytest.mark.parametrize("number", REFUSALS)
def test_a_refused_call_has_a_remedy(fake: FakeXen, binding: str, number: int) -> None:
    """A call that fails as a whole says the same, without an address."""
    with open_backend("xen", domid=DOMID, binding=binding, library=fake.library) as backend:
        cache = MapCache(backend, bucket_shift=16)
        fake.plan("xenforeignmemory_map2", Behaviour.FAIL, number)
        with pytest.raises(XenCallError) as caught:
            list(cache.present(0, PAGES * PAGE_SIZE))
        assert (caught.value.errno, caught.value.address) == (number, None)
        assert caught.value.hint
        cache.close()


def test_other_errnos_are_holes(guest: Guest, cache: MapCache) -> None:
    """What says that there is no page, or that it cannot be had now, is a fault as before."""
    guest.refuse(REFUSED, errno.ENOENT)
    with pytest.raises(FaultError) as caught:
        cache.read(ADDRESS, 1)
    assert caught.value.errno == errno.ENOENT
    assert list(cache.present(0, 0x10000)) == [(0, 0x5000), (0x6000, 0x3000), (0xA000, 0x6000)]
