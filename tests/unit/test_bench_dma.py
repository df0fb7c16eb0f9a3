"""The DMA workload: what is claimed of map calls, with counters; and that the benchmark works."""

from __future__ import annotations

import gc
import sys
from itertools import islice
from pathlib import Path

import pytest

from tests.benchmarks import dma, report
from tests.benchmarks.dma import Guest, depth_table, growth, growth_table, run, workload
from tests.benchmarks.policies import Ours, PerAccess, QemuModel
from xenmapcache.address import PAGE_SIZE, KiB, MiB
from xenmapcache.mapping import live_mappings

pytestmark = pytest.mark.slow

SIZE = 64 * MiB
OPERATIONS = 100 * SIZE // MiB


def test_twenty_times_fewer_map_calls_than_qemus_policy() -> None:
    """At queue depth 1, 100 operations a bucket: one call for each there, a twentieth here."""
    ours = run(Ours(SIZE), SIZE, 1, (OPERATIONS,)).counts[OPERATIONS]
    model = run(QemuModel(SIZE), SIZE, 1, (OPERATIONS,)).counts[OPERATIONS]
    assert model == OPERATIONS
    assert model >= dma.TARGET * ours


@pytest.mark.parametrize("depth", [8, 32])
def test_deeper_queues_map_no_more(depth: int) -> None:
    """With more leases held at once QEMU's policy maps less, and ours as much as before."""
    ours = [run(Ours(SIZE), SIZE, each, (OPERATIONS,)).counts[OPERATIONS] for each in (1, depth)]
    model = run(QemuModel(SIZE), SIZE, depth, (OPERATIONS,)).counts[OPERATIONS]
    assert ours[0] == ours[1]
    assert ours[0] < model < OPERATIONS


def test_our_map_calls_are_buckets_and_what_crosses_their_edges() -> None:
    """Every map call of ours is a bucket's first, or a lease's own over an edge."""
    operations = list(islice(workload(SIZE), OPERATIONS))
    ends = [(address // MiB, (address + length - 1) // MiB) for address, length in operations]
    buckets = {first for first, last in ends if first == last}
    crossing = sum(first != last for first, last in ends)
    counted = run(Ours(SIZE), SIZE, 1, (OPERATIONS,)).counts[OPERATIONS]
    assert counted == len(buckets) + crossing


def test_the_workload_is_what_is_said_of_it() -> None:
    """4 to 64 KiB in whole pages inside the guest, 90 % in the first tenth; the same each time."""
    operations = list(islice(workload(SIZE), 20_000))
    assert operations == list(islice(workload(SIZE), 20_000))
    assert {length for _, length in operations} == set(range(4 * KiB, 65 * KiB, PAGE_SIZE))
    assert all(address >= 0 and address + length <= SIZE for address, length in operations)
    hot = sum(address + length <= SIZE // 10 for address, length in operations)
    assert hot / len(operations) == pytest.approx(0.9, abs=0.01)


def test_the_model_maps_as_qemu_does() -> None:
    """An entry is shared while it is locked, dies with its last lock, and is larger over edges."""
    model = QemuModel(4 * MiB)
    gc.collect()  # what other tests left
    before = live_mappings()
    first, second = model.lease(0, 4 * KiB), model.lease(MiB - 4 * KiB, 4 * KiB)
    assert first is second
    assert model.maps == 1
    over = model.lease(MiB - 4 * KiB, 8 * KiB)
    assert (model.maps, over.mapping.gfn, over.mapping.length) == (2, 0, 2 * MiB)
    model.release(first)
    assert live_mappings() == before + 2
    model.release(second)
    del first, second
    assert live_mappings() == before + 1
    model.release(over)
    del over
    assert live_mappings() == before
    model.release(model.lease(0, 4 * KiB))
    assert model.maps == 3
    model.close()


def test_map_per_access_keeps_nothing() -> None:
    """What an access has mapped is just its pages, and goes with its end."""
    policy = PerAccess(4 * MiB)
    gc.collect()  # what other tests left
    before = live_mappings()
    mapping = policy.lease(MiB - 4 * KiB, 8 * KiB)
    assert (mapping.gfn, mapping.length) == (255, 8 * KiB)
    del mapping
    assert live_mappings() == before
    policy.close()


def test_the_tables_have_what_was_counted() -> None:
    """A row for each guest and depth; of growth, the calls and how many times fewer they are."""
    grown = growth([Guest(SIZE, {}), Guest(SIZE, {"bucket_shift": 22})], (100, 1000))
    _, rows = growth_table(grown)
    assert [row[0] for row in rows] == ["64 MiB", "", "64 MiB, buckets of 4 MiB, all may stay", ""]
    maps = grown["64 MiB"][1000]
    assert rows[0][3] == f"{maps:,}"
    assert rows[1][3] == f"{1000 / maps:.1f} x"
    headings, rows = depth_table([SIZE], [1, 4], 300)
    assert [row[:2] for row in rows] == [("64 MiB", "1"), ("64 MiB", "4")]
    assert rows[0][3:5] == ("300", "300")
    assert len(rows[0]) == len(headings)


def test_all_of_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command, made small, rewrites its tables and draws its chart."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (pip: the extra bench)")
    from tests.benchmarks import chart

    page = tmp_path / "page.md"
    names = ("machine", "operations", "depths")
    page.write_text("\n".join("\n".join(report.markers(name, dma.COMMAND)) for name in names))
    monkeypatch.setattr(chart, "FOLDER", tmp_path)
    monkeypatch.setattr(dma, "PAGE", page)
    monkeypatch.setattr(dma, "GUESTS", (1 / 64, 1 / 16))
    monkeypatch.setattr(dma, "MOST", 2000)
    monkeypatch.setattr(dma, "OPERATIONS", 100)
    monkeypatch.setattr(dma, "pin", lambda: None)
    monkeypatch.setattr(sys, "argv", ["dma", "--write"])
    dma.main()
    assert "| 64 MiB | 32 |" in page.read_text()
    assert "16 MiB" in (tmp_path / "dma.svg").read_text()


def test_the_documentation_has_its_markers() -> None:
    """The page that ``make bench-dma ARGS=--write`` rewrites has a place for each table."""
    if not report.PAGE.is_file():
        pytest.skip(f"no file {report.PAGE}")
    text = report.PAGE.read_text(encoding="utf-8")
    for name in ("machine", "operations", "depths"):
        begin, end = report.markers(name, dma.COMMAND)
        assert text.index(begin) < text.index(end)
