"""Whatever a signal's handler does in the middle of an operation, what is promised still holds.

One point of each operation is run with every second handler. ``XENMAPCACHE_INTERRUPTS=1`` takes all
handlers, ``XENMAPCACHE_INTERRUPTS=10`` runs ten points of each, which takes a minute of a processor
altogether, and ``XENMAPCACHE_INTERRUPTS=all`` runs all points.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fake_xen import missing

from .injector import Injector, MissingError, build
from .table import EXPECTED, OPERATIONS, Expected, is_known

ROOT = Path(__file__).parents[2]
SAMPLES = os.environ.get("XENMAPCACHE_INTERRUPTS", "half")
SUBJECTS = (
    *("cache.[!w]*", "cache.w*", "lease.*", "observe.*", "segments.*", "image.*"),
    *("server.*", "dma.*", "mock.*", "binding.*", "grants.*"),
)
SECONDS = 3000 if SAMPLES == "all" else 280


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        sys.version_info[:3] == (3, 13, 0),
        reason="CPython 3.13.0 sends a C trace function no events for bytecodes; 3.13.1 does",
    ),
]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The injector, built for this Python; without a compiler the tests are skipped."""
    folder = tmp_path_factory.mktemp("inject")
    try:
        build(folder)
    except MissingError as error:
        missing(str(error))
    return folder


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep coverage out: it traces, and so does the injector."""
    for name in ("COVERAGE_PROCESS_START", "COVERAGE_PROCESS_CONFIG"):
        monkeypatch.delenv(name, raising=False)


def run(folder: Path, *arguments: str) -> tuple[list[dict[str, Any]], str]:
    """Run ``python -m tests.interrupts`` and return its reports, and what else it printed."""
    command = [sys.executable, "-m", "tests.interrupts", "--json", "--folder", str(folder)]
    done = subprocess.run(
        [*command, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode in (0, 1), done.stderr
    lines = done.stdout.splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")], done.stderr


def is_of_cpython(finding: str) -> bool:
    """Tell whether the interpreter itself crashed: 3.12.1 does when some allocations fail."""
    return sys.version_info >= (3, 12) and ", allocation: the process died of signal 11" in finding


@pytest.mark.timeout(SECONDS + 20)
@pytest.mark.parametrize("subject", SUBJECTS)
def test_interrupted_operation_keeps_promises(
    subject: str, built: Path, record_property: Callable[[str, object], None]
) -> None:
    """After an interrupt at any point no lock is held, and nothing is lost, stale or leaked."""
    # The same points in each run: what others look at is for .ci/nightly, which runs all of them.
    seed = os.environ.get("XENMAPCACHE_INTERRUPTS_SEED", "1")
    record_property("seed", seed)
    sample = [] if SAMPLES == "all" else ["--samples", SAMPLES, "--seed", seed]
    if SAMPLES == "half":
        sample = ["--samples", "1", "--alternate", "--seed", seed]
    reports, stderr = run(built, *sample, subject)
    assert reports, stderr
    # A single point may be one that is not come to again.
    fired = "total" if SAMPLES in ("1", "half") else "tried"
    unexpected = [
        finding
        for report in reports
        for finding in report["findings"] or ([] if report[fired] else [f"no point: {report}"])
        if not is_known(finding) and not is_of_cpython(finding)
    ]
    assert not unexpected, "\n".join([f"seed {seed}", *unexpected])


@pytest.mark.timeout(SECONDS + 20)
@pytest.mark.parametrize("expected", EXPECTED, ids=lambda expected: "-".join(expected.example))
def test_expected_failure_still_fails(expected: Expected, built: Path) -> None:
    """What is listed as known shows at some point of its example: or it is to be removed."""
    reports, stderr = run(built, *expected.example, "--until", expected.pattern)
    assert any(
        re.search(expected.pattern, finding) for report in reports for finding in report["findings"]
    ), f"this holds now, remove it from EXPECTED: {expected.pattern}\n{stderr}"


def test_every_operation_is_run() -> None:
    """Each row of the table belongs to a subject."""
    assert {name.split(".")[0] for name in OPERATIONS} == {
        subject.split(".")[0] for subject in SUBJECTS
    }


FAULTY = '''
"""A package with the faults that the injector has to find."""
import threading

lock = threading.Lock()
held = []

def take_then_try():
    if lock.acquire(blocking=False):
        try:
            held.append(1)
        finally:
            lock.release()

def check_then_act(table):
    if "key" not in table:
        table["key"] = make()
    return table["key"]

def make():
    return object()

def take_inside():
    with lock:
        held.append(1)

def take_often(seen):
    for number in range(500):
        seen[:] = [number]
        take_inside()
'''


@pytest.mark.parametrize(("function", "found"), [("take_then_try", True), ("take_inside", False)])
def test_injector_finds_lock_taken_before_try(
    function: str, found: bool, built: Path, tmp_path: Path
) -> None:
    """An interrupt between acquire() and try is found; ``with`` has no such point."""
    package = tmp_path / "xenmapcache"  # the part of a file's name that is counted
    package.mkdir()
    (package / "faulty.py").write_text(FAULTY)
    script = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(package)!r}]
import faulty
from pathlib import Path
from tests.interrupts.injector import Injector, build
injector = Injector(build(Path({str(built)!r})))
def handler():
    raise KeyboardInterrupt
points = injector.points(faulty.{function})
assert len(points) > 1, points
stuck = []
for point in points:
    outcome = injector.signal(faulty.{function}, handler, point)
    assert outcome.fired, outcome
    if faulty.lock.locked():
        stuck.append(outcome.where)
        faulty.lock.release()
print(*stuck, sep="\\n")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert ("in take_then_try" in done.stdout) == found, done.stdout


def test_injector_interrupts_first_and_last_passes_of_loop(built: Path, tmp_path: Path) -> None:
    """Of a loop with 500 passes, those at its beginning and at its end are interrupted."""
    package = tmp_path / "xenmapcache"
    package.mkdir()
    (package / "faulty.py").write_text(FAULTY)
    script = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(package)!r}]
import faulty
from pathlib import Path
from tests.interrupts.injector import PASSES, Injector, build
injector = Injector(build(Path({str(built)!r})))
seen, interrupted = [], []
def act():
    faulty.take_often(seen)
for point in injector.points(act):
    seen.clear()
    assert injector.signal(act, lambda: interrupted.extend(seen), point).fired
assert {{*interrupted}} == {{*range(PASSES), *range(500 - PASSES, 500)}}, interrupted
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_injector_fails_each_allocation(built: Path, tmp_path: Path) -> None:
    """Each allocation of a call can be the one that fails, and only that."""
    script = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}]
from pathlib import Path
from tests.interrupts.injector import Injector, build
injector = Injector(build(Path({str(built)!r})))
def act():
    return [bytearray(1000) for _ in range(3)]
act()
count = injector.count_allocations(act)
assert count >= 6, count
for number in range(count):
    outcome = injector.allocation(act, number)
    assert outcome.fired
    assert isinstance(outcome.error, MemoryError), outcome
outcome = injector.allocation(act, count)
assert not outcome.fired and outcome.error is None, outcome
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "")


def test_failing_point_is_printed_with_command(built: Path) -> None:
    """A point that fails says where, what, and how to run it again."""
    from .points import Finding

    finding = Finding("cache.read", "close", 7, "cache/x.py:3 in f", "a lock is held: x")
    assert str(finding).splitlines() == [
        "cache/x.py:3 in f: cache.read, close: a lock is held: x",
        "    python -m tests.interrupts cache.read close 7",
    ]
    assert Injector.__doc__
    reports, stderr = run(built, "cache.read-miss", "read", "5")
    assert [report["tried"] for report in reports] == [1], stderr
