"""The table of QEMU's defects, and the tests in tests/qemu: each names the other, and all of it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.docs.test_docs import DOCS, ROOT, needs_docs

PAGE = DOCS / "qemu-defects.md"
ROW = re.compile(r"^\| (?P<number>\d+) \| ")
TEST = re.compile(r"`(test_\w+)`")
NUMBERS = {
    "defect": [number for number in range(1, 34) if number not in (12, 21)],
    "weakness": list(range(1, 14)),
}


class Row(NamedTuple):
    """A row of one of the tables: what it is about, its tests, and its column `live`."""

    kind: str
    number: int
    tests: list[str]
    live: str


def rows() -> list[Row]:
    """Return the rows of both tables, in order."""
    _, defects, weaknesses = re.split(
        r"^## (?:Fixed|Still weak) there$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    found = []
    for kind, table in (("defect", defects), ("weakness", weaknesses)):
        for line in table.splitlines():
            if match := ROW.match(line):
                *_, tests, live = line.strip("| ").split(" | ")
                found.append(Row(kind, int(match["number"]), TEST.findall(tests), live))
    return found


def names_in(folder: str) -> list[str]:
    """Return the names of the tests in a folder of tests, without importing them."""
    return [
        node.name
        for path in sorted(Path(ROOT, "tests", folder).glob("test_*.py"))
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]


@needs_docs
def test_each_row_is_there_once() -> None:
    """The tables have all rows, in order."""
    for kind, numbers in NUMBERS.items():
        assert [row.number for row in rows() if row.kind == kind] == numbers


@needs_docs
def test_each_row_has_its_tests_and_each_test_its_row() -> None:
    """A row names just the tests that are named after it, in the order in which they are."""
    there = names_in("qemu")
    assert len(set(there)) == len(there)
    named = []
    for row in rows():
        own = f"test_{row.kind}_{row.number:02}_"
        assert row.tests, own
        assert row.tests == [name for name in there if name.startswith(own)]
        named += row.tests
    assert sorted(named) == sorted(there)


@needs_docs
@pytest.mark.slow
def test_what_the_tables_say_of_live_guests() -> None:
    """A row says yes if a test of it runs live; else it names others that do, or says why not."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "xen", "tests/qemu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    live = set(re.findall(r"::(test_\w+)\[", done.stdout))
    others = set(names_in("xen"))
    for row in rows():
        assert row.live.startswith("yes") == any(name in live for name in row.tests), row
        if not row.live.startswith("yes"):
            assert TEST.findall(row.live) or row.live.startswith("no: "), row
        assert set(TEST.findall(row.live)) <= others, row
