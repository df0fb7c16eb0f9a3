"""Where a Linux kernel is in memory, from its VMCOREINFO."""

from __future__ import annotations

from typing import Final, NamedTuple

from ..address import ADDRESS_LIMIT, PAGE_SIZE
from ..errors import UnsupportedOperationError
from .vmcoreinfo import VmcoreInfo

_KERNEL_MAP: Final = 0xFFFFFFFF80000000
"""Where x86-64 kernels have their image: __START_KERNEL_map."""
_ARM_LEVELS: Final = {39: 3, 48: 4}
"""By the number of bits of a virtual address, with pages of 4 KiB."""
_REMEDY: Final = "give AddressSpace a root and levels (--root and --levels on the command line)"


class KernelLayout(NamedTuple):
    """Where a Linux kernel is in memory. Immutable.

    Attributes:
        machine: ``"x86-64"`` or ``"arm64"``.
        levels: of its page tables.
        kaslr_offset: how far its image was moved in virtual memory, in bytes; 0 without KASLR.
        phys_base: x86-64: guest-physical address of the image less the one that it was linked
            for, which may be negative. arm64: where memory begins.
        swapper_pg_dir: virtual address of the kernel's own page tables.
        root: guest-physical address of the same.
    """

    machine: str
    levels: int
    kaslr_offset: int
    phys_base: int
    swapper_pg_dir: int
    root: int


def kernel_layout(info: VmcoreInfo) -> KernelLayout:
    """Derive from a VMCOREINFO text where the kernel and its page tables are.

    Args:
        info: as ``find_vmcoreinfo`` returns it.

    Raises:
        UnsupportedOperationError: lines are missing or implausible, or the kernel is neither of
            x86-64 nor of arm64 with pages of 4 KiB.
    """
    if _number(info, "PAGESIZE", 10) != PAGE_SIZE:
        raise _refusal(info, f"PAGESIZE is {info.value('PAGESIZE')}; only 4096 is supported")
    offset = _number(info, "KERNELOFFSET", 16)
    swapper = _number(info, "SYMBOL(swapper_pg_dir)", 16)
    if info.value("NUMBER(kimage_voffset)") is not None:
        machine, base = "arm64", _number(info, "NUMBER(PHYS_OFFSET)", 0)
        root = swapper - _number(info, "NUMBER(kimage_voffset)", 0)
        bits = _number(info, "NUMBER(VA_BITS)", 10)
        if info.value("NUMBER(TCR_EL1_T1SZ)") is not None:  # what the CPU was told in the end
            bits = 64 - _number(info, "NUMBER(TCR_EL1_T1SZ)", 0)
        if bits not in _ARM_LEVELS:
            raise _refusal(info, f"{bits} bits of virtual address; only 39 and 48 are supported")
        levels = _ARM_LEVELS[bits]
    else:
        machine, base = "x86-64", _number(info, "NUMBER(phys_base)", 10)
        root = swapper - _KERNEL_MAP + base
        # Kernels before 4.17 have no such line, and four levels.
        five = info.value("NUMBER(pgtable_l5_enabled)") not in (None, "0")
        levels = 5 if five else 4
    if not 0 <= root < ADDRESS_LIMIT or root % PAGE_SIZE:
        raise _refusal(info, f"the page tables would be at guest-physical {root:#x}")
    return KernelLayout(machine, levels, offset, base, swapper, root)


def _number(info: VmcoreInfo, key: str, base: int) -> int:
    text = info.value(key)
    if text is None:
        raise _refusal(info, f"it has no line {key}")
    try:
        return int(text, base)
    except ValueError:
        raise _refusal(info, f"{key} is {text[:40]!r}, which is not a number") from None


def _refusal(info: VmcoreInfo, reason: str) -> UnsupportedOperationError:
    return UnsupportedOperationError(f"VMCOREINFO at {info.address:#x}: {reason}; {_REMEDY}")
