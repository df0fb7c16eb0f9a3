"""Where a live guest may have pages, found without mapping all of its address space."""

# Theory of operation
#
# A guest of 128 MiB has its RAM below 128 MiB and a few pages below 4 GiB; on Arm its RAM begins at
# 1 GiB. To map a page that is not there costs as much as to map one that is, so mapping a guest's
# address space page by page takes time for the holes. There are two ways to skip holes. Both
# look at windows of 256 pages, and at some pages of each window first.
#
# By Xen's word (x86). Xen tells for any frames whether they have a page of the domain, and how many
# pages the domain has. As soon as a page of a window is seen, all pages of the window are counted.
# When all that Xen counts are found, no other window can have one. Until then, all pages of short
# gaps are looked at, because a guest that balloons leaves single pages, and then more pages of the
# remaining windows, in the end all of them. So no page of the domain is missed. Xen's
# own pages (the shared info page, the frames of the grant table) are not counted on either side,
# and a window that has no other page is skipped. In the others, the few frames without a page are
# mapped to find Xen's own pages. Then it is known of each frame whether it can be mapped.
#
# By mapping (Arm, where Xen does not tell). The first and the last page of each window are mapped.
# A gap is skipped only if it is long and none of its windows shows a page. Pages are not
# counted, because Xen's own pages can be mapped, too. If the remaining windows have no room for the
# pages that Xen counts, nothing is skipped.

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Iterable, Iterator
from itertools import islice, pairwise

from ..address import PAGE_SHIFT, MiB

Look = Callable[["array[int]"], bytes]
"""Tells of each frame whether it has a page: 1 or 0."""

WINDOW_PAGES = 256
MAX_FRAMES = 1024
"""How many frames a look gets at most: the number that Xen takes in one call."""
_ROUNDS = (
    (0, WINDOW_PAGES - 1),
    tuple(range(64, WINDOW_PAGES, 64)),
    tuple(range(16, WINDOW_PAGES, 16)),
    tuple(range(WINDOW_PAGES)),
)
"""Which pages of a window are looked at, in turn. RAM begins and ends where a window does."""
_GAP_WINDOWS = (64 * MiB >> PAGE_SHIFT) // WINDOW_PAGES
"""What lies between two windows that show a page, and is shorter, may be ballooned out in parts."""
_ONES = re.compile(rb"\x01+")


def windows_of(gfn: int, count: int) -> range:
    """Return the numbers of the windows that a range of pages touches."""
    return range(gfn // WINDOW_PAGES, -(-(gfn + count) // WINDOW_PAGES))


def by_count(look: Look, windows: range, pages: int) -> dict[int, bytearray]:
    """Return which windows have pages of a domain, by Xen's word, and which of their frames.

    Args:
        look: asks Xen.
        windows: that are of interest.
        pages: how many pages Xen counts.

    Returns:
        For each window, in ascending order, a byte for each frame: 1 if it has a page.
    """
    found: dict[int, bytearray] = {}
    counted = 0
    for turn, offsets in enumerate((_ROUNDS[0], _ROUNDS[-1], *_ROUNDS[1:])):
        if counted >= pages:
            break
        remaining = _gaps(found) if turn == 1 else [n for n in windows if n not in found]
        showing = _showing(look, remaining, offsets)
        looked = _looked(look, _frames(showing, range(WINDOW_PAGES)))
        for number in showing:
            found[number] = bytearray(islice(looked, WINDOW_PAGES))
            counted += sum(found[number])
    return dict(sorted(found.items()))


def add_others(look: Look, found: dict[int, bytearray]) -> None:
    """Look at the frames of windows in which no page was found, and note those that have one."""
    missing = [
        number * WINDOW_PAGES + place
        for number, frames in found.items()
        for place, there in enumerate(frames)
        if not there
    ]
    for gfn, there in zip(missing, _looked(look, iter(missing)), strict=True):
        number, place = divmod(gfn, WINDOW_PAGES)
        found[number][place] = there


def by_ends(look: Look, windows: range, pages: int) -> list[int]:
    """Return which windows may have pages of a domain, if only mapping shows them.

    Args:
        look: maps.
        windows: that are of interest.
        pages: how many pages Xen counts.
    """
    found: list[int] = []
    for number in _showing(look, windows, _ROUNDS[0]):
        if found and number - found[-1] <= _GAP_WINDOWS:
            found += range(found[-1] + 1, number)
        found.append(number)
    return found if len(found) * WINDOW_PAGES >= pages else list(windows)


def _gaps(found: Iterable[int]) -> list[int]:
    """Return the windows in short gaps between windows, which are given in ascending order."""
    return [
        number
        for before, after in pairwise(found)
        if after - before <= _GAP_WINDOWS
        for number in range(before + 1, after)
    ]


def runs(windows: Iterable[int], gfn: int, count: int) -> Iterator[tuple[int, int]]:
    """Yield ``(gfn, pages)`` of each run of windows in ascending order, cut to a range of pages."""
    whole = ((number * WINDOW_PAGES, (number + 1) * WINDOW_PAGES) for number in windows)
    return _merged(whole, gfn, gfn + count)


def page_runs(found: dict[int, bytearray], gfn: int, count: int) -> Iterator[tuple[int, int]]:
    """Yield ``(gfn, pages)`` of each run of pages in windows, cut to a range of pages."""
    pages = (
        (number * WINDOW_PAGES + match.start(), number * WINDOW_PAGES + match.end())
        for number, frames in found.items()
        for match in _ONES.finditer(frames)
    )
    return _merged(pages, gfn, gfn + count)


def _merged(parts: Iterable[tuple[int, int]], start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield ``(first, length)`` of parts in ascending order that do not touch, cut to a range."""
    first = last = start
    for begin, stop in parts:
        if max(start, begin) > last:
            if last > first:
                yield first, last - first
            first = max(start, begin)
        last = max(last, min(end, stop))
    if last > first:
        yield first, last - first


def _showing(look: Look, windows: Iterable[int], offsets: tuple[int, ...]) -> list[int]:
    """Return the windows that show a page at one of some places."""
    numbers = list(windows)
    looked = _looked(look, _frames(numbers, offsets))
    return [number for number in numbers if any(list(islice(looked, len(offsets))))]


def _frames(windows: Iterable[int], offsets: Iterable[int]) -> Iterator[int]:
    places = tuple(offsets)
    return (number * WINDOW_PAGES + place for number in windows for place in places)


def _looked(look: Look, frames: Iterator[int]) -> Iterator[int]:
    """Yield of each frame whether it has a page."""
    while part := array("Q", islice(frames, MAX_FRAMES)):
        yield from look(part)
