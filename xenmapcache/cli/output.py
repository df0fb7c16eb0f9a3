"""What commands print: sections, text and tables; coloured on a terminal, plain ASCII elsewhere."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

_STYLES = {
    "ok": "green",
    "arrived": "green",
    "LOST": "bold red",
    "OLD DATA": "bold red",
    "problem": "bold red",
    "note": "yellow",
    "may be lost": "yellow",
}
_NUMBER = re.compile(r"-?\d")
_TEXT_WIDTH = 88
_TABLE_WIDTH = 1000


def print_json(value: object) -> None:
    """Print one JSON document. Needs nothing but Python."""
    print(json.dumps(value, indent=2))


class Output:
    """Standard output through rich. Tables keep their columns however it is read.

    Raises:
        ImportError: rich is not installed.

    Synchronization: for one thread.
    """

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(highlight=False, markup=False, emoji=False)
        self._terminal = self._console.is_terminal

    def section(self, title: str) -> None:
        """Begin a section."""
        from rich.text import Text

        self._print(Text(f"\n{title}", "bold cyan"), _TEXT_WIDTH)

    def text(self, text: str, style: str = "") -> None:
        """Print a paragraph."""
        from rich.padding import Padding
        from rich.text import Text

        self._print(Padding(Text(text, style), (0, 0, 0, 2)), _TEXT_WIDTH)

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table; a column of numbers is set right. Known words are coloured.

        Args:
            header: of each column; all empty for none.
            rows: the cells; a line that begins with ``->`` stands out as advice.
        """
        from rich import box
        from rich.padding import Padding
        from rich.table import Table

        table = Table(
            box=box.SIMPLE_HEAD if self._terminal and any(header) else None,
            show_header=any(header),
            show_edge=False,
            pad_edge=False,
            padding=(0, 2, 0, 0),
            header_style="bold",
        )
        for title, cells in zip(header, zip(*rows, strict=True), strict=True):
            table.add_column(title, justify="right" if all(map(_NUMBER.match, cells)) else "left")
        for row in rows:
            table.add_row(*map(_cell, row))
        self._print(Padding(table, (1 if any(header) else 0, 0, 0, 2)), _TABLE_WIDTH)

    def _print(self, content: RenderableType, plain_width: int) -> None:
        if not self._terminal:
            self._console.width = plain_width
        # Rendered first and written here, so that a pipe which closes is main()'s to see.
        with self._console.capture() as capture:
            self._console.print(content)
        rendered = capture.get()
        if not self._terminal:
            rendered = "".join(f"{line.rstrip()}\n" for line in rendered.splitlines())
        print(rendered, end="", flush=True)


def _cell(text: str) -> Text:
    from rich.text import Text

    cell = Text(text, _STYLES.get(text, ""))
    cell.highlight_regex(r"(?m)^-> .*$", "yellow")
    return cell
