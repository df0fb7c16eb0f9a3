"""``xenmapcache qemu-log``: what QEMU's log says about its map cache."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

from ..events import BucketMapped, CacheOpened, Event, Invalidated, LeaseHeld, MapFailed
from ..files.logfile import LogFile
from ..formats.qemu_runs import Found, separate
from ..observe.qemu import START_BYTES, Parser, QemuAnalysis, make_parser
from ..observe.recording import write_recording
from .arguments import FILES, CommandError, describe
from .output import Output, flush, print_json, print_json_line, print_line, progress, size
from .sources import usage_errors

Write: TypeAlias = Callable[[list[Found]], object]

_WAIT_S = 0.5
_ROUND_EVENTS = 20


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Give the command's parser its help and its arguments."""
    describe(
        parser,
        "Show what a log of QEMU says about its map cache: DMA that was held across an\n"
        "INVALIDATE, bursts of INVALIDATEs, hits, buckets that are mapped again and again, and\n"
        "ioreqs. It reads trace events as text or in QEMU's binary form, and the messages of\n"
        "QEMU 2.10 to 8.2; compressed logs too.",
        "  xenmapcache qemu-log /var/log/xen/qemu-dm-web.log\n"
        "  xenmapcache qemu-log --json trace-1234 | jq .files[0].dma_held\n"
        "  xenmapcache qemu-log --follow /var/log/xen/qemu-dm-web.log\n"
        "exit status: 0, 2 for an error",
        tables=True,
        json="print one JSON object; with --follow, one object for each line",
    )
    action = parser.add_argument("files", nargs="+", metavar="FILE", help="a log, or trace-PID")
    action.complete = FILES  # type: ignore[attr-defined] # shtab's way
    parser.add_argument(
        "-f",
        "--follow",
        action="store_true",
        help="print what is appended to one log, until Ctrl-C; then the report",
    )
    action = parser.add_argument(
        "--record",
        metavar="OUT",
        help="write the events of one log as a recording as well; see xenmapcache events",
    )
    action.complete = FILES  # type: ignore[attr-defined] # shtab's way


def run(options: argparse.Namespace) -> int:
    """Print a report of each log. Returns the exit status."""
    output = None if options.json else Output()
    if options.follow:
        return _follow(options, output)
    reports = []
    if options.record and len(options.files) > 1:
        raise CommandError("--record reads one log; start one command for each log")
    for path in options.files:
        with usage_errors(), LogFile(path) as log, _recording(options.record, path) as write:
            reader = _Reader(write)
            with progress(f"reading {path}") as report:
                for data in log.chunks():
                    reader.read(data, path)
                    report(log.offset, log.size)
            reports.append(reader.report(log))
        if output is not None:
            _print_report(output, reports.pop())
    if output is None:
        print_json({"files": reports})
    return 0


@contextlib.contextmanager
def _recording(path: str | None, log: str) -> Iterator[Write]:
    """Return a function that writes events to a recording; without a path it does nothing."""
    if path is None:
        yield lambda _: None
        return
    with write_recording(path, log) as recording:
        yield lambda found: recording.write(separate(found))


class _Reader:
    """Analyses a log, chunk by chunk, once its form is known."""

    def __init__(self, write: Write) -> None:
        self.analysis = QemuAnalysis()
        self._write = write
        self._parser: Parser | None = None
        self._start = b""

    def read(self, data: bytes, path: str) -> list[Found]:
        """Analyse a chunk; return what it has."""
        if self._parser is None:
            self._start += data
            if len(self._start) < START_BYTES:
                return []
            self._parser, data = make_parser(self._start, path), self._start
        events = self._parser.feed(data)
        self._add(events)
        return events

    def _add(self, events: list[Found]) -> None:
        self.analysis.add(events)
        self._write(events)

    def report(self, log: LogFile) -> dict[str, Any]:
        """Return the report; the log has ended."""
        parser = self._parser
        if parser is None:
            parser = make_parser(b"", log.path)
            self._add(parser.feed(self._start))
        self._add(parser.finish())
        report = self.analysis.report(parser)
        return {"file": log.path, "damage": log.damage or None, **report}


def _follow(options: argparse.Namespace, output: Output | None) -> int:
    if len(options.files) > 1:
        raise CommandError("--follow reads one log; start one command for each log")
    if options.record:
        raise CommandError("--record needs a complete log; leave out --follow")
    path = options.files[0]
    reader = _Reader(lambda _: None)
    log = None
    try:
        with usage_errors():
            log = LogFile(path)
            if log.is_compressed:
                raise CommandError(f"{path} is compressed; --follow reads a log that still grows")
            while True:
                replaced = log.was_replaced()  # asked first: then nothing of the old file is lost
                for data in log.chunks():
                    _print_events(reader.read(data, path), as_json=options.json)
                if replaced:
                    log.close()
                    log = LogFile(path)
                    reader.read(b"\n", path)  # ends a line that was cut off
                    continue
                flush()
                time.sleep(_WAIT_S)
    finally:
        if log is not None:
            log.close()
            report = reader.report(log)
            if output is None:
                print_json_line({"event": "report", **report})
            else:
                _print_report(output, report)


def _print_events(found: list[Found], *, as_json: bool) -> None:
    """Print the rare ones of a chunk's events, and how many were left out."""
    shown: Counter[str] = Counter()
    for event in separate(found):
        name, text = _notable(event)
        if not name:
            continue
        shown[name] += 1
        if shown[name] > _ROUND_EVENTS:
            continue
        if as_json:
            print_json_line({"event": name, **event._asdict()})
        else:
            print_line(text)
    for name, count in shown.items():
        if count > _ROUND_EVENTS and not as_json:
            print_line(f"and {count - _ROUND_EVENTS} more: {name}")
        elif count > _ROUND_EVENTS:
            print_json_line({"event": "left_out", "name": name, "count": count - _ROUND_EVENTS})


def _notable(event: Event) -> tuple[str, str]:
    """Return an event's name and a line about it; empty texts for events of every moment."""
    if isinstance(event, LeaseHeld):
        return "lease_held", (
            f"DMA held across INVALIDATE {event.number or ''}: bucket {event.start:#x}, "
            f"host address {event.host:#x}"
        )
    if isinstance(event, Invalidated):
        return "invalidated", f"INVALIDATE {event.number}"
    if isinstance(event, BucketMapped):
        return "bucket_mapped", f"mapped {event.start:#x}, {size(event.length)}"
    if isinstance(event, MapFailed):
        return "map_failed", f"no memory at {event.address:#x}"
    if isinstance(event, CacheOpened):
        return "cache_opened", f"map cache of {event.buckets} buckets"
    return "", ""


def _print_report(output: Output, report: dict[str, Any]) -> None:
    log = report["log"]
    output.table(("", ""), list(_head(report)))
    start = log["first_time"]
    _print_held(output, report["dma_held"], start)
    _print_invalidations(output, report["invalidations"], start)
    _print_cache(output, report["map_cache"])
    _print_requests(output, report["ioreqs"])
    output.section("What this log cannot tell")
    for hint in report["hints"]:
        output.text(hint)


def _head(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    log = report["log"]
    yield "log", report["file"]
    yield "form", "text" if log["format"] == "text" else "QEMU's binary form"
    yield "lines", f"{log['lines']}, of which {log['other_lines']} are something else"
    yield "damaged", f"{log['damaged']}, {log['damaged_bytes']} bytes"
    for line in log["damaged_examples"]:
        yield "", line
    if report["damage"]:
        yield "file", report["damage"]
    if log["first_time"] is not None:
        yield "time", f"{log['last_time'] - log['first_time']:.3f} s"
    if log["qemu"]:
        yield "QEMU", log["qemu"]
    if log["dropped_by_qemu"]:
        yield "dropped", f"{log['dropped_by_qemu']} events, by QEMU"


def _at(moment: float | None, start: float | None) -> str:
    return "" if moment is None or start is None else f"{moment - start:.3f} s"


def _print_held(output: Output, held: dict[str, Any], start: float | None) -> None:
    output.section("DMA held across an INVALIDATE")
    if not held["entries"]:
        output.text("The log has none.")
        return
    rows = []
    for each in held["entries"]:
        first = each["bucket"]
        bucket = f"{first:#x}..{first + each['bucket_length']:#x}"
        address = "unknown" if each["address"] is None else f"{each['address']:#x}"
        number = each["first_invalidation"]
        rows.append(
            (
                address,
                bucket,
                f"{each['host']:#x}",
                str(each["invalidations"]),
                "" if number is None else str(number),
                _at(each["first_time"], start),
            )
        )
    header = ("address", "in the bucket", "host address", "INVALIDATEs", "first", "at")
    output.table(header, rows)
    _print_more(output, held["leases"] - len(rows), "DMA mappings")
    if held["lines_of_other_leases"]:
        output.text(f"and {held['lines_of_other_leases']} lines of further mappings")


def _print_more(output: Output, count: int, what: str) -> None:
    if count > 0:
        output.text(f"and {count} more {what}")


def _print_invalidations(output: Output, found: dict[str, Any], start: float | None) -> None:
    bursts = found["bursts"]
    output.section(f"INVALIDATE: {found['count']}" + (f" in {bursts} bursts" if bursts else ""))
    if not found["count"]:
        return
    output.text(_cost(found))
    if bursts is None:
        output.text("Without times and accesses, the log does not show where a burst ends.")
        return
    rows = [
        (
            str(each["first"]),
            str(each["count"]),
            _at(each["time"], start),
            _time(each["duration"]),
            str(each["dma_held"]),
            "" if each["mapped_again"] is None else str(each["mapped_again"]),
            _time(each["map_seconds"]),
            _after(each["recovery_seconds"]),
        )
        for each in found["largest"]
    ]
    header = ("first", "count", "at", "lasted", "DMA held", "mapped again", "map time", "last map")
    output.table(header, rows)
    _print_more(output, bursts - len(rows), "bursts")


def _cost(found: dict[str, Any]) -> str:
    """Return a sentence about what all INVALIDATEs cost."""
    calls = found["mapped_again"]
    if calls is None:
        return "Their cost is unknown, because xen_remap_bucket is not in this log."
    mean = f"{calls / found['count']:.1f} for each INVALIDATE"
    seconds = found["map_seconds"]
    spent = "" if seconds is None else f", in {seconds:.3f} s"
    return f"They cost {calls} map calls, {mean}{spent}."


def _after(seconds: float | None) -> str:
    return "" if seconds is None else f"after {seconds:.3f} s"


def _time(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.3f} s"


def _print_cache(output: Output, cache: dict[str, Any]) -> None:
    output.section("Map cache")
    rows = []
    if cache["accesses"] is not None:
        rows.append(("accesses", str(cache["accesses"])))
    if cache["hit_rate"] is not None:
        rows.append(("hits", f"{cache['hits']}, {100 * cache['hit_rate']:.2f} %"))
    if cache["map_calls"] is not None:
        rows.append(("map calls of QEMU", str(cache["map_calls"])))
    if cache["map_calls_of_our_cache"] is not None:
        rows.append(("map calls of xenmapcache", str(cache["map_calls_of_our_cache"])))
    if cache["map_seconds"] is not None:
        longest = cache["longest_map_seconds"]
        rows.append(("time of map calls", f"{cache['map_seconds']:.3f} s, longest {longest:.3f} s"))
    rows.append(("mapped again", f"{cache['mapped_again_after_invalidate']} after an INVALIDATE"))
    rows.append(("", f"{cache['mapped_again_without']} without one"))
    rows.append(("failed", str(cache["failed"])))
    output.table(("", ""), rows)
    again = cache["mapped_again"]
    if again:
        output.table(
            ("bucket", "size", "mapped again"),
            [(f"{each['address']:#x}", size(each["length"]), str(each["times"])) for each in again],
        )
    _print_more(output, cache["other_buckets"], "buckets")


def _print_requests(output: Output, found: dict[str, Any]) -> None:
    output.section(f"ioreqs: {found['count']}, without INVALIDATE")
    if not found["entries"]:
        return
    output.table(
        ("device", "ioreqs"), [(each["device"], str(each["count"])) for each in found["devices"]]
    )
    output.table(
        ("address", "kind", "reads", "writes", "device"),
        [
            (
                f"{each['address']:#x}",
                each["kind"],
                str(each["reads"]),
                str(each["writes"]),
                each["device"] or "unknown",
            )
            for each in found["entries"]
        ],
    )
    if found["other_addresses"]:
        output.text(f"and {found['other_count']} ioreqs of {found['other_addresses']} others")
