"""The mock is a small Xen: what it does on purpose."""

from __future__ import annotations

import errno
import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import HOLE
from xenmapcache import (
    Backend,
    ClosedError,
    FaultError,
    MapCache,
    MappingLostError,
    MockDomain,
    MockHypervisor,
    XenCallError,
    open_backend,
)
from xenmapcache.address import PAGE_SHIFT, PAGE_SIZE
from xenmapcache.binding import libc


def test_a_hole_really_faults(domain: MockDomain) -> None:
    """Touching a page whose errno is not zero kills, as on Xen: the guard is the Mapping."""
    code = (
        "from xenmapcache import *\n"
        "d = MockHypervisor().create_domain(memory='64k', holes=[(0x1000, 0x1000)])\n"
        "m = open_backend('mock', domain=d).map(0, 16, writable=True)\n"
        "try: m.view(0x1000, 1)\n"
        "except FaultError: m.bytes[0x1000]\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode < 0


def test_a_reballooned_page_has_a_new_frame(domain: MockDomain, backend: Backend) -> None:
    """The old mapping shows the orphan, a new one the new, zeroed frame."""
    domain.write(0x5000, b"old")
    old = backend.map(5, 1, writable=True)
    domain.balloon_out(0x5000, 0x1000)
    with pytest.raises(FaultError):
        domain.read(0x5000, 1)
    domain.balloon_in(0x5000, 0x1000)
    new = backend.map(5, 1, writable=True)
    assert bytes(old.view(0, 3)) == b"old"
    assert bytes(new.view(0, 3)) == bytes(3)
    old.view(0, 3)[:] = b"dma"
    assert domain.read(0x5000, 3) == bytes(3)


def test_ballooning_sends_bursts(domain: MockDomain) -> None:
    """An INVALIDATE for each 84 pages given up; none for pages got or not there."""
    calls = []
    domain.on_invalidate(lambda: calls.append(1))
    domain.balloon_out(0x100000, 168 * 0x1000)
    assert len(calls) == 2
    domain.balloon_out(0x100000, 169 * 0x1000)
    assert len(calls) == 3
    domain.balloon_in(0x100000, 169 * 0x1000)
    domain.balloon_out(0xA0000, 0x20000)
    assert len(calls) == domain.invalidations == 3


def test_memory_can_be_added_behind_the_end(domain: MockDomain, cache: MapCache) -> None:
    """Ballooning in grows the guest; what lies between stays a hole."""
    domain.balloon_in(0x1100000, 0x1000)
    domain.write(0x1100000, b"hot")
    assert domain.memory_end == 0x1101000
    assert cache.read(0x1100000, 3) == b"hot"
    with pytest.raises(FaultError):
        cache.read(0x1000000, 1)


@pytest.mark.parametrize(
    ("address", "length", "message"),
    [
        (0x1001, 0x1000, "must be multiples of 0x1000"),
        (0x1000, 0x10, "must be multiples of 0x1000"),
        (0xFFF000, 0x2000, "ends beyond the domain's memory, 0x1000000"),
        (0x1000, 0, "is 0"),
    ],
)
def test_ballooning_takes_whole_pages(
    domain: MockDomain, address: int, length: int, message: str
) -> None:
    """Wrong ranges are named."""
    with pytest.raises(ValueError, match=message):
        domain.balloon_out(address, length)


def test_faults_can_be_armed(domain: MockDomain, backend: Backend) -> None:
    """The n-th call, for a frame, with an errno, once or each time; and disarmed."""
    domain.inject_fault("map", errno=errno.EIO, nth=2)
    backend.map(0, 1, writable=True)
    with pytest.raises(XenCallError, match="EIO"):
        backend.map(0, 1, writable=True)
    backend.map(0, 1, writable=True)
    domain.inject_fault("mark_dirty", errno=errno.EPERM, gfn=5, repeat=True)
    backend.mark_dirty(4, 1)
    for _ in range(2):
        with pytest.raises(XenCallError, match="EPERM"):
            backend.mark_dirty(4, 2)
    domain.clear_faults()
    backend.mark_dirty(4, 2)
    for wrong, message in (
        ({"call": "read"}, "call 'read' must be one of"),
        ({"call": "map", "nth": 0}, "calls are counted from 1"),
        ({"call": "map", "errno": -5}, "errno -5 must be"),
        ({"call": "map", "errno": 300}, "errno 300 must be"),
        ({"call": "map", "nth": 2}, "a fault of 'map' needs an errno to fail with, or a delay"),
    ):
        with pytest.raises(ValueError, match=message):
            domain.inject_fault(**wrong)


def test_calls_are_logged_in_order(domain: MockDomain, backend: Backend) -> None:
    """Name, frame, pages and errno of each."""
    domain.inject_fault("map", errno=errno.EIO, nth=2)
    mapping = backend.map(3, 2, writable=True)
    with pytest.raises(XenCallError):
        backend.map(4, 1, writable=True)
    backend.remap(mapping, 7)
    backend.mark_dirty(7, 1)
    del mapping
    assert domain.calls == (
        ("map", 3, 2, 0),
        ("map", 4, 1, errno.EIO),
        ("remap", 7, 2, 0),
        ("mark_dirty", 7, 1, 0),
        ("unmap", None, 2, 0),
    )


def test_a_destroyed_domain_lives_on_where_it_is_mapped(
    domain: MockDomain, cache: MapCache
) -> None:
    """Resident memory reads; new pages are not there, and after the last mapping no domain is."""
    domain.write(0x2000, b"dying")
    cache.read(0x2000, 5)
    domain.destroy()
    assert cache.read(0x2000, 5) == b"dying"
    with pytest.raises(FaultError, match="no page at 0x200000: EINVAL"):
        cache.read(0x200000, 1)
    cache.invalidate()
    with pytest.raises(XenCallError, match="ESRCH.*there is no such domain"):
        cache.read(0x2000, 1)


def test_domains_do_not_share_memory() -> None:
    """Two guests of one hypervisor have frames of their own."""
    hypervisor = MockHypervisor()
    first, second = (hypervisor.create_domain(memory="64k") for _ in range(2))
    first.write(0, b"first")
    assert second.read(0, 5) == bytes(5)
    assert hypervisor.domains == {1: first, 2: second}


def test_a_closed_backend_takes_no_reports(backend: Backend, cache: MapCache) -> None:
    """As over Xen: once it is closed, a release that has written pages to report is refused."""
    lease = cache.map_dma(0x1000, 8, owner="late")
    backend.close()
    with pytest.raises(ClosedError):
        lease.release()
    assert not lease.released


def test_its_memory_cannot_be_cut_off(domain: MockDomain, cache: MapCache) -> None:
    """Who has the machine's descriptor cannot truncate it under a mapping, which were a SIGBUS."""
    with pytest.raises(PermissionError):
        os.ftruncate(domain.p2m.frames.fileno(), 0)
    domain.balloon_in(domain.memory_end, 0x1000)
    cache.write(domain.memory_end - 1, b"x")


def test_nothing_stays_open() -> None:
    """When hypervisor, backend and mappings are gone, so are the memfd and the memory."""

    def descriptors() -> int:
        gc.collect()  # a hypervisor and its domains know each other
        return len(os.listdir("/proc/self/fd"))

    with open_backend("mock", memory="64k"):
        pass
    before = descriptors()
    backend = open_backend("mock", memory="64k")
    mapping = backend.map(0, 16, writable=True)
    assert descriptors() == before + 1
    del backend
    view = mapping.view(0, 1)
    del mapping
    assert bytes(view) == b"\0"
    view.release()
    assert descriptors() == before


@pytest.mark.parametrize("function", ["dont_fork", "map_file"])
def test_a_map_call_that_the_kernel_fails_leaves_nothing(
    domain: MockDomain, backend: Backend, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    """What was mapped of it is unmapped before the error is raised."""

    def fail(*_: object, **__: object) -> None:
        raise XenCallError(function, None, errno.ENOMEM)

    domain.balloon_out(0x5000, 0x1000)  # so that it takes more than one call
    before = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    with monkeypatch.context() as patch:
        patch.setattr(libc, function, fail)
        with pytest.raises(XenCallError) as caught:
            backend.map(0, 16, writable=True)
    assert caught.value.errno == errno.ENOMEM
    after = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    assert [line for line in after if "xenmapcache-mock" in line] == [
        line for line in before if "xenmapcache-mock" in line
    ]
    backend.map(0, 16, writable=True)


def test_a_failed_call_is_an_os_error() -> None:
    """What handles an OSError finds in it what the system says of its errno."""
    error = XenCallError("mock_map", 1, errno.ENOMEM)
    assert (error.errno, error.strerror) == (errno.ENOMEM, os.strerror(errno.ENOMEM))


def test_read_only_memory_is_mapped_so(backend: Backend) -> None:
    """By the kernel too, so that native code that writes to it fails as on Xen."""
    mapping = backend.map(0, 4, writable=False)
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    (line,) = (line for line in lines if line.startswith(f"{mapping.address:x}-"))
    assert line.split()[1] == "r--s"


def test_the_vcpu_that_balloons_is_the_one_that_waits(
    domain: MockDomain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For each 84 pages, and for what remains."""
    asked: list[int] = []
    monkeypatch.setattr(domain, "send_invalidate", lambda *, vcpu=0: asked.append(vcpu))
    domain.balloon_out(0x200000, 85 * PAGE_SIZE, vcpu=3)
    assert asked == [3, 3]


def test_pages_that_are_there_keep_their_frames(domain: MockDomain) -> None:
    """Ballooning in is for what is not there; the rest of the range keeps its content."""
    domain.write(0x200000, b"kept")
    domain.balloon_out(0x200000 + PAGE_SIZE, PAGE_SIZE)
    domain.balloon_in(0x200000, 2 * PAGE_SIZE)
    assert domain.read(0x200000, 4) == b"kept"


def test_servers_are_asked_before_listeners(
    domain: MockDomain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The callbacks of a device model may have DMA to finish in a cache that listens."""
    order: list[str] = []
    monkeypatch.setattr(domain.vcpu[0], "send_invalidate", lambda: order.append("servers"))
    domain.on_invalidate(lambda: order.append("listener"))
    domain.send_invalidate()
    assert order == ["servers", "listener"]


def test_a_listener_that_comes_during_an_invalidate(domain: MockDomain) -> None:
    """It is called from the next one on."""
    calls: list[int] = []
    domain.on_invalidate(lambda: domain.on_invalidate(lambda: calls.append(1)))
    domain.send_invalidate()
    assert calls == []
    domain.send_invalidate()
    assert calls == [1]


def test_two_faults_at_once(
    domain: MockDomain, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call that is to be slow and to fail is both, and delays add up."""
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    domain.inject_fault("map", errno=errno.EIO, delay=1)
    domain.inject_fault("map", delay=2)
    with pytest.raises(XenCallError, match="EIO"):
        backend.map(0, 1, writable=True)
    assert slept == [3]


def test_a_fault_of_the_guest_itself(domain: MockDomain) -> None:
    """It names what cannot be reached and how much, and of a write nothing arrives."""
    for access in (
        lambda: domain.read(HOLE[0] - 4, 8),
        lambda: domain.write(HOLE[0] - 4, b"12345678"),
    ):
        with pytest.raises(FaultError) as caught:
            access()
        assert (caught.value.address, caught.value.length) == (HOLE[0], 4)
    assert domain.read(HOLE[0] - 4, 4) == bytes(4)


def test_a_fault_of_a_move(cache: MapCache) -> None:
    """It says how much of the new range lies from the first hole on."""
    cache.map_device(0x200000, 0x3000, owner="vram")
    with pytest.raises(FaultError) as caught:
        cache.replace(0x200000, HOLE[0] - PAGE_SIZE, 0x3000)
    assert (caught.value.address, caught.value.length) == (HOLE[0], 0x2000)


def test_reports_of_a_domain_that_is_gone(domain: MockDomain, backend: Backend) -> None:
    """As over Xen they are accepted: nothing is left to be migrated."""
    domain.inject_fault("map", errno=errno.EIO)
    domain.destroy()
    backend.mark_dirty(3, 1)
    assert domain.dirty_gfns == {3}


def test_read_only_memory_stays_so_when_it_moves(backend: Backend) -> None:
    """In the kernel's eyes too."""
    mapping = backend.map(0, 4, writable=False)
    backend.remap(mapping, 8)
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    (line,) = (line for line in lines if line.startswith(f"{mapping.address:x}-"))
    assert line.split()[1] == "r--s"


def test_a_failed_move_loses_the_memory(domain: MockDomain, backend: Backend) -> None:
    """As on Xen, where the old mapping is gone before the new one is there."""
    mapping = backend.map(0, 4, writable=True)
    domain.write(0, b"old")
    domain.inject_fault("remap", errno=errno.ENOMEM, gfn=9)
    assert [(fault.call, fault.gfn) for fault in domain.faults.pending] == [("remap", 9)]
    with pytest.raises(MappingLostError, match="ENOMEM"):
        backend.remap(mapping, 8)
    assert not domain.faults.pending
    assert mapping.view(0, PAGE_SIZE) == bytes(PAGE_SIZE)


def test_the_machines_descriptor_is_public() -> None:
    """For a test that looks at its memory in /proc."""
    hypervisor = MockHypervisor()
    domain = hypervisor.create_domain(memory="64k")
    domain.write(0, b"in the file")
    assert os.pread(hypervisor.fd, 11, 0) == b"in the file"


def test_present_pages_are_known_without_mapping(domain: MockDomain, backend: Backend) -> None:
    """Runs that do not touch, whatever their frames are; nothing is mapped for it."""
    end = domain.memory_end >> PAGE_SHIFT
    hole = (HOLE[0] >> PAGE_SHIFT, HOLE[0] + HOLE[1] >> PAGE_SHIFT)
    domain.balloon_out(0x5000, 0x1000)
    domain.balloon_in(0x5000, 0x1000)
    assert list(backend.present(0, end) or ()) == [(0, hole[0]), (hole[1], end - hole[1])]
    assert list(backend.present(hole[0], 1) or ()) == []
    assert domain.calls == ()
    backend.close()
    with pytest.raises(ClosedError):
        backend.present(0, 1)


@pytest.mark.parametrize(
    "change",
    [
        lambda domain: domain.inject_fault("map", errno=errno.ENOENT, gfn=3, repeat=True),
        lambda domain: domain.destroy(),
    ],
    ids=["injected fault", "destroyed"],
)
def test_present_pages_that_only_mapping_tells(
    domain: MockDomain, backend: Backend, change: Callable[[MockDomain], None]
) -> None:
    """A page that cannot be mapped must not be called present."""
    change(domain)
    assert backend.present(0, 16) is None


def test_a_range_over_a_whole_hole_ends_at_the_hole(domain: MockDomain) -> None:
    """The memory after the hole is not reached."""
    with pytest.raises(FaultError) as caught:
        domain.read(HOLE[0] - 4, HOLE[1] + 8)
    assert (caught.value.address, caught.value.length) == (HOLE[0], HOLE[1] + 4)


def test_written_pages_of_a_screen(domain: MockDomain, backend: Backend) -> None:
    """At first the complete range counts as written, then only what has changed since."""
    assert backend.track_dirty_vram(4, 8) == [(4, 8)]
    assert backend.track_dirty_vram(4, 8) == []
    domain.write(0x3FFF, b"1234")
    domain.write(0x6000, b"5")
    domain.write(0xBFFF, b"67")
    assert backend.track_dirty_vram(4, 8) == [(4, 1), (6, 1), (11, 1)]
    assert backend.track_dirty_vram(4, 8) == []
    assert backend.track_dirty_vram(5, 8) == [(5, 8)]
    assert backend.track_dirty_vram(0, 0) == []
    assert backend.track_dirty_vram(5, 8) == [(5, 8)]


def test_a_page_of_a_screen_that_goes(domain: MockDomain, backend: Backend) -> None:
    """A page that was given up counts as written, once."""
    backend.track_dirty_vram(4, 8)
    domain.balloon_out(0x5000, 0x1000)
    assert backend.track_dirty_vram(4, 8) == [(5, 1)]
    assert backend.track_dirty_vram(4, 8) == []
