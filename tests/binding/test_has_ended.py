"""Whether a live domain has ended: libxenctrl says it of one that is dying, too."""

from __future__ import annotations

import errno

import pytest

from tests.fake_xen import DOMID, Behaviour, FakeXen
from xenmapcache import XenCallError, open_backend
from xenmapcache.binding.control import GET_INFO_LIST

DYING, SHUT_DOWN = 1 << 0, 1 << 2


@pytest.mark.parametrize("name", ["xen", "xenctrl"])
def test_has_ended(fake: FakeXen, binding: str, name: str) -> None:
    """Dying, or not there; one that has crashed and is kept for a look has not ended."""
    with open_backend(name, domid=DOMID, binding=binding, library=fake.library) as backend:
        assert backend.has_ended() is False
        for flags, ended in ((SHUT_DOWN, False), (DYING, True), (DYING | SHUT_DOWN, True)):
            fake.plan(GET_INFO_LIST, Behaviour.FAIL, -flags)
            assert backend.has_ended() is ended
        fake.plan(GET_INFO_LIST, Behaviour.FAIL, errno.ESRCH)
        assert backend.has_ended() is True
        fake.plan(GET_INFO_LIST, Behaviour.FAIL, errno.EPERM)
        with pytest.raises(XenCallError, match=GET_INFO_LIST):
            backend.has_ended()
    opened = fake.count("xc_interface_open")
    assert opened == fake.count("xc_interface_close")
