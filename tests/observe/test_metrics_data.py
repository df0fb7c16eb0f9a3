"""Alert rules, dashboard and documentation name metrics that exist, with labels that they have."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from xenmapcache.observe.families import FAMILIES, Family
from xenmapcache.observe.metrics import DATA

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"

BY_NAME = {family.name: family for family in FAMILIES}
SUFFIXES = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("",), "gauge": ("",)}
SERIES = {family.name + suffix: family for family in FAMILIES for suffix in SUFFIXES[family.kind]}
SCRAPE_LABELS = {"job", "instance"}
"""Labels that Prometheus adds."""

METRIC = re.compile(r"\b(xenmapcache_\w+)(?:\{([^}]*)\})?")
MATCHER = re.compile(r'(\w+)\s*(?:=~|!~|!=|=)\s*"')
GROUPED = re.compile(r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)")
SHOWN = re.compile(r"\{\{\s*(?:\$labels\.)?(\w+)\s*\}\}")


def labels_of(series: str) -> set[str]:
    """Return the labels that a series may have; without any, if there is no such series."""
    family = SERIES.get(series)
    if family is None:
        return set()
    return {*family.labels, *SCRAPE_LABELS, *(["le"] if series.endswith("_bucket") else [])}


def complaints(expression: str, shown: str) -> Iterator[str]:
    """Yield what is wrong with an expression, and with a text that shows labels of its result."""
    known: set[str] = set()
    for series, matchers in METRIC.findall(expression):
        if series not in SERIES:
            yield f"no such metric: {series}"
        known |= labels_of(series)
        for label in MATCHER.findall(matchers):
            if label not in labels_of(series):
                yield f"{series} has no label {label}"
    if not known:
        yield "no metric"
    for names in GROUPED.findall(expression):
        yield from (
            f"no metric has the label {label}"
            for label in re.findall(r"\w+", names)
            if label not in known
        )
    yield from (
        f"no metric has the label {label} that is shown"
        for label in SHOWN.findall(shown)
        if label not in known
    )


def rules() -> dict[str, tuple[str, str]]:
    """Return the expression and the texts of each rule, by its name."""
    found = {}
    for part in (DATA / "alerts.yml").read_text(encoding="utf-8").split("- alert: ")[1:]:
        name, _, rest = part.partition("\n")
        expression, _, texts = rest.partition("        labels:\n")
        found[name] = expression.replace("expr:", ""), texts
    return found


def queries() -> Iterator[tuple[str, str]]:
    """Yield the expression and the legend of each query of the dashboard."""
    dashboard = json.loads((DATA / "dashboard.json").read_text(encoding="utf-8"))
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            yield target["expr"], target["legendFormat"]
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["definition"], f"{{{{{variable['name']}}}}}"


def test_the_alerts_name_what_exists() -> None:
    """Each metric and label of a rule, and each label that a text shows."""
    assert [name for name in rules() if not name.startswith("Xenmapcache")] == []
    assert len(rules()) == 6
    found = {name: list(complaints(*rule)) for name, rule in rules().items()}
    assert {name: texts for name, texts in found.items() if texts} == {}


def test_the_dashboard_names_what_exists() -> None:
    """Each metric and label of a query and of a legend; and each metric has its panel."""
    found = [complaint for query in queries() for complaint in complaints(*query)]
    assert found == []
    named = {SERIES[name].name for query, _ in queries() for name, _ in METRIC.findall(query)}
    assert BY_NAME.keys() - named == {"xenmapcache_buckets"}


def test_the_dashboard_can_be_imported() -> None:
    """Its panels have numbers of their own, do not overlap, and ask the source that is chosen."""
    dashboard = json.loads((DATA / "dashboard.json").read_text(encoding="utf-8"))
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24
    assert {panel["datasource"]["uid"] for panel in panels} == {"${datasource}"}
    assert dashboard["templating"]["list"][0]["name"] == "datasource"


DASHBOARD_KEYS = {
    "title": str, "uid": str, "description": str, "tags": list, "schemaVersion": int,
    "version": int, "editable": bool, "refresh": str, "time": dict, "templating": dict,
    "panels": list,
}  # fmt: skip
PANEL_KEYS = {
    "id": int, "type": str, "title": str, "description": str, "datasource": dict, "gridPos": dict,
    "fieldConfig": dict, "options": dict, "targets": list,
}  # fmt: skip
UNITS = {"short", "s", "bytes", "ops", "Bps"}
"""Those of Grafana's units that the dashboard needs, by the names that its panel editor writes."""
BUILT_IN = {"__range", "__rate_interval", "datasource"}
USED = re.compile(r"\$\{?(\w+)")


def test_the_dashboard_has_the_form_of_grafana() -> None:
    """Members, types, units, limits and variables are those of the dashboard JSON model."""
    dashboard = json.loads((DATA / "dashboard.json").read_text(encoding="utf-8"))
    assert {key: type(value) for key, value in dashboard.items()} == DASHBOARD_KEYS
    assert re.fullmatch(r"[A-Za-z0-9_-]{1,40}", dashboard["uid"])
    assert dashboard["time"].keys() == {"from", "to"}
    variables = {variable["name"] for variable in dashboard["templating"]["list"]} | BUILT_IN
    for panel in dashboard["panels"]:
        assert {key: type(value) for key, value in panel.items()} == PANEL_KEYS
        assert panel["type"] in {"stat", "timeseries"}
        assert panel["gridPos"].keys() == {"x", "y", "w", "h"}
        config = panel["fieldConfig"]
        assert config.keys() == {"defaults", "overrides"}
        assert config["defaults"]["unit"] in UNITS
        if panel["type"] == "stat":
            steps = config["defaults"]["thresholds"]["steps"]
            assert steps[0]["value"] is None  # what is below the first limit
            limits = [step["value"] for step in steps[1:]]
            assert limits == sorted(limits)
            assert panel["options"]["reduceOptions"]["calcs"] == ["lastNotNull"]
        references = [target["refId"] for target in panel["targets"]]
        assert references == list("ABCDEFGH"[: len(references)])
        used = {name for target in panel["targets"] for name in USED.findall(target["expr"])}
        assert used - variables == set()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_names_follow_the_rules(family: Family) -> None:
    """Counters end in _total and nothing else does; times are in seconds, sizes in bytes."""
    assert re.fullmatch(r"xenmapcache(_[a-z]+)+", family.name)
    assert family.name.endswith("_total") == (family.kind == "counter")
    assert not re.search(r"_(ms|ns|us|milliseconds|kb|mib|count|sum|bucket)(_|$)", family.name)
    if family.kind == "histogram":
        assert family.name.endswith("_seconds")
    assert family.meaning.endswith(".")


@pytest.mark.skipif(not PAGE.is_file(), reason="the documentation is not here")
def test_the_table_of_the_page_is_what_is_exported() -> None:
    """Each metric with its type, labels and meaning, in the same order."""
    rows = re.findall(r"^\| `(xenmapcache_.*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert rows == [
        f"{family.name}` | {family.kind} | {', '.join(family.labels)} | {family.meaning}"
        for family in FAMILIES
    ]


@pytest.mark.skipif(not PAGE.is_file(), reason="the documentation is not here")
def test_the_page_describes_each_alert() -> None:
    """No alert leaves a reader without what to do, and none is described that has gone."""
    rows = re.findall(r"^\| `(Xenmapcache\w+)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert rows == list(rules())


@pytest.mark.parametrize(
    ("expression", "shown", "wrong"),
    [
        ("xenmapcache_maps_total", "{{cache}} {{ $labels.instance }}", []),
        ("xenmapcache_maps", "", ["no such metric: xenmapcache_maps", "no metric"]),
        (
            "xenmapcache_quiesce_seconds",
            "",
            ["no such metric: xenmapcache_quiesce_seconds", "no metric"],
        ),
        ("rate(up[5m])", "", ["no metric"]),
        (
            'xenmapcache_maps_total{owner=~"x"}',
            "{{owner}}",
            [
                "xenmapcache_maps_total has no label owner",
                "no metric has the label owner that is shown",
            ],
        ),
        (
            "sum by (kind, le) (xenmapcache_quiesce_seconds_bucket)",
            "",
            ["no metric has the label kind"],
        ),
    ],
)
def test_the_check_sees_what_does_not_exist(expression: str, shown: str, wrong: list[str]) -> None:
    """A name or label that no metric has is found."""
    assert list(complaints(expression, shown)) == wrong
