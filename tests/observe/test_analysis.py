"""The analysis of QEMU's map cache: what it reports, in bounded memory, and from damaged logs."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.benchmarks.policies import Ours
from tests.effort import examples
from tests.observe import qemu_logs as logs
from xenmapcache.events import BucketMapped, RequestKey, RequestsHandled
from xenmapcache.formats.qemu_log import LogParser
from xenmapcache.formats.qemu_runs import HeldRun, InvalidatedRun, MappedRun
from xenmapcache.observe import bursts, qemu, remaps
from xenmapcache.observe.model import CacheModel
from xenmapcache.observe.platform import Platform
from xenmapcache.observe.qemu import START_BYTES, QemuAnalysis, make_parser
from xenmapcache.observe.tally import Tally

MiB = 1 << 20
HOST = 0x7F00_0000_0000


def report_of(data: bytes, step: int = 1 << 20) -> dict[str, Any]:
    parser, analysis = make_parser(data[:START_BYTES], "log"), QemuAnalysis()
    for start in range(0, len(data), step):
        analysis.add(parser.feed(data[start : start + step]))
    analysis.add(parser.finish())
    return analysis.report(parser)


def at(*moments: tuple[float, str]) -> bytes:
    """Return a log with a time in seconds for each line."""
    return b"".join(logs.text(line, prefix=f"1@{time:.6f}:") for time, line in moments)


def test_held_dma_has_an_address() -> None:
    """If the log shows where the bucket is mapped; otherwise only the bucket is known."""
    held = (
        "xen_invalidate_map_cache Locked DMA mapping while invalidating mapcache 0x{:x} -> "
        "0x{:x} is present"
    )
    found = report_of(
        logs.text(
            *logs.miss(3 * MiB),
            logs.INVALIDATE,
            held.format(3, HOST + 3 * MiB + 0x4000),
            held.format(5, HOST),
            logs.INVALIDATE,
            held.format(3, HOST + 3 * MiB + 0x4000),
        )
    )
    first, second = found["dma_held"]["entries"]
    assert (first["address"], first["invalidations"]) == (3 * MiB + 0x4000, 2)
    assert (second["address"], second["bucket"], second["invalidations"]) == (None, 5 * MiB, 1)
    assert found["log"]["qemu"] == "9.0 or later"
    assert any("DMA without an address" in hint for hint in found["hints"])


def test_messages_show_invalidations_by_repetition() -> None:
    """QEMU 2.10 to 8.2 writes them although nothing is traced."""
    other = logs.HELD.replace("1800", "2000")
    found = report_of(logs.text(logs.HELD, other, logs.HELD, other))
    assert [each["invalidations"] for each in found["dma_held"]["entries"]] == [2, 2]
    assert found["log"]["qemu"] == "2.10 to 8.2"
    remapped = report_of(logs.text(*logs.miss(0), logs.HELD, *logs.miss(0)))["map_cache"]
    assert remapped["mapped_again_after_invalidate"] == 1
    assert not any("invalidate" in hint for hint in found["hints"])


def test_bursts() -> None:
    """INVALIDATEs of less than 0.1 s apart, and which buckets are mapped again after them."""
    want, remap, back = logs.miss(0)
    found = report_of(
        at(
            (1, want), (1.1, remap), (1.25, back),
            (2, logs.INVALIDATE), (2.05, logs.INVALIDATE), (2.5, want), (2.6, remap), (2.75, back),
            (3, logs.INVALIDATE), (4, want), (4, remap), (4.5, back), (4.5, want), (5, remap),
            (5, back),
        )
    )  # fmt: skip
    invalidations = found["invalidations"]
    first, second = invalidations["largest"]
    assert (first["count"], first["mapped_again"], first["map_seconds"]) == (2, 1, 0.25)
    assert first["duration"] == pytest.approx(0.05)
    assert first["mean_interval"] == pytest.approx(0.05)
    assert first["recovery_seconds"] == pytest.approx(0.75)
    assert (second["first"], second["count"], second["mapped_again"]) == (3, 1, 1)
    assert (second["map_seconds"], second["recovery_seconds"]) == (0.5, 1.5)
    assert (second["duration"], second["mean_interval"]) == (0, None)
    assert (invalidations["mapped_again"], invalidations["map_seconds"]) == (2, 0.75)
    cache = found["map_cache"]
    assert (cache["mapped_again_after_invalidate"], cache["mapped_again_without"]) == (2, 1)
    assert (cache["map_calls"], cache["map_calls_of_our_cache"]) == (4, 3)
    assert cache["longest_map_seconds"] == 0.5
    assert found["log"]["qemu"] == "2.6 to 10.0"


def test_bursts_without_times() -> None:
    """An access ends a burst; the map calls that it cost are known, and no time."""
    found = report_of(
        logs.text(
            *logs.miss(0), *logs.miss(MiB), *[logs.INVALIDATE] * 3, *logs.miss(0), *logs.miss(MiB),
            *logs.miss(MiB), logs.INVALIDATE, *logs.hit(0), logs.INVALIDATE,
        )
    )  # fmt: skip
    invalidations = found["invalidations"]
    assert (invalidations["bursts"], invalidations["mapped_again"]) == (3, 2)
    assert [burst["count"] for burst in invalidations["largest"]] == [3, 1, 1]
    assert [burst["mapped_again"] for burst in invalidations["largest"]] == [2, 0, 0]
    for name in ("time", "duration", "mean_interval", "map_seconds", "recovery_seconds"):
        assert {burst[name] for burst in invalidations["largest"]} == {None}
    assert invalidations["map_seconds"] is None
    assert any("how long a burst of INVALIDATEs" in hint for hint in found["hints"])


def test_what_bursts_cost_is_unknown_without_the_events_of_it() -> None:
    """It is not 0; and where nothing separates INVALIDATEs, they are not shown as one burst."""
    untraced = report_of(logs.text(*[logs.INVALIDATE] * 3))["invalidations"]
    assert untraced == {
        "count": 3, "bursts": None, "mapped_again": None, "map_seconds": None, "largest": [],
    }  # fmt: skip
    hits = report_of(logs.text(logs.INVALIDATE, *logs.hit(0), logs.INVALIDATE))["invalidations"]
    assert (hits["bursts"], hits["mapped_again"]) == (2, None)
    assert {burst["mapped_again"] for burst in hits["largest"]} == {None}
    want, remap, back = logs.miss(0)
    some = at((1, want), (1, remap), (1, back), (2, logs.INVALIDATE), (3, remap))
    (burst,) = report_of(some)["invalidations"]["largest"]  # this map call has no return
    assert (burst["mapped_again"], burst["map_seconds"], burst["recovery_seconds"]) == (1, None, 1)


def test_messages_without_ioreqs_have_no_bursts() -> None:
    """A map call after them is one after an INVALIDATE all the same."""
    found = report_of(logs.text(*logs.miss(0), logs.HELD, *logs.miss(0)))
    assert found["map_cache"]["mapped_again_after_invalidate"] == 1
    assert (found["invalidations"]["count"], found["invalidations"]["mapped_again"]) == (0, 0)


def test_a_clock_that_is_set_back_ends_a_burst() -> None:
    """No time is negative."""
    want, remap, back = logs.miss(0)
    found = report_of(
        at((5, want), (5, remap), (5, back), (9, logs.INVALIDATE), (8, logs.INVALIDATE), (7, want),
           (7, remap), (7, back))
    )["invalidations"]  # fmt: skip
    assert found["bursts"] == 2
    assert [burst["recovery_seconds"] for burst in found["largest"]] == [None, None]


def test_the_costliest_bursts_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those with the most map calls, then those with the most DMA."""
    monkeypatch.setattr(bursts, "_SHOWN", 2)
    found = report_of(
        at((1, logs.miss(0)[1]), (2, logs.INVALIDATE), (3, logs.INVALIDATE), (3, logs.HELD),
           (4, logs.INVALIDATE), (4, logs.miss(0)[1]), (5, logs.INVALIDATE), (5, logs.INVALIDATE))
    )["invalidations"]  # fmt: skip
    assert [burst["first"] for burst in found["largest"]] == [2, 3]


def test_only_the_worst_bursts_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of all is still known."""
    monkeypatch.setattr(bursts, "_SHOWN", 2)
    monkeypatch.setattr(bursts, "_KEPT", 4)
    found = report_of(at(*((second, logs.INVALIDATE) for second in range(1, 20))))
    assert len(found["invalidations"]["largest"]) == 2
    assert found["invalidations"]["bursts"] == 19
    several = bursts.Bursts()
    for number in range(1, 20):
        several.add_invalidated(InvalidatedRun([number * 10**9], number))
    assert len(several._worst) <= 5


def test_a_lease_that_comes_again_shows_an_invalidate() -> None:
    """Of a log that has messages only. Its times are those of its first and its last line."""
    analysis = QemuAnalysis()
    held = HeldRun([None], [0], MiB, [5], 0)
    mapped = MappedRun([None], [0], MiB, [None], [None])
    analysis.add([held, mapped, held, mapped, held, mapped])
    found = analysis.report(LogParser())
    assert found["map_cache"]["mapped_again_after_invalidate"] == 2
    timed = QemuAnalysis()
    timed.add([HeldRun([10**9, 2 * 10**9], [0, 0], MiB, [5, 5], 1)])
    (entry,) = timed.report(LogParser())["dma_held"]["entries"]
    assert (entry["first_time"], entry["last_time"], entry["invalidations"]) == (1, 2, 2)


def test_tables_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mappings and buckets beyond the limit are counted."""
    monkeypatch.setattr(qemu, "_MAX_LEASES", 3)
    monkeypatch.setattr(remaps, "_MAX_BUCKETS", 3)
    analysis = QemuAnalysis()
    analysis.add(BucketMapped(None, bucket * MiB, MiB, None, None) for bucket in range(9))
    analysis.add([HeldRun([None] * 18, [0] * 18, MiB, [*range(9)] * 2, 0)])
    assert len(analysis._remaps._mapped) == 3
    assert len(analysis._round) <= 4
    found = analysis.report(LogParser())
    assert (found["dma_held"]["leases"], found["dma_held"]["lines_of_other_leases"]) == (3, 12)


def test_a_new_start_of_qemu_forgets_mappings() -> None:
    """Libxl appends to the log; what was mapped before is not mapped again."""
    start = "xen_map_cache_init nr_buckets = 0x8000 size 0x180000"
    dummy = "xen_replace_cache_entry_dummy Replacing a dummy mapcache entry for 0xa0 with 0x10"
    failed = ["xen_map_cache want 0x7000", "xen_map_cache_return (nil)"]
    data = logs.text(start, *logs.miss(0), start, *logs.miss(0), dummy, *failed, logs.ioreq(9, 1))
    found = report_of(data)
    assert found["log"]["starts"] == 2
    assert found["map_cache"]["mapped_again"] == []
    assert (found["map_cache"]["dummies_replaced"], found["map_cache"]["failed"]) == (1, 1)
    assert found["ioreqs"]["entries"][0]["kind"] == "type 9"


def test_a_log_without_anything() -> None:
    """It says how to get more."""
    found = report_of(b"VNC server running on 127.0.0.1:5900\n")
    assert found["log"]["qemu"] is None
    assert found["map_cache"]["hit_rate"] is None
    assert '"-trace", "xen_map_cache*"' in found["hints"][1]
    assert '"timestamp=on"' in found["hints"][2]
    assert json.loads(json.dumps(found)) == found


def test_versions_that_exclude_each_other() -> None:
    """Two versions of QEMU wrote to one log."""
    new = "2025-07-21T18:43:28Z xen_map_cache want 0x1"
    assert report_of(logs.text(logs.HELD, new))["log"]["qemu"] == "several versions"


def test_the_binary_form_reports_dropped_events() -> None:
    """All counts are too small then."""
    data = logs.trace(("xen_remap_bucket", 5, (3,)))
    found = report_of(data + logs.record(0xFFFFFFFFFFFFFFFE, 9, 4))
    assert found["log"]["qemu"] == "2.8 or later"
    assert any("dropped 4 events" in hint for hint in found["hints"])


def test_devices() -> None:
    """Fixed ports have names; BARs that the guest wrote name a PCI function."""
    platform = Platform()
    for data in (0, 0xFFFFFFFF, 0xC001, 0xF0000008):
        platform.learn(RequestKey(2, False, 0x10_0000_0010, data))
    platform.learn(RequestKey(2, False, 0x10_0000_0004, 0x7))
    platform.learn(RequestKey(0, False, 0x70, None))
    configuration = report_of(
        logs.text(logs.ioreq(2, 0x10_0000_0004), logs.ioreq(2, 0x10_0000_0006))
    )
    assert configuration["ioreqs"]["devices"] == [{"device": "PCI 00:02.0", "count": 2}]
    assert platform.device(0, 0x3C4) == "VGA"
    assert platform.device(1, 0xA0000) == "VGA"
    assert platform.device(2, 0x10_0000_0010) == "PCI 00:02.0"
    assert platform.device(0, 0xC004) == "PCI 00:02.0, BAR at 0xc000"
    assert platform.device(1, 0xF0001000) == "PCI 00:02.0, BAR at 0xf0000000"
    assert platform.device(1, 0xC004) == ""
    assert platform.device(0, 0x999) == ""
    assert platform.device(1, 0xF8000000) == ""


def test_requests_beyond_the_table() -> None:
    """A guest chooses addresses: the largest counts stay, and the sum is right."""
    analysis = QemuAnalysis()
    counts = {RequestKey(1, False, page << 12, None): 1 for page in range(10_000)}
    analysis.add([RequestsHandled({**counts, RequestKey(0, True, 0x70, None): 5})])
    found = analysis.report(LogParser())["ioreqs"]
    assert found["count"] == 10_005
    assert found["entries"][0]["device"] == "clock"
    assert found["other_count"] + sum(x["reads"] + x["writes"] for x in found["entries"]) == 10_005


def test_a_tally_folds_small_counts() -> None:
    """The total stays."""
    tally = Tally[int](2)
    for key in (1, 1, 1, 2, 2, 3, 4, 5):
        tally.add(key)
    top = tally.top(1)
    assert (tally.total, top.entries, top.other_count) == (8, [(1, 3)], 5)
    assert len(tally.counts) == 2
    assert top.other_keys == 4


STEPS = st.lists(st.one_of(st.none(), st.integers(0, 7)), max_size=60)


@settings(max_examples=examples(100), deadline=None)
@given(STEPS)
def test_the_model_counts_what_the_cache_maps(steps: list[int | None]) -> None:
    """Over the mock, with the policy of the benchmark; None is an invalidation."""
    ours = Ours(8 * MiB, max_resident=3 * MiB)
    model = CacheModel(8)
    whole = Ours(8 * MiB)
    for step in steps:
        if step is None:
            model.invalidate()
            whole.cache.invalidate()
        else:
            model.access((step,))
            whole.release(whole.lease(step * MiB, 512))
    assert model.maps == whole.maps
    ours.close()
    whole.close()


def test_the_model_evicts_the_least_recently_used() -> None:
    """Its memory is bounded as a cache's is."""
    model = CacheModel(2)
    model.access((1, 2, 1, 3, 1, 2))
    assert model.maps == 4
    assert len(model._mapped) == 2
    model = CacheModel(3)
    model.access((1, 2, 1))  # all have room: only the last access of each counts
    model.access((3, 4))  # 4 evicts 2
    model.access((1,))
    assert model.maps == 4


GOOD = logs.text(
    *logs.miss(0x5000), *logs.hit(0x5001) * 3, logs.ioreq(0, 0x70), logs.INVALIDATE, logs.HELD
)
TRACE = logs.trace(
    ("xen_map_cache", 100, (0x5000,)),
    ("xen_remap_bucket", 200, (0,)),
    ("xen_map_cache_return", 400, (HOST,)),
    ("handle_ioreq", 800, (1, 8, 0, 0, 0, 0, 0, 0, 4)),
)


@settings(max_examples=examples(100), deadline=None)
@given(
    st.sampled_from([GOOD, TRACE]),
    st.lists(st.tuples(st.integers(24, 600), st.binary(max_size=12)), max_size=8),
    st.integers(1, 400),
)
def test_damaged_logs_are_read(log: bytes, damages: list[tuple[int, bytes]], step: int) -> None:
    """Whatever a log has, there is a report that is JSON; chunks change nothing of the counts."""
    data = bytearray(log)
    for place, junk in damages:
        data[place : place + len(junk)] = junk
    found = report_of(bytes(data), step)
    whole = report_of(bytes(data))
    json.dumps(found)
    assert found["log"]["damaged_bytes"] <= len(data)
    assert found["log"]["lines"] == whole["log"]["lines"]
    assert found["log"]["events"] == whole["log"]["events"]
    assert found["log"]["damaged"] == whole["log"]["damaged"]
