"""Bars: leases in time; and levels of detail, which merge bars that are too short to see."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, NamedTuple, Protocol, TypeVar

# The order matters: up to BIDIRECTIONAL, it is DMA that is not stale.
TO_DEVICE, FROM_DEVICE, BIDIRECTIONAL, DEVICE, WINDOW, STALE = range(6)
STYLES: Final = (
    "DMA to a device",
    "DMA from a device",
    "DMA in both directions, or merged",
    "device memory",
    "window",
    "stale DMA",
)
"""What the style of a bar means, for people; in the order of the numbers."""

_MIN_GAIN: Final = 0.7
_FINEST_SHIFT: Final = 18
_PIXEL_SHIFT: Final = 10


class Bar(NamedTuple):
    """A lease in the picture, or several that are merged. Immutable.

    Attributes:
        start: in ns since the recording began.
        end: likewise; equal to the start if it is a moment.
        lane: the number of the lane.
        row: in the lane, from 0 on; leases that are held at the same time have rows of their own.
        style: an index into :data:`STYLES`.
        owner: an index into the names of the owners.
        lease: the number of the first lease.
        low: the first address.
        high: the address after the last one.
        total: how many leases are merged.
    """

    start: int
    end: int
    lane: int
    row: int
    style: int
    owner: int
    lease: int
    low: int
    high: int
    total: int = 1


class Burst(NamedTuple):
    """Invalidations in close succession, or a single one. Immutable.

    Attributes:
        start: of the first one, in ns since the recording began.
        end: likewise, of the last one.
        total: how many.
        dropped: how many buckets they have dropped.
        held: how many DMA leases were held across one of them, at most.
        duration: of all of them, in ns.
    """

    start: int
    end: int
    total: int
    dropped: int
    held: int
    duration: int


class _Timed(Protocol):
    """What can be merged: a range of time."""

    @property
    def start(self) -> int: ...
    @property
    def end(self) -> int: ...


_T = TypeVar("_T", bound=_Timed)


class Level(NamedTuple):
    """A level of detail. Immutable.

    Attributes:
        width: what was merged is shorter than this, and has gaps shorter than this; in ns.
        items: bars or bursts, in the order of their start.
    """

    width: int
    items: Sequence[Any]


def merge_bars(bars: Iterable[Bar], width: int, gap: int) -> list[Bar]:
    """Return bars, of which those that are shorter than a width are merged with their neighbours.

    Two bars are merged if one of them is shorter than the width, and less than the gap is between
    them.

    Only bars of the same lane, row and kind are merged, so that a stale lease stays red. DMA of
    several directions becomes DMA in both. The result is in the order of the start.
    """
    return _merge(bars, width, gap, _place_of, _join_bars)


def merge_bursts(bursts: Iterable[Burst], width: int) -> list[Burst]:
    """Return bursts, of which those whose gaps are shorter than a width are merged."""
    return _merge(bursts, width, width, lambda _: None, _join_bursts)


def _merge(
    items: Iterable[_T],
    width: int,
    gap: int,
    key_of: Callable[[_T], object],
    join: Callable[[_T, _T], _T],
) -> list[_T]:
    last: dict[object, _T] = {}
    done = []
    for item in sorted(items):  # type: ignore[type-var] # named tuples have an order
        key = key_of(item)
        former = last.get(key)
        if former is None:
            last[key] = item
            continue
        is_short = min(item.end - item.start, former.end - former.start) < width
        if is_short and item.start - former.end < gap:
            last[key] = join(former, item)
        else:
            done.append(former)
            last[key] = item
    return sorted([*done, *last.values()])  # type: ignore[type-var] # named tuples have an order


def _place_of(bar: Bar) -> tuple[int, int, int]:
    return bar.lane, bar.row, max(bar.style, BIDIRECTIONAL)


def _join_bars(one: Bar, other: Bar) -> Bar:
    return one._replace(
        end=max(one.end, other.end),
        style=one.style if one.style == other.style else BIDIRECTIONAL,
        low=min(one.low, other.low),
        high=max(one.high, other.high),
        total=one.total + other.total,
    )


def _join_bursts(one: Burst, other: Burst) -> Burst:
    return Burst(
        one.start,
        max(one.end, other.end),
        one.total + other.total,
        one.dropped + other.dropped,
        max(one.held, other.held),
        one.duration + other.duration,
    )


def levels_of_bars(bars: Iterable[Bar], span: int, budget: int) -> list[Level]:
    """Return levels of detail, the finest first, until one is within a budget.

    Args:
        bars: in any order.
        span: of the recording, in ns.
        budget: how many bars can be shown at a time. If each combination of a lane, a row and a
            style has a bar, these are the least that a level can have.
    """
    levels = [Level(0, sorted(bars))]
    pixel = max(1, span >> _PIXEL_SHIFT)
    width = gap = max(1, span >> _FINEST_SHIFT)
    while len(levels[-1].items) > budget:
        items = merge_bars(levels[-1].items, width, gap)
        if len(items) <= budget or len(items) < _MIN_GAIN * len(levels[-1].items):
            levels.append(Level(width, items))
        if gap > span:
            break
        # First longer bars without a gap that can be seen, and only then wider gaps.
        width *= 2
        gap = min(width, pixel) if width <= 2 * span else 2 * gap
    return levels


def levels_of_bursts(bursts: Iterable[Burst], span: int, lines: int) -> list[Level]:
    """Return levels of detail, the finest first.

    Args:
        bursts: in any order.
        span: of the recording, in ns.
        lines: how many lines the coarsest level has at most, if they are far apart.
    """
    levels = [Level(0, sorted(bursts))]
    width = max(1, span // lines)
    widths: list[int] = []
    while width > 1 and len(widths) < _FINEST_SHIFT // 2:
        widths.append(width)
        width //= 4
    for width in reversed(widths):
        levels.append(Level(width, merge_bursts(levels[-1].items, width)))
    return levels
