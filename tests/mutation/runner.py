"""The runner: a copy of package and tests, broken, tested and repaired."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Self

import pytest

import pytest_xenmapcache
import xenmapcache

from .mutant import Mutant

PACKAGE = Path(xenmapcache.__file__).parent
TESTS = Path(__file__).parents[1]

EFFORT = {
    "XENMAPCACHE_BINDINGS": "both",
    "XENMAPCACHE_EXAMPLES": "1",
    "XENMAPCACHE_FUZZ": "300",
    "XENMAPCACHE_MODEL": "100",
    "XENMAPCACHE_RACES": "3",
}
"""What the tests were to find when the mutants were made: see ``tests/effort.py``."""
_PATIENCE = 10.0
"""A run hangs if it takes this many times as long as its tests do unbroken, and some grace."""


class BrokenRunError(Exception):
    """A run of the tests says nothing of a mutant: the message is pytest's, or says why."""


class Verdict(NamedTuple):
    """What became of a mutant.

    Attributes:
        killed: whether a test noticed it.
        how: ``"fails"``, ``"hangs"``, ``"crashes (SIGSEGV)"``, ``"survives"``.
        test: that noticed it; empty if none did.
        seconds: that it took.
    """

    killed: bool
    how: str
    test: str
    seconds: float


class _Run(NamedTuple):
    status: int | None  # None: it hung
    output: str
    notes: list[dict[str, str | float]]
    seconds: float

    def noted(self, what: str) -> list[str]:
        return [str(note[what]) for note in self.notes if what in note]


class Copy:
    """A folder with a copy of the package and of its tests. A context manager, which removes it."""

    def __init__(self) -> None:
        # Resolved, as the modules' names of files in it will be.
        self._folder = Path(tempfile.mkdtemp(prefix="xenmapcache-mutation-")).resolve()
        self._root = self._folder / "copy"
        ignored = shutil.ignore_patterns("__pycache__")
        # With what is compiled: it counts as long as the source is of the same time and size.
        shutil.copytree(PACKAGE, self._root / PACKAGE.name)
        shutil.copytree(TESTS, self._root / TESTS.name, ignore=ignored)
        shutil.copy2(TESTS.parent / "pyproject.toml", self._root)
        shutil.copy2(pytest_xenmapcache.__file__, self._root)
        self._broken_before = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._folder)

    def baseline(self, targets: Sequence[str]) -> dict[str, float]:
        """Run tests over the unbroken package; return how long each took, but for skipped ones.

        Raises:
            BrokenRunError: one fails, or is not there: nothing that it says of mutants counts.
        """
        run = self._run(targets, limit=None)
        failed = run.noted("failed")
        if run.status:
            raise BrokenRunError("\n".join(failed) or run.output)
        if run.noted("foreign"):
            raise BrokenRunError(f"not the copy was tested: {run.noted('foreign')}")
        seconds: dict[str, float] = {}
        for note in run.notes:
            if "ran" in note:
                test = str(note["ran"])
                seconds[test] = seconds.get(test, 0.0) + float(note["seconds"])
        return {test: seconds[test] for test in run.noted("passed")}

    def judge(self, mutant: Mutant, seconds: dict[str, float], grace: float) -> Verdict:
        """Run a mutant's tests over the package that it has broken.

        Args:
            mutant: one that applies.
            seconds: how long each test takes where nothing is broken.
            grace: how much longer all may take, Python's start included, in seconds.

        Raises:
            BrokenRunError: the tests cannot be run over it.
        """
        usual = [needed for test, needed in seconds.items() if _is_of(test, mutant.tests)]
        if not usual:
            raise BrokenRunError("all its tests are skipped here")
        with self._broken(mutant):
            run = self._run(mutant.tests, limit=grace + _PATIENCE * sum(usual))
        if run.status == 0:
            return Verdict(False, "survives", "", run.seconds)
        if run.status == pytest.ExitCode.TESTS_FAILED:
            return Verdict(True, "fails", run.noted("failed")[0], run.seconds)
        if run.status is not None and run.status > 0:
            raise BrokenRunError(run.output)
        how = "hangs" if run.status is None else f"crashes ({signal.Signals(-run.status).name})"
        return Verdict(True, how, (run.noted("started") or ["at the start"])[-1], run.seconds)

    @contextlib.contextmanager
    def _broken(self, mutant: Mutant) -> Iterator[None]:
        path = self._root / mutant.file
        text, state = path.read_text(encoding="utf-8"), path.stat()
        path.write_text(mutant.applied(text), encoding="utf-8")
        # What was compiled is used again for a source of the same size and second.
        self._broken_before += 1
        os.utime(path, (state.st_atime, state.st_mtime + self._broken_before))
        try:
            yield
        finally:
            path.write_text(text, encoding="utf-8")
            os.utime(path, (state.st_atime, state.st_mtime))

    def _run(self, targets: Sequence[str], limit: float | None) -> _Run:
        """Run tests in the copy, until the first fails, with nothing left of the run before."""
        started = time.monotonic()
        with tempfile.TemporaryDirectory(dir=self._folder, ignore_cleanup_errors=True) as scratch:
            notes = Path(scratch, "notes")
            command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=short"]
            command += ["-p", "no:cacheprovider", "-p", "tests.mutation.witness"]
            command += ["-p", "no:hypothesispytest"]  # half of the start; @given needs it not
            environment = {**EFFORT, **os.environ} | {
                "PYTHONPATH": str(self._root),
                "TMPDIR": scratch,
                "HYPOTHESIS_STORAGE_DIRECTORY": str(Path(scratch, "hypothesis")),
            }
            environment.pop("PYTEST_ADDOPTS", None)
            environment.pop("COVERAGE_PROCESS_CONFIG", None)  # a broken copy is not the package
            environment.pop("PYTHONDONTWRITEBYTECODE", None)  # it would take twice as long
            with Path(scratch, "output").open("w+", encoding="utf-8") as output:
                process = subprocess.Popen(
                    [*command, f"--witness={notes}", *targets],
                    cwd=self._root,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
                try:
                    status = process.wait(limit)
                except subprocess.TimeoutExpired:
                    status = None
                finally:
                    # Whatever a test that crashed or hung has started goes with it.
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                output.seek(0)
                text = output.read()
            lines = notes.read_text(encoding="utf-8").splitlines() if notes.exists() else []
        return _Run(status, text, list(map(json.loads, lines)), time.monotonic() - started)


def _is_of(test: str, targets: Sequence[str]) -> bool:
    """Tell whether a test is one of those that some files or node ids name."""
    return any(
        test == target or test.startswith((f"{target}::", f"{target}[")) for target in targets
    )
