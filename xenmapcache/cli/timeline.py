"""``xenmapcache timeline``: a recording as a page to look around in, or as SVG."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Final

from ..files.atomic import new_file
from ..observe.recording import read
from ..observe.timeline.making import picture_of
from ..observe.timeline.model import Picture
from ..observe.timeline.page import load_library, write_page
from ..observe.timeline.svg import load_matplotlib, write_svg
from .arguments import FILES, check_output, describe, drawing
from .output import print_json, print_line, print_note
from .sources import usage_errors

_BUFFER: Final = 1 << 20

Write = Callable[[str], object]


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Give the command's parser its help and its arguments."""
    describe(
        parser,
        "Draw a recording as one page for a browser: a lane for each owner with its leases,\n"
        "stale leases in red, INVALIDATEs, guest addresses, rates, handler times, and the worst\n"
        "leases. The page is one file and uses no network. A page needs plotly, and an SVG needs\n"
        "matplotlib: pip install 'xenmapcache[timeline]'.",
        "  xenmapcache timeline run.jsonl -o run.html\n"
        "  xenmapcache timeline run.jsonl -o run.svg      for a document\n"
        "exit status: 0; 1 if no event has a time, so that nothing can be drawn; 2 for an error",
        json="print as one JSON object what was drawn",
    )
    action = parser.add_argument("file", metavar="FILE", help="a recording")
    action.complete = FILES  # type: ignore[attr-defined] # shtab's way
    action = parser.add_argument(
        "-o",
        "--output",
        type=drawing,
        required=True,
        metavar="OUT",
        help="the page, OUT.html, or the drawing, OUT.svg; an existing file is replaced",
    )
    action.complete = FILES  # type: ignore[attr-defined] # shtab's way


def run(options: argparse.Namespace) -> int:
    """Write the page or the drawing. Returns the exit status."""
    check_output(options.output, options.file)
    draw = drawer(options.output)
    recording = read(options.file)
    picture = picture_of(recording)
    if picture is None:
        print_note(
            f"{options.file}: no event has a time, so nothing can be drawn; "
            "docs/qemu-logs.md says which of QEMU's logs have times"
        )
        return 1
    with usage_errors():
        write_drawing(options.output, picture, draw)
    for note in picture.notes:
        print_note(f"{options.file}: {note}")
    facts = {
        "output": options.output, "events": picture.events, "lanes": len(picture.lanes),
        "leases": picture.leases, "invalidations": picture.invalidations,
        "stale": picture.stale, "lost": picture.lost, "copied": picture.copied,
    }  # fmt: skip
    if options.json:
        print_json(facts)
    else:
        print_line(
            f"{options.output}: {picture.events:,} events; leases: {picture.leases:,}, "
            f"lanes: {len(picture.lanes):,}, stale DMA leases: {picture.stale:,}"
        )
    return 0


def drawer(path: str) -> Callable[[Picture, Write], None]:
    """Return what draws a page, or an SVG if the name of the file says so.

    Raises:
        BackendUnavailableError: the extra ``timeline`` is not installed.
    """
    if path.endswith(".svg"):
        matplotlib = load_matplotlib()
        return lambda picture, write: write_svg(picture, matplotlib, write)
    library = load_library()
    return lambda picture, write: write_page(picture, library, write)


def write_drawing(path: str, picture: Picture, draw: Callable[[Picture, Write], None]) -> None:
    """Write a file, which takes its name when it is complete.

    Raises:
        OSError: it cannot be written.
    """
    with new_file(path) as fd:
        buffer = bytearray()

        def flush() -> None:
            while buffer:
                del buffer[: os.write(fd, buffer)]

        def write(text: str) -> None:
            buffer.extend(text.encode())
            if len(buffer) > _BUFFER:
                flush()

        draw(picture, write)
        flush()
