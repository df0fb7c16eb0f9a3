"""Measure what the project promises and print it beside the limits.

Each row is a ratio: our time over that of the bare thing, taken in turn, the best of
several rounds each, so that a machine's drift cancels out. Exits with 1 if a limit is
exceeded on either source.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import mmap
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tests.benchmarks.file_backend import FileBackend
from xenmapcache import Backend, Lease, MapCache, MockHypervisor, open_backend
from xenmapcache.address import KiB, MiB
from xenmapcache.binding import libc

Work = Callable[[], object]

SIZE = 256 * MiB
HOT = 0x300000


class Row(NamedTuple):
    """One promise: what was measured, in which unit, and the most that it may be."""

    work: str
    source: str
    figure: float
    unit: str
    limit: float

    @property
    def kept(self) -> bool:
        return self.figure <= self.limit


def seconds(work: Work) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def ratio(ours: Work, bare: Work, rounds: int = 15) -> float:
    """Return the best time of ours over the best of the bare thing, measured in turn."""
    ours(), bare()
    pairs = [(seconds(ours), seconds(bare)) for _ in range(rounds)]
    return min(pair[0] for pair in pairs) / min(pair[1] for pair in pairs)


class Source:
    """A guest of 256 MiB, all of it resident, and a plain mmap of as much."""

    def __init__(self, name: str, backend: Backend, plain: mmap.mmap) -> None:
        self.name = name
        self.backend = backend
        self.plain = plain
        self.cache = MapCache(backend)
        for address in range(0, SIZE, 4096):
            self.cache.read(address, 1)

    def rows(self) -> Iterator[Row]:
        yield self._row("hot 8-byte read / mmap[a:b]", self.hot(), 3.0)
        yield self._row("random 8-byte reads over 256 MiB / the same on mmap", self.random(), 1.6)
        yield self._row("4 KiB sequential / mmap", self.sequential(4 * KiB), 1.8)
        yield self._row("1 MiB sequential / mmap", self.sequential(MiB), 1.1)
        yield self._row("hot reads by two threads / by one", self.threads(), 1.5)
        yield self._row('view.cast("Q")[i] / a plain memoryview', self.cast(), 1.1)
        yield self._row("map_dma + release, 4 KiB / mmap[a:b]", self.dma(), 60)
        yield self._row("invalidating 256 buckets / bare munmaps", self.invalidation(), 1.5)
        yield Row("100,000 invalidations, empty", self.name, self.empty_invalidations(), "s", 0.2)
        yield Row("a resident bucket's books", self.name, self.bucket_bytes(), "B", KiB)
        yield Row("a lease's books", self.name, self.lease_bytes(), "B", KiB)

    def _row(self, work: str, figure: float, limit: float) -> Row:
        return Row(work, self.name, figure, "x", limit)

    def hot(self) -> float:
        cache, plain = self.cache, self.plain

        def ours() -> None:
            read = cache.read
            for _ in range(50_000):
                read(0x300000, 8)

        def bare() -> None:
            memory = plain
            for _ in range(50_000):
                memory[0x300000:0x300008]

        return ratio(ours, bare)

    def threads(self) -> float:
        """As many reads in all; what is more than 1 is the interpreter's switching."""
        cache = self.cache

        def loop(count: int) -> None:
            read = cache.read
            for _ in range(count):
                read(0x300000, 8)

        def two() -> None:
            threads = [threading.Thread(target=loop, args=(50_000,)) for _ in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        return ratio(two, functools.partial(loop, 100_000))

    def random(self) -> float:
        cache, plain = self.cache, self.plain
        addresses = random.Random(1).sample(range(0, SIZE - 8, 8), 100_000)

        def ours() -> None:
            read = cache.read
            for address in addresses:
                read(address, 8)

        def bare() -> None:
            memory = plain
            for address in addresses:
                memory[address : address + 8]

        return ratio(ours, bare, 9)

    def sequential(self, length: int) -> float:
        cache, plain = self.cache, self.plain
        addresses = range(0, min(SIZE, 16384 * length), length)

        def ours() -> None:
            read = cache.read
            for address in addresses:
                read(address, length)

        def bare() -> None:
            memory = plain
            for address in addresses:
                memory[address : address + length]

        return ratio(ours, bare, 9)

    def cast(self) -> float:
        plain = memoryview(self.plain)[HOT : HOT + 4096].cast("Q")

        def loop(view: memoryview) -> None:
            for _ in range(50_000):
                view[5]

        with self.cache.map_dma(HOT, 4096, owner="bench") as lease:
            leased = lease.view.cast("Q")
            return ratio(lambda: loop(leased), lambda: loop(plain))

    def dma(self) -> float:
        cache, plain = self.cache, self.plain

        def ours() -> None:
            map_dma = cache.map_dma
            for _ in range(10_000):
                map_dma(HOT, 4096, owner="bench").release()

        def bare() -> None:
            memory = plain
            for _ in range(10_000):
                memory[0x300000:0x300008]

        return ratio(ours, bare)

    def invalidation(self) -> float:
        """256 buckets, each of them touched once, against as many munmaps of the same."""
        ours, bare = [], []
        for _ in range(9):
            with MapCache(self.backend) as cache:
                for address in range(0, SIZE, MiB):
                    cache.read(address, 1)
                gc.collect()
                ours.append(seconds(cache.invalidate))
            addresses = []
            mappings = []
            for address in range(0, SIZE, MiB):
                mapping = self.backend.map(address >> 12, 256, writable=True)
                mapping.view(0, 1)[0]
                addresses.append(mapping.address)
                mappings.append(mapping)
            spare = self._hand_over(mappings)
            bare.append(seconds(functools.partial(unmap_all, addresses)))
            del spare
        return min(ours) / min(bare)

    @staticmethod
    def _hand_over(mappings: list) -> list:  # type: ignore[type-arg]
        """Take the duty to unmap away from mappings, so that bare munmaps can be timed."""
        from xenmapcache import mapping as module

        for each in mappings:
            module._live.pop(each.address)
        return mappings

    def empty_invalidations(self) -> float:
        with MapCache(self.backend) as cache:
            return min(
                seconds(lambda: [cache.invalidate() for _ in range(100_000)]) for _ in range(5)
            )

    def bucket_bytes(self) -> float:
        """What the cache and its mappings allocate, but not the mock's log of calls."""
        step = 64 * KiB  # many buckets, so that what a dictionary grows by is shared by many
        with MapCache(self.backend, bucket_shift=16) as cache:
            tracemalloc.start()
            for address in range(0, SIZE, step):
                cache.read(address, 1)
            snapshot = tracemalloc.take_snapshot()
            tracemalloc.stop()
        kept = snapshot.filter_traces(
            [tracemalloc.Filter(False, "*/mock/domain.py", lineno=line) for line in log_lines()]
        )
        return sum(trace.size for trace in kept.traces) / (SIZE // step)

    def lease_bytes(self) -> float:
        count = 10_000
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        leases: list[Lease] = [self.cache.map_dma(HOT, 4096, owner="bench") for _ in range(count)]
        used = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
        for lease in leases:
            lease.release()
        return used / count


def unmap_all(addresses: list[int]) -> None:
    for address in addresses:
        libc.unmap(address, MiB)


def log_lines() -> list[int]:
    """Return the lines of the mock that write its log."""
    from xenmapcache.mock import domain

    text = Path(domain.__file__).read_text().splitlines()
    return [number for number, line in enumerate(text, 1) if "_calls.append" in line]


def import_milliseconds() -> float:
    """Return how much longer Python takes with ``import xenmapcache``."""

    def start(code: str) -> float:
        command = [sys.executable, "-c", code]
        return min(seconds(lambda: subprocess.run(command, check=True)) for _ in range(9))

    return (start("import xenmapcache") - start("pass")) * 1000


@contextmanager
def sources() -> Iterator[list[Source]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "guest.img"
        with path.open("wb+") as file:
            for _ in range(SIZE // MiB):
                file.write(os.urandom(MiB))
            file.flush()
            on_file = mmap.mmap(file.fileno(), SIZE)
        hypervisor = MockHypervisor()
        domain = hypervisor.create_domain(memory=SIZE)
        on_mock = mmap.mmap(hypervisor.fd, SIZE)
        on_mock[:] = on_file[:]
        yield [
            Source("mock", open_backend("mock", domain=domain), on_mock),
            Source("file", FileBackend(path), on_file),
        ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    options = parser.parse_args()
    with sources() as measured:
        rows = [row for source in measured for row in source.rows()]
    rows.append(Row("import xenmapcache over bare Python", "-", import_milliseconds(), "ms", 60))
    if options.json:
        print(json.dumps([row._asdict() for row in rows], indent=2))
    else:
        print_table(rows)
    return 0 if all(row.kept for row in rows) else 1


def print_table(rows: list[Row]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"Python {sys.version.split()[0]}", box=None, title_justify="left")
    for heading in ("work", "source"):
        table.add_column(heading)
    for heading in ("measured", "at most", ""):
        table.add_column(heading, justify="right")
    for row in rows:
        verdict = "" if row.kept else "[red]OVER"
        table.add_row(
            escape(row.work), row.source, f"{row.figure:.2f} {row.unit}", f"{row.limit:g}", verdict
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    sys.exit(main())
