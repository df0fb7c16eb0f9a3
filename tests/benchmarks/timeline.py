"""How fast a timeline opens: ``python -m tests.benchmarks.timeline``; needs Chromium and selenium.

The page of a recording of 100,000 events is compared with plotly's own empty page, in turn and in
one run, in one browser. A page is open when all that a window of 1280 x 1000 shows is drawn. The
other charts are drawn when they are scrolled into sight, and the details follow.

Exit status: 1 if the ratio is above the limit.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from tests.observe.chromium import Driver, browser, open_page
from tests.observe.timeline_pages import busy, write
from xenmapcache.cli import main as command
from xenmapcache.observe.timeline.page import load_library

LIMIT = 3.0
EVENTS = 100_000
ROUNDS = 9
_MARK = "performance.mark('first chart'); performance.mark('charts in sight')"
_EMPTY = (
    '<!DOCTYPE html><meta charset="utf-8"><div id="chart"></div><script>{library}</script>'
    "<script>Plotly.newPlot('chart', []); {mark};"
    "document.documentElement.dataset.drawn = 'details'</script>"
)
_TIMES = (
    "return ['first chart', 'charts in sight'].map("
    "name => performance.getEntriesByName(name)[0].startTime)"
)


class Opened(NamedTuple):
    """How long a page took, in ms since the browser began to load it."""

    first: float
    in_sight: float


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        page = make_page(folder)
        empty = folder / "empty.html"
        empty.write_text(_EMPTY.format(library=load_library(), mark=_MARK), encoding="utf-8")
        with browser(folder / "profile") as driver:
            figures = compare(driver, page, empty)
    first, in_sight, bare = figures
    print(f"empty page of plotly: {bare:.0f} ms")
    print(f"first chart of {EVENTS:,} events / empty page: {first / bare:.2f}")
    print(f"charts in sight / empty page: {in_sight / bare:.2f}, at most {LIMIT}")
    return in_sight / bare > LIMIT


def make_page(folder: Path) -> Path:
    """Return a page of many events."""
    recording = write(folder / "run.jsonl", *busy(EVENTS))
    page = folder / "run.html"
    if command(["timeline", str(recording), "-o", str(page)]):
        sys.exit("the page could not be made")
    return page


def compare(driver: Driver, page: Path, empty: Path) -> tuple[float, float, float]:
    """Return the best times of the first chart, of all in sight, and of the empty page."""
    pairs = [(opened(driver, page), opened(driver, empty)) for _ in range(ROUNDS + 1)]
    del pairs[0]  # the browser's own start
    return (
        min(ours.first for ours, _ in pairs),
        min(ours.in_sight for ours, _ in pairs),
        min(bare.first for _, bare in pairs),
    )


def opened(driver: Driver, page: Path) -> Opened:
    """Open a page, and return when its charts were drawn."""
    open_page(driver, page)
    return Opened(*driver.execute_script(_TIMES))


if __name__ == "__main__":
    sys.exit(main())
