"""The recorder: an observer that writes events to a file, where they survive the process.

The file has two halves, which take turns; see :mod:`.halves`. If one is full, the recorder begins
the other one with lines that restate what is open, mapped and held.
"""

# Rules, besides those of :mod:`.pen`
#   1. A thread that comes while room is made leaves its events in their queue. They are stored
#      when the room is made.
#   2. A forked child has the mapping, but not the recording: it stores nothing.

from __future__ import annotations

import fcntl
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Callable
from errno import EEXIST
from itertools import islice
from threading import Lock, RLock
from typing import Any, Final, Protocol, Self
from weakref import WeakSet

from ..address import GiB, MiB, parse_size
from ..errors import ClosedError
from ..events import Event
from ..files.atomic import new_file
from ..stream import Observation, Observer, now
from .eventlines import VERSION, Header, encode_header
from .halves import Halves
from .pen import Pen, State
from .recording import is_recording

MIN_LIMIT: Final = MiB
MAX_LIMIT: Final = 1024 * GiB

_MAX_RESTATED: Final = 100_000

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
        self._behind: dict[Pen, deque[Event]] = {}
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
        self._observations[number] = observe(Pen(self, number))

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

    def make_room(self, size: int, pen: Pen, queue: deque[Event]) -> bool:
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


def _after_fork_in_child() -> None:
    for recorder in list(_recorders):
        recorder.forget()


os.register_at_fork(after_in_child=_after_fork_in_child)
