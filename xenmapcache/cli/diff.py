"""``xenmapcache diff``: the memory of two sources, compared."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ..address import PAGE_SIZE
from ..cache import MapCache
from .output import print_json, size
from .session import extent, joined, opened, present

_MOST_BYTES = 16


class Difference(NamedTuple):
    """A range that is not the same. Immutable.

    Attributes:
        kind: ``differs``, ``only in first`` or ``only in second``.
        start, end: of the range.
        first, second: the bytes, if they were asked for.
    """

    kind: str
    start: int
    end: int
    first: bytes = b""
    second: bytes = b""


def run(options: argparse.Namespace) -> int:
    """Print what differs. Returns 0 if nothing does, else 1."""
    with opened(options.first) as first, opened(options.second) as second:
        start, end = extent(options.start, options.length, first, second)
        found = _together(differences(first, second, start, end, by_bytes=options.bytes))
        if options.quiet:
            return 0 if next(found, None) is None else 1
        if options.json:
            ranges = [_facts(each) for each in found]
            print_json({"equal": not ranges, "ranges": ranges})
            return 1 if ranges else 0
        status = 0
        names = {
            "differs": "differs",
            "only in first": f"only in {options.first}",
            "only in second": f"only in {options.second}",
        }
        for each in found:
            status = 1
            if each.first:
                print(f"{each.start:#010x}  {each.first.hex(' ')}  ->  {each.second.hex(' ')}")
            else:
                length = size(each.end - each.start)
                print(f"{each.start:#010x}..{each.end:#010x}  {length:>10}  {names[each.kind]}")
    return status


def _facts(difference: Difference) -> dict[str, object]:
    facts: dict[str, object] = {
        "kind": difference.kind,
        "address": difference.start,
        "length": difference.end - difference.start,
    }
    if difference.first:
        facts |= {"first": difference.first.hex(), "second": difference.second.hex()}
    return facts


def _together(differences: Iterable[Difference]) -> Iterator[Difference]:
    """Put pages together that follow one another."""
    last: Difference | None = None
    for each in differences:
        if last and (last.kind, last.end) == (each.kind, each.start) and not each.first:
            last = last._replace(end=each.end)
            continue
        if last:
            yield last
        last = each
    if last:
        yield last


def differences(
    first: MapCache, second: MapCache, start: int, end: int, *, by_bytes: bool
) -> Iterator[Difference]:
    """Yield what differs between two guests in a range, a page or a run of bytes at a time."""
    runs = (joined(present(cache, start, end)) for cache in (first, second))
    for low, high, in_first, in_second in _segments(*runs):
        if not in_second:
            yield Difference("only in first", low, high)
        elif not in_first:
            yield Difference("only in second", low, high)
        else:
            for position, one, other in _unequal(first, second, low, high):
                if by_bytes:
                    yield from _bytes(position, one, other)
                else:
                    yield Difference("differs", position, position + len(one))


def _segments(
    first: Iterator[tuple[int, int]], second: Iterator[tuple[int, int]]
) -> Iterator[tuple[int, int, bool, bool]]:
    """Cut two lists of ranges where either has an edge; yield what is in which of them."""
    one, other = next(first, None), next(second, None)
    position = 0
    while one or other:
        runs = [run for run in (one, other) if run]
        position = max(position, min(run[0] for run in runs))
        edge = min(edge for run in runs for edge in run if edge > position)
        in_first = one is not None and one[0] <= position
        in_second = other is not None and other[0] <= position
        yield position, edge, in_first, in_second
        position = edge
        if one and one[1] <= position:
            one = next(first, None)
        if other and other[1] <= position:
            other = next(second, None)


def _unequal(
    first: MapCache, second: MapCache, start: int, end: int
) -> Iterator[tuple[int, bytes, bytes]]:
    """Yield the pages of a range that both have and that differ: address, and both contents."""
    length = end - start
    for one, other in zip(first.views(start, length), second.views(start, length), strict=True):
        if not _equal(one, other):
            position = 0
            while position < len(one):
                behind = min(len(one), (start + position | PAGE_SIZE - 1) + 1 - start)
                pages = bytes(one[position:behind]), bytes(other[position:behind])
                if pages[0] != pages[1]:
                    yield start + position, *pages
                position = behind
        start += len(one)
        del one, other


def _equal(one: memoryview, other: memoryview) -> bool:
    # Python compares views number by number: eight times as fast with numbers of 8 bytes.
    if len(one) % 8:
        return bytes(one) == bytes(other)
    return one.cast("Q") == other.cast("Q")


def _bytes(address: int, one: bytes, other: bytes) -> Iterator[Difference]:
    """Yield the runs of bytes that differ in a page, a line's worth at most."""
    unequal = (
        (position, position + 1)
        for position, (left, right) in enumerate(zip(one, other, strict=True))
        if left != right
    )
    for start, end in joined(unequal):
        for low in range(start, end, _MOST_BYTES):
            high = min(end, low + _MOST_BYTES)
            pair = one[low:high], other[low:high]
            yield Difference("differs", address + low, address + high, *pair)
