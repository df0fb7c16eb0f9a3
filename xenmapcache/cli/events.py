"""``xenmapcache events``: the events of recordings, printed, filtered or as a trace."""

from __future__ import annotations

import argparse
import math
import os
from collections import OrderedDict
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Final

from ..address import ADDRESS_LIMIT
from ..escape import printable
from ..events import (
    Accessed,
    BucketDropped,
    BucketMapped,
    BucketReplaced,
    CacheOpened,
    Event,
    EventsLost,
    HoleFault,
    Invalidated,
    LeaseHeld,
    LeaseReleased,
    LeaseTaken,
    MapFailed,
    PagesDirtied,
    Quiesced,
    RequestHandled,
    RequestsHandled,
    ServerOpened,
)
from ..files.atomic import new_file
from ..observe.eventlines import NAMES, encode, name_of
from ..observe.perfetto import TraceWriter
from ..observe.recording import Entry, Recording, read
from .arguments import FILES, add_range, check_output, describe
from .output import print_line, print_note, size
from .sources import usage_errors

_MAX_LEASES: Final = 100_000
_MAX_TEXT, _MAX_FAILURE, _MAX_SOURCE = 18, 12, 200
_BUFFER: Final = 1 << 20
_KINDS: Final = {0: "port", 1: "MMIO", 2: "PCI", 7: "time offset"}
_INVALIDATE: Final = 8


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Give the command's parser its help and its arguments."""
    describe(
        parser,
        "Print the events of recordings, one line each: leases, buckets, INVALIDATE, ioreqs.\n"
        "A recording comes from xenmapcache.record, from any program that runs with\n"
        "XENMAPCACHE_RECORD=PATH, or from qemu-log --record.",
        "  xenmapcache events run.jsonl --event lease_taken --event lease_released\n"
        "  xenmapcache events run.jsonl --owner 'disk*' --from 1.5 --to 2\n"
        "  xenmapcache events run.jsonl --json | jq 'select(.lost > 0)'\n"
        "  xenmapcache events run.jsonl --perfetto trace.json\n"
        "exit status: 0; 1 if nothing was found; 2 for an error",
        json="print the events as lines of JSON",
    )
    action = parser.add_argument("files", nargs="+", metavar="FILE", help="a recording")
    action.complete = FILES  # type: ignore[attr-defined] # shtab's way
    parser.add_argument(
        "--event",
        action="append",
        choices=NAMES,
        metavar="NAME",
        help=f"only events of this kind; may be repeated: {', '.join(NAMES)}",
    )
    parser.add_argument(
        "--owner", metavar="PATTERN", help="only leases of these owners, such as 'disk*'"
    )
    add_range(parser)
    parser.add_argument(
        "--from", dest="since", type=_seconds, metavar="SECONDS", help="only events from then on"
    )
    parser.add_argument(
        "--to", dest="until", type=_seconds, metavar="SECONDS", help="only events before then"
    )
    parser.add_argument(
        "--absolute", action="store_true", help="print the times of day, in UTC, instead of seconds"
    )
    action = parser.add_argument(
        "--perfetto",
        metavar="OUT",
        help="write all events as a trace for ui.perfetto.dev or speedscope; "
        "an existing file is replaced",
    )
    action.complete = FILES  # type: ignore[attr-defined] # shtab's way


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of seconds, such as 1.5")
    return value


def run(options: argparse.Namespace) -> int:
    """Print the events, or write a trace. Returns the exit status."""
    if options.perfetto:
        return _write_trace(options)
    found = False
    for path in options.files:
        recording = read(path)
        with usage_errors():
            if len(options.files) > 1 and not options.json:
                print_line(f"{path}:")
            for line in _printed(recording, options):
                found = True
                print_line(line)
        _note_left_out(recording)
    return 0 if found else 1


def _write_trace(options: argparse.Namespace) -> int:
    check_output(options.perfetto, *options.files)
    with usage_errors(), new_file(options.perfetto) as fd:
        buffer = bytearray()

        def flush() -> None:
            while buffer:
                del buffer[: os.write(fd, buffer)]

        def write(text: str) -> None:
            buffer.extend(text.encode("ascii"))
            if len(buffer) > _BUFFER:
                flush()

        trace = TraceWriter(write)
        for path in options.files:
            recording = read(path)
            trace.add(recording)
            _note_left_out(recording)
        trace.finish()
        flush()
    if trace.left_out:
        print_note(f"{trace.left_out} events are not in the trace, because they have no time")
    return 0


def _note_left_out(recording: Recording) -> None:
    path = os.fsdecode(recording.path)
    if recording.overwritten:
        print_note(f"{path}: earlier events were overwritten; record with a larger limit")
    if recording.left_out:
        print_note(f"{path}: the recorder has left out {recording.left_out} things")
    if recording.unknown:
        print_note(f"{path}: {recording.unknown} events of unknown kinds are skipped")
    if recording.damaged:
        print_note(f"{path}: {recording.damaged} damaged lines are skipped")
        for example in recording.examples:
            print_note(f"{path}: {example}")


def _printed(recording: Recording, options: argparse.Namespace) -> Iterator[str]:
    """Yield the lines of the selected events."""
    chosen = _Filter(options)
    base: int | None = None
    for entry in recording.entries():
        event = entry.event
        time = getattr(event, "time", None)
        if base is None:
            base = recording.headers[0].time if recording.headers else None
            base = time if base is None else base
        seconds = None if time is None or base is None else (time - base) / 1e9
        lease = chosen.lease_of(event)
        if not chosen.matches(event, lease, seconds):
            continue
        if options.json:
            yield encode(event, entry.stream).decode("ascii").rstrip("\n")
        else:
            at = _clock(time) if options.absolute else _relative(seconds)
            yield f"{at} {_text(entry, lease)}"


class _Filter:
    """Which events are printed. It knows the leases that are held, in bounded memory."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._names = options.event and frozenset(options.event)
        self._owner = options.owner
        self._start = options.start
        self._end = ADDRESS_LIMIT if options.length is None else options.start + options.length
        self._by_address = options.start > 0 or options.length is not None
        self._since = -math.inf if options.since is None else options.since
        self._until = math.inf if options.until is None else options.until
        self._by_time = options.since is not None or options.until is not None
        self._held: OrderedDict[int, LeaseTaken] = OrderedDict()

    def lease_of(self, event: Event) -> LeaseTaken | None:
        """Return the lease that an event takes or ends, if that is known."""
        if isinstance(event, LeaseTaken):
            self._held[event.lease] = event
            if len(self._held) > _MAX_LEASES:
                self._held.popitem(last=False)
            return event
        return self._held.pop(event.lease, None) if isinstance(event, LeaseReleased) else None

    def matches(self, event: Event, lease: LeaseTaken | None, seconds: float | None) -> bool:
        """Return whether an event is selected."""
        if self._names and name_of(type(event)) not in self._names:
            return False
        if self._by_time and (seconds is None or not self._since <= seconds < self._until):
            return False
        if self._owner is not None and (lease is None or not fnmatchcase(lease.owner, self._owner)):
            return False
        return not self._by_address or self._overlaps(lease or event)

    def _overlaps(self, event: Event) -> bool:
        if isinstance(event, RequestHandled) and event.kind != 1:
            return False  # a port, or the address of a PCI function
        start = getattr(event, "start", getattr(event, "address", None))
        if start is None:
            return False
        length = getattr(event, "length", getattr(event, "size", 1))
        return bool(start < self._end and self._start < start + max(1, length))


def _relative(seconds: float | None) -> str:
    return f"{seconds:12.6f}" if seconds is not None else " " * 12


def _clock(time: int | None) -> str:
    """Return the time of day of an event, in UTC, to the microsecond."""
    if time is None:
        return " " * 15
    day, nanoseconds = time // 1_000_000_000 % 86400, time % 1_000_000_000
    return f"{day // 3600:02}:{day // 60 % 60:02}:{day % 60:02}.{nanoseconds // 1000:06}"


def _text(entry: Entry, lease: LeaseTaken | None) -> str:
    event = entry.event
    stream = f"[{entry.stream}] " if entry.stream else ""
    details = _release(event, lease) if isinstance(event, LeaseReleased) else _details(event)
    return f"{stream}{name_of(type(event)).replace('_', ' '):15} {details}".rstrip()


def _cut(text: str, limit: int = _MAX_TEXT) -> str:
    text = printable(text)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _duration(nanoseconds: int | None) -> str:
    return "" if nanoseconds is None else f"in {nanoseconds / 1e3:,.0f} us"


def _range(start: int, length: int) -> str:
    return f"{start:#x}+{length:#x}"


def _release(event: LeaseReleased, lease: LeaseTaken | None) -> str:
    parts = [str(event.lease)]
    if lease is not None:
        parts.append(_cut(lease.owner))
        if event.time is not None and lease.time is not None:
            parts.append(f"{(event.time - lease.time) / 1e6:,.3f} ms")
    if event.stale:
        parts.append("STALE")
    if event.copied:
        parts.append(f"copied {event.copied}")
    if event.lost:
        parts.append(f"LOST {event.lost}")
    return " ".join(parts)


def _details(event: Event) -> str:
    """Return what a line says of an event, after its name."""
    match event:
        case LeaseTaken():
            way = event.direction or event.kind
            stale = " STALE" if event.stale else ""
            owner, place = _cut(event.owner), _range(event.start, event.length)
            return f"{event.lease} {owner} {way} {place}{stale}"
        case BucketMapped():
            holes = f", {size(event.holes)} of holes" if event.holes else ""
            return f"{_range(event.start, event.length)} {_duration(event.duration)}{holes}"
        case BucketDropped():
            return f"{_range(event.start, event.length)} {_cut(event.reason)}"
        case Invalidated():
            held = f", DMA held: {len(event.held)}" if event.held else ""
            dropped = "" if event.dropped is None else f", {event.dropped} buckets dropped"
            return f"{event.number}{dropped}{held} {_duration(event.duration)}"
        case HoleFault(_, address) | MapFailed(_, address):
            return f"{address:#x}"
        case PagesDirtied():
            return _range(event.start, event.length)
        case RequestHandled():
            way = "read" if event.is_read else "write"
            vcpu = "buffer" if event.vcpu < 0 else f"vCPU {event.vcpu}"
            kind = _KINDS.get(event.kind, f"type {event.kind}")
            access = f"{way} {kind} {event.address:#x}"
            outcome = (
                f"FAILED: {_cut(event.failure, _MAX_FAILURE)}"
                if event.failure
                else (_duration(event.duration))
            )
            return f"{vcpu} {'INVALIDATE' if event.kind == _INVALIDATE else access} {outcome}"
        case LeaseHeld():
            return f"{_range(event.start, event.length)} host {event.host:#x} in {event.number}"
        case Quiesced():
            return f"{_duration(event.duration)}, {event.failures} failures"
        case CacheOpened():
            return f"{_cut(event.source or '', _MAX_SOURCE)}, up to {event.buckets} buckets"
        case ServerOpened():
            return f"domain {event.domain} {_cut(event.source or '', _MAX_SOURCE)}".rstrip()
        case EventsLost():
            return str(event.lost)
        case Accessed() | RequestsHandled():
            return f"{sum(event.counts.values())} in {len(event.counts)} places"
        case BucketReplaced():
            return f"{event.old:#x} by {event.new:#x}"
    return ""
