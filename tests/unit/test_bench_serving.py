"""The benchmark of serving runs, and compares what it says it compares."""

from __future__ import annotations

import pytest

from tests.benchmarks import serving


def test_serving_benchmark_runs_end_to_end(capsys: pytest.CaptureFixture[str]) -> None:
    """It serves in a thread and in an event loop, and prints both rates."""
    assert serving.main(20) > 0
    assert "event loop" in capsys.readouterr().out
