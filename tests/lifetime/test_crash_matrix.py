"""The crash matrix: nothing that is kept or under way ends the interpreter, whatever happens.

Each cell ends with status 0, nothing on stderr, and what the table says. The cells of a row that do
not end Python share a process, one after the other. If it ends otherwise, or prints anything, each
of them runs again in a process of its own. ``XENMAPCACHE_BINDINGS=both`` runs each cell of a live
domain over both bindings, as the gates do; otherwise a cell is run over one of them.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path

import pytest

from tests.effort import BOTH_BINDINGS
from tests.fake_xen import build, need

from .crash.table import (
    ALONE,
    BEHAVIOURS,
    COLUMNS,
    OPERATIONS,
    ROWS,
    SOURCES,
    expected,
    markdown,
)

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "crash-matrix.md"

Cell = tuple[str, str, str]
"""Source, row or operation, column or behaviour of the library."""
Outcome = tuple[int, str, str]


class Server:
    """The process that forks those in which cells run, one at a time."""

    def __init__(self, library: Path, folder: Path) -> None:
        command = [sys.executable, "-X", "dev", "-m", "tests.lifetime.crash", library, folder]
        self.process = subprocess.Popen(
            list(map(str, command)), cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def ask(self, cells: Sequence[Cell]) -> tuple[int, list[str], str]:
        """Run cells in one process; return its status, what became of each, and its stderr."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(cells).encode() + b"\n")
        self.process.stdin.flush()
        status, said, stderr = json.loads(self.process.stdout.readline())
        return status, said, stderr

    def close(self) -> None:
        """Let it end."""
        self.process.communicate()
        assert self.process.returncode == 0


def together(cell: Cell) -> Cell:
    """Return what the cells have in common that share a process."""
    source, row, column = cell
    return source, row, column if column in ALONE else ""


def over(source: str, first: int, second: int) -> bool:
    """Return whether a cell is run over a source: over both bindings, or in turn over one."""
    return BOTH_BINDINGS or source == SOURCES[0] or source == SOURCES[1 + (first + second) % 2]


MATRIX: list[Cell] = [
    (source, row, column)
    for source in SOURCES
    for (first, row), (second, column) in product(enumerate(ROWS), enumerate(COLUMNS))
    if over(source, first, second)
]
MISBEHAVING: list[Cell] = [
    (source, operation, behaviour)
    for source in SOURCES[1:]
    for (first, operation), (second, behaviour) in product(
        enumerate(OPERATIONS), enumerate(BEHAVIOURS)
    )
    if over(source, first, second)
]
SHARED: dict[Cell, list[Cell]] = {}
for each in (*MATRIX, *MISBEHAVING):
    SHARED.setdefault(together(each), []).append(each)


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Cell], Outcome]]:
    """A function that returns what became of a cell."""
    need("_cffi_backend")
    library = build(tmp_path_factory.getbasetemp() / "fake_xen")
    server = Server(library, tmp_path_factory.mktemp("crash"))
    known: dict[Cell, dict[Cell, str]] = {}

    def ask(cell: Cell) -> Outcome:
        key = together(cell)
        cells = SHARED.get(key, [cell])
        if len(cells) > 1 and key not in known:
            status, said, stderr = server.ask(cells)
            clean = (status, len(said), stderr) == (0, len(cells), "")
            known[key] = dict(zip(cells, said, strict=True)) if clean else {}
        if cell in known.get(key, {}):
            return 0, known[key][cell], ""
        status, said, stderr = server.ask([cell])
        return status, "".join(said), stderr

    yield ask
    server.close()


@pytest.mark.parametrize("cell", MATRIX, ids="|".join)
def test_the_matrix(ask: Callable[[Cell], Outcome], cell: Cell) -> None:
    """What is kept or under way stays safe, or ends with the exception that is documented."""
    assert ask(cell) == (0, expected(*cell[1:]), "")


@pytest.mark.parametrize("cell", MISBEHAVING, ids="|".join)
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
