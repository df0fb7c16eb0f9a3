"""The crash matrix: nothing that is kept or under way ends the interpreter, whatever happens.

Each cell is a process of its own: status 0, nothing on stderr, and what the table says.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from queue import SimpleQueue

import pytest

from tests.fake_xen import build, need

from .crash.table import BEHAVIOURS, CELLS, OPERATIONS, SOURCES, expected, markdown

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "crash-matrix.md"

AT_A_TIME = 2

Cell = tuple[str, str, str]
"""Source, row or operation, column or behaviour of the library."""
Outcome = tuple[int, str, str]


class Server:
    """The process that runs cells, one at a time."""

    def __init__(self, library: Path, folder: Path) -> None:
        command = [sys.executable, "-X", "dev", "-m", "tests.lifetime.crash", library, folder]
        self.process = subprocess.Popen(
            list(map(str, command)), cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def ask(self, cell: Cell) -> Outcome:
        """Run a cell; return its status, what became of it, and what was on its stderr."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(cell).encode() + b"\n")
        self.process.stdin.flush()
        status, said, stderr = json.loads(self.process.stdout.readline())
        return status, said, stderr

    def close(self) -> None:
        """Let it end."""
        self.process.communicate()
        assert self.process.returncode == 0


@pytest.fixture(scope="module")
def ask(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[Cell], Outcome]]:
    """A function that returns what became of a cell.

    All cells of the run are run ahead, two at a time. With other workers, each waits for its test.
    """
    need("_cffi_backend")
    library = build(tmp_path_factory.getbasetemp() / "fake_xen")
    idle: SimpleQueue[Server] = SimpleQueue()
    for _ in range(AT_A_TIME):
        idle.put(Server(library, tmp_path_factory.mktemp("crash")))

    def run(cell: Cell) -> Outcome:
        server = idle.get()
        try:
            return server.ask(cell)
        finally:
            idle.put(server)

    items = [item for item in request.session.items if item.path == Path(__file__)]
    cells = [item.callspec.params.get("cell") for item in items if hasattr(item, "callspec")]
    if "PYTEST_XDIST_WORKER" in os.environ:
        cells = []  # others have the most of them
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        outcomes = {cell: pool.submit(run, cell) for cell in cells}
        yield lambda cell: (outcomes.get(cell) or pool.submit(run, cell)).result()
        for outcome in outcomes.values():
            outcome.cancel()  # if a test has failed, and no other is to be run
    for _ in range(AT_A_TIME):
        idle.get().close()


@pytest.mark.parametrize(
    "cell", [(source, *cell) for source in SOURCES for cell in CELLS], ids="|".join
)
def test_the_matrix(ask: Callable[[Cell], Outcome], cell: Cell) -> None:
    """What is kept or under way stays safe, or ends with the exception that is documented."""
    assert ask(cell) == (0, expected(*cell[1:]), "")


@pytest.mark.parametrize("cell", list(product(SOURCES[1:], OPERATIONS, BEHAVIOURS)), ids="|".join)
def test_a_library_that_misbehaves(ask: Callable[[Cell], Outcome], cell: Cell) -> None:
    """Whatever it does, each operation ends as documented, and the next one works."""
    assert ask(cell) == (0, BEHAVIOURS[cell[2]], "")


def test_a_crash_is_seen(ask: Callable[[Cell], Outcome]) -> None:
    """A cell that crashes has a status of its own, and takes nobody with it."""
    status, said, stderr = ask(("mock", "view", "a crash"))
    assert (status, said) == (-signal.SIGSEGV, "")
    assert "Segmentation fault" in stderr


@pytest.mark.skipif(not PAGE.is_file(), reason=f"no file {PAGE}")
def test_the_documentation_has_the_matrix() -> None:
    """The tables of the page are those that the tests go by."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    tables = [line for line in lines if line.startswith("|")]
    assert tables == list(markdown())
