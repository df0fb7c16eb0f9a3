"""The benchmark of the commands works, on an image of a MiB."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.benchmarks import report, sources
from tests.benchmarks.report import markers
from tests.benchmarks.sources import Row, Times
from tests.images import lab, writers

pytestmark = pytest.mark.slow

TOOLS = ("grep", "strings", "hexdump", "dd", "cp", "cmp")


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> lab.Images:
    """A folder like that of the lab, with a flat image, a core and what no reader knows."""
    (tmp_path / "guest.raw").write_bytes(writers.memory(0, 256))
    (tmp_path / "plain.elf").write_bytes(writers.elf_core_of([(0, 256)]))
    (tmp_path / "guest.migration").write_bytes(b"QEVM" + bytes(100))
    made = lab.Images(tmp_path)
    monkeypatch.setattr(lab, "images", lambda: made)
    monkeypatch.setattr(lab, "cache_folder", lambda: tmp_path)
    monkeypatch.setitem(sys.modules, "drgn", None)  # whether it is installed or not
    monkeypatch.setitem(sys.modules, "kdumpfile", None)
    return made


def test_all_of_it_runs(images: lab.Images, capsys: pytest.CaptureFixture[str]) -> None:
    """Each work has a row with both times, and each form that exists one for its opening."""
    for tool in TOOLS:
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    sources.main(["--json", "--rounds", "1"])
    rows = json.loads(capsys.readouterr().out)
    works = [row["work"] for row in rows]
    assert all(f"/ {tool}" in " ".join(works) for tool in TOOLS)
    assert all(row["ours"]["wall"] > 0 and row["peer"]["wall"] > 0 for row in rows[:-5])
    forms = ["plain.elf", "guest.raw", "guest.migration", "xl-dump-core", "xl-save"]
    assert [row["source"] for row in rows[-5:]] == forms
    assert not list(images.folder.glob("tmp*"))


def test_only_some_rows(images: lab.Images, capsys: pytest.CaptureFixture[str]) -> None:
    """With --only, for those who change one of them; the table shows limits and verdicts."""
    sources.main(["--only", "open", "--rounds", "1"])
    shown = capsys.readouterr()
    assert "plain.elf" in shown.out
    assert "5 ms or 2 x" in shown.out
    assert "grep" not in shown.out
    assert "guest.migration: " in shown.err


def test_the_page_is_rewritten(
    images: lab.Images, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With --write the machine and the table go between their markers."""
    page = images.folder / "page.md"
    names = ("machine", "commands")
    page.write_text("\n".join("\n".join(markers(name, sources.COMMAND)) for name in names))
    monkeypatch.setattr(sources, "PAGE", page)
    sources.main(["--only", "open", "--rounds", "1", "--write"])
    assert "| plain.elf |" in page.read_text()
    assert "; load average" in page.read_text()


def test_the_documentation_has_the_markers() -> None:
    """The page that --write rewrites has a place for both."""
    if not report.PAGE.is_file():
        pytest.skip(f"no file {report.PAGE}")
    text = report.PAGE.read_text(encoding="utf-8")
    for name in ("machine", "commands"):
        begin, end = markers(name, sources.COMMAND)
        assert text.index(begin) < text.index(end)


def test_a_tool_that_is_missing_is_named(
    images: lab.Images, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its row is left out."""
    monkeypatch.setenv("PATH", str(images.folder))
    assert sources.main(["--json", "--only", "cmp", "--rounds", "1"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out) == []
    assert "diff / cmp: cmp is not installed" in shown.err


def test_a_peer_that_opens_a_form_is_named(
    images: lab.Images, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first that can: drgn, libkdumpfile, or drgn until it misses the architecture."""

    class Program:
        def set_core_dump(self, path: Path) -> None:
            if path.name != "plain.elf":
                raise ValueError("kdump_get_string_attr(KDUMP_ATTR_ARCH_NAME): Key has no value")

    class Context:
        def open(self, path: str) -> None:
            if not path.endswith("xl-save"):
                raise NotImplementedError

    monkeypatch.setitem(sys.modules, "drgn", SimpleNamespace(Program=Program))
    monkeypatch.setitem(sys.modules, "kdumpfile", SimpleNamespace(Context=Context))
    sources.main(["--json", "--only", "open", "--rounds", "1"])
    works = {row["source"]: row["work"] for row in json.loads(capsys.readouterr().out)}
    assert works["plain.elf"] == "open / drgn"
    assert works["xl-save"] == "open / kdumpfile"
    assert works["xl-dump-core"] == "open / libkdumpfile in drgn"


def test_limits_and_floors() -> None:
    """A ratio over the limit is marked, unless ours stays below what it may take in any case."""
    row = Row("open", "a", Times(0.004, 0.003), Times(0.001, 0.003), 2.0)
    assert not row.kept()
    assert row.kept(cpu=True)
    assert row.cells()[-1] == "OVER"
    assert row._replace(floor=0.005).cells()[4:] == ("4.00 x", "1.00 x", "5 ms or 2 x", "")
    alone = row._replace(theirs=None)
    assert math.isnan(alone.ratio())
    assert not alone.kept()
    assert alone._replace(floor=0.005).kept()
    assert alone.to_json()["ratio"] is None


def test_the_best_of_each_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Works take turns, what prepares them is not timed, and the first round does not count."""
    done: list[str] = []
    times = iter([Times(9, 9)] * 2 + [Times(3, 4), Times(5, 6), Times(4, 3), Times(7, 5)])

    def timed(work: sources.Runs) -> Times:
        work()
        return next(times)

    monkeypatch.setattr(sources, "timed", timed)
    works = [lambda: done.append("one"), lambda: done.append("other")]
    assert sources.best(works, 2, lambda: done.append("-")) == [Times(3, 3), Times(5, 5)]
    assert "".join(done) == "-one-other" * 3
    assert Times(5, 1).less(Times(2, 3)) == Times(3, 1e-6)


def test_it_runs_as_a_command() -> None:
    """Its help says what the columns are."""
    command = [sys.executable, "-m", "tests.benchmarks.sources", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "--cpu" in shown
