"""Compare candidates: first their bytes are compared, and then each is timed in turn.

If one does not give the right bytes at 1,000 random places, or does not find the same text,
nothing is timed. Times are taken in rounds, in which nobody always follows the same one, so that
a machine's drift meets all of them.
"""

from __future__ import annotations

import functools
import gc
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.benchmarks.candidates import Candidate, Reader, Unable, version
from tests.benchmarks.images import NEEDLE, needles
from tests.benchmarks.timing import Figure, seconds
from xenmapcache.address import PAGE_SIZE, KiB, MiB

PLACES = 1000
NAMES = ("open", "hot", "random", "pages", "mebibytes", "skewed", "search")
COLD = ("mebibytes", "search")
"""Not run before they are timed: Volatility would answer from what it remembers."""


class Row(NamedTuple):
    """A candidate's figures; or why there are none."""

    candidate: Candidate
    figures: dict[str, Figure]
    reason: str = ""

    @property
    def name(self) -> str:
        number = version(self.candidate.package)
        return " ".join(filter(None, (self.candidate.package, number, self.candidate.way)))

    def to_json(self) -> dict[str, Any]:
        return {
            "candidate": self.candidate.name,
            "version": version(self.candidate.package),
            "format": self.candidate.format,
            "reason": self.reason,
        } | {name: figure._asdict() for name, figure in self.figures.items()}


class WrongBytesError(Exception):
    """A candidate did not return what is in the image."""


class Works:
    """What is timed of each reader, and how often in a round."""

    def __init__(self, size: int) -> None:
        numbers = random.Random(2)
        self.size = size
        self.hot = [MiB + 0x2340] * 20_000
        self.random = [numbers.randrange(PAGE_SIZE, size - 8, 8) for _ in range(20_000)]
        self.skewed = [self._skewed(numbers) for _ in range(20_000)]
        self.pages = range(PAGE_SIZE, min(size, 64 * MiB), PAGE_SIZE)
        self.mebibytes = range(MiB, min(size, 65 * MiB), MiB)

    def _skewed(self, numbers: random.Random) -> int:
        """Return an address: nine of ten lie in a tenth of the memory."""
        tenth = self.size // 10
        first, end = (PAGE_SIZE, tenth) if numbers.random() < 0.9 else (tenth, self.size - 64)
        return numbers.randrange(first, end, 64)

    def of(self, reader: Reader) -> dict[str, tuple[Callable[[], object], float]]:
        """Return by name what to time, and what a second of it is in the unit shown."""
        loop = reader.loop
        return {
            "hot": (functools.partial(loop, self.hot, 8), 1e9 / len(self.hot)),
            "random": (functools.partial(loop, self.random, 8), 1e9 / len(self.random)),
            "pages": (functools.partial(loop, self.pages, 4 * KiB), 1e9 / len(self.pages)),
            "mebibytes": (functools.partial(loop, self.mebibytes, MiB), 1e6 / len(self.mebibytes)),
            "skewed": (functools.partial(loop, self.skewed, 64), 1e9 / len(self.skewed)),
            "search": (functools.partial(reader.find, NEEDLE, self.size), 1e3),
        }


def compare(candidate: Candidate, reader: Reader, truth: bytes) -> None:
    """Check that a candidate gives the right bytes.

    Raises:
        WrongBytesError: it does not.
    """
    numbers = random.Random(3)
    size = len(truth)
    for _ in range(PLACES):
        length = numbers.choice((1, 8, 100, PAGE_SIZE, 3 * PAGE_SIZE))
        address = numbers.randrange(candidate.skips, size - length)
        if reader.value(address, length) != truth[address : address + length]:
            raise WrongBytesError(
                f"{candidate.name}, {candidate.format}: the {length} bytes at {address:#x} "
                "are not those of the image"
            )
    if (found := reader.find(NEEDLE, size)) != needles(size):
        raise WrongBytesError(
            f"{candidate.name}, {candidate.format}: found the text at {list(map(hex, found))}, "
            f"not at {list(map(hex, needles(size)))}"
        )


def measure(candidates: Sequence[Candidate], paths: dict[str, Path], rounds: int) -> list[Row]:
    """Compare all candidates' bytes, and then time them in turn.

    Raises:
        WrongBytesError: one of them is wrong; nothing has been timed.
    """
    truth = paths["raw"].read_bytes()
    readers: dict[Candidate, Reader] = {}
    reasons: dict[Candidate, str] = {}
    for candidate in candidates:
        try:
            reader = candidate.open(paths[candidate.format])
            compare(candidate, reader, truth)
        except Unable as reason:
            reasons[candidate] = str(reason)
        except WrongBytesError:
            raise
        except Exception as error:
            if not candidate.peer:
                raise
            reasons[candidate] = f"{type(error).__name__}: {error}"
        else:
            readers[candidate] = reader
    works = Works(len(truth))
    del truth
    times: dict[Candidate, dict[str, list[float]]] = {
        candidate: {name: [] for name in NAMES} for candidate in readers
    }
    scales = {"open": 1e3}
    shuffled = list(readers.items())
    for number in range(rounds):
        random.Random(number).shuffle(shuffled)  # nobody always follows the same one
        for name in NAMES:
            for candidate, reader in shuffled:
                gc.collect()
                gc.disable()
                if name == "open":
                    taken = open_seconds(candidate, paths[candidate.format])
                else:
                    work, scales[name] = works.of(reader)[name]
                    if name not in COLD:
                        work()  # what ran before has left its own in the processor's caches
                    taken = seconds(work)
                gc.enable()
                times[candidate][name].append(taken)
    for reader in readers.values():
        reader.close()
    return [
        Row(
            candidate,
            {name: Figure.of(taken, scales[name]) for name, taken in times[candidate].items()}
            if candidate in times
            else {},
            reasons.get(candidate, ""),
        )
        for candidate in candidates
    ]


def open_seconds(candidate: Candidate, path: Path) -> float:
    """Time opening a file and reading 8 bytes: some do all the work only then."""
    started = time.perf_counter()
    reader = candidate.open(path)
    reader.read(MiB, 8)
    taken = time.perf_counter() - started
    reader.close()
    return taken
