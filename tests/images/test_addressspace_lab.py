"""AddressSpace over a real guest: five levels, KASLR, and what QEMU and /proc/kallsyms say."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.images.lab import Images
from tests.images.test_lab import RANGES
from xenmapcache import AddressSpace, MapCache, find_vmcoreinfo, kernel_layout, open_cache
from xenmapcache.files.image import ImageFile
from xenmapcache.formats.elf import Elf
from xenmapcache.formats.vmcoreinfo import VmcoreInfo

pytestmark = pytest.mark.images

_TEXT_LINKED_AT = 0xFFFFFFFF81000000
_WORD, _LOW_BITS = (1 << 64) - 1, (1 << 57) - 1
FORMS = ("plain.elf", "compressed.kdump")


@pytest.fixture(params=FORMS)
def cache(lab_images: Images, request: pytest.FixtureRequest) -> Iterator[MapCache]:
    with open_cache(lab_images.path(request.param)) as cache:
        yield cache


@pytest.fixture
def info(cache: MapCache) -> VmcoreInfo:
    info = find_vmcoreinfo(cache)
    assert info is not None
    return info


def symbols(lab_images: Images) -> dict[str, int]:
    """Return the guest's own addresses, of /proc/kallsyms."""
    log = lab_images.path("serial.log").read_text()
    lines = re.findall(r"^([0-9a-f]{16}) \w (\w+)\r?$", log, re.MULTILINE)
    found = {name: int(address, 16) for address, name in lines}
    assert "_text" in found
    return found


def test_layout(lab_images: Images, cache: MapCache, info: VmcoreInfo) -> None:
    """Offset, phys_base and page tables are those that the kernel itself has."""
    layout, known = kernel_layout(info), symbols(lab_images)
    assert layout.kaslr_offset == known["_text"] - _TEXT_LINKED_AT
    assert layout.kaslr_offset
    assert layout.swapper_pg_dir == known["init_top_pgt"]
    assert layout.levels == 5
    space = AddressSpace.of_kernel(cache, info)
    assert space.translate(known["init_top_pgt"]) == layout.root
    assert struct.unpack("<q", space.read(known["phys_base"], 8)) == (layout.phys_base,)


def test_symbols(lab_images: Images, cache: MapCache, info: VmcoreInfo) -> None:
    """The kernel's image is where /proc/iomem has it, and its pointers lead where they should."""
    known = symbols(lab_images)
    text = re.search(
        r"([0-9a-f]+)-[0-9a-f]+ : Kernel code", lab_images.path("serial.log").read_text()
    )
    assert text is not None
    for space in (AddressSpace.of_kernel(cache, info), AddressSpace.of_cpu(cache)):
        assert space.levels == 5
        assert space.translate(known["_text"]) == int(text[1], 16)
        release = info.value("OSRELEASE")
        assert release is not None
        banner = space.read_cstring(known["linux_banner"])
        assert banner.startswith(f"Linux version {release} ".encode())
        # vmcoreinfo_data is a pointer into the map of all memory, which has other tables.
        (pointer,) = struct.unpack("<Q", space.read(known["vmcoreinfo_data"], 8))
        assert space.translate(pointer) == info.address
        assert space.read(pointer, len(info.text)) == info.text.encode()
        step = list(space.walk(known["_text"]))[-1]
        assert step.page is not None
        assert (step.level, step.page.size) == ("PD", 2 << 20)
        assert step.page.rights == (False, True, False)


def test_root_is_cr3(lab_images: Images, cache: MapCache) -> None:
    """As QEMU's monitor printed it."""
    cr3 = re.search(r"CR3=([0-9a-f]+)", lab_images.path("registers.txt").read_text())
    assert cr3 is not None
    assert AddressSpace.of_cpu(cache).root == int(cr3[1], 16) & -4096


def qemu_pages(path: Path) -> dict[int, int]:
    """Return the pages that QEMU has found in the page tables, for its dump by virtual addresses.

    QEMU sets the highest bits of all addresses of five levels, those of processes included.
    """
    file = ImageFile(path)
    try:
        loads = [load for load in Elf(file).loads() if load.virtual]
    finally:
        file.close()
    found = {}
    for load in loads:
        start = load.virtual & _LOW_BITS
        if start >> 56:
            start |= ~_LOW_BITS & _WORD
        for offset in range(0, load.memory_size, 4096):
            found[start + offset] = load.physical + offset
    return found


def is_ram(physical: int) -> bool:
    """Tell whether a page is RAM; QEMU has no others in its dump, but for ROM."""
    return any(start <= physical < start + length for start, length in RANGES)


def test_regions_are_those_of_qemu(lab_images: Images) -> None:
    """QEMU walks the same tables for its dump with -p, in C, and finds the same pages of RAM."""
    expected = qemu_pages(lab_images.path("paging.elf"))
    assert len(expected) > 10_000
    with open_cache(lab_images.path("plain.elf")) as cache:
        space = AddressSpace.of_cpu(cache)
        ours = {
            region.address + offset: region.physical + offset
            for region in space.regions()
            for offset in range(0, region.length, 4096)
            if is_ram(region.physical + offset)
        }
        assert ours == {at: place for at, place in expected.items() if is_ram(place)}
        assert list(space.translate_many(ours)) == list(ours.values())
