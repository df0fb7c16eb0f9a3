"""The answer of a monitor: what is written is read again, and nothing else is."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.observe.monitor_kit import SNAPSHOT
from xenmapcache.observe import snapshot as module
from xenmapcache.observe.snapshot import Snapshot, SnapshotError


def broken(change: Callable[[dict[str, Any]], object]) -> str:
    """Return the answer with a change."""
    value = json.loads(SNAPSHOT.to_json())
    change(value)
    return json.dumps(value)


def test_what_is_written_is_read() -> None:
    """As text and as bytes; it is one line of ASCII."""
    line = SNAPSHOT.to_json()
    assert line.isascii()
    assert "\n" not in line
    assert Snapshot.from_json(line) == Snapshot.from_json(line.encode()) == SNAPSHOT


def test_the_keys_are_the_protocol() -> None:
    """Other programs read them."""
    value = json.loads(SNAPSHOT.to_json())
    assert list(value) == [
        "version", "pid", "argv", "started_ns", "now_ns", "caches", "servers", "omitted"
    ]  # fmt: skip
    cache, server = value["caches"][0], value["servers"][0]
    assert list(cache) == [
        "name", "domid", "closed", "stats", "leases", "leases_omitted", "incomplete"
    ]  # fmt: skip
    assert list(cache["leases"][0]) == [
        "id", "owner", "kind", "start", "end", "direction", "taken_ns", "stale", "thread", "origin"
    ]  # fmt: skip
    assert cache["stats"]["resident_bytes"] == 0x300000
    assert list(server) == [
        "name", "domid", "requests", "invalidations", "failures", "lost_answers", "current"
    ]  # fmt: skip
    assert list(server["current"][0]) == [
        "vcpu", "kind", "is_read", "address", "size", "since_ns", "region", "calling"
    ]  # fmt: skip


def test_a_newer_process_may_add_keys() -> None:
    """They are ignored."""
    assert Snapshot.from_json(broken(lambda value: value.update(mood="good"))) == SNAPSHOT


def set_lease(key: str, wrong: object) -> Callable[[dict[str, Any]], object]:
    def change(value: dict[str, Any]) -> None:
        value["caches"][0]["leases"][0][key] = wrong

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(version=2), "version 2, and this is a reader of version 1: use the"),
        (lambda v: v.update(version="1"), "answer: version '1' must be a number from 0x0 to"),
        (lambda v: v.pop("pid"), "answer: the key 'pid' is missing"),
        (lambda v: v.update(pid=-1), "answer: pid -0x1 must be a number from 0x0"),
        (lambda v: v.update(pid=1 << 64), "answer: pid 0x10000000000000000 must be a number"),
        (lambda v: v.update(pid=True), "answer: pid True must be a number"),
        (lambda v: v.update(pid=1.0), r"answer: pid 1.0 must be a number"),
        (lambda v: v.update(argv="x" * 1001), "answer: argv 'x+... must be a text of at most 1000"),
        (lambda v: v.update(argv=None), "answer: argv None must be a text"),
        (lambda v: v.update(caches={}), "answer: caches {} must be a list of at most 1000"),
        (lambda v: v.update(caches=[1]), r"answer.caches\[0\]: 0x1 must be an object"),
        (lambda v: v["caches"][0].update(stats=[]), r"answer.caches\[0\].stats: \[\] must be an"),
        (
            lambda v: v["caches"][0]["stats"].pop("maps"),
            r"answer.caches\[0\].stats: the key 'maps' is missing",
        ),
        (lambda v: v["caches"][0].update(closed=0), r"caches\[0\]: closed 0x0 must be true or"),
        (set_lease("end", 0x9FFFF), r"leases\[0\]: end 0x9ffff must be a number from 0xa0000"),
        (set_lease("origin", ["a", 1]), r"leases\[0\]: origin \['a', 1\] must be texts"),
        (set_lease("origin", ["x" * 1001]), r"leases\[0\]: origin .* must be texts of at most"),
        (set_lease("origin", ["x"] * 65), r"leases\[0\]: origin .* must be a list of at most 64"),
        (set_lease("direction", 7), r"leases\[0\]: direction 0x7 must be a text"),
        (lambda v: v.update(error="no idea"), "the monitor reports: no idea"),
    ],
)
def test_wrong_values_are_named(change: Callable[[dict[str, Any]], object], message: str) -> None:
    with pytest.raises(SnapshotError, match=message):
        Snapshot.from_json(broken(change))


@pytest.mark.parametrize("line", ["", "{", "[" * 200_000, b"\xff\xfe\xfd", '{"pid":' + "9" * 5000])
def test_what_is_not_json_is_refused(line: str | bytes) -> None:
    with pytest.raises(SnapshotError, match="the answer is not JSON"):
        Snapshot.from_json(line)


def test_what_is_no_object_is_refused() -> None:
    with pytest.raises(SnapshotError, match=r"answer: \[\] must be an object"):
        Snapshot.from_json("[]")


def test_an_answer_that_is_too_long_is_not_even_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BYTES", 10)
    with pytest.raises(SnapshotError, match="longer than 0xa bytes"):
        Snapshot.from_json("[" * 11)


def test_a_part_that_could_not_be_read() -> None:
    """It is null, and the cache says so."""
    (cache, *_) = SNAPSHOT.caches
    unread = replace(cache, stats=None, leases=(), incomplete=True)
    found = replace(SNAPSHOT, caches=(unread,))
    assert Snapshot.from_json(found.to_json()) == found
