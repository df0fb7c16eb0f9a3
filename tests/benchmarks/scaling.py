"""Cost against size, on the mock: ``make bench-scaling``.

Each kind of work with more and more buckets resident, then with more and more leases held. What
counts is the cost of one over that with the fewest: flat is 1. The best processor time of
several rounds each, in which the sizes take turns. Buckets are single pages, so that many take
little memory.
"""

from __future__ import annotations

import argparse
import logging
import mmap
import random
from collections.abc import Callable, Iterable, Sequence

from tests.benchmarks.report import PAGE, Table, markdown, rewrite, show
from tests.benchmarks.timing import cpu_seconds, machine, pin
from xenmapcache import Lease, MapCache, MockHypervisor, open_backend
from xenmapcache.address import PAGE_SIZE

COMMAND = "make bench-scaling"
BUCKETS = (10, 100, 1_000, 10_000, 30_000)
LEASES = (1, 10, 100, 1_000, 10_000, 100_000)
ROUNDS = 9
TIMES = 2_000

Costs = dict[str, dict[int, float]]
"""Seconds by size, by work."""


class Resident:
    """A cache that is full: N buckets are resident.

    Its methods are the kinds of work. Each returns the seconds that one took.
    """

    def __init__(self, buckets: int, times: int) -> None:
        self.buckets, self.times = buckets, times
        size = buckets * PAGE_SIZE
        hypervisor = MockHypervisor()
        domain = hypervisor.create_domain(memory=2 * size)
        self.plain = mmap.mmap(hypervisor.fd, size)
        backend = open_backend("mock", domain=domain)
        self.cache = MapCache(backend, bucket_shift=12, max_resident=size)
        self.places = random.Random(1).choices(range(0, size, PAGE_SIZE), k=times)
        self.next = 0

    def fill(self) -> None:
        """Make the first buckets resident, and read them again."""
        for _ in range(2):
            for address in range(0, self.buckets * PAGE_SIZE, PAGE_SIZE):
                self.cache.read(address, 8)

    def works(self) -> dict[str, Callable[[], float]]:
        return {
            "hot read": self.hot,
            "random read": self.random,
            "the same, plain mmap": self.bare,
            "map_dma + release": self.dma,
            "stats": self.stats,
            "miss + eviction": self.miss,
            "invalidate, a bucket": self.invalidate,
        }

    def hot(self) -> float:
        return self._reads([0] * self.times)

    def random(self) -> float:
        return self._reads(self.places)

    def bare(self) -> float:
        def work(plain: mmap.mmap = self.plain) -> None:
            for address in self.places:
                plain[address : address + 8]

        return cpu_seconds(work) / self.times

    def _reads(self, addresses: Sequence[int]) -> float:
        def work(read: Callable[[int, int], bytes] = self.cache.read) -> None:
            for address in addresses:
                read(address, 8)

        return cpu_seconds(work) / len(addresses)

    def dma(self) -> float:
        def work(map_dma: Callable[..., Lease] = self.cache.map_dma) -> None:
            for address in self.places:
                map_dma(address, 512, owner="bench").release()

        return cpu_seconds(work) / self.times

    def stats(self) -> float:
        def work() -> None:
            for _ in range(self.times):
                self.cache.stats()

        return cpu_seconds(work) / self.times

    def miss(self) -> float:
        """Go round and round through twice what fits: nothing that is asked for is there."""
        misses = self.cache.stats().misses
        total = 2 * self.buckets
        addresses = [
            number % total * PAGE_SIZE for number in range(self.next, self.next + self.times)
        ]
        self.next += self.times
        taken = self._reads(addresses)
        assert self.cache.stats().misses == misses + self.times
        return taken

    def invalidate(self) -> float:
        taken, dropped = 0.0, 0
        while dropped < self.times:  # few buckets are too quick to be timed once
            self.fill()
            taken += cpu_seconds(self.cache.invalidate)
            dropped += self.buckets
        self.next = self.buckets  # where the first ones, resident again, are the farthest off
        self.fill()
        return taken / dropped

    def close(self) -> None:
        self.cache.close()


class Leased:
    """A cache with N DMA leases, apart from each other, and one device lease."""

    def __init__(self, leases: int, times: int) -> None:
        self.held, self.times = leases, times
        size = 128 * PAGE_SIZE
        self.cache = MapCache(open_backend("mock", memory=size), bucket_shift=12)
        self.device = self.cache.map_device(size // 2, PAGE_SIZE, owner="bench")
        self.leases = [self.take(number) for number in range(leases)]
        choices = random.Random(1).choices(self.leases, k=max(1, min(times, 2_000_000 // leases)))
        self.pointers = [lease.host_address + 1 for lease in choices]

    def take(self, number: int) -> Lease:
        """Lease a range that no other one of 100,000 has."""
        return self.cache.map_dma(2 * number, 2, owner="bench")

    def works(self) -> dict[str, Callable[[], float]]:
        return {
            "hot read": self.hot,
            "map_dma + release": self.dma,
            "replace": self.replace,
            "stats": self.stats,
            "resolve": self.resolve,
            "leases, a lease": self.infos,
            "invalidate, a lease": self.invalidate,
        }

    def hot(self) -> float:
        def work(read: Callable[[int, int], bytes] = self.cache.read) -> None:
            for _ in range(self.times):
                read(0, 8)

        return cpu_seconds(work) / self.times

    def dma(self) -> float:
        def work() -> None:
            for number in range(self.times):
                self.take(number).release()

        return cpu_seconds(work) / self.times

    def replace(self) -> float:
        one, two = self.device.address, self.device.address ^ PAGE_SIZE

        def work() -> None:
            for _ in range(self.times // 2):
                self.cache.replace(one, two, PAGE_SIZE)
                self.cache.replace(two, one, PAGE_SIZE)

        return cpu_seconds(work) / self.times

    def stats(self) -> float:
        def work() -> None:
            for _ in range(self.times):
                self.cache.stats()

        return cpu_seconds(work) / self.times

    def resolve(self) -> float:
        def work() -> None:
            for pointer in self.pointers:
                self.cache.resolve(pointer)

        return cpu_seconds(work) / len(self.pointers)

    def infos(self) -> float:
        return self._repeated(self.cache.leases)

    def invalidate(self) -> float:
        """Each lease is found stale; that was warned of the first time, in the round before."""
        return self._repeated(self.cache.invalidate)

    def _repeated(self, call: Callable[[], object]) -> float:
        repeats = max(1, self.times // self.held)

        def work() -> None:
            for _ in range(repeats):
                call()

        return cpu_seconds(work) / repeats / self.held

    def close(self) -> None:
        for lease in self.leases:
            lease.release()
        self.device.release()
        self.cache.close()


def costs(cases: dict[int, Resident] | dict[int, Leased], rounds: int) -> Costs:
    """Return the best of the rounds by work and size; the sizes take turns."""
    best: Costs = {}
    for _ in range(rounds):
        for size, case in cases.items():
            for name, work in case.works().items():
                taken = work()
                of_work = best.setdefault(name, {})
                of_work[size] = min(taken, of_work.get(size, taken))
    return best


def by_buckets(sizes: Iterable[int], rounds: int, times: int) -> Costs:
    """Measure with N resident buckets."""
    cases = {size: Resident(size, times) for size in sizes}
    for case in cases.values():
        case.invalidate()
    measured = costs(cases, rounds)
    for case in cases.values():
        case.close()
    return measured


def by_leases(sizes: Iterable[int], rounds: int, times: int) -> Costs:
    """Measure with N leases held."""
    logger = logging.getLogger("xenmapcache")
    before, logger.disabled = logger.disabled, True
    try:
        cases = {size: Leased(size, times) for size in sizes}
        for case in cases.values():
            case.invalidate()
        measured = costs(cases, rounds)
        for case in cases.values():
            case.close()
    finally:
        logger.disabled = before
    return measured


def table(measured: Costs, what: str) -> Table:
    """Show the cost at each size over that at the smallest, and what that was."""
    sizes = list(next(iter(measured.values())))
    headings = ("work", f"at {sizes[0]:,}", *(f"{size:,} {what}" for size in sizes[1:]))
    rows = []
    for name, of_work in measured.items():
        first = of_work[sizes[0]]
        ratios = (
            f"{of_work[size] / first:,.{2 if of_work[size] < 10 * first else 0}f}"
            for size in sizes[1:]
        )
        rows.append((name, f"{1e6 * first:.2f} µs", *ratios))
    return headings, rows


def draw(charts: dict[str, Costs]) -> None:
    """Draw each as a panel: cost over that at the smallest size, both logarithmic."""
    from matplotlib import pyplot

    from tests.benchmarks import chart  # its matplotlib is not everywhere

    figure, panels = pyplot.subplots(1, len(charts), figsize=(10, 4.5), sharey=True)
    for axes, (what, measured) in zip(panels, charts.items(), strict=True):
        axes.set_prop_cycle(**chart.LINES)
        for name, of_work in measured.items():
            first = next(iter(of_work.values()))
            axes.plot(list(of_work), [cost / first for cost in of_work.values()], label=name)
        axes.set_xscale("log")
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda number, _: f"{number:,.6g}")
        axes.set_xlabel(what)
        axes.set_title(f"Cost of one, times that with the fewest {what}", fontsize=10, loc="left")
        axes.legend(frameon=False, fontsize=8)
    chart.save(figure, "scaling")
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.scaling", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"rewrite {PAGE.name}, and the chart")
    options = parser.parse_args()
    pin()
    buckets = by_buckets(BUCKETS, ROUNDS, TIMES)
    leases = by_leases(LEASES, ROUNDS, TIMES)
    tables = {"buckets": table(buckets, "buckets"), "leases": table(leases, "leases")}
    print(machine())
    show(tables, 160)
    if options.write:
        draw({"resident buckets": buckets, "held leases": leases})
        rewrite(PAGE, "machine", f"{machine()}\n", COMMAND)
        for name, (headings, rows) in tables.items():
            rewrite(PAGE, name, markdown(headings, rows), COMMAND)


if __name__ == "__main__":
    main()
