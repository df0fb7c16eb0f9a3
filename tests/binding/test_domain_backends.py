"""The backends over the libraries: what opening refuses, and moving a mapping when Xen fails."""

from __future__ import annotations

import errno
import gc
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest

from tests.fake_xen import DOMID, Behaviour, FakeXen
from tests.fake_xen.fixtures import MakeFake
from xenmapcache import Capability, GuestMemory, MapCache, Mapping, open_backend
from xenmapcache.address import PAGE_SIZE
from xenmapcache.backends import domain as domain_module
from xenmapcache.backends.xen import XenBackend
from xenmapcache.binding import libc
from xenmapcache.binding.control import MAXIMUM_GPFN, Control
from xenmapcache.errors import (
    BackendUnavailableError,
    FaultError,
    LeaseError,
    MappingLostError,
    UnsupportedOperationError,
    XenCallError,
)
from xenmapcache.mapping import live_mappings

MAP2, BULK = "xenforeignmemory_map2", "xc_map_foreign_bulk"


@pytest.fixture(params=["xen", "xenctrl"])
def name(request: pytest.FixtureRequest) -> str:
    """Both backends."""
    chosen: str = request.param
    return chosen


@pytest.fixture
def backend(fake: FakeXen, binding: str) -> Iterator[XenBackend]:
    """A backend that can move mappings."""
    with XenBackend(domid=DOMID, binding=binding, library=fake.library) as backend:
        yield backend


@pytest.fixture
def mapping(backend: XenBackend, fake: FakeXen) -> Mapping:
    """Guest pages 8 and 9, which say so."""
    for gfn in range(64):
        if gfn != 5:
            fake.write(gfn * PAGE_SIZE, b"page %d" % gfn)
    return backend.map(8, 2, writable=True)


# --- opening -----------------------------------------------------------------------


@pytest.mark.parametrize("domid", [-1, 0x7FF0, 1 << 32])
def test_domid_out_of_range(name: str, fake: FakeXen, domid: int) -> None:
    """What no domain can have as its number is a ValueError, before any library is touched."""
    with pytest.raises(ValueError, match=f"domid {domid} is not in 0..32751"):
        open_backend(name, domid=domid, library=fake.library)
    assert fake.calls == []


@pytest.mark.parametrize("domid", ["3", 3.0, None, b"3"])
def test_domid_of_another_type(name: str, fake: FakeXen, domid: object) -> None:
    """A domain's name, or anything but an int, is a TypeError that says so."""
    with pytest.raises(TypeError, match=f"domid must be an int, not {type(domid).__name__}"):
        open_backend(name, domid=domid, library=fake.library)
    assert fake.calls == []


def test_unknown_option(name: str) -> None:
    """An option that a backend does not know is a TypeError, as is a missing domid."""
    with pytest.raises(TypeError, match="colour"):
        open_backend(name, domid=3, colour=1)
    with pytest.raises(TypeError, match="domid"):
        open_backend(name)


def test_open_tells_what_it_took(name: str, fake: FakeXen, binding: str) -> None:
    """A backend knows its domain, its loader and its library, and probes one page at opening."""
    backend: Any = open_backend(name, domid=DOMID, binding=binding, library=fake.library)
    assert (backend.name, backend.domid) == (name, DOMID)
    assert (backend.binding, backend.library) == (binding, fake.library)
    probe = next(call for call in fake.calls if call.gfns)
    assert (probe.name, probe.gfns) == ({"xen": MAP2, "xenctrl": BULK}[name], (0,))
    assert probe.arguments[1] == DOMID
    moves = Capability.REMAP if name == "xen" else Capability.NONE
    assert backend.capabilities == Capability.WRITE | Capability.DIRTY | moves
    backend.close()


@pytest.mark.parametrize(
    ("domid", "capabilities", "hint"),
    [
        (DOMID + 1, "control_d\n", "there is no such domain (see xl list)"),
        (0, "control_d\n", "domain 0 is the one that this runs in"),
        (0, "", "there is no such domain (see xl list)"),
        (0, None, "there is no such domain (see xl list)"),
    ],
)
def test_no_such_domain(
    name: str,
    fake: FakeXen,
    binding: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    domid: int,
    capabilities: str | None,
    hint: str,
) -> None:
    """A domain that is not there, or is this one, is ESRCH with a hint; nothing is left open."""
    file = tmp_path / "capabilities"
    if capabilities is not None:
        file.write_text(capabilities)
    monkeypatch.setattr(domain_module, "_CAPABILITIES", file)
    gc.collect()
    before = live_mappings()
    with pytest.raises(XenCallError) as caught:
        open_backend(name, domid=domid, binding=binding, library=fake.library)
    assert (caught.value.errno, caught.value.domid) == (errno.ESRCH, domid)
    assert hint in str(caught.value)
    assert fake.calls[-1].name in ("xenforeignmemory_close", "xc_interface_close")
    assert fake.misuses == 0
    del caught
    gc.collect()
    assert live_mappings() == before


@pytest.mark.parametrize(("domid", "own"), [(0, True), (DOMID, False)])
def test_own_domain_by_xen_4_20_on_arm(
    name: str,
    fake: FakeXen,
    binding: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    domid: int,
    own: bool,
) -> None:
    """There Xen refuses each page of the own domain with EPERM, which means a policy elsewhere."""
    file = tmp_path / "capabilities"
    file.write_text("control_d\n")
    monkeypatch.setattr(domain_module, "_CAPABILITIES", file)
    fake.plan({"xen": MAP2, "xenctrl": BULK}[name], Behaviour.ALL_PAGES, errno.EPERM)
    with pytest.raises(XenCallError) as caught:
        open_backend(name, domid=domid, binding=binding, library=fake.library)
    assert (caught.value.errno == errno.ESRCH) == own
    assert ("domain 0 is the one that this runs in" in str(caught.value)) == own


def test_domain_that_vanishes(name: str, fake: FakeXen, binding: str) -> None:
    """A domain that was destroyed since is ESRCH at the next map, and not only holes."""
    call = {"xen": MAP2, "xenctrl": BULK}[name]
    with open_backend(name, domid=DOMID, binding=binding, library=fake.library) as backend:
        fake.plan(call, Behaviour.ALL_PAGES, errno.ESRCH)
        with pytest.raises(XenCallError) as caught:
            backend.map(8, 4, writable=False)
    assert (caught.value.call, caught.value.errno) == (call, errno.ESRCH)


def test_all_holes_are_no_error(name: str, fake: FakeXen, binding: str) -> None:
    """A range without a page is a mapping of holes only: the domain is there."""
    with open_backend(name, domid=DOMID, binding=binding, library=fake.library) as backend:
        mapping = backend.map(1000, 3, writable=False)
        assert mapping.holes == 3
        with pytest.raises(FaultError):
            mapping.view(0, 1)


def test_errors_that_are_not_written(name: str, fake: FakeXen, binding: str) -> None:
    """A page of which the library says nothing is a hole: to touch it might be a SIGBUS."""
    call = {"xen": MAP2, "xenctrl": BULK}[name]
    with open_backend(name, domid=DOMID, binding=binding, library=fake.library) as backend:
        fake.plan(call, Behaviour.PARTIAL)
        mapping = backend.map(8, 4, writable=False)
        assert mapping.errors == bytes([0, 0, errno.EIO, errno.EIO])


def test_an_address_where_no_page_begins(name: str, fake: FakeXen, binding: str) -> None:
    """It is an error of the library, and not memory to be unmapped later, which would fail."""
    call = {"xen": MAP2, "xenctrl": BULK}[name]
    with open_backend(name, domid=DOMID, binding=binding, library=fake.library) as backend:
        fake.plan(call, Behaviour.ASKEW)
        with pytest.raises(XenCallError, match="where no page begins"):
            backend.map(8, 4, writable=False)


@pytest.mark.parametrize("writable", [False, True])
def test_protection(name: str, fake: FakeXen, binding: str, writable: bool) -> None:
    """Only what is asked for is mapped for writing."""
    with open_backend(name, domid=DOMID, binding=binding, library=fake.library) as backend:
        backend.map(8, 1, writable=writable)
    prot = next(call for call in fake.calls[::-1] if call.gfns == (8,)).arguments[
        3 if name == "xen" else 2
    ]
    assert prot == mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)


# --- moving a mapping -----------------------------------------------------------------


def shown(mapping: Mapping) -> bytes:
    """Return how the mapping's first page begins."""
    return mapping.memory[:8].rstrip(b"\0")


def test_remap(backend: XenBackend, mapping: Mapping, fake: FakeXen) -> None:
    """The same host address shows the new pages, and a view that was kept writes to them."""
    view = mapping.view(0, mapping.length)
    backend.remap(mapping, 20)
    assert shown(mapping) == b"page 20"
    view[:4] = b"PAGE"
    assert fake.read(20 * PAGE_SIZE, 7) == b"PAGE 20"
    assert fake.read(8 * PAGE_SIZE, 6) == b"page 8"
    prot = mmap.PROT_READ | mmap.PROT_WRITE
    arguments = (ANY, DOMID, mapping.address, prot, libc.MAP_FIXED, 2, ANY, ANY)
    assert fake.calls[-1] == (MAP2, arguments, (20, 21))


def test_remap_to_a_hole(backend: XenBackend, mapping: Mapping, fake: FakeXen) -> None:
    """A page that is not there is a FaultError, found before the old memory is touched."""
    with pytest.raises(FaultError) as caught:
        backend.remap(mapping, 4)
    assert caught.value.address == 5 * PAGE_SIZE
    assert shown(mapping) == b"page 8"
    assert not any(call.name == MAP2 and call.arguments[4] for call in fake.calls)


def test_remap_that_failed_harmlessly(backend: XenBackend, mapping: Mapping, fake: FakeXen) -> None:
    """When the call fails and the old memory is still there, it stays."""
    fake.plan(MAP2, Behaviour.FAIL, errno.ENOMEM, nth=2)
    with pytest.raises(XenCallError) as caught:
        backend.remap(mapping, 20)
    assert not isinstance(caught.value, MappingLostError)
    assert caught.value.errno == errno.ENOMEM
    assert shown(mapping) == b"page 8"
    mapping.memory[:4] = b"PAGE"
    assert fake.read(8 * PAGE_SIZE, 6) == b"PAGE 8"


@pytest.mark.parametrize(
    ("behaviour", "number"), [(Behaviour.DROP, errno.ENOMEM), (Behaviour.ALL_PAGES, errno.EINVAL)]
)
def test_remap_that_lost_the_memory(
    backend: XenBackend,
    mapping: Mapping,
    fake: FakeXen,
    behaviour: Behaviour,
    number: int,
) -> None:
    """When the old memory went, or a new page vanished, views show zeros that reach no guest."""
    view = mapping.view(0, mapping.length)
    fake.plan(MAP2, behaviour, number, nth=2)
    with pytest.raises(MappingLostError) as caught:
        backend.remap(mapping, 20)
    assert caught.value.errno == number
    assert view == bytes(mapping.length)
    view[:4] = b"lost"
    assert fake.read(8 * PAGE_SIZE, 6) == b"page 8"
    assert fake.read(20 * PAGE_SIZE, 7) == b"page 20"


def test_a_lease_whose_memory_was_lost_is_stale(backend: XenBackend, fake: FakeXen) -> None:
    """Through the cache, the lease stays, is stale, and reads as zeros."""
    fake.write(8 * PAGE_SIZE, b"device")
    with MapCache(backend, bucket_shift=14) as cache:
        lease = cache.map_device(8 * PAGE_SIZE, PAGE_SIZE, owner="vga")
        view = lease.view
        fake.plan(MAP2, Behaviour.DROP, errno.ENOMEM, nth=2)
        with pytest.raises(MappingLostError):
            cache.replace(8 * PAGE_SIZE, 20 * PAGE_SIZE, PAGE_SIZE)
        assert lease.stale
        assert view == bytes(PAGE_SIZE)
        lease.release()
        with pytest.raises(LeaseError):
            lease.release()


def test_a_lost_address_that_another_thread_was_given(
    backend: XenBackend, fake: FakeXen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that something else got since is neither shown by the lease nor unmapped."""
    map_zeros_over = libc.map_zeros_over
    stolen = []

    def thief_first(address: int, length: int, *, replace: bool = False) -> bool:
        assert map_zeros_over(address, length)  # stands for another thread's mmap
        stolen.append((address, length))
        return map_zeros_over(address, length, replace=replace)

    with MapCache(backend, bucket_shift=14) as cache:
        lease = cache.map_device(8 * PAGE_SIZE, PAGE_SIZE, owner="vga")
        fake.plan(MAP2, Behaviour.DROP, errno.ENOMEM, nth=2)
        monkeypatch.setattr(libc, "map_zeros_over", thief_first)
        with pytest.raises(MappingLostError, match="another thread has its address now"):
            cache.replace(8 * PAGE_SIZE, 20 * PAGE_SIZE, PAGE_SIZE)
        assert lease.stale
        with pytest.raises(LeaseError, match="was lost"):
            _ = lease.view
        lease.release()
    ((address, length),) = stolen
    assert libc.file_at(address) is not None
    libc.unmap(address, length)


def test_remap_elsewhere_than_asked(backend: XenBackend, mapping: Mapping, fake: FakeXen) -> None:
    """A library that ignores the address is an error; its stray mapping goes, the old one stays."""
    before = stray_maps(fake)
    fake.plan(MAP2, Behaviour.IGNORE, nth=2)
    with pytest.raises(XenCallError, match=f"ignored the address {mapping.address:#x}") as caught:
        backend.remap(mapping, 20)
    assert not isinstance(caught.value, MappingLostError)
    assert caught.value.errno == errno.EIO
    assert shown(mapping) == b"page 8"
    del caught
    assert stray_maps(fake) == before


def stray_maps(fake: FakeXen) -> int:
    """Return how many pieces of the stand-in's guest memory this process has mapped."""
    gc.collect()
    inode = fake.inode
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    return sum(int(line.split()[4]) == inode for line in lines)


def test_remap_without_map2(make_fake: MakeFake, binding: str) -> None:
    """An old library has no REMAP, and moving raises, naming the function and the release."""
    old = make_fake("OLD")
    with XenBackend(domid=DOMID, binding=binding, library=old.library) as backend:
        assert Capability.REMAP not in backend.capabilities
        mapping = backend.map(8, 1, writable=True)
        with pytest.raises(UnsupportedOperationError, match=f"no {MAP2}: Xen 4.10"):
            backend.remap(mapping, 9)


def test_control_backend_cannot_remap(fake: FakeXen, binding: str) -> None:
    """The legacy library takes no address, so moving is refused without a call."""
    with open_backend("xenctrl", domid=DOMID, binding=binding, library=fake.library) as backend:
        mapping = backend.map(8, 1, writable=True)
        calls = len(fake.calls)
        with pytest.raises(UnsupportedOperationError, match="'xenctrl' cannot move"):
            backend.remap(mapping, 9)
        assert len(fake.calls) == calls


# --- the end of memory --------------------------------------------------------------


def test_memory_ends_where_xen_says(name: str, fake: FakeXen, binding: str) -> None:
    """It is asked for when it is needed, and once; the handle for it is closed."""
    with open_backend(name, domid=DOMID, binding=binding, library=fake.library) as backend:
        assert fake.count(MAXIMUM_GPFN) == 0
        assert backend.memory_end == backend.memory_end == 64 * PAGE_SIZE
        assert fake.count(MAXIMUM_GPFN) == 1
        call = next(call for call in fake.calls if call.name == MAXIMUM_GPFN)
        assert call.arguments == (ANY, DOMID, ANY)
        with MapCache(backend, bucket_shift=14) as cache:
            fake.write(63 * PAGE_SIZE, b"needle")
            assert list(GuestMemory(cache).find(b"needle")) == [(63 * PAGE_SIZE, b"needle")]
    assert fake.count("xc_interface_open") == fake.count("xc_interface_close")
    assert fake.misuses == 0


@pytest.mark.parametrize("number", [errno.EPERM, errno.ESRCH])
def test_an_end_that_xen_refuses_to_tell(
    name: str, fake: FakeXen, binding: str, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    """It is None then, and the reason is logged at INFO, once."""
    with open_backend(name, domid=DOMID, binding=binding, library=fake.library) as backend:
        fake.plan(MAXIMUM_GPFN, Behaviour.FAIL, number)
        with caplog.at_level("INFO", "xenmapcache"):
            assert backend.memory_end is None
            assert backend.memory_end is None
    (message,) = (each for each in caplog.messages if "the end of its memory" in each)
    assert errno.errorcode[number] in message


def test_an_end_without_libxenctrl(
    make_fake: MakeFake,
    binding: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where the library is missing, or has no such function, the end is not known."""
    fake = make_fake("ALONE")

    def absent(**_: object) -> Control:
        raise BackendUnavailableError("libxenctrl.so.* is in none of: install it")

    monkeypatch.setattr(domain_module, "Control", absent)
    with caplog.at_level("INFO", "xenmapcache"):
        with open_backend("xen", domid=DOMID, binding=binding, library=fake.library) as backend:
            assert backend.memory_end is None
    assert "the end of its memory is not known: libxenctrl.so.* is in none of" in caplog.text
    monkeypatch.undo()
    with Control(binding=binding, library=fake.library) as control:
        with pytest.raises(UnsupportedOperationError, match="no function xc_domain_maximum_gpfn"):
            control.maximum_gfn(DOMID)


@pytest.mark.parametrize("name", ["xen", "xenctrl"])
def test_a_page_with_the_errno_of_no_domain(name: str, fake: FakeXen, binding: str) -> None:
    """One such page is a hole: only where all have it, the domain is not there."""
    with open_backend(name, domid=DOMID, binding=binding, library=fake.library) as backend:
        fake.set_error(errno.ESRCH, 9)
        assert backend.map(8, 2, writable=False).errors == bytes([0, errno.ESRCH])


def test_read_only_memory_stays_so_when_it_moves(backend: XenBackend, fake: FakeXen) -> None:
    """No call of a move, neither the look at the new pages nor the move itself, asks for more."""
    mapping = backend.map(8, 1, writable=False)
    backend.remap(mapping, 20)
    moves = [call.arguments[3] for call in fake.calls if call.gfns == (20,)]
    assert moves == [mmap.PROT_READ] * 2


def test_a_move_names_the_errno_of_the_page_that_went(
    backend: XenBackend, fake: FakeXen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the pages before it are there."""
    mapping = backend.map(8, 3, writable=True)
    really = backend._memory.map

    def vanish(*arguments: object, **options: object) -> tuple[int, bytes | None]:
        if options.get("flags"):
            fake.set_error(errno.ENOENT, 21)
        return really(*arguments, **options)  # type: ignore[arg-type] # as they came

    monkeypatch.setattr(backend._memory, "map", vanish)
    with pytest.raises(MappingLostError) as caught:
        backend.remap(mapping, 20)
    assert caught.value.errno == errno.ENOENT
