"""``xenmapcache demo``: a guest balloons while DMA is under way, on the mock."""

from __future__ import annotations

import argparse
import contextlib
from typing import TYPE_CHECKING

from ..errors import BackendUnavailableError
from .arguments import FILES, describe, drawing
from .output import Output, print_json, print_note

if TYPE_CHECKING:
    from ..observe.recording import Entry

_TITLE = "6. What it looks like"
_SOURCE = "xenmapcache demo: a guest balloons; [1] is the cache that copies"


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Give the command's parser its help and its arguments."""
    describe(
        parser,
        "Show on a mock guest what this package is about: a guest balloons while DMA is\n"
        "under way. Needs neither Xen nor root.",
        "  xenmapcache demo\n  xenmapcache demo -o demo.html\n"
        "  xenmapcache demo --json | jq .outcomes.warn\nexit status: 0",
        tables=True,
    )
    action = parser.add_argument(
        "-o",
        "--output",
        type=drawing,
        metavar="OUT",
        help="also draw what has happened, as xenmapcache timeline does: a page, OUT.html, or a "
        "drawing, OUT.svg; an existing file is replaced",
    )
    action.complete = FILES  # type: ignore[attr-defined] # shtab's way


def run(options: argparse.Namespace) -> int:
    """Play the story; as one JSON object with ``--json``. Returns the exit status."""
    from .story import recorded, story  # the mock is not for other commands

    events: list[Entry] = []
    with recorded() as log, contextlib.closing(story(log, events)) as steps:
        if options.json:
            print_json({step.key: step.facts for step in steps})
            text = _draw(options.output, events)
            if text:
                print_note(text)
            return 0
        output = Output()
        for step in steps:
            output.section(step.title)
            output.text(step.text)
            output.table(step.header, step.rows)
            if step.verdict:
                output.text(f"\n{step.verdict}", "bold")
    text = _draw(options.output, events)
    if text:
        output.section(_TITLE)
        output.text(text)
    return 0


def _draw(path: str | None, events: list[Entry]) -> str:
    """Write the page, if one is wanted; return what to say of it."""
    if path is None:
        return ""
    from ..observe.timeline.model import Model
    from .timeline import drawer, write_drawing

    model = Model()
    model.add(events)
    try:
        draw = drawer(path)
    except BackendUnavailableError as error:
        return f"No page was written: {error}"
    write_drawing(path, model.finish(_SOURCE), draw)
    return f"{path} shows the leases, the INVALIDATEs and the lost page. Open it in a browser."
