"""``xenmapcache read``: memory as a hexdump, or as raw bytes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

from ..address import PAGE_MASK, MiB, check_range
from ..cache import MapCache
from ..errors import TranslationError
from ..guest.addressspace import AddressSpace, missing_page
from .arguments import CommandError, add_source, byte, describe, size
from .hexdump import Hexdump
from .output import place, print_bytes, print_lines, print_part
from .sources import open_cache, opening, present, usage_errors, views
from .translate import add_space, open_space

_DEFAULT_LENGTH = 256


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Give the command's parser its help and its arguments."""
    describe(
        parser,
        "Read memory. On a terminal it is shown as hexdump -C does; a pipe or a file gets the\n"
        "bytes themselves. A missing page is an error, unless --fill gives a byte to\n"
        "return for it. With --virtual, ADDRESS is translated by the page tables of the Linux\n"
        "kernel, unless --cpu or --root names others.",
        "  xenmapcache read guest.core 0x1000 --length 64\n"
        "  xenmapcache read guest.core 1MiB -n 4k > page\n"
        "  xenmapcache read guest.core 0x9f000 8k --fill 00 --hexdump | less\n"
        "  xenmapcache read guest.elf --virtual --cpu 0 0x7fffbfe51120 -n 64\n"
        "exit status: 0, 2 for an error or a missing page",
    )
    add_source(parser)
    parser.add_argument("address", metavar="ADDRESS", type=size, help="such as 0x1000 or 4k")
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "length",
        metavar="LENGTH",
        type=size,
        nargs="?",
        default=_DEFAULT_LENGTH,
        help=f"the same as --length (default: {_DEFAULT_LENGTH})",
    )
    length.add_argument(
        "-n", "--length", metavar="SIZE", type=size, dest="length_option", help="how much to read"
    )
    parser.add_argument("--fill", type=byte, metavar="XX", help="byte to return for missing pages")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--raw", action="store_true", help="the bytes, on a terminal too")
    form.add_argument("--hexdump", action="store_true", help="a hexdump, into a pipe or file too")
    parser.add_argument(
        "--no-squeeze", action="store_true", help="show repeated lines instead of a *"
    )
    parser.add_argument("--virtual", action="store_true", help="ADDRESS is a virtual address")
    add_space(parser)


def run(options: argparse.Namespace) -> int:
    """Print a range of memory. Returns the exit status."""
    length = options.length if options.length_option is None else options.length_option
    with open_cache(options.source, **opening(options)) as cache:
        start = options.address
        if options.virtual:
            space = open_space(cache, options)
            if options.fill is None:
                _refuse_unmapped(space, start, length)
            chunks = _virtual_chunks(space, start, start + length, options.fill)
        else:
            _refuse_space(options)
            with usage_errors():
                start, length = check_range(start, length, empty=True)
            if options.fill is None:
                _refuse_holes(cache, start, start + length)
            chunks = _chunks(cache, start, start + length, options.fill or b"\0")
        if options.json:
            _print_json(start, length, chunks)
        elif options.hexdump or (sys.stdout.isatty() and not options.raw):
            dump = Hexdump(start, squeeze=not options.no_squeeze)
            for chunk in chunks:
                for lines in dump.blocks(chunk):
                    print_lines(lines)
            print_lines(dump.end())
        else:
            for chunk in chunks:
                print_bytes(chunk)
    return 0


def _print_json(start: int, length: int, chunks: Iterator[bytes | memoryview]) -> None:
    """Print the object in chunks: a guest's memory need not fit into this machine's."""
    from json import dumps

    head, tail = dumps(place(start) | {"length": length, "hex": ""}, indent=2).split('""')
    print_part(f'{head}"')
    for chunk in chunks:
        print_part(chunk.hex())
    print_part(f'"{tail}\n')


def _refuse_holes(cache: MapCache, start: int, end: int) -> None:
    """Look at the complete range before anything is printed."""
    hole = _first_hole(cache, start, end)
    if hole is not None:
        raise CommandError(
            f"no page at {hole:#x}: add --fill 00 to read zeros there, or list the present "
            "pages with xenmapcache info"
        )


def _first_hole(cache: MapCache, start: int, end: int) -> int | None:
    position = start
    known_end = end if cache.memory_end is None else min(end, cache.memory_end)
    for first, last in present(cache, start, known_end):
        if first > position:
            break
        position = last
    return position if position < end else None


def _refuse_space(options: argparse.Namespace) -> None:
    for name in ("cpu", "root", "levels", "machine", "half"):
        if getattr(options, name) is not None:
            raise CommandError(f"--{name} needs --virtual: other addresses use no page tables")


def _refuse_unmapped(space: AddressSpace, start: int, length: int) -> None:
    """Look at the complete range before anything is printed."""
    for physical, count in space.physical_ranges(start, length):
        hole = _first_hole(space.cache, physical, physical + count)
        if hole is not None:
            raise missing_page(start + hole - physical, hole)
        start += count


def _virtual_chunks(
    space: AddressSpace, start: int, end: int, fill: bytes | None
) -> Iterator[bytes | memoryview]:
    while start < end:
        try:
            for physical, length in space.physical_ranges(start, end - start):
                yield from _chunks(space.cache, physical, physical + length, fill or b"\0")
                start += length
        except TranslationError:
            if fill is None:  # a live guest has changed its page tables since they were looked at
                raise
            page_end = min((start | PAGE_MASK) + 1, end)
            yield fill * (page_end - start)
            start = page_end


def _chunks(cache: MapCache, start: int, end: int, fill: bytes) -> Iterator[bytes | memoryview]:
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
