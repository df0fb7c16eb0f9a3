"""Modules, functions and test files stay short enough to be read in one go. No file is excepted."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import xenmapcache
from tests.statements import statements

PACKAGE = Path(xenmapcache.__file__).parent
TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent

MAX_MODULE, MAX_TEST_FILE, MAX_FUNCTION = 450, 700, 60
"""Lines: if a file has more, split it where a job ends; if a function has, name its steps."""

SCRIPTS = [ROOT, ROOT / ".ci", ROOT / "docs", ROOT / "examples"]
FILES = sorted(
    {*PACKAGE.rglob("*.py"), *TESTS.rglob("*.py")}.union(*(each.glob("*.py") for each in SCRIPTS))
)


def too_long(path: Path, limit: int) -> Iterator[str]:
    """Yield what of a file is too long: the file itself, and its functions."""
    text = path.read_text(encoding="utf-8")
    lines = text.count("\n")
    if lines > limit:
        yield f"{path.name}: {lines} lines, at most {limit}"
    for node in statements(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            if length > MAX_FUNCTION:
                yield f"{path.name}: {node.name} has {length} lines, at most {MAX_FUNCTION}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(path.parents[1])))
def test_files_and_functions_are_short(path: Path) -> None:
    """A module has at most 450 lines, a test file 700, and a function 60."""
    limit = MAX_TEST_FILE if TESTS in path.parents else MAX_MODULE
    assert not [*too_long(path, limit)]


def test_what_is_too_long_is_named(tmp_path: Path) -> None:
    """One line more than the limit is too much, for a file, a function and a method."""
    path = tmp_path / "long.py"
    body = "    pass\n" * 59
    path.write_text(f"def a():\n{body}" + f"async def b():\n{body}    pass\n")
    assert [*too_long(path, 121)] == ["long.py: b has 61 lines, at most 60"]
    assert next(too_long(path, 120)) == "long.py: 121 lines, at most 120"
    path.write_text("class C:\n" + "    def c(self):\n" + "        pass\n" * 60)
    assert [*too_long(path, 450)] == ["long.py: c has 61 lines, at most 60"]
