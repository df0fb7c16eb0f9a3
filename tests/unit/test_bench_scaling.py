"""The benchmark of cost against size works, on tiny sizes."""

from __future__ import annotations

import gc
import logging
import sys
from pathlib import Path

import pytest

from tests.benchmarks import report, scaling
from tests.benchmarks.scaling import Leased, Resident, by_buckets, by_leases, table
from xenmapcache.mapping import live_mappings

pytestmark = pytest.mark.slow


def test_every_size_has_a_cost() -> None:
    """Each kind of work is measured at each size, and everything is unmapped after."""
    gc.collect()  # what other tests left
    before = live_mappings()
    buckets, leases = by_buckets((2, 5), 2, 10), by_leases((1, 3), 2, 10)
    assert live_mappings() == before
    assert {"hot read", "miss + eviction", "map_dma + release"} <= set(buckets)
    assert {"hot read", "resolve", "replace"} <= set(leases)
    assert {tuple(of_work) for of_work in buckets.values()} == {(2, 5)}
    assert {tuple(of_work) for of_work in leases.values()} == {(1, 3)}


def test_resident_is_what_it_says() -> None:
    """Reads are hits, misses evict one bucket each, and an invalidation drops all of them."""
    case = Resident(5, 7)
    case.invalidate()
    before = case.cache.stats()
    case.random()
    case.dma()
    assert case.cache.stats().maps == before.maps
    case.miss()
    case.miss()
    after = case.cache.stats()
    assert (after.misses - before.misses, after.evictions - before.evictions) == (14, 14)
    case.invalidate()
    assert case.cache.stats().resident_buckets == 5
    case.close()


def test_leased_is_what_it_says() -> None:
    """N DMA leases are held, each pointer lies in one, and the device lease comes back."""
    case = Leased(100, 50)
    assert (case.cache.stats().dma_leases, case.cache.stats().device_leases) == (100, 1)
    assert {case.cache.resolve(pointer) for pointer in case.pointers} <= set(range(1, 200, 2))
    address = case.device.address
    for work in case.works().values():
        work()
    assert case.device.address == address
    case.close()
    assert case.cache.leases() == ()


def test_cost_is_shown_relative_to_the_smallest() -> None:
    """The first size is shown as time, the others as how many times that."""
    headings, rows = table({"read": {10: 1e-6, 100: 2e-6, 1000: 50e-6}}, "buckets")
    assert headings == ("work", "at 10", "100 buckets", "1,000 buckets")
    assert rows == [("read", "1.00 µs", "2.00", "50")]


def test_warnings_of_stale_leases_are_off_for_as_long(caplog: pytest.LogCaptureFixture) -> None:
    """While leases are measured no warning is logged; after that the logger is as before."""
    by_leases((1,), 1, 2)
    assert not caplog.records
    assert not logging.getLogger("xenmapcache").disabled


def test_all_of_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command, made small, rewrites its tables and draws its chart."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (pip: the extra bench)")
    from tests.benchmarks import chart

    page = tmp_path / "page.md"
    names = ("machine", "buckets", "leases")
    page.write_text("\n".join("\n".join(report.markers(name, scaling.COMMAND)) for name in names))
    monkeypatch.setattr(chart, "FOLDER", tmp_path)
    made_small = {"PAGE": page, "BUCKETS": (2, 4), "LEASES": (1, 4), "ROUNDS": 1, "TIMES": 100}
    for name, value in made_small.items():
        monkeypatch.setattr(scaling, name, value)
    monkeypatch.setattr(scaling, "pin", lambda: None)
    monkeypatch.setattr(sys, "argv", ["scaling", "--write"])
    scaling.main()
    assert "| miss + eviction |" in page.read_text()
    assert "resolve" in (tmp_path / "scaling.svg").read_text()


def test_the_documentation_has_its_markers() -> None:
    """The page that ``make bench-scaling ARGS=--write`` rewrites has a place for each table."""
    if not report.PAGE.is_file():
        pytest.skip(f"no file {report.PAGE}")
    text = report.PAGE.read_text(encoding="utf-8")
    for name in ("machine", "buckets", "leases"):
        begin, end = report.markers(name, scaling.COMMAND)
        assert text.index(begin) < text.index(end)
