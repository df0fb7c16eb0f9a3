"""Page tables made by hand: nothing of the package is used but the mock."""

from __future__ import annotations

import struct
from typing import Final

from xenmapcache import MockDomain

SHIFTS: Final = {5: (48, 39, 30, 21, 12), 4: (39, 30, 21, 12), 3: (30, 21, 12)}
NAMES: Final = {
    ("x86-64", 5): ("PML5", "PML4", "PDPT", "PD", "PT"),
    ("x86-64", 4): ("PML4", "PDPT", "PD", "PT"),
    ("arm64", 4): ("L0", "L1", "L2", "L3"),
    ("arm64", 3): ("L1", "L2", "L3"),
}
SHAPES: Final = list(NAMES)
TABLE: Final = {"x86-64": 0x67, "arm64": 0x3}
PAGE: Final = {"x86-64": 0x67, "arm64": 0x743}
LARGE: Final = {"x86-64": 0xE7, "arm64": 0x741}
"""Present, writable, for users, accessed, dirty; on arm64 AP[1], AF and shareable."""


class PageTables:
    """Tables in a mock guest, made where they are needed.

    Attributes:
        root: guest-physical address of the first table.
    """

    def __init__(
        self, domain: MockDomain, machine: str = "x86-64", levels: int = 4, root: int = 0x400000
    ) -> None:
        self.domain = domain
        self.machine = machine
        self.levels = levels
        self.root = root
        self._free = root + 0x1000
        domain.write(root, bytes(4096))

    def table(self) -> int:
        """Return the address of a new table of zeros."""
        self.domain.write(self._free, bytes(4096))
        self._free += 0x1000
        return self._free - 0x1000

    def get(self, place: int) -> int:
        """Return an entry."""
        return int(struct.unpack("<Q", self.domain.read(place, 8))[0])

    def set(self, place: int, entry: int) -> None:
        """Change an entry."""
        self.domain.write(place, struct.pack("<Q", entry))

    def places(self, virtual: int) -> list[int]:
        """Return where the entries of an address are, as far as tables lead."""
        table, found = self.root, []
        for shift in SHIFTS[self.levels]:
            found.append(table + (virtual >> shift & 511) * 8)
            entry = self.get(found[-1])
            if not entry & 1:
                break
            table = entry & 0xFFFFFFFFF000
        return found

    def map(self, virtual: int, physical: int, size: int = 4096, bits: int | None = None) -> int:
        """Map a page, and return where its entry is."""
        place = self.place(virtual, size)
        if bits is None:
            bits = (PAGE if size == 4096 else LARGE)[self.machine]
        self.set(place, physical | bits)
        return place

    def place(self, virtual: int, size: int = 4096) -> int:
        """Return where the entry of a page of some size is, and make the tables above it."""
        table = self.root
        for shift in SHIFTS[self.levels]:
            place = table + (virtual >> shift & 511) * 8
            if 1 << shift == size:
                return place
            if not self.get(place):
                self.set(place, self.table() | TABLE[self.machine])
            table = self.get(place) & 0xFFFFFFFFF000
        raise ValueError(f"no level has pages of {size:#x}")
