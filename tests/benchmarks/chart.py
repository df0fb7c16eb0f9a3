"""Charts for the documentation: SVG files that differ only where the figures do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FOLDER = Path(__file__).parents[2] / "docs" / "charts"
LINES = {
    "color": ["#1b6ca8", "#d9722b", "#3a8f4d", "#8a5fa8", "#555555", "#b0892f", "#b0415a"],
    "marker": list("osD^vPX"),
}
"""How lines are told apart: ``axes.set_prop_cycle(**LINES)``."""

mpl.use("svg")
mpl.rcParams.update(
    {
        "svg.fonttype": "none",  # text stays text: small, and searchable
        "svg.hashsalt": "xenmapcache",  # ids that do not change from run to run
        "font.family": "sans-serif",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#dddddd",
        "figure.constrained_layout.use": True,
    }
)


def save(figure: Figure, name: str) -> Path:
    """Write a chart as ``docs/charts/NAME.svg`` and return its path."""
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.svg"
    # A margin, as who shows it may have a wider font.
    figure.savefig(
        path, metadata={"Date": None}, facecolor="white", bbox_inches="tight", pad_inches=0.3
    )
    # matplotlib leaves blanks at the ends of lines.
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("".join(f"{line.rstrip()}\n" for line in lines), encoding="utf-8")
    return path
