"""No path touches a page that could not be mapped, over stand-ins where a touch is a crash."""

from __future__ import annotations

import faulthandler
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.failed_pages import HOLES, PAGES, exercise
from tests.fake_xen import DOMID
from tests.fake_xen.child import in_child
from tests.fake_xen.fixtures import MakeFake
from xenmapcache import (
    Backend,
    MockHypervisor,
    open_backend,
    open_source,
    write_coredump,
    write_lime,
    write_vmcore,
)
from xenmapcache.address import PAGE_SIZE
from xenmapcache.cli import main

GFN = 0x100
END = (GFN + PAGES) * PAGE_SIZE
Reopen = Callable[[], Backend]


@pytest.fixture(params=["mock", "xen-cffi", "xen-ctypes", "xenctrl-cffi", "xenctrl-ctypes"])
def reopen(request: pytest.FixtureRequest, make_fake: MakeFake) -> Iterator[Reopen]:
    """Opens a guest with holes."""
    name, _, binding = request.param.partition("-")
    holes = [(GFN + page, count) for page, count in HOLES]
    if name == "mock":
        bytes_of = [(gfn * PAGE_SIZE, count * PAGE_SIZE) for gfn, count in holes]

        def open_mock() -> Backend:
            # Made where it is used: a forked child may not use its parent's.
            domain = MockHypervisor().create_domain(memory=END, holes=bytes_of)
            return open_backend("mock", domain=domain)

        yield open_mock
        return
    fake = make_fake(pages=GFN + PAGES, holes=holes)
    yield lambda: open_backend(name, domid=DOMID, binding=binding, library=fake.library)
    assert fake.misuses == 0


def test_a_touch_would_be_seen(reopen: Reopen) -> None:
    """A touch ends the process, and a system call fails: otherwise the tests below show nothing."""

    def touch() -> bool:
        faulthandler.disable()
        with reopen() as backend:
            mapping = backend.map(GFN, PAGES, writable=False)
            place = HOLES[0][0] * PAGE_SIZE
            with suppress(OSError):
                _, write_end = os.pipe()
                os.write(write_end, mapping.bytes[place : place + 1])
                return False
            return bool(mapping.memory[place : place + 1])

    assert in_child(touch) in (-signal.SIGSEGV, -signal.SIGBUS)


def test_no_access_touches_one(reopen: Reopen, tmp_path: Path) -> None:
    """Reads, writes, views, leases, their system calls, windows, eviction and a fork."""
    assert in_child(lambda: exercise(reopen, GFN, tmp_path)) == 0


@pytest.mark.parametrize("write", [write_coredump, write_lime, write_vmcore])
def test_no_writer_touches_one(reopen: Reopen, write: Callable[..., int], tmp_path: Path) -> None:
    """A file has the pages that exist."""
    path = tmp_path / "file"
    there = GFN + PAGES - sum(count for _, count in HOLES)

    def child() -> bool:
        with reopen() as backend:
            return write(backend, path, length=END) == there

    assert in_child(child) == 0
    with open_source(path) as found:
        runs = found.present(0, GFN + PAGES)
        assert runs is not None
        assert sum(count for _, count in runs) == there


def test_no_raw_dump_touches_one(
    reopen: Reopen, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nor does what writes views of a cache to a file."""
    monkeypatch.setattr("xenmapcache.cli.sources.open_backend", lambda *_, **__: reopen())
    target = tmp_path / "raw"

    def child() -> bool:
        return main(["dump", "xen:1", "-o", str(target), "--length", str(END)]) == 0

    assert in_child(child) == 0
    assert target.stat().st_size == END
