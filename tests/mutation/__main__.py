"""Break the package on purpose, and see each break noticed by a test.

Package and tests are copied; for one mutant after the other the copy is broken, the tests
are run that have to notice, and the copy is repaired. First the same tests have to pass where
nothing is broken. Exits with 1 if a mutant survives, no longer applies, or names a test that
is not there.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import queue
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .mutant import MUTANTS, Mutant, StaleMutantError
from .runner import PACKAGE, TESTS, BrokenRunError, Copy, Verdict

Show = Callable[[Mutant, Verdict | Exception], object]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="mutants to run (default: all)")
    parser.add_argument(
        "--jobs",
        type=int,
        default=min(2, os.cpu_count() or 1),
        metavar="N",
        help="how many at a time (%(default)s)",
    )
    parser.add_argument(
        "--grace",
        type=float,
        default=10,
        metavar="S",
        help="a run hangs when it takes this many seconds more than usual (%(default)s)",
    )
    parser.add_argument(
        "--sample", type=int, metavar="N", help="run N of them, which the seed chooses"
    )
    parser.add_argument(
        "--seed", default="", metavar="TEXT", help="for example the commit: another one, others"
    )
    parser.add_argument("--list", action="store_true", help="print what they break, and run none")
    parser.add_argument(
        "--mutants", type=Path, default=MUTANTS, metavar="FOLDER", help="read them from there"
    )
    options = parser.parse_args(arguments)
    known = {mutant.name: mutant for mutant in Mutant.load(options.mutants)}
    for name in options.names:
        if name not in known:
            parser.error(f"there is no mutant {name!r}: see --list")
    mutants = [known[name] for name in options.names or known]
    if options.sample is not None:
        mutants = sample(mutants, options.sample, options.seed)
    console = Console()
    if not console.is_terminal:
        console.width = 140
    if options.list:
        console.print(_listed(mutants))
        return 0
    started = time.monotonic()
    try:
        results = judge_all(
            mutants, options.jobs, options.grace, lambda *result: _tell(console, *result)
        )
    except BrokenRunError as error:
        console.print("The tests do not pass where nothing is broken:", style="bold red")
        console.print(str(error), markup=False)
        return 1
    console.print(_table(results))
    killed = sum(_is_killed(result) for _, result in results)
    console.print(f"{killed} of {len(results)} killed in {time.monotonic() - started:.0f} s")
    return killed != len(results)


def sample(mutants: Sequence[Mutant], count: int, seed: str) -> list[Mutant]:
    """Return some mutants, the same ones for the same seed, in the order in which they came."""

    def rank(mutant: Mutant) -> bytes:
        return hashlib.sha256(f"{seed} {mutant.name}".encode()).digest()

    chosen = sorted(mutants, key=rank)[:count]
    return [mutant for mutant in mutants if mutant in chosen]


def judge_all(
    mutants: Sequence[Mutant], jobs: int, grace: float, show: Show
) -> list[tuple[Mutant, Verdict | Exception]]:
    """Run mutants, some at a time, and return what became of each.

    Args:
        mutants: which.
        jobs: how many at a time, each in a copy of its own.
        grace: how many seconds a run may take beyond what is usual.
        show: called with each result when it is there.

    Raises:
        BrokenRunError: their tests do not pass where nothing is broken.
    """
    results: dict[str, Verdict | Exception] = {}
    able = []
    for mutant in mutants:
        try:
            mutant.check(PACKAGE, TESTS)
            able.append(mutant)
        except StaleMutantError as error:
            results[mutant.name] = error
            show(mutant, error)
    targets = list(dict.fromkeys(target for mutant in able for target in mutant.tests))
    jobs = max(1, min(jobs, len(targets)))
    with ExitStack() as stack, ThreadPoolExecutor(jobs) as pool:
        copies = [stack.enter_context(Copy()) for _ in range(jobs if targets else 0)]
        shares = [targets[number::jobs] for number in range(len(copies))]
        seconds: dict[str, float] = {}
        for part in pool.map(Copy.baseline, copies, shares):
            seconds |= part
        free: queue.SimpleQueue[Copy] = queue.SimpleQueue()
        for copy in copies:
            free.put(copy)

        def judge(mutant: Mutant) -> None:
            copy = free.get()
            try:
                results[mutant.name] = copy.judge(mutant, seconds, grace)
            except BrokenRunError as error:
                results[mutant.name] = error
            finally:
                free.put(copy)
            show(mutant, results[mutant.name])

        list(pool.map(judge, able))
    return [(mutant, results[mutant.name]) for mutant in mutants]


def _is_killed(result: Verdict | Exception) -> bool:
    return isinstance(result, Verdict) and result.killed


def _tell(console: Console, mutant: Mutant, result: Verdict | Exception) -> None:
    """Print the complaint of a mutant that was not killed as soon as it is known."""
    if not _is_killed(result):
        why = result.how if isinstance(result, Verdict) else str(result)
        console.print(f"{mutant.name}: {why}\n  {mutant.harm}", markup=False, highlight=False)


def _table(results: Sequence[tuple[Mutant, Verdict | Exception]]) -> Table:
    table = Table("mutant", "verdict", "noticed by", "s", box=None)
    for mutant, result in results:
        if isinstance(result, Verdict):
            style = "green" if result.killed else "bold red"
            test = result.test.removeprefix("tests/").partition("[")[0]
            table.add_row(mutant.name, f"[{style}]{result.how}[/]", test, f"{result.seconds:.1f}")
        else:
            table.add_row(mutant.name, "[bold red]cannot be judged[/]", "", "")
    return table


def _listed(mutants: Sequence[Mutant]) -> Table:
    table = Table("mutant", "file", "what is broken", box=None)
    for mutant in mutants:
        table.add_row(mutant.name, mutant.file.partition("/")[2], mutant.harm)
    return table


if __name__ == "__main__":
    sys.exit(main())
