"""Numbers over time in columns, and addresses over time in cells; both in bounded memory.

At first a column is about a microsecond wide. When a time lies beyond the last column, each pair of
columns becomes one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from operator import add, or_
from typing import Final

from ...address import MiB

COLUMNS: Final = 2048
"""How many columns there are at most."""
MAX_ROWS: Final = 96
"""How many rows of addresses there are at most."""
MAX_ADDRESS: Final = (1 << 64) - 1

ABSENT, COLD = -1, 0
"""The heat of a cell whose range was not mapped; and of one that nothing has used."""

_FIRST_WIDTH: Final = 1024
_FIRST_SHIFT: Final = MiB.bit_length() - 1
_HEATS: Final = (1, 2, 4, 16, 64)


class Series:
    """Numbers over time.

    Args:
        join: of two numbers that come to the same column: add, or max.

    Synchronization: for one thread.
    """

    def __init__(self, join: Callable[[int, int], int] = add) -> None:
        self.width = _FIRST_WIDTH
        self.values: list[int] = []
        self._join = join

    def put(self, time: int, value: int = 1) -> None:
        """Add a number at a time, in ns since the recording began."""
        while time >= self.width * COLUMNS:
            self.width *= 2
            self.values = fold(self.values, self._join)
        column = time // self.width
        if column >= len(self.values):
            self.values.extend([0] * (column + 1 - len(self.values)))
        self.values[column] = self._join(self.values[column], value)

    def fill(self, end: int) -> None:
        """Let the columns reach to a time."""
        self.put(end, 0)


def fold(values: Sequence[int], join: Callable[[int, int], int]) -> list[int]:
    """Return half as many numbers: each joins two."""
    pairs = list(map(join, islice(values, 0, None, 2), islice(values, 1, None, 2)))
    return [*pairs, values[-1]] if len(values) % 2 else pairs


class _Row:
    """A range of addresses over time."""

    __slots__ = ("present", "touched")

    def __init__(self) -> None:
        self.present = bytearray(COLUMNS)
        self.touched = [0] * COLUMNS

    def fold(self) -> None:
        half = bytes(COLUMNS // 2)
        self.present = bytearray(map(or_, self.present[::2], self.present[1::2])) + half
        self.touched = fold(self.touched, add) + list(half)

    def join(self, other: _Row) -> None:
        self.present = bytearray(map(or_, self.present, other.present))
        self.touched = list(map(add, self.touched, other.touched))


class Heat:
    """Guest addresses over time: mapped or not, and how often they were used.

    The rows are ranges of equal size, which is a power of two. If there are too many rows, each
    pair of neighbours becomes one. Ranges that were never used have no row.

    Synchronization: for one thread.
    """

    def __init__(self) -> None:
        self.width = _FIRST_WIDTH
        self._shift = _FIRST_SHIFT
        self._rows: dict[int, _Row] = {}

    @property
    def row_bytes(self) -> int:
        """How many bytes of guest memory a row is."""
        return 1 << self._shift

    def present(self, start: int, length: int, since: int, until: int) -> None:
        """Note that a range of guest memory was mapped from one time to another."""
        last = self._column(max(since, until))
        first = self._column(since)
        for row in self._ranges(start, length):
            row.present[first : last + 1] = b"\1" * (last + 1 - first)

    def touch(self, start: int, length: int, time: int, count: int = 1) -> None:
        """Note that a range of guest memory was used."""
        column = self._column(time)
        for row in self._ranges(start, length):
            row.touched[column] += count

    def rows(self) -> list[int]:
        """Return the first address of each row, in ascending order."""
        return [key << self._shift for key in sorted(self._rows)]

    def cells(self, end: int, join: int = 1) -> list[list[int]]:
        """Return the heat of each cell, by row and column, up to a time.

        Args:
            end: in ns since the recording began.
            join: how many columns become one.
        """
        columns = self._column(end) + 1
        found = []
        for _, row in sorted(self._rows.items()):
            starts = range(0, columns, join)
            touched = [sum(row.touched[start : start + join]) for start in starts]
            present = [any(row.present[start : start + join]) for start in starts]
            found.append(
                [_heat(count, there) for count, there in zip(touched, present, strict=True)]
            )
        return found

    def _column(self, time: int) -> int:
        while time >= self.width * COLUMNS:
            self.width *= 2
            for row in self._rows.values():
                row.fold()
        return time // self.width

    def _ranges(self, start: int, length: int) -> list[_Row]:
        start = min(max(0, start), MAX_ADDRESS)
        last = min(start + max(1, length) - 1, MAX_ADDRESS)
        while True:
            keys = range(start >> self._shift, (last >> self._shift) + 1)
            if len(keys) <= MAX_ROWS:
                missing = [key for key in keys if key not in self._rows]
                if len(missing) + len(self._rows) <= MAX_ROWS:
                    self._rows.update((key, _Row()) for key in missing)
                    return [self._rows[key] for key in keys]
            self._coarsen()

    def _coarsen(self) -> None:
        self._shift += 1
        rows: dict[int, _Row] = {}
        for key, row in self._rows.items():
            if key >> 1 in rows:
                rows[key >> 1].join(row)
            else:
                rows[key >> 1] = row
        self._rows = rows


def _heat(touched: int, present: bool) -> int:
    """Return a number from :data:`ABSENT` on: higher is hotter."""
    if not touched:
        return COLD if present else ABSENT
    return sum(touched >= limit for limit in _HEATS)
