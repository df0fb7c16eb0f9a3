"""Asking: processes that answer, and those that do not, or not what they should."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.observe.monitor_kit import SNAPSHOT
from xenmapcache.observe import asking as module
from xenmapcache.observe import snapshot as snapshots
from xenmapcache.observe import sockets
from xenmapcache.observe.asking import ask
from xenmapcache.observe.sockets import VARIABLE, SocketFolder

LINE = SNAPSHOT.to_json().encode() + b"\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SocketFolder]:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    tmp_path.chmod(0o700)
    with SocketFolder(tmp_path) as folder:
        yield folder


@contextmanager
def process(
    folder: SocketFolder, pid: int, work: Callable[[socket.socket], object]
) -> Iterator[None]:
    """Be a process that does something with the first client."""
    listener = folder.listen(pid)
    listener.setblocking(True)

    def run() -> None:
        connection, _ = listener.accept()
        with connection:
            work(connection)

    thread = threading.Thread(target=run)
    thread.start()
    with listener:
        yield
        thread.join()


def answer(line: bytes) -> Callable[[socket.socket], object]:
    def work(client: socket.socket) -> None:
        assert client.recv(100) == b"state\n"
        client.sendall(line)

    return work


def test_all_processes_are_asked(folder: SocketFolder) -> None:
    """They answer in any order and in parts; the numbers of sockets put them in order."""
    first = replace(SNAPSHOT, argv="first").to_json().encode() + b"\n"
    answered = threading.Event()

    def slowly(client: socket.socket) -> None:
        client.recv(100)
        client.sendall(LINE[:20])
        answered.wait(20)
        client.sendall(LINE[20:])

    def at_once(client: socket.socket) -> None:
        answer(first)(client)
        answered.set()

    with process(folder, 20, at_once), process(folder, 100, slowly):
        found = ask(timeout=20)
    assert [each.pid for each in found.answers] == [20, 100]
    assert [each.path for each in found.answers] == [
        str(folder.path / "20.sock"),
        str(folder.path / "100.sock"),
    ]
    assert [each.snapshot and each.snapshot.argv for each in found.answers] == [
        "first",
        SNAPSHOT.argv,
    ]
    assert [each.problem for each in found.answers] == ["", ""]
    assert found.problems == ()


def test_only_some_are_asked(folder: SocketFolder) -> None:
    """One without a socket has no answer."""
    with folder.listen(1), process(folder, 20, answer(LINE)):
        found = ask([20, 30], 20)
    assert [each.pid for each in found.answers] == [20]


@pytest.mark.parametrize(
    ("work", "problem"),
    [
        (answer(b""), "has closed the connection without an answer"),
        (answer(b'{"version":'), "has closed the connection without an answer"),
        (answer(b"[]\n"), "answer: [] must be an object"),
        (lambda client: client.recv(1), "cannot be asked: Connection reset by peer"),
    ],
)
def test_what_is_no_answer(
    folder: SocketFolder, work: Callable[[socket.socket], object], problem: str
) -> None:
    """It is told, and the other processes are shown."""
    with process(folder, 20, work), process(folder, 30, answer(LINE)):
        wrong, right = ask(timeout=20).answers
    assert (wrong.snapshot, wrong.problem) == (None, problem)
    assert right.snapshot == SNAPSHOT


def test_an_answer_without_an_end(folder: SocketFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is given up when it is too long."""
    for each in (module, snapshots):
        monkeypatch.setattr(each, "MAX_BYTES", 1000)

    def work(client: socket.socket) -> None:
        client.recv(100)
        client.sendall(b"x" * 2000)
        client.recv(100)

    with process(folder, 20, work):
        (found,) = ask(timeout=20).answers
    assert found.problem == "the answer is longer than 0x3e8 bytes"


def test_a_process_that_does_not_answer(
    folder: SocketFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that has stopped accepts nothing; other clients may wait for it already."""
    monkeypatch.setattr(sockets, "_BACKLOG", 0)
    with folder.listen(20), folder.listen(30):
        other = folder.connect(30)
        assert other is not None
        with other:
            found = ask(timeout=0.01).answers
    assert [each.problem for each in found] == [
        "has not answered within 0.01 s",
        "does not answer, and other clients wait for it already",
    ]


def test_a_socket_that_cannot_be_connected_to(
    folder: SocketFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reason is the kernel's."""

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    with folder.listen(20):
        monkeypatch.setattr(SocketFolder, "connect", refuse)
        (found,) = ask(timeout=20).answers
    assert found.problem == "cannot be asked: Permission denied"


def test_sockets_of_ended_processes_are_removed(folder: SocketFolder) -> None:
    folder.listen(20).close()
    assert ask(timeout=20).answers == ()
    assert folder.pids() == []


def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing one is skipped, an unsafe one told. Of two sockets of a process, one is asked."""
    first, second, unsafe = (tmp_path / name for name in ("first", "second", "unsafe"))
    unsafe.mkdir()
    unsafe.chmod(0o755)
    monkeypatch.setattr(module, "folders", lambda: (tmp_path / "missing", unsafe, first, second))
    with SocketFolder(first, create=True) as one, SocketFolder(second, create=True) as two:
        with process(one, 20, answer(LINE)), two.listen(20):
            found = ask(timeout=20)
    assert [each.path for each in found.answers] == [str(first / "20.sock")]
    (problem,) = found.problems
    assert problem.startswith(f"{unsafe}: it has mode 0755, and must be a folder of user ")
