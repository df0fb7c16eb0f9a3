"""How much memory the accounting of a resident bucket takes."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from xenmapcache import Backend, MapCache, open_backend
from xenmapcache.address import KiB

COUNT = 512
"""Buckets: what a dictionary grows by is shared by many of them."""


@pytest.fixture(params=["mock", "raw"])
def source(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Backend]:
    size = COUNT * 64 * KiB
    options: dict[str, object] = {"memory": size}
    if request.param == "raw":
        options = {"path": tmp_path / "guest.raw"}
        with (tmp_path / "guest.raw").open("wb") as file:
            file.truncate(size)
    with open_backend(request.param, **options) as backend:
        yield backend


@pytest.mark.parametrize("rounds", [1, 2], ids=["read once", "hot"])
def test_books_of_a_bucket(source: Backend, rounds: int) -> None:
    """A resident bucket takes at most 1,024 bytes, also if a file is mapped."""
    with MapCache(source, bucket_shift=16) as cache:
        cache.read(COUNT * 64 * KiB - 1, 1)  # what is imported and remembered once
        cache.invalidate()
        tracemalloc.start()
        try:
            for _ in range(rounds):
                for index in range(COUNT):
                    cache.read(index << 16, 1)
            snapshot = tracemalloc.take_snapshot()
        finally:
            tracemalloc.stop()
        resident = cache.stats().resident_buckets
    own = snapshot.filter_traces(
        [tracemalloc.Filter(True, "*/xenmapcache/*"), tracemalloc.Filter(False, "*/mock/*")]
    )
    assert resident == COUNT
    assert sum(trace.size for trace in own.traces) <= COUNT * KiB
