"""``xenmapcache strings``: printable text in a guest's memory."""

from __future__ import annotations

import argparse

from ..guest import search
from .arguments import add_range, add_source, describe, positive
from .output import place, print_json_line, print_part
from .sources import address_range, open_cache, opening, usage_errors


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Give the command's parser its help and its arguments."""
    describe(
        parser,
        "Print runs of printable ASCII, each with its address.",
        "  xenmapcache strings guest.core | less\n"
        "  xenmapcache strings guest.core -n 8 --encoding utf-16le\n"
        "exit status: 0 if there are any, 1 if not, 2 for an error",
        json="print a JSON object for each, one a line",
    )
    add_source(parser)
    parser.add_argument(
        "-n",
        "--bytes",
        type=positive,
        default=4,
        metavar="MIN",
        dest="min_length",
        help="print runs of at least MIN characters (default: %(default)s)",
    )
    parser.add_argument(
        "--encoding",
        choices=["ascii", "utf-16le"],
        default="ascii",
        help="one byte for each character, or two (default: %(default)s)",
    )
    add_range(parser)


def run(options: argparse.Namespace) -> int:
    """Print runs of printable characters. Returns 0, or 1 if there are none."""
    count = 0
    with open_cache(options.source, **opening(options)) as cache:
        start, end = address_range(options.start, options.length, cache)
        with usage_errors():
            found = search.strings(cache, start, end - start, options.min_length, options.encoding)
        for some in found:  # not one after the other: there may be millions
            count += len(some.firsts)
            if options.json:
                for address, text in some.pairs():
                    print_json_line(place(address) | {"text": text})
            else:
                print_part(some.lines())
    return 0 if count else 1
