"""The numbers of a page: what its script draws, as JSON has it."""

from __future__ import annotations

from collections.abc import Sequence
from operator import add
from typing import Any, Final

from .bars import STYLES, Bar, Burst, Level, levels_of_bars, levels_of_bursts
from .columns import Heat, Series, fold
from .model import Picture

MAX_BARS: Final = 1_500
"""How many bars the coarsest level has at most."""
_LINES: Final = 40
_FOLDS: Final = 2
_JOINS: Final = (1, 2, 4, 8)
_HEATS: Final = ".012345"
_OF_BARS: Final = ("lane", "row", "style", "owner", "lease", "low", "high", "total")
_OF_BURSTS: Final = ("total", "dropped", "held")


def page_data(picture: Picture) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what a page's script draws at first, and the finer levels. All numbers are finite.

    Each kind of thing has levels of detail, the finest first. A level has a list for each
    attribute, of equal lengths. Times are in ns since the recording began.
    """
    *fine_bars, bars = levels_of_bars(picture.bars, picture.span, MAX_BARS)
    bursts = levels_of_bursts(picture.bursts, picture.span, _LINES)
    *fine_heat, heat = _heat(picture.heat, picture.span)
    overview = {
        "span": picture.span,
        "styles": STYLES,
        "owners": picture.owners,
        "lanes": [
            {"name": lane.name, "group": lane.group, "rows": lane.rows} for lane in picture.lanes
        ],
        "bars": [_lists(bars, _OF_BARS)],
        "bursts": [_lists(level, _OF_BURSTS) for level in bursts],
        "series": {"levels": _series(picture.series)},
        "heat": {
            "rows": picture.heat.rows(),
            "bytes": picture.heat.row_bytes,
            "levels": [heat],
        },
    }
    details = {"bars": [_lists(level, _OF_BARS) for level in fine_bars], "heat": fine_heat}
    return overview, details


def _lists(level: Level, names: Sequence[str]) -> dict[str, Any]:
    items: Sequence[Bar | Burst] = level.items
    lists = {name: [getattr(item, name) for item in items] for name in names}
    return {
        "width": level.width,
        "start": [item.start for item in items],
        "length": [item.end - item.start for item in items],
        **lists,
    }


def _series(series: dict[str, Series]) -> list[dict[str, Any]]:
    lists = {name: each.values for name, each in series.items()}
    width = next(iter(series.values())).width
    levels = []
    for _ in range(_FOLDS + 1):
        count = len(next(iter(lists.values())))
        levels.append({"width": width, "count": count, **lists})
        lists = {
            name: fold(values, max if name.endswith("_max") else add)
            for name, values in lists.items()
        }
        width *= 2
    return levels


def _heat(heat: Heat, span: int) -> list[dict[str, Any]]:
    levels = []
    for join in _JOINS:
        cells = ["".join(_HEATS[each + 1] for each in row) for row in heat.cells(span, join)]
        count = len(cells[0]) if cells else 0
        levels.append({"width": heat.width * join, "count": count, "cells": cells})
    return levels
