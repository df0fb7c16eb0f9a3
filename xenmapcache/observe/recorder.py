"""The recorder: an observer that writes events to a file, where they survive the process.

The file has two halves, which take turns; see :mod:`.halves`. If one is full, the recorder begins
the other one with lines that restate what is open, mapped and held.
"""

# Rules
#   1. An event leaves its queue in the moment when it is stored. So an interrupt neither loses it,
#      nor has it stored twice. What is done before that can be done again.
#   2. A thread that comes while room is made leaves its events in their queue. They are stored
#      when the room is made.
#   3. A forked child has the mapping, but not the recording: it stores nothing.

from __future__ import annotations

import fcntl
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from errno import EEXIST
from functools import partial
from itertools import islice
from threading import Lock, RLock
from typing import Any, Final, NamedTuple, Protocol, Self
from weakref import WeakSet

from ..address import GiB, MiB, parse_size
from ..errors import ClosedError
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
from ..files.atomic import new_file
from ..stream import HAS_GIL, Observation, Observer, QueueObserver, now
from .eventlines import VERSION, Header, encode, encode_header, template
from .halves import Halves
from .recording import is_recording

MIN_LIMIT: Final = MiB
MAX_LIMIT: Final = 1024 * GiB

_MAX_TEMPLATES: Final = 4096
_MAX_RESTATED: Final = 100_000
_NO_CHANGE: Final[tuple[Any, Any, Any]] = (None, None, None)

logger = logging.getLogger("xenmapcache")

_recorders: WeakSet[Recorder] = WeakSet()


class Observable(Protocol):
    """A cache or a server."""

    def observe(self, observer: Observer, /) -> Observation:
        """Have a function called with each event."""


def record(
    observed: Observable, path: str | os.PathLike[str], limit: int | str = 64 * MiB
) -> Recorder:
    """Write what happens in a cache or server to a file, until the recorder is detached.

    Every event is in the file as soon as it was handed over, even if the process is killed. If the
    file is full, older events are overwritten. ``xenmapcache events FILE`` prints the file. A
    forked child does not record.

    Args:
        observed: a cache or server.
        path: of the file, which only its owner can read (mode 0600). An earlier recording of that
            name is replaced, unless a recorder still writes it. Another file, or a symbolic link,
            is not.
        limit: of the file's size, from 1 MiB to 1 TiB: bytes, or a text such as ``"64MiB"``.

    Returns:
        The recorder, which is a context manager that detaches it.

    Raises:
        OSError: the file cannot be written, or the name is another file's.
        ValueError: the limit is out of range.
        ClosedError: the cache is closed.
    """
    recorder = Recorder(path, limit)
    try:
        recorder.add(observed.observe)
    except BaseException:
        recorder.detach()
        raise
    return recorder


class Recorder:
    """A file to which the events of caches and servers are written; see :func:`record`.

    Attributes:
        path: of the file.

    Synchronization: any thread.
    """

    def __init__(
        self, path: str | os.PathLike[str], limit: int | str = 64 * MiB, source: str = ""
    ) -> None:
        size = parse_size(limit) if isinstance(limit, str) else limit
        if not MIN_LIMIT <= size <= MAX_LIMIT:
            raise ValueError(f"limit must be {MIN_LIMIT:#x} to {MAX_LIMIT:#x} bytes, not {size:#x}")
        self.path = os.fsdecode(path)
        self._source = source or " ".join(getattr(sys, "argv", [])[:1])
        self._next = 0
        self._closed = False
        self._observations: dict[int, Observation] = {}
        self._behind: dict[_Pen, deque[Event]] = {}
        self.lock = RLock()
        self.held: dict[int, bytes] = {}
        self.states: dict[int, State] = {}
        with new_file(path, replaceable=self._is_replaceable) as fd:
            self.halves = Halves(self.path, fd, size, self._begin)
        _recorders.add(self)

    def __repr__(self) -> str:
        return f"<recorder of {self.path!r}>"

    def _is_replaceable(self, fd: int) -> bool:
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileExistsError(EEXIST, "A recorder still writes that file", self.path) from None
        return is_recording(fd)

    def add(self, observe: Callable[[Observer], Observation]) -> None:
        """Record a further cache or server.

        Args:
            observe: its method ``observe``.

        Raises:
            ClosedError: the recorder is detached.
        """
        if self._closed:
            raise ClosedError(f"the recorder of {self.path} is detached: make another one")
        number, self._next = self._next, self._next + 1
        self.states[number] = State(b"", {})
        self._observations[number] = observe(_Pen(self, number))

    def detach(self) -> None:
        """Write what is queued, and close the file. Idempotent; any thread."""
        try:
            for number, observation in tuple(self._observations.items()):
                observation.detach()
                self._observations.pop(number, None)
        finally:
            self._closed = True
            self.halves.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def forget(self) -> None:
        """Close the file in a forked child, and leave it to the parent."""
        self._closed = True
        self.halves.forget()

    def end_stream(self, number: int) -> None:
        """Forget a cache or server that was closed: nothing more will come from it."""
        self._observations.pop(number, None)

    def make_room(self, size: int, pen: _Pen, queue: deque[Event]) -> bool:
        """Have room for a line.

        Args:
            size: of the line.
            pen: that wants to store it.
            queue: where its events wait until there is room.

        Returns:
            Whether it may try again. If not, it is called again later, unless all is over.
        """
        if self._closed:
            queue.clear()
            return True
        self._behind[pen] = queue
        if not self.halves.make_room(size, self._begin):
            return False
        self._behind.pop(pen, None)
        while self._behind:
            other, waiting = self._behind.popitem()
            other.drain(waiting)
        return True

    def _begin(self, number: int, size: int) -> bytes:
        """Return the first line of a half, as many lines as may follow it, and a NUL."""
        _shorten(self.held)
        mapped = list[bytes]()
        for state in self.states.values():
            _shorten(state.mapped)
            mapped += state.mapped.values()
        opened = [state.opened for state in self.states.values() if state.opened]
        lines = [*opened, *self.held.values(), *mapped]
        room = size // 4
        kept = list[bytes]()
        for line in lines:
            room -= len(line)
            if room < 0:
                break
            kept.append(line[:-1])
        header = Header(
            VERSION, number, size, os.getpid(), self._source, now(), time.time_ns(),
            len(kept), len(lines) - len(kept),
        )  # fmt: skip
        return b"".join((encode_header(header), *kept, b"\0"))


class State(NamedTuple):
    """What is restated of a stream.

    Attributes:
        opened: the line that says so, with a NUL; empty if there was none.
        mapped: lines of buckets, by their addresses.
    """

    opened: bytes
    mapped: dict[int, bytes]


class _Pen(QueueObserver):
    """The observer that stores the events of one stream."""

    __slots__ = ("_recorder",)

    def __init__(self, recorder: Recorder, stream: int) -> None:
        self._recorder = recorder
        super().__init__(_make_drain(recorder, stream, self))

    def __repr__(self) -> str:  # for the stream's warning
        return repr(self._recorder)


def _make_drain(recorder: Recorder, stream: int, pen: _Pen) -> Callable[[deque[Any]], bool]:
    """Return the function that stores the events of a stream.

    It is one function with few calls, because it is called for each lease. All of a frequent
    event's line but the numbers is formatted once.
    """
    templates: dict[object, bytes] = {}
    halves, held = recorder.halves, recorder.held
    memory = halves.memory

    new_template = partial(_new_template, templates, stream)

    def drain(queue: deque[Any]) -> bool:
        while queue:
            event = queue[0]
            kind = event.__class__
            # What changes with the event: table[key] = value, or its end if there is no value.
            table, key, value = _NO_CHANGE
            if kind is LeaseTaken:
                at, key, what, start, length, owner, way, thread, stale, origin = event
                common: object = what, owner, way, thread, stale, origin
                form = templates.get(common) or new_template(common, event, _TAKEN)
                value = line = form % (at, key, start, length)
                table = held
            elif kind is LeaseReleased:
                at, key, stale, copied, lost = event
                common = stale, copied, lost
                form = templates.get(common) or new_template(common, event, _RELEASED)
                line = form % (at, key)
                table = held
            elif kind is PagesDirtied:
                form = templates.get(kind) or new_template(kind, event, _DIRTIED)
                line = form % event
            elif kind is RequestHandled:
                at, vcpu, what, is_read, address, size, duration, failure, region = event
                common = vcpu, what, is_read, size, failure, region
                form = templates.get(common) or new_template(common, event, _HANDLED)
                line = form % (at, address, duration)
            else:
                line = encode(event, stream) + b"\0"
                table, key, value = _change_of(recorder, stream, event, line)
            size = len(line)
            # No call from here on, until the event leaves the queue. If memory is short, that shows
            # before the line is stored.
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

    return drain if HAS_GIL else partial(_drain_locked, recorder.lock, drain)


def _new_template(
    templates: dict[object, bytes],
    stream: int,
    key: object,
    event: Event,
    numbers: tuple[str, ...],
) -> bytes:
    if len(templates) >= _MAX_TEMPLATES:  # a guest can choose what failures are about
        templates.clear()
    line = templates[key] = template(event, stream, numbers) + b"\0"
    return line


def _drain_locked(
    lock: AbstractContextManager[object], drain: Callable[[deque[Any]], bool], queue: deque[Any]
) -> bool:
    with lock:
        return drain(queue)


def _change_of(
    recorder: Recorder, stream: int, event: Event, line: bytes
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


class ProcessRecorder:
    """Records every cache and server of a process, as ``XENMAPCACHE_RECORD`` wants it.

    The first one makes the file, ``PATH.PID``. A forked child makes a file of its own. If the file
    cannot be written, a WARNING says so once, and the program runs without a recording.

    Args:
        path: without the number of the process.

    Synchronization: any thread.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._pid = 0
        self._recorder: Recorder | None = None
        self._lock = Lock()
        os.register_at_fork(after_in_child=self._after_fork_in_child)

    def _after_fork_in_child(self) -> None:
        self._lock = Lock()  # a thread of the parent may have it

    def __call__(self, observe: Callable[[Observer], Observation]) -> None:
        """Record a cache or a server, of which this is the method ``observe``."""
        with self._lock:
            if self._pid != os.getpid():
                self._pid, self._recorder = os.getpid(), None
                try:
                    self._recorder = Recorder(f"{self._path}.{self._pid}")
                except (OSError, ValueError) as error:
                    logger.warning("XENMAPCACHE_RECORD: nothing is recorded: %s", error)
            recorder = self._recorder
        if recorder is not None:
            recorder.add(observe)


def _shorten(table: dict[Any, bytes]) -> None:
    """Forget the oldest of too many entries; the end of some was perhaps never heard of."""
    for key in list(islice(table, max(0, len(table) - _MAX_RESTATED))):
        del table[key]


_TAKEN: Final = ("time", "lease", "start", "length")
_RELEASED: Final = ("time", "lease")
_DIRTIED: Final = ("time", "start", "length")
_HANDLED: Final = ("time", "address", "duration")


def _after_fork_in_child() -> None:
    for recorder in list(_recorders):
        recorder.forget()


os.register_at_fork(after_in_child=_after_fork_in_child)
