"""The benchmark of translations works, on a tiny size."""

from __future__ import annotations

from tests.benchmarks.translation import rows


def test_each_row_is_measured() -> None:
    """Three ratios, the first with the limit that is promised; how large they are is not tested."""
    measured = list(rows(4, 2, 1))
    assert measured[0].limit == 10
    assert len(measured) == 3
    assert all(row.figure > 0 for row in measured)
