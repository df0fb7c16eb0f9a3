"""What write_vmcore() writes is a Linux kernel's core to drgn: page tables, holes, all pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from xenmapcache import MockDomain, open_backend, write_vmcore
from xenmapcache.address import PAGE_SIZE

from . import linux_guest

drgn: Any = pytest.importorskip("drgn", reason="drgn is not installed")


@pytest.fixture
def guest() -> MockDomain:
    return linux_guest.create()


@pytest.fixture
def program(guest: MockDomain, tmp_path: Path) -> Any:  # noqa: ANN401 - drgn is optional
    """The guest's core, open in drgn."""
    path = tmp_path / "guest.vmcore"
    with open_backend("mock", domain=guest) as source:
        write_vmcore(source, path, machine="x86-64")
    program = drgn.Program()
    program.set_core_dump(path)
    return program


def test_it_is_a_linux_kernel(program: Any) -> None:  # noqa: ANN401 - drgn is optional
    """In drgn: it takes the kernel's release and the machine from the notes and the header."""
    assert program.flags & drgn.ProgramFlags.IS_LINUX_KERNEL
    assert program.platform.arch == drgn.Architecture.X86_64
    assert program["UTS_RELEASE"].string_().decode() == linux_guest.RELEASE


def test_every_page(program: Any, guest: MockDomain) -> None:  # noqa: ANN401 - drgn is optional
    """Physical reads give the guest's bytes, and a fault in a hole."""
    for address in range(0, guest.memory_end, PAGE_SIZE):
        if any(start <= address < start + size for start, size in linux_guest.HOLES):
            with pytest.raises(drgn.FaultError):
                program.read(address, 8, physical=True)
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
