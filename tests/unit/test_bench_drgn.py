"""The benchmark of drgn's reads works, on an image of some MiB."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.sources import Row, Times
from tests.images import lab, writers
from xenmapcache.address import MiB

pytest.importorskip("drgn", reason="drgn is not installed")

from tests.benchmarks import drgn

pytestmark = pytest.mark.slow


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> lab.Images:
    """A folder like that of the lab, with a core of a hole and 5 MiB."""
    core = writers.elf_core_of([(0, 160), (MiB >> 12, 5 * MiB >> 12)])
    (tmp_path / drgn.SOURCE).write_bytes(core)
    monkeypatch.setattr(drgn, "READS", 100)
    made = lab.Images(tmp_path)
    monkeypatch.setattr(lab, "images", lambda: made)
    return made


def test_all_of_it_runs(images: lab.Images, capsys: pytest.CaptureFixture[str]) -> None:
    """Each size has a row with both times and a limit."""
    rows = list(drgn.rows(images, 1))
    assert [row.limit for row in rows] == [1.0, 1.2, 1.2]
    assert all(row.theirs is not None and row.theirs.wall > 0 < row.ours.wall for row in rows)
    drgn.main(["--rounds", "1"])
    assert capsys.readouterr().out.count("/ drgn") == 3


@pytest.mark.parametrize(("ours", "status"), [(1.0, 0), (2.0, 1)])
def test_the_exit_status(
    images: lab.Images, monkeypatch: pytest.MonkeyPatch, ours: float, status: int
) -> None:
    """It is 1 if a limit is exceeded."""
    row = Row("work", drgn.SOURCE, Times(ours, 1), Times(1, 1), 1.2)
    monkeypatch.setattr(drgn, "rows", lambda *_: [row])
    assert drgn.main([]) == status
    assert drgn.main(["--cpu"]) == 0
