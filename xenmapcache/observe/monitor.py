"""The monitor: a socket at which other programs ask what this process's caches and servers hold.

It answers also if the program is stuck, because it reads without locks, in a thread of its own. The
thread sleeps while nobody asks. A client sends a line, ``state``, and gets a line of JSON: see
:class:`.snapshot.Snapshot`. The commands ``xenmapcache ps``, ``leases`` and ``top`` are such
clients.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import os
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final, Self

from ..cache import MapCache
from ..devicemodel import IoreqServer
from ..logs import safely
from ..stream import Observation, Observer
from .answering import MAX_LINE, Responder
from .reading import Watchable, Watched, process_started_ns, read_process
from .snapshot import error_json
from .sockets import SocketFolder, make_folder, socket_name

# Theory of operation
#
# A process has one socket, `PID.sock`, whatever number of monitors it has. The first monitor opens
# it, and the last one that is closed removes it. A client sees what any of the monitors watches.
#
#   no socket --first monitor--> listening --last one closed, or exit--> no socket
#
# A process that is killed leaves its socket file. The next process that opens a monitor, and the
# commands, remove it: see `sockets`.
#
# In a forked child there is no thread. Its copies of the sockets are closed, so that a client is
# not kept waiting when the parent has ended. The parent's file stays. The child may open a monitor
# of its own.

logger = logging.getLogger("xenmapcache")
_SHOWN = 40
_TOO_LONG: Final = f"{error_json(f'the line is longer than {MAX_LINE} bytes')}\n".encode("ascii")


def serve(*watched: Watchable) -> Monitor:
    """Let other programs of this user, and of root, ask what caches and servers hold.

    The caches and servers are not kept alive by it.

    Args:
        watched: at least one.

    Returns:
        The monitor, which is a context manager that closes it.

    Raises:
        TypeError: something is neither a cache nor a server, or nothing is given.
        OSError: the socket cannot be made; PermissionError if its folder is open to other users.
    """
    if not watched:
        raise TypeError("serve() needs at least one MapCache or IoreqServer")
    for each in watched:
        if not isinstance(each, MapCache | IoreqServer):
            raise TypeError(f"{each!r} must be a MapCache or an IoreqServer")
    monitor = Monitor()
    monitor.add(*watched)
    return monitor


class Monitor:
    """What :func:`serve` returns. Also a context manager, which closes it.

    If it is dropped without a call of :meth:`close`, it continues to the end of the process.

    Attributes:
        path: of the socket; every monitor of the process has the same.

    Synchronization: any thread.
    """

    def __init__(self) -> None:
        self.watched: dict[int, Watched] = {}
        self.path = _process.open(self)

    def __repr__(self) -> str:
        return f"<{'closed ' if self.closed else ''}monitor at {self.path!r}>"

    @property
    def closed(self) -> bool:
        """Whether it was closed, or is that of a parent that has forked this process."""
        return self not in _process.monitors

    def add(self, *watched: Watchable) -> None:
        """Show further caches or servers."""
        for each in watched:
            key = _next_key()
            # The callback is C code: no interrupt comes between its steps.
            self.watched[key] = Watched(each, partial(self.watched.pop, key))

    def close(self) -> None:
        """Do not show them any longer. Idempotent. The last one that is closed removes the socket.

        In a forked child it does nothing.
        """
        _process.close(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ProcessMonitor:
    """Shows every cache and server of a process, as ``XENMAPCACHE_MONITOR`` wants it.

    The first one opens the socket; in a forked child, the first one that the child makes. If the
    socket cannot be made, a WARNING says so once, and the program runs without.

    Synchronization: any thread.
    """

    def __init__(self) -> None:
        self._monitor: Monitor | None = None
        self._warned = False

    def __call__(self, observe: Callable[[Observer], Observation]) -> None:
        """Show a cache or a server, of which this is the method ``observe``."""
        watched: Any = getattr(observe, "__self__", None)
        monitor = self._monitor
        try:
            if monitor is None or monitor.closed:
                self._monitor = serve(watched)
            else:
                monitor.add(watched)
        except OSError as error:
            if not self._warned:
                self._warned = True
                safely(logger.warning, "XENMAPCACHE_MONITOR: there is no monitor: %s", error)


class _Process:
    """The socket of this process.

    Attributes:
        monitors: those that are open.
    """

    def __init__(self) -> None:
        self.monitors: dict[Monitor, None] = {}
        self._lock = threading.RLock()
        self._responder: Responder | None = None
        self._folder = Path()
        self._started_ns = 0

    def open(self, monitor: Monitor) -> str:
        """Open a monitor, and the socket if it is the first one. Returns the socket's path."""
        with self._lock:
            if self._responder is None:
                self._listen()
            self.monitors[monitor] = None
            return os.fspath(self._folder / socket_name(os.getpid()))

    def _listen(self) -> None:
        self._started_ns = process_started_ns()
        pid = os.getpid()
        with make_folder() as folder:
            folder.clean()
            responder = Responder(folder.listen(pid), self._reply, _TOO_LONG)
            try:
                responder.start()
            except BaseException:
                folder.remove(socket_name(pid))
                responder.close()
                raise
            self._folder, self._responder = folder.path, responder

    def close(self, monitor: Monitor) -> None:
        """Close a monitor, and the socket if it is the last one."""
        with self._lock:
            self.monitors.pop(monitor, None)
            responder = self._responder
            if self.monitors or responder is None:
                return
            self._responder = None
            try:
                with SocketFolder(self._folder) as folder:
                    folder.remove(socket_name(os.getpid()))
            except OSError as error:  # for example, this process is not root any longer
                safely(logger.info, "the monitor's socket is not removed: %s", error)
        responder.stop()

    def close_all(self) -> None:
        """Close all monitors: the process ends."""
        for monitor in [*self.monitors]:
            self.close(monitor)

    def forget(self) -> None:
        """In a forked child: the monitors are the parent's, who continues to answer."""
        self._lock = threading.RLock()
        self.monitors = {}
        responder, self._responder = self._responder, None
        if responder is not None:
            responder.close()

    def _reply(self, line: bytes) -> bytes:
        """Return the answer to a line."""
        command = line.strip()
        if command == b"state":
            try:
                text = read_process(self._watched(), self._started_ns).to_json()
            except Exception as error:
                text = error_json(f"this process cannot be read: {error!r}")
        else:
            text = error_json(f"unknown command {command[:_SHOWN]!r}: send 'state'")
        return f"{text}\n".encode("ascii")

    def _watched(self) -> Iterator[Watched]:
        """Yield what any of the monitors watches, each once."""
        seen = set()
        for monitor in self.monitors.copy():
            for each in monitor.watched.copy().values():
                number = id(each.get())
                if number not in seen:
                    seen.add(number)
                    yield each


_next_key = itertools.count().__next__
_process = _Process()
atexit.register(_process.close_all)
os.register_at_fork(after_in_child=_process.forget)
