"""The benchmark of windows: its page tables, and that it runs; nothing is timed here."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.benchmarks import window
from xenmapcache import open_cache

pytestmark = pytest.mark.slow


def test_both_walks_find_the_same_frames(tmp_path: Path) -> None:
    """Of a root, one table and 512 of the last level, whose entries are mostly present."""
    pytest.importorskip("numpy")
    path = tmp_path / "tables.raw"
    with path.open("wb") as file:
        file.writelines(window.page_tables(512))
    assert path.stat().st_size == (1 + 1 + 512) * 4096
    with open_cache(f"raw:{path}") as cache:
        count, total = window.walk_with_numpy(cache)
        assert (count, total) == window.walk_with_reads(cache)
        assert 512 * 512 * 0.8 < count < 512 * 512 * 0.95


def test_all_of_it_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Small; whether the limits are kept is not asked here."""
    pytest.importorskip("numpy")
    arguments = ["window", "--size", "4M", "--leaves", "512", "--rounds", "2"]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(window, "pin", lambda: None)
    assert window.main() in (0, 1)
    printed = capsys.readouterr().out
    assert all(form in printed for form in window.FORMS)
    assert "263,168 entries" in printed
