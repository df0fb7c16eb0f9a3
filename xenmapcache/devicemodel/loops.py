"""The three loops: in this thread, in a thread of its own, and in an asyncio event loop.

They use a server's rounds, its descriptor, its wake-up and the end of its guest, and nothing else
of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import threading
from collections.abc import Callable
from time import monotonic
from types import TracebackType
from typing import Generic, TypeVar

from .runtime import Runtime
from .signals import CaughtSignals, sigterm_in

ServerT = TypeVar("ServerT")

_TURN_S = 0.002
"""How long rounds may follow each other before the event loop gets its turn."""
_LINGER_MS = 0
"""How long a round of the event loop waits for the next event."""
_LOOK_S = 1.0
"""How long the system may sleep before the interpreter looks for signals again.

The loops then also ask whether the guest has ended: no event tells of that.
"""

OnEnd = Callable[[], object] | None
"""What a program does when its guest has ended."""


def serve_forever(server: Runtime, on_end: OnEnd) -> int | None:
    """Serve in this thread; see :meth:`IoreqServer.serve_forever`."""

    def end() -> None:
        server.give_up_later()
        server.wake()

    server.check_unserved()
    guest_has_ended = False
    with CaughtSignals(end) as signals:
        try:
            poller = select.poll()
            poller.register(server.wake_fileno(), select.POLLIN)
            poller.register(server.fileno(), select.POLLIN)
            while not guest_has_ended:
                # A signal does not end this call if it comes just before it, or in another thread.
                events = poller.poll(_LOOK_S * 1000)
                if not events:
                    guest_has_ended = server.has_guest_ended()
                    continue
                woken = any(fd == server.wake_fileno() for fd, _ in events)
                if woken:
                    server.clear_wakeup()
                if woken or server.round() is None:
                    break
        finally:
            server.keep_on()
    if signals.caught:
        return signals.caught[0]
    if guest_has_ended and on_end is not None:
        on_end()
    return None


class ServingThread(Generic[ServerT]):
    """Serves in a thread of its own for a ``with`` block; see :meth:`IoreqServer.serving`."""

    def __init__(self, server: ServerT, runtime: Runtime, on_end: OnEnd) -> None:
        self._server = server
        self._runtime = runtime
        self._on_end = on_end
        self._errors: list[BaseException] = []
        # A daemon: a handler that never returns must not keep the program from its end.
        self._thread = threading.Thread(
            target=self._serve, name=f"thread of {runtime!r}", daemon=True
        )

    def _serve(self) -> None:
        try:
            serve_forever(self._runtime, self._on_end)
        except BaseException as error:
            self._errors.append(error)

    def __enter__(self) -> ServerT:
        self._runtime.open_connection()
        self._runtime.check_unserved()
        self._runtime.server_thread = self._thread
        self._thread.start()
        return self._server

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._runtime.wake()
        self._thread.join(self._runtime.quiesce_timeout)
        if self._thread.is_alive():
            self._runtime.close()  # which gives up what runs there
        else:
            self._runtime.clear_wakeup()  # where it had ended before
        if self._errors:
            raise self._errors[0]


async def serve_async(server: Runtime, on_end: OnEnd) -> int | None:
    """Serve in the running event loop; see :meth:`IoreqServer.serve_async`."""
    server.check_unserved()
    loop = asyncio.get_running_loop()
    caught: list[int] = []
    # One of its own: a number that close() gives back may soon be another server's.
    fd = os.dup(server.fileno())
    turn = _Turn(server, loop, fd)
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, fd)
        stack.callback(turn.stop)
        stack.callback(turn.cancel)
        loop.add_reader(server.wake_fileno(), turn.woken)
        stack.callback(loop.remove_reader, server.wake_fileno())

        def end() -> None:
            caught.append(signal.SIGTERM)
            turn.end()

        stack.enter_context(sigterm_in(loop, end))
        try:
            await turn.run()
        finally:
            await server.quiesce_async()
    if turn.guest_has_ended and on_end is not None:
        on_end()
    return caught[0] if caught else None


class _Turn:
    """What one event loop does for one server.

    Attributes:
        guest_has_ended: that is why the loop has ended.
    """

    def __init__(self, server: Runtime, loop: asyncio.AbstractEventLoop, fd: int) -> None:
        self._server = server
        self._loop = loop
        self._fd = fd
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)
        self._turn: asyncio.Future[None] = loop.create_future()
        self._ended = False
        self.guest_has_ended = False
        self._timer = loop.call_later(_LOOK_S, self._look)

    async def run(self) -> None:
        """Serve until the end; callbacks of on_quiesce are awaited here, and only here."""
        while not self._ended and not self._server.closed:
            self._loop.add_reader(self._fd, self._serve)
            await self._turn
            self._turn = self._loop.create_future()
            if self._server.is_deferred():
                await self._server.finish_deferred()
                self._serve()  # requests that came since have no event left

    def stop(self) -> None:
        """Read no further events."""
        self._loop.remove_reader(self._fd)

    def cancel(self) -> None:
        """Stop asking whether the guest has ended."""
        self._timer.cancel()

    def _look(self) -> None:
        """End the loop if the guest has ended, or look again later."""
        try:
            if self._server.has_guest_ended():
                self.guest_has_ended = True
                self.end()
            else:
                self._timer = self._loop.call_later(_LOOK_S, self._look)
        except Exception as error:
            self._fail(error)

    def end(self) -> None:
        """Have :meth:`run` return."""
        self._ended = True
        self._wake()

    def woken(self) -> None:
        """Take the wake-up of ``stop`` or ``close``."""
        self._server.clear_wakeup()
        self.end()

    def _wake(self) -> None:
        if not self._turn.done():
            self._turn.set_result(None)

    def _serve(self) -> None:
        """Do rounds while there are events, and let the event loop go on then."""
        try:
            end = monotonic() + _TURN_S
            while self._server.round(defer=True) is not None:
                if self._server.is_deferred():
                    self.stop()
                    self._wake()
                    return
                if self._ended or monotonic() > end or not self._poll.poll(_LINGER_MS):
                    return
            self.end()
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        """Have :meth:`run` raise an error, or the event loop report it if there was one before."""
        if self._turn.done():
            raise error
        self._turn.set_exception(error)
