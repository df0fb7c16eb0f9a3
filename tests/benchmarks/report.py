"""What came out of a run: as text, as JSON, and as it stands in the documentation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.benchmarks.candidates import LIMIT, MiB
from tests.benchmarks.comparison import NAMES, Row
from tests.benchmarks.footprint import Footprint
from tests.benchmarks.promises import HEADINGS as PROMISE_HEADINGS
from tests.benchmarks.promises import Promise
from tests.benchmarks.timing import Figure, machine

PAGE = Path(__file__).parents[2] / "docs" / "performance.md"
COMMAND = "make bench"
UNITS = {
    "open": "open, ms",
    "hot": "hot 8 B, ns",
    "random": "random 8 B, ns",
    "pages": "4 KiB in order, ns",
    "mebibytes": "1 MiB, µs",
    "skewed": "64 B 90/10, ns",
    "search": "search, ms",
}

Table = tuple[Sequence[str], list[tuple[str, ...]]]
"""Headings, and rows of cells."""


class Report(NamedTuple):
    """All that came out of a run.

    Attributes:
        rows: one for each candidate.
        footprints: of those that were measured, in the order of the rows.
        imports: milliseconds by what is imported.
        files: what is promised of guests at rest. A limit that is exceeded is only marked.
        promises: what is promised of the cache.
    """

    size: int
    rounds: int
    rows: list[Row]
    footprints: list[Footprint]
    imports: dict[str, Figure]
    files: list[Promise]
    promises: list[Promise]

    @property
    def kept(self) -> bool:
        return all(promise.kept for promise in self.promises)

    @property
    def measured(self) -> list[Row]:
        return [row for row in self.rows if row.figures]

    def machine(self) -> str:
        return f"{machine()} {self.size // MiB} MiB, {self.rounds} rounds."

    def to_json(self) -> dict[str, Any]:
        return {
            "machine": self.machine(),
            "size": self.size,
            "rounds": self.rounds,
            "rows": [row.to_json() for row in self.rows],
            "footprints": [each._asdict() for each in self.footprints],
            "imports": {names: figure._asdict() for names, figure in self.imports.items()},
            "files": [promise.to_json() for promise in self.files],
            "promises": [promise.to_json() for promise in self.promises],
        }

    def tables(self) -> dict[str, Table]:
        """Return by name what is shown."""
        return {
            "times": self.times(),
            "ratios": self.ratios(),
            "left out": (("not measured", "guest", "why"), self.left_out()),
            "footprints": self.footprint_table(),
            "files": (PROMISE_HEADINGS, [promise.cells() for promise in self.files]),
            "promises": (PROMISE_HEADINGS, [promise.cells() for promise in self.promises]),
        }

    def times(self) -> Table:
        headings = ("candidate", "guest", *UNITS.values())
        return headings, [
            (row.name, row.candidate.format, *(str(row.figures[name]) for name in NAMES))
            for row in self.measured
        ]

    def ratios(self) -> Table:
        """Return the medians over those of the plain mmap of the same memory."""
        works = [name for name in NAMES if name != "open"]
        headings = ("times mmap", "guest", *(UNITS[name].partition(",")[0] for name in works))
        (limit,) = (row for row in self.rows if row.candidate == LIMIT)
        return headings, [
            (
                row.name,
                row.candidate.format,
                *(f"{row.figures[name].median / limit.figures[name].median:.1f}" for name in works),
            )
            for row in self.measured
        ]

    def footprint_table(self) -> Table:
        headings = (
            "candidate", "guest", "import, ms", "import and open, ms", "peak, MiB", "own, MiB",
            "of files, MiB",
        )  # fmt: skip
        return headings, [
            (
                row.name,
                row.candidate.format,
                str(self.imports[row.candidate.modules]),
                f"{each.first * 1e3:,.0f}",
                *(f"{number / MiB:,.0f}" for number in (each.peak, each.own, each.shared)),
            )
            for row, each in zip(self.measured, self.footprints, strict=True)
        ]

    def left_out(self) -> list[tuple[str, ...]]:
        return [(row.name, row.candidate.format, row.reason) for row in self.rows if row.reason]

    def print(self) -> None:
        print(self.machine())
        show(self.tables(), 160)

    def write(self, page: Path = PAGE) -> None:
        """Put everything between its markers in a page of the documentation."""
        rewrite(page, "machine", f"{self.machine()}\n")
        for name, (headings, rows) in self.tables().items():
            rewrite(page, name, markdown(headings, rows))


def show(tables: dict[str, Table], width: int) -> None:
    """Print tables, those without rows left out."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table as RichTable

    console = Console(width=width)
    for headings, rows in tables.values():
        table = RichTable(box=None)
        for number, heading in enumerate(headings):
            text = number < 2 or heading == "why"
            table.add_column(escape(heading), justify="left" if text else "right")
        for cells in rows:
            table.add_row(*map(escape, cells))
        if rows:
            console.print(table, "")


def markdown(headings: Sequence[str], rows: Sequence[tuple[str, ...]]) -> str:
    """Return a table, ours in bold."""
    lines = [
        (f"**{cells[0]}**", *cells[1:]) if cells[0].startswith("xenmapcache ") else cells
        for cells in rows
    ]
    sides = ["---" if number < 2 else "--:" for number in range(len(headings))]
    return "".join(f"| {' | '.join(line)} |\n" for line in (headings, sides, *lines))


def markers(name: str, command: str = COMMAND) -> tuple[str, str]:
    return f"<!-- output: {command}, {name} -->", f"<!-- end of output: {command}, {name} -->"


def rewrite(page: Path, name: str, text: str, command: str = COMMAND) -> None:
    """Put a text between the markers of that name in a page."""
    begin, end = markers(name, command)
    before, found, rest = page.read_text(encoding="utf-8").partition(begin)
    _, found_end, after = rest.partition(end)
    if not found or not found_end:
        raise SystemExit(f"{page}: the lines {begin} and {end} are not there")
    page.write_text(f"{before}{begin}\n{text}{end}{after}", encoding="utf-8")
