"""Measure drgn's reads through a cache against drgn's own reader of the same ELF core.

The memory is that of tests/images/lab: a Linux guest that ran. Both programs read the same
addresses of the same file, which the page cache holds, in turn and in one process. The columns are
those of tests/benchmarks/sources. Exits with 1 if a limit is exceeded.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from operator import itemgetter
from typing import Any

from tests.benchmarks.report import show
from tests.benchmarks.sources import HEADINGS, Row, best
from tests.benchmarks.timing import machine
from tests.images import lab
from xenmapcache import open_cache
from xenmapcache.adapters.drgn import program
from xenmapcache.address import MiB
from xenmapcache.extras import require

ROUNDS = 7
SOURCE = "plain.elf"
READS = 20_000
RANDOM_LIMIT, ORDER_LIMIT = 1.0, 1.2
"""Times as long as drgn's own reader: 8 bytes at random addresses, and 1 MiB in order."""


def read_all(one: Any, addresses: Sequence[int], size: int) -> None:  # noqa: ANN401 - drgn is optional
    """Read at each address."""
    read = one.read
    for address in addresses:
        read(address, size, True)


def rows(images: lab.Images, rounds: int) -> Iterator[Row]:
    """Measure, and yield a row for each size."""
    path = images.path(SOURCE)
    theirs = require("drgn", "drgn", "drgn").Program()
    theirs.set_core_dump(path)
    with open_cache(path) as cache:
        ours = program(cache)
        start, length = max(cache.present(MiB, cache.memory_end or 0), key=itemgetter(1))
        rng = random.Random(13)
        places = [rng.randrange(start, start + length - 8) for _ in range(READS)]
        order = range(start, start + length - MiB, MiB)
        for work, addresses, size, limit in (
            ("8 bytes at random addresses", places, 8, RANDOM_LIMIT),
            ("1 MiB in order", order, MiB, ORDER_LIMIT),
            ("1 MiB in order, at odd addresses", [at + 0x5008 for at in order], MiB, ORDER_LIMIT),
        ):
            works = [partial(read_all, one, addresses, size) for one in (ours, theirs)]
            took, peer = best(works, rounds)
            yield Row(f"Program.read of {work} / drgn", SOURCE, took, peer, limit)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.drgn", description=__doc__)
    parser.add_argument("--cpu", action="store_true", help="judge by the processors' times")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    measured = list(rows(lab.images(), options.rounds))
    print(machine().replace(", pinned to one", ""))
    show({"": (HEADINGS, [row.cells(cpu=options.cpu) for row in measured])}, 130)
    return 0 if all(row.kept(cpu=options.cpu) for row in measured) else 1


if __name__ == "__main__":
    sys.exit(main())
