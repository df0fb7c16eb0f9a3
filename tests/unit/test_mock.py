"""The mock is a small Xen: what it does on purpose."""

from __future__ import annotations

import errno
import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

from xenmapcache import (
    Backend,
    ClosedError,
    FaultError,
    MapCache,
    MockDomain,
    MockHypervisor,
    XenCallError,
    open_backend,
)
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
        (0x1001, 0x1000, "whole, of 4 KiB"),
        (0x1000, 0x10, "whole, of 4 KiB"),
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
    """The n-th call, for a frame, with an errno, once or for good; and disarmed."""
    domain.arm("map", errno=errno.EIO, nth=2)
    backend.map(0, 1, writable=True)
    with pytest.raises(XenCallError, match="EIO"):
        backend.map(0, 1, writable=True)
    backend.map(0, 1, writable=True)
    domain.arm("mark_dirty", errno=errno.EPERM, gfn=5, repeat=True)
    backend.mark_dirty(4, 1)
    for _ in range(2):
        with pytest.raises(XenCallError, match="EPERM"):
            backend.mark_dirty(4, 2)
    domain.disarm()
    backend.mark_dirty(4, 2)
    for wrong, message in (
        ({"call": "read"}, "call 'read' is none of"),
        ({"call": "map", "nth": 0}, "calls are counted from 1"),
        ({"call": "map", "errno": -5}, "errno -5 is none"),
        ({"call": "map", "errno": 300}, "errno 300 is none"),
    ):
        with pytest.raises(ValueError, match=message):
            domain.arm(**wrong)


def test_calls_are_logged_in_order(domain: MockDomain, backend: Backend) -> None:
    """Name, frame, pages and errno of each."""
    domain.arm("map", errno=errno.EIO, nth=2)
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
    with pytest.raises(FaultError, match="no page at 0x200000 .*EINVAL"):
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
        os.ftruncate(domain._hypervisor.fd, 0)
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
