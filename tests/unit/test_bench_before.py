"""The comparison with an earlier version works, on tiny sizes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.benchmarks import before, report, steps
from tests.benchmarks.footprint import ROOT
from tests.benchmarks.images import make_images
from xenmapcache.address import MiB

pytestmark = pytest.mark.slow

pytest.importorskip("elftools")


def test_each_work_runs_with_the_package_of_a_tree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tree's own package is what runs: from an empty one nothing is imported."""
    image = make_images(tmp_path, 4 * MiB)["save"]
    monkeypatch.setattr(before, "TIMES", 200)
    times = before.measure(ROOT, image)
    assert list(times) == list(steps.works(""))
    # What is measured is the package, and not another one of its name that soon is gone.
    monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)
    (tmp_path / "xenmapcache").mkdir()
    (tmp_path / "xenmapcache" / "__init__.py").touch()
    with pytest.raises(RuntimeError, match="cannot import name"):
        before.measure(tmp_path, image)


def test_the_best_of_each_tree_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trees take turns, the least time of each counts, and the ratio is to the earlier one."""
    times = iter([4.0, 3.0, 2.0, 5.0])
    asked = []

    def measure(tree: Path, image: Path) -> before.Times:
        asked.append(tree.name)
        return {"read": next(times)}

    monkeypatch.setattr(before, "measure", measure)
    old, new = before.best([Path("old"), Path("new")], Path("image"), 2)
    assert asked == ["old", "new", "old", "new"]
    _, rows = before.table(old, new)
    assert rows == [("read", "", "2,000.00", "3,000.00", "1.50")]


def test_all_of_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command, over the same tree twice and once, rewrites its table."""
    page = tmp_path / "page.md"
    names = ("machine", "before")
    page.write_text("\n".join("\n".join(report.markers(name, before.COMMAND)) for name in names))
    monkeypatch.setattr(before, "PAGE", page)
    monkeypatch.setattr(before, "ROUNDS", 1)
    monkeypatch.setattr(before, "TIMES", 200)
    monkeypatch.setattr(before, "SIZE", 4 * MiB)
    monkeypatch.setattr(before, "pin", lambda: None)
    monkeypatch.setattr(sys, "argv", ["before", str(ROOT), "--write"])
    before.main()
    assert "| map_dma + release |" in page.read_text()


def test_the_documentation_has_its_markers() -> None:
    """The page that ``before --write`` rewrites has a place for each table."""
    if not report.PAGE.is_file():
        pytest.skip(f"no file {report.PAGE}")
    text = report.PAGE.read_text(encoding="utf-8")
    for name in ("machine", "before"):
        begin, end = report.markers(name, before.COMMAND)
        assert text.index(begin) < text.index(end)
