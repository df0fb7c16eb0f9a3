"""Draw docs/architecture.svg from the package's imports.

``python docs/draw.py`` writes the picture; ``--check`` exits with 1 if the picture is out of date.
A room is a file or a folder at the package's top level. Its row is one above the highest room
that it imports, so every arrow points downward. An arrow that follows from others is left out.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from html import escape
from pathlib import Path

DOCS = Path(__file__).parent
PACKAGE = DOCS.parent / "xenmapcache"
PICTURE = DOCS / "architecture.svg"

_NAMESPACE = 'xmlns="http://www.w3.org/2000/svg"'
_ARROW_HEAD = (
    '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
    'orient="auto"><path class="head" d="M0,0L8,4L0,8z"/></marker></defs>'
)
Imports = dict[str, set[str]]

_LEFT_OUT = {"__init__", "__main__", "__pycache__"}
_BOX_WIDTH, _BOX_GAP, _ROW_GAP, _LINE, _MARGIN = 190, 26, 58, 15, 24
_STYLE = (
    "text{font:12px sans-serif;fill:#1b2733}.room{font-weight:bold;font-size:14px}"
    ".box{fill:#eef4fa;stroke:#4a6f94}.arrow{fill:none;stroke:#7d8fa1;stroke-width:1.2}"
    ".head{fill:#7d8fa1}.page{fill:#fff}"
)


def rooms() -> list[str]:
    """Return the rooms of the package: its files and folders."""
    names = {path.stem if path.is_file() else path.name for path in PACKAGE.iterdir()}
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    files = {path.stem for path in PACKAGE.glob("*.py")}
    return sorted((names & (folders | files)) - _LEFT_OUT)


def files_of(room: str) -> list[Path]:
    """Return the Python files of a room."""
    file = PACKAGE / f"{room}.py"
    return [file] if file.is_file() else sorted((PACKAGE / room).rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Yield the rooms that a file imports, in whatever function."""
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            names = [node.module] if node.module else [alias.name for alias in node.names]
            yield from (name.partition(".")[0] for name in names)


def room_imports() -> Imports:
    """Return which rooms each room imports."""
    known = set(rooms())
    return {
        room: {other for path in files_of(room) for other in imported(path)} & known - {room}
        for room in known
    }


def rows(imports: Imports) -> list[list[str]]:
    """Return the rooms of each row, the lowest row first."""
    level: dict[str, int] = {}

    def level_of(room: str, above: tuple[str, ...] = ()) -> int:
        if room in above:
            raise SystemExit(f"the imports have a cycle: {' -> '.join((*above, room))}")
        if room not in level:
            below = (level_of(other, (*above, room)) for other in sorted(imports[room]))
            level[room] = 1 + max(below, default=-1)
        return level[room]

    for room in sorted(imports):
        level_of(room)
    return [
        sorted(room for room in imports if level[room] == number)
        for number in range(max(level.values()) + 1)
    ]


def arrows(imports: Imports) -> list[tuple[str, str]]:
    """Return the imports that do not follow from others."""

    def reached(room: str) -> set[str]:
        return imports[room].union(*(reached(other) for other in imports[room]))

    return sorted(
        (room, other)
        for room in imports
        for other in imports[room]
        if not any(other in reached(between) for between in imports[room])
    )


def draw() -> str:
    """Return the picture as SVG."""
    imports = room_imports()
    stories = rows(imports)[::-1]
    width = max(len(story) for story in stories) * (_BOX_WIDTH + _BOX_GAP) + 2 * _MARGIN
    place: dict[str, tuple[float, float, float]] = {}
    boxes: list[str] = []
    top = float(_MARGIN)
    for story in stories:
        heights = [_height(room) for room in story]
        left = (width - len(story) * (_BOX_WIDTH + _BOX_GAP) + _BOX_GAP) / 2
        for room, height in zip(story, heights, strict=True):
            place[room] = left, top, height
            boxes += _box(room, left, top, height)
            left += _BOX_WIDTH + _BOX_GAP
        top += max(heights) + _ROW_GAP
    lines = [_arrow(place[upper], place[lower]) for upper, lower in arrows(imports)]
    height = top - _ROW_GAP + _MARGIN
    return "\n".join(
        [
            f'<svg {_NAMESPACE} role="img" viewBox="0 0 {width:.0f} {height:.0f}">',
            "<title>The rooms of xenmapcache; arrows are imports</title>",
            f"<style>{_STYLE}</style>",
            _ARROW_HEAD,
            f'<rect class="page" width="{width:.0f}" height="{height:.0f}"/>',
            *lines,
            *boxes,
            "</svg>",
            "",
        ]
    )


def _names(room: str) -> list[str]:
    """Return the lines of file names in a room's box."""
    names = [path.stem for path in files_of(room) if path.stem not in _LEFT_OUT]
    lines: list[str] = []
    for name in names if (PACKAGE / room).is_dir() else []:
        if lines and len(lines[-1]) + len(name) < 24:
            lines[-1] += f", {name}"
        else:
            lines.append(name)
    return lines


def _height(room: str) -> float:
    return 32 + _LINE * len(_names(room))


def _box(room: str, left: float, top: float, height: float) -> Iterator[str]:
    suffix = "/" if (PACKAGE / room).is_dir() else ".py"
    yield (
        f'<rect class="box" x="{left:.0f}" y="{top:.0f}" width="{_BOX_WIDTH}" '
        f'height="{height:.0f}" rx="6"/>'
    )
    yield f'<text class="room" x="{left + 10:.0f}" y="{top + 20:.0f}">{escape(room)}{suffix}</text>'
    for number, line in enumerate(_names(room)):
        yield f'<text x="{left + 10:.0f}" y="{top + 38 + _LINE * number:.0f}">{escape(line)}</text>'


def _arrow(upper: tuple[float, float, float], lower: tuple[float, float, float]) -> str:
    x1, y1 = upper[0] + _BOX_WIDTH / 2, upper[1] + upper[2]
    x2, y2 = lower[0] + _BOX_WIDTH / 2, lower[1]
    middle = (y1 + y2) / 2
    curve = f"M{x1:.0f},{y1:.0f}C{x1:.0f},{middle:.0f} {x2:.0f},{middle:.0f} {x2:.0f},{y2 - 1:.0f}"
    return f'<path class="arrow" marker-end="url(#head)" d="{curve}"/>'


def main(arguments: list[str]) -> int:
    """Write the picture, or check it."""
    picture = draw()
    if "--check" not in arguments:
        PICTURE.write_text(picture, encoding="utf-8")
        return 0
    if PICTURE.is_file() and PICTURE.read_text(encoding="utf-8") == picture:
        return 0
    print("docs/architecture.svg is out of date: run `python docs/draw.py`", file=sys.stderr)  # noqa: T201 - a script
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
