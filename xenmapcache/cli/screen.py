"""What ``xenmapcache top`` shows: one screen, made of two snapshots, for rich to print.

It needs neither a terminal nor a process that is watched. Texts of a snapshot are escaped and
become :class:`rich.text.Text`, so neither a terminal nor rich's markup obeys them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from ..escape import printable
from ..ioreq import BUS_OFFSET, bdf_text
from ..observe.rates import rates, sorted_leases
from .output import size
from .processes import age

if TYPE_CHECKING:
    from rich.console import Group, RenderableType
    from rich.table import Table
    from rich.text import Text

    from ..observe.snapshot import CacheState, CurrentRequest, LeaseState, ServerState, Snapshot

KEYS: Final = {"a": "age", "o": "owner", "s": "size", "t": "stale"}
"""Which key sorts by what."""
SLOW_NS: Final = 100_000_000
"""A request that takes longer is red; the alert of the metrics begins there, too."""

_RED, _BOLD, _DIM = "bold red", "bold", "dim"
_MAX_LINES: Final = 4
"""How many caches are shown, how many servers, and how many requests of each server."""
_AROUND_LEASES: Final = 3
"""An empty line, the header, and the line that counts leases without room."""
_MIN_OWNER: Final = 8


def screen(
    previous: Snapshot | None,
    current: Snapshot,
    order: str = "age",
    *,
    height: int | None = None,
    problem: str = "",
    keys: bool = False,
) -> Group:
    """Return a screen.

    Args:
        previous: an earlier snapshot of the process, for rates; None if there is none.
        current: what is shown.
        order: of the leases, one of :data:`.ORDERS`.
        height: how many lines it may have; None: all leases are shown.
        problem: why there is no newer snapshot.
        keys: show what the keys do.
    """
    from rich.console import Group

    above = [_title(current), _speed(previous, current)]
    if problem:
        above.append(_text(problem, _RED))
    above += _caches(current)
    above += _servers(current)
    below = [_keys(order)] if keys else []
    rows = sorted_leases(current, order)
    hidden = sum(cache.leases_omitted for cache in current.caches)
    if height is not None:
        room = max(0, height - len(above) - len(below) - _AROUND_LEASES)
        hidden += len(rows[room:])
        del rows[room:]
    parts: list[RenderableType] = [*above, _text("")]
    if rows:
        parts.append(_table(rows, current))
    if hidden:
        parts.append(_text(f"{_count(hidden, 'more lease')}, not shown", _DIM))
    elif not rows:
        parts.append(_text("No lease is held.", _DIM))
    return Group(*parts, *below)


def _text(text: str, style: str = "") -> Text:
    """Return a line, or a cell, that is cut where there is no room."""
    from rich.text import Text

    return Text(printable(text), style, no_wrap=True, overflow="ellipsis")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _title(current: Snapshot) -> Text:
    up = age(current.now_ns - current.started_ns)
    line = _text("").append_text(_text(f"Process {current.pid}", _BOLD))
    return line.append_text(_text(f", up {up}: {current.argv}"))


def _speed(previous: Snapshot | None, current: Snapshot) -> Text:
    """Return the line of rates; what is not known is a dash."""
    found = None if previous is None else rates(previous, current)
    parts = []
    for name in ("maps", "evictions", "invalidations", "requests"):
        value = getattr(found, name, None)
        shown = "-" if value is None else f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"
        parts.append(f"{name}/s {shown}")
    return _text("  ".join(parts))


def _caches(current: Snapshot) -> Iterator[Text]:
    if not current.caches:
        yield _text("No cache is watched.", _DIM)
    for number, cache in enumerate(current.caches[:_MAX_LINES], 1):
        yield _cache(number, cache)
    hidden = len(current.caches[_MAX_LINES:]) + current.omitted
    if hidden:
        yield _text(f"{hidden} more caches or servers, not shown", _DIM)


def _cache(number: int, cache: CacheState) -> Text:
    name = cache.name if cache.domid is None else f"domain {cache.domid}"
    parts = [f"Cache {number}: {name}{' (closed)' if cache.closed else ''}"]
    if cache.stats is None:
        parts.append("its counters cannot be read")
    else:
        resident, buckets = size(cache.stats.resident_bytes), cache.stats.resident_buckets
        parts.append(f"{resident} in {_count(buckets, 'bucket')}")
    parts.append(_count(len(cache.leases) + cache.leases_omitted, "lease"))
    if cache.incomplete:
        parts.append("incomplete")
    line = _text(", ".join(parts))
    stale = sum(lease.stale for lease in cache.leases)
    return line.append_text(_text(f", {stale} stale", _RED)) if stale else line


def _servers(current: Snapshot) -> Iterator[Text]:
    for server in current.servers[:_MAX_LINES]:
        yield _server(server)
        for request in server.current[:_MAX_LINES]:
            since = current.now_ns - request.since_ns
            text = f"  now: {_request(request)}, for {age(since)}"
            yield _text(text, _RED if since > SLOW_NS else "")
        if not server.current:
            yield _text("  now: nothing", _DIM)
        elif server.current[_MAX_LINES:]:
            yield _text(f"  {_count(len(server.current[_MAX_LINES:]), 'more request')}", _DIM)
    hidden = len(current.servers[_MAX_LINES:])
    if hidden:
        yield _text(f"{_count(hidden, 'more server')}, not shown", _DIM)


def _server(server: ServerState) -> Text:
    line = _text(f"Server of domain {server.domid}: {_count(server.requests, 'request')}")
    if server.failures:
        line.append_text(_text(f", {server.failures} failed", _RED))
    if server.lost_answers:
        line.append_text(_text(f", {_count(server.lost_answers, 'answer')} lost", _RED))
    return line


def _request(request: CurrentRequest) -> str:
    """Return what a server does: who waits, for which access, and what is called."""
    parts = []
    if request.is_read is None:
        parts.append(request.kind)
    else:
        who = "buffered" if request.vcpu is None else f"vCPU {request.vcpu}"
        parts.append(f"{who} {'read' if request.is_read else 'write'} {request.kind}")
        if request.address is not None and request.kind != "invalidate":
            parts.append(_place(request.kind, request.address))
    if request.calling is not None:
        parts.append(f"in {request.calling}")
    return " ".join(parts)


def _place(kind: str, address: int) -> str:
    if kind != "pci_config":
        return f"{address:#x}"
    return f"{bdf_text(address >> BUS_OFFSET)} {address & (1 << BUS_OFFSET) - 1:#x}"


def _table(rows: list[tuple[int, LeaseState]], current: Snapshot) -> Table:
    """Return the leases. Owner and thread are cut where there is no room, and nothing else."""
    from rich.table import Table

    table = Table(
        box=None, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style=_BOLD
    )
    several = len(current.caches) > 1
    if several:
        table.add_column("CACHE", justify="right", no_wrap=True)
    table.add_column("AGE", justify="right", no_wrap=True)
    table.add_column("OWNER", min_width=_MIN_OWNER)
    table.add_column("KIND", no_wrap=True)
    table.add_column("ADDRESS", justify="right", no_wrap=True)
    table.add_column("SIZE", justify="right", no_wrap=True)
    table.add_column("STATE", no_wrap=True)
    table.add_column("THREAD")
    for index, lease in rows:
        cells = [
            age(current.now_ns - lease.taken_ns),
            lease.owner,
            lease.direction or lease.kind,
            f"{lease.start:#x}",
            size(lease.end - lease.start),
            "STALE" if lease.stale else "",
            lease.thread,
        ]
        if several:
            cells.insert(0, str(index + 1))
        table.add_row(*map(_text, cells), style=_RED if lease.stale else None)
    return table


def _keys(order: str) -> Text:
    # A line's own style is that of its parts, too, so this line has none.
    line = _text("").append_text(_text("q quit  space refresh  sort by:", _DIM))
    for key, name in KEYS.items():
        line.append_text(_text(f"  {key} {name}", _BOLD if name == order else _DIM))
    return line
