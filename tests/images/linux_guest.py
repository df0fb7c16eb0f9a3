"""A guest with what a Linux kernel leaves in memory: VMCOREINFO, page tables, its release."""

from __future__ import annotations

import random
import struct
from typing import Final

from xenmapcache import MockDomain, MockHypervisor
from xenmapcache.address import PAGE_SIZE

RELEASE: Final = "6.1.0-56-test"
BANNER: Final = b"Linux version 6.1.0-56-test (nobody@nowhere) #1 SMP\n"
KERNEL_MAP: Final = 0xFFFFFFFF80000000
PHYS_BASE: Final = 0x400000
PAGE_TABLES: Final = 0x500000
"""Where the four levels lie, one page after the other."""
UTS: Final = 0x480000
BANNER_AT: Final = 0x481000
INFO: Final = 0x3A0000
FAR: Final = (KERNEL_MAP + (2 << 21) + 5 * PAGE_SIZE, 0x3000)
"""A page of 4 KiB: its virtual and its physical address."""
HOLES: Final = [(0xA0000, 0x20000), (0x700000, 0x8000), (0x901000, 0x1000)]

_PRESENT, _LARGE = 0x63, 0x80


def virtual(physical: int) -> int:
    """Return where the kernel's map has a physical address."""
    return physical - PHYS_BASE + KERNEL_MAP


def info(release: str = RELEASE, *, uts: int = UTS, more: str = "") -> str:
    """Return a VMCOREINFO text."""
    return (
        f"OSRELEASE={release}\n"
        "BUILD-ID=3b43fad5034874490492495d552c0af6a5fab235\n"
        "PAGESIZE=4096\n"
        f"SYMBOL(init_uts_ns)={virtual(uts):x}\n"
        "OFFSET(uts_namespace.name)=0\n"
        f"SYMBOL(swapper_pg_dir)={virtual(PAGE_TABLES):x}\n"
        f"NUMBER(phys_base)={PHYS_BASE}\n"
        f"NUMBER(pgtable_l5_enabled)=0\n"
        "KERNELOFFSET=0\n"
        f"{more}"
    )


def uts_namespace(release: str = RELEASE) -> bytes:
    """Return the head of ``struct uts_namespace``: six strings of 65 bytes."""
    strings = ["Linux", "(none)", release, "#1 SMP", "x86_64", "(none)"]
    return b"".join(each.encode().ljust(65, b"\0") for each in strings)


def create(*, with_info: bool = True) -> MockDomain:
    """Return a guest of 16 MiB with holes; a third of its other pages are zeros."""
    guest = MockHypervisor().create_domain(memory="16M", holes=HOLES)
    rng = random.Random(12)
    holes = {page for start, size in HOLES for page in range(start, start + size, PAGE_SIZE)}
    for address in set(range(0, 16 << 20, PAGE_SIZE)) - holes:
        if address // PAGE_SIZE % 3:
            guest.write(address, rng.randbytes(PAGE_SIZE))
    entry = struct.Struct("<Q")
    for page in range(4):
        guest.write(PAGE_TABLES + page * PAGE_SIZE, bytes(PAGE_SIZE))
    entries = {
        (0, 511): PAGE_TABLES + 1 * PAGE_SIZE | _PRESENT,
        (1, 510): PAGE_TABLES + 2 * PAGE_SIZE | _PRESENT,
        (2, 0): PHYS_BASE | _PRESENT | _LARGE,
        (2, 1): PHYS_BASE + (1 << 21) | _PRESENT | _LARGE,
        (2, 2): PAGE_TABLES + 3 * PAGE_SIZE | _PRESENT,
        (3, 5): FAR[1] | _PRESENT,
    }
    for (level, index), value in entries.items():
        guest.write(PAGE_TABLES + level * PAGE_SIZE + index * 8, entry.pack(value))
    guest.write(UTS, uts_namespace())
    guest.write(BANNER_AT, BANNER)
    if with_info:
        guest.write(INFO, info().encode().ljust(PAGE_SIZE, b"\0"))
    return guest
