"""drgn on a live guest: its kernel's release, its page tables, and its holes."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.xen.lab.platform import Platform
from xenmapcache import GuestMemory, MapCache, find_vmcoreinfo, open_backend
from xenmapcache.adapters.drgn import program
from xenmapcache.address import MiB
from xenmapcache.formats.vmcoreinfo import VmcoreInfo

drgn: Any = importlib.import_module("drgn") if importlib.util.find_spec("drgn") else None

pytestmark = [
    pytest.mark.xen,
    pytest.mark.skipif(drgn is None, reason="PyPI has no wheel of drgn for this machine"),
]

KERNEL_MAP = 0xFFFFFFFF80000000


@pytest.fixture
def cache(live_domid: int) -> Iterator[MapCache]:
    with open_backend("xen", domid=live_domid) as live, MapCache(live) as cache:
        yield cache


@pytest.fixture
def end(machine: Platform) -> int:
    """Where the guest's memory ends."""
    return sum(machine.memory)


@pytest.fixture
def info(cache: MapCache, machine: Platform) -> VmcoreInfo:
    """What the guest's kernel says of itself."""
    found = find_vmcoreinfo(cache, *machine.memory)
    if found is None:
        pytest.skip("this guest's kernel has no VMCOREINFO")
    return found


def test_it_is_a_live_linux_kernel(cache: MapCache, info: VmcoreInfo, end: int) -> None:
    """With the release that the guest's memory has."""
    made = program(cache, length=end)
    assert made.flags & drgn.ProgramFlags.IS_LINUX_KERNEL
    assert made.flags & drgn.ProgramFlags.IS_LIVE
    assert made["UTS_RELEASE"].string_().decode() == info.value("OSRELEASE")


def image_offset(info: VmcoreInfo) -> int:
    """From a physical address in the kernel's image to the virtual one."""
    offset = info.value("NUMBER(kimage_voffset)")  # arm64 kernels have it
    return int(offset, 16) if offset else KERNEL_MAP - int(info.value("NUMBER(phys_base)") or "")


def test_page_tables_lead_to_the_banner(
    cache: MapCache, info: VmcoreInfo, machine: Platform, end: int
) -> None:
    """The banner's virtual address, and the kernel's name for itself, through page tables."""
    made = program(cache, length=end)
    release = (info.value("OSRELEASE") or "").encode()
    uts = made.read(int(info.value("SYMBOL(init_uts_ns)") or "", 16), 390)
    assert release + b"\0" in uts
    offset = image_offset(info)
    text = int(info.value("SYMBOL(_stext)") or "", 16)
    banner = b"Linux version " + release + b" ("
    place = next(
        address
        for address, _ in GuestMemory(cache).find(banner, *machine.memory)
        if address + offset > text  # other copies are in the kernel's log
    )
    assert made.read(place + offset, len(banner)) == banner
    assert made.read(place, len(banner), physical=True) == banner
    with pytest.raises(drgn.FaultError):
        made.read(0x1000, 8)  # no kernel maps it


def test_all_pages_and_holes(cache: MapCache, machine: Platform) -> None:
    """Each present MiB is read as mapping shows it, while nothing writes there; a hole faults."""
    made = program(cache, vmcoreinfo="")
    ranges = list(cache.present(*machine.memory))
    assert sum(length for _, length in ranges) > 32 * MiB
    for start, length in ranges:
        for address in range(start, start + length, MiB):
            size = min(MiB, start + length - address)
            assert len(made.read(address, size, physical=True)) == size
    first, length = ranges[-1]
    hole = next((end for start, size in ranges if (end := start + size) < first), 1 << 40)
    with pytest.raises(drgn.FaultError) as error:
        made.read(hole, 8, physical=True)
    assert error.value.address == hole


def test_the_command(live_domid: int, info: VmcoreInfo, end: int, tmp_path: Path) -> None:
    """``xenmapcache drgn xen:DOMID script`` prints what the script prints."""
    script = tmp_path / "release.py"
    script.write_text('print(prog["UTS_RELEASE"].string_().decode())\n')
    command = [sys.executable, "-m", "xenmapcache", "drgn", "--length", str(end)]
    command += [f"xen:{live_domid}", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == info.value("OSRELEASE")
