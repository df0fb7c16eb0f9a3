"""Recordings as trace events, checked against the published format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.observe.recordings import EVENTS, OWNER, START, released, taken
from tests.observe.trace_events import Fields, check, phases
from xenmapcache.events import (
    BucketDropped,
    BucketMapped,
    CacheClosed,
    Event,
    EventsLost,
    Invalidated,
    RequestHandled,
)
from xenmapcache.observe import perfetto
from xenmapcache.observe.perfetto import TraceWriter
from xenmapcache.observe.recording import read, write_recording

MiB = 1 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.jsonl"


def trace(path: Path, *streams: list[Event]) -> tuple[list[Fields], TraceWriter]:
    """Record events, and return them as a trace that was checked."""
    with write_recording(path, "a program") as recording:
        for number, events in enumerate(streams):
            recording.write(events, number)
    texts: list[str] = []
    writer = TraceWriter(texts.append)
    writer.add(read(path))
    writer.finish()
    shown = check("".join(texts))
    assert len(shown) == writer.written
    return shown, writer


def of(events: list[Fields], phase: str, name: str = "") -> list[Fields]:
    """Return the events of a phase, and perhaps of a name."""
    return [each for each in events if each["ph"] == phase and name in each["name"]]


def test_every_event(path: Path) -> None:
    """Leases are slices, counts counters, INVALIDATEs instants, ioreqs slices of a vCPU."""
    events, writer = trace(path, [*EVENTS, EventsLost(START, 3)])
    (begin,), (end,) = of(events, "b"), of(events, "e")
    assert (begin["name"], begin["ts"], end["ts"]) == (OWNER, 1, 4)
    assert begin["args"]["start"] == "0x5000"
    assert end["args"] == {"held_ms": 0.003, "stale": True, "copied": 1, "lost": 2}
    assert [each["name"] for each in of(events, "X")] == [
        "write mmio 0xfee00000", "read port 0x3f8", "quiesce",
    ]  # fmt: skip
    assert {each["args"]["name"] for each in of(events, "M", "thread")} == {
        "buffered ioreqs", "vCPU 0", "quiesce",
    }  # fmt: skip
    assert [each["name"] for each in of(events, "i")] == [
        "no page at 0x9000", "no page at 0xa000", "INVALIDATE 1", "server closed",
        "DMA held across INVALIDATE", "3 events lost",
    ]  # fmt: skip
    labels = [each["args"]["labels"] for each in of(events, "M") if "labels" in each["args"]]
    assert labels == ["xen domain 3 (web)", "IoreqServer of domain 3"]
    assert writer.left_out == 3  # two batches, and a count without a time


def test_counters(path: Path) -> None:
    """A bucket that is mapped again counts once; INVALIDATE and the end leave nothing."""
    a, b = (BucketMapped(START, start, MiB, 5, None) for start in (0, MiB))
    drop = BucketDropped(START, 0, MiB, "evicted")
    events, _ = trace(path, [a, b, a, drop, drop, a, Invalidated(START, 1), b, CacheClosed(START)])
    resident = [each["args"]["bytes"] // MiB for each in of(events, "C", "resident")]
    assert resident == [1, 2, 2, 1, 1, 2, 0, 1, 0]
    assert [each["args"]["buckets"] for each in of(events, "C", "buckets")] == resident


def test_leases_without_one_of_their_ends(path: Path) -> None:
    """Each slice is closed: at the end of the recording, or when its number comes again."""
    older = taken(1, at=START - 500)
    untimed = released(2, at=START)._replace(time=None)
    events, _ = trace(path, [taken(2), older, released(5), untimed, taken(2), released(2)])
    assert phases(events) == {"M": 1, "b": 3, "e": 3}
    first = of(events, "b")[1]
    assert (first["ts"], of(events, "e")[2]["args"]) == (0, {"held": "to the end"})
    assert of(events, "e")[0]["args"] == {"end": "unknown"}


def test_streams_are_processes(path: Path) -> None:
    """The leases of two caches have different ids, whatever their numbers are."""
    events, _ = trace(path, [taken(), released()], [taken(), released()])
    assert [each["args"]["name"] for each in of(events, "M")] == ["a program", "a program stream 1"]
    assert [each["pid"] for each in of(events, "b")] == [1, 2]
    assert len({each["id"] for each in of(events, "b")}) == 2


def test_what_a_file_can_choose_is_bounded(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases, buckets, streams and tracks; odd numbers do no harm."""
    for name in ("_MAX_LEASES", "_MAX_BUCKETS", "_MAX_TRACKS"):
        monkeypatch.setattr(perfetto, name, 2)
    requests = [
        RequestHandled(START, vcpu, 99, True, 0, 1, -5) for vcpu in (-(1 << 60), 1, 2, 1 << 60)
    ]
    buckets = [BucketMapped(START, start, MiB, 5, None) for start in range(3)]
    events, writer = trace(
        path, [*map(taken, range(3)), *requests, *buckets], [taken()], [taken(), taken()]
    )
    assert writer.left_out == 4
    assert phases(events) == {"M": 4, "b": 3, "e": 3, "X": 4, "C": 4}


def test_several_recordings(path: Path) -> None:
    """One trace; each recording begins at 0."""
    with write_recording(path, "") as recording:
        recording.write([taken(at=START), released()])
    texts: list[str] = []
    writer = TraceWriter(texts.append)
    for _ in range(2):
        writer.add(read(path))
    writer.finish()
    events = check("".join(texts))
    assert [each["ts"] for each in of(events, "b")] == [0, 0]
    assert [each["args"]["name"] for each in of(events, "M")] == ["cache", "cache"]


def test_an_empty_recording(path: Path) -> None:
    events, _ = trace(path, [])
    assert events == []


@pytest.mark.parametrize(
    "event",
    [
        {"ph": "b", "name": "x", "cat": "c", "id": "1"},
        {"ph": "e", "name": "x", "cat": "c", "id": "1"},
        {"ph": "X", "name": "x", "dur": -1},
        {"ph": "C", "name": "x", "args": {"bytes": "5"}},
        {"ph": "i", "name": "x"},
        {"ph": "M", "name": "comet", "args": {}},
        {"ph": "X", "name": "x", "dur": float("nan")},
    ],
)
def test_the_validator(event: Fields) -> None:
    """It finds what is wrong."""
    text = json.dumps({"traceEvents": [{"pid": 1, "tid": 0, "ts": 0.5, **event}]})
    with pytest.raises((AssertionError, KeyError)):
        check(text)
