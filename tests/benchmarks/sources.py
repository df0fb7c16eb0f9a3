"""Measure the commands on a real guest's memory against the tools that people use for that.

The memory is that of tests/images/lab: a Linux guest that ran. Each row is our command's time over
the tool's, taken in turn in one run, on files that the page cache holds. Both without their start:
ours runs in this process, where everything is imported, and from the tool's time that of the same
tool on an empty file is taken. Both have LC_ALL=C. Of each, the best of the rounds counts.

Columns: the times by the clock; their ratio; the ratio of the times that the processors worked,
which others on the machine disturb less; what is promised. ``--cpu`` judges by that ratio.
Exits with 1 if a limit is exceeded.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tests.benchmarks.images import write_save
from tests.benchmarks.report import PAGE, markdown, rewrite, show
from tests.benchmarks.timing import machine
from tests.images import lab
from xenmapcache import XenMapCacheError, open_source
from xenmapcache.address import MiB
from xenmapcache.cli import main as run_command

HEADINGS = ("work / peer", "source", "ours, ms", "peer, ms", "ratio", "cpu", "at most", "")
COMMAND = "make bench-sources"
ROUNDS = 7
HEXDUMP_BYTES = 16 * MiB
PATTERNS = ("Linux version", "NEEDLE", "root:", "ab")
CLASSES = (r"[a-z]+@[a-z]+\.[a-z]+", r"[0-9]+\.[0-9]+\.[0-9]+", r"[A-Z][a-z]+ version")
OPEN_SECONDS = 0.005
"""Opening a form may take this long, or twice as long as the peer, if that is more."""

Runs = Callable[[], object]


class Times(NamedTuple):
    """Seconds by the clock, and of the processors."""

    wall: float
    cpu: float

    def less(self, start: Times) -> Times:
        """Return them without what an empty run takes; more than nothing remains."""
        return Times(max(1e-6, self.wall - start.wall), max(1e-6, self.cpu - start.cpu))


class Row(NamedTuple):
    """Some work of ours and of a peer, and how many times as long as the peer's ours may take.

    Attributes:
        floor: seconds that ours may take in any case.
    """

    work: str
    source: str
    ours: Times
    theirs: Times | None
    limit: float
    floor: float = 0.0

    def ratio(self, *, cpu: bool = False) -> float:
        """Return how many times as long ours takes; nan without a peer."""
        if self.theirs is None:
            return math.nan
        return self.ours.cpu / self.theirs.cpu if cpu else self.ours.wall / self.theirs.wall

    def kept(self, *, cpu: bool = False) -> bool:
        """Tell whether the limit is kept."""
        mine = self.ours.cpu if cpu else self.ours.wall
        return mine <= self.floor or self.ratio(cpu=cpu) <= self.limit

    def cells(self, *, cpu: bool = False) -> tuple[str, ...]:
        """Return it as a row of a table."""
        theirs = "-" if self.theirs is None else f"{self.theirs.wall * 1e3:.1f}"
        ratios = [
            "-" if self.theirs is None else f"{self.ratio(cpu=each):.2f} x"
            for each in (False, True)
        ]
        limit = f"{self.limit:g} x"
        if self.floor:
            limit = f"{self.floor * 1e3:g} ms or {limit}"
        verdict = "" if self.kept(cpu=cpu) else "OVER"
        mine = f"{self.ours.wall * 1e3:.1f}"
        return self.work, self.source, mine, theirs, *ratios, limit, verdict

    def to_json(self) -> dict[str, object]:
        """Return it as JSON has it."""
        known = self.ratio()
        return {
            "work": self.work,
            "source": self.source,
            "ours": self.ours._asdict(),
            "peer": self.theirs and self.theirs._asdict(),
            "ratio": None if math.isnan(known) else known,
            "limit": self.limit,
            "floor": self.floor,
        }


def timed(work: Runs) -> Times:
    """Return what some work takes, in this process and its children."""
    before = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    started = time.perf_counter()
    work()
    wall = time.perf_counter() - started
    after = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    used = [each.ru_utime + each.ru_stime for each in (*after, *before)]
    return Times(wall, sum(used[:2]) - sum(used[2:]))


def best(works: Sequence[Runs], rounds: int, prepare: Runs = lambda: None) -> list[Times]:
    """Return the best of the rounds for each of several works, which take turns.

    Args:
        works: what is timed.
        rounds: of each; one more comes first and does not count.
        prepare: called before each, and not timed.
    """

    def prepared(work: Runs) -> Times:
        prepare()
        return timed(work)

    for work in works:
        prepared(work)
    taken = [[prepared(work) for work in works] for _ in range(rounds)]
    return [Times(*map(min, zip(*each, strict=True))) for each in zip(*taken, strict=True)]


def ours(*arguments: str, output: Path | None = None) -> Runs:
    """Return one of our commands, in this process, whose output goes to a file."""

    def work() -> None:
        target = os.devnull if output is None else output
        with open(target, "w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
            assert run_command(arguments) in (0, 1), arguments

    return work


def peer(*arguments: str) -> Runs:
    """Return a command of another program. Into a pipe: grep looks less well at /dev/null."""
    environment = os.environ | {"LC_ALL": "C"}

    def work() -> None:
        with subprocess.Popen(
            arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as process:
            assert process.stdout is not None
            buffer = bytearray(MiB)
            while os.readv(process.stdout.fileno(), [buffer]):
                pass
        assert process.returncode in (0, 1), arguments

    return work


def quiet(*arguments: str) -> Runs:
    """Return a command of another program whose output is thrown away, as ours is."""
    environment = os.environ | {"LC_ALL": "C"}

    def work() -> None:
        done = subprocess.run(
            arguments,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
        )
        assert done.returncode in (0, 1), arguments

    return work


class Bench:
    """Rows of one run.

    Args:
        images: of a guest.
        folder: for what is written.
        rounds: of each row.
        only: what the names of the rows must have.
    """

    def __init__(self, images: lab.Images, folder: Path, rounds: int, only: str = "") -> None:
        self._only = only
        self._images = images
        self._folder = folder
        self._rounds = rounds
        self._raw = images.path("guest.raw")
        self._empty = folder / "empty"
        self._empty.touch()
        self._outputs = [folder / "ours", folder / "theirs"]

    def rows(self) -> Iterator[Row]:
        """Measure, and yield a row for each."""
        yield from self._searches()
        yield from self._texts()
        yield from self._copies()
        for form in lab.FORMS:
            memory = form.file.endswith((".elf", ".kdump", ".migration", ".raw"))
            if memory and self._images.has(form.file) and self._only in "open":
                yield self._opening(self._images.path(form.file))
        if self._only in "open":
            yield from map(self._opening, self._xens_forms())

    def _xens_forms(self) -> Iterator[Path]:
        """Yield files of the same memory in the forms that Xen's tools write."""
        core, saved = self._folder / "xl-dump-core", self._folder / "xl-save"
        ours("dump", f"raw:{self._raw}", "-o", str(core), "--format", "coredump")()
        yield core
        core.unlink()
        write_save(self._raw, saved)
        yield saved
        saved.unlink()

    def _row(
        self, work: str, mine: Runs, tool: Callable[[str], Runs], limit: float
    ) -> Iterator[Row]:
        """Measure ours, a peer on the image, and the peer on an empty file."""
        if self._only in work:
            works = (mine, tool(str(self._raw)), tool(str(self._empty)))
            try:
                took, theirs, start = best(works, self._rounds, self._clear)
            except FileNotFoundError as error:
                print(f"{work}: {error.filename} is not installed", file=sys.stderr)
            else:
                yield Row(work, self._raw.name, took, theirs.less(start), limit)

    def _clear(self) -> None:
        """Remove what was written. Freeing it does not belong to the work."""
        for path in self._outputs:
            path.unlink(missing_ok=True)

    def _searches(self) -> Iterator[Row]:
        source = f"raw:{self._raw}"
        for text in PATTERNS:
            mine = ours("find", source, text, "--count")
            yield from self._row(
                f"find {text!r} / grep -c", mine, partial(peer, "grep", "-c", text), 1
            )
        plain = "\x7fELF"
        mine = ours("find", source, "--hex", plain.encode().hex(), "--count")
        grep = partial(peer, "grep", "-c", plain)
        yield from self._row("find --hex 7f454c46 / grep -c", mine, grep, 1)
        for expression in CLASSES:
            mine = ours("find", source, "--regex", expression)
            grep = partial(peer, "grep", "-aoE", expression)
            yield from self._row(f"find --regex {expression} / grep -aoE", mine, grep, 2)

    def _texts(self) -> Iterator[Row]:
        source = f"raw:{self._raw}"
        mine = ours("strings", source)
        yield from self._row(
            "strings / strings -t x", mine, lambda file: quiet("strings", "-t", "x", file), 1.0
        )
        size = min(HEXDUMP_BYTES, self._raw.stat().st_size)
        mine = ours("read", source, "0", str(size), "--hexdump", "--no-squeeze")
        yield from self._row(
            f"read --hexdump of {size // MiB} MiB / hexdump -Cv",
            mine,
            lambda file: quiet("hexdump", "-n", str(size), "-Cv", file),
            1.0,
        )

    def _copies(self) -> Iterator[Row]:
        source = f"raw:{self._raw}"
        size = str(self._raw.stat().st_size)
        copy, other_copy = map(str, self._outputs)
        mine = ours("read", source, "0", size, "--raw", output=self._outputs[0])
        yield from self._row(
            "read to a file / dd bs=1M",
            mine,
            lambda file: quiet("dd", f"if={file}", f"of={other_copy}", "bs=1M"),
            1.3,
        )
        for form in ("raw", "vmcore", "lime", "coredump"):
            mine = ours("dump", source, "-o", copy, "--format", form)
            yield from self._row(
                f"dump --format {form} / cp --reflink=never",
                mine,
                lambda file: quiet("cp", "--reflink=never", file, other_copy),
                1.5,
            )
        other = self._folder / "equal.raw"
        shutil.copyfile(self._raw, other)
        pair = {str(self._raw): str(other), str(self._empty): os.devnull}
        mine = ours("diff", source, f"raw:{other}")
        yield from self._row("diff / cmp", mine, lambda file: quiet("cmp", file, pair[file]), 1.5)
        self._clear()
        other.unlink()

    def _opening(self, path: Path) -> Row:
        """Measure opening a form with ours and with a peer that reads it."""
        source = f"raw:{path}" if path.suffix == ".raw" else str(path)
        work = "open"
        readers: list[Runs] = [lambda: open_source(source).close()]
        for name, reader in (
            ("drgn", drgn_opens(path)),
            ("kdumpfile", kdumpfile_opens(path)),
            ("libkdumpfile in drgn", drgn_opens(path, halfway=True)),
        ):
            if reader is not None:
                work = f"open / {name}"
                readers.append(reader)
                break
        try:
            took, *theirs = best(readers, 3 * self._rounds)
        except (ValueError, OSError, XenMapCacheError) as error:
            print(f"{path.name}: {error}", file=sys.stderr)
            return Row("open: refused", path.name, Times(0, 0), None, 2.0, OPEN_SECONDS)
        return Row(work, path.name, took, theirs[0] if theirs else None, 2.0, OPEN_SECONDS)


def drgn_opens(path: Path, *, halfway: bool = False) -> Runs | None:
    """Return drgn's way to open a core, if it is installed and can.

    Args:
        path: of the core.
        halfway: it counts, too, if drgn gives up after its libkdumpfile has opened the file,
            because QEMU's dumps lack the kernel's note in which drgn looks for the architecture.
    """
    try:
        import drgn
    except ImportError:
        return None

    def work() -> None:
        try:
            drgn.Program().set_core_dump(path)
        except Exception as error:
            if not (halfway and "KDUMP_ATTR_ARCH_NAME" in str(error)):
                raise

    return _unless_it_fails(work)


def kdumpfile_opens(path: Path) -> Runs | None:
    """Return libkdumpfile's way to open a dump, if it is installed and can."""
    try:
        import kdumpfile
    except ImportError:
        return None
    return _unless_it_fails(lambda: kdumpfile.Context().open(str(path)))


def _unless_it_fails(work: Runs) -> Runs | None:
    try:
        work()
    except Exception as error:  # of any kind: the peer's own
        print(f"no peer: {error!r:.200}", file=sys.stderr)
        return None
    return work


def where(rounds: int) -> str:
    """Return what the figures depend on, in a line."""
    found = [name for name in ("numpy", "re2") if importlib.util.find_spec(name)]
    load = os.getloadavg()[0]
    return (
        f"{machine().replace(', pinned to one', '')} {rounds} rounds; installed: "
        f"{', '.join(found) or 'neither NumPy nor RE2'}; load average {load:.1f}."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.sources", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--cpu", action="store_true", help="judge by the processors' times")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="(default: %(default)s)")
    parser.add_argument("--write", action="store_true", help="put it into the documentation")
    parser.add_argument("--only", default="", metavar="TEXT", help="only rows whose work has it")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=lab.cache_folder()) as folder:
        rows = list(Bench(lab.images(), Path(folder), options.rounds, options.only).rows())
    cells = [row.cells(cpu=options.cpu) for row in rows]
    if options.json:
        print(json.dumps([row.to_json() for row in rows], indent=2))
    else:
        print(where(options.rounds))
        show({"": (HEADINGS, cells)}, 130)
    if options.write:
        rewrite(PAGE, "machine", f"{where(options.rounds)}\n", COMMAND)
        literal = [(f"`{work}`", *others) for work, *others in cells]  # expressions are in it
        rewrite(PAGE, "commands", markdown(HEADINGS, literal), COMMAND)
    return 0 if all(row.kept(cpu=options.cpu) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
