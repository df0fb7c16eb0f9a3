"""The shapes of page tables: x86-64 with 4 or 5 levels, arm64 with pages of 4 KiB.

Tables of all shapes are a page of 512 entries of 8 bytes, and each level takes 9 bits of the
virtual address. An entry leads to the next level's table, maps a page, or does neither.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final, NamedTuple

TABLE: Final = struct.Struct("<512Q")
ENTRY_BYTES: Final = 8
PRESENT: Final = 1
"""The bit that an entry has if it leads anywhere, on both machines."""
NOT_MAPPED: Final = (1 << 64) - 1
"""In place of a guest-physical address, where many are translated at once."""
ReadTable = Callable[[int], bytes | None]
"""Returns a table's bytes by its address, or None if its page is missing."""
PAGE_TABLE_LEVELS: Final = {"x86-64": (4, 5), "arm64": (3, 4)}
"""How many levels each machine's tables may have here."""


class Rights(NamedTuple):
    """What a virtual page allows. Immutable.

    Attributes:
        writable: whether it can be written to.
        executable: whether user programs can execute it, if they reach it; else, the kernel.
        user: whether user programs can reach it.
    """

    writable: bool
    executable: bool
    user: bool


class Level(NamedTuple):
    """A level of page tables. Immutable.

    Attributes:
        name: as the machine's manual says it, such as ``"PML4"`` or ``"L0"``.
        shift: log2 of how many bytes an entry stands for.
        maps: whether an entry may map a page of that size.
    """

    name: str
    shift: int
    maps: bool


class Shape(NamedTuple):
    """How a machine's page tables look. Immutable.

    Attributes:
        machine: ``"x86-64"`` or ``"arm64"``.
        levels: the root's first.
        bits: how many bits of a virtual address count.
        address_mask: the bits of an entry that are an address.
        table_test, table_value: an entry leads to a table if its bits of the one are the other.
        page_test, page_value: the same of entries that map a large page.
        last_test: the bits that an entry has if it maps a page at the last level. x86-64 has
            another use there for the bit of large pages.
    """

    machine: str
    levels: tuple[Level, ...]
    bits: int
    address_mask: int
    table_test: int
    table_value: int
    page_test: int
    page_value: int
    last_test: int

    def maps_page(self, depth: int, entry: int) -> bool:
        """Tell whether an entry of a level maps a page."""
        if depth == len(self.levels) - 1:
            return entry & self.last_test == self.last_test
        return self.levels[depth].maps and entry & self.page_test == self.page_value

    def has_table(self, depth: int, entry: int) -> bool:
        """Tell whether an entry of a level leads to another table."""
        return depth < len(self.levels) - 1 and entry & self.table_test == self.table_value

    def denied(self, above: int, entry: int) -> int:
        """Return what tables deny, as bits for :meth:`rights`: those above, and one more.

        Args:
            above: of the tables above; 0 for none.
            entry: the entry that leads to the table.
        """
        if self.machine == "x86-64":
            return above | (entry ^ _X86_GRANTS) & (_X86_GRANTS | _X86_NO_EXECUTE)
        return above | entry & _ARM_TABLE_BITS

    def rights(self, denied: int, entry: int) -> Rights:
        """Return what a page allows.

        Args:
            denied: what its tables deny.
            entry: the entry that maps the page.
        """
        if self.machine == "x86-64":
            denied = self.denied(denied, entry)
            return Rights(
                not denied & _X86_WRITABLE, not denied & _X86_NO_EXECUTE, not denied & _X86_USER
            )
        user = bool(entry & _ARM_USER) and not denied & _ARM_NO_USER_TABLE
        never = entry & _ARM_UXN | denied & _ARM_UXN_TABLE
        if not user:
            never = entry & _ARM_PXN | denied & _ARM_PXN_TABLE
        read_only = entry & (_ARM_READ_ONLY | _ARM_DIRTY_BIT) == _ARM_READ_ONLY
        return Rights(not read_only and not denied & _ARM_READ_ONLY_TABLE, not never, user)


_X86_NAMES: Final = ("PML5", "PML4", "PDPT", "PD", "PT")
_SHIFTS: Final = (48, 39, 30, 21, 12)
_LARGE_SHIFTS: Final = (30, 21)
"""1 GiB and 2 MiB, the only large pages of both machines."""
_X86_WRITABLE, _X86_USER, _X86_LARGE, _X86_NO_EXECUTE = 1 << 1, 1 << 2, 1 << 7, 1 << 63
_X86_GRANTS: Final = _X86_WRITABLE | _X86_USER
_ARM_USER, _ARM_READ_ONLY, _ARM_DIRTY_BIT = 1 << 6, 1 << 7, 1 << 51
"""AP[1], AP[2] and DBM. A page with DBM can be written to, and loses AP[2] by that."""
_ARM_PXN, _ARM_UXN = 1 << 53, 1 << 54
_ARM_PXN_TABLE, _ARM_UXN_TABLE = 1 << 59, 1 << 60
_ARM_NO_USER_TABLE, _ARM_READ_ONLY_TABLE = 1 << 61, 1 << 62
_ARM_TABLE_BITS: Final = 0xF << 59


def shape_of(machine: str, levels: int) -> Shape:
    """Return the shape of a machine's page tables.

    Raises:
        ValueError: the machine is unknown, or its tables cannot have that many levels.
    """
    if machine not in PAGE_TABLE_LEVELS:
        raise ValueError(f"machine must be one of {', '.join(PAGE_TABLE_LEVELS)}, not {machine!r}")
    known = PAGE_TABLE_LEVELS[machine]
    if levels not in known:
        raise ValueError(f"levels must be {known[0]} or {known[1]} for {machine}, not {levels!r}")
    shifts = _SHIFTS[-levels:]
    names = _X86_NAMES[-levels:]
    if machine == "arm64":
        names = tuple(f"L{4 - levels + depth}" for depth in range(levels))
    found = tuple(
        Level(name, shift, shift in _LARGE_SHIFTS or shift == shifts[-1])
        for name, shift in zip(names, shifts, strict=True)
    )
    bits = 12 + 9 * levels
    if machine == "x86-64":
        large = PRESENT | _X86_LARGE
        return Shape(machine, found, bits, 0xFFFFFFFFFF000, large, PRESENT, large, large, PRESENT)
    return Shape(machine, found, bits, 0xFFFFFFFFF000, 3, 3, 3, 1, 3)
