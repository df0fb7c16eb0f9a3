"""The thread that answers lines: clients that are slow, silent, rude or gone keep no other waiting.

No test waits for a time to pass: each waits for an answer, or for the end of a connection.
"""

from __future__ import annotations

import errno
import itertools
import os
import select
import socket
import struct
import threading
import warnings
from collections.abc import Callable, Iterator

import pytest

from xenmapcache.observe import answering as module
from xenmapcache.observe.answering import MAX_CLIENTS, MAX_LINE, Reply, Responder, may_ask

BIG = b"x" * (8 << 20) + b"\n"
"""More than the buffers of a socket hold."""
Start = Callable[..., Callable[[], socket.socket]]
_number = itertools.count().__next__


def reply(line: bytes) -> bytes:
    return BIG if line == b"big" else b"<" + line + b">\n"


class Listener(socket.socket):
    """A socket that listens, of which some calls of ``accept`` fail."""

    def __init__(self, *failures: OSError) -> None:
        super().__init__(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self.failures = [*failures]
        # Of the abstract namespace, where no folder keeps other users out.
        self.bind(f"\0xenmapcache-test-{os.getpid()}-{_number()}")
        self.listen(20)

    def accept(self) -> tuple[socket.socket, object]:
        if self.failures:
            raise self.failures.pop()
        return super().accept()


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a responder; what is returned connects to it."""
    responders = []

    def start(
        reply: Reply = reply, listener: Listener | None = None
    ) -> Callable[[], socket.socket]:
        listener = listener or Listener()
        responder = Responder(listener, reply, b"too long\n")
        responders.append(responder)
        address = listener.getsockname()
        responder.start()

        def connect() -> socket.socket:
            connection = socket.socket(socket.AF_UNIX)
            connection.settimeout(20)
            connection.connect(address)
            return connection

        return connect

    yield start
    for responder in responders:
        responder.stop()
        assert not responder._thread.is_alive()
        assert responder._listener.fileno() == -1


def ask(connection: socket.socket, line: bytes = b"hello") -> bytes:
    connection.sendall(line + b"\n")
    return receive(connection)


def receive(connection: socket.socket, lines: int = 1) -> bytes:
    """Return some lines, or what came before the end of the connection."""
    found = b""
    while found.count(b"\n") < lines and (data := connection.recv(1 << 20)):
        found += data
    return found


def test_lines_are_answered_in_order(start: Start) -> None:
    """Also if they come together, or in parts."""
    with start()() as client:
        client.sendall(b"one\ntwo\nthr")
        assert receive(client, 2) == b"<one>\n<two>\n"
        client.sendall(b"ee")
        assert ask(client, b"!") == b"<three!>\n"


def test_a_client_that_ends_its_side_first(start: Start) -> None:
    """It gets its answer; an unfinished line has none."""
    with start()() as client:
        client.sendall(b"one\ntw")
        client.shutdown(socket.SHUT_WR)
        assert receive(client, 2) == b"<one>\n"


def test_a_line_that_is_too_long(start: Start) -> None:
    """It gets an error, and the connection ends, before all of it was taken."""
    with start()() as client:
        assert ask(client, b"x" * MAX_LINE) == b"<" + b"x" * MAX_LINE + b">\n"
        client.sendall(b"x" * (MAX_LINE + 1))
        assert receive(client, 2) == b"too long\n"


def test_silent_clients_keep_no_other_waiting(start: Start) -> None:
    """If there are too many, the one that is silent longest is dropped."""
    connect = start()
    clients = []
    for number in range(MAX_CLIENTS):
        clients.append(connect())
        assert ask(clients[-1], b"%d" % number) == b"<%d>\n" % number
    assert ask(clients[0]) == b"<hello>\n"
    for _ in range(2):
        clients.append(connect())
        assert ask(clients[-1]) == b"<hello>\n"
    for client in (clients.pop(1), clients.pop(1)):
        with client:
            assert receive(client) == b""
    for client in clients:
        assert ask(client) == b"<hello>\n"
        client.close()


def test_a_client_that_takes_no_answer_keeps_no_other_waiting(start: Start) -> None:
    """It may take it later, and it is complete."""
    connect = start()
    with connect() as slow, connect() as other:
        slow.sendall(b"big\nmore\n")
        assert ask(other) == b"<hello>\n"
        assert receive(slow, 2) == BIG + b"<more>\n"


def test_a_client_that_is_silent_for_too_long(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is dropped, whether it sends nothing or does not take its answer."""
    connect = start()
    with connect() as lazy, connect() as slow, connect() as other:
        for each in (lazy, slow, other):
            assert ask(each) == b"<hello>\n"
        slow.sendall(b"big\n")
        assert slow.recv(1) == b"x"
        monkeypatch.setattr(module, "SILENCE_S", 0.01)
        assert ask(other) in (b"<hello>\n", b"")  # the thread looks at the time now
        assert receive(lazy) == b""
        ended = select.poll()
        ended.register(slow, select.POLLRDHUP)
        assert ended.poll(20_000)
        assert 0 < len(receive(slow)) < len(BIG) - 1


def test_a_client_that_has_gone(start: Start) -> None:
    """Its answer is dropped, and the others get theirs."""
    entered, gone = threading.Event(), threading.Event()

    def slow_reply(line: bytes) -> bytes:
        if line == b"big":
            entered.set()
            gone.wait(20)
        return reply(line)

    connect = start(slow_reply)
    client = connect()
    client.sendall(b"big\n")
    entered.wait(20)
    client.close()
    gone.set()
    with connect() as other:
        assert ask(other) == b"<hello>\n"


@pytest.mark.parametrize(
    "failure", [BlockingIOError(), ConnectionAbortedError(), OSError(errno.EMFILE, "too many")]
)
def test_a_client_that_cannot_be_accepted(
    start: Start, failure: OSError, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is tried again; if there are no descriptors, after a pause, in which others are served."""
    monkeypatch.setattr(module, "_PAUSE_S", 0.01)
    listener = Listener()
    connect = start(listener=listener)
    with connect() as first:
        assert ask(first) == b"<hello>\n"
        listener.failures.append(failure)
        with connect() as second:
            assert ask(first) == b"<hello>\n"
            assert ask(second) == b"<hello>\n"
    assert not listener.failures


def test_a_client_that_is_not_ready_after_all() -> None:
    """A wake-up without a cause changes nothing."""
    responder = Responder(Listener(), reply, b"")
    ours, its = socket.socketpair()
    with ours, its:
        ours.setblocking(False)
        client = responder._clients[ours] = module._Client(ours)
        responder._selector.register(ours, 1, client)
        responder._serve(client)
        assert [*responder._clients] == [ours]
        its.sendall(b"one\n")
        responder._serve(client)
        assert bytes(client.unsent) == b"<one>\n"
        responder._drop(client)
        responder._drop(client)
        responder._serve(client)
        assert its.recv(10) == b""
    responder.close()


class Peer:
    """A connection whose other end is a process of some user."""

    def __init__(self, user: int) -> None:
        self.user = user

    def getsockopt(self, level: int, option: int, size: int) -> bytes:
        assert (level, option) == (socket.SOL_SOCKET, socket.SO_PEERCRED)
        return struct.pack("3i", 1, self.user, 2)[:size]


def test_who_may_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process's own user, and root."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    users = [0, 1, 1000, 1001]
    assert [may_ask(Peer(user)) for user in users] == [True, False, True, False]  # type: ignore[arg-type] # like one


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_gets_no_answer(start: Start) -> None:
    """Although it could connect, the connection ends."""
    connect = start()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that there are threads is the point
        child = os.fork()
    if not child:
        try:
            os.setuid(65534)
            with connect() as client:
                os._exit(0 if receive(client) == b"" else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    with connect() as client:
        assert ask(client) == b"<hello>\n"


def test_stopping_in_the_thread_itself() -> None:
    """A finalizer that runs there may close the last monitor. It does not wait for itself."""
    responders: list[Responder] = []

    def stopping_reply(line: bytes) -> bytes:
        responders[0].stop()
        return reply(line)

    listener = Listener()
    responders.append(Responder(listener, stopping_reply, b""))
    address = listener.getsockname()
    responders[0].start()
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(20)
        client.connect(address)
        assert ask(client) == b""
    responders[0].stop()
    assert not responders[0]._thread.is_alive()
