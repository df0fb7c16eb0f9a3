"""The benchmark of a virtio disk's requests works, and both sides do the same."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.benchmarks import disk, report
from tests.benchmarks.disk import CASES, Case, Result, measure, table

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_both_sides_answer_all_requests(case: Case) -> None:
    """Each batch is checked by the driver's side; the times are those of the rounds."""
    result = measure(case, rounds=2, batches=1)
    assert (len(result.kit), len(result.by_hand)) == (2, 2)
    assert min(result.kit + result.by_hand) > 0


def test_the_table_has_a_row_for_each_case() -> None:
    """Microseconds of both, and the ratio of each round."""
    results = dict.fromkeys(CASES, Result([4e-6, 4e-6], [2e-6, 2e-6]))
    headings, rows = table(results)
    assert len(rows) == len(CASES)
    assert rows[0] == ("read, 1 at a time", "4.00 \xb1 0.00", "2.00 \xb1 0.00", "2.00 \xb1 0.00 x")
    assert len(headings) == 4


def test_all_of_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command, made small, prints its table and rewrites it."""
    page = tmp_path / "page.md"
    names = ("machine", "requests")
    page.write_text("\n".join("\n".join(report.markers(name, disk.COMMAND)) for name in names))
    monkeypatch.setattr(disk, "PAGE", page)
    monkeypatch.setattr(disk, "pin", lambda: None)
    monkeypatch.setattr(disk, "measure", lambda _: Result([4e-6, 4e-6], [2e-6, 2e-6]))
    monkeypatch.setattr(sys, "argv", ["disk", "--write"])
    disk.main()
    assert "write, 32 at a time" in capsys.readouterr().out
    assert "| write, 32 at a time |" in page.read_text()
