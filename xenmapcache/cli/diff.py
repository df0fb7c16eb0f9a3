"""``xenmapcache diff``: the memory of two sources, compared."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ..address import PAGE_MASK, PAGE_SHIFT, KiB
from ..cache import MapCache
from .arguments import CommandError, add_range, add_source, describe
from .output import place, print_json, print_line, size
from .sources import address_range, merge_adjacent, open_cache, opening, present

_LINE_BYTES = 16
_PART_BYTES = 256 * KiB
"""Two of them fit into a processor's cache."""


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Give the command's parser its help and its arguments."""
    describe(
        parser,
        "Compare the memory of two sources, page by page, and print the ranges that differ or\n"
        "that only one of them has.",
        "  xenmapcache diff before.core after.core\n"
        "  xenmapcache diff before.core xen:web --show-bytes --start 0x1000 --length 4k\n"
        "  xenmapcache diff --common guest.raw guest.kdump\n"
        "  xenmapcache diff --quiet a.core b.core && echo equal\n"
        "exit status: 0 if they are equal, 1 if they differ, 2 for an error",
    )
    add_source(parser, "first", "second")
    parser.add_argument(
        "--show-bytes", action="store_true", help="print the bytes that differ, in hex"
    )
    parser.add_argument(
        "-q", "--quiet", action="store_true", help="print nothing; only set the exit status"
    )
    parser.add_argument(
        "--common",
        action="store_true",
        help="compare only what both have; it is an error if that is nothing",
    )
    add_range(parser)


class Difference(NamedTuple):
    """A range that differs. Immutable.

    Attributes:
        kind: ``differs``, ``only in first`` or ``only in second``.
        start, end: of the range.
        first, second: the bytes, if requested.
    """

    kind: str
    start: int
    end: int
    first: bytes = b""
    second: bytes = b""


def run(options: argparse.Namespace) -> int:
    """Print what differs. Returns 0 if nothing differs, else 1."""
    how = opening(options)
    with open_cache(options.first, **how) as first, open_cache(options.second, **how) as second:
        start, end = address_range(options.start, options.length, first, second)
        if options.common:
            _refuse_nothing_common(first, second, start, end)
        found = _merge(
            differences(
                first,
                second,
                start,
                end,
                by_bytes=options.show_bytes,
                common=options.common,
            )
        )
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
                print_line(f"{each.start:#010x}  {each.first.hex(' ')}  ->  {each.second.hex(' ')}")
            else:
                length = size(each.end - each.start)
                place = f"{each.start:#010x}..{each.end:#010x}"
                print_line(f"{place}  {length:>10}  {names[each.kind]}")
    return status


def _facts(difference: Difference) -> dict[str, object]:
    facts: dict[str, object] = {
        "kind": difference.kind,
        **place(difference.start),
        "length": difference.end - difference.start,
    }
    if difference.first:
        facts |= {"first": difference.first.hex(), "second": difference.second.hex()}
    return facts


def _merge(differences: Iterable[Difference]) -> Iterator[Difference]:
    """Merge pages that touch."""
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
    first: MapCache,
    second: MapCache,
    start: int,
    end: int,
    *,
    by_bytes: bool,
    common: bool = False,
) -> Iterator[Difference]:
    """Yield what differs between two guests in a range, a page or a run of bytes at a time.

    With `by_bytes` the bytes come too. With `common`, what only one of them has is left out.
    """
    runs = (merge_adjacent(present(cache, start, end)) for cache in (first, second))
    for low, high, in_first, in_second in _segments(*runs):
        if not (in_first and in_second):
            if not common:
                yield Difference(f"only in {'first' if in_first else 'second'}", low, high)
        else:
            for position, one, other in _unequal(first, second, low, high):
                if by_bytes:
                    yield from _bytes(position, one, other)
                else:
                    yield Difference("differs", position, position + len(one))


def _refuse_nothing_common(first: MapCache, second: MapCache, start: int, end: int) -> None:
    runs = (merge_adjacent(present(cache, start, end)) for cache in (first, second))
    if not any(in_first and in_second for *_, in_first, in_second in _segments(*runs)):
        raise CommandError(
            f"the sources have no page in common from {start:#x} to {end:#x}: compare what each "
            "has with xenmapcache info"
        )


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
    for address, one, other in _pairs(first, second, start, end):
        if _equal(one, other):
            continue
        position = 0
        while position < len(one):
            page_end = min(len(one), (address + position | PAGE_MASK) + 1 - address)
            pages = bytes(one[position:page_end]), bytes(other[position:page_end])
            if pages[0] != pages[1]:
                yield address + position, *pages
            position = page_end


def _pairs(
    first: MapCache, second: MapCache, start: int, end: int
) -> Iterator[tuple[int, memoryview, memoryview]]:
    """Yield the memory of both in parts, of the same addresses. Drop them before the next."""
    step = min(_PART_BYTES, end - start)
    buffers = memoryview(bytearray(step)), memoryview(bytearray(step))
    while start < end:
        edge = min((start | _PART_BYTES - 1) + 1, end)
        one, other = (buffer[: edge - start] for buffer in buffers)
        gfn = start >> PAGE_SHIFT
        whole = not (start | edge) & PAGE_MASK
        if whole and first.backend.read_pages(gfn, one) and second.backend.read_pages(gfn, other):
            yield start, one, other
        else:
            del one, other
            yield from _mapped_pairs(first, second, start, edge)
        start = edge


def _mapped_pairs(
    first: MapCache, second: MapCache, start: int, end: int
) -> Iterator[tuple[int, memoryview, memoryview]]:
    length = end - start
    for one, other in zip(first.views(start, length), second.views(start, length), strict=True):
        yield start, one, other
        start += len(one)
        del one, other


def _equal(one: memoryview, other: memoryview) -> bool:
    if isinstance(one.obj, bytearray) and one.nbytes == len(one.obj):
        return one.obj == other.obj  # in C, by memcmp
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
    for start, end in merge_adjacent(unequal):
        for low in range(start, end, _LINE_BYTES):
            high = min(end, low + _LINE_BYTES)
            pair = one[low:high], other[low:high]
            yield Difference("differs", address + low, address + high, *pair)
