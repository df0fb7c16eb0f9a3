"""Measure translations of virtual addresses against reads of guest memory, in one run.

Each row is a ratio, taken in turn, the best of several rounds each. The tables have five levels
and pages of 4 KiB, which is the longest walk. Exits with 1 if a limit is exceeded.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from array import array
from collections.abc import Iterator

from tests.benchmarks.promises import HEADINGS, Promise
from tests.benchmarks.report import show
from tests.benchmarks.timing import ratio
from tests.page_tables import PageTables
from xenmapcache import AddressSpace, MapCache, MockHypervisor, open_backend
from xenmapcache.address import MiB

START = 0xFF11_0000_0000_0000
LOOPS = 2_000
ROUNDS = 60


def rows(pages: int, loops: int, rounds: int) -> Iterator[Promise]:
    """Measure with a guest that maps some pages, in an order in which none follows another."""
    guest = MockHypervisor().create_domain(memory="64M")
    tables = PageTables(guest, "x86-64", 5, root=32 * MiB)
    for page in range(pages):
        tables.map(START + page * 4096, (page ^ 1) * 4096)
    with open_backend("mock", domain=guest) as backend, MapCache(backend) as cache:
        space = AddressSpace(cache, tables.root, levels=5)
        read, translate = cache.read, space.translate
        addresses = array("Q", range(START, START + pages * 4096, 4096))

        def reads() -> None:
            for _ in range(loops):
                read(0x300000, 8)

        def translations() -> None:
            for _ in range(loops):
                translate(START)

        def one_by_one() -> None:
            for address in addresses:
                translate(address)

        length = pages * 4096
        yield _row("translate / hot read of 8 bytes", ratio(translations, reads, rounds), 10)
        many = ratio(lambda: space.translate_many(addresses), one_by_one, min(rounds, 9))
        yield _row(f"translate_many of {pages} / as many translate", many, math.inf)
        virtual = ratio(lambda: space.read(START, length), lambda: read(0, length), min(rounds, 9))
        yield _row("read of scattered pages / cache.read of as much", virtual, math.inf)


def _row(work: str, figure: float, limit: float) -> Promise:
    return Promise(work, "mock", figure, "x", limit)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.translation", description=__doc__
    )
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    options = parser.parse_args()
    measured = list(rows(4096, LOOPS, ROUNDS))
    if options.json:
        print(json.dumps([row.to_json() for row in measured], indent=2))
    else:
        print(f"Python {sys.version.split()[0]}")
        show({"": (HEADINGS, [row.cells() for row in measured])}, 110)
    return 0 if all(row.kept for row in measured) else 1


if __name__ == "__main__":
    sys.exit(main())
