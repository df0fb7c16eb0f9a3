"""Everything that the command prints: lines, JSON, sections and tables.

No other module of the command writes to a terminal. All text is escaped here, because names of
files and domains, and what lies in a guest, may contain escape sequences.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from ..escape import printable, printable_lines

if TYPE_CHECKING:
    from rich.console import JustifyMethod, RenderableType
    from rich.text import Text

Report = Callable[[int, int], object]
"""Called with the number of bytes that are done, and of all bytes."""

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


def print_line(text: str) -> None:
    """Print a line on stdout."""
    sys.stdout.write(f"{printable(text)}\n")


def print_lines(lines: Sequence[str]) -> None:
    """Print several lines on stdout, which takes less time than one after the other."""
    if lines:
        text = "\n".join(lines)
        if text.count("\n") >= len(lines):
            text = "\n".join(map(printable, lines))
        print_part(f"{text}\n")


def print_part(text: str) -> None:
    """Print a part of a line, or several lines, on stdout."""
    # A look at all lines together mostly says that nothing is to be escaped, except for tabs.
    escaped = text.replace("\t", r"\t")
    if not escaped.replace("\n", "").isprintable():
        escaped = printable_lines(text)
    sys.stdout.write(escaped)


def print_bytes(data: bytes | memoryview) -> None:
    """Write bytes to stdout as they are; only for a user who asked for them."""
    sys.stdout.buffer.write(data)


def flush() -> None:
    """Hand to the reader what was printed so far."""
    sys.stdout.flush()


def print_error(text: str) -> None:
    """Print an error as one line on stderr."""
    print(f"xenmapcache: error: {printable(text)}", file=sys.stderr)


def print_note(text: str) -> None:
    """Print what a user should know of the output, as one line on stderr."""
    print(f"xenmapcache: note: {printable(text)}", file=sys.stderr)


def print_json(value: object) -> None:
    """Print one JSON document, whose characters are all ASCII. Needs nothing but Python."""
    from json import dumps

    print(dumps(value, indent=2))


def print_json_line(value: object) -> None:
    """Print one JSON document as a line."""
    from json import dumps

    sys.stdout.write(f"{dumps(value)}\n")


def place(address: int, name: str = "address") -> dict[str, object]:
    """Return an address as JSON has it: a number, and in hex as people write it."""
    return {name: address, f"{name}_hex": f"{address:#x}"}


def size(count: int) -> str:
    """Return a number of bytes for people: ``640 KiB``."""
    if count < 1024:
        return f"{count} B"
    unit = min((count.bit_length() - 1) // 10, 4)
    text = f"{count / (1 << 10 * unit):.1f}".removesuffix(".0")
    return f"{text} {' KMGT'[unit]}iB"


@contextlib.contextmanager
def progress(title: str) -> Iterator[Report]:
    """Show a bar with the rate and the time that remains, if stderr is a terminal."""
    try:
        if not sys.stderr.isatty():
            raise ImportError
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )
    except ImportError:
        yield lambda *_: None
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        bar = bars.add_task(printable(title), total=None)
        yield lambda done, total: bars.update(bar, completed=done, total=total)


class Output:
    """Standard output through rich. Tables keep their columns on terminals and in files.

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

        self._print(Text(f"\n{printable(title)}", "bold cyan"), _TEXT_WIDTH)

    def text(self, text: str, style: str = "") -> None:
        """Print a paragraph."""
        from rich.padding import Padding
        from rich.text import Text

        self._print(Padding(Text(printable_lines(text), style), (0, 0, 0, 2)), _TEXT_WIDTH)

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table. A column of numbers is aligned right; known words are coloured.

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
            justify: JustifyMethod = "right" if all(map(_NUMBER.match, cells)) else "left"
            # On a narrow terminal a long word is broken: cut off, half an address would be lost.
            table.add_column(printable(title), justify=justify, overflow="fold")
        for row in rows:
            table.add_row(*map(_cell, row))
        self._print(Padding(table, (1 if any(header) else 0, 0, 0, 2)), _TABLE_WIDTH)

    def _print(self, content: RenderableType, plain_width: int) -> None:
        if not self._terminal:
            self._console.width = plain_width
        # Rendered first and written here, so that main() sees a pipe that closes.
        with self._console.capture() as capture:
            self._console.print(content)
        rendered = capture.get()
        if not self._terminal:
            rendered = "".join(f"{line.rstrip()}\n" for line in rendered.splitlines())
        print(rendered, end="", flush=True)


class Display(Output):
    """Screens: one in the place of the other on a terminal, else one below the other.

    Attributes:
        is_live: whether they replace each other. Keys can be read then, too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_live = (
            sys.stdin.isatty() and sys.stdout.isatty() and not self._console.is_dumb_terminal
        )

    @property
    def height(self) -> int | None:
        """How many lines a screen may have; None: any number."""
        return self._console.height if self.is_live else None

    def begin(self) -> None:
        """Take the terminal: what it shows is hidden until :meth:`end`."""
        self._console.set_alt_screen()
        self._console.show_cursor(False)

    def end(self) -> None:
        """Give back the terminal as it was."""
        # If the terminal is gone, there is nothing to give back.
        with contextlib.suppress(OSError):
            self._console.show_cursor()
            self._console.set_alt_screen(False)

    def show(self, content: RenderableType) -> None:
        """Show a screen."""
        if not self.is_live:
            self._print(content, _TABLE_WIDTH)
            return
        with self._console.capture() as capture:
            self._console.update_screen(content)
        print(capture.get(), end="", flush=True)


def _cell(text: str) -> Text:
    from rich.text import Text

    cell = Text(printable_lines(text), _STYLES.get(text, ""))
    cell.highlight_regex(r"(?m)^-> .*$", "yellow")
    return cell
