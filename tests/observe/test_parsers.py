"""The parsers of QEMU's logs: each form, in chunks of any size, damaged, and bounded."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.observe import qemu_logs as logs
from xenmapcache import UnsupportedOperationError
from xenmapcache.events import (
    Accessed,
    BucketMapped,
    BucketReplaced,
    CacheOpened,
    Event,
    Invalidated,
    LeaseHeld,
    MapFailed,
    RequestKey,
    RequestsHandled,
)
from xenmapcache.formats import qemu_log
from xenmapcache.formats.qemu_log import MAX_LINE_BYTES, LogParser
from xenmapcache.formats.qemu_runs import Found, separate
from xenmapcache.formats.qemu_simple import SimpleParser, byte_order

HOST = 0x7F00_0000_0000
MiB = 1 << 20


def parse(data: bytes) -> tuple[list[Event], LogParser]:
    parser = LogParser()
    return list(separate(parser.feed(data) + parser.finish())), parser


def parse_simple(data: bytes, step: int = 1 << 20) -> tuple[list[Event], SimpleParser]:
    parser = SimpleParser(data[:24], "trace-1")
    events: list[Found] = []
    for start in range(0, len(data), step):
        events += parser.feed(data[start : start + step])
    return list(separate(events + parser.finish())), parser


def merged(events: list[Event]) -> tuple[dict[int, int], dict[RequestKey, int], list[Event]]:
    """Return the sum of all batches, and the other events."""
    accesses: dict[int, int] = {}
    requests: dict[RequestKey, int] = {}
    others: list[Event] = []
    for event in events:
        if isinstance(event, Accessed):
            for bucket, count in event.counts.items():
                accesses[bucket] = accesses.get(bucket, 0) + count
        elif isinstance(event, RequestsHandled):
            for key, count in event.counts.items():
                requests[key] = requests.get(key, 0) + count
        else:
            others.append(event)
    return accesses, requests, others


@pytest.mark.parametrize("form", logs.PREFIXES)
def test_each_prefix(form: str) -> None:
    """A miss, hits, an ioreq of each kind and an INVALIDATE; times as far as the form has them."""
    data = logs.text(
        "VNC server running on 127.0.0.1:5900",
        *logs.miss(0x5000),
        *logs.hit(0x5001),
        *logs.hit(0x12345678),
        logs.ioreq(0, 0xCF8),
        logs.ioreq(1, 0xB8123, read=True),
        logs.ioreq(2, 0x10_0000_0010, data=0xC001),
        logs.ioreq(7, 0),
        logs.INVALIDATE,
        prefix=logs.PREFIXES[form],
    )
    events, parser = parse(data)
    accesses, requests, others = merged(events)
    assert accesses == {0: 1, 0x123: 1}
    assert requests == {
        RequestKey(0, False, 0xCF8, None): 1,
        RequestKey(1, True, 0xB8000, None): 1,
        RequestKey(2, False, 0x10_0000_0010, 0xC001): 1,
        RequestKey(7, False, 0, None): 1,
    }
    start = {"plain": None, "pid": 1795888038 * 10**9, "iso": 1753123408 * 10**9}[form]
    at = None if start is None else start + 1000
    last = None if start is None else start + 12000
    duration = None if start is None else 2000
    assert others == [BucketMapped(at, 0, MiB, duration, HOST), Invalidated(last, 1)]
    assert (parser.lines, parser.others, parser.damaged, parser.forms) == (13, 1, 0, {form})
    assert (parser.assembler.first_time, parser.assembler.last_time) == (start, last)
    assert parser.assembler.names["xen_map_cache"] == 3
    assert parser.assembler.names["handle_ioreq"] == 5


def test_older_forms() -> None:
    """QEMU before 2.10 writes 0 without 0x; 2.10 to 8.2 write two messages; glibc writes (nil)."""
    data = logs.text(
        "xen_map_cache want 0", "xen_remap_bucket index 0", "xen_map_cache_return 0x7f0000000000",
        "xen_map_cache want 0", "xen_map_cache_return 0x7f0000000000",
        "xen_map_cache want 0x7000", "xen_map_cache_return (nil)",
        logs.HELD, "Replacing a dummy mapcache entry for 00000000000000a0 with 0000000000000010",
    )  # fmt: skip
    events, parser = parse(data)
    assert events == [
        BucketMapped(None, 0, MiB, None, HOST),
        MapFailed(None, 0x7000),
        Accessed({0: 1}),
        LeaseHeld(None, 0xAF00000, MiB, 0x7FE1CCA01800, 0),
        BucketReplaced(None, 0xA0, 0x10),
    ]
    assert parser.forms == {"plain", "message"}


def test_newer_events() -> None:
    """Those of QEMU 9.0 and later."""
    data = logs.text(
        "xen_map_cache_init nr_buckets = 0x8000 size 0x180000",
        logs.INVALIDATE,
        "xen_invalidate_map_cache Locked DMA mapping while invalidating mapcache 0xaf -> 0x7f12 is"
        " present",
        "xen_replace_cache_entry_dummy Replacing a dummy mapcache entry for 0xa0 with 0x10",
        "xen_invalidate_map_cache_entry_unlocked_not_found could not find 0x7fca4022ca00",
        "xen_invalidate_map_cache_entry_unlocked_found    0xaf -> 0x7f is present",
        "xen_ram_addr_from_mapcache_not_in_cache Trying to find address 0x7f that is not in the "
        "mapcache",
    )
    events, parser = parse(data)
    assert events == [
        CacheOpened(None, 0x8000),
        Invalidated(None, 1),
        LeaseHeld(None, 0xAF00000, MiB, 0x7F12, 1),
        BucketReplaced(None, 0xA0, 0x10),
    ]
    assert (parser.others, parser.damaged) == (0, 0)


def test_buckets_of_other_sizes() -> None:
    """Those of grants are pages; those of a 32-bit host have 64 KiB, from then on."""
    events, _ = parse(logs.text(*logs.miss(0x7654321, shift=12), *logs.miss(0x234567, shift=16)))
    assert events == [
        BucketMapped(None, 0x7654000, 0x1000, None, HOST + 0x7654000),
        BucketMapped(None, 0x230000, 0x10000, None, HOST + 0x230000),
    ]
    moved = logs.text("xen_map_cache want 0x5000", "xen_remap_bucket index 0xf00", logs.hit(0)[1])
    assert parse(moved)[0] == [BucketMapped(None, 0xF0000000, MiB, None, HOST - 0x5000)]


def test_incomplete_accesses() -> None:
    """A retry is one access; a remap alone is a map call; a return alone says nothing."""
    want, remap, back = logs.miss(0x5000)
    assert parse(logs.text(remap))[0] == [BucketMapped(None, 0, MiB, None, None)]
    assert parse(logs.text(back))[0] == []
    retried = parse(logs.text(back, want, want, remap, remap, back, want, *logs.hit(0x7000)))[0]
    assert merged(retried)[0] == {0: 1}
    assert len(merged(retried)[2]) == 2
    assert parse(logs.text(want, remap))[0] == [BucketMapped(None, 0, MiB, None, None)]
    untraced = parse(logs.text(want, want, want))[0]  # xen_map_cache_return is not in the log
    assert merged(untraced)[0] == {0: 3}


def test_configuration_events_count_without_ioreqs() -> None:
    """Where handle_ioreq is traced, they say the same again, as its neighbours do."""
    line = "cpu_ioreq_config_write I/O=0x7ffe sbdf=0x10 reg=16 size=4 data=0xc001"
    key = RequestKey(2, False, 0x10_0000_0010, 0xC001)
    assert merged(parse(logs.text(line, line))[0])[1] == {key: 2}
    port = logs.ioreq(0, 0x70)
    again = port.replace("handle_ioreq", "cpu_ioreq_pio")
    events, parser = parse(logs.text(port, again, line))
    assert merged(events)[1] == {RequestKey(0, False, 0x70, None): 1}
    assert parser.damaged == 0


def test_damaged_lines() -> None:
    """They are counted and shown; a line to which another message was prepended is read."""
    data = logs.text(
        "xen_map_cache want 0xzz",
        "noise xen_remap_bucket index 0x5",
        "noise xen_remap_bucket index",
        "2025-13-41T18:43:28Z xen_remap_bucket index 0x1",
        "handle_ioreq_other x",
        "",
    )
    events, parser = parse(data + b"xen_remap_bucket ind")
    assert [type(event) for event in events] == [BucketMapped, BucketMapped]
    assert (parser.damaged, parser.others) == (3, 1)
    assert parser.examples[0] == "xen_map_cache want 0xzz"
    many, parser = parse(logs.text(*["xen_map_cache want 0xzz"] * 9))
    assert (many, parser.damaged, len(parser.examples)) == ([], 9, 5)


def test_overlong_lines_are_skipped_in_bounded_memory() -> None:
    """What follows the line is read."""
    parser = LogParser()
    for _ in range(4):
        assert parser.feed(b"x" * MAX_LINE_BYTES) == []
        assert len(parser._rest) <= MAX_LINE_BYTES
    assert parser.feed(b"\nxen_remap_bucket index 0x1\n") != []
    assert (parser.damaged, parser.damaged_bytes > MAX_LINE_BYTES) == (1, True)


def test_texts_of_ioreqs_are_kept_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest chooses addresses."""
    monkeypatch.setattr(qemu_log, "_MAX_DECODED", 4)
    parser = LogParser()
    parser.feed(logs.text(*(logs.ioreq(0, port) for port in range(1, 50))))
    assert len(parser._decoded) <= 4
    assert parser.assembler.names["handle_ioreq"] == 49


@pytest.mark.parametrize("mark", ["<", ">"])
@pytest.mark.parametrize("step", [1, 7, 1 << 20])
def test_the_binary_form(mark: str, step: int) -> None:
    """In both byte orders, and in chunks of any size."""
    data = logs.trace(
        ("xen_map_cache_init", 50, (0x8000, 0x180000)),
        ("xen_map_cache", 100, (0x5000,)),
        ("xen_remap_bucket", 200, (0,)),
        ("xen_map_cache_return", 400, (HOST + 0x5000,)),
        ("xen_map_cache", 500, (0x5001,)),
        ("xen_map_cache_return", 600, (HOST + 0x5001,)),
        ("some_other_event", 650, (1, 2, 3)),
        ("handle_ioreq", 700, (1, 0, 1, 0, 0, 0x70, 0, 1, 1)),
        ("handle_ioreq", 800, (1, 8, 0, 0, 0, 0, 0, 0, 4)),
        ("xen_invalidate_map_cache", 900, (0xAF, HOST)),
        mark=mark,
    )
    data += logs.record(0xFFFFFFFFFFFFFFFE, 950, 17, mark=mark)
    assert byte_order(data) == {"<": "little", ">": "big"}[mark]
    events, parser = parse_simple(data, step)
    accesses, requests, others = merged(events)
    assert accesses == {0: 1}
    assert requests == {RequestKey(0, True, 0x70, None): 1}
    assert others == [
        CacheOpened(50, 0x8000),
        BucketMapped(100, 0, MiB, 300, HOST),
        Invalidated(800, 1),
        LeaseHeld(900, 0xAF00000, MiB, HOST, 1),
    ]
    assert (parser.lines, parser.others, parser.dropped, parser.damaged) == (11, 1, 17, 0)
    assert (parser.assembler.first_time, parser.assembler.last_time) == (50, 950)


@pytest.mark.parametrize("version", [0, 2, 3, 5])
def test_other_versions_are_refused(version: int) -> None:
    """The message names what is read."""
    with pytest.raises(UnsupportedOperationError, match=f"version is {version}; only 4 is read"):
        SimpleParser(logs.header(version), "trace-1")


def test_damaged_records_are_skipped() -> None:
    """Reading continues with the next event; the bytes are counted once."""
    good = ("xen_remap_bucket", 5, (3,))
    start = logs.trace(good)
    again = logs.record(logs.NUMBERS["xen_remap_bucket"], 6, 4)
    one = b"\1" + bytes(7)
    for junk in (b"\xff" * 50, bytes(100), logs.mapping(1, "x" * 600), logs.record(99, 1, 1),
                 logs.record(logs.NUMBERS["xen_remap_bucket"], 1), one * 20,
                 logs.mapping(0xFFFFFFFFFFFFFFFE, "dropped")):  # fmt: skip
        for step in (1, 13, 1 << 20):
            events, parser = parse_simple(start + junk + again, step)
            assert [event.start for event in events if isinstance(event, BucketMapped)] == [
                3 * MiB,
                4 * MiB,
            ]
            assert (parser.damaged, parser.damaged_bytes) == (1, len(junk))
    _, parser = parse_simple(start + again[:-3])
    assert (parser.damaged, parser.damaged_bytes, len(parser.examples)) == (1, len(again) - 3, 1)
    _, parser = parse_simple(start + (b"\xff" * 50 + again) * 9)
    assert (parser.damaged, len(parser.examples)) == (9, 5)


@pytest.mark.parametrize("size", [0, 10, 24, 30])
def test_short_traces(size: int) -> None:
    """A file that ends in its header or after it."""
    parser = SimpleParser(logs.header(), "trace-1")
    assert parser.feed(logs.trace()[:size]) + parser.finish() == []


@pytest.mark.parametrize(
    ("name", "lines", "invalidations", "held"),
    [
        ("qemu-10.0-xen-4.20.log.gz", 57474, 253, 3),
        ("qemu-7.2-xen-4.17-boot.log.gz", 25000, 0, 0),
        ("qemu-7.2-xen-4.17.log", 199, 194, 3),
    ],
)
@pytest.mark.parametrize("step", [997, 1 << 20])
def test_real_logs(name: str, lines: int, invalidations: int, held: int, step: int) -> None:
    """Nothing of them is damaged, and the size of chunks changes nothing."""
    import gzip

    path = Path(logs.REAL / name)
    if not path.is_file():
        pytest.skip(f"no file {path.name} next to the checkout")
    data = path.read_bytes()
    data = gzip.decompress(data) if name.endswith(".gz") else data
    parser = LogParser()
    events: list[Found] = []
    for start in range(0, len(data), step):
        events += parser.feed(data[start : start + step])
    accesses, requests, others = merged(list(separate(events + parser.finish())))
    kinds = [type(event) for event in others]
    assert (parser.lines, parser.damaged) == (lines, 0)
    assert (kinds.count(Invalidated), kinds.count(LeaseHeld)) == (invalidations, held)
    names = parser.assembler.names
    assert sum(accesses.values()) + kinds.count(BucketMapped) == names["xen_map_cache"]
    assert sum(requests.values()) + invalidations == names["handle_ioreq"]
