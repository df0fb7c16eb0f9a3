"""Written pages of a live domain, which Xen is told of for its migration."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterator
from unittest.mock import ANY

import pytest

from tests.fake_xen import DOMID, Behaviour, FakeXen
from tests.fake_xen.fixtures import MakeFake
from xenmapcache import Capability, DmaDirection, MapCache, open_backend
from xenmapcache.address import PAGE_SIZE
from xenmapcache.backends.domain import DomainBackend
from xenmapcache.binding.devicemodel import MODIFIED, MODIFIED_BULK, TRACK_VRAM, DeviceModel
from xenmapcache.errors import UnsupportedOperationError, XenCallError

OPEN, CLOSE = "xendevicemodel_open", "xendevicemodel_close"


@pytest.fixture(params=["xen", "xenctrl"])
def name(request: pytest.FixtureRequest) -> str:
    """Both backends."""
    chosen: str = request.param
    return chosen


@pytest.fixture
def opener(name: str, binding: str) -> Callable[[FakeXen], DomainBackend]:
    """A function that opens the guest of a stand-in."""

    def opener(fake: FakeXen) -> DomainBackend:
        backend = open_backend(name, domid=DOMID, binding=binding, library=fake.library)
        assert isinstance(backend, DomainBackend)
        return backend

    return opener


@pytest.fixture
def backend(opener: Callable[[FakeXen], DomainBackend], fake: FakeXen) -> Iterator[DomainBackend]:
    """A guest whose written pages Xen is told of; none was until now."""
    with opener(fake) as backend:
        fake.take_dirty()
        yield backend
    assert fake.misuses == 0


@pytest.fixture
def cache(backend: DomainBackend) -> Iterator[MapCache]:
    """A cache over that guest."""
    cache = MapCache(backend, bucket_shift=14)
    yield cache
    cache.close(force=True)


def test_capability(
    opener: Callable[[FakeXen], DomainBackend], fake: FakeXen, caplog: pytest.LogCaptureFixture
) -> None:
    """Where a probing report succeeds it is there, nothing is logged, and close closes it all."""
    caplog.set_level(logging.INFO)
    with opener(fake) as backend:
        assert Capability.DIRTY in backend.capabilities
        assert backend.log_dirty
        assert fake.calls[-1] == (MODIFIED_BULK, (ANY, DOMID, 1, 1, 0, 0), ())
    assert fake.count(OPEN) == fake.count(CLOSE) == 1
    assert not caplog.records


def test_old_library(opener: Callable[[FakeXen], DomainBackend], make_fake: MakeFake) -> None:
    """A library without the bulk call can report as well."""
    old = make_fake("OLD")
    with opener(old) as backend:
        assert Capability.DIRTY in backend.capabilities
        backend.mark_dirty(8, 2)
    assert old.take_dirty() == {0, 8, 9}  # of which 0 was the probe


def test_writes_are_reported(cache: MapCache, fake: FakeXen) -> None:
    """After a write, and when a lease that could be written is released, its pages are reported."""
    cache.write(8 * PAGE_SIZE - 1, b"ab")
    assert fake.take_dirty() == {7, 8}
    lease = cache.map_dma(
        8 * PAGE_SIZE, 2 * PAGE_SIZE, owner="disk", direction=DmaDirection.FROM_DEVICE
    )
    assert fake.take_dirty() == set()
    lease.release()
    assert fake.take_dirty() == {8, 9}


def test_log_dirty_off(cache: MapCache, backend: DomainBackend, fake: FakeXen) -> None:
    """While log_dirty is False a write makes no call; set to True again, it does."""
    backend.log_dirty = False
    before = fake.count(MODIFIED_BULK)
    cache.write(8 * PAGE_SIZE, b"a")
    assert fake.count(MODIFIED_BULK) == before
    backend.log_dirty = True
    cache.write(9 * PAGE_SIZE, b"b")
    assert fake.take_dirty() == {9}


def test_domain_that_is_gone(cache: MapCache, fake: FakeXen) -> None:
    """A lease is released after its guest has ended: there is nothing left to migrate."""
    lease = cache.map_dma(8 * PAGE_SIZE, 64, owner="disk", direction=DmaDirection.FROM_DEVICE)
    before = fake.count(MODIFIED_BULK)
    fake.plan(MODIFIED_BULK, Behaviour.FAIL, errno.ESRCH)
    lease.release()
    assert fake.count(MODIFIED_BULK) == before + 1
    assert not cache.leases()


def test_report_that_fails(cache: MapCache, fake: FakeXen) -> None:
    """Any other failure is raised, and the lease is still held, so that it can be tried again."""
    lease = cache.map_dma(8 * PAGE_SIZE, 64, owner="disk", direction=DmaDirection.FROM_DEVICE)
    fake.plan(MODIFIED_BULK, Behaviour.FAIL, errno.EPERM)
    with pytest.raises(XenCallError) as caught:
        lease.release()
    assert (caught.value.call, caught.value.errno) == (MODIFIED_BULK, errno.EPERM)
    assert [info.owner for info in cache.leases()] == ["disk"]
    lease.release()
    assert fake.take_dirty() == {8}


# --- where it cannot be ---------------------------------------------------------------


def reason(
    open_it: Callable[[], DomainBackend], caplog: pytest.LogCaptureFixture
) -> tuple[DomainBackend, str]:
    """Return a backend without the capability, and why it has none."""
    caplog.clear()
    caplog.set_level(logging.INFO, "xenmapcache")
    backend = open_it()
    assert Capability.DIRTY not in backend.capabilities
    assert Capability.WRITE in backend.capabilities
    (record,) = (record for record in caplog.records if record.name == "xenmapcache")
    assert record.levelno == logging.INFO
    before, _, why = record.getMessage().partition(": written pages are not reported to Xen")
    assert before == f"domain {DOMID}"
    return backend, why


def test_a_guest_that_xen_takes_no_reports_of(
    opener: Callable[[FakeXen], DomainBackend], fake: FakeXen, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the probe is refused, as of a PV guest, writes work unreported, and the log says so."""
    fake.plan(MODIFIED_BULK, Behaviour.FAIL, errno.EINVAL)
    backend, why = reason(lambda: opener(fake), caplog)
    assert "EINVAL" in why
    assert fake.count(CLOSE) == 1
    with backend:
        with pytest.raises(UnsupportedOperationError, match="keeps no dirty pages"):
            backend.mark_dirty(8, 1)
        with MapCache(backend, bucket_shift=14) as cache:
            cache.write(8 * PAGE_SIZE, b"a")
    assert fake.count(MODIFIED_BULK) == 1
    assert fake.count(CLOSE) == 1


def test_a_library_that_does_not_open(
    opener: Callable[[FakeXen], DomainBackend], fake: FakeXen, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the library's handle cannot be opened, its error is the reason."""
    fake.plan(OPEN, Behaviour.FAIL, errno.EACCES)
    backend, why = reason(lambda: opener(fake), caplog)
    backend.close()
    assert f"{OPEN} failed" in why


def test_no_library(
    opener: Callable[[FakeXen], DomainBackend],
    make_fake: MakeFake,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A library that only maps is not asked for reports: the declared one is, if it is there."""
    gone = DeviceModel.declared._replace(soname="libgone.so.1")
    monkeypatch.setattr(DeviceModel, "declared", gone)
    backend, why = reason(lambda: opener(make_fake("ALONE")), caplog)
    backend.close()
    assert "libgone.so.1 cannot be loaded" in why
    assert DeviceModel.declared.package in why


@pytest.mark.parametrize("number", [errno.ESRCH, errno.EINVAL])
def test_probe_of_the_old_call(
    opener: Callable[[FakeXen], DomainBackend],
    make_fake: MakeFake,
    caplog: pytest.LogCaptureFixture,
    number: int,
) -> None:
    """The probe is the call that reports will be made with, and no errno of it is ignored."""
    old = make_fake("OLD")
    old.plan(MODIFIED, Behaviour.FAIL, number)
    backend, why = reason(lambda: opener(old), caplog)
    backend.close()
    assert errno.errorcode[number] in why


def test_interrupted_probe(
    opener: Callable[[FakeXen], DomainBackend], fake: FakeXen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception of another kind ends the opening, and leaves nothing open."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(DeviceModel, "modified_memory", interrupt)
    with pytest.raises(KeyboardInterrupt):
        opener(fake)
    opened = [call.name for call in fake.calls if call.name.endswith("_open")]
    closed = [call.name for call in fake.calls if call.name.endswith("_close")]
    assert len(opened) == len(closed) == 2


# --- a screen that the guest writes to ---------------------------------------------------


def test_written_pages_of_a_screen(backend: DomainBackend) -> None:
    """The runs of written pages of the range come once each, and no others."""
    for gfn, count in ((3, 1), (4, 2), (11, 9), (38, 3)):
        backend.mark_dirty(gfn, count)
    assert backend.track_dirty_vram(4, 36) == [(4, 2), (11, 9), (38, 2)]
    assert backend.track_dirty_vram(4, 36) == []
    assert backend.track_dirty_vram(40, 1) == [(40, 1)]


def test_the_end_of_tracking(backend: DomainBackend, fake: FakeXen) -> None:
    """No pages are nothing that was written; Xen is told that the tracking has ended."""
    assert backend.track_dirty_vram(0, 0) == []
    assert fake.calls[-1] == (TRACK_VRAM, (ANY, DOMID, 0, 0), ())


def test_a_screen_while_the_guest_is_migrated(backend: DomainBackend, fake: FakeXen) -> None:
    """ENODATA says that any page may be written; other errors are raised."""
    fake.plan(TRACK_VRAM, Behaviour.FAIL, errno.ENODATA)
    assert backend.track_dirty_vram(4, 9) == [(4, 9)]
    fake.plan(TRACK_VRAM, Behaviour.FAIL, errno.EINVAL)
    with pytest.raises(XenCallError, match=TRACK_VRAM):
        backend.track_dirty_vram(4, 9)


def test_a_screen_without_the_library(
    opener: Callable[[FakeXen], DomainBackend], fake: FakeXen
) -> None:
    """A backend that cannot call libxendevicemodel says that it cannot track."""
    fake.plan(OPEN, Behaviour.FAIL, errno.EACCES)
    with opener(fake) as backend, pytest.raises(UnsupportedOperationError, match="tracked"):
        backend.track_dirty_vram(4, 9)
