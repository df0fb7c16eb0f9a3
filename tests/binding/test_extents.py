"""Where a live guest may have pages: Xen is asked, and holes are not mapped."""

from __future__ import annotations

import errno
import gc
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fake_xen import DOMID, Behaviour, FakeXen
from tests.fake_xen.fixtures import MakeFake
from xenmapcache import GuestMemory, MapCache, open_backend, write_coredump
from xenmapcache.address import MiB
from xenmapcache.backends import domain as domain_module
from xenmapcache.backends.domain import DomainBackend
from xenmapcache.binding.control import GET_INFO_LIST, PFN_TYPES, Control
from xenmapcache.cache import access
from xenmapcache.cli import sources
from xenmapcache.errors import BackendUnavailableError, UnsupportedOperationError, XenCallError
from xenmapcache.mapping import live_mappings

PAGES = 16 * 256
RAM = [(0, 512), (3840, 256)]
"""Two MiB at the beginning, and the last one."""
MAPS = {"xen": "xenforeignmemory_map2", "xenctrl": "xc_map_foreign_bulk"}


@pytest.fixture(params=["xen", "xenctrl"])
def name(request: pytest.FixtureRequest) -> str:
    """Both backends."""
    chosen: str = request.param
    return chosen


@pytest.fixture
def fake(make_fake: MakeFake) -> FakeXen:
    """A guest with a hole of 13 MiB, in which pages 1500 and 2000 are there."""
    return make_fake(pages=PAGES, holes=[(512, 988), (1501, 499), (2001, 1839)])


@pytest.fixture
def backend(fake: FakeXen, name: str, binding: str) -> Iterator[DomainBackend]:
    """An open backend, which has left nothing mapped in the end."""
    before = live_mappings()
    with open_backend(name, domid=DOMID, binding=binding, library=fake.library) as backend:
        assert isinstance(backend, DomainBackend)
        yield backend
    gc.collect()
    assert live_mappings() == before
    assert fake.misuses == 0


def mapped(fake: FakeXen, backend: DomainBackend) -> int:
    """Return how many pages were mapped since the backend was opened."""
    place = 3 if backend.name == "xenctrl" else 5
    calls = [call for call in fake.calls if call.name == backend.map_call]
    return sum(call.arguments[-1 if place == 3 else place] for call in calls) - 1


def test_xen_tells_where_pages_are(fake: FakeXen, backend: DomainBackend) -> None:
    """Each MiB with a page is there, and nothing is mapped to find out."""
    assert list(backend.extents(0, PAGES)) == [(0, 512), (1280, 256), (1792, 256), (3840, 256)]
    assert mapped(fake, backend) == 0
    assert fake.handles == fake.count("xenforeignmemory_open") + fake.count(
        "xendevicemodel_open"
    ) + fake.count("xc_interface_open") - fake.count("xc_interface_close")


def test_a_part_of_the_guest(fake: FakeXen, backend: DomainBackend) -> None:
    """What is yielded lies in the range that was asked about, and before the end of memory."""
    assert list(backend.extents(100, 200)) == [(100, 200)]
    assert list(backend.extents(500, 1000)) == [(500, 12), (1280, 220)]
    assert list(backend.extents(600, 100)) == []
    before = fake.count(PFN_TYPES)
    assert list(backend.extents(3900, 10 * PAGES)) == [(3900, 196)]
    assert fake.count(PFN_TYPES) == before + 2  # of the last MiB, two frames and then all
    assert list(backend.extents(PAGES, 512)) == list(backend.extents(10 * PAGES, 1)) == []


def test_it_ends_when_as_many_pages_are_found_as_xen_counts(
    fake: FakeXen, backend: DomainBackend
) -> None:
    """If Xen counts pages that have no frame number, every frame is asked about."""
    fake.set_error(errno.EINVAL, 1500)
    fake.set_error(errno.EINVAL, 2000)
    assert list(backend.extents(0, PAGES)) == RAM
    calls = fake.count(PFN_TYPES)
    assert calls == 2  # two frames of each MiB, and all of three MiB
    fake.count_nowhere(1)
    assert list(backend.extents(0, PAGES)) == RAM
    assert fake.count(PFN_TYPES) == calls + 2 + 4 + 1 + 1 + 4


def test_pages_of_xens_own_are_not_counted(fake: FakeXen, backend: DomainBackend) -> None:
    """Frames of the grant table amid RAM do not make a page at the end be missed."""
    fake.keep(100, 30)
    assert list(backend.extents(0, PAGES)) == [(0, 512), (1280, 256), (1792, 256), (3840, 256)]
    survey = list(backend.survey(0, PAGES) or ())
    assert survey == [(0, 512), (1500, 1), (2000, 1), (3840, 256)]
    fake.keep(1500)
    assert list(backend.extents(0, PAGES)) == [(0, 512), (1792, 256), (3840, 256)]


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM])
def test_where_xen_does_not_tell_some_pages_are_mapped(
    fake: FakeXen, backend: DomainBackend, number: int
) -> None:
    """As on Arm: two of each MiB. A gap of less than 64 MiB is not skipped."""
    fake.plan(PFN_TYPES, Behaviour.FAIL, number)
    assert list(backend.extents(0, PAGES)) == [(0, PAGES)]
    assert mapped(fake, backend) == 2 * 16
    fake.plan(PFN_TYPES, Behaviour.FAIL, number)
    assert backend.survey(0, PAGES) is None


def test_a_refused_page_is_looked_at(
    make_fake: MakeFake, name: str, binding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where pages cannot be mapped for want of rights, the error is to come."""
    fake = make_fake(pages=PAGES, holes=[(512, 3584)])
    fake.set_error(errno.EPERM, 1024)
    with open_backend(name, domid=DOMID, binding=binding, library=fake.library) as backend:
        fake.plan(PFN_TYPES, Behaviour.FAIL, errno.ENOSYS)
        assert list(backend.extents(0, PAGES)) == [(0, 1280)]
        fake.plan(PFN_TYPES, Behaviour.FAIL, errno.ENOSYS)
        assert list(backend.extents(0, 512)) == [(0, 512)]


def test_what_was_mapped_to_look_is_unmapped_after_an_interrupt(
    backend: DomainBackend, fake: FakeXen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while pages are mapped leaves no mapping."""
    really = backend._map_pages

    def interrupted(*arguments: object) -> object:
        really(*arguments)  # type: ignore[arg-type] # as they came
        raise KeyboardInterrupt

    monkeypatch.setattr(backend, "_map_pages", interrupted)
    fake.plan(PFN_TYPES, Behaviour.FAIL, errno.ENOSYS)
    with pytest.raises(KeyboardInterrupt):
        backend.extents(0, PAGES)
    monkeypatch.undo()
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if int(line.split()[4]) == fake.inode]


def test_the_whole_range_where_xen_tells_nothing(
    fake: FakeXen, backend: DomainBackend, caplog: pytest.LogCaptureFixture
) -> None:
    """Each page of a range is mapped as of old then, and INFO says why."""
    assert backend.memory_end is not None
    fake.plan(GET_INFO_LIST, Behaviour.FAIL, errno.EPERM)
    with caplog.at_level("INFO", "xenmapcache"):
        assert list(backend.extents(100, 1000)) == [(100, 1000)]
    assert "all of its address space is mapped: xc_domain_getinfolist" in caplog.text


def test_the_whole_range_without_libxenctrl(
    make_fake: MakeFake, binding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the end of memory nor a page is known; after `restrict` it is the same."""
    fake = make_fake("ALONE")

    def absent(**_: object) -> Control:
        raise BackendUnavailableError("no permission for /dev/xen/privcmd")

    monkeypatch.setattr(domain_module, "Control", absent)
    with open_backend("xen", domid=DOMID, binding=binding, library=fake.library) as backend:
        assert list(backend.extents(100, 1 << 30)) == [(100, 1 << 30)]
        assert backend.survey(100, 1 << 30) is None
    monkeypatch.undo()
    with Control(binding=binding, library=fake.library) as control:
        with pytest.raises(UnsupportedOperationError, match=f"no function {PFN_TYPES}"):
            control.has_pages(DOMID, array("Q", [0]))


def test_xen_is_asked_about_at_most_1024_frames(fake: FakeXen, binding: str) -> None:
    """More are an error of Xen's; so is another domain."""
    with Control(binding=binding, library=fake.library) as control:
        gfns = array("Q", [5, 600, 1500])
        assert control.has_pages(DOMID, gfns) == b"\1\0\1"
        assert list(gfns) == [5, 600, 1500]
        for domid, count, number in ((DOMID, 1025, errno.E2BIG), (DOMID + 1, 1, errno.ESRCH)):
            with pytest.raises(XenCallError) as caught:
                control.has_pages(domid, array("Q", range(count)))
            assert caught.value.errno == number


def test_searches_and_copies_map_no_holes(
    fake: FakeXen, backend: DomainBackend, tmp_path: Path
) -> None:
    """`find`, `info` and `dump` map the four MiB that have pages, and find the same pages."""
    fake.write(2000 << 12, b"needle")
    found = [(0, 2 * MiB), (1500 << 12, 4096), (2000 << 12, 4096), (15 * MiB, MiB)]
    with MapCache(backend) as cache:
        assert list(GuestMemory(cache).find(b"needle")) == [(2000 << 12, b"needle")]
        assert mapped(fake, backend) == 5 * 256
        cache.invalidate()
        ranges = sources.merge_adjacent(sources.present(cache, 0, PAGES << 12))
        assert [(first, last - first) for first, last in ranges] == found
        assert mapped(fake, backend) == 5 * 256 + 255 + 255  # frames without a page
        before = mapped(fake, backend)
        assert list(sources.present(cache, 100, 5000)) == [(100, 5000)]
        assert mapped(fake, backend) - before == 256
    before = mapped(fake, backend)
    assert write_coredump(backend, tmp_path / "core") == 512 + 1 + 1 + 256
    assert mapped(fake, backend) - before == 5 * 256
    with open_backend("coredump", path=tmp_path / "core") as dump, MapCache(dump) as cache:
        assert list(cache.present(0, PAGES << 12)) == found


def test_a_cache_maps_no_holes_to_find_pages(
    fake: FakeXen, backend: DomainBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a long range only the MiB that have a page are mapped; of a shorter one all of it is."""
    monkeypatch.setattr(access, "_MAPPED_BYTES", 15 * MiB)
    everything = [(0, 512), (1500, 1), (2000, 1), (3840, 256)]
    with MapCache(backend) as cache:
        found = [(start // 4096, size // 4096) for start, size in cache.present(0, 16 * MiB)]
        assert found == everything
        assert mapped(fake, backend) == 5 * 256
        found = [(start // 4096, size // 4096) for start, size in cache.present(MiB, 15 * MiB)]
        assert found == [(256, 256), *everything[1:]]
        assert mapped(fake, backend) == PAGES
