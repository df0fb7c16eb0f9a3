"""AddressSpace over a live guest: its kernel's page tables, while it runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.xen.lab.platform import Platform
from xenmapcache import (
    AddressSpace,
    MapCache,
    TranslationError,
    find_vmcoreinfo,
    open_backend,
)
from xenmapcache.address import PAGE_SIZE, MiB
from xenmapcache.formats.vmcoreinfo import VmcoreInfo

pytestmark = pytest.mark.xen

TOP = 0xFFFF_FFFF_FFFF_F000
"""Linux maps nothing there: it would be an error's number as a pointer."""


@pytest.fixture
def cache(live_domid: int) -> Iterator[MapCache]:
    with open_backend("xen", domid=live_domid) as live, MapCache(live) as cache:
        yield cache


@pytest.fixture
def info(cache: MapCache, machine: Platform) -> VmcoreInfo:
    """What the guest's kernel says of itself."""
    found = find_vmcoreinfo(cache, *machine.memory)
    if found is None:
        pytest.skip("this guest's kernel has no VMCOREINFO")
    return found


def symbol(info: VmcoreInfo, name: str) -> int:
    """Return the virtual address of a symbol."""
    return int(info.value(f"SYMBOL({name})") or "", 16)


def test_the_kernels_own_tables(cache: MapCache, info: VmcoreInfo, machine: Platform) -> None:
    """A virtual address leads to the kernel's release, in the guest's memory."""
    space = AddressSpace.of_kernel(cache, info)
    assert space.levels == 4
    place = symbol(info, "init_uts_ns")
    release = (info.value("OSRELEASE") or "").encode()
    assert release + b"\0" in space.read(place, 390)
    physical = space.translate(place)
    start, length = machine.memory
    assert start <= physical < start + length
    assert space.translate(symbol(info, "swapper_pg_dir")) == space.root
    assert cache.read(physical, 390) == space.read(place, 390)
    with pytest.raises(TranslationError):
        space.translate(TOP)


def test_the_kernels_code_can_be_executed(cache: MapCache, info: VmcoreInfo) -> None:
    """And its data cannot."""
    space = AddressSpace.of_kernel(cache, info)
    text, data = symbol(info, "_stext"), symbol(info, "init_uts_ns")
    (code, *_) = space.regions(text, text + 2 * MiB)
    assert code.rights.executable
    assert not code.rights.user
    (own, *_) = space.regions(data, data + PAGE_SIZE)
    assert own.rights.writable
    assert not own.rights.executable
