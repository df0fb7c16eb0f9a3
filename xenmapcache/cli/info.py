"""``xenmapcache info``: what a source is, and which memory it has."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from ..address import PAGE_SHIFT
from ..cache import MapCache
from .output import Output, print_json, printable, size
from .session import extent, joined, opened, present

_MOST_RANGES = 40


def run(options: argparse.Namespace) -> int:
    """Print what is known of a source. Returns the exit status."""
    output = None if options.json else Output()
    with opened(options.source) as cache:
        start, end = extent(options.start, options.length, cache)
        ranges = list(joined(present(cache, start, end)))
        total = sum(last - first for first, last in ranges)
        holes = list(_holes(ranges, start, end))
        notes = cache.backend.describe()
        if output is None:
            print_json(_facts(options.source, cache, total, ranges, holes, notes))
            return 0
    output.table(
        ("", ""),
        [
            ("source", printable(options.source)),
            ("backend", cache.backend.name),
            ("looked at", f"{start:#x} to {end:#x}"),
            ("memory", f"{total >> PAGE_SHIFT} pages, {size(total)}"),
            ("ranges", str(len(ranges))),
            ("holes", f"{len(holes)}, {size(sum(last - first for first, last in holes))}"),
            *((name.replace("_", " "), _text(value)) for name, value in notes.items()),
        ],
    )
    shown = ranges if options.all else ranges[:_MOST_RANGES]
    if shown:
        output.table(
            ("from", "to", "size"),
            [(f"{first:#010x}", f"{last:#010x}", size(last - first)) for first, last in shown],
        )
    if len(shown) < len(ranges):
        output.text(f"\nand {len(ranges) - len(shown)} more: see --all or --json")
    return 0


def _holes(ranges: list[tuple[int, int]], start: int, end: int) -> Iterator[tuple[int, int]]:
    for first, last in ranges:
        if start < first:
            yield start, first
        start = last
    if start < end:
        yield start, end


def _facts(
    source: str,
    cache: MapCache,
    total: int,
    ranges: list[tuple[int, int]],
    holes: list[tuple[int, int]],
    notes: dict[str, object],
) -> dict[str, object]:
    return {
        "source": source,
        "backend": cache.backend.name,
        "memory_end": cache.memory_end,
        "pages": total >> PAGE_SHIFT,
        "ranges": [{"address": first, "length": last - first} for first, last in ranges],
        "holes": [{"address": first, "length": last - first} for first, last in holes],
        "notes": notes,
    }


def _text(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(each)}" for name, each in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return "\n".join(map(printable, str(value).split("\n")))
