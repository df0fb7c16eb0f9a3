"""Time saved guests side by side: ours, the bare things, and what else pip installs.

The same memory is written in each format into a temporary folder. First every candidate must
give the right bytes at 1,000 random places and find the same text; if one does not, nothing is
timed and the exit status is 1. Then all are timed in turn, in rounds, so that a machine's drift
meets all of them; the table has medians and half the distance between the quartiles. A limit that
is exceeded is marked, and changes no exit status.
"""

from __future__ import annotations

import argparse
import array
import functools
import gc
import json
import os
import platform
import random
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.benchmarks.__main__ import ratio, seconds
from tests.benchmarks.peers import BARE, OURS, PEERS, Candidate, Ours, Reader, Unable, version
from tests.images import xl_files
from xenmapcache import open_backend, write_coredump
from xenmapcache.address import PAGE_SIZE, KiB, MiB, parse_size

PAGE = Path(__file__).parents[2] / "docs" / "images.md"
COMMAND = "make bench-sources"
BEGIN, END = f"<!-- output: {COMMAND} -->", f"<!-- end of output: {COMMAND} -->"
NEEDLE = b"Linux version 6.1.0-18-amd64 (debian-kernel@lists.debian.org)"
PLACES = 1000
HEADINGS = (
    "candidate", "format", "open, ms", "hot 8 B, ns", "random 8 B, ns", "4 KiB in order, ns",
    "1 MiB, µs", "search, ms",
)  # fmt: skip


# --- the images --------------------------------------------------------------------


def make_images(folder: Path, size: int) -> dict[str, Path]:
    """Write the same memory in each format; return the files by format."""
    paths = {name: folder / f"guest.{name}" for name in ("raw", "coredump", "elfcore", "save")}
    with paths["raw"].open("wb") as file:
        for piece in memory(size):
            file.write(piece)
    with open_backend("raw", path=paths["raw"]) as source:
        write_coredump(source, paths["coredump"], xen_version="4.17.7")
    write_elf_core(paths["raw"], paths["elfcore"])
    write_save(paths["raw"], paths["save"])
    for path in paths.values():
        with path.open("rb") as file:  # so that nothing is written, and all is warm, later
            os.fsync(file.fileno())
            while file.read(MiB):
                pass
    return paths


def memory(size: int) -> Iterator[bytes]:
    """Yield a guest's memory by MiB: noise, and pages that are mostly zeros; none is all zeros."""
    noise = random.Random(1)
    needles = {size // MiB // 2, size // MiB - 1}
    for number in range(size // MiB):
        if number % 4:
            data = bytearray(noise.randbytes(MiB))
        else:
            data = bytearray(MiB)
            for start in range(0, MiB, PAGE_SIZE):
                struct.pack_into("<QQ", data, start, number * MiB + start, ~start & 0xFFFFFFFF)
        if number in needles:
            data[70_001 : 70_001 + len(NEEDLE)] = NEEDLE
        yield bytes(data)


def needles(size: int) -> list[int]:
    """Return where the text is that is searched for."""
    return [number * MiB + 70_001 for number in sorted({size // MiB // 2, size // MiB - 1})]


def write_elf_core(raw: Path, path: Path) -> None:
    """Write an ELF core with one segment, page-aligned as kdump's are."""
    size = raw.stat().st_size
    ident = b"\x7fELF\2\1\1".ljust(16, b"\0")
    head = struct.pack("<16sHHIQQQIHHHHHH", ident, 4, 62, 1, 0, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    head += struct.pack("<IIQQQQQQ", 1, 7, PAGE_SIZE, 0, 0, size, size, PAGE_SIZE)
    with raw.open("rb") as source, path.open("wb") as file:
        file.write(head.ljust(PAGE_SIZE, b"\0"))
        while piece := source.read(MiB):
            file.write(piece)


def write_save(raw: Path, path: Path) -> None:
    """Write what xl save writes: records of 1,024 pages, in order."""
    pages = 1024
    marker = b"here are the pages"
    before, _, after = xl_files.save(marker).partition(marker)
    with raw.open("rb") as source, path.open("wb") as file:
        file.write(before)
        first = 0
        while piece := source.read(pages * PAGE_SIZE):
            count = len(piece) // PAGE_SIZE
            gfns = array.array("Q", range(first, first + count))
            body = struct.pack("<II", count, 0) + gfns.tobytes() + piece
            file.write(xl_files.record(xl_files.PAGE_DATA, body))
            first += count
        file.write(after)


# --- what is measured --------------------------------------------------------------


class Figure(NamedTuple):
    """What the rounds gave: their median, and half the distance between the quartiles."""

    median: float
    spread: float

    @classmethod
    def of(cls, values: Sequence[float], scale: float) -> Figure:
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(middle * scale, (high - low) / 2 * scale)

    def __str__(self) -> str:
        digits = 0 if self.median >= 100 else 1 if self.median >= 10 else 2
        return f"{self.median:,.{digits}f} ± {self.spread:,.{digits}f}"


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


class Promise(NamedTuple):
    """Something promised of files: what was measured, in which unit, and the most it may be."""

    work: str
    figure: float
    unit: str
    limit: float | None = None


class WrongBytesError(Exception):
    """A candidate did not return what is in the image."""


class Works:
    """What is timed of each reader, and how often in a round."""

    def __init__(self, size: int) -> None:
        numbers = random.Random(2)
        self.size = size
        self.hot = [MiB + 0x2340] * 20_000
        self.random = [numbers.randrange(PAGE_SIZE, size - 8, 8) for _ in range(20_000)]
        self.pages = range(PAGE_SIZE, min(size, 64 * MiB), PAGE_SIZE)
        self.mebibytes = range(MiB, min(size, 65 * MiB), MiB)

    def of(self, reader: Reader) -> dict[str, tuple[Callable[[], object], float]]:
        """Return by name what to time, and what a second of it is in the unit shown."""
        loop = reader.loop
        return {
            "hot": (functools.partial(loop, self.hot, 8), 1e9 / len(self.hot)),
            "random": (functools.partial(loop, self.random, 8), 1e9 / len(self.random)),
            "pages": (functools.partial(loop, self.pages, 4 * KiB), 1e9 / len(self.pages)),
            "mebibytes": (functools.partial(loop, self.mebibytes, MiB), 1e6 / len(self.mebibytes)),
            "search": (functools.partial(reader.find, NEEDLE, self.size), 1e3),
        }


NAMES = ("open", "hot", "random", "pages", "mebibytes", "search")

COLD = ("mebibytes", "search")
"""Not run before they are timed: Volatility would answer from what it remembers."""


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


# --- what is promised --------------------------------------------------------------


def promises(paths: dict[str, Path], rounds: int) -> Iterator[Promise]:
    """Yield what is promised of opening and reading files: the best of the rounds each."""
    path = paths["coredump"]
    offset, length = index_of(path)
    ours = functools.partial(open_and_close, "coredump", path)
    bare = functools.partial(read_index, path, offset, length)
    through_elftools = functools.partial(index_of, path, read=True)
    taken = [(seconds(ours), seconds(bare), seconds(through_elftools)) for _ in range(3 * rounds)]
    mine, least, elftools = map(min, zip(*taken, strict=True))
    mebibytes = paths["raw"].stat().st_size // MiB
    yield Promise(f"opening a dump of {mebibytes} MiB", mine * 1e3, "ms", 12)
    yield Promise("the same / a bare read of its index", mine / least, "x", 1.5)
    yield Promise("the same / pyelftools finding its index, and that read", mine / elftools, "x")
    for name in ("coredump", "save"):
        yield Promise(f"index of {name}", index_bytes(name, paths[name]), "B a page", 16)
    addresses = Works(paths["raw"].stat().st_size).random
    raw, *others = (Ours(name, paths[name]) for name in ("raw", "coredump", "elfcore", "save"))
    bare_reads = functools.partial(raw.loop, addresses, 8)
    for reader in others:
        figure = ratio(functools.partial(reader.loop, addresses, 8), bare_reads, 3 * rounds)
        yield Promise(f"random 8-byte reads, {reader.backend.name} / raw", figure, "x", 1.3)
    for reader in (raw, *others):
        reader.close()


def open_and_close(name: str, path: Path) -> None:
    open_backend(name, path=path).close()


def index_of(path: Path, *, read: bool = False) -> tuple[int, int]:
    """Return where a dump's index is, and its length; read it through pyelftools, too."""
    from elftools.elf.elffile import ELFFile

    with path.open("rb") as file:
        section: Any = ELFFile(file).get_section_by_name(".xen_pfn")
        if read:
            array.array("Q").frombytes(section.data())
        return section["sh_offset"], section["sh_size"]


def read_index(path: Path, offset: int, length: int) -> None:
    """Read a dump's index, and nothing else."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    array.array("Q").frombytes(os.pread(fd, length, offset))
    os.close(fd)


def index_bytes(name: str, path: Path) -> float:
    """Return what an open file's index takes, for each of its pages."""
    with open_backend(name, path=path) as backend:
        index = backend._index  # type: ignore[attr-defined]
        arrays = [numbers for numbers in (index.gfns, index.offsets) if numbers is not None]
        empty = sys.getsizeof(array.array("Q"))
        return sum(sys.getsizeof(numbers) - empty for numbers in arrays) / len(index)


# --- what is shown -----------------------------------------------------------------


class Report(NamedTuple):
    """All that came out of a run."""

    size: int
    rounds: int
    rows: list[Row]
    promises: list[Promise]

    def machine(self) -> str:
        return (
            f"{processor()}, {os.cpu_count()} CPUs, pinned to one; Linux {platform.release()}; "
            f"CPython {platform.python_version()}; {time.strftime('%Y-%m-%d', time.gmtime())}"
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "machine": self.machine(),
            "size": self.size,
            "rounds": self.rounds,
            "rows": [row.to_json() for row in self.rows],
            "promises": [promise._asdict() for promise in self.promises],
        }

    def table(self) -> list[tuple[str, ...]]:
        """Return the figures as text, by format: the order in which they compare."""
        order = list(dict.fromkeys(row.candidate.format for row in self.rows))
        measured = [row for row in self.rows if row.figures]
        measured.sort(key=lambda row: order.index(row.candidate.format))
        return [
            (row.name, row.candidate.format, *(str(row.figures[name]) for name in NAMES))
            for row in measured
        ]

    @staticmethod
    def emphasised(cells: tuple[str, ...]) -> tuple[str, ...]:
        ours = cells[0].startswith("xenmapcache ")
        return (f"**{cells[0]}**", *cells[1:]) if ours else cells

    def left_out(self) -> list[tuple[str, str, str]]:
        return [(row.name, row.candidate.format, row.reason) for row in self.rows if row.reason]

    def limits(self) -> list[tuple[str, str, str]]:
        return [
            (work, f"{figure:.2f} {unit}", "" if limit is None else f"{limit:g}{over}")
            for work, figure, unit, limit in self.promises
            for over in (" OVER" if limit is not None and round(figure, 2) > limit else "",)
        ]

    def markdown(self) -> str:
        """Return it as it stands in the documentation, ours in bold."""
        what = f"{self.size // MiB} MiB, {self.rounds} rounds: medians ± half the distance"
        parts = [
            f"{self.machine()}. {what} between the quartiles.",
            markdown_table(HEADINGS, [self.emphasised(cells) for cells in self.table()]),
        ]
        if self.left_out():
            parts.append(markdown_table(("not measured", "format", "why"), self.left_out()))
        parts.append(markdown_table(("work", "measured", "at most"), self.limits()))
        return "\n\n".join(parts) + "\n"

    def print(self) -> None:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        console = Console(width=150)
        console.print(f"{self.machine()}\n{self.size // MiB} MiB, {self.rounds} rounds")
        for headings, cells in (
            (HEADINGS, self.table()),
            (("not measured", "format", "why"), self.left_out()),
            (("work", "measured", "at most"), self.limits()),
        ):
            table = Table(box=None)
            for heading in headings:
                table.add_column(heading, justify="right" if heading in HEADINGS[2:] else "left")
            for cell in cells:
                table.add_row(*map(escape, cell))
            if cells:
                console.print(table, "")


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def rewrite(page: Path, text: str) -> None:
    """Put a text between the markers of a page."""
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{page}: the lines {BEGIN} and {END} are not there")
    page.write_text(f"{before}{BEGIN}\n{text}{END}{after}", encoding="utf-8")


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.sources",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", type=parse_size, default=256 * MiB, help="of memory (256M)")
    parser.add_argument("--rounds", type=int, default=7, help="how often each is timed (7)")
    parser.add_argument("--without-peers", action="store_true", help="ours and the bare things")
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    parser.add_argument("--write", action="store_true", help=f"rewrite the tables in {PAGE.name}")
    options = parser.parse_args()
    if options.size % MiB or options.size < 4 * MiB or options.rounds < 2:
        parser.error("at least 4 MiB, in whole MiB, and 2 rounds")
    if cpus := os.sched_getaffinity(0):
        os.sched_setaffinity(0, {max(cpus)})
    candidates = [*OURS, *BARE, *([] if options.without_peers else PEERS)]
    with tempfile.TemporaryDirectory() as folder:
        paths = make_images(Path(folder), options.size)
        try:
            rows = measure(candidates, paths, options.rounds)
        except WrongBytesError as error:
            print(error, file=sys.stderr)
            return 1
        limits = list(promises(paths, options.rounds))
    report = Report(options.size, options.rounds, rows, limits)
    if options.json:
        print(json.dumps(report.to_json(), indent=2))
    else:
        report.print()
    if options.write:
        rewrite(PAGE, report.markdown())
    return 0


if __name__ == "__main__":
    sys.exit(main())
