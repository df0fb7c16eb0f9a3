"""``xenmapcache read``: memory as a hexdump, or as it is."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator

from ..address import MiB, check_range
from ..cache import MapCache
from .hexdump import Hexdump
from .parser import CommandError
from .session import opened, present, refusals, views


def run(options: argparse.Namespace) -> int:
    """Print a range of memory. Returns the exit status."""
    with opened(options.source) as cache:
        with refusals():
            start, length = check_range(options.address, options.length, empty=True)
        if options.fill is None:
            _refuse_holes(cache, start, start + length)
        pieces = _pieces(cache, start, start + length, options.fill or b"\0")
        if options.json:
            _print_json(start, length, pieces)
        elif options.hexdump or (sys.stdout.isatty() and not options.raw):
            dump = Hexdump(start, squeeze=not options.no_squeeze)
            for piece in pieces:
                for line in dump.lines(piece):
                    print(line)
            for line in dump.end():
                print(line)
        else:
            for piece in pieces:
                sys.stdout.buffer.write(piece)
    return 0


def _print_json(start: int, length: int, pieces: Iterator[bytes | memoryview]) -> None:
    """Print the object piece by piece: a guest's memory need not fit into this machine's."""
    head, tail = json.dumps({"address": start, "length": length, "hex": ""}, indent=2).split('""')
    print(head, end='"')
    for piece in pieces:
        print(piece.hex(), end="")
    print(f'"{tail}')


def _refuse_holes(cache: MapCache, start: int, end: int) -> None:
    """Look at all of a range before any of it is printed."""
    position = start
    behind = end if cache.memory_end is None else min(end, cache.memory_end)
    for first, last in present(cache, start, behind):
        if first > position:
            break
        position = last
    if position < end:
        raise CommandError(
            f"there is no page at {position:#x}: add --fill 00 to read zeros there, "
            "or see xenmapcache info for what is there"
        )


def _pieces(cache: MapCache, start: int, end: int, fill: bytes) -> Iterator[bytes | memoryview]:
    for first, last in present(cache, start, end):
        for address, view in views(cache, first, last):
            yield from _filled(address - start, fill)
            yield view
            start = address + len(view)
            del view
    yield from _filled(end - start, fill)


def _filled(length: int, fill: bytes) -> Iterator[bytes]:
    for position in range(0, length, MiB):
        yield fill * min(MiB, length - position)
