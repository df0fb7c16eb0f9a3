"""The chart that compares the candidates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tests.benchmarks import chart
from tests.benchmarks.candidates import LIMIT
from tests.benchmarks.comparison import Row
from tests.benchmarks.report import UNITS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANELS = ("hot", "random", "pages", "skewed", "mebibytes", "open")
COLOURS = {"ours": "#1b6ca8", "bare": "#555555", "peer": "#d9a05b"}
LEGEND = {"ours": "xenmapcache", "bare": "nothing but Python", "peer": "packages that pip installs"}


def draw(rows: Sequence[Row]) -> Path:
    """Draw the measured rows, grouped by how the guest is there; return the file."""
    from matplotlib import pyplot
    from matplotlib.patches import Rectangle

    measured = [row for row in rows if row.figures]
    places, labels = positions(measured)
    figure, panels = pyplot.subplots(3, 2, figsize=(9, 12), sharey=True)
    for axes, name in zip(panels.flat, PANELS, strict=True):
        panel(axes, measured, places, name)
    panels[0][0].set_yticks(places, labels)
    panels[0][0].invert_yaxis()
    handles = [Rectangle((0, 0), 1, 1, color=COLOURS[kind]) for kind in LEGEND]
    figure.legend(handles, LEGEND.values(), loc="outside lower center", ncols=3, frameon=False)
    path = chart.save(figure, "peers")
    pyplot.close(figure)
    return path


def kind(row: Row) -> str:
    return "ours" if row.candidate.ours else "peer" if row.candidate.peer else "bare"


def positions(rows: Sequence[Row]) -> tuple[list[float], list[str]]:
    """Return where each row's bar is, and its label; with a gap between groups."""
    place, previous, places, labels = 0.0, "", [], []
    for row in rows:
        guest = row.candidate.format
        place += 1 if guest == previous or not previous else 1.8
        previous = guest
        places.append(place)
        labels.append(f"{row.candidate.name} · {guest}")
    return places, labels


def panel(axes: Axes, rows: Sequence[Row], places: Sequence[float], name: str) -> None:
    """Draw one kind of work, the limit as a line."""
    from matplotlib.ticker import NullFormatter

    figures = [row.figures[name] for row in rows]
    colours = [COLOURS[kind(row)] for row in rows]
    axes.barh(places, [figure.median for figure in figures], color=colours, height=0.8)
    for place, figure in zip(places, figures, strict=True):
        axes.annotate(
            f"{figure.median:,.{0 if figure.median >= 10 else 1 if figure.median >= 1 else 2}f}",
            (figure.median, place),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
        )
    (limit,) = (row.figures[name].median for row in rows if row.candidate == LIMIT)
    if name != "open":
        axes.axvline(limit, color=COLOURS["bare"], linewidth=0.8, linestyle="--")
    medians = [figure.median for figure in figures]
    axes.set_xscale("log")
    axes.set_xlim(min(medians) / 2, 2 * max(medians))
    axes.xaxis.set_major_formatter(lambda number, _: f"{number:,.6g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(y=0.02)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0, labelsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_title(UNITS[name], fontsize=10, loc="left")
