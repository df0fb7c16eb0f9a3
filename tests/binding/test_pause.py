"""Pausing a live domain: Xen counts pauses, and each of ours is undone once."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

from tests.fake_xen import DOMID, Behaviour, FakeXen
from tests.fake_xen.fixtures import MakeFake
from xenmapcache import Backend, UnsupportedOperationError, XenCallError, open_backend
from xenmapcache.binding.control import PAUSE, UNPAUSE, Control


@pytest.fixture(params=["xen", "xenctrl"])
def backend(request: pytest.FixtureRequest, fake: FakeXen, binding: str) -> Iterator[Backend]:
    """Both backends."""
    with open_backend(request.param, domid=DOMID, binding=binding, library=fake.library) as backend:
        yield backend


def calls(fake: FakeXen) -> list[str]:
    """Return the calls that pause and unpause, which are all about our domain."""
    found = [call for call in fake.calls if call.name in (PAUSE, UNPAUSE)]
    assert {call.arguments[1] for call in found} <= {DOMID}
    return [call.name for call in found]


def test_once_each(backend: Backend, fake: FakeXen) -> None:
    """A second pause calls nothing, and what was not paused is not unpaused."""
    backend.unpause()
    assert calls(fake) == []
    for _ in range(2):
        backend.pause()
        backend.pause()
        backend.unpause()
        backend.unpause()
    assert calls(fake) == [PAUSE, UNPAUSE] * 2
    assert fake.misuses == 0


def test_a_pause_that_fails(backend: Backend, fake: FakeXen) -> None:
    """It raises, and nothing is unpaused: another program may have paused the guest."""
    fake.plan(PAUSE, Behaviour.FAIL, errno.EPERM)
    with pytest.raises(XenCallError, match=PAUSE):
        backend.pause()
    backend.unpause()
    assert calls(fake) == [PAUSE]
    backend.pause()
    backend.unpause()
    assert calls(fake) == [PAUSE, PAUSE, UNPAUSE]


def test_an_unpause_that_fails(backend: Backend, fake: FakeXen) -> None:
    """It raises, and can be called again."""
    backend.pause()
    fake.plan(UNPAUSE, Behaviour.FAIL, errno.EPERM)
    with pytest.raises(XenCallError, match=UNPAUSE):
        backend.unpause()
    backend.unpause()
    backend.unpause()
    assert calls(fake) == [PAUSE, UNPAUSE, UNPAUSE]


def test_a_domain_that_is_gone(backend: Backend, fake: FakeXen) -> None:
    """A domain that was destroyed needs no unpause."""
    backend.pause()
    fake.plan(UNPAUSE, Behaviour.FAIL, errno.ESRCH)
    backend.unpause()
    backend.unpause()
    assert calls(fake) == [PAUSE, UNPAUSE]


def test_the_handle_is_closed(fake: FakeXen, binding: str) -> None:
    """The handle that pauses stays open until the backend is closed, and not longer."""
    with open_backend("xen", domid=DOMID, binding=binding, library=fake.library) as backend:
        backend.pause()
        assert fake.count("xc_interface_open") == fake.count("xc_interface_close") + 1
        backend.unpause()
    assert fake.count("xc_interface_open") == fake.count("xc_interface_close")


def test_a_library_without_it(make_fake: MakeFake, binding: str) -> None:
    """The error names the function."""
    fake = make_fake("ALONE")
    with Control(binding=binding, library=fake.library) as control:
        for call in (control.pause, control.unpause):
            with pytest.raises(UnsupportedOperationError, match="no function xc_domain_"):
                call(DOMID, result_out=[])
