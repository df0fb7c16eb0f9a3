"""A validator of trace events, written from the published "Trace Event Format"."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any, Final

Fields = dict[str, Any]

NEEDED: Final = {
    "b": {"name", "cat", "id"},
    "e": {"name", "cat", "id"},
    "X": {"name", "tid", "dur"},
    "i": {"name", "s"},
    "C": {"name", "args"},
    "M": {"name", "args"},
}
"""Keys that a phase must have besides ``ph``, ``pid``, ``tid`` and ``ts``."""
METADATA: Final = {
    "process_name": "name",
    "process_labels": "labels",
    "thread_name": "name",
}


def check(text: str) -> list[Fields]:
    """Return the events of a trace that keeps to the format, or raise an AssertionError."""
    trace = json.loads(text, parse_constant=_refuse)
    assert trace.get("displayTimeUnit") in (None, "ms", "ns")
    events: list[Fields] = trace["traceEvents"]
    opened: dict[tuple[str, str, str], float] = {}
    ends: dict[tuple[int, int], float] = {}
    for event in events:
        phase = event["ph"]
        assert NEEDED[phase] | {"pid", "tid", "ts"} <= event.keys(), event
        assert all(type(event[name]) is int and event[name] >= 0 for name in ("pid", "tid"))
        assert _is_time(event["ts"]), event
        assert isinstance(event["name"], str)
        assert isinstance(event.get("args", {}), dict)
        key = event.get("cat", ""), event.get("id", ""), event["name"]
        match phase:
            case "b":
                assert key not in opened, event
                opened[key] = event["ts"]
            case "e":
                assert event["ts"] >= opened.pop(key), event
            case "X":
                assert _is_time(event["dur"]), event
                track = event["pid"], event["tid"]
                assert event["ts"] >= ends.get(track, 0), "slices of a track overlap"
                ends[track] = event["ts"] + event["dur"]
            case "i":
                assert event["s"] in ("g", "p", "t")
            case "C":
                assert event["args"]
                assert all(_is_number(value) for value in event["args"].values())
            case "M":
                assert isinstance(event["args"][METADATA[event["name"]]], str)
    assert not opened, "slices without an end"
    return events


def phases(events: list[Fields]) -> Counter[str]:
    """Return how many events of each phase a trace has."""
    return Counter(event["ph"] for event in events)


def _refuse(name: str) -> float:
    raise AssertionError(f"{name} is not valid in JSON")


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def _is_time(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0
