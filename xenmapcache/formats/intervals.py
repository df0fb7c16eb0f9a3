"""Intervals that overlap, cut so that the first given counts."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple


class Part(NamedTuple):
    """A part of an interval that no earlier one covers. Immutable.

    Attributes:
        start, end: of the part.
        number: which of the given intervals it belongs to, from 0.
    """

    start: int
    end: int
    number: int


def first_wins(intervals: Sequence[tuple[int, int]]) -> list[Part]:
    """Return what each of some intervals ``(start, end)`` covers, in ascending order.

    Where two intervals overlap, the one that was given first counts. The work grows with
    n log n, however the intervals overlap.
    """
    order = sorted(range(len(intervals)), key=intervals.__getitem__)
    if all(intervals[one][1] <= intervals[other][0] for one, other in pairwise(order)):
        apart = ((*intervals[number], number) for number in order)
        return [Part(start, end, number) for start, end, number in apart if start < end]
    edges = sorted({edge for interval in intervals for edge in interval})
    upcoming = iter(sorted(range(len(intervals)), key=lambda number: intervals[number][0]))
    following = next(upcoming, None)
    open_numbers: list[int] = []  # a heap: the first given on top
    parts: list[Part] = []
    for begin, end in pairwise(edges):
        while following is not None and intervals[following][0] <= begin:
            heapq.heappush(open_numbers, following)
            following = next(upcoming, None)
        while open_numbers and intervals[open_numbers[0]][1] <= begin:
            heapq.heappop(open_numbers)
        if not open_numbers:
            continue
        number = open_numbers[0]
        if parts and parts[-1].number == number and parts[-1].end == begin:
            begin = parts.pop().start
        parts.append(Part(begin, end, number))
    return parts
