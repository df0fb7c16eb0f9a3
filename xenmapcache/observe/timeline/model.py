"""What the picture of a recording shows: lanes and bars of leases, invalidations, rates, heat.

The model reads the events once, in bounded memory. What does not fit is merged, folded into a lane
for all others, or counted in the notes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final, NamedTuple

from ...escape import printable
from ...events import (
    Accessed,
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
    PagesDirtied,
    Quiesced,
    RequestHandled,
    RequestsHandled,
)
from ..recording import Entry
from .bars import (
    BIDIRECTIONAL,
    DEVICE,
    FROM_DEVICE,
    STALE,
    TO_DEVICE,
    WINDOW,
    Bar,
    Burst,
    merge_bars,
    merge_bursts,
)
from .columns import Heat, Series
from .lanes import Lane, LaneBook
from .worst import Held, Worst

MAX_BARS: Final = 40_000
MAX_BURSTS: Final = 4_000
MAX_TIME: Final = (1 << 53) - 1
"""In ns: 104 days. Scripts and pictures count in floating-point numbers, which are exact so far."""

_MAX_LEASES: Final = 100_000
_MAX_BUCKETS: Final = 1 << 18
_MAX_SOURCE: Final = 200
_FIRST_WIDTH: Final = 1024
_MIB_SHIFT: Final = 20
_STYLE_OF: Final = {
    "to-device": TO_DEVICE,
    "from-device": FROM_DEVICE,
    "bidirectional": BIDIRECTIONAL,
}
_STYLE_OF_KIND: Final = {"device": DEVICE, "window": WINDOW}
_QEMU_OWNER: Final = "QEMU (DMA that was held)"


class Picture(NamedTuple):
    """What is drawn. Immutable; for one thread.

    Attributes:
        source: what was recorded, for people.
        base: when the recording began, in ns since the epoch; None if there is no such time.
        span: how long it is, in ns; at least 1.
        events: how many events it has.
        lanes: in the order in which they are drawn.
        owners: the names that bars refer to.
        bars: of the leases.
        bursts: the invalidations.
        series: numbers over time, by their names: maps, faults, requests, handled (those whose
            duration is known); and in ns: handler_sum, handler_max, quiesce_max.
        heat: the guest's addresses.
        worst: leases, the worst one first.
        stale: how many DMA leases were stale at their end.
        lost: how many pages were lost.
        copied: how many pages were copied.
        leases: how many leases there are.
        invalidations: how many INVALIDATEs there are.
        notes: what is missing, for people.
    """

    source: str
    base: int | None
    span: int
    events: int
    lanes: list[Lane]
    owners: list[str]
    bars: list[Bar]
    bursts: list[Burst]
    series: dict[str, Series]
    heat: Heat
    worst: list[Held]
    stale: int
    lost: int
    copied: int
    leases: int
    invalidations: int
    notes: list[str]


class _OpenLease:
    """A lease that has not ended."""

    __slots__ = ("across", "lane", "real_since", "row", "since", "stale_since", "taken")

    def __init__(self, taken: LeaseTaken, since: int, real_since: int, lane: Lane) -> None:
        self.taken = taken
        self.since = since
        self.real_since = real_since
        self.lane = lane
        self.row = lane.occupy()
        self.across = 0
        self.stale_since: int | None = since if taken.stale else None


class Model:
    """Makes a picture of events.

    Args:
        base: when the recording began, on the clock of the events; None: with the first event.

    Synchronization: for one thread.
    """

    def __init__(self, base: int | None = None) -> None:
        self._base = base
        self._last = 0
        self._events = self._untimed = self._lost_events = self._left_out = 0
        self._source = ""
        self._book = LaneBook()
        self._open: dict[tuple[int, int], _OpenLease] = {}
        self._buckets: dict[int, dict[int, tuple[int, int]]] = {}
        self._bucket_count = 0
        self._bars: list[Bar] = []
        self._bar_width = self._burst_width = _FIRST_WIDTH
        self._bursts: list[Burst] = []
        self._series = {
            "maps": Series(),
            "faults": Series(),
            "requests": Series(),
            "handled": Series(),
            "handler_sum": Series(),
            "handler_max": Series(max),
            "quiesce_max": Series(max),
        }
        self._heat = Heat()
        self._worst = Worst()
        self._stale = self._lost = self._copied = self._leases = self._invalidations = 0
        self._actions: dict[type, Callable[[int, Any, int], None]] = {
            CacheOpened: self._opened,
            CacheClosed: self._clear,
            BucketMapped: self._mapped,
            BucketDropped: self._dropped,
            LeaseTaken: self._taken,
            LeaseReleased: self._released,
            LeaseHeld: self._lease_held,
            HoleFault: self._missing,
            MapFailed: self._missing,
            PagesDirtied: self._dirtied,
            Invalidated: self._invalidated,
            RequestHandled: self._handled,
            Quiesced: self._quiesced,
        }

    def add(self, entries: Iterable[Entry]) -> None:
        """Read events, in order."""
        for stream, event in entries:
            self._events += 1
            if isinstance(event, Accessed | RequestsHandled):
                self._batch(event)
                continue
            if isinstance(event, EventsLost):
                self._lost_events += event.lost
            if event.time is None:
                self._untimed += 1
                continue
            if self._base is None:
                self._base = event.time
            # What was taken before the recording began, begins with it.
            at = min(max(0, event.time - self._base), MAX_TIME)
            self._last = max(self._last, at)
            action = self._actions.get(type(event))
            if action is not None:
                action(stream, event, at)

    def finish(self, source: str = "", notes: Iterable[str] = ()) -> Picture:
        """Return the picture. What is still held ends with it.

        Args:
            source: what was recorded; by default what the first cache maps.
            notes: of the reader, on what is missing.
        """
        for stream, lease in list(self._open):
            self._end(stream, lease, self._last, None)
        for stream in self._buckets:
            self._clear(stream, None, self._last)
        for series in self._series.values():
            series.fill(self._last)
        lanes, bars = self._book.arrange(self._bars)
        return Picture(
            printable(source or self._source)[:_MAX_SOURCE], self._base, max(1, self._last),
            self._events, lanes, self._book.owners, bars, self._bursts, self._series, self._heat,
            self._worst.leases(), self._stale, self._lost, self._copied, self._leases,
            self._invalidations, [*notes, *self._notes()],
        )  # fmt: skip

    @property
    def timed(self) -> int:
        """How many events have a time, so that they can be drawn."""
        return self._events - self._untimed

    def _notes(self) -> list[str]:
        notes = (
            (self._untimed, "events have no time and are not shown"),
            (self._lost_events, "events were lost, because the recorder could not follow"),
            (self._left_out, "leases or buckets are not shown, because too many were open"),
        )
        return [f"{count:,} {text}" for count, text in notes if count]

    def _batch(self, event: Accessed | RequestsHandled) -> None:
        """Take a batch, which happened before the next event; so it is shown with the last one."""
        if isinstance(event, RequestsHandled):
            self._series["requests"].put(self._last, max(0, sum(event.counts.values())))
            return
        for number, count in event.counts.items():
            self._heat.touch(max(0, number) << _MIB_SHIFT, 1, self._last, max(0, count))

    def _taken(self, stream: int, event: LeaseTaken, at: int) -> None:
        key = stream, event.lease
        if key in self._open:  # its end was lost
            self._end(*key, at, None)
        if len(self._open) >= _MAX_LEASES:
            self._left_out += 1
            return
        self._leases += 1
        lane = self._book.lane(stream, event.kind, event.owner)
        real = at if event.time is None or self._base is None else event.time - self._base
        self._open[key] = _OpenLease(event, at, min(at, real), lane)
        self._heat.touch(event.start, event.length, at)

    def _released(self, stream: int, event: LeaseReleased, at: int) -> None:
        if (stream, event.lease) in self._open:
            self._end(stream, event.lease, at, event)

    def _end(self, stream: int, lease: int, at: int, end: LeaseReleased | None) -> None:
        """End a lease: draw its bar.

        Args:
            stream: the number of its stream.
            lease: its number.
            at: when it ends.
            end: the event; None if the recording does not show it.
        """
        found = self._open.pop((stream, lease))
        found.lane.vacate(found.row)
        taken = found.taken
        at = max(at, found.since)
        stale = found.stale_since is not None if end is None else end.stale
        bar = self._bar_of(found, at)
        if stale and taken.kind == "dma":
            self._stale += 1
            turned = found.since if found.stale_since is None else min(found.stale_since, at)
            if turned > found.since:
                self._draw(bar._replace(end=turned))
            bar = bar._replace(start=turned, style=STALE)
        self._draw(bar)
        self._heat.present(taken.start, taken.length, found.since, at)
        copied, lost = (max(0, end.copied), max(0, end.lost)) if end else (0, 0)
        self._copied += copied
        self._lost += lost
        held = min(at - found.real_since, MAX_TIME)
        self._worst.add(
            Held(taken, stream, found.since, held, found.across, stale, copied, lost, end is None)
        )

    def _bar_of(self, found: _OpenLease, at: int) -> Bar:
        """Return the bar of a lease that has never become stale."""
        taken = found.taken
        style = _STYLE_OF_KIND.get(taken.kind)
        if style is None:
            style = _STYLE_OF.get(taken.direction or "", BIDIRECTIONAL)
        high = taken.start + max(1, taken.length)
        owner = self._book.owner(taken.owner)
        place = found.lane.number, found.row
        return Bar(found.since, at, *place, style, owner, taken.lease, taken.start, high)

    def _draw(self, bar: Bar) -> None:
        self._bars.append(bar)
        while len(self._bars) > MAX_BARS:
            self._bar_width *= 2
            self._bars = merge_bars(self._bars, self._bar_width, self._bar_width)

    def _lease_held(self, stream: int, event: LeaseHeld, at: int) -> None:
        lane = self._book.lane(stream, "dma", _QEMU_OWNER)
        owner = self._book.owner(_QEMU_OWNER)
        high = event.start + max(1, event.length)
        self._stale += 1
        self._draw(Bar(at, at, lane.number, 0, STALE, owner, 0, event.start, high))

    def _invalidated(self, stream: int, event: Invalidated, at: int) -> None:
        self._invalidations += 1
        for lease in event.held:
            found = self._open.get((stream, lease))
            if found is not None:
                found.across += 1
                if found.stale_since is None:
                    found.stale_since = at
        self._bursts.append(
            Burst(
                at, at, 1, max(0, event.dropped or 0), len(event.held), max(0, event.duration or 0)
            )
        )
        while len(self._bursts) > MAX_BURSTS:
            self._burst_width *= 2
            self._bursts = merge_bursts(self._bursts, self._burst_width)
        self._clear(stream, event, at)

    def _clear(self, stream: int, event: Event | None, at: int) -> None:  # noqa: ARG002 - as all actions
        for start in list(self._buckets.get(stream, ())):
            self._drop(stream, start, at)

    def _mapped(self, stream: int, event: BucketMapped, at: int) -> None:
        self._series["maps"].put(at)
        self._heat.touch(event.start, event.length, at)
        self._drop(stream, event.start, at)
        if self._bucket_count >= _MAX_BUCKETS:
            self._left_out += 1
            return
        self._bucket_count += 1
        self._buckets.setdefault(stream, {})[event.start] = event.length, at

    def _dropped(self, stream: int, event: BucketDropped, at: int) -> None:
        self._drop(stream, event.start, at)

    def _drop(self, stream: int, start: int, at: int) -> None:
        found = self._buckets.get(stream, {}).pop(start, None)
        if found is not None:
            self._bucket_count -= 1
            length, since = found
            self._heat.present(start, length, since, at)

    def _missing(self, stream: int, event: Event, at: int) -> None:  # noqa: ARG002 - as all actions
        self._series["faults"].put(at)

    def _dirtied(self, stream: int, event: PagesDirtied, at: int) -> None:  # noqa: ARG002 - likewise
        self._heat.touch(event.start, event.length, at)

    def _handled(self, stream: int, event: RequestHandled, at: int) -> None:  # noqa: ARG002 - likewise
        duration = min(max(0, event.duration), MAX_TIME)
        self._series["requests"].put(at)
        self._series["handled"].put(at)
        self._series["handler_sum"].put(at, duration)
        self._series["handler_max"].put(at, duration)

    def _quiesced(self, stream: int, event: Quiesced, at: int) -> None:  # noqa: ARG002 - likewise
        self._series["quiesce_max"].put(at, min(max(0, event.duration), MAX_TIME))

    def _opened(self, stream: int, event: CacheOpened, at: int) -> None:  # noqa: ARG002 - likewise
        self._source = self._source or event.source or ""
