"""The benchmark of the recorder runs; nothing is timed here."""

from __future__ import annotations

import pytest

from tests.benchmarks import recorder


def test_all_of_it_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Small; whether the limit is kept is not asked here."""
    monkeypatch.setattr(recorder, "pin", lambda: None)
    monkeypatch.setattr(recorder, "TIMES", 5)
    monkeypatch.setattr(recorder, "ROUNDS", 2)
    monkeypatch.setattr(recorder, "DMA_TIMES", 5)
    monkeypatch.setattr(recorder, "DMA_ROUNDS", 2)
    assert recorder.main() in (0, 1)
    printed = capsys.readouterr().out
    assert all(name in printed for name in recorder.EVENTS)
    assert "at most 2.0" in printed
