"""Ctrl-C while Xen maps: it comes when the call has returned, and nothing is left mapped."""

from __future__ import annotations

import errno
import os
import signal
import threading
from array import array
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.fake_xen import DOMID, Behaviour, FakeXen
from tests.fake_xen.fixtures import MakeFake
from xenmapcache import MapCache, open_backend
from xenmapcache.address import PAGE_SIZE
from xenmapcache.backends.xen import XenBackend

from .test_domain_backends import stray_maps

MAP, MAP2, BULK = "xenforeignmemory_map", "xenforeignmemory_map2", "xc_map_foreign_bulk"

pytestmark = pytest.mark.slow


@contextmanager
def interrupted(fake: FakeXen, call: str, *, nth: int = 1) -> Iterator[None]:
    """Let SIGINT come while a call of the library blocks, and KeyboardInterrupt be expected."""

    def press() -> None:
        fake.wait_until_blocked()
        os.kill(os.getpid(), signal.SIGINT)
        fake.unblock()

    fake.plan(call, Behaviour.BLOCK, nth=nth)
    thread = threading.Thread(target=press)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        thread.join()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("call", [MAP2, MAP, BULK])
def test_a_map_that_is_interrupted_leaves_nothing(
    call: str, make_fake: MakeFake, binding: str
) -> None:
    """What Xen had mapped by then is unmapped, or a destroyed guest could not go."""
    fake = make_fake("OLD" if call == MAP else "")
    name = "xenctrl" if call == BULK else "xen"
    with open_backend(name, domid=DOMID, binding=binding, library=fake.library) as backend:
        with MapCache(backend, bucket_shift=14) as cache:
            before = stray_maps(fake)
            with interrupted(fake, call):
                cache.read(0, 1)
            assert stray_maps(fake) == before
            assert cache.stats().resident_bytes == 0
            assert cache.read(0, 1) == b"\0"


@pytest.mark.timeout(60)
@pytest.mark.parametrize("vanishes", [False, True])
def test_a_move_that_is_interrupted(fake: FakeXen, binding: str, vanishes: bool) -> None:
    """The lease is stale, and its view safe, also where a page of the new range has gone."""
    with open_backend("xen", domid=DOMID, binding=binding, library=fake.library) as backend:
        with MapCache(backend, bucket_shift=14) as cache:
            lease = cache.map_device(0x8000, PAGE_SIZE, owner="vga")
            view = lease.view
            fake.write(0x9000, b"new")
            # Twice, as replace() looks at the new pages first.
            with interrupted(fake, MAP2, nth=2):
                unblock = fake.unblock

                def vanish_first() -> None:
                    fake.set_error(errno.EINVAL if vanishes else 0, 9)
                    unblock()

                fake.unblock = vanish_first  # type: ignore[method-assign] # for this once
                cache.replace(0x8000, 0x9000, PAGE_SIZE)
            assert lease.stale
            assert view == bytes(PAGE_SIZE)
            view[:4] = b"lost"
            fake.set_error(0, 9)
            assert fake.read(0x9000, 4) == b"new\0"
            lease.release()


@pytest.mark.parametrize("asked", [False, True])
def test_a_move_that_is_interrupted_when_nothing_is_mapped(
    fake: FakeXen, binding: str, monkeypatch: pytest.MonkeyPatch, asked: bool
) -> None:
    """Before Xen is asked, or when it refused: the mapping shows what it did, and can be moved."""
    fake.write(0x8000, b"old")
    fake.write(0x9000, b"new")
    with XenBackend(domid=DOMID, binding=binding, library=fake.library) as backend:
        mapping = backend.map(8, 1, writable=True)
        really = backend._memory.map

        def press(
            domid: int,
            prot: int,
            gfns: array[int],
            *,
            address: int = 0,
            flags: int = 0,
            result_out: list[int] | None = None,
        ) -> tuple[int, bytes | None]:
            if flags:
                assert result_out == []
                result_out += [0] * asked
                raise KeyboardInterrupt
            return really(domid, prot, gfns, result_out=result_out)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(backend._memory, "map", press)
            backend.remap(mapping, 9)
        assert bytes(mapping.view(0, 3)) == b"old"
        backend.remap(mapping, 9)
        assert bytes(mapping.view(0, 3)) == b"new"
