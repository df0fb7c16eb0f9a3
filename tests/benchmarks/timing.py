"""How things are timed: one after the other, and compared within one run."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

Work = Callable[[], object]


class Figure(NamedTuple):
    """What the rounds gave: their median, and half the distance between the quartiles."""

    median: float
    spread: float

    @classmethod
    def of(cls, values: Sequence[float], scale: float = 1) -> Figure:
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(middle * scale, (high - low) / 2 * scale)

    def __str__(self) -> str:
        digits = 0 if self.median >= 100 else 1 if self.median >= 10 else 2
        return f"{self.median:,.{digits}f} ± {self.spread:,.{digits}f}"


def seconds(work: Work) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def cpu_seconds(work: Work) -> float:
    """Return the time that this process ran: the less disturbed the busier the machine is."""
    started = time.process_time()
    work()
    return time.process_time() - started


def ratio(ours: Work, bare: Work, rounds: int = 15) -> float:
    """Return the best time of ours over the best of the bare thing, measured in turn."""
    ours(), bare()
    pairs = [(seconds(ours), seconds(bare)) for _ in range(rounds)]
    return min(pair[0] for pair in pairs) / min(pair[1] for pair in pairs)


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def machine() -> str:
    """Return what figures depend on, in a line."""
    return (
        f"{processor()}, {os.cpu_count()} CPUs, pinned to one; Linux {platform.release()}; "
        f"CPython {platform.python_version()}; {time.strftime('%Y-%m-%d', time.gmtime())}."
    )


def pin() -> None:
    """Stay on one processor from here on."""
    if cpus := os.sched_getaffinity(0):
        os.sched_setaffinity(0, {max(cpus)})
