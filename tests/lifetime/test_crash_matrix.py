"""The crash matrix: nothing that is kept or under way ends the interpreter, whatever happens.

Each cell is a process of its own: status 0, nothing on stderr, and what the table says.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fake_xen import build, need

from .crash.table import BEHAVIOURS, CELLS, OPERATIONS, SOURCES, expected, markdown

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "crash-matrix.md"

Ask = Callable[[str, str, str], tuple[int, str, str]]


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    """A function that runs a cell and returns its status, what became of it, and its stderr."""
    need("_cffi_backend")
    library = build(tmp_path_factory.getbasetemp() / "fake_xen")
    folder = tmp_path_factory.mktemp("crash")
    command = [sys.executable, "-X", "dev", "-m", "tests.lifetime.crash", str(library), str(folder)]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        stdin, stdout = server.stdin, server.stdout

        def run(source: str, row: str, column: str) -> tuple[int, str, str]:
            stdin.write(json.dumps([source, row, column]) + "\n")
            stdin.flush()
            status, said, stderr = json.loads(stdout.readline())
            return status, said, stderr

        yield run
        stdin.close()
    assert server.returncode == 0


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("row", "column"), CELLS)
def test_the_matrix(ask: Ask, source: str, row: str, column: str) -> None:
    """What is kept or under way stays safe, or ends with the exception that is documented."""
    assert ask(source, row, column) == (0, expected(row, column), "")


@pytest.mark.parametrize("source", SOURCES[1:])
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_a_library_that_misbehaves(ask: Ask, source: str, operation: str, behaviour: str) -> None:
    """Whatever it does, each operation ends as documented, and the next one works."""
    assert ask(source, operation, behaviour) == (0, BEHAVIOURS[behaviour], "")


def test_a_crash_is_seen(ask: Ask) -> None:
    """A cell that fails has a status of its own, and takes nobody with it."""
    status, said, stderr = ask("mock", "no such row", "eviction")
    assert (status, said) == (1, "")
    assert "KeyError" in stderr or "Error" in stderr


@pytest.mark.skipif(not PAGE.is_file(), reason=f"no file {PAGE}")
def test_the_documentation_has_the_matrix() -> None:
    """The tables of the page are those that the tests go by."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    tables = [line for line in lines if line.startswith("|")]
    assert tables == [line for line in markdown() if line]
