"""The fast way through QEMU's logs against the slow one: the same events, counts and reports."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.effort import examples
from tests.observe import qemu_logs as logs
from xenmapcache.events import Accessed, BucketMapped, BucketReplaced, Event, Invalidated, LeaseHeld
from xenmapcache.formats.qemu_blocks import FORMS, form_of
from xenmapcache.formats.qemu_log import LogParser
from xenmapcache.formats.qemu_runs import Found, MappedRun, separate
from xenmapcache.observe.qemu import QemuAnalysis
from xenmapcache.observe.remaps import Remaps

MiB = 1 << 20


class SlowParser(LogParser):
    """Parses each line on its own: the reference."""

    def _parse_block(self, text: bytes) -> None:
        self._parse_lines(text)


def parse(parser: LogParser, data: bytes, step: int) -> list[list[Found]]:
    """Return what each chunk has; the last one is the end."""
    chunks = [data[start : start + step] for start in range(0, len(data), step)]
    return [*map(parser.feed, chunks), parser.finish()]


def state(parser: LogParser) -> tuple[object, ...]:
    """Return everything that a parser says of a log."""
    assembler = parser.assembler
    return (
        parser.lines, parser.others, parser.damaged, parser.damaged_bytes, parser.examples,
        parser.forms, assembler.names, assembler.first_time, assembler.last_time,
        assembler._access, assembler._shift,
    )  # fmt: skip


def order(events: list[Event]) -> list[object]:
    """Return events with what is counted in its order, too."""
    return [
        list(event.counts.items()) if isinstance(event, Accessed) else event for event in events
    ]


def check_same(data: bytes, step: int) -> LogParser:
    """Compare both ways, chunk by chunk and in the report. Returns the fast parser."""
    fast, slow = LogParser(), SlowParser()
    fast_found, slow_found = parse(fast, data, step), parse(slow, data, step)
    for mine, theirs in zip(fast_found, slow_found, strict=True):
        assert order(list(separate(mine))) == order(list(separate(theirs)))
    assert state(fast) == state(slow)
    reports = []
    for parser, chunks in ((fast, fast_found), (slow, slow_found)):
        analysis = QemuAnalysis()
        for found in chunks:
            analysis.add(found)
        reports.append(json.dumps(analysis.report(parser), sort_keys=True))
    assert reports[0] == reports[1]
    return fast


HELD_EVENT = (
    "xen_invalidate_map_cache Locked DMA mapping while invalidating mapcache 0x7 -> 0x7f0000701000"
    " is present"
)
ADDRESSES = st.sampled_from([0, 0x10, 0x5000, 0x10_0000, 0x70_5000, 0x70_5008, 0x1_2345_6789])
SHIFTS = st.sampled_from([20, 20, 20, 20, 16, 12])
WHOLE = st.one_of(
    st.builds(logs.hit, ADDRESSES),
    st.builds(logs.hit, ADDRESSES),
    st.builds(lambda address, shift: logs.miss(address, shift=shift), ADDRESSES, SHIFTS),
    st.builds(lambda address: logs.miss(address), ADDRESSES),
    st.builds(
        lambda kind, address, read, data: [logs.ioreq(kind, address, read=read, data=data)],
        st.sampled_from([0, 1, 1, 2, 7, 9]),
        st.sampled_from([0, 0x70, 0xB8123, 0x10_0000_0010, 0xFFFF_FFFF_FFFF_FFFF]),
        st.booleans(),
        st.sampled_from([0, 0xC001]),
    ),
    st.sampled_from([[logs.INVALIDATE], [logs.INVALIDATE] * 3, [logs.HELD], [HELD_EVENT]]),
)
"""Events as QEMU writes them."""

ODD = st.one_of(
    st.sampled_from(
        [
            "VNC server running on 127.0.0.1:5900",
            "",
            "a message about xen_map_cache",
            "xen_map_cache want 0",
            "xen_map_cache want 0x5000",
            "xen_map_cache want 0x12345678123456789",
            "xen_remap_bucket index 0x7",
            "xen_remap_bucket index 0",
            "xen_map_cache_return 0x7f0000000000",
            "xen_map_cache_return 0x7f0000000000\r",
            "xen_map_cache_return 0x0",
            "xen_map_cache_return (nil)",
            "xen_map_cache_return 0x00000000000000005",
            "xen_map_cache_init nr_buckets = 0x8000 size 0x180000",
            "xen_replace_cache_entry_dummy Replacing a dummy mapcache entry for 0xa0 with 0x10",
            "Replacing a dummy mapcache entry for 00000000000000a0 with 0000000000000010",
            "cpu_ioreq_config_write I/O=0x7ffe sbdf=0x10 reg=16 size=4 data=0xc001",
            "cpu_ioreq_pio I/O=0x7ffe pio dir=0 df=0 ptr=0 port=0x70 data=0x0 count=1 size=1",
            "handle_ioreq I/O=0x7ffe type=0 dir=0 df=0 ptr=0 port=0x70 count=1 size=1",
            logs.ioreq(0, 0x12345678123456789),
            logs.ioreq(2, 0x10).replace(" count", " data=0x2 count"),
            "handle_ioreq I/O=0x7ffe type=1 dir=0 df=0 ptr=0 port=0x1 data=0x1 count=1 size=1",
            "handle_ioreq I/O=0x7ffe type=0x8 dir=0 df=0 ptr=0 port=0x0 data=0x0 count=0 size=4",
            f"noise {logs.HELD}",
            f"{logs.HELD} noise",
            f"noise {logs.INVALIDATE}",
            HELD_EVENT.replace("0x7f0000701000", "(nil)"),
        ]
    ),
    st.builds(lambda line, end: line[:end], st.sampled_from([logs.INVALIDATE, HELD_EVENT]),
              st.integers(0, 90)),
)  # fmt: skip
"""Lines that are damaged, old, or of other programs."""

FORM_NAMES = st.sampled_from([*logs.PREFIXES, *["pid"] * 3, "iso-odd"])


@st.composite
def logs_of_qemu(draw: st.DrawFn) -> bytes:
    """Draw a log: mostly of one prefix, and mostly of complete events."""
    prefixes = {**logs.PREFIXES, "iso-odd": "2025-13-41T18:43:28.{:06}Z "}
    main = draw(FORM_NAMES)
    data = bytearray()
    clock = draw(st.sampled_from([0, 999_990]))
    for odd, lines, form in draw(
        st.lists(st.tuples(st.integers(0, 5), WHOLE, FORM_NAMES), max_size=25)
    ):
        group = lines if odd else [draw(ODD)]
        prefix = prefixes[form if odd == 1 else main]
        for line in group:
            clock = (clock + draw(st.sampled_from([1, 1, 7, 150_000]))) % 1_000_000
            data += f"{prefix.format(clock)}{line}\n".encode()
    for place, junk in draw(
        st.lists(st.tuples(st.integers(0, 1500), st.binary(max_size=3)), max_size=3)
    ):
        data[place : place + 1] = junk
    return bytes(data)


@settings(max_examples=examples(100), deadline=None)
@given(logs_of_qemu(), st.integers(20, 2000))
def test_both_ways_are_the_same(data: bytes, step: int) -> None:
    """Whatever the log has, in chunks of any size."""
    check_same(data, step)
    check_same(data, 1 << 20)


WANT, REMAP, BACK = logs.miss(0x70_5000)
PORT = logs.ioreq(0, 0x70)
DAMAGED = {
    "hit-ends-late": [WANT, f"{BACK} x"],
    "miss-ends-late": [WANT, REMAP, f"{BACK}\r"],
    "address-too-long": [f"{WANT}0000000000000000", BACK],
    "host-0": [WANT, REMAP, "xen_map_cache_return 0x0"],
    "port-without-data": [PORT.replace("data=0x0 ", "")],
    "port-too-long": [logs.ioreq(0, 0x12345678123456789)],
    "configuration-with-two-data": [logs.ioreq(2, 0x10).replace(" count", " data=0x2 count")],
    "page-with-too-few-digits": [logs.ioreq(1, 0x12)],
    "invalidate-ends-late": [f"{logs.INVALIDATE} x"],
    "message-ends-late": [f"{logs.HELD} x"],
    "event-ends-late": [f"{HELD_EVENT} x"],
}


@pytest.mark.parametrize("lines", DAMAGED.values(), ids=DAMAGED)
def test_lines_that_are_nearly_frequent_events(lines: list[str]) -> None:
    """What the parser of lines takes for damaged is not taken in bulk."""
    check_same(logs.text(*lines, *logs.hit(0x5000), PORT, logs.INVALIDATE, *lines), 1 << 20)


@pytest.mark.parametrize("lines", [[PORT], [logs.INVALIDATE], [BACK, WANT], [WANT, BACK]])
def test_each_event_shows_the_form(lines: list[str]) -> None:
    """Also alone in a log."""
    parser = check_same(logs.text(*lines, prefix=logs.PREFIXES["pid"]), 1 << 20)
    assert parser.forms == {"pid"}


@pytest.mark.parametrize("form", logs.PREFIXES)
def test_the_frequent_events_are_found_in_bulk(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one of their lines is parsed on its own, whatever the prefix."""
    lines = [
        *logs.hit(0x5000), *logs.miss(0x5000), *logs.miss(0x70_5000), logs.ioreq(1, 0xB8123),
        logs.INVALIDATE, HELD_EVENT, *logs.miss(0x5000), logs.INVALIDATE, logs.INVALIDATE,
    ]  # fmt: skip
    data = logs.text("VNC server running", *lines * 3, prefix=logs.PREFIXES[form])

    def refuse(_: LogParser, line: bytes) -> None:
        raise AssertionError(line)

    slow = SlowParser()
    expected = list(separate(slow.feed(data)))
    monkeypatch.setattr(LogParser, "_parse_line", refuse)
    parser = LogParser()
    found = parser.feed(data)
    assert list(separate(found)) == expected
    assert sum(isinstance(each, MappedRun) for each in found) == 6
    assert (parser.forms, parser.others) == ({form}, 1)


def test_messages_are_found_in_bulk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of QEMU 2.10 to 8.2, and lines of other programs."""
    monkeypatch.delattr(LogParser, "_parse_line")
    parser = LogParser()
    found = parser.feed(logs.text("another line", logs.HELD, logs.HELD, "another line"))
    assert list(separate(found)) == [LeaseHeld(None, 0xAF00000, MiB, 0x7FE1CCA01800, 0)] * 2
    assert (parser.forms, parser.others) == ({"message"}, 2)


@pytest.mark.parametrize("step", [64, 1 << 20])
def test_buckets_change_their_size_amid_a_block(step: int) -> None:
    """An access without its end, of another size, comes between equal ones."""
    odd = ["xen_map_cache want 0x705000", "xen_remap_bucket index 0x70"]
    lines = [*logs.miss(0x705000), *odd, *logs.miss(0x5000), logs.INVALIDATE, *logs.miss(0x5000)]
    check_same(logs.text(*lines), step)


def test_notices_of_all_kinds_follow_each_other() -> None:
    """Each keeps its place, with and without another line between them."""
    other = "another line"
    lines = [HELD_EVENT, logs.INVALIDATE, HELD_EVENT, HELD_EVENT, logs.HELD, logs.INVALIDATE, other]
    data = logs.text(*lines, *lines[::-1], *logs.hit(0), *lines)
    parser = check_same(data, 1 << 20)
    assert parser.assembler.names["xen_invalidate_map_cache"] == 9


def test_form_of() -> None:
    """The most frequent form of four places counts; a text without events has the plain one."""
    event = logs.hit(0x5000)[0]
    other = logs.text(event, prefix=logs.PREFIXES["iso"])
    many = logs.text(*[event] * 50, prefix=logs.PREFIXES["pid"])
    assert form_of(b"\n" + other + many) is FORMS["pid"]
    assert form_of(b"\n" + other) is FORMS["iso"]
    assert form_of(b"\n" + logs.text(event)) is FORMS["plain"]
    assert form_of(b"\nnothing\n") is FORMS["plain"]


def test_configuration_before_the_first_ioreq_counts() -> None:
    """In one chunk as line by line: handle_ioreq was switched on in between."""
    line = "cpu_ioreq_config_write I/O=0x7ffe sbdf=0x10 reg=16 size=4 data=0xc001"
    parser = check_same(logs.text(line, logs.ioreq(0, 0x70), line), 1 << 20)
    assert parser.assembler.names["cpu_ioreq_config_write"] == 2


def test_an_access_before_a_run_ends() -> None:
    """Its bucket stays a map call, and a retry does not count as a second access."""
    want, remap, _ = logs.miss(0x70_5000)
    for lines in ([want, remap], [want], [want, want]):
        check_same(logs.text(*lines, *logs.hit(0x5000), *lines, *logs.hit(0x5000)), 1 << 20)
    found = LogParser().feed(logs.text(want, remap, *logs.hit(0x5000)))
    assert BucketMapped(None, 7 * MiB, MiB, None, None) in found


def test_an_access_that_maps_is_no_hit() -> None:
    """Hits are counted by bucket."""
    lines = [*logs.miss(0), *logs.miss(7 * MiB), *logs.hit(0x5000), *logs.hit(7 * MiB)]
    mapped, accessed = LogParser().feed(logs.text(*lines, *logs.hit(0x6000)))
    assert isinstance(mapped, MappedRun)
    assert mapped.starts == [0, 7 * MiB]
    assert accessed == Accessed({0: 2, 7: 1})


def test_a_run_keeps_the_time_of_each_map_call() -> None:
    """Where it was set back between two lines, the duration is unknown."""
    want, remap, back = logs.miss(0)
    data = b"".join(
        logs.text(line, prefix=f"1@{time:.6f}:")
        for time, line in ((5, want), (5, remap), (5.25, back), (7, want), (7, remap), (6, back))
    )
    (run,) = LogParser().feed(data)
    assert isinstance(run, MappedRun)
    assert run.times == [5 * 10**9, 7 * 10**9]
    assert run.durations == [250_000_000, None]


RUNS = st.lists(
    st.one_of(st.none(), st.lists(st.integers(0, 6), min_size=1, max_size=12)), max_size=12
)


def test_dummies_of_older_versions_are_found() -> None:
    """Their message has no word in common with trace events, and may stand alone in a chunk."""
    line = "Replacing a dummy mapcache entry for 00000000000000a0 with 0000000000000010"
    assert LogParser().feed(logs.text(line)) == [BucketReplaced(None, 0xA0, 0x10)]


@settings(max_examples=examples(100), deadline=None)
@given(RUNS, st.integers(2, 8), st.integers(1, 4))
def test_runs_are_counted_as_single_calls(
    runs: list[list[int] | None], buckets: int, keys: int
) -> None:
    """Also where buckets are forgotten and counts are folded; None is an INVALIDATE."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("xenmapcache.observe.remaps._MAX_BUCKETS", buckets)
        whole, single = Remaps(), Remaps()
        whole.again._limit = single.again._limit = keys
        for run in runs:
            if run is None:
                whole.invalidate()
                single.invalidate()
                continue
            mapped = MappedRun(range(len(run)), run, 1, [5] * len(run), range(len(run)))
            dropped = whole.add(mapped)
            apart = [
                call
                for at, start in enumerate(run)
                for call in single.add(MappedRun([at], [start], 1, [5], [at]))
            ]
            assert sorted(dropped) == sorted(apart)
            assert list(whole._mapped.items()) == list(single._mapped.items())
            assert len(whole._mapped) <= buckets
            assert whole.after_invalidate == single.after_invalidate
            assert whole.without == single.without
            assert whole.again.counts == single.again.counts
            assert whole.again.total == single.again.total


def test_invalidates_keep_their_place() -> None:
    """Between runs of accesses, with their numbers and times."""
    lines = [*logs.miss(0), logs.INVALIDATE, *logs.miss(0), logs.INVALIDATE]
    found = list(separate(LogParser().feed(logs.text(*lines, prefix=logs.PREFIXES["pid"]))))
    assert [type(event) for event in found] == [BucketMapped, Invalidated] * 2
    assert [event.number for event in found if isinstance(event, Invalidated)] == [1, 2]


def test_a_day_that_the_calendar_lacks_has_no_time() -> None:
    """The other lines of its block keep theirs."""
    times = FORMS["iso"].times([b"1970-02-30T00:00:01.000000Z", b"1970-01-01T00:00:01.000002Z"])
    assert times == [None, 1_000_002_000]
