"""Many virtual addresses at once, with NumPy: all addresses of a table in each step.

Import it only where NumPy is optional: it imports NumPy.
"""

from __future__ import annotations

from array import array
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from ..formats.pagetables import NOT_MAPPED, ReadTable, Shape

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Addresses = NDArray[np.uint64]

_CHUNK = 1 << 18
"""Addresses in one step, because each takes some 100 bytes on the way."""
_NOT_MAPPED = np.uint64(NOT_MAPPED)
_INDEX_MASK = np.uint64(511)


def translate(
    addresses: array[int],
    root: int,
    shape: Shape,
    halves: list[tuple[int, int]],
    read_table: ReadTable,
) -> array[int]:
    """Return the guest-physical addresses of virtual addresses; see ``tablewalk.translate``."""
    found = array("Q", bytes(8 * len(addresses)))
    if not addresses:
        return found
    source, target = np.frombuffer(addresses, np.uint64), np.frombuffer(found, np.uint64)
    for start in range(0, len(addresses), _CHUNK):
        chunk = source[start : start + _CHUNK]
        order = np.argsort(chunk, kind="stable")
        ascending = chunk[order]
        possible = np.zeros(len(chunk), np.bool_)
        for low, high in halves:
            possible |= (ascending >= np.uint64(low)) & (ascending <= np.uint64(high - 1))
        result = np.full(len(chunk), _NOT_MAPPED)
        result[possible] = _walk(ascending[possible], root, shape, read_table)
        target[start : start + _CHUNK][order] = result
    return found


def _walk(addresses: Addresses, root: int, shape: Shape, read_table: ReadTable) -> Addresses:
    """Translate addresses in ascending order."""
    result = np.full(len(addresses), _NOT_MAPPED)
    places = np.arange(len(addresses))
    tables = np.full(len(addresses), np.uint64(root))
    mask = np.uint64(shape.address_mask)
    for depth, level in enumerate(shape.levels):
        if not len(addresses):
            break
        index = (addresses >> np.uint64(level.shift)) & _INDEX_MASK
        entries = _entries(tables, index, read_table)
        last = depth == len(shape.levels) - 1
        test, value = (shape.page_test, shape.page_value) if not last else (shape.last_test,) * 2
        if last or level.maps:
            maps = (entries & np.uint64(test)) == np.uint64(value)
            offset = np.uint64((1 << level.shift) - 1)
            result[places[maps]] = (entries[maps] & mask & ~offset) | (addresses[maps] & offset)
        deeper = (entries & np.uint64(shape.table_test)) == np.uint64(shape.table_value)
        addresses, places, tables = addresses[deeper], places[deeper], entries[deeper] & mask
    return result


def _entries(tables: Addresses, index: Addresses, read_table: ReadTable) -> Addresses:
    """Return an entry of each of some tables; 0, which maps nothing, where the table is missing."""
    edges = (np.flatnonzero(tables[1:] != tables[:-1]) + 1).tolist()
    found = np.zeros(len(tables), np.uint64)
    for start, end in pairwise([0, *edges, len(tables)]):
        data = read_table(int(tables[start]))
        if data is not None:
            found[start:end] = np.frombuffer(data, "<u8")[index[start:end]]
    return found
