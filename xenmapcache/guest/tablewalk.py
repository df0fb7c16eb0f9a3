"""Walks over many entries of page tables: many addresses at once, and all that is mapped."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterator
from typing import Final, NamedTuple

from ..errors import TranslationError
from ..formats.pagetables import NOT_MAPPED, PRESENT, TABLE, ReadTable, Rights, Shape

_ENTRIES: Final = 512
_WORTH_NUMPY: Final = 1 << 14
"""Fewer addresses are translated before NumPy is imported."""


class Page(NamedTuple):
    """A page that is mapped. Immutable.

    Attributes:
        address: virtual.
        length: in bytes.
        physical: guest-physical.
        rights: what it allows.
    """

    address: int
    length: int
    physical: int
    rights: Rights


def translate(
    addresses: array[int],
    root: int,
    shape: Shape,
    halves: list[tuple[int, int]],
    read_table: ReadTable,
) -> array[int]:
    """Return the guest-physical addresses of virtual addresses.

    It is done with NumPy, if that is installed and worth its import.

    Args:
        addresses: an ``array("Q")``.
        root: of the tables.
        shape: of the tables.
        halves: the ranges of addresses that the tables have a place for.
        read_table: reads a table.
    """
    if len(addresses) < _WORTH_NUMPY and "numpy" not in sys.modules:
        return _one_by_one(addresses, root, shape, halves, read_table)
    try:
        from . import tablearrays
    except ImportError:
        return _one_by_one(addresses, root, shape, halves, read_table)
    return tablearrays.translate(addresses, root, shape, halves, read_table)


def _one_by_one(
    addresses: array[int],
    root: int,
    shape: Shape,
    halves: list[tuple[int, int]],
    read_table: ReadTable,
) -> array[int]:
    found = array("Q", [NOT_MAPPED]) * len(addresses)
    # In the order of addresses, the tables that the one before came through mostly serve again.
    known: list[tuple[int, tuple[int, ...] | None]] = [(-1, None)] * len(shape.levels)
    for number in sorted(range(len(addresses)), key=addresses.__getitem__):
        address = addresses[number]
        if not any(low <= address < high for low, high in halves):
            continue
        table, depth = root, 0
        while True:  # the last level has no tables below it
            level = shape.levels[depth]
            if known[depth][0] != table:
                data = read_table(table)
                known[depth] = table, None if data is None else TABLE.unpack(data)
            entries = known[depth][1]
            if entries is None:
                break
            entry = entries[address >> level.shift & _ENTRIES - 1]
            if shape.maps_page(depth, entry):
                last = (1 << level.shift) - 1
                found[number] = entry & shape.address_mask & ~last | address & last
                break
            if not shape.has_table(depth, entry):
                break
            table = entry & shape.address_mask
            depth += 1
    return found


class Scan:
    """What is mapped, page by page.

    A table is entered only if it is not on the path to itself, and only if it did not turn out
    before, at the same level, to lead to nothing. The latter are remembered: a guest with four
    tables whose entries all lead to the next could otherwise have 2**27 of them looked through.

    Args:
        shape: of the tables.
        read_table: reads a table.
        max_tables: how many are read before it gives up.

    Synchronization: for one thread.
    """

    def __init__(self, shape: Shape, read_table: ReadTable, max_tables: int) -> None:
        self._shape = shape
        self._read_table = read_table
        self._left = self._max_tables = max_tables
        self._empty: set[tuple[int, int]] = set()

    def pages(self, root: int, base: int, start: int, end: int) -> Iterator[Page]:
        """Yield the pages of a range in ascending order.

        Args:
            root: of the tables.
            base: virtual, what the root's first entry stands for.
            start: virtual, where the range begins.
            end: one past its last address.

        Raises:
            TranslationError: there are more tables than may be read.
        """
        return self._under(root, (root,), base, 0, start, end)

    def _under(
        self, table: int, path: tuple[int, ...], base: int, denied: int, start: int, end: int
    ) -> Iterator[Page]:
        """Yield the pages under a table. The recursion is as deep as there are levels: five."""
        shape, depth = self._shape, len(path) - 1
        shift = shape.levels[depth].shift
        entries = self._entries(table, base)
        first = max(0, start - base >> shift)
        last = min(_ENTRIES - 1, end - 1 - base >> shift)
        empty = True
        for index in range(first, last + 1):
            entry = entries[index]
            if not entry & PRESENT:
                continue
            address = base + (index << shift)
            if shape.maps_page(depth, entry):
                physical = entry & shape.address_mask & -1 << shift
                yield _clipped(
                    Page(address, 1 << shift, physical, shape.rights(denied, entry)), start, end
                )
                empty = False
            elif shape.has_table(depth, entry):
                below = entry & shape.address_mask
                if below not in path and (depth + 1, below) not in self._empty:
                    deeper = shape.denied(denied, entry)
                    for page in self._under(below, (*path, below), address, deeper, start, end):
                        yield page
                        empty = False
        if empty and last - first == _ENTRIES - 1:
            self._empty.add((depth, table))

    def _entries(self, table: int, base: int) -> tuple[int, ...]:
        if not self._left:
            raise TranslationError(
                base,
                f"{self._max_tables} page tables were read, and there are more from here on: "
                "continue here, or give a larger max_tables",
            )
        self._left -= 1
        data = self._read_table(table)
        return (0,) * _ENTRIES if data is None else TABLE.unpack(data)


def _clipped(page: Page, start: int, end: int) -> Page:
    """Return the part of a page that is in a range."""
    low, high = max(page.address, start), min(page.address + page.length, end)
    if high - low == page.length:
        return page
    return page._replace(
        address=low, length=high - low, physical=page.physical + low - page.address
    )
