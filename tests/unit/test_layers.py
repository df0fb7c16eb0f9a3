"""Imports go strictly downward: between rooms, and between the modules of a room."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import xenmapcache
from tests.statements import statements

PACKAGE = Path(xenmapcache.__file__).parent

LAYERS = [
    {"escape", "logs"},
    {"errors", "address", "arch", "ioreq", "events"},
    {"stream"},
    {"binding", "extras", "formats"},
    {"mapping"},
    {"flat", "grants"},
    {"files"},
    {"backend"},
    {"mock", "source"},
    {"backends"},
    {"cache"},
    {"guest", "writers"},
    {"devicemodel"},
    {"adapters", "doctor", "observe"},
    {"cli"},
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
ABOVE_ALL = {"__init__", "__main__"}

FILES = sorted(PACKAGE.rglob("*.py"))

Graph = dict[str, set[str]]


def name_of(path: Path, package: Path) -> str:
    """Return a module's name without the package's, such as ``mock.domain``; of a room ``mock``."""
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path, package: Path) -> Iterator[tuple[str, str]]:
    """Yield ``(module, name)`` of what a file imports from the package, in whatever function.

    Imports for type checkers count, too: who reads a module has to read those as well.
    """
    folder = path.relative_to(package).parent.parts
    for node in statements(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith(f"{package.name}."):
                    yield alias.name.removeprefix(f"{package.name}."), ""
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                base = folder[: len(folder) - node.level + 1]
                module = ".".join((*base, *filter(None, [module])))
            elif module == package.name or module.startswith(f"{package.name}."):
                module = module.removeprefix(package.name).removeprefix(".")
            else:
                continue
            for alias in node.names:
                yield module, alias.name


@functools.cache
def graph_of(package: Path) -> Graph:
    """Return which modules of the package each of its modules imports."""
    files = {name_of(path, package): path for path in sorted(package.rglob("*.py"))}
    graph: Graph = {}
    for module, path in files.items():
        targets = set()
        for source, name in imports_of(path, package):
            inner = f"{source}.{name}".removeprefix(".")
            targets.add(inner if inner in files else source)
        graph[module] = targets & files.keys()
    return graph


def cycle_in(graph: Graph) -> list[str]:
    """Return modules that import each other, in order and the first again at the end; or none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


SHARED = {f"backends.{name}" for name in ("domain", "image", "room", "survey")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_rooms_import_only_from_lower_rooms(path: Path) -> None:
    """A file imports only from lower layers, or from its own folder."""
    module = name_of(path, PACKAGE)
    room = module.partition(".")[0]
    if not room or room in ABOVE_ALL:
        return
    allowed = {other for other, level in LEVEL.items() if level < LEVEL[room]} | {room}
    if room in ("cli", "doctor"):
        allowed |= {""}  # the package itself, for its version
    assert {target.partition(".")[0] for target in graph_of(PACKAGE)[module]} <= allowed


def test_no_module_imports_one_that_imports_it() -> None:
    """There is an order of all modules in which each imports only from those before it."""
    graph = {module: targets for module, targets in graph_of(PACKAGE).items() if module}
    assert not cycle_in({module: targets - {""} for module, targets in graph.items()})


def test_a_room_is_not_imported_from_inside() -> None:
    """A module names the sibling that it needs, not the room, which imports all of its modules."""
    for module, targets in graph_of(PACKAGE).items():
        room, _, rest = module.rpartition(".")
        assert not (room and rest and room in targets), module


@pytest.mark.parametrize(
    ("files", "cycle"),
    [
        ({"a.py": "from .b import x", "b.py": "import package.a"}, {"a", "b"}),
        ({"a/b.py": "from .c import x", "a/c.py": "def f():\n from . import b"}, {"a.b", "a.c"}),
        ({"a/b.py": "from ..d import x", "d.py": "from package.a import b"}, {"a.b", "d"}),
        ({"a.py": "from .b import x", "b.py": "from .c import x", "c.py": "import os"}, set()),
    ],
    ids=["two modules", "in a room, in a function", "between rooms", "no cycle"],
)
def test_cycles_are_found(tmp_path: Path, files: dict[str, str], cycle: set[str]) -> None:
    """Relative, absolute and late imports alike."""
    package = tmp_path / "package"
    for name, text in files.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    assert set(cycle_in(graph_of(package))) == cycle


def test_backends_do_not_import_each_other() -> None:
    """Each backend is one file. Live ones share three files, and files one."""
    for module, targets in graph_of(PACKAGE).items():
        if module.startswith("backends."):
            siblings = {target for target in targets if target.startswith("backends.")}
            assert siblings <= SHARED, module


def test_there_are_no_rooms_without_a_name() -> None:
    """Nothing is called utils, helpers, common or misc."""
    names = {path.stem for path in FILES}
    assert not names & {"utils", "util", "helpers", "common", "misc"}
