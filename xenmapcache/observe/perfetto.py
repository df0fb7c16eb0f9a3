"""Recordings as trace events, the JSON form that ui.perfetto.dev and speedscope open.

The form is the published "Trace Event Format". Each stream of a recording is a process of the
trace. Times are microseconds since the recording began.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

from ..events import (
    BucketDropped,
    BucketMapped,
    CacheClosed,
    CacheOpened,
    Event,
    EventsLost,
    HoleFault,
    Invalidated,
    LeaseHeld,
    LeaseReleased,
    LeaseTaken,
    MapFailed,
    Quiesced,
    RequestHandled,
    ServerClosed,
    ServerOpened,
)
from ..ioreq import RequestKind
from .recording import Recording

_MAX_LEASES: Final = 100_000
_MAX_BUCKETS: Final = 1 << 20
_MAX_TRACKS: Final = 10_000
_QUIESCE_TRACK, _FIRST_VCPU_TRACK = 1, 3
_KINDS: Final = {kind.value: kind.name.lower().replace("_", " ") for kind in RequestKind}

Fields = dict[str, Any]


class _Open(NamedTuple):
    """A lease that has not ended."""

    owner: str
    begin: float
    taken: int


class _Stream:
    """A process of the trace: the state of a stream."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.leases: dict[int, _Open] = {}
        self.buckets: dict[int, int] = {}
        self.resident = 0
        self.tracks: set[int] = set()


class TraceWriter:
    """Writes recordings as one trace, in memory that leases and buckets bound.

    Args:
        write: called with each part of the text.

    Attributes:
        written: how many trace events were written.
        left_out: how many events could not be shown: they have no time, or too much was open.

    Synchronization: for one thread.
    """

    def __init__(self, write: Callable[[str], object]) -> None:
        self.written = self.left_out = 0
        self._write = write
        self._pids = 0
        self._write('{"displayTimeUnit":"ns","traceEvents":[')

    def add(self, recording: Recording) -> None:
        """Write a recording.

        Raises:
            OSError: as :meth:`.Recording.entries` raises it.
            WrongFormatError: likewise.
        """
        streams: dict[int, _Stream] = {}
        base: int | None = None
        last = 0.0
        for number, event in recording.entries():
            time = getattr(event, "time", None)
            if time is None:
                self.left_out += 1
                continue
            if base is None:
                base = recording.headers[0].time if recording.headers else None
                base = time if base is None else base
            if number not in streams:
                if len(streams) >= _MAX_TRACKS:
                    self.left_out += 1
                    continue
                streams[number] = self._open(recording, number)
            at = max(0, time - base) / 1e3  # what was taken before the recording begins with it
            last = max(last, at)
            for fields in self._shown(streams[number], event, at):
                self._put(streams[number], at, fields)
        for stream in streams.values():
            for lease in list(stream.leases):
                self._put(stream, last, _end(stream, lease, {"held": "to the end"}))

    def finish(self) -> None:
        """Write the end of the trace."""
        self._write("\n]}\n")

    def _open(self, recording: Recording, number: int) -> _Stream:
        self._pids += 1
        stream = _Stream(self._pids)
        source = recording.headers[0].source if recording.headers else ""
        name = " ".join(filter(None, (source, f"stream {number}" if number else "")))
        self._put(stream, 0, {"ph": "M", "name": "process_name", "args": {"name": name or "cache"}})
        return stream

    def _put(self, stream: _Stream, at: float, fields: Fields) -> None:
        from json import dumps  # the command starts faster without it

        text = dumps({"pid": stream.pid, "tid": 0, "ts": round(at, 3), **fields})
        self._write(f",\n{text}" if self.written else f"\n{text}")
        self.written += 1

    def _shown(self, stream: _Stream, event: Event, at: float) -> Iterator[Fields]:
        """Yield the trace events that show an event."""
        match event:
            case LeaseTaken():
                yield from self._taken(stream, event, at)
            case LeaseReleased(time, lease):
                opened = stream.leases.get(lease)
                if opened is not None and time is not None:
                    outcome = {"stale": event.stale, "copied": event.copied, "lost": event.lost}
                    held = (time - opened.taken) / 1e6
                    yield _end(stream, lease, {"held_ms": held, **outcome})
            case BucketMapped() | BucketDropped() | Invalidated() | CacheClosed():
                yield from self._changed(stream, event)
            case RequestHandled():
                yield from self._handled(stream, event)
            case Quiesced():
                yield from self._name(stream, _QUIESCE_TRACK, "quiesce")
                duration = max(0, event.duration) / 1e3
                yield {
                    "ph": "X", "name": "quiesce", "cat": "ioreq", "tid": _QUIESCE_TRACK,
                    "dur": duration, "args": {"failures": event.failures},
                }  # fmt: skip
            case CacheOpened():
                yield _label(event.source or "a cache")
            case ServerOpened():
                yield _label(event.source or f"ioreq server of domain {event.domain}")
            case ServerClosed():
                yield _instant("server closed", "ioreq", {})
            case HoleFault(_, address) | MapFailed(_, address):
                yield _instant(f"no page at {address:#x}", "fault", {"address": f"{address:#x}"})
            case LeaseHeld():
                place = {"start": f"{event.start:#x}", "host": f"{event.host:#x}"}
                yield _instant("DMA held across INVALIDATE", "invalidate", place)
            case EventsLost():
                yield _instant(f"{event.lost} events lost", "recorder", {"lost": event.lost})

    def _taken(self, stream: _Stream, event: LeaseTaken, at: float) -> Iterator[Fields]:
        if event.lease in stream.leases:  # its end was lost
            yield _end(stream, event.lease, {"end": "unknown"})
        if len(stream.leases) >= _MAX_LEASES or event.time is None:
            self.left_out += 1
            return
        stream.leases[event.lease] = _Open(event.owner, at, event.time)
        yield {
            "ph": "b", "cat": "lease", "name": event.owner, "id": f"{stream.pid}.{event.lease}",
            "args": {
                "lease": event.lease, "kind": event.kind, "direction": event.direction,
                "start": f"{event.start:#x}", "length": f"{event.length:#x}",
                "thread": event.thread, "stale": event.stale,
                "origin": list(event.origin or ()),
            },
        }  # fmt: skip

    def _changed(
        self, stream: _Stream, event: BucketMapped | BucketDropped | Invalidated | CacheClosed
    ) -> Iterator[Fields]:
        if isinstance(event, BucketMapped | BucketDropped):
            stream.resident -= stream.buckets.pop(event.start, 0)
        else:
            stream.buckets.clear()
            stream.resident = 0
        if isinstance(event, BucketMapped):
            if len(stream.buckets) >= _MAX_BUCKETS:
                self.left_out += 1
                return
            stream.buckets[event.start] = event.length
            stream.resident += event.length
        elif isinstance(event, Invalidated):
            details = {"dropped": event.dropped, "held": list(event.held[:100])}
            yield _instant(f"INVALIDATE {event.number}", "invalidate", details)
        yield {"ph": "C", "name": "buckets", "args": {"buckets": len(stream.buckets)}}
        yield {"ph": "C", "name": "resident bytes", "args": {"bytes": stream.resident}}

    def _handled(self, stream: _Stream, event: RequestHandled) -> Iterator[Fields]:
        track = _FIRST_VCPU_TRACK + max(-1, event.vcpu)
        yield from self._name(
            stream, track, "buffered ioreqs" if event.vcpu < 0 else f"vCPU {event.vcpu}"
        )
        kind = _KINDS.get(event.kind, f"type {event.kind}")
        args = {"size": event.size, "region": event.region, "failure": event.failure}
        yield {
            "ph": "X", "cat": "ioreq", "tid": track, "dur": max(0, event.duration) / 1e3,
            "name": f"{'read' if event.is_read else 'write'} {kind} {event.address:#x}",
            "args": args,
        }  # fmt: skip

    def _name(self, stream: _Stream, track: int, name: str) -> Iterator[Fields]:
        if track not in stream.tracks and len(stream.tracks) < _MAX_TRACKS:
            stream.tracks.add(track)
            yield {"ph": "M", "name": "thread_name", "tid": track, "args": {"name": name}}


def _end(stream: _Stream, lease: int, args: Fields) -> Fields:
    owner = stream.leases.pop(lease).owner
    name = f"{stream.pid}.{lease}"
    return {"ph": "e", "cat": "lease", "name": owner, "id": name, "args": args}


def _label(text: str) -> Fields:
    return {"ph": "M", "name": "process_labels", "args": {"labels": text}}


def _instant(name: str, category: str, args: Fields) -> Fields:
    return {"ph": "i", "s": "p", "name": name, "cat": category, "args": args}
