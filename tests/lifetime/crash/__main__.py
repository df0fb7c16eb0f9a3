"""Runs cells of the matrix in forked processes.

Reads a list of cells as JSON, a line each, and runs them one after the other in one process. A cell
is ``source, row, column``. Answers ``status, outcomes, stderr``.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import logging
import os
import signal
import sys
import warnings
from pathlib import Path

from xenmapcache.backends import domain, mock, xen
from xenmapcache.binding import cffi_loader, ctypes_loader
from xenmapcache.binding.declarations import LIBRARIES, prototypes
from xenmapcache.mapping import live_mappings

from .collected import COLLECTED, collect
from .events import EVENTS, fork
from .exits import leave
from .holds import Hold, take
from .library import misbehave
from .table import BEHAVIOURS, ENDED, EXITS
from .world import FakeWorld, MockWorld, World

PATIENCE = 60
IMPORTED_ONCE = (cffi_loader, ctypes_loader, domain, mock, xen)
"""What a cell would import when it needs it, and so would each of the next thousand."""


def run(world: World, row: str, column: str, outcome: int) -> str:
    """Return what became of a cell; if it ends this process, that is told before."""
    # After its end the guest stays in the dying state while a process maps it.
    somebody = world.backend.map(0, 1, writable=False).view(0, 1)
    hold = take(world, row, moves=column.startswith("replace()"))
    if column in EXITS:
        os.write(outcome, ENDED.encode() + b"\n")
        leave(world, hold, column)
        return ""
    if column in COLLECTED:
        holds = [hold]
        del hold
        said = collect(world, column, holds)
    else:
        said = happen(world, hold, column)
        try:
            hold.drop()
        except Exception as error:
            assert column in ("backend close", "domain end"), error
        del hold
    world.cache.close(force=True)
    del somebody
    settle(world)
    return said


def happen(world: World, hold: Hold, column: str) -> str:
    """Let it happen, use what is kept, and return both in the table's words."""
    if column == "fork":
        return fork(world, hold)
    said = ""
    try:
        EVENTS[column](world, hold)
    except Exception as error:
        said = f"{type(error).__name__}, "
        if isinstance(error, AssertionError):
            raise
    try:
        return said + hold.use()
    except Exception as error:
        if isinstance(error, AssertionError):
            raise
        return said + type(error).__name__


def settle(world: World) -> None:
    """Check that everything was released, and that the accounting agrees."""
    gc.collect()
    stats = world.cache.stats()
    assert (world.mappings(), live_mappings()) == (0, 0)
    assert (stats.resident_bytes, stats.maps) == (0, stats.unmaps), stats
    world.backend.close()
    if isinstance(world, FakeWorld):
        assert world.fake.misuses == 0


def cell(source: str, row: str, column: str, library: Path, folder: Path, outcome: int) -> None:
    """Run one, and report on a pipe, a line each."""
    signal.alarm(PATIENCE)
    world = MockWorld() if source == "mock" else FakeWorld(source, library, folder)
    if column in BEHAVIOURS:
        assert isinstance(world, FakeWorld)
        said = misbehave(world, row, column)
        settle(world)
    else:
        said = run(world, row, column, outcome)
    if column not in EXITS:
        os.write(outcome, said.encode() + b"\n")


def run_all(cells: list[tuple[str, str, str]], library: Path, folder: Path, outcome: int) -> None:
    """Run cells in this process, which is for nothing else; one that ends Python comes alone."""
    # Not dump_traceback_later(), whose thread a forked child would wait for at its end.
    faulthandler.register(signal.SIGALRM, chain=True)
    warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads
    # At exit the row's own ends of pipes are open.
    warnings.filterwarnings("ignore", "unclosed (file|<socket)", ResourceWarning)
    logging.getLogger("xenmapcache").addHandler(logging.NullHandler())
    for source, row, column in cells:
        cell(source, row, column, library, folder, outcome)
    if column not in EXITS:
        os._exit(0)  # how Python ends with everything kept, the other columns show


def serve(library: Path, folder: Path) -> None:
    """Answer until the last question."""
    for each in LIBRARIES:
        prototypes(each)  # which remembers them
    gc.freeze()  # what is imported need not be looked through in each child, nor copied by that
    for number, line in enumerate(sys.stdin):
        reading, writing = os.pipe()
        stderr = os.memfd_create("stderr")
        pid = os.fork()
        if not pid:
            os.dup2(stderr, 2)
            run_all(json.loads(line), library, folder / str(number), writing)
            return  # and end as a program does
        os.close(writing)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.lseek(stderr, 0, os.SEEK_SET)
        with os.fdopen(reading) as said, os.fdopen(stderr) as complaints:
            answer = (status, said.read().splitlines(), complaints.read())
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    serve(Path(sys.argv[1]), Path(sys.argv[2]))
