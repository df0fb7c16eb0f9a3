"""The screen of ``xenmapcache top``, printed without a terminal and without a process."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.observe.monitor_kit import LEASES, NOW, SNAPSHOT, STATS, S
from xenmapcache.cli.screen import KEYS, SLOW_NS, screen
from xenmapcache.observe.rates import ORDERS
from xenmapcache.observe.snapshot import CurrentRequest, LeaseState, ServerState, Snapshot

console = pytest.importorskip("rich.console", reason="rich is not installed")

PAGE = Path(__file__).parents[2] / "docs" / "commands.md"
CACHE, CLOSED = SNAPSHOT.caches
(SERVER,) = SNAPSHOT.servers
RED = "\x1b[1;31m"
BEFORE = replace(
    SNAPSHOT,
    now_ns=NOW - 2 * S,
    caches=(replace(CACHE, stats=STATS._replace(maps=2, invalidations=0)), CLOSED),
    servers=(replace(SERVER, requests=7),),
)


def printed(content: object, width: int = 80, *, colour: bool = False) -> list[str]:
    """Return the lines of a screen, without the blanks at their ends unless they have colours."""
    file = io.StringIO()
    options = {"force_terminal": True, "color_system": "standard"} if colour else {}
    console.Console(file=file, width=width, **options).print(content)
    lines = file.getvalue().splitlines()
    return lines if colour else [line.rstrip() for line in lines]


def shown(snapshot: Snapshot = SNAPSHOT, **options: Any) -> list[str]:  # noqa: ANN401 - of screen()
    return printed(screen(None, snapshot, **options))


def one_lease(**values: Any) -> Snapshot:  # noqa: ANN401 - of LeaseState
    lease = replace(LEASES[0], **values)
    return replace(SNAPSHOT, caches=(replace(CACHE, leases=(lease,)),))


def one_request(request: CurrentRequest) -> str:
    server = replace(SERVER, current=(request,))
    lines = shown(replace(SNAPSHOT, servers=(server,)))
    (line,) = (line for line in lines if line.startswith("  now: "))
    return line


def test_the_screen_at_80_columns() -> None:
    """Rates, caches, what the server does now, and the leases, oldest first."""
    assert printed(screen(BEFORE, SNAPSHOT, keys=True)) == [
        "Process 4321, up 1h01m: python3 device.py --disk0",
        "maps/s 2.5  evictions/s 0.0  invalidations/s 1.5  requests/s 5.0",
        "Cache 1: domain 3, 3 MiB in 2 buckets, 3 leases, 1 stale",
        "Cache 2: MapCache of <raw backend> (closed), 3 MiB in 2 buckets, 2 leases",
        "Server of domain 3: 17 requests, 1 failed",
        "  now: vCPU 1 write port 0x1f0 in Disk.write, for 9.000 s",
        "  now: callbacks, for 10.0 s",
        "",
        "CACHE     AGE OWNER    KIND            ADDRESS    SIZE STATE THREAD",
        "    1   1h00m vga      device          0xa0000 128 KiB       MainThread",
        "    1   1m01s disk0    from-device     0x7f000   4 KiB STALE worker-1",
        "    1 0.500 s net      to-device   0x13f00f000   2 KiB       MainThread",
        "2 more leases, not shown",
        "q quit  space refresh  sort by:  a age  o owner  s size  t stale",
    ]


@pytest.mark.skipif(not PAGE.is_file(), reason=f"no file {PAGE}")
def test_the_page_shows_this_screen() -> None:
    """docs/commands.md has it, of the process that the pages of ps and leases show."""
    screen_ = "\n".join(printed(screen(BEFORE, SNAPSHOT, keys=True)))
    page = PAGE.read_text(encoding="utf-8")
    assert f"```console\n# xenmapcache top 4321\n{screen_}\n```\n" in page


def test_rates_that_are_not_known_are_dashes() -> None:
    """As before the second answer. Large ones fit the line."""
    assert shown()[1] == "maps/s -  evictions/s -  invalidations/s -  requests/s -"
    many = STATS._replace(maps=2_469_138, evictions=2_469_136, invalidations=4_000)
    none = STATS._replace(maps=0, evictions=0, invalidations=0)
    after = replace(SNAPSHOT, caches=(replace(CACHE, stats=many),), servers=())
    before = replace(after, now_ns=NOW - 2 * S, caches=(replace(CACHE, stats=none),))
    assert printed(screen(before, after))[1] == (
        "maps/s 1,234,569  evictions/s 1,234,568  invalidations/s 2,000  requests/s -"
    )


@pytest.mark.parametrize("order", ORDERS)
def test_the_order(order: str) -> None:
    """Leases have the order that was asked for, and its key stands out."""
    expected = {
        "age": ["vga", "disk0", "net"],
        "owner": ["disk0", "net", "vga"],
        "size": ["vga", "disk0", "net"],
        "stale": ["disk0", "vga", "net"],
    }[order]
    rows = shown(order=order)[9:12]
    assert re.findall("vga|disk0|net", " ".join(rows)) == expected
    lines = printed(screen(None, SNAPSHOT, order, keys=True), colour=True)
    key = next(key for key, name in KEYS.items() if name == order)
    assert re.findall(r"\x1b\[1m([^\x1b]*)", lines[-1]) == [f"  {key} {order}"]
    assert set(KEYS.values()) == set(ORDERS)


def test_what_is_wrong_is_red() -> None:
    """Stale leases, their number, failures, lost answers, slow requests, and no answer."""
    server = replace(SERVER, lost_answers=2)
    lines = printed(
        screen(None, replace(SNAPSHOT, servers=(server,)), problem="process 4321 is late"),
        colour=True,
    )
    red = [line for line in lines if RED in line]
    assert len(red) == 6
    for line, text in zip(
        red,
        (
            "process 4321 is late",
            ", 1 stale",
            ", 1 failed",
            "now: vCPU 1 write",
            "now: callbacks",
            "STALE",
        ),
        strict=True,
    ):
        assert text in line.partition(RED)[2]
    assert f"{RED}, 2 answers lost" in red[2]
    assert "vga" not in "".join(red)


def test_a_request_is_red_when_it_is_slow() -> None:
    """One that has just begun is not."""
    fast = replace(SERVER.current[0], since_ns=NOW - SLOW_NS)
    server = replace(SERVER, current=(fast,))
    lines = printed(screen(None, replace(SNAPSHOT, servers=(server,))), colour=True)
    (line,) = (line for line in lines if "now:" in line)
    assert RED not in line


def test_text_of_the_process_is_escaped() -> None:
    """A terminal's escape sequences and rich's markup are shown as they are."""
    evil = "[red]\x1b]0;x\x07[/red]:warning:"
    lease = replace(LEASES[0], owner=evil, thread=evil, kind=evil)
    request = replace(SERVER.current[0], calling=evil, kind=evil)
    cache = replace(CACHE, name=evil, domid=None, leases=(lease,))
    snapshot = replace(
        SNAPSHOT,
        argv=evil,
        caches=(cache,),
        servers=(replace(SERVER, current=(request,)),),
    )
    for colour in (False, True):
        text = "\n".join(printed(screen(None, snapshot, problem=evil), width=300, colour=colour))
        assert text.count(r"[red]\x1b]0;x\x07[/red]:warning:") == 8
        assert "\x1b]" not in text
        assert "\x07" not in text


def test_long_texts_are_cut_and_numbers_are_not() -> None:
    """At 80 columns, of the longest values that there are."""
    long = one_lease(
        owner="o" * 1000,
        thread="t" * 1000,
        direction="bidirectional",
        start=(1 << 52) - 0x1000,
        end=1 << 52,
        stale=True,
        taken_ns=NOW - 100_000 * S,
    )
    long = replace(long, argv="a" * 1000, caches=(replace(long.caches[0], name="n" * 1000),) * 2)
    lines = shown(long)
    assert max(map(len, lines)) == 80
    (row, _) = (line for line in lines if "bidirectional" in line)
    for part in ("1d03h", "bidirectional", "0xffffffffff000", "4 KiB", "STALE"):
        assert part in row.split("  ") or f" {part} " in row
    assert "oooo…" in row
    assert lines[0].endswith("a…")


@pytest.mark.parametrize("height", [12, 13, 14, 24])
def test_a_low_terminal(height: int) -> None:
    """The screen has the height at most. Leases without room are counted, the oldest shown."""
    leases = tuple(
        replace(LEASES[0], id=n, taken_ns=NOW - n * S, owner=f"o{n}") for n in range(100)
    )
    snapshot = replace(SNAPSHOT, caches=(replace(CACHE, leases=leases, leases_omitted=7),))
    lines = shown(snapshot, height=height, keys=True)
    rows = [line for line in lines if "MainThread" in line]
    assert len(lines) == (height if rows else height - 1)
    assert len(rows) == height - 10
    assert re.findall(r" (o\d+) ", " ".join(rows[:2])) == ["o99", "o98"]
    assert lines[-2] == f"{107 - len(rows)} more leases, not shown"


def test_no_room_for_a_lease() -> None:
    """Then they are only counted."""
    lines = shown(height=5)
    assert lines[-1] == "5 more leases, not shown"
    assert not [line for line in lines if "OWNER" in line]
    alone = one_lease()
    assert shown(alone, height=5)[-1] == "1 more lease, not shown"


def test_nothing_to_show() -> None:
    """A process without caches says so; what the answer has no room for is counted."""
    assert shown(replace(SNAPSHOT, caches=(), servers=(), omitted=3))[2:] == [
        "No cache is watched.",
        "3 more caches or servers, not shown",
        "",
        "No lease is held.",
    ]


def test_many_caches_and_servers() -> None:
    """The first four of each are shown, and of a server's requests, too."""
    server = replace(SERVER, failures=0, lost_answers=1, current=SERVER.current * 3)
    lines = shown(replace(SNAPSHOT, caches=(CACHE,) * 7, servers=(SERVER,) * 4 + (server,) * 2))
    assert [line[:8] for line in lines[2:6]] == [f"Cache {n}:" for n in (1, 2, 3, 4)]
    assert lines[6] == "3 more caches or servers, not shown"
    assert "2 more servers, not shown" in lines
    lines = shown(replace(SNAPSHOT, servers=(server,)))
    assert "Server of domain 3: 17 requests, 1 answer lost" in lines
    assert len([line for line in lines if line.startswith("  now: ")]) == 4
    assert "  2 more requests" in lines
    assert "  now: nothing" in shown(replace(SNAPSHOT, servers=(replace(SERVER, current=()),)))


def test_a_cache_that_cannot_be_read() -> None:
    """Other threads change it all the time."""
    cache = replace(CACHE, stats=None, incomplete=True, leases=())
    assert shown(replace(SNAPSHOT, caches=(cache,)))[2] == (
        "Cache 1: domain 3, its counters cannot be read, 0 leases, incomplete"
    )


REQUEST = SERVER.current[0]


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        (REQUEST, "vCPU 1 write port 0x1f0 in Disk.write"),
        (
            replace(REQUEST, vcpu=None, is_read=True, kind="mmio", calling=None),
            "buffered read mmio 0x1f0",
        ),
        (
            replace(REQUEST, kind="pci_config", address=0x28 << 32 | 0x3C),
            "vCPU 1 write pci_config 0000:00:05.0 0x3c in Disk.write",
        ),
        (replace(REQUEST, kind="invalidate", calling=None), "vCPU 1 write invalidate"),
        (replace(REQUEST, address=None), "vCPU 1 write port in Disk.write"),
        (replace(REQUEST, is_read=None, kind="callbacks"), "callbacks in Disk.write"),
    ],
)
def test_requests(request_: CurrentRequest, text: str) -> None:
    """Who waits, for which access, and what is called."""
    assert one_request(request_) == f"  now: {text}, for 9.000 s"


def test_each_class_is_shown() -> None:
    """A lease without a direction has its kind, and one cache needs no column of its number."""
    lines = shown(one_lease(kind="window", direction=None))
    assert lines[-2].split() == ["AGE", "OWNER", "KIND", "ADDRESS", "SIZE", "STATE", "THREAD"]
    assert lines[-1].split()[:3] == ["1h00m", "vga", "window"]
    assert isinstance(LEASES[0], LeaseState)
    assert isinstance(SERVER, ServerState)
