"""A pen: the observer that stores the events of one stream in the file of a recorder.

The events come from the stream's queue. The most frequent ones of a cache come by a shortcut, as
values: see :class:`.stream.Shortcut`.
"""

# Rules
#   1. A stretch of bytecodes that call nothing stores an event, and notes what it changes. In the
#      same stretch the event leaves its queue, or its subject is marked. So an interrupt neither
#      loses an event, nor has it stored twice. What is done before that can be done again.
#   2. In the stretch, what may fail for want of memory comes before the position moves. What comes
#      after that cannot fail.
#   3. A shortcut that finds no room, or a closed file, leaves the event to the queue. It catches
#      nothing: a signal handler may raise any exception in here, and that must reach the caller.
#      So nothing in here may fail for a reason of the pen's. The values are numbers and exact
#      texts, which can always be written. A file is closed only after `limit` says that nothing
#      fits. Only memory may be missing, as in each step of the operation that is told of.

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from ..events import (
    BucketDropped,
    BucketMapped,
    CacheClosed,
    CacheOpened,
    Event,
    Invalidated,
    LeaseReleased,
    LeaseTaken,
    PagesDirtied,
    RequestHandled,
    ServerClosed,
    ServerOpened,
)
from ..stream import HAS_GIL, QueueObserver, Shortcut, Subject
from .eventlines import encode, template

if TYPE_CHECKING:
    from threading import RLock

    from .halves import Halves

_MAX_TEMPLATES: Final = 4096
_NO_CHANGE: Final[tuple[Any, Any, Any]] = (None, None, None)
_TAKEN: Final = ("time", "lease", "start", "length")
_RELEASED: Final = ("time", "lease")
_DIRTIED: Final = ("time", "start", "length")
_HANDLED: Final = ("time", "address", "duration")


class State(NamedTuple):
    """What is restated of a stream.

    Attributes:
        opened: the line that says so, with a NUL; empty if there was none.
        mapped: lines of buckets, by their addresses.
    """

    opened: bytes
    mapped: dict[int, bytes]


class Keeper(Protocol):
    """What a pen asks of its recorder, which knows this module.

    Attributes:
        lock: for a build without a GIL.
        halves: the file.
        held: lines of the leases that are held, by their numbers.
        states: what is restated, by the number of the stream.
    """

    lock: RLock
    halves: Halves
    held: dict[int, bytes]
    states: dict[int, State]

    def make_room(self, size: int, pen: Pen, queue: deque[Event]) -> bool:
        """Have room for a line; see :meth:`.Recorder.make_room`."""

    def end_stream(self, number: int) -> None:
        """Forget a cache or server that was closed."""


class Pen(QueueObserver):
    """The observer that stores the events of one stream.

    Args:
        recorder: has the file.
        stream: the number of the stream in the recording.
    """

    __slots__ = ("_recorder",)

    def __init__(self, recorder: Keeper, stream: int) -> None:
        self._recorder = recorder
        lines = _Lines(stream)
        drain = _make_drain(recorder, lines, self)
        if HAS_GIL:
            super().__init__(drain, partial(_make_shortcut, recorder, lines))
        else:
            super().__init__(partial(_drain_locked, recorder.lock, drain))

    def __repr__(self) -> str:  # for the stream's warning
        return repr(self._recorder)


class _Lines:
    """Writes the frequent events of a stream as lines, each with a NUL.

    All of a line but the numbers that change is formatted once.

    Attributes:
        stream: its number.
        templates: of lines, by what their events have in common.
        released_form: a template for a lease that has ended as it should.
        dirtied_form: a template for pages that were reported.
    """

    __slots__ = ("dirtied_form", "released_form", "stream", "templates")

    def __init__(self, stream: int) -> None:
        self.stream = stream
        self.templates: dict[object, bytes] = {}
        self.dirtied_form = template(PagesDirtied(0, 0, 0), stream, _DIRTIED) + b"\0"
        self.released_form = template(LeaseReleased(0, 0), stream, _RELEASED) + b"\0"

    def taken(self, values: tuple[Any, ...]) -> bytes:
        """Return the line of a LeaseTaken with these values."""
        time, lease, kind, start, length, owner, direction, thread, stale, origin = values
        common = kind, owner, direction, thread, stale, origin
        form = self.templates.get(common) or self.new(common, LeaseTaken(*values), _TAKEN)
        return form % (time, lease, start, length)

    def released(self, values: tuple[Any, ...]) -> bytes:
        """Return the line of a LeaseReleased with these values."""
        time, lease, stale, copied, lost = values
        if stale or copied or lost:
            return encode(LeaseReleased(*values), self.stream) + b"\0"
        return self.released_form % (time, lease)

    def dirtied(self, values: tuple[Any, ...]) -> bytes:
        """Return the line of a PagesDirtied with these values."""
        return self.dirtied_form % values

    def handled(self, values: tuple[Any, ...]) -> bytes:
        """Return the line of a RequestHandled with these values."""
        time, vcpu, kind, is_read, address, size, duration, failure, region = values
        common = vcpu, kind, is_read, size, failure, region
        form = self.templates.get(common) or self.new(common, RequestHandled(*values), _HANDLED)
        return form % (time, address, duration)

    def new(self, common: object, event: Event, numbers: tuple[str, ...]) -> bytes:
        """Return a new template, for events that have this in common."""
        if len(self.templates) >= _MAX_TEMPLATES:  # a guest can choose what failures are about
            self.templates.clear()
        form = self.templates[common] = template(event, self.stream, numbers) + b"\0"
        return form


def _make_drain(recorder: Keeper, lines: _Lines, pen: Pen) -> Callable[[deque[Any]], bool]:
    """Return the function that stores the events of a queue."""
    halves, held, stream = recorder.halves, recorder.held, lines.stream
    memory = halves.memory

    def drain(queue: deque[Any]) -> bool:
        while queue:
            event = queue[0]
            kind = event.__class__
            # What changes with the event: table[key] = value, or its end if there is no value.
            table, key, value = _NO_CHANGE
            if kind is LeaseTaken:
                value = line = lines.taken(event)
                table, key = held, event.lease
            elif kind is LeaseReleased:
                line = lines.released(event)
                table, key = held, event.lease
            elif kind is PagesDirtied:
                line = lines.dirtied(event)
            elif kind is RequestHandled:
                line = lines.handled(event)
            else:
                line = encode(event, stream) + b"\0"
                table, key, value = _change_of(recorder, stream, event, line)
            size = len(line)
            # No call from here on, until the event leaves the queue.
            end = halves.position + size
            last = end - 1
            if end > halves.limit:
                if not recorder.make_room(size, pen, queue):
                    return False
            elif queue and queue[0] is event:  # otherwise a signal handler or a thread was here
                if value is not None:
                    table[key] = value
                elif table is not None and key in table:
                    del table[key]
                memory[halves.position : end] = line
                halves.position = last
                queue.popleft()
        return True

    return drain


def _make_shortcut(recorder: Keeper, lines: _Lines, queue: deque[Event]) -> Shortcut:
    """Return what stores events at once, as long as none is queued.

    The functions make their lines themselves, because calls for that took a tenth of the time.
    """
    return Shortcut(
        _make_taken(recorder, lines, queue),
        _make_released(recorder, lines, queue),
        _make_dirtied(recorder, lines, queue),
    )


def _make_taken(
    recorder: Keeper, lines: _Lines, queue: deque[Event]
) -> Callable[[Subject, tuple[Any, ...]], bool]:
    halves, held, memory = recorder.halves, recorder.held, recorder.halves.memory
    get_template, new_template = lines.templates.get, lines.new

    def taken(subject: Subject, values: tuple[Any, ...]) -> bool:
        time, lease, kind, start, length, owner, direction, thread, stale, origin = values
        common = kind, owner, direction, thread, stale, origin
        form = get_template(common) or new_template(common, LeaseTaken(*values), _TAKEN)
        line = form % (time, lease, start, length)
        size = len(line)
        # No call from here on.
        end = halves.position + size
        last = end - 1
        if end > halves.limit or queue:
            return False
        if subject.told is not None:
            memory[halves.position : end] = line  # overwritten if memory for the next is missing
            held[lease] = line
            halves.position = last
            subject.told = True
        return True

    return taken


def _make_released(
    recorder: Keeper, lines: _Lines, queue: deque[Event]
) -> Callable[[Subject, tuple[Any, ...]], bool]:
    halves, held, memory = recorder.halves, recorder.held, recorder.halves.memory
    form, line_of = lines.released_form, lines.released

    def released(subject: Subject, values: tuple[Any, ...]) -> bool:
        time, lease, stale, copied, lost = values
        line = line_of(values) if stale or copied or lost else form % (time, lease)
        size = len(line)
        # No call from here on.
        end = halves.position + size
        last = end - 1
        if end > halves.limit or queue:
            return False
        if subject.told:
            memory[halves.position : end] = line
            halves.position = last
            subject.told = False
            if lease in held:
                del held[lease]
        else:
            subject.told = None
        return True

    return released


def _make_dirtied(
    recorder: Keeper, lines: _Lines, queue: deque[Event]
) -> Callable[[tuple[Any, ...]], bool]:
    halves, memory, form = recorder.halves, recorder.halves.memory, lines.dirtied_form

    def dirtied(values: tuple[Any, ...]) -> bool:
        line = form % values
        size = len(line)
        # No call from here on.
        end = halves.position + size
        last = end - 1
        if end > halves.limit or queue:
            return False
        memory[halves.position : end] = line
        halves.position = last
        return True

    return dirtied


def _drain_locked(
    lock: AbstractContextManager[object], drain: Callable[[deque[Any]], bool], queue: deque[Any]
) -> bool:
    with lock:
        return drain(queue)


def _change_of(
    recorder: Keeper, stream: int, event: Event, line: bytes
) -> tuple[Any, object, object]:
    """Return what is to be restated after an event: a table, a key, and a value or None."""
    states = recorder.states
    state = states.get(stream) or State(b"", {})
    match event:
        case CacheOpened() | ServerOpened():
            return states, stream, State(line, state.mapped)
        case BucketMapped():
            return state.mapped, event.start, line
        case BucketDropped():
            return state.mapped, event.start, None
        case Invalidated():
            return states, stream, State(state.opened, {})
        case CacheClosed() | ServerClosed():
            recorder.end_stream(stream)
            return states, stream, None
    return None, None, None
