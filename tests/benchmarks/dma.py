"""DMA over guests of 1 to 64 GiB on the mock: map calls, and time: ``make bench-dma``.

Leases of 4 to 64 KiB, whole pages, at random: nine of ten in the first tenth of the guest's memory.
As many are held as the queue is deep; the oldest is released for the next. The pages
themselves are not touched. The seed is fixed, so that the counts are the same on every machine.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from tests.benchmarks.policies import Ours, PerAccess, Policy, QemuModel
from tests.benchmarks.report import PAGE, Table, markdown, rewrite, show
from tests.benchmarks.timing import machine, pin
from xenmapcache.address import PAGE_SIZE, GiB, MiB

COMMAND = "make bench-dma"
TARGET = 20
GUESTS: Sequence[float] = (1, 4, 16, 64)
DEPTHS = (1, 8, 32)
OPERATIONS = 50_000
MOST = 1_000_000
CHUNK = 10_000


def workload(memory: int, seed: int = 1) -> Iterator[tuple[int, int]]:
    """Yield ``(address, length)`` without end."""
    draw = random.Random(seed).random
    pages = memory // PAGE_SIZE
    hot = pages // 10
    while True:
        count = 1 + int(draw() * 16)
        if draw() < 0.9:
            first = int(draw() * (hot - count))
        else:
            first = hot + int(draw() * (pages - hot - count))
        yield first * PAGE_SIZE, count * PAGE_SIZE


class Run(NamedTuple):
    """What a policy did with the workload.

    Attributes:
        counts: map calls by how many operations were done.
        microseconds: of processor time an operation, the median of chunks of 10,000.
    """

    counts: dict[int, int]
    microseconds: float


def run(
    policy: Policy[Any], memory: int, depth: int, checkpoints: Sequence[int], chunk: int = CHUNK
) -> Run:
    """Have a policy do the workload, and close it."""
    source = workload(memory)
    held: deque[Any] = deque()
    counts, times = {}, []
    done = 0
    for checkpoint in checkpoints:
        while done < checkpoint:
            step = min(chunk, checkpoint - done)
            operations = [next(source) for _ in range(step)]
            lease, release = policy.lease, policy.release
            started = time.process_time()
            for address, length in operations:
                if len(held) == depth:
                    release(held.popleft())
                held.append(lease(address, length))
            times.append((time.process_time() - started) / step)
            done += step
        counts[checkpoint] = policy.maps
    while held:
        policy.release(held.popleft())
    policy.close()
    return Run(counts, 1e6 * statistics.median(times))


class Guest(NamedTuple):
    """A guest's size in bytes, and how the cache over it is set."""

    memory: int
    options: dict[str, int]

    @property
    def name(self) -> str:
        size = f"{self.memory / GiB:g} GiB" if self.memory >= GiB else f"{self.memory // MiB} MiB"
        if not self.options:
            return size
        bucket = (1 << self.options["bucket_shift"]) // MiB
        return f"{size}, buckets of {bucket} MiB, all may stay"


def guests(sizes: Sequence[int]) -> list[Guest]:
    """Return guests of those sizes, and the largest one again with buckets of 4 MiB.

    As many buckets of 1 MiB as 64 GiB have are more than Linux lets a process map by default.
    """
    large = {"bucket_shift": 22, "max_resident": sizes[-1]}
    return [*(Guest(size, {}) for size in sizes), Guest(sizes[-1], large)]


Growth = dict[str, dict[int, int]]
"""Map calls by operations, by guest."""


def growth(cases: Sequence[Guest], checkpoints: Sequence[int]) -> Growth:
    """Return how our map calls grow from an empty cache on, at queue depth 1."""
    return {
        each.name: run(Ours(each.memory, **each.options), each.memory, 1, checkpoints).counts
        for each in cases
    }


def growth_table(grown: Growth) -> Table:
    """Tell how many times fewer calls that are than one for each operation."""
    checkpoints = next(iter(grown.values()))
    headings = ("guest", "", *(f"{count:,} operations" for count in checkpoints))
    rows = []
    for name, counts in grown.items():
        rows.append((name, "map calls", *(f"{maps:,}" for maps in counts.values())))
        fewer = (f"{done / maps:.1f} x" for done, maps in counts.items())
        rows.append(("", "fewer than QEMU's policy", *fewer))
    return headings, rows


def depth_table(sizes: Sequence[int], depths: Sequence[int], operations: int) -> Table:
    """Compare the policies, each from nothing mapped on."""
    kinds: Sequence[type[Policy[Any]]] = (Ours, PerAccess, QemuModel)
    headings = (
        "guest", "depth",
        *(f"{kind.name}, map calls" for kind in kinds), "QEMU's / ours",
        *(f"{kind.name}, µs" for kind in kinds),
    )  # fmt: skip
    rows = []
    for memory in sizes:
        for depth in depths:
            runs = [run(kind(memory), memory, depth, (operations,)) for kind in kinds]
            maps = [each.counts[operations] for each in runs]
            rows.append(
                (
                    Guest(memory, {}).name,
                    str(depth),
                    *(f"{count:,}" for count in maps),
                    f"{maps[-1] / maps[0]:.1f} x",
                    *(f"{each.microseconds:.1f}" for each in runs),
                )
            )
    return headings, rows


def draw(grown: Growth) -> None:
    """Draw how many operations there are to a map call, by operations."""
    from matplotlib import pyplot

    from tests.benchmarks import chart  # its matplotlib is not everywhere

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    axes.set_prop_cycle(**chart.LINES)
    for name, counts in grown.items():
        fewer = [done / maps for done, maps in counts.items()]
        axes.plot(list(counts), fewer, label=name)
    axes.axhline(TARGET, color="#555555", linewidth=0.8, linestyle="--")
    axes.annotate(f"{TARGET} x", (min(next(iter(grown.values()))), TARGET), va="bottom", fontsize=9)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda number, _: f"{number:,.0f}")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("operations since the cache was empty")
    axes.set_title("Times fewer map calls than QEMU's policy, queue depth 1", loc="left")
    axes.legend(frameon=False)
    chart.save(figure, "dma")
    pyplot.close(figure)


def checkpoints_to(most: int) -> list[int]:
    """Return 1, 2 and 5 times each power of ten from 1,000 on."""
    steps = (factor * 10**power for power in range(3, 8) for factor in (1, 2, 5))
    return [step for step in steps if step <= most]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.dma", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"rewrite {PAGE.name}, and the chart")
    options = parser.parse_args()
    pin()
    sizes = [int(size * GiB) for size in GUESTS]
    grown = growth(guests(sizes), checkpoints_to(MOST))
    shown = {
        name: {done: maps for done, maps in counts.items() if str(done).startswith("1")}
        for name, counts in grown.items()
    }
    tables = {
        "operations": growth_table(shown),
        "depths": depth_table(sizes, DEPTHS, OPERATIONS),
    }
    print(machine())
    show(tables, 160)
    if options.write:
        draw(grown)
        rewrite(PAGE, "machine", f"{machine()}\n", COMMAND)
        for name, (headings, rows) in tables.items():
            rewrite(PAGE, name, markdown(headings, rows), COMMAND)


if __name__ == "__main__":
    main()
