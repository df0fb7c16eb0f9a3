"""The recorder: an observer that writes events to a file, where they survive the process.

The file is mapped, and shared with the kernel: an event is in the file as soon as it was stored,
even if the process is killed. The file has two halves, which take turns. If one is full, the
recorder begins the other one with a header and with lines that restate what is mapped and held, and
overwrites what the half had. A NUL follows the last line of a half.
"""

# Rules
#   1. Space is allocated before it is stored to: otherwise a full disk is a SIGBUS.
#   2. A store has the line and the NUL after it. Until the next store, the NUL ends the half, and
#      what was in the half before the last turn is not read.
#   3. Only one event is stored at a time. Several streams, threads, finalizers and signal handlers
#      may bring others: those wait, and the store that is under way stores them at its end.
#   4. A forked child has the mapping, but not the recording: it stores nothing.

from __future__ import annotations

import contextlib
import fcntl
import logging
import mmap
import os
import sys
import time
from collections import deque
from collections.abc import Callable
from errno import EEXIST
from functools import partial
from itertools import islice
from threading import Lock, RLock
from typing import Any, Final, Protocol, Self
from weakref import WeakSet

from ..address import GiB, MiB, parse_size
from ..binding.descriptor import Descriptor, own
from ..errors import ClosedError
from ..events import (
    BucketDropped,
    BucketMapped,
    CacheClosed,
    CacheOpened,
    Event,
    EventsLost,
    Invalidated,
    LeaseReleased,
    LeaseTaken,
    RequestHandled,
)
from ..files.atomic import new_file
from ..stream import Observation, Observer, now
from .eventlines import VERSION, Header, encode, encode_header, template
from .recording import is_recording

MIN_LIMIT: Final = MiB
MAX_LIMIT: Final = 1024 * GiB

_GROWTH_BYTES: Final = MiB
_MADV_POPULATE_WRITE: Final = 23
_MAX_WAITING: Final = 10_000
_MAX_TEMPLATES: Final = 4096
_MAX_RESTATED: Final = 100_000

# With a GIL no thread switches between a look at a flag and its change, without a call.
_HAS_GIL: Final = getattr(sys, "_is_gil_enabled", lambda: True)()

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
        self._half = size // 2 // mmap.PAGESIZE * mmap.PAGESIZE
        self._number = self._start = self._position = self._end = 0
        self._streams = self._lost = 0
        self._lock = RLock()
        self._storing = self._closed = False
        self._waiting: deque[tuple[int, Event]] = deque()
        self._observations: dict[int, Observation] = {}
        self._templates: dict[object, bytes] = {}
        self._opened: dict[int, bytes] = {}
        self._held: dict[int, bytes] = {}
        self._mapped: dict[tuple[int, int], bytes] = {}
        with new_file(path, replaceable=self._is_replaceable) as fd:
            os.ftruncate(fd, 2 * self._half)
            self._file: Descriptor = own(partial(os.dup, fd))
            fcntl.flock(fd, fcntl.LOCK_EX)
            self._memory = mmap.mmap(fd, 2 * self._half)
            self._store(self._header([]))
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
        number, self._streams = self._streams, self._streams + 1
        self._observations[number] = observe(self._observer(number))

    def detach(self) -> None:
        """Write what is queued, and close the file. Idempotent; any thread."""
        while self._observations:
            self._observations.popitem()[1].detach()
        self._closed = True
        if not self._storing:  # otherwise the store that is under way closes the file
            self._settle()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def forget(self) -> None:
        """Close the file in a forked child, and leave it to the parent."""
        self._closed = self._storing = True  # a thread of the parent may be amid a store
        self._waiting.clear()
        self._memory.close()
        self._file.close()

    def _observer(self, stream: int) -> Observer:
        """Return the function that stores the events of a stream.

        It is one function without calls, because it is called for each lease. All of a frequent
        event's line but the numbers is formatted once.
        """
        templates, held, memory = self._templates, self._held, self._memory

        def observe(event: Any) -> None:  # noqa: ANN401 - mypy cannot narrow by a compared type
            key: object
            if self._storing:
                self._wait(stream, event)
                return
            self._storing = True
            try:
                if self._waiting:
                    self._store_waiting()
                kind = event.__class__
                if kind is LeaseTaken:
                    at, lease, what, start, length, owner, way, thread, stale, origin = event
                    key = stream, what, owner, way, thread, stale, origin
                    form = templates.get(key) or self._template(key, stream, event, _TAKEN)
                    line = held[lease] = form % (at, lease, start, length)
                elif kind is LeaseReleased:
                    at, lease, stale, copied, lost = event
                    key = stream, stale, copied, lost
                    form = templates.get(key) or self._template(key, stream, event, _RELEASED)
                    line = form % (at, lease)
                    held.pop(lease, None)
                else:
                    line = self._line(stream, event)
                start = self._position
                end = start + len(line)
                if end > self._end:
                    self._store(line)
                else:
                    memory[start:end] = line
                    self._position = end - 1
            finally:
                self._storing = False
            if self._waiting or self._closed:
                self._settle()

        observe.__qualname__ = repr(self)  # for the stream's warning
        if _HAS_GIL:
            return observe
        lock = self._lock

        def observe_locked(event: Event) -> None:
            with lock:
                observe(event)

        observe_locked.__qualname__ = repr(self)
        return observe_locked

    def _wait(self, stream: int, event: Event) -> None:
        if self._file.closed:
            return
        if len(self._waiting) < _MAX_WAITING:
            self._waiting.append((stream, event))
        else:
            self._lost += 1

    def _settle(self) -> None:
        """Do what came up during a store: store what waits, or close the file."""
        while (self._waiting or self._closed) and not self._storing:
            self._storing = True
            try:
                self._store_waiting()
            finally:
                if self._closed:
                    self._close()
                else:
                    self._storing = False

    def _close(self) -> None:
        self._memory.close()
        if not self._number:
            os.ftruncate(self._file.fileno(), self._position)
        self._file.close()

    def _store_waiting(self) -> None:
        while self._waiting:
            stream, waiting = self._waiting.popleft()
            self._store(self._line(stream, waiting))
        if self._lost:
            event = EventsLost(now(), self._lost)
            self._lost = 0
            self._store(encode(event) + b"\0")

    def _template(self, key: object, stream: int, event: Event, numbers: tuple[str, ...]) -> bytes:
        if len(self._templates) >= _MAX_TEMPLATES:  # a guest can choose what failures are about
            self._templates.clear()
        line = self._templates[key] = template(event, stream, numbers) + b"\0"
        return line

    def _line(self, stream: int, event: Event) -> bytes:
        """Return the line of an event, and a NUL."""
        if isinstance(event, RequestHandled):
            at, vcpu, kind, is_read, address, size, duration, failure, region = event
            key = stream, vcpu, kind, is_read, size, failure, region
            form = self._templates.get(key) or self._template(key, stream, event, _HANDLED)
            return form % (at, address, duration)
        line = encode(event, stream) + b"\0"
        match event:
            case LeaseTaken():
                self._held[event.lease] = line
            case LeaseReleased():
                self._held.pop(event.lease, None)
            case CacheOpened():
                self._opened[stream] = line
            case BucketMapped():
                self._mapped[stream, event.start] = line
            case BucketDropped():
                self._mapped.pop((stream, event.start), None)
            case CacheClosed():
                self._opened.pop(stream, None)
                self._observations.pop(stream, None)
                self._drop_all(stream)
            case Invalidated():
                self._drop_all(stream)
        return line

    def _drop_all(self, stream: int) -> None:
        for key in [key for key in self._mapped if key[0] == stream]:
            del self._mapped[key]

    def _store(self, line: bytes) -> None:
        """Store lines, after which a NUL stands; in a further half if this one is full."""
        while (end := self._position + len(line)) > self._end:
            half_end = self._start + self._half
            if self._end < half_end:
                self._allocate(min(half_end, self._end + _GROWTH_BYTES))
            else:
                self._turn()
        self._memory[self._position : end] = line
        self._position = end - 1

    def _allocate(self, end: int) -> None:
        """Have space, and pages of it: one by one, faults would take longer than the stores."""
        length = end - self._end
        try:
            os.posix_fallocate(self._file.fileno(), self._end, length)
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.path) from None
        with contextlib.suppress(OSError):  # a kernel before 5.14: pages come one by one
            self._memory.madvise(_MADV_POPULATE_WRITE, self._end, length)
        self._end = end

    def _turn(self) -> None:
        """Begin the other half: overwrite what it had."""
        self._number += 1
        self._start = self._position = self._end = self._number % 2 * self._half
        _shorten(self._held)
        _shorten(self._mapped)
        lines = [*self._opened.values(), *self._held.values(), *self._mapped.values()]
        self._store(self._header(lines))

    def _header(self, lines: list[bytes]) -> bytes:
        """Return the first line of a half, and as many lines as may follow it."""
        room = self._half // 4
        kept = list[bytes]()
        for line in lines:
            room -= len(line)
            if room < 0:
                break
            kept.append(line[:-1])
        header = Header(
            VERSION, self._number, self._half, os.getpid(), self._source, now(), time.time_ns(),
            len(kept), len(lines) - len(kept),
        )  # fmt: skip
        return b"".join((encode_header(header), *kept, b"\0"))


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
_HANDLED: Final = ("time", "address", "duration")


def _after_fork_in_child() -> None:
    for recorder in list(_recorders):
        recorder.forget()


os.register_at_fork(after_in_child=_after_fork_in_child)
