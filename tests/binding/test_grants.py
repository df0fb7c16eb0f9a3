"""Grants over the stand-in for libxengnttab: what the library and the kernel do, and refuse."""

from __future__ import annotations

import errno

import pytest

from tests.fake_xen import DOMID, Behaviour, FakeXen
from tests.fake_xen.fixtures import MakeFake
from xenmapcache import (
    ClosedError,
    MapCache,
    UnsupportedOperationError,
    XenCallError,
    open_backend,
)
from xenmapcache.binding import libc
from xenmapcache.grants import grant_address
from xenmapcache.grants.xen import XenGrants


@pytest.fixture(autouse=True)
def _granted(fake: FakeXen) -> None:
    """Reference 8 is page 1."""
    fake.grant(8, 1)


def test_a_grant_that_cannot_be_given_back(fake: FakeXen, binding: str) -> None:
    """The lease is still held; after close by force the next look ends it."""
    with (
        open_backend("xen", domid=DOMID, binding=binding, library=fake.library) as backend,
        backend.open_grants() as grants,
    ):
        cache = MapCache(backend, grants=grants)
        lease = cache.map_dma(grant_address(8), 16, owner="disk")
        fake.plan("ioctl", Behaviour.FAIL, errno.EIO)
        with pytest.raises(XenCallError, match="UNMAP_GRANT_REF"):
            lease.release()
        assert not lease.released
        fake.plan("ioctl", Behaviour.FAIL, errno.EIO)
        cache.close(force=True)
        assert cache.leases() == ()
        assert fake.granted(8) == 1
        del lease
    assert fake.granted(8) == 0


def test_the_text_of_a_lease_that_was_let_go(
    fake: FakeXen, binding: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The WARNING says that its grants are still mapped."""
    with (
        open_backend("xen", domid=DOMID, binding=binding, library=fake.library) as backend,
        backend.open_grants() as grants,
    ):
        cache = MapCache(backend, grants=grants)
        cache.map_dma(grant_address(8), 16, owner="disk")
        fake.plan("ioctl", Behaviour.FAIL, errno.EIO)
        cache.close(force=True)
    assert "closed by force, grants are still mapped: DMA lease of 'disk'" in caplog.messages[0]


def test_given_back_by_other_code(
    fake: FakeXen, binding: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Grants that a child of C code has given back are gone: a WARNING names them."""
    with (
        open_backend("xen", domid=DOMID, binding=binding, library=fake.library) as backend,
        backend.open_grants() as grants,
    ):
        mapping = grants.map(grant_address(8), 16, writable=False, result_out=[])
        fake._state.maps[0].address = 0
        mapping.give_back()
        assert caplog.messages == [f"domain {DOMID}: reference 8: given back by other code"]
        assert grants.mapped == 0


@pytest.mark.parametrize(
    ("place", "name"), [(libc, "dont_fork"), (XenGrants, "_index")], ids=["at first", "at last"]
)
def test_closed_while_pages_are_mapped(
    fake: FakeXen, binding: str, monkeypatch: pytest.MonkeyPatch, place: object, name: str
) -> None:
    """Memory that another thread's close has overtaken is unmapped, and no lease shows it."""
    with open_backend("xen", domid=DOMID, binding=binding, library=fake.library) as backend:
        grants = backend.open_grants()
        step = getattr(place, name)

        def close(*arguments: object) -> object:
            result = step(*arguments)
            grants.close(force=True)
            return result

        monkeypatch.setattr(place, name, close)
        with pytest.raises(ClosedError):
            grants.map(grant_address(8), 16, writable=False, result_out=[])
        file = libc.file_at(fake._state.maps[0].address)
        assert file is None or file[1] != str(fake.inode)
        assert grants.mapped == 0


def test_another_errno_of_the_map_call(fake: FakeXen, binding: str) -> None:
    """What is not EINVAL keeps the meaning that its errno has."""
    with (
        open_backend("xen", domid=DOMID, binding=binding, library=fake.library) as backend,
        backend.open_grants() as grants,
    ):
        fake.plan("xengnttab_map_domain_grant_refs", Behaviour.FAIL, errno.ENOMEM)
        with pytest.raises(XenCallError, match="reference 8: out of memory") as caught:
            grants.map(grant_address(8), 16, writable=False, result_out=[])
        assert caught.value.errno == errno.ENOMEM


def test_an_older_library(make_fake: MakeFake, binding: str) -> None:
    """Without what ends grants safely no page stays mapped; without copies none is copied."""
    fake = make_fake("OLD")
    fake.grant(8, 1)
    with (
        open_backend("xen", domid=DOMID, binding=binding, library=fake.library) as backend,
        backend.open_grants() as grants,
    ):
        with pytest.raises(UnsupportedOperationError, match="xengnttab_fd"):
            grants.map(grant_address(8), 16, writable=False, result_out=[])
        with pytest.raises(UnsupportedOperationError, match="xengnttab_grant_copy"):
            grants.read(grant_address(8), 16)
        assert (fake.granted(8), grants.mapped) == (0, 0)


def test_an_unknown_status_of_a_copy(fake: FakeXen, binding: str) -> None:
    """A status without a meaning here is shown as a number."""
    with (
        open_backend("xen", domid=DOMID, binding=binding, library=fake.library) as backend,
        backend.open_grants() as grants,
    ):
        fake.plan("xengnttab_grant_copy", Behaviour.FAIL, -13)
        with pytest.raises(XenCallError, match=r"reference 8: Xen refused it \(status -13\)"):
            grants.read(grant_address(8), 1)
