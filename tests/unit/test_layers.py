"""Imports go strictly downward, and siblings do not import each other."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import xenmapcache

PACKAGE = Path(xenmapcache.__file__).parent

LAYERS = [
    {"errors", "address", "ioreq"},
    {"binding", "elf", "atomicfile"},
    {"mapping", "ledger", "imagefile"},
    {"backend"},
    {"lease", "mock", "source"},
    {"buckets", "backends"},
    {"cache"},
    {"guest", "devicemodel", "coredump_writer"},
    {"cli"},
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
ABOVE_ALL = {"__init__", "__main__"}

FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """Return the top-level rooms of the package that a file imports, in whatever function."""
    depth = len(path.relative_to(PACKAGE).parts)
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            rooms |= {n.name.split(".")[1] for n in node.names if n.name.startswith("xenmapcache.")}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level == depth:  # relative to the package itself
                rooms |= {module.split(".")[0]} if module else {n.name for n in node.names}
            elif not node.level and module.startswith("xenmapcache"):
                rooms |= set(module.split(".")[1:2]) or {n.name for n in node.names}
    return rooms


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_strictly_downward(path: Path) -> None:
    """A file imports only from lower layers, or from its own folder."""
    room = room_of(path)
    if room in ABOVE_ALL:
        return
    allowed = {other for other, level in LEVEL.items() if level < LEVEL[room]}
    assert imported_rooms(path) <= allowed | {room} | ({"__version__"} if room == "cli" else set())


def test_backends_do_not_import_each_other() -> None:
    """Each backend is one file; what live ones share is in domain.py."""
    for path in (PACKAGE / "backends").glob("*.py"):
        siblings = {
            node.module
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom) and node.level == 1
        }
        assert siblings <= {"domain", "image", "pageindex"}, path


def test_there_are_no_rooms_without_a_name() -> None:
    """Nothing is called utils, helpers, common or misc."""
    names = {path.stem for path in FILES}
    assert not names & {"utils", "util", "helpers", "common", "misc"}
