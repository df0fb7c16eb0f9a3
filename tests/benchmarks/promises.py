"""What is promised of the cache, measured.

Most are ratios: our time over that of the bare thing, taken in turn, the best of several rounds
each, so that a machine's drift cancels out.
"""

from __future__ import annotations

import functools
import gc
import math
import mmap
import os
import random
import tempfile
import threading
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tests.benchmarks.file_backend import FileBackend
from tests.benchmarks.footprint import import_times
from tests.benchmarks.timing import ratio, seconds
from xenmapcache import Backend, Lease, MapCache, MockHypervisor, open_backend
from xenmapcache.address import KiB, MiB
from xenmapcache.binding import libc

SIZE = 256 * MiB
HOT = 0x300000


class Promise(NamedTuple):
    """What was measured, on which source, in which unit, and the most that it may be."""

    work: str
    source: str
    figure: float
    unit: str
    limit: float

    @property
    def kept(self) -> bool:
        return self.figure <= self.limit

    def to_json(self) -> dict[str, object]:
        limit = None if math.isinf(self.limit) else self.limit
        return self._asdict() | {"limit": limit}

    def cells(self) -> tuple[str, ...]:
        """Return it as a row of a table."""
        limit = "" if math.isinf(self.limit) else f"{self.limit:g}"
        verdict = "" if self.kept else "OVER"
        return self.work, self.source, f"{self.figure:.2f} {self.unit}", limit, verdict


HEADINGS = ("work", "source", "measured", "at most", "")


class Source:
    """A guest of 256 MiB, all of it resident, and a plain mmap of as much."""

    def __init__(self, name: str, backend: Backend, plain: mmap.mmap) -> None:
        self.name = name
        self.backend = backend
        self.plain = plain
        self.cache = MapCache(backend)
        for address in range(0, SIZE, 4096):
            self.cache.read(address, 1)

    def promises(self) -> Iterator[Promise]:
        yield self._promise("hot 8-byte read / mmap[a:b]", self.hot(), 3.0)
        yield self._promise(
            "random 8-byte reads over 256 MiB / the same on mmap", self.random(), 1.6
        )
        yield self._promise("4 KiB sequential / mmap", self.sequential(4 * KiB), 1.8)
        yield self._promise("1 MiB sequential / mmap", self.sequential(MiB), 1.1)
        yield self._promise("hot reads by two threads / by one", self.threads(), 1.5)
        yield self._promise('view.cast("Q")[i] / a plain memoryview', self.cast(), 1.1)
        yield self._promise("map_dma + release, 4 KiB / mmap[a:b]", self.dma(), 60)
        yield self._promise("invalidating 256 buckets / bare munmaps", self.invalidation(), 1.5)
        yield Promise(
            "100,000 invalidations, empty", self.name, self.empty_invalidations(), "s", 0.2
        )
        yield Promise("a resident bucket's books", self.name, self.bucket_bytes(), "B", KiB)
        yield Promise("a lease's books", self.name, self.lease_bytes(), "B", KiB)

    def _promise(self, work: str, figure: float, limit: float) -> Promise:
        return Promise(work, self.name, figure, "x", limit)

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
    def _hand_over(mappings: list) -> list:  # type: ignore[type-arg] # of anything
        """Take the duty to unmap away from mappings, so that bare munmaps can be timed."""
        for each in mappings:
            each.abandon()
        return mappings

    def empty_invalidations(self) -> float:
        with MapCache(self.backend) as cache:
            return min(
                seconds(lambda: [cache.invalidate() for _ in range(100_000)]) for _ in range(5)
            )

    def bucket_bytes(self) -> float:
        """What the cache and its mappings allocate, but not what the mock notes of its calls."""
        step = 64 * KiB  # many buckets, so that what a dictionary grows by is shared by many
        with MapCache(self.backend, bucket_shift=16) as cache:
            tracemalloc.start()
            for address in range(0, SIZE, step):
                cache.read(address, 1)
            snapshot = tracemalloc.take_snapshot()
            tracemalloc.stop()
        kept = snapshot.filter_traces([tracemalloc.Filter(False, "*/mock/*.py")])
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


def promises() -> list[Promise]:
    """Measure all that is promised of the cache."""
    with sources() as measured:
        kept = [promise for source in measured for promise in source.promises()]
    times = import_times({"xenmapcache"}, 9)
    figure = 1e3 * (min(times["xenmapcache"]) - min(times[""]))
    return [*kept, Promise("import xenmapcache over bare Python", "-", figure, "ms", 60)]
