"""The analysis of QEMU's map cache: what its trace events say about DMA, INVALIDATE and ioreqs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from heapq import nsmallest
from typing import Any, Final, Protocol

from ..events import (
    Accessed,
    BucketMapped,
    BucketReplaced,
    CacheOpened,
    LeaseHeld,
    MapFailed,
    RequestKey,
    RequestsHandled,
)
from ..formats.qemu_events import MIB_SHIFT, Assembler
from ..formats.qemu_log import LogParser
from ..formats.qemu_runs import Found, HeldRun, InvalidatedRun, MappedRun
from ..formats.qemu_simple import SimpleParser, byte_order
from ..ioreq import BUS_OFFSET, RequestKind
from .bursts import Bursts
from .model import CacheModel
from .platform import Platform
from .remaps import Remaps
from .tally import Tally, Top

START_BYTES: Final = 24
"""How much of a file :func:`make_parser` looks at."""

_SHOWN: Final = 20
_MAX_LEASES: Final = 4096
_KINDS: Final = {
    RequestKind.PORT: "port",
    RequestKind.MMIO: "MMIO",
    RequestKind.PCI_CONFIG: "PCI configuration",
    RequestKind.TIMEOFFSET: "time offset",
}
_VERSIONS: Final = {
    "message": ((2, 10), (8, 2)),
    "pid": ((2, 6), (10, 0)),
    "iso": ((10, 1), None),
    "simple": ((2, 8), None),
    "new": ((9, 0), None),
}
"""Which versions of QEMU write a form of lines, the first and the last one."""
_NEW: Final = ("xen_map_cache_init", "xen_invalidate_map_cache", "xen_replace_cache_entry_dummy")
TRACE_OPTIONS: Final = {
    "xen_map_cache": "-trace xen_map_cache*",
    "xen_remap_bucket": "-trace xen_remap_bucket",
    "xen_invalidate_map_cache": "-trace xen_invalidate_map_cache",
    "handle_ioreq": "-trace handle_ioreq",
}
"""Events, and the arguments for ``device_model_args`` that switch them on."""


class Parser(Protocol):
    """What the parsers of both forms have; :class:`.LogParser` explains the attributes."""

    format: str
    assembler: Assembler
    lines: int
    others: int
    damaged: int
    damaged_bytes: int
    dropped: int
    examples: list[str]
    forms: set[str]

    def feed(self, data: bytes) -> list[Found]:
        """Return the events that are complete now."""

    def finish(self) -> list[Found]:
        """Return the events at the end of the file."""


def make_parser(start: bytes, path: str) -> Parser:
    """Return the parser for a file that begins with these bytes.

    Raises:
        UnsupportedOperationError: it is a trace file of a version that is not read.
    """
    return SimpleParser(start, path) if byte_order(start) else LogParser()


class _Held:
    """A DMA lease that was held across INVALIDATEs."""

    __slots__ = ("count", "event", "last")

    def __init__(self, event: LeaseHeld) -> None:
        self.event, self.last, self.count = event, event.time, 0


class QemuAnalysis:
    """Takes events, and keeps what a report needs of them, in bounded memory.

    Synchronization: for one thread.
    """

    def __init__(self) -> None:
        self._hits = self._maps = self._failed = 0
        self._timed = self._map_ns = self._max_map_ns = 0
        self._opened = self._replaced = self._requests_total = 0
        self._model = CacheModel()
        self._remaps = Remaps()
        self._bursts = Bursts()
        self._held: dict[tuple[int, int], _Held] = {}
        self._held_total = self._held_lost = 0
        self._round: set[tuple[int, int]] = set()
        self._requests: Tally[tuple[int, int, bool]] = Tally()
        self._platform = Platform()
        self._take: dict[type[Found], Callable[[Any], None]] = {
            MappedRun: self._take_mapped,
            BucketMapped: self._take_single,
            Accessed: self._take_accessed,
            InvalidatedRun: self._take_invalidated,
            HeldRun: self._take_held,
            RequestsHandled: self._take_handled,
            CacheOpened: self._take_opened,
            BucketReplaced: self._take_replaced,
            MapFailed: self._take_failed,
        }

    def add(self, events: Iterable[Found]) -> None:
        """Take what a parser found, in its order."""
        for event in events:
            self._take[type(event)](event)

    def _take_accessed(self, event: Accessed) -> None:
        self._bursts.add_access()
        self._hits += sum(event.counts.values())
        self._model.access(event.counts)

    def _take_single(self, event: BucketMapped) -> None:
        time, start, length, duration, host, _ = event
        self._take_mapped(MappedRun((time,), (start,), length, (duration,), (host,)))

    def _take_opened(self, _: CacheOpened) -> None:
        self._opened += 1
        self._remaps.restart()
        self._model.invalidate()

    def _take_replaced(self, _: BucketReplaced) -> None:
        self._replaced += 1

    def _take_failed(self, _: MapFailed) -> None:
        self._failed += 1

    def _take_mapped(self, run: MappedRun) -> None:
        self._maps += len(run.starts)
        self._bursts.add_access()
        self._model.access([start >> MIB_SHIFT for start in run.starts])
        durations = [duration for duration in run.durations if duration is not None]
        if durations:
            self._timed += len(durations)
            self._map_ns += sum(durations)
            self._max_map_ns = max(self._max_map_ns, *durations)
        self._bursts.add_mapped_again(self._remaps.add(run))

    def _take_invalidated(self, run: InvalidatedRun) -> None:
        self._bursts.add_invalidated(run)
        self._invalidate()

    def _invalidate(self) -> None:
        self._remaps.invalidate()
        self._model.invalidate()

    def _take_held(self, run: HeldRun) -> None:
        keys = list(zip(run.starts, run.hosts, strict=True))
        self._held_total += len(keys)
        if not run.number:
            self._note_rounds(keys)
        self._bursts.add_held(len(keys))
        first = dict(zip(reversed(keys), reversed(run.times), strict=True))
        last = dict(zip(keys, run.times, strict=True))
        for key, count in Counter(keys).items():
            held = self._held.get(key)
            if held is None:
                if len(self._held) >= _MAX_LEASES:
                    self._held_lost += count
                    continue
                start, host = key
                event = LeaseHeld(first[key], start, run.length, host, run.number)
                held = self._held[key] = _Held(event)
            held.count += count
            held.last = last[key]

    def _note_rounds(self, keys: list[tuple[int, int]]) -> None:
        """Find INVALIDATEs that are not in the log: a lease that comes again shows one."""
        seen = self._round
        is_new = not seen
        for key in keys:
            if key in seen or len(seen) > _MAX_LEASES:
                seen.clear()
                is_new = True
            seen.add(key)
        if is_new:  # no access is between them, so several are as one
            self._invalidate()

    def _take_handled(self, event: RequestsHandled) -> None:
        for key, count in event.counts.items():
            self._take_requests(key, count)

    def _take_requests(self, key: RequestKey, count: int) -> None:
        self._requests_total += count
        self._platform.learn(key)
        address = key.address
        if key.kind == RequestKind.PCI_CONFIG:
            address = address >> BUS_OFFSET << BUS_OFFSET
        self._requests.add((key.kind, address, key.is_read), count)

    def report(self, parser: Parser) -> dict[str, Any]:
        """Return everything that was found, for JSON. Addresses are numbers, times seconds.

        Args:
            parser: that the events came from.
        """
        names = {name: count for name, count in parser.assembler.names.items() if count}
        first, last = parser.assembler.first_time, parser.assembler.last_time
        return {
            "log": {
                "format": parser.format,
                "lines": parser.lines,
                "other_lines": parser.others,
                "damaged": parser.damaged,
                "damaged_bytes": parser.damaged_bytes,
                "damaged_examples": parser.examples,
                "dropped_by_qemu": parser.dropped,
                "events": names,
                "first_time": _seconds(first),
                "last_time": _seconds(last),
                "qemu": _qemu_version(parser),
                "starts": self._opened,
            },
            "dma_held": self._report_held(),
            "invalidations": self._bursts.report(
                has_maps="xen_remap_bucket" in names,
                has_ends=first is not None or "xen_map_cache" in names,
            ),
            "map_cache": self._report_cache(names),
            "ioreqs": self._report_requests(),
            "hints": self._hints(parser, names),
        }

    def _report_held(self) -> dict[str, Any]:
        entries = sorted(self._held.values(), key=lambda held: (-held.count, held.event.start))
        return {
            "lines": self._held_total,
            "leases": len(self._held),
            "lines_of_other_leases": self._held_lost,
            "entries": [
                {
                    **self._address_of(held.event),
                    "bucket": held.event.start,
                    "bucket_length": held.event.length,
                    "host": held.event.host,
                    "invalidations": held.count,
                    "first_invalidation": held.event.number or None,
                    "first_time": _seconds(held.event.time),
                    "last_time": _seconds(held.last),
                }
                for held in entries[:_SHOWN]
            ],
        }

    def _address_of(self, event: LeaseHeld) -> dict[str, Any]:
        """Return the guest address of a lease, if the log shows where its bucket is mapped."""
        host = self._remaps.host_of(event.start)
        if host is not None and 0 <= event.host - host < event.length:
            return {"address": event.start + event.host - host}
        return {"address": None}

    def _report_cache(self, names: dict[str, int]) -> dict[str, Any]:
        accesses = self._hits + self._maps + self._failed
        complete = "xen_map_cache" in names and "xen_remap_bucket" in names
        top = self._remaps.again.top(_SHOWN)
        return {
            "accesses": accesses if "xen_map_cache" in names else None,
            "hits": self._hits if complete else None,
            "hit_rate": self._hits / accesses if complete and accesses else None,
            "map_calls": self._maps if "xen_remap_bucket" in names else None,
            "map_calls_of_our_cache": self._model.maps if complete else None,
            "failed": self._failed,
            "dummies_replaced": self._replaced,
            "map_seconds": self._map_ns / 1e9 if self._timed else None,
            "longest_map_seconds": self._max_map_ns / 1e9 if self._timed else None,
            "mapped_again_after_invalidate": self._remaps.after_invalidate,
            "mapped_again_without": self._remaps.without,
            "mapped_again": [
                {"address": start, "length": length, "times": count}
                for (start, length), count in top.entries
            ],
            **_others(top),
        }

    def _report_requests(self) -> dict[str, Any]:
        merged: dict[tuple[int, int], list[int]] = {}
        for (kind, address, is_read), count in self._requests.counts.items():
            merged.setdefault((kind, address), [0, 0])[is_read] += count
        shown = nsmallest(_SHOWN, merged.items(), key=lambda entry: (-sum(entry[1]), entry[0]))
        counted = sum(writes + reads for _, (writes, reads) in shown)
        devices: Tally[str] = Tally()
        for (kind, address), counts in merged.items():
            devices.add(self._platform.device(kind, address) or "unknown", sum(counts))
        return {
            "count": self._requests_total,
            "entries": [
                {
                    "kind": _KINDS.get(RequestKind(kind), "") if kind in _KINDS else f"type {kind}",
                    "address": address,
                    "reads": reads,
                    "writes": writes,
                    "device": self._platform.device(kind, address) or None,
                }
                for (kind, address), (writes, reads) in shown
            ],
            "other_addresses": len(merged) - len(shown) + self._requests.folded,
            "other_count": self._requests_total - counted,
            "devices": [
                {"device": name, "count": count} for name, count in devices.top(_SHOWN).entries
            ],
        }

    def _hints(self, parser: Parser, names: dict[str, int]) -> list[str]:
        """Return what the log cannot tell, and what would tell more."""
        hints = ["No event of QEMU's shows the size, owner, thread or cache of an access."]
        missing = [option for name, option in TRACE_OPTIONS.items() if name not in names]
        if "message" in parser.forms:  # this QEMU has a message in the place of the event
            missing = [each for each in missing if "invalidate" not in each]
        if missing:
            words = [word for option in missing for word in option.split()]
            listed = ", ".join(f'"{word}"' for word in words)
            hints.append(f"Not in this log; to have it: device_model_args = [ {listed} ]")
        if parser.assembler.first_time is None:
            hints.append(
                "The lines have no times, so the log does not show how long a burst of INVALIDATEs "
                "and its map calls took; from QEMU 6.0 on: device_model_args = "
                '[ "-msg", "timestamp=on" ]'
            )
        if any(self._address_of(held.event)["address"] is None for held in self._held.values()):
            hints.append(
                "DMA without an address: the log does not show where its bucket was mapped. "
                "Trace xen_map_cache* and xen_remap_bucket from the start of QEMU on."
            )
        if parser.dropped:
            hints.append(f"QEMU dropped {parser.dropped} events, so all counts are too small.")
        return hints


def _others(top: Top[tuple[int, int]]) -> dict[str, int]:
    return {"other_buckets": top.other_keys, "other_times": top.other_count}


def _seconds(time: int | None) -> float | None:
    return None if time is None else time / 1e9


def _qemu_version(parser: Parser) -> str | None:
    """Return which versions of QEMU write such a log; None if the log does not show it."""
    forms = set(parser.forms)
    if any(parser.assembler.names[name] for name in _NEW):
        forms.add("new")
    ranges = [_VERSIONS[form] for form in forms if form in _VERSIONS]
    if not ranges:
        return None
    first = max(low for low, _ in ranges)
    last = min((high for _, high in ranges if high is not None), default=None)
    if last is not None and last < first:
        return "several versions"
    low = ".".join(map(str, first))
    return f"{low} or later" if last is None else f"{low} to {'.'.join(map(str, last))}"
