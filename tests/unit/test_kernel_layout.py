"""Where a kernel and its page tables are: from VMCOREINFO, and from a CPU's registers."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.test_notes import core, prstatus, qemu
from tests.images import linux_guest
from tests.images.xl_files import X86_32, dump_core, dump_core_pv
from xenmapcache import (
    AddressSpace,
    MapCache,
    UnsupportedOperationError,
    find_vmcoreinfo,
    kernel_layout,
    open_backend,
    open_cache,
)
from xenmapcache.formats.kernel_layout import KernelLayout
from xenmapcache.formats.vmcoreinfo import VmcoreInfo

ARM = """OSRELEASE=6.1.0-18-arm64
PAGESIZE=4096
SYMBOL(swapper_pg_dir)=ffffb7d2aa1b5000
KERNELOFFSET=37d2a0000000
NUMBER(VA_BITS)=48
NUMBER(kimage_voffset)=0xffffb7d268000000
NUMBER(PHYS_OFFSET)=0x40000000
NUMBER(TCR_EL1_T1SZ)=0x10
"""
X86 = linux_guest.info()


def layout(text: str) -> KernelLayout:
    return kernel_layout(VmcoreInfo(0x3000, text))


def test_x86() -> None:
    """The offset is in hex, phys_base is not, and may be negative."""
    text = X86.replace("KERNELOFFSET=0", "KERNELOFFSET=22c00000")
    assert layout(text) == (
        *("x86-64", 4, 0x22C00000, linux_guest.PHYS_BASE),
        *(linux_guest.virtual(linux_guest.PAGE_TABLES), linux_guest.PAGE_TABLES),
    )
    moved = text.replace(f"phys_base)={linux_guest.PHYS_BASE}", "phys_base)=-524288")
    assert (layout(moved).phys_base, layout(moved).root) == (-524288, 0x100000 - 524288)
    assert layout(text.replace("l5_enabled)=0", "l5_enabled)=1")).levels == 5
    assert layout(text.replace("NUMBER(pgtable_l5_enabled)=0\n", "")).levels == 4


def test_arm64() -> None:
    """The number of levels is that of the bits that the CPU was told, if VMCOREINFO has them."""
    assert layout(ARM) == (
        *("arm64", 4, 0x37D2A0000000, 0x40000000, 0xFFFFB7D2AA1B5000, 0x421B5000),
    )
    assert layout(ARM.replace("T1SZ)=0x10", "T1SZ)=0x19")).levels == 3
    older = ARM.replace("NUMBER(TCR_EL1_T1SZ)=0x10\n", "")
    assert layout(older.replace("VA_BITS)=48", "VA_BITS)=39")).levels == 3


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (X86.replace("PAGESIZE=4096", "PAGESIZE=65536"), "PAGESIZE is 65536; only 4096"),
        (X86.replace("PAGESIZE=4096\n", ""), "it has no line PAGESIZE"),
        (X86.replace("KERNELOFFSET=0", "KERNELOFFSET=no"), "KERNELOFFSET is 'no', which is not"),
        (X86.replace("NUMBER(phys_base)", "NUMBER(x)"), r"it has no line NUMBER\(phys_base\)"),
        (X86.replace("SYMBOL(swapper_pg_dir)", "x"), r"no line SYMBOL\(swapper_pg_dir\)"),
        (X86.replace("pg_dir)=ffff", "pg_dir)=0"), "page tables would be at guest-physical -0x"),
        (X86.replace("phys_base)=4", "phys_base)=5"), "page tables would be at guest-physical 0x"),
        (X86.replace("phys_base)=", f"phys_base)={1 << 60}"), "would be at guest-physical 0x"),
        (ARM.replace("0x10", "0xc"), "52 bits of virtual address; only 39 and 48"),
        (ARM.replace("(VA_BITS)", "(VA)"), r"no line NUMBER\(VA_BITS\)"),
        (ARM.replace("(PHYS_OFFSET)", "(PHYS)"), r"no line NUMBER\(PHYS_OFFSET\)"),
    ],
)
def test_what_cannot_be(text: str, reason: str) -> None:
    """The error has the reason, the page, and what to do instead."""
    with pytest.raises(UnsupportedOperationError, match=f"VMCOREINFO at 0x3000: .*{reason}") as it:
        layout(text)
    assert "--root" in str(it.value)


@pytest.fixture
def linux() -> Iterator[MapCache]:
    with (
        open_backend("mock", domain=linux_guest.create()) as backend,
        MapCache(backend, bucket_shift=16) as cache,
    ):
        yield cache


def test_space_of_the_kernel(linux: MapCache) -> None:
    """Its own page tables, of a text that was found before or is found now."""
    for space in (
        AddressSpace.of_kernel(linux),
        AddressSpace.of_kernel(linux, find_vmcoreinfo(linux)),
    ):
        assert (space.root, space.levels, space.machine) == (linux_guest.PAGE_TABLES, 4, "x86-64")
        banner = linux_guest.virtual(linux_guest.BANNER_AT)
        assert space.read(banner, len(linux_guest.BANNER)) == linux_guest.BANNER
        assert space.translate(linux_guest.FAR[0] + 5) == linux_guest.FAR[1] + 5


def test_a_guest_that_is_not_linux(cache: MapCache) -> None:
    """The error says what else there is."""
    with pytest.raises(UnsupportedOperationError, match=r"has no VMCOREINFO.*give the root"):
        AddressSpace.of_kernel(cache)
    with pytest.raises(UnsupportedOperationError, match=r"'mock' has no control registers"):
        AddressSpace.of_cpu(cache)


def qemu_state(cr0: int, cr3: int, cr4: int) -> bytes:
    numbers = [0] * 24
    numbers[18], numbers[21], numbers[22] = cr0, cr3, cr4
    return struct.pack("<2I18Q240x6Q", 1, 440, *numbers)


def test_space_of_a_cpu(tmp_path: Path) -> None:
    """CR4 has the number of levels. A CPU that has not started uses no page tables."""
    notes = [
        (b"CORE", 1, prstatus(1)),
        (b"QEMU", 0, qemu_state(0x80050033, 0x2972003, 0x751EB0)),
        (b"CORE", 1, prstatus(2)),
        (b"QEMU", 0, qemu_state(0x80050033, 0x1000, 0x750EB0)),
        (b"QEMU", 0, qemu(0, 0x5000)),
    ]
    with open_cache(core(tmp_path, *notes)) as cache:
        first, second = AddressSpace.of_cpu(cache), AddressSpace.of_cpu(cache, 1)
        assert (first.root, first.levels) == (0x2972000, 5)
        assert (second.root, second.levels) == (0x1000, 4)
        with pytest.raises(UnsupportedOperationError, match="CPU 2 does not translate .* is 0x0"):
            AddressSpace.of_cpu(cache, 2)
        for number in (-1, 3):
            with pytest.raises(ValueError, match=f"cpu must be 0 to 2, not {number}"):
                AddressSpace.of_cpu(cache, number)
    with open_cache(core(tmp_path, notes[0])) as cache:
        with pytest.raises(UnsupportedOperationError, match="'elfcore' has no control registers"):
            AddressSpace.of_cpu(cache)


def xen_context(cr0: int, cr3: int, cr4: int) -> bytes:
    context = bytearray(5168)
    struct.pack_into("<5Q", context, 4984, cr0, 0, 0, cr3, cr4)
    return bytes(context)


def test_space_of_a_vcpu_of_xen(tmp_path: Path) -> None:
    """Files of xl dump-core have all control registers, but a PV guest's are of the host."""
    path = tmp_path / "guest.core"
    both = xen_context(0x80050033, 0x5000, 0x1020) + xen_context(0, 0, 0)
    changes = {".xen_prstatus": {"entry": 5168}}
    path.write_bytes(dump_core([0, 1], vcpus=2, contexts=both, changes=changes))
    with open_cache(path) as cache:
        space = AddressSpace.of_cpu(cache)
        assert (space.root, space.levels) == (0x5000, 5)
        with pytest.raises(UnsupportedOperationError, match="CPU 1 does not translate"):
            AddressSpace.of_cpu(cache, 1)
    for data in (
        dump_core([0, 1], vcpus=2, contexts=both, changes=changes, machine=X86_32),
        dump_core_pv([0, 1], vcpus=2, contexts=both, changes=changes),
    ):
        path.write_bytes(data)
        with open_cache(path) as cache:
            with pytest.raises(UnsupportedOperationError, match="'coredump' has no control"):
                AddressSpace.of_cpu(cache)
