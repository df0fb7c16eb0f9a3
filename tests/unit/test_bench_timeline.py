"""The benchmark of the timeline compares what it says, without a browser here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.benchmarks import timeline


class Browser:
    """Opens pages in no time; says that each took longer than the one before."""

    def __init__(self) -> None:
        self.opened: list[str] = []

    def get(self, address: str) -> None:
        self.opened.append(address.rpartition("/")[2])

    def execute_async_script(self, script: str) -> None:
        assert "dataset.drawn" in script

    def execute_script(self, script: str) -> list[float]:
        assert "first chart" in script
        is_empty = self.opened[-1] == "empty.html"
        return [100, 100] if is_empty else [250 + len(self.opened), 400]


@pytest.mark.parametrize(("limit", "status"), [(4.0, 0), (3.0, 1)])
def test_all_of_it_runs(
    limit: float, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both pages are opened in turn; the ratio decides, and the first round does not count."""
    pytest.importorskip("plotly", reason="plotly is not installed")
    fake = Browser()

    @contextlib.contextmanager
    def browser(_: Path) -> Iterator[Browser]:
        yield fake

    monkeypatch.setattr(timeline, "browser", browser)
    monkeypatch.setattr(timeline, "EVENTS", 50)
    monkeypatch.setattr(timeline, "ROUNDS", 2)
    monkeypatch.setattr(timeline, "LIMIT", limit)
    assert timeline.main() == status
    assert fake.opened == ["run.html", "empty.html"] * 3
    printed = capsys.readouterr().out
    assert "events / empty page: 2.53" in printed
    assert "in sight / empty page: 4.00, at most" in printed
