"""``xenmapcache timeline``, and the page that the demo ends with."""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path

import pytest

from tests.observe.recordings import EVENTS
from tests.observe.timeline_pages import numbers, write
from xenmapcache.cli import main
from xenmapcache.events import EventsLost


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    pytest.importorskip("plotly", reason="plotly is not installed")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    return write(tmp_path / "run.jsonl", *EVENTS)


def test_a_page(recording: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command writes the page, for its owner only, and says what is in it."""
    out = tmp_path / "run.html"
    out.write_text("an older page")
    assert main(["timeline", str(recording), "-o", str(out)]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{out}: 20 events; leases: 1, lanes: 2, stale DMA leases: 2\n"
    note = f"xenmapcache: note: {recording}:"
    assert printed.err.splitlines() == [
        f"{note} 1 events have no time and are not shown",
        f"{note} 12 events were lost, because the recorder could not follow",
    ]
    text = out.read_text()
    assert "Plotly" in text
    assert numbers(text)[0]["span"] == 9_000_000_000
    assert stat.S_IMODE(out.stat().st_mode) == 0o600


def test_json(recording: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With --json, what was drawn is one object."""
    out = tmp_path / "run.svg"
    assert main(["timeline", str(recording), "-o", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "output": str(out), "events": 20, "lanes": 2, "leases": 1, "invalidations": 1, "stale": 2,
        "lost": 2, "copied": 1,
    }  # fmt: skip
    assert out.read_text().startswith("<?xml")


def test_nothing_to_draw(
    recording: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Events without a time cannot be drawn: status 1, a note, and no file."""
    out = tmp_path / "none.html"
    path = write(tmp_path / "none.jsonl", EventsLost(None, 3))
    assert main(["timeline", str(path), "-o", str(out)]) == 1
    assert "no event has a time" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("name", ["run.png", "html"])
def test_other_names(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The name says whether it is a page or a drawing."""
    with pytest.raises(SystemExit, match="2"):
        main(["timeline", "run.jsonl", "-o", name])
    assert "must end in .html or .svg" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [("a.html", "plotly.offline", "plotly"), ("a.svg", "matplotlib.figure", "matplotlib")],
)
def test_a_missing_package(
    name: str,
    module: str,
    package: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The error names the package and the extra, before the recording is read."""
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["timeline", "not-there.jsonl", "-o", str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert f"pip install {package}, or 'xenmapcache[timeline]'" in error


def test_a_file_that_cannot_be_written(
    recording: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error names the file."""
    out = tmp_path / "folder.html"
    out.mkdir()
    assert main(["timeline", str(recording), "-o", str(out)]) == 2
    assert str(out) in capsys.readouterr().err


def test_the_demo_ends_with_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It shows both caches of the story, and the demo says where it is."""
    pytest.importorskip("plotly", reason="plotly is not installed")
    out = tmp_path / "demo.html"
    assert main(["demo", "-o", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "6. What it looks like" in printed
    assert "demo.html shows" in " ".join(printed.split())
    overview, _ = numbers(out.read_text())
    names = {lane["name"] for lane in overview["lanes"]}
    assert names == {
        f"{owner}{stream}" for owner in ("ide0", "ahci0", "e1000", "vga") for stream in ("", " [1]")
    }
    assert sum(overview["bursts"][0]["total"]) == 26
    assert 5 in overview["bars"][0]["style"]


@pytest.mark.parametrize("option", [[], ["--json"]])
def test_the_demo_without_plotly(
    option: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It says how to get the page, and is a success."""
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    out = tmp_path / "demo.html"
    assert main(["demo", "-o", str(out), *option]) == 0
    printed = capsys.readouterr()
    text = " ".join((printed.err if option else printed.out).split())
    assert "No page was written: the package plotly is needed" in text
    assert "'xenmapcache[timeline]'" in text
    assert os.listdir(tmp_path) == []


def test_a_page_does_not_replace_its_recording(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.html"
    path.write_text("a recording")
    assert main(["timeline", str(path), "-o", str(path)]) == 2
    assert "is the file that is read" in capsys.readouterr().err
    assert path.read_text() == "a recording"
