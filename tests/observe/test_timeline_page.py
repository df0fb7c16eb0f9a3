"""The page and the SVG of a recording, without a browser."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.observe.recordings import EVENTS, START, released, taken
from tests.observe.timeline_pages import HOSTILE, busy, numbers, write
from xenmapcache.events import Event, EventsLost, Invalidated, LeaseReleased
from xenmapcache.observe.recording import read
from xenmapcache.observe.timeline import data, making
from xenmapcache.observe.timeline.making import picture_of
from xenmapcache.observe.timeline.model import Picture
from xenmapcache.observe.timeline.page import date, duration, load_library, write_page
from xenmapcache.observe.timeline.svg import load_matplotlib, write_svg

LIBRARY = "'the script of plotly'"


def picture(folder: Path, *events: Event, source: str = "python disk.py") -> Picture:
    """Return the picture of a recording."""
    found = picture_of(read(write(folder / "run.jsonl", *events, source=source)))
    assert found
    return found


def page(folder: Path, *events: Event, source: str = "python disk.py") -> str:
    """Return a page, with a short text instead of plotly's script."""
    parts: list[str] = []
    write_page(picture(folder, *events, source=source), LIBRARY, parts.append)
    return "".join(parts)


class Tags(HTMLParser):
    """Takes a page apart."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_a_page_says_what_it_shows(tmp_path: Path) -> None:
    """Title, times, counts, captions, units, legend, words and keys are text of the page."""
    text = page(
        tmp_path,
        taken(),
        Invalidated(START + 3000, 1, 5, (7,), 2500),
        LeaseReleased(START + 9_000_000, 7, True, 1, 2),
    )
    found = " ".join(Tags(text).texts)
    for part in (
        "Timeline of python disk.py",
        "Began 2026-11-29 05:26:40 UTC",
        "DMA in progress",
        "Guest addresses",
        "Handler times",
        "stale DMA: held after an INVALIDATE",
        "in seconds since the beginning",
        "pages maybe lost",
        "show everything",
    ):
        assert part in found
    assert "<li class=bad><b>1</b> stale DMA leases</li><li class=bad><b>2</b> pages" in text
    assert "<td>to-device</td>" in text
    assert '<td class="number bad">1</td><td class="number bad">2</td>' in text


def test_a_page_needs_no_network(tmp_path: Path) -> None:
    """It names no other file, and the browser is told to load none, and to run its scripts only."""
    text = page(tmp_path, *busy(200))
    tags = Tags(text).tags
    assert [attributes for _, attributes in tags if "src" in attributes] == []
    links = [attributes["href"] for _, attributes in tags if "href" in attributes]
    assert links == ["data:,"]
    policy = next(each["content"] for tag, each in tags if "http-equiv" in each)
    assert policy
    assert policy.startswith("default-src 'none';")
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert len(scripts) == 2
    for script in scripts:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    """Owners, sources, threads, origins and damaged lines cannot add a tag, or an attribute."""
    hostile = taken(owner=HOSTILE)._replace(
        thread='" onclick="alert(1)', origin=(HOSTILE,), direction=HOSTILE
    )
    plain = page(tmp_path, taken(), released())
    (tmp_path / "bad").mkdir()
    path = write(tmp_path / "bad" / "run.jsonl", hostile, released(), source=HOSTILE)
    with path.open("ab") as file:
        file.write(b"<script>alert(1)</script>\n")
    found = picture_of(read(path))
    assert found
    parts: list[str] = []
    write_page(found, LIBRARY, parts.append)
    text = "".join(parts)
    names = [tag for tag, _ in Tags(text).tags if tag not in ("ul", "li")]
    assert names == [tag for tag, _ in Tags(plain).tags if tag not in ("ul", "li")]
    attributes = {name for _, each in Tags(text).tags for name in each}
    assert attributes == {name for _, each in Tags(plain).tags for name in each}
    assert "\x00" not in text
    assert "\x1b" not in text
    assert "1 damaged lines are skipped" in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text


def test_a_small_recording_is_complete_at_once(tmp_path: Path) -> None:
    """The overview has each bar; the levels have lists of one length."""
    overview, details = numbers(page(tmp_path, *EVENTS))
    (bars,) = overview["bars"]
    assert details["bars"] == []
    assert {len(bars[name]) for name in bars if name != "width"} == {3}
    assert overview["owners"][bars["owner"][0]].startswith('disk "1"')
    assert [lane["group"] for lane in overview["lanes"]] == ["dma", "dma"]
    (heat,) = overview["heat"]["levels"]
    assert [len(cells) for cells in heat["cells"]] == [heat["count"]] * len(
        overview["heat"]["rows"]
    )
    assert len(details["heat"]) == 3


def leases(level: dict[str, Any], style: int) -> int:
    """Return how many leases of a style a level has."""
    pairs = zip(level["total"], level["style"], strict=True)
    return sum(total for total, each in pairs if each == style)


def test_a_large_recording_has_levels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The overview has few bars, and all of the details follow; all red bars are in both."""
    monkeypatch.setattr(data, "MAX_BARS", 150)
    overview, details = numbers(page(tmp_path, *busy(4000)))
    (coarse,) = overview["bars"]
    fine = details["bars"][0]
    assert len(coarse["start"]) <= 150 < len(fine["start"])
    assert fine["width"] == 0
    for style in (3, 5):
        counts = {leases(level, style) for level in (coarse, *details["bars"])}
        assert len(counts) == 1
    series = overview["series"]["levels"]
    assert [len(each["maps"]) for each in series] == [each["count"] for each in series]
    assert len({sum(each["requests"]) for each in series}) == 1
    assert len({max(each["handler_max"]) for each in series}) == 1


def test_empty_recordings(tmp_path: Path) -> None:
    """Without leases the page says so; without a time there is nothing to draw."""
    text = page(tmp_path, EventsLost(START, 3))
    assert "No lease is in the recording." in text
    assert "3 events were lost" in text
    assert picture_of(read(write(tmp_path / "run.jsonl", EventsLost(None, 3)))) is None
    assert picture_of(read(write(tmp_path / "run.jsonl"))) is None


def test_notes_of_the_reader(tmp_path: Path) -> None:
    """What the recording lacks is in the page."""
    recording = read(write(tmp_path / "run.jsonl", taken()))
    assert list(making._notes(recording)) == []
    recording.overwritten = True
    recording.left_out, recording.unknown, recording.damaged = 4, 2, 1
    recording.examples = ["line 3: no JSON"]
    assert list(making._notes(recording)) == [
        "earlier events were overwritten; record with a larger limit",
        "the recorder has left out 4 things",
        "2 events of unknown kinds are skipped",
        "1 damaged lines are skipped",
        "line 3: no JSON",
    ]


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [(5, "5 ns"), (2500, "2.5 µs"), (2_500_000, "2.5 ms"), (61_250_000_000, "61.250 s")],
)
def test_durations(nanoseconds: int, text: str) -> None:
    """Times have a unit that fits."""
    assert duration(nanoseconds) == text


def test_dates() -> None:
    """Only a time that a calendar has is shown."""
    assert date(START) == "2026-11-29 05:26:40 UTC"
    assert [date(each) for each in (None, 0, -5, 1 << 63)] == [
        "",
        "",
        "",
        "2262-04-11 23:47:16 UTC",
    ]
    assert date(1 << 70) == ""


def test_plotly_is_in_the_page(tmp_path: Path) -> None:
    """The package ships its script, which ends no script element."""
    pytest.importorskip("plotly", reason="plotly is not installed")
    library = load_library()
    assert "Plotly" in library
    assert "</script" not in library


def svg(folder: Path, *events: Event, source: str = "python disk.py") -> ElementTree.Element:
    """Return the root of a drawing."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    parts: list[str] = []
    write_svg(picture(folder, *events, source=source), load_matplotlib(), parts.append)
    return ElementTree.fromstring("".join(parts))


def texts(root: ElementTree.Element) -> list[str]:
    return ["".join(each.itertext()).strip() for each in root.iter() if each.tag.endswith("}text")]


def colours(root: ElementTree.Element) -> str:
    return " ".join(each.get("style", "") for each in root.iter())


@pytest.mark.slow
def test_svg(tmp_path: Path) -> None:
    """The drawing has the owners, the red bars, counted INVALIDATEs, and all of the panels."""
    root = svg(tmp_path, *busy(400))
    found = texts(root)
    assert {"disk0", "e1000", "vga", "stale DMA", "map calls", "handler, longest"} <= set(found)
    assert any(each.startswith("\u00d7") for each in found)
    assert "Timeline of python disk.py" in found
    assert "#d3222a" in colours(root)


@pytest.mark.slow
def test_svg_of_hostile_text(tmp_path: Path) -> None:
    """Markup and formulas stay text; a panel without anything to show is left out."""
    events = taken(owner=HOSTILE), Invalidated(START, 1)
    root = svg(tmp_path, *events, source=HOSTILE)
    again = svg(tmp_path, *events, source=HOSTILE)
    assert ElementTree.tostring(root) == ElementTree.tostring(again), "equal input, equal file"
    found = texts(root)
    assert any(each.startswith("</script><img src=x onerror=alert(1)>&amp;") for each in found)
    assert not any(each.startswith("Rates") for each in found)
    assert "#d3222a" not in colours(root)
    assert "Rates: per second" in texts(svg(tmp_path, EventsLost(None, 3), EventsLost(START, 1)))
