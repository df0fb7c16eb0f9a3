"""A server's lock, its connection, and its end."""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import time
from collections.abc import Callable
from functools import partial

from ..binding.descriptor import own
from ..errors import ClosedError
from ..events import ServerClosed
from ..stream import EventStream, now
from .connection import Connection
from .dispatch import Dispatcher, Job, is_async
from .ending import Ending
from .signals import CaughtSignals


class Runtime:
    """What :class:`.server.IoreqServer` and its loops share.

    Args:
        name: of the server, for errors.
        dispatcher: the server's devices and callbacks.
        quiesce_timeout: how long foreign code may run once the server is to be closed.
        ending: makes the end, given what to call after it.
        stream: the cache's.

    Attributes:
        connection: from ``open`` to ``close``; else None.
        closed: the server was closed.
        told: whether observers know it as open.
        server_thread: the last one that :meth:`IoreqServer.serving` has made.
        lock: held while a round is done, a range claimed, or the server opened or closed.

    Synchronization: any thread.
    """

    def __init__(
        self,
        name: str,
        dispatcher: Dispatcher,
        quiesce_timeout: float,
        ending: Callable[[Callable[[], None]], Ending],
        stream: EventStream,
    ) -> None:
        self.connection: Connection | None = None
        self.closed = False
        self.told: bool | None = True
        self.server_thread: threading.Thread | None = None
        self.lock = threading.RLock()
        self.quiesce_timeout = quiesce_timeout
        self.ending = ending(self.ended)
        self._name = name
        self._dispatcher = dispatcher
        self._pid = os.getpid()
        self.streams = (dispatcher.stream, stream)
        # The method of the lock alone: a cache does not keep its servers.
        self._guard = self.lock._is_owned  # type: ignore[attr-defined] # noqa: SLF001 - no other name tells
        for each in self.streams:
            each.guards.append(self._guard)
        self._wakeup = own(partial(os.eventfd, 0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))

    def __repr__(self) -> str:
        state = "closed" if self.closed else "open" if self.connection else "not open"
        return f"<{self._name}, {state}>"

    def is_ours(self) -> bool:
        """Return whether this is the process that made the server, and not a child of it."""
        return os.getpid() == self._pid

    def check_process(self) -> None:
        """Raise ClosedError in a child of the process that made the server."""
        if os.getpid() != self._pid:
            raise ClosedError(f"this ioreq server belongs to process {self._pid}, which forked")

    def check_sync(self, method: str) -> None:
        """Raise TypeError if a callback has to be awaited."""
        for callback in self._dispatcher.callbacks:
            if is_async(callback):
                raise TypeError(
                    f"{method}: the on_quiesce callback {callback!r} is async def; "
                    "only serve_async can await it"
                )

    def check_unserved(self) -> None:
        """Raise RuntimeError if a thread of ``serving`` serves: two loops would share a wake-up."""
        thread = self.server_thread
        if thread in {None, threading.current_thread()} or self.connection is None:
            return
        if thread.is_alive():
            raise RuntimeError(f"{self!r}: a thread of its `with server.serving()` block serves it")

    def is_open(self) -> bool:
        """Return whether there is a connection."""
        return self.connection is not None

    def is_closed(self) -> bool:
        """Return whether the server was closed."""
        return self.closed

    def open_connection(self) -> Connection:
        """Return the connection; ClosedError if there is none."""
        self.check_process()
        connection = self.connection
        if connection is None:
            raise ClosedError(f"{self!r}: use it inside `with server:`")
        return connection

    # --- rounds ---------------------------------------------------------------------------

    def fileno(self) -> int:
        """Return what is readable when there is an event."""
        return self.open_connection().link.fileno()

    def round(self, *, defer: bool = False) -> int | None:
        """Do one round, see :meth:`Connection.process`; None if the server is closed."""
        self.check_process()  # before a lock that a parent's thread may have held at the fork
        if self.connection is None:
            return None
        try:
            return self._round(defer)
        finally:
            self.deliver()

    def _round(self, defer: bool) -> int | None:
        with self.lock:
            connection = self.connection
            if connection is None or connection.closed:
                return None
            try:
                return connection.process(defer=defer)
            except Exception as error:
                if not connection.closed:
                    raise
                # By a signal handler, while this looked at what has gone since.
                raise ClosedError(f"{self!r}: it was closed in the middle of a round") from error

    def has_guest_ended(self) -> bool:
        """Return whether Xen has destroyed the server because its guest has ended."""
        with self.lock:
            connection = self.connection
            if connection is None or connection.closed:
                return False
            return connection.link.has_ended()

    def deliver(self) -> None:
        """Let the server's and the cache's observers see what happened under the lock."""
        for stream in self.streams:
            if stream.observations:
                stream.deliver()

    def wake_fileno(self) -> int:
        """Return what is readable after :meth:`wake`."""
        return self._wakeup.fileno()

    def wake(self) -> None:
        """End the loop that serves, or the next one."""
        if os.getpid() == self._pid:  # a forked child has the same descriptor
            os.eventfd_write(self._wakeup.fileno(), 1)

    def clear_wakeup(self) -> None:
        """Take a wake-up back."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wakeup.fileno())

    # --- callbacks that are awaited ---------------------------------------------------------

    def is_deferred(self) -> bool:
        """Return whether an INVALIDATE waits for callbacks that are awaited."""
        connection = self.connection
        return connection is not None and connection.deferred is not None

    async def finish_deferred(self) -> None:
        """Await the callbacks, and answer the INVALIDATE."""
        connection = self.connection
        channel = connection.deferred if connection is not None else None
        if connection is None or channel is None or channel.job is None:
            return
        try:
            await connection.calls.quiesce_async(channel.job)
        finally:
            with self.lock:
                if not connection.closed:
                    connection.finish_deferred()
            self.deliver()

    async def quiesce_async(self) -> None:
        """Await the callbacks that are ``async def``, at the end of a loop."""
        connection = self.connection
        if connection is not None and any(map(is_async, self._dispatcher.callbacks)):
            await connection.calls.quiesce_async(Job(None))

    # --- the end ------------------------------------------------------------------------------

    def give_up_later(self) -> None:
        """Give up foreign code that still runs after the quiesce timeout."""
        connection = self.connection
        if connection is not None:
            connection.calls.watcher.give_up_at(time.monotonic() + self.quiesce_timeout)

    def keep_on(self) -> None:
        """Take that back."""
        connection = self.connection
        if connection is not None and connection.closer is None:
            connection.calls.watcher.give_up_at(None)

    def close(self) -> None:
        """See :meth:`IoreqServer.close`."""
        if os.getpid() != self._pid:
            return  # the server is the parent's
        signals = CaughtSignals(self.wake)
        try:
            with signals:
                connection = self.connection
                if connection is None:
                    self.closed = True
                    atexit.unregister(self.close)  # if the first close was interrupted before that
                    self._tell_closed()
                else:
                    self._close(connection)
                self.ending.wait_for_report()
        except BaseException:
            signals.put_back()  # an interrupt came at the very beginning of the exit
            raise
        finally:
            self.deliver()
        for number in signals.caught:
            os.kill(self._pid, number)

    def _close(self, connection: Connection) -> None:
        me = threading.get_ident()
        deadline = time.monotonic() + self.quiesce_timeout
        connection.calls.watcher.give_up_at(deadline)
        try:
            while connection.is_busy(me):
                connection.closer = connection.closer or me
                if time.monotonic() >= deadline:
                    self.give_up()
                time.sleep(0.001)
            if not connection.closed:
                connection.closer = me
                with self.lock:
                    self._close_in_order(connection)
            while connection.closed and not connection.destroyed:
                time.sleep(0.001)  # the watcher is giving it up
        finally:
            if connection.closer == me:
                connection.closer = None

    def _close_in_order(self, connection: Connection) -> None:
        errors: list[BaseException] = []
        try:
            errors = self.ending.close(connection)
        finally:
            nested = connection.closed  # by a signal handler or a device's, in the middle
            if connection.destroyed:
                # Plain stores: no signal handler runs between them.
                connection.closed = self.closed = True
                self.connection = None
                try:
                    connection.calls.watcher.stop()
                finally:
                    self.ended()
        if connection.destroyed:
            self._dispatcher.regions.clear()  # which know this server: a cycle
            connection.calls.report()
            connection.calls.log.flush()
        interrupts = [error for error in errors if not isinstance(error, Exception)]
        if errors:
            if nested and not interrupts:
                raise ClosedError(f"{self!r}: it was closed while it closed") from errors[0]
            raise (interrupts or errors)[0]

    def ended(self) -> None:
        """Note that the server is closed, and end the loop that serves."""
        self.closed = True
        self.connection = None
        for stream in self.streams:
            with contextlib.suppress(ValueError):  # it was called before
                stream.guards.remove(self._guard)
        self.wake()
        atexit.unregister(self.close)
        self._tell_closed()

    def _tell_closed(self) -> None:
        stream = self.streams[0]
        if stream.observations:
            stream.put(ServerClosed(now()), self, False)

    def give_up(self) -> None:
        """Close the server without the foreign code that runs."""
        connection = self.connection
        if connection is not None:
            self.ending.give_up(connection)
            self.deliver()
