"""Runs: consecutive guest pages that follow each other in a file."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from operator import attrgetter
from typing import NamedTuple

from ..address import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE
from ..formats.intervals import first_wins
from ..formats.spans import LOST, ZEROS, Span

MAX_FRAGMENTS = 1 << 16
"""Of pages that a file has in parts, at most: each takes memory of this process."""

_NOWHERE = -1

_gfn = attrgetter("gfn")


class Fragment(NamedTuple):
    """Bytes of one page that follow each other in the file. Immutable.

    Attributes:
        start: of the first one in the page, in bytes.
        length: in bytes.
        offset: of the first one in the file, in bytes.
    """

    start: int
    length: int
    offset: int


class Run(NamedTuple):
    """Consecutive guest pages that follow each other in the file. Immutable.

    Attributes:
        gfn: the first guest frame number.
        pages: how many.
        offset: of the first one in the file, in bytes; need not be page-aligned.
        fragments: None, or what the file has of a single page that it has in parts. All other
            bytes are zeros. If it is empty, the file has nothing of the pages. In both cases
            ``offset`` means nothing, and is never page-aligned.
    """

    gfn: int
    pages: int
    offset: int
    fragments: tuple[Fragment, ...] | None = None


def clip(runs: Sequence[Run], gfn: int, count: int) -> Iterator[Run]:
    """Return those parts of runs, in order of gfn and without overlaps, that lie in a range."""
    end = gfn + count
    for position in range(max(0, bisect_right(runs, gfn, key=_gfn) - 1), len(runs)):
        run = runs[position]
        if run.gfn >= end:
            return
        skipped = max(0, gfn - run.gfn)
        pages = min(run.gfn + run.pages, end) - run.gfn - skipped
        if pages > 0:
            offset = run.offset + (skipped << PAGE_SHIFT)
            yield Run(run.gfn + skipped, pages, offset, run.fragments)


class PartialPage(NamedTuple):
    """A page of which the file has only a part. Immutable.

    Attributes:
        gfn: its guest frame number.
        missing: bytes that the file lacks; they read as zeros.
    """

    gfn: int
    missing: int


class Layout:
    """The pages that spans of bytes give, with what is missing of them.

    Where spans overlap, the one that was given first counts, but memory comes before zeros, and
    zeros before what is lost. Spans that touch are joined before pages are counted: a page may
    have several parts, and a page exists if the file has any part of it.

    Args:
        spans: in order of precedence.

    Attributes:
        runs: in order of gfn, without overlaps.
        partial: the pages of which the file has only a part, in order.
        lost_bytes, lost_pages: what the file should have and does not.
        dropped: pages in parts that are not in ``runs``, because there are too many of them.
    """

    def __init__(self, spans: Iterable[Span]) -> None:
        self.runs: list[Run] = []
        self.partial: list[PartialPage] = []
        self.lost_bytes = self.lost_pages = self.dropped = 0
        self._lost_end = 0
        self._gfn = -1
        self._fragments: list[Fragment] = []
        self._known = self._kept = 0
        runs = self.runs
        for first, end, offset in _joined(_apart(spans)):
            if offset == LOST:
                self._lose(first, end)
            elif (first | end) & PAGE_MASK:
                self._split(first, end, offset)
            elif offset == ZEROS:
                runs.append(Run(first >> PAGE_SHIFT, end - first >> PAGE_SHIFT, _NOWHERE, ()))
            else:
                runs.append(Run(first >> PAGE_SHIFT, end - first >> PAGE_SHIFT, offset))
        self._finish_page()
        runs.sort(key=_gfn)

    def _lose(self, first: int, end: int) -> None:
        self.lost_bytes += end - first
        start = max(self._lost_end, first >> PAGE_SHIFT)
        self._lost_end = max(start, end + PAGE_MASK >> PAGE_SHIFT)
        self.lost_pages += self._lost_end - start

    def _split(self, first: int, end: int, offset: int) -> None:
        """Take a span that begins or ends inside a page."""
        while first < end:
            gfn, start = first >> PAGE_SHIFT, first & PAGE_MASK
            length = min(PAGE_SIZE - start, end - first)
            if length == PAGE_SIZE:
                pages = end - first >> PAGE_SHIFT
                length = pages << PAGE_SHIFT
                self.runs.append(
                    Run(gfn, pages, _NOWHERE, ()) if offset == ZEROS else Run(gfn, pages, offset)
                )
            else:
                if gfn != self._gfn:
                    self._finish_page()
                    self._gfn = gfn
                self._known += length
                if offset != ZEROS:
                    self._fragments.append(Fragment(start, length, offset))
            first += length
            offset += length if offset != ZEROS else 0

    def _finish_page(self) -> None:
        """Add the page whose parts were collected."""
        if self._gfn < 0:
            return
        if self._kept + len(self._fragments) + 1 > MAX_FRAGMENTS:
            self.dropped += 1
        else:
            self.runs.append(Run(self._gfn, 1, _NOWHERE, tuple(self._fragments)))
            self._kept += len(self._fragments) + 1
            if self._known < PAGE_SIZE:
                self.partial.append(PartialPage(self._gfn, PAGE_SIZE - self._known))
        self._gfn, self._fragments, self._known = -1, [], 0


def _apart(spans: Iterable[Span]) -> Iterable[tuple[int, int, int]]:
    """Return spans in ascending order, cut so that they do not overlap."""
    given = list(spans)
    ordered = sorted(given)
    if all(one[1] <= other[0] for one, other in pairwise(ordered)):
        return ordered
    del ordered  # a large file has millions
    given.sort(key=lambda span: max(0, -span[2]))  # memory, zeros, what is lost
    unique: dict[tuple[int, int], int] = {}  # a dump may have the same range thousands of times
    for first, end, offset in given:
        unique.setdefault((first, end), offset)
    intervals = list(unique)
    offsets = list(unique.values())
    return [
        (start, end, offsets[number] + (start - intervals[number][0]) * (offsets[number] >= 0))
        for start, end, number in first_wins(intervals)
    ]


def _joined(spans: Iterable[tuple[int, int, int]]) -> Iterator[tuple[int, int, int]]:
    """Join spans that follow each other in memory and in the file."""
    first = end = offset = 0
    for start, stop, place in spans:
        if start == end and place == (offset + end - first if offset >= 0 else offset):
            end = stop
            continue
        if first < end:
            yield first, end, offset
        first, end, offset = start, stop, place
    if first < end:
        yield first, end, offset
