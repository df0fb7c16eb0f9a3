"""A thread that answers lines at a socket, and costs nothing while there are none.

Neither a client that sends nothing, nor one that does not take its answer, keeps another one
waiting: the thread waits for all of them at once. Clients, their lines and the time that they may
be silent are limited.
"""

from __future__ import annotations

import os
import selectors
import socket
import struct
import threading
from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import Final

from ..binding.descriptor import own

MAX_CLIENTS: Final = 8
"""How many clients there may be. Another one takes the place of the one that is silent longest."""
MAX_LINE: Final = 1024
"""How long a line may be, in bytes."""
SILENCE_S: Final = 60.0
"""How long a client may send nothing, or take nothing of its answer."""

_CHUNK = 4096
_JOIN_S = 1.0
_PAUSE_S = 1.0
_CREDENTIALS: Final = struct.Struct("3i")
"""struct ucred: pid, uid, gid."""

Reply = Callable[[bytes], bytes]


class _Client:
    """A connection.

    Attributes:
        connection: its socket.
        received: what it has sent, and has no answer yet.
        unsent: the rest of the answer that it gets now.
        ending: whether to close the connection after that.
        active: when it has sent or taken something last.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.received = bytearray()
        self.unsent = memoryview(b"")
        self.ending = False
        self.active = monotonic()


class Responder:
    """A thread that answers lines. It is the owner of the socket.

    Args:
        listener: a socket that listens, and does not block.
        reply: returns the answer to a line, with its line end.
        too_long: the answer to a line that is too long.

    Synchronization: any thread may stop it.
    """

    def __init__(self, listener: socket.socket, reply: Reply, too_long: bytes) -> None:
        self._listener = listener
        self._reply = reply
        self._too_long = too_long
        self._clients: dict[socket.socket, _Client] = {}
        self._stopped = False
        self._resume_at: float | None = None
        self._wakeup = own(partial(os.eventfd, 0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        # Not epoll, whose list would be shared with a forked child.
        self._selector = selectors.PollSelector()
        self._selector.register(self._wakeup.fileno(), selectors.EVENT_READ)
        self._selector.register(listener, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="xenmapcache monitor", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread, and close all sockets. Idempotent."""
        self._stopped = True
        os.eventfd_write(self._wakeup.fileno(), 1)
        if self._thread is not threading.current_thread():  # a finalizer may run there
            self._thread.join(_JOIN_S)

    def close(self) -> None:
        """Close all sockets: at the end of the thread; or in a forked child, which has none."""
        for connection in [*self._clients]:
            connection.close()
        self._clients.clear()
        self._listener.close()
        self._selector.close()

    def _run(self) -> None:
        try:
            while not self._stopped:
                for key, _ in self._selector.select(self._timeout()):
                    if key.fileobj is self._listener:
                        self._accept()
                    elif isinstance(key.data, _Client):
                        self._serve(key.data)
                self._drop_silent()
        finally:
            self.close()

    def _timeout(self) -> float | None:
        """Return how long to wait, in seconds; None if nothing happens without an event."""
        due = [client.active + SILENCE_S for client in self._clients.values()]
        if self._resume_at is not None:
            due.append(self._resume_at)
        return max(0.0, min(due) - monotonic()) if due else None

    def _drop_silent(self) -> None:
        now = monotonic()
        if self._resume_at is not None and now >= self._resume_at:
            self._resume_at = None
            self._selector.register(self._listener, selectors.EVENT_READ)
        for client in [*self._clients.values()]:
            if now >= client.active + SILENCE_S:
                self._drop(client)

    def _drop(self, client: _Client) -> None:
        if self._clients.pop(client.connection, None) is not None:
            self._selector.unregister(client.connection)
            client.connection.close()

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError:  # out of descriptors or memory: look again later
            self._selector.unregister(self._listener)
            self._resume_at = monotonic() + _PAUSE_S
            return
        if not may_ask(connection):
            connection.close()
            return
        connection.setblocking(False)
        if len(self._clients) >= MAX_CLIENTS:
            self._drop(min(self._clients.values(), key=lambda client: client.active))
        client = self._clients[connection] = _Client(connection)
        self._selector.register(connection, selectors.EVENT_READ, client)

    def _serve(self, client: _Client) -> None:
        """Receive a part of a line, or send a part of an answer."""
        if client.connection not in self._clients:
            return  # dropped in this round
        client.active = monotonic()
        try:
            if client.unsent:
                client.unsent = client.unsent[client.connection.send(client.unsent) :]
            else:
                data = client.connection.recv(_CHUNK)
                client.received += data
                client.ending = not data
            self._answer(client)
        except BlockingIOError:
            pass
        except OSError:  # it has closed the connection
            client.ending = True
            client.unsent = memoryview(b"")
        if client.ending and not client.unsent:
            self._drop(client)

    def _answer(self, client: _Client) -> None:
        """Begin the answer to the next line, if the one before is complete."""
        if not client.unsent and not client.ending:
            line, end, rest = client.received.partition(b"\n")
            if len(line) > MAX_LINE:
                client.unsent = memoryview(self._too_long)
                client.ending = True
            elif end:
                client.received = rest
                client.unsent = memoryview(self._reply(bytes(line)))
        event = selectors.EVENT_WRITE if client.unsent else selectors.EVENT_READ
        self._selector.modify(client.connection, event, client)


def may_ask(connection: socket.socket) -> bool:
    """Return whether a client is this process's user, or root."""
    size = _CREDENTIALS.size
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    _, user, _ = _CREDENTIALS.unpack(found)
    return user in (0, os.geteuid())
