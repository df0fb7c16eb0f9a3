"""Lanes: one for each owner and kind of lease, up to a limit; the others share one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Final

from ...escape import printable
from .bars import STALE, Bar

MAX_LANES: Final = 40
"""How many lanes a group has at most in the picture, besides the one for all others."""
MAX_ROWS: Final = 6
"""How many leases of an owner have a row of their own at the same time."""
GROUPS: Final = ("dma", "device")
"""DMA; and device memory with windows, which may be held across an invalidation."""

_MAX_TRACKED: Final = 400
_MAX_OTHERS: Final = 100_000
_MAX_OWNERS: Final = 2_000
_MAX_NAME: Final = 60


def shorten(text: str, limit: int = _MAX_NAME) -> str:
    """Return a text that can be shown: escaped, and cut if it is long."""
    text = printable(text)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


class Lane:
    """A lane of the picture.

    Attributes:
        number: that bars refer to.
        group: one of :data:`GROUPS`.
        name: of the owner, for people.
        rows: how many rows it has.

    Synchronization: for one thread.
    """

    def __init__(self, number: int, group: str, name: str) -> None:
        self.number = number
        self.group = group
        self.name = name
        self.rows = 1
        self._in_use = [0] * MAX_ROWS

    def occupy(self) -> int:
        """Return the row for a further lease: the first one that is free, or the emptiest."""
        row = self._in_use.index(min(self._in_use))
        self._in_use[row] += 1
        self.rows = max(self.rows, row + 1)
        return row

    def vacate(self, row: int) -> None:
        """Note that a lease of a row has ended."""
        self._in_use[row] -= 1


class LaneBook:
    """Assigns lanes and names, in bounded memory.

    Attributes:
        owners: the names that bars refer to.

    Synchronization: for one thread.
    """

    def __init__(self) -> None:
        self.owners: list[str] = []
        self._numbers: dict[str, int] = {}
        self._lanes: dict[tuple[int, str, str], Lane] = {}
        self._others: dict[str, Lane] = {}
        self._folded: dict[str, set[int]] = {group: set() for group in GROUPS}

    def lane(self, stream: int, kind: str, owner: str) -> Lane:
        """Return the lane of an owner's leases."""
        group = "dma" if kind == "dma" else "device"
        key = stream, group, owner
        lane = self._lanes.get(key)
        if lane is not None:
            return lane
        if len(self._lanes) >= _MAX_TRACKED:
            self._fold(group, key)
            return self._other(group)
        name = shorten(owner) + (f" [{stream}]" if stream else "")
        lane = Lane(len(self._lanes), group, name)
        self._lanes[key] = lane
        return lane

    def owner(self, name: str) -> int:
        """Return the number of an owner's name."""
        name = shorten(name)
        number = self._numbers.get(name)
        if number is not None:
            return number
        if len(self.owners) >= _MAX_OWNERS:
            name = "others"
            if name in self._numbers:
                return self._numbers[name]
        self._numbers[name] = len(self.owners)
        self.owners.append(name)
        return self._numbers[name]

    def arrange(self, bars: Iterable[Bar]) -> tuple[list[Lane], list[Bar]]:
        """Return the lanes to draw, from top to bottom, and the bars with the lanes' numbers.

        In each group, those with stale leases come first, then those with the most leases. The
        lanes beyond the limit become one.
        """
        bars = list(bars)
        weights: Counter[int] = Counter()
        stale: Counter[int] = Counter()
        for bar in bars:
            weights[bar.lane] += bar.total
            stale[bar.lane] += bar.total * (bar.style == STALE)
        places: dict[int, int] = {}
        lanes: list[Lane] = []
        for group in GROUPS:
            found = [(key, lane) for key, lane in self._lanes.items() if key[1] == group]
            found.sort(
                key=lambda each: (stale[each[1].number], weights[each[1].number]), reverse=True
            )
            for _, lane in found[:MAX_LANES]:
                places[lane.number] = len(lanes)
                lanes.append(lane)
            for key, lane in found[MAX_LANES:]:
                self._fold(group, key)
                other = self._other(group)
                other.rows = max(other.rows, lane.rows)
                places[lane.number] = len(lanes)
            if group in self._others:
                other = self._others[group]
                count = len(self._folded[group])
                more = "more than " if count >= _MAX_OTHERS else ""
                other.name = f"others ({more}{count:,})"
                places[other.number] = len(lanes)
                lanes.append(other)
        return lanes, [bar._replace(lane=places[bar.lane]) for bar in bars]

    def _fold(self, group: str, key: tuple[int, str, str]) -> None:
        if len(self._folded[group]) < _MAX_OTHERS:
            self._folded[group].add(hash(key))

    def _other(self, group: str) -> Lane:
        if group not in self._others:
            self._others[group] = Lane(_MAX_TRACKED + GROUPS.index(group), group, "others")
        return self._others[group]
