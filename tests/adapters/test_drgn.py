"""drgn reads a guest through a cache: page tables, holes, all pages, and what has changed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.images import linux_guest
from tests.images.writers import elf_core_of
from xenmapcache import (
    BackendUnavailableError,
    ClosedError,
    MapCache,
    MockDomain,
    UnsupportedOperationError,
    open_backend,
    open_cache,
    write_coredump,
)
from xenmapcache.adapters import drgn as bridge
from xenmapcache.address import PAGE_SIZE, MiB

drgn: Any = pytest.importorskip("drgn", reason="drgn is not installed")


@pytest.fixture
def guest() -> MockDomain:
    return linux_guest.create()


@pytest.fixture
def cache(guest: MockDomain) -> Iterator[MapCache]:
    with open_backend("mock", domain=guest) as backend, MapCache(backend, bucket_shift=16) as cache:
        yield cache


@pytest.fixture
def program(cache: MapCache) -> Any:  # noqa: ANN401 - drgn is optional
    return bridge.program(cache)


def test_it_is_a_live_linux_kernel(program: Any) -> None:  # noqa: ANN401 - drgn is optional
    """The VMCOREINFO in memory says so, and a domain is live."""
    flags = drgn.ProgramFlags
    assert program.flags & flags.IS_LINUX_KERNEL
    assert program.flags & flags.IS_LIVE
    assert not program.flags & flags.IS_LOCAL
    assert program["UTS_RELEASE"].string_().decode() == linux_guest.RELEASE


def test_every_page(program: Any, guest: MockDomain) -> None:  # noqa: ANN401 - drgn is optional
    """Physical reads give the guest's bytes, and a fault at its address in a hole."""
    for address in range(0, guest.memory_end + PAGE_SIZE, PAGE_SIZE):
        holes = [*linux_guest.HOLES, (guest.memory_end, PAGE_SIZE)]
        if any(start <= address < start + size for start, size in holes):
            with pytest.raises(drgn.FaultError) as error:
                program.read(address + 8, 8, physical=True)
            assert error.value.address == address + 8
        else:
            page = guest.read(address, PAGE_SIZE)
            assert program.read(address, PAGE_SIZE, physical=True) == page


def test_page_tables(program: Any) -> None:  # noqa: ANN401 - drgn is optional
    """Virtual reads go through the guest's own page tables, large pages and small ones."""
    banner = program.read(linux_guest.virtual(linux_guest.BANNER_AT), len(linux_guest.BANNER))
    assert banner == linux_guest.BANNER
    virtual, physical = linux_guest.FAR
    assert program.read(virtual, 64) == program.read(physical, 64, physical=True)
    with pytest.raises(drgn.FaultError):
        program.read(virtual + PAGE_SIZE, 8)


@pytest.mark.parametrize(
    ("address", "length"),
    [(0x100000, 0x10000), (0x10FFF8, 16), (0x108008, 0x20000), (0x100001, 5 * MiB), (0x200000, 0)],
)
def test_long_reads(program: Any, guest: MockDomain, address: int, length: int) -> None:  # noqa: ANN401 - drgn is optional
    """Ranges in one bucket, over its edge, and longer than what is kept; twice each."""
    for _ in range(2):
        assert program.read(address, length, physical=True) == guest.read(address, length)


def test_a_hole_in_a_long_read(program: Any) -> None:  # noqa: ANN401 - drgn is optional
    """The fault has the hole's address, and the next read is right."""
    hole = linux_guest.HOLES[1][0]
    for _ in range(2):
        with pytest.raises(drgn.FaultError) as error:
            program.read(hole - 0x18000, 0x20000, physical=True)
        assert error.value.address == hole


def test_changes_are_seen(program: Any, guest: MockDomain, cache: MapCache) -> None:  # noqa: ANN401 - drgn is optional
    """What the guest writes, and that it has ballooned a page out."""
    program.read(0x200000, 8, physical=True)
    guest.write(0x200000, b"new text")
    assert program.read(0x200000, 8, physical=True) == b"new text"
    guest.balloon_out(0x200000, PAGE_SIZE)
    cache.invalidate()
    with pytest.raises(drgn.FaultError):
        program.read(0x200000, 8, physical=True)


def test_after_close(program: Any, cache: MapCache) -> None:  # noqa: ANN401 - drgn is optional
    """Reads say that the cache is closed."""
    cache.close()
    with pytest.raises(ClosedError):
        program.read(0x200000, 8, physical=True)


def test_views_and_copies(cache: MapCache, guest: MockDomain) -> None:
    """A long range in a bucket is a view of it; over an edge it is a copy in one buffer."""
    read = bridge.reader(cache, drgn.FaultError)
    view = read(0x100000, 0x8000, 0, True)
    assert isinstance(view, memoryview)
    guest.write(0x100000, b"seen")
    assert bytes(view[:4]) == b"seen"
    first, second = (memoryview(read(at, 0x20000, 0, True)) for at in (0x100000, 0x180000))
    assert first.obj is second.obj
    assert second == guest.read(0x180000, 0x20000)
    large = memoryview(read(0x100000, 5 * MiB, 0, True))
    assert large.obj is not memoryview(read(0x100000, 5 * MiB, 0, True)).obj


def test_a_read_inside_of_a_read(cache: MapCache, guest: MockDomain) -> None:
    """A signal handler that reads does not overwrite what is being read."""

    class Interrupted(MapCache):
        def views(self, address: int, length: int) -> Iterator[memoryview]:
            for view in super().views(address, length):
                if address == 0x100000:
                    inner.append(bytes(read(0x180000, 0x20000, 0, True)))
                yield view

    inner: list[bytes] = []
    with Interrupted(cache.backend, bucket_shift=16) as interrupted:
        read = bridge.reader(interrupted, drgn.FaultError)
        for _ in range(2):
            assert read(0x100000, 0x20000, 0, True) == guest.read(0x100000, 0x20000)
    assert inner == [guest.read(0x180000, 0x20000)] * 4


def test_without_vmcoreinfo(caplog: pytest.LogCaptureFixture) -> None:
    """A WARNING says what does not work, and physical addresses can be read."""
    guest = linux_guest.create(with_info=False)
    with open_backend("mock", domain=guest) as backend, MapCache(backend) as cache:
        program = bridge.program(cache)
        (record,) = caplog.records
        assert record.getMessage().startswith("no VMCOREINFO was found in the guest's memory, as a")
        assert not program.flags & drgn.ProgramFlags.IS_LINUX_KERNEL
        banner = program.read(linux_guest.BANNER_AT, 13, physical=True)
        assert banner == linux_guest.BANNER[:13]
        caplog.clear()
        given = bridge.program(cache, vmcoreinfo=linux_guest.info())
        assert given.flags & drgn.ProgramFlags.IS_LINUX_KERNEL
        assert not bridge.program(cache, vmcoreinfo="").flags & drgn.ProgramFlags.IS_LINUX_KERNEL
        assert not caplog.records


@pytest.mark.parametrize(
    "text",
    ["junk", "OSRELEASE=x\nPAGESIZE=4096\nSYMBOL(swapper_pg_dir)=1" + "0" * 30 + "\n"],
)
def test_vmcoreinfo_that_drgn_refuses(cache: MapCache, text: str) -> None:
    """The error says whose words these are, and what to do."""
    with pytest.raises(ValueError, match="drgn refuses the guest's VMCOREINFO: .*; give another"):
        bridge.program(cache, vmcoreinfo=text)


def test_source_without_an_end(cache: MapCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """The search for VMCOREINFO needs a length, or is left out."""
    monkeypatch.setattr(type(cache.backend), "memory_end", None)
    with pytest.raises(ValueError, match="give a length"):
        bridge.program(cache)
    program = bridge.program(cache, length=4 * MiB)
    assert program.flags & drgn.ProgramFlags.IS_LINUX_KERNEL
    assert bridge.program(cache, vmcoreinfo="").read(0x1000, 8, physical=True)


def test_file_of_another_machine(guest: MockDomain, tmp_path: Path) -> None:
    """A core of an Arm guest is one to drgn, and is not live."""
    path = tmp_path / "arm.core"
    with open_backend("mock", domain=guest) as backend:
        write_coredump(backend, path, machine="arm")
    with open_cache(path) as cache:
        program = bridge.program(cache, vmcoreinfo=linux_guest.info())
        assert program.platform.arch == drgn.Architecture.AARCH64
        assert not program.flags & drgn.ProgramFlags.IS_LIVE


def test_note_of_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes before what memory has; memory is not searched."""
    path = tmp_path / "guest.core"
    path.write_bytes(elf_core_of([(0, 4)]))
    with open_cache(path) as cache:
        described = {"vmcoreinfo": linux_guest.info("6.6.6")}
        monkeypatch.setattr(cache.backend, "describe", lambda: described)
        assert bridge.program(cache)["UTS_RELEASE"].string_() == b"6.6.6"
        monkeypatch.setattr(cache.backend, "machine", "vax")
        with pytest.raises(UnsupportedOperationError, match="guest's machine, 'vax'"):
            bridge.program(cache)


def test_without_drgn(cache: MapCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what to install."""
    monkeypatch.setitem(sys.modules, "drgn", None)
    with pytest.raises(
        BackendUnavailableError, match=r"pip install drgn, or 'xenmapcache\[drgn\]'"
    ):
        bridge.program(cache)
