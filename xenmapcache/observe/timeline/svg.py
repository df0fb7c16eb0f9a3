"""The picture as SVG, for documents; drawn by matplotlib, without a display."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, Final

from ...extras import require
from .bars import STALE, STYLES, Bar, levels_of_bars, levels_of_bursts
from .columns import ABSENT, Series
from .model import Picture
from .page import date, duration

_BARS: Final = 1_500
_LINES: Final = 40
_NANO: Final = 1e-9
_COLOURS: Final = ("#8cc3ea", "#174f8c", "#3f8fd0", "#4f9d69", "#9a7fc7", "#d3222a")
_HEATS: Final = ("#d9dee4", "#f7d38b", "#f2b04c", "#e5832c", "#c4551b", "#8a2d10")
_LINE: Final = "#6b4a00"
_RATES: Final = {"maps": "map calls", "requests": "ioreqs", "faults": "missing pages"}
_TIMES: Final = {"handler_max": "handler, longest", "quiesce_max": "quiesce, longest"}
_SETTINGS: Final = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "xenmapcache",  # so that equal pictures are equal files
    "text.parse_math": False,  # a name may have dollar signs
    "font.size": 9,
}
_INCHES_WIDE: Final = 11
_INCHES_LANE: Final = 0.28
_INCHES_PANEL: Final = 1.6


def load_matplotlib() -> Any:  # noqa: ANN401 - of a package without types
    """Return matplotlib.

    Raises:
        BackendUnavailableError: the extra ``timeline`` is not installed.
    """
    for module in ("matplotlib.figure", "matplotlib.backends.backend_svg", "matplotlib.ticker"):
        require(module, "matplotlib", "timeline")
    return require("matplotlib", "matplotlib", "timeline")


def write_svg(picture: Picture, matplotlib: Any, write: Callable[[str], object]) -> None:  # noqa: ANN401 - likewise
    """Write the picture as SVG.

    Args:
        picture: to show.
        matplotlib: what :func:`load_matplotlib` returns.
        write: called with the text.
    """
    with matplotlib.rc_context(_SETTINGS):
        output = io.StringIO()
        figure = _draw(picture, matplotlib)
        figure.savefig(output, format="svg", metadata={"Date": None})
    write(output.getvalue())


def _draw(picture: Picture, matplotlib: Any) -> Any:  # noqa: ANN401 - likewise
    parts = [
        (_draw_lanes, len(picture.lanes) * _INCHES_LANE + 0.6, bool(picture.lanes)),
        (_draw_heat, _INCHES_PANEL * 1.2, bool(picture.heat.rows())),
        (_draw_rates, _INCHES_PANEL, _is_used(picture.series, _RATES)),
        (_draw_times, _INCHES_PANEL, _is_used(picture.series, _TIMES)),
    ]
    parts = [part for part in parts if part[2]] or parts[2:3]
    heights = [height for _, height, _ in parts]
    size = _INCHES_WIDE, sum(heights) + 1.2
    figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
    grid = {"height_ratios": heights}
    panels = figure.subplots(len(parts), 1, sharex=True, squeeze=False, gridspec_kw=grid)[:, 0]
    began = date(picture.base)
    begins = f"began {began}, " if began else ""
    figure.suptitle(
        f"Timeline of {picture.source or 'a recording'}\n{begins}{duration(picture.span)}, "
        f"{picture.leases:,} leases, {picture.invalidations:,} INVALIDATEs, "
        f"{picture.stale:,} stale DMA leases, {picture.lost:,} pages maybe lost"
    )
    for panel, (draw, _, _) in zip(panels, parts, strict=True):
        draw(panel, picture, matplotlib)
    for burst in levels_of_bursts(picture.bursts, picture.span, _LINES)[-1].items:
        for panel in panels:
            panel.axvline(burst.start * _NANO, color=_LINE, linewidth=0.8, linestyle=":")
        if burst.total > 1:
            panels[0].annotate(
                f"\u00d7{burst.total:,}", (burst.start * _NANO, 1),
                xycoords=("data", "axes fraction"), color=_LINE, fontsize=7,
            )  # fmt: skip
    panels[-1].set_xlabel("seconds since the recording began; dotted lines are INVALIDATEs")
    panels[-1].set_xlim(-0.01 * picture.span * _NANO, 1.01 * picture.span * _NANO)
    return figure


def _is_used(series: dict[str, Series], names: dict[str, str]) -> bool:
    return any(any(series[name].values) for name in names)


def _draw_lanes(panel: Any, picture: Picture, _: Any) -> None:  # noqa: ANN401 - of a package without types
    bars: list[Bar] = list(levels_of_bars(picture.bars, picture.span, _BARS)[-1].items)
    least = picture.span / 1000
    for style, name in enumerate(STYLES):
        mine = [bar for bar in bars if bar.style == style]
        if not mine:
            continue
        rows = [picture.lanes[bar.lane].rows for bar in mine]
        pairs = zip(mine, rows, strict=True)
        panel.barh(
            [bar.lane - 0.4 + 0.8 * (bar.row + 0.5) / count for bar, count in pairs],
            [max(bar.end - bar.start, least) * _NANO for bar in mine],
            [0.75 / count for count in rows],
            [bar.start * _NANO for bar in mine],
            color=_COLOURS[style], label=name, zorder=3 if style == STALE else 2,
        )  # fmt: skip
    panel.set_yticks(range(len(picture.lanes)), [lane.name for lane in picture.lanes])
    panel.set_ylim(len(picture.lanes) - 0.4, -0.6)
    panel.set_title("Leases: DMA at the top, device memory below", loc="left", pad=12)
    panel.legend(loc="upper left", bbox_to_anchor=(1, 1))


def _draw_heat(panel: Any, picture: Picture, matplotlib: Any) -> None:  # noqa: ANN401 - likewise
    rows = picture.heat.rows()
    panel.set_title(
        "Guest addresses: grey is mapped and not used, warmer colours are more uses", loc="left"
    )
    cells = picture.heat.cells(picture.span, 4)
    shown = [[float("nan") if heat == ABSENT else heat for heat in row] for row in cells]
    panel.imshow(
        shown, aspect="auto", origin="lower", interpolation="nearest", vmin=-0.5, vmax=5.5,
        extent=(0, len(cells[0]) * 4 * picture.heat.width * _NANO, -0.5, len(rows) - 0.5),
        cmap=matplotlib.colors.ListedColormap(_HEATS),
    )  # fmt: skip
    every = -(-len(rows) // 8)
    panel.set_yticks(range(0, len(rows), every), [f"{row:#x}" for row in rows[::every]])


def _draw_rates(panel: Any, picture: Picture, _: Any) -> None:  # noqa: ANN401 - likewise
    panel.set_title("Rates: per second", loc="left")
    for name, label in _RATES.items():
        each = picture.series[name]
        _steps(panel, each, [value / (each.width * _NANO) for value in each.values], label)
    panel.set_ylim(bottom=0)
    panel.legend(loc="upper left", bbox_to_anchor=(1, 1))


def _draw_times(panel: Any, picture: Picture, matplotlib: Any) -> None:  # noqa: ANN401 - likewise
    panel.set_title("Handler times: how long the guest's vCPU waited", loc="left")
    for name, label in _TIMES.items():
        each = picture.series[name]
        _steps(panel, each, [value * _NANO or float("nan") for value in each.values], label)
    panel.yaxis.set_major_formatter(matplotlib.ticker.EngFormatter("s"))
    panel.set_ylim(bottom=0)
    panel.legend(loc="upper left", bbox_to_anchor=(1, 1))


def _steps(panel: Any, series: Series, values: list[float], label: str) -> None:  # noqa: ANN401 - likewise
    times = [column * series.width * _NANO for column in range(len(values))]
    panel.step(times, values, where="post", linewidth=1, label=label)
