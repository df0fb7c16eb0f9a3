"""The page: a picture of a recording to look around in, in one file that needs no network."""

from __future__ import annotations

import base64
import gzip
import hashlib
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Final

from ...escape import printable
from ...extras import require
from .data import page_data
from .lanes import shorten
from .model import Picture
from .worst import MOST, Held

_DATA: Final = Path(__file__).parents[1] / "data"
_MAX_DATE: Final = 253_402_300_799
_LEASES: Final = (
    ("to-device", "DMA, the device reads guest memory"),
    ("from-device", "DMA, the device writes guest memory"),
    ("bidirectional", "DMA in both directions, or merged bars"),
    ("stale", "stale DMA: held after an INVALIDATE"),
    ("device", "device memory"),
    ("window", "window (a view for reading)"),
)
_HEATS: Final = (
    ("heat0", "mapped, not used"),
    ("heat1", "1 use"),
    ("heat2", "2-3"),
    ("heat3", "4-15"),
    ("heat4", "16-63"),
    ("heat5", "64 or more"),
)
_LEGENDS: Final = {"dma": _LEASES, "addresses": _HEATS}
_PANELS: Final = {
    "dma": "DMA in progress",
    "device": "Device memory and windows",
    "addresses": "Guest addresses",
    "rates": "Rates",
    "times": "Handler times",
}
_CAPTIONS: Final = {
    "dma": "One lane for each owner. A bar is a lease: from when a device model got the mapping "
    "until it gave the mapping back. Bars should be short. Red begins where an INVALIDATE came "
    "while the lease was held; from then on, data can be lost.",
    "device": "Long bars are normal here. An INVALIDATE does no harm to these mappings.",
    "addresses": "From bottom to top: ranges of guest memory. A range is coloured while it is "
    "mapped. Warmer colours are more uses in the time of a cell: map calls, leases and reports of "
    "dirty pages. A hit in the cache leaves no event. Ranges that were never used have no row.",
    "rates": "How many calls and requests there were per second. Many map calls after an "
    "INVALIDATE mean that the cache fills again.",
    "times": "How long the guest's vCPU waited for the device model. Quiesce is the time in which "
    "devices finish DMA before an INVALIDATE is handled.",
}
_WORDS: Final = (
    ("lease", "the right to use a mapping of guest memory, with a named owner"),
    ("DMA", "a transfer between a device and guest memory; it should end soon"),
    ("INVALIDATE", "Xen's request to give up all mappings, because the guest's memory changes"),
    ("stale", "held across an INVALIDATE: the guest may have other pages there by now"),
    ("bucket", "the part of guest memory that the cache maps with one call, often 1 MiB"),
    ("ioreq", "a request of the guest to a device: an access to a port or to a register"),
    ("missing page", "an access to an address where the guest has no memory, or a failed map call"),
)
_KEYS: Final = (
    ("+", "zoom in"),
    ("-", "zoom out"),
    ("0", "show everything"),
    ("←", "earlier"),
    ("→", "later"),
    ("/", "search"),
    ("t", "light or dark"),
)


def load_library() -> str:
    """Return the script of plotly, which each page contains.

    Raises:
        BackendUnavailableError: the extra ``timeline`` is not installed.
    """
    script: str = require("plotly.offline", "plotly", "timeline").get_plotlyjs()
    return script


def write_page(picture: Picture, library: str, write: Callable[[str], object]) -> None:
    """Write a page as text.

    Args:
        picture: to show.
        library: what :func:`load_library` returns.
        write: called with each part of the text.
    """
    script = (_DATA / "timeline.js").read_text(encoding="utf-8")
    style = (_DATA / "timeline.css").read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; script-src {_hash(library)} {_hash(script)}; "
        "style-src 'unsafe-inline'; img-src data: blob:"
    )
    title = f"Timeline of {picture.source or 'a recording'}"
    write(
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<title>{escape(title)}</title>\n'
        f"<style>\n{style}</style>\n</head>\n<body>\n"
    )
    write(_head(picture, title))
    write(_TOOLS)
    for name, heading in _PANELS.items():
        write(_panel(name, heading, _CAPTIONS[name], _LEGENDS.get(name, ())))
    write(_table(picture.worst))
    write(_FOOT)
    for name, numbers in zip(("data", "details"), page_data(picture), strict=True):
        write(f'<script id="{name}" type="application/gzip">{_pack(numbers)}</script>\n')
    write(f"<script>{library}</script>\n<script>{script}</script>\n</body>\n</html>\n")


def _pack(value: object) -> str:
    """Return JSON as a browser reads it fast; none of the characters can be markup."""
    from json import dumps

    text = dumps(value, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def _hash(script: str) -> str:
    digest = hashlib.sha256(script.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def duration(nanoseconds: int) -> str:
    """Return a time for people: ``2.5 ms``."""
    for unit, name in ((1_000_000_000, "s"), (1_000_000, "ms"), (1_000, "µs")):
        if nanoseconds >= unit:
            return (
                f"{nanoseconds / unit:.4g} {name}" if unit < 1e9 else f"{nanoseconds / unit:,.3f} s"
            )
    return f"{nanoseconds} ns"


def date(nanoseconds: int | None) -> str:
    """Return a time of day in UTC; nothing if there is none."""
    seconds = -1 if nanoseconds is None else nanoseconds // 1_000_000_000
    if not 0 < seconds <= _MAX_DATE:
        return ""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"


def _head(picture: Picture, title: str) -> str:
    began = date(picture.base)
    begins = f"Began {began}. " if began else ""
    facts = (
        (f"{duration(picture.span)}", "long", False),
        (f"{picture.events:,}", "events", False),
        (f"{picture.leases:,}", "leases", False),
        (f"{picture.invalidations:,}", "INVALIDATEs", False),
        (f"{picture.stale:,}", "stale DMA leases", picture.stale > 0),
        (f"{picture.lost:,}", "pages maybe lost", picture.lost > 0),
        (f"{picture.copied:,}", "pages copied", picture.copied > 0),
    )
    items = "".join(
        f"<li{' class=bad' if bad else ''}><b>{value}</b> {name}</li>" for value, name, bad in facts
    )
    notes = "".join(f"<li>{escape(printable(note))}</li>" for note in picture.notes)
    return (
        f"<header>\n<h1>{escape(title)}</h1>\n"
        f'<p class="subtitle">{begins}All charts show the same time, in seconds since the '
        "beginning. Point at a bar for details. Drag across a chart to zoom in, double-click to "
        "show everything.</p>\n"
        f'<ul class="facts">{items}</ul>\n'
        + (f'<ul class="notes">{notes}</ul>\n' if notes else "")
        + "<noscript><p><b>The charts need JavaScript. "
        "The table below does not.</b></p></noscript>\n</header>\n"
    )


def _panel(name: str, heading: str, caption: str, legend: Iterable[tuple[str, str]]) -> str:
    items = "".join(
        f'<li><i style="background:var(--{key})"></i>{escape(text)}</li>' for key, text in legend
    )
    if name == "dma":
        items += '<li><i class="line"></i>INVALIDATE; &times;13 means 13 in close succession</li>'
    return (
        f'<section>\n<h2>{heading}</h2>\n<p class="caption">{escape(caption)}</p>\n'
        + (f'<ul class="legend">{items}</ul>\n' if items else "")
        + f'<div id="{name}" class="chart" role="img" aria-label="{heading}: chart"></div>\n'
        "</section>\n"
    )


def _table(leases: list[Held]) -> str:
    caption = (
        f"Up to {MOST} for each reason: lost or copied pages, held across an INVALIDATE, DMA that "
        "was held for the longest time."
    )
    head = "".join(f"<th>{title}</th>" for title in _TITLES)
    rows = "".join(map(_row, leases))
    table = (
        f'<div class="scroll"><table><thead><tr><th class="show"></th>{head}</tr></thead>\n'
        f"<tbody>\n{rows}</tbody></table></div>\n"
        if leases
        else '<p class="empty">No lease is in the recording.</p>\n'
    )
    return (
        f'<section>\n<h2>Worst leases</h2>\n<p class="caption">{caption}</p>\n{table}</section>\n'
    )


def _row(lease: Held) -> str:
    taken = lease.taken
    owner = escape(shorten(taken.owner))
    group = "dma" if taken.kind == "dma" else "device"
    origin = " · ".join(taken.origin or ())
    where = escape(shorten(f"{taken.thread} {origin}".strip(), 300))
    held = duration(lease.held) + (" (not released)" if lease.is_open else "")
    numbers = "".join(
        f'<td class="number{" bad" if count else ""}">{count:,}</td>'
        for count in (lease.across, lease.lost, lease.copied)
    )
    return (
        f'<tr data-owner="{owner}" data-low="{taken.start}" '
        f'data-high="{taken.start + taken.length}">'
        f'<td class="show"><button data-start="{lease.start}" data-held="{lease.held}" '
        f'data-chart="{group}" aria-label="Show lease {taken.lease}">Show</button></td>'
        f'<td class="text">{owner}</td><td>{escape(shorten(taken.direction or taken.kind))}</td>'
        f'<td class="place">{taken.start:#x}</td><td class="number">{taken.length:,}</td>'
        f'<td class="number">{lease.start / 1e9:.6f} s</td><td class="number">{held}</td>{numbers}'
        f'<td class="text">{where}</td></tr>\n'
    )


def _definitions(pairs: Iterable[tuple[str, str]]) -> str:
    return "".join(f"<dt>{word}</dt><dd>{escape(text)}</dd>" for word, text in pairs)


_TITLES: Final = (
    *("Owner", "Direction", "Address", "Bytes", "Taken at", "Held for"),
    *("INVALIDATEs", "Pages lost", "Pages copied", "Thread, and origin"),
)
_TOOLS: Final = """<nav class="tools" aria-label="View">
<input id="search" type="search" placeholder="Search: an owner, or an address such as 0x5000"
 aria-label="Search for an owner or an address" autocomplete="off" spellcheck="false">
<button id="closer" title="zoom in (+)">Zoom in</button>
<button id="wider" title="zoom out (-)">Zoom out</button>
<button id="left" title="earlier (left arrow)" aria-label="Earlier">&larr;</button>
<button id="right" title="later (right arrow)" aria-label="Later">&rarr;</button>
<button id="all" title="show everything (0)">All</button>
<button id="theme" title="light or dark (t)">Dark</button>
<div id="status" role="status" aria-live="polite"></div>
</nav>
"""
_FOOT: Final = (
    f"<section>\n<h2>Words</h2>\n<dl>{_definitions(_WORDS)}</dl>\n</section>\n"
    '<section class="keys">\n<h2>Keys</h2>\n<p>'
    + " ".join(f"<kbd>{key}</kbd> {text} &nbsp;" for key, text in _KEYS)
    + "</p>\n</section>\n"
)
